"""Other readers of image formats, asked carefully: `qemu-img` in a child with limits, and oslo.utils."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

QEMU_NAMES = {"vpc": "vhd", "parallels": "ploop"}
REQUIRED = os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all"


def which(tool: str) -> str | None:
    """Where a tool is; those of administrators may not be on the path."""
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def missing(what: str) -> NoReturn:
    """Skip, by name; fail where everything must be there."""
    if REQUIRED:
        pytest.fail(f"not installed: {what}")
    pytest.skip(f"not installed: {what}")


def need(*tools: str) -> None:
    """Every tool must be there."""
    absent = [tool for tool in tools if which(tool) is None]
    if absent:
        missing(", ".join(absent))


@dataclass(frozen=True)
class Told:
    """What another reader says. `format` is None where it refuses to say."""

    format: str | None
    virtual_size: int | None = None
    refused: str | None = None


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


def qemu(path: Path, format: str | None = None) -> Told:
    command = ["qemu-img", "info", "--output=json", *(["-f", format] if format else []), str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=_limits, cwd=path.parent, check=False
    )
    if done.returncode:
        return Told(None, refused=done.stderr.strip())
    found = json.loads(done.stdout)
    return Told(QEMU_NAMES.get(found["format"], found["format"]), found["virtual-size"])


def oslo(path: Path) -> Told:
    """What it says once it has seen all of the file. Several formats are joined by a plus sign."""
    from oslo_utils.imageutils import format_inspector

    try:
        with path.open("rb") as file:
            wrapper = format_inspector.InspectWrapper(file)
            while wrapper.read(65536):
                pass
            wrapper.close()
            found = wrapper.formats
    except Exception as error:  # noqa: BLE001 - whatever an oracle raises is its answer
        return Told(None, refused=type(error).__name__)
    name = "+".join(sorted(str(each) for each in found))
    try:
        for each in found:
            each.safety_check()
    except Exception as error:  # noqa: BLE001 - as above
        return Told(name, refused=type(error).__name__)
    try:
        size = found[0].virtual_size
    except Exception:  # noqa: BLE001 - as above
        size = None
    return Told(name, size)
