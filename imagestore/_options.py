"""Glance's option names and what became of each: kept, ignored or refused.

Data only. `imagestore.config` reads options by it, and the migration page is generated from it. The names are those
of glance_store 5.7.0, and for Sheepdog and GridFS those of the last release that had them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

MIB: Final = 1024 * 1024

SWIFT_MB: Final = 1000 * 1024
"""What Glance's Swift options call a megabyte, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OldOption:
    """A Glance option.

    Attributes:
        name: as it stands in a ``glance-api.conf``.
        fate: ``kept``: read as the option `to`. ``ignored``: accepted, does nothing, for `reason`. ``refused``: an
            error at load, and `reason` says what to do instead.
        to: our option.
        reason: why it is ignored, or what to write instead.
        convert: for a kept option whose values are written differently: old text to new text, or to None if the old
            text means "not set". Raises ValueError with a text that does not repeat the value.
        harmless: for a refused option: values (lower case) that ask for nothing that is refused.
    """

    name: str
    fate: Literal["kept", "ignored", "refused"]
    to: str = ""
    reason: str = ""
    convert: Callable[[str], str | None] | None = None
    harmless: frozenset[str] = frozenset()


def _kept(name: str, to: str, convert: Callable[[str], str | None] | None = None) -> OldOption:
    return OldOption(name=name, fate="kept", to=to, convert=convert)


def _ignored(name: str, reason: str) -> OldOption:
    return OldOption(name=name, fate="ignored", reason=reason)


def _insecure(name: str, instead: str) -> OldOption:
    return OldOption(
        name=name,
        fate="refused",
        reason=f"certificates are always verified; {instead}",
        harmless=frozenset({"", "false", "0", "no", "off"}),
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    raise ValueError("must be a whole number")


def _octal(text: str) -> str | None:
    """Decimal digits that are read as octal; 0 leaves the mode alone."""
    digits = str(_whole(text))
    if digits == "0":
        return None
    if set(digits) <= set("01234567"):
        return digits.zfill(4)
    raise ValueError("must be octal digits such as 640")


def _times(unit: int) -> Callable[[str], str]:
    """A count of ``unit`` bytes in bytes."""

    def convert(text: str) -> str:
        return str(_whole(text) * unit)

    return convert


def _power_of_two(text: str) -> str:
    """A number of MiB in bytes; Glance takes the next lower power of two."""
    size = _whole(text) * MIB
    if size <= 0:
        raise ValueError("must be at least 1")
    return str(1 << (size.bit_length() - 1))


def _seconds(text: str) -> str | None:
    """Below 0: the library's own; 0: for ever, which no wait may last here. Both become our default."""
    seconds = _whole(text)
    return str(seconds) if seconds > 0 else None


_RETRIES: Final = "temporary errors are retried for all stores alike: [imagestore] retry_attempts, retry_total"
_WORKERS: Final = "all stores have as many threads as [imagestore] workers says"
_BLOCKS: Final = "the length of blocks follows from the size of the image and the limits of the backend"
_CHECKSUMS: Final = "every part is sent with its digest, and the backend's answer is compared"

_CERTIFICATE: Final = "name the authority's certificate with cacert, or the server's own with certificate"

COMMON: Final[tuple[OldOption, ...]] = (_kept("store_description", "description"),)
"""Options of every store. ``weight`` has kept its name."""

OLD_OPTIONS: Final[Mapping[str, tuple[OldOption, ...]]] = MappingProxyType(
    {
        "file": (
            _kept("filesystem_store_datadir", "datadir"),
            _kept("filesystem_store_datadirs", "datadirs"),
            _kept("filesystem_store_file_perm", "file_mode", _octal),
            _kept("filesystem_thin_provisioning", "sparse"),
            _ignored("filesystem_store_chunk_size", _BLOCKS),
            _ignored(
                "filesystem_store_metadata_file",
                "locations carry no metadata here; a host that shows mount points reads that file itself",
            ),
            _ignored(
                "filesystem_store_timeout",
                "a system call on a file that hangs can't be broken off, only left behind; mount NFS with soft,timeo",
            ),
            _ignored("filesystem_store_thread_pool_size", _WORKERS),
            _ignored("filesystem_store_threadpool_threshold", _WORKERS),
        ),
        "http": (
            _kept("https_ca_certificates_file", "cacert"),
            _insecure("https_insecure", "name the authority's certificate with cacert, or remove the option"),
            _kept("http_proxy_information", "proxies"),
        ),
        "swift": (
            _insecure("swift_store_auth_insecure", "name the authority's certificate with cacert"),
            _kept("swift_store_cacert", "cacert"),
            _kept("swift_store_region", "region"),
            _kept("swift_store_endpoint", "endpoint"),
            _kept("swift_store_endpoint_type", "endpoint_type"),
            _kept("swift_store_service_type", "service_type"),
            _kept("swift_store_container", "container"),
            _ignored("swift_store_large_object_size", "every image longer than one segment is stored in segments"),
            _kept("swift_store_large_object_chunk_size", "segment_size", _times(SWIFT_MB)),
            _kept("swift_store_create_container_on_put", "create_container"),
            _kept("swift_store_multi_tenant", "multi_tenant"),
            _kept("swift_store_multiple_containers_seed", "containers_seed"),
            _kept("swift_store_admin_tenants", "admin_projects"),
            _ignored("swift_store_ssl_compression", "TLS is never compressed"),
            _ignored("swift_store_retry_get_count", _RETRIES),
            _ignored("swift_store_expire_soon_interval", "tokens are renewed before they expire"),
            _ignored(
                "swift_store_use_trusts",
                "no trusts are made: for transfers longer than a token lives pass a keystoneauth session to bind",
            ),
            _ignored(
                "swift_buffer_on_upload", "a segment is kept in memory until it is stored, and sent again from there"
            ),
            _ignored("swift_upload_buffer_dir", "nothing is buffered on disk"),
            _kept("default_swift_reference", "reference"),
            _kept("swift_store_config_file", "accounts_file"),
            _kept("swift_store_auth_version", "auth_version"),
            _kept("swift_store_auth_address", "auth_url"),
            _kept("swift_store_user", "user"),
            _kept("swift_store_key", "key"),
            _kept("swift_store_application_credential_id", "application_credential_id"),
            _kept("swift_store_application_credential_secret", "application_credential_secret"),
            _kept("swift_store_project_name", "project_name"),
            _kept("swift_store_project_id", "project_id"),
        ),
        "rbd": (
            _kept("rbd_store_chunk_size", "object_size", _power_of_two),
            _kept("rbd_store_pool", "pool"),
            _kept("rbd_store_user", "user"),
            _kept("rbd_store_ceph_conf", "ceph_conf"),
            _kept("rados_connect_timeout", "connect_timeout", _seconds),
            _kept("rbd_thin_provisioning", "sparse"),
        ),
        "cinder": (
            _kept("cinder_catalog_info", "catalog_info"),
            _kept("cinder_endpoint_template", "endpoint_template"),
            _kept("cinder_os_region_name", "region"),
            _kept("os_region_name", "region"),
            _kept("cinder_ca_certificates_file", "cacert"),
            _ignored("cinder_http_retries", _RETRIES),
            _kept("cinder_state_transition_timeout", "state_timeout"),
            _insecure("cinder_api_insecure", "name the authority's certificate with cacert"),
            _kept("cinder_store_auth_address", "auth_url"),
            _kept("cinder_store_user_name", "user"),
            _kept("cinder_store_user_domain_name", "user_domain"),
            _kept("cinder_store_password", "password"),
            _kept("cinder_store_application_credential_id", "application_credential_id"),
            _kept("cinder_store_application_credential_secret", "application_credential_secret"),
            _kept("cinder_store_project_name", "project_name"),
            _kept("cinder_store_project_domain_name", "project_domain"),
            _kept("rootwrap_config", "root_helper", lambda text: f"sudo glance-rootwrap {text}"),
            _kept("cinder_volume_type", "volume_type"),
            _kept("cinder_enforce_multipath", "enforce_multipath"),
            _kept("cinder_use_multipath", "use_multipath"),
            _kept("cinder_mount_point_base", "mount_base"),
            _kept("cinder_do_extend_attached", "extend_attached"),
            _ignored("cinder_attachment_retry_attempts", _RETRIES),
        ),
        "s3": (
            _kept("s3_store_host", "endpoint"),
            _kept("s3_store_region_name", "region"),
            _kept("s3_store_access_key", "access_key"),
            _kept("s3_store_secret_key", "secret_key"),
            _kept("s3_store_bucket", "bucket"),
            _kept("s3_store_create_bucket_on_put", "create_bucket"),
            _kept("s3_store_bucket_url_format", "addressing"),
            _ignored("s3_store_large_object_size", "every image longer than one part is stored in parts"),
            _ignored("s3_store_large_object_chunk_size", _BLOCKS),
            _ignored("s3_store_thread_pools", _WORKERS),
            _kept("s3_store_cacert", "cacert"),
            _ignored("s3_store_enable_data_integrity_protection", _CHECKSUMS),
            _ignored("s3_store_request_checksum_calculation", _CHECKSUMS),
            _ignored("s3_store_response_checksum_validation", _CHECKSUMS),
        ),
        "vmware": (
            _kept("vmware_server_host", "host"),
            _kept("vmware_server_username", "user"),
            _kept("vmware_server_password", "password"),
            _ignored("vmware_api_retry_count", _RETRIES),
            _kept("vmware_task_poll_interval", "task_interval"),
            _kept("vmware_store_image_dir", "image_dir"),
            _insecure("vmware_insecure", _CERTIFICATE),
            _insecure("vmware_api_insecure", _CERTIFICATE),
            _kept("vmware_ca_file", "cacert"),
            _kept("vmware_datastores", "datastores"),
        ),
        "sheepdog": (
            _ignored("sheepdog_store_chunk_size", "data are stored in the cluster's own objects"),
            _kept("sheepdog_store_port", "port"),
            _kept("sheepdog_store_address", "host"),
        ),
        "gridfs": (
            _kept("mongodb_store_uri", "uri"),
            _kept("mongodb_store_db", "database"),
        ),
    }
)


def old_options(driver: str) -> tuple[OldOption, ...]:
    """The Glance options that a store of the type ``driver`` understands."""
    return COMMON + OLD_OPTIONS.get(driver, ())
