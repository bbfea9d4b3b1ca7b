"""Fixtures of the tests on a mount: ``volume_root``, a fresh directory on a volume of polefs; ``lab``, a file system
for tests of rawfuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import deadline_of, make_scratch, require, run_root, run_target, watch_log
from rawfuse.testing.namespace import missing_tools
from rawfuse.testing.plugin import FuseMount
from rawfuse.testing.target import Target, TargetSpec
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.lab import Lab, lab_command
from tests.mounted.lab_server import Configuration
from tests.mounted.targets import POLEFS, PolefsTarget

TOOLS = {"gcc": "gcc", "git": "git", "make": "make", "rsync": "rsync", "setfacl": "acl", "tar": "tar"}
"""Commands that these tests run, and the Debian package of each."""


@pytest.fixture(scope="module")
def volume(watchdog: Watchdog) -> Iterator[PolefsTarget]:
    """A polefs volume alone, for tests that stop, kill or remount it."""
    require(missing_tools(TOOLS))
    volume = PolefsTarget(POLEFS, make_scratch("polefs"), watchdog)
    for _ in run_target(volume):
        yield volume


@pytest.fixture
def volume_root(volume: PolefsTarget, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on the volume, with mode 755 and owned by root."""
    yield from run_root(volume, request)


@pytest.fixture
def make_lab(fuse_mount: FuseMount) -> Callable[[Configuration], Lab]:
    """``make_lab(configuration)`` mounts one for this test."""
    return lambda configuration: Lab(fuse_mount(lab_command(configuration)))


@pytest.fixture(scope="module")
def shared_lab(watchdog: Watchdog) -> Iterator[Lab]:
    target = Target(TargetSpec("lab", lab_command(Configuration())), make_scratch("lab"), watchdog)
    for _ in run_target(target):
        assert target.server is not None
        yield Lab(target.server)


@pytest.fixture
def lab(shared_lab: Lab, watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """One with the usual configuration, empty; it must survive the test and log no exception."""
    server = shared_lab.server
    start = server.log_size()
    watch_log(request.node, "lab", server)
    with watchdog.deadline(deadline_of(request)):
        yield shared_lab
        shared_lab.clear()
    assert "Traceback" not in server.log_since(start)
