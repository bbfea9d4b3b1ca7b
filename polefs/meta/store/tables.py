"""The tables of a volume as every store has them, for what copies whole volumes from one store to another.

Sessions and their replies are not among them: they belong to a service, and a copy begins without any.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from polefs.meta.model import Inode

Row = tuple[Any, ...]
"""The values of all columns of a table, in order."""


class Table(msgspec.Struct, frozen=True):
    """``columns``: the primary key's come first, ``keys`` of them; ``row`` is the type of a row."""

    name: str
    columns: tuple[str, ...]
    keys: int
    row: Any

    @property
    def column_list(self) -> str:
        return ", ".join(f'"{column}"' for column in self.columns)


_INODE_COLUMNS: Final = tuple(field.encode_name for field in msgspec.structs.fields(Inode))
_INODE_ROW: Final = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, bytes | None, int]

TABLES: Final = (
    Table("inode", _INODE_COLUMNS, 1, _INODE_ROW),
    Table("dentry", ("parent", "name", "ino", "kind", "cookie"), 2, tuple[int, bytes, int, int, int]),
    Table("extent", ("ino", "offset", "length", "segment", "segment_offset"), 2, tuple[int, int, int, int, int]),
    Table("segment", ("id", "size", "live", "frames", "coding"), 1, tuple[int, int, int, bytes, int]),
    Table("symlink", ("ino", "target"), 1, tuple[int, bytes]),
    Table("xattr", ("ino", "name", "value"), 2, tuple[int, bytes, bytes]),
    Table("orphan", ("ino", "session"), 2, tuple[int, int]),
    Table("deletion", ("segment", "since"), 1, tuple[int, int]),
)


class VolumeState(msgspec.Struct, frozen=True, kw_only=True):
    """What a volume has once: who it is, its limits (0: none), and the next number of each kind."""

    name: str
    uuid: str
    created: int
    """Nanoseconds since the epoch."""
    durability: str
    bytes_limit: int
    inodes_limit: int
    next_ino: int
    next_cookie: int
    next_segment: int
