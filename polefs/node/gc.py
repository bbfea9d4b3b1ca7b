"""Garbage collection of a volume that is not mounted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from polefs.data.report import GarbageReport, Phase
from polefs.node.storage import open_storage

if TYPE_CHECKING:
    from polefs.node.volume import Volume

_INTERVAL: Final = 0.2
"""Between two calls of ``show``, seconds."""


async def collect_garbage(
    volume: Volume, show: Callable[[Phase], None], *, dry_run: bool, grace: float | None, secret: bytes | None
) -> GarbageReport:
    """One pass over a locked volume; what a killed daemon has left is written back first. ``grace``: seconds, None: as
    the volume has it. OSError when that fails, or the object store or the metadata do."""
    # Contents only change by what is brought in.
    storage = await open_storage(volume, secret, use_cache=bool(os.listdir(volume.local)))
    try:
        await storage.files.flush()
        garbage = storage.files.garbage
        collecting = asyncio.create_task(garbage.collect(grace=grace, dry_run=dry_run))
        while not collecting.done():
            if garbage.phase is not None:
                show(garbage.phase)
            await asyncio.wait({collecting}, timeout=_INTERVAL)
        return collecting.result()
    finally:
        await storage.close()
