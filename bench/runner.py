"""Runs the steps of a plan on one target, each in client processes of its own, with a deadline for each."""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.figures import Group, Scale, Step
from bench.servers import Usage

CLIENT = (sys.executable, "-I", "-S", str(Path(__file__).with_name("client.py")))
"""The program that does a step in a directory; the workload and its arguments follow."""

DEADLINE_SECONDS = 60.0
ERROR = "error"


class Target(Protocol):
    """What is measured."""

    name: str
    root: str
    """The work directory in it."""
    client: Sequence[str]
    """``CLIENT``, or another program that does the same steps to something that is no file system."""

    def trouble(self) -> str:
        """Why it cannot be measured (any more), empty when it can."""
        ...

    def usage(self) -> Usage | None:
        """Of its server, when known."""
        ...

    def abort(self) -> None:
        """It hangs: make whatever waits in it return, whatever the cost."""
        ...

    def remount(self) -> bool:
        """Unmount, empty local caches, mount. False when this target cannot."""
        ...


class StepError(Exception):
    """A step failed; the message says how."""


class TimedOut(StepError):
    """It was not done after 60 s, and was killed."""


@dataclass
class Figure:
    unit: str
    values: list[float] = field(default_factory=list)
    """One a round: operations per second."""
    server_us: list[float] = field(default_factory=list)
    """Server CPU time per operation, in microseconds, one a round; none when the server is not known."""
    error: str = ""

    def median(self) -> float | None:
        return statistics.median(self.values) if self.values and not self.error else None


@dataclass
class Results:
    """Of one target."""

    figures: dict[str, Figure] = field(default_factory=dict)
    client_cpu: float = 0.0
    """Seconds, of all client processes."""


@dataclass(frozen=True)
class Outcome:
    operations: float
    seconds: float
    cpu: float


def run_group(target: Target, group: Group, wanted: Collection[str], scale: Scale, results: Results) -> None:
    """One round of a group. A step that fails is an error of its figure, and of those after it that need what it
    leaves."""
    if group.remount and not (set(wanted) & set(group.figures()) and target.remount()):
        return
    broken = ""
    for step in group.steps:
        if not (step.needed or step.name in wanted):
            continue
        figure = results.figures.setdefault(step.name, Figure(step.unit)) if step.name in wanted else None
        try:
            if broken := broken or target.trouble():
                raise StepError(broken)
            if step.cold:
                run_step(target, Step("drop_caches", {"settle": scale.settle_seconds}))
            before = target.usage()
            outcome = run_step(target, step)
            after = target.usage()
            if trouble := target.trouble():
                raise StepError(trouble)
        except StepError as error:
            if figure:
                figure.error = str(error)
            if step.needed:
                broken = str(error)
            if isinstance(error, TimedOut):
                target.abort()
            continue
        results.client_cpu += outcome.cpu
        if figure:
            figure.values.append(outcome.operations / outcome.seconds)
            if before and after:
                figure.server_us.append((after.cpu_seconds - before.cpu_seconds) / outcome.operations * 1e6)


def run_step(target: Target, step: Step) -> Outcome:
    """One step in as many client processes as it wants. StepError."""
    commands = []
    for index in range(step.processes):
        arguments = json.dumps({**step.arguments, "index": index})
        commands.append([*target.client, step.workload, arguments])
    return run_clients(commands, target.abort)


def run_clients(commands: Sequence[Sequence[str]], abort: Callable[[], None], cpu: int | None = None) -> Outcome:
    """Start clients (the protocol is bench/client.py's), on one CPU if it is given, let them work at one moment, and
    add up. StepError when one fails, TimedOut after 60 s; what hangs is killed, after ``abort`` if need be."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    waiting, go = os.pipe()
    clients = [_start(words, waiting) for words in commands]
    os.close(waiting)
    try:
        for client in clients:
            if cpu is not None:
                os.sched_setaffinity(client.pid, {cpu})
            _wait_ready(client, deadline)
        os.close(go)
        go = -1
        outcomes = [_finish(client, deadline) for client in clients]
    finally:
        if go >= 0:
            os.close(go)
        _end(clients, abort)
    seconds = max(outcome["end"] for outcome in outcomes) - min(outcome["start"] for outcome in outcomes)
    operations = sum(outcome["operations"] for outcome in outcomes)
    return Outcome(operations, max(seconds, 1e-9), sum(outcome["cpu"] for outcome in outcomes))


def _start(words: Sequence[str], stdin: int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=stdin, stdout=pipe, stderr=pipe, text=True, cwd="/", start_new_session=True)


def _wait_ready(client: subprocess.Popen[str], deadline: float) -> None:
    assert client.stdout
    if not select.select([client.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise TimedOut("timed out in its preparation")
    if client.stdout.readline() != "ready\n":
        _finish(client, deadline)


def _finish(client: subprocess.Popen[str], deadline: float) -> dict[str, float]:
    try:
        output, errors = client.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimedOut("timed out") from None
    if client.returncode != 0:
        lines = errors.strip().splitlines()
        raise StepError(lines[-1] if lines else f"status {client.returncode}")
    outcome: dict[str, float] = json.loads(output)
    return outcome


def _end(clients: list[subprocess.Popen[str]], abort: Callable[[], None]) -> None:
    for client in clients:
        if client.poll() is None:
            os.killpg(client.pid, signal.SIGKILL)
            try:
                client.wait(2)
            except subprocess.TimeoutExpired:
                abort()
                client.wait(10)
        for stream in (client.stdout, client.stderr):
            if stream:
                stream.close()
