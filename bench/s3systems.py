"""File systems whose contents are in S3, all on one server: how each is made, mounted and emptied of its caches."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bench import mounts, peers
from bench.figures import Step
from bench.runner import run_step
from bench.servers import ServerError
from bench.systems import REPOSITORY, Ext4, JuiceFS, Polefs, System
from tests.s3.server import ACCESS_KEY, REGION, SECRET_KEY, SeaweedServer

DRAIN_SECONDS: Final = 60.0
_START_SECONDS: Final = 10.0


class S3System(System):
    """Contents are in a bucket of its own."""

    def __init__(self, base: Path, environment: peers.PeersEnvironment, s3: SeaweedServer) -> None:
        super().__init__(base, environment)
        self.s3 = s3
        self.bucket = f"bench-{self.name}"
        self.cache = self.base / "cache"

    def prepare(self) -> None:
        self.s3.client().create_bucket(Bucket=self.bucket)
        super().prepare()

    def empty_caches(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)


class S3Polefs(S3System, Polefs):
    """Default options."""

    def prepare(self) -> None:
        super().prepare()
        where = ["--store", f"s3://{self.bucket}/volume", "--endpoint", self.s3.endpoint]
        words = [sys.executable, "-m", "polefs", "format", *where, str(self.base / "volume")]
        peers.run("format a polefs volume", words, {**os.environ, **self.environ()})

    def command(self) -> list[str]:
        self.cache.mkdir(exist_ok=True)
        *words, volume, mountpoint = super().command()
        return [*words, "--cache-dir", str(self.cache), volume, mountpoint]

    def environ(self) -> Mapping[str, str]:
        return {**super().environ(), **self.s3.environment}


class S3JuiceFS(S3System, JuiceFS):
    """SQLite metadata; nothing is kept in its trash."""

    def _storage(self) -> list[str]:
        bucket = ["--storage", "s3", "--bucket", f"{self.s3.endpoint}/{self.bucket}"]
        return [*bucket, "--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY, "--trash-days", "0"]


class S3JuiceFSRedis(S3JuiceFS):
    """Redis metadata, on loopback, with its append-only file (synced once a second)."""

    name = "juicefs-redis"

    def _metadata(self) -> str:
        program = peers.debian_program("redis-server", "redis-server")
        port = _free_port()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(self.base), "--appendonly", "yes"]
        with open(self.base / "redis.log", "ab") as log:
            subprocess.Popen([program, *options], stdout=log, stderr=log, preexec_fn=_end_with_us)
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(port):
            if time.monotonic() > deadline:
                raise peers.Missing(f"redis-server does not answer ({self.base / 'redis.log'})")
            time.sleep(0.05)
        return f"redis://127.0.0.1:{port}/1"


class WeedMount(S3System):
    """SeaweedFS's own: not through S3, but on the filer and the volume server beneath it."""

    name = "weed-mount"

    def command(self) -> list[str]:
        self.cache.mkdir(exist_ok=True)
        where = [f"-filer={self.s3.filer}", f"-filer.path=/{self.name}", f"-dir={self.mountpoint}"]
        local = [f"-cacheDir={self.cache}", f"-localSocket={self.base / 'socket'}"]
        return [str(Path(sys.executable).with_name("weed")), "mount", *where, *local]


class Rclone(S3System):
    """``--vfs-cache-mode full``. It has no metadata of its own: files are objects."""

    name = "rclone"

    def prepare(self) -> None:
        super().prepare()
        self._program = self.environment.program("rclone")
        self._control = self.base / "control"

    def command(self) -> list[str]:
        cache = ["--vfs-cache-mode", "full", "--cache-dir", str(self.cache)]
        control = ["--rc", "--rc-addr", f"unix://{self._control}", "--rc-no-auth"]
        return [self._program, "mount", f"bench:{self.bucket}", str(self.mountpoint), *cache, *control]

    def environ(self) -> Mapping[str, str]:
        options = {
            "TYPE": "s3",
            "PROVIDER": "SeaweedFS",
            "ENDPOINT": self.s3.endpoint,
            "REGION": REGION,
            "ACCESS_KEY_ID": ACCESS_KEY,
            "SECRET_ACCESS_KEY": SECRET_KEY,
        }
        remote = {f"RCLONE_CONFIG_BENCH_{name}": value for name, value in options.items()}
        return {"RCLONE_CONFIG": os.devnull, "HOME": str(self.base), **remote}

    def unmount(self) -> None:
        """What it has not uploaded yet is in the cache only, which is to be emptied."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._server and self._server.serving() and self._waiting():
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} has not uploaded everything after {DRAIN_SECONDS:.0f} s")
            time.sleep(0.1)
        super().unmount()

    def _waiting(self) -> int:
        """Files that are to be uploaded."""
        words = [self._program, "rc", "--unix-socket", str(self._control), "vfs/stats"]
        environ = {**os.environ, **self.environ()}
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ)
        cache: dict[str, Any] = json.loads(done.stdout or b"{}").get("diskCache", {})
        return int(cache.get("uploadsInProgress", 0) + cache.get("uploadsQueued", 0))


class S3fs(S3System):
    """With its disk cache. It has no metadata of its own: files are objects."""

    name = "s3fs"

    def prepare(self) -> None:
        self._program = peers.debian_program("s3fs", "s3fs")
        super().prepare()

    def command(self) -> list[str]:
        self.cache.mkdir(exist_ok=True)
        options = f"url={self.s3.endpoint},use_path_request_style,use_cache={self.cache}"
        return [self._program, self.bucket, str(self.mountpoint), "-f", "-o", options]

    def environ(self) -> Mapping[str, str]:
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


class RawStore(S3System):
    """The object store client of polefs alone (``bench.s3raw``): what a file system on it can reach at most."""

    name = "raw"
    figures = (
        *("seqwrite", "seqread_cold", "randread4k_cold"),
        *(f"write{size}k_{kind}" for size in (4, 16) for kind in ("file", "fsync")),
        *(f"read{size}k_file_cold" for size in (4, 16)),
    )

    def prepare(self) -> None:
        super().prepare()
        self.root = "raw"
        url = f"s3://{self.bucket}"
        variables = {**self.s3.environment, "PYTHONPATH": str(REPOSITORY)}
        words = (sys.executable, "-m", "bench.s3raw", url, self.s3.endpoint)
        self.client = ("env", *(f"{name}={value}" for name, value in variables.items()), *words)

    def mount(self) -> None:
        pass

    def trouble(self) -> str:
        return ""

    def usage(self) -> None:
        """Its client is what does the work."""

    def remount(self) -> bool:
        run_step(self, Step("drop_caches", {"settle": 0.1}))
        return True


class Plain(Ext4):
    """The local directory that the caches and the server's data lie on too."""

    def remount(self) -> bool:
        run_step(self, Step("drop_caches", {"settle": 0.1}))
        return True


S3_SYSTEMS: dict[str, type[S3System]] = {
    system.name: system for system in (S3Polefs, S3JuiceFS, S3JuiceFSRedis, WeedMount, Rclone, S3fs, RawStore)
}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _end_with_us() -> None:
    mounts.die_with_parent(signal.SIGTERM)
