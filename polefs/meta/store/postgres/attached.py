"""What hangs on an inode: link targets, attributes, who holds it; and sessions with their replies."""

from __future__ import annotations

from operator import attrgetter

from polefs.meta.model import FILE_SIZE_MAX, INODE_XATTR, SessionRow
from polefs.meta.store.postgres.layers import Batch, Miss
from polefs.meta.store.postgres.queries import Kind
from polefs.meta.store.postgres.rows import Rows

_symlinks = attrgetter("symlinks")


class AttachedRows(Rows):
    # What hangs on an inode

    async def symlink(self, ino: int) -> bytes | None:
        target: bytes | None
        if ino in self._own.symlinks:
            return self._own.symlinks[ino]
        there, target, batch = self._known.find(_symlinks, ino)
        if there:
            self._saw(batch)
            return target
        target = self._answer(Kind.SYMLINK, ino)
        return target

    async def add_symlink(self, ino: int, target: bytes) -> None:
        self.rows += 1
        self._own.symlinks[ino] = target

    async def delete_symlink(self, ino: int) -> None:
        self.rows += 1
        self._own.symlinks[ino] = None

    def _changed_xattrs(self, ino: int) -> tuple[dict[bytes, bytes | None], bool]:
        """What the layers change, and whether they have taken away all others."""
        changed: dict[bytes, bytes | None] = {}
        bare = False
        for layer in (*reversed(self._known.layers), self._own):
            if ino in layer.bare:
                bare = True
                changed.clear()
            values = layer.xattrs.get(ino)
            if values:
                changed.update(values)
            if isinstance(layer, Batch) and not layer.committed and (values or ino in layer.bare):
                self._saw(layer)
        return changed, bare

    def _knows_xattr(self, ino: int, name: bytes) -> bool:
        inode = self._peek(ino)
        if (ino, name) in self._caches.acls or (inode is not None and not inode.flags & INODE_XATTR):
            return True
        changed, bare = self._changed_xattrs(ino)
        if bare or name in changed:
            return True
        values = self._answers.xattrs.get(ino)
        return values is not None and (name not in values or values[name] is not None)

    async def xattr(self, ino: int, name: bytes) -> bytes | None:
        changed, bare = self._changed_xattrs(ino)
        if bare or name in changed:
            return changed.get(name)
        cached = self._caches.acls.get((ino, name))
        if cached is not None:
            return cached
        if not self._knows_xattr(ino, name):
            raise Miss((Kind.XATTR, ino, name))
        return self._answers.xattrs.get(ino, {}).get(name)

    async def xattr_names(self, ino: int) -> list[bytes]:
        changed, bare = self._changed_xattrs(ino)
        inode = self._peek(ino)
        none = bare or (inode is not None and not inode.flags & INODE_XATTR)
        values = {} if none else self._answers.xattrs.get(ino)
        if values is None:
            raise Miss((Kind.XATTR, ino, b""))
        names = {name for name in values if name not in changed}
        return sorted(names | {name for name, value in changed.items() if value is not None})

    def _put_xattr(self, ino: int, name: bytes, value: bytes | None) -> None:
        self.rows += 1
        self._own.xattrs.setdefault(ino, {})[name] = value

    async def put_xattr(self, ino: int, name: bytes, value: bytes) -> None:
        self._put_xattr(ino, name, value)

    async def delete_xattr(self, ino: int, name: bytes) -> None:
        self._put_xattr(ino, name, None)

    async def delete_xattrs(self, ino: int) -> None:
        self.rows += 1
        self._own.bare.add(ino)
        self._own.xattrs.pop(ino, None)

    # Orphans and sessions

    async def orphans(self, after: tuple[int, int], limit: int) -> list[tuple[int, int]]:
        while True:
            rows: list[tuple[int, int]] = self._answer(Kind.ORPHANS, *after, limit)
            full = len(rows) == limit
            end = rows[-1] if full else (FILE_SIZE_MAX, 0)
            there = set(rows)
            for layer in self._layers("orphans", "unheld"):
                there = {row for row in there if row[0] not in layer.unheld}
                for ino, sessions in layer.orphans.items():
                    for session, holds in sessions.items():
                        if not holds:
                            there.discard((ino, session))
                        elif after < (ino, session) <= end:
                            there.add((ino, session))
            if there or not full:
                return sorted(there)[:limit]
            limit *= 2

    async def orphan_sessions(self, ino: int) -> list[int]:
        there = set(self._answer(Kind.HOLDERS, ino))
        for layer in self._layers("orphans", "unheld"):
            if ino in layer.unheld:
                there.clear()
            for session, holds in layer.orphans.get(ino, {}).items():
                (there.add if holds else there.discard)(session)
        return list(there)

    def _put_orphan(self, ino: int, session: int, holds: bool) -> None:
        self.rows += 1
        self._own.orphans.setdefault(ino, {})[session] = holds

    async def add_orphan(self, ino: int, session: int) -> None:
        self._put_orphan(ino, session, True)

    async def delete_orphan(self, ino: int, session: int | None) -> None:
        if session is not None:
            self._put_orphan(ino, session, False)
            return
        self.rows += 1
        self._own.unheld.add(ino)
        self._own.orphans.pop(ino, None)

    async def sessions(self) -> list[SessionRow]:
        rows: dict[int, SessionRow | None] = {row.id: row for row in self._answer(Kind.SESSIONS)}
        for layer in self._layers("sessions"):
            rows.update(layer.sessions)
        return sorted((row for row in rows.values() if row is not None), key=lambda row: row.id)

    async def allocate_session(self) -> int:
        self.reserved = True
        session = self._numbers.session
        self._numbers.session += 1
        return session

    async def put_session(self, row: SessionRow) -> None:
        self.rows += 1
        self._own.sessions[row.id] = row

    async def delete_session(self, session: int) -> None:
        self.rows += 2
        self._own.sessions[session] = None
        self._own.forget_replies(session, FILE_SIZE_MAX)

    async def replies(self, session: int) -> list[tuple[int, bytes]]:
        replies: dict[int, bytes] = dict(self._answer(Kind.REPLIES, session))
        for layer in self._layers("replies", "confirmed"):
            last = layer.confirmed.get(session, 0)
            replies = {id_: reply for id_, reply in replies.items() if id_ > last}
            replies.update(layer.replies.get(session, {}))
        return sorted(replies.items())

    async def put_reply(self, session: int, id_: int, reply: bytes) -> None:
        self.rows += 1
        self._own.replies.setdefault(session, {})[id_] = reply

    async def delete_replies(self, session: int, last: int) -> None:
        self.rows += 1
        self._own.forget_replies(session, last)
