"""The Sheepdog protocol, as far as images need it: requests, the head of an inode, and a connection.

Numbers are little-endian. A request is a header of 48 bytes and, with the flag WRITE, a body; a reply is a header of 48
bytes and as many bytes as it says. Replies come in any order and tell the number of their request. There is no
hand-shake, no authentication, no encryption and no checksum. Source: ``include/sheepdog_proto.h`` of Sheepdog 1.0.1;
the offsets in an inode that are used here are those of all releases since 0.7.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import sys
import termios
import threading
import time
from array import array
from dataclasses import dataclass
from typing import Final, Self

__all__ = [
    "INODE_HEAD",
    "OBJECTS_MAX",
    "TABLE",
    "Code",
    "Inode",
    "Link",
    "LinkError",
    "Refused",
    "Reply",
    "Request",
    "Ticket",
    "cluster_default",
    "create_object",
    "data_object",
    "del_vdi",
    "entries",
    "get_vdi",
    "inode_object",
    "new_vdi",
    "read_object",
    "read_vdis",
    "write_object",
]

VERSION: Final = 1
"""All releases since 0.5.2 take it, and none leaves zeros out of what is read with it, as some do with 2."""

OBJECTS_MAX: Final = 1 << 20
"""How many data objects a VDI may have."""

INODE_HEAD: Final = 568
TABLE: Final = 4664
"""Where in an inode the table of its objects begins: for each the VDI that it belongs to (4 bytes), or 0 for a hole."""

_NAME: Final = 256
_TAG: Final = 256
_BITMAP: Final = (1 << 24) // 8

_HEADER: Final = 48
_COMMON: Final = struct.Struct("<BBHIII")
_OBJECT: Final = struct.Struct("<QQBBBxIII")
_VDI: Final = struct.Struct("<QIBBBBII8x")
_REPLY: Final = struct.Struct("<BBHIIII28x")
_INODE: Final = struct.Struct("<256s256sQQQQQBBBBIII")

_WRITE: Final = 1

_CREATE_AND_WRITE_OBJ: Final = 0x01
_READ_OBJ: Final = 0x02
_WRITE_OBJ: Final = 0x03
_NEW_VDI: Final = 0x11
_GET_VDI_INFO: Final = 0x14
_READ_VDIS: Final = 0x15
_DEL_VDI: Final = 0x17
_GET_CLUSTER_DEFAULT: Final = 0x18

_SLICE: Final = 0.1


class Code:
    """What a reply may say."""

    SUCCESS: Final = 0x00
    NO_OBJ: Final = 0x02
    EIO: Final = 0x03
    VDI_EXIST: Final = 0x04
    INVALID_PARMS: Final = 0x05
    SYSTEM_ERROR: Final = 0x06
    VDI_LOCKED: Final = 0x07
    NO_VDI: Final = 0x08
    NO_BASE_VDI: Final = 0x09
    VDI_READ: Final = 0x0A
    VDI_WRITE: Final = 0x0B
    BASE_VDI_READ: Final = 0x0C
    BASE_VDI_WRITE: Final = 0x0D
    NO_TAG: Final = 0x0E
    STARTUP: Final = 0x0F
    SHUTDOWN: Final = 0x11
    NO_MEM: Final = 0x12
    FULL_VDI: Final = 0x13
    VER_MISMATCH: Final = 0x14
    NO_SPACE: Final = 0x15
    WAIT_FOR_FORMAT: Final = 0x16
    WAIT_FOR_JOIN: Final = 0x17
    JOIN_FAILED: Final = 0x18
    HALT: Final = 0x19
    READONLY: Final = 0x1A


class Refused(Exception):
    """The server answered with a code that is not success."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(f"{what}: result code 0x{code:02x}")
        self.code: Final = code


class LinkError(Exception):
    """The connection can't be made, broke, or brought nonsense.

    Attributes:
        stalled: the other side has stopped answering.
    """

    def __init__(self, message: str, *, stalled: bool = False) -> None:
        super().__init__(message)
        self.stalled: Final = stalled


# Requests


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what it is called in messages, its header from byte 16 on, its body, and the room for its answer."""

    what: str
    opcode: int
    rest: bytes
    body: bytes | memoryview = b""
    room: int = 0

    def header(self, number: int) -> bytes:
        """The header, with the number that the reply will have."""
        flags, length = (_WRITE, len(self.body)) if self.body else (0, self.room)
        # The epoch is the gateway's business: it puts in its own.
        return _COMMON.pack(VERSION, self.opcode, flags, 0, number, length) + self.rest


def inode_object(vid: int) -> int:
    """The id of a VDI's inode."""
    return 1 << 63 | vid << 32


def data_object(vid: int, index: int) -> int:
    """The id of a VDI's data object."""
    return vid << 32 | index


def read_object(oid: int, offset: int, length: int) -> Request:
    """Read ``length`` bytes. Beyond the end of an object servers send whatever is in their memory: never ask for it."""
    return Request("reading an object", _READ_OBJ, _OBJECT.pack(oid, 0, 0, 0, 0, 0, offset, 0), room=length)


def write_object(oid: int, offset: int, data: bytes, copies: int, policy: int) -> Request:
    """Write into an object that exists."""
    return Request("writing an object", _WRITE_OBJ, _OBJECT.pack(oid, 0, copies, policy, 0, 0, offset, 0), data)


def create_object(oid: int, data: bytes | memoryview, copies: int, policy: int) -> Request:
    """Make an object, or write it anew, from its beginning; what is not given of it reads as zeros."""
    return Request("creating an object", _CREATE_AND_WRITE_OBJ, _OBJECT.pack(oid, 0, copies, policy, 0, 0, 0, 0), data)


def new_vdi(name: str, size: int, shift: int) -> Request:
    """Make a VDI, with the cluster's number of copies and objects of ``1 << shift`` bytes. Exactly one of many wins."""
    return Request("creating a VDI", _NEW_VDI, _VDI.pack(size, 0, 0, 0, 0, shift, 0, 0), _padded(name, _NAME))


def get_vdi(name: str, snapshot: int = 0) -> Request:
    """Ask for the id of a VDI, or of its snapshot of that number."""
    rest = _VDI.pack(0, 0, 0, 0, 0, 0, snapshot, 0)
    return Request("looking a VDI up", _GET_VDI_INFO, rest, _padded(name, _NAME + _TAG))


def del_vdi(name: str) -> Request:
    """Delete a VDI. It succeeds, and does nothing, unless the VDI's table is all zeros."""
    return Request("deleting a VDI", _DEL_VDI, _VDI.pack(0, 0, 0, 0, 0, 0, 0, 0), _padded(name, _NAME + _TAG))


def read_vdis() -> Request:
    """Ask which ids of VDIs were ever given away: a bit for each."""
    return Request("listing VDIs", _READ_VDIS, bytes(32), room=_BITMAP)


def cluster_default() -> Request:
    """Ask what new VDIs are like."""
    return Request("asking for the cluster's defaults", _GET_CLUSTER_DEFAULT, bytes(32))


def _padded(name: str, length: int) -> bytes:
    return name.encode("ascii").ljust(length, b"\0")


# What comes back


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its code, its header and what came with it."""

    code: int
    head: bytes
    data: bytes

    @property
    def vid(self) -> int:
        """The id of a VDI."""
        return int.from_bytes(self.head[24:28], "little")

    @property
    def shift(self) -> int:
        """How large new VDIs' objects are, as a power of two."""
        return self.head[22]


def entries(data: bytes) -> array[int]:
    """A part of a table as numbers."""
    found = array("I", data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Inode:
    """The head of an inode.

    Attributes:
        created, snapshotted: seconds in the upper, nanoseconds in the lower half; `snapshotted` is 0 for a VDI that is
            no snapshot.
        hyper: its table is a tree.
        shift: its objects have ``1 << shift`` bytes.
        snapshot: the number that its next snapshot gets.
    """

    vid: int
    name: str
    tag: bytes
    created: int
    snapshotted: int
    size: int
    policy: int
    hyper: bool
    copies: int
    shift: int
    snapshot: int

    @classmethod
    def read(cls, vid: int, data: bytes) -> Self:
        """Take the first `INODE_HEAD` bytes apart. The name of a deleted VDI is empty."""
        name, tag, created, snapshotted, _, size, _, policy, kind, copies, shift, snapshot, _, _ = _INODE.unpack_from(
            data
        )
        return cls(
            vid=vid,
            name=name.partition(b"\0")[0].decode("utf-8", "replace"),
            tag=tag,
            created=created,
            snapshotted=snapshotted,
            size=size,
            policy=policy,
            hyper=kind != 0,
            copies=copies,
            # Releases that know one size only keep 0 there.
            shift=shift or 22,
            snapshot=snapshot,
        )

    @property
    def object_size(self) -> int:
        """In bytes."""
        return 1 << self.shift

    def count(self, size: int) -> int:
        """How many objects so many bytes have."""
        return -(-size >> self.shift)

    def same(self, other: Inode) -> bool:
        """Whether they are of the same VDI: a cluster may give the id of a deleted one to the next."""
        return (self.vid, self.name, self.created) == (other.vid, other.name, other.created)


# The connection


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way. Its `reply` comes while somebody waits for one."""

    what: str
    room: int
    change: threading.Condition
    sent: float | None = None
    waiting: bool = False
    dropped: bool = False
    reply: Reply | None = None


class Link:
    """A connection with any number of requests on their way, for any number of threads.

    It has no thread of its own: of those that wait for an answer one receives, for all, until it has its own.

    Attributes:
        error: why it can't be used any more.
    """

    def __init__(self, address: tuple[str, int], *, connect: float, stall: float) -> None:
        """Connect. ``connect`` and ``stall`` are seconds; raises `LinkError`."""
        self.error: LinkError | None = None
        self._stall = stall
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._receiving = False
        self._inside = 0
        self._number = 0
        self._sent = 0
        self._heard = 0.0
        self._open: dict[int, Ticket] = {}
        try:
            self._socket = socket.create_connection(address, timeout=connect)
        except OSError as error:
            text = f"can't connect to {address[0]} port {address[1]}: {error}"
            raise LinkError(text, stalled=isinstance(error, TimeoutError)) from error
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Of all zeros it would be for ever.
        timeval = divmod(max(1, int(stall * 1e6)), 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", *timeval))

    def close(self) -> None:
        """Give it up. Whoever waits gets an error."""
        self._fail(LinkError("the connection was closed"))

    def usable(self) -> bool:
        """Whether it is worth a try: a connection that the other side has closed meanwhile is not."""
        with self._lock:
            if self.error is not None or self._open:
                return self.error is None
            number = self._number
            self._inside += 1
        try:
            readable = self._poll(select.POLLIN, 0)
        finally:
            self._leave()
        with self._lock:
            # What another thread has asked since may be answered already.
            if not readable or self._number != number:
                return self.error is None
        self._fail(LinkError("the other side closed the connection"))
        return False

    def call(self, *requests: Request, accept: tuple[int, ...] = ()) -> list[Reply]:
        """Send requests, wait for all answers. Raises `Refused` for a code that is neither success nor accepted."""
        tickets: list[Ticket] = []
        try:
            tickets.extend(map(self.send, requests))
            replies = [self.wait(ticket) for ticket in tickets]
        except BaseException:
            self.drop(*tickets)
            raise
        for request, reply in zip(requests, replies, strict=True):
            if reply.code != Code.SUCCESS and reply.code not in accept:
                raise Refused(reply.code, request.what)
        return replies

    def send(self, request: Request) -> Ticket:
        """Send a request; `wait` for its answer, or `drop` it."""
        ticket = Ticket(request.what, request.room, threading.Condition(self._lock))
        with self._sending:
            with self._lock:
                if self.error is not None:
                    raise LinkError(str(self.error), stalled=self.error.stalled) from self.error
                self._number = self._number % 0xFFFFFFFF + 1
                number = self._number
                self._open[number] = ticket
                self._inside += 1
            try:
                self._transmit([memoryview(request.header(number)), memoryview(request.body)])
            except Exception as error:
                raise self._fail(error) from error
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self._leave()
            ticket.sent = time.monotonic()
        return ticket

    def wait(self, ticket: Ticket) -> Reply:
        """The answer, when it has come. Raises `LinkError`."""
        with self._lock:
            while ticket.reply is None and self.error is None and self._receiving:
                ticket.waiting = True
                try:
                    ticket.change.wait()
                except BaseException:
                    self._wake()
                    raise
                finally:
                    ticket.waiting = False
            leading = ticket.reply is None and self.error is None
            if leading:
                self._receiving = True
                self._inside += 1
        if leading:
            try:
                while ticket.reply is None:
                    self._receive()
            except Exception as error:
                raise self._fail(error) from error
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self._resign()
                self._leave()
        if ticket.reply is None:
            assert self.error is not None
            raise LinkError(str(self.error), stalled=self.error.stalled) from self.error
        return ticket.reply

    def drop(self, *tickets: Ticket) -> None:
        """Nobody waits for these any more."""
        with self._lock:
            for ticket in tickets:
                ticket.dropped = True
                ticket.reply = None

    def _transmit(self, parts: list[memoryview]) -> None:
        while parts := [part for part in parts if part]:
            try:
                sent = self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._await_room()
                continue
            self._sent += sent
            for number, part in enumerate(parts):
                parts[number] = part[min(sent, len(part)) :]
                sent = max(0, sent - len(part))

    def _await_room(self) -> None:
        """Wait until more can be sent. A server that waits for us to take its answers must not wait for ever."""
        began = time.monotonic()
        while True:
            with self._lock:
                leading = not self._receiving
                self._receiving = True
            try:
                events = self._poll(select.POLLOUT | (select.POLLIN if leading else 0), _SLICE)
                if leading and events & select.POLLIN:
                    self._receive()
            finally:
                if leading:
                    self._resign()
            if events & ~select.POLLIN:
                return
            if time.monotonic() - max(began, self._heard) > self._stall:
                raise TimeoutError

    def _receive(self) -> None:
        """Take one reply, whosever it is."""
        head = self._exactly(_HEADER)
        _, _, _, _, number, length, code = _REPLY.unpack(head)
        with self._lock:
            ticket = self._open.get(number)
        if ticket is None or length > ticket.room:
            raise LinkError("the server's answer makes no sense")
        data = self._exactly(length)
        with self._lock:
            del self._open[number]
            self._heard = time.monotonic()
            if not ticket.dropped:
                ticket.reply = Reply(code, head, data)
                ticket.change.notify()
            oldest = next(iter(self._open.values()), ticket)
        if ticket.sent and oldest.sent and ticket.sent - oldest.sent > self._stall:
            raise LinkError(f"{oldest.what} was never answered, and later requests were", stalled=True)

    def _exactly(self, length: int) -> bytes:
        parts = []
        while length:
            progress = self._progress()
            try:
                part = self._socket.recv(length, socket.MSG_WAITALL)
            except BlockingIOError:
                # Before an answer can come, the request must have left, and a slow network is no fault.
                if self._progress() != progress:
                    continue
                raise TimeoutError from None
            if not part:
                raise ConnectionResetError("the other side closed the connection")
            parts.append(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _progress(self) -> tuple[int, bytes]:
        """How much was given to the system to be sent, and how much of it has not arrived (SIOCOUTQ, see tcp(7))."""
        return self._sent, fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4))

    def _poll(self, events: int, seconds: float) -> int:
        poll = select.poll()
        poll.register(self._socket, events)
        found = poll.poll(seconds * 1000)
        return found[0][1] if found else 0

    def _fail(self, error: BaseException) -> LinkError:
        """Nothing can be sent or received any more; everybody hears of it."""
        with self._lock:
            if self.error is None:
                if isinstance(error, LinkError):
                    self.error = error
                elif isinstance(error, TimeoutError):
                    self.error = LinkError(f"no sign of life for {self._stall:g} seconds", stalled=True)
                else:
                    self.error = LinkError(f"the connection broke: {str(error) or type(error).__name__}")
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            for ticket in self._open.values():
                ticket.change.notify_all()
            if not self._inside:
                self._socket.close()
            return LinkError(str(self.error), stalled=self.error.stalled)

    def _leave(self) -> None:
        """A thread is out of the socket's calls: closing it under one could hit another file of that number."""
        with self._lock:
            self._inside -= 1
            if self.error is not None and not self._inside:
                self._socket.close()

    def _resign(self) -> None:
        with self._lock:
            self._receiving = False
            self._wake()

    def _wake(self) -> None:
        """Let somebody else receive, if anybody waits."""
        for ticket in self._open.values():
            if ticket.waiting:
                ticket.change.notify()
                return
