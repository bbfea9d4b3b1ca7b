"""Files that the kernel reads and writes itself, in local files of the cache (FUSE passthrough).

The kernel serves all handles of an inode the same way for as long as one of them is open, so the first one decides:
they come to us, or they are passed through. In the latter case the file is *held* or *direct* (``polefs.data.direct``):

* opened for reading, when all of it is committed and cached: held;
* made, or opened for writing when it is as above and small enough to be compared: direct;
* held and then opened for writing: direct from now on. Where a write has to be seen by us, since it clears set-ID bits
  or takes from a limit, WRITE comes to us and only mappings are passed through.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from time import time_ns
from typing import Final

from polefs.client.atime import AccessTimes
from polefs.client.filesystem import PoleFileSystem
from polefs.data.direct import DirectFiles
from polefs.data.files import FileStore
from polefs.meta.api import MetaAPI
from polefs.meta.model import INODE_XATTR, Caller, Inode
from polefs.objects.base import Space
from rawfuse import FOREVER, AttributesReply, Entry, InitFlag, OpenedFile, OpenFlag, SetAttrFlag, ops

log = logging.getLogger(__name__)

LEAST_READ: Final = 128 << 10
"""Smaller files are not passed through for reading while the volume can be written to, bytes: they come from the
kernel's page cache just as fast, and their cache files stay closed."""

MOST_READ: Final = 2 << 30
"""Larger files are not passed through for reading either while the volume can be written to, bytes: who opens one for
writing that others have open in passthrough waits until it has been read."""

MOST_COMPARED: Final = 32 << 20
"""Larger files that exist are not passed through for writing, bytes: to see later what has changed in one it has to be
read before."""

_SET_ID = stat.S_ISUID | stat.S_ISGID
_PERMISSIONS = 0o7777
_CAPABILITY = b"security.capability"


class _Opened:
    """An inode with open handles; ``passed`` is None until the first of them has decided."""

    __slots__ = ("handles", "lock", "passed")

    def __init__(self) -> None:
        self.handles = 1
        self.passed: bool | None = None
        self.lock = asyncio.Lock()


class PassthroughFileSystem(PoleFileSystem):
    """``PoleFileSystem`` with handles. ``drop_attributes``, to be set once it is mounted, lets the kernel ask for an
    inode's attributes anew."""

    features = PoleFileSystem.features | InitFlag.PASSTHROUGH
    # With it the kernel sends no SETATTR for O_TRUNC, and leaves to OPEN what is done in one place.
    unwanted = PoleFileSystem.unwanted | InitFlag.ATOMIC_O_TRUNC

    def __init__(
        self,
        meta: MetaAPI,
        files: FileStore,
        direct: DirectFiles,
        backing: Callable[[], Awaitable[Space]],
        local: Callable[[], Awaitable[Space]],
        times: AccessTimes,
        *,
        read_only: bool,
        writing: bool,
    ) -> None:
        """``writing``: also files that are written are passed through."""
        super().__init__(meta, files, backing, local, times)
        self._direct = direct
        self._read_only = read_only
        self._writing = writing
        self._inodes: dict[int, _Opened] = {}
        self._handles = 0
        self._writers: set[int] = set()
        """Handles that may change a direct file."""
        self.drop_attributes: Callable[[int], Awaitable[object]] | None = None
        self._dropping: set[asyncio.Future[object]] = set()

    def _attr_ttl(self, ino: int) -> int:
        # A file that is changed through a mapping changes its times, and the kernel does not notice.
        file = self._direct.find(ino)
        return FOREVER if file is None or not file.writers else 0

    # Handles

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        """EROFS for writing on a read-only mount, even when it has been made writable behind our back."""
        writing = op.flags & os.O_ACCMODE != os.O_RDONLY
        if writing and self._read_only:
            raise _error(errno.EROFS)
        ino = op.nodeid
        opened = self._inodes.get(ino)
        if opened is None:
            opened = self._inodes[ino] = _Opened()
        else:
            opened.handles += 1
        try:
            async with opened.lock:
                return await self._open(ino, opened, op.flags, writing)
        except BaseException:
            self._leave(ino, opened)
            raise

    async def create_file(self, op: ops.CreateFile) -> tuple[Entry, OpenedFile]:
        await self._space.claim_entry()
        ample = self._writing and self._direct.room and await self._space.is_ample()
        caller = Caller(op.uid, op.gid, op.pid)
        mode = stat.S_IFREG | op.mode & _PERMISSIONS
        inode = await self._meta.make_node(caller, op.nodeid, op.name, mode, op.umask)
        if ample and op.flags & os.O_ACCMODE != os.O_RDONLY and not inode.mode & _SET_ID:
            try:
                file = self._direct.begin_new(inode)
            except OSError as error:
                log.warning("inode %d is not passed through: %s", inode.ino, error)
            else:
                reply = self._made(inode.ino, passed=True)
                self._direct.opened(file, writing=True)
                self._writers.add(reply.fh)
                reply.backing = file.replica.fd
                return self._entry(inode), reply
        return self._entry(inode), self._made(inode.ino, passed=False)

    async def create_tmpfile(self, op: ops.CreateTmpfile) -> tuple[Entry, OpenedFile]:
        entry, _ = await super().create_tmpfile(op)
        return entry, self._made(entry.nodeid, passed=False)

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        # Nothing is awaited here: that the last handle is gone must be known to all before the next one comes.
        opened = self._inodes[op.nodeid]
        writing = op.fh in self._writers
        self._writers.discard(op.fh)
        if opened.passed:
            self._direct.closed(op.nodeid, writing=writing)
        self._leave(op.nodeid, opened)

    def _leave(self, ino: int, opened: _Opened) -> None:
        opened.handles -= 1
        if not opened.handles:
            del self._inodes[ino]

    def _made(self, ino: int, *, passed: bool) -> OpenedFile:
        """The first handle of a new inode."""
        opened = self._inodes[ino] = _Opened()
        opened.passed = passed
        return self._reply_opened()

    def _reply_opened(self) -> OpenedFile:
        self._handles += 1
        return OpenedFile(self._handles, OpenFlag.KEEP_CACHE)

    async def _open(self, ino: int, opened: _Opened, flags: int, writing: bool) -> OpenedFile:
        reply = self._reply_opened()
        inode = await self._meta.get_inode(ino)
        if opened.passed is None:
            opened.passed = await self._may_begin(inode, writing)
            if opened.passed:
                opened.passed = await self._pass(inode, reply, writing, first=True)
        elif opened.passed:
            await self._pass(inode, reply, writing, first=False)
        if opened.passed and not writing and not flags & os.O_NOATIME:
            # The reads that follow do not come to us.
            self._times.read(self._files.overlay(inode), time_ns())
        return reply

    async def _may_begin(self, inode: Inode, writing: bool) -> bool:
        if self._direct.find(inode.ino) is not None:
            return True
        if not writing:
            return self._read_only or LEAST_READ <= inode.size <= MOST_READ
        return (
            LEAST_READ <= inode.size <= MOST_COMPARED
            and self._direct.room
            and await self._space.is_ample()
            and await self._may_write(inode)
        )

    async def _may_write(self, inode: Inode) -> bool:
        """Whether writes to it need not be seen by us."""
        if not self._writing or inode.mode & _SET_ID or (await self._meta.usage()).bytes_limit:
            return False
        if inode.flags & INODE_XATTR:
            with contextlib.suppress(OSError):
                await self._meta.get_xattr(inode.ino, _CAPABILITY)
                return False
        return True

    async def _pass(self, inode: Inode, reply: OpenedFile, writing: bool, *, first: bool) -> bool:
        """Let the handle be passed through; False when that cannot begin with it."""
        ino = inode.ino
        unseen = writing and await self._may_write(inode)
        counted = False
        if self._direct.find(ino) is None:
            held = await self._direct.hold(inode)
            counted = held is not None
            if held is not None and not writing:
                assert held.handle is not None
                reply.backing = held.handle.fd
                return True
            if held is not None:
                try:
                    await self._direct.begin_held(ino)
                except BaseException as error:
                    self._direct.closed(ino, writing=False)
                    if not first or not isinstance(error, OSError):
                        raise
                    log.warning("inode %d is not passed through: %s", ino, error)
                    return False
        file = self._direct.find(ino)
        if file is None:
            if first:
                return False
            raise _error(errno.EIO)
        self._direct.opened(file, writing=writing, counted=counted)
        if writing:
            self._writers.add(reply.fh)
            self._drop_attributes(ino)
        if not writing or unseen:
            reply.backing = file.replica.fd
        return True

    def _drop_attributes(self, ino: int) -> None:
        if self.drop_attributes is not None:
            task = asyncio.ensure_future(self.drop_attributes(ino))
            self._dropping.add(task)
            task.add_done_callback(self._dropped)

    def _dropped(self, task: asyncio.Future[object]) -> None:
        self._dropping.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("attributes are not dropped: %s", error)

    # What a read-only mount refuses

    async def set_inode_attributes(self, op: ops.SetInodeAttributes) -> AttributesReply:
        if self._read_only and op.valid & SetAttrFlag.SIZE:
            raise _error(errno.EROFS)
        return await super().set_inode_attributes(op)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
