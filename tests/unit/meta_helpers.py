"""What the tests of the meta service share: a volume on SQLite or PostgreSQL, driven from plain test functions."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest

from polefs.meta.check import check
from polefs.meta.model import ROOT_INO, Caller, DataCommit, Extent, Inode, Segment, SetAttr
from polefs.meta.service import MetaService
from polefs.meta.store.postgres import PostgresStore, tables
from polefs.meta.store.sqlite import SqliteStore
from tests.postgres.server import PostgresServer

T = TypeVar("T")


def examples(count: int) -> int:
    """How many examples a hypothesis test tries: 20 times as many with POLEFS_STRESS=1 in the environment."""
    return count * 20 if os.environ.get("POLEFS_STRESS") == "1" else count


ROOT = Caller(0, 0)
USER = Caller(1000, 100)


class Meta:
    """A meta service with blocking calls and short names for what tests do most. This one on SQLite."""

    store: Any

    def __init__(self, path: Path, **limits: int) -> None:
        self.path = str(path / "meta.db")
        self.runner = asyncio.Runner()
        self._start(limits)

    def _start(self, limits: dict[str, int]) -> None:
        exists = Path(self.path).exists()
        self.store = SqliteStore.open(self.path) if exists else SqliteStore.create(self.path, name="test", **limits)
        self.service = MetaService(self.store)
        self.run(self.service.start())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def together(self, *coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
        """All in one turn of the loop; exceptions are results."""

        async def gather() -> list[Any]:
            return await asyncio.gather(*coroutines, return_exceptions=True)

        return self.run(gather())

    def close(self) -> None:
        if self.store is not None:
            self.run(self.service.close())
        self.runner.close()

    def reopen(self) -> None:
        self.run(self.service.close())
        self._open()

    def crash(self) -> None:
        """Go on with a new session as if the process of the old one had died."""
        self.kill()
        self._open()

    def kill(self) -> None:
        """Leave what a process leaves that is killed: what its transaction holds is gone. Checkpoints end first."""

        async def settle() -> None:
            while self.store._checkpoint is not None:
                await asyncio.wait([self.store._checkpoint])

        store = self.store
        self.run(settle())
        store._stop_timer()
        store._roll_back()
        store._let_go()
        store._connection.close()
        store._closed = True
        assert store._redo is not None and store._wal is not None
        store._redo.close(remove=False)
        store._wal._threads.shutdown()
        store._wal._connection.close()
        os.close(store._wal._fd)

    def _open(self) -> None:
        self.store = SqliteStore.open(self.path)
        self.service = MetaService(self.store)
        self.run(self.service.start())

    def open_read_only(self) -> Any:
        return SqliteStore.open(self.path, read_only=True)

    def forget_caches(self) -> None:
        self.store._tx._caches.clear()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What a query in SQLite's words finds."""
        return list(self.store.rows(query))

    def assert_clean(self) -> None:
        assert list(check(self.store)) == []

    # Names

    def file(self, name: bytes, parent: int = ROOT_INO, mode: int = 0o644, caller: Caller = ROOT) -> Inode:
        return self.run(self.service.make_node(caller, parent, name, 0o100000 | mode, 0))

    def mkdir(self, name: bytes, parent: int = ROOT_INO, mode: int = 0o755, caller: Caller = ROOT) -> Inode:
        return self.run(self.service.make_node(caller, parent, name, 0o040000 | mode, 0))

    def symlink(self, name: bytes, target: bytes, parent: int = ROOT_INO) -> Inode:
        return self.run(self.service.make_node(ROOT, parent, name, 0o120777, 0, 0, target))

    def lookup(self, name: bytes, parent: int = ROOT_INO) -> Inode:
        return self.run(self.service.lookup(parent, name))

    def get(self, ino: int) -> Inode:
        return self.run(self.service.get_inode(ino))

    def link(self, ino: int, name: bytes, parent: int = ROOT_INO) -> Inode:
        return self.run(self.service.link(ino, parent, name))

    def unlink(self, name: bytes, parent: int = ROOT_INO) -> Inode:
        return self.run(self.service.unlink(parent, name))

    def rmdir(self, name: bytes, parent: int = ROOT_INO) -> Inode:
        return self.run(self.service.rmdir(parent, name))

    def rename(
        self, name: bytes, new_name: bytes, parent: int = ROOT_INO, new_parent: int | None = None, flags: int = 0
    ) -> Inode | None:
        new_parent = parent if new_parent is None else new_parent
        return self.run(self.service.rename(ROOT, parent, name, new_parent, new_name, flags))

    def release(self, *inos: int) -> None:
        self.run(self.service.release_orphans(inos))

    def names(self, ino: int = ROOT_INO) -> list[bytes]:
        return sorted(dentry.name for dentry in self.run(self.service.list_dir(ino, 0, 1 << 30)))

    # Attributes

    def set(self, ino: int, **change: Any) -> Inode:
        return self.run(self.service.set_attributes(ino, SetAttr(**change)))

    def set_xattr(self, ino: int, name: bytes, value: bytes, flags: int = 0, kill_sgid: bool = False) -> None:
        self.run(self.service.set_xattr(ino, name, value, flags, kill_sgid))

    def get_xattr(self, ino: int, name: bytes) -> bytes:
        return self.run(self.service.get_xattr(ino, name))

    def list_xattr(self, ino: int) -> list[bytes]:
        return self.run(self.service.list_xattr(ino))

    def remove_xattr(self, ino: int, name: bytes) -> None:
        self.run(self.service.remove_xattr(ino, name))

    # Contents

    def segment(self, size: int = 1 << 20) -> Segment:
        return Segment(self.run(self.service.allocate_segments(1)), size, ((size, size, 0),))

    def commit(
        self,
        ino: int,
        size: int,
        *,
        mtime: int | None = None,
        segments: tuple[Segment, ...] = (),
        drops: list[tuple[int, int]] | None = None,
        extents: list[Extent] | None = None,
        inline: bytes | None = None,
    ) -> None:
        commit = DataCommit(ino, size, mtime, drops or [], extents or [], inline)
        self.run(self.service.commit_data(segments, [commit]))

    def extents(self, ino: int, start: int = 0, end: int = 1 << 62) -> list[tuple[int, int, int, int]]:
        found = self.run(self.service.extents(ino, start, end))
        return [(each.offset, each.length, each.segment, each.segment_offset) for each in found]

    def dead(self) -> list[int]:
        return self.run(self.service.dead_segments(0, 0, 1000))


class PostgresMeta(Meta):
    """The same on PostgreSQL."""

    def __init__(
        self, path: Path, dsn: str, *, cache: tuple[int, int, int] = (65536, 8192, 65536), **limits: int
    ) -> None:
        self.dsn = dsn
        self._cache = cache
        super().__init__(path, **limits)

    def _start(self, limits: dict[str, int]) -> None:
        self.store = self.run(PostgresStore.create(self.dsn, name=self.path, cache=self._cache, **limits))
        self.service = MetaService(self.store)
        self.run(self.service.start())

    def _open(self) -> None:
        self.store = self.run(PostgresStore.open(self.dsn, self.path, force=True, cache=self._cache))
        self.service = MetaService(self.store)
        self.run(self.service.start())

    def open_read_only(self) -> Any:
        return self.run(PostgresStore.open(self.dsn, self.path, read_only=True))

    def kill(self) -> None:
        async def end() -> None:
            store = self.store
            store._closed = True
            store._heartbeat.cancel()
            if store._committing is not None:
                store._committing.cancel()
            store._writer._drop()
            for connection in store._connections._all:
                connection.terminate()

        self.run(end())

    def forget_caches(self) -> None:
        self.store._caches.clear()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with self._copied() as copy:
            return list(copy.rows(query))

    def assert_clean(self) -> None:
        with self._copied() as copy:
            assert list(check(copy)) == []

    @contextmanager
    def _copied(self) -> Iterator[SqliteStore]:
        """All rows in a database of SQLite."""
        with tempfile.TemporaryDirectory() as place:
            path = os.path.join(place, "meta.db")
            SqliteStore.create(path, name="copy").shutdown()
            copied = sqlite3.connect(path)
            self.run(self._copy(copied))
            copied.close()
            copy = SqliteStore.open(path)
            yield copy
            copy.shutdown()

    async def _copy(self, to: sqlite3.Connection) -> None:
        await self.store.sync()
        connection = await asyncpg.connect(self.dsn, server_settings={"search_path": tables.SCHEMA})
        volume = self.store.volume.id
        to.execute("DELETE FROM inode")
        for table in tables.TABLES:
            columns = ", ".join(f'"{column}"' for column in table.columns)
            rows = await connection.fetch(f"SELECT {columns} FROM {table.name} WHERE volume = $1", volume)
            marks = ", ".join("?" * len(table.columns))
            to.executemany(f"INSERT INTO {table.name}({columns}) VALUES ({marks})", [tuple(row) for row in rows])
        row = await connection.fetchrow(
            "SELECT next_ino, next_cookie, next_segment, next_session, bytes, inodes FROM volume WHERE id = $1", volume
        )
        to.execute("UPDATE volume SET next_ino = ?, next_cookie = ?, next_segment = ?, next_session = ?", row[:4])
        to.execute("UPDATE usage SET bytes = ?, inodes = ?, exact = 1", row[4:])
        to.commit()
        await connection.close()


async def change_and_fail(tx: Any) -> None:
    """A body with a bug: what it has changed is taken back."""
    await tx.add_orphan(4711, 0)
    raise ValueError("bug")


@contextmanager
def fails(code: int) -> Iterator[None]:
    """The block raises OSError with this errno."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


@pytest.fixture
def meta(tmp_path: Path) -> Iterator[Meta]:
    """A new volume on SQLite; at the end its metadata must be clean."""
    volume = Meta(tmp_path)
    try:
        yield volume
        volume.assert_clean()
    finally:
        volume.close()


@pytest.fixture(params=["sqlite", "postgres"])
def new_meta(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Meta]:
    """Makes the one volume of the test, on each kind of store."""
    if request.param == "sqlite":
        return partial(Meta, tmp_path)
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return partial(PostgresMeta, tmp_path, server.dsn())


@pytest.fixture(name="meta")
def each_meta(new_meta: Callable[..., Meta]) -> Iterator[Meta]:
    """As ``meta``, on each kind of store."""
    volume = new_meta()
    try:
        yield volume
        volume.assert_clean()
    finally:
        volume.close()
