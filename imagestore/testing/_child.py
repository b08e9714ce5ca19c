"""A process of its own over a harness's backend, to be killed or to fork.

Run as ``python -m imagestore.testing._child``.

PYTEST_DONT_REWRITE: to compare megabytes is quick, to explain how they differ is not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Final

from imagestore.testing._data import chunks, pattern
from imagestore.testing._harness import Harness, NotApplicable

__all__ = ["Child", "contents", "load", "started"]

PATIENCE: Final = 120.0


class Child:
    """A child process and what it says, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self._out = process.stdout
        self._timer = threading.Timer(PATIENCE, process.kill)
        self._timer.daemon = True
        self._timer.start()

    def expect(self, word: str) -> str:
        """The next line, which must begin with ``word``; its rest."""
        line = self._out.readline().rstrip("\n")
        if not line.startswith(word):
            self._process.kill()
            raise AssertionError(f"the child said {line!r} instead of {word!r}:\n{self.errors()}")
        return line.removeprefix(word).strip()

    def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()

    def rest(self) -> list[str]:
        """All whole lines until the child's end."""
        return [line.rstrip("\n") for line in self._out if line.endswith("\n")]

    def succeed(self) -> list[str]:
        """Wait for a good end; all lines until then."""
        lines = self.rest()
        if self._process.wait(PATIENCE) != 0:
            raise AssertionError(f"the child failed with {self._process.returncode}:\n{self.errors()}")
        return lines

    def errors(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read()

    def close(self) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def started(harness: Harness, action: str, **arguments: Any) -> Iterator[Child]:
    """A child that does ``action`` with a copy of the harness."""
    if not harness.processes:
        raise NotApplicable("no other process can reach its backend (Harness.processes)")
    module = type(harness).__module__
    if module == "__main__":
        raise NotApplicable("the harness is in the main script, which a child can't import")
    # Where this process finds its modules the child does too; some test runners load theirs by path only.
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    process = subprocess.Popen(
        [sys.executable, "-m", "imagestore.testing._child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    child = Child(process)
    try:
        assert process.stdin is not None
        # A pipe's buffer takes this; the child may have failed to start before it reads.
        with contextlib.suppress(BrokenPipeError):
            job = pickle.dumps((harness, action, arguments)).hex()
            print(module, sys.modules[module].__file__, job, sep="\t", file=process.stdin, flush=True)
        yield child
    finally:
        child.close()


def contents(image_id: str, block: int) -> bytes:
    """What the adder stores under an id."""
    return pattern(int(2.6 * block), image_id)


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def adder(harness: Harness, *, prefix: str, block: int) -> None:
    """Add images until killed; delete every third."""
    store = _store(harness, block)
    store.exists(prefix)
    _say("ready")
    for number in itertools.count():
        image_id = f"{prefix}-{number}"
        data = contents(image_id, block)
        _say("begin", image_id)
        location = store.add(image_id, chunks(data, block // 4), size=len(data)).location
        _say("added", image_id)
        if number % 3 == 2:
            _say("delete", image_id)
            store.delete(location)
            _say("deleted", image_id)


def forker(harness: Harness, *, image_id: str, block: int) -> None:
    """Use a store, fork, and use it in both processes."""
    store = _store(harness, block)
    data = contents(image_id, block)
    location = store.add(image_id, data).location
    with store.get(location) as reader:
        assert reader.read(10) == data[:10]
    pid = os.fork()
    name = f"{image_id}-{'parent' if pid else 'child'}"
    try:
        with store.get(location) as reader:
            assert reader.read() == data, "another image after the fork"
        store.add(name, data)
        with store.get(store.locate(name)) as reader:
            assert reader.read() == data
        store.delete(store.locate(name))
        store.close()
    except BaseException:
        if pid:
            raise
        import traceback

        traceback.print_exc()
        os._exit(1)
    if not pid:
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the forked child failed"
    _say("done")


ACTIONS: Final[dict[str, Callable[..., None]]] = {"adder": adder, "forker": forker}


def _store(harness: Harness, block: int) -> Any:
    from imagestore._store import Store

    store = Store(harness.make_driver(), name="kit", _block_size=block)
    return store.bind(harness.auths()[0]) if store.capabilities.needs_auth else store


def main() -> None:
    module, path, job = sys.stdin.readline().rstrip("\n").split("\t")
    load(module, path)
    harness, action, arguments = pickle.loads(bytes.fromhex(job))  # noqa: S301 - from our own parent
    ACTIONS[action](harness, **arguments)


def load(name: str, path: str) -> ModuleType:
    """Import a module by name, or where test runners load it by path only, from there."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
