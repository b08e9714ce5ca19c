"""`Stores`: several stores by name, and everything that needs more than one."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

from imagestore._adding import Adding, add, request
from imagestore._models import AddedToMany, AddResult, Location, Observer, Progress, Verifier
from imagestore._pool import Engine
from imagestore._reader import FailoverReader, ImageReader, ResumingReader, check_range, open_image
from imagestore._source import SourceType, open_source
from imagestore._store import Store
from imagestore.errors import (
    ConfigurationError,
    InvalidLocation,
    InvalidRequest,
    SourceError,
    StoreError,
    Unsupported,
)

if TYPE_CHECKING:
    from imagestore.formats import Policy

__all__ = ["Stores"]


class Stores:
    """Stores by name, in the order of the configuration. Closes them all as a context manager.

    ``stores[name]``, ``name in stores``, ``len(stores)``; iteration gives the names.

    Attributes:
        default_name: the name of the default store, or None.
    """

    def __init__(self, stores: Iterable[Store], *, default: str | None = None, engine: Engine | None = None) -> None:
        """``engine`` is the one that the stores were made with. Raises `ConfigurationError` for a name used twice."""
        self._stores: dict[str, Store] = {}
        for store in stores:
            if store.name in self._stores:
                raise ConfigurationError(f"there are two stores named {store.name!r}", store=store.name)
            self._stores[store.name] = store
        if default is not None and default not in self._stores:
            raise ConfigurationError(f"the default store {default!r} is not among {self._names()}")
        self.default_name = default
        self._engine = engine

    def __getitem__(self, name: str) -> Store:
        """The store of that name. Raises `InvalidRequest` if there is none."""
        try:
            return self._stores[name]
        except KeyError:
            raise InvalidRequest(f"there is no store {name!r} among {self._names()}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._stores

    def __iter__(self) -> Iterator[str]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)

    def __repr__(self) -> str:
        return f"<Stores {self._names()}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def values(self) -> Iterator[Store]:
        """All stores, in the order of the configuration."""
        return iter(self._stores.values())

    @property
    def default(self) -> Store:
        """The default store: the one that the configuration names, or the only one there is."""
        if self.default_name is not None:
            return self._stores[self.default_name]
        if len(self._stores) == 1:
            return next(iter(self._stores.values()))
        raise InvalidRequest(f"there is no default among {self._names()}: set [imagestore] default_backend or name one")

    def for_location(self, location: Location | str) -> Store:
        """The store that serves a location. Raises `InvalidLocation` if none does; the message says why not."""
        reasons = []
        for store in self._stores.values():
            try:
                store.parse(location)
            except InvalidLocation as error:
                reasons.append(f"{store.name}: {error.message}")
            else:
                return store
        raise InvalidLocation(f"no store serves this location ({'; '.join(reasons)})", location=str(location))

    def by_weight(self, locations: Iterable[Location | str]) -> list[Location]:
        """Locations in the order in which to read: of heavier stores first, else as given.

        Those that no store serves are left out.
        """
        found: list[tuple[int, Location]] = []
        for location in locations:
            with contextlib.suppress(InvalidLocation):
                store = self.for_location(location)
                found.append((store.weight, store.parse(location)))
        return [location for _, location in sorted(found, key=lambda pair: -pair[0])]

    def add(
        self,
        image_id: str,
        source: SourceType,
        *,
        to: Sequence[str] | None = None,
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
    ) -> AddedToMany:
        """Store an image in several stores, reading its source once. Each gets it whole or not at all.

        A store that fails does not stop the others: the result says which stand. The slowest of them sets the pace.

        Args:
            to: names of stores; None is the default store alone.
            image_id, source, size, digests, expected, verifier, metadata, max_size: as in `Store.add`.
            disk_format, container_format, policy: as in `Store.add`.
            progress: called with the bytes that every store has that still takes part.
            observer: takes the events of each store.
            cancel: as in `Store.add`.

        Raises what `Store.add` raises if the source or a check fails, and the first store's error if no store has
        the image.
        """
        stores = [self.default] if to is None else [self[name] for name in to]
        if len(set(stores)) != len(stores) or not stores:
            raise InvalidRequest("the stores to add to are named once each, and there is at least one")
        names: dict[Adding, str] = {}
        errors: dict[str, StoreError] = {}
        for store in stores:
            try:
                names[store._adding(image_id, observer)] = store.name
            except StoreError as error:
                errors[store.name] = error
        if not names:
            raise errors[stores[0].name]
        with contextlib.ExitStack() as stack:
            for store in sorted(stores, key=lambda store: store.name):
                # Always in the same order, so that no two calls wait for each other's place.
                stack.enter_context(store._slot(cancel))
            stack.enter_context(stores[0]._context("add", image_id))
            what = request(
                stack.enter_context(contextlib.closing(open_source(source))),
                [adding.capabilities for adding in names],
                stores[0]._engine,
                size=size,
                digests=digests,
                expected=expected,
                verifier=verifier,
                inspector=stores[0]._inspector(disk_format, container_format, policy),
                metadata=metadata,
                max_size=max_size,
                progress=progress,
                cancel=cancel,
                block_size=stores[0]._block_size,
            )
            outcome = add(tuple(names), what)
        errors |= {names[adding]: error for adding, error in outcome.failed.items()}
        return AddedToMany(
            results=MappingProxyType({names[adding]: result for adding, result in outcome.stands.items()}),
            errors=MappingProxyType(errors),
        )

    def get(
        self,
        locations: Sequence[Location | str],
        *,
        start: int = 0,
        stop: int | None = None,
        expected: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> ImageReader:
        """Open an image that has several copies: the first of ``locations`` that works (see `by_weight`).

        A copy that fails before its first byte is followed by the next. Later, that is done only with ``expected``
        digests, and only with a copy of the same size: the end of the read then tells whether all was the image.

        Raises the first copy's error if all fail, and what `Store.get` raises.
        """
        wanted = check_range(start, stop, expected)
        if isinstance(locations, (str, Location)):
            raise InvalidRequest("locations is a list: to read one, use for_location(location).get(location)")
        if not locations:
            raise InvalidRequest("there is no location to read from")
        first = next((store for store in map(self._serving, locations) if store is not None), self.default)
        record = first._record("get", None)

        def opener(location: Location | str, begin: int, end: int | None) -> ResumingReader:
            return self.for_location(location)._read(location, begin, end, cancel, record)

        openers = [functools.partial(opener, location) for location in locations]
        reader = FailoverReader(openers, midway=bool(wanted))
        reader.open(start, stop)
        return open_image(reader, wanted, first._engine, progress, cancel, record)

    def copy(
        self,
        location: Location | str,
        to: str,
        *,
        image_id: str | None = None,
        source: str | None = None,
        digests: Sequence[str] = ("sha256",),
        expected: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        cancel: threading.Event | None = None,
    ) -> AddResult:
        """Copy an image into the store ``to``, whole or not at all; holes are kept.

        Where the destination can copy inside its backend and reaches the source, the bytes stay there; that is done
        only without ``expected``, and then the result has no digests. Otherwise they are read here, pinned to one
        version, and hashed on the way.

        Args:
            location: the image.
            to: name of the store that gets the copy.
            image_id: id of the copy; None: that of the image.
            source: name of the store to read from; None: the one that serves the location.
            digests, expected, metadata, progress, observer, cancel: as in `Store.add`.

        Raises what `Store.get` and `Store.add` raise.
        """
        target = self[to]
        origin = self.for_location(location) if source is None else self[source]
        place = origin.parse(location)
        image_id = image_id or place.image_id
        if image_id is None:
            raise InvalidRequest("the location does not tell the image's id: pass image_id=", location=str(place))
        if not expected and target._reaches(place):
            # Some can tell only when they are connected that a place is in another backend than their own, or holds
            # what they can't copy.
            with contextlib.suppress(InvalidLocation, Unsupported):
                return target._copy(place, image_id, metadata, observer)
        with origin.get(place, cancel=cancel) as reader:
            try:
                return target.add(
                    image_id,
                    reader,
                    size=reader.size,
                    digests=digests,
                    expected=expected,
                    metadata=metadata,
                    progress=progress,
                    observer=observer,
                    cancel=cancel,
                )
            except SourceError as error:
                # Here the source is a store of ours: its own error says more, and whether it may pass.
                if isinstance(error.__cause__, StoreError):
                    raise error.__cause__ from error.__cause__.__cause__
                raise

    def close(self) -> None:
        """Close all stores, also if one of them fails to."""
        first: StoreError | None = None
        for store in self._stores.values():
            try:
                store.close()
            except StoreError as error:
                first = first or error
        if self._engine is not None:
            self._engine.close()
        if first is not None:
            raise first

    def _serving(self, location: Location | str) -> Store | None:
        try:
            return self.for_location(location)
        except InvalidLocation:
            return None

    def _names(self) -> str:
        return ", ".join(self._stores) or "no stores"
