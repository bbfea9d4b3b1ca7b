"""Fixtures of the suite on S3: mounts of volumes in a bucket."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import deadline_of
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import STRESS
from tests.s3.faults import FaultProxy
from tests.s3.server import SeaweedServer
from tests.s3.volumes import S3Volume

collect_ignore = [] if STRESS else ["test_big.py"]

MakeVolume = Callable[..., S3Volume]


@pytest.fixture
def proxy(s3_server: SeaweedServer) -> Iterator[FaultProxy]:
    """A proxy in front of the server, which breaks nothing yet."""
    proxy = FaultProxy(s3_server.endpoint)
    proxy.start()
    yield proxy
    proxy.close()


@contextlib.contextmanager
def volumes(server: SeaweedServer, watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[MakeVolume]:
    """Makes volumes whose contents are in a place of their own in the bucket; arguments are options of ``format``, and
    ``disk`` is where the volume's directory is. They are unmounted and checked at the end, unless the test has
    failed."""
    scratch = Path(tempfile.mkdtemp(prefix="polefs-s3-", dir=os.environ.get("POLEFS_TEST_DIR")))
    made: list[S3Volume] = []

    def make(
        *options: str, mount: tuple[str, ...] = (), endpoint: str | None = None, disk: Path | None = None
    ) -> S3Volume:
        volume = S3Volume(scratch / str(len(made)), watchdog, server.new_place(), endpoint)
        if disk is not None:
            volume.path = disk / "volume"
        made.append(volume)
        volume.mount_options = [*mount]
        volume.format(*options)
        return volume

    try:
        with watchdog.deadline(deadline_of(request)):
            yield make
            for volume in made:
                volume.finish()
    finally:
        for volume in made:
            volume.discard()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def make_volume(s3_server: SeaweedServer, watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[MakeVolume]:
    with volumes(s3_server, watchdog, request) as make:
        yield make
