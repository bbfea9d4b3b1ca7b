"""Names: POSIX semantics of the meta service, over SQLite."""

from __future__ import annotations

import stat
from collections.abc import Callable
from errno import (
    EBUSY,
    EEXIST,
    EINVAL,
    EISDIR,
    EMLINK,
    ENAMETOOLONG,
    ENOENT,
    ENOSPC,
    ENOTDIR,
    ENOTEMPTY,
    EPERM,
    EROFS,
)

import pytest

from polefs.meta import namespace
from polefs.meta.api import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from polefs.meta.model import ROOT_INO, Caller
from polefs.meta.service import MetaService
from tests.unit.meta_helpers import ROOT, USER, Meta, each_meta, fails, new_meta

__all__ = ["each_meta", "new_meta"]


def make(meta: Meta, mode: int, name: bytes = b"n", parent: int = ROOT_INO, **more: object) -> object:
    return meta.run(meta.service.make_node(ROOT, parent, name, mode, 0o022, **more))  # type: ignore[arg-type]


def test_a_new_volume_has_an_empty_root(meta: Meta) -> None:
    root = meta.get(ROOT_INO)
    assert root.is_dir and root.nlink == 2 and root.parent == ROOT_INO
    assert meta.names() == []
    assert meta.lookup(b".").ino == ROOT_INO == meta.lookup(b"..").ino


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
def test_make_node_of_each_kind(meta: Meta, kind: int) -> None:
    made = meta.run(meta.service.make_node(USER, ROOT_INO, b"n", kind | 0o6777, 0o027, 0x1234))
    assert stat.S_IFMT(made.mode) == kind
    assert made.mode & 0o7777 == 0o6750
    assert (made.uid, made.gid, made.nlink, made.size) == (1000, 100, 1, 0)
    assert made.rdev == (0x1234 if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
    assert made.atime == made.mtime == made.ctime == made.btime
    assert meta.lookup(b"n") == made == meta.get(made.ino)


def test_symlink(meta: Meta) -> None:
    made = meta.run(meta.service.make_node(USER, ROOT_INO, b"s", stat.S_IFLNK | 0o600, 0o777, 0, b"to/where"))
    assert made.mode == stat.S_IFLNK | 0o777
    assert made.size == 8
    assert meta.run(meta.service.read_link(made.ino)) == b"to/where"
    with fails(EINVAL):
        meta.run(meta.service.read_link(ROOT_INO))
    with fails(ENOENT):
        meta.symlink(b"empty", b"")
    with fails(ENAMETOOLONG):
        meta.symlink(b"long", b"x" * 4096)
    meta.symlink(b"longest", b"x" * 4095)
    with fails(EINVAL):
        make(meta, stat.S_IFLNK | 0o777)
    with fails(EINVAL):
        make(meta, stat.S_IFREG, target=b"x")


def test_making_changes_the_parents_times_only(meta: Meta) -> None:
    parent = meta.mkdir(b"d")
    before = meta.get(parent.ino)
    made = meta.file(b"f", parent.ino)
    after = meta.get(parent.ino)
    assert after.mtime == after.ctime == made.ctime > before.mtime
    assert after.atime == before.atime and after.btime == before.btime
    assert after.attr_version > before.attr_version


def test_a_failed_operation_changes_no_times(meta: Meta) -> None:
    meta.file(b"f")
    before = meta.get(ROOT_INO)
    with fails(EEXIST):
        meta.file(b"f")
    with fails(ENOENT):
        meta.unlink(b"none")
    with fails(ENOENT):
        meta.rename(b"none", b"f")
    assert meta.get(ROOT_INO) == before


@pytest.mark.parametrize(
    ("name", "code"),
    [(b".", EEXIST), (b"..", EEXIST), (b"", EINVAL), (b"a/b", EINVAL), (b"a\0b", EINVAL), (b"x" * 256, ENAMETOOLONG)],
)
def test_names_that_cannot_be_made(meta: Meta, name: bytes, code: int) -> None:
    file = meta.file(b"f")
    with fails(code):
        meta.file(name)
    with fails(code):
        meta.mkdir(name)
    with fails(code):
        meta.link(file.ino, name)
    if name not in (b".", b".."):
        for call in (meta.unlink, meta.rmdir, meta.lookup):
            with fails(code):
                call(name)
        with fails(code):
            meta.rename(b"f", name)
        with fails(code):
            meta.rename(name, b"g")


def test_names_of_any_bytes(meta: Meta) -> None:
    names = [bytes([value]) * 255 for value in range(1, 256) if value != ord("/")]
    for name in names:
        meta.file(name)
    assert meta.names() == sorted(names)
    for name in names:
        assert meta.lookup(name).is_regular


def test_make_node_errors(meta: Meta) -> None:
    file = meta.file(b"f")
    with fails(EEXIST):
        make(meta, stat.S_IFREG, b"f")
    with fails(EEXIST):
        make(meta, stat.S_IFDIR, b"f")
    with fails(ENOTDIR):
        make(meta, stat.S_IFREG, b"n", file.ino)
    with fails(ENOENT):
        make(meta, stat.S_IFREG, b"n", 12345)
    for mode in (0, 0o644, 0o070000, 0o170000):
        with fails(EINVAL):
            make(meta, mode)


def test_set_group_id_directories(meta: Meta) -> None:
    shared = meta.run(meta.service.make_node(Caller(0, 55), ROOT_INO, b"d", 0o042775, 0))
    assert shared.mode & stat.S_ISGID
    file = meta.file(b"f", shared.ino, caller=USER)
    assert (file.uid, file.gid) == (1000, 55) and not file.mode & stat.S_ISGID
    below = meta.mkdir(b"sub", shared.ino, caller=USER)
    assert below.gid == 55 and below.mode & stat.S_ISGID
    link = meta.run(meta.service.make_node(USER, shared.ino, b"l", stat.S_IFLNK, 0, 0, b"x"))
    assert link.gid == 55


def test_directories_count_links(meta: Meta) -> None:
    upper = meta.mkdir(b"d")
    assert upper.nlink == 2 and meta.get(ROOT_INO).nlink == 3
    lower = meta.mkdir(b"e", upper.ino)
    assert lower.parent == upper.ino
    assert meta.get(upper.ino).nlink == 3 and meta.get(ROOT_INO).nlink == 3
    assert meta.lookup(b"..", lower.ino).ino == upper.ino
    removed = meta.rmdir(b"e", upper.ino)
    assert removed.nlink == 0
    assert meta.get(upper.ino).nlink == 2


def test_too_many_links(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "LINK_MAX", 4)
    file = meta.file(b"f")
    for number in range(3):
        meta.link(file.ino, b"l%d" % number)
    with fails(EMLINK):
        meta.link(file.ino, b"one too many")
    one, two = meta.mkdir(b"1"), meta.mkdir(b"2")
    with fails(EMLINK):
        meta.mkdir(b"3")
    with fails(EEXIST):
        meta.mkdir(b"1")
    meta.mkdir(b"sub", one.ino)
    with fails(EMLINK):
        meta.rename(b"sub", b"sub", one.ino, ROOT_INO)
    with fails(EMLINK):
        meta.rename(b"f", b"sub", ROOT_INO, one.ino, RENAME_EXCHANGE)
    assert meta.rename(b"sub", b"2", one.ino, ROOT_INO).ino == two.ino  # type: ignore[union-attr]


def test_link(meta: Meta) -> None:
    file = meta.file(b"f")
    folder = meta.mkdir(b"d")
    before = meta.get(folder.ino)
    linked = meta.link(file.ino, b"g", folder.ino)
    assert linked.nlink == 2 and linked.ctime > file.ctime and linked.mtime == file.mtime
    assert meta.get(folder.ino).mtime == meta.get(folder.ino).ctime > before.mtime
    assert meta.lookup(b"f") == meta.lookup(b"g", folder.ino) == linked
    with fails(EEXIST):
        meta.link(file.ino, b"f")
    with fails(EPERM):
        meta.link(folder.ino, b"h")
    with fails(ENOTDIR):
        meta.link(file.ino, b"h", file.ino)
    with fails(ENOENT):
        meta.link(999, b"h")
    symlink = meta.symlink(b"s", b"x")
    assert meta.link(symlink.ino, b"s2").nlink == 2


def test_unlink(meta: Meta) -> None:
    file = meta.file(b"f")
    meta.link(file.ino, b"g")
    left = meta.unlink(b"f")
    assert left.nlink == 1 and left.ctime > file.ctime
    gone = meta.unlink(b"g")
    assert gone.nlink == 0
    assert meta.get(file.ino) == gone
    with fails(ENOENT):
        meta.link(file.ino, b"again")
    with fails(ENOENT):
        meta.lookup(b"g")
    meta.release(file.ino)
    with fails(ENOENT):
        meta.get(file.ino)
    meta.mkdir(b"d")
    with fails(EISDIR):
        meta.unlink(b"d")
    with fails(EISDIR):
        meta.unlink(b".")
    other = meta.file(b"o")
    with fails(ENOTDIR):
        meta.unlink(b"x", other.ino)


def test_release_passes_over_what_has_a_name(meta: Meta) -> None:
    file = meta.file(b"f")
    meta.release(file.ino, 999, ROOT_INO)
    assert meta.lookup(b"f") == file


def test_rmdir(meta: Meta) -> None:
    folder = meta.mkdir(b"d")
    meta.file(b"f", folder.ino)
    with fails(ENOTEMPTY):
        meta.rmdir(b"d")
    with fails(ENOTDIR):
        meta.rmdir(b"f", folder.ino)
    meta.unlink(b"f", folder.ino)
    with fails(EINVAL):
        meta.rmdir(b".", folder.ino)
    with fails(ENOTEMPTY):
        meta.rmdir(b"..", folder.ino)
    assert meta.rmdir(b"d").nlink == 0
    with fails(ENOENT):
        meta.rmdir(b"d")


def test_a_removed_directory_takes_no_names(meta: Meta) -> None:
    folder = meta.mkdir(b"d")
    file = meta.file(b"f")
    meta.rmdir(b"d")
    with fails(ENOENT):
        meta.file(b"x", folder.ino)
    with fails(ENOENT):
        meta.link(file.ino, b"x", folder.ino)
    with fails(ENOENT):
        meta.rename(b"f", b"x", ROOT_INO, folder.ino)
    with fails(ENOENT):
        meta.run(meta.service.make_unnamed(ROOT, folder.ino, 0o600, 0))
    with fails(ENOENT):
        meta.lookup(b"x", folder.ino)
    assert meta.lookup(b".", folder.ino).nlink == 0
    assert meta.names(folder.ino) == []
    meta.release(folder.ino)


def test_unnamed_file(meta: Meta) -> None:
    made = meta.run(meta.service.make_unnamed(USER, ROOT_INO, 0o666, 0o022))
    assert made.nlink == 0 and made.mode == 0o100644 and made.uid == 1000
    assert meta.names() == []
    meta.assert_clean()
    linked = meta.link(made.ino, b"named")
    assert linked.nlink == 1
    meta.release(made.ino)
    assert meta.lookup(b"named") == linked
    meta.unlink(b"named")
    with fails(ENOENT):
        meta.link(made.ino, b"again")


def test_rename_in_one_directory(meta: Meta) -> None:
    file = meta.file(b"f")
    before = meta.get(ROOT_INO)
    assert meta.rename(b"f", b"g") is None
    moved = meta.lookup(b"g")
    assert moved.ino == file.ino and moved.ctime > file.ctime and moved.mtime == file.mtime
    assert meta.get(ROOT_INO).mtime > before.mtime
    assert meta.names() == [b"g"]
    with fails(ENOENT):
        meta.lookup(b"f")


def test_rename_of_a_directory_across_parents(meta: Meta) -> None:
    one, two = meta.mkdir(b"1"), meta.mkdir(b"2")
    moved = meta.mkdir(b"m", one.ino)
    meta.rename(b"m", b"n", one.ino, two.ino)
    assert meta.get(one.ino).nlink == 2 and meta.get(two.ino).nlink == 3
    assert meta.get(one.ino).mtime == meta.get(two.ino).mtime == meta.get(moved.ino).ctime
    assert meta.get(moved.ino).parent == two.ino
    assert meta.lookup(b"..", moved.ino).ino == two.ino


def test_rename_replaces(meta: Meta) -> None:
    one, two = meta.file(b"1"), meta.file(b"2")
    replaced = meta.rename(b"1", b"2")
    assert replaced is not None and replaced.ino == two.ino and replaced.nlink == 0 and replaced.ctime > two.ctime
    assert meta.lookup(b"2").ino == one.ino
    meta.release(two.ino)
    folder, empty = meta.mkdir(b"d"), meta.mkdir(b"e")
    meta.file(b"x", folder.ino)
    replaced = meta.rename(b"d", b"e")
    assert replaced is not None and replaced.ino == empty.ino and replaced.nlink == 0
    assert meta.get(ROOT_INO).nlink == 3
    with fails(ENOTEMPTY):
        meta.mkdir(b"f")
        meta.rename(b"f", b"e")


def test_rename_keeps_the_cookie_of_the_name_replaced(meta: Meta) -> None:
    meta.file(b"1")
    meta.file(b"2")
    cookies = {each.name: each.cookie for each in meta.run(meta.service.list_dir(ROOT_INO, 0, 10))}
    meta.rename(b"1", b"2")
    (left,) = meta.run(meta.service.list_dir(ROOT_INO, 0, 10))
    assert left.cookie == cookies[b"2"]


def test_rename_kinds_must_agree(meta: Meta) -> None:
    meta.file(b"f")
    meta.mkdir(b"d")
    with fails(EISDIR):
        meta.rename(b"f", b"d")
    with fails(ENOTDIR):
        meta.rename(b"d", b"f")


def test_rename_onto_another_name_of_the_same_file_does_nothing(meta: Meta) -> None:
    file = meta.file(b"f")
    linked = meta.link(file.ino, b"g")
    assert meta.rename(b"f", b"g") is None
    assert meta.rename(b"f", b"f") is None
    assert meta.names() == [b"f", b"g"]
    assert meta.get(file.ino) == linked
    with fails(EEXIST):
        meta.rename(b"f", b"g", flags=RENAME_NOREPLACE)


def test_rename_makes_no_rings(meta: Meta) -> None:
    upper = meta.mkdir(b"a")
    middle = meta.mkdir(b"b", upper.ino)
    lower = meta.mkdir(b"c", middle.ino)
    for target in (upper, middle, lower):
        with fails(EINVAL):
            meta.rename(b"a", b"x", ROOT_INO, target.ino)
    with fails(ENOTEMPTY):
        meta.rename(b"c", b"b", middle.ino, upper.ino)
    with fails(ENOTEMPTY):
        meta.rename(b"c", b"a", middle.ino, ROOT_INO)
    for flags in (RENAME_EXCHANGE,):
        with fails(EINVAL):
            meta.rename(b"c", b"a", middle.ino, ROOT_INO, flags)
        with fails(EINVAL):
            meta.rename(b"a", b"c", ROOT_INO, middle.ino, flags)


def test_rename_special_names(meta: Meta) -> None:
    folder = meta.mkdir(b"d")
    meta.file(b"f")
    for name in (b".", b".."):
        with fails(EBUSY):
            meta.rename(name, b"x", folder.ino)
        with fails(EBUSY):
            meta.rename(b"f", name)
        with fails(EEXIST):
            meta.rename(b"f", name, flags=RENAME_NOREPLACE)


def test_rename_noreplace(meta: Meta) -> None:
    meta.file(b"f")
    meta.file(b"g")
    with fails(EEXIST):
        meta.rename(b"f", b"g", flags=RENAME_NOREPLACE)
    assert meta.rename(b"f", b"h", flags=RENAME_NOREPLACE) is None
    assert meta.names() == [b"g", b"h"]


@pytest.mark.parametrize("flags", [3, 6, 7, 8, 1 << 20])
def test_rename_contradicting_flags(meta: Meta, flags: int) -> None:
    meta.file(b"f")
    meta.file(b"g")
    with fails(EINVAL):
        meta.rename(b"f", b"g", flags=flags)


def test_exchange(meta: Meta) -> None:
    file, folder = meta.file(b"f"), meta.mkdir(b"d")
    below = meta.mkdir(b"e", folder.ino)
    with fails(ENOENT):
        meta.rename(b"f", b"none", flags=RENAME_EXCHANGE)
    other = meta.mkdir(b"o")
    assert meta.rename(b"f", b"e", ROOT_INO, folder.ino, RENAME_EXCHANGE) is None
    assert meta.lookup(b"f").ino == below.ino and meta.lookup(b"e", folder.ino).ino == file.ino
    assert meta.get(folder.ino).nlink == 2 and meta.get(ROOT_INO).nlink == 5
    assert meta.get(below.ino).parent == ROOT_INO
    assert meta.rename(b"f", b"e", ROOT_INO, folder.ino, RENAME_EXCHANGE) is None
    assert meta.get(folder.ino).nlink == 3 and meta.get(below.ino).parent == folder.ino
    assert meta.rename(b"d", b"o", flags=RENAME_EXCHANGE) is None
    assert meta.lookup(b"o").ino == folder.ino and meta.lookup(b"d").ino == other.ino
    assert meta.get(folder.ino).ctime == meta.get(other.ino).ctime == meta.get(ROOT_INO).mtime


def test_whiteout(meta: Meta) -> None:
    file = meta.file(b"f")
    folder = meta.mkdir(b"d")
    meta.rename(b"f", b"g", ROOT_INO, folder.ino, RENAME_WHITEOUT)
    left = meta.lookup(b"f")
    assert left.mode == stat.S_IFCHR and left.rdev == 0 and left.nlink == 1
    assert meta.lookup(b"g", folder.ino).ino == file.ino
    meta.rename(b"d", b"e", flags=RENAME_WHITEOUT | RENAME_NOREPLACE)
    assert stat.S_ISCHR(meta.lookup(b"d").mode)
    assert meta.get(ROOT_INO).nlink == 3


def test_inode_limit(new_meta: Callable[..., Meta]) -> None:
    meta = new_meta(inodes_limit=3)
    meta.file(b"1")
    two = meta.file(b"2")
    with fails(ENOSPC):
        meta.file(b"3")
    with fails(EEXIST):
        meta.file(b"2")
    with fails(ENOSPC):
        meta.run(meta.service.make_unnamed(ROOT, ROOT_INO, 0o600, 0))
    with fails(ENOSPC):
        meta.rename(b"1", b"9", flags=RENAME_WHITEOUT)
    meta.unlink(b"2")
    with fails(ENOSPC):
        meta.file(b"3")
    meta.release(two.ino)
    meta.file(b"3")
    usage = meta.run(meta.service.usage())
    assert (usage.inodes, usage.inodes_limit, usage.bytes, usage.bytes_limit) == (3, 3, 0, 0)
    meta.assert_clean()
    meta.close()


def test_listing_in_pages_while_names_come_and_go(meta: Meta) -> None:
    names = [b"%d" % number for number in range(100)]
    for name in names:
        meta.file(name)
    seen: list[bytes] = []
    after = 0
    step = 0
    while page := meta.run(meta.service.list_dir(ROOT_INO, after, 7)):
        assert len(page) <= 7
        seen += [dentry.name for dentry in page]
        after = page[-1].cookie
        meta.unlink(b"%d" % step)
        meta.rename(b"%d" % (99 - step), b"%d" % (99 - step))
        step += 1
    assert seen == names[: len(seen)] and len(seen) == 100
    with fails(ENOTDIR):
        meta.run(meta.service.list_dir(meta.lookup(b"50").ino, 0, 10))
    with fails(ENOENT):
        meta.run(meta.service.list_dir(4711, 0, 10))


def test_listing_with_inodes(meta: Meta) -> None:
    for number in range(20):
        meta.file(b"f%d" % number)
    meta.mkdir(b"d")
    for _ in range(2):
        found = meta.run(meta.service.list_dir_plus(ROOT_INO, 0, 100))
        assert [dentry for dentry, _ in found] == meta.run(meta.service.list_dir(ROOT_INO, 0, 100))
        for dentry, inode in found:
            assert inode == meta.lookup(dentry.name)
            assert (dentry.ino, dentry.kind) == (inode.ino, stat.S_IFMT(inode.mode))
        meta.reopen()


def test_a_listing_sees_its_own_turn(meta: Meta) -> None:
    meta.forget_caches()
    made, listed = meta.together(
        meta.service.make_node(ROOT, ROOT_INO, b"f", 0o100644, 0), meta.service.list_dir_plus(ROOT_INO, 0, 10)
    )
    assert [inode for _, inode in listed] == [made]
    assert meta.lookup(b"f") == made


def test_everything_is_there_after_reopening(meta: Meta) -> None:
    folder = meta.mkdir(b"d")
    file = meta.file(b"f", folder.ino)
    meta.symlink(b"s", b"target")
    meta.reopen()
    assert meta.names() == [b"d", b"s"]
    assert meta.lookup(b"f", folder.ino) == file
    assert meta.run(meta.service.read_link(meta.lookup(b"s").ino)) == b"target"


def test_numbers_never_come_back(meta: Meta) -> None:
    inos = set()
    cookies = set()
    for _ in range(3):
        for _ in range(5):
            inos.add(meta.file(b"f").ino)
            cookies.add(meta.run(meta.service.list_dir(ROOT_INO, 0, 10))[0].cookie)
            meta.release(meta.unlink(b"f").ino)
        meta.reopen()
        inos.add(meta.file(b"g").ino)
        cookies.add(meta.run(meta.service.list_dir(ROOT_INO, 0, 10))[0].cookie)
        meta.unlink(b"g")
        meta.crash()
    assert len(inos) == len(cookies) == 18


def test_orphans_go_with_their_session(meta: Meta) -> None:
    kept = meta.file(b"f")
    meta.unlink(b"f")
    unnamed = meta.run(meta.service.make_unnamed(ROOT, ROOT_INO, 0o600, 0))
    meta.assert_clean()
    meta.crash()
    for ino in (kept.ino, unnamed.ino):
        with fails(ENOENT):
            meta.get(ino)
    folder = meta.mkdir(b"d")
    meta.rmdir(b"d")
    meta.reopen()
    with fails(ENOENT):
        meta.get(folder.ino)
    assert meta.run(meta.service.usage()).inodes == 1


def test_read_only(meta: Meta) -> None:
    file = meta.file(b"f")
    meta.reopen()
    service = MetaService(meta.open_read_only())
    meta.run(service.start())
    assert meta.run(service.lookup(ROOT_INO, b"f")) == file
    assert len(meta.run(service.list_dir_plus(ROOT_INO, 0, 10))) == 1
    for operation in (
        service.make_node(ROOT, ROOT_INO, b"x", 0o100644, 0),
        service.unlink(ROOT_INO, b"f"),
        service.touch_atime([(1, 1)]),
        service.allocate_segments(1),
    ):
        with fails(EROFS):
            meta.run(operation)
    meta.run(service.sync())
    meta.run(service.close())
