"""Objects that are too large for one PUT: their parts travel in parallel, and the object appears when all are there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from botocore.exceptions import ClientError

from polefs.objects.s3http import Buffer, DataPlane, checksum_of
from polefs.objects.s3operate import Operator

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client
    from types_aiobotocore_s3.type_defs import CompletedPartTypeDef

MULTIPART_ABOVE: Final = 64 << 20
"""Larger objects are sent in parts, bytes."""

PART_SIZE: Final = 16 << 20
"""Of all parts but the last, unless there would be too many, bytes."""

_PARTS_MAX: Final = 10_000
"""Of S3."""
_PARALLEL: Final = 4
_ABORT_SECONDS: Final = 10.0


class MultipartPut:
    """One object, ``name`` in ``bucket``; ``url`` is it for people."""

    def __init__(
        self, client: S3Client, plane: DataPlane, operator: Operator, bucket: str, name: str, url: str
    ) -> None:
        self._client = client
        self._plane = plane
        self._operator = operator
        self._bucket = bucket
        self._name = name
        self._url = url
        self._upload = ""

    async def put(self, parts: Sequence[Buffer], size: int, *, conditional: bool, part_size: int) -> bool:
        """False when there is an object with this key; maybe ours, when the answer to an earlier attempt was lost.
        An upload that does not become the object is aborted, so that the server gives its parts back."""
        self._upload = await self._operator.run(self._create, self._url)
        completed = False
        try:
            done = await self._send(parts, max(part_size, -(-size // _PARTS_MAX)))
            completed = await self._complete(done, conditional=conditional)
        finally:
            if not completed:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(_ABORT_SECONDS):
                        await self._operator.run(self._abort, self._url)
        return completed

    async def _create(self) -> str:
        answer = await self._client.create_multipart_upload(
            Bucket=self._bucket, Key=self._name, ChecksumAlgorithm="CRC32C"
        )
        return answer["UploadId"]

    async def _send(self, parts: Sequence[Buffer], part_size: int) -> list[CompletedPartTypeDef]:
        room = asyncio.Semaphore(_PARALLEL)

        async def send(number: int, piece: list[memoryview]) -> CompletedPartTypeDef:
            async with room:
                return await self._send_part(number, piece)

        pieces = enumerate(_split(parts, part_size), start=1)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(send(number, piece)) for number, piece in pieces]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _send_part(self, number: int, piece: list[memoryview]) -> CompletedPartTypeDef:
        length = sum(map(len, piece))
        checksum = await checksum_of(piece, length)
        headers = {"Content-Length": str(length), "x-amz-checksum-crc32c": checksum}
        query = {"partNumber": str(number), "uploadId": self._upload}

        async def attempt() -> str:
            answer = await self._plane.put(self._name, headers, piece, query)
            return answer.headers["etag"]

        etag = await self._operator.run(attempt, self._url, length)
        return {"PartNumber": number, "ETag": etag, "ChecksumCRC32C": checksum}

    async def _complete(self, done: list[CompletedPartTypeDef], *, conditional: bool) -> bool:
        condition = {"IfNoneMatch": "*"} if conditional else {}

        async def attempt() -> bool:
            try:
                await self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._name,
                    UploadId=self._upload,
                    MultipartUpload={"Parts": done},
                    **condition,  # type: ignore[arg-type]
                )
            except ClientError as error:
                # No such upload: it has been completed, and the answer was lost.
                if error.response["Error"]["Code"] not in ("PreconditionFailed", "NoSuchUpload"):
                    raise
                return False
            return True

        return await self._operator.run(attempt, self._url)

    async def _abort(self) -> None:
        await self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._name, UploadId=self._upload)


def _split(parts: Sequence[Buffer], length: int) -> Iterator[list[memoryview]]:
    """The same bytes in pieces of ``length``, the last one shorter, without copying any."""
    piece: list[memoryview] = []
    room = length
    for part in parts:
        rest = memoryview(part)
        while rest:
            piece.append(rest[:room])
            room -= len(piece[-1])
            rest = rest[len(piece[-1]) :]
            if not room:
                yield piece
                piece, room = [], length
    if piece:
        yield piece
