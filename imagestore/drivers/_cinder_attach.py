"""How the Cinder driver gets at the bytes of a volume: attachments, os-brick, and the two kinds of devices.

os-brick connects a volume to this host and gives it as a path (a block device, or a file) or, for RBD, as a file-like
object over librbd that needs no privilege. An attachment is undone in the reverse order, and its record in Cinder goes
last: Cinder would let a volume be attached elsewhere while a connection that is still open writes to it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

from imagestore.driver import require
from imagestore.drivers._cinder_client import Api, text_of
from imagestore.errors import Cancelled, ConfigurationError, Unavailable, Unsupported

__all__ = ["Attachment", "Brick", "Chunks", "Readers"]

_CHUNK: Final = 1024 * 1024
_FILE_SYSTEMS: Final = frozenset({"NFS", "GLUSTERFS", "SCALITY", "VZSTORAGE", "QUOBYTE"})
_privileged = threading.Lock()


class Brick:
    """os-brick, set up for this host.

    Args:
        minimal: tell Cinder no more of this host than its name and address; needs no privilege.
        root_helper: the command by which os-brick becomes root where it must.
        my_ip: this host's address on the storage network; None: what its name stands for.
        mount_base: directory below which shares are mounted.
    """

    def __init__(
        self,
        *,
        minimal: bool,
        root_helper: str,
        my_ip: str | None,
        multipath: bool,
        enforce_multipath: bool,
        mount_base: str,
        encrypted: bool,
    ) -> None:
        self._connectors = require("os_brick.initiator.connector", extra="cinder")
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
        privileges = require("oslo_privsep.priv_context", extra="cinder")
        with _privileged:
            privileges.init(root_helper=shlex.split(self._root_helper))
        found: Mapping[str, Any] = self._connectors.get_connector_properties(
            self._root_helper, self._address(), self._multipath, self._enforce_multipath
        )
        return found

    def connector(self, info: Mapping[str, Any]) -> Any:
        """os-brick's connector for what Cinder says of an attachment."""
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


class Device(Protocol):
    """The bytes of a connected volume."""

    def read(self, offset: int, length: int) -> bytes:
        """Up to so many bytes; none only at the end of the device."""

    def write(self, offset: int, data: bytes) -> None: ...

    def flush(self) -> None:
        """What was written has reached the backend."""

    def areas(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Areas that may hold other than zeros, ascending."""

    def close(self) -> None: ...


class FileDevice:
    """A path. It is never truncated: the volume may be a file that others have set up."""

    def __init__(self, path: str, *, writable: bool) -> None:
        self._file = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        self._writable = writable

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._file, rest, offset)
            rest, offset = rest[written:], offset + written

    def flush(self) -> None:
        if self._writable:
            os.fsync(self._file)

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

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            self._handle.seek(offset)
            return bytes(self._handle.read(length))

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            self._handle.seek(offset)
            self._handle.write(data)

    def flush(self) -> None:
        with self._lock:
            self._handle.flush()

    def areas(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        image = getattr(self._handle, "rbd_image", None)
        if image is None:
            return iter([(start, stop)])
        found: list[tuple[int, int]] = []

        def note(offset: int, length: int, exists: bool) -> None:
            if exists:
                found.append((offset, offset + length))

        with self._lock:
            image.diff_iterate(start, stop - start, None, note)
        return iter(sorted(found))

    def close(self) -> None:
        """Left to os-brick, which closes what it opened."""


class Attachment:
    """A volume on this host, from `open` to `close`.

    Attributes:
        device: its bytes.
    """

    device: Device

    def __init__(self, api: Api, brick: Brick, volume_id: str, *, writable: bool) -> None:
        self._api = api
        self._brick = brick
        self._volume_id = volume_id
        self._writable = writable
        self._undo: list[Callable[[], object]] = []
        self._flushed = False

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
        attachment_id = self._api.reserve(self._volume_id, "rw" if self._writable else "ro")
        self._undo.append(lambda: self._api.detach(attachment_id))
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

    def _require_plain(self, info: Mapping[str, Any]) -> None:
        if info.get("encrypted") and not self._brick.encrypted:
            raise Unsupported(
                "the volume is encrypted, and its bytes can't be used here: use a volume type without encryption, or "
                "set the option encrypted if this host decrypts by itself"
            )
        if info.get("format") not in (None, "raw"):
            raise Unsupported(f"the volume is a file of the format {info['format']}: the share must hold raw files")

    def grown(self) -> None:
        """The volume was extended while it is attached: let this host see it."""
        # Where a device would have to be read anew; librbd and files show their length at once.
        with contextlib.suppress(NotImplementedError):
            self._connector.extend_volume(self._info)

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
        self.attachment: Attachment | None = None


class Readers:
    """Attachments for reading: one for each volume, kept for as long as somebody reads it."""

    def __init__(self, api: Api, brick: Brick) -> None:
        self._api = api
        self._brick = brick
        self._lock = threading.RLock()
        self._held: dict[str, _Held] = {}
        self._stuck: list[Attachment] = []

    def open(self, volume_id: str, start: int, stop: int) -> Chunks:
        """The bytes of a volume from ``start`` up to ``stop``."""
        held = self._take(volume_id)
        return Chunks(held, start, stop, lambda good: self._give(volume_id, held, good=good))

    @contextlib.contextmanager
    def device(self, volume_id: str) -> Iterator[Device]:
        held = self._take(volume_id)
        try:
            assert held.attachment is not None
            yield held.attachment.device
        finally:
            self._give(volume_id, held, good=True)

    def close(self) -> None:
        """Try once more to detach what could not be."""
        with self._lock:
            stuck, self._stuck = self._stuck, []
        for attachment in stuck:
            attachment.close()

    def _take(self, volume_id: str) -> _Held:
        with self._lock:
            held = self._held.setdefault(volume_id, _Held())
            held.users += 1
        try:
            with held.lock:
                if held.attachment is None:
                    attachment = Attachment(self._api, self._brick, volume_id, writable=False)
                    attachment.open()
                    held.attachment = attachment
        except BaseException:
            self._give(volume_id, held, good=True)
            raise
        return held

    def _give(self, volume_id: str, held: _Held, *, good: bool) -> None:
        # Who comes for the volume while it is being detached waits for the lock, and attaches it anew.
        with held.lock:
            with self._lock:
                held.users -= 1
                last = held.users == 0
                if not good:
                    # The next reader shall not get a device that has failed, also while others still hold it.
                    self._forget(volume_id, held)
            try:
                if last and held.attachment is not None:
                    attachment, held.attachment = held.attachment, None
                    self._detach(attachment)
            finally:
                with self._lock:
                    if held.users == 0:
                        self._forget(volume_id, held)

    def _detach(self, attachment: Attachment) -> None:
        try:
            attachment.close()
        except BaseException:
            with self._lock:
                self._stuck.append(attachment)
            raise

    def _forget(self, volume_id: str, held: _Held) -> None:
        if self._held.get(volume_id) is held:
            del self._held[volume_id]


class Chunks:
    """Pieces of a volume, in order. The attachment is given back at the end, on an error, and when it is dropped."""

    def __init__(self, held: _Held, start: int, stop: int, give: Callable[[bool], None]) -> None:
        assert held.attachment is not None
        self._device = held.attachment.device
        self._at = start
        self._stop = stop
        self._give = give
        self._lock = threading.Lock()
        self._closed = False

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> bytes:
        # Nobody closes the device under a read that runs.
        with self._lock:
            if self._closed:
                raise Cancelled("the read was closed")
            if self._at >= self._stop:
                self._end(good=True)
                raise StopIteration
            try:
                data = self._device.read(self._at, min(_CHUNK, self._stop - self._at))
                if not data:
                    raise Unavailable(f"the volume's device ends at byte {self._at}")
            except BaseException as error:
                try:
                    self._end(good=False)
                except Exception as second:  # noqa: BLE001 - the first error matters more
                    error.add_note(f"the volume could not be detached: {text_of(second)}")
                raise
            self._at += len(data)
            return data

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._end(good=True)

    def _end(self, *, good: bool) -> None:
        self._closed = True
        self._give(good)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
