"""The contents of the files of a volume, as one mount sees them.

A change of contents goes into a layer over the committed contents (in memory or in a local replica) and into the
journal, both in the page cache; then it is acknowledged. Write-back turns layers into objects and metadata a few
seconds later.

Methods that take an ``Inode`` take the one that ``MetaAPI.get_inode`` returned in the same turn of the event loop:
nothing may have been awaited in between, for a commit might have changed it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from copy import copy
from typing import Final

from polefs.data.budget import MemoryBudget
from polefs.data.cache.directory import CacheDirectory
from polefs.data.cache.rangeset import Range
from polefs.data.cache.reader import CachedContents
from polefs.data.cache.store import CacheLimits
from polefs.data.compact import Compactor
from polefs.data.direct import DirectFile, DirectFiles
from polefs.data.dirty import DirtyFiles, Limits
from polefs.data.durability import JournalLog
from polefs.data.extentcache import ExtentCache
from polefs.data.fetch import FramedSegments, PlainSegments, Segments
from polefs.data.flusher import Flusher
from polefs.data.frames import Buffer, Codec
from polefs.data.garbage import GarbageCollector
from polefs.data.journal import Journal, journal_name, journal_number
from polefs.data.lost import LostObjects
from polefs.data.patience import FOREVER, Patience
from polefs.data.reader import Reader, seek
from polefs.data.reclaim import Reclaimer
from polefs.data.recovery import recover
from polefs.data.writeback import WriteBack
from polefs.meta.api import MetaAPI
from polefs.meta.model import FILE_SIZE_MAX, DataCommit, Inode, SetAttr
from polefs.objects.base import ObjectStore
from polefs.objects.localio import sync_directory

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
"""Modes of fallocate(2), linux/falloc.h."""

SHARE_MIN: Final = 64 << 10
"""Copies from this length on share extents instead of copying bytes."""

_SHARE_MAX: Final = 1 << 30
"""The most that one call shares, so that one metadata transaction stays short."""

_COPY_MAX: Final = 8 << 20
_COPY_STEP: Final = 1 << 20
_SHARE_ATTEMPTS: Final = 4

_END_SECONDS: Final = 6.0
"""That a store which is out of reach is given at the end."""

_MEMORY: Final = 96 << 20
"""The budget of contents on their way, unless another is given, bytes; read-ahead has as much again."""


class FileStore:
    """Call ``recover``, then ``start``; at the end ``close``. ``directory`` is the volume's place for journals and
    replicas, on the file system of a directory object store where there is one; it is made when it does not exist.

    Writes, truncations and the like survive the death of the process from their return on, and the loss of power from
    the next ``sync`` on. Besides the errors that each method lists, all raise what the local file system, the object
    store and the meta service report: ENOSPC, EIO."""

    def __init__(
        self,
        meta: MetaAPI,
        objects: ObjectStore,
        directory: str,
        *,
        flush_after: float = 5.0,
        limits: Limits | None = None,
        threads: int = 4,
        codec: Codec | None = None,
        budget: MemoryBudget | None = None,
        cache: tuple[CacheDirectory, CacheLimits] | None = None,
        sync_to_store: bool = False,
        grace: float = 0.0,
        gc_interval: float = 0.0,
        store_timeout: float = FOREVER,
    ) -> None:
        """``flush_after``: seconds that a change may stay uncommitted. ``codec``: how contents are stored, in frames;
        None where objects are local files, whose bytes are the contents. ``budget``: the memory for contents on their
        way. ``cache``: where contents that come in frames are kept; it is closed with this. ``sync_to_store``: what
        is synced is in the object store and committed, not only on this machine's disk. ``grace``: seconds that dead
        objects are kept. ``gc_interval``: as of ``GarbageCollector``. ``store_timeout``: seconds that a store may be
        out of reach until who waits for write-back gets ETIMEDOUT, which does not end that."""
        self._meta = meta
        self._objects = objects
        self._patience = Patience(objects, store_timeout)
        self._directory = os.path.abspath(directory)
        self._flush_after = flush_after
        self._sync_to_store = sync_to_store
        self._threads = ThreadPoolExecutor(threads, "data")
        self._extents = ExtentCache(meta)
        self.budget = budget or MemoryBudget(_MEMORY)
        self.cached: CachedContents | None = None
        """Contents through the cache, where there is one."""
        framed = FramedSegments(meta, objects, codec or Codec(), self._threads, self.budget)
        segments: Segments = framed if codec is not None else PlainSegments(objects)
        if codec is not None and cache is not None:
            memory = MemoryBudget(self.budget.limit)
            self.cached = CachedContents(meta, self._extents, framed, *cache, memory)
        self._reader = Reader(meta, segments, self._extents, self._threads, self.cached)
        self._reclaimer = Reclaimer(meta, objects, grace)
        os.makedirs(self._directory, exist_ok=True)
        numbers = [number for name in os.listdir(self._directory) if (number := journal_number(name)) is not None]
        self._log = JournalLog(self._directory, self._threads, Journal(self._directory, max(numbers, default=0) + 1))
        self._dirty = DirtyFiles(self._directory, self._log, limits or Limits(), self._progress, self._relieved)
        self._find = self._dirty.find
        self.far = codec is not None
        """Objects take no room here."""
        self._writeback = WriteBack(
            meta,
            objects,
            codec,
            self._reader,
            self._threads,
            self.budget.share(self.budget.limit * 3 // 4),
            self._dirty,
            self._committing,
            None if self.cached is None else self.cached.cache.keep,
        )
        self._flusher = Flusher(meta, self._dirty, self._writeback, flush_after, self._patience)
        memory, ids = self._writeback.memory, self._writeback.ids
        self.garbage = GarbageCollector(
            meta,
            objects,
            self._reclaimer,
            # What is read for it is verified, so that damage is not written anew with a checksum that fits.
            Compactor(meta, objects, codec, framed, self._threads, memory, ids, self._known_no_more),
            LostObjects(meta, objects, ids),
            ids,
            gc_interval,
        )
        self.direct: DirectFiles | None = None
        """Files that the kernel reads or changes by itself, where there is a cache."""
        if self.cached is not None:
            self.direct = DirectFiles(
                meta,
                self._dirty,
                self._log,
                self._flusher,
                self.cached,
                self._threads,
                self._directory,
                flush_after,
                (limits or Limits()).local,
            )

    # Life

    async def recover(self) -> None:
        """Bring back what the last process had acknowledged and not committed; ``start`` then begins to commit it.
        Before anything else."""
        if self.cached is not None:
            writer = secrets.randbits(63)
            previous = await self._meta.exchange_writer(writer)
            await self._meta.sync()
            await self.cached.start(previous, writer)
        found = await recover(self._meta, self._directory, self._log.epoch, self._threads)
        if found.journals:
            self._log.adopt(found.journals)
            self._dirty.adopt(found.states, found.replicas)
        self._writeback.ids.doubt(found.segments)
        for ino, mtime in found.mtimes.items():
            await self._meta.set_attributes(ino, SetAttr(mtime=mtime))
        keep = {os.path.basename(replica.path) for _, replica in found.replicas}
        await asyncio.get_running_loop().run_in_executor(self._threads, self._clean, keep)

    def start(self) -> None:
        """Start write-back and garbage collection in the background."""
        self._flusher.start()
        self._reclaimer.start()
        self.garbage.start()
        if self.direct is not None:
            self.direct.start()

    async def close(self) -> None:
        """Commit everything, durably; the local directory is empty afterwards. What fails is raised, and stays in the
        journals for the next ``recover``. Nothing else may be running or be called afterwards."""
        saved = False
        self._objects.hurry(min(self._patience.seconds, _END_SECONDS))
        try:
            await self.garbage.stop()
            await self._finish()
            await self._meta.sync()
            saved = True
            await self._reclaimer.reclaim_if_possible()
            await asyncio.get_running_loop().run_in_executor(self._threads, self._empty)
        finally:
            await self._flusher.abandon()
            await self._reclaimer.stop()
            if self.cached is not None:
                await self.cached.close(clean=saved)
            self._threads.shutdown(wait=False)

    async def _finish(self) -> None:
        try:
            if self.direct is not None:
                self._writeback.impatient = True
                await self.direct.finish()
        finally:
            await self._flusher.finish()

    def _clean(self, keep: set[str]) -> None:
        """Delete what is no journal and not to be kept: a process has died before it could."""
        for name in os.listdir(self._directory):
            if journal_number(name) is None and name not in keep:
                os.unlink(os.path.join(self._directory, name))

    def _empty(self) -> None:
        """Delete the journals, oldest first, then all else. All is committed."""
        numbers = [number for name in os.listdir(self._directory) if (number := journal_number(name)) is not None]
        for number in sorted(numbers):
            os.unlink(os.path.join(self._directory, journal_name(number)))
        sync_directory(self._directory)
        self._clean(set())

    # Contents

    def overlay(self, inode: Inode) -> Inode:
        """The inode as users must see it: size, times and allocation with what is not committed yet. The same object
        when there is nothing."""
        if (file := self._find_direct(inode.ino)) is not None:
            return file.overlay(inode, copy(inode))
        state = self._find(inode.ino)
        return inode if state is None else state.overlay(inode)

    def _find_direct(self, ino: int) -> DirectFile | None:
        return None if self.direct is None else self.direct.find(ino)

    async def _before_change(self, inode: Inode, size: int = 0) -> tuple[Inode, DirectFile | None]:
        """Waits as long as a change has to, of ``size`` bytes; returns the inode as it is then, and the direct file
        that is to be changed in place of its layers."""
        ino = inode.ino
        if not self._is_held(ino) and self._find_direct(ino) is None:
            if not (self._dirty.pressure if size else self._dirty.full):
                return inode, None
            inode = await self._wait_for_room(inode, size)
        while True:
            if self.direct is not None and self._is_held(ino):
                await self.direct.begin_held(ino)
            file = self._find_direct(ino)
            if file is not None and self.direct is not None:
                self.direct.changed()
                return inode, file
            inode = await self._meta.get_inode(ino)
            if not self._is_held(ino) and self._find_direct(ino) is None:
                return inode, None

    async def read(self, inode: Inode, offset: int, size: int) -> list[Buffer]:
        """Up to ``size`` bytes, in parts to be joined; fewer only at the end of the file. The parts must not be
        changed."""
        if (file := self._find_direct(inode.ino)) is not None and self.direct is not None:
            return [*await self.direct.read(file, offset, size)]
        state = self._find(inode.ino)
        if state is None:
            end = min(offset + size, inode.size)
            return await self._reader.committed(inode, offset, end) if offset < end else []
        end = min(offset + size, state.size)
        return await self._reader.pieces(inode, state.resolve(offset, end)) if offset < end else []

    async def write(self, inode: Inode, offset: int, data: memoryview, now: int) -> int:
        """Write all of ``data`` (a view of bytes) at ``offset``; ``now`` becomes mtime and ctime, ns. Waits only
        where much is uncommitted. EFBIG past FILE_SIZE_MAX."""
        if offset + len(data) > FILE_SIZE_MAX:
            raise _error(errno.EFBIG)
        if not data:
            return 0
        inode, file = await self._before_change(inode, len(data))
        if file is not None:
            return file.write(offset, data)
        return self._dirty.write(inode, offset, data, now)

    async def truncate(self, inode: Inode, size: int, now: int) -> None:
        """Set the size; what is beyond is gone, what comes anew reads as zero. EFBIG past FILE_SIZE_MAX, EINVAL below
        0."""
        if size < 0:
            raise _error(errno.EINVAL)
        if size > FILE_SIZE_MAX:
            raise _error(errno.EFBIG)
        inode, file = await self._before_change(inode)
        if file is not None:
            file.truncate(size)
            return
        self._dirty.truncate(inode, size, now)

    async def fallocate(self, inode: Inode, mode: int, offset: int, length: int, now: int) -> None:
        """fallocate(2) with mode 0, KEEP_SIZE, PUNCH_HOLE|KEEP_SIZE, ZERO_RANGE and ZERO_RANGE|KEEP_SIZE. Space is
        not reserved: a file is written anew elsewhere anyway. EOPNOTSUPP for other modes, EINVAL, EFBIG."""
        if offset < 0 or length <= 0:
            raise _error(errno.EINVAL)
        end = offset + length
        if end > FILE_SIZE_MAX:
            raise _error(errno.EFBIG)
        keep = mode & FALLOC_FL_KEEP_SIZE
        action = mode & ~FALLOC_FL_KEEP_SIZE
        if action not in (0, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE) or (
            action == FALLOC_FL_PUNCH_HOLE and not keep
        ):
            raise _error(errno.EOPNOTSUPP)
        inode, file = await self._before_change(inode)
        size = self.overlay(inode).size
        new_size = size if keep else max(size, end)
        if file is not None:
            file.punch(min(offset, new_size), min(end, new_size) if action else 0, new_size)
        elif action == 0:
            self._dirty.truncate(inode, new_size, now)
        else:
            self._dirty.punch(inode, min(offset, new_size), min(end, new_size), new_size, now)

    async def seek(self, inode: Inode, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE of lseek(2). ENXIO at or past the end and when no data follows, EINVAL."""
        if (file := self._find_direct(inode.ino)) is not None:
            return file.seek(offset, whence)
        return await seek(self._reader, self._find(inode.ino), inode, offset, whence)

    async def copy_range(
        self, source: Inode, source_offset: int, target: Inode, target_offset: int, length: int, now: int
    ) -> int:
        """copy_file_range(2): returns how many bytes were copied, which may be fewer than asked for and is 0 at the
        end of ``source``. Large ranges share their extents. EINVAL for overlapping ranges of one file, EFBIG."""
        length = min(length, self.overlay(source).size - source_offset)
        if length <= 0:
            return 0
        if target_offset + length > FILE_SIZE_MAX:
            raise _error(errno.EFBIG)
        if source.ino == target.ino and abs(source_offset - target_offset) < length:
            raise _error(errno.EINVAL)
        direct = any(self._find_direct(inode.ino) or self._is_held(inode.ino) for inode in (source, target))
        if length >= SHARE_MIN and not direct and self._objects.away_since is None:
            shared = await self._flusher.uncancelled(
                self._share(source.ino, source_offset, target.ino, target_offset, min(length, _SHARE_MAX), now)
            )
            if shared is not None:
                return shared
        return await self._copy(source.ino, source_offset, target.ino, target_offset, min(length, _COPY_MAX), now)

    async def _share(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int, now: int
    ) -> int | None:
        """None when it cannot be done: the target is inline, or being written to all the time, or the store is out of
        reach."""
        for _ in range(_SHARE_ATTEMPTS):
            try:
                await self._flusher.flush_files((source, target))
            except TimeoutError:
                return None
            async with self._writeback.holding((source, target)):
                if self._dirty.told_by_journal(target):
                    # A replay must not bring older contents back; it may leave them out once they are durable
                    # elsewhere.
                    await self._meta.sync()
                if self._find(target) is None:
                    return await self._clone(source, source_offset, target, target_offset, length, now)
        return None

    async def _clone(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int, now: int
    ) -> int | None:
        """Nothing of the two is dirty or under way."""
        length = min(length, (await self._meta.get_inode(source)).size - source_offset)
        if length <= 0:
            return 0
        if self._dirty.told_by_journal(target):
            self._dirty.forget_journal(target)
        try:
            async with self._changing({target: [(target_offset, target_offset + length)]}):
                inode = await self._meta.clone_range(source, source_offset, length, target, target_offset)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return None
            raise
        state = self._find(target)
        if state is not None and state.size < target_offset + length:
            # Written to, by a file size that is no more, while the metadata changed.
            self._dirty.punch(inode, 0, 0, target_offset + length, now)
        return length

    def _is_held(self, ino: int) -> bool:
        return self.direct is not None and ino in self.direct.held

    async def _copy(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int, now: int
    ) -> int:
        copied = 0
        while copied < length:
            inode = await self._meta.get_inode(source)
            parts = await self.read(inode, source_offset + copied, min(_COPY_STEP, length - copied))
            if not parts:
                break
            for part in parts:
                inode = await self._meta.get_inode(target)
                copied += await self.write(inode, target_offset + copied, memoryview(part), now)
        return copied

    # Times, durability, removal

    def set_mtime(self, ino: int, mtime: int) -> None:
        """The user sets a file's modification time: no commit and no replay may bring an older one back. To be called
        right before ``MetaAPI.set_attributes``, for every regular file."""
        if (file := self._find_direct(ino)) is not None:
            file.set_mtime(mtime)
        self._dirty.set_mtime(ino, mtime)
        self._writeback.leave_mtime(ino)

    async def sync(self, ino: int, datasync: bool = False) -> None:
        """fsync(2), or fdatasync(2), which is the same here: everything acknowledged before survives the loss of
        power."""
        if (file := self._find_direct(ino)) is not None and self.direct is not None:
            await self.direct.sync(ino, file, to_store=self._sync_to_store or self._log.failed)
            if not self._log.failed:
                return
        if self._sync_to_store and not self._log.failed:
            await self._sync_in_store(ino)
            return
        state = self._find(ino)
        if state is not None:
            state.synced_often = True
        if self._log.failed:
            # What a failed fdatasync left behind may never reach the disk, whatever the next one says.
            await self._flusher.flush()
        elif not self._dirty.durable(ino):
            replicas = [replica for replica in self._dirty.replicas(ino) if not replica.durable]
            # Both at once: the metadata has a thread of its own.
            synced = asyncio.shield(self._log.sync(replicas))
            await self._meta.sync()
            await synced
            return
        await self._meta.sync()

    async def _sync_in_store(self, ino: int) -> None:
        await self._flusher.flush_files([ino])
        await self._meta.sync()
        if self._dirty.told_by_journal(ino):
            self._dirty.forget_journal(ino)
        if not self._dirty.forgotten_durably(ino):
            # What the journals tell, or half of it, would undo after a loss of power what has been committed.
            await asyncio.shield(self._log.sync(()))

    def forget(self, ino: int) -> None:
        """The file is removed for good: nothing of it is written back."""
        if self.direct is not None:
            self.direct.forget(ino)
        self._dirty.forget(ino)
        self._extents.invalidate(ino)
        if self.cached is not None:
            self.cached.cache.forget(ino)

    async def flush(self, ino: int | None = None) -> None:
        """Write back one file or everything now."""
        if ino is None:
            await self._checkpoint()
            await self._flusher.flush()
        elif (file := self._find_direct(ino)) is not None and self.direct is not None:
            await self.direct.checkpoint(ino, file, urgent=True)
        elif self._find(ino) is not None:
            await self._flusher.flush_files([ino])
            await self._writeback.kept()

    async def make_room(self) -> None:
        """Write back everything and, where objects are local, delete what is dead now: what is left is needed."""
        await self._checkpoint()
        await self._flusher.flush()
        if not self.far:
            await self._reclaimer.reclaim()

    async def shrink_cache(self, size: int) -> None:
        """Take so many bytes from the cache, as far as nothing uses them, where it is on the file system of the local
        directory."""
        if self.cached is not None:
            cache = self.cached.cache
            if await asyncio.to_thread(_same_file_system, cache.path, self._directory):
                await cache.shrink(max(cache.bytes - size, 0))

    async def _checkpoint(self) -> None:
        if self.direct is not None:
            await self.direct.checkpoint_all()
            await self.direct.end_idle()

    @property
    def dirty_bytes(self) -> int:
        """Uncommitted bytes of contents."""
        return self._dirty.bytes + (self.direct.written if self.direct is not None else 0)

    def reclaim_soon(self) -> None:
        """Files have been removed, or overwritten: where there is no grace time, delete the objects of dead segments in
        the background."""
        self._reclaimer.soon()

    @asynccontextmanager
    async def _changing(self, changes: Mapping[int, Sequence[Range]]) -> AsyncIterator[None]:
        """The committed contents of these ranges (by inode) change in the metadata within the block."""
        if self.cached is None:
            try:
                yield
            finally:
                self._known_no_more(changes)
        else:
            async with self.cached.cache.changing(changes):
                try:
                    yield
                finally:
                    self._known_no_more(changes)

    def _known_no_more(self, inos: Iterable[int]) -> None:
        for ino in inos:
            self._extents.invalidate(ino)

    @asynccontextmanager
    async def _committing(self, commits: Sequence[DataCommit]) -> AsyncIterator[None]:
        changes: dict[int, list[Range]] = {commit.ino: [] for commit in commits}
        if self.cached is not None:
            for commit in commits:
                changes[commit.ino] = await self._changed_ranges(commit)
        async with self._changing(changes):
            yield
        self._reclaimer.soon()

    async def _changed_ranges(self, commit: DataCommit) -> list[Range]:
        try:
            inode = await self._meta.get_inode(commit.ino)
        except FileNotFoundError:
            return []
        if commit.inline is not None:
            return [(0, FILE_SIZE_MAX)]
        ranges = [*commit.drops, *((extent.offset, extent.end) for extent in commit.extents)]
        return [*ranges, (commit.size, FILE_SIZE_MAX)] if commit.size < inode.size else ranges

    def _progress(self, size: int) -> None:
        self._flusher.throttle.progress(size)

    def _relieved(self) -> None:
        self._flusher.release()

    async def _wait_for_room(self, inode: Inode, size: int = 0) -> Inode:
        await self._flusher.wait_for_room(size)
        return await self._meta.get_inode(inode.ino)


def _same_file_system(one: str, other: str) -> bool:
    return os.stat(one).st_dev == os.stat(other).st_dev


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
