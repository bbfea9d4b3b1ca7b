"""The stores of the meta service, without a network and a mount: operations a second, and how often the database is
waited for, on SQLite and on a PostgreSQL of its own (Debian's; ``fsync`` on), in one run.

    python -m bench.meta_store [--clients 1,64] [--files 2000] [--json FILE]

``clients`` operations are under way at a time. *cold*: nothing is in the caches. SQLite acknowledges when the redo log
is written (the death of the process loses nothing), PostgreSQL when its commit is on the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table

from polefs.meta.model import ROOT_INO, Caller, DataCommit, Extent, Segment, SetAttr
from polefs.meta.service import MetaService
from polefs.meta.store.postgres import PostgresStore
from polefs.meta.store.sqlite import SqliteStore
from tests.postgres.server import PostgresServer, ServerError

_CALLER = Caller(0, 0)

Operation: TypeAlias = Callable[[bytes], Awaitable[Any]]


class Figure(msgspec.Struct):
    store: str
    clients: int
    operation: str
    rate: float
    """Operations a second."""
    waits: float | None
    """Rounds of queries and commits for each operation; None where there is no network to wait for."""
    statements: float | None
    """Statements sent in commits for each operation."""


class Subject:
    """One store, filled with nothing but its root directory."""

    def __init__(self, name: str, store: SqliteStore | PostgresStore) -> None:
        self.name = name
        self.store = store
        self.service = MetaService(store)

    def forget(self) -> None:
        caches = self.store._caches if isinstance(self.store, PostgresStore) else self.store._tx._caches
        caches.clear()

    def counts(self) -> tuple[int, int]:
        if isinstance(self.store, PostgresStore):
            return self.store.round_trips, self.store._writer.statements
        return 0, 0


async def measure(subject: Subject, clients: int, files: int) -> list[Figure]:
    """Every figure, in an order in which each finds what it needs."""
    service = subject.service
    folder = (await service.make_node(_CALLER, ROOT_INO, b"c%d" % clients, 0o040755, 0)).ino
    names = [b"%d" % number for number in range(files)]
    inos: dict[bytes, int] = {}
    figures = []

    async def create(name: bytes) -> None:
        inos[name] = (await service.make_node(_CALLER, folder, name, 0o100644, 0)).ino

    async def commit(name: bytes) -> None:
        id_ = await service.allocate_segments(1)
        data = DataCommit(inos[name], 4096, None, extents=[Extent(0, 4096, id_, 0)])
        await service.commit_data([Segment(id_, 4096, ((4096, 4096, 0),))], [data])

    async def unlink(name: bytes) -> None:
        await service.unlink(folder, b"new" + name)
        await service.release_orphans([inos[name]])

    async def list_all(_: bytes) -> None:
        after = 0
        while page := await service.list_dir_plus(folder, after, 1000):
            after = page[-1][0].cookie

    operations: list[tuple[str, Operation, bool, Iterable[bytes]]] = [
        ("create", create, False, names),
        ("lookup", lambda name: service.lookup(folder, name), False, names),
        ("lookup cold", lambda name: service.lookup(folder, name), True, names),
        ("lookup of nothing", lambda name: service.lookup(folder, b"no" + name), False, names),
        ("setattr", lambda name: service.set_attributes(inos[name], SetAttr(mode=0o600)), False, names),
        ("setattr cold", lambda name: service.set_attributes(inos[name], SetAttr(mode=0o644)), True, names),
        ("commit data", commit, False, names),
        ("extents", lambda name: service.extents(inos[name], 0, 4096), False, names),
        ("rename", lambda name: service.rename(_CALLER, folder, name, folder, b"new" + name), False, names),
        (f"list {files} cold", list_all, True, names[:clients]),
        (f"list {files}", list_all, False, names[:clients]),
        ("unlink and release", unlink, False, names),
    ]
    for name, operation, cold, work in operations:
        figures.append(await _timed(subject, clients, name, operation, cold, list(work)))
    return figures


async def _timed(
    subject: Subject,
    clients: int,
    name: str,
    operation: Callable[[bytes], Awaitable[Any]],
    cold: bool,
    work: list[bytes],
) -> Figure:
    if cold:
        subject.forget()
    left = iter(work)

    async def client() -> None:
        for each in left:
            try:
                await operation(each)
            except FileNotFoundError:
                if name != "lookup of nothing":
                    raise

    before = subject.counts()
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    waits, statements = (after - start for after, start in zip(subject.counts(), before, strict=True))
    networked = isinstance(subject.store, PostgresStore)
    return Figure(
        subject.name,
        clients,
        name,
        len(work) / seconds,
        waits / len(work) if networked else None,
        statements / len(work) if networked else None,
    )


async def run(dsn: str, clients: list[int], files: int) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as place:
        for subject in (
            Subject("SQLite", SqliteStore.create(str(Path(place, "meta.db")), name="bench")),
            Subject("PostgreSQL", await PostgresStore.create(dsn, name="bench")),
        ):
            await subject.service.start()
            for count in clients:
                figures += await measure(subject, count, files)
            await subject.service.close()
    return figures


def table(figures: list[Figure], clients: list[int]) -> Table:
    found = {(figure.store, figure.clients, figure.operation): figure for figure in figures}
    shown = Table(
        "operation", title="operations a second (waits for the database, statements in commits, an operation)"
    )
    for count in clients:
        for store in ("SQLite", "PostgreSQL"):
            shown.add_column(f"{store}, {count} at a time", justify="right")
    for operation in dict.fromkeys(figure.operation for figure in figures):
        cells = []
        for count in clients:
            cells.append(f"{found['SQLite', count, operation].rate:,.0f}")
            figure = found["PostgreSQL", count, operation]
            cells.append(f"{figure.rate:,.0f} ({figure.waits:.2f}, {figure.statements:.2f})")
        shown.add_row(operation, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", default="1,64", help="how many operations at a time, one run each")
    parser.add_argument("--files", type=int, default=2000, help="files in the directory")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    clients = [int(count) for count in options.clients.split(",")]
    server = PostgresServer(settings={"fsync": "on", "full_page_writes": "on"})
    try:
        server.start()
        figures = asyncio.run(run(server.dsn(), clients, options.files))
    except ServerError as error:
        raise SystemExit(str(error)) from None
    finally:
        server.discard()
    Console(width=160).print(table(figures, clients))
    if options.json:
        options.json.write_text(json.dumps([msgspec.structs.asdict(figure) for figure in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
