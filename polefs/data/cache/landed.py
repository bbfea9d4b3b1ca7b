"""Long ranges that have come from the store and are not read to their end yet.

They are written to the cache past the page cache, so until their readers have got them they are kept in memory. That is
taken from the budget already; it is given back when all of a range has been read, or when newer ones push it out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from polefs.data.budget import MemoryBudget
from polefs.data.cache.gather import cut
from polefs.data.frames import Buffer

_LIMIT: Final = 32 << 20
"""Kept at a time, bytes."""


class LandedRange:
    """``[start, end)`` of a file as of ``generation``; ``unread``: bytes that nobody has got yet."""

    __slots__ = ("end", "generation", "home", "parts", "start", "unread")

    def __init__(self, start: int, end: int, generation: int, unread: int, parts: Sequence[Buffer]) -> None:
        self.start = start
        self.end = end
        self.generation = generation
        self.unread = unread
        self.parts = parts
        self.home: list[LandedRange] = []


class Landed:
    """Those of all files, each of which has its own in a list, and the memory for them."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._all: OrderedDict[LandedRange, None] = OrderedDict()
        """Oldest first."""
        self._size = 0

    def keep(self, home: list[LandedRange], landed: LandedRange) -> None:
        """Its length has been taken from the budget."""
        landed.home = home
        home.append(landed)
        self._all[landed] = None
        self._size += landed.end - landed.start
        while self._size > _LIMIT:
            self.drop_oldest()

    def read(self, home: list[LandedRange], generation: int, start: int, end: int) -> list[Buffer] | None:
        """The bytes, when one range of the file has them."""
        for landed in home:
            if landed.start <= start and end <= landed.end and landed.generation == generation:
                landed.unread -= end - start
                parts = cut(landed.parts, landed.start, start, end)
                if landed.unread <= 0:
                    self._drop(landed)
                return parts
        return None

    def drop_oldest(self) -> bool:
        """False when there is none."""
        if not self._all:
            return False
        self._drop(next(iter(self._all)))
        return True

    def _drop(self, landed: LandedRange) -> None:
        del self._all[landed]
        landed.home.remove(landed)
        self._size -= landed.end - landed.start
        self._budget.give(landed.end - landed.start)
