from __future__ import annotations

import io
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore._source import open_source, zeros
from imagestore.errors import InvalidRequest, SourceError

MIB = 1 << 20


def drain(source, length):
    blocks = []
    while True:
        block = source.block(length)
        if not block:
            assert source.ended()
            return blocks
        blocks.append(block)


class Dribble:
    """Reads short, as sockets do."""

    def __init__(self, data, step):
        self._stream = io.BytesIO(data)
        self._step = step

    def read(self, size):
        return self._stream.read(min(size, self._step))


def kinds(data, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(data)
    yield "path", path, True
    yield "text path", str(path), True
    yield "raw file", path.open("rb", buffering=0), True
    yield "buffered file", path.open("rb"), True
    yield "bytes", data, True
    yield "bytearray", bytearray(data), True
    yield "memoryview", memoryview(data), True
    yield "BytesIO", io.BytesIO(data), False
    yield "dribble", Dribble(data, 333), False
    yield "iterable", [data[i : i + 700] for i in range(0, len(data), 700)], False
    yield "generator", (data[i : i + 5000] for i in range(0, len(data), 5000)), False
    yield "bytearrays", [bytearray(data[:100]), memoryview(data)[100:]], False


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3000, 12345])
def test_whole_blocks_of_every_kind(tmp_path, size):
    data = os.urandom(size)
    for kind, given_source, knows in kinds(data, tmp_path):
        source = open_source(given_source)
        assert source.size == (size if knows else None), kind
        blocks = drain(source, 1000)
        source.close()
        assert b"".join(blocks) == data, kind
        assert all(len(block) == 1000 for block in blocks[:-1]), kind
        assert all(type(block) is bytes for block in blocks), kind
        if hasattr(given_source, "close") and kind != "generator":
            given_source.close()


def test_looking_ahead_loses_nothing(tmp_path):
    data = os.urandom(5000)
    for kind, given_source, _ in kinds(data, tmp_path):
        source = open_source(given_source)
        found = b""
        while not source.ended():
            found += source.block(700)
        assert found == data, kind
        source.close()
        if hasattr(given_source, "close") and kind != "generator":
            given_source.close()


def test_a_pipe():
    data = os.urandom(3 * MIB)
    read_end, write_end = os.pipe()

    def feed():
        with open(write_end, "wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    with open(read_end, "rb") as pipe:
        source = open_source(pipe)
        assert source.size is None
        assert b"".join(drain(source, MIB)) == data
    thread.join()


def test_a_file_object_is_read_from_where_it_stands_and_left_where_reading_ended(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"header" + b"x" * 100)
    with open(path, "rb") as file:
        assert file.read(6) == b"header"
        source = open_source(file)
        assert source.size == 100
        assert drain(source, 64) == [b"x" * 64, b"x" * 36]
        source.close()
        assert file.tell() == 106
        assert not file.closed


def test_holes_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
        file.seek(40 * MIB)
        file.write(b"data")
    read = []
    plain = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: read.append(n) or plain(fd, n, at))
    source = open_source(path)
    blocks = drain(source, MIB)
    source.close()
    whole = b"".join(blocks)
    assert len(whole) == 64 * MIB
    assert whole[40 * MIB : 40 * MIB + 4] == b"data"
    assert whole.count(0) == 64 * MIB - 4
    assert sum(read) <= 3 * MIB, "only the block with data is read"


def test_a_file_that_grew_is_not_at_its_end(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"12345")
    source = open_source(path)
    with open(path, "ab") as file:
        file.write(b"6")
    assert source.block(100) == b"12345"
    assert not source.ended()
    source.close()


def test_what_the_source_raises_is_its_own_fault(tmp_path):
    def broken():
        yield b"abc"
        raise OSError("cable pulled")

    source = open_source(broken())
    with pytest.raises(SourceError, match="cable pulled") as caught:
        drain(source, 100)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(SourceError, match="No such file"):
        open_source(tmp_path / "absent")
    with pytest.raises(SourceError):
        open_source(tmp_path)


def test_interrupts_pass():
    def interrupted():
        yield b"abc"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drain(open_source(interrupted()), 100)


@pytest.mark.parametrize("wrong", [["text"], [1, 2], [None], io.BytesIO])
def test_pieces_that_are_not_bytes(wrong):
    if wrong is io.BytesIO:

        class NonBlocking:
            def read(self, size):
                return None

        with pytest.raises(SourceError, match="non-blocking"):
            open_source(NonBlocking()).block(10)
        return
    with pytest.raises(SourceError, match="instead of bytes"):
        open_source(wrong).block(10)


async def _agen():
    yield b""


@pytest.mark.parametrize("wrong", [7, None, io.StringIO("text"), _agen()])
def test_sources_that_are_none(wrong):
    with pytest.raises(InvalidRequest):
        open_source(wrong)


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 70), st.booleans())
def test_any_pieces_give_the_same_whole_blocks(pieces, length, peek):
    source = open_source(list(pieces))
    blocks = []
    while not (peek and source.ended()):
        block = source.block(length)
        if not block:
            break
        blocks.append(block)
    assert b"".join(blocks) == b"".join(pieces)
    assert all(len(block) == length for block in blocks[:-1])


def test_zeros_are_shared():
    assert zeros(100) == bytes(100)
    assert zeros(MIB) is zeros(MIB)
