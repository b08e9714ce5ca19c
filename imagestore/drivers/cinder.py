"""Images as volumes of OpenStack Cinder, by python-cinderclient, keystoneauth and os-brick.

An image is a volume whose metadata has ``glance_image_id`` and ``image_size``, which is what Glance writes: volumes
have whole GiB, and an image ends where it ends. Its location is ``cinder://<store>/<volume id>``, or without the name
of the store. All other volumes of the project are somebody else's and are never touched. With ``volume_type`` set, only
images of that type are the store's own; without it all of the project are.

**An upload** is a volume whose metadata has ``imagestore_upload`` with the token, from the request on that makes it.
The volume is attached to this host at its first block and written at offsets; if the size is not known, it is extended
as it fills.

**Commit** detaches the volume, sets it read-only and replaces all its metadata with those of an image in one request.
Cinder has no request that only one of two can win, so a commit and a discard each write what they are about to do
first and look for the other's then; at least one sees both. A commit then gives way at once, and a discard as soon as
it sees the image. Adders of one id find each other in the same way, and one of them goes on; but whoever says nothing
for longer than a commit takes is taken for dead, which it might not be: hence ``detected``.

**Reads** attach the volume, once for all of its readers of this store (those of a bound view have one of their own),
and detach it when the last one ends. Others can read it at the same time if the volume's type allows several
attachments. An attachment for reading is marked in the volume's metadata, because one whose process was killed stays,
and keeps the image from being deleted: ``uploads`` lists it, and ``discard`` detaches it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from oslo_config import cfg

from imagestore.driver import (
    Block,
    Capabilities,
    Driver,
    Hints,
    Leftover,
    Location,
    Reading,
    Stat,
    StoredImage,
    Upload,
    Usage,
)
from imagestore.drivers._cinder_attach import READING, Attachment, Brick, Readers
from imagestore.drivers._cinder_client import Api, Endpoint, Login, Volume, Web, meaning
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    InvalidLocation,
    NotFound,
    StoreError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

__all__ = ["CinderDriver"]

_GIB: Final = 1024 * 1024 * 1024
_LARGEST_STEP: Final = 64
_SPARSE_UNIT: Final = 4096
_BEAT_EVERY: Final = 600.0
_COMMIT_PATIENCE: Final = 15.0
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")

_ID: Final = "glance_image_id"
_SIZE: Final = "image_size"
_OF_UPLOAD: Final = "imagestore_token"
# Glance's name for the project that an image belongs to; Cinder clones the volume for new ones of that project only.
_OWNER: Final = "image_owner"
_MARK: Final = "imagestore_upload"
_MARK_ID: Final = "imagestore_image"
_BEAT: Final = "imagestore_beat"
_COMMITTING: Final = "imagestore_committing"
_DISCARDING: Final = "imagestore_discarding"
_KEPT: Final = "imagestore_metadata_"
# A value has 255 characters, and by default a volume 128 pairs.
_PIECE: Final = 255
_PIECES: Final = 64


class CinderDriver(Driver):
    """Images as volumes of OpenStack Cinder. See the module for how."""

    name = "cinder"
    schemes = ("cinder",)
    options = (
        cfg.StrOpt("auth_url", help="Where to log in: the URL of Keystone v3."),
        cfg.StrOpt("user", help="User that keeps the images. Without any credentials the store needs bind(auth)."),
        cfg.StrOpt("password", secret=True, help="The user's password."),
        cfg.StrOpt("user_domain", default="Default", help="Name of the domain of the user."),
        cfg.StrOpt("project_name", help="Project whose volumes the images are."),
        cfg.StrOpt("project_domain", default="Default", help="Name of the domain of the project."),
        cfg.StrOpt("application_credential_id", help="Application credential, in place of user and password."),
        cfg.StrOpt("application_credential_secret", secret=True, help="The application credential's secret."),
        cfg.StrOpt(
            "noauth_project",
            help=(
                "Id of the project (hexadecimal digits and dashes), for a Cinder that runs without Keystone "
                "(auth_strategy = noauth); takes the place of all credentials, and needs endpoint_template."
            ),
        ),
        cfg.StrOpt(
            "catalog_info",
            default="volumev3::publicURL",
            help="What to look for in the catalog: service type, service name (may be empty) and interface.",
        ),
        cfg.StrOpt(
            "endpoint_template",
            help="URL that takes the place of the catalog's, such as http://cinder:8776/v3/%(project_id)s.",
        ),
        cfg.StrOpt("region", help="Region of the endpoint; any if not set."),
        cfg.StrOpt(
            "cacert",
            help=(
                "File with the certificates, in PEM, of the authorities to trust in place of the usual ones. "
                "Certificates are always verified."
            ),
        ),
        cfg.StrOpt(
            "volume_type",
            help=(
                "Type of new volumes; only images of this type are then listed and found by id. Not set: Cinder's "
                "default for new ones, and images of every type are the store's."
            ),
        ),
        cfg.IntOpt(
            "state_timeout", default=300, min=0, help="Seconds in which a volume must get from one state to the next."
        ),
        cfg.BoolOpt(
            "extend_attached",
            default=False,
            help=(
                "Extend volumes for images of unknown size while they are attached. Not every backend can (NFS can't). "
                "Not set: they are detached for it."
            ),
        ),
        cfg.BoolOpt(
            "sparse",
            default=False,
            help=(
                "Don't write runs of zeros. Only for backends whose new volumes read as zeros, such as RBD; others "
                "may show what was there before."
            ),
        ),
        cfg.BoolOpt(
            "encrypted",
            default=False,
            help=(
                "Use volumes of encrypted types as this host shows them. Only where the host itself decrypts them: "
                "else images would be stored in the clear, over what the encryption needs. Not set: they are refused."
            ),
        ),
        cfg.StrOpt(
            "connector",
            default="host",
            choices=[
                ("host", "all that os-brick finds of this host: needs root, by root_helper"),
                ("minimal", "the name and address only: enough for RBD and shares, and needs no privilege"),
            ],
            help="What Cinder is told of this host when a volume is attached.",
        ),
        cfg.StrOpt("my_ip", help="Address of this host on the storage network. Not set: what its name stands for."),
        cfg.StrOpt(
            "root_helper",
            default="sudo",
            help=(
                "Command by which os-brick becomes root where it must: goes before privsep-helper, and must find it. "
                "Empty: this process is root itself."
            ),
        ),
        cfg.BoolOpt("use_multipath", default=False, help="Connect volumes by several paths where there are any."),
        cfg.BoolOpt("enforce_multipath", default=False, help="Fail if multipath is wanted and multipathd is missing."),
        cfg.StrOpt(
            "lock_path",
            help=(
                "Directory for os-brick's lock files, for the whole process: best the one of everything on this host "
                "that connects volumes, such as nova-compute. Not set: what the program's own configuration says in "
                "[os_brick] or [oslo_concurrency]. iSCSI, Fibre Channel and NVMe need it; RBD does not."
            ),
        ),
        cfg.StrOpt(
            "mount_base", default="/var/lib/imagestore/mnt", help="Directory below which shares of files are mounted."
        ),
        cfg.ListOpt(
            "accept_locations",
            default=[],
            help="Further names of stores, such as former ones, whose locations are taken for this store's own.",
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        parts = (settings.catalog_info or "").split(":")
        if len(parts) != 3 or not parts[0] or not parts[2]:
            raise self.invalid_option("catalog_info", "has the form service type:service name:interface")
        template = settings.endpoint_template or None
        if template is not None and not re.match(r"https?://[^/@]+(/|$)", template):
            raise self.invalid_option("endpoint_template", "not an http:// or https:// URL without credentials")
        self._endpoint = Endpoint(
            service_type=parts[0],
            service_name=parts[1] or None,
            interface=parts[2],
            region=settings.region or None,
            template=template,
        )
        self._login = self._read_login()
        self._type: str | None = settings.volume_type or None
        self._names = frozenset({self.store, *(settings.accept_locations or ())})

    def _read_login(self) -> Login | None:
        """The credentials; None where the store acts only for those that are bound."""
        settings = self.settings
        if settings.noauth_project:
            if settings.auth_url or not settings.endpoint_template:
                raise self.invalid_option("noauth_project", "needs endpoint_template, and no auth_url")
            if not re.fullmatch(r"[0-9a-f-]{1,64}", settings.noauth_project):
                raise self.invalid_option("noauth_project", "an id of hexadecimal digits and dashes")
            return Login(noauth_project=settings.noauth_project)
        credential = settings.application_credential_id or ""
        if not settings.user and not credential:
            if settings.password or settings.application_credential_secret:
                raise self.invalid_option("user", "is not set, although there is a password or a secret")
            return None
        if not settings.auth_url:
            raise self.invalid_option("auth_url", "is not set, although there are credentials")
        if credential and not settings.application_credential_secret:
            raise self.invalid_option("application_credential_secret", "is not set")
        if not credential and not (settings.password and settings.project_name):
            raise self.invalid_option("user", "needs password and project_name beside it")
        return Login(
            auth_url=settings.auth_url,
            user=settings.user or "",
            password=settings.password or "",
            user_domain=settings.user_domain,
            project_name=settings.project_name or "",
            project_domain=settings.project_domain,
            credential_id=credential,
            credential_secret=settings.application_credential_secret or "",
        )

    # Connecting

    def open(self) -> None:
        """Log in, and look for the volume type, unless the store only acts for those that are bound.

        Raises:
            ConfigurationError: there is no such volume type, or Cinder is too old.
            Unauthenticated: the credentials are wrong.
            Unavailable: Cinder or Keystone can't be reached.
        """
        settings = self.settings
        self._web = Web(self._endpoint, settings.cacert or None, self.timeouts)
        try:
            self._brick = Brick(
                minimal=settings.connector == "minimal",
                root_helper=settings.root_helper or "",
                lock_path=settings.lock_path or None,
                my_ip=settings.my_ip or None,
                multipath=settings.use_multipath,
                enforce_multipath=settings.enforce_multipath,
                mount_base=settings.mount_base,
                encrypted=settings.encrypted,
            )
            self._known: Api | None = None
            if self._login is not None:
                self._act_for(self._web.own(self._login))
                self._check_type()
        except BaseException:
            self._web.close()
            raise
        self.capabilities = Capabilities(
            sparse_unit=_SPARSE_UNIT if settings.sparse else None,
            repeatable_create=True,
            collision="detected",
            commit_proof=True,
            needs_auth=self._login is None,
        )

    def _act_for(self, client: Any) -> None:
        self._known = Api(client, float(self.settings.state_timeout))
        self._readers = Readers(self._known, self._brick)

    def _check_type(self) -> None:
        types = self._api.types()
        if self._type is not None and self._type not in types:
            raise ConfigurationError(f"option volume_type: this project may use no volume type {self._type!r}")

    @property
    def _api(self) -> Api:
        if self._known is None:
            raise Unauthenticated("this store has no credentials of its own: use store.bind(auth)")
        return self._known

    def bind(self, auth: Any, /) -> Driver:
        """A driver that acts for one user, on the volumes of that user's project."""
        bound = copy.copy(self)
        bound._act_for(self._web.bound(auth))
        return bound

    def close(self) -> None:
        """Give up idle connections, and the volumes of uploads that were given up. Reads that are open go on."""
        own = [upload for key, upload in list(_running.items()) if key == _here(key[1]) and upload.is_of(self._web)]
        for upload in own:
            # What stays has our mark.
            with contextlib.suppress(Exception):
                upload.let_go("the store was closed")
            upload.forget()
        try:
            if self._known is not None:
                self._readers.close()
        finally:
            self._web.close()

    # Locations

    def parse(self, uri: str, /) -> Location:
        """Check a ``cinder://`` location, as text only.

        Raises:
            InvalidLocation: its last part is no volume id (a UUID in lower case), or it names another store.
        """
        scheme, separator, rest = uri.partition("://")
        store, slash, volume_id = rest.rpartition("/")
        if not separator or scheme.lower() != "cinder" or not _UUID.fullmatch(volume_id):
            raise InvalidLocation("a cinder location is cinder://store/volume-id or cinder://volume-id")
        if slash and store not in self._names:
            raise InvalidLocation("the location is in another store")
        if slash and not store:
            raise InvalidLocation("the location names no store")
        return self._location(volume_id)

    def _location(self, volume_id: str) -> Location:
        return Location(
            uri=f"cinder://{self.store}/{volume_id}" if self.store else f"cinder://{volume_id}", key=(volume_id,)
        )

    # Images

    def _image(self, location: Location) -> Volume:
        volume = self._api.volume(location.key[0])
        if not _is_image(volume):
            raise NotFound("there is no image in this volume")
        return volume

    def _is_own(self, volume: Volume) -> bool:
        return self._type in (None, volume["volume_type"], volume.get("volume_type_id"))

    def locate(self, image_id: str, /) -> Location | None:
        for volume in self._api.volumes(**{_ID: image_id}):
            if _is_image(volume) and self._is_own(volume):
                return self._location(volume["id"])
        return None

    def list(self) -> Iterator[StoredImage]:
        for volume in self._api.volumes():
            if _is_image(volume) and self._is_own(volume):
                yield StoredImage(
                    image_id=volume["metadata"][_ID],
                    location=self._location(volume["id"]),
                    size=_size_of(volume),
                    modified=_moment(volume.get("created_at")),
                )

    def stat(self, location: Location, /) -> Stat:
        return _stat_of(self._image(location))

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Attach the volume and open it. Holes that librbd or a file system knows become zeros without being read."""
        stat = self.stat(location)
        if version is not None and version != stat.version:
            raise Changed("the volume holds another image now")
        stop = stat.size if stop is None else stop
        # After a part of an image the next one is likely to be read, and to attach anew would take longer than to wait.
        chunks = self._readers.open(location.key[0], start, stop, partial=stop - start < stat.size)
        return Reading(stat=stat, chunks=chunks, close=chunks.close)

    def usage(self) -> Usage:
        """The project's quota of volumes, of all types together."""
        return self._api.usage()

    def delete(self, location: Location, /) -> None:
        volume = self._image(location)
        try:
            self._api.remove(volume["id"], volume)
        except Unavailable:
            # Nobody can read it any more, and `uploads` shall show it.
            with contextlib.suppress(Exception):
                if self._api.volume(volume["id"])["status"] == "error_deleting":
                    token = volume["metadata"].get(_OF_UPLOAD) or volume["id"].replace("-", "")
                    self._api.set_metadata(volume["id"], {_MARK: token, _MARK_ID: volume["metadata"][_ID]})
            raise

    # Uploads

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        mark = {_MARK: hints.token, _MARK_ID: image_id, **_encode(hints.metadata)}
        gib = max(1, _gib(hints.size or 0))
        volume = self._api.create(gib, f"imagestore-{hints.token}", mark, self._type)
        try:
            volume = self._api.ready(volume["id"], volume)
            if volume.get("encrypted") and not self.settings.encrypted:
                raise Unsupported("volumes of this type are encrypted: see the option encrypted")
        except Exception as error:
            try:
                self._remove_upload(volume["id"], hints.token)
            except Exception as second:  # noqa: BLE001 - the first error matters more, and the volume has our mark
                error.add_note(f"the volume {volume['id']} was not deleted: {type(second).__name__}")
            raise
        upload = _running[_here(volume["id"])] = _Upload(self, image_id, hints, volume)
        return upload

    def _require_free(self, image_id: str, but: str) -> None:
        found = self.locate(image_id)
        if found is not None and found.key[0] != but:
            raise AlreadyExists("another volume holds an image of that id", location=found.uri)

    def uploads(self) -> Iterator[Leftover]:
        for volume in self._api.volumes():
            if not self._is_own(volume):
                continue
            if (token := _left_of(volume)) is not None:
                yield self._left_upload(volume, token)
            elif _is_image(volume):
                yield from self._left_readers(volume)

    def _left_upload(self, volume: Volume, token: str) -> Leftover:
        told = volume["metadata"]
        moments = [_moment(volume.get("created_at")), _moment(volume.get("updated_at")), _moment(told.get(_BEAT))]
        upload = _running.get(_here(volume["id"]))
        return Leftover(
            token=token,
            image_id=told.get(_MARK_ID) or told.get(_ID),
            bytes=volume["size"] * _GIB,
            started=moments[0],
            last_activity=max((each for each in moments if each is not None), default=None),
            alive=True if upload is not None and upload.held else None,
            key=(volume["id"],),
        )

    def _left_readers(self, volume: Volume) -> Iterator[Leftover]:
        """Attachments for reading, each with its own id as the token: of those who read now, and of the dead."""
        for key, since in volume["metadata"].items():
            attachment_id = key.removeprefix(READING)
            if attachment_id != key and _UUID.fullmatch(attachment_id):
                yield Leftover(
                    token=attachment_id.replace("-", ""),
                    image_id=volume["metadata"][_ID],
                    bytes=0,
                    last_activity=_moment(since),
                    alive=True if self._readers.has(attachment_id) else None,
                    key=(volume["id"], attachment_id),
                )

    def discard(self, leftover: Leftover, /) -> None:
        volume_id = leftover.key[0]
        with contextlib.suppress(NotFound):
            volume = self._api.volume(volume_id)
            if len(leftover.key) > 1:
                self._discard_reader(volume, leftover.key[1])
            elif _mark_of(volume) == leftover.token:
                self._discard_upload(volume_id, leftover.token)
            elif _left_of(volume) == leftover.token:
                # An image that Cinder is about to delete; what comes back instead is an image again.
                self._api.settled(volume_id)

    def _discard_reader(self, volume: Volume, attachment_id: str) -> None:
        if READING + attachment_id in volume["metadata"]:
            self._api.detach(attachment_id)
            self._api.unset_metadata(volume["id"], READING + attachment_id)

    def _discard_upload(self, volume_id: str, token: str) -> None:
        self._api.set_metadata(volume_id, {_DISCARDING: "True"})
        upload = _running.get(_here(volume_id))
        if upload is not None:
            # The backend would not delete what this process has open. Its record in Cinder goes in the next step too.
            with contextlib.suppress(Exception):
                upload.let_go("the upload was discarded")
        # If it is an image by now, what was written above stays in it, and means nothing there.
        if _mark_of(self._past_commit(volume_id)) == token:
            self._remove_upload(volume_id, token)
            _running.pop(_here(volume_id), None)

    def _past_commit(self, volume_id: str) -> Volume:
        """The volume; if a commit of it was begun, after that could have ended.

        Cinder has no request that only one of two can win. So a last request of a commit that is under way for longer
        than this, and arrives after all in the moment between the look and the deletion, makes an image that is lost.
        """
        end = time.monotonic() + _COMMIT_PATIENCE
        while True:
            volume = self._api.volume(volume_id)
            told = volume["metadata"]
            if _MARK not in told or _COMMITTING not in told or time.monotonic() > end:
                return volume
            time.sleep(0.2)

    def _remove_upload(self, volume_id: str, token: str) -> None:
        """Detach and delete the volume of an upload, unless it is none any more. It may be in any state."""
        with contextlib.suppress(NotFound):
            volume = self._api.settled(volume_id, moving=("creating", "extending"))
            if _mark_of(volume) != token:
                return
            for attachment_id in self._api.attachments(volume_id):
                self._api.detach(attachment_id)
            self._api.remove(volume_id)

    def translate(self, error: Exception, /) -> StoreError | None:
        return meaning(error)


class _Upload(Upload):
    def __init__(self, driver: CinderDriver, image_id: str, hints: Hints, volume: Volume) -> None:
        self._driver = driver
        self._api = driver._api
        self._image_id = image_id
        self._token = hints.token
        self._volume_id: str = volume["id"]
        self._size: int = volume["size"] * _GIB
        self._attachment: Attachment | None = None
        self._let_go = ""
        # A discard may come while a block is written.
        self._lock = threading.Lock()
        self._metadata = _encode(hints.metadata)
        self._owner = {key: value for key, value in hints.metadata.items() if key == _OWNER and len(value) <= _PIECE}
        self._next_beat = time.monotonic() + _BEAT_EVERY
        self.location = driver._location(self._volume_id)

    def write(self, block: Block, /) -> None:
        with self._lock:
            self._require_held()
            end = block.offset + len(block.data)
            if end > self._size:
                self._grow(end)
            if time.monotonic() > self._next_beat:
                self._api.set_metadata(self._volume_id, {_BEAT: datetime.now(UTC).isoformat()})
                self._next_beat = time.monotonic() + _BEAT_EVERY
            self._attached().device.write(block.offset, block.data)

    @property
    def held(self) -> bool:
        """Whether it can still become an image."""
        return not self._let_go

    def _require_held(self) -> None:
        if self._let_go:
            raise NotFound(self._let_go)

    def is_of(self, web: Web) -> bool:
        """Whether it is one of the driver, or of one that was bound, with these connections."""
        return self._driver._web is web

    def forget(self) -> None:
        """This process has nothing of it any more."""
        _running.pop(_here(self._volume_id), None)

    def let_go(self, why: str) -> None:
        """Detach the volume; nothing can be written or committed any more."""
        with self._lock:
            self._let_go = why
            self._detach()

    def _attached(self) -> Attachment:
        if self._attachment is None:
            attachment = Attachment(self._api, self._driver._brick, self._volume_id, writable=True)
            attachment.open()
            self._attachment = attachment
        return self._attachment

    def _grow(self, end: int, step: int = _LARGEST_STEP) -> None:
        """Make the volume longer, by ``step`` GiB at most. Every time costs seconds, so it is done in large steps."""
        online = self._attachment is not None and self._driver.settings.extend_attached
        if not online:
            if self._attachment is not None:
                self._attachment.flush()
            self._detach()
            self._api.ready(self._volume_id)
        now = _gib(self._size)
        # A step that was made, and whose answer was lost, is not made again.
        if self._api.volume(self._volume_id)["size"] < _gib(end):
            self._api.extend(self._volume_id, max(_gib(end), now + min(now, step)))
        volume = (
            self._api.settled(self._volume_id, moving=("extending",)) if online else self._api.ready(self._volume_id)
        )
        if volume["size"] < _gib(end):
            raise Unavailable(f"the volume is {volume['status']} and was not extended", temporary=False)
        if online and self._attachment is not None:
            self._attachment.grown(volume["size"] * _GIB)
        self._size = volume["size"] * _GIB

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None

    def commit(self, size: int, /) -> None:
        self._store()
        self._publish(size)
        self.forget()

    def _store(self) -> None:
        """Everything written is stored when this returns, and the volume is detached."""
        with self._lock:
            if self._attachment is not None:
                self._attachment.flush()
            self._detach()

    def _publish(self, size: int) -> None:
        volume = self._api.settled(self._volume_id)
        if _is_image(volume) and volume["metadata"].get(_OF_UPLOAD) == self._token:
            return
        self._require_held()
        self._require_mine(volume["metadata"], volume["status"])
        volume = self._api.ready(self._volume_id, volume)
        if size > volume["size"] * _GIB:
            # Zeros at the end, which were not written.
            self._grow(size, step=0)
        self._api.protect(self._volume_id)
        self._take_the_id()
        image = {_ID: self._image_id, _SIZE: str(size), _OF_UPLOAD: self._token, **self._metadata, **self._owner}
        self._api.publish(self._volume_id, f"image-{self._image_id}", image)

    def _take_the_id(self) -> None:
        """Say that this is about to be the image of its id, and let nobody else have said so.

        Each says so first and looks for others then, so that of two at least one sees the other. If both do, the one
        with the greater volume id gives way until the other has ended. Who stays longer than a commit takes is dead.
        """
        end = time.monotonic() + _COMMIT_PATIENCE
        while True:
            self._require_mine(self._api.set_metadata(self._volume_id, {_COMMITTING: "True"}))
            self._driver._require_free(self._image_id, self._volume_id)
            rivals = self._rivals()
            if not rivals or time.monotonic() > end:
                return
            if min(rivals) < self._volume_id:
                self._api.unset_metadata(self._volume_id, _COMMITTING)
            while rivals and time.monotonic() < end:
                time.sleep(0.2)
                rivals = self._rivals()

    def _rivals(self) -> set[str]:
        """Volumes of other uploads of this id that are being committed."""
        return {
            volume["id"]
            for volume in self._api.volumes(**{_MARK_ID: self._image_id})
            if volume["id"] != self._volume_id
            and volume["status"] != "deleting"
            and _COMMITTING in volume["metadata"]
            and _mark_of(volume) is not None
            and self._driver._is_own(volume)
        }

    def _require_mine(self, told: Mapping[str, str], status: str = "") -> None:
        if told.get(_MARK) != self._token or _DISCARDING in told or status == "deleting":
            raise NotFound("the upload was discarded")

    def abort(self) -> None:
        with self._lock:
            self._let_go = self._let_go or "the upload was aborted"
            self._detach()
        self._driver._remove_upload(self._volume_id, self._token)
        self.forget()


_running: Final[weakref.WeakValueDictionary[tuple[int, str], _Upload]] = weakref.WeakValueDictionary()
"""By process and volume, the uploads that may have their volumes open here, of all drivers: a backend deletes no volume
that is open, so whoever discards one of them has to know. One whose end is in doubt is forgotten with its add."""


def _here(volume_id: str) -> tuple[int, str]:
    """A key of ``_running``. Where a process has forked, what its parent has open is not the child's to close."""
    return os.getpid(), volume_id


def _gib(size: int) -> int:
    return -(-size // _GIB)


def _mark_of(volume: Volume) -> str | None:
    """The token of the upload that a volume belongs to."""
    token = volume["metadata"].get(_MARK)
    return token if isinstance(token, str) and _TOKEN.fullmatch(token) else None


def _left_of(volume: Volume) -> str | None:
    """The token of the upload, or of the image that Cinder has not deleted yet, that a volume was left by."""
    token = _mark_of(volume)
    if token is None and volume["status"] in ("deleting", "error_deleting"):
        token = volume["metadata"].get(_OF_UPLOAD)
    return token if isinstance(token, str) and _TOKEN.fullmatch(token) else None


def _is_image(volume: Volume) -> bool:
    told = volume["metadata"]
    return (
        bool(told.get(_ID)) and _MARK not in told and volume["status"] not in ("creating", "deleting", "error_deleting")
    )


def _size_of(volume: Volume) -> int:
    """The image's length in bytes; Glance once kept none, and took the volume's."""
    told = volume["metadata"].get(_SIZE, "")
    whole: int = volume["size"] * _GIB
    return int(told) if told.isdecimal() and int(told) <= whole else whole


def _stat_of(volume: Volume) -> Stat:
    told = volume["metadata"]
    token = told.get(_OF_UPLOAD)
    return Stat(
        size=_size_of(volume),
        version=token or f"{volume['id']}/{volume.get('created_at')}",
        token=token,
        modified=_moment(volume.get("created_at")),
        metadata=_decode(told),
    )


def _moment(text: str | None) -> datetime | None:
    """A time as Cinder writes it: in UTC, mostly without saying so."""
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def _encode(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata in values that Cinder takes: all of it, or none if there is too much."""
    text = json.dumps(dict(metadata)) if metadata else ""
    pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    return {f"{_KEPT}{number}": piece for number, piece in enumerate(pieces)} if len(pieces) <= _PIECES else {}


def _decode(told: Mapping[str, str]) -> dict[str, str]:
    pieces: list[str] = []
    while (piece := told.get(f"{_KEPT}{len(pieces)}")) is not None:
        pieces.append(piece)
    with contextlib.suppress(ValueError):
        found = json.loads("".join(pieces))
        if isinstance(found, dict):
            return {str(key): str(value) for key, value in found.items()}
    return {}
