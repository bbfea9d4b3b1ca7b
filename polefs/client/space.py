"""statfs, and who may still store something: the volume's limit on bytes, and the room at its place.

A file system that is full to the last byte cannot even remove a file: that is a change as well, and has to be stored.
So contents may not take the last of the room, and names leave half of that.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable

from polefs.client.orphans import Orphans
from polefs.data.files import FileStore
from polefs.meta.api import MetaAPI
from polefs.meta.model import NAME_MAX
from polefs.objects.base import Space
from rawfuse import FileSystemStatus

log = logging.getLogger(__name__)

BLOCK_SIZE = 4096

RESERVE = 128 << 20
"""Room that contents leave, bytes; on a small place ``RESERVE_SHARE`` of all."""
RESERVE_SHARE = 8
LOOK_AFTER = 256 << 20
"""Bytes handed out after which the place is looked at again: others may use it too."""
MOST_STORED = 8 << 20
"""What a request stores at most, bytes: larger copies share extents."""
AMPLE = 128 << 20
"""Room without which the kernel writes no file by itself, bytes."""
ENTRY = 8 << 10
"""What a name takes, with room for the pages that change, bytes."""


Look = Callable[[], Awaitable[Space]]


class VolumeSpace:
    """How full a volume is: the smaller of what its own limits and the place of its objects leave.

    ``backing`` tells how full that place is, ``local`` the same of the file system on which metadata and contents that
    are not yet written back stand."""

    def __init__(self, meta: MetaAPI, files: FileStore, orphans: Orphans, backing: Look, local: Look) -> None:
        self._meta = meta
        self._files = files
        self._orphans = orphans
        self._backing = backing
        self._local = local
        self._making: asyncio.Task[None] | None = None
        self._reserve = 0
        self._room = 0
        """What contents may still take until the next look, bytes; names go below 0."""

    async def status(self) -> FileSystemStatus:
        usage, backing = await self._meta.usage(), await self._backing()
        used = usage.bytes + self._files.dirty_bytes
        reserve = reserve_of(backing.bytes_total)
        free, available = max(0, backing.bytes_free - reserve), max(0, backing.bytes_available - reserve)
        if usage.bytes_limit:
            free = max(0, min(free, usage.bytes_limit - used))
            available = min(available, free)
        files_free = backing.files_free
        if usage.inodes_limit:
            files_free = max(0, min(files_free, usage.inodes_limit - usage.inodes))
        return FileSystemStatus(
            blocks=(used + free) // BLOCK_SIZE,
            free=free // BLOCK_SIZE,
            available=available // BLOCK_SIZE,
            files=usage.inodes + files_free,
            files_free=files_free,
            block_size=BLOCK_SIZE,
            name_max=NAME_MAX,
        )

    async def claim(self, length: int) -> None:
        """ENOSPC when there is no room for ``length`` more bytes, in the volume's limit or at its place, and none can
        be made: the cache gives way, and then what is dirty is written back, unless the store is out of reach for too
        long. Bytes that replace others count as new until they are committed."""
        usage = await self._meta.usage()
        if usage.bytes_limit and usage.bytes + self._files.dirty_bytes + length > usage.bytes_limit:
            await self._make_room()
            usage = await self._meta.usage()
            if usage.bytes + self._files.dirty_bytes + length > usage.bytes_limit:
                raise _full()
        # Once in the local directory, once as an object: the former is given back after the latter is stored.
        await self._take(min(length, MOST_STORED) * (1 if self._files.far else 2), 0)

    async def claim_again(self, length: int) -> None:
        """``claim`` after a write has found no room all the same: others have taken it."""
        self._room = min(self._room, 0)
        await self.claim(length)

    async def is_ample(self) -> bool:
        """Whether there is room for a file that the kernel writes by itself, which nobody counts: none in a volume
        with a limit."""
        if (await self._meta.usage()).bytes_limit:
            return False
        if self._room < AMPLE:
            await self._look()
        # So that the place is looked at now and then.
        self._room -= MOST_STORED
        return self._room >= AMPLE

    async def claim_entry(self, length: int = 0) -> None:
        """ENOSPC when there is no room for a name, or ``length`` bytes of other metadata, at the volume's place."""
        await self._take(ENTRY + 2 * length, -self._reserve // 2)

    async def _take(self, need: int, least: int) -> None:
        """``need`` bytes of the room, of which ``least`` must be left."""
        if self._room - need < least:
            await self._look()
            for make_room in (self._shrink_cache, self._make_room, self._shrink_cache):
                if self._room - need < least:
                    await make_room(least + need - self._room)
                    await self._look()
            if self._room - need < least:
                raise _full()
        self._room -= need

    async def _shrink_cache(self, size: int) -> None:
        # By more than is wanted now, so that the next one finds some.
        await self._files.shrink_cache(size + self._reserve)

    async def _make_room(self, size: int = 0) -> None:
        """Wait until what is dirty now is written back, together with all who wait for it."""
        if self._making is None:
            self._making = asyncio.get_running_loop().create_task(self._do_make_room())
        await asyncio.shield(self._making)

    async def _do_make_room(self) -> None:
        try:
            await self._orphans.release()
            await self._files.make_room()
        except OSError as error:
            log.warning("no room could be made: %s", error)
        finally:
            self._making = None

    async def _look(self) -> None:
        local = await self._local()
        self._reserve = reserve_of(local.bytes_total)
        objects = 0 if self._files.far else self._files.dirty_bytes
        self._room = min(local.bytes_available - objects - self._reserve, LOOK_AFTER)


def reserve_of(total: int) -> int:
    """What contents leave free at a place of so many bytes."""
    return min(RESERVE, total // RESERVE_SHARE)


def _full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
