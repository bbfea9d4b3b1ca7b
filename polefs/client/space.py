"""statfs, and the volume's limit on bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

from polefs.data.files import FileStore
from polefs.meta.api import MetaAPI
from polefs.meta.model import NAME_MAX
from polefs.objects.directory import Space
from rawfuse import FileSystemStatus

BLOCK_SIZE = 4096


class VolumeSpace:
    """How full a volume is: the smaller of what its own limits and the place of its objects leave."""

    def __init__(self, meta: MetaAPI, files: FileStore, backing: Callable[[], Awaitable[Space]]) -> None:
        self._meta = meta
        self._files = files
        self._backing = backing

    async def status(self) -> FileSystemStatus:
        usage, backing = await self._meta.usage(), await self._backing()
        used = usage.bytes + self._files.dirty_bytes
        free, available = backing.bytes_free, backing.bytes_available
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
        """ENOSPC when ``length`` more bytes would pass the volume's limit. Bytes that replace others count as new until
        they are committed."""
        usage = await self._meta.usage()
        if usage.bytes_limit and usage.bytes + self._files.dirty_bytes + length > usage.bytes_limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
