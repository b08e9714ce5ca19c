"""How the Cinder driver speaks to Cinder: who it acts for, one method for each request, and waiting for states.

All is block storage API v3 (https://docs.openstack.org/api-ref/block-storage/v3/). Microversion 3.54 is the newest
that is needed: attachments of their own (3.27) that are completed (3.44) and have a mode (3.54), and volumes that are
extended while they are attached (3.42).
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final
from urllib.parse import urlencode

from imagestore.driver import Timeouts, Usage, require
from imagestore.errors import (
    ConfigurationError,
    InUse,
    LimitExceeded,
    MissingDependency,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
)

__all__ = ["Api", "Endpoint", "Login", "Volume", "Web", "meaning", "text_of"]

GIB: Final = 1024 * 1024 * 1024
MICROVERSION: Final = "3.54"
_FIRST_POLL: Final = 0.1
_LONGEST_POLL: Final = 2.0
# With RBD one takes a quarter of a minute if it is refused, and a dead client counts for twice as long.
_DELETES: Final = 4
_MOVING: Final = frozenset({"creating", "deleting", "extending", "detaching"})
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_ALLOWED: Final = frozenset({errno.EPERM, errno.EACCES, errno.EROFS})

Volume = Mapping[str, Any]
"""A volume as the API shows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Which endpoint of a catalog is Cinder's; ``template`` takes the place of all of them."""

    service_type: str = "volumev3"
    service_name: str | None = None
    interface: str = "publicURL"
    region: str | None = None
    template: str | None = None

    def of(self, project: str | None) -> str | None:
        """The template filled in, for who acts for ``project``."""
        if self.template is None:
            return None
        for name in ("%(project_id)s", "%(tenant_id)s", "%(tenant)s"):
            if name in self.template and not project:
                raise Unauthenticated("the auth is for no project, and the option endpoint_template needs one")
        filled = self.template
        for name in ("%(project_id)s", "%(tenant_id)s", "%(tenant)s"):
            filled = filled.replace(name, project or "")
        return filled

    def missing(self) -> ConfigurationError:
        region = f" in region {self.region}" if self.region else ""
        return ConfigurationError(
            f"the catalog has no {self.interface} endpoint of type {self.service_type}{region}: see the options "
            "catalog_info, region and endpoint_template"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Login:
    """The service's own credentials: a password, an application credential, or for a Cinder without Keystone none."""

    auth_url: str = ""
    user: str = ""
    password: str = ""
    user_domain: str = "Default"
    project_name: str = ""
    project_domain: str = "Default"
    credential_id: str = ""
    credential_secret: str = ""
    noauth_project: str = ""

    def __repr__(self) -> str:
        return f"Login({self.user or self.credential_id or self.noauth_project})"


class Web:
    """Connections, shared by all that one driver acts for. Tokens are kept by each one's own session."""

    def __init__(self, endpoint: Endpoint, cacert: str | None, timeouts: Timeouts) -> None:
        self._endpoint = endpoint
        self._verify: str | bool = cacert or True
        self._timeouts = timeouts
        self._sessions = require("keystoneauth1.session", extra="cinder")
        self._clients = require("cinderclient.client", extra="cinder")
        self._http = self._sessions.Session(verify=self._verify).session
        # What one user is given must not come back with another one's requests.
        self._http.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def close(self) -> None:
        self._http.close()

    def own(self, login: Login) -> Any:
        """A client with the service's credentials."""
        if login.noauth_project:
            # What Cinder takes with auth_strategy=noauth: https://docs.openstack.org/cinder/latest/contributor/
            return self._with_token(f"imagestore:{login.noauth_project}", login.noauth_project, ())
        identity = require("keystoneauth1.identity.v3", extra="cinder")
        if login.credential_id:
            plugin = identity.ApplicationCredential(
                login.auth_url,
                application_credential_id=login.credential_id,
                application_credential_secret=login.credential_secret,
            )
        else:
            plugin = identity.Password(
                login.auth_url,
                username=login.user,
                password=login.password,
                user_domain_name=login.user_domain,
                project_name=login.project_name,
                project_domain_name=login.project_domain,
            )
        return self._with_plugin(plugin)

    def bound(self, auth: Any) -> Any:
        """A client that acts for one user: a keystoneauth session, or a context with ``auth_token``."""
        if callable(getattr(auth, "get_token", None)):
            plugin = getattr(auth, "auth", None)
            if plugin is None:
                raise Unauthenticated("the session that was passed to bind has no auth")
            return self._with_plugin(plugin)
        token = getattr(auth, "auth_token", None)
        if not token:
            raise Unauthenticated("the auth that was passed to bind has no auth_token")
        return self._with_token(token, getattr(auth, "project_id", None), getattr(auth, "service_catalog", None) or ())

    def _with_token(self, token: str, project: str | None, catalog: Iterable[Mapping[str, Any]]) -> Any:
        url = self._endpoint.of(project) or self._from_catalog(list(catalog))
        plugins = require("keystoneauth1.token_endpoint", extra="cinder")
        return self._client(plugins.Token(url, token), url)

    def _from_catalog(self, entries: list[Mapping[str, Any]]) -> str:
        catalogs = require("keystoneauth1.access.service_catalog", extra="cinder")
        # In version 2, which services pass on to each other, one entry holds the URLs of all interfaces.
        third = any("interface" in each for entry in entries for each in entry.get("endpoints", ()))
        catalog = (catalogs.ServiceCatalogV3 if third else catalogs.ServiceCatalogV2)(entries)
        urls = catalog.get_urls(
            service_type=self._endpoint.service_type,
            service_name=self._endpoint.service_name,
            interface=self._endpoint.interface,
            region_name=self._endpoint.region,
        )
        if not urls:
            raise self._endpoint.missing()
        return str(urls[0])

    def _with_plugin(self, plugin: Any) -> Any:
        if self._endpoint.template is None:
            return self._client(plugin, None)
        project = self._session(plugin).get_project_id() if "%(" in self._endpoint.template else None
        return self._client(plugin, self._endpoint.of(project))

    def _session(self, plugin: Any) -> Any:
        # A redirect would take the token to whatever server it names.
        return self._sessions.Session(
            auth=plugin, session=self._http, verify=self._verify, timeout=self._timeouts.stall, redirect=False
        )

    def _client(self, plugin: Any, url: str | None) -> Any:
        return self._clients.Client(
            MICROVERSION,
            session=self._session(plugin),
            service_type=self._endpoint.service_type,
            service_name=self._endpoint.service_name,
            interface=self._endpoint.interface,
            region_name=self._endpoint.region,
            endpoint_override=url,
            retries=0,
        )


class Api:
    """Cinder for one project: a method is one request, but for lists that are long and for those that wait.

    Args:
        client: a cinderclient. Only its connection is used: its managers would keep lists of ids in files.
        patience: seconds after which a state that does not come counts as stalled.
    """

    def __init__(self, client: Any, patience: float) -> None:
        self._http = client.client
        self._patience = patience

    def _ask(self, method: str, path: str, body: Any = None, *, refused: type[StoreError] = StoreError) -> Any:
        """The answer's body. ``refused`` is the error of a request that does not fit the state of things."""
        values = {} if body is None else {"body": body}
        try:
            _, told = getattr(self._http, method)(path, **values)
        except Exception as error:
            found = refused(f"Cinder refuses it: {text_of(error)}") if _is(error, "BadRequest") else meaning(error)
            if found is None:
                raise
            raise found from error
        return told

    # Volumes

    def volume(self, volume_id: str) -> Volume:
        """Raises `NotFound`."""
        found: Volume = self._ask("get", f"/volumes/{volume_id}")["volume"]
        return found

    def volumes(self, **metadata: str) -> Iterator[Volume]:
        """All volumes of the project, or those with this metadata (which the server may compare without case).

        Raises `Unavailable` if one at the end of a page was deleted meanwhile.
        """
        query = {"metadata": repr(metadata)} if metadata else {}
        found: list[Volume] = []
        while True:
            try:
                told = self._ask("get", f"/volumes/detail?{urlencode(query)}")
            except NotFound as error:
                raise Unavailable("a volume went away while all were listed") from error
            found += told["volumes"]
            if not told.get("volumes_links"):
                break
            query["marker"] = found[-1]["id"]
        return (volume for volume in found if metadata.items() <= volume["metadata"].items())

    def create(self, gib: int, name: str, metadata: Mapping[str, str], volume_type: str | None) -> Volume:
        wanted = {"size": gib, "name": name, "metadata": dict(metadata)}
        if volume_type is not None:
            wanted["volume_type"] = volume_type
        made: Volume = self._ask("post", "/volumes", {"volume": wanted})["volume"]
        return made

    def protect(self, volume_id: str) -> None:
        """Let nobody attach it for writing. The volume must be available."""
        self._ask("post", f"/volumes/{volume_id}/action", {"os-update_readonly_flag": {"readonly": True}})

    def set_metadata(self, volume_id: str, metadata: Mapping[str, str]) -> Mapping[str, str]:
        """Add to the metadata; all that there are then."""
        told = self._ask("post", f"/volumes/{volume_id}/metadata", {"metadata": dict(metadata)})
        found: Mapping[str, str] = told["metadata"]
        return found

    def unset_metadata(self, volume_id: str, key: str) -> None:
        """Take one away; one that is gone already is as good."""
        with contextlib.suppress(NotFound):
            self._ask("delete", f"/volumes/{volume_id}/metadata/{key}")

    def publish(self, volume_id: str, name: str, metadata: Mapping[str, str]) -> None:
        """Name and all metadata anew, in one request."""
        self._ask("put", f"/volumes/{volume_id}", {"volume": {"name": name, "metadata": dict(metadata)}})

    def extend(self, volume_id: str, gib: int) -> None:
        self._ask("post", f"/volumes/{volume_id}/action", {"os-extend": {"new_size": gib}})

    def delete(self, volume_id: str) -> None:
        """Begin to delete. Raises `InUse` if it is attached or has snapshots."""
        self._ask("delete", f"/volumes/{volume_id}", refused=InUse)

    def types(self) -> list[str]:
        """Names and ids of all volume types that the project may use."""
        return [text for each in self._ask("get", "/types")["volume_types"] for text in (each["name"], each["id"])]

    def usage(self) -> Usage:
        """The project's quota in bytes; nothing of what has no limit."""
        told = self._ask("get", "/limits")["limits"]["absolute"]
        used, total = told["totalGigabytesUsed"] * GIB, told["maxTotalVolumeGigabytes"] * GIB
        return Usage(used=used) if total < 0 else Usage(used=used, total=max(used, total), free=max(0, total - used))

    # Attachments

    def reserve(self, volume_id: str, mode: str) -> str:
        """The id of a new attachment, which does nothing yet but keep others from the volume.

        Raises `Unavailable` while something else has the volume and Cinder allows no second one.
        """
        wanted = {"volume_uuid": volume_id, "mode": mode}
        made: str = self._ask("post", "/attachments", {"attachment": wanted}, refused=Unavailable)["attachment"]["id"]
        return made

    def export(self, attachment_id: str, connector: Mapping[str, Any]) -> Mapping[str, Any]:
        """Let the backend give the volume to this host: how to connect it (``connection_info``)."""
        told = self._ask("put", f"/attachments/{attachment_id}", {"attachment": {"connector": dict(connector)}})
        info: Mapping[str, Any] = told["attachment"]["connection_info"]
        return info

    def complete(self, attachment_id: str) -> None:
        self._ask("post", f"/attachments/{attachment_id}/action", {"os-complete": None})

    def detach(self, attachment_id: str) -> None:
        """Remove an attachment; one that is gone already is as good."""
        with contextlib.suppress(NotFound):
            self._ask("delete", f"/attachments/{attachment_id}")

    def attachments(self, volume_id: str) -> list[str]:
        """Ids of all attachments of a volume, in whatever state."""
        found = self._ask("get", f"/attachments?{urlencode({'volume_id': volume_id})}")["attachments"]
        return [each["id"] for each in found if each["volume_id"] == volume_id]

    # Waiting

    def settled(self, volume_id: str, seen: Volume | None = None, *, moving: Collection[str] = _MOVING) -> Volume:
        """Wait until the volume is in none of the states that pass by themselves. ``seen``: it was just asked for.

        Raises:
            StoreTimeout: it stayed in one of them.
        """
        end = time.monotonic() + self._patience
        wait = _FIRST_POLL
        volume = seen or self.volume(volume_id)
        while volume["status"] in moving:
            if time.monotonic() + wait > end:
                raise StoreTimeout(f"volume {volume_id} is still {volume['status']} after {self._patience:.0f} s")
            time.sleep(wait)
            wait = min(1.5 * wait, _LONGEST_POLL)
            volume = self.volume(volume_id)
        return volume

    def ready(self, volume_id: str, seen: Volume | None = None) -> Volume:
        """Wait until the volume is available.

        Raises:
            StoreFull: Cinder found no room for it, or could not extend it.
            Unavailable: it is in another state.
        """
        volume = self.settled(volume_id, seen)
        status = volume["status"]
        if status == "available":
            return volume
        if status in ("error", "error_extending"):
            raise StoreFull(f"Cinder could not make room: volume {volume_id} is in the state {status}")
        raise Unavailable(f"volume {volume_id} is {status}, not available")

    def remove(self, volume_id: str, seen: Volume | None = None) -> None:
        """Delete a volume and wait until it is gone. One that is gone already is as good.

        A backend that still sees a client, which may be a dead one, gives a volume back as available, without an
        error.

        Raises:
            InUse: it is attached, has snapshots, or comes back again and again.
            Unavailable: Cinder failed to delete it.
        """
        with contextlib.suppress(NotFound):
            volume = self.settled(volume_id, seen)
            for _ in range(_DELETES):
                if volume["status"] == "error_deleting":
                    raise Unavailable(f"Cinder failed to delete volume {volume_id}", temporary=False)
                self.delete(volume_id)
                volume = self.settled(volume_id, {"status": "deleting"})
            raise InUse("a client has it open: the backend does not delete it")


def _is(error: BaseException, name: str) -> bool:
    """Whether an error is of a class of that name, which need not be imported for it."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def text_of(error: BaseException) -> str:
    """What an error says, on one line. What is said for people is at another place in each library's errors."""
    kept = getattr(error, "kwargs", None)
    told = (kept.get("msg") if isinstance(kept, dict) else getattr(error, "message", None)) or error
    return " ".join(str(told).split())[:400]


def meaning(error: BaseException) -> StoreError | None:
    """The error of ours that one of cinderclient, keystoneauth, os-brick or a device means."""
    if isinstance(error, StoreError):
        return error
    family = type(error).__module__.partition(".")[0]
    if family == "cinderclient":
        return _of_cinder(error)
    if family == "keystoneauth1":
        return _of_keystone(error)
    if _is(error, "FailedToDropPrivileges"):
        return PermissionDenied(f"os-brick may not become root: see the option root_helper ({text_of(error)})")
    if _is(error, "RequiredOptError"):
        return ConfigurationError(f"os-brick has no directory for its lock files: see the option lock_path ({error})")
    if family == "os_brick" and "module required" in text_of(error):
        return MissingDependency(
            "the Python modules rados and rbd are not installed: install python3-rados, python3-rbd"
        )
    if family in ("os_brick", "oslo_privsep", "oslo_concurrency"):
        return Unavailable(f"the volume can't be connected to this host: {type(error).__name__}: {text_of(error)}")
    return _of_device(error, family)


def _of_cinder(error: BaseException) -> StoreError | None:
    code, said = getattr(error, "code", None), text_of(error)
    if _is(error, "VersionNotFoundForAPIMethod") or code == 406:
        return ConfigurationError(f"this Cinder does not know microversion {MICROVERSION} of its API")
    if code == 401:
        return Unauthenticated("Cinder does not accept the token")
    if code == 403:
        return PermissionDenied(f"Cinder does not allow it: {said}")
    if code == 404:
        return NotFound(f"Cinder knows no such thing: {said}")
    if code in (413, 429):
        wait = getattr(error, "retry_after", 0) or 0
        if wait or code == 429:
            return RateLimited("Cinder asks to slow down", retry_after=float(wait) or None)
        limit = "maximum allowed limit" in said or "per_volume" in said
        return (LimitExceeded if limit else StoreFull)(f"the quota does not allow it: {said}")
    if isinstance(code, int) and (code >= 500 or code in (408, 409)):
        return Unavailable(f"Cinder failed with {code}: {said}")
    return StoreError(f"Cinder refuses it: {said or type(error).__name__}")


def _of_keystone(error: BaseException) -> StoreError | None:
    status, said = getattr(error, "http_status", None), text_of(error)
    if _is(error, "SSLError") or _is(error, "SSLFailure"):
        return ConfigurationError("the server's certificate can't be verified: see the option cacert")
    if _is(error, "ConnectTimeout") or status == 408:
        return StoreTimeout("Cinder, or Keystone, stopped answering")
    if _is(error, "ConnectionError"):
        return Unavailable(f"Cinder, or Keystone, can't be reached: {type(error).__name__}")
    if status == 401 or _is(error, "MissingAuthPlugin") or _is(error, "AuthorizationFailure"):
        return Unauthenticated("Keystone does not accept the credentials: see the options user, password, project_name")
    if status == 403:
        return PermissionDenied(f"Keystone does not allow it: {said}")
    if status == 429:
        return RateLimited("Keystone asks to slow down")
    if isinstance(status, int) and status >= 500:
        return Unavailable(f"Keystone failed with {status}")
    return ConfigurationError(f"Keystone can't be used: {type(error).__name__}: {said}")


def _of_device(error: BaseException, family: str) -> StoreError | None:
    """A volume's device: a file, or librbd, whose errors have the numbers of the system's."""
    if isinstance(error, OSError) or family in ("rbd", "rados"):
        number = abs(getattr(error, "errno", None) or 0)
        if number in _NO_ROOM:
            return StoreFull("the volume's backend has no space left")
        if number in _NOT_ALLOWED:
            return PermissionDenied(f"this process may not use the volume's device: {text_of(error)}")
        return Unavailable(f"the volume's device failed: {type(error).__name__}: {text_of(error)}")
    if isinstance(error, ValueError) and "endpoint" in str(error):
        return ConfigurationError("the catalog has no such region: see the option region")
    return None
