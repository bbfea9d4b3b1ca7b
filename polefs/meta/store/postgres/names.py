"""Dentries, and pages of them."""

from __future__ import annotations

from polefs.meta.model import FILE_SIZE_MAX, Dentry, Inode
from polefs.meta.store.postgres.layers import ABSENT, Miss, Name, Want
from polefs.meta.store.postgres.queries import Kind
from polefs.meta.store.postgres.rows import Rows


class NameRows(Rows):
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
