"""The lock table of a volume: flock(2) and fcntl(2) record locks of the programs on all its machines.

The two kinds do not see each other, as on Linux. Locks that wait are granted in the order in which they came, by those
who take away what was in the way; who comes later and finds nothing in the way passes them by.

The table is in memory. After a restart of the service the sessions that go on tell what they hold, and until they all
have done so, or are over, nobody gets anything new: it may be another's.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from polefs.meta.errors import error
from polefs.meta.model import LOCK_END, Lock, LockKind

LOCKS_MAX = 16_384
"""Most ranges that one session may hold or wait for; beyond: ENOLCK."""

Told = tuple[int, bool, Lock]
"""``(ino, flock, lock)``"""

Owner = tuple[int, int]
"""A session, and the number that its kernel has given to the owner."""


class _Held(msgspec.Struct, gc=False, frozen=True):
    owner: Owner
    start: int
    end: int
    kind: LockKind
    pid: int

    def blocks(self, other: _Held) -> bool:
        return (
            self.owner != other.owner
            and self.start <= other.end
            and other.start <= self.end
            and LockKind.WRITE in (self.kind, other.kind)
        )


class _File:
    """The locks of one sort, flock or records, on one inode."""

    __slots__ = ("held", "key", "waiters")

    def __init__(self, key: tuple[int, bool]) -> None:
        self.key = key
        self.held: list[_Held] = []
        self.waiters: list[_Waiter] = []

    def in_the_way(self, wanted: _Held) -> list[_Held]:
        return [each for each in self.held if each.blocks(wanted)]

    def with_(self, new: _Held) -> list[_Held]:
        """What would be held if the owner's locks became ``new`` in its range and stayed what they are outside."""
        held: list[_Held] = []
        for each in self.held:
            if each.owner != new.owner or each.end < new.start or each.start > new.end:
                held.append(each)
                continue
            if each.start < new.start:
                held.append(msgspec.structs.replace(each, end=new.start - 1))
            if each.end > new.end:
                held.append(msgspec.structs.replace(each, start=new.end + 1))
        return held if new.kind == LockKind.FREE else _joined(held, new)


class _Waiter:
    __slots__ = ("file", "granted", "name", "wanted")

    def __init__(self, file: _File, wanted: _Held, name: int) -> None:
        self.file = file
        self.wanted = wanted
        self.name = name
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _joined(held: list[_Held], new: _Held) -> list[_Held]:
    """``new`` made one with the owner's adjoining locks of its kind."""
    apart = []
    for each in held:
        same = each.owner == new.owner and each.kind == new.kind and each.pid == new.pid
        if same and each.end + 1 >= new.start and each.start <= new.end + 1:
            new = msgspec.structs.replace(new, start=min(new.start, each.start), end=max(new.end, each.end))
        else:
            apart.append(each)
    return [*apart, new]


class HeldLocks:
    """What one session holds, as it knows it itself: never more than it has, for others may have been granted what it
    has asked to give back."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, bool], _File] = {}

    def ask(self, ino: int, lock: Lock, *, flock: bool) -> Callable[[int], None]:
        """It is going to ask for a lock, or for less of one; returns what is to be called with the errno of the
        answer."""
        weaker: list[Lock] = []
        if lock.kind == LockKind.FREE:
            self.note(ino, lock, flock=flock)
        elif flock:
            # The old one is given back first, whatever becomes of the new one.
            if self.has(ino, lock.owner, flock=True, but=lock.kind):
                self.note(ino, Lock(lock.owner, 0, LOCK_END, LockKind.FREE), flock=True)
        elif lock.kind == LockKind.READ:
            for each in self._of(ino, lock.owner):
                start, end = max(each.start, lock.start), min(each.end, lock.end)
                if each.kind == LockKind.WRITE and start <= end:
                    weaker.append(Lock(lock.owner, start, end, LockKind.WRITE, each.pid))
        for part in weaker:
            self.note(ino, msgspec.structs.replace(part, kind=LockKind.READ), flock=flock)

        def answered(code: int) -> None:
            if not code:
                self.note(ino, lock, flock=flock)
            else:
                for part in weaker:
                    self.note(ino, part, flock=flock)

        return answered

    def note(self, ino: int, lock: Lock, *, flock: bool) -> None:
        """A lock was taken, changed or given back."""
        key = (ino, flock)
        file = self._files.get(key)
        if file is None:
            file = self._files[key] = _File(key)
        file.held = file.with_(_held(0, lock))
        if not file.held:
            del self._files[key]

    def has(self, ino: int, owner: int, *, flock: bool, but: LockKind = LockKind.FREE) -> bool:
        """Whether the owner holds anything of another kind than ``but``."""
        file = self._files.get((ino, flock))
        return file is not None and any(each.owner[1] == owner and each.kind != but for each in file.held)

    def _of(self, ino: int, owner: int) -> list[_Held]:
        file = self._files.get((ino, False))
        return [] if file is None else [each for each in file.held if each.owner[1] == owner]

    def all(self) -> list[Told]:
        return [
            (*file.key, Lock(each.owner[1], each.start, each.end, each.kind, each.pid))
            for file in self._files.values()
            for each in file.held
        ]

    def clear(self) -> None:
        self._files.clear()


class LockTable:
    """All locks of a volume. Errors are those of ``MetaAPI``; ESTALE for a session that is over."""

    def __init__(self) -> None:
        self._sessions: set[int] = set()
        self._expected: set[int] = set()
        """Sessions from before a restart that have not yet told what they hold."""
        self._settled = asyncio.Event()
        self._settled.set()
        self._files: dict[tuple[int, bool], _File] = {}
        self._waiting: dict[Owner, list[_Waiter]] = {}
        """Who waits for record locks: the others cannot be told to be in a circle."""
        self._named: dict[int, dict[int, _Waiter]] = {}
        """All who wait, by session and the name of the wait."""
        self._ranges: Counter[int] = Counter()
        """How many each session holds or waits for."""

    # Sessions

    def begin(self, session: int) -> None:
        self._sessions.add(session)

    def expect(self, session: int) -> None:
        """It goes on after a restart, and has yet to tell what it holds."""
        self.begin(session)
        self._expected.add(session)
        self._settled.clear()

    def tell(self, session: int, locks: Iterable[Told]) -> None:
        """What an expected session holds, once. ValueError when that cannot be: it ought to be ended then."""
        if session not in self._expected:
            raise ValueError("locks are told twice")
        for ino, flock, lock in locks:
            new = _held(session, lock)
            file = self._files.setdefault((ino, flock), _File((ino, flock)))
            if lock.kind == LockKind.FREE or not _is_range(lock) or file.in_the_way(new):
                self._tidy(file)
                raise ValueError("a lock is told that cannot be")
            try:
                self._replace(file, new)
            except OSError:
                raise ValueError("more locks are told than can be") from None
        self._no_more(session)

    def end(self, session: int) -> None:
        """It is over: what it waits for fails with ESTALE, and what it held is free."""
        self._sessions.discard(session)
        for waiter in list(self._named.get(session, {}).values()):
            self._refuse(waiter, errno.ESTALE)
        if self._ranges.pop(session, 0):
            for file in list(self._files.values()):
                left = [each for each in file.held if each.owner[0] != session]
                if len(left) < len(file.held):
                    file.held = left
                    self._grant(file)
                    self._tidy(file)
        self._no_more(session)

    def stop(self) -> None:
        """The service stops: what waits or comes from now on fails with ESTALE, and nothing is granted any more. Nobody
        may be told: who waits will ask the next one."""
        self._sessions.clear()
        self._settled.set()
        for named in list(self._named.values()):
            for waiter in list(named.values()):
                self._refuse(waiter, errno.ESTALE)

    def of_session(self, session: int) -> int:
        """How many ranges it holds or waits for."""
        return self._ranges[session]

    def _no_more(self, session: int) -> None:
        self._expected.discard(session)
        if not self._expected:
            self._settled.set()

    async def _check(self, session: int) -> None:
        await self._settled.wait()
        if session not in self._sessions:
            raise error(errno.ESTALE)

    # Locks

    async def test(self, session: int, ino: int, lock: Lock, *, flock: bool) -> Lock | None:
        """The lowest lock in the way of ``lock``. What other machines call its owner and process means nothing here:
        both are 0 then."""
        await self._check(session)
        file = self._files.get((ino, flock))
        blocking = file.in_the_way(_held(session, lock)) if file is not None else []
        if not blocking:
            return None
        first = min(blocking, key=lambda each: each.start)
        own = first.owner[0] == session
        return Lock(first.owner[1] if own else 0, first.start, first.end, first.kind, first.pid if own else 0)

    async def set(self, session: int, ino: int, lock: Lock, *, flock: bool, wait: int) -> None:
        """Take, change or give back a lock."""
        if not _is_range(lock):
            raise error(errno.EINVAL)
        await self._check(session)
        wanted = _held(session, lock)
        key = (ino, flock)
        file = self._files.get(key)
        if file is None:
            if lock.kind == LockKind.FREE:
                return
            file = self._files[key] = _File(key)
        try:
            if flock and any(each.owner == wanted.owner and each.kind != wanted.kind for each in file.held):
                # Changing the kind is not atomic: the old lock is given back first (flock(2)).
                self._replace(file, msgspec.structs.replace(wanted, kind=LockKind.FREE))
            if wanted.kind == LockKind.FREE or not (blocking := file.in_the_way(wanted)):
                self._replace(file, wanted)
                return
            if not wait:
                raise error(errno.EAGAIN)
            if not flock and self._waits_for(blocking, wanted.owner):
                raise error(errno.EDEADLK)
            waiter = self._enqueue(file, wanted, wait)
        finally:
            self._tidy(file)
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._dequeue(waiter)
                self._tidy(file)
            raise

    def give_up(self, session: int, wait: int) -> None:
        """What waits under that name, if it still does, fails with EINTR."""
        waiter = self._named.get(session, {}).get(wait)
        if waiter is not None:
            self._refuse(waiter, errno.EINTR)

    def _replace(self, file: _File, new: _Held) -> None:
        """Change what the owner holds, and grant what that lets through. ENOLCK when it becomes too much."""
        held = file.with_(new)
        more = len(held) - len(file.held)
        self._count(new.owner[0], more)
        file.held = held
        self._grant(file)

    def _count(self, session: int, more: int) -> None:
        if more > 0 and self._ranges[session] + more > LOCKS_MAX:
            raise error(errno.ENOLCK)
        self._ranges[session] += more

    def _grant(self, file: _File) -> None:
        granted = True
        while granted:
            # What is granted may take the place of a stronger lock, and let through who came before it.
            granted = False
            for waiter in list(file.waiters):
                blocking = file.in_the_way(waiter.wanted)
                if not blocking and not waiter.granted.done():
                    self._dequeue(waiter)
                    held = file.with_(waiter.wanted)
                    # In pieces it may be more than what was counted while it waited.
                    self._ranges[waiter.wanted.owner[0]] += len(held) - len(file.held)
                    file.held = held
                    waiter.granted.set_result(None)
                    granted = True
                elif blocking and not file.key[1] and self._waits_for(blocking, waiter.wanted.owner):
                    # Who has been let through instead waits for it somewhere else.
                    self._refuse(waiter, errno.EDEADLK)

    def _enqueue(self, file: _File, wanted: _Held, name: int) -> _Waiter:
        session = wanted.owner[0]
        named = self._named.setdefault(session, {})
        if name in named:
            raise error(errno.EINVAL)
        self._count(session, 1)
        waiter = named[name] = _Waiter(file, wanted, name)
        file.waiters.append(waiter)
        if not file.key[1]:
            self._waiting.setdefault(wanted.owner, []).append(waiter)
        return waiter

    def _dequeue(self, waiter: _Waiter) -> None:
        owner = waiter.wanted.owner
        if self._named[owner[0]].pop(waiter.name, None) is None:
            return
        self._ranges[owner[0]] -= 1
        if not self._named[owner[0]]:
            del self._named[owner[0]]
        waiter.file.waiters.remove(waiter)
        if not waiter.file.key[1]:
            self._waiting[owner].remove(waiter)
            if not self._waiting[owner]:
                del self._waiting[owner]

    def _refuse(self, waiter: _Waiter, code: int) -> None:
        self._dequeue(waiter)
        self._tidy(waiter.file)
        if not waiter.granted.done():
            waiter.granted.set_exception(error(code))

    def _waits_for(self, blocking: list[_Held], owner: Owner) -> bool:
        """Whether one of those who hold ``blocking`` waits, directly or through others, for ``owner``."""
        seen: set[Owner] = set()
        open_ends = [each.owner for each in blocking]
        while open_ends:
            one = open_ends.pop()
            if one == owner:
                return True
            if one not in seen:
                seen.add(one)
                for waiter in self._waiting.get(one, ()):
                    open_ends += [each.owner for each in waiter.file.in_the_way(waiter.wanted)]
        return False

    def _tidy(self, file: _File) -> None:
        if not file.held and not file.waiters:
            self._files.pop(file.key, None)


class SessionLocks:
    """The locks of one session; without a table, of the only one that there is."""

    def __init__(self, table: LockTable | None = None, session: int = 0) -> None:
        self._table = LockTable() if table is None else table
        self._session = session
        self._table.begin(session)

    async def test(self, ino: int, lock: Lock, flock: bool) -> Lock | None:
        return await self._table.test(self._session, ino, lock, flock=flock)

    async def set(self, ino: int, lock: Lock, flock: bool, wait: int = 0) -> None:
        await self._table.set(self._session, ino, lock, flock=flock, wait=wait)

    def give_up(self, wait: int) -> None:
        self._table.give_up(self._session, wait)


def _is_range(lock: Lock) -> bool:
    return 0 <= lock.start <= lock.end <= LOCK_END


def _held(session: int, lock: Lock) -> _Held:
    return _Held((session, lock.owner), lock.start, lock.end, lock.kind, lock.pid)
