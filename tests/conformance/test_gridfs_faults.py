"""Connections cut at every command, a server that is killed, a client that is killed, uploads that are collected.

``IMAGESTORE_FAULTS`` is how many random faults there are (12), ``IMAGESTORE_FAULTS_SEED`` repeats a run.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
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

pytest.importorskip("pymongo", reason="the GridFS driver needs pymongo")

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

import mongodb_testing
from faultproxy import Fault, FaultProxy
from mongodb_testing import client, failing, options, remains, running

from imagestore import Retry, Store, StoreError, Timeouts
from imagestore.driver import Block, Hints
from imagestore.drivers import gridfs
from imagestore.drivers.gridfs import GridFSDriver
from imagestore.errors import NotFound, StoreTimeout, Unavailable

COUNT = int(os.environ.get("IMAGESTORE_FAULTS", "12"))
SEED = int(os.environ.get("IMAGESTORE_FAULTS_SEED") or random.SystemRandom().randrange(1 << 32))
BLOCK = 64 * 1024
DATA = random.Random(3).randbytes(5 * BLOCK + 77)
# More than one answer of the server holds.
LONG = random.Random(4).randbytes(100 * BLOCK)
QUICK = Retry(attempts=4, first=0.01, longest=0.05, total=20)
SHORT = Timeouts(connect=3, stall=1, abort=5)
CLEAN: dict[str, list[Any]] = {"chunks": [], "files": [], "uploads": []}


class Place:
    """A database, and stores in it."""

    def __init__(self) -> None:
        self.env = running()
        self.url = self.env["MONGODB_URL"]
        self.name = f"faults_{uuid.uuid4().hex[:12]}"
        self.mongo = client(self.url)
        self.database = self.mongo[self.name]
        self.opened: list[Store] = []
        self.plain = self.store(timeouts=Timeouts(connect=20, stall=30))
        self.plain.delete(self.plain.add("first", b"makes indexes").location)

    def store(self, url: str = "", retry: Retry = QUICK, timeouts: Timeouts = SHORT) -> Store:
        driver = GridFSDriver(options(uri=url or self.url, database=self.name), timeouts=timeouts)
        self.opened.append(Store(driver, name="faults", retry=retry, timeouts=timeouts, _block_size=BLOCK))
        return self.opened[-1]

    def read(self, image_id: str) -> bytes:
        with self.plain.get(self.plain.locate(image_id)) as reader:
            return b"".join(reader)

    def whole_or_absent(self, image_id: str, data: bytes) -> bool:
        if not self.plain.exists(image_id):
            return False
        assert self.read(image_id) == data
        return True

    def collect(self) -> None:
        self.plain.collect(older_than=0, include_alive=True)
        assert remains(self.database) == CLEAN

    def close(self) -> None:
        for store in self.opened:
            store.close()
        self.mongo.drop_database(self.name)
        self.mongo.close()


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def cutter(place: Place) -> Place:
    """Where connections can also be cut after a command took effect."""
    if place.env["MONGODB_KIND"] != "documentdb":
        pytest.skip(f"a server of the kind {place.env['MONGODB_KIND']} can't cut a connection after a command")
    return place


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("command", ["insert", "update", "find", "findAndModify", "aggregate", "delete"])
def test_connection_cut_in_an_add(cutter: Place, command: str, after: bool) -> None:
    """Wherever it is cut once, before or after a command took effect, the image is whole and nothing is left."""
    seen = _commands(cutter, lambda store: store.add("counted", DATA))
    assert seen[command] or command == "delete"
    for number in range(max(1, seen[command])):
        store = cutter.store()
        store.exists("x")
        image_id = f"{command}-{number}"
        with _nth(cutter, command, number, after):
            store.add(image_id, DATA)
        assert cutter.read(image_id) == DATA
        assert remains(cutter.database)["chunks"] == []
        # Only the removal of the mark may have failed, which is not worth an error.
        assert [mark["image_id"] for mark in remains(cutter.database)["uploads"]] in ([], [image_id])
        cutter.collect()
        assert cutter.read(image_id) == DATA


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("command", ["findAndModify", "delete", "find"])
def test_connection_cut_in_a_delete(cutter: Place, command: str, after: bool) -> None:
    cutter.plain.add("counted", DATA)
    seen = _commands(cutter, lambda store: store.delete("gridfs://counted"))
    for number in range(seen[command]):
        location = cutter.plain.add("image", DATA).location
        store = cutter.store()
        store.exists("x")
        with _nth(cutter, command, number, after):
            store.delete(location)
        assert not cutter.plain.exists("image")
        cutter.collect()


@pytest.mark.parametrize("command", ["find", "getMore"])
def test_connection_cut_in_a_read(cutter: Place, command: str) -> None:
    location = cutter.plain.add("image", LONG).location
    store = cutter.store()
    store.exists("x")
    with failing(cutter.url, (command,), {"times": 2}, closeConnection=True), store.get(location) as reader:
        assert b"".join(reader) == LONG


@pytest.mark.parametrize("command", ["insert", "update", "aggregate"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_never_answered(cutter: Place, command: str, after: bool) -> None:
    """What can't be taken back is left for collect, and the id is free after it."""
    store = cutter.store()
    store.exists("x")
    with failing(cutter.url, (command,), closeConnection=True, after=after), pytest.raises(Unavailable):
        store.add("image", DATA)
    assert not cutter.plain.exists("image")
    cutter.collect()
    cutter.plain.add("image", DATA)
    assert cutter.read("image") == DATA


def test_server_that_answers_too_late(cutter: Place) -> None:
    """A time-out is an error, and what arrives after it does no harm."""
    store = cutter.store(retry=Retry(attempts=1), timeouts=Timeouts(connect=3, stall=0.3, abort=1))
    store.exists("x")
    with failing(cutter.url, ("insert",), blockConnection=True, blockTimeMS=900), pytest.raises(StoreTimeout):
        store.add("image", DATA)
    assert [leftover.image_id for leftover in cutter.plain.uploads()] == ["image"], "what may come later has no mark"
    # The late inserts are not forgotten about: they come now, or when nobody looks any more.
    time.sleep(1.2)
    assert not cutter.plain.exists("image")
    cutter.collect()


def test_no_space(cutter: Place) -> None:
    from imagestore.errors import StoreFull

    with failing(cutter.url, ("insert",), errorCode=14031), pytest.raises(StoreFull):
        cutter.store().add("image", DATA)
    assert remains(cutter.database) == CLEAN


def _commands(place: Place, action: Callable[[Store], object]) -> Counter[str]:
    """How many commands of each name an action sends."""
    store = place.store()
    store.exists("x")
    before = mongodb_testing.REQUESTS.count.copy()
    action(store)
    return mongodb_testing.REQUESTS.count - before


@contextlib.contextmanager
def _nth(place: Place, command: str, number: int, after: bool) -> Iterator[None]:
    """Meanwhile the connection of one command is cut."""
    with failing(place.url, (command,), {"times": 1}, closeConnection=True, after=after, skip=number):
        yield


# Discarded at every step


@pytest.mark.parametrize("step", ["_insert", "_beat", "_publish"])
@pytest.mark.parametrize("number", [0, 3])
def test_collected_at_a_step(place: Place, monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    """Of an upload and whoever discards it one wins, whatever the upload is doing; nothing is left of the loser's."""
    plain = getattr(gridfs._Upload, step)
    left = [number]

    def collecting(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            place.plain.collect(older_than=0, include_alive=True)
        return plain(self, *arguments)

    monkeypatch.setattr(gridfs._Upload, step, collecting)
    with contextlib.suppress(NotFound):
        place.store().add("image", DATA)
        assert left[0] >= 0, "it was collected, and became an image"
    monkeypatch.undo()
    assert place.whole_or_absent("image", DATA) is (left[0] >= 0)
    assert remains(place.database) == CLEAN


def test_commit_while_it_is_being_discarded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who discards has found no image and is about to remove the chunks: the commit must not make one now."""
    driver = GridFSDriver(options(uri=place.url, database=place.name))
    driver.open()
    try:
        upload = driver.create("image", Hints(token="0" * 32, size=len(DATA), block_size=BLOCK))
        for number in range(6):
            data = DATA[number * BLOCK : (number + 1) * BLOCK]
            upload.write(Block(index=number, offset=number * BLOCK, data=data, last=number == 5))
        plain = GridFSDriver._remove_chunks
        caught: list[StoreError] = []

        def committing(self: GridFSDriver, files_id: Any) -> None:
            monkeypatch.undo()
            try:
                upload.commit(len(DATA))
            except NotFound as error:
                caught.append(error)
            plain(self, files_id)

        monkeypatch.setattr(GridFSDriver, "_remove_chunks", committing)
        driver.discard(next(driver.uploads()))
        assert caught, "the commit made an image whose chunks were being removed"
        assert not place.plain.exists("image")
        upload.abort()
        assert remains(place.database) == CLEAN
    finally:
        driver.close()


def test_collected_as_it_becomes_visible(place: Place) -> None:
    """Ten times at about the same moment: the image is whole, or there is none."""
    rng = random.Random(5)
    outcomes = Counter[bool]()
    for turn in range(10):
        image_id = f"image-{turn}"
        store = place.store()
        store.exists("x")
        over = threading.Event()

        def collect(over: threading.Event = over, delay: float = rng.random() * 0.01) -> None:
            while not over.is_set():
                for leftover in place.plain.uploads():
                    time.sleep(delay)
                    place.plain.collect(older_than=0, include_alive=True)
                    assert leftover.token

        collector = threading.Thread(target=collect)
        collector.start()
        try:
            store.add(image_id, DATA[:BLOCK])
            stored = True
        except NotFound:
            stored = False
        finally:
            over.set()
            collector.join(30)
        assert place.whole_or_absent(image_id, DATA[:BLOCK]) is stored
        outcomes[stored] += 1
    place.collect()


# A client that is killed


CHILD = """
import os, signal, sys
from pymongo import monitoring
sys.path.insert(0, sys.argv[1])
from imagestore import Store
from imagestore.drivers.gridfs import GridFSDriver
from imagestore.driver import Options
from imagestore._models import Limits

DATA = open(sys.argv[4], "rb").read()
WRITING = ("findAndModify", "insert", "update", "delete", "createIndexes")

class Killer(monitoring.CommandListener):
    count, at, when = 0, 0, ""
    def strike(self, event, when):
        if event.command_name in WRITING and when == self.when:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
    def started(self, event): self.strike(event, "before")
    def succeeded(self, event): self.strike(event, "after")
    def failed(self, event): self.strike(event, "after")

killer = Killer()
monitoring.register(killer)
defaults = {option.dest: option.default for option in GridFSDriver.options}
for line in sys.stdin:
    job, image_id, killer.when, at = line.split()
    killer.count, killer.at = 0, int(at)
    pid = os.fork()
    if pid == 0:
        driver = GridFSDriver(Options({**defaults, "uri": sys.argv[2], "database": sys.argv[3]}))
        store = Store(driver, limits=Limits(workers=1), _block_size=65536)
        if job == "add":
            store.add(image_id, DATA)
        else:
            store.delete("gridfs://" + image_id)
        os._exit(0)
    print("killed" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) else "done", flush=True)
"""


@contextlib.contextmanager
def mortal(place: Place, path: Path) -> Iterator[Callable[..., bool]]:
    """A function that does a job in a process of its own, which is killed; False if it came to its end."""
    path.write_bytes(DATA)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(gridfs.__file__).parents[2]), place.url, place.name, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*words: object) -> bool:
        print(*words, file=process.stdin, flush=True)
        said = process.stdout.readline().strip()
        assert said in ("killed", "done"), "the child failed"
        return said == "killed"

    with process:
        try:
            yield run
        finally:
            process.stdin.close()
            process.wait(30)


@pytest.mark.parametrize("when", ["before", "after"])
def test_client_killed_at_every_step(place: Place, when: str, tmp_path: Path) -> None:
    """Before and after each of its commands that write: the image is whole or absent, and collect finds the rest."""
    steps = Counter[str]()
    with mortal(place, tmp_path / "image") as run:
        for number in range(1, 100):
            killed = run("add", "image", when, number)
            there = place.whole_or_absent("image", DATA)
            assert there or killed
            if killed and not there and remains(place.database)["chunks"]:
                assert [leftover.image_id for leftover in place.plain.uploads()] == ["image"]
            place.collect()
            assert place.plain.exists("image") is there
            if there:
                steps["add"] += 1
                gone = run("delete", "image", when, steps["add"])
                place.whole_or_absent("image", DATA)
                place.collect()
                if place.plain.exists("image"):
                    place.plain.delete("gridfs://image")
                steps["delete"] += gone
            if not killed:
                break
        for number in range(1, 100):
            place.plain.add("other", DATA)
            killed = run("delete", "other", when, number)
            there = place.whole_or_absent("other", DATA)
            place.collect()
            if there:
                place.plain.delete("gridfs://other")
            elif not killed:
                break
            steps["delete"] += 1
    # A mark, the files document, the chunks, the mark.
    assert steps["delete"] >= 4
    assert steps["add"] >= 1


# A server that is killed


@pytest.fixture
def killable(place: Place) -> Iterator[Place]:
    if place.env["MONGODB_KIND"] == "given":
        pytest.skip("a server that was given is not killed")
    try:
        yield place
    finally:
        mongodb_testing.server("run")


PATIENT = Retry(attempts=30, first=0.1, longest=0.5, total=60)


def test_server_killed_in_an_add(killable: Place) -> None:
    """It comes back in time: the image is whole. Killed again and not back: an error, and collect removes the rest."""
    runner = threading.Thread(target=mongodb_testing.server, args=("run",))

    def source() -> Iterator[bytes]:
        yield DATA
        mongodb_testing.server("kill")
        runner.start()
        yield DATA

    killable.store(retry=PATIENT).add("image", source())
    runner.join(60)
    assert killable.read("image") == DATA * 2
    assert remains(killable.database)["chunks"] == []

    def dying() -> Iterator[bytes]:
        yield DATA
        mongodb_testing.server("kill")
        yield DATA

    with pytest.raises(Unavailable):
        killable.store(retry=QUICK, timeouts=Timeouts(connect=0.5, stall=1, abort=1)).add("other", dying())
    mongodb_testing.server("run")
    assert not killable.plain.exists("other")
    killable.collect()
    assert killable.read("image") == DATA * 2


def test_server_killed_in_a_read(killable: Place) -> None:
    location = killable.plain.add("image", LONG).location
    with killable.store(retry=PATIENT).get(location) as reader:
        got = reader.read(10)
        mongodb_testing.server("kill")
        runner = threading.Thread(target=mongodb_testing.server, args=("run",))
        runner.start()
        got += reader.read()
        runner.join(60)
    assert got == LONG


# Bad weather


def test_random_faults(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Connections are cut, reset and stalled at random bytes: whole images, or errors and nothing."""
    outcomes: Counter[str] = Counter()
    parts = urlsplit(place.url)
    assert parts.hostname
    place.plain.add("kept", DATA)
    with FaultProxy(parts.hostname, parts.port or 27017) as proxy:
        for turn in range(COUNT):
            rng = random.Random(f"{SEED}.{turn}")
            kind = rng.choice(("cut", "reset", "stall"))
            job = rng.choice(("add", "add", "get"))
            store = place.store(f"mongodb://{proxy.host}:{proxy.port}/?directConnection=true")
            heavy = "up" if job == "add" else "down"
            direction = rng.choice((heavy, heavy, "up", "down"))
            after = rng.randrange(len(DATA) if direction == heavy else 3000)
            fault = proxy.add(Fault(kind, direction, after))  # type: ignore[arg-type]  # one of its kinds
            try:
                if job == "add":
                    store.add(f"image-{turn}", DATA)
                else:
                    with store.get("gridfs://kept") as reader:
                        assert b"".join(reader) == DATA
                outcome = "done"
            except Unavailable as error:
                outcome = type(error).__name__
            finally:
                proxy.clear()
                store.close()
            if job == "add":
                there = place.whole_or_absent(f"image-{turn}", DATA)
                assert there or outcome != "done", f"seed {SEED}, turn {turn}: {outcome}, but there is no image"
            place.collect()
            outcomes[f"{job} {kind} {'struck' if fault.happened else 'missed'}: {outcome}"] += 1
    assert place.read("kept") == DATA
    with capsys.disabled():
        print(f"\nseed {SEED}")
        for outcome, number in sorted(outcomes.items()):
            print(f"{number:5} {outcome}")


def test_frozen_server(killable: Place) -> None:
    """It stops in the middle, and goes on after everybody has given up: nothing is left after collect."""
    names = {"mongod": ("mongod",), "documentdb": ("gateway",)}[killable.env["MONGODB_KIND"]]
    pids = [int(Path(killable.env["PLACE"], f"{name}.pid").read_text()) for name in names]
    store = killable.store(retry=Retry(attempts=2, first=0.01), timeouts=Timeouts(connect=0.5, stall=0.5, abort=1))

    def freezing() -> Iterator[bytes]:
        yield DATA
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield DATA

    try:
        with pytest.raises(Unavailable):
            store.add("image", freezing())
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    store.close()
    assert not killable.plain.exists("image")
    # What had been sent is carried out now; its mark is still there to find it.
    time.sleep(0.5)
    killable.collect()
