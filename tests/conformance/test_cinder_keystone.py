"""The Cinder driver behind a real Keystone, as a plain member of a project: the kit's contract, and logins that end."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _cinder_keystone import context, login, members_view, running
from _swift_testing import application_credential, session
from cinder_testing import Project, driver

from imagestore import Retry, Store
from imagestore.driver import Driver, Timeouts
from imagestore.errors import ConfigurationError, NotFound, PermissionDenied, Unauthenticated
from imagestore.testing import DriverConformance, Harness, checks, run_check

MIB = 1024 * 1024
DATA = random.Random(3).randbytes(8 * MIB + 5)
KIND = "rbd-multi"
NO_ONE = {"user": None, "password": None, "project_name": None}


class KeystoneHarness(Harness):
    """The first user's project, and volumes in RBD that may be attached several times."""

    def __init__(self) -> None:
        self.env = running()
        self.admin = members_view(self.env)

    def make_driver(self) -> Driver:
        return self._driver()

    def _driver(self, timeouts: Timeouts | None = None, **values: Any) -> Driver:
        told = {**login(self.env), "volume_type": KIND, "sparse": True, **values}
        return driver(self.env["CINDER_URL"], timeouts=timeouts, **told)

    def make_unreachable(self) -> Driver | None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        return self._at(port)

    def make_stalled(self) -> Driver:
        # The backlog takes connections, and nobody ever reads from them.
        self.silent = socket.create_server(("127.0.0.1", 0))
        return self._at(self.silent.getsockname()[1])

    def _at(self, port: int) -> Driver:
        return self._driver(Timeouts(connect=1, stall=1), auth_url=f"http://127.0.0.1:{port}/v3")

    @contextlib.contextmanager
    def hold(self, location: str) -> Iterator[None]:
        snapshot = self.admin.snapshot(location.rpartition("/")[2])
        try:
            yield
        finally:
            self.admin.delete_snapshot(snapshot)

    def auths(self) -> tuple[Any, Any]:
        """A session, which renews its token, and a bare token."""
        if not hasattr(self, "users"):
            self.users = (session(self.env), context(self.env, "OS2"))
        return self.users

    def close(self) -> None:
        if hasattr(self, "silent"):
            self.silent.close()
        if hasattr(self, "users"):
            self.users[0].session.close()
        for prefix in ("OS", "OS2"):
            left = [(each["name"], each["status"]) for each in members_view(self.env, prefix).volumes().values()]
            assert not left, f"volumes stayed: {left}"


class TestMember(DriverConformance):
    harness = KeystoneHarness
    parts = ("contract",)


class BoundHarness(KeystoneHarness):
    """No credentials of its own: it acts for whoever asks, in the user's project."""

    auths_apart = True

    def make_driver(self) -> Driver:
        return self._driver(**NO_ONE, auth_url=None)

    def make_unreachable(self) -> Driver | None:
        """Without a user there is no server to reach."""
        return None


def test_two_users() -> None:
    with contextlib.closing(BoundHarness()) as made:
        wanted = [check for check in checks() if check.name in ("two_auths", "unbound")]
        assert len(wanted) == 2
        for check in wanted:
            run_check(check, made)


@contextlib.contextmanager
def store(**values: Any) -> Iterator[tuple[Store, Project]]:
    """A store with these options, and a view of its project; nothing stays there."""
    env = running()
    view = members_view(env)
    made = driver(env["CINDER_URL"], **{**login(env), "volume_type": KIND, **values})
    opened = Store(made, retry=Retry(attempts=2, first=0.01), _block_size=MIB)
    try:
        with opened:
            yield opened, view
    finally:
        left = view.volumes()
        for key in left:
            view.delete(key)
    assert not left, "volumes stayed"


def round_trip(of: Store) -> None:
    location = of.add("image", DATA).location
    assert of.stat(location).size == len(DATA)
    assert of.verify(location).size == len(DATA)
    of.delete(location)
    with pytest.raises(NotFound):
        of.stat(location)


def test_the_user_is_no_administrator() -> None:
    env = running()
    own = session(env)
    roles = own.auth.get_access(own).role_names
    assert "member" in roles
    assert "admin" not in roles
    own.session.close()


def test_application_credential() -> None:
    made = application_credential(running())
    told = {"application_credential_id": made["id"], "application_credential_secret": made["secret"]}
    with store(**{**NO_ONE, **told}) as (one, _):
        round_trip(one)


def test_endpoint_template_for_the_users_project() -> None:
    with store(endpoint_template=f"{running()['CINDER_URL']}/%(project_id)s") as (one, _):
        round_trip(one)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"password": "wrong"}, Unauthenticated),
        ({"project_name": "demo2"}, Unauthenticated),
        ({"region": "RegionTwo"}, ConfigurationError),
        ({"catalog_info": "volumev9::publicURL"}, ConfigurationError),
        ({"volume_type": "nobody-has-it"}, ConfigurationError),
    ],
)
def test_wrong_options_are_told_at_once(values: dict[str, str], error: type[Exception]) -> None:
    with store(**values) as (one, _), pytest.raises(error) as caught:
        one.exists("image")
    assert not caught.value.temporary  # type: ignore[attr-defined]  # it is one of ours
    assert "demopass" not in str(caught.value)


def test_a_volume_of_another_project_is_not_found() -> None:
    env = running()
    other = members_view(env, "OS2")
    made = other.create("foreign", {"glance_image_id": "foreign", "image_size": "5"}, KIND)
    try:
        with store() as (one, _):
            for verb in (one.stat, one.get, one.delete):
                with pytest.raises((NotFound, PermissionDenied)):
                    verb(f"cinder://kit/{made}")
            assert not one.exists("foreign")
        assert other.volumes()[made]["status"] == "available"
    finally:
        other.delete(made)


# Logins that end


def ending(view: Project, token: Callable[[], str]) -> Iterator[bytes]:
    """`DATA`; in their middle, while the volume is attached, the token is revoked."""
    for start in range(0, len(DATA), MIB):
        if start == 3 * MIB:
            end = time.monotonic() + 60
            while {each["status"] for each in view.volumes().values()} != {"in-use"}:
                assert time.monotonic() < end, "nothing was attached"
                time.sleep(0.1)
            revoke(token())
        yield DATA[start : start + MIB]


def revoke(token: str) -> None:
    env = running()
    own = session(env)
    own.delete(f"{env['OS_AUTH_URL']}/auth/tokens", headers={"X-Subject-Token": token})
    own.session.close()


@pytest.mark.parametrize("size", [len(DATA), None])
def test_own_token_that_ends_is_renewed(size: int | None) -> None:
    with store() as (one, view):
        client = one._open().driver._api._http
        before = client.get_token()
        location = one.add("image", ending(view, client.get_token), size=size).location
        assert client.get_token() != before
        with one.get(location) as reader:
            head = reader.read(MIB)
            revoke(client.get_token())
            assert head + reader.read() == DATA
        one.delete(location)


def test_session_of_a_user_renews_its_token() -> None:
    own = session(running())
    with store(**NO_ONE, auth_url=None) as (one, view):
        bound = one.bind(own)
        location = bound.add("image", ending(view, own.get_token), size=len(DATA)).location
        assert bound.verify(location).size == len(DATA)
        bound.delete(location)
    own.session.close()


def test_bare_token_of_a_user_that_ends() -> None:
    """Nobody here can get another. What was stored is found with the next one."""
    users = [context(running()) for _ in range(2)]
    with store(**NO_ONE, auth_url=None) as (one, view):
        bound, later = (one.bind(user) for user in users)
        with pytest.raises(Unauthenticated) as caught:
            bound.add("image", ending(view, lambda: users[0].auth_token), size=len(DATA))
        assert not caught.value.temporary
        assert not later.exists("image")
        assert [upload.image_id for upload in later.uploads()] == ["image"]
        later.collect(older_than=0)
        assert list(later.uploads()) == []
        assert view.volumes() == {}
