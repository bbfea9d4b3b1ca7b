"""Volumes in a bucket: what is written comes back from S3 alone, however it is stored."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rawfuse.testing.syscalls import fails
from tests.s3.faults import Fault, FaultProxy
from tests.s3.server import BUCKET, SeaweedServer
from tests.s3.volumes import S3Volume, polefs

MakeVolume = Callable[..., S3Volume]

CODINGS = {"plain": (), "lz4": ("--compress", "lz4"), "zstd-encrypted": ("--compress", "zstd", "--encrypt")}


def fill(root: Path, seed: int) -> dict[str, bytes]:
    """Files of many kinds; returns what they hold."""
    rng = random.Random(seed)
    contents: dict[str, bytes] = {}

    def put(name: str, data: bytes) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
        contents[name] = data

    put("empty", b"")
    put("inline", b"small" * 100)
    put("text", b"all work and no play makes jack a dull boy\n" * 50_000)
    put("random", rng.randbytes(9_000_000))
    put("odd", rng.randbytes(4 << 20) + b"x")
    for number in range(100):
        put(f"many/{number}", rng.randbytes(rng.randrange(1, 30_000)))
    with open(root / "sparse", "wb") as file:
        file.seek(3_000_000)
        file.write(b"island" * 10_000)
        file.truncate(9_000_000)
    contents["sparse"] = bytes(3_000_000) + b"island" * 10_000 + bytes(9_000_000 - 3_060_000)
    data = bytearray(rng.randbytes(3_000_000))
    with open(root / "patched", "w+b") as file:
        file.write(data)
        os.fsync(file.fileno())
        for _ in range(60):
            start, piece = rng.randrange(len(data)), rng.randbytes(rng.randrange(1, 9000))
            file.seek(start)
            file.write(piece)
            data[start : start + len(piece)] = piece
    contents["patched"] = bytes(data)
    return contents


def read_all(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("coding", CODINGS)
def test_everything_comes_back_from_the_bucket(make_volume: MakeVolume, coding: str, s3_server: SeaweedServer) -> None:
    volume = make_volume(*CODINGS[coding])
    volume.start()
    contents = fill(volume.root, 1)
    assert read_all(volume.root) == contents
    volume.stop()
    volume.lose_local()
    volume.start()
    assert read_all(volume.root) == contents
    rng = random.Random(2)
    with open(volume.root / "random", "rb") as file:
        for _ in range(30):
            start = rng.randrange(len(contents["random"]))
            file.seek(start)
            assert file.read(5000) == contents["random"][start : start + 5000]
    volume.stop()
    objects = s3_server.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{volume.place.prefix}/segments/")["Contents"]
    assert len(objects) < 20
    saved = (
        sum(map(len, contents.values())) - (len(contents["sparse"]) - 60_000) - sum(each["Size"] for each in objects)
    )
    assert (saved > 1_000_000) == (coding != "plain")
    if "encrypted" in coding:
        for each in objects:
            body = s3_server.client().get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read()
            assert b"jack a dull boy" not in body
            assert b"island" not in body


def test_what_was_synced_is_in_the_bucket(make_volume: MakeVolume) -> None:
    """Not only on this machine: the daemon is killed, and its journal and replicas are lost."""
    volume = make_volume()
    volume.start()
    contents = {name: os.urandom(size) for name, size in (("tiny", 100), ("small", 30_000), ("big", 3_000_000))}
    for name, data in contents.items():
        with open(volume.root / name, "wb") as file:
            for part in (data[:50], data[50:]):
                file.write(part)
                file.flush()
                os.fsync(file.fileno())
    volume.kill()
    volume.lose_local()
    volume.start()
    assert read_all(volume.root) == contents


def test_permissions_taken_away_while_it_is_mounted(proxy: FaultProxy, make_volume: MakeVolume) -> None:
    """Programs get the errno that the system calls have, and nothing is lost for it."""
    volume = make_volume(endpoint=proxy.endpoint)
    volume.start()
    (volume.root / "old").write_bytes(b"old" * 100_000)
    volume.stop()
    volume.lose_local()
    volume.start()
    with open(volume.root / "new", "wb") as file:
        file.write(b"new" * 100_000)
        file.flush()
        proxy.inject(Fault.ACCESS_DENIED)
        with fails(errno.EIO):
            (volume.root / "old").read_bytes()
        with fails(errno.EIO):
            os.fsync(file.fileno())
        proxy.heal()
        os.fsync(file.fileno())
    assert "no permission: allow the key" in volume.log()
    assert (volume.root / "old").read_bytes() == b"old" * 100_000
    volume.stop()
    volume.lose_local()
    volume.start()
    assert (volume.root / "new").read_bytes() == b"new" * 100_000


def test_the_key_of_an_encrypted_volume(make_volume: MakeVolume) -> None:
    volume = make_volume("--encrypt")
    text = (volume.path / "volume.json").read_text()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    assert set(json.loads(text)["contents"]["key"]) == {"salt", "wrapped", "n", "r", "p"}
    mount = ("mount", volume.path, volume.root)
    volume.root.mkdir()
    assert "there is no key: give --key-file FILE" in polefs(*mount, code=1)
    wrong = volume.key_file.with_name("wrong")
    wrong.write_bytes(b"something else")
    assert "this is not the key of volume" in polefs(*mount, "--key-file", wrong, code=1)
    assert "this is not the key of volume" in polefs(*mount, code=1, POLEFS_PASSPHRASE="something else")
    assert "there is no key" in polefs("fsck", "--data", volume.path, code=8)
    assert "clean" in polefs("fsck", volume.path)


def test_a_passphrase_from_the_environment(monkeypatch: pytest.MonkeyPatch, make_volume: MakeVolume) -> None:
    volume = make_volume()
    place = f"{volume.place.url}-other"
    other = volume.path.with_name("other")
    arguments = ("--store", place, "--endpoint", volume.place.endpoint, "--encrypt", other)
    assert "fewer than 8 bytes" in polefs("format", *arguments, code=1, POLEFS_PASSPHRASE="short")
    monkeypatch.setenv("POLEFS_PASSPHRASE", "long enough")
    polefs("format", *arguments)
    volume.path = other
    volume.start()
    (volume.root / "file").write_bytes(b"x" * 10_000)
    volume.stop()
    volume.start()
    assert (volume.root / "file").read_bytes() == b"x" * 10_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--compress", "zstd"], "give --store"),
        (["--encrypt"], "give --store"),
        (["--durability", "s3"], "give --store"),
        (["--store", "s3://test/p", "--compress", "gzip"], "give --compress zstd, lz4 or none"),
        (["--store", "s3://test/p", "--durability", "never"], "--durability s3 or local"),
        (["--store", "s3://test/p", "--key-file", "/dev/null"], "give --encrypt too"),
        (["--store", "s3://test/p", "--encrypt", "--key-file", "/dev/null"], "is empty"),
        (["--store", "http://test/p"], "write it like s3://bucket/prefix"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: list[str], says: str) -> None:
    said = polefs("format", *options, tmp_path / "v", code=None)
    assert says in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "v" / "volume.json").exists()
