"""Volumes in a bucket, and their mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rawfuse.testing.server import SERVER_DEADLINE, Server, ServerError
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import REPOSITORY
from tests.s3.server import Place

COMMAND_SECONDS = 120.0


def polefs(*arguments: str | Path, code: int | None = 0, **variables: str) -> str:
    """Run a command; what it says. ServerError unless it ends with ``code`` (None: any)."""
    done = subprocess.run(
        [sys.executable, "-m", "polefs", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    if code is not None and done.returncode != code:
        raise ServerError(f"polefs {arguments[0]} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


class S3Volume:
    """A volume directory with its contents at ``place``, and one mount of it at a time."""

    def __init__(self, scratch: Path, watchdog: Watchdog, place: Place, endpoint: str | None) -> None:
        """``endpoint``: where polefs finds the server; None: at the server itself."""
        scratch.mkdir()
        self.path = scratch / "volume"
        self.place = place
        self.root = scratch / "mnt"
        self.key_file = scratch / "key"
        self.mount_options: list[str] = []
        self._log = scratch / "server.log"
        self._endpoint = endpoint or place.endpoint
        self._watchdog = watchdog
        self._encrypted = False
        self.server: Server | None = None

    def format(self, *options: str) -> None:
        self._encrypted = "--encrypt" in options
        if self._encrypted:
            self.key_file.write_bytes(os.urandom(32))
        polefs("format", "--store", self.place.url, "--endpoint", self._endpoint, *options, *self._key, self.path)

    @property
    def _key(self) -> list[str]:
        return ["--key-file", str(self.key_file)] if self._encrypted else []

    def start(self, *, wait: bool = True) -> None:
        """Mount it; without ``wait`` only begin to."""
        command = [sys.executable, "-m", "polefs", "mount", "-f", *self._key, *self.mount_options]
        self.server = Server([*command, str(self.path), str(self.root)], self.root, self._log)
        self._watchdog.watch(self.server)
        if wait:
            self.server.start()
        else:
            self.server.launch()

    def stop(self, timeout: float = SERVER_DEADLINE) -> None:
        """Unmount it; it must save everything and end with code 0, within so many seconds."""
        assert self.server is not None
        self._forget().unmount(timeout)

    def ended(self) -> int:
        """The daemon's exit code, once it has ended by itself."""
        return self._forget().wait(COMMAND_SECONDS)

    def kill(self) -> None:
        """SIGKILL of the daemon, and the dead mount is removed."""
        self._forget().kill()

    def _forget(self) -> Server:
        server = self.server
        assert server is not None
        self._watchdog.unwatch(server)
        self.server = None
        return server

    def lose_local(self) -> None:
        """As on another machine: all that is kept locally, but for the metadata, is gone. Only while it is unmounted,
        when there must not be anything that is not saved."""
        assert self.server is None
        shutil.rmtree(self.path / "local")
        (self.path / "local").mkdir()
        shutil.rmtree(self.path / "cache", ignore_errors=True)

    def fsck(self, *options: str, code: int = 0) -> str:
        return polefs("fsck", *options, *self._key, self.path, code=code)

    def finish(self) -> None:
        if self.server is not None:
            self.stop()
        self.fsck("--data")
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        assert "Traceback" not in log, f"the daemon logged an unexpected exception:\n{log}"

    def discard(self) -> None:
        if self.server is not None:
            self.server.abort()
            self.kill()

    def log(self) -> str:
        return self._log.read_text(errors="replace")
