"""Files and directories that are used after their last name is gone, and files that never had one."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path

import pytest

from rawfuse.testing.peer import Peer
from rawfuse.testing.syscalls import fails, link_fd, opened, read_file, write_file

RW = os.O_RDWR | os.O_CREAT


@pytest.mark.fuse_needs("unlinked")
class TestOpenFiles:
    @pytest.mark.parametrize("how", ["unlink", "rename"])
    @pytest.mark.parametrize("size", [10, 200_000])
    def test_work_on(self, root: Path, how: str, size: int) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * size)
            if how == "unlink":
                os.unlink(root / "f")
            else:
                write_file(root / "new", b"other")
                os.rename(root / "new", root / "f")
            assert os.fstat(fd).st_nlink == 0
            assert os.fstat(fd).st_size == size
            assert os.pread(fd, size + 1, 0) == b"x" * size
            os.pwrite(fd, b"more", size)
            assert os.pread(fd, 10, size) == b"more"
            os.fsync(fd)
            assert os.pread(fd, 10, size) == b"more"
            os.ftruncate(fd, 3)
            os.fchmod(fd, 0o600)
            os.utime(fd, ns=(5, 6))
            made = os.fstat(fd)
            assert (made.st_size, stat.S_IMODE(made.st_mode), made.st_mtime_ns) == (3, 0o600, 6)
            assert os.pread(fd, 10, 0) == b"xxx"
        if how == "rename":
            assert read_file(root / "f") == b"other"

    def test_name_is_free_at_once(self, root: Path) -> None:
        with opened(root / "f", RW) as old:
            os.write(old, b"old")
            os.unlink(root / "f")
            with opened(root / "f", RW | os.O_EXCL) as new:
                os.write(new, b"newer")
                assert os.fstat(old).st_ino != os.fstat(new).st_ino
                assert os.pread(old, 10, 0) == b"old"
                assert os.pread(new, 10, 0) == b"newer"

    def test_many(self, root: Path) -> None:
        fds = []
        for number in range(200):
            fd = os.open(root / "f", RW)
            os.write(fd, str(number).encode() * 100)
            os.unlink(root / "f")
            fds.append(fd)
        assert len({os.fstat(fd).st_ino for fd in fds}) == 200
        for number, fd in enumerate(fds):
            assert os.pread(fd, 1000, 0) == str(number).encode() * 100
            os.close(fd)

    def test_reopened_through_proc(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"data")
            os.unlink(root / "f")
            with opened(f"/proc/self/fd/{fd}", os.O_RDWR) as again:
                assert os.read(again, 10) == b"data"
                os.write(again, b" more")
            assert os.pread(fd, 20, 0) == b"data more"

    def test_cannot_be_linked_again(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.unlink(root / "f")
            with fails(errno.ENOENT):
                link_fd(fd, root / "g")

    def test_held_by_another_process(self, root: Path) -> None:
        write_file(root / "f", b"data")
        with Peer() as peer:
            fd = peer.call(os.open, root / "f", os.O_RDWR)
            os.unlink(root / "f")
            assert peer.call(os.pread, fd, 10, 0) == b"data"
            peer.call(os.pwrite, fd, b"DATA", 0)
            assert peer.call(os.pread, fd, 10, 0) == b"DATA"
        assert os.listdir(root) == []

    @pytest.mark.fuse_needs("links")
    def test_other_links_stay(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.link(root / "f", root / "g")
            os.unlink(root / "f")
            os.write(fd, b"data")
            assert os.fstat(fd).st_nlink == 1
        assert read_file(root / "g") == b"data"

    def test_space_comes_back(self, root: Path) -> None:
        """The last close frees an unlinked file: the sizes of many such files do not add up."""
        for _ in range(20):
            with opened(root / "f", RW) as fd:
                os.write(fd, b"x" * 500_000)
                os.unlink(root / "f")
        assert os.listdir(root) == []

    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_fifo_and_symlink(self, root: Path) -> None:
        os.mkfifo(root / "p")
        with opened(root / "p", os.O_RDWR) as fd:
            os.unlink(root / "p")
            os.write(fd, b"x")
            assert os.read(fd, 1) == b"x"
            assert os.fstat(fd).st_nlink == 0
        (root / "l").symlink_to("target")
        with opened(root / "l", os.O_PATH | os.O_NOFOLLOW) as fd:
            os.unlink(root / "l")
            assert os.readlink("", dir_fd=fd) == "target"


@pytest.mark.fuse_needs("unlinked")
class TestOpenDirectories:
    @pytest.mark.fuse_needs("symlinks")
    def test_removed_while_open(self, root: Path) -> None:
        (root / "d").mkdir()
        with opened(root / "d") as fd:
            (root / "d").rmdir()
            assert os.fstat(fd).st_nlink == 0
            assert os.listdir(fd) == []
            for attempt in (
                lambda: os.open("f", RW, dir_fd=fd),
                lambda: os.mkdir("sub", dir_fd=fd),
                lambda: os.symlink("x", "l", dir_fd=fd),
                lambda: os.stat("f", dir_fd=fd),
            ):
                with fails(errno.ENOENT):
                    attempt()

    @pytest.mark.fuse_needs("links")
    def test_moving_into_a_removed_one(self, root: Path) -> None:
        (root / "d").mkdir()
        write_file(root / "f")
        with opened(root / "d") as fd:
            (root / "d").rmdir()
            with fails(errno.ENOENT):
                os.rename(root / "f", "f", dst_dir_fd=fd)
            with fails(errno.ENOENT):
                os.link(root / "f", "f", dst_dir_fd=fd)
        assert (root / "f").exists()

    def test_removed_working_directory(self, root: Path) -> None:
        (root / "d").mkdir()
        with Peer(cwd=root / "d") as peer:
            (root / "d").rmdir()
            assert peer.call(os.stat, ".").st_nlink == 0
            with fails(errno.ENOENT):
                peer.call(os.getcwd)
            with fails(errno.ENOENT):
                peer.call(write_file, "f")
            assert peer.call(os.stat, "..").st_ino == root.stat().st_ino
            (root / "d").mkdir()
            with fails(errno.ENOENT):
                peer.call(write_file, "f")

    def test_replaced_by_rename(self, root: Path) -> None:
        (root / "a" / "sub").mkdir(parents=True)
        (root / "b").mkdir()
        with opened(root / "b") as fd:
            os.rename(root / "a", root / "b")
            assert os.listdir(fd) == []
            with fails(errno.ENOENT):
                os.mkdir("x", dir_fd=fd)
        assert os.listdir(root / "b") == ["sub"]


@pytest.mark.fuse_needs("tmpfile")
class TestUnnamedFiles:
    @pytest.mark.fuse_needs("xattr", "mmap")
    def test_is_like_any_file(self, root: Path) -> None:
        with opened(root, os.O_TMPFILE | os.O_RDWR, 0o640) as fd:
            made = os.fstat(fd)
            assert (made.st_nlink, made.st_size, stat.S_IMODE(made.st_mode)) == (0, 0, 0o640)
            os.write(fd, b"x" * 100_000)
            assert os.pread(fd, 200_000, 0) == b"x" * 100_000
            os.setxattr(fd, "user.a", b"1")
            with mmap.mmap(fd, 100_000) as mapping:
                mapping[5] = 65
            assert os.pread(fd, 3, 4) == b"xAx"
        assert os.listdir(root) == []

    @pytest.mark.parametrize("size", [0, 10, 200_000])
    @pytest.mark.fuse_needs("links")
    def test_linked_later(self, root: Path, size: int) -> None:
        with opened(root, os.O_TMPFILE | os.O_RDWR, 0o600) as fd:
            os.write(fd, b"x" * size)
            link_fd(fd, root / "f")
            assert os.fstat(fd).st_nlink == 1
            assert read_file(root / "f") == b"x" * size
            os.write(fd, b"more")
            link_fd(fd, root / "g")
            assert os.fstat(fd).st_nlink == 2
        assert read_file(root / "f") == b"x" * size + b"more"
        os.unlink(root / "g")
        assert (root / "f").stat().st_nlink == 1

    @pytest.mark.fuse_needs("links")
    def test_linked_in_another_directory(self, root: Path) -> None:
        (root / "d").mkdir()
        with opened(root, os.O_TMPFILE | os.O_WRONLY, 0o600) as fd:
            os.write(fd, b"data")
            link_fd(fd, root / "d" / "f")
        assert read_file(root / "d" / "f") == b"data"
        assert os.listdir(root) == ["d"]

    def test_exclusive_stays_unnamed(self, root: Path) -> None:
        with opened(root, os.O_TMPFILE | os.O_WRONLY | os.O_EXCL, 0o600) as fd, fails(errno.ENOENT):
            link_fd(fd, root / "f")

    def test_link_over_a_name(self, root: Path) -> None:
        write_file(root / "f")
        with opened(root, os.O_TMPFILE | os.O_WRONLY, 0o600) as fd, fails(errno.EEXIST):
            link_fd(fd, root / "f")

    @pytest.mark.fuse_needs("links")
    def test_umask_and_group(self, root: Path) -> None:
        (root / "d").mkdir()
        os.chown(root / "d", 0, 60010)
        (root / "d").chmod(0o2755)
        with opened(root / "d", os.O_TMPFILE | os.O_WRONLY, 0o666) as fd:
            link_fd(fd, root / "d" / "f")
        made = (root / "d" / "f").stat()
        assert (stat.S_IMODE(made.st_mode), made.st_gid) == (0o644, 60010)

    def test_read_only_is_invalid(self, root: Path) -> None:
        with fails(errno.EINVAL):
            os.open(root, os.O_TMPFILE | os.O_RDONLY)
        write_file(root / "f")
        with fails(errno.ENOTDIR):
            os.open(root / "f", os.O_TMPFILE | os.O_RDWR)

    def test_parent_is_not_changed(self, root: Path) -> None:
        os.utime(root, ns=(10**18, 10**18))
        with opened(root, os.O_TMPFILE | os.O_WRONLY, 0o600):
            pass
        assert root.stat().st_mtime_ns == 10**18
