"""Access times: which reads change them, and when the changes are committed.

A FUSE mount leaves access times to the file system (the kernel sets S_NOATIME), and only the reads that reach us count:
what the kernel answers from its page cache does not. Changes are kept here and committed many at a time.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

from polefs.meta.api import MetaAPI
from polefs.meta.model import Inode

log = logging.getLogger(__name__)

Policy = Literal["noatime", "relatime", "strictatime"]

DAY = 86_400 * 10**9
COMMIT_AFTER = 1.0
"""Seconds from the first pending access time to its commit."""
MOST_PENDING = 4096
AT_ONCE = 256
"""Inodes of one transaction: rows with inline contents are written whole."""


class AccessTimes:
    """Pending access times of one mount, by inode."""

    def __init__(self, meta: MetaAPI, policy: Policy, *, directories: bool = True) -> None:
        self._meta = meta
        self._policy = policy
        self._directories = directories
        self._pending: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._commits: set[asyncio.Task[None]] = set()

    def of(self, inode: Inode) -> int:
        """The inode's access time as users must see it, ns."""
        return self._pending.get(inode.ino, inode.atime) if self._pending else inode.atime

    def read(self, inode: Inode, now: int) -> None:
        """The contents of ``inode`` (its times already corrected for uncommitted writes) have been read."""
        if self._policy == "noatime" or (inode.is_dir and not self._directories):
            return
        if self._policy == "relatime":
            atime = self.of(inode)
            if atime > inode.mtime and atime > inode.ctime and now - atime < DAY:
                return
        self._pending[inode.ino] = now
        if len(self._pending) >= MOST_PENDING:
            self._start_commit()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COMMIT_AFTER, self._start_commit)

    def drop(self, ino: int) -> None:
        """The access time was set by other means, or the inode is gone."""
        self._pending.pop(ino, None)

    def _start_commit(self) -> None:
        task = asyncio.get_running_loop().create_task(self.commit())
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)

    async def commit(self) -> None:
        """Commit what is pending. A failure costs access times, so it is logged and not raised."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending, self._pending = self._pending, {}
        if not pending:
            return
        times = list(pending.items())
        try:
            for start in range(0, len(times), AT_ONCE):
                await self._meta.touch_atime(times[start : start + AT_ONCE])
        except OSError as error:
            log.warning("access times were not saved: %s", error.strerror)

    async def close(self) -> None:
        await self.commit()
        await asyncio.gather(*self._commits)
