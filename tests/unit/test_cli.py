"""The command line: what it prints, what it exits with, and what it leaves behind when it is broken off."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result

from imagestore import Location, Store, StoredImage, Stores, errors
from imagestore._commands import EXIT_CODES, cli
from imagestore._commands.options import to_age, to_bytes
from imagestore._commands.output import safe
from imagestore._commands.session import Session
from imagestore._commands.signals import Pipe, cancelling

DATA = os.urandom(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
COMMANDS = (
    *("add", "check-config", "collect", "copy", "delete", "demo"),
    *("get", "inspect", "list", "stat", "stores", "uploads", "verify"),
)


class Cli:
    """Runs commands in a directory with a configuration of two stores."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.local = directory / "local"
        self.config = directory / "imagestore.conf"
        self.image = directory / "image"
        self.image.write_bytes(DATA)
        self.config.write_text(
            "[DEFAULT]\n"
            "enabled_backends = local:file, other:file\n"
            "[imagestore]\n"
            "default_backend = local\n"
            f"[local]\ndatadir = {self.local}\nstaging = named\ndescription = the first\n"
            f"[other]\ndatadir = {directory}/other\nweight = 7\n"
        )

    def __call__(self, *arguments: str, input: bytes | None = None, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, arguments, input=input, prog_name="imagestore")
        assert result.exit_code == code, (result.stdout_bytes, result.stderr_bytes, result.exception)
        return result

    def json(self, *arguments: str, input: bytes | None = None, code: int = 0) -> list[Any]:
        return _documents(self(*arguments, "--json", input=input, code=code).stdout)

    def fault(self, *arguments: str, code: int) -> Any:
        (error,) = _documents(self(*arguments, "--json", code=code).stderr)
        assert error["exit_code"] == code
        return error

    def start(
        self, *arguments: str, program: tuple[str, ...] = ("-m", "imagestore"), **settings: Any
    ) -> subprocess.Popen[bytes]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=self.directory,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "IMAGESTORE_CONFIG": str(self.config)},
            **pipes | settings,
        )


def _documents(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _fields(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition("\t") for line in text.splitlines())}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGESTORE_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Cli(tmp_path)


# Images


def test_an_image_goes_in_and_out(run: Cli) -> None:
    added = _fields(run("add", "one", "image", "--digest", "md5", "--digest", "sha256").stdout)
    assert added == {
        "location": f"file://{run.local}/one",
        "size": "300000",
        "stored": "300000",
        "md5": hashlib.md5(DATA).hexdigest(),
        "sha256": SHA256,
    }
    assert run("list").stdout.split("\t")[:2] == ["one", "300000"]
    assert _fields(run("stat", "one").stdout)["size"] == "300000"
    assert _fields(run("verify", "one").stdout)["sha256"] == SHA256
    run("get", "one", "out")
    assert Path("out").read_bytes() == DATA
    assert run("delete", "one").stdout == f"deleted\tfile://{run.local}/one\n"
    assert run("list").stdout == ""


def test_results_as_json(run: Cli) -> None:
    (added,) = run.json("add", "one", "image")
    location = f"file://{run.local}/one"
    assert added.pop("seconds") >= 0
    assert added.pop("version")
    assert added == {
        "image_id": "one",
        "store": "local",
        "location": location,
        "size": 300_000,
        "stored": 300_000,
        "digests": {"sha256": SHA256},
    }
    (listed,) = run.json("list")
    assert (listed["image_id"], listed["size"], listed["location"]) == ("one", 300_000, location)
    (stat,) = run.json("stat", "one")
    assert (stat["image_id"], stat["size"], len(stat["token"])) == ("one", 300_000, 32)
    (verified,) = run.json("verify", "one", "--expect", f"sha256:{SHA256}", "--digest", "md5")
    assert verified["digests"] == {"md5": hashlib.md5(DATA).hexdigest(), "sha256": SHA256}
    assert verified["compared"] == ["sha256"]
    (got,) = run.json("get", "one", "out", "--expect", f"sha256:{SHA256}")
    assert (got["file"], got["size"], got["digests"]) == ("out", 300_000, {"sha256": SHA256})
    assert run.json("delete", "one") == [{"image": "one", "store": "local", "location": location, "deleted": True}]


def test_a_location_finds_its_store_and_an_id_is_of_the_default_one(run: Cli) -> None:
    run("--store", "other", "add", "one", "image")
    location = f"file://{run.directory}/other/one"
    assert run.json("stat", location)[0]["store"] == "other"
    assert run.json("stat", "one", "--store", "other")[0]["location"] == location
    assert run.fault("stat", "one", code=4)["error"] == "NotFound"
    assert run.fault("stat", location, "--store", "local", code=2)["error"] == "InvalidLocation"
    assert run.fault("stat", "file:///etc/passwd", code=2)["error"] == "InvalidLocation"


def test_standard_input_and_output(run: Cli) -> None:
    assert _fields(run("add", "one", "-", input=DATA).stdout)["sha256"] == SHA256
    assert run("get", "one", "-").stdout_bytes == DATA
    assert run("get", "one", "-", "--start", "10", "--stop", "1KiB").stdout_bytes == DATA[10:1024]
    result = run("get", "one", "-", "--json")
    assert result.stdout_bytes == DATA
    assert json.loads(result.stderr)["size"] == len(DATA)


def test_a_range_into_a_file(run: Cli) -> None:
    run("add", "one", "image")
    run("get", "one", "part", "--start", "100", "--stop", "200kB")
    assert Path("part").read_bytes() == DATA[100:200_000]
    assert run.fault("get", "one", "part", "--start", "1", code=5)["error"] == "AlreadyExists"
    run("get", "one", "part", "--start", "299999", "--force")
    assert Path("part").read_bytes() == DATA[299_999:]
    run("get", "one", "part2", "--start", "300001", code=2)
    run("get", "one", "part2", "--start", "1", "--expect", f"sha256:{SHA256}", code=2)
    assert not Path("part2").exists()


def test_a_file_is_replaced_only_if_forced_and_only_if_it_is_one(run: Cli) -> None:
    run("add", "one", "image")
    out = Path("out")
    out.write_bytes(b"mine")
    assert "--force" in run.fault("get", "one", "out", code=5)["message"]
    assert out.read_bytes() == b"mine"
    run("get", "one", "out", "--force", "--expect", f"sha256:{'0' * 64}", code=9)
    assert out.read_bytes() == b"mine"
    run("get", "one", "out", "--force")
    assert out.read_bytes() == DATA
    os.mkfifo("fifo")
    for target in ("fifo", ".", "/dev/null"):
        run("get", "one", target, "--force", code=2)
    assert Path("/dev/null").is_char_device()


def test_what_is_not_as_expected_is_refused(run: Cli) -> None:
    assert run.fault("add", "one", "image", "--expect", f"sha256:{'0' * 64}", code=9)["error"] == "DigestMismatch"
    assert run.fault("add", "one", "image", "--size", "299999", code=9)["error"] == "SizeMismatch"
    assert list(run.local.iterdir()) == []
    run("add", "one", "image", "--expect", f"sha256:{SHA256}", "--size", "300000")
    assert run.fault("add", "one", "image", code=5)["error"] == "AlreadyExists"
    run("verify", "one", "--expect", f"md5:{'0' * 32}", code=9)
    run("get", "one", "-", "--expect", f"md5:{'0' * 32}", code=9)
    run("verify", "one", "--expect", f"md5:{'0' * 32}", "--expect", f"md5:{'1' * 32}", code=2)


def test_metadata_reaches_the_store(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    add, seen = Stores.add, {}

    def spy(stores: Stores, *arguments: Any, **named: Any) -> Any:
        seen.update(named)
        return add(stores, *arguments, **named)

    monkeypatch.setattr(Stores, "add", spy)
    run("add", "one", "image", "--metadata", "os=linux", "--metadata", "note=a=b")
    assert seen["metadata"] == {"os": "linux", "note": "a=b"}


@pytest.mark.parametrize("source", ["nothing-there", ".", "nul\0"])
def test_a_source_that_cant_be_read(run: Cli, source: str) -> None:
    assert run.fault("add", "one", source, code=11)["error"] == "SourceError"


def test_deleting_goes_on_after_a_failure_and_the_first_one_counts(run: Cli) -> None:
    run("add", "one", "image")
    run("add", "two", "image")
    result = run("delete", "one", "gone", "file:///elsewhere", "two", "--json", code=4)
    assert [line["image"] for line in _documents(result.stdout)] == ["one", "two"]
    assert [line["error"] for line in _documents(result.stderr)] == ["NotFound", "InvalidLocation"]


# Several stores


def test_add_to_many(run: Cli) -> None:
    both = run.json("add", "one", "image", "--to", "other", "--to", "local")
    assert [(added["store"], added["digests"]) for added in both] == [
        ("other", {"sha256": SHA256}),
        ("local", {"sha256": SHA256}),
    ]
    lines = run("add", "two", "image", "--to", "local", "--to", "other").stdout.splitlines()
    assert [line for line in lines if line.startswith("store\t")] == ["store\tlocal", "store\tother"]
    assert lines.count(f"sha256\t{SHA256}") == 2
    assert run.json("add", "three", "image", "--to", "other")[0]["store"] == "other"
    assert not (run.local / "three").exists()


def test_add_to_many_tells_which_stand_and_fails_if_one_does_not(run: Cli) -> None:
    run("add", "one", "image", "--to", "other")
    result = run("add", "one", "image", "--to", "other", "--to", "local", "--json", code=5)
    assert [added["store"] for added in _documents(result.stdout)] == ["local"]
    assert [(error["error"], error["store"]) for error in _documents(result.stderr)] == [("AlreadyExists", "other")]
    assert (run.local / "one").read_bytes() == DATA
    result = run("add", "one", "image", "--to", "other", "--to", "local", "--json", code=5)
    assert result.stdout == ""
    assert len(_documents(result.stderr)) == 1


def test_the_stores_to_add_to_are_named_once_and_exist(run: Cli) -> None:
    assert run.fault("add", "one", "image", "--to", "third", code=2)["error"] == "InvalidRequest"
    assert run.fault("add", "one", "image", "--to", "local", "--to", "local", code=2)["error"] == "InvalidRequest"
    assert run.fault("add", "one", "image", "--to", "local", "--store", "other", code=2)["error"] == "UsageError"
    assert not run.local.exists()


def test_copy(run: Cli) -> None:
    run("add", "one", "image")
    (copied,) = run.json("copy", "one", "--to", "other", "--metadata", "os=linux")
    location = f"file://{run.directory}/other/one"
    assert copied.pop("seconds") >= 0
    assert copied.pop("version")
    assert copied == {
        "image_id": "one",
        "store": "other",
        "location": location,
        "size": 300_000,
        "stored": 300_000,
        "digests": {"sha256": SHA256},
        "source": f"file://{run.local}/one",
    }
    run("copy", "one", "--from", "other", "--to", "local", "--id", "two", "--expect", f"sha256:{SHA256}")
    run("copy", location, "--to", "local", "--id", "three")
    assert all((run.local / name).read_bytes() == DATA for name in ("two", "three"))


def test_a_copy_that_is_refused_leaves_nothing(run: Cli) -> None:
    run("add", "one", "image")
    error = run.fault("copy", "one", "--to", "other", "--expect", f"sha256:{'0' * 64}", code=9)
    assert error["error"] == "DigestMismatch"
    assert list((run.directory / "other").iterdir()) == []
    assert run.fault("copy", "one", "--to", "local", code=5)["error"] == "AlreadyExists"
    assert run.fault("copy", "gone", "--to", "other", code=4)["error"] == "NotFound"
    assert "local, other" in run.fault("copy", "one", "--to", "third", code=2)["message"]
    assert run.fault("copy", "one", code=2)["error"] == "MissingParameter"


def test_reading_goes_on_with_another_copy(run: Cli) -> None:
    run("add", "one", "image", "--to", "other")
    gone, good = f"file://{run.local}/one", f"file://{run.directory}/other/one"
    (got,) = run.json("get", gone, "out", "--or", good, "--expect", f"sha256:{SHA256}")
    assert (got["store"], got["location"], got["size"]) == (None, None, 300_000)
    assert Path("out").read_bytes() == DATA
    assert run("get", gone, "-", "--or", good, "--start", "5").stdout_bytes == DATA[5:]
    assert run.fault("get", gone, "none", "--or", f"file://{run.local}/two", code=4)["location"] == gone
    assert run.fault("get", "one", "none", "--or", good, code=2)["error"] == "UsageError"
    assert run.fault("get", gone, "none", "--or", good, "--store", "other", code=2)["error"] == "UsageError"
    assert not Path("none").exists()


# Leftovers


def test_inspect_says_what_it_is(run: Cli) -> None:
    found = _fields(run("inspect", "image").stdout)
    assert found["verdict"] == "accepted"
    assert found["disk format"] == "raw"
    assert found["size"] == "300000"
    (again,) = run.json("inspect", "-", input=DATA)
    assert again["accepted"]
    assert again["disk_format"] == "raw"
    run("add", "one", "image")
    (stored,) = run.json("inspect", f"file://{run.local}/one")
    assert stored == again


def test_inspect_exits_with_1_if_it_would_be_refused(run: Cli) -> None:
    result = run("inspect", "image", "--disk-format", "qcow2", code=1)
    assert _fields(result.stdout)["verdict"] == "refused"
    assert "format.unknown" in result.stdout
    (found,) = run.json("inspect", "image", "--disk-format", "qcow2", code=1)
    assert [finding["code"] for finding in found["findings"]] == ["format.unknown"]
    assert run.fault("inspect", "image", "--disk-format", "qcow9", code=2)["error"] == "InvalidRequest"
    assert run.fault("inspect", "absent", code=11)["error"] == "SourceError"


def test_inspect_keeps_to_the_policy_of_the_configuration(run: Cli) -> None:
    run.config.write_text(run.config.read_text().replace("[imagestore]", "[imagestore]\npolicy_disk_formats = raw"))
    assert run.fault("inspect", "image", "--disk-format", "qcow2", code=2)["error"] == "InvalidRequest"


def test_a_lie_about_the_format_is_refused(run: Cli) -> None:
    assert run.fault("add", "one", "image", "--disk-format", "qcow2", code=10)["error"] == "FormatMismatch"
    assert not list(run.local.iterdir())
    run("add", "one", "image", "--disk-format", "raw", "--container-format", "bare")


@pytest.fixture
def leftover(run: Cli) -> Path:
    """What a killed uploader left behind, untouched for two days."""
    token = "0123456789abcdef" * 2
    run.local.mkdir()
    part = run.local / f".imagestore-{token}.part"
    part.write_bytes(b"x" * 5000)
    old = time.time() - 2 * 86400
    os.utime(part, (old, old))
    return part


def test_leftovers_are_listed_and_collected(run: Cli, leftover: Path) -> None:
    (found,) = run.json("uploads")
    assert found["token"] in leftover.name
    assert found["store"] == "local"
    assert run("collect", "--older-than", "3d").stdout == ""
    (would,) = run.json("collect", "--dry-run")
    assert (would["token"], would["removed"]) == (found["token"], False)
    assert leftover.exists()
    (removed,) = run.json("collect")
    assert (removed["token"], removed["removed"]) == (found["token"], True)
    assert not leftover.exists()
    assert run("uploads").stdout == run("collect", "--older-than", "0").stdout == ""


def test_the_options_of_collect_arrive(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def collect(_: Store, **named: Any) -> list[Any]:
        seen.update(named)
        return []

    monkeypatch.setattr(Store, "collect", collect)
    run("collect")
    assert (seen["older_than"].total_seconds(), seen["include_alive"], seen["dry_run"]) == (86400, False, False)
    run("collect", "--older-than", "30m", "--include-alive", "--dry-run")
    assert (seen["older_than"].total_seconds(), seen["include_alive"], seen["dry_run"]) == (1800, True, True)


# Configuration


def test_where_the_configuration_is_looked_for(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> list[str]:
        return [store["name"] for store in run.json("stores")]

    assert names() == ["local", "other"]
    home = run.directory / "home/.config/imagestore"
    home.mkdir(parents=True)
    run.config.rename(home / "imagestore.conf")
    assert names() == ["local", "other"]
    extra = run.directory / "extra.conf"
    extra.write_text("[DEFAULT]\nenabled_backends = mine:memory\n")
    monkeypatch.setenv("IMAGESTORE_CONFIG", str(extra))
    assert names() == ["mine"]
    second = run.directory / "second.conf"
    second.write_text("[mine]\ndescription = told later\n")
    (store,) = run.json("--config", str(extra), "stores", "--config", str(second))
    assert store["description"] == "told later"


def test_without_any_configuration(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagestore._commands.session.CONFIG_FILES", ("nowhere.conf",))
    assert "IMAGESTORE_CONFIG" in run.fault("list", code=3)["message"]
    assert {"file", "memory"} <= {driver["type"] for driver in run.json("stores", "--types")}


def test_a_store_that_is_not_there(run: Cli) -> None:
    assert "local, other" in run.fault("list", "--store", "third", code=2)["message"]


def test_stores(run: Cli) -> None:
    assert run("stores").stdout == "local\tfile\tyes\t0\tthe first\nother\tfile\tno\t7\t\n"
    connected = run.json("stores", "--connect")
    assert all(store["free"] > 0 for store in connected)
    assert connected[0]["capabilities"]["sparse_unit"] == 4096
    assert {"create", "delete", "list"} <= set(connected[0]["verbs"])
    assert [store["name"] for store in run.json("stores", "--connect", "--store", "other")] == ["other"]


def test_a_store_that_cant_be_opened_does_not_hide_the_others(run: Cli) -> None:
    run.local.write_text("not a directory")
    result = run("stores", "--connect", "--json", code=3)
    broken, good = _documents(result.stdout)
    assert broken["error"]
    assert good["collision"] == "exclusive"
    result = run("check-config", "--connect", "--json", code=1)
    assert [line["store"] for line in _documents(result.stdout)] == ["other"]
    assert _documents(result.stderr)[0]["store"] == "local"


def test_check_config_tells_every_fault(run: Cli) -> None:
    assert run("check-config").stdout == ""
    assert run("check-config", "--connect").stdout == "local\tok\nother\tok\n"
    bad = run.directory / "bad.conf"
    bad.write_text(
        "[DEFAULT]\nenabled_backends = one:file, two:nope\n[one]\ndatadir = /x\nfile_mod = 0640\nfsync = 7\n"
    )
    faults = run.json("check-config", "bad.conf", code=1)
    assert {(fault["section"], fault["option"], fault["line"]) for fault in faults} >= {
        ("one", "file_mod", 5),
        ("one", "fsync", 6),
    }
    assert any(fault["error"] == "DriverNotFound" for fault in faults)
    assert all(fault["file"] == str(bad) for fault in faults)
    lines = run("check-config", "bad.conf", code=1).stdout.splitlines()
    assert len(lines) == len(faults)
    assert any("bad.conf:5" in line and "[one]" in line and "file_mod" in line for line in lines)
    run("check-config", "missing.conf", code=1)
    assert run.fault("list", "--config", "bad.conf", code=3)["error"] == "ConfigurationError"


LOCATIONS = """\
# from the old database

file://{0}/local/one
  file://{0}/other/two\r
s3+https://key:geh eim/@host/bucket/object
swift://container/object?signature=geheim
key:geheim@host
file:///etc/passwd
"""


def test_the_store_of_each_location_of_an_old_database(run: Cli) -> None:
    Path("old").write_text(LOCATIONS.format(run.directory))
    result = run("check-config", "--locations", "old", "--json", code=1)
    *rows, summary = _documents(result.stdout)
    assert [(row["line"], row["store"], row["location"]) for row in rows] == [
        (3, "local", f"file://{run.local}/one"),
        (4, "other", f"file://{run.directory}/other/two"),
        (5, None, "s3+https://host/bucket/object"),
        (6, None, "swift://container/object?signature=***"),
        (7, None, "host"),
        (8, None, "file:///etc/passwd"),
    ]
    assert [row["image_id"] for row in rows[:2]] == ["one", "two"]
    assert all((row["reason"] is None) == (row["store"] is not None) for row in rows)
    assert "not s3+https://" in rows[2]["reason"]
    assert summary == {"locations": 6, "without_store": 4, "stores": {"local": 1, "other": 1}}
    told = run("check-config", "--locations", "-", input=Path("old").read_bytes(), code=1)
    assert told.stdout.startswith(f"3\tlocal\tfile://{run.local}/one\t\n4\tother\t")
    assert told.stderr == "imagestore: 6 locations: 1 in local, 1 in other, 4 without a store\n"
    assert "geh" not in told.output + result.output
    assert not run.local.exists()


def test_locations_that_all_have_a_store(run: Cli) -> None:
    run("check-config", "--locations", "-", input=f"file://{run.local}/one\n".encode())
    assert run.json("check-config", "--locations", "-", input=b"") == [
        {"locations": 0, "without_store": 0, "stores": {}}
    ]
    (row, _) = run.json("check-config", "--locations", "-", input=b"file:///\xff\x1b[2J\n", code=1)
    assert row["location"] == "file:///\\xff\x1b[2J"
    assert "\x1b" not in run("check-config", "--locations", "-", input=b"file:///\x1b[2J\n", code=1).output
    run("check-config", "--locations", "nowhere", code=2)


def test_locations_are_looked_at_only_with_a_good_configuration(run: Cli) -> None:
    Path("bad.conf").write_text("[DEFAULT]\nenabled_backends = one:nope\n")
    (fault,) = run.json("check-config", "bad.conf", "--locations", "-", input=b"file:///x\n", code=1)
    assert fault["error"] == "DriverNotFound"


# Errors


def _all_errors() -> list[type[errors.StoreError]]:
    found = [getattr(errors, name) for name in errors.__all__]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, errors.StoreError)]


@pytest.mark.parametrize("kind", _all_errors(), ids=lambda kind: cast("str", kind.__name__))
def test_every_error_has_its_exit_code_and_is_told_as_json(
    run: Cli, monkeypatch: pytest.MonkeyPatch, kind: type[errors.StoreError]
) -> None:
    def fails(_: Store) -> Iterator[Any]:
        raise kind("so it is", store="local", operation="list", location="s3://key:secret@host/b/o")

    monkeypatch.setattr(Store, "list", fails)
    code = next((code for code, _, kinds in EXIT_CODES if issubclass(kind, kinds)), 1)
    assert (code == 1) == (kind is errors.StoreError)
    error = run.fault("list", code=code)
    assert error["temporary"] is kind.default_temporary
    assert error["location"] == "s3://***@host/b/o"
    if kind is not errors.Cancelled:
        assert (error["error"], error["message"]) == (kind.__name__, "so it is")
    assert (error["store"], error["operation"]) == ("local", "list")


def test_an_error_is_one_line_without_traceback_or_secret(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Store) -> Iterator[Any]:
        try:
            raise OSError("connecting to https://user:geheim@host/?token=geheim failed")
        except OSError as error:
            raise errors.Unavailable("https://user:geheim@host/ is down\x1b[2J") from error

    monkeypatch.setattr(Store, "list", fails)
    assert run("list", code=8).stderr == "imagestore: Unavailable: https://***@host/ is down\\x1b[2J\n"
    told = run("list", "-vv", code=8).stderr
    assert "Traceback" in told
    assert "geheim" not in told


def test_an_error_that_nobody_expected(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Store) -> Iterator[Any]:
        raise RuntimeError("s3://key:secret@host is odd")

    monkeypatch.setattr(Store, "list", fails)
    assert run("list", code=1).stderr == "imagestore: RuntimeError: s3://***@host is odd\n"


def test_usage_errors(run: Cli) -> None:
    assert "Usage" in run("get", "one", code=2).stderr
    assert run.fault("get", "one", code=2)["error"] == "MissingParameter"
    assert run.fault("add", "one", "image", "--size", "many", code=2)["error"] == "BadParameter"
    assert run.fault("add", "one", "image", "--expect", "abc", code=2)["error"] == "BadParameter"
    assert run.fault("add", "-", "image", code=2)["error"] == "InvalidImageId"


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("4096", 4096), ("4k", 4000), ("512MiB", 2**29), ("10 gb", 10**10), ("1Ki", 1024)]
)
def test_sizes(text: str, size: int) -> None:
    assert to_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800), ("0h", 0)]
)
def test_ages(text: str, seconds: int) -> None:
    assert to_age(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "-1", "1.5GB", "1e9", "KiB", "4 MiBs"])
def test_what_is_no_size(run: Cli, text: str) -> None:
    run("add", "one", "image", "--size", text, code=2)


@pytest.mark.parametrize("text", ["", "24", "1w", "-1h", "999999999d"])
def test_what_is_no_age(run: Cli, text: str) -> None:
    run("collect", "--older-than", text, code=2)


def test_help_names_every_command_and_exit_code(run: Cli) -> None:
    text = run("--help").stdout
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert set(cli.commands) == set(COMMANDS)
    assert all(f"\n    {code:<4} " in text for code in (0, 1, *(code for code, _, _ in EXIT_CODES), 141))
    assert run("--version").stdout.startswith("imagestore, version ")
    for command in COMMANDS:
        assert "--json" in run(command, "--help").stdout


def test_the_page_has_every_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs/howto/command-line.md").read_text("utf-8")
    told = {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)}
    assert told.keys() == {0, 1, 141, *(code for code, _, _ in EXIT_CODES)}
    assert all(told[code] == text for code, text, _ in EXIT_CODES)


def test_log_lines_go_to_standard_error(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def logs(_: Store) -> Iterator[Any]:
        logging.getLogger("imagestore").warning("beware of %s", "s3://key:secret@host")
        logging.getLogger("imagestore").info("by the way")
        return iter(())

    monkeypatch.setattr(Store, "list", logs)
    assert run("list").stderr == "imagestore: warning: beware of s3://***@host\n"
    assert "by the way" in run("list", "-v").stderr
    (line,) = _documents(run("list", "--json").stderr)
    assert line == {"level": "warning", "message": "beware of s3://***@host"}
    assert logging.getLogger("imagestore").handlers == []


def test_what_would_drive_a_terminal_is_made_visible() -> None:
    assert safe("über-4.2") == "über-4.2"
    assert safe("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"


# Progress


def test_progress_in_a_pipe_is_a_line_at_the_end(run: Cli) -> None:
    assert run("add", "one", "image").stderr.startswith("imagestore: stored 293.0 KiB in ")
    assert run("verify", "one").stderr.startswith("imagestore: read 293.0 KiB in ")
    assert run("copy", "one", "--to", "other").stderr.endswith(", from local to other\n")
    for arguments in (("verify", "one"), ("get", "one", "out"), ("copy", "one", "--to", "other", "--id", "two")):
        assert run(*arguments, "--progress", "none").stderr == ""
    assert run("verify", "one", "--json").stderr == ""
    run("verify", "one", "--progress", "bars", code=2)


def test_progress_as_lines(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagestore._commands.session.EVERY", 0)
    known = r"imagestore: one: 293\.0 KiB of 293\.0 KiB \(100%\), [\d.]+ [KMG]iB/s, 0:00:00 left\n"
    assert re.search(known, run("add", "one", "image", "--progress", "plain").stderr)
    unknown = run("add", "two", "-", "--progress", "plain", input=DATA).stderr
    assert re.search(r"imagestore: two: 293\.0 KiB, [\d.]+ [KMG]iB/s\n", unknown)
    assert unknown.splitlines()[-1].startswith("imagestore: stored 293.0 KiB in ")
    told = _documents(run("add", "three", "image", "--progress", "plain", "--json").stderr)
    done = next(line for line in told if line["done"])
    assert done.pop("rate") > 0
    assert done == {"done": 300_000, "total": 300_000, "seconds_left": 0}


def test_lines_of_progress_keep_their_distance(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.9, 5.0, 6.0, 15.0])
    monkeypatch.setattr("imagestore._commands.session.time.monotonic", lambda: next(now))
    session = Session(json=True, progress="plain")
    told: list[Mapping[str, Any]] = []
    monkeypatch.setattr(session, "emit", lambda document, **_: told.append(document))
    with session.showing("one") as report:
        assert report is not None
        for done in (10, 20, 100, 200, 100):
            report(done, 10_000)
    assert told == [
        {"done": 100, "total": 10_000, "rate": 20, "seconds_left": 495},
        {"done": 100, "total": 10_000, "rate": 0, "seconds_left": None},
    ]


# Completion


def _offered(run: Cli, *words: str) -> list[str]:
    """What bash is offered for the last of ``words``."""
    line = {"COMP_WORDS": " ".join(("imagestore", *words)), "COMP_CWORD": str(len(words))}
    result = CliRunner().invoke(
        cli, env={"_IMAGESTORE_COMPLETE": "bash_complete", **line}, prog_name="imagestore", color=False
    )
    assert result.stderr == ""
    return [item.removeprefix("plain,") for item in result.stdout.split()]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has other things to do is not what is tested."""
    monkeypatch.setattr("imagestore._commands.completion.LONGEST", 60.0)


@pytest.mark.usefixtures("unhurried")
def test_completion(run: Cli) -> None:
    for image in ("one", "only", "two"):
        run("add", image, "image")
    run("add", "elsewhere", "image", "--store", "other")
    assert _offered(run, "check") == ["check-config"]
    assert _offered(run, "--store", "") == ["local", "other"]
    assert _offered(run, "copy", "one", "--to", "o") == ["other"]
    assert sorted(_offered(run, "stat", "o")) == ["one", "only"]
    assert _offered(run, "--store", "other", "stat", "") == ["elsewhere"]
    assert _offered(run, "copy", "--from", "other", "") == ["elsewhere"]
    assert _offered(run, "delete", "one", "tw") == ["two"]
    assert _offered(run, "get", "one", "im") == ["file,im"]
    assert _offered(run, "--config", "im") == ["file,im"]


def test_completion_is_silent_about_what_fails(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Store) -> Iterator[Any]:
        logging.getLogger("imagestore").warning("in the middle of the line")
        raise errors.Unavailable

    monkeypatch.setattr(Store, "list", fails)
    assert _offered(run, "stat", "") == []
    run.config.write_text("nonsense")
    assert _offered(run, "--store", "") == []
    assert _offered(run, "stat", "") == []


@pytest.mark.usefixtures("unhurried")
def test_completion_ends_in_time_and_number(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(_: Store) -> Iterator[StoredImage]:
        for number in itertools.count():
            yield StoredImage(image_id=f"i{number}", location=Location(uri=f"file:///{number}"))

    def slow(store: Store) -> Iterator[StoredImage]:
        yield from itertools.islice(many(store), 3)
        time.sleep(30)

    monkeypatch.setattr(Store, "list", many)
    assert len(_offered(run, "stat", "")) == 200
    monkeypatch.setattr("imagestore._commands.completion.LONGEST", 0.2)
    assert _offered(run, "stat", "nothing-like-it") == []
    monkeypatch.setattr("imagestore._commands.completion.LONGEST", 3.0)
    monkeypatch.setattr(Store, "list", slow)
    assert _offered(run, "stat", "") == ["i0", "i1", "i2"]
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_completion_in_a_real_bash(run: Cli, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "imagestore"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m imagestore "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(_IMAGESTORE_COMPLETE=bash_source imagestore)"
        complete -p imagestore
        COMP_WORDS=(imagestore copy one --to "") COMP_CWORD=4 COMPREPLY=()
        _imagestore_completion imagestore && echo "${COMPREPLY[@]}"
    """
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=True,
        timeout=60,
    )
    registered, *offered = done.stdout.splitlines()
    assert registered.endswith("-F _imagestore_completion imagestore")
    assert (offered, done.stderr) == (["local other"], "")


# Signals


def test_the_first_signal_asks_and_the_second_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    before = signal.getsignal(signal.SIGINT)
    session = Session(json=True)
    with cancelling(session) as cancel:
        signal.raise_signal(signal.SIGINT)
        assert cancel.is_set()
        assert session.signal == signal.SIGINT
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGINT)
        assert left.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_the_end_of_a_pipe_after_a_signal_is_no_end() -> None:
    reading, writing = os.pipe()
    cancel = threading.Event()
    with open(reading, "rb", buffering=0) as stream:
        pipe = Pipe(stream, cancel)
        os.write(writing, b"data")
        assert pipe.read(100) == b"data"
        cancel.set()
        os.close(writing)
        with pytest.raises(KeyboardInterrupt):
            pipe.read(100)


def test_an_error_after_a_signal_is_told_as_what_it_is(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubtful(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise errors.Unavailable("the commit is in doubt")

    monkeypatch.setattr(Stores, "add", doubtful)
    assert run.fault("add", "one", "image", code=8)["message"] == "the commit is in doubt"


# Real processes


def _begun(directory: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while not (directory.exists() and any(directory.iterdir())):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_upload_that_is_broken_off_leaves_nothing(run: Cli, number: int) -> None:
    with run.start("add", "slow", "-") as process:
        assert process.stdin
        process.stdin.write(DATA)
        process.stdin.flush()
        _begun(run.local, process)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr
        told = process.stderr.read().decode()
        assert told.endswith("imagestore: broken off, nothing was kept\n")
        assert "Traceback" not in told
    assert list(run.local.iterdir()) == []


def test_a_second_signal_leaves_at_once_whatever_hangs(run: Cli) -> None:
    hangs = (
        "import sys, time\n"
        "from imagestore.drivers import filesystem\n"
        "filesystem._Upload.commit = lambda *_: (print('hanging', flush=True), time.sleep(60))\n"
        "from imagestore._cli import main\n"
        "main(['add', 'one', 'image'])\n"
    )
    with run.start(program=("-c", hangs), stdin=subprocess.DEVNULL) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"hanging\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"\n"
        assert b"once more" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read().endswith(b"see 'imagestore uploads' for what may be left\n")


def test_real_pipes(run: Cli) -> None:
    with run.start("--json", "add", "one", "-") as process:
        output, told = process.communicate(DATA, 20)
        assert (process.returncode, told) == (0, b"")
        assert json.loads(output)["digests"] == {"sha256": SHA256}
    with run.start("get", "one", "-", stdin=subprocess.DEVNULL) as process:
        output, told = process.communicate(timeout=20)
        assert (process.returncode, output) == (0, DATA)
        assert told.startswith(b"imagestore: got 293.0 KiB in ")


def test_a_reader_that_has_enough_is_no_error(run: Cli) -> None:
    (run.local).mkdir()
    (run.local / "big").write_bytes(b"x" * 5_000_000)
    with run.start("get", "big", "-", stdin=subprocess.DEVNULL) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(10) == b"x" * 10
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


def test_a_full_disk_at_standard_output_is_one_line(run: Cli) -> None:
    with open("/dev/full", "wb") as full, run.start("stores", stdin=subprocess.DEVNULL, stdout=full) as process:
        assert process.communicate(timeout=20)[1] == b"imagestore: OSError: No space left on device\n"
        assert process.returncode == 1


@contextlib.contextmanager
def _terminal(run: Cli, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    leader, follower = pty.openpty()
    try:
        with run.start(*arguments, stdin=follower, stdout=follower, stderr=follower) as process:
            os.close(follower)
            yield process, leader
    finally:
        os.close(leader)


def _read_all(leader: int) -> str:
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(leader, 65536):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_terminal_gets_tables_and_sizes_for_people(run: Cli) -> None:
    run("add", "one", "image")
    with _terminal(run, "list") as (process, leader):
        text = _read_all(leader)
        assert process.wait(20) == 0
    assert "293.0 KiB" in text
    assert "image id" in text
    assert "1 image in the store local" in text


def test_a_terminal_gets_a_bar_and_ctrl_c_takes_it_away(run: Cli) -> None:
    leader, follower = pty.openpty()
    process = run.start(
        *("add", "slow", "-", "--size", "60MB"),
        stdout=follower,
        stderr=follower,
        # The terminal is the controlling one, so that it turns the key into the signal.
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(1, termios.TIOCSCTTY, 0)),
    )
    os.close(follower)
    try:
        assert process.stdin
        # Not in a thread: the pipe takes what the program reads, and that is all of it.
        process.stdin.write(os.urandom(41 * 2**20))
        process.stdin.flush()
        text, deadline = "", time.monotonic() + 20
        while not re.search(r"slow .*\d\d% (16|24|32)\.0/57\.2 MiB [\d.]+ [KMGT]iB/s \d:\d\d:\d\d", text):
            assert select.select([leader], [], [], deadline - time.monotonic())[0], text
            text += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", os.read(leader, 65536).decode())
        os.write(leader, b"\x03")
        text = _read_all(leader)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
        os.close(leader)
    assert text.rstrip().endswith("broken off, nothing was kept")
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert list(run.local.iterdir()) == []


def test_no_image_is_written_to_or_read_from_a_terminal(run: Cli) -> None:
    run("add", "one", "image")
    for arguments in (("get", "one", "-"), ("add", "two", "-")):
        with _terminal(run, *arguments) as (process, leader):
            assert "Error: " in _read_all(leader)
            assert process.wait(20) == 2


@pytest.mark.parametrize("module", ["click", "rich"])
def test_without_the_extra_the_command_to_install_it_is_named(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from imagestore._cli import main; main([])"
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "pip install 'imagestore[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
