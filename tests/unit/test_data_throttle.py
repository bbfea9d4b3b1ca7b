"""Writers slow down little by little as the limits come near; counted in bytes, not in time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from polefs.data import throttle
from polefs.data.dirty import Limits
from polefs.data.throttle import Throttle
from tests.unit.data_helpers import Volume, ticks

MIB = 1 << 20


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody goes on because of time."""
    monkeypatch.setattr(throttle, "RATE_MIN", 1e-6)


def test_each_writer_waits_for_its_share_in_turn() -> None:
    async def work() -> None:
        waits = Throttle()
        done: list[int] = []

        async def write(number: int, size: int, pressure: float) -> None:
            await waits.wait(size, pressure)
            done.append(number)

        tasks = [asyncio.create_task(write(*each)) for each in ((1, 100, 0.5), (2, 100, 0.05), (3, 100, 1.0))]
        await ticks(3)
        for size, expected in ((99, []), (1, [1]), (10, [1, 2]), (199, [1, 2]), (1, [1, 2, 3])):
            waits.progress(size)
            await ticks(3)
            assert done == expected
        await asyncio.gather(*tasks)
        # Progress that nobody waits for is not saved up; who stops waiting leaves the others their turn.
        waits.progress(1000)
        tasks = [asyncio.create_task(write(*each)) for each in ((4, 100, 0.5), (5, 100, 0.5))]
        await ticks(3)
        assert len(done) == 3
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        waits.progress(100)
        await tasks[1]

    asyncio.run(work())


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "RATE_MIN", 1e9)

    async def work() -> None:
        async with asyncio.timeout(60):
            await Throttle().wait(1000, 1.0)

    asyncio.run(work())


class Steps:
    """A store that takes one object after another when it is told to."""

    def __init__(self, volume: Volume) -> None:
        self.turn = asyncio.Semaphore(0)
        self._put = volume.objects.put
        volume.objects.put = self.put  # type: ignore[method-assign]

    async def put(self, key: str, parts: list[bytes]) -> None:
        await self.turn.acquire()
        await self._put(key, parts)


def test_writers_come_to_the_speed_of_write_back_without_stops(tmp_path: Path) -> None:
    """They are faster than the store, which takes an object when it is told to: with each that it has taken some go on,
    and none comes to where all would have to wait."""
    limits = Limits(local=48 * MIB, replicas=10_000)
    data = bytes(MIB // 2)

    async def work() -> None:
        volume = Volume(tmp_path, limits, flush_after=0.001, cached=True)
        await volume.open()
        volume.files.start()
        store = Steps(volume)
        wrote = asyncio.Event()
        stopped = 0

        async def write(number: int) -> None:
            nonlocal stopped
            for count in range(1000):
                ino = await volume.make(b"%d-%d" % (number, count))
                await volume.write(ino, 0, data)
                stopped += volume.files._dirty.full
                wrote.set()

        writers = [asyncio.create_task(write(number)) for number in range(8)]
        async with asyncio.timeout(60):
            for _ in range(15):
                wrote.clear()
                store.turn.release()
                await wrote.wait()
            while not volume.files._dirty.pressure:
                await wrote.wait()
                wrote.clear()
            for _ in range(15):
                await ticks(100)
                wrote.clear()
                store.turn.release()
                await wrote.wait()
        assert not stopped
        for writer in writers:
            writer.cancel()
        await asyncio.wait(writers)
        for _ in range(1000):
            store.turn.release()
        await volume.close()

    asyncio.run(work())
