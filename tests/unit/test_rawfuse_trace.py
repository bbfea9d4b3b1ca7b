"""The wire log."""

from __future__ import annotations

import errno
import io
import re
import stat
import struct
from pathlib import Path

from rawfuse import Attributes, DirectoryBuffer, Entry, FileSystem, FuseError, Opcode, ops
from rawfuse.trace import Trace
from tests.unit.rawfuse_helpers import ORIGIN
from tests.unit.rawfuse_kernel import on_both_loops, served


def traced(op: ops.Op, opcode: Opcode, *, replied: bool = True) -> str:
    stream = io.StringIO()
    Trace(stream).request(opcode, op, replied=replied)
    return stream.getvalue()


def answered(error: int, result: object) -> str:
    stream = io.StringIO()
    trace = Trace(stream)
    trace.request(Opcode.STATFS, ops.StatFs(*ORIGIN), replied=True)
    stream.truncate(0)
    stream.seek(0)
    trace.reply(ORIGIN[0], error, result)
    return stream.getvalue()


def test_request() -> None:
    assert (
        traced(ops.LookUpInode(*ORIGIN, b"na\nme"), Opcode.LOOKUP)
        == "> 42 LOOKUP nodeid=7 1000/100/4321 name=b'na\\nme'\n"
    )
    assert traced(ops.StatFs(*ORIGIN), Opcode.STATFS) == "> 42 STATFS nodeid=7 1000/100/4321\n"


def test_long_data_are_told_by_their_length() -> None:
    op = ops.WriteFile(*ORIGIN, 3, 0, 5000, 0, 0, 1, memoryview(bytes(5000)))
    assert traced(op, Opcode.WRITE).endswith("flags=1 data=<5000 bytes>\n")
    assert answered(0, bytes(100)).startswith("< 42 <100 bytes> ")
    assert answered(0, [bytes(100), memoryview(b"12345")]).startswith("< 42 <105 bytes in 2 buffers> ")
    records = DirectoryBuffer(4096)
    records.add(b"name", 1, stat.S_IFREG, 1)
    assert answered(0, records).startswith("< 42 <32 bytes> ")


def test_reply() -> None:
    assert re.fullmatch(r"< 42 ENOENT \d+us\n", answered(errno.ENOENT, None))
    assert re.fullmatch(r"< 42 b'short' \d+us\n", answered(0, b"short"))
    assert re.fullmatch(r"< 42 499 \d+us\n", answered(499, None))


def test_what_has_no_reply_is_not_kept() -> None:
    """A log of a year's FORGETs must not fill the memory."""
    stream = io.StringIO()
    trace = Trace(stream)
    for number in range(100):
        trace.request(Opcode.FORGET, ops.ForgetInode(number, 1, 0, 0, 0, 1), replied=False)
    assert not trace._began


def test_a_request_is_seen_before_its_reply(tmp_path: Path) -> None:
    """What hangs is what one looks for."""
    with open(tmp_path / "log", "w") as stream:
        Trace(stream).request(Opcode.STATFS, ops.StatFs(*ORIGIN), replied=True)
        assert (tmp_path / "log").read_text() == "> 42 STATFS nodeid=7 1000/100/4321\n"


@on_both_loops
async def test_each_request_and_each_reply_once() -> None:
    class Small(FileSystem):
        async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
            if op.name == b"absent":
                raise FuseError(errno.ENOENT)
            return Entry(5, Attributes(ino=5, mode=stat.S_IFREG))

    stream = io.StringIO()
    async with served(Small(), trace=Trace(stream)) as kernel:
        await kernel.call(Opcode.LOOKUP, b"name\0")
        await kernel.call(Opcode.LOOKUP, b"absent\0")
        kernel.send(Opcode.FORGET, struct.pack("=Q", 1))
        await kernel.call(Opcode.RELEASE, bytes(24))
        await kernel.call(Opcode.MKDIR, bytes(8) + b"d\0")
    lines = stream.getvalue().splitlines()
    kinds = [tuple(line.split()[: 3 if line.startswith(">") else 2]) for line in lines]
    assert kinds == [
        (">", "2", "LOOKUP"),
        ("<", "2"),
        (">", "4", "LOOKUP"),
        ("<", "4"),
        (">", "6", "FORGET"),
        (">", "8", "RELEASE"),
        ("<", "8"),
        (">", "10", "MKDIR"),
        ("<", "10"),
    ]
    assert "Entry(nodeid=5" in lines[1]
    assert "ENOENT" in lines[3]
    assert "EROFS" in lines[8]
