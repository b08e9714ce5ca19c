"""The server of the memory driver: tables of rows, a few atomic requests, and nothing that knows of images.

The personalities in `imagestore.drivers._memory_personalities` are its clients and use no more than their real
backend offers: a conditional put, a rename that fails if the name is taken, an update of one row, and so on.
"""

from __future__ import annotations

import hashlib  # the server's side of a checked block: drivers never hash, this stands for their backend
import itertools
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Backend", "BackendError", "Client", "Code", "Row", "fresh"]

Code = Literal[
    "exists", "missing", "full", "busy", "invalid", "bad-digest", "unauthenticated", "closed", "unavailable",
    "rate-limited", "timeout"
]  # fmt: skip


class BackendError(Exception):
    """What the server answers: the native error of the memory driver.

    Attributes:
        code: what is wrong.
        retry_after: seconds, with ``rate-limited``.
    """

    def __init__(self, code: Code, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message or code)
        self.code: Final = code
        self.retry_after: Final = retry_after


@dataclass(slots=True)
class Row:
    """One thing on the server. Clients get copies; the bytes are never copied.

    Attributes:
        uid: given by the server, never used twice.
        pieces: position to data: the position is an offset in bytes, or a part number where the table says so.
        size: what the row says of its own length, in bytes: not always what it holds.
        stored: bytes held.
        links: rows that this one is made of: (table, key, length, etag).
        session: the client that made it, as long as that matters.
        project: whose it is, where the server knows of projects.
    """

    table: str
    key: str
    uid: int
    metadata: dict[str, str]
    pieces: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    stored: int = 0
    links: tuple[tuple[str, str, int, str], ...] = ()
    session: int = 0
    project: str | None = None
    etag: str = ""
    created: float = 0.0
    touched: float = 0.0
    alive: bool | None = None


@dataclass(slots=True)
class _Failure:
    operation: str | None
    error: Exception
    after: bool
    skip: int


class Backend:
    """A server in memory, shared by all drivers that are given it; thread-safe, lost with the process.

    A process that forks has a copy of it afterwards, not the same server; fork while no request is running.

    Attributes:
        capacity: bytes of data that fit; None: any.
        reachable: False makes every request fail, as if the server were gone.
        tells_alive: False makes it say of no upload whether its client still runs, as object stores do.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.reachable = True
        self.tells_alive = True
        self._lock = threading.Lock()
        self._tables: dict[str, dict[str, Row]] = {}
        self._stored = 0
        self._sessions: set[int] = set()
        self._held: dict[str, int] = {}
        self._failures: list[_Failure] = []
        self._numbers = itertools.count(1)

    def connect(self) -> Client:
        """A new session. What it makes counts as alive until the session is closed."""
        with self._lock:
            if not self.reachable:
                raise BackendError("unavailable", "the server can't be reached")
            session = next(self._numbers)
            self._sessions.add(session)
        return Client(self, session)

    @property
    def stored(self) -> int:
        """Bytes of data held."""
        return self._stored

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Make the image ``name`` (an id, or the native key) in use: it can't be removed while the context lasts."""
        with self._lock:
            self._held[name] = self._held.get(name, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._held[name] -= 1

    def fail_next(
        self, operation: str | None = None, error: Exception | None = None, *, after: bool = False, skip: int = 0
    ) -> None:
        """Let one request fail, once.

        Args:
            operation: name of the `Client` method; None: any.
            error: what to raise; a temporary error by default.
            after: carry the request out and then fail, so that its outcome is in doubt.
            skip: requests of that kind to let pass before.
        """
        with self._lock:
            failure = error or BackendError("unavailable", "the connection was cut")
            self._failures.append(_Failure(operation, failure, after, skip))

    def heal(self) -> None:
        """Forget the failures that have not happened yet."""
        with self._lock:
            self._failures.clear()

    def inventory(self) -> dict[tuple[str, str], tuple[int, int, dict[str, str]]]:
        """All rows, to compare: (table, key) to (uid, bytes held, metadata)."""
        with self._lock:
            return {
                (row.table, row.key): (row.uid, row.stored, dict(row.metadata))
                for table in self._tables.values()
                for row in table.values()
            }

    @contextmanager
    def _request(self, operation: str, session: int) -> Iterator[None]:
        with self._lock:
            failure = self._due(operation)
            if failure is not None and not failure.after:
                raise failure.error
            if not self.reachable:
                raise BackendError("unavailable", "the server can't be reached")
            if session not in self._sessions:
                raise BackendError("closed", "the session was closed")
            try:
                yield
            except BackendError:
                # An answer that does not arrive is lost whatever it says.
                if failure is None:
                    raise
        if failure is not None:
            raise failure.error

    def _due(self, operation: str) -> _Failure | None:
        for failure in self._failures:
            if failure.operation in (None, operation):
                if failure.skip == 0:
                    self._failures.remove(failure)
                    return failure
                failure.skip -= 1
        return None

    def _row(self, table: str, key: str, project: str | None, uid: int | None = None) -> Row:
        row = self._tables.get(table, {}).get(key)
        if row is None or row.project != project or uid not in (None, row.uid):
            raise BackendError("missing", f"no {key} in {table}")
        return row

    def _copy(self, row: Row, *, pieces: bool) -> Row:
        alive = row.session in self._sessions if self.tells_alive else None
        return replace(row, metadata=dict(row.metadata), pieces=dict(row.pieces) if pieces else {}, alive=alive)

    def _charge(self, row: Row, amount: int) -> None:
        if amount > 0 and self.capacity is not None and self._stored + amount > self.capacity:
            raise BackendError("full", f"no room for {amount} bytes more than the {self._stored} stored")
        self._stored += amount
        row.stored += amount

    def _touch(self, row: Row) -> None:
        row.etag = f"{next(self._numbers):x}"
        row.touched = time.time()

    def _check_free(self, row: Row) -> None:
        if self._held.get(row.key) or self._held.get(row.metadata.get("image_id", "")):
            raise BackendError("busy", f"{row.key} is in use")


class Client:
    """A session with the server: its methods are the requests. All raise `BackendError`.

    ``uid`` narrows a request down to one row: another row of the same name counts as ``missing``.

    Attributes:
        project: whose rows it sees and makes.
        refused: every request is refused until the client acts for a project.
    """

    def __init__(self, backend: Backend, session: int, project: str | None = None) -> None:
        self._backend = backend
        self._session = session
        self.project = project
        self.refused = False

    def acting_for(self, project: str) -> Client:
        """The same session, for ``project``."""
        return Client(self._backend, self._session, project)

    def close(self) -> None:
        """End the session. Its running requests end well; what it left unfinished isn't alive any more."""
        with self._backend._lock:
            self._backend._sessions.discard(self._session)

    def put(
        self,
        table: str,
        key: str,
        *,
        metadata: Mapping[str, str] | None = None,
        data: bytes = b"",
        digest: bytes | None = None,
        size: int | None = None,
        links: tuple[tuple[str, str, int, str], ...] = (),
        if_absent: bool = False,
        unique: str | None = None,
    ) -> Row:
        """Make a row, or replace it.

        ``exists`` if ``if_absent`` and there is one, or another row has the same value of the metadata key
        ``unique``. ``missing`` or ``invalid`` if what ``links`` name is not there, or not as they say.
        """
        _check(data, digest)
        with self._request("put"):
            server = self._backend
            rows = server._tables.setdefault(table, {})
            old = rows.get(key)
            metadata = dict(metadata or {})
            if old is not None and if_absent:
                raise BackendError("exists", f"{key} exists in {table}")
            if unique and any(row.metadata.get(unique) == metadata[unique] for row in rows.values()):
                raise BackendError("exists", f"{metadata[unique]} exists in {table}")
            for part_table, part_key, length, etag in links:
                part = server._row(part_table, part_key, self.project)
                if (part.size, part.etag) != (length, etag):
                    raise BackendError("invalid", f"{part_key} is not what the list says")
            row = Row(
                table=table,
                key=key,
                uid=next(server._numbers),
                metadata=metadata,
                size=len(data) if size is None else size,
                links=links,
                session=self._session,
                project=self.project,
                created=time.time(),
            )
            server._charge(row, len(data) - (old.stored if old else 0))
            row.stored = len(data)
            if data:
                row.pieces[0] = data
            server._touch(row)
            rows[key] = row
            return server._copy(row, pieces=False)

    def write(
        self, table: str, key: str, position: int, data: bytes, digest: bytes | None = None, *, uid: int | None = None
    ) -> None:
        """Put data into a row: the same position again replaces it."""
        _check(data, digest)
        with self._request("write"):
            row = self._backend._row(table, key, self.project, uid)
            self._backend._charge(row, len(data) - len(row.pieces.get(position, b"")))
            row.pieces[position] = data
            self._backend._touch(row)

    def get(self, table: str, key: str, *, pieces: bool = False) -> Row:
        """A row, with what it holds if asked for."""
        with self._request("get"):
            return self._backend._copy(self._backend._row(table, key, self.project), pieces=pieces)

    def load(self, data: bytes) -> bytes:
        """Data of a row that `get` opened: the moment at which a running read can fail."""
        with self._request("load"):
            return data

    def scan(self, table: str, *, prefix: str = "", where: Mapping[str, str] | None = None) -> list[Row]:
        """The rows of a table whose key begins so and whose metadata is so, without what they hold."""
        with self._request("scan"):
            return [
                self._backend._copy(row, pieces=False)
                for key, row in self._backend._tables.get(table, {}).items()
                if row.project == self.project
                and key.startswith(prefix)
                and all(row.metadata.get(name) == value for name, value in (where or {}).items())
            ]

    def update(
        self,
        table: str,
        key: str,
        *,
        uid: int | None = None,
        expect: Mapping[str, str | None] | None = None,
        metadata: Mapping[str, str | None] | None = None,
        size: int | None = None,
        if_free: bool = False,
    ) -> Row:
        """Change metadata (None takes a key away) and size of a row at once.

        ``missing`` if the row has not the metadata that is expected (None: must not have it), ``busy`` if
        ``if_free`` and it is in use.
        """
        with self._request("update"):
            row = self._backend._row(table, key, self.project, uid)
            for name, value in (expect or {}).items():
                if row.metadata.get(name) != value:
                    raise BackendError("missing", f"{key} in {table} is in another state")
            if if_free:
                self._backend._check_free(row)
            for name, value in (metadata or {}).items():
                if value is None:
                    row.metadata.pop(name, None)
                else:
                    row.metadata[name] = value
            row.size = row.size if size is None else size
            row.session = self._session
            self._backend._touch(row)
            return self._backend._copy(row, pieces=False)

    def move(
        self,
        table: str,
        key: str,
        to_table: str,
        to_key: str,
        *,
        if_absent: bool,
        size: int | None = None,
        layout: Callable[[dict[int, bytes]], dict[int, bytes]] | None = None,
    ) -> Row:
        """Give a row another name in one step. ``layout`` turns the positions of its data into offsets."""
        with self._request("move"):
            server = self._backend
            row = server._row(table, key, self.project)
            target = server._tables.setdefault(to_table, {})
            old = target.get(to_key)
            if old is not None and if_absent:
                raise BackendError("exists", f"{to_key} exists in {to_table}")
            if layout is not None:
                row.pieces = layout(row.pieces)
            if old is not None:
                server._stored -= old.stored
            del server._tables[table][key]
            row.table, row.key = to_table, to_key
            row.size = row.size if size is None else size
            server._touch(row)
            target[to_key] = row
            return server._copy(row, pieces=False)

    def remove(self, table: str, key: str, *, uid: int | None = None, if_free: bool = False) -> None:
        """Remove a row: ``missing`` if it is not there, ``busy`` if it is in use (and that matters)."""
        with self._request("remove"):
            row = self._backend._row(table, key, self.project, uid)
            if if_free:
                self._backend._check_free(row)
            self._backend._stored -= row.stored
            del self._backend._tables[table][key]

    def remove_all(self, table: str, prefix: str) -> None:
        """Remove all rows whose key begins so; none is fine."""
        with self._request("remove_all"):
            rows = self._backend._tables.get(table, {})
            for key in [key for key, row in rows.items() if key.startswith(prefix) and row.project == self.project]:
                self._backend._stored -= rows.pop(key).stored

    def usage(self) -> tuple[int | None, int]:
        """Capacity and bytes held."""
        with self._request("usage"):
            return self._backend.capacity, self._backend.stored

    @contextmanager
    def _request(self, operation: str) -> Iterator[None]:
        if self.refused:
            raise BackendError("unauthenticated", "the server wants to know for whom")
        with self._backend._request(operation, self._session):
            yield


def _check(data: bytes, digest: bytes | None) -> None:
    """Refuse data that was damaged on its way. Outside the lock: it takes as long as the data is large."""
    if digest is not None and hashlib.md5(data, usedforsecurity=False).digest() != digest:
        raise BackendError("bad-digest", f"{len(data)} bytes arrived with another md5")


def fresh() -> str:
    """An id that a server makes up."""
    return str(uuid.uuid4())
