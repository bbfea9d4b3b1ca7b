"""Timestamps in their whole range, access times, birth times, and statfs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rawfuse.testing.syscalls import DirectoryStream, opened, read_file, statx_btime, write_file

SECOND = 10**9


class TestTimestamps:
    @pytest.mark.parametrize(
        "nanoseconds",
        [
            0,
            1,
            999_999_999,
            SECOND,
            1_700_000_000 * SECOND + 123_456_789,
            -1,
            -SECOND,
            -SECOND - 1,
            -1_500_000_000 * SECOND + 5,
            -(2**31) * SECOND + SECOND,
            (2**31 - 1) * SECOND,
            2**31 * SECOND,
            2**32 * SECOND + 999_999_999,
        ],
    )
    @pytest.mark.fuse_needs("symlinks")
    def test_kept_exactly(self, root: Path, nanoseconds: int) -> None:
        write_file(root / "f")
        (root / "d").mkdir()
        (root / "l").symlink_to("x")
        for path in (root / "f", root / "d", root / "l"):
            os.utime(path, ns=(nanoseconds, nanoseconds + 7), follow_symlinks=False)
            made = path.lstat()
            assert (made.st_atime_ns, made.st_mtime_ns) == (nanoseconds, nanoseconds + 7)

    @pytest.mark.parametrize("year", [1677 - 1970 + 2, 2200 - 1970, 2262 - 1970 - 1])
    @pytest.mark.fuse_needs("far-times")
    def test_far_ends(self, root: Path, year: int) -> None:
        """The ends of 64 bits of nanoseconds."""
        nanoseconds = year * 31_556_952 * SECOND + 1
        write_file(root / "f")
        os.utime(root / "f", ns=(nanoseconds, nanoseconds))
        assert (root / "f").stat().st_mtime_ns == nanoseconds

    def test_now_is_now(self, root: Path) -> None:
        before = time.time_ns() - SECOND
        write_file(root / "f", b"x")
        made = (root / "f").stat()
        after = time.time_ns() + SECOND
        for moment in (made.st_atime_ns, made.st_mtime_ns, made.st_ctime_ns):
            assert before <= moment <= after

    def test_never_backwards(self, root: Path) -> None:
        write_file(root / "f")
        last = 0
        for number in range(50):
            with opened(root / "f", os.O_WRONLY | os.O_APPEND) as fd:
                os.write(fd, b"x")
            os.chmod(root / "f", 0o600 + number % 8)
            made = (root / "f").stat()
            assert made.st_ctime_ns >= last
            assert made.st_mtime_ns <= made.st_ctime_ns
            last = made.st_ctime_ns

    def test_order_of_writes(self, root: Path) -> None:
        """make relies on it: what was written later is not older."""
        for number in range(50):
            write_file(root / f"f{number}", b"x")
        times = [(root / f"f{number}").stat().st_mtime_ns for number in range(50)]
        assert times == sorted(times)

    def test_stay_over_sync_and_reopen(self, root: Path) -> None:
        with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
            os.write(fd, b"x" * 100_000)
            first = os.fstat(fd)
            os.fsync(fd)
            second = os.fstat(fd)
        third = (root / "f").stat()
        assert first.st_mtime_ns == second.st_mtime_ns == third.st_mtime_ns


@pytest.mark.fuse_needs("atime")
class TestAccessTime:
    """relatime: reading sets the access time when it is not younger than mtime and ctime (mount(8))."""

    def test_reading_a_file(self, root: Path) -> None:
        write_file(root / "f", b"data")
        os.utime(root / "f", ns=(SECOND, 2 * SECOND))
        assert read_file(root / "f") == b"data"
        assert (root / "f").stat().st_atime_ns > 2 * SECOND

    def test_reading_a_directory(self, root: Path) -> None:
        (root / "d" / "sub").mkdir(parents=True)
        os.utime(root / "d", ns=(SECOND, 2 * SECOND))
        os.listdir(root / "d")
        assert (root / "d").stat().st_atime_ns > 2 * SECOND

    @pytest.mark.fuse_needs("symlinks")
    def test_reading_a_symlink(self, root: Path) -> None:
        (root / "l").symlink_to("x")
        os.utime(root / "l", ns=(SECOND, 2 * SECOND), follow_symlinks=False)
        os.readlink(root / "l")
        assert (root / "l").lstat().st_atime_ns > 2 * SECOND

    def test_stat_does_not_count(self, root: Path) -> None:
        write_file(root / "f", b"data")
        os.utime(root / "f", ns=(SECOND, 2 * SECOND))
        os.stat(root / "f")
        os.close(os.open(root / "f", os.O_RDONLY))
        assert (root / "f").stat().st_atime_ns == SECOND

    def test_noatime_open(self, root: Path) -> None:
        write_file(root / "f", b"data")
        os.utime(root / "f", ns=(SECOND, 2 * SECOND))
        with opened(root / "f", os.O_RDONLY | os.O_NOATIME) as fd:
            os.read(fd, 10)
        assert (root / "f").stat().st_atime_ns == SECOND

    def test_young_access_time_stays(self, root: Path) -> None:
        write_file(root / "f", b"data")
        young = time.time_ns() + 10 * SECOND
        os.utime(root / "f", ns=(young, SECOND))
        read_file(root / "f")
        assert (root / "f").stat().st_atime_ns == young


@pytest.mark.fuse_needs("btime", "symlinks")
class TestBirthTime:
    def test_set_once(self, root: Path) -> None:
        before = time.time_ns() - SECOND
        write_file(root / "f", b"x")
        (root / "d").mkdir()
        (root / "l").symlink_to("x")
        for path in (root / "f", root / "d", root / "l"):
            born = statx_btime(path)
            assert before <= born <= time.time_ns() + SECOND
            os.utime(path, ns=(5, 5), follow_symlinks=False)
            os.rename(path, path.with_name("moved"))
            assert statx_btime(path.with_name("moved")) == born
            os.rename(path.with_name("moved"), path)


@pytest.mark.fuse_needs("statfs")
class TestStatfs:
    def test_figures(self, root: Path) -> None:
        found = os.statvfs(root)
        assert found.f_namemax == 255
        assert found.f_bsize >= 512
        assert found.f_frsize >= 512
        assert found.f_blocks >= found.f_bfree >= found.f_bavail > 0
        assert found.f_files >= found.f_ffree > 0
        with opened(root) as fd:
            assert os.fstatvfs(fd).f_blocks == found.f_blocks

    def test_inodes_are_counted(self, root: Path) -> None:
        before = os.statvfs(root)
        for number in range(100):
            write_file(root / f"f{number}")
        after = os.statvfs(root)
        used = (after.f_files - after.f_ffree) - (before.f_files - before.f_ffree)
        assert used == 100

    def test_space_is_counted(self, root: Path) -> None:
        before = os.statvfs(root)
        with opened(root / "f", os.O_CREAT | os.O_WRONLY) as fd:
            for _ in range(32):
                os.write(fd, b"x" * (1 << 20))
            os.fsync(fd)
        after = os.statvfs(root)
        used = (after.f_blocks - after.f_bfree) * after.f_frsize - (before.f_blocks - before.f_bfree) * before.f_frsize
        assert used >= 16 << 20


def test_directory_position_of_an_empty_directory(root: Path) -> None:
    with DirectoryStream(root) as stream:
        assert set(stream.names()) == {b".", b".."}
        assert stream.next() is None
