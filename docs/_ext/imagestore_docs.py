"""Tables, trees and drawings of the documentation that are made from the code whenever it is built.

A page asks for one with a block of its own::

    ```{generated} capabilities
    ```

The block is replaced by Markdown before the page is parsed, so headings in it are headings of the page.
"""

# ruff: noqa: INP001 - Sphinx loads it by path
from __future__ import annotations

import ast
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from docutils import nodes
from sphinx.domains.python import PyObject
from sphinx.util.nodes import make_refnode

import imagestore
from imagestore import config, errors, formats
from imagestore._models import GIB, KIB, MIB, Limits
from imagestore._options import COMMON, OLD_OPTIONS, OldOption
from imagestore._transfer import BlockPlan
from imagestore.config import available_drivers, list_opts, load_driver
from imagestore.driver import Capabilities, Driver, Options, Verbs
from imagestore.drivers.memory import PERSONALITIES
from imagestore.formats._names import COMPRESSED, FILESYSTEMS
from imagestore.formats._policy import _ALLOWED, _NEEDED
from imagestore.image import EVENTS, TRANSITIONS, Event, ImageStatus
from imagestore.testing import checks

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["FORMAT_PAGES", "GENERATED", "NEED_A_SERVER", "SAMPLES", "expand", "setup"]

PACKAGE: Final = Path(imagestore.__file__).parent

_AS: Final = "memory as "

SAMPLES: Final[Mapping[str, tuple[tuple[str, Mapping[str, Any]], ...]]] = {
    "file": (("file", {"datadir": "{directory}"}),),
    "http": (("http", {}),),
    "memory": tuple((f"{_AS}{kind}" if kind != "plain" else "memory", {"personality": kind}) for kind in PERSONALITIES),
}
"""Options with which a driver opens without any server: rows of the tables of capabilities."""

NEED_A_SERVER: Final = frozenset({"s3", "swift", "rbd", "cinder", "sheepdog", "gridfs", "vmware"})
"""Drivers whose capabilities only their server tells."""


# Writing Markdown


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    head = list(head)
    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])


def _plain(text: str | None) -> str:
    """Text of a docstring or of an option's help, as Markdown."""
    text = re.sub(r"``(.+?)``", "\N{NULL}\\1\N{NULL}", " ".join((text or "").split()))
    parts = re.split("[`\N{NULL}]", text)
    return "".join(f"`{part}`" if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(text: str) -> str:
    return re.sub(r"([*<>\[\]_{}$#])", r"\\\1", text)


def _first(documented: object) -> str:
    """The first sentence of a docstring, in one paragraph."""
    return _plain((inspect.getdoc(documented) or "").partition("\n\n")[0])


def human(size: int | None) -> str:
    """``size`` bytes in the largest unit that is exact."""
    if size is None:
        return "any"
    for unit, length in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= length and size % length == 0:
            return f"{size // length} {unit}"
    return f"{size:,} B"


# Errors


def _children(kind: type[errors.StoreError]) -> list[type[errors.StoreError]]:
    """In the order in which the source has them."""
    return [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]


def _family(kind: type[errors.StoreError]) -> Iterator[type[errors.StoreError]]:
    yield kind
    for child in _children(kind):
        yield from _family(child)


def error_tree() -> str:
    """The tree of the classes, as text."""

    def lines(kind: type[errors.StoreError], indent: str) -> Iterator[str]:
        children = _children(kind)
        for number, child in enumerate(children, 1):
            last = number == len(children)
            yield f"{indent}{'└─' if last else '├─'} {child.__name__}"
            yield from lines(child, indent + ("   " if last else "│  "))

    return "\n".join(["```text", "StoreError", *lines(errors.StoreError, ""), "```"])


def error_table() -> str:
    """Every class: its parents in dots, what it means, whether it is temporary."""
    rows = []
    for kind in _family(errors.StoreError):
        depth = len(kind.__mro__) - len(errors.StoreError.__mro__)
        name = f"{'· ' * depth}{{py:class}}`~imagestore.errors.{kind.__name__}`"
        rows.append((name, _first(kind), "yes" if kind.default_temporary else "no"))
    return _table(("error", "what it means", "temporary"), rows)


def error_classes() -> str:
    """Every class for autodoc, in the order of the tree."""
    lines = ["```{eval-rst}", ".. py:module:: imagestore.errors", ""]
    for kind in _family(errors.StoreError):
        signature = "" if kind is errors.StoreError else "()"
        lines += [f".. autoexception:: imagestore.errors.{kind.__name__}{signature}", "   :show-inheritance:", ""]
    return "\n".join([*lines, ".. autofunction:: imagestore.errors.redact", "```"])


# Options


_KINDS: Final = {
    "boolean": "true or false",
    "dict": "name:value pairs",
    "floating point": "number",
    "integer": "whole number",
    "list": "list, with commas",
    "multi valued": "text",
    "string": "text",
}


def _kind(option: Any) -> str:
    kind = option.type
    choices = getattr(kind, "choices", None)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    name = str(getattr(kind, "type_name", "string value")).removesuffix(" value")
    name = _KINDS.get(name, name)
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    span = f", {low} to {high}" if None not in (low, high) else f", from {low}" if low is not None else ""
    return f"{name}{span}{'; may be given several times' if option.multi else ''}"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default in (None, "", [], {}):
        return "not set"
    formatter = getattr(option.type, "_formatter", None)
    value = formatter(option.default) if type(option.type).__module__ == "imagestore.config" else option.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _options(options: Iterable[Any]) -> str:
    return _table(
        ("option", "value", "default", "meaning"),
        ((f"`{option.dest}`", _kind(option), _default(option), _plain(option.help)) for option in options),
    )


def options() -> str:
    """Every option of every section, by section."""
    parts = []
    for section, found in list_opts():
        name = str(getattr(section, "name", section))
        if name.startswith("store_"):
            kind = name.removeprefix("store_")
            if kind not in _types():
                continue
            aliases = [other for other in available_drivers() if other != kind and load_driver(other).name == kind]
            also = f" (or `{'`, `'.join(aliases)}`)" if aliases else ""
            parts.append(f"## A store of the type `{kind}`{also}\n\n{_first(_home(load_driver(kind)))}")
            common = {option.dest for option in _common()}
            own = [option for option in found if option.dest not in common]
        else:
            own = list(found)
            parts.append(f"## `[{name}]`")
        parts.append(_options(own))
        if name == "imagestore":
            parts += ["## Every store's section", _options(_common())]
    return "\n\n".join(parts)


def _common() -> tuple[Any, ...]:
    return config._COMMON


def _home(driver: type[Driver]) -> object:
    return sys.modules[driver.__module__]


_OLD_VALUES: Final = {"filesystem_store_file_perm": "640", "rootwrap_config": "/etc/glance/rootwrap.conf"}


def old_options() -> str:
    """Glance's options and their fates, by driver."""
    parts = ["### Every store", _old_table(COMMON)]
    installed = available_drivers()
    for kind, olds in OLD_OPTIONS.items():
        later = "" if kind in installed else "\n\nThis release has no such driver yet: a store of this type is refused."
        parts += [f"### `{kind}`{later}", _old_table(olds)]
    return "\n\n".join(parts)


def _old_table(olds: Iterable[OldOption]) -> str:
    return _table(("Glance's option", "fate", "here"), ((f"`{old.name}`", old.fate, _fate(old)) for old in olds))


def _fate(old: OldOption) -> str:
    if old.fate != "kept":
        return _plain(old.reason)
    if old.convert is None:
        return f"`{old.to}`"
    example = _OLD_VALUES.get(old.name, "200")
    return f"`{old.to}`; the value is converted: `{example}` becomes `{old.convert(example)}`"


# Capabilities


def opened() -> Iterator[tuple[str, Driver]]:
    """Drivers that can be opened here, with the name of their row."""
    for name in _types():
        for label, given in SAMPLES.get(name, ()):
            with tempfile.TemporaryDirectory() as directory:
                kind = load_driver(name)
                values = {option.dest: option.default for option in kind.options}
                values |= {
                    option: value.format(directory=directory) if isinstance(value, str) else value
                    for option, value in given.items()
                }
                driver = kind(Options(values), store="docs")
                driver.open()
                try:
                    yield label, driver
                finally:
                    driver.close()


def _shown(simulated: bool) -> Iterator[tuple[str, Driver]]:
    return ((label.removeprefix(_AS), driver) for label, driver in opened() if label.startswith(_AS) is simulated)


def _types() -> list[str]:
    """The installed types, each once, ours only: another package's driver is not ours to describe."""
    found = []
    for name, package in available_drivers().items():
        if package.partition(" ")[0] == "imagestore" and load_driver(name).name == name:
            found.append(name)
    return found


def _writes(driver: Driver) -> bool:
    return callable(getattr(driver, "create", None))


def _verbs(driver: Driver) -> list[str]:
    return [name for name in vars(Verbs) if name[0] != "_" and callable(getattr(driver, name, None))]


def capabilities(*, simulated: bool = False) -> str:
    """Every field of `Capabilities` of every driver that opens here: a column for each driver.

    ``simulated``: of the memory driver's personalities instead.
    """
    drivers = [(label, driver.capabilities, _writes(driver)) for label, driver in _shown(simulated)]
    default = Capabilities()
    reading = {"ranged_reads", "needs_auth"}
    rows = []
    for field in fields(Capabilities):
        assert field.default is not MISSING
        cells = []
        for _, caps, writes in drivers:
            value = getattr(caps, field.name)
            cells.append("" if not writes and field.name not in reading else _value(field.name, value))
        rows.append((f"`{field.name}`", _value(field.name, getattr(default, field.name)), *cells))
    return _table(("", "unless set", *(label for label, _, _ in drivers)), rows)


def _value(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none" if name in {"sparse_unit", "block_digest"} else "any"
    if isinstance(value, int) and name in {"block_min", "block_max", "sparse_unit"}:
        return human(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def verbs() -> str:
    """Which optional verbs each driver has."""
    drivers = [(label, set(_verbs(driver))) for label, driver in _shown(simulated=False)]
    names = [name for name in vars(Verbs) if name[0] != "_"]
    rows = ((f"`{name}`", *("yes" if name in has else "" for _, has in drivers)) for name in names)
    return _table(("verb", *(label for label, _ in drivers)), rows)


def cannot_keep(*, simulated: bool = False) -> str:
    """In words: what a driver does not promise."""
    rows = []
    for label, driver in _shown(simulated):
        said = "; ".join(_shortcomings(driver.capabilities)) if _writes(driver) else "Reads only: nothing can be added."
        rows.append((label, (said[:1].upper() + said[1:]) or "Nothing: it keeps all of the guarantees."))
    if not simulated:
        rows += [(name, _BY_SERVER) for name in _types() if name not in SAMPLES]
    return _table(("backend", "what it cannot keep"), rows)


_BY_SERVER: Final = "Depends on the server: `imagestore stores --connect` tells what yours can do."


def _shortcomings(caps: Capabilities) -> Iterator[str]:
    if caps.collision == "detected":
        yield "two adders that commit the same id in the same moment may both succeed, and one image is then lost"
    if caps.collision == "last-wins":
        yield "the later of two adders of one id replaces the image of the earlier"
    if not caps.atomic_commit:
        yield "others may see a part of an image for a moment around the commit"
    if not caps.commit_proof:
        yield "an image does not tell which upload made it: if the answer to a commit is lost, the driver must decide"
    if not caps.repeatable_writes:
        yield "a block that fails is not sent again: the add fails with `temporary=True`"
    if not caps.repeatable_create:
        yield "a failed beginning of an upload is not repeated"
    if caps.needs_size:
        yield "the size must be known beforehand"
    if caps.sparse_unit is None:
        yield "runs of zeros are sent and stored like data"
    if caps.parallel_writes == 1:
        yield "one block at a time"
    if caps.blocks_max is not None and caps.block_max is not None:
        yield f"an image has at most {caps.blocks_max:,} blocks of at most {human(caps.block_max)}"


# Formats


def format_names() -> str:
    """The names that may be declared, and the words that an inspection uses."""
    texts = {
        "DISK_FORMATS": ("What a disk format may be declared as", formats.DISK_FORMATS),
        "CONTAINER_FORMATS": ("What a container format may be declared as", formats.CONTAINER_FORMATS),
        "FINDINGS": ("A `FindingKind` for each code that may be found; the table below", ()),
        "Severity": ("How grave a finding is", get_args(formats.Severity)),
        "Verified": ("How far contents were looked at", get_args(formats.Verified)),
    }
    lines = ["```{eval-rst}", ".. py:currentmodule:: imagestore.formats", ""]
    for name, (text, values) in texts.items():
        named = f": {', '.join(f'``{value}``' for value in values)}" if values else ""
        lines += [f".. py:data:: {name}", "", f"   {text}{named}.", ""]
    return "\n".join([*lines, "```"])


def findings() -> str:
    """Every code, with what it means and whether it refuses an image."""
    rows = (
        (f"`{code}`", kind.severity, "yes" if kind.refused else "no", _plain(kind.meaning))
        for code, kind in formats.FINDINGS.items()
    )
    return _table(("code", "severity", "refused", "meaning"), rows)


class FormatPage(NamedTuple):
    """A page of ``reference/formats``: what it is about, and which findings belong there.

    formats: names that may be declared or found
    parsers: as ``module:name``; every code that they, or what they call, can report is on the page
    only: of those codes, the families or single codes that are meant, where a parser serves several pages
    more: codes that are reported elsewhere
    """

    formats: tuple[str, ...]
    parsers: tuple[str, ...]
    only: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


FORMAT_PAGES: Final[Mapping[str, FormatPage]] = {
    "policy": FormatPage(
        ("bare",),
        ("_policy:disk_verdict", "_inspector:Inspector", "_scan:guarded"),
        only=("format", "container.mismatch", "limit", "parser"),
    ),
    "qcow2": FormatPage(("qcow2",), ("_qcow:parse_qcow2",)),
    "qcow1-qed": FormatPage(("qcow", "qed"), ("_qcow:parse_qcow", "_qcow:parse_qed")),
    "vmdk": FormatPage(("vmdk",), ("_vmdk:parse_vmdk",)),
    "vhd": FormatPage(("vhd",), ("_virtualpc:parse_vhd",), more=("vhd.footer_not_last",)),
    "vhdx": FormatPage(("vhdx",), ("_virtualpc:parse_vhdx",)),
    "vdi": FormatPage(("vdi",), ("_virtualbox:parse_vdi",)),
    "ploop": FormatPage(("ploop",), ("_virtualbox:parse_ploop",), more=("ploop.descriptor",)),
    "luks": FormatPage(("luks",), ("_luks:parse_luks",)),
    "iso": FormatPage(("iso", "udf"), ("_optical:parse_iso", "_optical:parse_udf")),
    "gpt": FormatPage(("gpt", "mbr"), ("_partition:parse_gpt", "_partition:parse_mbr")),
    "raw": FormatPage(
        ("raw", *sorted(FILESYSTEMS), "bochs", "cloop", "dmg"),
        ("_policy:disk_verdict", "_partition:parse_ext"),
        only=("raw", "ext"),
        more=("bochs.found", "cloop.found", "dmg.found"),
    ),
    "boot": FormatPage(
        ("aki", "ari", "ami", "kernel", "pe", "cpio"),
        ("_boot:parse_kernel", "_boot:parse_cpio", "_partition:parse_ext", "_policy:disk_verdict"),
        only=("aki", "ari", "ext"),
        more=("aki.unknown", "ari.unknown", "container.unequal"),
    ),
    "ova": FormatPage(("ova",), ("_archive:Archive",), only=("ova", "ovf", "tar", "compressed", "format.mismatch")),
    "ovf": FormatPage(("ovf",), ("_inspector:Inspector._check_ovf",)),
    "docker": FormatPage(("docker", "tar"), ("_archive:Archive",), only=("docker", "tar", "ova.polyglot")),
    "compressed": FormatPage(
        ("compressed", *sorted(COMPRESSED)), ("_compressed:Unpacker",), more=("compressed.nested",)
    ),
}


@cache
def format_codes(page: str) -> tuple[str, ...]:
    """The codes of the findings that belong on a page."""
    chosen = FORMAT_PAGES[page]
    codes = {
        code
        for code in _reported(chosen.parsers)
        if not chosen.only or code in chosen.only or code.partition(".")[0] in chosen.only
    }
    return tuple(sorted({*codes, *chosen.more}))


def _reported(parsers: Iterable[str]) -> set[str]:
    """The codes in the source of these functions and classes, and of all of the package that these name."""
    codes: set[str] = set()
    todo, seen = list(parsers), set()
    while todo:
        if (place := todo.pop()) in seen:
            continue
        seen.add(place)
        module, _, name = place.partition(":")
        definitions, imported = _formats_module(module)
        node = definitions.get(name)
        if node is None:
            continue
        for each in ast.walk(node):
            if isinstance(each, ast.Constant) and each.value in formats.FINDINGS:
                codes.add(each.value)
            elif isinstance(each, ast.Name):
                todo.append(imported.get(each.id, f"{module}:{each.id}"))
            elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self":
                todo.append(f"{module}:{name.partition('.')[0]}.{each.attr}")
    return codes


@cache
def _formats_module(module: str) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """What a module defines, methods as ``Class.method``, and what it has from its neighbours and from where."""
    tree = ast.parse((PACKAGE / "formats" / f"{module}.py").read_text("utf-8"))
    definitions: dict[str, ast.AST] = {}
    imported: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        if isinstance(node, ast.ClassDef):
            definitions |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imagestore.formats._"):
            home = str(node.module).rpartition(".")[2]
            imported |= {alias.name: f"{home}:{alias.name}" for alias in node.names}
    return definitions, imported


def format_matrix() -> str:
    """Under each declared disk format: what must be found, and what else may be."""
    rows = []
    for disk in formats.DISK_FORMATS:
        allowed = _ALLOWED.get(disk, frozenset({disk}))
        needed = _NEEDED.get(disk, frozenset() if disk in {"raw", "ami"} else frozenset({disk}))
        rows.append((f"`{disk}`", _either(needed), ", ".join(sorted(allowed - needed))))
    return _table(("declared", "must be found", "may be found too"), rows)


def _either(names: Iterable[str]) -> str:
    return " or ".join(sorted(names)) or "nothing"


def page_findings(page: str) -> str:
    """The table of the findings of one page."""
    kinds = ((code, formats.FINDINGS[code]) for code in format_codes(page))
    rows = ((f"`{code}`", kind.severity, "yes" if kind.refused else "no", _plain(kind.meaning)) for code, kind in kinds)
    return _table(("code", "severity", "refused", "meaning"), rows)


# Memory


def _s3() -> Capabilities:
    """The limits of Amazon S3 on multipart uploads, as the memory driver has them."""
    return next(driver.capabilities for label, driver in opened() if label == f"{_AS}s3")


def memory_known() -> str:
    """Size of an image of known size against the length of its blocks and the memory of its transfer."""
    rows = []
    for size in (10**9, 10 * 10**9, 50 * 10**9, 84 * 10**9, 160 * 10**9, 335 * 10**9, 500 * 10**9, 10**12):
        plan = BlockPlan(_s3(), size, Limits().max_size)
        rows.append((_decimal(size), human(plan.size_of(0)), human(_memory(plan.size_of(0)))))
    return _table(("size of the image", "length of a block", "memory of the transfer"), rows)


def memory_unknown() -> str:
    """The same for an image of unknown size, as it grows."""
    plan = BlockPlan(_s3(), None, Limits().max_size)
    count = _s3().blocks_max
    assert count is not None
    rows = []
    size, since, length = 0, 0, plan.size_of(0)
    for index in range(count + 1):
        now = plan.size_of(index) if index < count else None
        if now != length:
            rows.append((f"{_decimal(since)} to {_decimal(size)}", human(length), human(_memory(length))))
            since, length = size, now or 0
        size += now or 0
    return _table(("bytes so far", "length of a block", "memory of the transfer"), rows)


def _memory(block: int) -> int:
    return max(Limits().memory, 2 * block)


def _decimal(size: int) -> str:
    for unit, length in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= length:
            return f"{size / length:,.1f}".removesuffix(".0") + f" {unit}"
    return str(size)


# The kit


def kit() -> str:
    """Every check of the kit, by part."""
    parts = []
    by_part: dict[str, list[Any]] = {}
    for check in checks():
        by_part.setdefault(check.part, []).append(check)
    for part, found in by_part.items():
        rows: dict[str, tuple[list[str], Any]] = {}
        for check in found:
            # Variants of one check say the same.
            rows.setdefault(check.function.__doc__ or check.name, ([], check))[0].append(f"`{check.name}`")
        cells = [("<br>".join(names), _plain(said), _needs(check)) for said, (names, check) in rows.items()]
        parts += [f"## {part.capitalize()}", _table(("check", "what must hold", "applies to drivers"), cells)]
    return "\n\n".join(parts)


def _needs(check: Any) -> str:
    further = [verb for verb in check.needs if verb not in {"create", "locate", "delete"}]
    said = ["that write"] if "create" in check.needs else []
    if further:
        said.append(f"with {', '.join(f'`{verb}`' for verb in further)}")
    if check.reason:
        said.append(f"but not if {check.reason}")
    return " ".join(said) or "all"


# The graph of imports


def imports() -> dict[str, set[str]]:
    """Which room imports which, at run time and at import: packages count as one room."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        room = parts[0]
        if room in {"__init__", "__main__"}:
            continue
        found.setdefault(room, set()).update(_imported(ast.parse(path.read_text("utf-8"))) - {room})
    rooms = set(found)
    return {room: others & rooms for room, others in found.items()}


def _imported(tree: ast.Module) -> set[str]:
    """What a module imports when it is imported: not what it needs late, nor only for types."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "imagestore":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("imagestore.")}
    return names


def rooms() -> str:
    """The graph of imports as a drawing: a room stands above all that it imports."""
    graph = imports()
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            levels[room] = 1 + max((level(other) for other in graph[room]), default=-1)
        return levels[room]

    for room in graph:
        level(room)
    rows: list[list[str]] = [[] for _ in range(max(levels.values()) + 1)]
    for room, number in sorted(levels.items()):
        rows[number].append(room)
    return _drawing(list(reversed(rows)), {room: _direct(room, graph) for room in graph})


def _direct(room: str, graph: Mapping[str, set[str]]) -> set[str]:
    """What a room imports and reaches in no other way: the rest would only blur the drawing."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            if (other := todo.pop()) not in seen:
                seen.add(other)
                todo += graph[other]
        return seen

    return graph[room] - {far for near in graph[room] for far in reach(near)}


_WIDE, _HIGH, _GAP, _STEP = 116, 26, 14, 62
_DOORS: Final = frozenset({"errors", "driver", "config", "testing", "aio", "image", "lifecycle"})


def _drawing(rows: list[list[str]], edges: Mapping[str, set[str]]) -> str:
    width = max(len(row) for row in rows) * (_WIDE + _GAP) + _GAP
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(reversed(rows)):
        # From the bottom up: each room above the middle of what it needs, as far as its neighbours let it.
        def wanted(room: str) -> float:
            below = [place[other][0] for other in edges[room] if other in place]
            return sum(below) / len(below) if below else width / 2

        ordered = sorted(row, key=lambda room: (wanted(room), room))
        free = (width - len(ordered) * _WIDE) / (len(ordered) + 1)
        y = (len(rows) - 1 - number) * _STEP + _GAP
        for index, room in enumerate(ordered):
            place[room] = (free + index * (_WIDE + free) + _WIDE / 2, y)
    height = len(rows) * _STEP
    title = "Which room imports which: lines lead down to what is imported"
    lines = [
        '<div class="drawing">',
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">',
    ]
    for room, others in sorted(edges.items()):
        x, y = place[room]
        for other in sorted(others):
            to_x, to_y = place[other]
            middle = (y + _HIGH + to_y) / 2
            lines.append(
                f'<path d="M{x:.0f} {y + _HIGH} C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y}"/>'
            )
    for room, (x, y) in sorted(place.items()):
        door = ' class="door"' if room in _DOORS else ""
        lines.append(f'<rect{door} x="{x - _WIDE / 2:.0f}" y="{y}" width="{_WIDE}" height="{_HIGH}" rx="4"/>')
        lines.append(f'<text x="{x:.0f}" y="{y + 18}" text-anchor="middle">{room}</text>')
    return "\n".join([*lines, "</svg>", "</div>"])


# The life of an image

_STATUS_AT: Final[Mapping[ImageStatus, tuple[float, float]]] = {
    ImageStatus.QUEUED: (75, 210),
    ImageStatus.SAVING: (275, 90),
    ImageStatus.UPLOADING: (225, 350),
    ImageStatus.IMPORTING: (395, 280),
    ImageStatus.KILLED: (475, 30),
    ImageStatus.ACTIVE: (575, 180),
    ImageStatus.DEACTIVATED: (745, 90),
    ImageStatus.PENDING_DELETE: (745, 280),
    ImageStatus.DELETED: (575, 420),
}
_STATUS_WIDE, _STATUS_HIGH = 130, 30
_BENDS: Final = (0.08, -0.08, 0.16, -0.16, 0.28, -0.28, 0.42, -0.42, 0.6, -0.6)

Point = tuple[float, float]


def image_statuses() -> str:
    """Every status and every transition, as a drawing; what leads to a deletion is paler."""
    title = "Statuses of an image, and what leads from one to another"
    away = {ImageStatus.PENDING_DELETE, ImageStatus.DELETED}
    lines = [
        '<div class="drawing">',
        f'<svg width="720" height="395" viewBox="0 0 820 450" role="img" aria-label="{title}">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
        '<polygon points="0,1 8,4 0,7" style="fill: var(--color-foreground-muted)"/></marker></defs>',
    ]
    for old, news in TRANSITIONS.items():
        for new, events in news.items():
            start, control, end = curve(old, new)
            pale = ' style="opacity: 0.3"' if new in away else ""
            points = f"M{start[0]:.0f} {start[1]:.0f} Q{control[0]:.0f} {control[1]:.0f} {end[0]:.0f} {end[1]:.0f}"
            told = f"<title>{old} to {new}: {', '.join(events)}</title>"
            lines.append(f'<path d="{points}" marker-end="url(#arrow)"{pale}>{told}</path>')
    for status in ImageStatus:
        x, y = _STATUS_AT[status]
        door = ' class="door"' if status is ImageStatus.ACTIVE else ""
        lines.append(
            f'<rect{door} x="{x - _STATUS_WIDE / 2:.0f}" y="{y - _STATUS_HIGH / 2:.0f}" width="{_STATUS_WIDE}" '
            f'height="{_STATUS_HIGH}" rx="4"/>'
        )
        lines.append(f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{status}</text>')
    return "\n".join([*lines, "</svg>", "</div>"])


def curve(old: ImageStatus, new: ImageStatus) -> tuple[Point, Point, Point]:
    """From one box to another, bent as little as it takes to pass all others: start, control and end."""
    (x, y), (to_x, to_y) = _STATUS_AT[old], _STATUS_AT[new]
    for bend in _BENDS:
        control = (x + to_x) / 2 + bend * (to_y - y), (y + to_y) / 2 - bend * (to_x - x)
        ends = _border(_STATUS_AT[old], control), control, _border(_STATUS_AT[new], control)
        if not any(status not in {old, new} and _touches(ends, at) for status, at in _STATUS_AT.items()):
            return ends
    raise ValueError(f"no way from {old} to {new} that passes the others")


def _border(center: Point, towards: Point) -> Point:
    """Where the box around ``center`` is left."""
    dx, dy = towards[0] - center[0], towards[1] - center[1]
    part = min(
        (_STATUS_WIDE / 2 + 2) / abs(dx) if dx else 1e9,
        (_STATUS_HIGH / 2 + 2) / abs(dy) if dy else 1e9,
    )
    return center[0] + part * dx, center[1] + part * dy


def _touches(ends: tuple[Point, Point, Point], center: Point) -> bool:
    for step in range(1, 40):
        part = step / 40
        weights = (1 - part) ** 2, 2 * part * (1 - part), part**2
        x, y = (sum(weight * point[axis] for weight, point in zip(weights, ends, strict=True)) for axis in (0, 1))
        if abs(x - center[0]) < _STATUS_WIDE / 2 + 6 and abs(y - center[1]) < _STATUS_HIGH / 2 + 6:
            return True
    return False


def image_events() -> str:
    """Every event: when it may happen, where it leads, what it means."""
    meanings = _members(Event)
    rows = []
    for event, steps in EVENTS.items():
        (new,) = set(steps.values())
        rows.append((f"`{event}`", ", ".join(f"`{old}`" for old in steps), f"`{new}`", _plain(meanings[event.name])))
    return _table(("event", "from", "to", "what happened"), rows)


def _members(kind: type) -> dict[str, str]:
    """The texts below the members of an enumeration, which Python itself does not keep."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            (target,) = node.targets
            assert isinstance(target, ast.Name)
            found[target.id] = str(text.value.value)
    return found


# Sphinx

GENERATED: Final[Mapping[str, Callable[[], str]]] = {
    "cannot-keep": cannot_keep,
    "cannot-keep-simulated": partial(cannot_keep, simulated=True),
    "capabilities": capabilities,
    "capabilities-simulated": partial(capabilities, simulated=True),
    "error-classes": error_classes,
    "error-table": error_table,
    "error-tree": error_tree,
    "findings": findings,
    **{f"findings-{page}": partial(page_findings, page) for page in FORMAT_PAGES},
    "format-matrix": format_matrix,
    "format-names": format_names,
    "image-events": image_events,
    "image-statuses": image_statuses,
    "kit": kit,
    "memory-known": memory_known,
    "memory-unknown": memory_unknown,
    "old-options": old_options,
    "options": options,
    "rooms": rooms,
    "verbs": verbs,
}

_BLOCK: Final = re.compile(r"^```\{generated\} ([a-z0-9-]+)\n```$", re.MULTILINE)


def expand(text: str) -> str:
    """``text`` of a page with everything generated in its place. Raises KeyError for what nobody can generate."""
    return _BLOCK.sub(lambda match: GENERATED[match[1]](), text)


def _read(_app: Sphinx, _docname: str, source: list[str]) -> None:
    source[0] = expand(source[0])


_SHARED: Final = re.compile(r"(\s+)((?:\w+, )+\w+): (.*)")
_originals: dict[str, list[str]] = {}


def _before_napoleon(_app: Sphinx, what: str, name: str, _what: object, _options: object, lines: list[str]) -> None:
    """What napoleon does not know: texts for several names, and plain texts of data with a colon in them."""
    if what in {"data", "attribute"}:
        _originals[name] = list(lines)
        return
    lines[:] = _split_names(lines)


def _after_napoleon(_app: Sphinx, _kind: str, name: str, _what: object, _options: object, lines: list[str]) -> None:
    if name in _originals:
        lines[:] = _originals.pop(name)


def _split_names(lines: list[str]) -> list[str]:
    """``a, b: text`` in a section of a docstring as an entry for each name."""
    made: list[str] = []
    section = False
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.strip():
            section = line in {"Args:", "Attributes:", "Raises:"} or (section and line[0] == " ")
        shared = _SHARED.fullmatch(line) if section else None
        if shared is None:
            made.append(line)
            continue
        indent = len(shared[1])
        more = []
        while number < len(lines) and lines[number][: indent + 1].isspace():
            more.append(lines[number])
            number += 1
        for each in shared[2].split(", "):
            made += [f"{shared[1]}{each}: {shared[3]}", *more]
    return made


_MEMBERS: Final = frozenset({"attribute", "method", "property", "classmethod", "staticmethod"})


def _resolve(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """A short name, or one of a private module, means the documented object of that name."""
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"]).removeprefix("self.")
    if "." in target and not target.startswith("imagestore.") and not target.split(".")[0][:1].isupper():
        return None
    tail = target.split(".")[-2:] if not target.startswith("imagestore.") else target.split(".")[-1:]
    domain = env.get_domain("py")
    page = node.get("refdoc")
    found = [
        name
        for name, entry in domain.objects.items()
        if name.startswith("imagestore")
        and name.split(".")[-len(tail) :] == tail
        # The name of a method or an attribute alone means one of the class that the page is about.
        and (len(tail) > 1 or entry.docname == page or entry.objtype not in _MEMBERS)
    ]
    # Where a page has an object of that name itself, that one is meant; else the shortest is the public one.
    found.sort(key=lambda name: (domain.objects[name].docname != page, name.count("."), name))
    if not found:
        return None
    entry = domain.objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, found[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
