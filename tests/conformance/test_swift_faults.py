"""Bad weather on the way to a real Swift: connections that break, stall or lie, servers that die, tokens that end.

``IMAGESTORE_FAULTS`` is how many faults there are (20), ``IMAGESTORE_FAULTS_SEED`` repeats a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _swift_testing import context, control, options, running, session
from faultproxy import Fault, FaultProxy

from imagestore import Retry, Store, StoreError, Timeouts
from imagestore.drivers.swift import SwiftDriver
from imagestore.errors import (
    ConfigurationError,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
)

pytestmark = pytest.mark.filterwarnings("error")

COUNT = int(os.environ.get("IMAGESTORE_FAULTS", "20"))
SEED = int(os.environ.get("IMAGESTORE_FAULTS_SEED") or random.SystemRandom().randrange(1 << 32))
BLOCK = 256 * 1024
PATIENT = Retry(attempts=6, first=0.1, longest=1, total=60)
SHORT = Timeouts(connect=2, stall=1.5, abort=10)
LONG = Timeouts(connect=5, stall=20, abort=30)

NETWORK = ("cut", "reset", "stall", "corrupt")
SERVER = (("proxy", "KILL"), ("object", "KILL"), ("proxy", "STOP"), ("object", "STOP"))


class Weather:
    """A Swift of our own, a proxy before it, a store through the proxy, and one that goes straight to the server."""

    def __init__(self) -> None:
        self.env = running("swift", "node_timeout=2", "client_timeout=5")
        parts = urlsplit(self.env["SWIFT_PROXY"])
        assert parts.hostname
        assert parts.port
        self.port = parts.port
        self.proxy = FaultProxy(parts.hostname, self.port)
        self.container = f"faults-{uuid.uuid4().hex[:12]}"
        self.plain = self.store(self.port, PATIENT, LONG)
        assert not self.plain.exists("x")
        self.whole: dict[str, bytes] = {}
        self.struck: Counter[str] = Counter()

    def settings(self, port: int, **more: Any) -> dict[str, Any]:
        return {
            "auth_version": "1",
            "auth_url": f"http://127.0.0.1:{port}/auth/v1.0",
            "user": self.env["ST_USER"],
            "key": self.env["ST_KEY"],
            "container": self.container,
            "create_container": True,
            # Each of the stores knows the other's address.
            "accept_locations": [
                f"swift+http://127.0.0.1:{each}/auth/v1.0/{self.container}" for each in (self.proxy.port, self.port)
            ],
            **more,
        }

    def store(self, port: int, retry: Retry, timeouts: Timeouts, **more: Any) -> Store:
        driver = SwiftDriver(options(**self.settings(port, **more)), timeouts=timeouts)
        return Store(driver, name="faults", retry=retry, timeouts=timeouts, _block_size=BLOCK)

    def proxied(self) -> Store:
        return self.store(self.proxy.port, PATIENT, SHORT)

    def read(self, image_id: str) -> bytes:
        with self.plain.get(self.plain.locate(image_id)) as reader:
            return b"".join(reader)

    def pid(self, name: str) -> int:
        return int(Path(self.env["PLACE"], "run", name).read_text().split()[0])

    @contextlib.contextmanager
    def striking(self, kind: str, rng: random.Random, length: int, *, reading: bool) -> Iterator[None]:
        """Meanwhile something happens, about when a random byte passes. It may come too late."""
        if kind in NETWORK:
            down = reading if kind == "corrupt" else reading or rng.random() < 0.3
            # Lies are told about image data only: against those about headers there is TLS.
            after = rng.randrange(5000, max(5001, length)) if kind == "corrupt" else rng.randrange(length)
            if down and not reading:
                after = rng.randrange(3000)
            fault = self.proxy.add(Fault(kind, "down" if down else "up", after))  # type: ignore[arg-type]  # one of them
            try:
                yield
            finally:
                self.proxy.clear()
                self.struck[kind] += fault.happened
            return
        thread = threading.Thread(target=self._strike, args=(kind, rng.random() * 0.4, rng.random()), name="weather")
        thread.start()
        try:
            yield
        finally:
            thread.join(60)
            self.struck[kind] += 1

    def _strike(self, kind: str, delay: float, lasting: float) -> None:
        time.sleep(delay)
        if kind == "revoke":
            control(self.env, "flush")
            return
        name, number = kind.split()
        os.kill(self.pid(name), getattr(signal, f"SIG{number}"))
        if number == "STOP":
            time.sleep(3 * lasting)
            os.kill(self.pid(name), signal.SIGCONT)
        else:
            time.sleep(lasting)
            control(self.env, "spawn", name)

    def leftovers(self) -> list[str]:
        driver = SwiftDriver(options(**self.settings(self.port)))
        driver.open()
        try:
            names = [entry["name"] for entry in driver._container("", self.container).entries()]
        finally:
            driver.close()
        held: set[str] = set()
        for image_id in self.whole:
            token = self.plain.stat(self.plain.locate(image_id)).token
            held |= {image_id, *(name for name in names if name.startswith(f".imagestore/{token}/"))}
        # The claim of a discarded upload ends by itself.
        return [name for name in names if name not in held and not name.endswith(".claim")]

    def close(self) -> None:
        self.plain.close()
        self.proxy.close()


@pytest.fixture(scope="module")
def weather() -> Iterator[Weather]:
    made = Weather()
    yield made
    made.close()


def test_random_faults(weather: Weather) -> None:
    rng = random.Random(SEED)
    sys.stdout.write(f"IMAGESTORE_FAULTS_SEED={SEED}\n")
    before = _threads()
    kinds = [*NETWORK * 3, *(" ".join(pair) for pair in SERVER), "revoke"]
    outcomes: Counter[str] = Counter()
    for number in range(COUNT):
        kind = rng.choice(kinds)
        verb = rng.choice(("add", "add", "stream", "get", "delete")) if weather.whole else "add"
        with weather.proxied() as store:
            try:
                if verb == "get":
                    error = _get(weather, store, kind, rng)
                elif verb == "delete":
                    error = _delete(weather, store, kind, rng)
                else:
                    error = _add(weather, store, kind, rng, f"image-{number}", known=verb == "add")
            except AssertionError as problem:
                raise AssertionError(f"fault {number}: {kind} in {verb}, seed {SEED}: {problem}") from problem
        outcomes[f"{verb} {type(error).__name__ if error else 'well'}"] += 1
    for image_id, data in weather.whole.items():
        assert weather.read(image_id) == data
    weather.plain.collect(older_than=0, include_alive=True)
    assert list(weather.plain.uploads()) == []
    left = weather.leftovers()
    assert left == [], f"seed {SEED}: {left}"
    sys.stdout.write(f"struck {dict(weather.struck)}\n{dict(outcomes)}\n")
    weather.plain.close()
    assert _threads() <= before


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith("faultproxy")}


def _add(
    weather: Weather, store: Store, kind: str, rng: random.Random, image_id: str, *, known: bool
) -> StoreError | None:
    data = rng.randbytes(int(rng.choice((0.5, 1, 5.3)) * BLOCK))
    size = len(data) if known else None
    error = _attempt(weather, kind, rng, len(data), lambda: store.add(image_id, iter([data]), size=size))
    if not weather.plain.exists(image_id):
        assert error is not None, "an image that was stored is not there"
        return error
    assert weather.read(image_id) == data
    # Without an answer to the commit nobody can tell; then the error says so.
    assert error is None or "in doubt" in str(error), f"there, and {error!r}"
    weather.whole[image_id] = data
    return error


def _get(weather: Weather, store: Store, kind: str, rng: random.Random) -> StoreError | None:
    image_id = rng.choice(sorted(weather.whole))
    data = weather.whole[image_id]
    location = weather.plain.locate(image_id)
    got: list[bytes] = []

    def read() -> None:
        with store.get(location, expected={"sha256": hashlib.sha256(data).hexdigest()}) as reader:
            got.append(b"".join(reader))

    error = _attempt(weather, kind, rng, len(data), read, reading=True)
    assert (error is None) == (got == [data])
    return error


def _delete(weather: Weather, store: Store, kind: str, rng: random.Random) -> StoreError | None:
    image_id = rng.choice(sorted(weather.whole))
    location = weather.plain.locate(image_id)
    # There are no data that a lie could be about.
    kind = "cut" if kind == "corrupt" else kind
    error = _attempt(weather, kind, rng, 1500, lambda: store.delete(location))
    if weather.plain.exists(image_id):
        assert error is not None, "an image that was deleted is there"
        assert weather.read(image_id) == weather.whole[image_id]
    else:
        del weather.whole[image_id]
    return error


def _attempt(
    weather: Weather, kind: str, rng: random.Random, length: int, function: Any, *, reading: bool = False
) -> StoreError | None:
    try:
        with weather.striking(kind, rng, length, reading=reading):
            function()
    except StoreError as error:
        return error
    return None


# Faults at chosen moments


def test_heads_of_answers_that_break_off(weather: Weather) -> None:
    """Half of an answer's headers is a failure, and no image of another length, or of somebody else's making."""
    with weather.store(weather.proxy.port, Retry(attempts=1), SHORT) as store:
        location = store.add("broken", bytes(3 * BLOCK)).location
        wanted = store.stat(location)
        broken = 0
        for at in range(0, 1000, 9):
            weather.proxy.add(Fault("cut", "down", at))
            try:
                assert store.stat(location) == wanted, f"cut after {at} bytes"
            except Unavailable:
                broken += 1
            weather.proxy.clear()
        assert broken > 40
        store.delete(location)


def test_deletes_that_break_off(weather: Weather) -> None:
    """Wherever an answer breaks off: nothing is lost sight of."""
    with weather.store(weather.proxy.port, Retry(attempts=1), SHORT) as store:
        assert not store.exists("broken")
        for at in (200, 400, 600, 900, 1400, 1900, 2600):
            location = weather.plain.add("broken", bytes(3 * BLOCK)).location
            weather.proxy.add(Fault("cut", "down", at))
            with contextlib.suppress(Unavailable):
                store.delete(location)
            weather.proxy.clear()
            if weather.plain.exists("broken"):
                assert weather.read("broken") == bytes(3 * BLOCK)
                weather.plain.delete(location)
            weather.plain.collect(older_than=0, include_alive=True)
            assert weather.leftovers() == [], f"cut after {at} bytes"


@pytest.mark.parametrize("name", ["proxy", "object"])
def test_server_restarted_in_mid_transfer(weather: Weather, name: str) -> None:
    data = random.Random(1).randbytes(9 * BLOCK)
    threads: list[threading.Thread] = []

    def restart() -> None:
        os.kill(weather.pid(name), signal.SIGKILL)
        threads.append(threading.Thread(target=control, args=(weather.env, "spawn", name)))
        threads[-1].start()

    def source() -> Iterator[bytes]:
        for start in range(0, len(data), BLOCK):
            if start == 4 * BLOCK:
                restart()
            yield data[start : start + BLOCK]

    patient = Retry(attempts=1000, first=0.1, longest=0.3, total=60)
    with weather.store(weather.proxy.port, patient, SHORT) as store:
        try:
            location = store.add("restarted", source(), size=len(data)).location
            assert weather.read("restarted") == data
            with store.get(location) as reader:
                first = reader.read(BLOCK)
                restart()
                assert first + reader.read() == data
        finally:
            for thread in threads:
                thread.join(60)
        store.delete(location)


# Logging in


def test_token_that_ends_in_mid_upload(weather: Weather) -> None:
    data = random.Random(1).randbytes(8 * BLOCK)

    def source() -> Iterator[bytes]:
        for start in range(0, len(data), BLOCK):
            if start == 3 * BLOCK:
                control(weather.env, "flush")
            yield data[start : start + BLOCK]

    with weather.proxied() as store:
        location = store.add("revoked", source(), size=len(data)).location
        with store.get(location) as reader:
            control(weather.env, "flush")
            assert b"".join(reader) == data
        store.delete(location)


def keystone(env: dict[str, str], **more: Any) -> Store:
    values = {
        "auth_url": env["OS_AUTH_URL"],
        "user": f"{env['OS_PROJECT_NAME']}:{env['OS_USERNAME']}",
        "key": env["OS_PASSWORD"],
        "create_container": True,
        "container": "weather",
        **more,
    }
    return Store(SwiftDriver(options(**values), timeouts=LONG), retry=Retry(attempts=2, first=0.01), _block_size=BLOCK)


def revoke(env: dict[str, str], token: str) -> None:
    own = session(env)
    own.delete(f"{env['OS_AUTH_URL']}/auth/tokens", headers={"X-Subject-Token": token})
    own.session.close()
    # The server's own memory of tokens that it has seen.
    control(env, "flush")


def revoking(env: dict[str, str], data: bytes, token: Callable[[], str]) -> Iterator[bytes]:
    """``data``; in their middle the token is revoked."""
    for start in range(0, len(data), BLOCK):
        if start == 3 * BLOCK:
            revoke(env, token())
        yield data[start : start + BLOCK]


def test_keystone_token_revoked_in_mid_upload(weather: Weather) -> None:
    data = random.Random(1).randbytes(8 * BLOCK)
    with keystone(weather.env) as store:
        driver = store._open().driver
        assert isinstance(driver, SwiftDriver)
        login = driver._client("")._login
        before = login.token()[1]
        location = store.add("revoked", revoking(weather.env, data, lambda: before), size=len(data)).location
        assert login.token()[1] != before
        with store.get(location) as reader:
            assert b"".join(reader) == data
        store.delete(location)


def test_session_of_a_user_renews_its_token(weather: Weather) -> None:
    data = random.Random(1).randbytes(8 * BLOCK)
    own = session(weather.env)
    with tenants() as store:
        view = store.bind(own)
        location = view.add("revoked", revoking(weather.env, data, own.get_token), size=len(data)).location
        with view.get(location) as reader:
            assert b"".join(reader) == data
        view.delete(location)
    own.session.close()


def test_bare_token_of_a_user_that_ends(weather: Weather) -> None:
    """Nobody here can get another. What was stored is found with the next one."""
    data = random.Random(1).randbytes(8 * BLOCK)
    port = int(weather.env["SWIFT_PROXY_V3"].rpartition(":")[2])
    users = [context(weather.env, "OS", port) for _ in range(2)]
    with tenants() as store:
        view, later = (store.bind(user) for user in users)
        with pytest.raises(Unauthenticated) as caught:
            view.add("revoked", revoking(weather.env, data, lambda: users[0].auth_token), size=len(data))
        assert not caught.value.temporary
        assert not later.exists("revoked")
        assert len(list(later.uploads())) == 1
        later.collect(older_than=0)
        assert list(later.uploads()) == []


def tenants() -> Store:
    driver = SwiftDriver(options(multi_tenant=True, container="weather"), timeouts=LONG)
    return Store(driver, retry=Retry(attempts=2, first=0.01), _block_size=BLOCK)


def test_keystone_down(weather: Weather) -> None:
    """It looks like a wrong token to Swift; it is no wrong password."""
    with keystone(weather.env) as store:
        assert not store.exists("x")
        os.kill(weather.pid("keystone"), signal.SIGKILL)
        try:
            control(weather.env, "flush")
            with pytest.raises(Unavailable) as caught:
                store.exists("x")
            assert caught.value.temporary
            with keystone(weather.env) as fresh, pytest.raises(Unavailable):
                fresh.exists("x")
        finally:
            control(weather.env, "spawn", "keystone")
        assert not store.exists("x")


def test_wrong_credentials(weather: Weather) -> None:
    for more in ({"key": "wrong"}, {"user": "demo:nobody"}, {"user": "nowhere:demo"}):
        with keystone(weather.env, **more) as store, pytest.raises(Unauthenticated) as caught:
            store.exists("x")
        assert not caught.value.temporary
        assert "wrong" not in str(caught.value)
    with keystone(weather.env, region="Elsewhere") as store, pytest.raises(ConfigurationError, match="Elsewhere"):
        store.exists("x")
    port = weather.port
    with weather.store(port, PATIENT, SHORT, key="wrong") as store, pytest.raises(Unauthenticated):
        store.exists("x")
    with keystone(weather.env, auth_url=weather.env["SWIFT_PROXY"]) as store, pytest.raises(ConfigurationError):
        store.exists("x")


def test_missing_container(weather: Weather) -> None:
    wanted = r"nowhere.*create_container"
    with (
        keystone(weather.env, container="nowhere", create_container=False) as store,
        pytest.raises(ConfigurationError, match=wanted),
    ):
        store.add("x", b"data")
    with keystone(weather.env, container="nowhere", create_container=False, containers_seed=2) as store:
        for data in (b"data", bytes(3 * BLOCK)):
            with pytest.raises(ConfigurationError, match=r"nowhere_x.*create_container"):
                store.add("x", data)


def test_quota(weather: Weather) -> None:
    own = session(weather.env)
    url = own.get_endpoint(service_type="object-store")
    own.put(f"{url}/narrow", headers={"X-Container-Meta-Quota-Bytes": "100000"})
    try:
        with keystone(weather.env, container="narrow") as store:
            assert store.usage().total == 100_000
            for data in (bytes(200_000), bytes(7 * BLOCK)):
                with pytest.raises(StoreFull) as caught:
                    store.add("x", data)
                assert not caught.value.temporary
                assert list(store.uploads()) == []
                assert not store.exists("x")
    finally:
        own.delete(f"{url}/narrow")
        own.session.close()


def test_reader_may_not_write(weather: Weather) -> None:
    port = weather.port
    location = weather.plain.add("shared", b"data").location
    driver = SwiftDriver(options(**weather.settings(port)))
    driver.open()
    container = driver._container("", weather.container)
    access = {"X-Container-Read": weather.env["ST_READER_USER"]}
    container.client("POST", container.path(), access)
    driver.close()
    reader = {"user": weather.env["ST_READER_USER"], "key": weather.env["ST_READER_KEY"]}
    with weather.store(port, PATIENT, LONG, **reader) as store:
        assert store.get(location).read() == b"data"
        for act in (lambda: store.add("x", b"data"), lambda: store.delete(location)):
            with pytest.raises(PermissionDenied):
                act()
    weather.plain.delete(location)


@pytest.mark.parametrize(
    ("answer", "kind", "wait"),
    [
        ("429 Too Many\r\nRetry-After: 7", RateLimited, 7),
        ("498 Rate Limited", RateLimited, None),
        ("503 Unavailable\r\nRetry-After: 3", RateLimited, 3),
        ("503 Unavailable", Unavailable, None),
        ("413 Too Large\r\nRetry-After: 2", RateLimited, 2),
        ("413 Too Large", StoreFull, None),
        ("507 Insufficient Storage", StoreFull, None),
        ("408 Timeout", StoreTimeout, None),
        ("302 Found\r\nLocation: http://127.0.0.1:1/", ConfigurationError, None),
        ("403 Forbidden", PermissionDenied, None),
        ("404 Not Found", NotFound, None),
    ],
)
def test_answers(weather: Weather, answer: str, kind: type[StoreError], wait: float | None) -> None:
    location = f"swift+http://127.0.0.1:{weather.proxy.port}/auth/v1.0/{weather.container}/x"
    with weather.store(weather.proxy.port, Retry(attempts=1), SHORT) as store:
        assert not store.exists("x")
        text = f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n"
        with weather.proxy.answering(text.encode()), pytest.raises(kind) as caught:
            store.get(location)
    assert caught.value.retry_after == wait
    assert caught.value.temporary == issubclass(kind, Unavailable)


def test_no_header_of_ours_in_errors(weather: Weather) -> None:
    """Neither password nor token are in the text of an error, or of what caused it."""
    with weather.store(weather.proxy.port, Retry(attempts=1), SHORT) as store:
        assert not store.exists("x")
        driver = store._open().driver
        assert isinstance(driver, SwiftDriver)
        token = driver._client("")._login.token()[1]
        weather.proxy.refusing = True
        weather.proxy.drop()
        try:
            with pytest.raises(Unavailable) as caught:
                store.exists("x")
        finally:
            weather.proxy.refusing = False
        error: BaseException | None = caught.value
        while error is not None:
            for secret in (token, weather.env["ST_KEY"]):
                assert secret not in f"{error!r}{error}"
            error = error.__cause__ or error.__context__
