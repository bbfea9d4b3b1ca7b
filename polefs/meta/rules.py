"""The invariants of a volume's tables: one query each, that finds what breaks it, and the statements that mend it.

The order matters to repairing: what an earlier rule deletes, later rules need not look at. Names and inodes that lose
their place are put under ``/lost+found`` between NAMES and COUNTS.
"""

from __future__ import annotations

import stat
from enum import StrEnum
from typing import Final

import msgspec

from polefs.meta import acl
from polefs.meta.model import (
    DIRECTORY_SIZE,
    INLINE_MAX,
    INODE_ACCESS_ACL,
    INODE_DEFAULT_ACL,
    INODE_UNNAMED,
    INODE_XATTR,
    NAME_MAX,
    ROOT_INO,
)


class Kind(StrEnum):
    """What is wrong."""

    DATABASE = "database"
    ROOT = "root"
    DANGLING_NAME = "dangling name"
    BAD_NAME = "bad name"
    WRONG_KIND = "wrong kind"
    COOKIE = "cookie"
    DIRECTORY_LINKED_TWICE = "directory linked twice"
    UNREACHABLE = "unreachable"
    LOST = "lost inode"
    BAD_INODE = "bad inode"
    PARENT = "wrong parent"
    NLINK = "wrong link count"
    ORPHAN = "orphan"
    SYMLINK = "symbolic link"
    XATTR = "extended attribute"
    EXTENT = "extent"
    INLINE = "inline contents"
    ALLOCATED = "wrong allocation"
    SEGMENT = "segment"
    LIVE = "wrong live bytes"
    DELETION = "deletion"
    COUNTER = "counter"
    USAGE = "usage"
    OBJECT = "object"
    GARBAGE = "garbage object"


class Problem(msgspec.Struct, frozen=True):
    """One broken invariant. ``number`` is the inode's, or the segment's where the kind is about segments; 0:
    neither."""

    kind: Kind
    number: int
    text: str
    repairable: bool = True
    harmless: bool = False
    """Only wastes space; a crash may leave it behind."""


class Rule(msgspec.Struct, frozen=True):
    kind: Kind
    query: str
    """Rows ``(number, ...)``."""
    text: str
    """``str.format`` of the row."""
    mend: tuple[str, ...] = ()
    """Statements that mend all of them; none: not repairable."""


_DIR: Final = stat.S_IFDIR
_REG: Final = stat.S_IFREG
_LNK: Final = stat.S_IFLNK
_TYPE: Final = "mode & 61440"
_KINDS: Final = ", ".join(
    str(kind) for kind in (_REG, _DIR, _LNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
)
_ACCESS_KEY: Final = f"x'{acl.ACCESS.hex()}'"
_DEFAULT_KEY: Final = f"x'{acl.DEFAULT.hex()}'"

_NO_ROOT: Final = f"NOT EXISTS (SELECT 1 FROM inode WHERE ino = {ROOT_INO} AND {_TYPE} = {_DIR})"
_NO_INODE: Final = "ino NOT IN (SELECT ino FROM inode)"
_BAD_PARENT: Final = f"parent NOT IN (SELECT ino FROM inode WHERE {_TYPE} = {_DIR} AND nlink > 0)"
# A directory that has names but a link count of 0 is a wrong count, not a removed directory, when it is named itself.
_NOT_A_DIRECTORY: Final = (
    f"parent <> {ROOT_INO} AND {_BAD_PARENT} AND parent NOT IN"
    f" (SELECT d.ino FROM dentry AS d JOIN inode AS i ON i.ino = d.ino WHERE i.{_TYPE} = {_DIR})"
)
_IS_BAD_NAME: Final = (
    f"length(name) NOT BETWEEN 1 AND {NAME_MAX} OR instr(name, x'2f') OR instr(name, x'00') OR name IN (x'2e', x'2e2e')"
)
_SECOND_NAMES: Final = f"""
    SELECT parent, name, ino FROM (
        SELECT d.parent, d.name, d.ino, row_number() OVER (
            PARTITION BY d.ino ORDER BY d.parent <> i.parent, d.cookie) AS nth
        FROM dentry AS d JOIN inode AS i ON i.ino = d.ino WHERE i.{_TYPE} = {_DIR})
    WHERE nth > 1"""

_FLAGS: Final = f"""
    SELECT i.ino, i.flags, i.flags & ~{INODE_XATTR | INODE_ACCESS_ACL | INODE_DEFAULT_ACL}
        | CASE WHEN x.ino IS NULL THEN 0 ELSE {INODE_XATTR} | x.acls END AS should
    FROM inode AS i LEFT JOIN (
        SELECT ino, sum(CASE name WHEN {_ACCESS_KEY} THEN {INODE_ACCESS_ACL}
            WHEN {_DEFAULT_KEY} THEN {INODE_DEFAULT_ACL} ELSE 0 END) AS acls
        FROM xattr GROUP BY ino) AS x ON x.ino = i.ino
    WHERE i.flags <> should"""

_NLINKS: Final = f"""
    SELECT i.ino, i.nlink, CASE WHEN i.{_TYPE} <> {_DIR} THEN coalesce(n.names, 0)
        WHEN i.ino = {ROOT_INO} OR n.names > 0 THEN 2 + coalesce(s.subdirectories, 0) ELSE 0 END AS should
    FROM inode AS i
    LEFT JOIN (SELECT ino, count(*) AS names FROM dentry GROUP BY ino) AS n ON n.ino = i.ino
    LEFT JOIN (SELECT parent, count(*) AS subdirectories FROM dentry WHERE kind = {_DIR} GROUP BY parent) AS s
        ON s.parent = i.ino
    WHERE i.nlink <> should"""

_BAD_EXTENT: Final = f"""
    SELECT e.ino, e.offset, e.length FROM extent AS e
    LEFT JOIN inode AS i ON i.ino = e.ino LEFT JOIN segment AS s ON s.id = e.segment
    WHERE i.ino IS NULL OR i.{_TYPE} <> {_REG} OR s.id IS NULL OR e.offset < 0 OR e.length <= 0
        OR e.segment_offset < 0 OR e.segment_offset + e.length > s.size OR e.offset >= i.size"""
_OVERLAPS: Final = """
    SELECT ino, offset, before FROM (
        SELECT ino, offset, lag(offset + length) OVER (PARTITION BY ino ORDER BY offset) AS before FROM extent)
    WHERE offset < before"""
_PAST_END: Final = (
    "SELECT e.ino, e.offset, i.size FROM extent AS e JOIN inode AS i ON i.ino = e.ino"
    " WHERE e.offset < i.size AND e.offset + e.length > i.size"
)
_ALLOCATIONS: Final = """
    SELECT i.ino, i.allocated, coalesce(length(i.inline), e.bytes, 0) AS should FROM inode AS i
    LEFT JOIN (SELECT ino, sum(length) AS bytes FROM extent GROUP BY ino) AS e ON e.ino = i.ino
    WHERE i.allocated <> should"""
_LIVES: Final = """
    SELECT s.id, s.live, coalesce(e.bytes, 0) AS should FROM segment AS s
    LEFT JOIN (SELECT segment, sum(length) AS bytes FROM extent GROUP BY segment) AS e ON e.segment = s.id
    WHERE s.live <> should"""
_IS_BAD_INLINE: Final = f"inline IS NOT NULL AND ({_TYPE} <> {_REG} OR length(inline) > min(size, {INLINE_MAX}))"


def _counter(column: str, table: str, id_: str) -> Rule:
    highest = f"(SELECT coalesce(max({id_}), 0) FROM {table})"
    return Rule(
        Kind.COUNTER,
        f"SELECT 0, {column}, {highest} FROM volume WHERE {column} <= {highest}",
        f"{column} is {{1}}, but {{2}} is in use",
        (f"UPDATE volume SET {column} = max({column}, {highest} + 1)",),
    )


NAMES: Final = (
    _counter("next_ino", "inode", "ino"),
    _counter("next_cookie", "dentry", "cookie"),
    _counter("next_segment", "segment", "id"),
    Rule(
        Kind.ROOT,
        f"SELECT {ROOT_INO} WHERE {_NO_ROOT}",
        "there is no root directory",
        (
            f"REPLACE INTO inode SELECT {ROOT_INO}, {_DIR | 0o755}, 0, 0, 2, {DIRECTORY_SIZE},"
            f" 0, 0, 0, 0, 0, 0, {ROOT_INO}, 0, 0, NULL, 0 WHERE {_NO_ROOT}",
        ),
    ),
    Rule(
        Kind.DANGLING_NAME,
        f"SELECT ino, parent, name FROM dentry WHERE {_NO_INODE}",
        "name {2!r} in directory {1} has no inode",
        (f"DELETE FROM dentry WHERE {_NO_INODE}",),
    ),
    Rule(
        Kind.DANGLING_NAME,
        f"SELECT ino, parent, name FROM dentry WHERE {_NOT_A_DIRECTORY}",
        "name {2!r} is in {1}, which is no directory or has been removed",
        (f"DELETE FROM dentry WHERE {_NOT_A_DIRECTORY}",),
    ),
    Rule(
        Kind.BAD_NAME,
        f"SELECT ino, parent, name FROM dentry WHERE {_IS_BAD_NAME}",
        "name {2!r} in directory {1} is none that a directory may hold",
        (f"DELETE FROM dentry WHERE {_IS_BAD_NAME}",),
    ),
    Rule(
        Kind.ROOT,
        f"SELECT ino, parent, name FROM dentry WHERE ino = {ROOT_INO}",
        "name {2!r} in directory {1} is the root directory",
        (f"DELETE FROM dentry WHERE ino = {ROOT_INO}",),
    ),
    Rule(
        Kind.DIRECTORY_LINKED_TWICE,
        f"SELECT ino, parent, name FROM ({_SECOND_NAMES})",
        "name {2!r} in directory {1} is a second name of a directory",
        (f"DELETE FROM dentry WHERE (parent, name) IN (SELECT parent, name FROM ({_SECOND_NAMES}))",),
    ),
    Rule(
        Kind.WRONG_KIND,
        f"SELECT d.ino, d.parent, d.name FROM dentry AS d JOIN inode AS i ON i.ino = d.ino WHERE d.kind <> i.{_TYPE}",
        "name {2!r} in directory {1} tells the wrong kind",
        (f"UPDATE dentry SET kind = i.{_TYPE} FROM inode AS i WHERE i.ino = dentry.ino AND kind <> i.{_TYPE}",),
    ),
    Rule(
        Kind.COOKIE,
        "SELECT max(ino), parent, cookie FROM dentry GROUP BY parent, cookie HAVING count(*) > 1",
        "two names in directory {1} have the cookie {2}",
        (
            """UPDATE dentry SET cookie = new.cookie FROM (
                SELECT d.parent, d.name, row_number() OVER () + (SELECT next_cookie FROM volume) AS cookie
                FROM dentry AS d JOIN (
                    SELECT parent, cookie FROM dentry GROUP BY parent, cookie HAVING count(*) > 1) AS twice
                ON twice.parent = d.parent AND twice.cookie = d.cookie) AS new
            WHERE dentry.parent = new.parent AND dentry.name = new.name""",
            "UPDATE volume SET next_cookie = max(next_cookie, (SELECT coalesce(max(cookie), 0) + 1 FROM dentry))",
        ),
    ),
)
"""What must hold before the tree can be walked."""

UNREACHABLE: Final = f"""
    WITH RECURSIVE reached(ino) AS (
        SELECT {ROOT_INO} UNION
        SELECT d.ino FROM dentry AS d JOIN reached ON d.parent = reached.ino WHERE d.kind = {_DIR})
    SELECT i.ino FROM inode AS i WHERE i.{_TYPE} = {_DIR} AND i.ino NOT IN reached
        AND (i.nlink > 0 OR i.ino IN (SELECT ino FROM dentry) OR i.ino IN (SELECT parent FROM dentry))
    ORDER BY i.ino IN (SELECT ino FROM dentry), i.ino"""
"""Directories that no path from the root leads to, those without any name first."""

LOST: Final = f"""
    SELECT ino FROM inode WHERE {_TYPE} <> {_DIR} AND nlink > 0 AND ino NOT IN (SELECT ino FROM dentry)
        AND ino NOT IN (SELECT ino FROM orphan)"""
"""Other inodes that should have a name and have none."""

COUNTS: Final = (
    Rule(
        Kind.BAD_INODE,
        f"SELECT ino, mode, size FROM inode WHERE {_TYPE} NOT IN ({_KINDS}) OR size < 0",
        "inode {0} has the mode {1:o} and the size {2}",
    ),
    Rule(
        Kind.PARENT,
        f"SELECT i.ino, i.parent, d.parent FROM dentry AS d JOIN inode AS i ON i.ino = d.ino"
        f" WHERE d.kind = {_DIR} AND i.parent <> d.parent",
        "directory {0} believes to be in {1}, but is in {2}",
        (
            f"UPDATE inode SET parent = d.parent FROM dentry AS d WHERE d.ino = inode.ino AND d.kind = {_DIR}"
            " AND inode.parent <> d.parent",
        ),
    ),
    Rule(
        Kind.PARENT,
        f"SELECT ino, parent FROM inode WHERE ino = {ROOT_INO} AND parent <> {ROOT_INO}",
        "the root directory believes to be in {1}",
        (f"UPDATE inode SET parent = {ROOT_INO} WHERE ino = {ROOT_INO}",),
    ),
    Rule(
        Kind.NLINK,
        _NLINKS,
        "inode {0} has the link count {1} instead of {2}",
        (f"UPDATE inode SET nlink = n.should FROM ({_NLINKS}) AS n WHERE n.ino = inode.ino",),
    ),
    Rule(
        Kind.ORPHAN,
        f"SELECT ino FROM orphan WHERE {_NO_INODE}",
        "orphan {0} does not exist",
        (f"DELETE FROM orphan WHERE {_NO_INODE}",),
    ),
    Rule(
        Kind.ORPHAN,
        "SELECT ino FROM orphan WHERE ino IN (SELECT ino FROM inode WHERE nlink > 0)",
        "inode {0} has names, but is noted as an orphan",
        ("DELETE FROM orphan WHERE ino IN (SELECT ino FROM inode WHERE nlink > 0)",),
    ),
    Rule(
        Kind.ORPHAN,
        "SELECT ino FROM inode WHERE nlink = 0 AND ino NOT IN (SELECT ino FROM orphan)",
        "inode {0} has no name and is not noted as an orphan",
        (
            "INSERT INTO orphan(ino, session) SELECT ino, 0 FROM inode"
            " WHERE nlink = 0 AND ino NOT IN (SELECT ino FROM orphan)",
        ),
    ),
    Rule(
        Kind.ORPHAN,
        f"SELECT ino FROM inode WHERE flags & {INODE_UNNAMED} AND nlink > 0",
        "inode {0} has a name, but is marked as one that never had any",
        (f"UPDATE inode SET flags = flags & ~{INODE_UNNAMED} WHERE flags & {INODE_UNNAMED} AND nlink > 0",),
    ),
    Rule(
        Kind.SYMLINK,
        f"SELECT ino FROM inode WHERE {_TYPE} = {_LNK} AND ino NOT IN (SELECT ino FROM symlink)",
        "symbolic link {0} has no target",
    ),
    Rule(
        Kind.SYMLINK,
        f"SELECT ino FROM symlink WHERE ino NOT IN (SELECT ino FROM inode WHERE {_TYPE} = {_LNK})",
        "there is a target for {0}, which is no symbolic link",
        (f"DELETE FROM symlink WHERE ino NOT IN (SELECT ino FROM inode WHERE {_TYPE} = {_LNK})",),
    ),
    Rule(
        Kind.SYMLINK,
        "SELECT i.ino, i.size, length(s.target) FROM symlink AS s JOIN inode AS i ON i.ino = s.ino"
        " WHERE i.size <> length(s.target)",
        "symbolic link {0} has the size {1} instead of {2}",
        (
            "UPDATE inode SET size = length(s.target) FROM symlink AS s"
            " WHERE s.ino = inode.ino AND size <> length(s.target)",
        ),
    ),
    Rule(
        Kind.XATTR,
        f"SELECT ino, name FROM xattr WHERE {_NO_INODE}",
        "attribute {1!r} belongs to inode {0}, which does not exist",
        (f"DELETE FROM xattr WHERE {_NO_INODE}",),
    ),
    Rule(
        Kind.XATTR,
        _FLAGS,
        "inode {0} has the flags {1:#x} instead of {2:#x}",
        (f"UPDATE inode SET flags = f.should FROM ({_FLAGS}) AS f WHERE f.ino = inode.ino",),
    ),
    Rule(
        Kind.EXTENT,
        _BAD_EXTENT,
        "the extent at {1} ({2} bytes) of inode {0} refers to what does not exist",
        (f"DELETE FROM extent WHERE (ino, offset) IN (SELECT ino, offset FROM ({_BAD_EXTENT}))",),
    ),
    Rule(
        Kind.EXTENT,
        _OVERLAPS,
        "the extent at {1} of inode {0} overlaps one that ends at {2}",
        (f"DELETE FROM extent WHERE (ino, offset) IN (SELECT ino, offset FROM ({_OVERLAPS}))",),
    ),
    Rule(
        Kind.EXTENT,
        _PAST_END,
        "the extent at {1} of inode {0} passes its size {2}",
        (
            f"UPDATE extent SET length = p.size - extent.offset FROM ({_PAST_END}) AS p"
            " WHERE p.ino = extent.ino AND p.offset = extent.offset",
        ),
    ),
    Rule(
        Kind.INLINE,
        f"SELECT ino, size, length(inline) FROM inode WHERE {_IS_BAD_INLINE}",
        "inode {0} of size {1} has {2} inline bytes",
        (
            f"UPDATE inode SET inline = CASE WHEN {_TYPE} = {_REG} THEN"
            f" nullif(substr(inline, 1, min(size, {INLINE_MAX})), x'') END WHERE {_IS_BAD_INLINE}",
        ),
    ),
    Rule(
        Kind.INLINE,
        "SELECT ino, size FROM inode WHERE inline IS NOT NULL AND ino IN (SELECT ino FROM extent)",
        "inode {0} has inline contents and extents",
        ("UPDATE inode SET inline = NULL WHERE inline IS NOT NULL AND ino IN (SELECT ino FROM extent)",),
    ),
    Rule(
        Kind.ALLOCATED,
        _ALLOCATIONS,
        "inode {0} has {1} bytes allocated instead of {2}",
        (f"UPDATE inode SET allocated = a.should FROM ({_ALLOCATIONS}) AS a WHERE a.ino = inode.ino",),
    ),
    Rule(
        Kind.LIVE,
        _LIVES,
        "segment {0} has {1} live bytes instead of {2}",
        (f"UPDATE segment SET live = l.should FROM ({_LIVES}) AS l WHERE l.id = segment.id",),
    ),
    Rule(
        Kind.DELETION,
        "SELECT segment FROM deletion WHERE segment NOT IN (SELECT id FROM segment WHERE live = 0)",
        "segment {0} is queued for deletion, but is in use or does not exist",
        ("DELETE FROM deletion WHERE segment NOT IN (SELECT id FROM segment WHERE live = 0)",),
    ),
    Rule(
        Kind.DELETION,
        "SELECT id FROM segment WHERE live = 0 AND id NOT IN (SELECT segment FROM deletion)",
        "segment {0} is dead, but not queued for deletion",
        (
            "INSERT INTO deletion(segment, since) SELECT id, 0 FROM segment"
            " WHERE live = 0 AND id NOT IN (SELECT segment FROM deletion)",
        ),
    ),
)
"""Everything else."""
