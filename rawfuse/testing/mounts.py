"""The mounts of this process's namespace: listing them, mount(2) and umount2(2). Nothing here asks a server."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

FUSECTL = Path("/sys/fs/fuse/connections")
"""One directory a connection, named by the minor number of its mount's device; ``abort`` in it ends the connection."""

MOUNTINFO = "/proc/thread-self/mountinfo"

MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_NEWNS = 0x20000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount_syscall(source: str, target: str, kind: str | None, flags: int) -> None:
    """mount(2) without data; OSError with its errno."""
    kind_bytes = kind.encode() if kind is not None else None
    _check(
        _libc.mount(os.fsencode(source), os.fsencode(target), kind_bytes, ctypes.c_ulong(flags), None),
        f"mount {target}",
    )


def umount_syscall(target: str, flags: int = 0) -> None:
    """umount2(2); OSError with its errno (EBUSY, EINVAL when not mounted)."""
    _check(_libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW), f"umount {target}")


def unshare_mounts() -> None:
    """A mount namespace of its own for the calling thread and what it starts; nothing that is mounted or unmounted
    on either side is seen on the other."""
    _check(_libc.unshare(CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    mount_syscall("none", "/", None, MS_REC | MS_PRIVATE)


@dataclass(frozen=True)
class MountLine:
    """One line of mountinfo: the device's minor number names the FUSE connection."""

    minor: int
    mountpoint: str
    options: str
    kind: str
    source: str
    super_options: str

    @property
    def is_fuse(self) -> bool:
        return self.kind in ("fuse", "fuseblk") or self.kind.startswith(("fuse.", "fuseblk."))


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def mounts() -> list[MountLine]:
    """The mounts of this thread's namespace; touches none of them."""
    found = []
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, right = line.rstrip("\n").split(" - ", 1)
            fields, tail = left.split(" "), right.split(" ")
            minor = int(fields[2].split(":")[1])
            found.append(MountLine(minor, _unescape(fields[4]), fields[5], tail[0], _unescape(tail[1]), tail[2]))
    return found


def find_mount(mountpoint: Path) -> MountLine | None:
    """The topmost mount at exactly this path, or None."""
    return next((line for line in reversed(mounts()) if line.mountpoint == str(mountpoint)), None)
