"""polefs beside its peers, in one run: ``python -m bench.compare``.

All are mounted at once in a mount namespace of this run, on the same disk, and measured group by group in turn (A B,
then B A), so that noise of the machine meets all of them. Needs root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import mounts, peers, report, sources
from bench.figures import FULL, QUICK, Plan, Scale
from bench.goals import GOALS, shortfalls
from bench.runner import Results, StepError, run_group
from bench.servers import ServerError
from bench.systems import DEFAULT, SYSTEMS, System
from bench.throughput import wanted_figures


class Comparison:
    """The systems that could be mounted, and their results."""

    def __init__(self, scale: Scale, plan: Callable[[str], Plan]) -> None:
        """``plan`` makes that for a work directory."""
        self._scale = scale
        self._plan = plan
        self.systems: list[System] = []
        self.results: dict[str, Results] = {}
        self.left_out: dict[str, str] = {}
        """Why those that could not be mounted are not among the systems."""

    def mount(self, systems: Iterable[System]) -> None:
        """Those that are missing or do not start are left out, with a line that says why."""
        for system in systems:
            try:
                system.prepare()
                system.mount()
            except (peers.Missing, ServerError) as error:
                self.left_out[system.name] = str(error)
                say(f"{system.name} is left out: {error}")
                continue
            pid = system.server_pid()
            say(f"{system.name}: server process {pid}" if pid else f"{system.name}: {system.root}")
            self.systems.append(system)
            self.results[system.name] = Results()

    def run(self, wanted: Sequence[str], rounds: int) -> None:
        names = [group.name for group in self._plan("").chosen(wanted)]
        order = list(self.systems)
        for number in range(rounds):
            for name in names:
                for system in order:
                    self._run_group(system, name, wanted, number)
                order.reverse()

    def _run_group(self, system: System, name: str, wanted: Sequence[str], number: int) -> None:
        mine = [figure for figure in wanted if system.figures is None or figure in system.figures]
        group = next((group for group in self._plan(system.root).chosen(mine) if group.name == name), None)
        if group is None:
            return
        start = time.monotonic()
        try:
            system.revive()
            run_group(system, group, mine, self._scale, self.results[system.name])
        except (StepError, ServerError) as error:
            say(f"{system.name}: {group.name}: {error}")
        say(f"round {number + 1}: {group.name}: {system.name}: {time.monotonic() - start:.1f} s")

    def unmount(self) -> None:
        for system in self.systems:
            try:
                system.unmount()
            except ServerError as error:
                say(f"{system.name}: {error}")


def say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def figures_tables(comparison: Comparison, wanted: Sequence[str], goals: Mapping[str, float]) -> str:
    """A table with a column for each system, and one with polefs's ratio to each other one. ``goals``: what it should
    be to JuiceFS."""
    names = [system.name for system in comparison.systems]
    others = [name for name in names if name != "polefs"] if "polefs" in names else []
    goal = ["goal"] if "juicefs" in others else []
    rows, ratios = [], []
    for figure in wanted:
        found = {name: comparison.results[name].figures.get(figure) for name in names}
        unit = next((value.unit for value in found.values() if value), "")
        rows.append([figure, unit, *(report.cell(found[name]) for name in names)])
        rated = (report.number(report.ratio(found["polefs"], found[other])) for other in others)
        ratios.append([figure, *rated, *(f"{goals[figure]:g}" for _ in goal)])
    tables = [report.table(["figure", "unit", *names], rows)]
    if others:
        tables.append(report.table(["figure", *(f"polefs/{other}" for other in others), *goal], ratios))
    return "\n\n".join(tables)


def errors(comparison: Comparison) -> Iterator[str]:
    """A line for each figure that has failed, and each system that was left out."""
    for name, why in comparison.left_out.items():
        yield f"{name} is left out: {why}"
    for name, results in comparison.results.items():
        for figure, value in results.figures.items():
            if value.error:
                yield f"{name}: {figure}: {value.error}"


def server_table(comparison: Comparison) -> str:
    rows = []
    for system in comparison.systems:
        usage = system.usage()
        cpu, peak = (f"{usage.cpu_seconds:.1f}", f"{usage.peak_mib:.0f}") if usage else ("", "")
        unmounts = ", ".join(f"{seconds:.1f}" for seconds in system.unmount_seconds)
        rows.append([system.name, cpu, peak, f"{comparison.results[system.name].client_cpu:.1f}", unmounts])
    return report.table(["", "server CPU s", "server peak MiB", "clients CPU s", "unmounts s"], rows)


def document(comparison: Comparison) -> dict[str, Any]:
    """All figures, and what the servers took."""
    systems = {}
    for system in comparison.systems:
        usage = system.usage()
        systems[system.name] = {
            **report.results_json(comparison.results[system.name]),
            "server": {"cpu_seconds": usage.cpu_seconds, "peak_mib": usage.peak_mib} if usage else None,
            "unmount_seconds": system.unmount_seconds,
        }
    return {"machine": report.machine(), "systems": systems, "left_out": comparison.left_out}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--systems", default=",".join(DEFAULT), help=f"of {', '.join(SYSTEMS)} (default: %(default)s)")
    parser.add_argument("--only", metavar="NAME,...", help="these figures (and what they need)")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1; the median counts")
    parser.add_argument("--quick", action="store_true", help="about a quarter of the work")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--dir", default="/var/tmp", help="where all data lie (default: %(default)s)")
    parser.add_argument("--peers-venv", metavar="PATH", help="virtual environment of the peers; made when missing")
    parser.add_argument("--keep", action="store_true", help="leave the volumes and logs of the servers behind")
    options = parser.parse_args(argv)
    options.systems = options.systems.split(",")
    options.rounds = options.rounds or (1 if options.quick else 3)
    if unknown := [name for name in options.systems if name not in SYSTEMS]:
        parser.error(f"no such system: {', '.join(unknown)}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    wanted = wanted_figures(options.only)
    if os.geteuid() != 0:
        raise SystemExit("bench: needs root (mounts, dropped caches)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mounts.enter_private_namespace()
    base = Path(tempfile.mkdtemp(prefix="bench.", dir=options.dir))
    try:
        scale = QUICK if options.quick else FULL
        trees = sources.make(base, scale.tree_files)
        comparison = Comparison(scale, lambda root: Plan(root, scale, trees))
        environment = peers.PeersEnvironment(options.peers_venv)
        try:
            comparison.mount(SYSTEMS[name](base, environment) for name in options.systems)
            if not comparison.systems:
                raise SystemExit("bench: nothing to measure")
            comparison.run(wanted, options.rounds)
        finally:
            comparison.unmount()
    finally:
        if options.keep:
            say(f"left behind: {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)
    print(figures_tables(comparison, wanted, GOALS))
    print()
    print(server_table(comparison))
    for line in errors(comparison):
        print(line)
    for line in shortfalls(comparison.results):
        print(line)
    if options.json:
        conditions = {"quick": options.quick, "rounds": options.rounds}
        report.write_json(options.json, {**document(comparison), **conditions})


if __name__ == "__main__":
    main()
