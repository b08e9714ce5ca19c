"""The way to a vCenter or an ESXi host: its session, its tasks, and its ``/folder``.

See `imagestore.drivers.vmware` for what is made of them, and where the facts come from.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode
from xml.parsers.expat import ExpatError

from imagestore.driver import Stat, Timeouts, http_date, require
from imagestore.errors import (
    Cancelled,
    Changed,
    ConfigurationError,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

__all__ = ["Answer", "File", "Place", "Room", "Server"]

T = TypeVar("T")

_PROSE: Final = 4096
_IDLE: Final = 15.0
_SETTLED: Final = 60.0
_COOKIE: Final = "vmware_soap_session"

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")

_STATUSES: Final[Mapping[int, type[StoreError]]] = {
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    408: StoreTimeout,
    413: LimitExceeded,
    416: Changed,
    429: RateLimited,
    504: StoreTimeout,
    507: StoreFull,
}


@dataclass(frozen=True, slots=True)
class Place:
    """A file, or a directory where ``name`` is empty."""

    datacenter: str
    datastore: str
    directory: str
    name: str = ""

    def __getitem__(self, name: str) -> Place:
        return replace(self, name=name)

    @property
    def path(self) -> str:
        """As tasks name it."""
        return f"[{self.datastore}] {self.directory}{'/' if self.name else ''}{self.name}"

    @property
    def url(self) -> str:
        query = urlencode({"dcPath": self.datacenter, "dsName": self.datastore}, quote_via=quote)
        return f"/folder/{quote(self.directory)}/{quote(self.name)}?{query}"


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """What a search tells of a file."""

    name: str
    size: int | None
    modified: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What the server tells of a datastore, in bytes."""

    free: int
    total: int
    usable: bool


class _Wire(http.client.HTTPSConnection):
    """A connection with time-outs; where a certificate is pinned, to a server that shows that very one."""

    def __init__(
        self, host: str, port: int, *, context: ssl.SSLContext, pinned: bytes | None, patience: Timeouts
    ) -> None:
        super().__init__(host, port, timeout=patience.connect, context=context)
        self._pinned = pinned
        self._patience = patience

    def connect(self) -> None:
        super().connect()
        try:
            if self._pinned is not None and self.sock.getpeercert(binary_form=True) != self._pinned:
                raise ssl.SSLCertVerificationError("the server shows another certificate than the configured one")
            self.sock.settimeout(self._patience.stall)
        except BaseException:
            self.close()
            raise

    def hang_up(self) -> None:
        """End a request in its midst, and wait until the server has noticed: only then is what it made all there."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
                self.sock.settimeout(self._patience.connect)
                for _ in range(_PROSE):
                    if not self.sock.recv(_PROSE):
                        break
        self.close()


class Answer:
    """An answer of ``/folder`` whose body has not been read yet. `close` keeps the connection if it has been."""

    def __init__(self, wire: _Wire, response: http.client.HTTPResponse, keep: Callable[[_Wire], None]) -> None:
        self._wire: _Wire | None = wire
        self._keep = keep
        self._response = response
        self._headers = response.headers
        self.status = response.status

    def expect(self, *statuses: int) -> Answer:
        if self.status not in statuses:
            raise _failure(self.status)
        return self

    def is_directory(self, place: Place) -> bool:
        """Whether the server sends us to the same name with a slash after it."""
        target = self._headers.get("Location", "").partition("?")[0]
        return 300 < self.status < 400 and target.endswith(f"{quote(place.name)}/")

    @property
    def is_listing(self) -> bool:
        """Whether it may be the contents of a directory."""
        return self.status == 200 and self._headers.get_content_type() == "text/html"

    @property
    def length(self) -> int | None:
        text = self._headers.get("Content-Length", "").strip()
        return int(text) if _LENGTH.fullmatch(text) and "Transfer-Encoding" not in self._headers else None

    def extent(self) -> tuple[int, int, int]:
        """The first byte that it holds, the one after the last, and the length of the whole file."""
        if self.status == 206:
            match = _CONTENT_RANGE.fullmatch(self._headers.get("Content-Range", "").strip())
            if match is None:
                raise StoreError("the server sends a part of the file without saying which")
            return int(match[1]), int(match[2]) + 1, int(match[3])
        if self.length is None:
            raise Unsupported("the server does not tell the length of the file: a cut one would look whole")
        return 0, self.length, self.length

    def stat(self, size: int) -> Stat:
        modified, now = http_date(self._headers.get("Last-Modified")), http_date(self._headers.get("Date"))
        version = None
        if modified is not None and now is not None and (now - modified).total_seconds() >= _SETTLED:
            version = f"{size}-{modified:%Y%m%dT%H%M%S}"
        return Stat(size=size, version=version, modified=modified)

    def read(self, most: int) -> bytes:
        return self._response.read(most)

    def prose(self) -> str:
        return self._response.read(_PROSE).decode("ascii", "replace")

    def close(self) -> None:
        # By now somebody else may have the connection of one that was closed before.
        wire, self._wire = self._wire, None
        if wire is None:
            return
        left = self._response.length
        if not self._response.isclosed() and left is not None and left < _PROSE:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._response.read()
        kept = self._response.isclosed() and not self._response.will_close
        self._response.close()
        if kept:
            self._keep(wire)
        else:
            wire.close()


def _failure(status: int) -> StoreError:
    if 300 <= status < 400:
        return StoreError("the server redirects to another place, which is not followed: is the option host right?")
    kind = _STATUSES.get(status, Unavailable if status >= 500 else StoreError)
    return kind(f"the server answered {status}")


@dataclass(frozen=True, slots=True, eq=False)
class _Login:
    """A session. What it was begun with is not shared with the next one, so that no answer to the old disturbs it."""

    stub: Any
    instance: Any
    content: Any
    # Not for longer: a server that was set up anew, or is a simulator, may have other names for its objects.
    stores: dict[tuple[str, str], _Known] = field(default_factory=dict)

    @property
    def cookie(self) -> str:
        return f'{_COOKIE}="{self.stub.GetSessionId()}"'

    def at(self, known: Any) -> Any:
        """A managed object that may be of another session."""
        return type(known)(known._moId, self.stub)

    def drop(self) -> None:
        # Connections that are in use are then closed when they are given back.
        self.stub.poolSize = 0
        self.stub.DropConnections()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """The server's names for a datastore."""

    datacenter: Any
    datastore: Any
    browser: Any


class Server:
    """The way to one server: a session that threads share, tasks, and ``/folder``."""

    def __init__(
        self,
        host: str,
        user: str,
        password: str,
        *,
        context: ssl.SSLContext,
        pinned: bytes | None,
        patience: Timeouts,
        workers: int,
        interval: float,
    ) -> None:
        name, colon, port = host.rpartition(":")
        self._host, self._port = (name, int(port)) if colon and not host.endswith("]") else (host, 443)
        self._user = user
        self._password = password
        self._patience = patience
        self._interval = interval
        self._workers = workers
        self._context = context
        self._connection = functools.partial(_Wire, pinned=pinned, patience=patience)
        sdk = require("pyVmomi", extra="vmware")
        self.vim = sdk.vim
        self._collected = sdk.vmodl.query.PropertyCollector
        self._method_fault = sdk.vmodl.MethodFault
        self._adapter = require("pyVmomi.SoapAdapter", extra="vmware").SoapStubAdapter
        self._lock = threading.Lock()
        self._login: _Login | None = None
        self._idle_lock = threading.Lock()
        self._idle: list[tuple[float, _Wire]] = []
        self._closed = False

    # The session

    def session(self, ended: _Login | None = None) -> _Login:
        """The session; a new one if there is none yet, or the one that the caller saw has ended."""
        with self._lock:
            if self._closed:
                raise Cancelled("the store was closed")
            if self._login is None or self._login is ended:
                former, self._login = self._login, None
                if former is not None:
                    former.drop()
                self._login = self._begin()
            return self._login

    def _begin(self) -> _Login:
        # What is trusted is decided in one place: nothing is left to the defaults of others.
        stub = self._adapter(
            host=self._host,
            port=self._port,
            path="/sdk",
            version="vim.version.version11",
            poolSize=self._workers,
            connectionPoolTimeout=_IDLE,
            sslContext=self._context,
        )
        stub.scheme = self._connection
        instance = self.vim.ServiceInstance("ServiceInstance", stub)
        try:
            content = instance.RetrieveContent()
            content.sessionManager.Login(self._user, self._password)
        except BaseException:
            stub.DropConnections()
            raise
        return _Login(stub, instance, content)

    def call(self, ask: Callable[[_Login], T]) -> T:
        """What ``ask`` makes of the session; once more, with a new one, if it has ended."""
        login = self.session()
        try:
            return ask(login)
        except self.vim.fault.NotAuthenticated:
            return ask(self.session(login))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            login, self._login = self._login, None
        with self._idle_lock:
            idle, self._idle = self._idle, []
        for _, wire in idle:
            wire.close()
        if login is not None:
            with contextlib.suppress(Exception):
                login.content.sessionManager.Logout()
            login.drop()

    # Tasks

    def task(self, start: Callable[[_Login], Any]) -> Any:
        """Start a task, wait for its end, and return its result.

        Of its info only what is needed is asked for: the rest is not alike on all servers.

        Raises:
            StoreTimeout: it showed no progress for so long as a connection may be silent.
        """
        task = self.call(start)
        spec = self._spec(task, self.vim.Task, "info.state", "info.error", "info.result", "info.progress")
        seen, since, pause = None, time.monotonic(), min(0.01, self._interval)
        while True:
            told = self._properties(spec)[0]
            state = told["info.state"]
            if state == "success":
                return told.get("info.result")
            if state == "error":
                raise told["info.error"]
            if (state, told.get("info.progress")) != seen:
                seen, since = (state, told.get("info.progress")), time.monotonic()
            elif time.monotonic() - since > self._patience.stall:
                raise StoreTimeout(f"a task of the server is {state} and makes no progress")
            time.sleep(pause)
            pause = min(2 * pause, self._interval)

    def move(self, source: Place, target: Place) -> None:
        def start(login: _Login) -> Any:
            datacenter = self.known(source).datacenter
            manager = login.content.fileManager
            return manager.MoveDatastoreFile_Task(source.path, datacenter, target.path, datacenter, False)

        self.task(start)

    def delete(self, place: Place) -> None:
        assert place.name
        self.task(
            lambda login: login.content.fileManager.DeleteDatastoreFile_Task(place.path, self.known(place).datacenter)
        )

    def make_directory(self, place: Place) -> None:
        with contextlib.suppress(self.vim.fault.FileAlreadyExists):
            self.call(
                lambda login: login.content.fileManager.MakeDirectory(place.path, self.known(place).datacenter, True)
            )

    def search(self, directory: Place, pattern: str) -> Sequence[File]:
        """The files, but not the directories, that match; none where there is no such directory."""
        vim = self.vim
        browser = vim.host.DatastoreBrowser
        spec = browser.SearchSpec(
            query=[browser.Query()],
            details=browser.FileInfo.Details(fileType=True, fileSize=True, modification=True, fileOwner=False),
            matchPattern=[pattern],
        )
        try:
            found = self.task(
                lambda login: login.at(self.known(directory).browser).SearchDatastore_Task(directory.path, spec)
            )
        except vim.fault.FileNotFound:
            return []
        return [
            File(name=file.path, size=file.fileSize, modified=file.modification)
            for file in found.file
            if not isinstance(file, browser.FolderInfo) and (pattern.endswith("*") or file.path == pattern)
        ]

    # The inventory

    def find(self, places: Iterable[Place]) -> None:
        """Look up datacenters and datastores, so that what is misspelt shows early."""
        for place in places:
            self.known(place)

    def known(self, place: Place) -> _Known:
        key = (place.datacenter, place.datastore)
        stores = self.session().stores
        if key not in stores:
            stores[key] = self._find(*key)
        return stores[key]

    def _find(self, datacenter: str, datastore: str) -> _Known:
        collected, vim = self._collected, self.vim
        found = self.call(lambda login: login.content.searchIndex.FindByInventoryPath(datacenter))
        if not isinstance(found, vim.Datacenter):
            raise ConfigurationError(f"option datastores: the server has no datacenter {datacenter}")
        spec = self._spec(found, vim.Datastore, "name", "browser")
        spec.objectSet[0].skip = True
        spec.objectSet[0].selectSet = [collected.TraversalSpec(type=vim.Datacenter, path="datastore")]
        for told in self._properties(spec):
            if told.get("name") == datastore:
                return _Known(datacenter=found, datastore=told[""], browser=told["browser"])
        raise ConfigurationError(f"option datastores: there is no datastore {datastore} in {datacenter}")

    def room(self, place: Place, *, fresh: bool = False) -> Room:
        """Free and total space; ``fresh``: as it is now, and not when the server looked last."""
        if fresh:
            # Not every server does it, and every user may not.
            with contextlib.suppress(self._method_fault, ExpatError):
                self.call(lambda login: login.at(self.known(place).datastore).RefreshDatastore())
        names = [f"summary.{name}" for name in ("freeSpace", "capacity", "accessible", "maintenanceMode")]
        told = self._properties(self._spec(self.known(place).datastore, self.vim.Datastore, *names))[0]
        free, total, accessible, maintenance = (told.get(name) for name in names)
        return Room(free=free or 0, total=total or 0, usable=bool(accessible) and maintenance in (None, "normal"))

    def _spec(self, of: Any, kind: Any, *names: str) -> Any:
        collected = self._collected
        return collected.FilterSpec(
            objectSet=[collected.ObjectSpec(obj=of)],
            propSet=[collected.PropertySpec(type=kind, pathSet=list(names))],
        )

    def _properties(self, spec: Any) -> list[dict[str, Any]]:
        """Properties of each object by name, and the object itself under the empty one."""
        found = self.call(lambda login: login.content.propertyCollector.RetrieveContents([spec]))
        return [{"": each.obj, **{told.name: told.val for told in each.propSet}} for each in found]

    # Files

    def ask(self, method: str, place: Place, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
        """The answer of ``/folder``; after logging in once more if the session has ended."""
        login = self.session()
        answer = self._ask(login, method, place, headers or {}, body)
        if answer.status == 401:
            answer.close()
            answer = self._ask(self.session(login), method, place, headers or {}, body)
        return answer

    def _ask(self, login: _Login, method: str, place: Place, headers: Mapping[str, str], body: bytes) -> Answer:
        wire = self._take()
        try:
            wire.request(method, place.url, body or None, {"Cookie": login.cookie, **headers})
            return Answer(wire, wire.getresponse(), self._keep)
        except BaseException:
            wire.close()
            raise

    def put_small(self, place: Place, data: bytes) -> None:
        with contextlib.closing(self.ask("PUT", place, body=data)) as answer:
            answer.expect(200, 201, 204)

    def put(self, place: Place, chunks: Iterable[bytes], size: int | None) -> None:
        """Stream a file of ``size`` bytes, or of as many as there are. What is there already is replaced."""
        # A session that has ended would be noticed in the middle of a body that can't be sent again.
        login = self.call(lambda login: (login.instance.CurrentTime(), login)[1])
        wire = self._connection(self._host, self._port, context=self._context)
        try:
            wire.putrequest("PUT", place.url, skip_accept_encoding=True)
            wire.putheader("Cookie", login.cookie)
            wire.putheader("Content-Type", "application/octet-stream")
            wire.putheader(*("Transfer-Encoding", "chunked") if size is None else ("Content-Length", str(size)))
            wire.endheaders()
            status = _sent(wire, chunks, chunked=size is None)
        except BaseException:
            wire.hang_up()
            raise
        wire.close()
        if status == 401:
            raise Unavailable("the session ended while the image was sent")
        if status not in (200, 201, 204):
            raise _failure(status)

    def _take(self) -> _Wire:
        """A connection that is not so old that the server may have given it up."""
        with self._idle_lock:
            now = time.monotonic()
            fresh = [(since, wire) for since, wire in self._idle if now - since < _IDLE]
            for _, wire in self._idle[: len(self._idle) - len(fresh)]:
                wire.close()
            self._idle = fresh
            if fresh:
                return fresh.pop()[1]
        return self._connection(self._host, self._port, context=self._context)

    def _keep(self, wire: _Wire) -> None:
        with self._idle_lock:
            if not self._closed and len(self._idle) < self._workers:
                self._idle.append((time.monotonic(), wire))
                return
        wire.close()


def _sent(wire: _Wire, chunks: Iterable[bytes], *, chunked: bool) -> int:
    """Send a body; the status that came back."""
    try:
        for chunk in chunks:
            if chunked:
                wire.send(b"%x\r\n" % len(chunk))
            wire.send(chunk)
            if chunked:
                wire.send(b"\r\n")
        if chunked:
            wire.send(b"0\r\n\r\n")
    except (ConnectionError, ssl.SSLError) as error:
        # A server that refuses answers at once and closes, and the answer is there to be read.
        try:
            return wire.getresponse().status
        except (OSError, http.client.HTTPException):
            raise error from None
    return wire.getresponse().status
