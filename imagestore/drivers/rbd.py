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
import errno
import json
import re
import threading
import uuid
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
)
from imagestore.drivers._rbd_cluster import MARK, MEANING, SNAPSHOT, Cluster, Pool, connection, is_full, mark_of
from imagestore.drivers._rbd_images import METADATA, ImageChunks, OpenImages, record_of, time_of
from imagestore.errors import (
    AlreadyExists,
    ConfigurationError,
    InUse,
    InvalidLocation,
    NotFound,
    StoreError,
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
_DIFF_WINDOW: Final = 64 * _GIB
_FIRST_STEP: Final = 64 * _MIB

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
        self._cluster: Cluster | None = None
        self._connecting = threading.Lock()
        self._images = OpenImages()
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

    def _join(self) -> Cluster:
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
        return connection(self, settings.ceph_conf or "", settings.user or None, conf)

    def _check_pool(self, cluster: Cluster) -> None:
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

    def _connection(self) -> Cluster:
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

    def _pool(self) -> Pool:
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

    def _address(self, location: Location) -> tuple[Pool, str, str]:
        """Where a location is: pool, name and snapshot (empty: not told)."""
        fsid, pool, namespace, name, snapshot = location.key
        cluster = self._connection()
        if fsid and fsid != cluster.fsid:
            raise InvalidLocation("the location is in another cluster")
        return cluster.pool(pool, namespace), name, snapshot

    def locate(self, image_id: str, /) -> Location | None:
        try:
            with self._images.use(self._pool(), image_id, SNAPSHOT):
                return self._location(image_id)
        except NotFound:
            return None

    def _location(self, image_id: str) -> Location:
        return _location(self._fsid, *self._place, image_id, SNAPSHOT)

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
        chunks = ImageChunks(image, start, image.stat.size if stop is None else stop, self._images)
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
        name = mark_of(hints.token)
        try:
            self._make(pool, name, hints.size or 0)
        except pool.sdk.rbd.ImageExists:
            # An earlier attempt of this very create, which failed: nobody else has this token.
            if pool.committed(name) is None:
                pool.remove(name)
                self._make(pool, name, hints.size or 0)
        return _Upload(self, pool, image_id, hints)

    def _make(self, pool: Pool, name: str, size: int) -> None:
        pool.sdk.rbd.RBD().create(
            pool.ioctx,
            name,
            size,
            order=self._order,
            old_format=False,
            features=self._features,
            data_pool=self._data_pool,
        )

    def _require_free(self, pool: Pool, image_id: str) -> None:
        if pool.id_of(image_id) is not None:
            raise AlreadyExists(
                "the name is taken: by an upload that is not finished, or by an image that has no snapshot named snap"
            )

    def copy(self, location: Location, image_id: str, hints: Hints, /) -> Location:
        """Copy within the cluster: by librbd, without what is empty. The bytes pass through this host."""
        pool = self._pool()
        self._require_free(pool, image_id)
        name = mark_of(hints.token)
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
            wanted = snapshot or SNAPSHOT
            told = record_of(image)
            if snapshot and snapshot not in found and (found or told is None):
                # Ours without any snapshot is one whose delete was cut short in a full pool.
                raise NotFound("the image has no such snapshot")
            if set(found) - {wanted} and self.settings.snapshots_to_trash:
                image.close()
                rbd.RBD().trash_move(pool.ioctx, name, 0)
                return
            self._require_unused(pool, image, wanted, found)
            # Always the same one, so that what a broken delete leaves is found by the next.
            mark = mark_of(uuid.uuid5(uuid.NAMESPACE_URL, internal).hex if told is None else told["token"])
            hidden = self._hide(pool, internal, (name, mark), image, wanted if wanted in found else None)
            if wanted in found:
                image.remove_snap(wanted)
        if hidden != mark:
            pool.forget(mark, internal)
        pool.remove(hidden, internal)

    def _require_unused(self, pool: Pool, image: Any, wanted: str, found: list[str]) -> None:
        others = sorted(set(found) - {wanted})
        if others:
            raise InUse(f"the image has other snapshots: {', '.join(others)[:200]}")
        if wanted in found and (clones := self._clones(pool, image, wanted)):
            raise InUse(f"the image has clones: {clones[:200]}")
        if pool.watchers(image):
            raise InUse("the image is open elsewhere, or was until a moment ago")

    def _clones(self, pool: Pool, image: Any, snapshot: str) -> str:
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

    def _hide(self, pool: Pool, internal: str, names: tuple[str, str], image: Any, snapshot: str | None) -> str:
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
            if is_full(error):
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
            match = MARK.fullmatch(item["name"])
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
                with self._images.use(pool, name, SNAPSHOT) as image:
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
        if number not in MEANING:
            return None
        kind, text = MEANING[number]
        return kind(text)


class _Upload(Upload):
    """An image on its way in.

    Attributes:
        given_up: it was aborted, also if that failed: nobody but a collector will come back to it.
    """

    def __init__(self, driver: RbdDriver, pool: Pool, image_id: str, hints: Hints) -> None:
        self.location = driver._location(image_id)
        self._driver = driver
        self._pool = pool
        self._image_id = image_id
        self._token = hints.token
        self._name = mark_of(hints.token)
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
            self._image.metadata_set(METADATA, json.dumps(told))
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
            image.create_snap(SNAPSHOT)
        if not image.is_protected_snap(SNAPSHOT):
            image.protect_snap(SNAPSHOT)

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
                if name is not None and MARK.fullmatch(name):
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


def _location(fsid: str, pool: str, namespace: str, name: str, snapshot: str) -> Location:
    place = f"{pool}/{namespace}" if namespace else pool
    long = "/".join(quote(part, safe="") for part in (fsid, place, name, snapshot))
    return Location(
        uri=f"rbd://{long}" if fsid else f"rbd://{name}",
        key=(fsid, pool, namespace, name, snapshot),
        image_id=name if IMAGE_ID.fullmatch(name) else None,
    )


def _leftover(name: str, token: str, image: Any) -> Leftover:
    told = record_of(image)
    image_id = None if told is None else told.get("id")
    return Leftover(
        token=token,
        image_id=image_id if isinstance(image_id, str) and IMAGE_ID.fullmatch(image_id) else None,
        started=time_of(image.create_timestamp()),
        last_activity=time_of(image.modify_timestamp()),
        alive=bool(list(image.watchers_list())),
        key=(name,),
    )
