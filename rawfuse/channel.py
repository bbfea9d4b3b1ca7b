"""Channels: where requests come from and their replies go.

A session has one or more: the device, clones of it, a ring. All of them hand their requests to one dispatcher, in the
thread of the event loop, and a reply goes out on the channel that its request came from (the kernel keeps a list of
requests for each; dev.c: fuse_dev_do_write).
"""

from __future__ import annotations

import asyncio
import errno
import select
from abc import ABC, abstractmethod
from time import perf_counter_ns
from typing import Protocol, TypedDict

from rawfuse.device import Device, RequestBuffer
from rawfuse.encode import Message
from rawfuse.wire import InMessage

BURST = 64
"""Requests drained per wake-up before the event loop gets its turn."""

FREE_BUFFERS = 8
"""Request buffers kept for reuse when no handler needs them any more."""

_AGAIN = -errno.EAGAIN
_RETRY = (-errno.EINTR, -errno.ENOENT)


class Source(TypedDict, total=False):
    """Where compiled code finds requests (``_fast.pyi``): on a descriptor or in a ring."""

    fd: int
    ring: int
    views: list[memoryview]


class Reader(Protocol):
    """Reads the requests of one source; may serve some of them itself."""

    left: int
    """Requests until ``run`` returns."""

    def use(self, buffer: RequestBuffer, /) -> None:
        """Read into this buffer from now on; not for a ring."""

    def run(self, nanoseconds: int, /) -> int:
        """The length of the next request that is not served yet, 0 when ``left`` is used up, or ``-errno``; EAGAIN when
        nothing came for so long."""


class Server(Protocol):
    """What a channel sees of the dispatcher."""

    @property
    def waiting(self) -> bool:
        """Whether some handler waits for the event loop: then there is no time to look twice for a request."""

    def reader(self, channel: Channel, source: Source) -> Reader | None:
        """What is to read the requests of this source; None: let the channel do it."""

    def serve(self, channel: Channel, message: InMessage, length: int) -> None:
        """One request: the first ``length`` bytes of the message's buffer, not loaded yet, in one piece. When it
        returns, the buffer may be used for the next request, unless ``lend`` was called meanwhile."""

    def end_burst(self) -> bool:
        """All requests that had arrived have been served. Whether that let waiting handlers finish, all of them: then
        the next requests may have arrived already."""

    def end(self, error: int) -> None:
        """The connection has ended: ENODEV unmounted, ECONNABORTED aborted; any other errno is a failure."""


class Channel(ABC):
    """A source of requests with its own way to reply. Every method is called in the event loop's thread."""

    @abstractmethod
    def begin(self, server: Server) -> None:
        """Read requests from now on."""

    @abstractmethod
    def pause(self) -> None:
        """Read no more requests until ``resume``; often called from within ``Server.serve``. The end of the connection
        must still be noticed, by one channel at least."""

    @abstractmethod
    def resume(self) -> None:
        """Read requests again, from the next turn of the event loop on."""

    @abstractmethod
    def reply(self, unique: int, message: Message) -> int:
        """Send the reply to request ``unique``; its length or ``-errno``: ENOENT, the request is gone; EINVAL, the
        kernel refused this reply and an error may be sent instead."""

    @abstractmethod
    def end(self) -> None:
        """Read nothing more, for good. Replies of handlers that still run may come and fail."""

    def may_wait(self) -> bool:
        """Whether the request being served may wait for another one that has not been read yet."""
        return True

    @abstractmethod
    def lend(self) -> RequestBuffer | None:
        """The request being served waits, and its payload lies in the buffer: leave it alone until ``give_back`` gets
        what is returned here. None where the memory belongs to the request until its reply anyway."""

    @abstractmethod
    def give_back(self, buffer: RequestBuffer) -> None:
        """What was lent is free again."""


class PlainReader:
    """Reads requests and serves none."""

    def __init__(self, device: Device, server: Server) -> None:
        self._device = device
        self._server = server
        self._buffer: RequestBuffer
        self.left = 0

    def use(self, buffer: RequestBuffer) -> None:
        self._buffer = buffer

    def run(self, nanoseconds: int) -> int:
        if self.left == 0:
            return 0
        self.left -= 1
        return self._device.read_soon(self._buffer, 0 if self._server.waiting else nanoseconds)


class DeviceChannel(Channel):
    """One descriptor of ``/dev/fuse``. ``busy_poll``: nanoseconds for which it looks for the next request before it
    sleeps, while they come that fast."""

    def __init__(self, device: Device, buffer_size: int, loop: asyncio.AbstractEventLoop, busy_poll: int = 0) -> None:
        self._device = device
        self._loop = loop
        self._server: Server
        self._reader: Reader
        self._reading = False
        self._buffer = RequestBuffer(buffer_size, resident=True)
        self._message = InMessage(self._buffer.view)
        self._free: list[RequestBuffer] = []
        self._busy_poll = self._patience = busy_poll
        self._slept = 0
        self._hang_up = select.epoll()
        # An epoll set that asks for nothing tells of the end alone (EPOLLERR; dev.c: fuse_dev_poll).
        self._hang_up.register(device.fd, 0)

    def begin(self, server: Server) -> None:
        self._server = server
        self._reader = server.reader(self, {"fd": self._device.fd}) or PlainReader(self._device, server)
        self._reader.use(self._buffer)
        self._reading = True
        self._loop.add_reader(self._device.fd, self._on_readable)

    def pause(self) -> None:
        if self._reading:
            self._stop()
            self._loop.add_reader(self._hang_up.fileno(), self._on_hang_up)

    def resume(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.remove_reader(self._hang_up.fileno())
            self._loop.add_reader(self._device.fd, self._on_readable)

    def _stop(self) -> None:
        self._reading = False
        self._reader.left = 0
        self._loop.remove_reader(self._device.fd)

    def reply(self, unique: int, message: Message) -> int:
        return self._device.write(message)

    def end(self) -> None:
        if not self._hang_up.closed:
            self._stop()
            self._loop.remove_reader(self._hang_up.fileno())
            self._hang_up.close()

    def lend(self) -> RequestBuffer:
        lent = self._buffer
        self._buffer = self._free.pop() if self._free else RequestBuffer(lent.size, resident=True)
        self._message = InMessage(self._buffer.view)
        self._reader.use(self._buffer)
        return lent

    def give_back(self, buffer: RequestBuffer) -> None:
        if len(self._free) < FREE_BUFFERS:
            self._free.append(buffer)

    def _on_readable(self) -> None:
        server, reader = self._server, self._reader
        if self._patience < self._busy_poll and perf_counter_ns() - self._slept < self._busy_poll:
            # Had we looked a little longer, we need not have slept.
            self._patience = self._busy_poll
        reader.left = BURST
        while True:
            length = reader.run(self._patience)
            if length > 0:
                server.serve(self, self._message, length)
            elif length == 0:
                if not self._reading:
                    server.end_burst()
                return
            elif length == _AGAIN:
                if not server.waiting:
                    self._patience >>= 1
                elif server.end_burst():
                    continue
                self._slept = perf_counter_ns()
                return
            elif length not in _RETRY:
                self._ended(-length)
                return

    def _on_hang_up(self) -> None:
        """The connection has ended while reading was paused. A read tells how; whatever else it gives nobody waits for
        any more."""
        length = self._device.read(self._buffer)
        self._ended(-length if length < 0 and length != _AGAIN else errno.ENODEV)

    def _ended(self, error: int) -> None:
        self._server.end(error)
