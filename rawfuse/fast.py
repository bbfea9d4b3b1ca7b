"""Which requests the compiled hot path (``_fast.c``) serves, and how: those with a simple form, whatever they reply."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextvars import Context
from typing import Any, Protocol

from rawfuse import encode, ops
from rawfuse._fast import (
    REPLY_ATTRIBUTES,
    REPLY_COUNT,
    REPLY_CREATED,
    REPLY_DATA,
    REPLY_EMPTY,
    REPLY_ENTRY,
    REPLY_NONE,
    REPLY_OPENED,
    REPLY_OTHER,
    TAIL_DATA,
    TAIL_NAME,
    TAIL_NOTHING,
    FastPath,
)
from rawfuse.channel import Channel, Source
from rawfuse.decode import IN_PLACE, SHAPES, Tail
from rawfuse.encode import Encoder
from rawfuse.running import Row, Running

_TAILS = {Tail.NOTHING: TAIL_NOTHING, Tail.NAME: TAIL_NAME, Tail.DATA: TAIL_DATA}
_REPLIES: dict[Encoder | None, int] = {
    None: REPLY_NONE,
    encode.empty: REPLY_EMPTY,
    encode.entry: REPLY_ENTRY,
    encode.attributes: REPLY_ATTRIBUTES,
    encode.opened: REPLY_OPENED,
    encode.created: REPLY_CREATED,
    encode.count: REPLY_COUNT,
    encode.read_data: REPLY_DATA,
    encode.link_target: REPLY_DATA,
}


class FastServer(Protocol):
    """Who takes what is not simple (the dispatcher)."""

    def new_task(self) -> Running:
        """What ``asyncio.current_task`` is in the next first steps."""

    def made(self, channel: Channel, row: Row, op: ops.Op, length: int, made: object) -> None:
        """A handler returned something that is no coroutine of Python's own; it may have the same methods."""

    def suspended(
        self,
        channel: Channel,
        row: Row,
        op: ops.Op,
        length: int,
        coroutine: Coroutine[Any, Any, Any],
        yielded: Any,
        context: Context,
        running: Running,
    ) -> None:
        """A handler waits after its first step, which ran in ``context``."""

    def answered(self, channel: Channel, row: Row, op: ops.Op, result: Any) -> None:
        """A handler returned what has no simple encoding, or is no reply at all."""

    def failed(self, channel: Channel, row: Row, op: ops.Op, failure: BaseException) -> None:
        """A handler raised what is no plain OSError."""

    def refused(self, channel: Channel, row: Row, op: ops.Op, result: Any, error: int) -> None:
        """The reply could not be written; ``error`` is ``-errno``."""


def fast_path(
    source: Source,
    server: FastServer,
    channel: Channel,
    loop: asyncio.AbstractEventLoop,
    waiting: dict[int, Running],
    rows: Mapping[int, Row],
) -> FastPath:
    """``waiting``: the requests in flight; one that bears the id of another of them is left to Python code."""
    path = FastPath(server, channel, loop, waiting, IN_PLACE, **source)
    for opcode, row in rows.items():
        shape = SHAPES.get(row.decode)
        if shape is None or row.handler is None or not row.admitted:
            continue
        places = shape.codec.places if shape.codec is not None else []
        size = shape.codec.size if shape.codec is not None else 0
        sized = -1
        if shape.codec is not None and (row.encode is encode.read_data or shape.tail is Tail.DATA):
            sized = shape.codec.fields.index("size")
        reply = _REPLIES.get(row.encode, REPLY_OTHER)
        path.add(opcode, row, shape.op_type, row.handler, size, tuple(places), _TAILS[shape.tail], reply, sized)
    return path
