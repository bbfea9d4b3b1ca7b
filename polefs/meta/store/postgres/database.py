"""A database of volumes: its tables, brought to this software's version, and making, finding and deleting volumes."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
import uuid
from typing import Any, Final

import asyncpg
import msgspec

from polefs.meta.model import DIRECTORY_SIZE, FIRST_COOKIE, ROOT_INO, Inode
from polefs.meta.store.base import FormatError
from polefs.meta.store.postgres import tables
from polefs.meta.store.postgres.connection import again, connect_first, describe, is_conflict, os_error

log = logging.getLogger(__name__)

_DEADLINE: Final = 30.0

_VERSION_TABLE: Final = "CREATE TABLE IF NOT EXISTS version(id INT8 NOT NULL PRIMARY KEY, version INT8 NOT NULL)"

_CHUNK: Final = 10_000
"""Rows of a volume deleted in one transaction."""

_DELETED: Final = b"\0"
"""How the name of a volume begins of which a part may be deleted."""

UNFINISHED: Final = b"\1"
"""The same of one that is being loaded."""


class VolumeRow(msgspec.Struct, frozen=True):
    """What does not change about a volume. ``holder`` tells of the active server, empty: there is none."""

    id: int
    name: str
    uuid: uuid.UUID
    created: int
    durability: str
    holder: str


async def open_database(dsn: str, *, read_only: bool = False) -> asyncpg.Connection[Any]:
    """A connection to a database whose tables are there and of this version; made when they are not. ``OSError`` in one
    line when it is out of reach, ``FormatError`` when the tables are newer, or missing and ``read_only``."""
    connection = await connect_first(dsn)
    try:
        await _migrate(connection, describe(dsn), read_only)
    except BaseException as error:
        connection.terminate()
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            raise OSError(
                errno.EACCES, f"the user may not make tables in {describe(dsn)}: grant it CREATE on the database"
            ) from None
        if isinstance(error, asyncpg.PostgresError):
            raise os_error(error) from error
        raise
    return connection


async def _version(connection: asyncpg.Connection[Any]) -> int:
    try:
        return int(await connection.fetchval("SELECT version FROM version WHERE id = 1") or 0)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return 0


async def _migrate(connection: asyncpg.Connection[Any], where: str, read_only: bool) -> None:
    version = await _version(connection)
    if version == tables.VERSION:
        return
    if version > tables.VERSION:
        raise FormatError(
            f"the tables in {where} have version {version}, this polefs knows versions up to {tables.VERSION}:"
            " upgrade polefs"
        )
    if read_only:
        raise FormatError(f"{where} holds no volumes of this version of polefs")
    # Two servers may come at the same time: even IF NOT EXISTS fails then (duplicate object, unique violation).
    await again(_DEADLINE, _is_race)(_make_version_table, connection)
    await again(_DEADLINE, _is_race)(_apply_migrations, connection)
    log.info("%s: the tables were brought from version %d to %d", where, version, tables.VERSION)


def _is_race(error: BaseException) -> bool:
    return is_conflict(error) or isinstance(
        error,
        (
            asyncpg.UniqueViolationError,
            asyncpg.DuplicateTableError,
            asyncpg.DuplicateSchemaError,
            asyncpg.DuplicateObjectError,
        ),
    )


async def _make_version_table(connection: asyncpg.Connection[Any]) -> None:
    await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {tables.SCHEMA}")
    await connection.execute(_VERSION_TABLE)
    await connection.execute("INSERT INTO version(id, version) VALUES (1, 0) ON CONFLICT (id) DO NOTHING")


async def _apply_migrations(connection: asyncpg.Connection[Any]) -> None:
    """In order, one server at a time: the others wait for the row."""
    async with connection.transaction():
        version = await connection.fetchval("SELECT version FROM version WHERE id = 1 FOR UPDATE")
        for statements in tables.MIGRATIONS[version:]:
            for statement in statements:
                await connection.execute(statement)
        await connection.execute("UPDATE version SET version = $1 WHERE id = 1", tables.VERSION)


# Volumes


async def create_volume(
    connection: asyncpg.Connection[Any], name: str, *, bytes_limit: int = 0, inodes_limit: int = 0
) -> VolumeRow:
    """Make an empty volume. ``FileExistsError`` when there is one of that name."""

    async def make() -> None:
        async with connection.transaction(isolation="serializable"):
            await connection.execute(
                "INSERT INTO volume(id, name, uuid, created, durability, bytes_limit, inodes_limit, bytes, inodes,"
                " next_ino, next_cookie, next_segment, next_session, writer, epoch, batch, holder, lease, contents)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, 0, 1, $8, $9, 1, 1, 0, 0, 0, $10, 0, $10)",
                row.id,
                name.encode(),
                row.uuid.bytes,
                row.created,
                row.durability.encode(),
                bytes_limit,
                inodes_limit,
                ROOT_INO + 1,
                FIRST_COOKIE,
                b"",
            )
            values = ([value] for value in msgspec.structs.astuple(root))
            await connection.execute(tables.INODE.put(), [row.id], *values)

    now = time.time_ns()
    # The number never comes back, so that whoever still works on a deleted volume finds nothing of another.
    row = VolumeRow(secrets.randbits(62) | 1, name, uuid.uuid4(), now, "local", "")
    root = Inode(ROOT_INO, 0o40755, os.geteuid(), os.getegid(), 2, DIRECTORY_SIZE, 0, now, now, now, now, 0, ROOT_INO)
    try:
        await again(_DEADLINE)(make)
    except asyncpg.UniqueViolationError:
        raise FileExistsError(errno.EEXIST, f"there is a volume {name} already: give another name") from None
    except asyncpg.PostgresError as error:
        raise os_error(error) from error
    return row


async def list_volumes(connection: asyncpg.Connection[Any]) -> list[VolumeRow]:
    """By name."""
    rows = [row for row in await connection.fetch(tables.VOLUMES) if not row[1].startswith((_DELETED, UNFINISHED))]
    return [_volume_row(row) for row in sorted(rows, key=lambda row: row[1])]


async def find_volume(connection: asyncpg.Connection[Any], name: str) -> VolumeRow:
    """``FileNotFoundError`` when there is none of that name."""
    row = await connection.fetchrow(f"{tables.VOLUMES} WHERE name = $1", name.encode())
    if row is None:
        raise FileNotFoundError(errno.ENOENT, f"there is no volume {name}: create it first")
    return _volume_row(row)


def _volume_row(row: Any) -> VolumeRow:
    id_, name, uuid_, created, durability, holder = row
    return VolumeRow(id_, name.decode(), uuid.UUID(bytes=uuid_), created, durability.decode(), holder[16:].decode())


async def delete_volume(connection: asyncpg.Connection[Any], name: str) -> None:
    """Delete a volume's metadata; a server that is active on it can change nothing from then on. Goes on with what an
    earlier deletion has left. ``FileNotFoundError``."""
    volume = await find_volume(connection, name)
    await again(_DEADLINE)(
        connection.execute,
        "UPDATE volume SET name = $2, epoch = epoch + 1, holder = $3 WHERE id = $1",
        volume.id,
        _DELETED + volume.uuid.bytes,
        b"",
    )
    for row in await connection.fetch(tables.VOLUMES):
        if row[1].startswith(_DELETED):
            await delete_rows(connection, row[0])


async def delete_rows(connection: asyncpg.Connection[Any], volume: int) -> None:
    """All that is stored of a volume that nobody can see any more."""
    for table in tables.TABLES:
        columns = ", ".join(f'"{column}"' for column in table.key)
        some = f"SELECT {columns} FROM {table.name} WHERE volume = $1 LIMIT {_CHUNK}"
        statement = f"DELETE FROM {table.name} WHERE volume = $1 AND ({columns}) IN ({some})"
        while await again(_DEADLINE)(connection.execute, statement, volume) != "DELETE 0":
            pass
    await again(_DEADLINE)(connection.execute, "DELETE FROM volume WHERE id = $1", volume)
