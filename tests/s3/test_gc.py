"""Garbage collection of volumes in a bucket: what is of no use goes, and nothing else, beside users and after kills."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawfuse.testing.server import ServerError
from tests.mounted.targets import REPOSITORY
from tests.s3.faults import Fault, FaultProxy
from tests.s3.server import BUCKET, SeaweedServer
from tests.s3.volumes import COMMAND_SECONDS, S3Volume, polefs

MakeVolume = Callable[..., S3Volume]


def gc(volume: S3Volume, *options: str, mounted: bool = False) -> dict[str, Any]:
    said = polefs("gc", "--json", *options, *(() if mounted else volume._key), volume.root if mounted else volume.path)
    found: dict[str, Any] = json.loads(said)
    return found


def keys(server: SeaweedServer, volume: S3Volume) -> dict[str, int]:
    """The volume's objects, with their sizes."""
    prefix = f"{volume.place.prefix}/segments/"
    found = server.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return {each["Key"]: each["Size"] for each in found.get("Contents", ())}


def uploads(server: SeaweedServer, volume: S3Volume) -> int:
    found = server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=f"{volume.place.prefix}/")
    return len(found.get("Uploads", ()))


def leave_half(volume: S3Volume) -> dict[str, bytes]:
    """Files that share segments, of which the larger ones are removed when all are in the bucket; returns the others.
    How many segments they are depends on the time that it takes; less than half of all is left, so of one at least."""
    rng = random.Random(1)
    contents = {}
    for number in range(120):
        data = contents[f"f{number}"] = rng.randbytes(
            rng.randrange(*((50_000, 60_000) if number % 4 else (5000, 9000)))
        )
        (volume.root / f"f{number}").write_bytes(data)
    polefs("flush", volume.root)
    for number in range(120):
        if number % 4:
            (volume.root / f"f{number}").unlink()
            del contents[f"f{number}"]
    return contents


def read_all(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.deadline(180)
def test_a_volume_that_is_not_mounted(make_volume: MakeVolume, s3_server: SeaweedServer) -> None:
    volume = make_volume("--compress", "zstd")
    volume.start()
    contents = leave_half(volume)
    volume.stop()
    before = keys(s3_server, volume)
    client = s3_server.client()
    for number in (200, 201):  # reserved by the first mount, and never used
        client.put_object(Bucket=BUCKET, Key=f"{volume.place.prefix}/segments/0/{number:x}", Body=b"lost" * 10)
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{volume.place.prefix}/segments/0/ca")

    plan = gc(volume, "--dry-run")
    rewritten = plan["rewritten_segments"]
    assert plan["dry_run"] and 0 < rewritten <= len(before)
    assert 0 < plan["moved_bytes"] <= sum(map(len, contents.values()))
    assert (plan["dead_objects"], plan["lost_objects"], plan["uploads"]) == (0, 0, 0)
    assert len(keys(s3_server, volume)) == len(before) + 2

    done = gc(volume)
    dead = done["waiting_objects"]
    assert done["rewritten_segments"] == rewritten <= dead
    assert (done["dead_objects"], done["lost_objects"], done["uploads"]) == (0, 0, 0)
    assert keys(s3_server, volume).keys() > before.keys()

    done = gc(volume, "--grace", "0")
    after = keys(s3_server, volume)
    gone = before.keys() - after.keys()
    assert (done["dead_objects"], done["dead_bytes"]) == (dead, sum(before[key] for key in gone))
    assert (done["lost_objects"], done["lost_bytes"], done["uploads"], done["waiting_objects"]) == (2, 80, 1, 0)
    assert uploads(s3_server, volume) == 0
    assert len(gone) == dead
    assert sum(after.values()) < sum(before.values()) / 2
    volume.lose_local()
    volume.start()
    assert read_all(volume.root) == contents


@pytest.mark.deadline(180)
def test_the_cache_outlives_a_collection(make_volume: MakeVolume, tmp_path: Path) -> None:
    volume = make_volume(mount=("--cache-dir", str(tmp_path / "cache")))
    volume.start()
    contents = leave_half(volume)
    volume.stop()
    gc(volume, "--grace", "0")
    volume.start()
    assert read_all(volume.root) == contents
    assert "hit rate:    100.0 %" in polefs("cache", volume.root)


def gc_when_possible(volume: S3Volume) -> None:
    """It refuses while the last request to the store has failed: then it is asked again."""
    for _ in range(200):
        try:
            gc(volume, mounted=True)
        except ServerError as error:
            if "out of reach" not in str(error):
                raise
        else:
            return
    raise AssertionError("the store is never within reach")


@pytest.mark.deadline(180)
@pytest.mark.parametrize("passthrough", ["off", "read", "all"])
def test_beside_writers_and_readers(
    proxy: FaultProxy, make_volume: MakeVolume, s3_server: SeaweedServer, passthrough: str
) -> None:
    """While a tenth of the requests fails."""
    volume = make_volume(
        "--grace", "0", endpoint=proxy.endpoint, mount=("-o", f"gc_interval=1s,passthrough={passthrough}")
    )
    volume.start()
    contents = leave_half(volume)
    before = keys(s3_server, volume)
    assert before
    proxy.inject(Fault.RESET, share=0.05)
    proxy.inject(Fault.SLOW_DOWN, share=0.05)
    stop = threading.Event()
    failures: list[BaseException] = []
    found: list[dict[str, bytes]] = [{}, {}, {}]

    def work(which: int) -> None:
        try:
            use(which)
        except BaseException as error:
            failures.append(error)

    def use(which: int) -> None:
        rng = random.Random(which)
        contents = found[which]
        while not stop.is_set():
            name = f"{which}-{rng.randrange(12)}"
            path = volume.root / name
            match rng.choice(["write", "patch", "read", "remove", "copy", "sync"]):
                case "write":
                    contents[name] = rng.randbytes(rng.randrange(200_000))
                    path.write_bytes(contents[name])
                case "patch" if contents.get(name):
                    start = rng.randrange(len(contents[name]))
                    piece = rng.randbytes(5000)
                    with open(path, "r+b") as file:
                        file.seek(start)
                        file.write(piece)
                    old = contents[name]
                    contents[name] = old[:start] + piece + old[start + 5000 :]
                case "read" if name in contents:
                    assert path.read_bytes() == contents[name]
                case "remove" if name in contents:
                    path.unlink()
                    del contents[name]
                case "copy" if contents.get(name):
                    with open(path, "rb") as source, open(volume.root / f"{name}-copy", "wb") as target:
                        os.copy_file_range(source.fileno(), target.fileno(), len(contents[name]))
                    contents[f"{name}-copy"] = contents[name]
                case "sync" if name in contents:
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            gc_when_possible(volume)
            polefs("flush", volume.root)
            if before.keys() - keys(s3_server, volume).keys():
                break
        else:
            raise AssertionError("no half-dead segment goes")
        gc_when_possible(volume)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    for each in found:
        contents.update(each)
    assert read_all(volume.root) == contents
    volume.stop()
    proxy.heal()
    gc(volume)
    assert "note" not in volume.fsck("--data")
    volume.lose_local()
    volume.start()
    assert read_all(volume.root) == contents


@pytest.mark.deadline(180)
@pytest.mark.parametrize(("method", "path"), [("PUT", "segments"), ("POST", "delete")])
def test_kill_in_the_middle(
    proxy: FaultProxy, make_volume: MakeVolume, s3_server: SeaweedServer, method: str, path: str
) -> None:
    """Of an object that is being written, or of those that are being deleted."""
    volume = make_volume(endpoint=proxy.endpoint)
    volume.start()
    contents = leave_half(volume)
    proxy.inject(Fault.HANG, method=method, path=path)
    command = [sys.executable, "-m", "polefs", "gc", "--grace", "0", str(volume.root)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as collecting:
        try:
            proxy.wait_for(Fault.HANG)
            volume.kill()
            said = collecting.communicate(timeout=COMMAND_SECONDS)[1]
        finally:
            collecting.kill()
    assert collecting.returncode == 1
    assert said.startswith("polefs: ") and len(said.splitlines()) == 1
    proxy.heal()
    volume.start()
    assert read_all(volume.root) == contents
    polefs("flush", volume.root)
    gc(volume, "--grace", "0", mounted=True)
    assert sum(keys(s3_server, volume).values()) <= 2 * sum(map(len, contents.values()))
    assert read_all(volume.root) == contents


@pytest.mark.deadline(180)
def test_what_cannot_be_collected(proxy: FaultProxy, make_volume: MakeVolume) -> None:
    volume = make_volume("--encrypt", endpoint=proxy.endpoint, mount=("-o", "ro"))
    assert "there is no key" in polefs("gc", volume.path, code=1)
    proxy.refuse()
    said = polefs("gc", *volume._key, volume.path, code=1)
    assert "cannot connect to" in said and len(said.splitlines()) == 1
    proxy.accept()
    volume.start()
    assert "is mounted read-only" in polefs("gc", volume.root, code=1)
    said = polefs("gc", "--dry-run", volume.root)
    assert "half-dead: 0 objects would be rewritten, 0 B moved" in said
    assert "is no duration" in polefs("gc", "--grace", "long", volume.root, code=2)
