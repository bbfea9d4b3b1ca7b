"""A complete POSIX file system in memory.

python -m examples.memory [--size BYTES] [--kernel-locks] MOUNTPOINT

Nobody else changes it, so the kernel may keep names and attributes for ever. The kernel checks permissions
(default_permissions, access control lists included); what remains here is what it leaves to a file system.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import stat
import time
from collections.abc import Callable

from examples import memory_xattr as xattr
from examples.memory_data import Space
from examples.memory_locks import LockTable
from examples.memory_nodes import Directory, File, Node, Symlink, check_end
from examples.run import main
from rawfuse import (
    FOREVER,
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileLock,
    FileSystem,
    FileSystemStatus,
    FuseError,
    InitFlag,
    Opcode,
    OpenedFile,
    OpenFlag,
    SetAttrFlag,
    ops,
)
from rawfuse.abi import ROOT_ID, OpenInFlag, WriteFlag

NAME_MAX = 255
BLOCK = 4096
COPY_MAX = 1 << 26
"""Most bytes of one copy_file_range; the caller asks again for the rest."""

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
LOCK_OPERATIONS = frozenset({Opcode.GETLK, Opcode.SETLK, Opcode.SETLKW, Opcode.FLUSH})

_CreateOp = ops.MkNode | ops.MkDir | ops.CreateSymlink | ops.CreateFile


class Memory(FileSystem):
    """``capacity``: bytes that the files may hold; with ``kernel_locks`` the kernel keeps the locks by itself."""

    features = InitFlag.POSIX_ACL | InitFlag.DONT_MASK | InitFlag.HANDLE_KILLPRIV_V2 | InitFlag.CACHE_SYMLINKS

    def __init__(self, capacity: int, *, kernel_locks: bool = False) -> None:
        if kernel_locks:
            self.declined = LOCK_OPERATIONS
        self.space = Space(capacity)
        self.locks = LockTable()
        self.handles: dict[int, Node] = {}
        self._numbers = itertools.count(ROOT_ID)
        self._handle_numbers = itertools.count(1)
        root = Directory(self._attributes(stat.S_IFDIR | 0o755, os.getuid(), os.getgid()), None)
        root.lookups = 1
        self.nodes: dict[int, Node] = {ROOT_ID: root}

    # Inodes

    def _attributes(self, mode: int, uid: int, gid: int) -> Attributes:
        now = time.time_ns()
        return Attributes(next(self._numbers), mode, 1, uid, gid, atime=now, mtime=now, ctime=now, btime=now)

    def _node(self, nodeid: int) -> Node:
        node = self.nodes.get(nodeid)
        if node is None:
            raise FuseError(errno.ESTALE)
        return node

    def _directory(self, nodeid: int) -> Directory:
        node = self._node(nodeid)
        if not isinstance(node, Directory):
            raise FuseError(errno.ENOTDIR)
        return node

    def _file(self, nodeid: int) -> File:
        node = self._node(nodeid)
        if not isinstance(node, File):
            raise FuseError(errno.EISDIR if isinstance(node, Directory) else errno.EINVAL)
        return node

    def _new(
        self, op: _CreateOp, mode: int, umask: int, make: Callable[[Attributes], Node], parent: Directory | None = None
    ) -> Node:
        """An inode of the caller's for ``parent``, which gives its group when its setgid bit is set (open(2))."""
        parent = parent or self._directory(op.nodeid)
        gid = op.gid
        if parent.attr.mode & stat.S_ISGID:
            gid = parent.attr.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        node = make(self._attributes(mode, op.uid, gid))
        xattr.inherit(node, parent, umask)
        self.nodes[node.attr.ino] = node
        return node

    def _create(self, op: _CreateOp, mode: int, umask: int, make: Callable[[Attributes], Node]) -> Entry:
        parent = self._directory(op.nodeid)
        _check_free(parent, op.name)
        node = self._new(op, mode, umask, make, parent)
        parent.add(op.name, node)
        return self._entry(node)

    def _entry(self, node: Node) -> Entry:
        """The kernel learns of the inode."""
        node.lookups += 1
        return Entry(node.attr.ino, node.attr, FOREVER, FOREVER)

    def _unlinked(self, node: Node) -> None:
        """A name of the inode is gone."""
        if isinstance(node, Directory):
            node.attr.nlink = 0
            node.removed = True
        else:
            node.attr.nlink -= 1
        node.changed()
        self._free_unused(node)

    def _free_unused(self, node: Node) -> None:
        """Without a name, and unknown to the kernel (which knows open files), it is gone."""
        if node.attr.nlink == 0 and node.lookups == 0:
            del self.nodes[node.attr.ino]
            if isinstance(node, File):
                node.data.cut(0)

    async def forget_inode(self, op: ops.ForgetInode) -> None:
        self._forget(op.nodeid, op.count)

    async def batch_forget(self, op: ops.BatchForget) -> None:
        for nodeid, count in op.forgets:
            self._forget(nodeid, count)

    def _forget(self, nodeid: int, count: int) -> None:
        node = self.nodes.get(nodeid)
        if node is not None and nodeid != ROOT_ID:
            node.lookups -= count
            self._free_unused(node)

    # Names

    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        directory = self._directory(op.nodeid)
        dentry = directory.names.get(op.name)
        if dentry is not None:
            return self._entry(dentry.node)
        _check_name(op.name)
        return Entry(0, None, FOREVER)

    async def mk_node(self, op: ops.MkNode) -> Entry:
        def make(attr: Attributes) -> Node:
            attr.rdev = op.rdev
            return File(attr, self.space) if stat.S_ISREG(attr.mode) else Node(attr)

        return self._create(op, op.mode, op.umask, make)

    async def mk_dir(self, op: ops.MkDir) -> Entry:
        return self._create(op, stat.S_IFDIR | op.mode, op.umask, lambda attr: Directory(attr, None))

    async def create_symlink(self, op: ops.CreateSymlink) -> Entry:
        return self._create(op, stat.S_IFLNK | 0o777, 0, lambda attr: Symlink(attr, op.target))

    async def read_symlink(self, op: ops.ReadSymlink) -> bytes:
        node = self._node(op.nodeid)
        if not isinstance(node, Symlink):
            raise FuseError(errno.EINVAL)
        node.accessed()
        return node.target

    async def create_link(self, op: ops.CreateLink) -> Entry:
        parent, node = self._directory(op.nodeid), self._node(op.ino)
        if isinstance(node, Directory):
            raise FuseError(errno.EPERM)
        _check_free(parent, op.name)
        parent.add(op.name, node)
        node.attr.nlink += 1
        node.changed()
        return self._entry(node)

    async def unlink(self, op: ops.Unlink) -> None:
        parent = self._directory(op.nodeid)
        node = parent.entry(op.name).node
        if isinstance(node, Directory):
            raise FuseError(errno.EISDIR)
        parent.remove(op.name)
        self._unlinked(node)

    async def rm_dir(self, op: ops.RmDir) -> None:
        parent = self._directory(op.nodeid)
        node = parent.entry(op.name).node
        if not isinstance(node, Directory):
            raise FuseError(errno.ENOTDIR)
        if node.names:
            raise FuseError(errno.ENOTEMPTY)
        parent.remove(op.name)
        self._unlinked(node)

    async def rename(self, op: ops.Rename) -> None:
        old, new = self._directory(op.nodeid), self._directory(op.new_parent)
        source = old.entry(op.name)
        node = source.node
        _check_name(op.new_name)
        if new.removed:
            raise FuseError(errno.ENOENT)
        if isinstance(node, Directory) and new.lies_in(node):
            raise FuseError(errno.EINVAL)
        target = new.names.get(op.new_name)
        replaced = target.node if target is not None else None
        if op.flags & EXCHANGE:
            if target is None or replaced is None:
                raise FuseError(errno.ENOENT)
            if isinstance(replaced, Directory) and old.lies_in(replaced):
                raise FuseError(errno.EINVAL)
            if replaced is not node:
                old.put(source, replaced)
                new.put(target, node)
                replaced.changed()
                node.changed()
            return
        if replaced is not None:
            if op.flags & NOREPLACE:
                raise FuseError(errno.EEXIST)
            if replaced is node:
                return
            _check_replaceable(node, replaced)
        old.remove(op.name)
        if target is not None and replaced is not None:
            new.put(target, node)
            self._unlinked(replaced)
        else:
            new.add(op.new_name, node)
        node.changed()
        if op.flags & WHITEOUT:
            whiteout = Node(self._attributes(stat.S_IFCHR, op.uid, op.gid))
            self.nodes[whiteout.attr.ino] = whiteout
            old.add(op.name, whiteout)

    # Attributes

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return AttributesReply(self._node(op.nodeid).attr, FOREVER)

    async def stat_x(self, op: ops.StatX) -> AttributesReply:
        return AttributesReply(self._node(op.nodeid).attr, FOREVER)

    async def set_inode_attributes(self, op: ops.SetInodeAttributes) -> AttributesReply:
        node, valid = self._node(op.nodeid), op.valid
        attr = node.attr
        if valid & SetAttrFlag.SIZE:
            self._file(op.nodeid).resize(op.size)
        else:
            node.changed()
        if valid & SetAttrFlag.UID:
            attr.uid = op.new_uid
        if valid & SetAttrFlag.GID:
            attr.gid = op.new_gid
        if valid & SetAttrFlag.KILL_SUIDGID:
            node.drop_set_ids()
        if valid & SetAttrFlag.MODE:
            attr.mode = stat.S_IFMT(attr.mode) | stat.S_IMODE(op.mode)
            xattr.mode_changed(node)
        now = attr.ctime
        if valid & (SetAttrFlag.ATIME | SetAttrFlag.ATIME_NOW):
            attr.atime = now if valid & SetAttrFlag.ATIME_NOW else op.atime
        if valid & (SetAttrFlag.MTIME | SetAttrFlag.MTIME_NOW):
            attr.mtime = now if valid & SetAttrFlag.MTIME_NOW else op.mtime
        return AttributesReply(attr, FOREVER)

    async def stat_fs(self, op: ops.StatFs) -> FileSystemStatus:
        free = self.space.free // BLOCK
        return FileSystemStatus(
            blocks=self.space.capacity // BLOCK,
            free=free,
            available=free,
            files=len(self.nodes) + free,
            files_free=free,
            block_size=BLOCK,
            name_max=NAME_MAX,
        )

    async def get_xattr(self, op: ops.GetXattr) -> bytes:
        return xattr.get(self._node(op.nodeid), op.name)

    async def list_xattr(self, op: ops.ListXattr) -> list[bytes]:
        return xattr.list_names(self._node(op.nodeid), op.uid)

    async def set_xattr(self, op: ops.SetXattr) -> None:
        xattr.set_value(self._node(op.nodeid), op)

    async def remove_xattr(self, op: ops.RemoveXattr) -> None:
        xattr.remove(self._node(op.nodeid), op.name)

    # Open files

    def _open(self, node: Node, flags: int) -> OpenedFile:
        """The kernel keeps the file's pages, unless the next read is to set atime and so has to be seen here."""
        fh = next(self._handle_numbers)
        self.handles[fh] = node
        unseen = flags & os.O_ACCMODE == os.O_WRONLY or not node.atime_is_due()
        return OpenedFile(fh, OpenFlag.KEEP_CACHE if unseen else 0)

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        file = self._file(op.nodeid)
        if op.flags & os.O_TRUNC:
            if op.open_flags & OpenInFlag.KILL_SUIDGID:
                file.drop_set_ids()
            file.resize(0)
        return self._open(file, op.flags)

    async def create_file(self, op: ops.CreateFile) -> tuple[Entry, OpenedFile]:
        entry = self._create(op, stat.S_IFREG | op.mode & 0o7777, op.umask, self._make_file)
        return entry, self._open(self.nodes[entry.nodeid], op.flags)

    async def create_tmpfile(self, op: ops.CreateTmpfile) -> tuple[Entry, OpenedFile]:
        node = self._new(op, stat.S_IFREG | op.mode & 0o7777, op.umask, self._make_file)
        node.attr.nlink = 0
        return self._entry(node), self._open(node, op.flags)

    def _make_file(self, attr: Attributes) -> Node:
        return File(attr, self.space)

    def _opened_file(self, fh: int) -> File:
        node = self.handles.get(fh)
        if not isinstance(node, File):
            raise FuseError(errno.EBADF)
        return node

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        del self.handles[op.fh]
        self.locks.released(op.nodeid, op.fh)

    async def flush_file(self, op: ops.FlushFile) -> None:
        self.locks.closed(op.nodeid, op.lock_owner)

    async def read_file(self, op: ops.ReadFile) -> list[bytes | bytearray | memoryview]:
        file = self._opened_file(op.fh)
        if not op.flags & os.O_NOATIME:
            file.accessed()
        size = max(0, min(op.size, file.attr.size - op.offset))
        return [*file.data.read(op.offset, size)]

    async def write_file(self, op: ops.WriteFile) -> int:
        file = self._file(op.nodeid)
        check_end(op.offset + op.size)
        if op.write_flags & WriteFlag.KILL_SUIDGID:
            file.drop_set_ids()
        done = file.data.write(op.offset, op.data)
        file.modified(max(file.attr.size, op.offset + done))
        return done

    async def fallocate(self, op: ops.Fallocate) -> None:
        file = self._opened_file(op.fh)
        check_end(op.offset + op.length)
        _drop_set_ids_unless_root(file, op.uid)
        if op.mode & (PUNCH_HOLE | ZERO_RANGE):
            file.data.punch(op.offset, op.length)
        if not op.mode & PUNCH_HOLE:
            file.data.reserve(op.offset, op.length)
        end = 0 if op.mode & KEEP_SIZE else op.offset + op.length
        file.modified(max(file.attr.size, end))

    async def seek(self, op: ops.Seek) -> int:
        file = self._opened_file(op.fh)
        seek = file.data.seek_data if op.whence == os.SEEK_DATA else file.data.seek_hole
        return seek(op.offset, file.attr.size)

    async def copy_file_range(self, op: ops.CopyFileRange) -> int:
        source, target = self._opened_file(op.fh_in), self._opened_file(op.fh_out)
        length = min(op.length, source.attr.size - op.offset_in, COPY_MAX)
        if length <= 0:
            return 0
        check_end(op.offset_out + length)
        source.accessed()
        _drop_set_ids_unless_root(target, op.uid)
        done = source.data.copy(op.offset_in, target.data, op.offset_out, length)
        target.modified(max(target.attr.size, op.offset_out + done))
        return done

    # Open directories

    async def open_dir(self, op: ops.OpenDir) -> OpenedFile:
        fh = next(self._handle_numbers)
        self.handles[fh] = self._directory(op.nodeid)
        return OpenedFile(fh)

    async def release_dir_handle(self, op: ops.ReleaseDirHandle) -> None:
        del self.handles[op.fh]

    async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
        directory = self._directory(op.nodeid)
        directory.accessed()
        records = DirectoryBuffer(op.size)
        for name, node, cookie in directory.listing(op.offset):
            if not records.add(name, node.attr.ino, node.kind, cookie):
                break
        return records

    async def read_dir_plus(self, op: ops.ReadDirPlus) -> DirectoryPlusBuffer:
        directory = self._directory(op.nodeid)
        directory.accessed()
        records = DirectoryPlusBuffer(op.size)
        for name, node, cookie in directory.listing(op.offset):
            dots = cookie <= 2
            entry = None if dots else Entry(node.attr.ino, node.attr, FOREVER, FOREVER)
            if not records.add(name, entry, cookie, node.attr.ino, node.kind):
                break
            if not dots:
                node.lookups += 1
        return records

    # Locks

    async def get_lock(self, op: ops.GetLock) -> FileLock:
        return self.locks.test(op)

    async def set_lock(self, op: ops.SetLock) -> None:
        await self.locks.set(op)


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise FuseError(errno.ENAMETOOLONG)


def _check_free(parent: Directory, name: bytes) -> None:
    """A new name: ENAMETOOLONG, EEXIST, or ENOENT in a directory that was removed."""
    _check_name(name)
    if parent.removed:
        raise FuseError(errno.ENOENT)
    if name in parent.names:
        raise FuseError(errno.EEXIST)


def _check_replaceable(node: Node, replaced: Node) -> None:
    """rename(2): a directory replaces an empty directory only, anything else no directory."""
    if isinstance(replaced, Directory):
        if not isinstance(node, Directory):
            raise FuseError(errno.EISDIR)
        if replaced.names:
            raise FuseError(errno.ENOTEMPTY)
    elif isinstance(node, Directory):
        raise FuseError(errno.ENOTDIR)


def _drop_set_ids_unless_root(file: File, uid: int) -> None:
    """fallocate and copy_file_range carry no hint; root stands for CAP_FSETID."""
    if uid != 0:
        file.drop_set_ids()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parser.add_argument("--size", type=int, default=memory // 2, metavar="BYTES", help="capacity (half of the memory)")
    parser.add_argument("--kernel-locks", action="store_true", help="leave locks to the kernel")


def _make(arguments: argparse.Namespace) -> Memory:
    return Memory(arguments.size, kernel_locks=arguments.kernel_locks)


if __name__ == "__main__":
    main(_make, "memory", _add_arguments)
