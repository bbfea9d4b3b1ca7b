"""POSIX access control lists in the kernel's binary form, acl(5): what changes when a mode does, and what new files
inherit (posix_acl.c: posix_acl_create_masq, __posix_acl_chmod_masq)."""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from rawfuse import FuseError

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32

_VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_ORDER = {tag: number for number, tag in enumerate((USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER))}


class AclEntry(NamedTuple):
    """``identity`` counts for USER and GROUP."""

    tag: int
    permissions: int
    identity: int


Acl = list[AclEntry]


def parse(value: bytes) -> Acl:
    """EINVAL for a list that is malformed; an empty one is allowed and means none."""
    if len(value) < _HEADER.size or _HEADER.unpack_from(value) != (_VERSION,):
        raise FuseError(errno.EINVAL)
    body = memoryview(value)[_HEADER.size :]
    if len(body) % _ENTRY.size:
        raise FuseError(errno.EINVAL)
    acl = [AclEntry(*fields) for fields in _ENTRY.iter_unpack(body)]
    if acl and not _valid(acl):
        raise FuseError(errno.EINVAL)
    return acl


def _valid(acl: Acl) -> bool:
    tags = [entry.tag for entry in acl]
    if not all(tag in _ORDER for tag in tags) or any(entry.permissions > 7 for entry in acl):
        return False
    numbers = [_ORDER[tag] for tag in tags]
    named = USER in tags or GROUP in tags
    once = all(tags.count(tag) == 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) and tags.count(MASK) <= 1
    return once and numbers == sorted(numbers) and (MASK in tags or not named)


def pack(acl: Acl) -> bytes:
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in acl)


def is_minimal(acl: Acl) -> bool:
    """Whether the mode alone says it all."""
    return len(acl) <= 3


def permissions(acl: Acl) -> int:
    """The nine mode bits that the list shows as; the group's are those of the mask."""
    bits = {entry.tag: entry.permissions for entry in acl}
    return bits[USER_OBJ] << 6 | bits.get(MASK, bits[GROUP_OBJ]) << 3 | bits[OTHER]


def with_mode(acl: Acl, mode: int) -> Acl:
    """The list after chmod(2): the group's bits go into the mask if there is one."""
    group = MASK if any(entry.tag == MASK for entry in acl) else GROUP_OBJ
    bits = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return [entry._replace(permissions=bits.get(entry.tag, entry.permissions)) for entry in acl]


def inherit(default: Acl, mode: int) -> Acl:
    """The access list of a file that is created with ``mode`` in a directory with this default list."""
    return with_mode(default, permissions(default) & mode)
