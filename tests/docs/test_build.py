"""The documentation builds without a warning and without a network, and the built pages have what they should."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from docpages import DOCS, REPOSITORY, pages

DOORS = (
    "imagestore",
    "imagestore.errors",
    "imagestore.driver",
    "imagestore.config",
    "imagestore.testing",
    "imagestore.aio",
    "imagestore.formats",
    "imagestore.observers",
    "imagestore.image",
    "imagestore.lifecycle",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as CI does it."""
    place = tmp_path_factory.mktemp("html")
    # Whoever wanted the network would try this proxy, and fail.
    environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-b",
            "html",
            "-d",
            place / "doctrees",
            DOCS,
            place,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place


def test_every_page_is_built(built: Path) -> None:
    for page in pages():
        assert (built / page.relative_to(DOCS)).with_suffix(".html").exists()


def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    for page in built.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', page.read_text("utf-8"))
        loaded += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="([^"]+)"', page.read_text("utf-8"))
        assert not [address for address in loaded if "//" in address], page


def _described(built: Path) -> set[str]:
    """The Python names of the inventory that Sphinx writes (version 2: four lines, and then compressed ones)."""
    text = zlib.decompress((built / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    return {line.split(" ")[0] for line in text.splitlines() if " py:" in line}


@pytest.mark.parametrize("door", DOORS)
def test_every_public_name_is_described(built: Path, door: str) -> None:
    described = {name.rpartition(".")[2] for name in _described(built) if name.startswith("imagestore.")}
    missing = set(importlib.import_module(door).__all__) - described - {"__version__"}
    assert not missing, f"in no page of the reference: {sorted(missing)}"


def _code(built: Path, page: str, caption: str) -> str:
    """What blocks with this caption have in all, in order."""
    text = (built / page).read_text("utf-8")
    pattern = rf'<span class="caption-text">{re.escape(caption)}</span>.*?<pre>(.*?)</pre>'
    found = re.findall(pattern, text, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", "".join(found)))


@pytest.mark.parametrize("name", ["imagestore_toy.py", "test_imagestore_toy.py", "pyproject.toml"])
def test_the_whole_driver_is_on_its_page(built: Path, name: str) -> None:
    """Who reads only the built page has every line of the package that tests/conformance installs and proves."""
    wanted = (REPOSITORY / "tests" / "thirdparty" / name).read_text("utf-8")
    shown = _code(built, "howto/write-a-driver.html", name)
    assert [line for line in shown.splitlines() if line.strip()] == [
        line for line in wanted.splitlines() if line.strip()
    ]
