"""What all kinds of rows need: the layers, the answers, and the changes of the operation that runs; inodes, numbers and
counters."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from polefs.meta.model import Inode, Usage
from polefs.meta.store.base import SOLE
from polefs.meta.store.postgres.layers import NOTHING, Answers, Batch, Known, Layer, Miss
from polefs.meta.store.postgres.queries import Kind

_inodes = attrgetter("inodes")


class Numbers:
    """Where the volume's counters stand. Each commit writes them; numbers of operations that failed stay unused."""

    def __init__(self) -> None:
        self.ino = 0
        self.cookie = 0
        self.segment = 0
        self.session = 0
        self.writer = 0

    def marks(self) -> tuple[int, ...]:
        """What a commit notes of them (``tables.MARK``)."""
        return self.ino, self.cookie, self.segment, self.session, self.writer


class Rows:
    """The base of ``PostgresTransaction``."""

    def __init__(self, known: Known, usage: Usage, numbers: Numbers) -> None:
        self._known = known
        self._caches = known.caches
        self._usage = usage
        self._numbers = numbers
        self.session = SOLE
        self._own = Layer()
        self._answers = NOTHING
        self._bytes = 0
        self._count = 0
        self._writer: int | None = None
        self.rows = 0
        """Rows changed by this operation."""
        self.reserved = False
        """It was given numbers."""
        self.depends: Batch | None = None
        """The newest batch of which the operation has seen something that is not committed yet."""

    # Life of the operation (the store's)

    def begin(self, answers: Answers) -> None:
        self._answers = answers
        self.depends = None
        self.reserved = False

    def take_back(self) -> None:
        """Forget what the operation has changed."""
        if self.rows:
            self._own = Layer()
            self.rows = 0
        self._usage.bytes -= self._bytes
        self._usage.inodes -= self._count
        self._bytes = self._count = 0
        self._writer = None

    def apply(self, batch: Batch) -> None:
        """Make the changes part of a batch."""
        if self.rows:
            self._known.add(batch, self._own)
            batch.rows += self.rows
            self._own = Layer()
            self.rows = 0
        if self._writer is not None:
            self._numbers.writer = self._writer
            self._writer = None
        self._bytes = self._count = 0

    def _saw(self, batch: Batch | None) -> None:
        if batch is not None and (self.depends is None or batch.number > self.depends.number):
            self.depends = batch

    def _answer(self, *want: Any) -> Any:
        try:
            return self._answers.other[want]
        except KeyError:
            raise Miss(want) from None

    def _layers(self, *tables: str) -> Iterator[Layer]:
        """Oldest first; those that hold rows of these tables and are not committed count as seen."""
        for layer in reversed(self._known.layers):
            if not layer.committed and any(getattr(layer, table) for table in tables):
                self._saw(layer)
            yield layer
        yield self._own

    # Inodes

    async def inode(self, ino: int) -> Inode | None:
        own = self._own.inodes
        if own and ino in own:
            return own[ino]
        caches = self._caches
        inode = caches.inodes.get(ino) or caches.inlined.get(ino)
        layers = self._known.layers
        if inode is not None and not layers:
            return inode
        for layer in layers:
            if ino in layer.inodes:
                if not layer.committed:
                    self._saw(layer)
                return layer.inodes[ino]
        if inode is not None:
            return inode
        found = self._answers.inodes
        if ino in found:
            return found[ino]
        raise Miss((Kind.INODE, ino))

    def _knows_inode(self, ino: int) -> bool:
        return (
            self._caches.inode(ino) is not None
            or ino in self._own.inodes
            or ino in self._answers.inodes
            or self._known.find(_inodes, ino)[0]
        )

    def _peek(self, ino: int) -> Inode | None:
        """The inode as it was before this operation, when it is known and exists."""
        there, inode, _ = self._known.find(_inodes, ino)
        if there:
            peeked: Inode | None = inode
            return peeked
        return self._caches.inode(ino) or self._answers.inodes.get(ino)

    def put_inode(self, inode: Inode) -> None:
        self.rows += 1
        self._own.inodes[inode.ino] = inode

    async def delete_inode(self, ino: int) -> None:
        self.rows += 1
        self._own.inodes[ino] = None

    # Numbers

    def _cookie(self) -> int:
        self.reserved = True
        cookie = self._numbers.cookie
        self._numbers.cookie += 1
        return cookie

    async def allocate_ino(self) -> int:
        self.reserved = True
        ino = self._numbers.ino
        self._numbers.ino += 1
        return ino

    async def allocate_segments(self, count: int) -> int:
        self.reserved = True
        first = self._numbers.segment
        self._numbers.segment += count
        return first

    async def exchange_writer(self, writer: int) -> int:
        self.reserved = True
        previous = self._numbers.writer
        self._writer = writer
        return previous

    # Counters

    def usage(self) -> Usage:
        return self._usage

    def add_usage(self, bytes_: int, inodes: int) -> None:
        self._usage.bytes += bytes_
        self._usage.inodes += inodes
        self._bytes += bytes_
        self._count += inodes
