"""Where the command line begins. The commands are in `imagestore._commands`, which needs the extra ``cli``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

_EXTRA = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; without the extra, say how to install it."""
    try:
        for module in _EXTRA:
            importlib.import_module(module)
        from imagestore._commands import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        print("imagestore: the command line needs click and rich: pip install 'imagestore[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not break a command that has done its work.
        if callable(change := getattr(stream, "reconfigure", None)):
            change(errors="backslashreplace")
    cli.main(args=None if arguments is None else list(arguments), prog_name="imagestore")
