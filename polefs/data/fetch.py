"""The contents of segments, as readers want them: plain bytes by their place in the segment."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable
from concurrent.futures import Executor
from typing import Final, Protocol

from lru import LRU

from polefs.data.budget import MemoryBudget
from polefs.data.frames import Buffer, Codec, FrameTable
from polefs.meta.api import MetaAPI
from polefs.objects.base import ObjectStore, StoreError, for_programs, segment_key

log = logging.getLogger(__name__)

_TABLES: Final = 4096
_TABLE_FRAMES: Final = 500_000
"""Frame tables kept in memory, and frames in all of them: one takes 20 bytes."""

_ATTEMPTS: Final = 3
"""A frame that comes damaged is fetched again: it may have been damaged on its way."""


class Segments(Protocol):
    """Failures are ``OSError``: ENOENT for a segment that does not exist (any more), EIO for damaged contents, and what
    the object store reports."""

    def read_now(self, segment: int, start: int, end: int) -> Buffer | None:
        """The contents from ``start`` to ``end`` where they can be had without waiting, else None. Never blocks."""
        ...

    async def read(self, segment: int, start: int, end: int) -> list[Buffer]:
        """The contents from ``start`` to ``end``, in parts to be joined."""
        ...


class PlainSegments:
    """Segments of a local directory: files whose bytes are the contents, read through the page cache."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def read_now(self, segment: int, start: int, end: int) -> Buffer | None:
        return self._objects.get_now(segment_key(segment), start, end - start)

    async def read(self, segment: int, start: int, end: int) -> list[Buffer]:
        return [await self._objects.get(segment_key(segment), start, end - start)]


class FramedSegments:
    """Segments in frames: whole frames are fetched, one ranged GET a call, decoded in the threads, and verified."""

    def __init__(
        self, meta: MetaAPI, objects: ObjectStore, codec: Codec, threads: Executor, budget: MemoryBudget
    ) -> None:
        """``budget``: where the memory of what is being fetched comes from."""
        self._meta = meta
        self._objects = objects
        self._codec = codec
        self._threads = threads
        self._budget = budget
        self._tables: LRU[int, FrameTable] = LRU(_TABLES)
        self._frames = 0

    def read_now(self, segment: int, start: int, end: int) -> Buffer | None:
        return None

    async def read(self, segment: int, start: int, end: int) -> list[Buffer]:
        table = await self.table(segment)
        first, last = table.covering(start, end)
        frames = await self.frames(table, first, last)
        skipped = start - table.start(first)
        if skipped:
            frames[0] = memoryview(frames[0])[skipped:]
        surplus = table.start(last) - end
        if surplus:
            frames[-1] = memoryview(frames[-1])[:-surplus]
        return frames

    async def table(self, segment: int) -> FrameTable:
        """The frames of a segment. ENOENT when there is no such segment."""
        table = self._tables.get(segment)
        if table is None:
            found = await self._meta.segments([segment])
            if not found:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), segment_key(segment))
            table = FrameTable(found[0])
            self._keep(table)
        return table

    async def frames(self, table: FrameTable, first: int, last: int) -> list[Buffer]:
        """The contents of the frames ``[first, last)``, each as a whole."""
        base = table.stored_start(first)
        length = table.stored_start(last) - base
        decoded = table.start(last) - table.start(first) if table.coding else 0
        async with self._budget.hold(length + decoded):
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    stored = await self._objects.get(segment_key(table.segment), base, length)
                except StoreError as error:
                    log.error("%s", error.strerror)
                    raise for_programs(error) from error
                try:
                    return await self._decoded(table, first, last, stored)
                except OSError as error:
                    if attempt == _ATTEMPTS:
                        raise
                    log.warning("%s; fetching it again", error.strerror)
        raise AssertionError("not reached")

    def _decoded(self, table: FrameTable, first: int, last: int, stored: Buffer) -> Awaitable[list[Buffer]]:
        return asyncio.get_running_loop().run_in_executor(
            self._threads, _decode, self._codec, table, first, last, stored
        )

    def _keep(self, table: FrameTable) -> None:
        tables = self._tables
        old = tables.pop(table.segment, None)
        if old is not None:
            self._frames -= len(old)
        while tables and (len(tables) >= _TABLES or self._frames + len(table) > _TABLE_FRAMES):
            _, oldest = tables.popitem()
            self._frames -= len(oldest)
        tables[table.segment] = table
        self._frames += len(table)


def _decode(codec: Codec, table: FrameTable, first: int, last: int, stored: Buffer) -> list[Buffer]:
    view = memoryview(stored)
    base = table.stored_start(first)
    return [
        codec.decode(table, index, view[table.stored_start(index) - base : table.stored_start(index + 1) - base])
        for index in range(first, last)
    ]
