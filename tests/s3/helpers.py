"""Running a piece of work on an open ``S3Store``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import uvloop

from polefs.objects.base import ObjectInfo
from polefs.objects.location import S3Location, parse_url
from polefs.objects.s3 import S3Store
from tests.s3.server import REGION, Place

T = TypeVar("T")

TEST_SECONDS = 120.0
"""After which a test of the store fails instead of hanging."""


def location_of(place: Place, **changes: Any) -> S3Location:
    found = parse_url(place.url, endpoint=place.endpoint, region=REGION, path_style=True)
    return msgspec.structs.replace(found, **changes)


def use(
    place: Place | S3Location,
    work: Callable[[S3Store], Awaitable[T]],
    *,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> T:
    """What ``work`` returns for a store that is open at ``place``, on the event loop that the daemon has."""

    async def main() -> T:
        location = location_of(place) if isinstance(place, Place) else place
        async with asyncio.timeout(TEST_SECONDS):
            store = await S3Store.open(location)
            try:
                return await work(store)
            finally:
                await store.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main())


async def all_of(found: AsyncIterator[ObjectInfo]) -> dict[str, int]:
    return {info.key: info.size async for info in found}
