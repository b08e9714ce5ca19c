"""A TCP proxy in this process that cuts, stalls and corrupts at chosen bytes: for tests of network clients.

::

    with FaultProxy("127.0.0.1", 8080) as proxy:
        fault = proxy.add(Fault("cut", "up", after=1_000_000))
        ...                     # use proxy.host and proxy.port in place of the server's
        assert fault.happened

A fault strikes once, on whichever connection carries its byte: bytes are counted over all connections, one direction
at a time, from the moment when the fault was added. What came before that byte was passed on. ``up`` is from client
to server. `FaultProxy.answering` gives every request one answer of your own and counts the requests.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

__all__ = ["Fault", "FaultProxy"]

PIECE = 64 * 1024

Direction = Literal["up", "down"]


@dataclass
class Fault:
    """What happens to the byte number ``after`` (from 0) of a direction.

    ``cut`` ends the connection in an orderly way, ``reset`` does not; ``stall`` lets nothing more through on it, either
    way, until the proxy is closed or the client gives up; ``corrupt`` flips the bits of that byte.
    """

    kind: Literal["cut", "reset", "stall", "corrupt"]
    direction: Direction
    after: int
    happened: bool = False


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self.client = client
        self.server = server
        self.stalled = threading.Event()

    def end(self, *, reset: bool = False) -> None:
        for each in (self.client, self.server):
            if each is None:
                continue
            with contextlib.suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    each.shutdown(socket.SHUT_RDWR)


class FaultProxy:
    """See the module. ``target`` may be changed between connections; ``refusing`` closes new connections at once."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.refusing = False
        self.connections = 0
        self._answer: bytes | None = None
        self._requests = 0
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._open: set[_Connection] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.host, self.port = self._listener.getsockname()[:2]
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget faults that did not happen, and let go of connections that stall."""
        with self._lock:
            self._faults.clear()
            stalled = [each for each in self._open if each.stalled.is_set()]
        for each in stalled:
            each.end()

    def drop(self, *, reset: bool = False) -> None:
        """End all connections that are open now."""
        with self._lock:
            there = list(self._open)
        for each in there:
            each.end(reset=reset)

    @contextlib.contextmanager
    def answering(self, answer: bytes) -> Iterator[Callable[[], int]]:
        """Meanwhile every HTTP request gets this answer; gives a function that tells how many came."""
        self._requests, self._answer = 0, answer
        self.drop()
        try:
            yield lambda: self._requests
        finally:
            self._answer = None
            self.drop()

    def close(self) -> None:
        """End everything. No thread is left when it returns."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        for thread in list(self._threads):
            thread.join(10)
            assert not thread.is_alive(), "a thread of the proxy hangs"

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, name="faultproxy", daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                continue
            self.connections += 1
            if self.refusing or self._closed:
                client.close()
                continue
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = None
        if self._answer is None:
            try:
                server = socket.create_connection(self.target, timeout=10)
            except OSError:
                client.close()
                return
            for each in (client, server):
                each.settimeout(None)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, server)
        with self._lock:
            self._open.add(connection)
        try:
            if self._closed:
                return
            if server is None:
                self._reply(connection)
                return
            back = threading.Thread(target=self._pass, args=(connection, "down"), name="faultproxy", daemon=True)
            back.start()
            self._pass(connection, "up")
            back.join()
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.end()
            client.close()
            if server is not None:
                server.close()

    def _reply(self, connection: _Connection) -> None:
        """Answer one request, body or not, and end the connection."""
        head = b""
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head:
                piece = connection.client.recv(PIECE)
                if not piece:
                    return
                head += piece
            self._requests += 1
            connection.client.sendall(self._answer or b"")

    def _pass(self, connection: _Connection, direction: Direction) -> None:
        assert connection.server is not None
        pair = (connection.client, connection.server)
        source, sink = pair if direction == "up" else pair[::-1]
        buffer = bytearray(PIECE)
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                if connection.stalled.is_set():
                    continue  # swallowed: the other side hears nothing any more
                if not self._strike(connection, direction, sink, memoryview(buffer)[:count]):
                    return
            if not connection.stalled.is_set():
                sink.shutdown(socket.SHUT_WR)
                return
        connection.end()

    def _strike(self, connection: _Connection, direction: Direction, sink: socket.socket, data: memoryview) -> bool:
        """Pass ``data`` on, with what is to happen to it. False ends this direction."""
        struck: list[tuple[int, Fault]] = []
        with self._lock:
            for fault in [each for each in self._faults if each.direction == direction]:
                if fault.after < len(data):
                    struck.append((fault.after, fault))
                    self._faults.remove(fault)
                else:
                    fault.after -= len(data)
        for at, fault in sorted(struck, key=lambda each: each[0]):
            fault.happened = True
            if fault.kind == "corrupt":
                data[at] ^= 0xFF
                continue
            sink.sendall(data[:at])
            if fault.kind == "stall":
                connection.stalled.set()
                # Reading goes on, so that the end of the client is noticed.
                return True
            connection.end(reset=fault.kind == "reset")
            return False
        sink.sendall(data)
        return True
