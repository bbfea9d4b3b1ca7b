"""The process behind a mount: serves the kernel until it is unmounted, then writes everything back."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
import errno
import faulthandler
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TextIO

import uvloop

from polefs import __version__
from polefs.client import AccessTimes, PoleFileSystem
from polefs.client.passthrough import PassthroughFileSystem
from polefs.client.warmup import WarmUp
from polefs.data.cache.reader import CachedContents
from polefs.node import control
from polefs.node.errors import Refusal, plain
from polefs.node.fuse import check_fuse, explain
from polefs.node.lock import Holder
from polefs.node.logs import LEVELS, current_level, set_level, set_up_logging
from polefs.node.mountinfo import find_mount
from polefs.node.mountpoint import check_mountpoint
from polefs.node.options import MountRequest
from polefs.node.sizes import format_size
from polefs.node.status import CacheStatus, Status
from polefs.node.storage import Storage, open_storage
from polefs.node.volume import Volume, open_or_make_volume
from polefs.objects.base import Space
from polefs.objects.localio import space_of
from rawfuse import MountOptions, Session
from rawfuse.mount import privileged, unmount

log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.2
"""Between two progress messages, seconds."""

Ready = Callable[[str | None], None]
"""Called once a mount can be used, with what is not as it should be, for people."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""mallopt(3)"""


def run(request: MountRequest, ready: Ready) -> None:
    """Mount and serve until unmounted. Raises ``Refusal`` when it cannot be mounted, ``OSError`` when contents could
    not be written back at the end."""
    request.mountpoint = check_mountpoint(request.mountpoint, request.volume, nonempty=request.nonempty)
    check_fuse()
    os.umask(0o077)
    volume = open_or_make_volume(request.volume, Holder(os.getpid(), "mount", request.mountpoint))
    try:
        if request.log_file is None and not request.foreground:
            request.log_file = volume.log_file
        set_up_logging(request.log_level, request.log_file)
        faulthandler.enable()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _raise_file_limit()
        _keep_freed_memory()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if request.profile is None:
                runner.run(serve_volume(volume, request, ready))
            else:
                _run_profiled(runner, volume, request, ready)
    except OSError as error:
        log.error("%s", plain(error))
        raise
    finally:
        volume.unlock()


async def serve_volume(volume: Volume, request: MountRequest, ready: Ready) -> None:
    """Join the volume's storage, the file system and the kernel, until the end of the mount."""
    with contextlib.ExitStack() as stack:
        trace: TextIO | None = None
        if request.trace is not None:
            trace = stack.enter_context(_open_trace(request.trace))
        storage = await open_storage(
            volume,
            request.secret,
            request.cache,
            store_timeout=request.store_timeout,
            dirty_limit=request.dirty_limit,
            gc_interval=0.0 if request.read_only else request.gc_interval,
            patient=True,
        )
        options = MountOptions(
            source=volume.path,
            subtype="polefs",
            read_only=request.read_only,
            allow_other=request.allow_other,
            default_permissions=True,
            flags=request.flags,
        )
        times = AccessTimes(storage.meta, request.atime, directories=request.directory_atime)
        local = partial(asyncio.to_thread, space_of, volume.local)
        filesystem = _make_filesystem(request, storage, local, times)
        session = Session(filesystem, request.mountpoint, options, trace=trace)
        mounted = MountedVolume(volume, request, storage, session)
        try:
            server = await control.ControlServer.start(volume.path, mounted)
        except BaseException:
            await storage.close()
            raise
        try:
            await mounted.serve(ready)
        finally:
            await server.close()


def _make_filesystem(
    request: MountRequest, storage: Storage, local: Callable[[], Awaitable[Space]], times: AccessTimes
) -> PoleFileSystem:
    direct = storage.files.direct
    mode = request.passed_through
    if direct is None or mode == "off" or not privileged() or not (direct.writable or request.read_only):
        return PoleFileSystem(storage.meta, storage.files, storage.objects.space, local, times)
    return PassthroughFileSystem(
        storage.meta,
        storage.files,
        direct,
        storage.objects.space,
        local,
        times,
        read_only=request.read_only,
        writing=mode == "all",
    )


class MountedVolume:
    """A volume while it is mounted: its life from mount to the last byte saved, and the answers to control requests."""

    def __init__(self, volume: Volume, request: MountRequest, storage: Storage, session: Session) -> None:
        self._volume = volume
        self._request = request
        self._storage = storage
        self._session = session
        self._since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._mounted = asyncio.Event()
        self._detached = asyncio.Event()
        """The kernel has let go of the mount."""
        self._saved = asyncio.Event()
        """All is written back and closed, or has failed (``_failure``)."""
        self._failure: OSError | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, ready: Ready) -> None:
        """Mount, serve, save. Raises ``Refusal`` when the mount fails, ``OSError`` when saving does."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            await self._mount()
            ready(self._storage.warning)
            log.info("mounted %s on %s, polefs %s", self._volume.path, self._request.mountpoint, __version__)
            await self._session.serve()
        finally:
            self._detached.set()
            try:
                await asyncio.to_thread(_remove_dead_mount, self._request.mountpoint, self._volume.path)
            finally:
                await self._save()
        log.info("unmounted %s", self._request.mountpoint)

    async def answer(self, request: control.Request) -> AsyncIterator[control.Reply]:
        """The control requests (``control.Handler``)."""
        match request:
            case control.GetStatus():
                yield control.StatusReply(await self._status())
            case control.SetLogLevel(level):
                if level not in LEVELS:
                    raise Refusal(errno.EINVAL, f"unknown log level '{level}': the levels are {', '.join(LEVELS)}")
                set_level(level)
                yield control.Done()
            case control.Flush():
                async for progress in self._until(asyncio.ensure_future(self._flush())):
                    yield progress
                yield control.Done()
            case control.Unmount(lazy):
                async for progress in self._until(asyncio.ensure_future(self._unmount(lazy))):
                    yield progress
                async for progress in self._until(asyncio.ensure_future(self._saved.wait())):
                    yield progress
                if self._failure is not None:
                    raise self._failure
                yield control.Done()
            case control.GetCache():
                yield control.CacheReply(await self._cache_status())
            case control.ShrinkCache(size):
                await self._cached().cache.measure()
                await self._cached().cache.shrink(size)
                yield control.Done()
            case control.CollectGarbage(dry_run, grace):
                async for reply in self._collect_garbage(dry_run, grace):
                    yield reply
            case control.WarmUp(paths):
                async for progress in self._warm_up(paths):
                    yield progress
                yield control.Done()

    async def _mount(self) -> None:
        try:
            await self._session.mount()
        except OSError as error:
            raise explain(error, self._request.mountpoint) from error
        if isinstance(self._session.filesystem, PassthroughFileSystem) and self._session.notifier is not None:
            self._session.filesystem.drop_attributes = self._session.notifier.invalidate_inode
        self._mounted.set()

    async def _unmount(self, lazy: bool) -> None:
        """``lazy``: programs that still use the mount are cut off, after what they have written has come in."""
        if lazy:
            await asyncio.to_thread(_sync_mount, self._request.mountpoint)
        try:
            await self._session.unmount(lazy=lazy)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            mountpoint = self._request.mountpoint
            raise Refusal(
                errno.EBUSY,
                f"{mountpoint} is in use: end the programs that use it (fuser -vm {mountpoint} shows them), or detach "
                f"it with polefs umount --lazy {mountpoint}",
            ) from None

    async def _save(self) -> None:
        try:
            await self._storage.close()
        except OSError as error:
            self._failure = Refusal(
                error.errno or errno.EIO,
                f"{format_size(self._storage.files.dirty_bytes)} could not be written back ({plain(error)}): all of it "
                f"is kept in {self._volume.local} and goes up at the next mount",
            )
            raise self._failure from error
        finally:
            self._saved.set()

    async def _flush(self) -> None:
        """What the kernel has not yet sent to us, then what we have not yet written back."""
        await asyncio.to_thread(_sync_mount, self._request.mountpoint)
        await self._storage.files.flush()

    async def _until(self, task: asyncio.Future[object]) -> AsyncIterator[control.Progress]:
        """Progress at intervals until the task is done; raises what it raises."""
        while not task.done():
            yield control.Progress(self._storage.files.dirty_bytes)
            await asyncio.wait({task}, timeout=PROGRESS_INTERVAL)
        task.result()

    async def _status(self) -> Status:
        usage = await self._storage.meta.usage()
        info, bucket = self._volume.info, self._volume.bucket
        away_since = self._storage.objects.away_since
        return Status(
            volume=self._volume.path,
            name=info.name,
            uuid=info.uuid,
            format=info.format,
            store=None if bucket is None else bucket.url,
            endpoint=None if bucket is None else bucket.endpoint,
            store_away=None if away_since is None else asyncio.get_running_loop().time() - away_since,
            mounted=not self._detached.is_set(),
            bytes_used=usage.bytes,
            bytes_limit=usage.bytes_limit,
            inodes_used=usage.inodes,
            inodes_limit=usage.inodes_limit,
            dirty_bytes=self._storage.files.dirty_bytes,
            mountpoint=self._request.mountpoint,
            pid=os.getpid(),
            since=self._since,
            read_only=self._request.read_only,
            saving=self._detached.is_set(),
            log_file=self._request.log_file,
            log_level=current_level(),
            version=__version__,
        )

    def _cached(self) -> CachedContents:
        cached = self._storage.files.cached
        if cached is None:
            raise Refusal(
                errno.EOPNOTSUPP, f"volume {self._volume.path} keeps its contents in a local directory: it has no cache"
            )
        return cached

    async def _cache_status(self) -> CacheStatus:
        cached = self._cached()
        usage = await cached.cache.measure()
        return CacheStatus(
            directory=cached.cache.path,
            size=usage.bytes,
            size_limit=cached.cache.limits.size,
            free_limit=cached.cache.limits.free,
            files=usage.files,
            hits=cached.hits,
            misses=cached.misses,
            dirty_bytes=self._storage.files.dirty_bytes,
        )

    async def _warm_up(self, paths: list[bytes]) -> AsyncIterator[control.Progress]:
        cached = self._cached()
        warm_up = WarmUp(self._storage.meta, cached, cached.cache.limits.size)
        running = asyncio.create_task(warm_up.run(paths))
        unmounted = asyncio.create_task(self._detached.wait())
        try:
            while not running.done() and not unmounted.done():
                if warm_up.left is not None:
                    yield control.Progress(warm_up.left)
                await asyncio.wait({running, unmounted}, timeout=PROGRESS_INTERVAL, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise Refusal(errno.ENOTCONN, f"{self._request.mountpoint} was unmounted meanwhile")
            running.result()
        finally:
            for task in (running, unmounted):
                task.cancel()
            await asyncio.wait({running, unmounted})

    async def _collect_garbage(self, dry_run: bool, grace: float | None) -> AsyncIterator[control.Reply]:
        if self._request.read_only and not dry_run:
            mountpoint = self._request.mountpoint
            raise Refusal(errno.EROFS, f"{mountpoint} is mounted read-only: unmount it, or mount it without ro")
        garbage = self._storage.files.garbage
        collecting = asyncio.create_task(garbage.collect(grace=grace, dry_run=dry_run))
        while not collecting.done():
            if garbage.phase is not None:
                yield control.Working(garbage.phase)
            await asyncio.wait({collecting}, timeout=PROGRESS_INTERVAL)
        yield control.GarbageReply(collecting.result())

    def _on_signal(self, number: int) -> None:
        if self._stopping is None:
            log.info("%s: unmounting", signal.Signals(number).name)
            self._stopping = asyncio.get_running_loop().create_task(self._stop())

    async def _stop(self) -> None:
        """Unmount because of a signal: also when programs use the mount. A failure is logged, and the next signal tries
        again."""
        await self._mounted.wait()
        try:
            try:
                await self._session.unmount()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                log.warning("%s is in use: cutting off the programs that use it", self._request.mountpoint)
                await self._unmount(lazy=True)
        except OSError as error:
            if not self._detached.is_set():
                log.error("cannot unmount %s: %s", self._request.mountpoint, plain(error))
                self._stopping = None


def _sync_mount(mountpoint: str) -> None:
    """Let the kernel send what it holds dirty of our mount (syncfs(2)). For a thread: it asks us."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), mountpoint)
    finally:
        os.close(fd)


def _remove_dead_mount(mountpoint: str, volume: str) -> None:
    """Detach our mount when it is still there: its connection was aborted, or we failed after it had been made."""
    mount = find_mount(mountpoint)
    if mount is not None and mount.is_polefs and mount.source == volume:
        log.warning("the connection of %s has ended before it was unmounted: detaching it", mountpoint)
        with contextlib.suppress(OSError):
            unmount(mountpoint, lazy=True)


def _open_trace(path: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise Refusal(error.errno or errno.EIO, f"cannot write the trace {path}: {error.strerror}") from None


def _raise_file_limit() -> None:
    """As many open files as we are allowed: replicas, objects and backing files each take a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_freed_memory() -> None:
    """Let glibc keep what big buffers have taken, for the next ones, instead of giving it back to the kernel each time:
    the page faults take longer than receiving what goes into them. Other C libraries do not have this call."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _run_profiled(runner: asyncio.Runner, volume: Volume, request: MountRequest, ready: Ready) -> None:
    import cProfile

    profile = cProfile.Profile()
    try:
        profile.runcall(runner.run, serve_volume(volume, request, ready))
    finally:
        profile.dump_stats(str(request.profile))
