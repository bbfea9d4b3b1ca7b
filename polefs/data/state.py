"""What is not committed yet of one file: a stack of layers over its committed contents."""

from __future__ import annotations

from copy import copy
from typing import Final

from polefs.data.ranges import BASE, HOLE, Piece, RangeMap, resolve
from polefs.data.replica import Replica
from polefs.meta.model import Inode

_MANY_PIECES: Final = 512


class Layer:
    """Changes of one file since its last write-back began. It belongs to journal ``epoch``, which tells all of them;
    one that was recovered, to the oldest of those that do.

    ``size`` is the file's size after them; ``mtime`` is None when they leave the modification time alone; ``ctime``
    is that of the last one, and ``place`` where its record ends: the journal's number, and the position. A ``sealed``
    layer changes no more: it is being written back."""

    __slots__ = ("ctime", "epoch", "mtime", "place", "ranges", "replica", "sealed", "size")

    def __init__(self, epoch: int, size: int, ctime: int) -> None:
        self.epoch = epoch
        self.place = (epoch, 0)
        self.size = size
        self.mtime: int | None = None
        self.ctime = ctime
        self.ranges = RangeMap()
        self.replica: Replica | None = None
        self.sealed = False


class FileState:
    """The layers of one file, oldest first; never empty. ``journal_epoch`` and ``journal_end`` are where the file's
    latest record ends. ``synced_often`` is set by fsync: such a file's small writes go to the journal, which is then
    all that an fsync has to wait for. ``committed``: bytes of the oldest layers that are, while they are being written
    back. ``gone``: the file was removed. ``direct``: others can change what its layers tell of, so that it is not to
    be cached (``polefs.data.direct``)."""

    __slots__ = ("committed", "direct", "gone", "ino", "journal_end", "journal_epoch", "layers", "synced_often")

    def __init__(self, ino: int) -> None:
        self.ino: Final = ino
        self.layers: list[Layer] = []
        self.journal_epoch = 0
        self.journal_end = 0
        self.synced_often = False
        self.committed = 0
        self.gone = False
        self.direct = False

    @property
    def size(self) -> int:
        return self.layers[-1].size

    def resolve(self, start: int, end: int, depth: int | None = None) -> list[Piece]:
        """The range through the ``depth`` oldest layers (all)."""
        return resolve([layer.ranges for layer in self.layers[:depth]], start, end)

    @property
    def bytes(self) -> int:
        """Bytes of contents in all layers."""
        return sum(layer.ranges.data for layer in self.layers)

    def replicas(self) -> list[Replica]:
        return [layer.replica for layer in self.layers if layer.replica is not None]

    def overlay(self, inode: Inode) -> Inode:
        """The inode as it would be were everything committed."""
        top = self.layers[-1]
        mtime = inode.mtime
        for layer in self.layers:
            if layer.mtime is not None:
                mtime = layer.mtime
        seen = copy(inode)
        seen.size = top.size
        seen.allocated = self._estimate(inode)
        seen.mtime = mtime
        seen.ctime = max(inode.ctime, top.ctime)
        return seen

    def _estimate(self, inode: Inode) -> int:
        """Allocated bytes. Exact unless committed contents are sparse, or the changes are in very many pieces."""
        layers = self.layers
        if len(layers) == 1 and not inode.allocated:
            return layers[0].ranges.data
        if sum(len(layer.ranges) for layer in layers) > _MANY_PIECES:
            return min(max(inode.allocated, layers[-1].ranges.data), self.size)
        data = 0
        kept = 0
        for start, end, source in self.resolve(0, max(self.size, 1)):
            if source is BASE:
                kept += max(min(end, inode.size) - start, 0)
            elif source is not HOLE:
                data += end - start
        if inode.allocated < inode.size:
            # Which of the bytes kept are holes only the extents can tell; counted by their share of the file.
            kept = kept * inode.allocated // inode.size
        return data + kept
