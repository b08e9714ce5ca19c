"""Workers that die, sleep and fail between any two steps: images, statuses and data agree all the same.

A `World` has one backend, one repository and one clock. Its workers run real calls of `Lifecycle` over real stores,
each in a thread that stops before every step that the world outside could see: every call of the driver and of the
repository. A test says who goes on, who fails, and who dies. What has died takes no further step, so that not even its
clean-up has an effect, as after ``kill -9``.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from fake import Backend, FakeDriver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imagestore._models import Retry
from imagestore._store import Store
from imagestore._stores import Stores
from imagestore.errors import StoreError, Unavailable
from imagestore.image import Image, ImageStatus, check_transition
from imagestore.lifecycle import Lifecycle, MemoryRepository

LEASE, GRACE = 60.0, 1e7
PATIENCE = 20
CONTENT = {1: b"one" * 100, 2: b"two" * 120}


class Crash(BaseException):
    """The process is gone."""


class DatabaseError(Exception):
    """The host's database failed."""


class View(Backend):
    """The one backend, as one worker sees it."""

    def __init__(self, backend: Backend, step) -> None:
        super().__init__(images=backend.images, pending=backend.pending, lock=backend.lock)
        self.step = step

    def happens(self, operation):
        # What is done within a driver's call, and to connect, is no step of its own.
        if operation not in {"open", "close", "closed", "chunk", "written"}:
            self.step(operation)


class WatchedRepository(MemoryRepository):
    """The one repository: looks at every change."""

    def __init__(self):
        super().__init__()
        self.history = {}

    def create(self, record, /):
        super().create(record)
        self.history[record.image.id] = [record.image.status]

    def compare_and_swap(self, old, new, /):
        done = super().compare_and_swap(old, new)
        if done and new.image.status != self.history[new.image.id][-1]:
            check_transition(self.history[new.image.id][-1], new.image.status)
            self.history[new.image.id].append(new.image.status)
        # A record goes through any database as it is.
        assert type(new).from_dict(new.to_dict()) == new
        return done


class Door:
    """The repository as one worker sees it."""

    def __init__(self, repository, step):
        self.repository = repository
        self.step = step

    def get(self, image_id, /):
        self.step("read record")
        return self.repository.get(image_id)

    def create(self, record, /):
        self.step("create record")
        self.repository.create(record)

    def compare_and_swap(self, old, new, /):
        self.step("swap")
        done = self.repository.compare_and_swap(old, new)
        self.step("swapped")
        return done

    def list_by_status(self, *statuses):
        self.step("list records")
        return self.repository.list_by_status(*statuses)


class Worker:
    """A process. `start` begins a call, `advance` lets it take one step."""

    def __init__(self, world, name, *, free=False, **options):
        self.world = world
        self.free = free
        self.dead = False
        self.running = None
        self.failure = None
        self.result = None
        self.fault = None
        self.label = None
        self.go = threading.Semaphore(0)
        self.at = threading.Semaphore(0)
        view = View(world.backend, self.step)
        retry = Retry(attempts=2, first=0.0001, longest=0.0002, total=5.0)
        self.store = Store(FakeDriver(backend=view), name="s", retry=retry, _block_size=1000)
        self.store.capabilities  # noqa: B018 - connects, now that nobody has to step
        self.lifecycle = Lifecycle(
            Stores([self.store]),
            Door(world.repository, self.step),
            worker=name,
            lease=LEASE,
            grace=GRACE,
            clock=lambda: world.now,
            **options,
        )

    def step(self, label):
        if self.free or threading.current_thread() is threading.main_thread():
            return
        if self.dead:
            raise Crash
        self.label = label
        self.at.release()
        assert self.go.acquire(timeout=PATIENCE)
        if self.dead:
            raise Crash
        fault, self.fault = self.fault, None
        if fault is not None:
            raise DatabaseError if "record" in label or "swap" in label else Unavailable("the backend is gone")

    def start(self, call):
        def run():
            try:
                self.result = call(self.lifecycle)
            except (StoreError, DatabaseError) as error:
                self.result = error
            except Crash:
                pass
            except BaseException as error:  # noqa: BLE001 - raised in the test
                self.failure = error
            finally:
                self.label = None
                self.running = None
                self.at.release()

        self.result = None
        self.running = threading.Thread(target=run, daemon=True)
        self.running.start()
        self._arrived()

    def _arrived(self):
        assert self.at.acquire(timeout=PATIENCE), "a worker does not come to its next step"
        if self.failure is not None:
            raise self.failure

    def advance(self, fault=None):
        """Take the next step, which fails if there is a fault. False when the call has come to its end."""
        self.fault = fault
        self.go.release()
        self._arrived()
        return self.running is not None

    def finish(self):
        while self.running is not None:
            self.advance()
        return self.result

    def crash(self):
        self.dead = True
        while self.running is not None:
            self.go.release()
            self._arrived()
        self.store.close()


class World:
    def __init__(self, images=("a", "b"), **options):
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.backend = Backend()
        self.repository = WatchedRepository()
        self.options = options
        self.names = Counter()
        self.workers = []
        self.janitor = self.worker("janitor", free=True)
        for image_id in images:
            self.janitor.lifecycle.create(Image(id=image_id, disk_format="raw", container_format="bare"))

    def worker(self, name, **options):
        self.names[name] += 1
        made = Worker(self, f"{name}{self.names[name]}", **self.options, **options)
        self.workers.append(made)
        return made

    def close(self):
        for worker in self.workers:
            worker.crash()

    def sleep(self, seconds):
        self.now += timedelta(seconds=seconds)

    def records(self):
        return self.repository.list_by_status(*ImageStatus)

    def check(self):
        """What holds at every moment."""
        known = set()
        for record in self.records():
            image = record.image
            for location in image.locations:
                stands = self.backend.images.get(location.uri.removeprefix("fake://host/"))
                if image.readable(administrator=True) or image.status == "pending_delete":
                    assert stands is not None, f"no data behind {image.id}, which is {image.status}"
                    assert len(stands[1]) == image.size
                    assert hashlib.sha256(stands[1]).hexdigest() == image.digests["sha256"]
                known.add(location.uri)
            for data in (record.upload, record.staged, *record.garbage):
                if data is not None:
                    known.add(data.uri)
            if image.status == "deleted":
                assert (record.upload, record.staged, record.garbage) == (None, None, ())
        # So nothing stands behind an image that is deleted.
        unknown = {f"fake://host/{name}" for name in self.backend.images} - known
        assert not unknown, f"data that no record knows of: {unknown}"

    def put_right(self):
        """What hosts do every now and then."""
        lifecycle = self.janitor.lifecycle
        results = [*lifecycle.recover(), *lifecycle.scrub()]
        assert not [result.error for result in results if result.error]
        self.check()

    def check_the_end(self):
        """Everybody is dead: what is left is put right by one who is not, whatever it is."""
        for worker in self.workers:
            if worker is not self.janitor and worker.running:
                worker.crash()
        self.sleep(2 * LEASE)
        self.put_right()
        for record in self.records():
            at_rest = record.staged is not None if record.image.status == "uploading" else True
            assert record.image.status not in {"saving", "importing"}
            assert at_rest
            assert record.worker is None, record
        self.sleep(2 * GRACE)
        self.put_right()
        self.janitor.lifecycle.scrub(thorough=True)
        self.check()
        for record in self.records():
            assert record.image.status != "pending_delete"
            assert not record.garbage
            if record.image.status in {"queued", "killed", "deleted"}:
                names = [name for name in self.backend.images if name.split(".")[0] == record.image.id]
                assert not names


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def failing(content):
    yield content[:50]
    raise OSError("the client is gone")


def prepared(world, *calls):
    for call in calls:
        with suppress(StoreError):
            call(world.janitor.lifecycle)


def upload(lifecycle):
    return lifecycle.upload("a", CONTENT[1])


def upload_that_fails(lifecycle):
    return lifecycle.upload("a", failing(CONTENT[1]))


def stage(lifecycle):
    return lifecycle.stage("a", CONTENT[1], store="s")


def import_staged(lifecycle):
    return lifecycle.import_image("a")


def import_other(lifecycle):
    return lifecycle.import_image("a", CONTENT[2])


def delete(lifecycle):
    return lifecycle.delete("a")


def delete_later(lifecycle):
    return lifecycle.delete("a", delayed=True)


def restore(lifecycle):
    return lifecycle.restore("a")


def scrub(lifecycle):
    return lifecycle.scrub()


def recover(lifecycle):
    return lifecycle.recover()


def deactivate(lifecycle):
    return lifecycle.deactivate("a")


STORIES = {
    "upload": ((), upload),
    "second upload": ((upload_that_fails,), upload),
    "failing upload": ((), upload_that_fails),
    "stage": ((), stage),
    "import staged": ((stage,), import_staged),
    "import other": ((), import_other),
    "delete": ((upload,), delete),
    "delete staged": ((stage,), delete),
    "delayed delete": ((upload, deactivate), delete_later),
    "restore": ((upload, delete_later), restore),
    "scrub": ((upload, delete_later), scrub),
}


def steps_of(before, call):
    """The steps that a story has."""
    world = World()
    try:
        prepared(world, *before)
        worker = world.worker("w")
        worker.start(call)
        labels = []
        while worker.running:
            labels.append(worker.label)
            worker.advance()
        return labels
    finally:
        world.close()


ALL_STEPS = [
    pytest.param(name, number, id=f"{name} {number} {label}")
    for name, (before, call) in STORIES.items()
    for number, label in enumerate(steps_of(before, call))
]


def begun(world, name, number):
    """A worker that is just about to take this step of the story."""
    before, call = STORIES[name]
    prepared(world, *before)
    worker = world.worker("w")
    worker.start(call)
    for _ in range(number):
        world.check()
        worker.advance()
    return worker


@pytest.mark.parametrize(("name", "number"), ALL_STEPS)
def test_a_crash_at_any_step(world, name, number):
    worker = begun(world, name, number)
    worker.crash()
    world.check()
    world.check_the_end()


@pytest.mark.parametrize(("name", "number"), ALL_STEPS)
def test_a_failure_at_any_step(world, name, number):
    worker = begun(world, name, number)
    worker.advance(fault=True)
    worker.finish()
    world.check()
    world.check_the_end()


@pytest.mark.parametrize(("name", "number"), ALL_STEPS)
def test_a_worker_that_sleeps_at_any_step_and_wakes_up(world, name, number):
    """It loses its lease, others put right what it left, and then it goes on."""
    worker = begun(world, name, number)
    world.sleep(2 * LEASE)
    world.put_right()
    while worker.running:
        worker.advance()
        world.check()
    world.check_the_end()


@pytest.mark.parametrize(("name", "number"), ALL_STEPS)
def test_a_worker_that_sleeps_while_the_image_is_uploaded_again_and_dies_then(world, name, number):
    worker = begun(world, name, number)
    world.sleep(2 * LEASE)
    world.put_right()
    prepared(world, upload)
    for _ in range(3):
        if worker.running:
            worker.advance()
            world.check()
    worker.crash()
    world.check_the_end()


@pytest.mark.parametrize(("name", "number"), ALL_STEPS)
def test_a_delete_at_any_step_of_another(world, name, number):
    worker = begun(world, name, number)
    deleter = world.worker("d")
    deleter.start(delete)
    while worker.running or deleter.running:
        for each in (worker, deleter):
            if each.running:
                each.advance()
                world.check()
    world.check_the_end()


@pytest.mark.parametrize("number", range(len(steps_of((), upload))))
def test_a_worker_that_wakes_up_at_any_step_of_recovering(number):
    going = True
    for steps in itertools.count():
        world = World()
        try:
            worker = begun(world, "upload", number)
            world.sleep(2 * LEASE)
            second = world.worker("r")
            second.start(recover)
            for _ in range(steps):
                going = second.running is not None and second.advance()
            for each in (worker, second):
                while each.running:
                    each.advance()
                    world.check()
            world.check_the_end()
        finally:
            world.close()
        if not going:
            break


@pytest.mark.parametrize("number", range(len(steps_of((), upload))))
def test_a_crash_at_any_step_of_recovering(world, number):
    """Of an upload that had come to its end, but for the record."""
    worker = world.worker("w")
    worker.start(upload)
    while world.backend.count("committed") == 0 and not world.backend.images:
        worker.advance()
    worker.crash()
    world.sleep(2 * LEASE)
    second = world.worker("w")
    second.start(recover)
    for _ in range(number):
        if second.running:
            second.advance()
    second.crash()
    world.sleep(2 * LEASE)
    world.put_right()
    image = world.janitor.lifecycle.get("a")
    assert (image.status, image.size) == ("active", len(CONTENT[1]))
    world.check_the_end()


class Workers(RuleBasedStateMachine):
    """Three workers, anything at any time."""

    options: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.world = World(**self.options)
        self.workers = [self.world.worker(f"w{number}") for number in range(3)]

    def teardown(self):
        try:
            self.world.check_the_end()
        finally:
            self.world.close()

    who = st.integers(0, 2)
    which = st.sampled_from("ab")

    def begin(self, who, call):
        worker = self.workers[who]
        if worker.running is None:
            worker.start(call)

    @rule(who=who, which=which, content=st.sampled_from(list(CONTENT.values())), fails=st.booleans())
    def upload(self, who, which, content, fails):
        self.begin(who, lambda lifecycle: lifecycle.upload(which, failing(content) if fails else content))

    @rule(who=who, which=which, content=st.sampled_from(list(CONTENT.values())))
    def stage(self, who, which, content):
        self.begin(who, lambda lifecycle: lifecycle.stage(which, content, store="s"))

    @rule(who=who, which=which, content=st.sampled_from([None, *CONTENT.values()]))
    def import_image(self, who, which, content):
        self.begin(who, lambda lifecycle: lifecycle.import_image(which, content))

    @rule(who=who, which=which, delayed=st.booleans())
    def delete(self, who, which, delayed):
        self.begin(who, lambda lifecycle: lifecycle.delete(which, delayed=delayed))

    @rule(who=who, which=which, name=st.sampled_from(["deactivate", "reactivate", "restore"]))
    def short(self, who, which, name):
        self.begin(who, lambda lifecycle: getattr(lifecycle, name)(which))

    @rule(who=who, name=st.sampled_from(["recover", "scrub"]))
    def care(self, who, name):
        self.begin(who, lambda lifecycle: getattr(lifecycle, name)())

    @rule(who=who, which=which)
    def read(self, who, which):
        def call(lifecycle):
            with lifecycle.open(which, administrator=True) as image:
                assert image.read() in CONTENT.values()

        self.begin(who, call)

    @rule(who=who, steps=st.integers(1, 12))
    def advance(self, who, steps):
        worker = self.workers[who]
        for _ in range(steps):
            if worker.running is not None:
                worker.advance()
                self.world.check()

    @rule(who=who)
    def fail(self, who):
        if self.workers[who].running is not None:
            self.workers[who].advance(fault=True)

    @rule(who=who)
    def crash(self, who):
        self.workers[who].crash()
        self.workers[who] = self.world.worker(f"w{who}")

    @rule(who=who)
    def renew(self, who):
        lifecycle = self.workers[who].lifecycle
        for hold in lifecycle._keeper.held():
            lifecycle._renew(hold)

    @rule(seconds=st.sampled_from([1, 40, 100]))
    def sleep(self, seconds):
        self.world.sleep(seconds)

    @invariant()
    def all_agree(self):
        self.world.check()


class KillingWorkers(Workers):
    """The other policy for uploads that fail."""

    options: ClassVar = {"kill_failed": True}


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=100, stateful_step_count=60)
TestKillingWorkers = KillingWorkers.TestCase
TestKillingWorkers.settings = settings(TestWorkers.settings, max_examples=30)
