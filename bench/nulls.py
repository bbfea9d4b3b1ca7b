"""The null file system, which does nothing but answer (described in bench/floor.c), on each library."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from bench import peers
from bench.servers import ServerError
from bench.systems import REPOSITORY, System

ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")
HERE = Path(__file__).parent


class Floor(System):
    """The smallest server there is, in C."""

    name = "floor"

    def prepare(self) -> None:
        self._program = peers.compile_c(HERE / "floor.c", self.base / "floor")

    def command(self) -> list[str]:
        return [self._program, str(self.mountpoint)]


class Rawfuse(System):
    name = "rawfuse"
    transport = "device"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bench.rawfuse_null", "--transport", self.transport, str(self.mountpoint)]

    def environ(self) -> Mapping[str, str]:
        return {"PYTHONPATH": str(REPOSITORY)}

    def mount(self) -> None:
        super().mount()
        lines = (self.base / "log").read_text().splitlines()
        if fallback := [line for line in lines if "is used instead" in line]:
            raise ServerError(fallback[0])


class RawfuseClones(Rawfuse):
    name = "rawfuse-clones"
    transport = "clones"


class RawfuseUring(Rawfuse):
    name = "rawfuse-uring"
    transport = "uring"

    def prepare(self) -> None:
        """Allow it in this kernel while it is measured."""
        if not ENABLE_URING.exists():
            raise peers.Missing("the kernel has no FUSE over io_uring (Linux 6.14 with CONFIG_FUSE_IO_URING)")
        self._allowed = ENABLE_URING.read_text()
        ENABLE_URING.write_text("Y")

    def unmount(self) -> None:
        ENABLE_URING.write_text(self._allowed)
        super().unmount()


class Peer(System):
    """In the environment of the peers."""

    def prepare(self) -> None:
        self._python = self.environment.program(self.name)

    def command(self) -> list[str]:
        return [self._python, str(HERE / f"{self.name}_null.py"), str(self.mountpoint)]


class Pyfuse3(Peer):
    name = "pyfuse3"


class Mfusepy(Peer):
    name = "mfusepy"


RAWFUSE = (Rawfuse, RawfuseClones, RawfuseUring)
