"""Extended attributes: namespaces, limits, who may see and set them."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from rawfuse.testing.peer import ALICE, BOB, as_user
from rawfuse.testing.syscalls import fails, write_file

pytestmark = pytest.mark.fuse_needs("xattr")


class TestXattr:
    @pytest.mark.parametrize("prefix", ["user", "trusted", "security"])
    def test_set_get_list_remove(self, root: Path, prefix: str) -> None:
        write_file(root / "f")
        (root / "d").mkdir()
        for path in (root / "f", root / "d"):
            name = f"{prefix}.rawfuse.test"
            os.setxattr(path, name, b"\0binary\xff")
            assert os.getxattr(path, name) == b"\0binary\xff"
            assert name in os.listxattr(path)
            os.setxattr(path, name, b"")
            assert os.getxattr(path, name) == b""
            os.removexattr(path, name)
            assert name not in os.listxattr(path)
            with fails(errno.ENODATA):
                os.getxattr(path, name)
            with fails(errno.ENODATA):
                os.removexattr(path, name)

    def test_create_and_replace(self, root: Path) -> None:
        write_file(root / "f")
        with fails(errno.ENODATA):
            os.setxattr(root / "f", "user.a", b"1", os.XATTR_REPLACE)
        os.setxattr(root / "f", "user.a", b"1", os.XATTR_CREATE)
        with fails(errno.EEXIST):
            os.setxattr(root / "f", "user.a", b"2", os.XATTR_CREATE)
        os.setxattr(root / "f", "user.a", b"3", os.XATTR_REPLACE)
        assert os.getxattr(root / "f", "user.a") == b"3"

    def test_ctime(self, root: Path) -> None:
        write_file(root / "f")
        before = (root / "f").stat()
        os.setxattr(root / "f", "user.a", b"1")
        after = (root / "f").stat()
        assert after.st_ctime_ns >= before.st_ctime_ns
        assert after.st_mtime_ns == before.st_mtime_ns

    def test_limits(self, root: Path) -> None:
        write_file(root / "f")
        longest = "user." + "n" * 250
        os.setxattr(root / "f", longest, b"1")
        assert os.listxattr(root / "f") == [longest]
        with fails(errno.ERANGE):
            os.setxattr(root / "f", longest + "n", b"1")
        with fails(errno.E2BIG):
            os.setxattr(root / "f", "user.big", b"v" * 65537)

    def test_namespaces(self, root: Path) -> None:
        write_file(root / "f")
        for name in ("other.x", "nodot", "system.unknown"):
            with fails(errno.EOPNOTSUPP):
                os.setxattr(root / "f", name, b"1")
        with fails(errno.EOPNOTSUPP, errno.EINVAL):
            os.setxattr(root / "f", "user.", b"1")

    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_user_namespace_is_for_files_and_directories(self, root: Path) -> None:
        os.mkfifo(root / "p")
        (root / "l").symlink_to("p")
        with fails(errno.EPERM):
            os.setxattr(root / "p", "user.a", b"1")
        with fails(errno.EPERM):
            os.setxattr(root / "l", "user.a", b"1", follow_symlinks=False)
        os.setxattr(root / "l", "trusted.a", b"1", follow_symlinks=False)
        assert os.getxattr(root / "l", "trusted.a", follow_symlinks=False) == b"1"
        assert os.listxattr(root / "p") == []

    @pytest.mark.fuse_needs("other-users")
    def test_permissions(self, root: Path) -> None:
        write_file(root / "f")
        os.chown(root / "f", ALICE.uid, ALICE.gid)
        (root / "f").chmod(0o644)
        as_user(ALICE, os.setxattr, root / "f", "user.a", b"1")
        assert as_user(BOB, os.getxattr, root / "f", "user.a") == b"1"
        with fails(errno.EACCES):
            as_user(BOB, os.setxattr, root / "f", "user.a", b"2")
        with fails(errno.EPERM):
            as_user(ALICE, os.setxattr, root / "f", "trusted.a", b"2")
        os.setxattr(root / "f", "trusted.a", b"2")
        assert as_user(ALICE, os.listxattr, root / "f") == ["user.a"]

    def test_many(self, root: Path) -> None:
        write_file(root / "f")
        values = {f"user.{number:03}": bytes([number]) * number for number in range(60)}
        for name, value in values.items():
            os.setxattr(root / "f", name, value)
        assert {name: os.getxattr(root / "f", name) for name in os.listxattr(root / "f")} == values

    @pytest.mark.fuse_needs("links")
    def test_stay_with_the_inode(self, root: Path) -> None:
        write_file(root / "f")
        os.setxattr(root / "f", "user.a", b"1")
        os.link(root / "f", root / "g")
        os.rename(root / "f", root / "h")
        assert os.getxattr(root / "g", "user.a") == os.getxattr(root / "h", "user.a") == b"1"
        os.unlink(root / "g")
        os.unlink(root / "h")
        write_file(root / "f")
        assert os.listxattr(root / "f") == []

    @pytest.mark.fuse_needs("unlinked")
    def test_through_a_descriptor_of_a_removed_file(self, root: Path) -> None:
        with open(root / "f", "wb") as file:
            os.unlink(root / "f")
            os.setxattr(file.fileno(), "user.a", b"1")
            assert os.getxattr(file.fileno(), "user.a") == b"1"


@pytest.mark.fuse_needs("large-xattr")
class TestLargeXattr:
    def test_value_of_64_kib(self, root: Path) -> None:
        write_file(root / "f")
        os.setxattr(root / "f", "user.big", b"v" * 65536)
        assert os.getxattr(root / "f", "user.big") == b"v" * 65536

    def test_list_limit(self, root: Path) -> None:
        """The names together may take 64 KiB (linux/limits.h: XATTR_LIST_MAX); one more is ENOSPC."""
        write_file(root / "f")
        name_size = 251
        with fails(errno.ENOSPC):
            for number in range(65536 // name_size + 1):
                os.setxattr(root / "f", f"user.{number:0{name_size - 6}}", b"")
        names = os.listxattr(root / "f")
        assert len(names) == 65536 // name_size
        for name in names:
            os.removexattr(root / "f", name)
        assert os.listxattr(root / "f") == []


def test_capability_goes_with_a_write(root: Path) -> None:
    """security.capability is removed by any write, as set-id bits are (capabilities(7))."""
    write_file(root / "f", b"x")
    value = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    os.setxattr(root / "f", "security.capability", value)
    assert os.getxattr(root / "f", "security.capability") == value
    with open(root / "f", "ab") as file:
        file.write(b"y")
    with fails(errno.ENODATA):
        os.getxattr(root / "f", "security.capability")
