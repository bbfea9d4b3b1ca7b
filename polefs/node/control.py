"""The control socket of a mounted volume: ``VOLUME/control.sock``, one JSON line a message.

The client sends one request a connection; the daemon answers with any number of ``Progress`` or ``Working``, and then
with another reply. Only the owner of the volume and root may connect (mode of the socket).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import msgspec

from polefs.data.report import GarbageReport, Phase
from polefs.node.errors import Refusal, plain
from polefs.node.status import CacheStatus, Status

log = logging.getLogger(__name__)

SOCKET = "control.sock"

_LINE_MAX = 1 << 16
_PEER = struct.Struct("iII")
"""struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)."""


class GetStatus(msgspec.Struct, frozen=True, tag="status", tag_field="request"):
    """Answered with ``Status``."""


class Flush(msgspec.Struct, frozen=True, tag="flush", tag_field="request"):
    """Write back everything dirty. ``Progress``, then ``Done`` when all of it is saved."""


class Unmount(msgspec.Struct, frozen=True, tag="unmount", tag_field="request"):
    """Unmount, write back, end. ``Failed`` EBUSY when programs use the mount; ``lazy`` cuts those off. ``Done`` when
    everything is saved; the daemon then ends."""

    lazy: bool = False


class SetLogLevel(msgspec.Struct, frozen=True, tag="log-level", tag_field="request"):
    level: str


class GetCache(msgspec.Struct, frozen=True, tag="cache", tag_field="request"):
    """Answered with ``CacheReply``."""


class ShrinkCache(msgspec.Struct, frozen=True, tag="shrink-cache", tag_field="request"):
    """Remove what has not been used for the longest time until so many bytes are left, as far as nothing uses it."""

    size: int


class WarmUp(msgspec.Struct, frozen=True, tag="warm-up", tag_field="request"):
    """Cache all files below these paths, which start at the root of the volume and have no symbolic links in them."""

    paths: list[bytes]


class CollectGarbage(msgspec.Struct, frozen=True, tag="collect-garbage", tag_field="request"):
    """Answered with ``Working``, then ``GarbageReply``."""

    dry_run: bool = False
    grace: float | None = None
    """Seconds; None: as the volume has it."""


class Progress(msgspec.Struct, frozen=True, tag="progress", tag_field="reply"):
    left: int
    """Bytes still to be done."""


class Working(msgspec.Struct, frozen=True, tag="working", tag_field="reply"):
    phase: Phase


class GarbageReply(msgspec.Struct, frozen=True, tag="garbage", tag_field="reply"):
    report: GarbageReport


class StatusReply(msgspec.Struct, frozen=True, tag="status", tag_field="reply"):
    status: Status


class CacheReply(msgspec.Struct, frozen=True, tag="cache", tag_field="reply"):
    cache: CacheStatus


class Done(msgspec.Struct, frozen=True, tag="done", tag_field="reply"):
    pass


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="reply"):
    number: int
    """An errno."""
    message: str


Request = GetStatus | Flush | Unmount | SetLogLevel | GetCache | ShrinkCache | WarmUp | CollectGarbage
Reply = Progress | Working | GarbageReply | StatusReply | CacheReply | Done | Failed


class Handler(Protocol):
    """What the daemon does on requests; an ``OSError`` becomes ``Failed``."""

    def answer(self, request: Request) -> AsyncIterator[Reply]: ...


class ControlServer:
    """Listens from ``start`` until ``close``; must be started with the volume's lock held."""

    def __init__(self, path: str, server: asyncio.Server, tasks: set[asyncio.Task[None]]) -> None:
        self._path = path
        self._server = server
        self._tasks = tasks

    @classmethod
    async def start(cls, volume: str, handler: Handler) -> ControlServer:
        """OSError when the volume's file system cannot hold a socket."""
        path = os.path.join(volume, SOCKET)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await _serve(handler, reader, writer)
            finally:
                tasks.discard(task)

        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short_path(volume) as short:
                listener.bind(short)
            os.chmod(path, 0o600)
            server = await asyncio.start_unix_server(connected, sock=listener, limit=_LINE_MAX)
        except BaseException:
            listener.close()
            raise
        return cls(path, server, tasks)

    async def close(self) -> None:
        """Stop listening; returns when the requests under way have been answered."""
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        current = asyncio.current_task()
        await asyncio.gather(*(task for task in self._tasks if task is not current), return_exceptions=True)


async def _serve(handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection. A client that goes away early does not stop what it has asked for."""
    try:
        line = await reader.readline()
        if not line:
            return
        try:
            request: Request = msgspec.json.decode(line, type=Request)
        except msgspec.DecodeError as error:
            _send(writer, Failed(errno.EINVAL, f"malformed request: {error}"))
        else:
            try:
                async for reply in handler.answer(request):
                    _send(writer, reply)
            except OSError as error:
                _send(writer, Failed(error.errno or errno.EIO, plain(error)))
            except Exception:
                log.exception("control request %s", request)
                _send(writer, Failed(errno.EIO, "internal error: see the log"))
        await writer.drain()
    except (ConnectionError, ValueError) as error:
        log.debug("control connection: %s", error)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _send(writer: asyncio.StreamWriter, reply: Reply) -> None:
    if not writer.is_closing():
        writer.write(msgspec.json.encode(reply) + b"\n")


class ControlClient:
    """A connection to the daemon of a volume, for one request. Blocking; for commands, not for an event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid: int = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]

    @classmethod
    def connect(cls, volume: str) -> ControlClient | None:
        """None when no daemon listens. PermissionError for somebody else's volume."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short_path(volume) as short:
                connection.connect(short)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            connection.close()
            return None
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def request(self, request: Request, *, patience: float | None = None) -> Iterator[Reply]:
        """The replies. ``Failed`` is raised as the ``Refusal`` that it tells of; TimeoutError when the daemon says
        nothing for ``patience`` seconds; ConnectionError when it ends before its last reply."""
        self._connection.settimeout(patience)
        self._connection.sendall(msgspec.json.encode(request) + b"\n")
        with self._connection.makefile("rb") as stream:
            for line in stream:
                reply: Reply = msgspec.json.decode(line, type=Reply)
                if isinstance(reply, Failed):
                    raise Refusal(reply.number, reply.message)
                yield reply
                if not isinstance(reply, Progress | Working):
                    return
        raise ConnectionError(errno.ECONNRESET, "the daemon ended before it answered: see its log")


@contextlib.contextmanager
def _short_path(volume: str) -> Iterator[str]:
    """The socket's path through a descriptor of its directory: a socket address holds only 107 bytes."""
    fd = os.open(volume, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)
