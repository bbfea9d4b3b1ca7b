"""Which source holds which bytes of a file: a map from byte ranges to sources.

A source is a ``Chunk`` (bytes in memory), ``Logged`` (bytes in a journal), a ``Replica`` (a local file,
offset-identical to the file) or ``HOLE`` (reads as zero). What the map does not cover is somebody else's: an older
layer's, or the committed contents'.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Final, Literal

from polefs.data.journal import Logged
from polefs.data.replica import Replica

TINY: Final = 8192
"""Appended chunks are joined up to this size, bytes, so that a log written line by line does not become a piece a
line."""


class Absent(Enum):
    """Sources without bytes of their own: HOLE reads as zero, BASE is what has been committed before."""

    HOLE = 0
    BASE = 1


HOLE: Final = Absent.HOLE
BASE: Final = Absent.BASE


class Chunk:
    """Bytes in memory; ``base`` is the file offset of the first one."""

    __slots__ = ("base", "data")

    def __init__(self, base: int, data: bytes) -> None:
        self.base = base
        self.data = data

    def cut(self, start: int, end: int) -> bytes | memoryview:
        """The bytes of the file range, which must lie within; not copied where that can be avoided."""
        base, data = self.base, self.data
        if end - start == len(data):
            return data
        return memoryview(data)[start - base : end - base]

    def read(self, offset: int, length: int) -> bytes:
        """As of ``Replica``."""
        data = self.cut(offset, offset + length)
        return data if isinstance(data, bytes) else bytes(data)

    def part(self, start: int, end: int) -> Chunk:
        """A chunk for this range alone: the same one unless it would keep more than twice the memory that is needed."""
        if (end - start) * 2 >= len(self.data):
            return self
        return Chunk(start, bytes(self.cut(start, end)))


DataSource = Chunk | Logged | Replica
DirtySource = DataSource | Literal[Absent.HOLE]
"""What a map holds."""
Source = DataSource | Absent
"""What a lookup through all layers finds."""

DirtyPiece = tuple[int, int, DirtySource]
Piece = tuple[int, int, Source]
"""``(start, end, source)``"""


class RangeMap:
    """Sorted pieces that do not overlap. ``memory`` counts the bytes in chunks, ``logged`` those in journals alone,
    ``data`` all that are no holes."""

    __slots__ = ("_pieces", "_starts", "data", "logged", "memory")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[DirtyPiece] = []
        self.memory = 0
        self.logged = 0
        self.data = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[DirtyPiece]:
        return iter(self._pieces)

    def set(self, start: int, end: int, source: DirtySource) -> None:
        """The range is ``source``'s from now on, whatever it was. ``start`` < ``end``; a chunk must contain the
        range."""
        starts, pieces = self._starts, self._pieces
        size = end - start
        if source is not HOLE:
            self.data += size
            if source.__class__ is Chunk:
                self.memory += size
            elif source.__class__ is Logged:
                self.logged += size
        if not starts:
            starts.append(start)
            pieces.append((start, end, source))
            return
        last_start, last_end, last = pieces[-1]
        if start >= last_end:
            if start == last_end:
                if last is source:
                    pieces[-1] = (last_start, end, source)
                    return
                if isinstance(source, Chunk) and isinstance(last, Chunk) and end - last_start <= TINY:
                    joined = Chunk(last_start, b"".join((last.cut(last_start, last_end), source.cut(start, end))))
                    pieces[-1] = (last_start, end, joined)
                    return
            starts.append(start)
            pieces.append((start, end, source))
            return
        self._replace(start, end, source)

    def _replace(self, start: int, end: int, source: DirtySource) -> None:
        starts, pieces = self._starts, self._pieces
        first = bisect_right(starts, start) - 1
        if first < 0 or pieces[first][1] <= start:
            first += 1
        after = bisect_left(starts, end, first)
        new: list[DirtyPiece] = [(start, end, source)]
        for old_start, old_end, old in pieces[first:after]:
            if old is not HOLE:
                lost = min(old_end, end) - max(old_start, start)
                self.data -= lost
                if old.__class__ is Chunk:
                    self.memory -= lost
                elif old.__class__ is Logged:
                    self.logged -= lost
            if old_start < start:
                new.insert(0, (old_start, start, old.part(old_start, start) if isinstance(old, Chunk) else old))
            if old_end > end:
                new.append((end, old_end, old.part(end, old_end) if isinstance(old, Chunk) else old))
        if first > 0 and pieces[first - 1][1] == new[0][0]:
            first -= 1
            new.insert(0, pieces[first])
        if after < len(pieces) and pieces[after][0] == new[-1][1]:
            new.append(pieces[after])
            after += 1
        joined = [new[0]]
        for piece in new[1:]:
            before = joined[-1]
            if piece[2] is before[2]:
                joined[-1] = (before[0], piece[1], before[2])
            else:
                joined.append(piece)
        pieces[first:after] = joined
        starts[first:after] = [piece[0] for piece in joined]

    def overlapping(self, start: int, end: int) -> Sequence[DirtyPiece]:
        """The pieces that share bytes with the range, whole, in order."""
        pieces = self._pieces
        if len(pieces) == 1:
            only = pieces[0]
            return pieces if only[0] < end and only[1] > start else ()
        first = bisect_right(self._starts, start) - 1
        if first < 0 or pieces[first][1] <= start:
            first += 1
        return pieces[first : bisect_left(self._starts, end, first)]


def resolve(maps: Sequence[RangeMap], start: int, end: int) -> list[Piece]:
    """The range through a stack of maps, oldest first: pieces in order and without gaps, clipped to the range; what
    no map covers is BASE. Neighbours of one source are not joined."""
    found: list[Piece] = []
    gaps = [(start, end)]
    for ranges in reversed(maps):
        left: list[tuple[int, int]] = []
        for gap_start, gap_end in gaps:
            position = gap_start
            for piece_start, piece_end, source in ranges.overlapping(gap_start, gap_end):
                if piece_start > position:
                    left.append((position, piece_start))
                    position = piece_start
                stop = piece_end if piece_end < gap_end else gap_end
                found.append((position, stop, source))
                position = stop
            if position < gap_end:
                left.append((position, gap_end))
        gaps = left
        if not gaps:
            break
    if gaps:
        found.extend((gap_start, gap_end, BASE) for gap_start, gap_end in gaps)
    if len(found) > 1:
        found.sort(key=_start)
    return found


def _start(piece: Piece) -> int:
    return piece[0]
