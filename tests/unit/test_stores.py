from __future__ import annotations

import pytest
from fake import FakeDriver, fake_store

from imagestore._models import Limits
from imagestore._pool import Engine
from imagestore._store import Store
from imagestore._stores import Stores
from imagestore.errors import ConfigurationError, InvalidLocation, InvalidRequest, Unavailable


def make(*names, default=None):
    engine = Engine(Limits())
    return Stores([Store(FakeDriver(), name=name, engine=engine) for name in names], default=default, engine=engine)


def test_by_name_and_in_order():
    with make("b", "a") as stores:
        assert list(stores) == ["b", "a"]
        assert stores["a"].name == "a"
        assert len(stores) == 2
        assert "c" not in stores
        with pytest.raises(KeyError):
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
