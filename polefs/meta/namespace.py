"""Names: look-up, making, linking, removing and renaming, as bodies of transactions.

Rules: POSIX open, mkdir, mknod, symlink, link, unlink, rmdir, rename; Linux fs/namei.c for what POSIX leaves open and
for the order of errors. Every body checks all it can refuse before it changes anything.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Sequence

from msgspec.structs import replace

from polefs.meta import acl
from polefs.meta.api import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from polefs.meta.errors import error
from polefs.meta.model import (
    DIRECTORY_SIZE,
    INODE_ACCESS_ACL,
    INODE_DEFAULT_ACL,
    INODE_UNNAMED,
    INODE_XATTR,
    LINK_MAX,
    NAME_MAX,
    PATH_MAX,
    ROOT_INO,
    Caller,
    Dentry,
    Inode,
)
from polefs.meta.store.base import Reader, Transaction

_DOTS = (b".", b"..")
_FORMAT_MASK = 0o170000
_DIR = stat.S_IFDIR
_REG = stat.S_IFREG
_LNK = stat.S_IFLNK
_KINDS = frozenset((_REG, _DIR, _LNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK))
_WHITEOUT_MODE = stat.S_IFCHR


def check_name(name: bytes) -> None:
    """ENAMETOOLONG; EINVAL for a name that no directory can hold."""
    if len(name) > NAME_MAX:
        raise error(errno.ENAMETOOLONG)
    if not name or b"/" in name or b"\0" in name:
        raise error(errno.EINVAL)


async def existing(tx: Reader, ino: int) -> Inode:
    """The inode, or ENOENT."""
    inode = await tx.inode(ino)
    if inode is None:
        raise error(errno.ENOENT)
    return inode


async def directory(tx: Reader, ino: int) -> Inode:
    """The directory, or ENOENT, ENOTDIR."""
    inode = await existing(tx, ino)
    if inode.mode & _FORMAT_MASK != _DIR:
        raise error(errno.ENOTDIR)
    return inode


async def living_directory(tx: Reader, ino: int) -> Inode:
    """As ``directory``, and ENOENT for one that has been removed: it takes no names any more."""
    inode = await directory(tx, ino)
    if inode.nlink == 0:
        raise error(errno.ENOENT)
    return inode


async def entry(tx: Reader, parent: int, name: bytes) -> Inode:
    """The inode behind a name, or ENOENT."""
    ino = await tx.dentry(parent, name)
    if not ino:
        raise error(errno.ENOENT)
    inode = await tx.inode(ino)
    if inode is None:
        raise error(errno.EIO)
    return inode


# Reading


async def lookup(tx: Reader, parent: int, name: bytes) -> Inode:
    tx.prefetch(inodes=(parent,), names=((parent, name),))
    found = await directory(tx, parent)
    if name in _DOTS:
        return found if name == b"." else await existing(tx, found.parent)
    check_name(name)
    return await entry(tx, parent, name)


async def list_dir(tx: Reader, ino: int, after: int, limit: int) -> list[Dentry]:
    await directory(tx, ino)
    return await tx.dentries(ino, after, limit)


async def list_dir_plus(tx: Reader, ino: int, after: int, limit: int) -> list[tuple[Dentry, Inode]]:
    await directory(tx, ino)
    return await tx.dentries_plus(ino, after, limit)


async def read_link(tx: Reader, ino: int) -> bytes:
    tx.prefetch(inodes=(ino,), symlinks=(ino,))
    inode = await existing(tx, ino)
    if inode.mode & _FORMAT_MASK != _LNK:
        raise error(errno.EINVAL)
    target = await tx.symlink(ino)
    if target is None:
        raise error(errno.EIO)
    return target


# Making


async def make_node(
    tx: Transaction, caller: Caller, parent: int, name: bytes, mode: int, umask: int, rdev: int, target: bytes | None
) -> Inode:
    kind = mode & _FORMAT_MASK
    if name in _DOTS:
        raise error(errno.EEXIST)
    check_name(name)
    if kind not in _KINDS or (kind == _LNK) != (target is not None):
        raise error(errno.EINVAL)
    if target is not None:
        if not target:
            raise error(errno.ENOENT)
        if len(target) >= PATH_MAX:
            raise error(errno.ENAMETOOLONG)
    tx.prefetch(inodes=(parent,), names=((parent, name),))
    above = await living_directory(tx, parent)
    if kind == _DIR and above.nlink >= LINK_MAX:
        raise error(errno.EEXIST if await tx.dentry(parent, name) else errno.EMLINK)
    if inodes_full(tx):
        raise error(errno.EEXIST if await tx.dentry(parent, name) else errno.ENOSPC)
    inode, acls = await _new_inode(tx, caller, above, mode, umask)
    if kind == _DIR:
        inode.nlink = 2
        inode.size = DIRECTORY_SIZE
    elif kind == _LNK:
        assert target is not None
        inode.size = len(target)
    elif kind == stat.S_IFCHR or kind == stat.S_IFBLK:
        inode.rdev = rdev
    # The insertion is the check for an existing name, and the first change.
    if not await tx.add_dentry(parent, name, inode.ino, kind):
        raise error(errno.EEXIST)
    now = inode.ctime
    tx.put_inode(inode)
    put_changed_directory(tx, above, now, kind == _DIR)
    tx.add_usage(0, 1)
    if target is not None:
        await tx.add_symlink(inode.ino, target)
    for key, value in acls:
        await tx.put_xattr(inode.ino, key, value)
    return inode


async def make_unnamed(tx: Transaction, caller: Caller, parent: int, mode: int, umask: int) -> Inode:
    above = await living_directory(tx, parent)
    if inodes_full(tx):
        raise error(errno.ENOSPC)
    inode, acls = await _new_inode(tx, caller, above, _REG | mode & 0o7777, umask)
    inode.nlink = 0
    inode.flags |= INODE_UNNAMED
    tx.put_inode(inode)
    tx.add_usage(0, 1)
    await tx.add_orphan(inode.ino, tx.session.id)
    for key, value in acls:
        await tx.put_xattr(inode.ino, key, value)
    return inode


def inodes_full(tx: Reader) -> bool:
    usage = tx.usage()
    return 0 < usage.inodes_limit <= usage.inodes


async def _new_inode(
    tx: Transaction, caller: Caller, above: Inode, mode: int, umask: int
) -> tuple[Inode, Sequence[tuple[bytes, bytes]]]:
    """The row of a new inode in a directory, and the ACLs that go with it."""
    gid = caller.gid
    acls: list[tuple[bytes, bytes]] = []
    flags = 0
    kind = mode & _FORMAT_MASK
    if kind == _LNK:
        mode = _LNK | 0o777
    elif above.flags & INODE_DEFAULT_ACL:
        value = await tx.xattr(above.ino, acl.DEFAULT)
        if value is None:
            raise error(errno.EIO)
        mode, access = acl.inherit(acl.parse(value), mode)
        if access is not None:
            acls.append((acl.ACCESS, acl.build(access)))
            flags |= INODE_XATTR | INODE_ACCESS_ACL
        if kind == _DIR:
            acls.append((acl.DEFAULT, value))
            flags |= INODE_XATTR | INODE_DEFAULT_ACL
    else:
        mode &= ~(umask & 0o777)
    if above.mode & stat.S_ISGID:
        gid = above.gid
        if kind == _DIR:
            mode |= stat.S_ISGID
    now = time.time_ns()
    ino = await tx.allocate_ino()
    return Inode(ino, mode, caller.uid, gid, 1, 0, 0, now, now, now, now, 0, above.ino, 1, 0, None, flags), acls


async def link(tx: Transaction, ino: int, parent: int, name: bytes) -> Inode:
    if name in _DOTS:
        raise error(errno.EEXIST)
    check_name(name)
    tx.prefetch(inodes=(parent, ino), names=((parent, name),))
    above = await living_directory(tx, parent)
    inode = await existing(tx, ino)
    if await tx.dentry(parent, name):
        raise error(errno.EEXIST)
    if inode.mode & _FORMAT_MASK == _DIR:
        raise error(errno.EPERM)
    unnamed = inode.flags & INODE_UNNAMED
    if inode.nlink == 0 and not unnamed:
        raise error(errno.ENOENT)
    if inode.nlink >= LINK_MAX:
        raise error(errno.EMLINK)
    now = time.time_ns()
    await tx.add_dentry(parent, name, ino, inode.mode & _FORMAT_MASK)
    if unnamed:
        await tx.delete_orphan(ino, None)
    changed = replace(
        inode,
        nlink=inode.nlink + 1,
        ctime=now,
        flags=inode.flags & ~INODE_UNNAMED,
        attr_version=inode.attr_version + 1,
    )
    tx.put_inode(changed)
    put_changed_directory(tx, above, now)
    return changed


def put_changed_directory(tx: Transaction, inode: Inode, now: int, subdirectories: int = 0) -> None:
    """Note that the names in a directory have changed, and by how many directories among them."""
    tx.put_inode(
        replace(
            inode,
            mtime=now,
            ctime=now,
            nlink=inode.nlink + subdirectories,
            attr_version=inode.attr_version + 1,
            data_version=inode.data_version + 1,
        )
    )


# Removing


async def _drop_link(tx: Transaction, inode: Inode, now: int) -> Inode:
    """One name less; a directory's is its last."""
    nlink = 0 if inode.mode & _FORMAT_MASK == _DIR else inode.nlink - 1
    changed = replace(inode, nlink=nlink, ctime=now, attr_version=inode.attr_version + 1)
    tx.put_inode(changed)
    if nlink == 0:
        for session in tx.session.holders(inode.ino):
            await tx.add_orphan(inode.ino, session)
    return changed


async def unlink(tx: Transaction, parent: int, name: bytes) -> Inode:
    tx.prefetch(inodes=(parent,), names=((parent, name),))
    above = await directory(tx, parent)
    if name in _DOTS:
        raise error(errno.EISDIR)
    check_name(name)
    inode = await entry(tx, parent, name)
    if inode.mode & _FORMAT_MASK == _DIR:
        raise error(errno.EISDIR)
    now = time.time_ns()
    await tx.delete_dentry(parent, name)
    put_changed_directory(tx, above, now)
    return await _drop_link(tx, inode, now)


async def rmdir(tx: Transaction, parent: int, name: bytes) -> Inode:
    tx.prefetch(inodes=(parent,), names=((parent, name),))
    above = await directory(tx, parent)
    if name == b".":
        raise error(errno.EINVAL)
    if name == b"..":
        raise error(errno.ENOTEMPTY)
    check_name(name)
    inode = await entry(tx, parent, name)
    if inode.mode & _FORMAT_MASK != _DIR:
        raise error(errno.ENOTDIR)
    if not await _has_no_names(tx, inode):
        raise error(errno.ENOTEMPTY)
    now = time.time_ns()
    await tx.delete_dentry(parent, name)
    put_changed_directory(tx, above, now, -1)
    return await _drop_link(tx, inode, now)


async def _has_no_names(tx: Reader, inode: Inode) -> bool:
    return inode.nlink <= 2 and await tx.is_empty(inode.ino)


# Renaming


async def rename(
    tx: Transaction, caller: Caller, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
) -> Inode | None:
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT) or (
        flags & RENAME_EXCHANGE and flags & (RENAME_NOREPLACE | RENAME_WHITEOUT)
    ):
        raise error(errno.EINVAL)
    tx.prefetch(
        inodes=(parent, new_parent),
        names=((parent, name), (new_parent, new_name)),
        ancestors=() if parent == new_parent else (parent, new_parent),
    )
    above = await directory(tx, parent)
    new_above = above if parent == new_parent else await living_directory(tx, new_parent)
    if name in _DOTS:
        raise error(errno.EBUSY)
    if new_name in _DOTS:
        raise error(errno.EEXIST if flags & RENAME_NOREPLACE else errno.EBUSY)
    check_name(name)
    check_name(new_name)
    moved = await entry(tx, parent, name)
    target_ino = await tx.dentry(new_parent, new_name)
    if not target_ino and flags & RENAME_EXCHANGE:
        raise error(errno.ENOENT)
    if target_ino and flags & RENAME_NOREPLACE:
        raise error(errno.EEXIST)
    target = await entry(tx, new_parent, new_name) if target_ino else None
    moved_is_dir = moved.mode & _FORMAT_MASK == _DIR
    target_is_dir = target is not None and target.mode & _FORMAT_MASK == _DIR
    if parent != new_parent:
        if moved_is_dir and await _is_within(tx, new_above, moved.ino):
            raise error(errno.EINVAL)
        if target is not None and target_is_dir and await _is_within(tx, above, target.ino):
            raise error(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY)
    if target is not None and target.ino == moved.ino:
        # Two names of one file: nothing happens (POSIX rename).
        return None
    if parent != new_parent:
        moves_in = moved_is_dir and not target_is_dir
        moves_out = bool(flags & RENAME_EXCHANGE) and target_is_dir and not moved_is_dir
        if (moves_in and new_above.nlink >= LINK_MAX) or (moves_out and above.nlink >= LINK_MAX):
            raise error(errno.EMLINK)
    if flags & RENAME_EXCHANGE:
        assert target is not None
        await _exchange(tx, above, name, moved, new_above, new_name, target)
        return None
    if target is not None:
        if moved_is_dir and not target_is_dir:
            raise error(errno.ENOTDIR)
        if target_is_dir and not moved_is_dir:
            raise error(errno.EISDIR)
        if target_is_dir and not await _has_no_names(tx, target):
            raise error(errno.ENOTEMPTY)
    if flags & RENAME_WHITEOUT and inodes_full(tx):
        raise error(errno.ENOSPC)
    owner = caller if flags & RENAME_WHITEOUT else None
    return await _move(tx, above, name, moved, new_above, new_name, target, owner)


async def _is_within(tx: Reader, inode: Inode, ancestor: int) -> bool:
    """Whether a directory is ``ancestor`` or lies below it."""
    seen = 0
    while inode.ino != ancestor:
        if inode.ino == ROOT_INO:
            return False
        seen += 1
        if seen > LINK_MAX:
            raise error(errno.EIO)
        above = await tx.inode(inode.parent)
        if above is None:
            raise error(errno.EIO)
        inode = above
    return True


async def _move(
    tx: Transaction,
    above: Inode,
    name: bytes,
    moved: Inode,
    new_above: Inode,
    new_name: bytes,
    target: Inode | None,
    whiteout: Caller | None,
) -> Inode | None:
    """``whiteout``: who leaves one behind, if anybody."""
    now = time.time_ns()
    kind = moved.mode & _FORMAT_MASK
    if target is None and whiteout is None:
        await tx.move_dentry(above.ino, name, new_above.ino, new_name, moved.ino)
    elif target is None:
        await tx.add_dentry(new_above.ino, new_name, moved.ino, kind)
    else:
        await tx.set_dentry(new_above.ino, new_name, moved.ino, kind)
    if whiteout is not None:
        gid = above.gid if above.mode & stat.S_ISGID else whiteout.gid
        device = Inode(
            await tx.allocate_ino(), _WHITEOUT_MODE, whiteout.uid, gid, 1, 0, 0, now, now, now, now, 0, above.ino, 1
        )
        tx.put_inode(device)
        tx.add_usage(0, 1)
        await tx.set_dentry(above.ino, name, device.ino, _WHITEOUT_MODE)
    elif target is not None:
        await tx.delete_dentry(above.ino, name)
    _put_moved(tx, moved, new_above.ino, now)
    replaced = None if target is None else await _drop_link(tx, target, now)
    leaving = -1 if kind == _DIR else 0
    arriving = (1 if kind == _DIR else 0) - (1 if target is not None and kind == _DIR else 0)
    _put_both(tx, above, leaving, new_above, arriving, now)
    return replaced


async def _exchange(
    tx: Transaction, above: Inode, name: bytes, moved: Inode, new_above: Inode, new_name: bytes, target: Inode
) -> None:
    now = time.time_ns()
    kind = moved.mode & _FORMAT_MASK
    target_kind = target.mode & _FORMAT_MASK
    await tx.set_dentry(new_above.ino, new_name, moved.ino, kind)
    await tx.set_dentry(above.ino, name, target.ino, target_kind)
    _put_moved(tx, moved, new_above.ino, now)
    _put_moved(tx, target, above.ino, now)
    arriving = (kind == _DIR) - (target_kind == _DIR)
    _put_both(tx, above, -arriving, new_above, arriving, now)


def _put_moved(tx: Transaction, inode: Inode, parent: int, now: int) -> None:
    if inode.mode & _FORMAT_MASK != _DIR:
        parent = inode.parent
    tx.put_inode(replace(inode, parent=parent, ctime=now, attr_version=inode.attr_version + 1))


def _put_both(tx: Transaction, above: Inode, leaving: int, new_above: Inode, arriving: int, now: int) -> None:
    """The two directories of a rename, which may be one."""
    if above.ino == new_above.ino:
        put_changed_directory(tx, above, now, leaving + arriving)
    else:
        put_changed_directory(tx, above, now, leaving)
        put_changed_directory(tx, new_above, now, arriving)
