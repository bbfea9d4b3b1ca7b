"""An existing directory, shown again.

python -m examples.mirror [--ttl SECONDS] [--no-passthrough] [--keeper DIRECTORY] SOURCE MOUNTPOINT

Each inode that the kernel knows is held by an O_PATH descriptor, so renames and removals on either side do not matter.
The limit of open descriptors (EMFILE beyond it) so bounds how many the kernel may know at a time.
What changes in SOURCE by other ways is seen after ``--ttl`` seconds. Locks are the mount's own. As root the kernel
reads and writes open files by itself (passthrough).

With ``--keeper`` the mount survives this process: run again with the same arguments, it goes on where it was, also
after kill -9. SIGHUP lets it end for a successor. ``python -m rawfuse.keeper DIRECTORY -- COMMAND`` runs it again by
itself. That SOURCE is changed by others in the very moment of a crash is not provided for.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

from examples.mirror_nodes import Handles, Node, Nodes, identity
from examples.mirror_syscalls import NOW, birth_time, fallocate, rename_with_flags, set_times
from examples.run import main
from rawfuse import (
    SECOND,
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileSystem,
    FileSystemStatus,
    FuseError,
    InitFlag,
    OpenedFile,
    SetAttrFlag,
    ops,
)
from rawfuse.abi import OpenInFlag, SetXattrFlag, SyncFlag, WriteFlag
from rawfuse.handover import Keeper
from rawfuse.mount import privileged

_READ_BUFFER = 1 << 20
_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC
_SET_IDS = stat.S_ISUID | stat.S_ISGID

_CreateOp = ops.MkNode | ops.MkDir | ops.CreateSymlink | ops.CreateFile


class Mirror(FileSystem):
    """``source``: the directory; ``ttl``: nanoseconds for which the kernel may keep names and attributes. A handle is a
    descriptor, which is its backing file too."""

    features = InitFlag.POSIX_ACL | InitFlag.DONT_MASK

    def __init__(self, source: str, ttl: int, passthrough: bool = True, keeper: Keeper | None = None) -> None:
        self.ttl = ttl
        self.keeper = keeper
        # Writes in passthrough carry no hint to clear set-ID bits: there the kernel has to do it by SETATTR.
        self.features |= InitFlag.PASSTHROUGH if passthrough and privileged() else InitFlag.HANDLE_KILLPRIV_V2
        self.nodes = Nodes(source, keeper)
        self.handles = Handles(keeper)
        self.files = self.handles.files
        self._read_buffer = memoryview(bytearray(_READ_BUFFER))
        self._privileged = os.geteuid() == 0

    def _pending(self, op: ops.Op, look: Callable[[], bytes]) -> bool:
        """Whether the request has yet to be executed. ``look`` sees what it will change: before it is executed that is
        noted; when it is sent again, because nobody knows, it has been executed if that looks different."""
        if self.keeper is None:
            return True
        before = self.keeper.journal.intended(op.unique)
        if before is not None:
            return look() == before
        self.keeper.journal.intend(op.unique, look())
        return True

    # Inodes

    def _learn(self, parent: int, name: bytes) -> Entry:
        """The inode of a name; ENOENT. The kernel knows it from now on."""
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        node = self.nodes.known(status)
        if node is None:
            return self._adopt(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent))
        return Entry(node.nodeid, _attributes(status), self.ttl, self.ttl)

    def _adopt(self, fd: int) -> Entry:
        """The inode of an O_PATH descriptor, which is the node's from now on."""
        status = os.fstat(fd)
        return Entry(self.nodes.adopt(fd, status).nodeid, _attributes(status), self.ttl, self.ttl)

    async def forget_inode(self, op: ops.ForgetInode) -> None:
        self.nodes.forget(op.nodeid, op.count)

    async def batch_forget(self, op: ops.BatchForget) -> None:
        for nodeid, count in op.forgets:
            self.nodes.forget(nodeid, count)

    async def destroy(self, op: ops.Destroy | None = None) -> None:
        self.nodes.close()

    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        try:
            return self._learn(self.nodes[op.nodeid].fd, op.name)
        except FileNotFoundError:
            return Entry(0, None, self.ttl)

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return AttributesReply(_attributes(os.fstat(self.nodes[op.nodeid].fd)), self.ttl)

    async def stat_x(self, op: ops.StatX) -> AttributesReply:
        fd = self.nodes[op.nodeid].fd
        attributes = _attributes(os.fstat(fd))
        attributes.btime = birth_time(fd)
        return AttributesReply(attributes, self.ttl)

    async def set_inode_attributes(self, op: ops.SetInodeAttributes) -> AttributesReply:
        node, valid = self.nodes[op.nodeid], op.valid
        if valid & SetAttrFlag.SIZE:
            if valid & SetAttrFlag.FH:
                os.ftruncate(self.files[op.fh], op.size)
            else:
                os.truncate(node.path, op.size)
        if valid & (SetAttrFlag.UID | SetAttrFlag.GID):
            uid = op.new_uid if valid & SetAttrFlag.UID else -1
            gid = op.new_gid if valid & SetAttrFlag.GID else -1
            os.chown(node.path, uid, gid)
        if valid & SetAttrFlag.KILL_SUIDGID:
            _drop_set_ids(node)
        if valid & SetAttrFlag.MODE:
            os.chmod(node.path, stat.S_IMODE(op.mode))
        if valid & (SetAttrFlag.ATIME | SetAttrFlag.ATIME_NOW | SetAttrFlag.MTIME | SetAttrFlag.MTIME_NOW):
            atime = op.atime if valid & SetAttrFlag.ATIME else None
            mtime = op.mtime if valid & SetAttrFlag.MTIME else None
            set_times(
                node.path,
                NOW if valid & SetAttrFlag.ATIME_NOW else atime,
                NOW if valid & SetAttrFlag.MTIME_NOW else mtime,
            )
        return AttributesReply(_attributes(os.fstat(node.fd)), self.ttl)

    async def stat_fs(self, op: ops.StatFs) -> FileSystemStatus:
        s = os.fstatvfs(self.nodes[op.nodeid].fd)
        return FileSystemStatus(
            s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, block_size=s.f_frsize, name_max=s.f_namemax
        )

    async def get_xattr(self, op: ops.GetXattr) -> bytes:
        return os.getxattr(self.nodes[op.nodeid].path, op.name)

    async def list_xattr(self, op: ops.ListXattr) -> list[bytes]:
        names = map(os.fsencode, os.listxattr(self.nodes[op.nodeid].path))
        return [name for name in names if op.uid == 0 or not name.startswith(b"trusted.")]

    async def set_xattr(self, op: ops.SetXattr) -> None:
        node = self.nodes[op.nodeid]
        if self._pending(op, lambda: _has_xattr(node.path, op.name)):
            os.setxattr(node.path, op.name, op.value, op.flags)
        if op.setxattr_flags & SetXattrFlag.ACL_KILL_SGID:
            os.chmod(node.path, stat.S_IMODE(os.fstat(node.fd).st_mode) & ~stat.S_ISGID)

    async def remove_xattr(self, op: ops.RemoveXattr) -> None:
        path = self.nodes[op.nodeid].path
        if self._pending(op, lambda: _has_xattr(path, op.name)):
            os.removexattr(path, op.name)

    # Names

    def _created(self, op: _CreateOp, set_ids: int = 0) -> Entry:
        """The entry of a name that was just made, with the caller as its owner; chown takes set-id bits away."""
        parent = self.nodes[op.nodeid].fd
        if self._privileged and (op.uid or op.gid):
            os.chown(op.name, op.uid, self._group(op, parent), dir_fd=parent, follow_symlinks=False)
            if set_ids:
                status = os.stat(op.name, dir_fd=parent, follow_symlinks=False)
                os.chmod(op.name, stat.S_IMODE(status.st_mode) | set_ids, dir_fd=parent)
        return self._learn(parent, op.name)

    def _group(self, op: _CreateOp, parent: int) -> int:
        """A directory with the setgid bit gives its own group (open(2)), which the file has already."""
        return -1 if os.fstat(parent).st_mode & stat.S_ISGID else op.gid

    async def mk_node(self, op: ops.MkNode) -> Entry:
        parent = self.nodes[op.nodeid].fd
        if self._pending(op, lambda: identity(parent, op.name)):
            os.umask(op.umask)
            os.mknod(op.name, op.mode, op.rdev, dir_fd=parent)
        return self._created(op, op.mode & _SET_IDS)

    async def mk_dir(self, op: ops.MkDir) -> Entry:
        parent = self.nodes[op.nodeid].fd
        if self._pending(op, lambda: identity(parent, op.name)):
            os.umask(op.umask)
            os.mkdir(op.name, op.mode, dir_fd=parent)
        return self._created(op)

    async def create_symlink(self, op: ops.CreateSymlink) -> Entry:
        parent = self.nodes[op.nodeid].fd
        if self._pending(op, lambda: identity(parent, op.name)):
            os.symlink(op.target, op.name, dir_fd=parent)
        return self._created(op)

    async def read_symlink(self, op: ops.ReadSymlink) -> bytes:
        return os.readlink(b"", dir_fd=self.nodes[op.nodeid].fd)

    async def create_link(self, op: ops.CreateLink) -> Entry:
        parent = self.nodes[op.nodeid].fd
        if self._pending(op, lambda: identity(parent, op.name)):
            os.link(self.nodes[op.ino].path, op.name, dst_dir_fd=parent, follow_symlinks=True)
        return self._learn(parent, op.name)

    async def unlink(self, op: ops.Unlink) -> None:
        parent = self.nodes[op.nodeid].fd
        if self._pending(op, lambda: identity(parent, op.name)):
            os.unlink(op.name, dir_fd=parent)

    async def rm_dir(self, op: ops.RmDir) -> None:
        parent = self.nodes[op.nodeid].fd
        if self._pending(op, lambda: identity(parent, op.name)):
            os.rmdir(op.name, dir_fd=parent)

    async def rename(self, op: ops.Rename) -> None:
        old, new = self.nodes[op.nodeid].fd, self.nodes[op.new_parent].fd
        if self._pending(op, lambda: identity(old, op.name)):
            rename_with_flags(old, op.name, new, op.new_name, op.flags)

    # Files

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        fh = self.handles.opened_by(op.unique)
        if fh is None:
            node = self.nodes[op.nodeid]
            fd = os.open(node.path, _open_flags(op.flags))
            if op.open_flags & OpenInFlag.KILL_SUIDGID:
                _drop_set_ids(node)
            elif op.flags & os.O_TRUNC:
                self._drop_set_ids_unless_root(op.nodeid, op.uid)
            fh = self.handles.add_file(fd, op.unique)
        return OpenedFile(fh, backing=self.files[fh])

    async def create_file(self, op: ops.CreateFile) -> tuple[Entry, OpenedFile]:
        fh = self.handles.opened_by(op.unique)
        if fh is None:
            os.umask(op.umask)
            parent, flags = self.nodes[op.nodeid].fd, _open_flags(op.flags) & ~os.O_EXCL | os.O_NOFOLLOW
            if self._pending(op, lambda: identity(parent, op.name)):
                fd, made = self._create(op, parent, flags)
            else:
                fd, made = os.open(op.name, flags & ~os.O_CREAT, dir_fd=parent), True
            if made:
                self._own(op, fd, parent)
            fh = self.handles.add_file(fd, op.unique)
        return self._opened(fh)

    def _create(self, op: ops.CreateFile, parent: int, flags: int) -> tuple[int, bool]:
        """The open file, and whether it is new."""
        try:
            return os.open(op.name, flags | os.O_CREAT | os.O_EXCL, op.mode & 0o7777, dir_fd=parent), True
        except FileExistsError:
            if op.flags & os.O_EXCL:
                raise
        return os.open(op.name, flags & ~os.O_CREAT, dir_fd=parent), False

    async def create_tmpfile(self, op: ops.CreateTmpfile) -> tuple[Entry, OpenedFile]:
        fh = self.handles.opened_by(op.unique)
        if fh is None:
            os.umask(op.umask)
            parent = self.nodes[op.nodeid]
            flags = _open_flags(op.flags) & ~os.O_CREAT | os.O_TMPFILE
            fd = os.open(parent.path, flags, op.mode & 0o7777)
            self._own(op, fd, parent.fd)
            fh = self.handles.add_file(fd, op.unique)
        return self._opened(fh)

    def _own(self, op: ops.CreateFile, fd: int, parent: int) -> None:
        """Make the caller the owner of a new file; chown takes set-id bits away, so they are given back."""
        if self._privileged and (op.uid or op.gid):
            os.fchown(fd, op.uid, self._group(op, parent))
            if op.mode & _SET_IDS:
                os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | op.mode & _SET_IDS)

    def _opened(self, fh: int) -> tuple[Entry, OpenedFile]:
        fd = self.files[fh]
        return self._adopt(os.open(f"/proc/self/fd/{fd}", os.O_PATH)), OpenedFile(fh, backing=fd)

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        self.handles.close_file(op.fh)

    async def read_file(self, op: ops.ReadFile) -> memoryview:
        """From the page cache at once, from the disk in a thread. The buffer of the first is shared: a reply is written
        before the next handler begins."""
        fd, offset, size = self.files[op.fh], op.offset, op.size
        buffer = self._read_buffer[:size] if size <= _READ_BUFFER else memoryview(bytearray(size))
        done = 0
        try:
            while done < size and (read := os.preadv(fd, [buffer[done:]], offset + done, os.RWF_NOWAIT)):
                done += read
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            buffer = memoryview(bytearray(size))
            done = await asyncio.to_thread(os.preadv, fd, [buffer], offset)
        return buffer[:done]

    async def write_file(self, op: ops.WriteFile) -> int:
        if op.flags & _SYNCHRONOUS:
            done = await asyncio.to_thread(os.pwrite, self.files[op.fh], op.data, op.offset)
        else:
            done = os.pwrite(self.files[op.fh], op.data, op.offset)
        if op.write_flags & WriteFlag.KILL_SUIDGID:
            _drop_set_ids(self.nodes[op.nodeid])
        return done

    async def sync_file(self, op: ops.SyncFile) -> None:
        await asyncio.to_thread(os.fdatasync if op.flags & SyncFlag.FDATASYNC else os.fsync, self.files[op.fh])

    async def fallocate(self, op: ops.Fallocate) -> None:
        await asyncio.to_thread(fallocate, self.files[op.fh], op.mode, op.offset, op.length)
        self._drop_set_ids_unless_root(op.nodeid, op.uid)

    async def seek(self, op: ops.Seek) -> int:
        return os.lseek(self.files[op.fh], op.offset, op.whence)

    async def copy_file_range(self, op: ops.CopyFileRange) -> int:
        source, target = self.files[op.fh_in], self.files[op.fh_out]
        done = await asyncio.to_thread(os.copy_file_range, source, target, op.length, op.offset_in, op.offset_out)
        self._drop_set_ids_unless_root(op.nodeid_out, op.uid)
        return done

    def _drop_set_ids_unless_root(self, nodeid: int, uid: int) -> None:
        """fallocate and copy_file_range carry no hint, nor an open without HANDLE_KILLPRIV_V2; root stands for
        CAP_FSETID."""
        if uid:
            _drop_set_ids(self.nodes[nodeid])

    # Directories

    async def open_dir(self, op: ops.OpenDir) -> OpenedFile:
        fh = self.handles.opened_by(op.unique)
        if fh is None:
            fd = os.open(self.nodes[op.nodeid].path, os.O_RDONLY | os.O_DIRECTORY)
            fh = self.handles.add_directory(fd, op.unique)
        return OpenedFile(fh)

    async def release_dir_handle(self, op: ops.ReleaseDirHandle) -> None:
        self.handles.close_directory(op.fh)

    async def sync_dir(self, op: ops.SyncDir) -> None:
        fd = self.handles.listings[op.fh].fd
        await asyncio.to_thread(os.fdatasync if op.flags & SyncFlag.FDATASYNC else os.fsync, fd)

    async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
        records = DirectoryBuffer(op.size)
        for entry in self.handles.listings[op.fh].entries(op.offset):
            if not records.add(*entry):
                break
        return records

    async def read_dir_plus(self, op: ops.ReadDirPlus) -> DirectoryPlusBuffer:
        records = DirectoryPlusBuffer(op.size)
        listing = self.handles.listings[op.fh]
        for name, ino, kind, cookie in listing.entries(op.offset):
            known = self._learn_listed(listing.fd, name)
            if not records.add(name, known, cookie, ino, kind):
                if known is not None:
                    self.nodes.forget(known.nodeid, 1)
                break
        return records

    def _learn_listed(self, directory: int, name: bytes) -> Entry | None:
        """None for the dots, and for what has been removed since it was listed."""
        if name in (b".", b".."):
            return None
        try:
            return self._learn(directory, name)
        except FileNotFoundError:
            return None


def _attributes(s: os.stat_result) -> Attributes:
    return Attributes(
        s.st_ino,
        s.st_mode,
        s.st_nlink,
        s.st_uid,
        s.st_gid,
        s.st_size,
        s.st_blocks,
        s.st_atime_ns,
        s.st_mtime_ns,
        s.st_ctime_ns,
        0,
        s.st_rdev,
        s.st_blksize,
    )


def _open_flags(flags: int) -> int:
    """The kernel does direct I/O itself, with its callers' memory; ours is not aligned for it. It also knows where the
    end is: a WRITE that is done again must not be appended again."""
    return flags & ~(os.O_DIRECT | os.O_NOFOLLOW | os.O_APPEND)


def _has_xattr(path: str, name: bytes) -> bytes:
    return b"there" if os.fsdecode(name) in os.listxattr(path) else b""


def _drop_set_ids(node: Node) -> None:
    """What a write by somebody without CAP_FSETID does; the server's own privilege hides it from the source."""
    mode = os.fstat(node.fd).st_mode
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    if kept != mode:
        os.chmod(node.path, stat.S_IMODE(kept))


def _allow_descriptors() -> None:
    """Raise the limit of open descriptors, one of which each known inode takes, as far as it goes."""
    try:
        most = int(Path("/proc/sys/fs/nr_open").read_text())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        # Only with CAP_SYS_RESOURCE beyond the hard limit.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source")
    parser.add_argument("--ttl", type=float, default=1, metavar="SECONDS", help="for names and attributes (1)")
    parser.add_argument("--keeper", metavar="DIRECTORY", help="have the mount survive this process")
    parser.add_argument("--no-passthrough", action="store_true", help="serve every READ and WRITE here")


def _make(arguments: argparse.Namespace) -> Mirror:
    keeper = Keeper.connect(arguments.keeper) if arguments.keeper else None
    source = Path(arguments.source).resolve()
    if keeper is None or not keeper.has_mount:  # nothing may look at a mount that nobody serves yet
        mountpoint = Path(arguments.mountpoint).resolve()
        if mountpoint.is_relative_to(source):
            raise FuseError(errno.EINVAL, f"{mountpoint} lies in {source}: the mirror would look into itself")
    _allow_descriptors()
    return Mirror(str(source), int(arguments.ttl * SECOND), not arguments.no_passthrough, keeper)


if __name__ == "__main__":
    main(_make, "mirror", add_arguments)
