"""When write-back happens: after a few seconds, at once under pressure, and for single files on demand."""

from __future__ import annotations

import asyncio
import errno
import logging
import os

from polefs.data.dirty import DirtyFiles
from polefs.data.writeback import WriteBack
from polefs.meta.api import MetaAPI

log = logging.getLogger(__name__)

_RETRY_MAX = 60.0
"""Longest time between two attempts after failures, seconds."""


class Flusher:
    """Runs write-back rounds. One round starts a new journal, commits everything that the older ones tell of, makes
    that durable, and deletes them."""

    def __init__(self, meta: MetaAPI, dirty: DirtyFiles, writeback: WriteBack, flush_after: float) -> None:
        self._meta = meta
        self._dirty = dirty
        self._writeback = writeback
        self._flush_after = flush_after
        self._lock = asyncio.Lock()
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="flusher")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def wait_for_room(self) -> None:
        """Returns once there is room for a write. Raises what kept write-back from making room (ENOSPC, EIO …)."""
        while self._dirty.full:
            if self._room is None:
                self._room = asyncio.get_running_loop().create_future()
            self._dirty.urgent.set()
            await asyncio.shield(self._room)

    async def flush_files(self, inos: tuple[int, ...]) -> None:
        """Write back these files now. Their journal records stay until the next round."""
        async with self._lock:
            works = [work for ino in inos if (work := self._dirty.seal(ino)) is not None]
            if works:
                await self._writeback.commit(works)

    async def flush(self) -> None:
        """Write back everything that is dirty now and delete the journals that tell of it. Raises the first failure."""
        async with self._lock:
            try:
                await self._round()
            except OSError as error:
                self._failures += 1
                self._release(error)
                raise
            self._failures = 0
            self._release(None)

    async def _round(self) -> None:
        dirty = self._dirty
        if dirty.log.empty and not dirty.changed.is_set():
            return
        await dirty.log.rotate()
        dirty.changed.clear()
        dirty.urgent.clear()
        epoch = dirty.log.epoch
        try:
            await self._writeback.commit(dirty.work(epoch))
            await self._writeback.ids.replenish()
            await self._meta.sync()
            await dirty.log.retire(dirty.retired(epoch))
        except BaseException:
            dirty.changed.set()
            dirty.urgent.clear()
            raise
        dirty.deleted(epoch)

    def _release(self, error: OSError | None) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            if error is None:
                room.set_result(None)
            else:
                room.set_exception(error)
                room.exception()  # its waiters may all have been cancelled

    async def _run(self) -> None:
        dirty = self._dirty
        while True:
            await dirty.changed.wait()
            delay = self._flush_after * 2**self._failures if self._failures < 8 else _RETRY_MAX
            try:
                async with asyncio.timeout(min(delay, _RETRY_MAX)):
                    await dirty.urgent.wait()
            except TimeoutError:
                pass
            try:
                await asyncio.shield(self.flush())
            except OSError as error:
                log.error("write-back failed, will be tried again: %s", error)
            except Exception as error:
                log.exception("write-back failed, will be tried again")
                self._failures += 1
                self._release(OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {error}"))
