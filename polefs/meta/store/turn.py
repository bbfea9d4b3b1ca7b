"""What the writes of one turn wait for: the commit that they share.

An asyncio future would resume its waiter in a later turn of the event loop. Here the waiters go on within ``release``,
so that an operation is answered without another trip through the loop.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator
from typing import Any, Self


class Commit:
    """Awaited once, by one coroutine, driven by an asyncio task or anything else that understands asyncio futures."""

    __slots__ = ("_asyncio_future_blocking", "_callback", "_cancelled", "_context", "_done", "_error", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._callback: Callable[[Any], object] | None = None
        self._context: contextvars.Context | None = None
        self._done = False
        self._cancelled = False
        self._error: BaseException | None = None

    def __await__(self) -> Generator[Self, None, None]:
        if not self._done:
            self._asyncio_future_blocking = True
            yield self
        self.result()

    def release(self, error: BaseException | None = None) -> None:
        """Let the waiter go on, now; with ``error`` it raises that. Not to be called while a task is being run."""
        if self._done:
            return
        self._done = True
        self._error = asyncio.CancelledError() if self._cancelled else error
        if self._callback is not None:
            if self._context is None:
                self._callback(self)
            else:
                self._context.run(self._callback, self)

    # What a driver of coroutines asks of a future

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, callback: Callable[[Any], object], *, context: contextvars.Context | None = None
    ) -> None:
        self._callback = callback
        self._context = context

    def result(self) -> None:
        if self._error is not None:
            raise self._error

    def cancel(self, msg: Any = None) -> bool:
        """The waiter stops waiting, whatever comes first now; the commit goes on."""
        if self._done:
            return False
        self._cancelled = True
        self._loop.call_soon(self.release)
        return True
