"""Ranged GETs and PUTs whose bytes go straight from the socket to where they stay, and from there to the socket.

On the way through aiohttp what comes is copied four times; a GET of 4 MiB then takes five times the CPU time of this,
one of 4 KiB and a PUT of 64 KiB twice as much. Only what these two need is here: a pool of connections, one request at
a time on each. Answers are parsed by httptools up to the body, which the event loop receives in place.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, cast

import httptools
import msgspec

from polefs.objects.localio import aligned_buffer

CONNECT_SECONDS: Final = 5.0
SILENCE_SECONDS: Final = 15.0
"""Without a byte to or from the server; then the connection is given up."""

Buffer = bytes | bytearray | memoryview

_CHUNK: Final = 256 << 10
"""Of a body, handed to the connection at a time, bytes: on a slow line it is not taken for silent while they go."""

_IDLE_SECONDS: Final = 20.0
"""That a connection is kept for the next request: servers close theirs after a while."""

_HEAD_SIZE: Final = 16 << 10
"""Of the buffer for heads of answers, and for bodies that are no contents, bytes."""

_OTHER_MAX: Final = 64 << 10
"""Kept of the body of any other answer than the one that was asked for, bytes."""


class Response(msgspec.Struct, frozen=True):
    """``headers`` by their names in lower case, or whatever their case is."""

    status: int
    headers: Mapping[str, str]
    body: bytes | memoryview


class ConnectError(OSError):
    """No connection; ``__cause__`` tells why."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(errno.ECONNREFUSED, f"cannot connect to {host}:{port}")
        self.host = host
        self.port = port


class BrokenAnswer(OSError):
    """The connection ended before the answer did, or the answer is no HTTP (EPROTO)."""


class _Stale(Exception):
    """The server has closed a connection that was kept, before it could see the request."""


class Connections:
    """Connections to one server, up to ``limit``; requests wait for one that is free."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, limit: int) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._room = asyncio.Semaphore(limit)
        self._idle: list[_Connection] = []
        self._closed = False
        self._silence = SILENCE_SECONDS
        self._busy: set[_Connection] = set()

    async def get(self, target: str, headers: Mapping[str, str], length: int) -> Response:
        """The answer to GET of ``target`` (path and query). A 206 has up to ``length`` bytes in its body; of others,
        and of one that is longer, the first 64 KiB are kept. ConnectError, BrokenAnswer, TimeoutError."""
        return await self._request("GET", target, headers, (), length)

    async def put(self, target: str, headers: Mapping[str, str], body: Sequence[Buffer]) -> Response:
        """The answer to PUT of ``body``, whose length and all that goes with it stands in ``headers``. Otherwise as
        ``get``. The server may have done it also after a failure, and may see it twice."""
        return await self._request("PUT", target, headers, body, 0)

    async def _request(
        self, method: str, target: str, headers: Mapping[str, str], body: Sequence[Buffer], length: int
    ) -> Response:
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]
        head = "\r\n".join(lines).encode("latin-1")
        async with self._room:
            while True:
                kept = self._take()
                connection = kept or await self._connect()
                self._busy.add(connection)
                try:
                    answer = await connection.request(head, body, length, self._silence)
                except _Stale:
                    if kept is None:
                        raise BrokenAnswer(errno.ECONNRESET, "closed before the answer") from None
                    continue
                except BaseException:
                    connection.abort()
                    raise
                finally:
                    self._busy.discard(connection)
                if connection.reusable and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.abort()
                return answer

    def limit_silence(self, seconds: float) -> None:
        """How long an answer may not go on before it is given up, also one that is awaited already."""
        self._silence = seconds
        for connection in self._busy:
            connection.limit_silence(seconds)

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    def _take(self) -> _Connection | None:
        """The connection that was used last, if it can still be."""
        oldest = asyncio.get_running_loop().time() - _IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.used >= oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop), self._host, self._port, ssl=self._tls
                )
        except OSError as error:
            raise ConnectError(self._host, self._port) from error
        return connection


class _Connection(asyncio.BufferedProtocol):
    """One connection, and the answer that comes on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reusable = True
        self.used = loop.time()
        """When the last byte came, or went, in the time of the loop."""
        self._loop = loop
        self._transport: asyncio.Transport
        self._head = memoryview(bytearray(_HEAD_SIZE))
        self._waiter: asyncio.Future[Response] | None = None
        self._parser: httptools.HttpResponseParser
        self._headers: dict[str, str] = {}
        self._status = 0
        self._length = 0
        self._other_max = 0
        self._whole = True
        """The end of the connection is that of the answer."""
        self._silence_seconds = 0.0
        self._body: memoryview | None = None
        """Of the answer that was asked for: filled up to ``_filled``, at first from what came with the head."""
        self._filled = 0
        self._other = bytearray()
        self._answered = False
        self._surplus = False
        """More has come than the answer to our request."""
        self._silence: asyncio.TimerHandle
        self._paused: asyncio.Future[None] | None = None
        """While the connection takes nothing more to send."""

    async def request(self, head: bytes, body: Sequence[Buffer], length: int, silence: float) -> Response:
        self._waiter = self._loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._headers = {}
        self._status = 0
        self._length = length
        self._other_max = _OTHER_MAX
        self._silence_seconds = silence
        self._body = None
        self._other = bytearray()
        self._answered = self._surplus = False
        self.used = self._loop.time()
        self._silence = self._loop.call_later(silence, self._check_silence)
        try:
            for chunk in _chunks(head, body):
                if self._paused is not None:
                    await self._paused
                if self._waiter.done():
                    self.reusable = False
                    break
                self._transport.writelines(chunk)
            return await self._waiter
        finally:
            self._silence.cancel()
            self._waiter = None

    def limit_silence(self, seconds: float) -> None:
        self._silence_seconds = seconds
        self._silence.cancel()
        self._check_silence()

    def abort(self) -> None:
        self.reusable = False
        self._transport.abort()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def pause_writing(self) -> None:
        self._paused = self._loop.create_future()

    def resume_writing(self) -> None:
        self.used = self._loop.time()
        self._go_on()

    def _go_on(self) -> None:
        """There is room to send more, or no use in it."""
        paused, self._paused = self._paused, None
        if paused is not None and not paused.done():
            paused.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._head if self._body is None else self._body[self._filled :]

    def buffer_updated(self, count: int) -> None:
        if self._waiter is None or self._waiter.done():
            # Nobody has asked for anything.
            self.abort()
            return
        self.used = self._loop.time()
        if self._body is not None:
            self._filled += count
        else:
            try:
                self._parser.feed_data(bytes(self._head[:count]))
            except httptools.HttpParserError:
                self._fail(BrokenAnswer(errno.EPROTO, "no HTTP"))
                return
        if self._body is not None and self._filled == len(self._body):
            self._finish(self._body)
        elif self._answered or len(self._other) > self._other_max:
            self.reusable = self.reusable and self._answered
            self._finish(bytes(self._other[: self._other_max]))

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._go_on()
        if self._waiter is None or self._waiter.done():
            return
        if not self._status:
            self._waiter.set_exception(_Stale())
        elif error is None and self._whole:
            self._finish(bytes(self._other[: self._other_max]))
        else:
            self._fail(BrokenAnswer(errno.ECONNRESET, "the answer broke off"))

    # httptools

    def on_message_begin(self) -> None:
        if self._answered:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._surplus:
            return
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._surplus:
            return
        if status < 200:
            self._headers = {}
            return
        self._status = status
        self.reusable = self._parser.should_keep_alive()
        length = self._headers.get("content-length")
        # A part that ends with the connection might as well have broken off.
        self._whole = length is None and "transfer-encoding" not in self._headers and status != 206
        if status != 206:
            return
        if length is None:
            self._other_max = max(self._length, _OTHER_MAX)
        elif length.isdecimal() and int(length) <= self._length:
            self._body = aligned_buffer(int(length))
            self._filled = 0

    def on_body(self, data: bytes) -> None:
        if self._surplus:
            return
        if self._body is not None:
            self._body[self._filled : self._filled + len(data)] = data
            self._filled += len(data)
        elif len(self._other) <= self._other_max:
            self._other += data

    def on_message_complete(self) -> None:
        self._answered = self._status >= 200

    def _finish(self, body: bytes | memoryview) -> None:
        assert self._waiter is not None
        self.reusable = self.reusable and not self._surplus
        self._body = None
        self._waiter.set_result(Response(self._status, self._headers, body))
        if self._transport.get_write_buffer_size():
            # Answered before the server has seen all of the request: a refusal.
            self.reusable = False
        self._go_on()

    def _fail(self, error: Exception) -> None:
        self.reusable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        self._go_on()

    def _check_silence(self) -> None:
        left = self.used + self._silence_seconds - self._loop.time()
        if left > 0:
            self._silence = self._loop.call_later(left, self._check_silence)
        else:
            self._fail(TimeoutError())


def _chunks(head: bytes, body: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """All of a request in pieces of about ``_CHUNK``, without copying any."""
    chunk: list[Buffer] = [head]
    room = _CHUNK
    for part in body:
        rest = memoryview(part)
        while len(rest) > room:
            chunk.append(rest[:room])
            rest = rest[room:]
            yield chunk
            chunk, room = [], _CHUNK
        chunk.append(rest)
        room -= len(rest)
    yield chunk
