"""Who may do what: mode bits, the sticky bit, set-id bits and their clearing, groups, and what only an owner may do."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rawfuse.testing.peer import ALICE, BOB, ROOT, STAFF, Peer, User, as_user
from rawfuse.testing.syscalls import UTIME_NOW, fails, opened, read_file, utimensat_raw, write_file

pytestmark = pytest.mark.fuse_needs("other-users")

Calls = tuple[tuple[Callable[..., object], tuple[object, ...]], ...]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def give(path: Path, user: User, mode: int | None = None) -> None:
    os.chown(path, user.uid, user.gid, follow_symlinks=False)
    if mode is not None:
        path.chmod(mode)


def append(path: Path, data: bytes = b"x") -> int:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        return os.write(fd, data)


class TestModeBits:
    @pytest.mark.parametrize(
        ("mode", "user", "may_read", "may_write"),
        [
            (0o600, ALICE, True, True),
            (0o600, BOB, False, False),
            (0o400, ALICE, True, False),
            (0o200, ALICE, False, True),
            (0o060, ALICE, False, False),
            (0o060, User(BOB.uid, ALICE.gid), True, True),
            (0o060, User(BOB.uid, BOB.gid, (ALICE.gid,)), True, True),
            (0o006, BOB, True, True),
            (0o006, ALICE, False, False),
            (0o006, User(BOB.uid, ALICE.gid), False, False),
            (0o000, ROOT, True, True),
        ],
    )
    def test_file(self, root: Path, mode: int, user: User, may_read: bool, may_write: bool) -> None:
        write_file(root / "f", b"data")
        give(root / "f", ALICE, mode)
        with Peer(user) as peer:
            for allowed, flags in ((may_read, os.R_OK), (may_write, os.W_OK)):
                assert peer.call(os.access, root / "f", flags) is allowed
            if may_read:
                assert peer.call(read_file, root / "f") == b"data"
            else:
                with fails(errno.EACCES):
                    peer.call(read_file, root / "f")
            if may_write:
                peer.call(append, root / "f")
            else:
                with fails(errno.EACCES):
                    peer.call(append, root / "f")
                with fails(errno.EACCES):
                    peer.call(os.truncate, root / "f", 0)

    def test_directory_search_and_list(self, root: Path) -> None:
        (root / "d").mkdir()
        write_file(root / "d" / "f", b"data")
        with Peer(BOB) as bob:
            (root / "d").chmod(0o711)
            assert bob.call(read_file, root / "d" / "f") == b"data"
            with fails(errno.EACCES):
                bob.call(os.listdir, root / "d")
            (root / "d").chmod(0o744)
            assert bob.call(os.listdir, root / "d") == ["f"]
            with fails(errno.EACCES):
                bob.call(os.stat, root / "d" / "f")

    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_directory_write(self, root: Path) -> None:
        (root / "d").mkdir()
        write_file(root / "d" / "f")
        with Peer(BOB) as bob:
            calls: Calls = (
                (write_file, (root / "d" / "new",)),
                (os.mkdir, (root / "d" / "new",)),
                (os.symlink, ("x", root / "d" / "new")),
                (os.mkfifo, (root / "d" / "new",)),
                (os.unlink, (root / "d" / "f",)),
                (os.rename, (root / "d" / "f", root / "d" / "g")),
            )
            for function, arguments in calls:
                with fails(errno.EACCES):
                    bob.call(function, *arguments)
            (root / "d").chmod(0o777)
            bob.call(os.unlink, root / "d" / "f")
            bob.call(write_file, root / "d" / "new", b"mine")
        made = (root / "d" / "new").stat()
        assert (made.st_uid, made.st_gid) == (BOB.uid, BOB.gid)

    def test_execute(self, root: Path) -> None:
        write_file(root / "prog", Path("/bin/true").read_bytes(), 0o644)
        with Peer(BOB) as bob:
            with fails(errno.EACCES):
                bob.call(os.posix_spawn, root / "prog", ["prog"], {})
            (root / "prog").chmod(0o755)
            pid = bob.call(os.posix_spawn, root / "prog", ["prog"], {})
            assert bob.call(os.waitpid, pid, 0) == (pid, 0)

    def test_open_descriptor_outlives_the_permission(self, root: Path) -> None:
        write_file(root / "f", b"data")
        give(root / "f", ALICE, 0o600)
        with Peer(ALICE) as alice:
            fd = alice.call(os.open, root / "f", os.O_RDWR)
            (root / "f").chmod(0)
            os.chown(root / "f", 0, 0)
            assert alice.call(os.pread, fd, 10, 0) == b"data"
            assert alice.call(os.pwrite, fd, b"D", 0) == 1
            with fails(errno.EACCES):
                alice.call(os.open, root / "f", os.O_RDONLY)


class TestOwnership:
    def test_only_the_owner_changes_the_mode(self, root: Path) -> None:
        write_file(root / "f")
        give(root / "f", ALICE, 0o666)
        with fails(errno.EPERM):
            as_user(BOB, os.chmod, root / "f", 0o777)
        as_user(ALICE, os.chmod, root / "f", 0o640)
        assert mode_of(root / "f") == 0o640

    def test_only_root_gives_files_away(self, root: Path) -> None:
        write_file(root / "f")
        give(root / "f", ALICE)
        with fails(errno.EPERM):
            as_user(ALICE, os.chown, root / "f", BOB.uid, -1)
        with fails(errno.EPERM):
            as_user(ALICE, os.chown, root / "f", -1, STAFF)
        as_user(User(ALICE.uid, ALICE.gid, (STAFF,)), os.chown, root / "f", -1, STAFF)
        assert (root / "f").stat().st_gid == STAFF
        with fails(errno.EPERM):
            as_user(BOB, os.chown, root / "f", -1, BOB.gid)

    def test_times(self, root: Path) -> None:
        write_file(root / "f")
        give(root / "f", ALICE, 0o666)
        now = (0, UTIME_NOW)
        as_user(BOB, utimensat_raw, root / "f", now, now)
        with fails(errno.EPERM):
            as_user(BOB, utimensat_raw, root / "f", (1, 0), (1, 0))
        as_user(ALICE, utimensat_raw, root / "f", (1, 0), (1, 0))
        (root / "f").chmod(0o644)
        with fails(errno.EACCES):
            as_user(BOB, utimensat_raw, root / "f", now, now)

    @pytest.mark.fuse_needs("mknod")
    def test_devices_are_for_root(self, root: Path) -> None:
        root.chmod(0o777)
        with fails(errno.EPERM):
            as_user(ALICE, os.mknod, root / "n", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        as_user(ALICE, os.mknod, root / "fifo", stat.S_IFIFO | 0o600)

    def test_noatime_is_for_the_owner(self, root: Path) -> None:
        write_file(root / "f")
        give(root / "f", ALICE, 0o644)
        as_user(ALICE, _open_close, root / "f", os.O_RDONLY | os.O_NOATIME)
        with fails(errno.EPERM):
            as_user(BOB, _open_close, root / "f", os.O_RDONLY | os.O_NOATIME)


def _open_close(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


class TestSticky:
    @pytest.fixture
    def shared(self, root: Path) -> Path:
        shared = root / "tmp"
        shared.mkdir()
        shared.chmod(0o1777)
        write_file(shared / "alices")
        give(shared / "alices", ALICE, 0o666)
        (shared / "alicesdir").mkdir()
        give(shared / "alicesdir", ALICE, 0o777)
        return shared

    def test_others_cannot_remove(self, shared: Path) -> None:
        with Peer(BOB) as bob:
            calls: Calls = (
                (os.unlink, (shared / "alices",)),
                (os.rmdir, (shared / "alicesdir",)),
                (os.rename, (shared / "alices", shared / "x")),
                (os.rename, (shared / "alicesdir", shared / "x")),
            )
            for function, arguments in calls:
                with fails(errno.EPERM, errno.EACCES):
                    bob.call(function, *arguments)
            bob.call(write_file, shared / "bobs")
            with fails(errno.EPERM, errno.EACCES):
                bob.call(os.rename, shared / "bobs", shared / "alices")
            bob.call(os.rename, shared / "bobs", shared / "bobs2")
            bob.call(os.unlink, shared / "bobs2")

    def test_owners_can(self, shared: Path) -> None:
        as_user(ALICE, os.rename, shared / "alices", shared / "renamed")
        as_user(ALICE, os.unlink, shared / "renamed")
        as_user(ALICE, os.rmdir, shared / "alicesdir")

    def test_owner_of_the_directory_can(self, shared: Path) -> None:
        give(shared, BOB, 0o1777)
        as_user(BOB, os.unlink, shared / "alices")


class TestSetGidDirectories:
    @pytest.mark.fuse_needs("mknod", "symlinks")
    def test_inheritance(self, root: Path) -> None:
        (root / "d").mkdir()
        os.chown(root / "d", 0, STAFF)
        (root / "d").chmod(0o2777)
        with Peer(ALICE, umask=0) as alice:
            alice.call(write_file, root / "d" / "f")
            alice.call(os.mkdir, root / "d" / "sub", 0o755)
            alice.call(os.symlink, "x", root / "d" / "l")
            alice.call(os.mkfifo, root / "d" / "p")
        for name in ("f", "sub", "l", "p"):
            made = (root / "d" / name).lstat()
            assert (made.st_uid, made.st_gid) == (ALICE.uid, STAFF), name
        assert mode_of(root / "d" / "sub") == 0o2755
        assert mode_of(root / "d" / "f") & stat.S_ISGID == 0

    @pytest.mark.fuse_needs("setid")
    def test_set_gid_file_by_a_stranger_to_the_group(self, root: Path) -> None:
        """A set-group-ID executable cannot be made for a group that its maker is not in (kernel: inode_init_owner)."""
        (root / "d").mkdir()
        os.chown(root / "d", 0, STAFF)
        (root / "d").chmod(0o2777)
        with Peer(ALICE, umask=0) as alice:
            alice.call(_open_close_mode, root / "d" / "f", 0o2775)
        assert mode_of(root / "d" / "f") == 0o775
        with Peer(User(ALICE.uid, ALICE.gid, (STAFF,)), umask=0) as alice:
            alice.call(_open_close_mode, root / "d" / "g", 0o2775)
        assert mode_of(root / "d" / "g") == 0o2775


def _open_close_mode(path: Path, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


@pytest.mark.fuse_needs("setid")
class TestSetIdClearing:
    """Modifying a file takes its set-id bits away, unless the caller has CAP_FSETID."""

    @pytest.fixture
    def program(self, root: Path) -> Path:
        write_file(root / "prog", b"x" * 100)
        give(root / "prog", ALICE, 0o6777)
        return root / "prog"

    def test_write_by_a_user(self, program: Path) -> None:
        as_user(BOB, append, program)
        assert mode_of(program) == 0o777

    def test_write_by_the_owner(self, program: Path) -> None:
        as_user(ALICE, append, program)
        assert mode_of(program) == 0o777

    def test_write_by_root(self, program: Path) -> None:
        append(program)
        assert mode_of(program) == 0o6777

    def test_truncate(self, program: Path) -> None:
        as_user(BOB, os.truncate, program, 5)
        assert mode_of(program) == 0o777

    def test_open_truncate(self, program: Path) -> None:
        as_user(BOB, _open_close, program, os.O_WRONLY | os.O_TRUNC)
        assert mode_of(program) == 0o777

    def test_every_write_of_one_descriptor(self, program: Path) -> None:
        with Peer(BOB) as bob:
            fd = bob.call(os.open, program, os.O_WRONLY)
            bob.call(os.write, fd, b"1")
            program.chmod(0o6777)
            bob.call(os.write, fd, b"2")
        assert mode_of(program) == 0o777

    def test_locking_bit_stays(self, program: Path) -> None:
        """Set-group-ID without group execution is no set-id bit (mandatory locking once)."""
        program.chmod(0o2666)
        as_user(ALICE, append, program)
        assert mode_of(program) == 0o2666
        assert program.stat().st_size == 101

    def test_chown_by_root(self, program: Path) -> None:
        os.chown(program, BOB.uid, BOB.gid)
        assert mode_of(program) == 0o777

    def test_chown_keeps_the_locking_bit(self, program: Path) -> None:
        program.chmod(0o6767)
        os.chown(program, BOB.uid, BOB.gid)
        assert mode_of(program) == 0o2767

    def test_chgrp_by_the_owner(self, program: Path) -> None:
        as_user(User(ALICE.uid, ALICE.gid, (STAFF,)), os.chown, program, -1, STAFF)
        assert mode_of(program) == 0o777

    def test_chown_of_a_directory(self, root: Path) -> None:
        (root / "d").mkdir()
        (root / "d").chmod(0o6755)
        os.chown(root / "d", ALICE.uid, ALICE.gid)
        assert mode_of(root / "d") == 0o6755

    def test_chmod_by_a_stranger_to_the_group(self, program: Path) -> None:
        os.chown(program, ALICE.uid, STAFF)
        as_user(ALICE, os.chmod, program, 0o2755)
        assert mode_of(program) == 0o755

    def test_reading_leaves_them(self, program: Path) -> None:
        as_user(BOB, read_file, program)
        assert mode_of(program) == 0o6777


@pytest.mark.fuse_needs("setid")
def test_set_uid_program_runs_as_its_owner(root: Path) -> None:
    write_file(root / "id", Path("/usr/bin/id").read_bytes(), 0o755)
    give(root / "id", ALICE, 0o4755)
    assert as_user(BOB, _output_of, root / "id", "-u") == str(ALICE.uid)


def _output_of(program: Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def test_protected_parents(root: Path) -> None:
    """Search permission is asked of every directory on the way."""
    (root / "a" / "b").mkdir(parents=True)
    write_file(root / "a" / "b" / "f", b"data")
    (root / "a").chmod(0o700)
    with Peer(BOB) as bob:
        calls: Calls = (
            (read_file, (root / "a" / "b" / "f",)),
            (os.stat, (root / "a" / "b",)),
            (os.mkdir, (root / "a" / "b" / "c",)),
        )
        for function, arguments in calls:
            with fails(errno.EACCES):
                bob.call(function, *arguments)


def test_rename_of_a_directory_needs_write_on_it(root: Path) -> None:
    """Moving a directory changes its ``..``."""
    root.chmod(0o777)
    (root / "to").mkdir()
    (root / "to").chmod(0o777)
    (root / "d").mkdir()
    give(root / "d", ALICE, 0o755)
    with fails(errno.EACCES):
        as_user(BOB, os.rename, root / "d", root / "to" / "d")
    as_user(BOB, os.rename, root / "d", root / "d2")
