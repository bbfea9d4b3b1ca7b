"""When write-back happens: after a few seconds, at once under pressure, and for single files on demand."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

from polefs.data.dirty import DirtyFiles
from polefs.data.writeback import WriteBack
from polefs.meta.api import MetaAPI

T = TypeVar("T")

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
        self._working: set[asyncio.Task[Any]] = set()

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
        """Write back these files now. Their journal records stay until the next round. A caller that is cancelled does
        not stop it."""
        await self.exclusively(self.commit_files(inos))

    async def exclusively(self, work: Coroutine[None, None, T]) -> T:
        """Run ``work`` to its end while no write-back is going on. A caller that is cancelled does not stop it."""
        return await self._uncancelled(self._locked(work))

    async def commit_files(self, inos: tuple[int, ...]) -> None:
        """As ``flush_files``, within ``exclusively``."""
        works = [work for ino in {*inos} if (work := self._dirty.seal(ino)) is not None]
        if works:
            await self._writeback.commit(works)

    async def flush(self) -> None:
        """Write back everything that is dirty now and delete the journals that tell of it. Raises the first failure. A
        caller that is cancelled does not stop it."""
        await self._uncancelled(self._flush())

    async def _uncancelled(self, work: Coroutine[None, None, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        self._working.add(task)
        task.add_done_callback(self._worked)
        return await asyncio.shield(task)

    def _worked(self, task: asyncio.Task[Any]) -> None:
        self._working.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked for it may be gone

    async def _locked(self, work: Coroutine[None, None, T]) -> T:
        async with self._lock:
            return await work

    async def _flush(self) -> None:
        async with self._lock:
            try:
                await self._round()
            except Exception as error:
                self._failures += 1
                if isinstance(error, OSError):
                    log.error("write-back failed: %s", error)
                    self._release(error)
                else:
                    log.exception("write-back failed")
                    self._release(OSError(errno.EIO, os.strerror(errno.EIO)))
                raise
            self._failures = 0
            self._release(None)

    async def _round(self) -> None:
        dirty = self._dirty
        if dirty.log.empty and not dirty.changed.is_set():
            return
        dirty.urgent.clear()
        await dirty.log.rotate()
        dirty.changed.clear()
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
                await self.flush()
            except Exception:
                continue  # it stands in the log, and is tried again after a while
