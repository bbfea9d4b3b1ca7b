"""What becomes of the uncommitted changes of one file: bytes in its inode row, or runs that go into segments."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from polefs.data.ranges import BASE, HOLE, Absent, Chunk, DataSource, Piece
from polefs.data.reader import Reader
from polefs.data.replica import Replica
from polefs.data.segments import DataPiece, Run, cut_runs, whole_replica
from polefs.data.state import FileState
from polefs.meta.model import FILE_SIZE_MAX, INLINE_MAX, DataCommit, Extent, Inode, Segment

ADOPT_MIN: Final = 1 << 20
"""A file from this size on whose whole contents are in a replica is handed over without copying, bytes."""

_EXTENTS: Final = 128
"""Extents a metadata transaction: one takes about 10 us of the event loop."""


class Plan:
    """The ``depth`` oldest layers of a file, on their way. What is committed first takes the ``drops`` along."""

    __slots__ = ("adopt", "depth", "divided", "drops", "inline", "pieces", "runs", "size", "state", "whole")

    def __init__(self, state: FileState, depth: int) -> None:
        self.state = state
        self.depth = depth
        self.size = state.layers[depth - 1].size
        self.drops: list[tuple[int, int]] = []
        self.inline: bytes | None = None
        self.pieces: list[DataPiece] = []
        self.adopt: Replica | None = None
        """The local file that is the file's whole contents."""
        self.whole = False
        """The commit must not be divided: what is inline now is among its extents."""
        self.divided = False
        """It is stored in several segments, and settled one after the other."""
        self.runs: deque[Run] = deque()
        """What is not stored yet."""

    def take(self, room: int) -> list[Run]:
        """The next runs, as far as they fit."""
        taken: list[Run] = []
        while self.runs and self.runs[0].end - self.runs[0].start <= room:
            run = self.runs.popleft()
            room -= run.end - run.start
            taken.append(run)
        return taken

    def commit(self, extents: list[Extent]) -> DataCommit:
        """Of this part of it; the first call takes everything along that is no extent."""
        # The time is read as late as this: the user may have set it while the contents were being written.
        mtime = None
        for layer in self.state.layers[: self.depth]:
            if layer.mtime is not None:
                mtime = layer.mtime
        drops, self.drops = self.drops, []
        return DataCommit(self.state.ino, self.size, mtime, drops, extents, self.inline)


async def make_plan(state: FileState, depth: int, inode: Inode, reader: Reader, *, adopting: bool) -> Plan:
    """``inode`` is the file as it is committed, right now; ``adopting``: the store may take local files as they are.
    OSError when contents that are needed cannot be read."""
    plan = Plan(state, depth)
    size = plan.size
    stored = inode.allocated > 0 or inode.inline is not None
    if size <= INLINE_MAX:
        await _plan_small(plan, inode, reader)
        return plan
    for start, end, source in state.resolve(0, FILE_SIZE_MAX, depth):
        if not isinstance(source, Absent):
            plan.pieces.append((start, end, source))
        elif source is HOLE:
            if stored:
                plan.drops.append((start, end))
        elif inode.inline is not None and start < len(inode.inline):
            # Too large to be inline from now on: what was is carried over.
            stop = min(end, len(inode.inline))
            plan.pieces.append((start, stop, Chunk(0, inode.inline)))
            plan.whole = True
    if inode.inline is not None and all(_is_of(source, inode.inline) for _, _, source in plan.pieces):
        # Nothing is added: it may stay inline.
        plan.pieces = []
        plan.whole = False
    plan.runs.extend(cut_runs(plan.pieces))
    if adopting and size >= ADOPT_MIN:
        plan.adopt = whole_replica(plan.pieces, size)
    return plan


async def _plan_small(plan: Plan, inode: Inode, reader: Reader) -> None:
    size = plan.size
    pieces: list[Piece] = plan.state.resolve(0, size, plan.depth) if size else []
    kept = inode.size > 0 and inode.allocated > 0 and any(source is BASE for _, _, source in pieces)
    if not kept and all(isinstance(source, Absent) for _, _, source in pieces):
        if inode.allocated or inode.inline is not None:
            plan.drops = [(0, FILE_SIZE_MAX)]
        return
    plan.inline = b"".join(await reader.pieces(inode, pieces))


def _is_of(source: DataSource, data: bytes) -> bool:
    return isinstance(source, Chunk) and source.data is data


def extents_of(runs: Iterable[Run], segment: int, offset: int) -> list[Extent]:
    """The extents of a file whose ``runs`` stand in a segment from ``offset`` on."""
    extents: list[Extent] = []
    for run in runs:
        length = run.end - run.start
        last = extents[-1] if extents else None
        if last is not None and last.end == run.start:
            extents[-1] = Extent(last.offset, last.length + length, segment, last.segment_offset)
        else:
            extents.append(Extent(run.start, length, segment, offset))
        offset += length
    return extents


def transactions(
    parts: Iterable[tuple[Plan, list[Extent]]], segments: dict[int, Segment]
) -> Iterator[tuple[list[Segment], list[tuple[Plan, DataCommit]]]]:
    """The commits of these parts in transactions of about ``_EXTENTS`` extents; one that must not be divided is not. A
    segment goes with the first extent that refers to it; without one it is dead."""
    left = dict(segments)
    commits: list[tuple[Plan, DataCommit]] = []
    used: list[Segment] = []
    count = 0
    for plan, extents in parts:
        first = 0
        while not plan.state.gone:
            stop = len(extents) if plan.whole else min(len(extents), first + _EXTENTS - count)
            some = extents[first:stop]
            commits.append((plan, plan.commit(some)))
            used += [left.pop(number) for number in {extent.segment for extent in some} if number in left]
            count += len(some)
            first = stop
            if count >= _EXTENTS:
                yield used, commits
                commits, used, count = [], [], 0
            if first >= len(extents):
                break
    if commits or left:
        yield [*used, *left.values()], commits
