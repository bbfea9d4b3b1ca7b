"""The progress bar of writing back, on a terminal; silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable


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
