"""The rows of a volume in SQLite, read and changed inside the one transaction that is open, and the caches above them.

Inode rows are collected and written when the transaction commits, so that a directory in which many names are made is
written once. All other rows are written at once. Caches hold what the open transaction
sees; whoever rolls it back drops them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from lru import LRU

from polefs.meta.model import FILE_SIZE_MAX, Dentry, Extent, Inode, Segment, SessionRow, Usage
from polefs.meta.store import schema
from polefs.meta.store.base import SOLE
from polefs.meta.store.redo import Batch, Statement

_RESERVE = {"next_ino": 4096, "next_cookie": 4096, "next_segment": 1024, "next_session": 16}
_COUNTERS = ", ".join(_RESERVE)
_SET_COUNTERS = ", ".join(f"{column} = ?" for column in _RESERVE)
"""How many numbers one write of a counter sets aside; a crash skips what is left of them."""


_decode_frames = msgspec.msgpack.Decoder(tuple[tuple[int, int, int], ...]).decode


class Caches:
    """Bounded, least recently used first. Inodes with inline contents are bigger and have a cache of their own."""

    def __init__(self, inodes: int, inlined: int, names: int) -> None:
        self.inodes: LRU[int, Inode] = LRU(inodes)
        self.inlined: LRU[int, Inode] = LRU(inlined)
        self.names: LRU[tuple[int, bytes], int] = LRU(names)
        """(parent, name) -> inode number; 0: known not to exist."""

    def clear(self) -> None:
        self.inodes.clear()
        self.inlined.clear()
        self.names.clear()


def apply(cursor: sqlite3.Cursor, batch: Batch) -> None:
    """Do again what the redo log tells of."""
    for statement, row in batch.statements:
        cursor.execute(statement, row)
    cursor.executemany(schema.PUT_INODE, [msgspec.structs.astuple(inode) for inode in batch.inodes])


class SqliteTransaction:
    """Implements ``base.Transaction``; one object serves all transactions of a connection, one after the other."""

    def __init__(self, connection: sqlite3.Connection, caches: Caches, usage: Usage) -> None:
        cursor = self._cursor = connection.cursor()
        self._run = cursor.execute
        self._run_many = cursor.executemany
        self._caches = caches
        self._inodes = caches.inodes
        self._inlined = caches.inlined
        self._names = caches.names
        self._pending: dict[int, Inode] = {}
        """Rows to write before the commit."""
        self._statements: list[Statement] = []
        self._changed: dict[int, Inode] = {}
        """What this turn has changed: the redo log's next batch."""
        self._usage = usage
        self.session = SOLE
        self._next: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self.changes = 0
        """Rows changed so far, by all transactions."""
        self.reservations = 0
        """Counters written so far. No operation's own change: numbers set aside are everybody's."""
        self.load_counters()

    # Life of the transaction (the store's)

    def load_counters(self) -> None:
        """Read the counters again. Numbers already handed out stay so, those that were not committed too."""
        row = self._run(f"SELECT {_COUNTERS} FROM volume").fetchone()
        for column, value in zip(_RESERVE, row, strict=True):
            self._reserved[column] = value
            self._next[column] = max(self._next.get(column, 0), value)

    def store_counters(self) -> None:
        """Write the counters as they are, giving back what was set aside."""
        self._run(f"UPDATE volume SET {_SET_COUNTERS}", [self._next[column] for column in _RESERVE])

    def write_inodes(self) -> None:
        """Bring the collected inode rows into the database."""
        pending = self._pending
        if pending:
            self._run_many(schema.PUT_INODE, [msgspec.structs.astuple(inode) for inode in pending.values()])
            pending.clear()

    def _change(self, statement: str, row: tuple[Any, ...]) -> sqlite3.Cursor:
        self._statements.append((statement, row))
        return self._run(statement, row)

    def _change_many(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        self._statements += [(statement, row) for row in rows]
        self._run_many(statement, rows)

    def take_turn(self) -> tuple[list[Statement], list[Inode]]:
        """What has been changed since the last call, for the redo log."""
        statements, self._statements = self._statements, []
        inodes = list(self._changed.values())
        self._changed.clear()
        return statements, inodes

    def apply(self, batch: Batch) -> None:
        """Do again what the redo log tells of."""
        apply(self._cursor, batch)
        # As many rows as it was the first time: the commits come at the same pace.
        self.changes += len(batch.statements) + len(batch.inodes)

    def forget(self) -> None:
        """After a rollback: nothing that was read or collected is known any more."""
        self.drop()
        self.load_counters()

    def drop(self) -> None:
        """As ``forget``, without asking the database."""
        self._pending.clear()
        self._statements.clear()
        self._changed.clear()
        self._caches.clear()

    def prefetch(self, **wanted: Iterable[Any]) -> None:
        """Nothing is far away here."""

    # Inodes

    async def inode(self, ino: int) -> Inode | None:
        inode = self._inodes.get(ino) or self._inlined.get(ino) or self._pending.get(ino)
        if inode is None:
            row = self._run(schema.SELECT_INODE, (ino,)).fetchone()
            if row is None:
                return None
            inode = Inode(*row)
            self._cache(inode)
        return inode

    def _cache(self, inode: Inode) -> None:
        if inode.inline is None:
            self._inodes[inode.ino] = inode
        else:
            self._inlined[inode.ino] = inode

    def put_inode(self, inode: Inode) -> None:
        ino = inode.ino
        self.changes += 1
        self._pending[ino] = self._changed[ino] = inode
        inline = inode.inline
        if inline is None:
            self._inodes[ino] = inode
            self._inlined.pop(ino, None)
        else:
            self.changes += len(inline) // schema.PAGE_SIZE
            self._inlined[ino] = inode
            self._inodes.pop(ino, None)

    async def delete_inode(self, ino: int) -> None:
        self.changes += 1
        self._pending.pop(ino, None)
        self._changed.pop(ino, None)
        self._inodes.pop(ino, None)
        self._inlined.pop(ino, None)
        self._change("DELETE FROM inode WHERE ino = ?", (ino,))

    # Names

    async def dentry(self, parent: int, name: bytes) -> int:
        key = (parent, name)
        ino = self._names.get(key)
        if ino is None:
            row = self._run(schema.SELECT_DENTRY, key).fetchone()
            ino = self._names[key] = 0 if row is None else row[0]
        return ino

    async def dentries(self, parent: int, after: int, limit: int) -> list[Dentry]:
        return [Dentry(*row) for row in self._run(schema.LIST_DENTRIES, (parent, after, limit)).fetchall()]

    async def dentries_plus(self, parent: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]:
        rows = self._run(schema.LIST_DENTRIES, (parent, after, limit)).fetchall()
        found: list[tuple[Dentry, Inode]] = []
        inodes, inlined, pending = self._inodes, self._inlined, self._pending
        for row in rows:
            ino = row[2]
            inode = inodes.get(ino) or inlined.get(ino) or pending.get(ino)
            if inode is None:
                return self._join(parent, after, limit)
            found.append((Dentry(*row), inode))
        return found

    def _join(self, parent: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]:
        self.write_inodes()
        found = []
        names, cache = self._names, self._cache
        for row in self._run(schema.LIST_DENTRIES_PLUS, (parent, after, limit)).fetchall():
            dentry = Dentry(*row[:4])
            inode = Inode(*row[4:])
            names[parent, dentry.name] = inode.ino
            cache(inode)
            found.append((dentry, inode))
        return found

    async def is_empty(self, parent: int) -> bool:
        return self._run("SELECT 1 FROM dentry WHERE parent = ? LIMIT 1", (parent,)).fetchone() is None

    async def add_dentry(self, parent: int, name: bytes, ino: int, kind: int) -> bool:
        cookie = self._take("next_cookie", 1)
        row = (parent, name, ino, kind, cookie)
        if self._run(schema.ADD_DENTRY, row).rowcount == 0:
            return False
        self._statements.append((schema.ADD_DENTRY, row))
        self.changes += 2
        self._names[parent, name] = ino
        return True

    async def set_dentry(self, parent: int, name: bytes, ino: int, kind: int) -> None:
        self.changes += 2
        self._change("UPDATE dentry SET ino = ?, kind = ? WHERE parent = ? AND name = ?", (ino, kind, parent, name))
        self._names[parent, name] = ino

    async def move_dentry(self, parent: int, name: bytes, new_parent: int, new_name: bytes, ino: int) -> None:
        self.changes += 4
        cookie = self._take("next_cookie", 1)
        self._change(schema.MOVE_DENTRY, (new_parent, new_name, cookie, parent, name))
        names = self._names
        names[parent, name] = 0
        names[new_parent, new_name] = ino

    async def delete_dentry(self, parent: int, name: bytes) -> None:
        self.changes += 2
        self._change("DELETE FROM dentry WHERE parent = ? AND name = ?", (parent, name))
        self._names[parent, name] = 0

    # Numbers

    def _take(self, column: str, count: int) -> int:
        first = self._next[column]
        after = self._next[column] = first + count
        if after > self._reserved[column]:
            reserved = self._reserved[column] = after + _RESERVE[column]
            self.reservations += 1
            self._change(f"UPDATE volume SET {column} = ?", (reserved,))
        return first

    async def allocate_ino(self) -> int:
        return self._take("next_ino", 1)

    async def allocate_segments(self, count: int) -> int:
        return self._take("next_segment", count)

    async def exchange_writer(self, writer: int) -> int:
        previous: int = self._run("SELECT writer FROM volume").fetchone()[0]
        self.changes += 1
        self._change("UPDATE volume SET writer = ?", (writer,))
        return previous

    # What hangs on an inode

    async def symlink(self, ino: int) -> bytes | None:
        return self._blob("SELECT target FROM symlink WHERE ino = ?", (ino,))

    async def add_symlink(self, ino: int, target: bytes) -> None:
        self.changes += 1
        self._change("INSERT INTO symlink(ino, target) VALUES (?, ?)", (ino, target))

    async def delete_symlink(self, ino: int) -> None:
        self.changes += 1
        self._change("DELETE FROM symlink WHERE ino = ?", (ino,))

    async def xattr(self, ino: int, name: bytes) -> bytes | None:
        return self._blob("SELECT value FROM xattr WHERE ino = ? AND name = ?", (ino, name))

    async def xattr_names(self, ino: int) -> list[bytes]:
        return [row[0] for row in self._run("SELECT name FROM xattr WHERE ino = ? ORDER BY name", (ino,)).fetchall()]

    async def put_xattr(self, ino: int, name: bytes, value: bytes) -> None:
        self.changes += 1 + len(value) // schema.PAGE_SIZE
        self._change("REPLACE INTO xattr(ino, name, value) VALUES (?, ?, ?)", (ino, name, value))

    async def delete_xattr(self, ino: int, name: bytes) -> None:
        self.changes += 1
        self._change("DELETE FROM xattr WHERE ino = ? AND name = ?", (ino, name))

    async def delete_xattrs(self, ino: int) -> None:
        self.changes += 1
        self._change("DELETE FROM xattr WHERE ino = ?", (ino,))

    def _blob(self, statement: str, key: tuple[Any, ...]) -> bytes | None:
        row = self._run(statement, key).fetchone()
        if row is None:
            return None
        value: bytes = row[0]
        return value

    # Orphans and sessions

    async def orphans(self, after: tuple[int, int], limit: int) -> list[tuple[int, int]]:
        return self._run(
            "SELECT ino, session FROM orphan WHERE (ino, session) > (?, ?) ORDER BY ino, session LIMIT ?",
            (*after, limit),
        ).fetchall()

    async def orphan_sessions(self, ino: int) -> list[int]:
        return [row[0] for row in self._run("SELECT session FROM orphan WHERE ino = ?", (ino,)).fetchall()]

    async def add_orphan(self, ino: int, session: int) -> None:
        self.changes += 1
        self._change("REPLACE INTO orphan(ino, session) VALUES (?, ?)", (ino, session))

    async def delete_orphan(self, ino: int, session: int | None) -> None:
        self.changes += 1
        if session is None:
            self._change("DELETE FROM orphan WHERE ino = ?", (ino,))
        else:
            self._change("DELETE FROM orphan WHERE ino = ? AND session = ?", (ino, session))

    async def sessions(self) -> list[SessionRow]:
        rows = self._run("SELECT id, secret, read_only, info FROM session ORDER BY id").fetchall()
        return [SessionRow(row[0], row[1], bool(row[2]), row[3]) for row in rows]

    async def allocate_session(self) -> int:
        return self._take("next_session", 1)

    async def put_session(self, row: SessionRow) -> None:
        self.changes += 1
        self._change(
            "REPLACE INTO session(id, secret, read_only, info) VALUES (?, ?, ?, ?)",
            (row.id, row.secret, int(row.read_only), row.info),
        )

    async def delete_session(self, session: int) -> None:
        self.changes += 1
        self._change("DELETE FROM session WHERE id = ?", (session,))
        self._change("DELETE FROM reply WHERE session = ?", (session,))

    async def replies(self, session: int) -> list[tuple[int, bytes]]:
        return self._run("SELECT id, reply FROM reply WHERE session = ? ORDER BY id", (session,)).fetchall()

    async def put_reply(self, session: int, id_: int, reply: bytes) -> None:
        self.changes += 1
        self._change("REPLACE INTO reply(session, id, reply) VALUES (?, ?, ?)", (session, id_, reply))

    async def delete_replies(self, session: int, last: int) -> None:
        self.changes += 1
        self._change("DELETE FROM reply WHERE session = ? AND id <= ?", (session, last))

    # Contents

    async def extents(self, ino: int, start: int, end: int) -> list[Extent]:
        extents = [Extent(*row) for row in self._run(schema.SELECT_EXTENTS, (ino, start, end)).fetchall()]
        if extents and extents[0].end <= start:
            del extents[0]
        return extents

    async def put_extents(self, ino: int, extents: Sequence[Extent]) -> None:
        self.changes += len(extents)
        self._change_many(
            schema.PUT_EXTENT, [(ino, each.offset, each.length, each.segment, each.segment_offset) for each in extents]
        )

    async def delete_extents(self, ino: int, start: int, end: int) -> list[tuple[int, int]]:
        key = (ino, start, end)
        sums: list[tuple[int, int]] = self._run(
            "SELECT segment, sum(length) FROM extent WHERE ino = ? AND offset >= ? AND offset < ? GROUP BY segment", key
        ).fetchall()
        if sums:
            deleted = self._change("DELETE FROM extent WHERE ino = ? AND offset >= ? AND offset < ?", key).rowcount
            self.changes += deleted
        return sums

    async def extent_boundary(self, ino: int, count: int) -> int:
        row = self._run(
            "SELECT offset FROM extent WHERE ino = ? ORDER BY offset LIMIT 1 OFFSET ?", (ino, count)
        ).fetchone()
        return FILE_SIZE_MAX if row is None else row[0]

    async def segment(self, segment: int) -> Segment | None:
        row = self._run("SELECT id, size, frames, coding FROM segment WHERE id = ?", (segment,)).fetchone()
        return None if row is None else Segment(row[0], row[1], _decode_frames(row[2]), row[3])

    async def live_bytes(self, segment: int) -> int | None:
        row = self._run("SELECT live FROM segment WHERE id = ?", (segment,)).fetchone()
        return None if row is None else row[0]

    async def add_segments(self, segments: Sequence[tuple[Segment, int]]) -> None:
        self.changes += len(segments)
        self._change_many(
            "INSERT INTO segment(id, size, live, frames, coding) VALUES (?, ?, ?, ?, ?)",
            [(each.id, each.size, live, msgspec.msgpack.encode(each.frames), each.coding) for each, live in segments],
        )

    async def add_live(self, segment: int, delta: int) -> int | None:
        self.changes += 1
        rows = self._change(schema.ADD_LIVE, (delta, segment)).fetchall()
        return rows[0][0] if rows else None

    async def segment_usage(self, after: int, limit: int) -> list[tuple[int, int, int]]:
        return self._run(
            "SELECT id, size, live FROM segment WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
        ).fetchall()

    async def segment_extents(self, segment: int, limit: int) -> list[tuple[int, Extent]]:
        rows = self._run(
            "SELECT ino, offset, length, segment, segment_offset FROM extent WHERE segment = ? LIMIT ?",
            (segment, limit),
        ).fetchall()
        return [(row[0], Extent(*row[1:])) for row in rows]

    async def queue_deletion(self, segment: int, since: int) -> None:
        self.changes += 1
        self._change("REPLACE INTO deletion(segment, since) VALUES (?, ?)", (segment, since))

    async def dead_segments(self, before: int, after: int, limit: int) -> list[int]:
        rows = self._run(
            "SELECT segment FROM deletion WHERE segment > ? AND since <= ? ORDER BY segment LIMIT ?",
            (after, before, limit),
        ).fetchall()
        return [row[0] for row in rows]

    async def delete_segments(self, ids: Sequence[int]) -> None:
        self.changes += 2 * len(ids)
        keys = [(id_,) for id_ in ids]
        self._change_many("DELETE FROM segment WHERE id = ?", keys)
        self._change_many("DELETE FROM deletion WHERE segment = ?", keys)

    # Counters

    def usage(self) -> Usage:
        return self._usage

    def add_usage(self, bytes_: int, inodes: int) -> None:
        self._usage.bytes += bytes_
        self._usage.inodes += inodes
