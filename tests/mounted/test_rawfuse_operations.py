"""The newer and rarer operations on a real mount: what programs get, and by which requests."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rawfuse import InitFlag, Opcode
from rawfuse.testing.peer import ALICE, ROOT, STAFF, User, as_user
from rawfuse.testing.syscalls import fails, link_fd, opened, posix_lock_owner, statx_btime
from tests.mounted import lab_server
from tests.mounted.lab import Lab
from tests.mounted.lab_server import Configuration

MakeLab = Callable[[Configuration], Lab]
HOLE = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def file(lab: Lab) -> Path:
    (lab.root / "f").write_bytes(b"0123456789")
    lab.seen()
    return lab.root / "f"


@pytest.fixture(params=["file", "directory"])
def either(lab: Lab, request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor of a file, and one of a directory."""
    path = lab.root / "x"
    path.mkdir() if request.param == "directory" else path.touch()
    with opened(path) as fd:
        lab.seen()
        yield fd


class TestIoctl:
    def test_in_and_out(self, lab: Lab, either: int) -> None:
        buffer = bytearray(range(64))
        assert fcntl.ioctl(either, lab_server.REVERSE, buffer) == 64
        assert buffer == bytes(reversed(range(64)))
        assert lab.names_seen() == ["IOCTL"]

    def test_out(self, lab: Lab, either: int) -> None:
        buffer = bytearray(b"\xff" * 32)
        fcntl.ioctl(either, lab_server.DESCRIBE, buffer)
        nodeid, flags, argument = struct.unpack_from("=QQQ", buffer)
        directory = stat.S_ISDIR(os.fstat(either).st_mode)
        assert (nodeid, flags) == (lab.ino("x"), 16 if directory else 0)
        assert argument != 0  # the address of the buffer
        assert buffer[24:] == b"\xff" * 8, "only what was returned is copied"

    def test_in(self, lab: Lab, either: int) -> None:
        assert fcntl.ioctl(either, lab_server.KEEP, bytes(range(8))) == bytes(range(8))
        assert lab.call("kept") == bytes(range(8))
        assert _libc.ioctl(either, ctypes.c_ulong(lab_server.KEEP), bytes([1] * 8)) == 8

    def test_argument_that_is_a_number(self, either: int) -> None:
        assert fcntl.ioctl(either, lab_server.ECHO, 77) == 77

    def test_large(self, either: int) -> None:
        buffer = bytearray(bytes(range(252)) * 65)
        fcntl.ioctl(either, lab_server.LARGE, buffer)
        assert buffer == bytes(range(1, 253)) * 65

    def test_unknown(self, either: int) -> None:
        with fails(errno.ENOTTY):
            fcntl.ioctl(either, 0x5401)

    def test_flags(self, lab: Lab, either: int) -> None:
        """chattr(1) opens the file once more, for the kernel's call."""
        fcntl.ioctl(either, lab_server.FS_IOC_SETFLAGS, struct.pack("=I", 0x80))
        assert "IOCTL" in lab.names_seen()
        assert fcntl.ioctl(either, lab_server.FS_IOC_GETFLAGS, bytes(8))[:4] == struct.pack("=I", 0x80)

    def test_more_than_there_is_room_for(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration())
        (lab.root / "f").touch()
        with opened(lab.root / "f") as fd:
            with fails(errno.EIO):
                fcntl.ioctl(fd, lab_server.TOO_MUCH, bytearray(4))
            assert fcntl.ioctl(fd, lab_server.ECHO, 5) == 5
        assert "which is no reply to it" in lab.server.log_since(0)

    def test_without_a_handler(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(declined=[Opcode.IOCTL]))
        with opened(lab.root) as fd:
            for _ in range(2):
                with fails(errno.ENOTTY):
                    fcntl.ioctl(fd, lab_server.ECHO, 1)
        assert lab.names_seen("IOCTL") == ["IOCTL"] * 2, "the kernel does not remember that one"


IN, OUT = select.EPOLLIN, select.EPOLLOUT


class TestPoll:
    def test_ready_at_once(self, lab: Lab, file: Path) -> None:
        lab.call("set_ready", "f", IN | OUT)
        with opened(file) as fd:
            assert select.select([fd], [fd], [], 30) == ([fd], [fd], [])
            lab.call("set_ready", "f", OUT)
            assert select.select([fd], [fd], [], 30) == ([], [fd], [])

    def test_not_ready(self, lab: Lab, file: Path) -> None:
        with opened(file) as fd:
            assert select.select([fd], [], [], 0) == ([], [], [])
        assert [request.arguments.split()[2] for request in lab.seen("POLL")] == ["flags=0"]

    @pytest.mark.parametrize("kind", ["select", "poll", "epoll"])
    def test_wakes(self, lab: Lab, file: Path, kind: str) -> None:
        """One who sleeps in it is woken by the notification, and then asks what is ready."""
        results: list[object] = []
        with opened(file) as fd:
            sleeper = threading.Thread(target=lambda: results.append(_wait(kind, fd)))
            sleeper.start()
            lab.call("wait_for", "POLL")
            lab.call("set_ready", "f", OUT)  # not what it waits for
            lab.call("wait_for", "POLL", 2)
            assert sleeper.is_alive()
            assert lab.call("set_ready", "f", IN) == 1
            sleeper.join()
        assert results == [IN]

    def test_edge_triggered(self, lab: Lab, file: Path) -> None:
        with opened(file) as fd, select.epoll() as epoll:
            epoll.register(fd, IN | select.EPOLLET)
            assert epoll.poll(0) == []
            for _ in range(3):
                assert lab.call("set_ready", "f", IN) == 1
                assert epoll.poll(30) == [(fd, IN)]
                assert epoll.poll(0) == []

    def test_many_sleepers(self, lab: Lab, file: Path) -> None:
        results: list[object] = []
        fds = [os.open(file, os.O_RDONLY) for _ in range(5)]
        sleepers = [threading.Thread(target=lambda fd=fd: results.append(_wait("poll", fd))) for fd in fds]
        for sleeper in sleepers:
            sleeper.start()
        lab.call("wait_for", "POLL", len(fds))
        assert lab.call("set_ready", "f", IN) == len(fds)
        for sleeper in sleepers:
            sleeper.join()
        for fd in fds:
            os.close(fd)
        assert results == [IN] * 5

    def test_waking_for_nothing(self, lab: Lab, file: Path) -> None:
        """An unknown handle is no error, and one that has been closed is unknown."""
        lab.notify("wake_poll", 1 << 40)
        with opened(file) as fd:
            _libc.poll(_pollfd(fd), 1, 0)
            with select.epoll() as epoll:
                epoll.register(fd, IN)
        assert lab.call("set_ready", "f", IN) >= 1

    def test_without_a_handler(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(declined=[Opcode.POLL]))
        (lab.root / "f").touch()
        with opened(lab.root / "f") as fd:
            for _ in range(3):
                assert select.select([fd], [fd], [], 0) == ([fd], [fd], [])
        assert lab.names_seen("POLL") == ["POLL"], "always ready from then on"


def _wait(kind: str, fd: int) -> int:
    if kind == "select":
        return IN if select.select([fd], [], [], 40)[0] else 0
    poller = select.poll() if kind == "poll" else select.epoll()
    poller.register(fd, IN)
    found = poller.poll(40_000 if kind == "poll" else 40)
    return found[0][1] if found else 0


def _pollfd(fd: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("=ihh", fd, IN, 0), 8)


class TestTmpfile:
    def test_works(self, lab: Lab) -> None:
        with opened(lab.root, os.O_TMPFILE | os.O_RDWR, 0o640) as fd:
            assert lab.names_seen("TMPFILE", "CREATE", "MKNOD") == ["TMPFILE"]
            os.write(fd, b"text")
            assert os.listdir(lab.root) == []
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
            link_fd(fd, lab.root / "named")
        assert (lab.root / "named").read_bytes() == b"text"

    def test_without_a_handler(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(declined=[Opcode.TMPFILE]))
        for _ in range(2):
            with fails(errno.EOPNOTSUPP):
                os.open(lab.root, os.O_TMPFILE | os.O_RDWR)
        assert lab.names_seen("TMPFILE") == ["TMPFILE"]


class TestStatx:
    def test_birth_time(self, lab: Lab, file: Path) -> None:
        born = statx_btime(file)
        assert lab.names_seen(path="f") == ["STATX"]
        file.write_bytes(b"changed")
        assert statx_btime(file) == born
        assert 0 <= file.stat().st_mtime_ns - born < 3600 * 10**9

    def test_basic_fields_come_by_getattr(self, lab: Lab, file: Path) -> None:
        lab.notify("invalidate_inode", lab.ino("f"))
        file.stat()
        assert lab.names_seen(path="f") == ["GETATTR"]

    def test_without_a_handler(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(declined=[Opcode.STATX]))
        for _ in range(2):
            with fails(errno.EOPNOTSUPP):
                statx_btime(lab.root)
        assert lab.names_seen("STATX") == ["STATX"]


class TestSeekAndCopy:
    @pytest.fixture
    def sparse(self, lab: Lab) -> Path:
        with opened(lab.root / "sparse", os.O_CREAT | os.O_RDWR) as fd:
            os.pwrite(fd, b"data", HOLE)
            os.ftruncate(fd, 3 * HOLE)
        return lab.root / "sparse"

    def test_seek(self, lab: Lab, sparse: Path) -> None:
        with opened(sparse) as fd:
            lab.seen()
            assert os.lseek(fd, 0, os.SEEK_DATA) == HOLE
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
            assert HOLE < os.lseek(fd, HOLE, os.SEEK_HOLE) < 3 * HOLE
            with fails(errno.ENXIO):
                os.lseek(fd, 2 * HOLE, os.SEEK_DATA)
            assert lab.names_seen() == ["LSEEK"] * 4
            assert os.lseek(fd, -1, os.SEEK_END) == 3 * HOLE - 1
            assert lab.names_seen("LSEEK") == []

    def test_seek_without_a_handler(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(declined=[Opcode.LSEEK]))
        (lab.root / "f").write_bytes(b"0123456789")
        with opened(lab.root / "f") as fd:
            assert os.lseek(fd, 3, os.SEEK_DATA) == 3
            assert os.lseek(fd, 3, os.SEEK_HOLE) == 10
        assert lab.names_seen("LSEEK") == ["LSEEK"]

    @pytest.mark.parametrize(
        ("declined", "asked"),
        [
            ([], ["COPY_FILE_RANGE_64"] * 2),
            ([Opcode.COPY_FILE_RANGE_64], ["COPY_FILE_RANGE_64", "COPY_FILE_RANGE", "COPY_FILE_RANGE"]),
            ([Opcode.COPY_FILE_RANGE_64, Opcode.COPY_FILE_RANGE], ["COPY_FILE_RANGE_64", "COPY_FILE_RANGE"]),
        ],
        ids=["64", "32", "neither"],
    )
    def test_copy(self, make_lab: MakeLab, declined: list[Opcode], asked: list[str]) -> None:
        lab = make_lab(Configuration(declined=[int(opcode) for opcode in declined]))
        source, target = lab.root / "source", lab.root / "target"
        source.write_bytes(bytes(range(250)) * 40)
        target.write_bytes(b"before")
        with opened(source) as one, opened(target, os.O_RDWR) as two:
            assert os.copy_file_range(one, two, 1000, 100, 6) == 1000
            assert os.copy_file_range(one, two, 50, 9_990, 1006) == 10, "to the end of the file"
        assert lab.names_seen("COPY_FILE_RANGE_64", "COPY_FILE_RANGE") == asked
        data = source.read_bytes()
        assert target.read_bytes() == b"before" + data[100:1100] + data[9_990:]


class TestLocks:
    """What the locks do is in the POSIX suite; here is how they are asked for."""

    def arguments(self, lab: Lab) -> list[tuple[str, dict[str, str]]]:
        return [
            (request.opcode, dict(word.split("=") for word in request.arguments.split()))
            for request in lab.seen("GETLK", "SETLK", "SETLKW")
        ]

    def test_flock(self, lab: Lab, file: Path) -> None:
        with opened(file) as fd:
            fcntl.flock(fd, fcntl.LOCK_SH)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lab.call("wait_for", "RELEASE")
        release = next(request for request in lab.seen("RELEASE", "SETLK", "SETLKW")[::-1])
        assert "release_flags=2" in release.arguments
        with opened(file) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            (opcode, arguments), *rest = self.arguments(lab)
        assert (opcode, arguments["lock_flags"], rest) == ("SETLKW", "1", [])

    def test_record_locks(self, lab: Lab, file: Path) -> None:
        with opened(file, os.O_RDWR) as fd:
            fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 0, 100)
            assert posix_lock_owner(fd, fcntl.F_WRLCK) is None
            first, second, test = self.arguments(lab)
            assert as_user(ROOT, _owner_of, str(file)) == (fcntl.F_WRLCK, 5, 10, os.getpid())
        assert first[0] == "SETLKW"
        assert {name: first[1][name] for name in ("start", "end", "type", "lock_flags", "wait")} == {
            "start": "5",
            "end": "14",
            "type": str(fcntl.F_WRLCK),
            "lock_flags": "0",
            "wait": "True",
        }
        assert (second[0], second[1]["start"], second[1]["end"]) == ("SETLK", "100", str(2**63 - 1))
        assert (test[0], test[1]["owner"]) == ("GETLK", first[1]["owner"])

    def test_left_to_the_kernel(self, make_lab: MakeLab) -> None:
        """Without the flags no request comes, and the locks hold all the same on this mount."""
        lab = make_lab(Configuration(unwanted=int(InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS)))
        (lab.root / "f").touch()
        with opened(lab.root / "f", os.O_RDWR) as one, opened(lab.root / "f", os.O_RDWR) as two:
            fcntl.flock(one, fcntl.LOCK_EX)
            with fails(errno.EAGAIN):
                fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(one, fcntl.LOCK_EX)
        assert lab.names_seen("GETLK", "SETLK", "SETLKW") == []


def _owner_of(path: str) -> tuple[int, int, int, int] | None:
    with opened(path, os.O_RDWR) as fd:
        return posix_lock_owner(fd, fcntl.F_WRLCK)


class TestAccess:
    """Without default_permissions the file system decides."""

    @pytest.mark.parametrize("declined", [False, True])
    def test_who_decides(self, make_lab: MakeLab, declined: bool) -> None:
        options = {"default_permissions": False}
        unwanted = [int(Opcode.ACCESS)] if declined else []
        lab = make_lab(Configuration(options=options, declined=unwanted))
        assert lab.call("agreement")["flags"] & InitFlag.POSIX_ACL == 0
        (lab.root / "f").touch()
        for _ in range(2):
            assert as_user(ALICE, os.access, lab.root / "f", os.R_OK)
            assert as_user(ALICE, os.access, lab.root / "f", os.W_OK) == declined
        asked = lab.names_seen("ACCESS")
        assert asked == ["ACCESS"] * (1 if declined else len(asked))
        assert len(asked) == 1 or not declined

    def test_the_kernel_decides(self, lab: Lab) -> None:
        (lab.root / "f").touch(0o600)
        assert not as_user(ALICE, os.access, lab.root / "f", os.R_OK)
        assert lab.names_seen("ACCESS") == []


MAKERS: dict[str, Callable[[Path], object]] = {
    "CREATE": lambda path: path.touch(),
    "MKDIR": lambda path: path.mkdir(),
    "MKNOD": lambda path: os.mkfifo(path),
    "SYMLINK": lambda path: path.symlink_to("a target"),
    "TMPFILE": lambda path: os.close(os.open(path.parent, os.O_TMPFILE | os.O_RDWR)),
}


def _make(opcode: str, path: Path) -> None:
    MAKERS[opcode](path)


class TestExtensions:
    """With them the arguments no longer reach to the end of the message."""

    def arguments(self, lab: Lab, user: User, mode: int) -> dict[str, str]:
        """Each kind of inode, made by this user in a directory of group STAFF; the arguments of its request."""
        found = {}
        for opcode in MAKERS:
            directory = lab.root / opcode
            directory.mkdir()
            os.chown(directory, 0, STAFF)
            directory.chmod(mode)
            lab.seen()
            as_user(user, _make, opcode, directory / "name")
            (request,) = lab.seen(opcode)
            found[opcode] = request.arguments
            assert os.listdir(directory) == ([] if opcode == "TMPFILE" else ["name"])
            if opcode == "SYMLINK":
                assert os.readlink(directory / "name") == "a target"
        return found

    def test_security_context(self, make_lab: MakeLab) -> None:
        """Sent with every operation that makes an inode; empty where no security module labels inodes."""
        lab = make_lab(Configuration(features=int(InitFlag.SECURITY_CTX)))
        assert lab.call("agreement")["flags"] & InitFlag.SECURITY_CTX
        for arguments in self.arguments(lab, ROOT, 0o755).values():
            assert "extensions=Extensions(security_contexts=(" in arguments

    @pytest.mark.parametrize("context", [InitFlag(0), InitFlag.SECURITY_CTX], ids=["alone", "with context"])
    def test_supplementary_group(self, make_lab: MakeLab, context: InitFlag) -> None:
        """That of the directory, where it is one of the caller's."""
        lab = make_lab(Configuration(features=int(InitFlag.CREATE_SUPP_GROUP | context)))
        for arguments in self.arguments(lab, User(60001, 60001, (60005, STAFF)), 0o775).values():
            assert f"groups=({STAFF},)" in arguments

    def test_no_group_that_the_caller_is_not_in(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(features=int(InitFlag.CREATE_SUPP_GROUP)))
        for arguments in self.arguments(lab, User(60001, 60001, (60005,)), 0o777).values():
            assert "groups=()" in arguments


AT_FDCWD, MAX_HANDLE = -100, 128


def handle_of(path: Path) -> ctypes.Array[ctypes.c_char]:
    """name_to_handle_at(2)."""
    handle = ctypes.create_string_buffer(struct.pack("=Ii", MAX_HANDLE, 0), 8 + MAX_HANDLE)
    if _libc.name_to_handle_at(AT_FDCWD, os.fsencode(path), handle, ctypes.byref(ctypes.c_int()), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    return handle


def open_handle(directory: int, handle: ctypes.Array[ctypes.c_char]) -> int:
    """open_by_handle_at(2); any descriptor of the mount tells which."""
    fd = _libc.open_by_handle_at(directory, handle, os.O_RDONLY)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return int(fd)


class TestFileHandles:
    """What NFS servers and backup programs use: an inode by its number, whether the kernel knows it or not."""

    def test_an_inode_that_the_kernel_has_forgotten(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(features=int(InitFlag.EXPORT_SUPPORT)))
        (lab.root / "f").write_bytes(b"data")
        handle, ino = handle_of(lab.root / "f"), lab.ino("f")
        lab.notify("prune", [ino])
        lab.call("wait_forgotten", [ino])
        lab.seen()
        with opened(lab.root) as directory:
            fd = open_handle(directory, handle)
        assert os.read(fd, 10) == b"data"
        os.close(fd)
        assert [(one.nodeid, one.arguments) for one in lab.seen("LOOKUP")] == [(ino, "name=b'.'")]

    def test_without_the_promise(self, lab: Lab) -> None:
        (lab.root / "f").write_bytes(b"data")
        handle, ino = handle_of(lab.root / "f"), lab.ino("f")
        lab.notify("prune", [ino])
        lab.call("wait_forgotten", [ino])
        lab.seen()
        with opened(lab.root) as directory, fails(errno.ESTALE):
            open_handle(directory, handle)
        assert lab.names_seen("LOOKUP") == []

    def test_none(self, make_lab: MakeLab) -> None:
        lab = make_lab(Configuration(features=int(InitFlag.NO_EXPORT_SUPPORT)))
        with fails(errno.EOPNOTSUPP):
            handle_of(lab.root)


@pytest.mark.parametrize("permissions", [True, False])
def test_idmapped_mounts_are_agreed_where_the_kernel_takes_them(make_lab: MakeLab, permissions: bool) -> None:
    """Without the mount option it would refuse every request from then on."""
    wanted = InitFlag.ALLOW_IDMAP
    lab = make_lab(Configuration(features=int(wanted), options={"default_permissions": permissions}))
    (lab.root / "f").touch()
    assert bool(lab.call("agreement")["flags"] & wanted) == permissions
    assert os.listdir(lab.root) == ["f"]
