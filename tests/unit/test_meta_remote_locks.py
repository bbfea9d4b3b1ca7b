"""Locks of programs on different machines, through the service: cuts, restarts, and sessions that end."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from polefs.meta import protocol
from polefs.meta.model import LOCK_END, ROOT_INO, Caller, Lock, LockKind
from polefs.meta.protocol import Hello, Ping, Refused, Requests, Uses, Welcome
from polefs.meta.remote import RemoteMeta
from tests.unit.test_meta_remote import FILE, LONG, ROOT, Place, refused, run

READ, WRITE, FREE = LockKind
INO = 7
ALL = 0, LOCK_END


def lock(kind: LockKind, start: int = 0, end: int = LOCK_END, owner: int = 1) -> Lock:
    return Lock(owner, start, end, kind, 100)


def waiting(meta: RemoteMeta, wanted: Lock, *, flock: bool = False, wait: int = 1) -> asyncio.Task[None]:
    return asyncio.create_task(meta.set_lock(INO, wanted, flock, wait))


async def waits(meta: RemoteMeta) -> None:
    """Returns when the service has what the client has asked for so far: it answers in order."""
    await meta.get_inode(ROOT_INO)


def test_exclusion_and_waiting(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        one, two = await place.connect(), await place.connect()
        await one.set_lock(INO, lock(WRITE, 0, 9), False)
        await one.set_lock(INO, lock(READ), True)
        assert await two.get_lock(INO, lock(READ), False) == Lock(0, 0, 9, WRITE, 0)
        assert await refused(two.set_lock(INO, lock(READ), False)) == errno.EAGAIN
        assert await refused(two.set_lock(INO, lock(WRITE), True)) == errno.EAGAIN
        record, flock = waiting(two, lock(WRITE)), waiting(two, lock(WRITE), flock=True, wait=2)
        await waits(two)
        assert not record.done() and not flock.done()
        await one.set_lock(INO, lock(FREE), False)
        await record
        assert not flock.done()
        await one.set_lock(INO, lock(FREE), True)
        await flock
        assert await one.get_lock(INO, lock(READ), False) == Lock(0, 0, LOCK_END, WRITE, 0)
        await two.close()
        await one.set_lock(INO, lock(WRITE), False)
        await one.set_lock(INO, lock(WRITE), True)
        await one.close()

    run(tmp_path, work)


def test_a_circle_between_machines(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        one, two = await place.connect(), await place.connect()
        await one.set_lock(INO, lock(WRITE, 0, 0), False)
        await two.set_lock(INO, lock(WRITE, 1, 1), False)
        blocked = waiting(one, lock(WRITE, 1, 1))
        await waits(one)
        assert await refused(two.set_lock(INO, lock(WRITE, 0, 0), False, 1)) == errno.EDEADLK
        await two.close()
        await blocked
        await one.close()

    run(tmp_path, work)


def test_what_nobody_holds_is_given_back_without_asking(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        meta = await place.connect()
        place.relay.let_in.clear()
        place.relay.cut()
        await meta.set_lock(INO, lock(FREE), False)
        place.relay.let_in.set()
        await meta.close()

    run(tmp_path, work)


def test_a_wait_that_is_cancelled(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        one, two = await place.connect(), await place.connect()
        await one.set_lock(INO, lock(WRITE), False)
        for cut in (False, True):
            blocked = waiting(two, lock(WRITE))
            await waits(two)
            if cut:
                place.relay.cut()
            blocked.cancel()
            assert await refused(blocked) == errno.EINTR
        await one.set_lock(INO, lock(FREE), False)
        assert await one.get_lock(INO, lock(WRITE), False) is None
        await one.close()
        await two.close()

    run(tmp_path, work)


def test_waiting_holds_up_no_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than may be without a confirmed reply go by, while one waits."""

    monkeypatch.setattr(protocol, "IN_FLIGHT_MAX", 400)

    async def work(place: Place) -> None:
        one, two = await place.connect(), await place.connect()
        await one.set_lock(INO, lock(WRITE), False)
        blocked = waiting(two, lock(WRITE))
        made = await two.make_node(ROOT, ROOT_INO, b"f", FILE, 0)
        for _ in range(10):
            await asyncio.gather(*(two.touch_atime([(made.ino, n)]) for n in range(100)))
        assert not blocked.done()
        await one.set_lock(INO, lock(FREE), False)
        await blocked
        await one.close()
        await two.close()

    run(tmp_path, work)


def test_cuts_and_restarts_lose_no_lock(tmp_path: Path) -> None:
    """Clients count in turn, in a place that only the lock protects, while connections and services come to an end."""

    async def work(place: Place) -> None:
        inside: list[int] = []
        turns = 0

        async def client(number: int) -> None:
            nonlocal turns
            meta = await place.connect(info=str(number))
            for turn in range(12):
                await meta.set_lock(INO, lock(WRITE), bool(number % 2), turn + 1)
                await meta.set_lock(INO, lock(WRITE), not number % 2, turn + 1)
                assert not inside
                inside.append(number)
                await meta.get_inode(ROOT_INO)
                turns += 1
                assert inside.pop() == number
                await meta.set_lock(INO, lock(FREE), not number % 2)
                await meta.set_lock(INO, lock(FREE), bool(number % 2))
            await meta.close()

        # All of one parity at a time: two locks taken in different orders would be a circle that flock does not see.
        for parity in (0, 1):
            whole = asyncio.gather(*(client(number) for number in (parity, parity + 2, parity + 4)))
            cuts = 0
            while not whole.done():
                spent = asyncio.create_task(place.relay.cut_after(200 + 317 * cuts % 900).wait())
                await asyncio.wait([whole, spent], return_when=asyncio.FIRST_COMPLETED)
                spent.cancel()
                cuts += 1
                if cuts % 3 == 0:
                    await place.restart()
            await whole
            assert cuts > 3
        assert turns == 72

    run(tmp_path, work)


def test_a_restart_gives_nobody_what_is_held(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        one, two = await place.connect(), await place.connect()
        await one.set_lock(INO, lock(WRITE, 0, 9), False)
        await one.set_lock(INO, lock(FREE, 3, 4), False)
        blocked = waiting(two, lock(WRITE, 5, 5))
        await waits(two)
        await place.restart()
        await two.set_lock(INO, lock(WRITE, 3, 4), False)
        assert await refused(two.set_lock(INO, lock(READ, 0, 3), False)) == errno.EAGAIN
        assert not blocked.done()
        await one.set_lock(INO, lock(FREE), False)
        await blocked
        await one.close()
        await two.close()

    run(tmp_path, work)


def test_a_session_that_is_over_has_lost_its_locks(tmp_path: Path) -> None:
    """Whoever waits gets them, and when the first comes back he neither has them nor believes so."""
    lost: list[bool] = []

    async def work(place: Place) -> None:
        one = await place.connect(on_lost=lambda: lost.append(True))
        await one.set_lock(INO, lock(WRITE), False)
        two = await RemoteMeta.connect(f"http://127.0.0.1:{place.direct}/files")
        blocked = waiting(two, lock(WRITE))
        place.relay.let_in.clear()
        place.relay.cut()
        own = waiting(one, lock(READ, 0, 0, owner=2))
        await blocked
        place.relay.let_in.set()
        assert await refused(own) == errno.ESTALE
        assert lost
        assert await refused(one.set_lock(INO, lock(WRITE), False)) == errno.EAGAIN
        await two.close()
        await one.set_lock(INO, lock(WRITE), False)
        await one.close()

    run(tmp_path, work, lease=0.5)


def test_readers_of_a_volume_may_lock(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        writer, reader = await place.connect(token="w" * 20), await place.connect(token="r" * 20)
        assert await refused(reader.make_node(Caller(0, 0), ROOT_INO, b"f", FILE, 0)) == errno.EROFS
        await reader.set_lock(INO, lock(READ), True)
        assert await refused(writer.set_lock(INO, lock(WRITE), True)) == errno.EAGAIN
        await reader.close()
        await writer.close()

    run(tmp_path, work, LONG, token="w" * 20, read_token="r" * 20)


async def hello(place: Place, session: int = 0, secret: bytes = b"") -> tuple[Any, Any, Welcome]:
    import aiohttp

    http = aiohttp.ClientSession()
    socket = await http.ws_connect(f"http://127.0.0.1:{place.direct}/session")
    await socket.send_bytes(protocol.encode(Hello(1, 1, "files", session=session, secret=secret)))
    welcome = protocol.decode_from_service((await socket.receive()).data)
    assert isinstance(welcome, Welcome)
    return http, socket, welcome


def test_what_no_client_may_tell(tmp_path: Path) -> None:
    """After a restart: locks of others, nothing at all, or telling again; requests that ask to be forgotten."""

    async def work(place: Place) -> None:
        one = await place.connect()
        await one.set_lock(INO, lock(WRITE), False)
        http, _, welcome = await hello(place)
        await http.close()
        await place.restart()
        await waits(one)
        for message in (
            Uses([], [(INO, False, lock(WRITE))]),
            Uses([], [(INO, False, lock(FREE))]),
            Uses([], [(INO, True, Lock(1, 5, 4, WRITE))]),
            Ping(1),
        ):
            http, socket, again = await hello(place, welcome.session, welcome.secret)
            assert again.resumed and again.tell
            await socket.send_bytes(protocol.encode(message))
            assert isinstance(protocol.decode_from_service((await socket.receive()).data), Refused)
            await http.close()
        http, socket, again = await hello(place, welcome.session, welcome.secret)
        await socket.send_bytes(protocol.encode(Uses([], [])))
        arguments = protocol.msgspec.Raw(protocol.encode((ROOT, ROOT_INO, b"x", FILE, 0, 0, None)))
        await socket.send_bytes(protocol.encode(Requests([(-1, "make_node", arguments)], 0)))
        assert isinstance(protocol.decode_from_service((await socket.receive()).data), Refused)
        await http.close()
        assert await refused(one.lookup(ROOT_INO, b"x")) == errno.ENOENT
        await one.set_lock(INO, lock(WRITE), True)
        await one.close()

    run(tmp_path, work)
