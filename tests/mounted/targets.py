"""The file systems of this repository that ``rawfuse.testing.posix`` runs on, and the commands that serve them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rawfuse.testing.server import ServerError
from rawfuse.testing.target import Target, TargetSpec

REPOSITORY = Path(__file__).resolve().parents[2]

STRESS = os.environ.get("POLEFS_STRESS", "0") != "0"
"""Long runs: more rounds, bigger trees."""


def memory_command(mountpoint: Path | str) -> list[str]:
    return [sys.executable, "-m", "examples.memory", str(mountpoint)]


def polefs_command(volume: Path | str, mountpoint: Path | str, options: str = "") -> list[str]:
    extra = ["-o", options] if options else []
    return [sys.executable, "-m", "polefs", "mount", "-f", *extra, str(volume), str(mountpoint)]


def fsck_command(volume: Path | str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "polefs", "fsck", "--data", *arguments, str(volume)]


def fsck(volume: Path, *arguments: str) -> None:
    """Require that ``polefs fsck`` finds nothing, contents included."""
    done = subprocess.run(
        fsck_command(volume, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    if done.returncode != 0:
        raise ServerError(f"fsck ended with code {done.returncode}:\n{done.stdout.decode(errors='replace')}")


LOCAL = TargetSpec("local", lacks=frozenset({"far-times", "large-file", "large-xattr", "statfs"}))
"""A plain directory: what fails there is a wrong test. Its limits are those of ext4, and others use its disk too."""

MEMORY = TargetSpec("memory", memory_command("{mountpoint}"), lacks=frozenset({"remount"}))

ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")
"""Allows FUSE over io_uring. Tests set it, which needs root, and leave it set: connections that are there keep it."""


def transport_command(transport: str, *arguments: Path | str) -> list[str]:
    """The memory file system over a transport; its log tells which one is used."""
    return [sys.executable, "-m", "examples.memory", "--debug", "--transport", transport, *map(str, arguments)]


def over(transport: str) -> TargetSpec:
    """The memory file system over a transport, which must be the one that is used."""
    command = transport_command(transport, "{mountpoint}")
    if transport == "uring":
        command = ["sh", "-c", f'echo Y > {ENABLE_URING} && exec "$@"', "sh", *command]
    used = 'test "$(sed -n "s/.*transport: //p" "$1" | sort -u)" = "$2" || { cat "$1"; exit 1; }'
    check = ["sh", "-c", used, "sh", "{log}", transport]
    return TargetSpec(f"memory-{transport}", command, check, MEMORY.lacks)


POLEFS = TargetSpec(
    "polefs", polefs_command("{scratch}/volume", "{mountpoint}"), check=fsck_command("{scratch}/volume")
)

CLONES, URING = over("clones"), over("uring")

TARGETS = [LOCAL, MEMORY, CLONES, URING, POLEFS]


class PolefsTarget(Target):
    """A mounted polefs volume."""

    @property
    def volume(self) -> Path:
        return self.scratch / "volume"
