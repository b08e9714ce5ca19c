"""Images on web servers, to be read and nothing else.

A location is the image's URL. Its bytes are taken as the server keeps them: an answer with a ``Content-Encoding`` is
refused, and so is one whose length nobody tells, because a cut one would look whole.

**Versions.** A strong ETag pins a read; without one, ``Last-Modified`` and a weak ETag together. Each answer tells
the version of the very bytes that it carries, so comparing is all that is needed. A server that tells neither can't be
pinned, and only a digest shows whether an image was replaced while its read was resumed.

**Ranges** (RFC 9110, 14) are asked for and the answer is checked. A server that knows none sends everything, and what
was not asked for is read and thrown away. ``stat`` is a HEAD, or where that is refused a GET of one byte.

**Redirects** are followed here, one by one: each target is parsed and judged like a location (see `_http_guard`), must
have the scheme that the location has, and gets credentials only if scheme, host and port are those of the location.

Nothing of the environment counts: no proxy variables, no .netrc, no cookies. The transport of requests is used without
its sessions, which would look there.
"""

from __future__ import annotations

import base64
import contextlib
import re
import ssl
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, Self

from oslo_config import cfg

from imagestore.driver import (
    Capabilities,
    Chunks,
    Driver,
    Location,
    Reading,
    Stat,
    http_date,
    require,
    retry_after,
)
from imagestore.drivers._http_guard import Guard, Rule, Target, parse_rule, parse_target
from imagestore.errors import (
    Changed,
    ConfigurationError,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

__all__ = ["HttpDriver"]

_CHUNK: Final = 256 * 1024
_RECORD: Final = 16384
# Of an answer that is no image so much is read (and forgotten), if it has come already, to keep the connection.
_PROSE: Final = 4096
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
# What servers say to a HEAD that they would not say to a GET: URLs signed for GET, old applications.
_NO_HEAD: Final = frozenset({400, 403, 405, 501})
_FAILURES: Final[Mapping[int, type[StoreError]]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    407: Unauthenticated,
    408: StoreTimeout,
    410: NotFound,
    414: InvalidRequest,
    416: Changed,
    425: Unavailable,
    429: RateLimited,
    451: PermissionDenied,
    504: StoreTimeout,
}
_LASTING: Final = frozenset({501, 505, 508, 510, 511})

_DIGITS: Final = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE: Final = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)", re.IGNORECASE)
_PROXY: Final = re.compile(r"(https?)://(?:[^@/\s]*@)?(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?/?")


class HttpDriver(Driver):
    """Images on web servers. See the module for how."""

    name = "http"
    schemes = ("http", "https")
    options = (
        cfg.ListOpt(
            "hosts",
            default=[],
            help=(
                "The hosts that locations and redirects may name, with commas between them: a name, *.domain for all "
                "names below it, an address or a network, each with :port or :* for all ports; without a port it "
                "means 80 and 443. Empty: every host on the public Internet, on any port."
            ),
        ),
        cfg.ListOpt(
            "allow",
            default=[],
            help=(
                "Hosts whose addresses need not be public, in the form of the option hosts. Whoever may give locations "
                "can then read everything there that needs no password. It does not widen the option hosts."
            ),
        ),
        cfg.StrOpt(
            "cacert",
            help=(
                "File with the certificates, in PEM, of the authorities to trust in place of the usual ones. "
                "Certificates are always verified."
            ),
        ),
        cfg.DictOpt(
            "proxies",
            default={},
            secret=True,
            help=(
                "Proxy for each scheme, as scheme:proxy pairs: http:proxy.example:3128,https:proxy.example:3128. The "
                "proxy is host:port, or an http:// or https:// URL. Only what the option allow names is fetched "
                "through a proxy. Proxies in the environment are not looked at."
            ),
        ),
        cfg.MultiStrOpt(
            "credentials",
            default=[],
            secret=True,
            help=(
                "User and password (Basic) for a server, as server=user:password. The server is host or host:port, "
                "which means https; to send a password without encryption write http:// before it. May be given "
                "several times. Credentials in locations are never used."
            ),
        ),
        cfg.IntOpt("max_redirects", default=5, min=0, max=20, help="How many redirects are followed in a row."),
        cfg.StrOpt("user_agent", default="imagestore", help="What the store calls itself when it asks a server."),
    )

    def configure(self) -> None:
        settings = self.settings
        self._proxies = self._read_proxies(settings.proxies or {})
        self._guard = Guard(self._read_rules("hosts"), self._read_rules("allow"), self._proxies)
        self._authorization = dict(self._read_credentials(entry) for entry in settings.credentials or () if entry)
        agent: str = settings.user_agent or "imagestore"
        if not agent.isascii() or not agent.isprintable():
            raise self.invalid_option("user_agent", "it may only have printable ASCII characters")
        self._headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": agent}
        self._transport: Any = None

    def _read_rules(self, option: str) -> list[Rule]:
        rules = []
        for entry in getattr(self.settings, option) or ():
            try:
                rules.append(parse_rule(entry))
            except ValueError as error:
                raise self.invalid_option(option, f"{entry!r} {error}") from None
        return rules

    def _read_proxies(self, pairs: Mapping[str, str]) -> dict[str, str]:
        proxies = {}
        for scheme, proxy in pairs.items():
            url = proxy if "://" in proxy else f"http://{proxy}"
            if scheme.lower() not in self.schemes or not _PROXY.fullmatch(url):
                raise self.invalid_option(
                    "proxies", "an entry is not http: or https: and then host:port or a URL of a proxy"
                )
            proxies[scheme.lower()] = url
        return proxies

    def _read_credentials(self, entry: str) -> tuple[str, str]:
        """An origin, and the header to send there."""
        server, equals, secret = entry.partition("=")
        user, colon, _ = secret.partition(":")
        if not equals or not user or not colon or "@" in server:
            raise self.invalid_option("credentials", "an entry is not of the form server=user:password")
        try:
            target = parse_target(server.strip() if "://" in server else f"https://{server.strip()}")
        except InvalidLocation as error:
            raise self.invalid_option("credentials", f"an entry names no server: {error.message}") from None
        if target.path != "/":
            raise self.invalid_option("credentials", f"the entry for {target.origin} has a path, which has no meaning")
        return target.origin, "Basic " + base64.b64encode(secret.encode()).decode()

    def open(self) -> None:
        """Load requests and the certificates. Connects to nothing: each location names its own server.

        Raises:
            MissingDependency: requests is not installed.
            ConfigurationError: ``cacert`` can't be read.
        """
        require("requests", extra="http")
        if self.settings.cacert:
            try:
                ssl.create_default_context(cafile=self.settings.cacert)
            except OSError as error:
                raise ConfigurationError(
                    f"option cacert: {self.settings.cacert} can't be read as certificates: {error.strerror or error}",
                    store=self.store or None,
                    driver=self.name,
                ) from error
        self._transport = _transport(self._guard, self.limits.workers)
        self.capabilities = Capabilities(ranged_reads=True)

    def close(self) -> None:
        """Close idle connections. Open reads go on."""
        if self._transport is not None:
            self._transport.close()

    # Locations

    def parse(self, uri: str, /) -> Location:
        """Check a URL as text: its form, its host against ``hosts``, and an address against the guard.

        Names are looked up and judged later, at every connection. Fragments are dropped.

        Raises:
            InvalidLocation: not an http(s) URL, or of a host that this store does not serve.
        """
        target = parse_target(uri)
        self._guard.check(target)
        # A bare "@" would be taken for the end of credentials when the text is parsed again.
        return Location(uri=target.origin + target.path.replace("@", "%40"))

    # Reading

    def stat(self, location: Location, /) -> Stat:
        """Length and version as the server tells them, without reading the image."""
        with _given_back(self._request("HEAD", location)) as head:
            if head.status_code not in _NO_HEAD:
                size = _length(_checked(head, 200))
                # Some servers say 0 for want of a body: that is not believed before a GET says so too.
                if size:
                    return _stat(head, size)
        with _given_back(self._request("GET", location, {"Range": "bytes=0-0"})) as answer:
            if answer.status_code == 416 and _content_range(answer) == (None, None, 0):
                return _stat(answer, 0)
            return _stat(answer, _total(_checked(answer, 200, 206)))

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Open the image from ``start``.

        Raises, beside what every driver does: `Unsupported` if the server compresses, or does not tell the length.
        """
        ranged = start > 0 or stop is not None
        last = "" if stop is None else stop - 1
        response = self._request("GET", location, {"Range": f"bytes={start}-{last}"} if ranged else {})
        try:
            if not ranged and response.status_code == 200 and _length(_checked(response, 200)) is None:
                # The answer to a range has to tell the length, even where it is sent in pieces.
                response.close()
                ranged, response = True, self._request("GET", location, {"Range": "bytes=0-"})
            _checked(response, 200, *((206,) if ranged else ()))
            stat = _stat(response, _total(response))
            if version is not None and stat.version != version:
                raise Changed("the image was replaced: the server tells another version of it")
            chunks = _chunks(response, stat.size, start, stop)
        except BaseException:
            _give_back(response)
            raise
        return Reading(stat=stat, chunks=chunks, close=chunks.close)

    # Requests

    def _request(self, method: str, location: Location, headers: Mapping[str, str] | None = None) -> Any:
        """The answer, which is no redirect, with its body not read yet."""
        origin = target = parse_target(location.uri)
        for _ in range(self.settings.max_redirects + 1):
            self._guard.check(target)
            response = self._send(method, target, origin.origin, headers or {})
            if response.status_code not in _REDIRECTS:
                return response
            _give_back(response)
            target = _redirected(target, response)
        raise StoreError(f"the server redirects more than {self.settings.max_redirects} times (option max_redirects)")

    def _send(self, method: str, target: Target, origin: str, headers: Mapping[str, str]) -> Any:
        requests = sys.modules["requests"]
        request = requests.PreparedRequest()
        request.method = method
        request.url = target.uri
        request.headers = requests.structures.CaseInsensitiveDict({**self._headers, **headers})
        if target.origin == origin and origin in self._authorization:
            request.headers["Authorization"] = self._authorization[origin]
        return self._transport.send(
            request,
            stream=True,
            timeout=(self.timeouts.connect, self.timeouts.stall),
            verify=self.settings.cacert or True,
            proxies={target.scheme: self._proxies[target.scheme]} if target.scheme in self._proxies else {},
        )

    def translate(self, error: Exception, /) -> StoreError | None:
        """Errors of requests, urllib3 and sockets: by what is innermost in them."""
        if not _native(error):
            return None
        inner = list(_within(error))
        if any(isinstance(each, ssl.SSLCertVerificationError) for each in inner):
            return Unavailable(
                "the server's certificate is not trusted, or not made out for this host (option cacert)",
                temporary=False,
            )
        names = {type(each).__name__ for each in inner}
        if names & {"ReadTimeoutError", "ConnectTimeoutError", "TimeoutError"}:
            return StoreTimeout("the server stopped answering")
        if names & {"gaierror", "NameResolutionError"}:
            return Unavailable("the host's name can't be looked up")
        if names & {"ProxyError"}:
            return Unavailable("the proxy failed, or refused to connect")
        if names & {"SSLError"}:
            return Unavailable("there was a fault in the encryption")
        return Unavailable("the server can't be reached, or broke the connection")


class _Shown(str):
    """The target of a request as urllib3 may write it into its log: without the query. `whole` is what is sent."""

    __slots__ = ("whole",)
    whole: str

    def __new__(cls, whole: str) -> Self:
        made = super().__new__(cls, whole.partition("?")[0])
        made.whole = whole
        return made


def _transport(guard: Guard, workers: int) -> Any:
    """The transport of requests, sending URLs to the last character as they were judged, and only where they may go.

    Connections to proxies are not guarded: the operator named them.
    """
    base = require("requests.adapters", extra="http").HTTPAdapter
    retry = require("urllib3.util.retry", extra="http").Retry
    unguarded = _pools(None)

    def request_url(_: Any, request: Any, proxies: Mapping[str, str]) -> str:
        url: str = request.url
        return url if proxies and url.startswith("http:") else url[url.index("/", len("https://")) :]

    def proxy_manager_for(self: Any, proxy: str, **options: Any) -> Any:
        manager = base.proxy_manager_for(self, proxy, **options)
        manager.pool_classes_by_scheme = unguarded
        return manager

    kind: Any = type("Transport", (base,), {"request_url": request_url, "proxy_manager_for": proxy_manager_for})
    # Not a number of retries: only without any counting do errors come without the URL, and its query, in their texts.
    made = kind(max_retries=retry(total=False, redirect=False), pool_maxsize=workers)
    made.poolmanager.pool_classes_by_scheme = _pools(guard)
    return made


def _pools(guard: Guard | None) -> dict[str, type]:
    """Pools like those of urllib3, whose connections open their sockets through the guard, and in no other way."""
    pools = require("urllib3.connectionpool", extra="http")
    return {"http": _pool(pools.HTTPConnectionPool, guard), "https": _pool(pools.HTTPSConnectionPool, guard)}


def _pool(base: Any, guard: Guard | None) -> type:
    errors = require("urllib3.exceptions", extra="http")
    connection = base.ConnectionCls

    def make_request(self: Any, conn: Any, method: str, url: str, *rest: Any, **named: Any) -> Any:
        return base._make_request(self, conn, method, _Shown(url), *rest, **named)

    def put_request(self: Any, method: str, url: str, *rest: Any, **named: Any) -> Any:
        return connection.putrequest(self, method, getattr(url, "whole", url), *rest, **named)

    def connect(self: Any) -> None:
        self.guarded = False
        connection.connect(self)
        if not self.guarded:
            self.close()
            raise ConfigurationError("this version of urllib3 opens connections past the guard: install another one")

    def new_socket(self: Any) -> Any:
        assert guard is not None
        self.guarded = True
        try:
            return guard.connect(self.host, self.port, self.timeout, self.socket_options)
        except TimeoutError as error:
            raise errors.ConnectTimeoutError(self, "connecting took too long") from error
        except OSError as error:
            raise errors.NewConnectionError(self, f"can't connect: {error}") from error

    changes: dict[str, Any] = {"putrequest": put_request}
    if guard is not None:
        changes |= {"connect": connect, "_new_conn": new_socket}
    kind = type("Connection", (connection,), changes)
    return type("Pool", (base,), {"_make_request": make_request, "ConnectionCls": kind})


@contextlib.contextmanager
def _given_back(response: Any) -> Iterator[Any]:
    try:
        yield response
    finally:
        _give_back(response)


def _give_back(response: Any) -> None:
    """Let go of an answer whose body nobody wants: the connection stays open if that costs no wait."""
    length = response.headers.get("Content-Length", "")
    if response.request.method == "HEAD" or (_DIGITS.fullmatch(length) and int(length) <= _PROSE):
        with contextlib.suppress(Exception):
            _reader(response)(_PROSE)
    response.close()


def _reader(response: Any) -> Callable[[int], bytes]:
    """What reads up to so many bytes: as they come, where urllib3 can do that."""
    read: Callable[[int], bytes] = getattr(response.raw, "read1", response.raw.read)
    return read


def _redirected(target: Target, response: Any) -> Target:
    reference = response.headers.get("Location")
    if reference is None:
        raise StoreError("the server redirects without saying where")
    # Headers arrive as Latin-1, and servers send UTF-8 in them.
    with contextlib.suppress(UnicodeError):
        reference = reference.encode("latin-1").decode()
    if not reference.isprintable():
        raise InvalidLocation("the server redirects to what is no location")
    found = target.join(reference)
    if found.scheme != target.scheme:
        raise InvalidLocation(
            f"the server redirects from {target.scheme} to {found.scheme}, which is not followed: use the location "
            f"that begins with {found.origin}"
        )
    return found


def _checked(response: Any, *wanted: int) -> Any:
    """``response`` if its status is one of ``wanted`` and its body is the plain image, or a part of it."""
    status: int = response.status_code
    if status not in wanted:
        raise _failure(status, response.headers)
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise Unsupported(f"the server sends the image encoded as {coding[:20]!r}, though it was asked not to")
    if response.headers.get("Transfer-Encoding", "chunked").strip().lower() != "chunked":
        raise Unsupported("the server sends the image in a transfer encoding other than chunked")
    return response


def _failure(status: int, headers: Mapping[str, str]) -> StoreError:
    """What a status means (RFC 9110, 15). The server's own words are not repeated: they are a stranger's."""
    message = f"the server answered {status}"
    with contextlib.suppress(ValueError):
        message = f"{message} ({HTTPStatus(status).phrase})"
    wait = retry_after(headers.get("Retry-After"), headers.get("Date"))
    if status == 503 and wait is not None:
        return RateLimited(message, retry_after=wait)
    kind = _FAILURES.get(status, Unavailable if 500 <= status < 600 else StoreError)
    return kind(message, retry_after=wait, temporary=False if status in _LASTING else None)


def _stat(response: Any, size: int) -> Stat:
    return Stat(
        size=size, version=_version(response.headers), modified=http_date(response.headers.get("Last-Modified"))
    )


def _version(headers: Mapping[str, str]) -> str | None:
    etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if etag.startswith('"') and etag.endswith('"') and len(etag) > 1:
        return etag
    return f"{etag} {modified}".strip() or None


def _length(response: Any) -> int | None:
    """``Content-Length``, where that is what ends the body."""
    text = response.headers.get("Content-Length")
    if text is None or "Transfer-Encoding" in response.headers:
        return None
    if not _DIGITS.fullmatch(text.strip()):
        raise StoreError("the server tells a length that is no number")
    return int(text)


def _content_range(response: Any) -> tuple[int | None, int | None, int | None]:
    """First and last byte, and length of the whole; None for what is not told."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if match is None:
        raise StoreError("the server sends a part of the image without saying which")
    first, last, total = (int(text) if text and text != "*" else None for text in match.groups())
    return first, last, total


def _total(response: Any) -> int:
    """The length of the whole image."""
    size = _content_range(response)[2] if response.status_code == 206 else _length(response)
    if size is None:
        raise Unsupported("the server does not tell the length of the image: a cut one could not be told from a whole")
    return size


def _chunks(response: Any, size: int, start: int, stop: int | None) -> _Chunks:
    """The bytes from ``start`` to ``stop`` out of an answer that has at least some of them."""
    end = size if stop is None else min(stop, size)
    if start > size:
        raise Changed(f"the image has only {size} bytes now")
    if response.status_code == 200:
        return _Chunks(response, skip=start, count=end - start, whole=end == size)
    first, last, _ = _content_range(response)
    if first != start or last is None or not start <= last < end:
        raise StoreError("the server sends another part of the image than it was asked for")
    if _length(response) not in (None, last + 1 - start):
        raise StoreError("the server contradicts itself on the length of a part")
    # Less than was asked for is allowed; the end then comes too early, and the store asks for the rest.
    return _Chunks(response, count=end - start, held=last + 1 - start)


class _Chunks(Chunks):
    """The bytes of an answer; an error if it ends before all of them came, or goes on after that."""

    def __init__(
        self, response: Any, *, count: int, skip: int = 0, held: int | None = None, whole: bool = True
    ) -> None:
        """``count`` bytes after the first ``skip``, of which the answer holds ``held``; ``whole``: then it ends."""
        super().__init__()
        self._response = response
        self._read = _reader(response)
        self._skip = skip
        self._left = count
        self._held = count if held is None else held
        self._whole = whole

    def fetch(self) -> bytes:
        while self._skip:
            self._skip -= len(self._some(self._skip))
        if not self._left:
            # To be read up to its end is what makes a connection fit for use again.
            if self._whole and self._read(1):
                raise StoreError("the server sends more than it said")
            return b""
        if not self._held:
            raise Unavailable(f"the server sent only a part of what it was asked for: {self._left} bytes are missing")
        data = self._some(self._held)
        self._held -= len(data)
        self._left -= len(data)
        return data

    def _some(self, most: int) -> bytes:
        data = self._read(min(_CHUNK, most))
        if not data:
            raise Unavailable(f"the server ended {self._left + self._skip} bytes too early")
        if len(data) != _RECORD:
            return data
        # Encrypted data come in small records. While they are full ones, more is there, or nearly so.
        parts, length = [data], len(data)
        with contextlib.suppress(Exception):  # what came counts; the fault shows again when more is asked for
            while len(parts[-1]) == _RECORD and length < min(_CHUNK, most):
                parts.append(self._read(min(_CHUNK, most) - length))
                length += len(parts[-1])
        return b"".join(parts)

    def release(self) -> None:
        self._response.close()


def _native(error: Exception) -> bool:
    """Whether an error comes from requests, or from what lies below it."""
    home = type(error).__module__.partition(".")[0]
    return home in ("requests", "urllib3") or isinstance(error, OSError)


def _within(error: BaseException) -> Iterable[BaseException]:
    """``error`` and those that it wraps, in whichever way."""
    seen: list[BaseException] = []
    todo = [error]
    while todo and len(seen) < 20:
        each = todo.pop()
        if each in seen:
            continue
        seen.append(each)
        wrapped = (*each.args, getattr(each, "reason", None), each.__cause__)
        todo += [inner for inner in wrapped if isinstance(inner, BaseException)]
    return seen
