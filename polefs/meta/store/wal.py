"""The write-ahead log of the database: making it durable, and bringing it into the database file, both off the loop.

SQLite with ``synchronous=NORMAL`` syncs nothing at a commit. ``Wal.sync`` makes all commits so far durable with one
fdatasync of the log. ``Wal.checkpoint`` runs on a connection of its own: first a passive checkpoint, which disturbs
nobody; then, while the owner holds back new transactions, the rest and a restart of the log at its beginning. The first
commit after a restart writes and syncs the log's header (wal.c: sqlite3WalFrames), so that one is made here as well.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

_FILLED = 4 << 20
"""Size that the log file has from the beginning, bytes."""

_BUSY_TIMEOUT = 0.05
"""Longest wait for another process that reads the database, seconds; the restart is then left for the next time."""


class Wal:
    def __init__(self, path: str, uri: str) -> None:
        self._connection = sqlite3.connect(
            uri, uri=True, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")
        # The database file itself is never opened here: closing any descriptor of it would drop SQLite's locks.
        self._fd = os.open(path + "-wal", os.O_RDWR | os.O_CLOEXEC)
        self._fill()
        self._directory: str | None = os.path.dirname(path) or "."
        # One thread for each of the two, so that no fsync waits for a checkpoint to begin.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="polefs-wal")
        self._running: asyncio.Future[None] | None = None
        self._durable = 0
        self._error: OSError | None = None
        self.commits = 0
        """Transactions committed so far; the owner counts them."""

    def _fill(self) -> None:
        """Give the log blocks behind its end: overwriting them makes an fdatasync several times cheaper than growing
        the file. SQLite takes zeros for the end of the log (wal.c: walIndexRecover)."""
        size = os.fstat(self._fd).st_size
        try:
            while size < _FILLED:
                size += os.pwrite(self._fd, bytes(min(1 << 20, _FILLED - size)), size)
        except OSError as error:
            log.warning("the write-ahead log could not be given room: %s", error)

    async def sync(self) -> None:
        """Return once all ``commits`` so far are durable; concurrent callers share the work. EIO, for good, after the
        log could not be synced once: the kernel then tells nothing about which pages were lost."""
        target = self.commits
        while self._durable < target:
            if self._error is not None:
                raise OSError(self._error.errno, os.strerror(self._error.errno or 0))
            if self._running is None or self._running.done():
                self._start()
            assert self._running is not None
            await asyncio.shield(self._running)

    def _start(self) -> None:
        goal = self.commits

        def finish(done: asyncio.Future[None]) -> None:
            if self._running is done:
                self._running = None
            error = done.exception()
            if error is None:
                self._durable = max(self._durable, goal)
            elif isinstance(error, OSError):
                self._error = error
                log.critical("the write-ahead log cannot be made durable: %s", error)

        self._running = asyncio.get_running_loop().run_in_executor(self._threads, self._sync)
        self._running.add_done_callback(finish)

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        if self._directory is not None:
            sync_directory(self._directory)
            self._directory = None

    async def copy_back(self) -> None:
        """Copy committed pages into the database file, while transactions go on. ``sqlite3.Error`` on failure."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._copy_back)

    def _copy_back(self) -> None:
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    async def restart(self, bytes_: int, inodes: int) -> bool:
        """Copy the rest and let the log begin anew; False when a reader in another process is in the way. No
        transaction may begin meanwhile. The counters are noted (inexact). ``sqlite3.Error`` on failure."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._restart, bytes_, inodes)

    def _restart(self, bytes_: int, inodes: int) -> bool:
        (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if busy:
            return False
        self._connection.execute("UPDATE usage SET bytes = ?, inodes = ?", (bytes_, inodes))
        return True

    def close(self) -> None:
        """Blocks. Bring everything into the database file, durably, and remove the log. ``sqlite3.Error`` on failure:
        the log then stays."""
        self._threads.shutdown()
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self._connection.close()
            os.close(self._fd)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
