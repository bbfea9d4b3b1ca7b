"""An object store in a bucket of AWS S3 or of a compatible server.

A key is written once. Where the server has conditional PUTs it refuses a second one, so a late writer cannot overwrite
anything; where it has not, whoever writes a key again writes the same bytes. Each operation has one deadline, in which
it is tried again with growing, random pauses when the server cannot serve it or the connection breaks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from polefs.objects.base import UNLIMITED, ObjectInfo, Space, StoreError, Upload
from polefs.objects.location import S3Location
from polefs.objects.s3connections import CONNECT_SECONDS, SILENCE_SECONDS
from polefs.objects.s3delete import Deleter
from polefs.objects.s3errors import AnswerError, explain
from polefs.objects.s3http import Buffer, DataPlane, checksum_of
from polefs.objects.s3list import Lister
from polefs.objects.s3multipart import MULTIPART_ABOVE, PART_SIZE, MultipartPut
from polefs.objects.s3operate import DEADLINE, Operator

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client


class S3Store:
    """``ObjectStore`` over a prefix of a bucket. Failures that waiting cannot mend are raised at once, all others when
    the deadline has passed, with the last reason: FileNotFoundError, FileExistsError, else ``StoreError``."""

    def __init__(
        self,
        location: S3Location,
        client: S3Client,
        plane: DataPlane,
        resources: contextlib.AsyncExitStack,
        deadline: float,
    ) -> None:
        """For ``open``."""
        self.location = location
        self.plane = plane
        self._client = client
        self._resources = resources
        self._operator = Operator(location.url, deadline)
        self._lister = Lister(location, plane, self._operator, self.url)
        self._deleter = Deleter(location, plane, self._operator, self.url)
        self.before_use: Callable[[], Awaitable[None]] | None = None
        """Called before objects are read, written, listed or deleted, until it has once returned; what it raises is
        raised."""

    @property
    def deadline(self) -> float:
        """Seconds, after which an operation makes no further attempt."""
        return self._operator.deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self._operator.deadline = seconds

    def hurry(self, seconds: float) -> None:
        self._operator.hurry(seconds)
        if self.away_since is not None:
            self.plane.limit_silence(seconds)

    @property
    def away_since(self) -> float | None:
        return self._operator.away_since

    async def _use(self) -> None:
        if self.before_use is not None:
            await self.before_use()
            self.before_use = None

    @classmethod
    async def open(cls, location: S3Location, *, deadline: float = DEADLINE, connections: int = 64) -> S3Store:
        """Find the credentials of the standard chain (environment, profile, instance role …) and the address. Loads
        botocore's models, which takes some tenths of a second: before anything is served. Asks the server nothing.
        OSError when there are no credentials, or the settings make no sense."""
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        # Not "auto": presigned addresses on AWS, from which ours are taken, would then be in no region.
        path_style = location.endpoint is not None if location.path_style is None else location.path_style
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=SILENCE_SECONDS,
            retries={"total_max_attempts": 1},
            signature_version="s3v4",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if path_style else "virtual", "payload_signing_enabled": False},
        )
        async with contextlib.AsyncExitStack() as resources:
            try:
                session = get_session()
                ca_bundle = (
                    location.ca_bundle
                    or session.get_config_variable("ca_bundle")
                    or ssl.get_default_verify_paths().cafile  # botocore would take its own
                )
                client = await resources.enter_async_context(
                    session.create_client(
                        "s3",
                        region_name=location.region or os.environ.get("AWS_REGION"),  # botocore has another name
                        endpoint_url=location.endpoint,
                        verify=ca_bundle,
                        config=config,
                    )
                )
                credentials = await session.get_credentials()
                plane = await DataPlane.open(client, credentials, location.bucket, ca_bundle, connections)
                resources.push_async_callback(plane.close)
            except Exception as error:
                raise explain(error, location.url) from error
            return cls(location, client, plane, resources.pop_all(), deadline)
        raise AssertionError

    async def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """When the key exists with the same bytes, that is a success: an earlier attempt's answer was lost.
        FileExistsError when it holds others, and the server tells."""
        await self._use()
        size = sum(map(len, parts))
        send = self._put_in_parts if size > MULTIPART_ABOVE else self._put
        if not await send(key, parts, size, conditional=self.location.conditional_put):
            await self._compare(key, parts, size)

    async def create(self, key: str, body: bytes) -> bool:
        """A conditional PUT: False when the key exists, and nothing has been written."""
        return await self._put(key, [body], len(body), conditional=True)

    async def probe_conditional_put(self, key: str, body: bytes) -> bool:
        """Write an object, and find out whether the server then refuses to write it again."""
        try:
            await self.create(key, body)
        except StoreError as error:
            # A server that does not know the header either passes over it or refuses the request.
            if error.errno not in (errno.EOPNOTSUPP, errno.EIO) or error.transient:
                raise
            await self._put(key, [body], len(body), conditional=False)
            return False
        return not await self.create(key, body)

    def multipart(self, key: str) -> MultipartPut:
        """What ``put`` does with large objects."""
        name = self.location.key(key)
        return MultipartPut(self._client, self.plane, self._operator, self.location.bucket, name, self.url(key))

    async def adopt(self, key: str, path: str) -> bool:
        return False

    async def get(self, key: str, offset: int, length: int) -> bytes | memoryview:
        if not length:
            return b""
        await self._use()
        name = self.location.key(key)

        async def attempt() -> bytes | memoryview:
            answer = await self.plane.get(name, offset, length)
            if answer.status != 206:
                raise StoreError(errno.EOPNOTSUPP, f"{self.url(key)}: the server does not know ranged GETs")
            return answer.body

        data = await self._operator.run(attempt, self.url(key), length)
        if len(data) != length:
            raise StoreError(errno.EIO, f"{self.url(key)}: the object is shorter than its metadata says")
        return data

    def get_now(self, key: str, offset: int, length: int) -> None:
        return None

    async def read(self, key: str, limit: int) -> bytes | memoryview:
        """The whole object, or its first ``limit`` bytes."""
        name = self.location.key(key)

        async def attempt() -> bytes | memoryview:
            return (await self.plane.request("GET", name, {}, limit=limit)).body

        return await self._operator.run(attempt, self.url(key), limit)

    async def delete(self, keys: Sequence[str]) -> None:
        await self._use()
        await self._deleter.delete(keys)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        await self._use()
        async for info in self._lister.objects(prefix):
            yield info

    async def uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        await self._use()
        async for upload in self._lister.uploads(prefix):
            yield upload

    async def abort(self, upload: Upload) -> None:
        await self._use()

        async def attempt() -> None:
            try:
                await self.plane.request("DELETE", self.location.key(upload.key), {}, query={"uploadId": upload.id})
            except AnswerError as error:
                if error.answer.status != 404:
                    raise

        await self._operator.run(attempt, self.url(upload.key))

    async def space(self) -> Space:
        return UNLIMITED

    async def close(self) -> None:
        await self._resources.aclose()

    async def _put(self, key: str, parts: Sequence[Buffer], size: int, *, conditional: bool) -> bool:
        """False when the key exists and the server has therefore written nothing."""
        name = self.location.key(key)
        headers = {"Content-Length": str(size), "x-amz-checksum-crc32c": await checksum_of(parts, size)}
        if conditional:
            headers["If-None-Match"] = "*"

        async def attempt() -> bool:
            try:
                await self.plane.put(name, headers, parts)
            except AnswerError as error:
                if error.answer.status != 412:
                    raise
                return False
            return True

        return await self._operator.run(attempt, self.url(key), size)

    async def _put_in_parts(self, key: str, parts: Sequence[Buffer], size: int, *, conditional: bool) -> bool:
        return await self.multipart(key).put(parts, size, conditional=conditional, part_size=PART_SIZE)

    async def _compare(self, key: str, parts: Sequence[Buffer], size: int) -> None:
        """FileExistsError when the object that is there is not the one that we wanted to write."""
        name = self.location.key(key)
        checksum = await checksum_of(parts, size)

        async def attempt() -> bool:
            found = await self.plane.request("HEAD", name, {"x-amz-checksum-mode": "ENABLED"})
            if int(found.headers.get("Content-Length", -1)) != size:
                return False
            there = found.headers.get("x-amz-checksum-crc32c")
            # That of an object in parts is one of their checksums, and their number.
            if there is not None and "-" not in there:
                return there == checksum
            return await checksum_of([await self.get(key, 0, size)], size) == checksum

        if not await self._operator.run(attempt, self.url(key), size):
            raise FileExistsError(errno.EEXIST, f"{self.url(key)}: there is another object with this key")

    def url(self, key: str) -> str:
        """Of an object, or of the store (``""``), for people."""
        return f"{self.location.url}/{key}" if key else self.location.url
