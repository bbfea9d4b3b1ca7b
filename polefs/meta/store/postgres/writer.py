"""The lease on a volume, and the transactions that change it: one after the other, one message each.

The volume's row holds the *epoch*, which grows when another server becomes active, and the *batch*, which each
transaction of the active one raises by one. Every transaction begins by checking both. So a server that has been
deposed can change nothing; and when an answer is lost on the way, sending the transaction again either does it, or
shows that it was done.

The batch is the heartbeat too: the active server commits at least every third part of the lease, empty transactions
when there is nothing to do. Who stands by becomes active when it has seen no change for the whole lease, by its own
clock: no two clocks are compared. The active one trusts its caches for the lease, from when it sent its last commit.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import time
from typing import Any, Final

import asyncpg
import msgspec

from polefs.meta.store.base import Deposed
from polefs.meta.store.postgres import tables
from polefs.meta.store.postgres.connection import FAILURES, Connections, again, connect, is_conflict, is_lost, os_error
from polefs.meta.store.postgres.layers import Batch

log = logging.getLogger(__name__)

_MARGIN: Final = 1.2
"""How much longer than the lease who stands by waits: clocks may run at different speeds."""


_LOOK: Final = 0.5
"""Seconds between two looks at the volume's row of who stands by."""


def clock() -> float:
    """Seconds that go on while the machine sleeps, so that a lease ends there as well."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Overtaken(Exception):
    """The volume's row is not as this server has left it, in its own epoch."""


class State(msgspec.Struct):
    """The part of the volume's row that changes."""

    epoch: int
    batch: int
    holder: bytes
    lease: int
    """Milliseconds."""
    bytes: int
    inodes: int
    bytes_limit: int
    inodes_limit: int
    next_ino: int
    next_cookie: int
    next_segment: int
    next_session: int
    writer: int


class Writer:
    """The active server's hold on a volume. ``lease`` in seconds."""

    def __init__(self, dsn: str, volume: int, name: str, *, who: str, lease: float, deadline: float) -> None:
        self._dsn = dsn
        self._volume = volume
        self._name = name
        self._deadline = deadline
        self._token = secrets.token_bytes(16)
        self._who = who
        self.lease = lease
        self.epoch = 0
        self.valid_until = 0.0
        """By ``clock``: until then nobody else can have become active."""
        self._connection: asyncpg.Connection[Any] | None = None
        self.commits = 0
        """Transactions sent."""
        self.statements = 0
        self.repeated = 0
        """Transactions sent again, because of a conflict or a lost connection."""

    # The lease

    async def read_state(self, connections: Connections) -> State:
        rows = await connections.fetch(tables.VOLUME_STATE, self._volume)
        if not rows:
            raise FileNotFoundError(errno.ENOENT, f"volume {self._name} has been deleted")
        return State(*rows[0])

    async def take(self, connections: Connections, *, wait: bool, force: bool) -> State:
        """Become the active server: at once when there is none, or with ``force``; else when the active one has shown
        no life for its lease. Without ``wait`` EBUSY when it does. Returns what the volume's row holds then."""
        state = await self.read_state(connections)
        seen = clock()
        while True:
            patience = state.lease / 1000 * _MARGIN
            if force or not state.holder or state.holder[:16] == self._token or clock() - seen >= patience:
                if taken := await self._try_to_take(connections, state):
                    return taken
            elif state.holder:
                # The database tells nobody of a change by any means that all servers of this kind have.
                await asyncio.sleep(min(_LOOK, patience / 4, max(0.0, seen + patience - clock())))
            try:
                now = await self.read_state(connections)
            except FileNotFoundError:
                raise
            except OSError as error:
                if not wait:
                    raise
                log.warning("standing by for volume %s: the database is away: %s", self._name, error)
                seen = clock()
                continue
            if (now.epoch, now.batch) != (state.epoch, state.batch):
                if not wait and not force and now.holder and now.holder[:16] != self._token:
                    who = now.holder[16:].decode(errors="replace")
                    raise OSError(errno.EBUSY, f"volume {self._name} is served by {who}: stop that first")
                seen = clock()
            state = now

    async def take_again(self, connections: Connections) -> State:
        """After a failure: the same with a new epoch, so that nothing sent before can be done any more. ``Deposed``
        when another server has become active meanwhile."""
        while True:
            state = await self.read_state(connections)
            if state.holder[:16] != self._token:
                raise Deposed
            if taken := await self._try_to_take(connections, state):
                return taken

    async def _try_to_take(self, connections: Connections, state: State) -> State | None:
        arguments = (
            self._volume,
            state.epoch,
            state.batch,
            self._token + self._who.encode(),
            round(self.lease * 1000),
        )

        async def take(connection: asyncpg.Connection[Any]) -> str:
            async with connection.transaction(isolation="serializable"):
                return str(await connection.execute(tables.TAKE, *arguments))

        sent = clock()
        if await connections.run(take) != "UPDATE 1":
            return None
        self.epoch = state.epoch + 1
        self.valid_until = sent + self.lease
        return msgspec.structs.replace(state, epoch=self.epoch, batch=state.batch + 1)

    async def give_back(self, batch: int) -> None:
        """Let another server become active at once."""
        self.valid_until = 0.0
        try:
            connection = await self._connected()
            await connection.execute(tables.GIVE_BACK, self._volume, self.epoch, batch, b"")
        except FAILURES as error:
            log.warning("volume %s cannot be given back; its lease will end: %s", self._name, error)

    # Transactions

    async def commit(self, batch: Batch, marks: tuple[int, ...]) -> None:
        """Make the changes of a batch, and ``marks``, the counters after it. ``Deposed``; ``OSError`` when it cannot be
        done until the deadline: it is not known then whether it has been."""
        statements = _statements(self._volume, self.epoch, batch, marks)
        script = "; ".join(statements)
        self.statements += len(statements)
        first_sent = clock()
        try:
            await again(self._deadline)(self._attempt, script, batch.number, first_sent)
        except Deposed:
            raise
        except (*FAILURES, Overtaken) as error:
            raise os_error(error) from error

    async def _attempt(self, script: str, number: int, first_sent: float) -> None:
        connection = await self._connected()
        sent = clock()
        self.commits += 1
        try:
            await connection.execute(script)
        except asyncpg.DivisionByZeroError:
            await connection.execute("ROLLBACK")
            row = await connection.fetchrow(tables.VOLUME_STATE, self._volume)
            state = None if row is None else State(*row)
            if state is None or state.epoch != self.epoch:
                raise Deposed from None
            if state.batch != number:
                raise Overtaken from None
            # Done by an attempt whose answer was lost.
            sent = first_sent
        except asyncpg.PostgresError as error:
            self.repeated += is_conflict(error) or is_lost(error)
            if is_lost(error):
                self._drop()
            else:
                await connection.execute("ROLLBACK")
            raise
        except BaseException:
            self.repeated += 1
            self._drop()
            raise
        self.valid_until = max(self.valid_until, sent + self.lease)

    async def _connected(self) -> asyncpg.Connection[Any]:
        connection = self._connection
        if connection is None or connection.is_closed():
            connection = await connect(self._dsn)
            try:
                await connection.execute(tables.PREPARE)
            except BaseException:
                connection.terminate()
                raise
            self._connection = connection
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def close(self) -> None:
        if self._connection is not None:
            try:
                await self._connection.close(timeout=1.0)
            except FAILURES:
                self._drop()


def _statements(volume: int, epoch: int, batch: Batch, marks: tuple[int, ...]) -> list[str]:
    statements = [
        tables.BEGIN,
        tables.execute("fence", volume, epoch, batch.number - 1),
        tables.execute("mark", volume, batch.number, *marks),
    ]

    def put(table: tables.Table, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            statements.append(tables.execute_many(f"put_{table.name}", volume, list(zip(*rows, strict=True))))

    def delete(table: tables.Table, keys: list[tuple[Any, ...]]) -> None:
        if keys:
            statements.append(tables.execute_many(f"delete_{table.name}", volume, list(zip(*keys, strict=True))))

    delete(tables.INODE, [(ino,) for ino, inode in batch.inodes.items() if inode is None])
    put(tables.INODE, [msgspec.structs.astuple(inode) for inode in batch.inodes.values() if inode is not None])
    names = [(parent, name, entry) for parent, names in batch.names.items() for name, entry in names.items()]
    delete(tables.DENTRY, [(parent, name) for parent, name, entry in names if not entry[0]])
    put(tables.DENTRY, [(parent, name, *entry) for parent, name, entry in names if entry[0]])
    delete(tables.SYMLINK, [(ino,) for ino, target in batch.symlinks.items() if target is None])
    put(tables.SYMLINK, [(ino, target) for ino, target in batch.symlinks.items() if target is not None])
    if batch.bare:
        statements.append(tables.execute_many("delete_xattrs", volume, [list(batch.bare)]))
    values = [(ino, name, value) for ino, values in batch.xattrs.items() for name, value in values.items()]
    delete(tables.XATTR, [(ino, name) for ino, name, value in values if value is None])
    put(tables.XATTR, [row for row in values if row[2] is not None])
    extents = [(ino, offset, extent) for ino, rows in batch.extents.items() for offset, extent in rows.items()]
    delete(tables.EXTENT, [(ino, offset) for ino, offset, extent in extents if extent is None])
    put(tables.EXTENT, [(ino, *msgspec.structs.astuple(extent)) for ino, _, extent in extents if extent is not None])
    _segments(batch, statements, volume, put, delete)
    if batch.unheld:
        statements.append(tables.execute_many("delete_holders", volume, [list(batch.unheld)]))
    holders = [(ino, session, there) for ino, rows in batch.orphans.items() for session, there in rows.items()]
    delete(tables.ORPHAN, [(ino, session) for ino, session, there in holders if not there])
    put(tables.ORPHAN, [(ino, session) for ino, session, there in holders if there])
    delete(tables.SESSION, [(id_,) for id_, row in batch.sessions.items() if row is None])
    sessions = [row for row in batch.sessions.values() if row is not None]
    put(tables.SESSION, [(row.id, row.secret, int(row.read_only), row.info.encode()) for row in sessions])
    if batch.confirmed:
        confirmed = list(zip(*batch.confirmed.items(), strict=True))
        statements.append(tables.execute_many("delete_replies", volume, confirmed))
    put(tables.REPLY, [(session, *row) for session, replies in batch.replies.items() for row in replies.items()])
    delete(tables.DELETION, [(segment,) for segment, due in batch.deletions.items() if due is None])
    put(tables.DELETION, [(segment, due) for segment, due in batch.deletions.items() if due is not None])
    statements.append("COMMIT")
    return statements


def _segments(batch: Batch, statements: list[str], volume: int, put: Any, delete: Any) -> None:
    delete(tables.SEGMENT, [(id_,) for id_, segment in batch.segments.items() if segment is None])
    new = [
        (each.id, each.size, batch.lives[each.id], msgspec.msgpack.encode(each.frames), each.coding)
        for each in batch.segments.values()
        if each is not None
    ]
    put(tables.SEGMENT, new)
    changed = [(id_, live) for id_, live in batch.lives.items() if live is not None and id_ not in batch.segments]
    if changed:
        statements.append(tables.execute_many("set_live", volume, list(zip(*changed, strict=True))))
