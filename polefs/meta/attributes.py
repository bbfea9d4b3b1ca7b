"""Attributes: mode, owner, times, extended attributes and ACLs, as bodies of transactions.

Rules: POSIX chmod, chown, utimensat; xattr(7); Linux fs/xattr.c, fs/posix_acl.c (posix_acl_chmod,
posix_acl_update_mode) and fs/attr.c (should_remove_suid).
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Sequence

from msgspec.structs import replace

from polefs.meta import acl
from polefs.meta.errors import error
from polefs.meta.model import (
    INODE_ACCESS_ACL,
    INODE_DEFAULT_ACL,
    INODE_XATTR,
    XATTR_LIST_MAX,
    XATTR_NAME_MAX,
    XATTR_SIZE_MAX,
    Inode,
    SetAttr,
)
from polefs.meta.namespace import existing
from polefs.meta.store.base import Reader, Transaction

XATTR_CREATE = 1
XATTR_REPLACE = 2

_CAPABILITY = b"security.capability"
_PREFIXES = (b"user.", b"trusted.", b"security.")
_TIME_MIN = -(1 << 63)
_TIME_MAX = (1 << 63) - 1
_ACL_FLAGS = {acl.ACCESS: INODE_ACCESS_ACL, acl.DEFAULT: INODE_DEFAULT_ACL}


async def set_attributes(tx: Transaction, ino: int, change: SetAttr) -> Inode:
    inode = await existing(tx, ino)
    is_dir = stat.S_ISDIR(inode.mode)
    changed = replace(inode, ctime=time.time_ns(), attr_version=inode.attr_version + 1)
    if change.mode is not None:
        changed.mode = stat.S_IFMT(inode.mode) | change.mode & 0o7777
    if change.uid is not None:
        changed.uid = change.uid
    if change.gid is not None:
        changed.gid = change.gid
    # Times past what 64 bits of nanoseconds hold become the nearest (kernel: timestamp_truncate).
    if change.atime is not None:
        changed.atime = max(_TIME_MIN, min(change.atime, _TIME_MAX))
    if change.mtime is not None:
        changed.mtime = max(_TIME_MIN, min(change.mtime, _TIME_MAX))
    if change.kill_suidgid and not is_dir:
        changed.mode &= ~stat.S_ISUID
        if changed.mode & stat.S_IXGRP:
            changed.mode &= ~stat.S_ISGID
    access = None
    if change.mode is not None and inode.flags & INODE_ACCESS_ACL:
        access = acl.build(acl.change_mode(await _stored_acl(tx, ino), changed.mode))
    drops_capability = (
        inode.flags & INODE_XATTR
        and not is_dir
        and (change.kill_suidgid or change.uid is not None or change.gid is not None)
        and await tx.xattr(ino, _CAPABILITY) is not None
    )
    tx.put_inode(changed)
    if access is not None:
        await tx.put_xattr(ino, acl.ACCESS, access)
    if drops_capability:
        return await _without_xattr(tx, changed, _CAPABILITY)
    return changed


async def _stored_acl(tx: Reader, ino: int) -> list[acl.Entry]:
    value = await tx.xattr(ino, acl.ACCESS)
    if value is None:
        raise error(errno.EIO)
    return acl.parse(value)


async def touch_atime(tx: Transaction, times: Sequence[tuple[int, int]]) -> None:
    tx.prefetch(inodes=[ino for ino, _ in times])
    for ino, atime in times:
        inode = await tx.inode(ino)
        if inode is not None:
            atime = max(_TIME_MIN, min(atime, _TIME_MAX))
            tx.put_inode(replace(inode, atime=atime, attr_version=inode.attr_version + 1))


# Extended attributes


async def get_xattr(tx: Reader, ino: int, name: bytes) -> bytes:
    tx.prefetch(inodes=(ino,), xattrs=((ino, name),))
    inode = await existing(tx, ino)
    flag = _ACL_FLAGS.get(name, INODE_XATTR)
    value = await tx.xattr(ino, name) if inode.flags & flag else None
    if value is None:
        raise error(errno.ENODATA)
    return value


async def list_xattr(tx: Reader, ino: int) -> list[bytes]:
    tx.prefetch(inodes=(ino,), xattrs=((ino, b""),))
    inode = await existing(tx, ino)
    return await tx.xattr_names(ino) if inode.flags & INODE_XATTR else []


def _check_name(name: bytes) -> None:
    if not 0 < len(name) <= XATTR_NAME_MAX:
        raise error(errno.ERANGE)
    if name in _ACL_FLAGS:
        return
    if name in _PREFIXES or b"\0" in name:
        raise error(errno.EINVAL)
    if not name.startswith(_PREFIXES):
        raise error(errno.EOPNOTSUPP)


async def set_xattr(tx: Transaction, ino: int, name: bytes, value: bytes, flags: int, kill_sgid: bool) -> None:
    _check_name(name)
    if len(value) > XATTR_SIZE_MAX:
        raise error(errno.E2BIG)
    if flags & ~(XATTR_CREATE | XATTR_REPLACE):
        raise error(errno.EINVAL)
    tx.prefetch(inodes=(ino,), xattrs=((ino, name),))
    inode = await existing(tx, ino)
    exists = bool(inode.flags & INODE_XATTR) and await tx.xattr(ino, name) is not None
    if exists and flags & XATTR_CREATE:
        raise error(errno.EEXIST)
    if not exists and flags & XATTR_REPLACE:
        raise error(errno.ENODATA)
    mode = inode.mode
    stored: bytes | None = value
    if name in _ACL_FLAGS:
        mode, stored = _update_mode(inode, name, value, kill_sgid)
    if stored is not None and not exists and inode.flags & INODE_XATTR:
        names = await tx.xattr_names(ino)
        if sum(map(len, names)) + len(names) + len(name) + 1 > XATTR_LIST_MAX:
            raise error(errno.ENOSPC)
    changed = replace(inode, mode=mode, ctime=time.time_ns(), attr_version=inode.attr_version + 1)
    if stored is not None:
        changed.flags |= INODE_XATTR | _ACL_FLAGS.get(name, 0)
        tx.put_inode(changed)
        await tx.put_xattr(ino, name, stored)
    else:
        tx.put_inode(changed)
        if exists:
            await _without_xattr(tx, changed, name)


def _update_mode(inode: Inode, name: bytes, value: bytes, kill_sgid: bool) -> tuple[int, bytes | None]:
    """The mode that setting an ACL leaves behind, and the ACL to store, None for none."""
    if stat.S_ISLNK(inode.mode):
        raise error(errno.EOPNOTSUPP)
    entries = acl.parse(value)
    if not entries:
        return inode.mode, None
    if name == acl.DEFAULT:
        if not stat.S_ISDIR(inode.mode):
            raise error(errno.EACCES)
        return inode.mode, acl.build(entries)
    permissions, exact = acl.equivalent_mode(entries)
    mode = inode.mode & ~0o777 | permissions
    if kill_sgid:
        mode &= ~stat.S_ISGID
    return mode, None if exact else acl.build(entries)


async def remove_xattr(tx: Transaction, ino: int, name: bytes) -> None:
    _check_name(name)
    tx.prefetch(inodes=(ino,), xattrs=((ino, name),))
    inode = await existing(tx, ino)
    if not inode.flags & INODE_XATTR or await tx.xattr(ino, name) is None:
        if name in _ACL_FLAGS:
            # As on ext4 and XFS: without an ACL there is nothing to do (fs/posix_acl.c: vfs_remove_acl).
            return
        raise error(errno.ENODATA)
    changed = replace(inode, ctime=time.time_ns(), attr_version=inode.attr_version + 1)
    await _without_xattr(tx, changed, name)


async def _without_xattr(tx: Transaction, inode: Inode, name: bytes) -> Inode:
    """Take an attribute away and keep the flags right; ``inode`` is the row to be written."""
    await tx.delete_xattr(inode.ino, name)
    flags = inode.flags & ~_ACL_FLAGS.get(name, 0)
    if not await tx.xattr_names(inode.ino):
        flags &= ~INODE_XATTR
    changed = replace(inode, flags=flags)
    tx.put_inode(changed)
    return changed
