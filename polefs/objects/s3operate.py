"""One operation on an S3 server: attempts with growing, random pauses between them, until it works or its deadline."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from polefs.objects.s3errors import StoreError, explain, is_transient

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE: Final = 60.0
"""Of an operation, seconds; transfers have a second more for each 64 KiB."""

_ATTEMPT_SECONDS: Final = 20.0
"""Of one attempt, with the same addition: a connection that trickles is given up for another."""

_RATE_MIN: Final = 64 << 10
"""Bytes a second; what is slower than this is given up."""

_PAUSE_MAX: Final = 5.0
"""Between two attempts, seconds."""

_TROUBLE_SECONDS: Final = 3.0
"""Of failing, after which the log tells of it."""


class Operator:
    """Runs the operations of one store. ``deadline`` may be changed at any time; it counts for those that begin
    later."""

    def __init__(self, name: str, deadline: float) -> None:
        """``name``: of the store, for the log."""
        self.deadline = deadline
        self._name = name
        self._troubled = False
        self._retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=0.1, max=_PAUSE_MAX),
            before_sleep=self._note_trouble,
            reraise=True,
        )

    async def run(self, attempt: Callable[[], Awaitable[T]], url: str, size: int = 0) -> T:
        """What ``attempt`` returns. Failures that waiting cannot mend are raised at once, all others when the deadline
        has passed, with the last reason; as ``explain`` has them. ``url`` is what it works on, ``size`` what it
        transfers, bytes."""
        extra = size / _RATE_MIN
        patience = self.deadline + extra
        last: OSError | None = None

        async def explained() -> T:
            nonlocal last
            try:
                async with asyncio.timeout(_ATTEMPT_SECONDS + extra):
                    return await attempt()
            except Exception as error:
                last = explain(error, url)
                raise last from error

        try:
            async with asyncio.timeout(patience):
                result = await self._persist(explained)
        except TimeoutError:
            text = f"{url}: no answer in {patience:.0f} s: check the network and --endpoint"
            raise last or StoreError(errno.ETIMEDOUT, text, transient=True) from None
        if self._troubled:
            self._troubled = False
            log.warning("%s serves again", self._name)
        return result

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        try:
            return await attempt()
        except StoreError as error:
            if not error.transient:
                raise
        # Once more without a pause, as after a connection that the server had closed; then with growing ones.
        result: T = await self._retrying(attempt)
        return result

    def _note_trouble(self, state: RetryCallState) -> None:
        """Tell of what does not pass at once, when it begins and when it ends."""
        if state.outcome is None or self._troubled:
            return
        lasting = (state.seconds_since_start or 0) >= _TROUBLE_SECONDS
        self._troubled = lasting
        level = logging.WARNING if lasting else logging.DEBUG
        log.log(level, "%s; trying again", getattr(state.outcome.exception(), "strerror", None))
