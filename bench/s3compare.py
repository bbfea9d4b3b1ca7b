"""polefs with its contents in S3 beside its peers, on one S3 server, in one run: ``python -m bench.s3compare``.

All are mounted at once in a mount namespace of this run, with their caches and the server's data on one disk, and
measured group by group in turn (A B, then B A), so that noise of the machine meets all of them. Needs root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import mounts, peers, report, sources
from bench.compare import Comparison, document, errors, figures_tables, say, server_table
from bench.figures import FULL, MIB, Scale, Sources
from bench.goals import S3_GOALS, S3_MEMORY_MIB, s3_goals
from bench.s3figures import S3Plan
from bench.s3systems import S3_SYSTEMS, Plain
from bench.systems import System
from polefs.node.errors import Refusal
from polefs.node.sizes import parse_size
from tests.s3.server import SeaweedServer, ServerError

NAMES = (*S3_SYSTEMS, Plain.name)


def figures(only: str | None) -> list[str]:
    """All, or those of a comma list. SystemExit for an unknown name."""
    names = [name for group in S3Plan("", FULL, Sources("", "")).groups() for name in group.figures()]
    chosen = only.split(",") if only else names
    if unknown := [name for name in chosen if name not in names]:
        raise SystemExit(f"bench: no such figure: {', '.join(unknown)}; there are: {', '.join(names)}")
    return [name for name in names if name in chosen]


def verdicts(comparison: Comparison) -> Iterator[str]:
    """A line for each goal that was missed, and one for all that were reached."""
    reached = 0
    for goal, share in s3_goals(comparison.results):
        if share >= goal.share:
            reached += 1
        else:
            yield f"SHORT: {goal.figure}: polefs does {share:.2f} of {goal.other}, goal {goal.share:g}"
    for system in comparison.systems:
        usage = system.usage()
        if system.name == "polefs" and usage is not None:
            verdict = "reached" if usage.peak_mib <= S3_MEMORY_MIB else "SHORT"
            yield f"{verdict}: polefs took {usage.peak_mib:.0f} MiB at most, goal {S3_MEMORY_MIB:g}"
    yield f"reached: {reached} goals of speed"


def compare(options: argparse.Namespace, wanted: Sequence[str], scale: Scale, base: Path) -> Comparison:
    trees = sources.make(base, scale.tree_files)
    environment = peers.PeersEnvironment(options.peers_venv)
    server = SeaweedServer(base / "s3")
    try:
        server.start()
        comparison = Comparison(scale, lambda root: S3Plan(root, scale, trees))
        try:
            comparison.mount(_systems(options.systems, base, environment, server))
            if not comparison.systems:
                raise SystemExit("bench: nothing to measure")
            comparison.run(wanted, options.rounds)
        finally:
            comparison.unmount()
    except ServerError as error:
        raise SystemExit(f"bench: {error}") from None
    finally:
        server.kill()
    return comparison


def _systems(
    names: Sequence[str], base: Path, environment: peers.PeersEnvironment, server: SeaweedServer
) -> Iterator[System]:
    for name in names:
        yield Plain(base, environment) if name == Plain.name else S3_SYSTEMS[name](base, environment, server)


def chart_document(told: dict[str, Any]) -> dict[str, Any]:
    """Relative to JuiceFS, where it is there."""
    names = sorted(told["systems"], key=lambda name: name != "juicefs")
    systems = {name: told["systems"][name] for name in names}
    title = f"file systems on one S3 server, files of {told['size_mib']} MiB, median of {told['rounds']}"
    groups = S3Plan("", FULL, Sources("", "")).groups()
    parts = {}
    for part, big in (("big files", True), ("small files and trees", False)):
        chosen = {
            name for group in groups if group.name.startswith(("big", "random")) == big for name in group.figures()
        }
        parts[part] = {
            name: {"figures": {key: value for key, value in system["figures"].items() if key in chosen}}
            for name, system in systems.items()
        }
    return {"title": title, "machine": told["machine"], "comparisons": parts}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.s3compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--systems", default=",".join(NAMES), help="(default: all, %(default)s)")
    parser.add_argument("--only", metavar="NAME,...", help="these figures (and what they need)")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument("--size", default="1G", help="of the big file (default: %(default)s)")
    parser.add_argument("--files", type=int, default=2000, help="small files, of each size (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--chart", metavar="FILE.png", help="draw them there (with matplotlib, among the peers)")
    parser.add_argument("--dir", default="/var/tmp", help="where all data lie (default: %(default)s)")
    parser.add_argument("--peers-venv", metavar="PATH", help="virtual environment of the peers; made when missing")
    parser.add_argument("--keep", action="store_true", help="leave the data and the logs of the servers behind")
    options = parser.parse_args(argv)
    options.systems = options.systems.split(",")
    if unknown := [name for name in options.systems if name not in NAMES]:
        parser.error(f"no such system: {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    try:
        options.mib = max(parse_size(options.size) // MIB, 1)
    except Refusal as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    wanted = figures(options.only)
    if os.geteuid() != 0:
        raise SystemExit("bench: needs root (mounts, dropped caches)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mounts.enter_private_namespace()
    base = Path(tempfile.mkdtemp(prefix="bench.", dir=options.dir))
    scale = replace(FULL, big_mib=options.mib, small_files=options.files, random_reads=1000)
    try:
        comparison = compare(options, wanted, scale, base)
    finally:
        if options.keep:
            say(f"left behind: {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)
    juicefs = {goal.figure: goal.share for goal in S3_GOALS if goal.other == "juicefs"}
    print(figures_tables(comparison, wanted, juicefs))
    print()
    print(server_table(comparison))
    for line in (*errors(comparison), *verdicts(comparison)):
        print(line)
    told = {**document(comparison), "size_mib": options.mib, "files": options.files, "rounds": options.rounds}
    if options.json:
        report.write_json(options.json, told)
    if options.chart:
        try:
            python = peers.PeersEnvironment(options.peers_venv).program("matplotlib")
            report.draw(python, options.chart, chart_document(told))
        except peers.Missing as error:
            raise SystemExit(f"bench: {error}") from None


if __name__ == "__main__":
    main()
