"""What FUSE can do on this machine, found out by mounting: ``python -m rawfuse probe``.

A file system of one file is mounted in a mount namespace of its own, which nobody else sees, once for each transport,
and the file is read by a program. What the kernel offered, what is agreed to and what works goes into a ``Report``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import stat
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec

from rawfuse import ops
from rawfuse._kernel import ffi, lib
from rawfuse.abi import KERNEL_MAJOR, KERNEL_MINOR, OLDEST_MINOR, ROOT_ID, InitFlag, Opcode, OpenFlag
from rawfuse.device import Device
from rawfuse.errors import FuseError
from rawfuse.filesystem import FileSystem
from rawfuse.mount import MountOptions, device_number, privileged
from rawfuse.negotiate import FEATURES, Agreement, Feature, Settings, TransportName, negotiate, page_limit
from rawfuse.notify import EPOCH_MINOR, PRUNE_MINOR
from rawfuse.replies import Attributes, AttributesReply, Entry, OpenedFile
from rawfuse.session import Session

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_FUSECTL = Path("/sys/fs/fuse/connections")
_SYSCTLS = Path("/proc/sys/fs/fuse")
_TEXT = b"probed\n"
_READ_DEADLINE = 30.0
"""Seconds that reading the file may take."""


class FeatureReport(msgspec.Struct):
    """A flag of INIT. ``state``: "agreed" to on every mount, "possible" where a file system asks for it (``promise``
    says what it takes on itself then), or "off", and ``why``."""

    name: str
    bit: int
    offered: bool
    state: Literal["agreed", "possible", "off"]
    why: str
    promise: str


class Limits(msgspec.Struct):
    """Sizes are bytes, times seconds. ``max_request``: the largest READ and WRITE. ``read_ahead`` 0: not told."""

    max_request: int
    max_pages_limit: int
    read_ahead: int
    max_background: int
    congestion_threshold: int
    default_request_timeout: int
    max_request_timeout: int


class Report(msgspec.Struct):
    """``transports``, ``passthrough`` and ``notifications`` hold why something is not to be had, or nothing when it
    works. ``unknown_bits``: offered, and not known to this version of rawfuse."""

    kernel: str
    protocol: str
    served: str
    synchronous_init: bool
    user_namespace: bool
    limits: Limits
    transports: dict[str, str]
    passthrough: str
    notifications: dict[str, str]
    features: list[FeatureReport]
    unknown_bits: list[int]


def probe() -> Report:
    """OSError with a text that says what is missing. The calling process stays in the namespace; it must have one
    thread only."""
    Device.open().close()  # before anything else: the clearest error
    in_user_namespace = _enter_namespace()
    with tempfile.TemporaryDirectory(prefix="rawfuse-probe-") as directory:
        return asyncio.run(_probe(directory, in_user_namespace))


def _enter_namespace() -> bool:
    """A private mount namespace, in a user namespace where this process may not have one otherwise; whether it is."""
    alone = not privileged()
    uid, gid = os.geteuid(), os.getegid()
    result = lib.rawfuse_unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if alone else 0))
    if result:
        raise FuseError(
            -result, f"cannot make a mount namespace ({os.strerror(-result)}): run as root, or permit user namespaces"
        )
    if alone:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    result = lib.rawfuse_mount(b"none", b"/", ffi.NULL, _MS_REC | _MS_PRIVATE, ffi.NULL)
    if result:
        raise FuseError(-result, f"cannot make the mount namespace private: {os.strerror(-result)}")
    return alone


class _OneFile(FileSystem):
    """Serves a file, in passthrough where it can. It claims to implement everything, so that what is off is off for
    another reason."""

    features = InitFlag.PASSTHROUGH

    def __init__(self, backing: int) -> None:
        self._backing = backing
        self.opened = OpenedFile()

    def implements(self, opcode: Opcode) -> bool:
        return True

    def _attributes(self, ino: int) -> Attributes:
        if ino == ROOT_ID:
            return Attributes(ino, stat.S_IFDIR | 0o755)
        return Attributes(ino, stat.S_IFREG | 0o444, size=len(_TEXT))

    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        return Entry(ROOT_ID + 1, self._attributes(ROOT_ID + 1))

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return AttributesReply(self._attributes(op.nodeid))

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        self.opened = OpenedFile(backing=self._backing)
        return self.opened

    async def read_file(self, op: ops.ReadFile) -> bytes:
        return _TEXT[op.offset : op.offset + op.size]

    async def flush_file(self, op: ops.FlushFile) -> None:
        return None

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        return None


class _Mounted(NamedTuple):
    """What one mount has shown. ``fault``: why the file could not be read."""

    agreement: Agreement
    transport: str
    fallback: str
    fault: str
    passed_through: bool
    read_ahead: int
    max_background: int
    congestion_threshold: int


async def _probe(directory: str, in_user_namespace: bool) -> Report:
    logging.getLogger("rawfuse").setLevel(logging.ERROR)  # what is missing stands in the report
    found = {name: await _mount(directory, name) for name in get_args(TransportName)}
    plain = found["device"]
    agreement = plain.agreement
    offered = agreement.offered
    limits = Limits(
        max_request=agreement.max_write,
        max_pages_limit=page_limit(),
        read_ahead=plain.read_ahead,
        max_background=plain.max_background,
        congestion_threshold=plain.congestion_threshold,
        default_request_timeout=_number(_SYSCTLS / "default_request_timeout"),
        max_request_timeout=_number(_SYSCTLS / "max_request_timeout"),
    )
    return Report(
        kernel=platform.release(),
        protocol=f"{KERNEL_MAJOR}.{agreement.kernel_minor}",
        served=f"{KERNEL_MAJOR}.{OLDEST_MINOR} to {KERNEL_MAJOR}.{KERNEL_MINOR}",
        synchronous_init=_synchronous_init(),
        user_namespace=in_user_namespace,
        limits=limits,
        transports={name: one.fault or one.fallback for name, one in found.items()},
        passthrough=_why_no_passthrough(plain, in_user_namespace),
        notifications=_notifications(agreement),
        features=[_feature(flag, feature, agreement, found["uring"]) for flag, feature in FEATURES.items()],
        unknown_bits=[bit for bit in range(64) if offered >> bit & 1 and InitFlag(1 << bit) not in FEATURES],
    )


async def _mount(directory: str, transport: TransportName) -> _Mounted:
    with tempfile.TemporaryFile() as backing:
        backing.write(_TEXT)
        backing.flush()
        filesystem = _OneFile(backing.fileno())
        settings = Settings(transport=transport)
        session = Session(filesystem, directory, MountOptions("rawfuse-probe", "probe"), settings=settings)
        await session.mount()
        serving = asyncio.ensure_future(session.serve())
        try:
            fault = await _read(os.path.join(directory, "file"))
            agreement = session.agreement
            assert agreement is not None
            number = device_number(directory) or ""
            background, congestion = _fusectl(number.partition(":")[2], settings)
            return _Mounted(
                agreement,
                session.transport,
                session.transport_fallback,
                fault,
                bool(filesystem.opened.flags & OpenFlag.PASSTHROUGH),
                _number(Path(f"/sys/class/bdi/{number}/read_ahead_kb")) << 10,
                background,
                congestion,
            )
        finally:
            try:
                await session.unmount()
            except FuseError:
                await session.unmount(lazy=True)
            await serving


async def _read(path: str) -> str:
    """Read the file in another process; what went wrong, or nothing."""
    pipe = asyncio.subprocess.PIPE
    reader = await asyncio.create_subprocess_exec(
        "cat", path, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    try:
        text, error = await asyncio.wait_for(reader.communicate(), _READ_DEADLINE)
    except TimeoutError:
        reader.kill()  # it ends with the connection
        return f"reading a file did not end in {_READ_DEADLINE:.0f} s"
    if reader.returncode:
        return f"reading a file failed: {error.decode(errors='replace').strip()}"
    return "" if text == _TEXT else "reading a file gave something else than it holds"


def _fusectl(connection: str, settings: Settings) -> tuple[int, int]:
    """What the kernel keeps to: max_background and congestion_threshold; what was asked for where it does not tell."""
    if not (_FUSECTL / connection).exists():
        lib.rawfuse_mount(b"fusectl", bytes(_FUSECTL), b"fusectl", 0, ffi.NULL)
    directory = _FUSECTL / connection
    return (
        _number(directory / "max_background", settings.max_background),
        _number(directory / "congestion_threshold", settings.congestion_threshold),
    )


def _number(path: Path, default: int = 0) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return default


def _synchronous_init() -> bool:
    device = Device.open()
    try:
        return device.synchronous_init()
    finally:
        device.close()


def _why_no_passthrough(mounted: _Mounted, in_user_namespace: bool) -> str:
    if mounted.passed_through:
        return ""
    if InitFlag.PASSTHROUGH in mounted.agreement.refused:
        return mounted.agreement.refused[InitFlag.PASSTHROUGH]
    if in_user_namespace:
        return "it needs CAP_SYS_ADMIN in the initial user namespace"
    return "the kernel registers no file here"


def _notifications(agreement: Agreement) -> dict[str, str]:
    """Those that not every kernel has."""
    flags, minor = agreement.flags, agreement.kernel_minor
    needs_flag, needs_minor = "the kernel does not offer {}", "FUSE 7.{} is needed"
    return {
        "expire_only": "" if flags & InitFlag.HAS_EXPIRE_ONLY else needs_flag.format("HAS_EXPIRE_ONLY"),
        "resend": "" if flags & InitFlag.HAS_RESEND else needs_flag.format("HAS_RESEND"),
        "increment_epoch": "" if minor >= EPOCH_MINOR else needs_minor.format(EPOCH_MINOR),
        "prune": "" if minor >= PRUNE_MINOR else needs_minor.format(PRUNE_MINOR),
    }


def _feature(flag: InitFlag, feature: Feature, agreement: Agreement, ring: _Mounted) -> FeatureReport:
    """``agreement``: that of the plain device."""
    why = ""
    state: Literal["agreed", "possible", "off"] = "agreed"
    if not flag & agreement.flags or flag & _OneFile.features:
        why = ring.fallback if flag == InitFlag.OVER_IO_URING else _objection(flag, feature, agreement)
        state = "off" if why else "possible"
    offered = bool(flag & agreement.offered)
    return FeatureReport(str(flag.name), flag.bit_length() - 1, offered, state, why, feature.promise)


def _objection(flag: InitFlag, feature: Feature, agreement: Agreement) -> str:
    """Why a file system that asks for it, and for nothing that goes against it, does not get it."""
    wishes = _OneFile(-1)
    wishes.features = flag | feature.requires
    wishes.unwanted = feature.excludes
    offer = ops.Init(0, 0, 0, 0, 0, KERNEL_MAJOR, agreement.kernel_minor, 0, agreement.offered)
    return negotiate(offer, wishes, Settings()).refused.get(flag, "")
