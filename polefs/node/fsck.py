"""Checking a volume that is not mounted, and mending it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from polefs.data.scrub import check_objects
from polefs.meta.check import Problem, check, repair
from polefs.node.errors import plain
from polefs.node.storage import make_codec, open_objects, open_storage, open_store

if TYPE_CHECKING:
    from polefs.data.frames import Codec
    from polefs.meta.store.sqlite import SqliteStore
    from polefs.node.volume import Volume


class Outcome(msgspec.Struct):
    """What a check has found. Harmless findings are in neither number."""

    repaired: int = 0
    left: int = 0
    repairable: int = 0
    """Those left that ``mend`` would repair."""


async def check_volume(
    volume: Volume,
    say: Callable[[str], None],
    *,
    data: bool = False,
    mend: bool = False,
    secret: bytes | None = None,
) -> Outcome:
    """Check a locked volume, telling each finding in a line. ``data`` reads all contents and compares their checksums;
    ``mend`` first brings in what a killed daemon has left, then repairs what can be. OSError when the volume cannot be
    read."""
    if mend:
        await _bring_in(volume, say, secret)
    elif os.listdir(volume.local):
        say("note: contents that are not yet written back wait in local/: the next mount brings them in")
    store = open_store(volume, read_only=not mend)
    try:
        found = list(check(store))
        for problem in found:
            say(f"{problem.kind}: {problem.text}")
        outcome = Outcome(left=len(found), repairable=sum(problem.repairable for problem in found))
        if mend and outcome.repairable:
            outcome = _mend(store, found, say)
        codec = make_codec(volume, secret) if data else None
        await _check_objects(volume, store, say, outcome, codec, data=data, mend=mend)
        return outcome
    finally:
        store.shutdown()


def _mend(store: SqliteStore, found: list[Problem], say: Callable[[str], None]) -> Outcome:
    repair(store)
    left = list(check(store))
    for problem in left:
        say(f"not repaired: {problem.kind}: {problem.text}")
    return Outcome(repaired=max(0, len(found) - len(left)), left=len(left))


async def _check_objects(
    volume: Volume,
    store: SqliteStore,
    say: Callable[[str], None],
    outcome: Outcome,
    codec: Codec | None,
    *,
    data: bool,
    mend: bool,
) -> None:
    objects = await open_objects(volume)
    try:
        async for problem in check_objects(store, objects, codec, data=data, repair=mend):
            say(f"{'note: ' if problem.harmless else ''}{problem.kind}: {problem.text}")
            if not problem.harmless:
                outcome.left += 1
    finally:
        await objects.close()


async def _bring_in(volume: Volume, say: Callable[[str], None], secret: bytes | None) -> None:
    """What the next mount would do: commit the contents that a killed daemon has left, release its orphans. Broken
    metadata may be in the way; the check then tells how."""
    try:
        storage = await open_storage(volume, secret)
        await storage.close()
    except OSError as error:
        say(f"note: {plain(error)}")
