"""Volume directories: how they are made, opened and refused; and what can be a mount point."""

from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from polefs.node.errors import Refusal
from polefs.node.lock import Holder
from polefs.node.mountpoint import check_mountpoint
from polefs.node.volume import FORMAT, default_volume, is_locked, make_volume, open_or_make_volume, open_volume

ME = Holder(os.getpid(), "mount", "/mnt/me")


@contextmanager
def refusal(number: int, says: str) -> Iterator[None]:
    with pytest.raises(Refusal, match=says) as caught:
        yield
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)


def test_made_on_first_use(tmp_path: Path) -> None:
    path = tmp_path / "new" / "volume"
    volume = open_or_make_volume(str(path), ME)
    assert is_locked(str(path))
    assert {entry.name for entry in path.iterdir()} >= {"volume.json", "lock", "meta.db", "objects", "local", "log"}
    assert path.stat().st_mode & 0o777 == 0o700
    info = json.loads((path / "volume.json").read_text())
    assert info["format"] == FORMAT
    assert info["name"] == "volume"
    volume.unlock()
    assert not is_locked(str(path))
    again = open_or_make_volume(str(path), ME)
    assert again.info == volume.info
    again.unlock()


def test_in_an_empty_directory_or_a_fresh_disk(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    make_volume(str(tmp_path), ME, name="disk").unlock()
    assert open_volume(str(tmp_path)).info.name == "disk"


def test_symbolic_link_to_a_volume(tmp_path: Path) -> None:
    make_volume(str(tmp_path / "real"), ME).unlock()
    (tmp_path / "link").symlink_to("real")
    assert open_volume(str(tmp_path / "link")).path == str((tmp_path / "real").resolve())


def test_formatting_twice(tmp_path: Path) -> None:
    make_volume(str(tmp_path / "v"), ME).unlock()
    with refusal(errno.EEXIST, "is a polefs volume already"):
        make_volume(str(tmp_path / "v"), ME)


def test_a_directory_that_is_no_volume(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("dear diary")
    with refusal(errno.EINVAL, "no polefs volume: make one with"):
        open_or_make_volume(str(tmp_path), ME)
    with refusal(errno.ENOTEMPTY, "not empty"):
        make_volume(str(tmp_path), ME)
    assert [entry.name for entry in tmp_path.iterdir()] == ["diary"]
    with refusal(errno.ENOENT, "there is no volume"):
        open_volume(str(tmp_path / "nowhere"))


def test_a_file_is_no_volume(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for function in (lambda p: open_or_make_volume(p, ME), lambda p: make_volume(p, ME), open_volume):
        for path in ("file", "file/below"):
            with refusal(errno.ENOTDIR, "not a directory"):
                function(str(tmp_path / path))


def test_a_volume_without_its_description_is_never_made_anew(tmp_path: Path) -> None:
    make_volume(str(tmp_path / "v"), ME).unlock()
    (tmp_path / "v" / "volume.json").unlink()
    before = (tmp_path / "v" / "meta.db").read_bytes()
    with refusal(errno.EINVAL, "no polefs volume"):
        open_or_make_volume(str(tmp_path / "v"), ME)
    with refusal(errno.ENOTEMPTY, "not empty"):
        make_volume(str(tmp_path / "v"), ME)
    assert (tmp_path / "v" / "meta.db").read_bytes() == before


def test_an_interrupted_creation_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "v"
    make_volume(str(path), ME).unlock()
    (path / "volume.json").rename(path / "volume.json.new")
    (path / "meta.db").write_bytes(b"half")
    open_or_make_volume(str(path), ME).unlock()
    assert open_volume(str(path)).info.format == FORMAT
    assert not (path / "volume.json.new").exists()


def test_newer_and_damaged_formats(tmp_path: Path) -> None:
    make_volume(str(tmp_path / "v"), ME).unlock()
    file = tmp_path / "v" / "volume.json"
    file.write_text(json.dumps({"format": FORMAT + 1, "strange": True}))
    with refusal(errno.EPROTO, "upgrade polefs"):
        open_or_make_volume(str(tmp_path / "v"), ME)
    for text in ("", "{", "[]", '{"format": "one"}', '{"format": 1}', "\xff"):
        file.write_text(text, encoding="latin-1")
        with refusal(errno.EINVAL, "is damaged"):
            open_volume(str(tmp_path / "v"))


@pytest.mark.parametrize(
    ("holder", "says"),
    [
        (Holder(7, "mount", "/mnt/x"), r"is mounted on /mnt/x by process 7: unmount it first \(polefs umount /mnt/x\)"),
        (Holder(7, "check"), "is being checked by process 7"),
        (Holder(7, "format"), "is being made by process 7"),
    ],
)
def test_a_locked_volume(tmp_path: Path, holder: Holder, says: str) -> None:
    volume = make_volume(str(tmp_path / "v"), holder)
    with refusal(errno.EBUSY, says):
        open_or_make_volume(str(tmp_path / "v"), ME)
    volume.unlock()


def test_two_that_make_one_volume(tmp_path: Path) -> None:
    """Processes that use a volume for the first time at once make it once."""
    program = (
        "import os, sys\n"
        "from polefs.node.errors import Refusal\n"
        "from polefs.node.lock import Holder\n"
        "from polefs.node.volume import open_or_make_volume\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    volume = open_or_make_volume(sys.argv[1], Holder(os.getpid(), 'mount', '/m'))\n"
        "except Refusal as error:\n"
        "    print(error.errno)\n"
        "else:\n"
        "    print(volume.info.uuid, flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "v")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    answers = []
    for child in children:
        assert child.stdout is not None
        answers.append(child.stdout.readline().strip())
    for child in children:
        child.communicate("end\n")
    assert answers.count(str(errno.EBUSY)) == 3
    assert open_volume(str(tmp_path / "v")).info.uuid in answers


def test_unwritable_places(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    (tmp_path / "empty").mkdir()
    (tmp_path / "secret").mkdir(mode=0o700)
    make_volume(str(tmp_path / "v"), ME).unlock()
    (tmp_path / "v").chmod(0o755)
    lines = as_nobody(
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        open_or_make_volume(path, Holder(1, 'mount', '/m'))\n"
        "    except Refusal as error:\n"
        "        print(error.errno, error)\n",
        *(str(tmp_path / name) for name in ("new", "empty", "secret", "secret/below", "v")),
    )
    assert len(lines) == 5
    for line in lines:
        assert line.startswith(f"{errno.EACCES} cannot write to volume {tmp_path}")
        assert line.endswith("give a directory that you may write to")


def test_default_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_volume() == "/data/polefs/default"
    monkeypatch.setenv("HOME", "/home/ann")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert default_volume() == "/home/ann/.local/share/polefs/default"


def test_good_mount_points(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    real = str(tmp_path.resolve())
    volume = str(tmp_path / "volume")
    assert check_mountpoint(str(tmp_path / "empty"), volume) == f"{real}/empty"
    assert check_mountpoint(str(tmp_path / "link"), volume) == f"{real}/empty"
    assert check_mountpoint(str(tmp_path / "full"), volume, nonempty=True) == f"{real}/full"
    # A name that begins like the volume's is not inside of it.
    (tmp_path / "volumes").mkdir()
    assert check_mountpoint(str(tmp_path / "volumes"), volume) == f"{real}/volumes"


def test_bad_mount_points(tmp_path: Path) -> None:
    (tmp_path / "v" / "objects").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    volume = str(tmp_path / "v")
    for name, number, says in (
        ("nowhere", errno.ENOENT, r"does not exist: make it first \(mkdir -p"),
        ("file", errno.ENOTDIR, "not a directory"),
        ("file/below", errno.ENOTDIR, "not a directory"),
        ("full", errno.ENOTEMPTY, "-o nonempty"),
        ("loop", errno.ELOOP, "cannot use mount point"),
        ("v", errno.EINVAL, "inside the volume"),
        ("v/objects", errno.EINVAL, "inside the volume"),
        (".", errno.EINVAL, "would hide the volume"),
    ):
        with refusal(number, says):
            check_mountpoint(str(tmp_path / name), volume)
    with refusal(errno.EBUSY, r"/proc is already a mount point, of proc \(proc\)"):
        check_mountpoint("/proc", volume)


def test_mount_points_of_others(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    (tmp_path / "theirs").mkdir(mode=0o755)
    lines = as_nobody(
        "try:\n    check_mountpoint(sys.argv[1], '/v')\nexcept Refusal as error:\n    print(error.errno, error)\n",
        str(tmp_path / "theirs"),
    )
    assert lines == [
        f"{errno.EACCES} no permission to mount on {tmp_path}/theirs: give a directory that you own",
    ]


def as_nobody(program: str, *arguments: str) -> list[str]:
    """Run a program in this interpreter as the user nobody; the lines it prints."""
    if os.geteuid() != 0:
        pytest.fail("this test changes its user id: run it as root", pytrace=False)
    nobody = pwd.getpwnam("nobody")
    head = (
        "import os, sys\n"
        "from polefs.node.errors import Refusal\n"
        "from polefs.node.lock import Holder\n"
        "from polefs.node.mountpoint import check_mountpoint\n"
        "from polefs.node.volume import open_or_make_volume\n"
        "from polefs.meta.store import sqlite\n"
        f"os.setgroups([]); os.setgid({nobody.pw_gid}); os.setuid({nobody.pw_uid})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + program, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    return done.stdout.splitlines()
