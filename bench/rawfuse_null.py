"""The null file system of bench/floor.c (described there) on rawfuse: ``python -m bench.rawfuse_null MOUNTPOINT``."""

from __future__ import annotations

import errno
import stat

from examples.run import main
from rawfuse import Attributes, AttributesReply, Entry, FileSystem, FuseError, OpenedFile, ops
from rawfuse.abi import OpenFlag

DATA = 2
FIRST_FILE = 16
DAY = 86_400_000_000_000
ZEROS = memoryview(bytes(1 << 20))
OPENED = OpenedFile(flags=OpenFlag.DIRECT_IO)


def _attributes(nodeid: int) -> Attributes:
    if nodeid == 1:
        return Attributes(ino=nodeid, mode=stat.S_IFDIR | 0o755)
    return Attributes(ino=nodeid, mode=stat.S_IFREG | 0o644, size=1 << 40 if nodeid == DATA else 0)


class Null(FileSystem):
    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        name = op.name
        if name == b"data":
            nodeid = DATA
        elif name[:1] == b"f":
            nodeid = FIRST_FILE + int(name[1:])
        else:
            raise FuseError(errno.ENOENT)
        return Entry(nodeid, _attributes(nodeid), entry_ttl=0, attr_ttl=DAY)

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return AttributesReply(_attributes(op.nodeid), DAY)

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        return OPENED

    async def read_file(self, op: ops.ReadFile) -> memoryview:
        return ZEROS[: op.size]

    async def write_file(self, op: ops.WriteFile) -> int:
        return op.size

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        pass


if __name__ == "__main__":
    main(lambda arguments: Null(), "null")
