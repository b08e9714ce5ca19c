"""A web server in this process that misbehaves as it is told: for tests of HTTP clients.

::

    with FaultyHttp() as server:
        url = server.add(b"image", Manners(ranges=False, cuts=[1000]))

It speaks HTTP over plain sockets, so that it can break every rule. `Manners` say how one image is served; they may be
changed between requests. ``server.requests`` has all requests, ``server.connections`` counts what connected.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["FaultyHttp", "Listener", "Manners", "Request"]

PATIENCE = 20.0


@dataclass(kw_only=True)
class Manners:
    """How an image is served.

    Attributes:
        head: status for HEAD; 200 answers it.
        head_length: what HEAD says of the length; None leaves it out, "right" is the truth.
        ranges: whether ranges are known; if not, they get 200 and everything.
        length: whether GET tells Content-Length. Without, the body is chunked, or ends with the connection.
        chunked: whether a body without length is chunked.
        longer: added to the Content-Length that is told.
        etag, modified: validators; None leaves them out.
        encoding: value for Content-Encoding.
        content_range: in place of the right one.
        headers: more lines.
        statuses: answers for the next requests, as (status, more header lines); then it goes on normally.
        redirect: status and Location instead of the image.
        cuts: for each of the next bodies after how many bytes the connection breaks off; None breaks nothing.
        reset: break off with a reset, not with an orderly end.
        stall: after how many bytes of each body nothing comes any more; -1 is before the status line.
        piece: how many bytes are sent at once.
        keep: whether a connection serves more than one request.
        body: bytes in place of the image's own.
        on_request: called with each request before it is answered.
    """

    head: int = 200
    head_length: int | str | None = "right"
    ranges: bool = True
    length: bool = True
    chunked: bool = True
    longer: int = 0
    etag: str | None = '"first"'
    modified: str | None = "Wed, 01 Jul 2026 10:00:00 GMT"
    encoding: str | None = None
    content_range: str | None = None
    headers: tuple[str, ...] = ()
    statuses: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    redirect: tuple[int, str | None] | None = None
    cuts: list[int | None] = field(default_factory=list)
    reset: bool = False
    stall: int | None = None
    piece: int = 1 << 20
    keep: bool = True
    body: bytes | None = None
    on_request: Callable[[Request], object] | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request as it came; names of headers in lower case."""

    method: str
    target: str
    headers: dict[str, str]


class Listener:
    """A listening socket that counts, and hands connections to `serve` in threads. The canary of tests."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=128)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self.connections = 0
        self._over = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._start(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Break off all connections and wait for the threads."""
        self._over.set()
        # Wakes whoever waits in accept().
        self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._socket.close()

    def serve(self, connection: socket.socket) -> None:
        """A canary says nothing."""

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, name="faulty-http", daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(PATIENCE)
            with self._lock:
                self.connections += 1
                self._open.add(connection)
            self._start(self._run, connection)

    def _run(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError, ssl.SSLError):
                self.serve(connection)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


class FaultyHttp(Listener):
    """The server. It answers requests with a whole URL in them too, so that it can play a proxy for http.

    While `down` is set, every request gets 503.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._images: dict[str, tuple[bytes, Manners]] = {}
        self._tls = tls
        self.requests: list[Request] = []
        self.down = False
        super().__init__(host, port)

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    def add(self, data: bytes = b"", manners: Manners | None = None, path: str = "") -> str:
        """Serve ``data``, under ``path`` or a fresh one. Returns its URL."""
        path = path or f"/{uuid.uuid4().hex}"
        self._images[path] = (data, manners or Manners())
        return self.origin + path

    def redirect(self, location: str | None, status: int = 302, path: str = "", **manners: object) -> str:
        """Redirect to ``location``. Returns the URL that does."""
        return self.add(b"", Manners(redirect=(status, location), **manners), path)

    def serve(self, connection: socket.socket) -> None:
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True)
        with connection, connection.makefile("rb") as file:
            while (request := _read_request(file)) is not None:
                self.requests.append(request)
                if not self._answer(connection, request):
                    return

    def _answer(self, connection: socket.socket, request: Request) -> bool:
        """Whether the connection can go on."""
        if self.down:
            _send(connection, 503, ("Content-Length: 0",))
            return True
        path = re.sub("^http://[^/]*", "", request.target)
        found = self._images.get(path) or self._images.get(path.partition("?")[0])
        if found is None:
            _send(connection, 404, ("Content-Length: 9",), b"" if request.method == "HEAD" else b"not found")
            return True
        data, manners = found
        if manners.on_request:
            manners.on_request(request)
        if manners.stall == -1:
            self._over.wait(PATIENCE)
            return False
        if manners.statuses:
            status, lines = manners.statuses.pop(0)
            _send(connection, status, ("Content-Length: 0", *_closing(manners.keep), *lines))
            return manners.keep
        if manners.redirect:
            status, location = manners.redirect
            lines = ("Content-Length: 0", *_closing(manners.keep))
            lines += (f"Location: {location}",) if location is not None else ()
            _send(connection, status, (*lines, *manners.headers))
            return manners.keep
        return self._image(connection, request, data if manners.body is None else manners.body, manners)

    def _image(self, connection: socket.socket, request: Request, data: bytes, manners: Manners) -> bool:
        status, lines, body = 200, [*manners.headers, *_closing(manners.keep)], data
        if manners.etag is not None:
            lines.append(f"ETag: {manners.etag}")
        if manners.modified is not None:
            lines.append(f"Last-Modified: {manners.modified}")
        if manners.encoding is not None:
            lines.append(f"Content-Encoding: {manners.encoding}")
        if request.method == "HEAD":
            if manners.head_length is not None:
                lines.append(f"Content-Length: {len(data) if manners.head_length == 'right' else manners.head_length}")
            _send(connection, manners.head, lines)
            return manners.keep
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted and manners.ranges:
            first = int(wanted[1])
            last = min(int(wanted[2] or len(data)), len(data) - 1)
            if first >= len(data):
                _send(connection, 416, ("Content-Length: 0", f"Content-Range: bytes */{len(data)}"))
                return manners.keep
            status, body = 206, data[first : last + 1]
            lines.append(f"Content-Range: {manners.content_range or f'bytes {first}-{last}/{len(data)}'}")
        keep = manners.keep
        chunked = not manners.length and manners.chunked
        if manners.length:
            lines.append(f"Content-Length: {len(body) + manners.longer}")
            keep = keep and not manners.longer
        elif chunked:
            lines.append("Transfer-Encoding: chunked")
        else:
            keep = False
        cut = manners.cuts.pop(0) if manners.cuts else None
        _send(connection, status, lines)
        for start in range(0, len(body), manners.piece):
            stop = min(start + manners.piece, len(body))
            if manners.stall is not None and stop > manners.stall:
                connection.sendall(_framed(body[start : manners.stall], chunked))
                self._over.wait(PATIENCE)
                return False
            if cut is not None and stop > cut:
                connection.sendall(_framed(body[start:cut], chunked))
                if manners.reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            connection.sendall(_framed(body[start:stop], chunked))
        if chunked:
            connection.sendall(b"0\r\n\r\n")
        return keep


def _closing(keep: bool) -> tuple[str, ...]:
    return () if keep else ("Connection: close",)


def _framed(data: bytes, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked and data else data


def _send(connection: socket.socket, status: int, lines: tuple[str, ...] | list[str], body: bytes = b"") -> None:
    text = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} As told", *lines))
    connection.sendall(text.encode("utf-8", "surrogateescape") + b"\r\n" + body)


def _read_request(file) -> Request | None:
    line = file.readline(65536).decode("latin-1").split()
    if len(line) != 3:
        return None
    headers = {}
    while (text := file.readline(65536).decode("latin-1").rstrip("\r\n")) != "":
        name, _, value = text.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Request(method=line[0], target=line[1], headers=headers)


def hostile_urls(port: int) -> list[str]:
    """URLs that lead to this host's ``port``, to metadata services or to no public place, in every spelling."""
    loopback = (
        "127.0.0.1", "127.0.0.2", "127.255.255.254", "127.1", "127.0.1", "127.000.000.001", "0177.0.0.1", "0177.1",
        "017700000001", "0x7f.0.0.1", "0x7F.1", "0x7f000001", "0X7F000001", "2130706433", "6425673729", "0", "0x0",
        "00", "0.0.0.0", "127.0.0.1.", "2130706433.", "127.0.0.1..", "localhost", "LOCALHOST", "LocalHost.",
        "%6c%6f%63alhost", "127%2e0%2e0%2e1", "%31%32%37.0.0.1", "127.0.0.1%00.example.com", "127.0.0.1%20",
        "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460", "\uff11\uff12\uff17\uff0e\uff10\uff0e\uff10\uff0e\uff11",
        "127\u30020\u30020\u30021", "l\u24decalhost", "\u0661\u0662\u0667.0.0.1", "127.0.0.1\u00ad", "[127.0.0.1]",
        "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::FFFF:127.0.0.1]",
        "[0:0:0:0:0:ffff:7f00:0001]", "[::127.0.0.1]", "[::7f00:1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]",
        "[64:ff9b::7f00:1]", "[64:ff9b:1::127.0.0.1]", "[64:ff9b:1:7f00:0:100::]", "[64:ff9b:1:7f00:0:100:808:808]",
        "[2002:7f00:1::]", "[2002:7f00:0001::1]", "[2001:0:7f00:1::f7f7:f7f7]", "[2001:0:808:808::80ff:fffe]",
        "[2a00:1450:4001:801:0:5efe:7f00:1]", "[2a00:1450:4001:801:200:5efe:7f00:1]", "[::1%25lo]", "[::1%lo]",
        "[fe80::1%25lo]", "[fe80::1]",
    )  # fmt: skip
    elsewhere = (
        "169.254.169.254", "169.254.43518", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "0xA9.0xFE.0xA9.0xFE",
        "\u2460\u2465\u2468.\u2461\u2464\u2463.\u2460\u2465\u2468.\u2461\u2464\u2463", "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "[fd00:ec2::254]", "[fd20:ce::254]",
        "[fe80::a9fe:a9fe]", "100.100.100.200", "192.0.0.192", "168.63.129.16", "10.0.0.1", "172.16.0.1",
        "172.31.255.255", "192.168.0.1", "100.64.0.1", "100.127.255.255", "198.18.0.1", "192.0.2.1", "198.51.100.1",
        "203.0.113.1", "192.88.99.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "[fc00::1]", "[fec0::1]",
        "[ff02::1]", "[2001:db8::1]", "[2001:2::1]", "[2001:10::1]", "[3fff::1]", "[100::1]", "[5f00::1]", "[4000::1]",
    )  # fmt: skip
    odd = (
        f"http://example.com@127.0.0.1:{port}/x", f"http://example.com:80@127.0.0.1:{port}/x",
        f"http://a@b@127.0.0.1:{port}/x", f"http://127.0.0.1:{port}\\@example.com/x",
        f"http://example.com\\@127.0.0.1:{port}/x", f"http://127.0.0.1:{port}:80/x", f"http://::1:{port}/x",
        f"http:/127.0.0.1:{port}/x", f"http:127.0.0.1:{port}/x", f"http:///127.0.0.1:{port}/x",
        f"http:////127.0.0.1:{port}/x", f"http://\\127.0.0.1:{port}/x", f"http:\\\\127.0.0.1:{port}/x",
        f"http://127.0.0.1:0{port:06d}/x", "http://127.0.0.1:0/x", "http://127.0.0.1:65536/x", "http://127.0.0.1:/x",
        f"http://127.0.0.1 :{port}/x", f"http://127.0.0.1\t:{port}/x", f"http://127.0.0.1,example.com:{port}/x",
        f"ftp://127.0.0.1:{port}/x", f"gopher://127.0.0.1:{port}/x", "file:///etc/passwd", f"dict://127.0.0.1:{port}/x",
        f"hTTp://127.0.0.1:{port}/x", f"HTTPS://127.0.0.1:{port}/x",
    )  # fmt: skip
    return [*(f"http://{host}:{port}/x" for host in loopback), *(f"http://{host}/x" for host in elsewhere), *odd]
