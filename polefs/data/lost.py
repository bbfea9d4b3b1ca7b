"""Objects that no metadata knows: of write-backs that were interrupted, or came late. And uploads that nobody ends."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

import msgspec

from polefs.data.segments import SegmentIds
from polefs.meta.api import MetaAPI
from polefs.objects.base import SEGMENTS, ObjectInfo, ObjectStore, StoreError, segment_of

log = logging.getLogger(__name__)

_PAGE: Final = 1000


class LostTally(msgspec.Struct):
    objects: int = 0
    bytes: int = 0
    uploads: int = 0


class LostObjects:
    """Only what cannot be committed any more is taken for lost: this mount knows what it has under way itself, the meta
    service what others have."""

    def __init__(self, meta: MetaAPI, objects: ObjectStore, ids: SegmentIds) -> None:
        self._meta = meta
        self._objects = objects
        self._ids = ids

    async def collect(self, grace: float, *, delete: bool, seen: Callable[[int], None]) -> LostTally:
        """Delete, or only count, what was written or begun ``grace`` seconds ago or earlier by the clock of the store.
        ``seen`` is called with numbers of objects that have been looked at. Memory is needed for a page of objects."""
        tally = LostTally()
        try:
            await self._meta.lost_segments([])
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # Others use the volume too, and nobody knows what they are about to commit.
            return tally
        async for page in _pages(self._objects.list(SEGMENTS)):
            lost = await self._lost(page, grace)
            if lost and delete:
                await self._objects.delete([info.key for info in lost])
            tally.objects += len(lost)
            tally.bytes += sum(info.size for info in lost)
            seen(len(page))
        try:
            tally.uploads = await self._end_uploads(grace, delete=delete)
        except StoreError as error:
            if error.transient:
                raise
            log.warning("uploads that were not completed are not looked for: %s", error.strerror)
        return tally

    async def _lost(self, page: list[ObjectInfo], grace: float) -> list[ObjectInfo]:
        # In this order: what is settled by now is committed, or never will be.
        floor = await self._ids.floor()
        old = {id_: info for info in page if info.age >= grace and 0 <= (id_ := segment_of(info.key)) < floor}
        return [old[id_] for id_ in await self._meta.lost_segments(list(old))] if old else []

    async def _end_uploads(self, grace: float, *, delete: bool) -> int:
        floor = await self._ids.floor()
        count = 0
        async for upload in self._objects.uploads(SEGMENTS):
            if upload.age >= grace and 0 <= segment_of(upload.key) < floor:
                count += 1
                if delete:
                    await self._objects.abort(upload)
        return count


async def _pages(found: AsyncIterator[ObjectInfo]) -> AsyncIterator[list[ObjectInfo]]:
    page: list[ObjectInfo] = []
    async for info in found:
        page.append(info)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page
