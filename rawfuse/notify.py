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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

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

RESEND = OutMessage(0, error=NotifyCode.RESEND).buffers
"""The notification by itself, for a connection without an agreement."""

EPOCH_MINOR, PRUNE_MINOR = 44, 45


class Notifier:
    """All nine notifications. Those about cached things return False when the kernel had nothing cached (ENOENT), which
    usually is what was wanted; other failures raise ``FuseError``: ENOSYS when the kernel is too old for one, EINVAL,
    ENAMETOOLONG, ENOTEMPTY (DELETE), ENOTCONN for those who still wait when the connection ends or is handed over, and
    from then on.

    INVAL_ENTRY, DELETE and INC_EPOCH drop dentries for good (dcache.c: d_invalidate), and with a dentry goes what is
    mounted on it. EXPIRE_ONLY and PRUNE leave mounts alone.

    A process that is killed while one of these waits in the kernel for a request that it was to answer itself cannot
    end, nor can the connection: only ``umount -f`` or the ``abort`` file of fusectl helps then. Prefer those that take
    no lock."""

    def __init__(self, device: Device, agreement: Agreement) -> None:
        self._device = device
        self._agreement = agreement
        self._thread = ThreadPoolExecutor(1, "rawfuse-notify")
        self._slots = asyncio.Semaphore(MOST_QUEUED)
        self._uniques = itertools.count(1)
        self._waiting: set[asyncio.Future[Any]] = set()
        self._retrieving: dict[int, asyncio.Future[bytes]] = {}
        self._ended = False

    async def wake_poll(self, kh: int) -> None:
        """POLL: what ``Poll.kh`` stands for may be ready."""
        await self._send(NotifyCode.POLL, _POLL.pack(kh))

    async def invalidate_inode(self, ino: int, offset: int = -1, length: int = 0) -> bool:
        """INVAL_INODE: drop attributes and, with ``offset`` >= 0, pages (to the end when ``length`` is 0)."""
        return await self._send(NotifyCode.INVAL_INODE, _INVAL_INODE.pack(ino, offset, length))

    async def invalidate_entry(self, parent: int, name: bytes, *, expire_only: bool = False) -> bool:
        """INVAL_ENTRY: drop a name, or with ``expire_only`` have it looked up again at its next use. Waits for the lock
        of the directory."""
        if expire_only and not self._agreement.flags & InitFlag.HAS_EXPIRE_ONLY:
            raise FuseError(errno.ENOSYS, "the kernel cannot expire names only")
        head = _INVAL_ENTRY.pack(parent, len(name), _EXPIRE_ONLY if expire_only else 0)
        return await self._send(NotifyCode.INVAL_ENTRY, head, name + b"\0")

    async def delete(self, parent: int, child: int, name: bytes) -> bool:
        """DELETE: ``name`` has been unlinked, so its inode has no link any more, and nothing can be made in it when it
        is a directory. False when the name means another inode than ``child``, ENOTEMPTY when something below it is in
        use. Waits for the locks of both."""
        return await self._send(NotifyCode.DELETE, _DELETE.pack(parent, child, len(name)), name + b"\0")

    async def store(self, ino: int, offset: int, data: Buffer) -> bool:
        """STORE: put data into the page cache. What lies behind the end of the file counts once its attributes, which
        the kernel asks for again, say so."""
        return await self._send(NotifyCode.STORE, _STORE.pack(ino, offset, len(data)), data)

    async def retrieve(self, ino: int, offset: int, size: int) -> bytes | None:
        """RETRIEVE: what the page cache holds from ``offset`` on without a gap, at most ``size`` bytes and at most one
        WRITE's; None for an unknown inode."""
        unique = next(self._uniques) << 1
        head = _RETRIEVE.pack(unique, ino, offset, min(size, self._most_retrieved()))
        with self._wait() as answer:
            self._retrieving[unique] = answer
            try:
                return await answer if await self._send(NotifyCode.RETRIEVE, head) else None
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
        """INC_EPOCH: have every name, positive and negative, looked up again at its next use. Takes no lock. An inode
        that nobody has open goes with its name then, and with it its attributes, pages and listing."""
        self._need(EPOCH_MINOR, "increment the epoch")
        await self._send(NotifyCode.INC_EPOCH)

    async def prune(self, inos: Sequence[int]) -> None:
        """PRUNE: drop dentries and inodes of these that nobody uses; FORGETs follow. Takes no directory lock."""
        self._need(PRUNE_MINOR, "prune inodes")
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
            with self._wait() as written:
                self._thread.submit(self._write, message, written)
                result: int = await written
        if result >= 0:
            return True
        if -result in _NOT_CACHED:
            return False
        raise FuseError(-result, f"{code.name}: {os.strerror(-result)}")

    @contextmanager
    def _wait(self) -> Iterator[asyncio.Future[Any]]:
        """A future that fails when the connection ends."""
        if self._ended:
            raise FuseError(errno.ENOTCONN)
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            yield future
        finally:
            self._waiting.discard(future)
            future.cancel()

    def _write(self, message: OutMessage, written: asyncio.Future[int]) -> None:
        """In the thread: write it, unless nobody waits for it any more."""
        if not written.done():
            result = self._device.write(message.buffers)
            written.get_loop().call_soon_threadsafe(_settle, written, result)

    async def close(self) -> None:
        """End it: whoever waits gets ENOTCONN. Returns when a notification that is being written has returned; what it
        waits for in the kernel may be the reply to a request, so call it when the connection is down, or while requests
        are still served."""
        self._ended = True
        for future in self._waiting:
            if not future.done():
                future.set_exception(FuseError(errno.ENOTCONN))
        await asyncio.to_thread(self._thread.shutdown)


def _settle(written: asyncio.Future[int], result: int) -> None:
    if not written.done():
        written.set_result(result)
