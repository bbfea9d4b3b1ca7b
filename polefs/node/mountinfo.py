"""The kernel's list of mounts (proc_pid_mountinfo(5)), read without touching any mounted file system."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

import msgspec

FSTYPE = "fuse.polefs"
"""The type of our mounts as mountinfo shows it."""

_LINKS_MAX = 40
"""As many symbolic links as the kernel follows in one path (MAXSYMLINKS)."""

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(msgspec.Struct, frozen=True):
    """One mount. ``root`` is the directory of the file system that is seen at the mount point; ``options`` are those of
    the mount and of its superblock."""

    mountpoint: str
    root: str
    fstype: str
    source: str
    options: frozenset[str]

    @property
    def is_polefs(self) -> bool:
        return self.fstype == FSTYPE


def parse_mountinfo(text: str) -> Iterator[Mount]:
    """The mounts in the order in which they were made; of several on one directory the last one is seen."""
    for line in text.split("\n"):
        left, dash, right = line.partition(" - ")
        if not dash:
            continue
        fields = left.split(" ")
        fstype, source, *superblock = right.split(" ")
        options = fields[5].split(",") + (superblock[0].split(",") if superblock else [])
        mountpoint, root, fstype, source = map(_unescape, (fields[4], fields[3], fstype, source))
        yield Mount(mountpoint, root, fstype, source, frozenset(options))


def mounts() -> list[Mount]:
    """All mounts of this process's mount namespace."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return list(parse_mountinfo(file.read()))


def find_mount(path: str) -> Mount | None:
    """The mount that is seen at exactly this absolute, resolved path."""
    return next((mount for mount in reversed(mounts()) if mount.mountpoint == path), None)


def mount_of(path: str) -> Mount | None:
    """The mount that an absolute path without symbolic links is on."""
    seen = {mount.mountpoint: mount for mount in mounts()}
    while path != "/" and path not in seen:
        path = os.path.dirname(path)
    return seen.get(path)


def resolve(path: str) -> str:
    """The absolute path without symbolic links, never looking at the last component when that is a mount point: asking
    a dead or hanging file system anything may fail or never return."""
    path = os.path.abspath(path)
    for _ in range(_LINKS_MAX):
        parent, name = os.path.split(path)
        parent = os.path.realpath(parent)
        path = os.path.join(parent, name)
        if find_mount(path) is not None or not os.path.islink(path):
            return path
        path = os.path.normpath(os.path.join(parent, os.readlink(path)))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def _unescape(field: str) -> str:
    """Space, tab, newline, ``#`` and backslash stand as a backslash and three octal digits."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)
