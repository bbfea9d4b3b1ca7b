"""The rows of the metadata: plain records that every layer above the store shares.

Times are integers in nanoseconds since the epoch and may be negative. Sizes and offsets are bytes. Names, link
targets and attribute values are bytes, never text.
"""

from __future__ import annotations

import fcntl
import stat
from enum import IntEnum

import msgspec

ROOT_INO = 1
"""Inode number of the root directory; the FUSE protocol fixes it (FUSE_ROOT_ID)."""

NAME_MAX = 255
"""Longest name of a directory entry, bytes."""

PATH_MAX = 4096
"""Longest symbolic link target including its NUL, bytes (limits.h)."""

LINK_MAX = 1_000_000
"""Most hard links to one file, and most subdirectories of one directory; beyond: EMLINK."""

FILE_SIZE_MAX = 1 << 62
"""Largest file, bytes; beyond: EFBIG."""

XATTR_NAME_MAX = 255
XATTR_SIZE_MAX = 65536
XATTR_LIST_MAX = 65536
"""Limits of extended attributes (linux/limits.h): name, value, and the list of all names of one inode, bytes."""

FIRST_COOKIE = 16
"""The smallest cookie of a dentry; those below are for ``.`` and ``..``, and 0 is the beginning of a listing."""

INLINE_MAX = 4096
"""Largest file whose contents stand in its inode row, bytes."""

DIRECTORY_SIZE = 4096
"""What stat tells as the size of any directory, bytes."""

BLOCK = 512
"""The unit of st_blocks, bytes."""


INODE_XATTR = 1
"""Flag of an inode: it has extended attributes (ACLs among them)."""

INODE_ACCESS_ACL = 2
INODE_DEFAULT_ACL = 4
INODE_UNNAMED = 8
"""Flag of an inode: made without a name and never linked, so it may still get one (kernel: I_LINKABLE)."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks: the file-system uid and gid of the calling process (fsuid, fsgid) and its pid."""

    uid: int
    gid: int
    pid: int = 0


class Inode(msgspec.Struct, array_like=True):
    """One inode row. ``mode`` holds the file type and the 12 permission bits, as st_mode does.

    ``allocated`` is what st_blocks tells, in bytes: the extents' lengths, or the length of the inline contents.
    ``parent`` is the directory of a directory (for ``..``); of other kinds the one they were made in.
    ``attr_version`` grows with every change of attributes, ``data_version`` with every change of contents.
    """

    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    allocated: int
    atime: int
    mtime: int
    ctime: int
    btime: int
    rdev: int
    parent: int
    attr_version: int = 0
    data_version: int = 0
    inline: bytes | None = None
    flags: int = 0
    """``INODE_*`` bits: what rows outside the inode row it has, so that nobody looks for rows that are not there."""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)


class Dentry(msgspec.Struct, frozen=True):
    """One name in a directory. ``cookie`` grows with every dentry made and orders the listing: it never changes
    while the name stays, and never comes back."""

    cookie: int
    name: bytes
    ino: int
    kind: int
    """File type bits (``stat.S_IFMT(mode)``)."""


class Extent(msgspec.Struct, frozen=True):
    """``length`` bytes of a file at ``offset`` are the bytes of segment ``segment`` at ``segment_offset``.
    What no extent covers is a hole (or the inline contents)."""

    offset: int
    length: int
    segment: int
    segment_offset: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Segment(msgspec.Struct, frozen=True):
    """An immutable object of the store that holds ``size`` bytes of contents, in *frames*, in order and without gaps:
    ``(length, stored length, CRC-32C)`` each, where the CRC is that of the ``length`` bytes of contents and the object
    is as long as the stored lengths together. Extents refer to the contents, whatever ``coding`` (data/frames.py) has
    made of them."""

    id: int
    size: int
    frames: tuple[tuple[int, int, int], ...]
    coding: int = 0


class DataCommit(msgspec.Struct):
    """The new contents of one file since its last commit, applied in this order: extents (and inline contents) that
    overlap ``drops`` are cut away, then ``extents`` are added (their ranges are cut away first too), then ``inline``,
    when not None, replaces all contents. ``mtime`` None leaves the times alone."""

    ino: int
    size: int
    mtime: int | None
    drops: list[tuple[int, int]] = []
    """Ranges ``(start, end)`` that read as zero from now on; a truncation is ``(new size, FILE_SIZE_MAX)``."""
    extents: list[Extent] = []
    inline: bytes | None = None


class Move(msgspec.Struct, frozen=True):
    """The bytes that ``extent`` of file ``ino`` refers to are those of ``segment`` at ``offset`` too."""

    ino: int
    extent: Extent
    segment: int
    offset: int


class SetAttr(msgspec.Struct):
    """What a setattr changes; None stays as it is. Sizes are no attribute here: they change with the contents."""

    mode: int | None = None
    """The 12 permission bits."""
    uid: int | None = None
    gid: int | None = None
    atime: int | None = None
    mtime: int | None = None
    kill_suidgid: bool = False
    """Clear set-user-ID, and set-group-ID where the group may execute (kernel: should_remove_suid)."""


class SessionRow(msgspec.Struct, frozen=True):
    """A client of the meta service, across its connections and the service's restarts."""

    id: int
    secret: bytes
    """SHA-256 of what only the client knows."""
    read_only: bool
    info: str
    """Who it is, for the administrator."""


class Usage(msgspec.Struct):
    """Counters of a volume: bytes of all files' allocations, inodes in use, and the volume's limits (0: none)."""

    bytes: int
    inodes: int
    bytes_limit: int = 0
    inodes_limit: int = 0


LOCK_END = (1 << 63) - 1
"""The last byte of a lock that goes to the end of the file, wherever that is."""


class LockKind(IntEnum):
    READ = fcntl.F_RDLCK
    WRITE = fcntl.F_WRLCK
    FREE = fcntl.F_UNLCK


class Lock(msgspec.Struct, frozen=True):
    """A lock on the bytes ``start`` to ``end``, both included. ``owner`` is the kernel's number for the process or the
    open file that holds it, ``pid`` the process that asked."""

    owner: int
    start: int
    end: int
    kind: LockKind
    pid: int = 0
