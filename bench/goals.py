"""What is to be reached: polefs embedded against JuiceFS, figure by figure, and rawfuse against other libraries."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bench.figures import FULL, Plan, Sources
from bench.report import ratio
from bench.runner import Figure, Results
from bench.s3figures import SMALL_KIB, S3Plan

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


class S3Goal(NamedTuple):
    """polefs must reach ``share`` of what ``other`` does in this figure of ``bench.s3compare``."""

    figure: str
    other: str
    share: float


S3_MEMORY_MIB = 300.0
"""The most that polefs may take under all of it."""

_S3_THREEFOLD = {f"write{size}k_{kind}" for size in SMALL_KIB for kind in ("file", "fsync")}
S3_GOALS = [
    *(
        S3Goal(figure, other, 3.0 if figure in _S3_THREEFOLD else 1.0)
        for group in S3Plan("", FULL, Sources("", "")).groups()
        for figure in group.figures()
        for other in ("juicefs", "juicefs-redis")
    ),
    *(S3Goal(figure, "raw", 0.8) for figure in ("seqwrite", "seqread_cold")),
    *(S3Goal(figure, "plain", 0.9) for figure in ("seqread_warm", "seqread_hot", "randread4k_warm", "randread4k_hot")),
]


def s3_goals(results: Mapping[str, Results]) -> Iterator[tuple[S3Goal, float]]:
    """Each goal whose figures there are, and the share that was reached."""
    for goal in S3_GOALS:
        found = (results[name].figures.get(goal.figure) if name in results else None for name in ("polefs", goal.other))
        reached = ratio(*found)
        if reached is not None:
            yield goal, reached


class RequestGoal(NamedTuple):
    """``system`` must reach ``share`` of what ``other`` does in this figure of ``bench.requests``."""

    comparison: str
    figure: str
    system: str
    other: str
    share: float


_NULL, _SHOWN = "null file system", "a directory shown again"
REQUEST_GOALS = [
    *(RequestGoal(_NULL, f"{name}_1c", "rawfuse", "floor", 0.5) for name in ("stat", "missing")),
    *(RequestGoal(_NULL, f"{name}_4c", "rawfuse", "floor", 0.65) for name in ("stat", "missing")),
    *(
        RequestGoal(_NULL, f"{name}_{clients}c", "rawfuse", other, share)
        for other, share in (("pyfuse3", 3.0), ("mfusepy", 1.2))
        for name in ("stat", "missing")
        for clients in (1, 4)
    ),
    RequestGoal(_SHOWN, "read1m_1c", "mirror-served", "passthrough_ll", 0.9),
    RequestGoal(_SHOWN, "read1m_1c", "mirror", "plain", 0.95),
]
RequestFigures = Mapping[str, Mapping[str, Mapping[str, Figure]]]


def request_goals(figures: RequestFigures) -> Iterator[str]:
    """A line for each goal whose figures there are."""
    for goal in REQUEST_GOALS:
        systems = figures.get(goal.comparison, {})
        mine, theirs = (systems.get(name, {}).get(goal.figure) for name in (goal.system, goal.other))
        reached = ratio(mine, theirs)
        if reached is not None:
            verdict = "reached" if reached >= goal.share else "SHORT"
            yield f"{verdict}: {goal.figure}: {goal.system} does {reached:.2f} of {goal.other}, goal {goal.share:g}"


def favoured_transport(figures: RequestFigures) -> Iterator[str]:
    """One line, when rawfuse was measured over several transports: each against the device, all figures together."""
    systems = figures.get(_NULL, {})
    plain = systems.get("rawfuse", {})
    means = {}
    for name, found in systems.items():
        ratios = [reached for figure in plain if (reached := ratio(found.get(figure), plain[figure])) is not None]
        if name.startswith("rawfuse") and ratios:
            means[name] = statistics.geometric_mean(ratios)
    if len(means) > 1:
        told = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        yield f"transport: {max(means, key=lambda name: means[name])} is the fastest here ({told})"
