"""The cache of contents: what is fetched, what is kept, and that nothing wrong is ever read from it."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import os
import random
import shutil
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from polefs.data.budget import MemoryBudget
from polefs.data.cache import directory as directory_module
from polefs.data.cache.directory import BLOCK, CacheDirectory
from polefs.data.cache.neighbours import Neighbours
from polefs.data.cache.rangeset import RangeSet
from polefs.data.cache.reader import CachedContents
from polefs.data.cache.store import CacheLimits
from polefs.data.cache.streams import Streams
from polefs.objects.localio import allocated_ranges, read_available
from tests.unit.data_helpers import Volume, ticks

MIB = 1 << 20


class Gate:
    """Stands before ``get`` of a volume's object store: notes the requests, and holds those for more than
    ``passes`` bytes while it is closed."""

    def __init__(self, volume: Volume) -> None:
        self.gets: list[tuple[str, int, int]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.waiting = 0
        self.passes = 0
        self._get = volume.objects.get
        volume.objects.get = self.get  # type: ignore[method-assign]

    async def get(self, key: str, offset: int, length: int) -> bytes:
        self.gets.append((key, offset, length))
        if length > self.passes:
            self.waiting += 1
            await self.open.wait()
            self.waiting -= 1
        return await self._get(key, offset, length)

    @property
    def bytes(self) -> int:
        return sum(length for _, _, length in self.gets)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop and the threads work until it holds."""
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


def run(
    path: Path, work: Callable[[Volume, Gate], Coroutine[Any, Any, None]], limits: CacheLimits | None = None
) -> None:
    """Run ``work`` on a new cached volume, and close it."""

    async def whole() -> None:
        volume = Volume(path, cached=True)
        if limits is not None:
            volume.cache_limits = limits
        await volume.open()
        await work(volume, Gate(volume))
        await volume.close()

    asyncio.run(whole())


def cached(volume: Volume) -> CachedContents:
    assert volume.files.cached is not None
    return volume.files.cached


async def landed(volume: Volume) -> None:
    """Everything that was fetched is in the cache."""
    await until(lambda: not cached(volume)._tasks)


async def write(volume: Volume, name: bytes, data: bytes) -> int:
    """A committed file of which nothing is cached."""
    ino = await volume.make(name)
    for start in range(0, len(data), MIB):
        await volume.write(ino, start, data[start : start + MIB])
    await volume.files.flush()
    await drop(volume, ino)
    return ino


async def drop(volume: Volume, ino: int) -> None:
    cached(volume).cache.forget(ino)
    await until(lambda: cached(volume).cache._forgetting is None)


# Reading


def test_second_read_fetches_nothing(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(3 * MIB + 777)
        ino = await write(volume, b"a", data)
        assert await volume.read(ino) == data
        await landed(volume)
        count = len(gate.gets)
        assert count
        assert await volume.read(ino) == data
        assert await volume.read(ino, 12345, 6789) == data[12345 : 12345 + 6789]
        assert len(gate.gets) == count

    run(tmp_path, work)


def test_the_hole_at_the_end_of_a_file_costs_its_cache_nothing(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(2 * MIB)
        ino = await write(volume, b"a", data)
        await volume.truncate(ino, 8 * MIB)
        await volume.files.flush()
        assert await volume.read(ino, 0, 2 * MIB) == data
        await landed(volume)
        count = len(gate.gets)
        assert await volume.read(ino, 5 * MIB, 4096) == bytes(4096)
        assert await volume.read(ino, 2 * MIB - 4096, 8192) == data[-4096:] + bytes(4096)
        assert await volume.read(ino) == data + bytes(6 * MIB)
        await landed(volume)
        assert len(gate.gets) == count

    run(tmp_path, work)


def test_what_is_removed_while_it_is_written_back_is_not_kept(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        ino = await volume.make(b"a")
        await volume.write(ino, 0, os.urandom(300_000))
        put, begun, goes_on = volume.objects.put, asyncio.Event(), asyncio.Event()

        async def slow(key: str, parts: list[bytes]) -> None:
            begun.set()
            await goes_on.wait()
            await put(key, parts)

        volume.objects.put = slow  # type: ignore[method-assign]
        flushing = asyncio.ensure_future(volume.files.flush())
        await begun.wait()
        volume.files.forget(ino)
        await until(lambda: cached(volume).cache._forgetting is None)
        goes_on.set()
        await flushing
        assert (await cached(volume).cache.measure()).files == 0

    run(tmp_path, work)


def test_warming_up_what_is_lost_fails(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        ino = await write(volume, b"a", os.urandom(2 * MIB))
        for path in volume.object_paths():
            path.unlink()
        with pytest.raises(OSError, match="missing from the object store"):
            async with asyncio.timeout(60):
                await cached(volume).warm(ino)

    run(tmp_path, work)


def test_reading_what_is_just_being_kept(tmp_path: Path) -> None:
    """A reader opens the file before what was written back has its cache file, and another one reads afterwards."""

    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(300_000)
        ino = await volume.make(b"a")
        await volume.write(ino, 0, data)
        directory = cached(volume).cache._directory
        keep, begun, goes_on = directory.keep, threading.Event(), threading.Event()

        def slow(files: Any) -> tuple[int, int]:
            begun.set()
            assert goes_on.wait(60)
            return keep(files)

        directory.keep = slow  # type: ignore[method-assign]
        flushing = asyncio.ensure_future(volume.files.flush())
        await until(begun.is_set)
        gate.open.clear()
        first = asyncio.ensure_future(volume.read(ino))
        await until(lambda: gate.waiting > 0)
        goes_on.set()
        await flushing
        second = asyncio.ensure_future(volume.read(ino))
        await ticks(20)
        gate.open.set()
        assert await first == data
        assert await second == data
        await landed(volume)
        assert await volume.read(ino) == data

    run(tmp_path, work)


def test_a_file_that_begins_to_load_when_keeping_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps contents drops a file that is not loaded, but not one that somebody has just begun to load."""

    async def work(volume: Volume, gate: Gate) -> None:
        cache = cached(volume).cache
        for turns in range(6):
            ino = 100 + turns
            kept: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
            with monkeypatch.context() as patch:
                patch.setattr(cache, "_run", lambda *_, kept=kept: kept)
                keeping = asyncio.create_task(cache.keep([(ino, [], 0)]))
                await asyncio.sleep(0)
            kept.set_result((0, 1 << 40))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening = asyncio.create_task(cache.open(ino, 0))
            await keeping
            await opening
            file = await cache.open(ino, 0)
            assert file is not None and cache.find(ino) is file

    run(tmp_path, work)


def test_all_that_was_fetched_at_a_time_is_cached(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(20 * MIB)
        ino = await write(volume, b"a", data)
        await cached(volume).warm(ino)
        fetched = gate.bytes
        assert fetched == len(data)
        assert await volume.read(ino) == data
        assert gate.bytes == fetched

    run(tmp_path, work)


def test_one_range_is_fetched_once_for_all_who_want_it(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await write(volume, b"a", data)
        gate.open.clear()
        readers = [asyncio.create_task(volume.read(ino)) for _ in range(20)]
        await until(lambda: gate.waiting > 0)
        await ticks(50)
        gate.open.set()
        assert all(found == data for found in await asyncio.gather(*readers))
        assert gate.bytes == len(data)

    run(tmp_path, work)


def test_a_cancelled_reader_leaves_the_others_their_bytes(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await write(volume, b"a", data)
        gate.open.clear()
        first = asyncio.create_task(volume.read(ino))
        await until(lambda: gate.waiting > 0)
        second = asyncio.create_task(volume.read(ino))
        await ticks(20)
        first.cancel()
        await ticks(20)
        gate.open.set()
        assert await second == data
        assert gate.bytes == len(data)

    run(tmp_path, work)


def test_sequential_reads_are_fetched_ahead_in_long_pieces(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(24 * MIB)
        ino = await write(volume, b"a", data)
        step = 256 << 10
        for start in range(0, len(data), step):
            assert await volume.read(ino, start, step) == data[start : start + step]
            await landed(volume)
        assert gate.bytes <= len(data) * 1.1
        assert len(gate.gets) <= 16

    run(tmp_path, work)


def test_several_pieces_are_fetched_ahead_at_a_time(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(32 * MIB)
        ino = await write(volume, b"a", data)
        step = 256 << 10
        gate.open.clear()
        readings = []
        for start in range(0, 16 * MIB, step):
            readings.append(asyncio.create_task(volume.read(ino, start, step)))
            await ticks(10)
        await until(lambda: gate.waiting >= 4)
        gate.open.set()
        assert b"".join(await asyncio.gather(*readings)) == data[: 16 * MIB]
        await landed(volume)
        assert gate.bytes <= len(data) * 1.2

    run(tmp_path, work)


def test_what_has_come_is_kept_in_memory_until_it_is_read(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(24 * MIB)
        ino = await write(volume, b"a", data)
        contents = cached(volume)
        most = 0
        for start in range(0, len(data), MIB):
            assert await volume.read(ino, start, MIB) == data[start : start + MIB]
            await landed(volume)
            assert contents._budget.used == contents._landed._size
            most = max(most, contents._landed._size)
        assert most > 0
        assert contents._landed._size == contents._budget.used == 0
        assert await volume.read(ino) == data

    run(tmp_path, work)


def test_what_is_kept_in_memory_gives_way(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(80 * MIB)
        ino = await write(volume, b"a", data)
        contents = cached(volume)
        for start in range(0, len(data), 4 * MIB):
            # Of each piece a part only; what follows it is fetched ahead.
            assert await volume.read(ino, start, MIB) == data[start : start + MIB]
            await landed(volume)
            assert contents._landed._size <= 32 * MIB
        assert contents._landed._size > 0
        await contents._take(contents._budget.limit)
        assert contents._landed._size == 0
        contents._budget.give(contents._budget.limit)
        assert await volume.read(ino) == data

    run(tmp_path, work)


@pytest.mark.parametrize("reopened", [False, True])
def test_what_is_kept_in_memory_is_not_read_after_a_change(tmp_path: Path, reopened: bool) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = bytearray(os.urandom(16 * MIB))
        ino = await write(volume, b"a", bytes(data))
        contents = cached(volume)
        for start in range(0, 4 * MIB, MIB):
            await volume.read(ino, start, MIB)
        await landed(volume)
        assert contents._landed._size > 0
        if reopened:
            contents.cache._let_go()
        data[: 16 * MIB] = os.urandom(16 * MIB)
        for start in range(0, len(data), MIB):
            await volume.write(ino, start, bytes(data[start : start + MIB]))
        await volume.files.flush()
        if reopened:
            contents.cache._let_go()
        for start in range(0, len(data), MIB):
            assert await volume.read(ino, start, MIB) == data[start : start + MIB]

    run(tmp_path, work)


def test_two_streams_in_one_file(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(24 * MIB)
        ino = await write(volume, b"a", data)
        for start in range(0, 8 * MIB, 128 << 10):
            for base in (0, 12 * MIB):
                found = await volume.read(ino, base + start, 128 << 10)
                await landed(volume)
                assert found == data[base + start : base + start + (128 << 10)]
        await landed(volume)
        assert len(gate.gets) <= 30

    run(tmp_path, work)


def test_random_reads_fetch_what_they_need(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(64 * MIB)
        ino = await write(volume, b"a", data)
        for number in range(16):
            start = (number * 7 % 16) * 4 * MIB + 5000
            assert await volume.read(ino, start, 4096) == data[start : start + 4096]
        await landed(volume)
        assert gate.bytes <= 16 * (256 << 10)

    run(tmp_path, work)


def test_second_miss_in_a_region_fetches_it(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(8 * MIB)
        ino = await write(volume, b"a", data)
        assert await volume.read(ino, 4 * MIB + 9000, 4096) == data[4 * MIB + 9000 : 4 * MIB + 13096]
        assert await volume.read(ino, 4 * MIB + 900_000, 4096) == data[4 * MIB + 900_000 : 4 * MIB + 904_096]
        await landed(volume)
        count = len(gate.gets)
        assert count == 4
        for start in range(4 * MIB, 8 * MIB, 50_000):
            assert await volume.read(ino, start, 4096) == data[start : start + 4096]
        assert len(gate.gets) == count

    run(tmp_path, work)


def test_a_scattered_read_does_not_wait_for_its_region(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(8 * MIB)
        ino = await write(volume, b"a", data)
        await volume.read(ino, 4 * MIB + 9000, 4096)
        gate.passes = 128 << 10
        gate.open.clear()
        assert await volume.read(ino, 4 * MIB + 900_000, 4096) == data[4 * MIB + 900_000 : 4 * MIB + 904_096]
        await until(lambda: gate.waiting == 2)
        assert gate.bytes == 4 * MIB
        gate.open.set()
        await landed(volume)
        assert await volume.read(ino, 4 * MIB, 4 * MIB) == data[4 * MIB :]
        assert gate.bytes == 4 * MIB

    run(tmp_path, work)


def test_small_neighbours_come_together(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        contents = [os.urandom(6000 + 17 * number) for number in range(300)]
        inos = []
        for number, data in enumerate(contents):
            ino = await volume.make(b"f%d" % number)
            await volume.write(ino, 0, data)
            inos.append(ino)
        await volume.files.flush()
        for ino in inos:
            await drop(volume, ino)
        for ino, data in zip(inos, contents, strict=True):
            assert await volume.read(ino) == data
        assert len(gate.gets) <= 40

    run(tmp_path, work)


def test_what_neighbours_have_dropped_takes_no_memory() -> None:
    """Not even for as long as it would have been kept."""

    class Part(bytearray):
        pass

    class Table:
        size = 1 << 30

    class Segments:
        parts: ClassVar[list[weakref.ref[Part]]] = []

        async def table(self, segment: int) -> Table:
            return Table()

        async def read(self, segment: int, start: int, end: int) -> list[Part]:
            part = Part(end - start)
            self.parts.append(weakref.ref(part))
            return [part]

    async def work() -> None:
        segments = Segments()
        budget = MemoryBudget(256 * MIB)
        neighbours = Neighbours(segments, budget)  # type: ignore[arg-type]
        for segment in range(40):
            for start in range(0, 5 * 4096, 4096):
                await neighbours.read(segment, start, start + 4096)
        await asyncio.sleep(0)
        gc.collect()
        kept = [part for ref in segments.parts if (part := ref()) is not None and len(part) > 4096]
        assert 4 <= len(kept) <= 16
        neighbours.close()

    asyncio.run(work())


def test_closing_waits_for_no_answer(tmp_path: Path) -> None:
    """Nobody is there who would want what is still being fetched ahead."""

    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(16 * MIB)
        ino = await write(volume, b"a", data)
        assert await volume.read(ino, 0, MIB) == data[:MIB]
        gate.open.clear()
        await volume.read(ino, MIB // 2, 4096)
        cached(volume)._start(cached(volume)._fetch_ahead(ino, 8 * MIB, 16 * MIB))
        await until(lambda: gate.waiting > 0)

    run(tmp_path, work)


def test_holes_need_no_cache(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        ino = await volume.make(b"a")
        await volume.write(ino, 10 * MIB, b"end")
        await volume.files.flush()
        await drop(volume, ino)
        assert await volume.read(ino) == bytes(10 * MIB) + b"end"
        assert gate.bytes == 3
        assert await volume.read(ino, 5 * MIB, MIB) == bytes(MIB)

    run(tmp_path, work)


# Changes


@pytest.mark.parametrize("truncate", [False, True])
def test_a_fetch_from_before_a_change_fills_nothing_after_it(tmp_path: Path, truncate: bool) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        old = os.urandom(MIB)
        ino = await write(volume, b"a", old)
        gate.open.clear()
        reading = asyncio.create_task(volume.read(ino))
        await until(lambda: gate.waiting > 0)
        if truncate:
            await volume.truncate(ino, 5000)
            await volume.truncate(ino, MIB)
            new = old[:5000] + bytes(MIB - 5000)
        else:
            await volume.write(ino, 100_000, b"new" * 1000)
            new = old[:100_000] + b"new" * 1000 + old[103_000:]
        await volume.files.flush()
        second = asyncio.create_task(volume.read(ino))
        await ticks(50)
        gate.open.set()
        assert await reading in (old, new)
        assert await second == new
        await landed(volume)
        assert await volume.read(ino) == new
        await volume.crash()
        assert await volume.read(ino) == new

    run(tmp_path, work)


def test_a_change_leaves_the_rest_cached(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = bytearray(os.urandom(2 * MIB))
        ino = await write(volume, b"a", bytes(data))
        assert await volume.read(ino) == data
        await landed(volume)
        gate.gets.clear()
        await volume.write(ino, 1_000_000, b"x" * 10)
        data[1_000_000:1_000_010] = b"x" * 10
        await volume.files.flush()
        assert await volume.read(ino, 1000, 900_000) == data[1000:901_000]
        assert not gate.gets
        assert await volume.read(ino) == data
        assert gate.bytes <= 2 * 131_072 + 10

    run(tmp_path, work)


def test_a_read_from_disk_during_invalidation_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes around a change share its block, which becomes a hole while somebody reads them."""
    entered, goes_on = threading.Event(), threading.Event()

    def slow(fd: int, offset: int, length: int) -> bytes:
        entered.set()
        assert goes_on.wait(60)
        return read_available(fd, offset, length)

    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await write(volume, b"a", data)
        assert await volume.read(ino) == data
        await landed(volume)
        # As when the page cache has nothing.
        monkeypatch.setattr("polefs.data.cache.store.CachedFile.read_now", lambda *_: None)
        monkeypatch.setattr("polefs.data.cache.store.read_available", slow)
        reading = asyncio.create_task(volume.read(ino, 0, 8192))
        await until(entered.is_set)
        await volume.write(ino, 5000, b"new")
        await volume.files.flush()
        goes_on.set()
        new = data[:5000] + b"new" + data[5003:]
        assert await reading in (data[:8192], new[:8192])
        assert await volume.read(ino) == new

    run(tmp_path, work)


def test_removed_files_leave_the_cache(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        ino = await write(volume, b"a", os.urandom(MIB))
        await volume.read(ino)
        await landed(volume)
        assert cache_files(tmp_path) == [ino]
        volume.files.forget(ino)
        await until(lambda: not cache_files(tmp_path))

    run(tmp_path, work)


def test_a_failed_commit_keeps_contents_right(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await write(volume, b"a", data)
        await volume.read(ino)
        await landed(volume)
        await volume.write(ino, 5000, b"new")
        volume.dying_meta.methods, volume.dying_meta.countdown = {"commit_data"}, 1
        volume.dying_meta.permanent, volume.dying_meta.error = False, OSError(errno.EIO, "no")
        with pytest.raises(OSError, match="no"):
            await volume.files.flush()
        new = data[:5000] + b"new" + data[5003:]
        assert await volume.read(ino) == new
        await volume.files.flush()
        assert await volume.read(ino) == new

    run(tmp_path, work)


# What has been written


@pytest.mark.parametrize("size", [5000, 100_000, 3 * MIB + 5])
@pytest.mark.parametrize("step", [4000, MIB])
def test_what_was_written_back_is_cached(tmp_path: Path, size: int, step: int) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(size)
        ino = await volume.make(b"a")
        for start in range(0, size, step):
            await volume.write(ino, start, data[start : start + step])
        await volume.files.flush()
        assert await volume.read(ino) == data
        assert not gate.gets
        assert cache_files(tmp_path) == [ino]
        assert volume.local() == [name for name in volume.local() if not name.startswith(f"{ino}.")]

    run(tmp_path, work)


def test_a_replica_that_became_the_cache_file_is_the_journals_as_long_as_it_tells_of_it(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await volume.make(b"a")
        await volume.write(ino, 0, data)
        await volume.files.flush(ino)
        (cache_file,) = (tmp_path / "cache" / "files").glob("*/*")
        assert cache_file.stat().st_nlink == 2
        assert await volume.read(ino) == data
        # A part is changed and committed before the journal of the first write is deleted.
        await volume.write(ino, 5000, b"new")
        new = data[:5000] + b"new" + data[5003:]
        await volume.files.flush(ino)
        assert await volume.read(ino) == new
        await volume.crash()
        assert await volume.read(ino) == new
        assert all(path.stat().st_nlink == 1 for path in (tmp_path / "cache" / "files").glob("*/*"))

    run(tmp_path, work)


def test_appended_blocks_are_cached(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = b""
        ino = await volume.make(b"log")
        for number in range(20):
            line = bytes([number + 65]) * 10_000
            await volume.write(ino, len(data), line)
            data += line
            await volume.files.flush()
            assert await volume.read(ino) == data
        # Only blocks that two appends share are fetched.
        assert len(gate.gets) <= 20

    run(tmp_path, work)


# The cache directory


def cache_files(path: Path) -> list[int]:
    return sorted(int(each.name, 16) for each in (path / "cache" / "files").glob("*/*"))


def prepare(path: Path) -> tuple[int, bytes]:
    """A volume that was closed with a file of 1 MiB in its cache."""
    data = os.urandom(MIB)
    inos = []

    async def work(volume: Volume, gate: Gate) -> None:
        inos.append(await write(volume, b"a", data))
        assert await volume.read(inos[0]) == data
        await landed(volume)

    run(path, work)
    return inos[0], data


def fetched(path: Path, ino: int, data: bytes) -> int:
    """Bytes fetched to read the file on a volume opened again."""
    found = 0

    async def work(volume: Volume, gate: Gate) -> None:
        nonlocal found
        assert await volume.read(ino) == data
        found = gate.bytes

    run(path, work)
    return found


def test_the_cache_survives_a_remount(tmp_path: Path) -> None:
    ino, data = prepare(tmp_path)
    assert fetched(tmp_path, ino, data) == 0


def test_the_cache_survives_a_crash(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await write(volume, b"a", data)
        assert await volume.read(ino) == data
        await landed(volume)
        await volume.crash()
        gate = Gate(volume)
        assert await volume.read(ino) == data
        assert not gate.gets

    run(tmp_path, work)


def edit_state(path: Path, **changes: object) -> None:
    file = path / "cache" / "state"
    file.write_bytes(msgspec.json.encode(msgspec.json.decode(file.read_bytes()) | changes))


def test_after_a_loss_of_power_the_cache_starts_afresh(tmp_path: Path) -> None:
    ino, data = prepare(tmp_path)
    edit_state(tmp_path, clean=False, boot="before")
    assert fetched(tmp_path, ino, data) >= len(data)


def test_after_a_clean_end_it_survives_a_reboot(tmp_path: Path) -> None:
    ino, data = prepare(tmp_path)
    edit_state(tmp_path, boot="before")
    assert fetched(tmp_path, ino, data) == 0


def test_a_volume_that_was_used_without_it_makes_it_start_afresh(tmp_path: Path) -> None:
    """Its contents may have changed: here they have."""
    ino, data = prepare(tmp_path)
    os.rename(tmp_path / "cache", tmp_path / "first")

    async def work(volume: Volume, gate: Gate) -> None:
        await volume.write(ino, 5000, b"other")

    run(tmp_path, work)
    shutil.rmtree(tmp_path / "cache")
    os.rename(tmp_path / "first", tmp_path / "cache")
    new = data[:5000] + b"other" + data[5005:]
    assert fetched(tmp_path, ino, new) >= len(data)


def test_a_copy_is_no_cache(tmp_path: Path) -> None:
    """Copying may turn holes into zeros, which would then look valid."""
    ino, data = prepare(tmp_path)
    os.rename(tmp_path / "cache", tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "cache")
    assert fetched(tmp_path, ino, data) >= len(data)


@pytest.mark.parametrize("state", [b"", b"{", b"\0" * 100, None])
def test_without_a_readable_state_it_starts_afresh(tmp_path: Path, state: bytes | None) -> None:
    ino, data = prepare(tmp_path)
    file = tmp_path / "cache" / "state"
    if state is None:
        file.unlink()
    else:
        file.write_bytes(state)
    assert fetched(tmp_path, ino, data) >= len(data)
    assert not list((tmp_path / "cache").glob("old.*"))


def test_another_volumes_cache_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(OSError, match="belongs to volume volume") as caught:
        CacheDirectory.open(str(tmp_path / "cache"), "another")
    assert caught.value.errno == errno.EINVAL


def test_a_cache_in_use_is_refused(tmp_path: Path) -> None:
    directory = CacheDirectory.open(str(tmp_path / "cache"), "volume")
    with pytest.raises(OSError, match="in use") as caught:
        CacheDirectory.open(str(tmp_path / "cache"), "volume")
    assert caught.value.errno == errno.EBUSY
    directory.close(clean=False)


def test_a_file_system_without_exact_holes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(fd: int) -> list[tuple[int, int]]:
        return [(start & -(1 << 16), end) for start, end in allocated_ranges(fd)]

    monkeypatch.setattr(directory_module, "allocated_ranges", rounded)
    with pytest.raises(OSError, match="ext4, XFS or Btrfs") as caught:
        CacheDirectory.open(str(tmp_path / "cache"), "volume")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_cut_cache_files_are_noticed(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await write(volume, b"a", data)
        assert await volume.read(ino) == data
        await landed(volume)
        os.truncate(next((tmp_path / "cache" / "files").glob("*/*")), 300_000)
        assert await volume.read(ino) == data
        assert await volume.read(ino) == data

    run(tmp_path, work)


def test_lost_under_us(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        contents = [os.urandom(MIB) for _ in range(3)]
        inos = [await write(volume, b"f%d" % number, data) for number, data in enumerate(contents)]
        assert await volume.read(inos[0]) == contents[0]
        await landed(volume)
        shutil.rmtree(tmp_path / "cache")
        for ino, data in zip(inos, contents, strict=True):
            assert await volume.read(ino) == data
        await landed(volume)
        count = len(gate.gets)
        assert await volume.read(inos[2]) == contents[2]
        assert len(gate.gets) == count

    run(tmp_path, work)


# Limits


def test_least_recently_used_files_go_first(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        contents = [os.urandom(MIB) for _ in range(8)]
        inos = [await write(volume, b"f%d" % number, data) for number, data in enumerate(contents)]
        for ino, data in zip(inos, contents, strict=True):
            assert await volume.read(ino) == data
            await landed(volume)
            assert await volume.read(inos[0]) == contents[0]
            if cached(volume).cache._evicting is not None:
                await cached(volume).cache._evicting
            assert cached(volume).cache.bytes <= 4 * MIB
        kept = cache_files(tmp_path)
        assert inos[0] in kept
        assert inos[-1] in kept
        assert inos[1] not in kept
        assert len(kept) <= 4

    run(tmp_path, work, CacheLimits(size=4 * MIB, free=0))


def test_a_file_that_is_being_read_goes_last(tmp_path: Path) -> None:
    """But it goes: it may be larger than the cache. What the kernel reads by itself stays."""

    async def work(volume: Volume, gate: Gate) -> None:
        contents = [os.urandom(MIB) for _ in range(3)]
        inos = [await write(volume, b"f%d" % number, data) for number, data in enumerate(contents)]
        for ino in inos:
            await volume.read(ino)
        await landed(volume)
        cache = cached(volume).cache
        read, held, idle = map(cache.find, inos)
        assert read is not None and held is not None and idle is not None
        read.readers += 1
        held.users += 1
        await cache.shrink(2 * MIB)
        assert cache_files(tmp_path) == inos[:2]
        await cache.shrink(0)
        assert cache_files(tmp_path) == [inos[1]]
        for ino, data in zip(inos, contents, strict=True):
            assert await volume.read(ino) == data
        read.readers -= 1
        held.users -= 1

    run(tmp_path, work)


def test_what_is_too_much_for_the_cache_is_not_kept(tmp_path: Path) -> None:
    async def work(volume: Volume, gate: Gate) -> None:
        inos = [await volume.make(name) for name in (b"a", b"b", b"c")]
        for ino, size in zip(inos, (MIB, 5 * MIB, MIB), strict=True):
            for start in range(0, size, MIB):
                await volume.write(ino, start, bytes([ino]) * MIB)
        await volume.files.flush()
        assert cache_files(tmp_path) == [inos[0], inos[2]]

    run(tmp_path, work, CacheLimits(size=16 * MIB, free=0))


def test_nothing_is_kept_while_the_cache_is_too_large(tmp_path: Path) -> None:
    """What fills it is in use, and cannot make room."""

    async def work(volume: Volume, gate: Gate) -> None:
        first = await write(volume, b"a", os.urandom(MIB))
        await volume.read(first)
        await landed(volume)
        cache = cached(volume).cache
        file = cache.find(first)
        assert file is not None
        file.users += 1
        cache.limits = CacheLimits(size=MIB // 2, free=0)
        second = await volume.make(b"b")
        await volume.write(second, 0, bytes(100_000))
        await volume.files.flush()
        assert cache_files(tmp_path) == [first]
        file.users -= 1

    run(tmp_path, work)


def test_room_that_others_need_is_left(tmp_path: Path) -> None:
    """With more to be left free than there is, nothing stays, and nothing is tried for ever."""

    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        for number in range(4):
            ino = await write(volume, b"f%d" % number, data)
            assert await volume.read(ino) == data
            await landed(volume)
            if cached(volume).cache._evicting is not None:
                await cached(volume).cache._evicting
        assert cache_files(tmp_path) == []

    run(tmp_path, work, CacheLimits(size=1 << 40, free=1 << 60))


def test_a_full_disk_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0

    def full(*_: object) -> None:
        nonlocal tried
        tried += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work(volume: Volume, gate: Gate) -> None:
        data = os.urandom(MIB)
        ino = await write(volume, b"a", data)
        monkeypatch.setattr(CacheDirectory, "fill", full)
        for _ in range(5):
            assert await volume.read(ino) == data
            await landed(volume)
        assert gate.bytes == 5 * len(data)
        assert tried == 1

    run(tmp_path, work)


def test_many_files_are_open_at_most_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polefs.data.cache.store._LOADED", 10)

    async def work(volume: Volume, gate: Gate) -> None:
        contents = [os.urandom(5000) for _ in range(60)]
        inos = []
        for number, data in enumerate(contents):
            inos.append(await volume.make(b"f%d" % number))
            await volume.write(inos[-1], 0, data)
        await volume.files.flush()
        for _ in range(2):
            for ino, data in zip(inos, contents, strict=True):
                assert await volume.read(ino) == data
            await landed(volume)
            assert len(cached(volume).cache._files) <= 10
            gate.gets.clear()
        assert cache_files(tmp_path) == inos

    run(tmp_path, work)


# The parts


def test_range_set_against_a_set() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        ranges, model = RangeSet(), set[int]()
        for _ in range(20):
            start = rng.randrange(40)
            end = rng.randrange(start, 41)
            if rng.random() < 0.6:
                ranges.add(start, end)
                model |= set(range(start, end))
            else:
                ranges.remove(start, end)
                model -= set(range(start, end))
            found = list(ranges)
            assert {each for low, high in found for each in range(low, high)} == model
            assert all(low < high for low, high in found)
            assert all(left[1] < right[0] for left, right in itertools.pairwise(found))
            start = rng.randrange(40)
            end = rng.randrange(start + 1, 41)
            wanted = set(range(start, end))
            assert ranges.covers(start, end) == (wanted <= model)
            assert {each for low, high in ranges.gaps(start, end) for each in range(low, high)} == wanted - model
            assert {each for low, high in ranges.within(start, end) for each in range(low, high)} == wanted & model


def test_streams_double_their_window_and_keep_ahead() -> None:
    streams = Streams()
    ahead = 0
    windows = []
    for start in range(0, 200 * MIB, 128 << 10):
        found = streams.note(start, start + (128 << 10))
        if found is not None:
            assert found[0] == max(ahead, start + (128 << 10))
            ahead = found[1]
            windows.append(ahead - start)
        assert ahead >= start + (128 << 10)
    assert windows == sorted(windows[:8]) + windows[8:]
    assert max(windows) <= 33 * MIB
    assert max(windows) >= 28 * MIB


def test_scattered_reads_are_no_stream() -> None:
    streams = Streams()
    assert all(streams.note(start, start + 4096) is None for start in range(10 * MIB, 1000 * MIB, 7 * MIB))


def test_regions_of_dense_reads_are_fetched_at_the_first_one() -> None:
    dense, sparse = Streams(), Streams()
    scattered = random.Random(1)
    for _ in range(1000):
        dense.region(scattered.randrange(256 * MIB))
        assert sparse.region(scattered.randrange(10_000_000 * MIB)) is None
    assert dense.region(300 * MIB + 5) == (300 * MIB, 304 * MIB)
    assert dense.region(300 * MIB + 5) is None
    dense.stopped(300 * MIB)
    assert dense.region(300 * MIB + 5) == (300 * MIB, 304 * MIB)


def test_the_last_block_ends_with_the_file(tmp_path: Path) -> None:
    directory = CacheDirectory.open(str(tmp_path), "volume")
    directory.begin(0, 1)
    directory.fill(directory.create(7), BLOCK, [b"x" * 100])
    os.truncate(directory.path_of(7), BLOCK + 100)
    _, valid = directory.load(7, BLOCK + 100)
    assert list(valid) == [(BLOCK, 2 * BLOCK)]
    _, valid = directory.load(7, 3 * BLOCK)  # somebody has cut it
    assert list(valid) == []
    directory.close(clean=True)


def test_fills_of_one_file_at_the_same_time(tmp_path: Path) -> None:
    directory = CacheDirectory.open(str(tmp_path), "volume")
    directory.begin(0, 1)
    data = os.urandom(64 * BLOCK)
    for attempt in range(40):
        file = directory.create(attempt)
        with ThreadPoolExecutor(8) as threads:
            starts = random.Random(attempt).sample(range(0, len(data), BLOCK), 64)
            blocks = [(file, start, [data[start : start + BLOCK]]) for start in starts]
            list(threads.map(lambda block: directory.fill(*block), blocks))
        assert Path(directory.path_of(attempt)).read_bytes() == data
    directory.close(clean=True)
