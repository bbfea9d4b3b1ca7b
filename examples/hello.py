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
        if op.name != b"hello":
            raise FuseError(errno.ENOENT)
        return Entry(FILE.ino, FILE)

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return AttributesReply(ROOT if op.nodeid == ROOT.ino else FILE)

    async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
        records = DirectoryBuffer(op.size)
        names = [(b".", ROOT), (b"..", ROOT), (b"hello", FILE)]
        for cookie, (name, attributes) in enumerate(names[op.offset :], op.offset + 1):
            if not records.add(name, attributes.ino, attributes.mode, cookie):
                break
        return records

    async def read_file(self, op: ops.ReadFile) -> bytes:
        return TEXT[op.offset : op.offset + op.size]


if __name__ == "__main__":
    main(lambda arguments: Hello(), "hello")
