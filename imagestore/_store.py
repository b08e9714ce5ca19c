"""`Store`: one backend, made safe to use. Checks arguments, then delegates to driver, transfer and reader."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, cast

from imagestore._digest import Digests, check_expected, compare
from imagestore._download import Target, fetch
from imagestore._models import (
    AbortFailed,
    AddResult,
    BlockStored,
    CommitStarted,
    Event,
    Leftover,
    Limits,
    Location,
    Observer,
    Progress,
    Retried,
    Retry,
    Stat,
    StoredImage,
    Timeouts,
    TransferEnded,
    TransferStarted,
    Usage,
    Verifier,
    VerifyResult,
)
from imagestore._pool import Engine
from imagestore._reader import ImageReader, ResumingReader
from imagestore._retry import Backoff, Caller
from imagestore._source import Source, SourceType, open_source
from imagestore._transfer import BlockPlan, InDoubt, Transfer, commit
from imagestore.driver import IMAGE_ID, Capabilities, Driver, Hints, Upload, Verbs, split_credentials
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    InvalidImageId,
    InvalidLocation,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    SizeMismatch,
    StoreError,
    Unauthenticated,
    Unsupported,
    redact,
)

__all__ = ["Store"]

_log = logging.getLogger("imagestore")

T = TypeVar("T")

DAY = 86400.0
LOCATION_MAX = 4096


class _Opened:
    """What a store has once it is open: a driver and threads. Made anew after a fork."""

    def __init__(self, driver: Driver, name: str, workers: int) -> None:
        self.driver = driver
        self.caller = Caller(driver, name)
        self.workers = workers
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.workers, "imagestore-worker")
            return self._pool

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self.caller("close", self.driver.close)


class _Bound(_Opened):
    """The same for a view that acts for a user: it has a driver of its own and borrows the threads."""

    def __init__(self, driver: Driver, name: str, owner: _Opened) -> None:
        super().__init__(driver, name, owner.workers)
        self._owner = owner

    def pool(self) -> ThreadPoolExecutor:
        return self._owner.pool()

    def close(self) -> None:
        """What it borrowed belongs to the store."""


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
        weight: int = 0,
        description: str = "",
        engine: Engine | None = None,
        _block_size: int | None = None,
    ) -> None:
        """A store over ``driver``, which must not be opened.

        ``limits``, ``retry``, ``timeouts`` and ``observer`` hold for all calls. Stores that share an ``engine``
        share its memory budget. Applications use `open_store` or `load_stores` instead.
        """
        self.name = name or driver.store or driver.name
        self.driver_name = driver.name
        self.weight = weight
        self.description = description
        self._template = driver
        self._retry = retry or Retry()
        self._timeouts = timeouts or Timeouts()
        self._observer = observer
        self._owns_engine = engine is None
        self._engine = engine or Engine(limits or Limits())
        self._block_size = _block_size
        self._bound = False
        self._used = False
        self._warned = False
        self._opened: _Opened | None = None
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
        verbs = self._verbs("bind")
        driver = opened.caller("bind", verbs.bind, None, None, auth)
        view = Store.__new__(Store)
        view.__dict__.update(self.__dict__)
        view._template = driver
        view._bound = True
        view._owns_engine = False
        view._opened = _Bound(driver, self.name, opened)
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
        metadata: Mapping[str, str] | None = None,
        max_size: int | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        cancel: threading.Event | None = None,
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
            metadata: text kept with the image where the backend can.
            max_size: refuse an image that is longer, in bytes; never more than ``limits.max_size``.
            progress: called with (bytes stored, size or None) as blocks are stored.
            observer: takes the events of this call, beside the store's own.
            cancel: set it, from any thread, to break off.

        Raises:
            AlreadyExists: the id is taken; what is there was not touched.
            SizeMismatch, DigestMismatch, SignatureMismatch: the bytes are not what they should be.
            SourceError: reading the source failed. Cancelled: ``cancel`` was set.
            StoreFull, LimitExceeded: no room, or too large.
            Unavailable: the backend failed; if it failed during the commit, the message says what is known.

        After any of these nothing can be read under the id, but what another call stored. What could not be
        cleaned up is in `uploads`.
        """
        opened = self._open(authorised=True)
        self._check_id(opened, image_id)
        verbs = self._verbs("create")
        names, wanted = self._expected("add", digests, expected)
        limit = self.limits.max_size if max_size is None else min(max_size, self.limits.max_size)
        record = _Record(self, "add", image_id, observer)
        with self._slot(cancel), self._context("add", image_id), contextlib.closing(open_source(source)) as data:
            size = self._declared(size, data)
            plan = BlockPlan(opened.driver.capabilities, size, limit, self._block_size)
            self._check_size(opened, size, limit, plan)
            hints = Hints(
                token=secrets.token_hex(16),
                size=size,
                block_size=plan.size_of(0),
                metadata=MappingProxyType(self._check_metadata(metadata)),
            )
            if self._retrying(opened, "locate", record, lambda: verbs.locate(image_id)) is not None:
                raise AlreadyExists("the id is taken")
            with record.running(size), self._uploading(opened, verbs, image_id, hints, record) as upload:
                transfer = Transfer(
                    source=data,
                    upload=upload,
                    caller=opened.caller,
                    pool=opened.pool(),
                    share=self._engine.share(),
                    plan=plan,
                    retry=self._retry,
                    size=size,
                    max_size=limit,
                    digests=Digests(names, self._engine.digest_pool),
                    expected=wanted,
                    verifier=verifier,
                    progress=_quiet(progress),
                    cancel=cancel,
                    notify=record.retried,
                    stored=record.block,
                )
                found = transfer.run()
                record.commit(transfer.total)
                backoff = Backoff(self._retry, notify=record.retried)
                commit(upload, transfer.total, hints.token, opened.caller, backoff)
                record.digests = found
            stat = self._settled(opened, upload, transfer.total, hints.token, record)
        return AddResult(
            image_id=image_id,
            store=self.name,
            location=upload.location,
            size=transfer.total,
            digests=MappingProxyType(found),
            stored=transfer.stored,
            stat=stat,
        )

    def delete(self, location: Location | str) -> None:
        """Delete an image. Raises `NotFound`, and `InUse` if something still needs it."""
        opened, place = self._place(location)
        verbs = self._verbs("delete")
        backoff = Backoff(self._retry)
        doubt = False
        while True:
            try:
                return opened.caller("delete", verbs.delete, place, None, place)
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
        opened, place = self._place(location)
        if start < 0 or (stop is not None and stop < start):
            raise InvalidRequest(f"no such range: {start} to {stop}", store=self.name, operation="get")
        if expected and (start or stop is not None):
            raise InvalidRequest("expected digests are of a whole image, not of a range", store=self.name)
        _, wanted = self._expected("get", (), expected)
        record = _Record(self, "get", place.image_id, None)
        reader = ResumingReader(opened.caller, place, Backoff(self._retry, stop=cancel, notify=record.retried))
        reader.open(start, stop)
        if start > reader.stat.size:
            reader.close()
            raise InvalidRequest(
                f"the range begins at byte {start}, the image has {reader.stat.size}",
                store=self.name,
                operation="get",
                location=place.uri,
            )
        record.started(reader.stop - reader.start)
        return ImageReader(
            reader,
            expected=wanted,
            digests=Digests(wanted, self._engine.digest_pool),
            progress=_quiet(progress),
            check=_canceller(cancel),
            done=record.read,
        )

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
        record = _Record(self, "download", place.image_id, None)
        with self._slot(cancel), self._context("download", None, place), Target(path, overwrite=overwrite) as target:
            stat = self._retrying(opened, "stat", record, lambda: opened.driver.stat(place), place)

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
                    progress=_quiet(progress),
                    check=_canceller(cancel),
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
        check = _canceller(cancel)
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

    def stat(self, location: Location | str) -> Stat:
        """What the backend knows of an image. Raises `NotFound`."""
        opened, place = self._place(location)
        return self._retrying(opened, "stat", None, lambda: opened.driver.stat(place), place)

    def get_size(self, location: Location | str) -> int:
        """The length of an image in bytes. Raises `NotFound`."""
        return self.stat(location).size

    def locate(self, image_id: str) -> Location:
        """The location of the image of that id. Raises `NotFound`."""
        opened = self._open(authorised=True)
        self._check_id(opened, image_id)
        verbs = self._verbs("locate")
        found = self._retrying(opened, "locate", None, lambda: verbs.locate(image_id))
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
        verbs = self._verbs("list")
        return _guarded(opened.caller, "list", verbs.list)

    def usage(self) -> Usage:
        """Room in the backend, in bytes."""
        opened = self._open(authorised=True)
        verbs = self._verbs("usage")
        return self._retrying(opened, "usage", None, verbs.usage)

    def uploads(self) -> Iterator[Leftover]:
        """What unfinished uploads and deletes left behind, and the uploads that still run."""
        opened = self._open(authorised=True)
        verbs = self._verbs("uploads")
        return _guarded(opened.caller, "uploads", verbs.uploads)

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
        """
        opened = self._open(authorised=True)
        verbs = self._verbs("discard")
        seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else float(older_than)
        if not seconds >= 0:
            raise InvalidRequest(f"older_than is a number of seconds, not {older_than!r}", store=self.name)
        now = datetime.now(UTC)
        taken = []
        for leftover in list(self.uploads()):
            last = leftover.last_activity or leftover.started
            if (leftover.alive and not include_alive) or (
                seconds > 0 and (last is None or (now - last).total_seconds() < seconds)
            ):
                continue
            if not dry_run:
                self._retrying(opened, "discard", None, lambda leftover=leftover: verbs.discard(leftover))  # type: ignore[misc]  # mypy: bound default
            taken.append(leftover)
        return taken

    # The inside

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._opened = None
        self._slots = threading.Semaphore(self.limits.max_transfers) if self.limits.max_transfers else None

    def _open(self, *, authorised: bool = False) -> _Opened:
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

    def _connect(self) -> _Opened:
        if self._used:
            # A driver is opened once in its life, and never in two processes.
            self._template = self._template.clone()
        self._used = True
        driver = self._template
        opened = _Opened(driver, self.name, self.limits.workers)
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

    def _place(self, location: Location | str) -> tuple[_Opened, Location]:
        place = self.parse(location)
        return self._open(authorised=True), place

    def _verbs(self, verb: str) -> Verbs:
        if not self.supports(verb):
            what = "is read only" if verb == "create" else f"has no {verb}"
            raise Unsupported(f"the {self.driver_name} driver {what}", store=self.name, driver=self.driver_name)
        return cast(Verbs, self._template)

    def _check_id(self, opened: _Opened, image_id: str) -> None:
        if not isinstance(cast(object, image_id), str) or not IMAGE_ID.fullmatch(image_id):
            raise InvalidImageId(
                f"not an image id: {str(image_id)[:220]!r}; an id has 1 to 200 letters, digits, dots, dashes and "
                "underscores, and begins with a letter or a digit",
                store=self.name,
                driver=self.driver_name,
            )
        if self.supports("check_id"):
            opened.caller("check_id", self._verbs("check_id").check_id, None, image_id, image_id)

    def _expected(
        self, operation: str, digests: Sequence[str], expected: Mapping[str, str] | None
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        with self._context(operation):
            return check_expected(digests, expected)

    def _check_metadata(self, metadata: Mapping[str, str] | None) -> dict[str, str]:
        kept = dict(metadata or {})
        if any(not isinstance(cast(object, text), str) for pair in kept.items() for text in pair):
            raise InvalidRequest("metadata is text: names and values are str")
        return kept

    def _declared(self, size: int | None, source: Source) -> int | None:
        if size is None:
            return source.size
        if isinstance(size, bool) or not isinstance(cast(object, size), int) or size < 0:
            raise InvalidRequest(f"size is a number of bytes or None, not {size!r}")
        if source.size is not None and source.size != size:
            raise SizeMismatch(f"{size} bytes were declared, the source has {source.size}")
        return size

    def _check_size(self, opened: _Opened, size: int | None, limit: int, plan: BlockPlan) -> None:
        if size is None:
            if opened.driver.capabilities.needs_size:
                raise InvalidRequest("this backend needs to know the size beforehand: pass size=")
            return
        if size > limit:
            raise LimitExceeded(f"the image has {size} bytes, the limit is {limit}")
        if plan.capacity is not None and size > plan.capacity:
            raise LimitExceeded(f"the image has {size} bytes, the backend can hold {plan.capacity}")

    @contextlib.contextmanager
    def _slot(self, cancel: threading.Event | None) -> Iterator[None]:
        """One of the ``max_transfers`` places."""
        slots = self._slots
        if slots is None:
            yield
            return
        check = _canceller(cancel)
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

    def _retrying(
        self,
        opened: _Opened,
        operation: str,
        record: _Record | None,
        function: Callable[[], T],
        place: Location | None = None,
    ) -> T:
        backoff = Backoff(self._retry, notify=record.retried if record else None)
        while True:
            try:
                return opened.caller(operation, function, place)
            except StoreError as error:
                backoff.failed(error, operation)

    @contextlib.contextmanager
    def _uploading(
        self, opened: _Opened, verbs: Verbs, image_id: str, hints: Hints, record: _Record
    ) -> Iterator[Upload]:
        """An upload that is taken back unless the block ends well."""
        if opened.driver.capabilities.repeatable_create:
            upload = self._retrying(opened, "create", record, lambda: verbs.create(image_id, hints))
        else:
            upload = opened.caller("create", verbs.create, None, image_id, image_id, hints)
        try:
            yield upload
        except InDoubt as doubt:
            # Whether the image stands is unknown: taking the upload back might destroy it.
            doubt.error.message += "; the commit is in doubt: look for the image before you add it again"
            record.abort_failed(hints.token, doubt.error)
            raise doubt.error from doubt.__cause__
        except BaseException:
            self._abort(opened, upload, hints.token, record)
            raise

    def _abort(self, opened: _Opened, upload: Upload, token: str, record: _Record) -> None:
        """Take the upload back. The error that led here matters more than one that happens now."""
        policy = dataclasses.replace(self._retry, total=self._timeouts.abort)
        backoff = Backoff(policy, notify=record.retried)
        while True:
            try:
                return opened.caller("abort", upload.abort, upload.location)
            except StoreError as error:
                try:
                    backoff.failed(error, "abort")
                except StoreError:
                    record.abort_failed(token, error)
                    _log.warning(
                        "store %s: upload %s could not be taken back and is left for collect(): %s",
                        self.name,
                        token,
                        error,
                    )
                    return None

    def _settled(self, opened: _Opened, upload: Upload, size: int, token: str, record: _Record) -> Stat:
        """What stands after the commit. The image is stored: a backend that fails only now changes nothing of that."""
        try:
            stat = self._retrying(opened, "stat", record, lambda: opened.driver.stat(upload.location), upload.location)
        except StoreError as error:
            _log.warning("store %s: the image is stored, but can't be looked at: %s", self.name, error)
            return Stat(size=size, token=token)
        if stat.size == size:
            return stat
        if stat.token == token:
            with contextlib.suppress(StoreError):
                opened.caller("delete", self._verbs("delete").delete, upload.location, None, upload.location)
        raise SizeMismatch(f"{size} bytes were stored, and the backend has {stat.size}", location=upload.location.uri)


class _Record:
    """The events of one transfer."""

    def __init__(self, store: Store, operation: str, image_id: str | None, observer: Observer | None) -> None:
        self._engine = store._engine
        self._observers = [o for o in (store._observer, observer) if o is not None]
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self.size = 0
        self.stored = 0
        self.digests: Mapping[str, str] = {}
        self._common: dict[str, Any] = {
            "store": store.name,
            "driver": store.driver_name,
            "operation": operation,
            "image_id": image_id,
            "transfer": secrets.token_hex(8) if self._observers else "",
        }

    def _send(self, kind: type[Event], **values: Any) -> None:
        for observer in self._observers:
            self._engine.observe(observer, kind(**self._common, time=time.time(), **values))

    def started(self, size: int | None) -> None:
        self._send(TransferStarted, size=size)

    @contextlib.contextmanager
    def running(self, size: int | None) -> Iterator[None]:
        self.started(size)
        try:
            yield
        except BaseException as error:
            self.ended(error)
            raise
        self.ended(None)

    def block(self, index: int, length: int, stored: int, seconds: float) -> None:
        with self._lock:
            self.size += length
            self.stored += stored
        self._send(BlockStored, index=index, bytes=length, stored=stored, seconds=seconds)

    def retried(self, step: str, error: StoreError, attempt: int, delay: float) -> None:
        store = self._common["store"]
        _log.info("store %s: %s failed, attempt %d, again in %.1f s: %s", store, step, attempt, delay, error)
        self._send(Retried, step=step, error=str(error), attempt=attempt, delay=delay)

    def read(self, error: BaseException | None, length: int) -> None:
        self.size = length
        self.ended(error)

    def commit(self, size: int) -> None:
        self._send(CommitStarted, size=size)

    def abort_failed(self, token: str, error: StoreError) -> None:
        self._send(AbortFailed, token=token, error=str(error))

    def ended(self, error: BaseException | None) -> None:
        text = None if error is None else redact(str(error) or type(error).__name__)
        self._send(
            TransferEnded,
            size=self.size,
            stored=self.stored,
            seconds=time.monotonic() - self._began,
            error=text,
            digests=dict(self.digests),
        )


def _canceller(cancel: threading.Event | None) -> Callable[[], None]:
    def check() -> None:
        if cancel is not None and cancel.is_set():
            raise Cancelled("the caller cancelled")

    return check


def _quiet(progress: Progress | None) -> Progress | None:
    """A progress function that can't break a transfer: after its first failure it is called no more."""
    if progress is None:
        return None
    active = progress
    failed = False

    def report(done: int, total: int | None) -> None:
        nonlocal failed
        if failed:
            return
        try:
            active(done, total)
        except Exception:  # noqa: BLE001 - logged; the caller's code can't be allowed to break a transfer
            failed = True
            _log.exception("the progress function failed and is not called again")

    return report


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
