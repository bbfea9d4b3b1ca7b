"""The same random operations on the file system and on a local directory: everything visible must agree.

Operations that the file system lacks are not tried.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rawfuse.testing.fixtures import make_scratch
from rawfuse.testing.peer import ALICE, Peer
from rawfuse.testing.syscalls import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, link_fd, rename2
from rawfuse.testing.target import Target

NAMES = ("a", "b", "c")
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
modes = st.sampled_from([0o000, 0o644, 0o600, 0o755, 0o777, 0o1777, 0o2775, 0o4755, 0o6777])
sizes = st.sampled_from([0, 1, 10, 4095, 4096, 4097, 10_000, 70_000, 200_000])
owners = st.sampled_from([-1, 0, ALICE.uid, 5])
xattrs = st.sampled_from(["user.one", "user.two", "trusted.three"])
as_alice = st.sampled_from([False, False, True])
slots = st.integers(0, 2)
NONBLOCK = os.O_NONBLOCK
"""Nobody opens the other end of a fifo here."""

OLD = 1_000_000_000 * 10**9
"""Times that tests set lie before this, so that they are told from times of the clock."""


# The operations: functions of a root directory, so that they run on both sides and in processes of other users.


def make_file(root: str, path: str, mode: int, data: bytes, flags: int) -> int:
    fd = os.open(f"{root}/{path}", os.O_WRONLY | os.O_CREAT | NONBLOCK | flags, mode)
    try:
        return os.write(fd, data) if data else 0
    finally:
        os.close(fd)


def write_at(root: str, path: str, offset: int, data: bytes) -> int:
    fd = os.open(f"{root}/{path}", os.O_WRONLY | NONBLOCK)
    try:
        return os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def read_at(root: str, path: str, offset: int, size: int) -> bytes:
    fd = os.open(f"{root}/{path}", os.O_RDONLY | NONBLOCK)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def allocate(root: str, path: str, mode: int, offset: int, size: int) -> None:
    fd = os.open(f"{root}/{path}", os.O_RDWR | NONBLOCK)
    try:
        fallocate(fd, mode, offset, size)
        os.utime(fd, ns=(0, 0))  # nothing says whether an allocation that changes nothing visible sets mtime
    finally:
        os.close(fd)


def copy_range(root: str, source: str, target: str, source_at: int, target_at: int, length: int) -> int:
    one = os.open(f"{root}/{source}", os.O_RDONLY | NONBLOCK)
    try:
        two = os.open(f"{root}/{target}", os.O_WRONLY | NONBLOCK)
        try:
            done = 0
            while done < length:
                step = os.copy_file_range(one, two, length - done, source_at + done, target_at + done)
                if step == 0:
                    break
                done += step
            return done
        finally:
            os.close(two)
    finally:
        os.close(one)


def make_directory(root: str, path: str, mode: int) -> None:
    os.mkdir(f"{root}/{path}", mode)


def make_special(root: str, path: str, kind: int, mode: int) -> None:
    os.mknod(f"{root}/{path}", kind | mode, os.makedev(1, 3) if kind != stat.S_IFIFO else 0)


def make_symlink(root: str, path: str, target: str) -> None:
    os.symlink(target, f"{root}/{path}")


def make_link(root: str, path: str, new: str) -> None:
    os.link(f"{root}/{path}", f"{root}/{new}", follow_symlinks=False)


def make_tmpfile(root: str, directory: str, mode: int, data: bytes, new: str) -> None:
    fd = os.open(f"{root}/{directory}", os.O_TMPFILE | os.O_RDWR, mode)
    try:
        os.write(fd, data)
        link_fd(fd, f"{root}/{new}")
    finally:
        os.close(fd)


def remove_file(root: str, path: str) -> None:
    os.unlink(f"{root}/{path}")


def remove_directory(root: str, path: str) -> None:
    os.rmdir(f"{root}/{path}")


def move(root: str, old: str, new: str, flags: int) -> None:
    rename2(f"{root}/{old}", f"{root}/{new}", flags)


def change_mode(root: str, path: str, mode: int) -> None:
    os.chmod(f"{root}/{path}", mode)


def change_owner(root: str, path: str, uid: int, gid: int) -> None:
    os.chown(f"{root}/{path}", uid, gid, follow_symlinks=False)


def cut(root: str, path: str, size: int) -> None:
    os.truncate(f"{root}/{path}", size)


def set_times(root: str, path: str, atime: int, mtime: int) -> None:
    os.utime(f"{root}/{path}", ns=(atime, mtime), follow_symlinks=False)


def set_attribute(root: str, path: str, name: str, value: bytes, flags: int) -> None:
    os.setxattr(f"{root}/{path}", name, value, flags)


def remove_attribute(root: str, path: str, name: str) -> None:
    os.removexattr(f"{root}/{path}", name)


def list_directory(root: str, path: str) -> list[str]:
    return sorted(os.listdir(f"{root}/{path}"))


def may(root: str, path: str, access: int) -> bool:
    return os.access(f"{root}/{path}", access)


def has(*names: str) -> Callable[[Any], Any]:
    """A rule for file systems that lack none of these."""
    return precondition(lambda self: not self.lacks.intersection(names))


class Comparison(RuleBasedStateMachine):
    """Two roots, the same calls on both; slots hold files open past their names."""

    def __init__(self, lacks: frozenset[str], mounted: Path, local: Path, alice: Peer) -> None:
        super().__init__()
        self.lacks = lacks
        self.roots = (Path(tempfile.mkdtemp(dir=local)), Path(tempfile.mkdtemp(dir=mounted)))
        self.alice = alice
        self.slots: dict[int, tuple[int, int]] = {}
        for root in self.roots:
            root.chmod(0o777)

    def both(self, alice: bool, function: Callable[..., Any], *arguments: Any) -> None:
        outcomes = []
        for root in self.roots:
            try:
                if alice and "other-users" not in self.lacks:
                    outcomes.append(("returned", self.alice.call(function, str(root), *arguments)))
                else:
                    outcomes.append(("returned", function(str(root), *arguments)))
            except OSError as error:
                outcomes.append(("failed", errno.errorcode[error.errno or 0]))
        assert outcomes[0] == outcomes[1], f"local {outcomes[0]}, mounted {outcomes[1]}"

    def allowed(self, mode: int) -> int:
        """The mode, without set-id bits where these are not served."""
        return mode & 0o1777 if "setid" in self.lacks else mode

    @rule(
        alice=as_alice,
        path=paths,
        mode=modes,
        size=sizes,
        flags=st.sampled_from([0, os.O_EXCL, os.O_TRUNC, os.O_APPEND]),
    )
    def make_file(self, alice: bool, path: str, mode: int, size: int, flags: int) -> None:
        self.both(alice, make_file, path, self.allowed(mode), bytes([65 + size % 26]) * size, flags)

    @rule(alice=as_alice, path=paths, offset=sizes, size=sizes, letter=st.sampled_from(b"xyz"))
    def write_at(self, alice: bool, path: str, offset: int, size: int, letter: int) -> None:
        self.both(alice, write_at, path, offset, bytes([letter]) * size)

    @rule(alice=as_alice, path=paths, offset=sizes, size=sizes)
    def read_at(self, alice: bool, path: str, offset: int, size: int) -> None:
        self.both(alice, read_at, path, offset, size)

    @has("allocation")
    @rule(
        path=paths,
        mode=st.sampled_from([0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE]),
        offset=sizes,
        size=sizes,
    )
    def allocate(self, path: str, mode: int, offset: int, size: int) -> None:
        self.both(False, allocate, path, mode, offset, size)

    @rule(source=paths, sink=paths, source_at=sizes, target_at=sizes, length=sizes)
    def copy_range(self, source: str, sink: str, source_at: int, target_at: int, length: int) -> None:
        self.both(False, copy_range, source, sink, source_at, target_at, length)

    @rule(alice=as_alice, path=paths, mode=modes)
    def make_directory(self, alice: bool, path: str, mode: int) -> None:
        self.both(alice, make_directory, path, self.allowed(mode))

    @has("mknod")
    @rule(alice=as_alice, path=paths, kind=st.sampled_from([stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK]), mode=modes)
    def make_special(self, alice: bool, path: str, kind: int, mode: int) -> None:
        self.both(alice, make_special, path, kind, self.allowed(mode))

    @has("symlinks")
    @rule(alice=as_alice, path=paths, to=paths)
    def make_symlink(self, alice: bool, path: str, to: str) -> None:
        self.both(alice, make_symlink, path, to)

    @has("links")
    @rule(path=paths, new=paths)
    def make_link(self, path: str, new: str) -> None:
        self.both(False, make_link, path, new)

    @has("tmpfile", "links")
    @rule(directory=paths, mode=modes, size=sizes, new=paths)
    def make_tmpfile(self, directory: str, mode: int, size: int, new: str) -> None:
        self.both(False, make_tmpfile, directory, self.allowed(mode), b"t" * size, new)

    @rule(alice=as_alice, path=paths)
    def remove_file(self, alice: bool, path: str) -> None:
        self.both(alice, remove_file, path)

    @rule(alice=as_alice, path=paths)
    def remove_directory(self, alice: bool, path: str) -> None:
        self.both(alice, remove_directory, path)

    @rule(alice=as_alice, old=paths, new=paths)
    def move(self, alice: bool, old: str, new: str) -> None:
        self.both(alice, move, old, new, 0)

    @has("rename-flags", "mknod")
    @rule(alice=as_alice, old=paths, new=paths, flags=st.sampled_from([1, 2, 4]))
    def move_with_flags(self, alice: bool, old: str, new: str, flags: int) -> None:
        self.both(alice, move, old, new, flags)

    @rule(alice=as_alice, path=paths, mode=modes)
    def change_mode(self, alice: bool, path: str, mode: int) -> None:
        self.both(alice, change_mode, path, self.allowed(mode))

    @rule(alice=as_alice, path=paths, uid=owners, gid=owners)
    def change_owner(self, alice: bool, path: str, uid: int, gid: int) -> None:
        if uid == gid == -1:
            return  # clears set-id bits, which the kernel does not tell a FUSE server (fs/fuse/dir.c: fuse_do_setattr)
        self.both(alice, change_owner, path, uid, gid)

    @rule(alice=as_alice, path=paths, size=sizes)
    def cut(self, alice: bool, path: str, size: int) -> None:
        self.both(alice, cut, path, size)

    @rule(alice=as_alice, path=paths, atime=st.integers(-OLD, OLD), mtime=st.integers(-OLD, OLD))
    def set_times(self, alice: bool, path: str, atime: int, mtime: int) -> None:
        self.both(alice, set_times, path, atime, mtime)

    @has("xattr")
    @rule(alice=as_alice, path=paths, name=xattrs, size=st.integers(0, 50), flags=st.sampled_from([0, 0, 1, 2]))
    def set_attribute(self, alice: bool, path: str, name: str, size: int, flags: int) -> None:
        self.both(alice, set_attribute, path, name, b"v" * size, flags)

    @has("xattr")
    @rule(alice=as_alice, path=paths, name=xattrs)
    def remove_attribute(self, alice: bool, path: str, name: str) -> None:
        self.both(alice, remove_attribute, path, name)

    @rule(alice=as_alice, path=paths)
    def list_directory(self, alice: bool, path: str) -> None:
        self.both(alice, list_directory, path)

    @rule(alice=as_alice, path=paths, access=st.integers(0, 7))
    def may(self, alice: bool, path: str, access: int) -> None:
        self.both(alice, may, path, access)

    @has("unlinked")
    @rule(slot=slots, path=paths)
    def hold(self, slot: int, path: str) -> None:
        self.release(slot)
        fds = []
        for root in self.roots:
            try:
                fds.append(os.open(root / path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW))
            except OSError as error:
                fds.append(-(error.errno or 0))
        if min(fds) < 0:
            assert fds[0] == fds[1], f"local {fds[0]}, mounted {fds[1]}"
        elif stat.S_ISREG(os.fstat(fds[0]).st_mode):
            self.slots[slot] = (fds[0], fds[1])
        else:
            for fd in fds:
                os.close(fd)

    @rule(slot=slots)
    def release(self, slot: int) -> None:
        for fd in self.slots.pop(slot, ()):
            os.close(fd)

    @rule(slot=slots, offset=sizes, size=sizes)
    def write_held(self, slot: int, offset: int, size: int) -> None:
        for fd in self.slots.get(slot, ()):
            assert os.pwrite(fd, b"h" * size, offset) == size

    @rule(slot=slots, size=sizes)
    def cut_held(self, slot: int, size: int) -> None:
        for fd in self.slots.get(slot, ()):
            os.ftruncate(fd, size)

    @rule(slot=slots)
    def sync_held(self, slot: int) -> None:
        for fd in self.slots.get(slot, ()):
            os.fsync(fd)

    @invariant()
    def same_attributes(self) -> None:
        local, mounted = (self.walk(root) for root in self.roots)
        assert self.attributes(local) == self.attributes(mounted)
        self.compare_time_order(local, mounted)
        for local_fd, mounted_fd in self.slots.values():
            one, two = os.fstat(local_fd), os.fstat(mounted_fd)
            assert (one.st_mode, one.st_nlink, one.st_size) == (two.st_mode, two.st_nlink, two.st_size)

    @classmethod
    def walk(cls, root: Path | str, prefix: str = "") -> dict[str, os.stat_result]:
        """Every file below, by its relative path."""
        found = {}
        with os.scandir(root) as entries:
            for entry in entries:
                name = prefix + entry.name
                found[name] = os.lstat(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    found.update(cls.walk(entry.path, name + "/"))
        return found

    def attributes(self, files: dict[str, os.stat_result]) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for name, made in files.items():
            is_dir = stat.S_ISDIR(made.st_mode)
            size = -1 if is_dir else made.st_size
            links = -1 if is_dir and "nlink" in self.lacks else made.st_nlink
            set_mtime = made.st_mtime_ns if made.st_mtime_ns <= OLD else None
            found[name] = (made.st_mode, links, made.st_uid, made.st_gid, size, made.st_rdev, set_mtime)
        return found

    def compare_time_order(self, local: dict[str, os.stat_result], mounted: dict[str, os.stat_result]) -> None:
        """What is strictly newer on the local side is not older on the mounted one."""
        times = sorted((made.st_mtime_ns, mounted[name].st_mtime_ns, name) for name, made in local.items())
        for (local_a, mounted_a, a), (local_b, mounted_b, b) in itertools.pairwise(times):
            assert local_a == local_b or mounted_a <= mounted_b, f"{a} is newer than {b} on the mount alone"

    def contents(self, root: Path) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for name, made in self.walk(root).items():
            path = root / name
            content: bytes | str = b""
            if stat.S_ISREG(made.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(made.st_mode):
                content = os.readlink(path)
            names = [] if "xattr" in self.lacks else sorted(os.listxattr(path, follow_symlinks=False))
            values = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
            found[name] = (content, values)
        return found

    def compare_contents(self) -> None:
        local, mounted = (self.contents(root) for root in self.roots)
        assert local.keys() == mounted.keys()
        for name, expected in local.items():
            assert mounted[name] == expected, f"{name} differs"

    @rule()
    def same_contents(self) -> None:
        self.compare_contents()
        for local, mounted in self.slots.values():
            assert os.pread(local, 1 << 20, 0) == os.pread(mounted, 1 << 20, 0)

    def teardown(self) -> None:
        for slot in list(self.slots):
            self.release(slot)
        self.compare_contents()


@pytest.mark.deadline(240)
def test_same_as_a_plain_directory(root: Path, target: Target, fuse_stress: bool) -> None:
    """In the end an unmount and a mount, after which what each run has left must still be the same."""
    local = make_scratch("compare")
    examples = 2000 if fuse_stress else 150 if target.server is not None else 25  # without a server: of the test itself
    runs: list[Comparison] = []

    def begin() -> Comparison:
        runs.append(Comparison(target.spec.lacks, root, local, alice))
        return runs[-1]

    try:
        with Peer(ALICE) as alice:
            run_state_machine_as_test(
                begin,  # type: ignore[arg-type]
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=60 if fuse_stress else 40,
                    deadline=None,
                    derandomize=not fuse_stress,
                    database=None,
                    phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck),
                ),
            )
        if "remount" not in target.spec.lacks:
            target.remount()
            for run in runs:
                run.same_attributes()
                run.compare_contents()
    finally:
        shutil.rmtree(local)
