"""Signed requests for single objects, sent with aiohttp itself.

botocore's way to a GET (parameters, endpoint rules, hooks, parsers) takes five times the CPU time of the request. So
the objects themselves travel this way: botocore says once where the bucket is, and gives the credentials. What
holds contents goes a shorter way yet (``s3connections``), unless an HTTP proxy stands between.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

import aiohttp
import google_crc32c
from aiohttp.abc import AbstractStreamWriter
from botocore.exceptions import CredentialRetrievalError, NoCredentialsError
from yarl import URL

from polefs.objects.base import StoreError
from polefs.objects.s3connections import CONNECT_SECONDS, SILENCE_SECONDS, Connections, Response
from polefs.objects.s3errors import Answer, AnswerError
from polefs.objects.s3sign import Signer

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

Buffer = bytes | bytearray | memoryview

_PORTS: Final = {"http": 80, "https": 443}

_ERROR_MAX: Final = 64 << 10
"""Of an error's text, bytes."""

_READ_AHEAD: Final = 1 << 20
"""What aiohttp takes from a connection before it lets the server wait, bytes."""

_INLINE_MAX: Final = 1 << 20
"""The checksum of more bytes than this is computed in a thread."""

_SENT: Final = 256 << 10
"""Bytes that are sent in one go: on a slow line, a connection is not taken for silent while they go."""


class DataPlane:
    """Requests for the objects of one bucket. They raise what aiohttp and botocore raise, and ``AnswerError`` for an
    answer that is no success."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        contents: Connections | None,
        credentials: Any,
        presigned: str,
    ) -> None:
        """For ``open``. ``presigned`` is botocore's address of the object ``_``."""
        parts = urllib.parse.urlsplit(presigned)
        scope = dict(urllib.parse.parse_qsl(parts.query))["X-Amz-Credential"]
        _, _, self.region, service, _ = scope.rsplit("/", 4)
        self._path = parts.path.removesuffix("_")
        self.server = f"{parts.scheme}://{parts.netloc}"
        self._host = _host_header(parts)
        self._session = session
        self._connections = contents
        self._silence = SILENCE_SECONDS
        self._watches: set[asyncio.Timeout] = set()
        self._credentials = credentials
        self._signer = Signer(self._host, self.region, service)

    @classmethod
    async def open(
        cls, client: S3Client, credentials: Any, bucket: str, ca_bundle: str | None, connections: int
    ) -> DataPlane:
        """``credentials`` are an aiobotocore session's, which renews them when they expire."""
        if credentials is None:
            raise NoCredentialsError
        presigned = await client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "_"})
        parts = urllib.parse.urlsplit(presigned)
        tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            tls = await asyncio.to_thread(_trusting, ca_bundle)
        proxy = _proxy_for(parts)
        contents: Connections | None = None
        if proxy is None:
            assert parts.hostname is not None
            contents = Connections(parts.hostname, parts.port or _PORTS[parts.scheme], tls, connections)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=tls or True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            proxy=proxy,
            auto_decompress=False,
            read_bufsize=_READ_AHEAD,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        return cls(session, contents, credentials, presigned)

    def limit_silence(self, seconds: float) -> None:
        """How long a connection may be silent, in place of ``SILENCE_SECONDS`` if that is less; also one of a request
        that is under way."""
        self._silence = min(seconds, SILENCE_SECONDS)
        if self._connections is not None:
            self._connections.limit_silence(self._silence)
        ends = asyncio.get_running_loop().time() + self._silence
        for watch in self._watches:
            watch.reschedule(min(watch.when() or ends, ends))

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[Callable[[], None]]:
        """TimeoutError when for too long nothing has moved, as the function that it yields is called to tell."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._silence) as watch:
            self._watches.add(watch)
            try:
                yield lambda: watch.reschedule(loop.time() + self._silence)
            finally:
                self._watches.discard(watch)

    def url(self, key: str) -> str:
        """The address of an object, quoted as signatures have it (Signature Version 4, UriEncode)."""
        return self.server + self._path + urllib.parse.quote(key, safe="/-._~")

    async def get(self, key: str, offset: int, length: int) -> Response:
        """A part of an object: status 206, and fewer bytes only at its end."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        if self._connections is None:
            return await self.request("GET", key, headers, limit=length)
        url = self.url(key)
        response = await self._connections.get(*await self._signed("GET", url, headers), length)
        return _success(response)

    async def put(
        self, key: str, headers: Mapping[str, str], body: Sequence[Buffer], query: Mapping[str, str] | None = None
    ) -> Response:
        """``headers`` have the length and the checksum of ``body``."""
        if self._connections is None:
            return await self.request("PUT", key, headers, query=query, body=body)
        url = _with_query(self.url(key), query)
        response = await self._connections.put(*await self._signed("PUT", url, headers), body)
        return _success(response)

    async def request(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str],
        *,
        query: Mapping[str, str] | None = None,
        body: Sequence[Buffer] | None = None,
        limit: int = 0,
    ) -> Response:
        """``key`` is that in the bucket. An answer with more than ``limit`` bytes is cut off there."""
        url = _with_query(self.url(key), query)
        signed = await self._sign(method, url, headers)
        async with self._watched() as moved:
            data = None if body is None else _Body(body, moved)
            async with self._session.request(method, URL(url, encoded=True), headers=signed, data=data) as response:
                moved()
                if response.status >= 300:
                    text = await response.content.read(_ERROR_MAX)
                    raise AnswerError(_read_error(response.status, response.headers, text))
                content = await _read_part(response.content, limit, moved)
                return Response(response.status, response.headers, content)

    async def _signed(self, method: str, url: str, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """What is asked for, and the headers, as ``Connections`` takes them."""
        signed = await self._sign(method, url, headers)
        return url.removeprefix(self.server), {"Host": self._host, **signed}

    async def close(self) -> None:
        if self._connections is not None:
            self._connections.close()
        await self._session.close()

    async def _sign(self, method: str, url: str, headers: Mapping[str, str]) -> dict[str, str]:
        try:
            credentials = await self._credentials.get_frozen_credentials()
        except RuntimeError as error:  # what came is no longer valid
            raise CredentialRetrievalError(provider=self._credentials.method, error_msg=error) from error
        # The body is not hashed: its CRC is a signed header.
        return self._signer.sign(credentials, method, url.removeprefix(self.server), headers, datetime.now(UTC))


class _Body(aiohttp.Payload):
    """Buffers one after another, without joining them; aiohttp may write it again on another connection."""

    _autoclose = True

    def __init__(self, parts: Sequence[Buffer], moved: Callable[[], None]) -> None:
        """``moved`` is called whenever some of it has gone to the kernel."""
        super().__init__(parts)
        self._size = sum(map(len, parts))
        self._moved = moved

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("not a text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        for part in self._value:
            view = memoryview(part)
            for start in range(0, len(view), _SENT):
                await writer.write(view[start : start + _SENT])
                self._moved()


def _trusting(ca_bundle: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_bundle)
    except OSError as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        text = f"cannot read the certificates in {ca_bundle} ({reason}): give a file with certificates in PEM form"
        raise StoreError(errno.EINVAL, text) from error


async def checksum_of(parts: Sequence[Buffer], size: int) -> str:
    """As ``x-amz-checksum-crc32c`` has it: base64 of the big-endian CRC-32C."""
    if size <= _INLINE_MAX:
        return _checksum(parts)
    return await asyncio.to_thread(_checksum, parts)


def _checksum(parts: Sequence[Buffer]) -> str:
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part if isinstance(part, bytes) else bytes(part))
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _with_query(url: str, query: Mapping[str, str] | None) -> str:
    return f"{url}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}" if query else url


def _success(response: Response) -> Response:
    if response.status >= 300:
        raise AnswerError(_read_error(response.status, response.headers, response.body))
    return response


async def _read_part(stream: aiohttp.StreamReader, limit: int, moved: Callable[[], None]) -> bytes:
    found = bytearray()
    while len(found) < limit and (more := await stream.read(limit - len(found))):
        found += more
        moved()
    return bytes(found)


def _read_error(status: int, headers: Mapping[str, str], body: bytes | memoryview) -> Answer:
    fields: dict[str, str] = {}
    try:
        root = ElementTree.fromstring(bytes(body))
        fields = {child.tag.rpartition("}")[2]: child.text or "" for child in root}
    except ElementTree.ParseError:
        pass  # of HEAD, or of something on the way that is no S3 server: the status tells enough
    return Answer(status, fields.get("Code", ""), fields.get("Message", ""), headers, fields.get("Region"))


def _host_header(parts: urllib.parse.SplitResult) -> str:
    """Without the port that goes with the scheme, as it is signed."""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    return host if parts.port in (None, _PORTS[parts.scheme]) else f"{host}:{parts.port}"


def _proxy_for(parts: urllib.parse.SplitResult) -> str | None:
    """The HTTP proxy that the environment names for the server (``https_proxy``, ``no_proxy`` …)."""
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)
