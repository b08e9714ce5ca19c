"""What a host sees of `Lifecycle`: statuses, errors, leases. What crashes do is in test_lifecycle_crashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from fake import fake_store
from hypothesis import given, settings
from hypothesis import strategies as st

from imagestore import lifecycle as door
from imagestore._stores import Stores
from imagestore.driver import Capabilities
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    DigestMismatch,
    FormatMismatch,
    IllegalTransition,
    InUse,
    InvalidRequest,
    NotFound,
    Protected,
    SignatureMismatch,
    SourceError,
    StoreError,
    Unavailable,
    Unsupported,
    WrongStatus,
)
from imagestore.image import Event, Image, ImageLocation, ImageStatus
from imagestore.lifecycle import Data, Lifecycle, MemoryRepository, Record

DATA = b"bootable" * 500
SHA256 = hashlib.sha256(DATA).hexdigest()
NO_PROOF = Capabilities(parallel_writes=4, commit_proof=False)
PATIENCE = 20


class Host:
    def __init__(self, caps=None, repository=None, **options):
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.store, self.backend = fake_store(caps)
        self.staging, self.staged = fake_store(caps)
        self.staging.name = "staging"
        self.repository = repository or MemoryRepository()
        self.stores = Stores([self.store, self.staging], default="s")
        self.lifecycle = self.other(**options)

    def other(self, **options):
        """Another worker. Its leases last, unless it wants them short."""
        options.setdefault("lease", 3600)
        options.setdefault("clock", lambda: self.now)
        return Lifecycle(self.stores, self.repository, **options)

    def create(self, image_id="a", **known):
        known = {"disk_format": "raw", "container_format": "bare", **known}
        return self.lifecycle.create(Image(id=image_id, **known))

    def record(self, image_id="a"):
        return self.repository.get(image_id)

    def status(self, image_id="a"):
        return str(self.record(image_id).image.status)

    def sleep(self, seconds):
        self.now += timedelta(seconds=seconds)

    def close(self):
        self.stores.close()
        for thread in threading.enumerate():
            if thread.name == "imagestore-leases":
                thread.join(PATIENCE)
        assert not [thread for thread in threading.enumerate() if thread.name == "imagestore-leases"]


@pytest.fixture
def make():
    made = []

    def factory(caps=None, **options):
        made.append(Host(caps, **options))
        return made[-1]

    yield factory
    for host in made:
        host.close()


@pytest.fixture
def host(make):
    host = make()
    host.create()
    return host


def failing():
    yield DATA[:100]
    raise OSError("the client is gone")


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Gate:
    """A source that stops in the middle, until the test lets it go on."""

    def __init__(self):
        self.reached = threading.Event()
        self.open = threading.Event()

    def __iter__(self):
        yield DATA[:1000]
        self.reached.set()
        assert self.open.wait(PATIENCE)
        yield DATA[1000:]


# Upload


def test_an_upload(host):
    before = host.lifecycle.get("a")
    host.sleep(5)
    image = host.lifecycle.upload("a", DATA, size=len(DATA), digests=("sha256", "md5"), metadata={"k": "v"})
    assert (image.status, image.size, image.digests["sha256"]) == ("active", len(DATA), SHA256)
    assert image.digests["md5"] == hashlib.md5(DATA).hexdigest()
    assert image.locations == (ImageLocation(store="s", uri="fake://host/a"),)
    assert image.updated_at - before.created_at == timedelta(seconds=5)
    record = host.record()
    assert (record.image, record.worker, record.lease_until, record.upload) == (image, None, None, None)
    with host.lifecycle.open("a") as data:
        assert data.read() == DATA


def test_what_is_about_to_happen_is_written_down_before_the_first_byte(host):
    seen = []

    def source():
        seen.append(host.record())
        seen.append({token: dict(pieces) for token, pieces in host.backend.pending.items()})
        yield DATA

    host.lifecycle.upload("a", source())
    record, pending = seen
    assert record.image.status == "saving"
    assert pending == {record.token: {}}
    assert record.upload == Data(store="s", token=record.token, uri="fake://host/a")
    assert record.lease_until == host.now + timedelta(seconds=3600)
    assert record.worker
    assert host.backend.images["a"][0] == record.token


def test_the_token_is_written_down_before_anything_is_created(host):
    tokens = []
    host.backend.script["create"] = [lambda: tokens.append(host.record().token)]
    host.lifecycle.upload("a", DATA)
    assert tokens == [host.backend.images["a"][0]]


def test_formats_are_checked_and_virtual_sizes_kept(host):
    image = host.lifecycle.upload("a", b"\0" * 4096)
    assert image.virtual_size == 4096
    host.create("b", disk_format="qcow2")
    with pytest.raises(FormatMismatch):
        host.lifecycle.upload("b", DATA)
    assert host.status("b") == "queued"
    assert "b" not in host.backend.images


class Refusing:
    def update(self, data):
        pass

    def verify(self):
        raise ValueError("not signed")


@pytest.mark.parametrize(
    ("source", "options", "kind"),
    [
        (failing, {}, SourceError),
        (lambda: DATA, {"expected": {"sha256": "0" * 64}}, DigestMismatch),
        (lambda: DATA, {"verifier": Refusing()}, SignatureMismatch),
        (lambda: DATA, {"size": 5}, StoreError),
        (lambda: DATA, {"max_size": 5}, StoreError),
        (lambda: DATA, {"store": "staging", "metadata": {"x": 5}}, InvalidRequest),
    ],
)
@pytest.mark.parametrize("kill", [False, True])
def test_a_failed_upload_leaves_nothing(make, source, options, kind, kill):
    host = make(kill_failed=kill)
    host.create()
    with pytest.raises(kind):
        host.lifecycle.upload("a", source(), **options)
    assert host.status() == ("killed" if kill else "queued")
    assert not host.backend.images
    assert not host.backend.pending
    record = host.record()
    assert (record.upload, record.garbage, record.worker, record.image.size) == (None, (), None, None)


def test_a_failed_upload_may_be_repeated_at_another_place(host):
    with pytest.raises(SourceError):
        host.lifecycle.upload("a", failing())
    image = host.lifecycle.upload("a", DATA)
    (name,) = host.backend.images
    assert name.startswith("a.")
    assert image.locations[0].uri == f"fake://host/{name}"


def test_somebody_elses_data_is_not_touched(host):
    host.store.add("a", b"foreign")
    with pytest.raises(AlreadyExists):
        host.lifecycle.upload("a", DATA)
    assert host.status() == "queued"
    assert host.lifecycle.upload("a", DATA).status == "active"
    host.lifecycle.delete("a")
    assert [data for _, data in host.backend.images.values()] == [b"foreign"]


def test_of_two_uploads_one_is_refused(host):
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(host.lifecycle.upload, "a", gate)
        assert gate.reached.wait(PATIENCE)
        with pytest.raises(IllegalTransition, match="upload_started can't happen to an image that is saving"):
            host.other().upload("a", b"rival")
        gate.open.set()
        assert first.result(PATIENCE).digests["sha256"] == SHA256


def test_uploads_that_are_refused_change_nothing(host):
    host.create("b", disk_format=None)
    with pytest.raises(InvalidRequest, match="declare them first"):
        host.lifecycle.upload("b", DATA)
    with pytest.raises(InvalidRequest, match="no store 'none'"):
        host.lifecycle.upload("a", DATA, store="none")
    with pytest.raises(NotFound):
        host.lifecycle.upload("c", DATA)
    assert (host.status("a"), host.status("b")) == ("queued", "queued")
    assert "locate" not in host.backend.calls


def test_cancel(host):
    gate, cancel = Gate(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(host.lifecycle.upload, "a", gate, cancel=cancel)
        assert gate.reached.wait(PATIENCE)
        cancel.set()
        gate.open.set()
        with pytest.raises(Cancelled):
            upload.result(PATIENCE)
    assert host.status() == "queued"


def test_cancel_ends_a_wait_between_attempts(make):
    host = make()
    host.create()
    host.store._retry = dataclasses.replace(host.store._retry, attempts=3, first=30, longest=30, total=1000)
    host.backend.script["locate"] = [Unavailable("down")]
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(host.lifecycle.upload, "a", DATA, cancel=cancel)
        until(lambda: "locate" in host.backend.calls)
        cancel.set()
        with pytest.raises(Unavailable):
            upload.result(PATIENCE)
    assert host.status() == "queued"


def test_what_can_not_be_taken_back_is_left_to_recover(host):
    """The commit took effect, its answer was lost, and then the backend went away."""
    down = [Unavailable("down")] * 9
    host.backend.script |= {"committed": [Unavailable("lost")], "stat": list(down)}
    with pytest.raises(Unavailable) as caught:
        host.lifecycle.upload("a", DATA)
    assert "the image stays as it is until recover() sees to it" in caught.value.__notes__[0]
    assert host.status() == "saving"
    host.backend.script["stat"] = list(down)
    (result,) = host.other().recover()
    assert isinstance(result.error, Unavailable)
    assert (result.image.status, host.status()) == ("saving", "saving")
    host.backend.script.clear()
    (result,) = host.other().recover()
    assert (result.image.status, result.error) == ("queued", None)
    assert not host.backend.images


# What `Store.add` has for it


def test_a_caller_may_give_the_token_and_learn_the_place(host):
    seen = []

    def begun(location):
        seen.append((location, {token: dict(pieces) for token, pieces in host.backend.pending.items()}))

    def source():
        seen.append("read")
        yield DATA

    added = host.store.add("x", source(), token="0123456789abcdef" * 2, begun=begun)
    assert added.stat.token == "0123456789abcdef" * 2
    assert seen == [(added.location, {added.stat.token: {}}), "read"]


@pytest.mark.parametrize("token", ["", "0" * 31, "0" * 33, "A" * 32, "g" * 32, "0" * 31 + "\n", 5])
def test_tokens_that_are_none(host, token):
    with pytest.raises(InvalidRequest, match="32 lower-case hexadecimal digits"):
        host.store.add("x", DATA, token=token)
    assert "locate" not in host.backend.calls


@pytest.mark.parametrize("error", [ValueError("no"), NotFound("no"), KeyboardInterrupt()])
def test_what_begun_raises_ends_the_add(host, error):
    def begun(location):
        raise error

    with pytest.raises(type(error)) as caught:
        host.store.add("x", DATA, begun=begun)
    assert caught.value is error
    assert not host.backend.images
    assert not host.backend.pending
    assert "write" not in host.backend.calls


# Staging and import


def test_staging_and_importing(host):
    image = host.lifecycle.stage("a", DATA, store="staging")
    assert (image.status, image.size, image.locations) == ("uploading", None, ())
    assert not host.record().worker
    assert not host.lifecycle.recover()
    image = host.lifecycle.import_image("a", expected={"sha256": SHA256})
    assert (image.status, image.digests, image.size) == ("active", {"sha256": SHA256}, len(DATA))
    assert image.locations == (ImageLocation(store="s", uri="fake://host/a"),)
    assert not host.staged.images


def test_what_the_host_fetches_is_imported_without_staging(host):
    seen = []

    def source():
        seen.append(host.status())
        yield DATA

    assert host.lifecycle.import_image("a", source()).status == "active"
    assert seen == ["importing"]


def test_a_failed_import_removes_what_was_staged(host):
    host.lifecycle.stage("a", DATA, store="staging")
    with pytest.raises(DigestMismatch):
        host.lifecycle.import_image("a", expected={"sha256": "0" * 64})
    assert host.status() == "queued"
    assert not host.backend.images
    assert not host.staged.images


def test_failed_staging(host):
    with pytest.raises(SourceError):
        host.lifecycle.stage("a", failing(), store="staging")
    assert host.status() == "queued"
    assert not host.staged.images


def test_staged_data_that_can_not_be_removed_is_scrubbed_later(host):
    host.lifecycle.stage("a", DATA, store="staging")
    host.staged.script["delete"] = [Unavailable("down")] * 9
    assert host.lifecycle.import_image("a").status == "active"
    assert len(host.staged.images) == 1
    host.staged.script.clear()
    assert not host.lifecycle.scrub()
    (result,) = host.lifecycle.scrub(thorough=True)
    assert (result.image.status, result.error) == ("active", None)
    assert not host.staged.images
    assert host.backend.images


def test_imports_that_make_no_sense(host):
    with pytest.raises(WrongStatus, match="no data is staged"):
        host.lifecycle.import_image("a")
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        staging = pool.submit(host.lifecycle.stage, "a", gate, store="staging")
        assert gate.reached.wait(PATIENCE)
        with pytest.raises(WrongStatus, match="still being staged"):
            host.lifecycle.import_image("a")
        gate.open.set()
        staging.result(PATIENCE)
    with pytest.raises(WrongStatus, match="imported without a source"):
        host.lifecycle.import_image("a", DATA)
    with pytest.raises(IllegalTransition):
        host.lifecycle.upload("a", DATA)
    assert host.lifecycle.import_image("a").status == "active"


# Reading


def test_reading(host):
    host.lifecycle.upload("a", DATA)
    with host.lifecycle.open("a", start=8, stop=16) as data:
        assert data.read() == b"bootable"
    with host.lifecycle.open("a", stop=10**9) as data:
        assert data.read() == DATA
    host.lifecycle.deactivate("a")
    with pytest.raises(WrongStatus, match="can't be read but by an administrator"):
        host.lifecycle.open("a")
    with host.lifecycle.open("a", administrator=True) as data:
        assert data.size == len(DATA)
    assert host.lifecycle.deactivate("a").status == "deactivated"
    assert host.lifecycle.reactivate("a").status == "active"
    assert host.lifecycle.reactivate("a").status == "active"


def test_a_whole_read_is_verified(host):
    host.lifecycle.upload("a", DATA)
    host.backend.images["a"] = (host.backend.images["a"][0], DATA[:-1] + b"x")
    with host.lifecycle.open("a") as data, pytest.raises(DigestMismatch):
        data.read()
    with host.lifecycle.open("a", verify=False) as data:
        assert data.read()[-1:] == b"x"


def test_an_image_without_data_can_not_be_read(host):
    with pytest.raises(WrongStatus, match=r"an image that is queued can't be read \("):
        host.lifecycle.open("a")


# Delete


def test_delete(host):
    host.lifecycle.upload("a", DATA)
    image = host.lifecycle.delete("a")
    assert (image.status, image.deleted_at, image.locations) == ("deleted", host.now, ())
    assert not host.backend.images
    with pytest.raises(IllegalTransition, match="it stays so for ever"):
        host.lifecycle.delete("a")
    with pytest.raises(AlreadyExists):
        host.create("a")


def test_deleting_what_has_no_data_asks_no_store(host):
    assert host.lifecycle.delete("a", delayed=True).status == "deleted"
    assert not host.backend.calls


def test_protected(host):
    host.lifecycle.upload("a", DATA)
    host.lifecycle.update("a", protected=True)
    with pytest.raises(Protected):
        host.lifecycle.delete("a")
    assert host.status() == "active"
    host.lifecycle.update("a", protected=False)
    assert host.lifecycle.delete("a").status == "deleted"


@pytest.mark.parametrize("closed", [False, True])
def test_what_is_in_use_stays_as_it_was(host, closed):
    before = host.lifecycle.upload("a", DATA)
    if closed:
        before = host.lifecycle.deactivate("a")
    host.backend.script["delete"] = [InUse("a clone needs it")]
    with pytest.raises(InUse):
        host.lifecycle.delete("a")
    assert dataclasses.replace(host.lifecycle.get("a"), updated_at=before.updated_at) == before
    assert (host.record().garbage, host.record().worker) == ((), None)
    assert host.lifecycle.delete("a").status == "deleted"


def test_what_can_not_be_removed_now_is_scrubbed_later(host):
    host.lifecycle.upload("a", DATA)
    host.backend.script["delete"] = [Unavailable("down")] * 9
    image = host.lifecycle.delete("a")
    assert (image.status, image.locations) == ("pending_delete", ())
    with pytest.raises(WrongStatus, match="its data is being removed"):
        host.lifecycle.restore("a")
    (result,) = host.other().scrub()
    assert isinstance(result.error, Unavailable)
    host.backend.script.clear()
    (result,) = host.other().scrub()
    assert (result.image.status, result.error) == ("deleted", None)
    assert not host.backend.images


def test_delayed_delete_and_restore(host):
    host.lifecycle.upload("a", DATA)
    host.lifecycle.deactivate("a")
    image = host.lifecycle.delete("a", delayed=True)
    assert (image.status, image.deleted_at) == ("pending_delete", host.now)
    with pytest.raises(WrongStatus):
        host.lifecycle.open("a", administrator=True)
    image = host.lifecycle.restore("a")
    assert (image.status, image.deleted_at) == ("deactivated", None)
    host.lifecycle.reactivate("a")
    host.lifecycle.delete("a", delayed=True)
    assert host.lifecycle.restore("a").status == "active"
    with pytest.raises(IllegalTransition):
        host.lifecycle.restore("a")


def test_scrub_waits(host):
    host.lifecycle.upload("a", DATA)
    host.lifecycle.delete("a", delayed=True)
    host.sleep(50)
    assert not host.lifecycle.scrub(older_than=60)
    assert host.backend.images
    host.sleep(11)
    (result,) = host.lifecycle.scrub(older_than=60)
    assert result.image.status == "deleted"
    assert not host.backend.images
    assert not host.lifecycle.scrub()


def test_data_that_is_gone_already_counts_as_removed(host):
    host.lifecycle.upload("a", DATA)
    host.lifecycle.delete("a", delayed=True)
    host.backend.images.clear()
    assert host.lifecycle.scrub()[0].image.status == "deleted"


def test_many_are_scrubbed_at_once_by_several_workers(make):
    host = make()
    for number in range(40):
        host.create(f"i{number}")
        host.lifecycle.upload(f"i{number}", DATA)
        host.lifecycle.delete(f"i{number}", delayed=True)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(host.other().scrub, threads=3) for _ in range(3)]
        done = [each.image.id for result in results for each in result.result(PATIENCE)]
    assert sorted(done) == sorted(f"i{number}" for number in range(40))
    assert not host.backend.images
    assert host.backend.count("delete") == 40


def test_deleting_an_image_breaks_its_upload_off(host):
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(host.lifecycle.upload, "a", gate)
        assert gate.reached.wait(PATIENCE)
        # Its worker may still be writing, so that nothing is promised yet.
        assert host.lifecycle.delete("a").status == "pending_delete"
        gate.open.set()
        with pytest.raises(WrongStatus, match="the image was deleted"):
            upload.result(PATIENCE)
    assert host.status() == "deleted"
    assert not host.backend.images
    assert not host.backend.pending


def test_another_workers_upload_is_broken_off_at_its_next_renewal(make):
    host = make(lease=0.3)
    host.create()
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(host.lifecycle.upload, "a", gate)
        assert gate.reached.wait(PATIENCE)
        host.other().delete("a")
        (hold,) = host.lifecycle._keeper.held("a")
        assert hold.stop.wait(PATIENCE)
        gate.open.set()
        with pytest.raises(WrongStatus):
            upload.result(PATIENCE)
    assert host.status() == "deleted"


def test_an_upload_that_ended_while_the_image_was_deleted_leaves_nothing(host):
    host.backend.script["committed"] = [lambda: host.other().delete("a")]
    with pytest.raises(WrongStatus):
        host.lifecycle.upload("a", DATA)
    assert host.status() == "deleted"
    assert not host.backend.images


# Leases and recovery


def test_a_lease_is_renewed_while_the_upload_goes_on(make):
    host = make(lease=0.3)
    host.create()
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(host.lifecycle.upload, "a", gate)
        assert gate.reached.wait(PATIENCE)
        for _ in range(3):
            host.sleep(0.2)
            until(lambda: host.record().lease_until == host.now + timedelta(seconds=0.3))
        assert not host.other().recover()
        gate.open.set()
        assert upload.result(PATIENCE).status == "active"


class Moody(MemoryRepository):
    down = False

    def compare_and_swap(self, old, new, /):
        if self.down:
            raise OSError("the database is gone")
        return super().compare_and_swap(old, new)


def test_a_worker_that_can_not_renew_its_lease_breaks_off(make):
    host = make(lease=0.2, clock=lambda: datetime.now(UTC), repository=Moody())
    host.create()
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(host.lifecycle.upload, "a", gate)
        assert gate.reached.wait(PATIENCE)
        host.repository.down = True
        (hold,) = host.lifecycle._keeper.held("a")
        assert hold.stop.wait(PATIENCE)
        host.repository.down = False
        (result,) = host.other(clock=lambda: datetime.now(UTC)).recover()
        assert result.image.status == "queued"
        gate.open.set()
        with pytest.raises(WrongStatus):
            upload.result(PATIENCE)
    assert host.status() == "queued"
    assert not host.record().garbage


def test_one_failure_of_the_database_does_not_end_an_upload(make):
    host = make(repository=Moody())
    host.create()
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(host.lifecycle.upload, "a", gate)
        assert gate.reached.wait(PATIENCE)
        host.repository.down = True
        (hold,) = host.lifecycle._keeper.held("a")
        host.lifecycle._renew(hold)
        host.repository.down = False
        gate.open.set()
        assert upload.result(PATIENCE).status == "active"


def killed(host, commit=True, digests=("sha256",)):
    """What an upload leaves that ends with its process, before its commit or right after."""

    class Killed(BaseException):
        pass

    def die():
        host.repository.down = True
        raise Killed

    host.backend.script["committed" if commit else "commit"] = [die]
    with pytest.raises(Killed):
        host.lifecycle.upload("a", DATA, digests=digests)
    host.repository.down = False
    assert host.status() == "saving"


@pytest.mark.parametrize("digests", [("sha256", "md5"), ()])
def test_data_that_stands_is_taken(make, digests):
    host = make(repository=Moody())
    host.create()
    killed(host, digests=digests)
    assert not host.other().recover()
    host.sleep(3601)
    (result,) = host.other().recover()
    assert (result.image.status, result.image.size, result.error) == ("active", len(DATA), None)
    assert set(result.image.digests) == set(digests)
    assert result.image.virtual_size == 4096
    with host.lifecycle.open("a") as data:
        assert data.read() == DATA


def test_data_that_does_not_stand_is_gone(make):
    host = make(repository=Moody())
    host.create()
    killed(host, commit=False)
    host.sleep(3601)
    (result,) = host.other(grace=100).recover()
    assert result.image.status == "queued"
    assert host.lifecycle.upload("a", DATA).status == "active"
    # As long as the first worker might still come back, what it wrote is looked for.
    assert host.lifecycle.delete("a").status == "pending_delete"
    assert host.lifecycle.scrub()[0].image.status == "pending_delete"
    host.sleep(101)
    assert host.lifecycle.scrub()[0].image.status == "deleted"


def test_nobody_guesses_whose_data_stands(make):
    host = make(NO_PROOF, repository=Moody())
    host.create()
    killed(host)
    host.sleep(3601)
    (result,) = host.other().recover()
    assert isinstance(result.error, Unsupported)
    assert "set exclusive=True" in str(result.error)
    assert host.status() == "saving"
    assert host.backend.images
    (result,) = host.other(exclusive=True).recover()
    assert result.image.status == "active"


def test_the_same_worker_after_a_restart_need_not_wait(make):
    host = make(repository=Moody(), worker="api-1")
    host.create()
    killed(host)
    assert not host.other(worker="api-2").recover()
    (result,) = host.other(worker="api-1").recover()
    assert result.image.status == "active"


def test_a_worker_does_not_take_its_own_living_upload_for_dead(make):
    host = make(worker="api-1")
    host.create()
    seen = []

    def source():
        seen.append(host.lifecycle.recover())
        yield DATA

    host.backend.script["locate"] = [lambda: seen.append(host.lifecycle.recover())]
    assert host.lifecycle.upload("a", source()).status == "active"
    assert seen == [[], []]


def test_a_slow_worker_accepts_what_recover_made_of_its_upload(host):
    def overtaken():
        host.sleep(3601)
        assert host.other().recover()[0].image.status == "active"

    host.backend.script["committed"] = [overtaken]
    image = host.lifecycle.upload("a", DATA)
    assert (image.status, image.digests["sha256"]) == ("active", SHA256)
    assert host.backend.images


# Records


@pytest.mark.parametrize("moment", ["create", "write", "committed"])
def test_an_upload_of_an_image_whose_record_is_removed_leaves_nothing(host, moment):
    host.backend.script[moment] = [lambda: host.repository._records.clear()]
    with pytest.raises(NotFound):
        host.lifecycle.upload("a", DATA)
    assert not host.backend.images
    assert not host.backend.pending


def test_update(host):
    image = host.lifecycle.update("a", disk_format="qcow2", protected=True)
    assert (image.disk_format, image.container_format, image.protected) == ("qcow2", "bare", True)
    host.lifecycle.update("a", disk_format="raw")
    host.lifecycle.upload("a", DATA)
    with pytest.raises(WrongStatus):
        host.lifecycle.update("a", container_format="ovf")
    host.lifecycle.update("a", protected=False)
    host.lifecycle.delete("a")
    with pytest.raises(WrongStatus):
        host.lifecycle.update("a", protected=True)


def test_an_update_during_an_upload_does_not_disturb_it(host):
    host.backend.script["commit"] = [lambda: host.other().update("a", protected=True)]
    image = host.lifecycle.upload("a", DATA)
    assert (image.status, image.protected) == ("active", True)


def test_new_images_are_queued(host):
    with pytest.raises(WrongStatus):
        host.lifecycle.create(Image(id="b", status=ImageStatus.KILLED))
    with pytest.raises(AlreadyExists):
        host.create("a")


def test_a_repository_that_never_swaps_is_given_up(make):
    class Never(MemoryRepository):
        def compare_and_swap(self, old, new, /):
            return False

    host = make(repository=Never())
    host.create()
    with pytest.raises(Unavailable, match="changes all the time"):
        host.lifecycle.update("a", protected=True)


def test_swaps_do_not_lose_changes():
    repository = MemoryRepository()
    repository.create(Record(image=Image(id="a")))

    def count(_):
        for _ in range(100):
            while True:
                old = repository.get("a")
                new = dataclasses.replace(old, revision=old.revision + 1, uploads=old.uploads + 1)
                if repository.compare_and_swap(old, new):
                    break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert repository.get("a").uploads == 400


def test_the_repository_in_memory():
    repository = MemoryRepository()
    record = Record(image=Image(id="a"))
    repository.create(record)
    with pytest.raises(NotFound):
        repository.get("b")
    with pytest.raises(AlreadyExists):
        repository.create(record)
    assert repository.list_by_status(ImageStatus.QUEUED, ImageStatus.ACTIVE) == [record]
    assert repository.list_by_status(ImageStatus.ACTIVE) == []


times = st.none() | st.datetimes(timezones=st.just(UTC))
text = st.none() | st.text(max_size=5)
pieces = st.builds(Data, store=st.text(max_size=5), token=text, uri=text, until=times)


@settings(max_examples=50)
@given(
    st.builds(
        Record,
        image=st.builds(
            Image,
            id=st.text(max_size=5),
            status=st.just(ImageStatus.PENDING_DELETE),
            disk_format=text,
            size=st.none() | st.integers(0),
            digests=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
            locations=st.tuples(st.builds(ImageLocation, store=st.text(max_size=5), uri=st.text(max_size=5))),
            protected=st.booleans(),
            created_at=times,
            deleted_at=times,
            before_delete=st.none() | st.sampled_from(ImageStatus),
        ),
        revision=st.integers(0),
        upload=st.none() | pieces,
        staged=st.none() | pieces,
        algorithms=st.lists(st.text(max_size=5), max_size=2).map(tuple),
        garbage=st.lists(pieces, max_size=2).map(tuple),
        worker=text,
        lease_until=times,
    )
)
def test_records_as_plain_values(record):
    again = Record.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    assert type(again.image.status) is ImageStatus


def test_making_one_does_nothing():
    before = threading.active_count()
    Lifecycle(None, None)
    assert threading.active_count() == before


def test_the_door_is_complete():
    assert {"Lifecycle", "MemoryRepository", "Record", "Repository", "Result", "Data"} == set(door.__all__)
    assert Event.UPLOAD_FAILED in door._UPLOAD.failed
