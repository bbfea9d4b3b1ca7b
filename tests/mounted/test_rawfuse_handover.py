"""A mount whose server is killed, at every point of every operation and at random under load: nobody on it notices."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import re
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import deadline_of, make_scratch
from rawfuse.testing.server import Server
from rawfuse.testing.syscalls import RENAME_EXCHANGE, fails, link_fd, rename2
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.dying import POINTS
from tests.mounted.handover_load import KINDS
from tests.mounted.targets import STRESS

NOBODY = 65534


def kept(module: str, *arguments: str | Path) -> list[str]:
    """A server that its keeper runs again. Arguments may name {scratch}."""
    server = [sys.executable, "-m", module, *map(str, arguments), "{scratch}/source", "{mountpoint}"]
    return [sys.executable, "-m", "rawfuse.keeper", "{scratch}/keeper", "--", *server]


@dataclass
class Place:
    """A mount that a keeper holds."""

    server: Server

    @property
    def root(self) -> Path:
        return self.server.mountpoint

    @property
    def source(self) -> Path:
        return self.root.parent / "source"

    @property
    def orders(self) -> Path:
        return self.root.parent / "orders"

    def served_by(self) -> int | None:
        """The process that serves it at the moment, or is about to, or has been until now."""
        keeper = self.server.pid
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        return int(children[0]) if children else None

    def order(self, words: str) -> None:
        self.orders.write_text(words)

    def until_dead(self) -> None:
        """The order has been carried out, by a request from here at the latest, and another process serves."""
        while self.orders.exists():
            os.statvfs(self.root)
        os.statvfs(self.root)


@contextlib.contextmanager
def place(watchdog: Watchdog, command: list[str]) -> Iterator[Place]:
    """As ``fuse_mount``, for more than one test."""
    scratch = make_scratch("handover")
    words = [word.replace("{scratch}", str(scratch)).replace("{mountpoint}", str(scratch / "mnt")) for word in command]
    (scratch / "source").mkdir()
    server = Server(words, scratch / "mnt", scratch / "server.log")
    server.start()
    watchdog.watch(server)
    try:
        yield Place(server)
        server.unmount()
        assert "Traceback" not in server.log_since(0)
    finally:
        watchdog.unwatch(server)
        server.abort()
        server.kill()
        subprocess.run(["rm", "-r", scratch], check=True, timeout=60)


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a directory."""
    found = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = Path(directory) / name
            mode = path.lstat().st_mode
            content = (
                path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path).encode() if path.is_symlink() else b""
            )
            found[str(path.relative_to(root))] = (mode, content)
    return found


MODES = {"passthrough": [], "served": ["--no-passthrough"]}
BOTH = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


@pytest.fixture(scope="module", params=MODES if STRESS else ["passthrough"])
def dying(request: pytest.FixtureRequest, watchdog: Watchdog) -> Iterator[Place]:
    """A mirror that takes orders."""
    command = kept("tests.mounted.dying", "{scratch}/orders", "--keeper", "{scratch}/keeper", *MODES[request.param])
    with place(watchdog, command) as mounted:
        yield mounted


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest, watchdog: Watchdog) -> Iterator[None]:
    with watchdog.deadline(deadline_of(request)):
        yield


Check = Callable[[Path, Callable[[], None]], None]


class TestEveryPoint:
    """The server dies where it is told to; the operation succeeds all the same, and only once."""

    @pytest.fixture
    def at_each_point(self, dying: Place, request: pytest.FixtureRequest) -> Callable[..., None]:
        """``at_each_point(operation, check)`` calls ``check(directory, begin)`` in a fresh directory for each point;
        what it does after ``begin()`` makes the server die at that point of the operation. ``noted``: the mirror takes
        notes of it."""

        def run(operation: str, check: Check, *, noted: bool = False) -> None:
            for point in POINTS:
                if point == "intended" and not noted:
                    continue
                directory = dying.root / f"{re.sub(r'[^a-z]+', '-', request.node.name)}{point}"
                directory.mkdir()
                before = dying.served_by()
                check(directory, functools.partial(dying.order, f"{point} {operation}"))
                dying.until_dead()
                assert dying.served_by() != before
                assert contents(directory) == contents(dying.source / directory.name)

        return run

    def test_mk_dir(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            begin()
            (directory / "d").mkdir(0o750)
            assert stat.S_IMODE((directory / "d").stat().st_mode) == 0o750
            with fails(errno.EEXIST):
                (directory / "d").mkdir()

        at_each_point("MkDir", check, noted=True)

    def test_mk_node(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            begin()
            os.mkfifo(directory / "p", 0o640)
            assert stat.S_ISFIFO((directory / "p").stat().st_mode)
            assert os.listdir(directory) == ["p"]

        at_each_point("MkNode", check, noted=True)

    def test_create_symlink(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            begin()
            os.symlink("target", directory / "l")
            assert os.readlink(directory / "l") == "target"

        at_each_point("CreateSymlink", check, noted=True)

    def test_create_link(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "f").write_bytes(b"content")
            begin()
            os.link(directory / "f", directory / "g")
            assert (directory / "f").stat().st_nlink == 2
            assert (directory / "g").read_bytes() == b"content"

        at_each_point("CreateLink", check, noted=True)

    def test_create_file(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            begin()
            fd = os.open(directory / "f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o400)
            assert os.write(fd, b"content") == 7
            assert os.pread(fd, 100, 0) == b"content"
            os.close(fd)
            assert stat.S_IMODE((directory / "f").stat().st_mode) == 0o400

        at_each_point("CreateFile", check, noted=True)

    def test_create_file_as_another_user(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            directory.chmod(0o777)
            begin()
            command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "touch", directory / "f"]
            subprocess.run(command, check=True, timeout=60)
            status = (directory / "f").stat()
            assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)

        at_each_point("CreateFile", check, noted=True)

    def test_create_tmpfile(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            begin()
            fd = os.open(directory, os.O_RDWR | os.O_TMPFILE)
            os.write(fd, b"content")
            link_fd(fd, directory / "named")
            os.close(fd)
            assert (directory / "named").read_bytes() == b"content"

        at_each_point("CreateTmpfile", check)

    def test_unlink(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "f").write_bytes(b"content")
            with open(directory / "f", "rb", buffering=0) as file:
                begin()
                (directory / "f").unlink()
                assert os.listdir(directory) == []
                assert file.read() == b"content"
                assert os.fstat(file.fileno()).st_nlink == 0

        at_each_point("Unlink", check, noted=True)

    def test_rm_dir(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "d").mkdir()
            begin()
            (directory / "d").rmdir()
            assert os.listdir(directory) == []

        at_each_point("RmDir", check, noted=True)

    def test_rm_dir_that_fails(self, at_each_point: Callable[..., None]) -> None:
        """The error is not journaled, and is the same the second time."""

        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "full" / "d").mkdir(parents=True)
            (directory / "empty").mkdir()
            begin()
            with fails(errno.ENOTEMPTY):
                (directory / "full").rmdir()
            (directory / "empty").rmdir()
            assert os.listdir(directory) == ["full"]

        at_each_point("RmDir", check, noted=True)

    def test_rename(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "old").write_bytes(b"old")
            (directory / "new").write_bytes(b"new")
            begin()
            os.rename(directory / "old", directory / "new")
            assert os.listdir(directory) == ["new"]
            assert (directory / "new").read_bytes() == b"old"

        at_each_point("Rename", check, noted=True)

    def test_exchange(self, dying: Place, at_each_point: Callable[..., None]) -> None:
        """Twice would be as good as never, which the kernel would not notice at once."""

        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "a").write_bytes(b"a")
            (directory / "b").write_bytes(b"b")
            begin()
            rename2(directory / "a", directory / "b", RENAME_EXCHANGE)
            for where in directory, dying.source / directory.name:
                assert (where / "a").read_bytes() == b"b"
                assert (where / "b").read_bytes() == b"a"

        at_each_point("Rename", check, noted=True)

    def test_set_xattr(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            begin()
            os.setxattr(directory, "user.a", b"value", os.XATTR_CREATE)
            assert os.getxattr(directory, "user.a") == b"value"

        at_each_point("SetXattr", check, noted=True)

    def test_remove_xattr(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            os.setxattr(directory, "user.a", b"value")
            begin()
            os.removexattr(directory, "user.a")
            assert os.listxattr(directory) == []

        at_each_point("RemoveXattr", check, noted=True)

    def test_set_attributes(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "f").write_bytes(b"content")
            with open(directory / "f", "r+b", buffering=0) as file:
                begin()
                file.truncate(3)
                assert file.read() == b"con"

        at_each_point("SetInodeAttributes", check)

    def test_open(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "f").write_bytes(b"content")
            begin()
            with open(directory / "f", "r+b", buffering=0) as file, open(directory / "f", "rb") as other:
                file.write(b"C")
                assert other.read() == b"Content"

        at_each_point("OpenFile", check)

    def test_release(self, at_each_point: Callable[..., None]) -> None:
        """In passthrough, the backing file is given up after the last one, and not earlier."""

        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "f").write_bytes(b"content")
            first, second = (os.open(directory / "f", os.O_RDONLY) for _ in range(2))
            begin()
            os.close(first)
            while directory.parent.with_name("orders").exists():
                os.statvfs(directory)
            third = os.open(directory / "f", os.O_RDONLY)
            assert os.pread(second, 100, 0) == os.pread(third, 100, 0) == b"content"
            os.close(second)
            os.close(third)

        at_each_point("ReleaseFileHandle", check)

    @pytest.mark.parametrize("operation", ["OpenDir", "ReleaseDirHandle"])
    def test_list(self, at_each_point: Callable[..., None], operation: str) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            names = {str(number) for number in range(50)}
            for name in names:
                (directory / name).mkdir()
            begin()
            assert set(os.listdir(directory)) == names

        at_each_point(operation, check)

    def test_append(self, watchdog: Watchdog) -> None:
        """WRITE, which is sent without passthrough only."""
        command = kept("tests.mounted.dying", "{scratch}/orders", "--keeper", "{scratch}/keeper", "--no-passthrough")
        with place(watchdog, command) as served, open(served.root / "f", "ab", buffering=0) as file:
            for point in ("begun", "executed", "journaled", "answered"):
                served.order(f"{point} WriteFile")
                file.write(point.encode())
                served.until_dead()
            assert (served.source / "f").read_bytes() == b"begunexecutedjournaledanswered"

    def test_fallocate(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            with open(directory / "f", "w+b", buffering=0) as file:
                begin()
                os.posix_fallocate(file.fileno(), 0, 10000)
                assert os.fstat(file.fileno()).st_size == 10000

        at_each_point("Fallocate", check)

    def test_copy_file_range(self, at_each_point: Callable[..., None]) -> None:
        def check(directory: Path, begin: Callable[[], None]) -> None:
            (directory / "f").write_bytes(b"content")
            with open(directory / "f", "r+b", buffering=0) as file:
                begin()
                assert os.copy_file_range(file.fileno(), file.fileno(), 3, 0, 7) == 3
                assert file.read() == b"contentcon"

        at_each_point("CopyFileRange", check)


class Load:
    """``tests.mounted.handover_load`` of every kind, and how many rounds they have done."""

    def __init__(self, root: Path, seed: int) -> None:
        self._rounds = 0
        self._changed = threading.Condition()
        self._workers = []
        self._readers = []
        for kind in KINDS:
            (root / kind).mkdir()
            command = [sys.executable, "-m", "tests.mounted.handover_load", kind, str(seed), str(root / kind)]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            reader = threading.Thread(target=self._read, args=(worker,), daemon=True)
            self._workers.append(worker)
            self._readers.append(reader)
            reader.start()

    def _read(self, worker: subprocess.Popen[bytes]) -> None:
        assert worker.stdout is not None
        for _ in worker.stdout:
            with self._changed:
                self._rounds += 1
                self._changed.notify_all()
        with self._changed:  # it has ended
            self._changed.notify_all()

    def go_on(self, rounds: int) -> None:
        """Until so many more have been done, and none has failed."""
        with self._changed:
            end = self._rounds + rounds
            self._changed.wait_for(
                lambda: self._rounds >= end or any(worker.poll() is not None for worker in self._workers)
            )
        assert all(worker.poll() is None for worker in self._workers), "the load has failed; its output tells how"

    def stop(self) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()
        assert [worker.wait(120) for worker in self._workers] == [0] * len(self._workers)

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
        for reader in self._readers:
            reader.join()


@contextlib.contextmanager
def loaded(root: Path, seed: int) -> Iterator[Load]:
    load = Load(root, seed)
    try:
        yield load
        load.stop()
    finally:
        load.kill()


@BOTH
@pytest.mark.deadline(3600 if STRESS else 120)
def test_killed_under_load(watchdog: Watchdog, options: list[str]) -> None:
    chance = random.Random(5)
    with place(watchdog, kept("examples.mirror", "--keeper", "{scratch}/keeper", *options)) as mounted:
        with loaded(mounted.root, 5) as load:
            last = None
            for _ in range(100 if STRESS else 5):
                load.go_on(chance.randrange(1, 30))
                while (server := mounted.served_by()) in (None, last):
                    load.go_on(1)
                assert server is not None
                os.kill(server, signal.SIGKILL)
                last = server
            load.go_on(10)
        assert contents(mounted.root) == contents(mounted.source)


@BOTH
def test_handed_over_under_load(watchdog: Watchdog, options: list[str]) -> None:
    """SIGHUP: the server ends by itself and its successor goes on."""
    with place(watchdog, kept("examples.mirror", "--keeper", "{scratch}/keeper", *options)) as mounted:
        with loaded(mounted.root, 7) as load:
            load.go_on(3)
            for _ in range(10 if STRESS else 2):
                server = mounted.served_by()
                assert server is not None
                ended = os.pidfd_open(server)
                os.kill(server, signal.SIGHUP)
                assert select.select([ended], [], [], 60)[0]
                os.close(ended)
                load.go_on(5)
        assert contents(mounted.root) == contents(mounted.source)
