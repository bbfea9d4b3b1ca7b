"""Large directories, and listings that go on while entries come and go."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from rawfuse.testing.syscalls import DirectoryStream, fails, opened, write_file

DOTS = {b".", b".."}


def name(number: int) -> str:
    return f"entry-{number:07}-with-a-name-of-some-length"


def make(entry: str, directory: int) -> None:
    """An empty file."""
    os.close(os.open(entry, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=directory))


def fill(directory: Path, numbers: range) -> None:
    with opened(directory) as here:
        for number in numbers:
            make(name(number), here)


@pytest.mark.deadline(120)
def test_big(root: Path, fuse_stress: bool) -> None:
    """Filled, listed whole while a part is removed and added, emptied."""
    entries = 1_000_000 if fuse_stress else 10_000
    fill(root, range(entries))
    assert len(os.listdir(root)) == entries
    seen: Counter[bytes] = Counter()
    removed, added = 0, 0
    with DirectoryStream(root) as stream, opened(root) as here:
        for count, found in enumerate(stream.names()):
            seen[found] += 1
            if count % 10 == 0 and removed < entries // 20:
                os.unlink(root / name(removed * 2))
                removed += 1
                make(f"new{added}", here)
                added += 1
    stayed = {name(number).encode() for number in range(entries) if number % 2 or number >= removed * 2}
    assert all(seen[entry] == 1 for entry in stayed), "an entry that stayed was listed not once"
    assert max(seen.values()) == 1
    assert set(os.listdir(root)) == {entry.decode() for entry in stayed} | {f"new{i}" for i in range(added)}
    for entry in os.listdir(root):
        os.unlink(root / entry)
    assert os.listdir(root) == []
    assert set(_names(root)) == DOTS


def _names(directory: Path) -> list[bytes]:
    with DirectoryStream(directory) as stream:
        return list(stream.names())


def test_remove_while_listing(root: Path) -> None:
    """What rm -r does: each entry is removed when it is listed."""
    fill(root, range(3000))
    with DirectoryStream(root) as stream:
        for found in stream.names():
            if found not in DOTS:
                os.unlink(os.fsencode(root) + b"/" + found)
    assert os.listdir(root) == []


def test_add_while_listing_ends(root: Path) -> None:
    fill(root, range(500))
    seen: Counter[bytes] = Counter()
    with DirectoryStream(root) as stream:
        for count, found in enumerate(stream.names()):
            seen[found] += 1
            if count < 2000:
                write_file(root / f"new{count}")
    assert max(seen.values()) == 1
    assert all(seen[name(number).encode()] == 1 for number in range(500))


def test_rename_while_listing(root: Path) -> None:
    """Names that stay are listed once, whatever happens to the others."""
    fill(root, range(3000))
    seen: Counter[bytes] = Counter()
    with DirectoryStream(root) as stream:
        for count, found in enumerate(stream.names()):
            seen[found] += 1
            if count < 1000:
                os.rename(root / name(count * 3), root / f"renamed{count}")
    for number in range(3000):
        if number % 3:
            assert seen[name(number).encode()] == 1


def test_tell_and_seek(root: Path) -> None:
    fill(root, range(2000))
    with DirectoryStream(root) as stream:
        order, positions = [], []
        while True:
            position = stream.tell()
            entry = stream.next()
            if entry is None:
                break
            positions.append(position)
            order.append(entry[0])
        assert len(order) == 2002
        for at in (0, 1, 2, 500, 1234, 2001, 77):
            stream.seek(positions[at])
            assert [entry for entry, _ in zip(stream.names(), range(5), strict=False)] == order[at : at + 5]
        stream.rewind()
        assert list(stream.names()) == order


def test_seek_after_removals(root: Path) -> None:
    """A position stays valid when entries before and at it are removed."""
    fill(root, range(1000))
    with DirectoryStream(root) as stream:
        order = []
        position = 0
        for count in range(600):
            if count == 400:
                position = stream.tell()
            entry = stream.next()
            assert entry is not None
            order.append(entry[0])
        for found in set(order[:402]) - DOTS:
            os.unlink(os.fsencode(root) + b"/" + found)
        stream.seek(position)
        rest = set(stream.names())
    assert set(order[402:]) - DOTS <= rest


def test_rewind_sees_changes(root: Path) -> None:
    fill(root, range(10))
    with DirectoryStream(root) as stream:
        assert len(list(stream.names())) == 12
        write_file(root / "new")
        os.unlink(root / name(0))
        stream.rewind()
        found = set(stream.names())
    assert b"new" in found
    assert name(0).encode() not in found


def test_two_streams(root: Path) -> None:
    fill(root, range(1000))
    with DirectoryStream(root) as one, DirectoryStream(root) as two:
        first = [next(iter(one.names())) for _ in range(300)]
        assert len(list(two.names())) == 1002
        assert len(first) + len(list(one.names())) == 1002


@pytest.mark.fuse_needs("mknod", "symlinks")
def test_types_and_inodes(root: Path) -> None:
    write_file(root / "file")
    (root / "dir").mkdir()
    (root / "link").symlink_to("x")
    os.mkfifo(root / "fifo")
    with DirectoryStream(root) as stream:
        found = {}
        while (entry := stream.next()) is not None:
            found[entry[0]] = entry[1:]
    assert found[b"."] == (root.stat().st_ino, 4)
    assert found[b".."][1] == 4
    kinds = {b"file": 8, b"dir": 4, b"link": 10, b"fifo": 1}
    for entry_name, kind in kinds.items():
        assert found[entry_name] == (os.lstat(os.fsencode(root) + b"/" + entry_name).st_ino, kind)


def test_long_names(root: Path) -> None:
    names = {f"{number:04}".ljust(255, "é"[0] if number % 2 else "x")[:127] for number in range(3000)}
    with opened(root) as here:
        for entry in names:
            make(entry, here)
    assert set(os.listdir(root)) == names


def test_list_with_stat(root: Path) -> None:
    """What ls -l does; sizes come from the newest writes."""
    for number in range(300):
        write_file(root / f"f{number}", b"x" * number)
    with os.scandir(root) as entries:
        assert {entry.name: entry.stat().st_size for entry in entries} == {f"f{n}": n for n in range(300)}
    for number in range(0, 300, 7):
        write_file(root / f"f{number}", b"y" * 1000)
    with os.scandir(root) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    assert sizes == {f"f{n}": n if n % 7 else 1000 for n in range(300)}


def test_cached_listing_is_never_old(root: Path) -> None:
    for number in range(200):
        write_file(root / f"f{number}")
        assert len(os.listdir(root)) == number + 1
    for number in range(200):
        os.unlink(root / f"f{number}")
        assert len(os.listdir(root)) == 199 - number


@pytest.mark.fuse_needs("nlink")
def test_many_subdirectories(root: Path) -> None:
    for number in range(2000):
        (root / f"d{number}").mkdir()
    assert root.stat().st_nlink == 2002
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        root.rmdir()
    for number in range(2000):
        (root / f"d{number}").rmdir()
    assert root.stat().st_nlink == 2
