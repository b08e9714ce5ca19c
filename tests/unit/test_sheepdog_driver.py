"""The Sheepdog driver without a cluster: locations, options, marks, codes, and the protocol byte by byte."""

from __future__ import annotations

import random
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imagestore import open_store
from imagestore.driver import Block, Hints, Limits, Location, Options, Timeouts
from imagestore.drivers import _sheepdog_client as wire
from imagestore.drivers import sheepdog
from imagestore.drivers._sheepdog_client import Code, Inode, Link, LinkError, Refused
from imagestore.drivers.sheepdog import SheepdogDriver
from imagestore.errors import (
    AlreadyExists,
    ConfigurationError,
    InUse,
    InvalidLocation,
    InvalidOption,
    InvalidRequest,
    NotFound,
    SizeMismatch,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unavailable,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from sheepdog_server import READ, Sheepdog

MIB = 1 << 20
TOKEN = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


def build(**options: Any) -> SheepdogDriver:
    values = {option.dest: option.default for option in SheepdogDriver.options}
    assert options.keys() <= values.keys()
    return SheepdogDriver(
        Options({**values, **options}), store="s", limits=Limits(workers=8), timeouts=Timeouts(connect=5, stall=10)
    )


@pytest.fixture
def server() -> Iterator[Sheepdog]:
    with Sheepdog() as server:
        yield server
    assert not server.violations


@pytest.fixture
def driver(server: Sheepdog) -> Iterator[SheepdogDriver]:
    made = build(host=server.host, port=server.port)
    made.open()
    yield made
    made.close()


CALM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that have other things to do."""


# Locations


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("sheepdog://127.0.0.1:7000:image", "sheepdog://127.0.0.1:7000:image"),
        ("SheepDog://127.0.0.1:7000:image", "sheepdog://127.0.0.1:7000:image"),
        ("sheepdog://127.0.0.1:07000:image", "sheepdog://127.0.0.1:7000:image"),
        ("sheepdog://image", "sheepdog://127.0.0.1:7000:image"),
        ("sheepdog://[fd00::5]:7001:image", "sheepdog://127.0.0.1:7000:image"),
        ("sheepdog://[FD00:0:0::5]:7001:image", "sheepdog://127.0.0.1:7000:image"),
        ("sheepdog://fd00::5:7001:image", "sheepdog://127.0.0.1:7000:image"),
        ("sheepdog://Old.Example:7000:image", "sheepdog://127.0.0.1:7000:image"),
        ("sheepdog://127.0.0.1:7000:.x_y-Z.9", "sheepdog://127.0.0.1:7000:.x_y-Z.9"),
    ],
)
def test_locations(uri: str, canonical: str) -> None:
    driver = build(nodes=["[fd00::5]:7001"], accept_locations=["old.example:7000"])
    location = driver.parse(uri)
    assert location.uri == canonical
    assert driver.parse(location.uri) == location
    assert location.key == (canonical.rpartition(":")[2],)


@pytest.mark.parametrize(
    "rest",
    [
        "", ":", "::", ":::", "127.0.0.1:7000:", "127.0.0.1:7000", "7000:image", ":7000:image", "127.0.0.1::image",
        "127.0.0.1:7001:image", "127.0.0.2:7000:image", "localhost:7000:image", "127.0.0.1:7000:-image",
        "127.0.0.1:7000:im age", "127.0.0.1:7000:imäge", "127.0.0.1:7000:im%61ge", "127.0.0.1:7000:a/b",
        "127.0.0.1:7000:" + "x" * 256, "127.0.0.1:7000:image\n", "127.0.0.1: 7000:image", "127.0.0.1:7_000:image",
        "127.0.0.1:７000:image", "127.0.0.1:70000:image", "127.0.0.1:0:image", "[127.0.0.1]x:7000:image",
        "[::1%lo]:7000:image", "/image", "127.0.0.1:7000/image", "a:b:c:d:e", "x:127.0.0.1:7000:image",
    ],
)  # fmt: skip
def test_locations_that_are_refused(rest: str) -> None:
    with pytest.raises(InvalidLocation):
        build().parse(f"sheepdog://{rest}")
    for scheme in ("file://", "sheepdogs://", "sheepdog:", "sheepdog:/", ""):
        with pytest.raises(InvalidLocation):
            build().parse(scheme + "127.0.0.1:7000:image")


TEXT = st.text(st.sampled_from("127.0:7000[]fd%-_ aZ\n/@é:::"), max_size=40)


@CALM
@given(TEXT)
@example("127.0.0.1:7000:a")
@example("[::ffff:127.0.0.1]:7000:a")
def test_whatever_a_location_says_it_stays_here(rest: str) -> None:
    driver = build(prefix="a")
    try:
        location = driver.parse(f"sheepdog://{rest}")
    except InvalidLocation:
        return
    assert location.uri == f"sheepdog://127.0.0.1:7000:{location.key[0]}"
    assert driver.parse(location.uri) == location
    assert sheepdog._VDI_NAME.fullmatch(location.key[0])
    assert location.key[0].startswith("a")
    assert rest.endswith(location.key[0])


@CALM
@given(
    st.text(st.sampled_from("aZ09._-"), min_size=1, max_size=200).map(lambda text: "x" + text[1:]),
    st.sampled_from(["", "img-", "_9."]),
)
def test_every_id_has_a_location_of_its_own(image_id: str, prefix: str) -> None:
    driver = build(prefix=prefix)
    location = driver._location(prefix + image_id)
    assert location.image_id == image_id
    assert driver.parse(location.uri) == location


def test_a_prefix_confines() -> None:
    driver = build(prefix="img-")
    assert driver.parse("sheepdog://img-a").image_id == "a"
    assert driver.parse("sheepdog://img-.a").image_id is None
    for name in ("a", "img-", "img", "IMG-a", "volume-img-a"):
        with pytest.raises(InvalidLocation):
            driver.parse(f"sheepdog://{name}")


# Options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"host": ""}, "host"),
        ({"host": "a b"}, "host"),
        ({"host": "a:7000"}, "host"),
        ({"host": "sheepdog://a"}, "host"),
        ({"port": None}, "port"),
        ({"nodes": ["a"]}, "nodes"),
        ({"nodes": ["a:0"]}, "nodes"),
        ({"nodes": ["a:x"]}, "nodes"),
        ({"nodes": ["fd00::5:7000"]}, "nodes"),
        ({"nodes": ["b:7000", ""]}, "nodes"),
        ({"accept_locations": ["sheepdog://a:7000"]}, "accept_locations"),
        ({"prefix": "-a"}, "prefix"),
        ({"prefix": ".a"}, "prefix"),
        ({"prefix": "a b"}, "prefix"),
        ({"prefix": "a:"}, "prefix"),
        ({"prefix": "x" * 56}, "prefix"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidOption, match=f"option {word}: "):
        build(**options)


def test_addresses() -> None:
    driver = build(host="Node1.Example", nodes=["node2:7001", " [FD00::0]:7000", "node1.example:7000"])
    assert driver._addresses == [("node1.example", 7000), ("node2", 7001), ("fd00::", 7000)]
    assert build(host="::1").parse("sheepdog://a").uri == "sheepdog://[::1]:7000:a"
    assert build(host="[::1]")._addresses == [("::1", 7000)]


def test_glance_options_are_read() -> None:
    store = open_store(
        "sheepdog", sheepdog_store_address="10.1.2.3", sheepdog_store_port="7001", sheepdog_store_chunk_size="64"
    )
    assert store.parse("sheepdog://10.1.2.3:7001:x").image_id == "x"
    with pytest.raises(InvalidLocation):
        store.parse("sheepdog://127.0.0.1:7000:x")


# Marks


def inode(*, tag: bytes = b"", size: int = 5, shift: int = 22, snapshotted: int = 0) -> Inode:
    head = struct.pack(
        "<256s256sQQQQQBBBBIII", b"name", tag, 7 << 32 | 1, snapshotted, 0, size, 0, 0, 0, 1, shift, 1, 9, 0
    )
    return Inode.read(9, head)


def marked(upload: bytes = b"", discard: bytes = b"", delete: bytes = b"") -> bytes:
    return upload.ljust(96, b"\0") + discard.ljust(80, b"\0") + delete.ljust(80, b"\0")


UPLOAD = b"imagestore-upload:" + TOKEN.encode()
DISCARD = b"imagestore-discard:" + TOKEN.encode()
DELETE = b"imagestore-delete:" + OTHER.encode()


def test_marks() -> None:
    plain = sheepdog._Marks(inode())
    assert not plain.unfinished
    assert not plain.has(plain.token)
    upload = sheepdog._Marks(inode(tag=marked(UPLOAD + b" 1700000000")))
    assert (upload.unfinished, upload.token, upload.beat) == (True, TOKEN, 1_700_000_000)
    assert upload.is_of(TOKEN)
    assert upload.has(TOKEN)
    assert not upload.is_of(OTHER)
    discarded = sheepdog._Marks(inode(tag=marked(UPLOAD, DISCARD)))
    assert discarded.unfinished
    assert not discarded.is_of(TOKEN)
    # Who came too late to discard an upload says nothing about the image that it became.
    assert not sheepdog._Marks(inode(tag=marked(b"", DISCARD))).unfinished
    for first in (b"", UPLOAD, DELETE):
        deleted = sheepdog._Marks(inode(tag=marked(first, b"", DELETE)))
        assert deleted.unfinished
        assert deleted.has(OTHER)
        assert not deleted.is_of(TOKEN)
    new = sheepdog._Marks(inode(size=sheepdog._sentinel(TOKEN, 22)))
    assert new.unfinished
    assert new.is_blank(TOKEN)
    assert not new.is_blank(OTHER)
    assert len(new.token) == 32


@CALM
@given(st.binary(max_size=256))
@example(b"imagestore-upload:")
@example(UPLOAD[:-1])
@example(UPLOAD.upper())
@example(UPLOAD + b" ")
@example(UPLOAD + b" 12 13")
@example(b" " + UPLOAD)
@example(UPLOAD + b"\0x")
@example(DELETE)
@example(DISCARD)
def test_what_others_write_is_no_mark(tag: bytes) -> None:
    assert not sheepdog._Marks(inode(tag=tag)).unfinished


@CALM
@given(st.integers(20, 31), st.integers(0, 2**128 - 1))
def test_sentinels(shift: int, number: int) -> None:
    token = f"{number:032x}"
    size = sheepdog._sentinel(token, shift)
    assert sheepdog._is_sentinel(size, shift)
    # It must fit, or other programs' lists would run over the table.
    assert size < wire.OBJECTS_MAX << shift
    assert size % 512
    assert size > 400 << 30


@CALM
@given(st.integers(20, 31), st.integers(0, 2**33))
def test_disks_are_no_sentinels(shift: int, sectors: int) -> None:
    assert not sheepdog._is_sentinel(512 * sectors, shift)


# Codes


@pytest.mark.parametrize("code", range(0x100))
def test_codes(code: int) -> None:
    error = build().translate(Refused(code, "asking"))
    assert error is not None
    assert f"0x{code:02x}" in str(error)
    assert isinstance(error, NotFound) == (code in (0x08, 0x0E))
    assert isinstance(error, AlreadyExists) == (code == 0x04)
    for kind, codes in {InUse: (0x07, 0x1A), StoreFull: (0x13, 0x15), ConfigurationError: (0x14,)}.items():
        assert isinstance(error, kind) == (code in codes)
    # Not formatted, waiting for nodes, halted, starting, shutting down: nothing is lost.
    assert error.temporary == (
        code in (0x02, 0x03, 0x06, 0x0A, 0x0B, 0x0C, 0x0D, 0x0F, 0x11, 0x12, 0x16, 0x17, 0x18, 0x19) or code >= 0x80
    )


def test_other_errors() -> None:
    assert type(build().translate(LinkError("x"))) is Unavailable
    assert type(build().translate(LinkError("x", stalled=True))) is StoreTimeout
    assert build().translate(ValueError("x")) is None


# Protocol


def test_requests_byte_by_byte() -> None:
    """Offsets as in sheepdog_proto.h."""
    request = wire.write_object(wire.inode_object(0xABCDEF), 4664, b"1234", 3, 0x11)
    header = request.header(0x01020304)
    assert len(header) == 48
    assert struct.unpack_from("<BBHIII", header) == (1, 0x03, 1, 0, 0x01020304, 4)
    assert struct.unpack_from("<QQBBB", header, 16) == (0x80ABCDEF00000000, 0, 3, 0x11, 0)
    assert struct.unpack_from("<II", header, 36) == (0, 4664)
    header = wire.read_object(wire.data_object(0xABCDEF, 7), 100, 200).header(1)
    assert struct.unpack_from("<BBHIII", header) == (1, 0x02, 0, 0, 1, 200)
    assert struct.unpack_from("<Q", header, 16) == (0x00ABCDEF00000007,)
    assert struct.unpack_from("<I", header, 40) == (100,)
    header = wire.create_object(wire.data_object(1, 0), b"x" * 9, 2, 0).header(1)
    assert struct.unpack_from("<BBHIII", header) == (1, 0x01, 1, 0, 1, 9)
    request = wire.new_vdi("image", 1 << 41, 22)
    assert request.body == b"image" + bytes(251)
    header = request.header(2)
    assert struct.unpack_from("<BBHIII", header) == (1, 0x11, 1, 0, 2, 256)
    assert struct.unpack_from("<QIBBBBII", header, 16) == (1 << 41, 0, 0, 0, 0, 22, 0, 0)
    request = wire.get_vdi("image", 3)
    assert request.body == b"image" + bytes(507)
    assert struct.unpack_from("<I", request.header(1), 32) == (3,)
    assert request.opcode == 0x14
    assert wire.del_vdi("image").opcode == 0x17
    assert struct.unpack_from("<BBHIII", wire.read_vdis().header(1)) == (1, 0x15, 0, 0, 1, 2 << 20)
    assert struct.unpack_from("<BBHIII", wire.cluster_default().header(1)) == (1, 0x18, 0, 0, 1, 0)


def test_an_inode_byte_by_byte() -> None:
    head = bytearray(568)
    head[0:4], head[256:260] = b"name", b"tagg"
    for offset, form, value in (
        (512, "<Q", 11), (520, "<Q", 12), (528, "<Q", 13), (536, "<Q", 14), (544, "<Q", 15), (552, "B", 16),
        (553, "B", 1), (554, "B", 18), (555, "B", 19), (556, "<I", 20), (560, "<I", 21), (564, "<I", 22),
    ):  # fmt: skip
        struct.pack_into(form, head, offset, value)
    read = Inode.read(5, bytes(head))
    assert (read.vid, read.name, read.tag[:5]) == (5, "name", b"tagg\0")
    assert (read.created, read.snapshotted, read.size, read.policy) == (11, 12, 14, 16)
    assert (read.hyper, read.copies, read.shift, read.snapshot) == (True, 18, 19, 20)
    head[555] = 0
    assert Inode.read(5, bytes(head)).shift == 22


def test_bits() -> None:
    data = bytearray(20_000)
    wanted = [0, 7, 8, 4096 * 8 - 1, 4096 * 8, 100_003, 159_999]
    for bit in wanted:
        data[bit // 8] |= 1 << bit % 8
    assert list(sheepdog._bits(bytes(data))) == wanted


# The connection


def link(server: Sheepdog, **timeouts: float) -> Link:
    return Link((server.host, server.port), **{"connect": 5, "stall": 10, **timeouts})


def test_answers_in_any_order_for_many_threads(server: Sheepdog) -> None:
    vid = server.plant("image", random.Random(3).randbytes(8 * MIB))
    shared = link(server)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        choice = random.Random(number)
        try:
            for _ in range(25):
                tickets = {}
                for _ in range(choice.randrange(1, 6)):
                    index, offset = choice.randrange(8), choice.randrange(MIB - 5000)
                    request = wire.read_object(wire.data_object(vid, index), offset, choice.randrange(1, 5000))
                    tickets[shared.send(request)] = (index, offset, request.room)
                dropped = choice.choice(list(tickets))
                if number % 3 == 0:
                    shared.drop(dropped)
                    del tickets[dropped]
                for ticket, (index, offset, length) in reversed(tickets.items()):
                    data = shared.wait(ticket).data
                    assert data == server._objects[vid, index][offset : offset + length]
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    shared.close()
    assert not failed, failed


def test_large_requests_both_ways_do_not_block_each_other(server: Sheepdog) -> None:
    """Nobody waits for the answers to a thread that sends: it must take them itself, or both sides wait for ever."""
    data = random.Random(4).randbytes(MIB)
    vid = server.plant("image", data * 16)
    shared = link(server)
    reads = [shared.send(wire.read_object(wire.data_object(vid, index), 0, MIB)) for index in range(16)]
    writes = [shared.send(wire.create_object(wire.data_object(vid, index), data, 1, 0)) for index in range(16)]
    assert all(shared.wait(ticket).code == Code.SUCCESS for ticket in writes)
    assert all(shared.wait(ticket).data == data for ticket in reads)
    shared.close()


def test_a_link_that_is_closed(server: Sheepdog) -> None:
    closed = link(server)
    ticket = closed.send(wire.cluster_default())
    closed.close()
    closed.close()
    for ask in (lambda: closed.send(wire.cluster_default()), lambda: closed.wait(ticket)):
        with pytest.raises(LinkError, match="closed"):
            ask()
    assert not closed.usable()
    idle = link(server)
    idle.call(wire.cluster_default())
    assert idle.usable()
    server.cut()
    for _ in range(200):
        if not idle.usable():
            break
        threading.Event().wait(0.01)
    assert idle.error is not None


def test_an_answer_to_another_thread_is_no_end(server: Sheepdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes between the look whether anything is awaited and the look whether anything is there."""
    shared = link(server)
    poll = shared._poll
    tickets: list[wire.Ticket] = []

    def overtaken(events: int, seconds: float) -> int:
        tickets.append(shared.send(wire.cluster_default()))
        return poll(events, 5)

    monkeypatch.setattr(shared, "_poll", overtaken)
    assert shared.usable()
    monkeypatch.undo()
    assert shared.wait(tickets[0]).code == Code.SUCCESS
    shared.close()


def test_close_wakes_who_waits(server: Sheepdog) -> None:
    shared = link(server)
    server.on("stall", READ, times=None)
    vid = server.plant("image", b"x")
    failed: list[LinkError] = []

    def wait() -> None:
        try:
            shared.call(wire.read_object(wire.data_object(vid, 0), 0, 1))
        except LinkError as error:
            failed.append(error)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    while server.log.count("read") < 4:
        threading.Event().wait(0.005)
    shared.close()
    for thread in threads:
        thread.join(5)
    assert len(failed) == 4


def test_an_answer_that_never_comes_while_others_do(server: Sheepdog) -> None:
    shared = link(server, stall=0.2)
    vid = server.plant("image", b"x")
    server.on("stall", READ)
    lost = shared.send(wire.read_object(wire.data_object(vid, 0), 0, 1))

    def ask_others() -> None:
        for _ in range(100):
            shared.call(wire.cluster_default())
            threading.Event().wait(0.01)

    with pytest.raises(LinkError) as caught:
        ask_others()
    assert caught.value.stalled
    with pytest.raises(LinkError, match="never answered"):
        shared.wait(lost)


def test_no_node_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    driver = build(port=port, nodes=[f"127.0.0.1:{port}"])
    for _ in range(2):
        with pytest.raises(LinkError, match=r"can't connect to 127\.0\.0\.1 port"):
            driver.open()
    driver.close()


# Uploads


def stored(driver: SheepdogDriver, location: Location, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join(driver.read(location, start, stop).chunks)


def test_capabilities(driver: SheepdogDriver, server: Sheepdog) -> None:
    caps = driver.capabilities
    assert (caps.block_min, caps.block_max, caps.sparse_unit) == (MIB, 8 * MIB, MIB)
    assert caps.block_max is not None
    assert caps.blocks_max is not None
    assert caps.block_max * caps.blocks_max == wire.OBJECTS_MAX * MIB
    assert (caps.collision, caps.repeatable_create, caps.commit_proof) == ("exclusive", True, False)
    for shift, unit in ((22, 4), (24, 16), (25, 4), (31, 4)):
        server.shift = shift
        other = build(host=server.host, port=server.port)
        other.open()
        assert other.capabilities.block_min == unit * MIB
        other.close()
    server.shift = 20


def test_an_old_release_has_objects_of_4_mib(server: Sheepdog) -> None:
    server.on("code", 0x18, code=Code.INVALID_PARMS)
    old = build(host=server.host, port=server.port)
    old.open()
    assert old.capabilities.block_min == 4 * MIB
    old.close()


@pytest.mark.parametrize(
    "block",
    [
        Block(index=0, offset=1, data=b"x"),
        Block(index=0, offset=3 * MIB, data=b"x"),
        Block(index=0, offset=2 * MIB, data=bytes(MIB + 1)),
        Block(index=0, offset=MIB << 20, data=b"x"),
    ],
)
def test_blocks_that_are_no_objects(driver: SheepdogDriver, server: Sheepdog, block: Block) -> None:
    """The server would take them all."""
    upload = driver.create("image", Hints(token=TOKEN, size=3 * MIB))
    with pytest.raises(InvalidRequest):
        upload.write(block)
    upload.abort()
    assert server.names() == []


def test_commits_that_are_refused(driver: SheepdogDriver, server: Sheepdog) -> None:
    upload = driver.create("image", Hints(token=TOKEN))
    upload.write(Block(index=0, offset=0, data=b"x" * (MIB + 1)))
    with pytest.raises(SizeMismatch):
        upload.commit(MIB)
    with pytest.raises(InvalidRequest, match="can't be told"):
        upload.commit(sheepdog._sentinel(OTHER, 20))
    assert driver.locate("image") is None
    upload.abort()
    upload.abort()
    assert server.names() == []
    with pytest.raises(NotFound):
        upload.commit(MIB + 1)


def test_commit_again_and_abort_after_it(driver: SheepdogDriver, server: Sheepdog) -> None:
    data = random.Random(5).randbytes(MIB + 1)
    upload = driver.create("image", Hints(token=TOKEN, size=len(data)))
    upload.write(Block(index=0, offset=0, data=data))
    # The mark is cleared, and the answer lost.
    server.on("after", 0x03, at=2)
    with pytest.raises(LinkError):
        upload.commit(len(data))
    upload.abort()
    location = driver.locate("image")
    assert location is not None
    upload.commit(len(data))
    upload.commit(len(data))
    upload.abort()
    assert stored(driver, location) == data
    assert list(driver.uploads()) == []


def test_an_upload_tells_that_it_lives(
    driver: SheepdogDriver, server: Sheepdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = driver.create("image", Hints(token=TOKEN))
    (first,) = driver.uploads()
    assert first.token == TOKEN
    assert first.image_id == "image"
    now = sheepdog.time.time() + 7200
    monkeypatch.setattr(sheepdog.time, "time", lambda: now)
    upload.write(Block(index=0, offset=0, data=b"x"))
    (same,) = driver.uploads()
    assert same.last_activity == first.last_activity
    monkeypatch.setattr(sheepdog, "_BEAT", -1.0)
    upload.write(Block(index=0, offset=0, data=b"x"))
    (later,) = driver.uploads()
    assert later.last_activity is not None
    assert later.last_activity.timestamp() == int(now)
    assert later.started == first.started
    upload.abort()


def test_entries_are_written_in_advance(driver: SheepdogDriver, server: Sheepdog) -> None:
    upload = driver.create("image", Hints(token=TOKEN, size=100 * MIB))
    before = server.log.count("write")
    for number in range(64):
        upload.write(Block(index=number, offset=number * MIB, data=b"x" * MIB))
    assert server.log.count("write") - before == 2
    upload.commit(100 * MIB)
    assert server.faults_of("image") == []
    driver.delete(upload.location)
    assert not server.objects


def test_reads_beyond_nothing(driver: SheepdogDriver, server: Sheepdog) -> None:
    """Pieces end where objects and the image end: what lies behind is the server's memory."""
    data = bytes(range(256)) * 4096 * 3 + b"end"
    server.plant("image", data)
    location = driver.parse("sheepdog://image")
    for start, stop in ((0, None), (MIB - 1, MIB + 1), (3 * MIB, 3 * MIB + 3), (3 * MIB + 2, None), (5, 5)):
        assert stored(driver, location, start, stop) == data[start:stop]
    assert list(driver.extents(location, 10, len(data), None)) == [(10, len(data))]


@pytest.mark.parametrize(
    ("filled", "areas"),
    [
        ([], []),
        ([0], [(100, MIB)]),
        ([1], [(MIB, 2 * MIB)]),
        ([0, 1], [(100, 2 * MIB)]),
        ([0, 2], [(100, MIB), (2 * MIB, 3 * MIB)]),
        ([3], [(3 * MIB, 3 * MIB + 7)]),
        ([0, 1, 2, 3], [(100, 3 * MIB + 7)]),
    ],
)
def test_extents(driver: SheepdogDriver, filled: list[int], areas: list[tuple[int, int]]) -> None:
    size = 3 * MIB + 50
    upload = driver.create("image", Hints(token=TOKEN, size=size))
    for index in filled:
        upload.write(Block(index=index, offset=index * MIB, data=b"x" * min(MIB, size - index * MIB)))
    upload.commit(size)
    assert list(driver.extents(upload.location, 100, 3 * MIB + 7, None)) == areas
    driver.delete(upload.location)


def test_a_damaged_vdi(driver: SheepdogDriver, server: Sheepdog) -> None:
    server.plant("image", b"x" * MIB)
    vdi = server.vdi("image")
    assert vdi is not None
    vdi.table[0] = 1 << 24
    with pytest.raises(StoreError, match="damaged"):
        stored(driver, driver.parse("sheepdog://image"))
    vdi.table[0] = 5
    with pytest.raises(Unavailable, match="not there"):
        stored(driver, driver.parse("sheepdog://image"))
    struct.pack_into("<Q", vdi.head, 536, (MIB << 20) + 1)
    with pytest.raises(StoreError, match="damaged"):
        driver.stat(driver.parse("sheepdog://image"))


def test_entries_beyond_the_size_are_no_obstacle(driver: SheepdogDriver, server: Sheepdog) -> None:
    """Without an empty table DEL_VDI does nothing, and says that it did."""
    server.plant("image", b"x" * 3 * MIB, size=MIB)
    driver.delete(driver.parse("sheepdog://image"))
    assert server.names() == []
    assert not server.objects


def test_a_closed_driver(driver: SheepdogDriver) -> None:
    reading = driver.read(_made(driver), 0, None)
    driver.close()
    asks: list[Callable[[], object]] = [lambda: driver.locate("image"), lambda: next(iter(reading.chunks))]
    for ask in asks:
        with pytest.raises((StoreError, LinkError), match="closed"):
            ask()


def _made(driver: SheepdogDriver) -> Location:
    upload = driver.create("image", Hints(token=TOKEN))
    upload.write(Block(index=0, offset=0, data=b"x" * 100))
    upload.commit(100)
    return upload.location


def test_a_read_that_is_closed(driver: SheepdogDriver) -> None:
    reading = driver.read(_made(driver), 0, None)
    reading.close()
    with pytest.raises(StoreError, match="closed"):
        next(iter(reading.chunks))
