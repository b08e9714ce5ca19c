"""What the pages have from the code: complete, and as the code says."""

from __future__ import annotations

import re

import imagestore_docs as docs
import pytest
from docpages import DOCS, pages

from imagestore import errors
from imagestore._options import OLD_OPTIONS
from imagestore.config import available_drivers, load_driver
from imagestore.driver import Capabilities
from imagestore.formats import FINDINGS
from imagestore.testing import checks


def _rows(table: str) -> list[list[str]]:
    """The cells of the tables in a Markdown text, without their heads."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() != "---"]


@pytest.mark.parametrize("name", docs.GENERATED)
def test_everything_generated_is_used(name: str) -> None:
    assert any(f"```{{generated}} {name}\n```" in page.read_text("utf-8") for page in pages())


@pytest.mark.parametrize("name", docs.GENERATED)
def test_tables_are_tables(name: str) -> None:
    lines = docs.GENERATED[name]().splitlines()
    width = 0
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            width = width if before.startswith("|") else cells
            assert cells == width, line


def test_unknown_blocks_are_refused() -> None:
    assert docs.expand("a\n```{generated} verbs\n```\nb").startswith("a\n| verb |")
    with pytest.raises(KeyError):
        docs.expand("```{generated} nothing\n```")


def test_error_tree_is_that_of_the_docstring() -> None:
    names = re.compile(r"^[ │├└─]*(\w+)", re.MULTILINE)
    drawn = docs.error_tree().removeprefix("```text\n").removesuffix("\n```")
    assert errors.__doc__ is not None
    block = errors.__doc__.split("::\n\n")[1].split("\n\nThe error")[0]
    shapes = [re.match(r"[ │├└─]*", line.strip("\n")[4:])[0] for line in block.splitlines()]  # type: ignore[index]
    assert names.findall(drawn) == names.findall(block)
    assert [re.match(r"[ │├└─]*", line)[0] for line in drawn.splitlines()] == shapes  # type: ignore[index]


def test_every_error_is_in_the_table() -> None:
    table = docs.error_table()
    for name in errors.__all__:
        if name != "redact":
            assert f"errors.{name}`" in table
    assert {row[2] for row in _rows(table) if "RateLimited" in row[0]} == {"yes"}
    assert {row[2] for row in _rows(table) if "NotFound`" in row[0]} == {"no"}


def test_every_option_is_in_the_table() -> None:
    text = docs.options()
    for kind in docs._types():
        section = text.partition(f"## A store of the type `{kind}`")[2].partition("\n## ")[0]
        for option in load_driver(kind).options:
            assert f"| `{option.dest}` |" in section, f"{kind}: {option.dest}"
    assert "| `memory` | size such as 512MiB, or bytes | `64MiB` |" in text


@pytest.mark.parametrize("kind", OLD_OPTIONS)
def test_every_old_option_is_in_the_table(kind: str) -> None:
    section = docs.old_options().partition(f"### `{kind}`")[2].partition("\n### ")[0]
    fates = {row[0].strip("`"): row[1] for row in _rows(section)}
    for old in OLD_OPTIONS[kind]:
        assert fates[old.name] == old.fate
    assert ("no such driver" in section) == (kind not in available_drivers())


def test_every_driver_has_a_row_or_needs_a_server() -> None:
    assert set(docs._types()) == set(docs.SAMPLES) | (docs.NEED_A_SERVER & set(docs._types()))


def test_capabilities_are_those_of_the_drivers() -> None:
    head, *rows = _rows(docs.capabilities(simulated=True))
    columns = {label: {row[0].strip("`"): row[number] for row in rows} for number, label in enumerate(head)}
    assert columns["s3"]["blocks_max"] == "10,000"
    assert columns["s3"]["block_max"] == "5 GiB"
    assert columns["s3-unconditional"]["collision"] == "detected"
    assert columns["vmware"]["repeatable_writes"] == "no"
    assert set(columns["s3"]) == set(Capabilities.__dataclass_fields__)


def test_what_cannot_be_kept_is_said() -> None:
    said = dict(_rows(docs.cannot_keep(simulated=True)))
    assert "two adders" in said["s3-unconditional"].lower()
    assert "two adders" not in said["s3"].lower()
    assert "not sent again" in said["vmware"]
    worst = Capabilities(collision="last-wins", atomic_commit=False, repeatable_writes=False, needs_size=True)
    text = " ".join(docs._shortcomings(worst))
    for words in ("replaces", "a part of an image", "not sent again", "known beforehand", "one block at a time"):
        assert words in text
    best = Capabilities(sparse_unit=1, parallel_writes=2, commit_proof=True, repeatable_create=True)
    assert not list(docs._shortcomings(best))


def test_memory_grows_with_the_image() -> None:
    known = {row[0]: row[1:] for row in _rows(docs.memory_known())[1:]}
    assert known["1 GB"] == ["8 MiB", "64 MiB"]
    assert known["1 TB"] == ["96 MiB", "192 MiB"]
    unknown = _rows(docs.memory_unknown())[1:]
    assert unknown[0][0].startswith("0 to")
    lengths = [int(row[1].split()[0]) for row in unknown]
    assert lengths == sorted(set(lengths))


def test_every_check_is_listed() -> None:
    text = docs.kit()
    for check in checks():
        assert f"`{check.name}`" in text


def test_report_on_the_page_is_of_this_kit() -> None:
    """That block is not run here: its counts must at least be those of all checks, and its names those of checks."""
    page = (DOCS / "howto" / "write-a-driver.md").read_text("utf-8")
    passed, skipped = map(int, re.search(r"TestToy: (\d+) passed, (\d+) not applicable", page).groups())  # type: ignore[union-attr]
    reasons = re.findall(r"^    \S.*: (\w+\.\w+)$", page, re.MULTILINE)
    assert passed + skipped == len(checks())
    assert skipped == len(reasons)
    assert {*reasons} <= {check.id for check in checks()}


def test_every_finding_is_listed() -> None:
    rows = {row[0].strip("`"): row[1:] for row in _rows(docs.findings())[1:]}
    assert {code: (row[0], row[1] == "yes") for code, row in rows.items()} == {
        code: (kind.severity, kind.refused) for code, kind in FINDINGS.items()
    }
    assert "``qcow2``" in docs.format_names()


def test_rooms_are_those_of_the_package() -> None:
    graph = docs.imports()
    assert graph["errors"] == set()
    assert graph["_models"] == {"errors"}
    assert "_transfer" in graph["_adding"]
    drawing = docs.rooms()
    for room in graph:
        assert f">{room}</text>" in drawing
    assert drawing.count("<path") >= len(graph) - 5


def test_shared_texts_are_given_to_each_name() -> None:
    lines = [
        "What it is.",
        "",
        "Attributes:",
        "    a, b: text",
        "        goes on",
        "    c: other",
        "",
        "a, b: no field",
    ]
    assert docs._split_names(lines) == [
        "What it is.", "", "Attributes:", "    a: text", "        goes on", "    b: text", "        goes on",
        "    c: other", "", "a, b: no field",
    ]  # fmt: skip
