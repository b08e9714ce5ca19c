"""OVF descriptors (DMTF DSP0243, ISO/IEC 17203): what of the XML matters for the files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from imagestore.formats._findings import Broken
from imagestore.formats._tar import name_problem

__all__ = ["OVF_MAX", "Descriptor", "Disk", "File", "parse_ovf", "reference_problems"]

OVF_MAX: Final = 1 << 20
_DEPTH: Final = 64
_ELEMENTS: Final = 10_000
_NAMESPACES: Final = ("http://schemas.dmtf.org/ovf/envelope/1", "http://schemas.dmtf.org/ovf/envelope/2")
_UNITS: Final = re.compile(r"byte(?:\s*\*\s*(2\s*\^\s*(\d{1,2})|10\s*\^\s*(\d{1,2})|\d{1,12}))?")
_OLD_UNITS: Final = {"bytes": 1, "kilobytes": 1 << 10, "megabytes": 1 << 20, "gigabytes": 1 << 30}


@dataclass(slots=True)
class File:
    """A file that the descriptor refers to; `size` in bytes, as told."""

    href: str
    size: int | None
    compression: str
    chunk: int | None


@dataclass(slots=True)
class Disk:
    """A disk; `capacity` in bytes, None where it is a property of the deployment."""

    file: str | None
    capacity: int | None
    parent: bool


@dataclass(slots=True)
class Descriptor:
    """Files by their id, and disks."""

    files: dict[str, File] = field(default_factory=dict)
    disks: list[Disk] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def parse_ovf(data: bytes) -> Descriptor:
    """Read a descriptor. Raises `Broken`; refuses every document type declaration, so no entity is ever expanded."""
    if len(data) > OVF_MAX:
        raise Broken("ovf.too_large", f"the descriptor is longer than {OVF_MAX} bytes")
    result = Descriptor()
    parser = expat.ParserCreate(namespace_separator=" ")
    depth = count = 0
    root: str | None = None

    def doctype(*_: object) -> None:
        raise Broken("ovf.doctype", "the XML has a document type declaration", parser.CurrentByteIndex)

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count, root
        depth += 1
        count += 1
        if depth > _DEPTH or count > _ELEMENTS:
            raise Broken("ovf.too_large", "too many elements, or nested too deep", parser.CurrentByteIndex)
        space, _, local = name.rpartition(" ")
        root = root or name
        if space in _NAMESPACES:
            own = {key.rpartition(" ")[2]: value for key, value in attributes.items() if key.startswith(space)}
            _element(local, own, result)

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    def declaration(_: str, encoding: str | None, __: int) -> None:
        if (encoding or "utf-8").lower() not in {"utf-8", "utf-16", "utf-16le", "utf-16be", "us-ascii"}:
            raise Broken("ovf.xml", "the encoding is not UTF-8", 0)

    parser.StartDoctypeDeclHandler = doctype
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.XmlDeclHandler = declaration
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise Broken("ovf.xml", f"it is no well-formed XML: {expat.ErrorString(error.code)}", error.offset) from error
    if root is None or root.rpartition(" ")[2] != "Envelope" or root.rpartition(" ")[0] not in _NAMESPACES:
        raise Broken("ovf.xml", "the root is no OVF envelope", 0)
    return result


def reference_problems(ovf: Descriptor) -> Iterator[tuple[str, str]]:
    """Codes and messages for references to what can't be a file beside the descriptor, and for parents."""
    yield from ovf.problems
    hrefs = [file.href for file in ovf.files.values()]
    for href in hrefs:
        if "/" in href or ":" in href or name_problem(href):
            yield "ova.href", "a reference that is no plain file name"
    if len(set(hrefs)) != len(hrefs):
        yield "ova.href", "two references to one file"
    if any(file.compression not in {"identity", "gzip", ""} for file in ovf.files.values()):
        yield "ova.href", "an unknown compression"
    for disk in ovf.disks:
        if disk.parent:
            yield "ova.parent", "a disk has a parent"
        if disk.file is not None and disk.file not in ovf.files:
            yield "ova.href", "a disk refers to no file"


def _element(name: str, attributes: dict[str, str], result: Descriptor) -> None:
    if name == "File":
        key = attributes.get("id", "")
        if key in result.files:
            result.problems.append(("ova.href", "two files have one id"))
        result.files[key] = File(
            href=attributes.get("href", ""),
            size=_size(attributes.get("size"), result),
            compression=attributes.get("compression", "identity"),
            chunk=_size(attributes.get("chunkSize"), result),
        )
    elif name == "Disk":
        result.disks.append(
            Disk(
                file=attributes.get("fileRef"),
                capacity=_capacity(attributes, result),
                parent="parentRef" in attributes,
            )
        )


def _size(text: str | None, result: Descriptor) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        result.problems.append(("ova.size", "a length is no number"))
        return None
    return int(text)


def _capacity(attributes: dict[str, str], result: Descriptor) -> int | None:
    text = attributes.get("capacity", "")
    if text.startswith("${"):
        return None
    unit = attributes.get("capacityAllocationUnits", "byte").strip()
    factor = _OLD_UNITS.get(unit.lower())
    match = _UNITS.fullmatch(unit)
    if match is not None:
        factor = 1
        if match[2]:
            factor = 2 ** int(match[2])
        elif match[3]:
            factor = 10 ** int(match[3])
        elif match[1]:
            factor = int(match[1])
    if factor is None or not text.isascii() or not text.isdigit() or int(text[:20]) * factor > 1 << 63:
        result.problems.append(("ova.capacity", "a capacity is impossible"))
        return None
    return int(text) * factor
