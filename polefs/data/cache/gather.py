"""The contents of a range of a file, fetched from the segments that hold its extents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from polefs.data.frames import Buffer
from polefs.data.reader import zeros
from polefs.meta.model import Extent

_NEAR: Final = 128 << 10
"""Bytes between two pieces of a segment that are fetched along with them: cheaper than another request."""

_TOGETHER: Final = 4 << 20
"""Most bytes of pieces that are fetched together."""


class SegmentReader(Protocol):
    async def read(self, segment: int, start: int, end: int) -> list[Buffer]: ...


class _Job:
    """Bytes ``[start, end)`` of a segment, and where they go: ``(place in the file, start, end)``."""

    __slots__ = ("end", "pieces", "segment", "start")

    def __init__(self, segment: int, start: int, end: int) -> None:
        self.segment = segment
        self.start = start
        self.end = end
        self.pieces: list[tuple[int, int, int]] = []


async def gather(segments: SegmentReader, extents: Sequence[Extent], start: int, end: int) -> list[Buffer]:
    """The bytes of the range, in parts to be joined, through the extents that overlap it; the rest is zero. Errors as
    of ``Segments``."""
    jobs = _jobs(extents, start, end)
    if len(jobs) == 1:
        contents = [await segments.read(jobs[0].segment, jobs[0].start, jobs[0].end)]
    else:
        contents = list(await asyncio.gather(*(segments.read(job.segment, job.start, job.end) for job in jobs)))
    pieces = [
        (place, cut(parts, job.start, first, last))
        for job, parts in zip(jobs, contents, strict=True)
        for place, first, last in job.pieces
    ]
    pieces.sort(key=_place)
    found: list[Buffer] = []
    position = start
    for place, parts in pieces:
        found += zeros(place - position)
        found += parts
        position = place + sum(map(len, parts))
    return found + zeros(end - position)


def _place(piece: tuple[int, list[Buffer]]) -> int:
    return piece[0]


def _jobs(extents: Sequence[Extent], start: int, end: int) -> list[_Job]:
    """What to fetch: pieces that lie near to each other in one segment together."""
    jobs: list[_Job] = []
    for extent in sorted(extents, key=lambda extent: (extent.segment, extent.segment_offset)):
        place = max(extent.offset, start)
        stop = min(extent.end, end)
        if place >= stop:
            continue
        first = extent.segment_offset + place - extent.offset
        last = first + stop - place
        job = jobs[-1] if jobs else None
        if job is None or job.segment != extent.segment or first - job.end > _NEAR or last - job.start > _TOGETHER:
            job = _Job(extent.segment, first, last)
            jobs.append(job)
        job.end = max(job.end, last)
        job.pieces.append((place, first, last))
    return jobs


def cut(parts: Sequence[Buffer], base: int, start: int, end: int) -> list[Buffer]:
    """The bytes from ``start`` to ``end`` of parts that begin at ``base``; not copied."""
    found: list[Buffer] = []
    for part in parts:
        stop = base + len(part)
        if stop > start and base < end:
            first, last = max(start - base, 0), min(end - base, len(part))
            found.append(part if last - first == len(part) else memoryview(part)[first:last])
        base = stop
    return found
