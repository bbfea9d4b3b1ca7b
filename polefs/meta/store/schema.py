"""The tables of a volume in SQLite, and the pragmas that go with them.

All tables hold integers and blobs. ``dentry`` is clustered by name for look-ups; its index by cookie carries the whole
row, so that a listing never leaves the index. Pages are small because a commit writes whole pages in which it has
changed a few rows: with 1 KiB pages the write-ahead log is about half as long as with 4 KiB ones, at the same speed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

import msgspec

from polefs.meta.model import Inode

Execute = Callable[..., sqlite3.Cursor]
"""``sqlite3.Connection.execute``."""

FORMAT: Final = 1
"""Version of the tables, in ``PRAGMA user_version``. A change that older programs cannot live with increments it."""

APPLICATION_ID: Final = 0x706F6C65
"""``PRAGMA application_id``: "pole"."""

PAGE_SIZE: Final = 1024

TABLES: Final = (
    """CREATE TABLE volume(
        id INTEGER PRIMARY KEY CHECK (id = 1),
        name TEXT NOT NULL, uuid BLOB NOT NULL, created INTEGER NOT NULL, durability TEXT NOT NULL,
        bytes_limit INTEGER NOT NULL, inodes_limit INTEGER NOT NULL,
        next_ino INTEGER NOT NULL, next_cookie INTEGER NOT NULL, next_segment INTEGER NOT NULL,
        next_session INTEGER NOT NULL, epoch INTEGER NOT NULL, redo INTEGER NOT NULL, writer INTEGER NOT NULL)""",
    """CREATE TABLE session(
        id INTEGER PRIMARY KEY, secret BLOB NOT NULL, read_only INTEGER NOT NULL, info TEXT NOT NULL)""",
    """CREATE TABLE reply(
        session INTEGER NOT NULL, id INTEGER NOT NULL, reply BLOB NOT NULL, PRIMARY KEY (session, id)) WITHOUT ROWID""",
    """CREATE TABLE inode(
        ino INTEGER PRIMARY KEY, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
        nlink INTEGER NOT NULL, size INTEGER NOT NULL, allocated INTEGER NOT NULL, atime INTEGER NOT NULL,
        mtime INTEGER NOT NULL, ctime INTEGER NOT NULL, btime INTEGER NOT NULL, rdev INTEGER NOT NULL,
        parent INTEGER NOT NULL, attr_version INTEGER NOT NULL, data_version INTEGER NOT NULL, inline BLOB,
        flags INTEGER NOT NULL)""",
    """CREATE TABLE dentry(
        parent INTEGER NOT NULL, name BLOB NOT NULL, ino INTEGER NOT NULL, kind INTEGER NOT NULL,
        cookie INTEGER NOT NULL, PRIMARY KEY (parent, name)) WITHOUT ROWID""",
    "CREATE INDEX dentry_cookie ON dentry(parent, cookie, ino, kind)",
    """CREATE TABLE extent(
        ino INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL, segment INTEGER NOT NULL,
        segment_offset INTEGER NOT NULL, PRIMARY KEY (ino, offset)) WITHOUT ROWID""",
    "CREATE INDEX extent_segment ON extent(segment)",
    # frames: MessagePack [[length, stored length, crc32c], ...]
    """CREATE TABLE segment(
        id INTEGER PRIMARY KEY, size INTEGER NOT NULL, live INTEGER NOT NULL, frames BLOB NOT NULL,
        coding INTEGER NOT NULL)""",
    "CREATE TABLE symlink(ino INTEGER PRIMARY KEY, target BLOB NOT NULL)",
    """CREATE TABLE xattr(
        ino INTEGER NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (ino, name)) WITHOUT ROWID""",
    """CREATE TABLE orphan(
        ino INTEGER NOT NULL, session INTEGER NOT NULL, PRIMARY KEY (ino, session)) WITHOUT ROWID""",
    # exact: 1 after a clean end; 0 while a session runs, which counts in memory
    """CREATE TABLE usage(
        id INTEGER PRIMARY KEY CHECK (id = 1), bytes INTEGER NOT NULL, inodes INTEGER NOT NULL,
        exact INTEGER NOT NULL)""",
    "CREATE TABLE deletion(segment INTEGER PRIMARY KEY, since INTEGER NOT NULL)",
)

INODE_COLUMNS: Final = tuple(field.name for field in msgspec.structs.fields(Inode))
"""The columns of ``inode`` in the order of the struct's fields, which is the order of the table."""

_COLUMNS: Final = ", ".join(INODE_COLUMNS)

# Constant strings: sqlite3 keeps the compiled statement of each.
SELECT_INODE: Final = f"SELECT {_COLUMNS} FROM inode WHERE ino = ?"
PUT_INODE: Final = f"REPLACE INTO inode({_COLUMNS}) VALUES ({', '.join('?' * len(INODE_COLUMNS))})"
SELECT_DENTRY: Final = "SELECT ino FROM dentry WHERE parent = ? AND name = ?"
ADD_DENTRY: Final = (
    "INSERT INTO dentry(parent, name, ino, kind, cookie) VALUES (?, ?, ?, ?, ?) ON CONFLICT(parent, name) DO NOTHING"
)
MOVE_DENTRY: Final = "UPDATE dentry SET parent = ?, name = ?, cookie = ? WHERE parent = ? AND name = ?"
ADD_LIVE: Final = "UPDATE segment SET live = live + ? WHERE id = ? RETURNING live"
LIST_DENTRIES: Final = (
    "SELECT cookie, name, ino, kind FROM dentry INDEXED BY dentry_cookie"
    " WHERE parent = ? AND cookie > ? ORDER BY cookie LIMIT ?"
)
LIST_DENTRIES_PLUS: Final = (
    "SELECT cookie, d.name, d.ino, d.kind, "
    + ", ".join(f"i.{column}" for column in INODE_COLUMNS)
    + " FROM dentry AS d INDEXED BY dentry_cookie CROSS JOIN inode AS i ON i.ino = d.ino"
    " WHERE d.parent = ? AND d.cookie > ? ORDER BY d.cookie LIMIT ?"
)
SELECT_EXTENTS: Final = (
    "SELECT offset, length, segment, segment_offset FROM extent WHERE ino = ?1 AND offset < ?3 AND offset >="
    " coalesce((SELECT max(offset) FROM extent WHERE ino = ?1 AND offset <= ?2), ?2) ORDER BY offset"
)
PUT_EXTENT: Final = "REPLACE INTO extent(ino, offset, length, segment, segment_offset) VALUES (?, ?, ?, ?, ?)"
