"""Contents in the meta service: extents against a model of bytes, inline contents, clones, segments and their death."""

from __future__ import annotations

import random
from collections.abc import Callable
from errno import EEXIST, EINVAL, EIO, EISDIR, ENOENT, ENOSPC, EOPNOTSUPP
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polefs.meta import contents
from polefs.meta.model import FILE_SIZE_MAX, ROOT_INO, DataCommit, Extent, Move, Segment
from tests.unit.meta_helpers import Meta, each_meta, examples, fails, new_meta

__all__ = ["each_meta", "new_meta"]


def test_extents_are_split_and_returned_whole(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    one, two = meta.segment(), meta.segment()
    meta.commit(ino, 1000, segments=(one,), extents=[Extent(0, 1000, one.id, 0)])
    meta.commit(ino, 1000, segments=(two,), extents=[Extent(300, 200, two.id, 5)])
    whole = [(0, 300, one.id, 0), (300, 200, two.id, 5), (500, 500, one.id, 500)]
    assert meta.extents(ino) == whole
    assert meta.extents(ino, 299, 300) == whole[:1]
    assert meta.extents(ino, 300, 301) == whole[1:2]
    assert meta.extents(ino, 400, 501) == whole[1:]
    assert meta.extents(ino, 1000, 2000) == []
    assert meta.get(ino).allocated == 1000
    meta.commit(ino, 1000, drops=[(100, 600)])
    assert meta.extents(ino) == [(0, 100, one.id, 0), (600, 400, one.id, 600)]
    assert meta.dead() == [two.id]
    assert meta.get(ino).allocated == 500
    with fails(ENOENT):
        meta.extents(999)


def test_a_hole_is_cut_into_one_extent(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    segment = meta.segment()
    meta.commit(ino, 100, segments=(segment,), extents=[Extent(0, 100, segment.id, 0)])
    meta.commit(ino, 100, drops=[(40, 60)])
    assert meta.extents(ino) == [(0, 40, segment.id, 0), (60, 40, segment.id, 60)]
    meta.commit(ino, 30, drops=[(30, FILE_SIZE_MAX)])
    assert meta.extents(ino) == [(0, 30, segment.id, 0)]
    meta.commit(ino, 20)
    assert meta.extents(ino) == [(0, 20, segment.id, 0)]


def test_times_of_a_commit(meta: Meta) -> None:
    file = meta.file(b"f")
    meta.commit(file.ino, 3, inline=b"abc")
    assert (meta.get(file.ino).mtime, meta.get(file.ino).ctime) == (file.mtime, file.ctime)
    later = file.ctime + 10**12
    meta.commit(file.ino, 3, mtime=later, inline=b"abd")
    assert meta.get(file.ino).mtime == meta.get(file.ino).ctime == later
    meta.commit(file.ino, 3, mtime=5, inline=b"abe")
    assert meta.get(file.ino).mtime == 5 and meta.get(file.ino).ctime == later
    assert meta.get(file.ino).data_version == file.data_version + 3


def test_inline(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    meta.commit(ino, 4096, inline=b"x" * 4096)
    assert meta.get(ino).inline == b"x" * 4096 and meta.get(ino).allocated == 4096
    meta.commit(ino, 4096, drops=[(1, 3)])
    assert meta.get(ino).inline == b"x\0\0" + b"x" * 4093
    meta.commit(ino, 5, drops=[(5, FILE_SIZE_MAX)])
    assert meta.get(ino).inline == b"x\0\0xx"
    meta.commit(ino, 1 << 40)
    assert meta.get(ino).inline == b"x\0\0xx" and meta.get(ino).size == 1 << 40 and meta.get(ino).allocated == 5
    segment = meta.segment()
    meta.commit(ino, 1 << 40, segments=(segment,), extents=[Extent(0, 5000, segment.id, 0)])
    assert meta.get(ino).inline is None and meta.get(ino).allocated == 5000
    meta.commit(ino, 2, inline=b"ab")
    assert meta.extents(ino) == [] and meta.dead() == [segment.id]
    meta.commit(ino, 0, inline=b"")
    assert meta.get(ino).inline is None and meta.get(ino).allocated == 0
    meta.commit(ino, 2, inline=b"ab")
    meta.commit(ino, 2, drops=[(0, FILE_SIZE_MAX)])
    assert meta.get(ino).inline is None
    assert meta.run(meta.service.usage()).bytes == 0


@pytest.mark.parametrize(
    "commit",
    [
        {"size": 4097, "inline": b"x" * 4097},
        {"size": 1, "inline": b"xx"},
        {"size": -1},
        {"size": FILE_SIZE_MAX + 1},
        {"size": 10, "inline": b"x", "extents": [Extent(0, 1, 1, 0)]},
        {"size": 10, "extents": [Extent(0, 0, 1, 0)]},
        {"size": 10, "extents": [Extent(0, 11, 1, 0)]},
        {"size": 10, "extents": [Extent(-1, 5, 1, 0)]},
        {"size": 10, "extents": [Extent(0, 5, 1, -1)]},
        {"size": 10, "extents": [Extent(5, 5, 1, 0), Extent(0, 6, 1, 0)]},
    ],
)
def test_commits_that_make_no_sense(meta: Meta, commit: dict[str, object]) -> None:
    file = meta.file(b"f")
    with fails(EINVAL):
        meta.run(meta.service.commit_data([], [DataCommit(file.ino, mtime=None, **commit)]))  # type: ignore[arg-type]
    assert meta.get(file.ino) == file


def test_commits_of_several_files(meta: Meta) -> None:
    one, two, gone = meta.file(b"1"), meta.file(b"2"), meta.file(b"3")
    meta.release(meta.unlink(b"3").ino)
    segment = meta.segment(300)
    commits = [
        DataCommit(file.ino, 100, 1, extents=[Extent(0, 100, segment.id, 100 * position)])
        for position, file in enumerate((one, two, gone))
    ]
    meta.run(meta.service.commit_data([segment], commits))
    assert meta.extents(two.ino) == [(0, 100, segment.id, 100)]
    assert meta.rows("SELECT live FROM segment") == [(200,)]
    assert meta.run(meta.service.usage()).bytes == 200
    with fails(EEXIST):
        meta.run(meta.service.commit_data([segment], []))
    with fails(EIO):
        meta.commit(one.ino, 10, extents=[Extent(0, 10, segment.id + 999, 0)])
    with fails(EINVAL):
        meta.commit(meta.mkdir(b"d").ino, 0)
    meta.run(meta.service.commit_data([], []))


def test_an_open_unlinked_file_takes_commits(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    meta.unlink(b"f")
    segment = meta.segment()
    meta.commit(ino, 10, segments=(segment,), extents=[Extent(0, 10, segment.id, 0)])
    assert meta.dead() == []
    meta.release(ino)
    assert meta.dead() == [segment.id]


def test_segments_die_and_are_forgotten(meta: Meta) -> None:
    first = meta.run(meta.service.allocate_segments(3))
    assert meta.run(meta.service.allocate_segments(1)) == first + 3
    with fails(EINVAL):
        meta.run(meta.service.allocate_segments(0))
    useless = Segment(first, 10, ((10, 10, 1),))
    meta.run(meta.service.commit_data([useless, Segment(first + 1, 0, ())], []))
    assert meta.dead() == [first, first + 1]
    assert meta.run(meta.service.dead_segments(0, 0, 1)) == [first]
    with fails(EIO):
        meta.commit(meta.file(b"f").ino, 1, extents=[Extent(0, 1, first, 0)])
    meta.run(meta.service.forget_segments([first, first + 1]))
    assert meta.dead() == []
    assert meta.rows("SELECT * FROM segment") == []


def test_segment_ids_never_come_back(meta: Meta) -> None:
    seen = set()
    for end in (meta.reopen, meta.crash, meta.reopen):
        for _ in range(3):
            first = meta.run(meta.service.allocate_segments(700))
            ids = set(range(first, first + 700))
            assert not ids & seen
            seen |= ids
        end()


def test_a_file_with_many_extents_is_removed_in_steps(meta: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_CHUNK", 10)
    segment = meta.segment()
    inos = []
    for name in (b"a", b"b", b"c"):
        ino = meta.file(name).ino
        inos.append(ino)
        parts = [Extent(2 * number, 1, segment.id, number) for number in range(35)]
        meta.commit(ino, 100, segments=(segment,) if name == b"a" else (), extents=parts)
        meta.unlink(name)
    deleted = []
    transaction = type(meta.store._tx)
    delete_extents = transaction.delete_extents

    async def counted(tx: Any, ino: int, start: int, end: int) -> list[tuple[int, int]]:
        sums = await delete_extents(tx, ino, start, end)
        deleted.append(sum(length for _, length in sums))
        return sums

    monkeypatch.setattr(transaction, "delete_extents", counted)
    meta.release(*inos)
    assert len(deleted) >= 10 and max(deleted) == 10
    assert meta.dead() == [segment.id]
    usage = meta.run(meta.service.usage())
    assert (usage.bytes, usage.inodes) == (0, 1)


def test_clone(meta: Meta) -> None:
    source, target = meta.file(b"s"), meta.file(b"t")
    one, two = meta.segment(), meta.segment()
    meta.commit(source.ino, 1000, segments=(one,), extents=[Extent(100, 100, one.id, 0), Extent(300, 500, one.id, 100)])
    meta.commit(target.ino, 400, segments=(two,), extents=[Extent(0, 400, two.id, 0)])
    changed = meta.run(meta.service.clone_range(source.ino, 150, 650, target.ino, 350))
    assert changed == meta.get(target.ino) and changed.size == 1000 and changed.mtime == changed.ctime > target.mtime
    assert meta.extents(target.ino) == [
        (0, 350, two.id, 0),
        (350, 50, one.id, 50),
        (500, 500, one.id, 100),
    ]
    assert changed.allocated == 900
    assert meta.rows("SELECT live FROM segment ORDER BY id") == [(1150,), (350,)]
    meta.release(meta.unlink(b"s").ino)
    assert meta.dead() == []


def test_clone_within_one_file(meta: Meta) -> None:
    ino = meta.file(b"f").ino
    segment = meta.segment()
    meta.commit(ino, 300, segments=(segment,), extents=[Extent(0, 300, segment.id, 0)])
    meta.run(meta.service.clone_range(ino, 0, 100, ino, 150))
    assert meta.extents(ino) == [
        (0, 150, segment.id, 0),
        (150, 100, segment.id, 0),
        (250, 50, segment.id, 250),
    ]
    for start in (0, 50, 99):
        with fails(EINVAL):
            meta.run(meta.service.clone_range(ino, 0, 100, ino, start))


def test_clone_of_inline_contents(meta: Meta) -> None:
    source, target = meta.file(b"s").ino, meta.file(b"t").ino
    meta.commit(source, 10, inline=b"0123456")
    meta.run(meta.service.clone_range(source, 2, 8, target, 3))
    assert meta.get(target).inline == b"\0\0\0" + b"23456\0\0\0" and meta.get(target).size == 11
    meta.run(meta.service.clone_range(target, 3, 2, target, 0))
    assert meta.get(target).inline == b"23\0" + b"23456\0\0\0"
    with fails(EOPNOTSUPP):
        meta.run(meta.service.clone_range(source, 0, 5, target, 4092))
    segment = meta.segment()
    meta.commit(source, 5000, segments=(segment,), extents=[Extent(0, 5000, segment.id, 0)])
    with fails(EOPNOTSUPP):
        meta.run(meta.service.clone_range(source, 0, 4, target, 0))
    meta.run(meta.service.clone_range(source, 0, 11, target, 0))
    assert meta.get(target).inline is None and meta.extents(target) == [(0, 11, segment.id, 0)]
    with fails(EOPNOTSUPP):
        meta.commit(source, 3, inline=b"abc")
        meta.run(meta.service.clone_range(source, 0, 3, target, 0))


def test_clone_errors(new_meta: Callable[..., Meta]) -> None:
    meta = new_meta(bytes_limit=150)
    source, target = meta.file(b"s").ino, meta.file(b"t").ino
    segment = meta.segment()
    meta.commit(source, 100, segments=(segment,), extents=[Extent(0, 100, segment.id, 0)])
    with fails(ENOSPC):
        meta.run(meta.service.clone_range(source, 0, 51, target, 0))
    meta.run(meta.service.clone_range(source, 0, 50, target, 0))
    meta.run(meta.service.clone_range(source, 50, 50, target, 0))
    for start, length, target_start in ((0, 101, 0), (-1, 5, 0), (0, 0, 0), (0, 5, -1)):
        with fails(EINVAL):
            meta.run(meta.service.clone_range(source, start, length, target, target_start))
    with fails(EISDIR):
        meta.run(meta.service.clone_range(source, 0, 5, ROOT_INO, 0))
    with fails(ENOENT):
        meta.run(meta.service.clone_range(source, 0, 5, 999, 0))
    meta.assert_clean()
    meta.close()


SIZE = 200
_offset = st.integers(0, SIZE)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.lists(st.tuples(_offset, _offset), min_size=1, max_size=3)),
        st.tuples(st.just("drop"), st.integers(0, 1), st.lists(st.tuples(_offset, _offset), min_size=1, max_size=2)),
        st.tuples(
            st.just("truncate"), st.integers(0, 1), st.lists(st.tuples(_offset, _offset), min_size=1, max_size=1)
        ),
        st.tuples(st.just("clone"), st.integers(0, 1), st.lists(st.tuples(_offset, _offset), min_size=2, max_size=2)),
        st.tuples(st.just("inline"), st.integers(0, 1), st.lists(st.tuples(_offset, _offset), min_size=1, max_size=1)),
        st.tuples(st.just("move"), st.integers(0, 1), st.just([])),
    ),
    max_size=25,
)


class Bytes:
    """Two files as bytearrays beside the same two in a volume; segments hold random bytes in memory."""

    def __init__(self, meta: Meta) -> None:
        self.meta = meta
        self.random = random.Random(1)
        self.files = [bytearray(), bytearray()]
        self.inos = [meta.file(b"0").ino, meta.file(b"1").ino]
        self.segments: dict[int, bytes] = {}
        self.seen: list[tuple[int, Extent]] = []

    def whole_inline(self, which: int) -> bool:
        return self.meta.get(self.inos[which]).inline is not None

    def write(self, which: int, ranges: list[tuple[int, int]]) -> None:
        model = self.files[which]
        if self.whole_inline(which):
            ranges = [(0, max(SIZE, len(model)))]
        parts = []
        end = 0
        body = b""
        for start, stop in sorted((min(pair), max(pair)) for pair in ranges):
            start = max(start, end)
            if start >= stop:
                continue
            content = self.random.randbytes(stop - start)
            if self.whole_inline(which):
                content = bytes(model).ljust(stop, b"\0")
            parts.append((start, content, len(body)))
            body += content
            end = stop
        if not parts:
            return
        segment = self.meta.segment(len(body))
        self.segments[segment.id] = body
        for start, content, _ in parts:
            if len(model) < start:
                model.extend(bytes(start - len(model)))
            model[start : start + len(content)] = content
        extents = [Extent(start, len(content), segment.id, at) for start, content, at in parts]
        self.meta.commit(self.inos[which], len(model), segments=(segment,), extents=extents)

    def drop(self, which: int, ranges: list[tuple[int, int]]) -> None:
        model = self.files[which]
        drops = [(min(pair), max(pair)) for pair in ranges]
        for start, stop in drops:
            stop = min(stop, len(model))
            if start < stop:
                model[start:stop] = bytes(stop - start)
        self.meta.commit(self.inos[which], len(model), drops=drops)

    def truncate(self, which: int, ranges: list[tuple[int, int]]) -> None:
        model = self.files[which]
        size = ranges[0][0]
        drops = [(size, FILE_SIZE_MAX)]
        del model[size:]
        model.extend(bytes(size - len(model)))
        self.meta.commit(self.inos[which], size, drops=drops)

    def clone(self, which: int, ranges: list[tuple[int, int]]) -> None:
        (start, target_start), (length, other) = ranges
        source, target = which, (which + other) % 2
        piece = bytes(self.files[source][start : start + length])
        if len(piece) < length or not length:
            return
        try:
            self.meta.run(
                self.meta.service.clone_range(self.inos[source], start, length, self.inos[target], target_start)
            )
        except OSError as error:
            assert error.errno in (EINVAL, EOPNOTSUPP)
            if error.errno == EINVAL:
                assert source == target and abs(start - target_start) < length
            return
        model = self.files[target]
        if len(model) < target_start:
            model.extend(bytes(target_start - len(model)))
        model[target_start : target_start + length] = piece

    def inline(self, which: int, ranges: list[tuple[int, int]]) -> None:
        content = self.random.randbytes(ranges[0][0])
        self.files[which][:] = content
        self.meta.commit(self.inos[which], len(content), inline=content)

    def move(self, which: int, _: list[tuple[int, int]]) -> None:
        """Where the extents were at the last such step, they go elsewhere; then those of a file are noted anew."""
        service = self.meta.service
        body = b""
        places = []
        for ino, extent in self.seen:
            places.append((ino, extent, len(body)))
            body += self.segments[extent.segment][extent.segment_offset :][: extent.length]
        if body:
            segment = self.meta.segment(len(body))
            self.segments[segment.id] = body
            moves = [Move(ino, extent, segment.id, at) for ino, extent, at in places]
            before = sum(length for ino in self.inos for _, length, *_ in self.meta.extents(ino))
            moved = self.meta.run(service.move_extents([segment], moves))
            found = [each for ino in self.inos for each in self.meta.extents(ino)]
            assert sum(length for _, length, *_ in found) == before
            assert sum(length for _, length, number, _ in found if number == segment.id) == moved
        ids = {segment for _, _, segment, _ in self.meta.extents(self.inos[which])}
        self.seen = [each for id_ in ids for each in self.meta.run(service.segment_extents(id_, 1000))]

    def compare(self) -> None:
        for ino, model in zip(self.inos, self.files, strict=True):
            inode = self.meta.get(ino)
            assert inode.size == len(model)
            content = bytearray(inode.size)
            if inode.inline is not None:
                content[: len(inode.inline)] = inode.inline
            for offset, length, segment, at in self.meta.extents(ino):
                content[offset : offset + length] = self.segments[segment][at : at + length]
            assert content == model


def test_against_bytes(meta: Meta) -> None:
    @settings(max_examples=examples(60 if type(meta) is Meta else 10), deadline=None)
    @given(steps=_steps)
    def run(steps: list[tuple[str, int, list[tuple[int, int]]]]) -> None:
        pair = Bytes(meta)
        for operation, which, ranges in steps:
            getattr(pair, operation)(which, ranges)
            pair.compare()
        meta.forget_caches()
        pair.compare()
        meta.assert_clean()
        for name in (b"0", b"1"):
            meta.release(meta.unlink(name).ino)
        meta.assert_clean()
        dead = meta.dead()
        assert set(dead) == set(pair.segments)
        meta.run(meta.service.forget_segments(dead))

    run()
