"""Deleting the objects of dead segments."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from polefs.meta.api import MetaAPI
from polefs.objects.base import ObjectStore, segment_key

log = logging.getLogger(__name__)

_BATCH: Final = 256

_SECOND: Final = 10**9


class Reclaimer:
    """Deletes the objects of segments that have been dead for ``grace`` seconds: without a grace time in the
    background, whenever ``soon`` was called; otherwise when it is told to, and once at the start."""

    def __init__(self, meta: MetaAPI, objects: ObjectStore, grace: float = 0.0) -> None:
        self.grace = grace
        self._meta = meta
        self._objects = objects
        self._wanted = asyncio.Event()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="reclaimer")
        self._wanted.set()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    def soon(self) -> None:
        if not self.grace:
            self._wanted.set()

    async def reclaim(
        self, grace: float | None = None, gone: Callable[[Sequence[int]], Awaitable[None]] | None = None
    ) -> None:
        """Delete now what has been dead for that time, by default the volume's own. ``gone`` is called with the numbers
        of segments whose objects have been deleted, while the metadata still have their rows."""
        due = self.grace if grace is None else grace
        async with self._lock:
            while dead := await self._meta.dead_segments(int(due * _SECOND), 0, _BATCH):
                # The death must survive a loss of power before the object goes.
                await self._meta.sync()
                await self._objects.delete([segment_key(segment) for segment in dead])
                if gone is not None:
                    await gone(dead)
                await self._meta.forget_segments(dead)

    async def dead(self, grace: float) -> AsyncIterator[list[int]]:
        """What ``reclaim`` would delete, in pages."""
        after = 0
        while page := await self._meta.dead_segments(int(grace * _SECOND), after, _BATCH):
            yield page
            after = page[-1]

    async def reclaim_if_possible(self) -> None:
        """As ``reclaim``, where there is no grace time; what cannot be deleted now is left for later, and that is no
        failure."""
        if self.grace:
            return
        await self._try()

    async def _try(self) -> None:
        try:
            await self.reclaim()
        except OSError as error:
            log.error("deleting dead segments failed: %s", error)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._try()
            except Exception:
                log.exception("deleting dead segments failed")
