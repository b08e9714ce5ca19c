"""Part four: what a driver may use, and what it must give back.

PYTEST_DONT_REWRITE: to compare megabytes is quick, to explain how they differ is not.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Final

from imagestore._models import Limits, Retry
from imagestore.errors import SourceError, StoreError, Unavailable
from imagestore.testing import _child
from imagestore.testing._data import pattern
from imagestore.testing._harness import NotApplicable
from imagestore.testing._kit import Kit, Task, eventually, raises
from imagestore.testing._registry import check

__all__: list[str] = []

WRITER: Final = ("create", "locate", "delete")

IO_EVENTS: Final = (
    "open",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.scandir",
    "os.truncate",
    "shutil.",
    "socket.",
    "sqlite3.",
    "subprocess.",
    "urllib.",
)


@check("discipline")
def constructor(kit: Kit) -> None:
    """Making a driver, and cloning one, does no I/O and starts no thread."""
    driver = kit.harness.make_driver()
    seen: list[str] = []
    before = threading.active_count()
    with _audit(seen):
        copy = driver.clone()
    assert not seen, f"the constructor does I/O: {seen}"
    assert threading.active_count() == before, "the constructor starts a thread"
    assert copy is not driver, "clone() must make another driver: this one can't be opened again"
    assert type(copy) is type(driver)
    assert copy.store == driver.store


@check("discipline")
def attempts_counted(kit: Kit) -> None:
    """One attempt of the store is one call of the driver, and errors tell how many there were."""
    location = kit.image(kit.data(0.5))
    for attempts in (1, 3):
        for operation in ("open", "stat", "read", *(verb for verb in ("locate", "delete") if verb in kit.verbs)):
            plan = kit.faults()
            plan.fail(operation, lambda: Unavailable("the kit broke the connection"), times=None)
            retry = Retry(attempts=attempts, first=0.001, longest=0.002)
            with raises(Unavailable) as caught:
                store = kit.store(plan, retry=retry)
                if operation == "locate":
                    store.locate(kit.new_id())
                elif operation == "stat":
                    store.stat(location)
                elif operation == "delete":
                    store.delete(location)
                else:
                    kit.read(location, store)
            assert plan.calls[operation] == attempts, f"{operation}: {plan.calls[operation]} calls for {attempts}"
            assert caught[0].attempts == attempts, f"{operation}: says {caught[0].attempts} attempts for {attempts}"


@check("discipline")
def no_hidden_retries(kit: Kit) -> None:
    """One attempt of the store is one request to the backend: neither the driver nor its library retries by itself."""
    location = kit.image(kit.data(0.5))
    store = kit.store(retry=Retry(attempts=3, first=0.001, longest=0.002))
    store.stat(location)
    kit.read(location, store)
    for operation in (store.stat, store.get):
        with kit.harness.failing() as requests:
            with raises(Unavailable):
                operation(location)
            assert requests() == 3, f"{requests()} requests for 3 attempts"
    store.stat(location)


@check("discipline")
def nothing_kept(kit: Kit) -> None:
    """After close() threads and descriptors are back where they were, whatever went wrong before."""
    data = kit.data()
    location = kit.image(data)
    gc.collect()
    _use(kit, data, location.uri)  # what is made once per process is made now
    gc.collect()
    threads, descriptors = threading.active_count(), _descriptors()
    for _ in range(3):
        _use(kit, data, location.uri)
    gc.collect()
    assert eventually(lambda: threading.active_count() <= threads, 2), (
        f"threads left: {[thread.name for thread in threading.enumerate()]}"
    )
    assert eventually(lambda: len(_descriptors()) <= len(descriptors), 2), (
        f"descriptors left: {sorted(set(_descriptors().items()) - set(descriptors.items()))}"
    )


def _use(kit: Kit, data: bytes, location: str) -> None:
    plan = kit.faults()
    store = kit.store(plan, observer=lambda event: None)
    reader = store.get(location)
    reader.read(10)
    reader.close()
    reader = store.get(location)
    reader.read(10)
    del reader  # forgotten, not closed
    assert kit.read(location, store) == data
    with raises(StoreError):
        store.get(location + "-not-there")
    if "create" in kit.verbs:
        image_id = kit.new_id()
        kit.add(image_id, data, store)

        def broken() -> Iterator[bytes]:
            yield data[: kit.block + 1]
            raise OSError("the source broke")

        with raises(SourceError):
            store.add(kit.new_id(), broken(), size=len(data))
        plan.fail("write", StoreError("the kit says so"), at=plan.calls["write"] + 2, times=None)
        with raises(StoreError):
            kit.add(kit.new_id(), data, store)
        store.delete(store.locate(image_id))
    if "list" in kit.verbs:
        list(store.list())
        next(iter(store.list()), None)
    if "uploads" in kit.verbs:
        list(store.uploads())
    kit.shut(store)


def _descriptors() -> dict[str, str]:
    try:
        names = os.listdir("/proc/self/fd")
    except OSError as error:
        raise NotApplicable("this system has no /proc/self/fd") from error
    found = {}
    for name in names:
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listed the directory
    return found


@check("discipline", *WRITER)
def memory(kit: Kit) -> None:
    """An image many times as large as the budget goes in and out within it."""
    limits = Limits(memory=4 * kit.block, memory_total=4 * kit.block, workers=4)
    piece = pattern(kit.block)
    count = 160 if kit.block < 1 << 20 else 32
    store = kit.store(limits=limits)
    kit.add(kit.new_id(), piece, store)
    image_id = kit.new_id()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        # Each a new object, so that it counts as long as anybody keeps it.
        pieces = (b"%016d" % number + piece[16:] for number in range(count))
        location = store.add(image_id, pieces, size=count * len(piece)).location
        kept, peak = (value - before for value in tracemalloc.get_traced_memory())
        # A backend that lives in this process keeps the image itself.
        slack = 2 << 20
        assert peak - max(kept, 0) <= 6 * kit.block + slack, (
            f"{peak - kept} bytes at the peak of an add, with a budget of {limits.memory}"
        )
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with store.get(location) as reader:
            size = sum(len(chunk) for chunk in reader)
        assert size == count * len(piece)
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak <= max(2 * kit.block, 16 << 20), f"{peak} bytes at the peak of a read"
    finally:
        tracemalloc.stop()


@check("discipline")
def many_reading_threads(kit: Kit) -> None:
    """One store serves eight reading threads at once."""
    store = kit.store()
    images = {seed: kit.data(1.3, seed=seed) for seed in range(8)}
    locations = {seed: kit.image(data) for seed, data in images.items()}

    def work(number: int) -> None:
        for seed in (number, *images):
            assert kit.read(locations[seed], store) == images[seed], "another thread's image"
            assert kit.read(locations[seed], store, start=5, stop=500) == images[seed][5:500]

    for task in [Task(lambda number=number: work(number)) for number in range(8)]:  # type: ignore[misc]  # bound early
        task.result()


@check("discipline", *WRITER)
def many_threads(kit: Kit) -> None:
    """One store serves eight adding, reading and deleting threads at once, and listings do not mind."""
    store = kit.store()
    store.exists(kit.new_id())
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for verb in ("list", "uploads", "usage"):
                if verb in kit.verbs:
                    told = getattr(store, verb)()
                    assert verb == "usage" or list(told) is not None

    def work(number: int) -> None:
        for turn in range(3):
            data = kit.data(1.3, seed=f"{number}.{turn}")
            image_id = kit.new_id()
            location = kit.add(image_id, data, store).location
            assert kit.read(location, store) == data, "another thread's image"
            assert kit.read(location, store, start=5, stop=500) == data[5:500]
            assert store.locate(image_id).uri == location.uri
            store.delete(location)

    looker = Task(look)
    try:
        for task in [Task(lambda number=number: work(number)) for number in range(8)]:  # type: ignore[misc]  # as above
            task.result()
    finally:
        over.set()
    looker.result()
    kit.assert_clean()


@check("discipline", *WRITER)
def first_use_from_many_threads(kit: Kit) -> None:
    """Threads that use a new store at the same moment open its driver once."""
    plan = kit.faults()
    plan.delay("open", 0.05)
    store = kit.store(plan)
    gate = threading.Barrier(8)

    def ask() -> bool:
        gate.wait(10)
        return store.exists(image_id)

    image_id = kit.new_id()
    assert not any(task.result() for task in [Task(ask) for _ in range(8)])
    assert plan.calls["open"] == 1, f"opened {plan.calls['open']} times"


@check("discipline")
def use_after_close(kit: Kit) -> None:
    """A store that was closed connects again when it is used again."""
    data = kit.data(1.3)
    location = kit.image(data)
    store = kit.store()
    assert kit.read(location, store) == data
    if kit.capabilities.needs_auth:
        raise NotApplicable("a bound view ends with its store")
    store.close()
    store.close()
    assert kit.read(location, store) == data


@check("discipline", *WRITER)
def fork(kit: Kit) -> None:
    """A store that is in use when the process forks works in both processes."""
    if not hasattr(os, "fork"):
        raise NotApplicable("this system has no fork")
    if kit.capabilities.needs_auth:
        raise NotApplicable("a bound view does not survive a fork")
    image_id = kit.new_id()
    for name in ("parent", "child"):
        kit.use_id(f"{image_id}-{name}")
    with _child.started(kit.harness, "forker", image_id=image_id, block=kit.block) as child:
        assert child.succeed() == ["done"]


@check("discipline")
def imports(kit: Kit) -> None:
    """Importing imagestore and the driver's module, and reading its options, pulls in no SDK."""
    driver = kit.harness.make_driver()
    module = type(driver).__module__
    if module == "__main__":
        raise NotApplicable("the driver is in the main script, which can't be imported")
    sdk = kit.harness.sdk
    code = (
        "import sys, imagestore\n"
        "from imagestore.testing._child import load\n"
        f"driver = getattr(load({module!r}, {sys.modules[module].__file__!r}), {type(driver).__name__!r})\n"
        "driver.options, driver.schemes, driver.name\n"
        f"print(*[name for name in {sdk!r} if name in sys.modules])\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(  # noqa: S603 - this Python, on the code above
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing {module} imports {done.stdout.split()}"


class _Audit:
    """One hook for the life of the process, because they can't be taken away; it does something only in a body."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.seen: list[str] = []
        self.installed = False

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.thread is not None and event.startswith(IO_EVENTS) and threading.get_ident() == self.thread:
            self.seen.append(f"{event}{arguments!r:.200}")


_auditor = _Audit()


class _audit:  # noqa: N801 - a context manager, used like a function
    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def __enter__(self) -> None:
        if not _auditor.installed:
            _auditor.installed = True
            sys.addaudithook(_auditor.hook)
        _auditor.seen = self._seen
        _auditor.thread = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        _auditor.thread = None
