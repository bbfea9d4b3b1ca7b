"""The meta service: the operations of ``MetaAPI`` over a store.

Each operation is one transaction whose body says what it means (``namespace``, ``attributes``, ``contents``); here are
only the ways into it: what the caches can tell is answered at once.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence

from msgspec.structs import replace

from polefs.meta import attributes, contents, namespace
from polefs.meta.errors import error
from polefs.meta.holding import Holding
from polefs.meta.locks import SessionLocks
from polefs.meta.model import Caller, DataCommit, Dentry, Extent, Inode, Move, Segment, SessionRow, SetAttr, Usage
from polefs.meta.store.base import Reader, Store, Transaction

_BATCH = 128
"""Inodes removed in one transaction."""


class MetaService:
    """Implements ``api.MetaAPI``. The only user of a volume calls ``start`` before the first request and ``close`` at
    the end; sessions that share one (``sessions.Sessions``) do neither, and tell what they hold."""

    def __init__(self, store: Store, holding: Holding | None = None, locks: SessionLocks | None = None) -> None:
        self._store = store
        self._locks = SessionLocks() if locks is None else locks
        self.get_lock = self._locks.test
        self.set_lock = self._locks.set
        self._holding = holding
        self._read = store.read
        self._write = store.write
        self._cached_inode = store.cached_inode
        self._cached_entry = store.cached_entry

    async def start(self) -> None:
        """Whoever used the volume before is gone: end their sessions, remove their orphans."""
        if not self._store.read_only:
            for row in await self._read(_sessions):
                await self._write(_end_session, row.id)
            await self._release_all()

    # Names

    async def lookup(self, parent: int, name: bytes) -> Inode:
        inode = self._cached_entry(parent, name)
        return inode if inode is not None else await self._read(namespace.lookup, parent, name)

    async def make_node(
        self,
        caller: Caller,
        parent: int,
        name: bytes,
        mode: int,
        umask: int,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        return await self._write(namespace.make_node, caller, parent, name, mode, umask, rdev, target)

    async def make_unnamed(self, caller: Caller, parent: int, mode: int, umask: int) -> Inode:
        return await self._write(namespace.make_unnamed, caller, parent, mode, umask)

    async def link(self, ino: int, parent: int, name: bytes) -> Inode:
        return await self._write(namespace.link, ino, parent, name)

    async def unlink(self, parent: int, name: bytes) -> Inode:
        return await self._write(namespace.unlink, parent, name)

    async def rmdir(self, parent: int, name: bytes) -> Inode:
        return await self._write(namespace.rmdir, parent, name)

    async def rename(
        self, caller: Caller, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> Inode | None:
        return await self._write(namespace.rename, caller, parent, name, new_parent, new_name, flags)

    async def list_dir(self, ino: int, after: int, limit: int) -> list[Dentry]:
        return await self._read(namespace.list_dir, ino, after, limit)

    async def list_dir_plus(self, ino: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]:
        return await self._read(namespace.list_dir_plus, ino, after, limit)

    async def read_link(self, ino: int) -> bytes:
        return await self._read(namespace.read_link, ino)

    # Attributes

    async def get_inode(self, ino: int) -> Inode:
        inode = self._cached_inode(ino)
        return inode if inode is not None else await self._read(namespace.existing, ino)

    async def set_attributes(self, ino: int, change: SetAttr) -> Inode:
        return await self._write(attributes.set_attributes, ino, change)

    async def touch_atime(self, times: Sequence[tuple[int, int]]) -> None:
        await self._write(attributes.touch_atime, times)

    async def get_xattr(self, ino: int, name: bytes) -> bytes:
        return await self._read(attributes.get_xattr, ino, name)

    async def set_xattr(self, ino: int, name: bytes, value: bytes, flags: int = 0, kill_sgid: bool = False) -> None:
        await self._write(attributes.set_xattr, ino, name, value, flags, kill_sgid)

    async def list_xattr(self, ino: int) -> list[bytes]:
        return await self._read(attributes.list_xattr, ino)

    async def remove_xattr(self, ino: int, name: bytes) -> None:
        """As in ``MetaAPI``; an ACL that is not there is removed without an error."""
        await self._write(attributes.remove_xattr, ino, name)

    async def usage(self) -> Usage:
        return await self._read(_usage)

    # Contents

    async def extents(self, ino: int, start: int, end: int) -> list[Extent]:
        return await self._read(contents.extents, ino, start, end)

    async def segments(self, ids: Sequence[int]) -> list[Segment]:
        return await self._read(contents.segments, ids)

    async def allocate_segments(self, count: int) -> int:
        return await self._write(_allocate_segments, count)

    async def exchange_writer(self, writer: int) -> int:
        return await self._write(_exchange_writer, writer)

    async def commit_data(self, segments: Sequence[Segment], commits: Sequence[DataCommit]) -> None:
        """As in ``MetaAPI``. The byte limit is not checked: these bytes have been acknowledged already. EEXIST for a
        segment id used before, EIO for an extent in a segment that is neither in ``segments`` nor alive, EINVAL for
        extents that overlap or pass ``size`` and for inline contents beside extents or past INLINE_MAX.

        It runs on the event loop, about 15 us an extent that overwrites: callers split commits of thousands of them."""
        await self._write(contents.commit_data, segments, commits)

    async def clone_range(self, source: int, start: int, length: int, target: int, target_start: int) -> Inode:
        """As in ``MetaAPI``; ENOSPC at the volume's byte limit, and EOPNOTSUPP where the result would need inline
        contents beside extents: the caller then copies the bytes."""
        return await self._write(contents.clone_range, source, start, length, target, target_start)

    async def release_orphans(self, inos: Sequence[int]) -> None:
        for first in range(0, len(inos), _BATCH):
            left = inos[first : first + _BATCH]
            while left:
                left = await self._write(contents.release_orphans, left)

    async def open_inode(self, ino: int) -> Inode:
        """As in ``MetaAPI``; ESTALE when its last name is gone and the session does not use it: the kernel looks its
        name up again then."""
        holding = self._holding
        if holding is None:
            return await self.get_inode(ino)
        new = holding.add(ino)
        try:
            inode = await self.get_inode(ino)
            if inode.nlink == 0 and new:
                raise error(errno.ESTALE)
        except BaseException:
            if new:
                holding.discard(ino)
            raise
        return inode

    async def close_inodes(self, inos: Sequence[int]) -> None:
        if self._holding is None:
            return
        for ino in inos:
            self._holding.discard(ino)
        nameless = await self._read(_nameless, inos)
        if nameless:
            await self.release_orphans(nameless)

    # Locks

    async def give_up_lock(self, wait: int) -> None:
        self._locks.give_up(wait)

    # Garbage

    async def dead_segments(self, grace: int, after: int, limit: int) -> list[int]:
        return await self._read(contents.dead_segments, time.time_ns() - grace, after, limit)

    async def forget_segments(self, ids: Sequence[int]) -> None:
        await self._write(_forget_segments, ids)

    async def lost_segments(self, ids: Sequence[int]) -> list[int]:
        if self._holding is not None:
            raise error(errno.EOPNOTSUPP)  # what the other sessions have reserved is theirs to know
        return await self._read(contents.lost_segments, ids)

    async def segment_usage(self, after: int, limit: int) -> list[tuple[int, int, int]]:
        return await self._read(contents.segment_usage, after, limit)

    async def segment_extents(self, segment: int, limit: int) -> list[tuple[int, Extent]]:
        return await self._read(contents.segment_extents, segment, limit)

    async def move_extents(self, segments: Sequence[Segment], moves: Sequence[Move]) -> int:
        """As in ``MetaAPI``. It runs on the event loop, about 15 us an extent: callers split moves of thousands."""
        return await self._write(contents.move_extents, segments, moves)

    # The session

    def end_turn(self) -> None:
        self._store.end_turn()

    async def sync(self) -> None:
        await self._store.sync()

    async def close(self) -> None:
        """Closes the store too."""
        if not self._store.read_only and self._holding is None:
            await self._release_all()
        await self._store.close()

    async def _release_all(self) -> None:
        after = (0, -1)
        while orphans := await self._read(_orphans, after):
            await self.release_orphans([ino for ino, _ in orphans])
            after = orphans[-1]


async def _orphans(tx: Reader, after: tuple[int, int]) -> list[tuple[int, int]]:
    return await tx.orphans(after, _BATCH)


async def _sessions(tx: Reader) -> list[SessionRow]:
    return await tx.sessions()


async def _end_session(tx: Transaction, session: int) -> None:
    await tx.delete_session(session)


async def _nameless(tx: Reader, inos: Sequence[int]) -> list[int]:
    tx.prefetch(inodes=inos)
    return [ino for ino in inos if (inode := await tx.inode(ino)) is not None and inode.nlink == 0]


async def _usage(tx: Reader) -> Usage:
    return replace(tx.usage())


async def _allocate_segments(tx: Transaction, count: int) -> int:
    if count <= 0:
        raise error(errno.EINVAL)
    return await tx.allocate_segments(count)


async def _exchange_writer(tx: Transaction, writer: int) -> int:
    return await tx.exchange_writer(writer)


async def _forget_segments(tx: Transaction, ids: Sequence[int]) -> None:
    await tx.delete_segments(ids)
