"""Rewriting half-dead segments: what is still referred to in them is packed into new ones, and they die.

A segment is immutable, so what is read of it is right whatever happens meanwhile; the metadata then move what is still
as it was. The object is there before anything refers to it, and after a crash at any point it belongs to a segment, or
to nobody like that of an interrupted write-back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from itertools import groupby
from typing import Final

import msgspec

from polefs.data.budget import MemoryBudget
from polefs.data.fetch import FramedSegments
from polefs.data.frames import Buffer, Codec
from polefs.data.ranges import Chunk
from polefs.data.segments import RUN_MAX, SEGMENT_MAX, Run, SegmentIds, load
from polefs.meta.api import MetaAPI
from polefs.meta.model import Extent, Move
from polefs.objects.base import ObjectStore, StoreError, segment_key

log = logging.getLogger(__name__)

_PAGE: Final = 1000
"""Segments asked for at a time: 1 ms of the event loop where the metadata are embedded."""

_EXTENTS: Final = 2048
"""Extents of one segment that are moved in one pass, and pieces of a new segment, at most."""

_MOVES: Final = 128
"""Extents a metadata transaction: one takes about 15 us of the event loop."""

_GAP: Final = 256 << 10
"""Dead bytes between live ones that are read along rather than making another request."""


class Piece(msgspec.Struct, frozen=True):
    """Bytes ``[start, end)`` of a segment that ``users``, extents of files, refer to, all or a part of them."""

    segment: int
    start: int
    end: int
    users: tuple[tuple[int, Extent], ...]

    def moves(self, segment: int, offset: int) -> list[Move]:
        """To another segment, in which the piece begins at ``offset``."""
        found = []
        for ino, extent in self.users:
            start = max(self.start, extent.segment_offset)
            end = min(self.end, extent.segment_offset + extent.length)
            part = Extent(extent.offset + start - extent.segment_offset, end - start, self.segment, start)
            found.append(Move(ino, part, segment, offset + start - self.start))
        return found


class Tally(msgspec.Struct):
    """``segments`` to rewrite, or rewritten: so many bytes of them live, out of ``size``."""

    segments: int = 0
    live: int = 0
    size: int = 0


async def sparse_segments(meta: MetaAPI) -> AsyncIterator[tuple[int, int, int]]:
    """``(id, size, live)`` of segments of which less than half is live, and something is."""
    after = 0
    while page := await meta.segment_usage(after, _PAGE):
        after = page[-1][0]
        for id_, size, live in page:
            if 0 < live * 2 < size:
                yield id_, size, live
        await asyncio.sleep(0)


class Compactor:
    def __init__(
        self,
        meta: MetaAPI,
        objects: ObjectStore,
        codec: Codec | None,
        segments: FramedSegments,
        threads: Executor,
        memory: MemoryBudget,
        ids: SegmentIds,
        moved: Callable[[Iterable[int]], None],
    ) -> None:
        """``memory`` is for a new segment, no part of that of ``segments``; ``moved`` is called with the inodes whose
        extents may be others now."""
        self._meta = meta
        self._objects = objects
        self._codec = codec
        self._segments = segments
        self._threads = threads
        self._memory = memory.share(SEGMENT_MAX)
        self._size = max(self._memory.limit, RUN_MAX)
        """Of new segments, at most."""
        self._ids = ids
        self._moved = moved
        self._damaged: set[int] = set()
        """Segments that could not be read in this pass; each is told in the log."""

    async def plan(self) -> Tally:
        """What ``run`` would find to do."""
        tally = Tally()
        async for _, size, live in sparse_segments(self._meta):
            tally.segments += 1
            tally.live += live
            tally.size += size
        return tally

    async def run(self, done: Callable[[int], Awaitable[None]]) -> Tally:
        """Rewrite all half-dead segments. ``done`` is called with the bytes that have been moved, or were to be and
        have changed meanwhile. What cannot be read stays as it is. OSError when the store or the local disk fails; what
        has been moved by then stays moved."""
        tally = Tally()
        self._damaged.clear()
        pieces: list[Piece] = []
        size = 0
        async for id_, whole, live in sparse_segments(self._meta):
            for piece in make_pieces(id_, await self._meta.segment_extents(id_, _EXTENTS)):
                length = piece.end - piece.start
                if size + length > self._size or len(pieces) == _EXTENTS:
                    await self._rewrite(pieces, size)
                    await done(size)
                    pieces, size = [], 0
                pieces.append(piece)
                size += length
            tally.segments += 1
            tally.live += live
            tally.size += whole
        if pieces:
            await self._rewrite(pieces, size)
            await done(size)
        tally.segments -= len(self._damaged)
        return tally

    @property
    def damaged(self) -> int:
        """Segments that the last ``run`` could not read."""
        return len(self._damaged)

    async def _rewrite(self, pieces: Sequence[Piece], size: int) -> None:
        """Put these pieces, of so many bytes, into one new segment."""
        async with self._memory.hold(size):
            kept, runs = await self._read(pieces)
            if not kept:
                return
            number = await self._ids.take()
            try:
                loop = asyncio.get_running_loop()
                parts, segment = await loop.run_in_executor(self._threads, load, runs, number, self._codec)
                del runs
                await self._objects.put(segment_key(number), parts)
                new = [segment]
                moves = _moves(kept, number)
                for first in range(0, len(moves), _MOVES):
                    some = moves[first : first + _MOVES]
                    try:
                        await self._meta.move_extents(new, some)
                    finally:
                        self._moved({move.ino for move in some})
                    new = []
            except BaseException:
                self._ids.doubt([number])
                raise
            self._ids.settle([number])

    async def _read(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[Run]]:
        """The pieces that can be read, with their contents."""
        kept: list[Piece] = []
        runs: list[Run] = []
        for id_, group in groupby(pieces, lambda piece: piece.segment):
            if id_ in self._damaged:
                continue
            found: list[tuple[Piece, Run]] = []
            try:
                for span in _spans(group):
                    found += await self._read_span(span)
            except OSError as error:
                if isinstance(error.__cause__, StoreError):
                    raise error.__cause__ from None
                if error.errno not in (errno.EIO, errno.ENOENT):
                    raise
                if not await self._meta.segment_extents(id_, 1):
                    continue  # it has died meanwhile
                self._damaged.add(id_)
                log.error("segment %d cannot be rewritten: %s", id_, error.strerror)
                continue
            for piece, run in found:
                kept.append(piece)
                runs.append(run)
        return kept, runs

    async def _read_span(self, span: Sequence[Piece]) -> list[tuple[Piece, Run]]:
        parts = await self._segments.read(span[0].segment, span[0].start, span[-1].end)
        return await asyncio.get_running_loop().run_in_executor(self._threads, _cut_out, span, parts)


def make_pieces(segment: int, extents: Iterable[tuple[int, Extent]]) -> list[Piece]:
    """What extents refer to in a segment, each byte once, in its order; none longer than RUN_MAX."""
    pieces: list[Piece] = []
    users: list[tuple[int, Extent]] = []
    start = end = 0

    def cut() -> None:
        for first in range(start, end, RUN_MAX):
            last = min(first + RUN_MAX, end)
            here = tuple(
                (ino, extent)
                for ino, extent in users
                if extent.segment_offset < last and extent.segment_offset + extent.length > first
            )
            pieces.append(Piece(segment, first, last, here))

    for ino, extent in sorted(extents, key=lambda each: each[1].segment_offset):
        if extent.segment_offset >= end:
            cut()
            users = []
            start = end = extent.segment_offset
        users.append((ino, extent))
        end = max(end, extent.segment_offset + extent.length)
    cut()
    return pieces


def _moves(pieces: Iterable[Piece], segment: int) -> list[Move]:
    found: list[Move] = []
    offset = 0
    for piece in pieces:
        found += piece.moves(segment, offset)
        offset += piece.end - piece.start
    return found


def _cut_out(span: Sequence[Piece], parts: Sequence[Buffer]) -> list[tuple[Piece, Run]]:
    first = span[0].start
    contents = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
    found = []
    for piece in span:
        data = bytes(contents[piece.start - first : piece.end - first])
        found.append((piece, Run(piece.start, piece.end, [(piece.start, piece.end, Chunk(piece.start, data))])))
    return found


def _spans(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces of one segment in groups that are read in one request each."""
    spans: list[list[Piece]] = []
    for piece in pieces:
        if spans and piece.start - spans[-1][-1].end <= _GAP and piece.end - spans[-1][0].start <= RUN_MAX:
            spans[-1].append(piece)
        else:
            spans.append([piece])
    return spans
