"""The bodies of fixtures that mount something: a plugin or conftest of any scope makes its fixtures from them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rawfuse.testing.server import Server
from rawfuse.testing.target import Target

STRESS_FACTOR = 30
"""By how much ``--fuse-stress`` lengthens every deadline."""

LOGS: pytest.StashKey[list[tuple[str, Server, int]]] = pytest.StashKey()
"""Of a test: the servers whose logs a failure shows, each with a name and where in its log the test began."""


def require(missing: str | None) -> None:
    """Fail with this line, when there is one: what the machine lacks for these tests."""
    if missing is not None:
        pytest.fail(missing, pytrace=False)


def deadline_of(request: pytest.FixtureRequest) -> float:
    """Seconds that this test may take."""
    mark = request.node.get_closest_marker("deadline")
    seconds = float(mark.args[0]) if mark is not None else float(request.config.getoption("--fuse-deadline"))
    return seconds * (STRESS_FACTOR if request.config.getoption("--fuse-stress") else 1)


def watch_log(node: pytest.Item, name: str, server: Server) -> None:
    """Show what the server logs from here on when the test fails."""
    node.stash.setdefault(LOGS, []).append((name, server, server.log_size()))


def make_scratch(name: str) -> Path:
    """A new directory in TMPDIR that other users' processes may walk through."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{name}-")).resolve()
    scratch.chmod(0o755)
    return scratch


def run_target(target: Target) -> Iterator[Target]:
    """Start it, and in the end require a clean stop; nothing is left in any case."""
    try:
        target.start()
        yield target
        target.stop()
    finally:
        target.discard()


def run_root(target: Target, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory with mode 755, for the test's deadline, on a server that must survive the test and log no
    exception."""
    target.revive()
    start = 0
    if target.server is not None:
        start = target.server.log_size()
        watch_log(request.node, target.name, target.server)
    with target.watchdog.deadline(deadline_of(request)):
        yield target.new_directory(re.sub(r"\W+", "-", request.node.name))
    if target.server is not None:
        log = target.server.log_since(start)
        assert "Traceback" not in log, f"the server logged an unexpected exception:\n{log}"
        target.server.require_alive()
