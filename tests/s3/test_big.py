"""A big file and a big tree through the bucket and back, and the memory that the daemon takes for it."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from polefs.node import control
from rawfuse.testing.peer import Peer
from tests.s3.conftest import MakeVolume
from tests.s3.volumes import S3Volume

FILE_SIZE = int(os.environ.get("POLEFS_BIG_FILE", 20 << 30))
"""Bytes. The disk has to have room for it once, and for 6 GiB more."""

TREE_FILES = int(os.environ.get("POLEFS_BIG_TREE", 200_000))

MEMORY = 300 << 20
"""The most that the daemon may have resident, bytes."""

BLOCK = 4 << 20
WORKERS = 4
FILES_A_DIRECTORY = 500
SECONDS = 3000.0

NOISE = random.Random(1).randbytes(BLOCK)


def block(number: int) -> list[bytes]:
    """One that is like no other."""
    return [hashlib.blake2b(number.to_bytes(8, "little")).digest(), NOISE[64:]]


def blocks() -> Iterator[int]:
    assert FILE_SIZE % BLOCK == 0
    return iter(range(FILE_SIZE // BLOCK))


def small(number: int) -> bytes:
    """The contents of a file of the tree: most of a few KiB, some empty, some of 100 KiB."""
    rng = random.Random(number)
    size = rng.choice([0, 100, 1000, 3000, 6000, 9000, 20_000]) if number % 200 else 100_000
    start = rng.randrange(BLOCK - size)
    return number.to_bytes(8, "little")[:size] + NOISE[start : start + max(size - 8, 0)]


def place(root: str, number: int) -> str:
    return f"{root}/{number // FILES_A_DIRECTORY:04}/{number:06}"


def write_part(root: str, first: int) -> None:
    for number in range(first, TREE_FILES, WORKERS):
        with open(place(root, number), "wb", buffering=0) as file:
            file.write(small(number))


def verify_part(root: str, first: int) -> None:
    """Whole directories, as they lie."""
    directories = sorted(os.listdir(root))
    for directory in directories[first::WORKERS]:
        for name in sorted(os.listdir(f"{root}/{directory}")):
            with open(f"{root}/{directory}/{name}", "rb") as file:
                assert file.read() == small(int(name)), name


def peak(volume: S3Volume) -> int:
    """The most that the daemon has had resident so far, bytes."""
    assert volume.server is not None
    status = Path(f"/proc/{volume.server.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def end(volume: S3Volume, what: str) -> None:
    """Unmount, once everything is written back and the memory has been looked at."""
    client = control.ControlClient.connect(str(volume.path))
    assert client is not None
    with client:
        for _ in client.request(control.Flush()):
            pass
    memory = peak(volume)
    print(f"{what}: peak memory of the daemon {memory >> 20} MiB")
    volume.stop(SECONDS)
    assert memory <= MEMORY


def in_parallel(function: object, root: Path) -> None:
    peers = [Peer() for _ in range(WORKERS)]
    try:
        for first, peer in enumerate(peers):
            peer.start(function, str(root), first)  # type: ignore[arg-type]
        for peer in peers:
            peer.result(SECONDS)
    finally:
        for peer in peers:
            peer.close(kill=True)


@pytest.mark.deadline(2 * SECONDS)
def test_a_big_file(make_volume: MakeVolume) -> None:
    volume = make_volume(mount=("--cache-size", "2G", "-o", "dirty_limit=4G"))
    volume.start()
    with open(volume.root / "file", "wb", buffering=0) as file:
        for number in blocks():
            assert os.writev(file.fileno(), block(number)) == BLOCK
        os.fsync(file.fileno())
    end(volume, "writing the file")
    volume.lose_local()
    volume.start()
    assert (volume.root / "file").stat().st_size == FILE_SIZE
    with open(volume.root / "file", "rb", buffering=0) as file:
        buffer = bytearray(BLOCK)
        for number in blocks():
            assert os.readv(file.fileno(), [buffer]) == BLOCK
            assert buffer == b"".join(block(number)), f"block {number}"
        assert not file.read(1)
    end(volume, "reading the file")
    volume.start()
    (volume.root / "file").unlink()


@pytest.mark.deadline(2 * SECONDS)
def test_a_big_tree(make_volume: MakeVolume) -> None:
    volume = make_volume(mount=("--cache-size", "2G", "-o", "dirty_limit=4G"))
    volume.start()
    tree = volume.root / "tree"
    tree.mkdir()
    for number in range(0, TREE_FILES, FILES_A_DIRECTORY):
        Path(place(str(tree), number)).parent.mkdir()
    in_parallel(write_part, tree)
    end(volume, "writing the tree")
    volume.lose_local()
    volume.start()
    assert sum(len(files) for _, _, files in os.walk(tree)) == TREE_FILES
    in_parallel(verify_part, tree)
    end(volume, "reading the tree")
    volume.start()
    shutil.rmtree(tree)
    end(volume, "removing the tree")
    volume.start()
    assert os.listdir(volume.root) == []
