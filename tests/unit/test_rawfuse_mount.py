"""Mount options, the fusermount3 helper and mountinfo, without mounting anything."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from rawfuse import FuseError, MountOptions
from rawfuse.device import Device
from rawfuse.mount import (
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    device_number,
    mount_by_helper,
    mount_device,
    privileged,
    raise_read_ahead,
    unmount,
)


class TestOptions:
    def test_defaults(self) -> None:
        assert MountOptions().words() == ["default_permissions"]
        assert MountOptions().kernel_flags() == 0

    def test_all(self) -> None:
        options = MountOptions(read_only=True, allow_other=True, max_read=4096, flags=MS_NOSUID)
        assert options.words() == ["default_permissions", "allow_other", "max_read=4096"]
        assert options.kernel_flags() == MS_RDONLY | MS_NOSUID
        assert MountOptions(default_permissions=False).words() == []


HELPER = """#!{python}
import array, os, socket, sys
with open({log!r}, "w") as log:
    log.write("\\n".join(sys.argv[1:]))
{action}
"""

SEND = """
channel = socket.socket(fileno=int(os.environ["_FUSE_COMMFD"]))
fd = os.open({path!r}, os.O_RDWR)
channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
"""


class TestHelper:
    """A program in the place of fusermount3 does what the test says."""

    @pytest.fixture
    def install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
        def install(action: str) -> Path:
            log, program = tmp_path / "log", tmp_path / "fusermount3"
            program.write_text(HELPER.format(python=sys.executable, log=str(log), action=action))
            program.chmod(0o755)
            monkeypatch.setenv("PATH", str(tmp_path))
            return log

        return install

    def test_descriptor_is_passed(self, install, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        (tmp_path / "device").write_bytes(b"the device")
        log = install(SEND.format(path=str(tmp_path / "device")))
        options = MountOptions(
            source="a,b\\c", subtype="mine", read_only=True, allow_other=True, flags=MS_NOSUID | MS_NODEV
        )
        fd = mount_by_helper("-mountpoint", options)
        try:
            assert os.pread(fd, 100, 0) == b"the device"
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)
        words = "ro,nosuid,nodev,default_permissions,allow_other,fsname=a\\,b\\\\c,subtype=mine"
        assert log.read_text().split("\n") == ["-o", words, "--", "-mountpoint"]

    def test_its_message_is_the_error(self, install) -> None:  # type: ignore[no-untyped-def]
        install('sys.exit("fusermount3: user has no write access to mountpoint /x")')
        with pytest.raises(FuseError, match="no write access") as caught:
            mount_by_helper("/x", MountOptions())
        assert caught.value.errno == errno.EPERM

    def test_it_fails_in_silence(self, install) -> None:  # type: ignore[no-untyped-def]
        install("sys.exit(3)")
        with pytest.raises(FuseError, match="exit code 3"):
            mount_by_helper("/x", MountOptions())

    def test_it_sends_nothing(self, install) -> None:  # type: ignore[no-untyped-def]
        install("")
        with pytest.raises(FuseError, match="no descriptor") as caught:
            mount_by_helper("/x", MountOptions())
        assert caught.value.errno == errno.EIO

    def test_it_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(FuseError, match="package fuse3") as caught:
            mount_by_helper("/x", MountOptions())
        assert caught.value.errno == errno.EPERM

    def test_no_descriptor_is_left_behind(self, install, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        (tmp_path / "device").touch()
        before = len(os.listdir("/proc/self/fd"))
        for action in ("", "sys.exit(1)"):
            install(action)
            with pytest.raises(FuseError):
                mount_by_helper("/x", MountOptions())
        install(SEND.format(path=str(tmp_path / "device")))
        os.close(mount_by_helper("/x", MountOptions()))
        assert len(os.listdir("/proc/self/fd")) == before


def test_privileged_is_cap_sys_admin() -> None:
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:\t")[2].split()[0], 16)
    assert privileged() == bool(effective >> 21 & 1)


def test_failures_say_what_and_where(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with open(os.devnull) as file, pytest.raises(FuseError, match=f"cannot mount on {missing}") as caught:
        mount_device(file.fileno(), missing, MountOptions())
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)


def test_unmounting_what_is_no_mount(tmp_path: Path) -> None:
    with pytest.raises(FuseError, match=str(tmp_path)) as caught:
        unmount(str(tmp_path))
    assert caught.value.errno in (errno.EINVAL, errno.EPERM)


class TestMountInfo:
    LINES = (
        "20 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "30 20 0:40 / /mnt/with\\040space\\134and\\011tab rw - fuse.x x rw\n"
        "31 20 0:41 / /mnt/\udce4 rw - fuse.x x rw\n"
        "32 20 0:42 / /mnt/twice rw - fuse.x x rw\n"
        "33 32 0:43 / /mnt/twice rw - fuse.y y rw\n"
        "34 20 0:44 / /mnt/ümlaut rw - fuse.y y rw\n"
    )

    @pytest.fixture(autouse=True)
    def mountinfo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = os.fsencode(self.LINES)
        monkeypatch.setattr(Path, "read_bytes", lambda path: data)

    @pytest.mark.parametrize(
        ("mountpoint", "expected"),
        [
            ("/", "254:0"),
            ("/mnt/with space\\and\ttab", "0:40"),
            ("/mnt/\udce4", "0:41"),
            ("/mnt/twice", "0:43"),
            ("/mnt/ümlaut", "0:44"),
            ("/mnt", None),
            ("/mnt/twice/", None),
        ],
    )
    def test_device_number(self, mountpoint: str, expected: str | None) -> None:
        assert device_number(mountpoint) == expected

    def test_read_ahead_of_what_is_no_mount(self) -> None:
        raise_read_ahead("/not/mounted", 1 << 20)


def test_device_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rawfuse.device.PATH", str(tmp_path / "fuse"))
    with pytest.raises(FuseError, match="modprobe fuse") as caught:
        Device.open()
    assert caught.value.errno == errno.ENOENT
