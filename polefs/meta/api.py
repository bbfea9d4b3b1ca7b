"""The operations of the meta service, as every client sees them: embedded in its process or across the network.

Every failure is an ``OSError`` with the errno that POSIX names for the system call; each method lists its own.
ENOENT is also raised for any inode number that does not exist (any more), EIO for metadata that contradicts itself,
EROFS by every mutation when the session is read-only. A mutation returns once it is committed: it survives the death
of the process, and after ``sync`` the loss of power.

Permissions (rwx, sticky, owner checks) are the kernel's to check (``default_permissions``); everything else that POSIX
says of an operation is decided here, in one place for all stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polefs.meta.model import Caller, DataCommit, Dentry, Extent, Inode, Lock, Move, Segment, SetAttr, Usage

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4


class MetaAPI(Protocol):
    """Returned inodes are the caller's to read, never to change."""

    # Names

    async def lookup(self, parent: int, name: bytes) -> Inode:
        """The inode behind a name; ``.`` and ``..`` too. ENOENT, ENOTDIR, ENAMETOOLONG."""
        ...

    async def make_node(
        self,
        caller: Caller,
        parent: int,
        name: bytes,
        mode: int,
        umask: int,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        """Make a file, directory, fifo, socket, device or symbolic link (``target``), by the type in ``mode``.

        Owner: the caller; the group is the parent's when the parent is set-group-ID, and a directory then inherits the
        bit. A default ACL of the parent takes the place of ``umask``. EEXIST, ENOENT (parent removed), ENOTDIR,
        ENAMETOOLONG, EINVAL (bad type or name), EMLINK, ENOSPC (inode limit)."""
        ...

    async def make_unnamed(self, caller: Caller, parent: int, mode: int, umask: int) -> Inode:
        """A regular file without a name (O_TMPFILE): nlink 0, an orphan of this session until it is linked."""
        ...

    async def link(self, ino: int, parent: int, name: bytes) -> Inode:
        """Another name. EPERM for a directory, EEXIST, EMLINK, ENOENT for a removed file (an unnamed one of
        ``make_unnamed`` may be linked)."""
        ...

    async def unlink(self, parent: int, name: bytes) -> Inode:
        """Take a name away and return its inode as it is then. At nlink 0 it becomes an orphan of this session and
        keeps its contents until ``release_orphans``. ENOENT, EISDIR, ENOTDIR."""
        ...

    async def rmdir(self, parent: int, name: bytes) -> Inode:
        """ENOENT, ENOTDIR, ENOTEMPTY, EINVAL for ``.``, ENOTEMPTY for ``..``. The removed directory is an orphan."""
        ...

    async def rename(
        self, caller: Caller, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> Inode | None:
        """Move a name atomically; returns the inode that was replaced, as it is then, if one was. ``flags``: 0 or one
        of RENAME_*; WHITEOUT leaves a character device 0:0 of the caller behind. EINVAL for a directory moved into
        itself and for contradicting flags, EEXIST (NOREPLACE), ENOENT, EISDIR, ENOTDIR, ENOTEMPTY, EMLINK."""
        ...

    async def list_dir(self, ino: int, after: int, limit: int) -> list[Dentry]:
        """Up to ``limit`` dentries with a cookie greater than ``after``, in the order of their cookies, without ``.``
        and ``..``. Names made or removed meanwhile disturb no other name. Empty: the end. ENOTDIR."""
        ...

    async def list_dir_plus(self, ino: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]:
        """As ``list_dir``, with the inodes."""
        ...

    async def read_link(self, ino: int) -> bytes:
        """EINVAL for anything but a symbolic link."""
        ...

    # Attributes

    async def get_inode(self, ino: int) -> Inode: ...

    async def set_attributes(self, ino: int, change: SetAttr) -> Inode:
        """Changing the mode of a file with an access ACL changes that ACL's mask (posix_acl_chmod); ctime becomes
        now."""
        ...

    async def touch_atime(self, times: Sequence[tuple[int, int]]) -> None:
        """Access times of many inodes at once; those that do not exist any more are passed over. No ctime change."""
        ...

    async def get_xattr(self, ino: int, name: bytes) -> bytes:
        """ENODATA when there is none. ACLs are ``system.posix_acl_access`` and ``system.posix_acl_default`` in the
        kernel's binary form (version 2)."""
        ...

    async def set_xattr(self, ino: int, name: bytes, value: bytes, flags: int = 0, kill_sgid: bool = False) -> None:
        """``flags``: XATTR_CREATE 1 (EEXIST), XATTR_REPLACE 2 (ENODATA). ERANGE for a name, E2BIG for a value past its
        limit, ENOSPC when the list of names would pass its own, EOPNOTSUPP for an unknown namespace, EINVAL for a
        malformed ACL, EACCES for a default ACL on a non-directory. An access ACL sets the mode, and one that the mode
        alone can tell is not stored."""
        ...

    async def list_xattr(self, ino: int) -> list[bytes]: ...

    async def remove_xattr(self, ino: int, name: bytes) -> None:
        """ENODATA when there is none."""
        ...

    async def usage(self) -> Usage: ...

    # Contents

    async def extents(self, ino: int, start: int, end: int) -> list[Extent]:
        """All extents that overlap the range, whole (not clipped), by offset."""
        ...

    async def segments(self, ids: Sequence[int]) -> list[Segment]:
        """Those of these segments that exist, in no particular order."""
        ...

    async def allocate_segments(self, count: int) -> int:
        """Reserve ``count`` consecutive segment ids, never used before nor again; returns the first."""
        ...

    async def exchange_writer(self, writer: int) -> int:
        """Let ``writer``, a random number of 63 bits, stand for those who may change contents from now on; returns the
        number before. Who keeps copies of contents knows by it whether others may have changed them since."""
        ...

    async def commit_data(self, segments: Sequence[Segment], commits: Sequence[DataCommit]) -> None:
        """Record new segments and the new contents of many files in one transaction. The objects must exist already, as
        durable as the volume promises. A file that has been removed meanwhile is passed over. ``allocated``, usage and
        each segment's live bytes are kept right; a segment with no live byte left is queued for deletion."""
        ...

    async def clone_range(self, source: int, start: int, length: int, target: int, target_start: int) -> Inode:
        """Make a range of ``target`` share the extents of ``source`` (its holes become holes), extend ``target`` when
        the range ends beyond it, set its mtime, and return it. Both must be regular files with all contents committed,
        the range must end within ``source``; overlapping ranges of one file: EINVAL."""
        ...

    async def release_orphans(self, inos: Sequence[int]) -> None:
        """This session uses them no more: those with nlink 0 that no other session uses are removed with all they hold.
        Others are passed over."""
        ...

    async def open_inode(self, ino: int) -> Inode:
        """This session uses the inode from now on, so that it keeps its contents when another session takes its last
        name away, until ``close_inodes``, once. For sessions that share a volume with others."""
        ...

    async def close_inodes(self, inos: Sequence[int]) -> None:
        """This session uses these no more. What has lost its last name meanwhile, and is used by nobody any more, is
        removed."""
        ...

    # Locks

    async def get_lock(self, ino: int, lock: Lock, flock: bool) -> Lock | None:
        """What is in the way of ``lock``, of flock(2) or of fcntl(2), if anything is. What another session calls its
        owner and process means nothing here: both are 0 then."""
        ...

    async def set_lock(self, ino: int, lock: Lock, flock: bool, wait: int = 0) -> None:
        """Take, change or give back (``FREE``) a lock. EAGAIN when another is in the way and ``wait`` is 0; other
        numbers wait, and name the wait within the session. EDEADLK when a wait for records would never end, EINTR after
        ``give_up_lock`` (and when it is cancelled, which may come too late: then the lock is held), ENOLCK when the
        session has too many, ESTALE when it ends. Changing the kind of a flock(2) lock is not atomic."""
        ...

    async def give_up_lock(self, wait: int) -> None:
        """What waits under that name, if it still does, fails with EINTR."""
        ...

    # Garbage

    async def dead_segments(self, grace: int, after: int, limit: int) -> list[int]:
        """Segments greater than ``after``, by id, that no metadata has referred to for ``grace`` ns: after a ``sync``
        their objects may be deleted."""
        ...

    async def forget_segments(self, ids: Sequence[int]) -> None:
        """Their objects are gone."""
        ...

    async def lost_segments(self, ids: Sequence[int]) -> list[int]:
        """Those of these ids that no segment has, and that nobody else may commit any more. Those that this session has
        reserved itself are its own to know. EOPNOTSUPP where others use the volume and that is not known."""
        ...

    async def segment_usage(self, after: int, limit: int) -> list[tuple[int, int, int]]:
        """``(id, size, live)`` of segments with ids greater than ``after``, by id; ``live`` is how many bytes extents
        refer to, each as often as they do."""
        ...

    async def segment_extents(self, segment: int, limit: int) -> list[tuple[int, Extent]]:
        """``(ino, extent)`` of extents that refer to a segment, in no particular order."""
        ...

    async def move_extents(self, segments: Sequence[Segment], moves: Sequence[Move]) -> int:
        """Record new segments, whose objects must exist already as for ``commit_data``, and let the same contents stand
        there, in one transaction. What is not any more as the extent of a ``Move`` says (written, cut off, removed
        since then) stays as it is, and so does all that was to go to an older segment that has died. Neither attributes
        nor versions change. Returns the bytes moved. A new segment that got none is queued for deletion, as is an old
        one that has lost its last. EEXIST for a segment id used before, EINVAL."""
        ...

    # The session

    def end_turn(self) -> None:
        """No more operations come for now: what was collected to be committed or sent together goes. Operations that
        end by it go on within the call, so it must not be made by a coroutine. Without it they go at the event loop's
        next turn."""
        ...

    async def sync(self) -> None:
        """Returns once everything committed before the call survives the loss of power."""
        ...

    async def close(self) -> None:
        """End the session: its orphans are released."""
        ...
