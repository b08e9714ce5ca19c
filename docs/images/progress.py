"""Makes ``progress.svg``, one frame of a real run on a terminal: ``python docs/images/progress.py``."""

# ruff: noqa: INP001 - run by path
from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

WIDTH: Final = 92
COMMAND: Final = ("imagestore", "add", "debian-13", "debian-13.raw", "--to", "fast", "--to", "archive")
FRAME: Final = re.compile(r"(?:\r|\x1b\[\d*[AK])+")
# As rich has it, without a frame and without a font from the network; for two lines of WIDTH characters.
SVG: Final = """\
<svg viewBox="0 0 1138 64" xmlns="http://www.w3.org/2000/svg">
<title>imagestore adds an image: name, bar, share, bytes, rate and time left</title>
<style>.{unique_id}-matrix {{ font: {char_height}px/{line_height}px monospace; }} {styles}</style>
<rect width="100%" height="100%" rx="8" fill="#191919"/>
<g transform="translate(8, 5)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def frames(directory: Path) -> list[str]:
    """All that the command writes to a terminal, cut where the bar is drawn anew."""
    stores = "".join(f"[{name}]\ndatadir = {directory}/{name}\n" for name in ("fast", "archive"))
    (directory / "imagestore.conf").write_text(f"[DEFAULT]\nenabled_backends = fast:file, archive:file\n{stores}")
    with (directory / "debian-13.raw").open("wb") as image:
        for _ in range(384):
            image.write(os.urandom(2**20))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, WIDTH, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-m", *COMMAND]
    with subprocess.Popen(  # noqa: S603 - ours, from the line before
        command, cwd=directory, env=environment, stdin=follower, stdout=follower, stderr=follower
    ) as process:
        os.close(follower)
        told = b""
        try:
            while part := os.read(leader, 65536):
                told += part
        except OSError:
            process.wait(60)
    os.close(leader)
    return FRAME.split(told.decode())


def main() -> None:
    """Write the picture beside this file."""
    with tempfile.TemporaryDirectory() as directory:
        frame = next(frame for frame in frames(Path(directory)) if re.search(r"6\d%.*iB/s.*\d:\d\d:\d\d", frame))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), legacy_windows=False)
    console.print(Text.assemble(("$ ", "green"), " ".join(COMMAND)))
    console.print(Text.from_ansi(frame.strip("\r\n")))
    picture = console.export_svg(theme=DIMMED_MONOKAI, code_format=SVG, unique_id="progress")
    picture = re.sub(r' clip-path="[^"]*"|<text [^>]*>\s*</text>', "", picture)
    Path(__file__).with_suffix(".svg").write_text(picture)


if __name__ == "__main__":
    main()
