"""The testing kit: a server that stops answering cannot stop the tests, tests do not disturb others, and the plugin is
of use to somebody who has nothing of this repository."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import rawfuse.testing.posix
from rawfuse.testing.mounts import find_mount, umount_syscall
from rawfuse.testing.peer import Peer
from rawfuse.testing.plugin import FuseMount
from rawfuse.testing.server import Server, ServerError
from rawfuse.testing.syscalls import fails
from rawfuse.testing.watchdog import DeadlineExceeded, Watchdog
from tests.mounted import limited
from tests.mounted.targets import STRESS, memory_command

SECONDS = 1800 if STRESS else 120


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


def test_unmounted_by_the_test(server: Server) -> None:
    """The fixture then waits for the server's end."""
    umount_syscall(str(server.mountpoint))


OTHER_RUN = """
import sys
from rawfuse.testing.namespace import enter_private_namespace
enter_private_namespace()
print("entered", flush=True)
sys.stdin.read()
"""


@contextmanager
def other_run(cwd: Path) -> Iterator[str]:
    """Another test run, and its mounts."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stdin is not None
        assert run.stdout.readline() == "entered\n"
        yield Path(f"/proc/{run.pid}/mountinfo").read_text()
        run.stdin.close()
        assert run.wait() == 0


def test_other_mounts_can_end(server: Server) -> None:
    """A test run that starts while a file system is mounted outside does not keep that one alive."""
    with other_run(Path("/")) as its_mounts:
        assert str(server.mountpoint) not in its_mounts
        assert find_mount(server.mountpoint) is not None
        server.unmount()


def test_a_mount_that_it_runs_from_stays(server: Server) -> None:
    with other_run(server.mountpoint) as its_mounts:
        assert str(server.mountpoint) in its_mounts


class Outside:
    """A directory of somebody else's, with tests in it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def run(self, *arguments: str | Path, passes: bool) -> str:
        """What pytest says there; no server and no mount may be left of it."""
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
            cwd=self.place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS - 20,
        )
        assert (done.returncode == 0) is passes, done.stdout
        return done.stdout

    def write(self, name: str, text: str) -> Path:
        path = self.place / name
        path.write_text(text)
        return path


@pytest.fixture
def outside(namespace: None, tmp_path: Path) -> Outside:
    return Outside(tmp_path)


LIMITED = "acl,allocation,btime,links,mknod,rename-flags,statfs,symlinks,tmpfile,xattr"
MEMORY = f"{sys.executable} -m examples.memory {{mountpoint}}"


@pytest.mark.deadline(SECONDS)
def test_suite_on_a_limited_file_system(outside: Outside) -> None:
    """What it lacks is left out and named, and the rest passes."""
    suite = Path(rawfuse.testing.posix.__file__).parent
    names = ("namespace", "statfs_times", "unlinked", "xattr", *(["acl", "model", "sparse"] if STRESS else []))
    said = outside.run(
        *(suite / f"test_{name}.py" for name in names),
        "--fuse-server",
        f"{sys.executable} {limited.__file__} --without {LIMITED} {{mountpoint}}",
        f"--fuse-lacks={LIMITED},remount",
        passes=True,
    )
    assert re.search(
        r"^server: tests are left out that need what it lacks: .*links \(\d+\), .*xattr \(\d+\)$", said, re.M
    )
    assert "deselected" in said


def test_suite_by_its_name(outside: Outside) -> None:
    said = outside.run(
        "--pyargs", "rawfuse.testing.posix.test_errors", f"--fuse-server={MEMORY}", "--fuse-check=false", passes=False
    )
    assert " passed, 1 error" in said
    assert "the check after the unmount ended with code 1" in said


def test_suite_without_a_file_system(outside: Outside) -> None:
    suite = Path(rawfuse.testing.posix.__file__).parent
    for name in ("conftest.py", "test_errors.py"):
        outside.write(name, (suite / name).read_text())
    assert "name the file system to test: --fuse-server 'COMMAND {mountpoint}'" in outside.run(passes=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fuse-server", "myfs /mnt"], "the command must have {mountpoint}"),
        (["--fuse-lacks", "acl, lokcs"], "nothing is called lokcs; there are acl,"),
    ],
)
def test_bad_options(outside: Outside, arguments: list[str], says: str) -> None:
    assert says in outside.run(*arguments, passes=False)


AUTHORS_TESTS = """
import os, signal, sys
import pytest

COMMAND = [sys.executable, "-m", "examples.memory", "{mountpoint}"]

def test_good(fuse_mount):
    server = fuse_mount(COMMAND)
    (server.mountpoint / "file").write_text("text")
    assert os.listdir(server.mountpoint) == ["file"]

@pytest.mark.deadline(2)
def test_hangs(fuse_mount):
    server = fuse_mount(COMMAND)
    os.kill(server.pid, signal.SIGSTOP)
    os.mkdir(server.mountpoint / "d")

def test_never_mounts(fuse_mount):
    fuse_mount(["sh", "-c", "echo the reason"])

def test_crashes_unseen(fuse_mount):
    server = fuse_mount(COMMAND)
    os.kill(server.pid, signal.SIGSEGV)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)

@pytest.mark.fuse_needs("xattr")
def test_left_out(fuse_mount):
    assert False
"""


def test_authors_tests(outside: Outside) -> None:
    """A hang ends at the deadline, and each failure says what the server did."""
    outside.write("test_mine.py", AUTHORS_TESTS)
    said = outside.run("--fuse-lacks=xattr", "test_mine.py", passes=False)
    assert "2 failed, 2 passed, 1 deselected, 1 error" in said
    assert re.search("test_hangs .*(DeadlineExceeded|OSError)", said)
    assert "the server ended with code 0 before mounting; it must mount and stay in the foreground:" in said
    assert "the reason" in said
    assert "the server died with code -11" in said
