"""The S3 object store while the network and the server misbehave."""

from __future__ import annotations

import asyncio
import errno
import hashlib

import msgspec
import pytest

from polefs.objects.base import StoreError
from polefs.objects.s3 import S3Store
from tests.s3.faults import Fault, FaultProxy
from tests.s3.helpers import all_of, use
from tests.s3.server import Place

BODY = hashlib.shake_256(b"body").digest(300_000)

PASSING = [
    Fault.RESET,
    Fault.LOSE_REPLY,
    Fault.INTERNAL_ERROR,
    Fault.SLOW_DOWN,
    Fault.BAD_GATEWAY,
    Fault.HALF_ANSWER,
    Fault.HALF_ANSWER_RESET,
    Fault.NONSENSE,
]
"""What is over when the same request is made again."""


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer is given up as soon as the deadline says."""
    monkeypatch.setattr("polefs.objects.s3operate._ATTEMPT_MIN", 0.1)


@pytest.fixture
def place(s3_place: Place, proxy: FaultProxy) -> Place:
    return msgspec.structs.replace(s3_place, endpoint=proxy.endpoint)


@pytest.mark.parametrize("fault", PASSING)
def test_every_operation_survives(place: Place, proxy: FaultProxy, fault: Fault) -> None:
    async def work(store: S3Store) -> None:
        proxy.inject(fault, method="PUT", times=2)
        await store.put("a/b", [BODY[:1000], BODY[1000:]])
        proxy.inject(fault, method="GET", times=2)
        assert await store.get("a/b", 1000, 200_000) == BODY[1000:201_000]
        proxy.inject(fault, method="GET", times=2)
        assert await store.read("a/b", 1 << 20) == BODY
        proxy.inject(fault, method="GET", times=2)
        assert await all_of(store.list()) == {"a/b": len(BODY)}
        proxy.inject(fault, method="POST", times=2)
        await store.delete(["a/b"])
        proxy.heal()
        assert await all_of(store.list()) == {}

    use(place, work)
    # Half of the empty answer to a PUT is all of it.
    assert proxy.tally.faults[fault] >= (8 if fault in (Fault.HALF_ANSWER, Fault.HALF_ANSWER_RESET) else 10)


@pytest.mark.parametrize("conditional", [True, False])
def test_a_lost_reply_of_a_put_that_was_done(place: Place, proxy: FaultProxy, conditional: bool) -> None:
    async def work(store: S3Store) -> None:
        store.location = msgspec.structs.replace(store.location, conditional_put=conditional)
        for times in (1, 3):
            proxy.inject(Fault.LOSE_REPLY, method="PUT", times=times)
            await store.put(f"k{times}", [BODY])
            assert await store.get(f"k{times}", 0, len(BODY)) == BODY
        # Another's object stays as it is, whatever happens to the request.
        proxy.inject(Fault.LOSE_REPLY, method="PUT", times=1)
        if conditional:
            with pytest.raises(FileExistsError):
                await store.put("k1", [BODY[::-1]])
            assert await store.get("k1", 0, len(BODY)) == BODY

    use(place, work)


def test_bytes_that_are_garbled_on_the_way_are_refused_and_sent_again(place: Place, proxy: FaultProxy) -> None:
    async def work(store: S3Store) -> None:
        proxy.inject(Fault.GARBLE_REQUEST, method="PUT", times=3)
        await store.put("k", [BODY])
        assert proxy.tally.requests["PUT"] == 4
        assert await store.get("k", 0, len(BODY)) == BODY

    use(place, work)


def test_a_storm(place: Place, proxy: FaultProxy) -> None:
    """Half of all requests fail, in every way, while many operations are under way."""
    for fault in PASSING:
        proxy.inject(fault, share=0.07)
    proxy.inject(Fault.GARBLE_REQUEST, method="PUT", share=0.2)

    async def work(store: S3Store) -> None:
        async def life(number: int) -> None:
            body = hashlib.shake_256(str(number).encode()).digest(1000 * number)
            await store.put(f"k{number}", [body])
            assert await store.get(f"k{number}", number, 999 * number) == body[number : 1000 * number]
            if number % 2:
                await store.delete([f"k{number}"])

        await asyncio.gather(*(life(number) for number in range(1, 41)))
        assert await all_of(store.list()) == {f"k{number}": 1000 * number for number in range(2, 41, 2)}

    use(place, work)
    assert sum(proxy.tally.faults.values()) > 20


def test_an_http_proxy_of_the_environment(s3_place: Place, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.endpoint)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def work(store: S3Store) -> None:
        await store.put("k", [BODY])
        proxy.inject(Fault.HALF_ANSWER, method="GET", times=1)
        assert await store.get("k", 10, 200_000) == BODY[10:200_010]
        with pytest.raises(FileNotFoundError):
            await store.get("none", 0, 1)
        assert await all_of(store.list()) == {"k": len(BODY)}
        await store.delete(["k"])

    use(s3_place, work)
    assert proxy.tally.requests == {"PUT": 1, "GET": 4, "POST": 1}


def test_the_server_is_down_and_comes_back(place: Place, proxy: FaultProxy) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [BODY])
        await asyncio.to_thread(proxy.refuse)
        waiting = [asyncio.create_task(store.get("k", 0, len(BODY))) for _ in range(4)]
        writing = asyncio.create_task(store.put("k2", [BODY]))
        done, _ = await asyncio.wait([*waiting, writing], timeout=1.0)
        assert not done
        await asyncio.to_thread(proxy.accept)
        assert await asyncio.gather(*waiting) == [BODY] * 4
        await writing
        assert await store.get("k2", 0, len(BODY)) == BODY

    use(place, work)


@pytest.mark.parametrize(
    ("fault", "number", "says"),
    [
        (Fault.HANG, errno.ETIMEDOUT, "does not answer in time: check the network and --endpoint"),
        (Fault.TRICKLE, errno.ETIMEDOUT, "does not answer in time"),
        (Fault.RESET, errno.ECONNRESET, "connection lost"),
        (Fault.HALF_ANSWER, errno.ECONNRESET, "connection lost"),
        (Fault.SLOW_DOWN, errno.EIO, "the server cannot serve it now: 503 SlowDown"),
        (Fault.BAD_GATEWAY, errno.EIO, "the server cannot serve it now: 502"),
        (Fault.NONSENSE, errno.EPROTO, "the answer is no HTTP: check --endpoint"),
    ],
)
def test_the_deadline_and_its_reason(
    place: Place, proxy: FaultProxy, hasty: None, fault: Fault, number: int, says: str
) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [BODY[:1000]])
        proxy.inject(fault)
        store.deadline = 1.0
        with pytest.raises(StoreError, match=says) as caught:
            await store.get("k", 0, 1000)
        store.deadline = 60.0
        assert caught.value.errno == number
        assert caught.value.transient
        assert store.away_since is not None
        proxy.heal()
        assert await store.get("k", 0, 1000) == BODY[:1000]
        assert store.away_since is None

    use(place, work)


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.RESET, Fault.INTERNAL_ERROR])
def test_at_the_end_a_server_that_is_away_is_given_up_at_once(place: Place, proxy: FaultProxy, fault: Fault) -> None:
    """Also an object that would have minutes for its bytes, and whatever operations are waiting for."""

    async def work(store: S3Store) -> None:
        await store.put("k", [BODY])
        store.deadline = 1e9
        proxy.inject(Fault.RESET, times=2)
        proxy.inject(fault)
        waiting = [asyncio.create_task(store.put("k2", [bytes(16 << 20)])), asyncio.create_task(store.get("k", 0, 9))]
        await asyncio.wait(waiting, timeout=0.5)
        await asyncio.to_thread(proxy.wait_for, fault)
        store.hurry(0.2)
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, StoreError) and error.transient for error in found)

    use(place, work)


def test_an_upload_that_stalls_is_given_up_for_another(place: Place, proxy: FaultProxy) -> None:
    """Long before the time that its bytes might take."""

    async def work(store: S3Store) -> None:
        store.plane.limit_silence(1.0)
        proxy.inject(Fault.HANG, method="PUT", times=1)
        await store.put("k", [bytes(8 << 20)])
        assert proxy.tally.faults[Fault.HANG] == 1

    use(place, work)


def test_a_connection_that_trickles_is_given_up_for_another(
    place: Place, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [BODY[:10_000]])
        monkeypatch.setattr("polefs.objects.s3operate._ATTEMPT_SECONDS", 2.0)
        store.deadline = 60.0
        proxy.inject(Fault.TRICKLE, method="GET", times=1)
        assert await store.get("k", 0, 10_000) == BODY[:10_000]
        assert proxy.tally.faults[Fault.TRICKLE] == 1

    use(place, work)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault.SKEWED_CLOCK, "the clock of this machine is far off: set it .*; the server has .* GMT"),
        (Fault.ACCESS_DENIED, "no permission: allow the key"),
    ],
)
def test_what_waiting_cannot_mend_is_told_at_once(place: Place, proxy: FaultProxy, fault: Fault, says: str) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [BODY])
        proxy.inject(fault)
        for operation in (
            store.get("k", 0, 1),
            store.put("k2", [BODY]),
            store.delete(["k"]),
            all_of(store.list()),
        ):
            before = proxy.tally.requests.total()
            with pytest.raises(StoreError, match=says) as caught:
                await operation
            assert caught.value.errno == errno.EACCES
            assert not caught.value.transient
            assert proxy.tally.requests.total() == before + 1

    use(place, work)


def test_cancelled_operations_leave_nothing_behind(place: Place, proxy: FaultProxy) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [BODY])
        proxy.inject(Fault.HANG)
        tasks = [asyncio.create_task(store.get("k", 0, 10)) for _ in range(8)]
        await asyncio.wait(tasks, timeout=0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        proxy.heal()
        assert await store.get("k", 0, 10) == BODY[:10]

    use(place, work)
