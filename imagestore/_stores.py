"""`Stores`: several stores by name, with one memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from imagestore._models import Location
from imagestore._pool import Engine
from imagestore._store import Store
from imagestore.errors import ConfigurationError, InvalidLocation, InvalidRequest, StoreError

__all__ = ["Stores"]


class Stores(Mapping[str, Store]):
    """Stores by name, in the order of the configuration. Closes them all as a context manager.

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
        return self._stores[name]

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

    def _names(self) -> str:
        return ", ".join(self._stores) or "no stores"
