"""Bringing contents into the cache before they are wanted."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from collections.abc import AsyncIterator, Sequence

from polefs.data.cache.reader import CachedContents
from polefs.meta.api import MetaAPI
from polefs.meta.model import ROOT_INO, Inode

log = logging.getLogger(__name__)

_PAGE = 256
"""Names of a directory looked at at a time."""

_AT_ONCE = 8
"""Files on their way at a time."""


class WarmUp:
    """``left``: bytes of the files that are still to be looked at, None until that is known."""

    def __init__(self, meta: MetaAPI, cached: CachedContents, room: int) -> None:
        """``room``: what the cache may hold, bytes."""
        self._meta = meta
        self._cached = cached
        self._room = room
        self.left: int | None = None

    async def run(self, paths: Sequence[bytes]) -> None:
        """Cache all files below these paths, which start at the root of the volume and have no symbolic links in them.
        ENOENT and ENOTDIR for a path that does not exist, ENOSPC when they do not fit; EIO and the like when some could
        not be fetched: the others are."""
        found = [await self._find(path) for path in paths]
        total = 0
        for inode in found:
            async for file in self._files(inode):
                total += file.allocated
        if total > self._room:
            raise OSError(
                errno.ENOSPC,
                f"{total} bytes are more than the cache may take ({self._room}): raise --cache-size, or name less",
            )
        self.left = total
        slots = asyncio.Semaphore(_AT_ONCE)
        failures: list[OSError] = []
        async with asyncio.TaskGroup() as tasks:
            for inode in found:
                async for file in self._files(inode):
                    await slots.acquire()
                    tasks.create_task(self._warm(file, slots, failures))
        if failures:
            text = f"{len(failures)} files could not be fetched: {failures[0].strerror or failures[0]}"
            raise OSError(failures[0].errno or errno.EIO, text)

    async def _find(self, path: bytes) -> Inode:
        inode = await self._meta.get_inode(ROOT_INO)
        for name in filter(None, path.split(b"/")):
            try:
                inode = await self._meta.lookup(inode.ino, name)
            except OSError as error:
                raise OSError(error.errno, f"{os.fsdecode(path)}: {error.strerror}") from None
        return inode

    async def _files(self, start: Inode) -> AsyncIterator[Inode]:
        """The regular files with contents below, or this one."""
        pending = [start]
        while pending:
            inode = pending.pop()
            if stat.S_ISREG(inode.mode) and inode.allocated and inode.inline is None:
                yield inode
            elif inode.is_dir:
                after = 0
                while page := await self._meta.list_dir_plus(inode.ino, after, _PAGE):
                    after = page[-1][0].cookie
                    for _, child in page:
                        if child.is_dir:
                            pending.append(child)
                        elif stat.S_ISREG(child.mode) and child.allocated and child.inline is None:
                            yield child
                    await asyncio.sleep(0)

    async def _warm(self, file: Inode, slots: asyncio.Semaphore, failures: list[OSError]) -> None:
        try:
            await self._cached.warm(file.ino)
        except FileNotFoundError:
            pass  # removed meanwhile
        except OSError as error:
            log.warning("warming up inode %d: %s", file.ino, error.strerror or error)
            failures.append(error)
        finally:
            slots.release()
            self.left = max(0, (self.left or 0) - file.allocated)
