"""A driver of somebody else, installed for real: found by name, configured, and proved with the kit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOY = REPOSITORY / "tests" / "thirdparty"

USE = """
import json, sys
from imagestore import load_stores, open_store

with load_stores(sys.argv[1]) as stores:
    store = stores["toys"]
    result = store.add("image", b"x" * 100_000)
    with store.get(result.location) as reader:
        whole = reader.read() == b"x" * 100_000
with open_store("toy", database=sys.argv[2]) as store:
    listed = [image.image_id for image in store.list()]
print(json.dumps({"driver": store.driver_name, "uri": result.location.uri, "whole": whole, "listed": listed}))
"""


def _run(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "PYTEST"))
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) is fails, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a fresh environment in which imagestore and the toy driver are installed."""
    place = tmp_path_factory.mktemp("thirdparty")
    # Builds leave files beside their sources.
    shutil.copytree(TOY, place / "toy", ignore=shutil.ignore_patterns("__pycache__", "conftest.py"))
    shutil.copytree(
        REPOSITORY,
        place / "imagestore",
        ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "docs", "*.egg-info", "build", "dist"),
    )
    _run(sys.executable, "-m", "venv", place / "env", cwd=place)
    pip = (place / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    try:
        _run(*pip, place / "imagestore", place / "toy", "pytest", cwd=place)
    except AssertionError as error:
        network = ("Could not find a version", "Connection", "Temporary failure", "Name or service")
        if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all" or not any(word in str(error) for word in network):
            raise
        pytest.skip("the Python package index can't be reached")
    shutil.rmtree(place / "imagestore")
    return place


def test_found_by_name(place: Path) -> None:
    conf = place / "stores.conf"
    database = place / "images.db"
    conf.write_text(
        f"[DEFAULT]\nenabled_backends = toys:toy\n[imagestore]\ndefault_backend = toys\n[toys]\ndatabase = {database}\n"
    )
    told = json.loads(_run(place / "env/bin/python", "-c", USE, conf, database, cwd=place))
    assert told == {"driver": "toy", "uri": "toy://image", "whole": True, "listed": ["image"]}


def test_option_is_required(place: Path) -> None:
    conf = place / "empty.conf"
    conf.write_text("[DEFAULT]\nenabled_backends = toys:toy\n[imagestore]\ndefault_backend = toys\n[toys]\n")
    told = _run(place / "env/bin/python", "-c", USE, conf, "x", cwd=place, fails=True)
    assert "ConfigurationError" in told or "InvalidOption" in told
    assert "database" in told
    assert "toys" in told


def test_passes_the_kit(place: Path) -> None:
    told = _run(place / "env/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "toy", cwd=place)
    assert "imagestore conformance" in told
    assert " 0 passed" not in told
    assert "the harness has no hold()" in told
