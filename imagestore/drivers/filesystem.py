"""Images as files in directories of this host (Linux): local file systems, NFS and other network mounts.

An image is a regular file ``<datadir>/<image id>``; its location is ``file://<datadir>/<image id>``.

**An upload** is a file without a name (``O_TMPFILE``, see open(2)) that vanishes by itself if the process dies, or
where that can't be had a hidden file ``.imagestore-<token>.part``, locked with flock(2) while its uploader lives.
``commit`` syncs the file, links it to its name, which fails if the name is taken, and syncs the directory.

**Several directories** are one store: an id exists in at most one of them. Who commits holds a lock on
``.imagestore-lock`` in the directory of the highest priority (the first of several such) while it looks into all of
them, so that processes that share them must name them in the same order. Names that begin with a dot are never images.

**Locations** are confined twice. ``parse`` refuses by the text what is not below a configured directory; every use
then walks from that directory's own descriptor, one component at a time and through no symbolic link, and takes
nothing but regular files.

Kernel I/O on a hung mount can't be timed out: calls wait until the mount answers or is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat as stat_module
import threading
import uuid
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
    Usage,
)
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    InUse,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    StoreError,
    StoreFull,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["FilesystemDriver"]

_CHUNK: Final = 192 * 1024
_SPARSE_UNIT: Final = 4096
_DEFAULT_MODE: Final = 0o640
_NAME_MAX: Final = 255
_PATH_MAX: Final = 4096

_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_PART: Final = re.compile(r"\.imagestore-([0-9a-f]{32})\.part")
_LOCK: Final = ".imagestore-lock"
_XATTR_UPLOAD: Final = "user.imagestore.token"
_XATTR_ID: Final = "user.imagestore.id"

_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_IMAGE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_XATTR: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.ENOTSUP})
_UNSUPPORTED: Final = frozenset(
    {
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EPERM,
        errno.EACCES,
        errno.ENOENT,
        errno.EISDIR,
        errno.EXDEV,
        errno.EMLINK,
        errno.ENOLCK,
        errno.EBADF,
        errno.ENOSPC,
        errno.EDQUOT,
    }
)
_MISCONFIGURED: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS}
)

_MEANING: Final[dict[int, type[StoreError]]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.ENOSPC: StoreFull,
    errno.EDQUOT: StoreFull,
    errno.EFBIG: StoreFull,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EROFS: PermissionDenied,
    errno.EBUSY: InUse,
    errno.ETXTBSY: InUse,
    errno.ELOOP: InvalidLocation,
    errno.ENOTDIR: InvalidLocation,
    errno.EISDIR: InvalidLocation,
    errno.ENXIO: InvalidLocation,
    errno.ENODEV: InvalidLocation,
    errno.ENAMETOOLONG: InvalidLocation,
    errno.EIO: Unavailable,
    errno.ESTALE: Unavailable,
    errno.EREMOTEIO: Unavailable,
    errno.ETIMEDOUT: Unavailable,
    errno.EHOSTDOWN: Unavailable,
    errno.EHOSTUNREACH: Unavailable,
    errno.ENETDOWN: Unavailable,
    errno.ENETUNREACH: Unavailable,
    errno.ECONNREFUSED: Unavailable,
    errno.ECONNRESET: Unavailable,
    errno.ECONNABORTED: Unavailable,
    errno.ENOTCONN: Unavailable,
    errno.ESHUTDOWN: Unavailable,
    errno.EAGAIN: Unavailable,
    errno.EINTR: Unavailable,
    errno.ENOLCK: Unavailable,
    errno.ENOMEM: Unavailable,
    errno.EMFILE: Unavailable,
    errno.ENFILE: Unavailable,
}


class FilesystemDriver(Driver):
    """Images as files in one directory or several. See the module for how."""

    name = "file"
    schemes = ("file", "filesystem")
    options = (
        cfg.StrOpt(
            "datadir",
            help="Directory that holds the images: an absolute path. Set this or datadirs, not both.",
        ),
        cfg.MultiStrOpt(
            "datadirs",
            default=[],
            help=(
                "Directory that holds images, with a priority: 'path:priority'. May be given several times. A new "
                "image goes to the directory of the largest priority that has room for it; among equal priorities to "
                "the one with the most free space. Without a priority it is 0; a path with a colon in it needs one. "
                "Set this or datadir, not both."
            ),
        ),
        cfg.StrOpt(
            "file_mode",
            default="0640",
            help=(
                "Access mode of image files, in octal. It is set exactly so, whatever the umask of the process, "
                "before an image becomes visible. The owner must have at least read access, and every right that "
                "group or others have. 0 stands for the default."
            ),
        ),
        cfg.BoolOpt(
            "fsync",
            default=True,
            help=(
                "Write an image and its directory to stable storage before an add or a delete counts as done. "
                "Without it a power failure may lose images, or leave damaged ones, that were reported as stored."
            ),
        ),
        cfg.BoolOpt(
            "sparse",
            default=True,
            help=(
                "Leave runs of zeros in an image out of its file (holes), so that they take neither time nor space. "
                "Turn it off to have all space taken when an image is added; an image of known size that no "
                "directory has room for is then refused at once."
            ),
        ),
        cfg.StrOpt(
            "staging",
            default="auto",
            choices=[
                ("auto", "unnamed files where the file system has them (O_TMPFILE), else hidden files"),
                ("named", "hidden files .imagestore-<token>.part, which other processes can list"),
            ],
            help="What holds an image until it is complete. Both are in the directory that the image goes to.",
        ),
        cfg.ListOpt(
            "accept_locations",
            default=[],
            help=(
                "Further directories (absolute paths, comma-separated) whose images may be read and deleted by "
                "location, such as former data directories. They are never listed, and nothing is ever added there."
            ),
        ),
        cfg.BoolOpt(
            "create_datadir",
            default=True,
            help=(
                "Create missing data directories (with mode 0750) when the store is opened. Turn it off where they "
                "are mount points, so that a missing mount is an error."
            ),
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        self._directories = self._read_directories()
        self._own = {directory.path: directory for directory in self._directories}
        accepted = [self._check_path("accept_locations", path) for path in settings.accept_locations or ()]
        # The longest first, so that a directory inside another one is found before it.
        self._roots = sorted({*self._own, *accepted}, key=len, reverse=True)
        self._mode = self._read_mode(settings.file_mode)
        self._fsync: bool = settings.fsync
        self._sparse: bool = settings.sparse
        self._claims = False
        self._probing = threading.Lock()

    def _check_path(self, option: str, path: str) -> str:
        """``path`` without superfluous slashes."""
        parts = path.split("/")
        if parts[0] or ".." in parts:
            raise self.invalid_option(option, f"{path!r} is not an absolute path without '..'")
        if _UNPRINTABLE.search(path) or not _encodable(path):
            raise self.invalid_option(option, f"{path!r} has characters that a location can't have")
        names = [part for part in parts if part not in ("", ".")]
        if not names:
            raise self.invalid_option(option, "the root directory can't be a store")
        return "/" + "/".join(names)

    def _read_directories(self) -> list[_Directory]:
        """The data directories, the one of the highest priority first."""
        single: str | None = self.settings.datadir
        several: list[str] = [entry for entry in self.settings.datadirs or () if entry]
        if single and several:
            raise self.invalid_option("datadirs", "can't be set together with datadir")
        if single:
            return [_Directory("datadir", self._check_path("datadir", single), 0)]
        if not several:
            raise self.invalid_option("datadir", "not set, and neither is datadirs: one of them must name a directory")
        directories: dict[str, _Directory] = {}
        for entry in several:
            text, colon, priority = entry.rpartition(":")
            if not colon:
                text, priority = entry, "0"
            if not re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", priority):
                raise self.invalid_option(
                    "datadirs", f"the priority in {entry!r} is not an integer (use 'path:priority')"
                )
            path = self._check_path("datadirs", text.strip())
            if path in directories:
                raise self.invalid_option("datadirs", f"{path} is given twice")
            directories[path] = _Directory("datadirs", path, int(priority))
        return sorted(directories.values(), key=lambda directory: -directory.priority)

    def _read_mode(self, text: str | None) -> int:
        if not text:
            return _DEFAULT_MODE
        if not re.fullmatch(r"0*[0-7]{1,3}", text):
            raise self.invalid_option("file_mode", f"{text!r} is not an octal mode such as 0640")
        mode = int(text, 8) or _DEFAULT_MODE
        owner = mode >> 6
        if not owner & 4 or (mode >> 3 | mode) & 7 & ~owner:
            raise self.invalid_option(
                "file_mode", f"{text!r} gives the owner no read access, or less than group or others"
            )
        return mode

    def open(self) -> None:
        """Open the data directories, making missing ones, and find out what their file systems can do.

        Raises:
            ConfigurationError: a directory is missing or not writable; the message names it and its option.
        """
        try:
            for directory in self._directories:
                self._open_directory(directory)
        except BaseException:
            self.close()
            raise
        several = len(self._directories) > 1
        links = all(directory.links for directory in self._directories)
        self._claims = several or not links
        self.capabilities = Capabilities(
            ranged_reads=True,
            parallel_writes=self.limits.workers,
            sparse_unit=_SPARSE_UNIT if self._sparse else None,
            repeatable_create=True,
            collision="exclusive" if links and (self._directories[0].locks or not several) else "detected",
            commit_proof=all(directory.xattrs for directory in self._directories),
        )

    def _open_directory(self, directory: _Directory) -> None:
        try:
            if self.settings.create_datadir:
                _make_directories(directory.path)
            directory.fd = os.open(directory.path, _OPEN_DIRECTORY)
            self._probe(directory)
        except OSError as error:
            if error.errno not in _MISCONFIGURED:
                raise
            raise ConfigurationError(
                f"option {directory.option}: images can't be created in {directory.path}: {error.strerror}",
                store=self.store or None,
                driver=self.name,
            ) from error
        status = os.fstat(directory.fd)
        for other in self._directories:
            if other is not directory and other.fd >= 0 and os.path.samestat(os.fstat(other.fd), status):
                raise self.invalid_option(directory.option, f"{other.path} and {directory.path} are the same directory")

    def _probe(self, directory: _Directory) -> None:
        with self._probing:
            if not directory.probed:
                directory.probe(unnamed=self.settings.staging == "auto", mode=self._mode)

    def close(self) -> None:
        """Let go of the data directories. Open reads go on."""
        for directory in self._directories:
            directory.close()

    def parse(self, uri: str, /) -> Location:
        """Check a ``file://`` or ``filesystem://`` location, as text only.

        All after ``://`` is the path as it is: nothing is decoded, and ``?`` and ``#`` have no meaning in a data
        directory's own path; below it they are refused, because others take them for a query or a fragment. Schemes
        are case-insensitive (RFC 3986, 3.1), and ``localhost`` is the one host that may be named (RFC 8089, 2).

        Raises:
            InvalidLocation: another scheme or host, control characters, an empty, ``.``, ``..`` or hidden component,
                or not below a data directory or one of ``accept_locations``.
        """
        root, parts = self._split(uri)
        return _location(root, parts)

    def _split(self, uri: str) -> tuple[str, list[str]]:
        """The configured directory that a location lies in, and the components from there on."""
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme.lower() not in self.schemes:
            raise InvalidLocation("not a file:// location")
        host, slash, tail = rest.partition("/")
        if not slash or host.lower() not in ("", "localhost"):
            raise InvalidLocation("a file location has an absolute path and no host: file:///directory/name")
        path = "/" + tail
        if _UNPRINTABLE.search(path) or not _encodable(path) or len(os.fsencode(path)) >= _PATH_MAX:
            raise InvalidLocation("the path is too long or has characters that a location can't have")
        for root in self._roots:
            if path.startswith(root + "/"):
                parts = path[len(root) + 1 :].split("/")
                break
        else:
            raise InvalidLocation("the path is not below a directory that this store is configured for")
        for part in parts:
            if not part or part.startswith(".") or "?" in part or "#" in part:
                raise InvalidLocation("the path has a component that is empty or hidden, or has a '?' or '#' in it")
            if len(os.fsencode(part)) > _NAME_MAX:
                raise InvalidLocation("the path has a component that is too long")
        return root, parts

    @contextlib.contextmanager
    def _parent(self, location: Location) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that an image is in, reached through no symbolic link, and its name there."""
        # The text decides, whoever made the location: it is checked again, and nothing else of it is used.
        root, parts = self._split(location.uri)
        own = self._own.get(root)
        if own is not None and len(parts) == 1:
            yield own.fd, parts[0]
            return
        directory = _File(os.open(root, _OPEN_DIRECTORY) if own is None else os.dup(own.fd))
        try:
            for part in parts[:-1]:
                below = _File(os.open(part, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory.fd))
                directory.close()
                directory = below
            yield directory.fd, parts[-1]
        except NotADirectoryError as error:
            raise InvalidLocation("a component of the path is a symbolic link or not a directory") from error
        finally:
            directory.close()

    def _open_image(self, location: Location) -> tuple[_File, os.stat_result]:
        with self._parent(location) as (directory, name):
            # Opening a device may already do something, so its kind is looked at before, and again after.
            _require_regular(os.stat(name, dir_fd=directory, follow_symlinks=False))
            file = _File(os.open(name, _OPEN_IMAGE, dir_fd=directory))
        status = os.fstat(file.fd)
        _require_regular(status)
        return file, status

    def locate(self, image_id: str, /) -> Location | None:
        """The location of the image of that id in the data directories, or None."""
        for directory in self._directories:
            status = directory.stat(image_id)
            if status is not None and stat_module.S_ISREG(status.st_mode):
                return _location(directory.path, [image_id])
        return None

    def stat(self, location: Location, /) -> Stat:
        """Size and time of the file. The version is made of modification time, inode, size and token.

        Raises:
            NotFound: there is no such file.
            InvalidLocation: it is a symbolic link, or below one, or not a regular file.
        """
        file, status = self._open_image(location)
        try:
            return _describe(file.fd, status)
        finally:
            file.close()

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Open the file and read it from ``start`` to ``stop`` (bytes).

        Raises:
            NotFound: there is no such file.
            Changed: it is not of ``version``, is shorter than the range, or (while reading) was written to.
            InvalidLocation: it is a symbolic link, or below one, or not a regular file.
        """
        file, status = self._open_image(location)
        end = status.st_size if stop is None else stop
        try:
            described = _describe(file.fd, status)
            _require_version(described.version, version)
            if not 0 <= start <= end <= status.st_size:
                raise Changed(f"the file has {status.st_size} bytes, which is less than the range asked for")
            if end > start:
                os.posix_fadvise(file.fd, start, end - start, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            file.close()
            raise
        chunks = _Chunks(file, start, end, _state(status))
        return Reading(stat=described, chunks=chunks, close=chunks.close)

    def extents(self, location: Location, start: int, stop: int, version: str | None, /) -> Iterator[tuple[int, int]]:
        """Areas of the file that are not holes, found with ``SEEK_DATA`` and ``SEEK_HOLE`` (lseek(2)) as asked for.

        One area where the file system does not tell. Raises as ``read`` does.
        """
        file, status = self._open_image(location)
        try:
            _require_version(_describe(file.fd, status).version, version)
        except Changed:
            file.close()
            raise
        return self._extents(file, _state(status), start, min(stop, status.st_size))

    def _extents(self, file: _File, version: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        try:
            while start < stop:
                try:
                    data = os.lseek(file.fd, start, os.SEEK_DATA)
                    hole = min(stop, os.lseek(file.fd, data, os.SEEK_HOLE))
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        break
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
                    data, hole = start, stop
                if data < hole:
                    yield data, hole
                start = max(data, hole)
            _require_version(_state(os.fstat(file.fd)), version)
        finally:
            file.close()

    def delete(self, location: Location, /) -> None:
        """Unlink the file. Who reads it can read on.

        Raises:
            NotFound: there is no such file.
            InvalidLocation: it is a symbolic link, or below one, or not a regular file.
        """
        with self._parent(location) as (directory, name):
            _require_regular(os.stat(name, dir_fd=directory, follow_symlinks=False))
            os.unlink(name, dir_fd=directory)
            if self._fsync:
                _sync_directory(directory)

    def list(self) -> Iterator[StoredImage]:
        """Regular files of the data directories whose names are image ids."""
        for directory in self._directories:
            for name, status in directory.scan(IMAGE_ID):
                yield StoredImage(
                    image_id=name,
                    location=_location(directory.path, [name]),
                    size=status.st_size,
                    modified=_time(status.st_mtime),
                )

    def usage(self) -> Usage:
        """Room in the file systems of the data directories; `free` is what an unprivileged process may use."""
        systems = {os.fstat(directory.fd).st_dev: os.fstatvfs(directory.fd) for directory in self._directories}
        return Usage(
            total=sum(system.f_blocks * system.f_frsize for system in systems.values()),
            used=sum((system.f_blocks - system.f_bfree) * system.f_frsize for system in systems.values()),
            free=sum(system.f_bavail * system.f_frsize for system in systems.values()),
        )

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        """Begin an upload in the data directory that fits best.

        Raises:
            StoreFull: the size is known, holes are not wanted, and no directory has room for it.
        """
        directory = self._choose(hints)
        self._probe(directory)
        return _Upload(directory, self, image_id, hints.token)

    def _choose(self, hints: Hints) -> _Directory:
        free = {directory.path: directory.free() for directory in self._directories}
        needed = hints.block_size if hints.size is None else hints.size
        roomy = [directory for directory in self._directories if free[directory.path] >= needed]
        if roomy:
            return max(roomy, key=lambda directory: (directory.priority, free[directory.path]))
        if hints.size is not None and not self._sparse:
            raise StoreFull(f"no data directory has {hints.size} bytes free; the most is {max(free.values())}")
        # With holes the image may take less than its size, so that only the writing can tell.
        return max(self._directories, key=lambda directory: free[directory.path])

    @contextlib.contextmanager
    def _claim(self) -> Iterator[None]:
        """Nobody else commits to this store meanwhile, where one link alone can't decide who wins."""
        first = self._directories[0]
        if not self._claims or not first.locks:
            yield
            return
        # A descriptor of its own each time: flock belongs to the open file, so that it also keeps threads apart.
        lock = first.open_lock()
        try:
            fcntl.flock(lock.fd, fcntl.LOCK_EX)
            yield
        finally:
            lock.close()

    def uploads(self) -> Iterator[Leftover]:
        """The hidden files of uploads that run or were cut off. Those without a name leave nothing and aren't shown."""
        for directory in self._directories:
            for name, _ in directory.scan(_PART):
                leftover = directory.leftover(name)
                if leftover is not None:
                    yield leftover

    def discard(self, leftover: Leftover, /) -> None:
        """Unlink the hidden file of an upload. If the upload still runs, its commit will fail.

        Raises:
            InvalidRequest: ``leftover`` is not from this store.
        """
        directory = self._own.get(leftover.key[0]) if leftover.key else None
        if directory is None or not _TOKEN.fullmatch(leftover.token):
            raise InvalidRequest("not an upload of this store")
        name = _part_name(leftover.token)
        status = directory.stat(name)
        if status is None:
            return
        if not stat_module.S_ISREG(status.st_mode):
            raise InvalidRequest(f"{name} in {directory.path} is not a file")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory.fd)

    def translate(self, error: Exception, /) -> StoreError | None:
        """What an `OSError` means, by its number; a read-only file system is `PermissionDenied`. None for others."""
        if not isinstance(error, OSError):
            return None
        text = error.strerror or str(error) or type(error).__name__
        return _MEANING.get(error.errno or 0, StoreError)(text)


class _File:
    """A descriptor that is closed once: at the latest when nobody holds it any more."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            # What can still fail here was looked at before (see `_Upload._complete`), or does not matter any more.
            with contextlib.suppress(OSError):
                os.close(fd)

    __del__ = close


class _Directory:
    """A data directory: its descriptor while the driver is open, and what its file system can do."""

    def __init__(self, option: str, path: str, priority: int) -> None:
        self.option = option
        self.path = path
        self.priority = priority
        self.fd = -1
        self.probed = False
        self.unnamed = False
        self.links = False
        self.locks = False
        self.xattrs = False

    def close(self) -> None:
        self.probed = False
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def probe(self, *, unnamed: bool, mode: int) -> None:
        """Find out what works, with files that look like an upload's: should they stay behind, they are collected."""
        name, linked = (_part_name(uuid.uuid4().hex) for _ in range(2))
        try:
            file = self.create(name)
        except OSError as error:
            # A full disk must not keep anybody from reading and deleting. The next upload looks again.
            if error.errno in _NO_ROOM:
                return
            raise
        try:
            self.locks = _works(fcntl.flock, file.fd, fcntl.LOCK_EX)
            self.xattrs = _works(os.setxattr, file.fd, _XATTR_UPLOAD, b"0" * 32)
            try:
                os.fchmod(file.fd, mode)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} (setting the mode of option file_mode)") from error
            self.links = _works(self.link, file, linked)
            self.unnamed = False
            if self.links and unnamed:
                os.unlink(linked, dir_fd=self.fd)
                self.unnamed = _works(self._link_unnamed, linked)
            self.probed = True
        finally:
            file.close()
            for leftover in (name, linked):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leftover, dir_fd=self.fd)

    def _link_unnamed(self, name: str) -> None:
        file = self.create(None)
        try:
            self.link(file, name)
        finally:
            file.close()

    def create(self, name: str | None) -> _File:
        """A new file that only its owner may open, without a name if ``name`` is None."""
        if name is None:
            return _File(os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.fd))
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        return _File(os.open(name, flags, 0o600, dir_fd=self.fd))

    def link(self, file: _File, name: str) -> None:
        """Give an open file a name, unless that is taken: by its descriptor, so that it can be no other file."""
        # Python passes AT_SYMLINK_FOLLOW, which linkat(2) needs here, only when there is a directory descriptor.
        os.link(f"/proc/self/fd/{file.fd}", name, dst_dir_fd=self.fd, follow_symlinks=True)

    def stat(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def holds(self, file: _File, name: str) -> bool:
        """Whether ``name`` is that very file."""
        status = self.stat(name)
        return status is not None and os.path.samestat(status, os.fstat(file.fd))

    def scan(self, pattern: re.Pattern[str]) -> Iterator[tuple[str, os.stat_result]]:
        """The regular files whose names match."""
        # A descriptor of its own: copies of one share their position, and scans may run at the same time.
        own = _File(os.open(".", _OPEN_DIRECTORY, dir_fd=self.fd))
        try:
            with os.scandir(own.fd) as entries:
                for entry in entries:
                    if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = self.stat(entry.name)
                        if status is not None and stat_module.S_ISREG(status.st_mode):
                            yield entry.name, status
        finally:
            own.close()

    def leftover(self, name: str) -> Leftover | None:
        """What a hidden file tells of its upload; None if it is gone."""
        image_id = alive = None
        try:
            file = _File(os.open(name, _OPEN_IMAGE, dir_fd=self.fd))
        except FileNotFoundError:
            return None
        except PermissionError:
            status = self.stat(name)
            if status is None:
                return None
        else:
            try:
                status = os.fstat(file.fd)
                image_id = _xattr(file.fd, _XATTR_ID, IMAGE_ID)
                alive = _locked(file.fd)
            finally:
                file.close()
        return Leftover(
            token=name[len(".imagestore-") : -len(".part")],
            image_id=image_id,
            bytes=status.st_blocks * 512,
            # Nobody reads such a file, so that its access time is when it was made.
            started=_time(min(status.st_atime, status.st_mtime)),
            last_activity=_time(status.st_mtime),
            alive=alive,
            key=(self.path, name),
        )

    def open_lock(self) -> _File:
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return _File(os.open(_LOCK, os.O_RDWR | os.O_CREAT | flags, 0o644, dir_fd=self.fd))
        except PermissionError:
            # Another user made it. To lock it, reading is enough (but not on NFS, where that fails).
            return _File(os.open(_LOCK, os.O_RDONLY | flags, dir_fd=self.fd))

    def free(self) -> int:
        system = os.fstatvfs(self.fd)
        return system.f_bavail * system.f_frsize


class _Upload(Upload):
    """An image on its way into a directory."""

    def __init__(self, directory: _Directory, driver: FilesystemDriver, image_id: str, token: str) -> None:
        self.location = _location(directory.path, [image_id])
        self._directory = directory
        self._driver = driver
        self._image_id = image_id
        self._part = _part_name(token)
        self._named = not directory.unnamed
        self._committed = False
        self._lost: OSError | None = None
        # Keeps an abort from closing the file while a commit works on it.
        self._finishing = threading.Lock()
        self._file = self._create()
        try:
            if self._named and directory.locks:
                fcntl.flock(self._file.fd, fcntl.LOCK_EX)
            if directory.xattrs:
                os.setxattr(self._file.fd, _XATTR_UPLOAD, token.encode())
                # For `uploads`, which can't see the others; a second attribute may cost a block of its own.
                if self._named:
                    os.setxattr(self._file.fd, _XATTR_ID, image_id.encode())
        except BaseException:
            self.abort()
            raise

    def _create(self) -> _File:
        if not self._named:
            return self._directory.create(None)
        try:
            return self._directory.create(self._part)
        except FileExistsError:
            # An earlier attempt of this very create, which failed: nobody else has this token.
            os.unlink(self._part, dir_fd=self._directory.fd)
            return self._directory.create(self._part)

    def write(self, block: Block, /) -> None:
        """Write a block at its place in the file; any number at once, again, and in any order."""
        written = os.pwrite(self._file.fd, block.data, block.offset)
        while written < len(block.data):
            written += os.pwrite(self._file.fd, memoryview(block.data)[written:], block.offset + written)
        if self._driver._fsync:
            # Begins to write it back now, so that the fsync finds little left to wait for. Pages that are being
            # written stay in the page cache.
            os.posix_fadvise(self._file.fd, block.offset, len(block.data), os.POSIX_FADV_DONTNEED)

    def commit(self, size: int, /) -> None:
        """Bring the file to ``size`` bytes and to stable storage, and give it its name.

        Raises:
            AlreadyExists: the name is taken, here or in another data directory.
            NotFound: the upload was discarded, or aborted.
        """
        with self._finishing:
            if self._committed:
                return
            if self._file.fd < 0:
                raise NotFound("the upload was aborted")
            self._complete(size)
            with self._driver._claim():
                self._publish()
            self._sync_name()
            self._committed = True
            # The image stands. A hidden name that can't be removed is a leftover like any other.
            with contextlib.suppress(OSError):
                self._unlink_part()
            self._file.close()

    def _complete(self, size: int) -> None:
        fd = self._file.fd
        if self._lost is not None:
            # The kernel reports a lost write once: a second fsync would succeed, and the data be gone.
            raise self._failed(self._lost) from self._lost
        os.ftruncate(fd, size)
        os.fchmod(fd, self._driver._mode)
        try:
            if self._driver._fsync:
                os.fsync(fd)
            else:
                # On network file systems each close reports writes that failed later.
                os.close(os.dup(fd))
        except OSError as error:
            self._lost = error
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StoreError:
        kind = _MEANING.get(error.errno or 0, StoreError)
        return kind(f"the image could not be written to stable storage: {error.strerror}", temporary=False)

    def _publish(self) -> None:
        directory, name = self._directory, self._image_id
        for other in self._driver._directories:
            if other is not directory and other.stat(name) is not None:
                raise AlreadyExists(f"the image is in {other.path} already")
        if directory.holds(self._file, name):
            return  # by an earlier attempt whose answer was lost
        # Looked at also where it is linked by descriptor: NFS keeps a removed file that is open linkable.
        if self._named and not directory.holds(self._file, self._part):
            raise NotFound("the upload was discarded before its commit")
        try:
            if directory.links:
                directory.link(self._file, name)
            elif directory.stat(name) is None:
                os.rename(self._part, name, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
            else:
                raise AlreadyExists("there is an image of that id already")
        except FileExistsError as error:
            # A network file system may have done it, lost the answer, and sent it again.
            if not directory.holds(self._file, name):
                raise AlreadyExists("there is an image of that id already") from error
        except FileNotFoundError as error:
            raise NotFound("the upload was discarded before its commit") from error

    def _sync_name(self) -> None:
        if not self._driver._fsync:
            return
        try:
            _sync_directory(self._directory.fd)
        except OSError:
            with contextlib.suppress(OSError):
                self._take_back()
            raise

    def _take_back(self) -> None:
        """Undo `_publish`, in such a way that it can be tried again."""
        directory, name = self._directory, self._image_id
        if not directory.holds(self._file, name):
            return
        if directory.holds(self._file, self._part):
            os.unlink(name, dir_fd=directory.fd)
        else:
            # Without any name left it could never be linked again.
            os.rename(name, self._part, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
            self._named = True

    def abort(self) -> None:
        """Remove the hidden file, if it is still ours, and let go of it. What was committed stays."""
        with self._finishing:
            if self._file.fd >= 0:
                self._unlink_part()
                self._file.close()

    def _unlink_part(self) -> None:
        if self._named and self._directory.holds(self._file, self._part):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._part, dir_fd=self._directory.fd)


class _Chunks(Chunks):
    """The bytes of a file from ``position`` to ``stop``; an error if it ends before, or is written to meanwhile."""

    def __init__(self, file: _File, position: int, stop: int, version: str) -> None:
        super().__init__()
        self._file = file
        self._position = position
        self._stop = stop
        self._version = version

    def fetch(self) -> bytes:
        if self._position >= self._stop:
            return b""
        data = os.pread(self._file.fd, min(_CHUNK, self._stop - self._position), self._position)
        if not data:
            raise Changed("the file became shorter while it was read")
        self._position += len(data)
        if self._position == self._stop:
            # Before the last bytes are given away: who counts them need not ask for more.
            _require_version(_state(os.fstat(self._file.fd)), self._version)
        return data

    def release(self) -> None:
        self._file.close()


def _make_directories(path: str) -> None:
    """Make what is missing of ``path``, and keep it over a power failure."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directories(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o750)
    above = _File(os.open(parent, _OPEN_DIRECTORY))
    try:
        _sync_directory(above.fd)
    finally:
        above.close()


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems have no such thing for directories.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _works(function: Callable[..., object], *arguments: object) -> bool:
    """Whether a call is to be had here; a failure that says nothing of that is raised."""
    try:
        function(*arguments)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _part_name(token: str) -> str:
    return f".imagestore-{token}.part"


def _location(root: str, parts: list[str]) -> Location:
    name = parts[-1]
    return Location(
        uri=f"file://{root}/{'/'.join(parts)}", key=(root, *parts), image_id=name if IMAGE_ID.fullmatch(name) else None
    )


def _encodable(path: str) -> bool:
    try:
        path.encode()
        os.fsencode(path)
    except UnicodeError:
        return False
    return True


def _require_regular(status: os.stat_result) -> None:
    if stat_module.S_ISLNK(status.st_mode):
        raise InvalidLocation("the location is a symbolic link")
    if not stat_module.S_ISREG(status.st_mode):
        raise InvalidLocation("the location is not a regular file")


def _state(status: os.stat_result) -> str:
    # Not the change time: a new mode, owner or link does not change the bytes.
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"


def _require_version(found: str | None, version: str | None) -> None:
    if version is not None and found != version:
        raise Changed("the file was replaced or written to")


def _describe(fd: int, status: os.stat_result) -> Stat:
    token = _xattr(fd, _XATTR_UPLOAD, _TOKEN)
    return Stat(
        size=status.st_size,
        # Where times are coarse, a new file may have the inode, time and size of the one before.
        version=f"{_state(status)}-{token}" if token else _state(status),
        token=token,
        modified=_time(status.st_mtime),
    )


def _xattr(fd: int, name: str, pattern: re.Pattern[str]) -> str | None:
    """An attribute of ours; None if there is none, or not such a one as we write."""
    try:
        text = os.getxattr(fd, name).decode("ascii", "replace")
    except OSError as error:
        if error.errno in _NO_XATTR:
            return None
        raise
    return text if pattern.fullmatch(text) else None


def _locked(fd: int) -> bool | None:
    """Whether anybody holds an exclusive flock; None if that can't be told."""
    try:
        # Shared, so that two who look at the same time don't take each other for the uploader.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _time(seconds: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None
