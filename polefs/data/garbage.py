"""Garbage collection: one pass over all that takes up room in the object store and is of no use.

First half-dead segments are rewritten, then the objects of dead ones are deleted, then objects that no metadata knows.
Each step is safe by itself, beside readers and writers and against a crash at any point, so a pass may end anywhere.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Sequence
from typing import Final

from polefs.data.compact import Compactor
from polefs.data.lost import LostObjects
from polefs.data.reclaim import Reclaimer
from polefs.data.report import GarbageReport, Phase
from polefs.data.segments import SegmentIds
from polefs.meta.api import MetaAPI
from polefs.objects.base import ObjectStore, StoreError

log = logging.getLogger(__name__)

_RATE: Final = 32 << 20
"""Bytes a second that are rewritten in the background, at most."""


class GarbageCollector:
    """One pass at a time. ``interval``: seconds between those in the background; 0: none."""

    def __init__(
        self,
        meta: MetaAPI,
        objects: ObjectStore,
        reclaimer: Reclaimer,
        compactor: Compactor,
        lost: LostObjects,
        ids: SegmentIds,
        interval: float,
    ) -> None:
        self._meta = meta
        self._objects = objects
        self._reclaimer = reclaimer
        self._compactor = compactor
        self._lost = lost
        self._ids = ids
        self._interval = interval
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._passes: set[asyncio.Task[GarbageReport]] = set()
        self.phase: Phase | None = None
        """Of the pass that is under way."""

    def start(self) -> None:
        if self._interval:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="garbage collector")

    async def stop(self) -> None:
        """Give up the pass that is under way; none begins any more."""
        tasks: set[asyncio.Task[GarbageReport] | asyncio.Task[None]] = {*self._passes}
        if self._task is not None:
            tasks.add(self._task)
            self._task = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def collect(self, *, grace: float | None = None, dry_run: bool = False) -> GarbageReport:
        """``grace``: seconds that dead and unknown objects are kept, by default the volume's. OSError when the object
        store or the metadata fail; ECANCELED when the volume is unmounted meanwhile."""
        if self._objects.away_since is not None:
            raise StoreError(errno.ETIMEDOUT, "the object store is out of reach now: try again when it is back")
        task = asyncio.get_running_loop().create_task(
            self._collect(self._reclaimer.grace if grace is None else grace, dry_run, rate=None)
        )
        self._passes.add(task)
        task.add_done_callback(self._passes.discard)
        await asyncio.wait([task])
        if task.cancelled():
            raise OSError(errno.ECANCELED, "garbage collection has been given up: the volume is being unmounted")
        return task.result()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            if self._objects.away_since is not None:
                continue
            try:
                report = await self._collect(self._reclaimer.grace, dry_run=False, rate=_RATE)
            except OSError as error:
                log.warning("garbage collection goes on in %.0f s: %s", self._interval, error.strerror or error)
            except Exception:
                log.exception("garbage collection failed")
            else:
                if report.rewritten_segments or report.dead_objects or report.lost_objects or report.uploads:
                    log.info(
                        "garbage collection: %d objects rewritten, %d dead and %d lost ones deleted, %d uploads ended",
                        report.rewritten_segments,
                        report.dead_objects,
                        report.lost_objects,
                        report.uploads,
                    )

    async def _collect(self, grace: float, dry_run: bool, rate: int | None) -> GarbageReport:
        async with self._lock:
            report = GarbageReport(dry_run)
            try:
                if not dry_run:
                    await self._ids.discard_doubtful()
                await self._rewrite(report, rate)
                await self._delete_dead(report, grace)
                await self._delete_lost(report, grace)
            finally:
                self.phase = None
            return report

    async def _rewrite(self, report: GarbageReport, rate: int | None) -> None:
        self.phase = Phase("looking for half-dead segments")
        plan = await self._compactor.plan()
        report.rewritten_segments, report.moved_bytes = plan.segments, plan.live
        if report.dry_run or not plan.segments:
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        moved = 0

        async def done(size: int) -> None:
            nonlocal moved
            moved += size
            self.phase = Phase("rewriting", min(moved, plan.live), plan.live)
            if rate is not None:
                await asyncio.sleep(max(0.0, moved / rate - (loop.time() - began)))

        self.phase = Phase("rewriting", 0, plan.live)
        tally = await self._compactor.run(done)
        report.rewritten_segments, report.moved_bytes = tally.segments, moved
        report.damaged_segments = self._compactor.damaged

    async def _delete_dead(self, report: GarbageReport, grace: float) -> None:
        self.phase = Phase("deleting dead objects")

        async def count(numbers: Sequence[int]) -> None:
            for segment in await self._meta.segments(numbers):
                report.dead_objects += 1
                report.dead_bytes += sum(stored for _, stored, _ in segment.frames)
            self.phase = Phase("deleting dead objects", report.dead_objects)

        if report.dry_run:
            async for page in self._reclaimer.dead(grace):
                await count(page)
        else:
            await self._reclaimer.reclaim(grace, count)
        async for page in self._reclaimer.dead(0):
            report.waiting_objects += len(page)
        if report.dry_run:
            report.waiting_objects -= report.dead_objects

    async def _delete_lost(self, report: GarbageReport, grace: float) -> None:
        looked_at = 0

        def seen(count: int) -> None:
            nonlocal looked_at
            looked_at += count
            self.phase = Phase("looking for lost objects", looked_at)

        seen(0)
        tally = await self._lost.collect(grace, delete=not report.dry_run, seen=seen)
        report.lost_objects, report.lost_bytes, report.uploads = tally.objects, tally.bytes, tally.uploads
