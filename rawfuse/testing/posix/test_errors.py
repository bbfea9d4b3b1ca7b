"""Failures: the errno that POSIX and the Linux manual pages name, and nothing changed by a failed call."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rawfuse.testing.peer import Peer
from rawfuse.testing.syscalls import fails, opened, write_file

LONG = "n" * 256


@pytest.mark.fuse_needs("mknod", "symlinks", "links")
def test_name_too_long(root: Path) -> None:
    write_file(root / "f")
    (root / "d").mkdir()
    fits = "n" * 255
    for attempt in (
        lambda: os.open(root / LONG, os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(root / LONG),
        lambda: os.mkfifo(root / LONG),
        lambda: os.symlink("x", root / LONG),
        lambda: os.link(root / "f", root / LONG),
        lambda: os.rename(root / "f", root / LONG),
        lambda: os.rename(root / LONG, root / "x"),
        lambda: os.stat(root / LONG),
        lambda: os.unlink(root / LONG),
        lambda: os.rmdir(root / LONG),
    ):
        with fails(errno.ENAMETOOLONG):
            attempt()
    os.rename(root / "f", root / fits)
    os.mkdir(root / "d" / fits)
    assert sorted(os.listdir(root)) == ["d", fits]


def test_path_too_long(root: Path) -> None:
    with fails(errno.ENAMETOOLONG):
        os.stat(f"{root}/" + "./" * 2100)


def test_missing_component(root: Path) -> None:
    for attempt in (
        lambda: os.open(root / "none" / "f", os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(root / "none" / "d"),
        lambda: os.stat(root / "none"),
        lambda: os.listdir(root / "none"),
        lambda: os.unlink(root / "none"),
        lambda: os.rmdir(root / "none"),
        lambda: os.chmod(root / "none", 0o600),
        lambda: os.truncate(root / "none", 0),
        lambda: os.utime(root / "none"),
    ):
        with fails(errno.ENOENT):
            attempt()


@pytest.mark.fuse_needs("mknod")
def test_component_is_no_directory(root: Path) -> None:
    write_file(root / "f")
    os.mkfifo(root / "p")
    for name in ("f", "p"):
        for attempt in (
            lambda name=name: os.open(root / name / "x", os.O_CREAT | os.O_WRONLY),
            lambda name=name: os.mkdir(root / name / "x"),
            lambda name=name: os.stat(root / name / "x"),
            lambda name=name: os.unlink(root / name / "x"),
            lambda name=name: os.listdir(root / name),
            lambda name=name: os.open(root / name, os.O_DIRECTORY),
        ):
            with fails(errno.ENOTDIR):
                attempt()


def test_directory_is_no_file(root: Path) -> None:
    (root / "d").mkdir()
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT | os.O_WRONLY, os.O_CREAT):
        with fails(errno.EISDIR):
            os.open(root / "d", flags)
    with fails(errno.EISDIR):
        os.truncate(root / "d", 0)
    with opened(root / "d") as fd:
        with fails(errno.EISDIR):
            os.read(fd, 1)
        with fails(errno.EBADF):
            os.write(fd, b"x")
        with fails(errno.EINVAL):
            os.ftruncate(fd, 0)


@pytest.mark.fuse_needs("symlinks")
def test_symlink_chain(root: Path) -> None:
    write_file(root / "l0", b"end")
    for number in range(1, 42):
        (root / f"l{number}").symlink_to(f"l{number - 1}")
    assert os.stat(root / "l40").st_size == 3
    with fails(errno.ELOOP):
        os.stat(root / "l41")


def test_wrong_descriptors(root: Path) -> None:
    write_file(root / "f", b"data")
    with opened(root / "f", os.O_WRONLY) as fd, fails(errno.EBADF):
        os.read(fd, 1)
    with opened(root / "f") as fd:
        with fails(errno.EBADF):
            os.write(fd, b"x")
        with fails(errno.EINVAL, errno.EBADF):
            os.ftruncate(fd, 0)


def test_invalid_offsets(root: Path) -> None:
    write_file(root / "f", b"data")
    with opened(root / "f", os.O_RDWR) as fd:
        with fails(errno.EINVAL):
            os.pread(fd, 1, -1)
        with fails(errno.EINVAL):
            os.pwrite(fd, b"x", -1)
        with fails(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)
        with fails(errno.EINVAL):
            os.ftruncate(fd, -1)
        with fails(errno.EINVAL):
            os.posix_fallocate(fd, 0, 0)
    assert (root / "f").stat().st_size == 4


def test_file_too_big(root: Path) -> None:
    write_file(root / "f", b"data")
    with opened(root / "f", os.O_RDWR) as fd:
        with fails(errno.EFBIG, errno.EINVAL):
            os.pwrite(fd, b"xx", 2**63 - 1)
        with fails(errno.EFBIG, errno.EINVAL):
            os.ftruncate(fd, 2**63 - 1)
    assert (root / "f").stat().st_size == 4


def _limited_write(path: str, limit: int) -> tuple[int, int | None]:
    """Bytes written until the limit of the process stops it, and the errno after that."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    fd = os.open(path, os.O_WRONLY)
    first = os.pwrite(fd, b"x" * 1000, limit - 500)
    try:
        os.pwrite(fd, b"x", limit)
    except OSError as error:
        return first, error.errno
    return first, None


def test_process_file_size_limit(root: Path) -> None:
    write_file(root / "f")
    with Peer() as peer:
        assert peer.call(_limited_write, str(root / "f"), 10_000) == (500, errno.EFBIG)
    assert (root / "f").stat().st_size == 10_000


@pytest.mark.fuse_needs("links")
def test_across_file_systems(root: Path, tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"rawfuse-test-{os.getpid()}"
    other.mkdir()
    try:
        write_file(root / "f", b"x")
        with fails(errno.EXDEV):
            os.rename(root / "f", other / "f")
        with fails(errno.EXDEV):
            os.link(root / "f", other / "f")
    finally:
        other.rmdir()
    assert (root / "f").stat().st_nlink == 1


def test_text_busy(root: Path) -> None:
    write_file(root / "prog", Path("/bin/sleep").read_bytes(), 0o755)
    pid = os.posix_spawn(root / "prog", ["prog", "100"], {})
    try:
        with fails(errno.ETXTBSY):
            os.open(root / "prog", os.O_WRONLY)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with opened(root / "prog", os.O_WRONLY):
        pass


@pytest.mark.fuse_needs("links", "symlinks")
def test_failed_calls_change_nothing(root: Path) -> None:
    (root / "full" / "sub").mkdir(parents=True)
    write_file(root / "f", b"x")
    before = {name: os.stat(root / name) for name in (".", "full", "f")}
    attempts: tuple[Callable[[], object], ...] = (
        lambda: os.mkdir(root / "f"),
        lambda: os.rmdir(root / "full"),
        lambda: os.unlink(root / "none"),
        lambda: os.rename(root / "none", root / "x"),
        lambda: os.rename(root / "f", root / "full"),
        lambda: os.link(root / "full", root / "x"),
        lambda: os.symlink("x", root / "f"),
        lambda: os.rmdir(root / "f"),
    )
    for attempt in attempts:
        try:
            attempt()
        except OSError:
            continue
        raise AssertionError("the call succeeded")
    after = {name: os.stat(root / name) for name in (".", "full", "f")}
    for name, old in before.items():
        new = after[name]
        assert (old.st_nlink, old.st_mtime_ns, old.st_ctime_ns) == (new.st_nlink, new.st_mtime_ns, new.st_ctime_ns)
