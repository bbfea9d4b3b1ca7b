"""Mount options, sizes and the list of mounts: what the command line reads."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from polefs.node.errors import Refusal
from polefs.node.mountinfo import Mount, find_mount, mounts, parse_mountinfo, resolve
from polefs.node.options import MountFlag, MountRequest, parse_options
from polefs.node.sizes import SIZE_MAX, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("lists", "flags"),
    [
        ([], 0),
        ([""], 0),
        (["rw"], 0),
        (["ro"], MountFlag.RDONLY),
        (["ro,rw"], 0),
        (["rw", "ro"], MountFlag.RDONLY),
        (["ro,nosuid,nodev,noexec"], MountFlag.RDONLY | MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC),
        (["nosuid,suid,nodev,dev,noexec,exec"], 0),
        (["sync,dirsync"], MountFlag.SYNCHRONOUS | MountFlag.DIRSYNC),
        (["sync,async"], 0),
        (["noatime,relatime"], MountFlag.RELATIME),
        (["relatime,noatime,nodiratime"], MountFlag.NOATIME | MountFlag.NODIRATIME),
        (["noatime,strictatime"], MountFlag.STRICTATIME),
        (["noatime,atime"], 0),
        (["ro,noexec,defaults"], 0),
        ([" ro , nosuid "], MountFlag.RDONLY | MountFlag.NOSUID),
        (["_netdev,nofail,auto,noauto,user,users,user=ann,x-systemd.automount,X-mount.mkdir,comment=a"], 0),
        (["default_permissions"], 0),
    ],
)
def test_flags(lists: list[str], flags: int) -> None:
    assert parse_options(lists).flags == flags


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ("", "off"),
        ("passthrough=read", "read"),
        ("ro", "read"),
        ("passthrough=all", "all"),
        ("ro,passthrough=all", "read"),
        ("ro,passthrough=off", "off"),
        ("strictatime,passthrough=all", "off"),
    ],
)
def test_passthrough_in_effect(options: str, mode: str) -> None:
    parsed = parse_options([options])
    request = MountRequest(volume="", mountpoint="", flags=parsed.flags, passthrough=parsed.passthrough)
    assert request.passed_through == mode


def test_other_options() -> None:
    assert parse_options([]).allow_other is None
    assert parse_options(["allow_other"]).allow_other is True
    assert parse_options(["allow_other,noallow_other"]).allow_other is False
    assert parse_options(["passthrough=off,passthrough=all"]).passthrough == "all"
    options = parse_options(["nonempty,volume=/srv/a=b"])
    assert options.nonempty
    assert options.volume == "/srv/a=b"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("bogus", "unknown mount option 'bogus'"),
        ("rw=1", "takes no value"),
        ("volume=", "needs a value"),
        ("volume", "needs a value"),
        ("passthrough", "passthrough=off, read or all"),
        ("passthrough=on", "passthrough=off, read or all"),
        ("remount", "cannot remount"),
    ],
)
def test_refused_options(word: str, says: str) -> None:
    with pytest.raises(Refusal, match=says) as caught:
        parse_options([f"ro,{word}"])
    assert caught.value.errno == errno.EINVAL
    assert "\n" not in str(caught.value)


def test_sloppy_passes_over_unknown_options() -> None:
    assert parse_options(["bogus,ro,huh=3"], sloppy=True).flags == MountFlag.RDONLY


def test_request_tells_the_policies() -> None:
    def request(flags: int) -> MountRequest:
        return MountRequest(volume="/v", mountpoint="/m", flags=flags)

    assert request(0).atime == "relatime"
    assert request(MountFlag.NOATIME).atime == "noatime"
    assert request(MountFlag.STRICTATIME).atime == "strictatime"
    assert request(MountFlag.RDONLY).read_only
    assert request(MountFlag.RDONLY).atime == "noatime"
    assert request(0).directory_atime
    assert not request(MountFlag.NODIRATIME).directory_atime
    assert not request(MountFlag.NODEV).read_only


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", 1024),
        ("1K", 1024),
        ("500M", 500 << 20),
        ("10GiB", 10 << 30),
        ("10 GB", 10 << 30),
        ("1.5T", 3 << 39),
        ("2P", 2 << 50),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1X", "1.2.3", "8E", "10 G G", "0.1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(Refusal, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("5m", 300), ("1.5 h", 5400), ("2d", 172800), ("0.5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "m", "5 minutes", "1h30m", "inf"])
def test_no_durations(text: str) -> None:
    with pytest.raises(Refusal, match="is no duration"):
        parse_duration(text)


def test_shown_sizes() -> None:
    shown = [format_size(size) for size in (0, 1023, 1024, 1536, 1 << 20, (1 << 30) - 1, 1 << 40, SIZE_MAX)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 GiB", "1.0 TiB", "8.0 EiB"]


MOUNTINFO = r"""22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw,errors=remount-ro
31 22 0:27 / /mnt/a\040b ro,nosuid shared:5 master:1 - fuse.polefs /srv/v\134x rw,user_id=0,group_id=0
32 31 0:28 / /mnt/a\040b rw - tmpfs tmpfs rw
40 22 0:29 / /odd rw - sysfs  rw
"""


def test_mountinfo() -> None:
    first, second, third, fourth = parse_mountinfo(MOUNTINFO)
    assert first == Mount("/", "/", "ext4", "/dev/vda1", frozenset(["rw", "relatime", "errors=remount-ro"]))
    assert (second.mountpoint, second.source) == ("/mnt/a b", "/srv/v\\x")
    assert second.is_polefs
    assert {"ro", "nosuid", "user_id=0"} <= second.options
    assert not third.is_polefs
    assert fourth.source == ""


def test_own_mounts() -> None:
    assert any(mount.mountpoint == "/proc" and mount.fstype == "proc" for mount in mounts())
    assert find_mount("/proc") is not None
    assert find_mount("/proc/self") is None


def test_resolve(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "second").symlink_to(tmp_path / "link")
    (tmp_path / "proc").symlink_to("/proc")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere/at/all")
    real = str((tmp_path / "real").resolve())
    assert resolve(str(tmp_path / "second")) == real
    assert resolve(str(tmp_path / "link/../link")) == real
    assert resolve(str(tmp_path / "link/new")) == f"{real}/new"
    assert resolve(str(tmp_path / "proc")) == "/proc"
    assert resolve(str(tmp_path / "gone")).endswith("/nowhere/at/all")
    assert resolve("/") == "/"
    with pytest.raises(OSError, match="symbolic links") as caught:
        resolve(str(tmp_path / "loop"))
    assert caught.value.errno == errno.ELOOP
