"""What handlers return. Times are nanoseconds since the epoch (negative before 1970), time-outs (``ttl``)
nanoseconds."""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence

import msgspec

from rawfuse.wire import Buffer, Codec

FOREVER = 1 << 60
"""A time-out longer than any mount lives, nanoseconds."""

SECOND = 1_000_000_000

_TIMES = ("atime", "mtime", "ctime")
ENTRY_OUT = Codec("fuse_entry_out", [f"attr.{name}" for name in _TIMES])
ATTR_OUT = Codec("fuse_attr_out", [f"attr.{name}" for name in _TIMES])
_DIRENT = Codec("fuse_dirent")
_pack_dirent_into = _DIRENT.pack_into
_ENTRY_DIRENT = struct.Struct("=" + ENTRY_OUT.format + _DIRENT.format)
_pack_direntplus_into = _ENTRY_DIRENT.pack_into
_DIRENT_SIZE = _DIRENT.size
_DIRENTPLUS_SIZE = _ENTRY_DIRENT.size


class Attributes(msgspec.Struct, gc=False):
    """The attributes of an inode. ``mode`` has type and permissions, ``blocks`` counts 512 bytes each, ``rdev`` is in
    the kernel's encoding (``os.makedev`` fits up to 12 bits of major). ``btime`` is told by STATX only."""

    ino: int
    mode: int
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    size: int = 0
    blocks: int = 0
    atime: int = 0
    mtime: int = 0
    ctime: int = 0
    btime: int = 0
    rdev: int = 0
    blksize: int = 4096
    flags: int = 0


class Entry(msgspec.Struct, gc=False):
    """A name's inode. ``nodeid`` 0 with ``attributes`` None: the name does not exist, remembered for ``entry_ttl``."""

    nodeid: int
    attributes: Attributes | None
    entry_ttl: int = SECOND
    attr_ttl: int = SECOND
    generation: int = 0


class AttributesReply(msgspec.Struct, gc=False):
    """Attributes and how long the kernel may keep them."""

    attributes: Attributes
    attr_ttl: int = SECOND


class OpenedFile(msgspec.Struct, gc=False):
    """An open handle, a new object each time. ``flags``: ``OpenFlag`` without PASSTHROUGH.

    ``backing``: a descriptor, open until the handler has returned, of a regular file that holds the same bytes at the
    same offsets; where PASSTHROUGH was agreed the kernel then serves READ, WRITE and mmap from that file. It depends on
    the other handles of the inode (``rawfuse.backing``), so what was chosen is told here: the library sets
    ``backing_id``, not 0 in passthrough, and ``flags``, which with a backing id and DIRECT_IO mean that READ and WRITE
    are sent and only mmap is passed through."""

    fh: int = 0
    flags: int = 0
    backing: int = -1
    backing_id: int = 0


class FileSystemStatus(msgspec.Struct, gc=False):
    """statfs(2): blocks of ``block_size`` bytes; ``files`` are inodes. ``available`` is what users without privilege
    may use."""

    blocks: int = 0
    free: int = 0
    available: int = 0
    files: int = 0
    files_free: int = 0
    block_size: int = 4096
    name_max: int = 255


class FileLock(msgspec.Struct, gc=False):
    """A record lock: ``type`` is F_RDLCK, F_WRLCK or F_UNLCK, ``end`` is inclusive."""

    start: int
    end: int
    type: int
    pid: int


class IoctlResult(msgspec.Struct, gc=False):
    """The system call's return value and the bytes copied back to the caller."""

    result: int = 0
    data: bytes = b""


def entry_values(entry: Entry) -> tuple[int, ...]:
    """The fields of ``fuse_entry_out``."""
    entry_s, entry_ns = divmod(entry.entry_ttl, SECOND)
    attributes = entry.attributes
    if attributes is None:
        return (0, 0, entry_s, 0, entry_ns, *(0,) * 17)
    attr_s, attr_ns = divmod(entry.attr_ttl, SECOND)
    return (entry.nodeid, entry.generation, entry_s, attr_s, entry_ns, attr_ns, *attribute_values(attributes))


def attribute_values(a: Attributes) -> tuple[int, ...]:
    """The fields of ``fuse_attr``."""
    atime, atime_ns = divmod(a.atime, SECOND)
    mtime, mtime_ns = divmod(a.mtime, SECOND)
    ctime, ctime_ns = divmod(a.ctime, SECOND)
    return (
        a.ino,
        a.size,
        a.blocks,
        atime,
        mtime,
        ctime,
        atime_ns,
        mtime_ns,
        ctime_ns,
        a.mode,
        a.nlink,
        a.uid,
        a.gid,
        a.rdev,
        a.blksize,
        a.flags,
    )


class DirectoryBuffer:
    """Directory records up to ``size`` bytes (``ReadDir.size``). ``add`` returns False, and adds nothing, when the
    entry does not fit; the kernel asks again from the last cookie that it has."""

    __slots__ = ("data", "size")

    def __init__(self, size: int) -> None:
        self.data = bytearray()
        self.size = size

    def add(self, name: bytes, ino: int, kind: int, cookie: int) -> bool:
        """``kind``: the file type bits (``stat.S_IFMT``); ``cookie``: what ``ReadDir.offset`` will be to go on behind
        this entry, not 0."""
        data = self.data
        start = len(data)
        length = len(name)
        end = start + ((_DIRENT_SIZE + length + 7) & ~7)
        if end > self.size:
            return False
        data += bytes(end - start)
        _pack_dirent_into(data, start, ino, cookie, length, kind >> 12)
        data[start + _DIRENT_SIZE : start + _DIRENT_SIZE + length] = name
        return True


class DirectoryPlusBuffer:
    """As ``DirectoryBuffer`` for READDIRPLUS. Each entry added with attributes counts as a look-up of its nodeid, but
    for ``.`` and ``..``; with ``entry`` None the kernel learns name, number and type only. ``counted``: the nodeids of
    these look-ups."""

    __slots__ = ("counted", "data", "size")

    def __init__(self, size: int) -> None:
        self.counted: list[int] = []
        self.data = bytearray()
        self.size = size

    def add(self, name: bytes, entry: Entry | None, cookie: int, ino: int = 0, kind: int = 0) -> bool:
        """``ino`` and ``kind`` are taken from ``entry`` when there is one."""
        data = self.data
        start = len(data)
        length = len(name)
        end = start + ((_DIRENTPLUS_SIZE + length + 7) & ~7)
        if end > self.size:
            return False
        data += bytes(end - start)
        if entry is not None and entry.attributes is not None:
            ino, kind = entry.attributes.ino, entry.attributes.mode
            values = entry_values(entry)
            if name not in _DOTS:
                self.counted.append(entry.nodeid)
        else:
            values = _NO_ENTRY
        _pack_direntplus_into(data, start, *values, ino, cookie, length, stat.S_IFMT(kind) >> 12)
        data[start + _DIRENTPLUS_SIZE : start + _DIRENTPLUS_SIZE + length] = name
        return True


_DOTS = (b".", b"..")
_NO_ENTRY = (0,) * len(ENTRY_OUT.fields)

ReadResult = Buffer | Sequence[Buffer]
