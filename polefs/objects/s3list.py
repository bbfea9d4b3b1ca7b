"""What a prefix of a bucket holds: objects, and uploads in parts that have not come to an end.

Answers of a thousand entries are parsed in a thread. Ages are told by the server's own clock, that of the ``Date`` of
its answer, so it does not matter what time this machine believes that it is.
"""

from __future__ import annotations

import asyncio
import errno
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, TypeVar
from xml.etree import ElementTree

from polefs.objects.base import ObjectInfo, StoreError, Upload
from polefs.objects.location import S3Location
from polefs.objects.s3http import DataPlane
from polefs.objects.s3operate import Operator

T = TypeVar("T")

_PAGE: Final = 1000
"""Entries in one answer, the most of S3."""

_ANSWER_MAX: Final = 16 << 20
"""Bytes of an answer; more than 1000 entries with keys of 1024 bytes, all of them quoted, take."""

_INLINE_MAX: Final = 16 << 10
"""An answer up to this size, bytes, is parsed at once: that takes less than 1 ms."""

Parse = Callable[[bytes | memoryview, datetime | None], tuple[list[T], dict[str, str] | None]]
"""From an answer and its date: what is in it, and what the next request has to say; None after the last page."""


class Lister:
    """Of the store at ``location``. ``url`` makes addresses for people."""

    def __init__(self, location: S3Location, plane: DataPlane, operator: Operator, url: Callable[[str], str]) -> None:
        self._start = location.key("")
        self._plane = plane
        self._operator = operator
        self._url = url

    def objects(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        query = {"list-type": "2", "max-keys": str(_PAGE)}
        return self._pages(prefix, query, self._parse_objects)

    def uploads(self, prefix: str) -> AsyncIterator[Upload]:
        query = {"uploads": "", "max-uploads": str(_PAGE)}
        return self._pages(prefix, query, self._parse_uploads)

    async def _pages(self, prefix: str, query: Mapping[str, str], parse: Parse[T]) -> AsyncIterator[T]:
        following: dict[str, str] | None = {}
        while following is not None:
            asked = {**query, "prefix": self._start + prefix, "encoding-type": "url", **following}

            async def attempt(asked: dict[str, str] = asked) -> tuple[list[T], dict[str, str] | None]:
                answer = await self._plane.request("GET", "", {}, query=asked, limit=_ANSWER_MAX)
                date = _http_date(answer.headers.get("Date"))
                try:
                    if len(answer.body) <= _INLINE_MAX:
                        return parse(answer.body, date)
                    return await asyncio.to_thread(parse, answer.body, date)
                except (ElementTree.ParseError, ValueError) as error:
                    text = f"{self._url(prefix)}: the answer is no list ({error}): check --endpoint"
                    raise StoreError(errno.EPROTO, text, transient=True) from None

            found, following = await self._operator.run(attempt, self._url(prefix))
            for each in found:
                yield each

    def _parse_objects(
        self, body: bytes | memoryview, date: datetime | None
    ) -> tuple[list[ObjectInfo], dict[str, str] | None]:
        root = _parse(body, "ListBucketResult")
        found = []
        for each in root.iterfind("{*}Contents"):
            key = self._name(_text(each, "Key"))
            if key is not None:
                found.append(ObjectInfo(key, int(_text(each, "Size")), _age(_text(each, "LastModified"), date)))
        token = _text(root, "NextContinuationToken")
        return found, {"continuation-token": token} if token else None

    def _parse_uploads(
        self, body: bytes | memoryview, date: datetime | None
    ) -> tuple[list[Upload], dict[str, str] | None]:
        root = _parse(body, "ListMultipartUploadsResult")
        found = []
        for each in root.iterfind("{*}Upload"):
            key = self._name(_text(each, "Key"))
            if key is not None:
                found.append(Upload(key, _text(each, "UploadId"), _age(_text(each, "Initiated"), date)))
        if _text(root, "IsTruncated") != "true":
            return found, None
        marker = urllib.parse.unquote_plus(_text(root, "NextKeyMarker"))
        return found, {"key-marker": marker, "upload-id-marker": _text(root, "NextUploadIdMarker")}

    def _name(self, key: str) -> str | None:
        """The key in the store; None for what a server tells that does not know of prefixes."""
        plain = urllib.parse.unquote_plus(key)
        return plain[len(self._start) :] if plain.startswith(self._start) else None


def _parse(body: bytes | memoryview, what: str) -> ElementTree.Element:
    root = ElementTree.fromstring(bytes(body))
    if root.tag.rpartition("}")[2] != what:
        raise ValueError(f"it is a {root.tag.rpartition('}')[2]}")
    return root


def _text(element: ElementTree.Element, tag: str) -> str:
    return element.findtext(f"{{*}}{tag}") or ""


def _http_date(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text) if text else None
    except ValueError:
        return None


def _age(text: str, now: datetime | None) -> float:
    """Seconds. Of an answer without a date nothing is known to be old."""
    if now is None or not text:
        return 0.0
    modified = datetime.fromisoformat(text)
    if modified.tzinfo is None:
        modified = modified.replace(tzinfo=UTC)
    return max(0.0, (now - modified).total_seconds())
