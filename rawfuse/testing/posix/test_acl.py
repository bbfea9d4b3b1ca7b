"""POSIX access control lists: stored, inherited and enforced."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import require
from rawfuse.testing.namespace import missing_tools
from rawfuse.testing.peer import ALICE, BOB, STAFF, Peer, User, as_user
from rawfuse.testing.syscalls import fails, read_file, write_file

pytestmark = pytest.mark.fuse_needs("acl", "xattr", "other-users")

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
NO_ID = 0xFFFFFFFF


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    require(missing_tools({"setfacl": "acl"}))


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The kernel's binary form, version 2; an entry is (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def entries(data: bytes) -> list[tuple[int, int, int]]:
    assert struct.unpack_from("<I", data) == (2,)
    return [struct.unpack_from("<HHI", data, at) for at in range(4, len(data), 8)]


def with_user(permissions: int, uid: int, mask: int = 7, owner: int = 6, group: int = 4, other: int = 0) -> bytes:
    return acl(
        (USER_OBJ, owner, NO_ID),
        (USER, permissions, uid),
        (GROUP_OBJ, group, NO_ID),
        (MASK, mask, NO_ID),
        (OTHER, other, NO_ID),
    )


def setfacl(*arguments: str | Path) -> None:
    subprocess.run(["setfacl", *arguments], check=True, timeout=20, capture_output=True)


def getfacl(path: Path) -> list[str]:
    done = subprocess.run(
        ["getfacl", "-cnpE", path], check=True, timeout=20, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return done.stdout.split()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestAccessAcl:
    def test_sets_the_mode(self, root: Path) -> None:
        write_file(root / "f", mode=0o640)
        os.setxattr(root / "f", ACCESS, with_user(6, BOB.uid, mask=6, owner=7, group=5, other=1))
        assert mode_of(root / "f") == 0o761  # the group bits show the mask
        assert entries(os.getxattr(root / "f", ACCESS))[1] == (USER, 6, BOB.uid)

    def test_is_enforced(self, root: Path) -> None:
        write_file(root / "f", b"secret", mode=0o600)
        with Peer(BOB) as bob:
            with fails(errno.EACCES):
                bob.call(read_file, root / "f")
            setfacl("-m", f"u:{BOB.uid}:r", root / "f")
            assert bob.call(read_file, root / "f") == b"secret"
            with fails(errno.EACCES):
                bob.call(os.open, root / "f", os.O_WRONLY)
            setfacl("-m", "m::-", root / "f")
            with fails(errno.EACCES):
                bob.call(read_file, root / "f")
            setfacl("-b", root / "f")
            with fails(errno.EACCES):
                bob.call(read_file, root / "f")

    def test_named_group(self, root: Path) -> None:
        write_file(root / "f", b"secret", mode=0o600)
        setfacl("-m", f"g:{STAFF}:r", root / "f")
        assert as_user(User(BOB.uid, BOB.gid, (STAFF,)), read_file, root / "f") == b"secret"
        with fails(errno.EACCES):
            as_user(BOB, read_file, root / "f")

    def test_named_user_is_denied_before_others(self, root: Path) -> None:
        write_file(root / "f", b"x", mode=0o644)
        setfacl("-m", f"u:{BOB.uid}:-", root / "f")
        with fails(errno.EACCES):
            as_user(BOB, read_file, root / "f")
        assert as_user(ALICE, read_file, root / "f") == b"x"

    def test_chmod_changes_the_mask(self, root: Path) -> None:
        write_file(root / "f", mode=0o600)
        setfacl("-m", f"u:{BOB.uid}:rwx,g::r", root / "f")
        (root / "f").chmod(0o651)
        found = getfacl(root / "f")
        assert f"user:{BOB.uid}:rwx" in found
        assert "mask::r-x" in found
        assert "group::r--" in found
        assert "other::--x" in found
        assert mode_of(root / "f") == 0o651

    def test_minimal_acl_is_only_a_mode(self, root: Path) -> None:
        write_file(root / "f", mode=0o600)
        os.setxattr(root / "f", ACCESS, acl((USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 1, NO_ID)))
        assert mode_of(root / "f") == 0o751
        with fails(errno.ENODATA):
            os.getxattr(root / "f", ACCESS)
        assert ACCESS not in os.listxattr(root / "f")

    def test_removing(self, root: Path) -> None:
        write_file(root / "f", mode=0o600)
        setfacl("-m", f"u:{BOB.uid}:rw", root / "f")
        os.removexattr(root / "f", ACCESS)
        assert mode_of(root / "f") == 0o660
        with fails(errno.ENODATA):
            os.getxattr(root / "f", ACCESS)

    def test_ctime_changes(self, root: Path) -> None:
        write_file(root / "f")
        before = (root / "f").stat().st_ctime_ns
        setfacl("-m", f"u:{BOB.uid}:rw", root / "f")
        assert (root / "f").stat().st_ctime_ns >= before

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"\2\0\0",
            struct.pack("<I", 3),
            acl((USER_OBJ, 7, NO_ID)),
            acl((USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID)),
            acl((OTHER, 1, NO_ID), (GROUP_OBJ, 5, NO_ID), (USER_OBJ, 7, NO_ID)),
            acl((USER_OBJ, 7, NO_ID), (USER, 7, 5), (GROUP_OBJ, 5, NO_ID), (OTHER, 1, NO_ID)),
            acl((USER_OBJ, 9, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 1, NO_ID)),
            acl((USER_OBJ, 7, NO_ID), (3, 5, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 1, NO_ID)),
        ],
        ids=["empty", "short", "version", "one", "two", "order", "no-mask", "bits", "tag"],
    )
    def test_malformed(self, root: Path, value: bytes) -> None:
        write_file(root / "f", mode=0o640)
        if value:
            with fails(errno.EINVAL, errno.EOPNOTSUPP):
                os.setxattr(root / "f", ACCESS, value)
        assert mode_of(root / "f") == 0o640

    def test_only_the_owner_sets_it(self, root: Path) -> None:
        write_file(root / "f", mode=0o666)
        os.chown(root / "f", ALICE.uid, ALICE.gid)
        with fails(errno.EPERM):
            as_user(BOB, os.setxattr, root / "f", ACCESS, with_user(7, BOB.uid))
        as_user(ALICE, os.setxattr, root / "f", ACCESS, with_user(7, BOB.uid))

    def test_clears_set_gid_for_strangers_to_the_group(self, root: Path) -> None:
        write_file(root / "f")
        os.chown(root / "f", ALICE.uid, STAFF)
        (root / "f").chmod(0o2750)
        as_user(ALICE, os.setxattr, root / "f", ACCESS, with_user(7, BOB.uid, owner=7, group=5))
        assert mode_of(root / "f") & stat.S_ISGID == 0

    @pytest.mark.fuse_needs("symlinks")
    def test_not_on_symlinks(self, root: Path) -> None:
        (root / "l").symlink_to("x")
        with fails(errno.EOPNOTSUPP):
            os.setxattr(root / "l", ACCESS, with_user(7, BOB.uid), follow_symlinks=False)


class TestDefaultAcl:
    @pytest.fixture
    def parent(self, root: Path) -> Path:
        (root / "d").mkdir(mode=0o755)
        setfacl("-d", "-m", f"u::rwx,u:{BOB.uid}:rwx,g::r-x,o::-,m::rwx", root / "d")
        return root / "d"

    def test_does_not_change_the_directory(self, parent: Path) -> None:
        assert mode_of(parent) == 0o755
        with fails(errno.ENODATA):
            os.getxattr(parent, ACCESS)
        assert DEFAULT in os.listxattr(parent)

    def test_files_inherit_it_instead_of_the_umask(self, parent: Path) -> None:
        with Peer(umask=0o077) as peer:
            peer.call(os.close, peer.call(os.open, parent / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        found = getfacl(parent / "f")
        assert "user::rw-" in found
        assert f"user:{BOB.uid}:rwx" in found
        assert "group::r-x" in found
        assert "mask::rw-" in found
        assert "other::---" in found
        assert mode_of(parent / "f") == 0o660

    def test_directories_inherit_it_twice(self, parent: Path) -> None:
        (parent / "sub").mkdir(mode=0o777)
        found = getfacl(parent / "sub")
        assert f"user:{BOB.uid}:rwx" in found
        assert f"default:user:{BOB.uid}:rwx" in found
        assert "default:mask::rwx" in found
        write_path = parent / "sub" / "f"
        os.close(os.open(write_path, os.O_CREAT | os.O_WRONLY, 0o600))
        assert mode_of(write_path) == 0o600
        assert "mask::---" in getfacl(write_path)

    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_other_kinds(self, parent: Path) -> None:
        os.mkfifo(parent / "p", 0o666)
        assert mode_of(parent / "p") == 0o660
        (parent / "l").symlink_to("x")
        assert stat.S_IMODE((parent / "l").lstat().st_mode) == 0o777

    def test_minimal_default_gives_plain_modes(self, root: Path) -> None:
        (root / "d").mkdir()
        setfacl("-d", "-m", "u::rwx,g::rwx,o::r", root / "d")
        with Peer(umask=0o077) as peer:
            peer.call(os.close, peer.call(os.open, root / "d" / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        assert mode_of(root / "d" / "f") == 0o664
        with fails(errno.ENODATA):
            os.getxattr(root / "d" / "f", ACCESS)

    def test_is_enforced(self, parent: Path) -> None:
        write_file(parent / "f", b"x")
        setfacl("-m", f"u:{BOB.uid}:rx", parent)
        (parent / "f").chmod(0o660)
        assert as_user(BOB, read_file, parent / "f") == b"x"
        with fails(errno.EACCES):
            as_user(ALICE, read_file, parent / "f")

    def test_removing(self, parent: Path) -> None:
        setfacl("-k", parent)
        with fails(errno.ENODATA):
            os.getxattr(parent, DEFAULT)
        write_file(parent / "f", mode=0o644)
        with fails(errno.ENODATA):
            os.getxattr(parent / "f", ACCESS)

    def test_not_on_files(self, root: Path) -> None:
        write_file(root / "f")
        with fails(errno.EACCES):
            os.setxattr(root / "f", DEFAULT, with_user(7, BOB.uid))

    def test_renamed_files_keep_their_own(self, parent: Path, root: Path) -> None:
        write_file(root / "f", mode=0o644)
        os.rename(root / "f", parent / "f")
        with fails(errno.ENODATA):
            os.getxattr(parent / "f", ACCESS)
