"""What an inspection may find, and how it is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeAlias

__all__ = ["FINDINGS", "NAME", "Broken", "Finding", "FindingKind", "Inspection", "Report", "Severity", "Verified"]

Severity: TypeAlias = Literal["unsafe", "malformed", "mismatch", "policy", "info"]
Verified: TypeAlias = Literal["full", "head", "opaque"]


class FindingKind(NamedTuple):
    """What a code means.

    Attributes:
        severity: *unsafe* could make a reader touch what it must not, or two readers see two things; *malformed*
            breaks the format's rules; *mismatch* is another format than declared; *policy* is legal, but an
            operator may not want it; *info* is only worth knowing.
        meaning: one line for the table in the documentation.
        refused: whether ``enforce`` refuses it unless an override says otherwise.
    """

    severity: Severity
    meaning: str
    refused: bool


_UNSAFE: Final = {
    "bochs.found": "A Bochs disk; no supported format.",
    "cloop.found": "A cloop image; no supported format.",
    "compressed.bomb": "It unpacks to far more than its size or the limit, or is thousands of empty streams.",
    "compressed.memory": "Unpacking it needs more memory than the limit allows.",
    "compressed.nested": "Compressed data inside compressed data.",
    "compressed.trailing": "Data follows the end of the compressed stream.",
    "dmg.found": "An Apple disk image; no supported format.",
    "docker.digest": "A blob's digest is not the one that it is named by.",
    "docker.digest_algorithm": "A digest of another kind than sha256 or sha512, or not a digest.",
    "docker.nested": "A layer is of another kind than a tar file, plain or compressed.",
    "docker.path": "A manifest names a file outside of the archive, or one that is not in it.",
    "docker.two_documents": "One document is an index and a manifest at once, or repeats a key: readers differ.",
    "docker.two_manifests": "The two manifests of one archive name different blobs.",
    "docker.urls": "A layer is to be fetched from elsewhere.",
    "format.disguised": "Declared as something without a signature, but readers that probe take it for a disk format.",
    "format.polyglot": "Valid as several formats at once that have no business together.",
    "guest.image": "The guest's disk itself begins with an image header: converting to raw and probing would obey it.",
    "luks.detached": "The LUKS header has its payload elsewhere.",
    "luks.headers_differ": "The two LUKS2 headers differ.",
    "ova.digest": "A file's digest is not the one in the manifest.",
    "ova.href": "The OVF descriptor refers to something that is not a file of the archive.",
    "ova.manifest": "The manifest and the files of the archive differ.",
    "ova.parent": "A disk in the OVF descriptor has a parent.",
    "ova.polyglot": "An OVA and a container image archive at once.",
    "ovf.doctype": "The XML has a document type declaration.",
    "ploop.descriptor": "A ploop DiskDescriptor.xml, which names files, instead of a disk.",
    "qcow.backing_file": "A qcow (version 1) image with a backing file.",
    "qcow2.backing_file": "The image reads another file or URL below its own data.",
    "qcow2.data_file": "The image keeps its data in another file.",
    "qed.backing_file": "A QED image with a backing file.",
    "tar.duplicate": "Two members of one name: readers take the first or the last.",
    "tar.link": "A link that leads outside of the archive, or a hard link.",
    "tar.name": "A member's name leads outside of the archive, or is not a plain relative name.",
    "tar.override": "An extended header gives a member another name or size than its own header.",
    "tar.type": "A member that is neither a file nor a directory.",
    "vdi.parent": "An undo or differencing disk, or one with a parent.",
    "vhd.copies_differ": "The footer and its copy at the start differ: readers see two disks.",
    "vhd.original_size": "The original and the current size differ: readers may take either.",
    "vhd.parent": "A differencing disk, or one that names a parent.",
    "vhdx.parent": "A differencing disk, or one that names a parent.",
    "vhdx.tables_differ": "The two region tables differ: readers see two disks.",
    "vmdk.capacity_zero": "The header leaves everything to the embedded descriptor.",
    "vmdk.cowd": "A COWD extent (VMDK 3): part of another disk.",
    "vmdk.create_type": "A kind of VMDK that keeps its data elsewhere or is not one file.",
    "vmdk.descriptor": "The descriptor has a line that is not of the strict grammar.",
    "vmdk.footer_differs": "Header and footer differ: readers see two disks.",
    "vmdk.no_descriptor": "A sparse extent without a descriptor: part of another disk.",
    "vmdk.parent": "A delta disk: it has a parent.",
    "vmdk.sesparse": "A seSparse extent: part of another disk.",
    "vmdk.text_descriptor": "A descriptor in text form: its data is in other files.",
}
_MALFORMED: Final = {
    "aki.truncated": "The kernel ends before the length in its header.",
    "ari.header": "The cpio header is damaged.",
    "compressed.corrupt": "The compressed data is damaged.",
    "compressed.truncated": "The compressed data ends too early.",
    "docker.document": "A JSON document of the archive can't be read, or lacks what it must have.",
    "docker.size": "A blob is not as long as its descriptor says.",
    "ext.truncated": "The ext file system is longer than the image.",
    "gpt.backup": "The backup header is missing, damaged or elsewhere.",
    "gpt.entries": "The table of partitions is damaged or impossible.",
    "gpt.header": "The GPT header is damaged.",
    "gpt.partition": "A partition lies outside of the disk.",
    "iso.descriptor": "The volume descriptors are damaged, or the primary one is missing.",
    "iso.endian": "The two byte orders of a number disagree.",
    "iso.truncated": "The volume is longer than the image.",
    "luks.cipher": "Cipher, mode or hash are not known text.",
    "luks.header": "The LUKS header is damaged.",
    "luks.iterations": "An iteration count that only wastes the time of whoever opens it.",
    "luks.json": "The LUKS2 description can't be read.",
    "luks.keyslot": "A key slot is impossible, or overlaps something.",
    "luks.version": "No version of LUKS that exists.",
    "mbr.partition": "A partition of the MBR lies outside of the disk.",
    "ova.capacity": "The OVF descriptor tells another disk size than the disk, or an impossible one.",
    "ova.no_disk": "The OVF descriptor names no disk that the archive has.",
    "ova.order": "The OVF descriptor is not the first member, or members have no place in an OVA.",
    "ova.size": "A file is not as long as the OVF descriptor says.",
    "ovf.too_large": "The OVF descriptor is longer than 1 MiB, or too deep.",
    "ovf.xml": "The OVF descriptor can't be read.",
    "parser.failed": "The structures are such that reading them failed.",
    "ploop.header": "The ploop header is damaged.",
    "ploop.tables": "The block table is impossible, or behind the end.",
    "qcow2.cluster_size": "A cluster size that the format does not have.",
    "qcow2.compression": "The compression type is unknown or contradicts the feature bits.",
    "qcow2.encryption": "An unknown encryption method, or a LUKS pointer that is wrong.",
    "qcow2.extension": "A header extension is damaged or runs over its room.",
    "qcow2.features": "A feature bit that must not be ignored and is not known.",
    "qcow2.header": "The header is too short, or a field of it is impossible.",
    "qcow2.size": "The virtual size is impossible, or does not fit the tables.",
    "qcow2.tables": "A table is misplaced, too large or behind the end.",
    "qcow2.version": "No version of qcow2 that exists.",
    "qed.header": "The QED header is damaged.",
    "tar.checksum": "The checksum of a member's header is wrong.",
    "tar.header": "A member's header is damaged, or of a length that can't be.",
    "tar.too_many": "More members than the limit.",
    "tar.trailer": "The end marks are missing, or data follows them.",
    "tar.truncated": "The archive ends within a member.",
    "vdi.blocks": "The block map is impossible, or behind the end.",
    "vdi.header": "The VDI header is damaged.",
    "vdi.size": "The virtual size is impossible, or does not fit the block map.",
    "vhd.checksum": "A checksum is wrong.",
    "vhd.dynamic_header": "The dynamic header is damaged, misplaced or impossible.",
    "vhd.footer": "The footer is damaged or missing.",
    "vhd.footer_not_last": "Data follows the footer: nobody will find it.",
    "vhd.geometry": "The geometry and the size disagree.",
    "vhd.size": "The virtual size is impossible, or does not fit the file.",
    "vhdx.header": "No valid header.",
    "vhdx.metadata": "The metadata is damaged, misplaced or incomplete.",
    "vhdx.regions": "The region table is damaged, or regions overlap or are behind the end.",
    "vhdx.size": "The virtual size or the block size is impossible.",
    "vmdk.capacity": "The sizes in header and descriptor disagree or are impossible.",
    "vmdk.embedded_text": "The descriptor holds bytes that readers take differently.",
    "vmdk.footer": "The footer that the header announces is missing or damaged.",
    "vmdk.header": "The header is too short, or a field of it is impossible.",
    "vmdk.tables": "A table is misplaced, too large or behind the end.",
    "vmdk.version": "No version of VMDK that is known.",
}
_MISMATCH: Final = {
    "aki.unknown": "Declared as a kernel, but no kernel that is known.",
    "ari.unknown": "Declared as a ramdisk, but none that is known.",
    "container.mismatch": "The contents are not of the declared container format.",
    "format.mismatch": "The contents are of another format than declared.",
    "format.unknown": "Nothing of the declared format was found.",
    "raw.compressed": "Declared as a disk, but the contents are compressed.",
}
# True: enforce refuses it by default.
_POLICY: Final = {
    "compressed.opaque": (False, "The compressed contents were not looked at."),
    "container.unequal": (False, "Kernel and ramdisk formats as container and disk should be equal."),
    "docker.rootfs": (False, "A plain root file system, without any manifest."),
    "docker.empty": (False, "The index names no image."),
    "gpt.hybrid": (False, "A hybrid MBR beside the GPT."),
    "limit.virtual_size": (True, "The virtual size is above the operator's limit."),
    "luks.encrypted": (False, "The contents are encrypted, so nobody can look at them."),
    "ova.chunks": (False, "A disk is split over several members."),
    "ova.compressed_disk": (False, "A disk is compressed inside the archive."),
    "ova.pax": (False, "A tar dialect other than ustar, which the standard demands."),
    "ovf.disks_elsewhere": (False, "A descriptor alone: the disks that it names can't be checked."),
    "qcow.version1": (True, "qcow version 1, which qcow2 replaced long ago."),
    "qcow2.aes": (True, "Encrypted with the old AES method, whose design is broken."),
    "qcow2.corrupt": (True, "Marked as corrupt by whoever wrote it last."),
    "qcow2.dirty": (True, "Was not closed: its reference counts must be rebuilt."),
    "qcow2.encrypted": (False, "The contents are encrypted, so nobody can look at them."),
    "qcow2.extended_l2": (False, "Has subclusters, which need QEMU 5.2 or later."),
    "qcow2.snapshots": (False, "Holds internal snapshots: older contents travel along."),
    "qed.found": (True, "QED, which nobody maintains any more."),
    "ploop.open": (True, "Was not closed."),
    "raw.iso": (False, "Declared as raw, but it is an ISO or UDF volume."),
    "raw.encrypted": (False, "Declared as raw, but it is a LUKS2 volume."),
    "raw.tar": (False, "Declared as raw, but it is a tar archive."),
    "tar.v7": (False, "A tar file older than POSIX, without a signature."),
    "vhd.saved_state": (True, "Belongs to the saved state of a machine."),
    "vhdx.log": (True, "The log must be replayed first, which may rewrite anything."),
    "vmdk.unclean": (True, "Was not closed."),
}  # fmt: skip
_INFO: Final = {
    "aki.pe_only": "A PE file without a kernel header.",
    "gpt.unverified": "The table of partitions is too large to be checked.",
    "luks.unverified": "The LUKS2 header is too large to be checked.",
    "ova.certificate": "There is a certificate; the signature was not verified.",
    "ova.no_manifest": "There is no manifest, so nothing vouches for the files.",
    "ova.weak_digest": "The manifest has only SHA-1 digests.",
    "qcow2.backing_format": "A backing format is named, but no backing file.",
    "qcow2.feature_names": "The table of feature names has an odd length; it is only for messages.",
    "qcow2.slack": "There is data between the header extensions and the end of the header.",
    "qcow2.unknown_extension": "A header extension that is not known.",
    "qcow2.unknown_feature": "A feature bit that may be ignored and is not known.",
    "vmdk.flags": "A flag that is not known.",
}


def _table() -> Mapping[str, FindingKind]:
    table = {code: FindingKind("unsafe", text, True) for code, text in _UNSAFE.items()}
    table |= {code: FindingKind("malformed", text, True) for code, text in _MALFORMED.items()}
    table |= {code: FindingKind("mismatch", text, True) for code, text in _MISMATCH.items()}
    table |= {code: FindingKind("policy", text, refused) for code, (refused, text) in _POLICY.items()}
    table |= {code: FindingKind("info", text, False) for code, text in _INFO.items()}
    return MappingProxyType(dict(sorted(table.items())))


FINDINGS: Final = _table()
"""Every code that a finding may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was noticed.

    Attributes:
        code: a key of `FINDINGS`.
        severity: as in `FINDINGS`; lowered to ``info`` where the declared format does not depend on it.
        message: what exactly, for people. Never holds text from the image that could be a name, path or URL.
        offset: where, in bytes from the start of the image (of the member, for contents of a container).
        member: the member of the container that it is about.
    """

    code: str
    severity: Severity
    message: str
    offset: int | None = None
    member: str | None = None

    def __str__(self) -> str:
        where = [] if self.member is None else [f"in {self.member!r}"]
        if self.offset is not None:
            where.append(f"at byte {self.offset}")
        return f"{self.code}: {self.message}" + (f" ({' '.join(where)})" if where else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What an image is.

    Attributes:
        disk_format: the name for what was found, such as ``"qcow2"``; for a container, of its disk where there is
            exactly one kind. None if the contents have no disk that could be looked at.
        container_format: ``"bare"``, ``"ova"``, ``"ovf"``, ``"docker"`` or ``"compressed"``, as found.
        formats: everything that was recognised, sorted; for a container, its own layers only.
        size: length of the stream in bytes.
        virtual_size: length in bytes of the disk that a machine sees: the largest of the candidates; for a container,
            the sum over its disks. None if unknown.
        virtual_sizes: every place that tells a size, and what it tells.
        findings: in the order of severity, then of offset.
        verified: *full*: all that can be checked while streaming was; *head*: something lay where it could not be
            read; *opaque*: the contents were not looked at.
        accepted: False if ``enforce`` refuses it (whatever the mode is).
        members: the disks of a container.
        name: of the member, for a member.
    """

    disk_format: str | None
    container_format: str
    formats: tuple[str, ...]
    size: int
    virtual_size: int | None
    virtual_sizes: tuple[tuple[str, int], ...]
    findings: tuple[Finding, ...]
    verified: Verified
    accepted: bool = True
    members: tuple[Inspection, ...] = ()
    name: str | None = None


class Broken(Exception):
    """A parser can't go on: what it read is impossible."""

    def __init__(self, code: str, message: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.offset = offset


NAME: Final = 200  # characters of a name from an image that are kept
_SAME: Final = 4  # findings of one code that are kept: a hostile file must not fill memory with them


class Report:
    """What parsers write to."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.found: set[str] = set()
        self.facts: set[str] = set()
        self.sizes: list[tuple[str, int]] = []
        self.verified: Verified = "full"
        self._counts: dict[str, int] = {}

    def __call__(self, code: str, message: str, offset: int | None = None, member: str | None = None) -> None:
        """Note a finding; its severity is the one of its code. Of names from an image only the begin is kept."""
        kind = FINDINGS[code]
        count = self._counts.get(code, 0)
        if count < _SAME:
            self._counts[code] = count + 1
            if member is not None:
                member = member.encode("utf-8", "replace").decode()[:NAME]
            self.findings.append(
                Finding(code=code, severity=kind.severity, message=message, offset=offset, member=member)
            )

    def check(self, good: bool, code: str, message: str, offset: int | None = None) -> bool:
        """Note a finding unless `good`. Returns `good`."""
        if not good:
            self(code, message, offset)
        return good
