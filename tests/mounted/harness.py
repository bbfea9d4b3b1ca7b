"""Real mounts for the tests: a private mount namespace, servers in processes of their own, and a watchdog.

The pytest process enters a mount namespace of its own, so that nothing it mounts is seen outside and everything goes
away with it. Each file system under test is a child process in that namespace which dies with pytest. Nothing here
opens ``/dev/fuse``, so forking test processes is safe.

No test can hang: at its deadline the watchdog aborts the FUSE connection (every blocked system call then returns
ECONNABORTED or ENOTCONN), detaches the mount, and interrupts the test with ``DeadlineExceeded``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

REPOSITORY = Path(__file__).resolve().parents[2]
FUSECTL = Path("/sys/fs/fuse/connections")
MOUNTINFO = "/proc/thread-self/mountinfo"

TEST_DEADLINE = float(os.environ.get("POLEFS_TEST_DEADLINE", "60"))
"""Seconds that one test may take before its mount is aborted; ``@pytest.mark.deadline(seconds)`` changes it."""

SERVER_DEADLINE = 60.0
"""Seconds that a server may take to mount, and to end after an unmount."""

STRESS = os.environ.get("POLEFS_STRESS", "0") != "0"
"""Long runs: more rounds, a million directory entries."""

TOOLS = {
    "attr": "attr",
    "gcc": "gcc",
    "getfacl": "acl",
    "git": "git",
    "make": "make",
    "rsync": "rsync",
    "setfacl": "acl",
    "setpriv": "util-linux",
    "tar": "tar",
}
"""Commands that the tests run, and the Debian package of each."""

MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_NEWNS = 0x20000

_libc = ctypes.CDLL(None, use_errno=True)


class HarnessError(Exception):
    """The file system under test did not start, stop or behave as a process should."""


class DeadlineExceeded(BaseException):
    """A test reached its deadline; its mount has been aborted. No ``except Exception`` may take it."""


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount_syscall(source: str, target: str, kind: str | None, flags: int) -> None:
    """mount(2) without data; OSError with its errno."""
    kind_bytes = kind.encode() if kind is not None else None
    _check(_libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), None), f"mount {target}")


def umount_syscall(target: str, flags: int = 0) -> None:
    """umount2(2), which asks the file system nothing; OSError with its errno (EBUSY, EINVAL when not mounted)."""
    _check(_libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW), f"umount {target}")


def missing_requirement() -> str | None:
    """One line that says what is missing on this machine and how to get it; None when nothing is."""
    if os.geteuid() != 0:
        return "mounted tests mount file systems and change user ids: run them as root"
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing: load the kernel module (modprobe fuse) or give the container --device /dev/fuse"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened ({error.strerror}): give the container --device /dev/fuse and SYS_ADMIN"
    packages = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if packages:
        return f"mounted tests need more programs: apt-get install {' '.join(packages)}"
    return None


def enter_private_namespace() -> None:
    """Give this process (its main thread, and what that starts later) a mount namespace that shares nothing."""
    if threading.current_thread() is not threading.main_thread():
        raise HarnessError("only the main thread may change the namespace")
    _check(_libc.unshare(CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    mount_syscall("none", "/", None, MS_REC | MS_PRIVATE)
    if not any(line.mountpoint == str(FUSECTL) for line in mounts()):
        mount_syscall("fusectl", str(FUSECTL), "fusectl", 0)


@dataclass(frozen=True)
class MountLine:
    """One line of mountinfo: the device's minor number names the FUSE connection."""

    minor: int
    mountpoint: str
    options: str
    kind: str
    source: str
    super_options: str


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def mounts() -> list[MountLine]:
    """The mounts of this thread's namespace; touches none of them."""
    found = []
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, right = line.rstrip("\n").split(" - ", 1)
            fields, tail = left.split(" "), right.split(" ")
            minor = int(fields[2].split(":")[1])
            found.append(MountLine(minor, _unescape(fields[4]), fields[5], tail[0], _unescape(tail[1]), tail[2]))
    return found


def find_mount(mountpoint: Path) -> MountLine | None:
    """The topmost mount at exactly this path, or None."""
    return next((line for line in reversed(mounts()) if line.mountpoint == str(mountpoint)), None)


class Server:
    """One file system served by one child process.

    ``command`` stays in the foreground and ends with code 0 after its mount has been taken away.
    """

    def __init__(self, command: list[str], mountpoint: Path, log: Path) -> None:
        self.command = command
        self.mountpoint = mountpoint
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: int | None = None
        self.aborted = False

    @property
    def pid(self) -> int:
        if self._process is None:
            raise HarnessError("the server was not started")
        return self._process.pid

    def start(self) -> None:
        """Start the server and return when it is mounted; HarnessError with its log when that fails."""
        self.launch()
        self._wait_mounted()

    def launch(self) -> None:
        """Start the server process without waiting for the mount."""
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self.aborted = False
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.command],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _wait_mounted(self) -> None:
        ends = time.monotonic() + SERVER_DEADLINE
        pidfd = os.pidfd_open(self.pid)
        try:
            with open(MOUNTINFO) as table:
                poller = select.poll()
                poller.register(table, select.POLLERR | select.POLLPRI)
                poller.register(pidfd, select.POLLIN)
                while True:
                    line = find_mount(self.mountpoint)
                    if line is not None:
                        self._connection = line.minor
                        return
                    left = ends - time.monotonic()
                    ready = poller.poll(max(left, 0) * 1000)
                    if any(fd == pidfd for fd, _ in ready):
                        raise HarnessError(f"the server ended with code {self.wait()} before mounting:\n{self.tail()}")
                    if not ready:
                        self.kill()
                        raise HarnessError(f"the server did not mount in {SERVER_DEADLINE:.0f} s:\n{self.tail()}")
        finally:
            os.close(pidfd)

    @property
    def alive(self) -> bool:
        """Mounted and served."""
        return self._process is not None and self._process.poll() is None and not self.aborted

    def wait(self, timeout: float = SERVER_DEADLINE) -> int:
        """The exit code of the server process (negative: the signal that ended it)."""
        if self._process is None:
            raise HarnessError("the server was not started")
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.abort()
            self.kill()
            raise HarnessError(f"the server did not end in {timeout:.0f} s:\n{self.tail()}") from None

    def abort(self) -> None:
        """Cut the connection between kernel and server: every request fails at once. Safe from any thread."""
        self.aborted = True
        line = find_mount(self.mountpoint)
        if line is None or line.minor != self._connection:
            return  # the connection has ended, and its number may be another mount's by now
        try:
            (FUSECTL / str(self._connection) / "abort").write_text("1")
        except FileNotFoundError:
            pass  # the connection has ended already

    def detach(self) -> None:
        """Take the mount out of the tree, busy or not."""
        while find_mount(self.mountpoint) is not None:
            umount_syscall(str(self.mountpoint), MNT_DETACH)

    def kill(self) -> None:
        """SIGKILL, wait, and detach the dead mount."""
        if self._process is not None:
            if self._process.poll() is None:
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait(SERVER_DEADLINE)
        self.detach()
        self._connection = None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def unmount(self) -> None:
        """umount(2) from outside, then require that the server saves everything and ends with code 0."""
        if self.aborted:
            self.kill()
            return
        try:
            umount_syscall(str(self.mountpoint))
        except OSError as error:
            users = self.users() if error.errno == errno.EBUSY else ""
            self.abort()
            self.kill()
            raise HarnessError(f"unmount failed: {error.strerror}{users}\n{self.tail()}") from error
        code = self.wait()
        if code != 0:
            raise HarnessError(f"the server ended with code {code} after an unmount:\n{self.tail()}")
        self._connection = None

    def users(self) -> str:
        """The processes with a descriptor or working directory on the mount, found without asking the mount."""
        found: list[str] = []
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            self._note_user(link, found)
        for link in Path("/proc").glob("[0-9]*/cwd"):
            self._note_user(link, found)
        return "; used by " + ", ".join(found) if found else ""

    def _note_user(self, link: Path, found: list[str]) -> None:
        try:
            target = os.readlink(link)
        except OSError:
            return  # that process has ended
        if target.startswith(str(self.mountpoint)):
            found.append(f"{link} -> {target}")

    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def log_since(self, offset: int) -> str:
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_since(0).splitlines()[-lines:])


class Watchdog:
    """One thread that waits for the earliest deadline and ends what has passed it."""

    INTERRUPT = signal.SIGUSR2

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: float | None = None
        self._servers: list[Server] = []
        self._closing = False
        self._seconds = 0.0
        self._previous = signal.signal(self.INTERRUPT, self._interrupt)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        signal.signal(self.INTERRUPT, self._previous)

    def watch(self, server: Server) -> None:
        """Abort this server's mount when a deadline passes."""
        with self._changed:
            self._servers.append(server)

    def unwatch(self, server: Server) -> None:
        with self._changed:
            self._servers.remove(server)

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Run the body for at most ``seconds``; then it gets ``DeadlineExceeded``. An inner one stands in
        for the outer one while it runs."""
        with self._changed:
            outer = (self._ends, self._seconds)
            self._seconds = seconds
            self._ends = time.monotonic() + seconds
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._ends, self._seconds = outer
                self._changed.notify()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"the test did not end in {self._seconds:.0f} s; its mount was aborted")

    def _run(self) -> None:
        with self._changed:
            while not self._closing:
                if self._ends is None:
                    self._changed.wait()
                elif (left := self._ends - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._expire()

    def _expire(self) -> None:
        for server in self._servers:
            server.abort()
        signal.pthread_kill(threading.main_thread().ident or 0, self.INTERRUPT)
        self._ends = None


def memory_command(mountpoint: Path) -> list[str]:
    return [sys.executable, "-m", "examples.memory", str(mountpoint)]


def polefs_command(volume: Path, mountpoint: Path, options: str = "") -> list[str]:
    extra = ["-o", options] if options else []
    return [sys.executable, "-m", "polefs", "mount", "-f", *extra, str(volume), str(mountpoint)]


def fsck(volume: Path, *arguments: str) -> None:
    """Require that ``polefs fsck`` finds nothing, contents included."""
    done = subprocess.run(
        [sys.executable, "-m", "polefs", "fsck", "--data", *arguments, str(volume)],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    if done.returncode != 0:
        raise HarnessError(f"fsck ended with code {done.returncode}:\n{done.stdout.decode(errors='replace')}")
