"""Extents of committed contents, kept in memory by windows of the file."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from typing import Final

from polefs.meta.api import MetaAPI
from polefs.meta.model import Extent

WINDOW: Final = 64 << 20
"""Extents are fetched and kept for this much of a file at a time, bytes."""


class ExtentCache:
    """A bounded number of extents, of the files used last. ``invalidate`` what a commit, a clone or a removal
    changes."""

    def __init__(self, meta: MetaAPI, limit: int = 200_000) -> None:
        self._meta = meta
        self._limit = limit
        self._files: OrderedDict[int, dict[int, tuple[list[int], list[Extent]]]] = OrderedDict()
        self._count = 0
        self._changes = 0

    def invalidate(self, ino: int) -> None:
        self._changes += 1
        windows = self._files.pop(ino, None)
        if windows is not None:
            self._count -= _weight(windows)

    def get_now(self, ino: int, start: int, end: int) -> list[Extent] | None:
        """The extents that overlap the range, whole, in order, or None when they are not known."""
        windows = self._files.get(ino)
        if windows is None:
            return None
        first = start // WINDOW
        if end <= (first + 1) * WINDOW:
            window = windows.get(first)
            return None if window is None else _overlapping(window, start, end)
        found: list[Extent] = []
        for number in range(first, (end - 1) // WINDOW + 1):
            window = windows.get(number)
            if window is None:
                return None
            for extent in _overlapping(window, start, end):
                if not found or extent.offset > found[-1].offset:
                    found.append(extent)
        return found

    async def get(self, ino: int, start: int, end: int) -> list[Extent]:
        """As ``get_now``, from the meta service where need be."""
        found = self.get_now(ino, start, end)
        if found is not None:
            if len(self._files) > 1:
                self._files.move_to_end(ino)
            return found
        first, last = start // WINDOW, (end - 1) // WINDOW
        changes = self._changes
        extents = await self._meta.extents(ino, first * WINDOW, (last + 1) * WINDOW)
        if changes == self._changes:
            self._keep(ino, first, last, extents)
        return [extent for extent in extents if extent.offset < end and extent.end > start]

    def _keep(self, ino: int, first: int, last: int, extents: list[Extent]) -> None:
        windows = self._files.setdefault(ino, {})
        for number in range(first, last + 1):
            start, end = number * WINDOW, (number + 1) * WINDOW
            inside = [extent for extent in extents if extent.offset < end and extent.end > start]
            old = windows.get(number)
            self._count += len(inside) + 1 - (len(old[1]) + 1 if old is not None else 0)
            windows[number] = ([extent.offset for extent in inside], inside)
        self._files.move_to_end(ino)
        while self._count > self._limit and self._files:
            self._count -= _weight(self._files.popitem(last=False)[1])


def _weight(windows: dict[int, tuple[list[int], list[Extent]]]) -> int:
    return sum(len(extents) + 1 for _, extents in windows.values())


def _overlapping(window: tuple[list[int], list[Extent]], start: int, end: int) -> list[Extent]:
    offsets, extents = window
    first = bisect_right(offsets, start) - 1
    if first < 0 or extents[first].end <= start:
        first += 1
    last = first
    while last < len(offsets) and offsets[last] < end:
        last += 1
    return extents[first:last]
