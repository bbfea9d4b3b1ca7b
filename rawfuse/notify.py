"""Notifications: what the file system tells the kernel unasked, written by a thread of their own.

Some of them wait in the kernel for locks that a request in flight holds (a directory's for INVAL_ENTRY and DELETE,
pages' for INVAL_INODE with a range, STORE and RETRIEVE), so they must not be written by the thread that answers
requests, nor awaited in a handler that may hold such a lock for its caller.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rawfuse._kernel import lib
from rawfuse.abi import InitFlag, NotifyCode
from rawfuse.device import Device
from rawfuse.errors import FuseError
from rawfuse.negotiate import PAGE, Agreement
from rawfuse.ops import NotifyReply
from rawfuse.wire import Buffer, Codec, OutMessage

MOST_QUEUED = 1024
"""Notifications waiting for the thread; further callers wait."""

_POLL = Codec("fuse_notify_poll_wakeup_out")
_INVAL_INODE = Codec("fuse_notify_inval_inode_out")
_INVAL_ENTRY = Codec("fuse_notify_inval_entry_out")
_DELETE = Codec("fuse_notify_delete_out")
_STORE = Codec("fuse_notify_store_out")
_RETRIEVE = Codec("fuse_notify_retrieve_out")
_PRUNE = Codec("fuse_notify_prune_out")
_EXPIRE_ONLY: int = lib.FUSE_EXPIRE_ONLY
_NOT_CACHED = (errno.ENOENT, errno.ENOTDIR)

_EPOCH_MINOR, _PRUNE_MINOR = 44, 45


class Notifier:
    """All nine notifications. Those about cached things return False when the kernel had nothing cached (ENOENT), which
    usually is what was wanted; other failures raise ``FuseError``: ENOSYS when the kernel is too old for one, EINVAL,
    ENOTEMPTY and EBUSY (DELETE), ENOTCONN for those who still wait when the connection ends, and from then on."""

    def __init__(self, device: Device, agreement: Agreement) -> None:
        self._device = device
        self._agreement = agreement
        self._thread = ThreadPoolExecutor(1, "rawfuse-notify")
        self._slots = asyncio.Semaphore(MOST_QUEUED)
        self._uniques = itertools.count(1)
        self._retrieving: dict[int, asyncio.Future[bytes]] = {}
        self._ended = False

    async def wake_poll(self, kh: int) -> None:
        """POLL: what ``Poll.kh`` stands for may be ready."""
        await self._send(NotifyCode.POLL, _POLL.pack(kh))

    async def invalidate_inode(self, ino: int, offset: int = -1, length: int = 0) -> bool:
        """INVAL_INODE: drop attributes and, with ``offset`` >= 0, pages (to the end when ``length`` is 0)."""
        return await self._send(NotifyCode.INVAL_INODE, _INVAL_INODE.pack(ino, offset, length))

    async def invalidate_entry(self, parent: int, name: bytes, *, expire_only: bool = False) -> bool:
        """INVAL_ENTRY: drop a name, or with ``expire_only`` have it looked up again at its next use."""
        if expire_only and not self._agreement.flags & InitFlag.HAS_EXPIRE_ONLY:
            raise FuseError(errno.ENOSYS, "the kernel cannot expire names only")
        head = _INVAL_ENTRY.pack(parent, len(name), _EXPIRE_ONLY if expire_only else 0)
        return await self._send(NotifyCode.INVAL_ENTRY, head, name + b"\0")

    async def delete(self, parent: int, child: int, name: bytes) -> bool:
        """DELETE: ``name`` has been unlinked."""
        return await self._send(NotifyCode.DELETE, _DELETE.pack(parent, child, len(name)), name + b"\0")

    async def store(self, ino: int, offset: int, data: Buffer) -> bool:
        """STORE: put data into the page cache; a size beyond the file's extends it there."""
        return await self._send(NotifyCode.STORE, _STORE.pack(ino, offset, len(data)), data)

    async def retrieve(self, ino: int, offset: int, size: int) -> bytes | None:
        """RETRIEVE: what the page cache holds from ``offset`` on without a gap, at most ``size`` bytes and at most one
        WRITE's; None for an unknown inode."""
        size = min(size, self._most_retrieved())
        unique = next(self._uniques) << 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._retrieving[unique] = answer
        try:
            if not await self._send(NotifyCode.RETRIEVE, _RETRIEVE.pack(unique, ino, offset, size)):
                return None
            return await answer
        finally:
            del self._retrieving[unique]

    def retrieved(self, reply: NotifyReply) -> None:
        """A NOTIFY_REPLY has come."""
        answer = self._retrieving.get(reply.unique)
        if answer is not None and not answer.done():
            answer.set_result(reply.data)

    async def resend(self) -> None:
        """RESEND: queue again every request that was read and not answered, with UNIQUE_RESEND set in its id."""
        if not self._agreement.flags & InitFlag.HAS_RESEND:
            raise FuseError(errno.ENOSYS, "the kernel cannot resend requests")
        await self._send(NotifyCode.RESEND)

    async def increment_epoch(self) -> None:
        """INC_EPOCH: have every name, positive and negative, looked up again at its next use. Takes no lock."""
        self._need(_EPOCH_MINOR, "increment the epoch")
        await self._send(NotifyCode.INC_EPOCH)

    async def prune(self, inos: Sequence[int]) -> None:
        """PRUNE: drop unused dentries and inodes of these; FORGETs follow. Takes no directory lock."""
        self._need(_PRUNE_MINOR, "prune inodes")
        await self._send(NotifyCode.PRUNE, _PRUNE.pack(len(inos)), struct.pack(f"={len(inos)}Q", *inos))

    def _need(self, minor: int, what: str) -> None:
        if self._agreement.minor < minor:
            raise FuseError(errno.ENOSYS, f"the kernel cannot {what}: it speaks FUSE 7.{self._agreement.minor}")

    def _most_retrieved(self) -> int:
        """Bytes. Linux 6.18 panics when data and header of an answer together do not fit a buffer of the ring."""
        over_ring = self._agreement.flags & InitFlag.OVER_IO_URING
        return self._agreement.max_write - (PAGE if over_ring else 0)

    async def _send(self, code: NotifyCode, *body: Buffer) -> bool:
        message = OutMessage(0, body, error=code)
        async with self._slots:
            if self._ended:
                raise FuseError(errno.ENOTCONN)
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(self._thread, self._write, message)
        if result >= 0:
            return True
        if -result in _NOT_CACHED:
            return False
        raise FuseError(-result, f"{code.name}: {os.strerror(-result)}")

    def _write(self, message: OutMessage) -> int:
        return -errno.ENOTCONN if self._ended else self._device.write(message.buffers)

    async def close(self) -> None:
        """End it: whoever waits gets ENOTCONN. Returns when a notification that is being written has returned; what it
        waits for in the kernel may be the reply to a request, so call it when the connection is down, or while requests
        are still served."""
        self._ended = True
        for answer in self._retrieving.values():
            if not answer.done():
                answer.set_exception(FuseError(errno.ENOTCONN))
        await asyncio.to_thread(self._thread.shutdown)
