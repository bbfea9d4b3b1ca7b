"""A journal of what requests have done, for the process that takes a mount over.

When a server dies, the kernel sends again each request that was read and not answered, in any order and with
``UNIQUE_RESEND`` set in its id (dev.c: fuse_resend). Some of them have had their effect already: a second mkdir would
answer EEXIST, a second unlink ENOENT. So the library writes the reply to each request that changes something into the
journal before it sends it, and answers from there what is sent again.

Between the effect and the journal remains a gap, which only the file system can close. One whose own transactions are
durable stores the request's id (``op.unique & ~UNIQUE_RESEND``) with the effect. One that works on something else, as
``examples/mirror`` does, announces what it is about to do: ``intend`` notes what the world looks like before, and when
``intended`` gives that note back, a look at the world tells whether the effect is there.

The journal is a file, usually without a name; what is written is in the page cache at once and survives the process. A
record is one slot of the file, written in one system call, so that it is there in whole or not at all.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from rawfuse import ops
from rawfuse.abi import UNIQUE_RESEND, Opcode
from rawfuse.encode import Encoder, Message
from rawfuse.wire import OUT_HEADER

SLOT = 512
"""Bytes of a record. A page is a multiple of it, so that no record is written in two parts."""

_HEAD = struct.Struct("=QQBxH")
"""The request's id, the number of the record, its kind, the length of what follows."""

_VOID, _INTENT, _OUTCOME = 0, 1, 2
MOST = SLOT - _HEAD.size
"""Bytes of a note or of a reply."""

Handler = Callable[[Any], Coroutine[Any, Any, Any]]

JOURNALED = frozenset(
    {
        Opcode.SETATTR,
        Opcode.SYMLINK,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.UNLINK,
        Opcode.RMDIR,
        Opcode.RENAME,
        Opcode.RENAME2,
        Opcode.LINK,
        Opcode.OPEN,
        Opcode.OPENDIR,
        Opcode.CREATE,
        Opcode.TMPFILE,
        Opcode.WRITE,
        Opcode.RELEASE,
        Opcode.RELEASEDIR,
        Opcode.SETXATTR,
        Opcode.REMOVEXATTR,
        Opcode.FALLOCATE,
        Opcode.COPY_FILE_RANGE,
        Opcode.COPY_FILE_RANGE_64,
    }
)
"""Operations whose successful replies are journaled. An error has changed nothing, and doing it again gives an answer
just as good. LOOKUP and READDIRPLUS are left out: twice, they count twice."""


class Recorded:
    """The reply to a request that had been executed before it was sent again."""

    __slots__ = ("_reply",)

    def __init__(self, reply: bytes) -> None:
        self._reply = reply

    def message(self, unique: int) -> bytes:
        """The reply with the id that the request has now."""
        return OUT_HEADER.pack(len(self._reply), 0, unique) + self._reply[OUT_HEADER.size :]

    def __repr__(self) -> str:
        return f"<journaled reply of {len(self._reply)} bytes>"


class Journal:
    """``fd``: the file, which begins empty or with the records of processes before. Ids are taken with and without
    ``UNIQUE_RESEND``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.keep = 4096
        """How many records that are of no use to this process stay before their slots are used again: at least as many
        as there may be requests in flight, each of which may be sent again (``Session`` sees to it)."""
        self._outcomes: dict[int, bytes] = {}
        self._notes: dict[int, bytes] = {}
        self._in_work: dict[int, int] = {}
        """The slots of requests that were begun, oldest first."""
        self._finished: deque[int] = deque()
        """All others, oldest first."""
        self._slots = self._written = 0
        self._load()

    def _load(self) -> None:
        self._slots = -(-os.fstat(self.fd).st_size // SLOT)  # the last one may not be full
        records = []
        for slot in range(self._slots):
            record = os.pread(self.fd, SLOT, slot * SLOT)
            unique, number, kind, length = _HEAD.unpack_from(record)
            records.append((number, slot, unique, kind, record[_HEAD.size : _HEAD.size + length]))
        records.sort()
        self._outcomes = {unique: data for _, _, unique, kind, data in records if kind == _OUTCOME}
        for number, slot, unique, kind, data in records:
            self._written = number
            if kind == _INTENT and unique not in self._outcomes:
                self._notes[unique] = data
                self._in_work[unique] = slot
            else:
                self._finished.append(slot)

    @classmethod
    def create(cls) -> Journal:
        """A new journal without a name."""
        return cls(os.memfd_create("rawfuse-journal", os.MFD_CLOEXEC))

    # For the file system

    def intend(self, unique: int, note: bytes) -> None:
        """The request is about to be executed; ``note``, at most ``MOST`` bytes, is what tells later whether it was.
        The first note of a request stays."""
        unique &= ~UNIQUE_RESEND
        if unique not in self._in_work:
            slot = self._free_slot()
            self._write(slot, unique, _INTENT, note)
            self._in_work[unique] = slot

    def intended(self, unique: int) -> bytes | None:
        """The note of a process before, which died before the request's reply was journaled. None for a request that
        nobody has begun to execute."""
        return self._notes.get(unique & ~UNIQUE_RESEND)

    # For the library

    def complete(self, unique: int, reply: bytes) -> None:
        """The request has been executed and is about to be answered with this message."""
        unique &= ~UNIQUE_RESEND
        slot = self._in_work.pop(unique, None)
        if slot is None:
            slot = self._free_slot()
        self._finished.append(slot)
        self._write(slot, unique, _OUTCOME, reply)

    def abandon(self, unique: int) -> None:
        """The request has failed, which changed nothing."""
        slot = self._in_work.pop(unique & ~UNIQUE_RESEND, None)
        if slot is not None:
            self._finished.append(slot)
            self._write(slot, 0, _VOID, b"")

    def outcome(self, unique: int) -> Recorded | None:
        """The reply that a process before has journaled."""
        reply = self._outcomes.get(unique & ~UNIQUE_RESEND)
        return Recorded(reply) if reply is not None else None

    def guarding(self, handler: Handler) -> Handler:
        """The handler, which is not called again for what has been executed."""

        async def handle(op: ops.Op) -> Any:
            if op.unique & UNIQUE_RESEND:
                recorded = self.outcome(op.unique)
                if recorded is not None:
                    return recorded
            try:
                return await handler(op)
            except BaseException:
                self.abandon(op.unique)
                raise

        return handle

    def recording(self, encode: Encoder) -> Encoder:
        """The encoder, whose messages are journaled."""

        def record(op: ops.Op, result: Any) -> Message:
            if isinstance(result, Recorded):
                return result.message(op.unique)
            message = encode(op, result)
            self.complete(op.unique, message if isinstance(message, bytes) else b"".join(message))
            return message

        return record

    def _free_slot(self) -> int:
        if len(self._finished) > self.keep:
            return self._finished.popleft()
        if len(self._in_work) > self.keep:
            # Of processes before, whose callers were killed: nobody will ever ask for it.
            return self._in_work.pop(next(iter(self._in_work)))
        self._slots += 1
        return self._slots - 1

    def _write(self, slot: int, unique: int, kind: int, data: bytes) -> None:
        if len(data) > MOST:
            raise ValueError(f"{len(data)} bytes for the journal; {MOST} is the most")
        self._written += 1
        os.pwrite(self.fd, _HEAD.pack(unique, self._written, kind, len(data)) + data, slot * SLOT)
