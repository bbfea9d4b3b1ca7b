"""Locks of processes and of open files, kept by the file system: fcntl(2) record locks and flock(2).

POSIX, XSH fcntl: a process's record locks go when it closes any descriptor of the file, and a wait that would never end
is EDEADLK. The kernel gives each owner a number; that of an open file description (F_OFD_SETLK, flock) differs from a
process's only in that no FLUSH carries it: its locks go when the handle that took them is released.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
from collections.abc import Callable, Iterable

import msgspec

from rawfuse import FileLock, FuseError, ops
from rawfuse.abi import LockFlag


class Held(msgspec.Struct, gc=False):
    """A lock on the bytes ``start`` to ``end``, both included."""

    owner: int
    fh: int
    start: int
    end: int
    type: int
    pid: int

    def blocks(self, other: Held) -> bool:
        return (
            self.owner != other.owner
            and self.start <= other.end
            and other.start <= self.end
            and fcntl.F_WRLCK in (self.type, other.type)
        )


class _Waiter(msgspec.Struct, gc=False, eq=False):
    wanted: Held
    future: asyncio.Future[None]


class _FileLocks:
    """One kind of lock on one inode."""

    __slots__ = ("held", "waiters")

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.waiters: list[_Waiter] = []

    def in_the_way(self, wanted: Held) -> list[Held]:
        return [lock for lock in self.held if lock.blocks(wanted)]

    def replace(self, new: Held) -> None:
        """The owner's locks become ``new`` in its range and stay what they were outside."""
        kept: list[Held] = []
        for lock in self.held:
            if lock.owner != new.owner or lock.end < new.start or lock.start > new.end:
                kept.append(lock)
                continue
            if lock.start < new.start:
                kept.append(msgspec.structs.replace(lock, end=new.start - 1))
            if lock.end > new.end:
                kept.append(msgspec.structs.replace(lock, start=new.end + 1))
        if new.type != fcntl.F_UNLCK:
            kept = _joined(kept, new)
        self.held = kept
        self.wake()

    def drop(self, gone: Iterable[Held]) -> None:
        names = set(map(id, gone))
        if names:
            self.held = [lock for lock in self.held if id(lock) not in names]
            self.wake()

    def wake(self) -> None:
        """Let those who wait look again, the longest waiting first."""
        for waiter in self.waiters:
            if not waiter.future.done():
                waiter.future.set_result(None)


def _joined(locks: list[Held], new: Held) -> list[Held]:
    """``new`` made one with the owner's adjoining locks of the same type."""
    apart = []
    for lock in locks:
        same = lock.owner == new.owner and lock.type == new.type and lock.fh == new.fh
        if same and lock.end + 1 >= new.start and lock.start <= new.end + 1:
            new = msgspec.structs.replace(new, start=min(new.start, lock.start), end=max(new.end, lock.end))
        else:
            apart.append(lock)
    return [*apart, new]


class LockTable:
    """All locks of a file system. Record locks and flock(2) locks do not see each other, as on Linux."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, bool], _FileLocks] = {}

    def test(self, op: ops.GetLock) -> FileLock:
        """The lowest lock that would be in the way, or one of type F_UNLCK."""
        wanted = _wanted(op)
        locks = self._files.get((op.nodeid, _is_flock(op)))
        found = locks.in_the_way(wanted) if locks else []
        if not found:
            return FileLock(op.start, op.end, fcntl.F_UNLCK, 0)
        first = min(found, key=lambda lock: lock.start)
        return FileLock(first.start, first.end, first.type, first.pid)

    async def set(self, op: ops.SetLock) -> None:
        """Take, change or release a lock. EAGAIN when another is in the way and ``op.wait`` is not set; EDEADLK when
        waiting for a record lock would never end. Cancelling a wait leaves nothing behind."""
        flock = _is_flock(op)
        key = (op.nodeid, flock)
        locks = self._files.setdefault(key, _FileLocks())
        wanted = _wanted(op)
        try:
            if wanted.type != fcntl.F_UNLCK:
                if flock:
                    # Converting a lock is not atomic: it is given up first (flock(2)).
                    changed = [lock for lock in locks.held if lock.owner == op.owner and lock.type != op.type]
                    locks.drop(changed)
                await self._until_free(locks, wanted, wait=op.wait, flock=flock)
            locks.replace(wanted)
        finally:
            self._tidy(key, locks)

    async def _until_free(self, locks: _FileLocks, wanted: Held, *, wait: bool, flock: bool) -> None:
        while blockers := locks.in_the_way(wanted):
            if not wait:
                raise FuseError(errno.EAGAIN)
            if not flock and self._waits_for(blockers, wanted.owner):
                raise FuseError(errno.EDEADLK)
            waiter = _Waiter(wanted, asyncio.get_running_loop().create_future())
            locks.waiters.append(waiter)
            try:
                await waiter.future
            finally:
                locks.waiters.remove(waiter)

    def _waits_for(self, blockers: list[Held], owner: int) -> bool:
        """Whether one who holds ``blockers`` waits, directly or through others, for ``owner``."""
        waiting = {
            waiter.wanted.owner: locks.in_the_way(waiter.wanted)
            for (_, flock), locks in self._files.items()
            if not flock
            for waiter in locks.waiters
        }
        seen: set[int] = set()
        open_ends = [lock.owner for lock in blockers]
        while open_ends:
            one = open_ends.pop()
            if one == owner:
                return True
            if one not in seen:
                seen.add(one)
                open_ends += [lock.owner for lock in waiting.get(one, ())]
        return False

    def closed(self, ino: int, owner: int) -> None:
        """A process closed a descriptor of the file: its record locks there are gone."""
        self._drop((ino, False), lambda lock: lock.owner == owner)

    def released(self, ino: int, fh: int) -> None:
        """The last descriptor of an open file is closed: what it locked is free."""
        for flock in (False, True):
            self._drop((ino, flock), lambda lock: lock.fh == fh)

    def _drop(self, key: tuple[int, bool], gone: Callable[[Held], bool]) -> None:
        locks = self._files.get(key)
        if locks is not None:
            locks.drop(filter(gone, locks.held))
            self._tidy(key, locks)

    def _tidy(self, key: tuple[int, bool], locks: _FileLocks) -> None:
        if not locks.held and not locks.waiters:
            self._files.pop(key, None)


def _is_flock(op: ops.GetLock) -> bool:
    return bool(op.lock_flags & LockFlag.FLOCK)


def _wanted(op: ops.GetLock) -> Held:
    return Held(op.owner, op.fh, op.start, op.end, op.type, op.lock_pid)
