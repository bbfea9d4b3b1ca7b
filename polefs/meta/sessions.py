"""Clients that share a volume: each is a *session* with a handle of its own on the store.

A session outlives connections and restarts of the service; its row in the store says that it exists. Every transaction
of a session fails once the session has ended. Together with what a request changes, the transaction stores the reply to
it, so that a client that asks again after a restart of the service gets that reply, and nothing is done twice.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Concatenate, Final, ParamSpec, TypeVar

import msgspec

from polefs.meta.errors import error
from polefs.meta.holding import Holders, Holding
from polefs.meta.locks import LockTable, SessionLocks, Told
from polefs.meta.model import SessionRow
from polefs.meta.service import MetaService
from polefs.meta.store.base import SOLE, Reader, Session, Store, Transaction

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

REQUEST: ContextVar[int] = ContextVar("request", default=0)
"""The id of the request that is being executed, when its reply is to be stored with what it changes; 0: it is not. Such
a request is one transaction."""

_BATCH: Final = 128

_encode = msgspec.msgpack.Encoder().encode


class ClientSession:
    """One session, and ``meta`` to act for it. It implements the store that ``meta`` works on."""

    def __init__(self, sessions: Sessions, row: SessionRow, store: Store) -> None:
        self.row = row
        self.id = row.id
        self.ended = False
        self.confirmed = 0
        """The client has the replies to all requests up to this id."""
        self._forgotten = 0
        self._store = store
        self._session = Session(row.id, lambda ino: {row.id, *sessions.using(ino)})
        self.holding = Holding(sessions.holders, row.id)
        """The inodes that it uses."""
        self.read_only = store.read_only
        self.cached_inode = store.cached_inode
        self.cached_entry = store.cached_entry
        self.read = store.read
        self.sync = store.sync
        self.end_turn = store.end_turn
        self.meta = MetaService(self, self.holding, SessionLocks(sessions.locks, row.id))

    async def write(
        self, body: Callable[Concatenate[Transaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        async def work(tx: Transaction) -> T:
            if self.ended:
                raise error(errno.ESTALE)
            tx.session = self._session
            try:
                result = await body(tx, *args, **kwargs)
            finally:
                tx.session = SOLE
            request = REQUEST.get()
            if request:
                await tx.put_reply(self.id, request, _encode(result))
                if self.confirmed > self._forgotten:
                    await tx.delete_replies(self.id, self.confirmed)
                    self._forgotten = self.confirmed
            return result

        return await self._store.write(work)

    async def replies(self) -> list[tuple[int, bytes]]:
        """What the store remembers, by id of the request: results."""
        return await self._store.read(_replies, self.id)

    async def close(self) -> None:
        """Nothing: the session ends by ``Sessions.end``, the store is others' too."""


class Sessions:
    """Those of one volume. Call ``start`` before anything else."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.holders = Holders()
        self.locks = LockTable()
        self._sessions: dict[int, ClientSession] = {}
        self._untold: set[int] = set()
        """Sessions from before a restart of the service that have not yet told what they use: perhaps everything."""

    async def start(self) -> list[ClientSession]:
        """The sessions that went on when the service was restarted. What others have left is released."""
        rows = await self.store.read(_rows)
        for row in rows:
            self._sessions[row.id] = ClientSession(self, row, self.store)
            self._untold.add(row.id)
            self.locks.expect(row.id)
        await self._release(lambda ino, session: session not in self._sessions)
        return list(self._sessions.values())

    def using(self, ino: int) -> Iterable[int]:
        """The sessions that use an inode, or may."""
        return (*self.holders.of(ino), *self._untold) if self._untold else self.holders.of(ino)

    def knows_holding(self, session: ClientSession) -> bool:
        return session.id not in self._untold

    async def tell_holding(self, session: ClientSession, inos: Iterable[int], locks: Iterable[Told]) -> None:
        """After a restart of the service: what the session uses, and the locks that it holds, and nothing else.
        ValueError for locks that it cannot have."""
        self.locks.tell(session.id, locks)
        for ino in inos:
            session.holding.add(ino)
        self._untold.discard(session.id)
        await self._release(lambda ino, each: each == session.id and ino not in session.holding.inos)

    def __len__(self) -> int:
        return len(self._sessions)

    async def begin(self, *, read_only: bool, info: str) -> tuple[ClientSession, bytes]:
        """A new session, and its secret."""
        secret = secrets.token_bytes(16)
        row = await self.store.write(_put, _hash(secret), read_only, info)
        session = self._sessions[row.id] = ClientSession(self, row, self.store)
        return session, secret

    def find(self, id_: int, secret: bytes) -> ClientSession | None:
        """The session, if it goes on, for who knows its secret."""
        session = self._sessions.get(id_)
        if session is None or session.ended or not hmac.compare_digest(session.row.secret, _hash(secret)):
            return None
        return session

    async def end(self, session: ClientSession) -> None:
        """It can change nothing from now on, and what it held is released. None of its operations may be under way.
        After an ``OSError`` it may be called again."""
        session.ended = True
        self._sessions.pop(session.id, None)
        self._untold.discard(session.id)
        self.locks.end(session.id)
        for ino in list(session.holding.inos):
            session.holding.discard(ino)
        await self._release(lambda ino, each: each == session.id)
        await self.store.write(_delete, session.id)

    async def _release(self, gone: Callable[[int, int], bool]) -> None:
        after = (0, -1)
        while orphans := await self.store.read(_orphans, after):
            for ino, session in orphans:
                if gone(ino, session):
                    await self._let_go(ino, session)
            after = orphans[-1]

    async def _let_go(self, ino: int, session: int) -> None:
        if not await self.store.write(_drop_orphan, ino, session):
            await MetaService(self.store).release_orphans([ino])


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


async def _rows(tx: Reader) -> list[SessionRow]:
    return await tx.sessions()


async def _replies(tx: Reader, session: int) -> list[tuple[int, bytes]]:
    return await tx.replies(session)


async def _orphans(tx: Reader, after: tuple[int, int]) -> list[tuple[int, int]]:
    return await tx.orphans(after, _BATCH)


async def _put(tx: Transaction, secret: bytes, read_only: bool, info: str) -> SessionRow:
    row = SessionRow(await tx.allocate_session(), secret, read_only, info)
    await tx.put_session(row)
    return row


async def _delete(tx: Transaction, session: int) -> None:
    await tx.delete_session(session)


async def _drop_orphan(tx: Transaction, ino: int, session: int) -> bool:
    """Whether others hold it; the last one's row stays until the inode goes with it."""
    others = [each for each in await tx.orphan_sessions(ino) if each != session]
    if others:
        await tx.delete_orphan(ino, session)
    return bool(others)
