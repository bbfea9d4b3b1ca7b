"""A volume at a small place, full: what fails is ENOSPC, nothing acknowledged is lost, and removing makes room."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rawfuse.testing.mounts import umount_syscall
from rawfuse.testing.server import Server
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import fsck, polefs_command


class FullVolume:
    """A volume on a tmpfs of 64 MiB, and what has been acknowledged of its files."""

    def __init__(self, scratch: Path) -> None:
        self.place = scratch / "place"
        self.root = scratch / "mnt"
        self.volume = self.place / "volume"
        self.place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", self.place], check=True)
        self.server = Server(polefs_command(self.volume, self.root), self.root, scratch / "server.log")
        self.contents: dict[Path, bytes] = {}

    def write(self, path: Path, size: int) -> None:
        data = os.urandom(size)
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        self.contents[path] = b""
        try:
            while len(self.contents[path]) < size:
                done = os.write(fd, data[len(self.contents[path]) :][: 128 << 10])
                self.contents[path] = data[: len(self.contents[path]) + done]
        finally:
            os.close(fd)

    def fill(self, action: Callable[[int], object], most: int = 100_000) -> int:
        """Repeat the action until it fails, which it must do with ENOSPC; how often it succeeded."""
        for number in range(most):
            try:
                action(number)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return number
        return most

    def check(self) -> None:
        for path, data in self.contents.items():
            assert path.read_bytes() == data, path

    def remove(self, pattern: str) -> None:
        for path in self.root.glob(pattern):
            path.unlink()
            self.contents.pop(path, None)


@pytest.fixture
def full(watchdog: Watchdog) -> Iterator[FullVolume]:
    with tempfile.TemporaryDirectory(prefix="polefs-full-") as scratch:
        volume = FullVolume(Path(scratch))
        try:
            volume.server.start()
            watchdog.watch(volume.server)
            with watchdog.deadline(120):
                yield volume
        finally:
            watchdog.unwatch(volume.server)
            volume.server.abort()
            volume.server.kill()
            umount_syscall(str(volume.place))


@pytest.mark.parametrize("size", [20_000, 700_000, 5_000_000])
def test_full_of_contents(full: FullVolume, size: int) -> None:
    assert full.fill(lambda number: full.write(full.root / f"f{number}", size))
    full.fill(lambda number: full.write(full.root / f"small{number}", 100))
    full.check()
    full.remove("f*")
    assert full.fill(lambda number: full.write(full.root / f"more{number}", size), most=5) == 5
    with open(full.root / "more0", "rb") as file:
        os.fsync(file.fileno())
    full.server.unmount()
    fsck(full.volume)
    full.server.start()
    full.check()
    full.server.unmount()


def test_full_of_inline_contents(full: FullVolume) -> None:
    """All of it stands in the database, whose file does not shrink; removing works all the same."""
    assert full.fill(lambda number: full.write(full.root / f"f{number}", 3000))
    full.check()
    full.remove("f*")
    full.server.unmount()
    fsck(full.volume)
    full.server.start()
    full.check()
    full.server.unmount()


def test_full_of_names(full: FullVolume) -> None:
    assert full.fill(lambda number: full.write(full.root / f"f{number}", 700_000))
    (full.root / "f0").chmod(0o600)
    full.fill(lambda number: os.mkdir(full.root / f"d{number}"))
    full.fill(lambda number: os.setxattr(full.root / "f0", f"user.{number}", bytes(3000)))
    full.fill(lambda number: os.symlink("x" * 1000, full.root / f"s{number}"))
    full.remove("[sf]*")
    assert full.fill(lambda number: full.write(full.root / f"more{number}", 700_000), most=20) == 20
    full.check()
    full.server.unmount()
    fsck(full.volume)


def test_death_when_full(full: FullVolume) -> None:
    """The next mount brings everything back without more room, and goes on."""
    assert full.fill(lambda number: full.write(full.root / f"f{number}", 700_000))
    full.server.kill()
    full.server.start()
    full.check()
    full.remove("f*")
    assert full.fill(lambda number: full.write(full.root / f"more{number}", 700_000), most=20) == 20
    full.server.unmount()
    fsck(full.volume)


def test_overwriting_at_the_limit_of_a_volume(full: FullVolume) -> None:
    """What replaces other bytes needs no room in the volume's own limit."""
    full.server.unmount()
    limited = full.place / "limited"
    subprocess.run([*full.server.command[:3], "format", "--capacity", "8M", limited], check=True)
    full.server.command = polefs_command(limited, full.root)
    full.server.start()
    assert full.fill(lambda number: full.write(full.root / f"f{number}", 1 << 20), most=7) == 7
    first = full.root / "f0"
    for _ in range(3):
        data = os.urandom(1 << 20)
        with open(first, "r+b") as file:
            file.write(data)
        full.contents[first] = data
    full.check()
    full.server.unmount()
    fsck(limited)
