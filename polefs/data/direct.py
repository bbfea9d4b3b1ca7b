"""Files that the kernel changes by itself: direct files.

A *direct* file is one replica, whole, which programs write and map through FUSE passthrough. Nobody tells what they
change, so the replica alone says what the file is, its size and times too, and the journal says that it does. From time
to time, when it is synced and when nobody has it open any more, what differs from the committed contents is written
back (a *checkpoint*). The file ceases to be direct when it is not open, all of it is committed and that is durable; its
replica is a cache file then.

A complete file that the kernel only reads, from its cache file, is *held*: it is not evicted, and it becomes direct
before anything changes it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Final, TypeVar

from polefs.data.cache.rangeset import Range
from polefs.data.cache.reader import CachedContents, Reading
from polefs.data.cache.store import CachedFile
from polefs.data.changes import Known, Snapshot, notices_mappings
from polefs.data.dirty import DirtyFiles
from polefs.data.durability import JournalLog
from polefs.data.flusher import Flusher
from polefs.data.replica import Replica
from polefs.meta.api import MetaAPI
from polefs.meta.model import INLINE_MAX, Inode
from polefs.objects.localio import allocated_ranges, punch_hole, read_available

T = TypeVar("T")

log = logging.getLogger(__name__)

MOST: Final = 128
"""Direct files at a time: each is a descriptor, here and in the kernel, and a replica."""

_GRANULARITY: Final = 50_000_000
"""Times of a file that changed less than this ago, ns, may stay as they are when it changes again: they come from a
clock that ticks."""

_SHARE: Final = 10
"""Looking for changes takes at most this part of the time: one in so many."""


class DirectFile:
    """``handles`` are open in the kernel, ``writers`` of these may change it; ``changes`` counts whatever may have
    changed it but writes through these. It is ``settled`` when all is committed that was there at that count.
    ``mark`` are its times and size when all was committed and would change with the next change, else None; ``written``
    counts the bytes that came to us since a checkpoint began."""

    __slots__ = (
        "changes",
        "cut_off",
        "due",
        "handles",
        "known",
        "lock",
        "mark",
        "replica",
        "settled",
        "writers",
        "written",
    )

    def __init__(self, replica: Replica, known: Known) -> None:
        self.replica = replica
        self.known = known
        self.handles = 0
        self.writers = 0
        self.changes = 1
        self.settled = 0
        self.mark: tuple[int, int] | None = None
        self.written = 0
        self.cut_off = False
        self.due = 0.0
        self.lock = asyncio.Lock()
        """Held for a checkpoint, and for its end."""

    @property
    def idle(self) -> bool:
        return not self.handles and self.settled == self.changes

    def overlay(self, inode: Inode, seen: Inode) -> Inode:
        """``seen``, a copy of ``inode``, as users must see it."""
        status = os.fstat(self.replica.fd)
        seen.size = status.st_size
        seen.allocated = status.st_blocks * 512
        seen.mtime = status.st_mtime_ns
        seen.ctime = max(inode.ctime, status.st_mtime_ns if status.st_mtime_ns != inode.mtime else 0)
        return seen

    @property
    def size(self) -> int:
        return os.fstat(self.replica.fd).st_size

    # Changes that come to us

    def write(self, offset: int, data: memoryview) -> int:
        self.changes += 1
        self.written += len(data)
        self.replica.write(data, offset)
        return len(data)

    def truncate(self, size: int) -> None:
        self.changes += 1
        os.ftruncate(self.replica.fd, size)

    def punch(self, start: int, end: int, size: int) -> None:
        """The range reads as zero from now on, and the size is ``size``."""
        self.changes += 1
        fd = self.replica.fd
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)
        if start < end:
            punch_hole(fd, start, end - start)
        os.utime(fd)

    def set_mtime(self, mtime: int) -> None:
        self.changes += 1
        os.utime(self.replica.fd, ns=(time.time_ns(), mtime))

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; errors as there."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.lseek(self.replica.fd, offset, whence)

    def read_now(self, offset: int, size: int) -> list[memoryview] | None:
        """What there is of the range, when it need not be waited for."""
        length = min(size, self.size - offset)
        if length <= 0:
            return []
        data = self.replica.read_now(offset, length)
        return None if data is None else [data]


class DirectFiles:
    """Call ``start``, and at the end ``finish``."""

    def __init__(
        self,
        meta: MetaAPI,
        dirty: DirtyFiles,
        journals: JournalLog,
        flusher: Flusher,
        cached: CachedContents,
        threads: Executor,
        directory: str,
        flush_after: float,
        most_bytes: int,
    ) -> None:
        """``directory``: of the replicas; where the cache is on another file system, files can be held alone.
        ``most_bytes``: of files that are not committed, beyond which no new one becomes direct."""
        self.writable = os.stat(cached.cache.path).st_dev == os.stat(directory).st_dev
        self._meta = meta
        self._dirty = dirty
        self._journals = journals
        self._flusher = flusher
        self._cached = cached
        self._threads = threads
        self._directory = directory
        self._flush_after = flush_after
        self._most_bytes = most_bytes
        self._files: dict[int, DirectFile] = {}
        self.find = self._files.get
        """The direct file by inode number."""
        self.held: dict[int, CachedFile[Reading]] = {}
        self._holders: dict[int, int] = {}
        self._beginning: dict[int, asyncio.Task[DirectFile]] = {}
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._notices_mappings: bool | None = None
        self._pending = 0
        """Bytes of files that were not committed at the last look."""

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="direct files")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def finish(self) -> None:
        """Nobody has a file open any more: let all be committed, and be direct no more."""
        await self.stop()
        for file in self._files.values():
            if file.handles:
                # Of a connection that was cut off: who has it open can still write to it.
                file.cut_off = True
                file.changes += 1
                file.handles = file.writers = 0
        await self._checkpoint(list(self._files.items()))
        await self.end_idle()

    def _call(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    # Beginning

    @property
    def count(self) -> int:
        """How many direct files there are."""
        return len(self._files)

    @property
    def written(self) -> int:
        """Bytes that came to us and no checkpoint has seen."""
        return sum(file.written for file in self._files.values())

    @property
    def room(self) -> bool:
        """Whether one more file may become direct."""
        return len(self._files) < MOST and self._pending <= self._most_bytes

    def begin_new(self, inode: Inode) -> DirectFile:
        """A file that is empty, and was so from its making."""
        ino = inode.ino
        generation, _ = self._dirty.new_name(ino)
        replica = Replica(self._directory, ino, generation, create=True)
        try:
            os.utime(replica.fd, ns=(inode.atime, inode.mtime))
            self._dirty.begin_direct(replica)
        except BaseException:
            os.unlink(replica.path)
            raise
        return self._enter(ino, DirectFile(replica, Known()))

    async def hold(self, inode: Inode) -> CachedFile[Reading] | None:
        """The cache file of a file that is committed and cached as a whole, kept as it is until ``let_go``; None when
        that cannot be."""
        ino = inode.ino
        file = self.held.get(ino)
        if file is None:
            file = await self._cached.hold_complete(inode)
            if file is None:
                return None
            assert file.handle is not None
            # A second name is that of a replica that a journal tells of.
            single = os.fstat(file.handle.fd).st_nlink == 1
            if not single or file.changing or file.gone or self._dirty.find(ino) or ino in self._files:
                file.users -= 1
                return None
            self.held[ino] = file
        self._holders[ino] = self._holders.get(ino, 0) + 1
        return file

    def let_go(self, ino: int) -> None:
        left = self._holders.pop(ino) - 1
        if left:
            self._holders[ino] = left
        elif (file := self.held.pop(ino, None)) is not None:
            file.users -= 1

    async def begin_held(self, ino: int) -> DirectFile:
        """Let a file that is held become direct; whoever holds it has the same file open. OSError when its cache file
        was taken away or the journal cannot be written."""
        task = self._beginning.get(ino)
        if task is None:
            task = self._beginning[ino] = asyncio.get_running_loop().create_task(self._begin_held(ino, self.held[ino]))
            task.add_done_callback(lambda _: self._beginning.pop(ino, None))
        return await asyncio.shield(task)

    async def _begin_held(self, ino: int, held: CachedFile[Reading]) -> DirectFile:
        assert held.handle is not None
        inode = await self._meta.get_inode(ino)
        known = await self._call(_known, held.handle.fd)
        generation, path = self._dirty.new_name(ino)
        await self._cached.cache.give_away(held, path)
        replica = Replica(self._directory, ino, generation, create=False)
        os.utime(replica.fd, ns=(inode.atime, inode.mtime))
        self._dirty.begin_direct(replica)
        file = self._enter(ino, DirectFile(replica, known))
        # Those who hold it are handles of it now.
        self.held.pop(ino, None)
        file.handles = self._holders.pop(ino, 0)
        return file

    def _enter(self, ino: int, file: DirectFile) -> DirectFile:
        self._files[ino] = file
        self._wanted.set()
        return file

    def opened(self, file: DirectFile, *, writing: bool, counted: bool = False) -> None:
        """One more handle of it is open, unless it was ``counted`` already as who holds it; ``writing``: it may change
        the file."""
        file.handles += not counted
        if writing:
            file.writers += 1
            file.changes += 1
        self._wanted.set()

    def closed(self, ino: int, *, writing: bool) -> None:
        """A handle of a file that is held or direct is open no more."""
        file = self._files.get(ino)
        if file is None:
            if ino in self._holders:
                self.let_go(ino)
            return
        file.handles -= 1
        if writing:
            file.writers -= 1
            file.changes += 1
        if not file.handles:
            file.due = 0.0
            self._wanted.set()

    def changed(self) -> None:
        self._wanted.set()

    def forget(self, ino: int) -> None:
        """The file is removed; the journal's part is told to ``DirtyFiles``."""
        self._files.pop(ino, None)

    # Reading

    async def read(self, file: DirectFile, offset: int, size: int) -> list[memoryview]:
        """What there is of the range."""
        found = file.read_now(offset, size)
        if found is None:
            found = [memoryview(await self._call(read_available, file.replica.fd, offset, size))]
        return found

    # Writing back

    async def sync(self, ino: int, file: DirectFile, *, to_store: bool) -> None:
        """Everything written before survives the loss of power; ``to_store``: and is committed."""
        if to_store:
            await self.checkpoint(ino, file, urgent=True)
        # What is on the disk is newer than what is committed, or the same: after a loss of power it counts.
        file.replica.writes += 1
        synced = asyncio.shield(self._journals.sync([file.replica]))
        await self._meta.sync()
        await synced

    async def checkpoint_all(self) -> None:
        """Write back all that is not committed. Raises as ``Flusher.flush``."""
        await self._flusher.with_patience(self._checkpoint(list(self._files.items())))

    async def _checkpoint(self, files: Sequence[tuple[int, DirectFile]]) -> None:
        work = (self._flusher.uncancelled(self._checkpoint_one(*each, urgent=False)) for each in files)
        results = await asyncio.gather(*work, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def checkpoint(self, ino: int, file: DirectFile, *, urgent: bool = False) -> None:
        """Write back what of the file is not committed. Raises as ``Flusher.flush``."""
        await self._flusher.with_patience(self._checkpoint_one(ino, file, urgent))

    async def _checkpoint_one(self, ino: int, file: DirectFile, urgent: bool) -> None:
        async with file.lock:
            if self._files.get(ino) is not file:
                return
            begun = time.monotonic()
            changes, quiet = file.changes, not file.writers
            if quiet and file.settled == changes:
                return
            if self._notices_mappings is None:
                self._notices_mappings = await self._call(notices_mappings, self._directory)
            file.written = 0
            mark, size, mtime, exact = await self._call(_look, file.replica.fd)
            if file.mark != mark:
                data, holes = await self._call(file.known.compare, file.replica.fd, size)
                file.due = begun + max(self._flush_after, (time.monotonic() - begun) * _SHARE)
                try:
                    inode = await self._meta.get_inode(ino)
                except FileNotFoundError:
                    return
                if data or holes or size != inode.size or mtime != inode.mtime:
                    await self._write_back(inode, file, data, holes, size, mtime, urgent)
                file.mark = mark if exact and self._notices_mappings else None
            else:
                file.due = begun + self._flush_after
            if quiet:
                file.settled = changes

    async def _write_back(
        self,
        inode: Inode,
        file: DirectFile,
        data: list[Range],
        holes: list[Range],
        size: int,
        mtime: int,
        urgent: bool,
    ) -> None:
        snapshot = Snapshot(file.replica)
        file.known.forget(data)
        file.known.forget(holes)
        self._dirty.snapshot(inode, snapshot, data, holes, size, mtime)
        await self._flusher.write_back([inode.ino], urgent=urgent)
        file.known.note(snapshot.frames(), holes, size)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            await asyncio.sleep(self._flush_after)
            now = time.monotonic()
            try:
                pending = [file.replica.fd for file in self._files.values() if not file.idle]
                self._pending = sum(os.fstat(fd).st_blocks * 512 for fd in pending)
                await self._checkpoint([(ino, file) for ino, file in self._files.items() if file.due <= now])
                await self.end_idle()
            except OSError as error:
                log.error("write-back of files that are open failed: %s", error)
            except Exception:
                log.exception("write-back of files that are open failed")
            if self._files:
                self._wanted.set()

    # The end

    async def end_idle(self) -> None:
        """Let the files that are not open and are committed be direct no more."""
        idle = [(ino, file, file.changes) for ino, file in self._files.items() if file.idle]
        if idle:
            # What is settled by now is durable afterwards.
            await self._meta.sync()
            await asyncio.gather(*(self._end(*each) for each in idle))

    async def _end(self, ino: int, file: DirectFile, changes: int) -> None:
        async with file.lock:
            if not (self._files.get(ino) is file and file.idle and file.changes == changes):
                return
            size = file.size
            pieces = await self._call(_pieces, file.replica, size)
            if size > INLINE_MAX and not file.cut_off:
                await self._cached.cache.keep([(ino, pieces, size)])
            if file.idle and file.changes == changes and self._files.get(ino) is file:
                self._dirty.end_direct(ino)
                del self._files[ino]
            else:
                self._cached.cache.forget(ino)


def _look(fd: int) -> tuple[tuple[int, int], int, int, bool]:
    """The mark of a file, its size and time of modification, and whether every later change gives it another mark.
    Blocks."""
    before = os.fstat(fd)
    age = time.time_ns() - before.st_ctime_ns
    # A page that was written through a mapping is noticed again only after this. And what is committed next must not be
    # newer than the disk, which counts after a loss of power.
    os.fdatasync(fd)
    status = os.fstat(fd)
    mark = status.st_ctime_ns, status.st_size
    exact = before.st_ctime_ns == status.st_ctime_ns and not 0 <= age < _GRANULARITY
    return mark, status.st_size, status.st_mtime_ns, exact


def _known(fd: int) -> Known:
    # What was cached need not be on the disk yet, which counts from now on after a loss of power.
    os.fdatasync(fd)
    return Known.of(fd)


def _pieces(replica: Replica, size: int) -> list[tuple[int, int, Replica]]:
    return [(start, min(end, size), replica) for start, end in allocated_ranges(replica.fd) if start < size]
