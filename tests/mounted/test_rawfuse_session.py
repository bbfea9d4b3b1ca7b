"""The life of a rawfuse mount: start, failure to start, signals, every way to end; the examples' options."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rawfuse.testing.mounts import FUSECTL, find_mount, umount_syscall
from rawfuse.testing.server import Server
from rawfuse.testing.syscalls import fails
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import REPOSITORY

NOBODY = 65534
LOOPS = pytest.mark.parametrize("loop", [[], ["--asyncio"]], ids=["uvloop", "asyncio"])

WAIT_FOR_LOCK = """
import fcntl, signal, sys

class Interrupted(Exception):
    pass

def on_signal(number, frame):
    raise Interrupted

signal.signal(signal.SIGUSR1, on_signal)
file = open(sys.argv[1], "r+")
print("waiting", flush=True)
try:
    if sys.argv[2] == "flock":
        fcntl.flock(file, fcntl.LOCK_EX)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX)
except Interrupted:
    print("interrupted", flush=True)
except OSError as error:
    print("error", error.errno, flush=True)
else:
    print("locked", flush=True)
"""

CANCELLED = """
import asyncio, sys
from rawfuse import FileSystem, Session

class Waiting(FileSystem):
    async def get_inode_attributes(self, op):
        print("asked", flush=True)
        await asyncio.get_running_loop().create_future()

async def main():
    session = Session(Waiting(), sys.argv[1])
    await session.mount()
    await session.serve()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
"""


def wait_for_log(server: Server, text: str) -> None:
    """Returns once the server has logged this; the test's deadline ends the wait."""
    while text not in server.log_since(0):
        time.sleep(0.01)


@pytest.fixture
def scratch(watchdog: Watchdog) -> Iterator[Path]:
    """A directory that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="rawfuse-"))
    path.chmod(0o755)
    with watchdog.deadline(60):
        yield path
    shutil.rmtree(path)


def example(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"examples.{name}", *map(str, arguments)]


@contextmanager
def served(watchdog: Watchdog, scratch: Path, command: list[str]) -> Iterator[Server]:
    """A server whose last argument is the mountpoint ``scratch/mnt``; dead and detached in the end."""
    server = Server([*command, str(scratch / "mnt")], scratch / "mnt", scratch / "server.log")
    server.start()
    watchdog.watch(server)
    try:
        yield server
    finally:
        watchdog.unwatch(server)
        server.abort()
        server.kill()


def trace_of(scratch: Path) -> str:
    return (scratch / "trace").read_text()


class TestHello:
    @LOOPS
    def test_works(self, watchdog: Watchdog, scratch: Path, loop: list[str]) -> None:
        with served(watchdog, scratch, example("hello", *loop)) as server:
            root = server.mountpoint
            assert (root / "hello").read_bytes() == b"hello, world\n"
            assert os.listdir(root) == ["hello"]
            assert (root / "hello").stat().st_size == 13
            with fails(errno.ENOENT):
                (root / "other").stat()
            with fails(errno.EROFS):
                (root / "d").mkdir()
            with fails(errno.EROFS):
                (root / "hello").chmod(0o600)
            with fails(errno.EROFS):
                (root / "hello").unlink()
            with fails(errno.EROFS):
                os.rename(root / "hello", root / "other")
            with fails(errno.EPERM):
                os.symlink("x", root / "l")
            with fails(errno.EPERM):
                os.link(root / "hello", root / "other")
            with fails(errno.EPERM):
                os.mkfifo(root / "p")
            with fails(errno.EOPNOTSUPP):
                os.getxattr(root / "hello", "user.a")
            with fails(errno.EINVAL):
                os.readlink(root / "hello")
            os.statvfs(root)
            line = find_mount(root)
            assert line is not None
            assert line.kind == "fuse.hello"
            assert line.source == "hello"
            server.unmount()
        assert "Traceback" not in server.log_since(0)

    def test_trace(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("hello", "--trace", scratch / "trace")) as server:
            (server.mountpoint / "hello").read_bytes()
            server.unmount()
        trace = trace_of(scratch)
        uid_gid_pid = rf"0/0/{os.getpid()}"
        lookup = re.search(rf"^> (\d+) LOOKUP nodeid=1 {uid_gid_pid} name=b'hello'$", trace, re.M)
        assert lookup is not None
        assert re.search(rf"^< {lookup[1]} Entry\(nodeid=2, .*\) \d+us$", trace, re.M)
        assert re.search(rf"^> \d+ OPEN nodeid=2 {uid_gid_pid} flags=\d+ open_flags=0$", trace, re.M)
        assert re.search(r"^< \d+ ENOSYS \d+us$", trace, re.M)
        assert re.search(r"^< \d+ b'hello, world\\n' \d+us$", trace, re.M)
        asked = re.findall(r"^> (\d+) (?!FORGET|BATCH_FORGET|INTERRUPT)", trace, re.M)
        assert asked == re.findall(r"^< (\d+) ", trace, re.M)

    def test_trace_to_standard_error(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("hello", "--trace", "-")) as server:
            os.listdir(server.mountpoint)
            server.unmount()
        assert re.search(r"^> \d+ READDIR nodeid=1 ", server.log_since(0), re.M)


class TestEnd:
    """However it ends: the process ends with code 0 and nothing stays mounted."""

    def ended(self, server: Server) -> None:
        assert server.wait() == 0, server.tail()
        assert find_mount(server.mountpoint) is None
        assert "Traceback" not in server.log_since(0)

    @LOOPS
    def test_umount(self, watchdog: Watchdog, scratch: Path, loop: list[str]) -> None:
        with served(watchdog, scratch, example("memory", *loop)) as server:
            (server.mountpoint / "f").write_bytes(b"data")
            umount_syscall(str(server.mountpoint))
            self.ended(server)

    def test_umount_command(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("memory")) as server:
            subprocess.run(["umount", server.mountpoint], check=True, timeout=30)
            self.ended(server)

    def test_fusermount(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("memory")) as server:
            subprocess.run(["fusermount3", "-u", server.mountpoint], check=True, timeout=30)
            self.ended(server)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @LOOPS
    def test_signal(self, watchdog: Watchdog, scratch: Path, loop: list[str], number: signal.Signals) -> None:
        with served(watchdog, scratch, example("memory", *loop)) as server:
            (server.mountpoint / "f").write_bytes(b"data")
            server.signal(number)
            self.ended(server)

    def test_signals_in_a_row(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("memory")) as server:
            for _ in range(3):
                server.signal(signal.SIGTERM)
            self.ended(server)

    def test_signal_while_files_are_open(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("memory")) as server:
            fd = os.open(server.mountpoint / "f", os.O_WRONLY | os.O_CREAT)
            server.signal(signal.SIGTERM)
            self.ended(server)
            with fails(errno.ENOTCONN, errno.ECONNABORTED):
                os.write(fd, b"too late")
            with fails(errno.ENOTCONN, errno.ECONNABORTED):
                os.close(fd)

    def test_signal_while_somebody_waits(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("memory", "--trace", scratch / "trace")) as server:
            fd = os.open(server.mountpoint / "f", os.O_WRONLY | os.O_CREAT)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with waiting(server, "flock") as child:
                server.signal(signal.SIGTERM)
                self.ended(server)
                assert outcome(child).startswith("error")
            with fails(errno.ENOTCONN, errno.ECONNABORTED):
                os.close(fd)

    def test_cancelled(self, watchdog: Watchdog, scratch: Path) -> None:
        """As Ctrl-C under ``asyncio.run`` does: no mount stays that nobody serves, and who waits is told."""
        with served(watchdog, scratch, [sys.executable, "-c", CANCELLED]) as server:
            command = [sys.executable, "-c", "import os, sys; os.stat(sys.argv[1])", str(server.mountpoint)]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
                wait_for_log(server, "asked")
                server.signal(signal.SIGINT)
                _, error = program.communicate(timeout=30)
            assert program.returncode == 1 and "[Errno " in error
            assert server.wait() == 130
            assert find_mount(server.mountpoint) is None

    def test_lazy_umount(self, watchdog: Watchdog, scratch: Path) -> None:
        """Programs with open files work on; the server ends when the last one closes."""
        with served(watchdog, scratch, example("memory")) as server:
            with open(server.mountpoint / "f", "wb", buffering=0) as file:
                umount_syscall(str(server.mountpoint), 2)
                assert file.write(b"still there") == 11
                assert os.fstat(file.fileno()).st_size == 11
            self.ended(server)

    def test_busy_umount_changes_nothing(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("memory")) as server:
            with open(server.mountpoint / "f", "wb", buffering=0) as file:
                with fails(errno.EBUSY):
                    umount_syscall(str(server.mountpoint))
                assert file.write(b"still there") == 11
            server.unmount()

    @LOOPS
    def test_abort(self, watchdog: Watchdog, scratch: Path, loop: list[str]) -> None:
        with served(watchdog, scratch, example("memory", *loop)) as server:
            (server.mountpoint / "f").touch()
            line = find_mount(server.mountpoint)
            assert line is not None
            (FUSECTL / str(line.minor) / "abort").write_text("1")
            assert server.wait() == 0, server.tail()
            with fails(errno.ENOTCONN):
                os.stat(server.mountpoint)
            server.detach()
        assert "Traceback" not in server.log_since(0)

    def test_server_that_is_killed(self, watchdog: Watchdog, scratch: Path) -> None:
        with served(watchdog, scratch, example("memory")) as server:
            (server.mountpoint / "f").touch()
            server.signal(signal.SIGKILL)
            assert server.wait() == -signal.SIGKILL
            # A ring is taken down a moment after the process is gone, and gives ECANCELED meanwhile.
            gone = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED)
            with fails(*gone):
                os.open(server.mountpoint / "f", os.O_RDONLY)
            with fails(*gone):
                os.listdir(server.mountpoint)

    def test_mounted_again(self, watchdog: Watchdog, scratch: Path) -> None:
        for _ in range(3):
            with served(watchdog, scratch, example("memory")) as server:
                assert os.listdir(server.mountpoint) == []
                (server.mountpoint / "f").touch()
                server.unmount()


@contextmanager
def waiting(server: Server, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for a lock on ``f``, which another holds."""
    child = subprocess.Popen(
        [sys.executable, "-c", WAIT_FOR_LOCK, server.mountpoint / "f", kind], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        until_traced(server.log.parent / "trace", r"> \d+ SETLKW ")
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def until_traced(trace: Path, pattern: str, number: int = 1) -> None:
    """Return when a server has read so many such requests."""
    command = ["tail", "-f", "-n", "+1", str(trace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        for line in tail.stdout:
            if re.match(pattern, line):
                number -= 1
                if not number:
                    break
        tail.kill()


def outcome(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


class TestInterrupt:
    @pytest.fixture
    def server(self, watchdog: Watchdog, scratch: Path) -> Iterator[Server]:
        with served(watchdog, scratch, example("memory", "--trace", scratch / "trace")) as server:
            (server.mountpoint / "f").touch()
            yield server
            server.unmount()
        assert "Traceback" not in server.log_since(0)

    @pytest.fixture(params=["flock", "lockf"])
    def kind(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def held(self, server: Server, kind: str) -> Iterator[Callable[[], None]]:
        """The lock, held here until the call."""
        with open(server.mountpoint / "f", "r+") as file:
            lock = fcntl.flock if kind == "flock" else fcntl.lockf
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # SETLK; the child's is the only SETLKW
            yield lambda: lock(file, fcntl.LOCK_UN)

    def answered(self, server: Server) -> list[str]:
        """How each waiting lock request of the trace ended."""
        trace = trace_of(server.log.parent)
        return [
            found[1]
            for unique in re.findall(rf"> (\d+) SETLKW .* type={fcntl.F_WRLCK} ", trace)
            if (found := re.search(rf"^< {unique} (\S+) ", trace, re.M))
        ]

    def test_signal_ends_the_wait(self, server: Server, kind: str, held: Callable[[], None]) -> None:
        with waiting(server, kind) as child:
            child.send_signal(signal.SIGUSR1)
            assert outcome(child) == "interrupted"
            assert child.wait(30) == 0
        assert self.answered(server) == ["EINTR"]
        held()
        with open(server.mountpoint / "f", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_kill_ends_the_wait(self, server: Server, kind: str, held: Callable[[], None]) -> None:
        with waiting(server, kind) as child:
            child.kill()
            assert child.wait(30) == -signal.SIGKILL
        assert self.answered(server) == ["EINTR"]

    def test_unlocking_ends_the_wait(self, server: Server, kind: str, held: Callable[[], None]) -> None:
        with waiting(server, kind) as child:
            held()
            assert outcome(child) == "locked"
            assert child.wait(30) == 0
        assert self.answered(server) == ["None"]


class TestFailingStart:
    """A mount that cannot be made is an error that tells why; nothing is left mounted."""

    def run(self, *command: str | Path) -> str:
        before = Path("/proc/thread-self/mountinfo").read_text()
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert Path("/proc/thread-self/mountinfo").read_text() == before
        return done.stderr

    @LOOPS
    def test_no_mountpoint(self, scratch: Path, loop: list[str]) -> None:
        assert "No such file or directory" in self.run(*example("hello", *loop, scratch / "missing"))

    def test_mountpoint_is_a_file(self, scratch: Path) -> None:
        (scratch / "file").touch()
        assert "Not a directory" in self.run(*example("hello", scratch / "file"))

    def test_mirror_of_itself(self, scratch: Path) -> None:
        (scratch / "mnt").mkdir()
        assert "look into itself" in self.run(*example("mirror", scratch, scratch / "mnt"))

    def test_mirror_of_nothing(self, scratch: Path) -> None:
        (scratch / "mnt").mkdir()
        assert "No such file" in self.run(*example("mirror", scratch / "missing", scratch / "mnt"))

    def test_kernel_refuses_init(self, scratch: Path) -> None:
        """A reply with another major version fails the connection (inode.c: process_init_reply)."""
        (scratch / "mnt").mkdir()
        code = """
import asyncio, struct, sys
import rawfuse.exchange
from examples.hello import Hello
rawfuse.exchange.encode_init = lambda *_: struct.pack("=II", 6, 45)
async def main():
    try:
        await rawfuse.Session(Hello(), sys.argv[1]).mount()
    except OSError as error:
        sys.exit(str(error))
asyncio.run(main())
"""
        assert str(scratch / "mnt") in self.run(sys.executable, "-c", code, scratch / "mnt")

    def test_failure_behind_the_mount(self, scratch: Path) -> None:
        (scratch / "mnt").mkdir()
        code = """
import asyncio, sys
import rawfuse.session
from examples.hello import Hello
def fail(*_):
    raise OSError(5, "something failed")
rawfuse.session.raise_read_ahead = fail
async def main():
    try:
        await rawfuse.Session(Hello(), sys.argv[1]).mount()
    except OSError as error:
        sys.exit(str(error))
asyncio.run(main())
"""
        assert "something failed" in self.run(sys.executable, "-c", code, scratch / "mnt")

    def test_without_privilege_on_a_foreign_directory(self, scratch: Path) -> None:
        (scratch / "mnt").mkdir(mode=0o700)
        assert "fusermount3" in self.run(*as_nobody(), *example("hello", scratch / "mnt"))


def as_nobody() -> list[str]:
    """A user without privilege, but for reading wherever Python and the repository lie."""
    return [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search", "--"),
    ]


@pytest.fixture
def open_device() -> Iterator[None]:
    """/dev/fuse with the mode that udev gives it, 0666, where it is stricter."""
    mode = os.stat("/dev/fuse").st_mode & 0o7777
    os.chmod("/dev/fuse", mode | 0o666)
    yield
    os.chmod("/dev/fuse", mode)


@pytest.mark.usefixtures("open_device")
class TestWithoutPrivilege:
    """Mounting through fusermount3, as an ordinary user."""

    @pytest.fixture
    def server(self, watchdog: Watchdog, scratch: Path, open_device: None) -> Iterator[Server]:
        (scratch / "mnt").mkdir()
        os.chown(scratch / "mnt", NOBODY, NOBODY)
        (scratch / "trace").touch()
        os.chown(scratch / "trace", NOBODY, NOBODY)
        command = [*as_nobody(), *example("memory", "--trace", scratch / "trace")]
        with served(watchdog, scratch, command) as server:
            yield server

    def run(self, *command: str | Path) -> str:
        done = subprocess.run([*as_nobody(), *command], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    def test_works(self, server: Server) -> None:
        line = find_mount(server.mountpoint)
        assert line is not None
        assert line.kind == "fuse.memory"
        assert f"user_id={NOBODY}" in line.super_options
        assert "allow_other" not in line.super_options
        assert "nosuid" in line.options
        assert "nodev" in line.options
        file = server.mountpoint / "f"
        assert self.run("sh", "-c", 'echo text > "$0" && cat "$0" && stat -c %u "$0"', file) == f"text\n{NOBODY}\n"
        self.run("fusermount3", "-u", server.mountpoint)
        assert server.wait() == 0, server.tail()
        assert find_mount(server.mountpoint) is None

    def test_others_may_not_enter(self, server: Server) -> None:
        with fails(errno.EACCES):
            os.listdir(server.mountpoint)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, server: Server, number: signal.Signals) -> None:
        server.signal(number)
        assert server.wait() == 0, server.tail()
        assert find_mount(server.mountpoint) is None

    def test_umount_by_root(self, server: Server) -> None:
        self.run("stat", server.mountpoint)  # without synchronous INIT a mount is seen before it is served
        server.unmount()


class TestMirror:
    @pytest.fixture
    def source(self, scratch: Path) -> Path:
        (scratch / "source").mkdir()
        return scratch / "source"

    def test_changes_on_either_side(self, watchdog: Watchdog, scratch: Path, source: Path) -> None:
        (source / "before").write_bytes(b"old")
        with served(watchdog, scratch, example("mirror", "--ttl", "0", source)) as server:
            mount = server.mountpoint
            assert (mount / "before").read_bytes() == b"old"
            (mount / "made").write_bytes(b"through the mount")
            assert (source / "made").read_bytes() == b"through the mount"
            (source / "before").write_bytes(b"changed")
            assert (mount / "before").read_bytes() == b"changed"
            with fails(errno.ENOENT):
                (mount / "later").stat()
            (source / "later").touch()
            assert sorted(os.listdir(mount)) == ["before", "later", "made"]
            assert (mount / "later").stat().st_ino == (source / "later").stat().st_ino
            os.rename(source / "later", source / "renamed")
            assert (mount / "renamed").exists()
            assert not (mount / "later").exists()
            (source / "renamed").unlink()
            assert not (mount / "renamed").exists()
            server.unmount()

    def test_an_inode_stays_itself(self, watchdog: Watchdog, scratch: Path, source: Path) -> None:
        """An open file is found whatever happens to its name."""
        (source / "f").write_bytes(b"data")
        with served(watchdog, scratch, example("mirror", "--ttl", "0", source)) as server:
            with open(server.mountpoint / "f", "r+b", buffering=0) as file:
                os.rename(source / "f", source / "g")
                (source / "f").write_bytes(b"another")
                assert os.fstat(file.fileno()).st_size == 4
                (source / "g").unlink()
                file.write(b"more")
                assert os.pread(file.fileno(), 100, 0) == b"more"
            assert (server.mountpoint / "f").read_bytes() == b"another"
            server.unmount()

    def test_no_descriptor_is_kept_for_what_is_forgotten(self, watchdog: Watchdog, scratch: Path, source: Path) -> None:
        for number in range(200):
            (source / str(number)).touch()
        with served(watchdog, scratch, example("mirror", source)) as server:
            descriptors = Path(f"/proc/{server.pid}/fd")
            before = len(os.listdir(descriptors))
            for number in range(200):
                (server.mountpoint / str(number)).write_bytes(b"x")
            # Others come and go beside the one for each file.
            assert len(os.listdir(descriptors)) >= 200
            for number in range(200):
                (server.mountpoint / str(number)).unlink()
            # FORGETs come late; a request that follows them has been read behind them.
            for _ in range(100):
                os.statvfs(server.mountpoint)
            assert len(os.listdir(descriptors)) <= before + 20
            server.unmount()
