"""Mounts while the S3 server is away: what goes on, what waits, what gets an error and when; and nothing is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rawfuse.testing.syscalls import fails
from tests.s3.faults import Fault, FaultProxy
from tests.s3.server import SeaweedServer
from tests.s3.volumes import S3Volume, polefs

MakeVolume = Callable[..., S3Volume]

MIB = 1 << 20

pytestmark = pytest.mark.deadline(240)
"""They mount several times, and some wait for real time-outs."""

SHORT = ("-o", "store_timeout=1s")
"""For mounts during an outage that get errors."""

FAULTS = [None, Fault.SKEWED_CLOCK]
"""None: connections are refused."""
if os.environ.get("POLEFS_STRESS"):
    FAULTS += [Fault.HANG, Fault.INTERNAL_ERROR, Fault.TRICKLE, Fault.RESET, Fault.HALF_ANSWER]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_when_it_is_back(fd: int) -> None:
    """fsync, again and again while it fails because the server has not been found again."""
    for _ in range(60):
        try:
            os.fsync(fd)
            return
        except TimeoutError:
            pass
    os.fsync(fd)


def read_all(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def from_the_bucket(volume: S3Volume) -> dict[str, bytes]:
    """Everything, after all that is local has been lost but for the metadata."""
    volume.stop()
    volume.lose_local()
    volume.start()
    return read_all(volume.root)


def test_errors_after_the_deadline_and_nothing_lost(proxy: FaultProxy, make_volume: MakeVolume) -> None:
    """fsync and reads of what is not cached fail, everything else goes on; afterwards all is as if nothing had been."""
    volume = make_volume(endpoint=proxy.endpoint)
    volume.start()
    contents = {name: os.urandom(200_000) for name in ("far", "near", "late")}
    synced(volume.root / "far", contents["far"])
    volume.stop()
    volume.lose_local()
    volume.start()
    synced(volume.root / "near", contents["near"])
    volume.stop()
    proxy.refuse()
    volume.mount_options = [*SHORT]
    volume.start()
    with fails(errno.ETIMEDOUT):
        (volume.root / "far").read_bytes()
    assert (volume.root / "near").read_bytes() == contents["near"]
    with open(volume.root / "late", "w+b") as file, open(volume.root / "late", "rb") as other:
        file.write(contents["late"])
        file.flush()
        for each in (file, other, file):
            with fails(errno.ETIMEDOUT):
                os.fsync(each.fileno())
        assert other.read() == contents["late"]
        assert "bucket:      out of reach for " in polefs("status", volume.path)
        (volume.root / "late").rename(volume.root / "later")
        contents["later"] = contents.pop("late")
        proxy.accept()
        sync_when_it_is_back(other.fileno())
    volume.kill()
    volume.lose_local()
    volume.mount_options = []
    volume.start()
    assert read_all(volume.root) == contents


@pytest.mark.parametrize("fault", FAULTS)
def test_programs_go_on_when_it_is_back(
    proxy: FaultProxy, make_volume: MakeVolume, pool: ThreadPoolExecutor, fault: Fault | None
) -> None:
    """Without a deadline nobody gets an error of what may pass: neither writers and fsync nor readers."""
    volume = make_volume(endpoint=proxy.endpoint, mount=("--store-timeout", "0"))
    volume.start()
    contents = {f"far{number}": os.urandom(100_000) for number in range(4)}
    for name, data in contents.items():
        synced(volume.root / name, data)
    volume.stop()
    volume.lose_local()
    volume.start()
    contents["near"] = os.urandom(MIB)
    synced(volume.root / "near", contents["near"])
    if fault is None:
        proxy.refuse()
    else:
        proxy.inject(fault)
    passes = fault is not Fault.SKEWED_CLOCK
    new = {f"new{number}": os.urandom(50_000 + 400_000 * (number % 2)) for number in range(4)}
    writers = [pool.submit(synced, volume.root / name, data) for name, data in new.items()]
    readers = {name: pool.submit((volume.root / name).read_bytes) for name in contents if name != "near"}
    if passes:
        for _ in range(20):
            assert (volume.root / "near").read_bytes() == contents["near"]
        (volume.root / "written").write_bytes(b"during the outage")
        assert not any(each.done() for each in [*writers, *readers.values()])
    else:
        for each in [*writers, *readers.values()]:
            error = each.exception()
            assert isinstance(error, OSError) and error.errno == errno.EIO
        (volume.root / "written").write_bytes(b"during the outage")
    contents["written"] = b"during the outage"
    contents |= new
    if fault is None:
        proxy.accept()
    else:
        proxy.heal()
    if passes:
        for writer in writers:
            writer.result()
        assert {name: reader.result() for name, reader in readers.items()} == {name: contents[name] for name in readers}
    assert read_all(volume.root) == contents
    assert from_the_bucket(volume) == contents


def test_unmounting_says_what_is_left_and_the_next_mount_goes_on(proxy: FaultProxy, make_volume: MakeVolume) -> None:
    volume = make_volume(endpoint=proxy.endpoint, mount=SHORT)
    volume.start()
    proxy.refuse()
    data = os.urandom(3 * MIB)
    (volume.root / "file").write_bytes(data)
    said = polefs("umount", volume.root, code=1)
    assert "3.0 MiB could not be written back" in said
    assert "all of it is kept in" in said and "goes up at the next mount" in said
    assert volume.ended() == 1
    # Mounted while it is still away: what is left is there, and more is taken.
    volume.start()
    assert "mounted all the same" in volume.log()
    assert (volume.root / "file").read_bytes() == data
    (volume.root / "more").write_bytes(data[::-1])
    volume.kill()
    volume.start()
    assert read_all(volume.root) == {"file": data, "more": data[::-1]}
    proxy.accept()
    volume.mount_options = []
    assert from_the_bucket(volume) == {"file": data, "more": data[::-1]}


def test_a_mount_in_the_background_warns(proxy: FaultProxy, make_volume: MakeVolume) -> None:
    volume = make_volume(endpoint=proxy.endpoint)
    volume.root.mkdir()
    proxy.refuse()
    said = polefs("mount", *SHORT, volume.path, volume.root)
    try:
        assert said.startswith("polefs: mounted all the same: ") and "cannot connect to" in said
        assert len(said.splitlines()) == 1
        (volume.root / "file").write_bytes(b"x" * 100_000)
        proxy.accept()
    finally:
        polefs("umount", "--lazy", volume.root)
    volume.start()
    assert (volume.root / "file").read_bytes() == b"x" * 100_000


def test_a_bucket_that_turns_out_to_be_anothers_gets_nothing(
    proxy: FaultProxy, make_volume: MakeVolume, s3_server: SeaweedServer
) -> None:
    """It was away when the volume was mounted."""
    volume = make_volume(endpoint=proxy.endpoint)
    client = s3_server.client()
    key = f"{volume.place.prefix}/polefs.json"
    marker = client.get_object(Bucket=volume.place.bucket, Key=key)["Body"].read()
    client.put_object(Bucket=volume.place.bucket, Key=key, Body=marker.replace(b'"uuid":"', b'"uuid":"0'))
    proxy.refuse()
    volume.start()
    proxy.accept()
    with open(volume.root / "file", "wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        with fails(errno.EIO):
            os.fsync(file.fileno())
        found = client.list_objects_v2(Bucket=volume.place.bucket, Prefix=volume.place.prefix)["Contents"]
        assert [each["Key"] for each in found] == [key]
        client.put_object(Bucket=volume.place.bucket, Key=key, Body=marker)
        os.fsync(file.fileno())


def test_the_server_is_killed_and_comes_back(make_volume: MakeVolume, s3_server: SeaweedServer) -> None:
    """The real one, under writers."""
    volume = make_volume(mount=("--store-timeout", "0"))
    volume.start()
    contents: dict[str, bytes] = {}
    stop = threading.Event()
    done = threading.Semaphore(0)

    def write(number: int) -> None:
        for count in range(1000):
            if stop.is_set():
                break
            data = os.urandom(150_000)
            synced(volume.root / f"{number}-{count}", data)
            contents[f"{number}-{count}"] = data
            done.release()

    with ThreadPoolExecutor(3) as writers:
        running = [writers.submit(write, number) for number in range(3)]
        try:
            for _ in range(10):
                assert done.acquire(timeout=60)
            s3_server.kill()
        finally:
            stop.set()
            s3_server.start()
        for each in running:
            each.result()
    volume.kill()
    volume.lose_local()
    volume.start()
    found = read_all(volume.root)
    assert {name: found[name] for name in contents} == contents


@pytest.fixture
def small_disk(fuse_namespace: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,huge=never", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_waits_for_the_bucket(small_disk: Path, proxy: FaultProxy, make_volume: MakeVolume) -> None:
    """Far more is written than there is room for; only while the bucket is away there comes a time for ENOSPC."""
    volume = make_volume(endpoint=proxy.endpoint, disk=small_disk, mount=("--dirty-limit", "1G"))
    volume.start()
    contents = {str(number): os.urandom(5 * MIB) for number in range(12)}
    contents |= {f"small{number}": os.urandom(50_000) for number in range(200)}
    for name, data in contents.items():
        (volume.root / name).write_bytes(data)
    volume.stop()
    proxy.refuse()
    volume.mount_options += SHORT
    volume.start()
    # The cache gives way, and then there is nothing more that could.
    written = 0
    with fails(errno.ENOSPC), open(volume.root / "last", "wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
            written += 1
    assert written > 20
    # Removing needs no room.
    (volume.root / "last").unlink()
    (volume.root / "1").write_bytes(b"over")
    contents["1"] = b"over"
    proxy.accept()
    assert from_the_bucket(volume) == contents
