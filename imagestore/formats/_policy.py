"""What was declared, what of it is checked, and which findings refuse an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal, get_args

from imagestore.errors import FormatError, FormatMismatch, InvalidOption, InvalidRequest, UnsafeImage
from imagestore.formats._findings import FINDINGS, Finding
from imagestore.formats._names import COMPRESSED, CONTAINER_FORMATS, DISK_FORMATS, FILESYSTEMS, PROBED

__all__ = ["Declared", "Mode", "Policy", "disk_verdict"]

Mode = Literal["off", "warn", "enforce"]
Depth = Literal["full", "head", "opaque"]

_BOOT: Final = ("aki", "ami", "ari")
_NO_OVERRIDES: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What a store accepts. Sizes are in bytes.

    Attributes:
        mode: *off*: nothing is looked at; *warn*: findings are told; *enforce*: a fatal one refuses the image.
        disk_formats: what may be declared as disk format.
        container_formats: what may be declared as container format.
        ova_disk_formats: what the disks of an OVA may be.
        compressed: whether compressed contents are unpacked in passing to look at them: *full*, only the first MiB
            (*head*), or not (*opaque*).
        max_virtual_size: the largest disk that a machine may see; None is no limit.
        max_members: members of a container image archive. An OVA may have `max_ova_members`.
        max_ratio: how many times its own size compressed data may unpack to, once that is more than `ratio_from`.
        max_unpacked: what compressed data may unpack to.
        unpack_memory: what a decompressor may ask for.
        overrides: finding code, or ``family.*``, to ``"refuse"`` or ``"allow"``.

    Raises `InvalidOption` for names that are not known.
    """

    mode: Mode = "enforce"
    disk_formats: tuple[str, ...] = DISK_FORMATS
    container_formats: tuple[str, ...] = CONTAINER_FORMATS
    ova_disk_formats: tuple[str, ...] = ("vmdk",)
    compressed: Depth = "full"
    max_virtual_size: int | None = None
    max_members: int = 10_000
    max_ova_members: int = 64
    max_ratio: int = 200
    ratio_from: int = 16 << 20
    max_unpacked: int = 10**12
    unpack_memory: int = 72 << 20  # a dictionary of 64 MiB, as ``xz -9`` has it, and what stands around it
    overrides: Mapping[str, str] = field(default_factory=lambda: _NO_OVERRIDES)

    def __post_init__(self) -> None:
        _known("mode", (self.mode,), get_args(Mode))
        _known("compressed", (self.compressed,), get_args(Depth))
        _known("disk format", self.disk_formats, DISK_FORMATS)
        _known("container format", self.container_formats, CONTAINER_FORMATS)
        _known("disk format of an OVA", self.ova_disk_formats, DISK_FORMATS)
        families = {f"{code.partition('.')[0]}.*" for code in FINDINGS}
        _known("finding", self.overrides, FINDINGS.keys() | families)
        _known("override", self.overrides.values(), ("refuse", "allow"))
        for name in ("max_members", "max_ova_members", "max_ratio", "ratio_from", "max_unpacked", "unpack_memory"):
            if getattr(self, name) < 1:
                raise InvalidOption(f"{name} must be at least 1")

    def refuses(self, finding: Finding) -> bool:
        """Whether this finding alone refuses an image in the mode ``enforce``."""
        for key in (finding.code, f"{finding.code.partition('.')[0]}.*"):
            if key in self.overrides:
                return self.overrides[key] == "refuse"
        return finding.severity != "info" and FINDINGS[finding.code].refused

    def error(self, findings: Iterable[Finding]) -> FormatError | None:
        """What `enforce` raises: `UnsafeImage`, or `FormatMismatch` if nothing worse was found; None to accept."""
        fatal = [finding for finding in findings if self.refuses(finding)]
        if not fatal:
            return None
        kind = UnsafeImage if any(each.severity in {"unsafe", "policy"} for each in fatal) else FormatMismatch
        more = f", and {len(fatal) - 1} more" if len(fatal) > 1 else ""
        return kind(f"the image is refused: {fatal[0]}{more}")


def _known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    good = set(known)
    for name in names:
        if name not in good:
            raise InvalidOption(f"unknown {what} {name!r}; known are {', '.join(sorted(good))}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """What the host says that the contents are; either may be None for *not said*."""

    disk: str | None
    container: str | None

    @classmethod
    def of(cls, disk: str | None, container: str | None, policy: Policy) -> Declared:
        """Checked against the policy's lists, and completed. Raises `InvalidRequest`."""
        for what, name, names in (
            ("disk format", disk, policy.disk_formats),
            ("container format", container, policy.container_formats),
        ):
            if name is not None and name not in names:
                raise InvalidRequest(f"{what} {name!r} is not one of {', '.join(names)}")
        if container is None and disk is not None:
            container = disk if disk in _BOOT else "bare"
        if disk is None and container in _BOOT:
            disk = container
        return cls(disk=disk, container=container)


# The sets that may be found beside each other, and those of which one must be there.
_DISK: Final = frozenset({"mbr", "gpt"}) | FILESYSTEMS
_ALLOWED: Final[Mapping[str, frozenset[str]]] = {
    "raw": _DISK | {"kernel", "pe", "cpio", "iso", "udf", "tar", "ovf"},
    "ami": _DISK,
    "gpt": frozenset({"gpt", "mbr"}),
    "iso": frozenset({"iso", "udf", "mbr", "gpt"}),
    "vhd": _DISK | {"vhd"},
    "aki": COMPRESSED | {"kernel", "pe"},
    "ari": COMPRESSED | {"cpio", "kernel", "ext", "squashfs", "cramfs", "romfs"},
    "qcow2": frozenset({"qcow2", "qcow"}),
}
_NEEDED: Final[Mapping[str, frozenset[str]]] = {
    "gpt": frozenset({"gpt"}),
    "iso": frozenset({"iso", "udf"}),
    "aki": _ALLOWED["aki"],
    "ari": _ALLOWED["ari"],
    "qcow2": frozenset({"qcow2", "qcow"}),
}
_UNSIGNED: Final = frozenset({"raw", "ami", "aki", "ari"})


def disk_verdict(disk: str | None, found: set[str], facts: set[str], *, ended: bool) -> Iterator[tuple[str, str]]:
    """Codes and messages for what was found against what was declared. Before the end, only what is certain."""
    yield from _polyglot(found, facts)
    if disk is None:
        return
    packed = found & COMPRESSED
    disguised = found & PROBED if disk in _UNSIGNED else set()
    if "luks" in disguised and "luks2" in facts and disk in {"raw", "ami"}:
        # To probing readers LUKS 2 is raw.
        disguised.discard("luks")
        yield "raw.encrypted", "this is a LUKS2 volume"
    if disguised:
        yield "format.disguised", f"declared {disk}, but it begins or ends as {_list(disguised)}"
    allowed = _ALLOWED.get(disk, frozenset({disk})) | disguised | ({"luks"} if "luks2" in facts else set())
    others = found - allowed
    if disk in {"raw", "ami"} and packed:
        others -= packed
        yield "raw.compressed", f"declared {disk}, but this is {_list(packed)}"
    if disk == "raw":
        if found & {"iso", "udf"}:
            yield "raw.iso", f"this is {_list(found & {'iso', 'udf'})}"
        if "tar" in found:
            yield "raw.tar", "this is a tar archive"
    if others:
        yield "format.mismatch", f"declared {disk}, but this is {_list(others)}"
    needed = _NEEDED.get(disk, frozenset() if disk in {"raw", "ami"} else frozenset({disk}))
    if ended and needed and not found & needed and not others and not disguised:
        if disk == "vhd" and "vhd-buried" in facts:
            yield "vhd.footer_not_last", "data follows the footer"
        else:
            code = f"{disk}.unknown" if disk in {"aki", "ari"} else "format.unknown"
            yield code, f"declared {disk}, but nothing of it is there"
    if disk == "aki" and "pe" in found and "kernel" not in found:
        yield "aki.pe_only", "a PE file without a kernel header"


def _polyglot(found: set[str], facts: set[str]) -> Iterator[tuple[str, str]]:
    strong = found & PROBED
    company = set(found) - strong
    if strong == {"vhd"} and "vhd-fixed" in facts:
        company -= _DISK
    optical = not strong and found & {"iso", "udf"} and found & (COMPRESSED | {"tar", "cpio", "ovf"})
    if optical or (strong and (company or len(strong) > 1)):
        yield "format.polyglot", f"this is {_list(found)} at once"


def _list(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))


# Damage of these is fatal only where the declared format depends on it: any disk may carry a stale table.
_OWNERS: Final[Mapping[str, str]] = {
    "gpt": "gpt", "mbr": "gpt", "iso": "iso", "ext": "ami", "aki": "aki", "ari": "ari",
}  # fmt: skip


def weigh(findings: Iterable[Finding], disk: str | None) -> list[Finding]:
    """The findings, lowered where the declared format does not depend on what is damaged."""
    result = []
    for finding in findings:
        owner = _OWNERS.get(finding.code.partition(".")[0])
        if finding.severity == "malformed" and owner is not None and owner != disk:
            result.append(replace(finding, severity="info"))
        else:
            result.append(finding)
    return result
