"""The demonstration: its disk, its steps, and that it notices what is not as it should be."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imagestore import Store
from imagestore._commands import cli
from imagestore._demo import SIZE_MIN, human, make_disk, run
from imagestore._models import MIB
from imagestore.errors import StoreFull


def test_the_disk_is_the_same_each_time_and_mostly_holes() -> None:
    disk = make_disk(seed=7)
    assert disk == make_disk(seed=7)
    assert disk != make_disk(seed=8)
    assert 0.02 < disk.data / disk.size < 0.06


def test_the_pieces_of_the_disk_are_apart_and_its_chunks_are_what_read_gives() -> None:
    disk = make_disk(SIZE_MIN)
    ends = [offset + len(data) for offset, data in disk.pieces]
    assert all(end <= offset for end, (offset, _) in zip(ends, disk.pieces[1:], strict=False))
    assert ends[-1] == disk.size
    assert b"".join(disk.chunks()) == disk.read(0, disk.size)


def test_the_partition_table_is_a_valid_gpt_with_a_backup() -> None:
    disk = make_disk(SIZE_MIN)
    assert disk.read(510, 512) == b"\x55\xaa"
    assert disk.read(446 + 4, 446 + 5) == b"\xee"
    for at in (512, disk.size - 512):
        header = disk.read(at, at + 92)
        signature, revision, length, checksum, _, mine, other = struct.unpack_from("<8sIIIIQQ", header)
        assert (signature, revision, length) == (b"EFI PART", 0x10000, 92)
        assert zlib.crc32(header[:16] + bytes(4) + header[20:]) == checksum
        assert mine * 512 == at
        assert disk.read(other * 512, other * 512 + 8) == b"EFI PART"
        array, count, entry, entries_checksum = struct.unpack_from("<QIII", header, 72)
        entries = disk.read(array * 512, array * 512 + count * entry)
        assert zlib.crc32(entries) == entries_checksum
        assert sum(any(entries[i * entry : i * entry + 16]) for i in range(count)) == 2


def test_a_size_that_is_no_multiple_of_a_mebibyte_is_rounded_down() -> None:
    assert make_disk(SIZE_MIN + 12345).size == SIZE_MIN


def test_every_step_succeeds_and_nothing_is_left(tmp_path: Path) -> None:
    steps = list(run(tmp_path, size=SIZE_MIN))
    assert [step.name for step in steps if not step.ok] == []
    assert len(steps) == 11
    assert list(tmp_path.iterdir()) == []
    values: dict[str, Any] = {name: value for step in steps for name, value in step.values.items()}
    assert values["stored"] < SIZE_MIN // 10
    digest = hashlib.sha256(make_disk(SIZE_MIN).read(0, SIZE_MIN)).hexdigest()
    assert values["sha256"] == digest
    assert values["digests"] == {"sha256": digest}


def test_a_step_that_is_not_as_it_should_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "delete", lambda *_: None)
    steps = list(run(tmp_path, size=SIZE_MIN))
    assert [step.name for step in steps if not step.ok] == ["Delete"]


def test_a_duplicate_that_is_not_refused_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Store.add

    def careless(store: Store, image_id: str, source: Any, **arguments: Any) -> Any:
        if source == b"another image":
            store.delete(store.locate(image_id))
        return add(store, image_id, source, **arguments)

    monkeypatch.setattr(Store, "add", careless)
    steps = {step.name: step for step in run(tmp_path, size=SIZE_MIN)}
    assert steps["Same id again"].detail == "it was not refused"


def test_a_part_of_an_image_that_can_be_seen_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "exists", lambda *_: True)
    steps = {step.name: step for step in run(tmp_path, size=SIZE_MIN)}
    assert steps["Upload cut off"].detail == "a part of an image can be seen"


def test_after_an_unexpected_error_the_rest_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(Store, "add", full)
    steps = list(run(tmp_path, size=SIZE_MIN))
    assert [(step.name, step.ok) for step in steps] == [("Make a disk", True), ("Store it", False)]
    assert steps[-1].detail.startswith("StoreFull: no room")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (256 * MIB, "256.0 MiB"), (5 * 2**50, "5120.0 TiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human(size) == text


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_command_prints_a_table_and_leaves_nothing(scratch: Path) -> None:
    result = CliRunner().invoke(cli, ["demo", "--size", "32MiB"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("✓") == 11
    assert "✗" not in result.stdout
    assert "all 11 steps are as they should be" in result.stdout
    assert list(scratch.iterdir()) == []


def test_the_command_fails_if_a_step_does(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "delete", lambda *_: None)
    result = CliRunner().invoke(cli, ["demo", "--size", "32MiB"])
    assert result.exit_code == 1
    assert result.stdout.count("✗") == 1
    assert "1 of 11 steps failed" in result.stdout
    assert list(scratch.iterdir()) == []


def test_the_command_as_json(scratch: Path) -> None:
    result = CliRunner().invoke(cli, ["demo", "--size", "32MiB", "--json"])
    assert result.exit_code == 0
    *steps, end = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(step["ok"] for step in steps)
    assert end["ok"] is True
    assert end["steps"] == len(steps) == 11


def test_a_disk_that_is_too_small_is_refused() -> None:
    assert CliRunner().invoke(cli, ["demo", "--size", "1MiB"]).exit_code == 2
