"""Where file contents live: a store of immutable objects.

A key is written once and never overwritten; whoever writes it a second time writes the same bytes. Keys are relative
paths of the characters ``a-z 0-9 . _ - /``.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec


class StoreError(OSError):
    """``transient``: the store is out of reach, or cannot serve now; the same request may succeed later."""

    def __init__(self, number: int, text: str, *, transient: bool = False) -> None:
        super().__init__(number, " ".join(text.split()))
        self.transient = transient


def is_transient(error: BaseException) -> bool:
    return isinstance(error, StoreError) and error.transient


def for_programs(error: OSError) -> OSError:
    """What a program is told that reads or writes a file: the errno of read(2), write(2) and fsync(2), not that of
    the store's own troubles (EACCES for wrong keys …); ETIMEDOUT when the store has been out of reach for too long."""
    if not isinstance(error, StoreError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    return OSError(errno.ETIMEDOUT if error.transient else errno.EIO, error.strerror)


class ObjectInfo(msgspec.Struct, frozen=True):
    key: str
    size: int
    age: float
    """Seconds since it was written, by the clock of the store."""


class Upload(msgspec.Struct, frozen=True):
    """An object on its way in parts. What is left of one that nobody goes on with takes up room like an object."""

    key: str
    id: str
    age: float
    """Seconds since it began, by the clock of the store."""


class Space(msgspec.Struct, frozen=True):
    """Room in a store (statvfs): bytes and inodes, in all, free, and free for unprivileged users."""

    bytes_total: int
    bytes_free: int
    bytes_available: int
    files_total: int
    files_free: int


UNLIMITED = Space(1 << 50, 1 << 50, 1 << 50, 1 << 40, 1 << 40)
"""Of a store that has no limit of its own: 1 PiB, which programs that add and multiply such numbers can bear."""


class ObjectStore(Protocol):
    """Failures are ``OSError``: ENOENT for a missing key, ENOSPC, EIO … as the store reports them."""

    @property
    def away_since(self) -> float | None:
        """Since when the store has been out of reach, in the time of the event loop: every attempt from then on has
        failed. None when the last one has not."""
        ...

    def hurry(self, seconds: float) -> None:
        """The end is near: no operation, also of those under way, makes further attempts for longer than this."""
        ...

    async def put(self, key: str, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write one object from its parts, in order. Returns once the object is durable. After a failure or a crash the
        key holds all of the object or does not exist."""
        ...

    async def adopt(self, key: str, path: str) -> bool:
        """Make the local file ``path`` the object without copying it, when the store can (a hard link); the caller
        never changes that file's bytes again. False when it cannot: the caller then uses ``put``."""
        ...

    async def get(self, key: str, offset: int, length: int) -> bytes | memoryview:
        """Exactly ``length`` bytes at ``offset``. EIO when the object is shorter."""
        ...

    def get_now(self, key: str, offset: int, length: int) -> bytes | memoryview | None:
        """As ``get`` where the bytes can be had without waiting (a cached local file), else None. Never blocks."""
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; a key that does not exist is no error."""
        ...

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """All objects whose keys start with ``prefix``, in no particular order. Memory is needed for a page of them."""
        ...

    def uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """As ``list``, uploads that have begun and neither been completed nor aborted."""
        ...

    async def abort(self, upload: Upload) -> None:
        """End an upload; one that does not exist is no error."""
        ...

    async def space(self) -> Space:
        """How much it holds and can still take."""
        ...

    async def close(self) -> None: ...


SEGMENTS = "segments/"
"""What the keys of all segments start with."""


def segment_key(segment: int) -> str:
    """The key of a segment's object; 256 consecutive segments share a prefix."""
    return f"{SEGMENTS}{segment >> 8:x}/{segment:x}"


def segment_of(key: str) -> int:
    """The segment whose object this is, -1 for none."""
    try:
        id_ = int(key.rpartition("/")[2], 16)
    except ValueError:
        return -1
    return id_ if segment_key(id_) == key else -1
