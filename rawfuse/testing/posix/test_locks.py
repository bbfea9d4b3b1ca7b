"""flock, POSIX record locks and locks of open file descriptions, between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from rawfuse.testing.peer import Peer
from rawfuse.testing.syscalls import fails, ofd_lock, opened, posix_lock_owner, write_file

pytestmark = pytest.mark.fuse_needs("locks")

EX, SH, UN, NB = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN, fcntl.LOCK_NB
RD, WR, FREE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
STILL_WAITING = 0.1
"""Seconds after which a call that has not returned counts as waiting."""


@pytest.fixture
def file(root: Path) -> Path:
    write_file(root / "f", b"x" * 100)
    return root / "f"


@pytest.fixture
def one() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def two() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


def posix_lock(fd: int, kind: int, start: int = 0, length: int = 0, wait: bool = False) -> None:
    command = fcntl.F_SETLKW if wait else fcntl.F_SETLK
    fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))


class TestFlock:
    def test_exclusive(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(fcntl.flock, a, EX)
        for kind in (EX, SH):
            with fails(errno.EAGAIN):
                two.call(fcntl.flock, b, kind | NB)
        one.call(fcntl.flock, a, UN)
        two.call(fcntl.flock, b, EX | NB)

    def test_shared(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDONLY), two.call(os.open, file, os.O_RDONLY)
        one.call(fcntl.flock, a, SH)
        two.call(fcntl.flock, b, SH | NB)
        with fails(errno.EAGAIN):
            two.call(fcntl.flock, b, EX | NB)

    def test_between_descriptors_of_one_process(self, file: Path) -> None:
        with opened(file) as a, opened(file) as b:
            fcntl.flock(a, EX)
            with fails(errno.EAGAIN):
                fcntl.flock(b, EX | NB)
            copy = os.dup(a)
            fcntl.flock(copy, EX | NB)
            os.close(copy)
            with fails(errno.EAGAIN):
                fcntl.flock(b, EX | NB)

    def test_waits(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(fcntl.flock, a, EX)
        two.start(fcntl.flock, b, EX)
        assert not two.finished(STILL_WAITING)
        one.call(fcntl.flock, a, UN)
        two.result()

    def test_close_releases(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(fcntl.flock, a, EX)
        two.start(fcntl.flock, b, EX)
        assert not two.finished(STILL_WAITING)
        one.call(os.close, a)
        two.result()

    def test_death_releases(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(fcntl.flock, a, EX)
        two.start(fcntl.flock, b, EX)
        one.close(kill=True)
        two.result()

    def test_dead_waiter_gets_nothing(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(fcntl.flock, a, EX)
        two.start(fcntl.flock, b, EX)
        assert not two.finished(STILL_WAITING)
        two.close(kill=True)
        one.call(fcntl.flock, a, UN)
        with opened(file) as fd:
            fcntl.flock(fd, EX)

    def test_convert(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(fcntl.flock, a, SH)
        one.call(fcntl.flock, a, EX | NB)
        with fails(errno.EAGAIN):
            two.call(fcntl.flock, b, SH | NB)
        one.call(fcntl.flock, a, SH)
        two.call(fcntl.flock, b, SH | NB)

    def test_apart_from_posix_locks(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(fcntl.flock, a, EX)
        two.call(posix_lock, b, WR)


class TestPosixLocks:
    def test_ranges(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, a, WR, 10, 20)
        two.call(posix_lock, b, WR, 0, 10)
        two.call(posix_lock, b, WR, 30, 0)
        for start, length in ((9, 2), (29, 1), (0, 0), (15, 1)):
            with fails(errno.EAGAIN, errno.EACCES):
                two.call(posix_lock, b, RD, start, length)

    def test_readers_and_writers(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, a, RD)
        two.call(posix_lock, b, RD)
        with fails(errno.EAGAIN, errno.EACCES):
            two.call(posix_lock, b, WR)

    def test_query(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        assert two.call(posix_lock_owner, b, WR) is None
        one.call(posix_lock, a, WR, 10, 20)
        assert two.call(posix_lock_owner, b, WR) == (WR, 10, 20, one.pid)
        assert two.call(posix_lock_owner, b, WR, 0, 10) is None
        assert one.call(posix_lock_owner, a, WR) is None
        one.call(posix_lock, a, RD, 10, 20)
        assert two.call(posix_lock_owner, b, RD) is None
        assert two.call(posix_lock_owner, b, WR) == (RD, 10, 20, one.pid)

    def test_split_and_join(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, a, WR, 0, 100)
        one.call(posix_lock, a, FREE, 40, 20)
        assert two.call(posix_lock_owner, b, WR, 0, 0) == (WR, 0, 40, one.pid)
        assert two.call(posix_lock_owner, b, WR, 50, 0) == (WR, 60, 40, one.pid)
        two.call(posix_lock, b, WR, 40, 20)
        two.call(posix_lock, b, FREE, 40, 20)
        one.call(posix_lock, a, WR, 40, 20)
        assert two.call(posix_lock_owner, b, WR, 50, 0) == (WR, 0, 100, one.pid)
        one.call(posix_lock, a, RD, 0, 10)
        assert two.call(posix_lock_owner, b, RD, 0, 0) == (WR, 10, 90, one.pid)

    def test_any_close_releases(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, a, WR)
        other = one.call(os.open, file, os.O_RDONLY)
        one.call(os.close, other)
        two.call(posix_lock, b, WR)

    def test_waits(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, a, WR, 0, 10)
        two.start(posix_lock, b, WR, 5, 10, wait=True)
        assert not two.finished(STILL_WAITING)
        one.call(posix_lock, a, FREE, 0, 10)
        two.result()

    def test_death_releases(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, a, WR)
        two.start(posix_lock, b, WR, wait=True)
        assert not two.finished(STILL_WAITING)
        one.close(kill=True)
        two.result()

    def test_interrupted_waiter(self, file: Path, one: Peer, two: Peer) -> None:
        """A signal ends the wait with EINTR, and the lock is not taken later on its behalf."""
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, a, WR)
        two.start(_interruptible_lock, b)
        assert not two.finished(STILL_WAITING)
        os.kill(two.pid, signal.SIGUSR1)
        assert two.result() == "interrupted"
        one.call(posix_lock, a, FREE)
        one.call(posix_lock, a, WR)
        two.call(os.close, b)

    def test_wrong_modes(self, file: Path) -> None:
        with opened(file) as fd, fails(errno.EBADF):
            posix_lock(fd, WR)
        with opened(file, os.O_WRONLY) as fd, fails(errno.EBADF):
            posix_lock(fd, RD)

    def test_many_waiters(self, file: Path) -> None:
        """A counter under a lock, raised by several processes."""
        write_file(file, b"0")
        peers = [Peer() for _ in range(4)]
        try:
            for peer in peers:
                peer.start(_count, file, 50)
            for peer in peers:
                peer.result()
        finally:
            for peer in peers:
                peer.close()
        assert int(file.read_text()) == 200


class _Interrupted(Exception):
    pass


def _interruptible_lock(fd: int) -> str:
    def handler(*_: object) -> None:
        raise _Interrupted

    signal.signal(signal.SIGUSR1, handler)
    try:
        posix_lock(fd, WR, wait=True)
    except _Interrupted:
        return "interrupted"
    return "locked"


def _count(path: Path, rounds: int) -> None:
    with opened(path, os.O_RDWR) as fd:
        for _ in range(rounds):
            posix_lock(fd, WR, wait=True)
            value = int(os.pread(fd, 20, 0)) + 1
            os.pwrite(fd, str(value).encode(), 0)
            posix_lock(fd, FREE)


class TestOpenFileDescriptionLocks:
    def test_between_descriptors_of_one_process(self, file: Path) -> None:
        with opened(file, os.O_RDWR) as a, opened(file, os.O_RDWR) as b:
            ofd_lock(a, WR, 0, 10)
            with fails(errno.EAGAIN):
                ofd_lock(b, WR, 5, 10)
            ofd_lock(b, WR, 10, 10)
            ofd_lock(a, FREE, 0, 10)
            ofd_lock(b, WR, 5, 10)

    def test_survive_the_close_of_another(self, file: Path) -> None:
        with opened(file, os.O_RDWR) as a, opened(file, os.O_RDWR) as b:
            ofd_lock(a, WR)
            with opened(file):
                pass
            with fails(errno.EAGAIN):
                ofd_lock(b, WR)

    def test_last_close_releases(self, file: Path) -> None:
        with opened(file, os.O_RDWR) as b:
            with opened(file, os.O_RDWR) as a:
                ofd_lock(a, WR)
            ofd_lock(b, WR)

    def test_conflict_with_posix_locks(self, file: Path, one: Peer) -> None:
        fd = one.call(os.open, file, os.O_RDWR)
        one.call(posix_lock, fd, WR)
        with opened(file, os.O_RDWR) as own:
            with fails(errno.EAGAIN):
                ofd_lock(own, RD)
            one.call(posix_lock, fd, FREE)
            ofd_lock(own, WR)
            with fails(errno.EAGAIN, errno.EACCES):
                one.call(posix_lock, fd, WR)
            found = one.call(posix_lock_owner, fd, WR)
            assert found is not None
            assert found[:3] == (WR, 0, 0)  # the pid is -1 on local disks; a FUSE request does not tell OFD locks apart

    def test_waits(self, file: Path, one: Peer, two: Peer) -> None:
        a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
        one.call(ofd_lock, a, WR)
        two.start(ofd_lock, b, WR, wait=True)
        assert not two.finished(STILL_WAITING)
        one.call(os.close, a)
        two.result()


def test_locks_do_not_stop_other_work(file: Path, root: Path, one: Peer, two: Peer) -> None:
    """While a process waits for a lock the file system answers everybody else."""
    a, b = one.call(os.open, file, os.O_RDWR), two.call(os.open, file, os.O_RDWR)
    one.call(fcntl.flock, a, EX)
    two.start(fcntl.flock, b, EX)
    for number in range(50):
        write_file(root / f"other{number}", b"x")
    assert len(os.listdir(root)) == 51
    assert not two.finished()
    one.call(fcntl.flock, a, UN)
    two.result()
