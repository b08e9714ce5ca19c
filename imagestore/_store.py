"""`Store`: one backend, made safe to use. Checks arguments, then delegates to driver, transfer and reader."""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from imagestore._adding import Adding, add, check_metadata, request
from imagestore._connection import Borrowed, Connection
from imagestore._digest import Digests, check_expected, compare
from imagestore._download import Target, fetch
from imagestore._models import (
    AddResult,
    Leftover,
    Limits,
    Location,
    Observer,
    Progress,
    Retry,
    Stat,
    StoredImage,
    Timeouts,
    Usage,
    Verifier,
    VerifyResult,
)
from imagestore._pool import Engine
from imagestore._reader import ImageReader, ResumingReader, check_range, open_image
from imagestore._record import Record, canceller, quiet
from imagestore._retry import Backoff, Caller
from imagestore._source import SourceType, open_source
from imagestore.driver import IMAGE_ID, Capabilities, Driver, Hints, split_credentials
from imagestore.errors import (
    AlreadyExists,
    InvalidImageId,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    SizeMismatch,
    StoreError,
    Unauthenticated,
    Unsupported,
)

if TYPE_CHECKING:
    from imagestore.formats import Inspection, Inspector, Policy

__all__ = ["Store"]

_log = logging.getLogger("imagestore")

T = TypeVar("T")

DAY = 86400.0
LOCATION_MAX = 4096


class Store:
    """Images in one backend.

    A store is safe to use from many threads, connects on first use, and after a fork connects anew in the child.
    All its calls raise `imagestore.errors.StoreError` and nothing else, but for what your own code raises through
    it (`KeyboardInterrupt`, say).

    Attributes:
        name: the name it has in the configuration.
        driver_name: type name of its driver.
        weight: larger is preferred when reading.
        description: for humans.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        name: str = "",
        limits: Limits | None = None,
        retry: Retry | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
        policy: Policy | None = None,
        weight: int = 0,
        description: str = "",
        engine: Engine | None = None,
        _block_size: int | None = None,
    ) -> None:
        """A store over ``driver``, which must not be opened.

        ``limits``, ``retry``, ``timeouts``, ``observer`` and ``policy`` hold for all calls. Stores that share an
        ``engine`` share its memory budget. Applications use `open_store` or `load_stores` instead.
        """
        self.name = name or driver.store or driver.name
        self.driver_name = driver.name
        self.weight = weight
        self.description = description
        self._template = driver
        self._retry = retry or Retry()
        self._timeouts = timeouts or Timeouts()
        self._observer = observer
        self._policy = policy
        self._owns_engine = engine is None
        self._engine = engine or Engine(limits or Limits())
        self._block_size = _block_size
        self._bound = False
        self._used = False
        self._warned = False
        self._opened: Connection | None = None
        self._reset()
        _after_fork.add(self)

    def __repr__(self) -> str:
        return f"<Store {self.name} ({self.driver_name})>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What the store is

    @property
    def capabilities(self) -> Capabilities:
        """Limits and guarantees of the backend. Connects."""
        return self._open().driver.capabilities

    @property
    def limits(self) -> Limits:
        """What transfers may use."""
        return self._engine.limits

    @property
    def policy(self) -> Policy | None:
        """Which findings refuse an image whose format is declared; None is the default of `imagestore.formats`."""
        return self._policy

    def supports(self, verb: str) -> bool:
        """Whether the driver has an optional verb, such as ``"list"`` (see `imagestore.driver.Verbs`)."""
        return callable(getattr(self._template, verb, None))

    def parse(self, location: Location | str) -> Location:
        """Check a location. Raises `InvalidLocation` for one that this store does not serve. No I/O."""
        uri = location.uri if isinstance(location, Location) else location
        if not isinstance(cast(object, uri), str):
            raise InvalidLocation(f"a location is text or a Location, not {type(uri).__name__}", store=self.name)
        if len(uri) > LOCATION_MAX or not uri.isprintable():
            raise InvalidLocation("a location has no control characters and at most 4096 characters", store=self.name)
        scheme = uri.partition("://")[0].lower()
        caller = Caller(self._template, self.name)
        bare = caller("parse", lambda: split_credentials(uri))
        if scheme not in self._template.schemes:
            raise InvalidLocation(
                f"this store serves {', '.join(s + '://' for s in self._template.schemes)}, not {scheme}://",
                store=self.name,
                driver=self.driver_name,
                location=bare,
            )
        return caller("parse", self._template.parse, Location(uri=bare), None, bare)

    def close(self) -> None:
        """Give up connections and threads. A later call connects again; a transfer still running fails."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()
        if self._owns_engine:
            self._engine.close()

    def bind(self, auth: Any) -> Store:
        """A view of this store that acts for ``auth``; shares its threads, budget and connections.

        ``auth`` is a keystoneauth session, or an object with ``auth_token``, ``user_id``, ``project_id`` and
        ``service_catalog``. Raises `Unsupported` where the driver acts for itself only.
        """
        opened = self._open()
        self._require("bind")
        driver = opened.caller("bind", opened.verbs.bind, None, None, auth)
        view = Store.__new__(Store)
        view.__dict__.update(self.__dict__)
        view._template = driver
        view._bound = True
        view._owns_engine = False
        view._opened = Borrowed(driver, opened)
        _after_fork.add(view)
        return view

    # Writing

    def add(
        self,
        image_id: str,
        source: SourceType,
        *,
        size: int | None = None,
        digests: Sequence[str] = ("sha256",),
        expected: Mapping[str, str] | None = None,
        verifier: Verifier | None = None,
        disk_format: str | None = None,
        container_format: str | None = None,
        policy: Policy | None = None,
        metadata: Mapping[str, str] | None = None,
        max_size: int | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        cancel: threading.Event | None = None,
        token: str | None = None,
        begun: Callable[[Location], object] | None = None,
    ) -> AddResult:
        """Store an image, whole or not at all.

        Args:
            image_id: letters, digits, dot, dash and underscore; up to 200; the first a letter or a digit.
            source: a path, a binary file object, an iterable of bytes, or bytes. It is read to its end and not
                closed (a path is opened and closed).
            size: its length in bytes; None if unknown. A source of another length is refused.
            digests: algorithms of hashlib to compute.
            expected: algorithm to hexadecimal digest: the image is refused unless all agree.
            verifier: sees all bytes in order; its ``verify`` is called before the image becomes visible and
                refuses it by raising.
            disk_format, container_format: what the image is declared to be (see `imagestore.formats`); it is
                inspected while it passes.
            policy: which findings refuse it; None: the store's own. Without any declaration, an image is inspected
                only if a policy is given here.
            metadata: text kept with the image where the backend can.
            max_size: refuse an image that is longer, in bytes; never more than ``limits.max_size``.
            progress: called with (bytes stored, size or None) as blocks are stored.
            observer: takes the events of this call, beside the store's own.
            cancel: set it, from any thread, to break off.
            token: what will mark this upload (`Stat.token`, `Leftover.token`), for a caller who writes it down first:
                32 lower-case hexadecimal digits, never used before. None: a fresh one.
            begun: called once the id was found free and the upload is marked, before the source is read, with the
                location that the image will have. What it raises ends the add, and is raised as it is.

        Raises:
            AlreadyExists: the id is taken; what is there was not touched.
            SizeMismatch, DigestMismatch, SignatureMismatch: the bytes are not what they should be.
            FormatMismatch, UnsafeImage: the image is not what was declared, or the policy refuses it.
            SourceError: reading the source failed.
            Cancelled: ``cancel`` was set.
            StoreFull, LimitExceeded: no room, or too large.
            Unavailable: the backend failed; if it failed during the commit, the message says what is known.

        After any of these nothing can be read under the id, but what another call stored. What could not be
        cleaned up is in `uploads`.
        """
        adding = self._adding(image_id, observer, token)
        with self._slot(cancel), self._context("add", image_id), contextlib.closing(open_source(source)) as data:
            what = request(
                data,
                [adding.capabilities],
                self._engine,
                size=size,
                digests=digests,
                expected=expected,
                verifier=verifier,
                inspector=self._inspector(disk_format, container_format, policy),
                metadata=metadata,
                max_size=max_size,
                progress=progress,
                cancel=cancel,
                block_size=self._block_size,
                begun=begun,
            )
            return add([adding], what).stands[adding]

    def delete(self, location: Location | str) -> None:
        """Delete an image. Raises `NotFound`, and `InUse` if something still needs it."""
        opened, place = self._place(location)
        self._require("delete")
        backoff = Backoff(self._retry)
        doubt = False
        while True:
            try:
                return opened.caller("delete", opened.verbs.delete, place, None, place)
            except NotFound:
                if doubt:
                    return None
                raise
            except StoreError as error:
                backoff.failed(error, "delete")
                doubt = True

    # Reading

    def get(
        self,
        location: Location | str,
        *,
        start: int = 0,
        stop: int | None = None,
        expected: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> ImageReader:
        """Open an image, or the part of it from byte ``start`` up to but not including ``stop``, for reading.

        A broken read is resumed where it stopped; `Changed` is raised if the image was replaced meanwhile.
        ``expected`` digests are compared when the end of a whole read is reached (`DigestMismatch`).

        Raises `NotFound` at once; `InvalidRequest` if ``start`` is past the end. ``stop`` is cut to the size.
        """
        with self._context("get"):
            wanted = check_range(start, stop, expected)
        place = self.parse(location)
        record = self._record("get", place.image_id)
        reader = self._read(place, start, stop, cancel, record)
        return open_image(reader, wanted, self._engine, progress, cancel, record)

    def download(
        self,
        location: Location | str,
        path: str | os.PathLike[str],
        *,
        expected: Mapping[str, str] | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> VerifyResult:
        """Read an image into a local file, which appears only when it is complete and as expected.

        Holes are kept. Raises `AlreadyExists` if ``path`` exists and ``overwrite`` is not set.
        """
        opened, place = self._place(location)
        names, wanted = self._expected("download", (), expected)
        record = self._record("download", place.image_id)
        with self._slot(cancel), self._context("download", None, place), Target(path, overwrite=overwrite) as target:
            stat = opened.retrying("stat", lambda: opened.driver.stat(place), place, notify=record.retried)

            def open_range(start: int, end: int) -> ResumingReader:
                reader = ResumingReader(opened.caller, place, Backoff(self._retry, stop=cancel, notify=record.retried))
                reader.open(start, end, stat)
                return reader

            with record.running(stat.size), contextlib.closing(Digests(names, self._engine.digest_pool)) as computed:
                fetch(
                    open_range,
                    stat.size,
                    target,
                    ranged=opened.driver.capabilities.ranged_reads,
                    pool=opened.pool(),
                    share=self._engine.share(),
                    digests=computed,
                    progress=quiet(progress),
                    check=canceller(cancel),
                )
                record.size = stat.size
                record.digests = computed.finish()
                compare(wanted, record.digests)
                target.publish(stat.size)
        return VerifyResult(location=place, size=stat.size, digests=MappingProxyType(record.digests))

    def verify(
        self,
        location: Location | str,
        *,
        expected: Mapping[str, str] | None = None,
        digests: Sequence[str] = ("sha256",),
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> VerifyResult:
        """Read a whole image and compute its digests. Raises `DigestMismatch` if one differs from the expected."""
        names, wanted = self._expected("verify", digests, expected)
        computed = Digests(names, self._engine.digest_pool)
        check = canceller(cancel)
        try:
            with self.get(location, progress=progress, cancel=cancel) as reader:
                for chunk in reader:
                    computed.update(chunk, lambda: None, check)
                found = computed.finish()
                place = self.parse(location)
                with self._context("verify", place.image_id, place):
                    compare(wanted, found)
                return VerifyResult(location=place, size=reader.size, digests=MappingProxyType(found))
        finally:
            computed.close()

    def inspect(
        self,
        location: Location | str,
        *,
        disk_format: str | None = None,
        container_format: str | None = None,
        policy: Policy | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Inspection:
        """Read a whole image and say what it is. A refusal is not raised: `Inspection.accepted` is the verdict."""
        from imagestore.formats import inspect_stream

        policy = policy or self._policy
        with self._context("inspect"), self.get(location, progress=progress, cancel=cancel) as reader:
            return inspect_stream(reader, disk_format=disk_format, container_format=container_format, policy=policy)

    def stat(self, location: Location | str) -> Stat:
        """What the backend knows of an image. Raises `NotFound`."""
        opened, place = self._place(location)
        return opened.retrying("stat", lambda: opened.driver.stat(place), place)

    def get_size(self, location: Location | str) -> int:
        """The length of an image in bytes. Raises `NotFound`."""
        return self.stat(location).size

    def locate(self, image_id: str) -> Location:
        """The location of the image of that id. Raises `NotFound`."""
        opened = self._open(authorised=True)
        self._check_id(opened, image_id)
        self._require("locate")
        found = opened.retrying("locate", lambda: opened.verbs.locate(image_id))
        if found is None:
            raise NotFound(
                "no image of that id", store=self.name, driver=self.driver_name, operation="locate", image_id=image_id
            )
        return found

    def exists(self, image_id: str) -> bool:
        """Whether there is an image of that id."""
        try:
            self.locate(image_id)
        except NotFound:
            return False
        return True

    # What is there

    def list(self) -> Iterator[StoredImage]:
        """All images, in no particular order."""
        opened = self._open(authorised=True)
        self._require("list")
        return _guarded(opened.caller, "list", opened.verbs.list)

    def usage(self) -> Usage:
        """Room in the backend, in bytes."""
        opened = self._open(authorised=True)
        self._require("usage")
        return opened.retrying("usage", opened.verbs.usage)

    def sign(self, location: Location | str, *, seconds: int = 3600) -> str:
        """A URL by which anybody can read the image for so many seconds. It is a secret: keep it out of logs.

        Raises `NotFound`, and `Unsupported` if the backend has no such URLs.
        """
        opened, place = self._place(location)
        self._require("sign")
        if not isinstance(cast("object", seconds), int) or seconds < 1:
            raise InvalidRequest(f"seconds is a whole number from 1 on, not {seconds!r}", store=self.name)
        opened.retrying("stat", lambda: opened.driver.stat(place), place)
        return opened.retrying("sign", lambda: opened.verbs.sign(place, seconds), place)

    def set_acls(
        self, location: Location | str, *, public: bool = False, read: Sequence[str] = (), write: Sequence[str] = ()
    ) -> None:
        """Let others use the image, in place of what was set before.

        Args:
            location: the image.
            public: everybody may read it.
            read: ids of projects that may read it.
            write: ids of projects that may also write it.

        Raises `NotFound`, and `Unsupported` if the backend has no such lists.
        """
        opened, place = self._place(location)
        self._require("set_acls")
        for ids in (read, write):
            if isinstance(ids, str):
                raise InvalidRequest(f"read and write are sequences of project ids, not {ids!r}", store=self.name)
        opened.retrying(
            "set_acls",
            lambda: opened.verbs.set_acls(place, public=public, read=tuple(read), write=tuple(write)),
            place,
        )

    def uploads(self) -> Iterator[Leftover]:
        """What unfinished uploads and deletes left behind, and the uploads that still run."""
        opened = self._open(authorised=True)
        self._require("uploads")
        return _guarded(opened.caller, "uploads", opened.verbs.uploads)

    def collect(
        self,
        *,
        older_than: float | timedelta = DAY,
        include_alive: bool = False,
        dry_run: bool = False,
    ) -> builtins.list[Leftover]:
        """Remove what unfinished uploads left behind, and return it.

        Args:
            older_than: seconds (or a timedelta) without activity. One whose age nobody knows is left unless 0.
            include_alive: also those whose uploader is known to run; its commit then fails.
            dry_run: remove nothing, only return what would be.

        One that can't be removed does not keep the others: its error is raised after the last of them.
        """
        opened = self._open(authorised=True)
        self._require("discard")
        seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else float(older_than)
        if not seconds >= 0:
            raise InvalidRequest(f"older_than is a number of seconds, not {older_than!r}", store=self.name)
        now = datetime.now(UTC)
        taken: builtins.list[Leftover] = []
        failed: StoreError | None = None
        for leftover in list(self.uploads()):
            last = leftover.last_activity or leftover.started
            if (leftover.alive and not include_alive) or (
                seconds > 0 and (last is None or (now - last).total_seconds() < seconds)
            ):
                continue
            if not dry_run:
                try:
                    opened.retrying("discard", functools.partial(opened.verbs.discard, leftover))
                except StoreError as error:
                    if error.temporary:
                        raise  # the next one would only wait for as long
                    failed = failed or error
                    continue
            taken.append(leftover)
        if failed is not None:
            raise failed
        return taken

    # The inside

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._opened = None
        self._slots = threading.Semaphore(self.limits.max_transfers) if self.limits.max_transfers else None

    def _open(self, *, authorised: bool = False) -> Connection:
        opened = self._opened
        if opened is None:
            if self._bound:
                raise InvalidRequest("this view was closed, or is of another process: bind again", store=self.name)
            with self._lock:
                opened = self._opened
                if opened is None:
                    opened = self._opened = self._connect()
        if authorised and not self._bound and opened.driver.capabilities.needs_auth:
            raise Unauthenticated(
                "this store acts for its users only: use store.bind(auth)", store=self.name, driver=self.driver_name
            )
        return opened

    def _connect(self) -> Connection:
        if self._used:
            # A driver is opened once in its life, and never in two processes.
            self._template = self._template.clone()
        self._used = True
        driver = self._template
        opened = Connection(driver, self.name, self._retry, self.limits.workers)
        backoff = Backoff(self._retry)
        while True:
            try:
                opened.caller("open", driver.open)
                break
            except StoreError as error:
                backoff.failed(error, "open")
        caps = driver.capabilities
        if caps.collision != "exclusive" and callable(getattr(driver, "create", None)) and not self._warned:
            self._warned = True
            _log.warning("store %s: a taken id is not refused for certain at commit: %s", self.name, caps.collision)
        return opened

    def _read(
        self, location: Location | str, start: int, stop: int | None, cancel: threading.Event | None, record: Record
    ) -> ResumingReader:
        opened, place = self._place(location)
        reader = ResumingReader(opened.caller, place, Backoff(self._retry, stop=cancel, notify=record.retried))
        with self._context("get", None, place):
            reader.open(start, stop)
        return reader

    def _place(self, location: Location | str) -> tuple[Connection, Location]:
        place = self.parse(location)
        return self._open(authorised=True), place

    def _require(self, verb: str) -> None:
        if not self.supports(verb):
            what = "is read only" if verb == "create" else f"has no {verb}"
            raise Unsupported(f"the {self.driver_name} driver {what}", store=self.name, driver=self.driver_name)

    def _check_id(self, opened: Connection, image_id: str) -> None:
        if not isinstance(cast(object, image_id), str) or not IMAGE_ID.fullmatch(image_id):
            raise InvalidImageId(
                f"not an image id: {str(image_id)[:220]!r}; an id has 1 to 200 letters, digits, dots, dashes and "
                "underscores, and begins with a letter or a digit",
                store=self.name,
                driver=self.driver_name,
            )
        if self.supports("check_id"):
            opened.caller("check_id", opened.verbs.check_id, None, image_id, image_id)

    def _expected(
        self, operation: str, digests: Sequence[str], expected: Mapping[str, str] | None
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        with self._context(operation):
            return check_expected(digests, expected)

    def _adding(self, image_id: str, observer: Observer | None, token: str | None = None) -> Adding:
        """This store's part of an add. Raises for ids that it can't keep, and where it can't add at all."""
        connection = self._open(authorised=True)
        self._check_id(connection, image_id)
        self._require("create")
        with self._context("add", image_id):
            return Adding(
                connection,
                image_id,
                self._record("add", image_id, observer),
                abort_within=self._timeouts.abort,
                token=token,
            )

    def _inspector(
        self, disk_format: str | None, container_format: str | None, policy: Policy | None
    ) -> Inspector | None:
        if disk_format is None and container_format is None and policy is None:
            return None
        from imagestore.formats import Inspector

        return Inspector(disk_format=disk_format, container_format=container_format, policy=policy or self._policy)

    def _record(self, operation: str, image_id: str | None, observer: Observer | None = None) -> Record:
        return Record(
            operation,
            image_id,
            store=self.name,
            driver=self.driver_name,
            engine=self._engine,
            observers=(self._observer, observer),
        )

    def _reaches(self, place: Location) -> bool:
        """Whether this store's backend can copy the image at ``place``, which may be another store's, by itself."""
        if not self.supports("copy"):
            return False
        try:
            self.parse(place)
        except InvalidLocation:
            return False
        return True

    def _copy(
        self, place: Location, image_id: str, metadata: Mapping[str, str] | None, observer: Observer | None
    ) -> AddResult:
        """Copy inside the backend."""
        opened, place = self._place(place)
        self._check_id(opened, image_id)
        record = self._record("copy", image_id, observer)
        with self._slot(None), self._context("copy", image_id, place):
            size = opened.retrying("stat", lambda: opened.driver.stat(place), place, notify=record.retried).size
            checked = check_metadata(metadata)
            if opened.retrying("locate", lambda: opened.verbs.locate(image_id), notify=record.retried) is not None:
                raise AlreadyExists("the id is taken")
            with record.running(size):
                made = self._copied(opened, place, image_id, size, checked, record)
                stat = opened.retrying("stat", lambda: opened.driver.stat(made), made, notify=record.retried)
                if stat.size != size:
                    raise SizeMismatch(f"the copy has {stat.size} bytes, the image {size}", location=made.uri)
                record.size = size
        return AddResult(image_id=image_id, store=self.name, location=made, size=size, digests={}, stored=0, stat=stat)

    def _copied(
        self, opened: Connection, place: Location, image_id: str, size: int, metadata: Mapping[str, str], record: Record
    ) -> Location:
        """Copy, and again after temporary errors; what an attempt did whose answer was lost is looked into first."""
        backoff = Backoff(opened.retry, notify=record.retried)
        # Each attempt has a token of its own: what one left unfinished must not stand in the way of the next.
        tokens: set[str | None] = set()
        while True:
            hints = Hints(token=secrets.token_hex(16), size=size, metadata=metadata)
            repeated = bool(tokens)
            tokens.add(hints.token)
            try:
                return opened.caller("copy", opened.verbs.copy, place, image_id, place, image_id, hints)
            except StoreError as error:
                if error.temporary or (repeated and isinstance(error, AlreadyExists)):
                    made = opened.retrying("locate", lambda: opened.verbs.locate(image_id), notify=record.retried)
                    if made is not None:
                        stat = opened.retrying(
                            "stat", functools.partial(opened.driver.stat, made), made, notify=record.retried
                        )
                        if stat.token in tokens:
                            return made
                        if stat.token is None:
                            error.message += "; the copy is in doubt: look for the image before you copy it again"
                            raise
                        raise AlreadyExists("another image got this id first", location=made.uri) from error
                backoff.failed(error, "copy")

    @contextlib.contextmanager
    def _slot(self, cancel: threading.Event | None) -> Iterator[None]:
        """One of the ``max_transfers`` places."""
        slots = self._slots
        if slots is None:
            yield
            return
        check = canceller(cancel)
        while not slots.acquire(timeout=0.5):
            check()
        try:
            yield
        finally:
            slots.release()

    @contextlib.contextmanager
    def _context(self, operation: str, image_id: str | None = None, place: Location | None = None) -> Iterator[None]:
        """Errors of our own that pass get to know where they are."""
        try:
            yield
        except StoreError as error:
            Caller(self._template, self.name).place(error, operation, place, image_id)
            raise


def _guarded(caller: Caller, operation: str, function: Callable[[], Iterator[T]]) -> Iterator[T]:
    items = caller(operation, function)
    missing = object()
    while (item := caller(operation, lambda: next(items, missing))) is not missing:
        yield cast(T, item)


_after_fork: weakref.WeakSet[Store] = weakref.WeakSet()


def _reset_stores() -> None:
    for store in _after_fork:
        store._reset()


os.register_at_fork(after_in_child=_reset_stores)
