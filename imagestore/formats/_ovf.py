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
_PREFIXES: Final = 100
_PIECE: Final = 16 << 10
_ENCODINGS: Final = frozenset({"utf-8", "utf-16", "utf-16le", "utf-16be", "us-ascii"})
_NAMESPACES: Final = ("http://schemas.dmtf.org/ovf/envelope/1", "http://schemas.dmtf.org/ovf/envelope/2")
_UNITS: Final = re.compile(r"byte(?:\s*\*\s*(2\s*\^\s*(\d{1,2})|10\s*\^\s*(\d{1,2})|\d{1,12}))?")
_ATTRIBUTES: Final = frozenset(
    {"id", "href", "size", "compression", "chunkSize", "fileRef", "capacity", "capacityAllocationUnits", "parentRef"}
)
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
    text = _decoded(data)
    if "<!DOCTYPE" in text:
        raise Broken("ovf.doctype", "the XML has a document type declaration", 0)
    # Namespaces are ours: expat would write the whole one before the name of each attribute.
    parser = expat.ParserCreate("utf-8")
    spaces: list[dict[str, str]] = [{}]
    count = 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(spaces) > _DEPTH or count > _ELEMENTS:
            raise Broken("ovf.too_large", "too many elements, or nested too deep", parser.CurrentByteIndex)
        prefixes = spaces[-1]
        declared = {key[6:]: value for key, value in attributes.items() if key == "xmlns" or key.startswith("xmlns:")}
        if declared:
            prefixes = prefixes | declared
            if len(prefixes) > _PREFIXES:
                raise Broken("ovf.too_large", "too many namespaces", parser.CurrentByteIndex)
        spaces.append(prefixes)
        prefix, _, local = name.rpartition(":")
        space = prefixes.get(prefix)
        if space in _NAMESPACES and local in {"File", "Disk"}:
            _element(local, _own(attributes, prefixes, space, result), result)
        if count == 1 and (space not in _NAMESPACES or local != "Envelope"):
            raise Broken("ovf.xml", "the root is no OVF envelope", 0)

    def end(_: str) -> None:
        spaces.pop()

    def declaration(_: str, encoding: str | None, __: int) -> None:
        if (encoding or "utf-8").lower() not in _ENCODINGS:
            raise Broken("ovf.xml", "the encoding is not UTF-8", 0)

    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.XmlDeclHandler = declaration
    document = text.encode()
    try:
        # In pieces: what a handler raises stops expat only before the next one.
        for start in range(0, len(document), _PIECE):
            parser.Parse(document[start : start + _PIECE], False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise Broken("ovf.xml", f"it is no well-formed XML: {expat.ErrorString(error.code)}", error.offset) from error
    return result


def _decoded(data: bytes) -> str:
    """The text, by its first bytes as XML 1.0 has it (appendix F); UTF-8 if they say nothing."""
    encoding = "utf-8-sig"
    if data[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        encoding = "utf-16"
    elif data[:4] in {b"<\0?\0", b"\0<\0?"}:
        encoding = "utf-16-le" if data[0] else "utf-16-be"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Broken("ovf.xml", "it is no text in the encoding that it has", error.start) from error


def _own(attributes: dict[str, str], prefixes: dict[str, str], space: str, result: Descriptor) -> dict[str, str]:
    """The attributes in the namespace of their element. Some readers don't look at namespaces of attributes."""
    own: dict[str, str] = {}
    seen: set[str] = set()
    for key, value in attributes.items():
        prefix, _, local = key.rpartition(":")
        if local in _ATTRIBUTES:
            if local in seen:
                result.problems.append(("ova.href", "two attributes of one name"))
            seen.add(local)
            if prefix and prefixes.get(prefix) == space:
                own[local] = value
    return own


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
    if factor is None or not text.isascii() or not text.isdigit() or len(text) > 19:
        result.problems.append(("ova.capacity", "a capacity is no number"))
        return None
    if int(text) * factor > 1 << 63:
        result.problems.append(("ova.capacity", "a capacity is impossible"))
        return None
    return int(text) * factor
