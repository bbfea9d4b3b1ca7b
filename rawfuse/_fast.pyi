"""The hot path of rawfuse, compiled from ``_fast.c``."""

import asyncio
from collections.abc import Callable

from rawfuse import ops
from rawfuse.channel import Channel
from rawfuse.device import RequestBuffer
from rawfuse.fast import FastServer
from rawfuse.running import Handler, Row, Running

TAIL_NOTHING: int
TAIL_NAME: int
TAIL_DATA: int
REPLY_NONE: int
REPLY_EMPTY: int
REPLY_ENTRY: int
REPLY_ATTRIBUTES: int
REPLY_OPENED: int
REPLY_CREATED: int
REPLY_COUNT: int
REPLY_DATA: int
REPLY_OTHER: int

class FastPath:
    """Serves the common requests of a descriptor, ``fd``, or of a ring: its address, and the memory of its entries,
    to which the list may get more."""

    left: int
    """Requests until ``run`` returns."""

    def __init__(
        self,
        server: FastServer,
        channel: Channel,
        loop: asyncio.AbstractEventLoop,
        waiting: dict[int, Running],
        in_place: int,
        *,
        fd: int = -1,
        ring: int = 0,
        views: list[memoryview] = ...,
    ) -> None: ...
    def add(
        self,
        opcode: int,
        row: Row,
        op_type: Callable[..., ops.Op],
        handler: Handler,
        size: int,
        places: tuple[tuple[int, int], ...],
        tail: int,
        reply: int,
        sized: int,
        /,
    ) -> None:
        """Serve an opcode. Its request has a structure of ``size`` bytes with fields at ``places``, (offset, size)
        each, and ``tail`` behind it; field ``sized`` tells the size of the data, or of the largest reply; -1: none
        does."""

    def use(self, buffer: RequestBuffer, /) -> None:
        """Read requests into this buffer from now on."""

    def run(self, nanoseconds: int, /) -> int:
        """Serve what comes, at most ``left`` requests. Returns the length of a request that stands in the buffer and
        is left to Python code, 0 when ``left`` is used up, or ``-errno`` of the read: EAGAIN when nothing came for so
        long. For a ring see ``rawfuse_ring_next``."""
