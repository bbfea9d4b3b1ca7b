"""The interface between the meta service and the database that holds its rows.

A store reads and writes rows and knows no semantics; the service gives it *bodies*: async functions ``body(tx, *args)``
that run in one transaction. A body may be run again from its start (a store across a network does so when it has
fetched what the body lacked), so it changes nothing but rows, awaits nothing but the transaction, and what it reads
depends on its arguments and on rows, not on the time. It checks first and changes afterwards: an ``OSError`` that it
raises before its first change fails that operation alone, one raised after a change rolls the transaction back.

Reads inside a body see what the same transaction wrote before. Methods that only collect rows for the commit are plain
functions; all others are coroutines, so that a store across a network fits. On SQLite they never suspend.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Concatenate, Final, ParamSpec, Protocol, TypeVar

from polefs.meta.model import Dentry, Extent, Inode, Segment, SessionRow, Usage

T = TypeVar("T")
P = ParamSpec("P")


class FormatError(Exception):
    """The database is no polefs volume, or one of a format that this version does not know."""


class Deposed(OSError):
    """Another process serves the volume now (ESTALE): what was asked for may be asked of that one, and what was under
    way it knows of if it was done."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE, os.strerror(errno.ESTALE))


class Session:
    """On whose behalf a body runs. ``holders`` tells which sessions use an inode that is losing its last name: they
    keep it as an orphan."""

    __slots__ = ("holders", "id")

    def __init__(self, id_: int, holders: Callable[[int], Iterable[int]]) -> None:
        self.id = id_
        self.holders = holders


SOLE: Final = Session(0, lambda ino: (0,))
"""The process that has the store open works for itself; nobody else does."""


class Reader(Protocol):
    """The rows as a body sees them. An inode that is returned is shared: replace it, never change it."""

    session: Session
    """``SOLE``, unless the body itself sets another before its first row; to be set back before it ends."""

    def prefetch(
        self,
        *,
        inodes: Iterable[int] = (),
        names: Iterable[tuple[int, bytes]] = (),
        ancestors: Iterable[int] = (),
        symlinks: Iterable[int] = (),
        xattrs: Iterable[tuple[int, bytes]] = (),
        extents: Iterable[tuple[int, int, int]] = (),
        cuts: Iterable[tuple[int, int, int]] = (),
        heads: Iterable[tuple[int, int]] = (),
        holders: Iterable[int] = (),
        segments: Iterable[int] = (),
        lives: Iterable[int] = (),
    ) -> None:
        """Tell what the body is going to read, so that a store across a network fetches it in one round trip; nothing
        depends on it. ``names``: dentries and the inodes behind them; ``ancestors``: directories and all above each;
        ``xattrs``: the value of that name, and the names of all; ``extents``: ranges ``(ino, start, end)``; ``cuts``:
        ranges of which extents will be deleted or shared, so with live bytes; ``heads``: ``(ino, count)``, the first
        extents and the boundary after them, with live bytes; ``holders``: the sessions of orphans; ``segments`` and
        ``lives``: ids."""
        ...

    async def inode(self, ino: int) -> Inode | None: ...

    async def dentry(self, parent: int, name: bytes) -> int:
        """The inode number behind a name, 0 when there is no such name."""
        ...

    async def dentries(self, parent: int, after: int, limit: int) -> list[Dentry]:
        """By cookie, those greater than ``after``."""
        ...

    async def dentries_plus(self, parent: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]: ...

    async def is_empty(self, parent: int) -> bool:
        """Whether the directory has no name in it."""
        ...

    async def symlink(self, ino: int) -> bytes | None: ...

    async def xattr(self, ino: int, name: bytes) -> bytes | None: ...

    async def xattr_names(self, ino: int) -> list[bytes]: ...

    async def extents(self, ino: int, start: int, end: int) -> list[Extent]:
        """Those that overlap ``[start, end)``, whole, by offset."""
        ...

    async def extent_boundary(self, ino: int, count: int) -> int:
        """The offset of the extent after the first ``count`` ones, FILE_SIZE_MAX when there are no more."""
        ...

    async def segment(self, segment: int) -> Segment | None: ...

    async def live_bytes(self, segment: int) -> int | None:
        """None when there is no such segment."""
        ...

    async def segment_usage(self, after: int, limit: int) -> list[tuple[int, int, int]]:
        """``(id, size, live bytes)`` of the segments with ids greater than ``after``, by id."""
        ...

    async def segment_extents(self, segment: int, limit: int) -> list[tuple[int, Extent]]:
        """``(ino, extent)`` of extents that refer to a segment."""
        ...

    async def dead_segments(self, before: int, after: int, limit: int) -> list[int]:
        """Segments greater than ``after``, by id, that were queued for deletion at or before the time ``before``
        (ns)."""
        ...

    async def orphans(self, after: tuple[int, int], limit: int) -> list[tuple[int, int]]:
        """``(ino, session)`` of orphans, greater than ``after``, ascending."""
        ...

    async def orphan_sessions(self, ino: int) -> list[int]:
        """The sessions that hold an inode without a name."""
        ...

    async def sessions(self) -> list[SessionRow]:
        """Those that have been put and not deleted, by id."""
        ...

    async def replies(self, session: int) -> list[tuple[int, bytes]]:
        """Those of a session that have been put and not deleted, by id."""
        ...

    def usage(self) -> Usage:
        """The counters as this transaction leaves them; the store's own record, not to be changed."""
        ...


class Transaction(Reader, Protocol):
    """Rows read and changed."""

    async def allocate_ino(self) -> int:
        """A number that no inode had before."""
        ...

    async def allocate_segments(self, count: int) -> int:
        """The first of ``count`` consecutive ids that no segment had before."""
        ...

    async def exchange_writer(self, writer: int) -> int:
        """Note who may change contents from now on; returns who could before."""
        ...

    def put_inode(self, inode: Inode) -> None:
        """Insert or replace the row; written once when the transaction commits."""
        ...

    async def delete_inode(self, ino: int) -> None: ...

    async def add_dentry(self, parent: int, name: bytes, ino: int, kind: int) -> bool:
        """Insert a name under a new cookie; False, and no change, when the name exists."""
        ...

    async def set_dentry(self, parent: int, name: bytes, ino: int, kind: int) -> None:
        """Let an existing name stand for another inode; its cookie stays."""
        ...

    async def move_dentry(self, parent: int, name: bytes, new_parent: int, new_name: bytes, ino: int) -> None:
        """Give the name of ``ino`` another place, where no name is, under a new cookie."""
        ...

    async def delete_dentry(self, parent: int, name: bytes) -> None: ...

    async def add_symlink(self, ino: int, target: bytes) -> None: ...

    async def delete_symlink(self, ino: int) -> None: ...

    async def put_xattr(self, ino: int, name: bytes, value: bytes) -> None: ...

    async def delete_xattr(self, ino: int, name: bytes) -> None: ...

    async def delete_xattrs(self, ino: int) -> None: ...

    async def put_extents(self, ino: int, extents: Sequence[Extent]) -> None:
        """Insert rows, or replace those at the same offset."""
        ...

    async def delete_extents(self, ino: int, start: int, end: int) -> list[tuple[int, int]]:
        """Delete the rows whose offset lies in ``[start, end)``; returns ``(segment, bytes)`` sums of what was
        deleted."""
        ...

    async def add_segments(self, segments: Sequence[tuple[Segment, int]]) -> None:
        """Insert segments, each with its live bytes."""
        ...

    async def add_live(self, segment: int, delta: int) -> int | None:
        """Change a segment's live bytes; returns the new count, None when there is no such segment."""
        ...

    async def queue_deletion(self, segment: int, since: int) -> None:
        """Note a segment that has been dead since then (ns)."""
        ...

    async def delete_segments(self, ids: Sequence[int]) -> None:
        """Delete the rows of segments and of their queued deletions."""
        ...

    async def add_orphan(self, ino: int, session: int) -> None:
        """Note an inode without a name that a session uses."""
        ...

    async def delete_orphan(self, ino: int, session: int | None) -> None:
        """None: whichever sessions it is noted for."""
        ...

    async def allocate_session(self) -> int:
        """A number that no session had before, greater than 0."""
        ...

    async def put_session(self, row: SessionRow) -> None: ...

    async def delete_session(self, session: int) -> None:
        """With its replies."""
        ...

    async def put_reply(self, session: int, id_: int, reply: bytes) -> None: ...

    async def delete_replies(self, session: int, last: int) -> None:
        """Those with ids up to ``last``."""
        ...

    def add_usage(self, bytes_: int, inodes: int) -> None: ...


class Store(Protocol):
    """A database of one volume, open for writing in one process at a time. Failures of the database are ``OSError``:
    ENOSPC, EIO, EROFS."""

    @property
    def read_only(self) -> bool: ...

    def cached_inode(self, ino: int) -> Inode | None:
        """The inode when it is in memory."""
        ...

    def cached_entry(self, parent: int, name: bytes) -> Inode | None:
        """The inode behind a name when both are in memory."""
        ...

    async def read(self, body: Callable[Concatenate[Reader, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a body that changes nothing."""
        ...

    async def write(
        self, body: Callable[Concatenate[Transaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a body and return its result once its changes are committed. EROFS when the store is read-only."""
        ...

    def end_turn(self) -> None:
        """No more operations come for now: commit those that wait. They go on within the call, which must not be made
        by a coroutine."""
        ...

    async def sync(self) -> None:
        """Returns once everything committed before the call survives the loss of power."""
        ...

    async def close(self) -> None:
        """Free everything. Nothing may be called afterwards."""
        ...
