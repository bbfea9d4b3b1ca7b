"""Contents: reading and writing in every way that Linux offers, compared with a plain byte array."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from rawfuse.testing.peer import Peer
from rawfuse.testing.syscalls import (
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    append_file,
    fails,
    fallocate,
    opened,
    read_file,
    write_file,
)

RW = os.O_RDWR | os.O_CREAT
PAGE = mmap.PAGESIZE


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes that differ at every place and between seeds."""
    return random.Random(seed).randbytes(size)


class TestReadWrite:
    @pytest.mark.parametrize("size", [1, 2, 4095, 4096, 4097, 65536, 131072, 1 << 20, (1 << 20) + 1, 5_000_011])
    def test_whole(self, root: Path, size: int) -> None:
        data = pattern(size)
        write_file(root / "f", data)
        assert read_file(root / "f") == data
        assert (root / "f").stat().st_size == size

    def test_empty(self, root: Path) -> None:
        write_file(root / "f")
        assert read_file(root / "f") == b""
        with opened(root / "f") as fd:
            assert os.pread(fd, 10, 0) == b""
            assert os.pread(fd, 10, 1 << 40) == b""

    def test_reads_end_at_the_end(self, root: Path) -> None:
        write_file(root / "f", b"0123456789")
        with opened(root / "f") as fd:
            assert os.pread(fd, 100, 0) == b"0123456789"
            assert os.pread(fd, 100, 9) == b"9"
            assert os.pread(fd, 100, 10) == b""

    @pytest.mark.parametrize("block", [1, 7, 512, 4096, 5000, 65536])
    def test_small_steps(self, root: Path, block: int) -> None:
        data = pattern(min(block * 300, 300_000))
        with opened(root / "f", RW) as fd:
            for at in range(0, len(data), block):
                assert os.write(fd, data[at : at + block]) == len(data[at : at + block])
            os.lseek(fd, 0, os.SEEK_SET)
            got = b"".join(iter(lambda: os.read(fd, block), b""))
        assert got == data

    def test_backwards(self, root: Path) -> None:
        data = pattern(400_000)
        with opened(root / "f", RW) as fd:
            for at in reversed(range(0, len(data), 10_000)):
                os.pwrite(fd, data[at : at + 10_000], at)
            got = b"".join(reversed([os.pread(fd, 10_000, at) for at in reversed(range(0, len(data), 10_000))]))
        assert got == data

    def test_vectors(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            assert os.writev(fd, [b"abc", b"", b"defg"]) == 7
            assert os.pwritev(fd, [b"X", b"Y"], 3) == 2
            parts = [bytearray(2), bytearray(3), bytearray(10)]
            assert os.preadv(fd, parts, 0) == 7
        assert b"".join(parts)[:7] == b"abcXYfg"

    def test_overwrite_in_place(self, root: Path) -> None:
        model = bytearray(pattern(200_000))
        write_file(root / "f", model)
        with opened(root / "f", os.O_RDWR) as fd:
            for number in range(200):
                at = (number * 7919) % 199_000
                piece = pattern(number * 5, number)
                os.pwrite(fd, piece, at)
                model[at : at + len(piece)] = piece
                if number % 40 == 0:
                    os.fsync(fd)
        assert read_file(root / "f") == model

    def test_two_descriptors_see_each_other(self, root: Path) -> None:
        with opened(root / "f", RW) as one, opened(root / "f", os.O_RDWR) as two:
            os.write(one, b"first")
            assert os.read(two, 10) == b"first"
            os.write(two, b"second")
            assert os.read(one, 10) == b"second"
            os.ftruncate(one, 3)
            assert os.fstat(two).st_size == 3
            assert os.pread(two, 10, 0) == b"fir"

    def test_two_processes_see_each_other(self, root: Path) -> None:
        with Peer() as peer, opened(root / "f", RW) as fd:
            there = peer.call(os.open, root / "f", os.O_RDWR)
            for number in range(50):
                data = str(number).encode()
                os.pwrite(fd, data, number * 100)
                assert peer.call(os.pread, there, 10, number * 100) == data
                peer.call(os.pwrite, there, b"back", number * 100 + 50)
                assert os.pread(fd, 4, number * 100 + 50) == b"back"

    @pytest.mark.fuse_needs("links")
    def test_hard_links_share_contents(self, root: Path) -> None:
        write_file(root / "a", b"one")
        os.link(root / "a", root / "b")
        append_file(root / "b", b" two")
        assert read_file(root / "a") == b"one two"

    def test_sync_calls(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * 10_000)
            os.fsync(fd)
            os.fdatasync(fd)
        with opened(root) as directory:
            os.fsync(directory)
        with opened(root / "s", RW | os.O_SYNC) as fd:
            assert os.write(fd, b"synchronous") == 11
        with opened(root / "s", os.O_RDWR | os.O_DSYNC) as fd:
            assert os.pwrite(fd, b"S", 0) == 1
        assert read_file(root / "s") == b"Synchronous"

    def test_sendfile_and_splice(self, root: Path) -> None:
        data = pattern(300_000)
        write_file(root / "a", data)
        with opened(root / "a") as source, opened(root / "b", RW) as target:
            sent = 0
            while sent < len(data):
                sent += os.sendfile(target, source, sent, len(data) - sent)
        assert read_file(root / "b") == data


class TestFlags:
    def test_append(self, root: Path) -> None:
        write_file(root / "f", b"start")
        with opened(root / "f", os.O_RDWR | os.O_APPEND) as fd:
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, b"1")
            append_file(root / "f", b"2")
            os.write(fd, b"3")
            assert os.pwrite(fd, b"4", 0) == 1  # Linux appends here too: pwrite(2), BUGS
        assert read_file(root / "f") == b"start1234"

    def test_append_by_many_processes(self, root: Path) -> None:
        write_file(root / "f")
        peers = [Peer() for _ in range(4)]
        try:
            for number, peer in enumerate(peers):
                peer.start(_append_lines, root / "f", number, 200)
            for peer in peers:
                peer.result()
        finally:
            for peer in peers:
                peer.close()
        lines = read_file(root / "f").decode().splitlines()
        assert len(lines) == 800
        for number in range(4):
            own = [line for line in lines if line.startswith(f"{number}:")]
            assert own == [f"{number}:{count}:" + "x" * (count % 50) for count in range(200)]

    @pytest.mark.fuse_needs("allocation")
    def test_truncate_on_open(self, root: Path) -> None:
        write_file(root / "f", b"contents")
        with opened(root / "f", os.O_RDWR | os.O_TRUNC) as fd:
            assert os.fstat(fd).st_size == 0
            assert os.read(fd, 10) == b""
        assert (root / "f").stat().st_blocks == 0

    def test_path_descriptor(self, root: Path) -> None:
        write_file(root / "f", b"x")
        with opened(root / "f", os.O_PATH) as fd:
            assert os.fstat(fd).st_size == 1
            with fails(errno.EBADF):
                os.read(fd, 1)

    def test_direct(self, root: Path) -> None:
        data = pattern(1 << 20)
        buffer = mmap.mmap(-1, 1 << 20)
        buffer[:] = data
        with opened(root / "f", RW | os.O_DIRECT) as fd:
            assert os.pwritev(fd, [buffer], 0) == 1 << 20
            back = mmap.mmap(-1, 1 << 20)
            assert os.preadv(fd, [back], 0) == 1 << 20
            assert back[:] == data
            part = mmap.mmap(-1, 8192)
            assert os.preadv(fd, [part], (1 << 20) - 4096) == 4096
            assert part[:4096] == data[-4096:]
            assert os.preadv(fd, [part], 1 << 20) == 0
        assert read_file(root / "f") == data

    def test_direct_beside_buffered(self, root: Path) -> None:
        write_file(root / "f", b"a" * 65536)
        block = mmap.mmap(-1, 4096)
        with opened(root / "f", os.O_RDWR | os.O_DIRECT) as direct, opened(root / "f", os.O_RDWR) as buffered:
            assert os.pread(buffered, 4096, 8192) == b"a" * 4096
            block[:] = b"b" * 4096
            os.pwritev(direct, [block], 8192)
            assert os.pread(buffered, 4096, 8192) == b"b" * 4096
            os.pwrite(buffered, b"c" * 4096, 8192)
            os.preadv(direct, [block], 8192)
            assert block[:] == b"c" * 4096


def _append_lines(path: Path, number: int, count: int) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        for line in range(count):
            os.write(fd, f"{number}:{line}:{'x' * (line % 50)}\n".encode())


class TestTruncate:
    def test_both_ways(self, root: Path) -> None:
        data = pattern(100_000)
        model = bytearray(data)
        write_file(root / "f", data)
        for size in (99_999, 4097, 4096, 4095, 1, 100_000, 0, 5, 200_000, 65_536, 65_537):
            os.truncate(root / "f", size)
            model = model[:size] + bytes(max(0, size - len(model)))
            assert (root / "f").stat().st_size == size
            assert read_file(root / "f") == model

    def test_cut_bytes_do_not_come_back(self, root: Path) -> None:
        for sync in (False, True):
            with opened(root / f"f{sync}", RW) as fd:
                os.write(fd, b"x" * 10_000)
                if sync:
                    os.fsync(fd)
                os.ftruncate(fd, 100)
                if sync:
                    os.fsync(fd)
                os.ftruncate(fd, 10_000)
                assert os.pread(fd, 20_000, 0) == b"x" * 100 + bytes(9_900)

    def test_write_past_the_end_after_a_cut(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.write(fd, b"x" * 10_000)
            os.ftruncate(fd, 10)
            os.pwrite(fd, b"end", 9_000)
            assert os.pread(fd, 20_000, 0) == b"x" * 10 + bytes(8_990) + b"end"

    def test_under_an_open_reader(self, root: Path) -> None:
        write_file(root / "f", b"x" * 50_000)
        with opened(root / "f") as fd:
            os.read(fd, 40_000)
            os.truncate(root / "f", 100)
            assert os.read(fd, 100) == b""
            assert os.fstat(fd).st_size == 100


@pytest.mark.fuse_needs("mmap")
class TestMapping:
    def test_private_changes_stay_private(self, root: Path) -> None:
        write_file(root / "f", b"a" * 10_000)
        with opened(root / "f", os.O_RDWR) as fd, mmap.mmap(fd, 10_000, mmap.MAP_PRIVATE) as mapping:
            mapping[:3] = b"bbb"
            assert mapping[:4] == b"bbba"
            assert os.pread(fd, 4, 0) == b"aaaa"
        assert read_file(root / "f") == b"a" * 10_000

    def test_shared_changes_reach_the_file(self, root: Path) -> None:
        write_file(root / "f", b"a" * 100_000)
        with opened(root / "f", os.O_RDWR) as fd, mmap.mmap(fd, 100_000) as mapping:
            mapping[50_000:50_005] = b"hello"
            assert os.pread(fd, 5, 50_000) == b"hello"
            mapping.flush()
            os.pwrite(fd, b"WORLD", 60_000)
            assert mapping[60_000:60_005] == b"WORLD"
        data = read_file(root / "f")
        assert (data[50_000:50_005], data[60_000:60_005], len(data)) == (b"hello", b"WORLD", 100_000)

    def test_without_msync(self, root: Path) -> None:
        write_file(root / "f", bytes(1 << 20))
        with opened(root / "f", os.O_RDWR) as fd:
            mapping = mmap.mmap(fd, 1 << 20)
        for at in range(0, 1 << 20, 4096):
            mapping[at] = at >> 12 & 255
        mapping.close()
        assert read_file(root / "f")[::4096] == bytes(number & 255 for number in range(256))

    def test_sets_mtime(self, root: Path) -> None:
        write_file(root / "f", bytes(10_000))
        os.utime(root / "f", ns=(10**18, 10**18))
        with opened(root / "f", os.O_RDWR) as fd, mmap.mmap(fd, 10_000) as mapping:
            mapping[0] = 1
            mapping.flush()
        assert (root / "f").stat().st_mtime_ns > 10**18

    def test_between_processes(self, root: Path) -> None:
        write_file(root / "f", bytes(PAGE * 4))
        with Peer() as peer, opened(root / "f", os.O_RDWR) as fd, mmap.mmap(fd, PAGE * 4) as mapping:
            for number in range(1, 50):
                peer.call(_poke, root / "f", number * 100, number)
                assert mapping[number * 100] == number

    def test_hole_and_tail(self, root: Path) -> None:
        with opened(root / "f", RW) as fd:
            os.ftruncate(fd, PAGE * 3 + 10)
            with mmap.mmap(fd, PAGE * 3 + 10) as mapping:
                assert mapping[:] == bytes(PAGE * 3 + 10)
                mapping[PAGE * 2] = 7
                mapping[PAGE * 3 + 9] = 8
        data = read_file(root / "f")
        assert (data[PAGE * 2], data[-1], len(data)) == (7, 8, PAGE * 3 + 10)

    def test_read_only_descriptor(self, root: Path) -> None:
        write_file(root / "f", b"x" * 100)
        with opened(root / "f") as fd, fails(errno.EACCES):
            mmap.mmap(fd, 100, mmap.MAP_SHARED, mmap.PROT_WRITE)

    @pytest.mark.fuse_needs("unlinked")
    def test_mapping_outlives_the_name(self, root: Path) -> None:
        write_file(root / "f", b"x" * 10_000)
        with opened(root / "f", os.O_RDWR) as fd:
            mapping = mmap.mmap(fd, 10_000)
        os.unlink(root / "f")
        mapping[5000] = 65
        assert mapping[4999:5002] == b"xAx"
        mapping.close()

    def test_execution(self, root: Path) -> None:
        write_file(root / "prog", Path("/bin/true").read_bytes(), 0o755)
        pid = os.posix_spawn(root / "prog", ["prog"], {})
        assert os.waitpid(pid, 0)[1] == 0


def _poke(path: Path, at: int, value: int) -> None:
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, PAGE * 4) as mapping:
        mapping[at] = value


@pytest.mark.fuse_needs("allocation", "mmap")
class TestExerciser:
    """Random operations of every kind on one file against a byte array, as fsx does."""

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("limit", [6_000, 300_000])
    def test_random(self, root: Path, seed: int, limit: int, fuse_stress: bool) -> None:
        Exerciser(root, random.Random(seed), limit).run(50_000 if fuse_stress else 500)


class Exerciser:
    """``model`` is what the file must hold after every operation; ``limit`` the greatest size, bytes."""

    def __init__(self, root: Path, rng: random.Random, limit: int) -> None:
        self.path = root / "f"
        self.rng = rng
        self.limit = limit
        self.model = bytearray()
        self.log: list[str] = []
        self.fd = os.open(self.path, RW)

    def run(self, count: int) -> None:
        steps = [
            self.write,
            self.write,
            self.write,
            self.read,
            self.read,
            self.truncate,
            self.punch,
            self.zero,
            self.extend,
            self.copy,
            self.map_write,
            self.map_read,
            self.sync,
            self.reopen,
        ]
        try:
            for _ in range(count):
                self.rng.choice(steps)()
            self.compare(0, self.limit)
            self.reopen()
            self.compare(0, self.limit)
        except AssertionError as error:
            raise AssertionError("\n".join([*self.log[-40:], str(error)])) from None
        finally:
            os.close(self.fd)

    def range(self, top: int | None = None) -> tuple[int, int]:
        top = self.limit if top is None else top
        start = self.rng.randrange(max(top, 1))
        if self.rng.random() < 0.3:
            start -= start % 4096
        length = self.rng.choice([1, 100, 4096, 20_000, 100_000])
        return start, max(min(self.rng.randint(1, length), top - start), 0)

    def put(self, at: int, data: bytes) -> None:
        if at > len(self.model):
            self.model.extend(bytes(at - len(self.model)))
        self.model[at : at + len(data)] = data

    def compare(self, start: int, length: int) -> None:
        got = os.pread(self.fd, length, start)
        want = bytes(self.model[start : start + length])
        if got != want:
            at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
            raise AssertionError(f"at {start + at}: {got[at : at + 8]!r} instead of {want[at : at + 8]!r}; {len(got)=}")
        size = os.fstat(self.fd).st_size
        assert size == len(self.model), f"size {size} instead of {len(self.model)}"

    def write(self) -> None:
        start, length = self.range()
        data = self.rng.randbytes(length)
        self.log.append(f"write {start} {length}")
        assert os.pwrite(self.fd, data, start) == length
        if length:
            self.put(start, data)

    def read(self) -> None:
        start, length = self.range()
        self.log.append(f"read {start} {length}")
        self.compare(start, length)

    def truncate(self) -> None:
        size = self.rng.randrange(self.limit)
        self.log.append(f"truncate {size}")
        os.ftruncate(self.fd, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def punch(self) -> None:
        start, length = self.range()
        if length:
            self.log.append(f"punch {start} {length}")
            fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, start, length)
            self._zero_model(start, length)

    def zero(self) -> None:
        start, length = self.range()
        if length:
            keep = self.rng.random() < 0.5
            self.log.append(f"zero {start} {length} keep={keep}")
            fallocate(self.fd, ZERO_RANGE | (KEEP_SIZE if keep else 0), start, length)
            if not keep and start + length > len(self.model):
                self.model.extend(bytes(start + length - len(self.model)))
            self._zero_model(start, length)

    def _zero_model(self, start: int, length: int) -> None:
        end = min(start + length, len(self.model))
        if end > start:
            self.model[start:end] = bytes(end - start)

    def extend(self) -> None:
        start, length = self.range()
        if length:
            keep = self.rng.random() < 0.5
            self.log.append(f"fallocate {start} {length} keep={keep}")
            fallocate(self.fd, KEEP_SIZE if keep else 0, start, length)
            if not keep and start + length > len(self.model):
                self.model.extend(bytes(start + length - len(self.model)))

    def copy(self) -> None:
        source, length = self.range(len(self.model))
        target = self.rng.randrange(self.limit)
        length = min(length, self.limit - target)
        if length <= 0 or abs(source - target) < length:
            return
        self.log.append(f"copy {source} -> {target} {length}")
        data = bytes(self.model[source : source + length])
        done = 0
        while done < length:
            step = os.copy_file_range(self.fd, self.fd, length - done, source + done, target + done)
            assert step > 0, "copy_file_range ended early"
            done += step
        self.put(target, data)

    def map_write(self) -> None:
        start, length = self.range(len(self.model))
        if length:
            self.log.append(f"mapwrite {start} {length}")
            data = self.rng.randbytes(length)
            with mmap.mmap(self.fd, len(self.model)) as mapping:
                mapping[start : start + length] = data
                if self.rng.random() < 0.5:
                    mapping.flush()
            self.put(start, data)

    def map_read(self) -> None:
        start, length = self.range(len(self.model))
        if length:
            self.log.append(f"mapread {start} {length}")
            with mmap.mmap(self.fd, len(self.model), prot=mmap.PROT_READ) as mapping:
                same = mapping[start : start + length] == self.model[start : start + length]
            assert same, f"mapping differs in {start}+{length}"

    def sync(self) -> None:
        self.log.append("fsync")
        os.fsync(self.fd)

    def reopen(self) -> None:
        self.log.append("reopen")
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)
