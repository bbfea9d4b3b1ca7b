"""Replies, byte by byte, as the kernel wants them."""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawfuse import (
    FOREVER,
    SECOND,
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileLock,
    FileSystemStatus,
    FuseError,
    IoctlResult,
    Opcode,
    OpenedFile,
    OpenFlag,
    ops,
)
from rawfuse.table import TABLE
from rawfuse.wire import OUT_HEADER
from tests.unit.rawfuse_helpers import ORIGIN, UNIQUE, encode
from tests.unit.test_rawfuse_table import DECODED

OPS = {opcode: op for opcode, _, op in DECODED}
FULL = Attributes(
    ino=1,
    mode=stat.S_IFREG | 0o6755,
    nlink=2,
    uid=3,
    gid=4,
    size=5,
    blocks=6,
    atime=-1,
    mtime=-1_500_000_000,
    ctime=1_700_000_000_123_456_789,
    btime=7 * SECOND + 8,
    rdev=os.makedev(0xABC, 0x12345),
    blksize=4096,
    flags=1,
)
ATTR = struct.pack(
    "=QQQqqqIIIIIIIIII",
    *(1, 5, 6, -1, -2, 1_700_000_000, 999_999_999, 500_000_000, 123_456_789),
    *(0o106755, 2, 3, 4, FULL.rdev, 4096, 1),
)
ENTRY = struct.pack("=QQQQII", 9, 2, 1, 3, 500_000_000, 0) + ATTR
FULL_ENTRY = Entry(9, FULL, entry_ttl=1_500_000_000, attr_ttl=3 * SECOND, generation=2)


def body_of(opcode: Opcode, result: object, op: ops.Op | None = None) -> bytes:
    """The reply's body; its header must be right."""
    reply = encode(opcode, op or OPS[opcode], result)
    assert OUT_HEADER.unpack_from(reply) == (len(reply), 0, UNIQUE)
    return reply[OUT_HEADER.size :]


def test_attr_is_88_bytes() -> None:
    assert len(ATTR) == 88
    assert len(ENTRY) == 128


@pytest.mark.parametrize(
    "opcode", [Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK], ids=lambda opcode: opcode.name
)
def test_entry(opcode: Opcode) -> None:
    assert body_of(opcode, FULL_ENTRY) == ENTRY


def test_negative_entry() -> None:
    expected = struct.pack("=QQQQII88x", 0, 0, 2, 0, 5, 0)
    assert body_of(Opcode.LOOKUP, Entry(0, None, entry_ttl=2 * SECOND + 5)) == expected


def test_for_ever() -> None:
    body = body_of(Opcode.LOOKUP, Entry(9, FULL, FOREVER, FOREVER))
    assert struct.unpack_from("=QQII", body, 16) == (*(FOREVER // SECOND,) * 2, *(FOREVER % SECOND,) * 2)


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.SETATTR])
def test_attributes(opcode: Opcode) -> None:
    assert body_of(opcode, AttributesReply(FULL, 1_500_000_000)) == struct.pack("=QII", 1, 500_000_000, 0) + ATTR


def test_statx() -> None:
    body = body_of(Opcode.STATX, AttributesReply(FULL, 1_500_000_000))
    assert len(body) == 288
    assert struct.unpack_from("=QII", body) == (1, 500_000_000, 0)
    mask, blksize, attributes, nlink, uid, gid, mode = struct.unpack_from("=IIQIIIH", body, 32)
    assert (mask, blksize, attributes, nlink, uid, gid, mode) == (0xFFF, 4096, 0, 2, 3, 4, 0o106755)
    assert struct.unpack_from("=QQQQ", body, 64) == (1, 5, 6, 0)
    times = [struct.unpack_from("=qI", body, 96 + 16 * number) for number in range(4)]
    assert times == [(-1, 999_999_999), (7, 8), (1_700_000_000, 123_456_789), (-2, 500_000_000)]
    assert struct.unpack_from("=IIII", body, 160) == (0xABC, 0x12345, 0, 0)
    assert body[176:] == bytes(112)


def test_opened() -> None:
    flags = OpenFlag.KEEP_CACHE | OpenFlag.DIRECT_IO
    expected = struct.pack("=QIi", 77, 3, -5)
    for opcode in (Opcode.OPEN, Opcode.OPENDIR):
        assert body_of(opcode, OpenedFile(77, flags, backing_id=-5)) == expected
    for opcode in (Opcode.CREATE, Opcode.TMPFILE):
        assert body_of(opcode, (FULL_ENTRY, OpenedFile(77, flags, backing_id=-5))) == ENTRY + expected


def test_statfs() -> None:
    status = FileSystemStatus(1, 2, 3, 4, 5, block_size=6, name_max=7)
    assert body_of(Opcode.STATFS, status) == struct.pack("=QQQQQIII28x", 1, 2, 3, 4, 5, 6, 7, 6)


@pytest.mark.parametrize(
    ("opcode", "result", "expected"),
    [
        (Opcode.WRITE, 5, struct.pack("=II", 5, 0)),
        (Opcode.LSEEK, 1 << 40, struct.pack("=Q", 1 << 40)),
        (Opcode.COPY_FILE_RANGE, 5, struct.pack("=II", 5, 0)),
        (Opcode.COPY_FILE_RANGE_64, 1 << 40, struct.pack("=Q", 1 << 40)),
        (Opcode.POLL, 5, struct.pack("=II", 5, 0)),
        (Opcode.BMAP, 1 << 40, struct.pack("=Q", 1 << 40)),
        (Opcode.GETLK, FileLock(1, 2**63 - 1, 1, 9), struct.pack("=QQII", 1, 2**63 - 1, 1, 9)),
        (Opcode.READLINK, b"a/target", b"a/target"),
        (Opcode.IOCTL, IoctlResult(-7, b"data"), struct.pack("=iIII", -7, 0, 0, 0) + b"data"),
        (Opcode.READ, b"data", b"data"),
        (Opcode.READ, memoryview(b"data"), b"data"),
        (Opcode.READ, bytearray(b"data"), b"data"),
        (Opcode.READ, [b"da", bytearray(b"t"), memoryview(b"a")], b"data"),
        (Opcode.READ, [], b""),
        (Opcode.READ, b"", b""),
        (Opcode.GETXATTR, b"value", b"value"),
        (Opcode.LISTXATTR, [b"user.a", b"user.b"], b"user.a\0user.b\0"),
        (Opcode.LISTXATTR, [], b""),
    ],
)
def test_others(opcode: Opcode, result: object, expected: bytes) -> None:
    assert body_of(opcode, result) == expected


EMPTY = [
    Opcode.UNLINK,
    Opcode.RMDIR,
    Opcode.RENAME,
    Opcode.RENAME2,
    Opcode.RELEASE,
    Opcode.FSYNC,
    Opcode.SETXATTR,
    Opcode.REMOVEXATTR,
    Opcode.FLUSH,
    Opcode.RELEASEDIR,
    Opcode.FSYNCDIR,
    Opcode.SETLK,
    Opcode.SETLKW,
    Opcode.ACCESS,
    Opcode.DESTROY,
    Opcode.FALLOCATE,
    Opcode.SETUPMAPPING,
    Opcode.REMOVEMAPPING,
    Opcode.SYNCFS,
]


@pytest.mark.parametrize("opcode", EMPTY)
def test_header_alone(opcode: Opcode) -> None:
    assert body_of(opcode, None) == b""


def test_read_buffers_are_not_joined() -> None:
    function = TABLE[Opcode.READ].encode
    assert function is not None
    pieces = [memoryview(b"one"), memoryview(b"two")]
    message = function(OPS[Opcode.READ], list(pieces))
    assert isinstance(message, list)
    assert isinstance(message[1], memoryview) and message[1].obj is pieces[0].obj
    assert isinstance(message[2], memoryview) and message[2].obj is pieces[1].obj


def test_sizes_of_xattrs() -> None:
    asked = ops.GetXattr(*ORIGIN, 0, b"user.a")
    assert body_of(Opcode.GETXATTR, b"value", asked) == struct.pack("=II", 5, 0)
    assert body_of(Opcode.LISTXATTR, [b"user.a"], ops.ListXattr(*ORIGIN, 0)) == struct.pack("=II", 7, 0)
    for opcode, result, op in (
        (Opcode.GETXATTR, b"value", ops.GetXattr(*ORIGIN, 4, b"user.a")),
        (Opcode.LISTXATTR, [b"user.a"], ops.ListXattr(*ORIGIN, 6)),
    ):
        with pytest.raises(FuseError) as caught:
            encode(opcode, op, result)
        assert caught.value.errno == errno.ERANGE


def test_too_long() -> None:
    for opcode, result in (
        (Opcode.READ, bytes(101)),
        (Opcode.READ, [bytes(100), b"x"]),
        (Opcode.IOCTL, IoctlResult(0, bytes(11))),
    ):
        with pytest.raises(ValueError, match="asked for"):
            encode(opcode, OPS[opcode], result)


NAMES = st.binary(min_size=1, max_size=255)


def dirents(data: bytes | bytearray) -> list[tuple[bytes, int, int, int]]:
    """``(name, ino, kind, cookie)`` as readdir.c: parse_dirfile takes them."""
    found, at = [], 0
    while at < len(data):
        ino, cookie, length, kind = struct.unpack_from("=QQII", data, at)
        found.append((bytes(data[at + 24 : at + 24 + length]), ino, kind << 12, cookie))
        at += (24 + length + 7) & ~7
    assert at == len(data)
    return found


class TestDirectory:
    def test_golden(self) -> None:
        records = DirectoryBuffer(4096)
        assert records.add(b"name", 5, stat.S_IFDIR | 0o755, 9)
        assert bytes(records.data) == struct.pack("=QQII", 5, 9, 4, 4) + b"name" + bytes(4)

    @given(st.lists(NAMES, max_size=50), st.integers(0, 4096))
    def test_as_many_as_fit(self, names: list[bytes], size: int) -> None:
        records = DirectoryBuffer(size)
        added = []
        for number, name in enumerate(names, 1):
            before = bytes(records.data)
            if not records.add(name, number, stat.S_IFREG, number + 100):
                assert bytes(records.data) == before
                assert len(before) + ((24 + len(name) + 7) & ~7) > size
                break
            added.append((name, number, stat.S_IFREG, number + 100))
        assert len(records.data) <= size
        assert dirents(records.data) == added

    def test_plus_golden(self) -> None:
        records = DirectoryPlusBuffer(4096)
        assert records.add(b"file", FULL_ENTRY, 10)
        assert records.add(b"..", None, 11, ino=3, kind=stat.S_IFDIR)
        first = ENTRY + struct.pack("=QQII", 1, 10, 4, 8) + b"file" + bytes(4)
        second = bytes(128) + struct.pack("=QQII", 3, 11, 2, 4) + b".." + bytes(6)
        assert bytes(records.data) == first + second

    def test_plus_of_what_is_gone(self) -> None:
        records = DirectoryPlusBuffer(4096)
        assert records.add(b"gone", Entry(0, None), 10, ino=3, kind=stat.S_IFREG)
        assert bytes(records.data) == bytes(128) + struct.pack("=QQII", 3, 10, 4, 8) + b"gone" + bytes(4)

    @given(NAMES)
    def test_plus_that_does_not_fit(self, name: bytes) -> None:
        size = (152 + len(name) + 7) & ~7
        assert not DirectoryPlusBuffer(size - 1).add(name, FULL_ENTRY, 1)
        records = DirectoryPlusBuffer(size)
        assert records.add(name, FULL_ENTRY, 1)
        assert len(records.data) == size
        assert not records.add(name, FULL_ENTRY, 2)

    def test_reply(self) -> None:
        records = DirectoryBuffer(4096)
        records.add(b"name", 5, stat.S_IFDIR, 9)
        assert body_of(Opcode.READDIR, records) == records.data
        assert body_of(Opcode.READDIRPLUS, DirectoryPlusBuffer(100)) == b""


@given(st.integers(-(1 << 62), (1 << 62) - 1))
def test_any_time(time: int) -> None:
    """Nanoseconds are never negative, whatever the year."""
    body = body_of(Opcode.GETATTR, AttributesReply(Attributes(ino=1, mode=stat.S_IFREG, mtime=time)))
    (seconds,), (nanoseconds,) = struct.unpack_from("=q", body, 48), struct.unpack_from("=I", body, 68)
    assert seconds * SECOND + nanoseconds == time
    assert 0 <= nanoseconds < SECOND
