"""Names: creating, linking, renaming and removing every kind of file, and what it does to counts and times."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from rawfuse.testing.syscalls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    fails,
    opened,
    read_file,
    rename2,
    write_file,
)

OLD = 1_000_000_000 * 10**9


def age(*paths: Path) -> None:
    """Set old atime and mtime, so that a change is seen whatever the clock's granularity."""
    for path in paths:
        os.utime(path, ns=(OLD, OLD), follow_symlinks=False)


def make_each_kind(root: Path) -> dict[str, Path]:
    """One of each kind of file that stays without an open descriptor."""
    made = {kind: root / kind for kind in ("file", "dir", "link", "fifo", "socket", "char", "block")}
    write_file(made["file"], b"contents")
    made["dir"].mkdir()
    made["link"].symlink_to("file")
    os.mkfifo(made["fifo"], 0o640)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(root, os.O_PATH)
        server.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    os.mknod(made["char"], stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(made["block"], stat.S_IFBLK | 0o600, os.makedev(254, 65000))
    return made


class TestCreate:
    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_every_kind(self, root: Path) -> None:
        made = make_each_kind(root)
        kinds = {
            "file": stat.S_ISREG,
            "dir": stat.S_ISDIR,
            "link": stat.S_ISLNK,
            "fifo": stat.S_ISFIFO,
            "socket": stat.S_ISSOCK,
            "char": stat.S_ISCHR,
            "block": stat.S_ISBLK,
        }
        for kind, path in made.items():
            assert kinds[kind](path.lstat().st_mode), kind
        assert made["char"].stat().st_rdev == os.makedev(1, 3)
        assert made["block"].stat().st_rdev == os.makedev(254, 65000)
        assert stat.S_IMODE(made["fifo"].stat().st_mode) == 0o640

    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_listing_tells_the_kinds(self, root: Path) -> None:
        made = make_each_kind(root)
        with os.scandir(root) as entries:
            found = {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries}
        assert found == {name: (path.lstat().st_ino, name == "dir") for name, path in made.items()}

    @pytest.mark.fuse_needs("mknod", "devices")
    def test_device_works(self, root: Path) -> None:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with opened(root / "null", os.O_RDWR) as fd:
            assert os.write(fd, b"gone") == 4
            assert os.read(fd, 10) == b""

    @pytest.mark.fuse_needs("mknod")
    def test_fifo_carries_data(self, root: Path) -> None:
        os.mkfifo(root / "pipe")
        with opened(root / "pipe", os.O_RDWR) as fd:
            os.write(fd, b"through")
            assert os.read(fd, 100) == b"through"

    @pytest.mark.fuse_needs("mknod")
    def test_socket_connects(self, root: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            with opened(root, os.O_PATH) as here:
                server.bind(f"/proc/self/fd/{here}/name")
                server.listen()
                client.connect(f"/proc/self/fd/{here}/name")
            accepted, _ = server.accept()
            with accepted:
                client.send(b"hello")
                assert accepted.recv(10) == b"hello"

    @pytest.mark.fuse_needs("symlinks")
    def test_exclusive(self, root: Path) -> None:
        write_file(root / "a")
        for name in ("a", "link"):
            if name == "link":
                (root / name).symlink_to("nowhere")
            with fails(errno.EEXIST):
                os.open(root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)

    @pytest.mark.fuse_needs("mknod", "symlinks", "links")
    def test_over_an_existing_name(self, root: Path) -> None:
        made = make_each_kind(root)
        for path in made.values():
            with fails(errno.EEXIST):
                path.mkdir()
            with fails(errno.EEXIST):
                path.symlink_to("x")
            with fails(errno.EEXIST):
                os.mkfifo(path)
            with fails(errno.EEXIST):
                os.link(made["file"], path)

    @pytest.mark.fuse_needs("symlinks")
    def test_through_a_symlink(self, root: Path) -> None:
        (root / "link").symlink_to("target")
        write_file(root / "link", b"data")
        assert read_file(root / "target") == b"data"
        assert (root / "link").is_symlink()

    @pytest.mark.fuse_needs("mknod", "links", "symlinks")
    def test_parent_times(self, root: Path) -> None:
        def created(name: str, how: str) -> None:
            age(root)
            before = root.stat()
            if how == "file":
                write_file(root / name)
            elif how == "dir":
                (root / name).mkdir()
            elif how == "link":
                (root / name).symlink_to("x")
            elif how == "fifo":
                os.mkfifo(root / name)
            else:
                os.link(root / "file", root / name)
            after = root.stat()
            assert after.st_mtime_ns > OLD, how
            assert after.st_ctime_ns >= before.st_ctime_ns, how
            assert after.st_mtime_ns == after.st_ctime_ns, how

        for how in ("file", "dir", "link", "fifo", "hard"):
            created(how, how)

    def test_new_file_has_one_time(self, root: Path) -> None:
        write_file(root / "a")
        (root / "d").mkdir()
        made = (root / "d").stat()
        assert made.st_atime_ns == made.st_mtime_ns == made.st_ctime_ns
        assert (root / "a").stat().st_nlink == 1

    def test_names_of_any_bytes(self, root: Path) -> None:
        base = os.fsencode(root)
        names = [bytes([value]) * 3 for value in range(1, 256) if value not in b"/"]
        names += [b"\xff" * 255, b"\n" * 255, b" ", b"...", b".a", "é€\U0001f600".encode(), b"a" * 255]
        for name in names:
            write_file(base + b"/" + name, name)
        assert sorted(os.listdir(base)) == sorted(set(names) | {b"..."})
        for name in names:
            assert read_file(base + b"/" + name) == name

    def test_case_and_form_matter(self, root: Path) -> None:
        for name in ("a", "A", "\u00e9", "e\u0301"):
            write_file(root / name, name.encode())
        assert len(os.listdir(root)) == 4
        assert read_file(root / "e\u0301") == "e\u0301".encode()

    def test_trailing_slash(self, root: Path) -> None:
        os.mkdir(f"{root}/d/")
        with fails(errno.EISDIR):
            os.open(f"{root}/f/", os.O_CREAT | os.O_WRONLY)
        write_file(root / "f")
        with fails(errno.ENOTDIR):
            os.stat(f"{root}/f/")

    def test_deep_tree(self, root: Path) -> None:
        here = os.open(root, os.O_RDONLY)
        for level in range(300):
            os.mkdir(f"level{level}", dir_fd=here)
            deeper = os.open(f"level{level}", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
        for _ in range(300):
            above = os.open("..", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = above
        assert os.fstat(here).st_ino == root.stat().st_ino
        os.close(here)


@pytest.mark.fuse_needs("symlinks")
class TestSymlinks:
    @pytest.mark.parametrize("length", [1, 59, 60, 255, 1000, 4095])
    def test_lengths(self, root: Path, length: int) -> None:
        target = ("t/" * length)[:length]
        (root / "link").symlink_to(target)
        assert os.readlink(root / "link") == target
        assert (root / "link").lstat().st_size == length

    def test_any_bytes(self, root: Path) -> None:
        target = bytes(range(1, 256))
        os.symlink(target, os.fsencode(root) + b"/link")
        assert os.readlink(os.fsencode(root) + b"/link") == target

    def test_too_long(self, root: Path) -> None:
        with fails(errno.ENAMETOOLONG):
            (root / "link").symlink_to("t" * 4096)

    def test_followed_and_not(self, root: Path) -> None:
        (root / "d").mkdir()
        write_file(root / "d" / "f", b"x")
        (root / "link").symlink_to("d")
        assert read_file(root / "link" / "f") == b"x"
        assert stat.S_IMODE((root / "link").lstat().st_mode) == 0o777
        with fails(errno.ELOOP):
            os.open(root / "link", os.O_RDONLY | os.O_NOFOLLOW)
        with fails(errno.ENOTDIR):
            os.rmdir(root / "link")
        os.unlink(root / "link")
        assert (root / "d" / "f").exists()

    def test_loop(self, root: Path) -> None:
        (root / "a").symlink_to("b")
        (root / "b").symlink_to("a")
        with fails(errno.ELOOP):
            os.stat(root / "a")
        with fails(errno.ELOOP):
            os.open(root / "a", os.O_CREAT | os.O_WRONLY)

    @pytest.mark.fuse_needs("links")
    def test_hard_link_to_a_symlink(self, root: Path) -> None:
        (root / "link").symlink_to("target")
        os.link(root / "link", root / "second", follow_symlinks=False)
        assert os.readlink(root / "second") == "target"
        assert (root / "link").lstat().st_nlink == 2

    def test_readlink_of_others(self, root: Path) -> None:
        write_file(root / "f")
        for path in (root / "f", root):
            with fails(errno.EINVAL):
                os.readlink(path)


@pytest.mark.fuse_needs("links")
class TestLink:
    def test_same_inode(self, root: Path) -> None:
        write_file(root / "a", b"one")
        before = (root / "a").stat()
        os.link(root / "a", root / "b")
        a, b = (root / "a").stat(), (root / "b").stat()
        assert (a.st_ino, a.st_nlink) == (b.st_ino, b.st_nlink) == (before.st_ino, 2)
        assert a.st_ctime_ns >= before.st_ctime_ns
        assert a.st_mtime_ns == before.st_mtime_ns
        write_file(root / "b", b"two")
        assert read_file(root / "a") == b"two"
        os.unlink(root / "a")
        assert (root / "b").stat().st_nlink == 1
        assert read_file(root / "b") == b"two"

    def test_across_directories(self, root: Path) -> None:
        (root / "d").mkdir()
        write_file(root / "a", b"x")
        os.link(root / "a", root / "d" / "b")
        os.unlink(root / "a")
        assert read_file(root / "d" / "b") == b"x"

    @pytest.mark.fuse_needs("mknod", "links", "symlinks")
    def test_of_special_files(self, root: Path) -> None:
        made = make_each_kind(root)
        for kind in ("fifo", "socket", "char", "block"):
            os.link(made[kind], root / f"{kind}2")
            assert made[kind].stat().st_nlink == 2, kind

    def test_of_a_directory(self, root: Path) -> None:
        (root / "d").mkdir()
        with fails(errno.EPERM):
            os.link(root / "d", root / "e")

    def test_many(self, root: Path) -> None:
        write_file(root / "a")
        for number in range(1000):
            os.link(root / "a", root / f"l{number}")
        assert (root / "a").stat().st_nlink == 1001
        for number in range(1000):
            os.unlink(root / f"l{number}")
        assert (root / "a").stat().st_nlink == 1

    def test_missing(self, root: Path) -> None:
        with fails(errno.ENOENT):
            os.link(root / "none", root / "b")


class TestRemove:
    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_every_kind(self, root: Path) -> None:
        for kind, path in make_each_kind(root).items():
            age(root)
            if kind == "dir":
                path.rmdir()
            else:
                path.unlink()
            assert root.stat().st_mtime_ns > OLD
            with fails(errno.ENOENT):
                path.lstat()
        assert os.listdir(root) == []

    @pytest.mark.fuse_needs("links")
    def test_unlink_changes_ctime(self, root: Path) -> None:
        write_file(root / "a")
        os.link(root / "a", root / "b")
        before = (root / "a").stat()
        os.unlink(root / "b")
        after = (root / "a").stat()
        assert after.st_ctime_ns >= before.st_ctime_ns
        assert after.st_mtime_ns == before.st_mtime_ns

    def test_kinds_do_not_mix(self, root: Path) -> None:
        write_file(root / "f")
        (root / "d").mkdir()
        with fails(errno.EISDIR):
            os.unlink(root / "d")
        with fails(errno.ENOTDIR):
            os.rmdir(root / "f")

    def test_rmdir_of_a_full_one(self, root: Path) -> None:
        for name in ("file", "dir"):
            (root / name).mkdir()
        write_file(root / "file" / "x")
        (root / "dir" / "x").mkdir()
        for name in ("file", "dir"):
            with fails(errno.ENOTEMPTY, errno.EEXIST):
                os.rmdir(root / name)

    def test_rmdir_of_dots(self, root: Path) -> None:
        (root / "d" / "e").mkdir(parents=True)
        with fails(errno.EINVAL):
            os.rmdir(f"{root}/d/.")
        with fails(errno.ENOTEMPTY, errno.EEXIST):
            os.rmdir(f"{root}/d/e/..")

    def test_name_can_come_back(self, root: Path) -> None:
        for round_ in range(20):
            write_file(root / "a", str(round_).encode())
            assert read_file(root / "a") == str(round_).encode()
            os.unlink(root / "a")
            (root / "a").mkdir()
            (root / "a").rmdir()


class TestDirectoryCounts:
    @pytest.mark.fuse_needs("nlink")
    def test_nlink(self, root: Path) -> None:
        assert root.stat().st_nlink == 2
        for number in range(3):
            (root / f"d{number}").mkdir()
        write_file(root / "f")
        assert root.stat().st_nlink == 5
        assert (root / "d0").stat().st_nlink == 2
        os.rename(root / "d0", root / "d1" / "moved")
        assert root.stat().st_nlink == 4
        assert (root / "d1").stat().st_nlink == 3
        (root / "d2").rmdir()
        assert root.stat().st_nlink == 3

    def test_dot_entries(self, root: Path) -> None:
        (root / "d" / "e").mkdir(parents=True)
        assert os.stat(f"{root}/d/.").st_ino == (root / "d").stat().st_ino
        assert os.stat(f"{root}/d/e/..").st_ino == (root / "d").stat().st_ino
        (root / "other").mkdir()
        os.rename(root / "d" / "e", root / "other" / "e")
        assert os.stat(f"{root}/other/e/..").st_ino == (root / "other").stat().st_ino


class TestRename:
    def test_file(self, root: Path) -> None:
        write_file(root / "a", b"x")
        before = (root / "a").stat()
        age(root)
        os.rename(root / "a", root / "b")
        after = (root / "b").stat()
        assert not (root / "a").exists()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert after.st_ctime_ns >= before.st_ctime_ns
        assert root.stat().st_mtime_ns > OLD

    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_every_kind_across_directories(self, root: Path) -> None:
        (root / "from").mkdir()
        (root / "to").mkdir()
        for kind, path in make_each_kind(root / "from").items():
            age(root / "from", root / "to")
            inode = path.lstat().st_ino
            os.rename(path, root / "to" / kind)
            assert (root / "to" / kind).lstat().st_ino == inode
            assert (root / "from").stat().st_mtime_ns > OLD
            assert (root / "to").stat().st_mtime_ns > OLD
        assert os.listdir(root / "from") == []

    @pytest.mark.fuse_needs("links")
    def test_replaces_a_file(self, root: Path) -> None:
        write_file(root / "a", b"new")
        write_file(root / "b", b"old")
        os.link(root / "b", root / "keep")
        os.rename(root / "a", root / "b")
        assert read_file(root / "b") == b"new"
        assert read_file(root / "keep") == b"old"
        assert (root / "keep").stat().st_nlink == 1

    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_replaces_other_kinds_but_directories(self, root: Path) -> None:
        for kind, path in make_each_kind(root).items():
            write_file(root / "new", b"new")
            if kind == "dir":
                with fails(errno.EISDIR):
                    os.rename(root / "new", path)
            else:
                os.rename(root / "new", path)
                assert read_file(path) == b"new"

    @pytest.mark.fuse_needs("nlink")
    def test_replaces_an_empty_directory(self, root: Path) -> None:
        (root / "a" / "sub").mkdir(parents=True)
        (root / "b").mkdir()
        os.rename(root / "a", root / "b")
        assert (root / "b" / "sub").is_dir()
        assert root.stat().st_nlink == 3

    def test_refuses_a_full_directory(self, root: Path) -> None:
        (root / "a").mkdir()
        (root / "b" / "sub").mkdir(parents=True)
        with fails(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(root / "a", root / "b")

    @pytest.mark.fuse_needs("symlinks")
    def test_directory_over_a_file(self, root: Path) -> None:
        (root / "a").mkdir()
        write_file(root / "f")
        (root / "l").symlink_to("a")
        for name in ("f", "l"):
            with fails(errno.ENOTDIR):
                os.rename(root / "a", root / name)

    @pytest.mark.fuse_needs("links")
    def test_onto_itself(self, root: Path) -> None:
        write_file(root / "a", b"x")
        os.link(root / "a", root / "b")
        os.rename(root / "a", root / "a")
        os.rename(root / "a", root / "b")
        assert sorted(os.listdir(root)) == ["a", "b"]
        assert (root / "a").stat().st_nlink == 2

    def test_into_itself(self, root: Path) -> None:
        (root / "a" / "b" / "c").mkdir(parents=True)
        for deeper in ("a/x", "a/b/x", "a/b/c/x", "a/b/c"):
            with fails(errno.EINVAL):
                os.rename(root / "a", root / deeper)
        with fails(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(root / "a" / "b" / "c", root / "a")

    def test_dots(self, root: Path) -> None:
        (root / "d").mkdir()
        for name in ("d/.", "d/.."):
            with fails(errno.EBUSY, errno.EINVAL):
                os.rename(f"{root}/{name}", root / "x")

    def test_missing(self, root: Path) -> None:
        write_file(root / "a")
        with fails(errno.ENOENT):
            os.rename(root / "none", root / "a")
        with fails(errno.ENOENT):
            os.rename(root / "a", root / "none" / "a")
        assert (root / "a").exists()

    @pytest.mark.fuse_needs("rename-flags")
    def test_noreplace(self, root: Path) -> None:
        write_file(root / "a", b"a")
        write_file(root / "b", b"b")
        with fails(errno.EEXIST):
            rename2(root / "a", root / "b", RENAME_NOREPLACE)
        rename2(root / "a", root / "c", RENAME_NOREPLACE)
        assert read_file(root / "c") == b"a"

    @pytest.mark.fuse_needs("rename-flags")
    def test_exchange_files(self, root: Path) -> None:
        write_file(root / "a", b"a")
        write_file(root / "b", b"b")
        rename2(root / "a", root / "b", RENAME_EXCHANGE)
        assert (read_file(root / "a"), read_file(root / "b")) == (b"b", b"a")

    @pytest.mark.fuse_needs("rename-flags", "nlink")
    def test_exchange_kinds_across_directories(self, root: Path) -> None:
        (root / "p").mkdir()
        (root / "q").mkdir()
        (root / "p" / "dir" / "sub").mkdir(parents=True)
        write_file(root / "q" / "file", b"f")
        rename2(root / "p" / "dir", root / "q" / "file", RENAME_EXCHANGE)
        assert read_file(root / "p" / "dir") == b"f"
        assert (root / "q" / "file" / "sub").is_dir()
        assert ((root / "p").stat().st_nlink, (root / "q").stat().st_nlink) == (2, 3)
        assert os.stat(f"{root}/q/file/..").st_ino == (root / "q").stat().st_ino

    @pytest.mark.fuse_needs("rename-flags")
    def test_exchange_errors(self, root: Path) -> None:
        write_file(root / "a")
        with fails(errno.ENOENT):
            rename2(root / "a", root / "none", RENAME_EXCHANGE)
        (root / "d" / "e").mkdir(parents=True)
        with fails(errno.EINVAL):
            rename2(root / "d", root / "d" / "e", RENAME_EXCHANGE)
        with fails(errno.EINVAL):
            rename2(root / "d" / "e", root / "d", RENAME_EXCHANGE)
        with fails(errno.EINVAL):
            rename2(root / "a", root / "b", RENAME_EXCHANGE | RENAME_NOREPLACE)
        with fails(errno.EINVAL):
            rename2(root / "a", root / "b", 64)

    @pytest.mark.fuse_needs("rename-flags", "mknod")
    def test_whiteout(self, root: Path) -> None:
        write_file(root / "a", b"a")
        rename2(root / "a", root / "b", RENAME_WHITEOUT)
        assert read_file(root / "b") == b"a"
        left = (root / "a").stat()
        assert stat.S_ISCHR(left.st_mode)
        assert left.st_rdev == 0

    def test_open_directory_follows(self, root: Path) -> None:
        (root / "a").mkdir()
        with opened(root / "a") as here:
            os.rename(root / "a", root / "b")
            os.mkdir("sub", dir_fd=here)
        assert (root / "b" / "sub").is_dir()

    def test_moved_directory_keeps_its_tree(self, root: Path) -> None:
        (root / "a" / "b" / "c").mkdir(parents=True)
        write_file(root / "a" / "b" / "c" / "f", b"deep")
        (root / "x").mkdir()
        os.rename(root / "a" / "b", root / "x" / "moved")
        assert read_file(root / "x" / "moved" / "c" / "f") == b"deep"
        with fails(errno.ENOENT):
            os.stat(root / "a" / "b")
