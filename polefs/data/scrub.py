"""Checking the objects of a volume that is not mounted (fsck): each segment's is there, whole, and what was written."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Final

import msgspec

from polefs.data.frames import Codec, FrameTable
from polefs.meta.model import Segment
from polefs.meta.rules import Kind, Problem
from polefs.meta.store.sqlite import SqliteStore
from polefs.objects.base import SEGMENTS, ObjectStore, segment_key, segment_of

_DELETE_BATCH: Final = 1000

_READ: Final = 4 << 20
"""Bytes of an object read at a time."""

_AT_ONCE: Final = 8
"""Objects that are being read at a time."""

_ATTEMPTS: Final = 2
"""What comes damaged is read again: it may have been damaged on its way."""


async def check_objects(
    store: SqliteStore, objects: ObjectStore, codec: Codec | None = None, *, data: bool, repair: bool = False
) -> AsyncIterator[Problem]:
    """Whether each segment's object exists with its size and, with ``data``, whether all its bytes have the checksums
    that they were written with. Objects that no segment owns are garbage (harmless: a crash between writing an object
    and committing it leaves one); ``repair`` deletes them. Memory is needed for one number an object. OSError when the
    object store fails."""
    sizes: dict[int, int] = {}
    garbage: list[str] = []
    known = {row[0] for row in store.rows("SELECT id FROM segment")}
    async for info in objects.list(SEGMENTS):
        id_ = segment_of(info.key)
        if id_ in known:
            sizes[id_] = info.size
        else:
            garbage.append(info.key)
            yield Problem(Kind.GARBAGE, max(id_, 0), f"object {info.key} belongs to no segment", harmless=True)
    if repair:
        for first in range(0, len(garbage), _DELETE_BATCH):
            await objects.delete(garbage[first : first + _DELETE_BATCH])
    reading: deque[asyncio.Task[list[Problem]]] = deque()
    try:
        for table in _tables(store):
            found = sizes.get(table.segment)
            size = table.stored_start(len(table))
            if found is None:
                yield _problem(table, "is missing")
            elif found != size:
                yield _problem(table, f"has {found} bytes instead of {size}")
            elif data:
                reading.append(asyncio.create_task(_broken(objects, codec or Codec(), table)))
                while len(reading) >= _AT_ONCE:
                    for problem in await reading.popleft():
                        yield problem
        while reading:
            for problem in await reading.popleft():
                yield problem
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


def _tables(store: SqliteStore) -> Iterator[FrameTable]:
    """Of all segments that are referred to. What has a damaged row, ``meta.check`` tells."""
    decode = msgspec.msgpack.Decoder(tuple[tuple[int, int, int], ...]).decode
    for id_, size, blob, coding in store.rows("SELECT id, size, frames, coding FROM segment WHERE live > 0"):
        try:
            yield FrameTable(Segment(id_, size, decode(blob), coding))
        except (msgspec.MsgspecError, OverflowError):
            continue


async def _broken(objects: ObjectStore, codec: Codec, table: FrameTable) -> list[Problem]:
    """What is wrong with the bytes of an object."""
    found: list[Problem] = []
    first = 0
    while first < len(table):
        base = table.stored_start(first)
        last = first + 1
        while last < len(table) and table.stored_start(last + 1) - base <= _READ:
            last += 1
        for _ in range(_ATTEMPTS):
            stored = await objects.get(segment_key(table.segment), base, table.stored_start(last) - base)
            broken = await asyncio.to_thread(_broken_frames, codec, table, first, last, stored)
            if not broken:
                break
        found += broken
        first = last
    return found


def _broken_frames(codec: Codec, table: FrameTable, first: int, last: int, stored: bytes | memoryview) -> list[Problem]:
    found = []
    view = memoryview(stored)
    base = table.stored_start(first)
    for index in range(first, last):
        try:
            codec.decode(table, index, view[table.stored_start(index) - base : table.stored_start(index + 1) - base])
        except OSError as error:
            where = f"{table.length(index)} bytes at {table.start(index)}"
            found.append(_problem(table, f"has damage in {where}: {error.strerror}"))
    return found


def _problem(table: FrameTable, text: str) -> Problem:
    return Problem(Kind.OBJECT, table.segment, f"the object {segment_key(table.segment)} {text}", repairable=False)
