"""The checker: every kind of damage is found, and repaired where that is possible."""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import pytest

from polefs.data.scrub import check_objects
from polefs.meta import acl
from polefs.meta.check import Kind, check, repair
from polefs.meta.model import ROOT_INO, Extent, Segment
from polefs.meta.rules import Problem
from polefs.objects.base import segment_key
from polefs.objects.directory import DirectoryStore
from tests.unit.meta_helpers import ROOT, Meta, meta

__all__ = ["meta"]

# The inode numbers of ``populate``.
FOLDER, BELOW, FILE, LINKED, SYMLINK, SMALL, ORPHAN, DEEP = range(2, 10)


def populate(meta: Meta) -> None:
    assert meta.mkdir(b"folder").ino == FOLDER
    assert meta.mkdir(b"below", FOLDER).ino == BELOW
    assert meta.file(b"file", FOLDER).ino == FILE
    assert meta.file(b"linked").ino == LINKED
    meta.link(LINKED, b"again", FOLDER)
    assert meta.symlink(b"symlink", b"target").ino == SYMLINK
    assert meta.file(b"small").ino == SMALL
    assert meta.file(b"orphan").ino == ORPHAN
    meta.unlink(b"orphan")
    assert meta.mkdir(b"deep", BELOW).ino == DEEP
    segment = meta.segment(300)
    extents = [Extent(0, 100, segment.id, 0), Extent(100, 100, segment.id, 100), Extent(300, 100, segment.id, 200)]
    meta.commit(FILE, 500, segments=(segment,), extents=extents)
    meta.commit(SMALL, 5, inline=b"small")
    meta.run(meta.service.commit_data([meta.segment(10)], []))
    named = [acl.Entry(acl.USER_OBJ, 7), acl.Entry(acl.USER, 7, 5), acl.Entry(acl.GROUP_OBJ, 7)]
    value = acl.build([*named, acl.Entry(acl.MASK, 7), acl.Entry(acl.OTHER, 0)])
    meta.set_xattr(FOLDER, acl.DEFAULT, value)
    meta.set_xattr(FILE, acl.ACCESS, value)
    meta.set_xattr(FILE, b"user.x", b"1")


DAMAGES: list[tuple[str, set[Kind]]] = [
    ("DELETE FROM inode WHERE ino = 1", {Kind.ROOT}),
    ("UPDATE inode SET mode = 33188 WHERE ino = 1", {Kind.ROOT}),
    ("UPDATE inode SET parent = 2 WHERE ino = 1", {Kind.PARENT}),
    ("DELETE FROM inode WHERE ino = 4", {Kind.DANGLING_NAME, Kind.EXTENT, Kind.XATTR}),
    ("DELETE FROM inode WHERE ino = 2", {Kind.DANGLING_NAME, Kind.XATTR}),
    ("UPDATE dentry SET parent = 5 WHERE name = x'736d616c6c'", {Kind.DANGLING_NAME}),
    ("UPDATE dentry SET parent = 99 WHERE parent = 2", {Kind.DANGLING_NAME}),
    ("UPDATE dentry SET name = x'612f62' WHERE ino = 7", {Kind.BAD_NAME}),
    ("UPDATE dentry SET name = x'2e2e' WHERE ino = 7", {Kind.BAD_NAME}),
    ("UPDATE dentry SET name = x'' WHERE ino = 7", {Kind.BAD_NAME}),
    ("UPDATE dentry SET name = zeroblob(256) WHERE ino = 7", {Kind.BAD_NAME}),
    ("INSERT INTO dentry VALUES (3, x'72', 1, 16384, 900)", {Kind.ROOT}),
    ("INSERT INTO dentry VALUES (1, x'72', 3, 16384, 900)", {Kind.DIRECTORY_LINKED_TWICE}),
    ("INSERT INTO dentry VALUES (9, x'72', 2, 16384, 900)", {Kind.DIRECTORY_LINKED_TWICE}),
    ("UPDATE dentry SET kind = 16384 WHERE ino = 7", {Kind.WRONG_KIND}),
    ("UPDATE dentry SET kind = 32768 WHERE ino = 3", {Kind.WRONG_KIND}),
    ("UPDATE dentry SET cookie = 5 WHERE parent = 1", {Kind.COOKIE}),
    ("DELETE FROM dentry WHERE ino = 2", {Kind.UNREACHABLE}),
    ("UPDATE dentry SET parent = 9 WHERE ino = 2", {Kind.UNREACHABLE}),
    ("UPDATE dentry SET parent = 2 WHERE ino = 2", {Kind.UNREACHABLE}),
    ("DELETE FROM dentry WHERE ino = 7", {Kind.LOST}),
    ("DELETE FROM dentry WHERE ino = 5", {Kind.LOST}),
    ("UPDATE inode SET parent = 9 WHERE ino = 3", {Kind.PARENT}),
    ("UPDATE inode SET nlink = 7 WHERE ino IN (1, 2, 5)", {Kind.NLINK}),
    ("UPDATE inode SET nlink = 0 WHERE ino = 7", {Kind.NLINK, Kind.ORPHAN}),
    ("UPDATE inode SET nlink = 0 WHERE ino = 2", {Kind.NLINK, Kind.ORPHAN}),
    ("UPDATE inode SET nlink = 1 WHERE ino = 8", {Kind.NLINK, Kind.ORPHAN}),
    ("DELETE FROM orphan", {Kind.ORPHAN}),
    ("UPDATE orphan SET ino = 99", {Kind.ORPHAN}),
    ("INSERT INTO orphan VALUES (7, 1)", {Kind.ORPHAN}),
    ("UPDATE inode SET flags = flags | 8 WHERE ino = 7", {Kind.ORPHAN}),
    ("INSERT INTO symlink VALUES (7, x'61')", {Kind.SYMLINK}),
    ("UPDATE inode SET size = 1 WHERE ino = 6", {Kind.SYMLINK}),
    ("INSERT INTO xattr VALUES (99, x'61', x'62')", {Kind.XATTR}),
    ("INSERT INTO xattr VALUES (7, x'61', x'62')", {Kind.XATTR}),
    ("UPDATE inode SET flags = 0 WHERE ino IN (2, 4)", {Kind.XATTR}),
    ("UPDATE xattr SET value = x'00'", {Kind.XATTR}),
    ("UPDATE extent SET segment = 99 WHERE offset = 100", {Kind.EXTENT}),
    ("UPDATE extent SET segment_offset = 250 WHERE offset = 100", {Kind.EXTENT}),
    ("UPDATE extent SET length = 0 WHERE offset = 100", {Kind.EXTENT}),
    ("UPDATE extent SET length = 150 WHERE offset = 0", {Kind.EXTENT}),
    ("UPDATE extent SET length = 300, segment_offset = 0 WHERE offset = 300", {Kind.EXTENT}),
    ("UPDATE extent SET offset = 600 WHERE offset = 300", {Kind.EXTENT}),
    ("INSERT INTO extent VALUES (3, 0, 10, 1, 0)", {Kind.EXTENT}),
    ("INSERT INTO extent VALUES (7, 0, 5, 1, 0)", {Kind.INLINE}),
    ("UPDATE inode SET inline = zeroblob(10) WHERE ino = 7", {Kind.INLINE}),
    ("UPDATE inode SET inline = x'00' WHERE ino = 3", {Kind.INLINE}),
    ("UPDATE inode SET allocated = 5 WHERE ino IN (3, 4)", {Kind.ALLOCATED}),
    ("UPDATE segment SET live = 5 WHERE live > 0", {Kind.LIVE}),
    ("UPDATE segment SET live = 0", {Kind.LIVE}),
    ("DELETE FROM segment WHERE live = 0", {Kind.DELETION}),
    ("DELETE FROM deletion", {Kind.DELETION}),
    ("INSERT INTO deletion SELECT id, 0 FROM segment WHERE live > 0", {Kind.DELETION}),
    ("UPDATE volume SET next_ino = 4, next_cookie = 1, next_segment = 1", {Kind.COUNTER}),
    ("DELETE FROM inode; DELETE FROM orphan", {Kind.ROOT, Kind.DANGLING_NAME}),
    ("DELETE FROM dentry", {Kind.LOST, Kind.UNREACHABLE}),
]


def damage(meta: Meta, statements: str) -> None:
    with meta.store.repairing() as execute:
        for statement in statements.split(";"):
            execute(statement)


def kinds(meta: Meta) -> set[Kind]:
    return {problem.kind for problem in check(meta.store)}


@pytest.mark.parametrize(("statements", "expected"), DAMAGES)
def test_damage_is_found_and_repaired(tmp_path: Path, statements: str, expected: set[Kind]) -> None:
    meta = Meta(tmp_path)
    try:
        populate(meta)
        meta.assert_clean()
        damage(meta, statements)
        problems = list(check(meta.store))
        assert expected <= {problem.kind for problem in problems}, problems
        assert all(problem.repairable and not problem.harmless for problem in problems)
        repair(meta.store)
        meta.assert_clean()
        meta.reopen()
        meta.assert_clean()
        meta.file(b"new")
        meta.mkdir(b"new folder")
        meta.assert_clean()
    finally:
        meta.close()


def test_repairing_a_sound_volume_changes_nothing(meta: Meta) -> None:
    populate(meta)
    before = [list(meta.store.rows(f"SELECT * FROM {table}")) for table in ("inode", "dentry", "extent", "segment")]
    repair(meta.store)
    after = [list(meta.store.rows(f"SELECT * FROM {table}")) for table in ("inode", "dentry", "extent", "segment")]
    for one, two in zip(before, after, strict=True):
        assert one == two


def test_lost_and_found(meta: Meta) -> None:
    populate(meta)
    meta.file(b"lost+found")
    damage(meta, "DELETE FROM dentry WHERE ino IN (2, 7)")
    repair(meta.store)
    home = meta.lookup(b"lost+found_")
    assert home.mode == 0o040700
    assert meta.names(home.ino) == [b"#2", b"#7"]
    assert meta.lookup(b"#2", home.ino).parent == home.ino
    assert meta.names(FOLDER) == [b"again", b"below", b"file"]
    damage(meta, "DELETE FROM dentry WHERE ino = 6")
    repair(meta.store)
    assert meta.names(home.ino) == [b"#2", b"#6", b"#7"]


def test_a_ring_is_opened_at_one_place(meta: Meta) -> None:
    populate(meta)
    damage(meta, "UPDATE dentry SET parent = 9 WHERE ino = 2")
    assert {problem.number for problem in check(meta.store) if problem.kind == Kind.UNREACHABLE} == {2, 3, 9}
    repair(meta.store)
    home = meta.lookup(b"lost+found")
    assert meta.names(home.ino) == [b"#2"]
    assert meta.lookup(b"deep", BELOW).ino == DEEP


def test_what_cannot_be_repaired_is_told(tmp_path: Path) -> None:
    meta = Meta(tmp_path)
    populate(meta)
    damage(meta, "DELETE FROM symlink; UPDATE inode SET mode = 493 WHERE ino = 7; UPDATE segment SET frames = x'c1'")
    repair(meta.store)
    left = list(check(meta.store))
    assert {problem.kind for problem in left} == {Kind.SYMLINK, Kind.BAD_INODE, Kind.SEGMENT}
    assert not any(problem.repairable for problem in left)
    meta.close()


def test_wrong_counters_of_a_clean_end(tmp_path: Path) -> None:
    meta = Meta(tmp_path)
    populate(meta)
    meta.store._usage.bytes += 5
    assert kinds(meta) == {Kind.USAGE}
    repair(meta.store)
    meta.assert_clean()
    meta.close()


class Objects:
    """A volume with two segments and their objects."""

    def __init__(self, meta: Meta, path: Path) -> None:
        path.mkdir()
        self.meta = meta
        self.path = path
        self.store = DirectoryStore(str(path))
        self.content = {}
        for name in (b"1", b"2"):
            ino = meta.file(name).ino
            runs = (b"a" * 100, b"b" * 50)
            segment = Segment(
                meta.segment().id, 150, tuple((len(run), len(run), google_crc32c.value(run)) for run in runs)
            )
            self.content[segment.id] = b"".join(runs)
            meta.run(self.store.put(segment_key(segment.id), runs))
            meta.commit(ino, 150, segments=(segment,), extents=[Extent(0, 150, segment.id, 0)])

    def problems(self, *, data: bool = True, repair: bool = False) -> list[Problem]:
        async def collect() -> list[Problem]:
            return [problem async for problem in check_objects(self.meta.store, self.store, data=data, repair=repair)]

        return self.meta.run(collect())

    def file(self, segment: int) -> Path:
        return self.path / segment_key(segment)


def test_objects(meta: Meta, tmp_path: Path) -> None:
    objects = Objects(meta, tmp_path / "objects")
    one, two = objects.content
    assert objects.problems() == []
    content = bytearray(objects.content[one])
    content[120] ^= 1
    objects.file(one).chmod(0o600)
    objects.file(one).write_bytes(content)
    assert objects.problems(data=False) == []
    (problem,) = objects.problems()
    assert problem.number == one and "50 bytes at 100" in problem.text and not problem.repairable
    objects.file(one).write_bytes(content[:-1])
    objects.file(two).unlink()
    assert [problem.number for problem in objects.problems(data=False)] == [one, two]
    assert all(problem.kind == Kind.OBJECT for problem in objects.problems())
    meta.run(objects.store.close())


def test_garbage_objects(meta: Meta, tmp_path: Path) -> None:
    objects = Objects(meta, tmp_path / "objects")
    meta.run(objects.store.put(segment_key(999), [b"x"]))
    meta.run(objects.store.put("segments/odd/name", [b"x"]))
    for repairing in (False, True):
        found = objects.problems(repair=repairing)
        assert [problem.kind for problem in found] == [Kind.GARBAGE] * 2
        assert all(problem.harmless and problem.repairable for problem in found)
    assert objects.problems() == []
    meta.unlink(b"1")
    meta.release(meta.get(2).ino)
    (dead,) = meta.dead()
    meta.run(objects.store.delete([segment_key(dead)]))
    assert objects.problems() == []
    meta.run(objects.store.close())


def test_check_sees_the_root_of_a_new_volume(meta: Meta) -> None:
    assert kinds(meta) == set()
    assert meta.run(meta.service.make_unnamed(ROOT, ROOT_INO, 0o600, 0)).nlink == 0
    assert kinds(meta) == set()
