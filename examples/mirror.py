"""An existing directory, shown again.

python -m examples.mirror [--ttl SECONDS] [--no-passthrough] SOURCE MOUNTPOINT

Each inode that the kernel knows is held by an O_PATH descriptor, so renames and removals on either side do not matter.
The limit of open descriptors (EMFILE beyond it) so bounds how many the kernel may know at a time.
What changes in SOURCE by other ways is seen after ``--ttl`` seconds. Locks are the mount's own. As root the kernel
reads and writes open files by itself (passthrough).
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import itertools
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

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
from rawfuse.abi import ROOT_ID, OpenInFlag, SetXattrFlag, SyncFlag, WriteFlag
from rawfuse.mount import privileged

_READ_BUFFER = 1 << 20
_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC
_SET_IDS = stat.S_ISUID | stat.S_ISGID

_CreateOp = ops.MkNode | ops.MkDir | ops.CreateSymlink | ops.CreateFile


class Node:
    """An inode of the source that the kernel knows."""

    __slots__ = ("fd", "key", "lookups", "nodeid")

    def __init__(self, nodeid: int, fd: int, key: tuple[int, int]) -> None:
        self.nodeid = nodeid
        self.fd = fd
        """O_PATH."""
        self.key = key
        """``(st_dev, st_ino)``, taken for as long as the descriptor is open."""
        self.lookups = 0

    @property
    def path(self) -> str:
        """Leads to this very inode, a symbolic link not followed further."""
        return f"/proc/self/fd/{self.fd}"


class Listing:
    """An open directory: its entries as far as they have been read; an entry's cookie is its number, from 1."""

    __slots__ = ("_entries", "_fd", "_source")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._entries: list[tuple[bytes, int, int]] = []
        self._source = os.scandir(fd)

    def rewind(self) -> None:
        """Begin anew, with what the directory holds now."""
        if self._entries:
            self._entries.clear()
            self._source.close()
            self._source = os.scandir(self._fd)

    def entries(self, cookie: int) -> Iterator[tuple[bytes, int, int, int]]:
        """``(name, inode number, type bits, cookie)`` behind a cookie."""
        if not self._entries:
            own, parent = os.fstat(self._fd).st_ino, os.stat("..", dir_fd=self._fd).st_ino
            self._entries += [(b".", own, stat.S_IFDIR), (b"..", parent, stat.S_IFDIR)]
        for number in itertools.count(cookie):
            while number >= len(self._entries):
                found = next(self._source, None)
                if found is None:
                    return
                self._entries.append((os.fsencode(found.name), found.inode(), _kind(found)))
            yield (*self._entries[number], number + 1)

    def close(self) -> None:
        self._source.close()
        os.close(self._fd)


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    return 0


class Mirror(FileSystem):
    """``source``: the directory; ``ttl``: nanoseconds for which the kernel may keep names and attributes. A handle is a
    descriptor, which is its backing file too."""

    features = InitFlag.POSIX_ACL | InitFlag.DONT_MASK

    def __init__(self, source: str, ttl: int, passthrough: bool = True) -> None:
        self.ttl = ttl
        # Writes in passthrough carry no hint to clear set-ID bits: there the kernel has to do it by SETATTR.
        self.features |= InitFlag.PASSTHROUGH if passthrough and privileged() else InitFlag.HANDLE_KILLPRIV_V2
        fd = os.open(source, os.O_PATH | os.O_DIRECTORY)
        status = os.fstat(fd)
        root = Node(ROOT_ID, fd, (status.st_dev, status.st_ino))
        root.lookups = 1
        self.nodes: dict[int, Node] = {ROOT_ID: root}
        self._by_key: dict[tuple[int, int], Node] = {root.key: root}
        self._numbers = itertools.count(ROOT_ID + 1)
        self._listings: dict[int, Listing] = {}
        self._read_buffer = memoryview(bytearray(_READ_BUFFER))
        self._privileged = os.geteuid() == 0

    # Inodes

    def _learn(self, parent: int, name: bytes) -> Entry:
        """The inode of a name; ENOENT. The kernel knows it from now on."""
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        node = self._by_key.get((status.st_dev, status.st_ino))
        if node is None:
            return self._adopt(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent))
        node.lookups += 1
        return Entry(node.nodeid, _attributes(status), self.ttl, self.ttl)

    def _adopt(self, fd: int) -> Entry:
        """The inode of an O_PATH descriptor, which is the node's from now on."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        node = self._by_key.get(key)
        if node is None:
            node = Node(next(self._numbers), fd, key)
            self.nodes[node.nodeid] = self._by_key[key] = node
        else:
            os.close(fd)
        node.lookups += 1
        return Entry(node.nodeid, _attributes(status), self.ttl, self.ttl)

    def _forget(self, nodeid: int, count: int) -> None:
        node = self.nodes[nodeid]
        node.lookups -= count
        if node.lookups <= 0 and nodeid != ROOT_ID:
            del self.nodes[nodeid], self._by_key[node.key]
            os.close(node.fd)

    async def forget_inode(self, op: ops.ForgetInode) -> None:
        self._forget(op.nodeid, op.count)

    async def batch_forget(self, op: ops.BatchForget) -> None:
        for nodeid, count in op.forgets:
            self._forget(nodeid, count)

    async def destroy(self, op: ops.Destroy | None = None) -> None:
        for node in self.nodes.values():
            os.close(node.fd)

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
                os.ftruncate(op.fh, op.size)
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
        os.setxattr(node.path, op.name, op.value, op.flags)
        if op.setxattr_flags & SetXattrFlag.ACL_KILL_SGID:
            os.chmod(node.path, stat.S_IMODE(os.fstat(node.fd).st_mode) & ~stat.S_ISGID)

    async def remove_xattr(self, op: ops.RemoveXattr) -> None:
        os.removexattr(self.nodes[op.nodeid].path, op.name)

    # Names

    def _created(self, op: _CreateOp) -> Entry:
        """The entry of a name that was just made, with the caller as its owner."""
        parent = self.nodes[op.nodeid].fd
        if self._privileged and (op.uid or op.gid):
            status = os.stat(op.name, dir_fd=parent, follow_symlinks=False)
            os.chown(op.name, op.uid, self._group(op, parent), dir_fd=parent, follow_symlinks=False)
            if status.st_mode & _SET_IDS and not stat.S_ISLNK(status.st_mode):
                os.chmod(op.name, stat.S_IMODE(status.st_mode), dir_fd=parent)
        return self._learn(parent, op.name)

    def _group(self, op: _CreateOp, parent: int) -> int:
        """A directory with the setgid bit gives its own group (open(2)), which the file has already."""
        return -1 if os.fstat(parent).st_mode & stat.S_ISGID else op.gid

    async def mk_node(self, op: ops.MkNode) -> Entry:
        os.umask(op.umask)
        os.mknod(op.name, op.mode, op.rdev, dir_fd=self.nodes[op.nodeid].fd)
        return self._created(op)

    async def mk_dir(self, op: ops.MkDir) -> Entry:
        os.umask(op.umask)
        os.mkdir(op.name, op.mode, dir_fd=self.nodes[op.nodeid].fd)
        return self._created(op)

    async def create_symlink(self, op: ops.CreateSymlink) -> Entry:
        os.symlink(op.target, op.name, dir_fd=self.nodes[op.nodeid].fd)
        return self._created(op)

    async def read_symlink(self, op: ops.ReadSymlink) -> bytes:
        return os.readlink(b"", dir_fd=self.nodes[op.nodeid].fd)

    async def create_link(self, op: ops.CreateLink) -> Entry:
        parent = self.nodes[op.nodeid].fd
        os.link(self.nodes[op.ino].path, op.name, dst_dir_fd=parent, follow_symlinks=True)
        return self._learn(parent, op.name)

    async def unlink(self, op: ops.Unlink) -> None:
        os.unlink(op.name, dir_fd=self.nodes[op.nodeid].fd)

    async def rm_dir(self, op: ops.RmDir) -> None:
        os.rmdir(op.name, dir_fd=self.nodes[op.nodeid].fd)

    async def rename(self, op: ops.Rename) -> None:
        old, new = self.nodes[op.nodeid].fd, self.nodes[op.new_parent].fd
        rename_with_flags(old, op.name, new, op.new_name, op.flags)

    # Files

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        node = self.nodes[op.nodeid]
        fd = os.open(node.path, _open_flags(op.flags))
        if op.open_flags & OpenInFlag.KILL_SUIDGID:
            _drop_set_ids(node)
        elif op.flags & os.O_TRUNC:
            self._drop_set_ids_unless_root(op.nodeid, op.uid)
        return OpenedFile(fd, backing=fd)

    async def create_file(self, op: ops.CreateFile) -> tuple[Entry, OpenedFile]:
        os.umask(op.umask)
        parent, flags = self.nodes[op.nodeid].fd, _open_flags(op.flags) | os.O_NOFOLLOW
        try:
            fd = os.open(op.name, flags | os.O_CREAT | os.O_EXCL, op.mode & 0o7777, dir_fd=parent)
        except FileExistsError:
            if op.flags & os.O_EXCL:
                raise
            fd = os.open(op.name, flags & ~os.O_CREAT, dir_fd=parent)
        else:
            self._own(op, fd, parent)
        return self._opened(fd)

    async def create_tmpfile(self, op: ops.CreateTmpfile) -> tuple[Entry, OpenedFile]:
        os.umask(op.umask)
        parent = self.nodes[op.nodeid]
        fd = os.open(parent.path, _open_flags(op.flags) & ~os.O_CREAT | os.O_TMPFILE, op.mode & 0o7777)
        self._own(op, fd, parent.fd)
        return self._opened(fd)

    def _own(self, op: ops.CreateFile, fd: int, parent: int) -> None:
        """Make the caller the owner of a new file; chown takes set-id bits away, so they are given back."""
        if self._privileged and (op.uid or op.gid):
            mode = os.fstat(fd).st_mode
            os.fchown(fd, op.uid, self._group(op, parent))
            if mode & _SET_IDS:
                os.fchmod(fd, stat.S_IMODE(mode))

    def _opened(self, fd: int) -> tuple[Entry, OpenedFile]:
        return self._adopt(os.open(f"/proc/self/fd/{fd}", os.O_PATH)), OpenedFile(fd, backing=fd)

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        os.close(op.fh)

    async def read_file(self, op: ops.ReadFile) -> memoryview:
        """From the page cache at once, from the disk in a thread. The buffer of the first is shared: a reply is written
        before the next handler begins."""
        fd, offset, size = op.fh, op.offset, op.size
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
            done = await asyncio.to_thread(os.pwrite, op.fh, op.data, op.offset)
        else:
            done = os.pwrite(op.fh, op.data, op.offset)
        if op.write_flags & WriteFlag.KILL_SUIDGID:
            _drop_set_ids(self.nodes[op.nodeid])
        return done

    async def sync_file(self, op: ops.SyncFile) -> None:
        await asyncio.to_thread(os.fdatasync if op.flags & SyncFlag.FDATASYNC else os.fsync, op.fh)

    async def fallocate(self, op: ops.Fallocate) -> None:
        await asyncio.to_thread(fallocate, op.fh, op.mode, op.offset, op.length)
        self._drop_set_ids_unless_root(op.nodeid, op.uid)

    async def seek(self, op: ops.Seek) -> int:
        return os.lseek(op.fh, op.offset, op.whence)

    async def copy_file_range(self, op: ops.CopyFileRange) -> int:
        done = await asyncio.to_thread(os.copy_file_range, op.fh_in, op.fh_out, op.length, op.offset_in, op.offset_out)
        self._drop_set_ids_unless_root(op.nodeid_out, op.uid)
        return done

    def _drop_set_ids_unless_root(self, nodeid: int, uid: int) -> None:
        """fallocate and copy_file_range carry no hint, nor an open without HANDLE_KILLPRIV_V2; root stands for
        CAP_FSETID."""
        if uid:
            _drop_set_ids(self.nodes[nodeid])

    # Directories

    async def open_dir(self, op: ops.OpenDir) -> OpenedFile:
        fd = os.open(self.nodes[op.nodeid].path, os.O_RDONLY | os.O_DIRECTORY)
        self._listings[fd] = Listing(fd)
        return OpenedFile(fd)

    async def release_dir_handle(self, op: ops.ReleaseDirHandle) -> None:
        self._listings.pop(op.fh).close()

    async def sync_dir(self, op: ops.SyncDir) -> None:
        await asyncio.to_thread(os.fdatasync if op.flags & SyncFlag.FDATASYNC else os.fsync, op.fh)

    def _listing(self, op: ops.ReadDir) -> Iterator[tuple[bytes, int, int, int]]:
        listing = self._listings[op.fh]
        if op.offset == 0:
            listing.rewind()
        return listing.entries(op.offset)

    async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
        records = DirectoryBuffer(op.size)
        for entry in self._listing(op):
            if not records.add(*entry):
                break
        return records

    async def read_dir_plus(self, op: ops.ReadDirPlus) -> DirectoryPlusBuffer:
        records = DirectoryPlusBuffer(op.size)
        for name, ino, kind, cookie in self._listing(op):
            known = self._learn_listed(op.fh, name)
            if not records.add(name, known, cookie, ino, kind):
                if known is not None:
                    self._forget(known.nodeid, 1)
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
    """The kernel does direct I/O itself, with its callers' memory; ours is not aligned for it."""
    return flags & ~(os.O_DIRECT | os.O_NOFOLLOW)


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
    parser.add_argument("--no-passthrough", action="store_true", help="serve every READ and WRITE here")


def _make(arguments: argparse.Namespace) -> Mirror:
    source, mountpoint = Path(arguments.source).resolve(), Path(arguments.mountpoint).resolve()
    if mountpoint.is_relative_to(source):
        raise FuseError(errno.EINVAL, f"{mountpoint} lies in {source}: the mirror would look into itself")
    _allow_descriptors()
    return Mirror(str(source), int(arguments.ttl * SECOND), not arguments.no_passthrough)


if __name__ == "__main__":
    main(_make, "mirror", add_arguments)
