"""One file system served by one child process, with every way to end it."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from rawfuse.testing.mounts import FUSECTL, MNT_DETACH, MOUNTINFO, find_mount, umount_syscall

SERVER_DEADLINE = 60.0
"""Seconds that a server may take to mount, and to end after an unmount."""


class ServerError(Exception):
    """The file system under test did not start, stop or behave as a process should."""


class Server:
    """One file system served by one child process.

    ``command`` stays in the foreground and ends with code 0 after its mount has been taken away. It dies with this
    process. What it writes to its standard output and error goes to ``log``.
    """

    def __init__(self, command: Sequence[str], mountpoint: Path, log: Path) -> None:
        self.command = list(command)
        self.mountpoint = mountpoint
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: int | None = None
        self.aborted = False
        self._end_is_known = False

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process.pid

    def start(self) -> None:
        """Start the server and return when it is mounted; ServerError with its log when that fails."""
        self.launch()
        self._wait_mounted()

    def launch(self) -> None:
        """Start the server process without waiting for the mount."""
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self.aborted = False
        self._end_is_known = False
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.command],
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
                        raise ServerError(
                            f"the server ended with code {self.wait()} before mounting; it must mount and stay in the "
                            f"foreground:\n{self.tail()}"
                        )
                    if not ready:
                        self.kill()
                        raise ServerError(f"the server did not mount in {SERVER_DEADLINE:.0f} s:\n{self.tail()}")
        finally:
            os.close(pidfd)

    @property
    def alive(self) -> bool:
        """Mounted and served."""
        return self._process is not None and self._process.poll() is None and not self.aborted

    def require_alive(self) -> None:
        """ServerError when the server has ended by itself: nobody here has ended it or waited for its end."""
        if self._process is not None and self._process.poll() is not None and not self._end_is_known:
            raise ServerError(f"the server died with code {self._process.returncode}:\n{self.tail()}")

    def finish(self) -> None:
        """At the end of a test: unmount, unless the test has ended the server in some way. ServerError when the server
        has ended by itself, or does not end well."""
        if self.alive:
            self.unmount()
        elif self._process is not None and self._process.returncode != 0:
            self.require_alive()

    def wait(self, timeout: float = SERVER_DEADLINE) -> int:
        """The exit code of the server process (negative: the signal that ended it)."""
        self._end_is_known = True
        if self._process is None:
            raise ServerError("the server was not started")
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.abort()
            self.kill()
            raise ServerError(f"the server did not end in {timeout:.0f} s:\n{self.tail()}") from None

    def abort(self) -> None:
        """Cut the connection between kernel and server: every request fails at once. Safe from any thread."""
        self.aborted = self._end_is_known = True
        line = find_mount(self.mountpoint)
        if (line is None or line.minor != self._connection) and not self._serves_on():
            return  # the connection has ended, and its number may be another mount's by now
        try:
            (FUSECTL / str(self._connection) / "abort").write_text("1")
        except FileNotFoundError:
            pass  # the connection has ended already

    def _serves_on(self) -> bool:
        """Whether the server still has a device of the connection although the mount has been detached (Linux 6.18;
        a thread that waits in the kernel for its own requests keeps it even when the server was killed)."""
        told = f"fuse_connection:\t{self._connection}\n"
        for path in Path(f"/proc/{self.pid}/task").glob("*/fdinfo/*"):
            try:
                if told in path.read_text():
                    return True
            except OSError:
                continue  # closed meanwhile
        return False

    def detach(self) -> None:
        """Take the mount out of the tree, busy or not."""
        while find_mount(self.mountpoint) is not None:
            umount_syscall(str(self.mountpoint), MNT_DETACH)

    def kill(self) -> None:
        """SIGKILL, wait, and detach the dead mount."""
        self._end_is_known = True
        if self._process is not None:
            if self._process.poll() is None:
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait(SERVER_DEADLINE)
        self.detach()
        self._connection = None

    def signal(self, number: int) -> None:
        self._end_is_known = True
        os.kill(self.pid, number)

    def unmount(self, timeout: float = SERVER_DEADLINE) -> None:
        """umount(2) from outside, if that has not been done yet, then require that the server saves everything and ends
        with code 0 in so many seconds."""
        if self.aborted:
            self.kill()
            return
        try:
            if find_mount(self.mountpoint) is not None:
                umount_syscall(str(self.mountpoint))
        except OSError as error:
            users = self.users() if error.errno == errno.EBUSY else ""
            self.abort()
            self.kill()
            raise ServerError(f"unmount failed: {error.strerror}{users}\n{self.tail()}") from error
        code = self.wait(timeout)
        if code != 0:
            raise ServerError(f"the server ended with code {code} after an unmount:\n{self.tail()}")
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
