"""Frames: every coding gives back what was put in, damage is always found, and tables tell which frames hold what."""

from __future__ import annotations

import errno
import os
from itertools import pairwise

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polefs.data.cipher import Cipher
from polefs.data.frames import COMPRESSIONS, FRAME_MAX, Codec, Coding, FrameTable, encode_frames
from polefs.data.keys import new_key, wrap
from polefs.meta.model import Segment

CIPHER = Cipher(bytes(range(32)))
CODECS = [Codec(compression, cipher) for compression in COMPRESSIONS.values() for cipher in (None, CIPHER)]


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Compressible or not, and often as long as some frames, or nearly so."""
    length = draw(
        st.integers(1, 3000)
        | st.builds(lambda frames, rest: max(frames * FRAME_MAX + rest, 1), st.integers(0, 3), st.integers(-3, 3))
    )
    piece = draw(st.binary(min_size=1, max_size=200))
    return os.urandom(length) if draw(st.booleans()) else (piece * (length // len(piece) + 1))[:length]


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


def encode(codec: Codec, runs: list[list[bytes]], number: int = 7) -> tuple[bytes, FrameTable]:
    stored: list[bytes] = []
    rows: list[tuple[int, int, int]] = []
    for parts in runs:
        more, added = encode_frames(codec, number, len(rows), parts)
        stored += more
        rows += added
    size = sum(length for length, _, _ in rows)
    return b"".join(stored), FrameTable(Segment(number, size, tuple(rows), codec.coding))


def decode(codec: Codec, table: FrameTable, stored: bytes, first: int, last: int) -> bytes:
    return b"".join(
        codec.decode(table, index, memoryview(stored)[table.stored_start(index) : table.stored_start(index + 1)])
        for index in range(first, last)
    )


@settings(deadline=None)
@given(
    st.sampled_from(CODECS),
    st.lists(st.tuples(contents(), st.lists(st.integers(0, 400_000), max_size=5)), min_size=1, max_size=4),
    st.data(),
)
def test_any_range_comes_back(codec: Codec, runs: list[tuple[bytes, list[int]]], data: st.DataObject) -> None:
    plain = b"".join(run for run, _ in runs)
    stored, table = encode(codec, [split(run, cuts) for run, cuts in runs])
    assert len(stored) == table.stored_start(len(table))
    assert table.size == len(plain)
    assert decode(codec, table, stored, 0, len(table)) == plain
    start = data.draw(st.integers(0, len(plain) - 1))
    end = data.draw(st.integers(start + 1, len(plain)))
    first, last = table.covering(start, end)
    base = table.start(first)
    assert base <= start
    assert table.start(first + 1) > start
    assert table.start(last - 1) < end <= table.start(last)
    assert decode(codec, table, stored, first, last)[start - base : end - base] == plain[start:end]


@settings(deadline=None)
@given(st.lists(st.integers(1, 3 * FRAME_MAX), min_size=1, max_size=5))
def test_no_frame_crosses_a_run_or_is_too_long(lengths: list[int]) -> None:
    _, table = encode(CODECS[0], [[bytes(length)] for length in lengths])
    starts = {table.start(index) for index in range(len(table) + 1)}
    position = 0
    for length in lengths:
        assert position in starts
        position += length
    assert all(0 < table.length(index) <= FRAME_MAX for index in range(len(table)))


@settings(deadline=None)
@given(st.sampled_from(CODECS), contents(), st.data())
def test_damage_is_found(codec: Codec, plain: bytes, data: st.DataObject) -> None:
    stored, table = encode(codec, [[plain]])
    index = data.draw(st.integers(0, len(table) - 1))
    start, end = table.stored_start(index), table.stored_start(index + 1)
    frame = bytearray(stored[start:end])
    place = data.draw(st.integers(0, len(frame) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "empty"]))
    if kind == "flip":
        frame[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del frame[place:]
    elif kind == "grow":
        frame += b"x"
    else:
        frame.clear()
    try:
        found = codec.decode(table, index, bytes(frame))
    except OSError as error:
        assert error.errno == errno.EIO
    else:
        # A decompressor may pass over bytes that mean nothing; what it gives is what was written.
        assert found == plain[table.start(index) : table.start(index + 1)]
        assert codec.coding & (Coding.ZSTD | Coding.LZ4)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(CODECS), st.integers(1, 1 << 20))
def test_garbage_is_refused(garbage: bytes, codec: Codec, length: int) -> None:
    table = FrameTable(Segment(1, length, ((length, len(garbage), 1),), codec.coding))
    if length == len(garbage) and google_crc32c.value(garbage) == 1:
        return
    with pytest.raises(OSError, match="frame 0 of segment 1"):
        codec.decode(table, 0, garbage)


@pytest.mark.parametrize("codec", CODECS)
def test_what_does_not_shrink_is_stored_plain(codec: Codec) -> None:
    plain = os.urandom(5000)
    stored, _ = encode(codec, [[plain]])
    overhead = 28 if codec.coding & Coding.ENCRYPTED else 0
    assert len(stored) == len(plain) + overhead


@pytest.mark.parametrize("name", ["zstd", "lz4"])
def test_compression_shrinks(name: str) -> None:
    stored, _ = encode(Codec(COMPRESSIONS[name]), [[b"all work and no play " * 10_000]])
    assert len(stored) < 10_000


def test_another_coding_of_the_volume_still_reads_old_segments() -> None:
    stored, table = encode(Codec(Coding.LZ4), [[b"old" * 1000]])
    assert decode(Codec(Coding.ZSTD, CIPHER), table, stored, 0, 1) == b"old" * 1000


def test_encrypted_frames_cannot_change_places() -> None:
    codec = Codec(Coding.PLAIN, CIPHER)
    same = bytes(FRAME_MAX)
    stored, table = encode(codec, [[same, same]])
    frame = stored[table.stored_start(1) :]
    with pytest.raises(OSError, match="not authentic"):
        codec.decode(table, 0, frame)
    _, other = encode(codec, [[same, same]], number=8)
    with pytest.raises(OSError, match="not authentic"):
        codec.decode(other, 1, frame)


def test_without_the_key_encrypted_frames_are_refused() -> None:
    stored, table = encode(Codec(Coding.PLAIN, CIPHER), [[b"secret"]])
    assert b"secret" not in stored
    for codec in (Codec(), Codec(Coding.PLAIN, Cipher(bytes(32)))):
        with pytest.raises(OSError, match="frame 0 of segment 7"):
            codec.decode(table, 0, stored)


def test_a_range_outside_is_refused() -> None:
    _, table = encode(CODECS[0], [[b"12345"]])
    for start, end in ((0, 6), (-1, 3), (2, 2), (5, 6)):
        with pytest.raises(OSError, match="has no bytes"):
            table.covering(start, end)


def test_a_wrapped_key_opens_with_its_secret_alone() -> None:
    key = new_key(b"correct horse")
    data_key = key.unwrap(b"correct horse")
    assert len(data_key) == 32
    assert data_key not in key.wrapped
    with pytest.raises(ValueError, match="wrong key"):
        key.unwrap(b"battery staple")
    changed = wrap(data_key, b"battery staple")
    assert changed.unwrap(b"battery staple") == data_key
    assert new_key(b"correct horse").unwrap(b"correct horse") != data_key
