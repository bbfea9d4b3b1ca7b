"""Finding what has changed in a local file that others write to without telling.

Contents are compared by *frames* of the file. What is remembered of a frame is a keyed hash (GMAC under a key of this
process) of its data and of where its holes are. No checksum would do: a record that ends with its own CRC leaves every
CRC register as any other such record does, so changes of whole records would not be seen.

Everything here but ``Snapshot.commit`` blocks.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from polefs.data.cache.rangeset import Range
from polefs.data.replica import Replica
from polefs.objects.localio import allocated_ranges, read_available

FRAME: Final = 128 << 10
"""The unit of comparison, bytes."""

_NONCE: Final = bytes(12)
_RANGE: Final = struct.Struct("<II")
_UNKNOWN: Final = b""

_tag = AESGCM(AESGCM.generate_key(128)).encrypt
"""Tags never leave the process, so that one nonce does for all of them."""


class Known:
    """What is committed of a file: the hash of each frame with data. A frame that is not among them is a hole."""

    __slots__ = ("_frames",)

    def __init__(self) -> None:
        self._frames: dict[int, bytes] = {}

    @classmethod
    def of(cls, fd: int) -> Known:
        """That all of a file is committed as it is now."""
        known = cls()
        for frame, ranges in _frames(fd, os.fstat(fd).st_size):
            known._frames[frame] = _hash(fd, frame, ranges)
        return known

    def compare(self, fd: int, size: int) -> tuple[list[Range], list[Range]]:
        """What is to be committed so that the first ``size`` bytes of the file are: ranges of data, and of holes."""
        data: list[Range] = []
        holes: list[Range] = []
        gone = dict.fromkeys(frame for frame in self._frames if frame * FRAME < size)
        for frame, ranges in _frames(fd, size):
            gone.pop(frame, None)
            known = self._frames.get(frame)
            if known is not None:
                if known and known == _hash(fd, frame, ranges):
                    continue
                holes.extend(_gaps(ranges, frame * FRAME, min((frame + 1) * FRAME, size)))
            data.extend(ranges)
        holes.extend((frame * FRAME, min((frame + 1) * FRAME, size)) for frame in gone)
        return data, holes

    def forget(self, ranges: list[Range]) -> None:
        """What is committed of the frames of these ranges is not known any more."""
        for start, end in ranges:
            for frame in range(start // FRAME, -(-end // FRAME)):
                self._frames[frame] = _UNKNOWN

    def note(self, frames: dict[int, bytes], holes: list[Range], size: int) -> None:
        """These frames are committed, and these ranges as holes, in a file of this size."""
        for start, end in holes:
            if start % FRAME == 0 and (end % FRAME == 0 or end == size):
                for frame in range(start // FRAME, -(-end // FRAME)):
                    self._frames.pop(frame, None)
        self._frames.update(frames)
        for frame in [frame for frame in self._frames if frame * FRAME >= size]:
            del self._frames[frame]


class Snapshot(Replica):
    """A replica as it is read for one write-back: what was read is what is known afterwards, whatever has been written
    meanwhile."""

    __slots__ = ("_parts", "_replica")

    def __init__(self, replica: Replica) -> None:
        self._replica = replica  # keeps the descriptor open
        self._parts: dict[int, dict[int, tuple[int, bytes]]] = {}
        self.fd = replica.fd
        self.ino = replica.ino
        self.generation = replica.generation
        self.path = replica.path

    def __del__(self) -> None:
        pass

    def read(self, offset: int, length: int) -> bytes:
        data = super().read(offset, length)
        view = memoryview(data)
        position = offset
        while position < offset + length:
            frame = position // FRAME
            end = min((frame + 1) * FRAME, offset + length)
            part = _tag(_NONCE, b"", view[position - offset : end - offset])
            self._parts.setdefault(frame, {})[position] = (end, part)
            position = end
        return data

    def frames(self) -> dict[int, bytes]:
        """The hashes of what was read last of each frame."""
        return {
            frame: _combine(frame, [(start, end, part) for start, (end, part) in sorted(parts.items())])
            for frame, parts in self._parts.items()
        }


def notices_mappings(directory: str) -> bool:
    """Whether the file system of ``directory`` changes a file's times when it is written through a mapping. Some in
    memory do not."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        os.utime(file.fileno(), ns=(0, 0))
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapped:
            mapped[0] = 1
        return os.fstat(file.fileno()).st_mtime_ns != 0


def _frames(fd: int, size: int) -> Iterator[tuple[int, list[Range]]]:
    """The frames of the first ``size`` bytes that have data, and where it is in them."""
    last = -1
    ranges: list[Range] = []
    for start, end in allocated_ranges(fd):
        end = min(end, size)
        while start < end:
            frame = start // FRAME
            stop = min((frame + 1) * FRAME, end)
            if frame != last:
                if ranges:
                    yield last, ranges
                last, ranges = frame, []
            ranges.append((start, stop))
            start = stop
    if ranges:
        yield last, ranges


def _gaps(ranges: list[Range], start: int, end: int) -> Iterator[Range]:
    for low, high in ranges:
        if start < low:
            yield start, low
        start = high
    if start < end:
        yield start, end


def _hash(fd: int, frame: int, ranges: list[Range]) -> bytes:
    parts = []
    for start, end in ranges:
        data = read_available(fd, start, end - start)
        if len(data) < end - start:
            data += bytes(end - start - len(data))
        parts.append((start, end, _tag(_NONCE, b"", data)))
    return _combine(frame, parts)


def _combine(frame: int, parts: list[tuple[int, int, bytes]]) -> bytes:
    first = frame * FRAME
    told = b"".join(_RANGE.pack(start - first, end - first) + part for start, end, part in parts)
    return hashlib.blake2b(told, digest_size=16).digest()
