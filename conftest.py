"""What the POSIX suite in rawfuse/testing/posix runs on here, and short names of fixtures for the tests here."""

from __future__ import annotations

import pytest

from rawfuse.testing.target import TargetSpec
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import STRESS, TARGETS


def pytest_configure(config: pytest.Config) -> None:
    if STRESS:
        config.option.fuse_stress = True


def pytest_fuse_targets() -> list[TargetSpec]:
    return TARGETS


@pytest.fixture(scope="session")
def namespace(fuse_namespace: None) -> None:
    """The private mount namespace."""


@pytest.fixture(scope="session")
def watchdog(fuse_watchdog: Watchdog) -> Watchdog:
    return fuse_watchdog
