"""What the POSIX suite in rawfuse/testing/posix runs on here, and short names of fixtures for the tests here."""

from __future__ import annotations

import pytest

from rawfuse.testing.target import TargetSpec
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import CLONES, STRESS, TARGETS, URING


def pytest_configure(config: pytest.Config) -> None:
    if STRESS:
        config.option.fuse_stress = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes half of the suite's time runs over the plain device alone, and over clones but a part of the rest;
    variations of one test run on SQLite alone."""
    kept, dropped = [], []
    for item in items:
        (kept if STRESS or not _only_in_long_runs(item) else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _only_in_long_runs(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("new_meta") == "postgres" and len(callspec.params) > 1:
        # Variations of one rule, which is the same for all stores.
        return True
    spec = callspec.params.get("target") if callspec is not None else None
    if spec is CLONES:
        return item.path.name not in ("test_data.py", "test_locks.py", "test_unlinked.py")
    return spec is URING and item.path.name in ("test_model.py", "test_bigdirs.py")


def pytest_fuse_targets() -> list[TargetSpec]:
    return TARGETS


@pytest.fixture(scope="session")
def namespace(fuse_namespace: None) -> None:
    """The private mount namespace."""


@pytest.fixture(scope="session")
def watchdog(fuse_watchdog: Watchdog) -> Watchdog:
    return fuse_watchdog
