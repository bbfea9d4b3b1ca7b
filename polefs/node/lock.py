"""The lock of a volume: one process at a time may mount or check it.

An open file description lock (fcntl_locking(2)): the kernel drops it when its holder dies however that happens, and it
can be tested without being taken, so that whoever only asks never stands in the way of a mount.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Literal

import msgspec

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of 64-bit Linux: type, whence, start, length, pid."""

_SIZE_MAX = 8192


class Holder(msgspec.Struct, frozen=True):
    """Who holds the lock, as it wrote into the file."""

    pid: int
    doing: Literal["mount", "check", "format", "gc", "dump"]
    mountpoint: str | None = None


class Locked(BlockingIOError):
    """Somebody else holds the lock; ``holder`` is None when it has not said yet who it is."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.holder = holder


class VolumeLock:
    """The lock, held from construction to ``release``. Raises ``Locked``, or the ``OSError`` of opening the file."""

    def __init__(self, path: str, holder: Holder) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise Locked(_read(self._fd)) from None
                raise
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, msgspec.json.encode(holder), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def lock_holder(path: str) -> tuple[bool, Holder | None]:
    """Whether the lock is held, and by whom when that is known. ENOENT when there is no such file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
        held = _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
        return held, _read(fd) if held else None
    finally:
        os.close(fd)


def _flock(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _read(fd: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, _SIZE_MAX, 0), type=Holder)
    except msgspec.DecodeError:
        return None
