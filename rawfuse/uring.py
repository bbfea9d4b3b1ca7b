"""FUSE over io_uring (protocol 7.42): requests come into memory shared with the kernel, and one system call gives it
any number of replies and takes any number of requests.

The kernel has a queue for each possible CPU and puts a request into an armed entry of its caller's queue. One ring
carries the entries of all queues; an eventfd tells the event loop. INTERRUPT and FORGET stay on ``/dev/fuse``, so
a ``DeviceChannel`` goes on beside the ``RingChannel``.

An entry holds its request until the reply, so waiting handlers use entries up, and what ends a wait (for a lock, say)
may be the next request. Each queue has ``DEPTH`` armed entries at first (less where there are many CPUs), and gets more
while handlers wait, as far as ``MOST_ENTRIES`` goes. Each has memory for the largest request (``max_write``, 1 MiB by
default), of which only the pages that were used take room; the kernel takes the entry that was free last, so these are
about what has been in flight at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from pathlib import Path
from time import perf_counter_ns

from rawfuse._kernel import ffi, lib
from rawfuse.abi import Opcode
from rawfuse.channel import BURST, Channel, Reader, Server, Source
from rawfuse.device import WRITE_LEAD, Device, RequestBuffer
from rawfuse.encode import Message
from rawfuse.errors import FuseError
from rawfuse.wire import OUT_HEADER, InMessage

log = logging.getLogger("rawfuse")

DEPTH = 8
"""Armed entries of each queue."""

MOST_AT_FIRST = 512
"""Entries before handlers wait, but for two for each queue."""

MOST_ENTRIES = 4096
"""Entries in all, but for two for each queue. When each holds a request, more requests wait in the kernel."""

LEAST_PAYLOAD = 128 << 10
"""The kernel does not look whether a request fits into an entry and stops the caller for good if not (dev.c:
fuse_copy_fill); the largest one that ``max_write`` does not limit is a SETXATTR of 64 KiB."""

_POSSIBLE = Path("/sys/devices/system/cpu/possible")
_AGAIN = -errno.EAGAIN
_GIVEN_UP = -(1 << 16)
_ENDED = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED)
_LENGTH = (1 << 32) - 1


def possible_cpus() -> int:
    """How many CPUs this host could have (num_possible_cpus), online or not. OSError or ValueError when sysfs does not
    tell."""
    count = 0
    for part in _POSSIBLE.read_text().strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


class Ring:
    """The ring and its entries, made before INIT: from the INIT reply that agrees to OVER_IO_URING on, the kernel
    holds back every request until each queue has an entry. All calls come from the thread that made it."""

    def __init__(self, device: Device, payload: int) -> None:
        """``payload``: the largest request and reply, without their headers. FuseError with a text that says why this
        host gives no ring."""
        if payload < LEAST_PAYLOAD:
            raise FuseError(errno.EINVAL, f"max_write is less than {LEAST_PAYLOAD >> 10} KiB")
        self.payload = payload
        self.messages: list[InMessage] = []
        self.views: list[memoryview] = []
        try:
            self._queues = possible_cpus()
        except (OSError, ValueError) as error:
            raise FuseError(errno.ENOENT, f"the number of possible CPUs is unknown: {error}") from error
        self._depth = max(2, min(DEPTH, MOST_AT_FIRST // self._queues))
        self._most = max(MOST_ENTRIES, self._queues * self._depth)
        result = ffi.new("struct rawfuse_ring **")
        failed = -lib.rawfuse_ring_open(device.fd, self._queues, self._most, payload, result)
        if failed:
            raise FuseError(failed, f"io_uring: {os.strerror(failed)}")
        self.pointer = result[0]
        self.address = int(ffi.cast("uintptr_t", self.pointer))
        self.fd = int(lib.rawfuse_ring_fd(self.pointer))
        try:
            self._spare = [self._allocate() for _ in range(self._queues * self._depth)]
        except OSError:
            self.close()
            raise

    def _allocate(self) -> RequestBuffer:
        # A payload may be moved up behind a longer structure than that of a WRITE.
        return RequestBuffer(WRITE_LEAD + self.payload + WRITE_LEAD)

    def register(self) -> None:
        """Give each queue its entries, after the INIT reply. FuseError: the kernel refused one, and serves the device
        as if there had been no ring."""
        # The kernel begins to use the ring with the last queue's first entry, so until then all can be called off. The
        # highest queue comes first: a wrong number of CPUs shows there.
        for queue in reversed(range(self._queues)):
            error = self._add(queue, idle=True)
            if error in _ENDED:
                return  # it has been unmounted already; the device tells
            if error:
                raise FuseError(error, f"REGISTER of queue {queue} of {self._queues}: {os.strerror(error)}")
        for queue in range(self._queues):
            for _ in range(self._depth - 1):
                self._add(queue, idle=True)
        self._spare.clear()

    def _add(self, queue: int, *, idle: bool) -> int:
        try:
            memory = self._spare.pop() if self._spare else self._allocate()
        except OSError as error:
            return error.errno or errno.ENOMEM
        index = lib.rawfuse_ring_register(self.pointer, queue, memory.pointer, idle)
        if index < 0:
            return -int(index)
        self.views.append(memory.view)
        self.messages.append(InMessage(memory.view))
        return 0

    def _grow(self) -> None:
        """Have armed entries in each queue again, as far as there may be more."""
        while len(self.messages) < self._most:
            queue = lib.rawfuse_ring_short(self.pointer, self._depth)
            if queue < 0 or self._add(queue, idle=False):
                return

    def wake(self) -> None:
        """After the event loop: what comes from now on does not make ``fd`` readable."""
        lib.rawfuse_ring_wake(self.pointer)

    def sleep(self) -> bool:
        """Before the event loop, when all requests have been taken. False: more have come meanwhile."""
        if lib.rawfuse_ring_held(self.pointer):
            self._grow()
        return not lib.rawfuse_ring_sleep(self.pointer)

    def may_wait(self) -> bool:
        """See ``Channel.may_wait``; of the latest request."""
        return bool(lib.rawfuse_ring_may_wait(self.pointer))

    def next(self, nanoseconds: int) -> int:
        """The next request: ``index << 32 | length``, index that of its message; EAGAIN as ``-errno`` when nothing came
        for so long; another ``-errno``: the ring has failed; less than that: ``-(index + 1 << 16 | errno)``, the kernel
        has given this entry up."""
        return int(lib.rawfuse_ring_next(self.pointer, nanoseconds)) or _AGAIN

    def reply(self, unique: int, message: Message) -> int:
        """Queue a reply; 0, or ``-errno``: ENOENT, no entry holds that request; EINVAL, the reply is too long; ENODEV,
        the ring is closed."""
        if not self.pointer:
            return -errno.ENODEV
        if isinstance(message, bytes):
            message = [message[: OUT_HEADER.size], message[OUT_HEADER.size :]]
        index = lib.rawfuse_ring_find(self.pointer, unique)
        if index < 0:
            return int(index)
        header, *parts = message
        view = self.views[index]
        end = WRITE_LEAD
        for part in parts:
            start, end = end, end + len(part)
            if end > WRITE_LEAD + self.payload:
                return -errno.EINVAL
            view[start:end] = part
        return int(lib.rawfuse_ring_commit(self.pointer, index, header, end - WRITE_LEAD))

    def flush(self) -> None:
        """Give the kernel the replies that are queued."""
        if self.pointer:
            lib.rawfuse_ring_flush(self.pointer)

    def close(self) -> None:
        """Give the ring up; replies come to nothing from then on."""
        lib.rawfuse_ring_close(self.pointer)
        self.pointer = ffi.NULL


class PlainReader:
    """Takes requests from the ring and serves none."""

    def __init__(self, ring: Ring, server: Server) -> None:
        self._ring = ring
        self._server = server
        self.left = 0

    def use(self, buffer: RequestBuffer) -> None:
        """Entries have their own memory."""

    def run(self, nanoseconds: int) -> int:
        if self.left == 0:
            return 0
        self.left -= 1
        return self._ring.next(0 if self._server.waiting else nanoseconds)


class RingChannel(Channel):
    """Requests of a registered ring. ``busy_poll``: nanoseconds for which it looks for the next request before it
    sleeps, while they come that fast."""

    def __init__(self, ring: Ring, loop: asyncio.AbstractEventLoop, busy_poll: int = 0) -> None:
        self._ring = ring
        self._loop = loop
        self._server: Server
        self._reader: Reader
        self._reading = False
        self._in_burst = False
        self._flushing = False
        self._busy_poll = self._patience = busy_poll
        self._slept = 0

    def begin(self, server: Server) -> None:
        self._server = server
        source: Source = {"ring": self._ring.address, "views": self._ring.views}
        self._reader = server.reader(self, source) or PlainReader(self._ring, server)
        self.resume()

    def pause(self) -> None:
        if self._reading:
            self._reading = False
            self._reader.left = 0
            self._loop.remove_reader(self._ring.fd)

    def resume(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._ring.fd, self._on_readable)
            self._loop.call_soon(self._on_readable)

    def end(self) -> None:
        self.pause()

    def reply(self, unique: int, message: Message) -> int:
        error = self._ring.reply(unique, message)
        if error == 0 and not self._in_burst and not self._flushing:
            # All that finish in this turn of the event loop go out together.
            self._flushing = True
            self._loop.call_soon(self._flush)
        return error

    def _flush(self) -> None:
        self._flushing = False
        self._ring.flush()

    def may_wait(self) -> bool:
        return self._ring.may_wait()

    def lend(self) -> None:
        return None

    def give_back(self, buffer: RequestBuffer) -> None:
        """Nothing is lent."""

    def _on_readable(self) -> None:
        if not self._reading:
            return
        if self._patience < self._busy_poll and perf_counter_ns() - self._slept < self._busy_poll:
            # Had we looked a little longer, we need not have slept.
            self._patience = self._busy_poll
        self._ring.wake()
        self._in_burst = True
        self._reader.left = BURST
        try:
            if not self._serve_burst() and self._reading:
                self._loop.call_soon(self._on_readable)
        finally:
            self._in_burst = False
            self._ring.flush()

    def _serve_burst(self) -> bool:
        """Whether the kernel will wake us when there is more."""
        server, ring, reader = self._server, self._ring, self._reader
        while True:
            found = reader.run(self._patience)
            if found > 0:
                message = ring.messages[found >> 32]
                server.serve(self, message, found & _LENGTH)
                if message.opcode == Opcode.NOTIFY_REPLY:
                    # It has no reply, but the entry must be committed.
                    unique = message.origin[0]
                    self.reply(unique, OUT_HEADER.pack(OUT_HEADER.size, 0, unique))
            elif found == 0:
                if not self._reading:
                    server.end_burst()
                return False
            elif found == _AGAIN:
                if not server.waiting:
                    self._patience >>= 1
                elif server.end_burst():
                    continue
                if ring.sleep():
                    self._slept = perf_counter_ns()
                    return True
            elif found > _GIVEN_UP:
                server.end(-found)
                return True
            else:
                self._given_up(*divmod(-found, 1 << 16))

    def _given_up(self, number: int, error: int) -> None:
        """How the connection ended the device tells."""
        if error not in _ENDED:
            log.error("io_uring entry %d: %s", number - 1, os.strerror(error))
