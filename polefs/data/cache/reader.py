"""Reading committed contents through the cache.

What is not cached is fetched in *flights*: ranges of whole blocks, each fetched once whoever waits for it, given to its
readers as soon as it has come, and written to the cache file behind them. A flight belongs to the generation of the
file in which it was looked up: a reader that comes after a change does not board it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from polefs.data.budget import MemoryBudget
from polefs.data.cache.directory import BLOCK, CacheDirectory
from polefs.data.cache.gather import SegmentReader, cut, gather
from polefs.data.cache.landed import Landed, LandedRange
from polefs.data.cache.neighbours import Neighbours
from polefs.data.cache.rangeset import Range, RangeSet
from polefs.data.cache.store import CachedFile, CacheLimits, ContentCache
from polefs.data.cache.streams import Streams
from polefs.data.extentcache import ExtentCache
from polefs.data.fetch import FramedSegments
from polefs.data.frames import FRAME_MAX, Buffer
from polefs.data.reader import ContentsChanged, zeros
from polefs.meta.api import MetaAPI
from polefs.meta.model import Extent, Inode
from polefs.objects.localio import DIRECT_MIN

log = logging.getLogger(__name__)

FLIGHT_MAX: Final = 4 << 20
"""Longest flight, bytes: what one request fetches."""

_WARMED: Final = 16 << 20
"""Bytes of a file that ``warm`` fetches at a time."""

_ATTEMPTS: Final = 8
"""At contents whose segments are gone: the next time others have come, unless they are lost."""

_THREADS: Final = 4

_REGIONS: Final = 2
"""Fetched at a time because of scattered reads."""

_SMALL: Final = 256 << 10
"""Files up to this size are fetched whole, bytes; of others no less than a frame is."""


class _Flight:
    """``[start, end)``, whole blocks; ``done`` brings the bytes, with zeros beyond the end of the file, and at the end
    of ``task`` they are cached."""

    __slots__ = ("done", "end", "generation", "start", "task", "unread")

    task: asyncio.Task[None]

    def __init__(self, start: int, end: int, generation: int) -> None:
        self.start = start
        self.end = end
        self.generation = generation
        self.unread = end - start
        """Bytes that nobody has asked it for."""
        self.done: asyncio.Future[list[Buffer]] = asyncio.get_running_loop().create_future()


class Reading:
    """What the reader keeps with a ``CachedFile``."""

    __slots__ = ("flights", "landed", "streams")

    def __init__(self) -> None:
        self.flights: list[_Flight] = []
        self.landed: list[LandedRange] = []
        self.streams = Streams()


class CachedContents:
    """The committed contents of files with extents."""

    def __init__(
        self,
        meta: MetaAPI,
        extents: ExtentCache,
        segments: FramedSegments,
        directory: CacheDirectory,
        limits: CacheLimits,
        budget: MemoryBudget,
    ) -> None:
        """``budget`` is for what is fetched and not yet written to the cache; no part of that of ``segments``, which
        may be waited for with some of this one held."""
        self._meta = meta
        self._extents = extents
        self._segments = segments
        self._threads = ThreadPoolExecutor(_THREADS, "cache")
        self.cache = ContentCache(directory, self._threads, limits, Reading)
        self._budget = budget
        self._landed = Landed(budget)
        self._regions = asyncio.Semaphore(_REGIONS)
        self._neighbours = Neighbours(segments, budget.share(budget.limit // 2))
        self._tasks: set[asyncio.Task[None]] = set()
        self.hits = 0
        self.misses = 0
        """Bytes that readers wanted: cached, or not (yet)."""

    async def start(self, previous: int, writer: int) -> None:
        """As ``ContentCache.start``; before the first read."""
        await self.cache.start(previous, writer)

    async def close(self, *, clean: bool) -> None:
        """As ``ContentCache.close``; nobody reads any more. What is still being fetched is given up."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        self._neighbours.close()
        await self.cache.close(clean=clean)
        self._threads.shutdown(wait=False)

    async def read(self, inode: Inode, start: int, end: int) -> list[Buffer]:
        """The bytes of the range, in parts; beyond the size they are zero. ENOENT when a segment is gone and
        ContentsChanged when the file is another meanwhile: get the inode anew."""
        stop = min(end, inode.size)
        if stop <= start:
            return zeros(end - start)
        file = self.cache.find(inode.ino)
        if file is not None and file.valid.covers(start, stop):
            found = self._landed.read(file.reading.landed, file.generation, start, stop)
            if found is None and (data := file.read_now(start, stop)) is not None:
                found = [data]
            if found is not None:
                self.hits += stop - start
                ahead = file.reading.streams.note(start, stop)
                if ahead is not None and ahead[0] < inode.size:
                    self._start(self._fetch_ahead(inode.ino, *ahead))
                return found + zeros(end - stop)
        return await self._read(inode, start, stop) + zeros(end - stop)

    async def _read(self, inode: Inode, start: int, end: int) -> list[Buffer]:
        file = await self.cache.open(inode.ino, inode.size)
        extents = await self._look_up(inode, start & -_SMALL, min(_up(end, _SMALL), _up(inode.size)))
        # From here to the last flight nothing is awaited: metadata, generation and valid ranges belong together.
        if file is None or file.changing or file.gone:
            self.misses += end - start
            return await gather(self._segments, extents, start, end)
        file.readers += 1
        try:
            return await self._read_file(file, inode, extents, start, end)
        finally:
            file.readers -= 1

    async def _read_file(
        self, file: CachedFile[Reading], inode: Inode, extents: Sequence[Extent], start: int, end: int
    ) -> list[Buffer]:
        generation = file.generation
        streams = file.reading.streams
        small = inode.size <= _SMALL
        ahead = None if small else streams.note(start, end)
        region: Range | None = None
        missing = _missing(file, extents, start & -BLOCK, _up(end))
        lacking = sum(min(high, end) - max(low, start) for low, high in missing)
        self.misses += lacking
        self.hits += end - start - lacking
        if missing:
            low, high = missing[0][0], missing[-1][1]
            if small:
                low, high = 0, _up(inode.size)
            else:
                region = None if ahead else streams.region(low)
                low, high = low & -FRAME_MAX, _up(high, FRAME_MAX)
            high = min(high, _up(inode.size))
            segments = self._neighbours if small else self._segments
            for each in _missing(file, extents, low, high):
                self._board(file, segments, extents, *each)
            if region is not None:
                self._start(self._fetch_region(file, *region))
        if ahead is not None and ahead[0] < inode.size:
            self._start(self._fetch_ahead(inode.ino, *ahead))
        found: list[Buffer] = []
        flights = [flight for flight in file.reading.flights if flight.generation == generation]
        for low, high, flight in _itinerary(flights, missing, start, end):
            if flight is None:
                found += await self._cached(file, generation, extents, low, high)
            else:
                flight.unread -= high - low
                found += await self._awaited(flight, extents, low, high)
        return found

    async def _look_up(self, inode: Inode, start: int, end: int) -> list[Extent]:
        """The extents of the range that belong to this inode."""
        extents = self._extents.get_now(inode.ino, start, end)
        if extents is None:
            extents = await self._extents.get(inode.ino, start, end)
        if (await self._meta.get_inode(inode.ino)).data_version != inode.data_version:
            raise ContentsChanged
        return extents

    async def _cached(
        self, file: CachedFile[Reading], generation: int, extents: Sequence[Extent], start: int, end: int
    ) -> list[Buffer]:
        """What was valid, or a hole, at this generation."""
        if file.generation == generation:
            if file.handle is None:
                return zeros(end - start)
            data = file.read_now(start, end) or await self.cache.read(file, start, end)
            if data is not None:
                return [data]
        return await gather(self._segments, extents, start, end)

    async def _awaited(self, flight: _Flight, extents: Sequence[Extent], start: int, end: int) -> list[Buffer]:
        await asyncio.wait([flight.done])
        if flight.done.exception() is not None:
            # It may have been somebody else's; whoever reads learns what is wrong by trying.
            return await gather(self._segments, extents, start, end)
        return cut(flight.done.result(), flight.start, start, end)

    async def hold_complete(self, inode: Inode) -> CachedFile[Reading] | None:
        """The file's cache, when it holds all of it in a cache file of exactly its size; counted in its ``users``. None
        as well when the file is being changed."""
        file = await self.cache.open(inode.ino, inode.size)
        if file is None or not inode.size or not file.valid.covers(0, _up(inode.size)):
            return None
        file.users += 1
        try:
            now = await self._meta.get_inode(inode.ino)
            if now.data_version == inode.data_version and await self.cache.cut(file, inode.size):
                return file
        except BaseException:
            file.users -= 1
            raise
        file.users -= 1
        return None

    async def warm(self, ino: int) -> None:
        """Bring all of a file into the cache, as far as it can take it. Errors as of ``Segments``."""
        position = missing = 0
        while True:
            inode = await self._meta.get_inode(ino)
            if position >= inode.size or inode.inline is not None:
                return
            end = min(position + _WARMED, _up(inode.size))
            try:
                file = await self.cache.open(ino, inode.size)
                extents = await self._look_up(inode, position, end)
                if file is not None and not file.changing and not file.gone:
                    segments = self._neighbours if inode.size <= _SMALL else self._segments
                    for each in _missing(file, extents, position, end):
                        self._board(file, segments, extents, *each)
                    flights = list(file.reading.flights)
                    if flights:
                        await asyncio.wait([flight.task for flight in flights])
                    for flight in flights:
                        flight.done.result()
            except (ContentsChanged, FileNotFoundError) as error:
                missing += isinstance(error, FileNotFoundError)
                if missing == _ATTEMPTS:
                    text = f"contents of inode {ino} at {position} are missing from the object store"
                    raise OSError(errno.EIO, text) from error
                self._extents.invalidate(ino)
                continue
            position, missing = end, 0

    # Flights

    def _board(
        self, file: CachedFile[Reading], segments: SegmentReader, extents: Sequence[Extent], start: int, end: int
    ) -> None:
        """See that all of a missing range is in flight."""
        for low, high in _not_in_flight(file, start, end):
            for first in range(low, high, FLIGHT_MAX):
                self._launch(file, segments, extents, first, min(first + FLIGHT_MAX, high), paid=False)

    async def _fetch_ahead(self, ino: int, start: int, end: int) -> None:
        """Fetch what is missing of the range as far as there is memory for it."""
        try:
            inode = await self._meta.get_inode(ino)
            end = min(end, _up(inode.size))
            file = await self.cache.open(ino, inode.size)
            if file is None or start >= end:
                return
            extents = await self._look_up(inode, start, end)
        except (OSError, ContentsChanged):
            return
        if file.changing or file.gone:
            return
        for gap in _missing(file, extents, start, end):
            for low, high in _not_in_flight(file, *gap):
                while low < high:
                    stop = min(_up(low + 1, FLIGHT_MAX), high)
                    if not self._budget.take_now(stop - low):
                        file.reading.streams.stopped(low)
                        return
                    self._launch(file, self._segments, extents, low, stop, paid=True)
                    low = stop

    async def _fetch_region(self, file: CachedFile[Reading], start: int, end: int) -> None:
        """Fetch what scattered reads will want. A few at a time, so that the reads themselves come first."""
        async with self._regions:
            await self._fetch_ahead(file.ino, start, end)
            flights = [flight for flight in file.reading.flights if flight.start < end and flight.end > start]
            if flights:
                await asyncio.wait([flight.done for flight in flights])

    def _launch(
        self,
        file: CachedFile[Reading],
        segments: SegmentReader,
        extents: Sequence[Extent],
        start: int,
        end: int,
        *,
        paid: bool,
    ) -> None:
        flight = _Flight(start, end, file.generation)
        file.reading.flights.append(flight)
        file.readers += 1
        flight.task = self._start(self._fly(file, flight, segments, extents, paid))

    async def _fly(
        self,
        file: CachedFile[Reading],
        flight: _Flight,
        segments: SegmentReader,
        extents: Sequence[Extent],
        paid: bool,
    ) -> None:
        """``paid``: its memory has been taken already."""
        size = flight.end - flight.start
        try:
            if not paid:
                await self._take(size)
            try:
                parts = await gather(segments, extents, flight.start, flight.end)
                flight.done.set_result(parts)
                await self.cache.fill(file, flight.generation, flight.start, parts)
            except BaseException:
                self._budget.give(size)
                raise
            if size >= DIRECT_MIN and flight.unread > 0:
                landed = LandedRange(flight.start, flight.end, flight.generation, flight.unread, parts)
                self._landed.keep(file.reading.landed, landed)
            else:
                self._budget.give(size)
        except Exception as error:
            if not isinstance(error, OSError):
                log.exception("fetching %d to %d of inode %d", flight.start, flight.end, file.ino)
            if not flight.done.done():
                flight.done.set_exception(error)
                flight.done.exception()  # nobody may be waiting for it
        finally:
            file.reading.flights.remove(flight)
            file.readers -= 1

    async def _take(self, size: int) -> None:
        while not self._budget.take_now(size):
            if not self._landed.drop_oldest():
                await self._budget.take(size)
                return

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _up(offset: int, unit: int = BLOCK) -> int:
    return -(-offset // unit) * unit


def _missing(file: CachedFile[Reading], extents: Sequence[Extent], start: int, end: int) -> list[Range]:
    """The blocks of the range that hold data and are not valid."""
    blocks = RangeSet((extent.offset & -BLOCK, _up(extent.end)) for extent in extents)
    return [gap for low, high in blocks.within(start, end) for gap in file.valid.gaps(low, high)]


def _not_in_flight(file: CachedFile[Reading], start: int, end: int) -> list[Range]:
    flying = RangeSet(
        (flight.start, flight.end) for flight in file.reading.flights if flight.generation == file.generation
    )
    return flying.gaps(start, end)


def _itinerary(
    flights: Sequence[_Flight], missing: Sequence[Range], start: int, end: int
) -> list[tuple[int, int, _Flight | None]]:
    """The range in order, each part with the flight that brings it; None: it is valid, or a hole."""
    parts: list[tuple[int, int, _Flight | None]] = []
    position = start
    flights = sorted(flights, key=lambda flight: flight.start)
    for low, high in missing:
        low, high = max(low, start), min(high, end)
        if low > position:
            parts.append((position, low, None))
        for flight in flights:
            first, last = max(flight.start, low), min(flight.end, high)
            if first < last:
                parts.append((first, last, flight))
        position = high
    if position < end:
        parts.append((position, end, None))
    return parts
