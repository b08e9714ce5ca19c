"""Part three: what a killed process leaves behind can be found, told from everything else, and removed.

PYTEST_DONT_REWRITE: to compare megabytes is quick, to explain how they differ is not.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import sys
import time
from collections.abc import Callable
from typing import Final

from imagestore.errors import StoreError
from imagestore.testing import _child
from imagestore.testing._data import CountingSource
from imagestore.testing._faulty import Faults, Killed
from imagestore.testing._harness import NotApplicable
from imagestore.testing._kit import Kit, eventually
from imagestore.testing._registry import check, variants

__all__: list[str] = []

WRITER: Final = ("create", "locate", "delete", "uploads", "discard")


@variants("leftovers", *WRITER, before=False, after=True)
def add_killed(kit: Kit, after: bool) -> None:
    """Killed at any call of an add: the image is whole or absent, what is left is found, removed, and the id free."""
    data = kit.data(2.3)
    plan = kit.faults()
    kit.add(kit.new_id(), data, kit.store(plan))
    for number in range(1, len(plan.log) + 1):
        image_id = kit.new_id()
        mortal = kit.faults()
        mortal.die(number, after=after)
        kit.add_mortally(image_id, data, mortal)
        died = mortal.log[-1].operation
        try:
            there = kit.assert_whole_or_absent(image_id, data)
            begun = "create" in [call.operation for call in mortal.log[: -1 if not after else None]]
            if begun and not there and not kit.harness.vanishing:
                assert kit.leftovers(), "an upload was begun, is no image, and uploads() lists nothing"
            kit.sweep()
            kit.assert_clean()
            assert kit.plain.exists(image_id) == there, "collect() made an image appear or vanish"
            if not there:
                kit.add(image_id, data)
            kit.assert_whole(image_id, data)
        except AssertionError as error:
            moment = "after" if after else "before"
            raise AssertionError(f"killed {moment} call {number} ({died}): {error}") from error
        mortal.bury()
        kit.assert_whole(image_id, data)
        kit.plain.delete(kit.plain.locate(image_id))


@variants("leftovers", *WRITER, before=False, after=True)
def delete_killed(kit: Kit, after: bool) -> None:
    """Killed in a delete: the image is whole or absent, and what is left is found and removed."""
    data = kit.data(2.3)
    image_id = kit.new_id()
    location = kit.add(image_id, data).location
    plan = kit.faults()
    store = kit.store(plan)
    store.stat(location)
    plan.die(len(plan.log) + 1, after=after)
    with contextlib.suppress(Killed, StoreError):
        store.delete(location)
    kit.drop(store)
    there = kit.assert_whole_or_absent(image_id, data)
    assert there is not after, "a delete that was called is not what happened"
    kit.sweep()
    kit.assert_clean()
    assert kit.plain.exists(image_id) == there


@check("leftovers", *WRITER)
def foreign_objects(kit: Kit) -> None:
    """Whatever other tools keep in the backend is neither listed as ours nor touched, whatever we do."""
    untouched = kit.harness.plant_foreign()
    tokens = {item.token for item in kit.leftovers()}
    assert not tokens, f"objects of others are taken for leftovers: {tokens}"
    image_id, data = kit.new_id(), kit.data(2.3)
    plan = kit.faults()
    plan.die(4, after=True)
    kit.add_mortally(image_id, data, plan)
    kit.sweep()
    untouched()
    if not kit.plain.exists(image_id):
        kit.add(image_id, data)
    kit.plain.delete(kit.plain.locate(image_id))
    kit.sweep()
    untouched()


@check("leftovers", *WRITER)
def collect_spares_the_living(kit: Kit) -> None:
    """By default collect touches nothing that is young or alive, and a dry run touches nothing at all."""
    image_id, data = kit.new_id(), kit.data(2.3)

    def collect() -> None:
        running = {item.token: item for item in kit.leftovers()}
        if not kit.harness.vanishing:
            assert len(running) == 1, f"uploads() lists {len(running)} for one upload that runs"
        for item in running.values():
            assert item.image_id in (None, image_id)
            assert item.alive is not False, "an upload that runs is called dead"
            for moment in (item.started, item.last_activity):
                assert moment is None or abs(time.time() - moment.timestamp()) < 3600, f"odd time {moment}"
        assert not [item for item in kit.plain.collect() if item.token in running], "collect() took a young upload"
        if all(item.alive for item in running.values()):
            taken = kit.plain.collect(older_than=0)
            assert not [item for item in taken if item.token in running], "collect() took an upload that is alive"
        seen = kit.plain.collect(older_than=0, include_alive=True, dry_run=True)
        assert {item.token for item in seen} >= set(running), "a dry run does not show what would go"
        assert {item.token for item in kit.leftovers()} == set(running), "a dry run removed something"

    kit.plain.add(image_id, CountingSource(data, at={kit.block + 1: collect}), size=len(data))
    kit.assert_whole(image_id, data)


@check("leftovers", *WRITER)
def discard_twice(kit: Kit) -> None:
    """Discarding what is gone already is no error, and never harms an image that got the id since."""
    if kit.harness.vanishing:
        raise NotApplicable("its unfinished uploads have no name that could be collected")
    image_id, data = kit.new_id(), kit.data(2.3)
    plan = kit.faults()
    plan.on("write", lambda call: _kill(plan), after=True)
    kit.add_mortally(image_id, data, plan)
    left = kit.leftovers()
    assert left, "nothing to discard"
    with kit.driver() as driver:
        for _ in range(2):
            for item in left:
                driver.discard(item)
        kit.assert_clean()
        kit.add(image_id, data)
        for item in left:
            driver.discard(item)
    kit.assert_whole(image_id, data)


@check("leftovers", *WRITER)
def process_killed(kit: Kit) -> None:
    """A process that is killed at any moment of its adds and deletes leaves whole images and what collect removes."""
    guard = _guard(kit)
    seed = secrets.randbits(32)
    rng = random.Random(seed)  # noqa: S311 - moments, not secrets
    sys.stdout.write(f"seed {seed}\n")
    for turn in range(kit.harness.kill_rounds):
        moment = f"seed {seed}, turn {turn}"
        prefix = kit.new_id("kill")
        delay = rng.random() * (0.01, 0.05, 0.2)[turn % 3]
        with _child.started(kit.harness, "adder", prefix=prefix, block=kit.block) as child:
            child.expect("ready")
            time.sleep(delay)
            child.kill()
            finished = [line.split() for line in child.rest()]
        time.sleep(kit.harness.trailing)
        begun = [words[1] for words in finished if words[0] == "begin"]
        added = {words[1] for words in finished if words[0] == "added"}
        gone = {words[1] for words in finished if words[0] == "deleted"}
        deleting = {words[1] for words in finished if words[0] == "delete"}
        for image_id in begun:
            kit.use_id(image_id)
            there = kit.assert_whole_or_absent(image_id, _child.contents(image_id, kit.block))
            assert there or image_id not in added - deleting, f"{moment}: {image_id} was stored and is lost"
            assert not there or image_id not in gone, f"{moment}: {image_id} was deleted and is back"

        def swept() -> bool:
            kit.sweep(include_alive=False)
            return not kit.leftovers()

        assert eventually(swept, kit.harness.settle + 0.5), f"{moment}: not collected: {kit.leftovers()}"
        for image_id in begun:
            if kit.plain.exists(image_id):
                kit.assert_whole(image_id, _child.contents(image_id, kit.block))
                kit.plain.delete(kit.plain.locate(image_id))
    guard()


def _guard(kit: Kit) -> Callable[[], None]:
    try:
        return kit.harness.plant_foreign()
    except NotApplicable:
        return lambda: None


def _kill(plan: Faults) -> None:
    plan.dead = True
    raise Killed("killed by the check")
