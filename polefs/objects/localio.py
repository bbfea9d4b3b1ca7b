"""Reading and writing local files: whole transfers, reads that never wait, holes, and what makes them durable."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence

from polefs.objects.base import Space

_IOV_MAX = 1024

_PAGE = 4096
"""What O_DIRECT wants addresses, offsets and lengths to be multiples of, where it is the most demanding, bytes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


DIRECT_MIN = 1 << 20
"""From so many bytes on it is worth while to write past the page cache."""


class OpenFile:
    """A descriptor that is closed with its last user, so that who lets go of it never closes it under a read in
    another thread."""

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``. An OSError leaves what had been written by then."""
    written = os.pwrite(fd, data, offset)
    if written == len(data):
        return
    rest = memoryview(data)[written:]
    while rest:
        if written == 0:
            raise OSError(errno.EIO, "a write to a local file made no progress")
        offset += written
        written = os.pwrite(fd, rest, offset)
        rest = rest[written:]


def write_parts(fd: int, parts: Sequence[bytes | bytearray | memoryview], offset: int = 0) -> int:
    """Write the parts one after another from ``offset`` on; returns where they end."""
    for first in range(0, len(parts), _IOV_MAX):
        group = parts[first : first + _IOV_MAX]
        total = sum(map(len, group))
        written = os.pwritev(fd, group, offset)
        if written != total:
            position = offset
            for part in group:
                write_all(fd, part, position)
                position += len(part)
        offset += total
    return offset


def aligned_buffer(length: int) -> memoryview:
    """Zeros that O_DIRECT can take, when they are many."""
    if length < DIRECT_MIN:
        return memoryview(bytearray(length))
    buffer = bytearray(length + _PAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % _PAGE
    return memoryview(buffer)[start : start + length]


def write_past_cache(fd: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    """As ``write_parts``, where possible from the memory straight to the disk: a tenth of the CPU time, and the page
    cache has nothing of it. It is when the parts lie in an ``aligned_buffer``, and ``offset`` and their lengths are
    multiples of 4096 bytes."""
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            write_parts(direct, parts, offset)
        finally:
            os.close(direct)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        write_parts(fd, parts, offset)


def read_cached(fd: int, offset: int, length: int) -> memoryview | None:
    """Exactly ``length`` bytes when the page cache has them all, else None. Never blocks (preadv2, RWF_NOWAIT)."""
    buffer = bytearray(length)
    try:
        if os.preadv(fd, [buffer], offset, os.RWF_NOWAIT) == length:
            return memoryview(buffer)
    except OSError as error:
        # EOPNOTSUPP: this file system has no reads without waiting (some have it only since recent kernels).
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
    return None


def read_available(fd: int, offset: int, length: int) -> bytes:
    """Up to ``length`` bytes, fewer only at the end of the file. Blocks."""
    data = os.pread(fd, length, offset)
    if len(data) < length and data:
        parts = [data]
        got = len(data)
        while got < length and (more := os.pread(fd, length - got, offset + got)):
            parts.append(more)
            got += len(more)
        data = b"".join(parts)
    return data


def space_of(path: str) -> Space:
    """Room in the file system of ``path``. Blocks."""
    found = os.statvfs(path)
    unit = found.f_frsize
    return Space(found.f_blocks * unit, found.f_bfree * unit, found.f_bavail * unit, found.f_files, found.f_ffree)


def sync_directory(path: str) -> None:
    """Make the entries of a directory durable: names made, renamed and removed in it. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocated_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes, in order, as the file system keeps them (lseek(2), SEEK_DATA). Blocks."""
    position = 0
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free the range, which reads as zero afterwards (fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE).
    Blocks."""
    if _libc.fallocate64(fd, 3, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sync_file_system(path: str) -> None:
    """Make everything durable that has been written to the file system of ``path`` (syncfs(2)). Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)


def replace_file(path: str, data: bytes) -> None:
    """Make ``data`` the contents of ``path``, durably: after a crash it holds the old ones or the new ones. Blocks."""
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(path + ".new", path)
    sync_directory(os.path.dirname(path))
