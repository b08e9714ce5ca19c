"""The Swift driver without a server: options, locations, logging in, and what answers mean."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from swiftclient.exceptions import ClientException

from imagestore.driver import Options
from imagestore.drivers import _swift_account as account
from imagestore.drivers import _swift_objects as objects
from imagestore.drivers.swift import SwiftDriver
from imagestore.errors import (
    ConfigurationError,
    DigestMismatch,
    InvalidLocation,
    InvalidOption,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

KEYSTONE = {"auth_url": "https://Keystone.example:5000/v3/", "user": "p:u", "key": "k"}
TOKEN = "0123456789abcdef0123456789abcdef"


def driver(**values):
    return SwiftDriver(Options({**{option.dest: option.default for option in SwiftDriver.options}, **values}))


# Options


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({}, "auth_url"),
        ({**KEYSTONE, "auth_url": "ftp://x"}, "auth_url"),
        ({**KEYSTONE, "auth_url": "https://u:p@x/v3"}, "auth_url"),
        ({**KEYSTONE, "auth_url": "https://x/v3?a=b"}, "auth_url"),
        ({**KEYSTONE, "key": None}, "key"),
        ({**KEYSTONE, "user": "u"}, "project_name"),
        ({**KEYSTONE, "container": "a/b"}, "container"),
        ({**KEYSTONE, "container": ".."}, "container"),
        ({**KEYSTONE, "container": "a b"}, "container"),
        ({**KEYSTONE, "container": "c" * 60, "containers_seed": 2}, "container"),
        ({**KEYSTONE, "prefix": "imagestore"}, "prefix"),
        ({**KEYSTONE, "prefix": ".a/b"}, "prefix"),
        ({**KEYSTONE, "prefix": ".."}, "prefix"),
        ({**KEYSTONE, "endpoint": "host/v1?x"}, "endpoint"),
        ({**KEYSTONE, "accounts_file": "/x"}, "accounts_file"),
        ({"accounts_file": "/x", "reference": "a/b"}, "reference"),
        ({"multi_tenant": True, "accounts_file": "/x"}, "multi_tenant"),
        ({"multi_tenant": True, "containers_seed": 1}, "multi_tenant"),
        ({"multi_tenant": True, "accept_locations": ["swift://a/c"]}, "accept_locations"),
        ({**KEYSTONE, "accept_locations": ["/var/images"]}, "accept_locations"),
        ({**KEYSTONE, "accept_locations": ["swift://u:p@host/c"]}, "accept_locations"),
        ({**KEYSTONE, "accept_locations": ["swift://host/*c*"]}, "accept_locations"),
    ],
)
def test_wrong_options(values, option):
    with pytest.raises(InvalidOption, match=option) as caught:
        driver(**values)
    assert "u:p" not in str(caught.value)


def test_enough_to_log_in():
    driver(**KEYSTONE)
    driver(**{**KEYSTONE, "user": "u", "project_id": "x"})
    driver(auth_url="x", application_credential_id="i", application_credential_secret="s")
    driver(auth_url="x", auth_version="1", user="u", key="k")
    driver(multi_tenant=True)
    driver(accounts_file="/x")


# Locations

OWN = "swift+https://keystone.example:5000/v3/glance/image"


@pytest.mark.parametrize(
    "text",
    [
        OWN,
        "swift://keystone.example:5000/v3/glance/image",
        "SWIFT+HTTPS://KEYSTONE.example:5000/v3/glance/image",
    ],
)
def test_one_canonical_text(text):
    location = driver(**KEYSTONE).parse(text)
    assert (location.uri, location.key, location.image_id) == (OWN, ("", "glance", "image"), "image")


@pytest.mark.parametrize(
    "text",
    [
        "swift+http://keystone.example:5000/v3/glance/image",
        "swift+https://keystone.example/v3/glance/image",
        "swift+https://keystone.example:5000/V3/glance/image",
        "swift+https://keystone.example:5000/v3//glance/image",
        "swift+https://keystone.example:5000/v3/glance//image",
        "swift+https://keystone.example:5000/v3/glance/image/",
        "swift+https://keystone.example:5000/v3/glance2/image",
        "swift+https://keystone.example:5000/v3/glance/.imagestore",
        "swift+https://keystone.example:5000/v3/glance/im%61ge",
        "swift+https://keystone.example:5000/v3/glance/../glance/image",
        "swift+https://keystone.example:5000/glance/image",
        "swift+config://ref1/glance/image",
        "swift+https://evil/v3/glance/image?x=https://keystone.example:5000/v3/glance/image",
    ],
)
def test_other_places(text):
    with pytest.raises(InvalidLocation):
        driver(**KEYSTONE).parse(text)


def test_accounts_file_locations():
    made = driver(accounts_file="/x", reference="main", accept_locations=["swift://old.example/v2/glance"])
    assert made.parse("swift+config://main/glance/image").uri == "swift+config://main/glance/image"
    assert made.parse("swift+config://Other/glance/image").key == ("Other", "glance", "image")
    assert made.parse("swift://old.example/v2/glance/image").uri == "swift+config://main/glance/image"
    for text in ("swift+config://main/x/image", "swift+config://a/b/glance/image", "swift+https://x/glance/image"):
        with pytest.raises(InvalidLocation):
            made.parse(text)


def test_accepted_references_and_patterns():
    made = driver(
        accounts_file="/x",
        reference="main",
        accept_locations=["swift+config://old/former", "swift+config://old/many_*"],
    )
    for container in ("former", "many_a", "many_"):
        uri = f"swift+config://old/{container}/image"
        assert made.parse(uri).uri == uri
    for uri in ("swift+config://main/former/image", "swift+config://old/man/image"):
        with pytest.raises(InvalidLocation):
            made.parse(uri)


def test_accepted_references_without_accounts():
    """Of a time when there was a file: the one account that is configured has the images now."""
    made = driver(**KEYSTONE, accept_locations=["swift+config://ref1/glance"])
    assert made.parse("swift+config://ref1/glance/image") == made.parse(OWN)
    for uri in ("swift+config://ref2/glance/image", "swift+config://ref1/other/image"):
        with pytest.raises(InvalidLocation):
            made.parse(uri)


@pytest.mark.parametrize(
    ("seed", "image_id", "container"),
    [
        (1, "ABC", "glance_a"),
        (3, "fdae39a1-bac5-4238-aba4-69bcc726e848", "glance_fda"),
        (10, "fdae39a1-bac5-4238-aba4-69bcc726e848", "glance_fdae39a1-ba"),
        (32, "fdae39a1-bac5-4238-aba4-69bcc726e848", "glance_fdae39a1-bac5-4238-aba4-69bcc726e848"),
        (32, "short", "glance_short"),
    ],
)
def test_containers_by_seed(seed, image_id, container):
    made = driver(**KEYSTONE, containers_seed=seed)
    uri = f"swift+https://keystone.example:5000/v3/{container}/{image_id}"
    assert made.parse(uri).uri == uri
    with pytest.raises(InvalidLocation):
        made.parse(f"swift+https://keystone.example:5000/v3/glance/{image_id}")


# Users of their own accounts

CATALOG_2 = [
    {"type": "image", "endpoints": [{"publicURL": "http://image", "region": "one"}]},
    {
        "type": "object-store",
        "endpoints": [
            {"publicURL": "http://two.example/v1/AUTH_p", "internalURL": "http://in.two/v1/AUTH_p", "region": "two"},
            {"publicURL": "http://one.example/v1/AUTH_p", "internalURL": "http://in.one/v1/AUTH_p", "region": "one"},
        ],
    },
]
CATALOG_3 = [
    {
        "type": "object-store",
        "endpoints": [
            {"interface": "internal", "url": "http://in.one/v1/AUTH_p", "region": "one", "region_id": "one"},
            {"interface": "public", "url": "http://one.example/v1/AUTH_p/", "region": "one", "region_id": "one"},
        ],
    },
]


def user(catalog, token="t"):
    return SimpleNamespace(auth_token=token, user_id="u", project_id="p", service_catalog=catalog)


@pytest.fixture
def bound(monkeypatch):
    made = driver(multi_tenant=True, region="one")
    monkeypatch.setattr(SwiftDriver, "_ask_facts", lambda *_: objects.Facts())
    made.open()
    return made


@pytest.mark.parametrize("catalog", [CATALOG_2, CATALOG_3])
def test_endpoint_of_a_catalog(bound, catalog):
    view = bound.bind(user(catalog))
    uri = "swift+http://one.example/v1/AUTH_p/glance_image/image"
    assert view.parse(uri).key == ("http://one.example/v1/AUTH_p", "glance_image", "image")
    assert view.parse(uri.replace("AUTH_p", "AUTH_other")).key[0] == "http://one.example/v1/AUTH_other"


@pytest.mark.parametrize(
    "text",
    [
        "swift+http://two.example/v1/AUTH_p/glance_image/image",
        "swift+http://evil.example/v1/AUTH_p/glance_image/image",
        "swift+https://one.example/v1/AUTH_p/glance_image/image",
        "swift+http://one.example:81/v1/AUTH_p/glance_image/image",
        "swift+http://one.example/v2/AUTH_p/glance_image/image",
        "swift+http://one.example/v1/AUTH_p/x/glance_image/image",
        "swift+http://one.example/v1/AUTH_p/glance_other/image",
        "swift+http://one.example/v1/AUTH_p/glance/image",
        "swift+config://ref1/glance_image/image",
    ],
)
def test_token_goes_to_no_other_server(bound, text):
    with pytest.raises(InvalidLocation):
        bound.bind(user(CATALOG_2)).parse(text)


def test_location_of_a_stranger_reaches_nothing(bound):
    """Also one that was parsed by a store that is bound to nobody."""
    location = bound.parse("swift+http://evil.example/v1/AUTH_p/glance_image/image")
    with pytest.raises(Unauthenticated):
        bound.stat(location)
    with pytest.raises(InvalidLocation):
        bound.bind(user(CATALOG_2)).stat(location)


def test_auth_that_is_none(bound):
    with pytest.raises(Unauthenticated):
        bound.bind(user(CATALOG_2, token=None))
    with pytest.raises(ConfigurationError, match="region one"):
        bound.bind(user([CATALOG_2[0]]))
    with pytest.raises(Unsupported):
        driver(**KEYSTONE).bind(user(CATALOG_2))


# The accounts file


def accounts(tmp_path, text):
    path = tmp_path / "accounts.conf"
    path.write_text(text)
    return account.read_accounts(str(path))


def test_accounts(tmp_path):
    found = accounts(
        tmp_path,
        "[ref1]\nauth_address = keystone.example:5000/v3/\nuser = 'p:u'\nkey = \"k%(x)s\"\nauth_version = 2\n"
        "[ref2]\nauth_address = http://x/v3\napplication_credential_id = i\napplication_credential_secret = s\n"
        "[ref3]\nauth_address = http://x/auth/v1.0\nauth_version = 1\nuser = a:b\nkey = k\nproject_domain_id = d\n",
    )
    assert found["ref1"].auth_url == "https://keystone.example:5000/v3"
    assert (found["ref1"].user, found["ref1"].key, found["ref1"].auth_version) == ("p:u", "k%(x)s", "3")
    assert found["ref2"].application_credential_id == "i"
    assert (found["ref3"].auth_version, found["ref3"].project_domain_id) == ("1", "d")
    assert "k%" not in repr(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ref1]\nuser = a:b\nkey = secret\n", r"\[ref1\], auth_address: is not set"),
        ("[ref1]\nauth_address = x\nuser = a:b\n", r"\[ref1\], user: neither"),
        ("[ref1]\nauth_address = x\nuser = b\nkey = secret\n", r"\[ref1\], user: has the form"),
        ("key = secret\n", "can't be read: MissingSectionHeaderError"),
    ],
)
def test_wrong_accounts(tmp_path, text, expected):
    with pytest.raises(ConfigurationError, match=expected) as caught:
        accounts(tmp_path, text)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_accounts_file(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        account.read_accounts(str(tmp_path / "none"))


# Tokens


class FakeLogin:
    def __init__(self):
        self.tokens = ["first", "second"]
        self.forgotten = []

    def token(self):
        return "http://swift/v1/AUTH_x", self.tokens[0]

    def forget(self, token):
        self.forgotten.append(token)
        self.tokens = self.tokens[1:] or self.tokens
        return True


class FakeWire:
    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []

    def of(self, url):
        return self

    def send(self, method, path, headers, data, *, stream=False):
        self.seen.append((method, path, headers["X-Auth-Token"], data))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return account.Answer(status=answer, headers={})


def test_token_is_renewed_once():
    wire, login = FakeWire(401, 201), FakeLogin()
    assert account.Client(login, wire)("PUT", "/c/o", {}, b"data").status == 201
    assert wire.seen == [
        ("PUT", "/v1/AUTH_x/c/o", "first", b"data"),
        ("PUT", "/v1/AUTH_x/c/o", "second", b"data"),
    ]


def test_fresh_token_is_refused():
    wire = FakeWire(401, 401)
    with pytest.raises(Unauthenticated) as caught:
        account.Client(FakeLogin(), wire)("GET", "/c/o")
    assert caught.value.temporary
    assert len(wire.seen) == 2


def test_other_failures_are_not_repeated():
    for status in (403, 404, 500, 503):
        wire = FakeWire(status)
        with pytest.raises(ClientException) as caught:
            account.Client(FakeLogin(), wire)("GET", "/c/o")
        assert caught.value.http_status == status


def test_token_is_forgotten_when_a_body_was_broken_off():
    login = FakeLogin()
    with pytest.raises(ConnectionResetError):
        account.Client(login, FakeWire(ConnectionResetError()))("PUT", "/c/o", {}, b"data")
    assert login.forgotten == ["first"]
    with pytest.raises(ConnectionResetError):
        account.Client(login, FakeWire(ConnectionResetError()))("GET", "/c/o")
    assert login.forgotten == ["first"]


def test_bare_token_can_not_be_renewed():
    login = account.BoundLogin(user(CATALOG_3), account.Where(region="one"))
    with pytest.raises(Unauthenticated, match="only its owner"):
        account.Client(login, FakeWire(401))("GET", "/c/o")


def test_body_in_pieces():
    body = account.Body(bytes(600_000))
    assert len(body) == 600_000
    pieces = list(body)
    assert sum(map(len, pieces)) == 600_000
    assert max(map(len, pieces)) == 64 * 1024
    assert list(body) == pieces, "a body must be readable twice"


def test_idle_connections_keep_no_block():
    """Each remembers its last request."""

    class Connection:
        def request(self, method, path, data, headers):
            self.last = data
            assert b"".join(data) == b"block"
            raise ConnectionResetError

        def close(self):
            pass

    connection = Connection()
    wire = account.Wire(lambda: connection, keep=1)
    with pytest.raises(ConnectionResetError):
        wire.send("PUT", "/c/o", {}, b"block")
    assert list(connection.last) == []


def test_login_failures_are_told_apart():
    from keystoneauth1 import exceptions

    for error, kind, temporary in (
        (exceptions.ConnectFailure("x"), Unavailable, True),
        (exceptions.ConnectTimeout("x"), StoreTimeout, True),
        (exceptions.SSLError("x"), ConfigurationError, False),
        (exceptions.Unauthorized("x"), Unauthenticated, False),
        (exceptions.Forbidden("x"), Unauthenticated, False),
        (exceptions.NotFound("x"), ConfigurationError, False),
        (exceptions.ServiceUnavailable("x"), Unavailable, True),
        (exceptions.EmptyCatalog("x"), ConfigurationError, False),
    ):
        ours = account._keystone_failed(error)
        assert type(ours) is kind, error
        assert ours.temporary is temporary


# Answers


def refused(status, body="", **headers):
    error = ClientException("x", http_status=status, http_response_content=body, http_response_headers=headers)
    return driver(**KEYSTONE).translate(error)


@pytest.mark.parametrize(
    ("status", "kind", "temporary"),
    [
        (400, InvalidRequest, False),
        (401, Unauthenticated, False),
        (403, PermissionDenied, False),
        (404, NotFound, False),
        (408, StoreTimeout, True),
        (409, Unavailable, True),
        (413, StoreFull, False),
        (418, StoreError, False),
        (422, DigestMismatch, True),
        (429, RateLimited, True),
        (498, RateLimited, True),
        (499, Unavailable, True),
        (500, Unavailable, True),
        (502, Unavailable, True),
        (504, StoreTimeout, True),
        (507, StoreFull, False),
        (302, ConfigurationError, False),
    ],
)
def test_statuses(status, kind, temporary):
    error = refused(status)
    assert type(error) is kind
    assert error.temporary is temporary


def test_what_an_answer_tells():
    error = refused(503, "<html><h1>Busy</h1>\n<p>Later.</p></html>", **{"Retry-After": "4", "X-Trans-Id": "tx1"})
    assert type(error) is RateLimited
    assert error.retry_after == 4
    assert "Busy Later." in error.message
    assert "tx1" in error.message
    assert refused(429, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}).retry_after == 0
    assert refused(429, **{"Retry-After": "soon"}).retry_after is None


def test_failures_of_connections():
    import requests
    import urllib3

    made = driver(**KEYSTONE)
    for error, kind in (
        (requests.exceptions.ConnectionError("x"), Unavailable),
        (requests.exceptions.ReadTimeout("x"), StoreTimeout),
        (requests.exceptions.ConnectTimeout("x"), StoreTimeout),
        (requests.exceptions.ChunkedEncodingError("x"), Unavailable),
        (requests.exceptions.SSLError("x"), ConfigurationError),
        (urllib3.exceptions.ProtocolError("x"), Unavailable),
        (urllib3.exceptions.ReadTimeoutError(None, "", "x"), StoreTimeout),
        (ConnectionResetError(), Unavailable),
        (TimeoutError(), StoreTimeout),
    ):
        ours = made.translate(error)
        assert type(ours) is kind, error
    assert made.translate(KeyError("x")) is None


def test_deletes_are_judged_by_their_end():
    def told(**values):
        return json.dumps({"Response Status": "200 OK", "Errors": [], **values}).encode()

    objects._judge(told())
    objects._judge(told(**{"Response Status": "400 Bad Request", "Errors": [["/c/o", "404 Not Found"]]}))
    objects._judge(told(**{"Response Status": "400 Bad Request", "Number Not Found": 2}))
    objects._judge(told(**{"Response Status": "404 Not Found", "Number Not Found": 1}))
    objects._judge(b"Number Deleted: 3\nNumber Not Found: 0\nResponse Status: 200 OK\nErrors:\n")
    objects._judge(b"Number Deleted: 0\nNumber Not Found: 1\nResponse Status: 400 Bad Request\n")
    for body, kind in (
        (told(Errors=[["/c/o", "503 Busy"]]), Unavailable),
        (told(Errors=[["/c/o", "403 Forbidden"]]), PermissionDenied),
        (told(**{"Response Status": "502 Bad Gateway"}), Unavailable),
        (told(**{"Response Status": "400 Bad Request", "Response Body": "Not an SLO manifest"}), InvalidRequest),
        (told(**{"Response Status": "401 Unauthorized"}), Unauthenticated),
        (b"Response Status: 500 Internal Error\n", Unavailable),
        (b"Number Deleted: 3\n", Unavailable),
        (b"{}", Unavailable),
        (b"   ", Unavailable),
        (b"", Unavailable),
    ):
        with pytest.raises(kind):
            objects._judge(body)


def test_metadata_survives_headers():
    given = {"name": "näïve – 24.04", "Case": "A", "case": "b", "": " blanks ", "long": "x" * 900, "line": "a\nb"}
    headers = objects.encode_metadata(given)
    assert all(len(value) <= 256 and value.isascii() and value.isprintable() for value in headers.values())
    assert objects._decode_metadata(headers) == given
    assert objects._decode_metadata({}) == {}
    assert objects._decode_metadata({f"{objects.META}Data-0": "|nonsense|"}) == {}
    with pytest.raises(InvalidRequest):
        objects.encode_metadata({"long": "x" * 4000})


def test_token_belongs_to_one_name():
    headers = {f"{objects.META}Token": TOKEN, f"{objects.META}Id": "image"}
    assert objects.token_of(headers, "image") == TOKEN
    assert objects.token_of(headers, "copy") is None
    assert objects.token_of({**headers, f"{objects.META}Token": "x"}, "image") is None


# Deleting what others stored


class FakeClient:
    """An account with some objects in its containers."""

    def __init__(self, **containers):
        self.containers = containers
        self.deleted = []

    def __call__(self, method, path, headers=None, data=None, **_):
        path, _, query = path.partition("?")
        if method == "DELETE":
            self.deleted.append(path)
            return account.Answer(status=204, headers={})
        prefix = query.partition("prefix=")[2].partition("&")[0].replace("%2F", "/")
        names = [name for name in self.containers.get(path[1:], ()) if name.startswith(prefix)]
        return account.Answer(status=200, headers={}, body=json.dumps([{"name": name} for name in names]).encode())


@pytest.mark.parametrize(
    ("target", "deleted"),
    [
        ("glance/image-", ["/glance/image-00001", "/glance/image-00002"]),
        ("glance_segments/image/17/", ["/glance_segments/image/17/0"]),
        ("glance/", []),
        ("glance/im", []),
        ("other/image-", []),
        ("glance/other-", []),
        ("glance_segments/", []),
        ("glance_segments/other/", []),
    ],
)
def test_segments_of_dynamic_objects(target, deleted):
    client = FakeClient(
        glance=["image-00001", "image-00002", "image-two", "image-00001-x", "other-00001"],
        glance_segments=["image/17/0", "other/17/0"],
        other=["image-00001"],
    )
    container = objects.Container(client, objects.Facts(), "glance", ".imagestore", None)
    container.remove_dynamic(target, "image")
    assert client.deleted == deleted


def test_no_dots_in_paths():
    container = objects.Container(FakeClient(), objects.Facts(), "glance", ".imagestore", None)
    for name in ("a/../b", "./a", "..", "a/."):
        with pytest.raises(InvalidLocation):
            container.path(name)
    assert container.path("a..b/.c") == "/glance/a..b/.c"


def test_what_a_server_that_copies_whole_objects_copies():
    """That takes no large object for a segment: its segments are copied, as far as they are known."""
    held = [{"name": "t/00000001", "bytes": 3}, {"name": "t/00000000", "bytes": 8}]
    source = SimpleNamespace(
        facts=SimpleNamespace(conditional=False, object_max=100),
        path=lambda name: f"/c/{name}",
        segments=lambda asked: held if asked == TOKEN else [],
    )

    def parts(headers, size):
        return SwiftDriver._parts(None, source, "image", headers, size)

    large = {"X-Static-Large-Object": "True"}
    ours = {**large, f"{objects.META}Token": TOKEN, f"{objects.META}Id": "image"}
    assert parts({}, 0) == []
    assert parts({}, 100) == [("/c/image", 0, 100, True)]
    assert parts(ours, 11) == [("/c/t/00000000", 0, 8, True), ("/c/t/00000001", 0, 3, True)]
    for headers, size in (({}, 101), (large, 11), (ours, 12), ({"X-Object-Manifest": "c/image-"}, 11)):
        with pytest.raises(Unsupported):
            parts(headers, size)
