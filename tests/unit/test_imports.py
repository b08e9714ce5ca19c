"""Who may import whom. A new module must be given its place here."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import imagestore

ROOT = Path(imagestore.__file__).parent

# A module imports only what stands in a line above its own.
ORDER = (
    ("_config_files", "_http_headers", "_options", "errors"),
    ("formats",),
    ("_models",),
    ("driver",),
    ("_pool", "_retry", "_source"),
    ("_connection", "_digest", "_record"),
    ("_reader", "_transfer"),
    ("_adding", "_download"),
    ("_store",),
    ("_stores",),
    ("aio", "config", "observers"),
    ("_demo",),
    ("_commands",),
    ("_cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Modules that know nothing of the order but what is named.
APART = {"image": {"errors"}, "lifecycle": {"errors", "image", "_models"}}
SDKS = {
    "s3": {"boto3", "botocore"},
    "swift": {"swiftclient", "keystoneauth1"},
    "cinder": {"cinderclient", "keystoneauth1", "os_brick"},
    "http": {"requests", "urllib3"},
    "gridfs": {"pymongo", "gridfs", "bson"},
    "vmware": {"pyVmomi", "pyVim", "requests", "urllib3"},
    "rbd": {"rados", "rbd"},
}
# The store hashes, repeats and tells, for all drivers alike.
NOT_IN_DRIVERS = {"hashlib", "hmac", "logging"}
# They are servers, and a server hashes what it is sent.
SERVERS = {"drivers._memory_server"}
# Only there for type checkers.
STUBS = {"_typeshed", "typing_extensions"}

FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports anywhere in it, also only for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            if node.module in {"imagestore", "imagestore.drivers", "imagestore.testing"}:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def kin(name: str) -> str:
    """The driver that a module belongs to: ``memory`` for ``drivers._memory_server``."""
    return name.rpartition(".")[2].lstrip("_").partition("_")[0]


def ours(path: Path) -> set[str]:
    return {name.removeprefix("imagestore.") for name in imported(path) if name.startswith("imagestore.")}


def foreign(path: Path) -> set[str]:
    top = {name.split(".")[0] for name in imported(path)}
    return top - set(sys.stdlib_module_names) - STUBS - {"imagestore"}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports(path: Path) -> None:
    name = module(path)
    top = name.split(".")[0]
    if top == "drivers":
        family = kin(name)
        theirs = {each for each in ours(path) if not each.startswith("drivers.")}
        assert theirs <= {"driver", "errors"}
        assert {kin(each) for each in ours(path) - theirs} <= {family}
        assert foreign(path) <= {"oslo_config"} | SDKS.get(family, set())
        assert name in SERVERS or not {each.split(".")[0] for each in imported(path)} & NOT_IN_DRIVERS
    elif top == "testing":
        assert not ours(path) & {"_cli"}
    elif top in APART:
        assert {each.split(".")[0] for each in ours(path)} <= APART[top] | {top}
    else:
        assert top in RANK, "give the module its place in ORDER"
        inner = {each.split(".")[0] for each in ours(path)} - {top}
        assert not {each for each in inner if RANK.get(each, len(ORDER)) >= RANK[top]}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_third_party_libraries(path: Path) -> None:
    name = module(path).split(".")[0]
    tools = {"click", "rich"}
    allowed = {
        "driver": {"oslo_config"},
        "aio": {"anyio"},
        "observers": {"opentelemetry"},
        "config": {"oslo_config", "stevedore"},
        "_commands": tools,
        "_cli": tools,
    }
    if name == "testing":
        # The kit needs no test framework; only the plugin is one.
        assert foreign(path) <= ({"pytest", "oslo_config"} if path.stem == "plugin" else {"oslo_config"})
    elif name != "drivers":
        assert foreign(path) <= allowed.get(name, set())


def test_the_order_names_no_module_twice() -> None:
    assert len(RANK) == sum(len(names) for names in ORDER)
    assert not RANK.keys() & APART.keys()
