"""The throughput benchmark of one directory: ``python -m bench.throughput DIR``.

It makes a work directory in DIR and removes it at the end. Figures after dropped caches need root, figures after a
remount need ``--remount``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import report, servers, sources
from bench.figures import FULL, QUICK, Plan, Sources, Step
from bench.runner import CLIENT, Results, StepError, run_group, run_step


@dataclass
class Directory:
    """A directory of a file system that somebody else has mounted."""

    name: str
    root: str
    server_pid: int | None = None
    remount_command: str | None = None
    client: Sequence[str] = CLIENT

    def trouble(self) -> str:
        return ""

    def usage(self) -> servers.Usage | None:
        return servers.usage(self.server_pid) if self.server_pid else None

    def abort(self) -> None:
        """The server is not ours."""

    def remount(self) -> bool:
        if not self.remount_command:
            return False
        subprocess.run(self.remount_command, shell=True, check=True, stdout=subprocess.DEVNULL)
        return True


def wanted_figures(only: str | None) -> list[str]:
    """All figures, or those of a comma list. SystemExit for an unknown name."""
    names = [name for group in Plan("", FULL, Sources("", "")).groups() for name in group.figures()]
    if not only:
        return names
    chosen = [name.strip() for name in only.split(",")]
    if unknown := [name for name in chosen if name not in names]:
        raise SystemExit(f"bench: no such figure: {', '.join(unknown)}; there are: {', '.join(names)}")
    return [name for name in names if name in chosen]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="about a quarter of the work")
    parser.add_argument("--only", metavar="NAME,...", help="these figures (and what they need)")
    parser.add_argument("--rounds", type=int, default=1, help="run each group so often; the median counts")
    parser.add_argument(
        "--server-pid", type=int, help="report the CPU time and memory of this process and its children"
    )
    parser.add_argument("--remount", metavar="COMMAND", help="a shell command that mounts anew with empty local caches")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    wanted = wanted_figures(options.only)
    scale = QUICK if options.quick else FULL
    root = os.path.join(os.path.abspath(options.directory), f"bench.{os.getpid()}")
    target = Directory(options.directory, root, options.server_pid, options.remount)
    results = Results()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench.", dir="/var/tmp") as base:
        plan = Plan(root, scale, sources.make(Path(base), scale.tree_files))
        try:
            for group in plan.chosen(wanted):
                for _ in range(options.rounds):
                    run_group(target, group, wanted, scale, results)
        finally:
            try:
                run_step(target, Step("remove", {"paths": [root]}))
            except StepError as error:
                print(f"bench: {root} could not be removed: {error}", file=sys.stderr)
    if unmeasured := [name for name in wanted if name not in results.figures]:
        print(f"not measured without --remount: {', '.join(unmeasured)}")
    usage = target.usage()
    figures = results.figures.items()
    rows = [[name, figure.unit, report.cell(figure), report.microseconds(figure)] for name, figure in figures]
    print(report.table(["figure", "unit", options.directory, "server us/op" if usage else ""], rows))
    for name, figure in figures:
        if figure.error:
            print(f"{name}: {figure.error}")
    print(f"clients: {results.client_cpu:.1f} s CPU; {time.monotonic() - start:.0f} s in all")
    if usage:
        print(f"server: {usage.cpu_seconds:.1f} s CPU, {usage.peak_mib:.0f} MiB peak")
    if options.json:
        server = {"cpu_seconds": usage.cpu_seconds, "peak_mib": usage.peak_mib} if usage else None
        document = {"machine": report.machine(), "quick": options.quick, "server": server}
        report.write_json(options.json, {**document, **report.results_json(results)})


if __name__ == "__main__":
    main()
