"""Images in a Ceph cluster, as RADOS block devices (RBD), by the distribution's librbd.

An image is an RBD image of its id with a protected snapshot ``snap``, and its location is
``rbd://<fsid>/<pool>/<image id>/snap``: what Glance writes, and what Nova and Cinder clone from. In a namespace the
pool is written ``<pool>%2F<namespace>``, so that who knows no namespaces finds no such pool.

**An upload** is an RBD image ``.imagestore-<token>``. ``commit`` brings it to its size, makes and protects the snapshot
and renames it, which fails if the name is taken. Its uploader is known to live by its watch on the image, which a Ceph
cluster keeps for half a minute after a client's death. A delete renames to such a name first, and so does a discard: of
several renames of one image the directory takes one.

**What librbd keeps** (facts of Ceph's ``rbd_types.h`` and ``cls_rbd``): an object ``rbd_id.<name>`` with the internal
id, in ``rbd_directory`` the names of all ids, and ``rbd_header.<internal id>``. A rename writes the new ``rbd_id``
object, changes the directory, and removes the old one. If it is broken off, the directory is right: so an image has a
name only where both agree, and what else there is gets removed by its internal id.

**Reads** take no lock and no watch, so that a reader needs no right to write and keeps nobody from deleting. Where the
data of an image was removed librbd reads zeros; so no byte is given away before the snapshot was seen to be still there
after it was read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import threading
import time
import uuid
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

from oslo_config import cfg

from imagestore.driver import (
    IMAGE_ID,
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
    require,
)
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    ConfigurationError,
    InUse,
    InvalidLocation,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RbdDriver"]

_MIB: Final = 1024 * 1024
_GIB: Final = 1024 * _MIB
_SPARSE_UNIT: Final = 4096
# librbd copies what it is given to write, beside the budget.
_WRITES: Final = 4
_BLOCK: Final = 4 * _MIB
# Longer ones make librados' own memory grow by a multiple of them.
_PIECE: Final = 1024 * 1024
_PIECES: Final = 12
_DIFF_WINDOW: Final = 64 * _GIB
_IDLE_IMAGES: Final = 8
_FIRST_STEP: Final = 64 * _MIB

# The number of the error of a comparison that failed, plus the place where it did.
_MISMATCH: Final = 4095

_SNAPSHOT: Final = "snap"
_METADATA: Final = "imagestore"
_MARK: Final = re.compile(r"\.imagestore-([0-9a-f]{32})(?:-[ab])?")
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_FSID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_FEATURES: Final = {
    "layering": 1 << 0,
    "striping": 1 << 1,
    "exclusive-lock": 1 << 2,
    "object-map": 1 << 3,
    "fast-diff": 1 << 4,
    "deep-flatten": 1 << 5,
}
_NEEDS: Final = {"object-map": "exclusive-lock", "fast-diff": "object-map"}

_PACKAGES: Final = (
    "the distribution's packages python3-rados and python3-rbd, and let the virtual environment see their modules"
)

_MEANING: Final[dict[int, tuple[type[StoreError], str]]] = {
    errno.ENOENT: (NotFound, "no such image"),
    errno.EEXIST: (AlreadyExists, "the name is taken"),
    errno.EBUSY: (InUse, "the image is in use"),
    errno.ENOTEMPTY: (InUse, "the image has snapshots"),
    errno.ENOSPC: (StoreFull, "the cluster has no space left"),
    errno.EDQUOT: (StoreFull, "the quota of the pool is used up"),
    errno.EFBIG: (LimitExceeded, "the image is larger than the cluster can hold"),
    errno.EPERM: (PermissionDenied, "the capabilities of the user don't allow this"),
    errno.EACCES: (PermissionDenied, "the capabilities of the user don't allow this"),
    errno.EROFS: (PermissionDenied, "the image can't be written to"),
    errno.ENAMETOOLONG: (InvalidLocation, "the name is too long"),
    errno.ETIMEDOUT: (StoreTimeout, "the cluster stopped answering"),
    errno.ESHUTDOWN: (Unavailable, "the cluster has put this client on its blocklist; it connects anew"),
    errno.ESTALE: (Unavailable, "the image was renamed meanwhile"),
    errno.EBADMSG: (Unavailable, "the cluster's answer was cut"),
    errno.EIO: (Unavailable, "the cluster can't read or write this"),
    errno.EAGAIN: (Unavailable, "the cluster is busy"),
    errno.EINTR: (Unavailable, "the call was interrupted"),
    errno.ECANCELED: (Unavailable, "the call was broken off"),
    errno.ENOTCONN: (Unavailable, "there is no connection to the cluster"),
    errno.ECONNREFUSED: (Unavailable, "the cluster can't be reached"),
    errno.ECONNRESET: (Unavailable, "the connection broke"),
    errno.ECONNABORTED: (Unavailable, "the connection broke"),
    errno.EHOSTUNREACH: (Unavailable, "the cluster can't be reached"),
    errno.ENETUNREACH: (Unavailable, "the cluster can't be reached"),
}


class RbdDriver(Driver):
    """Images as RBD images of one pool. See the module for how."""

    name = "rbd"
    schemes = ("rbd",)
    options = (
        cfg.StrOpt("pool", default="images", help="Pool that holds the images."),
        cfg.StrOpt(
            "namespace",
            default="",
            help=(
                "RBD namespace within the pool; it must exist. Nova and Cinder know no namespaces: they copy images "
                "from there and can't clone them."
            ),
        ),
        cfg.StrOpt(
            "data_pool",
            default="",
            help="Pool for the data of new images, such as an erasure-coded one. Not set: the pool itself.",
        ),
        cfg.StrOpt("user", help="Cephx user, such as glance for client.glance. Not set: what librados takes, admin."),
        cfg.StrOpt("ceph_conf", default="", help="Path of ceph.conf. Not set: librados looks in its usual places."),
        cfg.StrOpt("keyring", default="", help="Path of the user's keyring. Not set: what ceph.conf says."),
        cfg.StrOpt(
            "fsid",
            default="",
            help=(
                "Id of the cluster (ceph fsid). Needed only where several stores are in several clusters: locations "
                "of the others are then refused before anything connects."
            ),
        ),
        cfg.IntOpt(
            "connect_timeout",
            min=1,
            help="Seconds in which a monitor must answer a new client. Not set: [imagestore] timeout_connect.",
        ),
        cfg.IntOpt(
            "operation_timeout",
            min=1,
            help=(
                "Seconds in which a monitor or an OSD must answer each single request. Not set: [imagestore] "
                "timeout_stall."
            ),
        ),
        cfg.IntOpt(
            "object_size",
            default=8 * _MIB,
            min=4096,
            max=32 * _MIB,
            help="Length in bytes of the objects that an image is cut into: a power of two.",
        ),
        cfg.ListOpt(
            "features",
            default=[],
            help=(
                f"Features of new images: {', '.join(_FEATURES)}. Not set: rbd_default_features of ceph.conf. Clones "
                "need layering; without object-map deleting large images takes long."
            ),
        ),
        cfg.BoolOpt(
            "sparse",
            default=True,
            help="Don't write runs of zeros: they read as zeros and take no space.",
        ),
        cfg.BoolOpt(
            "snapshots_to_trash",
            default=False,
            help=(
                "Move an image that has snapshots of others to the trash of the pool (rbd trash) when it is deleted. "
                "Not set: such an image can't be deleted."
            ),
        ),
        cfg.ListOpt(
            "accept_locations",
            default=[],
            help=(
                "Further pools of the same cluster whose images may be read and deleted by location, such as former "
                "ones: pool or pool/namespace, comma-separated. Nothing is ever listed or added there."
            ),
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        self._place = (
            self._read_name("pool", settings.pool or ""),
            self._read_name("namespace", settings.namespace or "", needed=False),
        )
        accepted = [self._read_place(text) for text in settings.accept_locations or ()]
        self._places = frozenset({self._place, *accepted})
        self._data_pool = self._read_name("data_pool", settings.data_pool or "", needed=False) or None
        self._fsid: str = (settings.fsid or "").lower()
        if self._fsid and not _FSID.fullmatch(self._fsid):
            raise self.invalid_option("fsid", "is not an id such as 'ceph fsid' prints")
        if settings.object_size & (settings.object_size - 1):
            raise self.invalid_option("object_size", f"{settings.object_size} is not a power of two")
        self._order: int = settings.object_size.bit_length() - 1
        self._features = self._read_features([name for name in settings.features or () if name])
        self._cluster: _Cluster | None = None
        self._connecting = threading.Lock()
        self._images = _Images()
        self._uploads: set[_Upload] = set()

    def _read_name(self, option: str, text: str, *, needed: bool = True) -> str:
        if needed and not text:
            raise self.invalid_option(option, "not set")
        if "/" in text or "@" in text or not text.isprintable():
            raise self.invalid_option(option, f"{text!r} has characters that a name here can't have")
        return text

    def _read_place(self, text: str) -> tuple[str, str]:
        pool, _, namespace = text.partition("/")
        return self._read_name("accept_locations", pool), self._read_name("accept_locations", namespace, needed=False)

    def _read_features(self, names: list[str]) -> int | None:
        for name in names:
            if name not in _FEATURES:
                raise self.invalid_option("features", f"{name!r} is none of {', '.join(_FEATURES)}")
            if _NEEDS.get(name, name) not in names:
                raise self.invalid_option("features", f"{name} needs {_NEEDS[name]}")
        return sum(_FEATURES[name] for name in set(names)) or None

    def open(self) -> None:
        """Connect to the cluster, unless this process has a connection with these options already.

        Raises:
            ConfigurationError: file, user or pool are not there.
            Unauthenticated: the key is wrong.
            Unavailable: no monitor answered.
        """
        cluster = self._join()
        try:
            if self._fsid and self._fsid != cluster.fsid:
                raise self.invalid_option("fsid", f"the cluster's is {cluster.fsid}")
            self._check_pool(cluster)
        except BaseException:
            cluster.leave(self)
            raise
        self._cluster = cluster
        self._fsid = cluster.fsid
        self.capabilities = Capabilities(
            ranged_reads=True,
            parallel_writes=min(self.limits.workers, _WRITES),
            # librbd copies what it is given, so that a longer block counts several times.
            block_max=_BLOCK,
            sparse_unit=_SPARSE_UNIT if self.settings.sparse else None,
            repeatable_create=True,
            collision="exclusive",
            commit_proof=True,
        )

    def _join(self) -> _Cluster:
        settings, waits = self.settings, self.timeouts
        answer = f"{settings.operation_timeout or waits.stall:g}"
        conf = {
            "client_mount_timeout": f"{settings.connect_timeout or waits.connect:g}",
            "rados_mon_op_timeout": answer,
            "rados_osd_op_timeout": answer,
            # A write has reached the cluster when it returns; and no budget counts what a cache holds.
            "rbd_cache": "false",
            # librbd would write to standard error what it also raises.
            "err_to_stderr": "false",
        }
        if settings.keyring:
            conf["keyring"] = settings.keyring
        return _join(self, settings.ceph_conf or "", settings.user or None, conf)

    def _check_pool(self, cluster: _Cluster) -> None:
        name, namespace = self._place
        for option, pool in (("pool", name), ("data_pool", self._data_pool)):
            if pool is not None and not cluster.rados.pool_exists(pool):
                raise ConfigurationError(f"option {option}: the cluster has no pool {pool!r}", driver=self.name)
        pool_ = cluster.pool(name, namespace)
        with contextlib.suppress(cluster.sdk.rados.ObjectNotFound):
            pool_.ioctx.stat("rbd_directory")  # to see whether the user may
        if namespace:
            try:
                there = cluster.sdk.rbd.RBD().namespace_exists(cluster.pool(name, "").ioctx, namespace)
            except cluster.sdk.rbd.PermissionError:
                return  # a user who is confined to a namespace can't ask
            if not there:
                raise ConfigurationError(f"option namespace: pool {name} has no namespace {namespace!r}")

    def close(self) -> None:
        """Give up the connection, unless others use it. What an upload or a read still holds goes with them."""
        self._images.close()
        for upload in list(self._uploads):
            upload.let_go()
            if upload.given_up:
                upload.end()
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.leave(self)

    def _connection(self) -> _Cluster:
        cluster = self._cluster
        if cluster is None:
            raise Unavailable("the store was closed", temporary=False)
        if not cluster.lost:
            return cluster
        with self._connecting:
            if self._cluster is cluster:
                self._cluster = self._join()
                self._images.clear()
                cluster.leave(self)
            return self._cluster or cluster

    def _pool(self) -> _Pool:
        return self._connection().pool(*self._place)

    def parse(self, uri: str, /) -> Location:
        """Check an ``rbd://`` location, as text only.

        It has four parts, each percent-encoded: fsid, pool (or ``pool/namespace``), image, snapshot; or in old data
        one, a name of an image in the store's own pool, in which nothing is decoded.

        Raises:
            InvalidLocation: another scheme, another number of parts, an empty or unprintable one, a name of ours for
                what is no image, a pool that is not configured, or another cluster, once ours is known.
        """
        scheme, separator, rest = uri.partition("://")
        parts = rest.split("/")
        if not separator or scheme.lower() != "rbd" or len(parts) not in (1, 4):
            raise InvalidLocation("an rbd location is rbd://fsid/pool/image/snapshot, or in old data rbd://image")
        if len(parts) == 4:
            try:
                parts = [unquote(part, errors="strict") for part in parts]
            except UnicodeDecodeError as error:
                raise InvalidLocation("a part of the location is not UTF-8") from error
        if not all(part and part.isprintable() for part in parts):
            raise InvalidLocation("a part of the location is empty, or has characters that can't be printed")
        fsid, place, name, snapshot = ("", "/".join(self._place), parts[0], "") if len(parts) == 1 else parts
        fsid = fsid.lower()
        if name.startswith(".imagestore-"):
            raise InvalidLocation("this is an unfinished upload, not an image")
        if fsid and not _FSID.fullmatch(fsid):
            raise InvalidLocation("the location begins with no id of a cluster")
        if fsid and self._fsid and fsid != self._fsid:
            raise InvalidLocation("the location is in another cluster")
        pool, _, namespace = place.partition("/")
        if (pool, namespace) not in self._places:
            raise InvalidLocation("the location is in a pool that this store is not configured for")
        return _location(fsid, pool, namespace, name, snapshot)

    def _address(self, location: Location) -> tuple[_Pool, str, str]:
        """Where a location is: pool, name and snapshot (empty: not told)."""
        fsid, pool, namespace, name, snapshot = location.key
        cluster = self._connection()
        if fsid and fsid != cluster.fsid:
            raise InvalidLocation("the location is in another cluster")
        return cluster.pool(pool, namespace), name, snapshot

    def locate(self, image_id: str, /) -> Location | None:
        try:
            with self._images.use(self._pool(), image_id, _SNAPSHOT):
                return self._location(image_id)
        except NotFound:
            return None

    def _location(self, image_id: str) -> Location:
        return _location(self._fsid, *self._place, image_id, _SNAPSHOT)

    def stat(self, location: Location, /) -> Stat:
        with self._images.use(*self._address(location)) as image:
            return image.stat

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        image = self._images.take(*self._address(location))
        try:
            image.require(version)
        except BaseException:
            self._images.give(image)
            raise
        chunks = _Chunks(image, start, image.stat.size if stop is None else stop, self._images)
        return Reading(stat=image.stat, chunks=chunks, close=chunks.close)

    def extents(self, location: Location, start: int, stop: int, version: str | None, /) -> Iterator[tuple[int, int]]:
        """Areas in which the image has objects."""
        for begin in range(start, stop, _DIFF_WINDOW):
            with self._images.use(*self._address(location)) as image:
                image.require(version)
                areas = image.areas(begin, min(begin + _DIFF_WINDOW, stop))
                image.check()
            yield from areas

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        pool = self._pool()
        self._require_free(pool, image_id)
        name = _mark(hints.token)
        try:
            self._make(pool, name, hints.size or 0)
        except pool.sdk.rbd.ImageExists:
            # An earlier attempt of this very create, which failed: nobody else has this token.
            if pool.committed(name) is None:
                pool.remove(name)
                self._make(pool, name, hints.size or 0)
        return _Upload(self, pool, image_id, hints)

    def _make(self, pool: _Pool, name: str, size: int) -> None:
        pool.sdk.rbd.RBD().create(
            pool.ioctx,
            name,
            size,
            order=self._order,
            old_format=False,
            features=self._features,
            data_pool=self._data_pool,
        )

    def _require_free(self, pool: _Pool, image_id: str) -> None:
        if pool.id_of(image_id) is not None:
            raise AlreadyExists(
                "the name is taken: by an upload that is not finished, or by an image that has no snapshot named snap"
            )

    def copy(self, location: Location, image_id: str, hints: Hints, /) -> Location:
        """Copy within the cluster: by librbd, without what is empty. The bytes pass through this host."""
        pool = self._pool()
        self._require_free(pool, image_id)
        name = _mark(hints.token)
        try:
            with self._images.use(*self._address(location)) as image:
                image.handle.copy(pool.ioctx, name, self._features, self._order, data_pool=self._data_pool)
                image.check()
            upload = _Upload(self, pool, image_id, hints)
        except BaseException:
            with contextlib.suppress(pool.sdk.rbd.Error, StoreError):
                pool.remove(name)
            raise
        try:
            upload.commit(image.stat.size)
        except BaseException:
            with contextlib.suppress(pool.sdk.rbd.Error, StoreError):
                upload.abort()
            raise
        return upload.location

    def delete(self, location: Location, /) -> None:
        """Remove an image with its snapshot.

        Raises:
            InUse: it has clones, snapshots of others, or is open elsewhere (which a client that died counts as for half
                a minute).
        """
        pool, name, snapshot = self._address(location)
        rbd = pool.sdk.rbd
        internal = pool.committed(name)
        if internal is None:
            raise NotFound("there is no such image")
        with pool.opened(internal) as image:
            found = [each["name"] for each in image.list_snaps()]
            wanted = snapshot or _SNAPSHOT
            told = _told(image)
            if snapshot and snapshot not in found and (found or told is None):
                # Ours without any snapshot is one whose delete was cut short in a full pool.
                raise NotFound("the image has no such snapshot")
            if set(found) - {wanted} and self.settings.snapshots_to_trash:
                image.close()
                rbd.RBD().trash_move(pool.ioctx, name, 0)
                return
            self._require_unused(pool, image, wanted, found)
            # Always the same one, so that what a broken delete leaves is found by the next.
            mark = _mark(uuid.uuid5(uuid.NAMESPACE_URL, internal).hex if told is None else told["token"])
            hidden = self._hide(pool, internal, (name, mark), image, wanted if wanted in found else None)
            if wanted in found:
                image.remove_snap(wanted)
        if hidden != mark:
            pool.forget(mark, internal)
        pool.remove(hidden, internal)

    def _require_unused(self, pool: _Pool, image: Any, wanted: str, found: list[str]) -> None:
        others = sorted(set(found) - {wanted})
        if others:
            raise InUse(f"the image has other snapshots: {', '.join(others)[:200]}")
        if wanted in found and (clones := self._clones(pool, image, wanted)):
            raise InUse(f"the image has clones: {clones[:200]}")
        if pool.watchers(image):
            raise InUse("the image is open elsewhere, or was until a moment ago")

    def _clones(self, pool: _Pool, image: Any, snapshot: str) -> str:
        """Names of the clones of a snapshot; empty if there are none."""
        image.set_snap(snapshot)
        try:
            return ", ".join(f"{child['pool']}/{child['image']}" for child in image.list_children2())
        except pool.sdk.rbd.PermissionError:
            # They are in pools of others; or else the user may not look for any, and then may not do this either.
            if image.is_protected_snap(snapshot):
                image.set_snap(None)
                image.unprotect_snap(snapshot)
                image.protect_snap(snapshot)
            return "in a pool that the user may not see"
        finally:
            image.set_snap(None)

    def _hide(self, pool: _Pool, internal: str, names: tuple[str, str], image: Any, snapshot: str | None) -> str:
        """Take an image's name away: returns the one that it has now, which marks it as a leftover."""
        name, hidden = names
        rbd = pool.sdk.rbd
        unprotected = snapshot is not None and image.is_protected_snap(snapshot)
        if unprotected:
            image.unprotect_snap(snapshot)
        try:
            if pool.rename(internal, name, hidden):
                return hidden
        except BaseException as error:
            if _full(error):
                # A full pool takes no new name. The snapshot goes first then, and with it what others see.
                return name
            if unprotected:
                with contextlib.suppress(rbd.Error):
                    image.protect_snap(snapshot)
            raise
        raise NotFound("somebody else has deleted or renamed the image meanwhile")

    def uploads(self) -> Iterator[Leftover]:
        pool = self._pool()
        rbd = pool.sdk.rbd
        for item in rbd.RBD().list2(pool.ioctx):
            match = _MARK.fullmatch(item["name"])
            if match is None:
                continue
            try:
                with rbd.Image(pool.ioctx, item["name"], read_only=True) as image:
                    leftover = _leftover(item["name"], match[1], image)
            except rbd.ImageNotFound:
                if item["name"] not in rbd.RBD().list(pool.ioctx):
                    continue
                # Half removed: it has a name no more, but librbd lists it until all of it is gone.
                when = pool.modified(f"rbd_header.{item['id']}")
                leftover = Leftover(token=match[1], last_activity=when, alive=False, key=(item["name"],))
            yield leftover

    def discard(self, leftover: Leftover, /) -> None:
        """Remove a leftover. One whose uploader is still there loses its name, and goes when that gives up."""
        pool = self._pool()
        name = leftover.key[0]
        internal = pool.id_of(name)
        # In use still: by its uploader; or, after a delete that somebody made a clone under, by that.
        with contextlib.suppress(pool.sdk.rbd.ImageBusy, pool.sdk.rbd.ImageHasSnapshots):
            if internal is None:
                pool.remove(name)
            else:
                pool.discard(name, internal, leftover.token, leftover.image_id)

    def list(self) -> Iterator[StoredImage]:
        """Every image that has a snapshot ``snap``, whoever made it."""
        pool = self._pool()
        for item in pool.sdk.rbd.RBD().list2(pool.ioctx):
            name = item["name"]
            if not IMAGE_ID.fullmatch(name):
                continue
            try:
                if not pool.snapshots(item["id"]):
                    continue
                with self._images.use(pool, name, _SNAPSHOT) as image:
                    stat = image.stat
            except NotFound:
                continue
            yield StoredImage(image_id=name, location=self._location(name), size=stat.size, modified=stat.modified)

    def usage(self) -> Usage:
        """Room in the pool for data: what its replication, or erasure coding, and its quota leave.

        Nothing is known of a pool while the cluster has no manager, or was just made.
        """
        cluster = self._connection()
        name = self._data_pool or self._place[0]
        told = cluster.command("df", format="json")
        stats = next((pool["stats"] for pool in told["pools"] if pool["name"] == name), None)
        if stats is None:
            return Usage()
        used = stats.get("stored", stats["bytes_used"])
        quota = cluster.command("osd pool get-quota", pool=name, format="json")["quota_max_bytes"]
        free = stats["max_avail"] if not quota else max(0, min(stats["max_avail"], quota - used))
        return Usage(total=used + free, used=used, free=free)

    def translate(self, error: Exception, /) -> StoreError | None:
        if type(error).__module__ not in ("rados", "rbd"):
            return None
        number = abs(getattr(error, "errno", None) or 0)
        if number == errno.ESHUTDOWN and self._cluster is not None:
            self._cluster.lost = True
        if number not in _MEANING:
            return None
        kind, text = _MEANING[number]
        return kind(text)


class _Sdk:
    """The two modules of the distribution."""

    def __init__(self) -> None:
        self.rados: Any = require("rados", package=_PACKAGES)
        self.rbd: Any = require("rbd", package=_PACKAGES)


class _Cluster:
    """A connection. One is shared by all in this process that connect in the same way.

    Attributes:
        fsid: the cluster's id.
        lost: it can't be used any more; who notices connects anew.
        images: all that is open in librbd: never to be given back in another process than this.
    """

    def __init__(self, ceph_conf: str, user: str | None, conf: dict[str, str]) -> None:
        self.sdk = _Sdk()
        self.lost = False
        self.images: set[Any] = set()
        self._pid = os.getpid()
        self._users: set[object] = set()
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str], _Pool] = {}
        rados = self.sdk.rados
        try:
            self.rados = rados.Rados(conffile=ceph_conf, rados_id=user, conf=conf)
        except rados.Error as error:
            raise ConfigurationError(f"option ceph_conf: can't read {ceph_conf or 'any ceph.conf'}: {error}") from error
        try:
            self._connect(user, conf)
        except BaseException:
            self.rados.shutdown()
            raise
        self.fsid: str = self.rados.get_fsid()

    def _connect(self, user: str | None, conf: dict[str, str]) -> None:
        rados, who = self.sdk.rados, f"client.{user or 'admin'}"
        try:
            self.rados.connect()
        except rados.TimedOut as error:
            raise Unavailable(f"no monitor answered within {conf['client_mount_timeout']} s") from error
        except rados.ObjectNotFound as error:
            raise ConfigurationError(
                f"{who} has no key, or ceph.conf names no monitor: check options user, keyring and ceph_conf"
            ) from error
        except (rados.PermissionDeniedError, rados.PermissionError) as error:
            raise Unauthenticated(
                f"the cluster does not accept {who}, or there is no key: check options user and keyring"
            ) from error

    def pool(self, name: str, namespace: str) -> _Pool:
        with self._lock:
            found = self._pools.get((name, namespace))
            if found is None:
                found = self._pools[name, namespace] = _Pool(self, name, namespace)
            return found

    def command(self, prefix: str, **arguments: str) -> Any:
        """What a monitor answers to a command."""
        code, answer, text = self.rados.mon_command(json.dumps({"prefix": prefix, **arguments}), b"")
        if code:
            kind, meaning = _MEANING.get(abs(code), (StoreError, "the monitor refused"))
            raise kind(f"{meaning}: {prefix}: {text}")
        return json.loads(answer)

    def join(self, user: object) -> None:
        self._users.add(user)

    def leave(self, user: object) -> None:
        """``user`` needs it no more. The last one closes it."""
        if os.getpid() != self._pid:
            return
        with _registry:
            self._users.discard(user)
            if self._users or self not in _living:
                return
            _living.discard(self)
            for key in [key for key, value in _clusters.items() if value is self]:
                del _clusters[key]
        for image in list(self.images):
            image.close()
        # librados crashes on a context whose cluster is gone.
        for pool in self._pools.values():
            pool.ioctx.close()
        self.rados.shutdown()

    def close(self, image: Any) -> None:
        """Close an image, unless this is a forked process, where that would hang."""
        if os.getpid() == self._pid and image in self.images:
            self.images.discard(image)
            image.close()


_registry: threading.Lock = threading.Lock()
_clusters: dict[object, _Cluster] = {}
_living: set[_Cluster] = set()


def _join(driver: RbdDriver, ceph_conf: str, user: str | None, conf: dict[str, str]) -> _Cluster:
    """The process's connection of this kind. It is made outside of the lock: others shall not wait for it."""
    key = (ceph_conf, user, tuple(sorted(conf.items())))
    with _registry:
        cluster = _clusters.get(key)
        if cluster is not None and not cluster.lost:
            cluster.join(driver)
            return cluster
    made = _Cluster(ceph_conf, user, conf)
    made.join(driver)
    with _registry:
        _living.add(made)
        cluster = _clusters.get(key)
        if cluster is None or cluster.lost:
            _clusters[key] = made
            return made
        cluster.join(driver)
    made.leave(driver)
    return cluster


def _after_fork() -> None:
    global _registry, _clusters, _living
    if _living:
        # librados can be neither used nor given back in a child: both wait for threads that are not there. One
        # reference more keeps Python from giving it back, also when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_living))
    _registry, _clusters, _living = threading.Lock(), {}, set()


os.register_at_fork(after_in_child=_after_fork)


class _Pool:
    """A pool, or a namespace of one, with what librbd keeps there and does not tell."""

    def __init__(self, cluster: _Cluster, name: str, namespace: str) -> None:
        self.cluster = cluster
        self.sdk = cluster.sdk
        self.ioctx = cluster.rados.open_ioctx(name)
        if namespace:
            self.ioctx.set_namespace(namespace)
        # Without it all that writes to a full pool waits until there is room again.
        self.ioctx.set_osdmap_full_try()

    def id_of(self, name: str) -> str | None:
        """The internal id of the image of that name."""
        try:
            return _decoded(self.ioctx.read(f"rbd_id.{name}", 4096))
        except self.sdk.rados.ObjectNotFound:
            return None

    def name_of(self, internal: str) -> str | None:
        """The name that the directory has for an internal id."""
        try:
            return _decoded(self.ioctx.execute("rbd_directory", "rbd", "dir_get_name", _encoded(internal))[1])
        except self.sdk.rados.ObjectNotFound:
            return None

    def committed(self, name: str) -> str | None:
        """The internal id of the image that has this name for certain."""
        internal = self.id_of(name)
        return internal if internal is not None and self.name_of(internal) == name else None

    def snapshots(self, internal: str) -> frozenset[int]:
        """Ids of the snapshots of an image. Raises `NotFound` if it is gone."""
        try:
            answer = self.ioctx.execute(f"rbd_header.{internal}", "rbd", "get_snapcontext", b"")[1]
        except self.sdk.rados.ObjectNotFound as error:
            raise NotFound("the image is gone") from error
        # The newest id and a count come before the ids.
        return frozenset(int.from_bytes(answer[at : at + 8], "little") for at in range(12, len(answer), 8))

    def modified(self, name: str) -> datetime | None:
        """When an object was last changed."""
        try:
            return datetime.fromtimestamp(time.mktime(self.ioctx.stat(name)[1]), UTC)
        except self.sdk.rados.ObjectNotFound:
            return None

    def rename(self, internal: str, old: str, new: str, *, strict: bool = False) -> bool:
        """Rename an image: of several who rename it, or to the same name, one succeeds.

        Returns whether it has the name ``new`` now; if ``strict``, whether it has it from this very call.

        The steps and their order are librbd's, whose own call takes whatever name the image has at that moment for the
        old one, and so decides nothing between several.
        """
        rados = self.sdk.rados
        with rados.WriteOpCtx() as operation:
            operation.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
            operation.write_full(_encoded(internal))
            try:
                self.ioctx.operate_write_op(operation, f"rbd_id.{new}")
            except rados.ObjectExists:
                if self.id_of(new) != internal:
                    return False
                # An earlier attempt has come so far.
        try:
            names = _encoded(old) + _encoded(new) + _encoded(internal)
            self.ioctx.execute("rbd_directory", "rbd", "dir_rename_image", names)
        except rados.Error as error:
            done = self.name_of(internal) == new
            if not done:
                self.forget(new, internal)
                if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ESTALE, errno.EBADF):
                    raise
            if strict or not done:
                return False
        self.forget(old, internal)
        return True

    def forget(self, name: str, internal: str) -> None:
        """Remove the ``rbd_id`` object of a name, if it is one of this image."""
        rados = self.sdk.rados
        with rados.WriteOpCtx() as operation:
            operation.cmpext(_encoded(internal), 0)
            operation.remove()
            try:
                self.ioctx.operate_write_op(operation, f"rbd_id.{name}")
            except rados.Error as error:
                if error.errno != errno.ENOENT and error.errno < _MISMATCH:
                    raise

    def discard(self, name: str, internal: str, token: str, image_id: str | None) -> None:
        """Remove what is marked. Somebody else who does it, or a commit, may be faster."""
        own = _mark(token)
        # Few names, so that whatever is broken off in between is found again.
        claimed = f"{own}-b" if name.endswith("-a") else f"{own}-a"
        try:
            if not self.rename(internal, name, claimed, strict=True):
                return
        except self.sdk.rados.Error as error:
            if not _full(error):
                raise
            claimed = name
        # What renames left that were broken off: a commit's, a delete's, and others of this kind.
        for stray in {image_id or own, own, f"{own}-a", f"{own}-b"} - {claimed}:
            self.forget(stray, internal)
        self.remove(claimed, internal)

    def remove(self, name: str, internal: str | None = None) -> None:
        """Remove an image that is no longer, or was never, anybody's, with our snapshot."""
        rbd = self.sdk.rbd
        try:
            self._remove(name)
        except rbd.ImageNotFound:
            if internal is not None and self.name_of(internal) == name:
                # The trash, by which every removal goes, is an object that a full pool can't make.
                raise StoreFull("the pool is full, and nothing was ever removed from it: raise its quota") from None

    def _remove(self, name: str) -> None:
        rbd = self.sdk.rbd
        try:
            rbd.RBD().remove(self.ioctx, name)
        except rbd.ImageHasSnapshots:
            with contextlib.closing(rbd.Image(self.ioctx, name)) as image:
                if [each["name"] for each in image.list_snaps()] == [_SNAPSHOT]:
                    if image.is_protected_snap(_SNAPSHOT):
                        image.unprotect_snap(_SNAPSHOT)
                    image.remove_snap(_SNAPSHOT)
            rbd.RBD().remove(self.ioctx, name)

    def open(self, internal: str, snapshot: str | None = None, *, read_only: bool = False) -> Any:
        """An image in librbd. `_Cluster.close` closes it."""
        image = self.sdk.rbd.Image(self.ioctx, image_id=internal, snapshot=snapshot, read_only=read_only)
        self.cluster.images.add(image)
        return image

    @contextlib.contextmanager
    def opened(self, internal: str) -> Iterator[Any]:
        image = self.open(internal)
        try:
            yield image
        finally:
            self.cluster.close(image)

    def watchers(self, image: Any) -> bool:
        """Whether another client has the image open for writing."""
        own = self.cluster.rados.get_instance_id()
        return any(watcher["id"] != own for watcher in image.watchers_list())


class _Image:
    """An image open for reading at its snapshot; or at its head, if it has no ``snap`` and the location tells none.

    Attributes:
        key: pool, name and snapshot that were asked for.
        handle: librbd's.
    """

    def __init__(self, pool: _Pool, name: str, snapshot: str) -> None:
        self.key = (pool, name, snapshot)
        self._pool = pool
        self._name = name
        rbd = pool.sdk.rbd
        internal = pool.committed(name)
        if internal is None:
            raise NotFound("there is no such image")
        self._internal = internal
        self._snap_id: int | None = None
        try:
            self.handle = pool.open(internal, snapshot or _SNAPSHOT, read_only=True)
        except rbd.ImageNotFound as error:
            if snapshot:
                raise NotFound("the image has no such snapshot") from error
            self.handle = pool.open(internal, read_only=True)
        else:
            self._snap_id = self.handle.snap_get_id(snapshot or _SNAPSHOT)
        pool.cluster.join(self)
        try:
            self.stat = self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> Stat:
        handle, size = self.handle, self.handle.size()
        told = _told(handle)
        if self._snap_id is None:
            version, modified = f"{self._internal}-{size:x}", handle.modify_timestamp()
        else:
            version, modified = f"{self._internal}-{self._snap_id:x}", handle.get_snap_timestamp(self._snap_id)
        return Stat(
            size=size,
            version=version,
            token=None if told is None else told["token"],
            modified=_time(modified),
            metadata={} if told is None else told["metadata"],
        )

    def require(self, version: str | None) -> None:
        if version is not None and version != self.stat.version:
            raise Changed("the image was replaced")

    def fresh(self) -> bool:
        """Whether the name still means this image."""
        return self._pool.id_of(self._name) == self._internal and self._there()

    def check(self) -> None:
        """See that what was read until now was the image. Raises `Unavailable` if it may be gone."""
        there = self._there() if self._snap_id is not None else self.fresh()
        if not there:
            raise Unavailable("the image was deleted or replaced while it was read")

    def _there(self) -> bool:
        try:
            snapshots = self._pool.snapshots(self._internal)
        except NotFound:
            return False
        return self._snap_id is None or self._snap_id in snapshots

    def areas(self, start: int, stop: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def take(offset: int, length: int, exists: bool) -> None:
            begin, end = max(offset, start), min(offset + length, stop)
            if not exists or begin >= end:
                return
            if found and begin <= found[-1][1]:
                found[-1] = (found[-1][0], end)
            else:
                found.append((begin, end))

        self.handle.diff_iterate(start, stop - start, None, take, include_parent=True, whole_object=True)
        return found

    def close(self) -> None:
        self._pool.cluster.close(self.handle)
        self._pool.cluster.leave(self)


class _Images:
    """Images that were open for reading a moment ago: a ranged read of one costs no new opening."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Image] = []
        self._closed = False

    @contextlib.contextmanager
    def use(self, pool: _Pool, name: str, snapshot: str) -> Iterator[_Image]:
        image = self.take(pool, name, snapshot)
        try:
            yield image
        finally:
            self.give(image)

    def take(self, pool: _Pool, name: str, snapshot: str) -> _Image:
        """An image, as it is now. Raises `NotFound`."""
        key = (pool, name, snapshot)
        with self._lock:
            found = next((image for image in self._idle if image.key == key), None)
            if found is not None:
                self._idle.remove(found)
        if found is not None:
            try:
                if found.fresh():
                    return found
            except BaseException:
                found.close()
                raise
            found.close()
        return _Image(pool, name, snapshot)

    def give(self, image: _Image) -> None:
        with self._lock:
            surplus = image
            if not self._closed:
                self._idle.append(image)
                if len(self._idle) <= _IDLE_IMAGES:
                    return
                surplus = self._idle.pop(0)
        surplus.close()

    def clear(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for image in idle:
            image.close()

    def close(self) -> None:
        """What is in use is closed when it comes back."""
        self._closed = True
        self.clear()


class _Piece:
    """A request for a piece of an image."""

    def __init__(self, handle: Any, offset: int, length: int) -> None:
        self.length = length
        self.sure = False
        # The request holds its callback: if that held this object too, the ring of them would keep librbd's buffers
        # until a garbage collection.
        arrived: list[bytes | None] = []
        self._arrived = arrived
        self.request = handle.aio_read(offset, length, lambda _, data: arrived.append(data))

    def wait(self) -> None:
        self.request.wait_for_complete_and_cb()

    def result(self) -> bytes:
        [data] = self._arrived
        if data is None:
            kind, text = _MEANING.get(-self.request.get_return_value(), (Unavailable, "the cluster can't read this"))
            raise kind(text) if kind is not NotFound else Unavailable("the image was deleted while it was read")
        if len(data) != self.length:
            raise Changed("the image became shorter while it was read")
        return data


class _Chunks:
    """The bytes from ``start`` to ``stop``, with several requests on their way."""

    def __init__(self, image: _Image, start: int, stop: int, images: _Images) -> None:
        self._image = image
        self._next = start
        self._stop = stop
        self._images = images
        self._pending: deque[_Piece] = deque()
        self._lock = threading.Lock()
        self._busy = False
        self._closed = False
        self._given_back = False

    def __iter__(self) -> _Chunks:
        return self

    def __next__(self) -> bytes:
        with self._lock:
            if self._closed:
                raise Cancelled("the read was closed")
            self._busy = True
        try:
            self._ask()
            if not self._pending:
                self._closed = True
                raise StopIteration
            piece = self._pending[0]
            piece.wait()
            data = piece.result()
            if not piece.sure:
                self._make_sure()
            self._pending.popleft()
            return data
        except BaseException:
            self._closed = True
            raise
        finally:
            with self._lock:
                self._busy = False
                ended = self._closed
            if ended:
                self._give_back()

    def _ask(self) -> None:
        while self._next < self._stop and len(self._pending) < _PIECES:
            length = min(_PIECE - self._next % _PIECE, self._stop - self._next)
            self._pending.append(_Piece(self._image.handle, self._next, length))
            self._next += length

    def _make_sure(self) -> None:
        # Only what has arrived before the question is asked is covered by its answer.
        arrived = [piece for piece in self._pending if piece.request.is_complete()]
        self._image.check()
        for piece in arrived:
            piece.sure = True

    def close(self) -> None:
        """Give the image back: at once, or when the thread that is in it has come out."""
        with self._lock:
            self._closed = True
            if self._busy:
                return
        self._give_back()

    def _give_back(self) -> None:
        with self._lock:
            if self._given_back:
                return
            self._given_back = True
        for piece in self._pending:
            piece.wait()
        self._pending.clear()
        self._images.give(self._image)


class _Upload(Upload):
    """An image on its way in.

    Attributes:
        given_up: it was aborted, also if that failed: nobody but a collector will come back to it.
    """

    def __init__(self, driver: RbdDriver, pool: _Pool, image_id: str, hints: Hints) -> None:
        self.location = driver._location(image_id)
        self._driver = driver
        self._pool = pool
        self._image_id = image_id
        self._token = hints.token
        self._name = _mark(hints.token)
        self._completed = self._committed = self._ended = self.given_up = False
        self._growing = threading.Lock()
        # Keeps an abort from closing the image while a commit works on it.
        self._finishing = threading.Lock()
        internal = pool.id_of(self._name)
        if internal is None:
            raise Unavailable("the upload vanished when it was made")
        self._internal = internal
        self._image = pool.open(internal)
        pool.cluster.join(self)
        driver._uploads.add(self)
        try:
            self._size = self._image.size()
            told = {"token": hints.token, "id": image_id, "metadata": dict(hints.metadata)}
            self._image.metadata_set(_METADATA, json.dumps(told))
        except BaseException:
            self.end()
            raise

    def write(self, block: Block, /) -> None:
        """Write a block at its place; any number at once, again, and in any order."""
        image = self._image
        if image is None:
            raise Unavailable("the store was closed", temporary=False)
        self._make_room(block.offset + len(block.data))
        written = image.write(block.data, block.offset)
        if written != len(block.data):
            raise Unavailable(f"only {written} of {len(block.data)} bytes were written")

    def _make_room(self, end: int) -> None:
        """Grow an image of unknown size: in few steps, and not so far that the way back takes long."""
        if end <= self._size:
            return
        with self._growing:
            if end > self._size:
                size = max(end, self._size + max(_FIRST_STEP, min(self._size, _GIB), self._size // 4))
                self._image.resize(size)
                self._size = size

    def commit(self, size: int, /) -> None:
        """Bring the image to ``size`` bytes, snapshot it, protect the snapshot, and give it its name.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: the upload was discarded, or aborted.
        """
        with self._finishing:
            if self._committed:
                return
            if not self._completed:
                if self._image is None:
                    raise NotFound("the upload was aborted, or its store was closed")
                self._complete(size)
                self._completed = True
                self.let_go()
            self._publish()
            self._committed = True
            self.end()

    def _complete(self, size: int) -> None:
        image = self._image
        image.flush()
        if image.size() != size:
            image.resize(size)
        # All of it may have been done already by an attempt whose answer was lost.
        with contextlib.suppress(self._pool.sdk.rbd.ImageExists):
            image.create_snap(_SNAPSHOT)
        if not image.is_protected_snap(_SNAPSHOT):
            image.protect_snap(_SNAPSHOT)

    def _publish(self) -> None:
        pool = self._pool
        if pool.rename(self._internal, self._name, self._image_id):
            return
        if pool.name_of(self._internal) != self._name:
            raise NotFound("the upload was discarded before its commit")
        if pool.id_of(self._image_id) is not None:
            raise AlreadyExists("the name was taken meanwhile")
        raise Unavailable("the rename was broken off")

    def abort(self) -> None:
        """Remove what has this upload's token. What was committed stays."""
        with self._finishing:
            if self._ended:
                return
            self.given_up = True
            pool = self._pool
            self.let_go()
            name = pool.name_of(self._internal)
            if name == self._image_id:
                pool.forget(self._name, self._internal)
            else:
                if name is not None and _MARK.fullmatch(name):
                    pool.discard(name, self._internal, self._token, self._image_id)
                elif name is None:
                    for half_removed in (self._name, f"{self._name}-a", f"{self._name}-b"):
                        pool.remove(half_removed)
            self.end()

    def let_go(self) -> None:
        """Close the image, so that nobody takes the upload for alive."""
        image, self._image = self._image, None
        if image is not None:
            self._pool.cluster.close(image)

    def end(self) -> None:
        """Nothing is to be done any more: after this the connection may be gone."""
        self._ended = True
        self.let_go()
        self._driver._uploads.discard(self)
        self._pool.cluster.leave(self)


def _full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def _mark(token: str) -> str:
    return f".imagestore-{token}"


def _location(fsid: str, pool: str, namespace: str, name: str, snapshot: str) -> Location:
    place = f"{pool}/{namespace}" if namespace else pool
    long = "/".join(quote(part, safe="") for part in (fsid, place, name, snapshot))
    return Location(
        uri=f"rbd://{long}" if fsid else f"rbd://{name}",
        key=(fsid, pool, namespace, name, snapshot),
        image_id=name if IMAGE_ID.fullmatch(name) else None,
    )


def _encoded(text: str) -> bytes:
    """A string as Ceph encodes it."""
    return len(text.encode()).to_bytes(4, "little") + text.encode()


def _decoded(data: bytes) -> str:
    return data[4 : 4 + int.from_bytes(data[:4], "little")].decode()


def _told(image: Any) -> dict[str, Any] | None:
    """What an upload of ours wrote into the image's metadata; None for images of others."""
    try:
        told = json.loads(image.metadata_get(_METADATA))
    except (KeyError, ValueError):
        return None
    known = (
        isinstance(told, dict)
        and isinstance(told.get("token"), str)
        and isinstance(told.get("metadata"), dict)
        and _TOKEN.fullmatch(told["token"])
    )
    return told if known else None


def _leftover(name: str, token: str, image: Any) -> Leftover:
    told = _told(image)
    image_id = None if told is None else told.get("id")
    return Leftover(
        token=token,
        image_id=image_id if isinstance(image_id, str) and IMAGE_ID.fullmatch(image_id) else None,
        started=_time(image.create_timestamp()),
        last_activity=_time(image.modify_timestamp()),
        alive=bool(list(image.watchers_list())),
        key=(name,),
    )


def _time(told: datetime | None) -> datetime | None:
    """A time as librbd tells it: in UTC, without saying so, and 1970 where there is none."""
    moment = None if told is None else told.replace(tzinfo=UTC)
    return moment if moment is not None and moment.timestamp() > 0 else None
