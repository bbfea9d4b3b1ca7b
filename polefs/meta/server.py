"""The meta service on the network: sessions of clients, each on one WebSocket at a time.

A session outlives its connection for as long as its lease, and so do the operations that it has begun and the replies
that the client has not confirmed. What it sends again after it has come back is answered from memory.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import os
import secrets
from collections.abc import Callable

import aiohttp
import msgspec
from aiohttp import web

from polefs.meta import protocol
from polefs.meta.api import MetaAPI
from polefs.meta.protocol import Goodbye, Hello, Ping, Pong, Refused, Replies, Requests, Welcome

log = logging.getLogger(__name__)

_HELLO_SECONDS = 10.0
"""Within which a client has to say who it is."""

_SESSIONS_MAX = 4096

_REPLIES_MAX = 4096
"""Replies in one frame."""

_NOTHING = msgspec.Raw(b"\xc0")


class Served:
    """A volume that clients may use: ``meta`` executes what they ask for. An empty token admits everybody to what it
    stands for; None nobody."""

    def __init__(self, meta: MetaAPI, *, token: str | None = "", read_token: str | None = None) -> None:
        self.meta = meta
        self._token = token
        self._read_token = read_token

    def admits(self, token: str) -> bool | None:
        """Whether that is for reading only; None: it does not admit at all. Takes the same time for every wrong one."""
        writing = self._token is not None and hmac.compare_digest(self._token.encode(), token.encode())
        reading = self._read_token is not None and hmac.compare_digest(self._read_token.encode(), token.encode())
        return False if writing or self._token == "" else True if reading or self._read_token == "" else None


class _Connection:
    """One WebSocket: collects what is ready and sends it in as few frames as it takes."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._replies: list[tuple[int, int, msgspec.Raw]] = []
        self._others: list[protocol.FromService] = []
        self._ready = asyncio.Event()

    def reply(self, id_: int, code: int, result: msgspec.Raw) -> None:
        self._replies.append((id_, code, result))
        self._ready.set()

    def say(self, message: protocol.FromService) -> None:
        self._others.append(message)
        self._ready.set()

    async def send_all(self) -> None:
        """Until cancelled, or the connection ends. Whoever does not read is cut off by the bound on requests without a
        confirmed reply."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            while self._others or self._replies:
                others, self._others = self._others, []
                for message in others:
                    await self._socket.send_bytes(protocol.encode(message))
                replies = self._replies[:_REPLIES_MAX]
                del self._replies[:_REPLIES_MAX]
                if replies:
                    await self._socket.send_bytes(protocol.encode(Replies(replies)))

    async def close(self) -> None:
        await self._socket.close()


class _Session:
    """What one client has under way. ``over`` is called when its lease is over, or it has said goodbye."""

    def __init__(
        self, id_: int, meta: MetaAPI, *, read_only: bool, info: str, lease: float, over: Callable[[_Session], None]
    ) -> None:
        self.id = id_
        self.secret = secrets.token_bytes(16)
        self.read_only = read_only
        self.info = info
        self._meta = meta
        self._lease = lease
        self._over = over
        self.connection: _Connection | None = None
        self._last = 0
        """The highest id that has been begun."""
        self._done = 0
        self._running: dict[int, asyncio.Task[None]] = {}
        self._replies: dict[int, tuple[int, msgspec.Raw]] = {}
        """Those to changes, until the client has confirmed them."""
        self._timer: asyncio.TimerHandle | None = None
        self.ended = False

    def attach(self, connection: _Connection) -> _Connection | None:
        """Replies go there from now on; returns the connection before, if it still is one."""
        before, self.connection = self.connection, connection
        self.alive()
        return before

    def detach(self, connection: _Connection) -> None:
        if self.connection is connection:
            self.connection = None

    def alive(self) -> None:
        """A sign of life: the lease begins anew."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._lease, self.end)

    def end(self) -> None:
        """Operations under way come to their end; there will be no others."""
        if self.ended:
            return
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._over(self)

    async def finished(self) -> None:
        """Returns when no operation is under way."""
        if self._running:
            await asyncio.wait(self._running.values())

    def take(self, batch: Requests) -> None:
        """Begin what is new, and answer again what has been answered. ValueError for what no client may send."""
        if batch.done > self._last or len(batch.requests) > protocol.BATCH_MAX:
            raise ValueError("a batch confirms what was never asked, or is too long")
        for id_ in range(self._done + 1, batch.done + 1):
            self._replies.pop(id_, None)
        self._done = max(self._done, batch.done)
        for id_, name, arguments in batch.requests:
            if id_ <= self._done or id_ in self._running:
                continue
            answered = self._replies.get(id_)
            if answered is not None:
                self._reply(id_, *answered)
                continue
            operation = protocol.OPERATIONS.get(name)
            if operation is None:
                raise ValueError(f"there is no operation {name!r}")
            if len(self._running) + len(self._replies) >= protocol.IN_FLIGHT_MAX:
                raise ValueError("too many requests without a confirmed reply")
            self._last = max(self._last, id_)
            values = operation.arguments.decode(arguments)
            self._running[id_] = asyncio.get_running_loop().create_task(self._execute(id_, operation, values))

    async def _execute(self, id_: int, operation: protocol.Operation, values: tuple[object, ...]) -> None:
        code, result = 0, _NOTHING
        try:
            if self.read_only and not operation.reads:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            result = msgspec.Raw(protocol.encode(await getattr(self._meta, operation.name)(*values)))
        except OSError as error:
            code, result = error.errno or errno.EIO, msgspec.Raw(protocol.encode(error.strerror or str(error)))
        except Exception:
            log.exception("operation %s failed", operation.name)
            code, result = errno.EIO, msgspec.Raw(protocol.encode(os.strerror(errno.EIO)))
        del self._running[id_]
        if not operation.reads:
            self._replies[id_] = (code, result)
        self._reply(id_, code, result)

    def _reply(self, id_: int, code: int, result: msgspec.Raw) -> None:
        if self.connection is not None:
            self.connection.reply(id_, code, result)


class MetaServer:
    """The web application, and the sessions of its clients. ``lease``: seconds."""

    def __init__(self, volumes: dict[str, Served], *, lease: float = 30.0) -> None:
        self._volumes = volumes
        self._lease = lease
        self._sessions: dict[int, _Session] = {}
        self._next = 1
        self._closing: set[asyncio.Task[None]] = set()
        self.application = web.Application()
        self.application.router.add_get("/session", self._serve)
        self.application.router.add_get("/health", self._health)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "sessions": len(self._sessions)})

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=protocol.FRAME_MAX, compress=False, heartbeat=self._lease / 2)
        await socket.prepare(request)
        session: _Session | None = None
        connection = _Connection(socket)
        sending = asyncio.get_running_loop().create_task(connection.send_all())
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                hello = await _next(socket)
            if not isinstance(hello, Hello):
                raise ValueError("the first frame is no Hello")
            session = await self._welcome(hello, connection, socket)
            while session is not None and (message := await _next(socket)) is not None:
                session.alive()
                match message:
                    case Requests():
                        session.take(message)
                    case Ping(number):
                        connection.say(Pong(number))
                    case Goodbye():
                        await session.finished()
                        session.end()
                        break
                    case _:
                        raise ValueError("a second Hello")
        except (ValueError, msgspec.MsgspecError) as error:
            log.warning("%s: %s; cutting it off", request.remote, error)
            await socket.send_bytes(protocol.encode(Refused(errno.EPROTO, f"malformed: {error}")))
        except TimeoutError:
            log.warning("%s said nothing; cutting it off", request.remote)
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            if session is not None:
                session.detach(connection)
            await socket.close()
        return socket

    async def _welcome(self, hello: Hello, connection: _Connection, socket: web.WebSocketResponse) -> _Session | None:
        refused = self._refusal(hello)
        if refused is not None:
            await socket.send_bytes(protocol.encode(refused))
            return None
        served = self._volumes[hello.volume]
        session = self._sessions.get(hello.session)
        resumed = session is not None and hmac.compare_digest(session.secret, hello.secret)
        if session is None or not resumed:
            session = self._begin(served, hello)
        welcome = Welcome(
            version=min(hello.version, protocol.VERSION),
            session=session.id,
            secret=session.secret,
            resumed=resumed,
            lease=self._lease,
            read_only=session.read_only,
        )
        connection.say(welcome)
        before = session.attach(connection)
        if before is not None:
            await before.close()
        return session

    def _refusal(self, hello: Hello) -> Refused | None:
        if hello.oldest > protocol.VERSION or hello.version < protocol.OLDEST:
            return Refused(
                errno.EPROTO,
                f"the service speaks versions {protocol.OLDEST} to {protocol.VERSION} of the protocol, the client"
                f" {hello.oldest} to {hello.version}: upgrade the older one",
            )
        served = self._volumes.get(hello.volume)
        # The same for a volume that does not exist: who has no token learns nothing.
        if served is None or served.admits(hello.token) is None:
            return Refused(errno.EACCES, f"no access to volume {hello.volume}: check its name and the token")
        if len(self._sessions) >= _SESSIONS_MAX:
            return Refused(errno.EAGAIN, f"there are {_SESSIONS_MAX} sessions already: try again later")
        return None

    def _begin(self, served: Served, hello: Hello) -> _Session:
        session = _Session(
            self._next,
            served.meta,
            read_only=bool(served.admits(hello.token)),
            info=hello.info,
            lease=self._lease,
            over=self._forget,
        )
        self._next += 1
        self._sessions[session.id] = session
        log.info("session %d of volume %s begins: %s", session.id, hello.volume, hello.info)
        return session

    def _forget(self, session: _Session) -> None:
        log.info("session %d is over", session.id)
        del self._sessions[session.id]
        if session.connection is not None:
            self._closing.add(closing := asyncio.get_running_loop().create_task(session.connection.close()))
            closing.add_done_callback(self._closing.discard)


async def _next(socket: web.WebSocketResponse) -> protocol.FromClient | None:
    """The next message; None when the connection has ended. ValueError for anything but a binary frame."""
    message = await socket.receive()
    match message.type:
        case aiohttp.WSMsgType.BINARY:
            found: protocol.FromClient = protocol.decode_from_client(message.data)
            return found
        case aiohttp.WSMsgType.CLOSE | aiohttp.WSMsgType.CLOSING | aiohttp.WSMsgType.CLOSED | aiohttp.WSMsgType.ERROR:
            return None
    raise ValueError("a text frame")
