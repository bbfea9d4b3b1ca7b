"""The data path, one behaviour a test; test_data_model.py combines them at random."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from polefs.data import journal
from polefs.data.dirty import Limits
from polefs.data.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from polefs.data.scrub import check_objects
from polefs.data.state import FileState
from polefs.meta.check import check
from polefs.meta.model import FILE_SIZE_MAX, ROOT_INO, SetAttr
from polefs.meta.store.sqlite import SqliteStore
from polefs.objects.base import StoreError
from polefs.objects.directory import DirectoryStore
from tests.unit.data_helpers import Crash, Volume, ticks

MIB = 1 << 20


def use(
    path: Path, work: Callable[[Volume], Awaitable[None]], limits: Limits | None = None, flush_after: float = 5.0
) -> None:
    """Run the test, close the volume, and check it: nothing local is left, metadata and objects are sound."""

    async def main() -> None:
        volume = Volume(path, limits, flush_after)
        await volume.open()
        await work(volume)
        await volume.close()
        assert volume.local() == []
        await assert_sound(path, volume)

    asyncio.run(main())


async def assert_sound(path: Path, volume: Volume) -> None:
    store = SqliteStore.open(str(path / "meta.db"))
    try:
        assert list(check(store)) == []
        assert [problem async for problem in check_objects(store, volume.reopened_objects(), data=True)] == []
    finally:
        store.shutdown()


# Where contents go


def test_a_tiny_file_is_inline_and_needs_no_local_file(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"x" * 4096)
        assert [name for name in volume.local() if not name.startswith("journal")] == []
        await volume.files.flush()
        inode = await volume.meta.get_inode(ino)
        assert inode.inline == b"x" * 4096
        assert volume.object_paths() == []

    use(tmp_path, work)


def test_many_small_files_share_a_segment(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        inos = [await volume.make(b"%d" % number) for number in range(30)]
        for number, ino in enumerate(inos):
            await volume.write(ino, 0, bytes([number]) * 10_000)
        await volume.files.flush()
        assert len(volume.object_paths()) == 1
        for number, ino in enumerate(inos):
            assert await volume.read(ino) == bytes([number]) * 10_000

    use(tmp_path, work)


def test_a_whole_replica_is_adopted_by_link_and_copied_on_the_next_change(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        data = os.urandom(3 * MIB)
        for start in range(0, len(data), MIB):
            await volume.write(ino, start, data[start : start + MIB])
        (replica,) = [name for name in volume.local() if name.startswith(f"{ino}.")]
        identity = os.stat(tmp_path / "local" / replica).st_ino
        await volume.files.flush()
        (path,) = volume.object_paths()
        assert os.stat(path).st_ino == identity
        assert os.stat(path).st_nlink == 1
        assert await volume.read(ino) == data
        await volume.write(ino, 100, b"changed")
        assert path.read_bytes() == data
        await volume.files.flush()
        assert path.read_bytes() == data
        assert await volume.read(ino) == data[:100] + b"changed" + data[107:]

    use(tmp_path, work)


def test_an_adopted_replica_has_the_size_of_the_file(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        data = os.urandom(2 * MIB)
        await volume.write(ino, 0, data)
        await volume.write(ino, 5, b"small")
        await volume.truncate(ino, MIB + 5)
        await volume.files.flush()
        (path,) = volume.object_paths()
        assert path.read_bytes() == data[:5] + b"small" + data[10 : MIB + 5]

    use(tmp_path, work)


def test_without_hard_links_contents_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(volume: Volume) -> None:
        async def refuse(key: str, path: str) -> bool:
            return False

        monkeypatch.setattr(volume.objects, "adopt", refuse)
        ino = await volume.make(b"f")
        data = os.urandom(18 * MIB)
        for start in range(0, len(data), MIB):
            await volume.write(ino, start, data[start : start + MIB])
        await volume.files.flush()
        assert sorted(path.stat().st_size for path in volume.object_paths()) == [2 * MIB, 16 * MIB]
        assert await volume.read(ino) == data

    use(tmp_path, work)


def test_an_inline_file_that_grows_takes_its_contents_along(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"head")
        await volume.files.flush()
        await volume.write(ino, 100_000, b"tail")
        await volume.files.flush()
        inode = await volume.meta.get_inode(ino)
        assert inode.inline is None
        assert inode.allocated == 8
        assert await volume.read(ino) == b"head" + bytes(99_996) + b"tail"
        await volume.truncate(ino, 4)
        await volume.files.flush()
        assert (await volume.meta.get_inode(ino)).inline == b"head"

    use(tmp_path, work)


def test_overwritten_objects_are_deleted(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        for number in range(4):
            await volume.write(ino, 0, bytes([number]) * 50_000)
            await volume.files.flush()
        await volume.files._reclaimer.reclaim()
        assert len(volume.object_paths()) == 1
        await volume.truncate(ino, 0)
        await volume.files.flush()
        await volume.files._reclaimer.reclaim()
        assert volume.object_paths() == []

    use(tmp_path, work)


def test_a_file_may_have_16_tib(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        size = 16 << 40
        await volume.truncate(ino, size)
        await volume.write(ino, 8 << 40, b"middle")
        await volume.write(ino, size - 3, b"end")
        for _ in range(2):
            assert (await volume.inode(ino)).size == size
            assert (await volume.inode(ino)).allocated == 9
            assert await volume.read(ino, (8 << 40) - 2, 10) == b"\0\0middle\0\0"
            assert await volume.read(ino, size - 5, 100) == b"\0\0end"
            assert await volume.seek(ino, 0, os.SEEK_DATA) == 8 << 40
            assert await volume.seek(ino, 8 << 40, os.SEEK_HOLE) == (8 << 40) + 4096
            assert await volume.seek(ino, (8 << 40) + 4096, os.SEEK_DATA) == (size - 3) & -4096
            await volume.files.flush()
        with pytest.raises(OSError) as caught:
            await volume.write(ino, FILE_SIZE_MAX - 1, b"xx")
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError) as caught:
            await volume.truncate(ino, FILE_SIZE_MAX + 1)
        assert caught.value.errno == errno.EFBIG

    use(tmp_path, work)


# Operations


@pytest.mark.parametrize("flushed", [False, True])
def test_seek_and_fallocate(tmp_path: Path, flushed: bool) -> None:
    async def work(volume: Volume) -> None:
        async def step() -> None:
            if flushed:
                await volume.files.flush()

        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"x" * 300_000)
        await step()
        await volume.fallocate(ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 100_000, 50_000)
        await step()
        assert await volume.seek(ino, 0, os.SEEK_HOLE) == 25 * 4096
        assert await volume.seek(ino, 25 * 4096, os.SEEK_DATA) == 36 * 4096
        assert await volume.seek(ino, 150_000, os.SEEK_HOLE) == 300_000
        assert (await volume.inode(ino)).allocated == 250_000
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for offset in (300_000, 300_001, -1):
                with pytest.raises(OSError) as caught:
                    await volume.seek(ino, offset, whence)
                assert caught.value.errno == errno.ENXIO
        await volume.fallocate(ino, FALLOC_FL_ZERO_RANGE, 290_000, 20_000)
        await step()
        assert (await volume.inode(ino)).size == 310_000
        await volume.fallocate(ino, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 280_000, 50_000)
        await volume.fallocate(ino, FALLOC_FL_KEEP_SIZE, 0, 1_000_000)
        assert (await volume.inode(ino)).size == 310_000
        await volume.fallocate(ino, 0, 0, 400_000)
        await step()
        assert (await volume.inode(ino)).size == 400_000
        with pytest.raises(OSError) as caught:
            await volume.seek(ino, 69 * 4096, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        assert await volume.read(ino, 279_998, 4) == b"xx\0\0"

    use(tmp_path, work)


def test_fallocate_errors(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        for mode, offset, length, number in (
            (FALLOC_FL_PUNCH_HOLE, 0, 1, errno.EOPNOTSUPP),
            (0x08, 0, 1, errno.EOPNOTSUPP),
            (0, -1, 1, errno.EINVAL),
            (0, 0, 0, errno.EINVAL),
            (0, FILE_SIZE_MAX, 1, errno.EFBIG),
        ):
            with pytest.raises(OSError) as caught:
                await volume.fallocate(ino, mode, offset, length)
            assert caught.value.errno == number

    use(tmp_path, work)


def test_a_copy_shares_extents(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        source, target = await volume.make(b"s"), await volume.make(b"t")
        data = os.urandom(2 * MIB)
        await volume.write(source, 0, data)
        assert await volume.copy(source, 0, target, 0, len(data)) == len(data)
        assert len(volume.object_paths()) == 1
        assert await volume.read(target) == data
        await volume.write(source, 0, data[:10])
        assert await volume.copy(source, MIB, source, 2 * MIB, 10 * MIB) == MIB
        assert await volume.read(source) == data + data[MIB:]
        with pytest.raises(OSError) as caught:
            await volume.copy(source, 0, source, 100_000, 200_000)
        assert caught.value.errno == errno.EINVAL
        assert await volume.copy(source, 3 * MIB, target, 0, 100) == 0
        await volume.write(source, 0, b"only the source")
        assert await volume.read(target) == data

    use(tmp_path, work)


def test_an_old_journal_does_not_undo_a_copy(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        source, target = await volume.make(b"s"), await volume.make(b"t")
        new, old = os.urandom(100_000), os.urandom(100_000)
        await volume.write(source, 0, new)
        await volume.write(target, 0, old)
        assert await volume.copy(source, 0, target, 0, 100_000) == 100_000
        await volume.write(target, 50, b"later")
        await volume.crash()
        assert await volume.read(target) == new[:50] + b"later" + new[55:]

    use(tmp_path, work)


@pytest.mark.parametrize("truncate", [False, True])
def test_a_replay_leaves_an_adopted_replica_alone(tmp_path: Path, truncate: bool) -> None:
    """It has become an object, which another file shares: what is written afterwards must not go into it."""

    async def work(volume: Volume) -> None:
        source, target = await volume.make(b"s"), await volume.make(b"t")
        data = os.urandom(3 * MIB)
        await volume.write(source, 0, data)
        assert await volume.copy(source, 0, target, 0, len(data)) == len(data)
        if truncate:
            await volume.truncate(source, 2 * MIB)
        else:
            await volume.write(source, 0, b"later")
        await volume.crash()
        assert await volume.read(target) == data
        assert await volume.read(source) == (data[: 2 * MIB] if truncate else b"later" + data[5:])

    use(tmp_path, work)


# Durability


@pytest.mark.parametrize("size", [100, 5000, 100_000, 2 * MIB])
@pytest.mark.parametrize("where", ["put", "adopt", "commit_data", "sync"])
@pytest.mark.parametrize("after", [False, True])
def test_death_at_any_step_of_write_back(tmp_path: Path, size: int, where: str, after: bool) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        data = os.urandom(size)
        await volume.write(ino, 0, data, now=1234)
        dying = volume.dying_objects if where in ("put", "adopt") else volume.dying_meta
        dying.methods, dying.countdown, dying.after = {where}, 1, after
        try:
            await volume.files.flush()
        except Crash:
            pass
        await volume.crash()
        assert await volume.read(ino) == data
        assert (await volume.inode(ino)).mtime == 1234

    use(tmp_path, work)


@pytest.mark.parametrize("base", [0, 3000, 1_500_000])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_many_extents_are_committed_in_steps(tmp_path: Path, base: int, failing: int) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        content = bytearray(os.urandom(base))
        if base:
            await volume.write(ino, 0, bytes(content))
            await volume.files.flush()
        content.extend(bytes(400 * 5000 + 10 - base))
        for number in range(401):
            await volume.write(ino, number * 5000, b"0123456789")
            content[number * 5000 : number * 5000 + 10] = b"0123456789"
        volume.dying_meta.methods, volume.dying_meta.countdown = {"commit_data"}, failing
        try:
            await volume.files.flush()
        except Crash:
            pass
        assert await volume.read(ino) == content
        await volume.crash()
        assert await volume.read(ino) == content
        assert await volume.seek(ino, 1_995_001, os.SEEK_HOLE) == 2_000_010

    use(tmp_path, work)


def test_a_time_is_not_brought_back_by_a_journal_newer_than_the_contents(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino, other = await volume.make(b"f"), await volume.make(b"other")

        async def set_mtime(mtime: int) -> None:
            volume.files.set_mtime(ino, mtime)
            await volume.meta.set_attributes(ino, SetAttr(mtime=mtime))

        await volume.write(ino, 0, b"x")
        await volume.files._log.rotate()
        await set_mtime(42)
        await volume.write(other, 0, b"keeps the second journal")
        await volume.files.flush(ino)
        await volume.files._flusher._retire()  # the first one
        await set_mtime(43)
        await volume.crash()
        assert (await volume.inode(ino)).mtime == 43

    use(tmp_path, work)


def test_a_time_that_the_user_set_survives_a_replay(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        inos = [await volume.make(b"%d" % number) for number in range(3)]
        for ino in inos:
            await volume.write(ino, 0, b"x")

        async def set_mtime(ino: int) -> None:
            volume.files.set_mtime(ino, 42)
            await volume.meta.set_attributes(ino, SetAttr(mtime=42))

        await set_mtime(inos[0])
        await volume.files.flush(inos[1])
        await set_mtime(inos[1])  # committed, but the journal still tells of the write
        await set_mtime(inos[2])
        await volume.write(inos[2], 0, b"y", now=99)
        assert [(await volume.inode(ino)).mtime for ino in inos] == [42, 42, 99]
        await volume.crash()
        assert [(await volume.inode(ino)).mtime for ino in inos] == [42, 42, 99]

    use(tmp_path, work)


def test_a_removed_file_is_not_written_back(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        keep, gone, during = [await volume.make(name) for name in (b"keep", b"gone", b"during")]
        for ino in (keep, gone, during):
            await volume.write(ino, 0, b"x" * 200_000)
        await volume.meta.unlink(ROOT_INO, b"gone")
        volume.files.forget(gone)
        await volume.meta.release_orphans([gone])
        flushing = asyncio.create_task(volume.files.flush())
        await ticks(3)
        await volume.meta.unlink(ROOT_INO, b"during")
        volume.files.forget(during)
        await volume.meta.release_orphans([during])
        await flushing
        assert volume.files.dirty_bytes == 0
        assert await volume.read(keep) == b"x" * 200_000

    use(tmp_path, work)


def test_replay_passes_over_a_removed_file(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        gone = await volume.make(b"gone")
        await volume.write(gone, 0, b"x" * 200_000)
        await volume.meta.unlink(ROOT_INO, b"gone")
        await volume.meta.release_orphans([gone])
        await volume.crash()
        assert volume.files.dirty_bytes == 0

    use(tmp_path, work)


def test_sync_makes_journal_and_replica_durable_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    async def work(volume: Volume) -> None:
        small, large = await volume.make(b"small"), await volume.make(b"large")
        await volume.write(small, 0, b"x")
        await volume.write(large, 0, b"x" * 200_000)
        await volume.meta.sync()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fdatasync)
            await volume.files.sync(large, False)
            assert [name.partition(".")[0] for name in synced] == [str(large), "journal"]
            await volume.files.sync(large, True)
            await volume.files.sync(small, True)
            assert len(synced) == 2
            await volume.write(small, 0, b"y")
            await asyncio.gather(*(volume.files.sync(small, True) for _ in range(10)))
            # The first goes at once, all who come meanwhile share the next.
            assert len(synced) <= 4

    use(tmp_path, work)


@pytest.mark.parametrize("copied", [False, True])
def test_sync_of_a_committed_file_makes_durable_what_the_journal_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """A replay of half of it would bring back what was there before."""
    synced: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).partition(".")[0])
        real(fd)

    async def work(volume: Volume) -> None:
        source, ino = await volume.make(b"s"), await volume.make(b"f")
        await volume.write(ino, 0, b"old" * 100_000)
        await volume.files.sync(ino, False)
        await volume.write(ino, 0, b"new" * 50_000)
        if copied:
            await volume.write(source, 0, b"src" * 50_000)
            assert await volume.copy(source, 0, ino, 0, 150_000) == 150_000
        else:
            await volume.files.flush(ino)
        await volume.meta.sync()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fdatasync)
            await volume.files.sync(ino, False)
            assert synced == [str(ino), "journal"]
            await volume.files.sync(ino, False)
            await volume.files.flush()
            del synced[:]
            await volume.files.sync(ino, False)
            assert synced == []

    use(tmp_path, work)


def test_sync_to_the_store_ends_what_the_journal_tells(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        volume.files._sync_to_store = True
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"a" * 200_000)
        await volume.write(ino, 100, b"b" * 100)
        await volume.files.sync(ino)
        assert (await volume.meta.get_inode(ino)).allocated == 200_000
        journal = volume.files._log.current
        assert journal.synced == journal.end
        await volume.write(ino, 150, b"c" * 100)
        await volume.crash()
        assert await volume.read(ino) == b"a" * 100 + b"b" * 50 + b"c" * 100 + b"a" * 199_750
        await volume.files.flush()
        # Only what came after it was written back once more.
        assert sorted(path.stat().st_size for path in volume.object_paths()) == [100, 200_000]

    use(tmp_path, work)


def test_sync_to_the_store_of_shared_contents(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        volume.files._sync_to_store = True
        source, target = await volume.make(b"source"), await volume.make(b"target")
        await volume.write(source, 0, b"s" * 200_000)
        await volume.write(target, 0, b"t" * 200_000)
        assert await volume.copy(source, 0, target, 0, 200_000) == 200_000
        await volume.files.sync(target)
        # A replay that knows of the write and not that it is over would bring it back.
        journal = volume.files._log.current
        assert journal.synced == journal.end

    use(tmp_path, work)


def test_a_store_out_of_reach_is_waited_for_but_not_at_the_end(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        data = os.urandom(200_000)
        await volume.write(ino, 0, data)
        volume.dying_objects.methods, volume.dying_objects.countdown = {"put"}, 1
        volume.dying_objects.error, volume.dying_objects.permanent = (
            StoreError(errno.EIO, "away", transient=True),
            False,
        )
        await volume.files.flush()
        assert volume.files.dirty_bytes == 0
        await volume.write(ino, 0, data[::-1])
        volume.dying_objects.countdown, volume.dying_objects.permanent = 1, True
        with pytest.raises(OSError, match="away"):
            await volume.files.close()
        await volume.objects.close()
        await volume.open_files()
        assert await volume.read(ino) == data[::-1]

    use(tmp_path, work)


def test_what_was_synced_is_not_cut_before_that_is_durable(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, os.urandom(3 * MIB))
        await volume.files.sync(ino)
        await volume.truncate(ino, 2 * MIB)
        volume.dying_meta.methods, volume.dying_meta.countdown = {"commit_data"}, 1
        volume.dying_meta.error, volume.dying_meta.permanent = OSError(errno.EIO, "no"), False
        with pytest.raises(OSError, match="no"):
            await volume.files.flush()
        # A loss of power now may take the record of the truncation, but not that of the write.
        replicas = [name for name in volume.local() if name.startswith(f"{ino}.")]
        assert [(volume.path / "local" / name).stat().st_size for name in replicas] == [3 * MIB]
        await volume.files.flush()
        assert (await volume.meta.get_inode(ino)).size == 2 * MIB

    use(tmp_path, work)


def test_who_waits_for_a_file_waits_for_no_other(tmp_path: Path) -> None:
    """Though more of it has been submitted meanwhile, which follows."""

    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        for start in range(0, 40 * MIB, 2 * MIB):
            await volume.write(ino, start, bytes(2 * MIB - 1))
        begun, goes_on = asyncio.Semaphore(0), asyncio.Event()
        put = volume.objects.put

        async def slow(key: str, parts: list[bytes]) -> None:
            begun.release()
            await goes_on.wait()
            await put(key, parts)

        volume.objects.put = slow  # type: ignore[method-assign]
        writeback = volume.files._writeback
        writeback._normal.workers = 1
        submitted = [writeback.submit(ino, None)]
        async with asyncio.timeout(60):
            await begun.acquire()
            submitted.append(writeback.submit(ino, None))
            submitted.append(writeback.submit(ino, None, urgent=True))
            await begun.acquire()  # though the worker for what nobody waits for is busy
        goes_on.set()
        await asyncio.wait(submitted)
        assert volume.files.dirty_bytes == 0

    use(tmp_path, work)


def test_objects_that_cannot_be_deleted_hinder_neither_the_end_nor_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def delete(self: DirectoryStore, keys: object) -> None:
        raise StoreError(errno.EACCES, "no permission")

    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        with monkeypatch.context() as forbidden:
            forbidden.setattr(DirectoryStore, "delete", delete)
            for _ in range(2):
                await volume.write(ino, 0, os.urandom(200_000))
                await volume.files.flush()
            await volume.files.close()
            assert not volume.local()
            await volume.objects.close()
            await volume.open_files()
            assert len(volume.object_paths()) == 2
        await volume.crash()
        await volume.files.make_room()
        assert len(volume.object_paths()) == 1
        assert len(await volume.read(ino)) == 200_000

    use(tmp_path, work)


def test_the_end_waits_once_for_a_store_out_of_reach(tmp_path: Path) -> None:
    """Not once for each segment."""

    async def work(volume: Volume) -> None:
        for name in range(30):
            ino = await volume.make(b"%d" % name)
            for start in range(0, 4 * MIB, 2 * MIB):
                await volume.write(ino, start, bytes(2 * MIB - 1))
        attempts = 0

        async def put(key: str, parts: object) -> None:
            nonlocal attempts
            attempts += 1
            await asyncio.sleep(0.01)
            raise StoreError(errno.EIO, "away", transient=True)

        volume.objects.put = put  # type: ignore[method-assign]
        with pytest.raises(OSError, match="away"):
            await volume.files.close()
        assert 1 <= attempts <= 4
        await volume.objects.close()
        await volume.open_files()

    use(tmp_path, work)


def test_failed_rounds_do_not_gather_empty_journals(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"x" * 100_000)
        volume.dying_meta.methods, volume.dying_meta.permanent = {"commit_data"}, True
        volume.dying_meta.error, volume.dying_meta.countdown = OSError(errno.ENOSPC, "full"), 1
        for _ in range(5):
            with pytest.raises(OSError, match="full"):
                await volume.files.flush()
        paths = [volume.path / "local" / name for name in volume.local() if name.startswith("journal")]
        assert sum(path.stat().st_blocks * 512 for path in paths) < 40 * MIB
        volume.dying_meta.countdown = None
        await volume.files.flush()

    use(tmp_path, work)


def test_after_a_failed_fdatasync_only_write_back_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "disk")

    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"precious")
        await volume.meta.sync()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(OSError) as caught:
                await volume.files.sync(ino, False)
        assert caught.value.errno == errno.EIO
        await volume.files.sync(ino, False)
        assert (await volume.meta.get_inode(ino)).inline == b"precious"

    use(tmp_path, work)


# Failures and limits


def test_a_full_disk_fails_the_write_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"kept" * 10_000)
        for failing, action in (
            ("pwritev", volume.write(ino, 10, b"small")),
            ("pwrite", volume.write(ino, 200_000, b"l" * 200_000)),
            ("pwrite", volume.truncate(ino, 5)),
            ("pwrite", volume.fallocate(ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 100)),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(os, failing, full)
                with pytest.raises(OSError) as caught:
                    await action
            assert caught.value.errno == errno.ENOSPC
            assert (await volume.inode(ino)).size == 40_000
            assert await volume.read(ino) == b"kept" * 10_000
        await volume.crash()
        assert await volume.read(ino) == b"kept" * 10_000

    use(tmp_path, work)


@pytest.mark.parametrize("where", ["put", "adopt", "commit_data", "sync"])
def test_a_failed_write_back_is_repeated(tmp_path: Path, where: str) -> None:
    async def work(volume: Volume) -> None:
        inos = [await volume.make(b"%d" % number) for number in range(3)]
        data = [os.urandom(100), os.urandom(100_000), os.urandom(2 * MIB)]
        for ino, content in zip(inos, data, strict=True):
            await volume.write(ino, 0, bytes(content))
        dying = volume.dying_objects if where in ("put", "adopt") else volume.dying_meta
        dying.methods, dying.countdown, dying.permanent = {where}, 1, False
        dying.error = OSError(errno.ENOSPC, "full")
        with pytest.raises(OSError) as caught:
            await volume.files.flush()
        assert caught.value.errno == errno.ENOSPC
        await volume.write(inos[1], 7, b"during")
        data[1] = data[1][:7] + b"during" + data[1][13:]
        for _ in range(2):
            assert [await volume.read(ino) for ino in inos] == data
            await volume.files.flush()
        assert volume.files.dirty_bytes == 0

    use(tmp_path, work)


def test_writes_wait_for_room_and_get_the_error_that_prevents_it(tmp_path: Path) -> None:
    limits = Limits(memory=200_000, local=2 * MIB, replicas=100)

    async def work(volume: Volume) -> None:
        volume.files.start()
        inos = [await volume.make(b"%d" % number) for number in range(40)]
        data = os.urandom(30_000)
        for ino in inos:
            await volume.write(ino, 0, data)
            assert volume.files._dirty._memory <= limits.memory + len(data)
        for start in range(0, 8 * MIB, MIB):
            await volume.write(inos[0], start, os.urandom(MIB))
            assert volume.files.dirty_bytes <= limits.local + MIB
        volume.dying_meta.methods, volume.dying_meta.countdown = {"commit_data"}, 1
        volume.dying_meta.error = OSError(errno.ENOSPC, "full")
        with pytest.raises(OSError) as caught:
            for ino in inos:
                await volume.write(ino, 0, data)
        assert caught.value.errno == errno.ENOSPC
        volume.dying_meta.countdown = None
        for ino in inos:
            await volume.write(ino, 0, data)

    use(tmp_path, work, limits, flush_after=0.01)


def test_small_files_beyond_the_memory_for_them_are_read_from_the_journal(tmp_path: Path) -> None:
    limits = Limits(memory=100_000)

    async def work(volume: Volume) -> None:
        inos = [await volume.make(b"%d" % number) for number in range(40)]
        data = [os.urandom(20_000) for _ in inos]
        for ino, content in zip(inos, data, strict=True):
            for start in range(0, len(content), 7000):
                await volume.write(ino, start, content[start : start + 7000])
            await volume.write(ino, 5000, content[5000:5100])
        assert volume.files._dirty._memory <= limits.memory
        assert [name for name in volume.local() if not name.startswith("journal")] == []
        assert [await volume.read(ino) for ino in inos] == data
        await volume.crash()
        assert volume.files._dirty._memory == 0
        assert [await volume.read(ino) for ino in inos] == data
        await volume.write(inos[0], 0, b"later")
        data[0] = b"later" + data[0][5:]
        read_from = os.stat(tmp_path / "local" / "journal.1").st_ino
        await volume.files.flush()
        # It is not written anew under its readers.
        assert read_from not in [os.stat(tmp_path / "local" / name).st_ino for name in volume.local()]
        assert [await volume.read(ino) for ino in inos] == data

    use(tmp_path, work, limits)


def away(volume: Volume, *, slow: bool = False) -> asyncio.Event:
    """Let the store be out of reach from now on, or just ``slow``, until the event that is returned is set."""
    back = asyncio.Event()
    put = volume.objects.put

    async def waiting(key: str, parts: list[bytes]) -> None:
        if not slow:
            volume.objects.away_since = volume.objects.away_since or asyncio.get_running_loop().time()
        await back.wait()
        volume.objects.away_since = None
        await put(key, parts)

    volume.objects.put = waiting  # type: ignore[method-assign]
    return back


def test_who_waits_for_a_store_that_is_away_gets_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    limits = Limits(local=6 * MIB)

    async def work(volume: Volume) -> None:
        volume.files._sync_to_store = True
        volume.files._patience.seconds = 0.05
        volume.files.start()
        back = away(volume)
        inos = [await volume.make(b"%d" % number) for number in range(10)]
        await volume.write(inos[0], 0, b"0" * 100_000)
        for _ in range(2):
            with pytest.raises(TimeoutError) as caught:
                await volume.files.sync(inos[0])
            assert caught.value.errno == errno.ETIMEDOUT
        with pytest.raises(TimeoutError):
            await volume.files.flush()
        # A copy needs no store; it goes without sharing.
        assert await volume.copy(inos[0], 0, inos[1], 0, 100_000) == 100_000
        written = 0
        with pytest.raises(TimeoutError):
            for ino in inos[2:]:
                await volume.write(ino, 1, b"x" * MIB)
                written += 1
        assert written >= 3
        back.set()
        volume.files._patience.seconds = 1e9
        for ino in inos[2:]:
            await volume.write(ino, 1, b"x" * MIB)
        await volume.files.sync(inos[0])
        assert await volume.read(inos[0]) == await volume.read(inos[1]) == b"0" * 100_000

    use(tmp_path, work, limits, flush_after=0.01)


def test_a_slow_store_is_waited_for(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        volume.files._sync_to_store = True
        volume.files._patience.seconds = 0.01
        back = away(volume, slow=True)
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"0" * 100_000)
        syncing = asyncio.create_task(volume.files.sync(ino))
        await asyncio.wait([syncing], timeout=0.1)
        assert not syncing.done()
        back.set()
        await syncing

    use(tmp_path, work)


def test_write_back_survives_what_nobody_has_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(volume: Volume) -> None:
        monkeypatch.setattr("polefs.data.writeback._PAUSE", 0.001)
        writeback = volume.files._writeback
        failures = [KeyError("keep"), KeyError("wanted"), KeyError("wanted")]
        wanted = writeback._wanted

        async def keep(contents: object) -> None:
            if failures:
                raise failures.pop()

        def wanting(lane: Any) -> int:
            if len(failures) > 1:
                raise failures.pop()
            return wanted(lane)

        writeback._keep = keep
        monkeypatch.setattr(writeback, "_wanted", wanting)
        writeback._normal.workers = 1
        inos = [await volume.make(b"%d" % number) for number in range(3)]
        for ino in inos:
            await volume.write(ino, 0, b"x" * 5 * MIB)
        await volume.files.flush()
        assert not failures
        assert volume.files.dirty_bytes == 0
        assert sum("unexpected failure" in record.message for record in caplog.records) == 3

    use(tmp_path, work)


def test_write_back_happens_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(volume: Volume) -> None:
        committed = asyncio.Event()
        settle = volume.files._dirty.settle

        def note(state: FileState, depth: int) -> None:
            settle(state, depth)
            committed.set()

        monkeypatch.setattr(volume.files._dirty, "settle", note)
        volume.files.start()
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"x")
        await committed.wait()
        assert (await volume.meta.get_inode(ino)).inline == b"x"

    use(tmp_path, work, flush_after=0.01)


def test_a_cancelled_caller_does_not_stop_write_back(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino, other = await volume.make(b"f"), await volume.make(b"g")
        await volume.write(ino, 0, b"x" * 200_000)
        for turns in range(6):
            await volume.write(ino, turns, b"y" * 100_000)
            copying = asyncio.create_task(volume.copy(ino, 0, other, 0, 200_000))
            await ticks(turns)
            copying.cancel()
            await asyncio.gather(copying, volume.files.flush(), return_exceptions=True)
        assert (await volume.read(ino))[5:100_005] == b"y" * 100_000

    use(tmp_path, work)


def test_missing_objects_are_an_error(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"x" * 50_000)
        await volume.files.flush()
        (path,) = volume.object_paths()
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(OSError) as caught:
            await volume.read(ino)
        assert caught.value.errno == errno.EIO
        path.write_bytes(content)

    use(tmp_path, work)


def test_a_read_survives_the_deletion_of_what_it_was_going_to_read(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        await volume.write(ino, 0, b"a" * 50_000)
        await volume.files.flush()
        inode = await volume.meta.get_inode(ino)
        await volume.meta.extents(ino, 0, 1)
        await volume.files._extents.get(ino, 0, 50_000)
        stale = volume.files._extents._files.copy()
        await volume.write(ino, 0, b"b" * 50_000)
        await volume.files.flush()
        await volume.files._reclaimer.reclaim()
        volume.files._extents._files.update(stale)
        assert b"".join(await volume.files.read(inode, 0, 50_000)) == b"b" * 50_000

    use(tmp_path, work)


def test_times_and_sizes_show_before_they_are_committed(tmp_path: Path) -> None:
    async def work(volume: Volume) -> None:
        ino = await volume.make(b"f")
        clean = await volume.meta.get_inode(ino)
        assert volume.files.overlay(clean) is clean
        later = time.time_ns() + 10**9
        await volume.write(ino, 5, b"x", now=later)
        seen = await volume.inode(ino)
        assert (seen.size, seen.mtime, seen.ctime, seen.allocated) == (6, later, later, 1)
        assert stat.S_ISREG(seen.mode)
        await volume.files.flush()
        committed = await volume.inode(ino)
        assert (committed.size, committed.mtime, committed.ctime) == (6, later, later)

    use(tmp_path, work)


def test_the_spare_journal_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RECYCLED_MAX", 8 * MIB)

    async def work(volume: Volume) -> None:
        for number in range(250):
            await volume.write(await volume.make(b"%d" % number), 0, bytes(40_000))
        await volume.files.flush()
        assert os.stat(tmp_path / "local" / "spare").st_size == 8 * MIB

    use(tmp_path, work)
