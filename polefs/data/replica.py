"""Local files of dirty contents: sparse, offset-identical to the file whose bytes they hold."""

from __future__ import annotations

import os
import re

from polefs.objects.localio import read_available, read_cached, write_all

_NAME = re.compile(r"([0-9]+)\.([0-9]+)\Z")


def replica_name(ino: int, generation: int) -> str:
    """The name of a replica in the local directory: ``<ino>.<generation>``."""
    return f"{ino}.{generation}"


def replica_generation(name: str) -> int:
    """The generation in the name of a replica, 0 for any other file."""
    match = _NAME.match(name)
    return int(match[2]) if match is not None else 0


class Replica:
    """One replica file, open as long as anything refers to it: pieces of a range map, a read, a write-back.

    It belongs to one layer and so to one journal. ``writes`` counts its writes, ``synced`` is that count as of the last
    completed fdatasync, ``entry_synced`` tells whether its name has been made durable."""

    __slots__ = ("entry_synced", "fd", "generation", "ino", "path", "synced", "writes")

    def __init__(self, directory: str, ino: int, generation: int, *, create: bool) -> None:
        self.fd = -1
        self.ino = ino
        self.generation = generation
        self.path = os.path.join(directory, replica_name(ino, generation))
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        self.fd = os.open(self.path, flags, 0o600)
        self.writes = 0
        self.synced = 0
        self.entry_synced = False

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Into the page cache. An OSError leaves the range with any mixture of old and new bytes."""
        self.writes += 1
        write_all(self.fd, data, offset)

    @property
    def durable(self) -> bool:
        return self.synced == self.writes and self.entry_synced

    def read_now(self, offset: int, length: int) -> memoryview | None:
        """The bytes, where the page cache has them, else None. Never blocks."""
        return read_cached(self.fd, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes; blocks. What lies past the end of the replica reads as zero."""
        data = read_available(self.fd, offset, length)
        return data if len(data) == length else data + bytes(length - len(data))
