"""VMware datastores when things go wrong on the server's side, and what other clients make of the same files."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imagestore import Retry, Store
from imagestore.driver import Block, Hints, Timeouts, Upload
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    NotFound,
    PermissionDenied,
    SizeMismatch,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from vmware_testing import Datastores, script

pytest.importorskip("pyVmomi", reason="the VMware driver needs pyVmomi")
pytestmark = pytest.mark.filterwarnings("error")

QUICK = Retry(attempts=4, first=0.01, longest=0.05)
DATA = os.urandom(300_000)
TOKEN = "0123456789abcdef" * 2
SEVERAL = ("DC0:LocalDS_0", "DC0:LocalDS_1:10", "DC1:LocalDS_0:10")

Opener = Callable[..., Store]


@pytest.fixture
def place() -> Iterator[Datastores]:
    made = Datastores("strict")
    yield made
    made.remove()


@pytest.fixture
def several() -> Iterator[Datastores]:
    made = Datastores("strict", SEVERAL)
    yield made
    made.remove()


@pytest.fixture
def opened() -> Iterator[Opener]:
    with contextlib.ExitStack() as exits:

        def open_it(place: Datastores, *, retry: Retry = QUICK, **changes: Any) -> Store:
            return exits.enter_context(Store(place.driver(**changes), retry=retry, _block_size=65536))

        yield open_it


def read(store: Store, location: Any, **options: Any) -> bytes:
    with store.get(location, **options) as reader:
        return reader.read()


def pieces(at: int = -1, what: Callable[[], object] = lambda: None) -> Iterator[bytes]:
    """The data; before the piece of that number something happens."""
    for number, start in enumerate(range(0, len(DATA), 50_000)):
        if number == at:
            what()
        yield DATA[start : start + 50_000]


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


STEPS = (
    "HEAD", "GET", "PUT", "SOAP:CurrentTime", "SOAP:RefreshDatastore", "SOAP:RetrieveProperties", "SOAP:MakeDirectory",
    "SOAP:MoveDatastoreFile_Task", "SOAP:DeleteDatastoreFile_Task", "SOAP:SearchDatastore_Task",
)  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_session_that_ends_is_begun_again(place: Datastores, opened: Opener, step: str) -> None:
    store = opened(place, retry=Retry(attempts=1))
    store.exists("x")
    place.control("reset")
    with place.trouble(method=step, action="logout"):
        location = store.add("image", DATA).location
        assert read(store, location) == DATA
        assert [image.image_id for image in store.list()] == ["image"]
        assert not list(store.uploads())
        store.delete(location)
        asked = [entry["method"] for entry in place.log()]
        assert asked.count("SOAP:Login") == 1
        # The names that a server has for its datastores hold for one session: see the server that comes back.
        assert "SOAP:FindByInventoryPath" in asked[asked.index("SOAP:Login") :]
    assert not place.files()


def test_a_session_that_ends_just_before_the_image_is_sent(place: Datastores, opened: Opener) -> None:
    store = opened(place)
    with place.trouble(method="PUT", path=".part", action="logout"), pytest.raises(Unavailable) as caught:
        store.add("image", DATA)
    assert caught.value.temporary
    assert not place.files()
    store.add("image", DATA)


def test_threads_log_in_once(place: Datastores, opened: Opener) -> None:
    store = opened(place)
    location = store.add("image", DATA).location
    place.control("logout")
    before = len(place.log())
    with ThreadPoolExecutor(8) as pool:
        assert all(data == DATA for data in pool.map(lambda _: read(store, location), range(16)))
    assert len([entry for entry in place.log()[before:] if entry["method"] == "SOAP:Login"]) == 1


def test_closing_logs_out(place: Datastores) -> None:
    before = int(place.control("sessions"))
    store = Store(place.driver())
    store.exists("x")
    assert int(place.control("sessions")) == before + 1
    store.close()
    assert int(place.control("sessions")) == before


@pytest.mark.parametrize("after", [0, 1, 70_000])
@pytest.mark.parametrize("size", [None, len(DATA)])
def test_a_connection_that_breaks_in_a_put(place: Datastores, opened: Opener, after: int, size: int | None) -> None:
    store = opened(place)
    with place.trouble(method="PUT", path=".part", action="drop", after=after), pytest.raises(Unavailable) as caught:
        store.add("image", pieces(), size=size)
    assert caught.value.temporary
    assert not place.files()
    assert store.add("image", pieces(), size=size).size == len(DATA)


def test_a_server_that_stops_reading(place: Datastores, opened: Opener) -> None:
    store = opened(place, timeouts=Timeouts(connect=10, stall=0.5))
    stalls = place.trouble(method="PUT", path=".part", action="stall", after=70_000, millis=2000)
    with stalls, pytest.raises(StoreTimeout):
        store.add("image", DATA)
    assert not place.files()


@pytest.mark.parametrize("action", ["drop", "stall"])
@pytest.mark.parametrize("start", [0, 1000])
def test_a_read_that_breaks_is_resumed(place: Datastores, opened: Opener, action: str, start: int) -> None:
    store = opened(place, timeouts=Timeouts(connect=10, stall=0.5))
    location = store.add("image", DATA).location
    with place.trouble(method="GET", action=action, after=270_000, millis=1500):
        assert read(store, location, start=start) == DATA[start:]
        assert [entry["status"] for entry in place.log() if entry["method"] == "GET"][-1] == 206


@pytest.mark.parametrize("kept", [0, 1000, len(DATA) - 1])
def test_a_server_that_lies_about_what_it_kept(place: Datastores, opened: Opener, kept: int) -> None:
    store = opened(place)
    with place.trouble(method="PUT", path=".part", action="lie", after=kept), pytest.raises(SizeMismatch):
        store.add("image", DATA)
    assert not place.files()


def test_a_refusal_is_heard_although_nobody_reads_what_is_sent(place: Datastores, opened: Opener) -> None:
    store = opened(place)
    with place.trouble(method="PUT", path=".part", action="status", status=403), pytest.raises(PermissionDenied):
        store.add("image", os.urandom(20_000_000))
    assert not place.files()


def test_a_full_datastore(place: Datastores, opened: Opener) -> None:
    store = opened(place)
    try:
        place.leave_room("DC0:LocalDS_0", 200_000)
        source = iter([DATA])
        with pytest.raises(StoreFull):
            store.add("image", source, size=len(DATA))
        assert next(source) == DATA, "it was read although there is no room"
        with pytest.raises(StoreFull):
            store.add("image", pieces())
        assert not place.files()
        store.add("small", DATA[:1000])
    finally:
        place.control("reset")


@pytest.mark.parametrize("step", ["MoveDatastoreFile_Task", "DeleteDatastoreFile_Task", "RetrieveProperties"])
def test_an_answer_that_is_lost(place: Datastores, opened: Opener, step: str) -> None:
    store = opened(place)
    store.exists("x")
    with place.trouble(method=f"SOAP:{step}", action="lose"):
        location = store.add("image", DATA).location
    assert read(store, location) == DATA
    with place.trouble(method=f"SOAP:{step}", action="lose"):
        store.delete(location)
    assert not place.files()


@contextlib.contextmanager
def almost_committed(place: Datastores, action: str) -> Iterator[Upload]:
    """An upload whose move got no answer: it happened (lose) or did not (drop)."""
    driver = place.driver()
    driver.open()
    try:
        upload = driver.create("image", Hints(token=TOKEN, size=len(DATA)))
        upload.write(Block(index=0, offset=0, data=DATA, last=True))
        with place.trouble(method="SOAP:MoveDatastoreFile_Task", action=action), pytest.raises(ConnectionError):
            upload.commit(len(DATA))
        yield upload
        upload.abort()
    finally:
        driver.close()


def test_a_rivals_image_is_not_taken_for_ours(place: Datastores, opened: Opener) -> None:
    store = opened(place)
    with almost_committed(place, "drop") as upload:
        theirs = store.add("image", DATA[::-1]).location
        with pytest.raises(AlreadyExists):
            upload.commit(len(DATA))
    assert read(store, theirs) == DATA[::-1]
    assert place.files() == {"image"}


@pytest.mark.parametrize("action", ["drop", "lose"])
def test_a_commit_in_doubt_that_is_discarded(place: Datastores, opened: Opener, action: str) -> None:
    """The image is there if and only if the move happened; the repeated commit can't know, and says that it failed."""
    store = opened(place)
    with almost_committed(place, action) as upload:
        assert [item.token for item in store.collect(older_than=0)] == [TOKEN]
        with pytest.raises(NotFound):
            upload.commit(len(DATA))
    assert place.files() == ({"image"} if action == "lose" else set())


def test_the_answers_to_mark_and_image_are_lost(place: Datastores, opened: Opener) -> None:
    store = opened(place)
    with place.trouble(method="PUT", path=".mark", action="lose"):
        store.add("one", DATA)
    with place.trouble(method="PUT", path=".part", action="lose"), pytest.raises(Unavailable):
        store.add("two", DATA)
    assert place.files() == {"one"}


@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT"])
def test_no_redirect_is_followed(place: Datastores, opened: Opener, method: str) -> None:
    store = opened(place)
    location = store.add("image", DATA).location
    asks: dict[str, Callable[[], object]] = {
        "HEAD": lambda: store.stat(location),
        "GET": lambda: store.get(location),
        "PUT": lambda: store.add("other", DATA),
    }
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.05)
        target = f"https://127.0.0.1:{other.getsockname()[1]}/folder/image"
        with place.trouble(method=method, action="redirect", target=target), pytest.raises(StoreError) as caught:
            asks[method]()
        assert "redirect" in str(caught.value)
        assert not caught.value.temporary
        with pytest.raises(TimeoutError):
            other.accept()


def test_a_server_that_is_killed_and_comes_back(opened: Opener) -> None:
    place = Datastores("strict", mine="killed")
    store, patient = opened(place), opened(place, retry=Retry(attempts=200, first=0.05, longest=0.5))
    kept = store.add("kept", DATA).location

    def killed() -> None:
        # The source is read ahead of the writes: without waiting, the server may be gone before the upload is begun.
        assert eventually(lambda: any(mark.stat().st_size for mark in place.path().glob(".imagestore-*.mark")))
        script(place.env, "kill", "strict")

    with pytest.raises(Unavailable):
        store.add("image", pieces(3, killed))
    script(place.env, "spawn", "strict")
    assert not store.exists("image")
    assert read(store, kept) == DATA
    left = list(store.uploads())
    assert [item.image_id for item in left] == ["image"]
    store.collect(older_than=0)
    assert place.files() == {"kept"}
    store.add("image", DATA)

    with place.trouble(method="GET", action="stall", after=100_000, millis=20_000), patient.get(kept) as reader:
        back = threading.Timer(0.1, lambda: (script(place.env, "kill", "strict"), script(place.env, "spawn", "strict")))
        back.start()
        got = reader.read()
        back.join()
        assert got == DATA


def test_the_mark_of_a_long_upload_is_renewed(
    place: Datastores, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagestore.drivers.vmware._BEAT", 0.0)
    store = opened(place)
    mark = place.path() / "mark"

    def age() -> None:
        nonlocal mark
        (mark,) = place.path().glob(".imagestore-*.mark")
        os.utime(mark, (1_700_000_000, 1_700_000_000))

    def look() -> Iterator[bytes]:
        for number, piece in enumerate(pieces(1, age)):
            yield piece
            if number == 4:
                # The first blocks are being written meanwhile.
                assert eventually(lambda: mark.stat().st_mtime > 1_700_000_000)

    store.add("image", look())
    with pytest.raises(NotFound, match="discarded"):
        store.add("other", pieces(2, lambda: store.collect(older_than=0)))
    assert place.files() == {"image"}


# Several datastores


def test_weight_decides_and_maintenance_rules_out(several: Datastores, opened: Opener) -> None:
    store = opened(several)

    def where(image_id: str) -> str:
        return store.add(image_id, DATA).location.uri.partition("?")[2]

    try:
        several.leave_room("DC1:LocalDS_0", 50_000_000)
        assert where("most-room") == "dsName=LocalDS_1&dcPath=DC0"
        several.control("datastore", key="DC0/LocalDS_1", maintenance="enteringMaintenance")
        assert where("other") == "dsName=LocalDS_0&dcPath=DC1"
        several.leave_room("DC1:LocalDS_0", 50_000)
        assert where("light") == "dsName=LocalDS_0&dcPath=DC0"
        several.control("datastore", key="DC0/LocalDS_0", maintenance="inMaintenance")
        several.control("datastore", key="DC1/LocalDS_0", accessible="false")
        with pytest.raises(Unavailable):
            store.add("nowhere", DATA)
        assert store.exists("most-room")
        with pytest.raises(Unavailable):
            store.exists("nowhere")
    finally:
        several.control("reset")
    with pytest.raises(AlreadyExists):
        store.add("other", DATA)
    assert sorted(image.image_id for image in store.list()) == ["light", "most-room", "other"]


def test_a_claim_that_was_left_holds_the_id_until_it_is_collected(several: Datastores, opened: Opener) -> None:
    store = opened(several)
    store.add("other", DATA)
    claim = several.path() / ".imagestore-image.claim"
    claim.write_text(f"{TOKEN} image\n")
    with pytest.raises(AlreadyExists, match="collect"):
        store.add("image", DATA)
    assert [(item.token, item.image_id) for item in store.uploads()] == [(TOKEN, "image")]
    assert not store.collect()
    assert len(store.collect(older_than=0)) == 1
    store.add("image", DATA)
    assert several.files() == {"image", "other"}


@pytest.mark.parametrize("number", [1, 2])
def test_a_lost_answer_to_the_claim_and_to_the_move(several: Datastores, opened: Opener, number: int) -> None:
    store = opened(several)
    with several.trouble(method="SOAP:MoveDatastoreFile_Task", action="lose", count=number):
        location = store.add("image", DATA).location
    assert read(store, location) == DATA
    assert several.files() == {"image"}


# What is there besides


def test_a_directory_is_no_image(place: Datastores, opened: Opener) -> None:
    for server in ("strict", "plain"):
        with contextlib.closing(Store(Datastores(server).driver(), retry=QUICK)) as store:
            made = store._template
            root = Path(place.env["PLACE"], server, "files", "DC0", "LocalDS_0", made.settings.image_dir)
            (root / "vm").mkdir(parents=True)
            (root / "vm" / "disk").write_bytes(b"precious")
            location = store.parse(store.add("image", DATA).location.uri.replace("/image?", "/vm?"))
            for ask in (store.stat, store.get, store.delete):
                with pytest.raises(NotFound):
                    ask(location)
            with pytest.raises(AlreadyExists):
                store.add("vm", DATA)
            assert (root / "vm" / "disk").read_bytes() == b"precious"
            assert [image.image_id for image in store.list()] == ["image"]
            assert not list(store.uploads())


def test_an_old_image_has_a_version_and_a_young_one_has_none(place: Datastores, opened: Opener) -> None:
    store = opened(place)
    location = store.add("image", DATA).location
    file = place.path() / "image"
    assert store.stat(location).version is None
    os.utime(file, (1_700_000_000, 1_700_000_000))
    assert store.stat(location).version is not None
    with place.trouble(method="GET", action="drop", after=270_000), store.get(location) as reader:
        assert reader.read(10) == DATA[:10]
        file.write_bytes(DATA[::-1])
        os.utime(file, (1_700_000_001, 1_700_000_001))
        with pytest.raises(Changed):
            reader.read()


def test_locations_that_glance_wrote(place: Datastores, opened: Opener) -> None:
    old = place.root() / "old glance" / "dir"
    old.mkdir(parents=True)
    former = "vsphere://10.1.2.3/folder/old glance/dir?dsName=LocalDS_0&dcPath=%2FDC0"
    store = opened(place, accept_locations=[former])
    try:
        image_id = str(uuid.uuid4())
        (old / image_id).write_bytes(DATA)
        uri = f"vsphere://10.1.2.3/folder/old glance/dir/{image_id}?dsName=LocalDS_0&dcPath=%2FDC0"
        assert read(store, uri) == DATA
        assert store.get_size(store.parse(uri).uri) == len(DATA)
        store.delete(uri)
        assert not list(old.iterdir())
    finally:
        old.rmdir()
        old.parent.rmdir()


@pytest.mark.parametrize("server", ["plain", "strict"])
def test_govc_reads_ours_and_we_read_its_files(server: str, opened: Opener, tmp_path: Path) -> None:
    place = Datastores(server)
    store = opened(place)
    location = store.add("image", DATA).location
    environment = {
        **os.environ,
        "GOVC_URL": f"https://{place.address}/sdk",
        "GOVC_USERNAME": place.env["VC_USER"],
        "GOVC_PASSWORD": place.env["VC_PASSWORD"],
        "GOVC_TLS_CA_CERTS": place.env["VC_CACERT"],
        "GOVC_DATACENTER": "DC0",
        "GOVC_DATASTORE": "LocalDS_0",
        "GOVC_PERSIST_SESSION": "false",
    }

    def govc(*words: object) -> str:
        done = subprocess.run(
            [place.env["VC_GOVC"], *map(str, words)], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert govc("datastore.ls", place.directory).split() == ["image"]
    if server == "plain":
        # It fetches with a ticket for one request, which the strict server does not know.
        govc("datastore.download", f"{place.directory}/image", tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == DATA
        govc("datastore.upload", tmp_path / "got", f"{place.directory}/theirs")
        assert read(store, store.locate("theirs")) == DATA
    govc("datastore.rm", f"{place.directory}/image")
    with pytest.raises(NotFound):
        store.stat(location)
    place.remove()


# Logging in


def test_what_is_configured_wrongly_shows_when_the_store_opens(place: Datastores, opened: Opener) -> None:
    with pytest.raises(Unauthenticated) as caught:
        opened(place, password="wrong").exists("x")
    assert not caught.value.temporary
    assert "wrong" not in f"{caught.value!r} {caught.value.__cause__!r}"
    for wrong in ("DC7:LocalDS_0", "DC0:LocalDS_7", "LocalDS_0:LocalDS_0", "DC0/vm:LocalDS_0"):
        with pytest.raises(ConfigurationError, match="datastores"):
            opened(place, datastores=[wrong]).exists("x")


def certificate(path: Path) -> str:
    """One that nobody knows, made out for the same address."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path / "key",
         "-out", path / "other.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return str(path / "other.pem")


def test_only_a_server_with_the_right_certificate_is_talked_to(
    place: Datastores, opened: Opener, tmp_path: Path
) -> None:
    place.control("reset")
    port = place.address.rpartition(":")[2]
    other, ca, own = certificate(tmp_path), place.env["VC_CACERT"], place.env["VC_CERTIFICATE"]
    for trusted in (
        {"cacert": None},
        {"cacert": other},
        {"cacert": ca, "host": f"127.0.0.2:{port}"},
        {"cacert": None, "certificate": other},
        {"cacert": None, "certificate": ca},
    ):
        with pytest.raises(Unavailable) as caught:
            opened(place, **trusted).exists("x")
        assert "host" in trusted or not caught.value.temporary, trusted
    assert not place.log(), "something was asked of a server that is not trusted"
    assert not opened(place, cacert=None, certificate=own).exists("x")
    assert not opened(place, host=f"localhost:{port}").exists("x")
    both = tmp_path / "both.pem"
    both.write_text(Path(own).read_text() + Path(ca).read_text())
    for wrong in (both, tmp_path / "missing.pem"):
        with pytest.raises(ConfigurationError):
            opened(place, cacert=None, certificate=str(wrong)).exists("x")
