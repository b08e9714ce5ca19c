"""Ties the life of images to their data: what a host embeds that keeps images for its users.

A `Lifecycle` moves images from status to status (see `imagestore.image`) and their data into stores and out of them,
so that the two agree, whatever process dies at whatever moment. The host keeps a `Record` for each image in a database
of its own: that is a `Repository`, of four methods.

**How they are kept in agreement.** Every step first writes down what it is about to do, and every write says which
state of the record it replaces (compare and swap), so that of two rivals one wins. An upload puts down its token and
the place where its data will be before the first byte is sent. Each upload of an image goes to a place of its own, so
no later one can meet what an earlier one left. A status that promises data (``active``) is written after the data
stands, and one that promises that there is none (``queued``, ``killed``, ``deleted``) after it is gone.

**Who may work on an image** is a matter of leases. A worker's name and the time until which it counts as alive are in
the record, and a thread renews them while it works. A worker that can't renew its lease breaks off by itself. After
a crash, `Lifecycle.recover` takes over what leases have run out on, and looks at what stands in the store: the token
tells whether the upload had come to its end.

Workers on several machines compare times with each other: their clocks may differ by less than the lease.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, Protocol, TypeVar

from imagestore._models import AddResult, Location, Observer, Progress, Stat, Verifier, VerifyResult
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    InUse,
    NotFound,
    Protected,
    StoreError,
    Unavailable,
    Unsupported,
    WrongStatus,
)
from imagestore.image import Event, Image, ImageLocation, ImageStatus

__all__ = ["Data", "Lifecycle", "MemoryRepository", "Record", "Repository", "Result"]

_SWAPS: Final = 1000
_SLICE: Final = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Data of an image in a store that is no location of it: being written, staged, or to be removed.

    Attributes:
        store: the name of the store.
        token: the token of its upload. None: it is known to be the image's, whatever the store says of tokens.
        uri: the location; None until the store named it, and nothing is written before that.
        until: when to be removed: until then its writer may be alive, and it must be looked for again.
    """

    store: str
    token: str | None = None
    uri: str | None = None
    until: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a repository keeps of an image. `to_dict` and `from_dict` make plain values of it, for any database.

    Attributes:
        image: the image.
        revision: grows by one with each change; ``compare_and_swap`` compares it.
        uploads: how many uploads and imports were begun.
        upload: the one that is under way.
        algorithms: the digests that it computes.
        staged: data that waits to be imported.
        garbage: data that is to be removed.
        worker: who works on it, or None.
        lease_until: when ``worker`` counts as dead.
    """

    image: Image
    revision: int = 0
    uploads: int = 0
    upload: Data | None = None
    algorithms: tuple[str, ...] = ()
    staged: Data | None = None
    garbage: tuple[Data, ...] = ()
    worker: str | None = None
    lease_until: datetime | None = None

    @property
    def token(self) -> str | None:
        """The token of the upload that is under way."""
        return None if self.upload is None else self.upload.token

    def to_dict(self) -> dict[str, Any]:
        """Plain values: dicts, lists, text, numbers, booleans and None. Times are text (ISO 8601)."""
        found: dict[str, Any] = _plain(self)
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """What `to_dict` made, as a record again."""
        image = dict(values["image"])
        image["status"] = ImageStatus(image["status"])
        image["before_delete"] = image["before_delete"] and ImageStatus(image["before_delete"])
        image["locations"] = tuple(ImageLocation(**location) for location in image["locations"])
        for name in ("created_at", "updated_at", "deleted_at"):
            image[name] = _time(image[name])
        record = dict(values)
        record["image"] = Image(**image)
        record["algorithms"] = tuple(record["algorithms"])
        record["garbage"] = tuple(_data(each) for each in record["garbage"])
        for name in ("upload", "staged"):
            record[name] = record[name] and _data(record[name])
        record["lease_until"] = _time(record["lease_until"])
        return cls(**record)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, ImageStatus) else value


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _data(values: Mapping[str, Any]) -> Data:
    return Data(**{**values, "until": _time(values["until"])})


class Repository(Protocol):
    """The host's database of images. Called from many threads at once; a change is durable when its call returns.

    What a method raises beside the errors named here goes through to the caller of the `Lifecycle`.
    """

    def get(self, image_id: str, /) -> Record:
        """The record of an image. Raises `NotFound`."""

    def create(self, record: Record, /) -> None:
        """Keep a new record. Raises `AlreadyExists` if there is one of that id, also of a deleted image."""

    def compare_and_swap(self, old: Record, new: Record, /) -> bool:
        """Replace the record of ``old.image.id`` by ``new`` if its revision still is ``old.revision``.

        True if it was replaced. All in one step: of two who replace the same revision, one gets False.
        """

    def list_by_status(self, *statuses: ImageStatus) -> Iterable[Record]:
        """The records of all images in one of these statuses, in any order."""


class MemoryRepository:
    """A repository that is gone with its process: for tests, and as an example."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}

    def get(self, image_id: str, /) -> Record:
        """See `Repository`."""
        try:
            return self._records[image_id]
        except KeyError:
            raise NotFound("no image of that id", image_id=image_id) from None

    def create(self, record: Record, /) -> None:
        """See `Repository`."""
        with self._lock:
            if record.image.id in self._records:
                raise AlreadyExists("there is an image of that id", image_id=record.image.id)
            self._records[record.image.id] = record

    def compare_and_swap(self, old: Record, new: Record, /) -> bool:
        """See `Repository`."""
        with self._lock:
            found = self._records.get(old.image.id)
            if found is None or found.revision != old.revision:
                return False
            self._records[old.image.id] = new
            return True

    def list_by_status(self, *statuses: ImageStatus) -> Iterable[Record]:
        """See `Repository`."""
        with self._lock:
            return [record for record in self._records.values() if record.image.status in statuses]


_R_co = TypeVar("_R_co", covariant=True)


class _Store(Protocol):
    name: str

    def add(
        self,
        image_id: str,
        source: Any,
        *,
        size: int | None = ...,
        digests: Sequence[str] = ...,
        expected: Mapping[str, str] | None = ...,
        verifier: Verifier | None = ...,
        disk_format: str | None = ...,
        container_format: str | None = ...,
        policy: Any = ...,
        metadata: Mapping[str, str] | None = ...,
        max_size: int | None = ...,
        progress: Progress | None = ...,
        observer: Observer | None = ...,
        cancel: threading.Event | None = ...,
        token: str | None = ...,
        begun: Callable[[Location], object] | None = ...,
    ) -> AddResult: ...

    def stat(self, location: str) -> Stat: ...

    def delete(self, location: str) -> None: ...

    def get(self, location: str, *, cancel: threading.Event | None = ...) -> Any: ...

    def verify(
        self, location: str, *, digests: Sequence[str] = ..., cancel: threading.Event | None = ...
    ) -> VerifyResult: ...

    def inspect(
        self,
        location: str,
        *,
        disk_format: str | None = ...,
        container_format: str | None = ...,
        cancel: threading.Event | None = ...,
    ) -> Any: ...


class _Stores(Protocol[_R_co]):
    """What a `Lifecycle` needs of `imagestore.Stores`."""

    @property
    def default(self) -> _Store: ...

    def __getitem__(self, name: str, /) -> _Store: ...

    def get(
        self,
        locations: Sequence[Any],
        *,
        start: int = ...,
        stop: int | None = ...,
        expected: Mapping[str, str] | None = ...,
        progress: Progress | None = ...,
        cancel: threading.Event | None = ...,
    ) -> _R_co: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What `Lifecycle.recover` or `Lifecycle.scrub` made of an image; `error` if it must be tried again."""

    image: Image
    error: StoreError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """A way by which data comes."""

    started: Event
    completed: Event | None
    failed: Event


_UPLOAD: Final = _Kind(started=Event.UPLOAD_STARTED, completed=Event.UPLOAD_COMPLETED, failed=Event.UPLOAD_FAILED)
_STAGING: Final = _Kind(started=Event.STAGING_STARTED, completed=None, failed=Event.STAGING_FAILED)
_IMPORT: Final = _Kind(started=Event.IMPORT_STARTED, completed=Event.IMPORT_COMPLETED, failed=Event.IMPORT_FAILED)
_KINDS: Final = {ImageStatus.SAVING: _UPLOAD, ImageStatus.UPLOADING: _STAGING, ImageStatus.IMPORTING: _IMPORT}


class _Stop(threading.Event):
    """Set when it is set itself, or when the caller's own event is."""

    def __init__(self, other: threading.Event | None) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or (self._other is not None and self._other.is_set())

    def wait(self, timeout: float | None = None) -> bool:
        until = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = _SLICE if until is None else min(_SLICE, until - time.monotonic())
            if left <= 0:
                return False
            super().wait(left)
        return True


class _Hold:
    """A lease that this process has.

    Attributes:
        worker: the name in the record: the worker's own, and a part that no other hold has.
        stop: breaks off what is done under it.
        until: when it ends, if it is not renewed; None until the record says that it is ours.
        lost: somebody else has the image now.
        uri: where the upload goes, once that is known.
    """

    def __init__(self, image_id: str, worker: str, cancel: threading.Event | None) -> None:
        self.image_id = image_id
        self.worker = worker
        self.until: datetime | None = None
        self.stop = _Stop(cancel)
        self.lost = False
        self.uri: str | None = None

    def taken(self, record: Record) -> None:
        self.until = record.lease_until

    def lose(self) -> None:
        self.lost = True
        self.stop.set()


class _Keeper:
    """Renews all leases of a `Lifecycle`, in one thread that lives while there are any."""

    def __init__(self, every: float, renew: Callable[[_Hold], None]) -> None:
        self._every = every
        self._renew = renew
        self._change = threading.Condition()
        self._holds: dict[str, _Hold] = {}
        self._thread: threading.Thread | None = None

    def add(self, hold: _Hold) -> None:
        with self._change:
            self._holds[hold.worker] = hold
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="imagestore-leases", daemon=True)
                self._thread.start()

    def remove(self, hold: _Hold) -> None:
        with self._change:
            self._holds.pop(hold.worker, None)
            self._change.notify_all()

    def held(self, image_id: str | None = None) -> list[_Hold]:
        with self._change:
            return [hold for hold in self._holds.values() if image_id in (None, hold.image_id)]

    def _run(self) -> None:
        due = time.monotonic() + self._every
        while True:
            with self._change:
                while self._holds and (left := due - time.monotonic()) > 0:
                    self._change.wait(left)
                if not self._holds:
                    self._thread = None
                    return
            due = time.monotonic() + self._every
            for hold in self.held():
                self._renew(hold)


class _NotNow(Exception):
    """A record is not in the state that a step is for."""


class Lifecycle(Generic[_R_co]):
    """Images, their statuses and their data. Safe to use from many threads.

    All methods block; an async host calls the short ones in a thread, and the long ones (`upload`, `stage`,
    `import_image`, `open`) as `imagestore.aio` says: they take ``cancel`` like those of a store.
    """

    def __init__(
        self,
        stores: _Stores[_R_co],
        repository: Repository,
        *,
        worker: str | None = None,
        lease: float = 60.0,
        grace: float = 86400.0,
        kill_failed: bool = False,
        exclusive: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Images of ``repository`` in ``stores``. Does no I/O and starts no thread.

        Args:
            stores: an `imagestore.Stores`.
            repository: the host's database.
            worker: a name that no other living process uses for this repository. If it is the same again after a
                restart, `recover` need not wait for the leases of the process before. None: a new one each time.
            lease: seconds after which a worker that shows no life counts as dead. It is renewed three times as often.
            grace: seconds for which one that lost its lease might still be writing; data that it might have been
                writing is looked for again until they are over, and so long an image is not ``deleted``.
            kill_failed: a failed upload makes the image ``killed`` instead of ``queued``.
            exclusive: nobody else writes into these stores under the ids of these images. Then data of an unfinished
                upload is taken for the image's also where the store can't tell its token.
            clock: the time, timezone-aware.
        """
        self._stores = stores
        self._repository = repository
        self._name = worker
        self._lease = timedelta(seconds=lease)
        self._grace = timedelta(seconds=grace)
        self._kill_failed = kill_failed
        self._exclusive = exclusive
        self._clock = clock
        self._keeper = _Keeper(lease / 3, self._renew)

    # What is known

    def create(self, image: Image) -> Image:
        """Make a new image known, which must be ``queued``. Raises `AlreadyExists`, also for a deleted one's id."""
        if image.status is not ImageStatus.QUEUED:
            raise WrongStatus(f"a new image is queued, not {image.status}", image_id=image.id)
        now = self._clock()
        image = dataclasses.replace(image, created_at=now, updated_at=now)
        self._repository.create(Record(image=image))
        return image

    def get(self, image_id: str) -> Image:
        """The image. Raises `NotFound`."""
        return self._repository.get(image_id).image

    def update(
        self,
        image_id: str,
        *,
        disk_format: str | None = None,
        container_format: str | None = None,
        protected: bool | None = None,
    ) -> Image:
        """Change what may be changed; None leaves it. Raises `WrongStatus` for formats unless it is ``queued``."""

        def step(record: Record) -> Record:
            image = record.image
            if image.status in (ImageStatus.PENDING_DELETE, ImageStatus.DELETED):
                raise WrongStatus(f"an image that is {image.status} can't be changed", image_id=image_id)
            if disk_format is not None or container_format is not None:
                image = image.declare(disk_format=disk_format, container_format=container_format)
            if protected is not None:
                image = dataclasses.replace(image, protected=protected)
            return dataclasses.replace(record, image=dataclasses.replace(image, updated_at=self._clock()))

        return self._change(image_id, step).image

    # Data in and out

    def upload(
        self,
        image_id: str,
        source: Any,
        *,
        store: str | None = None,
        size: int | None = None,
        digests: Sequence[str] = ("sha256",),
        expected: Mapping[str, str] | None = None,
        verifier: Verifier | None = None,
        policy: Any = None,
        metadata: Mapping[str, str] | None = None,
        max_size: int | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        cancel: threading.Event | None = None,
    ) -> Image:
        """Store the data of an image that is ``queued``: it is ``saving`` meanwhile, and ``active`` at the end.

        ``store`` is the name of a store, or None for the default one. All others are as in `Store.add`; the formats
        that the image declares are checked.

        Raises `IllegalTransition` if it is not ``queued`` (of two uploads one gets this), `InvalidRequest` if it has
        no formats, `WrongStatus` if it is deleted meanwhile, and what `Store.add` raises. After an error the image is
        ``queued`` again (or ``killed``) and its data gone. If that could not be done, or nobody can tell, it stays
        ``saving`` until `recover` does it.
        """
        options = {
            "expected": expected,
            "verifier": verifier,
            "policy": policy,
            "metadata": metadata,
            "max_size": max_size,
            "progress": progress,
            "observer": observer,
        }
        return self._fill(_UPLOAD, image_id, source, size, store, digests, cancel, options)

    def stage(
        self,
        image_id: str,
        source: Any,
        *,
        store: str,
        size: int | None = None,
        max_size: int | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        cancel: threading.Event | None = None,
    ) -> Image:
        """Keep data in the store ``store``, unchecked, until `import_image` takes it: the image is ``uploading``.

        Raises what `upload` raises. After an error the image is ``queued`` again.
        """
        options = {"max_size": max_size, "progress": progress, "observer": observer}
        return self._fill(_STAGING, image_id, source, size, store, (), cancel, options)

    def import_image(
        self,
        image_id: str,
        source: Any = None,
        *,
        store: str | None = None,
        size: int | None = None,
        digests: Sequence[str] = ("sha256",),
        expected: Mapping[str, str] | None = None,
        verifier: Verifier | None = None,
        policy: Any = None,
        metadata: Mapping[str, str] | None = None,
        max_size: int | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        cancel: threading.Event | None = None,
    ) -> Image:
        """Store staged data, or that of a ``source``, with every check: ``importing`` meanwhile, ``active`` at the end.

        A ``source`` is for an image that is ``queued``: what the host fetches itself. Without one, what was staged is
        taken; it is removed at the end, also if the import fails. Arguments and errors are those of `upload`.
        """
        options = {
            "expected": expected,
            "verifier": verifier,
            "policy": policy,
            "metadata": metadata,
            "max_size": max_size,
            "progress": progress,
            "observer": observer,
        }
        return self._fill(_IMPORT, image_id, source, size, store, digests, cancel, options)

    def open(
        self,
        image_id: str,
        *,
        start: int = 0,
        stop: int | None = None,
        administrator: bool = False,
        verify: bool = True,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> _R_co:
        """Open the data for reading, or the part of it from ``start`` up to but not including ``stop``.

        A whole read ends with a check of all of the image's digests, unless ``verify`` is off. Raises `WrongStatus`
        where the status does not allow it to be read, and what `Stores.get` raises.
        """
        image = self.get(image_id)
        image.check_readable(administrator=administrator)
        whole = start == 0 and (stop is None or stop >= (image.size or 0))
        return self._stores.get(
            [location.uri for location in image.locations],
            start=start,
            stop=None if whole else stop,
            expected=image.digests if whole and verify else None,
            progress=progress,
            cancel=cancel,
        )

    # Open or closed to readers

    def deactivate(self, image_id: str) -> Image:
        """Let only administrators read an active image. Nothing happens if it is so already."""
        return self._toggle(image_id, Event.DEACTIVATED, ImageStatus.DEACTIVATED)

    def reactivate(self, image_id: str) -> Image:
        """Let everybody read a deactivated image again. Nothing happens if it is so already."""
        return self._toggle(image_id, Event.REACTIVATED, ImageStatus.ACTIVE)

    def _toggle(self, image_id: str, event: Event, wanted: ImageStatus) -> Image:
        def step(record: Record) -> Record:
            if record.image.status is wanted:
                return record
            return dataclasses.replace(record, image=record.image.on(event, at=self._clock()))

        return self._change(image_id, step).image

    # Away with it

    def delete(self, image_id: str, *, delayed: bool = False) -> Image:
        """Delete an image, at once, or ``delayed``: then data that can be read stays until `scrub` removes it.

        An upload that is under way breaks off. The image that is returned is ``deleted`` and its data gone, or it is
        ``pending_delete``: delayed, or because the store could not remove all of it, or because a worker may still be
        writing. `scrub` does the rest.

        Raises `Protected`, `IllegalTransition` if it is deleted already, and `InUse` if something still needs its
        data; then the image is as it was.
        """
        hold = self._hold(image_id)
        before: list[Image] = []

        def step(record: Record) -> Record:
            image, now = record.image, self._clock()
            before[:] = [image]
            if image.protected:
                raise Protected("the image is protected from deletion", image_id=image_id)
            rest = dataclasses.replace(record, upload=None, algorithms=(), staged=None, worker=None, lease_until=None)
            if delayed and image.locations:
                return dataclasses.replace(rest, image=image.on(Event.DELETE_DELAYED, at=now))
            garbage = _all_data(record, now + self._grace)
            if not garbage:
                return dataclasses.replace(rest, image=image.on(Event.DELETED, at=now))
            gone = dataclasses.replace(image.on(Event.DELETE_DELAYED, at=now), locations=(), before_delete=None)
            return dataclasses.replace(rest, image=gone, garbage=garbage, **self._claim(hold))

        with self._holding(hold):
            record = self._change(image_id, step)
            for other in self._keeper.held(image_id):
                if other is not hold:
                    other.lose()
            if record.worker != hold.worker:
                return record.image
            hold.taken(record)
            removed, error = self._remove_all(record)
            try:
                if isinstance(error, InUse) and before[0].locations and not removed:
                    self._change(image_id, lambda record: self._undelete(record, hold, before[0]))
                    raise error
                return self._settle(hold, removed).image
            except WrongStatus:  # another worker has it by now, and removes the rest
                return self.get(image_id)

    def restore(self, image_id: str) -> Image:
        """Take a delayed deletion back. Raises `WrongStatus` if the data is being removed already."""

        def step(record: Record) -> Record:
            image = record.image
            if image.status is ImageStatus.PENDING_DELETE and not image.locations:
                raise WrongStatus("the image can't be restored: its data is being removed", image_id=image_id)
            return dataclasses.replace(record, image=image.on(_back(image), at=self._clock()))

        return self._change(image_id, step).image

    def scrub(self, *, older_than: float = 0.0, threads: int = 1, thorough: bool = False) -> list[Result]:
        """Remove the data of deleted images. What can't be removed now is tried again by the next scrub.

        Any number of workers may scrub at once, and share the work.

        Args:
            older_than: seconds that a delayed deletion must have waited.
            threads: how many images to work on at once.
            thorough: look at all images, also at those that live: a worker that died twice over, or a staging store
                that did not answer, may have left data beside them. Reads every record.

        Returns a result for each image that was worked on.
        """
        before = self._clock() - timedelta(seconds=older_than)
        statuses = [ImageStatus.PENDING_DELETE]
        if thorough:
            statuses += [status for status in ImageStatus if status not in (*statuses, ImageStatus.DELETED)]
        due = [
            record.image.id
            for record in self._repository.list_by_status(*statuses)
            if record.image.status is ImageStatus.PENDING_DELETE or record.garbage
        ]
        with ThreadPoolExecutor(threads, "imagestore-scrub") as pool:
            return [result for result in pool.map(lambda image_id: self._scrub(image_id, before), due) if result]

    def recover(self) -> list[Result]:
        """Put right what dead workers left: uploads, stagings and imports whose lease has run out.

        If the data stands in the store with the token of that upload, all of it is stored and was checked: then it is
        read once, for size and digests, and the upload counts as completed. Otherwise it has failed.

        To be called when a host starts, and every now and then. Any number of workers may do it at once.

        Returns a result for each image that was worked on. One has an error if the store could not be asked, or if
        nobody can tell whose data stands there.
        """
        results = [
            self._recover(record.image.id)
            for record in list(self._repository.list_by_status(*_KINDS))
            if self._abandoned(record)
        ]
        return [result for result in results if result is not None]

    # Records

    def _change(self, image_id: str, step: Callable[[Record], Record]) -> Record:
        """Replace the record by what ``step`` makes of it, which is called again if somebody came first."""
        for _ in range(_SWAPS):
            old = self._repository.get(image_id)
            new = step(old)
            if new is old:
                return old
            new = dataclasses.replace(new, revision=old.revision + 1)
            if self._repository.compare_and_swap(old, new):
                return new
        raise Unavailable("the record of the image changes all the time", image_id=image_id)

    def _worker(self) -> str:
        return self._name or f"{socket.gethostname()}-{os.getpid()}"

    def _hold(self, image_id: str, cancel: threading.Event | None = None) -> _Hold:
        worker = f"{self._worker()}/{secrets.token_hex(8)}"
        return _Hold(image_id, worker, cancel)

    def _claim(self, hold: _Hold) -> dict[str, Any]:
        return {"worker": hold.worker, "lease_until": self._clock() + self._lease}

    @contextlib.contextmanager
    def _holding(self, hold: _Hold) -> Iterator[None]:
        self._keeper.add(hold)
        try:
            yield
        finally:
            self._keeper.remove(hold)

    def _renew(self, hold: _Hold) -> None:
        if hold.until is None:  # the record does not say so yet
            return
        try:
            hold.taken(
                self._change(
                    hold.image_id, lambda record: dataclasses.replace(self._ours(record, hold), **self._claim(hold))
                )
            )
        except (WrongStatus, NotFound):
            hold.lose()
        except Exception:  # noqa: BLE001 - the database may be back before the lease ends
            if self._clock() >= hold.until:
                hold.lose()

    def _ours(self, record: Record, hold: _Hold) -> Record:
        """``record``, if the lease in it still is ours. Raises `WrongStatus`."""
        if record.worker != hold.worker:
            raise WrongStatus(
                f"the image is {record.image.status}, and this worker does not work on it any more",
                image_id=record.image.id,
            )
        return record

    def _leased(self, record: Record) -> bool:
        """Whether a worker that counts as alive works on it."""
        if record.worker is None or record.lease_until is None or record.lease_until <= self._clock():
            return False
        predecessor = self._name is not None and record.worker.rpartition("/")[0] == self._name
        return not predecessor or any(hold.worker == record.worker for hold in self._keeper.held())

    def _abandoned(self, record: Record) -> bool:
        """Whether it is in a status in which somebody should be at work, and nobody is."""
        staged = record.image.status is ImageStatus.UPLOADING and record.staged is not None and record.upload is None
        return not staged and not self._leased(record)

    # Data comes

    def _fill(
        self,
        kind: _Kind,
        image_id: str,
        source: Any,
        size: int | None,
        store_name: str | None,
        digests: Sequence[str],
        cancel: threading.Event | None,
        options: dict[str, Any],
    ) -> Image:
        store = self._stores.default if store_name is None else self._stores[store_name]
        hold = self._hold(image_id, cancel)
        token = secrets.token_hex(16)

        def start(record: Record) -> Record:
            image = record.image.on(kind.started, at=self._clock())
            if kind is _IMPORT and (source is None) != (record.image.status is ImageStatus.UPLOADING):
                raise WrongStatus(
                    "data was staged: it is imported without a source" if source is not None else "no data is staged",
                    image_id=image_id,
                )
            if record.image.status is ImageStatus.UPLOADING and record.staged is None:
                raise WrongStatus("the data is still being staged", image_id=image_id)
            return dataclasses.replace(
                record,
                image=image,
                uploads=record.uploads + (kind is not _STAGING),
                upload=Data(store=store.name, token=token),
                algorithms=tuple(digests),
                **self._claim(hold),
            )

        with self._holding(hold):
            record = self._change(image_id, start)
            hold.taken(record)
            try:
                added = self._add(kind, store, source, size, record, hold, {**options, "digests": tuple(digests)})
            except BaseException as error:
                lost = hold.lost
                self._take_back(kind, hold, Data(store=store.name, token=token, uri=hold.uri), error)
                if lost and isinstance(error, Cancelled):
                    raise WrongStatus(
                        "broken off: the image was deleted, or another worker took it over", image_id=image_id
                    ) from error
                raise
            # What fails from here on is no failure of the upload: the data stands, and `recover` finds it.
            return self._complete(kind, hold, token, added).image

    def _add(
        self,
        kind: _Kind,
        store: _Store,
        source: Any,
        size: int | None,
        record: Record,
        hold: _Hold,
        options: dict[str, Any],
    ) -> AddResult:
        """Store it, at a place where no other upload ever was or will be."""
        image, token = record.image, str(record.token)
        first = kind is not _STAGING and record.uploads == 1
        data_id = image.id if first else f"{image.id}.{token[:16]}"

        def begun(location: Location) -> None:
            hold.uri = location.uri
            self._change(image.id, note)

        def note(record: Record) -> Record:
            upload = self._ours(record, hold).upload
            assert upload is not None
            return dataclasses.replace(record, upload=dataclasses.replace(upload, uri=hold.uri))

        options |= {"token": token, "begun": begun, "cancel": hold.stop}
        if kind is not _STAGING:
            options |= {"disk_format": image.disk_format, "container_format": image.container_format}
        if source is not None or record.staged is None:
            return store.add(data_id, source, size=size, **options)
        with self._stores[record.staged.store].get(str(record.staged.uri), cancel=hold.stop) as reader:
            return store.add(data_id, reader, size=reader.size, **options)

    def _complete(self, kind: _Kind, hold: _Hold, token: str, added: AddResult) -> Record:
        virtual_size = None if added.inspection is None else added.inspection.virtual_size
        try:
            return self._finish(kind, hold, added.size, virtual_size, added.digests)
        except (WrongStatus, NotFound):
            data = Data(store=added.store, uri=added.location.uri)
            with contextlib.suppress(StoreError):
                record = self._let_go(hold, data, token)
                if record is not None and any(location.uri == data.uri for location in record.image.locations):
                    return record  # who took it over found the data, and completed the upload
            raise

    def _finish(
        self, kind: _Kind, hold: _Hold, size: int, virtual_size: int | None, digests: Mapping[str, str]
    ) -> Record:
        """The data of an upload stands: write that down, and remove what was staged for it."""
        with contextlib.suppress(StoreError):  # what is left of it becomes garbage
            staged = self._ours(self._repository.get(hold.image_id), hold).staged
            if staged is not None:
                self._remove(staged)
                self._change(hold.image_id, lambda record: dataclasses.replace(self._ours(record, hold), staged=None))

        def step(record: Record) -> Record:
            upload = self._ours(record, hold).upload
            assert upload is not None
            assert upload.uri is not None
            done = dataclasses.replace(record, upload=None, algorithms=(), worker=None, lease_until=None)
            if kind.completed is None:
                image = dataclasses.replace(record.image, updated_at=self._clock())
                return dataclasses.replace(done, image=image, staged=upload)
            image = record.image.on(
                kind.completed,
                at=self._clock(),
                size=size,
                virtual_size=virtual_size,
                digests=digests,
                locations=(ImageLocation(store=upload.store, uri=upload.uri),),
            )
            left = () if record.staged is None else (record.staged,)
            return dataclasses.replace(done, image=image, staged=None, garbage=(*record.garbage, *left))

        return self._change(hold.image_id, step)

    def _take_back(self, kind: _Kind, hold: _Hold, data: Data, cause: BaseException) -> None:
        """After a failed upload of ours: the data goes, then the status. What fails here is left to `recover`."""
        try:
            try:
                self._give_up(kind, hold, None)
            except (WrongStatus, NotFound):
                self._let_go(hold, data, data.token)
        except Exception as error:  # noqa: BLE001 - the error that led here matters more
            cause.add_note(f"the image stays as it is until recover() sees to it: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                self._release(hold)

    def _give_up(self, kind: _Kind, hold: _Hold, until: datetime | None) -> Record:
        """What was uploaded is removed, and looked for ``until`` then. Raises `WrongStatus` if the lease is lost."""

        def doom(record: Record) -> Record:
            # From here on nobody can make an image of it, so that it can be removed at any time.
            garbage = [*self._ours(record, hold).garbage]
            if record.upload is not None and record.upload.uri is not None:
                garbage.append(dataclasses.replace(record.upload, until=until))
            if record.staged is not None:
                garbage.append(record.staged)
            return dataclasses.replace(record, upload=None, algorithms=(), staged=None, garbage=tuple(garbage))

        removed, error = self._remove_all(self._change(hold.image_id, doom))
        if error is not None:
            raise error
        event = Event.UPLOAD_KILLED if kind is _UPLOAD and self._kill_failed else kind.failed

        def fail(record: Record) -> Record:
            rest = _without(self._ours(record, hold), removed)
            image = record.image.on(event, at=self._clock())
            return dataclasses.replace(rest, image=image, worker=None, lease_until=None)

        return self._change(hold.image_id, fail)

    def _let_go(self, hold: _Hold, data: Data, token: str | None) -> Record | None:
        """Another worker has the image: remove what was uploaded with ``token``, unless it is needed now."""
        try:
            record = self._repository.get(hold.image_id)
        except NotFound:
            self._remove(data)
            return None
        tokens = {record.token, record.staged and record.staged.token}
        uris = {location.uri for location in record.image.locations}
        if token not in tokens and data.uri not in uris:
            self._remove(data)
            self._forget(hold.image_id, token)
        return record

    def _release(self, hold: _Hold) -> None:
        """Let others take over at once."""
        self._change(
            hold.image_id, lambda record: dataclasses.replace(self._ours(record, hold), lease_until=self._clock())
        )

    # Data goes

    def _stands(self, data: Data) -> Stat | None:
        """What stands where ``data`` should, if it is that. Raises `Unsupported` if nobody can tell."""
        if data.uri is None:
            return None
        try:
            stat = self._stores[data.store].stat(data.uri)
        except NotFound:
            return None
        if data.token in (None, stat.token) or (stat.token is None and self._exclusive):
            return stat
        if stat.token is None:
            raise Unsupported(
                "the store can't tell which upload made what stands here: decide by hand, or set exclusive=True",
                store=data.store,
                location=data.uri,
            )
        return None

    def _remove(self, data: Data) -> None:
        """Remove ``data``, if it stands. Raises if it may stand still."""
        with contextlib.suppress(NotFound):
            if self._stands(data) is not None:
                self._stores[data.store].delete(str(data.uri))

    def _remove_all(self, record: Record) -> tuple[list[Data], StoreError | None]:
        """Remove the garbage of ``record``: what is gone for good, and the first error."""
        removed: list[Data] = []
        first: StoreError | None = None
        for data in record.garbage:
            try:
                self._remove(data)
            except StoreError as error:
                first = first or error
            else:
                if data.until is None or data.until <= self._clock():
                    removed.append(data)
        return removed, first

    def _settle(self, hold: _Hold, removed: Sequence[Data]) -> Record:
        """Strike out what was removed, and give the image back."""

        def step(record: Record) -> Record:
            rest = _without(self._ours(record, hold), removed)
            return dataclasses.replace(self._scrubbed(rest), worker=None, lease_until=None)

        return self._change(hold.image_id, step)

    def _forget(self, image_id: str, token: str | None) -> None:
        """Who uploaded with ``token`` says itself that nothing is left: nobody need look for it any longer."""

        def step(record: Record) -> Record:
            rest = _without(record, [each for each in record.garbage if each.token == token])
            return record if rest.garbage == record.garbage else self._scrubbed(rest)

        self._change(image_id, step)

    def _scrubbed(self, record: Record) -> Record:
        image = record.image
        if image.status is not ImageStatus.PENDING_DELETE or image.locations or record.garbage:
            return record
        image = image.on(Event.SCRUBBED, at=self._clock())
        return dataclasses.replace(record, image=image, worker=None, lease_until=None)

    def _undelete(self, record: Record, hold: _Hold, before: Image) -> Record:
        self._ours(record, hold)
        image = dataclasses.replace(record.image, locations=before.locations, before_delete=before.status)
        uris = {location.uri for location in before.locations}
        return dataclasses.replace(
            record,
            image=image.on(_back(image), at=self._clock()),
            garbage=tuple(data for data in record.garbage if data.token is not None or data.uri not in uris),
            worker=None,
            lease_until=None,
        )

    def _scrub(self, image_id: str, before: datetime) -> Result | None:
        hold = self._hold(image_id)

        def take(record: Record) -> Record:
            image = record.image
            if self._leased(record) or record.upload is not None:
                raise _NotNow
            if image.status is not ImageStatus.PENDING_DELETE:
                if not record.garbage:
                    raise _NotNow
                return dataclasses.replace(record, **self._claim(hold))
            if image.locations and image.deleted_at is not None and image.deleted_at > before:
                raise _NotNow
            garbage = _all_data(record, self._clock())
            image = dataclasses.replace(image, locations=(), before_delete=None)
            return dataclasses.replace(record, image=image, garbage=garbage, **self._claim(hold))

        try:
            with self._holding(hold):
                record = self._change(image_id, take)
                hold.taken(record)
                removed, error = self._remove_all(record)
                return Result(image=self._settle(hold, removed).image, error=error)
        except (_NotNow, NotFound, WrongStatus):
            return None  # another worker has it

    def _recover(self, image_id: str) -> Result | None:
        hold = self._hold(image_id)

        def take(record: Record) -> Record:
            if record.image.status not in _KINDS or not self._abandoned(record):
                raise _NotNow
            return dataclasses.replace(record, **self._claim(hold))

        try:
            with self._holding(hold):
                record = self._change(image_id, take)
                hold.taken(record)
                try:
                    return Result(image=self._decide(record, hold).image)
                except WrongStatus:
                    raise
                except StoreError as error:
                    self._release(hold)
                    return Result(image=record.image, error=error)
        except (_NotNow, NotFound, WrongStatus):
            return None  # another worker has it

    def _decide(self, record: Record, hold: _Hold) -> Record:
        """What became of the upload of a worker that is dead?"""
        kind, upload = _KINDS[record.image.status], record.upload
        if upload is not None and (stat := self._stands(upload)) is not None:
            with contextlib.suppress(NotFound):
                return self._finish(kind, hold, *self._look(record, upload, stat, hold))
        # Its worker may be slow instead of dead, and bring the upload to its end: it is looked for again.
        return self._give_up(kind, hold, self._clock() + self._grace)

    def _look(self, record: Record, upload: Data, stat: Stat, hold: _Hold) -> tuple[int, int | None, Mapping[str, str]]:
        """Size, virtual size and digests of data that stands."""
        if record.image.status is ImageStatus.UPLOADING:
            return stat.size, None, {}
        store, uri, image = self._stores[upload.store], str(upload.uri), record.image
        found = store.inspect(
            uri, disk_format=image.disk_format, container_format=image.container_format, cancel=hold.stop
        )
        if not record.algorithms:
            return stat.size, found.virtual_size, {}
        verified = store.verify(uri, digests=record.algorithms, cancel=hold.stop)
        return verified.size, found.virtual_size, verified.digests


def _all_data(record: Record, until: datetime) -> tuple[Data, ...]:
    """All data of an image, to be removed; that of an upload may come up until then."""
    found = list(record.garbage)
    if record.upload is not None and record.upload.uri is not None:
        found.append(dataclasses.replace(record.upload, until=until))
    if record.staged is not None:
        found.append(record.staged)
    found += [Data(store=location.store, uri=location.uri) for location in record.image.locations]
    return tuple(found)


def _without(record: Record, removed: Sequence[Data]) -> Record:
    return dataclasses.replace(record, garbage=tuple(data for data in record.garbage if data not in removed))


def _back(image: Image) -> Event:
    closed = image.before_delete is ImageStatus.DEACTIVATED
    return Event.RESTORED_DEACTIVATED if closed else Event.RESTORED
