"""Whole volumes out of and into SQLite, a row at a time."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from uuid import UUID

from polefs.meta.store import database
from polefs.meta.store.sqlite import SqliteStore
from polefs.meta.store.tables import Row, Table, VolumeState
from polefs.meta.store.wal import sync_directory


def read_state(store: SqliteStore) -> VolumeState:
    columns = "bytes_limit, inodes_limit, next_ino, next_cookie, next_segment"
    (limits,) = store.rows(f"SELECT {columns} FROM volume")
    return VolumeState(
        name=store.name,
        uuid=str(store.uuid),
        created=store.created,
        durability=store.durability,
        bytes_limit=limits[0],
        inodes_limit=limits[1],
        next_ino=limits[2],
        next_cookie=limits[3],
        next_segment=limits[4],
    )


def read_rows(store: SqliteStore, table: Table) -> Iterator[Row]:
    """By primary key. OSError when the database cannot be read."""
    order = ", ".join(f'"{column}"' for column in table.columns[: table.keys])
    return store.rows(f"SELECT {table.column_list} FROM {table.name} ORDER BY {order}")


def restore(path: str, state: VolumeState, pages: Iterable[tuple[Table, list[Row]]]) -> None:
    """Make the database of a volume from rows, durably. Nothing else may use it meanwhile; what there is after a
    failure is not whole. FileExistsError when there is a file already, else OSError when it cannot be written, EINVAL
    when two rows have the same key."""
    database.make(
        path,
        name=state.name,
        identity=UUID(state.uuid),
        bytes_limit=state.bytes_limit,
        inodes_limit=state.inodes_limit,
    )
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            _fill(connection, state, pages)
    except sqlite3.IntegrityError as error:
        raise ValueError(f"contradictory rows: {error}") from error
    except sqlite3.Error as error:
        raise database.os_error(error) from error
    _sync(path)


def _fill(connection: sqlite3.Connection, state: VolumeState, pages: Iterable[tuple[Table, list[Row]]]) -> None:
    # It is synced once, at the end: before that nobody takes it for a volume.
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("DELETE FROM inode")
    for table, rows in pages:
        marks = ", ".join("?" * len(table.columns))
        connection.execute("BEGIN")
        connection.executemany(f"INSERT INTO {table.name}({table.column_list}) VALUES ({marks})", rows)
        connection.execute("COMMIT")
    connection.execute(
        "UPDATE volume SET created = ?, durability = ?, next_ino = ?, next_cookie = ?, next_segment = ?",
        (state.created, state.durability, state.next_ino, state.next_cookie, state.next_segment),
    )
    connection.execute(
        "UPDATE usage SET (bytes, inodes) = (SELECT coalesce(sum(allocated), 0), count(*) FROM inode), exact = 1"
    )
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(os.path.dirname(path) or ".")
