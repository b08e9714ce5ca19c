"""VM images in one SQLite file.

An upload is a row in ``uploads``, written before anything else: that is the mark by which it is found if its process
dies. Its blocks go to ``blocks`` under the upload's token. The commit is one transaction that turns the row in
``uploads`` into one in ``images``, whose primary key decides who gets an id.
"""

import sqlite3
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime

from oslo_config import cfg

from imagestore.driver import (
    IMAGE_ID,
    Capabilities,
    Chunks,
    Driver,
    Leftover,
    Location,
    Reading,
    Stat,
    StoredImage,
    Upload,
)
from imagestore.errors import AlreadyExists, Changed, InvalidLocation, NotFound, StoreError, StoreFull, Unavailable

SCHEMA = """
CREATE TABLE IF NOT EXISTS images (id TEXT PRIMARY KEY, token TEXT NOT NULL, size INTEGER, stored REAL);
CREATE TABLE IF NOT EXISTS uploads (token TEXT PRIMARY KEY, id TEXT NOT NULL, started REAL, active REAL);
CREATE TABLE IF NOT EXISTS blocks (token TEXT, position INTEGER, data BLOB, PRIMARY KEY (token, position));
"""


class ToyDriver(Driver):
    name = "toy"
    schemes = ("toy",)
    options = (cfg.StrOpt("database", required=True, help="The SQLite file that keeps the images."),)

    def open(self):
        with self.transaction() as db:
            db.executescript("PRAGMA journal_mode = WAL;" + SCHEMA)
        self.capabilities = Capabilities(parallel_writes=4, repeatable_create=True, commit_proof=True)

    @contextmanager
    def transaction(self):
        # A connection for each call: nothing to share between threads, nothing to lose in a fork.
        wait = self.timeouts.stall
        with closing(sqlite3.connect(self.settings.database, timeout=wait, isolation_level="IMMEDIATE")) as db, db:
            yield db

    def parse(self, uri):
        scheme, _, image_id = uri.partition("://")
        if scheme.lower() != "toy" or not IMAGE_ID.fullmatch(image_id):
            raise InvalidLocation("a location of this store is toy://<image id>")
        return Location(uri=f"toy://{image_id}", key=(image_id,), image_id=image_id)

    def locate(self, image_id):
        with self.transaction() as db:
            found = db.execute("SELECT 1 FROM images WHERE id = ?", (image_id,)).fetchone()
        return self.parse(f"toy://{image_id}") if found else None

    def stat(self, location):
        with self.transaction() as db:
            row = db.execute("SELECT size, token, stored FROM images WHERE id = ?", location.key).fetchone()
        if row is None:
            raise NotFound("no such image")
        size, token, stored = row
        return Stat(size=size, version=token, token=token, modified=moment(stored))

    def read(self, location, start, stop, version=None):
        stat = self.stat(location)
        if version not in (None, stat.version):
            raise Changed("the image was replaced")
        chunks = ToyChunks(self, stat.token, start, stat.size if stop is None else stop)
        return Reading(stat=stat, chunks=chunks, close=chunks.close)

    def list(self):
        with self.transaction() as db:
            rows = db.execute("SELECT id, size, stored FROM images").fetchall()
        for image_id, size, stored in rows:
            location = self.parse(f"toy://{image_id}")
            yield StoredImage(image_id=image_id, location=location, size=size, modified=moment(stored))

    def create(self, image_id, hints):
        with self.transaction() as db:
            now = time.time()
            db.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?)", (hints.token, image_id, now, now))
        return ToyUpload(self, self.parse(f"toy://{image_id}"), hints.token)

    def delete(self, location):
        with self.transaction() as db:
            row = db.execute("DELETE FROM images WHERE id = ? RETURNING token", location.key).fetchone()
            if row is None:
                raise NotFound("no such image")
            db.execute("DELETE FROM blocks WHERE token = ?", row)

    def uploads(self):
        with self.transaction() as db:
            rows = db.execute("SELECT token, id, started, active FROM uploads").fetchall()
        for token, image_id, started, active in rows:
            yield Leftover(
                token=token, image_id=image_id, started=moment(started), last_activity=moment(active), alive=None
            )

    def discard(self, leftover):
        with self.transaction() as db:
            # Only blocks whose upload is marked: those of a committed image have the same token.
            if db.execute("DELETE FROM uploads WHERE token = ?", (leftover.token,)).rowcount:
                db.execute("DELETE FROM blocks WHERE token = ?", (leftover.token,))

    def translate(self, error):
        if not isinstance(error, sqlite3.Error):
            return None
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return StoreFull(str(error))
        return Unavailable(str(error)) if isinstance(error, sqlite3.OperationalError) else StoreError(str(error))


class ToyChunks(Chunks):
    def __init__(self, driver, token, position, stop):
        super().__init__()
        self.driver = driver
        self.token = token
        self.position = position
        self.stop = stop

    def fetch(self):
        if self.position >= self.stop:
            return b""
        query = "SELECT position, data FROM blocks WHERE token = ? AND position <= ? ORDER BY position DESC LIMIT 1"
        with self.driver.transaction() as db:
            row = db.execute(query, (self.token, self.position)).fetchone()
        if row is None:
            raise Unavailable("the image was deleted while it was read")
        first, block = row
        data = block[self.position - first : self.stop - first]
        self.position += len(data)
        return data

    def release(self):
        pass  # the toy holds nothing between two chunks


class ToyUpload(Upload):
    def __init__(self, driver, location, token):
        self.driver = driver
        self.location = location
        self.token = token

    def write(self, block):
        with self.driver.transaction() as db:
            mark = db.execute("UPDATE uploads SET active = ? WHERE token = ?", (time.time(), self.token))
            if not mark.rowcount:
                raise NotFound("the upload was discarded")
            db.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", (self.token, block.offset, block.data))

    def commit(self, size):
        row = (self.location.image_id, self.token, size, time.time())
        with self.driver.transaction() as db:
            if not db.execute("DELETE FROM uploads WHERE token = ?", (self.token,)).rowcount:
                raise NotFound("the upload was discarded")
            try:
                db.execute("INSERT INTO images VALUES (?, ?, ?, ?)", row)
            except sqlite3.IntegrityError as error:
                raise AlreadyExists("there is an image of that id") from error

    def abort(self):
        self.driver.discard(Leftover(token=self.token))


def moment(seconds):
    return datetime.fromtimestamp(seconds, UTC)
