"""A volume in one SQLite database: a transaction shared by many operations, and a redo log of what it holds.

A write body runs at once in the transaction that is open, or opens it. At the end of the turn (``end_turn``, or when
the loop has run what was ready) the turn's changes go to the redo log, and only then do the writes return: they survive
the death of the process. The transaction commits after hundreds of changes, or a moment; ``sync`` commits and makes
everything survive the loss of power. Who opens a database for writing holds the volume's lock (the node's); the session
row is the second line.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from polefs.meta.model import Inode, Usage
from polefs.meta.store import database, schema
from polefs.meta.store.base import Deposed
from polefs.meta.store.database import os_error
from polefs.meta.store.redo import Redo
from polefs.meta.store.transaction import Caches, SqliteTransaction
from polefs.meta.store.turn import Commit
from polefs.meta.store.wal import Wal

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

_WAL_ROWS = 24_000
"""Changed rows after which the write-ahead log is copied back: some 32 MiB of it at most. When three times as many more
come while that goes on, writes wait for its end."""

_PLACE_PER_ROW = 32 << 10
"""Bytes of the database's file system for each such row."""

_COMMIT_ROWS = 500
"""Changed rows after which the transaction commits. The loop stands still for that: 3 ms when each row is in another
page."""

_COMMIT_AFTER = 0.2
"""Seconds after which it commits anyway."""

_RETRY_AFTER = 2.0
"""Seconds until what was acknowledged is tried again, when it could not be committed."""

_COUNT = "SELECT coalesce(sum(allocated), 0), count(*) FROM inode"


class SqliteStore:
    """Implements ``base.Store``. Made by ``create`` and ``open``; used from one event loop at a time."""

    def __init__(
        self, path: str, connection: sqlite3.Connection, *, read_only: bool, cache: tuple[int, int, int]
    ) -> None:
        self.path = path
        self.read_only = read_only
        self._connection = connection
        self._execute = connection.execute
        row = self._execute("SELECT name, uuid, created, durability, bytes_limit, inodes_limit FROM volume").fetchone()
        self.name: str = row[0]
        self.uuid = uuid.UUID(bytes=row[1])
        self.created: int = row[2]
        """When the volume was made, ns."""
        self.durability: str = row[3]
        usage_bytes, inodes, exact = self._execute("SELECT bytes, inodes, exact FROM usage").fetchone()
        if not exact:
            usage_bytes, inodes = self._execute(_COUNT).fetchone()
        self._usage = Usage(usage_bytes, inodes, row[4], row[5])
        self._saved_usage = (usage_bytes, inodes)
        """What is in use after the last turn that was acknowledged."""
        self._epoch = 0
        self._fenced = False
        self._snapshot: sqlite3.Cursor | None = None
        self._wal: Wal | None = None
        self._redo: Redo | None = None
        if not read_only:
            self._begin_session()
        caches = Caches(*cache)
        self._inodes = caches.inodes
        self._inlined = caches.inlined
        self._names = caches.names
        self._tx = SqliteTransaction(connection, caches, self._usage)
        self._open = False
        """A transaction has begun."""
        self._turn = False
        """Operations have run that are not acknowledged yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._broken = 0
        """errno of a failure after which the database lacks what the redo log holds: only opening it anew helps."""
        self._closed = False
        self._waiters: list[Commit] = []
        self._changes_before = 0
        self._gate: asyncio.Future[None] | None = None
        self._checkpoint: asyncio.Task[None] | None = None
        self._checkpoint_rows = _checkpoint_rows(path)
        self._checkpoint_at = self._checkpoint_rows

    @classmethod
    def create(
        cls,
        path: str,
        *,
        name: str,
        identity: uuid.UUID | None = None,
        bytes_limit: int = 0,
        inodes_limit: int = 0,
    ) -> SqliteStore:
        """Make a new volume, durably, and open it; ``identity`` is a new one unless given. FileExistsError when there
        is a file already."""
        identity = identity or uuid.uuid4()
        database.make(path, name=name, identity=identity, bytes_limit=bytes_limit, inodes_limit=inodes_limit)
        return cls.open(path)

    @classmethod
    def open(
        cls, path: str, read_only: bool = False, *, cache: tuple[int, int, int] = (65536, 8192, 65536)
    ) -> SqliteStore:
        """Open a volume; whoever has had it open for writing can change nothing from then on. ``cache``: how many
        inodes, inodes with inline contents and names are kept in memory. FormatError when it is no volume or of another
        format, FileNotFoundError, EACCES when its directory is not writable (``read_only`` then needs a volume that was
        closed cleanly), EBUSY when another process is writing to it, EIO."""
        path = os.path.abspath(path)
        connection = database.open_connection(path, read_only=read_only)
        try:
            return cls(path, connection, read_only=read_only, cache=cache)
        except BaseException as error:
            database.abandon(connection)
            if isinstance(error, sqlite3.Error):
                raise os_error(error) from error
            raise

    def _begin_session(self) -> None:
        execute = self._execute
        execute("BEGIN IMMEDIATE")
        self._epoch = execute("SELECT epoch FROM volume").fetchone()[0] + 1
        execute("UPDATE usage SET exact = 0")
        # Of its own generation, even when the log holds nothing: after a loss of power there may be records in it
        # beyond one that is not whole.
        generation = database.new_generation()
        execute("UPDATE volume SET epoch = ?, redo = ?", (self._epoch, generation))
        execute("COMMIT")
        self._redo = Redo(self.path + database.REDO)
        try:
            self._redo.begin(generation)
            self._wal = Wal(self.path, database.uri(self.path, "rw"))
            self._wal.commits = 1
            self._hold()
        except BaseException:
            self._redo.close(remove=False)
            raise

    # Reading

    def cached_inode(self, ino: int) -> Inode | None:
        return self._inodes.get(ino) or self._inlined.get(ino)

    def cached_entry(self, parent: int, name: bytes) -> Inode | None:
        ino = self._names.get((parent, name))
        return (self._inodes.get(ino) or self._inlined.get(ino)) if ino else None

    async def read(
        self, body: Callable[Concatenate[SqliteTransaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._broken:
            raise OSError(self._broken, os.strerror(self._broken))
        try:
            return await body(self._tx, *args, **kwargs)
        except sqlite3.Error as error:
            log.exception("reading metadata failed")
            raise self._reading_failed(error) from error

    def rows(self, statement: str, parameters: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows of any query, streamed, for the checker and the administrator's tools. OSError on failure."""
        if self._broken:
            raise OSError(self._broken, os.strerror(self._broken))
        try:
            self._tx.write_inodes()
            yield from self._connection.execute(statement, parameters)
        except sqlite3.Error as error:
            raise self._reading_failed(error) from error

    def _reading_failed(self, error: sqlite3.Error) -> OSError:
        failure = os_error(error)
        # Reading writes too: collected inodes, and pages that the cache has no room for. SQLite may then roll back.
        if self._open and not self._connection.in_transaction:
            self._abort(failure.errno or errno.EIO)
        return failure

    def noted_usage(self) -> tuple[int, int]:
        """Bytes and inodes in use, as this session counts them."""
        return self._usage.bytes, self._usage.inodes

    @contextmanager
    def repairing(self) -> Iterator[schema.Execute]:
        """Any statements in one transaction of their own, for the checker; everything is read anew afterwards. Nothing
        changes when the block fails. OSError on failure."""
        code = self._commit() or self._broken
        if code:
            raise OSError(code, os.strerror(code))
        try:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield self._execute
                self._execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._execute("ROLLBACK")
                raise
            self._tx.forget()
            self._usage.bytes, self._usage.inodes = self._saved_usage = self._execute(_COUNT).fetchone()
        except sqlite3.Error as error:
            raise os_error(error) from error
        if self._wal is not None:
            self._wal.commits += 1

    # Writing

    async def write(
        self, body: Callable[Concatenate[SqliteTransaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        while self._gate is not None:
            await asyncio.shield(self._gate)
        if not self._open:
            self._begin()
        if not self._turn:
            self._begin_turn()
        tx = self._tx
        before = tx.changes
        reservations = tx.reservations
        try:
            result = await body(tx, *args, **kwargs)
        except OSError as error:
            if tx.changes == before:
                raise
            log.exception("operation %s failed after it had changed something", body)
            self._abort(errno.EIO)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        except BaseException as error:
            log.exception("operation %s failed", body)
            code = os_error(error).errno if isinstance(error, sqlite3.Error) else errno.EIO
            assert code is not None
            self._abort(code)
            raise OSError(code, os.strerror(code)) from error
        if tx.changes != before or tx.reservations != reservations:
            commit = Commit(asyncio.get_running_loop())
            self._waiters.append(commit)
            await commit
        return result

    def _begin(self) -> None:
        if self.read_only or self._closed:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if self._broken:
            raise OSError(self._broken, os.strerror(self._broken))
        try:
            try:
                self._check_session()
                self._execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                # Somebody else writes to the database, or has done so.
                self._hold()
                self._check_session()
                self._tx.forget()
                self._execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            log.exception("a transaction cannot begin")
            raise os_error(error) from error
        self._open = True
        self._changes_before = self._tx.changes + self._tx.reservations

    def _begin_turn(self) -> None:
        self._turn = True
        asyncio.get_running_loop().call_soon(self.end_turn)

    def _hold(self) -> None:
        """Begin a read transaction that lasts: a query whose second row is never fetched. Transactions and queries then
        do not each take and give back the read lock, and one that begins after another connection has written fails
        with BUSY_SNAPSHOT. While it lasts the log is copied back only as far as it went at its beginning."""
        self._let_go()
        self._snapshot = self._execute("SELECT epoch FROM volume UNION ALL SELECT epoch FROM volume")
        if self._snapshot.fetchone()[0] != self._epoch and not self._fenced:
            self._fenced = True
            log.critical("%s has been taken over by another session", self.path)

    def _let_go(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None

    def _check_session(self) -> None:
        if self._fenced:
            raise Deposed

    def end_turn(self) -> None:
        """Acknowledge now what the operations of this turn have changed; they go on within the call. Not for
        coroutines."""
        if not self._turn:
            return
        self._turn = False
        tx = self._tx
        if tx.changes + tx.reservations >= self._changes_before + _COMMIT_ROWS:
            if self._commit():
                return
        elif self._open:
            statements, inodes = tx.take_turn()
            if statements or inodes:
                assert self._redo is not None
                try:
                    self._redo.append(statements, inodes)
                except OSError as error:
                    # The database may have the room that the log lacks; and the log begins anew.
                    log.error("the redo log cannot be written: %s", error)
                    if self._commit():
                        return
            if self._open and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_COMMIT_AFTER, self._commit)
        usage = self._usage
        self._saved_usage = (usage.bytes, usage.inodes)
        waiters, self._waiters = self._waiters, []
        for commit in waiters:
            commit.release()

    def _commit(self) -> int:
        """Commit everything so far; operations of a turn that is going on are acknowledged at its end as ever. Returns
        an errno on failure: that turn's operations fail with it then, what was acknowledged before is tried again
        later."""
        self._stop_timer()
        if not self._open:
            return 0
        changed = self._tx.changes + self._tx.reservations != self._changes_before
        try:
            if changed:
                self._tx.write_inodes()
                generation = database.new_generation()
                self._execute("UPDATE volume SET redo = ?", (generation,))
            self._execute("COMMIT")
        except sqlite3.Error as error:
            log.exception("a commit failed")
            code = os_error(error).errno or errno.EIO
            self._abort(code)
            return code
        self._open = False
        if changed:
            assert self._redo is not None
            self._redo.begin(generation)
            self._tx.take_turn()
            self._saved_usage = (self._usage.bytes, self._usage.inodes)
            self._committed()
        return 0

    def _committed(self) -> None:
        wal = self._wal
        assert wal is not None
        wal.commits += 1
        if self._tx.changes >= self._checkpoint_at:
            loop = asyncio.get_running_loop()
            if self._checkpoint is None:
                self._checkpoint = loop.create_task(self._run_checkpoint(wal))
            elif self._gate is None and self._tx.changes >= self._checkpoint_at + 3 * self._checkpoint_rows:
                self._gate = loop.create_future()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self, code: int) -> None:
        """Undo the turn that is going on: roll everything back, and do again what the redo log holds of the turns
        before. The operations of the turn fail with ``code``."""
        self._turn = False
        try:
            self._roll_back()
            self._hold()
            self._tx.forget()
            self._usage.bytes, self._usage.inodes = self._saved_usage
            self._redo_transaction()
        except (sqlite3.Error, OSError):
            log.critical("what the redo log holds cannot be done again; opening the volume anew will", exc_info=True)
            self._broken = code
            # Half of it must never be committed: that would end the log's generation.
            with suppress(sqlite3.Error):
                self._roll_back()
            self._tx.drop()
        waiters, self._waiters = self._waiters, []
        loop = asyncio.get_running_loop()
        for commit in waiters:
            loop.call_soon(commit.release, OSError(code, os.strerror(code)))

    def _roll_back(self) -> None:
        self._open = False
        # After some errors (disk full, I/O) SQLite has rolled back by itself.
        if self._connection.in_transaction:
            self._connection.rollback()

    def _redo_transaction(self) -> None:
        """Open a transaction that holds what was acknowledged and not committed."""
        redo = self._redo
        assert redo is not None
        batches = redo.batches()
        if not batches:
            return
        self._begin()
        for batch in batches:
            self._tx.apply(batch)
        self._tx.load_counters()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_RETRY_AFTER, self._commit)

    async def _run_checkpoint(self, wal: Wal) -> None:
        try:
            self._commit()
            self._hold()
            await wal.copy_back()
            if self._gate is None:
                self._gate = asyncio.get_running_loop().create_future()
            self._commit()
            self._let_go()
            try:
                if not await wal.restart(self._usage.bytes, self._usage.inodes):
                    log.warning("%s: the log cannot restart while another process reads the database", self.path)
            finally:
                self._hold()
        except sqlite3.Error:
            log.exception("a checkpoint failed; the log goes on growing")
        finally:
            gate, self._gate = self._gate, None
            if gate is not None:
                gate.set_result(None)
            self._checkpoint = None
            self._checkpoint_at = self._tx.changes + self._checkpoint_rows

    # Durability and the end

    async def sync(self) -> None:
        if self._wal is not None:
            code = self._commit() or self._broken
            if code:
                raise OSError(code, os.strerror(code))
            await self._wal.sync()

    async def close(self) -> None:
        if self._closed:
            return
        self._commit()
        while self._checkpoint is not None:
            await asyncio.wait([self._checkpoint])
            self._commit()
        self._closed = True
        self._stop_timer()
        await asyncio.get_running_loop().run_in_executor(None, self._finish)

    def shutdown(self) -> None:
        """End the session and close everything, durably. Blocks; for use without an event loop. OSError on failure:
        what was acknowledged is brought in when the volume is opened again."""
        if self._closed:
            return
        self._closed = True
        self._stop_timer()
        self._finish()

    def _finish(self) -> None:
        clean = False
        try:
            try:
                if not self.read_only and not self._broken:
                    clean = self._end_session()
            finally:
                self._let_go()
                database.abandon(self._connection)
                if self._redo is not None:
                    self._redo.close(remove=clean)
                if self._wal is not None:
                    self._wal.close()
        except sqlite3.Error as error:
            raise os_error(error) from error

    def _end_session(self) -> bool:
        """Commit everything, and exact counts. False when the volume is another session's."""
        if not self._open:
            self._hold()
            if self._fenced:
                return False
            self._execute("BEGIN IMMEDIATE")
        self._tx.write_inodes()
        self._tx.store_counters()
        self._execute("UPDATE usage SET bytes = ?, inodes = ?, exact = 1", (self._usage.bytes, self._usage.inodes))
        self._execute("UPDATE volume SET redo = ?", (database.new_generation(),))
        self._execute("COMMIT")
        self._open = False
        return True


def _checkpoint_rows(path: str) -> int:
    """Changed rows after which the log is copied back: fewer where the place is small, or the log would fill it."""
    found = os.statvfs(os.path.dirname(path) or ".")
    return max(1000, min(_WAL_ROWS, found.f_blocks * found.f_frsize // _PLACE_PER_ROW))
