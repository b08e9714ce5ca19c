"""Part one: what every driver must do when nothing goes wrong.

PYTEST_DONT_REWRITE: to compare megabytes is quick, to explain how they differ is not.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from imagestore._models import Retry
from imagestore.driver import Block, Capabilities, Driver, Hints
from imagestore.errors import (
    AlreadyExists,
    DigestMismatch,
    InUse,
    InvalidImageId,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    SizeMismatch,
    StoreError,
    Unauthenticated,
    Unavailable,
)
from imagestore.testing._data import CountingSource, chunks, pattern, pipe_of
from imagestore.testing._faulty import Call
from imagestore.testing._harness import NotApplicable
from imagestore.testing._kit import PATIENCE, Kit, Rendezvous, Task, raises, sha256
from imagestore.testing._registry import check, variants

__all__: list[str] = []

WRITER: Final = ("create", "locate", "delete")


@check("contract")
def verbs(kit: Kit) -> None:
    """A driver that stores images can also find them, delete them, and clean up after a crash."""
    driver = kit.harness.make_driver()
    assert driver.api == 1, "api must be 1"
    assert driver.name, "the driver has no name"
    assert driver.schemes, "the driver has no schemes"
    assert [scheme.lower() for scheme in driver.schemes] == list(driver.schemes), "schemes are in lower case"
    assert isinstance(kit.capabilities, Capabilities), "open() must set capabilities"
    if "create" in kit.verbs:
        missing = {"locate", "delete", "uploads", "discard"} - kit.verbs
        assert not missing, f"a driver with create also needs {sorted(missing)}"
    for verb in kit.verbs:
        assert kit.plain.supports(verb), f"the store does not see {verb}"
    assert kit.plain.capabilities == kit.capabilities, "capabilities differ from one open() to the next"


@variants(
    "contract",
    *WRITER,
    empty=lambda block: 0,
    one_byte=lambda block: 1,
    block_less_one=lambda block: block - 1,
    block=lambda block: block,
    block_and_one=lambda block: block + 1,
    several_blocks=lambda block: 3 * block,
    several_blocks_and_some=lambda block: 3 * block + 17,
)
def image(kit: Kit, length: Callable[[int], int]) -> None:
    """An image comes back as it was stored, and everything that tells of it agrees."""
    data = pattern(length(kit.block))
    for size in (len(data), None):
        if size is None and kit.capabilities.needs_size:
            continue
        image_id = kit.new_id()
        result = kit.plain.add(image_id, chunks(data), size=size, digests=("sha256", "md5"))
        assert result.image_id == image_id
        assert result.size == len(data)
        assert result.digests == {"sha256": sha256(data), "md5": hashlib.md5(data, usedforsecurity=False).hexdigest()}
        assert result.stat.size == len(data)
        kit.assert_whole(image_id, data)
        assert kit.plain.locate(image_id).uri == result.location.uri, "locate() and add() differ"
        stat = kit.plain.stat(result.location)
        assert stat.size == len(data)
        assert stat.modified is None or stat.modified.tzinfo is not None, "Stat.modified must know its time zone"
        assert kit.read(result.location.uri) == data, "a location works as text too"
        checked = kit.plain.verify(result.location, expected={"sha256": sha256(data)})
        assert (checked.size, checked.digests["sha256"]) == (len(data), sha256(data))
        kit.plain.delete(result.location)
        kit.assert_absent(image_id, result.location)
    kit.assert_clean()


@check("contract", *WRITER)
def sources(kit: Kit) -> None:
    """Path, file object, pipe, iterable: the same image comes of each."""
    data = kit.data(2.5)
    known = len(data) if kit.capabilities.needs_size else None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "source")
        path.write_bytes(data)
        kit.plain.add(kit.use_id(path_id := kit.new_id("path")), path)
        with path.open("rb") as file:
            kit.plain.add(file_id := kit.new_id("file"), file)
    kit.plain.add(iterable_id := kit.new_id("iterable"), chunks(data, 999), size=known)
    kit.plain.add(reader_id := kit.new_id("reader"), CountingSource(data), size=known)
    with pipe_of(data) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as pipe:
        kit.plain.add(pipe_id := kit.new_id("pipe"), pipe, size=known)
    for image_id in (path_id, file_id, iterable_id, reader_id, pipe_id):
        kit.assert_whole(image_id, data)


@check("contract", *WRITER, when=lambda caps: caps.parallel_writes > 1, reason="its writes go in order")
def blocks_out_of_order(kit: Kit) -> None:
    """Blocks that are written at once and arrive in another order than they have make the same image."""
    data = kit.data(4.5)
    plan = kit.faults()
    others = threading.Event()

    def first(call: Call) -> None:
        if call.arguments[0].offset == 0:
            assert others.wait(PATIENCE), "no other block was written while the first one waited"

    plan.on("write", first, times=None)
    plan.on("write", lambda call: others.set() if call.arguments[0].offset else None, times=None, after=True)
    image_id = kit.new_id()
    kit.add(image_id, data, kit.store(plan))
    assert others.is_set(), "only one block was written"
    kit.assert_whole(image_id, data)


@check("contract", *WRITER, when=lambda caps: caps.parallel_writes == 1, reason="its writes may be parallel")
def blocks_in_order(kit: Kit) -> None:
    """A driver that can't write in parallel gets one block after the other, in order and without gaps."""
    data = kit.data(4.5)
    plan = kit.faults()
    busy = threading.Lock()

    def begin(call: Call) -> None:
        assert busy.acquire(blocking=False), "two writes at once"

    plan.on("write", begin, times=None)
    plan.on("write", lambda call: busy.release(), times=None, after=True)
    image_id = kit.new_id()
    kit.add(image_id, data, kit.store(plan))
    blocks = [call.arguments[0] for call in plan.log if call.operation == "write"]
    assert [block.offset for block in blocks] == sorted(block.offset for block in blocks)
    assert sum(len(block.data) for block in blocks) == len(data)
    kit.assert_whole(image_id, data)


@check("contract", *WRITER)
def block_lengths(kit: Kit) -> None:
    """Blocks are whole but the last, within the driver's limits, and carry the digest it asks for."""
    data = kit.data(3.3)
    plan = kit.faults()
    kit.add(kit.new_id(), data, kit.store(plan))
    blocks: list[Block] = sorted(
        (call.arguments[0] for call in plan.log if call.operation == "write"), key=lambda block: block.offset
    )
    caps = kit.capabilities
    for block in blocks:
        assert block.data == data[block.offset : block.offset + len(block.data)]
        assert caps.block_max is None or len(block.data) <= caps.block_max
        assert block is blocks[-1] or len(block.data) >= caps.block_min
        if caps.block_digest:
            assert block.digest == hashlib.new(caps.block_digest, block.data).digest(), "wrong Block.digest"
    if caps.sparse_unit is None:
        assert [block.index for block in blocks] == list(range(len(blocks)))
        assert [block.last for block in blocks] == [False] * (len(blocks) - 1) + [True]


@variants(
    "contract",
    *WRITER,
    leading=(0, 1),
    trailing=(1, 0),
    middle=(1, 0, 0, 1),
    scattered=(0, 1, 0, 0, 1, 0),
    everywhere=(0, 0, 0),
)
def zeros(kit: Kit, areas: tuple[int, ...]) -> None:
    """Long runs of zeros come back as zeros; a driver for sparse images is spared them."""
    area = 2 * max(kit.block, 64 * 1024)
    tail = b"\0" * 4097 if areas[-1] == 0 else b"end"
    data = b"".join(pattern(area, number) if full else bytes(area) for number, full in enumerate(areas)) + tail
    image_id = kit.new_id()
    result = kit.add(image_id, data)
    kit.assert_whole(image_id, data)
    assert result.digests["sha256"] == sha256(data)
    if kit.capabilities.sparse_unit is None:
        assert result.stored == len(data)
    else:
        assert result.stored <= sum(areas) * area + kit.capabilities.sparse_unit, "runs of zeros were sent"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "image")
        kit.plain.download(result.location, path, expected={"sha256": sha256(data)})
        assert path.read_bytes() == data, "download and get differ"


@check("contract")
def ranges(kit: Kit) -> None:
    """Any range of an image can be read; what is asked for beyond the end is cut off."""
    data = kit.data(3.3)
    size, block = len(data), kit.block
    location = kit.image(data)
    for start, stop in (
        (0, 1),
        (0, size),
        (size - 1, size),
        (size - 1, None),
        (block - 1, block + 1),
        (block, 2 * block),
        (7, 3 * block + 1),
        (1, None),
        (5, 5),
        (0, 0),
        (0, size + 1000),
        (size - 10, size + 10),
    ):
        with kit.plain.get(location, start=start, stop=stop) as reader:
            wanted = data[start : size if stop is None else stop]
            assert reader.size == len(wanted), f"{start}..{stop}: size says {reader.size}"
            assert b"".join(reader) == wanted, f"{start}..{stop}: other bytes"
    with kit.plain.get(location) as reader:
        assert reader.read(10) == data[:10]
        assert reader.read(block) == data[10 : 10 + block]
        assert reader.read() == data[10 + block :]
        assert reader.read(1) == b""
    with raises(InvalidRequest):
        kit.plain.get(location, start=size + 1)


@check("contract")
def many_readers(kit: Kit) -> None:
    """Reads of one image that go on at once do not disturb each other."""
    data = kit.data(3.3)
    location = kit.image(data)
    with kit.plain.get(location) as one, kit.plain.get(location, start=100) as other:
        assert one.read(50) == data[:50]
        assert other.read(50) == data[100:150]
        assert one.read() == data[50:]
        assert other.read() == data[150:]


@check("contract")
def broken_off_read(kit: Kit) -> None:
    """A reader may be closed before its end, twice, and the image be read again."""
    data = kit.data(3.3)
    location = kit.image(data)
    reader = kit.plain.get(location)
    assert reader.read(10) == data[:10]
    reader.close()
    reader.close()
    assert kit.read(location) == data


@check("contract", *WRITER)
def odd_ids(kit: Kit) -> None:
    """Every id that the library allows can be stored, or is refused by the driver before anything is read."""
    odd = ("a", "Z", "0", "a.b", "a..b", "a.", "a-", "a_", "9" * 64, "x" * 200, "A-b.C_d-" * 25, "con", "CASE", "case")
    images: dict[str, bytes] = {}
    for image_id in odd:
        source = CountingSource(pattern(500, image_id))
        try:
            kit.plain.add(kit.use_id(image_id), source, size=500)
        except InvalidImageId:
            assert "check_id" in kit.verbs, f"{image_id!r} was refused, but the driver has no check_id"
            assert source.taken == 0, f"{image_id!r} was refused after bytes were read"
        else:
            images[image_id] = pattern(500, image_id)
    assert images, "every id was refused"
    for image_id, data in images.items():
        kit.assert_whole(image_id, data)
    for image_id in images:
        kit.plain.delete(kit.plain.locate(image_id))
    for image_id in images:
        kit.assert_absent(image_id)


@check("contract", *WRITER)
def refused_ids(kit: Kit) -> None:
    """What is no id is refused, and no byte of the source is read."""
    bad = ("", ".", "..", ".a", "-a", "_a", "a/b", "../a", "/a", "a\\b", "a b", " a", "a\n", "a\0", "ä", "a%2f")
    for image_id in (*bad, "x" * 201):
        source = CountingSource(b"data")
        with raises(InvalidImageId):
            kit.plain.add(image_id, source, size=4)
        assert source.taken == 0
        with raises(InvalidImageId):
            kit.plain.locate(image_id)


@check("contract", *WRITER)
def not_found(kit: Kit) -> None:
    """An image that is not there is `NotFound` everywhere, and from the call itself, not from the first read."""
    image_id = kit.new_id()
    location = kit.add(image_id, kit.data(0.5)).location
    kit.plain.delete(location)
    for ask in (kit.plain.get, kit.plain.stat, kit.plain.get_size, kit.plain.delete, kit.plain.verify):
        with raises(NotFound) as caught:
            ask(location)
        assert not caught[0].temporary
        assert caught[0].store == "kit"
        assert caught[0].location == str(location), "the error does not say which location"
    with raises(NotFound):
        kit.plain.get(location, start=3, stop=5)
    with raises(NotFound):
        kit.plain.locate(kit.new_id())
    kit.assert_absent(image_id, location)


@check("contract", *WRITER)
def name_taken(kit: Kit) -> None:
    """Adding an id that exists is refused before a byte of the source is read, and harms nothing."""
    image_id, data = kit.new_id(), kit.data()
    kit.add(image_id, data)
    source = CountingSource(kit.data(seed=1))
    with raises(AlreadyExists):
        kit.plain.add(image_id, source, size=len(data))
    assert source.taken == 0, f"{source.taken} bytes were read before the id was refused"
    kit.assert_whole(image_id, data)
    kit.assert_clean()


@check("contract", *WRITER)
def name_taken_meanwhile(kit: Kit) -> None:
    """An id that is taken while its bytes are on their way is refused at the commit; the first image stays whole."""
    image_id = kit.new_id()
    first, second = kit.data(seed=1), kit.data(2.2, seed=2)

    won: list[bool] = []

    def rival() -> None:
        try:
            kit.add(image_id, first, kit.store())
        except AlreadyExists:
            # Where an upload holds its id from the beginning, it is the rival that is refused.
            won.append(False)
        else:
            won.append(True)

    source = CountingSource(second, at={kit.block + 1: rival})
    try:
        kit.plain.add(image_id, source, size=len(second))
        taken = False
    except AlreadyExists:
        taken = True
    assert won, "the rival never came"
    if kit.capabilities.collision != "last-wins":
        assert taken is won[0], "both adders of one id won" if won[0] else "nobody won"
    wanted = first if taken else second
    kit.assert_whole(image_id, wanted)
    kit.assert_clean()
    kit.sweep()
    kit.assert_whole(image_id, wanted)


@check("contract", *WRITER)
def racing_adders(kit: Kit) -> None:
    """Of adders that commit one id in the same moment exactly one wins, as far as the driver promises it."""
    count = 3
    for turn in range(3):
        image_id = kit.new_id("race")
        images = [kit.data(1.2, seed=f"{turn}.{number}") for number in range(count)]
        gate = Rendezvous(count)

        def adder(data: bytes, image_id: str = image_id, gate: Rendezvous = gate) -> Task[tuple[str, bytes]]:
            plan = kit.faults()
            plan.on("commit", gate.arrive)
            store = kit.store(plan)

            def run() -> tuple[str, bytes]:
                try:
                    return kit.add(image_id, data, store).location.uri, data
                finally:
                    gate.leave()

            return Task(run)

        tasks = [adder(data) for data in images]
        errors = [task.wait() for task in tasks]
        winners = [task.result() for task, error in zip(tasks, errors, strict=True) if error is None]
        for error in errors:
            assert error is None or isinstance(error, AlreadyExists), f"a loser got {error!r}"
        assert winners, "nobody won"
        if kit.capabilities.collision == "exclusive":
            assert len(winners) == 1, f"{len(winners)} adders of one id won"
        kit.sweep()
        found = kit.plain.locate(image_id)
        assert kit.read(found) in [data for _, data in winners], "what is there is not a winner's image"
        for uri in {uri for uri, _ in winners} - {found.uri}:
            # Where the backend names the images, each of several winners has one.
            kit.plain.delete(uri)
        kit.assert_clean()


@check("contract", *WRITER)
def add_again(kit: Kit) -> None:
    """After a delete the id is free, and nothing of the old image remains."""
    image_id = kit.new_id()
    old = kit.add(image_id, kit.data(3.3, seed="old"))
    kit.plain.delete(old.location)
    data = kit.data(1.1, seed="new")
    new = kit.add(image_id, data)
    kit.assert_whole(image_id, data)
    if old.stat.version is not None:
        assert new.stat.version != old.stat.version, "another image has the same version"
    if old.stat.token is not None:
        assert new.stat.token != old.stat.token, "another upload has the same token"


@check("contract", *WRITER)
def versions(kit: Kit) -> None:
    """Images that follow each other quickly under one id never have the same version."""
    image_id = kit.new_id()
    seen: set[str] = set()
    for number in range(12):
        stat = kit.add(image_id, b"%4d" % number).stat
        if stat.version is None:
            raise NotApplicable("it knows no versions")
        assert stat.version == kit.plain.stat(kit.plain.locate(image_id)).version, "a version that moves by itself"
        assert stat.version not in seen, f"image {number} of this id has the version of one before it: {stat.version}"
        seen.add(stat.version)
        kit.plain.delete(kit.plain.locate(image_id))


@check("contract", *WRITER)
def tokens(kit: Kit) -> None:
    """A driver that promises a proof of its commits tells the token of the upload that made an image."""
    plan = kit.faults()
    location = kit.add(kit.new_id(), kit.data(1.5), kit.store(plan)).location
    token = next(call.arguments[1].token for call in plan.log if call.operation == "create")
    told = kit.plain.stat(location).token
    assert told in ((token,) if kit.capabilities.commit_proof else (token, None)), f"token {told} instead of {token}"


@check("contract", *WRITER)
def delete_in_use(kit: Kit) -> None:
    """An image that something still needs is not deleted: `InUse`."""
    image_id, data = kit.new_id(), kit.data(1.1)
    location = kit.add(image_id, data).location
    with kit.harness.hold(location.uri):
        with raises(InUse):
            kit.plain.delete(location)
        kit.assert_whole(image_id, data)
    kit.plain.delete(location)
    kit.assert_absent(image_id, location)


@check("contract", *WRITER)
def expected_digests(kit: Kit) -> None:
    """An image with another digest than expected is refused, and nothing of it stays."""
    data = kit.data()
    good, bad = {"sha256": sha256(data)}, {"sha256": sha256(b"other")}
    image_id = kit.new_id()
    with raises(DigestMismatch):
        kit.add(image_id, data, expected=bad)
    kit.assert_absent(image_id)
    kit.assert_clean()
    location = kit.add(image_id, data, expected=good).location
    kit.assert_whole(image_id, data)
    assert kit.read(location, expected=good) == data
    with raises(DigestMismatch):
        kit.read(location, expected=bad)
    with raises(DigestMismatch):
        kit.plain.verify(location, expected=bad)


@check("contract", *WRITER)
def declared_size(kit: Kit) -> None:
    """A declared size that is wrong, whichever way, is refused, and nothing stays."""
    data = kit.data()
    for size in (len(data) - 1, len(data) + 1, 1, 0, kit.block, 5 * kit.block):
        image_id = kit.new_id()
        with raises(SizeMismatch):
            kit.plain.add(image_id, chunks(data), size=size)
        kit.assert_absent(image_id)
    kit.assert_clean()


@check("contract", *WRITER)
def largest_size(kit: Kit) -> None:
    """An image that turns out larger than allowed is refused, and nothing stays."""
    data = kit.data()
    image_id = kit.new_id()
    with raises(LimitExceeded):
        kit.plain.add(image_id, CountingSource(data), max_size=len(data) - 1, size=_size(kit, data))
    kit.assert_absent(image_id)
    kit.assert_clean()
    kit.plain.add(image_id, CountingSource(data), max_size=len(data), size=_size(kit, data))
    kit.assert_whole(image_id, data)


@check("contract", *WRITER)
def size_needed(kit: Kit) -> None:
    """A driver that needs the size is not asked to store an image of unknown size."""
    source = CountingSource(kit.data())
    store = kit.store(changes={"needs_size": True})
    with raises(InvalidRequest):
        store.add(kit.new_id(), source)
    assert source.taken == 0
    kit.assert_clean()


@check("contract", *WRITER)
def few_blocks(kit: Kit) -> None:
    """Where an image may have few blocks they get longer, so that it fits."""
    data = kit.data(9.5)
    plan = kit.faults()
    image_id = kit.new_id()
    limit = min(kit.capabilities.blocks_max or 4, 4)
    if kit.capabilities.block_max is not None and kit.capabilities.block_max * limit < len(data):
        raise NotApplicable("its blocks can't be long enough")
    kit.add(image_id, data, kit.store(plan, changes={"blocks_max": limit}))
    count = len({call.arguments[0].index for call in plan.log if call.operation == "write"})
    assert 0 < count <= limit, f"{count} blocks where {limit} are allowed"
    kit.assert_whole(image_id, data)


@check("contract", *WRITER)
def metadata(kit: Kit) -> None:
    """A driver that keeps metadata keeps it as it was given."""
    given = {"os": "linux", "name": "Ubuntu 24.04 – näïve", "empty": "", "long": "x" * 200}
    image_id, data = kit.new_id(), kit.data(1.5)
    location = kit.add(image_id, data, metadata=given).location
    kit.assert_whole(image_id, data)
    kept = dict(kit.plain.stat(location).metadata)
    assert kept in (given, {}), f"metadata {kept} instead of {given}"


@check("contract", *WRITER, "copy")
def copied(kit: Kit) -> None:
    """A copy inside the backend is an image of its own, and takes nobody's id."""
    image_id, taken, data = kit.new_id(), kit.new_id(), kit.data(2.5)
    place = kit.add(image_id, data).location
    kit.add(taken, data[:10])
    with raises(AlreadyExists):
        kit.plain._copy(place, taken, None, None)
    if kit.capabilities.collision != "last-wins":
        # The store has looked before it asked: the driver must see it too.
        with kit.driver() as driver:
            error = _refusal(driver, place.uri, taken, len(data))
        assert isinstance(error, AlreadyExists), f"{error!r}, and the id was taken"
    kit.assert_whole(taken, data[:10])
    copy_id = kit.new_id()
    result = kit.plain._copy(place, copy_id, None, None)
    assert result.location.uri == kit.plain.locate(copy_id).uri
    assert result.stat.token is not None or not kit.capabilities.commit_proof, "stat() of a copy must tell its token"
    kit.plain.delete(place)
    kit.assert_whole(copy_id, data)


def _refusal(driver: Any, uri: str, image_id: str, size: int) -> Exception | None:
    try:
        driver.copy(driver.parse(uri), image_id, Hints(token=secrets.token_hex(16), size=size))
    except Exception as error:  # noqa: BLE001 - any is translated by the driver
        return error if isinstance(error, StoreError) else driver.translate(error)
    return None


@check("contract", "create", "locate", "delete", "list")
def listing(kit: Kit) -> None:
    """Every image is listed once, with the location that opens it; a deleted one is not."""
    images = {kit.new_id(): pattern(number * 1000 + 1, number) for number in range(7)}
    for image_id, data in images.items():
        kit.add(image_id, data)
    found = [item for item in kit.plain.list() if item.image_id in images]
    assert sorted(item.image_id for item in found) == sorted(images)
    for item in found:
        assert item.size in (None, len(images[item.image_id]))
        assert item.modified is None or item.modified.tzinfo is not None
        assert item.location.uri == kit.plain.locate(item.image_id).uri
        assert kit.read(item.location) == images[item.image_id]
    gone = found[0]
    kit.plain.delete(gone.location)
    assert gone.image_id not in {item.image_id for item in kit.plain.list()}


@check("contract", "create", "locate", "delete", "list")
def listing_under_change(kit: Kit) -> None:
    """A listing goes on when images come and go meanwhile, and misses none of those that stay."""
    stay = [kit.new_id("stay") for _ in range(4)]
    go = [kit.new_id("go") for _ in range(4)]
    for image_id in stay + go:
        kit.add(image_id, image_id.encode())
    listing = kit.plain.list()
    found = [next(listing).image_id]
    for image_id in go:
        kit.plain.delete(kit.plain.locate(image_id))
    kit.add(kit.new_id("new"), b"new")
    found += [item.image_id for item in listing]
    assert set(stay) <= set(found), "an image that stays was not listed"
    assert len(set(found)) == len(found), "an image was listed twice"


@check("contract", *WRITER)
def unfinished_is_invisible(kit: Kit) -> None:
    """While an image is on its way in, nobody can locate, list or read it; ``uploads`` shows it."""
    image_id, data = kit.new_id(), kit.data()
    looked: list[int] = []

    def look() -> None:
        kit.assert_absent(image_id)
        if not kit.harness.vanishing:
            assert kit.leftovers(), "uploads() does not show an upload that runs"
        looked.append(1)

    source = CountingSource(data, at={kit.block + 1: look, len(data): look})
    result = kit.plain.add(image_id, source, size=len(data))
    assert len(looked) == 2
    kit.assert_whole(image_id, data)
    assert kit.plain.locate(image_id).uri == result.location.uri
    kit.assert_clean()


@check("contract", "create", "locate", "delete", "usage")
def usage(kit: Kit) -> None:
    """What ``usage`` tells is in bytes and makes sense."""
    told = kit.plain.usage()
    for value in (told.total, told.used, told.free):
        assert value is None or value >= 0
    assert told.total is None or told.free is None or told.free <= told.total
    assert told.total is None or told.used is None or told.used <= told.total


@check("contract", "create", "locate", "delete", "extents")
def extents(kit: Kit) -> None:
    """Outside the areas that ``extents`` tells an image is zero."""
    area = 4 * max(kit.block, 64 * 1024)
    data = bytes(area) + pattern(area) + bytes(area) + pattern(1000) + bytes(area)
    location = kit.add(kit.new_id(), data).location
    with kit.driver() as driver:
        stat = driver.stat(location)
        for start, stop in ((0, len(data)), (area - 10, 2 * area + 10), (100, 200), (len(data) - 1, len(data))):
            position = start
            for begin, end in driver.extents(location, start, stop, stat.version):
                assert position <= begin < end <= stop, f"area {begin}..{end} in {start}..{stop} after {position}"
                assert not data[position:begin].strip(b"\0"), "an area with data was left out"
                position = end
            assert not data[position:stop].strip(b"\0"), "an area with data was left out"


@check("contract", *WRITER, "bind")
def two_auths(kit: Kit) -> None:
    """Two bound views of one store work at the same time, each for itself."""
    one, other = kit.harness.auths()
    store = kit.wrap(kit.harness.make_driver())
    views = (store.bind(one), store.bind(other))
    ids = [kit.new_id(), kit.new_id()]
    images = [kit.data(2.5, seed=number) for number in range(2)]
    gate = Rendezvous(2)

    def add(number: int) -> None:
        try:
            source = CountingSource(images[number], at={kit.block: gate.arrive})
            views[number].add(ids[number], source, size=len(images[number]))
        finally:
            gate.leave()

    tasks = [Task(lambda number=number: add(number)) for number in range(2)]  # type: ignore[misc]  # bound early
    for task in tasks:
        task.result()
    if kit.harness.auths_apart:
        for view, image_id in zip(views, reversed(ids), strict=True):
            assert not view.exists(image_id), "what one auth stored, the other can see"
    for view, image_id, data in zip(views, ids, images, strict=True):
        with view.get(view.locate(image_id)) as reader:
            assert reader.read() == data
        view.delete(view.locate(image_id))


@check("contract", when=lambda caps: caps.needs_auth, reason="it needs no auth")
def unbound(kit: Kit) -> None:
    """A driver that needs an auth refuses calls without."""
    location = kit.image(kit.data(0.1))
    store = kit.wrap(kit.harness.make_driver())
    with raises(Unauthenticated):
        store.get(location)
    if "create" in kit.verbs:
        with raises(Unauthenticated):
            store.add(kit.new_id(), b"data")


@check("contract")
def unreachable(kit: Kit) -> None:
    """A backend that is not there is `Unavailable`, for a moment, within the driver's time-outs."""
    driver = kit.harness.make_unreachable()
    if driver is None:
        raise NotApplicable("its backend can't be unreachable")
    _unavailable_in_time(kit, driver)


@check("contract")
def stalled(kit: Kit) -> None:
    """A backend that never answers is `Unavailable`, for a moment, within the driver's time-outs."""
    _unavailable_in_time(kit, kit.harness.make_stalled())


def _unavailable_in_time(kit: Kit, driver: Driver) -> None:
    limit = driver.timeouts.connect + driver.timeouts.stall + 5
    store = kit.wrap(driver, retry=Retry(attempts=1))

    def ask() -> StoreError:
        with raises(Unavailable) as caught:
            if "create" in kit.verbs:
                store.locate(kit.new_id())
            else:
                _ = store.capabilities
        return caught[0]

    began = time.monotonic()
    error = Task(ask, limit + PATIENCE).result()
    seconds = time.monotonic() - began
    assert error.temporary, "Unavailable must be temporary"
    assert seconds < limit, f"took {seconds:.1f} s, longer than the time-outs of {limit:.1f} s"


def _size(kit: Kit, data: bytes) -> int | None:
    return len(data) if kit.capabilities.needs_size else None
