"""A volume in one SQLite database: transactions shared by the operations of one turn of the event loop.

A write body runs at once in the transaction that is open, or opens it; the commit comes once the loop has run what was
ready, and only then do the writes return. A commit survives the death of the process; ``sync`` makes it survive the
loss of power. Who opens a database for writing holds the volume's lock (the node's); the session row is the second
line.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

import msgspec

from polefs.meta.model import DIRECTORY_SIZE, ROOT_INO, Inode, Usage
from polefs.meta.store import schema
from polefs.meta.store.base import FormatError
from polefs.meta.store.transaction import Caches, SqliteTransaction
from polefs.meta.store.turn import Commit
from polefs.meta.store.wal import Wal, sync_directory

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

_WAL_ROWS = 24_000
"""Changed rows after which the write-ahead log is copied back: some 32 MiB of it at most. When three times as many more
come while that goes on, writes wait for its end."""

_CACHE_KIB = 65536
"""SQLite's page cache, KiB."""


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
        usage_bytes, inodes = self._count()
        self._usage = Usage(usage_bytes, inodes, row[4], row[5])
        self._saved_usage = (usage_bytes, inodes)
        self.session = 0
        self._epoch = 0
        self._wal: Wal | None = None
        if not read_only:
            self._begin_session()
            self._wal = Wal(path, _uri(path, "rw"))
            self._wal.commits = 1
        caches = Caches(*cache)
        self._inodes = caches.inodes
        self._inlined = caches.inlined
        self._names = caches.names
        self._tx = SqliteTransaction(connection, caches, self._usage, self.session)
        self._snapshot: sqlite3.Cursor | None = None
        if not read_only:
            self._hold()
        self._open = False
        self._closed = False
        self._fenced = False
        self._waiters: list[Commit] = []
        self._changes_before = 0
        self._gate: asyncio.Future[None] | None = None
        self._checkpoint: asyncio.Task[None] | None = None
        self._checkpoint_at = _WAL_ROWS

    # Making and opening

    @classmethod
    def create(cls, path: str, *, name: str, bytes_limit: int = 0, inodes_limit: int = 0) -> SqliteStore:
        """Make a new volume, durably, and open it. FileExistsError when there is a file already."""
        now = time.time_ns()
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = _connect(path, "rw")
        try:
            execute = connection.execute
            execute(f"PRAGMA page_size = {schema.PAGE_SIZE}")
            execute("PRAGMA synchronous = FULL")
            execute("BEGIN IMMEDIATE")
            for statement in schema.TABLES:
                execute(statement)
            execute(
                "INSERT INTO volume VALUES (1, ?, ?, ?, 'local', ?, ?, ?, 1, 1)",
                (name, uuid.uuid4().bytes, now, bytes_limit, inodes_limit, ROOT_INO + 1),
            )
            root = Inode(
                ROOT_INO, 0o40755, os.geteuid(), os.getegid(), 2, DIRECTORY_SIZE, 0, now, now, now, now, 0, ROOT_INO
            )
            execute(schema.PUT_INODE, msgspec.structs.astuple(root))
            execute("INSERT INTO usage VALUES (1, 0, 1, 1)")
            execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
            execute(f"PRAGMA user_version = {schema.FORMAT}")
            execute("COMMIT")
            execute("PRAGMA journal_mode = WAL").fetchall()
        finally:
            connection.close()
        sync_directory(os.path.dirname(path) or ".")
        return cls.open(path)

    @classmethod
    def open(
        cls, path: str, read_only: bool = False, *, cache: tuple[int, int, int] = (65536, 8192, 65536)
    ) -> SqliteStore:
        """Open a volume and begin a session, which ends every older one. ``cache``: how many inodes, inodes with inline
        contents and names are kept in memory. FormatError when it is no volume or of another format,
        FileNotFoundError, EACCES when its directory is not writable (``read_only`` then needs a volume that was
        closed cleanly)."""
        path = os.path.abspath(path)
        os.stat(path)
        writable = os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)
        if not writable and (not read_only or _log_is_pending(path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        connection = _connect(path, "rw" if writable else "ro&immutable=1")
        try:
            _check_format(connection, path)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            connection.execute("PRAGMA temp_store = MEMORY")
            # Deleted rows are not wiped: that would write pages that are free.
            connection.execute("PRAGMA secure_delete = OFF")
            if read_only:
                connection.execute("PRAGMA query_only = ON")
            return cls(path, connection, read_only=read_only, cache=cache)
        except BaseException:
            connection.close()
            raise

    def _count(self) -> tuple[int, int]:
        """Bytes and inodes in use: as noted at a clean end, else counted."""
        usage_bytes, inodes, exact = self._execute("SELECT bytes, inodes, exact FROM usage").fetchone()
        if not exact:
            usage_bytes, inodes = self._execute("SELECT coalesce(sum(allocated), 0), count(*) FROM inode").fetchone()
        return usage_bytes, inodes

    def _begin_session(self) -> None:
        execute = self._execute
        execute("BEGIN IMMEDIATE")
        last, epoch = execute("SELECT coalesce(max(id), 0), coalesce(max(epoch), 0) FROM session").fetchone()
        self.session = last + 1
        self._epoch = epoch + 1
        execute("DELETE FROM session")
        execute("INSERT INTO session(id, epoch, expires, info) VALUES (?, ?, 0, ?)", (self.session, self._epoch, b""))
        execute("UPDATE usage SET exact = 0")
        execute("COMMIT")

    # Reading

    def cached_inode(self, ino: int) -> Inode | None:
        return self._inodes.get(ino) or self._inlined.get(ino)

    def cached_entry(self, parent: int, name: bytes) -> Inode | None:
        ino = self._names.get((parent, name))
        return (self._inodes.get(ino) or self._inlined.get(ino)) if ino else None

    async def read(
        self, body: Callable[Concatenate[SqliteTransaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        try:
            return await body(self._tx, *args, **kwargs)
        except sqlite3.Error as error:
            log.exception("reading metadata failed")
            raise _os_error(error) from error

    def rows(self, statement: str, parameters: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows of any query, streamed, for the checker and the administrator's tools. OSError on failure."""
        try:
            self._tx.write_inodes()
            yield from self._connection.execute(statement, parameters)
        except sqlite3.Error as error:
            raise _os_error(error) from error

    def noted_usage(self) -> tuple[int, int]:
        """Bytes and inodes in use, as this session counts them."""
        return self._usage.bytes, self._usage.inodes

    @contextmanager
    def repairing(self) -> Iterator[schema.Execute]:
        """Any statements in one transaction of their own, for the checker; everything is read anew afterwards. Nothing
        changes when the block fails. OSError on failure."""
        try:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield self._execute
                self._execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise _os_error(error) from error
        self._tx.forget()
        self._usage.bytes, self._usage.inodes = self._execute(
            "SELECT coalesce(sum(allocated), 0), count(*) FROM inode"
        ).fetchone()

    # Writing

    async def write(
        self, body: Callable[Concatenate[SqliteTransaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        while self._gate is not None:
            await asyncio.shield(self._gate)
        if not self._open:
            self._begin()
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
            code = _os_error(error).errno if isinstance(error, sqlite3.Error) else errno.EIO
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
        if self._fenced:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        try:
            try:
                self._execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY_SNAPSHOT:
                    raise
                self._meet_writer()
                self._execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            log.exception("a transaction cannot begin")
            raise _os_error(error) from error
        self._open = True
        self._saved_usage = (self._usage.bytes, self._usage.inodes)
        self._changes_before = self._tx.changes + self._tx.reservations
        asyncio.get_running_loop().call_soon(self._commit)

    def _hold(self) -> None:
        """Begin a read transaction that lasts: a query whose rows are never fetched. Transactions and queries then do
        not each take and give back the read lock, and one that begins after another connection has written fails with
        BUSY_SNAPSHOT. While it lasts the log is copied back only as far as it went at its beginning."""
        self._let_go()
        self._snapshot = self._execute("SELECT id FROM volume UNION ALL SELECT id FROM volume")

    def _let_go(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None

    def _meet_writer(self) -> None:
        """Somebody else has written to the database. ESTALE when it was a session that put an end to this one."""
        self._hold()
        if self._execute("SELECT max(epoch) FROM session").fetchone()[0] != self._epoch:
            self._fenced = True
            log.critical("%s has been taken over by another session", self.path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self._tx.forget()

    def end_turn(self) -> None:
        """Commit now what the operations of this turn have changed; they go on within the call. Not for coroutines."""
        if self._open:
            self._commit()

    def _commit(self, *, in_task: bool = False) -> None:
        if not self._open:
            return
        try:
            self._tx.write_inodes()
            self._execute("COMMIT")
        except sqlite3.Error as error:
            log.exception("a commit failed")
            self._abort(_os_error(error).errno or errno.EIO)
            return
        self._open = False
        if self._tx.changes + self._tx.reservations == self._changes_before:
            return
        wal = self._wal
        assert wal is not None
        wal.commits += 1
        if self._tx.changes >= self._checkpoint_at:
            loop = asyncio.get_running_loop()
            if self._checkpoint is None:
                self._checkpoint = loop.create_task(self._run_checkpoint(wal))
            elif self._gate is None and self._tx.changes >= self._checkpoint_at + 3 * _WAL_ROWS:
                self._gate = loop.create_future()
        waiters, self._waiters = self._waiters, []
        if in_task:
            loop = asyncio.get_running_loop()
            for commit in waiters:
                loop.call_soon(commit.release)
        else:
            for commit in waiters:
                commit.release()

    def _abort(self, code: int) -> None:
        """Roll back everything since the last commit; each operation in it fails with ``code``."""
        self._open = False
        try:
            # After some errors (disk full, I/O) SQLite has rolled back by itself.
            if self._connection.in_transaction:
                self._execute("ROLLBACK")
            self._hold()
        except sqlite3.Error:
            log.exception("a rollback failed")
        self._usage.bytes, self._usage.inodes = self._saved_usage
        self._tx.forget()
        waiters, self._waiters = self._waiters, []
        loop = asyncio.get_running_loop()
        for commit in waiters:
            loop.call_soon(commit.release, OSError(code, os.strerror(code)))

    async def _run_checkpoint(self, wal: Wal) -> None:
        try:
            self._commit(in_task=True)
            self._hold()
            await wal.copy_back()
            if self._gate is None:
                self._gate = asyncio.get_running_loop().create_future()
            self._commit(in_task=True)
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
            self._checkpoint_at = self._tx.changes + _WAL_ROWS

    # Durability and the end

    async def sync(self) -> None:
        if self._wal is not None:
            await self._wal.sync()

    async def close(self) -> None:
        if self._closed:
            return
        self._commit(in_task=True)
        while self._checkpoint is not None:
            await asyncio.wait([self._checkpoint])
        await asyncio.get_running_loop().run_in_executor(None, self.shutdown)

    def shutdown(self) -> None:
        """End the session and close everything, durably. Blocks; for use without an event loop."""
        if self._closed:
            return
        self._closed = True
        try:
            self._let_go()
            if self._wal is not None and not self._fenced:
                self._execute("BEGIN IMMEDIATE")
                self._tx.store_counters()
                self._execute(
                    "UPDATE usage SET bytes = ?, inodes = ?, exact = 1", (self._usage.bytes, self._usage.inodes)
                )
                self._execute("COMMIT")
        except sqlite3.Error as error:
            raise _os_error(error) from error
        finally:
            self._connection.close()
            if self._wal is not None:
                self._wal.close()


def _uri(path: str, mode: str) -> str:
    return f"file:{quote(path)}?mode={mode}"


def _connect(path: str, mode: str) -> sqlite3.Connection:
    # No time-out: nothing else writes, and the loop may not wait.
    return sqlite3.connect(
        _uri(os.path.abspath(path), mode),
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )


def _check_format(connection: sqlite3.Connection, path: str) -> None:
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_NOTADB:
            raise _os_error(error) from error
        raise FormatError(f"{path} is not a database of polefs") from error
    if application != schema.APPLICATION_ID:
        raise FormatError(f"{path} is not a database of polefs")
    if version > schema.FORMAT:
        raise FormatError(
            f"{path} has format {version}, this polefs knows formats up to {schema.FORMAT}: upgrade polefs"
        )
    if version < schema.FORMAT:
        raise FormatError(f"{path} has the unknown format {version}")


def _log_is_pending(path: str) -> bool:
    try:
        return os.stat(path + "-wal").st_size > 0
    except FileNotFoundError:
        return False


def _os_error(error: sqlite3.Error) -> OSError:
    """The errno that a failure of SQLite stands for."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    number = {
        sqlite3.SQLITE_FULL: errno.ENOSPC,
        sqlite3.SQLITE_READONLY: errno.EROFS,
        sqlite3.SQLITE_PERM: errno.EACCES,
    }.get(code, errno.EIO)
    return OSError(number, os.strerror(number))
