"""A cache that speaks enough of the memcached text protocol for Swift: ``_swift_cache.py PORT``.

Swift's tempauth keeps its tokens in memcached. Nothing but this little of it is needed to run Swift for tests.
"""

from __future__ import annotations

import socketserver
import sys
import threading
import time

MONTH = 60 * 60 * 24 * 30


class Cache:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.items: dict[bytes, tuple[bytes, bytes, float]] = {}

    def get(self, key: bytes) -> tuple[bytes, bytes, float] | None:
        item = self.items.get(key)
        if item is not None and item[2] and item[2] < time.time():
            del self.items[key]
            return None
        return item

    def add(self, key: bytes, change: int) -> bytes | None:
        item = self.get(key)
        if item is None:
            return None
        value = str(max(0, int(item[1]) + change)).encode()
        self.items[key] = (item[0], value, item[2])
        return value


CACHE = Cache()


def end_of(seconds: bytes) -> float:
    """Up to a month it is a span, beyond that a time (memcached's protocol.txt, "Expiration times")."""
    number = int(seconds)
    return 0.0 if number == 0 else number if number > MONTH else time.time() + number


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            verb, *words = line.split()
            with CACHE.lock:
                answer = self.answer(verb, words)
            if words[-1:] != [b"noreply"]:
                self.wfile.write(answer)

    def answer(self, verb: bytes, words: list[bytes]) -> bytes:
        if verb in (b"set", b"add", b"replace"):
            data = self.rfile.read(int(words[3]) + 2)[:-2]
            there = CACHE.get(words[0]) is not None
            if there if verb == b"add" else verb == b"replace" and not there:
                return b"NOT_STORED\r\n"
            CACHE.items[words[0]] = (words[1], data, end_of(words[2]))
            return b"STORED\r\n"
        if verb in (b"get", b"gets"):
            found = [(key, item) for key in words if (item := CACHE.get(key)) is not None]
            parts = [b"VALUE %s %s %d\r\n%s\r\n" % (key, it[0], len(it[1]), it[1]) for key, it in found]
            return b"".join(parts) + b"END\r\n"
        if verb in (b"incr", b"decr"):
            value = CACHE.add(words[0], int(words[1]) if verb == b"incr" else -int(words[1]))
            return b"NOT_FOUND\r\n" if value is None else value + b"\r\n"
        if verb == b"touch":
            item = CACHE.get(words[0])
            if item is not None:
                CACHE.items[words[0]] = (item[0], item[1], end_of(words[1]))
            return b"NOT_FOUND\r\n" if item is None else b"TOUCHED\r\n"
        if verb == b"delete":
            return b"NOT_FOUND\r\n" if CACHE.items.pop(words[0], None) is None else b"DELETED\r\n"
        if verb == b"flush_all":
            CACHE.items.clear()
            return b"OK\r\n"
        return b"ERROR\r\n"


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
