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
from collections.abc import Sequence
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

    def __init__(self, base: Path, scale: Scale) -> None:
        self._base = base
        self._scale = scale
        self._sources = sources.make(base, scale.tree_files)
        self.systems: list[System] = []
        self.results: dict[str, Results] = {}

    def mount(self, names: Sequence[str], environment: peers.PeersEnvironment) -> None:
        """Those that are missing or do not start are left out, with a line that says why."""
        for name in names:
            system = SYSTEMS[name](self._base, environment)
            try:
                system.prepare()
                system.mount()
            except (peers.Missing, ServerError) as error:
                say(f"{name} is left out: {error}")
                continue
            say(f"{name}: server process {system.server_pid()}" if system.server_pid() else f"{name}: {system.root}")
            self.systems.append(system)
            self.results[name] = Results()

    def run(self, wanted: Sequence[str], rounds: int) -> None:
        groups = {system.name: Plan(system.root, self._scale, self._sources).chosen(wanted) for system in self.systems}
        count = max(len(chosen) for chosen in groups.values())
        order = list(self.systems)
        for number in range(rounds):
            for position in range(count):
                for system in order:
                    group = groups[system.name][position]
                    start = time.monotonic()
                    try:
                        system.revive()
                        run_group(system, group, wanted, self._scale, self.results[system.name])
                    except (StepError, ServerError) as error:
                        say(f"{system.name}: {group.name}: {error}")
                    seconds = time.monotonic() - start
                    say(f"round {number + 1}: {group.name}: {system.name}: {seconds:.1f} s")
                order.reverse()

    def unmount(self) -> None:
        for system in self.systems:
            try:
                system.unmount()
            except ServerError as error:
                say(f"{system.name}: {error}")


def say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def figures_table(comparison: Comparison, wanted: Sequence[str]) -> str:
    """A column for each system, and one for polefs's ratio to each other one."""
    names = [system.name for system in comparison.systems]
    others = [name for name in names if name != "polefs"] if "polefs" in names else []
    rows = []
    for figure in wanted:
        found = {name: comparison.results[name].figures.get(figure) for name in names}
        unit = next((value.unit for value in found.values() if value), "")
        ratios = [report.ratio(found["polefs"], found[other]) for other in others]
        goal = [f"{GOALS[figure]:g}"] if "juicefs" in others else []
        cells = [report.cell(found[name]) for name in names]
        rows.append([figure, unit, *cells, *(report.number(ratio) for ratio in ratios), *goal])
    header = [
        "figure",
        "unit",
        *names,
        *(f"polefs/{other}" for other in others),
        *(["goal"] if "juicefs" in others else []),
    ]
    return report.table(header, rows)


def server_table(comparison: Comparison) -> str:
    rows = []
    for system in comparison.systems:
        usage = system.usage()
        cpu, peak = (f"{usage.cpu_seconds:.1f}", f"{usage.peak_mib:.0f}") if usage else ("", "")
        unmounts = ", ".join(f"{seconds:.1f}" for seconds in system.unmount_seconds)
        rows.append([system.name, cpu, peak, f"{comparison.results[system.name].client_cpu:.1f}", unmounts])
    return report.table(["", "server CPU s", "server peak MiB", "clients CPU s", "unmounts s"], rows)


def document(comparison: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    systems = {}
    for system in comparison.systems:
        usage = system.usage()
        systems[system.name] = {
            **report.results_json(comparison.results[system.name]),
            "server": {"cpu_seconds": usage.cpu_seconds, "peak_mib": usage.peak_mib} if usage else None,
            "unmount_seconds": system.unmount_seconds,
        }
    return {"machine": report.machine(), "quick": options.quick, "rounds": options.rounds, "systems": systems}


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
        comparison = Comparison(base, QUICK if options.quick else FULL)
        try:
            comparison.mount(options.systems, peers.PeersEnvironment(options.peers_venv))
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
    print(figures_table(comparison, wanted))
    print()
    print(server_table(comparison))
    for name, results in comparison.results.items():
        for figure, value in results.figures.items():
            if value.error:
                print(f"{name}: {figure}: {value.error}")
    for line in shortfalls(comparison.results):
        print(line)
    if options.json:
        report.write_json(options.json, document(comparison, options))


if __name__ == "__main__":
    main()
