"""Checking the metadata of a volume (fsck): every invariant of its tables.

The volume must not be mounted. The checks stream; memory is needed for the directories' tree.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from polefs.meta import acl
from polefs.meta.model import DIRECTORY_SIZE, ROOT_INO
from polefs.meta.rules import COUNTS, LOST, NAMES, UNREACHABLE, Kind, Problem
from polefs.meta.store.schema import Execute
from polefs.meta.store.sqlite import SqliteStore

__all__ = ["Kind", "Problem", "check", "repair"]

_LOST_AND_FOUND = b"lost+found"


def check(store: SqliteStore) -> Iterator[Problem]:
    """Every broken invariant of the metadata. OSError when the database cannot be read."""
    for (text,) in store.rows("PRAGMA integrity_check"):
        if text != "ok":
            yield Problem(Kind.DATABASE, 0, text, repairable=False)
    for rule in (*NAMES, *COUNTS):
        for row in store.rows(rule.query):
            yield Problem(rule.kind, row[0], rule.text.format(*row), repairable=bool(rule.mend))
    for (ino,) in store.rows(UNREACHABLE):
        yield Problem(Kind.UNREACHABLE, ino, f"no path leads to directory {ino}")
    for (ino,) in store.rows(LOST):
        yield Problem(Kind.LOST, ino, f"inode {ino} has lost its names")
    for ino, name in _malformed_acls(store):
        yield Problem(Kind.XATTR, ino, f"{name.decode()} of inode {ino} is malformed")
    yield from _check_frames(store)
    counted = next(store.rows("SELECT coalesce(sum(allocated), 0), count(*) FROM inode"))
    noted = store.noted_usage()
    if noted != counted:
        yield Problem(
            Kind.USAGE,
            0,
            f"the volume counts {noted[0]} bytes and {noted[1]} inodes instead of {counted[0]} and {counted[1]}",
        )


def _malformed_acls(store: SqliteStore) -> Iterator[tuple[int, bytes]]:
    for ino, name, value in store.rows(
        "SELECT ino, name, value FROM xattr WHERE name IN (?, ?)", (acl.ACCESS, acl.DEFAULT)
    ):
        try:
            sound = bool(acl.parse(value))
        except OSError:
            sound = False
        if not sound:
            yield ino, name


def _frames(blob: bytes) -> list[tuple[int, int, int]]:
    return msgspec.msgpack.decode(blob, type=list[tuple[int, int, int]])


def _check_frames(store: SqliteStore) -> Iterator[Problem]:
    for id_, size, blob in store.rows("SELECT id, size, frames FROM segment"):
        try:
            lengths = [length for length, _, _ in _frames(blob)]
        except msgspec.MsgspecError:
            lengths = []
        if sum(lengths) != size or any(length <= 0 for length in lengths):
            yield Problem(Kind.SEGMENT, id_, f"the frames of segment {id_} do not make up its {size} bytes", False)


# Repairing


def repair(store: SqliteStore) -> None:
    """Mend all that can be mended, in one transaction: contradictions are removed, what has lost its name is put under
    ``/lost+found`` as ``#<inode number>``, and counts are taken anew. What is left, ``check`` tells again. OSError
    when the database fails; nothing has changed then."""
    with store.repairing() as execute:
        for rule in NAMES:
            for statement in rule.mend:
                execute(statement)
        _reattach(execute)
        for ino, name in list(_malformed_acls(store)):
            execute("DELETE FROM xattr WHERE ino = ? AND name = ?", (ino, name))
        for rule in COUNTS:
            for statement in rule.mend:
                execute(statement)
        # Contents may be others now: no cache is what the metadata tell of any more.
        execute("UPDATE volume SET writer = 0")


def _reattach(execute: Execute) -> None:
    lost = [ino for (ino,) in execute(LOST).fetchall()]
    # A directory that has a name and is out of reach is part of a ring, or below one: opening the ring at its first
    # member brings back the others.
    while unreachable := execute(UNREACHABLE).fetchall():
        ino = unreachable[0][0]
        execute("DELETE FROM dentry WHERE ino = ?", (ino,))
        _attach(execute, ino)
    for ino in lost:
        _attach(execute, ino)


def _attach(execute: Execute, ino: int) -> None:
    """Give an inode the name ``/lost+found/#ino``."""
    home = _lost_and_found(execute)
    _add_name(execute, home, b"#%d" % ino, ino)
    execute("UPDATE inode SET nlink = max(nlink, 1) WHERE ino = ?", (ino,))


def _lost_and_found(execute: Execute) -> int:
    name = _LOST_AND_FOUND
    while True:
        row = execute(
            "SELECT i.ino, i.mode & 61440 = 16384 FROM dentry AS d JOIN inode AS i ON i.ino = d.ino"
            " WHERE d.parent = ? AND d.name = ?",
            (ROOT_INO, name),
        ).fetchone()
        if row is None:
            break
        if row[1]:
            return int(row[0])
        name += b"_"
    ino = int(execute("SELECT next_ino FROM volume").fetchone()[0])
    execute("UPDATE volume SET next_ino = next_ino + 1")
    execute(
        "INSERT INTO inode SELECT ?, ?, uid, gid, 2, ?, 0, ctime, ctime, ctime, ctime, 0, ?, 0, 0, NULL, 0"
        " FROM inode WHERE ino = ?",
        (ino, 0o40700, DIRECTORY_SIZE, ROOT_INO, ROOT_INO),
    )
    _add_name(execute, ROOT_INO, name, ino)
    return ino


def _add_name(execute: Execute, parent: int, name: bytes, ino: int) -> None:
    while execute("SELECT 1 FROM dentry WHERE parent = ? AND name = ?", (parent, name)).fetchone() is not None:
        name += b"_"
    execute(
        "INSERT INTO dentry(parent, name, ino, kind, cookie)"
        " SELECT ?, ?, ino, mode & 61440, (SELECT next_cookie FROM volume) FROM inode WHERE ino = ?",
        (parent, name, ino),
    )
    execute("UPDATE volume SET next_cookie = next_cookie + 1")
