"""Attaching a FUSE device to a directory: mount(2), fusermount3 for users without privilege, and the way back."""

from __future__ import annotations

import array
import errno
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rawfuse._kernel import lib
from rawfuse.errors import FuseError

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

_FLAG_NAMES = {
    MS_NOSUID: "nosuid",
    MS_NODEV: "nodev",
    MS_NOEXEC: "noexec",
    MS_SYNCHRONOUS: "sync",
    MS_DIRSYNC: "dirsync",
    MS_NOATIME: "noatime",
}
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_CAP_SYS_ADMIN = 1 << 21
_HELPER = "fusermount3"


@dataclass(frozen=True)
class MountOptions:
    """How the mount looks to others. ``source`` is its first column in mount(8), ``fuse.<subtype>`` its type; ``flags``
    are MS_* of mount(2). ``default_permissions``: the kernel checks modes and owners; ``allow_other``: every user may
    enter, not only the one who mounted. ``max_read`` 0 means no limit beyond the negotiated one."""

    source: str = "rawfuse"
    subtype: str = "rawfuse"
    read_only: bool = False
    allow_other: bool = False
    default_permissions: bool = True
    max_read: int = 0
    flags: int = 0

    def kernel_flags(self) -> int:
        return self.flags | (MS_RDONLY if self.read_only else 0)

    def words(self) -> list[str]:
        """The file system's own options, as mount(2) and fusermount3 both take them."""
        words = []
        if self.default_permissions:
            words.append("default_permissions")
        if self.allow_other:
            words.append("allow_other")
        if self.max_read:
            words.append(f"max_read={self.max_read}")
        return words


def privileged() -> bool:
    """Whether mount(2) may be tried: CAP_SYS_ADMIN is effective."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & _CAP_SYS_ADMIN)
    return False


def mount_device(fd: int, mountpoint: str, options: MountOptions) -> None:
    """mount(2). With synchronous INIT it blocks until INIT has been answered, so it must run beside who answers."""
    words = [f"fd={fd}", "rootmode=40000", f"user_id={os.geteuid()}", f"group_id={os.getegid()}", *options.words()]
    result = lib.rawfuse_mount(
        os.fsencode(options.source),
        os.fsencode(mountpoint),
        f"fuse.{options.subtype}".encode(),
        options.kernel_flags(),
        ",".join(words).encode(),
    )
    if result:
        raise FuseError(-result, f"cannot mount on {mountpoint}: {os.strerror(-result)}")


def mount_by_helper(mountpoint: str, options: MountOptions) -> int:
    """Have fusermount3 open the device and mount it; returns the descriptor. Its own message becomes the error."""
    helper = shutil.which(_HELPER)
    if helper is None:
        raise FuseError(errno.EPERM, f"mounting needs root or {_HELPER} (package fuse3), which is not installed")
    names = [name for flag, name in _FLAG_NAMES.items() if options.flags & flag]
    words = ["ro" if options.read_only else "rw", *names, *options.words()]
    words += [f"fsname={_escaped(options.source)}", f"subtype={_escaped(options.subtype)}"]
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            run = subprocess.run(
                [helper, "-o", ",".join(words), "--", mountpoint],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
        if run.returncode:
            text = run.stderr.decode(errors="replace").strip().splitlines()
            raise FuseError(errno.EPERM, text[-1] if text else f"{_HELPER} failed with exit code {run.returncode}")
        fds = array.array("i")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
    for _, kind, data in ancillary:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: fds.itemsize])
            os.set_inheritable(fds[0], False)
            return fds[0]
    raise FuseError(errno.EIO, f"{_HELPER} sent no descriptor")


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take the topmost mount off ``mountpoint``. EBUSY when files are open and not ``lazy``; EINVAL when nothing is
    mounted there. Never call it from the thread that serves the mount."""
    result = lib.rawfuse_umount(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0))
    if result == 0:
        return
    helper = shutil.which(_HELPER)
    if -result == errno.EPERM and helper is not None:
        command = [helper, "-u", *(["-z"] if lazy else []), "--", mountpoint]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            return
        busy = "busy" in run.stderr
        raise FuseError(errno.EBUSY if busy else errno.EPERM, run.stderr.strip() or f"cannot unmount {mountpoint}")
    raise FuseError(-result, f"cannot unmount {mountpoint}: {os.strerror(-result)}")


def device_number(mountpoint: str) -> str | None:
    """``major:minor`` of the topmost mount on ``mountpoint``, from mountinfo: no system call enters the mount."""
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split()
        if _unescaped(fields[4]) == os.fsencode(mountpoint):
            found = fields[2].decode()
    return found


def raise_read_ahead(mountpoint: str, size: int) -> None:
    """Set the read-ahead window of the mount to ``size`` bytes: INIT alone cannot raise it above 128 KiB. Without the
    privilege to do so it stays as it is."""
    number = device_number(mountpoint)
    if number is None:
        return
    try:
        Path(f"/sys/class/bdi/{number}/read_ahead_kb").write_text(str(size >> 10))
    except OSError:
        return


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _unescaped(text: bytes) -> bytes:
    """Space, tab, newline and backslash stand in mountinfo as three octal digits (proc_namespace.c: mangle)."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), text)
