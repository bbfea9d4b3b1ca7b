"""The memory that one mount may use for contents on their way: what is being uploaded, fetched, and read ahead.

Everything that holds such bytes takes them from here first and waits, in turn, when there are none left; so the memory
of a mount is bounded whatever programs do and however slow the object store is. A *share* is a budget within a budget:
it bounds one use, so that slow uploads never keep readers waiting for memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MemoryBudget:
    """``limit`` bytes, handed out in the order of asking. Used from one event loop."""

    def __init__(self, limit: int, whole: MemoryBudget | None = None) -> None:
        """``whole``: the budget that this one is a share of; see ``share``."""
        self.limit = limit
        self.used = 0
        """Bytes that are taken now."""
        self._whole = whole
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def share(self, limit: int) -> MemoryBudget:
        """A part: what is taken from it is taken from this budget too, and at most ``limit`` bytes at a time."""
        return MemoryBudget(min(limit, self.limit), self)

    async def take(self, size: int) -> int:
        """Wait for ``size`` bytes; returns how many were taken, to be given back with ``give``: all of the budget when
        ``size`` is more than that. Who holds some must not wait for more."""
        size = min(size, self.limit)
        if self._waiting or self.used + size > self.limit:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                self._return(0 if turn.cancelled() else size)
                raise
        else:
            self.used += size
        if self._whole is not None:
            try:
                await self._whole.take(size)
            except BaseException:
                self._return(size)
                raise
        return size

    def take_now(self, size: int) -> bool:
        """Take ``size`` bytes when they are there and nobody waits for them; else False, and nothing is taken."""
        if self._waiting or self.used + size > self.limit:
            return False
        if self._whole is not None and not self._whole.take_now(size):
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        """Give back what was taken."""
        if self._whole is not None:
            self._whole.give(size)
        self._return(size)

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """``take`` for the time of the block."""
        taken = await self.take(size)
        try:
            yield
        finally:
            self.give(taken)

    def _return(self, size: int) -> None:
        self.used -= size
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                if self.used + size > self.limit:
                    break
                self.used += size
                turn.set_result(None)
            self._waiting.popleft()
