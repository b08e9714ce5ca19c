"""A Cinder behind Keystone, whose users are plain members of their projects: started once in a process."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from _swift_testing import running as swift_running
from _swift_testing import session
from cinder_testing import Project
from cinder_testing import running as cinder_running

__all__ = ["context", "login", "members_view", "running"]


@functools.cache
def running() -> dict[str, str]:
    """What Cinder tells of itself, and ``OS_*`` and ``OS2_*``: how two users of two projects log in."""
    keystone = swift_running("swift", "servers=keystone")
    return {**keystone, **cinder_running("--keystone", keystone["PLACE"])}


def login(env: dict[str, str]) -> dict[str, Any]:
    """The driver's options for the first user, who finds Cinder in the catalog."""
    return {
        "auth_url": env["OS_AUTH_URL"],
        "user": env["OS_USERNAME"],
        "password": env["OS_PASSWORD"],
        "project_name": env["OS_PROJECT_NAME"],
        "region": env["OS_REGION_NAME"],
        "endpoint_template": None,
    }


def members_view(env: dict[str, str], prefix: str = "OS") -> Project:
    """A user's project through the bare API, with the user's own rights."""
    own = session(env, prefix)
    view = Project(env["CINDER_URL"], own.get_project_id())
    view.token = own.get_token()
    own.session.close()
    return view


def context(env: dict[str, str], prefix: str = "OS") -> Any:
    """What a service knows of the user whose request it serves: a token that it can't renew, and a catalog."""
    own = session(env, prefix)
    project = own.get_project_id()
    endpoint = {"region": "RegionOne", "publicURL": f"{env['CINDER_URL']}/{project}"}
    made = SimpleNamespace(
        auth_token=own.get_token(),
        user_id=own.get_user_id(),
        project_id=project,
        service_catalog=[
            {"type": "image", "name": "glance", "endpoints": [{"region": "RegionOne", "publicURL": "http://x"}]},
            {"type": "volumev3", "name": "cinder", "endpoints": [endpoint]},
        ],
    )
    own.session.close()
    return made
