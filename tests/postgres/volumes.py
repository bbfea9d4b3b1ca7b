"""Volumes in PostgreSQL for the tests here."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from polefs.meta.model import ROOT_INO, Caller, Inode
from polefs.meta.service import MetaService
from polefs.meta.store.postgres import PostgresStore

ROOT = Caller(0, 0)
_numbers = itertools.count()


class Served:
    """A volume and the service on it."""

    def __init__(self, store: PostgresStore) -> None:
        self.store = store
        self.service = MetaService(store)

    def create(self, name: bytes, parent: int = ROOT_INO) -> Awaitable[Inode]:
        return self.service.make_node(ROOT, parent, name, 0o100644, 0)

    def mkdir(self, name: bytes, parent: int = ROOT_INO) -> Awaitable[Inode]:
        return self.service.make_node(ROOT, parent, name, 0o040755, 0)

    async def names(self, parent: int = ROOT_INO) -> list[bytes]:
        return sorted(dentry.name for dentry in await self.service.list_dir(parent, 0, 1 << 20))

    @property
    def commits(self) -> int:
        return self.store._writer.commits


@asynccontextmanager
async def volume(dsn: str, name: str | None = None, **options: Any) -> AsyncIterator[Served]:
    """A new volume; ``name``: one that exists. Unless told otherwise, its lease is too long for signs of life, which
    would be commits that a test does not expect."""
    options.setdefault("lease", 3600.0)
    if name is None:
        store = await PostgresStore.create(dsn, name=f"volume{next(_numbers)}", **options)
    else:
        store = await PostgresStore.open(dsn, name, **options)
    served = Served(store)
    try:
        await served.service.start()
        yield served
    finally:
        await store.close()


def run(test: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    asyncio.run(test(*arguments))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    """Returns once it holds: for what tells nobody when it does."""
    for _ in itertools.count():
        if condition():
            return
        await asyncio.sleep(0.005)
