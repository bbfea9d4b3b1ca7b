"""Garbage collection: what is dead, half-dead or lost goes, all else stays, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from polefs.data.budget import MemoryBudget
from polefs.data.cipher import Cipher
from polefs.data.compact import Piece, make_pieces
from polefs.data.frames import Codec, Coding
from polefs.data.report import GarbageReport
from polefs.meta.model import ROOT_INO, Extent
from polefs.objects.base import segment_key
from tests.unit.data_helpers import Crash, Volume, ticks
from tests.unit.test_data_files import assert_sound

KIB = 1 << 10
MIB = 1 << 20
HOUR = 3600.0

STRESS = os.environ.get("POLEFS_STRESS") == "1"

both = pytest.mark.parametrize("cached", [False, True], ids=["local", "far"])


def run(volume: Volume, work: Callable[[Volume], Awaitable[None]]) -> None:
    """Work on a volume, which must be sound afterwards, and hold no more than it refers to."""

    async def main() -> None:
        await volume.open()
        await work(volume)
        await volume.files.flush()
        await volume.files.garbage.collect(grace=0)
        assert volume.files.budget.used == 0
        await volume.close()
        await assert_sound(volume.path, volume)

    asyncio.run(main())


def moments(turns: int) -> range:
    """Turns of the event loop after which something happens."""
    return range(0, turns, 1 if STRESS else turns // 6)


def block(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


async def collect(volume: Volume, grace: float = 0.0) -> GarbageReport:
    return await volume.files.garbage.collect(grace=grace)


async def fill(volume: Volume, count: int = 8, length: int = 300 * KIB) -> dict[int, bytes]:
    """Files whose contents share a segment, by inode number."""
    contents = {}
    for number in range(count):
        ino = await volume.make(b"%d" % number)
        contents[ino] = block(number, length)
        await volume.write(ino, 0, contents[ino])
    await volume.files.flush()
    return contents


async def remove(volume: Volume, number: int, contents: dict[int, bytes]) -> None:
    inode = await volume.meta.unlink(ROOT_INO, b"%d" % number)
    volume.files.forget(inode.ino)
    await volume.meta.release_orphans([inode.ino])
    contents.pop(inode.ino)


async def check(volume: Volume, contents: dict[int, bytes]) -> None:
    for ino, content in contents.items():
        assert await volume.read(ino) == content


def stored(volume: Volume) -> int:
    return sum(path.stat().st_size for path in volume.object_paths())


async def half_dead(volume: Volume) -> dict[int, bytes]:
    contents = await fill(volume)
    for number in (0, 1, 3, 4, 6):
        await remove(volume, number, contents)
    return contents


@both
def test_half_dead_segments_are_rewritten(tmp_path: Path, cached: bool) -> None:
    async def work(volume: Volume) -> None:
        contents = await half_dead(volume)
        before = [await volume.meta.get_inode(ino) for ino in contents]
        expected = GarbageReport(rewritten_segments=1, moved_bytes=900 * KIB, dead_objects=1, dead_bytes=8 * 300 * KIB)
        assert await collect(volume) == expected
        assert stored(volume) == 900 * KIB
        assert [await volume.meta.get_inode(ino) for ino in contents] == before
        await check(volume, contents)
        assert await collect(volume) == GarbageReport()

    run(Volume(tmp_path, cached=cached), work)


@both
def test_what_is_more_than_half_alive_stays(tmp_path: Path, cached: bool) -> None:
    async def work(volume: Volume) -> None:
        contents = await fill(volume)
        for number in range(4):
            await remove(volume, number, contents)
        assert await collect(volume) == GarbageReport()
        await check(volume, contents)

    run(Volume(tmp_path, cached=cached), work)


def test_compressed_and_encrypted(tmp_path: Path) -> None:
    volume = Volume(tmp_path, cached=True)
    volume.codec = Codec(Coding.ZSTD, Cipher(os.urandom(32)))

    async def work(volume: Volume) -> None:
        ino = await volume.make(b"text")
        text = b"all work and no play " * 50_000
        await volume.write(ino, 0, text)
        contents = await half_dead(volume)
        contents[ino] = text
        await volume.write(ino, 0, text[: len(text) // 4])
        await volume.files.flush()
        report = await collect(volume)
        assert report.rewritten_segments == 1
        for path in volume.object_paths():
            assert b"all work" not in path.read_bytes()
        await check(volume, contents)

    async def main() -> None:
        await volume.open()
        await work(volume)
        await volume.close()

    asyncio.run(main())


def test_many_segments_become_few(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        contents = {}
        for number in range(12):
            ino = await volume.make(b"%d" % number)
            contents[ino] = bytearray(block(number, 4 * MIB))
            await volume.write(ino, 0, bytes(contents[ino]))
            await volume.files.flush()
            await volume.write(ino, MIB, b"x" * (3 * MIB))
            contents[ino][MIB:] = b"x" * (3 * MIB)
            await volume.files.flush()
        assert len(volume.object_paths()) == 24
        report = await collect(volume)
        assert (report.rewritten_segments, report.moved_bytes, report.dead_objects) == (12, 12 * MIB, 12)
        assert len(volume.object_paths()) == 13
        for ino, content in contents.items():
            assert await volume.read(ino) == content

    run(Volume(tmp_path, cached=True), work)


def test_large_extents_are_cut(tmp_path: Path) -> None:
    """A local file that was taken over as a whole is one segment, whatever its size."""

    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        content = bytearray(block(1, 50 * MIB))
        await volume.write(ino, 0, bytes(content))
        await volume.files.flush()
        assert [path.stat().st_size for path in volume.object_paths()] == [50 * MIB]
        await volume.truncate(ino, 22 * MIB)
        await volume.files.flush()
        report = await collect(volume)
        assert (report.rewritten_segments, report.moved_bytes, report.dead_bytes) == (1, 22 * MIB, 50 * MIB)
        assert sorted(path.stat().st_size for path in volume.object_paths()) == [6 * MIB, 16 * MIB]
        assert await volume.read(ino) == content[: 22 * MIB]

    run(Volume(tmp_path), work)


def test_shared_bytes_are_moved_once(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        contents = await fill(volume, count=8, length=512 * KIB)
        first = next(iter(contents))
        other = await volume.make(b"other")
        assert await volume.copy(first, 0, other, 100, 400 * KIB) == 400 * KIB
        for number in range(1, 8):
            await remove(volume, number, contents)
        contents[other] = bytes(100) + contents[first][: 400 * KIB]
        report = await collect(volume)
        assert report.rewritten_segments == 1
        assert stored(volume) == 512 * KIB
        await check(volume, contents)

    run(Volume(tmp_path, cached=True), work)


def test_pieces() -> None:
    extents = [
        (3, Extent(50, 10, 9, 100)),
        (1, Extent(0, 30, 9, 0)),
        (2, Extent(7, 30, 9, 20)),
        (4, Extent(0, 5, 9, 50)),
    ]
    assert make_pieces(9, extents) == [
        Piece(9, 0, 50, (extents[1], extents[2])),
        Piece(9, 50, 55, (extents[3],)),
        Piece(9, 100, 110, (extents[0],)),
    ]
    assert [(move.extent, move.offset) for move in make_pieces(9, extents)[0].moves(10, 1000)] == [
        (Extent(0, 30, 9, 0), 1000),
        (Extent(7, 30, 9, 20), 1020),
    ]
    long = Extent(10, 9 * MIB, 9, 5)
    pieces = make_pieces(9, [(1, long)])
    assert [piece.end - piece.start for piece in pieces] == [4 * MIB, 4 * MIB, MIB]
    assert [move.extent for piece in pieces for move in piece.moves(10, 0)] == [
        Extent(10, 4 * MIB, 9, 5),
        Extent(10 + 4 * MIB, 4 * MIB, 9, 5 + 4 * MIB),
        Extent(10 + 8 * MIB, MIB, 9, 5 + 8 * MIB),
    ]


@both
def test_what_changes_meanwhile_is_not_brought_back(tmp_path: Path, cached: bool) -> None:
    """At every moment of a pass: written, cut off, cloned, removed."""

    async def change(volume: Volume, contents: dict[int, bytes]) -> None:
        written, cut, cloned, removed = contents
        await volume.write(written, 1000, b"new" * 20_000)
        contents[written] = contents[written][:1000] + b"new" * 20_000 + contents[written][61_000:]
        await volume.truncate(cut, 100_001)
        contents[cut] = contents[cut][:100_001]
        copy = await volume.make(b"copy")
        assert await volume.copy(cloned, 100, copy, 0, 200_000) == 200_000
        contents[copy] = contents[cloned][100:200_100]
        await volume.files.flush()
        await volume.meta.unlink(ROOT_INO, b"7")
        volume.files.forget(removed)
        await volume.meta.release_orphans([removed])
        contents.pop(removed)

    for turns in moments(80):

        async def work(volume: Volume, turns: int = turns) -> None:
            contents = await fill(volume)
            for number in (0, 1, 2, 3):
                await remove(volume, number, contents)
            await volume.write(max(contents), 300 * KIB - 10, b"." * 10)
            contents[max(contents)] = contents[max(contents)][:-10] + b"." * 10
            await volume.files.flush()
            collecting = asyncio.create_task(collect(volume))
            await ticks(turns)
            await change(volume, contents)
            await check(volume, contents)
            await collecting
            await check(volume, contents)

        path = tmp_path / str(turns)
        path.mkdir()
        run(Volume(path, cached=cached), work)


@both
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("where", ["put", "move_extents", "sync", "delete", "forget_segments", "allocate_segments"])
def test_a_crash_at_any_step(tmp_path: Path, where: str, after: bool, cached: bool) -> None:
    for count in (1, 2, 3) if STRESS else (1, 2) if where == "sync" else (1,):

        async def work(volume: Volume, count: int = count) -> None:
            contents = await half_dead(volume)
            dying = volume.dying_objects if where in ("put", "delete") else volume.dying_meta
            dying.methods, dying.after, dying.countdown = {where}, after, count
            try:
                await collect(volume)
            except Crash:
                pass
            await volume.crash()
            await check(volume, contents)
            await collect(volume)
            await check(volume, contents)
            assert stored(volume) == 900 * KIB

        path = tmp_path / str(count)
        path.mkdir()
        run(Volume(path, cached=cached), work)


def test_a_pass_that_is_given_up(tmp_path: Path) -> None:
    """As by an unmount, at every moment."""
    for turns in moments(60):

        async def work(volume: Volume, turns: int = turns) -> None:
            contents = await half_dead(volume)
            collecting = asyncio.create_task(collect(volume))
            await ticks(turns)
            await volume.files.garbage.stop()
            try:
                await collecting
            except OSError as error:
                assert "is being unmounted" in str(error)
            await volume.close()
            await assert_sound(volume.path, volume)
            await volume.open()
            await check(volume, contents)

        path = tmp_path / str(turns)
        path.mkdir()
        run(Volume(path, cached=True), work)


def test_a_failing_store_ends_the_pass(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        contents = await half_dead(volume)
        dying = volume.dying_objects
        dying.methods, dying.error, dying.countdown = {"put"}, OSError(28, "No space left on device"), 1
        with pytest.raises(OSError, match="No space"):
            await collect(volume)
        dying.countdown = None
        await volume.files.flush()
        await check(volume, contents)
        assert (await collect(volume)).rewritten_segments == 1
        assert stored(volume) == 900 * KIB

    run(Volume(tmp_path, cached=True), work)


@both
def test_damaged_segments_stay(tmp_path: Path, cached: bool) -> None:
    """What is wrong is not written anew with a checksum that fits; the others are rewritten."""

    async def main() -> None:
        volume = Volume(tmp_path, cached=cached)
        await volume.open()
        await half_dead(volume)
        (damaged,) = volume.object_paths()
        body = bytearray(damaged.read_bytes())
        body[2 * 300 * KIB + 5] ^= 1
        damaged.write_bytes(body)
        ino = await volume.make(b"sound")
        await volume.write(ino, 0, block(9, 300 * KIB))
        await volume.files.flush()
        await volume.truncate(ino, 5000)
        await volume.files.flush()
        report = await collect(volume)
        assert (report.rewritten_segments, report.damaged_segments, report.dead_objects) == (1, 1, 1)
        assert damaged.exists()
        assert await volume.read(ino) == block(9, 300 * KIB)[:5000]
        await volume.close()

    asyncio.run(main())


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read and written takes its part of the budget, and never waits for what it holds itself."""
    highest = 0
    take = MemoryBudget.take

    async def watched(self: MemoryBudget, size: int) -> int:
        nonlocal highest
        taken = await take(self, size)
        highest = max(highest, self.used)
        return taken

    monkeypatch.setattr("polefs.data.files._MEMORY", 8 * MIB)
    monkeypatch.setattr(MemoryBudget, "take", watched)

    async def work(volume: Volume) -> None:
        nonlocal highest
        contents = await fill(volume, count=20, length=700 * KIB)
        for number in range(20):
            if number % 3:
                await remove(volume, number, contents)
        assert highest <= 8 * MIB
        highest = 0
        async with asyncio.timeout(60):
            assert (await collect(volume)).moved_bytes == 6 * 700 * KIB
        assert 4 * MIB < highest <= 8 * MIB
        await check(volume, contents)

    run(Volume(tmp_path, cached=True), work)


# Grace


def test_the_dead_are_kept_for_the_grace_time(tmp_path: Path) -> None:
    volume = Volume(tmp_path, cached=True)
    volume.grace = HOUR

    async def work(volume: Volume) -> None:
        contents = await half_dead(volume)
        volume.files.start()
        volume.files.reclaim_soon()
        report = await volume.files.garbage.collect()
        assert (report.rewritten_segments, report.dead_objects, report.waiting_objects) == (1, 0, 1)
        assert len(volume.object_paths()) == 2
        await volume.close()
        await volume.open()
        assert len(volume.object_paths()) == 2
        report = await volume.files.garbage.collect(grace=0, dry_run=True)
        assert (report.dead_objects, report.waiting_objects) == (1, 0)
        assert len(volume.object_paths()) == 2
        report = await volume.files.garbage.collect(grace=0)
        assert (report.dead_objects, report.dead_bytes, report.waiting_objects) == (1, 2400 * KIB, 0)
        assert len(volume.object_paths()) == 1
        await check(volume, contents)

    run(volume, work)


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        contents = await half_dead(volume)
        lost = await lose_an_object(volume)
        before = volume.object_paths()
        report = await volume.files.garbage.collect(grace=0, dry_run=True)
        assert report == GarbageReport(
            dry_run=True, rewritten_segments=1, moved_bytes=900 * KIB, lost_objects=1, lost_bytes=5
        )
        assert volume.object_paths() == before
        assert lost.exists()
        await check(volume, contents)

    run(Volume(tmp_path, cached=True), work)


# Lost objects


async def lose_an_object(volume: Volume) -> Path:
    """One that was written, late, under a number that was given up."""
    ids = volume.files._writeback.ids
    number = await ids.take()
    ids.settle([number])
    await volume.objects.put(segment_key(number), [b"bytes"])
    return volume.path / "objects" / segment_key(number)


def test_lost_objects_go_after_the_grace_time(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        young, old = await lose_an_object(volume), await lose_an_object(volume)
        other = volume.path / "objects" / "segments" / "0" / "notes.txt"
        other.write_text("not ours")
        past = time.time() - 2 * HOUR
        for path in (old, other):
            os.utime(path, (past, past))
        report = await collect(volume, HOUR)
        assert (report.lost_objects, report.lost_bytes) == (1, 5)
        assert young.exists() and not old.exists()
        assert (await collect(volume)).lost_objects == 1
        assert not young.exists()
        assert other.read_text() == "not ours"
        other.unlink()

    run(Volume(tmp_path, cached=True), work)


def test_what_is_about_to_be_committed_is_not_lost(tmp_path: Path) -> None:
    """Nor is anything written later than that."""

    async def work(volume: Volume) -> None:
        reached, go_on = asyncio.Event(), asyncio.Event()
        commit = volume.meta.commit_data

        async def late(*args: object) -> None:
            reached.set()
            await go_on.wait()
            await commit(*args)  # type: ignore[arg-type]

        ino = await volume.make(b"f")
        await volume.write(ino, 0, block(1, 100_000))
        volume.meta.commit_data = late  # type: ignore[method-assign, assignment]
        flushing = asyncio.create_task(volume.files.flush())
        await reached.wait()
        later = await lose_an_object(volume)
        assert len(volume.object_paths()) == 2
        assert (await collect(volume)).lost_objects == 0
        go_on.set()
        await flushing
        assert (await collect(volume)).lost_objects == 1
        assert not later.exists()
        assert await volume.read(ino) == block(1, 100_000)

    run(Volume(tmp_path, cached=True), work)


def test_lost_in_a_crash(tmp_path: Path) -> None:
    """The journal that told of the object has been lost with the process."""

    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, block(1, 100_000))
        volume.dying_objects.methods, volume.dying_objects.after, volume.dying_objects.countdown = {"put"}, True, 1
        with pytest.raises(Crash):
            await volume.files.flush()
        for name in volume.local():
            (volume.path / "local" / name).unlink()
        await volume.crash()
        assert len(volume.object_paths()) == 1
        assert (await collect(volume, HOUR)).lost_objects == 0
        assert (await collect(volume)).lost_objects == 1
        assert volume.object_paths() == []

    run(Volume(tmp_path, cached=True), work)


# In the background


def test_passes_in_the_background(tmp_path: Path) -> None:
    volume = Volume(tmp_path, cached=True)
    volume.gc_interval = 0.01

    async def work(volume: Volume) -> None:
        contents = await half_dead(volume)
        rewritten = asyncio.Event()
        move = volume.meta.move_extents

        async def watched(*args: object) -> int:
            moved = await move(*args)  # type: ignore[arg-type]
            rewritten.set()
            return moved

        volume.meta.move_extents = watched  # type: ignore[method-assign, assignment]
        volume.files.start()
        async with asyncio.timeout(60):
            await rewritten.wait()
        await check(volume, contents)

    run(volume, work)
