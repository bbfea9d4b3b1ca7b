"""The data path against plain byte arrays: random operations, write-back at any moment, crashes at any step."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from polefs.data.cache.reader import CachedContents
from polefs.data.dirty import Limits
from polefs.data.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from polefs.meta.model import SetAttr
from tests.unit.data_helpers import Crash, Volume, ticks

T = TypeVar("T")
FILES = 3

EDGES = [0, 1, 100, 4095, 4096, 4097, 8192, 65535, 65536, 65537, 200_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
offsets = st.sampled_from(EDGES) | st.integers(0, 10_000) | st.integers(0, 1_200_000)
lengths = st.sampled_from([*EDGES[1:], 1_500_000]) | st.integers(1, 10_000)
files = st.integers(0, FILES - 1)


def pattern(seed: int, length: int) -> bytes:
    unit = bytes((seed * 7 + i * 13 + 1) % 251 + 1 for i in range(min(length, 1021)))
    return (unit * (length // len(unit) + 1))[:length]


class DataModel(RuleBasedStateMachine):
    cached = False

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="polefs-model-")
        self.runner = asyncio.Runner()
        self.seed = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize(small=st.booleans())
    def begin(self, small: bool) -> None:
        # With tight limits, writes wait for write-back.
        limits = Limits(memory=100_000, local=8 << 20, replicas=6) if small else None
        self.volume = Volume(Path(self.directory), limits, cached=self.cached)
        self.started = small
        self.run(self.open())
        self.inos = [self.run(self.volume.make(b"f%d" % i)) for i in range(FILES)]
        self.contents = [bytearray() for _ in range(FILES)]
        self.mtimes: list[int | None] = [None] * FILES

    async def open(self) -> None:
        await self.volume.open()
        await self.start()

    async def start(self) -> None:
        if self.started:
            self.volume.files.start()

    def data(self, length: int) -> bytes:
        self.seed += 1
        return pattern(self.seed, length)

    async def do_write(self, file: int, offset: int, length: int) -> None:
        data = self.data(length)
        now = time.time_ns()
        assert await self.volume.write(self.inos[file], offset, data, now) == length
        content = self.contents[file]
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + length] = data
        self.mtimes[file] = now

    async def check(self, file: int) -> None:
        ino, content = self.inos[file], self.contents[file]
        inode = await self.volume.inode(ino)
        assert inode.size == len(content)
        found = await self.volume.read(ino)
        if found != content:
            wrong = next(i for i in range(len(content)) if found[i : i + 1] != content[i : i + 1])
            raise AssertionError(
                f"file {file} differs at {wrong}: {found[wrong : wrong + 8]!r} {content[wrong : wrong + 8]!r}"
            )
        if self.mtimes[file] is not None:
            assert inode.mtime == self.mtimes[file]
        assert inode.allocated <= inode.size + 4096

    @rule(file=files, offset=offsets, length=lengths)
    def write(self, file: int, offset: int, length: int) -> None:
        self.run(self.do_write(file, offset, length))
        self.run(self.check(file))

    @rule(file=files, length=lengths, count=st.integers(1, 40))
    def append(self, file: int, length: int, count: int) -> None:
        for _ in range(count):
            self.run(self.do_write(file, len(self.contents[file]), min(length, 9000)))
            if len(self.contents[file]) > 3_000_000:
                break
        self.run(self.check(file))

    @rule(file=files, size=offsets)
    def truncate(self, file: int, size: int) -> None:
        self.run(self.volume.truncate(self.inos[file], size))
        content = self.contents[file]
        del content[size:]
        content.extend(bytes(size - len(content)))
        self.mtimes[file] = None
        self.run(self.check(file))

    @rule(file=files, offset=offsets, length=lengths, zero=st.booleans(), keep=st.booleans())
    def punch(self, file: int, offset: int, length: int, zero: bool, keep: bool) -> None:
        mode = FALLOC_FL_ZERO_RANGE | (FALLOC_FL_KEEP_SIZE if keep else 0)
        if not zero:
            mode, keep = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, True
        self.run(self.volume.fallocate(self.inos[file], mode, offset, length))
        content = self.contents[file]
        if not keep and offset + length > len(content):
            content.extend(bytes(offset + length - len(content)))
        end = min(offset + length, len(content))
        if offset < end:
            content[offset:end] = bytes(end - offset)
        self.mtimes[file] = None
        self.run(self.check(file))

    @rule(file=files, offset=offsets, length=lengths)
    def read(self, file: int, offset: int, length: int) -> None:
        assert (
            self.run(self.volume.read(self.inos[file], offset, length)) == self.contents[file][offset : offset + length]
        )

    @rule(source=files, start=offsets, other=files, to=offsets, length=lengths)
    def copy(self, source: int, start: int, other: int, to: int, length: int) -> None:
        ino, target = self.inos[source], self.inos[other]
        content = bytes(self.contents[source][start : start + length])
        if source == other and content and abs(start - to) < len(content):
            with pytest.raises(OSError, match="Invalid"):
                self.run(self.volume.copy(ino, start, target, to, length))
            return
        copied = 0
        while copied < len(content):
            # A file copied into itself may grow by it: no more is asked for than it had at first.
            done = self.run(self.volume.copy(ino, start + copied, target, to + copied, len(content) - copied))
            assert done
            copied += done
        if not content:
            assert self.run(self.volume.copy(ino, start, target, to, length)) == 0
        if copied:
            changed = self.contents[other]
            if len(changed) < to:
                changed.extend(bytes(to - len(changed)))
            changed[to : to + copied] = content
            self.mtimes[other] = None
        self.run(self.check(other))

    @rule(file=files, mtime=st.integers(0, 10**18))
    def set_mtime(self, file: int, mtime: int) -> None:
        async def work() -> None:
            self.volume.files.set_mtime(self.inos[file], mtime)
            await self.volume.meta.set_attributes(self.inos[file], SetAttr(mtime=mtime))

        self.run(work())
        self.mtimes[file] = mtime

    @rule(file=st.none() | files)
    def flush(self, file: int | None) -> None:
        self.run(self.volume.files.flush(None if file is None else self.inos[file]))

    @rule(file=files)
    def sync(self, file: int) -> None:
        self.run(self.volume.files.sync(self.inos[file], False))

    @rule(file=files, turns=st.integers(0, 60), offset=offsets, length=lengths, truncate=st.booleans())
    def change_during_flush(self, file: int, turns: int, offset: int, length: int, truncate: bool) -> None:
        async def work() -> None:
            flushing = asyncio.create_task(self.volume.files.flush())
            await ticks(turns)
            if truncate:
                await self.volume.truncate(self.inos[file], offset)
                del self.contents[file][offset:]
                self.contents[file].extend(bytes(offset - len(self.contents[file])))
            await self.do_write(file, offset, length)
            for other in range(FILES):
                await self.check(other)
            await flushing

        self.run(work())
        self.run(self.check(file))

    @rule()
    def crash(self) -> None:
        self.run(self.volume.crash())
        self.run(self.start())
        self.check_all()

    @rule(where=st.sampled_from(["put", "adopt", "commit_data", "sync"]), count=st.integers(1, 3), after=st.booleans())
    def crash_during_flush(self, where: str, count: int, after: bool) -> None:
        volume = self.volume
        dying = volume.dying_objects if where in ("put", "adopt") else volume.dying_meta
        dying.methods = {where}

        async def work() -> None:
            dying.after = after
            dying.countdown = count
            try:
                await volume.files.flush()
            except Crash:
                pass
            await volume.crash()
            await self.start()

        self.run(work())
        self.check_all()

    @rule()
    def collect_garbage(self) -> None:
        self.run(self.volume.files.garbage.collect(grace=0))
        self.check_all()

    @rule(file=files, turns=st.integers(0, 60), offset=offsets, length=lengths, truncate=st.booleans())
    def change_during_collection(self, file: int, turns: int, offset: int, length: int, truncate: bool) -> None:
        async def work() -> None:
            collecting = asyncio.create_task(self.volume.files.garbage.collect(grace=0))
            await ticks(turns)
            if truncate:
                await self.volume.truncate(self.inos[file], offset)
                del self.contents[file][offset:]
                self.contents[file].extend(bytes(offset - len(self.contents[file])))
            await self.do_write(file, offset, length)
            await self.volume.files.flush(self.inos[file])
            for other in range(FILES):
                await self.check(other)
            await collecting

        self.run(work())
        self.check_all()

    @rule(
        where=st.sampled_from(["put", "delete", "move_extents", "forget_segments", "sync"]),
        count=st.integers(1, 3),
        after=st.booleans(),
    )
    def crash_during_collection(self, where: str, count: int, after: bool) -> None:
        volume = self.volume
        dying = volume.dying_objects if where in ("put", "delete") else volume.dying_meta
        dying.methods = {where}

        async def work() -> None:
            dying.after = after
            dying.countdown = count
            try:
                await volume.files.garbage.collect(grace=0)
            except Crash:
                pass
            await volume.crash()
            await self.start()

        self.run(work())
        self.check_all()

    @rule()
    def remount(self) -> None:
        self.run(self.volume.close())
        assert self.volume.local() == []
        self.run(self.open())
        self.check_all()

    @rule(file=files, offset=offsets)
    def seek(self, file: int, offset: int) -> None:
        content = self.contents[file]
        ino = self.inos[file]
        position = offset
        while position < len(content):
            try:
                data = self.run(self.volume.seek(ino, position, os.SEEK_DATA))
            except OSError:
                data = len(content)
            assert not any(content[position:data])
            if data == len(content):
                break
            position = self.run(self.volume.seek(ino, data, os.SEEK_HOLE))
            assert position > data

    def check_all(self) -> None:
        for file in range(FILES):
            self.run(self.check(file))

    def teardown(self) -> None:
        try:
            if hasattr(self, "volume"):
                self.check_all()
                self.run(self.volume.close())
                assert self.volume.local() == []
        finally:
            self.runner.close()
            shutil.rmtree(self.directory)


class CachedModel(DataModel):
    """The same through a cache, which is lost, evicted, and read by many at a time."""

    cached = True

    @property
    def contents_cache(self) -> CachedContents:
        assert self.volume.files.cached is not None
        return self.volume.files.cached

    @rule(file=files)
    def read_all(self, file: int) -> None:
        """So much that some of it is cached."""
        self.run(self.volume.files.flush())
        self.run(self.check(file))

    @rule(size=st.sampled_from([0, 1 << 18]))
    def evict(self, size: int) -> None:
        async def work() -> None:
            cached = self.contents_cache
            if cached._tasks:
                await asyncio.wait(cached._tasks)
            await cached.cache.shrink(size)

        self.run(work())
        self.check_all()

    @rule(file=files)
    def close_files(self, file: int) -> None:
        """What is valid is learnt from the cache files again."""

        async def work() -> None:
            cache = self.contents_cache.cache
            for _ in range(len(cache._files)):
                cache._let_go()

        self.run(work())
        self.run(self.check(file))

    @rule(lost=st.sampled_from(["cache", "cache/files", "cache/state"]))
    def lose_cache(self, lost: str) -> None:
        path = Path(self.directory) / lost
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # the cache may be adding to it
        elif path.exists():
            path.unlink()
        self.check_all()

    @rule(file=files, count=st.integers(1, 4), turns=st.integers(0, 40), offset=offsets, length=lengths)
    def read_during_commit(self, file: int, count: int, turns: int, offset: int, length: int) -> None:
        """Reads that begin at any moment of a commit, and what they leave in the cache."""

        async def read(start: int) -> None:
            await ticks(turns * start % 37)
            content = bytes(self.contents[file])
            offset = start * 70_001 % (len(content) + 1)
            assert await self.volume.read(self.inos[file], offset, 300_000) == content[offset : offset + 300_000]

        async def work() -> None:
            await self.do_write(file, offset, length)
            await asyncio.gather(self.volume.files.flush(), *(read(start) for start in range(count * 3)))

        self.run(work())
        self.run(self.check(file))


TestDataModel = DataModel.TestCase
TestCachedModel = CachedModel.TestCase
TestDataModel.settings = settings(
    max_examples=400 if os.environ.get("POLEFS_STRESS") else 40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCachedModel.settings = settings(TestDataModel.settings, max_examples=400 if os.environ.get("POLEFS_STRESS") else 20)
