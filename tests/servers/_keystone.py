"""Keystone for tests: its database, made once and kept as a template, its server, and what its administrator does.

``_keystone.py prepare DIR PORT CACHE LIFE [SERVICE=PORT ...]`` and ``_keystone.py serve PORT``. Nothing of Keystone is
imported before one of these is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

USERS = (
    ("demo", "demo", "demopass", ("member",)),
    ("demo2", "demo2", "demo2pass", ("member",)),
    ("service", "swift", "swiftpass", ("admin", "service")),
    ("service", "cinder", "cinderpass", ("admin", "service")),
)
"""Project, name, password and roles of each; beside them there is admin with adminpass, in the project admin."""
SERVICES = {
    "swift": ("object-store", 1, "/v1/AUTH_%(project_id)s"),
    "cinder": ("volumev3", 3, "/v3/%(project_id)s"),
}
"""Type, port and path of each. The ports stand in the template for those of a run; nothing listens on them."""
OWN_PORT = 2

CONFIGURATION = """
[DEFAULT]
use_stderr = true
[database]
connection = sqlite:///{place}/keystone.sqlite
[token]
provider = fernet
expiration = {life}
[fernet_tokens]
key_repository = {place}/tokens
[fernet_receipts]
key_repository = {place}/tokens
[credential]
key_repository = {place}/credentials
[identity]
# Twelve rounds, the default, take a quarter of a second for each login.
password_hash_rounds = 4
[cache]
enabled = true
backend = dogpile.cache.memory
[oslo_messaging_notifications]
driver = noop
"""


def configure(place: Path, life: str) -> None:
    from cryptography.fernet import Fernet

    place.mkdir(parents=True, exist_ok=True)
    (place / "keystone.conf").write_text(CONFIGURATION.format(place=place, life=life))
    for kind in ("tokens", "credentials"):
        (place / kind).mkdir(mode=0o700, exist_ok=True)
        for number in "01":
            key = place / kind / number
            if not key.exists():
                key.write_bytes(Fernet.generate_key())
                key.chmod(0o600)


def build(place: Path) -> None:
    """A database with Keystone's own tools: schema, roles, projects, users, catalog."""
    configure(place, "3600")
    manage = (
        "import sys; from keystone.cmd.manage import main; sys.argv[0] = 'keystone-manage'; main()",
        "--config-file",
        str(place / "keystone.conf"),
    )
    own = f"http://127.0.0.1:{OWN_PORT}/v3"
    urls = [word for kind in ("public", "internal", "admin") for word in (f"--bootstrap-{kind}-url", own)]
    who = ("--bootstrap-username", "admin", "--bootstrap-password", "adminpass", "--bootstrap-project-name", "admin")
    for command in (("db_sync",), ("bootstrap", *who, "--bootstrap-region-id", "RegionOne", *urls)):
        subprocess.run([sys.executable, "-c", *manage, *command], check=True, timeout=300)
    os.environ["OS_KEYSTONE_CONFIG_DIR"] = str(place)
    import keystone.conf
    from keystone.common import provider_api
    from keystone.server import backends

    keystone.conf.configure()
    keystone.conf.CONF([], project="keystone", default_config_files=[str(place / "keystone.conf")])
    backends.load_backends()
    managers = provider_api.ProviderAPIs
    roles = {role["name"]: role["id"] for role in managers.role_api.list_roles()}
    ids: dict[str, str] = {}
    for name, user, password, granted in USERS:
        common = {"domain_id": "default", "enabled": True}
        if name not in ids:
            project = ids[name] = uuid.uuid4().hex
            managers.resource_api.create_project(project, {"id": project, "name": name, "description": "", **common})
        made = managers.identity_api.create_user({"name": user, "password": password, **common})
        for role in granted:
            managers.assignment_api.add_role_to_user_and_project(made["id"], ids[name], roles[role])
    for name, (kind, port, path) in SERVICES.items():
        service = uuid.uuid4().hex
        managers.catalog_api.create_service(service, {"id": service, "type": kind, "name": name, "enabled": True})
        for interface in ("public", "internal", "admin"):
            key = uuid.uuid4().hex
            endpoint = {"id": key, "service_id": service, "region_id": "RegionOne", "interface": interface}
            url = f"http://127.0.0.1:{port}{path}"
            managers.catalog_api.create_endpoint(key, {**endpoint, "enabled": True, "url": url})
    (place / "ids.json").write_text(json.dumps(ids))


def prepare(directory: str, port: str, cache: str, life: str, *services: str) -> None:
    """Copy the template to DIR/keystone and put this run's ports in."""
    place = Path(directory) / "keystone"
    mark = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    template = Path(cache) / f"keystone-{version('keystone')}-{mark}"
    if not (template / "ids.json").exists():
        made = template.with_name(f"{template.name}.{os.getpid()}")
        build(made)
        try:
            made.rename(template)
        except OSError:
            shutil.rmtree(made)  # another process was faster
    configure(place, life)
    for name in ("keystone.sqlite", "ids.json"):
        shutil.copy(template / name, place / name)
    ports = {OWN_PORT: port, **{SERVICES[name][1]: new for name, _, new in (each.partition("=") for each in services)}}
    database = sqlite3.connect(place / "keystone.sqlite")
    for old, new in ports.items():
        told = (f"127.0.0.1:{old}/", f"127.0.0.1:{new}/")
        database.execute("UPDATE endpoint SET url = replace(url, ?, ?)", told)
    database.commit()
    database.close()


def serve(port: str) -> None:
    # Keystone gives the command line to oslo.config, which knows none of it.
    sys.argv = ["keystone"]
    import waitress
    from keystone.wsgi.api import application

    waitress.serve(application, host="127.0.0.1", port=int(port), threads=4, ident="keystone")


class Administrator:
    """A Keystone as its administrator uses it.

    Attributes:
        token: the administrator's, for the project admin.
        project: the id of that project.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.token = ""
        domain = {"id": "default"}
        user = {"name": "admin", "domain": domain, "password": "adminpass"}
        identity = {"methods": ["password"], "password": {"user": user}}
        scope = {"project": {"name": "admin", "domain": domain}}
        body = {"auth": {"identity": identity, "scope": scope}}
        told, headers = self._ask("POST", "/auth/tokens", body)
        self.token = headers["X-Subject-Token"]
        self.project: str = told["token"]["project"]["id"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[Any, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "X-Auth-Token": self.token}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}"), answer.headers

    def offer(self, name: str, port: int) -> None:
        """Let the catalog say that a service listens on this port."""
        kind, _, path = SERVICES[name]
        service = self._ask("GET", f"/services?type={kind}")[0]["services"][0]["id"]
        for each in self._ask("GET", f"/endpoints?service_id={service}")[0]["endpoints"]:
            body = {"endpoint": {"url": f"http://127.0.0.1:{port}{path}"}}
            self._ask("PATCH", f"/endpoints/{each['id']}", body)


if __name__ == "__main__":
    {"prepare": prepare, "serve": serve}[sys.argv[1]](*sys.argv[2:])
