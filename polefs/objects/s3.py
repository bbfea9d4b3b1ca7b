"""An object store in a bucket of AWS S3 or of a compatible server.

A key is written once. Where the server has conditional PUTs it refuses a second one, so a late writer cannot overwrite
anything; where it has not, whoever writes a key again writes the same bytes. Each operation has one deadline, in which
it is tried again with growing, random pauses when the server cannot serve it or the connection breaks.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import google_crc32c
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from polefs.objects.base import UNLIMITED, ObjectInfo, Space
from polefs.objects.location import S3Location
from polefs.objects.s3errors import StoreError, explain, is_transient

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

log = logging.getLogger(__name__)

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

DEADLINE: Final = 60.0
"""Of an operation, seconds; transfers have a second more for each 64 KiB."""

_RATE_MIN: Final = 64 << 10
"""Bytes a second; what is slower than this is given up."""

_CONNECT_SECONDS: Final = 5.0
_SILENCE_SECONDS: Final = 15.0
"""Without a byte from the server; then the connection is given up and another one tried."""

_PAUSE_MAX: Final = 5.0
"""Between two attempts, seconds."""

_DELETE_MAX: Final = 1000
"""Keys in one request (S3 DeleteObjects)."""


class S3Store:
    """``ObjectStore`` over a prefix of a bucket. Failures that waiting cannot mend are raised at once, all others when
    the deadline has passed, with the last reason: FileNotFoundError, FileExistsError, else ``StoreError``."""

    def __init__(self, location: S3Location, client: S3Client, resources: contextlib.AsyncExitStack, deadline: float):
        """For ``open``."""
        self.location = location
        self.deadline = deadline
        self._client = client
        self._resources = resources
        self._troubled = False
        self._retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=0.1, max=_PAUSE_MAX),
            before_sleep=self._note_trouble,
            reraise=True,
        )

    @classmethod
    async def open(cls, location: S3Location, *, deadline: float = DEADLINE, connections: int = 64) -> S3Store:
        """Connect with the credentials of the standard chain (environment, profile, instance role …). Loads botocore's
        models, which takes some tenths of a second: before anything is served. Asks the server nothing. OSError when
        there are no credentials, or the settings make no sense."""
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        styles = {None: "auto", True: "path", False: "virtual"}
        config = AioConfig(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_SILENCE_SECONDS,
            max_pool_connections=connections,
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": styles[location.path_style]},
        )
        async with contextlib.AsyncExitStack() as resources:
            try:
                client = await resources.enter_async_context(
                    get_session().create_client(
                        "s3",
                        region_name=location.region,
                        endpoint_url=location.endpoint,
                        verify=location.ca_bundle,
                        config=config,
                    )
                )
            except Exception as error:
                raise explain(error, location.url) from error
            return cls(location, client, resources.pop_all(), deadline)
        raise AssertionError

    async def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """When the key exists with the same bytes, that is a success: an earlier attempt's answer was lost.
        FileExistsError when it holds others, and the server tells."""
        body = b"".join(parts)
        checksum = _checksum(body)
        conditions = {"IfNoneMatch": "*"} if self.location.conditional_put else {}

        async def attempt() -> None:
            try:
                await self._client.put_object(
                    Bucket=self.location.bucket,
                    Key=self.location.key(key),
                    Body=body,
                    ChecksumCRC32C=checksum,
                    **conditions,  # type: ignore[arg-type]
                )
            except self._client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412 or not await self._holds(
                    key, body, checksum
                ):
                    raise

        await self._operate(attempt, key, len(body))

    async def adopt(self, key: str, path: str) -> bool:
        return False

    async def get(self, key: str, offset: int, length: int) -> bytes:
        if not length:
            return b""

        async def attempt() -> bytes:
            answer = await self._client.get_object(
                Bucket=self.location.bucket,
                Key=self.location.key(key),
                Range=f"bytes={offset}-{offset + length - 1}",
            )
            async with answer["Body"] as body:
                data: bytes = await body.read()
            return data

        data = await self._operate(attempt, key, length)
        if len(data) != length:
            raise StoreError(errno.EIO, f"{self._url(key)}: the object is shorter than its metadata says")
        return data

    def get_now(self, key: str, offset: int, length: int) -> None:
        return None

    async def delete(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), _DELETE_MAX):
            await self._delete(keys[first : first + _DELETE_MAX])

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        start = self.location.key("")
        token: str | None = None
        while True:
            following = {"ContinuationToken": token} if token is not None else {}

            async def attempt(following: dict[str, str] = following) -> tuple[list[ObjectInfo], str | None]:
                page = await self._client.list_objects_v2(
                    Bucket=self.location.bucket,
                    Prefix=start + prefix,
                    **following,  # type: ignore[arg-type]
                )
                found = [
                    ObjectInfo(each["Key"][len(start) :], each["Size"])
                    for each in page.get("Contents", ())
                    if each["Key"].startswith(start)
                ]
                return found, page.get("NextContinuationToken")

            found, token = await self._operate(attempt, prefix)
            for info in found:
                yield info
            if token is None:
                return

    async def space(self) -> Space:
        return UNLIMITED

    async def close(self) -> None:
        await self._resources.aclose()

    async def _delete(self, keys: Sequence[str]) -> None:
        async def attempt() -> None:
            answer = await self._client.delete_objects(
                Bucket=self.location.bucket,
                Delete={"Objects": [{"Key": self.location.key(key)} for key in keys], "Quiet": True},
            )
            for failed in answer.get("Errors", ()):
                if failed.get("Code") != "NoSuchKey":
                    text = f"{self._url(failed.get('Key', ''))}: {failed.get('Code')} ({failed.get('Message')})"
                    raise StoreError(errno.EIO, f"cannot delete {text}", transient=True)

        await self._operate(attempt, keys[0])

    async def _holds(self, key: str, body: bytes, checksum: str) -> bool:
        """Whether the object that is there already is the one that we wanted to write."""
        found = await self._client.head_object(
            Bucket=self.location.bucket, Key=self.location.key(key), ChecksumMode="ENABLED"
        )
        if found["ContentLength"] != len(body):
            return False
        there = found.get("ChecksumCRC32C")
        return there == checksum if there is not None else await self.get(key, 0, len(body)) == body

    async def _operate(self, attempt: Callable[[], Awaitable[T]], key: str, size: int = 0) -> T:
        """Try until it works or the deadline has passed."""
        patience = self.deadline + size / _RATE_MIN
        last: OSError | None = None

        async def explained() -> T:
            nonlocal last
            try:
                return await attempt()
            except Exception as error:
                last = explain(error, self._url(key))
                raise last from error

        try:
            async with asyncio.timeout(patience):
                result: T = await self._retrying(explained)
        except TimeoutError:
            raise last or StoreError(
                errno.ETIMEDOUT, f"{self._url(key)}: no answer in {patience:.0f} s: check the network and --endpoint"
            ) from None
        if self._troubled:
            self._troubled = False
            log.warning("%s serves again", self.location.url)
        return result

    def _note_trouble(self, state: RetryCallState) -> None:
        if not self._troubled and state.outcome is not None:
            self._troubled = True
            log.warning("%s: trying again", state.outcome.exception())

    def _url(self, key: str) -> str:
        return f"{self.location.url}/{key}" if key else self.location.url


def _checksum(body: bytes) -> str:
    """As ``x-amz-checksum-crc32c`` has it: base64 of the big-endian CRC32C."""
    return base64.b64encode(google_crc32c.value(body).to_bytes(4, "big")).decode()
