"""The commands of `imagestore`, on click; tables and progress bars are rich's.

On a terminal results are tables; in a pipe they are lines of values with tabs between them; with ``--json`` they are
JSON documents. Results go to standard output, all else to standard error.

A command is a function in one of the modules below, under `imagestore._commands.group.command`; what it needs of the
outside (stores, output, errors) comes from its `Session`.
"""

from __future__ import annotations

from imagestore._commands import checking, demo, inspecting, inventory, transfers
from imagestore._commands.group import cli
from imagestore._commands.session import EXIT_CODES

__all__ = ["EXIT_CODES", "checking", "cli", "demo", "inspecting", "inventory", "transfers"]
