"""What the tests of the data path share: a volume in a directory, and services that die at a chosen call."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from polefs.data.cache.directory import CacheDirectory
from polefs.data.cache.store import CacheLimits
from polefs.data.dirty import Limits
from polefs.data.files import FileStore
from polefs.data.frames import Codec
from polefs.meta.model import ROOT_INO, Caller, Inode
from polefs.meta.service import MetaService
from polefs.meta.store.sqlite import SqliteStore
from polefs.objects.directory import DirectoryStore
from polefs.objects.localio import aligned_buffer

ROOT = Caller(0, 0)


class Crash(Exception):
    """The process died here. No OSError: nothing in the product may handle it."""


class Dying:
    """A stand-in for a service that passes calls on until its ``countdown`` of the named methods is over; that call,
    before it is made or after, and (``permanent``) all later ones raise ``error``. ``countdown`` None: never."""

    def __init__(self, service: Any, methods: set[str], error: Exception | None = None) -> None:
        self.service = service
        self.methods = methods
        self.error = error or Crash()
        self.countdown: int | None = None
        self.after = False
        self.permanent = True

    def __getattr__(self, name: str) -> Any:
        target = getattr(self.service, name)
        if name not in self.methods:
            return target

        async def call(*args: Any, **kwargs: Any) -> Any:
            dying = False
            if self.countdown is not None:
                self.countdown -= 1
                dying = self.countdown == 0 or (self.permanent and self.countdown < 0)
                if dying and not (self.after and self.countdown == 0):
                    raise self.error
            result = await target(*args, **kwargs)
            if dying:
                raise self.error
            return result

        return call


class FarStore(DirectoryStore):
    """A store that can neither take over a local file nor give bytes at once, as one across a network."""

    async def adopt(self, key: str, path: str) -> bool:
        return False

    async def get(self, key: str, offset: int, length: int) -> memoryview:
        buffer = aligned_buffer(length)
        buffer[:] = await super().get(key, offset, length)
        return buffer

    def get_now(self, key: str, offset: int, length: int) -> None:
        return None


class Volume:
    """A volume whose data side can be dropped and opened again, as after the death of the process."""

    meta: MetaService
    objects: DirectoryStore
    files: FileStore

    def __init__(
        self, path: Path, limits: Limits | None = None, flush_after: float = 5.0, *, cached: bool = False
    ) -> None:
        """``cached``: contents are stored in frames and read through the cache, as with objects far away."""
        self.path = path
        self.cached = cached
        self.cache_limits = CacheLimits(size=1 << 40, free=0)
        self.limits = limits
        self.flush_after = flush_after
        self.grace = 0.0
        self.gc_interval = 0.0
        self.codec = Codec()
        """With which contents are stored where they are cached."""
        self.dying: Dying | None = None

    async def open(self) -> None:
        database = self.path / "meta.db"
        exists = database.exists()
        store = SqliteStore.open(str(database)) if exists else SqliteStore.create(str(database), name="test")
        self.meta = MetaService(store)
        await self.meta.start()
        await self.open_files()

    async def open_files(self) -> None:
        self.objects = (FarStore if self.cached else DirectoryStore)(str(self.path / "objects"))
        self.dying_meta = Dying(self.meta, {"commit_data", "sync", "clone_range", "allocate_segments"})
        self.dying_objects = Dying(self.objects, {"put", "adopt", "delete"})
        self.files = FileStore(
            self.dying_meta,  # type: ignore[arg-type]
            self.dying_objects,  # type: ignore[arg-type]
            str(self.path / "local"),
            limits=self.limits,
            flush_after=self.flush_after,
            codec=self.codec if self.cached else None,
            grace=self.grace,
            gc_interval=self.gc_interval,
            cache=(CacheDirectory.open(str(self.path / "cache"), "volume"), self.cache_limits) if self.cached else None,
        )
        await self.files.recover()

    async def crash(self) -> None:
        """Drop the data side as the death of the process does, and open it again."""
        for dying in (self.dying_meta, self.dying_objects):
            dying.countdown, dying.permanent, dying.error = 0, True, Crash()
            dying.methods = {"commit_data", "sync", "clone_range", "allocate_segments", "put", "adopt", "delete"}
            dying.methods |= {"dead_segments", "forget_segments", "move_extents"}
        await self.files.garbage.stop()
        await self.files._flusher.abandon()
        await self.files._reclaimer.stop()
        if self.files.cached is not None:
            await self.files.cached.close(clean=False)
        self.files._threads.shutdown()
        await self.objects.close()
        await self.open_files()

    async def close(self) -> None:
        await self.files.close()
        await self.objects.close()
        await self.meta.close()

    async def make(self, name: bytes) -> int:
        return (await self.meta.make_node(ROOT, ROOT_INO, name, 0o100644, 0)).ino

    async def inode(self, ino: int) -> Inode:
        return self.files.overlay(await self.meta.get_inode(ino))

    async def write(self, ino: int, offset: int, data: bytes, now: int | None = None) -> int:
        inode = await self.meta.get_inode(ino)
        return await self.files.write(inode, offset, memoryview(data), time.time_ns() if now is None else now)

    async def truncate(self, ino: int, size: int) -> None:
        await self.files.truncate(await self.meta.get_inode(ino), size, time.time_ns())

    async def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        await self.files.fallocate(await self.meta.get_inode(ino), mode, offset, length, time.time_ns())

    async def seek(self, ino: int, offset: int, whence: int) -> int:
        return await self.files.seek(await self.meta.get_inode(ino), offset, whence)

    async def copy(self, source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
        inodes = await self.meta.get_inode(source), await self.meta.get_inode(target)
        now = time.time_ns()
        return await self.files.copy_range(inodes[0], source_offset, inodes[1], target_offset, length, now)

    async def read(self, ino: int, offset: int = 0, size: int = 1 << 40) -> bytes:
        inode = await self.meta.get_inode(ino)
        size = min(size, max(self.files.overlay(inode).size - offset, 0))
        return b"".join(await self.files.read(inode, offset, size))

    def reopened_objects(self) -> DirectoryStore:
        return DirectoryStore(str(self.path / "objects"))

    def local(self) -> list[str]:
        return sorted(path.name for path in (self.path / "local").iterdir())

    def object_paths(self) -> list[Path]:
        return sorted(path for path in (self.path / "objects" / "segments").rglob("*") if path.is_file())


async def ticks(count: int) -> None:
    """Let the event loop run for some turns."""
    for _ in range(count):
        await asyncio.sleep(0)
