"""The interface that the author of a file system implements."""

from __future__ import annotations

import errno

from rawfuse import ops
from rawfuse.abi import InitFlag, Opcode
from rawfuse.errors import FuseError
from rawfuse.handover import Keeper
from rawfuse.replies import (
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileLock,
    FileSystemStatus,
    IoctlResult,
    OpenedFile,
    ReadResult,
)
from rawfuse.table import TABLE


class FileSystem:
    """Subclass it and define the methods that your file system has. Each takes one operation (see ``rawfuse.ops`` for
    its fields and the reply it wants) and fails by raising ``FuseError(errno)`` or any other ``OSError``.

    A method that is left out is answered with the right default for its opcode. For some of them that means more than
    an error: without ``open_file`` (``open_dir``) the kernel opens files (directories) by itself from the first time on
    and never asks nor releases, without ``create_file`` it uses ``mk_node``, without ``flush_file`` and ``sync_file``
    it takes them as done.

    Handlers run in the event loop that ``Session.serve`` runs in, each until it first waits; they must not block, and
    must never touch their own mount. A signal to the caller cancels the handlers of operations that change nothing
    (``asyncio.CancelledError``); the others finish.
    """

    features: InitFlag = InitFlag(0)
    """What the file system wants beyond ``negotiate.DEFAULT``, for example POSIX_ACL | DONT_MASK."""

    unwanted: InitFlag = InitFlag(0)
    """What of ``negotiate.DEFAULT`` it must not have."""

    declined: frozenset[Opcode] = frozenset()
    """Opcodes to answer as if their method were left out, whatever the class defines."""

    keeper: Keeper | None = None
    """Where what another process needs to take the mount over is deposited (``rawfuse.handover``)."""

    async def start(self) -> None:
        """Called before the mount; what it raises makes the mount fail."""

    def end_of_burst(self) -> None:
        """Called when every request that had arrived has been started and some handlers wait. What several of them wait
        for together (a transaction, a batch to send) can be ended here; handlers that this lets go on are answered
        before the next requests are read. It must not block."""

    async def destroy(self, op: ops.Destroy | None = None) -> None:
        """Called once when the mount has ended, after all handlers have, or when it has failed."""

    async def stat_fs(self, op: ops.StatFs) -> FileSystemStatus:
        return FileSystemStatus()

    async def forget_inode(self, op: ops.ForgetInode) -> None:
        """Subtract ``op.count`` from the look-up count of ``op.nodeid``. A stale FORGET may come after a newer look-up:
        subtract, never drop on sight. None is sent at unmount."""

    async def batch_forget(self, op: ops.BatchForget) -> None:
        """Many at once; calls ``forget_inode`` for each."""
        for nodeid, count in op.forgets:
            await self.forget_inode(ops.ForgetInode(op.unique, nodeid, op.uid, op.gid, op.pid, count))

    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        raise _absent(op)

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        raise _absent(op)

    async def set_inode_attributes(self, op: ops.SetInodeAttributes) -> AttributesReply:
        raise _absent(op)

    async def read_symlink(self, op: ops.ReadSymlink) -> bytes:
        raise _absent(op)

    async def create_symlink(self, op: ops.CreateSymlink) -> Entry:
        raise _absent(op)

    async def mk_node(self, op: ops.MkNode) -> Entry:
        raise _absent(op)

    async def mk_dir(self, op: ops.MkDir) -> Entry:
        raise _absent(op)

    async def unlink(self, op: ops.Unlink) -> None:
        raise _absent(op)

    async def rm_dir(self, op: ops.RmDir) -> None:
        raise _absent(op)

    async def rename(self, op: ops.Rename) -> None:
        raise _absent(op)

    async def create_link(self, op: ops.CreateLink) -> Entry:
        raise _absent(op)

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        raise _absent(op)

    async def read_file(self, op: ops.ReadFile) -> ReadResult:
        raise _absent(op)

    async def write_file(self, op: ops.WriteFile) -> int:
        raise _absent(op)

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        raise _absent(op)

    async def sync_file(self, op: ops.SyncFile) -> None:
        raise _absent(op)

    async def set_xattr(self, op: ops.SetXattr) -> None:
        raise _absent(op)

    async def get_xattr(self, op: ops.GetXattr) -> bytes:
        raise _absent(op)

    async def list_xattr(self, op: ops.ListXattr) -> list[bytes]:
        raise _absent(op)

    async def remove_xattr(self, op: ops.RemoveXattr) -> None:
        raise _absent(op)

    async def flush_file(self, op: ops.FlushFile) -> None:
        raise _absent(op)

    async def open_dir(self, op: ops.OpenDir) -> OpenedFile:
        raise _absent(op)

    async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
        raise _absent(op)

    async def release_dir_handle(self, op: ops.ReleaseDirHandle) -> None:
        raise _absent(op)

    async def sync_dir(self, op: ops.SyncDir) -> None:
        raise _absent(op)

    async def get_lock(self, op: ops.GetLock) -> FileLock:
        raise _absent(op)

    async def set_lock(self, op: ops.SetLock) -> None:
        raise _absent(op)

    async def access(self, op: ops.Access) -> None:
        raise _absent(op)

    async def create_file(self, op: ops.CreateFile) -> tuple[Entry, OpenedFile]:
        raise _absent(op)

    async def map_block(self, op: ops.MapBlock) -> int:
        raise _absent(op)

    async def ioctl(self, op: ops.Ioctl) -> IoctlResult:
        raise _absent(op)

    async def poll(self, op: ops.Poll) -> int:
        raise _absent(op)

    async def fallocate(self, op: ops.Fallocate) -> None:
        raise _absent(op)

    async def read_dir_plus(self, op: ops.ReadDirPlus) -> DirectoryPlusBuffer:
        raise _absent(op)

    async def seek(self, op: ops.Seek) -> int:
        raise _absent(op)

    async def copy_file_range(self, op: ops.CopyFileRange) -> int:
        raise _absent(op)

    async def setup_mapping(self, op: ops.SetupMapping) -> None:
        raise _absent(op)

    async def remove_mapping(self, op: ops.RemoveMapping) -> None:
        raise _absent(op)

    async def sync_fs(self, op: ops.SyncFs) -> None:
        raise _absent(op)

    async def create_tmpfile(self, op: ops.CreateTmpfile) -> tuple[Entry, OpenedFile]:
        raise _absent(op)

    async def stat_x(self, op: ops.StatX) -> AttributesReply:
        raise _absent(op)

    def implements(self, opcode: Opcode) -> bool:
        """Whether the class serves the opcode itself."""
        name = TABLE[opcode].method
        return opcode not in self.declined and getattr(type(self), name) is not getattr(FileSystem, name)


def _absent(op: ops.Op) -> FuseError:
    """A left-out method is never called by the dispatcher; whoever calls it directly learns this."""
    return FuseError(errno.ENOSYS, f"{type(op).__name__} is not served")
