"""A kernel for tests of the dispatcher: the other end of a socket pair that keeps message boundaries, as /dev/fuse
does."""

from __future__ import annotations

import asyncio
import errno
import functools
import inspect
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import uvloop

from rawfuse import FileSystem, InitFlag, Opcode
from rawfuse.channel import DeviceChannel
from rawfuse.device import Device, RequestBuffer
from rawfuse.dispatcher import Dispatcher
from rawfuse.negotiate import Agreement, Settings
from rawfuse.notify import Notifier
from rawfuse.trace import Trace
from rawfuse.wire import OUT_HEADER
from tests.unit.rawfuse_helpers import request

DEADLINE = 20
"""Seconds that a scenario or a reply may take."""

_CLOSED = (0, -errno.ECONNRESET, -errno.EPIPE)

compiled: ContextVar[bool] = ContextVar("compiled", default=True)
"""Whether ``served`` lets compiled code serve what it can."""


class Reply(NamedTuple):
    unique: int
    error: int
    body: bytes


class PairDevice(Device):
    """One end of the pair, with the errors that /dev/fuse gives. ``refuse_next``: what the next write returns."""

    refuse_next = 0

    def read(self, buffer: RequestBuffer) -> int:
        return _as_device(super().read(buffer))

    def read_soon(self, buffer: RequestBuffer, nanoseconds: int) -> int:
        return _as_device(super().read_soon(buffer, nanoseconds))

    def write(self, message: bytes | list[bytes | bytearray | memoryview]) -> int:
        if self.refuse_next:
            error, self.refuse_next = self.refuse_next, 0
            return error
        return _as_device(super().write(message))


class PairChannel(DeviceChannel):
    """Whatever its descriptor says at the end, the mount was taken away."""

    def _ended(self, error: int) -> None:
        super()._ended(errno.ENODEV)


def _as_device(result: int) -> int:
    return -errno.ENODEV if result in _CLOSED else result


class Kernel:
    """Sends requests and receives replies, on one channel or, each call saying which, on several."""

    def __init__(
        self, ends: list[socket.socket], devices: list[PairDevice], dispatcher: Dispatcher, notifier: Notifier
    ) -> None:
        self._ends = ends
        for end in ends:
            end.settimeout(DEADLINE)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._unique = 0
        self.device = devices[0]
        self.dispatcher = dispatcher
        self.notifier = notifier

    def send(self, opcode: int, body: bytes = b"", *, nodeid: int = 7, channel: int = 0) -> int:
        """Returns the request's id."""
        self._unique += 2
        self._ends[channel].send(request(opcode, body, unique=self._unique, nodeid=nodeid))
        return self._unique

    @property
    def next_unique(self) -> int:
        """The id that the next request will have."""
        return self._unique + 2

    def send_again(self) -> None:
        """The same id as the request before."""
        self.send_bytes(request(Opcode.GETATTR, struct.pack("=IIQ", 0, 0, 0), unique=self._unique))

    def send_bytes(self, data: bytes) -> None:
        self._ends[0].send(data)

    def interrupt(self, unique: int, *, channel: int = 0) -> None:
        body = struct.pack("=Q", unique)
        self._ends[channel].send(request(Opcode.INTERRUPT, body, unique=unique | 1, nodeid=0))

    async def reply(self, channel: int = 0) -> Reply:
        return (await self.replies(1, channel))[0]

    async def replies(self, count: int, channel: int = 0) -> list[Reply]:
        """The next ones, in the order in which they come."""
        return await asyncio.to_thread(lambda: [self._receive(channel) for _ in range(count)])

    def _receive(self, channel: int) -> Reply:
        data = self._ends[channel].recv(1 << 20)
        length, error, unique = OUT_HEADER.unpack_from(data)
        assert length == len(data)
        return Reply(unique, -error, data[OUT_HEADER.size :])

    async def notification(self) -> tuple[int, bytes]:
        """Code and body of the next one."""
        data = await asyncio.to_thread(self._ends[0].recv, 1 << 20)
        length, code, unique = OUT_HEADER.unpack_from(data)
        assert (length, unique) == (len(data), 0)
        return code, data[OUT_HEADER.size :]

    async def call(self, opcode: int, body: bytes = b"", *, nodeid: int = 7, channel: int = 0) -> Reply:
        """A request and its reply, which must be the next one."""
        unique = self.send(opcode, body, nodeid=nodeid, channel=channel)
        reply = await self.reply(channel)
        assert reply.unique == unique, "a reply to another request"
        return reply

    async def nothing_more(self) -> None:
        """No reply is on its way: the next one is that to a new request."""
        for channel in range(len(self._ends)):
            await self.call(Opcode.STATFS, channel=channel)

    def take_no_more(self) -> None:
        """Replies cannot be sent from now on."""
        for end in self._ends:
            end.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        for end in self._ends:
            end.close()


def agreement(flags: InitFlag = InitFlag.SETXATTR_EXT) -> Agreement:
    return Agreement(45, flags, 1 << 16, 16, 1 << 16)


@asynccontextmanager
async def served(
    filesystem: FileSystem,
    flags: InitFlag = InitFlag.SETXATTR_EXT,
    trace: Trace | None = None,
    *,
    settings: Settings | None = None,
    channels: int = 1,
    ended: int = errno.ENODEV,
) -> AsyncIterator[Kernel]:
    """The file system, served to a test kernel, which hangs up in the end. ``ended``: how that is, 0 when the test has
    the dispatcher retire."""
    loop = asyncio.get_running_loop()
    ends, devices = [], []
    for _ in range(channels):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.append(ours)
        devices.append(PairDevice(theirs.detach()))
    agreed = agreement(flags)
    readers = [PairChannel(device, agreed.buffer_size, loop) for device in devices]
    notifier = Notifier(devices[0], agreed)
    chosen = replace(settings or Settings(), compiled=compiled.get())
    dispatcher = Dispatcher(readers, filesystem, agreed, chosen, loop, notifier, trace=trace)
    dispatcher.start()
    kernel = Kernel(ends, devices, dispatcher, notifier)
    try:
        yield kernel
    except BaseException:
        dispatcher.end(errno.ENODEV)
        raise
    else:
        kernel.close()
        assert await dispatcher.ended == ended
        await notifier.close()
        await dispatcher.drained()
    finally:
        kernel.close()
        for device in devices:
            device.close()


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on asyncio's event loop and on uvloop, with compiled code serving what it can and without."""

    @pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    @pytest.mark.parametrize("with_compiled", [True, False], ids=["compiled", "python"])
    @functools.wraps(test)
    def run(
        *arguments: Any, new_loop: Callable[[], asyncio.AbstractEventLoop], with_compiled: bool, **named: Any
    ) -> None:
        async def scenario() -> None:
            compiled.set(with_compiled)
            await asyncio.wait_for(test(*arguments, **named), DEADLINE)

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(scenario())

    own = inspect.signature(test)
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("new_loop", "with_compiled")]
    signature = own.replace(parameters=[*own.parameters.values(), *extra])
    run.__signature__ = signature
    return cast("Callable[..., None]", run)
