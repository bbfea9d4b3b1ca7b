"""All uncommitted changes of a mount: the layers of its files, their replicas and their journal records.

Every method is synchronous and takes effect whole or not at all: a change that cannot be journaled has not happened.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from polefs.data.cache.rangeset import Range
from polefs.data.durability import JournalLog
from polefs.data.journal import Kind, Logged
from polefs.data.ranges import HOLE, Chunk, DirtySource, RangeMap
from polefs.data.replica import Replica, replica_generation, replica_name
from polefs.data.state import FileState, Layer
from polefs.meta.model import FILE_SIZE_MAX, Inode

_LOGGED_PER_FILE: Final = 64 << 10
"""What one file's layer may have in the journal; beyond, its writes go to a replica."""

_LOGGED_PER_SYNCED_FILE: Final = 16 << 20
_SMALL_WRITE: Final = 64 << 10
"""The same for a file that somebody calls fsync on, for writes up to this size: there is then only the journal to sync,
and not a replica as well. Write-back starts at half of it."""


class Limits(msgspec.Struct, frozen=True):
    """Past a quarter of ``local`` or ``replicas`` write-back starts early, past half of one writers slow down, past all
    of it they wait."""

    local: int = 4 << 30
    """Bytes of contents in replicas, and of journals."""
    replicas: int = 384
    """Replica files, each of which is an open descriptor."""
    memory: int = 64 << 20
    """Bytes of journaled contents that are in memory as well."""


class DirtyFiles:
    """``changed`` is set by the first change after it was cleared, ``urgent`` when write-back should start at once.
    ``pressure`` tells how much writers are to slow down, from 0 to 1, and ``full`` that they have to wait."""

    def __init__(
        self,
        directory: str,
        log: JournalLog,
        limits: Limits,
        progress: Callable[[int], None],
        relieved: Callable[[], None],
    ) -> None:
        """``progress`` is called with the number of bytes that have been written back, ``relieved`` when it is not
        ``full`` any more."""
        self._directory = directory
        self.log = log
        self._limits = limits
        self._states: dict[int, FileState] = {}
        self.find = self._states.get
        """The state of a file by inode number; None when everything of it is committed."""
        self._progress = progress
        self._relieved = relieved
        self._settled: dict[int, tuple[int, int]] = {}
        """Files whose changes are committed but still told of by journals, and where the last of these ends."""
        self._ignored: dict[int, tuple[int, int]] = {}
        """Files of which a journal says that what it tells of them is to be ignored, and where it has said so."""
        self._direct: dict[int, tuple[Replica, int]] = {}
        """Replicas that are files by themselves, by inode number, and the journal that says so."""
        self._retired: list[tuple[int, Replica]] = []
        """Replicas that nobody needs any more but a journal, and its number."""
        used = max((replica_generation(name) for name in os.listdir(directory)), default=0)
        self._generations = itertools.count(used + 1)
        self._memory = 0
        self._logged = 0
        """Uncommitted bytes of contents that the journals hold, in memory or not."""
        self._replicas = 0
        self.bytes = 0
        """Uncommitted bytes of contents."""
        self.changed = asyncio.Event()
        self.urgent = asyncio.Event()
        self.full = False
        self.pressure = 0.0
        self._pressed = False

    def adopt(self, states: dict[int, FileState], replicas: Sequence[tuple[int, Replica]]) -> None:
        """Take over what recovery found, to be written back at once; ``replicas`` with the number of the journal that
        tells of each."""
        self._states.update(states)
        self._retired += replicas
        self._replicas += len(replicas)
        for state in states.values():
            for layer in state.layers:
                self._count(layer.ranges, (0, 0, 0))
        self.changed.set()
        self.urgent.set()
        self._check()

    async def rotate(self) -> None:
        """Begin the next journal."""
        await self.log.rotate()
        for ino, (replica, epoch) in list(self._direct.items()):
            if epoch != self.log.epoch:
                self._tell_direct(ino, replica)

    def write(self, inode: Inode, offset: int, data: memoryview, now: int) -> int:
        """OSError as the local file system reports it: ENOSPC, EIO."""
        ino = inode.ino
        state, layer = self._writable(inode)
        ranges = layer.ranges
        length = len(data)
        end = offset + length
        before = ranges.memory, ranges.logged, ranges.data
        logged = ranges.memory + ranges.logged
        source: DirtySource
        if state.synced_often:
            small = length <= _SMALL_WRITE and logged + length <= _LOGGED_PER_SYNCED_FILE
            if logged * 2 > _LOGGED_PER_SYNCED_FILE:
                self.urgent.set()
        else:
            small = layer.replica is None and logged + length <= _LOGGED_PER_FILE
        if small:
            payload = bytes(data)
            journal = self.log.current
            journal.append(Kind.DATA, ino, offset, 0, 0, now, payload)
            if self._memory + length <= self._limits.memory:
                source = Chunk(offset, payload)
            else:
                source = Logged(offset, journal, journal.end - length)
        else:
            source = layer.replica or self._make_replica(state, layer)
            source.write(data, offset)
            self.log.current.append(Kind.RANGE, ino, offset, length, source.generation, now)
        ranges.set(offset, end, source)
        if end > layer.size:
            layer.size = end
        self._count(ranges, before)
        self._changed(state, layer, now)
        return length

    def truncate(self, inode: Inode, size: int, now: int) -> None:
        """Errors as of ``write``."""
        state, layer = self._writable(inode)
        self.log.current.append(Kind.TRUNCATE, inode.ino, size, 0, 0, now)
        self._punch(layer, size, FILE_SIZE_MAX)
        layer.size = size
        if size == 0 and layer.replica is not None:
            self._retire(layer)
        self._changed(state, layer, now)

    def punch(self, inode: Inode, start: int, end: int, size: int, now: int) -> None:
        """The range reads as zero from now on, and the size is ``size``. Errors as of ``write``."""
        state, layer = self._writable(inode)
        self.log.current.append(Kind.HOLE, inode.ino, start, end, size, now)
        self._punch(layer, start, end)
        layer.size = size
        self._changed(state, layer, now)

    def set_mtime(self, ino: int, mtime: int) -> None:
        """No commit and no replay brings an older modification time back. Errors as of ``write``."""
        state = self._states.get(ino)
        if state is not None:
            self._journal(state, Kind.MTIME, mtime)
            for layer in state.layers:
                layer.mtime = None
        elif ino in self._settled:
            self.log.current.append(Kind.MTIME, ino, 0, 0, 0, mtime)
            self._settled[ino] = self.log.place
            self.changed.set()

    def told_by_journal(self, ino: int) -> bool:
        """Whether a replay would change the file although all of it is committed."""
        return ino in self._settled

    def forget_journal(self, ino: int) -> None:
        """Let a replay ignore what the journals tell of a file that is committed: it is, and durably."""
        epoch, end = self._settled[ino]
        self.log.current.append(Kind.SETTLED, ino, epoch, end, 0, 0)
        self.changed.set()
        del self._settled[ino]
        self._ignored[ino] = self.log.place

    def forgotten_durably(self, ino: int) -> bool:
        """Whether what ``forget_journal`` has said of the file, if anything, survives the loss of power."""
        place = self._ignored.get(ino)
        return place is None or self.log.durable(*place)

    def durable(self, ino: int) -> bool:
        """Whether a replay after a loss of power would bring the file to its present contents."""
        state = self._states.get(ino)
        if state is not None:
            told = self.log.durable(state.journal_epoch, state.journal_end)
        elif ino in self._settled or ino in self._ignored:
            # Half of the story would undo what has been committed since.
            told = self.log.durable(self.log.epoch, self.log.current.end)
        else:
            return True
        return told and all(replica.durable for replica in self.replicas(ino))

    def replicas(self, ino: int) -> list[Replica]:
        """All replicas of a file that journals tell of."""
        state = self._states.get(ino)
        found = [] if state is None else state.replicas()
        return found + [replica for _, replica in self._retired if replica.ino == ino]

    def forget(self, ino: int) -> None:
        """The file is removed: nothing of it is written back any more."""
        state = self._states.get(ino)
        if state is not None:
            state.gone = True
            self.settle(state, len(state.layers))
        self._drop_direct(ino)

    # Files that change without being told (``polefs.data.direct``)

    def new_name(self, ino: int) -> tuple[int, str]:
        """The generation and the path of a replica to come."""
        generation = next(self._generations)
        return generation, os.path.join(self._directory, replica_name(ino, generation))

    def begin_direct(self, replica: Replica) -> None:
        """The replica is the whole file, all of which is committed as it is: from now on it changes without being told.
        Errors as of ``write``."""
        self._tell_direct(replica.ino, replica)

    def _tell_direct(self, ino: int, replica: Replica) -> None:
        self.log.current.append(Kind.DIRECT, ino, 0, 0, replica.generation, 0)
        self._direct[ino] = replica, self.log.epoch

    def snapshot(
        self, inode: Inode, source: Replica, data: Iterable[Range], holes: Iterable[Range], size: int, mtime: int
    ) -> None:
        """Let these ranges of a file that changes without being told be written back."""
        state = self._states.get(inode.ino)
        if state is not None:
            state.gone = True  # what has failed before is not tried again
            self.settle(state, len(state.layers))
        state, layer = self._writable(inode)
        state.direct = True
        for start, end in holes:
            layer.ranges.set(start, end, HOLE)
        for start, end in data:
            layer.ranges.set(start, end, source)
        layer.size = size
        layer.mtime = layer.ctime = mtime
        layer.sealed = True
        self._count(layer.ranges, (0, 0, 0))
        state.journal_epoch, state.journal_end = layer.place = self.log.place
        self._check()

    def end_direct(self, ino: int) -> None:
        """All of the file is committed, durably, and nobody changes it without telling. Errors as of ``write``."""
        self.log.current.append(Kind.SETTLED, ino, *self.log.place, 0, 0)
        self._settled.pop(ino, None)
        self._ignored[ino] = self.log.place
        self._drop_direct(ino)

    def _drop_direct(self, ino: int) -> None:
        found = self._direct.pop(ino, None)
        if found is not None:
            self._retired.append((self.log.epoch, found[0]))
            self._replicas += 1
            self.changed.set()

    def note_segment(self, number: int) -> None:
        """Should the process die before the segment is committed, recovery deletes its object."""
        self.log.current.append(Kind.SEGMENT, 0, number, 0, 0, 0)

    def older(self, before: int) -> list[int]:
        """The files with layers that belong to journals before ``before``, first those that have waited longest."""
        return [ino for ino, state in self._states.items() if state.layers[0].epoch < before]

    def oldest(self) -> int:
        """The number of the oldest journal that tells of something that is not committed, or of the current one."""
        told = [state.layers[0].epoch for state in self._states.values()]
        return min([*told, *(epoch for _, epoch in self._direct.values())], default=self.log.epoch)

    def seal(self, ino: int, before: int | None) -> int:
        """How many of the oldest layers of a file belong to journals before ``before``; None: all, which are not
        written to any more."""
        state = self._states.get(ino)
        if state is None:
            return 0
        if before is None:
            for layer in state.layers:
                layer.sealed = True
            return len(state.layers)
        return sum(layer.epoch < before for layer in state.layers)

    def relieve(self, state: FileState, size: int) -> None:
        """So many bytes of the layers that are being written back are committed."""
        if not state.gone:
            state.committed += size
            self.bytes -= size
            self._progress(size)
            self._check()

    def burden(self, state: FileState) -> None:
        """The write-back of this file has failed: its layers stay as a whole."""
        self.bytes += state.committed
        state.committed = 0
        self._check()

    def settle(self, state: FileState, depth: int) -> None:
        """The ``depth`` oldest layers are committed, or of a removed file."""
        layers = state.layers[:depth]
        del state.layers[:depth]
        before = self.bytes
        self.bytes += state.committed
        state.committed = 0
        for layer in layers:
            ranges = layer.ranges
            self._memory -= ranges.memory
            self._logged -= ranges.memory + ranges.logged
            self.bytes -= ranges.data
            if layer.replica is not None:
                self._retire(layer)
        if layers:
            place = layers[-1].place
            if not state.layers:
                # A modification time that the user set may stand behind, in a newer journal even.
                place = max(place, (state.journal_epoch, state.journal_end))
            self._settled[state.ino] = place
        if not state.layers and self._states.get(state.ino) is state:
            del self._states[state.ino]
        self._progress(before - self.bytes)
        self._check()

    def retired(self, before: int) -> list[str]:
        """Paths of the replicas that only journals before ``before`` tell of, to be deleted after these."""
        return [replica.path for epoch, replica in self._retired if epoch < before]

    def deleted(self, before: int) -> None:
        """The journals before ``before`` are deleted, and the replicas that ``retired`` named before these were."""
        self._settled = {ino: place for ino, place in self._settled.items() if place[0] >= before}
        self._ignored = {ino: place for ino, place in self._ignored.items() if place[0] >= before}
        count = len(self._retired)
        self._retired = [(epoch, replica) for epoch, replica in self._retired if epoch >= before]
        self._replicas -= count - len(self._retired)
        self._check()

    def _writable(self, inode: Inode) -> tuple[FileState, Layer]:
        state = self._states.get(inode.ino)
        epoch = self.log.current.number
        if state is None:
            state = self._states[inode.ino] = FileState(inode.ino)
            layer = Layer(epoch, inode.size, inode.ctime)
            state.layers.append(layer)
            return state, layer
        layer = state.layers[-1]
        if layer.epoch != epoch or layer.sealed:
            layer = Layer(epoch, layer.size, layer.ctime)
            state.layers.append(layer)
        return state, layer

    def _make_replica(self, state: FileState, layer: Layer) -> Replica:
        layer.replica = Replica(self._directory, state.ino, next(self._generations), create=True)
        self._replicas += 1
        return layer.replica

    def _retire(self, layer: Layer) -> None:
        assert layer.replica is not None
        self._retired.append((layer.epoch, layer.replica))
        layer.replica = None

    def _punch(self, layer: Layer, start: int, end: int) -> None:
        ranges = layer.ranges
        if start < end:
            before = ranges.memory, ranges.logged, ranges.data
            ranges.set(start, end, HOLE)
            self._count(ranges, before)

    def _count(self, ranges: RangeMap, before: tuple[int, int, int]) -> None:
        """The map has changed, and had ``memory``, ``logged`` and ``data`` before."""
        memory, logged, data = before
        self._memory += ranges.memory - memory
        self._logged += ranges.memory - memory + ranges.logged - logged
        self.bytes += ranges.data - data

    def _journal(self, state: FileState, kind: Kind, time: int) -> None:
        journal = self.log.current
        journal.append(kind, state.ino, 0, 0, 0, time)
        state.journal_epoch = journal.number
        state.journal_end = journal.end

    def _changed(self, state: FileState, layer: Layer, now: int) -> None:
        layer.mtime = layer.ctime = now
        journal = self.log.current
        state.journal_epoch, state.journal_end = layer.place = (journal.number, journal.end)
        if not self.changed.is_set():
            self.changed.set()
        self._check()
        if self._pressed and not self.urgent.is_set():
            self.urgent.set()

    def _check(self) -> None:
        """Keep ``full``, ``pressure``, and ``_pressed``, which tells that a quarter of a limit is reached."""
        limits = self._limits
        size = self.bytes - self._logged + self.log.size
        used = max(size / limits.local, self._replicas / limits.replicas)
        self._pressed = used > 0.25
        self.pressure = min(max(used * 2 - 1, 0.0), 1.0)
        full = used > 1
        if full != self.full:
            self.full = full
            if not full:
                self._relieved()
