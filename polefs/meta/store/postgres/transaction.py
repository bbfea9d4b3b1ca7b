"""The rows of a volume as a body sees them, and the changes that it collects.

A body never suspends here: what it needs is known, or the body is left with ``Miss``. So it runs as if alone, and
nothing that it has read changes before it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from polefs.meta.model import FILE_SIZE_MAX, INODE_XATTR, ROOT_INO, Dentry, Extent, Inode, Segment, SessionRow, Usage
from polefs.meta.store.base import SOLE
from polefs.meta.store.postgres.layers import ABSENT, NOTHING, Answers, Batch, Known, Layer, Miss, Name, Want
from polefs.meta.store.postgres.queries import Kind

T = TypeVar("T")

_inodes = attrgetter("inodes")
_symlinks = attrgetter("symlinks")
_segments = attrgetter("segments")
_lives = attrgetter("lives")


class Numbers:
    """Where the volume's counters stand. Each commit writes them; numbers of operations that failed stay unused."""

    def __init__(self) -> None:
        self.ino = 0
        self.cookie = 0
        self.segment = 0
        self.session = 0
        self.writer = 0

    def marks(self) -> tuple[int, ...]:
        """What a commit notes of them (``tables.MARK``)."""
        return self.ino, self.cookie, self.segment, self.session, self.writer


class PostgresTransaction:
    """Implements ``base.Transaction``; one object serves all operations, one after the other."""

    def __init__(self, known: Known, usage: Usage, numbers: Numbers) -> None:
        self._known = known
        self._caches = known.caches
        self._usage = usage
        self._numbers = numbers
        self.session = SOLE
        self._own = Layer()
        self._answers = NOTHING
        self._bytes = 0
        self._count = 0
        self._writer: int | None = None
        self.rows = 0
        """Rows changed by this operation."""
        self.reserved = False
        """It was given numbers."""
        self.depends: Batch | None = None
        """The newest batch of which the operation has seen something that is not committed yet."""

    # Life of the operation (the store's)

    def begin(self, answers: Answers) -> None:
        self._answers = answers
        self.depends = None
        self.reserved = False

    def take_back(self) -> None:
        """Forget what the operation has changed."""
        if self.rows:
            self._own = Layer()
            self.rows = 0
        self._usage.bytes -= self._bytes
        self._usage.inodes -= self._count
        self._bytes = self._count = 0
        self._writer = None

    def apply(self, batch: Batch) -> None:
        """Make the changes part of a batch."""
        if self.rows:
            self._known.add(batch, self._own)
            batch.rows += self.rows
            self._own = Layer()
            self.rows = 0
        if self._writer is not None:
            self._numbers.writer = self._writer
            self._writer = None
        self._bytes = self._count = 0

    def _saw(self, batch: Batch | None) -> None:
        if batch is not None and (self.depends is None or batch.number > self.depends.number):
            self.depends = batch

    def prefetch(
        self,
        *,
        inodes: Iterable[int] = (),
        names: Iterable[tuple[int, bytes]] = (),
        ancestors: Iterable[int] = (),
        symlinks: Iterable[int] = (),
        xattrs: Iterable[tuple[int, bytes]] = (),
        extents: Iterable[tuple[int, int, int]] = (),
        cuts: Iterable[tuple[int, int, int]] = (),
        heads: Iterable[tuple[int, int]] = (),
        holders: Iterable[int] = (),
        segments: Iterable[int] = (),
        lives: Iterable[int] = (),
    ) -> None:
        wants: list[Want] = [(Kind.INODE, ino) for ino in inodes if not self._knows_inode(ino)]
        for key in names:
            entry = self._name(*key)
            if entry is None:
                wants.append((Kind.NAME, *key))
            elif entry[0] and not self._knows_inode(entry[0]):
                wants.append((Kind.INODE, entry[0]))
        for ino in ancestors:
            wants += self._unknown_ancestors(ino)
        for ino in symlinks:
            if not self._known.find(_symlinks, ino)[0] and (Kind.SYMLINK, ino) not in self._answers.other:
                wants.append((Kind.SYMLINK, ino))
        for ino, name in xattrs:
            if not self._knows_xattr(ino, name):
                wants.append((Kind.XATTR, ino, name))
        for kind, ranges in ((Kind.EXTENTS, extents), (Kind.CUT, cuts)):
            for ino, start, end in ranges:
                if start < end and self._base_extents(ino, start, end) is None:
                    wants.append((kind, ino, start, end))
        for ino, count in heads:
            if (Kind.HEAD, ino, count) not in self._answers.other:
                wants.append((Kind.HEAD, ino, count))
        wants += [(Kind.HOLDERS, ino) for ino in holders if (Kind.HOLDERS, ino) not in self._answers.other]
        for id_ in segments:
            if not self._known.find(_segments, id_)[0] and (Kind.SEGMENT, id_) not in self._answers.other:
                wants.append((Kind.SEGMENT, id_))
        for id_ in lives:
            if not self._live(id_)[0]:
                wants.append((Kind.LIVE, id_))
        if wants:
            raise Miss(*wants)

    # Inodes

    async def inode(self, ino: int) -> Inode | None:
        own = self._own.inodes
        if own and ino in own:
            return own[ino]
        caches = self._caches
        inode = caches.inodes.get(ino) or caches.inlined.get(ino)
        layers = self._known.layers
        if inode is not None and not layers:
            return inode
        for layer in layers:
            if ino in layer.inodes:
                if not layer.committed:
                    self._saw(layer)
                return layer.inodes[ino]
        if inode is not None:
            return inode
        found = self._answers.inodes
        if ino in found:
            return found[ino]
        raise Miss((Kind.INODE, ino))

    def _knows_inode(self, ino: int) -> bool:
        return (
            self._caches.inode(ino) is not None
            or ino in self._own.inodes
            or ino in self._answers.inodes
            or self._known.find(_inodes, ino)[0]
        )

    def _peek(self, ino: int) -> Inode | None:
        """The inode as it was before this operation, when it is known and exists."""
        there, inode, _ = self._known.find(_inodes, ino)
        if there:
            peeked: Inode | None = inode
            return peeked
        return self._caches.inode(ino) or self._answers.inodes.get(ino)

    def _unknown_ancestors(self, ino: int) -> list[Want]:
        """What to ask for to know the directory and all above it."""
        seen: set[int] = set()
        while ino not in seen:
            seen.add(ino)
            if not self._knows_inode(ino):
                return [(Kind.ANCESTORS, ino)]
            inode = self._peek(ino)
            if inode is None or ino == ROOT_INO:
                break
            ino = inode.parent
        return []

    def put_inode(self, inode: Inode) -> None:
        self.rows += 1
        self._own.inodes[inode.ino] = inode

    async def delete_inode(self, ino: int) -> None:
        self.rows += 1
        self._own.inodes[ino] = None

    # Names

    def _name(self, parent: int, name: bytes) -> Name | None:
        """The dentry, None when it is not known."""
        own = self._own.names
        if own and parent in own and name in own[parent]:
            return own[parent][name]
        for layer in self._known.layers:
            names = layer.names.get(parent)
            if names is not None and name in names:
                if not layer.committed:
                    self._saw(layer)
                return names[name]
        key = (parent, name)
        return self._caches.names.get(key) or self._answers.names.get(key)

    def _known_name(self, parent: int, name: bytes) -> Name:
        entry = self._name(parent, name)
        if entry is None:
            raise Miss((Kind.NAME, parent, name))
        return entry

    def _put_name(self, parent: int, name: bytes, entry: Name) -> None:
        self.rows += 1
        self._own.names.setdefault(parent, {})[name] = entry

    async def dentry(self, parent: int, name: bytes) -> int:
        return self._known_name(parent, name)[0]

    async def add_dentry(self, parent: int, name: bytes, ino: int, kind: int) -> bool:
        if self._known_name(parent, name)[0]:
            return False
        self._put_name(parent, name, (ino, kind, self._cookie()))
        return True

    async def set_dentry(self, parent: int, name: bytes, ino: int, kind: int) -> None:
        entry = self._known_name(parent, name)
        self._put_name(parent, name, (ino, kind, entry[2]))

    async def move_dentry(self, parent: int, name: bytes, new_parent: int, new_name: bytes, ino: int) -> None:
        entry = self._known_name(parent, name)
        self._put_name(parent, name, ABSENT)
        self._put_name(new_parent, new_name, (ino, entry[1], self._cookie()))

    async def delete_dentry(self, parent: int, name: bytes) -> None:
        self._put_name(parent, name, ABSENT)

    def _changed_names(self, parent: int) -> dict[bytes, Name]:
        """What all layers together change in a directory."""
        changed: dict[bytes, Name] = {}
        for layer in reversed(self._known.layers):
            names = layer.names.get(parent)
            if names:
                changed.update(names)
                if not layer.committed:
                    self._saw(layer)
        changed.update(self._own.names.get(parent, {}))
        return changed

    async def dentries(self, parent: int, after: int, limit: int) -> list[Dentry]:
        return self._page(Kind.LIST, parent, after, limit)

    async def dentries_plus(self, parent: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]:
        missing: list[Want] = []
        found: list[tuple[Dentry, Inode]] = []
        for dentry in self._page(Kind.LIST_PLUS, parent, after, limit):
            try:
                inode = await self.inode(dentry.ino)
            except Miss as miss:
                missing += miss.wants
                continue
            if inode is not None:
                found.append((dentry, inode))
        if missing:
            raise Miss(*missing)
        return found

    def _page(self, kind: Kind, parent: int, after: int, limit: int) -> list[Dentry]:
        """The first names after a cookie, out of the database's and the layers': not all ``limit`` where layers take
        some away, but none only at the end."""
        changed = self._changed_names(parent)
        while True:
            rows: list[Dentry] = self._answer(kind, parent, after, limit)
            if not changed:
                return rows
            full = len(rows) == limit
            end = rows[-1].cookie if full else FILE_SIZE_MAX
            page = [row for row in rows if row.name not in changed]
            page += [
                Dentry(cookie, name, ino, dentry_kind)
                for name, (ino, dentry_kind, cookie) in changed.items()
                if after < cookie <= end
            ]
            if page or not full:
                page.sort(key=lambda dentry: dentry.cookie)
                return page[:limit]
            limit *= 2

    async def is_empty(self, parent: int) -> bool:
        changed = self._changed_names(parent)
        if any(entry[0] for entry in changed.values()):
            return False
        # All that the layers tell is what they have taken away. One name more than that decides.
        asked = 1 << len(changed).bit_length()
        names: list[bytes] = self._answer(Kind.FIRST, parent, asked)
        return all(name in changed for name in names)

    # Numbers

    def _cookie(self) -> int:
        self.reserved = True
        cookie = self._numbers.cookie
        self._numbers.cookie += 1
        return cookie

    async def allocate_ino(self) -> int:
        self.reserved = True
        ino = self._numbers.ino
        self._numbers.ino += 1
        return ino

    async def allocate_segments(self, count: int) -> int:
        self.reserved = True
        first = self._numbers.segment
        self._numbers.segment += count
        return first

    async def exchange_writer(self, writer: int) -> int:
        self.reserved = True
        previous = self._numbers.writer
        self._writer = writer
        return previous

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

    def _layers(self, *tables: str) -> Iterator[Layer]:
        """Oldest first; those that hold rows of these tables and are not committed count as seen."""
        for layer in reversed(self._known.layers):
            if not layer.committed and any(getattr(layer, table) for table in tables):
                self._saw(layer)
            yield layer
        yield self._own

    # Contents

    def _base_extents(self, ino: int, start: int, end: int) -> list[Extent] | None:
        """The database's extents that overlap a range, and others; None when they are not known. None of them are
        left of those that there may be where the inode says that it has none now."""
        inode = self._peek(ino)
        if inode is not None and (not inode.allocated or inode.inline is not None):
            return []
        for first, last, extents in self._answers.extents.get(ino, ()):
            if first <= start and end <= last:
                return extents
        return None

    def _merged_extents(self, ino: int, start: int, end: int) -> list[Extent]:
        """All extents that overlap a range, and others, in no particular order."""
        base = self._base_extents(ino, start, end)
        if base is None:
            raise Miss((Kind.EXTENTS, ino, start, end))
        changed: dict[int, Extent | None] = {}
        for layer in (*reversed(self._known.layers), self._own):
            rows = layer.extents.get(ino)
            if rows:
                changed.update(rows)
                if isinstance(layer, Batch) and not layer.committed:
                    self._saw(layer)
        if not changed:
            return base
        merged = [extent for extent in base if extent.offset not in changed]
        merged += [extent for extent in changed.values() if extent is not None]
        return merged

    async def extents(self, ino: int, start: int, end: int) -> list[Extent]:
        found = [each for each in self._merged_extents(ino, start, end) if each.offset < end and each.end > start]
        found.sort(key=lambda extent: extent.offset)
        return found

    async def put_extents(self, ino: int, extents: Sequence[Extent]) -> None:
        self.rows += len(extents)
        rows = self._own.extents.setdefault(ino, {})
        for extent in extents:
            rows[extent.offset] = extent

    async def delete_extents(self, ino: int, start: int, end: int) -> list[tuple[int, int]]:
        sums: dict[int, int] = {}
        doomed = [each for each in self._merged_extents(ino, start, end) if start <= each.offset < end]
        rows = self._own.extents.setdefault(ino, {})
        for extent in doomed:
            sums[extent.segment] = sums.get(extent.segment, 0) + extent.length
            rows[extent.offset] = None
        self.rows += len(doomed)
        return list(sums.items())

    async def extent_boundary(self, ino: int, count: int) -> int:
        boundary: int = self._answer(Kind.HEAD, ino, count)
        # Where layers have removed some of the first, more of the others may go too.
        offsets = sorted(each.offset for each in self._merged_extents(ino, 0, boundary) if each.offset < boundary)
        return offsets[count] if len(offsets) > count else boundary

    async def segment(self, segment: int) -> Segment | None:
        found: Segment | None
        if segment in self._own.segments:
            return self._own.segments[segment]
        there, found, batch = self._known.find(_segments, segment)
        if there:
            self._saw(batch)
            return found
        found = self._answer(Kind.SEGMENT, segment)
        return found

    def _live(self, segment: int) -> tuple[bool, int | None]:
        """Whether a segment's live bytes are known, and how many they are."""
        if segment in self._own.lives:
            return True, self._own.lives[segment]
        there, live, batch = self._known.find(_lives, segment)
        if there:
            self._saw(batch)
            return True, live
        cached = self._caches.lives.get(segment)
        if cached is not None:
            return True, cached
        return segment in self._answers.lives, self._answers.lives.get(segment)

    async def live_bytes(self, segment: int) -> int | None:
        known, live = self._live(segment)
        if not known:
            raise Miss((Kind.LIVE, segment))
        return live

    async def add_segments(self, segments: Sequence[tuple[Segment, int]]) -> None:
        self.rows += len(segments)
        for segment, live in segments:
            self._own.segments[segment.id] = segment
            self._own.lives[segment.id] = live

    async def add_live(self, segment: int, delta: int) -> int | None:
        live = await self.live_bytes(segment)
        if live is not None:
            self.rows += 1
            live = self._own.lives[segment] = live + delta
        return live

    async def queue_deletion(self, segment: int, since: int) -> None:
        self.rows += 1
        self._own.deletions[segment] = since

    async def dead_segments(self, before: int, after: int, limit: int) -> list[int]:
        changed: dict[int, int | None] = {}
        for layer in self._layers("deletions"):
            changed.update(layer.deletions)
        there = [each for each, when in changed.items() if when is not None and when <= before and each > after]
        while True:
            rows: list[int] = self._answer(Kind.DEAD, before, after, limit)
            full = len(rows) == limit
            end = rows[-1] if full else FILE_SIZE_MAX
            page = [each for each in rows if each not in changed] + [each for each in there if each <= end]
            if page or not full:
                return sorted(page)[:limit]
            limit *= 2

    async def segment_usage(self, after: int, limit: int) -> list[tuple[int, int, int]]:
        changed: dict[int, Segment | None] = {}
        for layer in reversed(self._known.layers):
            changed.update(layer.segments)
        while True:
            rows: list[tuple[int, int, int]] = self._answer(Kind.SEGMENT_USAGE, after, limit)
            full = len(rows) == limit
            end = rows[-1][0] if full else FILE_SIZE_MAX
            sizes = {id_: size for id_, size, _ in rows}
            lives = {id_: live for id_, _, live in rows}
            sizes.update((id_, new.size) for id_, new in changed.items() if new is not None and after < id_ <= end)
            for layer in reversed(self._known.layers):
                lives.update((id_, live) for id_, live in layer.lives.items() if live is not None)
                if layer.lives and not layer.committed:
                    self._saw(layer)
            page = [(id_, sizes[id_], lives[id_]) for id_ in sorted(sizes) if changed.get(id_, ...) is not None]
            if page or not full:
                return page[:limit]
            limit *= 2

    async def segment_extents(self, segment: int, limit: int) -> list[tuple[int, Extent]]:
        changed: dict[tuple[int, int], Extent | None] = {}
        for layer in reversed(self._known.layers):
            for ino, rows in layer.extents.items():
                changed.update(((ino, offset), extent) for offset, extent in rows.items())
            if layer.extents and not layer.committed:
                self._saw(layer)
        while True:
            found: list[tuple[int, Extent]] = self._answer(Kind.SEGMENT_EXTENTS, segment, limit)
            page = [(ino, each) for ino, each in found if (ino, each.offset) not in changed]
            page += [(ino, each) for (ino, _), each in changed.items() if each is not None and each.segment == segment]
            if page or len(found) < limit:
                return page[:limit]
            limit *= 2

    async def delete_segments(self, ids: Sequence[int]) -> None:
        self.rows += 2 * len(ids)
        for id_ in ids:
            self._own.segments[id_] = None
            self._own.lives[id_] = None
            self._own.deletions[id_] = None

    # Counters

    def usage(self) -> Usage:
        return self._usage

    def add_usage(self, bytes_: int, inodes: int) -> None:
        self._usage.bytes += bytes_
        self._usage.inodes += inodes
        self._bytes += bytes_
        self._count += inodes

    def _answer(self, *want: Any) -> Any:
        try:
            return self._answers.other[want]
        except KeyError:
            raise Miss(want) from None
