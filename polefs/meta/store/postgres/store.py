"""A volume in PostgreSQL: bodies run on what is known in memory, and their changes are committed in batches.

One server is active on a volume (``writer``), so what it has read stays true. A body runs at once, against the caches
and the changes that are not committed yet (``transaction``, ``layers``); what it lacks is fetched and it runs again
(``rounds``). While one batch is on its way to the database, the operations that come make up the next. An operation
that has changed something, or has seen what is not committed, returns after the commit.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from polefs.meta.model import Inode, Usage
from polefs.meta.store.base import Deposed
from polefs.meta.store.postgres.connection import Connections
from polefs.meta.store.postgres.database import VolumeRow, create_volume, find_volume, open_database
from polefs.meta.store.postgres.layers import NOTHING, Batch, Caches, Known, Miss, Want
from polefs.meta.store.postgres.queries import Fetch
from polefs.meta.store.postgres.rounds import Rounds
from polefs.meta.store.postgres.rows import Numbers
from polefs.meta.store.postgres.transaction import PostgresTransaction
from polefs.meta.store.postgres.writer import State, Writer, clock
from polefs.meta.store.turn import Commit

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

_READERS = 4
"""Connections for queries, besides the one for commits."""


_RUNS = 10_000
"""After so many runs a body counts as one that never ends."""


class _Again(Exception):
    """What an operation has seen did not come to be: its body runs again."""


class PostgresStore:
    """Implements ``base.Store``. Made by ``create`` and ``open``; used from one event loop."""

    def __init__(
        self,
        volume: VolumeRow,
        connections: Connections,
        writer: Writer,
        state: State,
        *,
        read_only: bool,
        cache: tuple[int, int, int],
    ) -> None:
        self.read_only = read_only
        self.volume = volume
        self.name = volume.name
        self.uuid = volume.uuid
        self.created = volume.created
        """When the volume was made, ns."""
        self.durability = volume.durability
        self._connections = connections
        self._writer = writer
        self._usage = Usage(0, 0)
        self._numbers = Numbers()
        self._caches = Caches(*cache)
        self._known = Known(self._caches)
        self._rounds = Rounds(self._known, Fetch(connections, volume.id))
        self._batch = 0
        """Number of the last batch begun."""
        self._pending: Batch | None = None
        self._committing: asyncio.Task[None] | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._turn = False
        """``end_turn`` is going to be called."""
        self._failed = False
        """A commit has failed: what the database holds is to be found out."""
        self._deposed = asyncio.Event()
        self._closed = False
        self._tx = PostgresTransaction(self._known, self._usage, self._numbers)
        self._load(state)
        if read_only:
            writer.valid_until = float("inf")
        else:
            self._beat()

    @classmethod
    async def create(cls, dsn: str, *, name: str, bytes_limit: int = 0, inodes_limit: int = 0, **options: Any) -> Self:
        """Make a new volume and open it, with the options of ``open``. ``FileExistsError`` when there is one of that
        name; else as ``open``."""
        connection = await open_database(dsn)
        try:
            await create_volume(connection, name, bytes_limit=bytes_limit, inodes_limit=inodes_limit)
        finally:
            await connection.close()
        return await cls.open(dsn, name, **options)

    @classmethod
    async def open(
        cls,
        dsn: str,
        name: str,
        read_only: bool = False,
        *,
        cache: tuple[int, int, int] = (65536, 8192, 65536),
        who: str | None = None,
        lease: float = 5.0,
        deadline: float = 30.0,
        wait: bool = False,
        force: bool = False,
    ) -> Self:
        """Become the active server of a volume. ``cache``: how many inodes, inodes with inline contents and names are
        kept in memory. ``who`` tells others of this server. ``lease``: seconds without a sign of life after which
        another may take over; ``deadline``: seconds that an operation waits for a database that is away. ``wait``:
        stand by until no other is active; ``force``: depose it. FormatError, FileNotFoundError when there is no such
        volume, EBUSY when another is active, and ``OSError`` in one line when the database cannot be used."""
        connection = await open_database(dsn, read_only=read_only)
        try:
            volume = await find_volume(connection, name)
        finally:
            await connection.close()
        connections = Connections(dsn, _READERS, deadline)
        who = who or f"{socket.gethostname()}, process {os.getpid()}"
        writer = Writer(dsn, volume.id, name, who=who, lease=lease, deadline=deadline)
        try:
            if read_only:
                state = await writer.read_state(connections)
            else:
                state = await writer.take(connections, wait=wait, force=force)
            return cls(volume, connections, writer, state, read_only=read_only, cache=cache)
        except BaseException:
            await connections.close()
            raise

    def _load(self, state: State) -> None:
        """Take over what the volume's row holds. Numbers handed out already stay so, those not committed too."""
        usage, numbers = self._usage, self._numbers
        usage.bytes, usage.inodes = state.bytes, state.inodes
        usage.bytes_limit, usage.inodes_limit = state.bytes_limit, state.inodes_limit
        numbers.ino = max(numbers.ino, state.next_ino)
        numbers.cookie = max(numbers.cookie, state.next_cookie)
        numbers.segment = max(numbers.segment, state.next_segment)
        numbers.session = max(numbers.session, state.next_session)
        numbers.writer = state.writer
        self._batch = state.batch

    @property
    def round_trips(self) -> int:
        """Times that something was waited for: rounds of queries, and transactions."""
        return self._rounds.started + self._writer.commits

    # Reading

    def cached_inode(self, ino: int) -> Inode | None:
        return self._shown(ino) if clock() < self._writer.valid_until and not self.read_only else None

    def _shown(self, ino: int) -> Inode | None:
        for layer in self._known.layers:
            if not layer.committed and ino in layer.inodes:
                return None
        return self._caches.inode(ino)

    def cached_entry(self, parent: int, name: bytes) -> Inode | None:
        if clock() >= self._writer.valid_until or self.read_only:
            return None
        for layer in self._known.layers:
            if not layer.committed and name in layer.names.get(parent, ()):
                return None
        entry = self._caches.names.get((parent, name))
        return self._shown(entry[0]) if entry is not None and entry[0] else None

    async def read(
        self, body: Callable[Concatenate[PostgresTransaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self.read_only:
            # Others write.
            self._known.forget()
        return await self._run(body, False, *args, **kwargs)

    async def write(
        self, body: Callable[Concatenate[PostgresTransaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return await self._run(body, True, *args, **kwargs)

    async def _run(
        self, body: Callable[Concatenate[PostgresTransaction, P], Awaitable[T]], writes: bool, *args: Any, **kwargs: Any
    ) -> T:
        tx = self._tx
        wants: set[Want] = set()
        answers = NOTHING
        runs = 0
        while True:
            runs += 1
            if runs > _RUNS:
                log.error("operation %s asks for something else each time", body)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if clock() >= self._writer.valid_until or self._closed:
                await self._ready()
            if wants and answers.serial <= self._rounds.over:
                answers = await self._rounds.ask(wants)
                continue
            tx.begin(answers)
            try:
                result = await body(tx, *args, **kwargs)
            except Miss as miss:
                tx.take_back()
                wants.update(miss.wants)
                answers = await self._rounds.ask(wants)
                continue
            except OSError as error:
                seen, changed = tx.depends, tx.rows
                tx.take_back()
                if changed:
                    log.exception("operation %s failed after it had changed something", body)
                    raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
                if seen is None or await self._is_settled(seen):
                    raise
                continue
            except BaseException as error:
                tx.take_back()
                log.exception("operation %s failed", body)
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
            try:
                if writes and (tx.rows or tx.reserved):
                    commit = self._add(tx)
                    await commit
                elif tx.depends is not None and not await self._is_settled(tx.depends):
                    continue
            except _Again:
                continue
            return result

    async def _is_settled(self, batch: Batch) -> bool:
        """Wait until a batch is committed; False when it was not to be."""
        if batch.committed:
            return True
        commit = Commit(asyncio.get_running_loop())
        batch.waiters.append(commit)
        try:
            await commit
        except (OSError, _Again):
            return False
        return True

    # Writing

    def _add(self, tx: PostgresTransaction) -> Commit:
        """Let the changes of an operation be part of the batch that is being collected."""
        batch = self._collecting()
        tx.apply(batch)
        commit = Commit(asyncio.get_running_loop())
        batch.waiters.append(commit)
        if not self._turn:
            self._turn = True
            asyncio.get_running_loop().call_soon(self.end_turn)
        return commit

    def _collecting(self) -> Batch:
        if self._pending is None:
            self._batch += 1
            self._pending = Batch(self._batch)
            self._known.layers.insert(0, self._pending)
        return self._pending

    def end_turn(self) -> None:
        """Send what was collected, unless another batch is on its way: it is sent when that has arrived."""
        self._turn = False
        if self._committing is None and self._pending is not None:
            batch, self._pending = self._pending, None
            usage, numbers = self._usage, self._numbers
            marks = (usage.bytes, usage.inodes, *numbers.marks())
            self._committing = asyncio.get_running_loop().create_task(self._commit(batch, marks))

    async def _commit(self, batch: Batch, marks: tuple[int, ...]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self._writer.commit(batch, marks)
        except asyncio.CancelledError:
            self._fail(batch, OSError(errno.EIO, os.strerror(errno.EIO)))
            raise
        except Deposed as error:
            self._lost()
            self._fail(batch, error)
        except Exception as error:
            log.error("volume %s: a commit failed: %s", self.name, error)
            failure = error if isinstance(error, OSError) else OSError(errno.EIO, os.strerror(errno.EIO))
            self._fail(batch, failure)
        else:
            batch.committed = True
            batch.serial = self._rounds.started
            self._known.retire(self._rounds.over)
            loop.call_soon(_release, batch.waiters, None)
        self._committing = None
        if self._pending is not None:
            loop.call_soon(self.end_turn)

    def _fail(self, batch: Batch, error: OSError) -> None:
        """The operations of a batch fail, those that have come since run again, and nothing is known any more."""
        loop = asyncio.get_running_loop()
        self._failed = True
        self._writer.valid_until = 0.0
        self._known.forget()
        self._rounds.reset()
        loop.call_soon(_release, batch.waiters, error)
        if self._pending is not None:
            loop.call_soon(_release, self._pending.waiters, _Again())
            self._pending = None

    # The lease

    async def _ready(self) -> None:
        """Returns once the volume is ours for certain. ``Deposed`` when it is another server's, EROFS after ``close``,
        and the database's failure."""
        if self._closed:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if self._deposed.is_set():
            raise Deposed
        if self._failed:
            await asyncio.shield(self._recovering())
            return
        # Any commit renews the lease.
        batch = self._collecting()
        commit = Commit(asyncio.get_running_loop())
        batch.waiters.append(commit)
        self.end_turn()
        try:
            await commit
        except _Again:
            pass

    def _recovering(self) -> asyncio.Task[None]:
        if self._recovery is None:
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
            # Nobody may be waiting for it.
            self._recovery.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._recovery

    async def _recover(self) -> None:
        try:
            state = await self._writer.take_again(self._connections)
        except (Deposed, FileNotFoundError):
            self._lost()
            raise Deposed from None
        finally:
            self._recovery = None
        self._known.forget()
        self._rounds.reset()
        self._load(state)
        self._failed = False

    def _beat(self) -> None:
        """Renew the lease when a third of it is over."""
        if self._deposed.is_set():
            return
        writer = self._writer
        left = writer.valid_until - clock() - writer.lease * 2 / 3
        if left <= 0:
            if self._failed:
                self._recovering()
            elif self._committing is None:
                self._collecting()
                self.end_turn()
            left = writer.lease / 3
        self._heartbeat = asyncio.get_running_loop().call_later(left, self._beat)

    def _lost(self) -> None:
        if not self._deposed.is_set():
            log.critical("volume %s: another server has become active, or the volume has been deleted", self.name)
            self._deposed.set()

    async def deposed(self) -> None:
        """Returns when another server has become active: this store is good for nothing more."""
        await self._deposed.wait()

    # The end

    async def sync(self) -> None:
        """Every commit is durable in the database, as its ``synchronous_commit`` says; those on their way are waited
        for."""
        if self.read_only:
            return
        if self._pending is not None:
            newest: Batch | None = self._pending
        else:
            newest = next((layer for layer in self._known.layers if not layer.committed), None)
        if newest is not None and not await self._is_settled(newest):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        try:
            await self._drain()
        finally:
            await self._rounds.close()
            await self._writer.close()
            await self._connections.close()

    async def _drain(self) -> None:
        if self._recovery is not None:
            await asyncio.wait([self._recovery])
        while self._committing is not None or self._pending is not None:
            self.end_turn()
            if self._committing is not None:
                await asyncio.wait([self._committing])
        if not (self.read_only or self._failed or self._deposed.is_set()):
            await self._writer.give_back(self._batch)


def _release(waiters: list[Commit], error: BaseException | None) -> None:
    for commit in waiters:
        commit.release(error)
