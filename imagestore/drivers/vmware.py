"""Images as files in the datastores of a VMware vCenter, or of an ESXi host.

An image is the file ``<image_dir>/<image id>`` of a datastore. Bytes go and come by HTTPS through the server's
``/folder`` (vSphere Web Services SDK Programming Guide, "Accessing datastores with HTTP"), with the cookie of a SOAP
session; files are moved, deleted and listed by tasks (vSphere Web Services API: FileManager, HostDatastoreBrowser).
Threads share one session, and one of them logs in again when it has ended.

**An upload** has a mark, the file ``.imagestore-<token>.mark``, which `create` writes first, and is one streamed PUT
to ``.imagestore-<token>.part``. A PUT replaces what is there, and its answer does not prove that all was kept. So
``commit`` looks how long the part has become, and moves it to its name with a task that fails if the name is taken.
Who discards an upload removes the mark first and then the part: the move and that meet in the part.

**Several datastores** are one store. The marks are in the first. Who commits moves his there to
``.imagestore-<image id>.claim``, looks for the id in all datastores, and only then moves the part. So all processes
must name the same datastore first.

**Locations** are Glance's: ``vsphere://<host>/folder/<image_dir>/<image id>?dsName=<datastore>&dcPath=<datacenter>``.
The host in a location is compared, and never connected to. No redirect is followed, so the cookie goes to the
configured server only.

**Versions.** A file has only its length and a date, and that date, in seconds, tells two versions apart only if it is
not the present one. So an image has a version from a minute after it was stored (RFC 9110, 8.8.2.2).
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode
from xml.parsers.expat import ExpatError

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
    PullReader,
    PullUpload,
    Reading,
    Stat,
    StoredImage,
    Upload,
    Usage,
)
from imagestore.drivers._vmware_server import Answer, File, Place, Server
from imagestore.errors import (
    AlreadyExists,
    Changed,
    ConfigurationError,
    InUse,
    InvalidImageId,
    InvalidLocation,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    SizeMismatch,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
)

__all__ = ["VMwareDriver"]

_CHUNK: Final = 256 * 1024
_FULL: Final = 8 * 1024 * 1024
_BEAT: Final = 600.0
_DISK: Final = ".vmdk"

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-][a-z0-9._-]*)(?::([0-9]{1,5}))?")
_SEGMENT: Final = re.compile(r"[^/\\\[\]\x00-\x1f\x7f-\x9f]{1,200}")
_TEMPORARY: Final = re.compile(r"\.imagestore-([0-9a-f]{32})\.(mark|part)")
_CLAIM: Final = re.compile(rf"\.imagestore-({IMAGE_ID.pattern})\.claim")
_MARK: Final = re.compile(rf"([0-9a-f]{{32}}) ({IMAGE_ID.pattern})\n")
_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_WEIGHT: Final = re.compile(r"(?:-?[0-9]{1,9})?")

_FAULTS: Final[Mapping[str, tuple[type[StoreError], str]]] = {
    "vim.fault.InvalidLogin": (Unauthenticated, "the server does not accept user and password"),
    "vim.fault.NotAuthenticated": (Unauthenticated, "the server does not accept the session it has just begun"),
    "vim.fault.NoPermission": (PermissionDenied, "the user lacks a privilege for this"),
    "vim.fault.RestrictedVersion": (PermissionDenied, "the server's licence does not allow this"),
    "vim.fault.FileNotFound": (NotFound, "there is no such image"),
    "vim.fault.FileAlreadyExists": (AlreadyExists, "there is a file of that name"),
    "vim.fault.FileLocked": (InUse, "the file is in use"),
    "vim.fault.CannotDeleteFile": (InUse, "the file can't be deleted: it may be in use"),
    "vim.fault.NoDiskSpace": (StoreFull, "the datastore is full"),
    "vim.fault.FileTooLarge": (LimitExceeded, "the datastore can't hold a file of that size"),
    "vim.fault.InaccessibleDatastore": (Unavailable, "the datastore can't be reached"),
    "vim.fault.InvalidDatastoreState": (Unavailable, "the datastore is not ready"),
    "vim.fault.DatastoreNotWritableOnHost": (Unavailable, "no host can write to the datastore"),
    "vim.fault.InvalidDatastore": (ConfigurationError, "there is no such datastore any more"),
    "vim.fault.TaskInProgress": (Unavailable, "another task is in the way"),
    "vim.fault.ConcurrentAccess": (Unavailable, "another task is in the way"),
    "vim.fault.Timedout": (StoreTimeout, "the server's own hosts did not answer it"),
    "vmodl.fault.HostCommunication": (Unavailable, "the server can't reach its host"),
    "vmodl.fault.RequestCanceled": (Unavailable, "somebody cancelled the task"),
    "vmodl.fault.SystemError": (Unavailable, "the server failed"),
    "vmodl.fault.ManagedObjectNotFound": (Unavailable, "the server does not know what it named itself"),
}


class VMwareDriver(Driver):
    """Images in VMware datastores. See the module for how."""

    name = "vmware"
    schemes = ("vsphere",)
    options = (
        cfg.StrOpt(
            "host",
            required=True,
            help="The vCenter or ESXi host: name or address, with :port if that is not 443. HTTPS is always used.",
        ),
        cfg.StrOpt("user", required=True, help="User to log in as, such as imagestore@vsphere.local."),
        cfg.StrOpt("password", required=True, secret=True, help="The user's password."),
        cfg.MultiStrOpt(
            "datastores",
            default=[],
            help=(
                "Where images are kept, as datacenter:datastore or datacenter:datastore:weight. The datacenter is an "
                "inventory path, such as DC0 or north/DC0; on an ESXi host it is ha-datacenter. May be given several "
                "times: new images go to the datastore of the highest weight that has room, of several such to the one "
                "with the most. Processes that share datastores must all name the same one first."
            ),
        ),
        cfg.StrOpt("image_dir", default="openstack_glance", help="Directory of the images in each datastore."),
        cfg.StrOpt(
            "cacert",
            help=(
                "File with the certificates, in PEM, of the authorities to trust in place of the usual ones. "
                "Certificates are always verified."
            ),
        ),
        cfg.StrOpt(
            "certificate",
            help=(
                "File with the server's own certificate, in PEM. Then this certificate is trusted, whoever signed it "
                "and whatever name it has, and no other is. Set this or cacert, not both."
            ),
        ),
        cfg.FloatOpt(
            "task_interval", default=0.5, min=0.01, help="Longest pause between two looks at a task, in seconds."
        ),
        cfg.MultiStrOpt(
            "accept_locations",
            default=[],
            help=(
                "Further places whose images may be read and deleted by location, each a location up to the directory: "
                "vsphere://former-host/folder/old/dir?dcPath=DC0&dsName=old. What is there is looked for on the "
                "configured host; the other one is never connected to. May be given several times."
            ),
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        try:
            self._host = _host(settings.host or "")
        except ValueError as error:
            raise self.invalid_option("host", str(error)) from None
        try:
            directory = "/".join(_directory((settings.image_dir or "").strip("/").split("/")))
        except ValueError as error:
            raise self.invalid_option("image_dir", str(error)) from None
        if settings.cacert and settings.certificate:
            raise self.invalid_option("certificate", "can't be set together with cacert")
        self._weights: dict[Place, int] = {}
        for entry in settings.datastores or ():
            datacenter, datastore, weight = self._read_datastore(entry)
            if Place(datacenter, datastore, directory) in self._weights:
                raise self.invalid_option("datastores", f"{datacenter}:{datastore} is named twice")
            self._weights[Place(datacenter, datastore, directory)] = weight
        if not self._weights:
            raise self.invalid_option("datastores", "name at least one, as datacenter:datastore")
        self._places = tuple(self._weights)
        self._home = self._places[0]
        self._known = [(self._host, place) for place in self._places]
        for text in settings.accept_locations or ():
            host, place = self._read_accepted(text)
            self._known += [(host, place), (self._host, place)]

    def _read_datastore(self, entry: str) -> tuple[str, str, int]:
        datacenter, datastore, weight, *_ = *(part.strip() for part in entry.rsplit(":", 2)), "", ""
        segments = datacenter.strip("/").split("/")
        if not _WEIGHT.fullmatch(weight) or not all(_SEGMENT.fullmatch(each) for each in (*segments, datastore)):
            raise self.invalid_option("datastores", f"{entry!r} is not datacenter:datastore or datacenter:datastore:1")
        return "/".join(segments), datastore, int(weight or 0)

    def _read_accepted(self, text: str) -> tuple[str, Place]:
        try:
            host, directory, datacenter, datastore = _taken_apart(text.strip())
            if not datacenter:
                raise ValueError("it names no datacenter")
            return host, Place(datacenter, datastore, "/".join(_directory(directory)))
        except ValueError as error:
            raise self.invalid_option(
                "accept_locations", f"each is vsphere://host/folder/directory?dcPath=...&dsName=...: {error}"
            ) from None

    def open(self) -> None:
        """Log in, and find the datastores.

        Raises:
            MissingDependency: pyVmomi is not installed.
            ConfigurationError: the server has no such datacenter or datastore, or a certificate can't be read.
        """
        self._server = Server(
            self._host,
            self.settings.user,
            self.settings.password,
            context=self._context(),
            pinned=self._pinned(),
            patience=self.timeouts,
            workers=self.limits.workers,
            interval=self.settings.task_interval,
        )
        try:
            self._server.find(self._places)
        except BaseException:
            self._server.close()
            raise
        self._made: set[Place] = set()
        self.capabilities = Capabilities(repeatable_writes=False, repeatable_create=True)

    def _context(self) -> ssl.SSLContext:
        path = self.settings.certificate or self.settings.cacert or None
        try:
            context = ssl.create_default_context(cafile=path)
        except OSError as error:
            raise ConfigurationError(f"{path} can't be read as certificates: {error.strerror or error}") from error
        if self.settings.certificate:
            context.check_hostname = False
            # So that a certificate that others have signed is an anchor too.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    def _pinned(self) -> bytes | None:
        if not self.settings.certificate:
            return None
        with open(self.settings.certificate, encoding="ascii", errors="replace") as file:
            found = _PEM.findall(file.read())
        if len(found) != 1:
            raise ConfigurationError(f"option certificate: {self.settings.certificate} must hold one certificate")
        return ssl.PEM_cert_to_DER_cert(found[0])

    def close(self) -> None:
        """Log out, and close connections."""
        self._server.close()

    # Locations

    def check_id(self, image_id: str, /) -> None:
        """Files that end in .vmdk belong to the server's virtual disk manager."""
        if image_id.lower().endswith(_DISK):
            raise InvalidImageId("names that end in .vmdk belong to the virtual disk manager")

    def parse(self, uri: str, /) -> Location:
        """Check a location: host, datacenter, datastore and directory must be configured ones.

        A location without a datacenter, as those of ESXi hosts may be, stands for the only one that it can mean.

        Raises:
            InvalidLocation: not such a location, or of another place.
        """
        try:
            host, (*directory, image_id), datacenter, datastore = _taken_apart(uri)
        except ValueError as error:
            raise InvalidLocation(f"not a location in a datastore: {error}") from None
        if not IMAGE_ID.fullmatch(image_id) or image_id.lower().endswith(_DISK):
            raise InvalidLocation("a location ends in an image id, which does not end in .vmdk")
        found = {
            place
            for known, place in self._known
            if known == host
            and place.directory == "/".join(directory)
            and place.datastore == datastore
            and datacenter in ("", place.datacenter)
        }
        if len(found) != 1:
            raise InvalidLocation("this store is not configured for that host, datacenter, datastore or directory")
        return self._located(found.pop()[image_id])

    def _located(self, place: Place) -> Location:
        query = urlencode({"dsName": place.datastore, "dcPath": place.datacenter}, quote_via=quote)
        uri = f"vsphere://{self._host}/folder/{quote(place.directory)}/{place.name}?{query}"
        key = (place.datacenter, place.datastore, place.directory, place.name)
        return Location(uri=uri, key=key, image_id=place.name)

    # Reading

    def locate(self, image_id: str, /) -> Location | None:
        """Look into all datastores. One that can't be reached matters only if the image is in no other."""
        failed: Exception | None = None
        for place in self._places:
            try:
                if self._look(place[image_id]) is not None:
                    return self._located(place[image_id])
            except Exception as error:  # noqa: BLE001 - raised if no other datastore has the image
                failed = failed or error
        if failed is not None:
            raise failed
        return None

    def stat(self, location: Location, /) -> Stat:
        """Ask for the file's headers."""
        stat = self._look(Place(*location.key))
        if stat is None:
            raise NotFound("there is no such image")
        return stat

    def _look(self, place: Place) -> Stat | None:
        with contextlib.closing(self._server.ask("HEAD", place)) as answer:
            if answer.status == 404 or answer.is_directory(place):
                return None
            size = answer.expect(200).length
            if size is not None and not answer.is_listing:
                return answer.stat(size)
        found = self._server.search(place[""], place.name)
        return Stat(size=found[0].size or 0, modified=found[0].modified) if found else None

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Open the file. What a server that knows no ranges sends too much is read and thrown away."""
        place = Place(*location.key)
        ranged = start > 0 or stop is not None
        last = "" if stop is None else stop - 1
        answer = self._server.ask("GET", place, {"Range": f"bytes={start}-{last}"} if ranged else {})
        try:
            if answer.is_directory(place) or (answer.is_listing and not self._server.search(place[""], place.name)):
                raise NotFound("there is no such image")
            first, end, size = answer.expect(200, 206).extent()
            stat = answer.stat(size)
            if version is not None and stat.version != version:
                raise Changed("the image was replaced")
            stop = size if stop is None else min(stop, size)
            if not first <= start <= stop <= end:
                raise Changed(f"the server sends bytes {first} to {end} where {start} to {stop} were asked for")
        except BaseException:
            answer.close()
            raise
        chunks = _Chunks(answer, skip=start - first, count=stop - start)
        return Reading(stat=stat, chunks=chunks, close=chunks.close)

    def list(self) -> Iterator[StoredImage]:
        """The files in the image directories that have an image id for a name."""
        for place in self._places:
            for file in self._server.search(place, "*"):
                if IMAGE_ID.fullmatch(file.name) and not file.name.lower().endswith(_DISK):
                    yield StoredImage(
                        image_id=file.name,
                        location=self._located(place[file.name]),
                        size=file.size,
                        modified=file.modified,
                    )

    def usage(self) -> Usage:
        """Room in the datastores, which other things take too."""
        rooms = [self._server.room(place) for place in self._places]
        total, free = sum(room.total for room in rooms), sum(room.free for room in rooms)
        return Usage(total=total, used=total - free, free=free)

    # Writing

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        """Choose a datastore, and write the mark.

        Raises:
            StoreFull: no datastore has room for so many bytes.
        """
        place = self._choose(hints.size)
        for directory in {place, self._home} - self._made:
            self._server.make_directory(directory)
            self._made.add(directory)
        return _VMwareUpload(self, place, image_id, hints)

    def _choose(self, size: int | None) -> Place:
        rooms = {place: self._server.room(place, fresh=True) for place in self._places}
        usable = [place for place in self._places if rooms[place].usable]
        if not usable:
            raise Unavailable("no datastore can be used now: they can't be reached, or are in maintenance")
        wide = [place for place in usable if rooms[place].free > (size or 0)]
        if not wide:
            raise StoreFull(f"no datastore has room for {'an image' if size is None else f'{size} bytes'}")
        return max(wide, key=lambda place: (self._weights[place], rooms[place].free))

    def delete(self, location: Location, /) -> None:
        """Delete the file. A directory is not an image: the task would delete it with all that is in it."""
        place = Place(*location.key)
        if not self._server.search(place[""], place.name):
            raise NotFound("there is no such image")
        self._server.delete(place)

    def uploads(self) -> Iterator[Leftover]:
        """Marks, parts and claims, by their token."""
        found: defaultdict[str, list[File]] = defaultdict(list)
        ids: dict[str, str] = {}
        for place in self._places:
            for file in self._server.search(place, ".imagestore-*"):
                temporary = _TEMPORARY.fullmatch(file.name)
                told = None
                if place == self._home and (_CLAIM.fullmatch(file.name) or (temporary and temporary[2] == "mark")):
                    told = self._told(place[file.name])
                    if told is not None:
                        ids[told[0]] = told[1]
                if temporary or told:
                    found[temporary[1] if temporary else told[0] if told else ""].append(file)
        for token, files in found.items():
            moments = [file.modified for file in files if file.modified is not None]
            yield Leftover(
                token=token,
                image_id=ids.get(token),
                bytes=sum(file.size or 0 for file in files if file.name.endswith(".part")),
                started=min(moments, default=None),
                last_activity=max(moments, default=None),
            )

    def _told(self, place: Place) -> tuple[str, str] | None:
        """Token and image id that a mark or claim tells; None if there is none, or it is not ours."""
        with contextlib.closing(self._server.ask("GET", place)) as answer:
            text = answer.prose() if answer.status == 200 else ""
        match = _MARK.fullmatch(text)
        return (match[1], match[2]) if match else None

    def discard(self, leftover: Leftover, /) -> None:
        """Remove the mark, then the part, then the claim: see the module."""
        self._remove(leftover.token, leftover.image_id, self._places)

    def _remove(self, token: str, image_id: str | None, places: Iterable[Place]) -> None:
        files = [self._home[_name(token, "mark")], *(place[_name(token, "part")] for place in places)]
        if len(self._places) > 1 and image_id is not None:
            claim = self._home[_name(image_id, "claim")]
            if self._told(claim) == (token, image_id):
                files.append(claim)
        for file in files:
            with contextlib.suppress(self._server.vim.fault.FileNotFound):
                self._server.delete(file)

    def translate(self, error: Exception, /) -> StoreError | None:
        """Faults of the server by their type (vSphere Web Services API), and what goes wrong on the way to it."""
        kinds = [kind.__name__ for kind in type(error).__mro__]
        for kind in kinds:
            if kind in _FAULTS:
                ours, message = _FAULTS[kind]
                return ours(message)
        if "vmodl.MethodFault" in kinds:
            return StoreError(f"the server refused with {kinds[0]}")
        if isinstance(error, ssl.SSLCertVerificationError):
            return Unavailable(
                "the server's certificate is not trusted, or not made out for this host (options cacert, certificate)",
                temporary=False,
            )
        if isinstance(error, TimeoutError):
            return StoreTimeout("the server stopped answering")
        if isinstance(error, socket.gaierror):
            return Unavailable("the host's name can't be looked up")
        if isinstance(error, (OSError, http.client.HTTPException, ExpatError)):
            return Unavailable("the server can't be reached, or broke the connection")
        return None


def _name(what: str, kind: str) -> str:
    return f".imagestore-{what}.{kind}"


def _host(text: str) -> str:
    """The canonical text of a host with a port. Raises ValueError."""
    text = text.strip().lower()
    match = _HOST.fullmatch(f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text)
    if match is None or int(match[2] or 443) not in range(1, 65536):
        raise ValueError("it is a name or an address, with :port if that is not 443")
    return match[1] if match[2] is None or int(match[2]) == 443 else f"{match[1]}:{int(match[2])}"


def _directory(segments: list[str]) -> list[str]:
    """``segments`` if they are those of a directory below a datastore's root. Raises ValueError."""
    if not all(_SEGMENT.fullmatch(each) and each.strip(" .") for each in segments):
        raise ValueError("a directory has names between slashes, none of them empty or made of dots, and no \\ [ ]")
    return segments


def _taken_apart(uri: str) -> tuple[str, list[str], str, str]:
    """Host, path below ``/folder``, datacenter (or "") and datastore of a location. Raises ValueError."""
    scheme, _, rest = uri.partition("://")
    address, folder, rest = rest.partition("/folder/")
    path, question, query = rest.partition("?")
    if scheme.lower() != "vsphere" or not folder or not question:
        raise ValueError("it is vsphere://host/folder/directory/image-id?dsName=datastore&dcPath=datacenter")
    pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=2)
    told = dict(pairs)
    if len(told) != len(pairs) or "dsName" not in told or not told.keys() <= {"dsName", "dcPath"}:
        raise ValueError("its query is dsName=datastore&dcPath=datacenter")
    segments = [unquote(each, errors="strict") for each in path.split("/")]
    return _host(address), segments, told.get("dcPath", "").strip("/"), told["dsName"]


class _VMwareUpload(PullUpload):
    def __init__(self, driver: VMwareDriver, place: Place, image_id: str, hints: Hints) -> None:
        super().__init__()
        self._driver = driver
        self._server = driver._server
        self._image_id = image_id
        self._token = hints.token
        self._size = hints.size
        self._place = place
        self._part = place[_name(hints.token, "part")]
        self._mark = driver._home[_name(hints.token, "mark")]
        self._claimed = self._moving = self._stands = False
        self.location = driver._located(place[image_id])
        self._write_mark()

    def _write_mark(self) -> None:
        self._server.put_small(self._mark, f"{self._token} {self._image_id}\n".encode())
        self._beaten = time.monotonic()

    def write(self, block: Block, /) -> None:
        """Hand the block over to the request that runs. The mark is renewed now and then: it tells who is alive."""
        if time.monotonic() - self._beaten > _BEAT:
            self._must_stand(self._mark)
            self._write_mark()
        super().write(block)

    def put(self, reader: PullReader, /) -> None:
        try:
            self._server.put(self._part, iter(reader.read, b""), self._size)
        except Unavailable as error:
            self._refuse_full(error)
            raise

    def commit(self, size: int, /) -> None:
        self.finish()
        if not self._stands:
            self._claim()
            if not (self._moving and self._was_moved(size)):
                self._move(size)
            self._stands = True
        with contextlib.suppress(self._server.vim.fault.FileNotFound):
            self._server.delete(self._mark)

    def _claim(self) -> None:
        """Where there are several datastores: make sure that nobody else commits the id before we have."""
        driver = self._driver
        if self._claimed or len(driver._places) == 1:
            return
        claim = driver._home[_name(self._image_id, "claim")]
        fault = self._server.vim.fault
        try:
            self._server.move(self._mark, claim)
        except (fault.FileAlreadyExists, fault.FileNotFound) as error:
            # If it is there all the same, an attempt before this one took it, and its answer was lost.
            if driver._told(claim) != (self._token, self._image_id):
                if isinstance(error, fault.FileNotFound):
                    raise NotFound("the upload was discarded") from error
                raise AlreadyExists(
                    "another upload is about to commit this id, or was when it died: then collect removes it"
                ) from error
        self._mark = claim
        if driver.locate(self._image_id) is not None:
            raise AlreadyExists("the id is taken")
        self._claimed = True

    def _move(self, size: int) -> None:
        stored = self._driver._look(self._part)
        if stored is None:
            raise NotFound("the upload was discarded")
        if stored.size != size:
            error = SizeMismatch(f"{size} bytes were sent, and the datastore has {stored.size}")
            self._refuse_full(error)
            raise error
        self._must_stand(self._mark)
        self._moving = True
        fault = self._server.vim.fault
        try:
            self._server.move(self._part, self._place[self._image_id])
        except fault.FileAlreadyExists as error:
            if not self._was_moved(size):
                raise AlreadyExists("the id is taken") from error
        except fault.FileNotFound as error:
            if not self._was_moved(size):
                raise NotFound("the upload was discarded") from error

    def _was_moved(self, size: int) -> bool:
        """Whether a move whose answer was lost has been done.

        Then the part is gone, the image is there, and the mark, which goes first where an upload is discarded, is too.
        """
        if self._driver._look(self._part) is not None:
            return False
        image = self._driver._look(self._place[self._image_id])
        return image is not None and image.size == size and self._driver._look(self._mark) is not None

    def _must_stand(self, mark: Place) -> None:
        if self._driver._look(mark) is None:
            raise NotFound("the upload was discarded")

    def _refuse_full(self, error: StoreError) -> None:
        """A full datastore shows as one of several errors; its free space tells."""
        try:
            free = self._server.room(self._place, fresh=True).free
        except Exception:  # noqa: BLE001 - the error at hand matters more
            return
        if free < _FULL:
            raise StoreFull("the datastore is full") from error

    def abort(self) -> None:
        self.stop()
        self._driver._remove(self._token, self._image_id, (self._place,))


class _Chunks(Chunks):
    """``count`` bytes of an answer after the first ``skip``; an error if it ends before."""

    def __init__(self, answer: Answer, *, skip: int, count: int) -> None:
        super().__init__()
        self._answer = answer
        self._skip = skip
        self._left = count

    def fetch(self) -> bytes:
        while self._skip:
            self._skip -= len(self._some(self._skip))
        if not self._left:
            return b""
        data = self._some(self._left)
        self._left -= len(data)
        return data

    def _some(self, most: int) -> bytes:
        """A connection that is cut looks like the end of the file, also below TLS."""
        data = self._answer.read(min(_CHUNK, most))
        if not data:
            raise Unavailable(f"the server ended {self._skip + self._left} bytes too early")
        return data

    def release(self) -> None:
        self._answer.close()
