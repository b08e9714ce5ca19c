"""The kit catches drivers that break the contract: each of these has one fault, and a check that must find it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import pytest

from imagestore.driver import (
    Block,
    Driver,
    Hints,
    Leftover,
    Location,
    Options,
    Reading,
    Stat,
    StoredImage,
    Upload,
    Usage,
)
from imagestore.drivers.filesystem import FilesystemDriver
from imagestore.drivers.memory import Backend, BackendError, MemoryDriver
from imagestore.errors import AlreadyExists, NotFound, StoreError
from imagestore.testing import Faults, FaultyDriver, Harness, NotApplicable, checks, run_check

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

CAUGHT = (AssertionError, StoreError, AttributeError)
CHECKS = {check.id: check for check in checks()}


class Mutant(FaultyDriver):
    """A good driver with one fault."""

    personality: ClassVar[str] = "plain"
    caught_by: ClassVar[str]

    def __init__(self, driver: Any, *_: object) -> None:
        super().__init__(driver, Faults())

    @property
    def inner(self) -> Any:
        return self._driver

    def clone(self) -> Driver:
        return type(self)(self.inner.clone())


class MutantUpload(Upload):
    """The upload of a good driver, for a mutant to change."""

    def __init__(self, upload: Upload) -> None:
        self.upload = upload
        self.location = upload.location

    def write(self, block: Block, /) -> None:
        self.upload.write(block)

    def commit(self, size: int, /) -> None:
        self.upload.commit(size)

    def abort(self) -> None:
        self.upload.abort()


MUTANTS: list[type[Mutant]] = []


def mutant(caught_by: str) -> Callable[[type[Mutant]], type[Mutant]]:
    def register(cls: type[Mutant]) -> type[Mutant]:
        cls.caught_by = caught_by
        MUTANTS.append(cls)
        return cls

    return register


@mutant("contract.image_one_byte")
class ReadsTooLittle(Mutant):
    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        reading: Reading = self.inner.read(location, start, stop, version=version)
        chunks = (chunk[:-1] for chunk in reading.chunks)
        return dataclasses.replace(reading, chunks=chunks)


@mutant("contract.ranges")
class IgnoresStart(Mutant):
    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        reading: Reading = self.inner.read(location, 0, None if stop is None else stop - start, version=version)
        return reading


@mutant("contract.image_several_blocks")
class WrongSize(Mutant):
    def stat(self, location: Location, /) -> Stat:
        stat: Stat = self.inner.stat(location)
        return dataclasses.replace(stat, size=stat.size + 1)


@mutant("contract.name_taken")
class NeverLocates(Mutant):
    def locate(self, image_id: str) -> None:
        return None


@mutant("contract.listing")
class ListsTwice(Mutant):
    def list(self) -> Iterator[StoredImage]:
        for image in self.inner.list():
            yield image
            yield image


@mutant("contract.usage")
class LiesAboutRoom(Mutant):
    def usage(self) -> Usage:
        return Usage(total=10, free=20)


class _Overwriting(MutantUpload):
    driver: Any

    def commit(self, size: int, /) -> None:
        try:
            self.upload.commit(size)
        except Exception as error:
            # Hands out the store's own error for what the good driver does with a native one.
            if not isinstance(self.driver.translate(error) or error, AlreadyExists):
                raise
            self.driver.delete(self.location)
            self.upload.commit(size)


@mutant("contract.racing_adders")
class Overwrites(Mutant):
    def create(self, image_id: str, hints: Hints) -> Upload:
        upload = _Overwriting(self.inner.create(image_id, hints))
        upload.driver = self.inner
        return upload


@mutant("contract.name_taken_meanwhile")
class OverwritesToo(Overwrites):
    pass


class _Dropping(MutantUpload):
    def write(self, block: Block, /) -> None:
        if block.index != 1:
            self.upload.write(block)


@mutant("contract.image_several_blocks")
class DropsABlock(Mutant):
    def create(self, image_id: str, hints: Hints) -> Upload:
        return _Dropping(self.inner.create(image_id, hints))


class _Arrival(MutantUpload):
    position = 0
    lock = threading.Lock()

    def write(self, block: Block, /) -> None:
        with self.lock:
            offset, self.position = self.position, self.position + len(block.data)
        self.upload.write(dataclasses.replace(block, offset=offset))


@mutant("contract.blocks_out_of_order")
class WritesAsTheyCome(Mutant):
    def create(self, image_id: str, hints: Hints) -> Upload:
        return _Arrival(self.inner.create(image_id, hints))


class _Appending(MutantUpload):
    def __init__(self, upload: Upload) -> None:
        super().__init__(upload)
        self.seen: set[int] = set()

    def write(self, block: Block, /) -> None:
        if block.offset in self.seen:
            block = dataclasses.replace(block, data=block.data[::-1])
        self.seen.add(block.offset)
        self.upload.write(block)


@mutant("faults.write_repeated_stored")
class RepeatsBadly(Mutant):
    def create(self, image_id: str, hints: Hints) -> Upload:
        return _Appending(self.inner.create(image_id, hints))


class _Hoarding(MutantUpload):
    def __init__(self, upload: Upload) -> None:
        super().__init__(upload)
        self.blocks: list[Block] = []

    def write(self, block: Block, /) -> None:
        self.blocks.append(block)

    def commit(self, size: int, /) -> None:
        for block in self.blocks:
            self.upload.write(block)
        self.upload.commit(size)
        self.blocks = []


class _Early(MutantUpload):
    driver: Any

    def commit(self, size: int, /) -> None:
        self.driver.delete(self.location)
        self.upload.commit(size)


@mutant("contract.unfinished_is_invisible")
class VisibleEarly(Mutant):
    def create(self, image_id: str, hints: Hints) -> Upload:
        early = self.inner.create(image_id, dataclasses.replace(hints, token="e" * 32))
        early.commit(0)
        upload = _Early(self.inner.create(image_id, hints))
        upload.driver = self.inner
        return upload


class _Stubborn(MutantUpload):
    def abort(self) -> None:
        pass


@mutant("faults.source_dies_middle")
class NeverAborts(Mutant):
    def create(self, image_id: str, hints: Hints) -> Upload:
        return _Stubborn(self.inner.create(image_id, hints))


@mutant("contract.declared_size")
class NeverAbortsEither(NeverAborts):
    pass


@mutant("leftovers.add_killed_after")
class ForgetsUploads(Mutant):
    def uploads(self) -> Iterator[Leftover]:
        return iter(())


@mutant("leftovers.add_killed_after")
class DiscardsNothing(Mutant):
    def discard(self, leftover: Leftover) -> None:
        pass


@mutant("leftovers.collect_spares_the_living")
class CallsTheLivingDead(Mutant):
    def uploads(self) -> Iterator[Leftover]:
        return (dataclasses.replace(item, alive=False) for item in self.inner.uploads())


@mutant("faults.collected_under_live_adder")
class HidesInsteadOfDiscarding(Mutant):
    hidden: ClassVar[set[str]] = set()

    def uploads(self) -> Iterator[Leftover]:
        return (item for item in self.inner.uploads() if item.token not in self.hidden)

    def discard(self, leftover: Leftover) -> None:
        self.hidden.add(leftover.token)


@mutant("leftovers.foreign_objects")
class TakesWhatHasNoMark(Mutant):
    def uploads(self) -> Iterator[Leftover]:
        yield from self.inner.uploads()
        for table, key in self.inner.backend.inventory():
            if not key.startswith("kit"):
                yield Leftover(token="f" * 32, key=(table, key))

    def discard(self, leftover: Leftover) -> None:
        if leftover.token == "f" * 32:
            self.inner.client.remove(*leftover.key)
        else:
            self.inner.discard(leftover)


@mutant("contract.delete_in_use")
class DeletesWhatIsHeld(Mutant):
    def delete(self, location: Location) -> None:
        self.inner.client.remove(self.inner.table, location.key[0])


@mutant("contract.not_found")
class DeletesNothingHappily(Mutant):
    def delete(self, location: Location) -> None:
        try:
            self.inner.delete(location)
        except Exception as error:
            # The very fault: the caller is not told that nothing was there.
            if not isinstance(self.translate(error) or error, NotFound):
                raise


@mutant("contract.tokens")
class NoProof(Mutant):
    def stat(self, location: Location, /) -> Stat:
        stat: Stat = self.inner.stat(location)
        return dataclasses.replace(stat, token="0" * 32)


@mutant("contract.versions")
class SameVersion(Mutant):
    def stat(self, location: Location, /) -> Stat:
        stat: Stat = self.inner.stat(location)
        return dataclasses.replace(stat, version=f"{stat.size}")


@mutant("faults.replaced_while_reading")
class NeverPins(Mutant):
    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        reading: Reading = self.inner.read(location, start, stop)
        return reading

    def extents(self, location: Location, start: int, stop: int, version: str | None) -> Iterator[tuple[int, int]]:
        areas: Iterator[tuple[int, int]] = self.inner.extents(location, start, stop, None)
        return areas


@mutant("contract.extents")
class LosesAnArea(Mutant):
    def extents(self, location: Location, start: int, stop: int, version: str | None) -> Iterator[tuple[int, int]]:
        return iter(list(self.inner.extents(location, start, stop, version))[:-1])


@mutant("contract.metadata")
class GarblesMetadata(Mutant):
    def stat(self, location: Location, /) -> Stat:
        stat: Stat = self.inner.stat(location)
        return dataclasses.replace(stat, metadata={key.upper(): value for key, value in stat.metadata.items()})


@mutant("contract.odd_ids")
class FoldsCase(Mutant):
    def create(self, image_id: str, hints: Hints) -> Upload:
        upload: Upload = self.inner.create(image_id.lower(), hints)
        return upload

    def locate(self, image_id: str) -> Location | None:
        location: Location | None = self.inner.locate(image_id.lower())
        return location


@mutant("contract.unreachable")
class TranslatesNothing(Mutant):
    def translate(self, error: Exception, /) -> StoreError | None:
        return None


@mutant("locations.hostile")
class AcceptsAnything(Mutant):
    def parse(self, uri: str, /) -> Location:
        location: Location = self.inner.parse("memory://kit/" + (uri.rstrip("/").rpartition("/")[2] or "x"))
        return location


@mutant("locations.mutated")
class FindsAnything(Mutant):
    def stat(self, location: Location, /) -> Stat:
        found = self.inner.locate(location.key[0])
        stat: Stat = Stat(size=1) if found is None else self.inner.stat(found)
        return stat


@mutant("locations.round_trip")
class KeepsTheText(Mutant):
    def parse(self, uri: str, /) -> Location:
        location: Location = self.inner.parse(uri)
        return dataclasses.replace(location, uri=uri)


@mutant("locations.pure_parse")
class ParsesOnlyWhenOpen(Mutant):
    def parse(self, uri: str, /) -> Location:
        assert self.inner.client
        location: Location = self.inner.parse(uri)
        return location


@mutant("discipline.constructor")
class LooksAround(Mutant):
    def __init__(self, driver: Any, *_: object) -> None:
        super().__init__(driver)
        os.listdir("/")


@mutant("discipline.nothing_kept")
class KeepsThreads(Mutant):
    def open(self) -> None:
        super().open()
        # More than those that earlier tests may have left, and that may end while this is looked at.
        for _ in range(20):
            threading.Thread(target=threading.Event().wait, daemon=True).start()


@mutant("discipline.nothing_kept")
class KeepsADescriptor(Mutant):
    kept: ClassVar[list[int]] = []

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        self.kept.append(os.open("/dev/null", os.O_RDONLY))
        reading: Reading = self.inner.read(location, start, stop, version=version)
        return reading


@mutant("discipline.constructor")
class IsItsOwnClone(Mutant):
    def clone(self) -> Driver:
        return self


@mutant("discipline.many_reading_threads")
class SharesAPosition(Mutant):
    last: ClassVar[Location | None] = None

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        type(self).last = location
        threading.Event().wait(0.002)
        assert type(self).last is not None
        reading: Reading = self.inner.read(type(self).last, start, stop, version=None)
        return reading


@mutant("discipline.no_hidden_retries")
class RetriesByItself(Mutant):
    def stat(self, location: Location, /) -> Stat:
        try:
            return super().stat(location)
        except BackendError:
            return super().stat(location)


@mutant("discipline.memory")
class Hoards(Mutant):
    # A backend in this process keeps all blocks anyway.
    personality = "file"

    def create(self, image_id: str, hints: Hints) -> Upload:
        return _Hoarding(self.inner.create(image_id, hints))


@mutant("contract.blocks_in_order")
class ClaimsOrder(Mutant):
    personality = "cinder"

    def create(self, image_id: str, hints: Hints) -> Upload:
        return _Dropping(self.inner.create(image_id, hints))


@mutant("contract.two_auths")
class MixesAuths(Mutant):
    personality = "cinder"

    def bind(self, auth: Any) -> Driver:
        if not hasattr(self, "first"):
            self.first = auth
        driver: Driver = self.inner.bind(self.first)
        return driver


@mutant("contract.verbs")
class CantCleanUp(Mutant):
    def __getattr__(self, name: str) -> Any:
        if name == "discard":
            raise AttributeError(name)
        return super().__getattr__(name)


@dataclasses.dataclass
class _Auth:
    project_id: str


class CountingBackend(Backend):
    requests = 0

    def _request(self, operation: str, session: int) -> Any:
        self.requests += 1
        return super()._request(operation, session)


class MutantHarness(Harness):
    def __init__(self, kind: type[Mutant] | None, personality: str) -> None:
        self.backend = CountingBackend()
        self.kind = kind
        self.personality = personality
        self.directory = tempfile.mkdtemp()

    def make_driver(self) -> Driver:
        return self._driver(self.backend)

    def make_unreachable(self) -> Driver:
        gone = Backend()
        gone.reachable = False
        return self._driver(gone)

    def close(self) -> None:
        shutil.rmtree(self.directory)

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        before = self.backend.requests
        self.backend.reachable = False
        yield lambda: self.backend.requests - before
        self.backend.reachable = True

    def plant_foreign(self) -> Callable[[], None]:
        driver = self.make_driver()
        inner: Any = driver._driver if isinstance(driver, FaultyDriver) else driver
        inner.open()
        untouched: Callable[[], None] = inner.plant_foreign()
        return untouched

    def hold(self, location: str) -> AbstractContextManager[None]:
        return self.backend.hold(location.rpartition("/")[2])

    auths_apart = True

    def auths(self) -> tuple[Any, Any]:
        return _Auth("one"), _Auth("two")

    def hostile_locations(self) -> tuple[str, ...]:
        return "memory://other/image", "memory://kit/../other/image"

    def _driver(self, backend: Backend) -> Driver:
        driver: Driver
        if self.personality == "file":
            values = {option.dest: option.default for option in FilesystemDriver.options}
            driver = FilesystemDriver(Options({**values, "datadir": self.directory, "fsync": False}), store="kit")
        else:
            values = {option.dest: option.default for option in MemoryDriver.options}
            settings = Options({**values, "personality": self.personality, "block_size": 65536})
            driver = MemoryDriver(settings, store="kit", backend=backend)
        return driver if self.kind is None else self.kind(driver)


@pytest.mark.parametrize("kind", MUTANTS, ids=lambda kind: kind.__name__)
def test_mutant_is_caught(kind: type[Mutant]) -> None:
    check = CHECKS[kind.caught_by]
    with contextlib.closing(MutantHarness(None, kind.personality)) as good:
        run_check(check, good)
    with contextlib.closing(MutantHarness(kind, kind.personality)) as bad, pytest.raises(CAUGHT):
        run_check(check, bad)


def test_kit_catches_in_every_part() -> None:
    assert {kind.caught_by.partition(".")[0] for kind in MUTANTS} == {check.part for check in checks()}


def test_not_applicable_is_not_a_catch() -> None:
    assert not issubclass(NotApplicable, CAUGHT)
    harness = MutantHarness(None, "plain")
    with contextlib.closing(harness), pytest.raises(NotApplicable, match="may be parallel"):
        run_check(CHECKS["contract.blocks_in_order"], harness)


class Copies(Mutant):
    """A good driver that can copy inside its backend."""

    def copy(self, location: Location, image_id: str, hints: Hints) -> Location:
        reading = self.inner.read(location, 0, None)
        data = b"".join(reading.chunks)
        reading.close()
        upload = self.inner.create(image_id, hints)
        for start in range(0, len(data), 65536):
            piece = data[start : start + 65536]
            upload.write(Block(index=start // 65536, offset=start, data=piece, last=start + len(piece) == len(data)))
        upload.commit(len(data))
        made: Location = upload.location
        return made


class CopiesOver(Copies):
    def copy(self, location: Location, image_id: str, hints: Hints) -> Location:
        if self.inner.locate(image_id) is not None:
            self.inner.delete(self.inner.locate(image_id))
        return super().copy(location, image_id, hints)


class CopiesTheName(Copies):
    def copy(self, location: Location, image_id: str, hints: Hints) -> Location:
        super().copy(location, image_id, hints)
        return location


class CopiesAndMoves(Copies):
    def copy(self, location: Location, image_id: str, hints: Hints) -> Location:
        made = super().copy(location, image_id, hints)
        self.inner.delete(location)
        return made


def test_copies_are_checked() -> None:
    check = CHECKS["contract.copied"]
    with contextlib.closing(MutantHarness(Copies, "plain")) as good:
        run_check(check, good)
    for kind in (CopiesOver, CopiesTheName, CopiesAndMoves):
        with contextlib.closing(MutantHarness(kind, "plain")) as bad, pytest.raises(CAUGHT):
            run_check(check, bad)
