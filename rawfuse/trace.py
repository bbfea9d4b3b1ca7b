"""The wire log: one line per request and one per reply.

``> unique OPCODE nodeid=N uid/gid/pid arguments`` when a request was decoded, ``< unique result microseconds`` when it
was answered; long data are told by their length.
"""

from __future__ import annotations

import errno
import time
from typing import Any, TextIO

from rawfuse.abi import Opcode
from rawfuse.ops import Op

_LONGEST = 64
_HEADER = ("unique", "nodeid", "uid", "gid", "pid")


class Trace:
    """Writes the log to a text stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began: dict[int, float] = {}

    def request(self, opcode: int, op: Op, *, replied: bool) -> None:
        if replied:
            self._began[op.unique] = time.perf_counter()
        arguments = " ".join(
            f"{name}={_shown(getattr(op, name))}" for name in op.__struct_fields__ if name not in _HEADER
        )
        name = Opcode(opcode).name
        line = f"> {op.unique} {name} nodeid={op.nodeid} {op.uid}/{op.gid}/{op.pid} {arguments}"
        self._stream.write(line.rstrip() + "\n")
        self._stream.flush()

    def reply(self, unique: int, error: int, result: Any) -> None:
        took = (time.perf_counter() - self._began.pop(unique, time.perf_counter())) * 1e6
        shown = errno.errorcode.get(error, str(error)) if error else _shown(result)
        self._stream.write(f"< {unique} {shown} {took:.0f}us\n")
        self._stream.flush()


def _shown(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return repr(bytes(value)) if len(value) <= _LONGEST else f"<{len(value)} bytes>"
    if hasattr(value, "data") and isinstance(value.data, bytearray):
        return f"<{len(value.data)} bytes>"
    if isinstance(value, list) and value and isinstance(value[0], (bytes, bytearray, memoryview)):
        return f"<{sum(map(len, value))} bytes in {len(value)} buffers>"
    return repr(value)
