"""Signed requests for single objects, sent with aiohttp itself.

botocore's way to a GET (parameters, endpoint rules, hooks, parsers) takes five times the CPU time of the request. So
the objects themselves travel this way: botocore says once where the bucket is, gives the credentials and signs.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

import aiohttp
import google_crc32c
import msgspec
from aiohttp.abc import AbstractStreamWriter
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import NoCredentialsError
from yarl import URL

from polefs.objects.s3errors import Answer, AnswerError

if TYPE_CHECKING:
    from aiobotocore.config import AioConfig
    from types_aiobotocore_s3.client import S3Client

Buffer = bytes | bytearray | memoryview

CONNECT_SECONDS: Final = 5.0
SILENCE_SECONDS: Final = 15.0
"""Without a byte from the server; then the connection is given up."""

_ERROR_MAX: Final = 64 << 10
"""Of an error's text, bytes."""

_READ_AHEAD: Final = 1 << 20
"""What aiohttp takes from a connection before it lets the server wait, bytes."""

_INLINE_MAX: Final = 1 << 20
"""The checksum of more bytes than this is computed in a thread."""


class Response(msgspec.Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Plane:
    """Requests for the objects of one bucket. They raise what aiohttp and botocore raise, and ``AnswerError`` for an
    answer that is no success."""

    def __init__(self, session: aiohttp.ClientSession, credentials: Any, config: AioConfig, presigned: str) -> None:
        """For ``open``. ``presigned`` is botocore's address of the object ``/``."""
        parts = urllib.parse.urlsplit(presigned)
        scope = dict(urllib.parse.parse_qsl(parts.query))["X-Amz-Credential"]
        _, _, self.region, service, _ = scope.rsplit("/", 4)
        self._base = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.removesuffix("_"), "", ""))
        self._session = session
        self._credentials = credentials
        self._signed_by: object = None
        self._signer = S3SigV4Auth(None, service, self.region)
        self._config = config

    @classmethod
    async def open(
        cls, client: S3Client, credentials: Any, config: AioConfig, bucket: str, ca_bundle: str | None, connections: int
    ) -> Plane:
        """``credentials`` are an aiobotocore session's, which renews them when they expire."""
        if credentials is None:
            raise NoCredentialsError
        presigned = await client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "_"})
        trust: ssl.SSLContext | bool = True
        if presigned.startswith("https:"):
            trust = await asyncio.to_thread(ssl.create_default_context, cafile=ca_bundle)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=trust),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS),
            proxy=_proxy_for(presigned),
            auto_decompress=False,
            read_bufsize=_READ_AHEAD,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        return cls(session, credentials, config, presigned)

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
        url = (
            self._base + urllib.parse.quote(key, safe="/-._~") + (f"?{urllib.parse.urlencode(query)}" if query else "")
        )
        signed = await self._sign(method, url, headers)
        data = None if body is None else _Body(body)
        async with self._session.request(method, URL(url, encoded=True), headers=signed, data=data) as response:
            if response.status >= 300:
                raise AnswerError(_read_error(response, await response.content.read(_ERROR_MAX)))
            length = response.content_length
            if length is not None and length <= limit:
                content = await response.read()
            else:
                content = await _read_part(response.content, limit)
            return Response(response.status, response.headers, content)

    async def close(self) -> None:
        await self._session.close()

    async def _sign(self, method: str, url: str, headers: Mapping[str, str]) -> dict[str, str]:
        credentials = await self._credentials.get_frozen_credentials()
        if credentials is not self._signed_by:
            self._signed_by = self._signer.credentials = credentials
        request = AWSRequest(method, url, headers=headers)
        # It says that the body is not hashed: its CRC is a signed header.
        request.context["client_config"] = self._config
        self._signer.add_auth(request)
        return dict(request.headers.items())


class _Body(aiohttp.Payload):
    """Buffers one after another, without joining them; aiohttp may write it again on another connection."""

    _autoclose = True

    def __init__(self, parts: Sequence[Buffer]) -> None:
        super().__init__(parts)
        self._size = sum(map(len, parts))

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("not a text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        for part in self._value:
            await writer.write(part)


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


async def _read_part(stream: aiohttp.StreamReader, limit: int) -> bytes:
    found = bytearray()
    while len(found) < limit and (more := await stream.read(limit - len(found))):
        found += more
    return bytes(found)


def _read_error(response: aiohttp.ClientResponse, body: bytes) -> Answer:
    fields: dict[str, str] = {}
    try:
        root = ElementTree.fromstring(body)
        fields = {child.tag.rpartition("}")[2]: child.text or "" for child in root}
    except ElementTree.ParseError:
        pass  # of HEAD, or of something on the way that is no S3 server: the status tells enough
    return Answer(
        response.status, fields.get("Code", ""), fields.get("Message", ""), response.headers, fields.get("Region")
    )


def _proxy_for(url: str) -> str | None:
    """The HTTP proxy that the environment names for the server (``https_proxy``, ``no_proxy`` …)."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)
