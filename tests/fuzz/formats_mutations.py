"""Inspects damaged samples: python tests/fuzz/formats_mutations.py --mutations 1000000 [--seed N] [--jobs 2].

Fails on an exception, on a parser that failed, on one that took long, on growing memory, and on a refused image
that a flip makes acceptable without an explanation. Prints what is needed to repeat it, and as it goes the seed with
which another run goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from formats.mutations import check, mutate, pick

MEMORY_MIB = 400


def work(job: tuple[int, int]) -> list[str]:
    seed, count = job
    source = random.Random(seed)
    failures = []
    few = [pick(source) for _ in range(5)]  # as many as are kept unpacked
    for number in range(count):
        mutant = mutate(source, source.choice(few))
        try:
            problem = check(mutant)
        except Exception as error:  # noqa: BLE001 - any is what this looks for
            problem = f"raised {type(error).__name__}: {error}"
        if problem is not None:
            length = "" if mutant.length == mutant.sample.size else f" cut to {mutant.length}"
            failures.append(f"{seed}/{number} {mutant.sample}{length} {mutant.places}: {problem}")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if used > MEMORY_MIB:
        failures.append(f"{seed}: {used} MiB of memory")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    share = 2000
    jobs = [(chosen.seed + start, min(share, chosen.mutations - start)) for start in range(0, chosen.mutations, share)]
    began, failed, done = time.monotonic(), 0, 0
    with multiprocessing.Pool(chosen.jobs) as pool:
        for count, failures in zip((each for _, each in jobs), pool.imap(work, jobs), strict=True):
            done += count
            for failure in failures:
                failed += 1
                print(failure, flush=True)
            if done % 20_000 < share:
                print(
                    f"{done} in {time.monotonic() - began:.0f} s, {failed} failed; "
                    f"the rest: --seed {chosen.seed + done} --mutations {chosen.mutations - done}",
                    flush=True,
                )
    print(f"{done} mutations, {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
