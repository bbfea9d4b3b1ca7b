"""The meta service across the network: ``MetaAPI`` for a client on another machine.

What is asked within one turn of the event loop travels in one frame. When the connection is lost, the client comes back
and sends again what it has no reply to; operations just take longer then. When it stays away for longer than its lease
the session is over: whatever was under way fails with ESTALE, because nobody can know what became of it, and what is
asked from then on belongs to a new session.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from polefs.meta import protocol
from polefs.meta.locks import HeldLocks
from polefs.meta.model import (
    Caller,
    DataCommit,
    Dentry,
    Extent,
    Inode,
    Lock,
    LockKind,
    Move,
    Segment,
    SetAttr,
    Usage,
)
from polefs.meta.protocol import Goodbye, Hello, Ping, Pong, Refused, Replies, Requests, Uses, Welcome

log = logging.getLogger(__name__)

_CONNECT_SECONDS: Final = 10.0
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 3.0
"""Between two attempts to connect, seconds; doubled from the first to the longest, and scattered by half."""

_GOODBYE_SECONDS: Final = 10.0
_FRAME: Final = protocol.FRAME_MAX // 2
"""Bytes of requests after which another frame begins."""


class _Pending:
    __slots__ = ("arguments", "note", "operation", "reply")

    def __init__(
        self,
        operation: protocol.Operation,
        arguments: msgspec.Raw,
        reply: asyncio.Future[Any],
        note: Callable[[int], None] | None,
    ) -> None:
        """``note`` gets the errno of the reply, before anything that comes later."""
        self.operation = operation
        self.arguments = arguments
        self.reply = reply
        self.note = note


class RemoteMeta:
    """Implements ``api.MetaAPI``. Made by ``connect``. Besides the errors of ``MetaAPI`` every operation raises ESTALE
    when its session ended under it, and EIO when the service has been out of reach for ``patience`` seconds."""

    def __init__(
        self, url: str, hello: Hello, tls: ssl.SSLContext | None, patience: float, on_lost: Callable[[], None]
    ) -> None:
        self._url = url
        self._hello = hello
        self._tls = tls
        self._patience = patience
        self._on_lost = on_lost
        self._http = aiohttp.ClientSession()
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._next = 1
        self._pending: dict[int, _Pending] = {}
        """By id, ascending: what has no reply yet."""
        self._waits: dict[int, _Pending] = {}
        """By id: locks that wait."""
        self._outgoing: list[int] = []
        self._flushing = False
        self._wanted = asyncio.Event()
        self._connected = asyncio.Event()
        self._again: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when there is another connection, or none any more."""
        self._uses: set[int] = set()
        """The inodes that this session has open."""
        self._held = HeldLocks()
        self._tell = False
        self._lease = 0.0
        self._valid_until = 0.0
        """When the service may have ended the session (CLOCK_BOOTTIME, which goes on while the machine sleeps)."""
        self._pings: dict[int, float] = {}
        self._ping = 0
        self._task: asyncio.Task[None] | None = None
        self._failure: OSError | None = None
        self._closing = False
        self.read_only = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        token: str = "",
        info: str = "",
        tls: ssl.SSLContext | None = None,
        patience: float = 60.0,
        on_lost: Callable[[], None] = lambda: None,
    ) -> Self:
        """Begin a session with ``http(s)://host:port/volume``. ``on_lost`` is called when a session is over before its
        time: what is known of the volume is known no more. ``OSError`` in one line: EINVAL for such a URL,
        ECONNREFUSED and the like, EACCES (token), EPROTO (version, or no meta service)."""
        parts = urlsplit(url)
        volume = parts.path.strip("/")
        if parts.scheme not in ("http", "https") or not parts.netloc or not volume or "/" in volume:
            raise OSError(errno.EINVAL, f"{url} is no volume of a meta service: give http(s)://HOST:PORT/VOLUME")
        hello = Hello(protocol.VERSION, protocol.OLDEST, volume, token, info=info)
        self = cls(f"{parts.scheme}://{parts.netloc}/session", hello, tls, patience, on_lost)
        try:
            socket = await self._open()
        except BaseException:
            await self._http.close()
            raise
        self._task = asyncio.get_running_loop().create_task(self._stay(socket), name="meta session")
        return self

    @property
    def valid(self) -> bool:
        """Whether the session is alive for certain, so that what is known from it may be used."""
        return self._failure is None and _now() <= self._valid_until

    # The connection

    async def _open(self) -> aiohttp.ClientWebSocketResponse:
        """Connect and begin, or resume, the session. ``OSError`` when that fails."""
        began = _now()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                socket = await self._http.ws_connect(
                    self._url, ssl=self._tls or True, max_msg_size=protocol.FRAME_MAX, compress=0
                )
                try:
                    await socket.send_bytes(protocol.encode(self._hello))
                    answer = await self._receive(socket)
                except BaseException:
                    await socket.close()
                    raise
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"{self._url} does not answer") from None
        except aiohttp.WSServerHandshakeError as error:
            # 5xx: what stands before the service has none at the moment.
            code = errno.EIO if error.status >= 500 else errno.EPROTO
            raise OSError(code, f"{self._url} is no meta service (HTTP {error.status})") from None
        except aiohttp.ClientConnectorError as error:
            raise OSError(error.errno or errno.EIO, f"cannot reach {self._url}: {error.strerror or error}") from None
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError):
            raise OSError(errno.ECONNRESET, f"{self._url} has closed the connection") from None
        except (aiohttp.ClientError, msgspec.MsgspecError) as error:
            raise OSError(errno.EPROTO, f"{self._url} does not speak as a meta service: {error}") from None
        if answer is None:
            raise OSError(errno.ECONNRESET, f"{self._url} has closed the connection")
        if isinstance(answer, Refused):
            await socket.close()
            raise (
                PermissionError(answer.errno, answer.text)
                if answer.errno == errno.EACCES
                else OSError(answer.errno, answer.text)
            )
        if not isinstance(answer, Welcome):
            await socket.close()
            raise OSError(errno.EPROTO, f"{self._url} does not speak as a meta service")
        self._begin(answer, began)
        return socket

    def _begin(self, welcome: Welcome, began: float) -> None:
        if not welcome.resumed:
            if self._hello.session:
                self._lose()
            self._next = 1
        self._hello = msgspec.structs.replace(self._hello, session=welcome.session, secret=welcome.secret)
        self.read_only = welcome.read_only
        self._tell = welcome.tell
        self._lease = welcome.lease
        self._valid_until = began + welcome.lease
        self._pings.clear()

    def _lose(self) -> None:
        """The session is over: fail what was under way."""
        self._outgoing.clear()
        self._uses.clear()
        self._held.clear()
        lost = [*self._pending.values(), *self._waits.values()]
        self._pending = {}
        self._waits = {}
        for each in lost:
            if not each.reply.done():
                each.reply.set_exception(OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
        self._on_lost()

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> protocol.FromService | None:
        """None: the connection has ended."""
        message = await socket.receive()
        return protocol.decode_from_service(message.data) if message.type == aiohttp.WSMsgType.BINARY else None

    async def _stay(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Keep the session: until ``close``, or the service refuses it for good."""
        try:
            while True:
                await self._converse(socket)
                found = None if self._closing or self._failure else await self._come_back()
                if found is None:
                    return
                socket = found
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("the session with the meta service failed")
            self._fail(OSError(errno.EIO, os.strerror(errno.EIO)))

    def _fail(self, error: OSError) -> None:
        self._failure = error
        self._lose()
        self._connected.set()

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Send and receive until the connection ends."""
        self._socket = socket
        self._outgoing = [*self._pending, *self._waits]
        self._again.set_result(None)
        self._again = asyncio.get_running_loop().create_future()
        self._wanted.set()
        self._connected.set()
        tasks: list[asyncio.Task[None]] = []
        try:
            if self._tell:
                await socket.send_bytes(protocol.encode(Uses(list(self._uses), self._held.all())))
            tasks = [asyncio.create_task(self._send(socket)), asyncio.create_task(self._renew())]
            while (message := await self._receive(socket)) is not None:
                match message:
                    case Replies(replies):
                        self._take(replies)
                    case Pong(number):
                        sent = self._pings.pop(number, None)
                        if sent is not None:
                            self._valid_until = max(self._valid_until, sent + self._lease)
                    case Refused(code, text):
                        log.error("the meta service ended the session: %s", text)
                        self._fail(OSError(code, os.strerror(code)))
        except (aiohttp.ClientError, msgspec.MsgspecError, OSError) as error:
            log.warning("the connection with the meta service was lost: %s", error)
        finally:
            if self._failure is None:
                self._connected.clear()
            self._socket = None
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            await socket.close()

    async def _come_back(self) -> aiohttp.ClientWebSocketResponse | None:
        pause = _FIRST_PAUSE
        while True:
            if (self._pending or self._waits) and _now() > self._valid_until:
                # The service has ended the session by now, or it will before it knows of us again.
                self._hello = msgspec.structs.replace(self._hello, session=0, secret=b"")
                self._lose()
            try:
                return await self._open()
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPROTO):
                    log.error("the meta service refuses the session: %s", error.strerror)
                    self._fail(OSError(error.errno, os.strerror(error.errno)))
                    return None
                log.warning("%s; trying again", error.strerror)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _send(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while self._outgoing:
                    await socket.send_bytes(self._frame())
        except (aiohttp.ClientError, OSError):
            await socket.close()  # the receiver goes on from there

    def _frame(self) -> bytes:
        requests: list[tuple[int, str, msgspec.Raw]] = []
        size = taken = 0
        for taken, id_ in enumerate(self._outgoing):  # noqa: B007 - how many, when it breaks off
            pending = self._pending.get(id_) or self._waits.get(id_)
            if pending is None:
                continue
            if len(requests) == protocol.BATCH_MAX or (requests and size + len(pending.arguments) > _FRAME):
                break
            size += len(pending.arguments)
            requests.append((id_, pending.operation.name, pending.arguments))
        else:
            taken += 1
        del self._outgoing[:taken]
        return protocol.encode(Requests(requests, next(iter(self._pending), self._next) - 1))

    async def _renew(self) -> None:
        """A third of the lease apart, so that one that is lost costs nothing."""
        while self._socket is not None:
            self._ping += 1
            self._pings[self._ping] = _now()
            try:
                await self._socket.send_bytes(protocol.encode(Ping(self._ping)))
            except (aiohttp.ClientError, OSError):
                return
            await asyncio.sleep(self._lease / 3)
            if _now() > self._valid_until and self._socket is not None:
                # Nothing comes back: the network swallows it, or this process was stopped.
                await self._socket.close()

    def _take(self, replies: list[tuple[int, int, msgspec.Raw]]) -> None:
        for id_, code, result in replies:
            pending = (self._pending if id_ > 0 else self._waits).pop(id_, None)
            if pending is None:
                continue
            if pending.note is not None:
                pending.note(code)
            if pending.reply.done():
                continue
            if code:
                text: str = msgspec.msgpack.decode(result, type=str)
                pending.reply.set_exception(OSError(code, text))
            else:
                pending.reply.set_result(pending.operation.result.decode(result))

    # Asking

    async def _call(self, name: str, *arguments: Any) -> Any:
        return await self._ask(name, *arguments)

    async def _ask(self, name: str, *arguments: Any, note: Callable[[int], None] | None = None, wait: int = 0) -> Any:
        """``wait``: it may take for ever, under that name."""
        encoded = msgspec.Raw(protocol.encode(arguments))
        if len(encoded) > protocol.FRAME_MAX - 1024:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        if not self._connected.is_set() or len(self._pending) >= protocol.IN_FLIGHT_MAX // 2:
            await self._wait()
        if self._failure is not None:
            raise OSError(self._failure.errno, self._failure.strerror)
        loop = asyncio.get_running_loop()
        pending = _Pending(protocol.OPERATIONS[name], encoded, loop.create_future(), note)
        if wait:
            self._waits[-wait] = pending
            self._outgoing.append(-wait)
        else:
            self._pending[self._next] = pending
            self._outgoing.append(self._next)
            self._next += 1
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self.end_turn)
        return await pending.reply

    async def _wait(self) -> None:
        """Until the service can be asked; EIO after ``patience``."""
        try:
            async with asyncio.timeout(self._patience):
                await self._connected.wait()
                while len(self._pending) >= protocol.IN_FLIGHT_MAX // 2 and self._failure is None:
                    await asyncio.wait([pending.reply for pending in list(self._pending.values())[:1]])
                    await asyncio.sleep(0)
        except TimeoutError:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None

    def end_turn(self) -> None:
        self._flushing = False
        if self._outgoing:
            self._wanted.set()

    # The operations

    async def lookup(self, parent: int, name: bytes) -> Inode:
        found: Inode = await self._call("lookup", parent, name)
        return found

    async def make_node(
        self,
        caller: Caller,
        parent: int,
        name: bytes,
        mode: int,
        umask: int,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        found: Inode = await self._call("make_node", caller, parent, name, mode, umask, rdev, target)
        return found

    async def make_unnamed(self, caller: Caller, parent: int, mode: int, umask: int) -> Inode:
        found: Inode = await self._call("make_unnamed", caller, parent, mode, umask)
        return found

    async def link(self, ino: int, parent: int, name: bytes) -> Inode:
        found: Inode = await self._call("link", ino, parent, name)
        return found

    async def unlink(self, parent: int, name: bytes) -> Inode:
        found: Inode = await self._call("unlink", parent, name)
        return found

    async def rmdir(self, parent: int, name: bytes) -> Inode:
        found: Inode = await self._call("rmdir", parent, name)
        return found

    async def rename(
        self, caller: Caller, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> Inode | None:
        found: Inode | None = await self._call("rename", caller, parent, name, new_parent, new_name, flags)
        return found

    async def list_dir(self, ino: int, after: int, limit: int) -> list[Dentry]:
        found: list[Dentry] = await self._call("list_dir", ino, after, limit)
        return found

    async def list_dir_plus(self, ino: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]:
        found: list[tuple[Dentry, Inode]] = await self._call("list_dir_plus", ino, after, limit)
        return found

    async def read_link(self, ino: int) -> bytes:
        found: bytes = await self._call("read_link", ino)
        return found

    async def get_inode(self, ino: int) -> Inode:
        found: Inode = await self._call("get_inode", ino)
        return found

    async def set_attributes(self, ino: int, change: SetAttr) -> Inode:
        found: Inode = await self._call("set_attributes", ino, change)
        return found

    async def touch_atime(self, times: Sequence[tuple[int, int]]) -> None:
        await self._call("touch_atime", times)

    async def get_xattr(self, ino: int, name: bytes) -> bytes:
        found: bytes = await self._call("get_xattr", ino, name)
        return found

    async def set_xattr(self, ino: int, name: bytes, value: bytes, flags: int = 0, kill_sgid: bool = False) -> None:
        await self._call("set_xattr", ino, name, value, flags, kill_sgid)

    async def list_xattr(self, ino: int) -> list[bytes]:
        found: list[bytes] = await self._call("list_xattr", ino)
        return found

    async def remove_xattr(self, ino: int, name: bytes) -> None:
        await self._call("remove_xattr", ino, name)

    async def usage(self) -> Usage:
        found: Usage = await self._call("usage")
        return found

    async def extents(self, ino: int, start: int, end: int) -> list[Extent]:
        found: list[Extent] = await self._call("extents", ino, start, end)
        return found

    async def segments(self, ids: Sequence[int]) -> list[Segment]:
        found: list[Segment] = await self._call("segments", ids)
        return found

    async def allocate_segments(self, count: int) -> int:
        found: int = await self._call("allocate_segments", count)
        return found

    async def exchange_writer(self, writer: int) -> int:
        found: int = await self._call("exchange_writer", writer)
        return found

    async def commit_data(self, segments: Sequence[Segment], commits: Sequence[DataCommit]) -> None:
        await self._call("commit_data", segments, commits)

    async def clone_range(self, source: int, start: int, length: int, target: int, target_start: int) -> Inode:
        found: Inode = await self._call("clone_range", source, start, length, target, target_start)
        return found

    async def open_inode(self, ino: int) -> Inode:
        new = ino not in self._uses
        self._uses.add(ino)
        try:
            found: Inode = await self._call("open_inode", ino)
        except BaseException:
            if new:
                self._uses.discard(ino)
            raise
        return found

    async def close_inodes(self, inos: Sequence[int]) -> None:
        self._uses.difference_update(inos)
        await self._call("close_inodes", inos)

    async def release_orphans(self, inos: Sequence[int]) -> None:
        await self._call("release_orphans", inos)

    async def get_lock(self, ino: int, lock: Lock, flock: bool) -> Lock | None:
        found: Lock | None = await self._call("get_lock", ino, lock, flock)
        return found

    async def set_lock(self, ino: int, lock: Lock, flock: bool, wait: int = 0) -> None:
        """As in ``MetaAPI``. The name of a wait must be above 0, and new in this client. A wait that is cancelled is
        given up before this ends; when it is granted all the same, this returns as if nobody had cancelled it."""
        if lock.kind == LockKind.FREE and not self._held.has(ino, lock.owner, flock=flock):
            return
        note = self._held.ask(ino, lock, flock=flock)
        asked = asyncio.ensure_future(self._ask("set_lock", ino, lock, flock, wait, note=note, wait=wait))
        try:
            await asyncio.shield(asked)
        except asyncio.CancelledError:
            if not wait or asked.cancelled():
                raise
            while not asked.done():
                again = self._again
                await self.give_up_lock(wait)
                # It may have got its answer on a connection that was lost: then it is asked, and waits, once more.
                await asyncio.wait([asked, again], return_when=asyncio.FIRST_COMPLETED)
            await asked

    async def give_up_lock(self, wait: int) -> None:
        await self._call("give_up_lock", wait)

    async def dead_segments(self, grace: int, after: int, limit: int) -> list[int]:
        found: list[int] = await self._call("dead_segments", grace, after, limit)
        return found

    async def forget_segments(self, ids: Sequence[int]) -> None:
        await self._call("forget_segments", ids)

    async def lost_segments(self, ids: Sequence[int]) -> list[int]:
        found: list[int] = await self._call("lost_segments", ids)
        return found

    async def segment_usage(self, after: int, limit: int) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = await self._call("segment_usage", after, limit)
        return found

    async def segment_extents(self, segment: int, limit: int) -> list[tuple[int, Extent]]:
        found: list[tuple[int, Extent]] = await self._call("segment_extents", segment, limit)
        return found

    async def move_extents(self, segments: Sequence[Segment], moves: Sequence[Move]) -> int:
        found: int = await self._call("move_extents", segments, moves)
        return found

    async def sync(self) -> None:
        await self._call("sync")

    # The session

    async def close(self) -> None:
        """End the session. What is under way fails."""
        self._closing = True
        if self._task is not None:
            if self._socket is not None:
                try:
                    await self._socket.send_bytes(protocol.encode(Goodbye()))
                    await asyncio.wait([self._task], timeout=_GOODBYE_SECONDS)
                except (aiohttp.ClientError, OSError):
                    log.warning("the meta service could not be told that this session is over")
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        self._on_lost = lambda: None
        self._fail(OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN)))
        await self._http.close()


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
