"""Progress bars, on a terminal; silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from polefs.data.report import Phase
from polefs.node.sizes import format_size


def show_progress(remaining: Iterable[int], what: str) -> None:
    """Consume the numbers of bytes that still have to be written back and show them as a bar."""
    if not sys.stderr.isatty():
        for _ in remaining:
            pass
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = 0
        task = progress.add_task(what, total=None)
        for left in remaining:
            total = max(total, left)
            progress.update(task, total=total, completed=total - left)


@contextmanager
def show_phases() -> Iterator[Callable[[Phase], None]]:
    """Shows the phases that the function is called with."""
    if not sys.stderr.isatty():
        yield lambda phase: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, count="")
        shown = ""

        def show(phase: Phase) -> None:
            nonlocal task, shown
            if phase.name != shown:
                # A task that has had a total cannot be without one again.
                progress.remove_task(task)
                task, shown = progress.add_task(phase.name, total=phase.total, count=""), phase.name
            count = str(phase.done)
            if phase.total is not None:
                count = f"{format_size(phase.done)} of {format_size(phase.total)}"
            progress.update(task, completed=phase.done, total=phase.total, count=count if phase.done else "")

        yield show
