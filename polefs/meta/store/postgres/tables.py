"""The tables of all volumes in one PostgreSQL database, and the statements that read and write them.

``volume`` is the first column of every primary key. Columns are INT8 or BYTEA, and the statements keep to what
CockroachDB and YugabyteDB accept too (docs/postgresql.md): no extensions, no PL/pgSQL, no temporary tables, no advisory
locks, nothing that depends on the clock of the database.

Rows are found and written by statements that take one array a column of the key, the volume's too: a table is then
joined by its whole key, and a planner that has no statistics, or old ones, has no way but the primary key. (A constant
volume would let it read all of a volume's rows.) For the same reason the index for listings is one of an expression,
which no look-up of a name can be mistaken for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from polefs.meta.model import Inode


class Table(msgspec.Struct, frozen=True):
    """One kind of rows. A key is the tuple of ``key`` columns, or the value alone when there is one; a row is the tuple
    of all columns after ``volume``."""

    name: str
    key: tuple[str, ...]
    values: tuple[str, ...]
    blobs: frozenset[str] = frozenset()
    """Columns of BYTEA."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.key + self.values

    def type_of(self, column: str) -> str:
        return "BYTEA" if column in self.blobs else "INT8"

    def definition(self) -> str:
        columns = "".join(
            f', "{column}" {self.type_of(column)}{"" if column == "inline" else " NOT NULL"}' for column in self.columns
        )
        return f"CREATE TABLE IF NOT EXISTS {self.name}(volume INT8 NOT NULL{columns}, PRIMARY KEY ({self._key_list}))"

    @property
    def _key_list(self) -> str:
        return ", ".join(["volume", *(f'"{column}"' for column in self.key)])

    def insert(self) -> str:
        """Insert rows: an array a column, the volume's first."""
        columns = ", ".join(["volume", *(f'"{column}"' for column in self.columns)])
        return f"INSERT INTO {self.name}({columns}) SELECT * FROM {self._arrays(self.columns)}"

    def put(self) -> str:
        """Insert or replace rows, in the same way."""
        change = ", ".join(f'"{column}" = excluded."{column}"' for column in self.values)
        return f"{self.insert()} ON CONFLICT ({self._key_list}) DO {f'UPDATE SET {change}' if change else 'NOTHING'}"

    def delete(self) -> str:
        """Delete rows: an array a column of the key."""
        return f"DELETE FROM {self.name} WHERE ({self._key_list}) IN (SELECT * FROM {self._arrays(self.key)})"

    def _arrays(self, columns: Sequence[str]) -> str:
        return f"unnest({', '.join(f'${number}::{type_}' for number, type_ in enumerate(self.types(columns), 1))})"

    def types(self, columns: Sequence[str]) -> list[str]:
        return ["INT8[]", *(f"{self.type_of(column)}[]" for column in columns)]


_INODE_COLUMNS: Final = tuple(field.name for field in msgspec.structs.fields(Inode))

INODE: Final = Table("inode", ("ino",), _INODE_COLUMNS[1:], frozenset(["inline"]))
DENTRY: Final = Table("dentry", ("parent", "name"), ("ino", "kind", "cookie"), frozenset(["name"]))
EXTENT: Final = Table("extent", ("ino", "offset"), ("length", "segment", "segment_offset"))
SEGMENT: Final = Table("segment", ("id",), ("size", "live", "frames", "coding"), frozenset(["frames"]))
SYMLINK: Final = Table("symlink", ("ino",), ("target",), frozenset(["target"]))
XATTR: Final = Table("xattr", ("ino", "name"), ("value",), frozenset(["name", "value"]))
ORPHAN: Final = Table("orphan", ("ino", "session"), ())
SESSION: Final = Table("session", ("id",), ("secret", "read_only", "info"), frozenset(["secret", "info"]))
REPLY: Final = Table("reply", ("session", "id"), ("reply",), frozenset(["reply"]))
DELETION: Final = Table("deletion", ("segment",), ("since",))

TABLES: Final = (INODE, DENTRY, EXTENT, SEGMENT, SYMLINK, XATTR, ORPHAN, SESSION, REPLY, DELETION)

SCHEMA: Final = "polefs"
"""The namespace in the database that everything stands in."""

_VOLUME: Final = """CREATE TABLE IF NOT EXISTS volume(
    id INT8 NOT NULL PRIMARY KEY, name BYTEA NOT NULL UNIQUE, uuid BYTEA NOT NULL, created INT8 NOT NULL,
    durability BYTEA NOT NULL, bytes_limit INT8 NOT NULL, inodes_limit INT8 NOT NULL, bytes INT8 NOT NULL,
    inodes INT8 NOT NULL, next_ino INT8 NOT NULL, next_cookie INT8 NOT NULL, next_segment INT8 NOT NULL,
    next_session INT8 NOT NULL, writer INT8 NOT NULL, epoch INT8 NOT NULL,
    batch INT8 NOT NULL, holder BYTEA NOT NULL, lease INT8 NOT NULL, contents BYTEA NOT NULL)"""

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        _VOLUME,
        *(table.definition() for table in TABLES),
        "CREATE INDEX IF NOT EXISTS dentry_cookie ON dentry(volume, (parent + 0), cookie)",
        "CREATE INDEX IF NOT EXISTS extent_segment ON extent(volume, segment)",
    ),
)
"""What brings the tables from each version to the next, version 0 being none. Each can be repeated: where DDL is not
transactional, half of one may have happened."""

VERSION: Final = len(MIGRATIONS)
"""Version of the tables that this software reads and writes."""

# The lease and the counters of a volume

FENCE: Final = "SELECT 1 / count(*) FROM volume WHERE id = $1 AND epoch = $2 AND batch = $3"
"""Fails (22012, division by zero) unless the volume is as this server has left it: with PL/pgSQL ruled out, the way to
make a script fail half-way."""

MARK: Final = (
    "UPDATE volume SET batch = $2, bytes = $3, inodes = $4, next_ino = $5, next_cookie = $6, next_segment = $7,"
    " next_session = $8, writer = $9 WHERE id = $1"
)
MARK_TYPES: Final = 9

SET_LIVE: Final = (
    "UPDATE segment SET live = k.live FROM unnest($1::INT8[], $2::INT8[], $3::INT8[]) AS k(volume, id, live)"
    " WHERE segment.volume = k.volume AND segment.id = k.id"
)

DELETE_XATTRS: Final = "DELETE FROM xattr WHERE (volume, ino) IN (SELECT * FROM unnest($1::INT8[], $2::INT8[]))"

DELETE_HOLDERS: Final = "DELETE FROM orphan WHERE (volume, ino) IN (SELECT * FROM unnest($1::INT8[], $2::INT8[]))"
DELETE_REPLIES: Final = (
    "DELETE FROM reply WHERE (volume, session, id) IN (SELECT r.volume, r.session, r.id"
    " FROM unnest($1::INT8[], $2::INT8[], $3::INT8[]) AS k(volume, session, last)"
    " JOIN reply AS r ON r.volume = k.volume AND r.session = k.session AND r.id <= k.last)"
)

VOLUME_STATE: Final = (
    "SELECT epoch, batch, holder, lease, bytes, inodes, bytes_limit, inodes_limit, next_ino, next_cookie, next_segment,"
    " next_session, writer FROM volume WHERE id = $1"
)
VOLUMES: Final = "SELECT id, name, uuid, created, durability, holder FROM volume"
TAKE: Final = (
    "UPDATE volume SET epoch = epoch + 1, batch = batch + 1, holder = $4, lease = $5"
    " WHERE id = $1 AND epoch = $2 AND batch = $3"
)
"""Make a server the active one, if nothing has changed since the row was read."""
GIVE_BACK: Final = "UPDATE volume SET holder = $4 WHERE id = $1 AND epoch = $2 AND batch = $3"


def _prepared() -> dict[str, str]:
    statements = {
        "fence": f"PREPARE fence(INT8, INT8, INT8) AS {FENCE}",
        "mark": f"PREPARE mark({', '.join(['INT8'] * MARK_TYPES)}) AS {MARK}",
        "set_live": f"PREPARE set_live(INT8[], INT8[], INT8[]) AS {SET_LIVE}",
        "delete_xattrs": f"PREPARE delete_xattrs(INT8[], INT8[]) AS {DELETE_XATTRS}",
        "delete_holders": f"PREPARE delete_holders(INT8[], INT8[]) AS {DELETE_HOLDERS}",
        "delete_replies": f"PREPARE delete_replies(INT8[], INT8[], INT8[]) AS {DELETE_REPLIES}",
    }
    for table in TABLES:
        for verb, statement, columns in (
            ("put", table.put(), table.columns),
            ("delete", table.delete(), table.key),
        ):
            types = ", ".join(table.types(columns))
            statements[f"{verb}_{table.name}"] = f"PREPARE {verb}_{table.name}({types}) AS {statement}"
    return statements


PREPARE: Final = "; ".join(_prepared().values())
"""What a connection must have seen before it gets a script."""

BEGIN: Final = "BEGIN ISOLATION LEVEL SERIALIZABLE"


def execute(name: str, *arguments: int) -> str:
    return f"EXECUTE {name}({', '.join(map(str, arguments))})"


def execute_many(name: str, volume: int, columns: Sequence[Sequence[int | bytes | None]]) -> str:
    """A prepared statement with one array a column. Literals, because parameters cannot go with a script."""
    volumes = "'{" + ",".join([str(volume)] * len(columns[0])) + "}'"
    return f"EXECUTE {name}({', '.join([volumes, *map(_array, columns)])})"


def _array(values: Iterable[int | bytes | None]) -> str:
    # A backslash stands twice for the array's parser; none is special to that of SQL (standard_conforming_strings).
    return "'{" + ",".join(map(_element, values)) + "}'"


def _element(value: int | bytes | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(value)
    return f'"\\\\x{value.hex()}"'
