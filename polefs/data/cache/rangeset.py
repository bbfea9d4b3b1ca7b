"""A set of bytes as sorted ranges that neither overlap nor touch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""``(start, end)``, the end not included."""


class RangeSet:
    """Starts and ends alternate in one sorted list, so a position lies inside where an odd number of them is at or
    before it."""

    __slots__ = ("_bounds",)

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._bounds: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __len__(self) -> int:
        """The number of ranges."""
        return len(self._bounds) // 2

    def __iter__(self) -> Iterator[Range]:
        bounds = self._bounds
        return zip(bounds[::2], bounds[1::2], strict=True)

    @property
    def total(self) -> int:
        return sum(end - start for start, end in self)

    def add(self, start: int, end: int) -> None:
        if start < end:
            first, last = bisect_left(self._bounds, start), bisect_right(self._bounds, end)
            self._bounds[first:last] = [start] * (first % 2 == 0) + [end] * (last % 2 == 0)

    def remove(self, start: int, end: int) -> None:
        if start < end:
            first, last = bisect_left(self._bounds, start), bisect_right(self._bounds, end)
            self._bounds[first:last] = [start] * (first % 2) + [end] * (last % 2)

    def clear(self) -> None:
        self._bounds.clear()

    def covers(self, start: int, end: int) -> bool:
        """Whether all of the range, which is not empty, is in the set."""
        index = bisect_right(self._bounds, start)
        return index % 2 == 1 and end <= self._bounds[index]

    def gaps(self, start: int, end: int) -> list[Range]:
        """What of the range is not in the set."""
        bounds = self._bounds
        index = bisect_right(bounds, start)
        found: list[Range] = []
        position = start
        if index % 2:
            position = bounds[index]
            index += 1
        while position < end:
            if index == len(bounds):
                found.append((position, end))
                break
            found.append((position, min(bounds[index], end)))
            position = bounds[index + 1]
            index += 2
        return found

    def within(self, start: int, end: int) -> list[Range]:
        """What of the range is in the set."""
        bounds = self._bounds
        found: list[Range] = []
        for index in range(max((bisect_right(bounds, start) - 1) & ~1, 0), len(bounds), 2):
            if bounds[index] >= end:
                break
            if bounds[index + 1] > start:
                found.append((max(bounds[index], start), min(bounds[index + 1], end)))
        return found
