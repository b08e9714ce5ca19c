"""One stream of disk contents: window, detection and parsers together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from imagestore.formats._boot import parse_cpio, parse_kernel
from imagestore.formats._findings import Broken, Finding, Inspection, Report
from imagestore.formats._luks import parse_luks
from imagestore.formats._names import PROBED
from imagestore.formats._optical import parse_iso, parse_udf
from imagestore.formats._partition import parse_ext, parse_gpt, parse_mbr
from imagestore.formats._policy import disk_verdict, weigh
from imagestore.formats._probe import detect
from imagestore.formats._qcow import parse_qcow, parse_qcow2, parse_qed
from imagestore.formats._virtualbox import parse_ploop, parse_vdi
from imagestore.formats._virtualpc import parse_vhd, parse_vhdx
from imagestore.formats._vmdk import parse_vmdk
from imagestore.formats._window import View, Window

__all__ = ["Scan", "guarded"]


def _refused(code: str) -> Callable[[View, Report], None]:
    return lambda _, report: report(code, "no supported format", 0)


_PARSERS: Final[Mapping[str, Callable[[View, Report], None]]] = {
    "qcow2": parse_qcow2,
    "qcow": parse_qcow,
    "qed": parse_qed,
    "vmdk": parse_vmdk,
    "vhd": parse_vhd,
    "vhdx": parse_vhdx,
    "vdi": parse_vdi,
    "ploop": parse_ploop,
    "luks": parse_luks,
    "bochs": _refused("bochs.found"),
    "cloop": _refused("cloop.found"),
    "dmg": _refused("dmg.found"),
    "iso": parse_iso,
    "udf": parse_udf,
    "gpt": parse_gpt,
    "mbr": parse_mbr,
    "ext": parse_ext,
    "kernel": parse_kernel,
    "cpio": parse_cpio,
}


def guarded(report: Report, parse: Callable[[], None]) -> bool:
    """Run a parser; True if it came to its end. Whatever it raises is a verdict: what can't be read is malformed."""
    try:
        parse()
        return True
    except Broken as broken:
        report(broken.code, broken.message, broken.offset)
    except Exception as error:  # noqa: BLE001 - a parser's failure on a stranger's bytes must not be ours
        report("parser.failed", f"reading the structures failed with {type(error).__name__}")
    return False


class Scan:
    """Takes contents in any chunks. `report` is what is known; `looks` counts how often it was made anew."""

    __slots__ = ("_window", "aborted", "ended", "feed", "looks", "report", "view")

    def __init__(self) -> None:
        self._window = Window(self._look)
        self.feed = self._window.feed
        self.report = Report()
        self.looks = 0
        self.ended = False
        self.aborted = False
        self.view = View(head=b"")

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._window.position

    def finish(self) -> None:
        """The contents have ended."""
        self.ended = True
        self._window.finish()

    def forget(self) -> None:
        """Keep nothing but what was found."""
        self._window.forget()
        self.view = View(head=b"")

    def _look(self, view: View) -> None:
        report = Report()
        report.found = detect(view, report.facts)
        for name, parse in _PARSERS.items():
            if name in report.found:
                guarded(report, lambda parse=parse: parse(view, report))  # type: ignore[misc] # bound, not passed
        if view.total is not None and "ploop" not in report.found and b"<Parallels_disk_image" in view.head[:4096]:
            report("ploop.descriptor", "a DiskDescriptor.xml", 0)
        self.report = report
        self.view = view
        self.looks += 1

    def findings(self, disk: str | None, member: str | None = None) -> list[Finding]:
        """Everything known, against a declared disk format."""
        verdict = Report()
        for code, message in disk_verdict(disk, self.report.found, self.report.facts, ended=self.ended):
            verdict(code, message)
        found = weigh([*self.report.findings, *verdict.findings], disk)
        if member is None:
            return found
        return [
            Finding(code=each.code, severity=each.severity, message=each.message, offset=each.offset, member=member)
            for each in found
        ]

    def chosen(self) -> str:
        """The one name, in the order of evidence."""
        found = self.report.found
        for name in _PARSERS:
            if name in found & PROBED:
                return name
        if found & {"iso", "udf"}:
            return "iso"
        if "gpt" in found:
            return "gpt"
        if "kernel" in found:
            return "aki"
        return "ari" if "cpio" in found else "raw"

    def sizes(self) -> list[tuple[str, int]]:
        """Every place that tells the size of the disk."""
        name = self.chosen()
        told = [(where, size) for where, size in self.report.sizes if where.partition(" ")[0] == name]
        if name not in PROBED and self.ended:
            # A machine sees whole sectors.
            told.append(("stream", -(-self.size // 512) * 512))
        return told

    def inspection(self, disk: str | None, name: str | None = None) -> Inspection:
        """The result for a member of a container."""
        sizes = self.sizes()
        return Inspection(
            disk_format=self.chosen(),
            container_format="bare",
            formats=tuple(sorted(self.report.found)),
            size=self.size,
            virtual_size=max((size for _, size in sizes), default=None),
            virtual_sizes=tuple(sizes),
            findings=tuple(self.findings(disk, name)),
            verified=self.report.verified if self.ended else "head",
            name=name,
        )
