"""The user's door: complete, and cheap to open."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import imagestore
from imagestore import _models, errors


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_it_imports_next_to_nothing() -> None:
    loaded = json.loads(run("import sys, json; before = set(sys.modules); import imagestore; "
                            "print(json.dumps(sorted(set(sys.modules) - before)))"))  # fmt: skip
    assert [name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names] == ["imagestore"]
    assert not {"importlib.metadata", "dataclasses", "hashlib", "logging", "concurrent.futures"} & set(loaded)


def test_values_and_errors_need_no_configuration_library() -> None:
    loaded = run("import sys, imagestore; imagestore.Limits(), imagestore.NotFound; print(*sys.modules)").split()
    assert not {name.split(".")[0] for name in loaded} & {"oslo_config", "stevedore", "requests"}


@pytest.mark.parametrize("name", imagestore.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(imagestore, name)
    assert getattr(imagestore, name) is value
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert value.__doc__ or name == "Progress"


def test_all_is_complete_and_sorted() -> None:
    raised = {name for name in errors.__all__ if inspect.isclass(getattr(errors, name))}
    theirs = {"ImageReader", "Store", "Stores", "__version__", "load_stores", "open_store"}
    assert set(imagestore.__all__) == raised | set(_models.__all__) | theirs
    assert len(set(imagestore.__all__)) == len(imagestore.__all__)
    assert set(imagestore.__all__) <= set(dir(imagestore))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(imagestore.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen.keys() | {"__version__"} == set(imagestore.__all__)
    for name, module in seen.items():
        assert imagestore._HOME.get(name, "imagestore.errors") == module


def test_the_version_is_that_of_the_package() -> None:
    assert imagestore.__version__ == version("imagestore")


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'redact'"):
        imagestore.redact  # type: ignore[attr-defined]  # noqa: B018 - that it isn't there is what is tested
