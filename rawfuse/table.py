"""The protocol in one table: for each opcode how a request is decoded, which method of ``FileSystem`` serves it, how
its result is encoded, what is answered when an author left the method out, and whether an INTERRUPT cancels it.

The default errno is chosen per opcode, because ENOSYS is remembered by the kernel for some (and means success, "not
supported" or another opcode from then on) and shown to the user for the others.
"""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

from rawfuse import decode, encode, ops
from rawfuse.abi import Opcode
from rawfuse.decode import Decoder
from rawfuse.encode import Encoder


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


_ENOSYS = errno.ENOSYS
_lock_decoder = decode.fixed(ops.GetLock, "fuse_lk_in")

_ROWS: dict[Opcode, tuple[type[ops.Op], str, Decoder, Any, int, bool]] = {
    # The opcode: op type, method, decoder, encoder, default errno, interruptible
    Opcode.LOOKUP: (ops.LookUpInode, "look_up_inode", decode.named(ops.LookUpInode), encode.entry, errno.ENOENT, True),
    Opcode.FORGET: (ops.ForgetInode, "forget_inode", decode.fixed(ops.ForgetInode, "fuse_forget_in"), None, 0, False),
    Opcode.GETATTR: (
        ops.GetInodeAttributes,
        "get_inode_attributes",
        decode.fixed(ops.GetInodeAttributes, "fuse_getattr_in"),
        encode.attributes,
        errno.EIO,
        True,
    ),
    Opcode.SETATTR: (
        ops.SetInodeAttributes,
        "set_inode_attributes",
        decode.set_attributes(),
        encode.attributes,
        errno.EROFS,
        False,
    ),
    Opcode.READLINK: (
        ops.ReadSymlink,
        "read_symlink",
        decode.plain(ops.ReadSymlink),
        encode.link_target,
        errno.EINVAL,
        True,
    ),
    Opcode.SYMLINK: (ops.CreateSymlink, "create_symlink", decode.symlink, encode.entry, errno.EPERM, False),
    Opcode.MKNOD: (
        ops.MkNode,
        "mk_node",
        decode.fixed_and_name(ops.MkNode, "fuse_mknod_in", extended=True),
        encode.entry,
        errno.EPERM,
        False,
    ),
    Opcode.MKDIR: (
        ops.MkDir,
        "mk_dir",
        decode.fixed_and_name(ops.MkDir, "fuse_mkdir_in", extended=True),
        encode.entry,
        errno.EROFS,
        False,
    ),
    Opcode.UNLINK: (ops.Unlink, "unlink", decode.named(ops.Unlink), encode.empty, errno.EROFS, False),
    Opcode.RMDIR: (ops.RmDir, "rm_dir", decode.named(ops.RmDir), encode.empty, errno.EROFS, False),
    Opcode.RENAME: (ops.Rename, "rename", decode.rename("fuse_rename_in"), encode.empty, errno.EROFS, False),
    Opcode.RENAME2: (ops.Rename, "rename", decode.rename("fuse_rename2_in"), encode.empty, errno.EROFS, False),
    Opcode.LINK: (
        ops.CreateLink,
        "create_link",
        decode.fixed_and_name(ops.CreateLink, "fuse_link_in"),
        encode.entry,
        errno.EPERM,
        False,
    ),
    Opcode.OPEN: (ops.OpenFile, "open_file", decode.fixed(ops.OpenFile, "fuse_open_in"), encode.opened, _ENOSYS, False),
    Opcode.READ: (
        ops.ReadFile,
        "read_file",
        decode.fixed(ops.ReadFile, "fuse_read_in"),
        encode.read_data,
        errno.EINVAL,
        True,
    ),
    Opcode.WRITE: (ops.WriteFile, "write_file", decode.write(), encode.count, errno.EROFS, False),
    Opcode.STATFS: (
        ops.StatFs,
        "stat_fs",
        decode.plain(ops.StatFs),
        encode.packed("fuse_statfs_out", [], encode.status_values),
        errno.EOPNOTSUPP,
        True,
    ),
    Opcode.RELEASE: (
        ops.ReleaseFileHandle,
        "release_file_handle",
        decode.fixed(ops.ReleaseFileHandle, "fuse_release_in"),
        encode.empty,
        0,
        False,
    ),
    Opcode.FSYNC: (
        ops.SyncFile,
        "sync_file",
        decode.fixed(ops.SyncFile, "fuse_fsync_in"),
        encode.empty,
        _ENOSYS,
        False,
    ),
    Opcode.SETXATTR: (ops.SetXattr, "set_xattr", decode.set_xattr, encode.empty, _ENOSYS, False),
    Opcode.GETXATTR: (
        ops.GetXattr,
        "get_xattr",
        decode.fixed_and_name(ops.GetXattr, "fuse_getxattr_in"),
        encode.xattr_value,
        _ENOSYS,
        True,
    ),
    Opcode.LISTXATTR: (
        ops.ListXattr,
        "list_xattr",
        decode.fixed(ops.ListXattr, "fuse_getxattr_in"),
        encode.xattr_names,
        _ENOSYS,
        True,
    ),
    Opcode.REMOVEXATTR: (ops.RemoveXattr, "remove_xattr", decode.named(ops.RemoveXattr), encode.empty, _ENOSYS, False),
    Opcode.FLUSH: (
        ops.FlushFile,
        "flush_file",
        decode.fixed(ops.FlushFile, "fuse_flush_in"),
        encode.empty,
        _ENOSYS,
        False,
    ),
    Opcode.INIT: (ops.Init, "", decode.init, encode.empty, errno.EPROTO, False),
    Opcode.OPENDIR: (ops.OpenDir, "open_dir", decode.fixed(ops.OpenDir, "fuse_open_in"), encode.opened, _ENOSYS, False),
    Opcode.READDIR: (
        ops.ReadDir,
        "read_dir",
        decode.fixed(ops.ReadDir, "fuse_read_in"),
        encode.directory,
        errno.ENOTDIR,
        True,
    ),
    Opcode.RELEASEDIR: (
        ops.ReleaseDirHandle,
        "release_dir_handle",
        decode.fixed(ops.ReleaseDirHandle, "fuse_release_in"),
        encode.empty,
        0,
        False,
    ),
    Opcode.FSYNCDIR: (
        ops.SyncDir,
        "sync_dir",
        decode.fixed(ops.SyncDir, "fuse_fsync_in"),
        encode.empty,
        _ENOSYS,
        False,
    ),
    Opcode.GETLK: (
        ops.GetLock,
        "get_lock",
        _lock_decoder,
        encode.packed("fuse_lk_out", [], encode.lock_values),
        errno.ENOLCK,
        True,
    ),
    Opcode.SETLK: (ops.SetLock, "set_lock", decode.set_lock(wait=False), encode.empty, errno.ENOLCK, False),
    Opcode.SETLKW: (ops.SetLock, "set_lock", decode.set_lock(wait=True), encode.empty, errno.ENOLCK, True),
    Opcode.ACCESS: (ops.Access, "access", decode.fixed(ops.Access, "fuse_access_in"), encode.empty, _ENOSYS, True),
    Opcode.CREATE: (
        ops.CreateFile,
        "create_file",
        decode.fixed_and_name(ops.CreateFile, "fuse_create_in", extended=True),
        encode.created,
        _ENOSYS,
        False,
    ),
    Opcode.INTERRUPT: (ops.Interrupt, "", decode.fixed(ops.Interrupt, "fuse_interrupt_in"), None, 0, False),
    Opcode.BMAP: (
        ops.MapBlock,
        "map_block",
        decode.fixed(ops.MapBlock, "fuse_bmap_in"),
        encode.packed("fuse_bmap_out", [], encode.one_value),
        _ENOSYS,
        True,
    ),
    Opcode.DESTROY: (ops.Destroy, "destroy", decode.plain(ops.Destroy), encode.empty, 0, False),
    Opcode.IOCTL: (ops.Ioctl, "ioctl", decode.ioctl(), encode.ioctl_result(), errno.ENOTTY, False),
    Opcode.POLL: (
        ops.Poll,
        "poll",
        decode.fixed(ops.Poll, "fuse_poll_in"),
        encode.packed("fuse_poll_out", [], encode.one_value),
        _ENOSYS,
        True,
    ),
    Opcode.NOTIFY_REPLY: (ops.NotifyReply, "", decode.notify_reply(), None, 0, False),
    Opcode.BATCH_FORGET: (
        ops.BatchForget,
        "batch_forget",
        decode.counted(ops.BatchForget, "fuse_batch_forget_in", "fuse_forget_one"),
        None,
        0,
        False,
    ),
    Opcode.FALLOCATE: (
        ops.Fallocate,
        "fallocate",
        decode.fixed(ops.Fallocate, "fuse_fallocate_in"),
        encode.empty,
        _ENOSYS,
        False,
    ),
    Opcode.READDIRPLUS: (
        ops.ReadDirPlus,
        "read_dir_plus",
        decode.fixed(ops.ReadDirPlus, "fuse_read_in"),
        encode.directory,
        errno.ENOTDIR,
        True,
    ),
    Opcode.LSEEK: (ops.Seek, "seek", decode.fixed(ops.Seek, "fuse_lseek_in"), encode.offset, _ENOSYS, True),
    Opcode.COPY_FILE_RANGE: (
        ops.CopyFileRange,
        "copy_file_range",
        decode.fixed(ops.CopyFileRange, "fuse_copy_file_range_in"),
        encode.count,
        _ENOSYS,
        False,
    ),
    Opcode.COPY_FILE_RANGE_64: (
        ops.CopyFileRange,
        "copy_file_range",
        decode.fixed(ops.CopyFileRange, "fuse_copy_file_range_in"),
        encode.bytes_copied,
        _ENOSYS,
        False,
    ),
    Opcode.SETUPMAPPING: (
        ops.SetupMapping,
        "setup_mapping",
        decode.fixed(ops.SetupMapping, "fuse_setupmapping_in"),
        encode.empty,
        errno.EOPNOTSUPP,
        False,
    ),
    Opcode.REMOVEMAPPING: (
        ops.RemoveMapping,
        "remove_mapping",
        decode.counted(ops.RemoveMapping, "fuse_removemapping_in", "fuse_removemapping_one"),
        encode.empty,
        errno.EOPNOTSUPP,
        False,
    ),
    Opcode.SYNCFS: (ops.SyncFs, "sync_fs", decode.fixed(ops.SyncFs, "fuse_syncfs_in"), encode.empty, _ENOSYS, False),
    Opcode.TMPFILE: (
        ops.CreateTmpfile,
        "create_tmpfile",
        decode.fixed_and_name(ops.CreateTmpfile, "fuse_create_in", extended=True),
        encode.created,
        _ENOSYS,
        False,
    ),
    Opcode.STATX: (ops.StatX, "stat_x", decode.fixed(ops.StatX, "fuse_statx_in"), encode.statx(), _ENOSYS, True),
}

TABLE: dict[int, Operation] = {int(opcode): Operation(*row) for opcode, row in _ROWS.items()}

SET_XATTR_COMPAT = TABLE[Opcode.SETXATTR]._replace(decode=decode.set_xattr_compat)
"""SETXATTR without ``InitFlag.SETXATTR_EXT``: its structure has 8 bytes."""

MEMOISED = frozenset(opcode for opcode, row in TABLE.items() if row.default == _ENOSYS)
"""Opcodes whose ENOSYS the kernel remembers for the life of the connection."""
