"""The SQLite store: shared transactions, failures, durability, sessions, formats, and death at any moment."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from errno import EACCES, EEXIST, EIO, ENOENT, ENOSPC, EROFS, ESTALE
from pathlib import Path
from typing import Any

import pytest

from polefs.meta.check import check
from polefs.meta.model import ROOT_INO, DataCommit, Inode, SetAttr
from polefs.meta.service import MetaService
from polefs.meta.store import schema, sqlite
from polefs.meta.store.base import FormatError
from polefs.meta.store.redo import read_log
from polefs.meta.store.sqlite import SqliteStore
from polefs.meta.store.transaction import SqliteTransaction
from tests.unit.meta_helpers import ROOT, Meta, fails, meta

__all__ = ["meta"]


def create(meta: Meta, name: bytes) -> Any:
    return meta.service.make_node(ROOT, ROOT_INO, name, 0o100644, 0)


def commits(meta: Meta) -> int:
    assert meta.store._wal is not None
    return meta.store._wal.commits


# Transactions


def test_many_turns_are_one_transaction(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    meta.run(meta.service.sync())
    before = commits(meta)
    made = meta.together(*(create(meta, b"%d" % number) for number in range(50)))
    made += [meta.file(b"%d" % number) for number in range(50, 60)]
    assert commits(meta) == before
    assert len({inode.ino for inode in made}) == 60
    monkeypatch.setattr(sqlite, "_COMMIT_ROWS", 70)
    meta.file(b"60")
    assert commits(meta) == before + 1
    meta.reopen()
    assert len(meta.names()) == 61


def test_a_transaction_commits_after_a_moment(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    meta.run(meta.service.sync())
    before = commits(meta)
    committed = asyncio.Event()
    plain = meta.store._committed
    monkeypatch.setattr(meta.store, "_committed", lambda: (plain(), committed.set()))
    meta.file(b"f")
    meta.run(committed.wait())
    assert commits(meta) == before + 1 and not meta.store._connection.in_transaction


def test_a_failed_operation_leaves_its_turn_alone(meta: Meta) -> None:
    one, again, missing, two = meta.together(
        create(meta, b"1"), create(meta, b"1"), meta.service.unlink(ROOT_INO, b"x"), create(meta, b"2")
    )
    assert again.errno == EEXIST and missing.errno == ENOENT
    assert isinstance(one, Inode) and isinstance(two, Inode)
    assert meta.names() == [b"1", b"2"]


def test_an_operation_that_changes_nothing_commits_nothing(meta: Meta) -> None:
    file = meta.file(b"f")
    before = commits(meta)
    meta.release(file.ino)
    meta.rename(b"f", b"f")
    with fails(EEXIST):
        meta.file(b"f")
    assert commits(meta) == before


def test_a_write_returns_after_it_is_in_the_redo_log(meta: Meta) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(create(meta, b"f"))
        while (await asyncio.sleep(0)) or not task.done():
            if meta.store._turn:
                assert not task.done()

    meta.run(scenario())
    with sqlite3.connect(meta.path) as other:
        assert other.execute("SELECT count(*) FROM dentry").fetchone() == (0,)
        (generation,) = other.execute("SELECT redo FROM volume").fetchone()
    other.close()
    assert len(read_log(meta.path + "-redo", generation)) == 1


def test_a_cancelled_caller_disturbs_nobody(meta: Meta) -> None:
    async def scenario() -> None:
        tasks = [asyncio.create_task(create(meta, b"%d" % number)) for number in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert isinstance(results[0], Inode) and isinstance(results[2], Inode)

    meta.run(scenario())
    assert meta.names() == [b"0", b"1", b"2"]


async def _fail_late(tx: SqliteTransaction, error: Exception) -> None:
    await tx.add_orphan(4711, 0)
    raise error


@pytest.mark.parametrize("error", [OSError(EEXIST, "late"), ValueError("bug"), sqlite3.OperationalError("odd")])
def test_a_failure_after_a_change_takes_the_turn_back(
    meta: Meta, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    before = meta.file(b"before")
    usage = meta.run(meta.service.usage())
    first, broken, last = meta.together(create(meta, b"1"), meta.store.write(_fail_late, error), create(meta, b"2"))
    assert isinstance(first, OSError) and first.errno == EIO
    assert isinstance(broken, OSError) and broken.errno == EIO
    assert isinstance(last, Inode)
    assert meta.names() == [b"2", b"before"]
    assert meta.get(before.ino) == before
    used = meta.run(meta.service.usage())
    assert used.inodes == usage.inodes + 1
    assert any(record.levelno >= logging.ERROR for record in caplog.records)
    with fails(ENOENT):
        meta.lookup(b"1")


def test_disk_full(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    pages = meta.store._execute("PRAGMA page_count").fetchone()[0]
    meta.store._execute(f"PRAGMA max_page_count = {pages + 20}")
    with fails(ENOSPC):
        for number in range(1000):
            meta.set_xattr(ino, b"user.%d" % number, b"x" * 5000)
    assert len(meta.list_xattr(ino)) == number
    meta.assert_clean()
    meta.store._execute("PRAGMA max_page_count = 1000000")
    meta.file(b"g")


class FailingCommit:
    """``sqlite3.Connection.execute``, whose next COMMIT fails as the disk would."""

    def __init__(self, meta: Meta, error: sqlite3.Error) -> None:
        self._execute = meta.store._execute
        self._error: sqlite3.Error | None = error

    def __call__(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._execute(statement, *parameters)


@pytest.mark.parametrize(("code", "expected"), [(sqlite3.SQLITE_FULL, ENOSPC), (sqlite3.SQLITE_IOERR_WRITE, EIO)])
def test_a_failed_commit_fails_its_operations(
    meta: Meta, monkeypatch: pytest.MonkeyPatch, code: int, expected: int
) -> None:
    monkeypatch.setattr(sqlite, "_COMMIT_ROWS", 5)
    kept = meta.file(b"kept")
    error = sqlite3.OperationalError("the disk")
    error.sqlite_errorcode = code
    monkeypatch.setattr(meta.store, "_execute", FailingCommit(meta, error))
    results = meta.together(create(meta, b"1"), meta.service.unlink(ROOT_INO, b"kept"), create(meta, b"2"))
    assert [result.errno for result in results] == [expected] * 3
    assert meta.names() == [b"kept"] and meta.lookup(b"kept") == kept
    assert meta.run(meta.service.usage()).inodes == 2
    assert isinstance(meta.file(b"1"), Inode)
    meta.reopen()
    assert meta.names() == [b"1", b"kept"]


# Durability


def test_sync_is_shared_and_skipped(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), time.sleep(0.01), fdatasync(fd))[2])

    async def scenario() -> None:
        await meta.service.sync()
        assert len(calls) == 1
        await meta.service.sync()
        assert len(calls) == 1
        await create(meta, b"f")
        await asyncio.gather(*(meta.service.sync() for _ in range(20)))
        assert len(calls) == 2
        await create(meta, b"g")
        first = asyncio.create_task(meta.service.sync())
        await asyncio.sleep(0)
        await create(meta, b"h")
        # The running one may have begun before the commit of h, so this one needs its own.
        await meta.service.sync()
        assert len(calls) == 4 and first.done()

    meta.run(scenario())


def test_a_failed_sync_stays_failed(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(EIO, "the disk")

    meta.file(b"f")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with fails(EIO):
            meta.run(meta.service.sync())
    with fails(EIO):
        meta.run(meta.service.sync())


def test_checkpoints_bound_the_log(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_WAL_ROWS", 500)
    meta.store._checkpoint_at = 500

    async def scenario() -> None:
        for number in range(3000):
            await create(meta, b"%d" % number)

    meta.run(scenario())
    # 3000 creates write about 15 MB of log.
    assert os.stat(meta.path + "-wal").st_size < 7_500_000
    assert len(meta.names()) == 3000
    meta.assert_clean()
    meta.crash()
    assert len(meta.names()) == 3000
    assert meta.run(meta.service.usage()).inodes == 3001


def test_a_reader_in_another_process_only_delays_the_checkpoint(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_WAL_ROWS", 100)
    meta.store._checkpoint_at = 100
    monkeypatch.setattr(sqlite, "_COMMIT_ROWS", 10)
    meta.file(b"first")
    meta.run(meta.service.sync())
    reader = sqlite3.connect(meta.path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM dentry").fetchone() == (1,)

    async def scenario() -> None:
        for number in range(300):
            await create(meta, b"%d" % number)

    meta.run(scenario())
    assert reader.execute("SELECT count(*) FROM dentry").fetchone() == (1,)
    reader.close()
    meta.run(scenario_again(meta))
    assert len(meta.names()) == 601


async def scenario_again(meta: Meta) -> None:
    for number in range(300, 600):
        await create(meta, b"%d" % number)


CHILD = """
import asyncio, os, sys
from polefs.meta.model import Caller
from polefs.meta.service import MetaService
from polefs.meta.store import sqlite
from polefs.meta.store.sqlite import SqliteStore

sqlite._WAL_ROWS = 2000
sqlite._COMMIT_ROWS = int(sys.argv[2])

async def work(service, worker):
    number = 0
    caller = Caller(0, 0)
    folder = (await service.make_node(caller, 1, b"w%d" % worker, 0o040755, 0)).ino
    while True:
        name = b"%d" % number
        await service.make_node(caller, folder, name, 0o100644, 0)
        os.write(1, b"+ %d %d\\n" % (worker, number))
        if number % 3 == 0:
            await service.rename(caller, folder, name, folder, b"r" + name)
            os.write(1, b"> %d %d\\n" % (worker, number))
        elif number % 3 == 1:
            inode = await service.unlink(folder, name)
            os.write(1, b"- %d %d\\n" % (worker, number))
            await service.release_orphans([inode.ino])
        number += 1

async def main():
    service = MetaService(SqliteStore.open(sys.argv[1]))
    await service.start()
    await asyncio.gather(*(work(service, worker) for worker in range(4)))

asyncio.run(main())
"""


@pytest.mark.parametrize(("lines", "rows"), [(1, 1000), (150, 1000), (700, 10), (3000, 300), (10000, 1000)])
def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path: Path, lines: int, rows: int) -> None:
    path = str(tmp_path / "meta.db")
    SqliteStore.create(path, name="test").shutdown()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, path, str(rows)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    log = [child.stdout.readline() for _ in range(lines)]
    child.send_signal(signal.SIGKILL)
    log += child.stdout.readlines()
    child.stdout.close()
    child.wait()
    states: dict[tuple[int, int], bytes] = {}
    for line in log:
        if line.endswith(b"\n"):
            what, worker, number = line.split()
            states[int(worker), int(number)] = what
    meta = Meta(tmp_path)
    workers = {worker for worker, _ in states}
    found = {worker: set(meta.names(meta.lookup(b"w%d" % worker).ino)) for worker in workers}
    for (worker, number), what in states.items():
        name, renamed = b"%d" % number, b"r%d" % number
        # The one after the last acknowledged may or may not have happened.
        if what == b">":
            assert renamed in found[worker] and name not in found[worker]
        elif what == b"-":
            assert name not in found[worker]
        elif number % 3 == 2:
            assert name in found[worker]
        elif number % 3 == 0:
            assert (name in found[worker]) != (renamed in found[worker])
    meta.assert_clean()
    meta.close()


# Sessions and formats


def test_a_session_that_was_taken_over_is_refused(tmp_path: Path) -> None:
    old = Meta(tmp_path)
    old.file(b"1")
    old.run(old.service.sync())
    new = Meta(tmp_path)
    # Refused when the new one has written, and when it is in the middle of that.
    for number in range(2):
        with fails(ESTALE):
            old.file(b"2")
        with fails(ESTALE):
            old.run(old.service.touch_atime([(1, 1)]))
        new.file(b"new%d" % number)
    assert len(new.names()) == 3
    old.run(old.store.close())
    old.runner.close()
    new.assert_clean()
    new.close()


def test_counts_after_a_crash(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    meta.commit(ino, 100, inline=b"x" * 100)
    meta.crash()
    usage = meta.run(meta.service.usage())
    assert (usage.bytes, usage.inodes) == (100, 2)


def test_the_volume_row(tmp_path: Path) -> None:
    path = str(tmp_path / "with space%3f?#.db")
    before = time.time_ns()
    store = SqliteStore.create(path, name="päth", bytes_limit=5, inodes_limit=6)
    identity = store.uuid
    store.shutdown()
    store.shutdown()
    store = SqliteStore.open(path)
    assert store.name == "päth" and store.uuid == identity and store.durability == "local"
    assert before <= store.created <= time.time_ns()
    assert (store._usage.bytes_limit, store._usage.inodes_limit) == (5, 6)
    assert list(check(store)) == []
    store.shutdown()
    assert sorted(os.listdir(tmp_path)) == ["with space%3f?#.db"]


def test_the_caches_are_bounded(tmp_path: Path) -> None:
    """And what leaves them in the middle of a turn, before it is written to the database, is not lost."""
    path = str(tmp_path / "meta.db")
    SqliteStore.create(path, name="x").shutdown()
    store = SqliteStore.open(path, cache=(8, 4, 8))
    service = MetaService(store)

    async def make(number: int) -> Inode:
        inode = await service.make_node(ROOT, ROOT_INO, b"%d" % number, 0o100644, 0)
        if number % 2:
            content = b"%d" % number
            await service.commit_data([], [DataCommit(inode.ino, len(content), 1, inline=content)])
        return await service.set_attributes(inode.ino, SetAttr(uid=number))

    async def work() -> None:
        await service.start()
        made = await asyncio.gather(*(make(number) for number in range(100)))
        caches = store._tx._caches
        for _ in range(2):
            assert (len(caches.inodes), len(caches.inlined), len(caches.names)) == (8, 4, 8)
            for number, inode in enumerate(made):
                found = await service.lookup(ROOT_INO, b"%d" % number)
                assert (found.ino, found.uid) == (inode.ino, number)
                assert found.inline == (b"%d" % number if number % 2 else None)
        assert sorted(inode.uid for _, inode in await service.list_dir_plus(ROOT_INO, 0, 1000)) == [*range(100)]
        await service.close()

    asyncio.run(work())


def test_create_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        SqliteStore.create(str(path), name="x")
    assert path.read_bytes() == b"precious"


def test_formats(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SqliteStore.open(str(tmp_path / "none"))
    path = tmp_path / "meta.db"
    for content in (b"", b"no database at all" * 100):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not a database of polefs"):
            SqliteStore.open(str(path))
    path.unlink()
    SqliteStore.create(str(path), name="x").shutdown()
    for version, message in ((schema.FORMAT + 1, "upgrade polefs"), (0, "unknown format")):
        connection = sqlite3.connect(path)
        connection.execute(f"PRAGMA user_version = {version}")
        connection.close()
        with pytest.raises(FormatError, match=message):
            SqliteStore.open(str(path))


def test_read_only_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = Meta(tmp_path)
    meta.file(b"f")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with fails(EACCES):
        SqliteStore.open(meta.path, read_only=True)
    meta.close()
    with fails(EACCES):
        SqliteStore.open(meta.path)
    store = SqliteStore.open(meta.path, read_only=True)
    assert list(check(store)) == []
    store.shutdown()
    assert os.listdir(tmp_path) == ["meta.db"]


def test_after_the_end(tmp_path: Path) -> None:
    meta = Meta(tmp_path)
    service = meta.service
    meta.run(service.close())
    with fails(EROFS):
        meta.run(service.make_node(ROOT, ROOT_INO, b"f", 0o100644, 0))
    meta.runner.close()
