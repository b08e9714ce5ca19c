"""What a check works with: stores over the harness's backend, fresh ids, and questions that many checks ask.

PYTEST_DONT_REWRITE: to compare megabytes is quick, to explain how they differ is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from imagestore._models import KIB, AddResult, Leftover, Location, Retry
from imagestore._store import Store
from imagestore.driver import Capabilities, Driver
from imagestore.errors import NotFound, StoreError
from imagestore.testing._data import chunks, pattern
from imagestore.testing._faulty import Faults, FaultyDriver, Killed
from imagestore.testing._harness import Harness, NotApplicable

__all__ = ["PATIENCE", "Kit", "Profile", "Rendezvous", "Task", "block_size", "probe", "raises"]

PATIENCE: Final = 120.0
"""Seconds after which something that should have happened counts as hanging."""

QUICK: Final = Retry(attempts=4, first=0.001, longest=0.01, total=PATIENCE)

VERBS: Final = (
    "locate",
    "create",
    "delete",
    "uploads",
    "discard",
    "list",
    "usage",
    "extents",
    "copy",
    "sign",
    "set_acls",
    "check_id",
    "bind",
)

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class Profile:
    """What a driver can do: decides which checks apply to it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver.name
        self.capabilities: Capabilities = driver.capabilities
        self.verbs = frozenset(verb for verb in VERBS if callable(getattr(driver, verb, None)))


def probe(harness: Harness) -> Profile:
    """Open a driver once and look at it."""
    driver = harness.make_driver()
    driver.open()
    try:
        return Profile(driver)
    finally:
        driver.close()


def block_size(capabilities: Capabilities) -> int:
    """The smallest convenient block that a driver allows."""
    size = max(64 * KIB, capabilities.block_min)
    if unit := capabilities.sparse_unit:
        size = -(-size // unit) * unit
    return min(size, capabilities.block_max or size)


@contextlib.contextmanager
def raises(*kinds: type[E]) -> Iterator[list[E]]:
    """Assert that the body raises one of these; the list then holds it."""
    caught: list[E] = []
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        yield caught
    except kinds as error:
        caught.append(error)
    except StoreError as error:
        raise AssertionError(f"raised {type(error).__name__} instead of {names}: {error}") from error
    if not caught:
        raise AssertionError(f"did not raise {names}")


class Task(Generic[T]):
    """A function in a thread, with its result or error; one that takes longer than ``patience`` seconds hangs."""

    def __init__(self, function: Callable[[], T], patience: float = PATIENCE) -> None:
        self._function = function
        self._patience = patience
        self._result: list[T] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="conformance", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits
            self.error = error

    def wait(self) -> BaseException | None:
        """Wait for the end; the error, if there was one."""
        self._thread.join(self._patience)
        assert not self._thread.is_alive(), f"still running after {self._patience:.0f} s"
        return self.error

    def result(self) -> T:
        error = self.wait()
        if error is not None:
            raise error
        return self._result[0]


class Rendezvous:
    """Lets racers wait for each other; whoever has left is not waited for any more."""

    def __init__(self, racers: int) -> None:
        self._change = threading.Condition()
        self._missing = racers

    def arrive(self, *_: object) -> None:
        """Wait until all others have arrived or left."""
        with self._change:
            self._missing -= 1
            self._change.notify_all()
            assert self._change.wait_for(lambda: self._missing <= 0, PATIENCE), "the other racer never came"

    def leave(self) -> None:
        with self._change:
            self._missing -= 1
            self._change.notify_all()


class Kit:
    """For one check: makes stores, remembers what was added, and takes everything away at the end.

    Attributes:
        harness: the driver's harness.
        capabilities, verbs: of the driver.
        block: block length in bytes that the kit's stores use: small, so that several are cheap.
    """

    def __init__(self, harness: Harness, profile: Profile | None = None) -> None:
        self.harness = harness
        self.profile = profile or probe(harness)
        self.capabilities = self.profile.capabilities
        self.verbs = self.profile.verbs
        self.block = block_size(self.capabilities)
        self._exits = contextlib.ExitStack()
        self._ids: list[str] = []
        self._plain: Store | None = None
        self._owners: dict[int, Store] = {}
        self._known: set[str] = set()

    # Stores

    def store(
        self,
        faults: Faults | None = None,
        *,
        changes: dict[str, Any] | None = None,
        auth: Any = None,
        **options: Any,
    ) -> Store:
        """A new store with its own driver; with ``faults`` between the two, and ``changes`` to its capabilities.

        Where the driver needs an ``auth``, the store is bound to the harness's first one.
        """
        driver = self.harness.make_driver()
        if faults is not None or changes:
            driver = FaultyDriver(driver, faults or Faults(), changes)
        store = self.wrap(driver, **options)
        if self.capabilities.needs_auth:
            view = store.bind(self.harness.auths()[0] if auth is None else auth)
            self._owners[id(view)] = store
            return view
        return store

    def shut(self, store: Store) -> None:
        """Close a store that `store` made; the one below, if it is a bound view."""
        self._owners.get(id(store), store).close()

    def wrap(self, driver: Driver, **options: Any) -> Store:
        """A store over this very driver, not bound. It is closed at the end of the check."""
        store = Store(driver, **{"name": "kit", "retry": QUICK, "_block_size": self.block, **options})
        self._exits.callback(store.close)
        return store

    @property
    def plain(self) -> Store:
        """A store without faults, for looking at what is there."""
        if self._plain is None:
            self._plain = self.store()
        return self._plain

    @contextlib.contextmanager
    def driver(self) -> Iterator[Any]:
        """The bare driver, opened and bound: for verbs that the store has no call for."""
        driver = self.harness.make_driver()
        driver.open()
        try:
            bind = getattr(driver, "bind", None)
            yield bind(self.harness.auths()[0]) if bind and self.capabilities.needs_auth else driver
        finally:
            driver.close()

    # Images

    def new_id(self, note: str = "") -> str:
        """An id that was never used; what is there under it at the end is deleted."""
        made = f"kit-{note}{'-' if note else ''}{uuid.uuid4().hex[:16]}"
        self._ids.append(made)
        return made

    def use_id(self, image_id: str) -> str:
        """Let the check use this very id."""
        self._ids.append(image_id)
        return image_id

    def add(self, image_id: str, data: bytes, store: Store | None = None, **options: Any) -> AddResult:
        """Add ``data`` from an iterable, with its size known unless told otherwise."""
        return (store or self.plain).add(image_id, chunks(data), **{"size": len(data), **options})

    def image(self, data: bytes, image_id: str | None = None) -> Location:
        """An image with these bytes, also in a backend that can only be read."""
        if "create" in self.verbs:
            return self.add(image_id or self.new_id(), data).location
        return self.plain.parse(self.harness.plant(data))

    def data(self, blocks: float = 3.3, seed: int | str = 0) -> bytes:
        """Contents for an image of so many blocks."""
        return pattern(int(blocks * self.block), seed)

    def add_mortally(self, image_id: str, data: bytes, plan: Faults) -> None:
        """Add through a plan that kills, and end the dead process's connections."""
        stores: list[Store] = []
        with contextlib.suppress(Killed, StoreError):
            stores.append(self.store(plan))
            self.add(image_id, data, stores[0])
        self.drop(*stores)

    def drop(self, *stores: Store) -> None:
        """What the end of a process does to its connections."""
        for store in stores:
            with contextlib.suppress(Killed, StoreError):
                self.shut(store)

    def read(self, location: Location | str, store: Store | None = None, **options: Any) -> bytes:
        with (store or self.plain).get(location, **options) as reader:
            return b"".join(reader)

    def assert_whole(self, image_id: str, data: bytes) -> None:
        """The image is there, with these bytes, by every way of asking."""
        found = self.plain.locate(image_id)
        assert self.plain.exists(image_id), f"{image_id}: located, but exists() says no"
        assert self.plain.get_size(found) == len(data), "wrong size"
        got = self.read(found)
        assert got == data, (
            f"the bytes read differ from those stored: {len(got)} for {len(data)}, {first_difference(got, data)}"
        )

    def assert_absent(self, image_id: str, location: Location | None = None) -> None:
        """Nothing can be located, listed or read."""
        with raises(NotFound):
            self.plain.locate(image_id)
        assert not self.plain.exists(image_id), f"{image_id} is readable, although it must not be"
        if location is not None:
            for ask in (self.plain.get, self.plain.stat, self.plain.get_size):
                with raises(NotFound):
                    ask(location)
        if "list" in self.verbs:
            assert image_id not in {image.image_id for image in self.plain.list()}, f"{image_id} is listed"

    def assert_whole_or_absent(self, image_id: str, data: bytes) -> bool:
        """All or nothing. True if it is there."""
        if self.plain.exists(image_id):
            self.assert_whole(image_id, data)
            return True
        self.assert_absent(image_id)
        return False

    # Leftovers

    def leftovers(self) -> list[Leftover]:
        """What ``uploads`` lists, but for what was there when the check first looked."""
        if "uploads" not in self.verbs:
            return []
        return [item for item in self.plain.uploads() if item.token not in self._known]

    def assert_clean(self) -> None:
        """No upload has left anything."""
        left = self.leftovers()
        assert not left, f"left behind: {left}"

    def sweep(self, *, include_alive: bool = True, store: Store | None = None) -> list[Leftover]:
        """Collect everything, whatever its age."""
        if "discard" not in self.verbs:
            return []
        return (store or self.plain).collect(older_than=0, include_alive=include_alive)

    # Life

    def start(self) -> None:
        """Called before the check: what is there already is not its fault."""
        if "uploads" in self.verbs:
            self._known = {item.token for item in self.plain.uploads()}

    def close(self) -> None:
        """Called after the check: delete what it added, collect what it left, close its stores."""
        try:
            with contextlib.suppress(StoreError, NotApplicable):
                for image_id in self._ids:
                    with contextlib.suppress(StoreError):
                        self.plain.delete(self.plain.locate(image_id))
                if self.leftovers():
                    self.sweep()
        finally:
            self._exits.close()

    def faults(self) -> Faults:
        """An empty plan; what a killed store leaves open in this process is given up at the end."""
        plan = Faults()
        self._exits.callback(plan.bury)
        return plan


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def first_difference(one: bytes, other: bytes) -> str:
    """Where two images part, for a message."""
    for start in range(0, min(len(one), len(other)), 4096):
        if one[start : start + 4096] != other[start : start + 4096]:
            place = next(i for i in range(start, start + 4096) if one[i : i + 1] != other[i : i + 1])
            return f"first at byte {place}"
    return f"one ends at {min(len(one), len(other))}"


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait until ``condition`` holds; False if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
