"""The test harness itself: a server that stops answering cannot stop the tests, and the tests do not disturb others."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rawfuse.testing.mounts import find_mount
from rawfuse.testing.peer import Peer
from rawfuse.testing.plugin import FuseMount
from rawfuse.testing.server import Server, ServerError
from rawfuse.testing.syscalls import fails
from rawfuse.testing.watchdog import DeadlineExceeded, Watchdog
from tests.mounted.targets import memory_command


@pytest.fixture
def server(fuse_mount: FuseMount) -> Server:
    return fuse_mount(memory_command("{mountpoint}"))


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
    with pytest.raises(ServerError, match="held"):
        server.unmount()
    with fails(errno.ENOTCONN):
        os.close(fd)
    assert find_mount(server.mountpoint) is None


def test_failed_start_shows_the_log(fuse_mount: FuseMount) -> None:
    with pytest.raises(ServerError, match=r"code 3 .*\nthe reason"):
        fuse_mount(["sh", "-c", "echo the reason; exit 3"])


def test_namespace_is_private(server: Server) -> None:
    """The process that started pytest does not see the mount."""
    outside = Path(f"/proc/{os.getppid()}/mountinfo").read_text()
    assert str(server.mountpoint) not in outside


OTHER_RUN = """
import sys
from rawfuse.testing.namespace import enter_private_namespace
enter_private_namespace()
print("entered", flush=True)
sys.stdin.read()
"""


def test_other_mounts_can_end(server: Server) -> None:
    """A test run that starts while a file system is mounted outside does not keep that one alive."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stdin is not None
        assert run.stdout.readline() == "entered\n"
        assert str(server.mountpoint) not in Path(f"/proc/{run.pid}/mountinfo").read_text()
        assert find_mount(server.mountpoint) is not None
        server.unmount()
        run.stdin.close()
        assert run.wait() == 0
