"""Connections to the database: how they are made, what their failures mean, and doing it again until it works."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import asyncpg
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from polefs.meta.store.base import Deposed
from polefs.meta.store.postgres.tables import SCHEMA

T = TypeVar("T")

_CONNECT_SECONDS: Final = 10.0
_STATEMENT_SECONDS: Final = 20.0
"""After which a statement that got no answer counts as lost with its connection."""

_PLANNER: Final = (
    # Every statement is made for an index; statistics that are behind, as those of a table that was empty a moment ago,
    # must not make it a scan of the table.
    "SET enable_seqscan = off",
    "SET enable_bitmapscan = off",
    "SET enable_hashjoin = off",
    "SET enable_mergejoin = off",
    "SET enable_material = off",
    "SET enable_memoize = off",
    "SET enable_sort = off",
    "SET plan_cache_mode = force_generic_plan",
    "SET jit = off",
)
"""Settings of PostgreSQL; other servers may not know them."""

_CONFLICTS: Final = frozenset(["40001", "40P01"])
_LOST: Final = ("08", "57P", "40003", "53300", "25006")
"""SQLSTATEs, or how they begin, of a server that is away, going, coming, or not the one that may write."""


FAILURES: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""All that a statement or a connection may raise (a TimeoutError is an OSError)."""


def describe(dsn: str) -> str:
    """A DSN as it may be shown: without the user's name and password."""
    parts = urlsplit(dsn)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def is_conflict(error: BaseException) -> bool:
    """The transaction has been rolled back for the sake of another, and may succeed when it is done again."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in _CONFLICTS


def is_lost(error: BaseException) -> bool:
    """The server or the way to it is away; what was sent may have been done."""
    if isinstance(error, asyncpg.PostgresError):
        return bool(error.sqlstate) and error.sqlstate.startswith(_LOST)
    return isinstance(error, FAILURES) and not isinstance(error, Deposed)


def os_error(error: BaseException) -> OSError:
    """The errno that a failure of the database stands for."""
    code = errno.EIO
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate == "53100":
        code = errno.ENOSPC
    return OSError(code, os.strerror(code))


async def connect(dsn: str) -> asyncpg.Connection[Any]:
    """A new connection. ``OSError`` and ``asyncpg`` errors as they come."""
    connection = await asyncpg.connect(
        dsn,
        timeout=_CONNECT_SECONDS,
        command_timeout=_STATEMENT_SECONDS,
        max_cached_statement_lifetime=0,
        server_settings={"application_name": "polefs", "search_path": SCHEMA, "standard_conforming_strings": "on"},
    )
    try:
        for statement in _PLANNER:
            try:
                await connection.execute(statement)
            except asyncpg.PostgresError as error:
                if is_lost(error):
                    raise
    except BaseException:
        connection.terminate()
        raise
    return connection


async def connect_first(dsn: str) -> asyncpg.Connection[Any]:
    """As ``connect``, for the first time: an ``OSError`` says in one line what to do."""
    where = describe(dsn)
    try:
        return await connect(dsn)
    except asyncpg.InvalidCatalogNameError:
        raise OSError(errno.ENOENT, f"there is no database {where}: create it with createdb") from None
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError) as error:
        raise OSError(errno.EACCES, f"the database {where} refuses: {error}") from None
    except (asyncpg.ClientConfigurationError, ValueError) as error:
        raise OSError(errno.EINVAL, f"{where} is no address of a database: {error}") from None
    except FAILURES as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise OSError(
            errno.EHOSTUNREACH, f"cannot reach the database {where}: {reason}: start it, or give its address"
        ) from None


def again(deadline: float, also: Callable[[BaseException], bool] = is_conflict) -> AsyncRetrying:
    """Attempts, until ``deadline`` seconds have passed, for as long as the server is away or ``also`` holds."""
    return AsyncRetrying(
        retry=retry_if_exception(lambda error: is_lost(error) or also(error)),
        wait=wait_random_exponential(multiplier=0.02, max=1.0),
        stop=stop_after_delay(deadline),
        reraise=True,
    )


class Connections:
    """As many connections as are in use at the same time, at most ``limit``; lost ones are replaced."""

    def __init__(self, dsn: str, limit: int, deadline: float) -> None:
        self._dsn = dsn
        self._deadline = deadline
        self._idle: list[asyncpg.Connection[Any]] = []
        self._free = asyncio.Semaphore(limit)
        self._all: set[asyncpg.Connection[Any]] = set()

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        """The rows of a query. It is repeated while the server is away, until the deadline; ``OSError`` then."""

        async def run(connection: asyncpg.Connection[Any]) -> list[Any]:
            rows: list[Any] = await connection.fetch(query, *arguments)
            return rows

        return await self.run(run)

    async def run(self, work: Callable[[asyncpg.Connection[Any]], Awaitable[T]]) -> T:
        """Let ``work`` use a connection; it is repeated as ``fetch`` is."""
        try:
            return await again(self._deadline)(self._run_once, work)
        except FAILURES as error:
            raise os_error(error) from error

    async def _run_once(self, work: Callable[[asyncpg.Connection[Any]], Awaitable[T]]) -> T:
        async with self._free:
            connection = self._idle.pop() if self._idle else None
            if connection is None or connection.is_closed():
                if connection is not None:
                    self._all.discard(connection)
                connection = await connect(self._dsn)
                self._all.add(connection)
            try:
                result = await work(connection)
            except asyncpg.PostgresError as error:
                if is_lost(error):
                    self._discard(connection)
                else:
                    self._idle.append(connection)
                raise
            except BaseException:
                # In the middle of something, perhaps.
                self._discard(connection)
                raise
            self._idle.append(connection)
            return result

    def _discard(self, connection: asyncpg.Connection[Any]) -> None:
        self._all.discard(connection)
        connection.terminate()

    async def close(self) -> None:
        for connection in self._all:
            try:
                await connection.close(timeout=1.0)
            except FAILURES:
                connection.terminate()
        self._all.clear()
        self._idle.clear()
