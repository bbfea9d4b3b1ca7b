"""What garbage collection tells."""

from __future__ import annotations

import msgspec


class GarbageReport(msgspec.Struct):
    """What a pass has done, or would do. Bytes are those in the store, but for ``moved_bytes``: contents."""

    dry_run: bool = False
    rewritten_segments: int = 0
    moved_bytes: int = 0
    damaged_segments: int = 0
    """Half-dead ones that could not be read; the log tells which, and why."""
    dead_objects: int = 0
    dead_bytes: int = 0
    lost_objects: int = 0
    """Objects that no metadata knows."""
    lost_bytes: int = 0
    uploads: int = 0
    """Uploads in parts that nobody goes on with."""
    waiting_objects: int = 0
    """Objects of dead segments whose grace time is not over."""


class Phase(msgspec.Struct, frozen=True):
    """What a pass is at. ``total`` is None while nobody knows it; both are bytes in ``rewriting``, else objects."""

    name: str
    done: int = 0
    total: int | None = None
