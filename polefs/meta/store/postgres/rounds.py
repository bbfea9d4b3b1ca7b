"""Rounds of queries: what the bodies of this moment lack is fetched for all of them at once, while the bodies that come
meanwhile collect what the next round fetches."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from polefs.meta.store.postgres.layers import Answers, Known, Want
from polefs.meta.store.postgres.queries import Fetch, Kind, questions


class Rounds:
    def __init__(self, known: Known, fetch: Fetch) -> None:
        self._known = known
        self._fetch = fetch
        self._wants: set[Want] = set()
        self._waiters: list[asyncio.Future[Answers]] = []
        self._task: asyncio.Task[None] | None = None
        self.started = 0
        """Serial of the last round that has begun."""
        self.over = 0
        """Serial of the last round whose answers count no more."""

    async def ask(self, wants: Collection[Want]) -> Answers:
        """The answers to these and others. ``OSError`` when the database does not give them."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answers] = loop.create_future()
        self._waiters.append(future)
        self._wants.update(want for want in wants if not self._is_cached(want))
        if self._task is None:
            self._task = loop.create_task(self._run())
        return await future

    def _is_cached(self, want: Want) -> bool:
        caches = self._known.caches
        if want[0] == Kind.INODE:
            return caches.inode(want[1]) is not None
        if want[0] == Kind.NAME:
            entry = caches.names.get(want[1:])
            return entry is not None and (not entry[0] or caches.inode(entry[0]) is not None)
        return False

    def reset(self) -> None:
        """What was read so far counts no more."""
        self.over = self.started

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiters:
            wants, self._wants = self._wants, set()
            waiters, self._waiters = self._waiters, []
            self.started += 1
            answers = Answers(self.started)
            error: BaseException | None = None
            try:
                await asyncio.gather(*questions(wants, answers, self._fetch))
            except OSError as failure:
                error = failure
            except BaseException:
                for waiter in waiters:
                    waiter.cancel()
                raise
            if error is None and answers.serial > self.over:
                self._known.learn(answers)
            for waiter in waiters:
                if waiter.done():
                    continue
                if error is None:
                    waiter.set_result(answers)
                else:
                    waiter.set_exception(error)
            # After the bodies that have waited, which the loop runs at its next turn.
            loop.call_soon(loop.call_soon, self._end, answers.serial)
        self._task = None

    def _end(self, serial: int) -> None:
        self.over = max(self.over, serial)
        self._known.retire(self.over)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
