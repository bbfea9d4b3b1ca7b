"""The statements of the PostgreSQL store: what plans they get, and that other servers accept them."""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import Any

import asyncpg
import pytest

from polefs.meta.store.postgres import connection, database, queries, tables
from tests.postgres.server import PostgresServer
from tests.postgres.test_store import OPERATIONS, fill
from tests.postgres.volumes import run, volume

INDEXES = {
    "inode_pkey": ["ino ="],
    "dentry_pkey": ["parent =", "name ="],
    "dentry_cookie": ["(parent + 0) ="],
    "extent_pkey": ["ino ="],
    "extent_segment": ["segment ="],
    "segment_pkey": ["id"],
    "symlink_pkey": ["ino ="],
    "xattr_pkey": ["ino ="],
    "orphan_pkey": ["ino"],
    "session_pkey": [],
    "reply_pkey": ["session ="],
    "deletion_pkey": ["segment"],
}
"""How much of each index a statement must make use of, besides the volume."""


def test_every_statement_uses_the_primary_key(postgres_server: PostgresServer) -> None:
    """Also on tables that have just been made, of which the planner knows nothing."""

    async def test() -> None:
        opened = await database.open_database(postgres_server.new_database())
        statements = [
            *queries.QUERIES,
            tables.SET_LIVE,
            tables.DELETE_XATTRS,
            tables.DELETE_HOLDERS,
            tables.DELETE_REPLIES,
        ]
        statements += [each for table in tables.TABLES for each in (table.put(), table.delete())]
        for number, statement in enumerate(statements):
            await opened.execute(f"PREPARE s{number} AS {statement}")
            types = await opened.fetchval(
                "SELECT parameter_types::TEXT[] FROM pg_prepared_statements WHERE name = $1", f"s{number}"
            )
            values = ", ".join("'{}'" if type_.endswith("[]") else "1" for type_ in types)
            plan = [row[0].strip() for row in await opened.fetch(f"EXPLAIN EXECUTE s{number}({values})")]
            text = statement + "\n" + "\n".join(plan)
            assert not any(word in line for line in plan for word in ("Seq Scan", "Bitmap", "Hash Join", "Sort")), text
            for line, below in itertools.pairwise(plan):
                if "Scan using" in line or "Scan Backward using" in line:
                    index = line.split("using ")[1].split()[0]
                    assert below.startswith("Index Cond: (") and "(volume = " in below, text
                    assert all(f"({column}" in below for column in INDEXES[index]), text
        await opened.close()

    run(test)


_WORDS = re.findall(
    r"\w+",
    """
    all and any as begin bytea by case coalesce commit conflict count create cross delete do else end excluded
    execute exists from if in index insert int8 into is isolation join key lateral left length level limit max
    not nothing null on or order prepare primary recursive returning rollback schema select serializable set
    table then union unique unnest update values when where with for
    """,
)
"""The words of SQL that the references of CockroachDB and YugabyteDB have, in the places where statements here have
them."""


def test_only_sql_that_others_accept(postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word of every statement is one that CockroachDB and YugabyteDB have (docs/postgresql.md), or a name of
    ours. The planner's settings are tried one by one, and may be refused."""
    seen: set[str] = set()
    for method in ("execute", "fetch", "fetchrow", "fetchval"):
        plain = getattr(asyncpg.Connection, method)

        async def record(self: Any, query: str, *arguments: Any, _plain: Any = plain, **more: Any) -> Any:
            seen.add(query)
            return await _plain(self, query, *arguments, **more)

        monkeypatch.setattr(asyncpg.Connection, method, record)

    async def test() -> None:
        dsn = postgres_server.new_database()
        async with volume(dsn) as served:
            inos = await fill(served)
            for operation in OPERATIONS.values():
                served.store._caches.clear()
                # What was there may be gone by now.
                with contextlib.suppress(OSError):
                    await operation(served.service, inos)
        opened = await database.open_database(dsn)
        for each in await database.list_volumes(opened):
            await database.delete_volume(opened, each.name)
        await opened.close()

    run(test)
    ours = set(re.findall(r"\w+", "up nth first last fence mark set_live delete_xattrs delete_holders delete_replies"))
    ours |= {f"{verb}_{table.name}" for table in tables.TABLES for verb in ("put", "delete")}
    ours |= {word for each in seen if each.startswith("CREATE") for word in re.findall(r"[a-z_]+", each)}
    statements = seen - set(connection._PLANNER)
    assert len(statements) > 80
    for statement in statements:
        text = re.sub(r"'[^']*'", "", statement)
        unknown = {word for word in re.findall(r"[A-Za-z_]\w+", text) if word.lower() not in _WORDS} - ours
        assert not unknown, (unknown, statement)
        assert not re.search(r"%|[|][|]|~|::(?!INT8|BYTEA)", text), statement
