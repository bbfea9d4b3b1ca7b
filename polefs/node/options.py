"""Mount options: the comma lists of ``-o``, and what is asked of a mount as a whole."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from enum import IntFlag
from typing import Literal

import msgspec

from polefs.node.cache import CacheOptions
from polefs.node.errors import Refusal

GC_INTERVAL = 3600.0
"""Seconds between passes of garbage collection, unless options say otherwise."""

Passthrough = Literal["off", "read", "all"]

AtimePolicy = Literal["noatime", "relatime", "strictatime"]


class MountFlag(IntFlag):
    """Flags of mount(2) (linux/mount.h)."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    DIRSYNC = 128
    NOATIME = 1024
    NODIRATIME = 2048
    RELATIME = 1 << 21
    STRICTATIME = 1 << 24


class MountRequest(msgspec.Struct, kw_only=True):
    """All that the daemon needs to know; the command line hands it over as JSON. Paths are absolute."""

    volume: str
    mountpoint: str
    flags: int = 0
    """``MountFlag`` bits."""
    allow_other: bool = False
    nonempty: bool = False
    log_level: str = "info"
    log_file: str | None = None
    """None: the volume's own log in the background, stderr in the foreground."""
    trace: str | None = None
    profile: str | None = None
    foreground: bool = False
    secret: bytes | None = None
    """Opens an encrypted volume."""
    cache: CacheOptions = CacheOptions()
    store_timeout: float | None = None
    """Seconds that a bucket may be out of reach until programs get errors, 0: for ever; None: as it is by default."""
    gc_interval: float = GC_INTERVAL
    """Seconds between passes of garbage collection in the background, 0: none."""
    dirty_limit: int | None = None
    """Most bytes that wait to be written back; None: as it is by default."""
    passthrough: Passthrough | None = None
    """Which files of a volume in a bucket the kernel may read, or read and write, itself; None: as it is by default."""

    @property
    def read_only(self) -> bool:
        return bool(self.flags & MountFlag.RDONLY)

    @property
    def passed_through(self) -> Passthrough:
        """``passthrough`` in effect. Reads that do not come to us cannot set access times each time."""
        if self.atime == "strictatime":
            return "off"
        if self.read_only:
            return "off" if self.passthrough == "off" else "read"
        return self.passthrough or "off"

    @property
    def atime(self) -> AtimePolicy:
        """When reading sets the access time; relatime unless said otherwise, as Linux has it."""
        if self.flags & (MountFlag.NOATIME | MountFlag.RDONLY):
            return "noatime"
        return "strictatime" if self.flags & MountFlag.STRICTATIME else "relatime"

    @property
    def directory_atime(self) -> bool:
        return not self.flags & MountFlag.NODIRATIME


class Options(msgspec.Struct, kw_only=True):
    """What a list of ``-o`` options says."""

    flags: int = 0
    allow_other: bool | None = None
    nonempty: bool = False
    volume: str | None = None
    key_file: str | None = None
    cache_dir: str | None = None
    cache_size: str | None = None
    cache_free: str | None = None
    store_timeout: str | None = None
    dirty_limit: str | None = None
    gc_interval: str | None = None
    passthrough: Passthrough | None = None


_ATIME = MountFlag.NOATIME | MountFlag.RELATIME | MountFlag.STRICTATIME

_FLAGS: dict[str, tuple[int, int]] = {
    "defaults": (MountFlag.RDONLY | MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC | MountFlag.SYNCHRONOUS, 0),
    "ro": (0, MountFlag.RDONLY),
    "rw": (MountFlag.RDONLY, 0),
    "nosuid": (0, MountFlag.NOSUID),
    "suid": (MountFlag.NOSUID, 0),
    "nodev": (0, MountFlag.NODEV),
    "dev": (MountFlag.NODEV, 0),
    "noexec": (0, MountFlag.NOEXEC),
    "exec": (MountFlag.NOEXEC, 0),
    "sync": (0, MountFlag.SYNCHRONOUS),
    "async": (MountFlag.SYNCHRONOUS, 0),
    "dirsync": (0, MountFlag.DIRSYNC),
    "noatime": (_ATIME, MountFlag.NOATIME),
    "atime": (MountFlag.NOATIME, 0),
    "relatime": (_ATIME, MountFlag.RELATIME),
    "norelatime": (MountFlag.RELATIME, 0),
    "strictatime": (_ATIME, MountFlag.STRICTATIME),
    "nostrictatime": (MountFlag.STRICTATIME, 0),
    "nodiratime": (0, MountFlag.NODIRATIME),
    "diratime": (MountFlag.NODIRATIME, 0),
}
"""Option -> (flags that it clears, flags that it sets); a later option overrides an earlier one."""

_VALUES = {
    "volume": "DIRECTORY",
    "key_file": "FILE",
    "cache_dir": "DIRECTORY",
    "cache_size": "SIZE",
    "cache_free": "SIZE",
    "store_timeout": "DURATION",
    "dirty_limit": "SIZE",
    "gc_interval": "DURATION",
}
"""Option -> what its value is; each is an attribute of ``Options``."""

_OF_MOUNT = frozenset(
    (
        *("auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup", "_netdev"),
        *("nofail", "default_permissions", "silent", "loud", "lazytime", "nolazytime"),
    )
)
"""Understood by mount(8), systemd or the kernel alone, or always so here: accepted, with no effect."""

_OF_MOUNT_PREFIXES = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")


def parse_options(lists: Iterable[str], *, sloppy: bool = False) -> Options:
    """Read comma lists as mount(8) does: a later option overrides an earlier one, empty ones are passed over. An
    unknown option raises ``Refusal`` (EINVAL), unless ``sloppy`` (``mount -s``)."""
    options = Options()
    for word in (word.strip() for part in lists for word in part.split(",")):
        name, equals, value = word.partition("=")
        if word in _FLAGS:
            clear, add = _FLAGS[word]
            options.flags = (options.flags & ~clear) | add
        elif word == "allow_other":
            options.allow_other = True
        elif word == "noallow_other":
            options.allow_other = False
        elif word == "nonempty":
            options.nonempty = True
        elif name == "passthrough":
            try:
                options.passthrough = msgspec.convert(value, Passthrough)
            except msgspec.ValidationError:
                text = "option 'passthrough' needs a value: give -o passthrough=off, read or all"
                raise Refusal(errno.EINVAL, text) from None
        elif name in _VALUES:
            if not value:
                raise Refusal(errno.EINVAL, f"option '{name}' needs a value: give -o {name}={_VALUES[name]}")
            setattr(options, name, value)
        elif word and not (word in _OF_MOUNT or word.startswith(_OF_MOUNT_PREFIXES) or sloppy):
            if word == "remount":
                raise Refusal(errno.EINVAL, "polefs cannot remount: unmount it and mount it again with the new options")
            values = [f"{name}={value}" for name, value in _VALUES.items()]
            known = ", ".join(
                [*_FLAGS, "allow_other", "noallow_other", "nonempty", "passthrough=off|read|all", *values]
            )
            what = f"option '{name}' takes no value" if equals and name in _FLAGS else f"unknown mount option '{word}'"
            raise Refusal(errno.EINVAL, f"{what}: the options are {known}")
    return options
