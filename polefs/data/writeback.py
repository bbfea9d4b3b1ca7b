"""Write-back: the uncommitted layers of files become objects, and then metadata.

Files are submitted and wait in one of two *lanes*: those that somebody waits for (fsync) pass the others by. A few
workers a lane each take what has gathered there by then, up to a segment, write that object, commit what is in it, and
settle it: of a big file one segment after the other, of small ones hundreds at once. One plan of a file at a time is
under way; what is submitted meanwhile follows it. Nothing is lost by a failure: the layers stay, to be submitted again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import islice
from typing import Final

from polefs.data.budget import MemoryBudget
from polefs.data.dirty import DirtyFiles
from polefs.data.frames import Codec
from polefs.data.plan import Plan, extents_of, make_plan, transactions
from polefs.data.reader import Reader
from polefs.data.segments import (
    RUN_MAX,
    SEGMENT_MAX,
    DataPiece,
    Run,
    SegmentIds,
    load,
    prepare_adoption,
)
from polefs.meta.api import MetaAPI
from polefs.meta.model import DataCommit, Extent, Segment
from polefs.objects.base import ObjectStore, for_programs, is_transient, segment_key

log = logging.getLogger(__name__)

_WORKERS: Final = 4
_URGENT_WORKERS: Final = 4
"""Segments under way at a time, at most; the memory for them may allow fewer."""

_URGENT_SHARE: Final = 4
"""The part of that memory which is for files that somebody waits for: one in so many."""

_PAUSE: Final = 1.0
"""Of a worker after a failure that nobody has foreseen, seconds."""

_FILES_LOCAL: Final = 32
_FILES: Final = 4096
"""Files whose contents share a segment, at most: in a local directory a small one is soon written."""


class _Job:
    """A file that is submitted: waiting in a lane until ``begun``, then with a ``plan``. ``under_way`` counts the
    workers that have a part of it."""

    __slots__ = ("before", "begun", "done", "error", "ino", "plan", "under_way", "urgent")

    def __init__(self, ino: int, before: int | None, urgent: bool) -> None:
        self.ino = ino
        self.before = before
        self.urgent = urgent
        self.begun = False
        self.plan: Plan | None = None
        self.under_way = 0
        self.error: BaseException | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def planned(self) -> Plan:
        assert self.plan is not None
        return self.plan

    def join(self, before: int | None) -> None:
        if before is None or self.before is None:
            self.before = None
        else:
            self.before = max(self.before, before)


class _Lane:
    def __init__(self, workers: int, memory: MemoryBudget) -> None:
        self.jobs: deque[_Job] = deque()
        self.workers = workers
        self.running = 0
        self.memory = memory


class WriteBack:
    """Used from one event loop. A file that fails stays as it is, the others go on."""

    def __init__(
        self,
        meta: MetaAPI,
        objects: ObjectStore,
        codec: Codec | None,
        reader: Reader,
        threads: Executor,
        memory: MemoryBudget,
        dirty: DirtyFiles,
        changing: Callable[[Sequence[DataCommit]], AbstractAsyncContextManager[None]],
        keep: Callable[[Sequence[tuple[int, Sequence[DataPiece], int]]], Awaitable[None]] | None,
    ) -> None:
        """``memory``: for what is being written. ``changing(commits)`` encloses each change of the metadata; ``keep``
        gets the pieces that are the contents of files now, as ``(ino, pieces, size)``."""
        self._meta = meta
        self._objects = objects
        self._codec = codec
        self._reader = reader
        self._threads = threads
        self._dirty = dirty
        self._changing = changing
        self._keep = keep
        self._normal = _Lane(_WORKERS, memory.share(memory.limit - memory.limit // _URGENT_SHARE))
        self._urgent = _Lane(_URGENT_WORKERS, memory)
        self._files = _FILES_LOCAL if codec is None else _FILES
        self._jobs: dict[int, _Job] = {}
        """One a file: waiting, under way, or only holding the place (``holding``)."""
        self._following: dict[int, _Job] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._keeping: set[asyncio.Future[None]] = set()
        self._stopped = False
        self.impatient = False
        """A store that stays out of reach for the time of one attempt is a failure of all that is to be stored."""
        self._out_of_reach: OSError | None = None
        """Why it was, once that counts."""
        self._drained: asyncio.Future[None] | None = None
        self._committing: dict[int, list[DataCommit]] = {}
        self.ids = SegmentIds(meta, dirty.note_segment)
        self.memory = self._normal.memory
        """For what nobody waits for."""

    def submit(self, ino: int, before: int | None, *, urgent: bool = False) -> asyncio.Future[None]:
        """Write back the layers of a file that belong to journals before ``before`` (None: all that it has when it is
        its turn). The future ends when they are committed, or fails with what prevents it; many may await it: never
        cancel it, shield it."""
        job = self._following.get(ino) or self._jobs.get(ino)
        if job is not None and not job.begun:
            job.join(before)
        else:
            current, job = job, _Job(ino, before, urgent)
            if current is None:
                self._jobs[ino] = job
                self._enter(job)
            else:
                self._following[ino] = job
        if urgent:
            self._promote(self._jobs[ino])
            self._promote(job)
        return job.done

    @asynccontextmanager
    async def holding(self, inos: Iterable[int]) -> AsyncIterator[None]:
        """Nothing of these files is under way within the block; what is submitted follows it."""
        held: list[_Job] = []
        try:
            for ino in sorted({*inos}):
                while ino in self._jobs:
                    await asyncio.wait([self._jobs[ino].done])
                job = self._jobs[ino] = _Job(ino, None, urgent=False)
                job.begun = True
                held.append(job)
            yield
        finally:
            for job in held:
                self._end(job)

    def drained(self) -> asyncio.Future[None]:
        """Ends when everything that was submitted is under way or done. Shield it."""
        if self._drained is None or self._drained.done():
            self._drained = asyncio.get_running_loop().create_future()
            self._tell_drained()
        return self._drained

    def leave_mtime(self, ino: int) -> None:
        """Commits of this file that wait for their transaction leave the modification time alone."""
        for commit in self._committing.get(ino, ()):
            commit.mtime = None

    async def stop(self) -> None:
        """Give up what is under way. Nothing may be submitted any more."""
        self._stopped = True
        while self._workers:
            for task in self._workers:
                task.cancel()
            await asyncio.wait(self._workers)
        await self.kept()

    async def kept(self) -> None:
        """Returns when what has been committed is cached."""
        if self._keeping:
            await asyncio.wait(self._keeping)

    async def idle(self) -> None:
        """Returns when nothing is under way any more."""
        while self._workers:
            await asyncio.wait(self._workers)

    # Jobs and lanes

    def _enter(self, job: _Job) -> None:
        lane = self._urgent if job.urgent else self._normal
        lane.jobs.append(job)
        self._wake(lane)

    def _promote(self, job: _Job) -> None:
        if not job.urgent:
            job.urgent = True
            if job in self._normal.jobs:
                self._normal.jobs.remove(job)
                self._urgent.jobs.append(job)
                self._wake(self._urgent)
                self._tell_drained()

    def _put_back(self, job: _Job) -> None:
        """More of it is to be stored."""
        lane = self._urgent if job.urgent else self._normal
        lane.jobs.appendleft(job)
        self._wake(lane)

    def _wake(self, lane: _Lane) -> None:
        while lane.running < min(lane.workers, lane.running + len(lane.jobs)) and not self._stopped:
            lane.running += 1
            task = asyncio.get_running_loop().create_task(self._work(lane))
            self._workers.add(task)
            task.add_done_callback(self._workers.discard)
            if lane.running >= len(lane.jobs):
                break

    def _end(self, job: _Job) -> None:
        """It is done, or has failed."""
        following = self._following.pop(job.ino, None)
        if following is None:
            del self._jobs[job.ino]
        else:
            self._jobs[job.ino] = following
            self._enter(following)
        if job.error is None:
            job.done.set_result(None)
        elif isinstance(job.error, asyncio.CancelledError):
            job.done.cancel()
        else:
            job.done.set_exception(job.error)
            job.done.exception()  # whoever submitted it may be gone
        self._tell_drained()

    def _tell_drained(self) -> None:
        if self._drained is not None and not self._drained.done() and not (self._normal.jobs or self._urgent.jobs):
            self._drained.set_result(None)

    # Work

    async def _work(self, lane: _Lane) -> None:
        try:
            while lane.jobs:
                try:
                    taken = await lane.memory.take(self._wanted(lane))
                    try:
                        done = await self._work_once(lane, max(taken, RUN_MAX))
                    finally:
                        lane.memory.give(taken)
                    await self._keep_contents([plan for plan in done if plan.pieces and not plan.state.gone])
                except Exception:
                    log.exception("write-back goes on after an unexpected failure")
                    await asyncio.sleep(_PAUSE)
        finally:
            lane.running -= 1

    async def _keep_contents(self, done: Sequence[Plan]) -> None:
        if self._keep is not None and done:
            contents = [(plan.state.ino, plan.pieces, plan.size) for plan in done if not plan.state.direct]
            task = asyncio.ensure_future(self._keep(contents))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)
            await asyncio.shield(task)

    def _wanted(self, lane: _Lane) -> int:
        """Memory for what waits in a lane, up to a segment of it."""
        size = 0
        for job in islice(lane.jobs, self._files):
            state = self._dirty.find(job.ino)
            size += state.bytes if state is not None else 0
            if size >= SEGMENT_MAX:
                return SEGMENT_MAX
        return size

    async def _work_once(self, lane: _Lane, room: int) -> list[Plan]:
        """Store up to ``room`` bytes of what waits in the lane; returns the plans that are done by that."""
        taken: list[tuple[_Job, list[Run]]] = []
        numbers: list[int] = []
        error: BaseException | None = None
        try:
            await self._gather(lane, room, taken)
            self._tell_drained()
            if taken and taken[0][0].planned.whole:
                await self._store_whole(taken[0][0], numbers)
            elif taken and taken[0][0].planned.adopt is not None:
                await self._adopt(taken[0][0], numbers)
            else:
                await self._store(taken, numbers)
        except BaseException as failure:
            error = failure
            self.ids.doubt(numbers)
            if not isinstance(failure, Exception):
                raise
        else:
            self.ids.settle(numbers)
        finally:
            done = [job.planned for job, _ in taken if self._conclude(job, error)]
        return done

    def _conclude(self, job: _Job, error: BaseException | None) -> bool:
        """A worker has ended with its part of a job. Whether all of it is committed."""
        job.under_way -= 1
        job.error = job.error or error
        plan = job.planned
        if job.error is not None and plan.runs:
            plan.runs.clear()
            for lane in (self._normal, self._urgent):
                if job in lane.jobs:
                    lane.jobs.remove(job)
        if job.under_way or plan.runs:
            return False
        if job.error is None:
            self._dirty.settle(plan.state, plan.depth)
        else:
            self._dirty.burden(plan.state)
        self._end(job)
        return job.error is None

    async def _gather(self, lane: _Lane, room: int, taken: list[tuple[_Job, list[Run]]]) -> None:
        """Take from the lane what goes into one segment, or one file that goes a way of its own."""
        while lane.jobs and len(taken) < self._files:
            job = lane.jobs.popleft()
            if not job.begun:
                job.begun = True
                try:
                    job.plan = await self._plan(job)
                except Exception as error:
                    job.error = error
                if job.plan is None:
                    self._end(job)
                    continue
            plan = job.planned
            alone = plan.whole or plan.adopt is not None
            runs = [] if alone else plan.take(room)
            if taken and (alone or (plan.runs and not runs)):
                self._put_back(job)
                return
            job.under_way += 1
            taken.append((job, runs))
            if alone:
                return
            if plan.runs:
                plan.divided = True
                self._put_back(job)
                return
            room -= sum(run.end - run.start for run in runs)
            if len(taken) % _FILES_LOCAL == 0:
                await asyncio.sleep(0)  # requests come first: planning so many takes a millisecond

    async def _plan(self, job: _Job) -> Plan | None:
        """None when there is nothing to do."""
        depth = self._dirty.seal(job.ino, job.before)
        state = self._dirty.find(job.ino)
        if not depth or state is None:
            return None
        try:
            inode = await self._meta.get_inode(job.ino)
        except FileNotFoundError:
            self._dirty.settle(state, depth)
            return None
        if state.gone:
            return None
        return await make_plan(state, depth, inode, self._reader, adopting=self._codec is None)

    # Storing and committing

    # The numbers of segments that are begun are added to ``numbers``.

    async def _store(self, taken: Sequence[tuple[_Job, list[Run]]], numbers: list[int]) -> None:
        """One segment with these runs, and the commit of it."""
        runs = [run for _, some in taken for run in some]
        segments: dict[int, Segment] = {}
        number = 0
        if runs:
            number = await self.ids.take()
            numbers.append(number)
            segments[number] = await self._put(number, runs)
        parts: list[tuple[Plan, list[Extent]]] = []
        offset = 0
        for job, some in taken:
            parts.append((job.planned, extents_of(some, number, offset)))
            offset += sum(run.end - run.start for run in some)
        await self._commit(parts, segments)

    async def _store_whole(self, job: _Job, numbers: list[int]) -> None:
        """Segments with all of a file, and one commit."""
        plan = job.planned
        segments: dict[int, Segment] = {}
        extents: list[Extent] = []
        while plan.runs:
            runs = plan.take(SEGMENT_MAX)
            number = await self.ids.take()
            numbers.append(number)
            segments[number] = await self._put(number, runs)
            extents += extents_of(runs, number, 0)
        await self._commit([(plan, extents)], segments)

    async def _adopt(self, job: _Job, numbers: list[int]) -> None:
        """Give the store the local file itself; where that cannot be, the contents are stored like others."""
        plan = job.planned
        replica = plan.adopt
        assert replica is not None
        loop = asyncio.get_running_loop()
        frames = await loop.run_in_executor(self._threads, prepare_adoption, replica, plan.pieces, plan.size)
        if frames is not None:
            number = await self.ids.take()
            numbers.append(number)
            if await self._objects.adopt(segment_key(number), replica.path):
                plan.runs.clear()
                extents = [Extent(0, plan.size, number, 0)]
                await self._commit([(plan, extents)], {number: Segment(number, plan.size, frames)})
                return
        plan.adopt = None
        self._put_back(job)

    async def _put(self, number: int, runs: Sequence[Run]) -> Segment:
        """Write the object of a segment. A store that is out of reach is waited for, unless ``impatient``."""
        if self._out_of_reach is not None:
            raise for_programs(self._out_of_reach)
        loop = asyncio.get_running_loop()
        parts, segment = await loop.run_in_executor(self._threads, load, runs, number, self._codec)
        while True:
            try:
                await self._objects.put(segment_key(number), parts)
            except OSError as error:
                if not is_transient(error):
                    raise for_programs(error) from error
                if self.impatient:
                    self._out_of_reach = error
                    raise for_programs(error) from error
                log.warning("segment %d is not stored yet: %s", number, error)
            else:
                return segment

    async def _commit(self, parts: Sequence[tuple[Plan, list[Extent]]], segments: dict[int, Segment]) -> None:
        for some, commits in transactions(parts, segments):
            for plan, commit in commits:
                self._committing.setdefault(plan.state.ino, []).append(commit)
            try:
                data = [commit for _, commit in commits]
                async with self._changing(data):
                    await self._meta.commit_data(some, data)
            finally:
                for plan, commit in commits:
                    self._committed(plan.state.ino, commit)
            for plan, commit in commits:
                if plan.divided:
                    self._dirty.relieve(plan.state, sum(extent.length for extent in commit.extents))

    def _committed(self, ino: int, commit: DataCommit) -> None:
        commits = self._committing[ino]
        commits.remove(commit)
        if not commits:
            del self._committing[ino]
