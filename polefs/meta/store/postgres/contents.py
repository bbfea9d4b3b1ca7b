"""Extents and segments."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from polefs.meta.model import FILE_SIZE_MAX, Extent, Segment
from polefs.meta.store.postgres.layers import Batch, Miss
from polefs.meta.store.postgres.queries import Kind
from polefs.meta.store.postgres.rows import Rows

_segments = attrgetter("segments")
_lives = attrgetter("lives")


class ContentRows(Rows):
    # Contents

    def _base_extents(self, ino: int, start: int, end: int) -> list[Extent] | None:
        """The database's extents that overlap a range, and others; None when they are not known. None of them are
        left of those that there may be where the inode says that it has none now."""
        inode = self._peek(ino)
        if inode is not None and (not inode.allocated or inode.inline is not None):
            return []
        for first, last, extents in self._answers.extents.get(ino, ()):
            if first <= start and end <= last:
                return extents
        return None

    def _merged_extents(self, ino: int, start: int, end: int) -> list[Extent]:
        """All extents that overlap a range, and others, in no particular order."""
        base = self._base_extents(ino, start, end)
        if base is None:
            raise Miss((Kind.EXTENTS, ino, start, end))
        changed: dict[int, Extent | None] = {}
        for layer in (*reversed(self._known.layers), self._own):
            rows = layer.extents.get(ino)
            if rows:
                changed.update(rows)
                if isinstance(layer, Batch) and not layer.committed:
                    self._saw(layer)
        if not changed:
            return base
        merged = [extent for extent in base if extent.offset not in changed]
        merged += [extent for extent in changed.values() if extent is not None]
        return merged

    async def extents(self, ino: int, start: int, end: int) -> list[Extent]:
        found = [each for each in self._merged_extents(ino, start, end) if each.offset < end and each.end > start]
        found.sort(key=lambda extent: extent.offset)
        return found

    async def put_extents(self, ino: int, extents: Sequence[Extent]) -> None:
        self.rows += len(extents)
        rows = self._own.extents.setdefault(ino, {})
        for extent in extents:
            rows[extent.offset] = extent

    async def delete_extents(self, ino: int, start: int, end: int) -> list[tuple[int, int]]:
        sums: dict[int, int] = {}
        doomed = [each for each in self._merged_extents(ino, start, end) if start <= each.offset < end]
        rows = self._own.extents.setdefault(ino, {})
        for extent in doomed:
            sums[extent.segment] = sums.get(extent.segment, 0) + extent.length
            rows[extent.offset] = None
        self.rows += len(doomed)
        return list(sums.items())

    async def extent_boundary(self, ino: int, count: int) -> int:
        boundary: int = self._answer(Kind.HEAD, ino, count)
        # Where layers have removed some of the first, more of the others may go too.
        offsets = sorted(each.offset for each in self._merged_extents(ino, 0, boundary) if each.offset < boundary)
        return offsets[count] if len(offsets) > count else boundary

    async def segment(self, segment: int) -> Segment | None:
        found: Segment | None
        if segment in self._own.segments:
            return self._own.segments[segment]
        there, found, batch = self._known.find(_segments, segment)
        if there:
            self._saw(batch)
            return found
        found = self._answer(Kind.SEGMENT, segment)
        return found

    def _live(self, segment: int) -> tuple[bool, int | None]:
        """Whether a segment's live bytes are known, and how many they are."""
        if segment in self._own.lives:
            return True, self._own.lives[segment]
        there, live, batch = self._known.find(_lives, segment)
        if there:
            self._saw(batch)
            return True, live
        cached = self._caches.lives.get(segment)
        if cached is not None:
            return True, cached
        return segment in self._answers.lives, self._answers.lives.get(segment)

    async def live_bytes(self, segment: int) -> int | None:
        known, live = self._live(segment)
        if not known:
            raise Miss((Kind.LIVE, segment))
        return live

    async def add_segments(self, segments: Sequence[tuple[Segment, int]]) -> None:
        self.rows += len(segments)
        for segment, live in segments:
            self._own.segments[segment.id] = segment
            self._own.lives[segment.id] = live

    async def add_live(self, segment: int, delta: int) -> int | None:
        live = await self.live_bytes(segment)
        if live is not None:
            self.rows += 1
            live = self._own.lives[segment] = live + delta
        return live

    async def queue_deletion(self, segment: int, since: int) -> None:
        self.rows += 1
        self._own.deletions[segment] = since

    async def dead_segments(self, before: int, after: int, limit: int) -> list[int]:
        changed: dict[int, int | None] = {}
        for layer in self._layers("deletions"):
            changed.update(layer.deletions)
        there = [each for each, when in changed.items() if when is not None and when <= before and each > after]
        while True:
            rows: list[int] = self._answer(Kind.DEAD, before, after, limit)
            full = len(rows) == limit
            end = rows[-1] if full else FILE_SIZE_MAX
            page = [each for each in rows if each not in changed] + [each for each in there if each <= end]
            if page or not full:
                return sorted(page)[:limit]
            limit *= 2

    async def segment_usage(self, after: int, limit: int) -> list[tuple[int, int, int]]:
        changed: dict[int, Segment | None] = {}
        for layer in reversed(self._known.layers):
            changed.update(layer.segments)
        while True:
            rows: list[tuple[int, int, int]] = self._answer(Kind.SEGMENT_USAGE, after, limit)
            full = len(rows) == limit
            end = rows[-1][0] if full else FILE_SIZE_MAX
            sizes = {id_: size for id_, size, _ in rows}
            lives = {id_: live for id_, _, live in rows}
            sizes.update((id_, new.size) for id_, new in changed.items() if new is not None and after < id_ <= end)
            for layer in reversed(self._known.layers):
                lives.update((id_, live) for id_, live in layer.lives.items() if live is not None)
                if layer.lives and not layer.committed:
                    self._saw(layer)
            page = [(id_, sizes[id_], lives[id_]) for id_ in sorted(sizes) if changed.get(id_, ...) is not None]
            if page or not full:
                return page[:limit]
            limit *= 2

    async def segment_extents(self, segment: int, limit: int) -> list[tuple[int, Extent]]:
        changed: dict[tuple[int, int], Extent | None] = {}
        for layer in reversed(self._known.layers):
            for ino, rows in layer.extents.items():
                changed.update(((ino, offset), extent) for offset, extent in rows.items())
            if layer.extents and not layer.committed:
                self._saw(layer)
        while True:
            found: list[tuple[int, Extent]] = self._answer(Kind.SEGMENT_EXTENTS, segment, limit)
            page = [(ino, each) for ino, each in found if (ino, each.offset) not in changed]
            page += [(ino, each) for (ino, _), each in changed.items() if each is not None and each.segment == segment]
            if page or len(found) < limit:
                return page[:limit]
            limit *= 2

    async def delete_segments(self, ids: Sequence[int]) -> None:
        self.rows += 2 * len(ids)
        for id_ in ids:
            self._own.segments[id_] = None
            self._own.lives[id_] = None
            self._own.deletions[id_] = None
