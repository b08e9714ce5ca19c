"""Every code block of the documentation runs, page by page, and does what the page says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import docpages
import pytest
from docpages import Block, Page, Wrong, blocks


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of its own, from which modules may be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in Page(tmp_path).environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("IMAGESTORE_CONFIG", raising=False)
    yield tmp_path
    for name, module in tuple(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("path", docpages.pages(), ids=lambda path: str(path.relative_to(docpages.DOCS)))
def test_page(path: Path, place: Path) -> None:
    Page(path).run()


@pytest.mark.parametrize("path", docpages.pages(), ids=lambda path: str(path.relative_to(docpages.DOCS)))
def test_what_is_not_run_has_a_reason(path: Path) -> None:
    for block in blocks(path.read_text("utf-8")):
        reason = block.says.get("not run")
        assert reason is None or len(reason.split()) >= 3, f"{path}:{block.line}: {reason!r} is no reason"


def _page(place: Path, text: str) -> Page:
    path = place / "page.md"
    path.write_text(text)
    return Page(path)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nraise ValueError\n```",
        "```python\nassert 1 == 2\n```",
        "```pycon\n>>> 1 + 1\n3\n```",
        "```pycon\n>>> int('x')\n0\n```",
        "```sh\nfalse\n```",
        "```sh\nfalse | true\n```",
        "```console\n$ echo one\ntwo\n```",
        "```console\n$ echo one\n```",
        "```console\n$ false\n```",
        "```console\n$ false\n$ true\n```",
        "<!-- exit: 1 -->\n```console\n$ true\n```",
        "```console\nno command\n```",
        "```ini\n[imagestore]\nmemori = 1\n```",
        "```ini\n[DEFAULT]\nenabled_backends = a:nothing\n```",
        "```toml\n[a\n```",
        "```json\n{\n```",
        "```rust\nfn main() {}\n```",
        "<!-- setup\n1 / 0\n-->",
        "<!-- not run: before nothing at all -->\ntext",
    ],
)
def test_wrong_blocks_are_found(place: Path, text: str) -> None:
    with pytest.raises(Wrong):
        _page(place, text).run()


def test_right_blocks_run(place: Path) -> None:
    page = _page(
        place,
        "<!-- setup\na = 1\n-->\n```python\nb = a + 1\nwith open('f', 'w') as f:\n    f.write(f'{b}')\n```\n"
        "```pycon\n>>> b\n2\n>>> list(range(30))\n[0, 1, ..., 29]\n```\n"
        "```console\n$ cat f; echo\n2\n$ echo one \\\n> two\none two\n```\n"
        "<!-- exit: 3 -->\n```console\n$ exit 3\n```\n"
        "<!-- file: a.conf -->\n```ini\n[imagestore]\nmemory = 64MiB\n```\n```sh\ntest -s a.conf\n```\n"
        "<!-- not run: it would fail here -->\n```python\n1 / 0\n```\n"
        "```\nshown\n```\n```{note}\nA note.\n```\n",
    )
    assert page.run() == 7


def test_blocks_tell_their_line() -> None:
    text = "# Title\n\n<!-- file: x -->\n```python\na = 1\n```\n\n1. step\n\n   ```sh\n   true\n   ```\n"
    assert list(blocks(text)) == [
        Block(language="python", text="a = 1", line=5, says={"file": "x"}),
        Block(language="sh", text="true", line=11, says={}),
    ]
