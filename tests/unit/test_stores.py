from __future__ import annotations

import hashlib
import os
import random

import pytest
from fake import FAST, Backend, FakeDriver, Native, fake_store

from imagestore._models import AbortFailed, Limits, Location, TransferEnded
from imagestore._pool import Engine
from imagestore._store import Store
from imagestore._stores import Stores
from imagestore._transfer import common
from imagestore.driver import Capabilities, Options
from imagestore.drivers.filesystem import FilesystemDriver
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    DigestMismatch,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SourceError,
    Unavailable,
    Unsupported,
)

MIB = 1 << 20
DATA = random.Random(3).randbytes(10_500)
SHA = {"sha256": hashlib.sha256(DATA).hexdigest()}


def make(*names, default=None):
    engine = Engine(Limits())
    return Stores([Store(FakeDriver(), name=name, engine=engine) for name in names], default=default, engine=engine)


def test_by_name_and_in_order():
    with make("b", "a") as stores:
        assert list(stores) == ["b", "a"]
        assert stores["a"].name == "a"
        assert len(stores) == 2
        assert "c" not in stores
        with pytest.raises(InvalidRequest, match="'c' among b, a"):
            stores["c"]


def test_default():
    assert make("a", "b", default="b").default.name == "b"
    assert make("a").default.name == "a"
    with pytest.raises(InvalidRequest, match="a, b"):
        _ = make("a", "b").default
    with pytest.raises(ConfigurationError, match="'c'"):
        make("a", default="c")
    with pytest.raises(ConfigurationError, match="two stores"):
        make("a", "a")


def test_by_location():
    with make("a", "b") as stores:
        assert stores.for_location("fake://host/x").name == "a"
        with pytest.raises(InvalidLocation) as caught:
            stores.for_location("fake://user:secret@other/x")
        assert "a: not our host" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_all_are_closed_also_when_one_fails():
    first, one = fake_store()
    second, two = fake_store()
    second.name = "t"
    first.add("x", b"1")
    second.add("x", b"1")
    one.script = {"close": [Unavailable("down")]}
    with pytest.raises(Unavailable):
        Stores([first, second]).close()
    assert two.count("close") == 1


def test_they_share_one_budget():
    with make("a", "b") as stores:
        assert stores["a"]._engine is stores["b"]._engine


class Named(FakeDriver):
    """Serves locations of a host of its own."""

    def where(self, image_id):
        return Location(uri=f"fake://{self.store}/{image_id}", key=(image_id,), image_id=image_id)

    def parse(self, uri):
        host, _, image_id = uri.removeprefix("fake://").partition("/")
        if host != self.store:
            raise InvalidLocation(f"not our host: {host}")
        return self.where(image_id)


def named(*names, caps=None, weights=(), **kwargs):
    engine = Engine(Limits())
    backends = {name: Backend() for name in names}
    stores = [
        Store(
            Named(backend=backends[name], caps=(caps or {}).get(name), store=name),
            engine=engine,
            retry=FAST,
            weight=dict(zip(names, weights, strict=False)).get(name, 0),
            _block_size=1000,
            **kwargs,
        )
        for name in names
    ]
    return Stores(stores, default=names[0], engine=engine), backends


def test_by_weight():
    stores, _ = named("a", "b", "c", weights=(1, 5, 1))
    places = ["fake://c/x", "fake://a/x", "fake://nobody/x", "fake://b/x"]
    assert [place.uri for place in stores.by_weight(places)] == ["fake://b/x", "fake://c/x", "fake://a/x"]


def test_add_to_many_reads_the_source_once():
    stores, backends = named("a", "b", "c")
    reads = []

    def source():
        for at in range(0, len(DATA), 700):
            reads.append(at)
            yield DATA[at : at + 700]

    events = []
    with stores:
        outcome = stores.add("x", source(), to=["b", "c"], expected=SHA, observer=events.append)
        assert set(outcome.results) == {"b", "c"}
        assert not outcome.errors
        assert outcome.results["b"].digests == SHA
        assert reads == list(range(0, len(DATA), 700))
        assert backends["b"].images["x"][1] == backends["c"].images["x"][1] == DATA
        assert not backends["a"].images
        assert backends["b"].images["x"][0] != backends["c"].images["x"][0], "a token each"
    ended = [event for event in events if isinstance(event, TransferEnded)]
    assert {event.store for event in ended} == {"b", "c"}
    assert stores._engine.budget.used == 0


@pytest.mark.parametrize("operation", ["open", "locate", "create", "write", "commit"])
def test_a_store_that_fails_does_not_stop_the_others(operation):
    stores, backends = named("a", "b")
    backends["a"].script = {operation: [PermissionDenied("no")]}
    with stores:
        outcome = stores.add("x", iter([DATA]), to=["a", "b"])
        assert set(outcome.results) == {"b"}
        assert isinstance(outcome.errors["a"], PermissionDenied)
        assert outcome.errors["a"].store == "a"
        assert operation == "open" or outcome.errors["a"].image_id == "x"
        assert backends["b"].images["x"][1] == DATA
        assert not backends["a"].images
        assert not backends["a"].pending
        stores["b"].close()
        backends["a"].script = {operation: [PermissionDenied("no")]}
        backends["b"].script = {operation: [Unavailable("down")] * 100}
        with pytest.raises(PermissionDenied) as caught:
            stores.add("y", iter([DATA]), to=["a", "b"])
        assert caught.value.store == "a"
        assert set(backends["b"].images) == {"x"}
        assert not backends["b"].pending


def test_what_all_have_in_common_stops_all():
    stores, backends = named("a", "b")

    def source():
        yield DATA
        raise Native("cable")

    with stores:
        for call in (
            lambda: stores.add("x", source(), to=["a", "b"]),
            lambda: stores.add("x", DATA, to=["a", "b"], expected={"sha256": "0" * 64}),
        ):
            with pytest.raises((SourceError, DigestMismatch)):
                call()
            for backend in backends.values():
                assert not backend.images
                assert not backend.pending
        for to in ([], ["a", "a"], ["nobody"]):
            with pytest.raises(InvalidRequest):
                stores.add("x", DATA, to=to)


def test_a_taken_id_in_one_of_them():
    stores, backends = named("a", "b")
    with stores:
        stores["a"].add("x", b"first")
        outcome = stores.add("x", DATA, to=["a", "b"])
        assert isinstance(outcome.errors["a"], AlreadyExists)
        assert backends["a"].images["x"][1] == b"first"
        assert backends["b"].images["x"][1] == DATA


def test_backends_of_different_blocks_at_once():
    caps = {
        "parts": Capabilities(block_min=3000, block_max=100_000, blocks_max=100, commit_proof=True, parallel_writes=3),
        "objects": Capabilities(block_min=500, block_max=500, sparse_unit=500, commit_proof=True, parallel_writes=2),
        "plain": Capabilities(commit_proof=True),
    }
    stores, backends = named(*caps, caps=caps)
    data = DATA * 3 + bytes(200_000) + DATA
    with stores:
        for source in (data, iter([data])):
            outcome = stores.add(f"x{type(source).__name__}", source, to=list(caps))
            assert not outcome.errors
        for backend in backends.values():
            assert {image for _, image in backend.images.values()} == {data}
        assert outcome.results["objects"].stored < len(data) / 2


def test_common_limits_fit_everybody():
    s3 = Capabilities(block_min=5 * MIB, block_max=5000 * MIB, blocks_max=10_000)
    sheepdog = Capabilities(block_min=4 * MIB, block_max=4 * MIB, sparse_unit=4 * MIB)
    both = common([s3, sheepdog, Capabilities(sparse_unit=4096)])
    assert both.block_min == 5 * MIB
    assert both.blocks_max == 10_000
    assert both.block_max == 5000 * MIB
    assert both.sparse_unit == 4 * MIB


def stored(*names, image=DATA):
    stores, backends = named(*names)
    for name in names:
        stores[name].add("x", image)
    return stores, backends, [f"fake://{name}/x" for name in names]


def test_failover_before_the_first_byte():
    stores, backends, places = stored("a", "b", "c")
    with stores:
        stores["a"].delete(places[0])
        backends["b"].script = {"read": [PermissionDenied("no")]}
        with stores.get(["fake://nobody/x", *places]) as reader:
            assert reader.read() == DATA
        backends["b"].script = {"chunk": [PermissionDenied("no")]}
        assert stores.get(places, start=10, stop=2000).read() == DATA[10:2000]
        stores["b"].delete(places[1])
        stores["c"].delete(places[2])
        with pytest.raises(NotFound) as caught:
            stores.get(places)
        assert caught.value.store == "a"
        for wrong in ([], "fake://a/x"):
            with pytest.raises(InvalidRequest):
                stores.get(wrong)


def test_a_copy_of_another_size_does_not_take_over():
    stores, backends, places = stored("a", "b")
    with stores:
        backends["b"].images["x"] = ("t", DATA + b"longer")
        backends["a"].script = {"chunk": [PermissionDenied("gone")]}
        with pytest.raises(PermissionDenied):
            stores.get(places).read()


def test_failover_in_mid_stream_only_with_a_digest():
    stores, backends, places = stored("a", "b")
    with stores:
        backends["a"].script = {"chunk": [None, None, PermissionDenied("gone")]}
        with pytest.raises(PermissionDenied):
            stores.get(places).read()
        backends["a"].script = {"chunk": [None, None, PermissionDenied("gone")]}
        assert stores.get(places, expected=SHA).read() == DATA
        backends["a"].script = {"chunk": [None, None, Changed("replaced")]}
        assert stores.get(places, expected=SHA).read() == DATA


def test_the_wrong_second_copy_is_refused():
    stores, backends, places = stored("a", "b")
    with stores:
        token, _ = backends["b"].images["x"]
        backends["b"].images["x"] = (token, DATA[:5000] + b"!" + DATA[5001:])
        backends["a"].script = {"chunk": [None, None, PermissionDenied("gone")]}
        with pytest.raises(DigestMismatch):
            stores.get(places, expected=SHA).read()
        backends["b"].images["x"] = (token, DATA + b"longer")
        backends["a"].script = {"chunk": [None, None, PermissionDenied("gone")]}
        with pytest.raises(PermissionDenied):
            stores.get(places, expected=SHA).read()


def test_failover_closes_what_it_opened():
    stores, backends, places = stored("a", "b")
    with stores:
        backends["a"].script = {"chunk": [None, PermissionDenied("gone")]}
        with stores.get(places, expected=SHA) as reader:
            reader.read(4000)
        for backend in backends.values():
            assert backend.count("closed") == backend.count("read")


def test_copy():
    stores, backends, places = stored("a", "b")
    with stores:
        result = stores.copy(places[0], "b", image_id="y", expected=SHA)
        assert result.digests == SHA
        assert backends["b"].images["y"][1] == DATA
        with pytest.raises(AlreadyExists):
            stores.copy(places[0], "b")
        with pytest.raises(DigestMismatch):
            stores.copy(places[0], "b", image_id="z", expected={"sha256": "0" * 64})
        with pytest.raises(NotFound):
            stores.copy("fake://a/absent", "b")
        backends["a"].script = {"chunk": [None, Unavailable("cut")], "read": [None] + [Unavailable("down")] * 9}
        with pytest.raises(Unavailable) as caught:
            stores.copy(places[0], "b", image_id="z")
        assert caught.value.store == "a", "the source's error, not that of the add"
        assert caught.value.temporary
        assert set(backends["b"].images) == {"x", "y"}
        assert not backends["b"].pending


class Copying(Named):
    """A backend that copies by itself, also from its neighbour."""

    neighbour = None

    def parse(self, uri):
        if self.neighbour is not None and uri.startswith("fake://a/"):
            return Location(uri=uri, key=("a", uri[9:]), image_id=uri[9:])
        return super().parse(uri)

    def stat(self, location):
        if location.key[0] == "a" and len(location.key) == 2:
            return self.neighbour.stat(self.neighbour.parse(location.uri))
        return super().stat(location)

    def copy(self, location, image_id, hints):
        self.backend.happens("copy")
        if image_id in self.backend.images:
            raise AlreadyExists("taken")
        self.backend.images[image_id] = (hints.token, self.neighbour.backend.images[location.key[1]][1])
        self.backend.happens("copied")
        return self.where(image_id)


def test_copy_inside_the_backend():
    engine = Engine(Limits())
    first = Store(Named(store="a"), engine=engine, retry=FAST)
    second = Store(Copying(store="b"), engine=engine, retry=FAST)
    with Stores([first, second], engine=engine) as stores:
        place = first.add("x", DATA).location
        second._template.neighbour = first._template
        backend = first._template.backend
        reads = backend.count("read")
        result = stores.copy(place, "b", image_id="y", source="a")
        assert backend.count("read") == reads
        assert result.size == len(DATA)
        assert result.digests == {}
        with pytest.raises(AlreadyExists):
            stores.copy(place, "b", image_id="y", source="a")
        assert stores.copy(place, "b", image_id="z", source="a", expected=SHA).digests == SHA
        assert backend.count("read") > reads, "digests need the bytes"
        for number, refusal in enumerate((InvalidLocation("that is another cluster"), Unsupported("not of that kind"))):
            second._template.backend.script = {"copy": [refusal]}
            assert stores.copy(place, "b", image_id=f"w{number}", source="a").digests == SHA


def test_a_copy_whose_answer_is_lost_is_looked_into():
    engine = Engine(Limits())
    first, second = (
        Store(kind(store=name), engine=engine, retry=FAST) for kind, name in ((Named, "a"), (Copying, "b"))
    )
    with Stores([first, second], engine=engine) as stores:
        place = first.add("x", DATA).location
        second._template.neighbour = first._template
        backend = second._template.backend
        backend.script = {"copy": [Unavailable("try again")]}
        assert stores.copy(place, "b", image_id="again", source="a").size == len(DATA)
        backend.script = {"copied": [Unavailable("the answer is lost")]}
        result = stores.copy(place, "b", image_id="lost", source="a")
        assert (result.size, backend.images["lost"][1]) == (len(DATA), DATA)

        def rival():
            backend.images["rival"] = ("another", DATA)
            return Unavailable("too late")

        backend.script = {"copy": [rival]}
        with pytest.raises(AlreadyExists):
            stores.copy(place, "b", image_id="rival", source="a")
        backend.script = {"copy": [Unavailable("never")] * 50}
        with pytest.raises(Unavailable):
            stores.copy(place, "b", image_id="never", source="a")
        assert "never" not in backend.images


def files(tmp_path, *names):
    engine = Engine(Limits())
    defaults = {option.dest: option.default for option in FilesystemDriver.options}
    return Stores(
        [
            Store(FilesystemDriver(Options(defaults | {"datadir": str(tmp_path / name)}), store=name), engine=engine)
            for name in names
        ],
        engine=engine,
    )


def test_copy_keeps_holes(tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(20 * MIB)
        file.write(DATA)
    with files(tmp_path, "a", "b") as stores:
        place = stores["a"].add("x", image).location
        result = stores.copy(place, "b")
        assert result.size == 64 * MIB
        assert os.stat(tmp_path / "b" / "x").st_blocks * 512 < MIB
        assert (tmp_path / "b" / "x").read_bytes() == image.read_bytes()


def test_nothing_of_a_failed_add_to_many_is_said_to_be_left():
    stores, backends = named("a", "b")
    events = []
    backends["a"].script = {"write": [PermissionDenied("no")]}
    with stores:
        stores.add("x", DATA, to=["a", "b"], observer=events.append)
    assert not [event for event in events if isinstance(event, AbortFailed)]
    assert {event.store: event.error is None for event in events if isinstance(event, TransferEnded)} == {
        "a": False,
        "b": True,
    }
