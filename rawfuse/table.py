"""The protocol in one table: for each opcode how a request is decoded, which method of ``FileSystem`` serves it, how
its result is encoded, what is answered when an author left the method out, and whether an INTERRUPT cancels it.

The default errno is chosen per opcode, because ENOSYS is remembered by the kernel for some (and means success, "not
supported" or another opcode from then on) and shown to the user for the others.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rawfuse import ops
from rawfuse.abi import COMPAT_SETXATTR_IN_SIZE, InitFlag, Opcode
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
from rawfuse.wire import OUT_HEADER, Buffer, Codec, InMessage

Message = bytes | list[Buffer]
"""An encoded reply: one packed buffer, or header and body buffers for ``writev``."""

Decoder = Callable[[InMessage], ops.Op]
OpFactory = Callable[..., ops.Op]
Encoder = Callable[[Any, Any], Message]


class Operation(NamedTuple):
    """One row of the table. ``encode`` None: no reply is ever sent. ``default``: the errno without a handler, 0 for
    success. ``interruptible``: an INTERRUPT cancels the handler; others finish, for their effect must not stop
    half-way."""

    op_type: type[ops.Op]
    method: str
    decode: Decoder
    encode: Encoder | None
    default: int
    interruptible: bool


# Decoding

_HEAD = "IiQ"
_head_size = OUT_HEADER.size
_pack_head = OUT_HEADER.pack


def _plain(op_type: OpFactory) -> Decoder:
    def decode(message: InMessage) -> ops.Op:
        message.finish()
        return op_type(*message.origin)

    return decode


def _named(op_type: OpFactory) -> Decoder:
    def decode(message: InMessage) -> ops.Op:
        name = message.name()
        message.finish()
        return op_type(*message.origin, name)

    return decode


def _fixed(op_type: OpFactory, structure: str) -> Decoder:
    codec = Codec(structure)
    size, unpack = codec.size, codec.unpack_from

    def decode(message: InMessage) -> ops.Op:
        if message.left != size:
            message.take(codec)
            message.finish()
        return op_type(*message.origin, *unpack(message.buffer, message.position))

    return decode


def _fixed_and_name(op_type: OpFactory, structure: str, *, extended: bool = False) -> Decoder:
    codec = Codec(structure)

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        name = message.name()
        message.finish()
        if extended:
            return op_type(*message.origin, *fields, name, message.extensions())
        return op_type(*message.origin, *fields, name)

    return decode


def _pairs(item: Codec, data: memoryview) -> list[tuple[int, int]]:
    return [(first, second) for first, second in item.struct.iter_unpack(data)]


def _batch_forget() -> Decoder:
    head, item = Codec("fuse_batch_forget_in"), Codec("fuse_forget_one")

    def decode(message: InMessage) -> ops.Op:
        (count,) = message.take(head)
        data = message.payload(count * item.size)
        message.finish()
        return ops.BatchForget(*message.origin, _pairs(item, data))

    return decode


def _remove_mapping() -> Decoder:
    head, item = Codec("fuse_removemapping_in"), Codec("fuse_removemapping_one")

    def decode(message: InMessage) -> ops.Op:
        (count,) = message.take(head)
        data = message.payload(count * item.size)
        message.finish()
        return ops.RemoveMapping(*message.origin, _pairs(item, data))

    return decode


def _set_attributes() -> Decoder:
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


def _symlink(message: InMessage) -> ops.Op:
    name, target = message.name(), message.text()
    message.finish()
    return ops.CreateSymlink(*message.origin, name, target, message.extensions())


def _rename(structure: str) -> Decoder:
    codec = Codec(structure)
    flagged = "flags" in codec.fields

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        name, new_name = message.name(), message.name()
        message.finish()
        return ops.Rename(*message.origin, fields[0], fields[1] if flagged else 0, name, new_name)

    return decode


def _write() -> Decoder:
    codec = Codec("fuse_write_in")

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        data = message.payload(fields[2])
        message.finish()
        return ops.WriteFile(*message.origin, *fields, data)  # type: ignore[call-arg]

    return decode


def _set_xattr(message: InMessage) -> ops.Op:
    size, flags, setxattr_flags = message.take(_SETXATTR_IN)
    name, value = message.name(), bytes(message.payload(size))
    message.finish()
    return ops.SetXattr(*message.origin, flags, setxattr_flags, name, value)


def _set_xattr_compat(message: InMessage) -> ops.Op:
    size, flags = struct.unpack("=II", message.payload(COMPAT_SETXATTR_IN_SIZE))
    name, value = message.name(), bytes(message.payload(size))
    message.finish()
    return ops.SetXattr(*message.origin, flags, 0, name, value)


def _init(message: InMessage) -> ops.Op:
    major, minor, readahead, flags = struct.unpack("=IIII", message.payload(16))
    if flags & InitFlag.INIT_EXT and message.left >= 4:
        flags |= struct.unpack("=I", message.payload(4))[0] << 32
    return ops.Init(*message.origin, major, minor, readahead, flags)


def _ioctl() -> Decoder:
    codec = Codec("fuse_ioctl_in")

    def decode(message: InMessage) -> ops.Op:
        fh, flags, command, argument, in_size, out_size = message.take(codec)
        data = bytes(message.payload(in_size))
        message.finish()
        return ops.Ioctl(*message.origin, fh, flags, command, argument, out_size, data)

    return decode


def _notify_reply() -> Decoder:
    codec = Codec("fuse_notify_retrieve_in")

    def decode(message: InMessage) -> ops.Op:
        offset, size = message.take(codec)
        data = bytes(message.payload(size))
        message.finish()
        return ops.NotifyReply(*message.origin, offset, data)

    return decode


def _set_lock(wait: bool) -> Decoder:
    codec = Codec("fuse_lk_in")

    def decode(message: InMessage) -> ops.Op:
        fields = message.take(codec)
        message.finish()
        return ops.SetLock(*message.origin, *fields, wait)  # type: ignore[call-arg]

    return decode


_SETXATTR_IN = Codec("fuse_setxattr_in")


# Encoding


def _nothing(op: ops.Op, result: None) -> Message:
    return _pack_head(_head_size, 0, op.unique)


def _packed(structure: str, signed: list[str], values: Callable[[Any], tuple[int, ...]]) -> Encoder:
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


def _statx_out() -> Encoder:
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
    length = sum(map(len, body))
    if length > size:
        raise ValueError(f"{type(op).__name__} asked for {size} bytes, the handler returned {length}")
    return [_pack_head(_head_size + length, 0, op.unique), *body]


def _read(op: ops.ReadFile, result: ReadResult) -> Message:
    return _limited(op.size, op, [result] if isinstance(result, (bytes, bytearray, memoryview)) else result)


def _target(op: ops.ReadSymlink, target: bytes) -> Message:
    return _pack_head(_head_size + len(target), 0, op.unique) + target


def _directory(op: ops.ReadDir, records: DirectoryBuffer | DirectoryPlusBuffer) -> Message:
    return _limited(op.size, op, [records.data])


_GETXATTR_OUT = struct.Struct("=" + _HEAD + Codec("fuse_getxattr_out").format)


def _xattr_value(op: ops.GetXattr | ops.ListXattr, value: bytes) -> Message:
    if op.size == 0:
        return _GETXATTR_OUT.pack(_GETXATTR_OUT.size, 0, op.unique, len(value))
    if len(value) > op.size:
        raise FuseError(errno.ERANGE)
    return _pack_head(_head_size + len(value), 0, op.unique) + value


def _xattr_names(op: ops.ListXattr, names: list[bytes]) -> Message:
    return _xattr_value(op, b"".join(name + b"\0" for name in names))


def _ioctl_out() -> Encoder:
    codec = Codec("fuse_ioctl_out")

    def encode(op: ops.Ioctl, reply: IoctlResult) -> Message:
        return _limited(codec.size + op.out_size, op, [codec.pack(reply.result, 0, 0, 0), reply.data])

    return encode


def _status(s: FileSystemStatus) -> tuple[int, ...]:
    return (s.blocks, s.free, s.available, s.files, s.files_free, s.block_size, s.name_max, s.block_size)


def _opened(o: OpenedFile) -> tuple[int, ...]:
    return (o.fh, o.flags, o.backing_id)


def _lock(lock: FileLock) -> tuple[int, ...]:
    return (lock.start, lock.end, lock.type, lock.pid)


def _one(value: int) -> tuple[int, ...]:
    return (value,)


_entry = _entry_out()
_attr = _attr_out()
_new_file = _created()
_open = _packed("fuse_open_out", [], _opened)
_count = _packed("fuse_write_out", [], _one)
_offset = _packed("fuse_lseek_out", [], _one)
_bytes_copied = _packed("fuse_copy_file_range_out", [], _one)

_ENOSYS = errno.ENOSYS
_lock_decoder = _fixed(ops.GetLock, "fuse_lk_in")

_ROWS: dict[Opcode, tuple[type[ops.Op], str, Decoder, Any, int, bool]] = {
    # The opcode: op type, method, decoder, encoder, default errno, interruptible
    Opcode.LOOKUP: (ops.LookUpInode, "look_up_inode", _named(ops.LookUpInode), _entry, errno.ENOENT, True),
    Opcode.FORGET: (ops.ForgetInode, "forget_inode", _fixed(ops.ForgetInode, "fuse_forget_in"), None, 0, False),
    Opcode.GETATTR: (
        ops.GetInodeAttributes,
        "get_inode_attributes",
        _fixed(ops.GetInodeAttributes, "fuse_getattr_in"),
        _attr,
        errno.EIO,
        True,
    ),
    Opcode.SETATTR: (ops.SetInodeAttributes, "set_inode_attributes", _set_attributes(), _attr, errno.EROFS, False),
    Opcode.READLINK: (ops.ReadSymlink, "read_symlink", _plain(ops.ReadSymlink), _target, errno.EINVAL, True),
    Opcode.SYMLINK: (ops.CreateSymlink, "create_symlink", _symlink, _entry, errno.EPERM, False),
    Opcode.MKNOD: (
        ops.MkNode,
        "mk_node",
        _fixed_and_name(ops.MkNode, "fuse_mknod_in", extended=True),
        _entry,
        errno.EPERM,
        False,
    ),
    Opcode.MKDIR: (
        ops.MkDir,
        "mk_dir",
        _fixed_and_name(ops.MkDir, "fuse_mkdir_in", extended=True),
        _entry,
        errno.EROFS,
        False,
    ),
    Opcode.UNLINK: (ops.Unlink, "unlink", _named(ops.Unlink), _nothing, errno.EROFS, False),
    Opcode.RMDIR: (ops.RmDir, "rm_dir", _named(ops.RmDir), _nothing, errno.EROFS, False),
    Opcode.RENAME: (ops.Rename, "rename", _rename("fuse_rename_in"), _nothing, errno.EROFS, False),
    Opcode.RENAME2: (ops.Rename, "rename", _rename("fuse_rename2_in"), _nothing, errno.EROFS, False),
    Opcode.LINK: (
        ops.CreateLink,
        "create_link",
        _fixed_and_name(ops.CreateLink, "fuse_link_in"),
        _entry,
        errno.EPERM,
        False,
    ),
    Opcode.OPEN: (ops.OpenFile, "open_file", _fixed(ops.OpenFile, "fuse_open_in"), _open, _ENOSYS, False),
    Opcode.READ: (ops.ReadFile, "read_file", _fixed(ops.ReadFile, "fuse_read_in"), _read, errno.EINVAL, True),
    Opcode.WRITE: (ops.WriteFile, "write_file", _write(), _count, errno.EROFS, False),
    Opcode.STATFS: (
        ops.StatFs,
        "stat_fs",
        _plain(ops.StatFs),
        _packed("fuse_statfs_out", [], _status),
        errno.EOPNOTSUPP,
        True,
    ),
    Opcode.RELEASE: (
        ops.ReleaseFileHandle,
        "release_file_handle",
        _fixed(ops.ReleaseFileHandle, "fuse_release_in"),
        _nothing,
        0,
        False,
    ),
    Opcode.FSYNC: (ops.SyncFile, "sync_file", _fixed(ops.SyncFile, "fuse_fsync_in"), _nothing, _ENOSYS, False),
    Opcode.SETXATTR: (ops.SetXattr, "set_xattr", _set_xattr, _nothing, _ENOSYS, False),
    Opcode.GETXATTR: (
        ops.GetXattr,
        "get_xattr",
        _fixed_and_name(ops.GetXattr, "fuse_getxattr_in"),
        _xattr_value,
        _ENOSYS,
        True,
    ),
    Opcode.LISTXATTR: (
        ops.ListXattr,
        "list_xattr",
        _fixed(ops.ListXattr, "fuse_getxattr_in"),
        _xattr_names,
        _ENOSYS,
        True,
    ),
    Opcode.REMOVEXATTR: (ops.RemoveXattr, "remove_xattr", _named(ops.RemoveXattr), _nothing, _ENOSYS, False),
    Opcode.FLUSH: (ops.FlushFile, "flush_file", _fixed(ops.FlushFile, "fuse_flush_in"), _nothing, _ENOSYS, False),
    Opcode.INIT: (ops.Init, "", _init, _nothing, errno.EPROTO, False),
    Opcode.OPENDIR: (ops.OpenDir, "open_dir", _fixed(ops.OpenDir, "fuse_open_in"), _open, _ENOSYS, False),
    Opcode.READDIR: (ops.ReadDir, "read_dir", _fixed(ops.ReadDir, "fuse_read_in"), _directory, errno.ENOTDIR, True),
    Opcode.RELEASEDIR: (
        ops.ReleaseDirHandle,
        "release_dir_handle",
        _fixed(ops.ReleaseDirHandle, "fuse_release_in"),
        _nothing,
        0,
        False,
    ),
    Opcode.FSYNCDIR: (ops.SyncDir, "sync_dir", _fixed(ops.SyncDir, "fuse_fsync_in"), _nothing, _ENOSYS, False),
    Opcode.GETLK: (
        ops.GetLock,
        "get_lock",
        _lock_decoder,
        _packed("fuse_lk_out", [], _lock),
        errno.ENOLCK,
        True,
    ),
    Opcode.SETLK: (ops.SetLock, "set_lock", _set_lock(wait=False), _nothing, errno.ENOLCK, False),
    Opcode.SETLKW: (ops.SetLock, "set_lock", _set_lock(wait=True), _nothing, errno.ENOLCK, True),
    Opcode.ACCESS: (ops.Access, "access", _fixed(ops.Access, "fuse_access_in"), _nothing, _ENOSYS, True),
    Opcode.CREATE: (
        ops.CreateFile,
        "create_file",
        _fixed_and_name(ops.CreateFile, "fuse_create_in", extended=True),
        _new_file,
        _ENOSYS,
        False,
    ),
    Opcode.INTERRUPT: (ops.Interrupt, "", _fixed(ops.Interrupt, "fuse_interrupt_in"), None, 0, False),
    Opcode.BMAP: (
        ops.MapBlock,
        "map_block",
        _fixed(ops.MapBlock, "fuse_bmap_in"),
        _packed("fuse_bmap_out", [], _one),
        _ENOSYS,
        True,
    ),
    Opcode.DESTROY: (ops.Destroy, "destroy", _plain(ops.Destroy), _nothing, 0, False),
    Opcode.IOCTL: (ops.Ioctl, "ioctl", _ioctl(), _ioctl_out(), errno.ENOTTY, False),
    Opcode.POLL: (
        ops.Poll,
        "poll",
        _fixed(ops.Poll, "fuse_poll_in"),
        _packed("fuse_poll_out", [], _one),
        _ENOSYS,
        True,
    ),
    Opcode.NOTIFY_REPLY: (ops.NotifyReply, "", _notify_reply(), None, 0, False),
    Opcode.BATCH_FORGET: (ops.BatchForget, "batch_forget", _batch_forget(), None, 0, False),
    Opcode.FALLOCATE: (
        ops.Fallocate,
        "fallocate",
        _fixed(ops.Fallocate, "fuse_fallocate_in"),
        _nothing,
        _ENOSYS,
        False,
    ),
    Opcode.READDIRPLUS: (
        ops.ReadDirPlus,
        "read_dir_plus",
        _fixed(ops.ReadDirPlus, "fuse_read_in"),
        _directory,
        errno.ENOTDIR,
        True,
    ),
    Opcode.LSEEK: (ops.Seek, "seek", _fixed(ops.Seek, "fuse_lseek_in"), _offset, _ENOSYS, True),
    Opcode.COPY_FILE_RANGE: (
        ops.CopyFileRange,
        "copy_file_range",
        _fixed(ops.CopyFileRange, "fuse_copy_file_range_in"),
        _count,
        _ENOSYS,
        False,
    ),
    Opcode.COPY_FILE_RANGE_64: (
        ops.CopyFileRange,
        "copy_file_range",
        _fixed(ops.CopyFileRange, "fuse_copy_file_range_in"),
        _bytes_copied,
        _ENOSYS,
        False,
    ),
    Opcode.SETUPMAPPING: (
        ops.SetupMapping,
        "setup_mapping",
        _fixed(ops.SetupMapping, "fuse_setupmapping_in"),
        _nothing,
        errno.EOPNOTSUPP,
        False,
    ),
    Opcode.REMOVEMAPPING: (
        ops.RemoveMapping,
        "remove_mapping",
        _remove_mapping(),
        _nothing,
        errno.EOPNOTSUPP,
        False,
    ),
    Opcode.SYNCFS: (ops.SyncFs, "sync_fs", _fixed(ops.SyncFs, "fuse_syncfs_in"), _nothing, _ENOSYS, False),
    Opcode.TMPFILE: (
        ops.CreateTmpfile,
        "create_tmpfile",
        _fixed_and_name(ops.CreateTmpfile, "fuse_create_in", extended=True),
        _new_file,
        _ENOSYS,
        False,
    ),
    Opcode.STATX: (ops.StatX, "stat_x", _fixed(ops.StatX, "fuse_statx_in"), _statx_out(), _ENOSYS, True),
}

TABLE: dict[int, Operation] = {int(opcode): Operation(*row) for opcode, row in _ROWS.items()}

SET_XATTR_COMPAT = TABLE[Opcode.SETXATTR]._replace(decode=_set_xattr_compat)
"""SETXATTR without ``InitFlag.SETXATTR_EXT``: its structure has 8 bytes."""

MEMOISED = frozenset(opcode for opcode, row in TABLE.items() if row.default == _ENOSYS)
"""Opcodes whose ENOSYS the kernel remembers for the life of the connection."""
