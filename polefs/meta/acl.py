"""POSIX ACLs: the kernel's binary form (version 2 xattr) and its rules for modes.

Sources: linux/posix_acl_xattr.h for the form; fs/posix_acl.c for ``posix_acl_valid``, ``posix_acl_equiv_mode``,
``posix_acl_create_masq`` and ``__posix_acl_chmod_masq``, whose rules the functions here follow; acl(5).
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ = 0x01
USER = 0x02
GROUP_OBJ = 0x04
GROUP = 0x08
MASK = 0x10
OTHER = 0x20

_VERSION = 2
_UNDEFINED_ID = 0xFFFFFFFF
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")


class Entry(NamedTuple):
    """One line of an ACL; ``id`` means something for USER and GROUP only."""

    tag: int
    perm: int
    id: int = _UNDEFINED_ID


def parse(value: bytes) -> list[Entry]:
    """The entries of an ACL in its binary form; empty when it has none, which stands for "no ACL".

    EINVAL when it is malformed or against the rules, EOPNOTSUPP for another version."""
    if len(value) < _HEADER.size:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if _HEADER.unpack_from(value)[0] != _VERSION:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if (len(value) - _HEADER.size) % _ENTRY.size:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    entries = [
        Entry(tag, perm, number if tag in (USER, GROUP) else _UNDEFINED_ID)
        for tag, perm, number in _ENTRY.iter_unpack(value[_HEADER.size :])
    ]
    if entries and not _valid(entries):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return entries


def build(entries: list[Entry]) -> bytes:
    """The binary form."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _valid(entries: list[Entry]) -> bool:
    """Order: USER_OBJ, USER*, GROUP_OBJ, GROUP*, MASK, OTHER; MASK may be left out without USER and GROUP."""
    expected = USER_OBJ
    needs_mask = False
    for tag, perm, number in entries:
        if perm & ~0o7:
            return False
        if tag == USER_OBJ and expected == USER_OBJ:
            expected = USER
        elif (tag == USER and expected == USER) or (tag == GROUP and expected == GROUP):
            if number == _UNDEFINED_ID:
                return False
            needs_mask = True
        elif tag == GROUP_OBJ and expected == USER:
            expected = GROUP
        elif tag == MASK and expected == GROUP:
            expected = OTHER
        elif tag == OTHER and (expected == OTHER or (expected == GROUP and not needs_mask)):
            expected = 0
        else:
            return False
    return expected == 0


def equivalent_mode(entries: list[Entry]) -> tuple[int, bool]:
    """The nine permission bits that an access ACL shows, and whether they tell all of it."""
    mode = 0
    exact = True
    mask = None
    for tag, perm, _ in entries:
        if tag == USER_OBJ:
            mode |= perm << 6
        elif tag == GROUP_OBJ:
            mode |= perm << 3
        elif tag == OTHER:
            mode |= perm
        else:
            exact = False
            if tag == MASK:
                mask = perm
    if mask is not None:
        mode = mode & ~0o070 | mask << 3
    return mode, exact


def inherit(default: list[Entry], mode: int) -> tuple[int, list[Entry] | None]:
    """What a new inode gets from its directory's default ACL: its mode (``mode`` as asked for, without the umask) and
    its access ACL, None when the mode tells all."""
    group_class = MASK if any(entry.tag == MASK for entry in default) else GROUP_OBJ
    shifts = {USER_OBJ: 6, group_class: 3, OTHER: 0}
    entries = []
    for entry in default:
        shift = shifts.get(entry.tag)
        if shift is not None:
            perm = entry.perm & (mode >> shift)
            mode = mode & ~(0o7 << shift) | perm << shift
            entry = entry._replace(perm=perm)
        entries.append(entry)
    exact = all(entry.tag in (USER_OBJ, GROUP_OBJ, OTHER) for entry in entries)
    return mode, None if exact else entries


def change_mode(entries: list[Entry], mode: int) -> list[Entry]:
    """An access ACL after chmod: the group bits go to the mask, or to the owning group when there is none."""
    group_class = MASK if any(entry.tag == MASK for entry in entries) else GROUP_OBJ
    shifts = {USER_OBJ: 6, group_class: 3, OTHER: 0}
    return [
        entry if (shift := shifts.get(entry.tag)) is None else entry._replace(perm=mode >> shift & 0o7)
        for entry in entries
    ]
