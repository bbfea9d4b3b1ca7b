"""Every opcode: its request decoded, its reply encoded, and nothing but ProtocolError for any bytes."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rawfuse import FileSystem, ops
from rawfuse.abi import Opcode
from rawfuse.errors import ProtocolError
from rawfuse.table import MEMOISED, SET_XATTR_COMPAT, TABLE
from rawfuse.wire import Extensions
from tests.unit.rawfuse_helpers import ORIGIN, decode, loaded, request

SECOND = 1_000_000_000
GROUP_50 = struct.pack("=IIII", 16, 32, 1, 50)
MAX = 2**64 - 1


def lock_body() -> bytes:
    return struct.pack("=QQQQIIII", 3, 9, 10, 2**63 - 1, 1, 77, 1, 0)


DECODED: list[tuple[Opcode, bytes, ops.Op]] = [
    (Opcode.LOOKUP, b"name\0", ops.LookUpInode(*ORIGIN, b"name")),
    (Opcode.FORGET, struct.pack("=Q", 5), ops.ForgetInode(*ORIGIN, 5)),
    (Opcode.GETATTR, struct.pack("=IIQ", 1, 0, 3), ops.GetInodeAttributes(*ORIGIN, 1, 3)),
    (
        Opcode.SETATTR,
        struct.pack("=IIQQQqqqIIIIIIII", 0x7FF, 0, 3, 100, 9, -1, 2, 3, 500, 600, 700, 0o644, 0, 11, 12, 0),
        ops.SetInodeAttributes(
            *ORIGIN, 0x7FF, 3, 100, 9, -SECOND + 500, 2 * SECOND + 600, 3 * SECOND + 700, 0o644, 11, 12
        ),
    ),
    (Opcode.READLINK, b"", ops.ReadSymlink(*ORIGIN)),
    (Opcode.SYMLINK, b"new\0../target\0", ops.CreateSymlink(*ORIGIN, b"new", b"../target")),
    (
        Opcode.MKNOD,
        struct.pack("=IIII", 0o20644, 0x103, 0o22, 0) + b"n\0",
        ops.MkNode(*ORIGIN, 0o20644, 0x103, 0o22, b"n"),
    ),
    (Opcode.MKDIR, struct.pack("=II", 0o755, 0o22) + b"n\0", ops.MkDir(*ORIGIN, 0o755, 0o22, b"n")),
    (Opcode.UNLINK, b"\xff\xfe\0", ops.Unlink(*ORIGIN, b"\xff\xfe")),
    (Opcode.RMDIR, b"d\0", ops.RmDir(*ORIGIN, b"d")),
    (Opcode.RENAME, struct.pack("=Q", 8) + b"old\0new\0", ops.Rename(*ORIGIN, 8, 0, b"old", b"new")),
    (Opcode.RENAME2, struct.pack("=QII", 8, 2, 0) + b"old\0new\0", ops.Rename(*ORIGIN, 8, 2, b"old", b"new")),
    (Opcode.LINK, struct.pack("=Q", 8) + b"new\0", ops.CreateLink(*ORIGIN, 8, b"new")),
    (Opcode.OPEN, struct.pack("=II", 0x8201, 1), ops.OpenFile(*ORIGIN, 0x8201, 1)),
    (
        Opcode.READ,
        struct.pack("=QQIIQII", 3, 4096, 100, 2, 9, 0x8000, 0),
        ops.ReadFile(*ORIGIN, 3, 4096, 100, 2, 9, 0x8000),
    ),
    (
        Opcode.WRITE,
        struct.pack("=QQIIQII", 3, 4096, 4, 4, 9, 1, 0) + b"data",
        ops.WriteFile(*ORIGIN, 3, 4096, 4, 4, 9, 1, memoryview(b"data")),
    ),
    (Opcode.STATFS, b"", ops.StatFs(*ORIGIN)),
    (Opcode.RELEASE, struct.pack("=QIIQ", 3, 1, 2, 9), ops.ReleaseFileHandle(*ORIGIN, 3, 1, 2, 9)),
    (Opcode.FSYNC, struct.pack("=QII", 3, 1, 0), ops.SyncFile(*ORIGIN, 3, 1)),
    (
        Opcode.SETXATTR,
        struct.pack("=IIII", 5, 1, 1, 0) + b"user.a\0va\0ue",
        ops.SetXattr(*ORIGIN, 1, 1, b"user.a", b"va\0ue"),
    ),
    (Opcode.GETXATTR, struct.pack("=II", 64, 0) + b"user.a\0", ops.GetXattr(*ORIGIN, 64, b"user.a")),
    (Opcode.LISTXATTR, struct.pack("=II", 64, 0), ops.ListXattr(*ORIGIN, 64)),
    (Opcode.REMOVEXATTR, b"user.a\0", ops.RemoveXattr(*ORIGIN, b"user.a")),
    (Opcode.FLUSH, struct.pack("=QIIQ", 3, 0, 0, 9), ops.FlushFile(*ORIGIN, 3, 9)),
    (Opcode.INIT, struct.pack("=IIII", 7, 31, 131072, 5), ops.Init(*ORIGIN, 7, 31, 131072, 5)),
    (Opcode.OPENDIR, struct.pack("=II", 0x10000, 0), ops.OpenDir(*ORIGIN, 0x10000, 0)),
    (Opcode.READDIR, struct.pack("=QQIIQII", 3, 5, 32768, 0, 0, 0, 0), ops.ReadDir(*ORIGIN, 3, 5, 32768, 0, 0, 0)),
    (Opcode.RELEASEDIR, struct.pack("=QIIQ", 3, 0, 0, 0), ops.ReleaseDirHandle(*ORIGIN, 3, 0, 0, 0)),
    (Opcode.FSYNCDIR, struct.pack("=QII", 3, 1, 0), ops.SyncDir(*ORIGIN, 3, 1)),
    (Opcode.GETLK, lock_body(), ops.GetLock(*ORIGIN, 3, 9, 10, 2**63 - 1, 1, 77, 1)),
    (Opcode.SETLK, lock_body(), ops.SetLock(*ORIGIN, 3, 9, 10, 2**63 - 1, 1, 77, 1, False)),
    (Opcode.SETLKW, lock_body(), ops.SetLock(*ORIGIN, 3, 9, 10, 2**63 - 1, 1, 77, 1, True)),
    (Opcode.ACCESS, struct.pack("=II", 4, 0), ops.Access(*ORIGIN, 4)),
    (
        Opcode.CREATE,
        struct.pack("=IIII", 0x8042, 0o100666, 0o77, 1) + b"n\0",
        ops.CreateFile(*ORIGIN, 0x8042, 0o100666, 0o77, 1, b"n"),
    ),
    (Opcode.INTERRUPT, struct.pack("=Q", 4), ops.Interrupt(*ORIGIN, 4)),
    (Opcode.BMAP, struct.pack("=QII", 5, 512, 0), ops.MapBlock(*ORIGIN, 5, 512)),
    (Opcode.DESTROY, b"", ops.Destroy(*ORIGIN)),
    (
        Opcode.IOCTL,
        struct.pack("=QIIQII", 3, 2, 0x5401, 99, 3, 10) + b"arg",
        ops.Ioctl(*ORIGIN, 3, 2, 0x5401, 99, 10, b"arg"),
    ),
    (Opcode.POLL, struct.pack("=QQII", 3, 8, 1, 5), ops.Poll(*ORIGIN, 3, 8, 1, 5)),
    (
        Opcode.NOTIFY_REPLY,
        struct.pack("=QQIIQQ", 0, 4096, 4, 0, 0, 0) + b"data",
        ops.NotifyReply(*ORIGIN, 4096, b"data"),
    ),
    (
        Opcode.BATCH_FORGET,
        struct.pack("=IIQQQQ", 2, 0, 5, 1, MAX, 3),
        ops.BatchForget(*ORIGIN, [(5, 1), (MAX, 3)]),
    ),
    (Opcode.FALLOCATE, struct.pack("=QQQII", 3, 10, 20, 3, 0), ops.Fallocate(*ORIGIN, 3, 10, 20, 3)),
    (
        Opcode.READDIRPLUS,
        struct.pack("=QQIIQII", 3, 5, 32768, 0, 0, 0, 0),
        ops.ReadDirPlus(*ORIGIN, 3, 5, 32768, 0, 0, 0),
    ),
    (Opcode.LSEEK, struct.pack("=QQII", 3, 10, 4, 0), ops.Seek(*ORIGIN, 3, 10, 4)),
    (
        Opcode.COPY_FILE_RANGE,
        struct.pack("=7Q", 3, 10, 8, 4, 20, 100, 0),
        ops.CopyFileRange(*ORIGIN, 3, 10, 8, 4, 20, 100, 0),
    ),
    (
        Opcode.COPY_FILE_RANGE_64,
        struct.pack("=7Q", 3, 10, 8, 4, 20, 1 << 40, 0),
        ops.CopyFileRange(*ORIGIN, 3, 10, 8, 4, 20, 1 << 40, 0),
    ),
    (Opcode.SETUPMAPPING, struct.pack("=5Q", 3, 10, 20, 1, 30), ops.SetupMapping(*ORIGIN, 3, 10, 20, 1, 30)),
    (Opcode.REMOVEMAPPING, struct.pack("=IQQ", 1, 30, 20), ops.RemoveMapping(*ORIGIN, [(30, 20)])),
    (Opcode.SYNCFS, struct.pack("=Q", 0), ops.SyncFs(*ORIGIN)),
    (
        Opcode.TMPFILE,
        struct.pack("=IIII", 0x410002, 0o100600, 0o77, 0) + b"/\0",
        ops.CreateTmpfile(*ORIGIN, 0x410002, 0o100600, 0o77, 0, b"/"),
    ),
    (Opcode.STATX, struct.pack("=IIQII", 1, 0, 3, 0, 0xFFF), ops.StatX(*ORIGIN, 1, 3, 0, 0xFFF)),
]

EXTENDED = (Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.CREATE, Opcode.TMPFILE)
WITH_REST = (Opcode.INIT,)
"""INIT grows with the protocol: what is longer than known is no error."""


def test_every_opcode_is_served() -> None:
    assert set(TABLE) == set(Opcode) - {Opcode.CUSE_INIT}
    assert {opcode for opcode, _, _ in DECODED} == set(TABLE)


@pytest.mark.parametrize(("opcode", "body", "expected"), DECODED, ids=lambda value: getattr(value, "name", None))
class TestDecode:
    def test_fields(self, opcode: Opcode, body: bytes, expected: ops.Op) -> None:
        found = decode(opcode, body)
        assert found == expected
        assert type(found) is type(expected) is TABLE[opcode].op_type

    def test_shorter_or_longer_is_malformed(self, opcode: Opcode, body: bytes, expected: ops.Op) -> None:
        for length in range(len(body)):
            with pytest.raises(ProtocolError):
                decode(opcode, body[:length])
        if opcode not in WITH_REST:
            with pytest.raises(ProtocolError):
                decode(opcode, body + b"\1")

    def test_extensions_are_no_arguments(self, opcode: Opcode, body: bytes, expected: ops.Op) -> None:
        found = decode(opcode, body, extensions=GROUP_50)
        if opcode in EXTENDED:
            assert found.extensions == Extensions((), (50,))  # type: ignore[attr-defined]
            found.extensions = Extensions()  # type: ignore[attr-defined]
        assert found == expected


def test_set_xattr_without_its_extension() -> None:
    body = struct.pack("=II", 5, 2) + b"user.a\0value"
    assert decode(Opcode.SETXATTR, body, compat=True) == ops.SetXattr(*ORIGIN, 2, 0, b"user.a", b"value")
    assert SET_XATTR_COMPAT.method == "set_xattr"


def test_set_xattr_of_nothing() -> None:
    for compat, head in ((False, struct.pack("=IIII", 0, 0, 0, 0)), (True, struct.pack("=II", 0, 0))):
        op = decode(Opcode.SETXATTR, head + b"user.a\0", compat=compat)
        assert op == ops.SetXattr(*ORIGIN, 0, 0, b"user.a", b"")


def test_init_takes_the_second_flags_when_they_are_there() -> None:
    head = struct.pack("=IIII", 7, 45, 4096, 1 << 30 | 1)
    for tail, flags in ((b"", 1 << 30 | 1), (struct.pack("=I11I", 5, *(0,) * 11), 5 << 32 | 1 << 30 | 1)):
        assert decode(Opcode.INIT, head + tail) == ops.Init(*ORIGIN, 7, 45, 4096, flags)
    without = struct.pack("=IIII", 7, 45, 4096, 1) + struct.pack("=I11I", 5, *(0,) * 11)
    assert decode(Opcode.INIT, without) == ops.Init(*ORIGIN, 7, 45, 4096, 1)


def test_symlink_to_nothing_decodes() -> None:
    assert decode(Opcode.SYMLINK, b"new\0\0") == ops.CreateSymlink(*ORIGIN, b"new", b"")


@settings(max_examples=1000)
@given(st.sampled_from(sorted(TABLE)), st.binary(max_size=160), st.integers(0, 3), st.booleans())
def test_any_bytes(opcode: int, body: bytes, units: int, compat: bool) -> None:
    """Decoding raises nothing but ProtocolError."""
    cut = min(units, len(body) // 8) * 8
    data = request(opcode, body[: len(body) - cut], extensions=body[len(body) - cut :])
    row = SET_XATTR_COMPAT if compat and opcode == Opcode.SETXATTR else TABLE[opcode]
    try:
        op = row.decode(loaded(data))
    except ProtocolError:
        return
    assert isinstance(op, row.op_type)


@settings(max_examples=1000)
@given(st.sampled_from(DECODED), st.data())
def test_any_damage(case: tuple[Opcode, bytes, ops.Op], data: st.DataObject) -> None:
    """So does decoding of a good request with any bytes changed."""
    opcode, body, _ = case
    damaged = bytearray(request(opcode, body, extensions=GROUP_50))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        TABLE[opcode].decode(loaded(bytes(damaged)))
    except ProtocolError:
        pass


NO_REPLY = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY}


def test_which_are_never_answered() -> None:
    assert {opcode for opcode, row in TABLE.items() if row.encode is None} == NO_REPLY


def test_methods_are_those_of_the_interface() -> None:
    methods = {row.method for row in TABLE.values() if row.method}
    assert all(hasattr(FileSystem, name) for name in methods)
    served = {name for name in vars(FileSystem) if not name.startswith("_")}
    assert served - methods == {"features", "unwanted", "declined", "keeper", "start", "end_of_burst", "implements"}


def test_memoised_defaults() -> None:
    """The opcodes whose ENOSYS the kernel remembers to its users' good; for the others it would reach the user."""
    assert {
        Opcode.OPEN,
        Opcode.OPENDIR,
        Opcode.CREATE,
        Opcode.TMPFILE,
        Opcode.STATX,
        Opcode.ACCESS,
        Opcode.FSYNC,
        Opcode.FSYNCDIR,
        Opcode.FLUSH,
        Opcode.BMAP,
        Opcode.LSEEK,
        Opcode.POLL,
        Opcode.FALLOCATE,
        Opcode.COPY_FILE_RANGE,
        Opcode.COPY_FILE_RANGE_64,
        Opcode.SETXATTR,
        Opcode.GETXATTR,
        Opcode.LISTXATTR,
        Opcode.REMOVEXATTR,
        Opcode.SYNCFS,
    } == MEMOISED
    assert TABLE[Opcode.IOCTL].default == errno.ENOTTY


def test_what_an_interrupt_cancels() -> None:
    """Nothing that changes the file system, but for waiting for a lock, which changes nothing until it ends."""
    cancelled = {opcode for opcode, row in TABLE.items() if row.interruptible}
    assert cancelled == {
        Opcode.LOOKUP,
        Opcode.GETATTR,
        Opcode.READLINK,
        Opcode.READ,
        Opcode.STATFS,
        Opcode.GETXATTR,
        Opcode.LISTXATTR,
        Opcode.READDIR,
        Opcode.READDIRPLUS,
        Opcode.GETLK,
        Opcode.SETLKW,
        Opcode.ACCESS,
        Opcode.BMAP,
        Opcode.POLL,
        Opcode.LSEEK,
        Opcode.STATX,
    }
