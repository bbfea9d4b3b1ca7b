"""What one request costs: ``python -m bench.requests``.

Two comparisons in one run, each in interleaved rounds: the null file system in a minimal C loop (the floor), on rawfuse
over each transport, on mfusepy and on pyfuse3; and a directory in memory, shown again by libfuse in C, by
examples/mirror and by pyfuse3, beside the directory itself. Needs root and a C compiler.
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

from bench import goals, mounts, nulls, peers, report
from bench.compare import say
from bench.figures import Step
from bench.runner import Figure, StepError, run_clients, run_step
from bench.servers import ServerError
from bench.systems import Mirror, MirrorServed, PassthroughLL, Pyfuse3, Shown, System

MIB = 1 << 20
FILES = 3000
DATA_MIB = 128
NULL = "null file system"
SHOWN = "a directory shown again"


class Plain(Shown):
    """The directory itself."""

    name = "plain"

    def prepare(self) -> None:
        super().prepare()
        self.mountpoint = self.source

    def mount(self) -> None:
        pass

    def trouble(self) -> str:
        return ""

    def usage(self) -> None:
        return None


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


def _each_way(operation: str, unit: str = "ops/s", **more: Any) -> list[Request]:
    """With one client and with four, on one CPU and on all."""
    return [
        Request(f"{operation}_{clients}c{suffix}", unit, operation, clients, one_cpu, **more)
        for one_cpu, suffix in ((True, "_one_cpu"), (False, ""))
        for clients in (1, 4)
    ]


NULL_REQUESTS = [
    *_each_way("stat"),
    *_each_way("missing"),
    Request("read4k_1c_one_cpu", "ops/s", "read", one_cpu=True, size=4096),
    Request("read4k_4c", "ops/s", "read", clients=4, size=4096),
    Request("read1m_1c_one_cpu", "MiB/s", "read", one_cpu=True, size=MIB),
    Request("read1m_1c", "MiB/s", "read", size=MIB),
    Request("write1m_1c_one_cpu", "MiB/s", "write", one_cpu=True, size=MIB),
    Request("write1m_1c", "MiB/s", "write", size=MIB),
]
SHOWN_REQUESTS = [
    *_each_way("stat", cold=True),
    *_each_way("files", "files/s", cold=True),
    Request("read1m_1c_one_cpu", "MiB/s", "read_direct", one_cpu=True, size=MIB),
    Request("read1m_1c", "MiB/s", "read_direct", size=MIB),
    Request("write1m_1c_one_cpu", "MiB/s", "write_direct", one_cpu=True, size=MIB),
    Request("write1m_1c", "MiB/s", "write_direct", size=MIB),
]


@dataclass
class Comparison:
    """Servers that are measured with the same requests; ratios are to the first one."""

    title: str
    requests: list[Request]
    kinds: Sequence[type[System]]
    systems: list[System] = field(default_factory=list)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)

    def mount(self, base: Path, environment: peers.PeersEnvironment) -> None:
        """Those that are missing or do not start are left out, with a line that says why."""
        for kind in self.kinds:
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
            if usage := system.usage():
                self.peak_mib[system.name] = usage.peak_mib
            try:
                system.unmount()
            except ServerError as error:
                say(f"{system.name}: {error}")

    def tables(self) -> str:
        """Medians, with their ratios to those of the first system; the servers' CPU time and memory."""
        names = [system.name for system in self.systems]
        rates, costs = [], []
        for request in self.requests:
            found = [self.figures[name][request.name] for name in names]
            rates.append([request.name, request.unit, *(report.rated(figure, found[0]) for figure in found)])
            costs.append([request.name, *map(report.microseconds, found)])
        costs.append(["peak memory, MiB", *(report.number(self.peak_mib.get(name)) for name in names)])
        rate_table = report.table([self.title, "unit", *names], rates)
        return f"{rate_table}\n\n{report.table(['server CPU, us/request', *names], costs)}"

    def document(self) -> dict[str, Any]:
        return {
            name: {
                "peak_mib": self.peak_mib.get(name),
                "figures": {request: report.figure_json(figure) for request, figure in figures.items()},
            }
            for name, figures in self.figures.items()
        }


def _fill(source: Path) -> None:
    """The same files for each server that shows a directory."""
    for number in range(FILES):
        (source / f"f{number}").write_bytes(bytes(4096))
    (source / "data").write_bytes(bytes(DATA_MIB * MIB))


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
        span = DATA_MIB * MIB
        return [request.operation, f"{directory}/data", str(request.size), str(span), str(seconds)]
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
    parser.add_argument("--chart", metavar="FILE.png", help="draw them there (with matplotlib, among the peers)")
    parser.add_argument("--peers-venv", metavar="PATH", help="virtual environment of the peers; made when missing")
    parser.add_argument("--no-peers", action="store_true", help="only the floor and rawfuse")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    if os.geteuid() != 0:
        raise SystemExit("bench: needs root (mounts, dropped caches)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mounts.enter_private_namespace()
    if options.no_peers:
        comparisons = [Comparison(NULL, NULL_REQUESTS, (nulls.Floor, *nulls.RAWFUSE))]
    else:
        comparisons = [
            Comparison(NULL, NULL_REQUESTS, (nulls.Floor, *nulls.RAWFUSE, nulls.Mfusepy, nulls.Pyfuse3)),
            Comparison(SHOWN, SHOWN_REQUESTS, (PassthroughLL, MirrorServed, Mirror, Pyfuse3, Plain)),
        ]
    environment = peers.PeersEnvironment(options.peers_venv)
    base = Path(tempfile.mkdtemp(prefix="bench."))
    try:
        mounts.mount_tmpfs(str(base))
        loops = peers.compile_c(Path(__file__).with_name("loops.c"), base / "loops")
        for comparison in comparisons:
            place = base / comparison.title.replace(" ", "_")
            place.mkdir()
            try:
                comparison.mount(place, environment)
                comparison.run(loops, options.rounds, options.seconds)
            finally:
                comparison.unmount()
    except peers.Missing as error:
        raise SystemExit(f"bench: {error}") from None
    finally:
        mounts.unmount(str(base))
        shutil.rmtree(base, ignore_errors=True)
    _report(comparisons, options, environment)


def _report(
    comparisons: Sequence[Comparison], options: argparse.Namespace, environment: peers.PeersEnvironment
) -> None:
    figures = {comparison.title: comparison.figures for comparison in comparisons}
    for comparison in comparisons:
        if comparison.systems:
            print(comparison.tables(), end="\n\n")
    print("(ratio to the first column); _one_cpu: clients and server on one CPU; 1c, 4c: clients", end="\n\n")
    for line in [*goals.request_goals(figures), *goals.favoured_transport(figures)]:
        print(line)
    document = {
        "title": "FUSE requests",
        "machine": report.machine(),
        "rounds": options.rounds,
        "comparisons": {comparison.title: comparison.document() for comparison in comparisons},
    }
    if options.json:
        report.write_json(options.json, document)
    if options.chart:
        try:
            report.draw(environment.program("matplotlib"), options.chart, document)
        except peers.Missing as error:
            raise SystemExit(f"bench: {error}") from None


if __name__ == "__main__":
    main()
