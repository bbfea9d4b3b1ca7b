"""Passthrough: files whose bytes the kernel reads and writes itself, in a backing file that the file system names.

The kernel keeps three ways of serving an inode apart (``fs/fuse/iomode.c``): through its page cache, with direct I/O,
and from one backing file. It fails an open that does not go with the handles already there with EIO, so the modes are
chosen here: the first handle of an inode decides, and the others follow until all are released.

========================== =================================== ==========================================
open already               the handler gives ``backing``       it gives none
========================== =================================== ==========================================
nothing                    passthrough                         as its flags say
handles in passthrough     passthrough, the same backing file  READ and WRITE are sent, mmap is passed on
other handles              as its flags say                    as its flags say
========================== =================================== ==========================================

Direct handles alone would let the kernel begin passthrough, but not once one of them is mapped, which nobody tells us.

What is counted here is never less than what the kernel counts: a handle counts from its reply until its RELEASE, which
the kernel sends after it has let go. So what is allowed by this count is allowed by the kernel's.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable, Coroutine
from typing import Any

from rawfuse import ops
from rawfuse.abi import UNIQUE_RESEND, OpenFlag
from rawfuse.device import Device
from rawfuse.errors import FuseError
from rawfuse.handover import BACKING, Keeper
from rawfuse.replies import Entry, OpenedFile

log = logging.getLogger("rawfuse")

_COMPANIONS = OpenFlag.DIRECT_IO | OpenFlag.PARALLEL_DIRECT_WRITES | OpenFlag.NOFLUSH
"""What may stand beside PASSTHROUGH (``iomode.c: FOPEN_PASSTHROUGH_MASK``)."""

_STREAMS = OpenFlag.NONSEEKABLE | OpenFlag.STREAM
"""Handles without positions, which a backing file cannot serve."""

_HOPELESS = (errno.EPERM, errno.ENOTTY)
"""Errors of BACKING_OPEN that every further one will give: no CAP_SYS_ADMIN, a kernel without passthrough."""

_INODE = struct.Struct("=IiQQQ")
"""What is deposited of an inode: the arguments of ``_Inode``."""

Handler = Callable[[Any], Coroutine[Any, Any, Any]]


class _Inode:
    """An inode with open handles. ``id`` 0: not in passthrough; ``device`` and ``number`` of its backing file.
    ``newest``: the request that has changed ``handles`` last."""

    __slots__ = ("device", "handles", "id", "newest", "number")

    def __init__(self, handles: int = 0, backing: int = 0, device: int = 0, number: int = 0, newest: int = 0) -> None:
        self.handles = handles
        self.id = backing
        self.device = device
        self.number = number
        self.newest = newest


class BackingFiles:
    """The open inodes of a session that agreed on PASSTHROUGH, and their backing files. A backing file is registered
    with the kernel at the first open and given up after the last RELEASE: two registrations of one file are two backing
    files to the kernel, which it does not mix.

    With a ``keeper`` all of it is deposited there, for the ids live as long as the connection. A request that is sent
    again after it was counted is not counted again."""

    def __init__(self, device: Device, keeper: Keeper | None = None) -> None:
        self._device = device
        self._keeper = keeper
        self._inodes: dict[int, _Inode] = {}
        self._complained: set[int] = set()
        self._direct: dict[int, bool] = {}
        if keeper is not None:
            for key, kept in keeper.kept.items():
                if key.startswith(BACKING):
                    self._inodes[int(key.removeprefix(BACKING))] = _Inode(*_INODE.unpack(kept.value))

    def admit(self, nodeid: int, flags: int) -> None:
        """Before an open. EINVAL for O_DIRECT on an inode in passthrough whose backing file, opened by the kernel with
        the same flags, is on a file system that has no direct I/O."""
        inode = self._inodes.get(nodeid)
        if flags & os.O_DIRECT and inode is not None and inode.id and not self._direct.get(inode.device, True):
            raise FuseError(errno.EINVAL)

    def opened(self, nodeid: int, opened: OpenedFile, unique: int, open_flags: int = 0) -> None:
        """Choose how a new handle, opened by request ``unique`` with ``open_flags`` (open(2)), is served, and write it
        into ``opened``: ``flags`` and ``backing_id``."""
        flags = opened.flags & ~OpenFlag.PASSTHROUGH
        positioned = not flags & _STREAMS
        inode = self._inodes.get(nodeid)
        if inode is None:
            inode = self._inodes[nodeid] = _Inode()
            if opened.backing >= 0 and positioned:
                self._register(inode, opened.backing, bool(open_flags & os.O_DIRECT))
        self._count(nodeid, inode, 1, unique)
        opened.backing_id = inode.id
        if inode.id:
            flags = flags & _COMPANIONS | OpenFlag.PASSTHROUGH
            if opened.backing < 0 or not positioned or _identity(opened.backing) != (inode.device, inode.number):
                flags |= OpenFlag.DIRECT_IO
        opened.flags = int(flags)

    def released(self, nodeid: int, unique: int) -> None:
        """A handle has been released by request ``unique``, or, 0, never reached the kernel."""
        inode = self._inodes.get(nodeid)
        if inode is None:
            return
        self._count(nodeid, inode, -1, unique)
        if inode.handles == 0:
            del self._inodes[nodeid]
            if inode.id:
                self._device.close_backing(inode.id)

    def _count(self, nodeid: int, inode: _Inode, change: int, unique: int) -> None:
        unique &= ~UNIQUE_RESEND
        if unique and unique == inode.newest:
            return
        inode.handles += change
        inode.newest = unique
        if self._keeper is None:
            return
        key = BACKING + str(nodeid).encode()
        if inode.handles:
            self._keeper.put(key, _INODE.pack(inode.handles, inode.id, inode.device, inode.number, unique))
        else:
            self._keeper.drop(key)

    def _register(self, inode: _Inode, fd: int, direct: bool) -> None:
        """Without success the inode is served as if no backing file had been given."""
        if self._complained.intersection(_HOPELESS):
            return
        inode.device, inode.number = _identity(fd)
        if inode.device not in self._direct:
            self._direct[inode.device] = _has_direct_io(fd)
        if direct and not self._direct[inode.device]:
            return
        result = self._device.open_backing(fd)
        if result > 0:
            inode.id = result
        elif -result not in self._complained:
            self._complained.add(-result)
            log.warning("no passthrough: BACKING_OPEN: %s", os.strerror(-result))

    # Handlers with the choice built in: what they return is ready to be encoded.

    def opening(self, handler: Handler) -> Handler:
        """For OPEN."""

        async def open_file(op: ops.OpenFile) -> Any:
            self.admit(op.nodeid, op.flags)
            opened = await handler(op)
            if isinstance(opened, OpenedFile):
                self.opened(op.nodeid, opened, op.unique, op.flags)
            return opened

        return open_file

    def creating(self, handler: Handler) -> Handler:
        """For CREATE and TMPFILE."""

        async def create_file(op: ops.CreateFile) -> Any:
            created = await handler(op)
            match created:
                case (Entry(), OpenedFile()):
                    self.opened(created[0].nodeid, created[1], op.unique, op.flags)
            return created

        return create_file

    def releasing(self, handler: Handler) -> Handler:
        """For RELEASE."""

        async def release_file_handle(op: ops.ReleaseFileHandle) -> Any:
            try:
                return await handler(op)
            finally:
                self.released(op.nodeid, op.unique)

        return release_file_handle


def _identity(fd: int) -> tuple[int, int]:
    """Device and inode number; zeros for what is no open descriptor, which is told when it is registered."""
    try:
        status = os.fstat(fd)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _has_direct_io(fd: int) -> bool:
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
