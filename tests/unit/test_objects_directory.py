"""The directory object store."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from polefs.objects import directory
from polefs.objects.base import ObjectInfo, segment_key
from polefs.objects.directory import DirectoryStore

T = TypeVar("T")


def use(path: Path, work: Callable[[DirectoryStore], Awaitable[T]]) -> T:
    async def main() -> T:
        store = DirectoryStore(str(path))
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


async def all_of(found: AsyncIterator[ObjectInfo]) -> dict[str, int]:
    return {info.key: info.size async for info in found}


def test_put_and_get(tmp_path: Path) -> None:
    async def work(store: DirectoryStore) -> None:
        await store.put("a/b", [b"one", memoryview(b"two"), bytearray(b"three")])
        assert await store.get("a/b", 0, 11) == b"onetwothree"
        assert await store.get("a/b", 3, 3) == b"two"
        now = store.get_now("a/b", 6, 5)
        assert now is not None and bytes(now) == b"three"
        assert await all_of(store.list()) == {"a/b": 11}

    use(tmp_path, work)
    assert (tmp_path / "a" / "b").read_bytes() == b"onetwothree"


def test_many_parts(tmp_path: Path) -> None:
    async def work(store: DirectoryStore) -> None:
        parts = [bytes([n % 256]) * 3 for n in range(5000)]
        await store.put("k", parts)
        assert await store.get("k", 0, 15000) == b"".join(parts)

    use(tmp_path, work)


def test_errors(tmp_path: Path) -> None:
    async def work(store: DirectoryStore) -> None:
        await store.put("k", [b"abc"])
        with pytest.raises(FileNotFoundError):
            await store.get("none", 0, 1)
        assert store.get_now("none", 0, 1) is None
        with pytest.raises(OSError) as caught:
            await store.get("k", 0, 4)
        assert caught.value.errno == errno.EIO
        with pytest.raises(FileExistsError):
            await store.put("k", [b"other"])
        assert await store.get("k", 0, 3) == b"abc"

    use(tmp_path, work)
    assert list((tmp_path / ".incoming").iterdir()) == []


def test_adopt_links_and_never_replaces(tmp_path: Path) -> None:
    source = tmp_path / "replica"
    source.write_bytes(b"contents")

    async def work(store: DirectoryStore) -> None:
        assert await store.adopt(segment_key(1000), str(source))
        assert await store.get(segment_key(1000), 0, 8) == b"contents"
        with pytest.raises(FileExistsError):
            await store.adopt(segment_key(1000), str(source))

    use(tmp_path / "store", work)
    assert os.stat(source).st_nlink == 2
    assert (tmp_path / "store" / segment_key(1000)).samefile(source)


def test_adopt_across_file_systems_is_declined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "replica"
    source.write_bytes(b"contents")

    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "link", link)
    assert use(tmp_path / "store", lambda store: store.adopt("k", str(source))) is False


def test_a_failed_put_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(store: DirectoryStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", _full)
            with pytest.raises(OSError) as caught:
                await store.put("k", [b"abc"])
        assert caught.value.errno == errno.ENOSPC
        assert await all_of(store.list()) == {}
        await store.put("k", [b"abc"])

    use(tmp_path, work)


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "full")


def test_what_a_crash_left_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".incoming").mkdir()
    (tmp_path / ".incoming" / "7").write_bytes(b"torn")
    assert use(tmp_path, lambda store: all_of(store.list())) == {}
    assert list((tmp_path / ".incoming").iterdir()) == []


def test_delete(tmp_path: Path) -> None:
    async def work(store: DirectoryStore) -> None:
        for number in range(3):
            await store.put(segment_key(number), [b"x"])
            assert await store.get(segment_key(number), 0, 1) == b"x"
        await store.delete([segment_key(0), segment_key(2), "none"])
        assert store.get_now(segment_key(0), 0, 1) is None
        assert await all_of(store.list()) == {segment_key(1): 1}
        with pytest.raises(FileNotFoundError):
            await store.get(segment_key(2), 0, 1)

    use(tmp_path, work)


def test_list_by_prefix(tmp_path: Path) -> None:
    async def work(store: DirectoryStore) -> None:
        for key in ("a/x", "ab/y", "b", "a/c/d"):
            await store.put(key, [b"."])
        assert set(await all_of(store.list("a"))) == {"a/x", "ab/y", "a/c/d"}
        assert set(await all_of(store.list("a/"))) == {"a/x", "a/c/d"}
        assert set(await all_of(store.list("a/c/"))) == {"a/c/d"}
        assert set(await all_of(store.list("z"))) == set()

    use(tmp_path, work)


def test_open_descriptors_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_OPEN_MAX", 4)

    async def work(store: DirectoryStore) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(20):
            await store.put(segment_key(number), [b"x"])
            await store.get(segment_key(number), 0, 1)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
        assert store.get_now(segment_key(0), 0, 1) is None
        assert store.get_now(segment_key(19), 0, 1) is not None

    use(tmp_path, work)


def test_space(tmp_path: Path) -> None:
    space = use(tmp_path, lambda store: store.space())
    assert space.bytes_total >= space.bytes_free >= space.bytes_available > 0
    assert space.files_total >= space.files_free > 0
