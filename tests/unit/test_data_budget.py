"""The memory budget: bounded, in turn, and nothing is lost when somebody stops waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polefs.data.budget import MemoryBudget
from tests.unit.data_helpers import ticks


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(main())


def test_those_who_wait_are_served_in_turn() -> None:
    async def work() -> None:
        budget = MemoryBudget(10)
        served: list[int] = []

        async def take(number: int, size: int) -> None:
            await budget.take(size)
            served.append(number)

        await take(0, 6)
        tasks = [asyncio.create_task(take(number, size)) for number, size in ((1, 8), (2, 1), (3, 1))]
        await ticks(5)
        assert served == [0]
        assert not budget.take_now(1)
        budget.give(6)
        await asyncio.gather(*tasks)
        assert served == [0, 1, 2, 3]
        assert budget.used == 10

    run(work)


def test_more_than_there_is_takes_all() -> None:
    async def work() -> None:
        budget = MemoryBudget(10)
        assert await budget.take(1000) == 10
        budget.give(10)
        assert budget.used == 0

    run(work)


@pytest.mark.parametrize("granted", [False, True])
def test_who_stops_waiting_keeps_nothing(granted: bool) -> None:
    async def work() -> None:
        budget = MemoryBudget(10)
        await budget.take(10)
        first = asyncio.create_task(budget.take(9))
        second = asyncio.create_task(budget.take(5))
        await ticks(3)
        if granted:
            budget.give(10)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        if not granted:
            budget.give(10)
        assert await second == 5
        assert budget.used == 5

    run(work)


def test_a_share_bounds_one_use_and_counts_for_the_whole() -> None:
    async def work() -> None:
        budget = MemoryBudget(10)
        uploads = budget.share(6)
        await uploads.take(6)
        assert not uploads.take_now(1)
        assert budget.take_now(4)
        assert not budget.take_now(1)
        waiting = asyncio.create_task(uploads.take(2))
        await ticks(3)
        uploads.give(6)
        await waiting
        assert (uploads.used, budget.used) == (2, 6)
        # The share has room and the whole has none.
        await budget.take(4)
        assert not uploads.take_now(1)
        waiting = asyncio.create_task(uploads.take(1))
        await ticks(3)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (uploads.used, budget.used) == (2, 10)

    run(work)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.booleans()), min_size=1, max_size=25))
def test_whatever_happens_all_of_it_comes_back(holders: list[tuple[int, bool, bool]]) -> None:
    async def work() -> None:
        budget = MemoryBudget(20)
        share = budget.share(12)

        async def hold(size: int, of_share: bool) -> None:
            async with (share if of_share else budget).hold(size):
                assert share.used <= share.limit
                assert budget.used <= budget.limit
                await ticks(size % 4)

        tasks = [asyncio.create_task(hold(size, of_share)) for size, of_share, _ in holders]
        await ticks(2)
        for task, (_, _, cancelled) in zip(tasks, holders, strict=True):
            if cancelled:
                task.cancel()
                await ticks(1)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError)
        assert (share.used, budget.used) == (0, 0)

    run(work)
