"""The cache of a mounted volume in a bucket: what the commands show and do, and what befalls its directory."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polefs.node import control
from polefs.node.status import CacheStatus
from tests.s3.faults import FaultProxy
from tests.s3.volumes import S3Volume, polefs

MakeVolume = Callable[..., S3Volume]

MIB = 1 << 20


def ask(volume: S3Volume, request: control.Request) -> control.Reply:
    """The daemon's last reply, without the command that would ask."""
    client = control.ControlClient.connect(str(volume.path))
    assert client is not None
    with client:
        *_, reply = client.request(request, patience=60)
    return reply


def state(volume: S3Volume) -> CacheStatus:
    reply = ask(volume, control.GetCache())
    assert isinstance(reply, control.CacheReply)
    return reply.cache


def flush(volume: S3Volume) -> None:
    ask(volume, control.Flush())


def drop_pages() -> None:
    """What files held in the page cache is gone, theirs on the mount too."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


@pytest.fixture
def small_disk(fuse_namespace: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,huge=never", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_warming_up_and_clearing(make_volume: MakeVolume) -> None:
    volume = make_volume()
    volume.start()
    contents = {f"d/{number}": os.urandom(20_000 + number) for number in range(60)}
    contents["big"] = os.urandom(9 * MIB)
    (volume.root / "d").mkdir()
    for name, data in contents.items():
        (volume.root / name).write_bytes(data)
    (volume.root / "link").symlink_to("d")
    volume.stop()
    volume.lose_local()
    volume.start()
    assert state(volume).files == 0
    polefs("warmup", volume.root / "link")
    assert state(volume).files == 60
    polefs("warmup", volume.root)
    assert state(volume).files == 61
    assert 9 * MIB < state(volume).size < 12 * MIB
    before = state(volume).misses
    for name, data in contents.items():
        assert (volume.root / name).read_bytes() == data
    assert state(volume).misses == before
    assert "hit rate:    100.0 %" in polefs("cache", volume.root)
    polefs("cache", "--shrink", "4M", volume.path)
    assert state(volume).size <= 4 * MIB
    polefs("cache", "--clear", volume.root)
    assert (state(volume).files, state(volume).size) == (0, 0)
    drop_pages()
    assert (volume.root / "big").read_bytes() == contents["big"]


def test_commands_say_what_is_wrong(make_volume: MakeVolume, tmp_path: Path) -> None:
    volume = make_volume(mount=("--cache-size", "1M"))
    assert "is not mounted: mount it first" in polefs("cache", volume.path, code=1)
    volume.start()
    (volume.root / "file").write_bytes(os.urandom(3 * MIB))
    flush(volume)
    assert "raise --cache-size" in polefs("warmup", volume.root, code=1)
    assert "No such file" in polefs("warmup", volume.root / "nothing", code=1)
    assert "is not on a mounted volume" in polefs("warmup", tmp_path, code=1)
    assert "give one of them" in polefs("cache", "--clear", "--shrink", "1M", volume.root, code=2)
    assert "is no size" in polefs("cache", "--shrink", "much", volume.root, code=2)


def test_a_local_volume_has_no_cache(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    said = polefs("mount", "-f", "--cache-size", "1G", tmp_path / "volume", tmp_path / "mnt", code=2)
    assert "leave out the options of the cache" in said


def test_the_cache_elsewhere(make_volume: MakeVolume, tmp_path: Path) -> None:
    """Two volumes can share a cache directory, and one volume cannot have another's part of it."""
    place = tmp_path / "cache"
    first = make_volume(mount=("-o", f"cache_dir={place}"))
    second = make_volume(mount=("--cache-dir", str(place)))
    for volume in (first, second):
        volume.start()
        (volume.root / "file").write_bytes(str(volume.path).encode() * 1000)
        flush(volume)
        assert state(volume).files == 1
    uuids = [json.loads((volume.path / "volume.json").read_text())["uuid"] for volume in (first, second)]
    assert sorted(os.listdir(place)) == sorted(uuids)
    first.stop()
    second.stop()
    assert not (first.path / "cache").exists()
    shutil.rmtree(place / uuids[0])
    os.rename(place / uuids[1], place / uuids[0])
    said = polefs("mount", "-f", "--cache-dir", place, first.path, first.root, code=1)
    assert f"belongs to volume {uuids[1]}" in said
    os.rename(place / uuids[0], place / uuids[1])
    first.start()
    second.start()
    for volume in (first, second):
        assert (volume.root / "file").read_bytes() == str(volume.path).encode() * 1000


def test_it_survives_the_daemon_and_needs_no_server(proxy: FaultProxy, make_volume: MakeVolume) -> None:
    volume = make_volume(endpoint=proxy.endpoint)
    volume.start()
    data = os.urandom(9 * MIB)
    (volume.root / "file").write_bytes(data)
    flush(volume)
    volume.kill()
    volume.start()
    proxy.refuse()
    assert (volume.root / "file").read_bytes() == data
    assert state(volume).misses == 0
    proxy.accept()


def test_lost_while_mounted(make_volume: MakeVolume) -> None:
    volume = make_volume()
    volume.start()
    contents = [os.urandom(2 * MIB) for _ in range(3)]
    for number, data in enumerate(contents):
        (volume.root / str(number)).write_bytes(data)
    flush(volume)
    shutil.rmtree(volume.path / "cache")
    drop_pages()
    for number, data in enumerate(contents):
        assert (volume.root / str(number)).read_bytes() == data
    volume.stop()
    volume.start()
    for number, data in enumerate(contents):
        assert (volume.root / str(number)).read_bytes() == data


def cut(cache: Path) -> None:
    for path in cache.glob("files/*/*"):
        os.truncate(path, path.stat().st_size // 2)


def no_directory(cache: Path) -> None:
    shutil.rmtree(cache / "files")
    (cache / "files").write_bytes(b"no directory")


def no_files(cache: Path) -> None:
    for path in cache.glob("files/*/*"):
        path.unlink()
        path.mkdir()


def no_state(cache: Path) -> None:
    (cache / "state").write_bytes(b"{")
    for path in cache.glob("files/*/*"):
        path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("damage", [cut, no_directory, no_files, no_state])
def test_damaged(make_volume: MakeVolume, damage: Callable[[Path], None]) -> None:
    """While it is mounted (but for its state, which is read at a mount), and for the next mount."""
    volume = make_volume()
    volume.start()
    contents = [os.urandom(MIB + number) for number in range(3)]

    def check() -> None:
        for number, data in enumerate(contents):
            assert (volume.root / str(number)).read_bytes() == data
        (volume.root / "more").write_bytes(contents[0])
        flush(volume)
        assert (volume.root / "more").read_bytes() == contents[0]

    for number, data in enumerate(contents):
        (volume.root / str(number)).write_bytes(data)
    flush(volume)
    if damage is no_state:
        volume.stop()
    damage(volume.path / "cache")
    if damage is no_state:
        volume.start()
    drop_pages()
    check()
    if damage is not no_state:
        volume.stop()
        if damage is no_directory:
            said = polefs("mount", volume.path, volume.root, code=1)
            assert "holds a file where a directory should be: remove it" in said
            shutil.rmtree(volume.path / "cache")
        volume.start()
        check()


def test_a_full_disk_under_it(make_volume: MakeVolume, small_disk: Path) -> None:
    """Reading goes on, and what is read is right, whatever there is no room for."""
    volume = make_volume(mount=("--cache-dir", str(small_disk), "--cache-free", "1"))
    volume.start()
    contents = [os.urandom(5 * MIB) for _ in range(8)]
    for number, data in enumerate(contents):
        (volume.root / str(number)).write_bytes(data)
    flush(volume)
    ask(volume, control.ShrinkCache(10 * MIB))
    (small_disk / "others").write_bytes(bytes(6 * MIB))
    for _ in range(2):
        drop_pages()
        for number, data in enumerate(contents):
            assert (volume.root / str(number)).read_bytes() == data
    assert state(volume).size <= 24 * MIB


def test_under_a_small_limit(make_volume: MakeVolume) -> None:
    volume = make_volume(mount=("-o", "cache_size=8M"))
    volume.start()
    contents = [os.urandom(MIB) for _ in range(24)]
    for number, data in enumerate(contents):
        (volume.root / str(number)).write_bytes(data)
    for _ in range(2):
        flush(volume)
        drop_pages()
        for number, data in enumerate(contents):
            assert (volume.root / str(number)).read_bytes() == data
    ask(volume, control.ShrinkCache(8 * MIB))
    while state(volume).size > 8 * MIB:
        # What was read last may have come into the cache only now.
        ask(volume, control.ShrinkCache(8 * MIB))


def test_a_full_disk_under_what_is_not_written_back(
    small_disk: Path, proxy: FaultProxy, make_volume: MakeVolume
) -> None:
    """The store is away and the volume's own disk fills: writers get ENOSPC, and nothing acknowledged is lost."""
    volume = make_volume(endpoint=proxy.endpoint)
    shutil.copytree(volume.path, small_disk / "volume")
    volume.path = small_disk / "volume"
    volume.mount_options = ["--cache-dir", str(volume.root.with_name("cache")), "-o", "store_timeout=3s"]
    volume.start()
    (volume.root / "first").write_bytes(b"first" * 1000)
    flush(volume)
    proxy.refuse()
    contents: dict[str, bytes] = {}
    with pytest.raises(OSError, match="No space left"):
        for number in range(100):
            fd = os.open(volume.root / str(number), os.O_WRONLY | os.O_CREAT)
            try:
                done = 0
                data = os.urandom(MIB)
                while done < MIB:
                    done += os.write(fd, data[done : done + (64 << 10)])
                    contents[str(number)] = data[:done]
            finally:
                os.close(fd)
    assert 4 < len(contents) < 24
    for name, data in contents.items():
        assert (volume.root / name).read_bytes() == data
    proxy.accept()
    flush(volume)
    (volume.root / "later").write_bytes(b"later" * 100_000)
    volume.stop()
    volume.lose_local()
    volume.start()
    for name, data in contents.items():
        assert (volume.root / name).read_bytes() == data
    assert (volume.root / "later").read_bytes() == b"later" * 100_000


@pytest.mark.parametrize("options", ["ro", "ro,passthrough=off"])
def test_complete_files_of_a_read_only_mount_are_read_by_the_kernel(make_volume: MakeVolume, options: str) -> None:
    volume = make_volume()
    volume.start()
    contents = {"whole": os.urandom(2 * MIB + 77), "part": os.urandom(9 * MIB), "inline": b"small"}
    for name, data in contents.items():
        (volume.root / name).write_bytes(data)
    with open(volume.root / "sparse", "wb") as file:
        file.truncate(MIB)
        file.write(b"head")
    contents["sparse"] = b"head" + bytes(MIB - 4)
    volume.stop()
    volume.lose_local()
    volume.mount_options = ["-o", options]
    volume.start()
    polefs("warmup", volume.root / "whole")
    with open(volume.root / "whole", "rb") as whole, open(volume.root / "part", "rb") as part:
        assert whole.read() == contents["whole"]
        assert (state(volume).hits == 0) == (options == "ro")
        assert part.read(5000) == contents["part"][:5000]
        with mmap.mmap(whole.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == contents["whole"]
        assert os.fstat(whole.fileno()).st_size == len(contents["whole"])
        polefs("cache", "--clear", volume.root)
        assert (state(volume).files > 0) == (options == "ro")
        drop_pages()
        for name, data in contents.items():
            assert (volume.root / name).read_bytes() == data
        whole.seek(MIB)
        assert whole.read() == contents["whole"][MIB:]
    for _ in range(200):
        ask(volume, control.ShrinkCache(0))
        if state(volume).files == 0:
            break
        time.sleep(0.05)  # the kernel tells of a close some time after it
    assert state(volume).files == 0
    with pytest.raises(OSError, match="Read-only"):
        (volume.root / "whole").write_bytes(b"")
