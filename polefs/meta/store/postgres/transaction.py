"""The rows of a volume as a body sees them, and the changes that it collects.

A body never suspends here: what it needs is known, or the body is left with ``Miss``. So it runs as if alone, and
nothing that it has read changes before it is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from polefs.meta.model import ROOT_INO
from polefs.meta.store.postgres.attached import AttachedRows
from polefs.meta.store.postgres.contents import ContentRows
from polefs.meta.store.postgres.layers import Miss, Want
from polefs.meta.store.postgres.names import NameRows
from polefs.meta.store.postgres.queries import Kind

_symlinks = attrgetter("symlinks")
_segments = attrgetter("segments")


class PostgresTransaction(NameRows, AttachedRows, ContentRows):
    """Implements ``base.Transaction``; one object serves all operations, one after the other."""

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
