"""Passthrough on real mounts: bytes go past the server, and no mixture of handles fails an open."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rawfuse.testing.mounts import MNT_DETACH, mount_syscall, umount_syscall
from rawfuse.testing.plugin import FuseMount
from rawfuse.testing.server import Server
from rawfuse.testing.syscalls import fails
from tests.mounted.modes import MODES
from tests.mounted.targets import STRESS

NOBODY = 65534
MIXED = [mode.decode() for mode in MODES]
SAME = [mode for mode in MIXED if mode not in ("passthrough-other", "passthrough-stream")]
"""Modes in which the file itself is read and written at any offset."""
CONTENT = b"0123456789" * 1000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return source


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def mirror(source: Path, *options: str | Path) -> list[str]:
    return [sys.executable, "-m", "examples.mirror", *map(str, options), str(source), "{mountpoint}"]


@pytest.fixture
def mount(fuse_mount: FuseMount, source: Path) -> Iterator[Path]:
    """A ``tests.mounted.modes`` mount with one file ``f``."""
    (source / "f").write_bytes(CONTENT)
    server = fuse_mount([sys.executable, "-m", "tests.mounted.modes", str(source), "{mountpoint}"])
    yield server.mountpoint
    assert "Traceback" not in server.log_since(0)


class Opener:
    """Opens one file in modes of the test's choice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, mode: str, flags: int = os.O_RDWR) -> int:
        os.setxattr(self.path, "user.mode", mode.encode())
        return os.open(self.path, flags)

    @property
    def opened(self) -> str:
        return os.getxattr(self.path, "user.opened").decode()

    @property
    def served(self) -> int:
        """READs and WRITEs that reached the server."""
        return int(os.getxattr(self.path, "user.served"))


@pytest.fixture
def file(mount: Path) -> Opener:
    return Opener(mount / "f")


def mapped(fd: int) -> bytes:
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        return memory[:]


class TestModes:
    @pytest.mark.deadline(180)
    def test_any_two_handles(self, file: Opener, source: Path) -> None:
        """Whatever is open, another handle opens, and both read and write the same bytes."""
        for first, second in itertools.product(SAME, SAME):
            one = file.open(first)
            two = file.open(second)
            word = f"{first}, {second}".encode()
            os.pwrite(one, word, 0)
            assert os.pread(two, len(word), 0) == word
            os.pwrite(two, word[::-1], 5000)
            assert os.pread(one, len(word), 5000) == word[::-1]
            os.close(one)
            assert os.pread(two, len(word), 0) == word
            three = file.open(first)
            assert os.pread(three, len(word), 5000) == word[::-1]
            os.close(two)
            os.close(three)
            assert (source / "f").read_bytes()[: len(word)] == word

    def test_choice_is_told(self, file: Opener) -> None:
        fd = file.open("passthrough")
        assert file.opened == "PASSTHROUGH"
        others = [file.open("kept"), file.open("passthrough"), file.open("passthrough-other")]
        assert file.opened == "DIRECT_IO|PASSTHROUGH"
        for other in (fd, *others):
            os.close(other)
        fd = file.open("kept")
        assert file.opened == "KEEP_CACHE"
        other = file.open("passthrough")
        assert file.opened == "KEEP_CACHE"
        os.close(fd)
        os.close(other)
        os.close(file.open("passthrough-stream"))
        assert file.opened == "STREAM"
        os.close(file.open("passthrough-closed"))
        assert file.opened == ""

    def test_what_is_passed_through_is_not_served_here(self, file: Opener) -> None:
        fd = file.open("passthrough")
        before = file.served
        assert os.pread(fd, len(CONTENT), 0) == CONTENT
        os.pwrite(fd, b"new", 0)
        assert mapped(fd)[:4] == b"new3"
        assert file.served == before
        other = file.open("direct")
        assert os.pread(other, 4, 0) == b"new3"
        assert file.served == before + 1
        os.close(fd)
        os.close(other)

    def test_mapping_of_a_handle_served_here(self, file: Opener) -> None:
        """Beside handles in passthrough, its mapping is the backing file's."""
        fd = file.open("passthrough")
        other = file.open("cached")
        assert mapped(other) == CONTENT
        os.pwrite(fd, b"new", 0)
        assert mapped(other)[:4] == b"new3"
        os.close(fd)
        os.close(other)

    def test_mapped_direct_handle(self, file: Opener) -> None:
        """A mapping makes it a cached one to the kernel, which tells nobody."""
        fd = file.open("direct")
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            other = file.open("passthrough")
            assert os.pread(other, len(CONTENT), 0) == memory[:]
            os.close(other)
        os.close(fd)

    def test_pages_from_before_are_not_kept(self, file: Opener) -> None:
        fd = file.open("kept")
        assert os.pread(fd, len(CONTENT), 0) == CONTENT
        os.close(fd)
        fd = file.open("passthrough")
        os.pwrite(fd, b"new", 0)
        os.close(fd)
        fd = file.open("kept")
        assert os.pread(fd, 4, 0) == b"new3"
        os.close(fd)

    @pytest.mark.parametrize("mode", ["passthrough", "passthrough-path"])
    def test_first_handle_decides_for_every_access(self, file: Opener, mode: str) -> None:
        """A backing file that was registered for reading serves writers too."""
        fd = file.open(mode, os.O_RDONLY)
        other = file.open(mode, os.O_WRONLY | os.O_APPEND)
        os.write(other, b"the end")
        assert os.pread(fd, 100, len(CONTENT)) == b"the end"
        os.close(fd)
        os.close(other)

    @pytest.mark.deadline(120)
    def test_handles_come_and_go_at_once(self, file: Opener) -> None:
        """Opens and releases of several threads, in every mode, race each other; EIO would end a thread."""
        rounds = 2000 if STRESS else 150
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            chance = random.Random(seed)
            fds: list[int] = []
            try:
                for _ in range(rounds):
                    if fds and chance.random() < 0.5:
                        os.close(fds.pop(chance.randrange(len(fds))))
                    else:
                        fds.append(file.open(chance.choice(SAME)))
                        assert os.pread(fds[-1], 100, 50) == CONTENT[50:150]
                    while len(fds) > 3 or (fds and chance.random() < 0.2):
                        os.close(fds.pop())
            except BaseException as failure:
                failures.append(failure)
            finally:
                for fd in fds:
                    os.close(fd)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


class TestMirror:
    @pytest.fixture
    def server(self, fuse_mount: FuseMount, source: Path, trace: Path) -> Iterator[Server]:
        server = fuse_mount(mirror(source, "--trace", trace))
        yield server
        assert "Traceback" not in server.log_since(0)

    def test_bytes_go_past_the_server(self, server: Server, trace: Path, source: Path) -> None:
        path = server.mountpoint / "f"
        path.write_bytes(CONTENT)
        assert (source / "f").read_bytes() == CONTENT
        with open(path, "ab") as file:
            file.write(b"more")
        assert path.stat().st_size == len(CONTENT) + 4
        assert path.read_bytes() == CONTENT + b"more"
        with open(path, "r+b") as file:
            with mmap.mmap(file.fileno(), 0) as memory:
                memory[:5] = b"HELLO"
                memory.flush()
            file.truncate(5)
        assert path.read_bytes() == (source / "f").read_bytes() == b"HELLO"
        assert " OPEN " in trace.read_text()
        assert " READ " not in trace.read_text()
        assert " WRITE " not in trace.read_text()

    def test_attributes_follow(self, server: Server, source: Path) -> None:
        path = server.mountpoint / "f"
        with open(path, "wb", buffering=0) as file:
            for number in range(10):
                file.write(bytes(1000))
                assert os.fstat(file.fileno()).st_size == (number + 1) * 1000
        before = path.stat().st_mtime_ns
        os.utime(source / "f", (1, 1))
        with open(path, "r+b", buffering=0) as file:
            file.write(b"x")
        assert path.stat().st_mtime_ns > before
        assert path.stat().st_mtime_ns == (source / "f").stat().st_mtime_ns

    def test_set_ids_end_with_a_write(self, server: Server, source: Path) -> None:
        path = server.mountpoint / "f"
        path.write_bytes(b"program")
        path.chmod(0o6777)
        program = "import os, sys; fd = os.open(sys.argv[1], os.O_WRONLY); os.write(fd, b'x'); os.close(fd)"
        command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-c", program, path]
        subprocess.run(command, check=True, timeout=30)
        assert path.read_bytes() == b"xrogram"
        assert stat.S_IMODE(path.stat().st_mode) == 0o777
        assert stat.S_IMODE((source / "f").stat().st_mode) == 0o777

    def test_direct_io(self, server: Server) -> None:
        path = server.mountpoint / "f"
        path.write_bytes(bytes(8192))
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 4096) as memory:
            memory[:] = b"d" * 4096
            assert os.pwrite(fd, memory, 4096) == 4096
            assert os.preadv(fd, [memory], 0) == 4096
            assert memory[:] == bytes(4096)
        os.close(fd)
        assert path.read_bytes() == bytes(4096) + b"d" * 4096

    def test_removed_and_unnamed_files(self, server: Server) -> None:
        path = server.mountpoint / "f"
        with open(path, "w+b", buffering=0) as file:
            path.unlink()
            file.write(CONTENT)
            assert os.pread(file.fileno(), len(CONTENT), 0) == CONTENT
            assert os.fstat(file.fileno()).st_size == len(CONTENT)
        fd = os.open(server.mountpoint, os.O_TMPFILE | os.O_RDWR)
        os.write(fd, CONTENT)
        assert os.pread(fd, len(CONTENT), 0) == CONTENT
        os.close(fd)

    def test_errors_of_the_backing_file_system(self, server: Server) -> None:
        with open(server.mountpoint / "f", "wb", buffering=0) as file, fails(errno.EFBIG):
            os.pwrite(file.fileno(), b"x", (1 << 63) - 2)


class TestFallback:
    def test_switched_off(self, fuse_mount: FuseMount, source: Path, trace: Path) -> None:
        server = fuse_mount(mirror(source, "--no-passthrough", "--trace", trace))
        (server.mountpoint / "f").write_bytes(CONTENT)
        assert (source / "f").read_bytes() == CONTENT
        server.unmount()
        assert " WRITE " in trace.read_text()

    def test_backing_file_system_is_stacked_too_deep(self, fuse_mount: FuseMount, source: Path, trace: Path) -> None:
        """A passthrough mount is one layer by itself, so a mirror of a mirror serves its bytes here."""
        below = fuse_mount(mirror(source))
        above = fuse_mount(mirror(below.mountpoint, "--trace", trace))
        (above.mountpoint / "f").write_bytes(CONTENT)
        assert (above.mountpoint / "f").read_bytes() == CONTENT
        assert (source / "f").read_bytes() == CONTENT
        above.unmount()
        assert "BACKING_OPEN: Too many levels of symbolic links" in above.log_since(0)
        assert " WRITE " in trace.read_text()

    def test_backing_file_system_without_direct_io(self, fuse_mount: FuseMount, source: Path) -> None:
        mount_syscall("none", str(source), "ramfs", 0)
        try:
            (source / "f").write_bytes(CONTENT)
            server = fuse_mount(mirror(source))
            path = server.mountpoint / "f"
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            assert os.pread(fd, 10, 0) == CONTENT[:10]
            os.close(fd)
            with open(path, "rb", buffering=0) as file:
                assert file.read() == CONTENT
                with fails(errno.EINVAL):
                    os.open(path, os.O_RDONLY | os.O_DIRECT)
            fd = os.open(server.mountpoint / "new", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
            assert os.pwrite(fd, CONTENT, 0) == len(CONTENT)
            os.close(fd)
            server.unmount()
            assert (source / "new").read_bytes() == CONTENT
        finally:
            umount_syscall(str(source), MNT_DETACH)
