"""The target "decoder": a request of any form decodes to an operation of its opcode, or is a ``ProtocolError``.

An input: a byte of choices, then either a whole message (bit 0), or an opcode's index, a byte that says how many units
of 8 bytes at the end are extensions, and the rest of the message, whose header is right then.
"""

from __future__ import annotations

from rawfuse import ops
from rawfuse.abi import Opcode
from rawfuse.errors import ProtocolError
from rawfuse.table import SET_XATTR_COMPAT, TABLE
from rawfuse.wire import Extensions, InMessage
from tests.fuzz.inputs import Input
from tests.unit.rawfuse_helpers import request

OPCODES = sorted(TABLE)
NAMES = ("name", "new_name")
MOST_UNITS = 8


def run(data: bytes) -> None:
    """Raises nothing for any input."""
    source = Input(data)
    choices = source.byte()
    if choices & 1:
        raw = source.take(source.left)
    else:
        opcode = OPCODES[source.byte() % len(OPCODES)]
        units = source.byte() % MOST_UNITS
        body = source.take(source.left)
        behind = len(body) - 8 * min(units, len(body) // 8)
        raw = request(opcode, body[:behind], extensions=body[behind:])
    message = InMessage(raw)
    try:
        message.load(len(raw))
        row = TABLE.get(message.opcode)
        if row is None:
            return
        if choices & 2 and message.opcode == Opcode.SETXATTR:
            row = SET_XATTR_COMPAT
        op = row.decode(message)
    except ProtocolError:
        return
    assert type(op) is row.op_type
    check(op, len(raw))


def check(op: ops.Op, length: int) -> None:
    """What every handler may rely on."""
    for field in op.__struct_fields__:
        value = getattr(op, field)
        if field in NAMES:
            assert value and 0 not in value
        if isinstance(value, (bytes, memoryview, list)):
            assert len(value) <= length, "no more than was sent"
        elif isinstance(value, Extensions):
            assert len(value.groups) + len(value.security_contexts) <= length
        else:
            assert isinstance(value, int)
    if isinstance(op, ops.WriteFile):
        assert len(op.data) == op.size


def seeds() -> list[bytes]:
    """A request of each opcode, with extensions where it may have them."""
    from tests.unit.test_rawfuse_table import DECODED, GROUP_50

    found = []
    for opcode, body, _ in DECODED:
        index = OPCODES.index(opcode)
        found += [bytes([0, index, 0]) + body, bytes([0, index, 2]) + body + GROUP_50]
        found.append(b"\1" + request(opcode, body))
    return found
