"""Bad weather in a real Ceph cluster: daemons that freeze and die, full pools, images that vanish, dying clients."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagestore import Retry, Store
from imagestore.driver import Block, Hints, Location, Timeouts
from imagestore.drivers._rbd_cluster import encoded, mark_of
from imagestore.errors import (
    AlreadyExists,
    Changed,
    NotFound,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unavailable,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _rbd import Admin, driver, running

SERVERS = Path(__file__).parents[1] / "servers"
MIB = 1024 * 1024
BLOCK = MIB
ONCE = Retry(attempts=1)
PATIENT = Retry(attempts=8, first=0.1, longest=1, total=60)
SHORT = Timeouts(connect=2, stall=2, abort=2)
LONG = Timeouts(connect=10, stall=30, abort=30)


class Weather:
    """A cluster with data that survive the death of its OSD, and a pool in it."""

    def __init__(self) -> None:
        self.env = running("--store", "bluestore")
        self.admin = Admin(self.env)
        self.pool = self.admin.make_pool()
        # Made by a first removal, and then kept.
        self.admin.image(self.pool, "first")
        self.admin.remove(self.pool, "first")
        self.plain = self.store()
        self.plain.exists("image")

    def store(self, retry: Retry = PATIENT, timeouts: Timeouts = LONG, **values: Any) -> Store:
        told = driver(self.env, user="admin", pool=self.pool, timeouts=timeouts, **values)
        return Store(told, name="faults", retry=retry, timeouts=timeouts, _block_size=BLOCK)

    @contextlib.contextmanager
    def frozen(self, daemon: str) -> Iterator[None]:
        self.admin.daemon("freeze", daemon)
        try:
            yield
        finally:
            self.admin.daemon("thaw", daemon)

    def read(self, location: Location, store: Store | None = None) -> bytes:
        with (store or self.plain).get(location) as reader:
            return b"".join(reader)

    def image(self, size: int = 24 * MIB) -> tuple[Location, bytes]:
        data = os.urandom(size)
        return self.plain.add(new_id(), data).location, data

    def collected(self, seconds: float = 40) -> None:
        """Wait until nothing is left: watches of dead clients have to end, and late requests to arrive."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(StoreError):
                self.plain.collect(older_than=0)
            if not list(self.plain.uploads()):
                return
            assert time.monotonic() < end, f"left behind: {list(self.plain.uploads())}"
            time.sleep(0.2)

    def assert_clean(self) -> None:
        with self.admin.pool(self.pool) as ioctx:
            assert not self.admin.rbd.list(ioctx)
            assert not list(self.admin.rbd.trash_list(ioctx))
        assert not self.admin.objects(self.pool), "objects stayed"

    def close(self) -> None:
        self.plain.close()
        self.admin.delete_pool(self.pool)
        self.admin.close()


@pytest.fixture(scope="module")
def ceph() -> Iterator[Weather]:
    made = Weather()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def swept(ceph: Weather) -> Iterator[None]:
    """Every test leaves the pool as it was: no image, and no object of one."""
    yield
    for image in ceph.plain.list():
        ceph.plain.delete(image.location)
    ceph.collected()
    ceph.assert_clean()


def new_id() -> str:
    return f"image-{uuid.uuid4().hex[:12]}"


def chunks(data: bytes, at: dict[int, Callable[[], object]] | None = None, length: int = BLOCK) -> Iterator[bytes]:
    """``data`` in pieces; before the piece of a number something happens."""
    for number, start in enumerate(range(0, len(data), length)):
        if at and number in at:
            at[number]()
        yield data[start : start + length]


def later(seconds: float, function: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, function)
    timer.start()
    return timer


# Daemons


@pytest.mark.parametrize("size", [24 * MIB, None])
def test_osd_freezes_for_a_while_in_an_add(ceph: Weather, size: int | None) -> None:
    data = os.urandom(24 * MIB)
    timers: list[threading.Timer] = []

    def freeze() -> None:
        ceph.admin.daemon("freeze", "osd")
        timers.append(later(1, lambda: ceph.admin.daemon("thaw", "osd")))

    result = ceph.plain.add(new_id(), chunks(data, {5: freeze}), size=size)
    timers[0].join()
    assert ceph.read(result.location) == data


def test_osd_freezes_in_an_add(ceph: Weather) -> None:
    data, image_id = os.urandom(24 * MIB), new_id()
    with ceph.store(Retry(attempts=2, first=0.1), SHORT) as store:
        store.exists(image_id)
        began = time.monotonic()
        with ceph.frozen("osd"), pytest.raises(StoreTimeout) as caught:
            store.add(image_id, chunks(data), size=len(data))
        assert caught.value.temporary
        assert time.monotonic() - began < 40
    assert not ceph.plain.exists(image_id)
    ceph.collected()
    assert ceph.read(ceph.plain.add(image_id, data).location) == data


def test_osd_freezes_in_the_middle_of_an_add(ceph: Weather) -> None:
    data, image_id = os.urandom(24 * MIB), new_id()
    frozen = contextlib.ExitStack()
    with ceph.store(Retry(attempts=2, first=0.1), SHORT) as store:
        store.exists(image_id)
        source = chunks(data, {8: lambda: frozen.enter_context(ceph.frozen("osd"))})
        with frozen, pytest.raises(StoreTimeout):
            store.add(image_id, source, size=len(data))
    assert not ceph.plain.exists(image_id)
    ceph.collected()
    assert ceph.read(ceph.plain.add(image_id, data).location) == data


def test_osd_freezes_in_a_get(ceph: Weather) -> None:
    location, data = ceph.image()
    with ceph.store(ONCE, SHORT) as store:
        with store.get(location) as reader:
            assert reader.read(MIB) == data[:MIB]
            began = time.monotonic()
            with ceph.frozen("osd"), pytest.raises(StoreTimeout):
                reader.read()
            assert time.monotonic() - began < 20
        assert ceph.read(location, store) == data


def test_osd_freezes_for_a_while_in_a_get(ceph: Weather) -> None:
    """Longer than one request waits, and not so long as a patient reader does."""
    location, data = ceph.image()
    with ceph.store(PATIENT, SHORT) as store, store.get(location) as reader:
        got = reader.read(MIB)
        ceph.admin.daemon("freeze", "osd")
        timer = later(3, lambda: ceph.admin.daemon("thaw", "osd"))
        got += reader.read()
        timer.join()
        assert got == data


def test_osd_dies_in_an_add(ceph: Weather) -> None:
    data = os.urandom(24 * MIB)
    revived: list[threading.Timer] = []

    def kill() -> None:
        ceph.admin.daemon("kill", "osd")
        revived.append(later(0, lambda: ceph.admin.daemon("run", "osd")))

    result = ceph.plain.add(new_id(), chunks(data, {9: kill}), size=len(data))
    revived[0].join()
    assert ceph.read(result.location) == data


def test_osd_dies_in_a_get(ceph: Weather) -> None:
    location, data = ceph.image()
    with ceph.plain.get(location) as reader:
        got = reader.read(MIB)
        ceph.admin.daemon("kill", "osd")
        timer = later(0, lambda: ceph.admin.daemon("run", "osd"))
        got += reader.read()
        timer.join()
    assert got == data


def test_no_monitor(ceph: Weather) -> None:
    """Who has a connection goes on reading and adds nothing; who has none is told so in time."""
    location, data = ceph.image(4 * MIB)
    with ceph.frozen("mon"):
        assert ceph.read(location) == data
        with ceph.store(ONCE, SHORT, connect_timeout=1) as store:
            began = time.monotonic()
            with pytest.raises(Unavailable, match="no monitor answered within 1 s") as caught:
                store.exists("image")
            assert caught.value.temporary
            assert time.monotonic() - began < 8
    assert ceph.read(location) == data


def test_a_client_on_the_blocklist_connects_anew(ceph: Weather) -> None:
    location, data = ceph.image(4 * MIB)
    with ceph.store(ONCE) as store:
        assert store.stat(location).size == len(data)
        cluster = store._template._cluster  # type: ignore[attr-defined]  # its address is nowhere else
        ((address, *_),) = [cluster.rados.get_addrs().strip("[]").partition(",")[:1]]
        entry = address.removeprefix("v2:").removeprefix("v1:")
        # The plain store shares this connection, and has to find out for itself.
        ceph.admin.command("osd blocklist", blocklistop="add", addr=entry)
        try:
            deadline = time.monotonic() + 60
            # The OSD hears of it some time after the monitor has answered, and the client when it asks the OSD.
            while store._template._cluster is cluster:  # type: ignore[attr-defined]
                assert time.monotonic() < deadline, "it never connected anew"
                with contextlib.suppress(Unavailable):
                    assert ceph.read(location, store) == data
                time.sleep(0.05)
            for one in (store, ceph.plain):
                assert ceph.read(location, one) == data
                assert ceph.read(one.add(new_id(), data).location, one) == data
        finally:
            ceph.admin.command("osd blocklist", blocklistop="rm", addr=entry)


# Room


def test_quota(ceph: Weather) -> None:
    """A pool that is full is an error at once, images can be deleted from it, and then there is room."""
    image_id = new_id()
    location, data = ceph.image(8 * MIB)
    ceph.admin.command("osd pool set-quota", pool=ceph.pool, field="max_bytes", val=str(4 * MIB))
    try:
        deadline = time.monotonic() + 60
        while True:
            # A quota is noticed late: after the manager has counted.
            with ceph.store(ONCE) as store:
                if _full(store, image_id):
                    break
            assert time.monotonic() < deadline, "the quota has no effect"
            time.sleep(0.2)
        assert not ceph.plain.exists(image_id)
        assert not list(ceph.plain.uploads())
        assert ceph.read(location) == data
        began = time.monotonic()
        ceph.plain.delete(location)
        assert time.monotonic() - began < 20
        with pytest.raises(NotFound):
            ceph.plain.stat(location)
        ceph.assert_clean()
    finally:
        ceph.admin.command("osd pool set-quota", pool=ceph.pool, field="max_bytes", val="0")
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(StoreFull):
            assert ceph.read(ceph.plain.add(image_id, data).location) == data
            break
        assert time.monotonic() < deadline, "the quota has not ended"
        time.sleep(0.2)


def _full(store: Store, image_id: str) -> bool:
    try:
        location = store.add(image_id, os.urandom(4 * MIB)).location
    except StoreFull:
        return True
    store.delete(location)
    return False


# Images that vanish


def rest_of(reader: Any) -> bytes:
    """What can be read until the image is found to be gone."""
    got = b""
    with contextlib.suppress(NotFound, Changed):
        while piece := reader.read(MIB):
            got += piece
        raise AssertionError("the end was reached")
    return got


@pytest.mark.parametrize("who", ["we", "others"])
@pytest.mark.parametrize("again", [False, True])
def test_deleted_while_it_is_read(ceph: Weather, who: str, again: bool) -> None:
    """Never zeros, which is what librbd reads where there is nothing any more."""
    location, data = ceph.image(40 * MIB)
    with ceph.store() as store, store.get(location) as reader:
        got = reader.read(MIB + 5)
        if who == "we":
            ceph.plain.delete(location)
        else:
            ceph.admin.remove(ceph.pool, location.key[3])
        if again:
            ceph.plain.add(location.key[3], os.urandom(40 * MIB))
        got += rest_of(reader)
        assert len(got) < len(data)
        assert data.startswith(got)


def test_deleted_while_its_head_is_read(ceph: Weather) -> None:
    data = os.urandom(40 * MIB)
    ceph.admin.image(ceph.pool, "bare", data)
    with ceph.store() as store, store.get("rbd://bare") as reader:
        got = reader.read(MIB)
        ceph.admin.remove(ceph.pool, "bare")
        got += rest_of(reader)
        assert len(got) < len(data)
        assert data.startswith(got)


def test_deleted_in_a_download(ceph: Weather, tmp_path: Path) -> None:
    location, _ = ceph.image(48 * MIB)
    with ceph.store() as store:
        deleting: list[threading.Thread] = []

        def progress(done: int, total: int | None) -> None:
            if not deleting:
                deleting.append(threading.Thread(target=ceph.plain.delete, args=(location,)))
                deleting[0].start()
                deleting[0].join(0.2)

        try:
            store.download(location, tmp_path / "image", progress=progress)
        except (NotFound, Changed):
            assert not list(tmp_path.iterdir())
        else:
            # It was fast enough; then it is whole.
            assert (tmp_path / "image").stat().st_size == 48 * MIB
        deleting[0].join()


# Two who want the same


def test_adders_with_connections_of_their_own(ceph: Weather) -> None:
    images = [os.urandom(MIB) for _ in range(3)]
    stores = [ceph.store(operation_timeout=30 + number) for number in range(3)]
    for store in stores:
        store.exists("image")
    for _ in range(8):
        image_id = new_id()
        gate = threading.Barrier(3)
        won: list[int] = []

        def add(number: int, image_id: str = image_id, gate: threading.Barrier = gate, won: list[int] = won) -> None:
            def source() -> Iterator[bytes]:
                yield images[number]
                gate.wait(20)

            with contextlib.suppress(AlreadyExists):
                stores[number].add(image_id, source(), size=MIB)
                won.append(number)

        racers = [threading.Thread(target=add, args=(number,)) for number in range(3)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(60)
        assert len(won) == 1, f"{len(won)} adders of one id won"
        assert ceph.read(ceph.plain.locate(image_id)) == images[won[0]]
        assert not list(ceph.plain.uploads())
    for store in stores:
        store.close()


def test_commit_against_discard(ceph: Weather) -> None:
    """One of the two wins wholly."""
    one = driver(ceph.env, user="admin", pool=ceph.pool, operation_timeout=31)
    other = driver(ceph.env, user="admin", pool=ceph.pool, operation_timeout=32)
    one.open()
    other.open()
    data = os.urandom(MIB)
    outcomes: list[bool] = []
    rng = random.Random(3)
    for _ in range(12):
        image_id = new_id()
        upload = one.create(image_id, Hints(token=uuid.uuid4().hex, size=MIB))
        upload.write(Block(index=0, offset=0, data=data, last=True))
        (leftover,) = other.uploads()
        assert leftover.alive
        delay = rng.random() * 0.15
        discarding = threading.Timer(delay, other.discard, (leftover,))
        discarding.start()
        try:
            upload.commit(MIB)
            outcomes.append(True)
        except NotFound:
            outcomes.append(False)
        discarding.join()
        found = other.locate(image_id)
        assert (found is not None) == outcomes[-1]
        if found is not None:
            assert ceph.read(found) == data
            upload.abort()
            assert ceph.read(found) == data, "an abort after the commit did harm"
            other.delete(found)
        else:
            upload.abort()
        assert not list(other.uploads())
    one.close()
    other.close()
    assert len(outcomes) == 12


# Clients that die

CHILD = """
import os, signal, sys
sys.path[:0] = [sys.argv[1]]
import rados, rbd as bindings
from _rbd import driver
from imagestore import Store
from imagestore.drivers import _rbd_cluster as cluster
from imagestore.driver import Timeouts

conf, pool, verb, *ids = sys.argv[2:]
data = b"bootable" * 100_000
count = step = 0

def arrive():
    # Before each step that changes something.
    global count
    if count == step:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1

def counted(function):
    def call(*arguments, **named):
        arrive()
        return function(*arguments, **named)
    return call

CHANGING = {
    "create_snap", "flush", "metadata_set", "protect_snap", "remove_snap", "resize", "unprotect_snap", "write",
}

class Image:
    # librbd's, with steps that count.
    def __init__(self, image):
        self.image = image
    def __getattr__(self, name):
        found = getattr(self.image, name)
        return counted(found) if name in CHANGING else found

opened, closed = cluster.Pool.open, cluster.Cluster.close

def wrapped(self, internal, snapshot=None, *, read_only=False):
    image = opened(self, internal, snapshot, read_only=read_only)
    return image if read_only else Image(image)

def rename(self, internal, old, new, *, strict=False):
    names = cluster.encoded(old) + cluster.encoded(new) + cluster.encoded(internal)
    arrive()
    self.ioctx.write_full(f"rbd_id.{new}", cluster.encoded(internal))
    arrive()
    self.ioctx.execute("rbd_directory", "rbd", "dir_rename_image", names)
    arrive()
    self.ioctx.remove_object(f"rbd_id.{old}")
    arrive()
    return True

def work(image_id):
    store = Store(
        driver({"CEPH_CONF": conf, "CEPH_USER": "admin", "CEPH_POOL": pool}, timeouts=Timeouts(connect=10, stall=30))
    )
    if verb == "delete":
        location = store.add(image_id, data).location
    cluster.Pool.open = wrapped
    cluster.Cluster.close = lambda self, image: closed(self, getattr(image, "image", image))
    cluster.Pool.rename = rename
    cluster.Pool.remove = counted(cluster.Pool.remove)
    if verb == "add":
        store.add(image_id, iter([data]))
    else:
        store.delete(location)

for step, image_id in enumerate(ids):
    pid = os.fork()
    if not pid:
        try:
            work(image_id)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(image_id, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.mark.parametrize(("verb", "steps"), [("add", 10), ("delete", 7)])
def test_killed_at_each_step(ceph: Weather, verb: str, steps: int) -> None:
    """Whole or absent; what is left is listed and collected, objects included; and then the id is free."""
    data = b"bootable" * 100_000
    # They die one after the other, and the cluster forgets them all at the same time.
    done = subprocess.run(
        [sys.executable, "-c", CHILD, SERVERS, ceph.env["CEPH_CONF"], ceph.pool, verb, *(new_id() for _ in range(20))],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    ids = [image_id for image_id, _ in told]
    assert [code for _, code in told] == [str(int(signal.SIGKILL))] * (len(ids) - 1) + ["0"], done.stderr
    assert len(ids) - 1 >= steps
    there = [image_id for image_id in ids if ceph.plain.exists(image_id)]
    assert (ids[-1] in there) is (verb == "add")
    assert 1 <= len(there) < len(ids) - 1
    for image_id in there:
        assert ceph.read(ceph.plain.locate(image_id)) == data
    listed = {leftover.image_id for leftover in ceph.plain.uploads()}
    assert not listed & set(there), "an image is listed as a leftover"
    ceph.collected()
    assert [image_id for image_id in ids if ceph.plain.exists(image_id)] == there, "collect() changed an image"
    for image_id in ids:
        if image_id not in there:
            ceph.plain.add(image_id, data)
        ceph.plain.delete(ceph.plain.locate(image_id))
    ceph.assert_clean()


def test_the_steps_of_a_rename_are_those_of_librbd(ceph: Weather) -> None:
    """What the children above imitate: else they would prove nothing."""
    ceph.admin.image(ceph.pool, "old")
    with ceph.admin.pool(ceph.pool) as ioctx:
        with ceph.admin.sdk.Image(ioctx, "old", read_only=True) as image:
            internal = image.id()
        before = ceph.admin.objects(ceph.pool)
        ceph.admin.rbd.rename(ioctx, "old", "new")
        assert ceph.admin.objects(ceph.pool) == before - {"rbd_id.old"} | {"rbd_id.new"}
        assert ioctx.read("rbd_id.new") == encoded(internal)
        assert ioctx.execute("rbd_directory", "rbd", "dir_get_name", encoded(internal))[1] == encoded("new")
    ceph.admin.remove(ceph.pool, "new")


REMOVER = """
import os, rados, rbd, signal, sys
conf, pool, name = sys.argv[1:]
cluster = rados.Rados(conffile=conf, name="client.admin")
cluster.connect()
def progress(done, total):
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
rbd.RBD().remove(cluster.open_ioctx(pool), name, on_progress=progress)
"""


def test_killed_in_a_remove(ceph: Weather) -> None:
    """An image that is half removed is collected all the same."""
    token = uuid.uuid4().hex
    ceph.admin.image(ceph.pool, mark_of(token), os.urandom(32 * MIB))
    done = subprocess.run(
        [sys.executable, "-c", REMOVER, ceph.env["CEPH_CONF"], ceph.pool, mark_of(token)],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    left = list(ceph.plain.uploads())
    assert [item.token for item in left] == [token]
    assert left[0].last_activity is not None
    assert not ceph.plain.collect(), "it is too young"
    ceph.collected()
    ceph.assert_clean()
