"""What one request costs: ``python -m bench.requests``.

Two comparisons in one run, each in interleaved rounds: the null file system in a minimal C loop (the floor) and on
rawfuse; and one directory shown again by pyfuse3, by examples/mirror and by libfuse in C. Needs root and a C compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import mounts, peers, report
from bench.compare import say
from bench.figures import Step
from bench.runner import Figure, StepError, run_clients, run_step
from bench.servers import ServerError
from bench.systems import REPOSITORY, Mirror, PassthroughLL, Pyfuse3, Shown, System

MIB = 1 << 20
FILES = 3000


class Floor(System):
    name = "floor"

    def prepare(self) -> None:
        self._program = peers.compile_c(Path(__file__).with_name("floor.c"), self.base / "floor")

    def command(self) -> list[str]:
        return [self._program, str(self.mountpoint)]


class RawfuseNull(System):
    name = "rawfuse"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bench.rawfuse_null", str(self.mountpoint)]

    def environ(self) -> dict[str, str]:
        return {"PYTHONPATH": str(REPOSITORY)}


@dataclass(frozen=True)
class Request:
    """A figure: what each client runs (see bench/loops.c)."""

    name: str
    unit: str
    operation: str
    clients: int = 1
    one_cpu: bool = False
    """Clients and server on one CPU: a switch between them costs no wake-up of an idle CPU, which takes longer than the
    request and varies; this shows what the software costs."""
    size: int = 0
    cold: bool = False


def _of_names(operation: str, unit: str = "ops/s", cold: bool = False) -> list[Request]:
    name = f"{operation}_"
    return [
        Request(f"{name}1c_one_cpu", unit, operation, one_cpu=True, cold=cold),
        Request(f"{name}1c", unit, operation, cold=cold),
        Request(f"{name}4c", unit, operation, clients=4, cold=cold),
    ]


NULL_REQUESTS = [
    *_of_names("stat"),
    *_of_names("missing"),
    Request("read4k_1c_one_cpu", "ops/s", "read", one_cpu=True, size=4096),
    Request("read4k_4c", "ops/s", "read", clients=4, size=4096),
    Request("read1m_1c_one_cpu", "MiB/s", "read", one_cpu=True, size=MIB),
    Request("read1m_1c", "MiB/s", "read", size=MIB),
    Request("write1m_1c_one_cpu", "MiB/s", "write", one_cpu=True, size=MIB),
    Request("write1m_1c", "MiB/s", "write", size=MIB),
]
SHOWN_REQUESTS = [*_of_names("stat", cold=True), *_of_names("missing"), *_of_names("files", "files/s", cold=True)]


@dataclass
class Comparison:
    """Servers that are measured with the same requests; ratios are to the first one."""

    title: str
    requests: list[Request]
    systems: list[System] = field(default_factory=list)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)

    def mount(self, kinds: Sequence[type[System]], base: Path, environment: peers.PeersEnvironment) -> None:
        """Those that are missing or do not start are left out, with a line that says why."""
        for kind in kinds:
            system = kind(base, environment)
            try:
                system.prepare()
                if isinstance(system, Shown):
                    _fill(system.source)
                system.mount()
            except (peers.Missing, ServerError) as error:
                say(f"{system.name} is left out: {error}")
                continue
            self.systems.append(system)
            self.figures[system.name] = {request.name: Figure(request.unit) for request in self.requests}

    def run(self, loops: str, rounds: int, seconds: float) -> None:
        order = list(self.systems)
        for number in range(rounds):
            for position, request in enumerate(self.requests):
                for system in order:
                    tag = number * len(self.requests) + position
                    _measure(system, request, loops, seconds, tag, self.figures[system.name][request.name])
            order.reverse()
            say(f"{self.title}: round {number + 1} of {rounds}")

    def unmount(self) -> None:
        for system in self.systems:
            try:
                system.unmount()
            except ServerError as error:
                say(f"{system.name}: {error}")

    def table(self) -> str:
        names = [system.name for system in self.systems]
        rows = []
        for request in self.requests:
            found = [self.figures[name][request.name] for name in names]
            ratios = [report.number(report.ratio(figure, found[0])) for figure in found[1:]]
            cells = [report.cell(figure) for figure in found]
            rows.append([request.name, request.unit, *cells, *ratios, *(report.microseconds(f) for f in found)])
        ratios = [f"{name}/{names[0]}" for name in names[1:]]
        return report.table([self.title, "unit", *names, *ratios, *(f"{name} us" for name in names)], rows)

    def document(self) -> dict[str, Any]:
        return {
            name: {request: report.figure_json(figure) for request, figure in figures.items()}
            for name, figures in self.figures.items()
        }


def _fill(source: Path) -> None:
    """The same files for each server that shows a directory."""
    for number in range(FILES):
        (source / f"f{number}").write_bytes(bytes(4096))


def _measure(system: System, request: Request, loops: str, seconds: float, tag: int, figure: Figure) -> None:
    cpus = os.sched_getaffinity(0)
    one = max(cpus) if request.one_cpu else None
    commands = [[loops, *_words(system, request, seconds, tag, client)] for client in range(request.clients)]
    try:
        if trouble := system.trouble():
            raise StepError(trouble)
        system.bind(cpus if one is None else {one})
        if request.cold:
            run_step(system, Step("drop_caches", {"settle": 0.1}))
        before = system.usage()
        outcome = run_clients(commands, system.abort, one)
        after = system.usage()
    except StepError as error:
        figure.error = str(error)
        return
    figure.values.append(outcome.operations * (request.size / MIB if request.unit == "MiB/s" else 1) / outcome.seconds)
    if before and after:
        figure.server_us.append((after.cpu_seconds - before.cpu_seconds) / outcome.operations * 1e6)


def _words(system: System, request: Request, seconds: float, tag: int, client: int) -> list[str]:
    directory = str(system.mountpoint)
    if request.size:
        return [request.operation, f"{directory}/data", str(request.size), str(1 << 30), str(seconds)]
    if request.operation == "missing":
        return ["missing", directory, str(tag * 10 + client), "0", str(seconds)]
    share = FILES // request.clients
    once = "0" if request.cold else str(seconds)
    return [request.operation, directory, str(client * share), str(share), once]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.requests", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="the median counts (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--dir", default="/var/tmp", help="where the shown directories lie (default: %(default)s)")
    parser.add_argument("--peers-venv", metavar="PATH", help="virtual environment of the peers; made when missing")
    parser.add_argument("--no-peers", action="store_true", help="only the floor and rawfuse")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    if os.geteuid() != 0:
        raise SystemExit("bench: needs root (mounts, dropped caches)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mounts.enter_private_namespace()
    comparisons = [Comparison("null file system", NULL_REQUESTS)]
    kinds: list[list[type[System]]] = [[Floor, RawfuseNull]]
    if not options.no_peers:
        comparisons.append(Comparison("a directory shown again", SHOWN_REQUESTS))
        kinds.append([Pyfuse3, Mirror, PassthroughLL])
    environment = peers.PeersEnvironment(options.peers_venv)
    base = Path(tempfile.mkdtemp(prefix="bench.", dir=options.dir))
    try:
        loops = peers.compile_c(Path(__file__).with_name("loops.c"), base / "loops")
        for comparison, wanted in zip(comparisons, kinds, strict=True):
            try:
                comparison.mount(wanted, base, environment)
                comparison.run(loops, options.rounds, options.seconds)
            finally:
                comparison.unmount()
    except peers.Missing as error:
        raise SystemExit(f"bench: {error}") from None
    finally:
        shutil.rmtree(base, ignore_errors=True)
    for comparison in comparisons:
        if comparison.systems:
            print(comparison.table(), end="\n\n")
    print("us: CPU time of the server for each operation; _one_cpu: clients and server on one CPU; 1c, 4c: clients")
    if options.json:
        figures = {comparison.title: comparison.document() for comparison in comparisons}
        report.write_json(options.json, {"machine": report.machine(), "rounds": options.rounds, "figures": figures})


if __name__ == "__main__":
    main()
