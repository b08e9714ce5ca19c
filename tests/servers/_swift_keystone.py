"""Keystone for tests: its database, made once and kept as a template, and its server.

``_swift_keystone.py prepare DIR KEYSTONE_PORT PROXY_PORT CACHE LIFE`` and ``_swift_keystone.py serve PORT``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

PROJECTS = {
    "demo": ("demo", "demopass", ("member",)),
    "demo2": ("demo2", "demo2pass", ("member",)),
    "service": ("swift", "swiftpass", ("admin", "service")),
}
# Ports that stand in the template for those of each run.
SWIFT_URL = "http://127.0.0.1:1/v1/AUTH_%(project_id)s"
KEYSTONE_URL = "http://127.0.0.1:2/v3"

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
    urls = [word for kind in ("public", "internal", "admin") for word in (f"--bootstrap-{kind}-url", KEYSTONE_URL)]
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
    ids = {}
    for name, (user, password, granted) in PROJECTS.items():
        project = ids[name] = uuid.uuid4().hex
        common = {"domain_id": "default", "enabled": True}
        managers.resource_api.create_project(project, {"id": project, "name": name, "description": "", **common})
        made = managers.identity_api.create_user({"name": user, "password": password, **common})
        for role in granted:
            managers.assignment_api.add_role_to_user_and_project(made["id"], project, roles[role])
    service = uuid.uuid4().hex
    managers.catalog_api.create_service(
        service, {"id": service, "type": "object-store", "name": "swift", "enabled": True}
    )
    for interface in ("public", "internal", "admin"):
        key = uuid.uuid4().hex
        endpoint = {"id": key, "service_id": service, "region_id": "RegionOne", "interface": interface}
        managers.catalog_api.create_endpoint(key, {**endpoint, "enabled": True, "url": SWIFT_URL})
    (place / "ids.json").write_text(json.dumps(ids))


def prepare(directory: str, port: str, proxy_port: str, cache: str, life: str) -> None:
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
    database = sqlite3.connect(place / "keystone.sqlite")
    for old, new in (("127.0.0.1:1/", f"127.0.0.1:{proxy_port}/"), ("127.0.0.1:2/", f"127.0.0.1:{port}/")):
        database.execute("UPDATE endpoint SET url = replace(url, ?, ?)", (old, new))
    database.commit()
    database.close()


def serve(port: str) -> None:
    # Keystone gives the command line to oslo.config, which knows none of it.
    sys.argv = ["keystone"]
    import waitress
    from keystone.wsgi.api import application

    waitress.serve(application, host="127.0.0.1", port=int(port), threads=4, ident="keystone")


if __name__ == "__main__":
    {"prepare": prepare, "serve": serve}[sys.argv[1]](*sys.argv[2:])
