"""The mounted file system: kernel requests answered from the meta service and the file contents.

The class has no ``open_file``, ``open_dir`` and ``create_file``: with one mount there is nothing to decide at an open,
so the kernel opens files by itself and never asks. Files are known by their inode number alone.
"""

from __future__ import annotations

import errno
import os
import stat
from time import time_ns

from polefs.client.atime import AccessTimes
from polefs.client.orphans import Orphans
from polefs.client.space import Look, VolumeSpace
from polefs.data.files import FileStore
from polefs.meta.api import MetaAPI
from polefs.meta.model import BLOCK, Caller, Inode, SetAttr
from rawfuse import (
    FOREVER,
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileSystem,
    FileSystemStatus,
    InitFlag,
    OpenedFile,
    SetAttrFlag,
    ops,
)
from rawfuse.abi import SetXattrFlag, SyncFlag, WriteFlag
from rawfuse.replies import ReadResult

PREFERRED_IO = 1 << 16
"""st_blksize: what the C library buffers per system call, bytes."""

_NO_CHANGE = SetAttr()
_SET_ID = stat.S_ISUID | stat.S_ISGID
_PERMISSIONS = 0o7777
_DOT_OFFSET, _DOTDOT_OFFSET = 1, 2
"""Cookies of ``.`` and ``..``; those of dentries begin at FIRST_COOKIE."""
_MOST_COPIED = 0x7FFFF000
"""Largest result of one copy_file_range (MAX_RW_COUNT)."""


class PoleFileSystem(FileSystem):
    """A volume as one mount sees it. Permissions are the kernel's to check (default_permissions, POSIX_ACL)."""

    features = (
        InitFlag.POSIX_ACL
        | InitFlag.DONT_MASK
        | InitFlag.HANDLE_KILLPRIV_V2
        | InitFlag.EXPLICIT_INVAL_DATA
        | InitFlag.CACHE_SYMLINKS
        | InitFlag.NO_EXPORT_SUPPORT
    )
    # A volume has one mount: nothing changes behind the kernel's back, so its caches need no re-checking.
    unwanted = InitFlag.AUTO_INVAL_DATA

    def __init__(self, meta: MetaAPI, files: FileStore, backing: Look, local: Look, times: AccessTimes) -> None:
        """``backing`` tells how full the place of the objects is, ``local`` that of the metadata."""
        self._meta = meta
        self._files = files
        self._times = times
        self._orphans = Orphans(meta, files)
        self._space = VolumeSpace(meta, files, self._orphans, backing, local)

    def end_of_burst(self) -> None:
        self._meta.end_turn()

    async def destroy(self, op: ops.Destroy | None = None) -> None:
        await self._orphans.release()
        await self._times.close()

    # Replies

    def _attributes(self, inode: Inode) -> Attributes:
        inode = self._files.overlay(inode)
        return Attributes(
            inode.ino,
            inode.mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.size,
            -(-inode.allocated // BLOCK),
            self._times.of(inode),
            inode.mtime,
            inode.ctime,
            inode.btime,
            inode.rdev,
            PREFERRED_IO,
        )

    def _attr_ttl(self, ino: int) -> int:
        """For how long the kernel may answer with the inode's attributes, ns."""
        return FOREVER

    def _entry(self, inode: Inode) -> Entry:
        self._orphans.looked_up(inode.ino)
        return Entry(inode.ino, self._attributes(inode), FOREVER, self._attr_ttl(inode.ino))

    def _reply(self, inode: Inode) -> AttributesReply:
        return AttributesReply(self._attributes(inode), self._attr_ttl(inode.ino))

    # Names

    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        try:
            inode = await self._meta.lookup(op.nodeid, op.name)
        except FileNotFoundError:
            return Entry(0, None, FOREVER)
        return self._entry(inode)

    async def forget_inode(self, op: ops.ForgetInode) -> None:
        self._orphans.forgotten(op.nodeid, op.count)

    async def batch_forget(self, op: ops.BatchForget) -> None:
        for ino, count in op.forgets:
            self._orphans.forgotten(ino, count)

    async def mk_node(self, op: ops.MkNode) -> Entry:
        await self._space.claim_entry()
        caller = Caller(op.uid, op.gid, op.pid)
        return self._entry(await self._meta.make_node(caller, op.nodeid, op.name, op.mode, op.umask, op.rdev))

    async def mk_dir(self, op: ops.MkDir) -> Entry:
        await self._space.claim_entry()
        caller = Caller(op.uid, op.gid, op.pid)
        mode = stat.S_IFDIR | op.mode & _PERMISSIONS
        return self._entry(await self._meta.make_node(caller, op.nodeid, op.name, mode, op.umask))

    async def create_symlink(self, op: ops.CreateSymlink) -> Entry:
        await self._space.claim_entry()
        caller = Caller(op.uid, op.gid, op.pid)
        mode = stat.S_IFLNK | 0o777
        return self._entry(await self._meta.make_node(caller, op.nodeid, op.name, mode, 0, 0, op.target))

    async def create_tmpfile(self, op: ops.CreateTmpfile) -> tuple[Entry, OpenedFile]:
        await self._space.claim_entry()
        caller = Caller(op.uid, op.gid, op.pid)
        inode = await self._meta.make_unnamed(caller, op.nodeid, op.mode, op.umask)
        entry = self._entry(inode)
        self._orphans.unlinked(inode)
        return entry, OpenedFile()

    async def create_link(self, op: ops.CreateLink) -> Entry:
        await self._space.claim_entry()
        inode = await self._meta.link(op.ino, op.nodeid, op.name)
        self._orphans.linked(inode.ino)
        return self._entry(inode)

    async def unlink(self, op: ops.Unlink) -> None:
        self._orphans.unlinked(await self._meta.unlink(op.nodeid, op.name))

    async def rm_dir(self, op: ops.RmDir) -> None:
        self._orphans.unlinked(await self._meta.rmdir(op.nodeid, op.name))

    async def rename(self, op: ops.Rename) -> None:
        caller = Caller(op.uid, op.gid, op.pid)
        replaced = await self._meta.rename(caller, op.nodeid, op.name, op.new_parent, op.new_name, op.flags)
        if replaced is not None:
            self._orphans.unlinked(replaced)

    async def read_symlink(self, op: ops.ReadSymlink) -> bytes:
        target = await self._meta.read_link(op.nodeid)
        self._times.read(await self._meta.get_inode(op.nodeid), time_ns())
        return target

    async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
        records = DirectoryBuffer(op.size)
        directory = await self._meta.get_inode(op.nodeid)
        if op.offset < _DOTDOT_OFFSET:
            self._times.read(directory, time_ns())
            if op.offset < _DOT_OFFSET:
                records.add(b".", directory.ino, stat.S_IFDIR, _DOT_OFFSET)
            records.add(b"..", directory.parent, stat.S_IFDIR, _DOTDOT_OFFSET)
        for dentry in await self._meta.list_dir(op.nodeid, max(op.offset, _DOTDOT_OFFSET), op.size // 32 + 1):
            if not records.add(dentry.name, dentry.ino, dentry.kind, dentry.cookie):
                break
        return records

    async def read_dir_plus(self, op: ops.ReadDirPlus) -> DirectoryPlusBuffer:
        records = DirectoryPlusBuffer(op.size)
        directory = await self._meta.get_inode(op.nodeid)
        if op.offset < _DOTDOT_OFFSET:
            self._times.read(directory, time_ns())
            if op.offset < _DOT_OFFSET:
                records.add(b".", None, _DOT_OFFSET, directory.ino, stat.S_IFDIR)
            records.add(b"..", None, _DOTDOT_OFFSET, directory.parent, stat.S_IFDIR)
        found = await self._meta.list_dir_plus(op.nodeid, max(op.offset, _DOTDOT_OFFSET), op.size // 160 + 1)
        for dentry, inode in found:
            entry = Entry(inode.ino, self._attributes(inode), FOREVER, self._attr_ttl(inode.ino))
            if not records.add(dentry.name, entry, dentry.cookie):
                break
            self._orphans.looked_up(inode.ino)
        return records

    # Attributes

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return self._reply(await self._meta.get_inode(op.nodeid))

    async def stat_x(self, op: ops.StatX) -> AttributesReply:
        return self._reply(await self._meta.get_inode(op.nodeid))

    async def set_inode_attributes(self, op: ops.SetInodeAttributes) -> AttributesReply:
        valid = SetAttrFlag(op.valid)
        ino = op.nodeid
        now = time_ns()
        inode = await self._meta.get_inode(ino)
        if valid & SetAttrFlag.SIZE:
            await self._files.truncate(inode, op.size, now)
        change = SetAttr(kill_suidgid=bool(valid & SetAttrFlag.KILL_SUIDGID and inode.mode & _SET_ID))
        if valid & SetAttrFlag.MODE:
            change.mode = op.mode & _PERMISSIONS
        if valid & SetAttrFlag.UID:
            change.uid = op.new_uid
        if valid & SetAttrFlag.GID:
            change.gid = op.new_gid
        if valid & SetAttrFlag.ATIME:
            change.atime = now if valid & SetAttrFlag.ATIME_NOW else op.atime
            self._times.drop(ino)
        if valid & SetAttrFlag.MTIME:
            change.mtime = now if valid & SetAttrFlag.MTIME_NOW else op.mtime
        if valid & SetAttrFlag.SIZE and change == _NO_CHANGE:
            return self._reply(await self._meta.get_inode(ino))
        if change.mtime is not None and stat.S_ISREG(inode.mode):
            self._files.set_mtime(ino, change.mtime)
        return self._reply(await self._meta.set_attributes(ino, change))

    async def get_xattr(self, op: ops.GetXattr) -> bytes:
        return await self._meta.get_xattr(op.nodeid, op.name)

    async def list_xattr(self, op: ops.ListXattr) -> list[bytes]:
        names = await self._meta.list_xattr(op.nodeid)
        # Only the privileged see these (fs/xattr.c: xattr_permission); capabilities are not told, root stands for them.
        return names if op.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    async def set_xattr(self, op: ops.SetXattr) -> None:
        await self._space.claim_entry(len(op.value))
        kill_sgid = bool(op.setxattr_flags & SetXattrFlag.ACL_KILL_SGID)
        await self._meta.set_xattr(op.nodeid, op.name, op.value, op.flags, kill_sgid)

    async def remove_xattr(self, op: ops.RemoveXattr) -> None:
        await self._meta.remove_xattr(op.nodeid, op.name)

    async def stat_fs(self, op: ops.StatFs) -> FileSystemStatus:
        return await self._space.status()

    # Contents

    async def read_file(self, op: ops.ReadFile) -> ReadResult:
        inode = await self._meta.get_inode(op.nodeid)
        data = await self._files.read(inode, op.offset, op.size)
        if not op.flags & os.O_NOATIME:
            self._times.read(self._files.overlay(inode), time_ns())
        return data

    async def write_file(self, op: ops.WriteFile) -> int:
        await self._space.claim(op.size)
        try:
            return await self._write(op)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        await self._space.claim_again(op.size)
        return await self._write(op)

    async def _write(self, op: ops.WriteFile) -> int:
        inode = await self._meta.get_inode(op.nodeid)
        if op.write_flags & WriteFlag.KILL_SUIDGID and inode.mode & _SET_ID:
            await self._meta.set_attributes(op.nodeid, SetAttr(kill_suidgid=True))
            inode = await self._meta.get_inode(op.nodeid)
        return await self._files.write(inode, op.offset, op.data, time_ns())

    async def fallocate(self, op: ops.Fallocate) -> None:
        inode = await self._meta.get_inode(op.nodeid)
        await self._files.fallocate(inode, op.mode, op.offset, op.length, time_ns())

    async def seek(self, op: ops.Seek) -> int:
        inode = await self._meta.get_inode(op.nodeid)
        return await self._files.seek(inode, op.offset, op.whence)

    async def copy_file_range(self, op: ops.CopyFileRange) -> int:
        if op.flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        length = min(op.length, _MOST_COPIED)
        await self._space.claim(length)
        source = await self._meta.get_inode(op.nodeid)
        target = await self._meta.get_inode(op.nodeid_out)
        return await self._files.copy_range(source, op.offset_in, target, op.offset_out, length, time_ns())

    async def sync_file(self, op: ops.SyncFile) -> None:
        await self._files.sync(op.nodeid, bool(op.flags & SyncFlag.FDATASYNC))

    async def sync_dir(self, op: ops.SyncDir) -> None:
        await self._meta.sync()
