"""Part two: what must hold when the source, the backend or the way between them fails.

A `FaultyDriver` stands between the store and the driver; what it lets through, the real backend does.

PYTEST_DONT_REWRITE: to compare megabytes is quick, to explain how they differ is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imagestore._models import AbortFailed, Event, Retried, Timeouts
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    DigestMismatch,
    InUse,
    NotFound,
    PermissionDenied,
    SignatureMismatch,
    SourceError,
    StoreError,
    StoreFull,
    Unavailable,
)
from imagestore.testing._data import CountingSource, chunks
from imagestore.testing._faulty import Call, Faults
from imagestore.testing._harness import NotApplicable
from imagestore.testing._kit import QUICK, Kit, Task, eventually, raises, sha256
from imagestore.testing._registry import check, variants

__all__: list[str] = []

WRITER: Final = ("create", "locate", "delete")


class Native(Exception):
    """An error that no driver knows."""


def broken() -> Unavailable:
    return Unavailable("the kit broke the connection")


# The source


@variants("faults", *WRITER, start=0, middle=1.5, block_end=2, end=3.3)
def source_dies(kit: Kit, blocks: float) -> None:
    """A source that fails leaves no image, however far it came: `SourceError` with its own error as the cause."""
    data = kit.data()
    image_id = kit.new_id()
    fault = Native("the source broke")

    def source() -> Iterator[bytes]:
        yield from chunks(data[: int(blocks * kit.block)])
        raise fault

    with raises(SourceError) as caught:
        kit.plain.add(image_id, source(), size=len(data))
    assert caught[0].__cause__ is fault, "the source's own error is not the cause"
    assert not caught[0].temporary
    kit.assert_absent(image_id)
    kit.assert_clean()
    kit.add(image_id, data)
    kit.assert_whole(image_id, data)


@check("faults", *WRITER)
def interrupted(kit: Kit) -> None:
    """Ctrl-C in the middle of an image takes everything back and comes through as it is."""
    data = kit.data()
    image_id = kit.new_id()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with raises(KeyboardInterrupt):
        kit.plain.add(image_id, CountingSource(data, at={kit.block + 5: interrupt}), size=len(data))
    kit.assert_absent(image_id)
    kit.assert_clean()


@check("faults", *WRITER)
def cancelled(kit: Kit) -> None:
    """A cancelled image leaves nothing."""
    data = kit.data()
    image_id = kit.new_id()
    cancel = threading.Event()
    with raises(Cancelled):
        kit.plain.add(image_id, CountingSource(data, at={kit.block + 5: cancel.set}), size=len(data), cancel=cancel)
    kit.assert_absent(image_id)
    kit.assert_clean()


@check("faults", *WRITER)
def verifier_refuses(kit: Kit) -> None:
    """An image that the host's verifier refuses is never visible; the verifier saw all its bytes in order."""
    data = kit.data()
    image_id = kit.new_id()

    class Refusing:
        seen = b""

        def update(self, part: bytes) -> None:
            self.seen += part

        def verify(self) -> None:
            kit.assert_absent(image_id)
            raise ValueError("bad signature")

    verifier = Refusing()
    with raises(SignatureMismatch):
        kit.add(image_id, data, verifier=verifier)
    assert verifier.seen == data
    kit.assert_absent(image_id)
    kit.assert_clean()


@check("faults", *WRITER)
def progress_raises(kit: Kit) -> None:
    """A progress function that fails does not break the transfer."""
    data = kit.data()
    image_id = kit.new_id()
    calls: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        calls.append((done, total))
        raise Native("the progress function broke")

    with _quiet_log():
        location = kit.add(image_id, data, progress=progress).location
        assert calls, "progress was never called"
        assert kit.read(location, progress=progress) == data
    kit.assert_whole(image_id, data)
    calls.clear()
    kit.add(kit.new_id(), data, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(data), len(data)), f"the last progress was {calls[-1]}"
    assert calls == sorted(calls), "progress went backwards"


@check("faults", *WRITER)
def observer_raises(kit: Kit) -> None:
    """An observer that fails does not break the transfer."""
    data = kit.data()
    image_id = kit.new_id()
    seen: list[Event] = []

    def observe(event: Event) -> None:
        seen.append(event)
        raise Native("the observer broke")

    with _quiet_log():
        store = kit.store(observer=observe)
        kit.add(image_id, data, store)
        assert eventually(lambda: len(seen) > 1), "the observer was not called again after it had failed"
        kit.assert_whole(image_id, data)


# Writing


@variants("faults", *WRITER, lost=False, stored=True)
def write_repeated(kit: Kit, stored: bool) -> None:
    """A block that failed for a moment, whether it was stored or not, is written again: the image is right."""
    data = kit.data()
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("write", broken, at=2, times=2, after=stored)
    events: list[Event] = []
    store = kit.store(plan, observer=events.append)
    if kit.capabilities.repeatable_writes:
        kit.add(image_id, data, store)
        kit.assert_whole(image_id, data)
        blocks = {call.arguments[0].offset for call in plan.log if call.operation == "write"}
        assert plan.calls["write"] == len(blocks) + 2, "not exactly one more attempt for each failure"
        assert eventually(lambda: len([event for event in events if isinstance(event, Retried)]) == 2), events
    else:
        with raises(Unavailable) as caught:
            kit.add(image_id, data, store)
        assert caught[0].temporary, "the whole add may succeed later"
        kit.assert_absent(image_id)
    kit.assert_clean()


@check("faults", *WRITER)
def write_never_succeeds(kit: Kit) -> None:
    """A block that can't be written ends the add after the attempts allowed, and nothing stays."""
    image_id = kit.new_id()
    plan = kit.faults()
    # One particular block, so that attempts for other blocks that are written at the same time don't count.
    plan.on("write", lambda call: _raise(broken()) if call.arguments[0].offset == 0 else None, times=None)
    with raises(Unavailable) as caught:
        kit.add(image_id, kit.data(), kit.store(plan))
    attempts = len([call for call in plan.log if call.operation == "write" and call.arguments[0].offset == 0])
    assert attempts == (QUICK.attempts if kit.capabilities.repeatable_writes else 1), f"{attempts} attempts"
    assert caught[0].operation == "write"
    assert caught[0].store == "kit"
    assert caught[0].driver == kit.profile.driver
    assert plan.calls["commit"] == 0
    kit.assert_absent(image_id)
    kit.assert_clean()


@variants("faults", *WRITER, first=1, second=2, last=4)
def write_refused(kit: Kit, number: int) -> None:
    """An error that is not temporary ends the add at once, and nothing stays."""
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("write", lambda: StoreFull("the kit says so"), at=number, times=None)
    with raises(StoreFull) as caught:
        kit.add(image_id, kit.data(), kit.store(plan))
    assert not caught[0].temporary
    assert plan.calls["commit"] == 0
    assert plan.calls["abort"] >= 1
    kit.assert_absent(image_id)
    kit.assert_clean()


@check("faults")
def unknown_errors(kit: Kit) -> None:
    """An error that nobody knows is a `StoreError` that tells where it was, with the native one as its cause."""
    data = kit.data(1.5)
    there = kit.image(data)
    writing = ("locate", "create", "write", "commit", "delete") if "create" in kit.verbs else ()
    for operation in ("open", "stat", "read", "chunk", *writing):
        plan = kit.faults()
        fault = Native(operation)
        plan.fail(operation, lambda fault=fault: fault, times=None)  # type: ignore[misc]  # bound early
        image_id = kit.new_id()
        caught: list[StoreError] = []
        try:
            store = kit.store(plan)
            if operation == "delete":
                store.delete(there)
            elif operation in writing:
                kit.add(image_id, data, store)
            elif operation == "stat":
                store.stat(there)
            else:
                kit.read(there, store)
        except StoreError as error:
            caught.append(error)
        assert caught, f"an error in {operation} was swallowed"
        assert caught[0].__cause__ is fault, f"{operation}: the cause is {caught[0].__cause__!r}"
        assert caught[0].operation in (operation, "read"), f"{operation}: says it was {caught[0].operation}"
        assert caught[0].store == "kit"
        assert caught[0].driver == kit.profile.driver
        if writing:
            kit.assert_absent(image_id)
    assert kit.read(there) == data
    kit.assert_clean()


@variants("faults", *WRITER, lost=False, made=True)
def create_in_doubt(kit: Kit, made: bool) -> None:
    """A create that failed for a moment is repeated where that is safe; what it made is never lost sight of."""
    data = kit.data(1.5)
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("create", broken, after=made)
    error = _attempt(kit, image_id, data, plan)
    if kit.capabilities.repeatable_create:
        assert error is None, f"a create that may be repeated was not: {error!r}"
        kit.assert_whole(image_id, data)
    else:
        assert isinstance(error, Unavailable), f"raised {error!r}"
        assert error.temporary
        assert plan.calls["create"] == 1, "a create that can't be repeated was"
        kit.assert_absent(image_id)
    plan.bury()
    kit.sweep()
    kit.assert_clean()
    if error is not None:
        kit.add(image_id, data)
    kit.assert_whole(image_id, data)


@check("faults", *WRITER)
def questions_repeated(kit: Kit) -> None:
    """Questions to the backend that failed for a moment are asked again."""
    data = kit.data(1.5)
    image_id = kit.new_id()
    for operation in ("locate", "open", "stat"):
        plan = kit.faults()
        plan.fail(operation, broken, times=2)
        store = kit.store(plan)
        if operation == "locate":
            kit.add(image_id, data, store)
        else:
            assert store.stat(kit.plain.locate(image_id)).size == len(data)
        assert plan.calls[operation] >= 3
    kit.assert_whole(image_id, data)


# Committing


@variants("faults", *WRITER, lost=False, done=True)
def commit_in_doubt(kit: Kit, done: bool) -> None:
    """A commit whose answer was lost is looked into: never a false success, never a lost image."""
    data = kit.data(2.5)
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("commit", broken, after=done)
    error = _attempt(kit, image_id, data, plan)
    if not done or kit.capabilities.commit_proof:
        assert error is None, f"the commit could be decided, but add raised {error!r}"
    if error is None:
        kit.assert_whole(image_id, data)
    else:
        assert isinstance(error, StoreError), f"raised {error!r}"
        kit.assert_whole_or_absent(image_id, data)
    kit.sweep()
    kit.assert_clean()
    if done or error is None:
        kit.assert_whole(image_id, data)


@variants("faults", *WRITER, lost=False, done=True)
def commit_never_answers(kit: Kit, done: bool) -> None:
    """A backend that never answers a commit makes an error, or a success only if the image is really there."""
    data = kit.data(2.5)
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("commit", broken, times=None, after=done)
    error = _attempt(kit, image_id, data, plan)
    if done:
        if kit.capabilities.commit_proof:
            assert error is None, f"the commit took effect and can be proved, but add raised {error!r}"
        kit.assert_whole(image_id, data)
    else:
        assert isinstance(error, Unavailable), f"raised {error!r}"
        assert error.temporary
        assert plan.calls["commit"] == QUICK.attempts, f"{plan.calls['commit']} attempts"
        kit.assert_absent(image_id)
        kit.assert_clean()


@check("faults", *WRITER, when=lambda caps: caps.collision != "last-wins", reason="its last adder wins")
def commit_in_doubt_with_rival(kit: Kit) -> None:
    """If a rival's image is there after a commit in doubt, it is not taken for ours and not harmed."""
    image_id = kit.new_id()
    ours, theirs = kit.data(2.5, seed="ours"), kit.data(2.5, seed="theirs")
    plan = kit.faults()
    refused: list[bool] = []

    def rival(call: Call) -> None:
        try:
            kit.add(image_id, theirs, kit.store())
        except AlreadyExists:
            refused.append(True)

    plan.on("commit", rival)
    plan.fail("commit", broken)
    error = _attempt(kit, image_id, ours, plan)
    if refused:
        raise NotApplicable("an unfinished upload holds its id, so that no rival can come first")
    assert isinstance(error, StoreError), "the rival's image was taken for ours"
    if kit.capabilities.commit_proof:
        assert isinstance(error, AlreadyExists), f"raised {error!r}"
    kit.assert_whole(image_id, theirs)
    kit.sweep()
    kit.assert_whole(image_id, theirs)
    kit.assert_clean()


@check("faults", *WRITER)
def look_after_doubt_fails(kit: Kit) -> None:
    """If after a commit in doubt the backend does not answer at all, nothing is taken back blindly."""
    data = kit.data(2.5)
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("commit", broken, times=None, after=True)
    plan.fail("stat", broken, times=None)
    plan.fail("locate", broken, at=2, times=None)
    error = _attempt(kit, image_id, data, plan)
    assert isinstance(error, StoreError), "success without any answer"
    assert error.temporary
    kit.assert_whole(image_id, data)


@check("faults", *WRITER)
def commit_refused(kit: Kit) -> None:
    """A commit that the backend refuses for good leaves nothing."""
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("commit", lambda: PermissionDenied("the kit says so"))
    error = _attempt(kit, image_id, kit.data(2.5), plan)
    assert isinstance(error, PermissionDenied), f"raised {error!r}"
    assert plan.calls["commit"] == 1
    kit.assert_absent(image_id)
    kit.assert_clean()


# Taking back


@check("faults", *WRITER)
def closed_while_adding(kit: Kit) -> None:
    """If the store is closed under a transfer, the add fails or is whole; nothing hangs, and what is left is listed."""
    data = kit.data(6)
    image_id = kit.new_id()
    store = kit.store()
    task = Task(
        lambda: store.add(image_id, CountingSource(data, at={kit.block + 5: lambda: kit.shut(store)}), size=len(data))
    )
    error = task.wait()
    assert error is None or isinstance(error, StoreError), f"raised {error!r}"
    there = kit.assert_whole_or_absent(image_id, data)
    assert there is (error is None), f"add raised {error!r}, and the image is {'there' if there else 'not there'}"
    kit.sweep()
    kit.assert_clean()


@check("faults", *WRITER, "uploads", "discard")
def abort_fails(kit: Kit) -> None:
    """If a failed upload can't be taken back there is an event, the first error stays, and collect removes it."""
    image_id = kit.new_id()
    plan = kit.faults()
    plan.fail("write", lambda: StoreFull("the kit says so"), at=2, times=None)
    plan.fail("abort", lambda: PermissionDenied("the kit says so"), times=None)
    events: list[Event] = []
    store = kit.store(plan, observer=events.append, timeouts=Timeouts(abort=0.5))
    with raises(StoreFull):
        kit.add(image_id, kit.data(), store)
    assert eventually(lambda: any(isinstance(event, AbortFailed) for event in events)), events
    token = next(event.token for event in events if isinstance(event, AbortFailed))
    assert token == next(call.arguments[1].token for call in plan.log if call.operation == "create")
    kit.assert_absent(image_id)
    if not kit.harness.vanishing:
        assert token in {item.token for item in kit.leftovers()}, "uploads() does not list what could not be aborted"
        assert token in {item.token for item in kit.sweep()}, "collect() did not remove it"
    plan.bury()
    kit.assert_clean()


@check("faults", *WRITER, "uploads", "discard")
def collected_under_live_adder(kit: Kit) -> None:
    """If an upload is collected while it runs, its add fails, and nothing of it is ever visible."""
    if kit.harness.vanishing:
        raise NotApplicable("its unfinished uploads have no name that could be collected")
    for offset in (1, kit.block + 1, len(kit.data())):
        image_id, data = kit.new_id(), kit.data()
        collected: list[int] = []

        def collect(collected: list[int] = collected) -> None:
            collected.append(len(kit.sweep(include_alive=True)))

        source = CountingSource(data, at={offset: collect})
        with raises(StoreError):
            kit.plain.add(image_id, source, size=len(data))
        assert collected[0] >= 1, "collect(include_alive=True) found no upload"
        kit.assert_absent(image_id)
        kit.assert_clean()


@check("faults", *WRITER)
def delete_in_doubt(kit: Kit) -> None:
    """A delete whose answer was lost has succeeded if the image is gone."""
    location = kit.add(kit.new_id(), kit.data(1.5)).location
    plan = kit.faults()
    plan.fail("delete", broken, after=True)
    kit.store(plan).delete(location)
    with raises(NotFound):
        kit.plain.stat(location)


@check("faults", *WRITER)
def delete_refused(kit: Kit) -> None:
    """A delete that is refused leaves the image as it was."""
    image_id, data = kit.new_id(), kit.data(1.5)
    location = kit.add(image_id, data).location
    plan = kit.faults()
    plan.fail("delete", lambda: PermissionDenied("the kit says so"), times=None)
    with raises(PermissionDenied):
        kit.store(plan).delete(location)
    assert plan.calls["delete"] == 1
    kit.assert_whole(image_id, data)


# Reading


@check("faults")
def read_resumed(kit: Kit) -> None:
    """A read that breaks goes on where it was, of the same version of the image."""
    data = kit.data()
    location = kit.image(data)
    cuts = (1, kit.block - 1, 3, 2 * kit.block)
    plan = kit.faults()
    for length in cuts:
        plan.cut(length, broken)
    assert kit.read(location, kit.store(plan)) == data
    reads = [call.arguments for call in plan.log if call.operation == "read"]
    assert len(reads) >= len(cuts), "the kit's cuts did not happen"
    version = kit.plain.stat(location).version
    for _, start, _, pinned in reads[1:]:
        assert pinned == version, "a resumed read is not pinned to the version"
        assert kit.capabilities.ranged_reads or start == 0
    if kit.capabilities.ranged_reads and "extents" not in kit.verbs:
        assert [start for _, start, _, _ in reads][:3] == [0, 1, kit.block], "a resumed read began elsewhere"


@check("faults")
def read_breaks_at_once(kit: Kit) -> None:
    """A read that can't be opened for a moment is opened again; one that never can is an error."""
    data = kit.data(1.5)
    location = kit.image(data)
    plan = kit.faults()
    plan.fail("read", broken, times=2)
    assert kit.read(location, kit.store(plan)) == data
    plan = kit.faults()
    plan.fail("read", broken, times=None)
    with raises(Unavailable) as caught:
        kit.read(location, kit.store(plan))
    assert caught[0].attempts == QUICK.attempts == plan.calls["read"]


@check("faults")
def short_read(kit: Kit) -> None:
    """A backend that ends too early is read on, or is an error; a short image never looks like a whole one."""
    data = kit.data()
    location = kit.image(data)
    plan = kit.faults()
    plan.cut(kit.block + 5, None)
    assert kit.read(location, kit.store(plan)) == data
    plan = kit.faults()
    plan.cut(0, None, times=100)
    with raises(StoreError):
        kit.read(location, kit.store(plan))
    plan = kit.faults()
    plan.cut(1000, None)
    plan.cut(0, None, times=100)
    with raises(StoreError):
        kit.read(location, kit.store(plan), start=10, stop=2000)


@check("faults")
def read_cancelled(kit: Kit) -> None:
    """A read can be cancelled, also while it waits for its next attempt."""
    location = kit.image(kit.data())
    cancel = threading.Event()
    with kit.plain.get(location, cancel=cancel) as reader:
        reader.read(10)
        cancel.set()
        with raises(Cancelled):
            while reader.read(kit.block):
                pass


@check("faults")
def download_fails(kit: Kit) -> None:
    """A download that fails leaves no file, and one of other bytes than expected is a failure."""
    data = kit.data()
    location = kit.image(data)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "image")
        plan = kit.faults()
        plan.cut(1000, lambda: PermissionDenied("the kit says so"))
        with raises(PermissionDenied):
            kit.store(plan).download(location, path)
        with raises(DigestMismatch):
            kit.plain.download(location, path, expected={"sha256": sha256(b"other")})
        assert not os.listdir(directory), f"left behind: {os.listdir(directory)}"
        plan = kit.faults()
        plan.cut(1000, broken)
        plan.cut(0, None)
        kit.store(plan).download(location, path, expected={"sha256": sha256(data)})
        assert path.read_bytes() == data
        with raises(AlreadyExists):
            kit.plain.download(location, path)
        assert os.listdir(directory) == ["image"]


@check("faults", *WRITER)
def replaced_while_reading(kit: Kit) -> None:
    """A read never goes on with the bytes of another image: `Changed`, whether it breaks or not."""
    data, other = kit.data(seed="one"), kit.data(seed="other")
    image_id = kit.new_id()
    location = kit.add(image_id, data).location
    if kit.plain.stat(location).version is None:
        raise NotApplicable("it knows no versions")

    def replace() -> None:
        with _busy():
            kit.plain.delete(kit.plain.locate(image_id))
        kit.add(image_id, other)

    plan = kit.faults()
    plan.cut(kit.block, broken)
    with kit.store(plan).get(location) as reader:
        assert reader.read(10) == data[:10]
        replace()
        with raises(Changed, NotFound):
            reader.read()
    kit.assert_whole(image_id, other)

    location = kit.plain.locate(image_id)
    with kit.plain.get(location) as reader:
        got = reader.read(10)
        with _busy():
            kit.plain.delete(location)
        kit.add(image_id, data)
        with contextlib.suppress(Changed, NotFound):
            got += reader.read()
            assert got == other, "the bytes of two images were mixed"


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    try:
        yield
    except InUse as error:
        raise NotApplicable("an image can't be deleted while it is read") from error


def _attempt(kit: Kit, image_id: str, data: bytes, plan: Faults) -> StoreError | None:
    try:
        kit.add(image_id, data, kit.store(plan))
    except StoreError as error:
        return error
    return None


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Without the log's word on what is made to fail here."""
    logger = logging.getLogger("imagestore")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _raise(error: Exception) -> None:
    raise error
