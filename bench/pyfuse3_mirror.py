"""A directory shown again through pyfuse3, for comparison: ``pyfuse3_mirror.py SOURCE MOUNTPOINT``.

It behaves as pyfuse3's own example of that kind: inodes are those of the source, a table maps them to paths, each
request is one system call on the path or on an open descriptor, and all time-outs are 0. It runs in the environment of
the peers, so it imports nothing of this project. It knows one path for each inode: hard links share it.
"""

# The environment of the peers has types for pyfuse3 and trio, the project's has neither.
# mypy: ignore-errors

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import defaultdict

import pyfuse3
import trio


def _error(error: OSError) -> pyfuse3.FUSEError:
    return pyfuse3.FUSEError(error.errno or errno.EIO)


class Mirror(pyfuse3.Operations):
    def __init__(self, source: str) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: os.fsencode(source)}
        self._lookups: defaultdict[int, int] = defaultdict(int)
        self._descriptors: dict[int, list[int]] = {}
        """Inode -> the one open descriptor of it and how often it is open."""

    def _path(self, inode: int) -> bytes:
        try:
            return self._paths[inode]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    def _attributes(self, path: bytes | int) -> pyfuse3.EntryAttributes:
        try:
            found = os.fstat(path) if isinstance(path, int) else os.lstat(path)
        except OSError as error:
            raise _error(error) from None
        entry = pyfuse3.EntryAttributes()
        for name in ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size"):
            setattr(entry, name, getattr(found, name))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(found, name))
        entry.generation = 0
        entry.entry_timeout = 0
        entry.attr_timeout = 0
        entry.st_blksize = 512
        entry.st_blocks = (found.st_size + 511) // 512
        return entry

    def _entry(self, path: bytes) -> pyfuse3.EntryAttributes:
        """Attributes, with the look-up counted."""
        entry = self._attributes(path)
        self._paths[entry.st_ino] = path
        self._lookups[entry.st_ino] += 1
        return entry

    async def lookup(self, parent_inode, name, ctx):
        return self._entry(os.path.join(self._path(parent_inode), name))

    async def forget(self, inode_list):
        for inode, count in inode_list:
            self._lookups[inode] -= count
            if self._lookups[inode] <= 0 and inode not in self._descriptors:
                del self._lookups[inode]
                self._paths.pop(inode, None)

    async def getattr(self, inode, ctx):
        if inode in self._descriptors:
            return self._attributes(self._descriptors[inode][0])
        return self._attributes(self._path(inode))

    async def setattr(self, inode, attr, fields, fh, ctx):
        target = self._path(inode) if fh is None else fh
        try:
            if fields.update_size:
                os.truncate(target, attr.st_size)
            if fields.update_mode:
                os.chmod(target, stat.S_IMODE(attr.st_mode))
            if fields.update_uid or fields.update_gid:
                uid = attr.st_uid if fields.update_uid else -1
                gid = attr.st_gid if fields.update_gid else -1
                os.chown(target, uid, gid)
            if fields.update_atime or fields.update_mtime:
                now = os.stat(target)
                atime = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
                mtime = attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns
                os.utime(target, ns=(atime, mtime))
        except OSError as error:
            raise _error(error) from None
        return await self.getattr(inode, ctx)

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, inode, start_id, token):
        """All entries with their attributes, in the order of their inodes, from ``start_id`` on."""
        path = self._path(inode)
        entries = [(self._attributes(os.path.join(path, name)), name) for name in os.listdir(path)]
        for entry, name in sorted(entries, key=lambda item: item[0].st_ino):
            if entry.st_ino <= start_id:
                continue
            if not pyfuse3.readdir_reply(token, name, entry, entry.st_ino):
                break
            self._paths[entry.st_ino] = os.path.join(path, name)
            self._lookups[entry.st_ino] += 1

    async def mkdir(self, parent_inode, name, mode, ctx):
        return self._made(os.path.join(self._path(parent_inode), name), ctx, lambda path: os.mkdir(path, mode))

    async def mknod(self, parent_inode, name, mode, rdev, ctx):
        return self._made(os.path.join(self._path(parent_inode), name), ctx, lambda path: os.mknod(path, mode, rdev))

    async def symlink(self, parent_inode, name, target, ctx):
        return self._made(os.path.join(self._path(parent_inode), name), ctx, lambda path: os.symlink(target, path))

    def _made(self, path, ctx, make):
        try:
            make(path)
            os.lchown(path, ctx.uid, ctx.gid)
        except OSError as error:
            raise _error(error) from None
        return self._entry(path)

    async def readlink(self, inode, ctx):
        return os.readlink(self._path(inode))

    async def unlink(self, parent_inode, name, ctx):
        try:
            os.unlink(os.path.join(self._path(parent_inode), name))
        except OSError as error:
            raise _error(error) from None

    async def rmdir(self, parent_inode, name, ctx):
        try:
            os.rmdir(os.path.join(self._path(parent_inode), name))
        except OSError as error:
            raise _error(error) from None

    async def rename(self, parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx):
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        old = os.path.join(self._path(parent_inode_old), name_old)
        new = os.path.join(self._path(parent_inode_new), name_new)
        try:
            os.rename(old, new)
            self._paths[os.lstat(new).st_ino] = new
        except OSError as error:
            raise _error(error) from None

    async def link(self, inode, new_parent_inode, new_name, ctx):
        path = os.path.join(self._path(new_parent_inode), new_name)
        try:
            os.link(self._path(inode), path, follow_symlinks=False)
        except OSError as error:
            raise _error(error) from None
        return self._entry(path)

    async def statfs(self, ctx):
        found = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
        reply = pyfuse3.StatvfsData()
        for name in ["bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"]:
            setattr(reply, f"f_{name}", getattr(found, f"f_{name}"))
        return reply

    async def open(self, inode, flags, ctx):
        if inode in self._descriptors:
            self._descriptors[inode][1] += 1
        else:
            try:
                descriptor = os.open(self._path(inode), flags & ~(os.O_CREAT | os.O_WRONLY | os.O_APPEND) | os.O_RDWR)
            except OSError as error:
                raise _error(error) from None
            self._descriptors[inode] = [descriptor, 1]
        return pyfuse3.FileInfo(fh=self._descriptors[inode][0])

    async def create(self, parent_inode, name, mode, flags, ctx):
        path = os.path.join(self._path(parent_inode), name)
        try:
            descriptor = os.open(path, flags & ~(os.O_WRONLY | os.O_APPEND) | os.O_CREAT | os.O_TRUNC | os.O_RDWR, mode)
            os.fchown(descriptor, ctx.uid, ctx.gid)
        except OSError as error:
            raise _error(error) from None
        entry = self._entry(path)
        self._descriptors[entry.st_ino] = [descriptor, 1]
        return pyfuse3.FileInfo(fh=descriptor), entry

    async def read(self, fh, off, size):
        return os.pread(fh, size, off)

    async def write(self, fh, off, buf):
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh, datasync):
        os.fsync(fh)

    async def release(self, fh):
        inode, opened = next(item for item in self._descriptors.items() if item[1][0] == fh)
        opened[1] -= 1
        if not opened[1]:
            del self._descriptors[inode]
            os.close(fh)


def main() -> None:
    source, mountpoint = sys.argv[1:]
    os.umask(0)
    options = set(pyfuse3.default_options) | {"fsname=pyfuse3_mirror", "allow_other"}
    pyfuse3.init(Mirror(source), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
