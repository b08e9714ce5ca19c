"""The memory driver, called as the store calls it: each personality keeps the contract by its own means."""

from __future__ import annotations

import hashlib
import random
import threading
import uuid
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from imagestore.driver import Block, Capabilities, Driver, Hints, Leftover, Options, PullUpload, Upload
from imagestore.drivers.memory import PERSONALITIES, Backend, BackendError, MemoryDriver
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    DigestMismatch,
    InUse,
    InvalidImageId,
    InvalidLocation,
    NotFound,
    SizeMismatch,
    StoreError,
    StoreFull,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 1024
DATA = random.Random(1).randbytes(5 * BLOCK + 100)

every = pytest.mark.parametrize("personality", PERSONALITIES)
DETECTED = ("cinder", "s3-unconditional")
exclusive = pytest.mark.parametrize("personality", [p for p in PERSONALITIES if p not in DETECTED])


def make(personality: str, backend: Backend | None = None, **options: Any) -> Any:
    """An opened driver; Any, because the verbs are optional."""
    values = {"personality": personality, "block_size": BLOCK, "capacity": None, "require_auth": False, **options}
    driver = MemoryDriver(Options(values), store="box", backend=backend)
    driver.open()
    return driver


def blocks(driver: Driver, data: bytes, length: int = BLOCK) -> Iterator[Block]:
    caps = driver.capabilities
    unit = caps.sparse_unit
    for index, offset in enumerate(range(0, len(data), length)):
        part = data[offset : offset + length]
        if unit and not any(part):
            continue
        digest = hashlib.md5(part).digest() if caps.block_digest == "md5" else None
        yield Block(index=index, offset=offset, data=part, last=offset + length >= len(data), digest=digest)


PULLS: list[PullUpload] = []


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    before = threading.active_count()
    yield
    while PULLS:
        PULLS.pop().stop()
    assert threading.active_count() == before


def begin(driver: Any, image_id: str = "one", size: int | None = None, **more: Any) -> tuple[Upload, str]:
    token = uuid.uuid4().hex
    upload = driver.create(image_id, Hints(token=token, size=size, block_size=BLOCK, **more))
    if isinstance(upload, PullUpload):
        PULLS.append(upload)
    return upload, token


def written(driver: Any, data: bytes = DATA, image_id: str = "one", **more: Any) -> tuple[Upload, str]:
    upload, token = begin(driver, image_id, **more)
    for block in blocks(driver, data):
        upload.write(block)
    return upload, token


def add(driver: Any, data: bytes = DATA, image_id: str = "one", **more: Any) -> Upload:
    upload, _ = written(driver, data, image_id, **more)
    upload.commit(len(data))
    return upload


def content(driver: Any, image_id: str = "one", start: int = 0, stop: int | None = None) -> bytes:
    location = driver.locate(image_id)
    assert location is not None
    chunks = list(driver.read(location, start, stop).chunks)
    assert all(0 < len(chunk) <= 256 * 1024 for chunk in chunks)
    return b"".join(chunks)


@contextmanager
def fails(driver: Driver, expected: type[StoreError]) -> Iterator[list[StoreError]]:
    """What comes out is that error, or a native one that means it."""
    caught: list[StoreError] = []
    with pytest.raises((StoreError, BackendError)) as info:
        yield caught
    error = info.value
    ours = error if isinstance(error, StoreError) else driver.translate(error)
    assert type(ours) is expected, ours
    caught.append(ours)


def sweep(driver: Any) -> list[Leftover]:
    found = list(driver.uploads())
    for leftover in found:
        driver.discard(leftover)
    return found


@every
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("data", [b"", b"x", DATA[:BLOCK], DATA[: 2 * BLOCK], DATA], ids=len)
def test_round_trip(personality: str, data: bytes, known: bool) -> None:
    driver = make(personality)
    size = len(data) if known else None
    upload, token = written(driver, data, size=size, metadata={"os": "linux"})
    assert driver.locate("one") is None
    assert list(driver.list()) == []
    with fails(driver, NotFound):
        driver.stat(upload.location)
    with fails(driver, NotFound):
        driver.read(upload.location, 0, None)

    upload.commit(len(data))

    assert driver.locate("one") == upload.location == driver.parse(str(upload.location))
    assert content(driver) == data
    assert content(driver, start=1, stop=len(data) - 1) == data[1:-1] if len(data) > 2 else True
    stat = driver.stat(upload.location)
    assert stat.size == len(data)
    assert stat.token == (token if driver.capabilities.commit_proof else None)
    assert [(entry.image_id, entry.location) for entry in driver.list()] == [("one", upload.location)]
    if personality not in ("sheepdog", "vmware"):
        assert stat.metadata == {"os": "linux"} or personality == "gridfs"
    upload.abort()
    assert content(driver) == data
    assert list(driver.uploads()) == []
    driver.delete(upload.location)
    assert driver.locate("one") is None
    assert driver.backend.inventory() == {}
    assert driver.backend.stored == 0
    with fails(driver, NotFound):
        driver.delete(upload.location)


@every
def test_blocks_out_of_order_and_twice(personality: str) -> None:
    driver = make(personality)
    if driver.capabilities.parallel_writes == 1:
        pytest.skip("writes come in order")
    upload, _ = begin(driver)
    for block in reversed(list(blocks(driver, DATA))):
        upload.write(block)
        upload.write(block)
    upload.commit(len(DATA))
    assert content(driver) == DATA
    assert driver.usage().used == len(DATA)


@pytest.mark.parametrize("personality", ["plain", "sheepdog"])
def test_what_is_not_written_reads_as_zeros(personality: str) -> None:
    driver = make(personality)
    data = bytes(2 * BLOCK) + DATA[:BLOCK] + bytes(3 * BLOCK) + DATA[:10] + bytes(500)
    upload = add(driver, data)
    assert driver.usage().used < 3 * BLOCK
    assert content(driver) == data
    assert content(driver, start=BLOCK + 7, stop=len(data) - 3) == data[BLOCK + 7 : -3]
    areas = list(driver.extents(upload.location, 0, len(data), None))
    assert areas[0] == (2 * BLOCK, 3 * BLOCK)
    assert list(driver.extents(upload.location, 2 * BLOCK + 5, 2 * BLOCK + 9, None)) == [(2 * BLOCK + 5, 2 * BLOCK + 9)]
    with fails(driver, Changed):
        driver.extents(upload.location, 0, len(data), "older")

    begin(driver, "zeros")[0].commit(BLOCK * 1000)
    assert content(driver, "zeros") == bytes(BLOCK * 1000)
    location = driver.locate("zeros")
    assert list(driver.extents(location, 0, BLOCK * 1000, None)) == []


def test_only_thin_personalities_have_extents() -> None:
    have = {p for p in PERSONALITIES if hasattr(make(p), "extents")}
    assert have == {p for p in PERSONALITIES if make(p).capabilities.sparse_unit}
    assert [p for p in PERSONALITIES if hasattr(make(p), "check_id")] == ["vmware"]
    assert [p for p in PERSONALITIES if hasattr(make(p), "bind")] == ["cinder"]


@exclusive
def test_a_taken_id_is_refused_and_the_image_stays(personality: str) -> None:
    driver = make(personality)
    add(driver)
    before = driver.backend.inventory()
    with fails(driver, AlreadyExists):
        upload, _ = written(driver, b"other")
        try:
            upload.commit(5)
        finally:
            upload.abort()
    assert content(driver) == DATA
    assert driver.backend.inventory() == before


@pytest.mark.parametrize("personality", DETECTED)
def test_a_taken_id_is_seen_where_nothing_excludes_it(personality: str) -> None:
    driver = make(personality)
    first, _ = written(driver)
    second, _ = written(driver, b"other")
    first.commit(len(DATA))
    with fails(driver, AlreadyExists):
        second.commit(5)
    second.abort()
    assert driver.capabilities.collision == "detected"
    assert content(driver) == DATA
    assert list(driver.uploads()) == []


@every
@pytest.mark.parametrize("length", [10, 3 * BLOCK])
def test_racing_commits(personality: str, length: int) -> None:
    backend = Backend()
    barrier = threading.Barrier(6)
    lock = threading.Lock()
    outcomes: list[bytes | type] = []
    images = [bytes([n + 1]) * length for n in range(6)]

    def adder(data: bytes) -> None:
        driver = make(personality, backend)
        barrier.wait()
        upload = None
        result: bytes | type = data
        try:
            upload, _ = written(driver, data)
            barrier.wait() if personality != "sheepdog" else None
            upload.commit(length)
        except (StoreError, BackendError) as error:
            ours = error if isinstance(error, StoreError) else driver.translate(error)
            result = type(ours)
            if upload is not None:
                upload.abort()
        with lock:
            outcomes.append(result)

    threads = [threading.Thread(target=adder, args=(data,)) for data in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    driver = make(personality, backend)
    winners = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
    assert content(driver) in winners
    if driver.capabilities.collision == "exclusive":
        assert len(winners) == 1
    assert {outcome for outcome in outcomes if not isinstance(outcome, bytes)} <= {AlreadyExists}
    assert list(driver.uploads()) == []


@every
def test_abort_at_any_moment_any_number_of_times(personality: str) -> None:
    driver = make(personality)
    add(driver, b"kept", "kept")
    before = driver.backend.inventory()
    for stop in range(8):
        upload, token = begin(driver)
        assert [(found.token, found.image_id, found.alive) for found in driver.uploads()] == [(token, "one", True)]
        for block in list(blocks(driver, DATA))[:stop]:
            upload.write(block)
        for _ in range(3):
            upload.abort()
        assert driver.backend.inventory() == before
        assert list(driver.uploads()) == []


@every
@pytest.mark.parametrize("data", [b"", b"x", DATA], ids=len)
def test_a_discarded_upload_does_not_commit(personality: str, data: bytes) -> None:
    backend = Backend()
    driver, collector = make(personality, backend), make(personality, backend)
    upload, token = written(driver, data)
    (leftover,) = collector.uploads()
    assert (leftover.token, leftover.alive) == (token, True)
    collector.discard(leftover)
    collector.discard(leftover)
    with fails(driver, NotFound):
        upload.commit(len(data))
    assert driver.locate("one") is None
    upload.abort()
    assert backend.inventory() == {}
    add(driver, data)
    assert content(driver) == data


@every
def test_a_late_discard_does_not_touch_the_image(personality: str) -> None:
    driver = make(personality)
    upload, _ = written(driver)
    (leftover,) = driver.uploads()
    upload.commit(len(DATA))
    driver.discard(leftover)
    assert content(driver) == DATA


@every
def test_racing_commit_and_discard(personality: str) -> None:
    backend = Backend()
    driver, collector = make(personality, backend), make(personality, backend)
    for round_ in range(40):
        upload, _ = written(driver)
        (leftover,) = collector.uploads()
        barrier = threading.Barrier(2)

        def collect(leftover: Leftover = leftover, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            collector.discard(leftover)

        thread = threading.Thread(target=collect)
        thread.start()
        barrier.wait()
        if round_ % 2:
            threading.Event().wait(0.0002)
        try:
            upload.commit(len(DATA))
        except (StoreError, BackendError) as error:
            ours = error if isinstance(error, StoreError) else driver.translate(error)
            assert type(ours) is NotFound
            thread.join()
            assert driver.locate("one") is None
        else:
            thread.join()
            assert content(driver) == DATA
            driver.delete(upload.location)
        upload.abort()
        sweep(driver)
        assert backend.inventory() == {}


class Between:
    """A client that lets something happen before its n-th request from now."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._left = -1
        self._happens: Callable[[], None] | None = None

    def arm(self, requests: int, happens: Callable[[], None]) -> None:
        self._left, self._happens = requests, happens

    @property
    def happened(self) -> bool:
        return self._left < 0

    def __getattr__(self, name: str) -> Any:
        def request(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == -1 and self._happens is not None:
                self._happens()
            return getattr(self._client, name)(*args, **kwargs)

        return request


def between(driver: Any) -> Between:
    driver.client = Between(driver.client)
    assert isinstance(driver.client, Between)
    return driver.client


def committed(driver: Any, upload: Upload, size: int) -> bool:
    try:
        upload.commit(size)
    except (StoreError, BackendError) as error:
        ours = error if isinstance(error, StoreError) else driver.translate(error)
        assert type(ours) in (NotFound, AlreadyExists), ours
        return False
    return True


@every
@pytest.mark.parametrize("rival", [False, True])
@pytest.mark.parametrize("data", [b"only", DATA], ids=len)
def test_a_discard_between_two_requests_of_a_commit(personality: str, data: bytes, rival: bool) -> None:
    """Also if somebody else takes the freed id: the image is whole, or the commit fails and touches nothing."""
    for requests in range(20):
        backend = Backend()
        driver, other = make(personality, backend), make(personality, backend)
        steps = between(driver)
        upload, _ = written(driver, data)
        (leftover,) = other.uploads()
        added = False

        def collect(other: Any = other, leftover: Leftover = leftover) -> None:
            nonlocal added
            other.discard(leftover)
            if rival and other.locate("one") is None:
                try:
                    add(other, b"hers")
                    added = True
                except (StoreError, BackendError):
                    sweep(other)

        steps.arm(requests, collect)
        success = committed(driver, upload, len(data))
        if success and added:
            assert other.capabilities.collision == "detected"
            assert content(other) in (data, b"hers")
        elif success:
            assert content(other) == data
        elif added:
            assert content(other) == b"hers"
        else:
            assert other.locate("one") is None
        upload.abort()
        assert (other.locate("one") is not None) == (success or added)
        sweep(other)
        for entry in other.list():
            other.delete(entry.location)
        assert backend.inventory() == {}
        if not steps.happened:
            return
    pytest.fail("more requests than believed")


@every
@pytest.mark.parametrize("cut", [False, True])
def test_a_commit_between_two_requests_of_a_discard(personality: str, cut: bool) -> None:
    """Also if the collector dies there."""
    for requests in range(20):
        backend = Backend()
        driver, other = make(personality, backend), make(personality, backend)
        upload, _ = written(driver)
        (leftover,) = other.uploads()
        outcome: list[bool] = []
        steps = between(other)

        def commit(driver: Any = driver, upload: Upload = upload, outcome: list[bool] = outcome) -> None:
            outcome.append(committed(driver, upload, len(DATA)))
            if cut:
                raise BackendError("unavailable")

        steps.arm(requests, commit)
        try:
            other.discard(leftover)
        except BackendError:
            assert cut
        if not outcome:
            return
        assert (driver.locate("one") is not None) == outcome[0]
        if outcome[0]:
            assert content(driver) == DATA
        upload.abort()
        sweep(driver)
        for entry in driver.list():
            assert content(driver) == DATA
            driver.delete(entry.location)
        assert backend.inventory() == {}
    pytest.fail("more requests than believed")


@every
def test_uploads_of_a_closed_driver_are_not_alive(personality: str) -> None:
    backend = Backend()
    driver, other = make(personality, backend), make(personality, backend)
    written(driver)
    assert [found.alive for found in other.uploads()] == [True]
    backend.tells_alive = False
    assert [found.alive for found in other.uploads()] == [None]
    backend.tells_alive = True
    driver.close()
    (leftover,) = other.uploads()
    assert leftover.alive is False
    assert leftover.started <= leftover.last_activity
    other.discard(leftover)
    assert backend.inventory() == {}
    with fails(driver, StoreError):
        driver.usage()


@every
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("data", [b"", b"only", DATA], ids=len)
def test_a_client_that_dies_at_any_request(personality: str, data: bytes, after: bool) -> None:
    """Whatever request is the last: the image is whole, or what is there is listed and can be removed."""
    for requests in range(100):
        backend = Backend()
        driver, other = make(personality, backend), make(personality, backend)
        backend.fail_next(skip=requests, after=after)
        try:
            add(driver, data)
        except (StoreError, BackendError):
            died = True
        else:
            died = False
        driver.close()
        backend.heal()
        if other.locate("one") is not None:
            assert content(other) == data
        assert all(leftover.alive is False for leftover in sweep(other))
        if (location := other.locate("one")) is not None:
            assert content(other) == data
            other.delete(location)
        assert backend.inventory() == {}
        if not died:
            assert requests > 1
            return
    pytest.fail("more requests than believed")


@every
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", ["delete", "abort", "discard"])
def test_a_removal_that_is_cut_at_any_request(personality: str, what: str, after: bool) -> None:
    for requests in range(100):
        backend = Backend()
        driver, other = make(personality, backend), make(personality, backend)
        upload = add(driver) if what == "delete" else written(driver)[0]
        leftover = next(driver.uploads(), None)
        backend.fail_next(skip=requests, after=after)
        try:
            if what == "delete":
                driver.delete(upload.location)
            elif what == "abort":
                upload.abort()
            else:
                driver.discard(leftover)
        except (StoreError, BackendError):
            died = True
        else:
            died = False
        driver.close()
        if isinstance(upload, PullUpload):
            upload.stop()
        backend.heal()
        if (location := other.locate("one")) is not None:
            assert what == "delete"
            assert content(other) == DATA
        sweep(other)
        if (location := other.locate("one")) is not None:
            assert content(other) == DATA
            other.delete(location)
        assert backend.inventory() == {}
        if not died:
            return
    pytest.fail("more requests than believed")


@every
@pytest.mark.parametrize("data", [b"", b"only", DATA], ids=len)
def test_a_commit_in_doubt_can_be_decided(personality: str, data: bytes) -> None:
    """As the store does it: the token tells, or the commit is repeated."""
    for requests in range(100):
        driver = make(personality)
        upload, token = written(driver, data)
        driver.backend.fail_next(skip=requests, after=True)
        try:
            upload.commit(len(data))
        except (StoreError, BackendError) as error:
            ours = error if isinstance(error, StoreError) else driver.translate(error)
            assert ours.temporary
        else:
            driver.backend.heal()
            assert requests > 0
            break
        try:
            stat = driver.stat(upload.location)
        except (StoreError, BackendError):
            stat = None
        if stat is not None and driver.capabilities.commit_proof:
            assert stat.token == token
        else:
            try:
                upload.commit(len(data))
            except (StoreError, BackendError):
                assert driver.locate("one") is None
                upload.abort()
                assert driver.backend.inventory() == {}
                continue
        upload.abort()
        assert content(driver) == data
        assert list(driver.uploads()) == []


@every
def test_things_of_other_tools_are_left_alone(personality: str) -> None:
    driver = make(personality)
    check = driver.plant_foreign()
    assert driver.backend.inventory()
    assert list(driver.uploads()) == []
    assert list(driver.list()) == []
    written(driver, image_id="cut")
    add(driver)
    assert len(sweep(driver)) == 1
    driver.delete(driver.locate("one"))
    check()
    for table, key, _ in driver.foreign:
        driver.client.remove(table, key)
    assert driver.backend.inventory() == {}
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("personality", ["s3", "s3-unconditional", "swift"])
@pytest.mark.parametrize("data", [DATA[:10], DATA[: 2 * BLOCK]], ids=len)
def test_damaged_blocks_are_refused(personality: str, data: bytes) -> None:
    driver = make(personality)
    upload, _ = begin(driver)
    with fails(driver, DigestMismatch) as caught:
        for block in blocks(driver, data):
            upload.write(replace(block, digest=bytes(16)))
        upload.commit(len(data))
    assert caught[0].temporary
    assert driver.locate("one") is None
    upload.abort()
    assert driver.backend.inventory() == {}


@every
@pytest.mark.parametrize("data", [DATA[:BLOCK], DATA], ids=len)
def test_a_full_store_keeps_nothing(personality: str, data: bytes) -> None:
    driver = make(personality, capacity=len(data) - 1)
    upload, _ = begin(driver)
    with fails(driver, StoreFull):
        for block in blocks(driver, data):
            upload.write(block)
        upload.commit(len(data))
    upload.abort()
    assert driver.backend.inventory() == {}
    assert driver.usage().free == len(data) - 1
    add(driver, data[:-10])
    assert driver.usage().used == len(data) - 10


@every
def test_sizes_are_looked_at_before_the_commit(personality: str) -> None:
    driver = make(personality)
    upload, _ = written(driver)
    with fails(driver, SizeMismatch):
        upload.commit(len(DATA) - 1)
    upload.abort()
    assert driver.backend.inventory() == {}


@every
def test_a_read_is_pinned_to_its_version(personality: str) -> None:
    driver = make(personality)
    add(driver)
    location = driver.locate("one")
    version = driver.stat(location).version
    reading = driver.read(location, 100, None, version=version)
    assert (reading.stat.version, reading.stat.size) == (version, len(DATA))
    assert b"".join(reading.chunks) == DATA[100:]
    driver.delete(location)
    add(driver, DATA[::-1])
    again = driver.locate("one")
    with fails(driver, NotFound if personality == "cinder" else Changed):
        driver.read(location, 0, None, version=version)
    assert b"".join(driver.read(again, 0, None).chunks) == DATA[::-1]
    assert driver.stat(again).version != version


@every
def test_a_read_under_a_delete_is_whole_or_fails(personality: str) -> None:
    driver = make(personality)
    upload = add(driver)
    chunks = driver.read(upload.location, 0, None).chunks
    got = next(chunks)
    driver.delete(upload.location)
    if personality in ("swift", "gridfs"):
        with fails(driver, Unavailable):
            list(chunks)
        with fails(driver, NotFound):
            driver.read(upload.location, len(got), None)
    else:
        assert got + b"".join(chunks) == DATA


@every
def test_reads_break_and_close(personality: str) -> None:
    driver = make(personality)
    add(driver)
    location = driver.locate("one")
    reading = driver.read(location, 0, None)
    driver.backend.fail_next("load")
    with fails(driver, Unavailable):
        list(reading.chunks)
    reading = driver.read(location, 0, None)
    next(reading.chunks)
    reading.close()
    reading.close()
    with fails(driver, Cancelled):
        list(reading.chunks)


@every
def test_an_image_in_use_is_not_deleted(personality: str) -> None:
    driver = make(personality)
    upload = add(driver)
    with driver.backend.hold("one"):
        with fails(driver, InUse):
            driver.delete(upload.location)
        assert content(driver) == DATA
        assert list(driver.uploads()) == []
    driver.delete(upload.location)
    assert driver.backend.inventory() == {}


@every
def test_drivers_share_a_backend(personality: str) -> None:
    driver = make(personality)
    add(driver)
    clone = driver.clone()
    assert type(clone) is type(driver)
    clone.open()
    driver.close()
    assert content(clone) == DATA
    assert content(make(personality, driver.backend)) == DATA
    assert make(personality).locate("one") is None


@every
def test_an_unreachable_backend(personality: str) -> None:
    backend = Backend()
    driver = make(personality, backend)
    backend.reachable = False
    for verb in (lambda: driver.locate("one"), lambda: begin(driver), lambda: driver.uploads(), driver.usage):
        with fails(driver, Unavailable):
            verb()
    with fails(driver, Unavailable):
        driver.clone().open()
    driver.close()
    driver.clone().close()


@every
def test_locations_of_others_are_refused(personality: str) -> None:
    driver = make(personality)
    add(driver)
    good = str(driver.locate("one"))
    key = good.removeprefix("memory://box/")
    assert driver.parse("MEMORY" + good.removeprefix("memory")).uri == good
    bad = (
        f"memory://other/{key}",
        f"memory://box/{key}/x",
        f"memory://box/../{key}",
        f"memory://box//{key}",
        f"memory://box/{key}\n",
        f"memory://box/{key}\0",
        f"memory://box/.{key}",
        f"file://box/{key}",
        f"memory:/box/{key}",
        "memory://box/",
        "memory://box",
        key,
        "",
    )
    for uri in bad:
        with pytest.raises(InvalidLocation):
            driver.parse(uri)


def test_a_store_without_name_and_one_with_an_odd_name() -> None:
    unnamed = MemoryDriver(Options({}))
    assert type(unnamed).__name__ == "Plain"
    assert unnamed.parse("memory://memory/x").image_id == "x"
    odd = MemoryDriver(Options({}), store="a/b@c")
    assert odd.parse("memory://a%2Fb%40c/x").key == ("x",)


def test_foreign_errors_mean_nothing_to_it() -> None:
    assert make("plain").translate(ValueError()) is None
    limited = make("plain").translate(BackendError("rate-limited", retry_after=3))
    assert (limited.temporary, limited.retry_after) == (True, 3)


def test_the_bytes_are_kept_not_copied() -> None:
    for personality in PERSONALITIES:
        driver = make(personality)
        add(driver, DATA[: 2 * BLOCK])
        data = bytes(BLOCK)
        upload, _ = begin(driver, "kept")
        upload.write(Block(index=0, offset=0, data=data))
        tables = driver.backend._tables.values()
        held = [piece for table in tables for row in table.values() for piece in row.pieces.values()]
        assert any(piece is data for piece in held), personality
        upload.abort()


def test_capabilities_without_block_size() -> None:
    def of(personality: str) -> Capabilities:
        caps: Capabilities = make(personality, block_size=None).capabilities
        return caps

    assert (of("s3").block_min, of("s3").blocks_max) == (5 << 20, 10_000)
    assert of("swift").blocks_max == 1_000
    assert of("sheepdog").block_min == of("sheepdog").block_max == of("sheepdog").sparse_unit == 4 << 20
    assert (of("gridfs").block_max or 0) < 16 << 20
    assert of("cinder").parallel_writes == of("vmware").parallel_writes == 1
    assert not of("vmware").repeatable_writes
    assert not of("sheepdog").repeatable_create


# One personality each


def test_s3_refuses_small_parts_and_too_many() -> None:
    driver = make("s3")
    upload, _ = begin(driver)
    with pytest.raises(BackendError, match="part 10001"):
        upload.write(Block(index=10_000, offset=0, data=b"x"))
    for index in range(2):
        upload.write(Block(index=index, offset=index, data=b"x", last=index == 1))
    with pytest.raises(BackendError, match="too small"):
        upload.commit(2)


def test_s3_takes_ten_thousand_parts() -> None:
    driver = make("s3", block_size=1)
    upload, _ = begin(driver)
    for index in range(10_000):
        upload.write(Block(index=index, offset=index, data=b"x"))
    upload.commit(10_000)
    assert content(driver) == b"x" * 10_000


def test_swift_takes_a_thousand_segments_and_no_more() -> None:
    for count in (1_000, 1_001):
        driver = make("swift", block_size=1)
        upload, _ = begin(driver)
        for index in range(count):
            upload.write(Block(index=index, offset=index, data=b"x"))
        if count == 1_000:
            upload.commit(count)
            assert content(driver) == b"x" * count
        else:
            with pytest.raises(BackendError, match="too many"):
                upload.commit(count)


def test_swift_finds_a_segment_written_after_a_discard() -> None:
    driver = make("swift")
    upload, token = begin(driver)
    sweep(driver)
    upload.write(next(blocks(driver, DATA)))
    assert [found.token for found in sweep(driver)] == [token]
    assert driver.backend.inventory() == {}


def test_cinder_rounds_extends_and_makes_ids() -> None:
    driver = make("cinder")
    unit = 4 * BLOCK
    upload, _ = begin(driver, size=1)
    volume = upload.location.key[0]
    assert driver.client.get("volumes", volume).size == unit
    assert "one" not in upload.location.uri
    for block in blocks(driver, DATA):
        upload.write(block)
    upload.commit(len(DATA))
    assert driver.client.get("volumes", volume).size == 2 * unit
    assert driver.stat(upload.location).size == len(DATA)


def test_cinder_acts_for_the_one_who_asks() -> None:
    driver = make("cinder", require_auth=True)
    assert driver.capabilities.needs_auth
    for verb in (lambda: driver.locate("one"), lambda: begin(driver), lambda: driver.list(), lambda: driver.uploads()):
        with fails(driver, Unauthenticated):
            verb()
    with pytest.raises(Unauthenticated):
        driver.bind(SimpleNamespace(project_id=None))
    red = driver.bind(SimpleNamespace(auth_token="a", user_id="u", project_id="red", service_catalog=[]))
    blue = driver.bind(SimpleNamespace(get_project_id=lambda: "blue"))
    add(red, b"red")
    add(blue, b"blue")
    assert (content(red), content(blue)) == (b"red", b"blue")
    with fails(blue, NotFound):
        blue.read(red.locate("one"), 0, None)
    with fails(blue, NotFound):
        blue.delete(red.locate("one"))
    written(red, image_id="cut")
    assert list(blue.uploads()) == []
    red.close()
    assert content(blue) == b"blue"
    assert [found.alive for found in red.uploads()] == [True]


def test_sheepdog_holds_the_name_from_create_on() -> None:
    driver = make("sheepdog")
    first, token = begin(driver)
    assert driver.locate("one") is None
    with fails(driver, AlreadyExists) as caught:
        begin(driver)
    assert "unfinished" in caught[0].message
    assert token in caught[0].message
    first.commit(0)
    with fails(driver, AlreadyExists) as caught:
        begin(driver)
    assert "unfinished" not in caught[0].message


def test_sheepdog_writes_never_reach_the_next_holder_of_the_name() -> None:
    driver = make("sheepdog")
    upload, _ = begin(driver)
    sweep(driver)
    rival, _ = written(driver, DATA[:BLOCK])
    with fails(driver, NotFound):
        upload.write(next(blocks(driver, DATA[::-1])))
    with fails(driver, NotFound):
        upload.commit(BLOCK)
    upload.abort()
    rival.commit(BLOCK)
    assert content(driver) == DATA[:BLOCK]


def test_gridfs_insert_half_done() -> None:
    """Cut between the insert and the removal of the upload document: a whole image, and a document to collect."""
    backend = Backend()
    driver, other = make("gridfs", backend), make("gridfs", backend)
    upload, token = written(driver)
    backend.fail_next("remove")
    with pytest.raises(BackendError):
        upload.commit(len(DATA))
    driver.close()
    assert content(other) == DATA
    assert [found.token for found in sweep(other)] == [token]
    assert content(other) == DATA
    assert list(other.uploads()) == []


def test_gridfs_chunks_are_equally_long() -> None:
    upload, _ = begin(make("gridfs"))
    with pytest.raises(BackendError, match="equally long"):
        upload.write(Block(index=0, offset=0, data=b"short"))


def test_vmware_refuses_names_of_disks() -> None:
    driver = make("vmware")
    driver.check_id("disk.qcow2")
    for name in ("disk.vmdk", "disk.VMDK"):
        with pytest.raises(InvalidImageId):
            driver.check_id(name)
        driver.client.put("datastore", name, data=b"not ours")
        assert driver.locate(name) is None
        with fails(driver, NotFound):
            driver.delete(driver.parse(f"memory://box/{name}"))
    assert list(driver.list()) == []


def test_vmware_leaves_no_thread() -> None:
    driver = make("vmware")
    before = threading.active_count()
    written(driver)[0].abort()
    assert threading.active_count() == before
    add(driver)
    assert threading.active_count() == before


def test_vmware_does_not_take_a_rivals_image_for_its_own() -> None:
    driver = make("vmware")
    upload, _ = written(driver, b"mine")
    driver.backend.fail_next("move")
    with fails(driver, Unavailable):
        upload.commit(4)
    sweep(driver)
    add(driver, b"hers")
    with fails(driver, NotFound):
        upload.commit(4)
    upload.abort()
    assert content(driver) == b"hers"
