"""The Sheepdog driver when something breaks: cuts at every request, every result code, kill -9, rivals, restarts."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagestore import Store
from imagestore._models import Limits, Retry
from imagestore.driver import Block, Hints, Options, Timeouts
from imagestore.drivers.sheepdog import SheepdogDriver
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    InUse,
    NotFound,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unavailable,
)

SERVERS = Path(__file__).parents[1] / "servers"
sys.path.insert(0, str(SERVERS))

from sheepdog_server import CREATE, GET_VDI_INFO, NEW_VDI, READ, READ_VDIS, WRITE, Sheepdog  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error")

MIB = 1 << 20
TOKEN = "0123456789abcdef0123456789abcdef"
QUICK = Retry(attempts=4, first=0.001, longest=0.01, total=20)
ONCE = Retry(attempts=1)
CUTS = ("before", "after", "midway")
# Two objects, a hole, and an end that is no whole one.
DATA = os.urandom(2 * MIB) + bytes(MIB) + os.urandom(1234)


def driver_of(*servers: Sheepdog, **options: Any) -> SheepdogDriver:
    values = {option.dest: option.default for option in SheepdogDriver.options}
    timeouts = options.pop("timeouts", Timeouts(connect=5, stall=20))
    settings = {"host": servers[0].host, "port": servers[0].port, "nodes": [server.node for server in servers[1:]]}
    return SheepdogDriver(
        Options({**values, **settings, **options}), store="kit", limits=Limits(workers=4), timeouts=timeouts
    )


@pytest.fixture
def server() -> Iterator[Sheepdog]:
    with Sheepdog() as server:
        yield server
    assert not server.violations, server.violations[:5]


@pytest.fixture
def stores() -> Iterator[Callable[..., Store]]:
    with contextlib.ExitStack() as exits:

        def make(*servers: Sheepdog, retry: Retry = QUICK, **options: Any) -> Store:
            return exits.enter_context(Store(driver_of(*servers, **options), retry=retry, _block_size=MIB))

        yield make


def read(store: Store, name: str) -> bytes:
    with store.get(store.locate(name)) as reader:
        return reader.read()


def settled(server: Sheepdog, store: Store, name: str, data: bytes) -> bool:
    """All or nothing; what is left is listed, and removed; the id is free again. Says whether the image was there."""
    there = store.exists(name)
    if there:
        assert read(store, name) == data
        assert server.faults_of(name) == []
        assert list(store.uploads()) == []
        store.delete(store.locate(name))
    elif server.vdi(name) is not None:
        assert [leftover.image_id for leftover in store.uploads()] == [name]
        assert len(store.collect(older_than=0)) == 1
    assert server.names() == []
    assert server.orphans() == []
    assert server.objects == 0
    return there


# Cuts


@pytest.mark.parametrize("cut", CUTS)
def test_add_cut_at_every_request(server: Sheepdog, stores: Callable[..., Store], cut: str) -> None:
    """Without any retry: what stays is whole, or is found and removed."""
    looker = stores(server)
    seen = set()
    for number in range(1, 80):
        store = stores(server, retry=ONCE)
        server.on(cut, at=number)
        with contextlib.suppress(Unavailable):
            store.add("image", DATA, digests=())
        if server.pending:
            server.heal()
            assert settled(server, looker, "image", DATA)
            break
        server.heal()
        seen.add(settled(server, looker, "image", DATA))
        store.close()
    assert number > 15, "the cuts did not happen"
    assert seen == {True, False}


@pytest.mark.parametrize("cut", CUTS)
def test_add_survives_a_cut_at_every_request(server: Sheepdog, stores: Callable[..., Store], cut: str) -> None:
    looker = stores(server)
    for number in range(1, 80):
        store = stores(server)
        server.on(cut, at=number)
        assert store.add("image", DATA, digests=()).size == len(DATA)
        done = server.pending
        server.heal()
        assert settled(server, looker, "image", DATA)
        store.close()
        if done:
            break
    assert number > 15, "the cuts did not happen"


@pytest.mark.parametrize("cut", CUTS)
def test_get_survives_a_cut_at_every_request(server: Sheepdog, stores: Callable[..., Store], cut: str) -> None:
    stores(server).add("image", DATA)
    for number in range(1, 80):
        store = stores(server)
        server.on(cut, at=number)
        assert read(store, "image") == DATA
        store.close()
        if server.pending:
            break
    assert number > 10, "the cuts did not happen"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("retry", [QUICK, ONCE])
def test_delete_cut_at_every_request(server: Sheepdog, stores: Callable[..., Store], cut: str, retry: Retry) -> None:
    """With retries it is gone, and the id free; without it is whole or gone, and what is left is found."""
    looker = stores(server)
    for number in range(1, 80):
        location = looker.add("image", DATA, digests=()).location
        store = stores(server, retry=retry)
        server.on(cut, at=number)
        with contextlib.nullcontext() if retry is QUICK else contextlib.suppress(Unavailable):
            store.delete(location)
            assert server.names() == []
        done = server.pending
        server.heal()
        settled(server, looker, "image", DATA)
        store.close()
        if done:
            break
    assert number > 8, "the cuts did not happen"


@pytest.fixture
def recycling() -> Iterator[Sheepdog]:
    """A cluster that gives ids of deleted VDIs to new ones."""
    with Sheepdog(recycle=True) as server:
        yield server
    assert not server.violations, server.violations[:5]


def test_a_collect_that_was_cut_goes_on(recycling: Sheepdog, stores: Callable[..., Store]) -> None:
    server, store = recycling, stores(recycling)
    for number in range(1, 60):
        driver = driver_of(server)
        driver.open()
        upload = driver.create("image", Hints(token=TOKEN, size=2 * MIB))
        upload.write(Block(index=0, offset=0, data=DATA[: 2 * MIB]))
        driver.close()
        server.on("before", at=number)
        with contextlib.suppress(StoreError):
            stores(server, retry=ONCE).collect(older_than=0)
        done = server.pending
        server.heal()
        assert not store.exists("image")
        assert len(list(store.uploads())) == len(server.names())
        store.collect(older_than=0)
        assert server.names() == []
        assert server.orphans() == []
        if done:
            break
    assert 8 < number < 59, "the cuts did not happen"


# What a server may answer

CODES = {
    0x02: Unavailable, 0x03: Unavailable, 0x05: StoreError, 0x06: Unavailable, 0x07: InUse, 0x09: StoreError,
    0x0A: Unavailable, 0x0B: Unavailable, 0x0C: Unavailable, 0x0D: Unavailable, 0x0F: Unavailable, 0x11: Unavailable,
    0x12: Unavailable, 0x13: StoreFull, 0x14: ConfigurationError, 0x15: StoreFull, 0x16: Unavailable,
    0x17: Unavailable, 0x18: Unavailable, 0x19: Unavailable, 0x1A: InUse, 0x7F: StoreError, 0x81: Unavailable,
    0xFFFFFFFF: Unavailable,
}  # fmt: skip


@pytest.mark.parametrize("code", CODES, ids=hex)
def test_every_code_at_every_request(server: Sheepdog, stores: Callable[..., Store], code: int) -> None:
    """None of them makes an image look as if it were not there, and after each all is as before."""
    looker = stores(server)
    there = looker.add("there", DATA).location
    before = server.state_of("there")
    store = stores(server, retry=ONCE)
    store.exists("x")
    asks: list[tuple[tuple[int, ...], Callable[[], object]]] = [
        ((GET_VDI_INFO, READ), lambda: store.stat(there)),
        ((GET_VDI_INFO,), lambda: store.exists("there")),
        ((GET_VDI_INFO, READ), lambda: read(store, "there")),
        ((GET_VDI_INFO, NEW_VDI, READ, WRITE, CREATE), lambda: store.add("new", DATA)),
        ((READ_VDIS, READ), lambda: [list(store.list()), list(store.uploads())]),
        ((GET_VDI_INFO,), lambda: store.delete(there)),
    ]
    for opcodes, ask in asks:
        for opcode in opcodes:
            server.on("code", opcode, code=code, times=None)
            if opcode == READ and opcodes[0] == READ_VDIS and code == 0x02:
                # An id that was used, and whose inode is gone.
                ask()
            else:
                with pytest.raises(CODES[code]) as caught:
                    ask()
                assert not isinstance(caught.value, NotFound)
                assert type(caught.value) is CODES[code]
                assert caught.value.temporary is (CODES[code] is Unavailable)
            server.heal()
            looker.collect(older_than=0)
            assert server.state_of("there") == before
            assert server.names() == ["there"]
    assert server.orphans() == []


def test_full(stores: Callable[..., Store]) -> None:
    with Sheepdog(capacity=3 * MIB) as server:
        store = stores(server)
        with pytest.raises(StoreFull):
            store.add("image", os.urandom(5 * MIB))
        assert server.names() == []
        assert server.objects == 0
        store.add("image", os.urandom(3 * MIB))


@pytest.mark.parametrize("nonsense", ["number", "long", "short"])
@pytest.mark.parametrize("opcode", [GET_VDI_INFO, READ, CREATE])
def test_nonsense(server: Sheepdog, stores: Callable[..., Store], nonsense: str, opcode: int) -> None:
    """An answer to nobody, or of another length, breaks the connection, not the image."""
    store = stores(server)
    if opcode == CREATE and nonsense == "short":
        server.on("number", opcode)
    server.on(nonsense, opcode, at=2)
    store.add("image", DATA)
    server.on(nonsense, opcode, at=2)
    assert read(store, "image") == DATA
    for at in (1, 2):
        server.heal()
        server.on(nonsense, READ, at=at, times=None)
        with pytest.raises(Unavailable):
            store.stat(store.locate("image"))


def test_a_node_that_stalls(server: Sheepdog, stores: Callable[..., Store]) -> None:
    store = stores(server, retry=ONCE, timeouts=Timeouts(connect=5, stall=0.3))
    location = store.add("image", DATA).location
    for opcode in (GET_VDI_INFO, READ):
        server.on("stall", opcode)
        began = time.monotonic()
        with pytest.raises(StoreTimeout) as caught:
            store.stat(location)
        assert caught.value.temporary
        assert time.monotonic() - began < 5
    assert store.get_size(location) == len(DATA)


# Nodes


def test_the_next_node_is_asked(stores: Callable[..., Store]) -> None:
    with Sheepdog() as one, Sheepdog(peer=one) as other:
        store = stores(one, other, retry=ONCE)
        location = store.add("image", DATA).location
        one.stop()
        # The connection is gone, which only the next request finds out.
        with contextlib.suppress(Unavailable):
            store.stat(location)
        assert read(store, "image") == DATA
        assert store.stat(location).size == len(DATA)
        assert stores(one, other, retry=ONCE).stat(location).size == len(DATA)
        one.start()
        other.stop()
        with contextlib.suppress(Unavailable):
            store.stat(location)
        store.delete(location)
        assert one.orphans() == []
    with pytest.raises(Unavailable, match="can't connect"):
        stores(one, other, retry=ONCE).exists("image")


def test_a_node_that_shuts_down_is_left(stores: Callable[..., Store]) -> None:
    with Sheepdog() as one, Sheepdog(peer=one) as other:
        store = stores(one, other)
        location = store.add("image", DATA).location
        one.state = 0x11
        assert store.get_size(location) == len(DATA)
        assert other.log


def test_the_node_dies_in_the_middle(stores: Callable[..., Store]) -> None:
    """Of an add and of a get: both go on with the other one."""
    with Sheepdog() as one, Sheepdog(peer=one) as other:
        store = stores(one, other)

        def dying(server: Sheepdog) -> Iterator[bytes]:
            for number, start in enumerate(range(0, len(DATA), MIB)):
                if number == 2:
                    server.stop()
                yield DATA[start : start + MIB]

        store.add("image", dying(one), size=len(DATA))
        assert one.faults_of("image") == []
        one.start()
        with store.get(store.locate("image")) as reader:
            got = reader.read(MIB)
            other.stop()
            got += reader.read()
        assert got == DATA


def test_the_only_node_restarts(server: Sheepdog, stores: Callable[..., Store]) -> None:
    store = stores(server)

    def restarting() -> Iterator[bytes]:
        for number, start in enumerate(range(0, len(DATA), MIB)):
            if number == 2:
                server.stop()
                server.start()
            yield DATA[start : start + MIB]

    location = store.add("image", restarting(), size=len(DATA)).location
    server.stop()
    server.start()
    assert read(store, "image") == DATA
    store.delete(location)
    assert server.orphans() == []


# Rivals


def test_two_adders_of_one_id(server: Sheepdog, stores: Callable[..., Store]) -> None:
    images = [os.urandom(2 * MIB + number) for number in range(6)]
    for _ in range(3):
        gate = threading.Barrier(len(images))
        won: list[bytes] = []
        refused: list[bytes] = []

        def add(
            data: bytes,
            gate: threading.Barrier = gate,
            won: list[bytes] = won,
            refused: list[bytes] = refused,
        ) -> None:
            store = stores(server)
            store.exists("image")
            gate.wait(20)
            try:
                store.add("image", data)
                won.append(data)
            except AlreadyExists:
                refused.append(data)

        threads = [threading.Thread(target=add, args=(data,)) for data in images]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(won) == 1
        assert len(refused) == len(images) - 1
        assert settled(server, stores(server), "image", won[0])


class Turns:
    """Lets two threads send their requests in an order that is given."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._turn: str | None = None
        self._ended: set[str] = set()

    def of(self, who: str, driver: SheepdogDriver) -> None:
        ask = driver._ask

        def in_turn(*requests: Any, accept: tuple[int, ...] = ()) -> Any:
            with self._change:
                assert self._change.wait_for(lambda: self._turn in (who, "both"), 20)
            try:
                return ask(*requests, accept=accept)
            finally:
                with self._change:
                    if self._turn == who:
                        self._turn = None
                    self._change.notify_all()

        driver._ask = in_turn  # type: ignore[method-assign]  # the only place where requests are sent

    def run(self, who: str, function: Callable[[], object]) -> threading.Thread:
        def work() -> None:
            try:
                function()
            finally:
                with self._change:
                    self._ended.add(who)
                    self._change.notify_all()

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def play(self, order: str) -> None:
        for who in order:
            with self._change:
                self._turn = who
                self._change.notify_all()
                assert self._change.wait_for(lambda who=who: self._turn is None or who in self._ended, 20)
        with self._change:
            self._turn = "both"
            self._change.notify_all()


def test_commit_against_discard_in_every_order(recycling: Sheepdog) -> None:
    """Whichever request comes before which: a commit that succeeded is an image, and one that failed is none."""
    server = recycling
    committer, discarder, looker = (driver_of(server) for _ in range(3))
    for driver in (committer, discarder, looker):
        driver.open()
    outcomes = set()
    # The commit sends four requests until it is decided, the discard six until it removes something.
    for places in itertools.combinations(range(10), 4):
        order = "".join("c" if place in places else "d" for place in range(10))
        name = f"image-{order}"
        turns = Turns()
        upload = committer.create(name, Hints(token=TOKEN, size=MIB))
        upload.write(Block(index=0, offset=0, data=DATA[:MIB]))
        (leftover,) = looker.uploads()
        plain = committer._ask, discarder._ask
        turns.of("c", committer)
        turns.of("d", discarder)
        failed: list[NotFound] = []

        def commit(upload: Any = upload, failed: list[NotFound] = failed) -> None:
            try:
                upload.commit(MIB)
            except NotFound as error:
                failed.append(error)

        threads = [turns.run("c", commit), turns.run("d", lambda leftover=leftover: discarder.discard(leftover))]  # type: ignore[misc]  # bound early
        turns.play(order)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        committer._ask, discarder._ask = plain  # type: ignore[method-assign]  # as it was
        location = looker.locate(name)
        if failed:
            upload.abort()
            assert looker.locate(name) is None, order
            assert server.vdi(name) is None, order
        else:
            assert location is not None, order
            assert b"".join(looker.read(location, 0, MIB).chunks) == DATA[:MIB], order
            assert server.faults_of(name) == [], order
            looker.delete(location)
        outcomes.add(not failed)
        assert server.orphans() == [], order
        assert server.names() == [], order
    assert outcomes == {True, False}
    for driver in (committer, discarder, looker):
        driver.close()


def test_a_discarded_upload_writes_no_more(server: Sheepdog) -> None:
    """Its id may be another VDI's by now."""
    driver = driver_of(server)
    driver.open()
    upload = driver.create("image", Hints(token=TOKEN, size=4 * MIB))
    upload.write(Block(index=0, offset=0, data=DATA[:MIB]))
    (leftover,) = driver.uploads()
    driver.discard(leftover)
    for block in (Block(index=0, offset=0, data=DATA[:MIB]), Block(index=1, offset=MIB, data=DATA[:MIB])):
        with pytest.raises(NotFound):
            upload.write(block)
    with pytest.raises(NotFound):
        upload.commit(4 * MIB)
    upload.abort()
    assert server.objects == 0
    assert not server.strays
    driver.close()


def test_ids_that_are_used_again(recycling: Sheepdog) -> None:
    """An upload whose VDI's id another image got neither harms that image nor is taken for it."""
    server = recycling
    driver = driver_of(server)
    driver.open()
    upload = driver.create("image", Hints(token=TOKEN, size=4 * MIB))
    server.remove("image", snapshots=False)
    rival = driver.create("image", Hints(token=TOKEN[::-1], size=2 * MIB))
    rival.write(Block(index=0, offset=0, data=DATA[: 2 * MIB]))
    with pytest.raises(NotFound):
        upload.write(Block(index=0, offset=0, data=bytes(MIB)))
    upload.abort()
    rival.commit(2 * MIB)
    with pytest.raises(NotFound):
        upload.commit(4 * MIB)
    upload.abort()
    location = driver.locate("image")
    assert location is not None
    assert b"".join(driver.read(location, 0, None).chunks) == DATA[: 2 * MIB]
    driver.close()
    assert not server.strays


def test_a_read_is_not_continued_in_another_image(recycling: Sheepdog, stores: Callable[..., Store]) -> None:
    store = stores(recycling)
    location = store.add("image", os.urandom(9 * MIB)).location
    with store.get(location) as reader:
        reader.read(MIB)
        recycling.remove("image", snapshots=False)
        recycling.plant("image", os.urandom(9 * MIB))
        with pytest.raises((Changed, NotFound)):
            reader.read()


def test_a_snapshot_of_an_unfinished_upload(server: Sheepdog, stores: Callable[..., Store]) -> None:
    """It makes the add fail; the snapshot is the operator's, and stays."""
    store = stores(server)

    def source() -> Iterator[bytes]:
        yield DATA[: 2 * MIB + 1]
        for _ in range(200):
            if server.objects == 2:
                break
            time.sleep(0.01)
        server.snapshot("image", b"nightly")
        yield DATA[2 * MIB + 1 :]

    with pytest.raises((InUse, NotFound)):
        store.add("image", source(), size=len(DATA))
    assert not store.exists("image")
    store.collect(older_than=0)
    assert server.names() == ["image"]
    server.remove("image", snapshots=True)
    assert server.objects == 0


@pytest.mark.parametrize("marked", [False, True])
def test_a_create_whose_answer_was_lost(server: Sheepdog, marked: bool) -> None:
    """It may be repeated: what the first attempt left is its own, and a rival's is not."""
    driver = driver_of(server)
    driver.open()
    if marked:
        driver.create("image", Hints(token=TOKEN))
    else:
        server.on("before", WRITE)
        with pytest.raises(Exception, match="the connection"):
            driver.create("image", Hints(token=TOKEN))
    for _ in range(2):
        assert driver.locate("image") is None
        assert len(list(driver.uploads())) == 1
        with pytest.raises(AlreadyExists, match="unfinished upload"):
            driver.create("image", Hints(token=TOKEN[::-1]))
    upload = driver.create("image", Hints(token=TOKEN))
    upload.write(Block(index=0, offset=0, data=DATA[:MIB]))
    upload.commit(MIB)
    assert server.names() == ["image"]
    driver.close()


# A process that is killed

CHILD = """
import os, signal, sys
from imagestore import Store
from imagestore._models import Retry
from imagestore.driver import Options
from imagestore.drivers._sheepdog_client import Link
from imagestore.drivers.sheepdog import SheepdogDriver

port, job, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
data = bytes(range(1, 256)) * (size // 255 + 1)
values = {option.dest: option.default for option in SheepdogDriver.options} | {"port": port}
send = Link.send
for line in sys.stdin:
    number = int(line)
    if os.fork() == 0:
        sent = 0
        def counting(link, request):
            global sent
            sent += 1
            if sent == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return send(link, request)
        store = Store(SheepdogDriver(Options(values)), retry=Retry(attempts=1), _block_size=1 << 20)
        Link.send = counting
        if job == "add":
            store.add("image", data[:size])
        else:
            store.delete(store.locate("image"))
        os._exit(0)
    print("killed" if os.wait()[1] else "ended", flush=True)
"""


@pytest.mark.parametrize("job", ["add", "delete"])
def test_killed_at_every_request(server: Sheepdog, stores: Callable[..., Store], job: str) -> None:
    """``kill -9`` before each request of an add, those of its commit included, and of a delete."""
    size = MIB + 1000
    data = (bytes(range(1, 256)) * (size // 255 + 1))[:size]
    store = stores(server)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(server.port), job, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        seen = []
        try:
            for number in range(1, 80):
                if job == "delete":
                    store.add("image", data)
                print(number, file=child.stdin, flush=True)
                said = child.stdout.readline().strip()
                assert said in ("killed", "ended")
                seen.append(settled(server, store, "image", data))
                if said == "ended":
                    break
        finally:
            child.stdin.close()
            child.wait(20)
    assert number > 10, "the kills did not happen"
    first, last = (False, True) if job == "add" else (True, False)
    assert seen == [first] * seen.index(last) + [last] * seen.count(last), seen


def test_a_slow_network_is_not_cut(server: Sheepdog) -> None:
    """A request that takes longer to send than ``stall`` is no stall, as long as bytes leave."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        port = listener.getsockname()[1]

        def slow() -> None:
            near, _ = listener.accept()
            with near, socket.create_connection((server.host, server.port)) as far:
                far.setblocking(False)
                near.settimeout(0.01)
                while True:
                    with contextlib.suppress(TimeoutError):
                        data = near.recv(16 << 10)
                        if not data:
                            return
                        far.setblocking(True)
                        far.sendall(data)
                        far.setblocking(False)
                        if len(data) > 1000:
                            time.sleep(0.004)
                    with contextlib.suppress(BlockingIOError):
                        near.sendall(far.recv(1 << 20))

        thread = threading.Thread(target=slow)
        thread.start()
        driver = driver_of(server, port=port, timeouts=Timeouts(connect=5, stall=0.25))
        driver.open()
        upload = driver.create("image", Hints(token=TOKEN, size=2 * MIB))
        began = time.monotonic()
        upload.write(Block(index=0, offset=0, data=DATA[: 2 * MIB]))
        assert time.monotonic() - began > 0.4, "the network was not slow"
        upload.commit(2 * MIB)
        driver.close()
        thread.join(20)
        assert not thread.is_alive()
