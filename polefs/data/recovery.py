"""After a crash: the layers of all files again, from the journals that the last process left."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from typing import Final

from polefs.data.journal import Journal, Kind, Logged, Record, journal_name, journal_number, read_journal
from polefs.data.ranges import HOLE, RangeMap
from polefs.data.replica import Replica
from polefs.data.state import FileState, Layer
from polefs.meta.api import MetaAPI
from polefs.meta.model import FILE_SIZE_MAX
from polefs.objects.localio import allocated_ranges, sync_directory

_PAGE: Final = 256


class Recovered:
    """``states`` by inode number, each with one layer, which ``journals`` tell of with ``replicas``, each of these with
    the number of its journal; ``mtimes`` by inode number where the user had set it and nothing was written afterwards;
    ``segments`` whose objects may have been written. All of it survives the loss of power."""

    def __init__(self) -> None:
        self.journals: list[Journal] = []
        self.states: dict[int, FileState] = {}
        self.mtimes: dict[int, int] = {}
        self.segments: list[int] = []
        self.replicas: list[tuple[int, Replica]] = []


class _Replay:
    def __init__(self, meta: MetaAPI, directory: str) -> None:
        self._meta = meta
        self._directory = directory
        self._removed: set[int] = set()
        self.settled: dict[int, tuple[int, int]] = {}
        self._replicas: dict[tuple[int, int], Replica | None] = {}
        self._direct: dict[int, tuple[int, int]] = {}
        """Replicas that are files by themselves, by inode number: journal and generation."""
        self.found = Recovered()

    async def _state(self, number: int, ino: int) -> FileState | None:
        """The file of a record of this journal."""
        state = self.found.states.get(ino)
        if state is None:
            if ino in self._removed:
                return None
            try:
                inode = await self._meta.get_inode(ino)
            except FileNotFoundError:
                self._removed.add(ino)
                return None
            state = self.found.states[ino] = FileState(ino)
            state.layers.append(Layer(number, inode.size, inode.ctime))
        return state

    async def apply(self, journal: Journal, record: Record) -> None:
        number = journal.number
        kind, ino, a, b, generation, time, payload, end = record
        if kind is Kind.SEGMENT:
            self.found.segments.append(a)
            return
        if kind is Kind.SETTLED or (number, end) <= self.settled.get(ino, (0, 0)):
            return
        state = await self._state(number, ino)
        if state is None:
            return
        state.journal_epoch, state.journal_end = number, end
        (layer,) = state.layers
        if kind is Kind.DIRECT:
            self._direct[ino] = number, generation
            layer.place = number, end
            return
        if kind is Kind.MTIME:
            layer.mtime = None
            self.found.mtimes[ino] = time
            return
        if kind is Kind.DATA:
            layer.ranges.set(a, a + len(payload), Logged(a, journal, end - len(payload)))
            layer.size = max(layer.size, a + len(payload))
        elif kind is Kind.RANGE:
            replica = self._replica(number, ino, generation)
            if replica is not None:
                layer.ranges.set(a, a + b, replica)
            layer.size = max(layer.size, a + b)
        elif kind is Kind.TRUNCATE:
            layer.ranges.set(a, FILE_SIZE_MAX, HOLE)
            layer.size = a
        else:
            if a < b:
                layer.ranges.set(a, b, HOLE)
            layer.size = generation
        layer.mtime = layer.ctime = time
        layer.place = number, end
        self.found.mtimes.pop(ino, None)

    async def finish(self) -> None:
        """What changed without being told is what its replica is."""
        for ino, (number, generation) in self._direct.items():
            replica = self._replica(number, ino, generation)
            state = self.found.states.get(ino)
            if state is None or replica is None:
                continue
            (layer,) = state.layers
            # Programs of before may still have it open: it becomes no cache file.
            state.direct = True
            status = os.fstat(replica.fd)
            layer.ranges = RangeMap()
            layer.ranges.set(0, FILE_SIZE_MAX, HOLE)
            for start, end in allocated_ranges(replica.fd):
                layer.ranges.set(start, min(end, status.st_size), replica)
            layer.size = status.st_size
            layer.mtime = status.st_mtime_ns
            layer.ctime = max(layer.ctime, status.st_ctime_ns)
            self.found.mtimes.pop(ino, None)

    def _replica(self, number: int, ino: int, generation: int) -> Replica | None:
        """None when it did not survive a loss of power: that write had not been synced."""
        key = (ino, generation)
        if key not in self._replicas:
            try:
                replica = self._replicas[key] = Replica(self._directory, ino, generation, create=False)
                self.found.replicas.append((number, replica))
            except FileNotFoundError:
                self._replicas[key] = None
        return self._replicas[key]


async def recover(meta: MetaAPI, directory: str, before: int, threads: Executor) -> Recovered:
    """Replay the journals before ``before`` in ``directory``, in order. Inodes that do not exist any more are passed
    over."""
    loop = asyncio.get_running_loop()
    replay = _Replay(meta, directory)
    names = await loop.run_in_executor(threads, os.listdir, directory)
    numbers = sorted(number for number in map(journal_number, names) if number is not None and number < before)
    paths = [(number, os.path.join(directory, journal_name(number))) for number in numbers]
    replay.settled = await loop.run_in_executor(threads, _settled, paths)
    replay.found.journals = await loop.run_in_executor(threads, _reopen, directory, numbers)
    for journal in replay.found.journals:
        records = read_journal(journal.path, journal.number)
        while page := await loop.run_in_executor(threads, _page, records):
            for record in page:
                await replay.apply(journal, record)
    await replay.finish()
    await loop.run_in_executor(threads, _secure, directory, replay.found)
    return replay.found


def _reopen(directory: str, numbers: Iterable[int]) -> list[Journal]:
    """Blocks."""
    return [Journal.reopen(directory, number) for number in numbers]


def _settled(journals: Iterable[tuple[int, str]]) -> dict[int, tuple[int, int]]:
    """Up to where the journals' records of a file are to be passed over, by inode number. Blocks."""
    found: dict[int, tuple[int, int]] = {}
    for number, path in journals:
        for record in read_journal(path, number):
            if record.kind is Kind.SETTLED:
                found[record.ino] = record.a, record.b
    return found


def _page(records: Iterator[Record]) -> list[Record]:
    return list(itertools.islice(records, _PAGE))


def _secure(directory: str, found: Recovered) -> None:
    """Make what was found survive the loss of power. Blocks."""
    for _, replica in found.replicas:
        os.fdatasync(replica.fd)
        replica.entry_synced = True
    sync_directory(directory)
