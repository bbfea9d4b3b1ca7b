"""Files that the kernel reads and writes itself: passthrough on volumes in a bucket that can be written to."""

from __future__ import annotations

import mmap
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polefs.node import control
from rawfuse.testing.fixtures import deadline_of, make_scratch
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import STRESS
from tests.s3.helpers import all_of, use
from tests.s3.server import SeaweedServer
from tests.s3.test_cache import ask, flush
from tests.s3.volumes import S3Volume, polefs

MakeVolume = Callable[..., S3Volume]

MIB = 1 << 20

pytestmark = pytest.mark.deadline(240)

ALL = ("-o", "passthrough=all")


@pytest.fixture(scope="module")
def shared(s3_server: SeaweedServer, fuse_watchdog: Watchdog) -> Iterator[S3Volume]:
    """A mount that most tests use one after the other."""
    scratch = make_scratch("polefs-s3-direct")
    volume = S3Volume(scratch / "0", fuse_watchdog, s3_server.new_place(), None)
    volume.mount_options = [*ALL]
    try:
        volume.format()
        yield volume
        volume.finish()
    finally:
        volume.discard()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def volume(shared: S3Volume, fuse_watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[S3Volume]:
    with fuse_watchdog.deadline(deadline_of(request)):
        if shared.server is None:
            shared.start()
        yield shared


@pytest.fixture
def path(volume: S3Volume, request: pytest.FixtureRequest) -> Path:
    """Of a file that is not there yet."""
    return volume.root / request.node.name


class Trace:
    """The wire log of a mount: how many requests of a kind have come."""

    def __init__(self, volume: S3Volume) -> None:
        self._path = volume.path.parent / "trace"
        volume.mount_options += ["--trace", str(self._path)]

    def count(self, *names: str) -> int:
        lines = self._path.read_text(errors="replace").splitlines()
        return sum(any(f" {name} " in line for name in names) for line in lines)

    def passed(self) -> int:
        """How many handles were passed through."""
        return len(re.findall(r"backing_id=[1-9]", self._path.read_text(errors="replace")))


def settle(volume: S3Volume) -> None:
    """Let what is written be committed and cached, and no journal tell of it."""
    for _ in range(2):
        flush(volume)


def copy_of(path: Path) -> bytes:
    """Its contents, read by another process."""
    return subprocess.run(["cat", path], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("mode", ["read", "all"])
def test_the_kernel_serves_what_the_option_says(make_volume: MakeVolume, mode: str) -> None:
    volume = make_volume(mount=("-o", f"passthrough={mode}"))
    trace = Trace(volume)
    volume.start()
    path = volume.root / "file"
    data = os.urandom(3 * MIB + 5)
    with open(path, "w+b", buffering=0) as file:
        assert file.write(data) == len(data)
        assert os.fstat(file.fileno()).st_size == len(data)
        assert (trace.count("WRITE") == 0) == (mode == "all")
        file.seek(0)
        assert file.read(len(data)) == data
        assert (trace.count("READ") == 0) == (mode == "all")
    assert copy_of(path) == data
    settle(volume)
    passed = trace.passed()
    assert copy_of(path) == data
    assert trace.passed() == passed + 1
    volume.stop()
    volume.lose_local()
    volume.start()
    assert copy_of(path) == data


def test_readers_and_writers_beside_each_other(volume: S3Volume, path: Path) -> None:
    """Whoever has it open sees at once what others do to it, in whatever way."""
    data = bytearray(os.urandom(MIB))
    path.write_bytes(data)
    settle(volume)
    with open(path, "rb", buffering=0) as reader, mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as seen:
        with open(path, "r+b", buffering=0) as writer, mmap.mmap(writer.fileno(), 0) as mapped:
            data[5:9] = b"here"
            writer.seek(5)
            writer.write(b"here")
            assert seen[:] == data
            data[70_000:70_005] = b"there"
            mapped[70_000:70_005] = b"there"
            assert reader.read() == data
            assert copy_of(path) == data
            flush(volume)
            data[70_000:70_005] = b"THERE"
            mapped[70_000:70_005] = b"THERE"
            assert os.stat(path).st_mtime_ns == os.fstat(reader.fileno()).st_mtime_ns
        os.truncate(path, MIB + 4096)
        data += bytes(4096)
        reader.seek(0)
        assert reader.read() == data
        os.truncate(path, 100_000)
        del data[100_000:]
        reader.seek(0)
        assert reader.read() == data
        assert os.stat(path).st_size == 100_000
    volume.stop()
    volume.lose_local()
    volume.start()
    assert path.read_bytes() == data


def test_what_is_held_becomes_direct_by_a_truncation(volume: S3Volume, path: Path) -> None:
    data = os.urandom(MIB)
    path.write_bytes(data)
    settle(volume)
    with open(path, "rb", buffering=0) as reader:
        assert reader.read(10) == data[:10]
        os.truncate(path, 12_345)
        reader.seek(0)
        assert reader.read() == data[:12_345]
        assert os.fstat(reader.fileno()).st_size == 12_345
    volume.stop()
    volume.lose_local()
    volume.start()
    assert path.read_bytes() == data[:12_345]


def test_only_changes_are_written_back(volume: S3Volume, path: Path) -> None:
    data = bytearray(os.urandom(8 * MIB))
    path.write_bytes(data)
    settle(volume)
    objects = stored(volume)
    with open(path, "r+b", buffering=0) as file:
        assert file.read(100) == data[:100]
    flush(volume)
    assert stored(volume) == objects
    with open(path, "r+b", buffering=0) as file:
        file.seek(5 * MIB)
        file.write(b"changed")
        data[5 * MIB : 5 * MIB + 7] = b"changed"
        os.fsync(file.fileno())
        new = {key: size for key, size in stored(volume).items() if key not in objects}
        assert sum(new.values()) == 128 << 10
    volume.stop()
    volume.lose_local()
    volume.start()
    assert path.read_bytes() == data


def stored(volume: S3Volume) -> dict[str, int]:
    """The volume's objects with their sizes."""
    return use(volume.place, lambda store: all_of(store.list("")))


def test_set_id_bits_are_cleared_by_a_write(volume: S3Volume, path: Path) -> None:
    data = os.urandom(MIB)
    path.write_bytes(data)
    os.chmod(path, 0o6777)
    settle(volume)
    with open(path, "rb", buffering=0) as reader:
        code = "import os, sys; os.setuid(65534); open(sys.argv[1], 'r+b').write(b'x')"
        os.chmod(volume.root, 0o777)
        os.chmod(volume.path.parent, 0o755)
        subprocess.run([sys.executable, "-c", code, path], check=True)
        assert os.stat(path).st_mode & 0o7777 == 0o777
        assert reader.read() == b"x" + data[1:]


def test_times(volume: S3Volume, path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(b"x" * MIB)
        first = os.stat(path).st_mtime_ns
        file.write(b"y")
        assert os.stat(path).st_mtime_ns > first
        os.utime(path, ns=(5, 123_456_789))
        assert os.stat(path).st_mtime_ns == 123_456_789
    flush(volume)
    assert os.stat(path).st_mtime_ns == 123_456_789
    assert os.stat(path).st_atime_ns == 5
    volume.stop()
    volume.start()
    assert os.stat(path).st_mtime_ns == 123_456_789
    assert os.stat(path).st_ctime_ns > 10**18


def test_a_file_that_is_removed_while_it_is_open(volume: S3Volume, path: Path) -> None:
    with open(path, "w+b", buffering=0) as file:
        file.write(b"a" * MIB)
        path.unlink()
        flush(volume)
        file.write(b"b" * MIB)
        file.seek(MIB - 1)
        assert file.read(2) == b"ab"
        assert os.fstat(file.fileno()).st_size == 2 * MIB
    flush(volume)


def test_a_program_that_was_just_written(volume: S3Volume, path: Path) -> None:
    with open(path, "wb") as file:
        file.write(Path("/bin/true").read_bytes())
        os.fchmod(file.fileno(), 0o755)
        file.flush()
        with pytest.raises(OSError, match="busy"):
            subprocess.run([path], check=True)
    subprocess.run([path], check=True)
    settle(volume)
    subprocess.run([path], check=True)


def test_a_limit_holds(make_volume: MakeVolume) -> None:
    volume = make_volume("--capacity", "8M", mount=ALL)
    volume.start()
    path = volume.root / "file"
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        for _ in range(64):
            file.write(bytes(MIB))
    path.unlink()
    path.write_bytes(b"z" * MIB)
    settle(volume)
    with open(path, "rb") as reader, open(path, "ab", buffering=0) as writer:
        with pytest.raises(OSError, match="space"):
            for _ in range(64):
                writer.write(bytes(MIB))
        assert reader.read(1) == b"z"


@pytest.mark.parametrize("durability", ["s3", "local"])
def test_nothing_written_is_lost_with_the_daemon(make_volume: MakeVolume, durability: str) -> None:
    volume = make_volume("--durability", durability, mount=ALL)
    volume.start()
    new, old = volume.root / "new", volume.root / "old"
    contents = {new: bytearray(), old: bytearray(os.urandom(MIB))}
    old.write_bytes(contents[old])
    settle(volume)
    randoms = random.Random(1)
    with open(new, "w+b", buffering=0) as made, open(old, "r+b", buffering=0) as changed:
        for file, path in ((made, new), (changed, old)):
            data = contents[path]
            for step in range(40):
                offset = randoms.randrange(2 * MIB)
                part = randoms.randbytes(randoms.randrange(1, 100_000))
                file.seek(offset)
                file.write(part)
                data.extend(bytes(max(0, offset - len(data))))
                data[offset : offset + len(part)] = part
                if step % 15 == 14:
                    os.fsync(file.fileno())
            with mmap.mmap(file.fileno(), 0) as mapped:
                mapped[1000:1004] = data[1000:1004] = b"map!"
        volume.kill()
    volume.start()
    for path, data in contents.items():
        assert path.read_bytes() == data
    volume.stop()
    volume.lose_local()
    volume.start()
    for path, data in contents.items():
        assert path.read_bytes() == data


def changes(randoms: random.Random, file: int, other: int) -> Iterator[None]:
    """Do the same random things to two files."""
    while True:
        size = os.fstat(other).st_size
        assert os.fstat(file).st_size == size
        offset = randoms.randrange(max(size, 1) + 50_000)
        length = randoms.randrange(1, 90_000)
        data = randoms.randbytes(length)
        match randoms.randrange(7):
            case 0 | 1:
                for fd in (file, other):
                    os.pwrite(fd, data, offset)
            case 2:
                for fd in (file, other):
                    os.ftruncate(fd, offset)
            case 3 if size:
                start = randoms.randrange(size)
                part = data[: size - start]
                for fd in (file, other):
                    with mmap.mmap(fd, size) as mapped:
                        mapped[start : start + len(part)] = part
            case 4:
                for fd in (file, other):
                    os.posix_fallocate(fd, offset, length)
            case 5:
                os.fsync(file)
            case _:
                assert os.pread(file, length, offset) == os.pread(other, length, offset)
        yield


@pytest.mark.parametrize("seed", range(40 if STRESS else 2))
def test_it_behaves_as_a_local_file(make_volume: MakeVolume, tmp_path: Path, seed: int) -> None:
    """Random changes, of open files, of files opened again, over restarts and kills of the daemon."""
    volume = make_volume(mount=ALL)
    volume.start()
    path, other = volume.root / "file", tmp_path / "other"
    randoms = random.Random(seed)
    for round_number in range(5):
        flags = os.O_RDWR | os.O_CREAT
        file, same = os.open(path, flags), os.open(other, flags)
        try:
            work = changes(randoms, file, same)
            for _ in range(60):
                next(work)
            if round_number % 2:
                volume.kill()
        finally:
            os.close(file)
            os.close(same)
        if round_number % 2:
            volume.start()
        elif randoms.randrange(2):
            flush(volume)
        assert path.read_bytes() == other.read_bytes()
    volume.stop()
    volume.lose_local()
    volume.start()
    assert path.read_bytes() == other.read_bytes()


def test_the_cache_can_be_shrunk_beside_it(volume: S3Volume, path: Path) -> None:
    data = os.urandom(2 * MIB)
    path.write_bytes(data)
    settle(volume)
    with open(path, "r+b", buffering=0) as file:
        polefs("cache", "--clear", volume.root)
        file.write(b"again")
        file.seek(0)
        assert file.read() == b"again" + data[5:]
    flush(volume)
    ask(volume, control.ShrinkCache(0))
    assert path.read_bytes() == b"again" + data[5:]


@pytest.mark.parametrize("mode", ["off", "read", "all"])
def test_a_file_that_is_opened_to_be_written_anew(make_volume: MakeVolume, mode: str) -> None:
    """O_TRUNC takes all that was there away, whoever serves the file."""
    volume = make_volume(mount=("-o", f"passthrough={mode}"))
    volume.start()
    path = volume.root / "f"
    for size in (300_000, 200_000, 5, 140_000, 0):
        contents = os.urandom(size)
        path.write_bytes(contents)
        assert path.read_bytes() == contents
        polefs("flush", volume.root)
        assert path.read_bytes() == contents
