"""Configuration: files, a host's ConfigOpts, keyword arguments, old option names, faults and secrets."""

from __future__ import annotations

import logging
import string
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oslo_config import cfg, generator

from imagestore import config
from imagestore._models import Limits, Retry, Timeouts
from imagestore._options import OLD_OPTIONS, old_options
from imagestore._store import Store
from imagestore.errors import ConfigurationError, DriverNotFound, InvalidOption, MissingDependency, StoreError

DRIVERS = """
from oslo_config import cfg, types
from imagestore.driver import Driver

class Fake(Driver):
    name = "fake"
    schemes = ("fake",)
    options = (
        cfg.StrOpt("secret_key", secret=True, required=True, help="The key. More."),
        cfg.IntOpt("pin", secret=True, min=1, max=9999),
        cfg.StrOpt("grade", secret=True, choices=["a", "b"]),
        cfg.IntOpt("count", default=3, min=1, max=9),
        cfg.BoolOpt("fast", default=False),
        cfg.ListOpt("hosts", default=[]),
        cfg.DictOpt("proxies", default={}),
        cfg.MultiStrOpt("paths", default=[]),
        cfg.StrOpt("root", default="/srv", deprecated_name="base"),
        cfg.StrOpt("bucket", default="$description/bucket"),
    )
    def open(self): raise AssertionError("nothing opens a store here")
    parse = stat = read = translate = open
    def __init__(self, settings, /, **context):
        super().__init__(settings, **context)
        root = getattr(settings, "root", None)
        if root == "boom":
            raise ValueError(f"bad {settings.secret_key}")
        if root == "no":
            from imagestore.errors import InvalidOption
            raise InvalidOption(f"option root: no with {settings.secret_key}")

class Other(Fake):
    name = "other"
    options = (cfg.BoolOpt("count", default=True), cfg.StrOpt("kind"))

class Swift(Fake):
    name = "swift"
    options = (
        cfg.IntOpt("segment_size", default=200 * 1024000, min=1),
        cfg.StrOpt("cacert"),
        cfg.StrOpt("key", secret=True),
    )

class Future(Fake):
    api = 99

class Twice(Fake):
    name = "twice"
"""
ENTRY_POINTS = """
[imagestore.drivers]
fake = fake_drivers:Fake
other = fake_drivers:Other
oldswift = fake_drivers:Swift
future = fake_drivers:Future
notadriver = fake_drivers:cfg
lost = fake_drivers:Missing
nodep = fake_dependent:Driver
twice = fake_drivers:Twice
"""


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two installed packages with drivers; they agree on `fake` and quarrel about `twice`."""
    site = tmp_path_factory.mktemp("site")
    (site / "fake_drivers.py").write_text(DRIVERS)
    (site / "fake_dependent.py").write_text("import there_is_no_such_module\n")
    for package, entries in (
        ("alpha", ENTRY_POINTS),
        ("beta", "[imagestore.drivers]\ntwice = fake_drivers:Fake\nfake = fake_drivers:Fake\n"),
    ):
        info = site / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(entries)
    sys.path.insert(0, str(site))
    yield
    sys.path.remove(str(site))
    sys.modules.pop("fake_drivers", None)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "imagestore.conf") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def settings_of(store: Store) -> Any:
    return store._template.settings


GOOD = """\
    [DEFAULT]
    enabled_backends = fast:fake, Slow:memory
    [imagestore]
    default_backend = Slow
    memory = 32MiB
    memory_total = 1 gb
    workers = 4
    max_transfers = 9
    max_size = 2TiB
    retry_attempts = 2
    timeout_stall = 7.5
    [fast]
    description = the fast one
    weight = 10
    secret_key = hunter2
    count = 4
    fast = yes
    hosts = a, b
    proxies = http:h:3128,https:i
    paths = one
    paths = two
    root = /data
    [unrelated]
    nobody = looks
    """


def test_a_file_with_everything(write: Write) -> None:
    with config.load_stores(write(GOOD)) as stores:
        assert list(stores) == ["fast", "Slow"]
        assert stores.default.name == "Slow"
        fast = stores["fast"]
        assert (fast.name, fast.driver_name, fast.weight, fast.description) == ("fast", "fake", 10, "the fast one")
        options = settings_of(fast)
        assert (options.secret_key, options.count, options.fast) == ("hunter2", 4, True)
        assert options.hosts == ["a", "b"]
        assert options.proxies == {"http": "h:3128", "https": "i"}
        assert options.paths == ["one", "two"]
        assert options.bucket == "the fast one/bucket"
        assert options.pin is None
        driver = fast._template
        assert driver.store == "fast"
        assert driver.limits == Limits(
            memory=32 * 2**20, memory_total=10**9, workers=4, max_transfers=9, max_size=2 * 2**40
        )
        assert driver.timeouts == Timeouts(stall=7.5)
        assert fast._retry == Retry(attempts=2)
        assert stores["Slow"].weight == 0
        assert stores["Slow"]._engine is fast._engine
        assert config.check([write(GOOD)]) == []


def test_arguments_win_over_the_file(write: Write) -> None:
    limits, timeouts, retry = Limits(workers=2), Timeouts(connect=1), Retry(first=9)
    stores = config.load_stores(write(GOOD), limits=limits, timeouts=timeouts, retry=retry)
    driver = stores["fast"]._template
    assert (driver.limits, driver.timeouts, stores["fast"]._retry) == (limits, timeouts, retry)


def test_no_general_options_give_the_defaults_of_the_models(write: Write) -> None:
    stores = config.load_stores(write("[DEFAULT]\nenabled_backends = m:memory\n"))
    driver = stores["m"]._template
    assert (driver.limits, driver.timeouts, stores["m"]._retry) == (Limits(), Timeouts(), Retry())
    assert stores.default.name == "m"


def test_later_files_and_folders_win(write: Write, tmp_path: Path) -> None:
    first = write("[DEFAULT]\nenabled_backends = a:fake\n[a]\nsecret_key = 1\ncount = 1\npaths = x\n")
    (tmp_path / "conf.d").mkdir()
    write("[a]\ncount = 2\nroot = /r\n", "conf.d/10.conf")
    write("[a]\ncount = 3\npaths = y\n", "conf.d/20.conf")
    write("not a configuration", "conf.d/notes.txt")
    options = settings_of(config.load_stores(first, tmp_path / "conf.d")["a"])
    assert (options.count, options.root, options.paths) == (3, "/r", ["x", "y"])


def test_the_environment_wins(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_FAST__SECRET_KEY", "from outside")
    assert settings_of(config.load_stores(write(GOOD))["fast"]).secret_key == "from outside"
    monkeypatch.setenv("OS_FAST__PATHS", "one")
    with pytest.raises(InvalidOption, match=r"\[fast\] option paths takes several values"):
        config.load_stores(write(GOOD))


def test_without_any_file(monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IMAGESTORE_CONFIG", raising=False)
    with pytest.raises(ConfigurationError, match=r"there is no configuration file.*set IMAGESTORE_CONFIG"):
        config.load_stores()
    there = tmp_path / ".config/imagestore/imagestore.conf"
    there.parent.mkdir(parents=True)
    there.write_text("[DEFAULT]\nenabled_backends = mine:memory\n")
    assert list(config.load_stores()) == ["mine"]
    monkeypatch.setenv("IMAGESTORE_CONFIG", str(write(GOOD)))
    assert list(config.load_stores()) == ["fast", "Slow"]


def test_the_global_configuration_is_left_alone(write: Write) -> None:
    before = (set(cfg.CONF), list(cfg.CONF._groups))
    config.load_stores(write(GOOD))
    config.open_store("fake", secret_key="x")
    assert (set(cfg.CONF), list(cfg.CONF._groups)) == before


def faults(write: Write, text: str, **files: str) -> list[str]:
    path = write(text)
    found = [str(problem) for problem in config.check([path])]
    if found:
        with pytest.raises(ConfigurationError) as raised:
            config.load_stores(path)
        assert all(fault in str(raised.value) for fault in found)
    return [fault.removeprefix(str(path)).removeprefix(":") for fault in found]


def fault(write: Write, text: str) -> str:
    (only,) = faults(write, text)
    return only


FAKE = "[DEFAULT]\nenabled_backends = a:fake\n[a]\nsecret_key = k\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FAKE + "coutn = 3\n", "5: [a] option coutn is unknown; did you mean count?"),
        (FAKE + "x-y = 3\n", "5: [a] option x-y is unknown"),
        (FAKE + "rbd_store_pool = p\n", "5: [a] option rbd_store_pool is unknown; it belongs to the type rbd"),
        (FAKE + "count = many\n", "5: [a] option count must be an integer value not below 1 not above 9"),
        (FAKE + "count = 10\n", "5: [a] option count must be an integer value not below 1 not above 9"),
        (FAKE + "fast = maybe\n", "5: [a] option fast must be a boolean value"),
        (FAKE + "weight = w\n", "5: [a] option weight must be an integer value"),
        (FAKE + "grade = hunter2\n", "5: [a] option grade must be one of a, b"),
        ("[DEFAULT]\nenabled_backends = a:fake\n[a]\nsecret_key =\n", "4: [a] option secret_key is missing: The key"),
        ("[DEFAULT]\nenabled_backends = a:fake\n", " [a] option secret_key is missing: The key"),
        (FAKE + "root = $nowhere/x\n", "5: [a] option root refers with $ to an option that is not read here"),
        (FAKE + "root = ${no.where}\n", "5: [a] option root refers with $"),
        (FAKE + "root = $root\n", "5: [a] option root refers with $"),
        (FAKE + "[imagestore]\nworker = 3\n", "6: [imagestore] option worker is unknown; did you mean workers?"),
        (FAKE + "[imagestore]\nworkers = 0\n", "6: [imagestore] option workers must be an integer value not below 1"),
        (FAKE + "[imagestore]\nmemory = 5 parsec\n", "6: [imagestore] option memory must be a size such as 512MiB"),
        (FAKE + "[imagestore]\nmemory = 0\n", "6: [imagestore] option memory must be a size"),
        (FAKE + "[imagestore]\nretry_total = nan\n", "6: [imagestore] option retry_total must be a finite number"),
        (FAKE + "[imagestore]\ndefault_backend = b\n", "6: [imagestore] option default_backend names no store"),
        (FAKE + "[glance_store]\ndefault_backend = b\n", "6: [glance_store] option default_backend names no store"),
        (
            FAKE + "[glance_store]\ndefault_backend = b\n[imagestore]\ndefault_backend = a\n",
            "6: [glance_store] option default_backend differs from that of [imagestore]",
        ),
        ("[DEFAULT]\n", " [DEFAULT] option enabled_backends names no store"),
        ("[DEFAULT]\nenabled_backends =\n", "2: [DEFAULT] option enabled_backends names no store"),
        ("[DEFAULT]\nenabled_backends = fake\n", "2: [DEFAULT] option enabled_backends has the entry 'fake'"),
        ("[DEFAULT]\nenabled_backends = :memory\n", "2: [DEFAULT] option enabled_backends has the id ''"),
        ("[DEFAULT]\nenabled_backends = a b:memory\n", "2: [DEFAULT] option enabled_backends has the id 'a b'"),
        ("[DEFAULT]\nenabled_backends = m:\n", "2: [DEFAULT] option enabled_backends has no type"),
        ("[DEFAULT]\nenabled_backends = m:memory,,n:memory\n", "2: [DEFAULT] option enabled_backends has an empty"),
        ("[DEFAULT]\nenabled_backends = m:memory,M:file\n", "2: [DEFAULT] option enabled_backends has the id 'M'"),
        ("[DEFAULT]\nenabled_backends = imagestore:memory\n", "2: [DEFAULT] option enabled_backends has the id"),
        ("[DEFAULT]\nenabled_backends = x:fakke\n", "2: no driver of the type 'fakke' is installed; did you mean fake"),
        ("[DEFAULT]\nenabled_backends = x:twice\n", "2: the driver type 'twice' is claimed by alpha 1.2 and beta 1.2"),
        ("[DEFAULT]\nnonsense\n", "2: No ':' or '=' found in assignment"),
        ("stray = 1\n[DEFAULT]\n", "1: an option stands before the first [section]"),
        (FAKE + "root = no\n", " [a]: option root: no with ***"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_place(write: Write, text: str, expected: str) -> None:
    assert fault(write, text).startswith(expected)


def test_every_fault_is_told_at_once(write: Write) -> None:
    assert [line.split(" ")[0] for line in faults(write, """\
        [DEFAULT]
        enabled_backends = a:fake, b:fake, c:nope, d
        [imagestore]
        default_backend = zz
        wrong = 1
        [a]
        wrong = 1
        count = x
        wrong = 2
        [b]
        secret_key = k
        filesystem_store_datadir = /x
        """)] == ["5:", "2:", "4:", "2:", "7:", "9:", "", "8:", "12:"]  # fmt: skip


def test_a_fault_that_concerns_several_stores_is_told_once(write: Write) -> None:
    text = "[DEFAULT]\nenabled_backends = o:oldswift, p:oldswift\n[backend_defaults]\nsegment_size = x\n"
    assert fault(write, text).startswith("4: [backend_defaults] option segment_size must be")


def test_capitals_in_names_of_sections(write: Write) -> None:
    assert fault(write, "[DEFAULT]\nenabled_backends = Fast:fake\n[FAST]\nsecret_key = k\nx = 1\n").startswith(
        "5: [Fast]"
    )


def test_a_misspelt_section_is_suspected(write: Write) -> None:
    assert "(there is no section [local]; did you mean loacl?)" in fault(
        write, "[DEFAULT]\nenabled_backends = local:fake\n[loacl]\nsecret_key = k\n"
    )


def test_a_section_may_be_absent_if_nothing_in_it_is_required(write: Write) -> None:
    assert list(config.load_stores(write("[DEFAULT]\nenabled_backends = m:memory,\n    n:memory,\n"))) == ["m", "n"]


def test_unreadable_files(tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing.conf", tmp_path / "binary.conf"
    binary.write_bytes(b"[DEFAULT]\nenabled_backends = a:\xff\xfe\n")
    assert [str(problem) for problem in config.check([missing, binary])] == [
        f"{missing}: can't be read: No such file or directory",
        f"{binary}: is not text in the encoding of the locale",
    ]


def test_kinds_of_errors(write: Write) -> None:
    def kind(text: str) -> type[BaseException]:
        with pytest.raises(ConfigurationError) as raised:
            config.load_stores(write(text))
        return raised.type

    assert kind(FAKE + "x = 1\n") is InvalidOption
    assert kind("[DEFAULT]\nenabled_backends = x:nope\n") is DriverNotFound
    assert kind("[DEFAULT]\nenabled_backends = x:nodep\n") is MissingDependency
    assert kind("[DEFAULT]\nenabled_backends = x:nope, m:nodep\n") is ConfigurationError
    assert kind("[DEFAULT\n") is ConfigurationError


def test_line_numbers_count_continued_and_commented_lines(write: Write) -> None:
    path = write(
        "# c\n[DEFAULT]\n\nenabled_backends = a:fake,\n  b:fake\n[a]\nsecret_key = k\n ey\n"
        "# c\nx = 1\n y\n\nz=\n[b]\ny = 1"
    )
    assert {(p.option, p.line) for p in config.check([path])} == {("x", 10), ("z", 13), ("y", 15), ("secret_key", None)}


def test_the_old_form_is_told_what_to_write(write: Write) -> None:
    told = fault(
        write,
        "[glance_store]\nstores = file,http\nfilesystem_store_datadir = /x\nrbd_store_pool = p\n",
    )
    assert "enabled_backends = my_file:file, my_rbd:rbd in [DEFAULT]" in told
    assert "from [glance_store] to [my_file], [my_rbd]" in told


# Drivers


def test_loading_drivers() -> None:
    assert config.load_driver("file") is config.load_driver("filesystem")
    assert config.load_driver("fake").name == "fake"
    drivers = config.available_drivers()
    assert drivers["twice"] == "alpha 1.2, beta 1.2"
    assert {"file", "filesystem", "memory", "fake"} <= set(drivers)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("fakee", DriverNotFound, "did you mean fake"),
        ("twice", DriverNotFound, "alpha 1.2 and beta 1.2"),
        ("future", DriverNotFound, "version 99 of the driver contract"),
        ("notadriver", DriverNotFound, "not a subclass"),
        ("lost", DriverNotFound, r"can't be loaded \(AttributeError\)"),
        ("nodep", MissingDependency, "there_is_no_such_module"),
    ],
)
def test_drivers_that_cannot_be_had(name: str, error: type[StoreError], text: str) -> None:
    with pytest.raises(error, match=text):
        config.load_driver(name)
    with pytest.raises(error, match=text):
        config.open_store(name)


# Keyword arguments


def test_open_store(tmp_path: Path) -> None:
    store = config.open_store(
        "fake",
        "mine",
        secret_key="$a$$b",
        weight="7",
        count="2",
        hosts="a,b",
        paths=tmp_path,
        proxies={"a": "b"},
        pin=None,
    )
    options = settings_of(store)
    assert (store.name, store.weight, store.description, store._template.store) == ("mine", 7, "", "mine")
    assert (options.secret_key, options.count, options.hosts) == ("$a$$b", 2, ["a", "b"])
    assert (options.paths, options.proxies, options.pin) == ([str(tmp_path)], {"a": "b"}, None)
    assert config.open_store("fake", secret_key="x").name == "fake"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "option secret_key is missing"),
        ({"secret_key": "k", "coutn": 1}, "option coutn is unknown; did you mean count"),
        ({"secret_key": "k", "count": "hunter2"}, "option count must be an integer"),
        ({"secret_key": "k", "count": 0}, "option count must be an integer value not below 1"),
        ({"secret_key": ""}, "option secret_key is missing"),
    ],
)
def test_open_store_checks_like_a_file(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=rf"open_store\('fake'\): {text}") as raised:
        config.open_store("fake", **options)
    assert "hunter2" not in str(raised.value)


# Old names


# Dumped from glance_store 5.7.0: the options of each driver, and those of every store.
GLANCE = {
    "file": """
        filesystem_store_datadir filesystem_store_datadirs filesystem_store_metadata_file filesystem_store_file_perm
        filesystem_store_chunk_size filesystem_thin_provisioning filesystem_store_timeout
        filesystem_store_thread_pool_size filesystem_store_threadpool_threshold""",
    "http": "https_ca_certificates_file https_insecure http_proxy_information",
    "swift": """
        swift_store_auth_insecure swift_store_cacert swift_store_region swift_store_endpoint swift_store_endpoint_type
        swift_store_service_type swift_store_container swift_store_large_object_size
        swift_store_large_object_chunk_size swift_store_create_container_on_put swift_store_multi_tenant
        swift_store_multiple_containers_seed swift_store_admin_tenants swift_store_ssl_compression
        swift_store_retry_get_count swift_store_expire_soon_interval swift_store_use_trusts swift_buffer_on_upload
        default_swift_reference swift_store_auth_version swift_store_auth_address swift_store_user swift_store_key
        swift_store_application_credential_id swift_store_application_credential_secret swift_store_project_name
        swift_store_project_id swift_store_config_file swift_upload_buffer_dir""",
    "rbd": """
        rbd_store_chunk_size rbd_store_pool rbd_store_user rbd_store_ceph_conf rados_connect_timeout
        rbd_thin_provisioning""",
    "cinder": """
        cinder_catalog_info cinder_endpoint_template cinder_os_region_name os_region_name cinder_ca_certificates_file
        cinder_http_retries cinder_state_transition_timeout cinder_api_insecure cinder_store_auth_address
        cinder_store_user_name cinder_store_user_domain_name cinder_store_password
        cinder_store_application_credential_id cinder_store_application_credential_secret cinder_store_project_name
        cinder_store_project_domain_name rootwrap_config cinder_volume_type cinder_enforce_multipath
        cinder_use_multipath cinder_mount_point_base cinder_do_extend_attached cinder_attachment_retry_attempts""",
    "s3": """
        s3_store_host s3_store_region_name s3_store_access_key s3_store_secret_key s3_store_bucket
        s3_store_create_bucket_on_put s3_store_bucket_url_format s3_store_large_object_size
        s3_store_large_object_chunk_size s3_store_thread_pools s3_store_cacert
        s3_store_enable_data_integrity_protection s3_store_request_checksum_calculation
        s3_store_response_checksum_validation""",
    "vmware": """
        vmware_server_host vmware_server_username vmware_server_password vmware_api_retry_count
        vmware_task_poll_interval vmware_store_image_dir vmware_insecure vmware_api_insecure vmware_ca_file
        vmware_datastores""",
}  # fmt: skip
COMMON = ("store_description", "weight")
OURS = ("file", "http", "swift", "rbd", "cinder", "s3", "vmware", "sheepdog", "gridfs", "memory")


@pytest.mark.parametrize("kind", sorted(GLANCE))
def test_every_glance_option_has_a_fate(kind: str) -> None:
    assert {old.name for old in old_options(kind)} | {"weight"} == {*GLANCE[kind].split(), *COMMON}


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind in config.available_drivers()])
def test_old_options_lead_somewhere(kind: str) -> None:
    names = {option.dest for option in config.load_driver(kind).options} | {"description", "weight"}
    for old in old_options(kind):
        assert old.to in names if old.fate == "kept" else old.reason, old.name


def test_old_options_are_complete_entries() -> None:
    names = [old.name for olds in OLD_OPTIONS.values() for old in olds]
    assert len(names) == len(set(names))
    for olds in OLD_OPTIONS.values():
        for old in olds:
            assert (old.fate == "kept") == bool(old.to), old.name
            assert (old.fate != "kept") == bool(old.reason), old.name


GLANCE_FILE = """\
    [DEFAULT]
    enabled_backends = fast:file, many:file
    debug = true
    [glance_store]
    default_backend = many
    [backend_defaults]
    filesystem_store_file_perm = 600
    filesystem_thin_provisioning = true
    swift_store_auth_insecure = true
    count = 3
    [database]
    connection = mysql://root:hunter2@db/glance
    [fast]
    store_description = old words
    weight = 3
    filesystem_store_datadir = {path}
    filesystem_store_file_perm = 0640
    filesystem_thin_provisioning = false
    filesystem_store_chunk_size = 4096
    filesystem_store_timeout = 5
    filesystem_store_thread_pool_size = 5
    filesystem_store_threadpool_threshold = 75
    filesystem_store_metadata_file = /etc/glance/meta.json
    [many]
    filesystem_store_datadir =
    filesystem_store_datadirs = {path}/a:10
    filesystem_store_datadirs = {path}/b
    """


def test_a_glance_file_loads(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(GLANCE_FILE.format(path=tmp_path))
    assert config.check([path]) == []
    told = [record.getMessage() for record in caplog.records]
    caplog.clear()
    stores = config.load_stores(path)
    assert stores.default.name == "many"
    fast, many = settings_of(stores["fast"]), settings_of(stores["many"])
    assert (stores["fast"].description, stores["fast"].weight) == ("old words", 3)
    assert (fast.datadir, fast.file_mode, fast.sparse) == (str(tmp_path), "0640", False)
    assert (many.datadirs, many.file_mode, many.sparse) == ([f"{tmp_path}/a:10", f"{tmp_path}/b"], "0600", True)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 5
    assert said == told
    assert all("is accepted and ignored: " in line and "[fast] option filesystem_store_" in line for line in said)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("0", "file_mode", "0640"),
        ("640", "file_mode", "0640"),
        ("0640", "file_mode", "0640"),
        ("", "file_mode", "0640"),
        ("600", "file_mode", "0600"),
    ],
)
def test_file_permissions(old: str, new: str, value: str, tmp_path: Path) -> None:
    store = config.open_store("file", filesystem_store_datadir=tmp_path, filesystem_store_file_perm=old)
    assert settings_of(store).file_mode == value


def test_units_are_converted(write: Write) -> None:
    path = write("[DEFAULT]\nenabled_backends = o:oldswift\n[o]\nswift_store_large_object_chunk_size = 10\n")
    assert settings_of(config.load_stores(path)["o"]).segment_size == 10_240_000


SWIFT = "[DEFAULT]\nenabled_backends = o:oldswift\n[o]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("swift_store_auth_insecure = true\n", "4: [o] option swift_store_auth_insecure is refused: certificates are"),
        (
            "swift_store_large_object_chunk_size = x\n",
            "4: [o] option swift_store_large_object_chunk_size must be a whole",
        ),
        (
            "swift_store_large_object_chunk_size = 0\n",
            "4: [o] option swift_store_large_object_chunk_size must be an int",
        ),
        ("key = a\nswift_store_key = a\n", "4: [o] option key is given a second time, by its old name swift_store_key"),
        (
            "[backend_defaults]\nswift_store_auth_insecure = yes\n",
            "5: [backend_defaults] option swift_store_auth_insecure",
        ),
        ("[backend_defaults]\nsegment_size = x\n", "5: [backend_defaults] option segment_size must be an integer"),
    ],
)
def test_faults_in_old_options(write: Write, text: str, expected: str) -> None:
    assert fault(write, SWIFT + text).startswith(expected)


def test_harmless_values_of_refused_options_and_empty_old_options(write: Write) -> None:
    options = "swift_store_auth_insecure = False\nswift_store_cacert =\ncacert = /ca\nswift_store_key = k\n"
    read = settings_of(config.load_stores(write(SWIFT + options))["o"])
    assert (read.cacert, read.key) == ("/ca", "k")


def test_backend_defaults_serve_types_that_disagree(write: Write) -> None:
    stores = config.load_stores(
        write("""\
        [DEFAULT]
        enabled_backends = a:fake, b:other, c:fake
        [backend_defaults]
        count = 1
        secret_key = k
        paths = x
        paths = y
        [c]
        count = 5
        paths = z
        """)
    )
    assert [settings_of(stores[name]).count for name in "abc"] == [1, True, 5]
    assert [settings_of(stores[name]).paths for name in "ac"] == [["x", "y"], ["z"]]


# A host's ConfigOpts


def host(*files: Path) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([f"--config-file={file}" for file in files], project="host", default_config_files=[], default_config_dirs=[])
    return conf


def test_a_host_configuration(write: Write, tmp_path: Path) -> None:
    conf = host(write(GLANCE_FILE.format(path=tmp_path)))
    # What Glance and its library register for themselves.
    conf.register_opt(cfg.DictOpt("enabled_backends"))
    conf.register_opt(cfg.StrOpt("default_backend"), "glance_store")
    conf.register_opt(cfg.StrOpt("filesystem_store_datadir", default="/var/lib/glance/images"), "fast")
    conf.register_opt(cfg.StrOpt("filesystem_store_datadir", default="/var/lib/glance/images"), "many")
    conf.register_opt(cfg.IntOpt("filesystem_store_file_perm", default=0), "fast")
    conf.register_opt(cfg.BoolOpt("filesystem_thin_provisioning", default=True), "fast")
    for _ in range(2):
        stores = config.load_stores(conf=conf)
        assert list(stores) == ["fast", "many"]
        fast = settings_of(stores["fast"])
        assert (fast.datadir, fast.file_mode, fast.sparse) == (str(tmp_path), "0640", False)
        assert settings_of(stores["many"]).datadirs == [f"{tmp_path}/a:10", f"{tmp_path}/b"]


def test_a_host_configuration_is_checked_too(write: Write) -> None:
    path = write(FAKE + "coutn = 1\n")
    with pytest.raises(InvalidOption, match=r":5: \[a\] option coutn is unknown"):
        config.load_stores(conf=host(path))
    with pytest.raises(ConfigurationError, match="not both"):
        config.load_stores(path, conf=host(path))


def test_a_host_may_set_options_itself() -> None:
    conf = cfg.ConfigOpts()
    conf.register_opt(cfg.StrOpt("enabled_backends"))
    conf.register_opt(cfg.StrOpt("secret_key"), "a")
    conf.set_override("enabled_backends", "a:fake")
    conf.set_override("secret_key", "k", "a")
    assert settings_of(config.load_stores(conf=conf)["a"]).secret_key == "k"


# Samples


def test_a_sample_configuration_is_generated(tmp_path: Path) -> None:
    target = tmp_path / "sample.conf"
    generator.main(["--namespace", "imagestore", "--output-file", str(target)])
    sample = target.read_text()
    for line in ("[imagestore]", "[store_file]", "[store_memory]", "[store_fake]", "#memory = 64MiB", "#workers = 16"):
        assert line in sample.splitlines()
    assert "[store_filesystem]" not in sample


def test_the_sample_is_a_good_configuration_once_it_enables_stores(tmp_path: Path, write: Write) -> None:
    target = tmp_path / "sample.conf"
    generator.main(["--namespace", "imagestore", "--output-file", str(target)])
    sample = target.read_text().replace("#enabled_backends = local:file", "enabled_backends = store_memory:memory")
    lines = [
        line[1:] if line.startswith(("#memory =", "#retry_first =", "#capacity =")) else line
        for line in sample.splitlines()
    ]
    lines = [line for line in lines if "<None>" not in line]
    assert config.check([write("\n".join(lines))]) == []


# Parsers

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@given(
    pairs=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6, unique_by=lambda pair: pair[0].lower()),
    glue=st.sampled_from([",", ", ", " ,", ",\n", "\n", ",\n  "]),
    end=st.sampled_from(["", ",", "\n", ",\n"]),
)
def test_enabled_backends_round_trip(pairs: list[tuple[str, str]], glue: str, end: str) -> None:
    pairs = [pair for pair in pairs if pair[0].lower() not in config._RESERVED]
    text = glue.join(f"{name}:{kind}" for name, kind in pairs)
    assert config.parse_backends(text + end if pairs else "x:y") == (pairs or [("x", "y")], [])


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(":, \n\"'"))))
def test_enabled_backends_never_fails_and_never_loses_an_entry(text: str) -> None:
    pairs, told = config.parse_backends(text)
    assert all(config._NAME.fullmatch(part) for pair in pairs for part in pair)
    assert len({name.lower() for name, _ in pairs}) == len(pairs)
    written = [entry for entry in text.replace("\n", ",").split(",") if entry.strip()]
    assert len(pairs) + len(told) >= len(written)


@given(count=st.integers(1, 10**6), unit=st.sampled_from(["", " KiB", "MiB", "GB", " tib", "b"]))
def test_sizes_round_trip(count: int, unit: str) -> None:
    size = config.Size()
    assert size(size._formatter(size(f"{count}{unit}"))) == size(f"{count}{unit}")
    assert size("64MiB") == 64 * 2**20


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "MiB", "1 MiB MiB", "1e3", "٣ x"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        config.Size()(text)


# Secrets

SECRETS = st.text(alphabet=string.ascii_letters + string.digits + "$!%&/@:=#;[]{}'\"\\~^", min_size=6, max_size=24).map(
    lambda text: f"s3cr{text}3t"
)
PLACES = (
    "secret_key = k\npin = {}",
    "secret_key = k\ngrade = {}",
    "secret_key = k\nsecret_kye = {}",
    "secret_key = k\ncount = {}",
    "secret_key = {}\ncount = $secret_key",
    "secret_key = {}\nfast = ${{a.secret_key}}",
    "secret_key = {}\nroot = boom",
    "secret_key = {}\nroot = no",
    "secret_key = $nowhere{}\nroot = no",
    "secret_key = k\nx = 1\n[c]\nswift_store_large_object_chunk_size = {}",
    "secret_key = k\n[backend_defaults]\npin = {}",
    "secret_key = k\nx = 1\n[c]\nswift_store_key = {}\nkey = {}",
    "secret_key = k\n {}\nx = 1",
    "secret_key = k\n[s3cr {}",
    "secret_key = k\n= {}",
    "secret_key = k\n[imagestore]\nmemory = {}",
    "secret_key = k\n[imagestore]\nworkers = {}",
)  # fmt: skip


def everything_said(error: BaseException) -> str:
    parts = ["".join(traceback.format_exception(error))]
    seen: BaseException | None = error
    while seen is not None:
        parts += [str(seen), repr(seen), repr(seen.args)]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(parts)


@settings(max_examples=150)
@given(secret=SECRETS, place=st.sampled_from(PLACES))
def test_no_error_and_no_log_line_tells_a_secret(
    tmp_path_factory: pytest.TempPathFactory, secret: str, place: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "secret.conf"
    path.write_text(f"[DEFAULT]\nenabled_backends = a:fake, c:oldswift\n[a]\n{place.format(secret, secret)}\n")
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]  # shortest spy
    logging.getLogger().addHandler(handler)
    try:
        told = "\n".join(f"{problem}\n{problem!r}" for problem in config.check([path]))
        assert told
        with pytest.raises(ConfigurationError) as raised:
            config.load_stores(path)
    finally:
        logging.getLogger().removeHandler(handler)
    for text in (told, everything_said(raised.value), *records):
        assert secret not in text
        assert "s3cr" not in text.replace(str(path), "")


@given(secret=SECRETS, option=st.sampled_from(["pin", "grade", "count", "secret_kye"]))
def test_no_error_of_open_store_tells_a_secret(secret: str, option: str) -> None:
    options: dict[str, Any] = {option: secret, "secret_key": secret}
    with pytest.raises(InvalidOption) as raised:
        config.open_store("fake", **options)
    assert "s3cr" not in everything_said(raised.value)
