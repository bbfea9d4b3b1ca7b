"""From a request to its handler to exactly one reply.

A handler is started at once, in the callback that read the request; most finish without waiting for anything and cost
no task. One that does wait goes on as a ``Running``, which is to asyncio what a Task is (``asyncio.timeout`` and task
groups work in it) and can be cancelled by an INTERRUPT.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import logging
from asyncio import tasks
from collections.abc import Callable, Coroutine
from time import perf_counter_ns
from typing import Any

from rawfuse import ops
from rawfuse.abi import InitFlag, Opcode
from rawfuse.backing import BackingFiles
from rawfuse.decode import Decoder
from rawfuse.device import Device, RequestBuffer
from rawfuse.encode import Encoder, Message
from rawfuse.errors import MAX_ERRNO, ProtocolError
from rawfuse.filesystem import FileSystem
from rawfuse.negotiate import Agreement
from rawfuse.notify import Notifier
from rawfuse.table import SET_XATTR_COMPAT, TABLE
from rawfuse.trace import Trace
from rawfuse.wire import OUT_HEADER, InMessage

log = logging.getLogger("rawfuse")

BURST = 64
"""Requests drained per wake-up before the event loop gets its turn."""

MAX_RUNNING = 4096
"""Handlers that wait at the same time before reading pauses. Waits for locks are not among them: what ends one is
another request, which must be read."""

MAX_BUFFERS = 64
"""Request buffers (``Agreement.buffer_size`` bytes each) held by waiting handlers before reading pauses."""

_pack_error = OUT_HEADER.pack
_error_size = OUT_HEADER.size
_AGAIN, _GONE = -errno.EAGAIN, -errno.ENOENT
_ENDED = (-errno.ENODEV, -errno.ECONNABORTED)
_RETRY = (-errno.EINTR, -errno.ENOENT)

Handler = Callable[[Any], Coroutine[Any, Any, Any]]


class Row:
    """One opcode as this session serves it."""

    __slots__ = ("decode", "encode", "error", "handler", "interruptible", "opcode")

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


class Running:
    """A handler on its way: the part of the Task interface that asyncio asks of the current task."""

    __slots__ = (
        "_cancel_requests",
        "_context",
        "_coroutine",
        "_dispatcher",
        "_must_cancel",
        "_waiting_for",
        "buffer",
        "interrupted",
        "loop",
        "op",
        "row",
    )

    def __init__(self, dispatcher: Dispatcher, loop: asyncio.AbstractEventLoop) -> None:
        self._dispatcher = dispatcher
        self.loop = loop
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._context: contextvars.Context | None = None
        self._waiting_for: asyncio.Future[Any] | None = None
        self._must_cancel = False
        self._cancel_requests = 0
        self.interrupted = False
        self.buffer: RequestBuffer | None = None
        self.row: Row
        self.op: ops.Op

    def suspend(self, coroutine: Coroutine[Any, Any, Any], yielded: Any) -> None:
        """Go on after the first step, which yielded what the coroutine waits for."""
        self._coroutine = coroutine
        self._context = contextvars.copy_context()
        self._wait(yielded)

    def _wait(self, yielded: Any) -> None:
        if yielded is None:
            self.loop.call_soon(self._step, None, context=self._context)
        elif getattr(yielded, "_asyncio_future_blocking", None):
            yielded._asyncio_future_blocking = False
            yielded.add_done_callback(self._wake, context=self._context)
            self._waiting_for = yielded
            if self._must_cancel and yielded.cancel():
                self._must_cancel = False
        else:
            problem = RuntimeError(f"a handler awaited {yielded!r}, which is no asyncio future")
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
            self._dispatcher.finish(self, stop.value, None)
        except BaseException as failure:
            self._dispatcher.finish(self, None, failure)
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise
        else:
            self._wait(yielded)
        finally:
            tasks._leave_task(self.loop, self)  # type: ignore[arg-type]

    def cancel(self, msg: object = None) -> bool:
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
        return False

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.loop

    def get_name(self) -> str:
        return f"{Opcode(self.row.opcode).name} {self.op.unique}"

    def get_coro(self) -> Coroutine[Any, Any, Any] | None:
        return self._coroutine


class Dispatcher:
    """Serves the requests of one device for one file system after INIT. ``ended`` completes when the connection has."""

    def __init__(
        self,
        device: Device,
        filesystem: FileSystem,
        agreement: Agreement,
        loop: asyncio.AbstractEventLoop,
        notifier: Notifier | None = None,
        trace: Trace | None = None,
        busy_poll: int = 0,
    ) -> None:
        self._device = device
        self._write = device.write
        self._filesystem = filesystem
        self._loop = loop
        self._trace = trace
        self._rows = _rows(filesystem, agreement)
        self._rows[Opcode.INTERRUPT].handler = self._interrupt
        if agreement.flags & InitFlag.PASSTHROUGH:
            _choose_modes(self._rows, BackingFiles(device))
        if notifier is not None:
            self._rows[Opcode.NOTIFY_REPLY].handler = _deliver_to(notifier)
        self._buffer_size = agreement.buffer_size
        self._buffer = RequestBuffer(self._buffer_size)
        self._message = InMessage(self._buffer.view)
        self._free: list[RequestBuffer] = []
        self._lent = 0
        self._counted = 0
        self._spare = Running(self, loop)
        self._running: dict[int, Running] = {}
        self._reading = False
        self._end_of_burst = filesystem.end_of_burst
        self._busy_poll = self._patience = busy_poll
        self._slept = 0
        self._idle: asyncio.Future[None] | None = None
        self.ended: asyncio.Future[int] = loop.create_future()

    # Reading

    def start(self) -> None:
        self._reading = True
        self._loop.add_reader(self._device.fd, self._on_readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._device.fd)

    def _on_readable(self) -> None:
        read_soon, serve, running = self._device.read_soon, self._serve, self._running
        if self._patience < self._busy_poll and perf_counter_ns() - self._slept < self._busy_poll:
            # Had we looked a little longer, we need not have slept.
            self._patience = self._busy_poll
        for _ in range(BURST):
            # Whatever a waiting handler waits for needs the event loop, so then there is no time to look twice.
            length = read_soon(self._buffer, 0 if running else self._patience)
            if length > 0:
                serve(length)
                if not self._reading:
                    return
            elif length == _AGAIN:
                if running:
                    self._end_of_burst()
                    if not running:
                        continue
                else:
                    self._patience >>= 1
                self._slept = perf_counter_ns()
                return
            elif length not in _RETRY:
                self.end(-length)
                return

    def end(self, error: int) -> None:
        """ENODEV: unmounted; ECONNABORTED: aborted through fusectl; anything else is unexpected, and final too. Nobody
        waits for replies any more; handlers whose effect must not stop half-way finish all the same."""
        self._pause()
        if -error not in _ENDED:
            log.error("reading /dev/fuse failed: %s", errno.errorcode.get(error, error))
        for running in list(self._running.values()):
            if running.row.interruptible:
                running.cancel()
        if not self.ended.done():
            self.ended.set_result(error)

    async def drained(self) -> None:
        """Returns when no handler runs any more."""
        if self._running:
            self._idle = self._loop.create_future()
            await self._idle

    # Serving

    def _serve(self, length: int) -> None:
        message = self._message
        try:
            message.load(length)
            row = self._rows.get(message.opcode)
            if row is None:
                self._refuse_unknown(message)
                return
            op = row.decode(message)
        except ProtocolError as error:
            log.error("malformed request: %s", error)
            if length >= 40:
                self._fail(message.in_header.unique, errno.EIO)
            return
        if self._trace is not None:
            self._trace.request(row.opcode, op, replied=row.encode is not None)
        handler = row.handler
        if handler is None:
            if row.encode is not None:
                self._fail(op.unique, row.error)
            return
        running = self._spare
        running.row, running.op = row, op
        loop = self._loop
        coroutine = handler(op)
        tasks._enter_task(loop, running)  # type: ignore[arg-type]
        try:
            yielded = coroutine.send(None)
        except StopIteration as stop:
            tasks._leave_task(loop, running)  # type: ignore[arg-type]
            self._reply(row, op, stop.value)
        except BaseException as failure:
            tasks._leave_task(loop, running)  # type: ignore[arg-type]
            self._reply_failure(row, op, failure, interrupted=False)
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise
        else:
            tasks._leave_task(loop, running)  # type: ignore[arg-type]
            self._spare = Running(self, loop)
            self._running[op.unique] = running
            if isinstance(op, ops.WriteFile):
                self._lend_buffer(running)
            if not isinstance(op, ops.SetLock):
                self._counted += 1
            if self._counted >= MAX_RUNNING or self._lent >= MAX_BUFFERS:
                self._pause()
            running.suspend(coroutine, yielded)

    def _refuse_unknown(self, message: InMessage) -> None:
        log.warning("unknown opcode %d", message.opcode)
        self._fail(message.in_header.unique, errno.ENOSYS)

    def _lend_buffer(self, running: Running) -> None:
        """The payload belongs to the waiting handler; the next request is read into another buffer."""
        running.buffer = self._buffer
        self._lent += 1
        self._buffer = self._free.pop() if self._free else RequestBuffer(self._buffer_size)
        self._message = InMessage(self._buffer.view)

    def finish(self, running: Running, result: Any, failure: BaseException | None) -> None:
        """A handler that had waited has ended."""
        op = running.op
        del self._running[op.unique]
        if not isinstance(op, ops.SetLock):
            self._counted -= 1
        if failure is None:
            self._reply(running.row, op, result)
        else:
            self._reply_failure(running.row, op, failure, interrupted=running.interrupted)
        if running.buffer is not None:
            self._free.append(running.buffer)
            self._lent -= 1
        if not self._reading and not self.ended.done():
            self.start()
        if self._idle is not None and not self._running and not self._idle.done():
            self._idle.set_result(None)

    async def _interrupt(self, op: ops.Interrupt) -> None:
        """INTERRUPT: with one reader its target has always been read before. Operations that must not stop half-way are
        left to finish."""
        running = self._running.get(op.target)
        if running is not None and running.row.interruptible and not running.interrupted:
            running.interrupted = True
            running.cancel()

    # Replying

    def _reply(self, row: Row, op: ops.Op, result: Any) -> None:
        encode = row.encode
        if encode is None:
            return
        try:
            message = encode(op, result)
        except OSError as failure:
            self._fail(op.unique, failure.errno or errno.EIO)
            self._undo(op, result)
            return
        except Exception:
            log.exception("%s returned %.200r, which is no reply to it", Opcode(row.opcode).name, result)
            self._fail(op.unique, errno.EIO)
            return
        sent = self._write(message)
        if self._trace is not None:
            self._trace.reply(op.unique, 0, result)
        if sent < 0:
            self._not_sent(row, op, result, message, sent)

    def _not_sent(self, row: Row, op: ops.Op, result: Any, message: Message, error: int) -> None:
        if error == _GONE or error in _ENDED:
            self._undo(op, result)
            return
        log.error(
            "the kernel refused the reply to %s: %s", Opcode(row.opcode).name, errno.errorcode.get(-error, -error)
        )
        self._fail(op.unique, errno.EIO)
        self._undo(op, result)

    def _reply_failure(self, row: Row, op: ops.Op, failure: BaseException, *, interrupted: bool) -> None:
        if isinstance(failure, asyncio.CancelledError):
            error = errno.EINTR if interrupted else errno.EIO
        elif isinstance(failure, TimeoutError) and failure.errno is None:
            error = errno.ETIMEDOUT
        elif isinstance(failure, OSError) and failure.errno is not None and 0 < failure.errno <= MAX_ERRNO:
            error = failure.errno
            if error == errno.ENOSYS:
                # The kernel would remember it and never ask again.
                error = errno.EOPNOTSUPP
        else:
            error = errno.EIO
            log.error("%s failed", Opcode(row.opcode).name, exc_info=failure)
        if row.encode is not None:
            self._fail(op.unique, error)

    def _fail(self, unique: int, error: int) -> None:
        self._write(_pack_error(_error_size, -error, unique))
        if self._trace is not None:
            self._trace.reply(unique, error, None)

    def _undo(self, op: ops.Op, result: Any) -> None:
        """The kernel never got this reply: no FORGET and no RELEASE will come for it."""
        entry, opened = None, None
        if isinstance(op, (ops.CreateFile, ops.CreateTmpfile)):
            entry, opened = result
        elif isinstance(op, (ops.LookUpInode, ops.MkNode, ops.MkDir, ops.CreateSymlink, ops.CreateLink)):
            entry = result
        elif isinstance(op, ops.OpenFile):
            opened = result
        elif isinstance(op, ops.ReadDirPlus):
            forgets = [(nodeid, 1) for nodeid in result.counted]
            self._start_quietly(Opcode.BATCH_FORGET, ops.BatchForget(0, 0, 0, 0, 0, forgets))
        if opened is not None:
            release = Opcode.RELEASEDIR if isinstance(op, ops.OpenDir) else Opcode.RELEASE
            kind = ops.ReleaseDirHandle if isinstance(op, ops.OpenDir) else ops.ReleaseFileHandle
            nodeid = entry.nodeid if entry is not None else op.nodeid
            self._start_quietly(release, kind(0, nodeid, 0, 0, 0, opened.fh, 0, 0, 0))
        if entry is not None and entry.nodeid:
            self._start_quietly(Opcode.FORGET, ops.ForgetInode(0, entry.nodeid, 0, 0, 0, 1))

    def _start_quietly(self, opcode: Opcode, op: ops.Op) -> None:
        handler = self._rows[opcode].handler
        if handler is not None:
            task = self._loop.create_task(handler(op))
            task.add_done_callback(_log_failure)


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("undoing a reply that was not delivered failed", exc_info=task.exception())


def _rows(filesystem: FileSystem, agreement: Agreement) -> dict[int, Row]:
    rows = {}
    for opcode, operation in TABLE.items():
        row = operation
        if opcode == Opcode.SETXATTR and not agreement.flags & InitFlag.SETXATTR_EXT:
            row = SET_XATTR_COMPAT
        handler: Handler | None = None
        if row.method and (filesystem.implements(Opcode(opcode)) or row.method in _BUILT_IN):
            handler = getattr(filesystem, row.method)
        elif row.method and row.default == 0:
            handler = _done
        rows[int(opcode)] = Row(int(opcode), row.decode, handler, row.encode, row.default, row.interruptible)
    return rows


def _choose_modes(rows: dict[int, Row], files: BackingFiles) -> None:
    """Have every handle served in a way that goes with the others of its inode."""
    for opcode, choose in (
        (Opcode.OPEN, files.opening),
        (Opcode.CREATE, files.creating),
        (Opcode.TMPFILE, files.creating),
        (Opcode.RELEASE, files.releasing),
    ):
        handler = rows[opcode].handler
        if handler is not None:
            rows[opcode].handler = choose(handler)


_BUILT_IN = ("stat_fs", "forget_inode", "batch_forget", "destroy")
"""Methods whose default in ``FileSystem`` is an answer."""


def _deliver_to(notifier: Notifier) -> Handler:
    async def deliver(op: ops.NotifyReply) -> None:
        notifier.retrieved(op)

    return deliver


async def _done(op: ops.Op) -> None:
    return None
