"""Attributes, extended attributes and ACLs of the meta service."""

from __future__ import annotations

import stat
from errno import E2BIG, EACCES, EEXIST, EINVAL, ENODATA, ENOENT, ENOSPC, EOPNOTSUPP, ERANGE

import pytest

from polefs.meta import acl
from polefs.meta.acl import ACCESS, DEFAULT, GROUP, GROUP_OBJ, MASK, OTHER, USER_OBJ, Entry
from polefs.meta.model import ROOT_INO
from tests.unit.meta_helpers import ROOT, USER, Meta, each_meta, fails, new_meta

__all__ = ["each_meta", "new_meta"]

MINIMAL = [Entry(USER_OBJ, 6), Entry(GROUP_OBJ, 4), Entry(OTHER, 0)]
NAMED = [Entry(USER_OBJ, 7), Entry(acl.USER, 6, 1001), Entry(GROUP_OBJ, 5), Entry(MASK, 7), Entry(OTHER, 1)]


def perms(value: bytes) -> list[int]:
    return [entry.perm for entry in acl.parse(value)]


# Attributes


def test_chmod(meta: Meta) -> None:
    file = meta.file(b"f")
    changed = meta.set(file.ino, mode=0o104755)
    assert changed.mode == 0o104755 and changed.ctime > file.ctime
    assert (changed.mtime, changed.atime, changed.btime) == (file.mtime, file.atime, file.btime)
    assert changed.attr_version > file.attr_version
    assert meta.get(file.ino) == changed
    with fails(ENOENT):
        meta.set(999, mode=0)


def test_a_change_of_type_is_ignored(meta: Meta) -> None:
    assert stat.S_ISREG(meta.set(meta.file(b"f").ino, mode=0o040700).mode)


def test_chown_and_times(meta: Meta) -> None:
    file = meta.file(b"f")
    changed = meta.set(file.ino, uid=5, gid=(1 << 32) - 2, atime=-1, mtime=-5_000_000_000_000_000_001)
    assert (changed.uid, changed.gid) == (5, (1 << 32) - 2)
    assert (changed.atime, changed.mtime) == (-1, -5_000_000_000_000_000_001)
    meta.reopen()
    assert meta.get(file.ino) == changed


def test_times_are_clamped(meta: Meta) -> None:
    file = meta.file(b"f")
    changed = meta.set(file.ino, atime=1 << 80, mtime=-(1 << 80))
    assert (changed.atime, changed.mtime) == ((1 << 63) - 1, -(1 << 63))
    meta.run(meta.service.touch_atime([(file.ino, 1 << 90)]))
    assert meta.get(file.ino).atime == (1 << 63) - 1


@pytest.mark.parametrize(
    ("mode", "left"), [(0o6755, 0o755), (0o6745, 0o2745), (0o2710, 0o710), (0o4644, 0o644), (0o2644, 0o2644)]
)
def test_kill_suidgid(meta: Meta, mode: int, left: int) -> None:
    file = meta.file(b"f", mode=mode)
    assert meta.set(file.ino, kill_suidgid=True).mode == stat.S_IFREG | left
    folder = meta.mkdir(b"d", mode=mode)
    assert meta.set(folder.ino, kill_suidgid=True).mode == stat.S_IFDIR | mode


def test_file_capabilities_go_with_the_owner(meta: Meta) -> None:
    for change in ({"uid": 1}, {"gid": 1}, {"kill_suidgid": True}):
        file = meta.file(b"f")
        meta.set_xattr(file.ino, b"security.capability", b"x")
        meta.set_xattr(file.ino, b"user.other", b"x")
        meta.set(file.ino, mode=0o600)
        assert meta.get_xattr(file.ino, b"security.capability") == b"x"
        meta.set(file.ino, **change)
        assert meta.list_xattr(file.ino) == [b"user.other"]
        meta.unlink(b"f")


def test_touch_atime(meta: Meta) -> None:
    one, two = meta.file(b"1"), meta.file(b"2")
    meta.run(meta.service.touch_atime([(one.ino, 5), (999, 6), (two.ino, 7)]))
    assert meta.get(one.ino).atime == 5 and meta.get(two.ino).atime == 7
    assert meta.get(one.ino).ctime == one.ctime


# Extended attributes


def test_xattr(meta: Meta) -> None:
    file = meta.file(b"f")
    assert meta.list_xattr(file.ino) == []
    with fails(ENODATA):
        meta.get_xattr(file.ino, b"user.a")
    meta.set_xattr(file.ino, b"user.a", b"1")
    assert meta.get(file.ino).ctime > file.ctime
    meta.set_xattr(file.ino, b"trusted.b", b"")
    meta.set_xattr(file.ino, b"security.c", bytes(range(256)))
    assert meta.list_xattr(file.ino) == [b"security.c", b"trusted.b", b"user.a"]
    meta.reopen()
    assert meta.get_xattr(file.ino, b"trusted.b") == b""
    assert meta.get_xattr(file.ino, b"security.c") == bytes(range(256))
    for name in (b"security.c", b"trusted.b", b"user.a"):
        meta.remove_xattr(file.ino, name)
        with fails(ENODATA):
            meta.remove_xattr(file.ino, name)
    assert meta.list_xattr(file.ino) == [] and meta.get(file.ino).flags == 0
    with fails(ENOENT):
        meta.set_xattr(999, b"user.a", b"")
    with fails(ENOENT):
        meta.get_xattr(999, b"user.a")


def test_xattr_flags(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    with fails(ENODATA):
        meta.set_xattr(ino, b"user.a", b"1", 2)
    meta.set_xattr(ino, b"user.a", b"1", 1)
    with fails(EEXIST):
        meta.set_xattr(ino, b"user.a", b"2", 1)
    meta.set_xattr(ino, b"user.a", b"3", 2)
    assert meta.get_xattr(ino, b"user.a") == b"3"
    with fails(EINVAL):
        meta.set_xattr(ino, b"user.a", b"3", 4)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"", ERANGE),
        (b"user." + b"x" * 251, ERANGE),
        (b"user.", EINVAL),
        (b"user.a\0b", EINVAL),
        (b"nothing", EOPNOTSUPP),
        (b"system.other", EOPNOTSUPP),
        (b"btrfs.x", EOPNOTSUPP),
    ],
)
def test_xattr_names(meta: Meta, name: bytes, code: int) -> None:
    with fails(code):
        meta.set_xattr(meta.file(b"f").ino, name, b"")


def test_xattr_limits(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    meta.set_xattr(ino, b"user." + b"n" * 250, b"v" * 65536)
    with fails(E2BIG):
        meta.set_xattr(ino, b"user.big", b"v" * 65537)
    count = 65536 // 256
    for number in range(count - 1):
        meta.set_xattr(ino, b"user.%0250d" % number, b"")
    with fails(ENOSPC):
        meta.set_xattr(ino, b"user.x", b"")
    meta.set_xattr(ino, b"user." + b"n" * 250, b"changed")
    assert sum(len(name) + 1 for name in meta.list_xattr(ino)) == 65536


def test_removed_files_take_their_attributes_with_them(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    meta.set_xattr(ino, b"user.a", b"1")
    meta.unlink(b"f")
    assert meta.get_xattr(ino, b"user.a") == b"1"
    meta.release(ino)
    assert meta.rows("SELECT * FROM xattr") == []


# ACLs


def test_an_access_acl_sets_the_mode(meta: Meta) -> None:
    file = meta.file(b"f", mode=0o2600)
    meta.set_xattr(file.ino, ACCESS, acl.build(NAMED))
    assert meta.get(file.ino).mode == 0o102771
    assert meta.get_xattr(file.ino, ACCESS) == acl.build(NAMED)
    meta.set_xattr(file.ino, ACCESS, acl.build(NAMED), 0, True)
    assert meta.get(file.ino).mode == 0o100771
    assert meta.list_xattr(file.ino) == [ACCESS]


def test_an_acl_that_the_mode_can_tell_is_not_stored(meta: Meta) -> None:
    file = meta.file(b"f")
    meta.set_xattr(file.ino, ACCESS, acl.build(NAMED))
    meta.set_xattr(file.ino, ACCESS, acl.build(MINIMAL))
    assert meta.get(file.ino).mode == 0o100640 and meta.get(file.ino).flags == 0
    with fails(ENODATA):
        meta.get_xattr(file.ino, ACCESS)


def test_chmod_changes_the_mask(meta: Meta) -> None:
    file = meta.file(b"f")
    meta.set_xattr(file.ino, ACCESS, acl.build(NAMED))
    assert meta.set(file.ino, mode=0o640).mode == 0o100640
    assert perms(meta.get_xattr(file.ino, ACCESS)) == [6, 6, 5, 4, 0]


def test_removing_acls(meta: Meta) -> None:
    folder = meta.mkdir(b"d")
    meta.remove_xattr(folder.ino, ACCESS)
    meta.remove_xattr(folder.ino, DEFAULT)
    assert meta.get(folder.ino) == folder
    meta.set_xattr(folder.ino, DEFAULT, acl.build(NAMED))
    meta.set_xattr(folder.ino, ACCESS, acl.build(NAMED))
    meta.remove_xattr(folder.ino, DEFAULT)
    meta.set_xattr(folder.ino, ACCESS, acl.build([]))
    assert meta.list_xattr(folder.ino) == [] and meta.get(folder.ino).mode == 0o040771


def test_where_acls_may_be(meta: Meta) -> None:
    file = meta.file(b"f")
    with fails(EACCES):
        meta.set_xattr(file.ino, DEFAULT, acl.build(NAMED))
    meta.set_xattr(file.ino, DEFAULT, acl.build([]))
    link = meta.symlink(b"s", b"x")
    with fails(EOPNOTSUPP):
        meta.set_xattr(link.ino, ACCESS, acl.build(NAMED))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\2\0\0",
        acl.build(MINIMAL)[:-1],
        acl.build(MINIMAL[:-1]),
        acl.build(MINIMAL[::-1]),
        acl.build([*MINIMAL, Entry(OTHER, 0)]),
        acl.build([entry for entry in NAMED if entry.tag != MASK]),
        acl.build([Entry(USER_OBJ, 8), *MINIMAL[1:]]),
        acl.build([MINIMAL[0], Entry(acl.USER, 7), MINIMAL[1], Entry(MASK, 7), MINIMAL[2]]),
        acl.build([MINIMAL[0], Entry(GROUP, 7, 5), MINIMAL[1], Entry(MASK, 7), MINIMAL[2]]),
        acl.build([*MINIMAL[:2], Entry(0x40, 7), MINIMAL[2]]),
    ],
)
def test_malformed_acls(meta: Meta, value: bytes) -> None:
    folder = meta.mkdir(b"d")
    for name in (ACCESS, DEFAULT):
        with fails(EINVAL):
            meta.set_xattr(folder.ino, name, value)
    assert meta.get(folder.ino) == folder


def test_another_version_of_acls(meta: Meta) -> None:
    with fails(EOPNOTSUPP):
        meta.set_xattr(meta.mkdir(b"d").ino, ACCESS, b"\3" + acl.build(MINIMAL)[1:])


def test_default_acl_inheritance(meta: Meta) -> None:
    folder = meta.mkdir(b"d")
    default = acl.build(
        [Entry(USER_OBJ, 7), Entry(acl.USER, 7, 9), Entry(GROUP_OBJ, 5), Entry(MASK, 7), Entry(OTHER, 5)]
    )
    meta.set_xattr(folder.ino, DEFAULT, default)
    file = meta.run(meta.service.make_node(USER, folder.ino, b"f", 0o100666, 0o077))
    assert file.mode == 0o100664
    assert perms(meta.get_xattr(file.ino, ACCESS)) == [6, 7, 5, 6, 4]
    assert meta.list_xattr(file.ino) == [ACCESS]
    below = meta.run(meta.service.make_node(USER, folder.ino, b"e", 0o040750, 0o077))
    assert below.mode == 0o040750
    assert meta.get_xattr(below.ino, DEFAULT) == default
    assert perms(meta.get_xattr(below.ino, ACCESS)) == [7, 7, 5, 5, 0]
    unnamed = meta.run(meta.service.make_unnamed(USER, folder.ino, 0o606, 0o077))
    assert unnamed.mode == 0o100604
    link = meta.symlink(b"s", b"x", folder.ino)
    assert link.flags == 0


def test_a_minimal_default_acl_stands_for_the_umask(meta: Meta) -> None:
    folder = meta.mkdir(b"d")
    meta.set_xattr(folder.ino, DEFAULT, acl.build([Entry(USER_OBJ, 7), Entry(GROUP_OBJ, 7), Entry(OTHER, 0)]))
    file = meta.run(meta.service.make_node(ROOT, folder.ino, b"f", 0o100666, 0o777))
    assert file.mode == 0o100660 and file.flags == 0
    below = meta.run(meta.service.make_node(ROOT, folder.ino, b"e", 0o040777, 0o777))
    assert below.mode == 0o040770 and meta.list_xattr(below.ino) == [DEFAULT]
    assert meta.get(ROOT_INO).flags == 0
