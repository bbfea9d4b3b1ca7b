"""Each notification and what it does in the kernel, told by the requests that follow; and all of them under load."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rawfuse import InitFlag
from rawfuse.abi import ROOT_ID
from rawfuse.testing.mounts import FUSECTL, find_mount, mount_syscall, umount_syscall
from rawfuse.testing.peer import Peer
from rawfuse.testing.syscalls import fails, opened
from tests.mounted.lab import Lab
from tests.mounted.lab_server import Configuration
from tests.mounted.targets import STRESS

MakeLab = Callable[[Configuration], Lab]
PAGE = os.sysconf("SC_PAGE_SIZE")
UNKNOWN = 1 << 40
ROUNDS = 3000 if STRESS else 40


@pytest.fixture
def file(lab: Lab) -> Path:
    """A file whose name, attributes and pages the kernel has."""
    path = lab.root / "f"
    path.write_bytes(b"before")
    assert path.read_bytes() == b"before"
    assert path.stat().st_size == 6
    lab.seen()
    return path


@pytest.fixture
def explicit_lab(make_lab: MakeLab) -> Lab:
    """One whose kernel drops pages only when it is told to."""
    wanted, unwanted = InitFlag.EXPLICIT_INVAL_DATA, InitFlag.AUTO_INVAL_DATA
    return make_lab(Configuration(features=int(wanted), unwanted=int(unwanted)))


class TestInvalidateInode:
    def test_attributes(self, lab: Lab, file: Path) -> None:
        lab.call("change", "f", b"afterwards")
        assert file.stat().st_size == 6
        assert lab.names_seen(path="f") == []
        assert lab.notify("invalidate_inode", lab.ino("f")) is True
        assert file.stat().st_size == 10
        assert lab.names_seen(path="f") == ["GETATTR"]

    def test_pages(self, lab: Lab, file: Path) -> None:
        lab.call("change", "f", b"after!")
        assert file.read_bytes() == b"before"
        assert lab.notify("invalidate_inode", lab.ino("f"), 0, 0) is True
        assert file.read_bytes() == b"after!"
        assert "READ" in lab.names_seen(path="f")

    @pytest.mark.parametrize(("length", "dropped"), [(PAGE, [1]), (1, [1]), (2 * PAGE, [1, 2]), (0, [1, 2, 3])])
    def test_range(self, explicit_lab: Lab, length: int, dropped: list[int]) -> None:
        """Pages that it touches, all from there on for 0, and no others."""
        lab = explicit_lab
        (lab.root / "f").write_bytes(b"old" * PAGE + b"o" * PAGE)
        with opened(lab.root / "f") as fd:
            assert os.pread(fd, 4 * PAGE, 0) == b"old" * PAGE + b"o" * PAGE
            lab.call("change", "f", b"n" * 4 * PAGE)
            lab.seen()
            assert lab.notify("invalidate_inode", lab.ino("f"), PAGE, length) is True
            new = [index for index in range(4) if os.pread(fd, PAGE, index * PAGE) == b"n" * PAGE]
            assert set(lab.names_seen(path="f")) <= {"GETATTR", "READ"}
        assert new == dropped

    def test_a_directory_loses_its_listing(self, lab: Lab) -> None:
        (lab.root / "d").mkdir()
        for _ in range(2):
            assert os.listdir(lab.root / "d") == []
        assert "READDIRPLUS" not in self.listed_again(lab)
        lab.notify("invalidate_inode", lab.ino("d"))
        assert "READDIRPLUS" not in self.listed_again(lab), "attributes only"
        lab.notify("invalidate_inode", lab.ino("d"), 0, 0)
        assert "READDIRPLUS" in self.listed_again(lab)

    def listed_again(self, lab: Lab) -> list[str]:
        lab.seen()
        os.listdir(lab.root / "d")
        return lab.names_seen(path="d")

    def test_unknown(self, lab: Lab) -> None:
        assert lab.notify("invalidate_inode", UNKNOWN) is False
        assert lab.notify("invalidate_inode", UNKNOWN, 0, 0) is False


class TestInvalidateEntry:
    @pytest.mark.parametrize("expire_only", [False, True])
    def test_positive(self, lab: Lab, file: Path, expire_only: bool) -> None:
        lab.call("rename", "f", "g")
        assert file.exists()
        assert lab.names_seen("LOOKUP") == []
        assert lab.notify("invalidate_entry", ROOT_ID, b"f", expire_only=expire_only) is True
        assert not file.exists()
        assert set(lab.names_seen("LOOKUP")) == {"LOOKUP"}

    @pytest.mark.parametrize("expire_only", [False, True])
    def test_negative(self, lab: Lab, file: Path, expire_only: bool) -> None:
        for _ in range(2):
            assert not (lab.root / "g").exists()
        assert lab.names_seen("LOOKUP") == ["LOOKUP"]
        lab.call("rename", "f", "g")
        assert not (lab.root / "g").exists()
        assert lab.notify("invalidate_entry", ROOT_ID, b"g", expire_only=expire_only) is True
        assert (lab.root / "g").exists()
        assert lab.names_seen("LOOKUP") == ["LOOKUP"]

    def test_expiring_keeps_what_is_still_true(self, lab: Lab) -> None:
        """Whoever stands in a directory stays there; without ``expire_only`` it is cut off."""
        (lab.root / "d").mkdir()
        with Peer(cwd=lab.root / "d") as peer:
            lab.seen()
            assert lab.notify("invalidate_entry", ROOT_ID, b"d", expire_only=True) is True
            assert (lab.root / "d").is_dir()
            assert lab.names_seen("LOOKUP") == ["LOOKUP"]
            assert peer.call(os.getcwd) == str(lab.root / "d")
            assert lab.notify("invalidate_entry", ROOT_ID, b"d") is True
            with fails(errno.ENOENT):
                peer.call(os.getcwd)

    def test_unknown(self, lab: Lab, file: Path) -> None:
        assert lab.notify("invalidate_entry", ROOT_ID, b"never looked up") is False
        assert lab.notify("invalidate_entry", UNKNOWN, b"f") is False
        assert lab.notify("invalidate_entry", lab.ino("f"), b"f") is False, "not a directory"

    def test_long_names(self, lab: Lab) -> None:
        with fails(errno.ENAMETOOLONG):
            lab.notify("invalidate_entry", ROOT_ID, b"n" * 5000)


class TestDelete:
    def test_like_unlink(self, lab: Lab, file: Path) -> None:
        """The inode has no link any more, and no request tells of that."""
        ino = lab.ino("f")
        with opened(file) as fd:
            assert os.fstat(fd).st_nlink == 1
            lab.call("rename", "f", "g")
            assert lab.notify("delete", ROOT_ID, ino, b"f") is True
            assert os.fstat(fd).st_nlink == 0
            assert lab.names_seen("GETATTR", "LOOKUP") == []
        assert not file.exists()
        assert set(lab.names_seen("LOOKUP")) == {"LOOKUP"}

    def test_like_rmdir(self, lab: Lab) -> None:
        (lab.root / "d").mkdir()
        with Peer(cwd=lab.root / "d") as peer:
            assert lab.notify("delete", ROOT_ID, lab.ino("d"), b"d") is True
            with fails(errno.ENOENT):
                peer.call(os.mkdir, "new")
        assert lab.names_seen("MKDIR") == ["MKDIR"], "only the one that made the directory"

    def test_another_inode_keeps_the_name(self, lab: Lab, file: Path) -> None:
        assert lab.notify("delete", ROOT_ID, UNKNOWN, b"f") is False
        assert file.exists()

    def test_a_directory_in_use(self, lab: Lab) -> None:
        (lab.root / "d" / "e").mkdir(parents=True)
        with opened(lab.root / "d" / "e"), fails(errno.ENOTEMPTY):
            lab.notify("delete", ROOT_ID, lab.ino("d"), b"d")
        assert lab.notify("delete", ROOT_ID, lab.ino("d"), b"d") is False, "the name is not cached any more"


@pytest.mark.parametrize(
    ("kind", "named", "stays"),
    [
        ("invalidate_entry", {"expire_only": True}, True),
        ("invalidate_entry", {}, False),
        ("delete", {}, False),
        ("increment_epoch", {}, False),
        ("prune", {}, True),
    ],
    ids=["expire", "entry", "delete", "epoch", "prune"],
)
def test_what_is_mounted_inside(lab: Lab, kind: str, named: dict[str, bool], stays: bool) -> None:
    path = lab.root / "inside"
    path.mkdir()
    mount_syscall("none", str(path), "tmpfs", 0)
    arguments = {
        "invalidate_entry": (ROOT_ID, b"inside"),
        "delete": (ROOT_ID, lab.ino("inside"), b"inside"),
        "increment_epoch": (),
        "prune": ([lab.ino("inside")],),
    }
    lab.notify(kind, *arguments[kind], **named)
    path.exists()
    assert (find_mount(path) is not None) == stays
    if stays:
        umount_syscall(str(path))


class TestStoreAndRetrieve:
    def test_store(self, lab: Lab) -> None:
        with opened(lab.root / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.ftruncate(fd, 2 * PAGE)
        (lab.root / "f").stat()
        lab.seen()
        assert lab.notify("store", lab.ino("f"), 0, b"s" * PAGE) is True
        with opened(lab.root / "f") as fd:
            assert os.pread(fd, PAGE, 0) == b"s" * PAGE
            assert lab.names_seen("READ") == []
            assert os.pread(fd, PAGE, PAGE) == bytes(PAGE)
            assert lab.names_seen("READ") == ["READ"]

    def test_store_behind_the_end(self, explicit_lab: Lab) -> None:
        lab = explicit_lab
        file = lab.root / "f"
        file.write_bytes(b"before")
        assert lab.notify("store", lab.ino("f"), 0, b"x" * 100) is True
        assert file.stat().st_size == 6, "the file system was asked"
        lab.call("change", "f", b"x" * 100)
        assert lab.notify("store", lab.ino("f"), 0, b"x" * 100) is True
        assert file.read_bytes() == b"x" * 100
        assert set(lab.names_seen("READ", "GETATTR")) == {"GETATTR"}

    def test_store_in_what_is_no_file(self, lab: Lab) -> None:
        with fails(errno.EINVAL):
            lab.notify("store", ROOT_ID, 0, b"x")
        assert lab.notify("store", UNKNOWN, 0, b"x") is False

    def test_retrieve(self, lab: Lab, file: Path) -> None:
        ino = lab.ino("f")
        lab.call("change", "f", b"after!")
        assert lab.notify("retrieve", ino, 0, 100) == b"before"
        assert lab.notify("retrieve", ino, 2, 3) == b"for"
        assert lab.notify("retrieve", ino, 6, 10) == b""
        assert lab.notify("retrieve", UNKNOWN, 0, 10) is None
        with fails(errno.EINVAL):
            lab.notify("retrieve", ROOT_ID, 0, 10)
        lab.notify("invalidate_inode", ino, 0, 0)
        assert lab.notify("retrieve", ino, 0, 100) == b"", "nothing is cached"
        assert lab.names_seen("NOTIFY_REPLY") == ["NOTIFY_REPLY"] * 4

    def test_retrieve_what_was_written(self, make_lab: MakeLab) -> None:
        """With write-back it has not come yet."""
        lab = make_lab(Configuration(features=int(InitFlag.WRITEBACK_CACHE)))
        with opened(lab.root / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.pwrite(fd, b"dirty", 0)
            assert lab.names_seen("WRITE") == []
            assert lab.notify("retrieve", lab.ino("f"), 0, 100) == b"dirty"

    def test_no_more_than_a_write(self, lab: Lab) -> None:
        most = lab.call("agreement")["max_write"]
        (lab.root / "f").write_bytes(os.urandom(2 * most + 5))
        data = (lab.root / "f").read_bytes()
        assert lab.notify("retrieve", lab.ino("f"), 0, 1 << 32) == data[:most]
        assert lab.notify("retrieve", lab.ino("f"), 2 * most, 1 << 20) == data[2 * most :]


class TestNames:
    def test_epoch(self, lab: Lab, file: Path) -> None:
        assert not (lab.root / "absent").exists()
        (lab.root / "d").mkdir()
        (lab.root / "d" / "inside").touch()
        for _ in range(2):
            os.listdir(lab.root / "d")
        lab.seen()
        lab.notify("increment_epoch")
        assert file.exists() and not (lab.root / "absent").exists() and (lab.root / "d" / "inside").exists()
        requests = lab.seen("LOOKUP")
        assert sorted(request.arguments for request in requests) == [
            f"name={name!r}" for name in (b"absent", b"d", b"f", b"inside")
        ]
        assert file.exists() and not (lab.root / "absent").exists() and (lab.root / "d" / "inside").exists()
        assert lab.names_seen("LOOKUP") == [], "once each"

    @pytest.mark.parametrize("in_use", [False, True])
    def test_epoch_and_listings(self, lab: Lab, in_use: bool) -> None:
        """That of a directory which nobody has open goes with its name; otherwise it stays."""
        (lab.root / "d").mkdir()
        for _ in range(2):
            os.listdir(lab.root / "d")
        fd = os.open(lab.root / "d", os.O_RDONLY) if in_use else -1
        lab.seen()
        lab.notify("increment_epoch")
        os.listdir(lab.root / "d")
        assert ("READDIRPLUS" in lab.names_seen(path="d")) == (not in_use)
        if in_use:
            os.close(fd)

    def test_prune(self, lab: Lab) -> None:
        names = [f"f{number}" for number in range(600)]
        for name in names:
            (lab.root / name).touch()
        inos = [lab.ino(name) for name in names]
        with opened(lab.root / names[0]):
            lab.seen()
            lab.notify("prune", [*inos, UNKNOWN])
            assert lab.call("wait_forgotten", inos[1:]) == inos[1:]
            assert lab.call("wait_forgotten", inos[:1], wait=False) == []
            assert (lab.root / names[0]).exists()
            assert lab.names_seen("LOOKUP") == []
            assert (lab.root / names[1]).exists()
            assert lab.names_seen("LOOKUP") == ["LOOKUP"]

    def test_forgotten_in_batches(self, make_lab: MakeLab) -> None:
        """Many at once, when they have piled up: here while another request keeps the server from reading."""
        lab = make_lab(Configuration(settings={"max_in_flight": 1}))
        names = [f"f{number}" for number in range(100)]
        for name in names:
            (lab.root / name).touch()
        inos = [lab.ino(name) for name in names]
        lab.seen()
        lab.call("close_gate", "LOOKUP")
        looking = threading.Thread(target=(lab.root / "absent").exists)
        looking.start()
        lab.call("wait_for", "LOOKUP")
        lab.notify("prune", inos)
        lab.call("open_gate", "LOOKUP")
        assert lab.call("wait_forgotten", inos) == inos
        looking.join()
        assert "BATCH_FORGET" in lab.names_seen()


class TestResend:
    def test_what_was_not_answered_comes_again(self, lab: Lab, file: Path) -> None:
        lab.notify("invalidate_entry", ROOT_ID, b"f")
        lab.call("close_gate", "LOOKUP")
        sizes: list[int] = []
        asking = threading.Thread(target=lambda: sizes.append(file.stat().st_size))
        asking.start()
        lab.call("wait_for", "LOOKUP")
        lab.notify("resend")
        lab.call("wait_for", "LOOKUP", 2)
        assert asking.is_alive()
        lab.call("open_gate", "LOOKUP")
        asking.join()
        assert sizes == [6]


class TestInterleaved:
    """INVAL_ENTRY waits in the kernel for the lock of the directory that somebody makes a subdirectory in."""

    BEHIND = 20

    @pytest.fixture
    def own(self, make_lab: MakeLab) -> Lab:
        return make_lab(Configuration())

    @contextmanager
    def making(self, lab: Lab) -> Iterator[list[int]]:
        """Somebody in ``mkdir``, whose request is not answered until the gate opens, and notifications: the first waits
        for that, the others behind it. What ``mkdir`` gave stands in the list in the end."""
        (lab.root / "d" / "old").mkdir(parents=True)
        lab.seen()
        lab.call("close_gate", "MKDIR")
        results: list[int] = []
        maker = threading.Thread(target=lambda: results.append(_mkdir(lab.root / "d" / "new")), daemon=True)
        maker.start()
        lab.call("wait_for", "MKDIR")
        lab.call("begin_notify", "invalidate_entry", lab.ino("d"), b"old")
        for _ in range(self.BEHIND):
            lab.call("begin_notify", "invalidate_inode", ROOT_ID)
        yield results
        maker.join()

    def outcomes(self, lab: Lab) -> list[Any]:
        """What each gave, or the errno that it raised."""
        found: list[Any] = []
        for number in range(1 + self.BEHIND):
            try:
                found.append(lab.call("outcome", number))
            except OSError as error:
                found.append(error.errno)
        return found

    def test_others_are_served_meanwhile(self, own: Lab) -> None:
        with self.making(own) as made:
            (own.root / "elsewhere").touch()
            assert sorted(os.listdir(own.root)) == ["d", "elsewhere"]
            assert own.call("unfinished") == 1 + self.BEHIND
            own.call("open_gate", "MKDIR")
        assert self.outcomes(own) == [True] * (1 + self.BEHIND)
        assert made == [0]

    def test_aborted(self, own: Lab) -> None:
        line = find_mount(own.root)
        assert line is not None
        with self.making(own) as made:
            (FUSECTL / str(line.minor) / "abort").write_text("1")
        assert made[0] in (errno.ECONNABORTED, errno.ENOTCONN)
        assert set(self.outcomes(own)) <= {True, False, errno.ENOTCONN}
        own.call("open_gate", "MKDIR")
        assert own.server.wait() == 0

    def test_unmounted_lazily(self, own: Lab) -> None:
        """The request is still answered, because the notification waits for that in the kernel."""
        with self.making(own) as made:
            own.start("unmount", lazy=True)
            assert set(self.outcomes(own)) == {errno.ENOTCONN}
            own.call("open_gate", "MKDIR")
        assert made == [0]
        assert own.server.wait() == 0


def _mkdir(path: Path) -> int:
    try:
        path.mkdir()
    except OSError as error:
        return error.errno or -1
    return 0


def _work(root: Path, number: int, rounds: int) -> None:
    """Everything that takes a directory's lock or a page's, in directories shared with others; what was written must
    be there."""
    for count in range(rounds):
        directory = root / f"shared{count % 3}"
        name, data = f"{number}-{count}", os.urandom(3 * PAGE + number)
        (directory / name).write_bytes(data)
        assert (directory / name).read_bytes() == data
        assert name in os.listdir(directory)
        (directory / f"{name}.d").mkdir()
        os.rename(directory / name, directory / f"{name}.d" / "moved")
        assert (directory / f"{name}.d" / "moved").stat().st_size == len(data)
        assert (directory / f"{name}.d" / "moved").read_bytes() == data
        assert (root / "static").read_bytes() == b"static" * PAGE
        assert not (directory / "absent").exists()
        (directory / f"{name}.d" / "moved").unlink()
        (directory / f"{name}.d").rmdir()


@pytest.mark.deadline(600)
def test_handlers_and_notifications_at_full_speed(make_lab: MakeLab) -> None:
    """No deadlock, and no program sees anything wrong."""
    lab = make_lab(Configuration())
    (lab.root / "static").write_bytes(b"static" * PAGE)
    for number in range(3):
        (lab.root / f"shared{number}").mkdir()
    with Peer() as one, Peer() as two, Peer() as three:
        lab.call("start_storm")
        for number, peer in enumerate((one, two, three)):
            peer.start(_work, lab.root, number, ROUNDS)
        for peer in (one, two, three):
            peer.result(580)
        sent = lab.call("stop_storm")
    assert len(sent) == 10 and min(sent.values()) > 0, sent
