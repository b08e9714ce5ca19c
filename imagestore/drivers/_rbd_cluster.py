"""A connection to a Ceph cluster, its pools, and what librbd keeps in them.

The facts are those of Ceph's ``rbd_types.h`` and ``cls_rbd``; see `imagestore.drivers.rbd` for what is made of them.
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
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from imagestore.driver import require
from imagestore.errors import (
    AlreadyExists,
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

__all__ = ["MARK", "MEANING", "SNAPSHOT", "Cluster", "Pool", "connection", "is_full", "mark_of"]

SNAPSHOT: Final = "snap"
MARK: Final = re.compile(r"\.imagestore-([0-9a-f]{32})(?:-[ab])?")

# The number of the error of a comparison that failed, plus the place where it did.
_MISMATCH: Final = 4095

_PACKAGES: Final = (
    "the distribution's packages python3-rados and python3-rbd, and let the virtual environment see their modules"
)

MEANING: Final[dict[int, tuple[type[StoreError], str]]] = {
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


class _Sdk:
    """The two modules of the distribution."""

    def __init__(self) -> None:
        self.rados: Any = require("rados", package=_PACKAGES)
        self.rbd: Any = require("rbd", package=_PACKAGES)


class Cluster:
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
        self._pools: dict[tuple[str, str], Pool] = {}
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

    def pool(self, name: str, namespace: str) -> Pool:
        with self._lock:
            found = self._pools.get((name, namespace))
            if found is None:
                found = self._pools[name, namespace] = Pool(self, name, namespace)
            return found

    def command(self, prefix: str, **arguments: str) -> Any:
        """What a monitor answers to a command."""
        code, answer, text = self.rados.mon_command(json.dumps({"prefix": prefix, **arguments}), b"")
        if code:
            kind, meaning = MEANING.get(abs(code), (StoreError, "the monitor refused"))
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
_clusters: dict[object, Cluster] = {}
_living: set[Cluster] = set()


def connection(holder: object, ceph_conf: str, user: str | None, conf: dict[str, str]) -> Cluster:
    """The process's connection of this kind, which ``holder`` has until it leaves it.

    It is made outside of the lock: others shall not wait for it.
    """
    key = (ceph_conf, user, tuple(sorted(conf.items())))
    with _registry:
        cluster = _clusters.get(key)
        if cluster is not None and not cluster.lost:
            cluster.join(holder)
            return cluster
    made = Cluster(ceph_conf, user, conf)
    made.join(holder)
    with _registry:
        _living.add(made)
        cluster = _clusters.get(key)
        if cluster is None or cluster.lost:
            _clusters[key] = made
            return made
        cluster.join(holder)
    made.leave(holder)
    return cluster


def _after_fork() -> None:
    global _registry, _clusters, _living
    if _living:
        # librados can be neither used nor given back in a child: both wait for threads that are not there. One
        # reference more keeps Python from giving it back, also when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_living))
    _registry, _clusters, _living = threading.Lock(), {}, set()


os.register_at_fork(after_in_child=_after_fork)


class Pool:
    """A pool, or a namespace of one, with what librbd keeps there and does not tell."""

    def __init__(self, cluster: Cluster, name: str, namespace: str) -> None:
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
            return decoded(self.ioctx.read(f"rbd_id.{name}", 4096))
        except self.sdk.rados.ObjectNotFound:
            return None

    def name_of(self, internal: str) -> str | None:
        """The name that the directory has for an internal id."""
        try:
            return decoded(self.ioctx.execute("rbd_directory", "rbd", "dir_get_name", encoded(internal))[1])
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
            operation.write_full(encoded(internal))
            try:
                self.ioctx.operate_write_op(operation, f"rbd_id.{new}")
            except rados.ObjectExists:
                if self.id_of(new) != internal:
                    return False
                # An earlier attempt has come so far.
        try:
            names = encoded(old) + encoded(new) + encoded(internal)
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
            operation.cmpext(encoded(internal), 0)
            operation.remove()
            try:
                self.ioctx.operate_write_op(operation, f"rbd_id.{name}")
            except rados.Error as error:
                if error.errno != errno.ENOENT and error.errno < _MISMATCH:
                    raise

    def discard(self, name: str, internal: str, token: str, image_id: str | None) -> None:
        """Remove what is marked. Somebody else who does it, or a commit, may be faster."""
        own = mark_of(token)
        # Few names, so that whatever is broken off in between is found again.
        claimed = f"{own}-b" if name.endswith("-a") else f"{own}-a"
        try:
            if not self.rename(internal, name, claimed, strict=True):
                return
        except self.sdk.rados.Error as error:
            if not is_full(error):
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
                if [each["name"] for each in image.list_snaps()] == [SNAPSHOT]:
                    if image.is_protected_snap(SNAPSHOT):
                        image.unprotect_snap(SNAPSHOT)
                    image.remove_snap(SNAPSHOT)
            rbd.RBD().remove(self.ioctx, name)

    def open(self, internal: str, snapshot: str | None = None, *, read_only: bool = False) -> Any:
        """An image in librbd. `Cluster.close` closes it."""
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


def is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def mark_of(token: str) -> str:
    return f".imagestore-{token}"


def encoded(text: str) -> bytes:
    """A string as Ceph encodes it."""
    return len(text.encode()).to_bytes(4, "little") + text.encode()


def decoded(data: bytes) -> str:
    return data[4 : 4 + int.from_bytes(data[:4], "little")].decode()
