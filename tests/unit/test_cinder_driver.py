"""The Cinder driver without a Cinder: locations, options, errors, and states that a real one can't be made to show."""

from __future__ import annotations

import ast
import copy
import gc
import importlib
import os
import threading
import uuid
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oslo_config import cfg

from imagestore.config import OLD_OPTIONS
from imagestore.driver import Block, Hints, Options, Timeouts
from imagestore.drivers import _cinder_attach, _cinder_client, cinder
from imagestore.drivers._cinder_attach import Brick, FileDevice, HandleDevice
from imagestore.drivers._cinder_client import Endpoint, Login, Web, meaning, text_of
from imagestore.drivers.cinder import CinderDriver, _decode, _encode
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    ConfigurationError,
    InUse,
    InvalidLocation,
    InvalidOption,
    LimitExceeded,
    MissingDependency,
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

GIB = 1 << 30
TOKEN = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2
VOLUME = "5b0f7d3c-0000-4000-8000-000000000001"
LOGIN = {"auth_url": "https://keystone:5000/v3", "user": "u", "password": "secret", "project_name": "p"}


def make(store: str = "fast", **values: Any) -> CinderDriver:
    defaults = {option.dest: option.default for option in CinderDriver.options}
    return CinderDriver(Options({**defaults, **values}), store=store)


# Locations


@given(st.uuids())
def test_both_forms_are_one_location(volume: uuid.UUID) -> None:
    driver = make()
    found = driver.parse(f"cinder://{volume}")
    assert found.uri == f"cinder://fast/{volume}"
    assert found == driver.parse(found.uri) == driver.parse(f"CINDER://fast/{volume}")
    assert found.key == (str(volume),)
    assert make("").parse(f"cinder://{volume}").uri == f"cinder://{volume}"


@given(st.text(max_size=80))
def test_other_text_is_no_location(text: str) -> None:
    driver = make()
    for uri in (text, f"cinder://{text}", f"cinder://fast/{text}", f"cinder://{text}/{VOLUME}"):
        try:
            found = driver.parse(uri)
        except InvalidLocation:
            continue
        assert found == driver.parse(f"cinder://fast/{found.key[0]}")
        assert str(uuid.UUID(found.key[0])) == found.key[0]


@pytest.mark.parametrize(
    "uri",
    [
        f"cinder://other/{VOLUME}",
        f"cinder:///{VOLUME}",
        f"cinder://fast//{VOLUME}",
        f"cinder://fast/x/{VOLUME}",
        f"cinder://fast/{VOLUME}/",
        f"cinder://fast/{VOLUME.upper()}",
        f"cinder://{VOLUME}\n",
        f"cinder://fast/{VOLUME}?x",
        "cinder://fast/../volumes",
        f"rbd://fast/{VOLUME}",
    ],
)
def test_not_ours(uri: str) -> None:
    with pytest.raises(InvalidLocation):
        make().parse(uri)


def test_former_names_of_a_store() -> None:
    assert make(accept_locations=["old"]).parse(f"cinder://old/{VOLUME}").uri == f"cinder://fast/{VOLUME}"


# Options


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"catalog_info": "volumev3"}, "catalog_info"),
        ({"catalog_info": "::publicURL"}, "catalog_info"),
        ({"endpoint_template": "ftp://cinder"}, "endpoint_template"),
        ({"endpoint_template": "http://user:secret@cinder/v3"}, "endpoint_template"),
        ({**LOGIN, "auth_url": None}, "auth_url"),
        ({**LOGIN, "password": None}, "user"),
        ({**LOGIN, "project_name": None}, "user"),
        ({"password": "secret"}, "user"),
        ({"auth_url": "https://k", "application_credential_id": "c"}, "application_credential_secret"),
        ({"noauth_project": "abc"}, "noauth_project"),
        ({**LOGIN, "noauth_project": "abc", "endpoint_template": "http://c/v3"}, "noauth_project"),
        ({"noauth_project": "admin", "endpoint_template": "http://c/v3"}, "noauth_project"),
    ],
)
def test_wrong_options(values: dict[str, Any], option: str) -> None:
    with pytest.raises(InvalidOption, match=f"option {option}:") as caught:
        make(**values)
    assert "secret" not in str(caught.value).replace("application_credential_secret", "").replace("or a secret", "")


def test_credentials() -> None:
    assert make()._login is None
    assert make(**LOGIN)._login is not None
    assert "secret" not in repr(make(**LOGIN)._login)
    both = make(**LOGIN, application_credential_id="c", application_credential_secret="s")._login
    assert both is not None
    assert both.credential_id == "c"
    assert repr(Login(noauth_project="abc")) == "Login(abc)"


def test_every_old_option_has_its_new_one() -> None:
    new = {option.dest for option in CinderDriver.options}
    assert {old.to for old in OLD_OPTIONS["cinder"] if old.fate == "kept"} <= new


def test_secrets_are_marked() -> None:
    secret = {option.dest for option in CinderDriver.options if option.secret}
    assert secret == {"password", "application_credential_secret"}


def test_template() -> None:
    assert Endpoint().of("p") is None
    assert Endpoint(template="http://c/v3/%(tenant)s").of("p") == "http://c/v3/p"
    assert Endpoint(template="http://c/v3/%(project_id)s").of("p") == "http://c/v3/p"
    assert Endpoint(template="http://c/v3").of(None) == "http://c/v3"
    with pytest.raises(Unauthenticated):
        Endpoint(template="http://c/v3/%(tenant)s").of(None)


def test_unbound_store_has_no_volumes() -> None:
    driver = make()
    driver._known = None
    with pytest.raises(Unauthenticated):
        driver.stat(driver.parse(f"cinder://{VOLUME}"))


# Who acts


class Libraries:
    """What `require` gives: keystoneauth as it is, and in place of the others what notes how it is called."""

    def __init__(self) -> None:
        self.clients: list[dict[str, Any]] = []
        self.factories: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, module: str, **_: Any) -> Any:
        if module == "cinderclient.client":
            return SimpleNamespace(Client=self.client)
        if module == "os_brick.initiator.connector":
            return SimpleNamespace(
                InitiatorConnector=SimpleNamespace(factory=self.factory), get_connector_properties=self.properties
            )
        if module == "oslo_privsep.priv_context":
            return SimpleNamespace(init=lambda root_helper: self.asked.append(tuple(root_helper)))
        if module == "os_brick.privileged":
            return SimpleNamespace(default=SimpleNamespace(set_client_mode=lambda mode: self.asked.append((mode,))))
        return importlib.import_module(module)

    def client(self, version: str, **values: Any) -> Any:
        self.clients.append({"version": version, **values})
        return SimpleNamespace()

    def factory(self, protocol: str, root_helper: str, **values: Any) -> Any:
        self.factories.append((protocol, values))
        return SimpleNamespace()

    def properties(self, *arguments: Any) -> dict[str, Any]:
        self.asked.append(arguments)
        return {"initiator": "iqn"}


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Libraries:
    made = Libraries()
    monkeypatch.setattr(_cinder_client, "require", made)
    monkeypatch.setattr(_cinder_attach, "require", made)
    return made


def web(**values: Any) -> Web:
    return Web(Endpoint(**values), None, Timeouts(connect=3, stall=7))


CATALOG = [
    {
        "type": "volumev3",
        "name": "cinderv3",
        "endpoints": [
            {"interface": "public", "region": "one", "region_id": "one", "url": "http://public/v3/p"},
            {"interface": "internal", "region": "two", "region_id": "two", "url": "http://internal/v3/p"},
        ],
    }
]
CATALOG_OF_SERVICES = [
    {
        "type": "volumev3",
        "name": "cinderv3",
        "endpoints": [{"region": "one", "publicURL": "http://public/v3/p", "internalURL": "http://internal/v3/p"}],
    }
]


def context(**values: Any) -> Any:
    return SimpleNamespace(
        **{"auth_token": "t", "project_id": "p", "user_id": "u", "service_catalog": CATALOG, **values}
    )


def url_and_token(client: dict[str, Any]) -> tuple[str, str]:
    session = client["session"]
    assert client["endpoint_override"] == session.get_endpoint()
    return session.get_endpoint(), session.get_token()


@pytest.mark.parametrize("catalog", [CATALOG, CATALOG_OF_SERVICES])
def test_token_goes_to_the_endpoint_of_its_catalog(libraries: Libraries, catalog: list[Any]) -> None:
    web().bound(context(service_catalog=catalog))
    web(interface="internalURL").bound(context(service_catalog=catalog))
    found = [url_and_token(client) for client in libraries.clients]
    assert found == [("http://public/v3/p", "t"), ("http://internal/v3/p", "t")]


@pytest.mark.parametrize("values", [{"region": "three"}, {"service_type": "volume"}, {"service_name": "other"}])
def test_catalog_without_it(libraries: Libraries, values: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        web(**values).bound(context())


def test_endpoint_template_takes_the_place_of_the_catalog(libraries: Libraries) -> None:
    web(template="http://here/v3/%(project_id)s").bound(context(service_catalog=None))
    assert url_and_token(libraries.clients[0]) == ("http://here/v3/p", "t")


@pytest.mark.parametrize("auth", [SimpleNamespace(), context(auth_token=None), SimpleNamespace(get_token=lambda: "")])
def test_auth_that_is_none(libraries: Libraries, auth: Any) -> None:
    with pytest.raises(Unauthenticated):
        web().bound(auth)


def test_without_keystone(libraries: Libraries) -> None:
    web(template="http://here/v3/%(tenant)s").own(Login(noauth_project="abc"))
    url, token = url_and_token(libraries.clients[0])
    assert url == "http://here/v3/abc"
    assert token.endswith(":abc")


def test_sessions_are_apart_and_bounded(libraries: Libraries) -> None:
    """One host's connections for all, but no cookie, no redirect and no wait without an end."""
    shared = web()
    shared.own(Login(auth_url="http://keystone/v3", user="u", password="secret", project_name="p"))
    shared.own(Login(auth_url="http://keystone/v3", credential_id="c", credential_secret="secret"))
    shared.bound(SimpleNamespace(get_token=lambda: "t", auth=object()))
    sessions = [client["session"] for client in libraries.clients]
    assert len({id(session.session) for session in sessions}) == 1
    assert len({id(session.auth) for session in sessions}) == 3
    for client in libraries.clients:
        session = client["session"]
        assert (session.timeout, session.redirect, session.verify) == (7.0, False, True)
        assert (client["retries"], client["endpoint_override"]) == (0, None)
        assert session.session.cookies.get_policy().allowed_domains() == ()


def brick(**values: Any) -> Brick:
    told = {
        "minimal": True,
        "root_helper": "sudo helper",
        "lock_path": None,
        "my_ip": "192.0.2.1",
        "multipath": True,
        "enforce_multipath": False,
        "mount_base": "/mnt",
        "encrypted": False,
    }
    return Brick(**{**told, **values})


def test_minimal_host_needs_no_privilege(libraries: Libraries) -> None:
    found = brick().host()
    assert (found["ip"], found["multipath"], found["do_local_attach"]) == ("192.0.2.1", False, False)
    assert not libraries.asked


def test_lock_files_of_os_brick(libraries: Libraries) -> None:
    registered = cfg.ConfigOpts()
    registered.register_opts([cfg.StrOpt("lock_path")], group="os_brick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cinder_attach.cfg, "CONF", registered)
        brick()
        assert registered.os_brick.lock_path is None
        brick(lock_path="/run/locks")
        assert registered.os_brick.lock_path == "/run/locks"
        registered.set_override("lock_path", "/of/the/program", "os_brick")
        brick(lock_path="/run/locks")
        assert registered.os_brick.lock_path == "/of/the/program"


def test_whole_host_is_asked_for_once(libraries: Libraries) -> None:
    made = brick(minimal=False)
    assert made.host() == made.host() == {"initiator": "iqn"}
    assert libraries.asked == [("sudo", "helper"), ("sudo helper", "192.0.2.1", True, False)]


def test_process_that_is_root_needs_no_helper(libraries: Libraries) -> None:
    brick(root_helper="").connector({"driver_volume_type": "nfs"})
    assert libraries.asked == [(False,)]


def test_shares_are_mounted_below_the_base(libraries: Libraries) -> None:
    made = brick()
    made.connector({"driver_volume_type": "nfs", "options": "-o vers=4"})
    made.connector({"driver_volume_type": "iscsi"})
    (nfs, told), (iscsi, others) = libraries.factories
    assert (nfs, iscsi) == ("NFS", "ISCSI")
    assert told["nfs_mount_point_base"] == "/mnt/nfs"
    assert told["nfs_mount_options"] == "-o vers=4"
    assert not [key for key in others if "mount" in key]


# Errors


def foreign(name: str, module: str, *bases: type[Exception], **values: Any) -> type[Exception]:
    return type(name, bases or (Exception,), {"__module__": module, **values})


CINDER, KEYSTONE, BRICK = "cinderclient.exceptions", "keystoneauth1.exceptions.connection", "os_brick.exception"
CONNECTION = foreign("ConnectionError", KEYSTONE)
BADREQUEST = foreign("BadRequest", CINDER, code=400)
MISSING = foreign("NotFound", CINDER, code=404)
LIMIT = "Requested volume size 9G is larger than maximum allowed limit 5G."


@pytest.mark.parametrize(
    ("error", "kind", "temporary"),
    [
        (BADREQUEST("invalid"), StoreError, False),
        (foreign("Unauthorized", CINDER, code=401)(), Unauthenticated, False),
        (foreign("Forbidden", CINDER, code=403)(), PermissionDenied, False),
        (MISSING(), NotFound, False),
        (foreign("NotAcceptable", CINDER, code=406)(), ConfigurationError, False),
        (foreign("VersionNotFoundForAPIMethod", CINDER)(), ConfigurationError, False),
        (foreign("OverLimit", CINDER, code=413)("VolumeLimitExceeded"), StoreFull, False),
        (foreign("OverLimit", CINDER, code=413)(LIMIT), LimitExceeded, False),
        (foreign("OverLimit", CINDER, code=413, retry_after=3)(), RateLimited, True),
        (foreign("ClientException", CINDER, code=503)(), Unavailable, True),
        (foreign("ConnectFailure", KEYSTONE, CONNECTION)(), Unavailable, True),
        (foreign("ConnectTimeout", KEYSTONE, CONNECTION)(), StoreTimeout, True),
        (foreign("SSLFailure", KEYSTONE, CONNECTION)(), ConfigurationError, False),
        (foreign("Unauthorized", "keystoneauth1.exceptions.http", http_status=401)(), Unauthenticated, False),
        (foreign("BadGateway", "keystoneauth1.exceptions.http", http_status=502)(), Unavailable, True),
        (foreign("EmptyCatalog", "keystoneauth1.exceptions.catalog")(), ConfigurationError, False),
        (foreign("BrickException", BRICK, kwargs={"msg": "no keyring"})("unknown"), Unavailable, True),
        (
            foreign("InvalidParameterValue", BRICK, message="%(err)s", kwargs={"err": "x"})("rados module required"),
            MissingDependency,
            False,
        ),
        (foreign("FailedToDropPrivileges", "oslo_privsep.daemon")(), PermissionDenied, False),
        (cfg.RequiredOptError("lock_path"), ConfigurationError, False),
        (foreign("ImageNotFound", "rbd", errno=2)("gone"), Unavailable, True),
        (foreign("OSError", "rbd", errno=-28)("full"), StoreFull, False),
        (OSError(28, "full"), StoreFull, False),
        (PermissionError(13, "no"), PermissionDenied, False),
        (OSError(5, "broken"), Unavailable, True),
        (ValueError("Programming error choosing an endpoint."), ConfigurationError, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_meaning(error: Exception, kind: type[StoreError], temporary: bool) -> None:
    found = make().translate(error)
    assert type(found) is kind
    assert found.temporary is temporary


def test_what_means_nothing() -> None:
    assert meaning(KeyError("x")) is None
    assert meaning(ValueError("x")) is None


def test_true_text_of_os_brick() -> None:
    error = foreign("BrickException", BRICK, message="unknown", kwargs={"msg": "no\n keyring"})
    assert text_of(error("unknown")) == "no keyring"
    assert text_of(foreign("BrickException", BRICK, message="%(x)s", kwargs={})("filled in")) == "filled in"
    assert text_of(foreign("BadRequest", CINDER, message="said")("said (HTTP 400)")) == "said"


# Metadata


@given(st.dictionaries(st.text(max_size=300), st.text(max_size=300), max_size=8))
def test_metadata_comes_back_whole(metadata: dict[str, str]) -> None:
    told = _encode(metadata)
    assert all(len(key) <= 255 and 0 < len(value) <= 255 and value.isascii() for key, value in told.items())
    assert len(told) <= 64
    assert _decode(told) == (metadata if told else {})


def test_metadata_of_others_are_not_ours() -> None:
    assert _encode({}) == {}
    assert _encode({"a": "x" * 20_000}) == {}
    for text in ("", "[1]", "{", "7"):
        assert _decode({"imagestore_metadata_0": text}) == {}


# Devices


def test_file_is_never_truncated(tmp_path: Any) -> None:
    path = tmp_path / "volume"
    path.write_bytes(b"0123456789")
    device = FileDevice(str(path), writable=True)
    device.write(4, b"xy")
    device.flush()
    assert device.ask(3, 4).result() == b"3xy6"
    assert device.ask(10, 4).result() == b""
    device.close()
    assert path.read_bytes() == b"0123xy6789"


def test_holes_of_a_file(tmp_path: Any) -> None:
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(8 << 20)
        file.seek(2 << 20)
        file.write(b"x" * (1 << 20))
    device = FileDevice(str(path), writable=False)
    assert list(device.areas(0, 8 << 20)) == [(2 << 20, 3 << 20)]
    assert list(device.areas((2 << 20) + 5, (2 << 20) + 9)) == [((2 << 20) + 5, (2 << 20) + 9)]
    device.close()


class Handle:
    """As os-brick's object over librbd: one position, nothing returned by seek and write."""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.position = 0
        self.flushed = False

    def seek(self, offset: int, whence: int = 0) -> None:
        self.position = offset + (len(self.data) if whence == 2 else 0)

    def read(self, length: int) -> bytes:
        data = bytes(self.data[self.position : self.position + length])
        self.position += len(data)
        return data

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        assert self.position + len(data) <= len(self.data), "past the end of the volume"
        self.data[self.position : self.position + len(data)] = data

    def flush(self) -> None:
        self.flushed = True

    def tell(self) -> int:
        return self.position


def test_handle() -> None:
    handle = Handle(bytearray(b"0123456789"))
    device = HandleDevice(handle)
    device.write(4, b"xy")
    assert device.ask(3, 4).result() == b"3xy6"
    device.flush()
    assert handle.flushed
    assert device.size() == 10
    assert list(device.areas(2, 5)) == [(2, 5)]
    asked: list[tuple[int, int]] = []

    def diff(offset: int, length: int, snapshot: None, note: Any, include_parent: bool, whole_object: bool) -> None:
        assert include_parent
        asked.append((offset, length))
        # Objects are larger than what was asked for.
        note(3, 4, True)
        note(0, 3, False)

    handle.rbd_image = SimpleNamespace(diff_iterate=diff)  # type: ignore[attr-defined]
    assert list(device.areas(2, 5)) == [(3, 5)]
    assert asked == [(2, 3)]


# A scripted Cinder


class Cinder:
    """The connection of a cinderclient, to volumes in memory. Small: sizes in it are of a few bytes.

    ``log`` has every request. ``script`` is called before each with its name and may change anything, or raise.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.bytes: dict[str, bytearray] = {}
        self.attached: dict[str, str] = {}
        self.log: list[str] = []
        self.script: Any = lambda name: None
        self.after_delete = "gone"
        self.encrypted = False
        self.multiattach = False
        self.information: dict[str, Any] = {}
        self.page = 1000
        self.quota = -1
        self.client = self

    # Requests

    def get(self, path: str) -> Any:
        url = urlsplit(path)
        asked = dict(parse_qsl(url.query))
        match url.path.split("/")[1:]:
            case ["volumes", "detail"]:
                return None, self.list(ast.literal_eval(asked.get("metadata", "{}")), asked.get("marker"))
            case ["volumes", volume_id]:
                return None, {"volume": copy.deepcopy(self.row("get", volume_id))}
            case ["attachments"]:
                return None, {"attachments": self.list_attachments(asked["volume_id"])}
            case ["limits"]:
                used = sum(row["size"] for row in self.rows.values())
                absolute = {"totalGigabytesUsed": used, "maxTotalVolumeGigabytes": self.quota}
                return None, {"limits": {"rate": [], "absolute": absolute}}
        raise AssertionError(path)

    def post(self, path: str, *, body: dict[str, Any]) -> Any:
        match path.split("/")[1:]:
            case ["volumes"]:
                return None, {"volume": self.create(**body["volume"])}
            case ["volumes", volume_id, "metadata"]:
                return None, {"metadata": self.set_metadata(volume_id, body["metadata"])}
            case ["volumes", volume_id, "action"]:
                ((action, told),) = body.items()
                if action == "os-extend":
                    self.extend(volume_id, told["new_size"])
                else:
                    assert action == "os-update_readonly_flag"
                    self.protect(volume_id, told["readonly"])
                return None, None
            case ["attachments"]:
                assert set(body["attachment"]) == {"volume_uuid", "mode"}
                return None, {"attachment": self.reserve(body["attachment"]["volume_uuid"])}
            case ["attachments", attachment_id, "action"]:
                assert list(body) == ["os-complete"]
                self.complete(attachment_id)
                return None, None
        raise AssertionError(path)

    def put(self, path: str, *, body: dict[str, Any]) -> Any:
        match path.split("/")[1:]:
            case ["volumes", volume_id]:
                self.publish(volume_id, **body["volume"])
                return None, None
            case ["attachments", attachment_id]:
                assert list(body["attachment"]) == ["connector"]
                return None, {"attachment": self.export(attachment_id)}
        raise AssertionError(path)

    def delete(self, path: str) -> Any:
        match path.split("/")[1:]:
            case ["volumes", volume_id]:
                self.remove(volume_id)
            case ["volumes", volume_id, "metadata", key]:
                if self.row("unset_metadata", volume_id)["metadata"].pop(key, None) is None:
                    raise MISSING("no such metadata")
            case ["attachments", attachment_id]:
                self.detach(attachment_id)
            case _:
                raise AssertionError(path)
        return None, None

    # What they do

    def row(self, name: str, volume_id: str) -> dict[str, Any]:
        self.log.append(name)
        self.script(name)
        if volume_id not in self.rows:
            raise MISSING("no such volume")
        return self.rows[volume_id]

    def list(self, metadata: dict[str, str], marker: str | None) -> Any:
        self.log.append("list")
        self.script("list")
        if marker is not None and marker not in self.rows:
            raise MISSING("no such marker")
        # As the server does: without case.
        rows = [
            row
            for row in self.rows.values()
            if all(row["metadata"].get(key, "").lower() == value.lower() for key, value in metadata.items())
        ]
        start = [row["id"] for row in rows].index(marker) + 1 if marker is not None else 0
        told: dict[str, Any] = {"volumes": copy.deepcopy(rows[start : start + self.page])}
        if start + self.page < len(rows):
            told["volumes_links"] = [{"rel": "next", "href": "http://elsewhere"}]
        return told

    def create(self, size: int, name: str, metadata: dict[str, str], volume_type: str = "standard") -> dict[str, Any]:
        self.log.append("create")
        self.script("create")
        assert all(type(value) is str for value in metadata.values())
        made = str(uuid.uuid4())
        self.have(made, name=name, size=size, metadata=dict(metadata), volume_type=volume_type)
        return {**copy.deepcopy(self.rows[made]), "status": "creating"}

    def have(self, volume_id: str, **values: Any) -> None:
        self.rows[volume_id] = {
            "id": volume_id,
            "name": "",
            "status": "available",
            "size": 1,
            "metadata": {},
            "volume_type": "standard",
            "encrypted": self.encrypted,
            "created_at": "2026-01-02T03:04:05.000000",
            "updated_at": None,
            **values,
        }
        self.bytes[volume_id] = bytearray(100)

    def protect(self, volume_id: str, flag: bool) -> None:
        row = self.row("protect", volume_id)
        if row["status"] != "available":
            raise BADREQUEST("must be available")
        row["readonly"] = flag

    def set_metadata(self, volume_id: str, metadata: dict[str, str]) -> dict[str, str]:
        told: dict[str, str] = self.row("set_metadata", volume_id)["metadata"]
        told.update(metadata)
        return dict(told)

    def publish(self, volume_id: str, *, name: str, metadata: dict[str, str]) -> None:
        self.row("publish", volume_id).update(name=name, metadata=dict(metadata))

    def extend(self, volume_id: str, gib: int) -> None:
        row = self.row("extend", volume_id)
        row["size"] = gib
        self.bytes[volume_id].extend(bytes(1000))

    def remove(self, volume_id: str) -> None:
        row = self.row("delete", volume_id)
        if row["status"] not in ("available", "error", "error_extending"):
            raise BADREQUEST("must be available")
        if self.after_delete == "gone":
            del self.rows[volume_id]
        else:
            row["status"] = self.after_delete

    def reserve(self, volume_id: str) -> dict[str, Any]:
        row = self.row("reserve", volume_id)
        if row["status"] != "available" and not (self.multiattach and row["status"] == "in-use"):
            raise BADREQUEST("must be available")
        row["status"] = "reserved"
        made = str(uuid.uuid4())
        self.attached[made] = volume_id
        return {"id": made}

    def export(self, attachment_id: str) -> dict[str, Any]:
        self.log.append("export")
        self.script("export")
        volume_id = self.attached[attachment_id]
        self.rows[volume_id]["status"] = "attaching"
        information = {"driver_volume_type": "rbd", "volume": volume_id, "access_mode": "rw", **self.information}
        return {"id": attachment_id, "connection_info": information}

    def complete(self, attachment_id: str) -> None:
        self.log.append("complete")
        self.script("complete")
        self.rows[self.attached[attachment_id]]["status"] = "in-use"

    def detach(self, attachment_id: str) -> None:
        self.log.append("detach")
        self.script("detach")
        if attachment_id not in self.attached:
            raise MISSING("no such attachment")
        row = self.rows[self.attached.pop(attachment_id)]
        row["status"] = "in-use" if row["id"] in self.attached.values() else "available"

    def list_attachments(self, wanted: str) -> Any:
        self.log.append("attachments")
        return [{"id": key, "volume_id": volume} for key, volume in self.attached.items() if volume == wanted]

    # os-brick

    def host(self) -> dict[str, Any]:
        return {"host": "here"}

    def connector(self, information: dict[str, Any]) -> Any:
        def connect(info: dict[str, Any]) -> dict[str, Any]:
            self.log.append("connect")
            self.script("connect")
            return {"path": Handle(self.bytes[info["volume"]])}

        def disconnect(info: dict[str, Any], found: Any, *, force: bool) -> None:
            self.log.append("disconnect")
            self.script("disconnect")

        return SimpleNamespace(
            connect_volume=connect,
            disconnect_volume=disconnect,
            extend_volume=lambda info: self.log.append("rescan"),
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Cinder:
    made = Cinder()
    monkeypatch.setattr(_cinder_client.time, "sleep", lambda seconds: made.script("sleep"))
    return made


def over(server: Cinder, **values: Any) -> CinderDriver:
    driver = make(**values)
    server.encrypted_allowed = values.get("encrypted", False)  # type: ignore[attr-defined]
    driver._brick = SimpleNamespace(  # type: ignore[assignment]
        host=server.host, connector=server.connector, encrypted=values.get("encrypted", False)
    )
    driver._web = SimpleNamespace(close=lambda: None)  # type: ignore[assignment]
    driver._act_for(server)
    return driver


def hints(token: str = TOKEN, size: int | None = 10, **metadata: str) -> Hints:
    return Hints(token=token, size=size, block_size=10, metadata=metadata)


def store(driver: CinderDriver, image_id: str = "image", token: str = TOKEN, data: bytes = b"0123456789") -> Any:
    upload = driver.create(image_id, hints(token, len(data)))
    upload.write(Block(index=0, offset=0, data=data, last=True))
    upload.commit(len(data))
    return upload.location


def read(driver: CinderDriver, location: Any, start: int = 0, stop: int | None = None) -> bytes:
    reading = driver.read(location, start, stop)
    try:
        return b"".join(reading.chunks)
    finally:
        reading.close()


def test_add_and_read(server: Cinder) -> None:
    driver = over(server)
    upload = driver.create("image", hints(kind="raw", image_owner="p"))
    row = next(iter(server.rows.values()))
    assert row["metadata"]["imagestore_upload"] == TOKEN
    assert "image" not in row["name"].replace("imagestore", "")
    assert driver.locate("image") is None
    upload.write(Block(index=0, offset=0, data=b"0123456789", last=True))
    with pytest.raises(NotFound):
        driver.stat(upload.location)
    upload.commit(10)
    assert not server.attached
    assert row["readonly"]
    assert {"glance_image_id": "image", "image_size": "10", "image_owner": "p"}.items() <= row["metadata"].items()
    assert not [key for key in row["metadata"] if key.startswith("imagestore_upload")]
    assert driver.locate("image") == upload.location
    stat = driver.stat(upload.location)
    assert (stat.size, stat.token, stat.metadata) == (10, TOKEN, {"kind": "raw", "image_owner": "p"})
    assert read(driver, upload.location) == b"0123456789"
    assert read(driver, upload.location, 3, 5) == b"34"
    assert [image.image_id for image in driver.list()] == ["image"]
    assert not server.attached
    assert not list(driver.uploads())
    driver.delete(upload.location)
    assert not server.rows
    with pytest.raises(NotFound):
        driver.delete(upload.location)


def test_commit_detaches_before_it_publishes(server: Cinder) -> None:
    driver = over(server)
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"0123456789", last=True))
    server.log.clear()
    upload.commit(10)
    order = ["disconnect", "detach", "protect", "set_metadata", "publish"]
    assert [name for name in server.log if name in order] == order
    assert server.log[-1] == "publish"


def test_requests_of_a_read(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)
    server.log.clear()
    read(driver, location)
    reading = ["reserve", "set_metadata", "export", "connect", "complete", "disconnect", "detach", "unset_metadata"]
    assert server.log == ["get", *reading]
    assert not [key for key in server.rows[location.key[0]]["metadata"] if "reading" in key]


def test_commit_whose_answer_was_lost(server: Cinder) -> None:
    driver = over(server)
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"0123456789", last=True))
    upload.commit(10)
    upload.commit(10)
    upload.abort()
    assert driver.locate("image") == upload.location


@pytest.mark.parametrize("step", ["disconnect", "detach", "protect", "set_metadata", "publish"])
def test_commit_goes_on_where_it_stopped(server: Cinder, step: str) -> None:
    driver = over(server)
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"0123456789", last=True))
    failures = [step]

    def fail(name: str) -> None:
        if name in failures:
            failures.remove(name)
            raise OSError(5, "broken")

    server.script = fail
    with pytest.raises((StoreError, OSError), match="broken"):
        upload.commit(10)
    assert driver.locate("image") is None
    upload.commit(10)
    assert read(driver, upload.location) == b"0123456789"


def test_zeros_at_the_end_are_part_of_the_image(server: Cinder) -> None:
    driver = over(server, sparse=True)
    upload = driver.create("image", hints(size=None))
    upload.commit(4 * GIB + 1)
    assert driver.stat(upload.location).size == 4 * GIB + 1
    assert server.rows[upload.location.key[0]]["size"] == 5, "more than it needs"
    assert "reserve" not in server.log


def test_upload_that_nobody_holds_any_more_is_not_alive(server: Cinder) -> None:
    """As after a commit in doubt, which is not taken back."""
    driver = over(server)
    upload = driver.create("image", hints())
    assert [left.alive for left in driver.uploads()] == [True]
    del upload
    gc.collect()
    assert [left.alive for left in driver.uploads()] == [None]


def test_taken_id(server: Cinder) -> None:
    driver = over(server)
    late = driver.create("image", hints(OTHER))
    location = store(driver)
    with pytest.raises(AlreadyExists):
        late.commit(0)
    late.abort()
    assert driver.locate("image") == location
    assert len(server.rows) == 1


FIRST, LAST = "00000000-0000-4000-8000-000000000000", "ffffffff-ffff-4fff-bfff-ffffffffffff"


@pytest.mark.parametrize("rival", [FIRST, LAST])
@pytest.mark.parametrize("end", ["image", "gone", "dead"])
def test_adders_that_commit_at_once(server: Cinder, rival: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = over(server)
    upload = driver.create("image", hints())
    own = server.rows[upload.location.key[0]]["metadata"]
    told = {"imagestore_upload": OTHER, "imagestore_image": "image", "imagestore_committing": "True"}
    server.have(rival, metadata=told)
    seen: list[bool] = []

    def pass_time(name: str) -> None:
        if name != "sleep" or end == "dead":
            return
        seen.append("imagestore_committing" in own)
        if len(seen) == 3 and end == "image":
            server.rows[rival]["metadata"] = {"glance_image_id": "image", "image_size": "1"}
        elif len(seen) == 3:
            del server.rows[rival]

    server.script = pass_time
    if end == "dead":
        monkeypatch.setattr(cinder, "_COMMIT_PATIENCE", 0)
    if end == "image":
        with pytest.raises(AlreadyExists):
            upload.commit(0)
        upload.abort()
        assert list(server.rows) == [rival]
    else:
        upload.commit(0)
        assert driver.locate("image") == upload.location
    # Who gives way does not say that it commits, or the other would wait for it.
    assert seen[:3] == ([] if end == "dead" else [rival == LAST] * 3)


def test_others_do_not_hold_a_commit_up(server: Cinder) -> None:
    """Uploads of the id that are not being committed, and commits of other ids and other stores."""
    driver = over(server, volume_type="fast")
    mark = {"imagestore_upload": OTHER, "imagestore_image": "image"}
    for name, metadata, kind in (
        ("a", mark, "fast"),
        ("b", {**mark, "imagestore_image": "Image", "imagestore_committing": "True"}, "fast"),
        ("c", {**mark, "imagestore_committing": "True"}, "cheap"),
        ("d", {**mark, "imagestore_upload": "no token", "imagestore_committing": "True"}, "fast"),
    ):
        server.have(name, metadata=metadata, volume_type=kind)
    upload = driver.create("image", hints())
    server.script = lambda name: pytest.fail("it waits") if name == "sleep" else None
    upload.commit(0)
    assert driver.locate("image") == upload.location


def test_discard_before_and_after_commit(server: Cinder) -> None:
    driver = over(server)
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"0123456789", last=True))
    (left,) = driver.uploads()
    assert (left.token, left.image_id, left.alive) == (TOKEN, "image", True)
    cinder._running.clear()
    assert [left.alive for left in over(server).uploads()] == [None], "another process knows nothing of it"
    cinder._running[cinder._here(left.key[0])] = upload  # type: ignore[assignment]
    driver.discard(left)
    assert not server.rows
    assert not server.attached
    with pytest.raises(NotFound):
        upload.write(Block(index=1, offset=0, data=b"x"))
    with pytest.raises(NotFound):
        upload.commit(10)
    upload.abort()
    driver.discard(left)
    location = store(driver)
    driver.discard(left)
    assert read(driver, location) == b"0123456789"


def test_commit_gives_way_to_a_discard_that_was_first(server: Cinder) -> None:
    driver, other = over(server), over(server)
    upload = driver.create("image", hints())
    (left,) = driver.uploads()
    failures = ["attachments"]

    def stop(name: str) -> None:
        if name == "delete" and failures:
            failures.clear()
            raise OSError(5, "broken")

    server.script = stop
    with pytest.raises(Unavailable, match="broken"):
        other.discard(left)
    with pytest.raises(NotFound):
        upload.commit(0)
    assert driver.locate("image") is None
    upload.abort()
    assert not server.rows


@pytest.mark.parametrize("moment", ["protect", "set_metadata", "publish"])
def test_discard_within_a_commit(server: Cinder, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two wins wholly, at whichever request of the commit the discard comes."""
    driver, other = over(server), over(server)
    upload = driver.create("image", hints())
    monkeypatch.setattr(cinder.time, "sleep", lambda seconds: resume.set() or done.wait(5))
    (left,) = driver.uploads()
    resume, done = threading.Event(), threading.Event()
    errors: list[Exception] = []
    discarder: list[threading.Thread] = []

    def discard() -> None:
        try:
            other.discard(left)
        except Exception as error:  # noqa: BLE001 - handed over to the thread that asserts
            errors.append(error)
        finally:
            resume.set()

    def interrupt(name: str) -> None:
        if name == moment and not discarder:
            discarder.append(threading.Thread(target=discard))
            discarder[0].start()
            # Until the discard has ended, waits for the commit, or is about to delete.
            assert resume.wait(5)
        if name == "delete" and threading.current_thread() in discarder:
            resume.set()
            done.wait(5)

    server.script = interrupt
    try:
        upload.commit(0)
        committed = True
    except StoreError:
        committed = False
    done.set()
    discarder[0].join(5)
    assert not errors
    assert committed == (driver.locate("image") is not None)
    assert committed == bool(server.rows)


def test_image_of_unknown_size_grows(server: Cinder) -> None:
    driver = over(server)
    upload = driver.create("image", hints(size=None))
    volume_id = upload.location.key[0]
    upload.write(Block(index=0, offset=0, data=b"0123456789"))
    upload._size = 10  # type: ignore[attr-defined]
    upload.write(Block(index=1, offset=10, data=b"abc", last=True))
    assert server.rows[volume_id]["size"] == 1, "there was room enough"
    server.log.clear()
    upload._size = 13  # type: ignore[attr-defined]
    server.rows[volume_id]["size"] = 0
    upload.write(Block(index=2, offset=13, data=b"def", last=True))
    order = ["disconnect", "detach", "extend", "reserve", "connect", "complete"]
    assert [name for name in server.log if name in order] == order
    assert server.bytes[volume_id][:16] == b"0123456789abcdef"


def test_image_grows_while_attached(server: Cinder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [0, 2 * GIB - 1, 2 * GIB]
    monkeypatch.setattr(HandleDevice, "size", lambda device: sizes.pop(0))
    driver = over(server, extend_attached=True)
    upload = driver.create("image", hints(size=None))
    upload.write(Block(index=0, offset=0, data=b"0123456789"))
    server.log.clear()
    upload._size = 10  # type: ignore[attr-defined]
    server.rows[upload.location.key[0]]["size"] = 0
    upload.write(Block(index=1, offset=10, data=b"abc", last=True))
    assert [name for name in server.log if name != "get"] == ["extend", "rescan"]
    assert not sizes, "it was written to before this host saw it grow"


def test_no_room(server: Cinder) -> None:
    driver = over(server)

    def fail(name: str) -> None:
        if name == "get":
            next(iter(server.rows.values()))["status"] = "error"

    server.script = fail
    with pytest.raises(StoreFull):
        driver.create("image", hints())
    assert not server.rows


def test_no_room_to_grow(server: Cinder) -> None:
    driver = over(server)
    upload = driver.create("image", hints())
    row = next(iter(server.rows.values()))
    upload._size = 0  # type: ignore[attr-defined]
    row["size"] = 0

    def fail(name: str) -> None:
        if name == "extend":
            row["status"] = "error_extending"
            server.script = lambda name: None
            raise foreign("OverLimit", CINDER, code=413)("quota")

    server.script = fail
    with pytest.raises(StoreFull):
        upload.write(Block(index=0, offset=0, data=b"x"))
    upload.abort()
    assert not server.rows


def test_volume_that_never_becomes_available(server: Cinder) -> None:
    driver = over(server, state_timeout=0)

    def stuck(name: str) -> None:
        for row in server.rows.values():
            row["status"] = "creating"

    server.script = stuck
    with pytest.raises(StoreTimeout) as caught:
        driver.create("image", hints())
    assert caught.value.temporary
    server.script = lambda name: None
    assert [left.token for left in driver.uploads()] == [TOKEN]


@pytest.mark.parametrize("how", ["volume", "attachment"])
def test_encrypted_volumes_are_refused(server: Cinder, how: str) -> None:
    driver = over(server)
    if how == "volume":
        server.encrypted = True
        with pytest.raises(Unsupported):
            driver.create("image", hints())
    else:
        server.information = {"encrypted": True}
        upload = driver.create("image", hints())
        with pytest.raises(Unsupported):
            upload.write(Block(index=0, offset=0, data=b"x"))
        upload.abort()
    assert "connect" not in server.log
    assert not server.rows
    assert not server.attached


def test_encrypted_volumes_of_a_host_that_decrypts(server: Cinder) -> None:
    server.encrypted = True
    server.information = {"encrypted": True}
    driver = over(server, encrypted=True)
    assert read(driver, store(driver)) == b"0123456789"


@pytest.mark.parametrize("information", [{"access_mode": "ro"}, {"format": "qcow2"}])
def test_volumes_that_can_not_be_written(server: Cinder, information: dict[str, str]) -> None:
    server.information = information
    upload = over(server).create("image", hints())
    with pytest.raises((ConfigurationError, Unsupported)):
        upload.write(Block(index=0, offset=0, data=b"x"))
    assert "connect" not in server.log
    assert not server.attached


@pytest.mark.parametrize("step", ["export", "connect", "complete"])
def test_attachment_that_fails_is_taken_back(server: Cinder, step: str) -> None:
    driver = over(server)
    location = store(driver)

    def fail(name: str) -> None:
        if name == step:
            raise OSError(5, "broken")

    server.script = fail
    with pytest.raises((StoreError, OSError), match="broken"):
        driver.read(location, 0, None)
    assert not server.attached
    server.script = lambda name: None
    assert read(driver, location) == b"0123456789"


def test_connection_that_can_not_be_ended_keeps_the_attachment(server: Cinder) -> None:
    """Cinder would let others have the volume while it can still be written to from here."""
    driver = over(server)
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"0123456789", last=True))

    def fail(name: str) -> None:
        if name == "disconnect":
            raise OSError(5, "broken")

    server.script = fail
    with pytest.raises(OSError, match="broken"):
        upload.abort()
    assert server.attached
    assert server.rows
    server.script = lambda name: None
    upload.abort()
    assert not server.attached
    assert not server.rows


def test_readers_share_one_attachment(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)
    server.log.clear()
    one, other = driver.read(location, 0, None), driver.read(location, 5, None)
    assert b"".join(one.chunks) == b"0123456789"
    assert server.attached
    assert b"".join(other.chunks) == b"56789"
    assert not server.attached
    assert server.log.count("reserve") == server.log.count("detach") == 1


def test_reader_that_is_closed_or_dropped(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)
    reading = driver.read(location, 0, None)
    reading.close()
    reading.close()
    assert not server.attached
    with pytest.raises(Cancelled):
        next(reading.chunks)
    reading = driver.read(location, 0, None)
    assert server.attached
    del reading
    assert not server.attached


def test_reader_that_is_dropped_by_another_thread(server: Cinder) -> None:
    """It may be one of librbd's, where the interpreter collects garbage: that must not wait for what is read there."""
    driver = over(server)
    location = store(driver)
    held = [driver.read(location, 0, None)]
    busy = threading.Lock()

    def wait(name: str) -> None:
        if name == "detach":
            with busy:
                pass

    server.script = wait
    with busy:
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it waited"
        assert server.attached
    driver.close()
    assert not server.attached


def test_reader_that_a_child_drops_is_its_parents(server: Cinder, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = over(server)
    reading = driver.read(store(driver), 0, None)
    own = os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: own + 1)
        del reading
    assert server.attached


def test_detach_that_fails_does_not_fail_the_read(server: Cinder) -> None:
    """It is made up for with the next one, or when the store is closed."""
    driver = over(server)
    location, other = store(driver), store(driver, "other", OTHER)

    def away(name: str) -> None:
        if name == "detach":
            raise foreign("ConnectFailure", KEYSTONE, CONNECTION)("refused")

    server.script = away
    assert read(driver, location) == b"0123456789"
    assert len(server.attached) == 1
    assert [left.image_id for left in driver.uploads()] == ["image"]
    server.script = lambda name: None
    assert read(driver, other) == b"0123456789"
    assert not server.attached
    assert not list(driver.uploads())
    server.script = away
    assert read(driver, location) == b"0123456789"
    driver.close()
    server.script = lambda name: None
    driver.close()
    assert not server.attached


def test_detach_that_is_refused_is_told(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)

    def forbid(name: str) -> None:
        if name == "detach":
            raise foreign("Forbidden", CINDER, code=403)("not allowed")

    server.script = forbid
    with pytest.raises(PermissionDenied):
        read(driver, location)


def test_device_that_ends_early(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)
    whole = server.bytes[location.key[0]]
    server.bytes[location.key[0]] = bytearray(b"012")
    with pytest.raises(Unavailable, match="ends at byte 3"):
        driver.read(location, 0, None)
    assert not server.attached
    server.bytes[location.key[0]] = whole
    reading = driver.read(location, 0, None)
    del whole[3:]
    assert next(reading.chunks) == b"012"
    with pytest.raises(Unavailable, match="ends at byte 3"):
        next(reading.chunks)
    assert not server.attached


def test_holes_are_not_read(server: Cinder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cinder_attach, "_CHUNK", 4)
    monkeypatch.setattr(_cinder_attach, "_WINDOW", 16)
    monkeypatch.setattr(_cinder_attach, "_ZEROS", bytes(4))
    areas = [(9, 10), (12, 14), (40, 50), (90, 100)]
    asked: list[tuple[int, int]] = []

    def known(device: HandleDevice, start: int, stop: int) -> Any:
        asked.append((start, stop))
        return iter([(max(start, one), min(stop, end)) for one, end in areas if one < stop and end > start])

    monkeypatch.setattr(HandleDevice, "areas", known)
    driver = over(server)
    data = bytes(number + 1 if any(one <= number < end for one, end in areas) else 0 for number in range(100))
    location = store(driver, data=data)
    reads: list[tuple[int, int]] = []
    real = HandleDevice.ask
    monkeypatch.setattr(
        HandleDevice, "ask", lambda device, at, length: reads.append((at, length)) or real(device, at, length)
    )
    for start, stop in ((0, 100), (10, 13), (0, 9), (45, 91)):
        assert read(driver, location, start, stop) == data[start:stop]
    assert all(length <= 4 for _, length in reads)
    assert all(any(at < end and at + length > one for one, end in areas) for at, length in reads), "a hole was read"
    assert all(stop - start <= 16 for start, stop in asked)


@pytest.mark.parametrize("most", [1, 3])
def test_device_that_gives_less_than_it_is_asked_for(
    server: Cinder, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(_cinder_attach, "_CHUNK", 4)
    driver = over(server)
    location = store(driver)
    real = HandleDevice.ask
    monkeypatch.setattr(HandleDevice, "ask", lambda device, at, length: real(device, at, min(length, most)))
    assert read(driver, location, 0, None) == b"0123456789"
    assert read(driver, location, 3, 9) == b"345678"
    assert not server.attached


def test_pieces_that_follow_each_other_share_an_attachment(server: Cinder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download reads so, and may be between two pieces for a moment."""
    monkeypatch.setattr(_cinder_attach, "_LINGER", 5)
    driver = over(server)
    location = store(driver)
    server.log.clear()
    first = driver.read(location, 0, 5)
    assert next(first.chunks) == b"01234"
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(next(first.chunks, None)))
    thread.start()
    second = driver.read(location, 5, 9)
    thread.join(4)
    assert ended == [None], "the first piece waits although there is a second one"
    assert next(second.chunks) == b"5678"
    second.close()
    assert server.log.count("reserve") == server.log.count("detach") == 1
    assert not server.attached


def test_reader_that_was_killed(server: Cinder) -> None:
    """Its attachment keeps the image from being deleted, and is listed as what it is."""
    dead, driver = over(server), over(server)
    location = store(driver)
    reading = dead.read(location, 0, None)
    assert [left.alive for left in dead.uploads()] == [True]
    (left,) = driver.uploads()
    attachment_id = next(iter(server.attached))
    assert (left.image_id, left.bytes, left.alive) == ("image", 0, None)
    assert left.token == attachment_id.replace("-", "")
    assert left.last_activity is not None
    with pytest.raises(InUse):
        driver.delete(location)
    assert driver.stat(location).size == 10
    driver.discard(left)
    assert not server.attached
    assert not list(driver.uploads())
    driver.discard(left)
    reading.close()
    driver.delete(location)
    assert not server.rows


def test_long_read_says_that_it_lives(server: Cinder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cinder_attach, "_CHUNK", 5)
    driver = over(server)
    reading = driver.read(store(driver), 0, None)
    (before,) = driver.uploads()
    monkeypatch.setattr(_cinder_attach, "_BEAT_EVERY", 0)
    reading.chunks._attachment._next_beat = 0  # type: ignore[attr-defined]
    next(reading.chunks)
    (after,) = driver.uploads()
    reading.chunks._attachment._next_beat = 0  # type: ignore[attr-defined]

    def away(name: str) -> None:
        if name == "set_metadata":
            raise foreign("ConnectFailure", KEYSTONE, CONNECTION)("refused")

    server.script = away
    assert next(reading.chunks) == b"56789", "it can be read without Cinder"
    assert list(reading.chunks) == list(reading.chunks) == []
    assert before.last_activity is not None
    assert after.last_activity is not None
    assert after.last_activity > before.last_activity
    reading.close()
    assert not list(driver.uploads())


def test_who_may_not_leave_a_mark_can_read(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)

    def forbid(name: str) -> None:
        if name == "set_metadata":
            raise foreign("Forbidden", CINDER, code=403)("not allowed")

    server.script = forbid
    assert read(driver, location) == b"0123456789"
    assert not server.attached


def test_lists_come_in_pages(server: Cinder) -> None:
    driver = over(server)
    server.page = 2
    for number in range(5):
        server.have(f"v{number}", metadata={"glance_image_id": f"i{number}"})
    assert sorted(image.image_id for image in driver.list()) == [f"i{number}" for number in range(5)]
    server.have("other", metadata={"glance_image_id": "I3"})
    found = driver.locate("i3")
    assert found is not None
    assert found.key == ("v3",)
    failures = [2]

    def vanish(name: str) -> None:
        if server.log.count("list") == failures[0]:
            server.rows.pop("v1", None)

    server.log.clear()
    server.script = vanish
    with pytest.raises(Unavailable):
        list(driver.list())


@pytest.mark.parametrize(("quota", "told"), [(-1, (None, None)), (5, (5, 4)), (0, (1, 0))])
def test_usage_is_the_quota(server: Cinder, quota: int, told: tuple[int | None, int | None]) -> None:
    driver = over(server)
    store(driver)
    server.quota = quota
    usage = driver.usage()
    assert usage.used == GIB
    assert (usage.total, usage.free) == tuple(None if each is None else each * GIB for each in told)


def test_volume_that_others_have(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)
    server.rows[location.key[0]]["status"] = "in-use"
    with pytest.raises(Unavailable) as caught:
        driver.read(location, 0, None)
    assert caught.value.temporary
    with pytest.raises(InUse):
        driver.delete(location)
    assert driver.stat(location).size == 10


@pytest.mark.parametrize("status", ["reserved", "attaching", "in-use"])
def test_delete_does_not_wait_for_others(server: Cinder, status: str) -> None:
    driver = over(server)
    location = store(driver)
    server.rows[location.key[0]]["status"] = status
    server.script = lambda name: pytest.fail("it waits") if name == "sleep" else None
    with pytest.raises(InUse) as caught:
        driver.delete(location)
    assert not caught.value.temporary


def test_delete_that_comes_back(server: Cinder) -> None:
    """A backend that sees a client gives the volume back; a dead client's time ends."""
    driver = over(server)
    location = store(driver)
    server.after_delete = "available"

    def give_up(name: str) -> None:
        if name == "delete" and server.log.count("delete") == 3:
            server.after_delete = "gone"

    server.script = give_up
    driver.delete(location)
    assert not server.rows
    location = store(driver)
    server.after_delete = "available"
    with pytest.raises(InUse):
        driver.delete(location)
    assert driver.stat(location).size == 10


def test_delete_that_cinder_can_not_end(server: Cinder) -> None:
    driver = over(server)
    location = store(driver)
    server.after_delete = "error_deleting"
    with pytest.raises(Unavailable):
        driver.delete(location)
    with pytest.raises(NotFound):
        driver.stat(location)
    server.rows[location.key[0]]["status"] = "available"
    with pytest.raises(NotFound):
        driver.stat(location)
    assert driver.locate("image") is None
    assert [left.token for left in driver.uploads()] == [TOKEN]


def test_volumes_of_others_are_not_touched(server: Cinder) -> None:
    driver = over(server)
    server.have("database", name="image-x", metadata={"owner": "them"})
    server.have("wrong", metadata={"imagestore_upload": "not a token"})
    server.have("of-an-image", metadata={"image_id": "x", "image_size": "7"})
    before = copy.deepcopy(server.rows)
    assert not list(driver.list())
    assert not list(driver.uploads())
    assert driver.locate("x") is None
    for key in before:
        place = cinder.Location(uri=f"cinder://fast/{key}", key=(key,))
        for verb in (driver.stat, driver.delete, lambda place: driver.read(place, 0, None)):
            with pytest.raises(NotFound):
                verb(place)
    assert server.rows == before


def test_images_of_glance(server: Cinder) -> None:
    driver = over(server)
    server.have("a", metadata={"glance_image_id": "one", "image_size": "7", "image_owner": "p"})
    server.have("b", metadata={"glance_image_id": "two"}, size=2)
    assert {image.image_id: image.size for image in driver.list()} == {"one": 7, "two": 2 * GIB}
    found = driver.locate("one")
    assert found is not None
    assert driver.stat(found).token is None
    driver.delete(found)
    assert "a" not in server.rows


def test_stores_of_two_types_share_a_project(server: Cinder) -> None:
    fast, cheap = over(server, volume_type="fast"), over(server, store="cheap", volume_type="cheap")
    one, other = store(fast), store(cheap, token=OTHER)
    assert fast.locate("image") == one
    assert cheap.locate("image") is not None
    assert [image.location for image in cheap.list()] == [other]
    assert over(server).locate("image") is not None


def test_close_lets_go_what_was_given_up(server: Cinder) -> None:
    driver = over(server)
    upload = driver.create("image", hints())
    upload.write(Block(index=0, offset=0, data=b"0123456789", last=True))
    driver.close()
    assert not server.attached
    assert [left.token for left in over(server).uploads()] == [TOKEN]
    with pytest.raises(NotFound):
        upload.commit(10)
