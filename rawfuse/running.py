"""A handler on its way."""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import tasks
from collections.abc import Callable, Coroutine
from typing import Any

from rawfuse import ops
from rawfuse.abi import Opcode
from rawfuse.channel import Channel
from rawfuse.decode import Decoder
from rawfuse.device import RequestBuffer
from rawfuse.encode import Encoder

Handler = Callable[[Any], Coroutine[Any, Any, Any]]


class Row:
    """One opcode as this session serves it. ``admitted``: its waiting handlers count as requests in flight;
    ``reply_size``: the operation's field that tells how many bytes the reply may have, where there is one."""

    __slots__ = ("admitted", "decode", "encode", "error", "handler", "interruptible", "opcode", "reply_size")

    def __init__(
        self,
        opcode: int,
        decode: Decoder,
        handler: Handler | None,
        encode: Encoder | None,
        error: int,
        interruptible: bool,
    ) -> None:
        self.opcode = opcode
        self.decode = decode
        self.handler = handler
        self.encode = encode
        self.error = error
        self.interruptible = interruptible
        self.admitted = opcode != Opcode.SETLKW
        self.reply_size = _REPLY_SIZES.get(opcode)

    @property
    def name(self) -> str:
        return Opcode(self.opcode).name


_REPLY_SIZES: dict[int, str] = {
    **dict.fromkeys((Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS, Opcode.GETXATTR, Opcode.LISTXATTR), "size"),
    Opcode.IOCTL: "out_size",
}


class Running:
    """The handler of one request: the part of the Task interface that asyncio asks of the current task, without the
    cost of a Task. A handler that never waits is finished before any of this is used."""

    __slots__ = (
        "__weakref__",
        "_cancel_requests",
        "_context",
        "_coroutine",
        "_done",
        "_finished",
        "_must_cancel",
        "_waiting_for",
        "buffer",
        "bytes",
        "channel",
        "interrupted",
        "key",
        "loop",
        "op",
        "row",
        "touched",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        finished: Callable[[Running, Any, BaseException | None], None],
    ) -> None:
        self.loop = loop
        self._finished = finished
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._context: contextvars.Context | None = None
        self._waiting_for: asyncio.Future[Any] | None = None
        self._must_cancel = False
        self._cancel_requests = 0
        self._done = False
        self.touched = False
        """Cancelled by somebody."""
        self.interrupted = False
        self.buffer: RequestBuffer | None = None
        self.bytes = 0
        self.key = 0
        self.channel: Channel
        self.row: Row
        self.op: ops.Op

    def suspend(self, coroutine: Coroutine[Any, Any, Any], yielded: Any, context: contextvars.Context) -> None:
        """Go on after the first step, which ran in ``context`` and yielded what the coroutine waits for."""
        self._coroutine = coroutine
        self._context = context
        self._wait(yielded)

    def retire(self) -> None:
        """The first step was the last one."""
        self._done = True

    def _wait(self, yielded: Any) -> None:
        if yielded is None:
            self.loop.call_soon(self._step, None, context=self._context)
        elif getattr(yielded, "_asyncio_future_blocking", None) and yielded.get_loop() is self.loop:
            yielded._asyncio_future_blocking = False
            yielded.add_done_callback(self._wake, context=self._context)
            self._waiting_for = yielded
            if self._must_cancel and yielded.cancel():
                self._must_cancel = False
        else:
            problem = RuntimeError(f"a handler awaited {yielded!r}, which is no future of this event loop")
            self.loop.call_soon(self._step, problem, context=self._context)

    def _wake(self, future: asyncio.Future[Any]) -> None:
        try:
            future.result()
        except BaseException as error:
            self._step(error)
        else:
            self._step(None)

    def _step(self, error: BaseException | None) -> None:
        coroutine = self._coroutine
        assert coroutine is not None
        self._waiting_for = None
        if self._must_cancel:
            self._must_cancel = False
            if not isinstance(error, asyncio.CancelledError):
                error = asyncio.CancelledError()
        tasks._enter_task(self.loop, self)  # type: ignore[arg-type]
        try:
            yielded = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            self._done = True
            self._finished(self, stop.value, None)
        except BaseException as failure:
            self._done = True
            self._finished(self, None, failure)
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise
        else:
            self._wait(yielded)
        finally:
            tasks._leave_task(self.loop, self)  # type: ignore[arg-type]

    def cancel(self, msg: object = None) -> bool:
        if self._done:
            return False
        self.touched = True
        self._cancel_requests += 1
        if self._waiting_for is None or not self._waiting_for.cancel():
            self._must_cancel = True
        return True

    def cancelling(self) -> int:
        return self._cancel_requests

    def uncancel(self) -> int:
        self._cancel_requests = max(0, self._cancel_requests - 1)
        return self._cancel_requests

    def done(self) -> bool:
        return self._done

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.loop

    def get_name(self) -> str:
        return f"{self.row.name} {self.op.unique}" if self._coroutine is not None else "first step of a handler"

    def get_coro(self) -> Coroutine[Any, Any, Any] | None:
        return self._coroutine
