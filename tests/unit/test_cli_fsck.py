"""``polefs fsck``: what it finds, what it repairs, and its exit statuses."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from polefs.cli.app import run
from polefs.meta.model import ROOT_INO, Caller
from polefs.node.lock import Holder
from polefs.node.storage import open_storage
from polefs.node.volume import Volume, make_volume

CONTENTS = os.urandom(100_000)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    """A volume with one file of 100,000 bytes, not mounted."""
    volume = make_volume(str(tmp_path / "v"), Holder(os.getpid(), "format"))

    async def fill() -> None:
        storage = await open_storage(volume)
        inode = await storage.meta.make_node(Caller(0, 0), ROOT_INO, b"file", stat.S_IFREG | 0o644, 0)
        await storage.files.write(inode, 0, memoryview(CONTENTS), 10**18)
        await storage.close()

    asyncio.run(fill())
    volume.unlock()
    return volume


def fsck(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(["fsck", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def change(volume: Volume, statement: str) -> None:
    connection = sqlite3.connect(volume.meta)
    with connection:
        assert connection.execute(statement).rowcount == 1
    connection.close()


def the_object(volume: Volume) -> Path:
    (path,) = (path for path in Path(volume.objects).rglob("*") if path.is_file())
    return path


def test_clean(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--data"], ["--repair"], ["--data", "--repair"]):
        assert fsck(capsys, *arguments, volume.path) == (0, f"{volume.path}: clean\n")


def test_wrong_counts_are_repaired(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    change(volume, f"UPDATE inode SET nlink = 7 WHERE ino = {ROOT_INO}")
    code, out = fsck(capsys, volume.path)
    assert code == 4
    assert "link count" in out
    assert "1 problems left, 0 repaired: 1 can be repaired with --repair" in out
    code, out = fsck(capsys, "--repair", volume.path)
    assert code == 1
    assert out.endswith("1 problems, all repaired\n")
    assert fsck(capsys, "--data", volume.path)[0] == 0


def test_missing_and_damaged_objects_are_told(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    path = the_object(volume)
    path.chmod(0o600)
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    assert fsck(capsys, volume.path)[0] == 0
    code, out = fsck(capsys, "--data", volume.path)
    assert code == 4
    assert "is not what was written: wrong checksum" in out
    path.write_bytes(damaged[:-1])
    code, out = fsck(capsys, volume.path)
    assert code == 4
    assert "bytes instead of" in out
    path.unlink()
    code, out = fsck(capsys, "--repair", volume.path)
    assert code == 4
    assert "is missing" in out


def test_garbage_is_harmless(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    path = the_object(volume)
    garbage = path.with_name(f"{int(path.name, 16) + 1:x}")
    garbage.write_bytes(b"left by a crash")
    code, out = fsck(capsys, volume.path)
    assert code == 0
    assert "note: garbage object" in out
    assert garbage.exists()
    assert fsck(capsys, "--repair", volume.path)[0] == 0
    assert not garbage.exists()


def test_contents_left_by_a_killed_daemon(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    async def write_and_leave() -> None:
        storage = await open_storage(volume)
        inode = await storage.meta.lookup(ROOT_INO, b"file")
        await storage.files.write(inode, 0, memoryview(b"newer"), 10**18)
        await storage.meta.sync()

    async def read() -> bytes:
        storage = await open_storage(volume)
        parts = await storage.files.read(await storage.meta.lookup(ROOT_INO, b"file"), 0, 10)
        await storage.close()
        return b"".join(parts)

    # The process of a daemon that is killed.
    if (child := os.fork()) == 0:
        asyncio.run(write_and_leave())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    code, out = fsck(capsys, volume.path)
    assert code == 0
    assert "note: contents that are not yet written back" in out
    assert fsck(capsys, "--repair", volume.path) == (0, f"{volume.path}: clean\n")
    assert os.listdir(volume.local) == []
    assert asyncio.run(read()) == b"newer" + CONTENTS[5:10]


def test_a_volume_in_use(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    volume.lock(Holder(1, "mount", "/mnt/x"))
    assert run(["fsck", volume.path]) == 8
    assert "is mounted on /mnt/x" in capsys.readouterr().err
    volume.unlock()


def test_no_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fsck", str(tmp_path)]) == 8
    assert "no polefs volume" in capsys.readouterr().err
