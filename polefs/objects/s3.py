"""An object store in a bucket of AWS S3 or of a compatible server.

A key is written once. Where the server has conditional PUTs it refuses a second one, so a late writer cannot overwrite
anything; where it has not, whoever writes a key again writes the same bytes. Each operation has one deadline, in which
it is tried again with growing, random pauses when the server cannot serve it or the connection breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from polefs.objects.base import UNLIMITED, ObjectInfo, Space
from polefs.objects.location import S3Location
from polefs.objects.s3errors import AnswerError, StoreError, explain, is_transient
from polefs.objects.s3http import CONNECT_SECONDS, SILENCE_SECONDS, Buffer, Plane, checksum_of

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE: Final = 60.0
"""Of an operation, seconds; transfers have a second more for each 64 KiB."""

_ATTEMPT_SECONDS: Final = 20.0
"""Of one attempt, with the same addition: a connection that trickles is given up for another."""

_RATE_MIN: Final = 64 << 10
"""Bytes a second; what is slower than this is given up."""

_PAUSE_MAX: Final = 5.0
"""Between two attempts, seconds."""

_TROUBLE_SECONDS: Final = 3.0
"""Of failing, after which the log tells of it."""

_DELETE_MAX: Final = 1000
"""Keys in one request (S3 DeleteObjects)."""


class S3Store:
    """``ObjectStore`` over a prefix of a bucket. Failures that waiting cannot mend are raised at once, all others when
    the deadline has passed, with the last reason: FileNotFoundError, FileExistsError, else ``StoreError``.

    ``deadline`` may be changed at any time; it counts for operations that begin later."""

    def __init__(
        self,
        location: S3Location,
        client: S3Client,
        plane: Plane,
        resources: contextlib.AsyncExitStack,
        deadline: float,
    ) -> None:
        """For ``open``."""
        self.location = location
        self.deadline = deadline
        self._client = client
        self._plane = plane
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
        """Find the credentials of the standard chain (environment, profile, instance role …) and the address. Loads
        botocore's models, which takes some tenths of a second: before anything is served. Asks the server nothing.
        OSError when there are no credentials, or the settings make no sense."""
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        styles = {None: "auto", True: "path", False: "virtual"}
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=SILENCE_SECONDS,
            retries={"total_max_attempts": 1},
            signature_version="s3v4",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": styles[location.path_style], "payload_signing_enabled": False},
        )
        async with contextlib.AsyncExitStack() as resources:
            try:
                session = get_session()
                ca_bundle = location.ca_bundle or session.get_config_variable("ca_bundle")
                client = await resources.enter_async_context(
                    session.create_client(
                        "s3",
                        region_name=location.region,
                        endpoint_url=location.endpoint,
                        verify=ca_bundle,
                        config=config,
                    )
                )
                credentials = await session.get_credentials()
                plane = await Plane.open(client, credentials, config, location.bucket, ca_bundle, connections)
                resources.push_async_callback(plane.close)
            except Exception as error:
                raise explain(error, location.url) from error
            return cls(location, client, plane, resources.pop_all(), deadline)
        raise AssertionError

    async def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """When the key exists with the same bytes, that is a success: an earlier attempt's answer was lost.
        FileExistsError when it holds others, and the server tells."""
        size = sum(map(len, parts))
        checksum = await checksum_of(parts, size)
        if not await self._put(key, parts, size, checksum, conditional=self.location.conditional_put):
            await self._compare(key, parts, size, checksum)

    async def probe_conditional_put(self, key: str, body: bytes) -> bool:
        """Write an object, and find out whether the server then refuses to write it again."""
        parts, size, checksum = [body], len(body), await checksum_of([body], len(body))
        try:
            await self._put(key, parts, size, checksum, conditional=True)
        except StoreError as error:
            # A server that does not know the header either passes over it or refuses the request.
            if error.errno not in (errno.EOPNOTSUPP, errno.EIO) or error.transient:
                raise
            await self._put(key, parts, size, checksum, conditional=False)
            return False
        return not await self._put(key, parts, size, checksum, conditional=True)

    async def adopt(self, key: str, path: str) -> bool:
        return False

    async def get(self, key: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        name = self.location.key(key)
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}

        async def attempt() -> bytes:
            answer = await self._plane.request("GET", name, headers, limit=length)
            if answer.status != 206:
                raise StoreError(errno.EOPNOTSUPP, f"{self._url(key)}: the server does not know ranged GETs")
            return answer.body

        data = await self._operate(attempt, key, length)
        if len(data) != length:
            raise StoreError(errno.EIO, f"{self._url(key)}: the object is shorter than its metadata says")
        return data

    def get_now(self, key: str, offset: int, length: int) -> None:
        return None

    async def read(self, key: str, limit: int) -> bytes:
        """The whole object, or its first ``limit`` bytes."""
        name = self.location.key(key)

        async def attempt() -> bytes:
            return (await self._plane.request("GET", name, {}, limit=limit)).body

        return await self._operate(attempt, key, limit)

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

    async def _put(self, key: str, parts: Sequence[Buffer], size: int, checksum: str, *, conditional: bool) -> bool:
        """False when the key exists and the server has therefore written nothing."""
        name = self.location.key(key)
        headers = {"Content-Length": str(size), "x-amz-checksum-crc32c": checksum}
        if conditional:
            headers["If-None-Match"] = "*"

        async def attempt() -> bool:
            try:
                await self._plane.request("PUT", name, headers, body=parts)
            except AnswerError as error:
                if error.answer.status != 412:
                    raise
                return False
            return True

        return await self._operate(attempt, key, size)

    async def _compare(self, key: str, parts: Sequence[Buffer], size: int, checksum: str) -> None:
        """FileExistsError when the object that is there is not the one that we wanted to write."""
        name = self.location.key(key)

        async def attempt() -> bool:
            found = await self._plane.request("HEAD", name, {"x-amz-checksum-mode": "ENABLED"})
            if int(found.headers.get("Content-Length", -1)) != size:
                return False
            there = found.headers.get("x-amz-checksum-crc32c")
            if there is not None:
                return there == checksum
            return await checksum_of([await self.get(key, 0, size)], size) == checksum

        if not await self._operate(attempt, key, size):
            raise FileExistsError(errno.EEXIST, f"{self._url(key)}: there is another object with this key")

    async def _operate(self, attempt: Callable[[], Awaitable[T]], key: str, size: int = 0) -> T:
        """Try until it works or the deadline has passed."""
        extra = size / _RATE_MIN
        patience = self.deadline + extra
        last: OSError | None = None

        async def explained() -> T:
            nonlocal last
            try:
                async with asyncio.timeout(_ATTEMPT_SECONDS + extra):
                    return await attempt()
            except Exception as error:
                last = explain(error, self._url(key))
                raise last from error

        try:
            async with asyncio.timeout(patience):
                result: T = await self._retrying(explained)
        except TimeoutError:
            raise last or StoreError(
                errno.ETIMEDOUT,
                f"{self._url(key)}: no answer in {patience:.0f} s: check the network and --endpoint",
                transient=True,
            ) from None
        if self._troubled:
            self._troubled = False
            log.warning("%s serves again", self.location.url)
        return result

    def _note_trouble(self, state: RetryCallState) -> None:
        """Tell of what does not pass at once, when it begins and when it ends."""
        if state.outcome is None or self._troubled:
            return
        lasting = (state.seconds_since_start or 0) >= _TROUBLE_SECONDS
        self._troubled = lasting
        level = logging.WARNING if lasting else logging.DEBUG
        log.log(level, "%s; trying again", getattr(state.outcome.exception(), "strerror", None))

    def _url(self, key: str) -> str:
        return f"{self.location.url}/{key}" if key else self.location.url
