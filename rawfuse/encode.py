"""From results of handlers to messages: an encoder for each form that replies have."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from rawfuse import ops
from rawfuse.errors import FuseError
from rawfuse.replies import (
    ATTR_OUT,
    ENTRY_OUT,
    SECOND,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileLock,
    FileSystemStatus,
    IoctlResult,
    OpenedFile,
    ReadResult,
    attribute_values,
    entry_values,
)
from rawfuse.wire import OUT_HEADER, Buffer, Codec

Message = bytes | list[Buffer]
"""An encoded reply: one packed buffer, or header and body buffers for ``writev``."""

Encoder = Callable[[Any, Any], Message]

_HEAD = "IiQ"
_head_size = OUT_HEADER.size
_MOST_PARTS = os.sysconf("SC_IOV_MAX")
_UNBOUNDED = (1 << 31) - 1
_pack_head = OUT_HEADER.pack


def empty(op: ops.Op, result: None) -> Message:
    return _pack_head(_head_size, 0, op.unique)


def packed(structure: str, signed: list[str], values: Callable[[Any], tuple[int, ...]]) -> Encoder:
    """Header and one structure, packed at once."""
    codec = Codec(structure, signed)
    whole = struct.Struct("=" + _HEAD + codec.format)
    size, pack = whole.size, whole.pack

    def encode(op: ops.Op, result: Any) -> Message:
        return pack(size, 0, op.unique, *values(result))

    return encode


def _attr_out() -> Encoder:
    whole = struct.Struct("=" + _HEAD + ATTR_OUT.format)
    size, pack = whole.size, whole.pack

    def encode(op: ops.Op, reply: AttributesReply) -> Message:
        return pack(size, 0, op.unique, *divmod(reply.attr_ttl, SECOND), *attribute_values(reply.attributes))

    return encode


def _entry_out() -> Encoder:
    whole = struct.Struct("=" + _HEAD + ENTRY_OUT.format)
    size, pack = whole.size, whole.pack

    def encode(op: ops.Op, entry: Entry) -> Message:
        return pack(size, 0, op.unique, *entry_values(entry))

    return encode


def _created() -> Encoder:
    whole = struct.Struct("=" + _HEAD + ENTRY_OUT.format + Codec("fuse_open_out").format)
    size, pack = whole.size, whole.pack

    def encode(op: ops.Op, reply: tuple[Entry, OpenedFile]) -> Message:
        entry, opened = reply
        return pack(size, 0, op.unique, *entry_values(entry), opened.fh, opened.flags, opened.backing_id)

    return encode


def statx() -> Encoder:
    codec = Codec("fuse_statx_out", [])
    whole = struct.Struct("=" + _HEAD + codec.format)
    size, pack = whole.size, whole.pack
    basic, btime = 0x7FF, 0x800

    def encode(op: ops.Op, reply: AttributesReply) -> Message:
        a = reply.attributes
        return pack(
            size,
            0,
            op.unique,
            *divmod(reply.attr_ttl, SECOND),
            0,
            basic | btime if a.btime else basic,
            a.blksize,
            0,
            a.nlink,
            a.uid,
            a.gid,
            a.mode,
            a.ino,
            a.size,
            a.blocks,
            0,
            *divmod(a.atime, SECOND),
            *divmod(a.btime, SECOND),
            *divmod(a.ctime, SECOND),
            *divmod(a.mtime, SECOND),
            os.major(a.rdev),
            os.minor(a.rdev),
            0,
            0,
        )

    return encode


def _limited(size: int, op: ops.Op, body: Sequence[Buffer]) -> Message:
    """A reply of variable length; the kernel answers EIO to one that is longer than it asked for."""
    parts = [memoryview(part).cast("B") for part in body] if len(body) < _MOST_PARTS else [b"".join(body)]
    length = sum(map(len, parts))
    if length > size:
        raise ValueError(f"{type(op).__name__} asked for {size} bytes, the handler returned {length}")
    return [_pack_head(_head_size + length, 0, op.unique), *parts]


def read_data(op: ops.ReadFile, result: ReadResult) -> Message:
    return _limited(op.size, op, [result] if isinstance(result, (bytes, bytearray, memoryview)) else result)


def link_target(op: ops.ReadSymlink, target: bytes) -> Message:
    return _limited(_UNBOUNDED, op, [target])


def directory(op: ops.ReadDir, records: DirectoryBuffer | DirectoryPlusBuffer) -> Message:
    return _limited(op.size, op, [records.data])


_GETXATTR_OUT = struct.Struct("=" + _HEAD + Codec("fuse_getxattr_out").format)


def xattr_value(op: ops.GetXattr | ops.ListXattr, value: bytes) -> Message:
    data = memoryview(value).cast("B")
    if op.size == 0:
        return _GETXATTR_OUT.pack(_GETXATTR_OUT.size, 0, op.unique, len(data))
    if len(data) > op.size:
        raise FuseError(errno.ERANGE)
    return _pack_head(_head_size + len(data), 0, op.unique) + data


def xattr_names(op: ops.ListXattr, names: list[bytes]) -> Message:
    return xattr_value(op, b"".join(name + b"\0" for name in names))


def ioctl_result() -> Encoder:
    codec = Codec("fuse_ioctl_out")

    def encode(op: ops.Ioctl, reply: IoctlResult) -> Message:
        return _limited(codec.size + op.out_size, op, [codec.pack(reply.result, 0, 0, 0), reply.data])

    return encode


def status_values(s: FileSystemStatus) -> tuple[int, ...]:
    return (s.blocks, s.free, s.available, s.files, s.files_free, s.block_size, s.name_max, s.block_size)


def _opened_values(o: OpenedFile) -> tuple[int, ...]:
    return (o.fh, o.flags, o.backing_id)


def lock_values(lock: FileLock) -> tuple[int, ...]:
    return (lock.start, lock.end, lock.type, lock.pid)


def one_value(value: int) -> tuple[int, ...]:
    return (value,)


entry = _entry_out()
attributes = _attr_out()
created = _created()
opened = packed("fuse_open_out", [], _opened_values)
count = packed("fuse_write_out", [], one_value)
offset = packed("fuse_lseek_out", [], one_value)
bytes_copied = packed("fuse_copy_file_range_out", [], one_value)
