"""The death of the daemon at any moment loses nothing that was acknowledged; a clean end loses nothing at all."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from rawfuse.testing.mounts import umount_syscall
from rawfuse.testing.peer import Peer
from rawfuse.testing.syscalls import fails, link_fd, opened, read_file, write_file
from tests.mounted.crashload import (
    Outcome,
    State,
    apply,
    assert_survived,
    choose,
    differences,
    empty_state,
    execute,
    read_state,
    run_load,
)
from tests.mounted.targets import STRESS, PolefsTarget, fsck

ROUNDS = 100 if STRESS else 6
WORKERS = 3


class Crashes:
    """Loads in several directories of a volume, whose server is ended under them again and again."""

    def __init__(self, volume: PolefsTarget, root: Path, seed: int) -> None:
        self.volume = volume
        self.rng = random.Random(seed)
        self.places = [root / f"worker{number}" for number in range(WORKERS)]
        self.states: list[State] = [empty_state() for _ in self.places]
        for place in self.places:
            place.mkdir()

    def round(self, seconds: float, end: str) -> int:
        """Load for some seconds, end the server (``kill``, ``term`` or ``term+kill``), mount, compare; returns the
        number of acknowledged operations."""
        server = self.volume.server
        assert server is not None
        peers = [Peer() for _ in self.places]
        try:
            for peer, place, state in zip(peers, self.places, self.states, strict=True):
                peer.start(run_load, str(place), state, self.rng.randrange(1 << 30))
            time.sleep(seconds)
            busy = [not peer.finished() for peer in peers]
            if end.startswith("term"):
                server.signal(signal.SIGTERM)
            if end == "term":
                assert server.wait() == 0, server.tail()
            elif end == "term+kill":
                time.sleep(self.rng.random() * 0.3)
            server.kill()
            outcomes: list[Outcome] = [peer.result() for peer in peers]
        finally:
            for peer in peers:
                peer.close(kill=True)
        assert all(busy), f"a load ended before the server did: {outcomes}"
        if self.rng.random() < 0.3:
            self.start_and_kill()
        server.start()
        self.states = [
            assert_survived(str(place), outcome) for place, outcome in zip(self.places, outcomes, strict=True)
        ]
        for state in self.states:
            forget_times(state)
        return sum(outcome.count for outcome in outcomes)

    def start_and_kill(self) -> None:
        """Kill a server while it starts and recovers."""
        server = self.volume.server
        assert server is not None
        server.launch()
        time.sleep(self.rng.random() * 0.8)
        server.kill()


def forget_times(state: State) -> None:
    """Times that the clock gave are no part of a model."""
    for files in state.values():
        for file in files.values():
            file.mtime = None


@pytest.mark.deadline(3600 if STRESS else 240)
def test_kill_under_load(volume: PolefsTarget, volume_root: Path) -> None:
    """Rounds of random length: some shorter, some longer than the time after which data is written back."""
    crashes = Crashes(volume, volume_root, seed=1)
    total = 0
    for number in range(ROUNDS):
        seconds = 7.0 if number % 6 == 5 else crashes.rng.random() * 1.5
        total += crashes.round(seconds, "term+kill" if number % 3 == 2 else "kill")
        if STRESS or number % 3 == 2:
            volume.stop()
            volume.start()
            for place, state in zip(crashes.places, crashes.states, strict=True):
                assert differences(state, read_state(str(place))) == []
        else:
            check_offline(volume)
    assert total > ROUNDS * 20


def check_offline(volume: PolefsTarget) -> None:
    """fsck right after a crash, before any recovery by a mount."""
    assert volume.server is not None
    volume.server.kill()
    fsck(volume.volume)
    volume.server.start()


@pytest.mark.deadline(120)
def test_terminate_under_load(volume: PolefsTarget, volume_root: Path) -> None:
    """SIGTERM ends the server with code 0, and everything acknowledged is there."""
    crashes = Crashes(volume, volume_root, seed=2)
    for _ in range(2):
        crashes.round(1.0, "term")
        check_offline(volume)


@pytest.mark.deadline(120)
def test_unmount_right_after_writing(volume: PolefsTarget, volume_root: Path) -> None:
    """umount(2) from outside ends the server with code 0; nothing had been synced."""
    rng = random.Random(3)
    state = empty_state()
    for _ in range(500):
        operation = choose(rng, state)
        if operation is not None and operation[0] not in ("fsync", "syncdir"):
            execute(str(volume_root), *operation)
            apply(state, *operation)
    write_file(volume_root / "large", rng.randbytes(30_000_000))
    digest = hash(read_file(volume_root / "large"))
    server = volume.server
    assert server is not None
    umount_syscall(str(server.mountpoint))
    assert server.wait() == 0, server.tail()
    fsck(volume.volume)
    server.start()
    assert hash(read_file(volume_root / "large")) == digest
    os.unlink(volume_root / "large")
    assert differences(state, read_state(str(volume_root))) == []


@pytest.mark.deadline(120)
def test_kill_with_open_unlinked_files(volume: PolefsTarget, volume_root: Path) -> None:
    """What was open and unlinked goes with the crash, and its space comes back; unnamed files that were linked stay."""
    server = volume.server
    assert server is not None
    with Peer() as peer:
        for number in range(20):
            fd = peer.call(os.open, volume_root / f"f{number}", os.O_RDWR | os.O_CREAT)
            peer.call(os.write, fd, b"x" * 100_000)
            if number % 2:
                peer.call(os.fsync, fd)
            peer.call(os.unlink, volume_root / f"f{number}")
        with opened(volume_root, os.O_TMPFILE | os.O_RDWR, 0o600) as fd:
            os.write(fd, b"never named")
        with opened(volume_root, os.O_TMPFILE | os.O_RDWR, 0o600) as fd:
            os.write(fd, b"named")
            link_fd(fd, volume_root / "named")
        server.kill()
    server.start()
    assert os.listdir(volume_root) == ["named"]
    assert read_file(volume_root / "named") == b"named"
    volume.stop()
    volume.start()
    assert os.listdir(volume_root) == ["named"]


@pytest.mark.deadline(120)
def test_kill_while_idle(volume: PolefsTarget, volume_root: Path) -> None:
    """Small and large files, none synced."""
    server = volume.server
    assert server is not None
    rng = random.Random(4)
    contents = {f"f{number}": rng.randbytes(rng.choice([0, 10, 5000, 70_000, 3_000_000])) for number in range(40)}
    for name, data in contents.items():
        write_file(volume_root / name, data, 0o640)
        os.utime(volume_root / name, ns=(5, 10**18 + len(data)))
    server.kill()
    server.start()
    for name, data in contents.items():
        assert read_file(volume_root / name) == data, name
        assert (volume_root / name).stat().st_mtime_ns == 10**18 + len(data), name
    assert sorted(os.listdir(volume_root)) == sorted(contents)


@pytest.mark.deadline(120)
def test_calls_in_the_air_end(volume: PolefsTarget, volume_root: Path) -> None:
    """A process in a blocking call gets an error when the server dies; it does not hang."""
    server = volume.server
    assert server is not None
    write_file(volume_root / "f")
    with Peer() as peer:
        fd = peer.call(os.open, volume_root / "f", os.O_RDWR)
        server.signal(signal.SIGSTOP)
        peer.start(os.fsync, fd)
        assert not peer.finished(0.2)
        server.kill()
        with fails(errno.ENOTCONN, errno.ECONNABORTED):
            peer.result()
        with fails(errno.ENOTCONN):
            peer.call(os.fsync, fd)
    server.start()
    assert read_file(volume_root / "f") == b""
