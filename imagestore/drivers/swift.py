"""Images in OpenStack Swift, and in what speaks its API, such as Ceph's gateway.

An image is the object ``<container>/<image id>``. One of a single block is a plain object. A longer one is a static
large object (SLO): its blocks are segments ``<prefix>/<token>/<number>`` in the same container, and the object is the
manifest that lists each with size and ETag. Where more segments are needed than a manifest may list, and the server
allows it, the manifest lists manifests. Dynamic large objects, which Glance writes, are read and deleted.
(https://docs.openstack.org/swift/latest/overview_large_objects.html)

**An upload** has a mark, the object ``<prefix>/marks/<token>``, which `create` writes before the first segment. Only
an image that is known to be one block needs none: its one PUT stores everything or nothing.

**Commit** puts the object with ``If-None-Match: *``, and then the claim ``<prefix>/marks/<token>.claim`` in the same
way. Whoever discards an upload puts that claim first. So one of the two gets it, and the other one gives way: a commit
that comes second takes its object back. The claim of a discarded upload expires by itself after a day. Servers that do
not know ``If-None-Match`` are found out by asking them for something that those who do know it refuse; for them the
same is done by looking first.

Swift has no step that only one can take: it looks for an object before it takes the body of another, and of two that
arrive in one moment it stores both, one after the other. So whoever has stored looks again, and gives way if something
else is there. Two can win only if one of them comes in between the other's check and its storing, and is looked at
before that: hence ``detected``.

**Delete** marks, removes the visible name, and then the segments. What a cut leaves is a marked leftover.

**Locations** are Glance's. ``swift+config://<reference>/<container>/<image id>`` where an accounts file is configured;
else ``swift+http(s)://<auth_url>/<container>/<image id>``. With ``multi_tenant`` every image has a container
``<container>_<image id>`` in its user's account, and is at ``swift+http(s)://<storage URL>/<container>/<image id>``.
No location holds credentials, and none of those that once were in a location is used.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from oslo_config import cfg

from imagestore.driver import (
    IMAGE_ID,
    Block,
    Capabilities,
    Chunks,
    Driver,
    Hints,
    Leftover,
    Location,
    Reading,
    Stat,
    StoredImage,
    Upload,
    Usage,
    require,
)
from imagestore.drivers._swift_account import (
    ACCOUNT_KEYS,
    BoundLogin,
    Client,
    Credentials,
    Stream,
    Where,
    Wires,
    absolute,
    client_of,
    failure,
    read_accounts,
)
from imagestore.drivers._swift_objects import (
    META,
    NESTED,
    Container,
    Facts,
    describe,
    encode_metadata,
    error_of,
    etag_of,
    is_static,
    json_object,
    moment_of,
    no_container,
    pages,
    token_of,
)
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    DigestMismatch,
    IntegrityError,
    InvalidLocation,
    NotFound,
    SizeMismatch,
    StoreError,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

__all__ = ["SwiftDriver"]

_CHUNK: Final = 256 * 1024
_MIB: Final = 1024 * 1024
_COPY_PIECE: Final = 64 * _MIB
_CONTAINER: Final = re.compile(r"[^/?#%@\x00-\x1f\x7f-\x9f\s]{1,256}")
_PREFIX: Final = re.compile(r"\.[A-Za-z0-9._-]{1,60}")
_REFERENCE: Final = re.compile(r"[^/?#%@:\x00-\x1f\x7f-\x9f\s]{1,200}")
_ADDRESS: Final = re.compile(r"[^/?#@\x00-\x20\x7f-\x9f]+(?:/[^?#@\x00-\x20\x7f-\x9f]*)?")
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)")
_DLO_SEGMENT: Final = re.compile(r"(.+)-[0-9]{5}")


class SwiftDriver(Driver):
    """Images in OpenStack Swift. See the module for how."""

    name = "swift"
    schemes = ("swift+https", "swift", "swift+http", "swift+config")
    options = (
        cfg.StrOpt(
            "auth_url",
            help=(
                "Where to log in: the URL of Keystone v3, or of an authentication server of version 1 (tempauth, "
                "Ceph: http://host/auth/v1.0). Without a scheme it is https."
            ),
        ),
        cfg.StrOpt(
            "auth_version",
            default="3",
            choices=[("3", "Keystone v3"), ("1", "tempauth, and Ceph's gateway")],
            help="How to log in.",
        ),
        cfg.StrOpt("user", help="User, as project:user, or without the project where project_name is set."),
        cfg.StrOpt("key", secret=True, help="The user's password."),
        cfg.StrOpt("project_name", help="Project of the user."),
        cfg.StrOpt("project_id", help="Id of the user's project; takes the place of its name."),
        cfg.StrOpt("user_domain_id", help="Domain of the user; 'default' if neither id nor name is set."),
        cfg.StrOpt("user_domain_name", help="Name of the domain of the user."),
        cfg.StrOpt("project_domain_id", help="Domain of the project; 'default' if neither id nor name is set."),
        cfg.StrOpt("project_domain_name", help="Name of the domain of the project."),
        cfg.StrOpt("application_credential_id", help="Application credential, in place of user and key."),
        cfg.StrOpt("application_credential_secret", secret=True, help="The application credential's secret."),
        cfg.StrOpt(
            "accounts_file",
            help=(
                "INI file with a section for each account, in the form of Glance's swift_store_config_file: "
                "auth_address with user and key, or with application_credential_id and application_credential_secret. "
                "Locations then name the section, and images of all sections can be read and deleted. Set this or "
                "auth_url, not both."
            ),
        ),
        cfg.StrOpt("reference", default="ref1", help="The section of accounts_file that new images go to."),
        cfg.StrOpt("region", help="Region of the endpoint; any if not set."),
        cfg.StrOpt(
            "endpoint",
            help="Storage URL, up to but without the container. It takes the place of what the login or catalog says.",
        ),
        cfg.StrOpt(
            "endpoint_type",
            default="publicURL",
            choices=["publicURL", "internalURL", "adminURL"],
            help="Which of the catalog's interfaces to use.",
        ),
        cfg.StrOpt("service_type", default="object-store", help="Type of the service in the catalog."),
        cfg.StrOpt(
            "cacert",
            help=(
                "File with the certificates, in PEM, of the authorities to trust in place of the usual ones. "
                "Certificates are always verified."
            ),
        ),
        cfg.StrOpt(
            "container",
            default="glance",
            help="Container of the images; with containers_seed or multi_tenant what the containers' names begin with.",
        ),
        cfg.IntOpt(
            "containers_seed",
            default=0,
            min=0,
            max=32,
            help=(
                "Spread the images over containers named container_ and so many of the first digits of the image id "
                "(dashes are kept and not counted). 0: one container."
            ),
        ),
        cfg.IntOpt(
            "segment_size",
            min=1,
            help=(
                "Longest segment, in bytes. Without it segments are 8 MiB, or as long as the image needs where the "
                "server allows few; with it, an image that would need longer ones is refused."
            ),
        ),
        cfg.BoolOpt("create_container", default=False, help="Create containers that are missing."),
        cfg.BoolOpt(
            "multi_tenant",
            default=False,
            help=(
                "Keep every image in the account of the user whose call it is, in a container of its own. Needs "
                "store.bind(auth); the options for logging in have no meaning then."
            ),
        ),
        cfg.ListOpt(
            "admin_projects",
            default=[],
            help="Ids of projects that may write every image whose access is set; with multi_tenant only.",
        ),
        cfg.StrOpt(
            "prefix",
            default=".imagestore",
            help=(
                "What the names of segments and marks begin with; a dot comes first, so that none can be an image's. "
                "Stores that share a container must agree on it."
            ),
        ),
        cfg.ListOpt(
            "accept_locations",
            default=[],
            help=(
                "Further places whose images may be read and deleted by location, each a location up to the container: "
                "swift+https://former-auth-address/v3/container or swift+config://reference/container. A star at the "
                "end of the container stands for any rest. What is there is looked for with the credentials of this "
                "store (or of that reference, with an accounts file); the address is never connected to."
            ),
        ),
        cfg.StrOpt(
            "temp_url_key",
            secret=True,
            help="Key that signs temporary URLs. If it is not set, the account's own is used where it may be read.",
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        self._multi: bool = settings.multi_tenant
        self._base: str = settings.container
        self._prefix: str = settings.prefix
        self._seed: int = settings.containers_seed
        # Swift's names have 256 bytes, and where there are many containers the image id may be in them.
        longest = 55 if self._multi or self._seed else 256
        if not _CONTAINER.fullmatch(self._base) or self._base in (".", "..") or len(self._base.encode()) > longest:
            raise self.invalid_option(
                "container", f"it has 1 to {longest} characters without blanks and without / ? # % @"
            )
        if not _PREFIX.fullmatch(self._prefix) or ".." in self._prefix:
            raise self.invalid_option("prefix", "a dot, and then letters, digits, dots, dashes and underscores")
        self._where = Where(
            service_type=settings.service_type,
            endpoint_type=settings.endpoint_type,
            region=settings.region or None,
            override=self._check_url("endpoint", settings.endpoint),
        )
        # The section of the accounts file that is this store's own; there is but one account without.
        self._reference: str = settings.reference if settings.accounts_file else ""
        self._credentials = self._read_credentials()
        self._root = self._own_root()
        self._accepted = [self._read_accepted(text) for text in settings.accept_locations or ()]
        self._bound: Client | None = None

    def _check_url(self, option: str, text: str | None) -> str | None:
        if not text:
            return None
        url = absolute(text)
        scheme, _, rest = url.partition("://")
        if scheme not in ("http", "https") or not _ADDRESS.fullmatch(rest):
            raise self.invalid_option(option, "not an http:// or https:// URL without credentials and query")
        return url

    def _read_credentials(self) -> Credentials | None:
        """What the options say; None where an accounts file or the user does."""
        settings = self.settings
        if self._multi:
            if settings.accounts_file or self._seed:
                raise self.invalid_option("multi_tenant", "can't be set together with accounts_file or containers_seed")
            return None
        if settings.accounts_file:
            if settings.auth_url:
                raise self.invalid_option("accounts_file", "can't be set together with auth_url")
            if not _REFERENCE.fullmatch(settings.reference or ""):
                raise self.invalid_option("reference", "the name of a section, without blanks and without / ? # % @ :")
            return None
        values = {key: getattr(settings, key) for key in ACCOUNT_KEYS}
        credentials = Credentials(auth_url=self._check_url("auth_url", settings.auth_url) or "", **values)
        if problem := credentials.problem():
            raise self.invalid_option(*problem)
        return credentials

    def _own_root(self) -> str:
        """What this store's locations begin with, up to the container."""
        if self._credentials is not None:
            return _location_root(self._credentials.auth_url)
        return f"swift+config://{self.settings.reference}"

    def _read_accepted(self, text: str) -> tuple[str, str, str]:
        """An entry of ``accept_locations`` as root, reference and container pattern."""
        root, slash, container = text.strip().rpartition("/")
        scheme, separator, rest = root.partition("://")
        if self._multi:
            raise self.invalid_option("accept_locations", "has no meaning with multi_tenant")
        if not slash or not separator or scheme.lower() not in self.schemes or not _ADDRESS.fullmatch(rest):
            raise self.invalid_option("accept_locations", "each is swift+https://address/container without credentials")
        name = container.removesuffix("*")
        if "*" in name or not _CONTAINER.fullmatch(name or "x"):
            raise self.invalid_option("accept_locations", "a container has no blanks, and a star only at its end")
        if scheme.lower() == "swift+config":
            return f"swift+config://{rest}", rest if self.settings.accounts_file else "", container
        return _location_root(f"{_web_scheme(scheme)}://{rest}"), self._reference, container

    @property
    def _own(self) -> str:
        """Where new images go: a storage URL with ``multi_tenant``, and a reference else."""
        return self._root if self._multi else self._reference

    # Connecting

    def open(self) -> None:
        """Log in, find out what the server can do, and look for the container.

        Raises:
            ConfigurationError: the container is missing, or the server has no large objects; the message says what
                to do.
        """
        keep = self.limits.workers + 4
        self._wires = Wires(self.settings.cacert or None, self.timeouts, keep)
        self._facts: dict[str, Facts] = {}
        self._clients: dict[str, Client] = {}
        self._lock = threading.Lock()
        try:
            if self._multi:
                # What the server can do is found out when it is known, which is by `bind`.
                self.capabilities = self._capabilities(Facts(conditional=True, segment_min=1))
                return
            self._accounts = self._read_accounts()
            client = self._client(self._reference)
            self.capabilities = self._capabilities(self._facts_of(client))
            if not self._seed:
                self._look_for_container(client)
        except BaseException:
            self.close()
            raise

    def _read_accounts(self) -> dict[str, Credentials]:
        if self._credentials is not None:
            return {"": self._credentials}
        accounts = read_accounts(self.settings.accounts_file)
        if self.settings.reference not in accounts:
            raise self.invalid_option(
                "reference", f"there is no section [{self.settings.reference}] in the accounts file"
            )
        return accounts

    def _look_for_container(self, client: Client) -> None:
        answer = client("HEAD", f"/{quote(self._base)}", ok=(403, 404))
        if answer.status == 404:
            if not self.settings.create_container:
                raise no_container(self._base)
            client("PUT", f"/{quote(self._base)}")

    def close(self) -> None:
        """Give up idle connections. Reads that are open go on."""
        for client in self._clients.values():
            client.close()
        self._wires.close()

    def bind(self, auth: Any, /) -> Driver:
        """A driver that acts for one user, in that user's own account.

        Raises:
            Unsupported: the store is not configured with ``multi_tenant``: it acts for itself.
        """
        if not self._multi:
            raise Unsupported("this store acts for itself only: its option multi_tenant is not set")
        bound = copy.copy(self)
        bound._bound = Client(BoundLogin(auth, self._where), self._wires)
        bound._root = _location_root(bound._bound.storage_url()).removeprefix("swift+")
        bound.capabilities = self._capabilities(self._facts_of(bound._bound))
        return bound

    def _client(self, reference: str) -> Client:
        if self._multi:
            if self._bound is None:
                raise Unauthenticated("this store acts for its users only: use store.bind(auth)")
            return self._bound
        with self._lock:
            client = self._clients.get(reference)
            if client is None:
                credentials = self._accounts.get(reference)
                if credentials is None:
                    raise InvalidLocation(f"there is no section [{reference}] in the accounts file of this store")
                client = client_of(credentials, self._where, self.settings.cacert or None, self._wires, self.timeouts)
                self._clients[reference] = client
            return client

    def _facts_of(self, client: Client) -> Facts:
        """What the server can do; asked once for each server."""
        url = client.storage_url()
        root = url[: url.rindex("/v1")] if "/v1" in urlsplit(url).path else url
        known = self._facts.get(root)
        if known is None:
            known = self._facts[root] = self._ask_facts(client, root)
        return known

    def _ask_facts(self, client: Client, root: str) -> Facts:
        answer = self._wires.of(root).send("GET", f"{urlsplit(root).path}/info", {}, None)
        if answer.status >= 500 or answer.status in (408, 429, 498):
            raise failure(answer)
        told = json_object(answer.body) if answer.status == 200 else {}
        if told and "slo" not in told:
            raise ConfigurationError("this server has no static large objects (the middleware slo)")
        usual = Facts()
        slo = told.get("slo", {})
        # A value that only a server which knows the header finds wrong; those that don't store an empty object.
        probe = f"/{quote(self._base)}/{self._prefix}/probe"
        refused = client("PUT", probe, {"If-None-Match": '"imagestore"'}, ok=(400, 403, 404, 409, 412))
        if refused.status < 300:
            client("DELETE", probe, ok=(404,))
        return Facts(
            segments=int(slo.get("max_manifest_segments", usual.segments)),
            segment_min=max(1, int(slo.get("min_segment_size", 1 if told else usual.segment_min))),
            object_max=int(told.get("swift", {}).get("max_file_size", usual.object_max)),
            bulk_delete="bulk_delete" in told,
            digests=tuple(told.get("tempurl", {}).get("allowed_digests", usual.digests)),
            conditional=refused.status == 400 and b"If-None-Match" in refused.body,
        )

    def _capabilities(self, facts: Facts) -> Capabilities:
        return Capabilities(
            parallel_writes=self.limits.workers,
            block_min=facts.segment_min,
            block_max=max(facts.segment_min, min(facts.object_max, self.settings.segment_size or facts.object_max)),
            blocks_max=facts.segments**2 if facts.conditional else facts.segments,
            repeatable_create=True,
            block_digest="md5",
            # Swift looks whether there is an object before it takes the body, and not again when it stores it.
            collision="detected",
            commit_proof=True,
            needs_auth=self._multi,
        )

    # Locations

    def parse(self, uri: str, /) -> Location:
        """Check a location, as text only. Nothing in it is decoded.

        ``swift://`` is the same as ``swift+https://``. Below an address or a reference that this store is configured
        for come the container and the image id. Of an accounts file every section may be named; that it exists is
        checked when the location is used.

        Raises:
            InvalidLocation: another address, reference or container, or no image id.
        """
        scheme, separator, rest = uri.partition("://")
        scheme = scheme.lower()
        if not separator or scheme not in self.schemes:
            raise InvalidLocation("not a swift location")
        head, _, image_id = rest.rpartition("/")
        address, _, container = head.rpartition("/")
        named = IMAGE_ID.fullmatch(image_id) and _CONTAINER.fullmatch(container) and _ADDRESS.fullmatch(address)
        if not named or address.endswith("/"):
            raise InvalidLocation("a swift location is swift+https://address/container/image-id")
        if self._multi:
            return self._parse_storage_url(scheme, address, container, image_id)
        if scheme == "swift+config":
            root = f"swift+config://{address}"
            own = bool(self.settings.accounts_file) and bool(_REFERENCE.fullmatch(address))
            reference = address
        else:
            root = _location_root(f"{_web_scheme(scheme)}://{address}")
            own, reference = root == self._root, ""
        if own and container == self._container_name(image_id):
            return self._located(reference, container, image_id)
        for accepted_root, accepted_reference, pattern in self._accepted:
            same = container.startswith(pattern[:-1]) if pattern.endswith("*") else container == pattern
            # One place under two addresses has one canonical text: the one that this store writes itself.
            if same and (root == accepted_root or (own and reference == accepted_reference)):
                return self._located(accepted_reference, container, image_id)
        raise InvalidLocation("this store is not configured for that address, reference or container")

    def _parse_storage_url(self, scheme: str, address: str, container: str, image_id: str) -> Location:
        url = _location_root(f"{_web_scheme(scheme)}://{address}").removeprefix("swift+")
        known = self._root if self._bound is not None else None
        # Accounts of others may be readable. They are beside the user's own, on the same server, and nowhere else.
        if scheme == "swift+config" or (known is not None and _without_account(url) != _without_account(known)):
            raise InvalidLocation("this store reaches only the Swift that its user's catalog names")
        if container != f"{self._base}_{image_id}" or not _REFERENCE.fullmatch(url.rpartition("/")[2]):
            raise InvalidLocation(f"images of this store are in containers named {self._base}_ and the image id")
        return self._located(url, container, image_id)

    def _located(self, base: str, container: str, image_id: str) -> Location:
        if self._multi:
            root = f"swift+{base}"
        elif self.settings.accounts_file:
            root = f"swift+config://{base}"
        else:
            root = self._root
        return Location(uri=f"{root}/{container}/{image_id}", key=(base, container, image_id), image_id=image_id)

    def _container_name(self, image_id: str) -> str:
        if self._multi:
            return f"{self._base}_{image_id}"
        if not self._seed:
            return self._base
        text = image_id.lower()
        return f"{self._base}_{text[: self._seed + text[: self._seed].count('-')]}"

    def _place(self, image_id: str) -> Location:
        self._client(self._own)
        return self._located(self._own, self._container_name(image_id), image_id)

    def _container(self, base: str, name: str) -> Container:
        """``base`` is a storage URL with ``multi_tenant``, and a reference else."""
        client = self._client(base)
        if self._multi and _without_account(base) != _without_account(self._root):
            raise InvalidLocation("this store reaches only the Swift that its user's catalog names")
        url = base if self._multi else None
        return Container(client, self._facts_of(client), name, self._prefix, url, own=url in (None, self._root))

    def _at(self, location: Location) -> tuple[Container, str]:
        base, container, name = location.key
        return self._container(base, container), name

    # Reading

    def locate(self, image_id: str, /) -> Location | None:
        """Look for the object."""
        location = self._place(image_id)
        container, name = self._at(location)
        return None if container.head(name) is None else location

    def stat(self, location: Location, /) -> Stat:
        """Ask for the object's headers."""
        container, name = self._at(location)
        headers = container.head(name)
        if headers is None:
            raise NotFound("there is no such image")
        return describe(headers, name, container.size(headers))

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Open the object. A manifest is put together by the server."""
        container, name = self._at(location)
        ranged = start > 0 or stop is not None
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if ranged else {}
        answer = container.get(name, headers)
        stream = answer.stream
        assert stream is not None
        try:
            told = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status == 206 and told:
                first, size = int(told[1]), int(told[3])
            else:
                first, size = 0, container.size(answer.headers)
            stat = describe(answer.headers, name, size)
            if version is not None and stat.version != version:
                raise Changed("the image was replaced")
            end = size if stop is None else min(stop, size)
            if first != start or (answer.status != 206 and end != size):
                raise StoreError("the server does not honour ranges")
        except BaseException:
            stream.close()
            raise
        chunks = _Chunks(stream, end - start)
        return Reading(stat=stat, chunks=chunks, close=chunks.close)

    def list(self) -> Iterator[StoredImage]:
        """The objects without a slash in their names, but for the segments that Glance keeps beside its images."""
        for container in self._containers():
            dynamic: set[str] = set()
            for entry in container.entries(delimiter="/"):
                name = entry.get("name", "")
                if not IMAGE_ID.fullmatch(name) or self._container_name(name) != container.name:
                    continue
                size = entry.get("bytes") or None
                segment = _DLO_SEGMENT.fullmatch(name)
                if segment and segment[1] in dynamic:
                    continue
                if not size and self._is_dynamic(container, name):
                    dynamic.add(name)
                if not container.facts.conditional:
                    size = None  # Ceph tells the length of the manifest
                location = self._located(self._own, container.name, name)
                yield StoredImage(image_id=name, location=location, size=size, modified=moment_of(entry))

    def _is_dynamic(self, container: Container, name: str) -> bool:
        headers = container.head(name)
        return headers is not None and "X-Object-Manifest" in headers

    def _containers(self) -> Iterator[Container]:
        client = self._client(self._own)
        if not self._seed and not self._multi:
            yield self._container(self._own, self._base)
            return
        for entry in pages(client, "", prefix=f"{self._base}_"):
            if _CONTAINER.fullmatch(entry["name"]):
                container = self._container(self._own, entry["name"])
                container.empty = entry.get("count") == 0
                yield container

    def usage(self) -> Usage:
        """What the container holds and may hold; of the account where there are many containers."""
        many = self._seed or self._multi
        kind, path = ("Account", "") if many else ("Container", f"/{quote(self._base)}")
        headers = self._client(self._own)("HEAD", path).headers
        quota = _whole(headers.get(f"X-{kind}-Meta-Quota-Bytes") or headers.get(f"X-{kind}-Quota-Bytes"))
        used = _whole(headers.get(f"X-{kind}-Bytes-Used"))
        if quota is None or used is None:
            return Usage(used=used)
        return Usage(total=max(quota, used), used=used, free=max(0, quota - used))

    def sign(self, location: Location, seconds: int, /) -> str:
        """A temporary URL (https://docs.openstack.org/swift/latest/api/temporary_url_middleware.html).

        Raises:
            ConfigurationError: no key is known.
        """
        container, name = self._at(location)
        url = container.url()
        key = self.settings.temp_url_key
        if not key:
            key = container.client("HEAD", "", base=url, ok=(403,)).headers.get("X-Account-Meta-Temp-Url-Key")
        if not key:
            raise ConfigurationError("no key signs temporary URLs: set the option temp_url_key, or one for the account")
        digest = next((each for each in ("sha256", "sha512", "sha1") if each in container.facts.digests), "sha256")
        parts = urlsplit(url)
        sign = require("swiftclient.utils", extra="swift").generate_temp_url
        signed: str = sign(f"{parts.path}/{container.name}/{name}", seconds, key, "GET", digest=digest)
        path, _, query = signed.partition("?")
        return f"{parts.scheme}://{parts.netloc}{quote(path)}?{query}"

    def set_acls(self, location: Location, *, public: bool, read: tuple[str, ...], write: tuple[str, ...]) -> None:
        """Set who may use the image's container: ``*:*`` is every user that Keystone knows.

        Raises:
            Unsupported: all images are in one container, whose access is not one image's.
        """
        if not self._multi:
            raise Unsupported("access is for each image only where the option multi_tenant is set")
        container, _ = self._at(location)
        writers = [*write, *self.settings.admin_projects]
        headers = {
            "X-Container-Read": "*:*" if public else ",".join(f"{project}:*" for project in read),
            "X-Container-Write": ",".join(f"{project}:*" for project in writers),
        }
        container.client("POST", container.path(), headers, base=container.base)

    # Writing

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        """Mark the upload, unless it is known to be one block."""
        return self._create(image_id, hints, marked=hints.size is None or hints.size > hints.block_size)

    def _create(self, image_id: str, hints: Hints, *, marked: bool) -> _Upload:
        location = self._place(image_id)
        container, _ = self._at(location)
        container.make = {} if self._multi or self.settings.create_container else None
        if self._multi:
            container.make = {"X-Container-Meta-Imagestore-Token": hints.token}
        upload = _Upload(container, location, hints, several=self._multi)
        if marked:
            upload.mark()
        return upload

    def copy(self, location: Location, image_id: str, hints: Hints, /) -> Location:
        """Copy inside the server: into segments of its own, however the image is kept.

        Raises:
            Unsupported: the copy would be in another account, or the server can't copy such an object.
        """
        source, name = self._at(location)
        headers = source.head(name)
        if headers is None:
            raise NotFound("there is no such image")
        stat = describe(headers, name, source.size(headers))
        if source.url() != self._container(*self._place(image_id).key[:2]).url():
            raise Unsupported("a copy inside the server stays inside one account")
        parts = self._parts(source, name, headers, stat.size)
        upload = self._create(image_id, hints, marked=True)
        try:
            for index, (path, start, length, whole) in enumerate(parts):
                upload.copy(index, path, start, length, whole=whole)
            if self.stat(location).version != stat.version:
                raise Changed("the image was replaced while it was copied")
            upload.commit(stat.size)
        except BaseException:
            # The error that led here matters more; what stays is marked.
            with contextlib.suppress(Exception):
                upload.abort()
            raise
        return upload.location

    def _parts(
        self, source: Container, name: str, headers: Mapping[str, str], size: int
    ) -> Sequence[tuple[str, int, int, bool]]:
        """What a copy is made of: a path, the first byte, the length, and whether that is the whole object."""
        if source.facts.conditional:
            path, whole = source.path(name), size <= _COPY_PIECE
            return [(path, start, min(_COPY_PIECE, size - start), whole) for start in range(0, size, _COPY_PIECE)]
        # This server copies whole objects only, and takes no large one for a segment.
        if not is_static(headers) and "X-Object-Manifest" not in headers:
            if size > source.facts.object_max:
                raise Unsupported("this server copies whole objects only, and the image is longer than one may be")
            return [(source.path(name), 0, size, True)] if size else []
        token = token_of(headers, name)
        held = sorted(source.segments(token), key=lambda entry: str(entry["name"])) if token else []
        if sum(entry["bytes"] for entry in held) != size:
            raise Unsupported("this server can't copy a large object of another program")
        return [(source.path(entry["name"]), 0, entry["bytes"], True) for entry in held]

    def delete(self, location: Location, /) -> None:
        """Remove the object, then its segments."""
        container, name = self._at(location)
        headers = container.head(name)
        if headers is None:
            raise NotFound("there is no such image")
        token = token_of(headers, name)
        if is_static(headers) and token:
            container.mark(token, name, "delete")
            # A listing may lack what was stored lately; the manifest lacks nothing.
            segments = container.listed_in(name, token)
            container.remove(name)
            container.remove_upload(token, segments)
        elif is_static(headers) and not headers.get(f"{META}Token"):
            self._delete_foreign(container, name)
        elif "X-Object-Manifest" in headers:
            self._delete_dynamic(container, name, headers["X-Object-Manifest"])
        elif not container.remove(name):
            raise NotFound("there is no such image")
        if self._multi:
            container.remove_container()

    def _delete_foreign(self, container: Container, name: str) -> None:
        """A manifest of somebody else: a copy of it is the mark, and keeps its segments known until they are gone."""
        token = secrets.token_hex(16)
        if container.copy_manifest(name, container.mark_name(token), token):
            container.remove(name)
            container.remove_manifest(container.mark_name(token))
        else:
            container.remove_manifest(name)

    def _delete_dynamic(self, container: Container, name: str, manifest: str) -> None:
        target = unquote(manifest)
        token = secrets.token_hex(16)
        container.mark(token, name, "dynamic", target)
        container.remove(name)
        container.remove_dynamic(target, name)
        container.unmark(token)

    def uploads(self) -> Iterator[Leftover]:
        """All that has a mark; with ``multi_tenant`` also containers that were made for an upload and are empty."""
        base = self._own
        for container in self._containers():
            found = False
            for token, claimed in container.marks():
                found = True
                leftover = container.leftover(token, base, claimed=claimed)
                if leftover is not None:
                    yield leftover
            # What an account tells of its containers may be old.
            if self._multi and container.empty and not found and next(container.entries(), None) is None:
                made_for = container.made_for()
                if made_for:
                    yield Leftover(token=made_for, key=(base, container.name))

    def discard(self, leftover: Leftover, /) -> None:
        """Remove an unfinished upload or delete. See the module for how it meets a commit."""
        base, name = leftover.key
        container = self._container(base, name)
        container.discard(leftover.token)
        if self._multi:
            container.remove_container()

    def translate(self, error: Exception, /) -> StoreError | None:
        """See the table of statuses above; requests and urllib3 fail with many kinds, which mean little else."""
        client = require("swiftclient.exceptions", extra="swift")
        requests = require("requests.exceptions", extra="swift")
        urllib3 = require("urllib3.exceptions", extra="swift")
        if isinstance(error, client.ClientException):
            return error_of(error)
        if isinstance(error, requests.SSLError):
            return ConfigurationError("the server's certificate can't be verified: see the option cacert")
        if isinstance(error, (requests.Timeout, urllib3.TimeoutError, TimeoutError)):
            return StoreTimeout("the server stopped answering")
        if isinstance(error, (requests.InvalidURL, requests.MissingSchema, requests.InvalidSchema)):
            return ConfigurationError("the storage URL is no URL: see the option endpoint")
        if isinstance(error, (requests.RequestException, urllib3.HTTPError, OSError)):
            return Unavailable(f"the connection to the server failed: {type(error).__name__}")
        return None


class _Upload(Upload):
    """An image on its way into a container."""

    def __init__(self, container: Container, location: Location, hints: Hints, *, several: bool) -> None:
        self.location = location
        self._container = container
        self._image_id = location.key[2]
        self._token = hints.token
        self._several = several
        self._headers = {
            "Content-Type": "application/octet-stream",
            f"{META}Token": hints.token,
            f"{META}Id": self._image_id,
            **encode_metadata(hints.metadata),
        }
        self._marked = False
        self._only: Block | None = None
        self._segments: dict[int, tuple[str, int]] = {}
        self._tried: set[str] = set()
        self._doubtful = False
        self._lock = threading.Lock()
        # Keeps an abort from running while a commit does.
        self._finishing = threading.Lock()
        self._asked = self._published = self._committed = self._aborted = False

    def mark(self) -> None:
        self._container.mark(self._token, self._image_id, "upload")
        self._marked = True

    def write(self, block: Block, /) -> None:
        """Put a segment. An only block waits for `commit`."""
        if block.last and block.index == 0:
            self._only = block
            return
        if not self._marked:
            # It was to be an only block, and is not: nothing is stored yet.
            with self._lock:
                if not self._marked:
                    self.mark()
        digest = block.digest.hex() if block.digest is not None else None
        name = self._begin_segment(block.index)
        try:
            answer = self._container.put(name, block.data, {"ETag": digest} if digest else {})
        except Exception as error:
            refused = 400 <= (getattr(error, "http_status", None) or 0) < 500
            self._doubtful = self._doubtful or not (refused or isinstance(error, StoreError))
            raise
        etag = etag_of(answer.headers)
        if digest is not None and etag != digest:
            raise DigestMismatch("the server has another digest of the segment than was sent", temporary=True)
        self._add_segment(block.index, etag, len(block.data))

    def copy(self, index: int, source: str, start: int, length: int, *, whole: bool) -> None:
        """Let the server make a segment of a part of an object."""
        headers = {"X-Copy-From": source, "X-Fresh-Metadata": "true"}
        if not whole:
            headers["Range"] = f"bytes={start}-{start + length - 1}"
        answer = self._container.put(self._begin_segment(index), b"", headers)
        self._add_segment(index, etag_of(answer.headers), length)

    def _begin_segment(self, index: int) -> str:
        name = self._container.segment(self._token, f"{index:08d}")
        with self._lock:
            self._tried.add(name)
        return name

    def _add_segment(self, index: int, etag: str, length: int) -> None:
        with self._lock:
            self._segments[index] = (etag, length)

    def commit(self, size: int, /) -> None:
        """Put the object or the manifest, and settle it with the claim.

        Raises:
            AlreadyExists: the id is taken. NotFound: the upload was discarded, or aborted.
        """
        with self._finishing:
            if self._committed:
                return
            if self._aborted:
                raise NotFound("the upload was aborted")
            if not self._published:
                self._publish(size)
                self._published = True
            self._settle()
            self._committed = True
            # The image stands. A mark that can't be removed is a leftover like any other.
            with contextlib.suppress(Exception):
                self._tidy()

    def _settle(self) -> None:
        """Make sure that the image was not replaced by a rival in the same moment, nor discarded."""
        if self._marked:
            self._container.claim(self._token, "commit")
        ours = self._is_published()
        if self._marked and self._container.claimed(self._token) != "commit":
            if ours:
                self._container.remove(self._image_id)
            raise NotFound("the upload was discarded before its commit")

    def _tidy(self) -> None:
        if self._marked:
            self._container.unmark(self._token)
            self._marked = False

    def _publish(self, size: int) -> None:
        container = self._container
        segments = [self._segments[index] for index in sorted(self._segments)]
        stored = sum(length for _, length in segments) + (len(self._only.data) if self._only else 0)
        if stored != size or (segments and self._only):
            raise SizeMismatch(f"{stored} bytes were stored of {size}")
        headers = dict(self._headers)
        query = ""
        if segments:
            query = "?multipart-manifest=put"
            data = self._manifest(segments)
        else:
            data = self._only.data if self._only else b""
            if self._only and self._only.digest is not None:
                headers["ETag"] = self._only.digest.hex()
        if container.facts.conditional:
            headers["If-None-Match"] = "*"
        elif self._is_published():
            return
        self._asked = True
        answer = container.put(self._image_id, data, headers, query, ok=(400, 412))
        if answer.status == 412 and not self._is_published():
            raise Unavailable("an image came and went in the moment of the commit")
        if answer.status in (400, 404):
            self._refused(answer.body.decode("utf-8", "replace"))
        digest = headers.get("ETag")
        if digest and answer.status < 300 and etag_of(answer.headers) != digest:
            container.remove(self._image_id)
            raise DigestMismatch("the server has another digest of the image than was sent", temporary=True)

    def _is_published(self) -> bool:
        """Whether the name is ours already, by an attempt whose answer was lost. Raises if it is somebody else's."""
        headers = self._container.head(self._image_id)
        if headers is None:
            return False
        if token_of(headers, self._image_id) == self._token:
            return True
        raise AlreadyExists("there is an image of that id already")

    def _refused(self, why: str) -> None:
        """The server found fault with the manifest: who discards an upload takes its segments away."""
        if self._marked and self._container.head(self._container.mark_name(self._token)) is None:
            raise NotFound("the upload was discarded before its commit")
        raise IntegrityError(f"the server does not accept the manifest: {why[:200]}")

    def _manifest(self, segments: Sequence[tuple[str, int]]) -> bytes:
        """The manifest of all segments; where they are too many, one of manifests."""
        container, limit = self._container, self._container.facts.segments
        names = [container.segment(self._token, f"{index:08d}") for index in sorted(self._segments)]
        entries = [self._entry(name, etag, size) for name, (etag, size) in zip(names, segments, strict=True)]
        if len(entries) <= limit:
            return json.dumps(entries).encode()
        above = []
        for number, start in enumerate(range(0, len(entries), limit)):
            part = entries[start : start + limit]
            name = container.segment(self._token, f"{NESTED}{number:08d}")
            with self._lock:
                self._tried.add(name)
            answer = container.put(name, json.dumps(part).encode(), {}, "?multipart-manifest=put", ok=(400,))
            if answer.status >= 300:
                self._refused(answer.body.decode("utf-8", "replace"))
            above.append(self._entry(name, etag_of(answer.headers), sum(int(entry["size_bytes"]) for entry in part)))
        return json.dumps(above).encode()

    def _entry(self, name: str, etag: str, size: int) -> dict[str, str | int]:
        return {"path": f"/{self._container.name}/{name}", "etag": etag, "size_bytes": size}

    def abort(self) -> None:
        """Take back segments and mark. An image that was committed, also without an answer, stays."""
        with self._finishing:
            self._aborted = True
            container = self._container
            if self._committed:
                self._tidy()
            elif self._marked or self._tried or self._asked:
                # Also what another attempt of this very upload has committed stays.
                if container.stands(self._token, self._image_id):
                    self._tidy()
                else:
                    self._take_back()
            if self._several and not self._committed:
                container.remove_container()

    def _take_back(self) -> None:
        container = self._container
        if self._marked:
            container.remove_segments(self._token, self._tried)
        if self._doubtful:
            # A segment whose answer never came may still be on its way: the mark stays, so that it will be found.
            return
        if self._marked:
            container.unmark(self._token)
            self._marked = False


class _Chunks(Chunks):
    """``length`` bytes of a stream; an error if it ends before."""

    def __init__(self, stream: Stream, length: int) -> None:
        super().__init__()
        self._stream = stream
        self._left = length

    def fetch(self) -> bytes:
        if not self._left:
            return b""
        data = self._stream.read(min(_CHUNK, self._left))
        if not data:
            raise Unavailable(f"the answer ended {self._left} bytes too early")
        self._left -= len(data)
        if not self._left:
            # Reads the end too, so that the connection can be used again.
            self._stream.read(1)
        return data

    def release(self) -> None:
        self._stream.close()


def _location_root(url: str) -> str:
    """The text of a location up to the container, for an address: scheme and host in lower case."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"swift+{scheme.lower()}://{host.lower()}{slash}{path}".rstrip("/")


def _web_scheme(scheme: str) -> str:
    return "http" if scheme.lower() == "swift+http" else "https"


def _without_account(url: str) -> str:
    return url.rpartition("/")[0]


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
