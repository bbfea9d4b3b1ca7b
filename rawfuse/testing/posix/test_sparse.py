"""Holes, preallocation, very large files, and copies that share."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from rawfuse.testing.syscalls import (
    EOPNOTSUPP,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    fails,
    fallocate,
    opened,
    read_file,
    write_file,
)

RW = os.O_RDWR | os.O_CREAT
BLOCK = 65536
"""Holes in these tests are whole multiples of this, so that every file system can keep them."""


def regions(fd: int) -> list[tuple[int, int]]:
    """The data regions, by SEEK_DATA and SEEK_HOLE."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))
    return found


@pytest.mark.fuse_needs("allocation")
class TestHoles:
    def test_read_as_zero(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.pwrite(fd, b"end", 1_000_000)
            assert os.pread(fd, 2_000_000, 0) == bytes(1_000_000) + b"end"

    def test_take_no_space(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.ftruncate(fd, 1 << 30)
            assert os.fstat(fd).st_blocks == 0
            os.pwrite(fd, b"x" * BLOCK, 1 << 29)
            os.fsync(fd)
            assert os.fstat(fd).st_blocks * 512 <= 4 * BLOCK

    @pytest.mark.parametrize("synced", [False, True])
    def test_seek(self, root: Path, synced: bool) -> None:
        with opened(root / "f", RW) as fd:
            for number in (1, 3, 4, 7):
                os.pwrite(fd, b"x" * BLOCK, number * BLOCK)
            os.ftruncate(fd, 10 * BLOCK)
            if synced:
                os.fsync(fd)
            assert regions(fd) == [(BLOCK, 2 * BLOCK), (3 * BLOCK, 5 * BLOCK), (7 * BLOCK, 8 * BLOCK)]
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
            assert os.lseek(fd, BLOCK + 10, os.SEEK_DATA) == BLOCK + 10
            assert os.lseek(fd, 8 * BLOCK, os.SEEK_HOLE) == 8 * BLOCK
            with fails(errno.ENXIO):
                os.lseek(fd, 8 * BLOCK, os.SEEK_DATA)
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                with fails(errno.ENXIO):
                    os.lseek(fd, 10 * BLOCK, whence)
                with fails(errno.ENXIO):
                    os.lseek(fd, 10 * BLOCK + 1, whence)

    def test_seek_in_a_full_file(self, root: Path) -> None:
        for size in (1, 4096, 5000, 300_000):
            write_file(root / "f", b"x" * size)
            with opened(root / "f") as fd:
                assert regions(fd) == [(0, size)]
                assert os.lseek(fd, 0, os.SEEK_HOLE) == size

    def test_seek_in_an_empty_file(self, root: Path) -> None:
        write_file(root / "f")
        with opened(root / "f") as fd:
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                with fails(errno.ENXIO):
                    os.lseek(fd, 0, whence)

    def test_seek_from_the_end(self, root: Path) -> None:
        write_file(root / "f", b"x" * 1000)
        with opened(root / "f", os.O_RDWR) as fd:
            assert os.lseek(fd, -10, os.SEEK_END) == 990
            os.pwrite(fd, b"y", 5000)
            assert os.lseek(fd, 0, os.SEEK_END) == 5001


@pytest.mark.fuse_needs("allocation")
class TestFallocate:
    def test_default_extends(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * 100)
            fallocate(fd, 0, 50, 10 * BLOCK)
            assert os.fstat(fd).st_size == 50 + 10 * BLOCK
            assert os.pread(fd, 200, 0) == b"x" * 100 + bytes(100)

    def test_inside_changes_nothing(self, root: Path) -> None:
        write_file(root / "f", b"x" * 100_000)
        with opened(root / "f", os.O_RDWR) as fd:
            fallocate(fd, 0, 10, 1000)
            fallocate(fd, KEEP_SIZE, 0, 200_000)
        assert read_file(root / "f") == b"x" * 100_000

    def test_keep_size(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * 100)
            fallocate(fd, KEEP_SIZE, 0, 10 * BLOCK)
            assert os.fstat(fd).st_size == 100
            os.ftruncate(fd, 1000)
            assert os.pread(fd, 2000, 0) == b"x" * 100 + bytes(900)

    @pytest.mark.parametrize("synced", [False, True])
    def test_punch(self, root: Path, synced: bool) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * (10 * BLOCK))
            if synced:
                os.fsync(fd)
            before = os.fstat(fd).st_blocks
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 2 * BLOCK, 5 * BLOCK)
            assert os.fstat(fd).st_size == 10 * BLOCK
            assert os.pread(fd, 10 * BLOCK, 0) == b"x" * (2 * BLOCK) + bytes(5 * BLOCK) + b"x" * (3 * BLOCK)
            assert regions(fd) == [(0, 2 * BLOCK), (7 * BLOCK, 10 * BLOCK)]
            if synced:
                os.fsync(fd)
                assert os.fstat(fd).st_blocks < before

    def test_punch_off_the_blocks(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * 20_000)
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 100, 10_001)
            assert os.pread(fd, 30_000, 0) == b"x" * 100 + bytes(10_001) + b"x" * 9_899

    def test_punch_past_the_end(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * 20_000)
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 10_000, 1 << 30)
            assert os.pread(fd, 30_000, 0) == b"x" * 10_000 + bytes(10_000)

    def test_zero_range(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * 20_000)
            fallocate(fd, ZERO_RANGE | KEEP_SIZE, 15_000, 10_000)
            assert os.pread(fd, 30_000, 0) == b"x" * 15_000 + bytes(5_000)
            fallocate(fd, ZERO_RANGE, 10_000, 20_000)
            assert os.pread(fd, 40_000, 0) == b"x" * 10_000 + bytes(20_000)

    def test_times(self, root: Path) -> None:
        write_file(root / "f", b"x" * 20_000)
        for mode in (0, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE):
            os.utime(root / "f", ns=(10**18, 10**18))
            with opened(root / "f", os.O_RDWR) as fd:
                fallocate(fd, mode, 0, 30_000)
            assert (root / "f").stat().st_mtime_ns > 10**18, mode

    def test_errors(self, root: Path) -> None:
        write_file(root / "f", b"x" * 20_000)
        with opened(root / "f") as fd, fails(errno.EBADF):
            fallocate(fd, 0, 0, 10)
        with opened(root / "f", os.O_RDWR) as fd:
            for offset, length in ((-1, 10), (0, 0), (0, -1)):
                with fails(errno.EINVAL):
                    fallocate(fd, 0, offset, length)
            with fails(EOPNOTSUPP, errno.EINVAL):
                fallocate(fd, PUNCH_HOLE, 0, 10)
            with fails(errno.EFBIG):
                fallocate(fd, 0, 2**63 - 1, 10)
        with opened(root) as fd, fails(errno.EBADF, errno.EISDIR, errno.ENODEV):
            fallocate(fd, 0, 0, 10)


class TestLarge:
    def test_beyond_4_gib(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            for number in range(5):
                os.pwrite(fd, f"at {number} GiB".encode(), number << 30)
            os.pwrite(fd, b"across", (4 << 30) - 3)
            os.fsync(fd)
            for number in range(4):
                assert os.pread(fd, 8, number << 30) == f"at {number} GiB".encode()
            assert os.pread(fd, 6, (4 << 30) - 3) == b"across"
            assert os.fstat(fd).st_size == (4 << 30) + 8

    @pytest.mark.fuse_needs("large-file")
    @pytest.mark.fuse_needs("allocation")
    def test_16_tib(self, root: Path) -> None:
        end = 1 << 44
        with opened(root / "f", RW) as fd:
            os.pwrite(fd, b"start", 0)
            os.pwrite(fd, b"end", end - BLOCK)
            os.ftruncate(fd, end)
            os.fsync(fd)
            assert os.fstat(fd).st_size == end
            assert os.pread(fd, 10, end - BLOCK) == b"end" + bytes(7)
            assert os.pread(fd, 100, 1 << 43) == bytes(100)
            assert os.lseek(fd, 1 << 20, os.SEEK_DATA) == end - BLOCK
        with opened(root / "f", os.O_RDWR) as fd:
            assert os.pread(fd, 5, 0) == b"start"
            os.ftruncate(fd, 100)
            os.ftruncate(fd, end)
            assert os.pread(fd, 10, end - BLOCK) == bytes(10)


class TestCopyRange:
    def copy(self, source: int, target: int, length: int, source_at: int = 0, target_at: int = 0) -> int:
        done = 0
        while done < length:
            step = os.copy_file_range(source, target, length - done, source_at + done, target_at + done)
            if step == 0:
                break
            done += step
        return done

    @pytest.mark.parametrize("size", [10, 4096, 100_000, 3_000_001])
    @pytest.mark.parametrize("synced", [False, True])
    def test_whole_file(self, root: Path, size: int, synced: bool) -> None:
        data = random.Random(size).randbytes(size)
        write_file(root / "a", data)
        with opened(root / "a", os.O_RDWR) as source, opened(root / "b", RW) as target:
            if synced:
                os.fsync(source)
            assert self.copy(source, target, size) == size
            os.pwrite(source, b"changed!!!", 0)
        assert read_file(root / "b") == data
        assert read_file(root / "a") == b"changed!!!" + data[10:]

    def test_ranges(self, root: Path) -> None:
        data = random.Random(1).randbytes(500_000)
        write_file(root / "a", data)
        model = bytearray(b"t" * 400_000)
        write_file(root / "b", model)
        with opened(root / "a") as source, opened(root / "b", os.O_RDWR) as target:
            for source_at, target_at, length in ((0, 65536, 131072), (131073, 5, 70_000), (499_000, 399_999, 1000)):
                assert self.copy(source, target, length, source_at, target_at) == length
                model[target_at : target_at + length] = data[source_at : source_at + length]
        assert read_file(root / "b") == model

    def test_holes(self, root: Path) -> None:
        with opened(root / "a", RW) as source, opened(root / "b", RW) as target:
            os.pwrite(source, b"x" * BLOCK, 4 * BLOCK)
            os.ftruncate(source, 8 * BLOCK)
            os.write(target, b"old" * BLOCK)
            os.fsync(source)
            assert self.copy(source, target, 8 * BLOCK) == 8 * BLOCK
            assert os.pread(target, 9 * BLOCK, 0) == bytes(4 * BLOCK) + b"x" * BLOCK + bytes(3 * BLOCK)

    def test_past_the_end(self, root: Path) -> None:
        write_file(root / "a", b"x" * 1000)
        with opened(root / "a") as source, opened(root / "b", RW) as target:
            assert self.copy(source, target, 5000, 900) == 100
            assert self.copy(source, target, 5000, 2000) == 0
        assert read_file(root / "b") == b"x" * 100

    def test_within_one_file(self, root: Path) -> None:
        write_file(root / "a", b"a" * 100_000 + b"b" * 100_000)
        with opened(root / "a", os.O_RDWR) as fd:
            assert self.copy(fd, fd, 100_000, 100_000, 0) == 100_000
            with fails(errno.EINVAL):
                os.copy_file_range(fd, fd, 5000, 0, 100)
        assert read_file(root / "a") == b"b" * 200_000

    def test_chain(self, root: Path) -> None:
        """Copies of copies stay apart when each is changed and the first is removed."""
        data = random.Random(2).randbytes(300_000)
        write_file(root / "f0", data)
        for number in range(5):
            with opened(root / f"f{number}") as source, opened(root / f"f{number + 1}", RW) as target:
                assert self.copy(source, target, len(data)) == len(data)
        os.unlink(root / "f0")
        for number in range(1, 6):
            with opened(root / f"f{number}", os.O_RDWR) as fd:
                os.pwrite(fd, str(number).encode(), number * 1000)
        for number in range(1, 6):
            expected = bytearray(data)
            expected[number * 1000 : number * 1000 + 1] = str(number).encode()
            assert read_file(root / f"f{number}") == expected

    def test_errors(self, root: Path) -> None:
        write_file(root / "a", b"x" * 1000)
        with opened(root / "a") as source, opened(root / "b", RW) as target, opened(root) as directory:
            with fails(errno.EBADF):
                os.copy_file_range(target, source, 10)
            with fails(errno.EISDIR):
                os.copy_file_range(directory, target, 10)
        with opened(root / "a") as source, opened(root / "b", os.O_WRONLY | os.O_APPEND) as target, fails(errno.EBADF):
            os.copy_file_range(source, target, 10)

    def test_mtime(self, root: Path) -> None:
        write_file(root / "a", b"x" * 100_000)
        write_file(root / "b")
        os.utime(root / "b", ns=(10**18, 10**18))
        with opened(root / "a") as source, opened(root / "b", os.O_RDWR) as target:
            assert self.copy(source, target, 100_000) == 100_000
        assert (root / "b").stat().st_mtime_ns > 10**18


@pytest.mark.fuse_needs("allocation")
class TestSpace:
    def test_blocks_follow_the_contents(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * (16 * BLOCK))
            os.fsync(fd)
            assert 16 * BLOCK <= os.fstat(fd).st_blocks * 512 <= 18 * BLOCK
            os.ftruncate(fd, BLOCK)
            os.fsync(fd)
            assert os.fstat(fd).st_blocks * 512 <= 3 * BLOCK
            os.ftruncate(fd, 0)
            assert os.fstat(fd).st_blocks == 0
