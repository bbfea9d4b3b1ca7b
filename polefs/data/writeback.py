"""Write-back: the sealed layers of many files become objects and one metadata transaction a batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from typing import Final

import msgspec

from polefs.data.frames import Codec
from polefs.data.ranges import BASE, HOLE, Chunk, Piece
from polefs.data.reader import Reader
from polefs.data.replica import Replica
from polefs.data.segments import (
    DataPiece,
    Run,
    SegmentIds,
    cut_runs,
    discard_uncommitted,
    load,
    pack,
    prepare_adoption,
    whole_replica,
)
from polefs.data.state import FileState
from polefs.meta.api import MetaAPI
from polefs.meta.model import FILE_SIZE_MAX, INLINE_MAX, DataCommit, Extent, Inode, Segment
from polefs.objects.base import ObjectStore, segment_key

log = logging.getLogger(__name__)

_BATCH_FILES: Final = 32
_BATCH_BYTES: Final = 16 << 20
"""A batch is closed when it has this many files or bytes."""

_EXTENTS: Final = 128
"""Extents a metadata transaction: one takes about 10 us of the event loop."""

_BATCHES: Final = 3
"""Batches in flight."""

_SEGMENTS: Final = 3
"""Segments held in memory at a time while they are written."""

ADOPT_MIN: Final = 1 << 20
"""A file from this size on whose whole contents are in a replica is handed over without copying, bytes."""


class Work(msgspec.Struct):
    """The ``depth`` oldest layers of a file are to be written back."""

    state: FileState
    depth: int


class _Plan(msgspec.Struct):
    """How one file is committed: inline, or as pieces that become extents; ``adopt`` is the replica that is the
    file."""

    work: Work
    size: int
    drops: list[tuple[int, int]]
    inline: bytes | None = None
    pieces: list[DataPiece] = []
    adopt: Replica | None = None
    extents: list[Extent] = []
    at_once: bool = False
    """The commit must not be divided: what is inline now is among its extents."""

    @property
    def bytes(self) -> int:
        return 0 if self.adopt else sum(end - start for start, end, _ in self.pieces)


class WriteBack:
    """``changing(commits)`` encloses each change of the metadata, ``settled(state, depth)`` is called in the loop turn
    in which a file's last commit returns, ``keep`` then gets the pieces that are its contents now, as ``(ino, pieces,
    size)``, and ``taken(segment)`` is called before a segment's object is written."""

    def __init__(
        self,
        meta: MetaAPI,
        objects: ObjectStore,
        codec: Codec | None,
        reader: Reader,
        threads: Executor,
        changing: Callable[[Sequence[DataCommit]], AbstractAsyncContextManager[None]],
        settled: Callable[[FileState, int], None],
        keep: Callable[[Sequence[tuple[int, Sequence[DataPiece], int]]], Awaitable[None]] | None,
        taken: Callable[[int], None],
    ) -> None:
        self._meta = meta
        self._objects = objects
        self._codec = codec
        self._reader = reader
        self._threads = threads
        self._changing = changing
        self._settled = settled
        self._keep = keep
        self.doubtful: list[int] = []
        """Segments that were written while it is not known whether they were committed."""
        self._committing: dict[int, DataCommit] = {}
        self._slots = asyncio.Semaphore(_SEGMENTS)
        self.ids = SegmentIds(meta, taken)

    async def commit(self, works: Iterable[Work]) -> None:
        """Write back all of these; not called again before it has returned. A file that fails stays as it is, the
        others go on; the first failure is raised at the end (OSError)."""
        await discard_uncommitted(self._meta, self.doubtful)
        self.doubtful.clear()
        running: set[asyncio.Task[None]] = set()
        errors: list[BaseException] = []

        async def reap(limit: int) -> None:
            nonlocal running
            while len(running) > limit:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                errors.extend(error for task in done if (error := task.exception()) is not None)

        batch: list[_Plan] = []
        size = 0
        for work in works:
            try:
                plan = await self._plan(work)
            except OSError as error:
                errors.append(error)
                continue
            if plan is None:
                continue
            if batch and (len(batch) == _BATCH_FILES or size + plan.bytes > _BATCH_BYTES):
                await reap(_BATCHES - 1)
                running.add(asyncio.create_task(self._write(batch)))
                batch, size = [], 0
                await asyncio.sleep(0)  # requests come first: planning a batch takes a millisecond
            batch.append(plan)
            size += plan.bytes
        if batch:
            running.add(asyncio.create_task(self._write(batch)))
        await reap(0)
        if errors:
            for other in errors[1:]:
                log.error("write-back: %s", other)
            raise errors[0]

    def leave_mtime(self, ino: int) -> None:
        """A commit of this file that is waiting for its transaction leaves the modification time alone."""
        commit = self._committing.get(ino)
        if commit is not None:
            commit.mtime = None

    async def _plan(self, work: Work) -> _Plan | None:
        state = work.state
        if state.gone:
            return None
        try:
            inode = await self._meta.get_inode(state.ino)
        except FileNotFoundError:
            self._settled(state, work.depth)
            return None
        size = state.layers[work.depth - 1].size
        if size <= INLINE_MAX:
            return await self._plan_small(work, inode, size)
        plan = _Plan(work, size, [])
        stored = inode.allocated > 0 or inode.inline is not None
        for start, end, source in state.resolve(0, FILE_SIZE_MAX, work.depth):
            if isinstance(source, Chunk | Replica):
                plan.pieces.append((start, end, source))
            elif source is HOLE:
                if stored:
                    plan.drops.append((start, end))
            elif inode.inline is not None and start < len(inode.inline):
                # Too large to be inline from now on: what was is carried over.
                stop = min(end, len(inode.inline))
                plan.pieces.append((start, stop, Chunk(0, inode.inline)))
                plan.at_once = True
        if inode.inline is not None and all(_is_of(source, inode.inline) for _, _, source in plan.pieces):
            plan.pieces = []  # nothing is added: it may stay inline
        if size >= ADOPT_MIN:
            plan.adopt = whole_replica(plan.pieces, size)
        return plan

    async def _plan_small(self, work: Work, inode: Inode, size: int) -> _Plan:
        pieces: list[Piece] = work.state.resolve(0, size, work.depth) if size else []
        kept = inode.size > 0 and inode.allocated > 0 and any(source is BASE for _, _, source in pieces)
        if not kept and not any(isinstance(source, Chunk | Replica) for _, _, source in pieces):
            return _Plan(work, size, [(0, FILE_SIZE_MAX)] if inode.allocated or inode.inline is not None else [])
        parts = await self._reader.pieces(inode, pieces)
        return _Plan(work, size, [], inline=b"".join(parts))

    async def _write(self, batch: list[_Plan]) -> None:
        segments: list[Segment] = []
        try:
            await _gather([self._adopt(plan, segments) for plan in batch if plan.adopt is not None])
            runs: list[Run] = []
            for index, plan in enumerate(batch):
                if not plan.extents:
                    runs.extend(cut_runs(index, plan.pieces))
            packed = list(pack(runs))
            ids = await self.ids.take(len(packed))
            await _gather(
                [self._write_segment(number, group, segments) for number, group in zip(ids, packed, strict=True)]
            )
            for number, group in zip(ids, packed, strict=True):
                _add_extents(batch, group, number)
            for some, commits in _transactions(batch, {segment.id: segment for segment in segments}):
                await self._commit(some, commits)
        except BaseException:
            self.doubtful.extend(segment.id for segment in segments)
            raise
        for plan in batch:
            self._settled(plan.work.state, plan.work.depth)
        if self._keep is not None:
            await self._keep([(plan.work.state.ino, plan.pieces, plan.size) for plan in batch if plan.extents])

    async def _commit(self, segments: list[Segment], commits: list[DataCommit]) -> None:
        self._committing.update((commit.ino, commit) for commit in commits)
        try:
            async with self._changing(commits):
                await self._meta.commit_data(segments, commits)
        finally:
            for commit in commits:
                del self._committing[commit.ino]

    async def _write_segment(self, number: int, runs: Sequence[Run], written: list[Segment]) -> None:
        async with self._slots:
            loop = asyncio.get_running_loop()
            parts, segment = await loop.run_in_executor(self._threads, load, runs, number, self._codec)
            await self._objects.put(segment_key(number), parts)
        written.append(segment)

    async def _adopt(self, plan: _Plan, written: list[Segment]) -> None:
        """Give the store the replica itself; where that cannot be, the contents are packed like others."""
        replica = plan.adopt
        assert replica is not None
        async with self._slots:
            loop = asyncio.get_running_loop()
            frames = await loop.run_in_executor(self._threads, prepare_adoption, replica, plan.pieces, plan.size)
            if frames is None:
                return
            (number,) = await self.ids.take(1)
            if await self._objects.adopt(segment_key(number), replica.path):
                plan.extents = [Extent(0, plan.size, number, 0)]
                written.append(Segment(number, plan.size, frames))


async def _gather(work: Sequence[Coroutine[None, None, None]]) -> None:
    """Run all to their ends, then raise the first failure."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _is_of(source: Chunk | Replica, data: bytes) -> bool:
    return isinstance(source, Chunk) and source.data is data


def _add_extents(batch: Sequence[_Plan], runs: Sequence[Run], segment: int) -> None:
    offset = 0
    for run in runs:
        extents = batch[run.index].extents
        length = run.end - run.start
        last = extents[-1] if extents else None
        if last is not None and last.segment == segment and last.end == run.start:
            extents[-1] = Extent(last.offset, last.length + length, segment, last.segment_offset)
        else:
            extents.append(Extent(run.start, length, segment, offset))
        offset += length


def _transactions(
    batch: Iterable[_Plan], segments: dict[int, Segment]
) -> Iterator[tuple[list[Segment], list[DataCommit]]]:
    """The commits of a batch in transactions of about ``_EXTENTS`` extents. A file may be committed in several: its
    layers stay above them until the last. A segment goes with the first extent that refers to it; without one it
    would be dead."""
    left = dict(segments)
    commits: list[DataCommit] = []
    used: list[Segment] = []
    count = 0
    for plan in batch:
        first = 0
        while not plan.work.state.gone:
            stop = len(plan.extents) if plan.at_once else min(len(plan.extents), first + _EXTENTS - count)
            part = plan.extents[first:stop]
            commits.append(_data_commit(plan, part, plan.drops if first == 0 else []))
            used += [left.pop(number) for number in {extent.segment for extent in part} if number in left]
            count += len(part)
            first = stop
            if count >= _EXTENTS:
                yield used, commits
                commits, used, count = [], [], 0
            if first >= len(plan.extents):
                break
    if commits or left:
        yield [*used, *left.values()], commits


def _data_commit(plan: _Plan, extents: list[Extent], drops: list[tuple[int, int]]) -> DataCommit:
    # The time is read as late as this: the user may have set it while the contents were being written.
    mtime = None
    for layer in plan.work.state.layers[: plan.work.depth]:
        if layer.mtime is not None:
            mtime = layer.mtime
    return DataCommit(plan.work.state.ino, plan.size, mtime, drops, extents, plan.inline)
