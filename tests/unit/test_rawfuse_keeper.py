"""The keeper process: what is deposited reaches the next server, whatever became of the one before."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rawfuse import FuseError
from rawfuse import keeper as protocol
from rawfuse.handover import MOUNTING, Keeper
from rawfuse.keeper import DEVICE, FRUITLESS, LARGEST

DEADLINE = 60
"""Seconds for what must happen."""

PROLOGUE = """
import os, signal, sys
from rawfuse.handover import MOUNTING, Keeper
from rawfuse.keeper import DEVICE
keeper = Keeper.connect(sys.argv[1])
log = open(sys.argv[2], "a", buffering=1)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Of a keeper, which has ended when the test has."""
    directory = tmp_path / "keeper"
    yield directory
    connection = protocol.connect(directory)
    if connection is not None:
        with closing_keeper(directory):
            pass
    assert protocol.connect(directory) is None


@contextmanager
def closing_keeper(directory: Path) -> Iterator[Keeper]:
    """A connection that takes everything with it in the end."""
    keeper = Keeper.connect(directory)
    yield keeper
    for kept in keeper.kept.values():
        if kept.fd >= 0:
            os.close(kept.fd)
    with ending(directory):
        keeper.end()


@contextmanager
def ending(directory: Path) -> Iterator[int]:
    """The body makes the keeper end; its pid."""
    pid = int((directory / "pid").read_text())
    ended = os.pidfd_open(pid)
    yield pid
    assert select.select([ended], [], [], DEADLINE)[0], "the keeper did not end"
    os.close(ended)


@pytest.fixture
def fuse_like() -> Iterator[int]:
    """A descriptor whose connection, like a FUSE device's, can end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours.fileno()


def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


class TestDeposits:
    def test_next_server_gets_everything(self, directory: Path, fuse_like: int, tmp_path: Path) -> None:
        first = Keeper.connect(directory)
        assert first.servers == 1
        assert not first.kept
        assert not first.has_mount
        (tmp_path / "file").write_text("content")
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        first.put(DEVICE, MOUNTING, fuse_like)
        first.put(b"file", b"\0value", fd)
        first.put(b"alone", b"v" * 1000)
        first.put(b"replaced", b"1", fd)
        first.put(b"replaced", b"2")
        first.put(b"dropped", b"x", fd)
        first.drop(b"dropped")
        first.drop(b"never there")
        os.close(fd)
        first.close()
        with closing_keeper(directory) as second:
            assert second.servers == 2
            assert second.has_mount
            kept = dict(second.kept)
            assert kept.pop(DEVICE).value == MOUNTING
            assert {key: value.value for key, value in kept.items() if not key.startswith(b"rawfuse/")} == {
                b"file": b"\0value",
                b"alone": b"v" * 1000,
                b"replaced": b"2",
            }
            assert os.pread(kept[b"file"].fd, 100, 0) == b"content"
            assert kept[b"alone"].fd == kept[b"replaced"].fd == -1

    def test_journal_goes_along(self, directory: Path, fuse_like: int) -> None:
        first = Keeper.connect(directory)
        first.put(DEVICE, MOUNTING, fuse_like)
        first.journal.intend(4, b"note")
        first.close()
        with closing_keeper(directory) as second:
            assert second.journal.intended(4) == b"note"

    def test_many(self, directory: Path, fuse_like: int) -> None:
        """More than any buffer between the processes holds."""
        first = Keeper.connect(directory)
        first.put(DEVICE, MOUNTING, fuse_like)
        for number in range(3000):
            first.put(str(number).encode(), b"v" * 100, fuse_like)
        first.close()
        with closing_keeper(directory) as second:
            assert len(second.kept) == 3002
            assert all(second.kept[str(number).encode()].fd >= 0 for number in range(3000))

    def test_killed_server(self, directory: Path, tmp_path: Path) -> None:
        """What was put is there, although nobody had time to say good-bye."""
        code = """
import socket
pair = socket.socketpair()
keeper.put(DEVICE, MOUNTING, pair[0].fileno())
for number in range(100):
    keeper.put(str(number).encode(), b"", pair[1].fileno())
os.kill(os.getpid(), signal.SIGKILL)
"""
        assert run(code, directory, tmp_path / "log").returncode == -signal.SIGKILL
        with closing_keeper(directory) as keeper:
            assert len(keeper.kept) == 102

    def test_too_large(self, directory: Path) -> None:
        with closing_keeper(directory) as keeper, pytest.raises(OSError) as caught:
            keeper.put(b"key", bytes(LARGEST))
        assert caught.value.errno == errno.EMSGSIZE

    def test_next_one_waits(self, directory: Path, fuse_like: int, tmp_path: Path) -> None:
        first = Keeper.connect(directory)
        first.put(DEVICE, MOUNTING, fuse_like)
        code = "print(keeper.kept[b'last words'].value)\nkeeper.end()"
        waiting = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + code, directory, tmp_path / "log"], stdout=subprocess.PIPE, text=True
        )
        first.put(b"last words", b"bye")
        first.close()
        output, _ = waiting.communicate(timeout=DEADLINE)
        assert output == "b'bye'\n"


class TestEnd:
    def test_with_the_last_word_of_a_server(self, directory: Path, fuse_like: int) -> None:
        keeper = Keeper.connect(directory)
        keeper.put(DEVICE, MOUNTING, fuse_like)
        with ending(directory):
            keeper.end()
        assert not (directory / "socket").exists()

    @pytest.mark.parametrize("state", [None, b""])
    def test_server_leaves_no_mount(self, directory: Path, fuse_like: int, state: bytes | None) -> None:
        keeper = Keeper.connect(directory)
        if state is not None:
            keeper.put(DEVICE, state, fuse_like)
        with ending(directory):
            keeper.close()

    @pytest.mark.parametrize("served", [True, False])
    def test_connection_to_the_kernel_ends(self, directory: Path, served: bool) -> None:
        """Before the server ends or after it."""
        keeper = Keeper.connect(directory)
        reading, writing = os.pipe()
        keeper.put(DEVICE, MOUNTING, writing)
        os.close(writing)
        with ending(directory):
            if served:
                os.close(reading)
                keeper.close()
            else:
                keeper.close()
                os.close(reading)

    def test_dead_keeper_is_replaced(self, directory: Path) -> None:
        keeper = Keeper.connect(directory)
        with ending(directory) as pid:
            os.kill(pid, signal.SIGKILL)
        with closing_keeper(directory) as second:
            assert second.servers == 1
        keeper.close()

    def test_server_lives_on_without_it(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        keeper = Keeper.connect(directory)
        with ending(directory) as pid:
            os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            keeper.put(b"key", b"value")
        keeper.end()
        assert caplog.text.count("can no longer be handed over") == 1


class TestDirectory:
    def test_private(self, directory: Path) -> None:
        with closing_keeper(directory):
            assert directory.stat().st_mode & 0o777 == 0o700

    def test_open_to_others(self, directory: Path) -> None:
        directory.mkdir()
        directory.chmod(0o755)
        with pytest.raises(FuseError, match="mode 700"):
            Keeper.connect(directory)

    def test_missing_parent(self, directory: Path) -> None:
        with pytest.raises(FuseError) as caught:
            Keeper.connect(directory / "deep" / "down")
        assert caught.value.errno == errno.ENOENT
        assert str(directory) in str(caught.value)

    def test_name_too_long_for_a_socket(self, tmp_path: Path) -> None:
        with pytest.raises(FuseError, match="too long"):
            Keeper.connect(tmp_path / ("k" * 120))


class TestCommand:
    """python -m rawfuse.keeper DIRECTORY -- COMMAND"""

    @pytest.fixture
    def keep(self, directory: Path, tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
        def keep(code: str) -> subprocess.CompletedProcess[str]:
            server = [sys.executable, "-c", PROLOGUE + code, str(directory), str(tmp_path / "log")]
            return subprocess.run(
                [sys.executable, "-m", "rawfuse.keeper", str(directory), "--", *server],
                capture_output=True,
                text=True,
                timeout=DEADLINE,
                check=False,
            )

        return keep

    MOUNTED = """
import socket
if keeper.servers == 1:
    pair = socket.socketpair()
    keeper.put(DEVICE, MOUNTING, pair[0].fileno())
    keeper.put(b"other end", b"", pair[1].fileno())
log.write(f"{keeper.servers} {len(keeper.kept)}\\n")
"""

    def test_runs_again_until_the_mount_has_ended(
        self, keep: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
    ) -> None:
        done = keep(
            self.MOUNTED
            + """
keeper.ready()
if keeper.servers < 10:
    os.kill(os.getpid(), signal.SIGKILL)
keeper.end()
"""
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "log").read_text() == "1 0\n" + "".join(f"{number} 3\n" for number in range(2, 11))

    def test_gives_up(self, keep: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
        done = keep(self.MOUNTED + "os.kill(os.getpid(), signal.SIGKILL)")
        assert done.returncode == 1
        assert f"ended {FRUITLESS} times without serving" in done.stderr
        assert len((tmp_path / "log").read_text().splitlines()) == FRUITLESS + 1

    @pytest.mark.parametrize("code", [0, 3])
    def test_command_that_mounts_nothing(
        self, keep: Callable[[str], subprocess.CompletedProcess[str]], code: int
    ) -> None:
        assert keep(f"sys.exit({code})").returncode == code

    def test_command_that_does_not_connect(self, directory: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "rawfuse.keeper", directory, "--", "false"], timeout=DEADLINE, check=False
        )
        assert done.returncode == 1

    def test_command_that_does_not_exist(self, directory: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "rawfuse.keeper", directory, "--", "/no/such/program"],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("keeper: ")
        assert len(done.stderr.splitlines()) == 1

    def test_second_keeper(self, directory: Path) -> None:
        with closing_keeper(directory):
            done = subprocess.run(
                [sys.executable, "-m", "rawfuse.keeper", directory, "--", "true"],
                capture_output=True,
                text=True,
                timeout=DEADLINE,
                check=False,
            )
        assert done.returncode == 1
        assert "a keeper runs there already" in done.stderr

    @pytest.mark.parametrize("arguments", [[], ["DIR"], ["--help"], ["DIR", "true"], ["DIR", "--"]])
    def test_usage(self, arguments: list[str], tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "rawfuse.keeper", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("usage: ")
