"""A proxy that does harm: it stands between polefs and the S3 server and breaks what the tests tell it to break.

It runs on a thread with an event loop of its own. Requests and answers are kept whole in memory, so it is no measure of
speed. Signatures stay right, because the ``Host`` header passes through as it came.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import ssl
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto

import aiohttp
from aiohttp import web
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from multidict import CIMultiDict
from yarl import URL

from tests.s3.server import ACCESS_KEY, REGION, SECRET_KEY

START_SECONDS = 30.0

_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"})
_TRICKLE = 64
"""Bytes a second."""


class Fault(Enum):
    RESET = auto()
    """The connection is reset before the server sees the request."""
    LOSE_REPLY = auto()
    """The server does what it is asked to do, and its answer is lost with the connection."""
    HANG = auto()
    """The request is swallowed; there is no answer until ``heal``, and then the connection breaks."""
    INTERNAL_ERROR = auto()
    """500, without asking the server."""
    SLOW_DOWN = auto()
    """503 SlowDown, without asking the server."""
    BAD_GATEWAY = auto()
    """502 with a page of HTML: something on the way answers instead of the server."""
    HALF_ANSWER = auto()
    """Half of the body, then the end of the connection."""
    HALF_ANSWER_RESET = auto()
    """Half of the body, then a reset."""
    TRICKLE = auto()
    """The body comes at 64 bytes a second."""
    GARBLE_ANSWER = auto()
    """One byte of the body is another."""
    GARBLE_REQUEST = auto()
    """One byte of the body that the server gets is another."""
    NONSENSE = auto()
    """An answer that is no HTTP."""
    SKEWED_CLOCK = auto()
    """403 RequestTimeTooSkewed: the server finds our clock far off."""
    ACCESS_DENIED = auto()
    """403 AccessDenied: the permissions have been taken away."""
    WRONG_REGION = auto()
    """400 AuthorizationHeaderMalformed: the bucket is in eu-west-1."""
    NOT_IMPLEMENTED = auto()
    """501 NotImplemented."""
    NOT_ALLOWED = auto()
    """405 MethodNotAllowed."""
    NO_CONDITIONS = auto()
    """The server passes over ``If-None-Match``."""
    NO_CHECKSUMS = auto()
    """The server passes over checksums."""
    NO_RANGES = auto()
    """The server passes over ``Range``."""


_PASSED_OVER = {
    Fault.NO_CONDITIONS: "If-None-Match",
    Fault.NO_CHECKSUMS: "x-amz-checksum-crc32c",
    Fault.NO_RANGES: "Range",
}

_REFUSALS = {
    Fault.WRONG_REGION: (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong"),
    Fault.INTERNAL_ERROR: (500, "InternalError", "We encountered an internal error. Please try again."),
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.SKEWED_CLOCK: (403, "RequestTimeTooSkewed", "The difference between the request time and ours is too large."),
    Fault.NOT_IMPLEMENTED: (501, "NotImplemented", "This is not implemented."),
    Fault.NOT_ALLOWED: (405, "MethodNotAllowed", "The specified method is not allowed against this resource."),
    Fault.ACCESS_DENIED: (403, "AccessDenied", "Access Denied"),
}


@dataclass
class Rule:
    """Which requests meet a fault. ``share``: of those that match, by chance."""

    fault: Fault
    method: str | None
    path: re.Pattern[str]
    times: int | None
    share: float


@dataclass
class Tally:
    """What has passed, for tests to look at."""

    requests: Counter[str] = field(default_factory=Counter)
    """By method."""
    faults: Counter[Fault] = field(default_factory=Counter)
    hosts: set[str] = field(default_factory=set)
    """The ``Host`` headers."""


class FaultProxy:
    """Between ``start`` and ``close``. Everything may be called from any thread."""

    def __init__(self, target: str, *, tls: ssl.SSLContext | None = None, seed: int = 1) -> None:
        """``target``: the server's endpoint; ``tls``: serve https with these certificates."""
        self._target = target
        self._tls = tls
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._met = threading.Condition(self._lock)
        self._rules: list[Rule] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._healed = asyncio.Event()
        self._server: web.Server | None = None
        self._client: aiohttp.ClientSession | None = None
        self._listener: asyncio.Server | None = None
        self.port = 0
        self.tally = Tally()

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()
        self._call(self._start())

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_SECONDS)
        self._loop.close()

    def inject(
        self, fault: Fault, *, method: str | None = None, path: str = "", times: int | None = None, share: float = 1.0
    ) -> None:
        """From now on requests with this method, and a path or query in which the expression is found, meet the fault:
        the next ``times`` of them, or all until ``heal``."""
        with self._lock:
            self._rules.append(Rule(fault, method, re.compile(path), times, share))

    def heal(self) -> None:
        """No more faults; requests that hang lose their connections."""
        with self._lock:
            self._rules.clear()

        def release() -> None:
            self._healed.set()
            self._healed = asyncio.Event()

        self._loop.call_soon_threadsafe(release)

    def wait_for(self, fault: Fault) -> None:
        """Until a request has met it. Blocks."""
        with self._met:
            assert self._met.wait_for(lambda: self.tally.faults[fault], START_SECONDS), f"nothing has met {fault}"

    def refuse(self) -> None:
        """The server is down: connections are refused, and those that there are break."""
        self._call(self._refuse())

    def accept(self) -> None:
        """The server is up again, at the same port."""
        self._call(self._listen())

    def _call(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(START_SECONDS)  # type: ignore[arg-type]

    async def _start(self) -> None:
        self._server = web.Server(self._handle, access_log=None)
        self._client = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        await self._listen()

    async def _listen(self) -> None:
        assert self._server is not None and self._listener is None
        self._listener = await self._loop.create_server(
            self._connect, "127.0.0.1", self.port, ssl=self._tls, reuse_address=True
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    def _connect(self) -> asyncio.Protocol:
        assert self._server is not None
        return self._server()

    async def _refuse(self) -> None:
        assert self._server is not None and self._listener is not None
        self._listener.close()
        self._listener = None
        for protocol in self._server.connections:
            if protocol.transport is not None:
                _reset(protocol.transport)

    async def _close(self) -> None:
        assert self._server is not None and self._client is not None
        if self._listener is not None:
            await self._refuse()
        self._healed.set()
        await self._server.shutdown(1.0)
        await self._client.close()

    def _choose(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for rule in self._rules:
                if rule.method not in (None, method) or not rule.path.search(path):
                    continue
                if self._random.random() >= rule.share:
                    continue
                if rule.times is not None:
                    rule.times -= 1
                    if rule.times == 0:
                        self._rules.remove(rule)
                self.tally.faults[rule.fault] += 1
                self._met.notify_all()
                return rule.fault
        return None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.tally.requests[request.method] += 1
        self.tally.hosts.add(request.host)
        return await self._answer(request, self._choose(request.method, request.path_qs))

    async def _answer(self, request: web.BaseRequest, fault: Fault | None) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        if fault is Fault.RESET:
            return _broken(transport)
        if request.headers.get("Expect", "").lower() == "100-continue":
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.content.read()
        if fault is Fault.HANG:
            await self._healed.wait()
            return _broken(transport)
        if fault is Fault.NONSENSE:
            transport.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            transport.close()
            return web.Response()
        if fault is Fault.BAD_GATEWAY:
            return web.Response(status=502, text="<html><body>502 Bad Gateway</body></html>", content_type="text/html")
        if fault in _REFUSALS:
            status, code, message = _REFUSALS[fault]
            details = f"<Code>{code}</Code><Message>{message}</Message><Region>eu-west-1</Region>"
            text = f'<?xml version="1.0"?><Error>{details}</Error>'
            return web.Response(status=status, body=text.encode(), content_type="application/xml")
        if fault is Fault.GARBLE_REQUEST:
            body = _garble(body)
        status, headers, answer = await self._forward(request, body, _PASSED_OVER.get(fault) if fault else None)
        if fault is Fault.LOSE_REPLY:
            return _broken(transport)
        if fault is Fault.GARBLE_ANSWER:
            answer = _garble(answer)
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if fault in (Fault.HALF_ANSWER, Fault.HALF_ANSWER_RESET):
            await response.write(answer[: len(answer) // 2])
            if fault is Fault.HALF_ANSWER_RESET:
                return _broken(transport)
            transport.close()
        elif fault is Fault.TRICKLE:
            for start in range(0, len(answer), _TRICKLE):
                await response.write(answer[start : start + _TRICKLE])
                await asyncio.sleep(1.0)
        elif answer:
            await response.write(answer)
        return response

    async def _forward(
        self, request: web.BaseRequest, body: bytes, without: str | None
    ) -> tuple[int, CIMultiDict[str], bytes]:
        assert self._client is not None
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in _HOP)
        if headers.pop(without or "", None) is not None:
            headers = _sign_again(request, headers)
        # As an HTTP proxy is asked it is a whole address.
        whole = request.raw_path.startswith("http://")
        url = URL(request.raw_path if whole else self._target + request.raw_path, encoded=True)
        try:
            async with self._client.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            ) as answer:
                kept = CIMultiDict((name, value) for name, value in answer.headers.items() if name.lower() not in _HOP)
                content = await answer.read()
        except (aiohttp.ClientError, OSError):
            # The server behind is gone: so are we.
            if request.transport is not None:
                _reset(request.transport)
            raise ConnectionResetError from None
        if request.method != "HEAD":
            kept["Content-Length"] = str(len(content))
        return answer.status, kept, content


def _sign_again(request: web.BaseRequest, headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """After a signed header has been taken away."""
    kept = {name: value for name, value in headers.items() if name.lower() not in ("authorization", "x-amz-date")}
    unsigned = AWSRequest(request.method, f"http://{request.host}{request.raw_path}", headers=kept)
    unsigned.context["client_config"] = Config(s3={"payload_signing_enabled": False})
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION).add_auth(unsigned)
    return CIMultiDict(unsigned.headers.items())


def _broken(transport: asyncio.Transport) -> web.StreamResponse:
    _reset(transport)
    return web.Response()


def _reset(transport: asyncio.BaseTransport) -> None:
    """End a connection with RST, and without what has not been sent yet."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if isinstance(transport, asyncio.Transport):
        transport.abort()


def _garble(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
