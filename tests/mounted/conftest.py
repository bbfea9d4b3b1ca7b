"""Fixtures of the tests of polefs on a mount: ``volume_root``, a fresh directory on a volume of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import make_scratch, run_root, run_target
from rawfuse.testing.namespace import missing_tools
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import POLEFS, PolefsTarget

TOOLS = {"gcc": "gcc", "git": "git", "make": "make", "rsync": "rsync", "setfacl": "acl", "tar": "tar"}
"""Commands that these tests run, and the Debian package of each."""


@pytest.fixture(scope="module")
def volume(watchdog: Watchdog) -> Iterator[PolefsTarget]:
    """A polefs volume alone, for tests that stop, kill or remount it."""
    missing = missing_tools(TOOLS)
    if missing is not None:
        pytest.fail(missing, pytrace=False)
    volume = PolefsTarget(POLEFS, make_scratch("polefs"), watchdog)
    for _ in run_target(volume):
        yield volume


@pytest.fixture
def volume_root(volume: PolefsTarget, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on the volume, with mode 755 and owned by root."""
    yield from run_root(volume, request)
