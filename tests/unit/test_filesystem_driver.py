"""The filesystem driver by itself, without a store above it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagestore.driver import IMAGE_ID, Block, Hints, Leftover, Limits, Location, Options
from imagestore.drivers import filesystem
from imagestore.drivers.filesystem import FilesystemDriver
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    ConfigurationError,
    InUse,
    InvalidLocation,
    InvalidOption,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    StoreError,
    StoreFull,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1024 * 1024


def build(**values: Any) -> FilesystemDriver:
    defaults = {option.dest: option.default for option in FilesystemDriver.options}
    assert values.keys() <= defaults.keys()
    return FilesystemDriver(Options(defaults | values), store="local", limits=Limits(workers=5))


MORE = [path for path in os.environ.get("IMAGESTORE_TEST_DIRECTORIES", "").split(":") if path]
"""Directories on other file systems to run these tests in, such as mounts of loop devices."""


@pytest.fixture(params=["disk", "tmpfs", *MORE])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a file system of each kind, with no link in its path."""
    if request.param == "disk":
        yield tmp_path.resolve()
        return
    parent = "/dev/shm" if request.param == "tmpfs" else request.param
    if not os.access(parent, os.W_OK):
        pytest.skip(f"{parent} is not writable")
    path = Path(tempfile.mkdtemp(dir=parent)).resolve()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def opened() -> Iterator[Callable[..., FilesystemDriver]]:
    with contextlib.ExitStack() as stack:

        def make(**values: Any) -> FilesystemDriver:
            driver = build(**values)
            driver.open()
            stack.callback(driver.close)
            return driver

        yield make


@pytest.fixture(params=["auto", "named"])
def driver(request: pytest.FixtureRequest, base: Path, opened: Callable[..., FilesystemDriver]) -> FilesystemDriver:
    return opened(datadir=str(base / "images"), staging=request.param)


@pytest.fixture
def named(tmp_path: Path, opened: Callable[..., FilesystemDriver]) -> FilesystemDriver:
    return opened(datadir=str(tmp_path.resolve() / "images"), staging="named")


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def hints(size: int | None = None, token: str | None = None) -> Hints:
    return Hints(token=token or uuid.uuid4().hex, size=size)


def add(driver: FilesystemDriver, image_id: str, data: bytes, token: str | None = None) -> Location:
    upload = driver.create(image_id, hints(len(data), token))
    if data:
        upload.write(Block(index=0, offset=0, data=data, last=True))
    upload.commit(len(data))
    upload.abort()
    return upload.location


def content(driver: FilesystemDriver, location: Location, start: int = 0, stop: int | None = None) -> bytes:
    reading = driver.read(location, start, stop)
    try:
        return b"".join(reading.chunks)
    finally:
        reading.close()


def names(directory: Path | str) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != ".imagestore-lock")


def directory_of(driver: FilesystemDriver) -> Path:
    return Path(driver._directories[0].path)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def no_room(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 256 * 1024, 3 * 256 * 1024 + 17])
def test_what_is_added_is_read_back(driver: FilesystemDriver, size: int) -> None:
    data = os.urandom(size)
    token = uuid.uuid4().hex
    location = add(driver, "image", data, token)
    assert location == driver.locate("image") == driver.parse(location.uri)
    assert location.image_id == "image"
    assert location.uri == f"file://{directory_of(driver)}/image"
    described = driver.stat(location)
    assert described.size == size
    assert described.token == token
    assert described.modified is not None
    assert abs(datetime.now(UTC) - described.modified) < timedelta(minutes=1)
    assert content(driver, location) == data
    assert names(directory_of(driver)) == ["image"]


def test_blocks_come_in_any_order_and_from_many_threads(driver: FilesystemDriver) -> None:
    data = os.urandom(8 * 100_000)
    upload = driver.create("image", hints())
    blocks = [Block(index=i, offset=i * 100_000, data=data[i * 100_000 : (i + 1) * 100_000]) for i in range(8)]
    threads = [threading.Thread(target=upload.write, args=(block,)) for block in reversed(blocks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    upload.write(blocks[3])
    upload.commit(len(data))
    assert content(driver, upload.location) == data


def test_short_writes_are_continued(driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:1000]), offset))
    data = os.urandom(12_345)
    assert content(driver, add(driver, "image", data)) == data


def test_holes_cost_nothing_and_are_found_again(driver: FilesystemDriver) -> None:
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=MIB, data=b"x" * 65536))
    upload.commit(10 * MIB)
    path = directory_of(driver) / "image"
    assert path.stat().st_size == 10 * MIB
    assert path.stat().st_blocks * 512 < MIB
    version = driver.stat(upload.location).version
    assert list(driver.extents(upload.location, 0, 10 * MIB, version)) == [(MIB, MIB + 65536)]
    assert list(driver.extents(upload.location, MIB + 4096, MIB + 8192, version)) == [(MIB + 4096, MIB + 8192)]
    assert list(driver.extents(upload.location, 2 * MIB, 10 * MIB, version)) == []
    data = content(driver, upload.location)
    assert data == bytes(MIB) + b"x" * 65536 + bytes(9 * MIB - 65536)


def test_an_image_of_zeros_only(driver: FilesystemDriver) -> None:
    upload = driver.create("image", hints(MIB))
    upload.commit(MIB)
    assert content(driver, upload.location) == bytes(MIB)
    assert list(driver.extents(upload.location, 0, MIB, None)) == []


def test_extents_where_the_file_system_does_not_tell(driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    location = add(driver, "image", bytes(10_000))

    def seek(fd: int, position: int, how: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", seek)
    assert list(driver.extents(location, 10, 9_000, None)) == [(10, 9_000)]


def test_nothing_is_visible_before_the_commit(driver: FilesystemDriver) -> None:
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"secret"))
    assert driver.locate("image") is None
    assert list(driver.list()) == []
    with pytest.raises(FileNotFoundError):
        driver.stat(upload.location)
    for name in names(directory_of(driver)):
        assert stat.S_IMODE((directory_of(driver) / name).stat().st_mode) == 0o600
    upload.abort()
    upload.abort()
    assert names(directory_of(driver)) == []
    with pytest.raises(NotFound):
        upload.commit(6)


def test_the_mode_does_not_depend_on_the_umask(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    for text, mode in [("0640", 0o640), ("0", 0o640), ("664", 0o664), ("0400", 0o400)]:
        driver = opened(datadir=str(base), file_mode=text)
        before = os.umask(0o077)
        try:
            add(driver, f"image-{text}", b"data")
        finally:
            os.umask(before)
        assert stat.S_IMODE((base / f"image-{text}").stat().st_mode) == mode


def test_a_taken_name_is_refused_at_the_commit(driver: FilesystemDriver) -> None:
    first, second = driver.create("image", hints()), driver.create("image", hints())
    for upload, data in ((first, b"first"), (second, b"second")):
        upload.write(Block(index=0, offset=0, data=data))
    second.commit(6)
    with pytest.raises(AlreadyExists):
        first.commit(5)
    first.abort()
    assert content(driver, second.location) == b"second"
    assert names(directory_of(driver)) == ["image"]


@pytest.mark.parametrize("kind", ["directory", "link", "dangling"])
def test_a_name_taken_by_something_else_is_refused_too(driver: FilesystemDriver, kind: str) -> None:
    path = directory_of(driver) / "image"
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/etc/hostname" if kind == "link" else "nowhere")
    assert driver.locate("image") is None
    upload = driver.create("image", hints())
    with pytest.raises(AlreadyExists):
        upload.commit(0)
    upload.abort()
    assert names(directory_of(driver)) == ["image"]


def test_a_discarded_upload_that_could_still_be_linked_is_not(
    named: FilesystemDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where an open file that is removed gets another name."""
    upload = named.create("image", hints())
    (leftover,) = named.uploads()
    os.link(directory_of(named) / leftover.key[1], directory_of(named) / ".nfs0001")
    named.discard(leftover)
    with pytest.raises(NotFound):
        upload.commit(0)
    upload.abort()
    assert named.locate("image") is None


def test_directories_that_can_not_be_synced(driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    driver.delete(add(driver, "image", b"data"))


def test_without_proc_files_are_renamed(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    def link(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", link)
        driver = opened(datadir=str(base))
        location = add(driver, "image", b"data")
    assert driver.capabilities.collision == "detected"
    assert content(driver, location) == b"data"
    assert names(base) == ["image"]


def test_a_mode_that_the_file_system_refuses(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fchmod(fd: int, mode: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", fchmod)
    with pytest.raises(ConfigurationError, match="file_mode"):
        build(datadir=str(base)).open()
    assert names(base) == []


def test_of_racing_adders_exactly_one_wins(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    directories = [f"{base}/{name}:0" for name in "abc"]
    drivers = [opened(datadirs=directories, staging=staging) for staging in ("auto", "named", "auto", "named")]
    for round_ in range(20):
        barrier = threading.Barrier(len(drivers))
        results: list[Any] = []

        def race(driver: FilesystemDriver, place: int, round_: int = round_, barrier: Any = barrier) -> None:
            driver._directories[place % 3].__dict__["free"] = lambda: 2**60
            upload = driver.create(f"image-{round_}", hints())
            del driver._directories[place % 3].__dict__["free"]
            upload.write(Block(index=0, offset=0, data=str(place).encode()))
            barrier.wait()
            try:
                upload.commit(1)
                results.append((upload.location, str(place).encode()))  # noqa: B023 - runs within the round
            except AlreadyExists:
                pass
            upload.abort()

        threads = [threading.Thread(target=race, args=(one, place)) for place, one in enumerate(drivers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 1
        assert content(drivers[0], results[0][0]) == results[0][1]
        assert drivers[0].locate(f"image-{round_}") == results[0][0]
    assert len(list(drivers[0].list())) == 20
    assert [name for place in "abc" for name in names(base / place) if name.startswith(".")] == []


def test_a_commit_may_be_repeated(driver: FilesystemDriver) -> None:
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"data"))
    upload.commit(4)
    upload.commit(4)
    upload.abort()
    assert content(driver, upload.location) == b"data"


def test_a_commit_whose_answer_was_lost_is_recognised(
    driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"data"))
    real = os.link

    def link(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with pytest.raises(OSError, match="Input/output"):
            upload.commit(4)
    upload.commit(4)
    upload.abort()
    assert content(driver, upload.location) == b"data"
    assert names(directory_of(driver)) == ["image"]


@pytest.mark.usefixtures("without_links")
def test_a_rename_whose_answer_was_lost_is_recognised(
    base: Path, opened: Callable[..., FilesystemDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = opened(datadir=str(base))
    upload = driver.create("image", hints())
    real = os.rename

    def rename(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            upload.commit(4)
    upload.commit(4)
    assert names(base) == ["image"]


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_can_not_be_made_durable_is_taken_back(
    driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, links: bool
) -> None:
    if not links:
        request.getfixturevalue("without_links")
        driver.close()
        driver.open()
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"data"))
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output") as caught:
                upload.commit(4)
            assert driver.locate("image") is None
            translated = driver.translate(caught.value)
            assert isinstance(translated, Unavailable)
            assert translated.temporary
    upload.commit(4)
    assert content(driver, upload.location) == b"data"
    assert names(directory_of(driver)) == ["image"]


def test_an_upload_whose_name_was_taken_back_leaves_nothing(
    driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = driver.create("image", hints())
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        upload.commit(4)
    upload.abort()
    assert names(directory_of(driver)) == []


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, Unavailable), (errno.ENOSPC, StoreFull)])
def test_data_that_did_not_reach_the_disk_is_never_committed(
    driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError]
) -> None:
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"data"))

    def fsync(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(kind) as caught:
            upload.commit(4)
    assert not caught.value.temporary
    with pytest.raises(kind):
        upload.commit(4)
    upload.abort()
    assert names(directory_of(driver)) == []


def test_the_order_of_a_commit(driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, link, unlink = os.fsync, os.link, os.unlink

    def note(step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            kind = ""
            if step == "fsync":
                kind = " directory" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else " file"
            steps.append(step + kind)
            return call(*args, **kwargs)

        return noted

    upload = driver.create("image", hints())
    monkeypatch.setattr(os, "fsync", note("fsync", fsync))
    monkeypatch.setattr(os, "link", note("link", link))
    monkeypatch.setattr(os, "unlink", note("unlink", unlink))
    upload.commit(1)
    named = not driver._directories[0].unnamed
    assert steps == ["fsync file", "link", "fsync directory", *(["unlink"] if named else [])]
    steps.clear()
    driver.delete(upload.location)
    assert steps == ["unlink", "fsync directory"]


def test_fsync_can_be_turned_off(
    base: Path, opened: Callable[..., FilesystemDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = opened(datadir=str(base), fsync=False)
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    driver.delete(add(driver, "image", b"data"))
    assert calls == []


def test_a_full_disk_is_told_and_leaves_nothing(driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = driver.create("image", hints())
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_room)
        with pytest.raises(OSError, match="No space") as caught:
            upload.write(Block(index=0, offset=0, data=b"data"))
    assert isinstance(driver.translate(caught.value), StoreFull)
    upload.abort()
    assert names(directory_of(driver)) == []


def test_a_full_disk_can_still_be_read_and_emptied(
    base: Path, opened: Callable[..., FilesystemDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    location = add(opened(datadir=str(base)), "image", b"data")
    real = os.open

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
            no_room()
        return real(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        driver = opened(datadir=str(base))
        assert content(driver, location) == b"data"
        assert driver.capabilities.collision == "detected"
        driver.delete(location)
    location = add(driver, "image", b"again")
    assert content(driver, location) == b"again"
    assert driver._directories[0].links
    assert driver.stat(location).token is not None


@pytest.mark.usefixtures("without_links")
def test_without_links_a_taken_name_is_still_refused(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    driver = opened(datadir=str(base))
    assert driver.capabilities.collision == "detected"
    first, second = driver.create("image", hints()), driver.create("image", hints())
    first.commit(1)
    first.commit(1)
    with pytest.raises(AlreadyExists):
        second.commit(2)
    second.abort()
    collected = driver.create("other", hints())
    for leftover in driver.uploads():
        driver.discard(leftover)
    with pytest.raises(NotFound):
        collected.commit(1)
    collected.abort()
    assert names(base) == ["image"]
    assert content(driver, first.location) == bytes(1)


def test_a_commit_and_an_abort_touch_only_their_own_file(named: FilesystemDriver) -> None:
    upload = named.create("image", hints(token="a" * 32))
    upload.write(Block(index=0, offset=0, data=b"ours"))
    part = directory_of(named) / f".imagestore-{'a' * 32}.part"
    part.unlink()
    part.write_bytes(b"somebody else's")
    with pytest.raises(NotFound):
        upload.commit(4)
    upload.abort()
    assert part.read_bytes() == b"somebody else's"
    assert named.locate("image") is None


def test_an_upload_that_is_dropped_lets_go_of_its_file(driver: FilesystemDriver) -> None:
    before = descriptors()
    for number in range(3):
        driver.create(f"image-{number}", hints()).write(Block(index=0, offset=0, data=b"data"))
    assert descriptors() == before
    for leftover in driver.uploads():
        assert leftover.alive is False
        driver.discard(leftover)
    assert names(directory_of(driver)) == []


def test_a_running_upload_is_listed_as_alive(named: FilesystemDriver) -> None:
    token = uuid.uuid4().hex
    upload = named.create("image", hints(token=token))
    upload.write(Block(index=0, offset=0, data=b"x" * 8192))
    (leftover,) = named.uploads()
    assert leftover.token == token
    assert leftover.image_id == "image"
    assert leftover.alive is True
    assert leftover.bytes is not None
    assert 8192 <= leftover.bytes <= 8192 + 4096
    assert leftover.started is not None
    assert leftover.last_activity is not None
    assert leftover.started <= leftover.last_activity <= datetime.now(UTC) + timedelta(seconds=1)
    named.discard(leftover)
    named.discard(leftover)
    with pytest.raises(NotFound):
        upload.commit(8192)
    upload.abort()
    assert named.locate("image") is None


def test_listing_uploads_does_not_hold_them(named: FilesystemDriver) -> None:
    upload = named.create("image", hints())
    iterator = named.uploads()
    assert next(iterator).alive
    upload.abort()
    assert list(iterator) == []


def test_what_a_killed_process_left_is_found(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    script = (
        "import sys, time\n"
        "from tests_helper import build, hints, Block\n"
        "driver = build(datadir=sys.argv[1], staging=sys.argv[2]); driver.open()\n"
        "upload = driver.create('image', hints(token='b' * 32))\n"
        "upload.write(Block(index=0, offset=0, data=b'x' * 4096))\n"
        "print('ready', flush=True); time.sleep(60)\n"
    ).replace("tests_helper", Path(__file__).stem)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for staging in ("auto", "named"):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(base), staging], stdout=subprocess.PIPE, env=environment
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            driver = opened(datadir=str(base), staging=staging)
            alive = [leftover.alive for leftover in driver.uploads()]
            child.send_signal(signal.SIGKILL)
        leftovers = list(driver.uploads())
        if driver._directories[0].unnamed:
            assert alive == []
            assert leftovers == []
        else:
            assert alive == [True]
            assert [(one.token, one.image_id, one.alive) for one in leftovers] == [("b" * 32, "image", False)]
            driver.discard(leftovers[0])
        assert names(base) == []


def test_a_cut_between_link_and_unlink_leaves_the_image_whole(
    named: FilesystemDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = named.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"data"))

    def unlink(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        upload.commit(4)
    (leftover,) = named.uploads()
    assert leftover.alive is False
    named.discard(leftover)
    assert content(named, upload.location) == b"data"
    assert names(directory_of(named)) == ["image"]


def test_a_create_may_be_repeated(named: FilesystemDriver) -> None:
    token = uuid.uuid4().hex
    first = named.create("image", hints(token=token))
    second = named.create("image", hints(token=token))
    first.abort()
    second.commit(0)
    assert names(directory_of(named)) == ["image"]


def test_foreign_things_are_neither_listed_nor_discarded(driver: FilesystemDriver) -> None:
    place = directory_of(driver)
    token = "c" * 32
    (place / ".hidden").write_text("x")
    (place / ".imagestore-lock").write_text("")
    (place / f".imagestore-{token.upper()}.part").write_text("x")
    (place / f".imagestore-{token}.part.bak").write_text("x")
    (place / f" .imagestore-{token}.part").write_text("x")
    (place / f".imagestore-{'d' * 32}.part").mkdir()
    (place / f".imagestore-{'e' * 32}.part").symlink_to("/etc/hostname")
    (place / "sub").mkdir()
    (place / "sub" / f".imagestore-{token}.part").write_text("x")
    (place / "a b").write_text("x")
    (place / "link").symlink_to("/etc/hostname")
    os.mkfifo(place / "fifo")
    before = names(place)
    assert list(driver.uploads()) == []
    assert list(driver.list()) == []
    location = add(driver, "image", b"data")
    (entry,) = driver.list()
    assert (entry.image_id, entry.location, entry.size) == ("image", location, 4)
    assert entry.modified == driver.stat(location).modified
    for key, bad in [
        ((str(place), "x"), "../sub/.imagestore-" + token),
        (("/etc", "x"), token),
        ((), token),
        ((str(place / "sub"), f".imagestore-{token}.part"), token),
        ((str(place), "x"), "d" * 32),
        ((str(place), "x"), "e" * 32),
    ]:
        with pytest.raises(InvalidRequest):
            driver.discard(Leftover(token=bad, key=key))
    assert names(place) == sorted([*before, "image"])


def test_lists_may_run_at_the_same_time(driver: FilesystemDriver) -> None:
    for number in range(5):
        add(driver, f"image-{number}", b"")
    first, second = driver.list(), driver.list()
    found: tuple[list[str], list[str]] = ([], [])
    for one, other in zip(first, second, strict=True):
        found[0].append(one.image_id)
        found[1].append(other.image_id)
    assert sorted(found[0]) == sorted(found[1]) == [f"image-{number}" for number in range(5)]


def test_ranges(driver: FilesystemDriver) -> None:
    data = os.urandom(700_000)
    location = add(driver, "image", data)
    for start, stop in [(0, 1), (699_999, None), (1, 262_145), (262_143, 524_289), (0, 700_000)]:
        assert content(driver, location, start, stop) == data[start:stop]
    for start, stop in [(0, 700_001), (700_001, None), (5, 4)]:
        with pytest.raises(Changed):
            driver.read(location, start, stop)


def test_a_read_that_is_pinned_to_a_version(driver: FilesystemDriver) -> None:
    location = add(driver, "image", b"x" * 600_000)
    version = driver.stat(location).version
    reading = driver.read(location, 0, None, version)
    assert reading.stat.version == version
    path = directory_of(driver) / "image"
    path.chmod(0o600)
    os.link(path, directory_of(driver) / "other")
    assert len(b"".join(reading.chunks)) == 600_000
    os.utime(path, ns=(0, 0))
    with pytest.raises(Changed):
        driver.read(location, 0, None, version)
    with pytest.raises(Changed):
        driver.extents(location, 0, 10, version)


def test_a_change_under_a_read_is_told_before_the_last_chunk(driver: FilesystemDriver) -> None:
    location = add(driver, "image", b"x" * 600_000)
    path = directory_of(driver) / "image"
    changes: list[Callable[[], None]] = [lambda: os.utime(path, ns=(1, 1)), lambda: os.truncate(path, 300_000)]
    for change in changes:
        reading = driver.read(location, 0, None)
        got = len(next(reading.chunks))
        change()
        with pytest.raises(Changed):
            got += sum(len(chunk) for chunk in reading.chunks)
        assert got < 600_000
        with pytest.raises(Cancelled):
            next(reading.chunks)
    extents = driver.extents(location, 0, 300_000, None)
    next(extents)
    path.write_bytes(b"y")
    with pytest.raises(Changed):
        list(extents)


def test_what_was_deleted_can_be_read_to_its_end(driver: FilesystemDriver) -> None:
    location = add(driver, "image", b"x" * 600_000)
    reading = driver.read(location, 0, None)
    driver.delete(location)
    assert len(b"".join(reading.chunks)) == 600_000
    with pytest.raises(FileNotFoundError) as caught:
        driver.delete(location)
    assert isinstance(driver.translate(caught.value), NotFound)


def test_no_read_keeps_a_descriptor(driver: FilesystemDriver) -> None:
    location = add(driver, "image", b"x" * 600_000)
    before = descriptors()
    for take in (0, 1, 9):
        reading = driver.read(location, 0, None)
        for _, _ in zip(range(take), reading.chunks, strict=False):
            pass
        extents = driver.extents(location, 0, 600_000, None)
        if take:
            next(extents)
        del reading, extents
    assert descriptors() == before
    reading = driver.read(location, 0, None)
    next(reading.chunks)
    reading.close()
    reading.close()
    assert descriptors() == before
    with pytest.raises(Cancelled):
        next(reading.chunks)
    with pytest.raises(Changed):
        driver.read(location, 0, None, "other")
    assert descriptors() == before


def test_a_close_waits_for_the_read_of_another_thread(
    driver: FilesystemDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = add(driver, "image", b"x" * 600_000)
    reading = driver.read(location, 0, None)
    real = os.pread
    inside, go = threading.Event(), threading.Event()
    got: list[bytes] = []

    def pread(fd: int, size: int, offset: int) -> bytes:
        inside.set()
        go.wait(10)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    thread = threading.Thread(target=lambda: got.append(next(reading.chunks)))
    thread.start()
    assert inside.wait(10)
    before = descriptors()
    reading.close()
    assert descriptors() == before
    go.set()
    thread.join()
    assert len(got) == 1
    assert descriptors() == before - 1


def test_the_highest_priority_with_room_is_chosen(
    base: Path, opened: Callable[..., FilesystemDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"a": 10, "b": 100, "c": 1000, "d": 50}
    monkeypatch.setattr(filesystem._Directory, "free", lambda self: free[Path(self.path).name])
    entries = [f"{base}/a:9", f"{base}/b", f"{base}/c:-1", f"{base}/d:0"]
    for size, place in [(5, "a"), (10, "a"), (11, "b"), (101, "c"), (5000, "c"), (0, "a")]:
        driver = opened(datadirs=entries)
        upload = driver.create("image", hints(size))
        assert upload.location.uri == f"file://{base}/{place}/image"
        upload.abort()
    driver = opened(datadirs=entries, sparse=False)
    assert driver.capabilities.sparse_unit is None
    with pytest.raises(StoreFull):
        driver.create("image", hints(1001))
    driver.create("image", hints()).abort()
    assert names(base / "c") == []


@pytest.mark.parametrize("taken", ["a", "b"])
def test_an_id_exists_once_in_all_directories(base: Path, opened: Callable[..., FilesystemDriver], taken: str) -> None:
    driver = opened(datadirs=[f"{base}/a:2", f"{base}/b:1"])
    upload = driver.create("image", hints())
    (base / taken / "image").write_bytes(b"there before")
    with pytest.raises(AlreadyExists):
        upload.commit(0)
    upload.abort()
    found = driver.locate("image")
    assert found is not None
    assert content(driver, found) == b"there before"
    assert [one.location for one in driver.list()] == [found]


def test_the_lock_of_another_user_will_do(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    driver = opened(datadirs=[f"{base}/a:2", f"{base}/b:1"])
    add(driver, "image", b"")
    real = os.open
    opens: list[int] = []

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if path == ".imagestore-lock":
            opens.append(flags)
            if flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_)
        add(driver, "second", b"")
    assert len(opens) == 2
    assert (base / "a" / ".imagestore-lock").stat().st_mode & 0o777 == 0o644


def test_usage_counts_a_file_system_once(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    system = os.statvfs(base)
    usage = opened(datadirs=[f"{base}/a", f"{base}/b"]).usage()
    assert usage.total == system.f_blocks * system.f_frsize
    assert usage.used is not None
    assert usage.free is not None
    assert 0 < usage.used < usage.total
    assert 0 < usage.free < usage.total


def test_capabilities_and_no_trace_of_the_probe(driver: FilesystemDriver) -> None:
    capabilities = driver.capabilities
    assert capabilities.collision == "exclusive"
    assert capabilities.parallel_writes == 5
    assert capabilities.sparse_unit == 4096
    assert capabilities.ranged_reads
    assert capabilities.repeatable_create
    assert capabilities.blocks_max is None
    assert names(directory_of(driver)) == []
    assert stat.S_IMODE(directory_of(driver).stat().st_mode) == 0o750


def test_where_the_file_system_has_less(
    base: Path, opened: Callable[..., FilesystemDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def setxattr(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def flock(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "setxattr", setxattr)
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "open", open_)
    driver = opened(datadir=str(base))
    assert driver.capabilities.collision == "exclusive"
    assert not driver.capabilities.commit_proof
    upload = driver.create("image", hints())
    (leftover,) = driver.uploads()
    assert leftover.image_id is None
    assert leftover.alive is None
    upload.commit(3)
    assert driver.stat(upload.location).token is None
    assert names(base) == ["image"]
    several = opened(datadirs=[f"{base}/a", f"{base}/b"])
    assert several.capabilities.collision == "detected"
    add(several, "image", b"data")


def test_a_probe_that_fails_is_not_taken_for_an_answer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", link)
    before = descriptors()
    driver = build(datadir=str(base))
    with pytest.raises(OSError, match="Input/output"):
        driver.open()
    assert names(base) == []
    assert descriptors() == before


def test_directories_that_can_not_be_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "file").write_text("x")
    (base / "one").mkdir()
    (base / "alias").symlink_to("one")
    before = descriptors()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"datadir": f"{base}/file"}, f"option datadir: images can't be created in {base}/file"),
        ({"datadir": f"{base}/file/below"}, "option datadir"),
        ({"datadir": f"{base}/missing", "create_datadir": False}, "No such file"),
        (
            {"datadirs": [f"{base}/one", f"{base}/missing"], "create_datadir": False},
            f"option datadirs: images can't be created in {base}/missing",
        ),
        ({"datadirs": [f"{base}/one", f"{base}/alias"]}, "same directory"),
    ]
    for values, text in cases:
        with pytest.raises(ConfigurationError, match=text):
            build(**values).open()
        assert descriptors() == before
    assert not (base / "missing").exists()

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *args, **kwargs)

    real = os.open
    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(ConfigurationError, match="Read-only file system"):
        build(datadir=f"{base}/one").open()
    assert descriptors() == before


def test_missing_directories_are_made(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    opened(datadir=f"{base}/new/deeper")
    for path in (base / "new", base / "new" / "deeper"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_no_descriptor_is_kept_after_close(base: Path) -> None:
    before = descriptors()
    driver = build(datadirs=[f"{base}/a", f"{base}/b"])
    assert descriptors() == before
    driver.open()
    location = add(driver, "image", b"data")
    content(driver, location)
    driver.stat(location)
    list(driver.list())
    list(driver.uploads())
    driver.usage()
    driver.delete(location)
    upload = driver.create("image", hints())
    driver.close()
    driver.close()
    with contextlib.suppress(OSError):
        upload.abort()
    del upload
    assert descriptors() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        driver.locate("image")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "option datadir"),
        ({"datadir": ""}, "option datadir"),
        ({"datadir": "/a", "datadirs": ["/b"]}, "option datadirs"),
        ({"datadir": "relative"}, "absolute"),
        ({"datadir": "/a/../b"}, r"'\.\.'"),
        ({"datadir": "/"}, "root"),
        ({"datadir": "//."}, "root"),
        ({"datadir": "/a\nb"}, "characters"),
        ({"datadir": "/a\udcff"}, "characters"),
        ({"datadirs": ["/a:high"]}, "priority.*'/a:high'.*integer"),
        ({"datadirs": ["/a:"]}, "integer"),
        ({"datadirs": ["/a:1", "/a/:2"]}, "twice"),
        ({"datadir": "/a", "accept_locations": ["b"]}, "option accept_locations"),
        ({"datadir": "/a", "accept_locations": ["/"]}, "option accept_locations"),
        ({"datadir": "/a", "file_mode": "0888"}, "option file_mode"),
        ({"datadir": "/a", "file_mode": "rw-r--r--"}, "octal"),
        ({"datadir": "/a", "file_mode": "1777"}, "octal"),
        ({"datadir": "/a", "file_mode": "0240"}, "owner"),
        ({"datadir": "/a", "file_mode": str(0o640)}, "owner"),
        ({"datadir": "/a", "file_mode": str(0o660)}, "owner"),
        ({"datadir": "/a", "file_mode": "-640"}, "octal"),
    ],
)
def test_options_that_are_wrong(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text) as caught:
        build(**values)
    assert caught.value.store == "local"
    assert "store local" in str(caught.value)


def test_datadirs_are_sorted_and_tidied() -> None:
    driver = build(datadirs=["/c", "/a//:5", "/with:colon:-3", " /b/./x/ : +7 "])
    assert [(one.path, one.priority) for one in driver._directories] == [
        ("/b/x", 7),
        ("/a", 5),
        ("/c", 0),
        ("/with:colon", -3),
    ]


def test_every_option_has_a_help_text_and_a_plain_name() -> None:
    for option in FilesystemDriver.options:
        assert re.fullmatch("[a-z_]+", option.name)
        assert option.help is not None
        assert len(option.help) > 40


@pytest.fixture(scope="module")
def unopened() -> FilesystemDriver:
    return build(
        datadirs=["/srv/images", "/srv/images?#%41 x:0"], accept_locations=["/old", "/srv/images/.old", "/old/x"]
    )


@pytest.mark.parametrize(
    ("uri", "canonical", "image_id"),
    [
        ("file:///srv/images/a", "file:///srv/images/a", "a"),
        ("filesystem:///srv/images/a", "file:///srv/images/a", "a"),
        ("FILE:///srv/images/a", "file:///srv/images/a", "a"),
        ("FileSystem://LocalHost/srv/images/a", "file:///srv/images/a", "a"),
        ("file:///srv/images/sub/dir/a", "file:///srv/images/sub/dir/a", "a"),
        ("file:///srv/images/a%20b", "file:///srv/images/a%20b", None),
        ("file:///srv/images/%2e%2e", "file:///srv/images/%2e%2e", None),
        ("file:///srv/images/ä@b:c", "file:///srv/images/ä@b:c", None),
        ("file:///srv/images?#%41 x/a", "file:///srv/images?#%41 x/a", "a"),
        ("file:///old/a", "file:///old/a", "a"),
        ("file:///srv/images/.old/a", "file:///srv/images/.old/a", "a"),
        ("file:///old/" + "a" * 255, "file:///old/" + "a" * 255, None),
    ],
)
def test_locations_that_are_right(unopened: FilesystemDriver, uri: str, canonical: str, image_id: str | None) -> None:
    location = unopened.parse(uri)
    assert location.uri == canonical
    assert location.image_id == image_id
    assert unopened.parse(canonical) == location


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/srv/images/a",
        "file:/srv/images/a",
        "file:srv/images/a",
        "http:///srv/images/a",
        "file+x:///srv/images/a",
        " file:///srv/images/a",
        "file://",
        "file:///",
        "file://srv/images/a",
        "file://host/srv/images/a",
        "file://localhost",
        "file://localhost:80/srv/images/a",
        "file://.//srv/images/a",
        "file:////srv/images/a",
        "file:///srv/images",
        "file:///srv/images/",
        "file:///srv/images//a",
        "file:///srv/images/a/",
        "file:///srv/images/.",
        "file:///srv/images/..",
        "file:///srv/images/./a",
        "file:///srv/images/../images/a",
        "file:///srv/images/x/../a",
        "file:///srv/./images/a",
        "file:///srv/../srv/images/a",
        "file:///srv/imagesx/a",
        "file:///srv/images-old/a",
        "file:///srv/imagesxy",
        "file:///srv/image/a",
        "file:///etc/passwd",
        "file:///srv/images/.hidden",
        "file:///srv/images/.imagestore-" + "a" * 32 + ".part",
        "file:///srv/images/.sub/a",
        "file:///srv/images/a\0",
        "file:///srv/images/a\nb",
        "file:///srv/images/a\x7f",
        "file:///srv/images/a\x85",
        "file:///srv/images/\ud800",
        "file:///srv/images/a?b",
        "file:///srv/images/a#b",
        "file:///srv/images?/../a",
        "file:///SRV/images/a",
        "file:///srv/images/" + "a" * 256,
        "file:///srv/images/" + "ä" * 128,
        "file:///srv/images/" + "a/" * 4096 + "a",
        "\0",
    ],
)
def test_locations_that_are_wrong(unopened: FilesystemDriver, uri: str) -> None:
    with pytest.raises(InvalidLocation):
        unopened.parse(uri)


PIECES = st.sampled_from(
    [*"/\\~?#@: xa\0\n\u2215\uff0e\u2024", "//", "..", ".", "..;", "%2e", "%2f", "://"]
) | st.sampled_from(["file:", "filesystem:", "localhost", "/srv/images/", "srv", "images", "old", "etc", "passwd"])
TEXTS = st.one_of(
    st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join),
    st.lists(PIECES | st.text(max_size=3), max_size=8).map(lambda parts: "file:///srv/images/" + "".join(parts)),
    st.lists(PIECES, max_size=8).map(lambda parts: "file:///" + "/".join(parts)),
    st.text(max_size=40),
)


@settings(max_examples=500)
@given(TEXTS)
@example("file:///srv/images/../../etc/passwd")
def test_no_accepted_text_leads_out(unopened: FilesystemDriver, uri: str) -> None:
    try:
        location = unopened.parse(uri)
    except InvalidLocation:
        return
    path = location.uri.removeprefix("file://")
    assert location.uri == "file://" + path
    assert os.path.normpath(path) == path
    assert any(
        path.startswith(root + "/")
        for root in ("/srv/images", "/srv/images?#%41 x", "/old", "/srv/images/.old", "/old/x")
    )
    assert not os.path.basename(path).startswith(".")
    assert path.isprintable() or not any(ord(sign) < 32 or ord(sign) == 127 for sign in path)
    assert location.image_id is None or IMAGE_ID.fullmatch(location.image_id)
    assert unopened.parse(location.uri) == location


class Trap:
    """A store with links out of it in every place, and a canary outside that must stay as it is."""

    def __init__(self, base: Path) -> None:
        self.canary = base / "outside" / "canary"
        self.canary.parent.mkdir()
        self.canary.write_bytes(b"canary")
        self.images, self.old = base / "images", base / "old"
        for place in (self.images, self.old):
            place.mkdir()
            (place / "link").symlink_to(self.canary)
            (place / "relative").symlink_to("../outside/canary")
            (place / "up").symlink_to("..")
            (place / "out").symlink_to(self.canary.parent)
            (place / "loop").symlink_to("loop")
            (place / "inside").symlink_to("real")
            (place / "folder").mkdir()
            (place / "folder" / "image").write_bytes(b"in a folder")
            (place / "folder" / "out").symlink_to(self.canary.parent)
            (place / "folder" / "link").symlink_to(self.canary)
            (place / "alias").symlink_to("folder")
            (place / "real").write_bytes(b"real")
            os.mkfifo(place / "fifo")
            with socket.socket(socket.AF_UNIX) as server:
                here = os.open(place, os.O_RDONLY)
                server.bind(f"/proc/self/fd/{here}/socket")
                os.close(here)
            with contextlib.suppress(PermissionError):
                os.mknod(place / "device", stat.S_IFCHR | 0o600, os.makedev(1, 5))
        self.driver = build(datadir=str(self.images), accept_locations=[str(self.old)])
        self.driver.open()
        self.status = self.canary.stat()

    def reach(self, location: Location) -> bytes | None:
        """Try everything that a location allows. What was read, or None."""
        result = self.attempt(lambda: content(self.driver, location))
        others: list[Callable[[], Any]] = [
            lambda: self.driver.stat(location),
            lambda: list(self.driver.extents(location, 0, 1, None)),
            lambda: self.driver.delete(location),
        ]
        refusals = [isinstance(self.attempt(other), StoreError) for other in others]
        assert refusals == [isinstance(result, StoreError)] * 3
        if isinstance(result, StoreError):
            assert isinstance(result, InvalidLocation | NotFound)
            return None
        assert isinstance(result, bytes)
        return result

    def attempt(self, use: Callable[[], Any]) -> Any:
        try:
            return use()
        except StoreError as error:
            return error
        except OSError as error:
            return self.driver.translate(error)

    def check(self) -> None:
        now = self.canary.stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_nlink) == (
            self.status.st_ino,
            self.status.st_mtime_ns,
            self.status.st_ctime_ns,
            self.status.st_nlink,
        )
        assert self.canary.read_bytes() == b"canary"
        assert os.listdir(self.canary.parent) == ["canary"]


@pytest.fixture
def trap(base: Path) -> Iterator[Trap]:
    trap = Trap(base)
    yield trap
    trap.driver.close()
    trap.check()


HOSTILE = [
    "link",
    "relative",
    "up/outside/canary",
    "up/images/real",
    "out/canary",
    "folder/out/canary",
    "folder/link",
    "alias/image",
    "alias/link",
    "loop",
    "loop/x",
    "inside",
    "folder",
    "fifo",
    "socket",
    "device",
    "real/x",
    "missing",
    "missing/x",
    "folder/missing",
]


@pytest.mark.parametrize("place", ["images", "old"])
def test_no_link_and_nothing_odd_is_followed(trap: Trap, place: str) -> None:
    directory = getattr(trap, place)
    before = sorted(os.listdir(directory))
    opens = descriptors()
    for name in HOSTILE:
        assert trap.reach(trap.driver.parse(f"file://{directory}/{name}")) is None, name
        trap.check()
    assert sorted(os.listdir(directory)) == before
    assert descriptors() == opens
    assert trap.reach(trap.driver.parse(f"file://{directory}/folder/image")) == b"in a folder"
    assert trap.reach(trap.driver.parse(f"file://{directory}/real")) == b"real"
    assert "real" not in os.listdir(directory)
    assert os.listdir(directory / "folder") != []


@pytest.mark.parametrize("path", ["outside/canary", "images/../outside/canary", "images/link/../../outside/canary"])
def test_a_location_made_by_hand_reaches_no_further(trap: Trap, path: str) -> None:
    target = str(trap.images.parent / path)
    for key in ((), (str(trap.images), "..", "outside", "canary"), (str(trap.canary.parent), "canary")):
        for uri in (f"file://{target}", target):
            assert trap.reach(Location(uri=uri, key=key, image_id="real")) is None
    trap.check()


def test_a_component_that_is_swapped_for_a_link(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the file and its opening somebody puts a link there."""
    location = trap.driver.parse(f"file://{trap.images}/real")
    real = os.stat

    def swap(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        result = real(path, *args, **kwargs)
        if path == "real":
            (trap.images / "real").unlink()
            (trap.images / "real").symlink_to(trap.canary)
        return result

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(OSError, match="symbolic links") as caught:
        trap.driver.read(location, 0, None)
    assert isinstance(trap.driver.translate(caught.value), InvalidLocation)
    monkeypatch.undo()
    trap.check()


NAMES = st.one_of(
    st.sampled_from(
        [*HOSTILE, ".", "..", "", "...", "~", "-", "canary", "outside", "images", "old", "\u2024\u2024", "a\\..\\b"]
    ),
    st.text(max_size=6),
    st.text(max_size=6).map(lambda text: quote(text)),
    st.just("n" * 255),
)


def test_hostile_locations_reach_nothing_outside(base: Path) -> None:
    trap = Trap(base)

    @settings(max_examples=150)
    @given(st.sampled_from([trap.images, trap.old, trap.images.parent]), st.lists(NAMES, min_size=1, max_size=5))
    def hostile(place: Path, parts: list[str]) -> None:
        uri = f"file://{place}/{'/'.join(parts)}"
        try:
            location = trap.driver.parse(uri)
        except InvalidLocation:
            location = Location(uri=uri)
        data = trap.reach(location)
        assert data in (None, b"real", b"in a folder")
        for root in (trap.images, trap.old):
            (root / "real").write_bytes(b"real")
            (root / "folder" / "image").write_bytes(b"in a folder")

    hostile()
    trap.driver.close()
    trap.check()


def test_accepted_directories_are_never_listed_or_written(trap: Trap) -> None:
    (trap.old / "former").write_bytes(b"former")
    (trap.old / f".imagestore-{'a' * 32}.part").write_bytes(b"x")
    assert trap.driver.locate("former") is None
    assert [one.image_id for one in trap.driver.list()] == ["real"]
    assert list(trap.driver.uploads()) == []
    location = add(trap.driver, "former", b"new")
    assert location.uri == f"file://{trap.images}/former"
    assert content(trap.driver, trap.driver.parse(f"file://{trap.old}/former")) == b"former"


def test_a_data_directory_may_itself_be_a_link(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    (base / "real").mkdir()
    (base / "link").symlink_to("real")
    driver = opened(datadir=f"{base}/link")
    assert content(driver, add(driver, "image", b"data")) == b"data"
    with pytest.raises(InvalidLocation):
        driver.parse(f"file://{base}/real/image")


def test_an_accepted_directory_that_is_missing(base: Path, opened: Callable[..., FilesystemDriver]) -> None:
    driver = opened(datadir=f"{base}/images", accept_locations=[f"{base}/gone"])
    with pytest.raises(FileNotFoundError):
        driver.stat(driver.parse(f"file://{base}/gone/image"))


@pytest.mark.parametrize(
    ("number", "kind", "temporary"),
    [
        (errno.ENOENT, NotFound, False),
        (errno.ENOSPC, StoreFull, False),
        (errno.EDQUOT, StoreFull, False),
        (errno.EFBIG, StoreFull, False),
        (errno.EACCES, PermissionDenied, False),
        (errno.EPERM, PermissionDenied, False),
        (errno.EROFS, PermissionDenied, False),
        (errno.EIO, Unavailable, True),
        (errno.ESTALE, Unavailable, True),
        (errno.EMFILE, Unavailable, True),
        (errno.ELOOP, InvalidLocation, False),
        (errno.ENAMETOOLONG, InvalidLocation, False),
        (errno.EBUSY, InUse, False),
        (errno.EINVAL, StoreError, False),
    ],
)
def test_what_native_errors_mean(number: int, kind: type[StoreError], temporary: bool) -> None:
    translated = build(datadir="/a").translate(OSError(number, os.strerror(number)))
    assert type(translated) is kind
    assert translated.temporary is temporary
    assert translated.message == os.strerror(number)


def test_other_errors_mean_nothing_to_it() -> None:
    driver = build(datadir="/a")
    assert driver.translate(ValueError("x")) is None
    assert type(driver.translate(OSError("without a number"))) is StoreError


def test_no_permission_for_another_user(base: Path, tmp_path: Path) -> None:
    """As a user who may read the directory but not write it, and not read an image."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    driver = build(datadir=str(base))
    driver.open()
    add(driver, "image", b"data")
    driver.close()
    os.chmod(base, 0o755)
    parents = [path for path in base.parents if not path.stat().st_mode & 0o001]
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            for path in parents:
                path.chmod(path.stat().st_mode | 0o001)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            other = build(datadir=str(base))
            with pytest.raises(ConfigurationError, match=f"{base}: Permission denied"):
                other.open()
            other._directories[0].fd = os.open(base, os.O_RDONLY)
            for use in (other.stat, other.delete):
                with pytest.raises(PermissionError) as caught:
                    use(other.parse(f"file://{base}/image"))
                assert isinstance(other.translate(caught.value), PermissionDenied)
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for path in parents:
        path.chmod(path.stat().st_mode & ~0o001)
