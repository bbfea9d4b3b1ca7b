"""The file systems that the POSIX suite runs on: what each is, and one of them while it is mounted."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rawfuse.testing.server import Server, ServerError
from rawfuse.testing.watchdog import Watchdog

STOP_DEADLINE = 120.0
"""Seconds for unmounting, saving everything, and the check after it."""

LACKS = {
    "acl": "POSIX access control lists",
    "allocation": "fallocate(2), holes, SEEK_DATA and SEEK_HOLE, and st_blocks that follows what is stored",
    "atime": "access times that follow reads",
    "btime": "birth times",
    "devices": "device nodes that open as the device (a mount without nodev)",
    "far-times": "times from 1678 to 2261",
    "large-file": "files of 16 TiB",
    "large-xattr": "attribute values of 64 KiB, and 64 KiB of names for one file",
    "links": "hard links",
    "locks": "locks that hold: flock(2), fcntl(2)",
    "mknod": "device nodes, fifos and sockets",
    "mmap": "shared writable mappings",
    "nlink": "directories that count their subdirectories in st_nlink",
    "other-users": "access for users other than the one who mounted, and permission checks",
    "remount": "contents that are still there after an unmount and a mount",
    "rename-flags": "RENAME_NOREPLACE, RENAME_EXCHANGE and RENAME_WHITEOUT",
    "setid": "set-user-ID and set-group-ID programs (a mount without nosuid), and clearing these bits",
    "statfs": "statvfs(3) figures that follow what is stored, and only that",
    "symlinks": "symbolic links",
    "tmpfile": "O_TMPFILE",
    "unlinked": "use of open files and directories after their last name is gone",
    "xattr": "extended attributes",
}
"""What a file system may declare not to have, and what that means; the tests that need it are then left out."""


@dataclass(frozen=True)
class TargetSpec:
    """A file system as the suite knows it: how to mount it.

    ``command`` serves it in the foreground, ``check`` is run after every unmount and must end with code 0. In both
    ``{mountpoint}`` is where to mount, ``{scratch}`` a directory of its own that stays over a remount, and ``{log}``
    what the servers have written. Without a command it is a plain directory. ``lacks``: names of ``LACKS``.
    """

    name: str
    command: Sequence[str] = ()
    check: Sequence[str] = ()
    lacks: frozenset[str] = frozenset()


class Target:
    """One file system, mounted for tests, with all that belongs to it in the new directory ``place``. ``path`` is the
    file system's root."""

    def __init__(self, spec: TargetSpec, place: Path, watchdog: Watchdog) -> None:
        self.spec = spec
        self.place = place
        self.scratch = place / "scratch"
        self.scratch.mkdir()
        self.watchdog = watchdog
        self.path = place / "mnt"
        self.log = place / "server.log"
        self.server: Server | None = None
        self._numbers = itertools.count(1)

    @property
    def name(self) -> str:
        return self.spec.name

    def start(self) -> None:
        self.path.mkdir(exist_ok=True)
        if self.spec.command:
            self.server = Server(self._filled(self.spec.command), self.path, self.log)
            self.server.start()
            self.watchdog.watch(self.server)

    def revive(self) -> None:
        """Make it usable again after a test that ended its server."""
        if self.server is not None and not self.server.alive:
            self.watchdog.unwatch(self.server)
            self.server.kill()
            self.start()

    def stop(self) -> None:
        """Unmount it and run its check; ServerError when either is not clean."""
        if self.server is not None:
            self.watchdog.unwatch(self.server)
            with self.watchdog.deadline(STOP_DEADLINE):
                self.server.unmount()
        self._check()

    def remount(self) -> None:
        """Unmount and mount again: the kernel's caches are empty, and everything comes from where it is kept."""
        self.stop()
        self.start()

    def discard(self) -> None:
        """End it in any state and remove everything from the disk."""
        if self.server is not None:
            self.watchdog.unwatch(self.server)
            self.server.abort()
            self.server.kill()
        shutil.rmtree(self.place)

    def new_directory(self, name: str) -> Path:
        """A fresh directory with mode 755 for one test."""
        path = self.path / f"{name[:60]}-{next(self._numbers)}"
        path.mkdir()
        path.chmod(0o755)
        return path

    def _filled(self, words: Sequence[str]) -> list[str]:
        places = {"{mountpoint}": self.path, "{scratch}": self.scratch, "{log}": self.log}
        filled = []
        for word in words:
            for name, path in places.items():
                word = word.replace(name, str(path))
            filled.append(word)
        return filled

    def _check(self) -> None:
        if not self.spec.check:
            return
        done = subprocess.run(
            self._filled(self.spec.check),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=STOP_DEADLINE,
        )
        if done.returncode != 0:
            output = done.stdout.decode(errors="replace")
            raise ServerError(f"the check after the unmount ended with code {done.returncode}:\n{output}")
