"""Writing past the page cache, and where that cannot be."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from polefs.objects.localio import DIRECT_MIN, aligned_buffer, write_past_cache

BEFORE = os.urandom(8 << 20)


def filled(length: int) -> memoryview:
    buffer = aligned_buffer(length)
    buffer[:] = os.urandom(length)
    return buffer


def written(path: Path, parts: list[bytes | memoryview], offset: int) -> bytes:
    path.write_bytes(BEFORE)
    fd = os.open(path, os.O_RDWR)
    try:
        write_past_cache(fd, parts, offset)
    finally:
        os.close(fd)
    return path.read_bytes()


@pytest.mark.parametrize("length", [0, 1, 4096, DIRECT_MIN - 1, DIRECT_MIN, DIRECT_MIN + 1, 5 << 20])
def test_aligned_buffers(length: int) -> None:
    buffer = aligned_buffer(length)
    assert len(buffer) == length
    assert bytes(buffer) == bytes(length)
    if length >= DIRECT_MIN:
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 4096 == 0


@pytest.mark.parametrize("offset", [0, 4096, 1 << 20, 1000])
@pytest.mark.parametrize("odd", ["", "address", "length"])
def test_any_parts_arrive(tmp_path: Path, offset: int, odd: str) -> None:
    data = filled(2 << 20)
    parts: list[bytes | memoryview] = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    if odd == "address":
        parts[3] = bytes(parts[3])
    elif odd == "length":
        parts[3] = parts[3][:-1]
    whole = b"".join(parts)
    found = written(tmp_path / "file", parts, offset)
    assert found == BEFORE[:offset] + whole + BEFORE[offset + len(whole) :]


def test_a_removed_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        path.unlink()
        data = filled(DIRECT_MIN)
        write_past_cache(fd, [data], 0)
        assert os.pread(fd, DIRECT_MIN, 0) == data
    finally:
        os.close(fd)


def test_a_file_system_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    data = filled(DIRECT_MIN)
    assert written(tmp_path / "file", [data], 0) == bytes(data) + BEFORE[DIRECT_MIN:]


def test_other_errors_are_raised(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BEFORE)
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(OSError) as caught:
            write_past_cache(fd, [filled(DIRECT_MIN)], 1 << 62)
        assert caught.value.errno == errno.EFBIG
    finally:
        os.close(fd)
