"""Several servers on one volume, several volumes in one database, and the versions of its tables."""

from __future__ import annotations

import asyncio
import os
from errno import EBUSY, EROFS, ESTALE

import pytest

from polefs.meta.model import ROOT_INO, SetAttr
from polefs.meta.store.base import FormatError
from polefs.meta.store.postgres import PostgresStore, database, tables
from tests.postgres.server import PostgresServer
from tests.postgres.volumes import Served, run, volume
from tests.unit.meta_helpers import fails

# Several servers


def test_one_server_is_active(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        dsn = postgres_server.dsn()
        async with volume(dsn, lease=6.0, who="the first") as first:
            name = first.store.name
            with pytest.raises(OSError, match="the first") as caught:
                await PostgresStore.open(dsn, name)
            assert caught.value.errno == EBUSY
            standby = asyncio.ensure_future(PostgresStore.open(dsn, name, wait=True))
            await first.create(b"f")
            assert not standby.done()
            await first.store.close()
            second = Served(await standby)
            assert await second.names() == [b"f"]
            await second.store.close()
            with fails(EROFS):
                await first.create(b"g")

    run(test)


def test_a_server_that_hangs_is_deposed_and_changes_nothing(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        dsn = postgres_server.dsn()
        async with volume(dsn, lease=0.2) as first:
            store = first.store
            await first.create(b"f")
            # As if its process had been stopped: no sign of life comes.
            assert store._heartbeat is not None
            store._heartbeat.cancel()
            async with volume(dsn, store.name, wait=True) as second:
                assert store.cached_entry(ROOT_INO, b"f") is None
                late = await asyncio.gather(
                    first.create(b"late"),
                    first.service.lookup(ROOT_INO, b"f"),
                    first.service.set_attributes(ROOT_INO, SetAttr(mode=0)),
                    return_exceptions=True,
                )
                assert [getattr(error, "errno", None) for error in late] == [ESTALE] * 3
                await second.create(b"g")
                assert await second.names() == [b"f", b"g"]
                assert (await second.service.get_inode(ROOT_INO)).mode & 0o777 == 0o755
            with fails(ESTALE):
                await first.names()

    run(test)


def test_force_deposes_at_once(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        dsn = postgres_server.dsn()
        async with volume(dsn, lease=3600.0) as first:
            await first.create(b"f")
            async with volume(dsn, first.store.name, force=True) as second:
                with fails(ESTALE):
                    await first.create(b"late")
                assert await second.names() == [b"f"]

    run(test)


def test_of_many_that_stand_by_one_takes_over(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        dsn = postgres_server.dsn()
        async with volume(dsn) as first:
            name = first.store.name
        opened = [asyncio.ensure_future(PostgresStore.open(dsn, name, wait=True, lease=30.0)) for _ in range(4)]
        served: list[bytes] = []
        while opened:
            done, _ = await asyncio.wait(opened, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1
            (task,) = done
            opened.remove(task)
            active = Served(task.result())
            served.append(b"%d" % len(served))
            await active.create(served[-1])
            assert await active.names() == served
            await active.store.close()

    run(test)


# The database of volumes


def test_many_servers_make_the_tables_at_once(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        dsn = postgres_server.new_database()
        stores = await asyncio.gather(*(PostgresStore.create(dsn, name=f"v{number}") for number in range(6)))
        for store in stores:
            await store.close()
        opened = await database.open_database(dsn)
        volumes = await database.list_volumes(opened)
        assert [each.name for each in volumes] == [f"v{number}" for number in range(6)]
        assert await opened.fetchval("SELECT version FROM version") == tables.VERSION
        await opened.close()

    run(test)


def test_versions(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        dsn = postgres_server.new_database()
        with pytest.raises(FormatError, match="holds no volumes"):
            await database.open_database(dsn, read_only=True)
        opened = await database.open_database(dsn)
        await opened.execute("UPDATE version SET version = $1", tables.VERSION + 1)
        with pytest.raises(FormatError, match="upgrade polefs"):
            await database.open_database(dsn)
        # A migration that was cut off in the middle is done again.
        await opened.execute("UPDATE version SET version = 0")
        await (await database.open_database(dsn)).close()
        assert await opened.fetchval("SELECT version FROM version") == tables.VERSION
        await opened.close()

    run(test)


def test_volumes_of_one_database(postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(database, "_CHUNK", 7)
        dsn = postgres_server.new_database()
        async with volume(dsn) as one, volume(dsn) as two:
            with pytest.raises(FileExistsError):
                await PostgresStore.create(dsn, name=one.store.name)
            await asyncio.gather(*(each.create(b"%d" % number) for each in (one, two) for number in range(20)))
            await one.service.unlink(ROOT_INO, b"5")
            assert len(await one.names()) == 19 and len(await two.names()) == 20
            opened = await database.open_database(dsn)
            assert [each.holder for each in await database.list_volumes(opened)] == [
                f"{os.uname().nodename}, process {os.getpid()}"
            ] * 2
            await database.delete_volume(opened, one.store.name)
            with fails(ESTALE):
                await one.create(b"x")
            with pytest.raises(FileNotFoundError):
                await database.delete_volume(opened, one.store.name)
            assert await opened.fetch("SELECT DISTINCT volume FROM dentry") == [(two.store.volume.id,)]
            assert len(await two.names()) == 20
            await opened.close()

    run(test)


def test_read_only_beside_the_active_server(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        dsn = postgres_server.dsn()
        async with volume(dsn) as active, volume(dsn, active.store.name, read_only=True) as reader:
            for number in range(3):
                await active.create(b"%d" % number)
                assert len(await reader.names()) == number + 1
            with fails(EROFS):
                await reader.create(b"x")

    run(test)
