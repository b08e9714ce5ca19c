"""The door of the package: an `Inspector` takes an image while it passes, and says what it is."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from imagestore.errors import FormatError
from imagestore.formats._archive import Archive
from imagestore.formats._compressed import Unpacker
from imagestore.formats._findings import Finding, Inspection, Report, Verified
from imagestore.formats._names import COMPRESSED, PROBED
from imagestore.formats._ovf import OVF_MAX, parse_ovf, reference_problems
from imagestore.formats._policy import Declared, Policy
from imagestore.formats._probe import compression, guess_tar
from imagestore.formats._scan import Scan, guarded

__all__ = ["Inspector", "inspect_file", "inspect_stream"]

_START: Final = 512
_CHUNK: Final = 1 << 20
_DEFAULT: Final = Policy()
_ORDER: Final = {"unsafe": 0, "malformed": 1, "mismatch": 2, "policy": 3, "info": 4}


class Inspector:
    """Looks at one image as it passes, in bounded memory and with next to no work per chunk.

    A disk takes below 6 MiB; a container more, for its documents, and for `Policy.unpack_memory` where it is unpacked.
    The verdict depends on the bytes only, never on how they are cut into chunks. No method raises because of
    what the bytes are.

    Args:
        disk_format: as declared; None if not.
        container_format: as declared; None if not, which with a disk format means ``"bare"``.
        policy: what is accepted; its mode *off* makes this do nothing.

    Raises:
        InvalidRequest: the policy does not allow such a declaration.

    Attributes:
        refusal: the error that `enforce` ends in, as soon as it is certain; None until then, and in other modes.
    """

    def __init__(
        self, *, disk_format: str | None = None, container_format: str | None = None, policy: Policy | None = None
    ) -> None:
        self._policy = policy or _DEFAULT
        self._declared = Declared.of(disk_format, container_format, self._policy)
        self._size = 0
        self._scan = Scan()
        self._start: bytearray | None = bytearray()
        self._archive: Archive | None = None
        self._unpacker: Unpacker | None = None
        self._inner: Scan | None = None
        self._report = Report()  # of the unpacker
        self._known = 0
        self._done: Inspection | None = None
        self.refusal: FormatError | None = None
        self._take: Callable[[bytes], None] | None = None

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if type(chunk) is not bytes:
            chunk = bytes(chunk)
        self._size += len(chunk)
        if self._policy.mode == "off":
            return
        self._scan.feed(chunk)
        if self._start is not None:
            missing = _START - len(self._start)
            self._start += chunk[:missing]
            if len(self._start) == _START:
                self._begin()
                if self._take is not None and len(chunk) > missing:
                    self._take(chunk[missing:])
        elif self._take is not None:
            self._take(chunk)
        known = self._progress()
        if known != self._known:
            self._known = known
            self._judge(ended=False)

    def finish(self) -> Inspection:
        """The image has ended: the verdict. Further calls give the same."""
        if self._done is None:
            if self._policy.mode == "off":
                self._done = _nothing(self._size)
                return self._done
            if self._start is not None:
                self._begin()
            self._scan.finish()
            if self._archive is not None:
                self._archive.finish()
            if self._unpacker is not None and self._inner is not None:
                self._unpacker.finish()
                if not (self._unpacker.dead or self._unpacker.partial or self._unpacker.opaque):
                    self._inner.finish()
            findings = self._judge(ended=True)
            self._done = self._result(findings)
        return self._done

    def _progress(self) -> int:
        """Grows whenever there is something new to judge."""
        known = self._scan.looks
        if self._archive is not None:
            known += self._archive.progress
        if self._inner is not None:
            known += self._inner.looks + len(self._report.findings)
        return known

    def _begin(self) -> None:
        """The first sector is there (or the image is shorter): what must see every byte?"""
        assert self._start is not None
        start, self._start = bytes(self._start), None
        container = self._declared.container
        if container in {None, "ova", "docker"} and guess_tar(start[:_START]):
            self._archive = Archive(self._policy, container, self._declared.disk)
            self._take = self._archive.feed
        elif container in {None, "compressed"}:
            kind = compression(start)
            if kind is not None:
                self._inner = Scan()
                self._unpacker = Unpacker(kind, self._policy, self._inner.feed, self._report)
                self._take = self._unpacker.feed
        if self._take is not None:
            self._take(start)
        self._known = -1

    @property
    def _container(self) -> str:
        """What is found, as far as it is known."""
        if self._archive is not None:
            kind = self._archive.kind
            return kind or ("docker" if self._declared.container == "docker" else "bare")
        if self._unpacker is not None:
            return "compressed"
        if self._declared.container in {None, "ovf"} and "ovf" in self._scan.report.found:
            return "ovf"
        return "bare"

    def _judge(self, *, ended: bool) -> list[Finding]:
        findings = self._contents(ended=ended)
        findings += self._limits(findings)
        if self._policy.mode == "enforce" and self.refusal is None:
            # Before the end the first alone: how many more there are so far depends on how the stream is cut.
            fatal = findings if ended else [each for each in findings if self._policy.refuses(each)][:1]
            self.refusal = self._policy.error(fatal)
        return findings

    def _contents(self, *, ended: bool) -> list[Finding]:
        disk, container = self._declared.disk, self._declared.container
        found, extra = self._container, Report()
        outer = self._scan.findings(disk if found == "bare" and container not in _CONTAINERS else None)
        if found != "bare" and not self._scan.report.found & PROBED:
            outer = [each for each in outer if each.code == "format.polyglot"]
        looked = ended or self._scan.looks > 0
        certain = self._start is None and (ended or (self._take is None and (container != "ovf" or looked)))
        if container in _CONTAINERS and container != found and certain:
            extra("container.mismatch", f"declared {container}, but this is {found}")
        if container in {"aki", "ari", "ami"} and disk != container:
            extra("container.unequal", f"container {container}, but disk {disk}")
        if found == "ovf" and ended:
            guarded(extra, lambda: self._check_ovf(extra))
        if self._archive is not None:
            outer += self._archive.report.findings + self._archive.early()
        if self._unpacker is not None and self._inner is not None:
            if disk not in {"aki", "ari"} and self._inner.report.found & COMPRESSED:
                extra("compressed.nested", "compressed data inside compressed data")
            outer += self._report.findings
            if self._inner.looks:
                outer += self._inner.findings(disk)
        return outer + extra.findings

    def _check_ovf(self, report: Report) -> None:
        if self._size > OVF_MAX:
            report("ovf.too_large", f"the descriptor has {self._size} bytes")
            return
        for code, message in reference_problems(parse_ovf(self._scan.view.head)):
            report(code, message)
        report("ovf.disks_elsewhere", "the disks are not here")

    def _sizes(self) -> list[tuple[str, int]]:
        if self._archive is not None and self._container == "ova":
            return [
                (f"{member.name}: {where}", size)
                for member in self._archive.members
                for where, size in member.virtual_sizes
            ]
        if self._inner is not None:
            return self._inner.sizes() if self._inner.looks else []
        return self._scan.sizes() if self._container == "bare" else []

    def _limits(self, findings: list[Finding]) -> list[Finding]:
        limit = self._policy.max_virtual_size
        report = Report()
        largest = max((size for _, size in self._sizes()), default=0)
        if limit is not None and largest > limit:
            report("limit.virtual_size", f"a machine would see {largest} bytes, the limit is {limit}")
        return report.findings

    def _result(self, findings: list[Finding]) -> Inspection:
        findings.sort(key=lambda each: (_ORDER[each.severity], each.member or "", each.offset or 0, each.code))
        container = self._container
        members: tuple[Inspection, ...] = ()
        verified: Verified = self._scan.report.verified
        sizes = self._sizes()
        name: str | None = None
        size = max((size for _, size in sizes), default=None)
        if self._archive is not None and container == "ova":
            members = self._archive.members
            kinds = {member.disk_format for member in members}
            name = kinds.pop() if len(kinds) == 1 else None
            known = [member.virtual_size for member in members if member.virtual_size is not None]
            size = sum(known) if known else None
            if any(member.verified != "full" for member in members):
                verified = "head"
        elif self._unpacker is not None and self._inner is not None:
            if self._unpacker.opaque or not self._inner.looks:
                verified = "opaque"
            else:
                name = self._inner.chosen()
                members = (self._inner.inspection(self._declared.disk),)
                verified = members[0].verified
        elif container == "bare":
            name = self._scan.chosen()
        elif container == "ovf":
            verified = "head"
        return Inspection(
            disk_format=name,
            container_format=container,
            formats=tuple(sorted(self._scan.report.found)),
            size=self._size,
            virtual_size=size,
            virtual_sizes=tuple(sizes),
            findings=tuple(findings),
            verified=verified,
            accepted=self._policy.error(findings) is None,
            members=members,
        )


_CONTAINERS: Final = frozenset({"ova", "docker", "compressed", "ovf"})


def _nothing(size: int) -> Inspection:
    return Inspection(
        disk_format=None,
        container_format="bare",
        formats=(),
        size=size,
        virtual_size=None,
        virtual_sizes=(),
        findings=(),
        verified="opaque",
    )


def inspect_stream(
    chunks: Iterable[bytes],
    *,
    disk_format: str | None = None,
    container_format: str | None = None,
    policy: Policy | None = None,
) -> Inspection:
    """Inspect everything that `chunks` gives, to its end. Raises `InvalidRequest` as `Inspector` does, else nothing
    but what the iterable raises; `Inspection.accepted` is the verdict.
    """
    inspector = Inspector(disk_format=disk_format, container_format=container_format, policy=policy)
    for chunk in chunks:
        inspector.feed(chunk)
    return inspector.finish()


def inspect_file(
    path: str | os.PathLike[str],
    *,
    disk_format: str | None = None,
    container_format: str | None = None,
    policy: Policy | None = None,
) -> Inspection:
    """Inspect a file, as `inspect_stream` does. Raises `OSError` if it can't be read."""
    with Path(path).open("rb") as file:
        return inspect_stream(_chunks(file), disk_format=disk_format, container_format=container_format, policy=policy)


def _chunks(file: io.BufferedReader) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk
