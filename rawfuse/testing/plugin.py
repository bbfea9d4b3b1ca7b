"""The pytest plugin: fixtures of mounted file systems that cannot hang, and the options of the POSIX suite.

Its own process enters a private mount namespace, so nothing that tests mount is seen outside and everything goes away
with it. Each server is a child process that dies with pytest. Nothing here opens ``/dev/fuse`` for longer than a look,
so forking test processes is safe.

No test can hang: at its deadline the watchdog aborts the FUSE connections (every blocked system call then returns
ECONNABORTED or ENOTCONN) and interrupts the test with ``DeadlineExceeded``.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence, Set

import pytest

from rawfuse.testing import hooks
from rawfuse.testing.fixtures import LOGS, deadline_of, make_scratch, require, watch_log
from rawfuse.testing.namespace import enter_private_namespace, missing_requirement
from rawfuse.testing.server import Server
from rawfuse.testing.target import LACKS, STOP_DEADLINE, Target, TargetSpec
from rawfuse.testing.watchdog import Watchdog

FuseMount = Callable[[str | Sequence[str]], Server]
"""The type of the fixture ``fuse_mount``."""

_LEFT_OUT: pytest.StashKey[dict[str, Counter[str]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuse", "file systems on real mounts (rawfuse.testing)")
    group.addoption(
        "--fuse-server",
        metavar="COMMAND",
        help="what to run rawfuse.testing.posix on: a command that mounts a file system on {mountpoint} and stays in "
        "the foreground; {scratch} is a directory of its own",
    )
    group.addoption("--fuse-check", metavar="COMMAND", help="must succeed after every unmount ({scratch})")
    group.addoption(
        "--fuse-lacks",
        metavar="NAMES",
        default="",
        help="what that file system does not have, separated by commas; tests that need it are left out: "
        + ", ".join(LACKS),
    )
    group.addoption("--fuse-deadline", metavar="SECONDS", type=float, default=60.0, help="for one test (60)")
    group.addoption("--fuse-stress", action="store_true", help="more rounds and bigger directories, for hours")


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): the time this test may take before its mount is aborted")
    config.addinivalue_line("markers", "fuse_needs(name, ...): left out where the file system lacks one of these")
    command = config.getoption("--fuse-server")
    if command and "{mountpoint}" not in command:
        raise pytest.UsageError("--fuse-server: the command must have {mountpoint} where the mount point belongs")
    _require_known("--fuse-lacks", _declared_lacks(config))


def _require_known(where: str, names: Set[str]) -> None:
    unknown = sorted(names - LACKS.keys())
    if unknown:
        raise pytest.UsageError(f"{where}: nothing is called {', '.join(unknown)}; there are {', '.join(LACKS)}")


def _declared_lacks(config: pytest.Config) -> frozenset[str]:
    return frozenset(filter(None, re.split(r"[,\s]+", config.getoption("--fuse-lacks"))))


def targets(config: pytest.Config) -> list[TargetSpec]:
    """The file systems to test: that of ``--fuse-server``, or those of the hook ``pytest_fuse_targets``."""
    command = config.getoption("--fuse-server")
    if not command:
        return [spec for specs in config.hook.pytest_fuse_targets() for spec in specs]
    check = config.getoption("--fuse-check") or ""
    return [TargetSpec("server", shlex.split(command), shlex.split(check), _declared_lacks(config))]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a file system lacks."""
    left_out = config.stash.setdefault(_LEFT_OUT, {})
    kept, dropped = [], []
    for item in items:
        spec = _spec_of(item)
        lacks = spec.lacks if spec is not None else _declared_lacks(config)
        needs = {name for mark in item.iter_markers("fuse_needs") for name in mark.args}
        _require_known(f"{item.nodeid}: fuse_needs", needs)
        if missing := needs & lacks:
            left_out.setdefault(spec.name if spec is not None else "server", Counter()).update(missing)
            dropped.append(item)
        else:
            kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _spec_of(item: pytest.Item) -> TargetSpec | None:
    callspec = getattr(item, "callspec", None)
    spec = callspec.params.get("target") if callspec is not None else None
    return spec if isinstance(spec, TargetSpec) else None


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    lines = []
    for name, counts in config.stash.get(_LEFT_OUT, {}).items():
        needs = ", ".join(f"{need} ({count})" for need, count in sorted(counts.items()))
        lines.append(f"{name}: tests are left out that need what it lacks: {needs}")
    return lines


@pytest.fixture(scope="session")
def fuse_namespace() -> None:
    """The private mount namespace; a machine that cannot run tests on mounts fails them with one line."""
    require(missing_requirement())
    enter_private_namespace()


@pytest.fixture(scope="session")
def fuse_watchdog(fuse_namespace: None) -> Iterator[Watchdog]:
    """What ends a test that hangs; ``fuse_watchdog.deadline(seconds)`` limits a part of one."""
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


@pytest.fixture(scope="session")
def fuse_stress(request: pytest.FixtureRequest) -> bool:
    """Whether ``--fuse-stress`` asks for long runs."""
    return bool(request.config.getoption("--fuse-stress"))


@pytest.fixture
def fuse_mount(fuse_watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[FuseMount]:
    """``fuse_mount(command)`` serves a file system and returns its ``Server``, whose ``mountpoint`` is a fresh
    directory; ``{mountpoint}`` and ``{scratch}`` in the command are filled in. After the test each must unmount and
    end with code 0, unless the test itself has ended it."""
    started: list[Target] = []

    def mount(command: str | Sequence[str]) -> Server:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        target = Target(TargetSpec("mount", words), make_scratch("fuse"), fuse_watchdog)
        started.append(target)
        target.start()
        assert target.server is not None
        watch_log(request.node, f"mount {len(started)}", target.server)
        return target.server

    try:
        with fuse_watchdog.deadline(deadline_of(request)):
            yield mount
        for target in started:
            if target.server is not None:
                with fuse_watchdog.deadline(STOP_DEADLINE):
                    target.server.finish()
    finally:
        for target in started:
            target.discard()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure carries what the servers logged during the test."""
    report = yield
    if report.failed:
        for name, server, start in item.stash.get(LOGS, []):
            report.sections.append((f"log of {name}", server.log_since(start)[-20000:]))
    return report
