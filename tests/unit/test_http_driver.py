"""The HTTP driver against a server that misbehaves, names that lie, and URLs of every spelling."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from imagestore import Store, load_stores, open_store
from imagestore._models import Retry, Timeouts
from imagestore._options import OLD_OPTIONS
from imagestore.driver import Options
from imagestore.drivers._http_guard import is_public, parse_rule, parse_target
from imagestore.drivers.http import HttpDriver
from imagestore.errors import (
    Cancelled,
    Changed,
    ConfigurationError,
    InvalidLocation,
    InvalidOption,
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

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from faulty_http import FaultyHttp, Listener, Manners, hostile_urls

DATA = os.urandom(700_000)
ONCE = Retry(attempts=1)
QUICK = Retry(attempts=3, first=0.001, longest=0.01)


def driver(**options: Any) -> HttpDriver:
    values = {option.dest: option.default for option in HttpDriver.options}
    return HttpDriver(Options({**values, **options}), store="web", timeouts=Timeouts(connect=20, stall=20))


@pytest.fixture
def server() -> Iterator[FaultyHttp]:
    with FaultyHttp() as server:
        yield server


@pytest.fixture
def canary() -> Iterator[Listener]:
    """What must not be reached."""
    with Listener() as canary:
        yield canary
        assert canary.connections == 0, "somebody connected"


@pytest.fixture
def make(server: FaultyHttp) -> Iterator[Callable[..., Store]]:
    """Makes stores that may reach the server."""
    stores: list[Store] = []

    def make(*, retry: Retry = ONCE, connect: float = 20, stall: float = 20, **options: Any) -> Store:
        options = {"allow": [f"127.0.0.1:{server.port}"], **options}
        stores.append(
            open_store("http", "web", retry=retry, timeouts=Timeouts(connect=connect, stall=stall), **options)
        )
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make: Callable[..., Store]) -> Store:
    return make()


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every address that a socket of this process is connected to."""
    places: list[tuple[str, int]] = []
    connect = socket.socket.connect

    def record(self: socket.socket, place: Any) -> None:
        places.append(place[:2])
        # Nothing leaves this machine, whatever was decided.
        if not ipaddress.ip_address(place[0].partition("%")[0]).is_loopback:
            raise ConnectionRefusedError("this test has no network")
        connect(self, place)

    monkeypatch.setattr(socket.socket, "connect", record)
    return places


class Names:
    """A resolver: each name has a list of answers, one for each time that it is asked for; the last one stays."""

    def __init__(self, names: dict[str, list[list[str]]]) -> None:
        self.names = names
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, family: int = 0, kind: int = 0, *rest: int) -> list[Any]:
        self.asked.append(host)
        with contextlib.suppress(ValueError):
            return self._answer([str(ipaddress.ip_address(host))], port)
        with contextlib.suppress(OSError):
            # As the real one does with 127.1 and 0x7f000001.
            return self._answer([socket.inet_ntoa(socket.inet_aton(host))], port)
        answers = self.names.get(host.lower().rstrip("."))
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self._answer(answers.pop(0) if len(answers) > 1 else answers[0], port)

    def _answer(self, addresses: list[str], port: int) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (each, port, 0, 0))
            if ":" in each
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in addresses
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names({"localhost": [["::1", "127.0.0.1"]]})
    monkeypatch.setattr(socket, "getaddrinfo", names)
    return names


def chain(error: BaseException | None) -> str:
    """All that an error and those below it tell."""
    text = ""
    while error is not None:
        text += f"{error!r} {error} {error.args!r} {getattr(error, 'location', '')}\n"
        error = error.__cause__ or error.__context__
    return text


# Options


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("hosts", ["a b"], "'a b' is not a host name"),
        ("hosts", ["example.com:0"], "no port"),
        ("hosts", ["example.com:http"], "no port"),
        ("hosts", ["https://example.com"], "no port"),
        ("hosts", ["*"], "not a host name"),
        ("hosts", ["a.*.com"], "not a host name"),
        ("allow", ["10.0.0.1/8"], "without host bits"),
        ("allow", ["127.1"], "not an address"),
        ("allow", ["0x7f000001"], "not an address"),
        ("allow", ["[::1"], "bracket"),
        ("allow", ["[::1]80"], "bracket"),
        ("allow", [""], "not a host name"),
        ("user_agent", "a\r\nX: y", "printable"),
        ("proxies", {"ftp": "proxy:3128"}, "not http: or https:"),
        ("proxies", {"http": "socks5://proxy:1080"}, "not http: or https:"),
        ("proxies", {"http": "bob:s3cret@proxy:1/path"}, "not http: or https:"),
        ("credentials", ["s3cret"], "server=user:password"),
        ("credentials", ["example.com=s3cret"], "server=user:password"),
        ("credentials", ["bob:s3cret@example.com=a:b"], "server=user:password"),
        ("credentials", ["ftp://example.com=bob:s3cret"], "names no server"),
        ("credentials", ["127.1=bob:s3cret"], "names no server"),
        ("credentials", ["example.com/path=bob:s3cret"], "has a path"),
    ],
)
def test_bad_options(option: str, value: Any, told: str) -> None:
    with pytest.raises(InvalidOption, match=told) as caught:
        driver(**{option: value})
    assert f"option {option}" in str(caught.value)
    assert "s3cret" not in chain(caught.value)


def test_secrets_are_marked() -> None:
    assert {option.dest for option in HttpDriver.options if option.secret} == {"proxies", "credentials"}
    made = driver(credentials=["example.com=bob:s3cret"], proxies={"http": "http://bob:s3cret@proxy:1"})
    assert "s3cret" not in repr(made) + repr(made.settings)


def test_old_options_lead_to_ours() -> None:
    ours = {option.dest for option in HttpDriver.options}
    assert {old.to for old in OLD_OPTIONS["http"] if old.fate == "kept"} <= ours


def test_loads_from_a_file(tmp_path: Path) -> None:
    conf = tmp_path / "stores.conf"
    text = (
        "[DEFAULT]\nenabled_backends = web:http\n[web]\nhttps_insecure = false\n"
        "http_proxy_information = http:10.0.0.1:3128,https:10.0.0.1:3129\nallow = mirror.example:8080, 10.0.0.0/8\n"
        "credentials = mirror.example:8080=bob:pass=word,with:all\ncredentials = http://10.0.0.9=eve:x\n"
    )
    conf.write_text(text)
    with load_stores(conf) as stores:
        made = stores["web"]._template
        assert isinstance(made, HttpDriver)
        assert made._proxies == {"http": "http://10.0.0.1:3128", "https": "http://10.0.0.1:3129"}
        assert set(made._authorization) == {"https://mirror.example:8080", "http://10.0.0.9"}
    conf.write_text(text.replace("https_insecure = false", "https_insecure = true"))
    with pytest.raises(InvalidOption, match="certificates are always verified"):
        load_stores(conf)


def test_certificates_must_be_readable(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "missing.pem"):
        store = open_store("http", cacert=str(tmp_path / name))
        with pytest.raises(ConfigurationError, match="option cacert"):
            _ = store.capabilities


# Locations


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("HTTP://Example.COM", "http://example.com/"),
        ("https://example.com:443/a", "https://example.com/a"),
        ("https://example.com:80/a", "https://example.com:80/a"),
        ("http://example.com:/a", "http://example.com/a"),
        ("http://example.com:0080/a", "http://example.com/a"),
        ("http://example.com./a", "http://example.com/a"),
        ("http://example.com?x", "http://example.com/?x"),
        ("http://example.com/a?", "http://example.com/a?"),
        ("http://example.com/a#b?c", "http://example.com/a"),
        ("http://example.com/a/./b/../c", "http://example.com/a/c"),
        ("http://example.com/a/%2E%2e/b/.", "http://example.com/b/"),
        ("http://example.com/../..", "http://example.com/"),
        ("http://example.com//a//b", "http://example.com//a//b"),
        ("http://example.com/%7euser/%41%2f", "http://example.com/~user/A%2F"),
        ('http://example.com/a b|c\\d"<>', "http://example.com/a%20b%7Cc%5Cd%22%3C%3E"),
        ("http://example.com/\u00e9", "http://example.com/%C3%A9"),
        ("http://example.com/a@b", "http://example.com/a%40b"),
        ("http://example.com/a?b=%2e%2f/../&c=d?e", "http://example.com/a?b=%2E%2F/../&c=d?e"),
        ("http://bob:secret@example.com/a", "http://example.com/a"),
        ("http://8.8.8.8/a", "http://8.8.8.8/a"),
        ("http://[2A00:1450:0:0::1]:8080/a", "http://[2a00:1450::1]:8080/a"),
        ("http://[::ffff:8.8.8.8]/a", "http://8.8.8.8/a"),
    ],
)
def test_canonical(text: str, canonical: str) -> None:
    made = driver()
    location = made.parse(text)
    assert location.uri == canonical
    assert made.parse(canonical) == location
    assert location.key == ()


@pytest.mark.parametrize(
    "text",
    [
        "example.com/a",
        "http:/example.com/a",
        "ftp://example.com/a",
        "http://",
        "http:///a",
        "http://:80/a",
        "http://exa mple.com/",
        "http://ex\u00e4mple.com/",
        "http://example..com/",
        "http://-example.com/",
        "http://example.com:99999/",
        "http://example.com:8a/",
        "http://example.com/%",
        "http://example.com/%zz",
        "http://example.com/%0d%0aX",
        "http://example.com/%00",
        "http://example.com/\x7f",
        "http://example.com/\ud800",
        "http://" + "a" * 64 + ".com/",
        "http://" + "a." * 127 + "com/",
        "http://1.2.3/",
        "http://1.2.3.4.5/",
        "http://01.2.3.4/",
        "http://example.0x1/",
        "http://[1.2.3.4]/",
        "http://[::1/",
        "http://[::1]x/",
        "http://::1/",
    ],
)
def test_no_locations(text: str) -> None:
    with pytest.raises(InvalidLocation):
        driver().parse(text)


def test_hosts_restricts() -> None:
    made = driver(hosts=["images.example", "*.mirror.example:8443", "8.8.0.0/16:*", "[2a00:1450::]"])
    for text in (
        "http://images.example/a",
        "https://images.example/a",
        "https://de.mirror.example:8443/a",
        "http://8.8.4.4:99/a",
        "http://[2a00:1450::]/a",
    ):
        made.parse(text)
    for text in (
        "http://other.example/a",
        "http://images.example:8080/a",
        "http://x.images.example/a",
        "http://ximages.example/a",
        "https://mirror.example:8443/a",
        "https://xmirror.example:8443/a",
        "https://de.mirror.example/a",
        "http://8.9.0.1/a",
        "http://[2a00:1450::1]/a",
    ):
        with pytest.raises(InvalidLocation, match="option hosts"):
            made.parse(text)


def test_hosts_does_not_open_the_guard() -> None:
    with pytest.raises(InvalidLocation, match="no public address"):
        driver(hosts=["127.0.0.1:*"]).parse("http://127.0.0.1/a")
    with pytest.raises(InvalidLocation, match="option hosts"):
        driver(hosts=["images.example"], allow=["127.0.0.1:*"]).parse("http://127.0.0.1/a")


@pytest.mark.parametrize("entry", ["127.0.0.1", "127.0.0.0/8", "[127.0.0.1]", "127.0.0.1:80"])
def test_allow_means_ports_too(entry: str) -> None:
    made = driver(allow=[entry])
    made.parse("http://127.0.0.1/a")
    made.parse("http://[::ffff:127.0.0.1]/a")
    for text in ("http://127.0.0.1:8080/a", "http://[::1]/a", "http://127.1/a", "http://2130706433/a"):
        with pytest.raises(InvalidLocation):
            made.parse(text)


def test_rules_for_ipv6() -> None:
    for text, port in (("::1", 80), ("[::1]", 443), ("[::1]:8080", 8080), ("[::/64]:*", 9), ("::/64", 80)):
        assert parse_rule(text).admits("::1", port, ipaddress.ip_address("::1")), text
    assert not parse_rule("::1").admits("::1", 8080, ipaddress.ip_address("::1"))


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("http://other.example/x", "http://other.example/x"),
        ("//other.example/x", "http://other.example/x"),
        ("/x", "http://one.example:8080/x"),
        ("x", "http://one.example:8080/a/x"),
        ("../x?y", "http://one.example:8080/x?y"),
        ("./", "http://one.example:8080/a/"),
        ("?y", "http://one.example:8080/a/b?y"),
        ("", "http://one.example:8080/a/b?q=1/2"),
        ("#top", "http://one.example:8080/a/b?q=1/2"),
        ("//user:secret@other.example/p@q", "http://other.example/p@q"),
        ("\\\\other.example/x", "http://one.example:8080/a/%5C%5Cother.example/x"),
        ("/\\other.example/x", "http://one.example:8080/%5Cother.example/x"),
    ],
)
def test_redirect_targets(reference: str, found: str) -> None:
    assert parse_target("http://one.example:8080/a/b?q=1/2").join(reference).uri == found


@pytest.mark.parametrize("reference", ["http:x", "http:/x", "mailto:x", "data:,x", "///x", "http:\\\\x", "//a:b/"])
def test_bad_redirect_targets(reference: str) -> None:
    with pytest.raises(InvalidLocation):
        parse_target("http://one.example/a").join(reference)


# Addresses


PUBLIC = """
    8.8.8.8 1.1.1.1 93.184.216.34 100.63.255.255 100.128.0.0 172.15.255.255 172.32.0.0 192.0.1.1 198.17.255.255
    198.20.0.0 223.255.255.255 168.63.129.15 2a00:1450:4001:81b::200e 2606:4700:4700::1111 2001:4860:4860::8888
    64:ff9b::808:808 2002:808:808::1 ::ffff:8.8.8.8 2001:0:808:808::f7f7:f7f7
"""


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.255
    168.63.129.16 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.9 192.88.99.1 192.168.1.1
    198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.7 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 ::8.8.8.8 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:100.64.0.1 ::ffff:0:8.8.8.8 64:ff9b::7f00:1
    64:ff9b::6440:1 64:ff9b:1::808:808 64:ff9b:1:808:8:800:: 100::1 2001::1 2001:0:7f00:1::f7f7:f7f7
    2001:0:808:808::80ff:fffe 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1::1 2002:a00:1::1
    2002:6440:1::1 2a00::5efe:7f00:1 2a00::200:5efe:a00:1 3fff::1 3fff:fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254
    fe80::1 fe80::a9fe:a9fe fe80::1%eth0 2a00::1%eth0 fec0::1 ff02::1 ff0e::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


# Reaching nothing


@pytest.mark.parametrize("public", [False, True])
def test_hostile_locations(canary: Listener, names: Names, dialled: list[Any], public: bool) -> None:
    urls = hostile_urls(canary.port)
    assert len(urls) >= 60
    names.names.update({"example.com": [["93.184.216.34"]]} if public else {})
    with open_store("http", retry=ONCE) as store:
        for url, ask in itertools.product(urls, (store.get, store.stat)):
            with pytest.raises(Unavailable if "@example.com" in url else InvalidLocation):
                ask(url)
    assert {place for place, _ in dialled} <= {"93.184.216.34"}


def test_hostile_redirects(
    canary: Listener, server: FaultyHttp, names: Names, dialled: list[Any], store: Store
) -> None:
    urls = hostile_urls(canary.port)
    relative = [url[5:] for url in urls if url.startswith("http://")]
    tricks = ["/\\127.0.0.1", "\\\\127.0.0.1", "http://127.0.0.1\\@example.com", f"//127.0.0.1:{canary.port}"]
    codes = itertools.cycle([301, 302, 303, 307, 308])
    for number, url in enumerate([*urls, *relative, *tricks]):
        first = server.redirect(url, next(codes))
        # Also at the end of a chain.
        second = server.redirect(first, next(codes)) if number % 2 else first
        for ask in (store.get, store.stat):
            with pytest.raises(Unavailable if "@example.com" in url else (InvalidLocation, NotFound)):
                ask(second)
    assert set(dialled) == {("127.0.0.1", server.port)}


LYING = {
    "loopback.test": [["127.0.0.1"]],
    "loopback6.test": [["::1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "nat64.test": [["64:ff9b::7f00:1"]],
    "scoped.test": [["fe80::1%1"]],
    "zero.test": [["0.0.0.0"]],
    "zero6.test": [["::"]],
    "shared.test": [["100.64.0.1"]],
    "metadata.google.internal": [["169.254.169.254"]],
    "many.test": [["10.0.0.1", "::1", "127.0.0.1", "192.168.0.1", "fd00::1"]],
}


@pytest.mark.parametrize("name", LYING)
def test_names_of_private_addresses(canary: Listener, names: Names, dialled: list[Any], name: str) -> None:
    names.names.update(LYING)
    with open_store("http", retry=QUICK) as store:
        for scheme in ("http", "https"):
            with pytest.raises(InvalidLocation, match="no public address") as caught:
                store.get(f"{scheme}://{name}:{canary.port}/x")
            for answer in LYING[name][0]:
                assert answer not in str(caught.value), "strangers are told what the name stands for"
    assert names.asked == [name, name], "a refusal is final"
    assert dialled == []


def test_names_that_change_between_look_up_and_connect(names: Names, dialled: list[Any]) -> None:
    """Each connection asks once, and goes to the address that was judged."""
    with FaultyHttp("127.0.0.2") as server, Listener("127.0.0.1", server.port) as canary:
        path = server.add(DATA, Manners(keep=False)).removeprefix(server.origin)
        turns = [["127.0.0.2"], ["127.0.0.1"]] * 20
        names.names["turns.test"] = list(turns)
        url = f"http://turns.test:{server.port}{path}"
        for _ in range(10):
            with open_store("http", allow=[f"127.0.0.2:{server.port}"], retry=ONCE) as store:
                assert store.get_size(url) == len(DATA)
                with pytest.raises(InvalidLocation):
                    store.get(url)
        assert canary.connections == 0
        assert server.connections == 10
        assert len(names.asked) == 20, "one look-up for each connection"
        assert set(dialled) == {("127.0.0.2", server.port)}


def test_names_that_change_under_a_read(names: Names) -> None:
    """A read that breaks does not go on elsewhere."""
    with FaultyHttp("127.0.0.2") as server, Listener("127.0.0.1", server.port) as canary:
        path = server.add(DATA, Manners(cuts=[1000])).removeprefix(server.origin)
        names.names["turns.test"] = [["127.0.0.2"], ["127.0.0.1"]]
        with (
            open_store("http", allow=[f"127.0.0.2:{server.port}"], retry=QUICK) as store,
            store.get(f"http://turns.test:{server.port}{path}") as reader,
            pytest.raises(InvalidLocation),
        ):
            reader.read()
        assert canary.connections == 0


def test_first_public_then_private(canary: Listener, names: Names, dialled: list[Any]) -> None:
    names.names["turns.test"] = [["93.184.216.34"], ["127.0.0.1"]]
    with open_store("http", retry=QUICK) as store, pytest.raises(InvalidLocation):
        store.get(f"http://turns.test:{canary.port}/x")
    assert dialled == [("93.184.216.34", canary.port)]


def test_public_and_private_in_one_answer(names: Names, dialled: list[Any]) -> None:
    """Only what passes is tried, one after the other."""
    with FaultyHttp("127.0.0.2") as server, Listener("127.0.0.1", server.port) as canary:
        path = server.add(DATA).removeprefix(server.origin)
        names.names["mixed.test"] = [["127.0.0.1", "::1", "127.0.0.3", "127.0.0.2"]]
        allow = [f"127.0.0.2:{server.port}", f"127.0.0.3:{server.port}"]
        with open_store("http", allow=allow, retry=ONCE) as store:
            assert store.get_size(f"http://mixed.test:{server.port}{path}") == len(DATA)
        assert dialled == [("127.0.0.3", server.port), ("127.0.0.2", server.port)]
        assert canary.connections == 0


def test_a_connection_past_the_guard_is_not_used(
    server: FaultyHttp, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should urllib3 once open its sockets in another way, nothing is asked over them."""
    from urllib3.connection import HTTPConnection

    def connect(self: Any) -> None:
        self.sock = socket.create_connection((self.host, self.port))

    monkeypatch.setattr(HTTPConnection, "connect", connect)
    with pytest.raises(ConfigurationError, match="past the guard"):
        store.get(server.add(DATA))
    assert server.requests == []


def test_allow_by_name(server: FaultyHttp, names: Names, make: Callable[..., Store]) -> None:
    path = server.add(DATA).removeprefix(server.origin)
    names.names |= {"inner.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]}
    store = make(allow=[f"inner.test:{server.port}"])
    assert store.get_size(f"http://inner.test:{server.port}{path}") == len(DATA)
    for host in ("other.test", "x.inner.test.other.test", "127.0.0.1"):
        names.names[host] = [["127.0.0.1"]]
        with pytest.raises(InvalidLocation):
            store.get(f"http://{host}:{server.port}{path}")
    assert server.connections == 1


def test_ipv6_server() -> None:
    with FaultyHttp("::1") as server, open_store("http", allow=[f"[::1]:{server.port}"], retry=ONCE) as store:
        with store.get(server.add(DATA)) as reader:
            assert reader.read() == DATA
        assert server.requests[-1].headers["host"] == f"[::1]:{server.port}"


# Proxies


def test_proxy_fetches_only_what_is_allowed(
    server: FaultyHttp, canary: Listener, names: Names, make: Callable[..., Store]
) -> None:
    """The server plays the proxy: what is asked of it is a whole URL, and nobody here looks names up."""
    server.add(DATA, path="/image")
    server.redirect("http://named.test/image", path="/near")
    server.redirect("http://other.test/image", path="/far")
    server.redirect("//127.0.0.1/image", path="/inside")
    proxies = {"http": f"http://bob:s3cret@127.0.0.1:{server.port}", "https": f"127.0.0.1:{canary.port}"}
    store = make(allow=["named.test", "8.8.8.8"], proxies=proxies)
    with store.get("http://named.test/image?token=1") as reader:
        assert reader.read() == DATA
    assert server.requests[-1].target == "http://named.test/image?token=1"
    assert server.requests[-1].headers["proxy-authorization"] == "Basic Ym9iOnMzY3JldA=="
    assert store.get_size("http://8.8.8.8/image") == len(DATA)
    assert store.get_size("http://named.test/near") == len(DATA)
    for url in ("http://other.test/image", "http://127.0.0.1/image", "http://1.1.1.1/image", "https://x.test/image"):
        with pytest.raises(InvalidLocation, match="where a proxy resolves names"):
            store.get(url)
    for path in ("far", "inside"):
        with pytest.raises(InvalidLocation):
            store.get(f"http://named.test/{path}")
    assert names.asked.count("127.0.0.1") == len(names.asked), "a name was looked up here"


def test_unreachable_proxy(make: Callable[..., Store]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = make(allow=["named.test"], proxies={"http": f"http://bob:s3cret@127.0.0.1:{port}"})
    with pytest.raises(Unavailable) as caught:
        store.get("http://named.test/x?sig=s3cret")
    assert "s3cret" not in chain(caught.value)


# What goes out


def test_environment_does_not_count(
    server: FaultyHttp, canary: Listener, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login bob password s3cret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing"))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(tmp_path / "missing"))
    url = server.add(DATA, Manners(headers=("Set-Cookie: a=b; Path=/",)))
    for _ in range(2):
        with store.get(url) as reader:
            assert reader.read() == DATA
    for request in server.requests:
        assert not {"authorization", "cookie", "proxy-authorization", "referer"} & set(request.headers)
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["user-agent"] == "imagestore"


@pytest.mark.parametrize(
    "tail",
    [
        "//a//b",
        "/a?x=%2F%2f&y=%41+b%20c",
        "/a;b=c/d:e,f",
        "/%41",
        "/a?X-Amz-Signature=%7e~&b='()*!",
        "/?",
        "/a?b?c/../d",
    ],
)
def test_urls_go_out_as_they_are(server: FaultyHttp, store: Store, tail: str) -> None:
    with pytest.raises(NotFound):
        store.get(server.origin + tail)
    wanted = store.parse(server.origin + tail).uri.removeprefix(server.origin)
    assert server.requests[-1].target == wanted
    assert server.requests[-1].headers["host"] == f"127.0.0.1:{server.port}"


def test_credentials_stay_with_their_server(server: FaultyHttp, make: Callable[..., Store]) -> None:
    with FaultyHttp() as other:
        there = other.add(DATA)
        here = server.add(DATA)
        away, back = server.redirect(there), other.redirect(here)
        home = server.redirect(here)
        store = make(
            allow=[f"127.0.0.1:{server.port}", f"127.0.0.1:{other.port}"],
            credentials=[f"{server.origin}=bob:s3:cr=t", f"https://127.0.0.1:{other.port}=eve:x"],
        )
        for url in (here, away, back, home, here.replace("://", "://eve:other@")):
            server.requests.clear()
            other.requests.clear()
            assert store.get_size(url) == len(DATA)
            sent = {request.headers.get("authorization") for request in server.requests}
            assert sent <= ({None} if url == back else {"Basic Ym9iOnMzOmNyPXQ="})
            assert not any("authorization" in request.headers for request in other.requests)


SIGNED = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA/s3cret&X-Amz-Expires=300&X-Amz-Signature=s3cret",
    "AWSAccessKeyId=s3cret&Expires=1&Signature=s3cret",
    "X-Goog-Algorithm=GOOG4&X-Goog-Credential=s3cret&X-Goog-Signature=s3cret",
    "sv=2024&sr=b&sig=s3cret",
    "temp_url_sig=s3cret&temp_url_expires=1",
    "Expires=1&Key-Pair-Id=s3cret&Signature=s3cret",
    "access_token=s3cret",
)


@pytest.mark.parametrize("query", SIGNED)
def test_signed_urls(
    server: FaultyHttp, make: Callable[..., Store], query: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = make(stall=0.2)
    url = server.add(DATA) + "?" + query
    location = store.parse(url)
    assert location.uri == url, "it is of no use without its query"
    assert "s3cret" not in str(location)
    with store.get(url) as reader:
        assert reader.read() == DATA
    assert server.requests[-1].target.endswith(query)
    gone = server.origin + "/never?" + query
    stalled = server.add(DATA, Manners(stall=-1)) + "?" + query
    broken = server.add(DATA, Manners(statuses=[(500, ())] * 9)) + "?" + query
    garbled = server.add(DATA, Manners(headers=("Content-Range",), longer=5, stall=10)) + "?" + query
    closed = url.replace(f":{server.port}", ":9")
    loop = server.redirect("?" + query)
    foreign = server.redirect("ftp://127.0.0.1/?" + query)
    unnamed = "http://never.invalid/x?" + query
    other = make(allow=["127.0.0.1:9", f"127.0.0.1:{server.port}"], stall=0.2)
    for bad in (gone, stalled, broken, garbled, closed, loop, foreign, unnamed):
        with pytest.raises(StoreError) as caught, other.get(bad) as reader:
            reader.read()
        assert "s3cret" not in chain(caught.value), bad
    assert caplog.records
    assert not [record for record in caplog.records if "s3cret" in record.getMessage() + str(record.exc_text)]


# Redirects


def test_redirects_are_limited(server: FaultyHttp, make: Callable[..., Store]) -> None:
    url = server.add(DATA)
    urls = [url]
    for code in (301, 302, 303, 307, 308, 301):
        urls.append(server.redirect(urls[-1].removeprefix(server.origin), code))
    for limit, at in ((5, 5), (0, 0), (2, 2)):
        store = make(max_redirects=limit)
        assert store.get_size(urls[at]) == len(DATA)
        with store.get(urls[at], start=5, stop=9) as reader:
            assert reader.read() == DATA[5:9]
        with pytest.raises(StoreError, match=f"more than {limit} times") as caught:
            store.get(urls[at + 1])
        assert not caught.value.temporary
    loop = server.redirect("/loop", path="/loop")
    server.requests.clear()
    with pytest.raises(StoreError, match="more than 5 times"):
        make().get(loop)
    assert len(server.requests) == 6


@pytest.mark.parametrize("location", [None, "", "http://[", "http://a b/", "\x01", "/%"])
def test_redirects_to_nowhere(server: FaultyHttp, store: Store, location: str | None) -> None:
    with pytest.raises(StoreError) as caught:
        store.get(server.redirect(location))
    assert not caught.value.temporary


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_to_another_scheme(
    server: FaultyHttp, canary: Listener, make: Callable[..., Store], code: int
) -> None:
    store = make(allow=["127.0.0.1:*"])
    with pytest.raises(InvalidLocation, match=f"use the location that begins with https://127.0.0.1:{canary.port}"):
        store.get(server.redirect(f"https://127.0.0.1:{canary.port}/x?sig=s3cret", code))


def test_not_modified_and_choices_are_no_redirects(server: FaultyHttp, store: Store) -> None:
    for status in (300, 304, 305, 306):
        with pytest.raises(StoreError, match=str(status)) as caught:
            store.get(server.add(DATA, Manners(statuses=[(status, ("Location: /x",))])))
        assert not caught.value.temporary


# Statuses


@pytest.mark.parametrize(
    ("status", "kind", "temporary"),
    [
        (400, InvalidRequest, False),
        (401, Unauthenticated, False),
        (403, PermissionDenied, False),
        (404, NotFound, False),
        (407, Unauthenticated, False),
        (408, StoreTimeout, True),
        (410, NotFound, False),
        (414, InvalidRequest, False),
        (416, Changed, False),
        (418, StoreError, False),
        (425, Unavailable, True),
        (429, RateLimited, True),
        (451, PermissionDenied, False),
        (500, Unavailable, True),
        (501, Unavailable, False),
        (502, Unavailable, True),
        (503, Unavailable, True),
        (504, StoreTimeout, True),
        (505, Unavailable, False),
        (599, Unavailable, True),
        (204, StoreError, False),
        (206, StoreError, False),
        (999, StoreError, False),
    ],
)
def test_statuses(server: FaultyHttp, store: Store, status: int, kind: type[StoreError], temporary: bool) -> None:
    url = server.add(DATA, Manners(statuses=[(status, ())] * 9))
    for ask in (store.get, store.stat):
        with pytest.raises(kind) as caught:
            ask(url)
        assert type(caught.value) is kind
        assert caught.value.temporary is temporary
        assert str(status) in str(caught.value) or status == 206
        assert "As told" not in str(caught.value)
        assert caught.value.store == "web"
        assert caught.value.location == url


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("in 90 s", 60, 91),
        ("Wed, 01 Jul 2015 10:00:00 GMT", 0, 0),
        ("soon", None, None),
        ("-5", None, None),
        ("1e9", None, None),
        ("", None, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503, 500])
def test_retry_after(
    server: FaultyHttp, store: Store, status: int, text: str, low: float | None, high: float | None
) -> None:
    if text == "in 90 s":
        text = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    url = server.add(DATA, Manners(statuses=[(status, (f"Retry-After: {text}",))]))
    with pytest.raises(Unavailable) as caught:
        store.get(url)
    assert caught.value.temporary
    if low is None or high is None:
        assert caught.value.retry_after is None
    else:
        assert caught.value.retry_after is not None
        assert low <= caught.value.retry_after <= high


def test_retry_after_by_the_servers_clock(server: FaultyHttp, store: Store) -> None:
    lines = ("Date: Wed, 01 Jul 2015 10:00:00 GMT", "Retry-After: Wed, 01 Jul 2015 10:00:30 GMT")
    with pytest.raises(RateLimited) as caught:
        store.get(server.add(DATA, Manners(statuses=[(503, lines)])))
    assert caught.value.retry_after == 30


def test_waits_as_long_as_told_and_goes_on(server: FaultyHttp, make: Callable[..., Store]) -> None:
    url = server.add(DATA, Manners(statuses=[(503, ("Retry-After: 0",)), (429, ()), (500, ()), (408, ())]))
    with make(retry=Retry(attempts=5, first=0.001)).get(url) as reader:
        assert reader.read() == DATA


class Endless(Listener):
    """Answers with an error and a body without end."""

    head = b"HTTP/1.1 500 No\r\nContent-Type: text/html\r\n\r\n"
    sent = 0

    def serve(self, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(self.head)
        while True:
            self.sent += connection.send(b"s3cret words of a stranger " * 1000)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 500 s3cret\r\n\r\n",
        b"HTTP/1.1 404 s3cret\r\nContent-Length: 100000000\r\n\r\n",
        b"HTTP/1.1 403 s3cret\r\nContent-Length: 100\r\n\r\n",
        b"HTTP/1.1 302 s3cret\r\nContent-Length: 99999999\r\nLocation: /x\r\n\r\n",
    ],
)
def test_bodies_of_errors_are_not_read(head: bytes) -> None:
    with Endless() as server, open_store("http", allow=[f"127.0.0.1:{server.port}"], retry=ONCE) as store:
        server.head = head
        with pytest.raises(StoreError) as caught:
            store.get(f"http://127.0.0.1:{server.port}/x")
        assert "s3cret" not in chain(caught.value)
    # What fits into the buffers of two sockets.
    assert server.sent < 40 << 20


# Bodies


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("framing", [{}, {"length": False}, {"length": False, "chunked": False}, {"ranges": False}])
def test_cuts_are_resumed(server: FaultyHttp, make: Callable[..., Store], framing: Any, reset: bool) -> None:
    """At whatever byte a body breaks off, what is read is whole."""
    if framing.get("length") is False:
        framing = {**framing, "cuts": [None]}
    manners = Manners(reset=reset, **framing)
    manners.cuts += [0, 1, 65_536, 300_000, 17]
    store = make(retry=QUICK)
    with store.get(server.add(DATA, manners)) as reader:
        assert reader.read() == DATA
    if manners.ranges:
        ranges = [
            int(each.headers["range"][6:].partition("-")[0]) for each in server.requests if "range" in each.headers
        ]
        assert ranges == sorted(ranges)
        assert ranges[-1] > 0


@pytest.mark.parametrize("framing", [{}, {"length": False}, {"length": False, "chunked": False}, {"ranges": False}])
def test_cuts_are_errors_without_another_attempt(server: FaultyHttp, store: Store, framing: Any) -> None:
    cuts = [None, 200_000] if framing.get("length") is False else [200_000]
    with store.get(server.add(DATA, Manners(cuts=cuts, **framing))) as reader:
        got: list[bytes] = []
        with pytest.raises(Unavailable) as caught:
            got.extend(reader)
    assert caught.value.temporary
    assert DATA[:200_000].startswith(b"".join(got))


@pytest.mark.parametrize("longer", [1, 100_000, -1, -100_000])
def test_wrong_content_length(server: FaultyHttp, make: Callable[..., Store], longer: int) -> None:
    """A length that is too long is missed; one that is too short makes it an image that differs from what HEAD says."""
    store = make(retry=QUICK)
    url = server.add(DATA, Manners(longer=longer))
    expected = {"sha256": __import__("hashlib").sha256(DATA).hexdigest()}
    with pytest.raises(StoreError), store.get(url, expected=expected) as reader:
        reader.read()
    with pytest.raises(StoreError), store.get(url, start=10) as reader:
        reader.read()


def test_body_longer_than_its_chunked_range(server: FaultyHttp, store: Store) -> None:
    manners = Manners(length=False, content_range=f"bytes 0-{len(DATA) - 2}/{len(DATA) - 1}")
    with store.get(server.add(DATA, manners)) as reader, pytest.raises(StoreError, match="more than it said"):
        reader.read()


@pytest.mark.parametrize(
    "told",
    [
        "bytes 0-9/700000",
        "bytes 11-19/700000",
        "bytes 10-20/700000",
        "bytes 10-9/700000",
        "bytes 10-19/*",
        "bytes */700000",
        "bytes 10-19/15",
        "10-19/700000",
        "items 10-19/700000",
        "bytes 10-19/700000, bytes 30-39/700000",
        "bytes -10-19/700000",
        "nonsense",
    ],
)
def test_other_ranges_than_asked_for(server: FaultyHttp, store: Store, told: str) -> None:
    url = server.add(DATA, Manners(content_range=told))
    with pytest.raises(StoreError), store.get(url, start=10, stop=20) as reader:
        reader.read()


def test_part_of_a_range_is_taken_and_the_rest_asked_for(server: FaultyHttp, make: Callable[..., Store]) -> None:
    manners = Manners()

    def shorten(request: Any) -> None:
        manners.content_range = None
        if request.headers.get("range") == "bytes=10-19":
            manners.content_range = "bytes 10-14/700000"
            manners.body = DATA[:15] + b""
        else:
            manners.body = DATA

    manners.on_request = shorten
    with make(retry=QUICK).get(server.add(DATA, manners), start=10, stop=20) as reader:
        assert reader.read() == DATA[10:20]


@pytest.mark.parametrize(
    "manners", [{"length": False, "ranges": False}, {"length": False, "content_range": "bytes 0-9/*"}]
)
def test_length_unknown(server: FaultyHttp, store: Store, manners: Any) -> None:
    url = server.add(DATA, Manners(head_length=None, **manners))
    for ask in (store.get, store.stat):
        with pytest.raises(Unsupported, match="does not tell the length"):
            ask(url)


@pytest.mark.parametrize("text", ["abc", "-1", "1, 2", "0x10", "1e3", "9" * 30])
def test_length_is_no_number(server: FaultyHttp, store: Store, text: str) -> None:
    with pytest.raises(StoreError):
        store.stat(server.add(DATA, Manners(head_length=text)))


@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP", "identity, gzip", "zstd", "x-thing"])
def test_encoded_is_refused(server: FaultyHttp, store: Store, coding: str) -> None:
    url = server.add(DATA, Manners(encoding=coding))
    asks: tuple[Callable[[str], object], ...] = (store.get, store.stat, lambda url: store.get(url, start=5))
    for ask in asks:
        with pytest.raises(Unsupported, match="encoded as"):
            ask(url)
    assert store.get_size(server.add(DATA, Manners(encoding="identity"))) == len(DATA)


def test_transfer_encodings_but_chunked_are_refused(server: FaultyHttp, store: Store) -> None:
    for coding in ("gzip", "gzip, chunked"):
        with pytest.raises(Unsupported, match="transfer encoding"):
            store.get(server.add(DATA, Manners(headers=(f"Transfer-Encoding: {coding}",))))


@pytest.mark.parametrize("head", [400, 403, 405, 501])
@pytest.mark.parametrize("ranges", [True, False])
def test_head_refused(server: FaultyHttp, store: Store, head: int, ranges: bool) -> None:
    url = server.add(DATA, Manners(head=head, head_length=None, ranges=ranges))
    stat = store.stat(url)
    assert (stat.size, stat.version) == (len(DATA), '"first"')
    assert [request.method for request in server.requests] == ["HEAD", "GET"]
    assert server.requests[1].headers["range"] == "bytes=0-0"


def test_head_says_zero(server: FaultyHttp, store: Store, tmp_path: Path) -> None:
    url = server.add(DATA, Manners(head_length=0))
    store.download(url, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == DATA


@pytest.mark.parametrize("manners", [{}, {"ranges": False}, {"head": 405}, {"head_length": None}])
def test_empty_image(server: FaultyHttp, store: Store, manners: Any) -> None:
    url = server.add(b"", Manners(**manners))
    assert store.get_size(url) == 0
    with store.get(url) as reader:
        assert reader.read() == b""


# Versions


VALIDATORS = (
    {"etag": '"second"'},
    {"etag": 'W/"second"'},
    {"etag": None},
    {"etag": None, "modified": "Wed, 01 Jul 2026 10:00:01 GMT"},
)


@pytest.mark.parametrize("change", VALIDATORS)
@pytest.mark.parametrize("first", [{}, {"etag": 'W/"first"'}, {"etag": None}, {"etag": None, "ranges": False}])
def test_replaced_while_it_is_read(server: FaultyHttp, make: Callable[..., Store], first: Any, change: Any) -> None:
    if first.get("etag", "") is None and change == {"etag": None}:
        change = {"modified": None}
    manners = Manners(**first)
    manners.cuts = [100_000]

    def replace(request: Any) -> None:
        if len(server.requests) > 1:
            manners.body = bytes(len(DATA))
            for name, value in change.items():
                setattr(manners, name, value)

    manners.on_request = replace
    with make(retry=QUICK).get(server.add(DATA, manners)) as reader, pytest.raises(Changed):
        list(reader)


def test_other_length_is_another_image(server: FaultyHttp, make: Callable[..., Store]) -> None:
    manners = Manners(etag=None, modified=None, cuts=[100_000])

    def shrink(request: Any) -> None:
        if len(server.requests) > 1:
            manners.body = DATA[:-1]

    manners.on_request = shrink
    with make(retry=QUICK).get(server.add(DATA, manners)) as reader, pytest.raises(Changed):
        reader.read()


def test_shorter_than_where_it_broke(server: FaultyHttp, make: Callable[..., Store]) -> None:
    for ranges in (True, False):
        manners = Manners(cuts=[600_000], ranges=ranges, etag=None, modified=None)
        url = server.add(DATA, manners)
        with make(retry=QUICK).get(url) as reader:
            reader.read(500_000)
            server.add(DATA[:10], manners, url.removeprefix(server.origin))
            with pytest.raises(Changed):
                reader.read()


def test_stat_tells_version_and_date(server: FaultyHttp, store: Store) -> None:
    wednesday = datetime(2026, 7, 1, 10, tzinfo=UTC)
    for manners, version in (
        ({}, '"first"'),
        ({"etag": 'W/"weak"'}, 'W/"weak" Wed, 01 Jul 2026 10:00:00 GMT'),
        ({"etag": None}, "Wed, 01 Jul 2026 10:00:00 GMT"),
        ({"etag": "bare"}, "bare Wed, 01 Jul 2026 10:00:00 GMT"),
    ):
        stat = store.stat(server.add(DATA, Manners(**manners)))
        assert (stat.version, stat.modified) == (version, wednesday)
    stat = store.stat(server.add(DATA, Manners(etag=None, modified=None)))
    assert (stat.version, stat.modified) == (None, None)
    assert store.stat(server.add(DATA, Manners(modified="yesterday"))).modified is None


# Time


def test_stalls(server: FaultyHttp, make: Callable[..., Store]) -> None:
    store = make(stall=0.2)
    for stall in (-1, 0, 100_000):
        began = time.monotonic()
        with (
            pytest.raises((StoreTimeout, Unavailable)) as caught,
            store.get(server.add(DATA, Manners(stall=stall))) as reader,
        ):
            reader.read()
        assert caught.value.temporary
        assert time.monotonic() - began < 3
    with pytest.raises(StoreTimeout):
        store.stat(server.add(DATA, Manners(stall=-1)))


def test_a_stall_is_resumed(server: FaultyHttp, make: Callable[..., Store]) -> None:
    manners = Manners(stall=100_000, piece=10_000)

    def recover(request: Any) -> None:
        if len(server.requests) > 1:
            manners.stall = None

    manners.on_request = recover
    with make(retry=QUICK, stall=0.2).get(server.add(DATA, manners)) as reader:
        assert reader.read() == DATA
    assert server.requests[1].headers["range"].startswith("bytes=100000-")


class Slow(Listener):
    """Sends an image in 30 pieces, 20 ms apart."""

    def serve(self, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n")
        for _ in range(30):
            time.sleep(0.02)
            connection.sendall(b"x" * 10)


def test_slow_is_not_stalled() -> None:
    timeouts = Timeouts(connect=1, stall=0.3)
    with (
        Slow() as server,
        open_store("http", allow=[f"127.0.0.1:{server.port}"], retry=ONCE, timeouts=timeouts) as store,
        store.get(f"http://127.0.0.1:{server.port}/x") as reader,
    ):
        assert reader.read() == b"x" * 300


def test_unreachable(server: FaultyHttp, make: Callable[..., Store], names: Names, monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = make(allow=["127.0.0.0/8:*"], connect=0.2)
    for url in (f"http://127.0.0.1:{port}/x", f"https://127.0.0.1:{port}/x", "http://unknown.test/x"):
        with pytest.raises(Unavailable) as caught:
            store.get(url)
        assert caught.value.temporary

    def never(self: socket.socket, place: Any) -> None:
        time.sleep(min(self.gettimeout() or 9, 9))
        raise TimeoutError("timed out")

    names.names["many.test"] = [[f"127.0.0.{number}" for number in range(1, 9)]]
    monkeypatch.setattr(socket.socket, "connect", never)
    began = time.monotonic()
    with pytest.raises(StoreTimeout) as caught:
        store.get("http://many.test/x")
    assert caught.value.temporary
    assert time.monotonic() - began < 2, "each address had the whole time"


def test_garbage(store: Store, make: Callable[..., Store]) -> None:
    class Garbage(Listener):
        words = b""

        def serve(self, connection: socket.socket) -> None:
            connection.recv(65536)
            connection.sendall(self.words)

    with Garbage() as server:
        store = make(allow=[f"127.0.0.1:{server.port}"])
        for words in (
            b"",
            b"\0" * 100,
            b"SSH-2.0-OpenSSH\r\n",
            b"HTTP/1.1 banana\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        ):
            server.words = words
            for scheme in ("http", "https"):
                with pytest.raises(StoreError), store.get(f"{scheme}://127.0.0.1:{server.port}/x") as reader:
                    reader.read()


# Connections


def test_connections_are_used_again(server: FaultyHttp, store: Store) -> None:
    url = server.redirect(server.add(DATA).removeprefix(server.origin))
    for _ in range(3):
        store.stat(url)
        with store.get(url) as reader:
            assert reader.read() == DATA
        with store.get(url, start=100, stop=200_000) as reader:
            assert reader.read() == DATA[100:200_000]
        with pytest.raises(NotFound):
            store.get(server.origin + "/never")
    assert server.connections == 1


def test_broken_off_reads_do_not_leave_bytes_for_the_next(server: FaultyHttp, store: Store) -> None:
    url = server.add(DATA)
    for _ in range(5):
        with store.get(url) as reader:
            reader.read(10)
        with store.get(url, start=5) as reader:
            assert reader.read(10) == DATA[5:15]


def test_a_closed_reading_raises(server: FaultyHttp) -> None:
    made = driver(allow=[f"127.0.0.1:{server.port}"])
    made.open()
    location = made.parse(server.add(DATA))
    reading = made.read(location, 0, None)
    next(reading.chunks)
    reading.close()
    reading.close()
    with pytest.raises(Cancelled):
        next(reading.chunks)
    whole = made.read(location, 0, None)
    assert b"".join(whole.chunks) == DATA
    whole.close()
    assert list(whole.chunks) == []
    made.close()


def test_closed_by_another_thread(server: FaultyHttp) -> None:
    made = driver(allow=[f"127.0.0.1:{server.port}"])
    made.timeouts = Timeouts(connect=2, stall=0.5)
    made.open()
    reading = made.read(made.parse(server.add(DATA, Manners(stall=1000))), 0, None)
    assert len(next(reading.chunks)) == 1000
    timer = threading.Timer(0.1, reading.close)
    timer.start()
    with pytest.raises(Exception, match="timed out") as caught:
        next(reading.chunks)
    timer.join()
    assert isinstance(made.translate(caught.value), StoreTimeout)
    with pytest.raises(Cancelled):
        next(reading.chunks)
    made.close()


def test_many_readers_at_once(server: FaultyHttp, make: Callable[..., Store], caplog: pytest.LogCaptureFixture) -> None:
    store = make()
    urls = [server.add(os.urandom(100_000)) for _ in range(4)]
    results: list[bool] = []

    def work(number: int) -> None:
        for turn in range(4):
            with store.get(urls[(number + turn) % 4]) as reader:
                whole = reader.read()
            results.append(server._images[urls[(number + turn) % 4].removeprefix(server.origin)][0] == whole)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [True] * 64
    assert server.connections <= 16


def test_unknown_errors_are_not_ours() -> None:
    made = driver()
    assert made.translate(ValueError("x")) is None
    assert isinstance(made.translate(ConnectionResetError()), Unavailable)
