"""Handlers that misbehave, and more of them than may wait: the mount stays usable and can always be ended."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rawfuse.testing.mounts import FUSECTL, find_mount
from rawfuse.testing.server import Server
from rawfuse.testing.syscalls import fails
from rawfuse.testing.watchdog import Watchdog

LIMIT = 3
ENDED = (errno.ECONNABORTED, errno.ENOTCONN)
LOOK_UP = """
import os, sys
print("looking", flush=True)
try:
    os.stat(sys.argv[1])
except OSError as error:
    print("error", error.errno, flush=True)
"""


@pytest.fixture
def server(watchdog: Watchdog) -> Iterator[Server]:
    scratch = Path(tempfile.mkdtemp(prefix="rawfuse-"))
    mountpoint = scratch / "mnt"
    command = [sys.executable, "-m", "tests.mounted.misbehaving", str(LIMIT), str(mountpoint)]
    server = Server(command, mountpoint, scratch / "server.log")
    with watchdog.deadline(60):
        server.start()
        watchdog.watch(server)
        try:
            yield server
        finally:
            watchdog.unwatch(server)
            server.abort()
            server.kill()
    shutil.rmtree(scratch)


@contextmanager
def callers(server: Server, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that wait for what never comes."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LOOK_UP, str(server.mountpoint / f"never{index}")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(number)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "looking\n"
        while waiting(server) < number:
            time.sleep(0.002)
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def waiting(server: Server) -> int:
    """Requests that have no reply yet."""
    line = find_mount(server.mountpoint)
    assert line is not None
    return int((FUSECTL / str(line.minor) / "waiting").read_text())


@pytest.mark.parametrize("name", ["raises", "wrong", "much", "cancelled", "gaps"])
def test_mount_stays_usable(server: Server, name: str) -> None:
    for _ in range(2 * LIMIT):
        with fails(errno.EIO):
            (server.mountpoint / name).read_bytes()
        assert (server.mountpoint / "good").read_bytes() == bytes(4096)
    server.unmount()


def test_what_never_returns_ends_with_its_caller(server: Server) -> None:
    """A fatal signal is an INTERRUPT, which cancels the handler."""
    for _ in range(3):
        with callers(server, LIMIT - 1) as children:
            assert (server.mountpoint / "good").read_bytes() == bytes(4096)
            for child in children:
                child.kill()
                assert child.wait(30) == -9
    server.unmount()


def test_abort_when_no_more_requests_are_read(server: Server) -> None:
    """The connection's end is noticed although the reader pauses and no handler would ever finish."""
    with callers(server, LIMIT + 2) as children:
        server.abort()
        assert server.wait() == 0, server.tail()
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline().split() in [["error", str(code)] for code in ENDED]
