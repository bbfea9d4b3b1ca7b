"""System calls that Python's ``os`` lacks or does not expose in full."""

from __future__ import annotations

import ctypes
import os
import struct

NOW = -(1 << 63)
"""A time for ``set_times``: the moment of the call."""

_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_SECOND = 1_000_000_000

_DIRENT = struct.Struct("=QqHB")
"""``struct linux_dirent64`` before the name: inode number, offset of the next, size, type."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64)]


class _StatxTime(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_uint32), ("reserved", ctypes.c_int32)]


class _Statx(ctypes.Structure):
    """``struct statx`` as far as it is read here."""

    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("attributes", ctypes.c_uint8 * 76),
        ("btime", _StatxTime),
        ("rest", ctypes.c_uint8 * 160),
    ]


def _check(result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def birth_time(fd: int) -> int:
    """When the inode of a descriptor (O_PATH will do) was created, nanoseconds; 0 where its file system cannot tell."""
    answer = _Statx()
    _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, ctypes.byref(answer)))
    if not answer.mask & _STATX_BTIME:
        return 0
    return int(answer.btime.tv_sec * _SECOND + answer.btime.tv_nsec)


def set_times(path: str, atime: int | None, mtime: int | None) -> None:
    """utimensat(2), following links. Nanoseconds; None leaves a time alone."""
    times = (_Timespec * 2)(_timespec(atime), _timespec(mtime))
    _check(_libc.utimensat(_AT_FDCWD, path.encode(), times, 0))


def _timespec(time: int | None) -> _Timespec:
    if time is None:
        return _Timespec(0, _UTIME_OMIT)
    if time == NOW:
        return _Timespec(0, _UTIME_NOW)
    return _Timespec(*divmod(time, _SECOND))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its FALLOC_FL_* modes. May block."""
    _check(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def rename_with_flags(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.renameat2(old_fd, old, new_fd, new, ctypes.c_uint(flags)))


def directory_entries(fd: int, size: int) -> list[tuple[bytes, int, int, int]]:
    """getdents64(2) into ``size`` bytes: ``(name, inode number, type bits, offset of the next)``; empty at the end.
    That offset is one for lseek(2), on any descriptor of the directory."""
    buffer = ctypes.create_string_buffer(size)
    length = _libc.getdents64(fd, buffer, ctypes.c_size_t(size))
    _check(length)
    data = buffer.raw
    entries = []
    start, name_at = 0, _DIRENT.size
    while start < length:
        ino, offset, record, kind = _DIRENT.unpack_from(data, start)
        name = data[start + name_at : data.index(0, start + name_at)]
        entries.append((name, ino, kind << 12, offset))
        start += record
    return entries
