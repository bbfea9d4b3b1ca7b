"""Small files that were written together lie together in a segment: who reads some of them soon reads the others.

A region of a segment from which several small reads have come is fetched as a whole, with one request, and kept for a
while, and so is the next one when they come to its end. Segments never change, so what is kept is never out of date.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from typing import Final

from lru import LRU

from polefs.data.budget import MemoryBudget
from polefs.data.cache.gather import cut
from polefs.data.fetch import FramedSegments
from polefs.data.frames import Buffer

_REGION: Final = 4 << 20
"""Bytes of contents."""

_AFTER: Final = 2
"""Small reads from a region before the next one fetches it whole."""

_TINY: Final = 256 << 10
"""A region up to this size is fetched whole at once."""

_NOTED: Final = 256
"""Regions whose reads are counted."""

_KEPT: Final = 12
_LINGER: Final = 10.0
"""Regions kept at a time, and for how long, seconds."""

_Key = tuple[int, int]
"""Segment and number of the region."""


class Neighbours:
    """A ``SegmentReader`` for small pieces."""

    def __init__(self, segments: FramedSegments, budget: MemoryBudget) -> None:
        self._segments = segments
        self._budget = budget
        self._counts: LRU[_Key, int] = LRU(_NOTED)
        self._regions: OrderedDict[_Key, asyncio.Task[list[Buffer]]] = OrderedDict()

    async def read(self, segment: int, start: int, end: int) -> list[Buffer]:
        key = segment, start // _REGION
        base = key[1] * _REGION
        region = self._regions.get(key)
        if region is None and end <= base + _REGION:
            count = self._counts[key] = self._counts.get(key, 0) + 1
            table = await self._segments.table(segment)
            region = self._regions.get(key)
            if region is None and (count > _AFTER or table.size - base <= _TINY):
                region = self._fetch(key)
        if region is None or end > base + _REGION:
            return await self._segments.read(segment, start, end)
        if end - base > _REGION // 2:
            following = segment, key[1] + 1
            if following not in self._regions and following not in self._counts:
                self._counts[following] = _AFTER
                self._fetch(following)
        if key in self._regions:
            self._regions.move_to_end(key)
        await asyncio.wait([region])
        return cut(region.result(), base, start, end)

    def close(self) -> None:
        while self._regions:
            self._drop(next(iter(self._regions)))

    def _fetch(self, key: _Key) -> asyncio.Task[list[Buffer]] | None:
        """None when there is no memory for it now."""
        if len(self._regions) >= _KEPT:
            self._drop(next(iter(self._regions)))
        if not self._budget.take_now(_REGION):
            return None
        region = self._regions[key] = asyncio.get_running_loop().create_task(self._load(*key))
        region.add_done_callback(lambda done: self._loaded(key, done))
        return region

    async def _load(self, segment: int, number: int) -> list[Buffer]:
        table = await self._segments.table(segment)
        start, end = number * _REGION, min((number + 1) * _REGION, table.size)
        return await self._segments.read(segment, start, end) if start < end else []

    def _loaded(self, key: _Key, region: asyncio.Task[list[Buffer]]) -> None:
        if region.cancelled() or region.exception() is not None:
            self._drop(key, region)
        else:
            # A weak reference: what has been dropped before is not kept until then.
            asyncio.get_running_loop().call_later(_LINGER, self._expire, key, weakref.ref(region))

    def _expire(self, key: _Key, region: weakref.ref[asyncio.Task[list[Buffer]]]) -> None:
        if (expired := region()) is not None:
            self._drop(key, expired)

    def _drop(self, key: _Key, region: asyncio.Task[list[Buffer]] | None = None) -> None:
        """Keep a region no longer; ``region``: only when it is this one."""
        kept = self._regions.get(key)
        if kept is not None and region in (None, kept):
            del self._regions[key]
            self._budget.give(_REGION)
