"""The smallest file system: one directory with one file.

python -m examples.hello MOUNTPOINT
"""

from __future__ import annotations

import errno
import stat

from examples.run import main
from rawfuse import Attributes, AttributesReply, DirectoryBuffer, Entry, FileSystem, FuseError, ops

ROOT = Attributes(ino=1, mode=stat.S_IFDIR | 0o755, nlink=2)
TEXT = b"hello, world\n"
FILE = Attributes(ino=2, mode=stat.S_IFREG | 0o444, size=len(TEXT))


class Hello(FileSystem):
    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        """Which inode has this name in the directory? There is one directory."""
        if op.name != b"hello":
            raise FuseError(errno.ENOENT)
        return Entry(FILE.ino, FILE)

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        """What stat(2) shows of an inode."""
        return AttributesReply(ROOT if op.nodeid == ROOT.ino else FILE)

    async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
        """The entries behind the one whose cookie is ``op.offset``, as many as fit."""
        records = DirectoryBuffer(op.size)
        names = [(b".", ROOT), (b"..", ROOT), (b"hello", FILE)]
        for cookie, (name, attributes) in enumerate(names[op.offset :], op.offset + 1):
            if not records.add(name, attributes.ino, attributes.mode, cookie):
                break
        return records

    async def read_file(self, op: ops.ReadFile) -> bytes:
        """Bytes from ``op.offset`` on; fewer than ``op.size`` are the end of the file."""
        return TEXT[op.offset : op.offset + op.size]


if __name__ == "__main__":
    main(lambda arguments: Hello(), "hello")
