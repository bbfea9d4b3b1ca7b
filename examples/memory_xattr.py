"""Extended attributes, xattr(7), with the access control lists among them."""

from __future__ import annotations

import errno
import os
import stat

from examples import memory_acl as acl
from examples.memory_nodes import Node
from rawfuse import FuseError, ops
from rawfuse.abi import SetXattrFlag

_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)
_LIST_MAX = 65536
"""All names together, each with its NUL (linux/limits.h: XATTR_LIST_MAX)."""


def get(node: Node, name: bytes) -> bytes:
    """ENODATA when it is not set; EOPNOTSUPP outside the namespaces."""
    value = node.xattrs.get(name)
    if value is None:
        _check_name(name)
        raise FuseError(errno.ENODATA)
    return value


def list_names(node: Node, uid: int) -> list[bytes]:
    """``trusted.`` names are seen by the privileged alone."""
    return [name for name in node.xattrs if uid == 0 or not name.startswith(b"trusted.")]


def set_value(node: Node, op: ops.SetXattr) -> None:
    """EEXIST and ENODATA for XATTR_CREATE and XATTR_REPLACE; ENOSPC when the names take too much; EINVAL for an access
    control list that is malformed."""
    name, value = op.name, op.value
    _check_name(name)
    if name in _ACLS:
        _set_acl(node, name, value, kill_set_gid=bool(op.setxattr_flags & SetXattrFlag.ACL_KILL_SGID))
    else:
        present = name in node.xattrs
        if present and op.flags & os.XATTR_CREATE:
            raise FuseError(errno.EEXIST)
        if not present and op.flags & os.XATTR_REPLACE:
            raise FuseError(errno.ENODATA)
        if not present and sum(len(one) + 1 for one in node.xattrs) + len(name) + 1 > _LIST_MAX:
            raise FuseError(errno.ENOSPC)
        node.xattrs[name] = value
    node.changed()


def remove(node: Node, name: bytes) -> None:
    """ENODATA when it is not set; removing an access control list that is not there is no error."""
    _check_name(name)
    if node.xattrs.pop(name, None) is None and name not in _ACLS:
        raise FuseError(errno.ENODATA)
    node.changed()


def _check_name(name: bytes) -> None:
    if name in _ACLS:
        return
    for namespace in _NAMESPACES:
        if name.startswith(namespace):
            if name == namespace:
                raise FuseError(errno.EINVAL)
            return
    raise FuseError(errno.EOPNOTSUPP)


def _set_acl(node: Node, name: bytes, value: bytes, *, kill_set_gid: bool) -> None:
    entries = acl.parse(value)
    if name == acl.DEFAULT and not stat.S_ISDIR(node.attr.mode):
        raise FuseError(errno.EACCES)
    if name == acl.ACCESS and entries:
        node.attr.mode = node.attr.mode & ~0o777 | acl.permissions(entries)
        if kill_set_gid:
            node.attr.mode &= ~stat.S_ISGID
    if not entries or (name == acl.ACCESS and acl.is_minimal(entries)):
        node.xattrs.pop(name, None)
    else:
        node.xattrs[name] = value


def mode_changed(node: Node) -> None:
    """After chmod(2): the access control list follows."""
    value = node.xattrs.get(acl.ACCESS)
    if value is not None:
        node.xattrs[acl.ACCESS] = acl.pack(acl.with_mode(acl.parse(value), node.attr.mode))


def inherit(node: Node, parent: Node, umask: int) -> None:
    """Give a new inode its final mode: by the parent's default list, without one by the umask (acl(5), "OBJECT CREATION
    AND DEFAULT ACLs")."""
    default = parent.xattrs.get(acl.DEFAULT)
    mode = node.attr.mode
    if stat.S_ISLNK(mode):
        return
    if default is None:
        node.attr.mode = mode & ~umask
        return
    entries = acl.inherit(acl.parse(default), mode)
    node.attr.mode = mode & ~0o777 | acl.permissions(entries)
    if not acl.is_minimal(entries):
        node.xattrs[acl.ACCESS] = acl.pack(entries)
    if stat.S_ISDIR(mode):
        node.xattrs[acl.DEFAULT] = default
