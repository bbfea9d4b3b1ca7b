"""Steps of the benchmark done with the object store client of polefs alone, in a bucket: what a file system on it could
reach at most. ``python -m bench.s3raw STORE-URL ENDPOINT WORKLOAD ARGUMENTS``; it talks as ``bench.client`` does."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import uvloop

from bench import client
from bench.client import KIB, MIB, Timing, go
from polefs.objects.location import parse_url
from polefs.objects.s3 import S3Store

OBJECT: Final = 16 * MIB
RANGE: Final = 4 * MIB
"""What is written, and read, in one request."""

WRITERS: Final = 4
READERS: Final = 8
SMALL: Final = 16
"""Requests at a time: for OBJECTs, for RANGEs, for small objects."""


async def _at_once(limit: int, work: Iterable[Callable[[], Awaitable[object]]]) -> None:
    waiting = iter(work)

    async def worker() -> None:
        for each in waiting:
            await each()

    async with asyncio.TaskGroup() as group:
        for _ in range(limit):
            group.create_task(worker())


async def write_big(store: S3Store, path: str, mib: int, block: int, index: int) -> Timing:
    await _remove_all(store, path)
    data = os.urandom(OBJECT)
    sizes = [min(OBJECT, mib * MIB - first) for first in range(0, mib * MIB, OBJECT)]
    start = go()
    await _at_once(
        WRITERS,
        (
            lambda number=number, size=size: store.put(f"{_key(path)}/{number}", [memoryview(data)[:size]])
            for number, size in enumerate(sizes)
        ),
    )
    return mib, start, time.monotonic()


async def read_big(store: S3Store, path: str, mib: int, index: int) -> Timing:
    ranges = [(first // OBJECT, first % OBJECT) for first in range(0, mib * MIB, RANGE)]
    start = go()
    await _at_once(
        READERS,
        (
            lambda number=number, first=first: store.get(f"{_key(path)}/{number}", first, RANGE)
            for number, first in ranges
        ),
    )
    return mib, start, time.monotonic()


async def random_read(store: S3Store, path: str, count: int, index: int) -> Timing:
    objects = [info async for info in store.list(f"{_key(path)}/")]
    offsets = random.Random(index).choices(range(sum(info.size for info in objects) // (4 * KIB)), k=count)
    start = go()
    for offset in offsets:
        number, first = divmod(offset * 4 * KIB, OBJECT)
        await store.get(f"{_key(path)}/{number}", first, 4 * KIB)
    return count, start, time.monotonic()


async def write_files(store: S3Store, directory: str, count: int, size: int, index: int, fsync: bool = False) -> Timing:
    data = os.urandom(size)
    keys = [f"{_key(directory)}/{number}" for number in range(count)]
    start = go()
    await _at_once(1 if fsync else SMALL, (lambda key=key: store.put(key, [data]) for key in keys))
    return count, start, time.monotonic()


async def read_files(store: S3Store, directory: str, count: int, size: int, index: int) -> Timing:
    keys = [f"{_key(directory)}/{number}" for number in range(count)]
    start = go()
    await _at_once(1, (lambda key=key: store.get(key, 0, size) for key in keys))
    return count, start, time.monotonic()


async def remove(store: S3Store, paths: list[str], index: int) -> Timing:
    start = go()
    for path in paths:
        await _remove_all(store, path)
    return len(paths), start, time.monotonic()


async def _remove_all(store: S3Store, path: str) -> None:
    await store.delete([info.key async for info in store.list(f"{_key(path)}/")])


async def make_directory(store: S3Store, path: str, index: int) -> Timing:
    return 1, go(), time.monotonic()


async def drop_caches(store: S3Store, settle: float, index: int) -> Timing:
    return client.drop_caches(settle, index)


WORKLOADS: Final[dict[str, Callable[..., Awaitable[Timing]]]] = {
    call.__name__: call
    for call in (write_big, read_big, random_read, write_files, read_files, remove, make_directory, drop_caches)
}


def _key(path: str) -> str:
    return path.strip("/")


async def _run(url: str, endpoint: str, workload: str, arguments: dict[str, Any]) -> Timing:
    store = await S3Store.open(parse_url(url, endpoint=endpoint))
    try:
        return await WORKLOADS[workload](store, **arguments)
    finally:
        await store.close()


def main() -> None:
    url, endpoint, workload, arguments = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        operations, start, end = runner.run(_run(url, endpoint, workload, json.loads(arguments)))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"operations": operations, "start": start, "end": end, "cpu": usage.ru_utime + usage.ru_stime}))


if __name__ == "__main__":
    main()
