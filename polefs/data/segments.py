"""Packing dirty contents into segments, the immutable objects of the store."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import google_crc32c
import msgspec

from polefs.data.frames import Codec, encode_frames
from polefs.data.ranges import DataSource
from polefs.data.replica import Replica
from polefs.meta.api import MetaAPI
from polefs.meta.model import Segment

SEGMENT_MAX: Final = 16 << 20
"""Largest segment that is packed, bytes; an adopted replica may be larger."""

RUN_MAX: Final = 4 << 20
"""Largest run, bytes: the most of one file that stands together in a segment."""

_READ: Final = 1 << 20
_IDS: Final = 256

DataPiece = tuple[int, int, DataSource]


class Run(msgspec.Struct):
    """Contiguous dirty bytes of one file, which stand together in a segment."""

    start: int
    end: int
    pieces: list[DataPiece]


def cut_runs(pieces: Iterable[DataPiece]) -> Iterator[Run]:
    """The runs of one file: joined where pieces touch, cut at the multiples of RUN_MAX."""
    run: Run | None = None
    for start, end, source in pieces:
        while start < end:
            if run is not None and (run.end != start or start % RUN_MAX == 0):
                yield run
                run = None
            if run is None:
                run = Run(start, start, [])
            stop = min(end, (start // RUN_MAX + 1) * RUN_MAX)
            run.pieces.append((start, stop, source))
            run.end = start = stop
    if run is not None:
        yield run


def load(runs: Sequence[Run], number: int, codec: Codec | None) -> tuple[list[bytes], Segment]:
    """Segment ``number``, made of these runs: the parts of its object, and its row. Each run becomes frames of the
    codec; without one it is one frame, as it is. Blocks."""
    parts: list[bytes] = []
    frames: list[tuple[int, int, int]] = []
    size = 0
    for run in runs:
        contents = [source.read(start, end - start) for start, end, source in run.pieces]
        length = run.end - run.start
        size += length
        if codec is None:
            parts += contents
            check = 0
            for part in contents:
                check = google_crc32c.extend(check, part)
            frames.append((length, length, check))
        else:
            stored, rows = encode_frames(codec, number, len(frames), contents)
            parts += stored
            frames += rows
    return parts, Segment(number, size, tuple(frames), codec.coding if codec is not None else 0)


def whole_replica(pieces: Sequence[DataPiece], size: int) -> Replica | None:
    """The replica that holds the file from 0 to ``size`` but for what the journal holds, when there is one, most of the
    file is in it and nothing else is: after a loss of power a journal may still tell of bytes past ``size``."""
    replica: Replica | None = None
    position = 0
    others = 0
    for start, end, source in pieces:
        if start != position:
            return None
        if not isinstance(source, Replica):
            others += end - start
        elif replica is None or replica is source:
            replica = source
        else:
            return None
        position = end
    if replica is None or position != size or others > size // 2 or os.fstat(replica.fd).st_size > size:
        return None
    return replica


def prepare_adoption(
    replica: Replica, pieces: Sequence[DataPiece], size: int
) -> tuple[tuple[int, int, int], ...] | None:
    """Make the replica the whole file of ``size`` bytes, adding what is elsewhere, and return its frames.
    Nothing else may write to it. Blocks. None when it is an object already: a replay comes to it again after the death
    of the process, and other files may share that object by then."""
    if os.fstat(replica.fd).st_nlink > 1:
        return None
    for start, end, source in pieces:
        if source is not replica:
            replica.write(source.read(start, end - start), start)

    os.ftruncate(replica.fd, size)
    frames = []
    for start in range(0, size, RUN_MAX):
        end = min(start + RUN_MAX, size)
        crc = 0
        for position in range(start, end, _READ):
            crc = google_crc32c.extend(crc, replica.read(position, min(_READ, end - position)))
        frames.append((end - start, end - start, crc))
    return tuple(frames)


class SegmentIds:
    """Segment numbers whose reservation is durable: after a loss of power none of them is handed out a second time,
    so that an object that was written but not committed is never taken for another. A number is *under way* until it
    is settled: committed, or given up for good."""

    def __init__(self, meta: MetaAPI, taken: Callable[[int], None]) -> None:
        """``taken`` is called with each number that is handed out."""
        self._meta = meta
        self._taken = taken
        self._free: deque[int] = deque()
        self._reserving = asyncio.Lock()
        self._under_way: set[int] = set()
        self._doubtful: list[int] = []

    async def take(self) -> int:
        await self._reserve()
        number = self._free.popleft()
        self._under_way.add(number)
        self._taken(number)
        return number

    def settle(self, numbers: Iterable[int]) -> None:
        """These are committed, or were never used."""
        self._under_way.difference_update(numbers)

    def doubt(self, numbers: Iterable[int]) -> None:
        """Objects of these may have been written, while it is not known whether they were committed."""
        self._under_way.update(numbers)
        self._doubtful += numbers

    async def discard_doubtful(self) -> None:
        """Let the objects of those that have not been committed be deleted as any dead segment's."""
        while self._doubtful:
            number = self._doubtful[-1]
            try:
                await self._meta.commit_data([Segment(number, 0, ())], [])
            except FileExistsError:
                pass  # committed
            if number in self._doubtful:
                self._doubtful.remove(number)
            self.settle([number])

    async def floor(self) -> int:
        """No smaller number is under way, nor will be."""
        await self._reserve()
        return min(self._under_way, default=self._free[0])

    async def _reserve(self) -> None:
        """Let there be numbers, in ascending order."""
        while not self._free:
            async with self._reserving:
                if not self._free:
                    first = await self._meta.allocate_segments(_IDS)
                    await self._meta.sync()
                    self._free.extend(range(first, first + _IDS))
