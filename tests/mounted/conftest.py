"""Fixtures of the mounted suite: ``root``, a fresh directory on each file system under test."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.harness import TEST_DEADLINE, Watchdog, enter_private_namespace, missing_requirement
from tests.mounted.targets import TARGETS, PolefsTarget, Target, make_target


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): the time this test may take before its mount is aborted")


@pytest.fixture(scope="session")
def namespace() -> None:
    """The private mount namespace; a machine that cannot run mounted tests fails them with one line."""
    missing = missing_requirement()
    if missing is not None:
        pytest.fail(missing, pytrace=False)
    enter_private_namespace()


@pytest.fixture(scope="session")
def watchdog(namespace: None) -> Iterator[Watchdog]:
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


def _run_target(name: str, watchdog: Watchdog) -> Iterator[Target]:
    scratch = Path(tempfile.mkdtemp(prefix=f"polefs-{name}-", dir=os.environ.get("POLEFS_TEST_DIR")))
    scratch.chmod(0o755)  # other users' processes walk through it
    target = make_target(name, scratch, watchdog)
    try:
        target.start()
        yield target
        target.stop()
    finally:
        if target.server is not None:
            target.server.abort()
            target.server.kill()
        target.discard()


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, watchdog: Watchdog) -> Iterator[Target]:
    """Each file system under test, mounted once a module. It must unmount cleanly, end with code 0 and pass fsck."""
    yield from _run_target(request.param, watchdog)


@pytest.fixture(scope="module")
def volume(watchdog: Watchdog) -> Iterator[PolefsTarget]:
    """A polefs volume alone, for tests that stop, kill or remount it."""
    for target in _run_target("polefs", watchdog):
        assert isinstance(target, PolefsTarget)
        yield target


def _guard(target: Target, watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[Path]:
    target.revive()
    start = target.server.log_size() if target.server is not None else 0
    request.node.stash[LOG_KEY] = (target, start)
    mark = request.node.get_closest_marker("deadline")
    with watchdog.deadline(mark.args[0] if mark else TEST_DEADLINE):
        yield target.new_directory(re.sub(r"\W+", "-", request.node.name))
    if target.server is not None:
        log = target.server.log_since(start)
        assert "Traceback" not in log, f"the server logged an unexpected exception:\n{log}"
        assert target.server.alive, f"the server died:\n{log}"


@pytest.fixture
def root(target: Target, watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on the file system under test, with mode 755 and owned by root."""
    yield from _guard(target, watchdog, request)


@pytest.fixture
def volume_root(volume: PolefsTarget, watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[Path]:
    """As ``root``, on the ``volume`` fixture."""
    yield from _guard(volume, watchdog, request)


LOG_KEY: pytest.StashKey[tuple[Target, int]] = pytest.StashKey()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure carries what the server logged during the test."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed and LOG_KEY in item.stash:
        target, start = item.stash[LOG_KEY]
        if target.server is not None:
            report.sections.append((f"log of {target.name}", target.server.log_since(start)[-20000:]))
