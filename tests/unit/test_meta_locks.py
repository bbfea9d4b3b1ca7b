"""The lock table: who gets what, who waits, and what is left when a session ends."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polefs.meta import locks
from polefs.meta.locks import HeldLocks, LockTable
from polefs.meta.model import LOCK_END, Lock, LockKind
from rawfuse.testing.syscalls import fails

READ, WRITE, FREE = LockKind
FILE = 7

P = ParamSpec("P")


def on_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class Client:
    """A session, whose owners are small numbers."""

    def __init__(self, table: LockTable, session: int) -> None:
        self.table = table
        self.session = session
        table.begin(session)

    def record(
        self, kind: LockKind, start: int = 0, end: int = LOCK_END, *, owner: int = 1, wait: int = 0, ino: int = FILE
    ) -> Awaitable[None]:
        lock = Lock(owner, start, end, kind, 100 + owner)
        return self.table.set(self.session, ino, lock, flock=False, wait=wait)

    def flock(self, kind: LockKind, *, owner: int = 1, wait: int = 0) -> Awaitable[None]:
        return self.table.set(self.session, FILE, Lock(owner, 0, LOCK_END, kind, 100), flock=True, wait=wait)

    def waits(self, awaitable: Awaitable[None]) -> asyncio.Future[None]:
        return asyncio.ensure_future(awaitable)

    def test(self, kind: LockKind, start: int = 0, end: int = LOCK_END, *, owner: int = 1) -> Awaitable[Lock | None]:
        return self.table.test(self.session, FILE, Lock(owner, start, end, kind), flock=False)


@pytest.fixture
def table() -> LockTable:
    return LockTable()


@pytest.fixture
def one(table: LockTable) -> Client:
    return Client(table, 1)


@pytest.fixture
def two(table: LockTable) -> Client:
    return Client(table, 2)


async def turn() -> None:
    """Let what can go on go on."""
    for _ in range(3):
        await asyncio.sleep(0)


@on_a_loop
async def test_the_same_owner_of_two_sessions_is_two_owners(one: Client, two: Client) -> None:
    await one.record(WRITE)
    with fails(errno.EAGAIN):
        await two.record(READ)
    await one.record(READ, 0, 9)
    await two.record(READ, 0, 9)
    with fails(errno.EAGAIN):
        await two.record(READ, 0, 10)


@on_a_loop
async def test_flock_and_records_do_not_see_each_other(one: Client, two: Client) -> None:
    await one.record(WRITE)
    await two.flock(WRITE)
    with fails(errno.EAGAIN):
        await one.flock(READ)


@on_a_loop
async def test_what_is_in_the_way(one: Client, two: Client) -> None:
    await one.record(WRITE, 10, 19)
    await one.record(READ, 5, 7)
    assert await two.test(WRITE) == Lock(0, 5, 7, READ, 0)
    assert await two.test(READ) == Lock(0, 10, 19, WRITE, 0)
    assert await one.test(WRITE, owner=2) == Lock(1, 5, 7, READ, 101)
    assert await one.test(WRITE) is None
    assert await two.test(WRITE, 20) is None


@on_a_loop
async def test_unlocking_the_middle(one: Client, two: Client) -> None:
    await one.record(WRITE, 0, 29)
    await one.record(FREE, 10, 19)
    await two.record(WRITE, 10, 19)
    for start, end in ((9, 9), (20, 20)):
        with fails(errno.EAGAIN):
            await two.record(READ, start, end)


@on_a_loop
async def test_who_waits_gets_it_from_who_had_it(one: Client, two: Client) -> None:
    await one.record(WRITE)
    waiting = two.waits(two.record(WRITE, wait=1))
    await turn()
    assert not waiting.done()
    await one.record(FREE)
    with fails(errno.EAGAIN):
        await one.record(READ)
    await waiting


@on_a_loop
async def test_readers_that_wait_get_it_together(table: LockTable, one: Client, two: Client) -> None:
    await one.flock(WRITE)
    waiting = [two.waits(two.flock(READ, owner=owner, wait=owner)) for owner in (1, 2, 3)]
    await turn()
    await one.flock(READ)
    await asyncio.gather(*waiting)
    assert table.of_session(2) == 3


@on_a_loop
async def test_converting_a_flock_gives_the_old_one_back(one: Client, two: Client) -> None:
    await one.flock(READ)
    await two.flock(READ)
    with fails(errno.EAGAIN):
        await one.flock(WRITE)
    await two.flock(WRITE)


@on_a_loop
async def test_a_circle(one: Client, two: Client) -> None:
    await one.record(WRITE, 0, 0)
    await two.record(WRITE, 1, 1)
    waiting = one.waits(one.record(WRITE, 1, 1, wait=1))
    await turn()
    with fails(errno.EDEADLK):
        await two.record(WRITE, 0, 0, wait=1)
    await two.record(FREE)
    await waiting


@on_a_loop
async def test_a_circle_through_another_file_and_session(table: LockTable, one: Client, two: Client) -> None:
    three = Client(table, 3)
    for ino, client in ((1, one), (2, two), (3, three)):
        await client.record(WRITE, ino=ino)
    waiting = [one.waits(one.record(WRITE, ino=2, wait=1)), two.waits(two.record(READ, ino=3, wait=1))]
    await turn()
    with fails(errno.EDEADLK):
        await three.record(READ, ino=1, wait=1)
    table.end(3)
    await waiting[1]
    table.end(2)
    await waiting[0]


@on_a_loop
async def test_a_circle_that_a_grant_closes(one: Client, two: Client, table: LockTable) -> None:
    """A program with two threads gets a lock that somebody waits for, while it waits for one of him."""
    three = Client(table, 3)
    await one.record(WRITE, 0, 0)
    await two.record(WRITE, 1, 1)
    gets = three.waits(three.record(WRITE, 0, 0, wait=1))
    waits = three.waits(three.record(WRITE, 1, 1, wait=2))
    await turn()
    blocked = two.waits(two.record(WRITE, 0, 0, wait=1))
    await turn()
    await one.record(FREE)
    await gets
    with fails(errno.EDEADLK):
        await waits
    await three.record(FREE)
    await blocked


@on_a_loop
async def test_giving_up(one: Client, two: Client, table: LockTable) -> None:
    await one.record(WRITE)
    first, second = two.waits(two.record(WRITE, 0, 0, wait=5)), two.waits(two.record(WRITE, 1, 1, wait=6))
    await turn()
    table.give_up(1, 5)
    table.give_up(2, 4)
    await turn()
    assert not first.done()
    table.give_up(2, 5)
    with fails(errno.EINTR):
        await first
    await one.record(FREE)
    await second
    table.give_up(2, 6)
    assert await one.test(WRITE) == Lock(0, 1, 1, WRITE, 0)


@on_a_loop
async def test_a_cancelled_wait_leaves_nothing(one: Client, two: Client, table: LockTable) -> None:
    await one.record(WRITE)
    waiting = two.waits(two.record(WRITE, wait=1))
    await turn()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert table.of_session(2) == 0
    await one.record(FREE)
    assert await one.test(WRITE) is None


@on_a_loop
async def test_the_end_of_a_session(one: Client, two: Client, table: LockTable) -> None:
    await one.record(WRITE, 0, 9)
    await one.record(WRITE, 20, 29)
    await one.flock(WRITE)
    await two.record(WRITE, 10, 19)
    others = [two.waits(two.record(WRITE, 0, 9, wait=1)), two.waits(two.flock(READ, wait=2))]
    own = one.waits(one.record(WRITE, 10, 19, owner=2, wait=1))
    await turn()
    table.end(1)
    with fails(errno.ESTALE):
        await own
    await asyncio.gather(*others)
    assert (table.of_session(1), table.of_session(2)) == (0, 2)
    table.end(2)
    assert not table._files and not table._waiting and not table._named


@on_a_loop
async def test_a_session_that_has_ended_gets_nothing(one: Client, table: LockTable) -> None:
    table.end(1)
    with fails(errno.ESTALE):
        await one.record(WRITE)
    with fails(errno.ESTALE):
        await one.test(WRITE)


@on_a_loop
async def test_after_a_restart_nobody_gets_what_others_may_hold(one: Client, two: Client) -> None:
    held = HeldLocks()
    held.note(FILE, Lock(1, 0, 9, WRITE, 101), flock=False)
    held.note(FILE, Lock(1, 3, 4, FREE, 101), flock=False)
    held.note(FILE, Lock(2, 0, LOCK_END, READ, 102), flock=True)
    assert held.has(FILE, 1, flock=False) and held.has(FILE, 2, flock=True)
    assert not held.has(FILE, 2, flock=False) and not held.has(8, 1, flock=False)
    table = LockTable()
    one, two = Client(table, 1), Client(table, 2)
    table.expect(1)
    table.expect(2)
    new = two.waits(two.record(WRITE, 4, 5))
    gone = two.waits(two.record(WRITE, 0, 0))
    free = two.waits(two.record(WRITE, 3, 4))
    waits = two.waits(two.flock(WRITE, wait=1))
    asked = asyncio.ensure_future(one.test(WRITE, owner=3))
    await turn()
    table.tell(2, [])
    await turn()
    assert not any(each.done() for each in (new, gone, free, waits, asked))
    table.tell(1, held.all())
    for refused in (new, gone):
        with fails(errno.EAGAIN):
            await refused
    await free
    assert await asked == Lock(1, 0, 2, WRITE, 101)
    await one.flock(FREE, owner=2)
    await waits


@on_a_loop
async def test_after_a_restart_those_that_do_not_come_back_lose_theirs(two: Client, table: LockTable) -> None:
    table.expect(1)
    table.expect(2)
    new = two.waits(two.record(WRITE))
    await turn()
    table.tell(2, [(FILE, False, Lock(5, 0, 0, WRITE))])
    await turn()
    assert not new.done()
    table.end(1)
    with fails(errno.EAGAIN):
        await new


@on_a_loop
async def test_who_waits_for_a_restart_may_end(two: Client, table: LockTable) -> None:
    table.expect(1)
    new = two.waits(two.record(WRITE))
    await turn()
    table.end(2)
    table.end(1)
    with fails(errno.ESTALE):
        await new


@on_a_loop
async def test_what_is_told_twice_or_against_others_counts_for_nothing(
    one: Client, two: Client, table: LockTable
) -> None:
    await one.record(WRITE)
    with pytest.raises(ValueError):
        table.tell(2, [])
    table.expect(2)
    for told in (Lock(1, 0, 0, WRITE), Lock(1, 0, 0, FREE), Lock(1, 2, 1, READ)):
        with pytest.raises(ValueError):
            table.tell(2, [(FILE, False, told)])


def test_what_a_session_asks_to_give_back_it_does_not_claim() -> None:
    held = HeldLocks()
    held.ask(FILE, Lock(1, 0, 9, WRITE, 5), flock=False)(0)
    answered = held.ask(FILE, Lock(1, 5, 14, READ, 5), flock=False)
    weaker = [(FILE, False, Lock(1, 0, 4, WRITE, 5)), (FILE, False, Lock(1, 5, 9, READ, 5))]
    assert held.all() == weaker
    answered(errno.EAGAIN)
    assert held.all() == [(FILE, False, Lock(1, 0, 9, WRITE, 5))]
    held.ask(FILE, Lock(1, 5, 14, READ, 5), flock=False)(0)
    assert held.all() == [weaker[0], (FILE, False, Lock(1, 5, 14, READ, 5))]
    answered = held.ask(FILE, Lock(1, 0, LOCK_END, FREE, 5), flock=False)
    assert not held.all()
    answered(0)
    held.ask(FILE, Lock(1, 0, LOCK_END, READ, 5), flock=True)(0)
    held.ask(FILE, Lock(1, 0, LOCK_END, WRITE, 5), flock=True)(errno.EAGAIN)
    assert not held.all()


@on_a_loop
async def test_too_many(one: Client, two: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCKS_MAX", 3)
    await one.record(WRITE, 0, 100)
    await one.record(FREE, 10, 10)
    await one.record(FREE, 20, 20)
    with fails(errno.ENOLCK):
        await one.record(FREE, 30, 30)
    with fails(errno.ENOLCK):
        await one.record(WRITE, 200, 200)
    await two.record(WRITE, 200, 200)
    await one.record(FREE)
    await one.record(WRITE, 201, 201)


@pytest.mark.parametrize(("start", "end"), [(-1, 0), (2, 1), (0, LOCK_END + 1)])
@on_a_loop
async def test_ranges_that_are_none(one: Client, start: int, end: int) -> None:
    with fails(errno.EINVAL):
        await one.record(WRITE, start, end)


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from(LockKind), st.integers(0, 7), st.integers(0, 7))
    )
)
def test_like_a_lock_for_each_byte(steps: list[tuple[int, int, LockKind, int, int]]) -> None:
    table = LockTable()
    for session in (1, 2):
        table.begin(session)
    model: dict[tuple[int, int], list[LockKind]] = {(s, o): [FREE] * 8 for s in (1, 2) for o in (1, 2)}

    async def run() -> None:
        for session, owner, kind, a, b in steps:
            start, end = min(a, b), max(a, b)
            others = [held[start : end + 1] for who, held in model.items() if who != (session, owner)]
            free = kind == FREE or not any(WRITE in held or (kind == WRITE and READ in held) for held in others)
            try:
                await table.set(session, FILE, Lock(owner, start, end, kind), flock=False, wait=0)
            except BlockingIOError:
                assert not free
                continue
            assert free
            model[session, owner][start : end + 1] = [kind] * (end + 1 - start)
            for who in (1, 2):
                runs = 0
                for held in (model[who, 1], model[who, 2]):
                    runs += sum(k != FREE and (i == 0 or held[i - 1] != k) for i, k in enumerate(held))
                assert table.of_session(who) == runs

    asyncio.run(run())
