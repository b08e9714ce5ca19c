"""Bad weather on the way to a real S3 server: connections that break, stall or lie at random bytes, and its death.

``IMAGESTORE_FAULTS`` is how many random faults there are (20), ``IMAGESTORE_FAULTS_SEED`` repeats a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("boto3", reason="the S3 driver needs boto3")

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _s3 import HERE, client, options, running
from faultproxy import Fault, FaultProxy

from imagestore import Retry, Store, StoreError, Timeouts
from imagestore.drivers.s3 import S3Driver
from imagestore.errors import AlreadyExists, NotFound, StoreTimeout, Unavailable

COUNT = int(os.environ.get("IMAGESTORE_FAULTS", "20"))
SEED = int(os.environ.get("IMAGESTORE_FAULTS_SEED") or random.SystemRandom().randrange(1 << 32))
MIB = 1024 * 1024
BLOCK = 5 * MIB
PATIENT = Retry(attempts=5, first=0.1, longest=0.5, total=30)
# For a server that comes back: it takes a second or two.
STUBBORN = Retry(attempts=60, first=0.1, longest=0.5, total=30)
SHORT = Timeouts(connect=2, stall=1.5, abort=10)

KINDS = ("cut", "reset", "stall", "corrupt", "kill", "freeze")


class Weather:
    """A server, a proxy before it, a store through the proxy and one that goes straight to the server."""

    def __init__(self) -> None:
        self.env = running("ceph")
        self.place = self.env["CEPH_DIR"]
        host, _, port = self.env["S3_ENDPOINT"].partition("://")[2].partition(":")
        self.proxy = FaultProxy(host, int(port))
        self.bucket = f"faults-{uuid.uuid4().hex[:12]}"
        self.s3 = client(self.env)
        self.s3.create_bucket(Bucket=self.bucket)
        self.plain = self.store(timeouts=Timeouts(connect=5, stall=20))
        self.plain.exists("x")
        self.whole: dict[str, bytes] = {}
        self.struck = 0

    def store(self, endpoint: str = "", retry: Retry = PATIENT, timeouts: Timeouts = SHORT) -> Store:
        values: dict[str, Any] = {
            "endpoint": endpoint or self.env["S3_ENDPOINT"],
            "region": self.env["S3_REGION"],
            "access_key": self.env["S3_ACCESS_KEY"],
            "secret_key": self.env["S3_SECRET_KEY"],
            "bucket": self.bucket,
            "addressing": "path",
        }
        driver = S3Driver(options(**values), timeouts=timeouts)
        return Store(driver, name="faults", retry=retry, timeouts=timeouts, _block_size=BLOCK)

    def proxied(self) -> Store:
        return self.store(f"http://{self.proxy.host}:{self.proxy.port}")

    def read(self, image_id: str) -> bytes:
        location = self.plain.locate(image_id)
        with self.plain.get(location) as reader:
            return b"".join(reader)

    def ceph(self, *arguments: str) -> None:
        subprocess.run([HERE / "ceph", *arguments[:1], self.place, *arguments[1:]], check=True, capture_output=True)

    @contextlib.contextmanager
    def striking(self, kind: str, rng: random.Random, length: int) -> Iterator[None]:
        """Meanwhile a fault strikes, about when a random byte passes. It may come too late."""
        after = rng.choice((rng.randrange(2000), rng.randrange(length), rng.randrange(length)))
        direction = rng.choice(("up", "down")) if kind != "corrupt" else rng.choice(("up", "up", "down"))
        if kind in ("kill", "freeze"):
            delay, lasting = rng.random() * 0.5, rng.random() * 1.5
            over = threading.Thread(target=self._strike_server, args=(kind, delay, lasting), name="weather")
            over.start()
            try:
                yield
            finally:
                over.join(60)
                self.struck += 1
            return
        if direction == "down":
            after = rng.randrange(min(length, 3000))
        fault = self.proxy.add(Fault(kind, direction, after))  # type: ignore[arg-type]  # one of its kinds
        try:
            yield
        finally:
            self.proxy.clear()
            self.struck += fault.happened

    def _strike_server(self, kind: str, delay: float, lasting: float) -> None:
        time.sleep(delay)
        if kind == "kill":
            self.ceph("kill", "rgw")
            time.sleep(lasting)
            self.ceph("run", "rgw")
        else:
            # Longer than a stall, every other time.
            with self.frozen():
                time.sleep(2 * lasting)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Meanwhile the server takes connections and says nothing."""
        pid = int(Path(self.place, "pid", "client.rgw.a").read_text().strip("\0 \n"))
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        self.ceph("kill", "rgw")
        self.ceph("run", "rgw")

    def assert_nothing_left(self) -> None:
        """Nothing is there that collect() does not remove."""
        self.plain.collect(older_than=0, include_alive=True)
        stayed = self.stayed()
        # What was on its way when the server stopped may arrive after it was looked for.
        end = time.monotonic() + 3
        while stayed and time.monotonic() < end:
            time.sleep(0.1)
            self.plain.collect(older_than=0, include_alive=True)
            stayed = self.stayed()
        assert not stayed, f"{stayed} stayed"

    def stayed(self) -> list[str]:
        pages = self.s3.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket)
        begun = [f"upload of {upload['Key']}" for page in pages for upload in page.get("Uploads", ())]
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        objects = {item["Key"] for page in pages for item in page.get("Contents", ())}
        return [*begun, *objects - {*self.whole, ".imagestore/features"}]

    def close(self) -> None:
        for image_id in self.whole:
            self.plain.delete(self.plain.locate(image_id))
        self.whole.clear()
        self.assert_nothing_left()
        self.s3.delete_object(Bucket=self.bucket, Key=".imagestore/features")
        self.s3.delete_bucket(Bucket=self.bucket)
        self.plain.close()
        self.s3.close()
        self.proxy.close()


@pytest.fixture
def weather() -> Iterator[Weather]:
    made = Weather()
    try:
        yield made
    finally:
        made.close()


# The SDK leaves the socket of an answer that is cut off within its head to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_random_faults(weather: Weather, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: Counter[str] = Counter()
    pool = random.Random(SEED).randbytes(4 * BLOCK)
    image_id = "kept"
    weather.plain.add(image_id, pool)
    weather.whole[image_id] = pool
    try:
        for turn in range(COUNT):
            rng = random.Random(f"{SEED}.{turn}")
            kind = KINDS[turn % len(KINDS)]
            if rng.random() < 0.7:
                outcomes[f"add {kind}: {_add(weather, rng, kind, pool)}"] += 1
            else:
                outcomes[f"get {kind}: {_get(weather, rng, kind, pool)}"] += 1
    except BaseException as error:
        error.add_note(f"seed {SEED}, turn {turn}, {kind}")
        raise
    assert weather.read("kept") == pool, "an image that nobody touched is damaged"
    with capsys.disabled() if "IMAGESTORE_FAULTS" in os.environ else contextlib.nullcontext():
        print(f"\nseed {SEED}: {weather.struck} of {COUNT} faults struck")
        for outcome, number in sorted(outcomes.items()):
            print(f"{number:5} {outcome}")


def _add(weather: Weather, rng: random.Random, kind: str, pool: bytes) -> str:
    """One add in bad weather: whole, or an error and nothing. Returns what came of it."""
    length = rng.choice((rng.randrange(1, MIB), rng.randrange(BLOCK, 4 * BLOCK), rng.randrange(BLOCK, 4 * BLOCK)))
    start = rng.randrange(len(pool) - length + 1)
    data = pool[start : start + length]
    image_id = f"image-{uuid.uuid4().hex[:12]}"
    known = rng.random() < 0.5
    before = set(threading.enumerate())
    store = weather.proxied()
    error: StoreError | None = None
    try:
        with weather.striking(kind, rng, length):
            try:
                store.add(image_id, [data], size=length if known else None)
            except StoreError as caught:
                error = caught
    finally:
        store.close()
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if name.startswith("imagestore")], f"threads left: {left}"
    there = weather.plain.exists(image_id)
    if error is None:
        assert there, "an add that succeeded left no image"
    elif kind != "corrupt":
        # What went wrong will pass; after an answer that was lost the upload may be gone.
        assert isinstance(error, (Unavailable, AlreadyExists, NotFound)), f"{error!r}"
    if there:
        assert weather.read(image_id) == data, f"another image than was added; {error!r}"
        weather.plain.delete(weather.plain.locate(image_id))
    weather.assert_nothing_left()
    return "whole" if error is None else f"{type(error).__name__}{', whole' if there else ''}"


def _get(weather: Weather, rng: random.Random, kind: str, pool: bytes) -> str:
    """One read in bad weather: the right bytes, or an error."""
    store = weather.proxied()
    expected = {"sha256": hashlib.sha256(pool).hexdigest()}
    try:
        with weather.striking(kind, rng, len(pool)):
            if kind not in ("kill", "freeze"):
                weather.proxy.add(Fault(kind, "down", rng.randrange(len(pool))))  # type: ignore[arg-type]
            error: StoreError | None = None
            try:
                with store.get(store.locate("kept"), expected=expected) as reader:
                    assert b"".join(reader) == pool, "wrong bytes without an error"
            except StoreError as caught:
                error = caught
    finally:
        store.close()
    assert error is None or kind == "corrupt" or isinstance(error, Unavailable), f"{error!r}"
    return "whole" if error is None else type(error).__name__


def image(seed: str) -> bytes:
    return random.Random(seed).randbytes(4 * BLOCK + 17)


@pytest.mark.parametrize("known", [True, False], ids=["known size", "unknown size"])
def test_server_killed_and_restarted_in_mid_upload(weather: Weather, known: bool) -> None:
    data = image("upload")

    def source() -> Iterator[bytes]:
        yield data[: 2 * BLOCK + 5]
        weather.restart()
        yield data[2 * BLOCK + 5 :]

    with weather.store(retry=STUBBORN) as store:
        store.add("image", source(), size=len(data) if known else None)
    assert weather.read("image") == data
    weather.whole["image"] = data
    weather.assert_nothing_left()


def test_server_killed_and_restarted_in_mid_download(weather: Weather, tmp_path: Path) -> None:
    data = image("download")
    location = weather.plain.add("image", data).location
    weather.whole["image"] = data
    expected = {"sha256": hashlib.sha256(data).hexdigest()}
    with weather.store(retry=STUBBORN) as store:
        with store.get(location, expected=expected) as reader:
            got = [reader.read(BLOCK + 5)]
            weather.restart()
            got.append(reader.read())
        assert b"".join(got) == data
        calls: list[int] = []

        def progress(done: int, total: int | None) -> None:
            if not calls:
                weather.restart()
            calls.append(done)

        store.download(location, tmp_path / "image", expected=expected, progress=progress)
        assert calls
    assert (tmp_path / "image").read_bytes() == data


def test_server_that_says_nothing_any_more(weather: Weather) -> None:
    """The add ends with a time-out; what it left is found when the server is back."""
    data = image("frozen")
    with contextlib.ExitStack() as stack:

        def source() -> Iterator[bytes]:
            yield data[: 2 * BLOCK + 5]
            stack.enter_context(weather.frozen())
            yield data[2 * BLOCK + 5 :]

        short = Timeouts(connect=1, stall=1, abort=1)
        with weather.store(retry=Retry(attempts=2, first=0.1), timeouts=short) as store:
            with pytest.raises(StoreTimeout) as caught:
                store.add("image", source(), size=len(data))
            assert caught.value.temporary
    assert not weather.plain.exists("image")
    assert weather.plain.collect(older_than=0), "the upload that could not be taken back is not listed"
    weather.assert_nothing_left()
