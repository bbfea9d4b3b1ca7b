"""The PostgreSQL store: batches, what is seen of them, round trips, and how statements are executed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from errno import EEXIST, EIO, ENOENT
from typing import Any

import pytest

from polefs.meta.model import ROOT_INO, DataCommit, Extent, Inode, Segment, SetAttr
from polefs.meta.service import MetaService
from tests.postgres.server import PostgresServer
from tests.postgres.volumes import ROOT, Served, run, until, volume
from tests.unit.meta_helpers import change_and_fail

# Batches


def test_operations_of_a_turn_are_one_transaction(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        async with volume(postgres_server.dsn()) as served:
            await served.service.lookup(ROOT_INO, b".")
            before = served.commits
            made = await asyncio.gather(*(served.create(b"%d" % number) for number in range(50)))
            assert served.commits == before + 1
            assert len({inode.ino for inode in made}) == 50

    run(test)


def test_what_comes_during_a_commit_is_the_next_batch(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        async with volume(postgres_server.dsn()) as served:
            await asyncio.gather(
                *(served.service.lookup(ROOT_INO, b"%d" % number) for number in range(21)), return_exceptions=True
            )
            before = served.commits
            first = asyncio.ensure_future(served.create(b"0"))
            await until(lambda: served.store._committing is not None)
            others = [asyncio.ensure_future(served.create(b"%d" % number)) for number in range(1, 21)]
            await asyncio.gather(first, *others)
            assert served.commits == before + 2

    run(test)


def test_a_failed_operation_leaves_its_batch_alone(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        async with volume(postgres_server.dsn()) as served:
            one, again, missing, broken, two = await asyncio.gather(
                served.create(b"1"),
                served.create(b"1"),
                served.service.unlink(ROOT_INO, b"x"),
                served.store.write(change_and_fail),
                served.create(b"2"),
                return_exceptions=True,
            )
            assert isinstance(one, Inode) and isinstance(two, Inode)
            assert [error.errno for error in (again, missing, broken)] == [EEXIST, ENOENT, EIO]
            assert await served.names() == [b"1", b"2"]
            assert (await served.service.usage()).inodes == 3

    run(test)


def test_a_cancelled_caller_disturbs_nobody(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        async with volume(postgres_server.dsn()) as served:
            for cancel_at in range(1, 6):
                tasks = [asyncio.ensure_future(served.create(b"%d-%d" % (cancel_at, number))) for number in range(3)]
                for _ in range(cancel_at):
                    await asyncio.sleep(0)
                tasks[1].cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert isinstance(results[0], Inode) and isinstance(results[2], Inode)

    run(test)


def test_nobody_sees_what_is_not_committed(postgres_server: PostgresServer) -> None:
    """Who reads, or is refused, because of a change of another returns after that one's commit."""

    async def test() -> None:
        async with volume(postgres_server.dsn()) as served:
            service, store = served.service, served.store
            folder = await served.mkdir(b"d")
            await service.list_dir(ROOT_INO, 0, 10)
            gate = asyncio.Event()
            commit = store._writer.commit

            async def held(*arguments: Any) -> None:
                await gate.wait()
                await commit(*arguments)

            store._writer.commit = held  # type: ignore[method-assign]
            made = asyncio.ensure_future(served.create(b"f"))
            await until(lambda: store._committing is not None)
            assert store.cached_entry(ROOT_INO, b"f") is None
            assert store.cached_inode(ROOT_INO) is None
            assert store.cached_inode(folder.ino) is not None
            readers = [
                asyncio.ensure_future(each)
                for each in (
                    service.lookup(ROOT_INO, b"f"),
                    service.list_dir(ROOT_INO, 0, 10),
                    service.list_dir_plus(ROOT_INO, 0, 10),
                    service.get_inode(ROOT_INO),
                    served.create(b"f"),
                )
            ]
            # Not held up: nothing of it has changed.
            await service.get_inode(folder.ino)
            await service.extents((await service.lookup(ROOT_INO, b"d")).ino, 0, 10)
            assert not any(reader.done() for reader in readers)
            gate.set()
            found, listed, with_inodes, _, refused = await asyncio.gather(*readers, return_exceptions=True)
            assert found == await made
            assert [each.name for each in listed] == [each.name for each, _ in with_inodes] == [b"d", b"f"]
            assert isinstance(refused, OSError) and refused.errno == EEXIST

    run(test)


def test_tiny_caches_and_many_at_once(postgres_server: PostgresServer) -> None:
    async def test() -> None:
        async with volume(postgres_server.dsn(), cache=(2, 1, 2)) as served:
            service = served.service
            folders = [await served.mkdir(b"d%d" % number) for number in range(4)]

            async def work(worker: int) -> None:
                folder, other = folders[worker % 4].ino, folders[(worker + 1) % 4].ino
                for number in range(6):
                    name = b"%d-%d" % (worker, number)
                    made = await served.create(name, folder)
                    await service.commit_data([], [DataCommit(made.ino, 3, None, inline=b"abc")])
                    if number % 3 == 0:
                        await service.rename(ROOT, folder, name, other, name)
                    elif number % 3 == 1:
                        await service.release_orphans([(await service.unlink(folder, name)).ino])
                    await service.list_dir_plus(folder, 0, 5)

            await asyncio.gather(*(work(worker) for worker in range(12)))
            for position, folder in enumerate(folders):
                kept = [b"%d-%d" % (worker, number) for worker in range(position, 12, 4) for number in (2, 5)]
                moved = [
                    b"%d-%d" % (worker, number) for worker in range((position - 1) % 4, 12, 4) for number in (0, 3)
                ]
                assert await served.names(folder.ino) == sorted(kept + moved)
            usage = await service.usage()
            assert (usage.inodes, usage.bytes) == (5 + 12 * 4, 12 * 4 * 3)

    run(test)


# Round trips


async def fill(served: Served) -> dict[str, int]:
    service = served.service
    inos = {}
    for name in (b"a", b"b", b"empty"):
        inos[name.decode()] = (await served.mkdir(name)).ino
    inos["deep"] = (await served.mkdir(b"deep", (await served.mkdir(b"mid", inos["b"])).ino)).ino
    inos["moved"] = (await served.mkdir(b"moved", inos["a"])).ino
    inos["f"] = (await served.create(b"f", inos["a"])).ino
    inos["g"] = (await served.create(b"g", inos["a"])).ino
    first = await service.allocate_segments(2)
    inos["segment"] = first
    segments = [Segment(first + number, 1000, ((1000, 1000, 0),)) for number in range(2)]
    parts = [Extent(100 * number, 100, first, 100 * number) for number in range(10)]
    await service.commit_data(segments[:1], [DataCommit(inos["f"], 1000, None, extents=parts)])
    inos["s"] = (await service.make_node(ROOT, inos["a"], b"s", 0o120777, 0, 0, b"target")).ino
    await service.set_xattr(inos["f"], b"user.a", b"1" * 2000)
    gone = await served.create(b"gone", inos["a"])
    await service.commit_data(segments[1:], [DataCommit(gone.ino, 100, None, extents=[Extent(0, 100, first + 1, 0)])])
    await service.unlink(inos["a"], b"gone")
    inos["gone"] = gone.ino
    return inos


OPERATIONS: dict[str, Callable[[MetaService, dict[str, int]], Awaitable[Any]]] = {
    "lookup": lambda s, i: s.lookup(i["a"], b"f"),
    "get_inode": lambda s, i: s.get_inode(i["f"]),
    "create": lambda s, i: s.make_node(ROOT, i["a"], b"new", 0o100644, 0),
    "mkdir": lambda s, i: s.make_node(ROOT, i["a"], b"new", 0o040755, 0),
    "symlink": lambda s, i: s.make_node(ROOT, i["a"], b"new", 0o120777, 0, 0, b"x"),
    "unnamed": lambda s, i: s.make_unnamed(ROOT, i["a"], 0o600, 0),
    "link": lambda s, i: s.link(i["f"], i["b"], b"new"),
    "unlink": lambda s, i: s.unlink(i["a"], b"f"),
    "rmdir": lambda s, i: s.rmdir(ROOT_INO, b"empty"),
    "rename": lambda s, i: s.rename(ROOT, i["a"], b"f", i["a"], b"h"),
    "rename over": lambda s, i: s.rename(ROOT, i["a"], b"f", i["a"], b"g"),
    "rename directory": lambda s, i: s.rename(ROOT, i["a"], b"moved", i["deep"], b"h"),
    "rename over directory": lambda s, i: s.rename(ROOT, i["a"], b"moved", ROOT_INO, b"empty"),
    "exchange": lambda s, i: s.rename(ROOT, i["a"], b"f", ROOT_INO, b"b", 2),
    "list": lambda s, i: s.list_dir(i["a"], 0, 100),
    "list plus": lambda s, i: s.list_dir_plus(i["a"], 0, 100),
    "read link": lambda s, i: s.read_link(i["s"]),
    "set attributes": lambda s, i: s.set_attributes(i["f"], SetAttr(mode=0o600, uid=5)),
    "touch": lambda s, i: s.touch_atime([(i["f"], 1), (i["g"], 2), (i["a"], 3)]),
    "get xattr": lambda s, i: s.get_xattr(i["f"], b"user.a"),
    "set xattr": lambda s, i: s.set_xattr(i["f"], b"user.b", b"2"),
    "replace xattr": lambda s, i: s.set_xattr(i["f"], b"user.a", b"2"),
    "list xattr": lambda s, i: s.list_xattr(i["f"]),
    "remove xattr": lambda s, i: s.remove_xattr(i["f"], b"user.a"),
    "extents": lambda s, i: s.extents(i["f"], 150, 800),
    "segments": lambda s, i: s.segments([i["segment"], i["segment"] + 1, 999]),
    "commit new": lambda s, i: s.commit_data(
        [Segment(500, 100, ((100, 100, 0),))],
        [DataCommit(i["g"], 100, None, extents=[Extent(0, 100, 500, 0)])],
    ),
    "commit over": lambda s, i: s.commit_data(
        [Segment(500, 400, ((400, 400, 0),))],
        [DataCommit(i["f"], 900, None, drops=[(700, 750)], extents=[Extent(150, 400, 500, 0)])],
    ),
    "commit inline": lambda s, i: s.commit_data([], [DataCommit(i["f"], 5, None, inline=b"small")]),
    "truncate": lambda s, i: s.commit_data([], [DataCommit(i["f"], 50, None)]),
    "clone": lambda s, i: s.clone_range(i["f"], 50, 500, i["g"], 0),
    "release": lambda s, i: s.release_orphans([i["gone"]]),
    "dead": lambda s, i: s.dead_segments(0, 0, 100),
    "usage": lambda s, i: s.usage(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_three_round_trips_at_most(
    postgres_server: PostgresServer, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with volume(postgres_server.dsn()) as served:
            inos = await fill(served)
            await served.store.sync()
            served.store._caches.clear()
            before = served.store.round_trips
            await OPERATIONS[operation](served.service, inos)
            assert served.store.round_trips - before <= 3
            # What is in memory needs no queries: one commit, or nothing.
            before = served.store.round_trips
            for _ in range(3):
                await served.service.lookup(inos["a"], b"g")
                await served.service.get_inode(inos["a"])
            assert served.store.round_trips - before <= 1

    run(test)
