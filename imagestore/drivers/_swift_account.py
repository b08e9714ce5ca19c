"""How the Swift driver gets to its servers: logging in, tokens that end, and connections.

A `Login` tells the storage URL and a token for it. Three kinds: Keystone v3 (with a password or an application
credential), version 1 (tempauth, Ceph's gateway; https://docs.openstack.org/swift/latest/overview_auth.html), and the
auth of one user that a host passes to ``bind``. A token that the server does not accept any more is replaced once;
that is logging in, not repeating: every other failure goes to the caller as it is.

A `Wire` keeps idle connections to one server. swiftclient's connections hold the answer of their last request and so
serve one caller at a time; each call, and each read as long as it lasts, has one to itself. A wire knows nothing of
tokens, and so is shared by all users.
"""

from __future__ import annotations

import configparser
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from imagestore.driver import Timeouts, require
from imagestore.errors import ConfigurationError, StoreError, StoreTimeout, Unauthenticated, Unavailable

__all__ = [
    "ACCOUNT_KEYS",
    "Answer",
    "BoundLogin",
    "Client",
    "Credentials",
    "Stream",
    "Where",
    "Wires",
    "absolute",
    "client_of",
    "failure",
    "read_accounts",
]

_PIECE: Final = 64 * 1024
_PROSE: Final = 64 * 1024
_INTERFACES: Final = {"publicURL": "public", "internalURL": "internal", "adminURL": "admin"}
ACCOUNT_KEYS: Final = (
    "user",
    "key",
    "auth_version",
    "user_domain_id",
    "user_domain_name",
    "project_domain_id",
    "project_domain_name",
    "project_name",
    "project_id",
    "application_credential_id",
    "application_credential_secret",
)
"""Options that say who logs in; an accounts file has them under the same names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a store logs in with; the fields are the options of the same names."""

    auth_url: str
    auth_version: str = "3"
    user: str | None = None
    key: str | None = field(default=None, repr=False)
    user_domain_id: str | None = None
    user_domain_name: str | None = None
    project_domain_id: str | None = None
    project_domain_name: str | None = None
    project_name: str | None = None
    project_id: str | None = None
    application_credential_id: str | None = None
    application_credential_secret: str | None = field(default=None, repr=False)

    def problem(self) -> tuple[str, str] | None:
        """The option that is missing, and what to do; None if there is enough to log in."""
        if not self.auth_url:
            return "auth_url", "is not set"
        if self.application_credential_id and self.application_credential_secret and self.auth_version != "1":
            return None
        if not self.user or not self.key:
            return "user", "neither user and key nor an application credential are set"
        if self.auth_version != "1" and ":" not in self.user and not self.project_name and not self.project_id:
            return "user", "has the form project:user, or project_name is set beside it"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Which endpoint of a catalog is meant; ``override`` in place of all of them."""

    service_type: str = "object-store"
    endpoint_type: str = "publicURL"
    region: str | None = None
    override: str | None = None

    @property
    def interface(self) -> str:
        return _INTERFACES.get(self.endpoint_type, self.endpoint_type)

    def missing(self) -> ConfigurationError:
        region = f" in region {self.region}" if self.region else ""
        return ConfigurationError(
            f"the catalog has no {self.interface} endpoint of type {self.service_type}{region}: see the options "
            "service_type, endpoint_type, region and endpoint"
        )


class Login(Protocol):
    """Tells where to send requests, and with which token."""

    def token(self) -> tuple[str, str]:
        """The storage URL and a token, from memory where that is still good."""

    def forget(self, token: str, /) -> bool:
        """``token`` was refused. False if no other can be had."""

    def close(self) -> None:
        """Give up what is open."""


class V1Login:
    """Version 1: user and key in headers, storage URL and token in the answer's."""

    def __init__(self, credentials: Credentials, where: Where, wires: Wires) -> None:
        self._credentials = credentials
        self._where = where
        self._wires = wires
        self._lock = threading.Lock()
        self._known: tuple[str, str] | None = None

    def token(self) -> tuple[str, str]:
        with self._lock:
            if self._known is None:
                self._known = self._log_in()
            return self._known

    def forget(self, token: str, /) -> bool:
        with self._lock:
            if self._known is not None and self._known[1] == token:
                self._known = None
        return True

    def close(self) -> None:
        """Its connections are those of the wires."""

    def _log_in(self) -> tuple[str, str]:
        credentials = self._credentials
        headers = {"X-Auth-User": credentials.user or "", "X-Auth-Key": credentials.key or ""}
        path = urlsplit(credentials.auth_url).path
        answer = self._wires.of(credentials.auth_url).send("GET", path, headers, None)
        url, token = answer.headers.get("X-Storage-Url"), answer.headers.get("X-Auth-Token")
        if answer.status in (401, 403):
            raise Unauthenticated(
                "the authentication server does not accept user and key: see the options user and key"
            )
        if answer.status >= 500 or answer.status in (408, 429, 498):
            raise Unavailable(f"the authentication server failed with {answer.status}")
        if answer.status >= 300 or not url or not token:
            raise ConfigurationError(
                f"auth_url is no authentication server of version 1: it answered {answer.status} without a storage URL"
            )
        return (self._where.override or url).rstrip("/"), token


class KeystoneLogin:
    """Keystone v3: keystoneauth keeps the token, and asks for another shortly before it ends."""

    def __init__(self, credentials: Credentials, where: Where, cacert: str | None, timeouts: Timeouts) -> None:
        identity = require("keystoneauth1.identity.v3", extra="swift")
        session = require("keystoneauth1.session", extra="swift")
        self._http = require("requests", extra="swift").Session()
        # Without redirects: the password is for this server only.
        self._session = session.Session(
            auth=_plugin(identity, credentials),
            session=self._http,
            verify=cacert or True,
            timeout=timeouts.stall,
            redirect=False,
        )
        self._where = where
        self._lock = threading.Lock()
        self._last = ""

    def token(self) -> tuple[str, str]:
        # One at a time: many threads that find no token would all log in.
        with self._lock:
            url, self._last = _from_session(self._session, self._where)
            return url, self._last

    def forget(self, token: str, /) -> bool:
        with self._lock:
            if token == self._last:
                self._session.invalidate()
        return True

    def close(self) -> None:
        self._http.close()


class BoundLogin:
    """One user's own: a keystoneauth session, or a context with ``auth_token`` and ``service_catalog``."""

    def __init__(self, auth: Any, where: Where) -> None:
        self._auth = auth
        self._where = where
        self._lock = threading.Lock()
        self._last = ""

    def token(self) -> tuple[str, str]:
        if callable(getattr(self._auth, "get_token", None)):
            with self._lock:
                url, self._last = _from_session(self._auth, self._where)
                return url, self._last
        token = getattr(self._auth, "auth_token", None)
        if not token:
            raise Unauthenticated("the auth that was passed to bind has no auth_token")
        return self._endpoint(), token

    def _endpoint(self) -> str:
        if self._where.override:
            return self._where.override
        catalogs = require("keystoneauth1.access.service_catalog", extra="swift")
        entries = getattr(self._auth, "service_catalog", None) or []
        endpoints = [endpoint for entry in entries for endpoint in entry.get("endpoints", ())]
        # In version 2, which services pass on to each other, one entry holds the URLs of all interfaces.
        third = any("interface" in endpoint for endpoint in endpoints)
        catalog = (catalogs.ServiceCatalogV3 if third else catalogs.ServiceCatalogV2)(entries)
        urls = catalog.get_urls(
            service_type=self._where.service_type, interface=self._where.interface, region_name=self._where.region
        )
        if not urls:
            raise self._where.missing()
        return str(urls[0]).rstrip("/")

    def forget(self, token: str, /) -> bool:
        invalidate = getattr(self._auth, "invalidate", None)
        if not callable(invalidate):
            return False
        with self._lock:
            return token != self._last or bool(invalidate())

    def close(self) -> None:
        """The session belongs to the user."""


def _plugin(identity: Any, credentials: Credentials) -> Any:
    url = credentials.auth_url
    if not urlsplit(url).path.rstrip("/").endswith("/v3"):
        url = f"{url}/v3"
    if credentials.application_credential_id and credentials.application_credential_secret:
        return identity.ApplicationCredential(
            url,
            application_credential_id=credentials.application_credential_id,
            application_credential_secret=credentials.application_credential_secret,
        )
    project, colon, user = (credentials.user or "").rpartition(":")
    arguments: dict[str, str | None] = {
        "username": user,
        "password": credentials.key,
        "user_domain_id": credentials.user_domain_id,
        "user_domain_name": credentials.user_domain_name,
    }
    if not (credentials.user_domain_id or credentials.user_domain_name):
        arguments["user_domain_id"] = "default"
    if credentials.project_id:
        arguments["project_id"] = credentials.project_id
    else:
        arguments["project_name"] = project if colon else credentials.project_name
        arguments["project_domain_id"] = credentials.project_domain_id
        arguments["project_domain_name"] = credentials.project_domain_name
        if not (credentials.project_domain_id or credentials.project_domain_name):
            arguments["project_domain_id"] = "default"
    return identity.Password(url, **arguments)


def _from_session(session: Any, where: Where) -> tuple[str, str]:
    try:
        token = session.get_token()
        url = where.override or session.get_endpoint(
            service_type=where.service_type, interface=where.interface, region_name=where.region
        )
    except Exception as error:
        raise _keystone_failed(error) from error
    if not token:
        raise Unauthenticated("the session has no token")
    if not url:
        raise where.missing()
    return url.rstrip("/"), token


def _keystone_failed(error: Exception) -> StoreError:
    """What a failed login means: a Keystone that is down is no wrong password."""
    exceptions = require("keystoneauth1.exceptions", extra="swift")
    if isinstance(error, StoreError):
        return error
    if isinstance(error, exceptions.SSLError):
        return ConfigurationError("Keystone's certificate can't be verified: see the option cacert")
    if isinstance(error, exceptions.ConnectTimeout):
        return StoreTimeout("Keystone stopped answering")
    if isinstance(error, exceptions.ConnectionError):
        return Unavailable(f"Keystone can't be reached: {type(error).__name__}")
    status = getattr(error, "http_status", None)
    if status == 401:
        return Unauthenticated("Keystone does not accept the credentials: see the options user, key and project_name")
    if isinstance(status, int) and (status >= 500 or status in (408, 429)):
        return Unavailable(f"Keystone failed with {status}")
    if status == 403:
        return Unauthenticated("Keystone gives this user no token for this project")
    if isinstance(status, int):
        return ConfigurationError(f"auth_url is no Keystone v3: it answered {status}")
    return ConfigurationError(f"Keystone can't be used: {type(error).__name__}: {error}")


def read_accounts(path: str) -> dict[str, Credentials]:
    """The accounts in a file of sections, as Glance's ``swift_store_config_file`` has them.

    Raises:
        ConfigurationError: the file can't be read, or a section of it says too little.
    """
    parser = configparser.ConfigParser(interpolation=None, default_section="\0")
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (OSError, UnicodeError, configparser.Error) as error:
        # The text of a line that can't be parsed may be a secret.
        what = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ConfigurationError(f"option accounts_file: {path} can't be read: {what}") from None
    accounts = {}
    for name in parser.sections():
        values = {key: _unquoted(text) for key, text in parser.items(name)}
        wanted = {key: values[key] for key in ACCOUNT_KEYS if values.get(key)}
        if wanted.get("auth_version") not in ("1", "3"):
            wanted["auth_version"] = "3"
        account = Credentials(auth_url=absolute(values.get("auth_address", "")), **wanted)
        if problem := account.problem():
            option = problem[0].replace("auth_url", "auth_address")
            raise ConfigurationError(f"option accounts_file: {path}, section [{name}], {option}: {problem[1]}")
        accounts[name] = account
    return accounts


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def absolute(url: str) -> str:
    """An address with its scheme (https where none is written, as Glance has it) and without a slash at its end."""
    url = url.strip().rstrip("/")
    return url if not url or "://" in url else f"https://{url}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a server said. `body` is whole, or empty where `stream` is to be read and given back."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    stream: Stream | None = None


class Stream:
    """The body of an answer, with the connection that it comes through."""

    def __init__(self, wire: Wire, connection: Any, response: Any) -> None:
        self._wire = wire
        self._connection = connection
        self._response = response
        self._ended = False

    def read(self, size: int) -> bytes:
        data: bytes = self._response.raw.read(size)
        self._ended = not data
        return data

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # What was not read to its end can't be used again.
            self._wire.give(connection, good=self._ended)


class Body:
    """Bytes to send, in pieces: a socket's time-out is then for each, and does not cut off a block that is slow."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[memoryview]:
        view = memoryview(self._data)
        for start in range(0, len(view), _PIECE):
            yield view[start : start + _PIECE]

    def forget(self) -> None:
        """The request is over. Whatever keeps it (a connection its last one, an error its own) keeps no block."""
        self._data = b""


class Wire:
    """Connections to one server."""

    def __init__(self, make: Callable[[], Any], keep: int) -> None:
        self._make = make
        self._keep = keep
        self._idle: list[Any] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> Any:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._make()

    def give(self, connection: Any, *, good: bool) -> None:
        with self._lock:
            keep = good and not self._closed and len(self._idle) < self._keep
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for connection in idle:
            connection.close()

    def send(
        self, method: str, path: str, headers: Mapping[str, str], data: bytes | None, *, stream: bool = False
    ) -> Answer:
        """One request and its answer, whatever its status. Raises what requests and urllib3 raise."""
        connection = self.take()
        content = Body(data) if data else None
        good = False
        try:
            response = connection.request(method, path, content, dict(headers))
            if response.status_code < 300 and _cut_short(response.raw):
                raise Unavailable("the connection ended within the head of an answer")
            if stream and response.status_code < 300:
                body = Stream(self, connection, response)
                connection = None
                return Answer(status=response.status_code, headers=response.headers, stream=body)
            parts = []
            while part := response.raw.read(_PROSE):
                parts.append(part)
            # Gives the socket back to the connection's own pool.
            response.close()
            good = True
            return Answer(status=response.status_code, headers=response.headers, body=b"".join(parts))
        finally:
            if content is not None:
                content.forget()
            if connection is not None:
                self.give(connection, good=good)


def _cut_short(raw: Any) -> bool:
    """Whether the server hung up before the end of an answer's headers.

    Python takes the end of the stream for theirs: the last one may then be cut off, and others be missing, such as the
    one that tells an image from a manifest. Who is not told how long an answer is, or finds the connection closed where
    nobody has said that it would be, has not seen the end of the headers.
    """
    if raw.version < 11 or "close" in raw.headers.get("Connection", "").lower():
        return False
    sock = getattr(raw.connection, "sock", None)
    if sock is None:
        return True
    wait = require("urllib3.util.wait", extra="swift")
    # Not the method of a TLS socket, which can't look ahead.
    return wait.wait_for_read(sock, 0) and not socket.socket.recv(sock, 1, socket.MSG_PEEK)


class Wires:
    """A `Wire` for each server, made when it is first needed."""

    def __init__(self, cacert: str | None, timeouts: Timeouts, keep: int) -> None:
        self._cacert = cacert
        self._timeouts = timeouts
        self._keep = keep
        self._wires: dict[str, Wire] = {}
        self._lock = threading.Lock()

    def of(self, url: str) -> Wire:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            wire = self._wires.get(origin)
            if wire is None:
                wire = self._wires[origin] = Wire(lambda: self._connect(origin), self._keep)
            return wire

    def _connect(self, origin: str) -> Any:
        client = require("swiftclient.client", extra="swift")
        timeout = (self._timeouts.connect, self._timeouts.stall)
        connection = client.HTTPConnection(origin, cacert=self._cacert, timeout=timeout)
        # A redirect would take the token to whatever server it names.
        connection.requests_args["allow_redirects"] = False
        # What one user is given must not come back with another one's requests.
        connection.request_session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        return connection

    def close(self) -> None:
        with self._lock:
            wires, self._wires = self._wires, {}
        for wire in wires.values():
            wire.close()


class Client:
    """Requests to one account of Swift, with a token that is renewed when it ends."""

    def __init__(self, login: Login, wires: Wires) -> None:
        self._login = login
        self._wires = wires

    def storage_url(self) -> str:
        return self._login.token()[0]

    def close(self) -> None:
        self._login.close()

    def __call__(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        *,
        stream: bool = False,
        ok: tuple[int, ...] = (),
        base: str | None = None,
    ) -> Answer:
        """One request below the storage URL, or below ``base``.

        Raises swiftclient's ``ClientException`` for every status from 300 on that is not in ``ok``.
        """
        url, token = self._login.token()
        answer = self._send(base or url, token, method, path, headers, data, stream)
        if answer.status == 401:
            if not self._login.forget(token):
                raise Unauthenticated("the token is not accepted any more, and only its owner can get another")
            url, token = self._login.token()
            answer = self._send(base or url, token, method, path, headers, data, stream)
            if answer.status == 401:
                # The credentials are good: it is the server that can't check what Keystone has just given out.
                raise Unauthenticated("the server refuses a token that was made just now", temporary=True)
        if answer.status >= 300 and answer.status not in ok:
            raise failure(answer)
        return answer

    def _send(
        self,
        url: str,
        token: str,
        method: str,
        path: str,
        headers: Mapping[str, str] | None,
        data: bytes | None,
        stream: bool,
    ) -> Answer:
        full = urlsplit(url).path.rstrip("/") + path
        try:
            return self._wires.of(url).send(
                method, full, {**(headers or {}), "X-Auth-Token": token}, data, stream=stream
            )
        except Exception:
            if data:
                # A server that refuses a token may hang up on the body before its answer can be read.
                with contextlib.suppress(Exception):
                    self._login.forget(token)
            raise


def failure(answer: Answer) -> Exception:
    """The error of swiftclient for an answer."""
    client = require("swiftclient.exceptions", extra="swift")
    error: Exception = client.ClientException(
        "Swift refused a request",
        http_status=answer.status,
        http_response_content=answer.body[:500].decode("utf-8", "replace"),
        http_response_headers=answer.headers,
    )
    return error


def client_of(credentials: Credentials, where: Where, cacert: str | None, wires: Wires, timeouts: Timeouts) -> Client:
    """A client that has not logged in yet."""
    if credentials.auth_version == "1":
        return Client(V1Login(credentials, where, wires), wires)
    return Client(KeystoneLogin(credentials, where, cacert, timeouts), wires)
