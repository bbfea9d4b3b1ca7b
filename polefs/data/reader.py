"""Reading file contents: uncommitted layers over committed extents."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import Executor
from typing import Final, Protocol

from polefs.data.extentcache import WINDOW, ExtentCache
from polefs.data.fetch import Segments
from polefs.data.frames import Buffer
from polefs.data.ranges import BASE, HOLE, Chunk, Piece
from polefs.data.state import FileState
from polefs.meta.api import MetaAPI
from polefs.meta.model import Extent, Inode

_ZEROS: Final = memoryview(bytes(1 << 20))
_ATTEMPTS: Final = 8


def zeros(length: int) -> list[Buffer]:
    """``length`` zero bytes that share one constant buffer."""
    if length <= len(_ZEROS):
        return [_ZEROS[:length]] if length else []
    found: list[Buffer] = [_ZEROS] * (length // len(_ZEROS))
    return found + zeros(length % len(_ZEROS))


class ContentsChanged(Exception):
    """A file is not any more what the inode tells that it was to be read by."""


class Contents(Protocol):
    """Another way to the contents of files with extents than straight from their segments."""

    async def read(self, inode: Inode, start: int, end: int) -> list[Buffer]:
        """The committed bytes of the range, in parts; beyond the size they are zero. FileNotFoundError for a segment
        that is gone, ContentsChanged."""
        ...


class Reader:
    """Reads through the layers of a file into its committed contents. Failures are OSError: EIO for contents that the
    meta service tells of and the object store has not, and whatever the local file system reports."""

    def __init__(
        self,
        meta: MetaAPI,
        segments: Segments,
        extents: ExtentCache,
        threads: Executor,
        contents: Contents | None = None,
    ) -> None:
        """``contents``: how the contents of files with extents are read, where not straight from ``segments``."""
        self._meta = meta
        self._segments = segments
        self._extents = extents
        self._contents = contents
        self._threads = threads

    async def pieces(self, inode: Inode, pieces: Sequence[Piece]) -> list[Buffer]:
        """The bytes of resolved pieces, in order; BASE pieces are read from ``inode``'s committed contents."""
        found: list[Buffer | None] = []
        waiting: list[tuple[int, int, Awaitable[Buffer | list[Buffer]]]] = []
        for start, end, source in pieces:
            if isinstance(source, Chunk):
                found.append(source.cut(start, end))
            elif source is HOLE:
                found.extend(zeros(end - start))
            elif source is BASE:
                if len(pieces) == 1:
                    return await self.committed(inode, start, end)
                waiting.append((len(found), end - start, self.committed(inode, start, end)))
                found.append(None)
            else:
                assert not isinstance(source, type(BASE))
                data = source.read_now(start, end - start)
                if data is None:
                    loop = asyncio.get_running_loop()
                    reading = loop.run_in_executor(self._threads, source.read, start, end - start)
                    waiting.append((len(found), end - start, reading))
                found.append(data)
        if not waiting:
            return [data for data in found if data is not None]
        results = await _all([work for _, _, work in waiting])
        return _fill(found, {place: data for (place, _, _), data in zip(waiting, results, strict=True)})

    async def committed(self, inode: Inode, start: int, end: int) -> list[Buffer]:
        """The committed bytes of the range; beyond the committed size they are zero."""
        for _ in range(_ATTEMPTS):
            if inode.inline is not None:
                data = inode.inline[start:end]
                return [data, *zeros(end - start - len(data))] if data else zeros(end - start)
            if not inode.allocated:
                return zeros(end - start)
            try:
                if self._contents is not None:
                    return await self._contents.read(inode, start, end)
                extents = self._extents.get_now(inode.ino, start, end)
                if extents is None:
                    extents = await self._extents.get(inode.ino, start, end)
                return await self._read(extents, start, end)
            except (FileNotFoundError, ContentsChanged):
                # Written anew and committed while we were reading: those extents' objects are gone, and others have
                # come.
                self._extents.invalidate(inode.ino)
                inode = await self._meta.get_inode(inode.ino)
        raise OSError(errno.EIO, f"contents of inode {inode.ino} at {start} are missing from the object store")

    async def _read(self, extents: Sequence[Extent], start: int, end: int) -> list[Buffer]:
        found: list[Buffer | None] = []
        waiting: list[tuple[int, Awaitable[Buffer | list[Buffer]]]] = []
        position = start
        for extent in extents:
            if extent.offset > position:
                found.extend(zeros(extent.offset - position))
                position = extent.offset
            stop = min(extent.offset + extent.length, end)
            first = extent.segment_offset + position - extent.offset
            last = first + stop - position
            data = self._segments.read_now(extent.segment, first, last)
            if data is None:
                waiting.append((len(found), self._segments.read(extent.segment, first, last)))
            found.append(data)
            position = stop
        if position < end:
            found.extend(zeros(end - position))
        if not waiting:
            return [data for data in found if data is not None]
        results = await _all([work for _, work in waiting])
        return _fill(found, {place: data for (place, _), data in zip(waiting, results, strict=True)})

    async def layout(
        self, state: FileState | None, inode: Inode, start: int, end: int
    ) -> AsyncIterator[tuple[int, int, bool]]:
        """``(start, end, is_data)`` over the range, in order and without gaps; neighbours may be of one kind."""
        step = WINDOW
        while start < end:
            stop = min(start + step, end)
            pieces: list[Piece] = [(start, stop, BASE)] if state is None else state.resolve(start, stop)
            count = 0
            for piece_start, piece_end, source in pieces:
                if source is not BASE:
                    yield piece_start, piece_end, source is not HOLE
                    continue
                position = piece_start
                for data_start, data_end in await self._committed_data(inode, piece_start, piece_end):
                    count += 1
                    if data_start > position:
                        yield position, data_start, False
                    position = min(data_end, piece_end)
                    yield max(data_start, piece_start), position, True
                if position < piece_end:
                    yield position, piece_end, False
            start = stop
            if count < _FEW_EXTENTS:
                step *= 2

    async def _committed_data(self, inode: Inode, start: int, end: int) -> list[tuple[int, int]]:
        if inode.inline is not None:
            return [(0, len(inode.inline))] if start < len(inode.inline) else []
        if not inode.allocated:
            return []
        return [(extent.offset, extent.end) for extent in await self._meta.extents(inode.ino, start, end)]


_FEW_EXTENTS: Final = 1024
"""A window of the layout with fewer extents than this is followed by one twice as large."""


async def _all(work: Sequence[Awaitable[Buffer | list[Buffer]]]) -> list[Buffer | list[Buffer]]:
    if len(work) == 1:
        return [await work[0]]
    return list(await asyncio.gather(*work))


def _fill(found: list[Buffer | None], late: dict[int, Buffer | list[Buffer]]) -> list[Buffer]:
    filled: list[Buffer] = []
    for place, data in enumerate(found):
        came = late[place] if data is None else data
        if isinstance(came, list):
            filled.extend(came)
        else:
            filled.append(came)
    return filled


SEEK_BLOCK: Final = 4096
"""Holes are told in blocks of this size, bytes, as other file systems tell them: a block with any data is data."""


async def seek(reader: Reader, state: FileState | None, inode: Inode, offset: int, whence: int) -> int:
    """lseek(2) with SEEK_DATA or SEEK_HOLE. ENXIO at or past the end, and when no data follows; EINVAL for another
    ``whence``."""
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    size = inode.size if state is None else state.size
    if 0 <= offset < size:
        data_end = _block(offset)
        async for start, end, is_data in reader.layout(state, inode, data_end, size):
            if not is_data:
                continue
            first = _block(start)
            if whence == os.SEEK_DATA:
                return max(offset, first)
            if first > data_end:
                break
            data_end = _block(end + SEEK_BLOCK - 1)
        if whence == os.SEEK_HOLE:
            return min(max(offset, data_end), size)
    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))


def _block(offset: int) -> int:
    return offset & -SEEK_BLOCK
