"""Images as VDIs (virtual disks) of a Sheepdog cluster, over its own protocol, without any library or program of it.

An image is the VDI ``<prefix><image id>``; its location is ``sheepdog://<host>:<port>:<VDI>``, as Glance writes it.
Any node of a cluster serves all of it, so requests go to whichever of the configured nodes can be reached.

**An upload** is a VDI of the image's name, because a VDI can't be renamed: nobody else can have the name meanwhile.
Two marks tell it from an image. It is made with a size that nothing else has (`_sentinel`), and gets a tag with the
token of its upload before the first byte. A tag is a text that a snapshot has; that of a VDI means nothing to Sheepdog.

**Entries before objects.** The table in an inode says which objects there are. What is deleted is what the table
names, so that an object which it does not name would stay for ever. Entries are therefore written first, for some
objects in advance, and those that got no object are taken back before the image becomes visible.

**Commit against discard.** Sheepdog has no conditional write. So the tag has fields, each with one writer: the upload's
mark, that of somebody who wants to discard it, and that of a removal that has begun. Each side looks at the other's
field after it has written its own. The upload has won if it has cleared its mark and then finds no other; who discards
has won if the upload's mark is still there after its own was written, and only then begins to remove. If each sees the
other, the upload gives up. So it never happens that both have won.

**Delete.** DEL_VDI does nothing, successfully, as long as there is an entry in the table. So the tag says first that
the VDI is being deleted, then the table is cleared, then the VDI is deleted, and then it must be gone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import threading
import time
import uuid
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from oslo_config import cfg

from imagestore.driver import (
    IMAGE_ID,
    Block,
    Capabilities,
    Chunks,
    Driver,
    Hints,
    Leftover,
    Location,
    Reading,
    Stat,
    StoredImage,
    Upload,
)
from imagestore.drivers._sheepdog_client import (
    INODE_HEAD,
    OBJECTS_MAX,
    TABLE,
    Code,
    Inode,
    Link,
    LinkError,
    Refused,
    Reply,
    Request,
    Ticket,
    cluster_default,
    create_object,
    data_object,
    del_vdi,
    entries,
    get_vdi,
    inode_object,
    new_vdi,
    read_object,
    read_vdis,
    write_object,
)
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    InUse,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    SizeMismatch,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

__all__ = ["SheepdogDriver"]

_MIB: Final = 1024 * 1024
_CHUNK: Final = 512 * 1024
_ZEROS: Final = bytes(_CHUNK)
_BLOCK: Final = 8 * _MIB

_AHEAD: Final = 32
"""For how many objects entries are written at once: a synchronous write for each would cost a quarter of the speed."""
_DEPTH: Final = 8
_SCAN: Final = 32
_TABLE_PIECE: Final = 1 << 16
_BITS: Final = 4096
_BEAT: Final = 60.0

_SHIFTS: Final = range(20, 32)
_SHIFTS_WRITTEN: Final = range(20, 25)
_SHIFT_DEFAULT: Final = 22
_SNAPSHOTS_MAX: Final = 1 << 16

_TAG: Final = 256
_SIZE: Final = 536
# The fields of a tag. The first is what Sheepdog's own tools show.
_UPLOAD: Final = slice(0, 96)
_DISCARD: Final = slice(96, 176)
_DELETE: Final = slice(176, 256)
_MARK: Final = re.compile(rb"imagestore-(upload|discard|delete):([0-9a-f]{32})(?: ([0-9]{1,12}))?\0*")
_MAGIC: Final = 0x7D06D

_VDI_NAME: Final = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,254}")
_PREFIX: Final = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,54})?")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?")
_PORT: Final = re.compile(r"[0-9]{1,5}")

_MEANING: Final[dict[int, tuple[type[StoreError], str]]] = {
    Code.NO_OBJ: (Unavailable, "an object is missing"),
    Code.EIO: (Unavailable, "a node can't read or write its disk"),
    Code.VDI_EXIST: (AlreadyExists, "there is a VDI of that name"),
    Code.SYSTEM_ERROR: (Unavailable, "the cluster failed"),
    Code.VDI_LOCKED: (InUse, "the VDI is locked"),
    Code.NO_VDI: (NotFound, "there is no such VDI"),
    Code.VDI_READ: (Unavailable, "the cluster can't read the VDI"),
    Code.VDI_WRITE: (Unavailable, "the cluster can't write the VDI: are there enough nodes for all copies?"),
    Code.BASE_VDI_READ: (Unavailable, "the cluster can't read the VDI"),
    Code.BASE_VDI_WRITE: (Unavailable, "the cluster can't write the VDI"),
    Code.NO_TAG: (NotFound, "there is no such snapshot"),
    Code.STARTUP: (Unavailable, "the node is starting"),
    Code.SHUTDOWN: (Unavailable, "the node is shutting down"),
    Code.NO_MEM: (Unavailable, "the node has no memory left"),
    Code.FULL_VDI: (StoreFull, "the cluster has no ids left for VDIs"),
    Code.VER_MISMATCH: (ConfigurationError, "the node speaks another version of the protocol"),
    Code.NO_SPACE: (StoreFull, "the cluster has no room for new objects"),
    Code.WAIT_FOR_FORMAT: (Unavailable, "the cluster is not formatted"),
    Code.WAIT_FOR_JOIN: (Unavailable, "the cluster waits for nodes to join"),
    Code.JOIN_FAILED: (Unavailable, "the node could not join the cluster"),
    Code.HALT: (Unavailable, "the cluster has stopped: too few nodes are left"),
    Code.READONLY: (InUse, "the VDI is a snapshot by now"),
}
_INTERNAL: Final = 0x80
"""From here on codes are for nodes among themselves: one that gets out is of a membership that is changing."""

_ASK_ANOTHER: Final = frozenset(
    {Code.STARTUP, Code.SHUTDOWN, Code.JOIN_FAILED, Code.WAIT_FOR_FORMAT, Code.WAIT_FOR_JOIN, Code.HALT}
)
"""What may be the trouble of one node only: the next attempt goes to another."""


class SheepdogDriver(Driver):
    """Images as VDIs of a Sheepdog cluster. See the module for how."""

    name = "sheepdog"
    schemes = ("sheepdog",)
    options = (
        cfg.StrOpt(
            "host",
            default="127.0.0.1",
            help="Name or address of a node of the cluster. It is a part of the locations.",
        ),
        cfg.PortOpt("port", default=7000, min=1, help="Port of that node. It is a part of the locations."),
        cfg.ListOpt(
            "nodes",
            default=[],
            help=(
                "Further nodes of the same cluster, host:port, comma-separated; an IPv6 address stands in brackets. "
                "They are used in turn when one can't be reached. Locations that name them are accepted."
            ),
        ),
        cfg.StrOpt(
            "prefix",
            default="",
            help=(
                "What the names of all VDIs of this store begin with, such as 'image-'. Without one, every VDI of the "
                "cluster counts as an image that can be listed, read and deleted, disks of machines included. Glance "
                "had none."
            ),
        ),
        cfg.ListOpt(
            "accept_locations",
            default=[],
            help=(
                "Further addresses, host:port, comma-separated, that locations may name, such as former nodes of the "
                "cluster. Requests go to host and nodes all the same."
            ),
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        host = _host(settings.host or "")
        if host is None:
            raise self.invalid_option("host", f"{settings.host!r} is neither a name nor an address")
        if not settings.port:
            raise self.invalid_option("port", "not set")
        nodes = [(host, int(settings.port)), *(self._read_node("nodes", node) for node in settings.nodes or ())]
        former = [self._read_node("accept_locations", node) for node in settings.accept_locations or ()]
        self._addresses = list(dict.fromkeys(nodes))
        self._accepted = frozenset(nodes + former)
        self._prefix: str = settings.prefix or ""
        if not _PREFIX.fullmatch(self._prefix):
            raise self.invalid_option(
                "prefix", "has letters, digits, '.', '-' and '_', up to 55, and begins with none of '.' and '-'"
            )
        self._root = f"sheepdog://{_written(host)}:{settings.port}:"
        self._connecting = threading.Lock()
        self._current = 0
        self._link: Link | None = None
        self._closed = False

    def _read_node(self, option: str, text: str) -> tuple[str, int]:
        host, _, port = text.strip().rpartition(":")
        address = _address(host, port)
        if address is None or (":" in host and not host.startswith("[")):
            raise self.invalid_option(option, f"{text!r} is not of the form host:port")
        return address

    # The cluster

    def open(self) -> None:
        """Connect to a node, and ask what VDIs of the cluster are like.

        Raises:
            ConfigurationError: the node speaks another version of the protocol.
            Unavailable: no node can be reached, or the cluster is not formatted, waits for nodes or has stopped.
        """
        self._closed = False
        try:
            reply = self._ask(cluster_default(), accept=(Code.INVALID_PARMS,))[0]
        except BaseException:
            self.close()
            raise
        # Releases that don't know the question have objects of 4 MiB.
        shift = reply.shift if reply.code == Code.SUCCESS else _SHIFT_DEFAULT
        # Blocks are whole objects and live in memory; so the cluster's very large ones are not for images.
        self._shift = shift if shift in _SHIFTS_WRITTEN else _SHIFT_DEFAULT
        unit = 1 << self._shift
        longest = max(unit, _BLOCK)
        self.capabilities = Capabilities(
            parallel_writes=self.limits.workers,
            block_min=unit,
            block_max=longest,
            blocks_max=(OBJECTS_MAX << self._shift) // longest,
            sparse_unit=unit,
            repeatable_create=True,
        )

    def close(self) -> None:
        with self._connecting:
            self._closed = True
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def _connected(self) -> Link:
        with self._connecting:
            if self._closed:
                raise StoreError("the store was closed")
            if self._link is None or not self._link.usable():
                if self._link is not None:
                    self._current += 1
                self._link = self._connect()
            return self._link

    def _connect(self) -> Link:
        """To the first node that lets us, beginning with the one whose turn it is."""
        failed: list[LinkError] = []
        for _ in self._addresses:
            address = self._addresses[self._current % len(self._addresses)]
            try:
                return Link(address, connect=self.timeouts.connect, stall=self.timeouts.stall)
            except LinkError as error:
                failed.append(error)
                self._current += 1
        raise failed[-1]

    def _ask(self, *requests: Request, accept: tuple[int, ...] = ()) -> list[Reply]:
        """Send requests at once and wait for all answers, whose codes are success or among ``accept``."""
        link = self._connected()
        try:
            return link.call(*requests, accept=accept)
        except Refused as error:
            if error.code in _ASK_ANOTHER:
                link.close()
            raise

    def _head(self, vid: int) -> Inode:
        reply = self._ask(read_object(inode_object(vid), 0, INODE_HEAD))[0]
        return Inode.read(vid, _whole(reply, INODE_HEAD))

    def _find(self, name: str) -> Inode | None:
        """The VDI of that name that is no snapshot."""
        reply = self._ask(get_vdi(name), accept=(Code.NO_VDI,))[0]
        if reply.code == Code.NO_VDI:
            return None
        # One that is there and has no inode is lost for a moment, not gone.
        found = self._head(reply.vid)
        return found if found.name == name and not found.snapshotted else None

    def _scan(self) -> Iterator[Inode]:
        """All VDIs whose names may be of this store, no snapshots."""
        vids = _bits(self._ask(read_vdis())[0].data)
        while some := [vid for _, vid in zip(range(_SCAN), vids, strict=False)]:
            heads = [read_object(inode_object(vid), 0, INODE_HEAD) for vid in some]
            for vid, reply in zip(some, self._ask(*heads, accept=(Code.NO_OBJ,)), strict=True):
                if reply.code == Code.SUCCESS:
                    inode = Inode.read(vid, _whole(reply, INODE_HEAD))
                    if self._image_id(inode.name) is not None and not inode.snapshotted:
                        yield inode

    def _write(self, inode: Inode, offset: int, data: bytes) -> None:
        request = write_object(inode_object(inode.vid), offset, data, inode.copies, inode.policy)
        try:
            self._ask(request)
        except Refused as error:
            if error.code != Code.NO_OBJ or not self._is_gone(inode):
                raise
            raise NotFound("the VDI is gone") from error

    def _table(self, inode: Inode, first: int, stop: int) -> array[int]:
        """A part of the table of an image."""
        reply = self._ask(read_object(inode_object(inode.vid), TABLE + 4 * first, 4 * (stop - first)))[0]
        # Of a VDI that was deleted in this moment there is no table, and what was read is anything.
        self._require_unchanged(inode)
        return entries(_whole(reply, 4 * (stop - first)))

    # Locations and images

    def parse(self, uri: str, /) -> Location:
        """Check ``sheepdog://host:port:VDI``, or Glance's older ``sheepdog://VDI``.

        Taken apart from the right, so that an IPv6 address may stand in brackets or, as Glance wrote it, without.

        Raises:
            InvalidLocation: it names an address that this store is not configured for, or what can't be a VDI of it.
        """
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme.lower() not in self.schemes:
            raise InvalidLocation("not a sheepdog:// location")
        *address, name = rest.rsplit(":", 2)
        if address and (len(address) != 2 or _address(*address) not in self._accepted):
            raise InvalidLocation("not sheepdog://host:port:VDI with the address of a node that is configured")
        if not _VDI_NAME.fullmatch(name) or not name.startswith(self._prefix) or name == self._prefix:
            raise InvalidLocation("the name is not that of a VDI of this store")
        return self._location(name)

    def _location(self, name: str) -> Location:
        return Location(uri=self._root + name, key=(name,), image_id=self._image_id(name))

    def _image_id(self, name: str) -> str | None:
        image_id = name.removeprefix(self._prefix)
        return image_id if name.startswith(self._prefix) and IMAGE_ID.fullmatch(image_id) else None

    def locate(self, image_id: str, /) -> Location | None:
        found = self._find(self._prefix + image_id)
        return None if found is None or _Marks(found).unfinished else self._location(found.name)

    def stat(self, location: Location, /) -> Stat:
        return _stat(self._image(location))

    def _image(self, location: Location, version: str | None = None) -> Inode:
        found = self._find(location.key[0])
        if found is None or _Marks(found).unfinished:
            raise NotFound("there is no VDI of that name" if found is None else "the VDI there is no image (yet)")
        if found.hyper:
            raise Unsupported("the VDI is a hypervolume, which can't be an image")
        if found.shift not in _SHIFTS or found.count(found.size) > OBJECTS_MAX:
            raise StoreError("the VDI is damaged: it is larger than its table")
        if version is not None and _version(found) != version:
            raise Changed("another VDI has that name now")
        return found

    def list(self) -> Iterator[StoredImage]:
        """Every VDI whose name is an image id (after the prefix). Reads the head of every VDI there ever was."""
        for inode in self._scan():
            image_id = self._image_id(inode.name)
            if image_id is not None and not inode.hyper and not _Marks(inode).unfinished:
                yield StoredImage(
                    image_id=image_id,
                    location=self._location(inode.name),
                    size=inode.size,
                    modified=_moment(inode.created >> 32),
                )

    # Reading

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        inode = self._image(location, version)
        stop = inode.size if stop is None else min(stop, inode.size)
        first = start >> inode.shift
        table = self._table(inode, first, inode.count(stop)) if start < stop else entries(b"")
        chunks = _Chunks(self, inode, _pieces(inode, table, first, start, stop))
        return Reading(stat=_stat(inode), chunks=chunks, close=chunks.close)

    def extents(self, location: Location, start: int, stop: int, version: str | None, /) -> Iterator[tuple[int, int]]:
        inode = self._image(location, version)
        first, size = start >> inode.shift, inode.object_size
        begin = end = start
        for index, vid in enumerate(self._table(inode, first, inode.count(stop)), first):
            if vid == 0:
                continue
            if index * size > end:
                if begin < end:
                    yield begin, end
                begin = index * size
            end = min((index + 1) * size, stop)
        if begin < end:
            yield begin, end

    def _require_unchanged(self, inode: Inode) -> None:
        found = self._find(inode.name)
        if found is None or _Marks(found).unfinished:
            raise NotFound("the VDI was deleted while it was read")
        if not found.same(inode):
            raise Changed("another VDI has that name now")

    # Writing

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        name = self._prefix + image_id
        request = new_vdi(name, _sentinel(hints.token, self._shift), self._shift)
        reply = self._ask(request, accept=(Code.VDI_EXIST,))[0]
        if reply.code == Code.VDI_EXIST:
            found = self._find(name)
            marks = None if found is None else _Marks(found)
            if found is not None and marks is not None and marks.is_of(hints.token):
                return _Upload(self, found, self._location(name), hints)
            if found is None or marks is None or not marks.is_blank(hints.token):
                raise AlreadyExists(_why_taken(marks))
            # An attempt of ours that was cut before it wrote the tag. Deleted and not taken over: if it is a rival's
            # after all, who wrote the same size a moment ago, then that one finds its VDI gone, and both are safe.
            self._destroy(found)
            reply = self._ask(request)[0]
        made = self._head(reply.vid)
        if made.name != name:
            raise Unavailable("the new VDI is not there")
        if made.shift != self._shift:
            self._destroy(made)
            raise StoreError("the cluster made a VDI with objects of another size than it was told")
        return _Upload(self, made, self._location(name), hints)

    def delete(self, location: Location, /) -> None:
        """Delete a VDI, its objects first.

        Raises:
            InUse: there are snapshots of that name.
            Unsupported: it is a hypervolume.
        """
        found = self._find(location.key[0])
        if found is not None and _Marks(found).deleted:
            # A delete that was cut. Nobody else would free the name before it is collected.
            self._destroy(found)
        inode = self._image(location)
        if self._has_snapshots(inode):
            raise InUse("there are snapshots of that VDI: delete them first")
        self._mark_deleted(inode, uuid.uuid4().hex)
        if (found := self._find(inode.name)) is not None and found.same(inode):
            self._destroy(found)

    def _has_snapshots(self, inode: Inode) -> bool:
        """Whether a number up to its own is that of a snapshot: numbers only grow."""
        stop = min(inode.snapshot, _SNAPSHOTS_MAX) + 1
        for first in range(1, stop, _SCAN):
            numbers = range(first, min(first + _SCAN, stop))
            replies = self._ask(*(get_vdi(inode.name, number) for number in numbers), accept=(Code.NO_VDI, Code.NO_TAG))
            if any(reply.code == Code.SUCCESS and reply.vid != inode.vid for reply in replies):
                return True
        return False

    def _mark_deleted(self, inode: Inode, token: str) -> None:
        mark = _mark("delete", token)
        self._write(inode, _TAG, _field(mark, _UPLOAD) + _field(b"", _DISCARD) + _field(mark, _DELETE))

    def _destroy(self, inode: Inode) -> None:
        """Remove a VDI that is marked, so that nobody takes it for an image meanwhile."""
        # Other programs may have left entries beyond the size.
        for stop in (min(inode.count(inode.size), OBJECTS_MAX), OBJECTS_MAX):
            with contextlib.suppress(NotFound):
                self._clear_table(inode, stop)
            # DEL_VDI goes by the name alone, which may be another one's by now.
            if self._is_gone(inode):
                return
            self._ask(del_vdi(inode.name), accept=(Code.NO_VDI,))
            if self._is_gone(inode):
                return
        raise Unavailable("the cluster deleted the VDI, and it is still there")

    def _clear_table(self, inode: Inode, stop: int) -> None:
        pieces = [(first, min(first + _TABLE_PIECE, stop) - first) for first in range(0, stop, _TABLE_PIECE)]
        oid = inode_object(inode.vid)
        requests = (read_object(oid, TABLE + 4 * first, 4 * count) for first, count in pieces)
        for (first, count), reply in zip(pieces, self._ask(*requests, accept=(Code.NO_OBJ,)), strict=True):
            if reply.code == Code.SUCCESS and _whole(reply, 4 * count) != _ZEROS[: 4 * count]:
                self._write(inode, TABLE + 4 * first, bytes(4 * count))

    def _is_gone(self, inode: Inode) -> bool:
        found = self._find(inode.name)
        return found is None or not found.same(inode)

    # Leftovers

    def uploads(self) -> Iterator[Leftover]:
        """VDIs that are marked. Reads the head of every VDI there ever was."""
        for inode in self._scan():
            marks = _Marks(inode)
            if marks.unfinished:
                created = inode.created >> 32
                yield Leftover(
                    token=marks.token,
                    image_id=self._image_id(inode.name),
                    started=_moment(created),
                    last_activity=_moment(max(created, marks.beat)),
                    key=(inode.name, f"{inode.vid:x}", f"{inode.created:x}"),
                )

    def discard(self, leftover: Leftover, /) -> None:
        name, vid, created = leftover.key
        self._remove(name, int(vid, 16), int(created, 16), leftover.token)

    def _remove(self, name: str, vid: int, created: int, token: str) -> None:
        """Remove what is left of an upload or a delete, unless it became an image."""

        def look() -> Inode | None:
            found = self._find(name)
            theirs = found is None or (found.vid, found.created) != (vid, created)
            return None if theirs or found is None or not _Marks(found).has(token) else found

        inode = look()
        if inode is None:
            return
        with contextlib.suppress(NotFound):
            if not _Marks(inode).deleted:
                self._write(inode, _TAG + _DISCARD.start, _field(_mark("discard", token), _DISCARD))
                inode = look()
                if inode is None:
                    # A commit was faster. What was written stays there, and means nothing on an image.
                    return
                self._mark_deleted(inode, token)
            self._destroy(inode)

    def translate(self, error: Exception, /) -> StoreError | None:
        if isinstance(error, LinkError):
            return StoreTimeout(str(error)) if error.stalled else Unavailable(str(error))
        if not isinstance(error, Refused):
            return None
        if error.code >= _INTERNAL:
            return Unavailable(f"the cluster is changing ({error})")
        kind, text = _MEANING.get(error.code, (StoreError, "the cluster refused"))
        return kind(f"{text} ({error})")


class _Upload(Upload):
    """An image on its way into a VDI."""

    def __init__(self, driver: SheepdogDriver, inode: Inode, location: Location, hints: Hints) -> None:
        self.location = location
        self._driver = driver
        self._inode = inode
        self._token = hints.token
        self._lock = threading.Lock()
        # For each object: 1 if it has an entry, 2 if it is stored too.
        self._state = bytearray(OBJECTS_MAX if hints.size is None else min(OBJECTS_MAX, inode.count(hints.size)))
        self._end = 0
        self._beat = 0.0
        self._committed = False
        self._mark()

    def write(self, block: Block, /) -> None:
        """Store whole objects (the image's last may be shorter), and what the table says of them before."""
        inode, size = self._inode, self._inode.object_size
        first, odd = divmod(block.offset, size)
        stop = first + inode.count(len(block.data))
        if odd or stop > len(self._state):
            raise InvalidRequest(f"{len(block.data)} bytes at {block.offset} are not within the objects of this VDI")
        self._require_ours()
        self._enter(first, stop)
        data = memoryview(block.data)
        self._driver._ask(
            *(
                create_object(
                    data_object(inode.vid, first + number),
                    data[number * size : (number + 1) * size],
                    inode.copies,
                    inode.policy,
                )
                for number in range(stop - first)
            )
        )
        with self._lock:
            self._state[first:stop] = b"\2" * (stop - first)
            self._end = max(self._end, block.offset + len(block.data))

    def _require_ours(self) -> None:
        """A VDI that was collected meanwhile must not be written to: its id may be another one's by now."""
        if not self._look().is_of(self._token):
            raise NotFound("the upload was discarded")
        with self._lock:
            if time.monotonic() - self._beat > _BEAT:
                self._mark()

    def _look(self) -> _Marks:
        try:
            found = self._driver._head(self._inode.vid)
        except Refused as error:
            if error.code != Code.NO_OBJ or not self._driver._is_gone(self._inode):
                raise
            raise NotFound("the upload was discarded") from error
        if not found.same(self._inode):
            raise NotFound("the upload was discarded")
        if found.snapshotted:
            raise InUse("somebody made a snapshot of the unfinished VDI")
        return _Marks(found)

    def _mark(self) -> None:
        """Write our field of the tag, with the time, by which is told what is old."""
        self._driver._write(self._inode, _TAG, _field(_mark("upload", self._token, int(time.time())), _UPLOAD))
        self._beat = time.monotonic()

    def _enter(self, first: int, stop: int) -> None:
        """See that the table has entries for these objects."""
        with self._lock:
            if self._state.find(0, first, stop) < 0:
                return
            stop = min(max(stop, first + _AHEAD), len(self._state))
            vid = self._inode.vid.to_bytes(4, "little")
            self._driver._write(self._inode, TABLE + 4 * first, vid * (stop - first))
            self._state[first:stop] = self._state[first:stop].replace(b"\0", b"\1")

    def commit(self, size: int, /) -> None:
        """Take back entries without objects, set the size, and clear the mark, which makes it an image."""
        if self._committed:
            return
        marks = self._look()
        # If it looks finished, an attempt whose answer was lost did that.
        if marks.upload is not None or marks.size != size:
            if not marks.is_of(self._token):
                raise NotFound("the upload was discarded before its commit")
            if self._end > size:
                raise SizeMismatch(f"{self._end} bytes are stored, the image has {size}")
            if _is_sentinel(size, self._inode.shift):
                raise InvalidRequest(f"an image of {size} bytes can't be told from an unfinished one: add a byte to it")
            self._take_back_entries()
            self._driver._write(self._inode, _SIZE, size.to_bytes(8, "little"))
            self._driver._write(self._inode, _TAG, _field(b"", _UPLOAD))
            marks = self._look()
        if marks.discarded or marks.deleted:
            # Whether who discards it saw our mark can't be told. So it is no image, and `abort` removes it.
            self._mark()
            raise NotFound("the upload was discarded at the moment of its commit")
        self._committed = True

    def _take_back_entries(self) -> None:
        with self._lock:
            for run in re.finditer(b"\1+", bytes(self._state)):
                first, stop = run.span()
                self._driver._write(self._inode, TABLE + 4 * first, bytes(4 * (stop - first)))
                self._state[first:stop] = bytes(stop - first)

    def abort(self) -> None:
        """Remove the VDI, unless it became an image."""
        if not self._committed:
            inode = self._inode
            self._driver._remove(inode.name, inode.vid, inode.created, self._token)


class _Marks:
    """What the tag and the size of a VDI say.

    Attributes:
        upload: the token of the upload that it is.
        discarded: somebody wants to discard that upload. It means nothing of a VDI that is no upload any more.
        deleted: it is being deleted.
        beat: seconds since the epoch at which the upload was alive.
        size: the VDI's, in bytes.
    """

    def __init__(self, inode: Inode) -> None:
        self._inode = inode
        self.upload: str | None = None
        self.discarded: str | None = None
        self.deleted: str | None = None
        self.beat = 0
        self.size = inode.size
        for field, kind in ((_UPLOAD, "upload"), (_DISCARD, "discard"), (_DELETE, "delete")):
            mark = _MARK.fullmatch(inode.tag[field])
            if mark is None or mark[1] != kind.encode():
                continue
            token = mark[2].decode()
            if kind == "upload":
                self.upload, self.beat = token, int(mark[3] or 0)
            elif kind == "discard":
                self.discarded = token
            else:
                self.deleted = token

    @property
    def unfinished(self) -> bool:
        """It is no image."""
        inode = self._inode
        return self.upload is not None or self.deleted is not None or _is_sentinel(inode.size, inode.shift)

    @property
    def token(self) -> str:
        """What a leftover is called; without a tag, after the VDI."""
        return self.upload or self.deleted or f"{self._inode.vid:016x}{self._inode.created:016x}"

    def has(self, token: str) -> bool:
        """It is a leftover of that token."""
        return self.unfinished and token in (self.token, self.upload, self.deleted)

    def is_of(self, token: str) -> bool:
        """It is a living upload of that token."""
        return self.upload == token and not self.discarded and not self.deleted

    def is_blank(self, token: str) -> bool:
        """It is what `create` with that token makes before it writes the tag."""
        inode = self._inode
        return not any(inode.tag) and inode.size == _sentinel(token, inode.shift)


class _Chunks(Chunks):
    """The bytes of a VDI, with several requests on their way."""

    def __init__(self, driver: SheepdogDriver, inode: Inode, pieces: Iterator[tuple[int, int, int]]) -> None:
        super().__init__()
        self._driver = driver
        self._inode = inode
        self._pieces = pieces
        self._link = driver._connected()
        self._window: deque[tuple[Ticket | None, int]] = deque()

    def fetch(self) -> bytes:
        while len(self._window) <= _DEPTH and (piece := next(self._pieces, None)) is not None:
            oid, offset, length = piece
            ticket = self._link.send(read_object(oid, offset, length)) if oid else None
            self._window.append((ticket, length))
        if not self._window:
            return b""
        ticket, length = self._window.popleft()
        data = _ZEROS[:length] if ticket is None else self._take(ticket, length)
        if not self._window:
            # Before the last bytes are given away: who counts them need not ask for more.
            self._driver._require_unchanged(self._inode)
        return data

    def _take(self, ticket: Ticket, length: int) -> bytes:
        reply = self._link.wait(ticket)
        if reply.code == Code.NO_OBJ:
            raise Unavailable("a part of the image is not there: it was deleted meanwhile, or is damaged")
        if reply.code != Code.SUCCESS:
            raise Refused(reply.code, ticket.what)
        return _whole(reply, length)

    def release(self) -> None:
        """Nobody waits for the rest."""
        self._link.drop(*(ticket for ticket, _ in self._window if ticket is not None))


def _pieces(inode: Inode, table: array[int], first: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The bytes from ``start`` to ``stop`` as parts of objects: id (0 for a hole), offset and length."""
    position = start
    while position < stop:
        index, offset = divmod(position, inode.object_size)
        length = min(_CHUNK - offset % _CHUNK, stop - position)
        vid = table[index - first]
        if vid >> 24:
            raise StoreError("the VDI is damaged: an entry of its table is no id")
        yield data_object(vid, index) if vid else 0, offset, length
        position += length


def _bits(data: bytes) -> Iterator[int]:
    """Which bits are set."""
    for start in range(0, len(data), _BITS):
        part = data[start : start + _BITS]
        if part.count(0) == len(part):
            continue
        for place, byte in enumerate(part, start):
            if byte:
                yield from (place * 8 + bit for bit in range(8) if byte & 1 << bit)


def _whole(reply: Reply, length: int) -> bytes:
    if len(reply.data) != length:
        raise Unavailable(f"the node sent {len(reply.data)} bytes of {length}")
    return reply.data


def _mark(kind: str, token: str, seconds: int | None = None) -> bytes:
    return (f"imagestore-{kind}:{token}" + ("" if seconds is None else f" {seconds}")).encode()


def _field(mark: bytes, field: slice) -> bytes:
    """A mark, or none, as it stands in a field of a tag."""
    return mark.ljust(field.stop - field.start, b"\0")


def _sentinel(token: str, shift: int) -> int:
    """The size that a VDI has while it is an upload: odd, in the upper half of what can be, and different for most."""
    limit = OBJECTS_MAX << shift
    return limit // 2 + int(token, 16) % (limit // 2 >> 20) * (1 << 20) + _MAGIC


def _is_sentinel(size: int, shift: int) -> bool:
    limit = OBJECTS_MAX << shift
    return limit // 2 <= size < limit and size % (1 << 20) == _MAGIC


def _why_taken(marks: _Marks | None) -> str:
    if marks is None or not marks.unfinished:
        return "there is a VDI of that name"
    return (
        "the id is held by an unfinished upload or delete: wait for its end, or collect what it left "
        f"(token {marks.token})"
    )


def _version(inode: Inode) -> str:
    return f"{inode.vid:x}-{inode.created:x}"


def _stat(inode: Inode) -> Stat:
    return Stat(size=inode.size, version=_version(inode), modified=_moment(inode.created >> 32))


def _moment(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def _host(text: str) -> str | None:
    """An address in its shortest form, or a name in lower case; None if it is neither."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ipaddress.ip_address(bare)) if "%" not in bare else None
    except ValueError:
        return text.lower() if _HOST_NAME.fullmatch(text) else None


def _address(host: str, port: str) -> tuple[str, int] | None:
    name = _host(host)
    return (name, int(port)) if name is not None and _PORT.fullmatch(port) and 0 < int(port) < 65536 else None


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host
