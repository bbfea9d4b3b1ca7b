"""The journal of what has not been committed yet: every acknowledged change of contents, in order.

A journal file is a header and records. A record is written with one ``pwritev`` into the page cache before the change
is acknowledged, so the death of the process loses none; ``fdatasync`` makes them survive the loss of power. Records
carry a CRC-32C seeded with the file's random salt and their position, so whatever else lies in the file (a torn
record, the records of a former life of a recycled file) ends the replay.

Journals are numbered. Write-back starts the next one now and then, and deletes the oldest ones when all that they tell
of is committed. Replaying a journal whose changes have been committed already is harmless: it is replayed whole and in
order, and each byte, the size and the times end as their last record says, which is what has been committed.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

import google_crc32c

from polefs.objects.localio import read_available, read_cached

_MAGIC: Final = b"polefsJ1"
_HEADER: Final = struct.Struct("<8sQQI")
"""magic, number, salt, CRC-32C of these"""
HEADER_SIZE: Final = 64

_CHECK: Final = struct.Struct("<I")
_RECORD: Final = struct.Struct("<IIQQQQqQ")
"""payload length, kind, ino, two arguments, generation, time, position; the CRC-32C of these and the payload follows"""
_OVERHEAD: Final = _RECORD.size + _CHECK.size

RECYCLED_MAX: Final = 64 << 20
"""A finished journal is kept for its blocks up to this size, bytes: overwriting blocks that exist makes an append and
its fdatasync two to three times cheaper than growing a file."""

_FIRST_SIZE: Final = 16 << 20
"""Written with zeros when there is no journal to recycle, bytes."""

_SHARE: Final = 16
"""None of the two takes more than this part of the space that is left."""

SPARE_NAME: Final = "spare"
_PREFIX: Final = "journal."


class Kind(IntEnum):
    DATA = 1
    """Write of the payload at ``a``."""
    RANGE = 2
    """Write of ``b`` bytes at ``a``, which are in replica ``generation``."""
    TRUNCATE = 3
    """The size is ``a``."""
    HOLE = 4
    """The range ``a`` to ``b`` reads as zero, and the size is ``generation``."""
    MTIME = 5
    """The modification time was set to ``time`` by the user."""
    SETTLED = 6
    """What journal ``a`` tells up to position ``b``, and all older ones, has been committed, durably, and may have been
    changed by other means since."""
    SEGMENT = 7
    """Segment ``a`` is going to be written: its object is garbage unless its commit came about."""
    DIRECT = 8
    """Replica ``generation`` is the whole file from now on, and others write to it without telling."""


class Record(NamedTuple):
    """``end`` is where it ends in its journal."""

    kind: Kind
    ino: int
    a: int
    b: int
    generation: int
    time: int
    payload: bytes
    end: int = 0


def journal_name(number: int) -> str:
    return f"{_PREFIX}{number}"


def journal_number(name: str) -> int | None:
    """The number in a journal's file name, None for any other file."""
    digits = name.removeprefix(_PREFIX)
    return int(digits) if digits != name and digits.isdecimal() else None


class Journal:
    """One journal file open for appending. ``end`` is where the next record goes; up to ``synced`` everything
    survives the loss of power. ``failed`` is set when an fdatasync failed: what had been written by then may never
    become durable; ``referenced`` when payloads are read back from it."""

    __slots__ = ("_fd", "_seed", "end", "failed", "number", "path", "referenced", "synced")

    def __init__(self, directory: str, number: int, *, preallocate: bool = True) -> None:
        """Make the journal file, out of the spare one when there is one. Blocks."""
        spare = os.path.join(directory, SPARE_NAME)
        self._fd = -1
        self.number = number
        self.path = os.path.join(directory, journal_name(number))
        self._fd = os.open(spare, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if preallocate and os.fstat(self._fd).st_size == 0:
            os.pwrite(self._fd, bytes(_at_most(_FIRST_SIZE, self._fd)), 0)
        salt = os.urandom(8)
        fields = _HEADER.pack(_MAGIC, number, int.from_bytes(salt, "little"), 0)[:-4]
        os.pwrite(self._fd, fields + _CHECK.pack(_crc(0, fields)), 0)
        # Only a file that has its own header durably may bear the name: an old header's records would be replayed.
        os.fdatasync(self._fd)
        os.rename(spare, self.path)
        self._seed = _crc(0, salt)
        self.end = HEADER_SIZE
        self.synced = 0
        self.failed = self.referenced = False

    @classmethod
    def reopen(cls, directory: str, number: int) -> Journal:
        """A journal that another process has left, which from now on survives the loss of power; nothing is appended to
        it. Blocks."""
        journal = cls.__new__(cls)
        journal._fd = -1
        journal.number = number
        journal.path = os.path.join(directory, journal_name(number))
        journal._fd = os.open(journal.path, os.O_RDWR | os.O_CLOEXEC)
        os.fdatasync(journal._fd)
        journal._seed = 0
        journal.end = journal.synced = os.fstat(journal._fd).st_size
        journal.failed = journal.referenced = False
        return journal

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def append(self, kind: int, ino: int, a: int, b: int, generation: int, time: int, payload: bytes = b"") -> None:
        """Write one record into the page cache. OSError (ENOSPC, EIO …) when it could not be written whole; it is
        then not in the journal."""
        position = self.end
        fields = _RECORD.pack(len(payload), kind, ino, a, b, generation, time, position)
        check = google_crc32c.extend(self._seed, fields)
        if payload:
            check = google_crc32c.extend(check, payload)
            size = _OVERHEAD + len(payload)
            written = os.pwritev(self._fd, (fields, _CHECK.pack(check), payload), position)
        else:
            size = _OVERHEAD
            written = os.pwrite(self._fd, fields + _CHECK.pack(check), position)
        if written != size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.end = position + size

    def sync(self) -> None:
        """fdatasync; blocks. The caller keeps ``synced``."""
        os.fdatasync(self._fd)

    def remove(self, directory: str, *, recycle: bool) -> None:
        """Take the journal away, or make it the spare one. Blocks."""
        if recycle and not self.failed and not self.referenced:
            kept = _at_most(RECYCLED_MAX, self._fd)
            if os.fstat(self._fd).st_size > kept:
                os.ftruncate(self._fd, kept)
            os.rename(self.path, os.path.join(directory, SPARE_NAME))
        else:
            os.unlink(self.path)


class Logged:
    """Bytes that are to be read from a journal, the payload of a record; ``base`` is the file offset of the first one,
    ``position`` where it stands in the journal."""

    __slots__ = ("_base", "_journal", "_position")

    def __init__(self, base: int, journal: Journal, position: int) -> None:
        self._base = base
        self._journal = journal
        self._position = position
        journal.referenced = True

    def read_now(self, offset: int, length: int) -> memoryview | None:
        """As of ``Replica``."""
        return read_cached(self._journal._fd, self._position + offset - self._base, length)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes; blocks. EIO when they are not there any more."""
        data = read_available(self._journal._fd, self._position + offset - self._base, length)
        if len(data) < length:
            raise OSError(errno.EIO, f"{self._journal.path} has been cut")
        return data


def read_journal(path: str, number: int) -> Iterator[Record]:
    """The records of a journal file up to its end or its first damaged one. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = read_available(fd, 0, _HEADER.size)
        if len(header) < _HEADER.size:
            return
        magic, found_number, salt, check = _HEADER.unpack(header)
        if magic != _MAGIC or found_number != number or check != _crc(0, header[:-4]):
            return
        seed = _crc(0, salt.to_bytes(8, "little"))
        position = HEADER_SIZE
        size = os.fstat(fd).st_size
        while position + _OVERHEAD <= size:
            head = read_available(fd, position, _OVERHEAD)
            if len(head) < _OVERHEAD:
                return
            fields = head[: _RECORD.size]
            length, kind, ino, a, b, generation, time, stated = _RECORD.unpack(fields)
            if stated != position or length > size - position - _OVERHEAD:
                return
            payload = read_available(fd, position + _OVERHEAD, length) if length else b""
            if _CHECK.unpack(head[_RECORD.size :])[0] != _crc(_crc(seed, fields), payload):
                return
            position += _OVERHEAD + length
            yield Record(Kind(kind), ino, a, b, generation, time, payload, position)
    finally:
        os.close(fd)


def _at_most(size: int, fd: int) -> int:
    found = os.fstatvfs(fd)
    return min(size, found.f_bavail * found.f_frsize // _SHARE)


def _crc(crc: int, data: bytes) -> int:
    return int(google_crc32c.extend(crc, data))
