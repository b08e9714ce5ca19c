"""``python -m imagestore`` is the command line."""

from __future__ import annotations

from imagestore._cli import main

if __name__ == "__main__":
    main()
