"""A file system whose files misbehave as their names say: ``python -m tests.mounted.misbehaving LIMIT MOUNTPOINT``. At
most LIMIT handlers may wait at the same time; looking up a name that begins with ``never`` never returns."""

from __future__ import annotations

import asyncio
import stat
import sys
from typing import Any

import uvloop

from rawfuse import Attributes, AttributesReply, Entry, FileSystem, MountOptions, Session, Settings, ops

NAMES = [b"good", b"raises", b"wrong", b"much", b"cancelled", b"gaps"]
FIRST = 10


class Misbehaving(FileSystem):
    def _attributes(self, nodeid: int) -> Attributes:
        kind = stat.S_IFDIR | 0o755 if nodeid == 1 else stat.S_IFREG | 0o644
        return Attributes(ino=nodeid, mode=kind, size=4096)

    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        if op.name.startswith(b"never"):
            await asyncio.get_running_loop().create_future()
        if op.name not in NAMES:
            raise FileNotFoundError(2, "no such name")
        nodeid = FIRST + NAMES.index(op.name)
        return Entry(nodeid, self._attributes(nodeid), entry_ttl=0, attr_ttl=0)

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return AttributesReply(self._attributes(op.nodeid), attr_ttl=0)

    async def read_file(self, op: ops.ReadFile) -> Any:
        match NAMES[op.nodeid - FIRST]:
            case b"raises":
                raise ValueError("a bug")
            case b"wrong":
                return ["text"]
            case b"much":
                return bytes(op.size + 1)
            case b"cancelled":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            case b"gaps":
                return memoryview(bytearray(op.size))[::2]
        return bytes(op.size)


async def main() -> None:
    limit, mountpoint = sys.argv[1:]
    settings = Settings(max_in_flight=int(limit))
    session = Session(Misbehaving(), mountpoint, MountOptions(subtype="misbehaving"), settings=settings)
    await session.mount()
    await session.serve()


if __name__ == "__main__":
    uvloop.run(main())
