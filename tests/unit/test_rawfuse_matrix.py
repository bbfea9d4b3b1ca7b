"""Every opcode from request to reply: its handler is called with what was decoded, its result and its failure reach the
kernel, and what is left out is answered by the default. An opcode without a row here fails."""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import msgspec
import pytest

from rawfuse import (
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileLock,
    FileSystem,
    FileSystemStatus,
    FuseError,
    IoctlResult,
    Opcode,
    OpenedFile,
    ops,
)
from rawfuse.table import TABLE
from tests.unit.rawfuse_helpers import encode
from tests.unit.rawfuse_kernel import on_both_loops, served
from tests.unit.test_rawfuse_table import DECODED

REQUESTS = {opcode: (body, op) for opcode, body, op in DECODED}
FILE = Attributes(ino=9, mode=stat.S_IFREG | 0o644, nlink=2, size=5)
ENTRY = Entry(9, FILE)
OPENED = OpenedFile(77)
LISTING, LISTING_PLUS = DirectoryBuffer(4096), DirectoryPlusBuffer(4096)
LISTING.add(b"name", 9, stat.S_IFREG, 1)
LISTING_PLUS.add(b"name", ENTRY, 1)


class Case(NamedTuple):
    """``result`` of the handler, ``body`` of the reply where it is worth spelling out, ``default``: the errno without a
    handler, None where that has an answer of its own."""

    result: Any
    body: bytes | None
    default: int | None


class Silent(NamedTuple):
    """No reply is ever sent. ``handled``: by a method of the file system."""

    handled: bool


def done(default: int) -> Case:
    return Case(None, b"", default)


ENOSYS, EROFS = errno.ENOSYS, errno.EROFS
MATRIX: dict[Opcode, Case | Silent] = {
    Opcode.LOOKUP: Case(ENTRY, None, errno.ENOENT),
    Opcode.FORGET: Silent(True),
    Opcode.GETATTR: Case(AttributesReply(FILE), None, errno.EIO),
    Opcode.SETATTR: Case(AttributesReply(FILE), None, EROFS),
    Opcode.READLINK: Case(b"target", b"target", errno.EINVAL),
    Opcode.SYMLINK: Case(ENTRY, None, errno.EPERM),
    Opcode.MKNOD: Case(ENTRY, None, errno.EPERM),
    Opcode.MKDIR: Case(ENTRY, None, EROFS),
    Opcode.UNLINK: done(EROFS),
    Opcode.RMDIR: done(EROFS),
    Opcode.RENAME: done(EROFS),
    Opcode.LINK: Case(ENTRY, None, errno.EPERM),
    Opcode.OPEN: Case(OPENED, struct.pack("=QIi", 77, 0, 0), ENOSYS),
    Opcode.READ: Case(b"data", b"data", errno.EINVAL),
    Opcode.WRITE: Case(4, struct.pack("=II", 4, 0), EROFS),
    Opcode.STATFS: Case(FileSystemStatus(blocks=5), None, None),
    Opcode.RELEASE: done(0),
    Opcode.FSYNC: done(ENOSYS),
    Opcode.SETXATTR: done(ENOSYS),
    Opcode.GETXATTR: Case(b"value", b"value", ENOSYS),
    Opcode.LISTXATTR: Case([b"user.a"], b"user.a\0", ENOSYS),
    Opcode.REMOVEXATTR: done(ENOSYS),
    Opcode.FLUSH: done(ENOSYS),
    Opcode.OPENDIR: Case(OPENED, struct.pack("=QIi", 77, 0, 0), ENOSYS),
    Opcode.READDIR: Case(LISTING, bytes(LISTING.data), errno.ENOTDIR),
    Opcode.RELEASEDIR: done(0),
    Opcode.FSYNCDIR: done(ENOSYS),
    Opcode.GETLK: Case(FileLock(1, 2, 0, 5), struct.pack("=QQII", 1, 2, 0, 5), errno.ENOLCK),
    Opcode.SETLK: done(errno.ENOLCK),
    Opcode.SETLKW: done(errno.ENOLCK),
    Opcode.ACCESS: done(ENOSYS),
    Opcode.CREATE: Case((ENTRY, OPENED), None, ENOSYS),
    Opcode.INTERRUPT: Silent(False),
    Opcode.BMAP: Case(8, struct.pack("=Q", 8), ENOSYS),
    Opcode.DESTROY: done(0),
    Opcode.IOCTL: Case(IoctlResult(-3, b"out"), struct.pack("=iIII", -3, 0, 0, 0) + b"out", errno.ENOTTY),
    Opcode.POLL: Case(5, struct.pack("=II", 5, 0), ENOSYS),
    Opcode.NOTIFY_REPLY: Silent(False),
    Opcode.BATCH_FORGET: Silent(True),
    Opcode.FALLOCATE: done(ENOSYS),
    Opcode.READDIRPLUS: Case(LISTING_PLUS, bytes(LISTING_PLUS.data), errno.ENOTDIR),
    Opcode.RENAME2: done(EROFS),
    Opcode.LSEEK: Case(1 << 40, struct.pack("=Q", 1 << 40), ENOSYS),
    Opcode.COPY_FILE_RANGE: Case(6, struct.pack("=II", 6, 0), ENOSYS),
    Opcode.SETUPMAPPING: done(errno.EOPNOTSUPP),
    Opcode.REMOVEMAPPING: done(errno.EOPNOTSUPP),
    Opcode.SYNCFS: done(ENOSYS),
    Opcode.TMPFILE: Case((ENTRY, OPENED), None, ENOSYS),
    Opcode.STATX: Case(AttributesReply(FILE), None, ENOSYS),
    Opcode.COPY_FILE_RANGE_64: Case(1 << 40, struct.pack("=Q", 1 << 40), ENOSYS),
}
ALONE = {Opcode.INIT, Opcode.CUSE_INIT}
"""INIT is answered before a mount is served; CUSE has another device and is not served."""


class Recorder(FileSystem):
    """Serves everything; ``answer`` is returned, or raised when it is an exception."""

    answer: Any = None
    seen: list[tuple[str, ops.Op]]

    def __init__(self) -> None:
        self.seen = []

    async def record(self, name: str, op: ops.Op) -> Any:
        self.seen.append((name, op))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def _recording(name: str) -> Callable[[Recorder, Any], Coroutine[Any, Any, Any]]:
    async def method(self: Recorder, op: ops.Op) -> Any:
        return await self.record(name, op)

    return method


for _name in {row.method for row in TABLE.values()} - {""}:
    setattr(Recorder, _name, _recording(_name))


def test_every_opcode_has_a_row() -> None:
    assert set(MATRIX) | ALONE == set(Opcode)
    assert set(REQUESTS) | {Opcode.CUSE_INIT} == set(Opcode)


@pytest.fixture(params=sorted(set(Opcode) - ALONE), ids=lambda opcode: opcode.name)
def opcode(request: pytest.FixtureRequest) -> Opcode:
    return Opcode(request.param)


@on_both_loops
async def test_handler_and_reply(opcode: Opcode) -> None:
    body, expected = REQUESTS[opcode]
    case = MATRIX[opcode]
    filesystem = Recorder()
    async with served(filesystem) as kernel:
        if isinstance(case, Silent):
            kernel.send(opcode, body)
            filesystem.answer = FileSystemStatus()
            await kernel.nothing_more()
            assert filesystem.seen.pop()[0] == "stat_fs"
            seen = [TABLE[opcode].method] if case.handled else []
        else:
            filesystem.answer = case.result
            reply = await kernel.call(opcode, body)
            op = msgspec.structs.replace(expected, unique=reply.unique)
            assert reply.error == 0
            assert reply.body == encode(opcode, op, case.result)[16:]
            assert case.body is None or reply.body == case.body
            seen = [TABLE[opcode].method]
    assert [name for name, _ in filesystem.seen] == seen
    for _, op in filesystem.seen:
        assert op == msgspec.structs.replace(expected, unique=op.unique)


@pytest.mark.parametrize(("raised", "answered"), [(errno.EDQUOT, errno.EDQUOT), (errno.ENOSYS, errno.EOPNOTSUPP)])
@on_both_loops
async def test_failure(opcode: Opcode, raised: int, answered: int) -> None:
    """The errno of the handler; ENOSYS would be remembered by the kernel, and means that there is no handler."""
    filesystem = Recorder()
    filesystem.answer = FuseError(raised)
    case = MATRIX[opcode]
    async with served(filesystem) as kernel:
        if isinstance(case, Silent):
            kernel.send(opcode, REQUESTS[opcode][0])
            filesystem.answer = FileSystemStatus()
            await kernel.nothing_more()
        else:
            assert (await kernel.call(opcode, REQUESTS[opcode][0]))[1:] == (answered, b"")


@on_both_loops
async def test_left_out(opcode: Opcode) -> None:
    async with served(FileSystem()) as kernel:
        case = MATRIX[opcode]
        if isinstance(case, Silent):
            kernel.send(opcode, REQUESTS[opcode][0])
            await kernel.nothing_more()
        else:
            reply = await kernel.call(opcode, REQUESTS[opcode][0])
            if case.default is not None:
                assert (reply.error, reply.body) == (case.default, b"")
            else:
                assert reply.error == 0 and reply.body


@on_both_loops
async def test_init_comes_once() -> None:
    """INIT is answered before this; another one belongs to no connection that was agreed on."""
    async with served(Recorder()) as kernel:
        assert (await kernel.call(Opcode.INIT, REQUESTS[Opcode.INIT][0])).error == errno.EPROTO
        assert (await kernel.call(Opcode.CUSE_INIT, bytes(16))).error == errno.ENOSYS
