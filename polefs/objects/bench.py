"""Measuring an S3 server, and finding out whether a volume can live there."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Literal

import msgspec

from polefs.objects.base import ObjectInfo
from polefs.objects.location import S3Location
from polefs.objects.s3 import S3Store
from polefs.objects.s3errors import AnswerError

Method = Literal["PUT", "GET"]
METHODS: Final[tuple[Method, ...]] = ("PUT", "GET")

LATENCY_SIZE: Final = 4 << 10
SIZES: Final = (64 << 10, 1 << 20, 4 << 20, 16 << 20)
"""Of objects whose throughput is measured, bytes."""

CONCURRENCIES: Final = (1, 4, 16)
_IN_FLIGHT_MAX: Final = 128 << 20
"""Bytes; what would have more under way is not measured."""

_DEADLINE: Final = 10.0
"""Of a request, seconds; large ones have more."""

_WRITERS: Final = 8
_LISTED: Final = 40
_SKEW_MAX: Final = 60.0
"""Seconds; S3 refuses requests at 15 minutes."""

_MULTIPART_SIZE: Final = (5 << 20) + 1
"""Two parts, the first as small as S3 takes it."""


class Latency(msgspec.Struct, frozen=True):
    """Of requests for 4 KiB one after another, milliseconds."""

    method: Method
    p50: float
    p90: float
    p99: float


class Throughput(msgspec.Struct, frozen=True):
    """``concurrency`` requests for whole objects at once."""

    method: Method
    size: int
    concurrency: int
    per_second: float
    bytes_per_second: float


class Check(msgspec.Struct, frozen=True):
    """Something that a server does or does not. ``essential``: without it there can be no volume. ``text`` tells what
    was seen, or what is lost without it."""

    name: str
    passed: bool
    essential: bool
    text: str = ""


class Report(msgspec.Struct):
    url: str
    endpoint: str
    checks: list[Check] = []
    latencies: list[Latency] = []
    throughputs: list[Throughput] = []

    @property
    def usable(self) -> bool:
        return all(check.passed or not check.essential for check in self.checks)

    @property
    def missing(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


async def run(location: S3Location, seconds: float, say: Callable[[str], None]) -> Report:
    """Check and measure under a prefix of its own, which is empty again at the end; each figure takes ``seconds``.
    ``say`` is told what is being done. OSError when the server cannot be reached at all."""
    prefix = f"objbench-{secrets.token_hex(4)}"
    place = msgspec.structs.replace(location, prefix=location.key(prefix), conditional_put=False)
    store = await S3Store.open(place, deadline=_DEADLINE)
    bench = _Bench(store, seconds, say)
    try:
        try:
            await bench.check()
            if bench.report.usable:
                await bench.measure()
        finally:
            if bench.report.checks:
                say("cleaning up")
                await store.delete([info.key async for info in store.list()])
    finally:
        await store.close()
    return bench.report


class _Bench:
    def __init__(self, store: S3Store, seconds: float, say: Callable[[str], None]) -> None:
        self._store = store
        self._seconds = seconds
        self._say = say
        self._names = (f"object-{number}" for number in itertools.count())
        self.report = Report(store.location.url, store.plane.server)

    # Checks

    async def check(self) -> None:
        checks: Sequence[tuple[str, bool, Callable[[], Awaitable[str]]]] = (
            ("what is written can be read at once", True, self._read_after_write),
            ("ranged GETs", True, self._ranges),
            ("lists are complete and up to date", True, self._lists),
            ("deleting many at once", True, self._deletion),
            ("conditional PUTs", False, self._conditional_put),
            ("damaged uploads are refused", False, self._checksums),
            ("uploads in parts", False, self._multipart),
            ("lists are ordered by byte", False, self._order),
            ("the clocks agree", False, self._clock),
        )
        for name, essential, check in checks:
            self._say(name)
            try:
                problem = await check()
            except _Missing as error:
                problem = str(error)
            except OSError as error:
                if not self.report.checks:
                    raise  # nothing works: the reason is no finding about the server
                problem = error.strerror or str(error)
            self.report.checks.append(Check(name, not problem, essential, problem))

    async def _read_after_write(self) -> str:
        for size in (0, 1, LATENCY_SIZE, 300_000):
            name, body = next(self._names), os.urandom(size)
            await self._store.put(name, [body])
            _require(await self._store.read(name, 1 << 20) == body, f"an object of {size} bytes came back different")
        try:
            await self._store.get(next(self._names), 0, 1)
        except FileNotFoundError:
            return ""
        return "an object that was never written can be read"

    async def _ranges(self) -> str:
        name, body = next(self._names), os.urandom(100_000)
        await self._store.put(name, [body])
        for offset, length in ((0, 1), (1, 4096), (50_000, 50_000), (99_999, 1)):
            found = await self._store.get(name, offset, length)
            _require(found == body[offset : offset + length], f"wrong bytes for {length} at {offset}")
        return ""

    async def _lists(self) -> str:
        keys = {f"list/{number:03}" for number in range(_LISTED)}
        await asyncio.gather(*(self._store.put(key, [b"x"]) for key in keys))
        _require(await _keys(self._store.list("list/")) == keys, "objects just written are missing in a list")
        gone = {key for key in keys if key.endswith("0")}
        await self._store.delete(sorted(gone))
        _require(await _keys(self._store.list("list/")) == keys - gone, "objects just deleted are still in a list")
        _require(await _keys(self._store.list("list/00")) == {key for key in keys - gone if "/00" in key}, "by prefix")
        return ""

    async def _deletion(self) -> str:
        keys = sorted(await _keys(self._store.list("list/")))
        await self._store.delete([*keys, "list/never-written"])
        _require(not await _keys(self._store.list("list/")), "deleted objects are still there")
        return ""

    async def _conditional_put(self) -> str:
        name = next(self._names)
        bodies = [os.urandom(LATENCY_SIZE) for _ in range(_WRITERS)]
        won = await asyncio.gather(*(self._store.create(name, body) for body in bodies))
        if sum(won) == 1:
            _require(await self._store.read(name, LATENCY_SIZE) == bodies[won.index(True)], "the object is a loser's")
            return ""
        return f"{sum(won)} of {_WRITERS} racing writers won: a late writer can overwrite what another has written"

    async def _checksums(self) -> str:
        name = self._store.location.key(next(self._names))
        headers = {"Content-Length": "5", "x-amz-checksum-crc32c": "AAAAAA=="}
        try:
            await self._store.plane.put(name, headers, [b"wrong"])
        except AnswerError as error:
            return "" if error.answer.status == 400 else f"refused with status {error.answer.status}"
        return "a wrong CRC-32C is accepted: bytes damaged on the way up are found only when they are read"

    async def _multipart(self) -> str:
        name, body = next(self._names), os.urandom(_MULTIPART_SIZE)
        upload = self._store.multipart(name)
        await upload.put([body], len(body), conditional=False, part_size=_MULTIPART_SIZE - 1)
        _require(await self._store.read(name, len(body)) == body, "the object came back different")
        return ""

    async def _order(self) -> str:
        keys = sorted(["order/a", "order/a-b", "order/a.b", "order/a/b", "order/a0", "order/b"])
        await asyncio.gather(*(self._store.put(key, [b"x"]) for key in keys))
        found = [info.key async for info in self._store.list("order/")]
        return "" if found == keys else f"listed as {', '.join(found)}; polefs does not need it"

    async def _clock(self) -> str:
        name = next(self._names)
        await self._store.put(name, [b"x"])
        answer = await self._store.plane.request("HEAD", self._store.location.key(name), {})
        there = parsedate_to_datetime(answer.headers["Date"])
        skew = (datetime.now(UTC) - there).total_seconds()
        if abs(skew) <= _SKEW_MAX:
            return ""
        return f"this machine is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}: set its clock"

    # Figures

    async def measure(self) -> None:
        for method in METHODS:
            self._say(f"latency of {method}")
            self.report.latencies.append(await self._latency(method))
        for size, concurrency in itertools.product(SIZES, CONCURRENCIES):
            if size * concurrency <= _IN_FLIGHT_MAX:
                for method in METHODS:
                    self._say(f"{method} of {size >> 10} KiB, {concurrency} at once")
                    self.report.throughputs.append(await self._throughput(method, size, concurrency))

    async def _latency(self, method: Method) -> Latency:
        times: list[float] = []

        async def timed(work: Awaitable[object]) -> None:
            start = time.perf_counter()
            await work
            times.append((time.perf_counter() - start) * 1000)

        operation = await self._operation(method, LATENCY_SIZE)
        await operation()
        ends = time.perf_counter() + 2 * self._seconds
        while len(times) < 2 or time.perf_counter() < ends:
            await timed(operation())
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        return Latency(method, *(round(cuts[percent - 1], 3) for percent in (50, 90, 99)))

    async def _throughput(self, method: Method, size: int, concurrency: int) -> Throughput:
        operation = await self._operation(method, size)
        start = time.perf_counter()

        async def work() -> int:
            done = 0
            while not done or time.perf_counter() - start < self._seconds:
                await operation()
                done += 1
            return done

        done = sum(await asyncio.gather(*(work() for _ in range(concurrency))))
        elapsed = time.perf_counter() - start
        return Throughput(method, size, concurrency, round(done / elapsed, 1), round(done * size / elapsed))

    async def _operation(self, method: Method, size: int) -> Callable[[], Awaitable[object]]:
        """One request, of which there may be many."""
        body = [os.urandom(size)]
        if method == "PUT":
            return lambda: self._store.put(next(self._names), body)
        name = next(self._names)
        await self._store.put(name, body)
        return lambda: self._store.get(name, 0, size)


class _Missing(Exception):
    """The server does not do what it should."""


def _require(seen: bool, otherwise: str) -> None:
    if not seen:
        raise _Missing(otherwise)


async def _keys(found: AsyncIterator[ObjectInfo]) -> set[str]:
    return {info.key async for info in found}
