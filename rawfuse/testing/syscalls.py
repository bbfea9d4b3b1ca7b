"""Linux system calls and structures that the standard library does not offer, and small helpers of the suite."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
AT_SYMLINK_NOFOLLOW = 0x100
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16
STATX_BASIC, STATX_BTIME = 0x7FF, 0x800
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
EOPNOTSUPP = errno.EOPNOTSUPP

PathArgument = str | bytes | os.PathLike[str]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _call(function: Callable[..., int], *args: Any) -> int:
    result = function(*args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def rename2(old: PathArgument, new: PathArgument, flags: int) -> None:
    """renameat2(2)."""
    _call(_libc.renameat2, AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _call(_libc.fallocate, fd, mode, offset, length)


def link_fd(fd: int, new: PathArgument) -> None:
    """Give the file of a descriptor a name: linkat of /proc/self/fd/N."""
    _call(_libc.linkat, AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW)


def utimensat_raw(path: PathArgument, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2) with seconds and nanoseconds as the kernel takes them (UTIME_NOW and UTIME_OMIT too)."""
    times = struct.pack("qqqq", *atime, *mtime)
    _call(_libc.utimensat, AT_FDCWD, os.fsencode(path), times, 0)


def statx_btime(path: PathArgument) -> int:
    """The birth time in nanoseconds; OSError(EOPNOTSUPP) when the file system has none."""
    buffer = ctypes.create_string_buffer(256)
    _call(_libc.statx, AT_FDCWD, os.fsencode(path), AT_SYMLINK_NOFOLLOW, STATX_BASIC | STATX_BTIME, buffer)
    (mask,) = struct.unpack_from("I", buffer, 0)
    if not mask & STATX_BTIME:
        raise OSError(EOPNOTSUPP, "no birth time")
    seconds, nanoseconds = struct.unpack_from("qI", buffer, 80)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


class _Dirent(ctypes.Structure):
    _fields_ = [
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    ]


_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.restype = ctypes.POINTER(_Dirent)
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class DirectoryStream:
    """opendir(3) and its relatives, as a context manager; names are bytes and include ``.`` and ``..``."""

    def __init__(self, path: PathArgument) -> None:
        self._stream = _libc.opendir(os.fsencode(path))
        if not self._stream:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def __enter__(self) -> DirectoryStream:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.closedir(self._stream)

    def next(self) -> tuple[bytes, int, int] | None:
        """Name, inode number and type (DT_*) of the next entry, None at the end."""
        ctypes.set_errno(0)
        entry = _libc.readdir(self._stream)
        if not entry:
            code = ctypes.get_errno()
            if code:
                raise OSError(code, os.strerror(code))
            return None
        return entry.contents.d_name, entry.contents.d_ino, entry.contents.d_type

    def names(self) -> Iterator[bytes]:
        while (entry := self.next()) is not None:
            yield entry[0]

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)


_FLOCK = "hhqqi4x"


def ofd_lock(fd: int, kind: int, start: int = 0, length: int = 0, wait: bool = False) -> None:
    """Set a lock of the open file description; ``kind`` is F_RDLCK, F_WRLCK or F_UNLCK."""
    fcntl.fcntl(fd, F_OFD_SETLKW if wait else F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))


def posix_lock_owner(fd: int, kind: int, start: int = 0, length: int = 0) -> tuple[int, int, int, int] | None:
    """F_GETLK: what stands in the way of such a lock, as (kind, start, length, pid); None when nothing does."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
    found, _whence, at, size, pid = struct.unpack(_FLOCK, answer)
    return None if found == fcntl.F_UNLCK else (found, at, size, pid)


@contextmanager
def fails(*codes: int) -> Iterator[None]:
    """The body must raise OSError with one of these errnos."""
    with pytest.raises(OSError) as caught:
        yield
    names = "/".join(errno.errorcode[code] for code in codes)
    got = errno.errorcode.get(caught.value.errno or 0, str(caught.value.errno))
    assert caught.value.errno in codes, f"expected {names}, got {got}"


@contextmanager
def opened(path: PathArgument, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """A descriptor that is closed after the block."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def write_file(path: PathArgument, data: bytes | bytearray = b"", mode: int = 0o644) -> None:
    """Create or replace a file; ``mode`` is set exactly."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, mode)


def read_file(path: PathArgument) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def append_file(path: PathArgument, data: bytes) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        assert os.write(fd, data) == len(data)
