"""The live journals, and making what they tell of survive the loss of power."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Executor

from polefs.data.journal import HEADER_SIZE, Journal
from polefs.data.replica import Replica
from polefs.objects.localio import sync_directory


class JournalLog:
    """The journal that is written now and the older ones that are not deleted yet.

    Syncs are shared: one thread call at a time makes all journals durable, with the replicas of everybody who waits
    for it; who comes while one runs waits for the next."""

    def __init__(self, directory: str, threads: Executor, current: Journal) -> None:
        self._directory = directory
        self._threads = threads
        self.current = current
        self._older: list[Journal] = []
        self._older_size = 0
        self._names = threading.Lock()
        """Held by the thread that makes or removes journals: there is one spare."""
        self._rotating = asyncio.Lock()
        self._running: asyncio.Future[None] | None = None
        self._next: asyncio.Future[None] | None = None
        self._next_replicas: set[Replica] = set()

    @property
    def epoch(self) -> int:
        return self.current.number

    @property
    def place(self) -> tuple[int, int]:
        """Where the next record goes: the journal's number, and the position in it."""
        return self.current.number, self.current.end

    @property
    def size(self) -> int:
        """Bytes of all journals."""
        return self._older_size + self.current.end

    @property
    def empty(self) -> bool:
        """No record in any journal."""
        return not self._older and self.current.end == HEADER_SIZE

    @property
    def failed(self) -> bool:
        """An fdatasync of a journal failed: only write-back makes its contents durable."""
        return self.current.failed or any(journal.failed for journal in self._older)

    async def rotate(self) -> None:
        """Start the next journal. What was appended before the return is in older ones, what comes after in the new
        one."""
        async with self._rotating:
            if self.current.end == HEADER_SIZE:
                return
            loop = asyncio.get_running_loop()
            # After rounds that failed the older ones are still there: not each of them takes room in advance.
            new = await loop.run_in_executor(self._threads, self._make, self.epoch + 1, not self._older)
            self._older.append(self.current)
            self._older_size += self.current.end
            self.current = new

    def _make(self, number: int, preallocate: bool) -> Journal:
        with self._names:
            return Journal(self._directory, number, preallocate=preallocate)

    def adopt(self, journals: Iterable[Journal]) -> None:
        """Take over what another process has left, older than the current one."""
        self._older[:0] = journals
        self._older_size = sum(journal.end for journal in self._older)

    async def retire(self, before: int, replicas: Iterable[str]) -> None:
        """Delete the journals before ``before``, which is at most the current one, and then ``replicas`` (paths), which
        only they refer to. Everything that they tell of must have been committed durably."""
        old = [journal for journal in self._older if journal.number < before]
        await asyncio.get_running_loop().run_in_executor(self._threads, self._retire, old, list(replicas))

    def _retire(self, journals: list[Journal], replicas: list[str]) -> None:
        # Oldest first: what is left when the process dies here is the end of the story, harmless to replay.
        with self._names:
            for journal in journals:
                journal.remove(self._directory, recycle=journal is journals[-1])
                self._older.remove(journal)
                self._older_size -= journal.end
        # A journal that came back after a loss of power might have lost its end, and would look for its replicas.
        sync_directory(self._directory)
        for path in replicas:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass  # by an earlier attempt that failed half-way

    def durable(self, epoch: int, end: int) -> bool:
        """Whether all records up to ``end`` of journal ``epoch`` survive the loss of power."""
        for journal in (*self._older, self.current):
            if journal.number <= epoch and journal.synced < (end if journal.number == epoch else journal.end):
                return False
        return True

    def sync(self, replicas: Iterable[Replica]) -> asyncio.Future[None]:
        """Make everything appended so far, and these replicas, survive the loss of power. The future fails with the
        errno of a failed fdatasync. To be awaited by many: never cancel it, shield it."""
        if self._running is None:
            return self._start(asyncio.get_running_loop().create_future(), set(replicas))
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        self._next_replicas.update(replicas)
        return self._next

    def _start(self, done: asyncio.Future[None], replicas: set[Replica]) -> asyncio.Future[None]:
        journals = [(journal, journal.end) for journal in (*self._older, self.current) if journal.synced < journal.end]
        files = [(replica, replica.writes) for replica in replicas]
        self._running = done
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, _sync, self._directory, journals, files)
        work.add_done_callback(lambda work: self._finish(work, done, journals, files))
        return done

    def _finish(
        self,
        work: asyncio.Future[None],
        done: asyncio.Future[None],
        journals: list[tuple[Journal, int]],
        files: list[tuple[Replica, int]],
    ) -> None:
        error = work.exception()
        for journal, end in journals:
            if error is None:
                journal.synced = max(journal.synced, end)
            else:
                journal.failed = True
        if error is None:
            for replica, writes in files:
                replica.synced = max(replica.synced, writes)
                replica.entry_synced = True
        if not done.done():
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
        self._running = None
        if self._next is not None:
            following, self._next = self._next, None
            replicas, self._next_replicas = self._next_replicas, set()
            self._start(following, replicas)


def _sync(directory: str, journals: list[tuple[Journal, int]], replicas: list[tuple[Replica, int]]) -> None:
    # Replicas first: a durable record must not tell of bytes that are not.
    for replica, writes in replicas:
        if replica.synced < writes:
            os.fdatasync(replica.fd)
    for journal, _ in journals:
        journal.sync()
    if any(not journal.synced for journal, _ in journals) or any(not replica.entry_synced for replica, _ in replicas):
        sync_directory(directory)
