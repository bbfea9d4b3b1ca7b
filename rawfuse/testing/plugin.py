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
from collections.abc import Callable, Generator, Iterator, Sequence

import pytest

from rawfuse.testing import hooks
from rawfuse.testing.fixtures import LOGS, deadline_of, make_scratch, watch_log
from rawfuse.testing.namespace import enter_private_namespace, missing_requirement
from rawfuse.testing.server import Server
from rawfuse.testing.target import LACKS, Target, TargetSpec
from rawfuse.testing.watchdog import Watchdog

FuseMount = Callable[[str | Sequence[str]], Server]
"""The type of the fixture ``fuse_mount``."""

_LEFT_OUT: pytest.StashKey[Counter[str]] = pytest.StashKey()


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
    unknown = sorted(_declared_lacks(config) - LACKS.keys())
    if unknown:
        raise pytest.UsageError(f"--fuse-lacks: no such thing: {', '.join(unknown)}; known: {', '.join(LACKS)}")


def _declared_lacks(config: pytest.Config) -> frozenset[str]:
    return frozenset(filter(None, re.split(r"[,\s]+", config.getoption("--fuse-lacks"))))


def targets(config: pytest.Config) -> list[TargetSpec]:
    """The file systems to test: that of ``--fuse-server``, or those of the hook ``pytest_fuse_targets``."""
    command = config.getoption("--fuse-server")
    if not command:
        return [spec for specs in config.hook.pytest_fuse_targets() for spec in specs]
    if "{mountpoint}" not in command:
        raise pytest.UsageError("--fuse-server: the command must have {mountpoint} where the mount point belongs")
    check = config.getoption("--fuse-check") or ""
    return [TargetSpec("server", shlex.split(command), shlex.split(check), _declared_lacks(config))]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a file system lacks."""
    left_out = config.stash.setdefault(_LEFT_OUT, Counter())
    kept, dropped = [], []
    for item in items:
        spec = _spec_of(item)
        lacks = spec.lacks if spec is not None else _declared_lacks(config)
        needs = {name for mark in item.iter_markers("fuse_needs") for name in mark.args}
        missing = sorted(needs & lacks)
        if missing:
            left_out[f"{spec.name if spec is not None else 'server'} lacks {', '.join(missing)}"] += 1
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
    left_out = config.stash.get(_LEFT_OUT, Counter[str]())
    return [f"left out, {reason}: {count} tests" for reason, count in sorted(left_out.items())]


@pytest.fixture(scope="session")
def namespace() -> None:
    """The private mount namespace; a machine that cannot run tests on mounts fails them with one line."""
    missing = missing_requirement()
    if missing is not None:
        pytest.fail(missing, pytrace=False)
    enter_private_namespace()


@pytest.fixture(scope="session")
def watchdog(namespace: None) -> Iterator[Watchdog]:
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


@pytest.fixture(scope="session")
def fuse_stress(request: pytest.FixtureRequest) -> bool:
    """Whether ``--fuse-stress`` asks for long runs."""
    return bool(request.config.getoption("--fuse-stress"))


@pytest.fixture
def fuse_mount(watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[FuseMount]:
    """``fuse_mount(command)`` serves a file system and returns its ``Server``, whose ``mountpoint`` is a fresh
    directory; ``{mountpoint}`` and ``{scratch}`` in the command are filled in. After the test each must unmount and
    end with code 0, unless the test has ended it."""
    started: list[Target] = []

    def mount(command: str | Sequence[str]) -> Server:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        target = Target(TargetSpec("mount", words), make_scratch("fuse"), watchdog)
        started.append(target)
        target.start()
        assert target.server is not None
        watch_log(request.node, f"mount {len(started)}", target.server)
        return target.server

    try:
        with watchdog.deadline(deadline_of(request)):
            yield mount
        for target in started:
            if target.server is not None and target.server.alive:
                target.stop()
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
