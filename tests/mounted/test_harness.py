"""The harness itself: a server that stops answering cannot stop the tests."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.harness import DeadlineExceeded, HarnessError, Server, Watchdog, find_mount, memory_command
from tests.mounted.peer import Peer
from tests.mounted.syscalls import fails


@pytest.fixture
def place(namespace: None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="polefs-harness-", dir=os.environ.get("POLEFS_TEST_DIR")) as path:
        yield Path(path)


@pytest.fixture
def server(place: Path, watchdog: Watchdog) -> Iterator[Server]:
    server = Server(memory_command(place / "mnt"), place / "mnt", place / "log")
    server.start()
    watchdog.watch(server)
    yield server
    watchdog.unwatch(server)
    server.abort()
    server.kill()


def test_watchdog_ends_a_blocked_call(server: Server, watchdog: Watchdog) -> None:
    server.signal(signal.SIGSTOP)
    with pytest.raises((OSError, DeadlineExceeded)), watchdog.deadline(0.5):
        os.mkdir(server.mountpoint / "d")
    assert not server.alive


def test_watchdog_interrupts_python(server: Server, watchdog: Watchdog) -> None:
    reader, writer = os.pipe()
    with pytest.raises(DeadlineExceeded), watchdog.deadline(0.5):
        os.read(reader, 1)
    os.close(reader)
    os.close(writer)


def test_watchdog_frees_other_processes(server: Server, watchdog: Watchdog) -> None:
    server.signal(signal.SIGSTOP)
    with Peer() as peer:
        peer.start(os.mkdir, server.mountpoint / "d")
        with pytest.raises(DeadlineExceeded), watchdog.deadline(0.5):
            threading.Event().wait()
        with fails(errno.ENOTCONN, errno.ECONNABORTED):
            peer.result()


def test_busy_unmount_names_its_user(server: Server) -> None:
    fd = os.open(server.mountpoint / "held", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(HarnessError, match="held"):
        server.unmount()
    with fails(errno.ENOTCONN):
        os.close(fd)
    assert find_mount(server.mountpoint) is None


def test_failed_start_shows_the_log(place: Path) -> None:
    server = Server(["sh", "-c", "echo the reason; exit 3"], place / "mnt", place / "log")
    with pytest.raises(HarnessError, match=r"code 3 .*\nthe reason"):
        server.start()


def test_namespace_is_private(server: Server) -> None:
    """The process that started pytest does not see the mount."""
    outside = Path(f"/proc/{os.getppid()}/mountinfo").read_text()
    assert str(server.mountpoint) not in outside
