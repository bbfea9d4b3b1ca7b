"""After a crash: the layers of all files again, from the journals that the last process left."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Final

from polefs.data.journal import Kind, Record, journal_name, journal_number, read_journal
from polefs.data.ranges import HOLE, Chunk
from polefs.data.replica import Replica
from polefs.data.state import FileState, Layer
from polefs.meta.api import MetaAPI
from polefs.meta.model import FILE_SIZE_MAX

_PAGE: Final = 256


class Recovered:
    """``states`` by inode number, each with one layer of epoch 0; ``mtimes`` by inode number where the user had set
    it and nothing was written afterwards; ``segments`` whose objects may have been written."""

    def __init__(self) -> None:
        self.states: dict[int, FileState] = {}
        self.mtimes: dict[int, int] = {}
        self.segments: list[int] = []


class _Replay:
    def __init__(self, meta: MetaAPI, directory: str) -> None:
        self._meta = meta
        self._directory = directory
        self._removed: set[int] = set()
        self._replicas: dict[tuple[int, int], Replica | None] = {}
        self.found = Recovered()

    async def _layer(self, ino: int) -> Layer | None:
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
            state.layers.append(Layer(0, inode.size, inode.ctime))
        return state.layers[0]

    async def apply(self, record: Record) -> None:
        kind, ino, a, b, generation, time, payload = record
        if kind is Kind.SEGMENT:
            self.found.segments.append(a)
            return
        if kind is Kind.SETTLED:
            self.found.states.pop(ino, None)
            self.found.mtimes.pop(ino, None)
            return
        layer = await self._layer(ino)
        if layer is None:
            return
        if kind is Kind.MTIME:
            layer.mtime = None
            self.found.mtimes[ino] = time
            return
        if kind is Kind.DATA:
            layer.ranges.set(a, a + len(payload), Chunk(a, payload))
            layer.size = max(layer.size, a + len(payload))
        elif kind is Kind.RANGE:
            replica = self._replica(ino, generation)
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
        self.found.mtimes.pop(ino, None)

    def _replica(self, ino: int, generation: int) -> Replica | None:
        """None when it did not survive a loss of power: that write had not been synced."""
        key = (ino, generation)
        if key not in self._replicas:
            try:
                self._replicas[key] = Replica(self._directory, ino, generation, create=False)
            except FileNotFoundError:
                self._replicas[key] = None
        return self._replicas[key]


async def recover(meta: MetaAPI, directory: str, before: int, threads: Executor) -> Recovered:
    """Replay the journals before ``before`` in ``directory``, in order. Inodes that do not exist any more are passed
    over."""
    loop = asyncio.get_running_loop()
    replay = _Replay(meta, directory)
    names = await loop.run_in_executor(threads, os.listdir, directory)
    for number in sorted(number for number in map(journal_number, names) if number is not None and number < before):
        records = read_journal(os.path.join(directory, journal_name(number)), number)
        while page := await loop.run_in_executor(threads, _page, records):
            for record in page:
                await replay.apply(record)
    return replay.found


def _page(records: Iterator[Record]) -> list[Record]:
    return list(itertools.islice(records, _PAGE))
