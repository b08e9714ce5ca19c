from __future__ import annotations

import gc
import hashlib
import io
import os
import random
import threading
import time

import pytest
from fake import FAST, FakeDriver, Native, fake_store

from imagestore._models import (
    AbortFailed,
    BlockStored,
    CommitStarted,
    Limits,
    Retried,
    Retry,
    TransferEnded,
    TransferStarted,
)
from imagestore._store import Store
from imagestore.driver import Block, Capabilities
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    DigestMismatch,
    InUse,
    InvalidImageId,
    InvalidLocation,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    RateLimited,
    SignatureMismatch,
    SizeMismatch,
    SourceError,
    StoreError,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

DATA = random.Random(7).randbytes(10_500)


@pytest.fixture
def pair():
    store, backend = fake_store()
    with store:
        yield store, backend
    assert store._engine.budget.used == 0


def test_in_and_out(pair):
    store, backend = pair
    result = store.add("image-1", io.BytesIO(DATA), digests=("md5", "sha512"))
    assert result.size == result.stored == len(DATA)
    assert result.digests == {"md5": hashlib.md5(DATA).hexdigest(), "sha512": hashlib.sha512(DATA).hexdigest()}
    assert result.store == "s"
    assert result.location.uri == "fake://host/image-1"
    assert store.get(result.location).read() == DATA
    assert store.get("fake://host/image-1", start=5, stop=2000).read() == DATA[5:2000]
    assert store.get_size(result.location) == len(DATA)
    assert store.locate("image-1") == result.location
    assert store.exists("image-1")
    assert not store.exists("image-2")
    assert [image.image_id for image in store.list()] == ["image-1"]
    assert store.verify(result.location, expected={"md5": result.digests["md5"]}).digests.keys() == {"sha256", "md5"}
    store.delete(result.location)
    assert not store.exists("image-1")
    assert backend.count("open") == 1


def test_no_io_before_the_first_call():
    store, backend = fake_store()
    store.parse("fake://host/x")
    assert store.supports("list")
    assert not store.supports("usage")
    assert backend.calls == []
    before = threading.active_count()
    store.close()
    assert backend.calls == []
    assert threading.active_count() == before


def test_a_closed_store_opens_again_with_a_new_driver(pair):
    store, backend = pair
    store.add("a", b"1")
    driver = store._template
    store.close()
    assert store.get("fake://host/a").read() == b"1"
    assert store._template is not driver
    assert backend.count("open") == 2


@pytest.mark.parametrize("wrong", ["", ".a", "-a", "a/b", "..", "a\n", "ä", "a" * 201, "a b", None, 7, b"a"])
def test_ids_that_are_none(pair, wrong):
    store, backend = pair
    with pytest.raises(InvalidImageId):
        store.add(wrong, b"x")
    with pytest.raises(InvalidImageId):
        store.locate(wrong)
    assert backend.count("locate") == 0


@pytest.mark.parametrize(
    "wrong", ["x", "image-1", "http://host/x", "fake://other/x", "fake://host/\x00", "fake://host/" + "x" * 5000, 7]
)
def test_locations_that_are_none(pair, wrong):
    store, backend = pair
    with pytest.raises(InvalidLocation) as caught:
        store.get(wrong)
    assert caught.value.store == "s"
    assert "read" not in backend.calls


def test_credentials_never_reach_the_driver_or_a_text(pair):
    store, _ = pair
    store.add("x", b"data")
    assert store.get("fake://user:p@ss/w@host/x").read() == b"data"
    with pytest.raises(InvalidLocation) as caught:
        store.get("fake://user:p@ss/w@other/x")
    assert "p@ss" not in repr(caught.value)
    assert "user" not in repr(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -1},
        {"size": 1.5},
        {"size": True},
        {"digests": "sha256"},
        {"digests": ["sha999"]},
        {"digests": ["shake_128"]},
        {"expected": {"sha256": "abc"}},
        {"expected": {"sha999": "00"}},
        {"metadata": {"a": 1}},
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(pair, wrong):
    store, backend = pair
    with pytest.raises(InvalidRequest):
        store.add("x", iter([DATA]), **wrong)
    assert backend.count("create") == 0


def test_taken_id_is_refused_before_a_byte_is_read(pair):
    store, _ = pair
    store.add("x", b"first")

    def source():
        raise AssertionError("it was read")
        yield b""

    with pytest.raises(AlreadyExists) as caught:
        store.add("x", source())
    assert caught.value.image_id == "x"
    assert store.get("fake://host/x").read() == b"first"


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0, 999, 1000])
@pytest.mark.parametrize("kind", ["iterable", "bytes"])
def test_a_wrong_size_is_refused_and_nothing_stays(pair, size, kind):
    store, backend = pair
    with pytest.raises(SizeMismatch):
        store.add("x", iter([DATA]) if kind == "iterable" else DATA, size=size)
    assert not backend.images
    assert not backend.pending


def test_limits(pair):
    store, backend = pair
    with pytest.raises(LimitExceeded):
        store.add("x", DATA, max_size=10_000)
    assert backend.count("create") == 0, "a known size is refused before anything is sent"
    with pytest.raises(LimitExceeded):
        store.add("x", iter([DATA]), max_size=10_000)
    assert not backend.pending
    assert store.add("x", iter([DATA]), max_size=len(DATA)).size == len(DATA)


def test_capacity_of_the_backend():
    store, backend = fake_store(Capabilities(block_min=10, block_max=1000, blocks_max=5, commit_proof=True))
    with store:
        with pytest.raises(LimitExceeded, match="hold 5000"):
            store.add("x", DATA)
        with pytest.raises(LimitExceeded):
            store.add("x", iter([DATA]))
        assert not backend.pending
        assert store.add("x", DATA[:5000]).size == 5000


def test_needs_size():
    store, _ = fake_store(Capabilities(needs_size=True))
    with store:
        with pytest.raises(InvalidRequest, match="size"):
            store.add("x", iter([DATA]))
        assert store.add("x", iter([DATA]), size=len(DATA)).size == len(DATA)


def test_expected_digests(pair):
    store, backend = pair
    good = hashlib.sha1(DATA).hexdigest()
    assert store.add("good", DATA, expected={"sha1": good.upper()}).digests["sha1"] == good
    with pytest.raises(DigestMismatch, match=good):
        store.add("bad", DATA, expected={"sha1": "0" * 40})
    assert set(backend.images) == {"good"}
    assert not backend.pending
    with pytest.raises(DigestMismatch), store.get("fake://host/good", expected={"sha1": "0" * 40}) as reader:
        reader.read()
    with pytest.raises(DigestMismatch):
        store.verify("fake://host/good", expected={"sha1": "0" * 40})


def test_digests_reach_the_driver_before_its_commit(pair):
    store, backend = pair
    result = store.add("some", DATA, digests=("md5", "sha256"), expected={"sha1": hashlib.sha1(DATA).hexdigest()})
    assert backend.digests == dict(result.digests)
    assert set(backend.digests) == {"md5", "sha1", "sha256"}
    store.add("none", DATA, digests=())
    assert backend.digests == {}


class Verifier:
    def __init__(self, *, refuse=False, fail_at=None):
        self.seen = b""
        self.refuse = refuse
        self.fail_at = fail_at

    def update(self, data):
        self.seen += data
        if self.fail_at is not None and len(self.seen) > self.fail_at:
            raise Native("verifier broke")

    def verify(self):
        if self.refuse:
            raise Native("bad signature")


def test_verifier(pair):
    store, backend = pair
    verifier = Verifier()
    store.add("x", iter([DATA]), verifier=verifier)
    assert verifier.seen == DATA
    for bad in (Verifier(refuse=True), Verifier(fail_at=3000)):
        with pytest.raises(SignatureMismatch) as caught:
            store.add("y", iter([DATA]), verifier=bad)
        assert isinstance(caught.value.__cause__, Native)
    assert set(backend.images) == {"x"}
    assert not backend.pending


def test_native_errors_never_leak(pair):
    store, backend = pair
    store.add("x", DATA)
    for operation, call in {
        "locate": lambda: store.add("y", DATA),
        "create": lambda: store.add("y", DATA),
        "write": lambda: store.add("y", DATA),
        "commit": lambda: store.add("y", DATA),
        "stat": lambda: store.stat("fake://host/x"),
        "read": lambda: store.get("fake://host/x"),
        "chunk": lambda: store.get("fake://host/x").read(),
        "delete": lambda: store.delete("fake://host/x"),
    }.items():
        backend.script = {operation: [Native("s3://key:secret@h/x broke")]}
        with pytest.raises(StoreError) as caught:
            call()
        assert isinstance(caught.value.__cause__, Native), operation
        assert "secret" not in str(caught.value)
        assert caught.value.store == "s"
        assert caught.value.driver == "fake"
        assert not caught.value.temporary
        assert not backend.pending
    assert set(backend.images) == {"x"}


@pytest.mark.parametrize("operation", ["open", "locate", "write", "written", "stat", "commit"])
def test_temporary_errors_are_tried_again(pair, operation):
    store, backend = pair
    backend.script = {operation: [Unavailable("for a moment"), RateLimited("slow", retry_after=0.001)]}
    assert store.add("x", iter([DATA])).size == len(DATA)
    assert backend.images["x"][1] == DATA


def test_attempts_end_and_are_counted(pair):
    store, backend = pair
    backend.script = {"write": [Unavailable("down")] * 100}
    with pytest.raises(Unavailable) as caught:
        store.add("x", b"12")
    assert caught.value.attempts == FAST.attempts
    assert backend.count("write") == FAST.attempts
    assert caught.value.temporary
    assert not backend.pending


def test_a_write_that_can_not_be_repeated_is_not():
    store, backend = fake_store(Capabilities(repeatable_writes=False))
    with store:
        backend.script = {"write": [Unavailable("down")]}
        with pytest.raises(Unavailable) as caught:
            store.add("x", b"12")
        assert caught.value.temporary
        assert backend.count("write") == 1


@pytest.mark.parametrize("repeatable", [True, False])
def test_create_is_repeated_only_where_the_driver_says_so(repeatable):
    store, backend = fake_store(Capabilities(repeatable_create=repeatable))
    with store:
        backend.script = {"create": [Unavailable("down")]}
        if repeatable:
            store.add("x", b"12")
        else:
            with pytest.raises(Unavailable):
                store.add("x", b"12")
        assert backend.count("create") == 1 + repeatable


def test_commit_in_doubt_that_took_effect_is_success(pair):
    store, backend = pair
    backend.script = {"committed": [StoreTimeout("no answer")]}
    assert store.add("x", DATA).size == len(DATA)
    assert backend.count("commit") == 1
    assert backend.images["x"][1] == DATA


def test_commit_in_doubt_that_did_not_is_repeated(pair):
    store, backend = pair
    backend.script = {"commit": [StoreTimeout("no answer")] * 2}
    assert store.add("x", DATA).size == len(DATA)
    assert backend.count("commit") == 3


def rival(backend, error):
    def act():
        backend.images["x"] = ("f" * 32, b"rival")
        return error

    return act


def test_commit_in_doubt_while_a_rival_won(pair):
    store, backend = pair
    backend.script = {"commit": [rival(backend, StoreTimeout("no answer"))]}
    with pytest.raises(AlreadyExists) as caught:
        store.add("x", DATA)
    assert isinstance(caught.value.__cause__, StoreTimeout)
    assert backend.images["x"][1] == b"rival"
    assert not backend.pending


def test_taken_at_commit_without_doubt(pair):
    store, backend = pair
    backend.script = {"commit": [rival(backend, None)]}
    with pytest.raises(AlreadyExists):
        store.add("x", DATA)
    assert backend.images["x"][1] == b"rival"
    assert not backend.pending


def test_commit_that_nobody_can_decide_is_not_aborted(pair):
    store, backend = pair
    events = []
    backend.script = {"committed": [StoreTimeout("no answer")], "stat": [Unavailable("down")] * 100}
    with pytest.raises(StoreTimeout, match="in doubt") as caught:
        store.add("x", DATA, observer=events.append)
    assert caught.value.temporary
    assert backend.count("abort") == 0
    store.close()
    assert any(isinstance(event, AbortFailed) for event in events)


def test_commit_in_doubt_without_proof_is_said():
    store, backend = fake_store(Capabilities(commit_proof=False))
    with store:
        backend.script = {"committed": [StoreTimeout("no answer")]}
        with pytest.raises(NotFound, match="in doubt"):
            store.add("x", DATA)
        assert backend.count("abort") == 0
        assert backend.images["x"][1] == DATA


def test_a_collected_upload_can_not_commit(pair):
    store, backend = pair

    def collect():
        assert len(store.collect(older_than=0)) == 1

    backend.script = {"commit": [collect]}
    with pytest.raises(NotFound):
        store.add("x", DATA)
    assert not backend.images


def test_abort_is_tried_again_and_its_failure_is_an_event(pair):
    store, backend = pair
    events = []
    backend.script = {"write": [PermissionDenied("no")], "abort": [Unavailable("down")]}
    with pytest.raises(PermissionDenied):
        store.add("x", b"1")
    assert not backend.pending
    backend.script = {"write": [PermissionDenied("no")], "abort": [Unavailable("down")] * 100}
    with pytest.raises(PermissionDenied):
        store.add("x", b"1", observer=events.append)
    left = list(store.uploads())
    assert len(left) == 1
    store.close()
    assert [e.token for e in events if isinstance(e, AbortFailed)] == [left[0].token]
    assert store.collect() == [], "its age is not known"
    with pytest.raises(InvalidRequest):
        store.collect(older_than=-1)
    assert store.collect(older_than=1e300) == []
    assert store.collect(older_than=0, dry_run=True) == left
    assert store.collect(older_than=0) == left
    assert not backend.pending


def test_what_can_not_be_collected_does_not_keep_the_rest(pair):
    store, backend = pair
    backend.pending.update({f"{n:032x}": {} for n in range(3)})
    backend.script = {"discard": [InUse("a snapshot of it")]}
    with pytest.raises(InUse, match="a snapshot of it"):
        store.collect(older_than=0)
    assert len(backend.pending) == 1
    backend.script = {"discard": [Unavailable("down")] * 100}
    with pytest.raises(Unavailable):
        store.collect(older_than=0)


class Signing(FakeDriver):
    def sign(self, location, seconds):
        self.backend.happens("sign")
        return f"https://host/{location.key[0]}?seconds={seconds}"

    def set_acls(self, location, *, public, read, write):
        self.backend.happens("set_acls")
        self.backend.acls = (self._get(location), public, read, write)


def test_sign_and_set_acls(pair):
    signing = Signing()
    backend = signing.backend
    with Store(signing, retry=FAST) as store:
        place = store.add("x", DATA).location
        backend.script = {"sign": [Unavailable("later")], "set_acls": [Unavailable("later")]}
        assert store.sign(place, seconds=60) == "https://host/x?seconds=60"
        store.set_acls(place.uri, public=True, read=["p1"], write=["p2"])
        assert backend.acls[1:] == (True, ("p1",), ("p2",))
        for wrong in (0, -1, 1.5, "60"):
            with pytest.raises(InvalidRequest, match="seconds"):
                store.sign(place, seconds=wrong)
        with pytest.raises(InvalidRequest, match="sequences"):
            store.set_acls(place, read="p1")
        with pytest.raises(NotFound):
            store.sign("fake://host/absent")
        with pytest.raises(NotFound):
            store.set_acls("fake://host/absent")
    store, _ = pair
    for ask in (store.sign, store.set_acls):
        with pytest.raises(Unsupported):
            ask("fake://host/x")


def test_a_stored_image_stays_stored_when_the_look_at_it_fails(pair):
    store, backend = pair
    backend.script = {"stat": [Unavailable("down")] * 100}
    result = store.add("x", DATA)
    assert result.stat.size == len(DATA)
    assert backend.images["x"][1] == DATA


def test_a_backend_that_lost_bytes_is_found_out(pair):
    store, backend = pair

    def lose():
        token, data = backend.images["x"]
        backend.images["x"] = (token, data[:-1])

    backend.script = {"committed": [lose]}
    with pytest.raises(SizeMismatch):
        store.add("x", DATA)
    assert not backend.images


def test_delete_in_doubt(pair):
    store, backend = pair
    store.add("x", b"1")
    backend.script = {"deleted": [Unavailable("no answer")]}
    store.delete("fake://host/x")
    with pytest.raises(NotFound):
        store.delete("fake://host/x")


@pytest.mark.parametrize("ranged", [True, False])
def test_a_broken_read_goes_on_where_it_stopped(ranged):
    store, backend = fake_store(Capabilities(ranged_reads=ranged, commit_proof=True))
    with store:
        store.add("x", DATA)
        backend.script = {"chunk": [None, None, Unavailable("cut"), None, Native("cut"), None]}
        with pytest.raises(StoreError, match="cut"):
            store.get("fake://host/x").read()
        backend.script = {"chunk": [None, None, Unavailable("cut"), *[None] * 4, Unavailable("cut")]}
        assert store.get("fake://host/x").read() == DATA
        assert store.get("fake://host/x", start=1500, stop=7001).read() == DATA[1500:7001]
        assert store.get("fake://host/x", start=1500).read() == DATA[1500:]


def test_progress_renews_the_attempts(pair):
    store, backend = pair
    store.add("x", DATA)
    backend.script = {"chunk": [Unavailable("cut"), None] * 50}
    assert store.get("fake://host/x").read() == DATA
    backend.script = {"chunk": [None] + [Unavailable("cut")] * 50}
    with pytest.raises(Unavailable) as caught:
        store.get("fake://host/x").read()
    assert caught.value.attempts == FAST.attempts


def test_a_replaced_image_is_not_read_on(pair):
    store, backend = pair
    store.add("x", DATA)

    def replace():
        backend.images["x"] = (None, DATA + b"longer")
        return Unavailable("cut")

    backend.script = {"chunk": [None, replace]}
    with pytest.raises(Changed):
        store.get("fake://host/x").read()


def test_reader_is_a_file(pair, tmp_path):
    store, _ = pair
    store.add("x", DATA)
    place = store.locate("x")
    with store.get(place) as reader:
        assert reader.readable()
        assert not reader.seekable()
        assert not reader.writable()
        assert reader.size == len(DATA)
        assert reader.read(0) == b""
        assert reader.read(3) == DATA[:3]
        assert reader.read1(5) == DATA[3:8]
        buffer = bytearray(2000)
        assert reader.readinto(buffer) == 2000
        assert buffer == DATA[8:2008]
        assert reader.tell() == 2008
        assert b"".join(reader) == DATA[2008:]
        assert reader.read() == reader.read(5) == b""
    with pytest.raises(ValueError, match="closed"):
        reader.read()
    with store.get(place) as reader, open(tmp_path / "out", "wb") as out:
        import shutil

        shutil.copyfileobj(reader, out, 777)
    assert (tmp_path / "out").read_bytes() == DATA


def test_ranges(pair):
    store, _ = pair
    store.add("x", DATA)
    place = store.locate("x")
    size = len(DATA)
    for start, stop in [(0, 0), (0, 1), (size - 1, size), (size, size), (5, 5), (10, size + 100), (size, None)]:
        with store.get(place, start=start, stop=stop) as reader:
            assert reader.size == len(DATA[start:stop])
            assert reader.read() == DATA[start:stop]
    for start, stop in [(-1, 5), (5, 4), (size + 1, None)]:
        with pytest.raises(InvalidRequest):
            store.get(place, start=start, stop=stop)
    with pytest.raises(InvalidRequest):
        store.get(place, stop=5, expected={"md5": "0" * 32})


def test_readers_are_closed_wherever_they_end(pair):
    store, backend = pair
    store.add("x", DATA)
    for use in (lambda r: r.read(), lambda r: r.read(10), lambda r: None, lambda r: next(r)):
        with store.get("fake://host/x") as reader:
            use(reader)
    del reader
    dropped = store.get("fake://host/x")
    dropped.read(10)
    del dropped
    assert backend.count("closed") == backend.count("read")


def test_download(pair, tmp_path):
    store, backend = pair
    store.add("x", DATA)
    path = tmp_path / "out"
    result = store.download("fake://host/x", path, expected={"md5": hashlib.md5(DATA).hexdigest()})
    assert path.read_bytes() == DATA
    assert result.size == len(DATA)
    with pytest.raises(AlreadyExists):
        store.download("fake://host/x", path)
    with pytest.raises(DigestMismatch):
        store.download("fake://host/x", path, expected={"md5": "0" * 32}, overwrite=True)
    assert path.read_bytes() == DATA
    backend.script = {"chunk": [None, PermissionDenied("no")]}
    with pytest.raises(PermissionDenied):
        store.download("fake://host/x", tmp_path / "other")
    with pytest.raises(InvalidRequest):
        store.download("fake://host/x", tmp_path / "absent" / "out")
    with pytest.raises(NotFound):
        store.download("fake://host/absent", tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    store.add("y", b"other")
    store.download("fake://host/y", path, overwrite=True)
    assert path.read_bytes() == b"other"


def test_source_errors_clean_up(pair):
    store, backend = pair
    for good in (0, 1, 999, 1000, 1001, 5000):

        def source(good=good):
            yield DATA[:good]
            raise Native("cable")

        with pytest.raises(SourceError, match="cable"):
            store.add("x", source())
    assert not backend.pending
    assert not backend.images


def blocks():
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, Block)]


def test_an_error_that_is_kept_keeps_no_image_data(pair):
    store, backend = pair
    others = blocks()  # of other tests
    kept = []
    for script in ({"write": [PermissionDenied("no")]}, {"write": [Native("broke")]}, {}):
        backend.script = script

        def source(script=script):
            yield DATA * 100
            if not script:
                raise Native("cable")

        with pytest.raises(StoreError) as caught:
            store.add("x", source())
        kept.append(caught.value)
    assert len(blocks()) == len(others)


def test_cancel_while_the_backend_is_down(pair):
    store, backend = pair
    store._retry = Retry(attempts=100, first=30.0)
    store.close()
    backend.script = {"locate": [Unavailable("down")] * 100}
    cancel = threading.Event()
    threading.Timer(0.2, cancel.set).start()
    began = time.monotonic()
    with pytest.raises(Unavailable):
        store.add("x", DATA, cancel=cancel)
    assert time.monotonic() - began < 10


def test_ctrl_c_cleans_up(pair):
    store, backend = pair

    def source():
        yield DATA
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add("x", source())
    assert not backend.pending
    assert not backend.images


def test_cancel(pair):
    store, backend = pair
    cancel = threading.Event()

    def source():
        for at in range(0, len(DATA), 1000):
            yield DATA[at : at + 1000]
            if at == 5000:
                cancel.set()

    with pytest.raises(Cancelled):
        store.add("x", source(), cancel=cancel)
    assert not backend.pending
    assert not backend.images
    store.add("x", DATA)
    with pytest.raises(Cancelled):
        store.get("fake://host/x", cancel=cancel).read()


def test_progress_and_a_broken_one(pair):
    store, _ = pair
    seen = []
    store.add("x", iter([DATA]), size=len(DATA), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(DATA), len(DATA))
    assert seen == sorted(seen)

    def broken(done, total):
        raise Native("progress broke")

    store.add("y", DATA, progress=broken)
    assert store.get("fake://host/y", progress=broken).read() == DATA


def test_events(pair):
    store, backend = pair
    events = []
    backend.script = {"write": [Unavailable("for a moment")]}
    store.add("x", DATA, observer=events.append)
    store.close()
    kinds = [type(event) for event in events]
    assert kinds[0] is TransferStarted
    assert kinds[-2:] == [CommitStarted, TransferEnded]
    assert kinds.count(BlockStored) == 11
    assert kinds.count(Retried) == 1
    assert sum(event.bytes for event in events if isinstance(event, BlockStored)) == len(DATA)
    assert events[-1].error is None
    assert events[-1].digests
    assert len({event.transfer for event in events}) == 1
    failed = []
    with pytest.raises(DigestMismatch):
        store.add("y", DATA, expected={"md5": "0" * 32}, observer=failed.append)
    store.close()
    assert "digest" in failed[-1].error


def test_zero_runs_are_not_sent():
    caps = Capabilities(sparse_unit=1000, commit_proof=True, parallel_writes=3)
    store, backend = fake_store(caps, _block_size=200_000)
    with store:
        data = bytes(500_000) + DATA + bytes(300_000) + b"end"
        result = store.add("x", iter([data]))
        assert result.size == len(data)
        assert result.stored < 14_000
        assert store.get(result.location).read() == data
        assert store.add("zero", bytes(700_000)).stored == 0
        assert backend.images["zero"][1] == bytes(700_000)


def test_auth_is_asked_for():
    store, backend = fake_store(Capabilities(needs_auth=True))
    with store:
        for call in (lambda: store.add("x", b""), lambda: store.get("fake://host/x"), lambda: list(store.list())):
            with pytest.raises(Unauthenticated):
                call()
        with pytest.raises(Unsupported):
            store.bind(object())
        assert backend.count("create") == 0


def test_max_transfers():
    store, backend = fake_store(limits=Limits(max_transfers=2))
    running = peak = 0
    lock = threading.Lock()

    def source():
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.01)
        yield b"x"
        with lock:
            running -= 1

    with store:
        threads = [threading.Thread(target=store.add, args=(f"i{n}", source())) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert peak == 2
        assert len(backend.images) == 8


def test_after_a_fork_the_child_has_a_driver_of_its_own():
    store, backend = fake_store()
    with store:
        store.add("x", DATA)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                ok = store.get("fake://host/x").read() == DATA and backend.count("open") == 2
                store.add("y", iter([DATA] * 3), digests=("md5", "sha256"))
                os.write(write_end, b"good" if ok else b"bad")
            finally:
                os._exit(0)
        os.close(write_end)
        assert os.read(read_end, 10) == b"good"
        os.close(read_end)
        os.waitpid(child, 0)
        assert store.get("fake://host/x").read() == DATA


def test_many_at_once_stay_within_budget_and_threads():
    limits = Limits(memory=4_000, memory_total=16_000, workers=4)
    store, backend = fake_store(limits=limits)
    before = threading.active_count()
    peak = 0

    def add(number):
        nonlocal peak
        store.add(f"i{number}", iter([DATA] * 3), digests=("md5", "sha1"))
        peak = max(peak, threading.active_count())

    with store:
        threads = [threading.Thread(target=add, args=(n,)) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(backend.images) == 40
        assert store._engine.budget.peak <= 16_000
        assert store._engine.budget.used == 0
        assert peak <= before + 40 + 2 * limits.workers
    assert threading.active_count() == before


def test_mixed_operations_with_aborts_lose_nothing_and_leave_nothing():
    store, backend = fake_store(limits=Limits(memory=8_000, memory_total=50_000, workers=4), retry=Retry(first=0.001))
    before = threading.active_count()
    problems = []

    def work(seed):
        rng = random.Random(seed)
        mine = {}
        try:
            for number in range(50):
                image_id = f"i{seed}-{number}"
                data = rng.randbytes(rng.choice([0, 1, 999, 1000, 5000, 20_000]))
                kind = rng.random()
                if kind < 0.5:
                    store.add(image_id, iter([data]))
                    mine[image_id] = data
                elif kind < 0.7:

                    def source(data=data):
                        yield data
                        raise Native("cable")

                    with pytest.raises(SourceError):
                        store.add(image_id, source())
                elif mine:
                    image_id = rng.choice(sorted(mine))
                    if kind < 0.85:
                        assert store.get(store.locate(image_id)).read() == mine[image_id]
                    else:
                        store.delete(store.locate(image_id))
                        del mine[image_id]
            for image_id, data in mine.items():
                assert backend.images[image_id][1] == data
        except BaseException as error:  # noqa: BLE001 - carried to the main thread
            problems.append(error)

    with store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        assert not backend.pending
        assert store._engine.budget.used == 0
    assert threading.active_count() == before
