"""The null file system of bench/floor.c (described there) on pyfuse3: ``pyfuse3_null.py MOUNTPOINT``, in the
environment of the peers."""

# The environment of the peers has types for pyfuse3 and trio, the project's has neither.
# mypy: ignore-errors

from __future__ import annotations

import errno
import stat
import sys

import pyfuse3
import trio

DATA = 2
FIRST_FILE = 16
DAY = 86_400
ZEROS = bytes(1 << 20)


class Null(pyfuse3.Operations):
    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_size = 1 << 40 if inode == DATA else 0
        entry.entry_timeout = 0
        entry.attr_timeout = DAY
        return entry

    async def lookup(self, parent_inode, name, ctx):
        if name == b"data":
            return self._attributes(DATA)
        if name[:1] == b"f":
            return self._attributes(FIRST_FILE + int(name[1:]))
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def forget(self, inode_list):
        pass

    async def getattr(self, inode, ctx):
        return self._attributes(inode)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh, off, size):
        return ZEROS if size == len(ZEROS) else ZEROS[:size]

    async def write(self, fh, off, buf):
        return len(buf)

    async def flush(self, fh):
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh):
        pass


def main() -> None:
    pyfuse3.init(Null(), sys.argv[1], {"fsname=pyfuse3_null", "allow_other"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
