"""The driver author's door: what a driver promises to the store, and the store to a driver.

A driver is synchronous, moves bytes, and does nothing else: no hashing, no retrying, no progress, no logging.
The store checks ids and arguments, cuts images into blocks, hashes, repeats what failed for a moment, decides
when an upload may become visible, and puts the context on every error. After ``open()`` a driver is called from
many threads at once.

**A driver** is a subclass of `Driver`. Every driver has ``open, close, parse, stat, read, translate``. One that
stores images also has ``locate, create, delete, uploads, discard``. The rest are *verbs*: a driver that has the
method supports it, and `Verbs` below says what each means. Limits and guarantees (*adverbs*) are in `Capabilities`;
no flag repeats what the presence of a method shows.

**What the store guarantees to a driver**

- ``open()`` returned once, in this process, before any other verb. After a fork the store makes a new driver.
- Image ids match `IMAGE_ID` and passed ``check_id``; locations come from this driver's ``parse``, ``locate``,
  ``create`` or ``list``, never from elsewhere; ranges lie within the image and are not empty.
- ``create`` is called after ``locate`` found nothing (so a taken id was refused early), but a rival may come first:
  ``commit`` decides.
- ``Upload.write`` gets logical blocks that are whole but the last; at most ``parallel_writes`` at a time, in order
  if that is 1. The same (index, offset) comes again only after a temporary error, and never while it is running.
- ``Upload.commit`` is called after every byte is written and every check passed, and again only if it failed in
  doubt. ``Upload.abort`` is called when no write runs, any number of times, after anything.

**What a driver guarantees to the store**

- Nothing is readable at the image's location, listed or located, before ``commit``.
- ``create`` writes a *mark* that holds ``hints.token`` before the first byte, so that ``uploads`` finds what a
  killed process left. Nothing is a leftover because something is missing: backends are shared with others. Only an
  upload that stores nothing before ``commit`` (an image of one block that one request makes visible) needs no mark.
- ``commit`` never replaces what stands under the id (as far as ``Capabilities.collision`` promises): it raises
  `AlreadyExists`. It fails with `NotFound` if the upload was discarded meanwhile.
- ``abort`` and ``discard`` touch only what carries that token.
- Every wait on a network has a time-out. Native errors may be raised as they are: ``translate`` maps them.
"""

from __future__ import annotations

import importlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, Self

from imagestore._http_headers import http_date, retry_after
from imagestore._models import (
    MIB,
    Leftover,
    Limits,
    Location,
    Stat,
    StoredImage,
    Timeouts,
    Usage,
)
from imagestore.errors import (
    Cancelled,
    InvalidLocation,
    InvalidOption,
    MissingDependency,
    StoreError,
    Unavailable,
    redact,
)

if TYPE_CHECKING:
    from oslo_config import cfg

__all__ = [
    "IMAGE_ID",
    "Block",
    "Capabilities",
    "Chunks",
    "Collision",
    "Driver",
    "Hints",
    "Leftover",
    "Limits",
    "Location",
    "Options",
    "PullReader",
    "PullUpload",
    "Reading",
    "Stat",
    "StoredImage",
    "Timeouts",
    "Upload",
    "Usage",
    "Verbs",
    "http_date",
    "require",
    "retry_after",
    "split_credentials",
]

IMAGE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""What an image id is, everywhere (use with ``fullmatch``). None starts with a dot: dot names are a driver's own."""

Collision = Literal["exclusive", "detected", "last-wins"]
"""Of two adders of one id: ``exclusive``: exactly one commits. ``detected``: a taken id is refused, but two that
commit in the same moment may both succeed. ``last-wins``: the later replaces the earlier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """Limits and guarantees of an opened driver; sizes in bytes.

    Attributes:
        ranged_reads: ``read`` honours start and stop. If False it is always called with 0 and None, and the store
            skips.
        parallel_writes: how many ``Upload.write`` may run at once; 1 also means in order.
        block_min, block_max: smallest block (but the last of an image) and largest.
        blocks_max: how many blocks an image may have.
        sparse_unit: if not None, areas that are never written read as zeros: the store skips runs of zeros and cuts
            blocks at multiples of this. None: every byte is written.
        needs_size: ``create`` needs ``hints.size``; an image of unknown size is refused.
        repeatable_writes: a failed ``write`` may be repeated.
        repeatable_create: a ``create`` that failed for a moment may be repeated with the same token: what the first
            attempt left is found again, or is as marked as any leftover.
        block_digest: algorithm of `Block.digest`, or None.
        collision: see `Collision`.
        atomic_commit: nobody can see a part of an image. False: others may, for a moment, around ``commit``.
        commit_proof: ``stat`` tells the token of the upload that made an image, so a commit in doubt can be decided.
        needs_auth: calls need ``bind(auth)`` first.
    """

    ranged_reads: bool = True
    parallel_writes: int = 1
    block_min: int = 1
    block_max: int | None = None
    blocks_max: int | None = None
    sparse_unit: int | None = None
    needs_size: bool = False
    repeatable_writes: bool = True
    repeatable_create: bool = False
    block_digest: str | None = None
    collision: Collision = "exclusive"
    atomic_commit: bool = True
    commit_proof: bool = False
    needs_auth: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Hints:
    """What ``create`` is told of the image to come.

    Attributes:
        token: fresh for every upload (32 lower-case hexadecimal digits); goes into the mark and, where the backend
            can keep it, stays with the image.
        size: length in bytes, or None if unknown.
        block_size: the length in bytes of the first block that will come, and of all but the last where
            ``Capabilities.blocks_max`` is None.
        metadata: to be kept with the image where the backend can. Keys and values are text.
    """

    token: str
    size: int | None = None
    block_size: int = 8 * MIB
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A piece of an image.

    Attributes:
        index: number of the logical block, without gaps also where blocks of zeros were skipped.
        offset: where `data` begins in the image, in bytes.
        data: the bytes, never empty.
        last: this is the last block of the image. With ``sparse_unit`` several pieces may share an index (or none
            come), so that `index` and `last` mean nothing there.
        digest: raw digest of `data` by ``Capabilities.block_digest``, or None.
    """

    index: int
    offset: int
    data: bytes
    last: bool = False
    digest: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """An open read: `stat` of what is read, `chunks` of bytes in order, and `close`, which may come at any time.

    After `close`, `chunks` raises; it never just ends before its end. `Chunks` sees to both.
    """

    stat: Stat
    chunks: Iterator[bytes]
    close: Callable[[], None]


class Chunks(ABC):
    """The chunks of a `Reading` and its ``close``, for a backend that is asked for one after the other.

    Subclasses implement `fetch` and `release`; their constructors call ``super().__init__()``. ``read`` ends with
    ``return Reading(stat=stat, chunks=chunks, close=chunks.close)``.

    `fetch` runs in one thread at a time, and never again after the end, an error or `close`. `release` is called
    exactly once, after whichever of them comes first, and never while `fetch` runs. What is asked for after the end
    ends again; after an error or `close` it raises `Cancelled`.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._closed = False
        self._ended = False
        self._released = False

    @abstractmethod
    def fetch(self) -> bytes:
        """The next bytes; ``b""`` at the end, and only there. Raises if the backend ends before."""

    @abstractmethod
    def release(self) -> None:
        """Give up what the read holds. If `fetch` has failed, an error here becomes a note to that one's."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        with self._turn:
            if self._ended:
                raise StopIteration
            if self._closed:
                self._let_go()
                raise Cancelled("the read was closed")
            try:
                data = self.fetch()
            except BaseException as error:
                self._closed = True
                self._let_go(error)
                raise
            if not data:
                self._ended = True
                self._let_go()
                raise StopIteration
        if self._closed:
            self._settle()  # type: ignore[unreachable]  # not if another thread has closed it meanwhile
        return data

    def close(self) -> None:
        """Give the read up: at once, or when the thread that is in `fetch` has come out, for which it doesn't wait.

        Where a `fetch` that waits can be woken from another thread, override it and do so after
        ``super().close()``.
        """
        self._closed = True
        self._settle()

    def _settle(self) -> None:
        # Whoever has the turn looks for a close that came meanwhile: inside, or when it has given the turn back.
        if self._turn.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._turn.release()

    def _let_go(self, cause: BaseException | None = None) -> None:
        if self._released:
            return
        self._released = True
        try:
            self.release()
        except Exception as error:
            if cause is None:
                raise
            cause.add_note(f"giving up the read failed too: {type(error).__name__}: {redact(str(error))}")


class Options:
    """The options of one store, read as attributes. Its repr shows no value, because some are secret."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(f"no option {name!r}") from None

    def __repr__(self) -> str:
        return f"Options({', '.join(sorted(self._values))})"


class Upload(ABC):
    """One image on its way in. ``location`` is known from ``create`` on.

    Attributes:
        digests: of the whole image, in hexadecimal by the algorithm's name, for a backend that keeps them with it. The
            core sets them just before ``commit``; which there are, the caller of ``Store.add`` decides.
    """

    location: Location
    digests: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def write(self, block: Block, /) -> None:
        """Store one block. Doing it again with the same (index, offset) gives the same result.

        An only block (``last`` and index 0) may be kept and sent inside ``commit``, where the backend makes an
        object visible with one request.
        """

    @abstractmethod
    def commit(self, size: int, /) -> None:
        """Make the image of ``size`` bytes visible, and durable as far as the backend is. Without any write before, it
        is empty or all zeros.

        Raises `AlreadyExists` if the id was taken meanwhile, `NotFound` if the upload was discarded. Repeated after
        a success whose answer was lost, it returns as if nothing had happened where the backend lets it know; that
        is required where ``Capabilities.commit_proof`` is False.
        """

    @abstractmethod
    def abort(self) -> None:
        """Take back all that carries this upload's token. Harmless when repeated.

        After a commit, also one whose answer was lost, it leaves the image alone and removes only what is left of
        marks.
        """


class Driver(ABC):
    """A backend. Subclasses set the class attributes; the constructor does no I/O and starts no thread.

    Attributes:
        api: version of this contract.
        name: the type name in ``enabled_backends``.
        schemes: URI schemes that ``parse`` accepts, lower case.
        options: oslo.config options; their short names are attributes of ``self.settings``.
        capabilities: set by ``open``, because they may depend on configuration and server.
    """

    api: ClassVar[int] = 1
    name: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[cfg.Opt, ...]] = ()

    capabilities: Capabilities

    def __init__(
        self,
        settings: Options,
        /,
        *,
        store: str = "",
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        """``store`` is the store's name; ``limits.workers`` sizes connection pools; ``timeouts`` bound every wait."""
        self.settings = settings
        self.store = store
        self.limits = limits or Limits()
        self.timeouts = timeouts or Timeouts()
        self.configure()

    def configure(self) -> None:  # noqa: B027 - not every driver has something to check
        """Check ``settings`` and take from them what the driver needs, without any I/O. Nothing to do by default.

        Raises `InvalidOption` (see `invalid_option`) for a value that an option can't have, and for options that don't
        go together.
        """

    def invalid_option(self, option: str, problem: str) -> InvalidOption:
        """The error to raise for an option; ``problem`` says what is wrong and what to do, without any secret."""
        return InvalidOption(f"option {option}: {problem}", store=self.store or None, driver=self.name)

    def clone(self) -> Driver:
        """Another driver of the same configuration, not opened: the store asks for one after a fork or a close."""
        return type(self)(self.settings, store=self.store, limits=self.limits, timeouts=self.timeouts)

    @abstractmethod
    def open(self) -> None:
        """Connect, check that the backend can be used, set ``capabilities``."""

    def close(self) -> None:  # noqa: B027 - not every driver has something to give up
        """Give up connections. Called once, after all calls have returned. Nothing to do by default."""

    @abstractmethod
    def parse(self, uri: str, /) -> Location:
        """Check and take apart a location, without any I/O (also before ``open``).

        ``uri`` holds no credentials. Raises `InvalidLocation` for anything outside what this store was configured
        for. Two texts for one image give the same canonical ``Location.uri``.
        """

    @abstractmethod
    def stat(self, location: Location, /) -> Stat:
        """What is stored there. Raises `NotFound`."""

    @abstractmethod
    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Open the bytes from ``start`` up to but not including ``stop`` (None: the end).

        Connects before it returns, so that `NotFound` comes from here. Raises `Changed` if the image is not of
        ``version`` any more. Chunks may be of any length but 0; a few hundred KiB are best. A piece that is gone in
        mid-read is a temporary error: opening anew then tells whether the image was deleted or replaced.
        """

    @abstractmethod
    def translate(self, error: Exception, /) -> StoreError | None:
        """The error of ours that a native error means (without context), or None if it means nothing known."""


class Verbs(Protocol):
    """The verbs that a driver may have. Present means supported; `Store.supports` looks."""

    def locate(self, image_id: str, /) -> Location | None:
        """The location of the image of that id, or None. Needed with ``create``.

        None also where an unfinished upload holds the id already; then ``create`` raises `AlreadyExists` and says so.
        """

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        """Begin an upload: writes the mark. Raises `AlreadyExists` if the backend already knows."""

    def delete(self, location: Location, /) -> None:
        """Remove an image. The visible name goes first, and what a cut leaves is a marked leftover.

        Raises `NotFound`, and `InUse` if clones, snapshots or attachments still need it.
        """

    def uploads(self) -> Iterator[Leftover]:
        """All that carries our mark and is no image: unfinished uploads and deletes, those that run included.

        What vanishes with its process (a file without a name) is no leftover and may be missing here.
        """

    def discard(self, leftover: Leftover, /) -> None:
        """Remove one of ``uploads()``. Gone already counts as done; a live upload of it must fail at its commit.

        Against a commit in the same moment one of the two wins wholly: they meet in a step that only one can take.
        """

    def list(self) -> Iterator[StoredImage]:
        """Every image in the store, in no particular order."""

    def usage(self) -> Usage:
        """Room in the backend."""

    def extents(self, location: Location, start: int, stop: int, version: str | None, /) -> Iterator[tuple[int, int]]:
        """Areas with data between ``start`` and ``stop`` as (start, stop), ascending; what lies between reads as zeros.

        Raises `NotFound`, and `Changed` as ``read`` does.
        """

    def copy(self, location: Location, image_id: str, hints: Hints, /) -> Location:
        """Copy an image inside the backend, all or nothing. Raises `AlreadyExists`."""

    def sign(self, location: Location, seconds: int, /) -> str:
        """A URL that lets anybody read the image for so long."""

    def set_acls(self, location: Location, *, public: bool, read: tuple[str, ...], write: tuple[str, ...]) -> None:
        """Who else may read and write the image: project ids."""

    def check_id(self, image_id: str, /) -> None:
        """Raise `InvalidImageId` for ids that match `IMAGE_ID` but can't be kept here."""

    def bind(self, auth: Any, /) -> Driver:
        """A cheap driver that shares pools and configuration with this one and acts for ``auth``.

        ``auth`` is a keystoneauth session, or an object with auth_token, user_id, project_id, service_catalog. The
        result is ready for use: the store neither opens nor closes it. It sees only what ``auth`` may see.
        """


def require(module: str, *, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import a driver's library late.

    Args:
        module: dotted name to import.
        extra: the extra of imagestore that brings it.
        package: what to install where no extra does, such as a distribution's package.

    Raises:
        MissingDependency: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        how = f"pip install 'imagestore[{extra}]'" if extra else f"install {package or module}"
        raise MissingDependency(f"the Python module {module} is not installed: {how}") from error


def split_credentials(uri: str) -> str:
    """``uri`` without what stands between ``://`` and the last ``@``.

    A URI with an empty authority (``file:///…``) can hold no credentials, and an ``@`` in it is part of a path.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise InvalidLocation("not a location: there is no '://' in it (an image id is not one: use locate)")
    if rest.startswith("/"):
        return uri
    return f"{scheme}://{rest.rpartition('@')[2]}"


class PullReader:
    """What a `PullUpload` gives to a backend that wants a stream: ``read(n)`` and iteration, each once, in order."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._data = b""
        self._position = 0
        self._ended = False
        self._error: BaseException | None = None
        self._closed = False
        self.drained = False

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes (-1: what is there); ``b""`` at the end. Blocks until there is something."""
        with self._change:
            while not self._data and not self._ended and self._error is None:
                self._change.wait()
            if self._error is not None:
                raise self._error
            if not self._data:
                self.drained = True
                return b""
            if size == 0:
                return b""
            stop = len(self._data) if size < 0 else min(len(self._data), self._position + size)
            part = self._data if self._position == 0 and stop == len(self._data) else self._data[self._position : stop]
            self._position = stop
            if stop == len(self._data):
                self._data, self._position = b"", 0
                self._change.notify_all()
            return part

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(MIB):
            yield chunk

    def _feed(self, data: bytes) -> None:
        """Hand over ``data`` and wait until all of it was taken: nothing is buffered beyond it."""
        with self._change:
            if self._closed:
                return
            self._data = data
            self._change.notify_all()
            while self._data and not self._closed:
                self._change.wait()

    def _end(self, error: BaseException | None = None) -> None:
        with self._change:
            self._ended, self._error = True, error
            self._change.notify_all()

    def _close(self) -> None:
        """Nobody will read any more: lets a waiting `_feed` go."""
        with self._change:
            self._closed = True
            self._data = b""
            self._change.notify_all()


class _UploadAborted(Exception):
    """Raised out of `PullReader.read` when the upload is given up, so that the backend call ends."""


class PullUpload(Upload):
    """Turns push into pull, for a backend that takes an image as one stream.

    Subclasses implement `put`, which runs in a thread of its own and reads to the end, and `commit`, which calls
    ``self.finish()`` first. `abort` implementations call ``self.stop()`` first. Use with ``parallel_writes=1`` and
    ``repeatable_writes=False``. An upload counts as complete only if the reader was read to its end.
    """

    def __init__(self) -> None:
        self._reader = PullReader()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._sent = 0

    @abstractmethod
    def put(self, reader: PullReader, /) -> None:
        """Send all that ``reader`` gives, to its end, to a temporary name. Must end when ``read`` raises."""

    def write(self, block: Block, /) -> None:
        self._start()
        self._reader._feed(block.data)
        if self._thread is None or not self._thread.is_alive() or self._reader._closed:
            self._join()
            raise self._error or Unavailable(f"the backend stopped reading after about {self._sent} bytes")
        self._sent += len(block.data)

    def finish(self) -> None:
        """Tell ``put`` that all is sent and wait for it. Raises what it raised; repeated calls do nothing more."""
        self._start()
        self._reader._end()
        self._join()
        if self._error is not None:
            raise self._error
        if not self._reader.drained:
            raise Unavailable(f"the backend stopped reading before the end of {self._sent} bytes")

    def stop(self) -> None:
        """Break off ``put`` and wait until its thread has ended."""
        self._reader._end(_UploadAborted("the upload was given up"))
        self._join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="imagestore-put", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self.put(self._reader)
        except BaseException as error:  # noqa: BLE001 - carried over to the thread that waits for it
            self._error = error
        finally:
            self._reader._close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
