"""The meta service across the network: real sockets, a relay that cuts them, and clients that behave badly."""

from __future__ import annotations

import asyncio
import errno
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from polefs.meta import protocol
from polefs.meta.model import INLINE_MAX, ROOT_INO, Caller, DataCommit, Extent, Inode, Segment, SetAttr
from polefs.meta.remote import RemoteMeta
from polefs.meta.server import MetaServer, Served
from polefs.meta.service import MetaService
from polefs.meta.store.base import Reader
from polefs.meta.store.postgres import PostgresStore
from polefs.meta.store.sqlite import SqliteStore
from tests.postgres.server import PostgresServer

ROOT = Caller(0, 0)
FILE = stat.S_IFREG | 0o644
LONG = 1000.0


class Relay:
    """Stands between clients and the service, and cuts their connections: at once, or after so many more bytes that
    the service has sent."""

    def __init__(self) -> None:
        self.target = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self.let_in = asyncio.Event()
        self.let_in.set()
        self._left: int | None = None
        self._spent = asyncio.Event()

    def cut_after(self, length: int) -> asyncio.Event:
        """Once the service has sent ``length`` more bytes, which sets the event."""
        self._left = length
        self._spent = asyncio.Event()
        return self._spent

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.let_in.is_set():
            writer.transport.abort()
            return
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except ConnectionError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_writer}
        try:
            await asyncio.gather(self._pass(reader, to_writer, False), self._pass(to_reader, writer, True))
        except OSError:
            pass
        finally:
            for each in (writer, to_writer):
                each.transport.abort()
                self._writers.discard(each)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: bool) -> None:
        while data := await reader.read(1 << 16):
            if back and self._left is not None:
                self._left -= len(data)
                if self._left < 0:
                    self._left = None
                    self._spent.set()
                    break
            writer.write(data)
            await writer.drain()
        writer.transport.abort()


class Place:
    """A service with one volume, and the relay before it."""

    def __init__(self, path: Path, dsn: str | None, lease: float, tokens: dict[str, str | None]) -> None:
        self._path = path
        self._dsn = dsn
        self._lease = lease
        self._tokens = tokens
        self.relay = Relay()

    async def start(self) -> None:
        self.store = await self._open()
        self._server = MetaServer({"files": Served(self.store, **self._tokens)}, lease=self._lease)
        await self._server.start()
        self._runner = web.AppRunner(self._server.application, shutdown_timeout=0.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.direct = self._runner.addresses[0][1]
        self.relay.target = self.direct
        self.meta = MetaService(self.store)

    async def _open(self) -> SqliteStore | PostgresStore:
        database = str(self._path / "meta.db")
        try:
            if self._dsn is None:
                return SqliteStore.create(database, name="files")
            return await PostgresStore.create(self._dsn, name=database)
        except FileExistsError:
            return SqliteStore.open(database) if self._dsn is None else await PostgresStore.open(self._dsn, database)

    async def stop(self) -> None:
        self.relay.cut()
        await self._runner.cleanup()
        await self._server.stop()
        await self.store.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.relay.port}/files"

    async def connect(self, **options: Any) -> RemoteMeta:
        return await RemoteMeta.connect(self.url, **options)


@asynccontextmanager
async def serving(path: Path, dsn: str | None, lease: float, tokens: dict[str, str | None]) -> AsyncIterator[Place]:
    place = Place(path, dsn, lease, tokens)
    await place.relay.start()
    await place.start()
    try:
        yield place
    finally:
        await place.stop()
        await place.relay.close()


@pytest.fixture(params=["sqlite", "postgres"])
def dsn(request: pytest.FixtureRequest) -> str | None:
    """Where the metadata are: in PostgreSQL; None: in SQLite."""
    if request.param == "sqlite":
        return None
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.dsn()


def run(
    path: Path,
    work: Callable[[Place], Awaitable[None]],
    lease: float = LONG,
    dsn: str | None = None,
    **tokens: str | None,
) -> None:
    async def whole() -> None:
        async with asyncio.timeout(120), serving(path, dsn, lease, tokens) as place:
            await work(place)

    asyncio.run(whole())


async def refused(awaitable: Awaitable[Any]) -> int:
    with pytest.raises(OSError) as info:
        await awaitable
    assert info.value.errno is not None
    return info.value.errno


async def names(meta: RemoteMeta | MetaService) -> list[bytes]:
    return [dentry.name for dentry in await meta.list_dir(ROOT_INO, 0, 10_000)]


def test_every_operation(tmp_path: Path, dsn: str | None) -> None:
    async def work(place: Place) -> None:
        meta = await place.connect()
        made = await meta.make_node(ROOT, ROOT_INO, b"f", FILE, 0o022)
        assert isinstance(made, Inode) and made == await place.meta.get_inode(made.ino)
        assert await meta.lookup(ROOT_INO, b"f") == made == await meta.get_inode(made.ino)
        assert (await meta.set_attributes(made.ino, SetAttr(mode=0o600))).mode == stat.S_IFREG | 0o600
        await meta.set_xattr(made.ino, b"user.a", b"\0value")
        assert await meta.get_xattr(made.ino, b"user.a") == b"\0value" and await meta.list_xattr(made.ino) == [
            b"user.a"
        ]
        await meta.remove_xattr(made.ino, b"user.a")
        segment = await meta.allocate_segments(3)
        assert segment > 0
        frames = ((8192, 8192, 7),)
        extent = Extent(0, 8192, segment, 0)
        await meta.commit_data([Segment(segment, 8192, frames)], [DataCommit(made.ino, 8192, 5, [], [extent])])
        assert await meta.extents(made.ino, 0, 1) == [extent]
        assert await meta.segments([segment, segment + 1]) == [Segment(segment, 8192, frames)]
        other = await meta.make_node(ROOT, ROOT_INO, b"g", FILE, 0o022)
        assert (await meta.clone_range(made.ino, 0, 8192, other.ino, 0)).size == 8192
        await meta.touch_atime([(made.ino, 77)])
        assert (await meta.get_inode(made.ino)).atime == 77
        link = await meta.make_node(ROOT, ROOT_INO, b"l", stat.S_IFLNK | 0o777, 0, 0, b"target")
        assert await meta.read_link(link.ino) == b"target"
        assert (await meta.link(made.ino, ROOT_INO, b"h")).nlink == 2
        replaced = await meta.rename(ROOT, ROOT_INO, b"h", ROOT_INO, b"l")
        assert replaced is not None and replaced.ino == link.ino and replaced.nlink == 0
        await meta.release_orphans([link.ino])
        assert await names(meta) == await names(place.meta) and set(await names(meta)) == {b"f", b"g", b"l"}
        assert [inode.ino for _, inode in await meta.list_dir_plus(ROOT_INO, 0, 2)] == [made.ino, other.ino]
        assert (await meta.usage()).inodes == (await place.meta.usage()).inodes
        assert (await meta.unlink(ROOT_INO, b"l")).nlink == 1
        await meta.sync()
        await meta.close()

    run(tmp_path, work, dsn=dsn)


def test_errors_travel(tmp_path: Path, dsn: str | None) -> None:
    async def work(place: Place) -> None:
        meta = await place.connect()
        assert await refused(meta.lookup(ROOT_INO, b"none")) == errno.ENOENT
        assert await refused(meta.lookup(ROOT_INO, b"n" * 300)) == errno.ENAMETOOLONG
        assert await refused(meta.rmdir(ROOT_INO, b".")) == errno.EINVAL
        with pytest.raises(FileNotFoundError):
            await meta.get_inode(12345)
        await meta.close()
        assert await refused(meta.get_inode(ROOT_INO)) == errno.ESHUTDOWN

    run(tmp_path, work, dsn=dsn)


def test_many_at_a_time_keep_their_order(tmp_path: Path, dsn: str | None) -> None:
    async def work(place: Place) -> None:
        meta = await place.connect()
        made = await asyncio.gather(
            *(meta.make_node(ROOT, ROOT_INO, b"%05d" % number, FILE, 0) for number in range(protocol.BATCH_MAX + 500))
        )
        assert [inode.ino for inode in made] == sorted(inode.ino for inode in made)
        assert await names(meta) == [b"%05d" % number for number in range(len(made))]
        await meta.close()

    run(tmp_path, work, dsn=dsn)


def test_cuts_neither_lose_nor_repeat(tmp_path: Path, dsn: str | None) -> None:
    """Exclusive creation fails when it is done twice."""

    async def work(place: Place) -> None:
        meta = await place.connect()

        async def client(number: int) -> None:
            for turn in range(40):
                inode = await meta.make_node(ROOT, ROOT_INO, b"%d-%d" % (number, turn), FILE, 0)
                if turn % 2:
                    assert (await meta.unlink(ROOT_INO, b"%d-%d" % (number, turn))).ino == inode.ino

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        whole = asyncio.gather(*clients)
        cuts = 0
        while not whole.done():
            spent = asyncio.create_task(place.relay.cut_after(20 + 611 * cuts % 4000).wait())
            await asyncio.wait([whole, spent], return_when=asyncio.FIRST_COMPLETED)
            spent.cancel()
            cuts += 1
        await whole
        assert cuts > 3
        assert sorted(await names(place.meta)) == sorted(
            b"%d-%d" % (n, turn) for n in range(8) for turn in range(0, 40, 2)
        )
        await meta.close()

    run(tmp_path, work, dsn=dsn)


def test_restarts_neither_lose_nor_repeat(tmp_path: Path, dsn: str | None) -> None:
    """The service stops with replies on their way, and the next one answers from what the store remembers."""

    async def work(place: Place) -> None:
        meta = await place.connect()
        made: list[bytes] = []

        async def client(number: int) -> None:
            for turn in range(12):
                name = b"%d-%d" % (number, turn)
                inode = await meta.make_node(ROOT, ROOT_INO, name, FILE, 0)
                await meta.rename(ROOT, ROOT_INO, name, ROOT_INO, b"r" + name)
                if turn % 2:
                    assert (await meta.unlink(ROOT_INO, b"r" + name)).ino == inode.ino
                else:
                    made.append(b"r" + name)

        whole = asyncio.gather(*(client(number) for number in range(6)))
        restarts = 0
        while not whole.done():
            spent = asyncio.create_task(place.relay.cut_after(700 + 611 * restarts % 4000).wait())
            await asyncio.wait([whole, spent], return_when=asyncio.FIRST_COMPLETED)
            spent.cancel()
            restarts += 1
            await place.restart()
        await whole
        assert restarts > 3
        assert sorted(await names(place.meta)) == sorted(made)
        await meta.usage()
        await meta.close()
        assert await place.store.read(_sessions_and_replies) == (0, 0)

    run(tmp_path, work, dsn=dsn)


async def _sessions_and_replies(tx: Reader) -> tuple[int, int]:
    return len(await tx.sessions()), sum([len(await tx.replies(session)) for session in range(1, 40)])


async def inode_exists(place: Place, ino: int) -> bool:
    try:
        return (await place.meta.get_inode(ino)).ino == ino
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("restart", [False, True])
def test_an_open_file_lives_until_the_last_session_closes_it(tmp_path: Path, dsn: str | None, restart: bool) -> None:
    async def work(place: Place) -> None:
        one, two, three = [await place.connect(info=str(n)) for n in range(3)]
        ino = (await one.make_node(ROOT, ROOT_INO, b"f", FILE, 0)).ino
        other = (await one.make_node(ROOT, ROOT_INO, b"g", FILE, 0)).ino
        for session in (two, three):
            assert (await session.open_inode(ino)).nlink == 1
        if restart:
            await place.restart()
        assert (await one.unlink(ROOT_INO, b"f")).nlink == 0
        assert (await one.unlink(ROOT_INO, b"g")).nlink == 0
        if restart:
            await place.restart()
        await one.release_orphans([ino, other])
        assert await refused(one.open_inode(ino)) == errno.ESTALE
        assert (await two.open_inode(ino)).nlink == 0
        await two.close_inodes([ino])
        assert await inode_exists(place, ino)
        await three.close_inodes([ino])
        assert not await inode_exists(place, ino)
        for session in (one, two, three):  # the last of them has told what it uses
            await session.get_inode(ROOT_INO)
        await place.meta.sync()
        assert not await inode_exists(place, other)
        for session in (one, two, three):
            await session.close()
        assert (await place.meta.usage()).inodes == 1

    run(tmp_path, work, dsn=dsn)


def test_the_end_of_a_session_releases_what_it_used(tmp_path: Path, dsn: str | None) -> None:
    async def work(place: Place) -> None:
        one, two = await place.connect(), await place.connect()
        inos = [(await one.make_node(ROOT, ROOT_INO, b"%d" % n, FILE, 0)).ino for n in range(300)]
        for ino in inos:
            await two.open_inode(ino)
        for number in range(300):
            await one.unlink(ROOT_INO, b"%d" % number)
        await one.release_orphans(inos)
        assert (await place.meta.usage()).inodes == 301
        unnamed = await two.make_unnamed(ROOT, ROOT_INO, 0o600, 0)
        await two.close()
        assert (await place.meta.usage()).inodes == 1
        assert not await inode_exists(place, unnamed.ino)
        await one.close()

    run(tmp_path, work, dsn=dsn)


def test_a_session_that_is_over(tmp_path: Path, dsn: str | None) -> None:
    """Whoever was away for longer than the lease cannot know what became of what was under way."""
    lost: list[bool] = []

    async def work(place: Place) -> None:
        meta = await place.connect(on_lost=lambda: lost.append(True))
        await meta.get_inode(ROOT_INO)
        assert meta.valid
        place.relay.let_in.clear()
        place.relay.cut()
        asked = [asyncio.create_task(meta.get_inode(ROOT_INO)) for _ in range(3)]
        for each in asked:
            assert await refused(each) in (errno.ESTALE, errno.EIO)
        assert not meta.valid
        place.relay.let_in.set()
        assert (await meta.get_inode(ROOT_INO)).ino == ROOT_INO
        assert lost == [True] and meta.valid
        await meta.close()
        assert lost == [True]

    run(tmp_path, work, dsn=dsn, lease=0.5)


def test_out_of_reach(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        meta = await place.connect(patience=0.2)
        place.relay.let_in.clear()
        place.relay.cut()
        while True:
            waiting = asyncio.create_task(meta.get_inode(ROOT_INO))
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            if done:
                assert await refused(waiting) == errno.EIO
                break
            waiting.cancel()
        place.relay.let_in.set()
        await meta.close()

    run(tmp_path, work)


def test_bad_addresses(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        for url in ("http://127.0.0.1:1", "ftp://host/files", "http://127.0.0.1:1/a/b", "files"):
            assert await refused(RemoteMeta.connect(url)) == errno.EINVAL
        assert await refused(RemoteMeta.connect("http://127.0.0.1:1/files")) == errno.ECONNREFUSED
        assert await refused(RemoteMeta.connect(place.url + "x")) == errno.EACCES
        application = web.Application()
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        assert await refused(RemoteMeta.connect(f"http://127.0.0.1:{runner.addresses[0][1]}/files")) == errno.EPROTO
        await runner.cleanup()

    run(tmp_path, work)


def test_tokens(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        for token in ("", "wrong", "writ", "writer "):
            assert await refused(place.connect(token=token)) == errno.EACCES
        reading, writing = await place.connect(token="reader"), await place.connect(token="writer")
        assert reading.read_only and not writing.read_only
        await writing.make_node(ROOT, ROOT_INO, b"f", FILE, 0)
        assert await names(reading) == [b"f"]
        assert await refused(reading.unlink(ROOT_INO, b"f")) == errno.EROFS
        assert await refused(reading.touch_atime([(ROOT_INO, 1)])) == errno.EROFS
        await reading.close()
        await writing.close()

    run(tmp_path, work, token="writer", read_token="reader")


HELLO = protocol.Hello(protocol.VERSION, protocol.OLDEST, "files")


def requests(*requests: tuple[int, str, object], done: int = 0) -> bytes:
    return protocol.encode(
        protocol.Requests([(id_, name, msgspec.Raw(protocol.encode(args))) for id_, name, args in requests], done)
    )


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [b"\xff" * 100],
        [requests((1, "usage", ()))],
        [protocol.encode(HELLO), protocol.encode(HELLO)],
        [protocol.encode(HELLO), requests((1, "close", ()))],
        [protocol.encode(HELLO), requests((1, "__init__", ()))],
        [protocol.encode(HELLO), requests((1, "lookup", (1,)))],
        [protocol.encode(HELLO), requests((1, "lookup", ("x", b"x")))],
        [protocol.encode(HELLO), requests((1, "lookup", (1, b"x", 2)))],
        [protocol.encode(HELLO), requests(*((n, "usage", ()) for n in range(1, protocol.BATCH_MAX + 2)))],
        [protocol.encode(HELLO), b"\x93" * 10_000],
        [protocol.encode(HELLO), bytes(protocol.FRAME_MAX + 1)],
        [protocol.encode(HELLO), "text"],
        [protocol.encode(msgspec.structs.replace(HELLO, version=99, oldest=98))],
        [protocol.encode(msgspec.structs.replace(HELLO, version=0, oldest=0))],
    ],
)
def test_hostile_clients_are_cut_off_and_harm_nobody(tmp_path: Path, frames: list[bytes | str]) -> None:
    async def work(place: Place) -> None:
        good = await place.connect()
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"http://127.0.0.1:{place.direct}/session", max_msg_size=0) as socket,
        ):
            with suppress(ConnectionError):  # it may be cut off before all is sent
                for frame in frames:
                    await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))
            while (message := await socket.receive()).type == aiohttp.WSMsgType.BINARY:
                pass
            assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
        assert (await good.get_inode(ROOT_INO)).ino == ROOT_INO
        await good.close()

    run(tmp_path, work)


def test_who_does_not_confirm_is_cut_off(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"http://127.0.0.1:{place.direct}/session") as socket,
        ):
            await socket.send_bytes(protocol.encode(HELLO))
            first = 1
            while (message := await socket.receive()).type == aiohttp.WSMsgType.BINARY:
                if not socket.closed and isinstance(
                    protocol.decode_from_service(message.data), protocol.Welcome | protocol.Replies
                ):
                    batch = [(n, "touch_atime", ([],)) for n in range(first, first + 4000)]
                    first += 4000
                    await socket.send_bytes(requests(*batch))
            assert first > protocol.IN_FLIGHT_MAX
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{place.direct}/health") as answer:
            assert answer.status == 200 and (await answer.json())["status"] == "ok"

    run(tmp_path, work)


def test_nobody_takes_over_a_session_without_its_secret(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        good = await place.connect()
        await good.get_inode(ROOT_INO)
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"http://127.0.0.1:{place.direct}/session") as socket,
        ):
            await socket.send_bytes(protocol.encode(msgspec.structs.replace(HELLO, session=1, secret=b"guess")))
            welcome = protocol.decode_from_service((await socket.receive()).data)
            assert isinstance(welcome, protocol.Welcome) and not welcome.resumed and welcome.session != 1
        assert (await good.get_inode(ROOT_INO)).ino == ROOT_INO
        await good.close()

    run(tmp_path, work)


def test_large_frames(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        meta = await place.connect()
        inos = [
            inode.ino
            for inode in await asyncio.gather(
                *(meta.make_node(ROOT, ROOT_INO, b"%d" % n, FILE, 0) for n in range(3000))
            )
        ]
        commits = [DataCommit(ino, INLINE_MAX, 1, inline=bytes(INLINE_MAX)) for ino in inos]
        await asyncio.gather(meta.commit_data([], commits[:1500]), meta.commit_data([], commits[1500:]))
        found = await meta.list_dir_plus(ROOT_INO, 0, 3000)
        assert all(inode.inline == bytes(INLINE_MAX) for _, inode in found)
        assert await refused(meta.commit_data([], commits * 2)) == errno.EMSGSIZE
        await meta.close()

    run(tmp_path, work)
