"""The kit on the HTTP driver: a real nginx with its manners, and a server with all the bad ones."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from imagestore import Store, open_store
from imagestore._models import Retry
from imagestore.driver import Driver, Options, Timeouts
from imagestore.drivers.http import HttpDriver
from imagestore.errors import InvalidLocation, NotFound, StoreError, Unauthenticated, Unavailable, Unsupported
from imagestore.testing import DriverConformance, Harness

SERVERS = Path(__file__).parents[1] / "servers"
sys.path.insert(0, str(SERVERS))

from faulty_http import FaultyHttp, Listener, Manners, hostile_urls  # noqa: E402 - from where the servers are

pytestmark = pytest.mark.filterwarnings("error")

SDK = ("requests", "urllib3", "certifi", "boto3", "swiftclient", "cinderclient", "pymongo")
# For servers that differ only in what they answer.
ANSWERS = ("contract", "faults", "locations")
CODES = (301, 302, 303, 307, 308)


def _unavailable(reason: str) -> None:
    """Skip, unless the caller wants everything to run."""
    if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all":
        pytest.fail(reason)
    pytest.skip(reason)


class Nginx:
    """The server of this test run: started when it is first needed, stopped at the end."""

    place: ClassVar[tempfile.TemporaryDirectory[str] | None] = None
    told: ClassVar[dict[str, Any]] = {}

    @classmethod
    def start(cls) -> None:
        if cls.place is not None:
            return
        place = tempfile.TemporaryDirectory(prefix="imagestore-nginx-")
        done = subprocess.run(
            [SERVERS / "nginx", "start", place.name], capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode != 0:
            place.cleanup()
            _unavailable(f"nginx: {done.stderr.strip()}")
        cls.place, cls.told = place, json.loads(done.stdout)

    @classmethod
    def stop(cls) -> None:
        if cls.place is not None:
            subprocess.run([SERVERS / "nginx", "stop", cls.place.name], check=True, timeout=60)
            cls.place.cleanup()
            cls.place = None


@pytest.fixture(scope="module", autouse=True)
def _nginx_stops() -> Iterator[None]:
    yield
    Nginx.stop()


def _driver(**options: Any) -> HttpDriver:
    values = {option.dest: option.default for option in HttpDriver.options}
    return HttpDriver(Options({**values, **options}), store="kit", timeouts=Timeouts(connect=5, stall=10))


def _only(origin: str) -> dict[str, list[str]]:
    """Options that open the guard for one server, and keep names that the kit makes up from being looked up."""
    server = origin.partition("://")[2]
    return {"hosts": [server], "allow": [server]}


class HttpHarness(Harness):
    sdk = SDK

    def __init__(self) -> None:
        self.alarm = Listener()

    def make_unreachable(self) -> None:
        """Opening a store connects to nothing: each location names its own server. See the unit tests."""

    def close(self) -> None:
        self.alarm.close()

    def hostile_locations(self) -> Iterable[str]:
        # What stands before the last "@" is cut first; what is left of some is a fine public host.
        return [url for url in hostile_urls(self.alarm.port) if "@example.com" not in url]

    @contextlib.contextmanager
    def canary(self) -> Iterator[None]:
        before = self.alarm.connections
        yield
        assert self.alarm.connections == before, "something was reached"


class NginxHarness(HttpHarness):
    scheme: ClassVar[str] = "http"
    path: ClassVar[str] = "images"
    login: ClassVar[bool] = False

    def __init__(self) -> None:
        Nginx.start()
        super().__init__()

    def make_driver(self) -> Driver:
        told = Nginx.told
        origin = told[self.scheme]
        login = [f"{origin}={told['user']}:{told['password']}"] if self.login else []
        return _driver(**_only(origin), cacert=told["cacert"], credentials=login)

    def plant(self, data: bytes) -> str:
        name = uuid.uuid4().hex
        part = Path(Nginx.told["root"], f"{name}.part")
        part.write_bytes(data)
        part.rename(part.with_name(name))
        return f"{Nginx.told[self.scheme]}/{self.path}/{name}"


def _nginx(path: str, **attributes: Any) -> type[NginxHarness]:
    return type("NginxHarness", (NginxHarness,), {"path": path, "__module__": __name__, **attributes})


class TestNginx(DriverConformance):
    harness = _nginx("images")


class TestNginxTls(DriverConformance):
    harness = _nginx("images", scheme="https")


class TestNginxNoHead(DriverConformance):
    harness = _nginx("no-head")


class TestNginxForbiddenHead(DriverConformance):
    harness = _nginx("no-head-403")
    parts = ANSWERS


class TestNginxNoRanges(DriverConformance):
    harness = _nginx("no-range")
    parts = ANSWERS


class TestNginxLastModified(DriverConformance):
    harness = _nginx("no-etag")
    parts = ANSWERS


class TestNginxNoValidators(DriverConformance):
    harness = _nginx("plain")
    parts = ANSWERS


class TestNginxGzip(DriverConformance):
    harness = _nginx("gzip")
    parts = ANSWERS


class TestNginxPassword(DriverConformance):
    harness = _nginx("auth", scheme="https", login=True)


class TestNginxRelativeRedirect(DriverConformance):
    harness = _nginx("redirect/307/relative")
    parts = ANSWERS


class TestNginxAbsoluteRedirectTls(DriverConformance):
    harness = _nginx("redirect/302/absolute", scheme="https")


class FaultyHarness(HttpHarness):
    manners: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.server = FaultyHttp()

    def make_driver(self) -> Driver:
        return _driver(**_only(self.server.origin))

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        before = len(self.server.requests)
        self.server.down = True
        try:
            yield lambda: len(self.server.requests) - before
        finally:
            self.server.down = False

    def plant(self, data: bytes) -> str:
        return self.server.add(data, Manners(**{**self.manners, "cuts": [*self.manners.get("cuts", ())]}))

    def close(self) -> None:
        self.server.close()
        super().close()


def _faulty(**manners: Any) -> type[FaultyHarness]:
    return type("FaultyHarness", (FaultyHarness,), {"manners": manners, "__module__": __name__})


class TestOneRequestPerConnection(DriverConformance):
    harness = _faulty(keep=False)


class TestNoLengthButRanges(DriverConformance):
    """Chunked bodies; only the answer to a range tells how long the image is."""

    harness = _faulty(length=False, head_length=None)


class TestNoLengthNoFrames(DriverConformance):
    """Bodies that end with the connection."""

    harness = _faulty(length=False, chunked=False, head_length=None)
    parts = ANSWERS


class TestHeadSaysZero(DriverConformance):
    harness = _faulty(head_length=0)
    parts = ANSWERS


class TestWeakETag(DriverConformance):
    harness = _faulty(etag='W/"weak"')
    parts = ANSWERS


class TestNothingButBytes(DriverConformance):
    """No HEAD, no ranges, no validators."""

    harness = _faulty(head=405, head_length=None, ranges=False, etag=None, modified=None)


class TestSmallPieces(DriverConformance):
    harness = _faulty(piece=1500)
    parts = ANSWERS


class TestCuts(DriverConformance):
    """The first bodies of every image break off. (The kit's own faults count attempts, and so are left out.)"""

    harness = _faulty(cuts=[None, 1, 70_000, 1000, 0, 5])
    parts = ("contract", "discipline", "locations")


class TestResets(DriverConformance):
    harness = _faulty(cuts=[0, 100_000, 1, None, 9], reset=True)
    parts = ("contract", "discipline", "locations")


# What nginx does and the kit does not ask for


@pytest.fixture
def told() -> dict[str, Any]:
    Nginx.start()
    return Nginx.told


@pytest.fixture
def store(told: dict[str, Any]) -> Iterator[Store]:
    with open_store("http", allow=["127.0.0.1:*"], cacert=told["cacert"]) as store:
        yield store


DATA = bytes(range(256)) * 3000


def _plant(told: dict[str, Any], name: str, data: bytes = DATA) -> None:
    Path(told["root"], name).write_bytes(data)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("form", ["absolute", "relative"])
@pytest.mark.parametrize("code", CODES)
def test_redirects(told: dict[str, Any], store: Store, code: int, form: str, scheme: str) -> None:
    _plant(told, "redirected")
    url = f"{told[scheme]}/redirect/{code}/{form}/redirected"
    assert store.stat(url).size == len(DATA)
    with store.get(url) as reader:
        assert reader.read() == DATA
    with store.get(url, start=1000, stop=2000) as reader:
        assert reader.read() == DATA[1000:2000]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("code", CODES)
def test_redirects_to_another_scheme(told: dict[str, Any], store: Store, code: int, scheme: str) -> None:
    _plant(told, "redirected")
    with pytest.raises(InvalidLocation, match="redirects from"):
        store.get(f"{told[scheme]}/redirect/{code}/other-scheme/redirected")


def test_redirect_loop(told: dict[str, Any], store: Store) -> None:
    with pytest.raises(StoreError, match="more than 5 times"):
        store.get(f"{told['http']}/loop/1")


def test_compressed_is_never_stored_raw(told: dict[str, Any], store: Store) -> None:
    import gzip

    _plant(told, "compressible", b"0" * 100_000)
    _plant(told, "packed.gz", gzip.compress(b"0" * 100_000))
    url = f"{told['http']}/gzip/compressible"
    assert store.get_size(url) == 100_000
    with store.get(url) as reader:
        assert reader.read() == b"0" * 100_000
    for ask in (store.stat, store.get):
        with pytest.raises(Unsupported, match="gzip"):
            ask(f"{told['http']}/gzip-always/packed")


def test_password(told: dict[str, Any], store: Store) -> None:
    _plant(told, "locked")
    url = f"{told['https']}/auth/locked"
    with pytest.raises(Unauthenticated):
        store.get(url)
    with pytest.raises(Unauthenticated):
        store.get(url.replace("://", f"://{told['user']}:{told['password']}@"))
    for server, fits in ((told["https"], True), (told["https"][8:], True), (told["http"], False)):
        login = [f"{server}={told['user']}:{told['password']}"]
        with open_store("http", allow=["127.0.0.1:*"], cacert=told["cacert"], credentials=login) as other:
            if fits:
                assert other.get_size(url) == len(DATA)
            else:
                with pytest.raises(Unauthenticated):
                    other.get_size(url)


def test_certificates_are_verified(told: dict[str, Any]) -> None:
    _plant(told, "secret")
    url = f"{told['https']}/images/secret"
    with open_store("http", allow=["127.0.0.1:*"]) as store, pytest.raises(StoreError, match="cacert") as caught:
        store.get(url)
    assert not caught.value.temporary
    assert caught.value.attempts in (None, 1)


def test_names_in_certificates_are_verified(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(told, "secret")
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: look_up("127.0.0.1", *rest))
    with open_store("http", allow=["*.test:*", "localhost:*"], cacert=told["cacert"]) as store:
        assert store.get_size(f"https://localhost:{told['tls_port']}/images/secret") == len(DATA)
        with pytest.raises(StoreError, match="not made out for this host"):
            store.get(f"https://other.test:{told['tls_port']}/images/secret")


class Tunnel(Listener):
    """A proxy that knows CONNECT, with a password."""

    asked: ClassVar[list[str]] = []

    def serve(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        self.asked.append(head.decode())
        if b"Proxy-Authorization: Basic Ym9iOnMzY3JldA==" not in head:
            connection.sendall(b"HTTP/1.1 407 Who are you\r\n\r\n")
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        with socket.create_connection((host.replace("inner.test", "127.0.0.1"), int(port))) as other:
            connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            pump = threading.Thread(target=_pump, args=(connection, other), daemon=True)
            pump.start()
            _pump(other, connection)
            pump.join(20)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def test_tls_through_a_proxy(told: dict[str, Any]) -> None:
    """It is the server's certificate that counts, and the proxy gets to see names that are allowed, and no paths."""
    _plant(told, "proxied")
    place = told["https"].partition("://")[2]
    with Tunnel() as tunnel:
        for login, fits in (("bob:s3cret@", True), ("bob:wrong@", False)):
            proxies = {"https": f"http://{login}127.0.0.1:{tunnel.port}"}
            options = {"allow": [place, f"inner.test:{told['tls_port']}"], "cacert": told["cacert"]}
            with open_store("http", proxies=proxies, retry=Retry(attempts=1), **options) as store:
                if not fits:
                    with pytest.raises(Unavailable, match="proxy"):
                        store.get(f"https://{place}/images/proxied?sig=s3cret")
                    continue
                with store.get(f"https://{place}/images/proxied") as reader:
                    assert reader.read() == DATA
                with pytest.raises(StoreError, match="not made out for this host"):
                    store.get(f"https://inner.test:{told['tls_port']}/images/proxied")
                with pytest.raises(InvalidLocation):
                    store.get("https://other.test/images/proxied")
        assert {head.split()[1] for head in tunnel.asked} == {place, f"inner.test:{told['tls_port']}"}
        assert not any("images" in head or "other.test" in head for head in tunnel.asked)


def test_read_only(told: dict[str, Any], store: Store) -> None:
    _plant(told, "kept")
    with pytest.raises(StoreError, match="read only"):
        store.add("image", b"data")
    with pytest.raises(StoreError, match="no delete"):
        store.delete(f"{told['http']}/images/kept")
    with pytest.raises(NotFound):
        store.get(f"{told['http']}/images/never")


def test_download_in_parallel_ranges(told: dict[str, Any], store: Store, tmp_path: Path) -> None:
    data = os.urandom(20 << 20)
    _plant(told, "large", data)
    store.download(f"{told['https']}/images/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == data
