"""What the Sheepdog driver costs: ``python tests/bench/sheepdog.py [--size MIB] [--runs N]``.

Starts the server of the tests as a process of its own and compares the driver, without a store above it, with a plain
loop that sends the same data objects over one connection, four on their way, and waits for the answers: no checks, no
entries in advance, no marks, no other threads. Both take turns, each in a process of its own, so that what changes on
the machine meets both. Prints the medians of wall and CPU seconds (user and system) of each, and the overhead, of which
the goal is 15 % of the wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = HERE.parent / "servers" / "sheepdog_server.py"

CHILD = """
import json, resource, socket, struct, sys, time
from concurrent.futures import ThreadPoolExecutor
from imagestore.driver import Block, Hints, Options
from imagestore.drivers.sheepdog import SheepdogDriver

port, who, name, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
unit, length = 4 << 20, 8 << 20
with open("/dev/urandom", "rb") as file:
    data = file.read(length)
values = {option.dest: option.default for option in SheepdogDriver.options} | {"port": port}
driver = SheepdogDriver(Options(values))
driver.open()

class Plain:
    def __init__(self):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    def send(self, opcode, rest, body=b"", room=0):
        head = struct.pack("<BBHIII", 1, opcode, 1 if body else 0, 0, 0, len(body) or room) + rest
        self.socket.sendmsg([head]) if not body else None
        if body:
            sent = self.socket.sendmsg([head, body])
            if sent < len(head) + len(body):
                self.socket.sendall(memoryview(body)[sent - len(head):])
    def receive(self):
        head = self.socket.recv(48, socket.MSG_WAITALL)
        length = struct.unpack_from("<I", head, 12)[0]
        assert struct.unpack_from("<I", head, 16)[0] == 0
        got = 0
        while got < length:
            got += len(self.socket.recv(length - got, socket.MSG_WAITALL))
        return head

def write_plain(vid):
    plain, waiting = Plain(), 0
    entries = struct.pack("<QQBBBxIII", 1 << 63 | vid << 32, 0, 1, 0, 0, 0, 4664, 0)
    plain.send(3, entries, vid.to_bytes(4, "little") * (2 * count))
    plain.receive()
    for index in range(2 * count):
        part = data[index % 2 * unit:][:unit]
        plain.send(1, struct.pack("<QQBBBxIII", vid << 32 | index, 0, 1, 0, 0, 0, 0, 0), part)
        waiting += 1
        if waiting == 4:
            plain.receive()
            waiting -= 1
    for _ in range(waiting):
        plain.receive()

def read_plain(vid):
    plain, waiting = Plain(), 0
    step = 1 << 20
    for index in range(2 * count):
        for offset in range(0, unit, step):
            plain.send(2, struct.pack("<QQBBBxIII", vid << 32 | index, 0, 0, 0, 0, 0, offset, 0), room=step)
            waiting += 1
            if waiting == 5:
                plain.receive()
                waiting -= 1
    for _ in range(waiting):
        plain.receive()

def measure(function):
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    function()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

def ours():
    upload = driver.create(name, Hints(token="0" * 32, size=count * length))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upload.write, (Block(index=i, offset=i * length, data=data) for i in range(count))))
    upload.commit(count * length)

def get():
    for chunk in driver.read(driver.locate(name), 0, None).chunks:
        pass

if who == "driver":
    told = {"add": measure(ours), "get": measure(get)}
else:
    upload = driver.create(name, Hints(token="0" * 32, size=count * length))
    vid = upload._inode.vid
    told = {"add": measure(lambda: write_plain(vid)), "get": measure(lambda: read_plain(vid))}
    upload.commit(count * length)
driver.delete(driver.locate(name))
print(json.dumps(told))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="of the image, in MiB")
    parser.add_argument("--runs", type=int, default=5)
    told = parser.parse_args()
    runs: dict[str, list[dict[str, list[float]]]] = {"plain": [], "driver": []}
    with tempfile.TemporaryDirectory(prefix="imagestore-bench-") as place:
        started = subprocess.run(
            [sys.executable, SERVER, "start", place],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "IMAGESTORE_SHEEPDOG_ORDERED": "1"},
        )
        port = started.stdout.strip().rpartition(":")[2]
        try:
            for number in range(told.runs):
                for who, done in runs.items():
                    command = [sys.executable, "-c", CHILD, port, who, f"{who}-{number}", str(told.size // 8)]
                    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
                    done.append(json.loads(child.stdout))
        finally:
            subprocess.run([sys.executable, SERVER, "stop", place], check=True, timeout=60)
    print(f"{told.size} MiB, {told.runs} runs, medians")
    for job in ("add", "get"):
        wall, cpu = (
            {who: statistics.median(run[job][part] for run in done) for who, done in runs.items()} for part in (0, 1)
        )
        # Of each turn, so that what the machine did meanwhile is in both.
        ratios = [ours[job][0] / plain[job][0] for plain, ours in zip(runs["plain"], runs["driver"], strict=True)]
        for who in runs:
            print(f"{job}  {who:6}  {wall[who]:6.3f} s  {told.size / wall[who]:6.0f} MiB/s  {cpu[who]:6.3f} s CPU")
        print(
            f"{job}  overhead {100 * (wall['driver'] / wall['plain'] - 1):+.0f} % of the medians,"
            f" {100 * (statistics.median(ratios) - 1):+.0f} % in the median turn"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
