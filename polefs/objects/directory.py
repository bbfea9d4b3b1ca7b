"""An object store in a local directory: one file an object, at the path that its key names."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from polefs.objects.base import ObjectInfo, Space, Upload
from polefs.objects.localio import OpenFile, read_available, read_cached, space_of, sync_directory, write_parts

T = TypeVar("T")

_TEMPORARY: Final = ".incoming"
"""Where objects are written before they get their name; emptied when the store is opened."""

_OPEN_MAX: Final = 128
"""Descriptors of objects kept open for reading."""

_LIST_PAGE: Final = 1000


class DirectoryStore:
    """``ObjectStore`` over the directory ``path``, made when it does not exist. One process at a time may use it.

    Blocking calls run in ``threads`` threads of its own. Errors are those of the underlying file system."""

    def __init__(self, path: str, *, threads: int = 4) -> None:
        self.away_since: float | None = None
        self._root = os.path.abspath(path)
        self._incoming = os.path.join(self._root, _TEMPORARY)
        os.makedirs(self._incoming, exist_ok=True)
        for name in os.listdir(self._incoming):
            os.unlink(os.path.join(self._incoming, name))
        self._threads = ThreadPoolExecutor(threads, "objects")
        self._serial = itertools.count()
        self._open: OrderedDict[str, OpenFile] = OrderedDict()
        self._known_directories: set[str] = set()
        # _open is used by the event loop and by the threads.
        self._lock = threading.Lock()

    def hurry(self, seconds: float) -> None:
        """It is never out of reach."""

    async def put(self, key: str, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """EEXIST when the key exists: objects are immutable. Who cancels it waits until nothing is being written."""
        writing = self._run(self._put, key, parts)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            raise

    async def adopt(self, key: str, path: str) -> bool:
        return await self._run(self._adopt, key, path)

    async def get(self, key: str, offset: int, length: int) -> bytes:
        return await self._run(self._get, key, offset, length)

    def get_now(self, key: str, offset: int, length: int) -> memoryview | None:
        with self._lock:
            descriptor = self._open.get(key)
            if descriptor is None:
                return None
            self._open.move_to_end(key)
        return read_cached(descriptor.fd, offset, length)

    async def delete(self, keys: Sequence[str]) -> None:
        await self._run(self._delete, keys)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        walk = self._walk(prefix)
        while page := await self._run(_page, walk):
            for info in page:
                yield info

    async def uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        for upload in list[Upload]():
            yield upload

    async def abort(self, upload: Upload) -> None:
        pass

    async def space(self) -> Space:
        return await self._run(space_of, self._root)

    async def close(self) -> None:
        with self._lock:
            self._open.clear()
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)

    def _run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key)

    def _put(self, key: str, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        temporary = os.path.join(self._incoming, str(next(self._serial)))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                write_parts(fd, parts)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            self._link(temporary, key)
        finally:
            os.unlink(temporary)

    def _adopt(self, key: str, path: str) -> bool:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
        try:
            self._link(path, key)
        except OSError as error:
            # Another file system, one without hard links, or no more links to this file: the caller copies instead.
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def _link(self, source: str, key: str) -> None:
        """Give a complete file its key, durably; link(2) never replaces an object that is there."""
        target = self._path(key)
        directory = os.path.dirname(target)
        if directory not in self._known_directories:
            self._make_directory(directory)
        os.link(source, target)
        sync_directory(directory)

    def _make_directory(self, directory: str) -> None:
        if directory not in self._known_directories and directory != self._root:
            parent = os.path.dirname(directory)
            self._make_directory(parent)
            try:
                os.mkdir(directory)
            except FileExistsError:
                pass
            sync_directory(parent)
        self._known_directories.add(directory)

    def _get(self, key: str, offset: int, length: int) -> bytes:
        with self._lock:
            descriptor = self._open.get(key)
            if descriptor is not None:
                self._open.move_to_end(key)
        if descriptor is None:
            descriptor = OpenFile(self._path(key), os.O_RDONLY)
            with self._lock:
                self._open[key] = descriptor
                if len(self._open) > _OPEN_MAX:
                    self._open.popitem(last=False)
        data = read_available(descriptor.fd, offset, length)
        if len(data) != length:
            raise OSError(errno.EIO, f"object {key} ends before byte {offset + length}")
        return data

    def _delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with self._lock:
                self._open.pop(key, None)
            try:
                os.unlink(self._path(key))
            except FileNotFoundError:
                pass

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        pending = [self._root]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    key = os.path.relpath(entry.path, self._root)
                    if entry.is_dir(follow_symlinks=False):
                        inside = key + "/"
                        if key != _TEMPORARY and (inside.startswith(prefix) or prefix.startswith(inside)):
                            pending.append(entry.path)
                    elif key.startswith(prefix):
                        found = entry.stat(follow_symlinks=False)
                        yield ObjectInfo(key, found.st_size, max(0.0, time.time() - found.st_mtime))


def _page(walk: Iterator[ObjectInfo]) -> list[ObjectInfo]:
    return list(itertools.islice(walk, _LIST_PAGE))
