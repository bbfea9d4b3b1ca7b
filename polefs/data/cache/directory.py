"""The cache directory of a volume: sparse files, and what makes them trustworthy over a restart.

::

    state           whose cache it is, and whether it is exact (JSON)
    files/xx/yy     the cached contents of inode yy: a sparse file, offset-identical to the inode
    old.N/          discarded, on its way out

A block of a cache file is valid if and only if it is allocated: filling writes whole blocks, invalidating punches
holes, and the file system keeps the account. That is exact after the death of the process, whose writes are in the page
cache. It is not after a loss of power, which may keep a write and forget a hole that was punched before it, or lose
metadata that the cache has; so the cache counts after another boot only when it was closed and synced before. It never
counts when others may have changed the volume's contents meanwhile: each mount that may do so leaves a random number in
the metadata (the *writer*), and the cache knows its own.

Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from polefs.data.cache.rangeset import Range, RangeSet
from polefs.data.ranges import Chunk
from polefs.data.replica import Replica
from polefs.data.segments import DataPiece, whole_replica
from polefs.objects.localio import (
    DIRECT_MIN,
    OpenFile,
    allocated_ranges,
    punch_hole,
    replace_file,
    sync_file_system,
    write_all,
    write_parts,
    write_past_cache,
)

log = logging.getLogger(__name__)

BLOCK: Final = 4096
"""The unit of validity, bytes: aligned blocks of the file."""

_FORMAT: Final = 1
_STEP: Final = 1 << 20
"""Bytes that ``keep`` copies at a time."""

_PROBE_SIZE: Final = 16 << 20
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


class _State(msgspec.Struct):
    """``directory`` is the inode number of the cache directory: a copy may have lost its holes and is no cache.
    ``boot`` is when it was in use; it counts after other boots when it is ``clean``."""

    format: int
    volume: str
    writer: int
    boot: str
    clean: bool
    directory: int


class Usage(msgspec.Struct, frozen=True):
    """What a scan has found: files, allocated bytes, and the files that nobody has used for the longest time, oldest
    first, as ``(inode number, bytes)``."""

    files: int
    bytes: int
    oldest: list[tuple[int, int]]


class CacheDirectory:
    """Made by ``open``. One process at a time may use a cache directory."""

    def __init__(self, path: str, volume: str, lock: OpenFile) -> None:
        self.path = path
        self._volume = volume
        self._lock = lock
        self._files = os.path.join(path, "files")
        self._state_path = os.path.join(path, "state")
        self._writer = 0
        self._sizes = threading.Lock()
        """Held while the size of a cache file is looked at and changed."""

    @classmethod
    def open(cls, path: str, volume: str) -> CacheDirectory:
        """The cache directory of the volume with this uuid, made when there is none. OSError with a text that says what
        to do: EINVAL when it is another volume's, EBUSY when another process uses it, EOPNOTSUPP when its file system
        does not keep account of single blocks, and what making it may raise."""
        try:
            os.makedirs(os.path.join(path, "files"), mode=0o700, exist_ok=True)
        except FileExistsError:
            text = f"the cache directory {path} holds a file where a directory should be: remove it"
            raise OSError(errno.ENOTDIR, text) from None
        lock = OpenFile(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                errno.EBUSY, f"the cache directory {path} is in use by another process: give another --cache-dir"
            ) from None
        directory = cls(path, volume, lock)
        state = directory._read_state()
        if state is not None and state.volume != volume:
            raise OSError(
                errno.EINVAL,
                f"the cache directory {path} belongs to volume {state.volume}: give another --cache-dir, or remove it",
            )
        directory._probe()
        return directory

    def begin(self, previous: int, writer: int) -> None:
        """Keep what is cached when it is exact, or discard it; ``previous`` and ``writer`` are who may have changed the
        volume's contents last and who does from now on."""
        state = self._read_state()
        why = self._doubt(state, previous)
        if why is not None:
            if state is not None or os.listdir(self._files):
                log.info("the cache in %s starts afresh: %s", self.path, why)
            self._discard()
        self._writer = writer
        self._write_state(clean=False)

    def _doubt(self, state: _State | None, previous: int) -> str | None:
        """Why the cache cannot be trusted; None when it can."""
        if state is None:
            return "it has no readable state"
        if state.writer != previous:
            return "the volume has been mounted without it"
        if state.directory != os.fstat(self._lock.fd).st_ino:
            return "it is a copy"
        if not state.clean and state.boot != _boot_id():
            return "the machine went down while it was in use"
        return None

    def distrust(self) -> None:
        """It may hold wrong bytes: the next mount discards it. OSError when that cannot be made sure."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._state_path)

    def close(self, *, clean: bool) -> None:
        """``clean``: make everything durable, so that the cache counts after the next boot too."""
        try:
            if clean and self._read_state() is not None:
                sync_file_system(self.path)
                self._write_state(clean=True)
        except OSError as error:
            log.warning("the cache in %s is not kept over a restart of the machine: %s", self.path, error.strerror)
        finally:
            fcntl.flock(self._lock.fd, fcntl.LOCK_UN)

    def _read_state(self) -> _State | None:
        try:
            with open(self._state_path, "rb") as stream:
                state = msgspec.json.decode(stream.read(), type=_State)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return state if state.format == _FORMAT else None

    def _write_state(self, *, clean: bool) -> None:
        inode = os.fstat(self._lock.fd).st_ino
        state = _State(_FORMAT, self._volume, self._writer, _boot_id(), clean, inode)
        replace_file(self._state_path, msgspec.json.encode(state))

    def _probe(self) -> None:
        """Try whether one block more or less is told exactly, in the midst of a file too."""
        path = os.path.join(self.path, "probe")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _PROBE_SIZE)
            middle = _PROBE_SIZE // 2
            os.pwrite(fd, b"\1" * (64 * BLOCK), middle)
            os.pwrite(fd, b"\1" * BLOCK, middle - 2 * BLOCK)
            punch_hole(fd, middle + 8 * BLOCK, BLOCK)
            expected = [
                (middle - 2 * BLOCK, middle - BLOCK),
                (middle, middle + 8 * BLOCK),
                (middle + 9 * BLOCK, middle + 64 * BLOCK),
            ]
            exact = list(allocated_ranges(fd)) == expected
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            exact = False
        finally:
            os.close(fd)
            os.unlink(path)
        if not exact:
            raise OSError(
                errno.EOPNOTSUPP,
                f"the file system of the cache directory {self.path} does not keep account of holes of {BLOCK} bytes: "
                "give a --cache-dir on ext4, XFS or Btrfs",
            )

    def _discard(self) -> None:
        number = 0
        while os.path.lexists(target := os.path.join(self.path, f"old.{number}")):
            number += 1
        os.rename(self._files, target)
        os.mkdir(self._files, 0o700)

    def remove_discarded(self) -> None:
        """Free what ``begin`` has discarded. May take long."""
        for name in os.listdir(self.path):
            if name.startswith("old."):
                shutil.rmtree(os.path.join(self.path, name), ignore_errors=True)

    # Cache files

    def path_of(self, ino: int) -> str:
        return f"{self._files}/{ino >> 8:x}/{ino:x}"

    def load(self, ino: int, size: int) -> tuple[OpenFile | None, RangeSet]:
        """The cache file of an inode of this size, None when there is none, and its valid ranges."""
        try:
            file = OpenFile(self.path_of(ino), os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            return None, RangeSet()
        return file, RangeSet(
            # Whole blocks; the last one may end with the inode, and where else somebody has cut the file.
            (-(-start // BLOCK) * BLOCK, (-(-end // BLOCK) if end == size else end // BLOCK) * BLOCK)
            for start, end in allocated_ranges(file.fd)
        )

    def create(self, ino: int) -> OpenFile:
        """The cache file of an inode, made if need be; also when the directory was removed under us."""
        path = self.path_of(ino)
        try:
            return OpenFile(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            return OpenFile(path, os.O_RDWR | os.O_CREAT)

    def fill(self, file: OpenFile, start: int, parts: Sequence[bytes | memoryview]) -> tuple[int, int]:
        """Write whole blocks, the last one padded with zeros: they are valid from now on. Returns by how many bytes the
        file has grown, and how many are free. After an OSError they are not valid."""
        length = sum(map(len, parts))
        padding = -length % BLOCK
        end = start + length + padding
        fd = file.fd
        before = os.fstat(fd)
        try:
            with self._sizes:
                if os.fstat(fd).st_size < end:
                    # What is written past the end may take along blocks for more to come (XFS).
                    os.ftruncate(fd, end)
            if length >= DIRECT_MIN and not padding:
                write_past_cache(fd, parts, start)
            else:
                write_parts(fd, [*parts, bytes(padding)] if padding else parts, start)
        except BaseException:
            try:
                self._invalidate(file, [(start, end)])
            except OSError:
                self.distrust()
            raise
        return (os.fstat(fd).st_blocks - before.st_blocks) * 512, self.free()

    def cut(self, file: OpenFile, size: int) -> None:
        """Let the cache file end in its last block, where the contents do."""
        with self._sizes:
            if os.fstat(file.fd).st_size != size:
                os.ftruncate(file.fd, size)

    def keep(self, files: Iterable[tuple[int, OpenFile | None, Sequence[DataPiece], int]]) -> tuple[int, int]:
        """Make valid the blocks that lie within these pieces of contents: ``(ino, cache file, pieces, size)`` of many
        files, the pieces in order. Returns as ``fill`` does. Where the cache file is not open, a replica that holds the
        whole file becomes it by a hard link, in place of what is there. While it still has its own name a journal tells
        of it, and nothing of it is changed: see ``invalidate``."""
        grown = 0
        for ino, file, pieces, size in files:
            replica = whole_replica(pieces, size) if file is None else None
            if replica is not None and self._link(ino, replica, pieces, size):
                grown += os.fstat(replica.fd).st_blocks * 512
            else:
                grown += self._copy(file or self.create(ino), pieces, size)
        return grown, self.free()

    def _copy(self, file: OpenFile, pieces: Sequence[DataPiece], size: int) -> int:
        grown = 0
        for start, end, run in block_runs(pieces, size):
            for low in range(start, end, _STEP):
                high = min(low + _STEP, end)
                parts = [
                    source.read(max(first, low), min(last, high) - max(first, low))
                    for first, last, source in run
                    if first < high and last > low
                ]
                grown += self.fill(file, low, parts)[0]
        return grown

    def _link(self, ino: int, replica: Replica, pieces: Sequence[DataPiece], size: int) -> bool:
        path = self.path_of(ino)
        # Harmless to the journal: it tells of these bytes too, after those that they replace.
        for start, end, source in pieces:
            if source is not replica:
                write_all(replica.fd, source.read(start, end - start), start)
        os.ftruncate(replica.fd, size)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        try:
            os.link(replica.path, path)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOENT):
                return False
            raise
        return True

    def _invalidate(self, file: OpenFile, ranges: Iterable[Range]) -> int:
        """Make holes of ranges of whole blocks; returns the bytes that this has freed."""
        fd = file.fd
        before = os.fstat(fd)
        for start, end in ranges:
            with self._sizes:
                size = os.fstat(fd).st_size
                if start < size <= end:
                    os.ftruncate(fd, start)
            if end < size:
                punch_hole(fd, start, end - start)
        return (before.st_blocks - os.fstat(fd).st_blocks) * 512

    def invalidate(self, changes: Iterable[tuple[int, Sequence[Range]]]) -> tuple[int, list[int]]:
        """Make holes of ranges of whole blocks: ``(ino, ranges)`` of many files, with or without a cache file. One that
        is a replica still, or whose holes cannot be made, is removed instead. Returns the bytes that this has freed,
        and the inodes that have no cache file (any more): one that is open is not theirs. OSError when that fails: what
        they hold must then not come to be wrong."""
        freed = 0
        removed = []
        for ino, ranges in changes:
            path = self.path_of(ino)
            try:
                file = OpenFile(path, os.O_RDWR)
            except (FileNotFoundError, NotADirectoryError):
                removed.append(ino)
                continue
            if os.fstat(file.fd).st_nlink == 1:
                try:
                    freed += self._invalidate(file, ranges)
                    continue
                except OSError as error:
                    log.error("cannot invalidate a part of %s, removing it: %s", path, error.strerror)
            os.unlink(path)
            removed.append(ino)
            freed += os.fstat(file.fd).st_blocks * 512
        return freed, removed

    def remove(self, inos: Iterable[int]) -> int:
        """Remove cache files, where there are any; returns the bytes that this has freed."""
        freed = 0
        for ino in inos:
            path = self.path_of(ino)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                freed += os.stat(path).st_blocks * 512
                os.unlink(path)
        return freed

    def give_away(self, ino: int, file: OpenFile, path: str) -> int:
        """Let the cache file, which is open as ``file``, have the name ``path`` instead of its own; returns the bytes
        that the cache is smaller by. ESTALE when it is another file by now."""
        mine, named = os.fstat(file.fd), os.stat(self.path_of(ino))
        if (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path_of(ino))
        os.rename(self.path_of(ino), path)
        return mine.st_blocks * 512

    def free(self) -> int:
        """Bytes that are free on the cache's file system."""
        found = os.fstatvfs(self._lock.fd)
        return found.f_bavail * found.f_frsize

    def scan(self, most: int) -> Usage:
        """Look at all cache files; ``most``: how many of the oldest are told."""
        files = total = 0

        def ages() -> Iterator[tuple[int, int, int]]:
            nonlocal files, total
            for ino, status in self._walk():
                files += 1
                total += status.st_blocks * 512
                yield status.st_mtime_ns, ino, status.st_blocks * 512

        oldest = heapq.nsmallest(max(most, 1), ages())[:most]  # for none at all it would not look at any
        return Usage(files, total, [(ino, size) for _, ino, size in oldest])

    def _walk(self) -> Iterator[tuple[int, os.stat_result]]:
        for shard in _entries(self._files):
            empty = True
            for entry in _entries(shard.path):
                empty = False
                with contextlib.suppress(FileNotFoundError, ValueError):
                    yield int(entry.name, 16), entry.stat(follow_symlinks=False)
            if empty:
                with contextlib.suppress(OSError):
                    os.rmdir(shard.path)


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def block_runs(pieces: Sequence[DataPiece], size: int) -> Iterator[tuple[int, int, list[DataPiece]]]:
    """``(start, end, pieces)`` of whole blocks that lie within adjoining pieces; the last one may end with the file."""
    run: list[DataPiece] = []
    for piece in [*pieces, (size + 1, size + 1, Chunk(0, b""))]:
        if run and run[-1][1] != piece[0]:
            start, end = -(-run[0][0] // BLOCK) * BLOCK, run[-1][1]
            end = end if end == size else end & -BLOCK
            if start < end:
                yield start, end, run
            run = []
        run.append(piece)


def _boot_id() -> str:
    with open(_BOOT_ID, encoding="ascii") as stream:
        return stream.read().strip()
