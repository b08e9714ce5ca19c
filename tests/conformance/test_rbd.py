"""The kit on the RBD driver, against a real Ceph cluster: as its administrator, as a user of one pool, and more."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from imagestore import Retry, Store, Stores
from imagestore.driver import Block, Driver, Hints, Timeouts
from imagestore.errors import (
    AlreadyExists,
    ConfigurationError,
    InUse,
    InvalidLocation,
    NotFound,
    PermissionDenied,
    StoreError,
    Unauthenticated,
)
from imagestore.testing import DriverConformance, Harness, checks, run_check

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _rbd import Admin, driver, running

MIB = 1024 * 1024
TOKEN = "0123456789abcdef" * 2


class RbdHarness(Harness):
    """A pool of its own, or a namespace; canaries lie in another pool."""

    processes = True
    sdk = ("rados", "rbd", "boto3", "swiftclient", "cinderclient", "pymongo", "requests")
    kill_rounds = 3
    # The test cluster forgets the watch of a dead client after four seconds.
    settle = 8.0
    server: ClassVar[tuple[str, ...]] = ()
    user: ClassVar[str] = "admin"
    own_pool: ClassVar[bool] = True
    namespace: ClassVar[str] = ""
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.env = running(*self.server)
        self.admin = Admin(self.env)
        self.fsid = self.admin.fsid
        self.pool = self.admin.make_pool() if self.own_pool else self.env["CEPH_POOL"]
        self.volumes = self.env["CEPH_VOLUMES_POOL"]
        self.foreign: set[str] = set()
        self.before = self.admin.objects(self.pool)
        if self.namespace:
            with self.admin.pool(self.pool) as ioctx:
                self.admin.rbd.namespace_create(ioctx, self.namespace)

    def __getstate__(self) -> dict[str, Any]:
        # What a child process gets; connections stay here.
        return {name: value for name, value in self.__dict__.items() if name not in ("admin", "silent")}

    def make_driver(self) -> Driver:
        values = {"user": self.user, "pool": self.pool, "namespace": self.namespace, **self.settings}
        return driver(self.env, **values)

    def make_unreachable(self) -> Driver:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        return self._elsewhere(port)

    def make_stalled(self) -> Driver:
        # The backlog takes connections, and nobody ever reads from them.
        self.silent = socket.create_server(("127.0.0.1", 0))
        return self._elsewhere(self.silent.getsockname()[1])

    def _elsewhere(self, port: int) -> Driver:
        conf = Path(self.env["CEPH_DIR"]) / f"ceph-{port}.conf"
        lines = Path(self.env["CEPH_CONF"]).read_text().splitlines()
        lines = [f"mon host = v2:127.0.0.1:{port}/0" if line.startswith("mon host") else line for line in lines]
        conf.write_text("\n".join(lines) + "\n")
        return driver({**self.env, "CEPH_CONF": str(conf)}, user="admin", timeouts=Timeouts(connect=1, stall=1))

    def close(self) -> None:
        """Look whether anything of ours stayed, and take away what the tests made."""
        if hasattr(self, "silent"):
            self.silent.close()
        for name in self.foreign:
            self.admin.remove(self.pool, name, self.namespace)
        stayed = self.admin.objects(self.pool, self.namespace)
        with self.admin.pool(self.pool, self.namespace) as ioctx:
            trash = list(self.admin.rbd.trash_list(ioctx))
            names = list(self.admin.rbd.list(ioctx))
        if self.own_pool:
            self.admin.delete_pool(self.pool)
        self.admin.close()
        assert not names, "images stayed"
        assert not trash, "images stayed in the trash"
        assert stayed <= (self.before if not self.namespace else set()), "objects stayed"

    def plant_foreign(self) -> Callable[[], None]:
        names = (
            ".imagestore", ".imagestore-", ".imagestore-xyz", f".imagestore-{TOKEN}.bak", f".imagestore-{TOKEN}-xyz",
            f".imagestore-{TOKEN[:-1]}", f"imagestore-{TOKEN}", ".hidden", "unfinished-image", "volume-1 a",
        )  # fmt: skip
        for name in names:
            if name not in self.foreign:
                self.admin.image(self.pool, name, name.encode() * 100, namespace=self.namespace)
                self.foreign.add(name)
        for name, snapshot in (("backed-up", "monday"), (".imagestore-with-snapshot", "snap")):
            if name not in self.foreign:
                self.admin.image(self.pool, name, name.encode() * 100, snapshot=snapshot, namespace=self.namespace)
                self.foreign.add(name)

        def untouched() -> None:
            for name in self.foreign:
                assert self.admin.contents(self.pool, name, self.namespace) == name.encode() * 100, name

        return untouched

    @contextlib.contextmanager
    def hold(self, location: str) -> Iterator[None]:
        """A volume made from the image, as Cinder and Nova do."""
        name = location.split("/")[-2]
        clone = f"volume-{uuid.uuid4().hex}"
        self.admin.clone(self.pool, name, (self.volumes, clone))
        try:
            yield
        finally:
            self.admin.remove(self.volumes, clone)

    def hostile_locations(self) -> Iterable[str]:
        fsid, pool = self.fsid, self.pool
        other = str(uuid.UUID(int=uuid.UUID(fsid).int ^ 1))
        own = f"{pool}%2F{self.namespace}" if self.namespace else pool
        return (
            f"rbd://{fsid}/{self.volumes}/canary/snap",
            f"rbd://{fsid}/{pool}%2Fother/canary/snap",
            *([f"rbd://{fsid}/{pool}/canary/snap"] if self.namespace else ()),
            f"rbd://{other}/{own}/canary/snap",
            f"rbd://{fsid}/{own}/.imagestore-{TOKEN}/snap",
            f"rbd://.imagestore-{TOKEN}",
            f"rbd://{fsid}/{own}/%2Eimagestore-{TOKEN}/snap",
            f"rbd://{fsid}/{own}/canary",
            f"rbd://{fsid}/{own}/canary/",
            f"rbd://{fsid}/{own}//snap",
            f"rbd://{fsid}//canary/snap",
            f"rbd:///{own}/canary/snap",
            f"rbd://{fsid}/{own}/canary/snap/",
            f"rbd://{self.volumes}/canary",
            f"rbd://x/{self.volumes}/canary/snap",
            f"rbd://{fsid}/{own}/%00/snap",
            f"rbd://{fsid}/{own}/%ff/snap",
            f"http://{fsid}/{own}/canary/snap",
        )

    @contextlib.contextmanager
    def canary(self) -> Iterator[None]:
        self.admin.image(self.volumes, "canary", b"alive", snapshot="snap")
        yield
        assert self.admin.contents(self.volumes, "canary", snapshot="snap") == b"alive"
        self.admin.remove(self.volumes, "canary")


class TestAdmin(DriverConformance):
    harness = RbdHarness


class RestrictedHarness(RbdHarness):
    """The user that the documentation describes: of one pool, and with the profile rbd only."""

    user = "imagestore"
    own_pool = False


class TestRestricted(DriverConformance):
    harness = RestrictedHarness


class NamespaceHarness(RbdHarness):
    namespace = "team"


class ErasureCodedHarness(RbdHarness):
    """Data in an erasure-coded pool, and features chosen by the operator."""

    server = ("--store", "bluestore", "--ec", "yes")
    user = "imagestore"
    own_pool = False
    settings: ClassVar[dict[str, Any]] = {
        "data_pool": "data",
        "object_size": MIB,
        "features": ["layering", "exclusive-lock"],
    }

    def close(self) -> None:
        stayed = self.admin.objects("data")
        super().close()
        assert not stayed, "data stayed"


SOME = (
    "contract.image_empty",
    "contract.image_several_blocks_and_some",
    "contract.zeros_scattered",
    "contract.add_again",
    "contract.ranges",
    "contract.extents",
    "contract.listing",
    "contract.usage",
    "faults.commit_in_doubt_done",
    "faults.replaced_while_reading",
    "leftovers.add_killed_after",
    "leftovers.foreign_objects",
    "locations.hostile",
    "locations.round_trip",
)


@pytest.mark.parametrize("harness", [NamespaceHarness, ErasureCodedHarness])
def test_some_of_it_elsewhere(harness: type[RbdHarness]) -> None:
    made = harness()
    try:
        for check in checks():
            if check.id in SOME:
                run_check(check, made)
    finally:
        made.close()


def test_every_one_of_some_is_a_check() -> None:
    assert set(SOME) <= {check.id for check in checks()}


@pytest.fixture
def ceph() -> Iterator[RbdHarness]:
    made = RbdHarness()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def store(ceph: RbdHarness) -> Iterator[Store]:
    with opened(ceph) as made:
        yield made


def opened(ceph: RbdHarness, **values: Any) -> Store:
    told = driver(ceph.env, **{"user": "admin", "pool": ceph.pool, **values})
    return Store(told, name="rbd", retry=Retry(attempts=1))


# Settings


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"pool": "no-such-pool"}, ConfigurationError, "option pool: the cluster has no pool 'no-such-pool'"),
        ({"data_pool": "no-such-pool"}, ConfigurationError, "option data_pool: "),
        ({"namespace": "no-such-space"}, ConfigurationError, "option namespace: "),
        ({"user": "nobody"}, Unauthenticated, "does not accept client.nobody"),
        ({"keyring": "/no/such/keyring"}, Unauthenticated, "does not accept client.admin"),
        ({"ceph_conf": "/no/such/ceph.conf"}, ConfigurationError, "option ceph_conf: "),
        ({"fsid": str(uuid.UUID(int=1))}, ConfigurationError, "option fsid: the cluster's is "),
        ({"user": "imagestore"}, PermissionDenied, "capabilities"),
    ],
)
def test_bad_settings(ceph: RbdHarness, values: dict[str, str], error: type[StoreError], says: str) -> None:
    with opened(ceph, **values) as store, pytest.raises(error, match=says) as caught:
        store.exists("image")
    assert not caught.value.temporary


def test_wrong_key(ceph: RbdHarness, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_text("[client.admin]\n    key = AQD3yi5l0AAAABAAm7wlPyGUwhtzrjdB1xKJAw==\n")
    with opened(ceph, keyring=str(keyring)) as store, pytest.raises(Unauthenticated, match="does not accept"):
        store.exists("image")


def test_a_user_who_may_only_read(ceph: RbdHarness, store: Store, tmp_path: Path) -> None:
    location = store.add("image", b"data").location
    profile = f"profile rbd-read-only pool={ceph.pool}"
    told = ceph.admin.command("auth get-or-create", entity="client.reader", caps=["mon", "profile rbd", "osd", profile])
    keyring = tmp_path / "keyring"
    keyring.write_bytes(told)
    try:
        with opened(ceph, user="reader", keyring=str(keyring)) as reading:
            assert [image.image_id for image in reading.list()] == ["image"]
            assert reading.verify(reading.locate("image")).size == 4
            with pytest.raises(PermissionDenied):
                reading.add("other", b"data")
            with pytest.raises(PermissionDenied):
                reading.delete(location)
        assert store.verify(location).size == 4
        assert not list(store.uploads())
    finally:
        ceph.admin.command("auth del", entity="client.reader")
    store.delete(location)


def test_stores_share_one_connection(ceph: RbdHarness) -> None:
    before = threads()
    with opened(ceph) as one, opened(ceph) as other:
        one.exists("image")
        single = threads()
        other.exists("image")
        assert threads() == single > before
        one.close()
        assert not other.exists("image")
    assert threads() == before


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_usage_knows_the_quota(ceph: RbdHarness, store: Store) -> None:
    ceph.admin.command("osd pool set-quota", pool=ceph.pool, field="max_bytes", val=str(64 * MIB))

    # The manager gathers such numbers, and begins late.
    assert eventually(lambda: store.usage().total == 64 * MIB)


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_closed_store_commits_nothing(ceph: RbdHarness) -> None:
    raw = driver(ceph.env, user="admin", pool=ceph.pool)
    raw.open()
    upload = raw.create("image", Hints(token=TOKEN, size=4))
    upload.write(Block(index=0, offset=0, data=b"data", last=True))
    raw.close()
    with pytest.raises(NotFound):
        upload.commit(4)
    with pytest.raises(StoreError):
        upload.write(Block(index=0, offset=0, data=b"data", last=True))
    for _ in range(2):
        upload.abort()


# Locations in old data


def test_short_locations(ceph: RbdHarness, store: Store) -> None:
    data = os.urandom(3 * MIB)
    store.add("image", data)
    ceph.admin.image(ceph.pool, "bare", data)
    for name in ("image", "bare"):
        location = f"rbd://{name}"
        assert store.get_size(location) == len(data)
        with store.get(location, start=5) as reader:
            assert reader.read() == data[5:]
        store.delete(location)
        with pytest.raises(NotFound):
            store.stat(location)


def test_images_without_a_snapshot_are_no_images(ceph: RbdHarness, store: Store) -> None:
    """Such as Glance is about to upload."""
    ceph.admin.image(ceph.pool, "half", b"half")
    ceph.admin.image(ceph.pool, "monday", b"data", snapshot="monday")
    assert not store.exists("half")
    assert not list(store.list())
    with pytest.raises(AlreadyExists, match="no snapshot named snap"):
        store.add("half", b"data")
    for name in ("half", "monday"):
        with pytest.raises(NotFound):
            store.delete(f"rbd://{ceph.fsid}/{ceph.pool}/{name}/snap")
        with pytest.raises(NotFound):
            store.get(f"rbd://{ceph.fsid}/{ceph.pool}/{name}/snap")
    with store.get(f"rbd://{ceph.fsid}/{ceph.pool}/monday/monday") as reader:
        assert reader.read() == b"data"
    ceph.foreign |= {"half", "monday"}


def test_accepted_pools(ceph: RbdHarness) -> None:
    data = os.urandom(MIB)
    name = f"old-{uuid.uuid4().hex}"
    ceph.admin.image(ceph.volumes, name, data, snapshot="snap")
    with opened(ceph, accept_locations=[ceph.volumes]) as store:
        location = f"rbd://{ceph.fsid}/{ceph.volumes}/{name}/snap"
        with store.get(location) as reader:
            assert reader.read() == data
        assert not list(store.list())
        with store.get(Stores([store])["rbd"].parse(location)) as reader:
            assert reader.size == MIB
        store.delete(location)
        with pytest.raises(NotFound):
            store.stat(location)


def test_another_cluster(ceph: RbdHarness) -> None:
    other = uuid.UUID(int=uuid.UUID(ceph.fsid).int ^ 1)
    fresh = driver(ceph.env, user="admin", pool=ceph.pool)
    location = fresh.parse(f"rbd://{other}/{ceph.pool}/image/snap")
    fresh.open()
    try:
        with pytest.raises(InvalidLocation, match="another cluster"):
            fresh.stat(location)
        with pytest.raises(InvalidLocation, match="another cluster"):
            fresh.parse(location.uri)
    finally:
        fresh.close()


# Deleting what others need


def test_snapshots_of_others(ceph: RbdHarness, store: Store) -> None:
    location = store.add("image", b"data").location
    with ceph.admin.pool(ceph.pool) as ioctx, ceph.admin.sdk.Image(ioctx, "image") as image:
        image.create_snap("backup")
    with pytest.raises(InUse, match="other snapshots: backup"):
        store.delete(location)
    with store.get(location) as reader:
        assert reader.read() == b"data"
    with opened(ceph, snapshots_to_trash=True) as trashing:
        trashing.delete(location)
    assert not store.exists("image")
    assert not list(store.uploads())
    with ceph.admin.pool(ceph.pool) as ioctx:
        (trashed,) = ceph.admin.rbd.trash_list(ioctx)
        assert trashed["name"] == "image"
        store.delete(store.add("image", b"the id is free").location)
        ceph.admin.rbd.trash_restore(ioctx, trashed["id"], "image")
    ceph.admin.remove(ceph.pool, "image")


def test_open_elsewhere(ceph: RbdHarness, store: Store) -> None:
    location = store.add("image", b"data").location
    with ceph.admin.pool(ceph.pool) as ioctx:
        with ceph.admin.sdk.Image(ioctx, "image"):
            with pytest.raises(InUse, match="open elsewhere"):
                store.delete(location)
            assert store.verify(location).size == 4
        store.delete(location)


def test_clone_is_named(ceph: RbdHarness, store: Store) -> None:
    location = store.add("image", b"data").location
    with ceph.hold(location.uri), pytest.raises(InUse, match=f"clones: {ceph.volumes}/volume-"):
        store.delete(location)
    store.delete(location)


def test_what_a_failed_delete_changes(ceph: RbdHarness, store: Store) -> None:
    """The snapshot of an image that stays is still protected, so that it can be cloned."""
    location = store.add("image", b"data").location
    with ceph.hold(location.uri), pytest.raises(InUse):
        store.delete(location)
    with ceph.admin.pool(ceph.pool) as ioctx, ceph.admin.sdk.Image(ioctx, "image", read_only=True) as image:
        assert image.is_protected_snap("snap")
    store.delete(location)


# Layout and copying


def test_layout(ceph: RbdHarness) -> None:
    with opened(ceph, object_size=MIB, features=["layering"]) as store:
        location = store.add("image", b"data", metadata={"os": "linux"}).location
        assert location.uri == f"rbd://{ceph.fsid}/{ceph.pool}/image/snap"
        with ceph.admin.pool(ceph.pool) as ioctx, ceph.admin.sdk.Image(ioctx, "image", read_only=True) as image:
            assert image.stat()["obj_size"] == MIB
            assert image.features() == 1
            assert [snapshot["name"] for snapshot in image.list_snaps()] == ["snap"]
            assert image.is_protected_snap("snap")
        assert store.stat(location).metadata == {"os": "linux"}
        store.delete(location)


def test_unknown_size_leaves_no_trace(ceph: RbdHarness, store: Store) -> None:
    data = os.urandom(9 * MIB + 5)
    location = store.add("image", iter([data])).location
    assert store.get_size(location) == len(data)
    data_objects = {name for name in ceph.admin.objects(ceph.pool) if name.startswith("rbd_data")}
    assert len(data_objects) == 2, "more objects than data"
    assert store.verify(location).size == len(data)
    store.delete(location)


def test_zeros_are_sent_if_told_to(ceph: RbdHarness) -> None:
    with opened(ceph, sparse=False) as store:
        result = store.add("image", bytes(3 * MIB))
        assert result.stored == 3 * MIB
        store.delete(result.location)


def test_copy(ceph: RbdHarness, store: Store) -> None:
    data = os.urandom(MIB) + bytes(20 * MIB) + os.urandom(100)
    location = store.add("image", data, metadata={"os": "linux"}).location
    with opened(ceph) as other:
        stores = Stores([Store(driver(ceph.env, user="admin", pool=ceph.pool), name="one"), other])
        copied = stores.copy(location, to="rbd", image_id="copy")
        assert copied.stored == 0, "the bytes came through Python"
        assert copied.stat.token not in (None, store.stat(location).token)
        assert copied.stat.metadata == {}
        with store.get(copied.location) as reader:
            assert reader.read() == data
        with pytest.raises(AlreadyExists):
            stores.copy(location, to="rbd", image_id="copy")
        assert not list(store.uploads())
        stores.close()
    for place in (location, copied.location):
        store.delete(place)
