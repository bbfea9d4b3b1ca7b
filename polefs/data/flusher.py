"""When write-back happens: after a few seconds, at once under pressure, and for single files on demand."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Coroutine, Iterable
from typing import Any, Final, TypeVar

from polefs.data.dirty import DirtyFiles
from polefs.data.patience import Patience
from polefs.data.throttle import Throttle
from polefs.data.writeback import WriteBack
from polefs.meta.api import MetaAPI

T = TypeVar("T")

log = logging.getLogger(__name__)

_RETRY_MAX: Final = 60.0
"""Longest time between two attempts after failures, seconds."""


class Flusher:
    """Runs write-back rounds. One round submits what older journals tell of. The next begins when all of that is under
    way. Journals that tell of nothing any more that is not committed are deleted, once that is durable."""

    def __init__(
        self, meta: MetaAPI, dirty: DirtyFiles, writeback: WriteBack, flush_after: float, patience: Patience
    ) -> None:
        self._meta = meta
        self._patience = patience
        self._dirty = dirty
        self._writeback = writeback
        self._flush_after = flush_after
        self._retiring = asyncio.Lock()
        self._failures = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._room: asyncio.Future[None] | None = None
        self.throttle = Throttle()
        self._working: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run(), name="flusher")]

    async def stop(self) -> None:
        """No more rounds begin. Those under way go on."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
            await asyncio.wait([task])

    async def finish(self) -> None:
        """Write back everything; nothing is under way any more afterwards, also after a failure, which a store that is
        out of reach now is as well."""
        await self.stop()
        self._writeback.impatient = True
        try:
            await self.uncancelled(self._flush())
        finally:
            while self._working:
                await asyncio.wait(self._working)
            await self._writeback.idle()

    async def abandon(self) -> None:
        """Give up what is under way. Everything is told by the journals."""
        await self.stop()
        await self._writeback.stop()
        while self._working:
            for task in self._working:
                task.cancel()
            await asyncio.wait(self._working)

    async def wait_for_room(self, size: int) -> None:
        """Returns once there is room for a write of so many bytes; the less there is, the later. Raises what keeps
        write-back from making room (ENOSPC, EIO …), as ``flush`` does."""
        if not self._dirty.full:
            await self.throttle.wait(size, self._dirty.pressure)
        while self._dirty.full:
            if self._room is None:
                self._room = asyncio.get_running_loop().create_future()
            self._dirty.changed.set()  # journals of what is committed may be what takes the room
            self._dirty.urgent.set()
            await self._patience.wait(self._room)

    def release(self, error: OSError | None = None) -> None:
        """There is room, or there will be none because of this error: whoever waits for it goes on."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            if error is None:
                room.set_result(None)
            else:
                room.set_exception(error)
                room.exception()  # its waiters may all have been cancelled

    async def flush_files(self, inos: Iterable[int]) -> None:
        """Write back these files now. What the journals tell of them stays. Raises as ``flush`` does."""
        if wanted := [ino for ino in {*inos} if self._dirty.find(ino)]:
            await self.with_patience(self.write_back(wanted, urgent=True))

    async def write_back(self, inos: Iterable[int], *, urgent: bool) -> None:
        """As ``flush_files``, however long it takes; ``urgent``: before others."""
        await _all([self._writeback.submit(ino, None, urgent=urgent) for ino in inos])

    async def with_patience(self, work: Coroutine[None, None, T]) -> T:
        """Run ``work`` to its end, and wait for it; raises as ``flush`` does."""
        return await self._patience.wait(self._start(work))

    async def flush(self) -> None:
        """Write back everything that is dirty now and delete the journals that tell of it. Raises the first failure,
        and ETIMEDOUT while the store is out of reach. Neither that nor a caller that is cancelled stops it."""
        await self.with_patience(self._flush())

    async def uncancelled(self, work: Coroutine[None, None, T]) -> T:
        """Run ``work`` to its end, also when the caller is cancelled."""
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._working.add(task)
        task.add_done_callback(self._worked)
        return task

    def _worked(self, task: asyncio.Task[Any]) -> None:
        self._working.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked for it may be gone

    async def _flush(self) -> None:
        if not self._dirty.log.empty or self._dirty.changed.is_set():
            try:
                await self._close_journal()
            except OSError as error:
                self._failed(error)
                raise
            await self._finish(self._submit(self._dirty.log.epoch))

    async def _close_journal(self) -> None:
        dirty = self._dirty
        dirty.urgent.clear()
        await dirty.rotate()
        dirty.changed.clear()

    def _submit(self, before: int) -> list[asyncio.Future[None]]:
        """Everything that the journals before ``before`` tell of."""
        return [self._writeback.submit(ino, before) for ino in self._dirty.older(before)]

    async def _finish(self, submitted: list[asyncio.Future[None]]) -> None:
        """Wait until it is committed and cached, and delete the journals and replicas that are not needed any more."""
        try:
            await _all(submitted)
            await self._writeback.kept()
            await self._retire()
        except Exception as error:
            self._failed(error)
            raise
        self._failures = 0
        self.release()

    async def _retire(self) -> None:
        dirty = self._dirty
        async with self._retiring:
            await self._writeback.ids.discard_doubtful()
            oldest = dirty.oldest()
            await self._meta.sync()
            await dirty.log.retire(oldest, dirty.retired(oldest))
            dirty.deleted(oldest)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if isinstance(error, OSError):
            log.error("write-back failed: %s", error)
            self.release(error)
        else:
            log.error("write-back failed", exc_info=error)
            self.release(OSError(errno.EIO, os.strerror(errno.EIO)))
        self._dirty.changed.set()
        self._dirty.urgent.clear()

    async def _run(self) -> None:
        while True:
            await self._due()
            try:
                await self._close_journal()
            except OSError as error:
                self._failed(error)
                continue
            self._start(self._finish(self._submit(self._dirty.log.epoch)))
            await asyncio.shield(self._writeback.drained())

    async def _due(self) -> None:
        """Returns when a round should begin."""
        await self._dirty.changed.wait()
        delay = self._flush_after * 2**self._failures if self._failures < 8 else _RETRY_MAX
        try:
            async with asyncio.timeout(min(delay, _RETRY_MAX)):
                await self._dirty.urgent.wait()
        except TimeoutError:
            pass


async def _all(work: Iterable[asyncio.Future[None]]) -> None:
    """Wait until all have ended, then raise the first failure. None of them is cancelled with the caller."""
    futures = list(work)
    if futures:
        await asyncio.wait(futures)
    for future in futures:
        future.result()
