"""Slowing writers down to the speed of write-back, little by little."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Final

RATE_MIN: Final = 4 << 20
"""Bytes a second at which each writer may go on, whatever write-back does, until there is no room at all."""


class _Turn:
    __slots__ = ("done", "left")

    def __init__(self, share: float) -> None:
        self.left = share
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Throttle:
    """Whoever wants to write waits for its share of what is written back meanwhile, one after another."""

    def __init__(self) -> None:
        self._waiting: deque[_Turn] = deque()

    async def wait(self, size: int, pressure: float) -> None:
        """Before a write of ``size`` bytes; ``pressure`` is 0 where nobody has to wait, and 1 where there is no room.
        Half-way, where as much may come as goes, is where steady writers end up."""
        turn = _Turn(2 * pressure * size)
        self._waiting.append(turn)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(size / RATE_MIN):
                    await turn.done
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def progress(self, size: int) -> None:
        """So many bytes have been written back."""
        left = float(size)
        while left > 0 and self._waiting:
            turn = self._waiting[0]
            taken = min(left, turn.left)
            turn.left -= taken
            left -= taken
            if turn.left > 0:
                return
            self._waiting.popleft()
            if not turn.done.done():
                turn.done.set_result(None)
