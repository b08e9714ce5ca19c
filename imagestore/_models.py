"""Values that cross the doors of the library: frozen, keyword-only, without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from imagestore.errors import StoreError, redact

if TYPE_CHECKING:
    from imagestore.formats import Inspection

__all__ = [
    "AbortFailed",
    "AddResult",
    "AddedToMany",
    "BlockStored",
    "CommitStarted",
    "Event",
    "Leftover",
    "Limits",
    "Location",
    "Observer",
    "Progress",
    "Retried",
    "Retry",
    "Stat",
    "StoredImage",
    "Timeouts",
    "TransferEnded",
    "TransferStarted",
    "Usage",
    "Verifier",
    "VerifyResult",
]

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where an image is: made by a driver, never by hand. ``parse(location.uri)`` gives an equal one.

    Attributes:
        uri: the canonical text; never holds credentials.
        key: the driver's own parts (a path; a bucket and a key; …), so that it parses only once.
        image_id: the id of the image, where the location tells it.
    """

    uri: str
    key: tuple[str, ...] = ()
    image_id: str | None = None

    def __str__(self) -> str:
        return redact(self.uri)

    def __repr__(self) -> str:
        return f"Location({redact(self.uri)!r})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat:
    """What a backend knows of a stored image.

    Attributes:
        size: length of the image in bytes, exact also where the backend rounds up.
        version: changes whenever the bytes may have changed (an ETag, inode and mtime, a snapshot id); None
            where the backend has no such thing.
        token: the token of the upload that made it, where the backend keeps it.
        modified: when it was stored, timezone-aware.
        metadata: the metadata given to ``add``, where the backend keeps it.
    """

    size: int
    version: str | None = None
    token: str | None = None
    modified: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """One entry of ``Store.list()``. `size` (bytes) and `modified` are None where a listing does not tell them."""

    image_id: str
    location: Location
    size: int | None = None
    modified: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Room in the backend, in bytes. None: the backend does not say."""

    total: int | None = None
    used: int | None = None
    free: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """What an unfinished upload, or an unfinished delete, left behind; also an upload that still runs.

    Attributes:
        token: the token of its upload, from the mark that ``create`` wrote; the backend's own id of the upload where
            a listing does not show the token.
        image_id: the id it was to get, where the mark keeps it.
        bytes: how much it holds, where the backend tells.
        started, last_activity: timezone-aware; `last_activity` decides what is old.
        alive: True if its uploader is known to run, False if it is known to be gone, None if nobody knows.
        key: the driver's own parts for ``discard``.
    """

    token: str
    image_id: str | None = None
    bytes: int | None = None
    started: datetime | None = None
    last_activity: datetime | None = None
    alive: bool | None = None
    key: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AddResult:
    """What ``Store.add`` stored.

    Attributes:
        image_id: the id.
        store: name of the store.
        location: where it is now.
        size: its length in bytes.
        digests: algorithm to lower-case hexadecimal digest of all its bytes.
        stored: bytes really sent to the backend: less than `size` where runs of zeros were skipped.
        stat: what the backend said after the commit.
        inspection: what the image is, if a format was declared or a policy given.
    """

    image_id: str
    store: str
    location: Location
    size: int
    digests: Mapping[str, str]
    stored: int
    stat: Stat
    inspection: Inspection | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedToMany:
    """What ``Stores.add`` did: by name of store, the results of those that have the image, and the others' errors."""

    results: Mapping[str, AddResult]
    errors: Mapping[str, StoreError]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """What ``Store.verify`` read: length in bytes and the digests of all bytes."""

    location: Location
    size: int
    digests: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a `Stores` (or a lone `Store`) may use.

    Attributes:
        memory: bytes of image data that one transfer may hold; two blocks where the blocks are larger.
        memory_total: bytes of image data that all transfers together may hold.
        workers: threads that write, read and hash: one pool of this size per store, and one for all digests.
        max_transfers: how many adds and downloads may run at once in one store; None is no limit.
        max_size: the largest image that `add` accepts, in bytes.
    """

    memory: int = 64 * MIB
    memory_total: int = 512 * MIB
    workers: int = 16
    max_transfers: int | None = None
    max_size: int = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """When a temporary error is tried again.

    Attributes:
        attempts: how often a call is tried in all; progress (a byte read) starts the count anew.
        first: seconds before the second attempt; each further wait is twice as long, with jitter.
        longest: the longest wait in seconds, also against a backend's ``Retry-After``.
        total: seconds after which no further attempt is begun; progress renews it.
    """

    attempts: int = 5
    first: float = 0.25
    longest: float = 20.0
    total: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Seconds without any answer after which a backend counts as stalled. A slow transfer is never cut.

    Attributes:
        connect: for a connection to be made.
        stall: between two signs of life on an open connection.
        abort: for all attempts together to take a failed upload back.
    """

    connect: float = 10.0
    stall: float = 60.0
    abort: float = 60.0


class Progress(Protocol):
    """``progress(done, total)``: bytes stored or read so far, and in all (None: unknown)."""

    def __call__(self, done: int, total: int | None, /) -> object: ...


class Verifier(Protocol):
    """A host's signature check: sees all bytes in order; `verify` raises if they are not as signed."""

    def update(self, data: bytes, /) -> object: ...

    def verify(self) -> object: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened in a transfer.

    Attributes:
        store, driver: where.
        operation: ``"add"``, ``"get"``, ``"download"``, ``"verify"``.
        image_id: for adds.
        transfer: the same for all events of one transfer.
        time: `time.time()` of the event.
    """

    store: str
    driver: str
    operation: str
    image_id: str | None
    transfer: str
    time: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferStarted(Event):
    """A transfer begins; `size` in bytes, None if unknown."""

    size: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStored(Event):
    """A block of `bytes` was written, `stored` of them sent (the rest was zeros), in `seconds`."""

    index: int
    bytes: int
    stored: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Retried(Event):
    """An attempt at `step` failed with a temporary `error` and will be repeated after `delay` seconds.

    `error_type` is the name of the error's class.
    """

    step: str
    error: str
    attempt: int
    delay: float
    error_type: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitStarted(Event):
    """All bytes are stored and every check passed; the image is made visible now."""

    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortFailed(Event):
    """A failed upload could not be taken back; ``Store.collect`` will. `token` names the leftover."""

    token: str
    error: str
    error_type: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferEnded(Event):
    """The transfer is over: `error` is None if it succeeded; `size` bytes, `stored` of them sent."""

    size: int
    stored: int
    seconds: float
    error: str | None
    error_type: str | None = None
    digests: Mapping[str, str] = field(default_factory=lambda: _NOTHING)


class Observer(Protocol):
    """Takes events, in order, in a thread of its own: it can neither slow nor break a transfer."""

    def __call__(self, event: Event, /) -> object: ...
