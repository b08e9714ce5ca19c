"""A driver of a few lines whose every step a test can script: for what no real backend shows on demand."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from imagestore._models import Location, Retry, Stat, StoredImage
from imagestore._store import Store
from imagestore.driver import Capabilities, Driver, Leftover, Options, Reading, Upload
from imagestore.errors import AlreadyExists, InvalidLocation, NotFound

FAST = Retry(attempts=4, first=0.001, longest=0.002, total=5.0)


class Native(Exception):
    """An error of the backend's own library that the driver knows nothing of."""


@dataclass
class Backend:
    images: dict = field(default_factory=dict)
    pending: dict = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    calls: list = field(default_factory=list)
    script: dict = field(default_factory=dict)

    def happens(self, operation):
        """What the script says for the next call of this operation, if it says anything."""
        with self.lock:
            self.calls.append(operation)
            steps = self.script.get(operation)
            step = steps.pop(0) if steps else None
        if callable(step):
            step = step()
        if isinstance(step, BaseException):
            raise step

    def count(self, operation):
        return self.calls.count(operation)


class FakeUpload(Upload):
    def __init__(self, driver, image_id, hints):
        self.backend = driver.backend
        self.caps = driver.capabilities
        self.location = driver.where(image_id)
        self.image_id = image_id
        self.token = hints.token
        self.backend.pending[self.token] = {}

    def write(self, block):
        self.backend.happens("write")
        with self.backend.lock:
            self.backend.pending[self.token][block.offset] = block.data
        self.backend.happens("written")

    def commit(self, size):
        self.backend.digests = dict(self.digests)
        self.backend.happens("commit")
        with self.backend.lock:
            if self.token not in self.backend.pending:
                raise NotFound("the upload is gone")
            if self.image_id in self.backend.images:
                raise AlreadyExists("taken at commit")
            data = bytearray(size)
            for offset, piece in self.backend.pending.pop(self.token).items():
                data[offset : offset + len(piece)] = piece
            self.backend.images[self.image_id] = (self.token if self.caps.commit_proof else None, bytes(data))
        self.backend.happens("committed")

    def abort(self):
        self.backend.happens("abort")
        self.backend.pending.pop(self.token, None)


class FakeDriver(Driver):
    name = "fake"
    schemes = ("fake",)

    def __init__(self, settings=None, /, *, backend=None, caps=None, **kwargs):
        super().__init__(settings or Options({}), **kwargs)
        self.backend = backend or Backend()
        self.caps = caps or Capabilities(parallel_writes=4, commit_proof=True)

    def clone(self):
        return type(self)(self.settings, backend=self.backend, caps=self.caps, store=self.store)

    def open(self):
        self.backend.happens("open")
        self.capabilities = self.caps

    def close(self):
        self.backend.happens("close")

    def where(self, image_id):
        return Location(uri=f"fake://host/{image_id}", key=(image_id,), image_id=image_id)

    def parse(self, uri):
        host, _, image_id = uri.removeprefix("fake://").partition("/")
        if host != "host":
            raise InvalidLocation(f"not our host: {host}")
        return self.where(image_id)

    def _get(self, location):
        try:
            return self.backend.images[location.key[0]]
        except KeyError:
            raise NotFound("no such image") from None

    def stat(self, location):
        self.backend.happens("stat")
        token, data = self._get(location)
        return Stat(size=len(data), version=str(id(data)), token=token)

    def read(self, location, start, stop, /, version=None):
        self.backend.happens("read")
        data = self._get(location)[1]
        part = data[start:stop] if self.capabilities.ranged_reads else data

        def chunks():
            for at in range(0, len(part), 1000):
                self.backend.happens("chunk")
                yield part[at : at + 1000]

        return Reading(
            stat=Stat(size=len(data), version=str(id(data))),
            chunks=chunks(),
            close=lambda: self.backend.happens("closed"),
        )

    def translate(self, error):
        return None

    def locate(self, image_id):
        self.backend.happens("locate")
        return self.where(image_id) if image_id in self.backend.images else None

    def create(self, image_id, hints):
        self.backend.happens("create")
        return FakeUpload(self, image_id, hints)

    def delete(self, location):
        self.backend.happens("delete")
        self._get(location)
        del self.backend.images[location.key[0]]
        self.backend.happens("deleted")

    def list(self):
        for image_id in list(self.backend.images):
            yield StoredImage(image_id=image_id, location=self.where(image_id))

    def uploads(self):
        for token in list(self.backend.pending):
            yield Leftover(token=token, alive=None)

    def discard(self, leftover):
        self.backend.happens("discard")
        self.backend.pending.pop(leftover.token, None)


def fake_store(caps=None, **kwargs):
    backend = Backend()
    kwargs.setdefault("retry", FAST)
    kwargs.setdefault("_block_size", 1000)
    store = Store(FakeDriver(backend=backend, caps=caps), name="s", **kwargs)
    return store, backend
