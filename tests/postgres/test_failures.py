"""The PostgreSQL store when the database fails, in every way: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import asyncio
import itertools
import os
from errno import EHOSTUNREACH, EINVAL, EIO, ENOENT, ENOSPC
from pathlib import Path
from typing import Any

import pytest

from polefs.meta.model import ROOT_INO
from polefs.meta.store.postgres import PostgresStore, connection
from tests.postgres.proxy import Fault, Proxy
from tests.postgres.server import PostgresServer
from tests.postgres.volumes import run, until, volume
from tests.unit.meta_helpers import fails


def test_conflicts_are_tried_again(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        async with volume(postgres_server.dsn()) as served:
            other = await connection.connect(postgres_server.dsn())
            for number in range(3):
                transaction = other.transaction()
                await transaction.start()
                await other.execute("UPDATE volume SET bytes_limit = $2 WHERE id = $1", served.store.volume.id, number)
                made = asyncio.ensure_future(served.create(b"%d" % number))
                # It waits for the row by now.
                await until(lambda: postgres_server.sql("SELECT count(*) FROM pg_locks WHERE NOT granted") != "0")
                await transaction.commit()
                await made
            assert served.store._writer.repeated >= 3
            assert await served.names() == [b"0", b"1", b"2"]
            await other.close()

    run(test)


@pytest.mark.parametrize("fault", ["request", "answer", "silence"])
def test_a_commit_whose_answer_is_lost_is_done_once(
    postgres_server: PostgresServer, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with Proxy(postgres_server) as proxy, volume(proxy.dsn) as served:
            monkeypatch.setattr(connection, "_STATEMENT_SECONDS", 1.0)
            await served.create(b"first")
            epoch = served.store._writer.epoch
            for number in range(3):
                proxy.fail(fault, b"COMMIT")
                one, two = await asyncio.gather(served.create(b"%d" % number), served.mkdir(b"d%d" % number))
                assert one.nlink == 1 and two.nlink == 2
            assert proxy.failed == 3
            assert served.store._writer.epoch == epoch
            names = await served.names()
            assert names == [b"0", b"1", b"2", b"d0", b"d1", b"d2", b"first"]
            usage = await served.service.usage()
            assert usage.inodes == 8
        async with volume(postgres_server.dsn(), served.store.name) as again:
            assert await again.service.usage() == usage
            assert await again.names() == names

    run(test)


def test_lost_queries_are_asked_again(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        async with Proxy(postgres_server) as proxy, volume(proxy.dsn) as served:
            await served.create(b"f")
            for fault in ("request", "answer"):
                served.store._caches.clear()
                proxy.fail(fault, b"", 1)
                assert await served.names() == [b"f"]
            assert proxy.failed == 2

    run(test)


@pytest.fixture
def own_server() -> Any:
    """A server of the test's own, which writes to the disk what it says that it has."""
    server = PostgresServer(settings={"fsync": "on", "full_page_writes": "on"})
    try:
        server.start()
        yield server
    finally:
        server.discard()


def test_the_database_is_killed_under_load(own_server: PostgresServer) -> None:
    async def test() -> None:
        acknowledged: list[bytes] = []
        async with volume(own_server.dsn()) as served:
            stop = asyncio.Event()

            async def work(worker: int) -> None:
                for number in itertools.count():
                    if stop.is_set():
                        return
                    name = b"%d-%d" % (worker, number)
                    await served.create(name)
                    acknowledged.append(name)

            workers = [asyncio.ensure_future(work(worker)) for worker in range(8)]
            for _ in range(2):
                wanted = len(acknowledged) + 200
                await until(lambda wanted=wanted: len(acknowledged) >= wanted)
                own_server.kill()
                await asyncio.to_thread(own_server.start)
            wanted = len(acknowledged) + 50
            await until(lambda: len(acknowledged) >= wanted)
            stop.set()
            await asyncio.gather(*workers)
            assert await served.names() == sorted(acknowledged)
        async with volume(own_server.dsn(), served.store.name) as again:
            assert await again.names() == sorted(acknowledged)
            assert (await again.service.usage()).inodes == 1 + len(acknowledged)

    run(test)


def test_a_database_that_stays_away(own_server: PostgresServer) -> None:
    """Operations end with EIO after the deadline, and go on by themselves when it is back."""

    async def test() -> None:
        async with volume(own_server.dsn(), deadline=1.0) as served:
            await served.create(b"f")
            own_server.stop()
            for _ in range(2):
                with fails(EIO):
                    await served.create(b"g")
            with fails(EIO):
                await served.names()
            await asyncio.to_thread(own_server.start)
            await served.create(b"h")
            assert await served.names() == [b"f", b"h"]
            assert (await served.service.usage()).inodes == 3
            own_server.stop()
            with fails(EHOSTUNREACH):
                await PostgresStore.open(own_server.dsn(), "x")
            await asyncio.to_thread(own_server.start)

    run(test)


def test_a_full_database() -> None:
    async def test() -> None:
        async with volume(server.dsn("small")) as served:
            name = itertools.count()
            with fails(ENOSPC):
                while True:
                    made = await served.create(b"%d" % next(name))
                    await served.service.set_xattr(made.ino, b"user.x", os.urandom(60_000))
            # The bigger ones find no room; what was there is there, and there is no half of anything.
            inos = [inode for _, inode in await served.service.list_dir_plus(ROOT_INO, 0, 10_000)]
            assert len(inos) >= 10
            for inode in inos[:-1]:
                assert len(await served.service.get_xattr(inode.ino, b"user.x")) == 60_000
            assert (await served.service.usage()).inodes == 1 + len(inos)
            filler().unlink()
            for number in range(len(inos)):
                await served.service.unlink(ROOT_INO, b"%d" % number)
            await served.service.release_orphans([inode.ino for inode in inos])
            made = await served.create(b"again")
            await served.service.set_xattr(made.ino, b"user.x", os.urandom(60_000))

    def filler() -> Path:
        assert server._process is not None
        return Path(f"/proc/{server._process.pid}/root{space}/filler")

    server = PostgresServer()
    space = server.path / "space"
    mount = f'mount -t tmpfs -o size=16m,uid={server.user},mode=700 none {space} && exec "$@"'
    server._wrapper = ("unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh")
    space.mkdir()
    try:
        server.start()
        server.sql(f"CREATE TABLESPACE small LOCATION '{space}'")
        server.sql("CREATE DATABASE small TABLESPACE small")
        filler().write_bytes(bytes(3 << 20))
        run(test)
    finally:
        server.discard()


def test_what_is_no_database(postgres_server: PostgresServer, tmp_path: Any) -> None:
    async def test() -> None:
        for dsn, number, text in (
            (postgres_server.dsn("nothing"), ENOENT, "createdb"),
            (f"postgresql://u:secret@127.0.0.1:1/x?host={tmp_path}", EHOSTUNREACH, "start it"),
            ("postgresql://127.0.0.1:port/x", EINVAL, "no address"),
        ):
            with pytest.raises(OSError) as caught:
                await PostgresStore.open(dsn, "x")
            assert caught.value.errno == number
            assert text in caught.value.strerror and "\n" not in caught.value.strerror
            assert "secret" not in caught.value.strerror
        with pytest.raises(FileNotFoundError, match="no volume nothing"):
            await PostgresStore.open(postgres_server.dsn(), "nothing")

    run(test)
