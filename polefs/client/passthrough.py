"""Read-only mounts of cached volumes: files that are cached as a whole are read by the kernel itself.

Nothing changes on a read-only mount, so a complete cache file stays right for as long as it is open, and every handle
of an inode may be served from it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

from polefs.client.atime import AccessTimes
from polefs.client.filesystem import PoleFileSystem
from polefs.data.cache.reader import CachedContents, Reading
from polefs.data.cache.store import CachedFile
from polefs.data.files import FileStore
from polefs.meta.api import MetaAPI
from polefs.objects.base import Space
from rawfuse import AttributesReply, InitFlag, OpenedFile, OpenFlag, SetAttrFlag, ops


class PassthroughFileSystem(PoleFileSystem):
    """``PoleFileSystem`` with handles: a cache file is not removed as long as one may be served from it."""

    features = PoleFileSystem.features | InitFlag.PASSTHROUGH

    def __init__(
        self,
        meta: MetaAPI,
        files: FileStore,
        cached: CachedContents,
        backing: Callable[[], Awaitable[Space]],
        local: Callable[[], Awaitable[Space]],
        times: AccessTimes,
    ) -> None:
        super().__init__(meta, files, backing, local, times)
        self._cached = cached
        self._held: dict[int, CachedFile[Reading]] = {}
        """By handle, as long as it is open."""
        self._handles = 0

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        """EROFS for writing, even when the mount has been made writable behind our back."""
        if op.flags & os.O_ACCMODE != os.O_RDONLY:
            raise _read_only()
        opened = OpenedFile(flags=OpenFlag.KEEP_CACHE)
        file = await self._cached.hold_complete(await self._meta.get_inode(op.nodeid))
        if file is not None:
            assert file.handle is not None
            self._handles += 1
            self._held[self._handles] = file
            opened.fh = self._handles
            opened.backing = file.handle.fd
        return opened

    async def set_inode_attributes(self, op: ops.SetInodeAttributes) -> AttributesReply:
        if op.valid & SetAttrFlag.SIZE:
            raise _read_only()
        return await super().set_inode_attributes(op)

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        file = self._held.pop(op.fh, None)
        if file is not None:
            file.users -= 1


def _read_only() -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))
