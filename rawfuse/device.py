"""``/dev/fuse``: the descriptor, and system calls on it that return ``-errno`` where failing is ordinary."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys

from rawfuse._kernel import ffi, lib
from rawfuse.abi import DEV_IOC_BACKING_CLOSE, DEV_IOC_BACKING_OPEN, DEV_IOC_CLONE, DEV_IOC_SYNC_INIT
from rawfuse.errors import FuseError
from rawfuse.negotiate import PAGE
from rawfuse.wire import Codec

PATH = "/dev/fuse"
_BACKING_MAP = Codec("fuse_backing_map")
WRITE_LEAD = Codec("fuse_in_header").size + Codec("fuse_write_in").size
"""Bytes of a WRITE before its payload."""


class RequestBuffer:
    """Memory for one request, placed so that the payload of a WRITE begins on a page. ``resident``: from the start. A
    page fault fails when the process is being killed, and the request that is being read with it (dev.c:
    fuse_copy_fill): its caller would see EIO where another process takes the mount over."""

    __slots__ = ("_memory", "pointer", "size", "view")

    def __init__(self, size: int, *, resident: bool = False) -> None:
        lead = PAGE - WRITE_LEAD
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (mmap.MAP_POPULATE if resident else 0)
        self._memory = mmap.mmap(-1, lead + size, flags)
        self.view = memoryview(self._memory)[lead:]
        self.pointer = ffi.cast("char *", ffi.from_buffer(self._memory)) + lead
        self.size = size


class Device:
    """An open FUSE device; the connection lives as long as any descriptor of it does."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    @classmethod
    def open(cls) -> Device:
        """ENOENT or EACCES with a text that says what to do."""
        try:
            return cls(os.open(PATH, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError as error:
            raise FuseError(errno.ENOENT, f"{PATH} does not exist: load the kernel module (modprobe fuse)") from error
        except PermissionError as error:
            raise FuseError(errno.EACCES, f"no permission to open {PATH}: ask for mode 0666 or run as root") from error
        except OSError as error:
            raise FuseError(error.errno or errno.EIO, f"cannot open {PATH}: {error.strerror}") from error

    def synchronous_init(self) -> bool:
        """Make mount(2) wait for INIT (Linux 6.18); False on a kernel that cannot."""
        try:
            fcntl.ioctl(self.fd, DEV_IOC_SYNC_INIT)
        except OSError:
            return False
        return True

    def clone(self) -> Device:
        """Another descriptor of this connection, with a list of its own of requests to be answered. FuseError."""
        clone = Device.open()
        try:
            fcntl.ioctl(clone.fd, DEV_IOC_CLONE, self.fd.to_bytes(4, sys.byteorder))
        except OSError as error:
            clone.close()
            raise FuseError(error.errno or errno.EIO, f"cannot clone {PATH}: {error.strerror}") from error
        return clone

    def read(self, buffer: RequestBuffer) -> int:
        """One request; its length, or ``-errno``: EAGAIN nothing there, ENODEV unmounted, ECONNABORTED aborted."""
        return int(lib.rawfuse_read(self.fd, buffer.pointer, buffer.size))

    def read_soon(self, buffer: RequestBuffer, nanoseconds: int) -> int:
        """As ``read``, but keeps looking for up to ``nanoseconds`` before it returns ``-EAGAIN``."""
        return int(lib.rawfuse_read_soon(self.fd, buffer.pointer, buffer.size, nanoseconds))

    def write(self, message: bytes | list[bytes | bytearray | memoryview]) -> int:
        """One reply; its length, or ``-errno``: ENOENT when the request is gone."""
        if isinstance(message, bytes):
            return int(lib.rawfuse_write(self.fd, message, len(message)))
        try:
            return os.writev(self.fd, message)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def open_backing(self, fd: int) -> int:
        """Register a regular file for passthrough, which the kernel holds open from then on; its id, or ``-errno``:
        EPERM (PASSTHROUGH not agreed, no CAP_SYS_ADMIN in the initial user namespace), EINVAL, EISDIR, EBADF, ELOOP (on
        a file system stacked too deep for ``Settings.max_stack_depth``)."""
        try:
            # The id is told only where the argument is mutable: from bytes a copy comes back.
            return int(fcntl.ioctl(self.fd, DEV_IOC_BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0))))
        except OSError as error:
            return -(error.errno or errno.EIO)

    def close_backing(self, backing_id: int) -> int:
        """Give a backing file up. 0 or ``-errno``: ENOENT when there is no such id."""
        try:
            return int(fcntl.ioctl(self.fd, DEV_IOC_BACKING_CLOSE, bytearray(backing_id.to_bytes(4, sys.byteorder))))
        except OSError as error:
            return -(error.errno or errno.EIO)

    def close(self) -> None:
        os.close(self.fd)
