"""Results as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import peers
from bench.runner import ERROR, Figure, Results


def number(value: float | None) -> str:
    """Three or four significant digits, thousands separated."""
    if value is None:
        return ""
    if value >= 100:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:.3g}"


def cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return ERROR if figure.error else number(figure.median())


def ratio(mine: Figure | None, theirs: Figure | None) -> float | None:
    """None where one of them has no value."""
    if not mine or not theirs:
        return None
    value, other = mine.median(), theirs.median()
    return value / other if value is not None and other else None


def rated(mine: Figure, first: Figure) -> str:
    """A cell, and its ratio to that of the first system."""
    value = ratio(mine, first)
    return cell(mine) if mine is first or value is None else f"{cell(mine)} ({value:.2f})"


def microseconds(figure: Figure | None) -> str:
    """Server CPU time per operation."""
    return number(statistics.median(figure.server_us)) if figure and figure.server_us else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join(
            [first, *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def figure_json(figure: Figure) -> dict[str, Any]:
    """All rounds of a figure."""
    document: dict[str, Any] = {
        "unit": figure.unit,
        "median": figure.median(),
        "values": figure.values,
        "server_us_per_operation": figure.server_us,
    }
    return document | ({"error": figure.error} if figure.error else {})


def results_json(results: Results) -> dict[str, Any]:
    """Figures of one target."""
    return {
        "figures": {name: figure_json(figure) for name, figure in results.figures.items()},
        "client_cpu_seconds": results.client_cpu,
    }


def draw(python: str, path: str, document: Mapping[str, Any]) -> None:
    """The ``comparisons`` of a document as a PNG under its ``title``, drawn by a Python that has matplotlib.
    `peers.Missing`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(document, file)
        file.flush()
        peers.run("draw the chart", [python, str(Path(__file__).with_name("chart.py")), file.name, path])


def write_json(path: str, document: Mapping[str, Any]) -> None:
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
