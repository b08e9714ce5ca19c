"""Adding one image to one store, or to several in one pass over its source."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import re
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, cast

from imagestore._connection import Connection
from imagestore._digest import Digests, check_expected
from imagestore._models import AddResult, Location, Progress, Stat, Verifier
from imagestore._pool import Engine, Share
from imagestore._record import Record, quiet
from imagestore._retry import Backoff
from imagestore._source import Source
from imagestore._transfer import BlockPlan, InDoubt, Target, Transfer, commit, common
from imagestore.driver import Capabilities, Hints, Upload
from imagestore.errors import AlreadyExists, InvalidRequest, LimitExceeded, SizeMismatch, StoreError

if TYPE_CHECKING:
    from imagestore.formats import Inspection, Inspector

__all__ = ["Adding", "Outcome", "Request", "add", "check_metadata", "request"]

_log = logging.getLogger("imagestore")

_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be added, checked: the arguments of ``Store.add`` that are the same for every store."""

    source: Source
    size: int | None
    max_size: int
    plan: BlockPlan
    share: Share
    digests: Digests
    expected: Mapping[str, str]
    verifier: Verifier | None
    inspector: Inspector | None
    metadata: Mapping[str, str]
    progress: Progress | None
    cancel: threading.Event | None
    begun: Callable[[Location], object] | None


def request(
    source: Source,
    all_caps: Sequence[Capabilities],
    engine: Engine,
    *,
    size: int | None,
    digests: Sequence[str],
    expected: Mapping[str, str] | None,
    verifier: Verifier | None,
    inspector: Inspector | None,
    metadata: Mapping[str, str] | None,
    max_size: int | None,
    progress: Progress | None,
    cancel: threading.Event | None,
    block_size: int | None,
    begun: Callable[[Location], object] | None = None,
) -> Request:
    """Check the arguments of an add to backends of these capabilities. Raises `InvalidRequest` or what it says."""
    names, wanted = check_expected(digests, expected)
    size = _declared(size, source)
    limit = engine.limits.max_size if max_size is None else min(max_size, engine.limits.max_size)
    plan = BlockPlan(common(all_caps) if len(all_caps) > 1 else all_caps[0], size, limit, block_size)
    if size is None and any(caps.needs_size for caps in all_caps):
        raise InvalidRequest("this backend needs to know the size beforehand: pass size=")
    if size is not None and size > limit:
        raise LimitExceeded(f"the image has {size} bytes, the limit is {limit}")
    if size is not None and plan.capacity is not None and size > plan.capacity:
        raise LimitExceeded(f"the image has {size} bytes, the backend can hold {plan.capacity}")
    return Request(
        source=source,
        size=size,
        max_size=limit,
        plan=plan,
        share=engine.share(plan.enough),
        digests=Digests(names, engine.digest_pool),
        expected=wanted,
        verifier=verifier,
        inspector=inspector,
        metadata=check_metadata(metadata),
        progress=quiet(progress),
        cancel=cancel,
        begun=begun,
    )


def check_token(token: str | None) -> str:
    """A fresh token for an upload, or the one that the caller gives. Raises `InvalidRequest`."""
    if token is None:
        return secrets.token_hex(16)
    if not isinstance(cast("object", token), str) or not _TOKEN.fullmatch(token):
        raise InvalidRequest("a token has 32 lower-case hexadecimal digits")
    return token


def check_metadata(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """A copy that nobody changes. Raises `InvalidRequest` unless all is text."""
    kept = dict(metadata or {})
    if any(not isinstance(cast("object", text), str) for pair in kept.items() for text in pair):
        raise InvalidRequest("metadata is text: names and values are str")
    return MappingProxyType(kept)


def _declared(size: int | None, source: Source) -> int | None:
    if size is None:
        return source.size
    if isinstance(size, bool) or not isinstance(cast("object", size), int) or size < 0:
        raise InvalidRequest(f"size is a number of bytes or None, not {size!r}")
    if source.size is not None and source.size != size:
        raise SizeMismatch(f"{size} bytes were declared, the source has {source.size}")
    return size


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of it: for each store what stands there, or why nothing does."""

    stands: Mapping[Adding, AddResult]
    failed: Mapping[Adding, StoreError]


def add(addings: Sequence[Adding], request: Request) -> Outcome:
    """Read the source once, into every store at the same time. Each gets the image whole or not at all.

    Raises what every store has in common (the source failed, a digest differs, the caller cancelled), and the first
    store's error if no store is left.
    """
    stands: dict[Adding, AddResult] = {}
    failed: dict[Adding, StoreError] = {}
    begun: list[Adding] = []
    try:
        for adding in addings:
            with _collected(adding, failed):
                adding.begin(request)
                begun.append(adding)
        if not begun:
            raise failed[addings[0]]
        if request.begun is not None:
            for adding in begun:
                request.begun(adding.upload.location)
        transfer = Transfer(
            source=request.source,
            targets=[adding.target for adding in begun],
            share=request.share,
            plan=request.plan,
            size=request.size,
            max_size=request.max_size,
            digests=request.digests,
            expected=request.expected,
            verifier=request.verifier,
            inspector=request.inspector,
            progress=request.progress,
            cancel=request.cancel,
        )
        found = transfer.run()
        for adding in tuple(begun):
            with _collected(adding, failed):
                stands[adding] = adding.finish(transfer.total, found, transfer.inspection)
            begun.remove(adding)
    except BaseException as error:
        for adding in begun:
            adding.give_up(error)
        _forget_blocks(error)
        raise
    if not stands:
        raise failed[addings[0]]
    return Outcome(stands=stands, failed=failed)


def _forget_blocks(error: BaseException | None) -> None:
    """Image data must not live on in the traceback for as long as somebody keeps the error."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # What is suspended, such as the caller's coroutines, would be ended by it.
            if not frame.f_code.co_flags & _SUSPENDS:
                with contextlib.suppress(RuntimeError):  # it runs
                    frame.clear()
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _collected(adding: Adding, failed: dict[Adding, StoreError]) -> Iterator[None]:
    """One store's failure is its own."""
    try:
        yield
    except StoreError as error:
        adding.place(error)
        failed[adding] = error


class Adding:
    """One store's part of it. After `begin` came back, one of `finish` and `give_up` must be called.

    Attributes:
        upload: the driver's upload, from `begin` on.
        target: what a `Transfer` fills.
    """

    upload: Upload
    target: Target

    def __init__(
        self, connection: Connection, image_id: str, record: Record, *, abort_within: float, token: str | None = None
    ) -> None:
        self._connection = connection
        self._image_id = image_id
        self._token = check_token(token)
        self._abort_within = abort_within
        self._record = record

    @property
    def capabilities(self) -> Capabilities:
        return self._connection.capabilities

    def place(self, error: StoreError) -> None:
        """Say in ``error`` which store and image it is about."""
        self._connection.caller.place(error, "add", None, self._image_id)

    def begin(self, request: Request) -> None:
        """Make sure that the id is free, and create the upload. Raises `AlreadyExists`."""
        self._record.started(request.size)
        try:
            self._begin(request)
        except BaseException as error:
            self._record.ended(error)
            raise

    def _begin(self, request: Request) -> None:
        connection, image_id = self._connection, self._image_id
        notify, stop = self._record.retried, request.cancel
        hints = Hints(
            token=self._token, size=request.size, block_size=request.plan.size_of(0), metadata=request.metadata
        )
        if (
            connection.retrying("locate", lambda: connection.verbs.locate(image_id), notify=notify, stop=stop)
            is not None
        ):
            raise AlreadyExists("the id is taken", image_id=image_id)
        create = connection.verbs.create
        if connection.capabilities.repeatable_create:
            self.upload = connection.retrying(
                "create", lambda: create(image_id, hints), image_id=image_id, notify=notify, stop=stop
            )
        else:
            self.upload = connection.caller("create", create, None, image_id, image_id, hints)
        self.target = Target(self.upload, connection.caller, connection.pool(), connection.retry, self._record)

    def finish(self, size: int, digests: Mapping[str, str], inspection: Inspection | None) -> AddResult:
        """Make the image visible. Whatever is raised, the upload was taken back, or its commit is in doubt."""
        try:
            self._commit(size, digests)
            stat = self._look(size)
        except BaseException as error:
            self._record.ended(error)
            raise
        self._record.digests = digests
        self._record.ended(None)
        return AddResult(
            image_id=self._image_id,
            store=self._connection.caller.store,
            location=self.upload.location,
            size=size,
            digests=MappingProxyType(dict(digests)),
            stored=self.target.stored,
            stat=stat,
            inspection=inspection,
        )

    def _commit(self, size: int, digests: Mapping[str, str]) -> None:
        try:
            if self.target.error is not None:
                raise self.target.error
            self.upload.digests = MappingProxyType(dict(digests))
            self._record.commit(size)
            backoff = Backoff(self._connection.retry, notify=self._record.retried)
            commit(self.upload, size, self._token, self._connection.caller, backoff)
        except InDoubt as doubt:
            # Whether the image stands is unknown: taking the upload back might destroy it.
            doubt.error.message += "; the commit is in doubt: look for the image before you add it again"
            self._record.abort_failed(self._token, doubt.error)
            raise doubt.error from doubt.__cause__
        except BaseException:
            self._abort()
            raise

    def give_up(self, error: BaseException) -> None:
        """Take the upload back because of ``error``."""
        self._abort()
        self._record.ended(error)

    def _abort(self) -> None:
        """The error that led here matters more than one that happens now."""
        policy = dataclasses.replace(self._connection.retry, total=self._abort_within)
        backoff = Backoff(policy, notify=self._record.retried)
        while True:
            try:
                return self._connection.caller("abort", self.upload.abort, self.upload.location)
            except StoreError as error:
                try:
                    backoff.failed(error, "abort")
                except StoreError:
                    self._record.abort_failed(self._token, error)
                    _log.warning("upload %s was not taken back and is left for collect(): %s", self._token, error)
                    return None

    def _look(self, size: int) -> Stat:
        """What stands after the commit. The image is stored: a backend that fails only now changes nothing of that."""
        connection, place = self._connection, self.upload.location
        try:
            stat = connection.retrying(
                "stat", lambda: connection.driver.stat(place), place, notify=self._record.retried
            )
        except StoreError as error:
            _log.warning("the image is stored, but can't be looked at: %s", error)
            return Stat(size=size, token=self._token)
        if stat.size == size:
            return stat
        if stat.token == self._token:
            with contextlib.suppress(StoreError):
                connection.caller("delete", connection.verbs.delete, place, None, place)
        raise SizeMismatch(f"{size} bytes were stored, and the backend has {stat.size}", location=place.uri)
