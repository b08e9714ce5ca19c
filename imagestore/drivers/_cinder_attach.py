"""How the Cinder driver gets at the bytes of a volume: attachments, os-brick, and the two kinds of devices.

os-brick connects a volume to this host and gives it as a path (a block device, or a file) or, for RBD, as a file-like
object over librbd that needs no privilege. An attachment is undone in the reverse order, and its record in Cinder goes
last: Cinder would let a volume be attached elsewhere while a connection that is still open writes to it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shlex
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from oslo_config import cfg

from imagestore import driver
from imagestore.driver import require
from imagestore.drivers._cinder_client import Api, text_of
from imagestore.errors import ConfigurationError, StoreError, Unavailable, Unsupported

__all__ = ["READING", "Attachment", "Brick", "Chunks", "Readers"]

READING: Final = "imagestore_reading_"
"""Before the id of an attachment for reading, the name of a volume's metadata that tells when it was last used."""

_CHUNK: Final = 1024 * 1024
_ZEROS: Final = bytes(_CHUNK)
_WINDOW: Final = 256 * _CHUNK
_PIECES: Final = 6
_BEAT_EVERY: Final = 600.0
_LINGER: Final = 0.5
_SEEN_AFTER: Final = 15.0
_FILE_SYSTEMS: Final = frozenset({"NFS", "GLUSTERFS", "SCALITY", "VZSTORAGE", "QUOBYTE"})
_privileged = threading.Lock()


class Brick:
    """os-brick, set up for this host.

    Args:
        minimal: tell Cinder no more of this host than its name and address; needs no privilege.
        root_helper: the command by which os-brick becomes root where it must; empty: this process is root.
        lock_path: directory for lock files, in the whole process; None: what the program's configuration says.
        my_ip: this host's address on the storage network; None: what its name stands for.
        mount_base: directory below which shares are mounted.
    """

    def __init__(
        self,
        *,
        minimal: bool,
        root_helper: str,
        lock_path: str | None,
        my_ip: str | None,
        multipath: bool,
        enforce_multipath: bool,
        mount_base: str,
        encrypted: bool,
    ) -> None:
        self._connectors = require("os_brick.initiator.connector", extra="cinder")
        if lock_path is not None:
            # os-brick looks nowhere else for it.
            cfg.CONF.set_default("lock_path", lock_path, "os_brick")
        self._minimal = minimal
        self._root_helper = root_helper
        self._my_ip = my_ip
        self._multipath = multipath
        self._enforce_multipath = enforce_multipath
        self._mount_base = mount_base
        self.encrypted = encrypted
        self._lock = threading.Lock()
        self._host: Mapping[str, Any] | None = None

    def host(self) -> Mapping[str, Any]:
        """What Cinder must know of this host, found out once."""
        with self._lock:
            if self._host is None:
                self._host = self._minimal_host() if self._minimal else self._whole_host()
            return self._host

    def _address(self) -> str:
        with contextlib.suppress(OSError):
            return self._my_ip or socket.gethostbyname(socket.gethostname())
        return "127.0.0.1"

    def _minimal_host(self) -> Mapping[str, Any]:
        return {
            "platform": platform.machine(),
            "os_type": sys.platform,
            "ip": self._address(),
            "host": socket.gethostname(),
            "multipath": False,
            "do_local_attach": False,
        }

    def _whole_host(self) -> Mapping[str, Any]:
        self._know_how_to_be_root()
        found: Mapping[str, Any] = self._connectors.get_connector_properties(
            self._root_helper, self._address(), self._multipath, self._enforce_multipath
        )
        return found

    def _know_how_to_be_root(self) -> None:
        """Tell os-brick, which does nothing about it until it must; for the whole process, as there is no other way."""
        with _privileged:
            if self._root_helper:
                privileges = require("oslo_privsep.priv_context", extra="cinder")
                privileges.init(root_helper=shlex.split(self._root_helper))
            else:
                require("os_brick.privileged", extra="cinder").default.set_client_mode(False)

    def connector(self, info: Mapping[str, Any]) -> Any:
        """os-brick's connector for what Cinder says of an attachment."""
        self._know_how_to_be_root()
        protocol = str(info["driver_volume_type"]).upper()
        special: dict[str, Any] = {}
        if protocol in _FILE_SYSTEMS:
            # Each kind of share reads the argument of its own name.
            base = os.path.join(self._mount_base, protocol.lower())
            special = {f"{protocol.lower()}_mount_point_base": base}
            if info.get("options"):
                special[f"{protocol.lower()}_mount_options"] = info["options"]
        return self._connectors.InitiatorConnector.factory(
            protocol, self._root_helper, use_multipath=self._multipath, conn=info, **special
        )


class Piece(Protocol):
    """Bytes of a device that were asked for."""

    def wait(self) -> None:
        """Wait until the device is done with it."""

    def result(self) -> bytes:
        """Up to as many bytes as were asked for; none only at the end of the device."""


class _Later:
    """A piece of a device that can't be asked beforehand: it is read when it is wanted."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self.result = read

    def wait(self) -> None:
        """Nothing is on its way."""


class _Requested:
    """A piece of an image in librbd, which is on its way."""

    def __init__(self, image: Any, offset: int, length: int) -> None:
        # The request holds its callback: if that held this object too, the ring of them would keep librbd's buffers
        # until a garbage collection.
        arrived: list[bytes | None] = []
        self._arrived = arrived
        self._request = image.aio_read(offset, length, lambda _, data: arrived.append(data))

    def wait(self) -> None:
        self._request.wait_for_complete_and_cb()

    def result(self) -> bytes:
        self.wait()
        [data] = self._arrived
        if data is None:
            number = -self._request.get_return_value()
            raise OSError(number, os.strerror(number))
        return data


class Device(Protocol):
    """The bytes of a connected volume."""

    def ask(self, offset: int, length: int) -> Piece:
        """Ask for bytes: what is returned waits for them."""

    def write(self, offset: int, data: bytes) -> None: ...

    def flush(self) -> None:
        """What was written has reached the backend."""

    def size(self) -> int: ...

    def areas(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Areas that may hold other than zeros, ascending."""

    def close(self) -> None: ...


class FileDevice:
    """A path. It is never truncated: the volume may be a file that others have set up."""

    def __init__(self, path: str, *, writable: bool) -> None:
        self._file = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        self._writable = writable

    def ask(self, offset: int, length: int) -> Piece:
        return _Later(lambda: os.pread(self._file, length, offset))

    def write(self, offset: int, data: bytes) -> None:
        rest, at = memoryview(data), offset
        while rest:
            written = os.pwrite(self._file, rest, at)
            rest, at = rest[written:], at + written
        # The kernel begins to write it out now. Else all that its memory holds would wait for `flush`.
        os.posix_fadvise(self._file, offset, len(data), os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        if self._writable:
            os.fsync(self._file)

    def size(self) -> int:
        return os.lseek(self._file, 0, os.SEEK_END)

    def areas(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            yield start, stop
            return
        while start < stop:
            try:
                begin = os.lseek(self._file, start, os.SEEK_DATA)
            except OSError:
                return  # there is no more of it
            if begin >= stop:
                return
            start = min(os.lseek(self._file, begin, os.SEEK_HOLE), stop)
            yield begin, start

    def close(self) -> None:
        # The descriptor is gone also after an error, and what was written has been flushed.
        with contextlib.suppress(OSError):
            os.close(self._file)


class HandleDevice:
    """A file-like object of os-brick's, which has one position and takes nothing but bytes."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        # What it was opened with has Ceph's key in it, and would outlive a process that is killed.
        with contextlib.suppress(OSError, AttributeError):
            os.unlink(handle.rbd_conf)

    def ask(self, offset: int, length: int) -> Piece:
        image = self._image()
        if image is not None:
            return _Requested(image, offset, length)

        def read() -> bytes:
            with self._lock:
                self._handle.seek(offset)
                return bytes(self._handle.read(length))

        return _Later(read)

    def _image(self) -> Any:
        """The image in librbd, where the volume is in Ceph."""
        return getattr(self._handle, "rbd_image", None)

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            self._handle.seek(offset)
            self._handle.write(data)

    def flush(self) -> None:
        with self._lock:
            self._handle.flush()

    def size(self) -> int:
        with self._lock:
            self._handle.seek(0, os.SEEK_END)
            return int(self._handle.tell())

    def areas(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        image = self._image()
        if image is None:
            return iter([(start, stop)])
        found: list[tuple[int, int]] = []

        def note(offset: int, length: int, exists: bool) -> None:
            if exists:
                found.append((offset, offset + length))

        with self._lock:
            # Of whole objects, which the object map knows without asking for each.
            image.diff_iterate(start, stop - start, None, note, True, True)
        return iter(sorted((max(begin, start), min(end, stop)) for begin, end in found))

    def close(self) -> None:
        """Left to os-brick, which closes what it opened."""


class Attachment:
    """A volume on this host, from `open` to `close`.

    Attributes:
        device: its bytes.
        id: Cinder's id of the attachment.
    """

    device: Device

    def __init__(self, api: Api, brick: Brick, volume_id: str, *, writable: bool) -> None:
        self._api = api
        self._brick = brick
        self._volume_id = volume_id
        self._writable = writable
        self._undo: list[Callable[[], object]] = []
        self._flushed = False
        self._next_beat = 0.0
        self.id = ""

    def open(self) -> None:
        """Attach, connect and open. What fails takes back what came before it.

        Raises:
            Unavailable: something else has the volume, and Cinder allows no second one.
            Unsupported: the volume is encrypted, or of a format that is not plain bytes.
        """
        try:
            self._open()
        except BaseException as error:
            try:
                self.close()
            except Exception as second:  # noqa: BLE001 - the first error matters more
                error.add_note(f"the attachment could not be taken back: {text_of(second)}")
            raise

    def _open(self) -> None:
        # Not in one request with the next: of one that failed half-way nobody would know the id.
        self.id = attachment_id = self._api.reserve(self._volume_id, "rw" if self._writable else "ro")
        if not self._writable:
            self._undo.append(lambda: self._api.unset_metadata(self._volume_id, READING + attachment_id))
        self._undo.append(lambda: self._api.detach(attachment_id))
        self.beat()
        info = self._api.export(attachment_id, self._brick.host())
        self._require_plain(info)
        if self._writable and info.get("access_mode", "rw") == "ro":
            raise ConfigurationError("Cinder gives the volume for reading only")
        connector = self._brick.connector(info)
        self._connector, self._info = connector, info
        found: dict[str, Any] = {}
        # Also after a connection that failed half-way; os-brick takes one that is not there.
        self._undo.append(lambda: connector.disconnect_volume(info, found or None, force=True))
        found.update(connector.connect_volume(info))
        path = found["path"]
        self.device = (
            FileDevice(os.fspath(path), writable=self._writable)
            if isinstance(path, str | os.PathLike)
            else HandleDevice(path)
        )
        self._undo.append(self.device.close)
        self._api.complete(attachment_id)

    def beat(self) -> None:
        """Say in the volume's metadata, now and then, that it is being read."""
        if self._writable or time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + _BEAT_EVERY
        try:
            self._api.set_metadata(self._volume_id, {READING + self.id: datetime.now(UTC).isoformat()})
        except StoreError as error:
            # Who may only read can do without.
            if error.temporary:
                raise

    def _require_plain(self, info: Mapping[str, Any]) -> None:
        if info.get("encrypted") and not self._brick.encrypted:
            raise Unsupported(
                "the volume is encrypted, and its bytes can't be used here: use a volume type without encryption, or "
                "set the option encrypted if this host decrypts by itself"
            )
        if info.get("format") not in (None, "raw"):
            raise Unsupported(f"the volume is a file of the format {info['format']}: the share must hold raw files")

    def grown(self, size: int) -> None:
        """The volume was extended to ``size`` bytes while it is attached: let this host see it.

        Raises:
            Unavailable: it does not see it within a while.
        """
        with contextlib.suppress(NotImplementedError):
            self._connector.extend_volume(self._info)
        # librbd hears of it when it hears of it, and refuses writes until then; to ask for the size makes it look.
        end = time.monotonic() + _SEEN_AFTER
        while (seen := self.device.size()) < size:
            if time.monotonic() > end:
                raise Unavailable(f"the volume has {size} bytes now, and this host still sees {seen}")
            time.sleep(0.1)

    def flush(self) -> None:
        """Everything written is stored when this has returned once; no write may come after it."""
        if not self._flushed:
            self.device.flush()
            self._flushed = True

    def close(self) -> None:
        """Undo what was done, last things first; called again after an error it goes on where it stopped."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


class _Held:
    def __init__(self) -> None:
        # A reader that is dropped gives back from wherever the interpreter happens to be.
        self.lock = threading.RLock()
        self.users = 0
        self.reading = 0
        self.attachment: Attachment | None = None


class Readers:
    """Attachments for reading: one for each volume, kept for as long as somebody reads it."""

    def __init__(self, api: Api, brick: Brick) -> None:
        self._api = api
        self._brick = brick
        self._change = threading.Condition(threading.RLock())
        self._held: dict[str, _Held] = {}
        self._stuck: list[Attachment] = []
        self._dropped: list[threading.Thread] = []

    def open(self, volume_id: str, start: int, stop: int, *, partial: bool = False) -> Chunks:
        """The bytes of a volume from ``start`` up to ``stop``; ``partial``: others are likely to be asked for next."""
        held = self._take(volume_id)
        attachment = held.attachment
        assert attachment is not None
        try:
            # Holes are not read, so a device that ends in one would not be noticed.
            if (size := attachment.device.size()) < stop:
                raise Unavailable(f"the volume's device ends at byte {size}")
        except BaseException as error:
            try:
                self._give(volume_id, held, False, False)
            except Exception as second:  # noqa: BLE001 - the first error matters more
                error.add_note(f"the volume could not be detached: {text_of(second)}")
            raise
        return Chunks(
            attachment,
            start,
            stop,
            lambda good, ended: self._give(volume_id, held, good, ended and partial),
            self._apart,
        )

    def _apart(self, work: Callable[[], None]) -> None:
        """Do it in another thread: the one that drops a reader may be librbd's own, which would wait for itself."""
        # Not `current_thread`, which would enter a foreign thread among Python's for good.
        if threading.get_ident() == threading.main_thread().ident:
            work()
            return
        thread = threading.Thread(target=work, name="imagestore-cinder-dropped")
        with self._change:
            thread.start()
            self._dropped = [*(each for each in self._dropped if each.is_alive()), thread]

    def has(self, attachment_id: str) -> bool:
        """Whether it is one of these."""
        with self._change:
            there = [held.attachment for held in self._held.values()]
        return any(each is not None and each.id == attachment_id for each in there)

    def close(self) -> None:
        """Try once more to detach what could not be."""
        with self._change:
            dropped = self._dropped
        for thread in dropped:
            thread.join()
        self._detach()

    def _take(self, volume_id: str) -> _Held:
        with self._change:
            held = self._held.setdefault(volume_id, _Held())
            held.users += 1
            held.reading += 1
            self._change.notify_all()
        try:
            with held.lock:
                if held.attachment is None:
                    attachment = Attachment(self._api, self._brick, volume_id, writable=False)
                    attachment.open()
                    held.attachment = attachment
        except BaseException:
            self._give(volume_id, held, True, False)
            raise
        return held

    def _give(self, volume_id: str, held: _Held, good: bool, linger: bool) -> None:
        with self._change:
            held.reading -= 1
            if linger:
                self._change.wait_for(lambda: held.reading > 0, _LINGER)
        # Who comes for the volume while it is being detached waits for the lock, and attaches it anew.
        with held.lock:
            with self._change:
                held.users -= 1
                last = held.users == 0
                if not good:
                    # The next reader shall not get a device that has failed, also while others still hold it.
                    self._forget(volume_id, held)
            try:
                if last and held.attachment is not None:
                    attachment, held.attachment = held.attachment, None
                    with self._change:
                        self._stuck.append(attachment)
                    self._detach()
            finally:
                with self._change:
                    if held.users == 0:
                        self._forget(volume_id, held)

    def _detach(self) -> None:
        """Detach all that is not read any more.

        While Cinder can't be reached for a moment, that stays for the next time: what was read is none the worse for
        it, and if there is no next time the mark in the volume's metadata tells of it.
        """
        with self._change:
            stuck, self._stuck = self._stuck, []
        while stuck:
            try:
                stuck[-1].close()
            except BaseException as error:
                with self._change:
                    self._stuck += stuck
                if isinstance(error, StoreError) and error.temporary:
                    return
                raise
            stuck.pop()

    def _forget(self, volume_id: str, held: _Held) -> None:
        if self._held.get(volume_id) is held:
            del self._held[volume_id]


class Chunks(driver.Chunks):
    """Pieces of a volume, in order. The attachment is given back at the end, on an error, and when it is dropped.

    ``give`` is told whether the device is good, and whether the end was reached. ``apart`` is given what is to be done
    when it is dropped.
    """

    def __init__(
        self,
        attachment: Attachment,
        start: int,
        stop: int,
        give: Callable[[bool, bool], None],
        apart: Callable[[Callable[[], None]], None],
    ) -> None:
        super().__init__()
        self._attachment = attachment
        self._device = attachment.device
        self._at = start
        self._stop = stop
        self._extents = _extents(attachment.device, start, stop)
        self._pending: deque[tuple[int, int, Piece | None]] = deque()
        self._give = give
        self._apart = apart
        self._good = True
        self._whole = False
        self._pid = os.getpid()

    def fetch(self) -> bytes:
        if self._at >= self._stop:
            self._whole = True
            return b""
        # A volume that is attached can be read without Cinder.
        with contextlib.suppress(StoreError):
            self._attachment.beat()
        self._good = False
        data = self._next()
        self._good = True
        self._at += len(data)
        return data

    def _next(self) -> bytes:
        while True:
            self._ask()
            start, length, piece = self._pending[0]
            if self._at < start:
                return _ZEROS[: start - self._at]
            if piece is not None:
                break
            self._pending.popleft()
        data = piece.result()
        if not data:
            raise Unavailable(f"the volume's device ends at byte {start}")
        self._pending.popleft()
        if len(data) < length:
            # Some file systems give less than there is.
            start, length = start + len(data), length - len(data)
            self._pending.appendleft((start, length, self._device.ask(start, length)))
        return data

    def _ask(self) -> None:
        for start, length in itertools.islice(self._extents, max(0, _PIECES - len(self._pending))):
            self._pending.append((start, length, self._device.ask(start, length) if length else None))

    def release(self) -> None:
        # What is detached while librbd reads would be gone under it.
        for _, _, piece in self._pending:
            if piece is not None:
                piece.wait()
        self._pending.clear()
        self._give(self._good, self._whole)

    def __del__(self) -> None:
        # What a process's parent has open is not the child's to give back.
        if not self._released and self._pid == os.getpid():
            self._apart(self._close_quietly)

    def _close_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _extents(device: Device, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where pieces begin that may hold other than zeros, and their lengths; 0 where there are none up to there."""
    for begin in range(start, stop, _WINDOW):
        end = min(begin + _WINDOW, stop)
        for first, last in _joined(device.areas(begin, end)):
            for at in range(first, last, _CHUNK):
                yield at, min(_CHUNK, last - at)
        yield end, 0


def _joined(areas: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Areas, with those that are near each other made one: to read what lies between is quicker than to ask twice."""
    found: tuple[int, int] | None = None
    for start, stop in areas:
        if found is not None and start - found[1] < _CHUNK:
            found = found[0], stop
            continue
        if found is not None:
            yield found
        found = start, stop
    if found is not None:
        yield found
