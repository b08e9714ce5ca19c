"""What the script ``swift`` runs inside the environment that has Swift: configures, starts and stops the servers."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import pwd
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "servers": "all",  # or keystone, alone
    "log_level": "WARNING",  # with INFO each server writes a line for each request
    "max_file_size": "5368709122",  # the longest object, in bytes
    "max_manifest_segments": "1000",
    "client_timeout": "60",  # seconds that the proxy waits for bytes of a request
    "node_timeout": "10",
    "token_life": "86400",  # tempauth's tokens, in seconds
    "keystone_token_life": "3600",
    "keystone_token_cache": "300",  # seconds that the proxy trusts a token it has seen; -1: it always asks
}
MODULES = {
    "proxy": "swift.proxy.server",
    "proxy-v3": "swift.proxy.server",
    "account": "swift.account.server",
    "container": "swift.container.server",
    "object": "swift.obj.server",
}
NAMES = ("cache", "keystone", *reversed(MODULES))

BACKEND = """
[DEFAULT]
swift_dir = {place}/etc
devices = {place}/srv
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
log_name = {kind}
log_level = {log_level}
eventlet_debug = false
fallocate_reserve = 0
[pipeline:main]
pipeline = healthcheck {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
fallocate_reserve = 0
[filter:healthcheck]
use = egg:swift#healthcheck
[{kind}-replicator]
recon_cache_path = {place}/cache
"""

# One proxy for each kind of token: behind a common one Keystone would be asked about tempauth's tokens too.
AUTHENTICATION = {"proxy": "tempauth", "proxy-v3": "authtoken keystoneauth"}

PIPELINE = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk tempurl {authentication} copy "
    "container-quotas account-quotas slo dlo versioned_writes symlink proxy-server"
)

PROXY = """
[DEFAULT]
swift_dir = {place}/etc
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
log_name = {name}
log_level = {log_level}
eventlet_debug = false
client_timeout = {client_timeout}
[pipeline:main]
pipeline = {pipeline}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
node_timeout = {node_timeout}
recoverable_node_timeout = {node_timeout}
conn_timeout = 0.5
# By default a device that failed once is left alone for a minute. Here there is only one.
error_suppression_interval = 0.1
error_suppression_limit = 1000000
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache_port}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:tempurl]
use = egg:swift#tempurl
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
www_authenticate_uri = http://127.0.0.1:{keystone_port}/v3
auth_url = http://127.0.0.1:{keystone_port}/v3
auth_type = password
user_domain_id = default
project_domain_id = default
project_name = service
username = swift
password = swiftpass
delay_auth_decision = true
include_service_catalog = false
service_token_roles_required = true
token_cache_time = {keystone_token_cache}
cache = swift.cache
[filter:keystoneauth]
use = egg:swift#keystoneauth
operator_roles = admin, member
[filter:tempauth]
use = egg:swift#tempauth
reseller_prefix = TEMP
token_life = {token_life}
user_test_tester = testing .admin
user_test_reader = reading
user_other_tester = testing2 .admin
[filter:copy]
use = egg:swift#copy
[filter:container-quotas]
use = egg:swift#container_quotas
[filter:account-quotas]
use = egg:swift#account_quotas
[filter:slo]
use = egg:swift#slo
max_manifest_segments = {max_manifest_segments}
# By default a manifest's segments below 1 MiB are read at one a second. Tests have little else.
rate_limit_under_size = 0
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
"""

SWIFT = """
[swift-hash]
swift_hash_path_prefix = imagestore
swift_hash_path_suffix = {suffix}
[storage-policy:0]
name = gold
default = yes
[swift-constraints]
max_file_size = {max_file_size}
"""


class Servers:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.state = place / "state.json"
        self.settings = dict(SETTINGS)
        self.ports: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return ("keystone",) if self.settings["servers"] == "keystone" else NAMES

    def load(self) -> None:
        known = json.loads(self.state.read_text())
        self.settings, self.ports = known["settings"], known["ports"]

    # Preparing

    def start(self, given: list[str]) -> None:
        if self.state.exists():
            raise SystemExit(f"{self.place} is in use: stop it first")
        for word in given:
            key, _, value = word.partition("=")
            if key not in SETTINGS:
                raise SystemExit(f"unknown setting {key}; there are {', '.join(SETTINGS)}")
            self.settings[key] = value
        for name in ("etc", "srv/disk", "run", "log", "cache"):
            (self.place / name).mkdir(parents=True, exist_ok=True)
        self.ports = free_ports(self.names)
        self.state.write_text(json.dumps({"settings": self.settings, "ports": self.ports}))
        try:
            self.prepare_keystone()
            self.spawn("keystone")
            if "proxy" in self.names:
                self.start_swift()
            self.wait(self.names)
            self.write_environment()
        except BaseException:
            self.stop()
            raise

    def start_swift(self) -> None:
        self.try_xattr()
        self.spawn("cache")
        self.configure()
        self.import_swift()
        self.build_rings()
        for name in MODULES:
            self.fork(name)

    def try_xattr(self) -> None:
        probe = self.place / "srv" / ".probe"
        probe.touch()
        try:
            os.setxattr(probe, "user.swift.metadata", b"x" * 1000)
        except OSError as error:
            raise SystemExit(f"{self.place} is on a file system without user xattrs: {error}") from error
        probe.unlink()

    def prepare_keystone(self) -> None:
        with open(self.place / "log" / "keystone.log", "ab") as log:
            command = ["prepare", self.place, self.ports["keystone"]]
            more = [os.environ["IMAGESTORE_SWIFT_CACHE"], self.settings["keystone_token_life"]]
            if "proxy-v3" in self.ports:
                more.append(f"swift={self.ports['proxy-v3']}")
            words = [str(word) for word in (HERE / "_keystone.py", *command, *more)]
            subprocess.run([sys.executable, *words], stdout=log, stderr=log, check=True, timeout=300)

    def configure(self) -> None:
        etc = self.place / "etc"
        user = pwd.getpwuid(os.getuid()).pw_name
        (etc / "swift.conf").write_text(SWIFT.format(suffix=os.urandom(8).hex(), **self.settings))
        for kind in ("account", "container", "object"):
            values = {"place": self.place, "kind": kind, "port": self.ports[kind], "user": user}
            text = BACKEND.format(**values, **self.settings)
            (etc / f"{kind}.conf").write_text(text)
        for name, authentication in AUTHENTICATION.items():
            text = PROXY.format(
                place=self.place,
                user=user,
                name=name,
                pipeline=PIPELINE.format(authentication=authentication),
                port=self.ports[name],
                cache_port=self.ports["cache"],
                keystone_port=self.ports["keystone"],
                **self.settings,
            )
            (etc / f"{name}.conf").write_text(text)

    def import_swift(self) -> None:
        """Before anything else of Swift: its constraints and policies are read when the modules are imported."""
        from swift.common import utils

        utils.SWIFT_CONF_FILE = str(self.place / "etc" / "swift.conf")
        from swift.common import constraints

        assert str(constraints.MAX_FILE_SIZE) == self.settings["max_file_size"]

    def build_rings(self) -> None:
        from swift.common.ring import RingBuilder

        for kind in ("account", "container", "object"):
            builder = RingBuilder(4, 1, 1)
            port = self.ports[kind]
            where = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
            builder.add_dev({"region": 1, "zone": 1, "weight": 1.0, "device": "disk", "meta": "", **where})
            builder.rebalance(seed="imagestore")
            builder.get_ring().save(str(self.place / "etc" / f"{kind}.ring.gz"))

    def write_environment(self) -> None:
        ids = json.loads((self.place / "keystone" / "ids.json").read_text())
        values: dict[str, str] = {}
        if "proxy" in self.ports:
            proxy = f"http://127.0.0.1:{self.ports['proxy']}"
            values |= {
                "SWIFT_PROXY": proxy,
                "ST_AUTH": f"{proxy}/auth/v1.0",
                "ST_USER": "test:tester",
                "ST_KEY": "testing",
                "ST_READER_USER": "test:reader",
                "ST_READER_KEY": "reading",
                "ST_ACCOUNT": "TEMP_test",
                "SWIFT_PROXY_V3": f"http://127.0.0.1:{self.ports['proxy-v3']}",
            }
        values |= {
            "OS_IDENTITY_API_VERSION": "3",
            "OS_AUTH_URL": f"http://127.0.0.1:{self.ports['keystone']}/v3",
            "OS_REGION_NAME": "RegionOne",
            "OS_USER_DOMAIN_ID": "default",
            "OS_PROJECT_DOMAIN_ID": "default",
        }
        for prefix, name in (("OS", "demo"), ("OS2", "demo2")):
            values |= {
                f"{prefix}_USERNAME": name,
                f"{prefix}_PASSWORD": f"{name}pass",
                f"{prefix}_PROJECT_NAME": name,
                f"{prefix}_PROJECT_ID": ids[name],
            }
        text = "".join(f"{name}={value}\n" for name, value in values.items())
        (self.place / "env").write_text(text)
        print(text, end="")

    # Running

    def spawn(self, name: str) -> None:
        """Start a server as a program of its own."""
        if name == "cache":
            words = ["_swift_cache.py", self.ports[name]]
        elif name == "keystone":
            words = ["_keystone.py", "serve", self.ports[name]]
        else:
            words = ["_swift_servers.py", "become", self.place, name]
        command = [sys.executable, *(str(HERE / word if str(word).startswith("_") else word) for word in words)]
        variables = {**os.environ, "OS_KEYSTONE_CONFIG_DIR": str(self.place / "keystone")}
        with open(self.place / "log" / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, start_new_session=True
            )
        self.remember(name, process.pid)

    def fork(self, name: str) -> None:
        """Start a server as a copy of this process, which has Swift in memory already."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self.remember(name, pid)
            return
        status = 1
        try:
            os.setsid()
            self.become(name)
            status = 0
        except BaseException:  # noqa: BLE001 - nothing may come out of a copy of this process
            traceback.print_exc()
        finally:
            os._exit(status)

    def become(self, name: str) -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        log = os.open(self.place / "log" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        module = importlib.import_module(MODULES[name])
        sys.argv = [f"swift-{name}", str(self.place / "etc" / f"{name}.conf"), "-v"]
        module.main()

    def remember(self, name: str, pid: int) -> None:
        (self.place / "run" / name).write_text(f"{pid} {birth(pid)}")

    def pid(self, name: str) -> int | None:
        """The server's process, if it still is that very one."""
        try:
            pid, born = (self.place / "run" / name).read_text().split()
        except (OSError, ValueError):
            return None
        return int(pid) if birth(int(pid)) == born != "" else None

    def wait(self, names: tuple[str, ...], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        for name in names:
            while not self.answers(name):
                if self.pid(name) is None or time.monotonic() > end:
                    log = (self.place / "log" / f"{name}.log").read_text(errors="replace")
                    raise SystemExit(f"{name} did not come up:\n{log[-3000:]}")
                time.sleep(0.02)

    def answers(self, name: str) -> bool:
        path = {"keystone": "/v3"}.get(name, "/healthcheck")
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[name], timeout=2)
        try:
            connection.connect()
            if name == "cache":
                return True
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def send(self, name: str, number: int) -> None:
        pid = self.pid(name)
        if pid is None:
            raise SystemExit(f"{name} is not running")
        os.kill(pid, number)
        if number in (signal.SIGTERM, signal.SIGKILL):
            self.wait_gone([name], 5)

    def wait_gone(self, names: list[str], seconds: float) -> list[str]:
        end = time.monotonic() + seconds
        while (left := [name for name in names if self.pid(name)]) and time.monotonic() < end:
            time.sleep(0.02)
        return left

    def stop(self) -> None:
        left = [name for name in self.names if self.pid(name)]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for name in left:
                if pid := self.pid(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                        os.kill(pid, number)
            left = self.wait_gone(left, 3)
        self.state.unlink(missing_ok=True)

    def status(self) -> int:
        for name in self.names:
            print(f"{name}: port {self.ports[name]}, process {self.pid(name)}")
        return 0 if all(self.pid(name) for name in self.names) else 3

    def flush(self) -> None:
        with socket.create_connection(("127.0.0.1", self.ports["cache"]), 5) as connection:
            connection.sendall(b"flush_all\r\n")
            assert connection.recv(64).startswith(b"OK")


def birth(pid: int) -> str:
    """When a process was started, so that another one with its number is not taken for it; empty if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def free_ports(names: tuple[str, ...]) -> dict[str, int]:
    """Below the ports that the system gives to clients: none of them can take one before its server does."""
    found: dict[str, int] = {}
    chance = random.SystemRandom()
    while len(found) < len(names):
        port = chance.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found.values():
            found[names[len(found)]] = port
    return found


def main(verb: str, directory: str, *rest: str) -> int:
    servers = Servers(Path(directory))
    if verb == "start":
        servers.start(list(rest))
        return 0
    servers.load()
    if verb == "stop":
        servers.stop()
    elif verb == "status":
        return servers.status()
    elif verb == "signal":
        servers.send(rest[0], getattr(signal, f"SIG{rest[1].removeprefix('SIG')}"))
    elif verb == "spawn":
        servers.spawn(rest[0])
        servers.wait((rest[0],))
    elif verb == "flush":
        servers.flush()
    elif verb == "become":
        servers.import_swift()
        servers.become(rest[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
