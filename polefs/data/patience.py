"""How long anybody waits for an object store that is out of reach."""

from __future__ import annotations

import asyncio
import errno
import math
from typing import Final, TypeVar

from polefs.objects.base import ObjectStore

T = TypeVar("T")

FOREVER: Final = math.inf


class Patience:
    """``seconds`` of an outage. A store that is only slow is waited for however long it takes."""

    def __init__(self, objects: ObjectStore, seconds: float) -> None:
        self._objects = objects
        self.seconds = seconds

    async def wait(self, work: asyncio.Future[T]) -> T:
        """What ``work`` brings, which goes on whatever becomes of its waiters. ETIMEDOUT when the store has been out of
        reach for all the time of this patience, and somebody has waited here for as long."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not work.done():
            left = self.seconds
            since = self._objects.away_since
            if since is not None:
                left -= loop.time() - max(since, began)
                if left <= 0:
                    text = f"the object store has been out of reach for {self.seconds:.0f} s"
                    raise TimeoutError(errno.ETIMEDOUT, text)
            # An outage that begins meanwhile is not over sooner than this.
            await asyncio.wait({work}, timeout=None if left == FOREVER else left)
        return work.result()
