"""What the POSIX suite in rawfuse/testing/posix runs on here, and short names of fixtures for the tests here."""

from __future__ import annotations

import pytest

from rawfuse.testing.target import TargetSpec
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import STRESS, TARGETS, TRANSPORTS


def pytest_configure(config: pytest.Config) -> None:
    if STRESS:
        config.option.fuse_stress = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes half of the suite's time runs over the plain device alone, but for long runs."""
    if STRESS:
        return
    names = tuple(
        f"{test}[{spec.name}" for test in ("test_same_as_a_plain_directory", "test_big") for spec in TRANSPORTS
    )
    dropped = [item for item in items if item.name.startswith(names)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.name.startswith(names)]


def pytest_fuse_targets() -> list[TargetSpec]:
    return TARGETS


@pytest.fixture(scope="session")
def namespace(fuse_namespace: None) -> None:
    """The private mount namespace."""


@pytest.fixture(scope="session")
def watchdog(fuse_watchdog: Watchdog) -> Watchdog:
    return fuse_watchdog
