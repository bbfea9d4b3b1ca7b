"""The database file of a volume: making it, opening it, and bringing in what a killed process has left."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import sqlite3
import time
import uuid
from contextlib import suppress
from urllib.parse import quote

import msgspec

from polefs.meta.model import DIRECTORY_SIZE, FIRST_COOKIE, ROOT_INO, Inode
from polefs.meta.store import schema
from polefs.meta.store.base import FormatError
from polefs.meta.store.redo import read_log
from polefs.meta.store.transaction import apply
from polefs.meta.store.wal import sync_directory

log = logging.getLogger(__name__)

REDO = "-redo"
"""Suffix of the redo log's file name."""

_CACHE_KIB = 65536
"""SQLite's page cache, KiB."""


def new_generation() -> int:
    """An identity for what the database holds from a commit on (``volume.redo``)."""
    return secrets.randbits(63)


def make(path: str, *, name: str, identity: uuid.UUID, bytes_limit: int, inodes_limit: int) -> None:
    """Make the database of a new volume, durably. FileExistsError when there is a file already."""
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
            "INSERT INTO volume VALUES (1, ?, ?, ?, 'local', ?, ?, ?, ?, 1, 1, 0, ?, 0)",
            (name, identity.bytes, now, bytes_limit, inodes_limit, ROOT_INO + 1, FIRST_COOKIE, new_generation()),
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


def open_connection(path: str, *, read_only: bool) -> sqlite3.Connection:
    """A connection to a volume that holds everything acknowledged. Errors as of ``SqliteStore.open``."""
    os.stat(path)
    writable = os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)
    if not writable and (not read_only or _wal_is_pending(path)):
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
        _take_over(connection, path, writable=writable)
        if read_only:
            connection.execute("PRAGMA query_only = ON")
    except BaseException as error:
        abandon(connection)
        if isinstance(error, sqlite3.Error):
            raise os_error(error) from error
        raise
    return connection


def abandon(connection: sqlite3.Connection) -> None:
    """Close after a failure. A transaction is rolled back first: as long as a cursor is referred to, by a traceback for
    one, a closed connection goes on holding its locks."""
    with suppress(sqlite3.Error):
        connection.rollback()
    connection.close()


def _take_over(connection: sqlite3.Connection, path: str, *, writable: bool) -> None:
    """Bring in the redo log of a killed process. No session begins: one that is alive goes on undisturbed, because the
    log counts for nobody else while its transaction is open (EBUSY), and holds nothing when none is."""
    generation = "SELECT redo FROM volume"
    if not read_log(path + REDO, connection.execute(generation).fetchone()[0]):
        return
    if not writable:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    connection.execute("BEGIN IMMEDIATE")
    batches = read_log(path + REDO, connection.execute(generation).fetchone()[0])
    cursor = connection.cursor()
    for batch in batches:
        apply(cursor, batch)
    cursor.close()
    if batches:
        connection.execute("UPDATE volume SET redo = ?", (new_generation(),))
    connection.execute("COMMIT")
    if batches:
        log.info("%s: the changes of %d turns were taken over from the redo log", path, len(batches))


def uri(path: str, mode: str) -> str:
    return f"file:{quote(path)}?mode={mode}"


def _connect(path: str, mode: str) -> sqlite3.Connection:
    # No time-out: nothing else writes, and the loop may not wait.
    return sqlite3.connect(
        uri(os.path.abspath(path), mode),
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
            raise
        raise FormatError(f"{path} is not a database of polefs") from error
    if application != schema.APPLICATION_ID:
        raise FormatError(f"{path} is not a database of polefs")
    if version > schema.FORMAT:
        raise FormatError(
            f"{path} has format {version}, this polefs knows formats up to {schema.FORMAT}: upgrade polefs"
        )
    if version < schema.FORMAT:
        raise FormatError(f"{path} has the unknown format {version}")


def _wal_is_pending(path: str) -> bool:
    try:
        return os.stat(path + "-wal").st_size > 0
    except FileNotFoundError:
        return False


def os_error(error: sqlite3.Error) -> OSError:
    """The errno that a failure of SQLite stands for."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    number = {
        sqlite3.SQLITE_FULL: errno.ENOSPC,
        sqlite3.SQLITE_READONLY: errno.EROFS,
        sqlite3.SQLITE_PERM: errno.EACCES,
        sqlite3.SQLITE_BUSY: errno.EBUSY,
    }.get(code, errno.EIO)
    return OSError(number, os.strerror(number))
