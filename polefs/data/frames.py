"""Frames: the pieces in which segments are stored, read back and verified.

A run of contents is cut into frames of up to ``FRAME_MAX`` bytes; each is compressed and encrypted by itself, so any of
them can be read back alone with one ranged GET. The CRC-32C of a frame is that of its plain bytes: it is verified after
everything else has been undone. A frame that compression does not make smaller is stored as it is.

All of this is pure computation, and meant for the threads of the data path: nothing here touches a file or the network.
"""

from __future__ import annotations

import errno
import threading
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from enum import IntFlag
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import google_crc32c
import lz4.block
import zstandard

from polefs.meta.model import Segment

if TYPE_CHECKING:
    from polefs.data.cipher import Cipher

Buffer = bytes | memoryview

FRAME_MAX: Final = 128 << 10
"""Longest frame, bytes of contents. What a random read fetches; zstd compresses frames of this size nearly as well as
eight times longer ones, and the table takes 14 bytes a frame."""

_ZSTD_LEVEL: Final = 3


class Coding(IntFlag):
    """How the frames of a segment are stored (``Segment.coding``)."""

    PLAIN = 0
    ZSTD = 1
    LZ4 = 2
    ENCRYPTED = 4


COMPRESSIONS: Final = {"none": Coding.PLAIN, "zstd": Coding.ZSTD, "lz4": Coding.LZ4}
"""By the names that users give."""


class Codec:
    """Encodes the frames of new segments one way, and decodes those of any segment of the volume. Thread-safe."""

    def __init__(self, compression: Coding = Coding.PLAIN, cipher: Cipher | None = None) -> None:
        """``cipher``: None where nothing is encrypted."""
        self.coding = compression | (Coding.ENCRYPTED if cipher is not None else Coding.PLAIN)
        self._cipher = cipher
        self._local = _Zstd()

    def encode(self, segment: int, index: int, data: bytes) -> bytes:
        """What is stored of frame ``index`` of a segment. As long as ``data`` where nothing is done to it, and the same
        object."""
        stored = data
        if self.coding & Coding.ZSTD:
            stored = self._local.compressor.compress(data)
        elif self.coding & Coding.LZ4:
            stored = lz4.block.compress(data, store_size=False)
        if len(stored) >= len(data):
            stored = data
        if self._cipher is not None:
            stored = self._cipher.encrypt(segment, index, stored)
        return stored

    def decode(self, table: FrameTable, index: int, stored: Buffer) -> Buffer:
        """The plain bytes of a frame, verified. EIO when they are not what was written, or the key is another."""
        data = stored
        length = table.length(index)
        try:
            if table.coding & Coding.ENCRYPTED:
                if self._cipher is None:
                    raise ValueError("encrypted, and there is no key")
                data = self._cipher.decrypt(table.segment, index, stored)
            if len(data) != length:
                data = self._decompress(table.coding, data, length)
        except (ValueError, zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
            raise _damaged(table.segment, index, str(error)) from None
        if len(data) != length or google_crc32c.value(bytes(data)) != table.checks[index]:
            raise _damaged(table.segment, index, "wrong checksum")
        return data

    def _decompress(self, coding: int, data: Buffer, length: int) -> bytes:
        if coding & Coding.ZSTD:
            # A damaged frame must not make us allocate what it says.
            if zstandard.frame_content_size(data) != length:
                raise ValueError("wrong length")
            return self._local.decompressor.decompress(data)
        if coding & Coding.LZ4:
            plain: bytes = lz4.block.decompress(data, uncompressed_size=length)
            return plain
        raise ValueError("wrong length")


class _Zstd(threading.local):
    """The contexts of zstd, which serve one thread each."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


class FrameTable:
    """Where the frames of one segment are: a compact form of ``Segment`` for looking up."""

    __slots__ = ("_ends", "_stored_ends", "checks", "coding", "segment")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment.id
        self.coding = segment.coding
        self.checks = array("I", (check for _, _, check in segment.frames))
        """CRC-32C of each frame's plain bytes."""
        self._ends = array("Q", accumulate(length for length, _, _ in segment.frames))
        self._stored_ends = array("Q", accumulate(stored for _, stored, _ in segment.frames))

    def __len__(self) -> int:
        return len(self.checks)

    @property
    def size(self) -> int:
        """Bytes of contents in the segment."""
        return self._ends[-1] if self._ends else 0

    def start(self, index: int) -> int:
        """Where the plain bytes of a frame begin; for the number of frames the end of the last."""
        return self._ends[index - 1] if index else 0

    def length(self, index: int) -> int:
        return self._ends[index] - self.start(index)

    def stored_start(self, index: int) -> int:
        """As ``start``, in the stored object."""
        return self._stored_ends[index - 1] if index else 0

    def covering(self, start: int, end: int) -> tuple[int, int]:
        """The frames ``[first, last)`` that hold the plain bytes ``[start, end)``, which must be within the segment:
        EIO when they are not."""
        if not 0 <= start < end <= self.size:
            raise OSError(errno.EIO, f"segment {self.segment} has no bytes {start} to {end}")
        return bisect_right(self._ends, start), bisect_right(self._ends, end - 1) + 1


def encode_frames(
    codec: Codec, segment: int, first: int, parts: Sequence[bytes]
) -> tuple[list[bytes], list[tuple[int, int, int]]]:
    """Frames from ``first`` on for a run of bytes that comes in ``parts``: what to store, in parts, and their rows of
    ``Segment.frames``."""
    stored: list[bytes] = []
    rows: list[tuple[int, int, int]] = []
    for group in _cut(parts):
        length = sum(map(len, group))
        check = 0
        for part in group:
            check = google_crc32c.extend(check, part)
        if codec.coding == Coding.PLAIN:
            stored.extend(group)
            rows.append((length, length, check))
            continue
        frame = codec.encode(segment, first + len(rows), group[0] if len(group) == 1 else b"".join(group))
        stored.append(frame)
        rows.append((length, len(frame), check))
    return stored, rows


def _cut(parts: Sequence[bytes]) -> list[list[bytes]]:
    """The bytes in groups of FRAME_MAX."""
    groups: list[list[bytes]] = []
    room = 0
    for part in parts:
        position = 0
        while position < len(part):
            if not room:
                groups.append([])
                room = FRAME_MAX
            piece = part if not position and len(part) <= room else part[position : position + room]
            groups[-1].append(piece)
            room -= len(piece)
            position += len(piece)
    return groups


def _damaged(segment: int, index: int, why: str) -> OSError:
    return OSError(errno.EIO, f"frame {index} of segment {segment} is not what was written: {why}")
