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
from contextlib import suppress

import aiohttp
import msgspec
from aiohttp import web

from polefs.meta import protocol
from polefs.meta.protocol import Goodbye, Hello, Ping, Pong, Refused, Replies, Requests, Uses, Welcome
from polefs.meta.sessions import REQUEST, ClientSession, Sessions
from polefs.meta.store.base import Deposed, Store

log = logging.getLogger(__name__)

_HELLO_SECONDS = 10.0
"""Within which a client has to say who it is."""

_SESSIONS_MAX = 4096

_REPLIES_MAX = 4096
"""Replies in one frame."""

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0
"""Between two attempts to release what an ended session held, seconds."""

_NOTHING = msgspec.Raw(b"\xc0")


class Served:
    """A volume that clients may use. An empty token admits everybody to what it stands for; None nobody."""

    def __init__(self, store: Store, *, token: str | None = "", read_token: str | None = None) -> None:
        self.sessions = Sessions(store)
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


class _Client:
    """What the client of one session has under way."""

    def __init__(self, session: ClientSession, replies: list[tuple[int, bytes]]) -> None:
        """``replies``: those that the store remembers."""
        self.session = session
        self.connection: _Connection | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._running: dict[int, asyncio.Task[None]] = {}
        self._replies: dict[int, tuple[int, msgspec.Raw]] = {id_: (0, msgspec.Raw(reply)) for id_, reply in replies}
        """Those to changes, until the client has confirmed them."""

    async def finished(self) -> None:
        """Returns when no operation is under way."""
        if self._running:
            await asyncio.wait(self._running.values())

    def take(self, batch: Requests) -> None:
        """Begin what is new, and answer again what has been answered. ValueError for what no client may send."""
        session = self.session
        if batch.done > session.confirmed:
            session.confirmed = batch.done
            for id_ in [id_ for id_ in self._replies if id_ <= batch.done]:
                del self._replies[id_]
        if len(batch.requests) > protocol.BATCH_MAX:
            raise ValueError("too many requests in one frame")
        for id_, name, arguments in batch.requests:
            if 0 <= id_ <= session.confirmed or id_ in self._running:
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
            if id_ < 0 and operation.once:
                raise ValueError(f"operation {name} has an id that nobody remembers")
            values = operation.arguments.decode(arguments)
            self._running[id_] = asyncio.get_running_loop().create_task(self._execute(id_, operation, values))

    async def _execute(self, id_: int, operation: protocol.Operation, values: tuple[object, ...]) -> None:
        code, result = 0, _NOTHING
        if operation.once:
            REQUEST.set(id_)
        try:
            if self.session.row.read_only and not operation.harmless:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            result = msgspec.Raw(protocol.encode(await getattr(self.session.meta, operation.name)(*values)))
        except Deposed:
            # Not ours to answer: the client comes back to the server that can.
            del self._running[id_]
            if self.connection is not None:
                await self.connection.close()
            return
        except OSError as error:
            code, result = error.errno or errno.EIO, msgspec.Raw(protocol.encode(error.strerror or str(error)))
        except Exception:
            log.exception("operation %s failed", operation.name)
            code, result = errno.EIO, msgspec.Raw(protocol.encode(os.strerror(errno.EIO)))
        del self._running[id_]
        if not operation.reads and id_ > 0:
            self._replies[id_] = (code, result)
        self._reply(id_, code, result)

    def _reply(self, id_: int, code: int, result: msgspec.Raw) -> None:
        if self.connection is not None:
            self.connection.reply(id_, code, result)


class MetaServer:
    """The web application, and the sessions of its clients. ``lease``: seconds. Call ``start`` before the first
    request, and ``stop`` when there will be no more: sessions go on when the service comes back."""

    def __init__(self, volumes: dict[str, Served], *, lease: float = 30.0) -> None:
        self._volumes = volumes
        self._lease = lease
        self._clients: dict[tuple[str, int], _Client] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self.application = web.Application()
        self.application.router.add_get("/session", self._serve)
        self.application.router.add_get("/health", self._health)

    async def start(self) -> None:
        """Sessions from before go on; each has a lease to come back in."""
        for name, volume in self._volumes.items():
            for session in await volume.sessions.start():
                self._clients[name, session.id] = client = _Client(session, await session.replies())
                self._renew(name, client)

    async def stop(self) -> None:
        """Returns when nothing is under way. Closes no store."""
        for client in self._clients.values():
            if client.timer is not None:
                client.timer.cancel()
            if client.connection is not None:
                await client.connection.close()
        for volume in self._volumes.values():
            volume.sessions.locks.stop()
        for client in self._clients.values():
            await client.finished()
        for task in list(self._ending):
            task.cancel()
            await asyncio.wait([task])

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "sessions": len(self._clients)})

    # Leases

    def _renew(self, volume: str, client: _Client) -> None:
        """A sign of life: the lease begins anew."""
        if client.timer is not None:
            client.timer.cancel()
        client.timer = asyncio.get_running_loop().call_later(self._lease, self._expire, volume, client)

    def _expire(self, volume: str, client: _Client) -> None:
        log.warning("session %d of volume %s has given no sign of life: it is over", client.session.id, volume)
        self._begin_end(volume, client)

    def _begin_end(self, volume: str, client: _Client) -> asyncio.Task[None]:
        """Nobody finds it any more, and what it asks for fails; the task takes away what it held."""
        if client.timer is not None:
            client.timer.cancel()
        client.session.ended = True
        # Those that wait would do so for ever.
        self._volumes[volume].sessions.locks.end(client.session.id)
        self._clients.pop((volume, client.session.id), None)
        task = asyncio.get_running_loop().create_task(self._end(volume, client))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def _end(self, volume: str, client: _Client) -> None:
        if client.connection is not None:
            await client.connection.close()
        await client.finished()
        pause = _FIRST_PAUSE
        while True:
            try:
                await self._volumes[volume].sessions.end(client.session)
            except OSError as error:
                log.error("what session %d of volume %s held is not yet released: %s", client.session.id, volume, error)
            else:
                log.info("session %d of volume %s is over", client.session.id, volume)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    # Connections

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=protocol.FRAME_MAX, compress=False)
        await socket.prepare(request)
        client: _Client | None = None
        connection = _Connection(socket)
        sending = asyncio.get_running_loop().create_task(connection.send_all())
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                hello = await _next(socket)
            if not isinstance(hello, Hello):
                raise ValueError("the first frame is no Hello")
            client = await self._welcome(hello, connection, socket)
            if client is not None:
                await self._listen(hello.volume, client, connection, socket)
        except (ValueError, msgspec.MsgspecError) as error:
            log.warning("%s: %s; cutting it off", request.remote, error)
            with suppress(ConnectionError):
                await socket.send_bytes(protocol.encode(Refused(errno.EPROTO, f"malformed: {error}")))
        except TimeoutError:
            log.warning("%s said nothing; cutting it off", request.remote)
        except ConnectionError as error:
            log.info("%s has gone: %s", request.remote, error)
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            if client is not None and client.connection is connection:
                client.connection = None
            await socket.close()
        return socket

    async def _listen(
        self, volume: str, client: _Client, connection: _Connection, socket: web.WebSocketResponse
    ) -> None:
        sessions = self._volumes[volume].sessions
        while (message := await _next(socket)) is not None:
            if client.session.ended or client.connection is not connection:
                return
            if isinstance(message, Uses):
                if not sessions.knows_holding(client.session):
                    await sessions.tell_holding(client.session, message.inos, message.locks)
            elif not sessions.knows_holding(client.session):
                raise ValueError("it does not say what it uses")
            self._renew(volume, client)
            match message:
                case Requests():
                    client.take(message)
                case Ping(number):
                    connection.say(Pong(number))
                case Goodbye():
                    sessions.locks.end(client.session.id)
                    await client.finished()
                    client.connection = None
                    await self._begin_end(volume, client)
                    return
                case Hello():
                    raise ValueError("a second Hello")

    async def _welcome(self, hello: Hello, connection: _Connection, socket: web.WebSocketResponse) -> _Client | None:
        """None: it was refused."""
        admitted = await self._admit(hello)
        if isinstance(admitted, Refused):
            await socket.send_bytes(protocol.encode(admitted))
            return None
        session, secret = admitted
        sessions = self._volumes[hello.volume].sessions
        client = self._clients.setdefault((hello.volume, session.id), _Client(session, []))
        connection.say(
            Welcome(
                version=min(hello.version, protocol.VERSION),
                session=session.id,
                secret=secret,
                resumed=session.id == hello.session,
                lease=self._lease,
                read_only=session.row.read_only,
                tell=not sessions.knows_holding(session),
            )
        )
        before, client.connection = client.connection, connection
        if sessions.knows_holding(session):
            self._renew(hello.volume, client)
        if before is not None:
            await before.close()
        return client

    async def _admit(self, hello: Hello) -> Refused | tuple[ClientSession, bytes]:
        """The session that it comes back to, or a new one, and its secret."""
        refused = self._refusal(hello)
        if refused is not None:
            return refused
        volume = self._volumes[hello.volume]
        found = volume.sessions.find(hello.session, hello.secret)
        if found is not None:
            return found, hello.secret
        try:
            session, secret = await volume.sessions.begin(read_only=bool(volume.admits(hello.token)), info=hello.info)
        except OSError as error:
            return Refused(errno.EAGAIN, f"the service cannot begin a session: {error.strerror}")
        log.info("session %d of volume %s begins: %s", session.id, hello.volume, hello.info)
        return session, secret

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
        if len(self._clients) >= _SESSIONS_MAX and (hello.volume, hello.session) not in self._clients:
            return Refused(errno.EAGAIN, f"there are {_SESSIONS_MAX} sessions already: try again later")
        return None


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
