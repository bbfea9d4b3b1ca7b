"""The redo log: what operations have changed since the last commit of the database.

A commit writes every page that a row has changed in; a record here holds the row alone and is one ``write``. So
operations are acknowledged when their record is in the page cache, where it survives the death of the process, and the
database commits for hundreds of operations at a time. Each commit begins a new *generation*, noted in the database
within the same transaction; the log counts only when its generation is the database's, so no record is ever applied
twice. A generation is a random number: after a loss of power the database may be older than the log, and a counter
would come to the log's number again.

The log is not synced: ``SqliteStore.sync`` commits and syncs the database.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
import msgspec

from polefs.meta.model import Inode

Statement = tuple[str, tuple[Any, ...]]

_HEADER = struct.Struct("<8sQI")
"""magic; generation; CRC-32C of these, the seed of the records' checks"""
_MAGIC = b"polefsR1"
_RECORD = struct.Struct("<II")
"""payload length; CRC-32C of seed, position and payload"""
_FIRST = 64


class Batch(msgspec.Struct, array_like=True):
    """The changes of one turn, in order: statements, then the inode rows as they ended."""

    statements: list[Statement]
    inodes: list[Inode]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Batch).decode
_extend = google_crc32c.extend
_pack = _RECORD.pack


class Redo:
    """The log of one open database. Call ``begin`` before anything else."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._generation = 0
        self._header = b""
        self._seed = 0
        self._end = _FIRST
        self._records = 0

    def begin(self, generation: int) -> None:
        """Everything before is committed; records of ``generation`` follow. The first of them writes the header:
        this cannot fail."""
        self._generation = generation
        header, self._seed = _header(generation)
        self._header = header.ljust(_FIRST, b"\0")
        self._end = _FIRST
        self._records = 0

    def append(self, statements: list[Statement], inodes: list[Inode]) -> None:
        """Add the changes of a turn. After an OSError (ENOSPC) the log is as it was before."""
        payload = _encode((statements, inodes))
        end = self._end
        record = _pack(len(payload), _extend(self._seed ^ (end & 0xFFFFFFFF), payload)) + payload
        if self._records:
            written = os.pwrite(self._fd, record, end)
            if written != len(record):
                _write(self._fd, record[written:], end + written)
        else:
            _write(self._fd, self._header + record, 0)
        self._end = end + len(record)
        self._records += 1

    def batches(self) -> list[Batch]:
        """The records of this generation. EIO when not all of them can be read back."""
        if not self._records:
            return []
        found = list(_read(self._fd, self._generation))
        if len(found) != self._records:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.path)
        return found

    def close(self, *, remove: bool) -> None:
        os.close(self._fd)
        if remove:
            os.unlink(self.path)


def read_log(path: str, generation: int) -> list[Batch]:
    """What the log at ``path`` holds that a database of ``generation`` lacks: its records, up to the first that is not
    whole."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        return list(_read(fd, generation))
    finally:
        os.close(fd)


def _header(generation: int) -> tuple[bytes, int]:
    """A header and the seed of the checks of its records."""
    plain = _HEADER.pack(_MAGIC, generation, 0)[:-4]
    seed: int = google_crc32c.value(plain)
    return plain + seed.to_bytes(4, "little"), seed


def _write(fd: int, data: bytes, position: int) -> None:
    """All of it: the write after a short one tells why it was short."""
    while data:
        written = os.pwrite(fd, data, position)
        data = data[written:]
        position += written


def _read(fd: int, generation: int) -> Iterator[Batch]:
    header, seed = _header(generation)
    if os.pread(fd, len(header), 0) != header:
        return
    size = os.fstat(fd).st_size
    position = _FIRST
    while position + _RECORD.size < size:
        length, check = _RECORD.unpack(os.pread(fd, _RECORD.size, position))
        if not 0 < length <= size - position - _RECORD.size:
            return
        payload = os.pread(fd, length, position + _RECORD.size)
        if len(payload) < length or _extend(seed ^ (position & 0xFFFFFFFF), payload) != check:
            return
        yield _decode(payload)
        position += _RECORD.size + length
