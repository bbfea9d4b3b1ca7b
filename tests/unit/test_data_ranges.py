"""Range maps against a list of owners, one a byte."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from polefs.data.ranges import BASE, HOLE, TINY, Absent, Chunk, RangeMap, Source, resolve

SIZE = 64
ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda r: (r[0], min(r[0] + r[1], SIZE)))
operations = st.lists(st.tuples(ranges, st.sampled_from(["chunk", "hole"])), max_size=30)


def byte_of(source: Source, position: int) -> int | Absent:
    return bytes(source.cut(position, position + 1))[0] if isinstance(source, Chunk) else source  # type: ignore[return-value]


def fill(
    ranges: RangeMap, owners: list[int | Absent], operations: list[tuple[tuple[int, int], str]], first: int
) -> None:
    for number, ((start, end), kind) in enumerate(operations, first):
        if kind == "hole":
            ranges.set(start, end, HOLE)
            owners[start:end] = [HOLE] * (end - start)
        else:
            ranges.set(start, end, Chunk(start, bytes([number % 256]) * (end - start)))
            owners[start:end] = [number % 256] * (end - start)


@settings(max_examples=300, deadline=None)
@given(operations, operations, ranges)
def test_resolve_finds_the_latest_owner_of_each_byte(
    lower: list[tuple[tuple[int, int], str]], upper: list[tuple[tuple[int, int], str]], window: tuple[int, int]
) -> None:
    owners: list[int | Absent] = [BASE] * SIZE
    maps = [RangeMap(), RangeMap()]
    fill(maps[0], owners, lower, 1)
    fill(maps[1], owners, upper, 101)
    start, end = window
    position = start
    for piece_start, piece_end, source in resolve(maps, start, end):
        assert piece_start == position < piece_end
        assert [byte_of(source, at) for at in range(piece_start, piece_end)] == owners[piece_start:piece_end]
        position = piece_end
    assert position == end


@settings(max_examples=300, deadline=None)
@given(operations)
def test_pieces_are_sorted_and_counted(operations: list[tuple[tuple[int, int], str]]) -> None:
    ranges = RangeMap()
    owners: list[int | Absent] = [BASE] * SIZE
    fill(ranges, owners, operations, 1)
    end = 0
    for start, stop, _ in ranges:
        assert end <= start < stop
        end = stop
    in_memory = sum(isinstance(owner, int) for owner in owners)
    assert ranges.memory == ranges.data == in_memory
    # Chunks keep at most twice the memory that is counted.
    held = {id(source.data): len(source.data) for _, _, source in ranges if isinstance(source, Chunk)}
    assert sum(held.values()) <= 2 * in_memory


def test_small_appends_are_joined() -> None:
    ranges = RangeMap()
    for position in range(0, 2 * TINY, 64):
        ranges.set(position, position + 64, Chunk(position, bytes(64)))
    assert len(ranges) == 2
    assert ranges.memory == 2 * TINY
