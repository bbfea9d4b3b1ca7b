"""From requests to typed operations: a decoder for each form that requests have. They raise nothing but
``ProtocolError``."""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from rawfuse import ops
from rawfuse.abi import COMPAT_SETXATTR_IN_SIZE, InitFlag
from rawfuse.replies import SECOND
from rawfuse.wire import Codec, InMessage

Decoder = Callable[[InMessage], ops.Op]
OpFactory = Callable[..., ops.Op]

IN_PLACE = 16 << 10
"""Data of a WRITE up to this size are copied, so that a waiting handler keeps no request buffer for them, bytes."""


class Tail(Enum):
    """What follows the structure of a request."""

    NOTHING = 0
    NAME = 1
    DATA = 2


class Shape(NamedTuple):
    """The form of a simple request: a structure, or none, and what follows it; the operation takes all fields in
    order."""

    op_type: OpFactory
    codec: Codec | None
    tail: Tail


SHAPES: dict[Decoder, Shape] = {}
"""The decoders of such requests."""


def plain(op_type: OpFactory) -> Decoder:
    def decode(message: InMessage) -> ops.Op:
        message.finish()
        return op_type(*message.origin)

    SHAPES[decode] = Shape(op_type, None, Tail.NOTHING)
    return decode


def named(op_type: OpFactory) -> Decoder:
    def decode(message: InMessage) -> ops.Op:
        name = message.name()
        message.finish()
        return op_type(*message.origin, name)

    SHAPES[decode] = Shape(op_type, None, Tail.NAME)
    return decode


def fixed(op_type: OpFactory, structure: str) -> Decoder:
    codec = Codec(structure)
    size, unpack = codec.size, codec.unpack_from

    def decode(message: InMessage) -> ops.Op:
        if message.left != size:
            message.take(codec)
            message.finish()
        return op_type(*message.origin, *unpack(message.buffer, message.position))

    SHAPES[decode] = Shape(op_type, codec, Tail.NOTHING)
    return decode


def fixed_and_name(op_type: OpFactory, structure: str, *, extended: bool = False) -> Decoder:
    codec = Codec(structure)

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        name = message.name()
        message.finish()
        if extended:
            return op_type(*message.origin, *fields, name, message.extensions())
        return op_type(*message.origin, *fields, name)

    SHAPES[decode] = Shape(op_type, codec, Tail.NAME)
    return decode


def counted(op_type: OpFactory, head_structure: str, item_structure: str) -> Decoder:
    """A structure that holds a count, then so many pairs."""
    head, item = Codec(head_structure), Codec(item_structure)

    def decode(message: InMessage) -> ops.Op:
        (count,) = message.take(head)
        data = message.payload(count * item.size)
        message.finish()
        return op_type(*message.origin, list(item.struct.iter_unpack(data)))

    return decode


def set_attributes() -> Decoder:
    codec = Codec("fuse_setattr_in", ["atime", "mtime", "ctime"])

    def decode(message: InMessage) -> ops.Op:
        valid, fh, size, owner, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, uid, gid = message.take(codec)
        message.finish()
        return ops.SetInodeAttributes(
            *message.origin,
            valid,
            fh,
            size,
            owner,
            atime * SECOND + atime_ns,
            mtime * SECOND + mtime_ns,
            ctime * SECOND + ctime_ns,
            mode,
            uid,
            gid,
        )

    return decode


def symlink(message: InMessage) -> ops.Op:
    name, target = message.name(), message.text()
    message.finish()
    return ops.CreateSymlink(*message.origin, name, target, message.extensions())


def rename(structure: str) -> Decoder:
    codec = Codec(structure)
    flagged = "flags" in codec.fields

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        name, new_name = message.name(), message.name()
        message.finish()
        return ops.Rename(*message.origin, fields[0], fields[1] if flagged else 0, name, new_name)

    return decode


def write() -> Decoder:
    codec = Codec("fuse_write_in")

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        data = message.payload(fields[2])
        message.finish()
        if len(data) <= IN_PLACE:
            data = memoryview(bytes(data))
        return ops.WriteFile(*message.origin, *fields, data)  # type: ignore[call-arg]

    SHAPES[decode] = Shape(ops.WriteFile, codec, Tail.DATA)
    return decode


def set_xattr(message: InMessage) -> ops.Op:
    size, flags, setxattr_flags = message.take(_SETXATTR_IN)
    name, value = message.name(), bytes(message.payload(size))
    message.finish()
    return ops.SetXattr(*message.origin, flags, setxattr_flags, name, value)


def set_xattr_compat(message: InMessage) -> ops.Op:
    size, flags = struct.unpack("=II", message.payload(COMPAT_SETXATTR_IN_SIZE))
    name, value = message.name(), bytes(message.payload(size))
    message.finish()
    return ops.SetXattr(*message.origin, flags, 0, name, value)


def init(message: InMessage) -> ops.Op:
    major, minor, readahead, flags = struct.unpack("=IIII", message.payload(16))
    if flags & InitFlag.INIT_EXT and message.left >= 4:
        flags |= struct.unpack("=I", message.payload(4))[0] << 32
    return ops.Init(*message.origin, major, minor, readahead, flags)


def ioctl() -> Decoder:
    codec = Codec("fuse_ioctl_in")

    def decode(message: InMessage) -> ops.Op:
        fh, flags, command, argument, in_size, out_size = message.take(codec)
        data = bytes(message.payload(in_size))
        message.finish()
        return ops.Ioctl(*message.origin, fh, flags, command, argument, out_size, data)

    return decode


def notify_reply() -> Decoder:
    codec = Codec("fuse_notify_retrieve_in")

    def decode(message: InMessage) -> ops.Op:
        offset, size = message.take(codec)
        data = bytes(message.payload(size))
        message.finish()
        return ops.NotifyReply(*message.origin, offset, data)

    return decode


def set_lock(wait: bool) -> Decoder:
    codec = Codec("fuse_lk_in")

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        message.finish()
        return ops.SetLock(*message.origin, *fields, wait)  # type: ignore[call-arg]

    return decode


_SETXATTR_IN = Codec("fuse_setxattr_in")
