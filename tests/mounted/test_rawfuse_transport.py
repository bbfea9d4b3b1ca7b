"""Clones of the device and FUSE over io_uring: the life of a mount over each, more waiting requests than entries, and
what happens where one of them is not to be had. (The POSIX suite runs over them too: tests/mounted/targets.py.)"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rawfuse.testing.mounts import FUSECTL, find_mount
from rawfuse.testing.plugin import FuseMount
from rawfuse.testing.server import Server
from rawfuse.testing.syscalls import fails
from rawfuse.uring import DEPTH
from tests.mounted import test_rawfuse_session as session
from tests.mounted.targets import ENABLE_URING, transport_command

TRANSPORTS = ["clones", "uring"]

scratch = session.scratch
open_device = session.open_device

LOCK = """
import fcntl, os, sys
os.sched_setaffinity(0, {int(sys.argv[2])})
file = open(sys.argv[1], "r+")
print("waiting", flush=True)
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
"""

LOAD = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
block = bytes(range(256)) * 2048
print("started", flush=True)
while True:
    os.pwrite(fd, block, 0)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if os.pread(fd, len(block), 0) != block:
        sys.exit("not what was written")
"""


def enable_uring() -> None:
    """FUSE over io_uring must be there: fail with a line that says what to do."""
    try:
        ENABLE_URING.write_text("Y")
    except OSError as error:
        pytest.fail(
            f"{ENABLE_URING}: {error.strerror}: Linux 6.14 with CONFIG_FUSE_IO_URING is needed, and root", pytrace=False
        )


def used(log: str) -> set[str]:
    """The transports that a server's log names."""
    return {line.rpartition(" ")[2] for line in log.splitlines() if "transport: " in line}


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "uring":
        enable_uring()
    return str(request.param)


class Lives:
    """For the tests of ``test_rawfuse_session``: they use the transport, and must have used it."""

    @pytest.fixture(autouse=True)
    def over(self, transport: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        plain = session.example
        monkeypatch.setattr(session, "example", lambda *words: [*plain(*words), "--debug", "--transport", transport])
        yield
        log = (scratch / "server.log").read_text()
        assert used(log) == {transport}, log


class TestEnd(Lives, session.TestEnd):
    # Nothing in them depends on the transport.
    test_umount_command = test_fusermount = test_mounted_again = test_busy_umount_changes_nothing = None
    test_cancelled = None


class TestInterrupt(Lives, session.TestInterrupt):
    pass


@pytest.mark.usefixtures("open_device")
class TestWithoutPrivilege(Lives, session.TestWithoutPrivilege):
    # They may be over before the server is ready.
    test_others_may_not_enter = test_signal = test_umount_by_root = None


def children(number: int, script: str, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    """Processes that run it; each has written its first line."""
    started = [
        subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        for _ in range(number)
    ]
    for child in started:
        assert child.stdout is not None
        assert child.stdout.readline()
    return started


def test_locks_that_wait_do_not_use_the_ring_up(fuse_mount: FuseMount, tmp_path: Path) -> None:
    """All in the queue of one CPU, as the request that ends their wait is."""
    enable_uring()
    cpu = min(os.sched_getaffinity(0))
    trace = tmp_path / "trace"
    server = fuse_mount(transport_command("uring", "--trace", trace, "{mountpoint}"))
    path = server.mountpoint / "f"
    own = os.sched_getaffinity(0)
    with ExitStack() as stack, open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        waiting = []
        for number in range(1, 3 * DEPTH):
            waiting += children(1, LOCK, path, cpu)
            stack.enter_context(waiting[-1])
            stack.callback(waiting[-1].kill)
            session.until_traced(trace, r"> \d+ SETLKW ", number)
        os.sched_setaffinity(0, {cpu})
        try:
            for number in range(3 * DEPTH):
                (server.mountpoint / str(number)).write_bytes(b"meanwhile")
            fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            os.sched_setaffinity(0, own)
        for child in waiting:
            assert child.communicate()[0] == "locked\n"
            assert child.returncode == 0
    assert used(server.log_since(0)) == {"uring"}


class TestLoad:
    """However it ends, it ends at once and cleanly, whatever is in flight."""

    @pytest.fixture
    def server(self, transport: str, fuse_mount: FuseMount) -> Server:
        return fuse_mount(transport_command(transport, "{mountpoint}"))

    @pytest.fixture
    def load(self, server: Server) -> Iterator[list[subprocess.Popen[str]]]:
        running = [child for number in range(4) for child in children(1, LOAD, server.mountpoint / f"f{number}")]
        with ExitStack() as stack:
            for child in running:
                stack.enter_context(child)
                stack.callback(child.kill)
            yield running

    def test_killed_clients(self, server: Server, load: list[subprocess.Popen[str]], transport: str) -> None:
        for child in load:
            child.kill()
            assert child.wait(30) == -signal.SIGKILL
        assert (server.mountpoint / "f0").stat().st_size == 1 << 19
        server.unmount()
        assert used(server.log_since(0)) == {transport}
        assert "Traceback" not in server.log_since(0)

    def test_abort(self, server: Server, load: list[subprocess.Popen[str]]) -> None:
        line = find_mount(server.mountpoint)
        assert line is not None
        (FUSECTL / str(line.minor) / "abort").write_text("1")
        assert [child.wait(30) for child in load] == [1] * len(load)
        assert server.wait() == 0, server.tail()
        assert "Traceback" not in server.log_since(0)

    def test_killed_server(self, server: Server, load: list[subprocess.Popen[str]]) -> None:
        server.kill()
        assert [child.wait(30) for child in load] == [1] * len(load)

    def test_terminated_server(self, server: Server, load: list[subprocess.Popen[str]]) -> None:
        """It cannot unmount, so it ends the connection."""
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.tail()
        assert [child.wait(30) for child in load] == [1] * len(load)
        assert find_mount(server.mountpoint) is None
        assert "Traceback" not in server.log_since(0)


@pytest.mark.parametrize(
    ("transport", "fault", "expected"),
    [
        ("uring", "none", "uring: "),
        ("uring", "setup", "device: io_uring: Operation not permitted"),
        ("uring", "enter", "device: io_uring: Operation not permitted"),
        ("uring", "small", "device: max_write is less than 128 KiB"),
        ("uring", "cpus", "device: REGISTER of queue "),
        ("clones", "none", "clones: "),
        ("clones", "descriptors", "device: cannot open /dev/fuse: Too many open files"),
    ],
)
def test_fallback(fuse_mount: FuseMount, transport: str, fault: str, expected: str) -> None:
    """The mount works and tells what it works over."""
    enable_uring()
    server = fuse_mount([sys.executable, "-m", "tests.mounted.transports", transport, fault, "{mountpoint}"])
    (server.mountpoint / "f").write_bytes(b"data" * 100_000)
    assert (server.mountpoint / "f").read_bytes() == b"data" * 100_000
    os.rename(server.mountpoint / "f", server.mountpoint / "g")
    assert os.listdir(server.mountpoint) == ["g"]
    with fails(errno.ENOENT):
        (server.mountpoint / "f").stat()
    server.unmount()
    log = server.log_since(0)
    assert expected in log
    assert ("is used instead" in log) == expected.startswith("device")
