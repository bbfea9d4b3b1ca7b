"""Which bytes of which files are cached: the cache directory as the event loop sees it.

``CachedFile.valid`` tells what may be read from a cache file. It never has more than the cache file itself, so each
step keeps an order: to make bytes invalid they leave ``valid`` first, then the fills that are under way end, then the
holes are punched, and only then may the metadata change; to make bytes valid they are written first. A fill brings
bytes that were looked up earlier, so it counts only when the file's ``generation`` is still the one of that time.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Final, Generic, TypeVar

import msgspec

from polefs.data.cache.directory import BLOCK, CacheDirectory, Usage, block_runs
from polefs.data.cache.rangeset import Range, RangeSet
from polefs.data.segments import DataPiece
from polefs.objects.localio import OpenFile, read_available, read_cached

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

_LOADED: Final = 1024
"""Cache files open at a time: each is a descriptor."""

_PIECES: Final = 200_000
"""Ranges of one file that are told apart, about 16 MB of memory. Fills that would make more are left out."""

_SCANNED: Final = 10_000
"""Files of a scan that are remembered as the oldest, and removed before the next scan."""

_BATCH: Final = 256
"""Cache files removed in one call of a thread."""

_KEEP: Final = 0.95
"""What is left of the limit after eviction."""

_KEPT_SHARE: Final = 4
"""What has been written back is kept up to this part of the limit at a time: a bigger file would drive out all else."""

_PAUSE: Final = 10.0
"""Nothing is cached for this time after a failure to do so, seconds."""


class CacheLimits(msgspec.Struct, frozen=True):
    size: int
    """Bytes that the cache may take."""
    free: int
    """Bytes that it leaves free on its file system."""


class CachedFile(Generic[R]):
    """One inode. ``valid`` may be read; while ``changing`` is not 0 nothing is added to it. Whoever counts itself in
    ``users`` keeps it from being evicted; ``readers`` only let others go first."""

    __slots__ = (
        "_quiet",
        "changing",
        "filling",
        "generation",
        "gone",
        "handle",
        "ino",
        "loaded",
        "loading",
        "readers",
        "reading",
        "users",
        "valid",
    )

    def __init__(self, ino: int, reading: R) -> None:
        self.ino = ino
        self.handle: OpenFile | None = None
        self.loaded = False
        self.loading: asyncio.Task[None] | None = None
        self.valid = RangeSet()
        self.generation = 0
        self.changing = 0
        self.filling = 0
        self.users = 0
        self.readers = 0
        self.gone = False
        self.reading = reading
        """What the reader keeps with it."""
        self._quiet: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        return bool(self.users or self.readers or self.filling or self.changing)

    def fillable(self, generation: int) -> bool:
        """Whether bytes that were looked up at ``generation`` are still those of the file."""
        return self.generation == generation and not self.changing and not self.gone

    def read_now(self, start: int, end: int) -> memoryview | None:
        """Bytes of a valid range where the page cache has them. Never blocks."""
        return None if self.handle is None else read_cached(self.handle.fd, start, end - start)

    def unload(self) -> None:
        """It is to be opened anew: there is, or may be, another cache file."""
        self.loaded = False
        self.handle = None
        self.valid.clear()

    async def quiet(self) -> None:
        """Returns when no fill and no load is under way. None begins while ``changing``."""
        while self.filling:
            if self._quiet is None:
                self._quiet = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._quiet)

    def end_filling(self) -> None:
        self.filling -= 1
        if not self.filling and self._quiet is not None:
            self._quiet.set_result(None)
            self._quiet = None


class ContentCache(Generic[R]):
    """Call ``start`` before anything else, and ``close`` at the end, when nobody reads or changes any more."""

    def __init__(
        self,
        directory: CacheDirectory,
        threads: Executor,
        limits: CacheLimits,
        make_reading: Callable[[], R],
    ) -> None:
        """``make_reading`` makes ``CachedFile.reading``."""
        self._directory = directory
        self._threads = threads
        self._make_reading = make_reading
        self.limits = limits
        self.bytes = 0
        """What the cache takes, about, bytes: others may have changed it."""
        self._files: OrderedDict[int, CachedFile[R]] = OrderedDict()
        self._removing: set[int] = set()
        """Their cache files are on their way out: nobody opens them."""
        self._forgotten: list[CachedFile[R]] = []
        self._forgetting: asyncio.Task[None] | None = None
        self._evicting: asyncio.Task[None] | None = None
        self._target = 0
        self._paused_until = 0.0
        self._tidying: asyncio.Task[None] | None = None

    async def start(self, previous: int, writer: int) -> None:
        """Take the directory into use, with what is in it where that can be trusted: see ``CacheDirectory.begin``."""
        await self._run(self._directory.begin, previous, writer)
        self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def _tidy(self) -> None:
        """See how much there is, and bring it under the limits, which may be new ones."""
        try:
            await asyncio.to_thread(self._directory.remove_discarded)
            self.bytes += (await asyncio.to_thread(self._directory.scan, 0)).bytes
        except OSError as error:
            log.warning("cannot read the cache in %s: %s", self._directory.path, error.strerror)
        self._grow(0, self.limits.free)

    async def close(self, *, clean: bool = True) -> None:
        """``clean``: everything that has changed the volume is committed, durably."""
        for task in (self._tidying, self._evicting):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        while self._forgetting is not None:
            await asyncio.wait([self._forgetting])
        files = list(self._files.values())
        self._files.clear()
        await self._run(_mark_used, [file.handle for file in files if file.handle is not None])
        await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._directory.close(clean=clean))

    @property
    def path(self) -> str:
        return self._directory.path

    async def measure(self) -> Usage:
        """What there is now: looks at all cache files."""
        usage = await asyncio.to_thread(self._directory.scan, 0)
        self.bytes = usage.bytes
        return usage

    def _run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    # Finding

    def find(self, ino: int) -> CachedFile[R] | None:
        """The file, when it is open: then it is used."""
        file = self._files.get(ino)
        if file is None or not file.loaded:
            return None
        self._files.move_to_end(ino)
        return file

    async def open(self, ino: int, size: int) -> CachedFile[R] | None:
        """The file of an inode of this size; None while nothing of it can be cached: it is being changed or removed, or
        that fails."""
        if ino in self._removing:
            return None
        file = self._files.get(ino) or self._enter(ino)
        if not file.loaded:
            if file.changing:
                return None
            if file.loading is None:
                file.filling += 1  # from now on: whoever calls ``_leave`` before the task begins must not drop the file
                file.loading = asyncio.get_running_loop().create_task(self._load(file, size, file.generation))
            await asyncio.wait([file.loading])
            if not file.loaded:
                return None
        if file.gone:
            return None
        self._files.move_to_end(ino)
        return file

    def _enter(self, ino: int) -> CachedFile[R]:
        file = self._files[ino] = CachedFile(ino, self._make_reading())
        if len(self._files) > _LOADED:
            self._let_go()
        return file

    def _leave(self, file: CachedFile[R]) -> None:
        """It is not kept just for having been entered."""
        if not file.loaded and not file.busy and self._files.get(file.ino) is file:
            del self._files[file.ino]

    def _let_go(self) -> None:
        """Close what has not been used for the longest time."""
        idle = next((file for file in itertools.islice(self._files.values(), _LOADED // 2) if not file.busy), None)
        if idle is not None:
            del self._files[idle.ino]
            idle.gone = True
            if idle.handle is not None:
                self._run(_mark_used, [idle.handle])

    async def _load(self, file: CachedFile[R], size: int, generation: int) -> None:
        """Open a file that counts as being filled since ``generation``."""
        try:
            handle, valid = await self._run(self._directory.load, file.ino, size)
        except OSError as error:
            log.warning("cannot use the cache file of inode %d: %s", file.ino, error.strerror)
            return
        finally:
            file.loading = None
            file.end_filling()
        if file.fillable(generation):
            file.handle, file.valid, file.loaded = handle, valid, True

    # Reading and filling

    async def read(self, file: CachedFile[R], start: int, end: int) -> bytes | None:
        """Bytes of a range that is valid or a hole, from the disk if need be; None when they have become invalid
        meanwhile."""
        generation = file.generation
        data = await self._run(_read, file.handle, start, end - start)
        if file.generation != generation:
            return None
        if len(data) < end - start:
            if file.valid.within(start + len(data), end):
                # It ends before what it is to hold: somebody else has cut it.
                self.forget(file.ino)
                return None
            data += bytes(end - start - len(data))
        return data

    async def fill(self, file: CachedFile[R], generation: int, start: int, parts: Sequence[bytes | memoryview]) -> None:
        """Let these bytes be valid from ``start``, the beginning of a block, on; the last block is theirs whole. They
        are those that the metadata told of at ``generation``; when it is over nothing happens. What fails costs the
        cache these bytes and is no error."""
        if not file.fillable(generation) or self._paused or len(file.valid) >= _PIECES:
            return
        file.filling += 1
        try:
            if file.handle is None:
                created = await _to_its_end(self._run(self._directory.create, file.ino))
                file.handle = file.handle or created  # another fill may have been faster
            handle = file.handle
            grown, free = await _to_its_end(self._run(self._directory.fill, handle, start, parts))
        except OSError as error:
            self._pause(error)
            return
        finally:
            file.end_filling()
        if file.fillable(generation) and file.handle is handle:
            length = sum(map(len, parts))
            file.valid.add(start, start + length + -length % BLOCK)
        self._grow(grown, free)

    @property
    def _paused(self) -> bool:
        return asyncio.get_running_loop().time() < self._paused_until

    def _pause(self, error: OSError) -> None:
        if not self._paused:
            log.warning("cannot write to the cache in %s: %s; going on without", self._directory.path, error.strerror)
        self._paused_until = asyncio.get_running_loop().time() + _PAUSE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.shrink(int(self.bytes * _KEEP))

    async def keep(self, contents: Sequence[tuple[int, Sequence[DataPiece], int]]) -> None:
        """``(ino, pieces, size)`` of files: these pieces are their committed contents now. What fails costs the cache
        these bytes and is no error, and so does what is more than it can hold."""
        if self.bytes > self.limits.size:
            return  # what is there cannot be removed yet
        room = self.limits.size // _KEPT_SHARE
        fitting = []
        for each in contents:
            length = sum(end - start for start, end, _ in each[1])
            if length <= room:
                room -= length
                fitting.append(each)
        contents = fitting
        if not contents or self._paused:
            return
        files = [(self._files.get(ino) or self._enter(ino), pieces, size) for ino, pieces, size in contents]
        work: list[tuple[CachedFile[R], int, Sequence[DataPiece], int]] = []
        for file, pieces, size in files:
            if not file.changing and not file.gone:
                file.filling += 1
                work.append((file, file.generation, pieces, size))
        wanted = [(file.ino, file.handle, pieces, size) for file, _, pieces, size in work]
        try:
            grown, free = await _to_its_end(self._run(self._directory.keep, wanted))
        except OSError as error:
            self._pause(error)
            return
        finally:
            for (file, *_), (_, handle, _, _) in zip(work, wanted, strict=True):
                if handle is None:
                    # There is another cache file now than whoever has opened it meanwhile has found, if any.
                    file.generation += 1
                    file.unload()
                file.end_filling()
                self._leave(file)
        for file, generation, pieces, size in work:
            if file.loaded and file.fillable(generation):
                for start, end, _ in block_runs(pieces, size):
                    file.valid.add(*_whole_blocks(start, end))
        self._grow(grown, free)

    def _grow(self, grown: int, free: int) -> None:
        """The cache has become larger, and so much is left free."""
        self.bytes += grown
        if self.bytes > self.limits.size:
            self.shrink(int(self.limits.size * _KEEP))
        elif free < self.limits.free:
            self.shrink(self.bytes - (self.limits.free - free) - int(self.bytes * (1 - _KEEP)))

    async def cut(self, file: CachedFile[R], size: int) -> bool:
        """Let the cache file of a file with a valid last block end where the file does. False when the file is being
        changed, or was meanwhile."""
        generation = file.generation
        if not file.fillable(generation) or file.handle is None:
            return False
        file.filling += 1  # changes wait for it
        try:
            await _to_its_end(self._run(self._directory.cut, file.handle, size))
        finally:
            file.end_filling()
        return file.fillable(generation)

    # Changes

    @asynccontextmanager
    async def changing(self, changes: Mapping[int, Sequence[Range]]) -> AsyncIterator[None]:
        """The contents of these ranges (by inode) change in the metadata within the block. OSError, before it begins,
        when what is cached of them cannot be made invalid."""
        files = []
        for ino in changes:
            file = self._files.get(ino) or self._enter(ino)
            file.generation += 1
            file.changing += 1
            files.append(file)
        try:
            blocks = {ino: [_whole_blocks(*each) for each in ranges] for ino, ranges in changes.items()}
            for file in files:
                for start, end in blocks[file.ino]:
                    file.valid.remove(start, end)
            for file in files:
                await file.quiet()
            freed, removed = await _to_its_end(self._run(self._directory.invalidate, list(blocks.items())))
            self.bytes -= freed
            for file in files:
                if file.ino in removed and file.handle is not None:
                    file.unload()
            yield
        finally:
            for file in files:
                file.generation += 1
                file.changing -= 1
                self._leave(file)

    def forget(self, ino: int) -> None:
        """Nothing of this inode is cached any more."""
        file = self._files.get(ino) or CachedFile(ino, self._make_reading())
        self._take_out(file)
        self._forgotten.append(file)
        if self._forgetting is None:
            self._forgetting = asyncio.get_running_loop().create_task(self._forget_all())

    async def give_away(self, file: CachedFile[R], path: str) -> None:
        """Let the cache file be the file ``path`` from now on, and no cache file. OSError when it is not there (any
        more), or ``path`` is on another file system."""
        assert file.handle is not None
        self._take_out(file)
        try:
            await file.quiet()
            self.bytes -= await _to_its_end(self._run(self._directory.give_away, file.ino, file.handle, path))
        finally:
            self._removing.discard(file.ino)

    def _take_out(self, file: CachedFile[R]) -> None:
        """Nobody finds this file any more; its cache file is to be removed."""
        self._files.pop(file.ino, None)
        file.generation += 1
        file.gone = True
        file.valid.clear()
        self._removing.add(file.ino)

    async def _forget_all(self) -> None:
        while self._forgotten:
            batch = self._forgotten[:_BATCH]
            del self._forgotten[:_BATCH]
            await self._remove(batch)
        self._forgetting = None

    async def _remove(self, files: Sequence[CachedFile[R]]) -> None:
        """Remove the cache files of these, which are gone already."""
        try:
            for file in files:
                await file.quiet()
            self.bytes -= await self._run(self._directory.remove, [file.ino for file in files])
        except OSError as error:
            log.warning("cannot remove cache files in %s: %s", self._directory.path, error.strerror)
        finally:
            self._removing.difference_update(file.ino for file in files)

    # Eviction

    def shrink(self, size: int) -> asyncio.Task[None]:
        """Remove what has not been used for the longest time until ``size`` bytes are left, as far as nobody uses it;
        the task ends when that is done."""
        if self._evicting is None or self._evicting.done():
            self._target = size
            self._evicting = asyncio.get_running_loop().create_task(self._evict())
        else:
            self._target = min(self._target, size)
        return self._evicting

    async def _evict(self) -> None:
        try:
            while self.bytes > self._target:
                usage = await asyncio.to_thread(self._directory.scan, _SCANNED)
                before = self.bytes = usage.bytes
                await self._evict_some([(ino, size) for ino, size in usage.oldest if ino not in self._files])
                if len(usage.oldest) < _SCANNED:
                    # Open files have been used last: only now, the least recently used ones first.
                    sizes = dict(usage.oldest)
                    opened = [(ino, sizes[ino]) for ino in [*self._files] if ino in sizes]
                    await self._evict_some(opened)
                    # A file that is larger than the cache is read and written all the time.
                    await self._evict_some(opened, hard=True)
                if self.bytes >= before:
                    break
            if self.bytes > self.limits.size or await asyncio.to_thread(self._directory.free) < self.limits.free:
                # All that is left is in use, or others fill the disk.
                self._paused_until = asyncio.get_running_loop().time() + _PAUSE
        except OSError as error:
            log.warning("cannot remove cache files in %s: %s", self._directory.path, error.strerror)

    async def _evict_some(self, candidates: Sequence[tuple[int, int]], *, hard: bool = False) -> None:
        """Evict these in their order, down to the target; ``hard``: also while they are being read and filled."""
        for first in range(0, len(candidates), _BATCH):
            chosen: list[CachedFile[R]] = []
            left = self.bytes
            for ino, size in candidates[first : first + _BATCH]:
                if left <= self._target:
                    break
                file = self._files.get(ino) or CachedFile(ino, self._make_reading())
                if (file.users or file.changing if hard else file.busy) or ino in self._removing:
                    continue
                self._take_out(file)
                chosen.append(file)
                left -= size
            if chosen:
                await self._remove(chosen)
            if self.bytes <= self._target:
                break


async def _to_its_end(work: asyncio.Future[T]) -> T:
    """What a thread does, waited for even by who is cancelled: nobody may rely on anything before."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _whole_blocks(start: int, end: int) -> Range:
    return start & -BLOCK, -(-end // BLOCK) * BLOCK


def _read(handle: OpenFile | None, start: int, length: int) -> bytes:
    return b"" if handle is None else read_available(handle.fd, start, length)


def _mark_used(handles: Sequence[OpenFile]) -> None:
    """They have been used until now, and nobody has them open any longer. Blocks."""
    for handle in handles:
        try:
            os.utime(handle.fd)
        except OSError:
            pass
