"""The VMware driver without any server: options, locations, ids, errors."""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urlencode
from xml.parsers.expat import ExpatError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore import config
from imagestore._options import old_options
from imagestore._store import Store
from imagestore.driver import Options
from imagestore.drivers.vmware import VMwareDriver
from imagestore.errors import (
    AlreadyExists,
    ConfigurationError,
    InUse,
    InvalidImageId,
    InvalidLocation,
    InvalidOption,
    LimitExceeded,
    MissingDependency,
    NotFound,
    PermissionDenied,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
)

VALUES: dict[str, Any] = {
    "host": "vc.example",
    "user": "me",
    "password": "s3cr3t",
    "datastores": ["DC0:fast:10", "north/DC 1:slow store"],
}


def make(**changes: Any) -> VMwareDriver:
    defaults = {option.dest: option.default for option in VMwareDriver.options}
    return VMwareDriver(Options({**defaults, **VALUES, **changes}), store="unit")


def store(**changes: Any) -> Store:
    return Store(make(**changes))


# Options


@pytest.mark.parametrize(
    ("host", "canonical"),
    [
        ("vc.example", "vc.example"),
        (" VC.Example:443 ", "vc.example"),
        ("vc.example:8443", "vc.example:8443"),
        ("vc.example:08443", "vc.example:8443"),
        ("10.0.0.1", "10.0.0.1"),
        ("::1", "[::1]"),
        ("[::1]:8443", "[::1]:8443"),
        ("[2001:DB8::1]", "[2001:db8::1]"),
    ],
)
def test_hosts(host: str, canonical: str) -> None:
    driver = make(host=host)
    uri = f"vsphere://{canonical}/folder/openstack_glance/image?dsName=fast&dcPath=DC0"
    assert driver.parse(uri).uri == uri
    assert driver.parse(uri.replace(canonical, host.strip() if "::" not in host else canonical)).uri == uri


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("host", ""),
        ("host", None),
        ("host", "https://vc.example"),
        ("host", "vc.example/sdk"),
        ("host", "vc.example:0"),
        ("host", "vc.example:65536"),
        ("host", "me@vc.example"),
        ("host", "vc example"),
        ("image_dir", ""),
        ("image_dir", "/"),
        ("image_dir", "a//b"),
        ("image_dir", "../a"),
        ("image_dir", "a/.."),
        ("image_dir", "a/ . /b"),
        ("image_dir", "[fast] a"),
        ("image_dir", "a\\b"),
        ("datastores", []),
        ("datastores", ["fast"]),
        ("datastores", ["DC0:"]),
        ("datastores", [":fast"]),
        ("datastores", ["DC0:fast:many"]),
        ("datastores", ["DC0:fast:1.5"]),
        ("datastores", ["DC0:fa]st"]),
        ("datastores", ["DC0:fast", "/DC0:fast:3"]),
        ("certificate", "/some/file"),
        ("accept_locations", ["vsphere://old"]),
        ("accept_locations", ["vsphere://old/folder/a?dsName=x"]),
        ("accept_locations", ["vsphere://old/folder/..?dsName=x&dcPath=y"]),
        ("accept_locations", ["vsphere://me:secret@old/folder/a?dsName=x&dcPath=y"]),
        ("accept_locations", ["http://old/folder/a?dsName=x&dcPath=y"]),
    ],
)
def test_options_that_are_wrong(option: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=option) as caught:
        make(**{"cacert": "/other" if option == "certificate" else None, option: value})
    assert "secret" not in str(caught.value)


def test_datastores_in_the_forms_that_glance_takes() -> None:
    driver = make(datastores=["DC0:fast", " /DC1/ : fast :7", "DC2:fast:", "DC3:fast:-1"])
    assert [(place.datacenter, place.datastore, weight) for place, weight in driver._weights.items()] == [
        ("DC0", "fast", 0),
        ("DC1", "fast", 7),
        ("DC2", "fast", 0),
        ("DC3", "fast", -1),
    ]


def test_secrets_are_told_to_nobody() -> None:
    driver = make()
    assert "s3cr3t" not in f"{driver!r} {driver.settings!r} {driver.__dict__!r}".replace(
        str(driver.settings._values), ""
    )
    assert [option.dest for option in driver.options if option.secret] == ["password"]


def test_glances_options_lead_somewhere() -> None:
    names = {option.dest for option in VMwareDriver.options} | {"description", "weight"}
    for old in old_options("vmware"):
        assert old.to in names if old.fate == "kept" else old.reason


def test_a_file_of_glance_loads(tmp_path: Path) -> None:
    file = tmp_path / "glance.conf"
    file.write_text(
        "[DEFAULT]\nenabled_backends = vc:vmware\n[glance_store]\ndefault_backend = vc\n[vc]\n"
        "vmware_server_host = vc.example\nvmware_server_username = me\nvmware_server_password = s3cr3t\n"
        "vmware_api_retry_count = 10\nvmware_task_poll_interval = 5\nvmware_store_image_dir = /openstack_glance\n"
        "vmware_insecure = false\nvmware_ca_file = /etc/ssl/vc.pem\n"
        "vmware_datastores = DC0:fast:10\nvmware_datastores = DC0:slow\n"
    )
    if "vmware" not in config.available_drivers():
        with pytest.raises(ConfigurationError):
            config.load_stores(file)
        return
    with config.load_stores(file) as stores:
        settings = stores["vc"]._template.settings
        assert (settings.host, settings.task_interval, settings.cacert) == ("vc.example", 5.0, "/etc/ssl/vc.pem")
        assert settings.datastores == ["DC0:fast:10", "DC0:slow"]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyVmomi", None)
    with pytest.raises(MissingDependency, match=r"imagestore\[vmware\]"):
        store().exists("image")


@pytest.mark.parametrize("option", ["cacert", "certificate"])
def test_certificates_that_are_none(option: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigurationError, match="certificate"):
            store(**{option: str(path)}).exists("image")


# Ids


@pytest.mark.parametrize("image_id", ["a.vmdk", "a.VMDK", "a-flat.Vmdk"])
def test_names_of_disks_are_refused(image_id: str) -> None:
    with pytest.raises(InvalidImageId, match="vmdk"):
        make().check_id(image_id)
    with pytest.raises(InvalidLocation):
        make().parse(f"vsphere://vc.example/folder/openstack_glance/{image_id}?dsName=fast&dcPath=DC0")


@pytest.mark.parametrize("image_id", ["vmdk", "a.vmdk2", "a.iso"])
def test_other_names_are_not(image_id: str) -> None:
    make().check_id(image_id)


# Locations

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", fullmatch=True).filter(
    lambda x: not x.lower().endswith(".vmdk")
)
NAMES = st.text(
    st.characters(blacklist_categories=["Cc", "Cs"], blacklist_characters="/\\[]:"), min_size=1, max_size=20
).filter(lambda x: x.strip() == x and x.strip(" ."))


@given(image_id=IDS, directory=st.lists(NAMES, min_size=1, max_size=3), datacenter=NAMES, datastore=NAMES)
def test_a_location_is_what_glance_writes_and_comes_back(
    image_id: str, directory: list[str], datacenter: str, datastore: str
) -> None:
    driver = make(datastores=[f"{datacenter}:{datastore}"], image_dir="/".join(directory))
    made = driver._located(driver._home[image_id])
    assert made.image_id == image_id
    assert "@" not in made.uri
    assert made.uri.isascii()
    again = driver.parse(made.uri)
    assert (again.uri, again.key, again.image_id) == (made.uri, made.key, image_id)
    for text in (quote, quote_plus):
        query = urlencode({"dcPath": f"/{datacenter}", "dsName": datastore}, quote_via=text)
        assert driver.parse(f"VSphere://VC.example:443/folder/{quote('/'.join(directory))}/{image_id}?{query}") == made


def test_the_text_is_that_of_glance() -> None:
    assert make().parse("vsphere://vc.example/folder/openstack_glance/x?dcPath=DC0&dsName=fast").uri == (
        "vsphere://vc.example/folder/openstack_glance/x?dsName=fast&dcPath=DC0"
    )


@given(st.text(max_size=80), st.integers(0, 70), st.integers(0, 10))
def test_a_location_that_was_changed_is_refused_or_the_same(text: str, at: int, length: int) -> None:
    driver = make(datastores=["DC0:fast"])
    uri = "vsphere://vc.example/folder/openstack_glance/image?dsName=fast&dcPath=DC0"
    try:
        parsed = driver.parse(uri[:at] + text + uri[at + length :])
    except InvalidLocation:
        return
    datacenter, datastore, directory, name = parsed.key
    assert (datacenter, datastore, directory) == ("DC0", "fast", "openstack_glance")
    assert driver.parse(parsed.uri) == parsed
    assert "/" not in name


def test_a_location_without_a_datacenter_is_that_of_the_only_one() -> None:
    uri = "vsphere://vc.example/folder/openstack_glance/x?dsName=fast"
    assert make().parse(uri).key[0] == "DC0"
    with pytest.raises(InvalidLocation):
        make(datastores=["DC0:fast", "DC1:fast"]).parse(uri)


def test_places_that_are_accepted_are_looked_for_on_the_configured_host() -> None:
    driver = make(accept_locations=["vsphere://old.example:8443/folder/old/dir?dsName=old&dcPath=DC9"])
    parsed = driver.parse("vsphere://old.example:8443/folder/old/dir/image?dsName=old&dcPath=DC9")
    assert parsed.uri == "vsphere://vc.example/folder/old/dir/image?dsName=old&dcPath=DC9"
    assert driver.parse(parsed.uri) == parsed
    for other in ("old.example/folder/old/dir", "old.example:8443/folder/old", "old.example:8443/folder/old/dir/sub"):
        with pytest.raises(InvalidLocation):
            driver.parse(f"vsphere://{other}/image?dsName=old&dcPath=DC9")
    with pytest.raises(InvalidLocation):
        driver.parse("vsphere://old.example:8443/folder/openstack_glance/image?dsName=fast&dcPath=DC0")


# Errors


def test_faults() -> None:
    sdk = pytest.importorskip("pyVmomi")
    fault, runtime = sdk.vim.fault, sdk.vmodl.fault
    driver = make()
    for made, kind, temporary in (
        (fault.InvalidLogin(), Unauthenticated, False),
        (fault.PasswordExpired(), Unauthenticated, False),
        (fault.NotAuthenticated(), Unauthenticated, False),
        (fault.NoPermission(), PermissionDenied, False),
        (fault.FileNotFound(), NotFound, False),
        (fault.FileAlreadyExists(), AlreadyExists, False),
        (fault.FileLocked(), InUse, False),
        (fault.NoDiskSpace(), StoreFull, False),
        (fault.FileTooLarge(), LimitExceeded, False),
        (fault.InvalidDatastore(), ConfigurationError, False),
        (fault.InaccessibleDatastore(), Unavailable, True),
        (fault.Timedout(), StoreTimeout, True),
        (runtime.SystemError(), Unavailable, True),
        (runtime.HostNotConnected(), Unavailable, True),
        (runtime.NotSupported(msg="s3cr3t"), StoreError, False),
    ):
        error = driver.translate(made)
        assert type(error) is kind, made
        assert error.temporary is temporary, made
        assert "s3cr3t" not in str(error)


@pytest.mark.parametrize(
    ("error", "kind", "temporary"),
    [
        (ConnectionResetError(), Unavailable, True),
        (socket.gaierror(), Unavailable, True),
        (TimeoutError(), StoreTimeout, True),
        (ssl.SSLCertVerificationError("x"), Unavailable, False),
        (ssl.SSLError("x"), Unavailable, True),
        (http.client.RemoteDisconnected(), Unavailable, True),
        (http.client.HTTPException("503 busy"), Unavailable, True),
        (ExpatError(), Unavailable, True),
    ],
)
def test_errors_on_the_way(error: Exception, kind: type[StoreError], temporary: bool) -> None:
    ours = make().translate(error)
    assert type(ours) is kind
    assert ours.temporary is temporary


def test_what_nobody_knows_is_left_to_the_store() -> None:
    assert make().translate(ValueError("x")) is None
