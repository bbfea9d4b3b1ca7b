"""Draws what ``bench.requests`` or ``bench.s3compare`` has measured: ``chart.py FIGURES.json CHART.png``, in the
environment of the peers."""

# The environment of the peers has matplotlib, the project's has not.
# mypy: ignore-errors

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = ["#444444", "#1b6ca8", "#5aa9e6", "#9ad1f5", "#e07a5f", "#c1272d", "#f2b134", "#7a9e7e"]

HIGHEST = 3
"""Bars are cut there."""


def draw(axes, title, systems):
    """Grouped bars: each figure relative to the first system, its median above the bar."""
    names = list(systems)
    figures = list(systems[names[0]]["figures"])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        for position, figure in enumerate(figures):
            found = [systems[system]["figures"].get(figure) for system in (name, names[0])]
            if not all(found) or not all(each["median"] for each in found):
                continue
            mine, first = (each["median"] for each in found)
            height = min(mine / first, HIGHEST)
            place = position + (number - len(names) / 2 + 0.5) * width
            label = name if position == 0 else None
            axes.bar(place, height, width * 0.95, color=COLOURS[number % len(COLOURS)], label=label)
            text = f"{mine / 1000:.1f}k" if mine >= 1000 else f"{mine:.0f}"
            axes.text(place, height, text, ha="center", va="bottom", fontsize=5, rotation=90)
    units = [systems[names[0]]["figures"][figure]["unit"] for figure in figures]
    labels = [f"{figure}\n{unit}" for figure, unit in zip(figures, units, strict=True)]
    axes.set_xticks(range(len(figures)), labels, fontsize=6, rotation=30, ha="right")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_ylabel(f"relative to {names[0]}")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, ncols=len(names), frameon=False)
    axes.margins(x=0.01, y=0.15)


def main():
    with open(sys.argv[1]) as file:
        document = json.load(file)
    comparisons = {title: systems for title, systems in document["comparisons"].items() if systems}
    figure, rows = pyplot.subplots(len(comparisons), 1, figsize=(13, 5 * len(comparisons)), squeeze=False)
    for (axes,), (title, systems) in zip(rows, comparisons.items(), strict=True):
        draw(axes, title, systems)
    machine = document["machine"]
    told = f"Linux {machine['kernel']}, {machine['cpus']} CPUs, Python {machine['python']}, load {machine['load']:.1f}"
    figure.suptitle(f"{document['title']}: {told}", fontsize=9)
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=130)


if __name__ == "__main__":
    main()
