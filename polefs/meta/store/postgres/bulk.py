"""Whole volumes out of and into PostgreSQL, pages of rows at a time.

A volume that is being loaded has a name that no volume can have, and gets its own in the last transaction. Meanwhile
its row is locked: who finds such a row without a lock has found what a killed process has left.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final
from uuid import UUID

import asyncpg

from polefs.meta.store.postgres import tables
from polefs.meta.store.postgres.connection import FAILURES, os_error
from polefs.meta.store.postgres.database import UNFINISHED, delete_rows, find_volume, open_database
from polefs.meta.store.tables import Row, Table, VolumeState

_PAGE: Final = 1000
"""Rows that are fetched at a time."""

_INSERT: Final = (
    "INSERT INTO volume(id, name, uuid, created, durability, bytes_limit, inodes_limit, bytes, inodes, next_ino,"
    " next_cookie, next_segment, next_session, writer, epoch, batch, holder, lease, contents)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7, 0, 0, $8, $9, $10, 1, 0, 0, 0, $12, 0, $11)"
)


class Snapshot:
    """A volume as it is at one moment, however long reading it takes, and whoever serves it meanwhile."""

    def __init__(self, connection: asyncpg.Connection[Any], volume: int, state: VolumeState, contents: str) -> None:
        self._connection = connection
        self._volume = volume
        self.state = state
        self.contents = contents
        """As the dump had it that the volume was loaded from; empty: none."""

    async def pages(self, table: Table) -> AsyncIterator[list[Row]]:
        """The rows of a table by primary key. OSError when the database fails."""
        order = ", ".join(["volume", *(f'"{column}"' for column in table.columns[: table.keys])])
        query = f"SELECT {table.column_list} FROM {table.name} WHERE volume = $1 ORDER BY {order}"
        with _failures():
            cursor = await self._connection.cursor(query, self._volume)
            while rows := await cursor.fetch(_PAGE):
                yield [tuple(row) for row in rows]


@asynccontextmanager
async def snapshot(dsn: str, name: str) -> AsyncIterator[Snapshot]:
    """A volume to be read. ``FileNotFoundError`` when there is none of that name; ``FormatError`` and ``OSError`` as of
    ``open_database``."""
    connection = await open_database(dsn, read_only=True)
    try:
        with _failures():
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            volume = await find_volume(connection, name)
            row = await connection.fetchrow(
                "SELECT bytes_limit, inodes_limit, next_ino, next_cookie, next_segment, contents FROM volume"
                " WHERE id = $1",
                volume.id,
            )
            state = VolumeState(
                name=volume.name,
                uuid=str(volume.uuid),
                created=volume.created,
                durability=volume.durability,
                bytes_limit=row[0],
                inodes_limit=row[1],
                next_ino=row[2],
                next_cookie=row[3],
                next_segment=row[4],
            )
            yield Snapshot(connection, volume.id, state, row[5].decode())
    finally:
        connection.terminate()


async def restore(dsn: str, state: VolumeState, contents: str, pages: Iterator[tuple[Table, list[Row]]]) -> None:
    """Make a volume from rows; others see it when all of it is there, and nothing is left after a failure.
    ``FileExistsError`` when there is a volume of that name, EBUSY when one of that name is being loaded, ValueError
    when two rows have the same key, and as of ``open_database``."""
    name = state.name.encode()
    keeper = await open_database(dsn)
    try:
        writer = await open_database(dsn)
        try:
            with _failures():
                volume = await _begin(keeper, writer, name, state, contents)
            try:
                await _fill(keeper, writer, volume, name, pages)
            except BaseException:
                with suppress(*FAILURES):
                    await keeper.execute("ROLLBACK")
                with suppress(*FAILURES):
                    # Where the database is away, the next load removes what is left.
                    await delete_rows(writer, volume)
                raise
        finally:
            writer.terminate()
    finally:
        keeper.terminate()


async def _begin(
    keeper: asyncpg.Connection[Any], writer: asyncpg.Connection[Any], name: bytes, state: VolumeState, contents: str
) -> int:
    """The number of the new volume. ``keeper`` has its row locked."""
    if await writer.fetchval("SELECT id FROM volume WHERE name = $1", name) is not None:
        raise FileExistsError(errno.EEXIST, f"there is a volume {state.name} already: give another name")
    left = await writer.fetchval("SELECT id FROM volume WHERE name = $1", UNFINISHED + name)
    if left is not None:
        await keeper.execute("BEGIN")
        await _lock(keeper, left, state.name)
        await keeper.execute("ROLLBACK")
        await delete_rows(writer, left)
    volume = secrets.randbits(62) | 1
    await writer.execute(
        _INSERT,
        volume,
        UNFINISHED + name,
        UUID(state.uuid).bytes,
        state.created,
        state.durability.encode(),
        state.bytes_limit,
        state.inodes_limit,
        state.next_ino,
        state.next_cookie,
        state.next_segment,
        contents.encode(),
        b"",
    )
    await keeper.execute("SET idle_in_transaction_session_timeout = 0")
    await keeper.execute("BEGIN")
    await _lock(keeper, volume, state.name)
    return volume


async def _lock(keeper: asyncpg.Connection[Any], volume: int, name: str) -> None:
    try:
        await keeper.fetchval("SELECT id FROM volume WHERE id = $1 FOR UPDATE NOWAIT", volume)
    except asyncpg.LockNotAvailableError:
        raise OSError(errno.EBUSY, f"volume {name} is being loaded by another process: wait for its end") from None


async def _fill(
    keeper: asyncpg.Connection[Any],
    writer: asyncpg.Connection[Any],
    volume: int,
    name: bytes,
    pages: Iterator[tuple[Table, list[Row]]],
) -> None:
    bytes_ = inodes = 0
    statements = {table.name: table.insert() for table in tables.TABLES}
    while (page := await asyncio.to_thread(next, pages, None)) is not None:
        table, rows = page
        columns = [list(column) for column in zip(*rows, strict=True)]
        if table.name == "inode":
            inodes += len(rows)
            bytes_ += sum(columns[table.columns.index("allocated")])
        with _failures():
            await writer.execute(statements[table.name], [volume] * len(rows), *columns)
    try:
        with _failures():
            changed = await keeper.execute(
                "UPDATE volume SET name = $2, bytes = $3, inodes = $4 WHERE id = $1", volume, name, bytes_, inodes
            )
            if changed != "UPDATE 1":
                raise OSError(errno.ESTALE, "somebody else has deleted what was being loaded: load it again")
            await keeper.execute("COMMIT")
    except FileExistsError:
        raise FileExistsError(
            errno.EEXIST, f"a volume {name.decode()} has been made meanwhile: load it again"
        ) from None


class _failures:
    """What the database raises becomes ``OSError``, and ValueError for rows that contradict each other."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, OSError):
            return
        if isinstance(error, asyncpg.UniqueViolationError):
            if error.table_name == "volume":
                raise FileExistsError(errno.EEXIST, "there is such a volume already: give another name") from None
            raise ValueError(f"contradictory rows: {error}") from error
        if isinstance(error, FAILURES):
            raise os_error(error) from error
