"""All of Cinder in one process: ``cinder_server.py --config-file FILE``, in an environment that has Cinder.

Its code is as it was released; only the start is another one than that of its three programs. In one process, messages
between the services can go through oslo.messaging's in-process transport, and there is no broker to run. Connections to
the database are kept, as they are to any other kind of database than SQLite's.
"""
# ruff: noqa: E402 - what eventlet replaces must be replaced before others import it

from cinder import monkey_patch

monkey_patch.patch()

import gc
import shlex
import sys
from types import SimpleNamespace
from typing import Any

import os_brick
import sqlalchemy
from cinder import coordination, i18n, objects, rpc, service, utils, version

i18n.enable_lazy()

from cinder import context
from cinder.cmd import volume as volume_program
from cinder.common import config, constants
from cinder.objects import cleanable
from cinder.volume import volume_utils
from oslo_config import cfg
from oslo_db.sqlalchemy import engines
from oslo_log import log
from oslo_privsep import priv_context
from oslo_service import service as launching

CONF = cfg.CONF
IDS: dict[str, Any] = {}
"""The id of each volume service by its host: Cinder keeps one for the whole process."""


class OneOfMany(service.Service):
    """A service that reports its own state, and not that of the one that was started last."""

    def start(self) -> None:
        IDS[self.host] = self.origin_service_id
        super().start()

    def _create_service_ref(self, *arguments: Any, **named: Any) -> None:
        super()._create_service_ref(*arguments, **named)
        self.origin_service_id = service.Service.service_id

    def report_state(self) -> None:
        if self.manager.is_working():
            row = objects.Service.get_by_id(context.get_admin_context(), self.origin_service_id)
            row.report_count += 1
            row.save(retry=False)


# To open a file of SQLite anew for every query takes a third of this process's time.
engines.pool = SimpleNamespace(**{**vars(sqlalchemy.pool), "NullPool": sqlalchemy.pool.QueuePool})


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def write_ahead(connection: Any, record: Any) -> None:
    """Without a journal that is made and removed for every change; as safe when the process is killed."""
    connection.execute("PRAGMA journal_mode = WAL")


claim = cleanable.CinderCleanableObject.set_worker


def claim_for_its_own(self: Any) -> Any:
    """Write down which service does a piece of work, so that it can be taken up after a restart."""
    host = getattr(self, "host", None)
    if host:
        backend = volume_utils.extract_host(host, "backend")
        service.Service.service_id = IDS.get(backend, service.Service.service_id)
    return claim(self)


cleanable.CinderCleanableObject.set_worker = claim_for_its_own


def main() -> None:
    objects.register_all()
    CONF(sys.argv[1:], project="cinder", version=version.version_string())
    config.set_middleware_defaults()
    log.setup(CONF, "cinder")
    priv_context.init(root_helper=shlex.split(utils.get_root_helper()))
    os_brick.setup(CONF)
    volume_program.LOG = log.getLogger("cinder.volume")
    coordination.COORDINATOR.start()
    rpc.init(CONF)
    launcher = launching.ServiceLauncher(CONF, restart_method="mutate")
    # First, so that it hears what the volume services say of themselves when they start.
    launcher.launch_service(OneOfMany.create(binary=constants.SCHEDULER_BINARY))
    for backend in CONF.enabled_backends:
        CONF.register_opt(volume_program.host_opt, group=backend)
        host = f"{CONF[backend].backend_host or CONF.host}@{backend}"
        launcher.launch_service(
            OneOfMany.create(host=host, service_name=backend, binary=constants.VOLUME_BINARY, coordination=True)
        )
    launcher.launch_service(service.WSGIService("osapi_volume"))
    # What was imported stays; to look through it again and again is for nothing.
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    launcher.wait()


if __name__ == "__main__":
    main()
