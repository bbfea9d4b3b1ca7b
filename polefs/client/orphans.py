"""Files without a name that the kernel still knows: they are removed for good when it forgets them.

The kernel keeps an inode as long as anything uses it (open files, working directories, mappings) and then sends FORGET,
so look-up counts tell what open counts would.
"""

from __future__ import annotations

import asyncio
import logging

from polefs.data.files import FileStore
from polefs.meta.api import MetaAPI
from polefs.meta.model import Inode

log = logging.getLogger(__name__)

RELEASE_AFTER = 0.1
"""Seconds for which removed files are gathered, to be released in one transaction; and an fsync that comes in between
does not wait for their removal."""
MOST_GATHERED = 1024


class Orphans:
    """Look-up counts of every inode that the kernel knows, and the nameless ones among them."""

    def __init__(self, meta: MetaAPI, files: FileStore) -> None:
        self._meta = meta
        self._files = files
        self._lookups: dict[int, int] = {}
        self._nameless: set[int] = set()
        self._ready: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._release: asyncio.Task[None] | None = None

    def looked_up(self, ino: int) -> None:
        """An entry for ``ino`` goes to the kernel."""
        lookups = self._lookups
        lookups[ino] = lookups.get(ino, 0) + 1

    def forgotten(self, ino: int, count: int) -> None:
        left = self._lookups.get(ino, 0) - count
        if left > 0:
            self._lookups[ino] = left
            return
        self._lookups.pop(ino, None)
        if ino in self._nameless:
            self._nameless.discard(ino)
            self._reclaim(ino)

    def unlinked(self, inode: Inode) -> None:
        """A name of ``inode`` is gone; perhaps its last."""
        if inode.nlink:
            return
        if inode.ino in self._lookups:
            self._nameless.add(inode.ino)
        else:
            self._reclaim(inode.ino)

    def linked(self, ino: int) -> None:
        """A nameless file has a name (again)."""
        self._nameless.discard(ino)

    def _reclaim(self, ino: int) -> None:
        self._files.forget(ino)
        self._ready.append(ino)
        if len(self._ready) >= MOST_GATHERED:
            self._start_release()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RELEASE_AFTER, self._start_release)

    def _start_release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._release is None and self._ready:
            self._release = asyncio.get_running_loop().create_task(self._release_all())

    async def _release_all(self) -> None:
        try:
            while self._ready:
                ready, self._ready = self._ready, []
                await self._meta.release_orphans(ready)
                self._files.reclaim_soon()
        except OSError as error:
            # They stay orphans of this session; the next mount releases them.
            log.warning("removed files keep their space until the next mount: %s", error.strerror)
        finally:
            self._release = None

    async def release(self) -> None:
        """Release what has been gathered, now."""
        self._start_release()
        if self._release is not None:
            await asyncio.shield(self._release)
