"""Tar archives: OVA (DMTF DSP0243) and container images (Docker image specification 1.2, OCI image layout 1.1)."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable
from typing import Any, Final

from imagestore.formats._compressed import Unpacker
from imagestore.formats._findings import NAME, Broken, Finding, Inspection, Report
from imagestore.formats._json import JsonError, RepeatedKey, load
from imagestore.formats._ovf import OVF_MAX, Descriptor, File, parse_ovf, reference_problems
from imagestore.formats._policy import Policy
from imagestore.formats._probe import compression, guess_tar
from imagestore.formats._scan import Scan, guarded
from imagestore.formats._tar import Member, TarReader, name_problem

__all__ = ["Archive"]

_TEXT_MAX: Final = 1 << 20
_TEXT_TOTAL: Final = 3 << 20
_NAMES_TOTAL: Final = 2 << 20  # in characters
_NESTED: Final = 4
_DOCUMENTS: Final = 1000
_ALL: Final = ("sha1", "sha256", "sha512")
_MANIFEST_LINE: Final = re.compile(r"(SHA1|SHA256|SHA512)\s*\((.{1,1024})\)\s*=\s*([0-9A-Fa-f]+)\s*")
_CHUNK: Final = re.compile(r"(.+)\.(\d{9})")
_BLOB: Final = re.compile(r"blobs/(sha256|sha512)/([0-9a-f]+)")
_CONFIG: Final = re.compile(r"([0-9a-f]{64})\.json")
_DIGEST: Final = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_LAYOUT: Final = frozenset({"oci-layout", "index.json", "manifest.json"})
# What may be wrong in a plain root file system, where links and devices are what is to be kept.
_STRICT: Final = frozenset(
    {"tar.type", "tar.link", "tar.override", "tar.too_many", "tar.header", "tar.duplicate", "ova.pax", "tar.v7"}
)


class _Disk:
    """A disk of an OVA that passes: through an unpacker if it is compressed, maybe in several members."""

    def __init__(self, name: str, file: File | None, policy: Policy, report: Report) -> None:
        self.name = name
        self.scan = Scan()
        self.taken = 0
        self.chunks = 0
        self.file = file
        self._finished = False
        self.judged = False
        self.inspection: Inspection | None = None
        self.unpacker: Unpacker | None = None
        if file is not None and file.compression == "gzip":
            report("ova.compressed_disk", "a disk is compressed inside the archive", member=name)
            self.unpacker = Unpacker("gzip", policy, self.scan.feed, report)

    def feed(self, chunk: bytes) -> None:
        self.taken += len(chunk)
        (self.scan if self.unpacker is None else self.unpacker).feed(chunk)

    def finish(self) -> None:
        """The last of its bytes was there; what was kept of them is given up."""
        if self._finished:
            return
        self._finished = True
        if self.unpacker is not None:
            self.unpacker.finish()
        if self.unpacker is None or not (self.unpacker.dead or self.unpacker.partial):
            self.scan.finish()
        self.scan.forget()


class Archive:
    """Takes a tar file in any chunks, and says what it is and what is wrong with it."""

    def __init__(self, policy: Policy, declared: str | None, disk: str | None) -> None:
        self.report = Report()
        self._policy = policy
        self._declared = declared
        self._disk_format = disk
        self._reader = TarReader(self)
        self._broken = False
        self._count = 0
        self._names: dict[str, tuple[int, str]] = {}
        self._names_total = 0
        self._links: dict[str, str] = {}
        self._held = Report()  # strict findings, while it may still be a plain root file system
        self._strict = declared == "ova"
        self._ova = False
        self._layout = False
        self._member: Member | None = None
        self._text: bytearray | None = None
        self._texts: dict[str, bytes] = {}
        self._text_total = 0
        self._head = b""
        self._kinds: dict[str, str] = {}
        self._hashes: dict[str, Any] = {}
        self._digests: dict[str, dict[str, str]] = {}
        self._ovf: Descriptor | None = None
        self._ovf_name = ""
        self._manifest: dict[str, tuple[str, str]] | None = None
        self._disk: _Disk | None = None
        self._disks: list[_Disk] = []
        self.members: tuple[Inspection, ...] = ()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if not self._broken:
            self._guard(lambda: self._reader.feed(chunk))

    def finish(self) -> None:
        """The archive has ended: check what belongs together."""
        if not self._broken:
            self._guard(self._reader.finish)
        if self._declared == "docker" and not self.kind:
            self.report("docker.rootfs", "a root file system without a manifest")
        if not self._broken:
            if self._ova:
                self._guard(self._check_ova)
            if self._layout:
                self._guard(self._check_layout)
        for disk in self._disks:
            self._judge(disk)
        found = (disk.inspection for disk in self._disks)
        self.members = tuple(each for each in found if each is not None)

    @property
    def kind(self) -> str | None:
        """``"ova"`` or ``"docker"``; None for an archive that is neither (so far)."""
        return "ova" if self._ova else "docker" if self._layout else None

    @property
    def progress(self) -> int:
        """Grows whenever there is something new to judge."""
        return len(self.report.findings) + (0 if self._disk is None else self._disk.scan.looks)

    def early(self) -> list[Finding]:
        """What is certain of the disk that passes, before its end."""
        disk = self._disk
        return [] if disk is None or disk.judged else disk.scan.findings(None, disk.name)

    def _guard(self, step: Callable[[], None]) -> None:
        self._broken = not guarded(self.report, step) or self._broken

    # What the tar reader tells

    def note(self, code: str, message: str, offset: int, member: str | None = None) -> None:
        """A finding of the tar layer."""
        if code in _STRICT and not self._strict:
            self._held(code, message, offset, member)
        else:
            if code == "ova.pax" and not self._ova and self._declared != "ova":
                return
            self.report(code, message, offset, member)

    def _be_strict(self) -> None:
        if not self._strict:
            self._strict = True
            for each in self._held.findings:
                self.note(each.code, each.message, each.offset or 0, each.member)

    def member(self, member: Member) -> None:
        """A member begins."""
        name = member.name[2:] if member.name.startswith("./") and member.name != "./" else member.name
        self._member = member._replace(name=name)
        self._count += 1
        if self._count == 1 and name.lower().endswith(".ovf"):
            self._ova = True
            self._ovf_name = name
            self._be_strict()
        elif self._count == 1 and self._declared == "ova":
            self.report("ova.order", "the first member is not an OVF descriptor", 0)
        if name in _LAYOUT and (name != "manifest.json" or member.type == "0"):
            self._layout = True
            self._be_strict()
        problem = name_problem(name.rstrip("/") or name)
        if problem:
            self.report("tar.name", f"a name {problem}", member.offset)
        self._names_total += len(name) + len(member.link)
        most = self._policy.max_ova_members if self._ova else self._policy.max_members
        if self._count > most or self._names_total > _NAMES_TOTAL:
            raise_now = self._strict
            self.note("tar.too_many", f"more than {self._count - 1} members, or too long names", member.offset)
            if raise_now:
                raise Broken("tar.too_many", f"more than {self._count - 1} members", member.offset)
        else:
            if name in self._names:
                self.note("tar.duplicate", "two members have one name", member.offset, name)
            self._names[name] = (member.size, member.type)
        self._check_type(self._member)
        self._begin(self._member)

    def _check_type(self, member: Member) -> None:
        if member.type == "1":
            self.note("tar.link", "a hard link", member.offset, member.name)
        elif member.type == "2":
            target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.link))
            if self._ova or name_problem(target) or member.link.startswith("/"):
                self.note("tar.link", "a link out of the archive", member.offset, member.name)
            elif member.name in self._names:
                self._links[member.name] = target
        elif member.type == "5":
            if self._ova:
                self.report("ova.order", "a directory", member.offset, member.name)
        elif member.type not in {"0", "7"}:
            self.note("tar.type", "neither a file nor a directory", member.offset, member.name)

    def _begin(self, member: Member) -> None:
        name = member.name
        self._head = b""
        self._text = None
        self._hashes = {}
        self._disk = None
        if member.type not in {"0", "7"}:
            return
        if self._ova:
            self._begin_ova(member)
            return
        blob, config = _BLOB.fullmatch(name), _CONFIG.fullmatch(name)
        if blob:
            self._hashes = {blob[1]: hashlib.new(blob[1], usedforsecurity=False)}
        elif config:
            self._hashes = {"sha256": hashlib.sha256(usedforsecurity=False)}
        wanted = name in self._names and (blob or name in _LAYOUT or name == "repositories" or config)
        if wanted and member.size <= _TEXT_MAX and self._text_total + member.size <= _TEXT_TOTAL:
            self._text = bytearray()

    def _begin_ova(self, member: Member) -> None:
        name = member.name
        suffix = name[-4:].lower()
        if suffix == ".ovf" and name != self._ovf_name:
            self.report("ova.order", "a second descriptor", member.offset, name)
        if suffix == ".ovf" or suffix == ".mf" or name.lower().endswith((".mf", ".cert")):
            if member.size > OVF_MAX:
                raise Broken("ovf.too_large", f"a descriptor of {member.size} bytes", member.offset)
            self._text = bytearray()
        if name in _LAYOUT or name.startswith("blobs/"):
            self.report("ova.polyglot", "an OVA with the parts of a container image", member.offset, name)
        if name.lower().endswith((".mf", ".cert")):
            return
        wanted: tuple[str, ...] = _ALL
        if self._manifest is not None:
            told = self._manifest.get(name)
            wanted = (told[0],) if told is not None else ()
        self._hashes = {each: hashlib.new(each, usedforsecurity=False) for each in wanted}
        if suffix == ".ovf":
            return
        chunk = _CHUNK.fullmatch(name)
        files = {} if self._ovf is None else {file.href: file for file in self._ovf.files.values()}
        if chunk and chunk[1] in files and name not in files:
            last = self._disks[-1] if self._disks else None
            index = int(chunk[2])
            if index == 0:
                self.report("ova.chunks", "a disk is split over several members", member.offset, chunk[1])
                self._disk = self._next_disk(chunk[1], files[chunk[1]])
            elif last is not None and last.name == chunk[1] and last.chunks == index:
                self._disk = last
            else:
                self.report("ova.order", "a part of a disk out of order", member.offset, name)
                return
            self._disk.chunks += 1
            return
        self._disk = self._next_disk(name, files.get(name))

    def _next_disk(self, name: str, file: File | None) -> _Disk:
        # Of disks only the one that passes is kept: there may be many.
        if self._disks:
            self._ended(self._disks[-1])
        disk = _Disk(name, file, self._policy, self.report)
        self._disks.append(disk)
        return disk

    def data(self, chunk: bytes) -> None:
        """Bytes of the present member."""
        for each in self._hashes.values():
            each.update(chunk)
        if self._text is not None:
            self._text += chunk
        if self._disk is not None:
            self._disk.feed(chunk)
        elif len(self._head) < 512:
            self._head += chunk[: 512 - len(self._head)]

    def end(self) -> None:
        """The present member has ended."""
        member, self._member = self._member, None
        assert member is not None
        digests = {name: each.hexdigest() for name, each in self._hashes.items()}
        if self._text is not None:
            self._end_text(member, bytes(self._text))
        if self._ova:
            self._digests[member.name] = digests
            if self._disk is not None and not self._disk.chunks:
                self._ended(self._disk)
            return
        named = _BLOB.fullmatch(member.name)
        config = _CONFIG.fullmatch(member.name)
        told = (named[1], named[2]) if named else ("sha256", config[1]) if config else None
        if told is not None and digests and digests[told[0]] != told[1]:
            self._held_digest(member, config is not None)
        if member.name in self._names and (named or member.name.endswith(".tar")):
            self._kinds[member.name] = _kind(self._head)

    def _held_digest(self, member: Member, config: bool) -> None:
        if config and not self._strict:
            # In a root file system such a name means nothing; beside a manifest it is a promise.
            self._held("docker.digest", "a configuration that is not what its name says", member.offset, member.name)
        else:
            self.report("docker.digest", "a blob is not what its name says", member.offset, member.name)

    def _end_text(self, member: Member, data: bytes) -> None:
        if not self._ova:
            if data[:1] in {b"{", b"["}:
                self._texts[member.name] = data
                self._text_total += len(data)
            return
        name = member.name
        if name == self._ovf_name:
            try:
                self._ovf = parse_ovf(data)
            except Broken as broken:
                self.report(broken.code, broken.message, broken.offset, name)
                raise Broken(broken.code, broken.message, broken.offset) from broken
            self._check_references(self._ovf)
        elif name.lower().endswith(".mf"):
            if self._manifest is not None:
                self.report("ova.manifest", "a second manifest", member.offset, name)
            self._manifest = self._read_manifest(data, name)
        elif name.lower().endswith(".cert"):
            self.report("ova.certificate", "the signature was not verified", member.offset, name)

    # OVA

    def _check_references(self, ovf: Descriptor) -> None:
        for code, message in reference_problems(ovf):
            self.report(code, message, member=self._ovf_name)

    def _read_manifest(self, data: bytes, name: str) -> dict[str, tuple[str, str]]:
        result: dict[str, tuple[str, str]] = {}
        for line in data.decode("utf-8", "replace").splitlines():
            if not line.strip():
                continue
            match = _MANIFEST_LINE.fullmatch(line)
            algorithm = match[1].lower() if match else ""
            if match is None or len(match[3]) != 2 * hashlib.new(algorithm, usedforsecurity=False).digest_size:
                self.report("ova.manifest", "a line that can't be read", member=name)
            elif match[2] in result:
                self.report("ova.manifest", "a file is listed twice", member=name)
            else:
                result[match[2]] = (algorithm, match[3].lower())
        if any(algorithm == "sha1" for algorithm, _ in result.values()):
            self.report("ova.weak_digest", "SHA-1 protects against accidents only", member=name)
        return result

    def _check_ova(self) -> None:
        stem = self._ovf_name[:-4]
        files = {name for name, (_, kind) in self._names.items() if kind in {"0", "7"}}
        for name in files:
            lower = name.lower()
            if lower.endswith((".mf", ".cert")) and name.rpartition(".")[0] != stem:
                self.report("ova.order", "a manifest or certificate of another name", member=name)
        for name in self._names:
            if name in _LAYOUT or name.startswith("blobs/"):
                self.report("ova.polyglot", "an OVA with the parts of a container image", member=name)
        plain = {name for name in files if not name.lower().endswith((".mf", ".cert"))}
        self._check_digests(plain)
        if self._ovf is None:
            raise Broken("ova.order", "there is no descriptor")
        listed = {file.href for file in self._ovf.files.values()}
        disks = {disk.name: disk for disk in self._disks}
        for disk in self._disks:
            if disk.name not in listed:
                self.report("ova.order", "a file that the descriptor does not name", member=disk.name)
            disk.finish()
        for href, file in ((each.href, each) for each in self._ovf.files.values()):
            found = disks.get(href)
            if found is None:
                self.report("ova.href", "a file that is not in the archive", member=self._ovf_name)
                continue
            if file.size is not None and file.size != found.taken:
                self.report("ova.size", f"{found.taken} bytes instead of {file.size}", member=href)
            if found.chunks:
                sizes = [self._names[f"{href}.{index:09}"][0] for index in range(found.chunks)]
                if file.chunk is None or any(size != file.chunk for size in sizes[:-1]) or sizes[-1] > file.chunk:
                    self.report("ova.size", "the parts of a disk are not as long as told", member=href)
        self._check_disks(self._ovf, disks)

    def _check_disks(self, ovf: Descriptor, disks: dict[str, _Disk]) -> None:
        known = 0
        for disk in ovf.disks:
            file = ovf.files.get(disk.file) if disk.file is not None else None
            found = None if file is None else disks.get(file.href)
            if found is None:
                continue
            known += 1
            size = max((size for _, size in found.scan.sizes()), default=None) if found.scan.ended else None
            if disk.capacity is not None and size is not None and disk.capacity != size:
                self.report("ova.capacity", f"{disk.capacity} bytes, but the disk has {size}", member=found.name)
        if not known:
            self.report("ova.no_disk", "the descriptor names no disk of the archive", member=self._ovf_name)

    def _check_digests(self, files: set[str]) -> None:
        if self._manifest is None:
            self.report("ova.no_manifest", "there is no manifest")
            return
        for name in sorted(files ^ self._manifest.keys()):
            where = "is not in the manifest" if name in files else "is only in the manifest"
            self.report("ova.manifest", f"a file {where}", member=name if name in files else None)
        for name in sorted(files & self._manifest.keys()):
            algorithm, told = self._manifest[name]
            if self._digests.get(name, {}).get(algorithm) != told:
                self.report("ova.digest", f"the {algorithm} digest is another than in the manifest", member=name)

    def _ended(self, disk: _Disk) -> None:
        disk.finish()
        self._judge(disk)

    def _judge(self, disk: _Disk) -> None:
        if not disk.judged:
            disk.judged = True
            disk.inspection = self._disk_findings(disk)

    def _disk_findings(self, disk: _Disk) -> Inspection | None:
        scan = disk.scan
        referenced = self._ovf is not None and any(
            each.file is not None and self._ovf.files.get(each.file) is disk.file for each in self._ovf.disks
        )
        allowed = self._policy.ova_disk_formats
        if self._disk_format is not None:
            allowed = tuple(name for name in allowed if name == self._disk_format)
        expected = None
        if referenced or disk.file is None:
            expected = scan.chosen() if scan.chosen() in allowed else (self._disk_format or "vmdk")
            if not allowed:
                self.report("format.mismatch", f"{expected} disks are not accepted in an OVA", member=disk.name)
        result = scan.inspection(expected, disk.name.encode("utf-8", "replace").decode()[:NAME])
        for each in result.findings:
            self.report.findings.append(each)
        return result if referenced else None

    # Container images

    def _check_layout(self) -> None:
        if self._ova:
            return
        for name in self._names:
            if name.lower().endswith(".ovf") and "/" not in name:
                self.report("ova.polyglot", "a container image with an OVF descriptor", member=name)
        reachable: set[str] = set()
        if "oci-layout" in self._names or "index.json" in self._names:
            self._check_oci(reachable)
        if "manifest.json" in self._names:
            self._check_docker(reachable)

    def _document(self, name: str) -> Any:
        data = self._texts.get(name)
        if data is None:
            raise Broken("docker.document", "a document is missing, too large or no JSON")
        try:
            return load(data)
        except RepeatedKey as error:
            raise Broken("docker.two_documents", f"a document can be read in two ways: {error}") from error
        except JsonError as error:
            raise Broken("docker.document", f"a document can't be read: {error}") from error

    def _resolve(self, name: object) -> str | None:
        """The regular member of that name, also over links within the archive."""
        if not isinstance(name, str) or name_problem(name):
            return None
        for _ in range(8):
            if name in self._links:
                name = self._links[name]
            elif self._names.get(name, (0, ""))[1] in {"0", "7"}:
                return name
        return None

    def _check_oci(self, reachable: set[str]) -> None:
        layout = self._document("oci-layout")
        if not isinstance(layout, dict) or not str(layout.get("imageLayoutVersion", "")).startswith("1."):
            self.report("docker.document", "the layout version is not 1", member="oci-layout")
        index = self._document("index.json")
        if not isinstance(index, dict) or not isinstance(index.get("manifests"), list):
            raise Broken("docker.document", "the index has no manifests")
        if not index["manifests"]:
            self.report("docker.empty", "the index names no image")
        todo: list[tuple[Any, int]] = [(index, 0)]
        seen = 0
        while todo:
            document, depth = todo.pop()
            seen += 1
            if depth > _NESTED or seen > _DOCUMENTS or not isinstance(document, dict):
                raise Broken("docker.document", "too many documents, or no document")
            image = "layers" in document or "config" in document or "fsLayers" in document
            if "manifests" in document and image:
                self.report("docker.two_documents", "one document is an index and a manifest at once")
            kind = document.get("mediaType")
            if isinstance(kind, str) and (("index" in kind or "list" in kind) if image else "manifest.v" in kind):
                self.report("docker.two_documents", "a document is not what its media type says")
            for each in self._list(document, "manifests"):
                blob = self._descriptor(each)
                if blob is not None and blob not in reachable:
                    reachable.add(blob)
                    todo.append((self._document(blob), depth + 1))
            if image:
                blob = self._descriptor(document.get("config"))
                if blob is not None:
                    reachable.add(blob)
                for each in self._list(document, "layers"):
                    blob = self._descriptor(each)
                    if blob is not None:
                        reachable.add(blob)
                        self._layer(blob, str(each.get("mediaType", "")))

    @staticmethod
    def _list(document: dict[str, Any], key: str) -> list[Any]:
        value = document.get(key, [])
        if not isinstance(value, list) or len(value) > 10_000:
            raise Broken("docker.document", f"{key} is no list")
        return value

    def _descriptor(self, value: Any) -> str | None:
        """The member that a descriptor points to."""
        if not isinstance(value, dict):
            raise Broken("docker.document", "a descriptor is missing")
        if value.get("urls"):
            self.report("docker.urls", "a blob is to be fetched from elsewhere")
            return None
        digest = value.get("digest")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            self.report("docker.digest_algorithm", "a digest that is neither sha256 nor sha512")
            return None
        name = "blobs/" + digest.replace(":", "/")
        member = self._names.get(name)
        if member is None or member[1] not in {"0", "7"}:
            self.report("docker.path", "a blob that is not in the archive")
            return None
        if value.get("size") != member[0]:
            self.report("docker.size", "a blob is not as long as its descriptor says", member=name)
        return name

    def _layer(self, name: str, media: str = "") -> None:
        kind = self._kinds.get(name, "other")
        wanted = {"tar", "gzip", "zstd", "empty"}
        if "tar" in media:
            wanted = {"gzip"} if "gzip" in media else {"zstd"} if "zstd" in media else {"tar", "empty"}
        elif media:
            wanted = wanted | {"json"}
        if kind not in wanted:
            self.report("docker.nested", "a layer is not what its media type says", member=name)

    def _check_docker(self, reachable: set[str]) -> None:
        manifest = self._document("manifest.json")
        if not isinstance(manifest, list) or not manifest or len(manifest) > _DOCUMENTS:
            raise Broken("docker.document", "manifest.json is no list of images")
        named: set[str] = set()
        for image in manifest:
            if not isinstance(image, dict):
                raise Broken("docker.document", "manifest.json has an entry that is no image")
            config = self._resolve(image.get("Config"))
            layers = self._list(image, "Layers")
            for part in (config, *(self._resolve(layer) for layer in layers)):
                if part is None:
                    self.report("docker.path", "a file outside of the archive, or not in it", member="manifest.json")
                else:
                    named.add(part)
            for layer in layers:
                part = self._resolve(layer)
                if part is not None:
                    self._layer(part)
        blobs = {name for name in named if name.startswith("blobs/")}
        if reachable and not blobs <= reachable:
            self.report("docker.two_manifests", "manifest.json names other blobs than the index")


def _kind(head: bytes) -> str:
    if guess_tar(head):
        return "tar"
    packed = compression(head)
    if packed is not None:
        return packed
    if not any(head):
        return "empty"
    return "json" if head.lstrip()[:1] in {b"{", b"["} else "other"
