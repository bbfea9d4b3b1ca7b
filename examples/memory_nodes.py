"""The inodes of the memory file system."""

from __future__ import annotations

import errno
import stat
import time
from bisect import bisect_right
from collections.abc import Iterator

from examples.memory_data import Space, SparseData
from rawfuse import Attributes, FuseError

DAY = 86400 * 1_000_000_000
_FIRST_COOKIE = 3
"""Cookies 1 and 2 stand behind ``.`` and ``..``."""

_FEW = 32

FILE_MAX = 1 << 60
"""Largest size of a file, bytes."""


class Node:
    """An inode; also what fifos, sockets and devices are. ``attr`` goes into replies as it is."""

    __slots__ = ("attr", "lookups", "xattrs")

    def __init__(self, attr: Attributes) -> None:
        self.attr = attr
        self.lookups = 0
        """How many times the kernel was told of it and has not forgotten."""
        self.xattrs: dict[bytes, bytes] = {}

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.attr.mode)

    def changed(self, *, contents: bool = False) -> None:
        """Set ctime, and mtime when the contents changed, to now."""
        now = time.time_ns()
        self.attr.ctime = now
        if contents:
            self.attr.mtime = now

    def atime_is_due(self) -> bool:
        """Whether a read would set atime, by the rule of relatime (inode.c: relatime_need_update)."""
        attr = self.attr
        return attr.atime <= attr.mtime or attr.atime <= attr.ctime or time.time_ns() - attr.atime >= DAY

    def accessed(self) -> None:
        if self.atime_is_due():
            self.attr.atime = time.time_ns()

    def drop_set_ids(self) -> None:
        """What a write or truncation by somebody without CAP_FSETID, and any chown, does: setuid goes, setgid too where
        the group may execute, and so do file capabilities (fuse.h: HANDLE_KILLPRIV_V2)."""
        self.xattrs.pop(b"security.capability", None)
        self.attr.mode &= ~stat.S_ISUID
        if self.attr.mode & stat.S_IXGRP:
            self.attr.mode &= ~stat.S_ISGID


class Symlink(Node):
    __slots__ = ("target",)

    def __init__(self, attr: Attributes, target: bytes) -> None:
        super().__init__(attr)
        self.target = target
        attr.size = len(target)


class File(Node):
    """A regular file: ``attr.size`` and ``attr.blocks`` follow its data."""

    __slots__ = ("data",)

    def __init__(self, attr: Attributes, space: Space) -> None:
        super().__init__(attr)
        self.data = SparseData(space)

    def resize(self, size: int) -> None:
        """EFBIG above ``FILE_MAX``."""
        check_end(size)
        if size < self.attr.size:
            self.data.cut(size)
        self.modified(size)

    def modified(self, size: int) -> None:
        """After a change of the data: the size is ``size`` now."""
        self.attr.size = size
        self.attr.blocks = -(-self.data.stored // 512)
        self.changed(contents=True)


class Dentry:
    """A name in a directory; ``cookie`` is its place in listings, for as long as it exists."""

    __slots__ = ("alive", "cookie", "name", "node")

    def __init__(self, name: bytes, node: Node, cookie: int) -> None:
        self.name = name
        self.node = node
        self.cookie = cookie
        self.alive = True


class Directory(Node):
    """Names in the order of their creation. Cookies only grow, so a listing neither repeats nor misses a name that was
    there all the time, whatever is added and removed meanwhile."""

    __slots__ = ("_next", "_order", "names", "parent", "removed")

    def __init__(self, attr: Attributes, parent: Directory | None) -> None:
        super().__init__(attr)
        attr.nlink = 2
        attr.size = 4096
        self.parent = parent or self
        self.removed = False
        self.names: dict[bytes, Dentry] = {}
        self._order: list[Dentry] = []
        self._next = _FIRST_COOKIE

    def entry(self, name: bytes) -> Dentry:
        """ENOENT without such a name."""
        found = self.names.get(name)
        if found is None:
            raise FuseError(errno.ENOENT)
        return found

    def add(self, name: bytes, node: Node) -> None:
        """Add a name that is not there."""
        dentry = Dentry(name, node, self._next)
        self._next += 1
        self.names[name] = dentry
        self._order.append(dentry)
        self.moved_in(node)
        self.changed(contents=True)

    def remove(self, name: bytes) -> None:
        """Remove a name that is there."""
        dentry = self.names.pop(name)
        dentry.alive = False
        if len(self._order) > 2 * len(self.names) + _FEW:
            self._order = [one for one in self._order if one.alive]
        self.moved_out(dentry.node)
        self.changed(contents=True)

    def put(self, dentry: Dentry, node: Node) -> None:
        """Let a name that is there mean another inode."""
        self.moved_out(dentry.node)
        dentry.node = node
        self.moved_in(node)
        self.changed(contents=True)

    def moved_in(self, node: Node) -> None:
        """A subdirectory's ``..`` is a link to its parent."""
        if isinstance(node, Directory):
            node.parent = self
            self.attr.nlink += 1

    def moved_out(self, node: Node) -> None:
        if isinstance(node, Directory):
            self.attr.nlink -= 1

    def lies_in(self, other: Node) -> bool:
        """Whether it is ``other`` or below it."""
        at = self
        while at is not other and at.parent is not at:
            at = at.parent
        return at is other

    def listing(self, cookie: int) -> Iterator[tuple[bytes, Node, int]]:
        """``(name, inode, cookie)`` behind ``cookie``; 0 is the beginning."""
        if cookie < 1:
            yield b".", self, 1
        if cookie < 2:
            yield b"..", self.parent, 2
        order = self._order
        for index in range(bisect_right(order, cookie, key=_cookie), len(order)):
            dentry = order[index]
            if dentry.alive:
                yield dentry.name, dentry.node, dentry.cookie


def check_end(end: int) -> None:
    """EFBIG when a file may not reach that far."""
    if end > FILE_MAX:
        raise FuseError(errno.EFBIG)


def _cookie(dentry: Dentry) -> int:
    return dentry.cookie
