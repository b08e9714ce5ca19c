"""MongoDB's wire protocol in front of PostgreSQL with the documentdb extension: for tests, on loopback only.

::

    python mongodb_gateway.py --pg 'host=/socket/dir user=postgres dbname=postgres' --port PORT
                              [--credentials FILE --cert FILE --key FILE]

Queries, writes, indexes and their errors are the engine's. This only carries messages (OP_MSG, and OP_QUERY of a first
greeting) to the extension's SQL functions and back, keeps cursors, and authenticates (SCRAM-SHA-256). It passes for
one server alone; concerns, preferences and sessions are taken and dropped.

Faults are made as mongod makes them with test commands: ``configureFailPoint: failCommand``, with ``mode`` ``off``,
``alwaysOn`` or ``{times: n}``, and in ``data`` ``failCommands``, ``closeConnection``, ``errorCode``, ``errorLabels``,
``blockConnection`` with ``blockTimeMS``, and two that mongod has not: ``after`` closes the connection when the command
has been carried out, ``skip`` lets so many commands pass before. Switching it off tells in ``count`` how many were hit.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import itertools
import os
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from typing import Any

import bson
import psycopg
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument

RAW: CodecOptions[RawBSONDocument] = CodecOptions(document_class=RawBSONDocument)
QUERY, REPLY, MSG = 2004, 1, 2013
MORE_TO_COME, CHECKSUM = 2, 1

# The engine's SQLSTATE to the error code of MongoDB that means the same.
CODES = {
    "M0001": (2, "BadValue"),
    "M0004": (14, "TypeMismatch"),
    "M0008": (26, "NamespaceNotFound"),
    "M0009": (27, "IndexNotFound"),
    "M000F": (48, "NamespaceExists"),
    "M000M": (66, "ImmutableField"),
    "M000N": (67, "CannotCreateIndex"),
    "M000Q": (73, "InvalidNamespace"),
    "M000R": (85, "IndexOptionsConflict"),
    "M000S": (86, "IndexKeySpecsConflict"),
    "M001C": (11000, "DuplicateKey"),
    "23505": (11000, "DuplicateKey"),
    "40P01": (112, "WriteConflict"),
    "53100": (14031, "OutOfDiskSpace"),
    "57014": (50, "MaxTimeMSExpired"),
    "57P01": (91, "ShutdownInProgress"),
    "57P03": (91, "ShutdownInProgress"),
}
# What the engine has no use for.
DROPPED = frozenset(
    {
        "lsid", "txnNumber", "$db", "$clusterTime", "$readPreference", "readConcern", "writeConcern", "apiVersion",
        "autocommit", "startTransaction",
    }
)  # fmt: skip
WITHOUT_PASSWORD = frozenset({"hello", "isMaster", "ismaster", "saslStart", "saslContinue", "ping", "buildInfo"})

PARSED = "documentdb_core.bson_from_bytea(%s)"
CURSORS = {
    "find": "find_cursor_first_page",
    "aggregate": "aggregate_cursor_first_page",
    "listCollections": "list_collections_cursor_first_page",
    "listIndexes": "list_indexes_cursor_first_page",
}


class CommandError(Exception):
    def __init__(self, code: int, name: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.document = {"ok": 0.0, "errmsg": message, "code": code, "codeName": name, **more}


class Cut(Exception):
    """The connection is to be closed without an answer."""


def from_postgres(error: psycopg.Error) -> CommandError:
    state = error.sqlstate or ("57P01" if isinstance(error, psycopg.OperationalError) else "")
    code, name = CODES.get(state, (8, "UnknownError"))
    return CommandError(code, name, f"{error.diag.message_primary or error} ({error.sqlstate})")


def unpacked(number: int) -> str:
    """A SQLSTATE out of the integer that PostgreSQL packs it into, six bits for each character."""
    return "".join(chr((number >> shift & 63) + 48) for shift in (0, 6, 12, 18, 24))


def with_codes(answer: dict[str, Any]) -> dict[str, Any]:
    for error in answer.get("writeErrors", ()):
        state = unpacked(error["code"] & 0xFFFFFFFF)
        if state[0] in "M2":
            error["code"] = CODES.get(state, (8, ""))[0]
            if error["code"] == 11000 and not error["errmsg"].startswith("E11000"):
                error["errmsg"] = f"E11000 {error['errmsg']}"
    return answer


class Pool:
    """Connections to PostgreSQL."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.free: list[psycopg.Connection[Any]] = []
        self.lock = threading.Lock()

    def get(self) -> psycopg.Connection[Any]:
        with self.lock:
            if self.free:
                return self.free.pop()
        try:
            made = psycopg.connect(self.dsn, autocommit=True)
            made.execute("set client_min_messages = 'error'")
        except psycopg.Error as error:
            raise from_postgres(error) from None
        return made

    def put(self, connection: psycopg.Connection[Any]) -> None:
        with self.lock:
            if not connection.closed and len(self.free) < 20:
                self.free.append(connection)
                return
        connection.close()


class Scram:
    """The server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677) for one user."""

    def __init__(self, user: str, password: str) -> None:
        self.user = user
        self.salt, self.rounds = os.urandom(28), 4096
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), self.salt, self.rounds)
        self.stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
        self.server_key = hmac.digest(salted, b"Server Key", "sha256")

    def start(self, payload: bytes, state: dict[str, Any]) -> bytes:
        bare = payload.split(b",", 2)[2]
        fields = dict(part.split(b"=", 1) for part in bare.split(b","))
        state["known"] = fields[b"n"].decode() == self.user
        nonce = fields[b"r"] + base64.b64encode(os.urandom(18))
        first = b"r=%s,s=%s,i=%d" % (nonce, base64.b64encode(self.salt), self.rounds)
        state["said"] = bare + b"," + first
        return first

    def go_on(self, payload: bytes, state: dict[str, Any]) -> bytes:
        if not payload:
            return b""
        body, _, proof = payload.rpartition(b",p=")
        said = state["said"] + b"," + body
        signature = hmac.digest(self.stored_key, said, "sha256")
        key = bytes(one ^ other for one, other in zip(base64.b64decode(proof), signature, strict=True))
        if not state["known"] or not hmac.compare_digest(hashlib.sha256(key).digest(), self.stored_key):
            raise CommandError(18, "AuthenticationFailed", "Authentication failed.")
        state["done"] = True
        return b"v=" + base64.b64encode(hmac.digest(self.server_key, said, "sha256"))


class FailPoint:
    """What configureFailPoint set."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data: dict[str, Any] = {}
        self.left = 0.0
        self.skip = 0
        self.count = 0

    def configure(self, command: dict[str, Any]) -> int:
        """Returns how many commands were struck since the last time."""
        mode = command["mode"]
        with self.lock:
            before, self.count = self.count, 0
            if mode == "off":
                self.data, self.left = {}, 0
            else:
                self.data = bson.decode(command["data"].raw)
                self.left = float("inf") if mode == "alwaysOn" else mode["times"]
                self.skip = self.data.get("skip", 0)
        return before

    def strike(self, name: str) -> dict[str, Any]:
        """What is to happen to this command."""
        with self.lock:
            if self.left <= 0 or name not in self.data.get("failCommands", ()):
                return {}
            if self.skip:
                self.skip -= 1
                return {}
            self.left -= 1
            self.count += 1
            return self.data


class Engine:
    """Commands as the extension's functions."""

    def __init__(self, dsn: str) -> None:
        self.pool = Pool(dsn)
        self.lock = threading.Lock()
        # Of each cursor: database, where it goes on, and its connection where the engine wants it kept.
        self.cursors: dict[int, tuple[str, bytes, psycopg.Connection[Any] | None]] = {}
        self.numbers = itertools.count(time.time_ns() >> 10)

    def row(self, sql: str, *arguments: Any, connection: psycopg.Connection[Any] | None = None) -> Any:
        used = connection or self.pool.get()
        try:
            cursor = used.cursor(binary=True)
            cursor.execute(sql.encode(), arguments)
            return cursor.fetchone()
        except psycopg.Error as error:
            raise from_postgres(error) from None
        finally:
            if connection is None:
                self.pool.put(used)

    def write(self, name: str, database: str, command: bytes, sequence: bytes | None) -> Any:
        answer = self.row(
            f"select documentdb_core.bson_to_bytea(p_result) from documentdb_api.{name}(%s, {PARSED},"
            " documentdb_core.bsonsequence_from_bytea(%s), null)",
            database,
            command,
            sequence,
        )
        return with_codes(bson.decode(answer[0]))

    def first_page(self, name: str, database: str, command: bytes) -> RawBSONDocument:
        connection = self.pool.get()
        kept = False
        try:
            page, rest, persists, number = self.row(
                "select documentdb_core.bson_to_bytea(cursorpage), documentdb_core.bson_to_bytea(continuation),"
                f" persistconnection, cursorid from documentdb_api.{CURSORS[name]}(%s, {PARSED}, %s)",
                database,
                command,
                next(self.numbers),
                connection=connection,
            )
            if rest is not None and number:
                kept = bool(persists)
                with self.lock:
                    self.cursors[number] = (database, rest, connection if kept else None)
            return RawBSONDocument(page)
        finally:
            if not kept:
                self.pool.put(connection)

    def next_page(self, database: str, number: int, command: bytes) -> RawBSONDocument:
        with self.lock:
            cursor = self.cursors.get(number)
        if cursor is None:
            raise CommandError(43, "CursorNotFound", f"cursor id {number} not found")
        try:
            page, rest = self.row(
                "select documentdb_core.bson_to_bytea(cursorpage), documentdb_core.bson_to_bytea(continuation)"
                f" from documentdb_api.cursor_get_more(%s, {PARSED}, {PARSED})",
                database,
                command,
                cursor[1],
                connection=cursor[2],
            )
        except CommandError:
            self.end(number)
            raise
        if rest is None:
            self.end(number)
        else:
            with self.lock:
                self.cursors[number] = (cursor[0], rest, cursor[2])
        return RawBSONDocument(page)

    def end(self, number: int) -> bool:
        with self.lock:
            cursor = self.cursors.pop(number, None)
        if cursor is not None and cursor[2] is not None:
            cursor[2].close()
        return cursor is not None

    def create_indexes(self, database: str, command: bytes) -> dict[str, Any]:
        answer = self.row(
            "select documentdb_core.bson_to_bytea("
            f"documentdb_api_internal.create_indexes_non_concurrently(%s, {PARSED}, true))",
            database,
            command,
        )
        told = bson.decode(answer[0])
        told = told.get("raw", {}).get("defaultShard", told)
        if told.get("code"):
            code, name = CODES.get(unpacked(told["code"] & 0xFFFFFFFF), (8, "UnknownError"))
            raise CommandError(code, name, told.get("errmsg", ""))
        return {**told, "ok": 1.0}

    def run(self, command: dict[str, Any], raw: bytes, sequence: bytes | None, database: str) -> Any:
        name, value = next(iter(command.items()))
        if name in ("insert", "update", "delete"):
            return self.write(name, database, raw, sequence)
        if name in ("findAndModify", "findandmodify"):
            function = f"documentdb_api.find_and_modify(%s, {PARSED}, null)"
            sql = f"select documentdb_core.bson_to_bytea(p_result) from {function}"
            return RawBSONDocument(self.row(sql, database, raw)[0])
        if name in CURSORS:
            return self.first_page(name, database, raw)
        if name == "getMore":
            return self.next_page(database, value, raw)
        if name == "killCursors":
            numbers = list(command["cursors"])
            gone = [number for number in numbers if self.end(number)]
            lost = [number for number in numbers if number not in gone]
            return {"cursorsKilled": gone, "cursorsNotFound": lost, "cursorsAlive": [], "cursorsUnknown": [], "ok": 1.0}
        if name == "createIndexes":
            return self.create_indexes(database, raw)
        if name == "dropIndexes":
            self.row(f"call documentdb_api.drop_indexes(%s, {PARSED}, null)", database, raw)
            return {"ok": 1.0}
        if name == "drop":
            if not self.row("select documentdb_api.drop_collection(%s, %s)", database, value)[0]:
                raise CommandError(26, "NamespaceNotFound", "ns not found")
            return {"ok": 1.0}
        if name == "dropDatabase":
            self.row("select 1 from (select documentdb_api.drop_database(%s)) x", database)
            return {"ok": 1.0}
        if name in ("ping", "endSessions", "refreshSessions"):
            return {"ok": 1.0}
        if name in ("buildInfo", "buildinfo"):
            return {"version": "7.0.0", "versionArray": [7, 0, 0, 0], "maxBsonObjectSize": 16 << 20, "ok": 1.0}
        raise CommandError(59, "CommandNotFound", f"no such command: '{name}'")


class Server:
    def __init__(self, told: argparse.Namespace) -> None:
        self.engine = Engine(told.pg)
        self.fail_point = FailPoint()
        self.scram: Scram | None = None
        self.tls: ssl.SSLContext | None = None
        if told.credentials:
            self.scram = Scram(*told.credentials.read_text().splitlines())
        if told.cert:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(told.cert, told.key)
        self.listener = socket.create_server(("127.0.0.1", told.port), backlog=128)

    def serve(self) -> None:
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.talk, args=(client,), daemon=True).start()

    def talk(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, EOFError, Cut), contextlib.closing(client):
            if self.tls:
                client = self.tls.wrap_socket(client, server_side=True)
            with client, client.makefile("rb", 1 << 16) as stream:
                state: dict[str, Any] = {}
                while True:
                    self.exchange(client, stream, state)

    def exchange(self, client: socket.socket, stream: Any, state: dict[str, Any]) -> None:
        """One command and its answer."""
        length, number, _, operation = struct.unpack("<iiii", read(stream, 16))
        body = read(stream, length - 16)
        if operation == MSG:
            flags, raw, sequence = sections(body)
            command = dict(bson.decode(raw, RAW).items())
            database = command["$db"]
        elif operation == QUERY:
            start = body.index(b"\0", 4)
            flags, sequence, database = 0, None, body[4:start].decode().split(".")[0]
            raw = body[start + 9 :]
            command = dict(bson.decode(raw, RAW).items())
        else:
            raise EOFError
        try:
            answer = self.command(command, raw, sequence, database, state)
        except CommandError as error:
            answer = error.document
        except Cut:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise
        if flags & MORE_TO_COME:
            return
        out = answer.raw if isinstance(answer, RawBSONDocument) else bson.encode(answer)
        if operation == MSG:
            client.sendall(struct.pack("<iiiiIB", 21 + len(out), 0, number, MSG, 0, 0) + out)
        else:
            client.sendall(struct.pack("<iiiiiqii", 36 + len(out), 0, number, REPLY, 8, 0, 0, 1) + out)

    def command(
        self, command: dict[str, Any], raw: bytes, sequence: bytes | None, database: str, state: dict[str, Any]
    ) -> Any:
        name = next(iter(command))
        if name in ("hello", "isMaster", "ismaster"):
            return self.hello(command)
        if name in ("saslStart", "saslContinue"):
            return self.authenticate(name, command, state)
        if self.scram and not state.get("done") and name not in WITHOUT_PASSWORD:
            raise CommandError(13, "Unauthorized", f"Command {name} requires authentication")
        if name == "configureFailPoint":
            return {"count": self.fail_point.configure(command), "ok": 1.0}
        fault = self.fail_point.strike(name)
        if fault.get("blockConnection"):
            time.sleep(fault.get("blockTimeMS", 0) / 1000)
        if fault.get("closeConnection") and not fault.get("after"):
            raise Cut
        if "errorCode" in fault:
            labels = {"errorLabels": fault["errorLabels"]} if fault.get("errorLabels") else {}
            raise CommandError(fault["errorCode"], "Failpoint", "Failing command via 'failCommand' failpoint", **labels)
        answer = self.engine.run(command, bare(raw, command), sequence, database)
        if fault.get("closeConnection"):
            raise Cut
        return answer

    def hello(self, command: dict[str, Any]) -> dict[str, Any]:
        answer = {
            "isWritablePrimary": True,
            "ismaster": True,
            "helloOk": True,
            "maxBsonObjectSize": 16 << 20,
            "maxMessageSizeBytes": 48_000_000,
            "maxWriteBatchSize": 100_000,
            "localTime": dt.datetime.now(dt.UTC),
            "logicalSessionTimeoutMinutes": 30,
            "minWireVersion": 0,
            "maxWireVersion": 21,
            "readOnly": False,
            "ok": 1.0,
        }
        if "saslSupportedMechs" in command:
            answer["saslSupportedMechs"] = ["SCRAM-SHA-256"]
        return answer

    def authenticate(self, name: str, command: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        if not self.scram or (name == "saslStart" and command["mechanism"] != "SCRAM-SHA-256"):
            raise CommandError(334, "MechanismUnavailable", "mechanism not available")
        step = self.scram.start if name == "saslStart" else self.scram.go_on
        payload = step(bytes(command["payload"]), state)
        return {"conversationId": 1, "done": bool(state.get("done")), "payload": payload, "ok": 1.0}


def read(stream: Any, count: int) -> bytes:
    data: bytes = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def sections(body: bytes) -> tuple[int, bytes, bytes | None]:
    """Flags, command and document sequence of an OP_MSG."""
    (flags,) = struct.unpack("<I", body[:4])
    raw, sequence = b"", None
    position, end = 4, len(body) - (4 if flags & CHECKSUM else 0)
    while position < end:
        kind = body[position]
        position += 1
        (length,) = struct.unpack("<i", body[position : position + 4])
        if kind == 0:
            raw = body[position : position + length]
        else:
            sequence = body[body.index(b"\0", position + 4) + 1 : position + length]
        position += length
    return flags, raw, sequence


def bare(raw: bytes, command: dict[str, Any]) -> bytes:
    """The command without what the engine has no use for."""
    if not DROPPED & command.keys():
        return raw
    return bson.encode({name: value for name, value in command.items() if name not in DROPPED}, codec_options=RAW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pg", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--credentials", type=Path, help="two lines: user, password")
    parser.add_argument("--cert", type=Path)
    parser.add_argument("--key", type=Path)
    Server(parser.parse_args()).serve()


if __name__ == "__main__":
    main()
