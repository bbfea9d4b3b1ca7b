"""How handles of one inode are served together: the kernel, whose rules are modelled here, never refuses an open."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rawfuse import Attributes, Entry, OpenedFile, OpenFlag, ops
from rawfuse.backing import BackingFiles
from rawfuse.device import Device

PASSTHROUGH, DIRECT_IO = OpenFlag.PASSTHROUGH, OpenFlag.DIRECT_IO
COMPANIONS = PASSTHROUGH | DIRECT_IO | OpenFlag.PARALLEL_DIRECT_WRITES | OpenFlag.NOFLUSH


@dataclass
class Handle:
    nodeid: int
    flags: int
    cached: bool = False
    uncached: bool = False


@dataclass
class Inode:
    """``count``: of handles in cached mode, or, negative, in passthrough (``fuse_inode.iocachectr``)."""

    count: int = 0
    backing: object = None


class ModelKernel(Device):
    """The device's backing files and the inode modes of Linux 6.18, ``fs/fuse/iomode.c`` and ``backing.c``."""

    def __init__(self) -> None:
        self.ids: dict[int, object] = {}
        self.inodes: dict[int, Inode] = {}
        self.numbers = itertools.count(1)
        self.fail_next = 0

    def open_backing(self, fd: int) -> int:
        if self.fail_next:
            error, self.fail_next = self.fail_next, 0
            return -error
        number = next(self.numbers)
        self.ids[number] = object()
        return number

    def close_backing(self, backing_id: int) -> int:
        return -errno.ENOENT if self.ids.pop(backing_id, None) is None else 0

    def open(self, nodeid: int, opened: OpenedFile) -> Handle:  # type: ignore[override]
        """fuse_file_io_open."""
        inode = self.inodes.setdefault(nodeid, Inode())
        handle = Handle(nodeid, opened.flags)
        if opened.flags & PASSTHROUGH:
            assert not opened.flags & ~COMPANIONS, "EIO: flags that do not go with passthrough"
            backing = self.ids.get(opened.backing_id)
            assert backing is not None, "EIO: no such backing id"
            assert inode.backing in (None, backing), "EIO: another backing file"
            assert inode.count <= 0, "EIO: cached handles"
            inode.backing = backing
            inode.count -= 1
            handle.uncached = True
        else:
            assert inode.backing is None, "EIO: handles in passthrough"
            if not opened.flags & DIRECT_IO:
                inode.count += 1
                handle.cached = True
        return handle

    def map_shared(self, handle: Handle) -> None:
        """fuse_file_mmap with MAP_SHARED; DIRECT_IO_ALLOW_MMAP was agreed. ENODEV is no failure of an open."""
        inode = self.inodes[handle.nodeid]
        if not (handle.uncached or handle.cached or inode.backing):
            inode.count += 1
            handle.cached = True

    def release(self, handle: Handle) -> None:
        """fuse_file_io_release."""
        inode = self.inodes[handle.nodeid]
        if handle.cached:
            inode.count -= 1
        elif handle.uncached:
            inode.count += 1
            if inode.count == 0:
                inode.backing = None


class Files:
    """Two regular files to stand behind inodes."""

    def __init__(self) -> None:
        self.fds = [os.memfd_create("backing") for _ in range(2)]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


FLAGS = st.sets(st.sampled_from(OpenFlag)).map(lambda chosen: int(sum(chosen)))
NODES = st.integers(1, 2)


class Opens(RuleBasedStateMachine):
    """Handles come and go; RELEASE is read some time after the kernel has let go."""

    @initialize()
    def begin(self) -> None:
        self.kernel = ModelKernel()
        self.backing = BackingFiles(self.kernel)
        self.handles: list[Handle] = []
        self.releases: list[int] = []
        self.files = Files()

    def teardown(self) -> None:
        if hasattr(self, "files"):
            while self.handles:
                self.close(0)
            while self.releases:
                self.read_release(0)
            self.files.close()
            assert self.kernel.ids == {}

    @rule(nodeid=NODES, flags=FLAGS, which=st.integers(-1, 1), lost=st.booleans(), failing=st.booleans())
    def open(self, nodeid: int, flags: int, which: int, lost: bool, failing: bool) -> None:
        self.kernel.fail_next = errno.ELOOP if failing else 0
        opened = OpenedFile(1, flags, self.files.fds[which] if which >= 0 else -1)
        self.backing.opened(nodeid, opened, 0)
        self.kernel.fail_next = 0
        assert bool(opened.flags & PASSTHROUGH) == bool(opened.backing_id)
        if lost:
            self.backing.released(nodeid, 0)
        else:
            self.handles.append(self.kernel.open(nodeid, opened))

    @rule(number=st.integers(0, 9))
    def close(self, number: int) -> None:
        if self.handles:
            handle = self.handles.pop(number % len(self.handles))
            self.kernel.release(handle)
            self.releases.append(handle.nodeid)

    @rule(number=st.integers(0, 9))
    def read_release(self, number: int) -> None:
        if self.releases:
            self.backing.released(self.releases.pop(number % len(self.releases)), 0)

    @rule(number=st.integers(0, 9))
    def map_shared(self, number: int) -> None:
        if self.handles:
            self.kernel.map_shared(self.handles[number % len(self.handles)])

    @invariant()
    def one_backing_file_an_inode(self) -> None:
        if hasattr(self, "kernel"):
            assert len(self.kernel.ids) <= 2


TestOpens = Opens.TestCase


class TestChoice:
    @pytest.fixture
    def files(self) -> Iterator[Files]:
        files = Files()
        yield files
        files.close()

    @pytest.fixture
    def kernel(self) -> ModelKernel:
        return ModelKernel()

    @pytest.fixture
    def backing(self, kernel: ModelKernel) -> BackingFiles:
        return BackingFiles(kernel)

    def choose(self, backing: BackingFiles, flags: int = 0, fd: int = -1) -> tuple[int, int]:
        opened = OpenedFile(3, flags, fd)
        backing.opened(7, opened, 0)
        return opened.flags, opened.backing_id

    def test_first_with_a_file(self, backing: BackingFiles, files: Files) -> None:
        assert self.choose(backing, OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH, files.fds[0]) == (
            PASSTHROUGH | OpenFlag.NOFLUSH,
            1,
        )

    def test_all_share_one_id(self, backing: BackingFiles, files: Files) -> None:
        assert self.choose(backing, fd=files.fds[0]) == (PASSTHROUGH, 1)
        assert self.choose(backing, fd=files.fds[0]) == (PASSTHROUGH, 1)
        again = os.open(f"/proc/self/fd/{files.fds[0]}", os.O_RDONLY)
        assert self.choose(backing, fd=again) == (PASSTHROUGH, 1)
        os.close(again)

    def test_none_or_another_file_is_served_here(self, backing: BackingFiles, files: Files) -> None:
        self.choose(backing, fd=files.fds[0])
        assert self.choose(backing, OpenFlag.KEEP_CACHE) == (PASSTHROUGH | DIRECT_IO, 1)
        assert self.choose(backing, fd=files.fds[1]) == (PASSTHROUGH | DIRECT_IO, 1)
        assert self.choose(backing, OpenFlag.STREAM, files.fds[0]) == (PASSTHROUGH | DIRECT_IO, 1)
        assert self.choose(backing, fd=1 << 20) == (PASSTHROUGH | DIRECT_IO, 1)

    @pytest.mark.parametrize("first", [0, OpenFlag.KEEP_CACHE, DIRECT_IO])
    def test_other_handles_first(self, backing: BackingFiles, files: Files, first: int) -> None:
        assert self.choose(backing, first) == (first, 0)
        assert self.choose(backing, OpenFlag.KEEP_CACHE, files.fds[0]) == (OpenFlag.KEEP_CACHE, 0)

    @pytest.mark.parametrize("stream", [OpenFlag.STREAM, OpenFlag.NONSEEKABLE])
    def test_streams_have_no_backing_file(self, backing: BackingFiles, files: Files, stream: int) -> None:
        assert self.choose(backing, stream, files.fds[0]) == (stream, 0)

    def test_what_is_the_librarys_own_is_ignored(self, backing: BackingFiles) -> None:
        opened = OpenedFile(3, PASSTHROUGH, backing_id=5)
        backing.opened(7, opened, 0)
        assert (opened.flags, opened.backing_id) == (0, 0)

    def test_id_is_kept_until_the_last_release(self, backing: BackingFiles, files: Files, kernel: ModelKernel) -> None:
        self.choose(backing, fd=files.fds[0])
        self.choose(backing)
        backing.released(7, 0)
        assert list(kernel.ids) == [1]
        backing.released(7, 0)
        assert not kernel.ids
        assert self.choose(backing, fd=files.fds[1]) == (PASSTHROUGH, 2)

    def test_release_of_what_is_not_open(self, backing: BackingFiles) -> None:
        backing.released(7, 0)

    @pytest.mark.parametrize("error", [errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.EBADF])
    def test_failure_is_of_one_file(
        self, backing: BackingFiles, files: Files, kernel: ModelKernel, error: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(2):
            kernel.fail_next = error
            assert self.choose(backing, OpenFlag.KEEP_CACHE, files.fds[0]) == (OpenFlag.KEEP_CACHE, 0)
            backing.released(7, 0)
        assert caplog.text.count(os.strerror(error)) == 1
        assert self.choose(backing, fd=files.fds[0]) == (PASSTHROUGH, 1)

    @pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTTY])
    def test_failure_for_good(self, backing: BackingFiles, files: Files, kernel: ModelKernel, error: int) -> None:
        kernel.fail_next = error
        assert self.choose(backing, fd=files.fds[0]) == (0, 0)
        backing.released(7, 0)
        assert self.choose(backing, fd=files.fds[0]) == (0, 0)

    def test_handlers(self, backing: BackingFiles, files: Files, kernel: ModelKernel) -> None:
        """OPEN and CREATE count for their own inode, and RELEASE when its handler has ended."""
        seen: list[int] = []

        async def open_file(op: ops.OpenFile) -> OpenedFile:
            return OpenedFile(3, 0, files.fds[0])

        async def create_file(op: ops.CreateFile) -> tuple[Entry, OpenedFile]:
            return Entry(8, Attributes(8, stat.S_IFREG)), OpenedFile(4, 0, files.fds[1])

        async def release(op: ops.ReleaseFileHandle) -> None:
            seen.append(len(kernel.ids))

        async def wrong(op: ops.Op) -> str:
            return "no reply at all"

        async def scenario() -> None:
            opened = await backing.opening(open_file)(ops.OpenFile(2, 7, 0, 0, 0, 0, 0))
            assert (opened.flags, opened.backing_id) == (PASSTHROUGH, 1)
            _, created = await backing.creating(create_file)(ops.CreateFile(4, 1, 0, 0, 0, 0, 0, 0, 0, b"f"))
            assert (created.flags, created.backing_id) == (PASSTHROUGH, 2)
            assert await backing.opening(wrong)(ops.OpenFile(6, 9, 0, 0, 0, 0, 0)) == "no reply at all"
            assert await backing.creating(wrong)(ops.CreateFile(8, 9, 0, 0, 0, 0, 0, 0, 0, b"f")) == "no reply at all"
            releasing = backing.releasing(release)
            await releasing(ops.ReleaseFileHandle(10, 7, 0, 0, 0, 3, 0, 0, 0))
            await releasing(ops.ReleaseFileHandle(12, 8, 0, 0, 0, 4, 0, 0, 0))
            await releasing(ops.ReleaseFileHandle(14, 9, 0, 0, 0, 5, 0, 0, 0))

        asyncio.run(scenario())
        assert seen == [2, 1, 0]
