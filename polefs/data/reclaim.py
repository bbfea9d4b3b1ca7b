"""Deleting the objects of dead segments in the background."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from polefs.meta.api import MetaAPI
from polefs.objects.base import ObjectStore, segment_key

log = logging.getLogger(__name__)

_BATCH: Final = 256


class Reclaimer:
    """Deletes what no metadata refers to, whenever ``soon`` was called."""

    def __init__(self, meta: MetaAPI, objects: ObjectStore) -> None:
        self._meta = meta
        self._objects = objects
        self._wanted = asyncio.Event()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="reclaimer")
        self.soon()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    def soon(self) -> None:
        self._wanted.set()

    async def reclaim(self) -> None:
        """Delete the objects of all dead segments now."""
        async with self._lock:
            while dead := await self._meta.dead_segments(0, 0, _BATCH):
                # The death must survive a loss of power before the object goes.
                await self._meta.sync()
                await self._objects.delete([segment_key(segment) for segment in dead])
                await self._meta.forget_segments(dead)

    async def reclaim_if_possible(self) -> None:
        """As ``reclaim``; what cannot be deleted now is left for later, and that is no failure."""
        try:
            await self.reclaim()
        except OSError as error:
            log.error("deleting dead segments failed: %s", error)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self.reclaim_if_possible()
            except Exception:
                log.exception("deleting dead segments failed")
