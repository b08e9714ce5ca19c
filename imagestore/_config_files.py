"""Where configuration files are when nobody names them; apart from `imagestore.config`, which needs oslo.config."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["CONFIG_FILES", "CONFIG_VARIABLE", "default_config_files"]

CONFIG_VARIABLE: Final = "IMAGESTORE_CONFIG"
"""The environment variable that names the files, with colons between them."""

CONFIG_FILES: Final = ("~/.config/imagestore/imagestore.conf", "/etc/imagestore/imagestore.conf")
"""Where they are looked for without that variable; the first that is there is the only one."""


def default_config_files(places: tuple[str, ...] = CONFIG_FILES) -> tuple[str, ...]:
    """The files that the environment names, or the first of ``places`` that is there, or none."""
    if given := tuple(path for path in os.environ.get(CONFIG_VARIABLE, "").split(os.pathsep) if path):
        return given
    found = (os.path.expanduser(path) for path in places)
    return tuple(path for path in found if os.path.exists(path))[:1]
