"""From a request to its handler to exactly one reply, on the channel that the request came from.

A handler is started at once, in the callback that read the request; most finish without waiting for anything and cost
no task. One that does wait goes on as a ``Running``, which is to asyncio what a Task is (``asyncio.timeout`` and task
groups work in it) and can be cancelled by an INTERRUPT.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import itertools
import logging
from asyncio import tasks
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from rawfuse import ops
from rawfuse.abi import MAX_ERRNO, InitFlag, Opcode
from rawfuse.backing import BackingFiles
from rawfuse.channel import Channel, Reader, Source
from rawfuse.decode import IN_PLACE
from rawfuse.encode import link_target
from rawfuse.errors import ProtocolError
from rawfuse.fast import fast_path
from rawfuse.filesystem import FileSystem
from rawfuse.journal import JOURNALED, Journal, Recorded
from rawfuse.negotiate import Agreement, Settings, encode_init
from rawfuse.notify import Notifier
from rawfuse.running import Handler, Row, Running
from rawfuse.table import SET_XATTR_COMPAT, TABLE
from rawfuse.trace import Trace
from rawfuse.wire import IN_HEADER, OUT_HEADER, InMessage

log = logging.getLogger("rawfuse")

MOST_LOCK_WAITS = 1 << 16
"""Blocking locks that wait at the same time; ENOLCK to one more."""

MOST_EARLY = 1024
"""Interrupted requests remembered because they have not been seen yet."""

_pack_error = OUT_HEADER.pack
_error_size = OUT_HEADER.size
_GONE = -errno.ENOENT
_ENDED = (-errno.ENODEV, -errno.ECONNABORTED)


class Dispatcher:
    """Serves the requests of all channels of one mount after INIT. ``ended`` completes when the connection has.

    Requests in flight are bounded by number and by bytes (``Settings``): those of a waiting handler are the request
    itself, or the whole buffer that it keeps, and the largest reply asked for. At the bound the channels pause until
    handlers finish. A blocking lock does not count while it waits, because what ends it is another request.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        filesystem: FileSystem,
        agreement: Agreement,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        notifier: Notifier | None = None,
        backing: BackingFiles | None = None,
        journal: Journal | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._channels = channels
        self._loop = loop
        self._trace = trace
        self._compiled = settings.compiled and trace is None
        self._rows = _rows(filesystem, agreement)
        self._rows[Opcode.INTERRUPT].handler = self._interrupt
        if backing is not None:
            _choose_modes(self._rows, backing)
        if journal is not None:
            _keep_journal(self._rows, journal)
            # The process before may have died with INIT read, and what it would agree on deposited, but not answered.
            self._rows[Opcode.INIT].handler = _answer(encode_init(agreement, settings))
            self._rows[Opcode.INIT].encode = link_target
        if notifier is not None:
            self._rows[Opcode.NOTIFY_REPLY].handler = _deliver_to(notifier)
        self._end_of_burst = filesystem.end_of_burst
        self._running: dict[int, Running] = {}
        self._nameless = itertools.count(-1, -1)
        self._most = settings.max_in_flight
        self._most_bytes = settings.max_bytes_in_flight
        self._admitted = 0
        self._bytes = 0
        self._paused = False
        self._early: dict[int, None] = {}
        self._undoing: set[asyncio.Task[Any]] = set()
        self._finished = asyncio.Event()
        self._retired = False
        self.ended: asyncio.Future[int] = loop.create_future()

    def start(self) -> None:
        for channel in self._channels:
            channel.begin(self)

    @property
    def waiting(self) -> bool:
        return bool(self._running)

    def reader(self, channel: Channel, source: Source) -> Reader | None:
        if self._compiled:
            return fast_path(source, self, channel, self._loop, self._running, self._rows)
        return None

    def end_burst(self) -> bool:
        if not self._running:
            return False
        self._end_of_burst()
        return not self._running

    def end(self, error: int) -> None:
        """ENODEV: unmounted; ECONNABORTED: aborted through fusectl; anything else is unexpected, and final too. Nobody
        waits for replies any more; handlers whose effect must not stop half-way finish all the same."""
        self._end_channels()
        if self.ended.done():
            return
        if -error not in _ENDED:
            log.error("reading /dev/fuse failed: %s", errno.errorcode.get(error, error))
        self.ended.set_result(error)
        for running in list(self._running.values()):
            if running.row.interruptible:
                running.cancel()

    async def drained(self) -> None:
        """Returns when no handler runs any more."""
        await self._settled(lambda running: True)
        while self._undoing:
            await asyncio.wait(self._undoing)

    async def retire(self) -> None:
        """Read nothing more, for another process will. Returns when no handler runs any more: those whose effect must
        not stop half-way have finished and answered; the others are cancelled and their requests left unanswered."""
        self._end_channels()
        await self._settled(lambda running: not running.row.interruptible)
        self._retired = True
        for running in list(self._running.values()):
            running.cancel()
        await self.drained()
        if not self.ended.done():
            self.ended.set_result(0)

    def _end_channels(self) -> None:
        """For good: handlers that finish later resume none of them."""
        for channel in self._channels:
            channel.end()
        self._channels = ()

    async def _settled(self, concerns: Callable[[Running], bool]) -> None:
        while any(map(concerns, self._running.values())):
            self._finished.clear()
            await self._finished.wait()

    # Serving

    def serve(self, channel: Channel, message: InMessage, length: int) -> None:
        try:
            message.load(length)
            row = self._rows.get(message.opcode)
            if row is None:
                self._refuse_unknown(channel, message)
                return
            op = row.decode(message)
            if self._running and row.encode is not None and op.unique in self._running:
                raise ProtocolError(f"request {op.unique} is in flight already")
        except ProtocolError as error:
            log.error("malformed request: %s", error)
            if length >= IN_HEADER.size:
                self._fail(channel, message.in_header.unique, errno.EIO)
            return
        if self._trace is not None:
            self._trace.request(row.opcode, op, replied=row.encode is not None)
        handler = row.handler
        if handler is None:
            if row.encode is not None:
                self._fail(channel, op.unique, row.error)
        elif not (row.admitted or (len(self._running) - self._admitted < MOST_LOCK_WAITS and channel.may_wait())):
            self._fail(channel, op.unique, errno.ENOLCK)
        else:
            self._start(channel, row, op, handler, length)

    def _start(self, channel: Channel, row: Row, op: ops.Op, handler: Handler, length: int) -> None:
        """The handler's first step, in a context of its own."""
        loop = self._loop
        running = self.new_task()
        context = contextvars.copy_context()
        failure: BaseException | None = None
        result: Any = None
        tasks._enter_task(loop, running)  # type: ignore[arg-type]
        try:
            coroutine = handler(op)
            if not hasattr(coroutine, "send"):
                raise TypeError(f"the handler returned {coroutine!r:.100}, no coroutine: define it with async def")
            yielded = context.run(coroutine.send, None)
        except StopIteration as stop:
            result = stop.value
        except BaseException as error:
            failure = error
        else:
            self.suspended(channel, row, op, length, coroutine, yielded, context, running)
            return
        finally:
            tasks._leave_task(loop, running)  # type: ignore[arg-type]
        running.retire()
        if failure is None:
            self.answered(channel, row, op, result)
        else:
            self.failed(channel, row, op, failure)

    def new_task(self) -> Running:
        return Running(self._loop, self.finish)

    def made(self, channel: Channel, row: Row, op: ops.Op, length: int, made: Any) -> None:
        self._start(channel, row, op, lambda op: made, length)

    def suspended(
        self,
        channel: Channel,
        row: Row,
        op: ops.Op,
        length: int,
        coroutine: Coroutine[Any, Any, Any],
        yielded: Any,
        context: contextvars.Context,
        running: Running,
    ) -> None:
        """The handler waits, so its request is in flight now."""
        running.channel, running.row, running.op = channel, row, op
        running.key = op.unique if row.encode is not None else next(self._nameless)
        self._running[running.key] = running
        if row.admitted:
            running.bytes = length
            if isinstance(op, ops.WriteFile) and op.size > IN_PLACE:
                running.buffer = channel.lend()
                if running.buffer is not None:
                    running.bytes = running.buffer.size
            if row.reply_size is not None:
                running.bytes += getattr(op, row.reply_size)
            self._admitted += 1
            self._bytes += running.bytes
            if not self._paused and (self._admitted >= self._most or self._bytes >= self._most_bytes):
                self._paused = True
                for other in self._channels:
                    other.pause()
        running.suspend(coroutine, yielded, context)
        if self._early and running.key in self._early:
            del self._early[running.key]
            self._cancel(running)

    def finish(self, running: Running, result: Any, failure: BaseException | None) -> None:
        """A handler that had waited has ended."""
        row, op = running.row, running.op
        del self._running[running.key]
        if failure is None:
            self.answered(running.channel, row, op, result)
        elif not self._retired:  # or else another process will be asked
            self._reply_failure(running.channel, row, op, failure, interrupted=running.interrupted)
        if running.buffer is not None:
            running.channel.give_back(running.buffer)
            running.buffer = None
        if row.admitted:
            self._admitted -= 1
            self._bytes -= running.bytes
            if self._paused and _has_room(self._admitted, self._most) and _has_room(self._bytes, self._most_bytes):
                self._resume()
        self._finished.set()

    def _resume(self) -> None:
        self._paused = False
        for channel in self._channels:
            channel.resume()

    async def _interrupt(self, op: ops.Interrupt) -> None:
        """INTERRUPT, on whatever channel. With one reader its target has always been read before; with several it may
        come first, and is remembered then (ids never come back, so one that was answered long ago does no harm)."""
        running = self._running.get(op.target)
        if running is not None:
            self._cancel(running)
        elif len(self._channels) > 1:
            self._early[op.target] = None
            if len(self._early) > MOST_EARLY:
                del self._early[next(iter(self._early))]

    def _cancel(self, running: Running) -> None:
        """Operations that must not stop half-way are left to finish."""
        if running.row.interruptible and not running.interrupted:
            running.interrupted = True
            running.cancel()

    # Replying

    def _refuse_unknown(self, channel: Channel, message: InMessage) -> None:
        log.warning("unknown opcode %d", message.opcode)
        self._fail(channel, message.in_header.unique, errno.ENOSYS)

    def answered(self, channel: Channel, row: Row, op: ops.Op, result: Any) -> None:
        """A handler has returned; what it returned need not be a reply."""
        encode = row.encode
        if encode is None:
            return
        try:
            message = encode(op, result)
            sent = channel.reply(op.unique, message)
        except OSError as failure:
            self._fail(channel, op.unique, failure.errno or errno.EIO)
            self._undo(op, result)
            return
        except Exception:
            log.exception("%s returned %.200r, which is no reply to it", row.name, result)
            self._fail(channel, op.unique, errno.EIO)
            return
        if self._trace is not None:
            self._trace.reply(op.unique, 0, result)
        if sent < 0:
            self.refused(channel, row, op, result, sent)

    def refused(self, channel: Channel, row: Row, op: ops.Op, result: Any, error: int) -> None:
        if error != _GONE and error not in _ENDED:
            log.error("the kernel refused the reply to %s: %s", row.name, errno.errorcode.get(-error, -error))
            self._fail(channel, op.unique, errno.EIO)
        self._undo(op, result)

    def failed(self, channel: Channel, row: Row, op: ops.Op, failure: BaseException) -> None:
        """A handler has raised without having waited."""
        self._reply_failure(channel, row, op, failure, interrupted=False)
        if isinstance(failure, (KeyboardInterrupt, SystemExit)):
            raise failure

    def _reply_failure(
        self, channel: Channel, row: Row, op: ops.Op, failure: BaseException, *, interrupted: bool
    ) -> None:
        if isinstance(failure, asyncio.CancelledError):
            error = errno.EINTR if interrupted else errno.EIO
        elif isinstance(failure, TimeoutError) and failure.errno is None:
            error = errno.ETIMEDOUT
        elif isinstance(failure, OSError) and isinstance(failure.errno, int) and 0 < failure.errno <= MAX_ERRNO:
            error = failure.errno
            if error == errno.ENOSYS:
                # The kernel would remember it and never ask again.
                error = errno.EOPNOTSUPP
        else:
            error = errno.EIO
            log.error("%s failed", row.name, exc_info=failure)
        if row.encode is not None:
            self._fail(channel, op.unique, error)

    def _fail(self, channel: Channel, unique: int, error: int) -> None:
        channel.reply(unique, _pack_error(_error_size, -error, unique))
        if self._trace is not None:
            self._trace.reply(unique, error, None)

    def _undo(self, op: ops.Op, result: Any) -> None:
        """The kernel never got this reply: no FORGET and no RELEASE will come for it."""
        if isinstance(result, Recorded):
            return  # of a process before: the connection has ended, and all that it knew with it
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
            self._undoing.add(task)
            task.add_done_callback(self._undone)

    def _undone(self, task: asyncio.Task[Any]) -> None:
        self._undoing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("undoing a reply that was not delivered failed", exc_info=task.exception())


def _has_room(used: int, most: int) -> bool:
    """An eighth must be free before channels resume, so that they do not change with every request at the bound."""
    return used < most - (most >> 3)


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


def _keep_journal(rows: dict[int, Row], journal: Journal) -> None:
    """Have nothing done twice that another process has done before."""
    for opcode in JOURNALED:
        row = rows[opcode]
        if row.handler is not None and row.encode is not None:
            row.handler, row.encode = journal.guarding(row.handler), journal.recording(row.encode)


_BUILT_IN = ("stat_fs", "forget_inode", "batch_forget", "destroy")
"""Methods whose default in ``FileSystem`` is an answer."""


def _deliver_to(notifier: Notifier) -> Handler:
    async def deliver(op: ops.NotifyReply) -> None:
        notifier.retrieved(op)

    return deliver


def _answer(reply: bytes) -> Handler:
    async def answer(op: ops.Op) -> bytes:
        return reply

    return answer


async def _done(op: ops.Op) -> None:
    return None
