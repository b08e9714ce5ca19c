"""A storage driver for Cinder, as a double in tests: a sparse file for each volume. No part of Cinder.

What it gives to a host is of the type ``local``, which os-brick's own connector takes: the path of a loop device over
the file, or of the file.
"""

import os
import subprocess
from typing import Any

from cinder import exception, interface
from cinder.volume import configuration, driver
from oslo_config import cfg

GIB = 1 << 30
OPTIONS = [cfg.StrOpt("loop_file_directory"), cfg.BoolOpt("loop_file_devices", default=True)]
cfg.CONF.register_opts(OPTIONS, group=configuration.SHARED_CONF_GROUP)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise exception.VolumeBackendAPIException(data=f"{command[0]}: {done.stderr.strip()}")
    return done.stdout


@interface.volumedriver
class LoopFileDriver(driver.VolumeDriver):
    VERSION = "1.0"
    CI_WIKI_NAME = "none"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.configuration.append_config_values(OPTIONS)

    @staticmethod
    def get_driver_options() -> list[cfg.Opt]:
        return OPTIONS

    def do_setup(self, context: Any) -> None:
        os.makedirs(self.configuration.loop_file_directory, exist_ok=True)

    def check_for_setup_error(self) -> None:
        pass

    def path(self, thing: Any) -> str:
        return os.path.join(self.configuration.loop_file_directory, thing.name)

    def devices(self, path: str) -> list[str]:
        return run("losetup", "-j", path, "-O", "NAME", "-n").split() if os.path.exists(path) else []

    def _update_volume_stats(self) -> None:
        room = os.statvfs(self.configuration.loop_file_directory)
        pool = {
            "pool_name": "pool",
            "total_capacity_gb": 1000,
            "free_capacity_gb": room.f_bavail * room.f_frsize / GIB,
            "reserved_percentage": 0,
            "thin_provisioning_support": True,
            "thick_provisioning_support": False,
            "max_over_subscription_ratio": 20,
            "provisioned_capacity_gb": 0,
            "multiattach": True,
            "online_extend_support": True,
            "QoS_support": False,
        }
        self._stats = {
            "volume_backend_name": self.configuration.safe_get("volume_backend_name"),
            "vendor_name": "test",
            "driver_version": self.VERSION,
            "storage_protocol": "local",
            "pools": [pool],
        }

    def create_volume(self, volume: Any) -> None:
        with open(self.path(volume), "xb") as file:
            file.truncate(volume.size * GIB)

    def delete_volume(self, volume: Any) -> None:
        self.let_go(volume)
        if os.path.exists(self.path(volume)):
            os.unlink(self.path(volume))

    def extend_volume(self, volume: Any, new_size: int) -> None:
        os.truncate(self.path(volume), new_size * GIB)
        for device in self.devices(self.path(volume)):
            run("losetup", "-c", device)

    def create_snapshot(self, snapshot: Any) -> None:
        run("cp", "--sparse=always", self.path(snapshot.volume), self.path(snapshot))

    def delete_snapshot(self, snapshot: Any) -> None:
        os.unlink(self.path(snapshot))

    def ensure_export(self, context: Any, volume: Any) -> None:
        pass

    def create_export(self, context: Any, volume: Any, connector: Any) -> None:
        pass

    def remove_export(self, context: Any, volume: Any) -> None:
        pass

    def initialize_connection(self, volume: Any, connector: Any) -> dict[str, Any]:
        path = self.path(volume)
        if self.configuration.loop_file_devices:
            found = self.devices(path)
            path = found[0] if found else run("losetup", "-f", "--show", path).strip()
        return {"driver_volume_type": "local", "data": {"device_path": path}}

    def terminate_connection(self, volume: Any, connector: Any, **named: Any) -> None:
        others = [each for each in volume.volume_attachment if each.attach_status == "attached"]
        if len(others) <= 1:
            self.let_go(volume)

    def let_go(self, volume: Any) -> None:
        for device in self.devices(self.path(volume)):
            run("losetup", "-d", device)
