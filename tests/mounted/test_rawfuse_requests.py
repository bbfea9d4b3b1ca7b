"""How many requests the kernel sends at a time, how large they are and how long it waits: what INIT asked for holds."""

from __future__ import annotations

import errno
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rawfuse import InitFlag
from rawfuse.negotiate import page_limit
from rawfuse.testing.mounts import FUSECTL, find_mount
from rawfuse.testing.syscalls import opened
from tests.mounted.lab import Lab
from tests.mounted.lab_server import Configuration
from tests.mounted.targets import STRESS

MakeLab = Callable[[Configuration], Lab]
KIB, MIB = 1 << 10, 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


def minor(lab: Lab) -> int:
    line = find_mount(lab.root)
    assert line is not None
    return line.minor


@pytest.mark.parametrize(
    ("asked", "kept"), [((7, 5), (7, 5)), ((0, 0), (12, 9)), ((65535, 65535), (65535, 65535))], ids=str
)
def test_background_requests(make_lab: MakeLab, asked: tuple[int, int], kept: tuple[int, int]) -> None:
    lab = make_lab(Configuration(settings={"max_background": asked[0], "congestion_threshold": asked[1]}))
    directory = FUSECTL / str(minor(lab))
    told = [int((directory / name).read_text()) for name in ("max_background", "congestion_threshold")]
    assert tuple(told) == kept


def sizes(lab: Lab, opcode: str) -> list[int]:
    """Of the requests of the file ``f``."""
    found = [re.search(r"\bsize=(\d+)", request.arguments) for request in lab.seen(opcode, path="f")]
    return [int(size[1]) for size in found if size is not None]


def check_sizes(lab: Lab, most: int) -> None:
    """Of direct I/O with a buffer that lies well."""
    length = 3 * most
    with mmap.mmap(-1, length) as buffer, opened(lab.root / "f", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as fd:
        buffer[:] = os.urandom(length)
        written = bytes(buffer)
        assert os.pwritev(fd, [buffer], 0) == length
        assert sorted(sizes(lab, "WRITE")) == [most] * 3
        buffer[:] = bytes(length)
        assert os.preadv(fd, [buffer], 0) == length
        assert sorted(sizes(lab, "READ")) == [most] * 3
        assert buffer[:] == written


@pytest.mark.parametrize("most", [PAGE, 64 * KIB, MIB], ids=lambda size: f"{size >> 10} KiB")
def test_request_size(make_lab: MakeLab, most: int) -> None:
    lab = make_lab(Configuration(settings={"max_write": most}))
    assert lab.call("agreement")["max_write"] == most
    check_sizes(lab, most)


def test_no_larger_than_the_sysctl(make_lab: MakeLab) -> None:
    lab = make_lab(Configuration(settings={"max_write": 65535 * PAGE}))
    assert lab.call("agreement")["max_write"] == page_limit() * PAGE
    check_sizes(lab, page_limit() * PAGE)


def test_without_many_pages(make_lab: MakeLab) -> None:
    """128 KiB, whatever was asked for."""
    lab = make_lab(Configuration(unwanted=int(InitFlag.MAX_PAGES)))
    check_sizes(lab, 32 * PAGE)


@pytest.mark.parametrize("window", [4 * MIB, 128 * KIB], ids=["4 MiB", "128 KiB"])
def test_read_ahead(make_lab: MakeLab, window: int) -> None:
    lab = make_lab(Configuration(settings={"max_readahead": window}))
    lab.call("agreement")  # when that is known the mount is complete
    assert int(Path(f"/sys/class/bdi/0:{minor(lab)}/read_ahead_kb").read_text()) == window >> 10
    data = os.urandom(MIB) * 16
    (lab.root / "f").write_bytes(data)
    lab.notify("invalidate_inode", lab.ino("f"), 0, 0)
    lab.seen()
    with open(lab.root / "f", "rb", buffering=0) as file:
        assert b"".join(iter(lambda: file.read(64 * KIB), b"")) == data
    assert (max(sizes(lab, "READ")) > 128 * KIB) == (window > 128 * KIB)


def test_request_timeout_is_agreed(make_lab: MakeLab) -> None:
    lab = make_lab(Configuration(settings={"request_timeout": 60}))
    assert lab.call("agreement")["flags"] & InitFlag.REQUEST_TIMEOUT
    (lab.root / "f").touch()


if STRESS:

    @pytest.fixture
    def many_pages() -> Iterator[int]:
        """A higher limit for mounts made meanwhile."""
        sysctl = Path("/proc/sys/fs/fuse/max_pages_limit")
        before = sysctl.read_text()
        sysctl.write_text("4096")
        yield 4096
        sysctl.write_text(before)

    def test_larger_requests(make_lab: MakeLab, many_pages: int) -> None:
        lab = make_lab(Configuration(settings={"max_write": many_pages * PAGE}))
        assert lab.call("agreement")["max_write"] == many_pages * PAGE
        check_sizes(lab, many_pages * PAGE)

    @pytest.mark.deadline(120)
    def test_request_timeout(make_lab: MakeLab) -> None:
        """The kernel looks every 15 s and then ends the connection."""
        lab = make_lab(Configuration(settings={"request_timeout": 15}))
        lab.call("close_gate", "LOOKUP")
        failures: list[int | None] = []

        def look_up() -> None:
            try:
                os.stat(lab.root / "absent")
            except OSError as error:
                failures.append(error.errno)

        asking = threading.Thread(target=look_up, daemon=True)
        asking.start()
        asking.join(100)
        assert failures == [errno.ECONNABORTED]
        assert lab.server.wait() == 0
