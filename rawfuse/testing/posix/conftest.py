"""Fixtures of the suite: ``root``, a fresh directory on each file system under test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import make_scratch, run_root, run_target
from rawfuse.testing.plugin import targets
from rawfuse.testing.target import Target, TargetSpec
from rawfuse.testing.watchdog import Watchdog


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    specs = targets(metafunc.config)
    if "target" in metafunc.fixturenames and specs:
        metafunc.parametrize("target", specs, ids=[spec.name for spec in specs], indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not targets(config) and any(Path(__file__).parent in item.path.parents for item in items):
        raise pytest.UsageError("name the file system to test: --fuse-server 'COMMAND {mountpoint}'")


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest, fuse_watchdog: Watchdog) -> Iterator[Target]:
    """Each file system under test, mounted once a module; it must unmount cleanly and pass its check."""
    spec: TargetSpec = request.param
    yield from run_target(Target(spec, make_scratch(spec.name), fuse_watchdog))


@pytest.fixture
def root(target: Target, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on the file system under test, with mode 755 and owned by root."""
    yield from run_root(target, request)
