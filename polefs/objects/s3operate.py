"""One operation on an S3 server: attempts with growing, random pauses between them, until it works or its deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from polefs.objects.base import is_transient
from polefs.objects.s3errors import explain

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE: Final = 60.0
"""Of an operation, seconds, unless another is given."""

_ATTEMPT_SECONDS: Final = 20.0
"""Of one attempt, and a second more for each 64 KiB that it transfers: a connection that trickles is given up for
another."""

_ATTEMPT_MIN = 5.0
"""What it may at least take, whatever the deadline: a server that is busy is not taken for dead."""

_RATE_MIN: Final = 64 << 10
"""Bytes a second; what is slower than this is given up."""

_PAUSE_MAX: Final = 5.0
"""Between two attempts, seconds."""

_TROUBLE_SECONDS: Final = 3.0
"""Of failing, after which the log tells of it."""


class Operator:
    """Runs the operations of one store."""

    def __init__(self, name: str, deadline: float) -> None:
        """``name``: of the store, for the log."""
        self._name = name
        self.deadline = deadline
        self._hurry = asyncio.Event()
        """Set when the deadline comes nearer: who pauses makes one more attempt."""
        self._troubled = False
        self.away_since: float | None = None
        """When the first of the attempts began that have failed since the last one that reached the server, in the
        time of the event loop."""
        self._reached = 0.0
        self._pauses = wait_random_exponential(multiplier=0.1, max=_PAUSE_MAX)
        self._retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=self._pause_after,
            stop=self._is_over,
            sleep=self._sleep,
            before_sleep=self._note_trouble,
            reraise=True,
        )

    @property
    def deadline(self) -> float:
        """Seconds after which an operation makes no further attempt."""
        return self._deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self._deadline = seconds
        self._attempt = min(_ATTEMPT_SECONDS, max(seconds, _ATTEMPT_MIN))

    def hurry(self, seconds: float) -> None:
        """From now on this is the deadline, also of operations that are under way: each makes one more attempt if it is
        over."""
        self._deadline = seconds
        self._hurry.set()
        self._hurry = asyncio.Event()

    async def run(self, attempt: Callable[[], Awaitable[T]], url: str, size: int = 0) -> T:
        """What ``attempt`` returns. Failures that waiting cannot mend are raised at once, all others when the deadline
        has passed, as ``explain`` has them; the attempt that is under way then may still come to its end. ``url`` is
        what it works on, ``size`` what it transfers, bytes."""

        async def explained() -> T:
            loop = asyncio.get_running_loop()
            began = loop.time()
            try:
                async with asyncio.timeout(self._attempt + size / _RATE_MIN):
                    result = await attempt()
            except Exception as error:
                known = explain(error, url)
                if not is_transient(known):
                    self._reach()
                elif self.away_since is None:
                    self.away_since = max(began, self._reached)
                raise known from error
            self._reach()
            return result

        result: T = await self._retrying(explained)
        if self._troubled:
            self._troubled = False
            log.warning("%s serves again", self._name)
        return result

    def _reach(self) -> None:
        self.away_since = None
        self._reached = asyncio.get_running_loop().time()

    def _pause_after(self, state: RetryCallState) -> float:
        """At first none, as after a connection that the server had closed."""
        if state.attempt_number == 1:
            return 0.0
        return max(0.0, min(self._pauses(state), self._deadline - (state.seconds_since_start or 0.0)))

    def _is_over(self, state: RetryCallState) -> bool:
        return (state.seconds_since_start or 0.0) >= self._deadline

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    def _note_trouble(self, state: RetryCallState) -> None:
        """Tell of what does not pass at once, when it begins and when it ends."""
        if state.outcome is None or self._troubled:
            return
        lasting = (state.seconds_since_start or 0) >= _TROUBLE_SECONDS
        self._troubled = lasting
        level = logging.WARNING if lasting else logging.DEBUG
        log.log(level, "%s; trying again", getattr(state.outcome.exception(), "strerror", None))
