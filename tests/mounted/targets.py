"""The file systems that the POSIX suite runs on, each as a directory with a way to start and end it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from tests.mounted.harness import Server, Watchdog, fsck, memory_command, polefs_command

TARGETS = ("local", "memory", "polefs")
"""``local`` is a plain directory: what fails there is a wrong test."""


class Target:
    """A directory to test in. The base class is the local one, without a server."""

    name = "local"

    def __init__(self, scratch: Path, watchdog: Watchdog) -> None:
        self.scratch = scratch
        self.watchdog = watchdog
        self.path = scratch / "local"
        self.server: Server | None = None
        self._numbers = itertools.count(1)

    def start(self) -> None:
        self.path.mkdir()

    def revive(self) -> None:
        """Make it usable again after a test that ended its server."""

    def stop(self) -> None:
        """End it and raise when that is not clean."""

    def discard(self) -> None:
        """Remove everything from the disk."""
        shutil.rmtree(self.scratch)

    def new_directory(self, name: str) -> Path:
        """A fresh directory with mode 755 for one test."""
        path = self.path / f"{name[:60]}-{next(self._numbers)}"
        path.mkdir()
        path.chmod(0o755)
        return path


class MountedTarget(Target):
    """A target behind a FUSE server."""

    def __init__(self, scratch: Path, watchdog: Watchdog) -> None:
        super().__init__(scratch, watchdog)
        self.path = scratch / "mnt"

    def make_server(self) -> Server:
        raise NotImplementedError

    def start(self) -> None:
        self.server = self.make_server()
        self.server.start()
        self.watchdog.watch(self.server)

    def revive(self) -> None:
        if self.server is not None and not self.server.alive:
            self.watchdog.unwatch(self.server)
            self.server.kill()
            self.start()

    def stop(self) -> None:
        if self.server is not None:
            self.watchdog.unwatch(self.server)
            with self.watchdog.deadline(120):
                self.server.unmount()


class MemoryTarget(MountedTarget):
    name = "memory"

    def make_server(self) -> Server:
        return Server(memory_command(self.path), self.path, self.scratch / "server.log")


class PolefsTarget(MountedTarget):
    name = "polefs"

    @property
    def volume(self) -> Path:
        return self.scratch / "volume"

    def make_server(self) -> Server:
        return Server(polefs_command(self.volume, self.path), self.path, self.scratch / "server.log")

    def remount(self) -> None:
        """Unmount and mount again: the kernel's caches are empty and everything comes from the volume."""
        self.stop()
        self.start()

    def stop(self) -> None:
        super().stop()
        fsck(self.volume)


def make_target(name: str, scratch: Path, watchdog: Watchdog) -> Target:
    kinds: dict[str, type[Target]] = {"local": Target, "memory": MemoryTarget, "polefs": PolefsTarget}
    return kinds[name](scratch, watchdog)
