#!/usr/bin/env python3
"""A Sheepdog node in memory, as strict and as treacherous as a real one: ``sheepdog_server.py start|stop|status DIR``.

It speaks the protocol of Sheepdog 1.0 and has its ways: requests of one connection are carried out and answered in any
order; DEL_VDI succeeds and deletes nothing while there is an entry in the table; what is read beyond the end of an
object is whatever is in memory; hardly anything is checked (what a client should have checked is in ``violations``);
snapshots make objects read-only; deleted VDIs keep their ids and an inode without a name. `Sheepdog.on` makes it
answer with any code, not at all, with nonsense, or cut the connection.

As a program it listens on loopback only, on a free port. ``start`` and ``status`` print ``SHEEPDOG_NODE=host:port``;
``status`` ends with 0 if the server runs and with 3 if not.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

CREATE, READ, WRITE, REMOVE = 0x01, 0x02, 0x03, 0x04
NEW_VDI, LOCK_VDI, RELEASE_VDI, GET_VDI_INFO, READ_VDIS, FLUSH_VDI, DEL_VDI, CLUSTER_DEFAULT = range(0x11, 0x19)
NAMES = {
    CREATE: "create", READ: "read", WRITE: "write", REMOVE: "remove", NEW_VDI: "new", LOCK_VDI: "lock",
    RELEASE_VDI: "release", GET_VDI_INFO: "get", READ_VDIS: "vdis", FLUSH_VDI: "flush", DEL_VDI: "del",
    CLUSTER_DEFAULT: "default",
}  # fmt: skip

OK, NO_OBJ, EXIST, INVALID, NO_VDI, NO_TAG = 0, 2, 4, 5, 8, 0xE
VER_MISMATCH, NO_SPACE, NOT_FORMATTED, WAITING, HALTED, READONLY = 0x14, 0x15, 0x16, 0x17, 0x19, 0x1A

OBJECTS = 1 << 20
HEAD, TABLE = 568, 4664
INODE_END = 12_587_576
BITMAP = (1 << 24) // 8

_REQUEST = struct.Struct("<BBHIII")
_OBJECT = struct.Struct("<QQBBBxIII")
_VDI = struct.Struct("<QIBBBBII8x")
_INODE = struct.Struct("<256s256sQQQQQBBBBIII")
_GARBAGE = b"\xde\xad uninitialised \xbe\xef" * 64


@dataclass(slots=True, eq=False)
class Inode:
    vid: int
    head: bytearray
    table: dict[int, int] = field(default_factory=dict)
    """What is not 0."""

    @property
    def fields(self) -> tuple[bytes, bytes, int, int, int, int, int, int, int, int, int, int, int, int]:
        return _INODE.unpack_from(self.head)

    @property
    def name(self) -> bytes:
        return bytes(self.head[:256]).partition(b"\0")[0]

    @property
    def tag(self) -> bytes:
        return bytes(self.head[256:512]).partition(b"\0")[0]

    @property
    def is_snapshot(self) -> bool:
        return self.fields[3] != 0

    @property
    def size(self) -> int:
        return self.fields[5]

    @property
    def shift(self) -> int:
        return self.fields[10]

    @property
    def snapshot(self) -> int:
        return self.fields[11]


@dataclass(slots=True, eq=False)
class Rule:
    """What happens to a request instead of what should. ``at`` counts the requests of that kind from 1."""

    action: str
    opcode: int | None
    at: int
    times: int | None
    code: int
    seen: int = 0


class Cut(Exception):
    """The connection is cut here, after these bytes."""

    def __init__(self, last: bytes = b"") -> None:
        self.last = last


class Sheepdog:
    """The node. ``with Sheepdog() as node:`` it listens at ``node.host`` and ``node.port``.

    Attributes:
        violations: what a client did that the real server does not notice, and that loses or leaks data.
        strays: writes to VDIs that are deleted. A race with whoever deletes can't be excluded.
        complaints: what a real node would have written into its log.
        state: a code that every request is answered with: not formatted, waiting, halted.
        log: the names of the requests.
        ordered: answer in the order of requests, for measurements.
    """

    def __init__(
        self,
        *,
        shift: int = 20,
        recycle: bool = False,
        capacity: int | None = None,
        seed: int = 1,
        peer: Sheepdog | None = None,
    ) -> None:
        """``capacity`` is in bytes of objects; ``peer`` is another node of the same cluster."""
        self.shift = shift
        self.host = "127.0.0.1"
        self.port = 0
        self.violations: list[str] = []
        self.strays: list[str] = []
        self.complaints: list[str] = []
        self.state = OK
        self.log: list[str] = []
        self.ordered = False
        self._recycle = recycle
        self._capacity = capacity
        self._random = random.Random(seed)
        self._inodes: dict[int, Inode] = {}
        self._names: dict[bytes, list[Inode]] = {}
        self._used: set[int] = set()
        self._objects: dict[tuple[int, int], bytes] = {}
        self._references: Counter[tuple[int, int]] = Counter()
        self._rules: list[Rule] = []
        self._lock = threading.RLock()
        if peer is not None:
            for name in ("violations", "strays", "complaints", "_inodes", "_names", "_used", "_objects", "_references"):
                setattr(self, name, getattr(peer, name))
            self._lock = peer._lock
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._connections: set[socket.socket] = set()
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Life

    @property
    def node(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        """Listen; after `stop` on the same port, with everything that was stored."""
        listener = socket.create_server((self.host, self.port), backlog=128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._run(self._accept, listener)

    def stop(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()

    def cut(self) -> None:
        """Cut all connections."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=function, args=arguments, name="sheepdog", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._listener is None:
                    connection.close()
                    return
                self._connections.add(connection)
                self._run(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while requests := self._gather(connection):
                for header, body in requests:
                    reply = self._answer(header, body)
                    if reply:
                        connection.sendall(reply)
        except Cut as cut:
            with contextlib.suppress(OSError):
                connection.sendall(cut.last)
                # A reset, as when a process dies.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", not cut.last, 0))
        except OSError:
            pass
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _gather(self, connection: socket.socket) -> list[tuple[bytes, bytes]]:
        """The requests that are there, in any order; at least one, or none at the end."""
        found: list[tuple[bytes, bytes]] = []
        while len(found) < 16:
            if found and (self.ordered or not self._readable(connection)):
                break
            header = _exactly(connection, 48)
            if not header:
                break
            _, _, flags, _, _, length = _REQUEST.unpack_from(header)
            found.append((header, _exactly(connection, length) if flags & 1 else b""))
        if not self.ordered:
            self._random.shuffle(found)
        return found

    def _readable(self, connection: socket.socket) -> bool:
        """Now and then a moment is waited for more, so that answers overtake each other."""
        wait = 0.001 if self._random.random() < 0.05 else 0
        return bool(select.select([connection], [], [], wait)[0])

    # Faults

    def on(self, action: str, opcode: int | None = None, *, at: int = 1, times: int | None = 1, code: int = 0) -> None:
        """Let something go wrong with the ``at``-th request (of that kind) from now on, and ``times`` - 1 after it.

        Actions: ``code`` answers with it, ``before`` cuts the connection without having done anything, ``after`` does
        it and cuts instead of answering, ``midway`` cuts in the middle of the answer, ``stall`` never answers,
        ``number`` answers another request, ``long`` sends more than was asked for, ``short`` sends less.
        """
        with self._lock:
            self._rules.append(Rule(action, opcode, at, times, code))

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()
            self.state = OK

    @property
    def pending(self) -> bool:
        """Whether something is still to go wrong."""
        with self._lock:
            return any(rule.times is None or rule.seen < rule.at + rule.times - 1 for rule in self._rules)

    def _due(self, opcode: int) -> Rule | None:
        due = None
        for rule in self._rules:
            if rule.opcode in (None, opcode):
                rule.seen += 1
                if rule.seen >= rule.at and (rule.times is None or rule.seen < rule.at + rule.times):
                    due = due or rule
        return due

    # Requests

    def _answer(self, header: bytes, body: bytes) -> bytes:
        version, opcode, flags, epoch, number, length = _REQUEST.unpack_from(header)
        with self._lock:
            self.log.append(NAMES.get(opcode, hex(opcode)))
            rule = self._due(opcode)
            action = rule.action if rule else ""
            if action == "stall":
                return b""
            if action == "before":
                raise Cut
            if rule is not None and action == "code":
                code, rest, data = rule.code, b"", b""
            elif version not in (0, 1, 2):
                code, rest, data = VER_MISMATCH, b"", b""
            elif self.state != OK:
                code, rest, data = self.state, b"", b""
            else:
                if flags & ~1:
                    self.violations.append(f"flags {flags:#x}")
                code, rest, data = self._do(opcode, header, body, 0 if flags & 1 else length)
        if action == "after":
            raise Cut
        if action == "number":
            number ^= 0x5555
        if action == "long":
            data = data + b"more than was asked for"
        if action == "short":
            data = data[:-1]
        head = _REQUEST.pack(version, opcode, 0, epoch, number, len(data)) + struct.pack("<I", code)
        reply = head + rest.ljust(28, b"\0")[:28] + data
        if action == "midway":
            raise Cut(reply[: len(reply) // 2])
        return reply

    def _do(self, opcode: int, header: bytes, body: bytes, room: int) -> tuple[int, bytes, bytes]:
        if opcode in (CREATE, READ, WRITE, REMOVE):
            oid, _, _, _, _, _, offset, _ = _OBJECT.unpack_from(header, 16)
            return self._object(opcode, oid, offset, body, room)
        size, base, _, _, policy, shift, snapshot, _ = _VDI.unpack_from(header, 16)
        if opcode == CLUSTER_DEFAULT:
            return OK, bytes((1, 0, self.shift)), b""
        if opcode == READ_VDIS:
            return (OK, b"", self._bitmap()) if room == BITMAP else (INVALID, b"", b"")
        if opcode == NEW_VDI:
            if len(body) != 256:
                return INVALID, b"", b""
            return self._new(body, size, base, policy, shift or self.shift, snapshot)
        if opcode in (GET_VDI_INFO, LOCK_VDI, DEL_VDI):
            if len(body) != 512:
                return INVALID, b"", b""
            name, tag = (part.partition(b"\0")[0] for part in (body[:256], body[256:]))
            code, inode = self._look_up(name, tag, snapshot)
            if inode is None:
                return code, b"", b""
            if opcode == DEL_VDI:
                self._delete(inode)
            return OK, struct.pack("<4xI", inode.vid), b""
        return INVALID, b"", b""

    def _object(self, opcode: int, oid: int, offset: int, body: bytes, room: int) -> tuple[int, bytes, bytes]:
        vid, index = oid >> 32 & 0xFFFFFF, oid & 0xFFFFFFFF
        if oid >> 63:
            return self._inode(opcode, vid, offset, body, room)
        key = (vid, index)
        inode = self._inodes.get(vid)
        length = 1 << (inode.shift if inode else self.shift)
        if opcode == READ:
            if key not in self._objects:
                return NO_OBJ, b"", b""
            if offset + room > length:
                self.violations.append(f"read up to {offset + room} of an object of {length}")
            part = self._objects[key][offset : offset + room]
            part += bytes(max(0, min(offset + room, length) - offset - len(part)))
            return OK, b"", part + (_GARBAGE * (room // len(_GARBAGE) + 1))[: room - len(part)]
        if opcode == REMOVE:
            return (OK if self._objects.pop(key, None) is not None else NO_OBJ), b"", b""
        if inode is not None and inode.is_snapshot:
            return READONLY, b"", b""
        if opcode == WRITE and key not in self._objects:
            return NO_OBJ, b"", b""
        if (
            key not in self._objects
            and self._capacity is not None
            and len(self._objects) >= self._capacity >> self.shift
        ):
            return NO_SPACE, b"", b""
        if inode is None or not inode.name:
            self.strays.append(f"object {index} of the deleted VDI {vid:x}")
        elif offset + len(body) > length:
            self.violations.append(f"{len(body)} bytes at {offset} of an object of {length}")
        elif index >= OBJECTS:
            self.violations.append(f"object {index}")
        elif inode.table.get(index) != vid:
            self.violations.append(f"object {index} before its entry: a crash now leaks it")
        old = self._objects.get(key, b"") if opcode == WRITE else b""
        self._objects[key] = old[:offset].ljust(offset, b"\0") + body + old[offset + len(body) :]
        return OK, b"", b""

    def _inode(self, opcode: int, vid: int, offset: int, body: bytes, room: int) -> tuple[int, bytes, bytes]:
        inode = self._inodes.get(vid)
        if inode is None or opcode not in (READ, WRITE):
            return (NO_OBJ if inode is None else INVALID), b"", b""
        if opcode == READ:
            data = _read(inode, offset, room)
            return OK, b"", data + (_GARBAGE * (room // len(_GARBAGE) + 1))[: room - len(data)]
        if not inode.name:
            self.strays.append(f"inode of the deleted VDI {vid:x} at {offset}")
        if offset + len(body) > TABLE + 4 * OBJECTS:
            self.violations.append(f"{len(body)} bytes at {offset} of an inode")
        elif offset >= TABLE:
            self._write_table(inode, offset - TABLE, body)
        else:
            if offset < 256:
                self.violations.append("a VDI renamed")
            if offset + len(body) > HEAD:
                self.violations.append(f"{len(body)} bytes at {offset} of an inode")
            inode.head[offset : offset + len(body)] = body
        return OK, b"", b""

    def _write_table(self, inode: Inode, offset: int, body: bytes) -> None:
        if offset % 4 or len(body) % 4:
            self.violations.append("a part of an entry")
        if not inode.name:
            return
        first, count = offset // 4, len(body) // 4
        new = {first + place: vid for place, vid in enumerate(array("I", body)) if vid} if body.strip(b"\0") else {}
        old = {index: inode.table[index] for index in inode.table if first <= index < first + count}
        for index in old.keys() | new.keys():
            before, after = old.get(index, 0), new.get(index, 0)
            if before == after:
                continue
            if after not in (0, inode.vid):
                self.violations.append(f"entry {index} is {after:x} in VDI {inode.vid:x}")
            self._refer(after, index, 1)
            self._refer(before, index, -1)
            if after:
                inode.table[index] = after
            else:
                del inode.table[index]

    def _refer(self, vid: int, index: int, change: int) -> None:
        if vid == 0:
            return
        self._references[vid, index] += change
        if self._references[vid, index] <= 0:
            del self._references[vid, index]
            if self._objects.pop((vid, index), None) is None:
                self.complaints.append(f"object {index} of {vid:x}, whose entry was taken away, is not there")

    def _new(
        self, name: bytes, size: int, base: int, policy: int, shift: int, snapshot: int
    ) -> tuple[int, bytes, bytes]:
        name = name.partition(b"\0")[0]
        if not name or size > OBJECTS << shift or shift not in range(20, 32):
            self.violations.append(f"a VDI {name!r} of {size} bytes in objects of 2**{shift}")
        _, working = self._look_up(name, b"", 0)
        number = 1 + max((each.snapshot for each in self._names.get(name, ())), default=0)
        if snapshot:
            if working is None or working.vid != base:
                return INVALID, b"", b""
            size, shift = working.size, working.shift
            working.head[520:528] = _now()
        elif working is not None:
            return EXIST, b"", b""
        vid = self._free(name)
        head = bytearray(TABLE)
        parent = base if snapshot else 0
        _INODE.pack_into(head, 0, name, b"", 0, 0, 0, size, 0, 0, policy, 1, shift, number, vid, parent)
        head[512:520] = _now()
        self._inodes[vid] = made = Inode(vid, head)
        self._names.setdefault(name, []).append(made)
        self._used.add(vid)
        if snapshot and working is not None:
            made.table.update(working.table)
            for index, owner in made.table.items():
                self._references[owner, index] += 1
        return OK, struct.pack("<4xI", vid), b""

    def _free(self, name: bytes) -> int:
        """The id of a new VDI: the hash of its name, or the next that was never used; or the first that is free."""
        vid = 1 if self._recycle else (_hash(name) & 0xFFFFFF) or 1
        while vid in self._used:
            vid = vid % 0xFFFFFF + 1
        return vid

    def _look_up(self, name: bytes, tag: bytes, snapshot: int) -> tuple[int, Inode | None]:
        found = self._names.get(name, [])
        if not tag and not snapshot:
            return NO_VDI, next((inode for inode in found if not inode.is_snapshot), None)
        for inode in found:
            if inode.is_snapshot and (snapshot == inode.snapshot if snapshot else tag == inode.tag):
                return OK, inode
        return (NO_TAG if found else NO_VDI), None

    def _delete(self, inode: Inode) -> None:
        if inode.fields[8]:
            self.violations.append("a hypervolume was deleted: the node panics")
        if inode.table:
            return
        self._names[inode.name].remove(inode)
        if self._recycle:
            del self._inodes[inode.vid]
            self._used.discard(inode.vid)
        else:
            inode.head[:256] = bytes(256)

    def _bitmap(self) -> bytes:
        bits = bytearray(BITMAP)
        for vid in self._used:
            bits[vid // 8] |= 1 << vid % 8
        return bytes(bits)

    # What tests look at and plant

    def vdi(self, name: str) -> Inode | None:
        """The VDI of that name, no snapshot."""
        with self._lock:
            return self._look_up(name.encode(), b"", 0)[1]

    def names(self) -> list[str]:
        """The names of all VDIs and snapshots."""
        with self._lock:
            return [inode.name.decode() for inode in self._inodes.values() if inode.name]

    @property
    def objects(self) -> int:
        """How many data objects there are."""
        with self._lock:
            return len(self._objects)

    def orphans(self) -> list[tuple[int, int]]:
        """Data objects that no table names: they stay for ever."""
        with self._lock:
            return [key for key in self._objects if not self._references[key]]

    def faults_of(self, name: str) -> list[str]:
        """What a check of that VDI finds: entries without objects, or beyond its size."""
        with self._lock:
            inode = self.vdi(name)
            assert inode is not None, name
            count = -(-inode.size >> inode.shift)
            named = sorted(inode.table.items())
            lost = [f"object {index} is not there" for index, vid in named if (vid, index) not in self._objects]
            return lost + [f"entry {index} is beyond the size" for index, _ in named if index >= count]

    def plant(self, name: str, data: bytes, *, tag: bytes = b"", size: int | None = None, hyper: bool = False) -> int:
        """A VDI that another program made; all of its objects are there, also those of zeros."""
        with self._lock:
            padded = name.encode().ljust(256, b"\0")
            size = len(data) if size is None else size
            code, rest, _ = self._new(padded, size, 0, 0, self.shift, 0)
            assert code == OK, code
            vid = struct.unpack("<4xI", rest)[0]
            inode = self._inodes[vid]
            inode.head[256 : 256 + len(tag)] = tag
            length = 1 << self.shift
            for index in range(-(-len(data) // length)):
                self._write_table(inode, 4 * index, vid.to_bytes(4, "little"))
                self._objects[vid, index] = data[index * length : (index + 1) * length]
            inode.head[553] = hyper
            return vid

    def snapshot(self, name: str, tag: bytes = b"snap") -> None:
        """What ``vdi snapshot`` does: the VDI keeps its name and gets another id."""
        with self._lock:
            inode = self.vdi(name)
            assert inode is not None, name
            inode.head[256:512] = tag.ljust(256, b"\0")
            assert self._new(name.encode().ljust(256, b"\0"), 0, inode.vid, 0, self.shift, 1)[0] == OK

    def remove(self, name: str, *, snapshots: bool) -> None:
        """Delete a VDI, or its snapshots, whatever is in it."""
        with self._lock:
            for inode in [each for each in self._names.get(name.encode(), ()) if each.is_snapshot == snapshots]:
                self._write_table(inode, 0, bytes(4 * OBJECTS))
                self._delete(inode)

    def state_of(self, name: str) -> tuple[bytes, dict[int, int], list[bytes]]:
        """Everything of a VDI, to compare."""
        with self._lock:
            inode = self.vdi(name)
            assert inode is not None, name
            return (
                bytes(inode.head),
                dict(inode.table),
                [self._objects[vid, index] for index, vid in inode.table.items()],
            )


def _exactly(connection: socket.socket, length: int) -> bytes:
    if not length:
        return b""
    data = connection.recv(length, socket.MSG_WAITALL)
    if len(data) == length:
        return data
    parts = [data]
    while data and (length := length - len(data)):
        data = connection.recv(length, socket.MSG_WAITALL)
        parts.append(data)
    return b"".join(parts) if not length or data else b""


def _read(inode: Inode, offset: int, room: int) -> bytes:
    """A part of an inode; of a deleted one only the head is left."""
    if not inode.name:
        return bytes(inode.head[offset : offset + room])
    if offset < TABLE:
        head = bytes(inode.head[offset : offset + room])
        return head + (_read(inode, TABLE, room - len(head)) if room > len(head) else b"")
    first, count = (offset - TABLE) // 4, -(-room // 4)
    part = array("I", bytes(4 * count))
    for index in range(first, first + count) if count < len(inode.table) else inode.table:
        if first <= index < first + count:
            part[index - first] = inode.table.get(index, 0)
    return part.tobytes()[: min(room, INODE_END - offset)]


def _now() -> bytes:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return (seconds << 32 | nanoseconds).to_bytes(8, "little")


def _hash(name: bytes) -> int:
    """FNV-1a of 64 bits."""
    value = 0xCBF29CE484222325
    for byte in name:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


# As a program


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop", "status", "serve"):
        print(__doc__, file=sys.stderr)
        return 2
    place = Path(sys.argv[2]).absolute()
    return {"start": start, "stop": stop, "status": status, "serve": serve}[sys.argv[1]](place)


def serve(place: Path) -> int:
    """The server itself, until it is ended."""
    server = Sheepdog(shift=22)
    server.ordered = "IMAGESTORE_SHEEPDOG_ORDERED" in os.environ
    made = place / "env.new"
    made.write_text(f"SHEEPDOG_NODE={server.node}\n")
    made.rename(place / "env")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.stop()
    return 0


def start(place: Path) -> int:
    if pid_of(place) is None:
        place.mkdir(parents=True, exist_ok=True)
        (place / "env").unlink(missing_ok=True)
        with (place / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "serve", str(place)],
                env={**os.environ, "IMAGESTORE_SERVER_PLACE": str(place)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (place / "pid").write_text(str(process.pid))
        for _ in attempts(20):
            if process.poll() is not None or (place / "env").exists():
                break
    if status(place) == 0:
        return 0
    print(f"the server does not start: {(place / 'log').read_text()[-800:]}", file=sys.stderr)
    return 1


def stop(place: Path) -> int:
    pid = pid_of(place)
    if pid is not None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if any(pid_of(place) is None for _ in attempts(5)):
                break
    (place / "env").unlink(missing_ok=True)
    return 0


def status(place: Path) -> int:
    if pid_of(place) is not None and (place / "env").exists():
        print((place / "env").read_text(), end="")
        return 0
    print("not running")
    return 3


def pid_of(place: Path) -> int | None:
    """The server's process, if it is the one of this directory: a number may have been used again."""
    try:
        pid = int((place / "pid").read_text())
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if f"IMAGESTORE_SERVER_PLACE={place}".encode() in variables else None


def attempts(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.03)


if __name__ == "__main__":
    raise SystemExit(main())
