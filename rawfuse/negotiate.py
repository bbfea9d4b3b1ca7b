"""INIT: what is asked for, what each feature needs, and what was agreed.

A feature that the library does not serve is never agreed to, because the kernel would then change the wire format or
leave work to us that nobody does.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec

from rawfuse.abi import KERNEL_MAJOR, KERNEL_MINOR, OLDEST_MINOR, InitFlag, Opcode
from rawfuse.errors import FuseError
from rawfuse.filesystem import FileSystem
from rawfuse.mount import privileged
from rawfuse.ops import Init
from rawfuse.wire import Codec

PAGE = os.sysconf("SC_PAGE_SIZE")
_INIT_OUT = Codec("fuse_init_out")
_PAGES_LIMIT = Path("/proc/sys/fs/fuse/max_pages_limit")
_DEFAULT_PAGES_LIMIT = 256
_MASK16 = 0xFFFF
_MASK32 = 0xFFFFFFFF


class Feature(NamedTuple):
    """``served``: the library can keep what the flag promises. ``needs``: opcodes that the file system must implement;
    ``requires`` and ``excludes``: other flags; ``minor``: the oldest minor version whose form of it is served;
    ``privileged``: CAP_SYS_ADMIN is needed; ``default_permissions``: the mount must have that option (POSIX_ACL turns
    it on). ``promise``: what a file system that asks for the flag takes on itself, beyond ``needs``, because the kernel
    will rely on it."""

    served: bool
    needs: tuple[Opcode, ...] = ()
    requires: InitFlag = InitFlag(0)
    excludes: InitFlag = InitFlag(0)
    minor: int = OLDEST_MINOR
    privileged: bool = False
    default_permissions: bool = False
    promise: str = ""


_ON = Feature(True)
_OFF = Feature(False)
_F = InitFlag

FEATURES: dict[InitFlag, Feature] = {
    _F.ASYNC_READ: _ON,
    _F.POSIX_LOCKS: Feature(True, (Opcode.GETLK, Opcode.SETLK, Opcode.SETLKW)),
    _F.FILE_OPS: _OFF,
    # Without OPEN the kernel would truncate its own idea of the file and tell nobody (file.c: fuse_open).
    _F.ATOMIC_O_TRUNC: Feature(True, (Opcode.OPEN,), promise="open_file truncates when its flags have O_TRUNC"),
    _F.EXPORT_SUPPORT: Feature(
        True,
        (Opcode.LOOKUP,),
        promise="look_up_inode finds '.' and '..' of every inode that exists, known or forgotten",
    ),
    _F.BIG_WRITES: _ON,
    _F.DONT_MASK: Feature(True, promise="operations that make an inode apply their umask"),
    _F.SPLICE_WRITE: _OFF,
    _F.SPLICE_MOVE: _OFF,
    _F.SPLICE_READ: _OFF,
    _F.FLOCK_LOCKS: Feature(True, (Opcode.SETLK, Opcode.SETLKW)),
    _F.HAS_IOCTL_DIR: _ON,
    _F.AUTO_INVAL_DATA: _ON,
    _F.DO_READDIRPLUS: Feature(True, (Opcode.READDIRPLUS,)),
    _F.READDIRPLUS_AUTO: Feature(True, (Opcode.READDIR, Opcode.READDIRPLUS), requires=_F.DO_READDIRPLUS),
    _F.ASYNC_DIO: _ON,
    _F.WRITEBACK_CACHE: Feature(
        True, promise="nobody else writes to a file that is open; size and mtime are the kernel's"
    ),
    _F.NO_OPEN_SUPPORT: _ON,
    _F.PARALLEL_DIROPS: _ON,
    _F.HANDLE_KILLPRIV: Feature(
        True,
        excludes=_F.HANDLE_KILLPRIV_V2,
        promise="write, chown and truncation clear set-ID bits and security.capability",
    ),
    # It turns default_permissions on, whatever the mount option says.
    _F.POSIX_ACL: Feature(
        True, (Opcode.GETXATTR, Opcode.SETXATTR), promise="new inodes inherit the default ACL of their directory"
    ),
    _F.ABORT_ERROR: _ON,
    _F.MAX_PAGES: _ON,
    _F.CACHE_SYMLINKS: Feature(True, (Opcode.READLINK,), promise="the target of a symlink never changes"),
    _F.NO_OPENDIR_SUPPORT: _ON,
    _F.EXPLICIT_INVAL_DATA: Feature(
        True, excludes=_F.AUTO_INVAL_DATA, promise="invalidate_inode is sent for every change that was not made here"
    ),
    _F.MAP_ALIGNMENT: _OFF,
    _F.SUBMOUNTS: _OFF,
    _F.HANDLE_KILLPRIV_V2: Feature(
        True, promise="set-ID bits and security.capability are cleared by chown, and where KILL_SUIDGID is set"
    ),
    _F.SETXATTR_EXT: _ON,
    _F.INIT_EXT: _ON,
    _F.INIT_RESERVED: _OFF,
    # Before 7.38 no field of the header told where the arguments end and the security context begins.
    _F.SECURITY_CTX: Feature(True, minor=38, promise="new inodes get the security contexts of their extensions"),
    _F.HAS_INODE_DAX: _OFF,
    _F.CREATE_SUPP_GROUP: Feature(True, minor=38),
    _F.HAS_EXPIRE_ONLY: _ON,
    _F.DIRECT_IO_ALLOW_MMAP: _ON,
    # With write-back caching the kernel leaves it off without a word (inode.c: process_init_reply).
    _F.PASSTHROUGH: Feature(
        True,
        (Opcode.OPEN,),
        excludes=_F.WRITEBACK_CACHE,
        privileged=True,
        promise="attributes are those of the backing file; with HANDLE_KILLPRIV or V2 no file that has set-ID bits or "
        "security.capability is written in passthrough, for nobody would clear them",
    ),
    _F.NO_EXPORT_SUPPORT: Feature(True, excludes=_F.EXPORT_SUPPORT),
    _F.HAS_RESEND: _ON,
    # Without that mount option the kernel would fail the whole connection.
    _F.ALLOW_IDMAP: Feature(
        True,
        default_permissions=True,
        promise="uid and gid are not looked at but where an inode is made: elsewhere they are INVALID_UIDGID",
    ),
    # Without a ring the kernel would hold back every request for ever.
    _F.OVER_IO_URING: Feature(True, minor=42),
    _F.REQUEST_TIMEOUT: _ON,
}

DEFAULT = (
    _F.ASYNC_READ
    | _F.POSIX_LOCKS
    | _F.FLOCK_LOCKS
    | _F.ATOMIC_O_TRUNC
    | _F.BIG_WRITES
    | _F.HAS_IOCTL_DIR
    | _F.AUTO_INVAL_DATA
    | _F.DO_READDIRPLUS
    | _F.READDIRPLUS_AUTO
    | _F.ASYNC_DIO
    | _F.NO_OPEN_SUPPORT
    | _F.NO_OPENDIR_SUPPORT
    | _F.PARALLEL_DIROPS
    | _F.ABORT_ERROR
    | _F.MAX_PAGES
    | _F.SETXATTR_EXT
    | _F.INIT_EXT
    | _F.HAS_EXPIRE_ONLY
    | _F.DIRECT_IO_ALLOW_MMAP
    | _F.HAS_RESEND
)
"""Asked for wherever the kernel offers it and the file system implements what it needs."""

_NONE = InitFlag(0)

TransportName = Literal["device", "clones", "uring"]


@dataclass(frozen=True)
class Settings:
    """What a mount asks of the kernel. Sizes are bytes."""

    max_write: int = 1 << 20
    """Largest WRITE, and, in pages, largest READ; clamped to the sysctl fs.fuse.max_pages_limit."""
    max_readahead: int = 4 << 20
    """Read-ahead window of the mount. INIT alone cannot raise it above 128 KiB, so it is set through sysfs, as root."""
    max_background: int = 64
    """Most requests that nobody waits for (reading ahead, writing back, RELEASE, asynchronous direct I/O) in flight at
    a time; 0: the kernel's own 12."""
    congestion_threshold: int = 48
    """Requests of that kind from which on the kernel holds back reading ahead; 0: the kernel's own 9."""
    request_timeout: int = 0
    """Seconds after which the kernel aborts the connection when a request has no reply, 15 at least, for it looks
    every 15 s; 0: never, but for the sysctls fs.fuse.default_request_timeout and max_request_timeout."""
    busy_poll: int = 50_000
    """Nanoseconds for which the reader looks for the next request before it sleeps, while requests come that fast: the
    reply to a program that asks one thing after another then costs no wake-up. 0: sleep at once."""
    max_stack_depth: int = 1
    """For PASSTHROUGH: 1, or 2 to have backing files on a stacked file system (overlayfs) too; what is stacked on this
    mount in turn has one layer less then."""
    max_in_flight: int = 4096
    """Requests whose handlers wait at the same time before reading pauses; blocking locks do not count."""
    max_bytes_in_flight: int = 128 << 20
    """Memory of such requests before reading pauses: request buffers kept, and the replies that READ asks for."""
    transport: TransportName = "device"
    """How requests are read and answered: on ``/dev/fuse``, on several descriptors of it, or through io_uring (Linux
    6.14 with fuse.enable_uring=Y; ``max_write`` of 128 KiB at least; memory: see ``rawfuse.uring``). Where one of these
    is not to be had, the device is used; see ``Session.transport``."""
    readers: int = 2
    """Descriptors of the transport "clones"."""
    compiled: bool = True
    """Common requests are served by compiled code; without it, as when they are traced, by Python code alone."""
    refuse: InitFlag = _NONE
    """Features to leave out although they are wanted."""

    def __post_init__(self) -> None:
        """ValueError for what the INIT reply has no room for."""
        for name in ("max_background", "congestion_threshold", "request_timeout"):
            if not 0 <= getattr(self, name) <= _MASK16:
                raise ValueError(f"{name} must lie between 0 and {_MASK16}, not {getattr(self, name)}")
        if not 0 < self.max_write <= _MASK32 or not 0 <= self.max_readahead <= _MASK32:
            raise ValueError("max_write and max_readahead are 32 bits wide")
        if self.max_stack_depth not in (1, 2):
            raise ValueError(f"max_stack_depth is 1 or 2, not {self.max_stack_depth}")
        if self.transport not in get_args(TransportName):
            raise ValueError(f"transport is one of {', '.join(get_args(TransportName))}, not {self.transport}")
        if self.readers < 2:
            raise ValueError(f"readers must be at least 2, not {self.readers}")
        if self.max_in_flight < 1 or self.max_bytes_in_flight < 1:
            raise ValueError("max_in_flight and max_bytes_in_flight must be at least 1")


@dataclass
class Agreement:
    """The outcome of INIT. ``refused`` says of each wanted feature that is off, why; ``offered`` is what the kernel
    offered, bits unknown here included, and ``kernel_minor`` the version that it speaks."""

    minor: int
    flags: InitFlag
    max_write: int
    max_pages: int
    max_readahead: int
    refused: dict[InitFlag, str] = field(default_factory=dict)
    offered: int = 0
    kernel_minor: int = KERNEL_MINOR

    def dump(self) -> bytes:
        """For the process that takes the mount over; ``load`` makes it an Agreement again."""
        fields = dataclasses.asdict(self)
        fields["flags"] = int(self.flags)
        fields["refused"] = {str(int(flag)): why for flag, why in self.refused.items()}
        return msgspec.json.encode(fields)

    @classmethod
    def load(cls, data: bytes) -> Agreement:
        fields = msgspec.json.decode(data)
        fields["flags"] = InitFlag(fields["flags"])
        fields["refused"] = {InitFlag(int(flag)): why for flag, why in fields["refused"].items()}
        return cls(**fields)

    @property
    def buffer_size(self) -> int:
        """What a read of ``/dev/fuse`` must offer (dev.c: fuse_dev_do_read)."""
        return PAGE + self.max_write


def page_limit() -> int:
    """Most pages in one request on this host."""
    try:
        return int(_PAGES_LIMIT.read_text())
    except (OSError, ValueError):
        return _DEFAULT_PAGES_LIMIT


def negotiate(
    init: Init,
    filesystem: FileSystem,
    settings: Settings,
    *,
    default_permissions: bool = True,
    ring_stands: bool = False,
) -> Agreement:
    """Agree on what the kernel offers; ``default_permissions`` is the mount option, ``ring_stands`` whether there is
    a ring for OVER_IO_URING. EPROTO for a kernel that speaks less than 7.31."""
    if init.major < KERNEL_MAJOR or (init.major == KERNEL_MAJOR and init.minor < OLDEST_MINOR):
        raise FuseError(
            errno.EPROTO, f"the kernel speaks FUSE {init.major}.{init.minor}; 7.{OLDEST_MINOR} (Linux 5.2) is needed"
        )
    wanted = DEFAULT | filesystem.features
    if ring_stands:
        wanted |= InitFlag.OVER_IO_URING
    wanted &= ~(filesystem.unwanted | settings.refuse)
    if settings.request_timeout:
        wanted |= InitFlag.REQUEST_TIMEOUT
    wanted &= _union(FEATURES)
    refused: dict[InitFlag, str] = {}
    for flag, feature in FEATURES.items():
        if flag & wanted and (why := _objection(flag, feature, init, filesystem)):
            refused[flag] = why
    if wanted & InitFlag.OVER_IO_URING and not ring_stands:
        refused[InitFlag.OVER_IO_URING] = "there is no ring; Settings.transport makes one"
    agreed = _compatible(wanted & ~_union(refused), refused, default_permissions)
    pages = 32
    if agreed & InitFlag.MAX_PAGES:
        pages = max(1, min(-(-settings.max_write // PAGE), page_limit()))
    return Agreement(
        minor=min(KERNEL_MINOR, init.minor),
        flags=agreed,
        max_write=max(PAGE, min(settings.max_write, pages * PAGE)),
        max_pages=pages,
        max_readahead=settings.max_readahead,
        refused=refused,
        offered=init.flags,
        kernel_minor=init.minor,
    )


def _objection(flag: InitFlag, feature: Feature, init: Init, filesystem: FileSystem) -> str | None:
    """What speaks against a flag whatever becomes of the others."""
    if not feature.served:
        return "rawfuse does not serve it"
    if not flag & init.flags:
        return "the kernel does not offer it"
    if init.minor < feature.minor:
        return f"the kernel speaks FUSE 7.{init.minor}; 7.{feature.minor} is needed"
    missing = [opcode.name for opcode in feature.needs if not filesystem.implements(opcode)]
    if missing:
        return f"the file system does not implement {', '.join(missing)}"
    if feature.privileged and not privileged():
        return "it needs CAP_SYS_ADMIN"
    return None


def _compatible(candidates: InitFlag, refused: dict[InitFlag, str], default_permissions: bool) -> InitFlag:
    """What remains of ``candidates`` when each has what it needs of the others; the reasons go to ``refused``."""
    agreed = candidates
    for flag, feature in FEATURES.items():  # in the order of the table a flag stands behind those that it requires
        if not flag & agreed:
            continue
        requires = feature.requires | (InitFlag.INIT_EXT if flag > _MASK32 else _NONE)
        if requires & ~agreed:
            refused[flag] = f"it needs {(requires & ~agreed).name}"
            agreed &= ~flag
        elif feature.default_permissions and not default_permissions and not agreed & InitFlag.POSIX_ACL:
            refused[flag] = "it needs the mount option default_permissions"
            agreed &= ~flag
    for flag, feature in FEATURES.items():
        if flag & agreed and feature.excludes & agreed:
            refused[flag] = f"it excludes {(feature.excludes & agreed).name}"
            agreed &= ~flag
    return agreed


def _union(flags: Iterable[InitFlag]) -> InitFlag:
    return functools.reduce(InitFlag.__or__, flags, _NONE)


def encode_init(agreement: Agreement, settings: Settings) -> bytes:
    """The body of the INIT reply."""
    flags = int(agreement.flags)
    return _INIT_OUT.pack(
        KERNEL_MAJOR,
        agreement.minor,
        agreement.max_readahead,
        flags & _MASK32,
        settings.max_background,
        settings.congestion_threshold,
        agreement.max_write,
        1,
        agreement.max_pages if agreement.flags & InitFlag.MAX_PAGES else 0,
        0,
        flags >> 32,
        settings.max_stack_depth if agreement.flags & InitFlag.PASSTHROUGH else 0,
        settings.request_timeout,
    )


def encode_old_major() -> bytes:
    """The answer to a kernel of a newer major version: ours alone; it sends INIT again."""
    return _INIT_OUT.pack(KERNEL_MAJOR, KERNEL_MINOR, *(0,) * 11)
