"""The pages of the formats: one for every format that the code knows, each with the findings that it can have."""

from __future__ import annotations

import ast

import imagestore_docs as docs
import pytest
from docpages import DOCS
from formats.samples import samples

from imagestore.formats import CONTAINER_FORMATS, DISK_FORMATS, FINDINGS, Inspection, inspect_stream
from imagestore.formats._names import COMPRESSED, FILESYSTEMS, PROBED
from imagestore.formats._policy import _ALLOWED

FOLDER = DOCS / "reference" / "formats"


def found() -> set[str]:
    """Every name that detection gives, from its source."""
    tree = ast.parse((docs.PACKAGE / "formats" / "_probe.py").read_text("utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    constants = (
        part.value
        for call in calls
        if call.func.attr == "add" and getattr(call.func.value, "id", "") == "found"
        for argument in call.args
        for part in ast.walk(argument)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )
    return set(constants)


def page_of() -> dict[str, str]:
    return {name: page for page, chosen in docs.FORMAT_PAGES.items() for name in chosen.formats}


def test_every_format_has_a_page() -> None:
    detected = found()
    assert {"qcow2", "qcow", "tar", "udf", "swap"} <= detected
    known = {*DISK_FORMATS, *CONTAINER_FORMATS, *PROBED, *FILESYSTEMS, *COMPRESSED, *_ALLOWED, *detected}
    named = [name for chosen in docs.FORMAT_PAGES.values() for name in chosen.formats]
    assert sorted(named) == sorted(known)
    assert {path.stem for path in FOLDER.glob("*.md")} == set(docs.FORMAT_PAGES)


@pytest.mark.parametrize("page", docs.FORMAT_PAGES)
def test_a_page_says_what_it_should(page: str) -> None:
    text = (FOLDER / f"{page}.md").read_text("utf-8")
    assert text.count("```{generated} findings-") == 1
    assert f"```{{generated}} findings-{page}\n" in text
    for name in docs.FORMAT_PAGES[page].formats:
        assert f"`{name}`" in text or page == "policy", name
    assert "## Not checked" in text
    assert "What is checked" in text
    assert "\n## Switches\n" in text or page == "policy"
    assert f"formats/{page}\n" in (DOCS / "reference" / "formats.md").read_text("utf-8")


@pytest.mark.parametrize("page", docs.FORMAT_PAGES)
def test_codes_in_the_text_are_those_of_the_page(page: str) -> None:
    text = (FOLDER / f"{page}.md").read_text("utf-8")
    linked = {name for name in docs.FORMAT_PAGES if f"({name}.md)" in text} | {page, "policy"}
    codes = {code for name in linked for code in docs.format_codes(name)}
    for code in FINDINGS:
        assert f"`{code}`" not in text or code in codes or page == "policy", code


def test_every_code_is_on_a_page() -> None:
    on = {code: [page for page in docs.FORMAT_PAGES if code in docs.format_codes(page)] for code in FINDINGS}
    assert not [code for code, pages in on.items() if not pages]
    # A few by hand, so that what generates the tables is not its own proof.
    assert on["qcow2.backing_file"] == ["qcow2"]
    assert on["vhd.footer_not_last"] == ["vhd"]
    assert on["guest.image"] == ["qcow2", "vmdk", "vhd", "vhdx", "vdi", "ploop"]
    assert on["ext.truncated"] == ["raw", "boot"]
    assert on["tar.name"] == ["ova", "docker"]
    assert on["ovf.doctype"] == ["ova", "ovf"]
    assert on["format.polyglot"] == ["policy"]
    assert on["compressed.bomb"] == ["ova", "compressed"]
    assert on["qcow2.header"] == ["qcow2", "qcow1-qed"]


def looked_up(inspection: Inspection, *declared: str) -> set[str]:
    """The pages on which somebody with this image would look."""
    names = {*declared, *inspection.formats, inspection.container_format}
    for member in inspection.members:
        names |= {*member.formats, str(member.disk_format)}
    pages = page_of()
    return {"policy"} | {pages[name] for name in names if name in pages}


def test_what_samples_have_is_on_their_pages() -> None:
    seen: set[str] = set()
    for sample in samples():
        inspection = inspect_stream([sample.data], disk_format=sample.disk, container_format=sample.container)
        pages = looked_up(inspection, sample.disk, sample.container)
        codes = {code for page in pages for code in docs.format_codes(page)}
        reported = {each.code for each in inspection.findings}
        assert reported <= codes, (sample.name, reported - codes)
        seen |= reported
    assert len(seen) > 90


def test_what_may_be_found_is_in_the_table() -> None:
    table = docs.format_matrix()
    assert "| `gpt` | gpt | mbr |" in table
    assert "| `qcow2` | qcow or qcow2 |  |" in table
    for disk in DISK_FORMATS:
        assert f"| `{disk}` |" in table
