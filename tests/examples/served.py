"""An example service under a real server, a process of its own, on a free port of loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import anyio

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


class Server:
    """Attributes: url; folder: the directory of its store; log: what it has written."""

    def __init__(self, app, place, listener, settings):
        self.app = app
        self.place = place
        self.listener = listener
        self.settings = settings
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.folder = place / "images"
        self.log = place / "server.log"
        self.process = None

    def start(self):
        fd = self.listener.fileno()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "--app-dir", EXAMPLES, "--fd", str(fd), self.app],
                # The C library otherwise keeps freed blocks of every thread for itself; see the how-to.
                env={**os.environ, **self.settings, "MALLOC_MMAP_THRESHOLD_": "1048576"},
                pass_fds=[fd],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(30) in (0, -signal.SIGINT), self.log.read_text()

    def kill(self):
        """As ``kill -9`` does it."""
        self.process.kill()
        self.process.wait(10)

    def status(self, name):
        """A number of the process: `VmHWM` (bytes at most in memory), `Threads`."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                number, _, unit = line.partition(":")[2].strip().partition(" ")
                return int(number) * (1024 if unit == "kB" else 1)
        raise AssertionError(name)

    def stored(self):
        """Every file below the store's directory, hidden ones too."""
        return {path.name for path in self.folder.rglob("*") if path.is_file()}

    def held(self):
        """What the process has open below the store's directory, files without a name too."""
        found = []
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except FileNotFoundError:
                continue
            if target.startswith(f"{self.folder}/"):
                found.append(target)
        return found


@contextmanager
def serving(place, app="fastapi_images:app", settings=None, store="", **options):
    """Run an example with a file store. ``options`` are those of all stores, ``store`` lines for its own section."""
    lines = "".join(f"{name} = {value}\n" for name, value in options.items())
    config = place / "images.conf"
    config.write_text(
        f"[DEFAULT]\nenabled_backends = local:file\n[imagestore]\n{lines}[local]\ndatadir = {place / 'images'}\n{store}"
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        server = Server(app, place, listener, {"IMAGES_CONF": str(config), **(settings or {})})
        server.folder.mkdir()
        server.start()
        try:
            yield server
            server.stop()
        finally:
            server.kill()
    text = server.log.read_text()
    assert "shutdown complete" in text
    assert "Traceback" not in text, text


async def until(condition):
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await anyio.sleep(0.02)
