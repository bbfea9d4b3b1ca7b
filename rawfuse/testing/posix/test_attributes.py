"""Modes, owners, sizes and times, and which of the three times each call changes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rawfuse.testing.peer import ALICE
from rawfuse.testing.syscalls import (
    UTIME_NOW,
    UTIME_OMIT,
    fails,
    opened,
    read_file,
    utimensat_raw,
    write_file,
)

OLD = 1_000_000_000 * 10**9


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("mode", [0, 0o644, 0o777, 0o1777, 0o2755, 0o4711, 0o7777])
def test_chmod(root: Path, mode: int) -> None:
    write_file(root / "f")
    (root / "d").mkdir()
    for path in (root / "f", root / "d"):
        before = path.stat()
        path.chmod(mode)
        after = path.stat()
        assert stat.S_IMODE(after.st_mode) == mode
        assert stat.S_IFMT(after.st_mode) == stat.S_IFMT(before.st_mode)
        assert after.st_ctime_ns >= before.st_ctime_ns
        assert after.st_mtime_ns == before.st_mtime_ns
        path.chmod(0o755)


@pytest.mark.fuse_needs("symlinks")
def test_chmod_through_descriptor_and_symlink(root: Path) -> None:
    write_file(root / "f")
    (root / "l").symlink_to("f")
    (root / "l").chmod(0o600)
    assert mode_of(root / "f") == 0o600
    with opened(root / "f") as fd:
        os.fchmod(fd, 0o640)
    assert mode_of(root / "f") == 0o640


@pytest.mark.fuse_needs("symlinks")
def test_chown(root: Path) -> None:
    write_file(root / "f")
    (root / "l").symlink_to("f")
    os.chown(root / "f", ALICE.uid, ALICE.gid)
    made = (root / "f").stat()
    assert (made.st_uid, made.st_gid) == (ALICE.uid, ALICE.gid)
    os.chown(root / "f", -1, 7)
    os.chown(root / "f", 8, -1)
    made = (root / "f").stat()
    assert (made.st_uid, made.st_gid) == (8, 7)
    os.lchown(root / "l", 5, 6)
    assert ((root / "l").lstat().st_uid, (root / "l").lstat().st_gid) == (5, 6)
    assert (root / "f").stat().st_uid == 8


@pytest.mark.parametrize("owner", [2**31, 2**32 - 2])
def test_chown_to_large_ids(root: Path, owner: int) -> None:
    write_file(root / "f")
    os.chown(root / "f", owner, owner)
    assert ((root / "f").stat().st_uid, (root / "f").stat().st_gid) == (owner, owner)


@pytest.mark.fuse_needs("mknod")
def test_umask(root: Path) -> None:
    for mask in (0, 0o022, 0o077, 0o777):
        previous = os.umask(mask)
        try:
            os.close(os.open(root / f"f{mask}", os.O_CREAT | os.O_WRONLY, 0o666))
            os.mkdir(root / f"d{mask}", 0o777)
            os.mkfifo(root / f"p{mask}", 0o666)
        finally:
            os.umask(previous)
        assert mode_of(root / f"f{mask}") == 0o666 & ~mask
        assert mode_of(root / f"d{mask}") == 0o777 & ~mask
        assert mode_of(root / f"p{mask}") == 0o666 & ~mask


@pytest.mark.fuse_needs("setid")
def test_special_bits_at_creation(root: Path) -> None:
    os.close(os.open(root / "f", os.O_CREAT | os.O_WRONLY, 0o6755))
    assert mode_of(root / "f") == 0o6755
    os.mkdir(root / "d", 0o1755)
    assert mode_of(root / "d") == 0o1755


def test_created_read_only_is_writable_through_its_descriptor(root: Path) -> None:
    with opened(root / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o000) as fd:
        assert os.write(fd, b"data") == 4
    assert mode_of(root / "f") == 0


Change = Callable[[Path], object]


def _write(path: Path) -> None:
    with opened(path, os.O_WRONLY) as fd:
        os.write(fd, b"new")


def _truncate_open(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def _set_xattr(path: Path) -> None:
    os.setxattr(path, "user.x", b"1")


MODIFICATIONS: dict[str, Change] = {
    "write": _write,
    "shrink": lambda path: os.truncate(path, 1),
    "grow": lambda path: os.truncate(path, 100),
    "o_trunc": _truncate_open,
}
CHANGES: dict[str, Change] = {
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 1, 1),
    "link": lambda path: os.link(path, path.with_name("other")),
    "setxattr": _set_xattr,
    "rename": lambda path: path.rename(path.with_name("moved")).rename(path),
}
CHANGE_NEEDS = {"link": ("links",), "setxattr": ("xattr",)}


@pytest.mark.parametrize("name", MODIFICATIONS)
def test_modification_sets_mtime_and_ctime(root: Path, name: str) -> None:
    write_file(root / "f", b"contents")
    os.utime(root / "f", ns=(OLD, OLD))
    before = (root / "f").stat()
    MODIFICATIONS[name](root / "f")
    after = (root / "f").stat()
    assert after.st_mtime_ns > OLD
    assert after.st_ctime_ns >= before.st_ctime_ns
    assert after.st_mtime_ns == after.st_ctime_ns


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fuse_needs(*CHANGE_NEEDS.get(name, ()))) for name in CHANGES]
)
def test_change_sets_ctime_alone(root: Path, name: str) -> None:
    write_file(root / "f", b"contents")
    os.utime(root / "f", ns=(OLD, OLD))
    before = (root / "f").stat()
    CHANGES[name](root / "f")
    after = (root / "f").stat()
    assert after.st_mtime_ns == OLD
    assert after.st_ctime_ns >= before.st_ctime_ns


def test_reading_changes_neither_mtime_nor_ctime(root: Path) -> None:
    write_file(root / "f", b"contents")
    before = (root / "f").stat()
    read_file(root / "f")
    os.listdir(root)
    after = (root / "f").stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_mtime_set_while_open_stays(root: Path) -> None:
    """As tar and cp -p do: write, set the times, close."""
    with opened(root / "f", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"data" * 5000)
        os.utime(fd, ns=(OLD + 1, OLD + 2))
        assert os.fstat(fd).st_mtime_ns == OLD + 2
    made = (root / "f").stat()
    assert (made.st_atime_ns, made.st_mtime_ns) == (OLD + 1, OLD + 2)
    with opened(root / "f", os.O_RDWR) as fd:
        os.fsync(fd)
    assert (root / "f").stat().st_mtime_ns == OLD + 2


def test_utimes_now_and_omit(root: Path) -> None:
    write_file(root / "f")
    os.utime(root / "f", ns=(OLD, OLD))
    utimensat_raw(root / "f", (0, UTIME_OMIT), (0, UTIME_NOW))
    made = (root / "f").stat()
    assert made.st_atime_ns == OLD
    assert made.st_mtime_ns > OLD
    utimensat_raw(root / "f", (5, 6), (0, UTIME_OMIT))
    again = (root / "f").stat()
    assert (again.st_atime_ns, again.st_mtime_ns) == (5 * 10**9 + 6, made.st_mtime_ns)
    with fails(errno.EINVAL):
        utimensat_raw(root / "f", (0, 10**9), (0, 0))


@pytest.mark.fuse_needs("symlinks")
def test_symlink_times(root: Path) -> None:
    write_file(root / "f")
    (root / "l").symlink_to("f")
    before = (root / "f").stat().st_mtime_ns
    os.utime(root / "l", ns=(OLD, OLD), follow_symlinks=False)
    assert (root / "l").lstat().st_mtime_ns == OLD
    assert (root / "f").stat().st_mtime_ns == before


@pytest.mark.fuse_needs("allocation")
def test_sizes_and_blocks(root: Path) -> None:
    for size in (0, 1, 511, 512, 4096, 4097, 65536, 1_000_003):
        write_file(root / "f", b"x" * size)
        made = (root / "f").stat()
        assert made.st_size == size
        assert made.st_blocks * 512 >= size or size < 4096
        assert made.st_blocks * 512 <= size + 65536
        assert made.st_blksize >= 512


def test_inode_numbers(root: Path) -> None:
    """They are unique, stay over renames, and the listing agrees with stat."""
    for number in range(50):
        write_file(root / f"f{number}")
    numbers = {name: (root / name).stat().st_ino for name in os.listdir(root)}
    assert len(set(numbers.values())) == 50
    with os.scandir(root) as entries:
        assert {entry.name: entry.inode() for entry in entries} == numbers
    os.rename(root / "f0", root / "g")
    assert (root / "g").stat().st_ino == numbers["f0"]
    assert len({os.stat(root / name).st_dev for name in os.listdir(root)}) == 1


def test_stat_through_every_door(root: Path) -> None:
    write_file(root / "f", b"12345")
    with opened(root / "f") as fd, opened(root / "f", os.O_PATH) as path_fd, opened(root) as directory:
        found = {
            os.fstat(fd),
            os.fstat(path_fd),
            os.stat("f", dir_fd=directory),
            os.stat(root / "f"),
            os.lstat(root / "f"),
        }
    assert len(found) == 1


def test_truncate_of_an_equal_size(root: Path) -> None:
    write_file(root / "f", b"12345")
    os.truncate(root / "f", 5)
    assert read_file(root / "f") == b"12345"


def test_access_of_root(root: Path) -> None:
    write_file(root / "f", mode=0o000)
    assert os.access(root / "f", os.R_OK | os.W_OK)
    assert not os.access(root / "f", os.X_OK)
    (root / "f").chmod(0o001)
    assert os.access(root / "f", os.X_OK)
