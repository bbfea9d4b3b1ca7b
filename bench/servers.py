"""A server process under test: started for a mount point, its CPU time and memory read from /proc, always ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import mounts

_TICK = 1.0 / os.sysconf("SC_CLK_TCK")
START_SECONDS = 30.0
STOP_SECONDS = 60.0


class ServerError(Exception):
    """A server did not start or did not end; the message names its log."""


@dataclass(frozen=True)
class Usage:
    """CPU time in seconds since the start, peak resident memory in MiB."""

    cpu_seconds: float
    peak_mib: float


def usage(pid: int) -> Usage:
    """Of a process and all its descendants; processes that have ended count through the parent that waited for them."""
    parents: dict[int, int] = {}
    times: dict[int, float] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry)] = int(fields[1])
        times[int(entry)] = sum(int(field) for field in fields[11:15]) * _TICK
    family = _family(pid, parents)
    return Usage(sum(times[member] for member in family), sum(_peak_mib(member) for member in family))


def _family(pid: int, parents: Mapping[int, int]) -> set[int]:
    family = {pid} if pid in parents else set()
    grown = True
    while grown:
        children = {child for child, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return family


def _peak_mib(pid: int) -> float:
    try:
        for line in Path("/proc", str(pid), "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0.0


class Server:
    """One run of a server in the foreground, from mount to unmount."""

    def __init__(self, command: Sequence[str], mountpoint: str, log: Path, env: Mapping[str, str]) -> None:
        """Start it and wait for its mount. ServerError when it ends or the mount does not appear in 30 s."""
        self.mountpoint = mountpoint
        self.log = log
        self.last = Usage(0.0, 0.0)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=_end_with_us,
            )
        deadline = time.monotonic() + START_SECONDS
        if not mounts.wait_for_mount(mountpoint, deadline, self.alive):
            self.kill()
            raise ServerError(f"{command[0]} did not mount: {_tail(log)}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def serving(self) -> bool:
        return self.alive() and mounts.is_mounted(self.mountpoint)

    def bind(self, cpus: set[int]) -> None:
        """Let all its threads run on these CPUs only."""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(thread), cpus)

    def usage(self) -> Usage:
        """As of now, or when it last answered."""
        if self.alive():
            now = usage(self.pid)
            self.last = Usage(max(now.cpu_seconds, self.last.cpu_seconds), max(now.peak_mib, self.last.peak_mib))
        return self.last

    def stop(self) -> float:
        """Unmount it and wait for its end; the seconds that took. ServerError when it is not gone after 60 s or says
        that it failed."""
        start = time.monotonic()
        self.usage()
        mounts.unmount(self.mountpoint)
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerError(f"not gone {STOP_SECONDS:.0f} s after umount: {_tail(self.log)}") from None
        if status != 0:
            raise ServerError(f"ended with status {status}: {_tail(self.log)}")
        return time.monotonic() - start

    def kill(self) -> None:
        """Abort the connection and end the whole process group."""
        mounts.abort(self.mountpoint)
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def _end_with_us() -> None:
    mounts.die_with_parent(signal.SIGTERM)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'no message'} ({log})"
