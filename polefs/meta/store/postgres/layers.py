"""What is known of a volume's rows without asking the database: caches, and above them layers of changes.

The server is the only one that writes to its volume, so what it has read stays true. A *layer* holds the rows that one
batch of operations has changed; it covers what the caches and the database tell until the batch is committed, and
until every query that began before has been made use of. So a row out of the database counts where no layer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

from lru import LRU

from polefs.meta.model import Extent, Inode, Segment, SessionRow
from polefs.meta.store.turn import Commit

Name: TypeAlias = tuple[int, int, int]
"""Inode number, kind and cookie of a dentry."""

ABSENT: Name = (0, 0, 0)
"""There is no such name."""

Want: TypeAlias = tuple[Any, ...]
"""Something to ask the database for: a query of ``queries`` and its arguments."""


class Miss(Exception):
    """A body needs what is not known. It is fetched, and the body runs again from its start."""

    def __init__(self, *wants: Want) -> None:
        self.wants = wants


class Answers:
    """What one round of queries has found out: rows as the database has them, below all layers. Good until a layer
    that was committed meanwhile goes, ``serial`` tells when."""

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.inodes: dict[int, Inode | None] = {}
        self.names: dict[tuple[int, bytes], Name] = {}
        self.xattrs: dict[int, dict[bytes, bytes | None]] = {}
        """All names; None stands for a value too big to come without being asked for."""
        self.extents: dict[int, list[tuple[int, int, list[Extent]]]] = {}
        """Ranges, and all extents that overlap each."""
        self.lives: dict[int, int | None] = {}
        self.other: dict[Want, Any] = {}


NOTHING = Answers(-1)


class Layer:
    """Changed rows by table and key; None: deleted."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode | None] = {}
        self.names: dict[int, dict[bytes, Name]] = {}
        self.symlinks: dict[int, bytes | None] = {}
        self.xattrs: dict[int, dict[bytes, bytes | None]] = {}
        self.bare: set[int] = set()
        """Inodes that have lost all their attributes, before those in ``xattrs``."""
        self.extents: dict[int, dict[int, Extent | None]] = {}
        self.segments: dict[int, Segment | None] = {}
        """New ones, and deleted ones."""
        self.lives: dict[int, int | None] = {}
        """Live bytes; None: the segment is deleted."""
        self.orphans: dict[int, dict[int, bool]] = {}
        """By inode and session; False: deleted."""
        self.unheld: set[int] = set()
        """Inodes that have lost all holders, before those in ``orphans``."""
        self.sessions: dict[int, SessionRow | None] = {}
        self.replies: dict[int, dict[int, bytes]] = {}
        self.confirmed: dict[int, int] = {}
        """By session: its replies up to this id are deleted."""
        self.deletions: dict[int, int | None] = {}

    def add(self, newer: Layer) -> None:
        """Take over the changes of another layer, whose lifetime ends here."""
        self.inodes.update(newer.inodes)
        _add_nested(self.names, newer.names)
        self.symlinks.update(newer.symlinks)
        for ino in newer.bare:
            self.bare.add(ino)
            self.xattrs.pop(ino, None)
        _add_nested(self.xattrs, newer.xattrs)
        _add_nested(self.extents, newer.extents)
        self.segments.update(newer.segments)
        self.lives.update(newer.lives)
        for ino in newer.unheld:
            self.unheld.add(ino)
            self.orphans.pop(ino, None)
        _add_nested(self.orphans, newer.orphans)
        self.sessions.update(newer.sessions)
        for session, last in newer.confirmed.items():
            self.forget_replies(session, last)
        _add_nested(self.replies, newer.replies)
        self.deletions.update(newer.deletions)

    def forget_replies(self, session: int, last: int) -> None:
        """Delete those with ids up to ``last``."""
        self.confirmed[session] = max(last, self.confirmed.get(session, 0))
        replies = self.replies.get(session)
        if replies:
            self.replies[session] = {id_: reply for id_, reply in replies.items() if id_ > last}


def _add_nested(to: dict[Any, dict[Any, Any]], newer: dict[Any, dict[Any, Any]]) -> None:
    for group, rows in newer.items():
        there = to.get(group)
        if there is None:
            to[group] = rows
        else:
            there.update(rows)


class Batch(Layer):
    """The changes of operations that are committed together."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        """Of the volume's commits, ascending by one."""
        self.rows = 0
        """Changes, roughly."""
        self.waiters: list[Commit] = []
        self.committed = False
        self.serial = 0
        """Of the last round of queries that may have read without it, once it is committed."""


class Caches:
    """Bounded, least recently used first. Inodes with inline contents are bigger and have a cache of their own."""

    def __init__(self, inodes: int, inlined: int, names: int) -> None:
        self.inodes: LRU[int, Inode] = LRU(inodes)
        self.inlined: LRU[int, Inode] = LRU(inlined)
        self.names: LRU[tuple[int, bytes], Name] = LRU(names)
        self.lives: LRU[int, int] = LRU(names)
        self.acls: LRU[tuple[int, bytes], bytes] = LRU(inlined)
        """Small attribute values: default ACLs, which each new name in a directory reads."""

    def clear(self) -> None:
        self.inodes.clear()
        self.inlined.clear()
        self.names.clear()
        self.lives.clear()
        self.acls.clear()

    def inode(self, ino: int) -> Inode | None:
        return self.inodes.get(ino) or self.inlined.get(ino)

    def put_inode(self, ino: int, inode: Inode | None) -> None:
        if inode is None:
            self.inodes.pop(ino, None)
            self.inlined.pop(ino, None)
        elif inode.inline is None:
            self.inodes[ino] = inode
            self.inlined.pop(ino, None)
        else:
            self.inlined[ino] = inode
            self.inodes.pop(ino, None)


ACL_MAX = 1024
"""Longest attribute value that is cached, bytes."""


class Known:
    """The layers of a volume, newest first, and its caches, which hold what the layers tell where they hold
    anything."""

    def __init__(self, caches: Caches) -> None:
        self.caches = caches
        self.layers: list[Batch] = []

    def add(self, batch: Batch, changes: Layer) -> None:
        """Let one operation's changes be part of a batch, the first of ``layers``."""
        caches = self.caches
        for ino, inode in changes.inodes.items():
            caches.put_inode(ino, inode)
        for parent, names in changes.names.items():
            for name, entry in names.items():
                caches.names[parent, name] = entry
        for segment, live in changes.lives.items():
            if live is None:
                caches.lives.pop(segment, None)
            else:
                caches.lives[segment] = live
        for ino, values in changes.xattrs.items():
            for name, value in values.items():
                if value is None or len(value) > ACL_MAX:
                    caches.acls.pop((ino, name), None)
                else:
                    caches.acls[ino, name] = value
        batch.add(changes)

    def learn(self, answers: Answers) -> None:
        """Cache rows that have come out of the database."""
        caches, layers = self.caches, self.layers
        for ino, inode in answers.inodes.items():
            if inode is not None and caches.inode(ino) is None and not any(ino in layer.inodes for layer in layers):
                caches.put_inode(ino, inode)
        for key, entry in answers.names.items():
            parent, name = key
            if key not in caches.names and not any(name in layer.names.get(parent, ()) for layer in layers):
                caches.names[key] = entry
        for segment, live in answers.lives.items():
            if live is not None and not any(segment in layer.lives for layer in layers):
                caches.lives[segment] = live
        for ino, values in answers.xattrs.items():
            if any(ino in layer.xattrs or ino in layer.bare for layer in layers):
                continue
            for name, value in values.items():
                if value is not None and len(value) <= ACL_MAX:
                    caches.acls[ino, name] = value

    def retire(self, serial: int) -> None:
        """Let go of committed layers that no answer needs any more: rounds up to ``serial`` have been made use of."""
        self.layers = [layer for layer in self.layers if not layer.committed or layer.serial > serial]

    def forget(self) -> None:
        """Nothing is known any more."""
        self.layers.clear()
        self.caches.clear()

    def find(self, table: Callable[[Layer], dict[Any, Any]], key: Hashable) -> tuple[bool, Any, Batch | None]:
        """Whether a layer has a row, the row, and the batch that must be committed before others may see it."""
        for layer in self.layers:
            rows = table(layer)
            if key in rows:
                return True, rows[key], None if layer.committed else layer
        return False, None, None
