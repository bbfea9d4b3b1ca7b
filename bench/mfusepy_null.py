"""The null file system of bench/floor.c (described there) on mfusepy: ``mfusepy_null.py MOUNTPOINT``, in the
environment of the peers. mfusepy gives no inode numbers, but paths."""

# The environment of the peers has mfusepy, the project's has not.
# mypy: ignore-errors

from __future__ import annotations

import errno
import stat
import sys

import mfusepy

ROOT = {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 1}
FILE = {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1}
DATA = {**FILE, "st_size": 1 << 40}
DAY = 86_400
ZEROS = bytes(1 << 20)


class Null(mfusepy.Operations):
    use_ns = True

    def getattr(self, path, fh=None):
        if path[1:2] == "f":
            return FILE
        if path == "/data":
            return DATA
        if path == "/":
            return ROOT
        raise mfusepy.FuseOSError(errno.ENOENT)

    def open(self, path, flags):
        return 0

    def read(self, path, size, offset, fh):
        return ZEROS if size == len(ZEROS) else ZEROS[:size]

    def write(self, path, data, offset, fh):
        return len(data)


if __name__ == "__main__":
    options = {"direct_io": True, "entry_timeout": 0, "attr_timeout": DAY, "allow_other": True}
    mfusepy.FUSE(Null(), sys.argv[1], foreground=True, nothreads=True, **options)
