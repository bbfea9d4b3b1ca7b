"""Requests as the kernel would send them, for the tests of rawfuse."""

from __future__ import annotations

import struct

from rawfuse import ops
from rawfuse.abi import Opcode
from rawfuse.table import SET_XATTR_COMPAT, TABLE
from rawfuse.wire import InMessage

HEADER = struct.Struct("=IIQQIIIHH")
UNIQUE, NODEID, UID, GID, PID = 42, 7, 1000, 100, 4321
ORIGIN = (UNIQUE, NODEID, UID, GID, PID)


def request(
    opcode: int, body: bytes = b"", *, extensions: bytes = b"", unique: int = UNIQUE, nodeid: int = NODEID
) -> bytes:
    """Header, arguments and extensions (whose length must be a multiple of 8)."""
    length = HEADER.size + len(body) + len(extensions)
    return HEADER.pack(length, opcode, unique, nodeid, UID, GID, PID, len(extensions) // 8, 0) + body + extensions


def loaded(data: bytes) -> InMessage:
    message = InMessage(data)
    message.load(len(data))
    return message


def decode(opcode: int, body: bytes = b"", *, extensions: bytes = b"", compat: bool = False) -> ops.Op:
    """The operation that the table makes of a request."""
    row = SET_XATTR_COMPAT if compat else TABLE[opcode]
    return row.decode(loaded(request(opcode, body, extensions=extensions)))


def encode(opcode: Opcode, op: ops.Op, result: object) -> bytes:
    """The reply that the table makes of a result, its buffers joined."""
    function = TABLE[opcode].encode
    assert function is not None
    message = function(op, result)
    return message if isinstance(message, bytes) else b"".join(message)
