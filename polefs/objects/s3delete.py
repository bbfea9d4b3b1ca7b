"""Deleting objects: a thousand in one request, or one by one where the server does not know how."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from polefs.objects.base import StoreError
from polefs.objects.location import S3Location
from polefs.objects.s3errors import AnswerError
from polefs.objects.s3http import DataPlane
from polefs.objects.s3operate import Operator

log = logging.getLogger(__name__)

_BATCH: Final = 1000
"""Keys in one request, the most of S3 (DeleteObjects)."""

_SINGLE_AT_ONCE: Final = 16
_ANSWER_MAX: Final = 4 << 20


class Deleter:
    """Of the store at ``location``. ``url`` makes addresses for people."""

    def __init__(self, location: S3Location, plane: DataPlane, operator: Operator, url: Callable[[str], str]) -> None:
        self._location = location
        self._plane = plane
        self._operator = operator
        self._url = url
        self._singly = False
        """The server does not know how to delete many at once."""

    async def delete(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), _BATCH):
            batch = keys[first : first + _BATCH]
            if self._singly or not await self._operator.run(partial(self._many, batch), self._url(batch[0])):
                await self._one_by_one(batch)

    async def _many(self, keys: Sequence[str]) -> bool:
        """False when the server does not know this request."""
        objects = "".join(f"<Object><Key>{escape(self._location.key(key))}</Key></Object>" for key in keys)
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        body = f'<Delete xmlns="{namespace}"><Quiet>true</Quiet>{objects}</Delete>'.encode()
        # The one checksum that all servers take here, and AWS wants some.
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        headers = {
            "Content-Length": str(len(body)),
            "Content-MD5": base64.b64encode(digest).decode(),
            "Content-Type": "application/xml",
        }
        try:
            answer = await self._plane.request(
                "POST", "", headers, query={"delete": ""}, body=[body], limit=_ANSWER_MAX
            )
        except AnswerError as error:
            if error.answer.status not in (405, 501):
                raise
            log.info("%s: the server deletes objects only one by one", self._url(""))
            self._singly = True
            return False
        self._check(await asyncio.to_thread(_failures, answer.body) if answer.body else [])
        return True

    def _check(self, failures: Sequence[tuple[str, str, str]]) -> None:
        for key, code, message in failures:
            if code not in ("NoSuchKey", "NoSuchVersion"):
                name = key.removeprefix(self._location.key(""))
                if code == "AccessDenied":
                    text = f"{self._url(name)}: no permission: allow the key s3:DeleteObject"
                    raise StoreError(errno.EACCES, text)
                text = f"cannot delete {self._url(name)}: {code} ({message})"
                raise StoreError(errno.EIO, text, transient=True)

    async def _one_by_one(self, keys: Sequence[str]) -> None:
        left = iter(keys)

        async def work() -> None:
            for key in left:
                await self._one(key)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(_SINGLE_AT_ONCE, len(keys))):
                    tasks.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _one(self, key: str) -> None:
        async def attempt() -> None:
            await self._plane.request("DELETE", self._location.key(key), {})

        with contextlib.suppress(FileNotFoundError):
            await self._operator.run(attempt, self._url(key))


def _failures(body: bytes | memoryview) -> list[tuple[str, str, str]]:
    """``(key, code, message)`` of what has not been deleted."""
    try:
        root = ElementTree.fromstring(bytes(body))
    except ElementTree.ParseError as error:
        raise StoreError(errno.EPROTO, f"the answer to a deletion is no XML ({error})", transient=True) from None
    return [
        tuple(each.findtext(f"{{*}}{tag}") or "" for tag in ("Key", "Code", "Message"))  # type: ignore[misc]
        for each in root.iterfind("{*}Error")
    ]
