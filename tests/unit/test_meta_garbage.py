"""Segments that die, segments that nobody knows, and extents that move from one segment to another."""

from __future__ import annotations

from errno import EEXIST, EINVAL

from polefs.meta.model import FILE_SIZE_MAX, ROOT_INO, Extent, Move, Segment
from tests.unit.meta_helpers import Meta, each_meta, fails, new_meta

__all__ = ["each_meta", "new_meta"]

HOUR = 3600 * 10**9


def full_file(meta: Meta, name: bytes, size: int = 100) -> tuple[int, Segment]:
    ino = meta.file(name).ino
    segment = meta.segment(size)
    meta.commit(ino, size, segments=(segment,), extents=[Extent(0, size, segment.id, 0)])
    return ino, segment


def all_of(meta: Meta, segment: int) -> list[tuple[int, Extent]]:
    return meta.run(meta.service.segment_extents(segment, 1000))


def live(meta: Meta) -> dict[int, int]:
    return {id_: live for id_, _, live in meta.run(meta.service.segment_usage(0, 1000))}


def move(meta: Meta, ino: int, extent: Extent, *, new: Segment | None = None) -> tuple[Segment, int]:
    """The new segment, and how much went there."""
    new = new or meta.segment(extent.length)
    return new, meta.run(meta.service.move_extents([new], [Move(ino, extent, new.id, 0)]))


def test_the_dead_are_kept_for_a_time(meta: Meta) -> None:
    segments = [full_file(meta, b"%d" % number)[1].id for number in range(3)]
    for number in range(3):
        meta.release(meta.unlink(b"%d" % number).ino)
    service = meta.service
    assert meta.run(service.dead_segments(HOUR, 0, 10)) == []
    assert meta.run(service.dead_segments(0, 0, 2)) == segments[:2]
    assert meta.run(service.dead_segments(0, segments[1], 2)) == segments[2:]
    meta.run(service.forget_segments(segments))
    assert meta.run(service.dead_segments(0, 0, 10)) == []
    assert meta.run(service.lost_segments([*segments, 4711])) == [*segments, 4711]


def test_usage_is_told_in_pages(meta: Meta) -> None:
    ids = [full_file(meta, b"%d" % number, 10 + number)[1].id for number in range(5)]
    meta.commit(meta.lookup(b"3").ino, 4)
    found: list[tuple[int, int, int]] = []
    while page := meta.run(meta.service.segment_usage(found[-1][0] if found else 0, 2)):
        found += page
    assert found == [(ids[0], 10, 10), (ids[1], 11, 11), (ids[2], 12, 12), (ids[3], 13, 4), (ids[4], 14, 14)]
    assert meta.run(meta.service.lost_segments([*ids, ids[-1] + 1])) == [ids[-1] + 1]


def test_an_extent_moves_and_nothing_else_changes(meta: Meta) -> None:
    ino, old = full_file(meta, b"f")
    before = meta.get(ino)
    new, moved = move(meta, ino, Extent(0, 100, old.id, 0))
    assert moved == 100
    assert meta.extents(ino) == [(0, 100, new.id, 0)]
    assert meta.get(ino) == before
    assert live(meta) == {old.id: 0, new.id: 100}
    assert meta.dead() == [old.id]
    meta.crash()
    assert meta.extents(ino) == [(0, 100, new.id, 0)]
    assert meta.dead() == [old.id]


def test_what_was_written_meanwhile_stays(meta: Meta) -> None:
    ino, old = full_file(meta, b"f")
    other = meta.segment(10)
    meta.commit(ino, 100, segments=(other,), extents=[Extent(20, 10, other.id, 0)])
    new, moved = move(meta, ino, Extent(0, 100, old.id, 0))
    assert moved == 90
    assert meta.extents(ino) == [(0, 20, new.id, 0), (20, 10, other.id, 0), (30, 70, new.id, 30)]


def test_what_was_cut_off_meanwhile_stays_away(meta: Meta) -> None:
    ino, old = full_file(meta, b"f")
    meta.commit(ino, 40, drops=[(40, FILE_SIZE_MAX)])
    new, moved = move(meta, ino, Extent(0, 100, old.id, 0))
    assert moved == 40
    assert meta.extents(ino) == [(0, 40, new.id, 0)]
    assert meta.get(ino).size == meta.get(ino).allocated == 40


def test_removed_files_do_not_move(meta: Meta) -> None:
    ino, old = full_file(meta, b"f")
    meta.release(meta.unlink(b"f").ino)
    new, moved = move(meta, ino, Extent(0, 100, old.id, 0))
    assert moved == 0
    assert meta.dead() == [old.id, new.id]


def test_a_file_written_anew_is_another(meta: Meta) -> None:
    """At the same offsets, in another segment or at another place of the same one."""
    ino, old = full_file(meta, b"f")
    other = meta.segment(100)
    meta.commit(ino, 100, segments=(other,), extents=[Extent(0, 100, other.id, 0)])
    assert move(meta, ino, Extent(0, 100, old.id, 0))[1] == 0
    assert move(meta, ino, Extent(0, 50, other.id, 50))[1] == 0
    assert meta.extents(ino) == [(0, 100, other.id, 0)]


def test_a_part_of_an_extent_moves(meta: Meta) -> None:
    ino, old = full_file(meta, b"f")
    new, moved = move(meta, ino, Extent(30, 20, old.id, 30))
    assert moved == 20
    assert meta.extents(ino) == [(0, 30, old.id, 0), (30, 20, new.id, 0), (50, 50, old.id, 50)]
    assert live(meta) == {old.id: 80, new.id: 20}


def test_a_clone_made_meanwhile_keeps_the_old_segment(meta: Meta) -> None:
    ino, old = full_file(meta, b"f")
    extents = all_of(meta, old.id)
    copy = meta.file(b"copy").ino
    meta.run(meta.service.clone_range(ino, 10, 80, copy, 5))
    new = meta.segment(100)
    moves = [Move(ino, extent, new.id, 0) for ino, extent in extents]
    assert meta.run(meta.service.move_extents([new], moves)) == 100
    assert meta.extents(copy) == [(5, 80, old.id, 10)]
    assert meta.dead() == []
    assert all_of(meta, old.id) == [(copy, Extent(5, 80, old.id, 10))]
    assert len(all_of(meta, new.id)) == 1


def test_moves_to_a_segment_that_has_died(meta: Meta) -> None:
    """In a later transaction than the one that has added it: its object may be gone."""
    ino, old = full_file(meta, b"f")
    dead = meta.segment(100)
    meta.run(meta.service.move_extents([dead], []))
    assert meta.dead() == [dead.id]
    extent = Extent(0, 100, old.id, 0)
    assert meta.run(meta.service.move_extents([], [Move(ino, extent, dead.id, 0)])) == 0
    meta.run(meta.service.forget_segments([dead.id]))
    assert meta.run(meta.service.move_extents([], [Move(ino, extent, dead.id, 0)])) == 0
    assert meta.extents(ino) == [(0, 100, old.id, 0)]


def test_bad_moves(meta: Meta) -> None:
    ino, old = full_file(meta, b"f")
    extent = Extent(0, 100, old.id, 0)
    with fails(EEXIST):
        move(meta, ino, extent, new=old)
    new = meta.segment(100)
    for bad in (
        Move(ino, Extent(0, 0, old.id, 0), new.id, 0),
        Move(ino, extent, new.id, -1),
        Move(ino, extent, old.id, 0),
    ):
        with fails(EINVAL):
            meta.run(meta.service.move_extents([new], [bad]))
    assert move(meta, ROOT_INO, extent)[1] == 0
    assert meta.run(meta.service.move_extents([], [])) == 0
    assert meta.extents(ino) == [(0, 100, old.id, 0)]
