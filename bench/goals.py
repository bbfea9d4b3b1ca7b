"""What polefs embedded must reach against JuiceFS, figure by figure."""

from __future__ import annotations

from collections.abc import Mapping

from bench.figures import FULL, Plan, Sources
from bench.report import ratio
from bench.runner import Results

THREEFOLD = {
    *("create_1p", "create_4p", "rename", "unlink", "mkdir", "rmdir", "write4k_file"),
    *("untar", "cp_r", "rm_rf", "git_clone", "randwrite4k_fsync", "sqlite_tx_delete", "sqlite_tx_wal"),
}
GOALS = {
    name: 3.0 if name in THREEFOLD else 1.0
    for group in Plan("", FULL, Sources("", "")).groups()
    for name in group.figures()
}


def shortfalls(results: Mapping[str, Results]) -> list[str]:
    """A line for each figure of polefs that stays below its goal, worst first. Empty without both systems."""
    if not {"polefs", "juicefs"} <= results.keys():
        return []
    short = []
    for name, goal in GOALS.items():
        mine, theirs = (results[system].figures.get(name) for system in ("polefs", "juicefs"))
        reached = ratio(mine, theirs)
        if reached is not None and reached < goal:
            short.append((reached / goal, f"short of its goal: {name} {reached:.2f} of JuiceFS, goal {goal:g}"))
    return [line for _, line in sorted(short)]
