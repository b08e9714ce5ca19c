from __future__ import annotations

import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore import errors
from imagestore.errors import NotFound, RateLimited, StoreError, Unavailable, redact


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    depth_of = {}
    for line in (errors.__doc__ or "").splitlines():
        text = line.lstrip(" │├└─")
        name = text.split(" ")[0]
        if name in errors.__all__:
            depth_of[name] = (len(line) - len(text) - 4) // 3
    assert set(depth_of) == set(errors.__all__) - {"redact"}
    for name, depth in depth_of.items():
        cls = getattr(errors, name)
        assert len([c for c in cls.__mro__ if issubclass(c, StoreError)]) - 1 == depth, name


def test_every_error_has_a_docstring_and_is_exported():
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, StoreError):
            assert cls.__doc__
            assert name in errors.__all__


def test_text_says_where():
    error = NotFound("no such image", store="fast", operation="get", location="s3://key:secret@h/b/k")
    assert str(error) == "no such image (store fast, operation get, location s3://***@h/b/k)"
    assert "secret" not in repr(error)


def test_temporary_is_by_class_unless_told():
    assert Unavailable().temporary
    assert RateLimited().temporary
    assert not NotFound().temporary
    assert StoreError(temporary=True).temporary
    assert not Unavailable(temporary=False).temporary


def test_errors_survive_pickling():
    error = RateLimited("slow down", store="a", retry_after=3.0, attempts=2)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RateLimited
    assert str(again) == str(error)
    assert again.retry_after == 3.0
    assert again.temporary


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://AK:se/cr@et@host/b/k", "s3://***@host/b/k"),
        ("see swift+http://t%3Au:pw@h/v1/c/o now", "see swift+http://***@h/v1/c/o now"),
        ("https://h/p?X-Amz-Signature=abc&x=1", "https://h/p?***"),
        ("see https://u:p@h/p?x=1&code=abc now", "see https://***@h/p?*** now"),
        ("swift+https://h/c/o?x=1&temp_url_sig=abc", "swift+https://h/c/o?***"),
        ("vsphere://h/folder/x?dsName=a&token=abc", "vsphere://h/folder/x?dsName=a&token=***"),
        ("file:///a/b", "file:///a/b"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_redact(text, clean):
    assert redact(text) == clean


@given(
    st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="/@:+%="), min_size=1),
    st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="/.:"), min_size=1),
)
def test_no_credentials_come_through(secret, rest):
    marker = "S3CR3T"
    assert marker not in redact(f"failed: 's3://{marker}{secret}{marker}@{rest}' (x)").replace(rest, "")
