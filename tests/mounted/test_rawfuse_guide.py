"""The programs in the documents are what they say: each is taken out of its page, mounted and used."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rawfuse.testing.mounts import find_mount
from rawfuse.testing.plugin import FuseMount
from rawfuse.testing.server import Server
from rawfuse.testing.syscalls import fails
from rawfuse.testing.target import LACKS
from tests.mounted.targets import REPOSITORY

GUIDE = "docs/rawfuse/guide.md"
PORTING = "docs/rawfuse/coming-from-pyfuse3-and-fusepy.md"
_PROGRAM = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.M | re.S)


def programs(page: str) -> dict[str, str]:
    """The complete programs of a page: the blocks whose first line is a comment with the program's name."""
    return dict(_PROGRAM.findall((REPOSITORY / page).read_text()))


class Page:
    """``serve(name, ...)`` serves a program of one page, which must log nothing."""

    def __init__(self, page: str, place: Path, fuse_mount: FuseMount) -> None:
        self.place = place
        self._fuse_mount = fuse_mount
        for name, source in programs(page).items():
            (place / name).write_text(source)

    def serve(self, name: str, *arguments: str | Path) -> Server:
        return self._fuse_mount([sys.executable, str(self.place / name), *map(str, arguments), "{mountpoint}"])


@pytest.fixture
def guide(tmp_path: Path, fuse_mount: FuseMount) -> Page:
    return Page(GUIDE, tmp_path, fuse_mount)


@pytest.fixture
def porting(tmp_path: Path, fuse_mount: FuseMount) -> Page:
    return Page(PORTING, tmp_path, fuse_mount)


def finish(server: Server) -> None:
    server.unmount()
    assert server.log_since(0) == ""


def test_every_program_is_tested() -> None:
    assert programs(GUIDE).keys() == {"hello.py", "notes.py", "clock.py", "mirror.py", "test_notes.py"}
    assert programs("README.md").keys() == {"hello.py"}
    assert programs(PORTING).keys() == {"paths.py", "zipfs.py"}


def test_what_file_systems_may_lack_is_documented() -> None:
    page = (REPOSITORY / "docs/testing.md").read_text()
    assert [name for name, meaning in LACKS.items() if f"| {name} | {meaning} |" not in page] == []


@pytest.mark.parametrize("page", [GUIDE, "README.md"])
def test_hello(tmp_path: Path, fuse_mount: FuseMount, page: str) -> None:
    server = Page(page, tmp_path, fuse_mount).serve("hello.py")
    root = server.mountpoint
    assert os.listdir(root) == ["hello"]
    assert (root / "hello").read_text() == "hello, world\n"
    assert (root / "hello").stat().st_size == 13
    with fails(errno.ENOENT):
        (root / "other").stat()
    with fails(errno.EROFS):
        (root / "d").mkdir()
    finish(server)


def test_notes(guide: Page) -> None:
    server = guide.serve("notes.py")
    root = server.mountpoint
    for number in range(500):
        (root / f"n{number}").write_text("x" * number)
    assert len(os.listdir(root)) == 500
    with open(root / "n7") as file:
        os.unlink(root / "n7")
        assert file.read() == "xxxxxxx"
    os.rename(root / "n1", root / "n2")
    with open(root / "n2", "a") as file:
        file.write("yz")
    assert (root / "n2").read_text() == "xyz"
    os.truncate(root / "n2", 1000)
    os.chmod(root / "n2", 0o600)
    os.utime(root / "n2", (1, 2))
    made = (root / "n2").stat()
    assert (made.st_size, made.st_mode & 0o7777, made.st_mtime) == (1000, 0o600, 2)
    with fails(errno.EROFS):
        (root / "d").mkdir()
    for name in os.listdir(root):
        os.unlink(root / name)
    assert os.listdir(root) == []
    finish(server)


def test_clock(guide: Page) -> None:
    server = guide.serve("clock.py")
    now, following = server.mountpoint / "now", server.mountpoint / "next"
    first = now.read_text()
    while now.read_text() == first:
        assert re.fullmatch(r"\d\d:\d\d:\d\d\n", following.read_text())
    finish(server)


def test_mirror(guide: Page, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    server = guide.serve("mirror.py", source)
    root = server.mountpoint
    line = find_mount(root)
    assert line is not None and line.source == str(source)
    (root / "a").write_text("one")
    assert (source / "a").read_text() == "one"
    (root / "d").mkdir()
    os.rename(root / "a", root / "d" / "b")
    assert os.listdir(root / "d") == ["b"]
    with open(root / "d" / "b", "r+b", buffering=0) as file:
        file.write(b"T")
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_size == 3
    assert (source / "d" / "b").read_text() == "Tne"
    tree = Path("/usr/include/linux")
    subprocess.run(["cp", "-r", tree, root / "copy"], check=True, timeout=50)
    subprocess.run(["diff", "-r", tree, root / "copy"], check=True, timeout=50)
    subprocess.run(["rm", "-r", root / "copy"], check=True, timeout=50)
    os.unlink(root / "d" / "b")
    os.rmdir(root / "d")
    assert os.listdir(source) == []
    finish(server)


def test_its_test(guide: Page) -> None:
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_notes.py"],
        cwd=guide.place,
        check=True,
        timeout=50,
    )


def test_zip(porting: Page, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub" / "deep").mkdir(parents=True)
    (source / "large").write_text("text" * 100_000)
    (source / "sub" / "small").write_text("small")
    (source / "sub" / "deep" / "empty").touch()
    archive = tmp_path / "archive.zip"
    subprocess.run([sys.executable, "-m", "zipfile", "-c", archive, "large", "sub"], cwd=source, check=True, timeout=50)
    server = porting.serve("zipfs.py", archive)
    subprocess.run(["diff", "-r", source, server.mountpoint], check=True, timeout=50)
    with fails(errno.ENOENT):
        (server.mountpoint / "sub" / "other").stat()
    finish(server)


def test_paths(porting: Page) -> None:
    names: dict[str, Any] = {}
    exec(compile(programs(PORTING)["paths.py"], "paths.py", "exec"), names)
    paths = names["Paths"]()
    top = paths.known(paths.path(1, b"d"))
    low = paths.known(paths.path(top, b"f"))
    assert (paths.path(low), paths.known(b"/d/f")) == (b"/d/f", low)
    paths.renamed(b"/d", b"/e")
    assert (paths.path(top), paths.path(low)) == (b"/e", b"/e/f")
    paths.removed(b"/e/f")
    again = paths.known(b"/e/f")
    assert again != low
    assert paths.path(low) == b"/e/f"
    paths.forget(low, 1)
    assert paths.path(low) == b"/e/f"
    paths.forget(low, 1)
    with fails(errno.ESTALE):
        paths.path(low)
    assert paths.known(b"/e/f") == again
    paths.forget(again, 2)
    assert paths.known(b"/e/f") not in (low, again)
