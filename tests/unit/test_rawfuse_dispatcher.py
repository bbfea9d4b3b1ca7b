"""From a request to exactly one reply: eager and waiting handlers, INTERRUPT, errors, undoing, back-pressure."""

from __future__ import annotations

import array
import asyncio
import contextvars
import errno
import logging
import stat
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from rawfuse import (
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileSystem,
    FileSystemStatus,
    FuseError,
    InitFlag,
    Opcode,
    OpenedFile,
    Settings,
    channel,
    dispatcher,
    ops,
)
from rawfuse.decode import IN_PLACE
from rawfuse.running import Running
from tests.unit.rawfuse_helpers import HEADER, request
from tests.unit.rawfuse_kernel import DEADLINE, agreement, compiled, on_both_loops, served
from tests.unit.test_rawfuse_table import DECODED

GETATTR = struct.pack("=IIQ", 0, 0, 0)
MKDIR = struct.pack("=II", 0o755, 0) + b"d\0"
ATTRIBUTES = Attributes(ino=7, mode=stat.S_IFREG | 0o644)
BODIES = {opcode: body for opcode, body, _ in DECODED}


def write_body(data: bytes) -> bytes:
    return struct.pack("=QQIIQII", 3, 0, len(data), 0, 0, 1, 0) + data


class Scripted(FileSystem):
    """GETATTR, MKDIR, WRITE and SETLKW do what the test says; FORGET and RELEASE are recorded."""

    def __init__(self, script: Callable[[ops.Op], Awaitable[Any]] | None = None) -> None:
        self.script = script
        self.undone: list[ops.Op] = []
        self.started: list[int] = []
        self.finished: list[int] = []

    def has_started(self, number: int) -> bool:
        return len(self.started) >= number

    async def _run(self, op: ops.Op) -> Any:
        self.started.append(op.unique)
        try:
            return await self.script(op) if self.script is not None else None
        finally:
            self.finished.append(op.unique)

    async def get_inode_attributes(self, op: ops.GetInodeAttributes) -> AttributesReply:
        return (await self._run(op)) or AttributesReply(ATTRIBUTES)

    async def mk_dir(self, op: ops.MkDir) -> Entry:
        return (await self._run(op)) or Entry(9, Attributes(ino=9, mode=stat.S_IFDIR | 0o755))

    async def read_file(self, op: ops.ReadFile) -> bytes:
        return (await self._run(op)) or b""

    async def write_file(self, op: ops.WriteFile) -> int:
        result = await self._run(op)
        return op.size if result is None else result

    async def set_lock(self, op: ops.SetLock) -> None:
        await self._run(op)

    async def forget_inode(self, op: ops.ForgetInode) -> None:
        self.undone.append(op)

    async def release_file_handle(self, op: ops.ReleaseFileHandle) -> None:
        self.undone.append(op)

    async def release_dir_handle(self, op: ops.ReleaseDirHandle) -> None:
        self.undone.append(op)


class Gate:
    """Handlers that wait until the test lets them go on, each by its request's id."""

    def __init__(self) -> None:
        self.futures: dict[int, asyncio.Future[Any]] = {}

    async def __call__(self, op: ops.Op) -> Any:
        self.futures[op.unique] = asyncio.get_running_loop().create_future()
        return await self.futures[op.unique]

    def open(self, unique: int, result: Any = None) -> None:
        self.futures[unique].set_result(result)


async def until(condition: Callable[[], Any]) -> None:
    """Give the loop turns until it holds; the scenario's deadline ends a vain wait."""
    while not condition():  # noqa: ASYNC110 - nothing tells of the dispatcher's inner steps
        await asyncio.sleep(0)


async def settled() -> None:
    """Turns enough for whatever had arrived to be read, if it is read at all."""
    for _ in range(20):
        await asyncio.sleep(0.001)


class TestEager:
    @on_both_loops
    async def test_answers_without_a_task(self) -> None:
        seen: list[Any] = []

        async def script(op: ops.Op) -> None:
            seen.append((asyncio.current_task(), asyncio.all_tasks()))

        async with served(Scripted(script)) as kernel:
            before = asyncio.all_tasks()
            reply = await kernel.call(Opcode.GETATTR, GETATTR)
            assert (reply.error, len(reply.body)) == (0, 104)
            current, tasks = seen[0]
            assert isinstance(current, Running)
            assert tasks == before

    @on_both_loops
    async def test_more_requests_than_a_burst(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel, "BURST", 4)
        async with served(Scripted()) as kernel:
            sent = [kernel.send(Opcode.GETATTR, GETATTR) for _ in range(10)]
            assert [(await kernel.reply()).unique for _ in sent] == sent

    @on_both_loops
    async def test_declined(self) -> None:
        filesystem = Scripted()
        filesystem.declined = frozenset({Opcode.GETATTR})
        async with served(filesystem) as kernel:
            assert (await kernel.call(Opcode.GETATTR, GETATTR)).error == errno.EIO
            assert not filesystem.started

    @on_both_loops
    async def test_never_answered(self) -> None:
        filesystem = Scripted()
        async with served(filesystem) as kernel:
            kernel.send(Opcode.FORGET, struct.pack("=Q", 3))
            kernel.send(Opcode.BATCH_FORGET, struct.pack("=IIQQQQ", 2, 0, 8, 1, 9, 2))
            kernel.send(Opcode.NOTIFY_REPLY, BODIES[Opcode.NOTIFY_REPLY])
            await kernel.nothing_more()
        assert [(op.nodeid, op.count) for op in filesystem.undone if isinstance(op, ops.ForgetInode)] == [
            (7, 3),
            (8, 1),
            (9, 2),
        ]


class TestWaiting:
    @on_both_loops
    async def test_others_are_served_meanwhile(self) -> None:
        gate = Gate()
        async with served(Scripted(gate)) as kernel:
            waiting = kernel.send(Opcode.GETATTR, GETATTR)
            await kernel.nothing_more()
            gate.open(waiting)
            assert (await kernel.reply())[:2] == (waiting, 0)

    @on_both_loops
    async def test_any_order(self) -> None:
        gate = Gate()
        async with served(Scripted(gate)) as kernel:
            sent = [kernel.send(Opcode.GETATTR, GETATTR) for _ in range(5)]
            await until(lambda: len(gate.futures) == 5)
            for unique in reversed(sent):
                gate.open(unique)
                assert (await kernel.reply()).unique == unique

    @pytest.mark.parametrize(
        "wait",
        [
            lambda: asyncio.sleep(0),
            lambda: asyncio.sleep(0.001),
            lambda: asyncio.to_thread(len, "x"),
            lambda: asyncio.gather(asyncio.sleep(0), asyncio.sleep(0)),
            lambda: asyncio.wait_for(asyncio.sleep(0), 5),
            lambda: asyncio.shield(asyncio.sleep(0)),
            lambda: _task_group(),
            lambda: _locked(),
        ],
        ids=["yield", "sleep", "thread", "gather", "wait_for", "shield", "task_group", "lock"],
    )
    @on_both_loops
    async def test_what_a_handler_may_await(self, wait: Callable[[], Awaitable[Any]]) -> None:
        async def script(op: ops.Op) -> None:
            await wait()
            await wait()

        async with served(Scripted(script)) as kernel:
            sent = [kernel.send(Opcode.GETATTR, GETATTR) for _ in range(3)]
            replies = [await kernel.reply() for _ in sent]
            assert sorted(reply.unique for reply in replies) == sent
            assert all(reply.error == 0 for reply in replies)

    @on_both_loops
    async def test_context_variables_are_its_own(self) -> None:
        variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
        seen = []

        async def script(op: ops.Op) -> None:
            await asyncio.sleep(0)
            before = variable.get()
            variable.set(op.unique)
            await asyncio.sleep(0)
            seen.append((before, variable.get() == op.unique))

        async with served(Scripted(script)) as kernel:
            for _ in range(3):
                kernel.send(Opcode.GETATTR, GETATTR)
            for _ in range(3):
                await kernel.reply()
        assert seen == [(0, True)] * 3

    @pytest.mark.parametrize("waits", [False, True], ids=["eager", "waiting"])
    @on_both_loops
    async def test_context_variables_of_the_first_step(self, waits: bool) -> None:
        """What it sets is seen by no other handler, and its tokens are good after it waited."""
        variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
        seen = []

        async def script(op: ops.Op) -> None:
            seen.append(variable.get())
            token = variable.set(op.unique)
            if waits:
                await asyncio.sleep(0)
                variable.reset(token)
                seen.append(variable.get())

        async with served(Scripted(script)) as kernel:
            sent = [kernel.send(Opcode.GETATTR, GETATTR) for _ in range(3)]
            assert [(await kernel.reply())[:2] for _ in sent] == [(unique, 0) for unique in sent]
        assert set(seen) == {0}

    @on_both_loops
    async def test_who_keeps_the_task_does_not_touch_the_next_request(self) -> None:
        """A handler that never waits is finished when it has returned, whoever cancels it later."""
        kept: list[Any] = []

        async def script(op: ops.Op) -> None:
            if len(kept) < 2:
                kept.append(asyncio.current_task())
                return
            for task in kept:
                assert task is not asyncio.current_task()
                assert task.done() and not task.cancel()
            await asyncio.sleep(0)

        async with served(Scripted(script)) as kernel:
            for _ in range(4):
                assert (await kernel.call(Opcode.GETATTR, GETATTR)).error == 0

    @on_both_loops
    async def test_cancelling_oneself_does_not_touch_the_next_request(self) -> None:
        async def script(op: ops.Op) -> None:
            if op.unique == 2:
                task = asyncio.current_task()
                assert task is not None and task.cancel()
                return
            await asyncio.sleep(0)

        async with served(Scripted(script)) as kernel:
            for _ in range(3):
                assert (await kernel.call(Opcode.GETATTR, GETATTR)).error == 0

    @on_both_loops
    async def test_timeout_is_caught_inside(self) -> None:
        async def script(op: ops.Op) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.get_running_loop().create_future()

        async with served(Scripted(script)) as kernel:
            assert (await kernel.call(Opcode.GETATTR, GETATTR)).error == 0

    @on_both_loops
    async def test_timeout_that_escapes(self) -> None:
        async def script(op: ops.Op) -> None:
            async with asyncio.timeout(0.001):
                await asyncio.get_running_loop().create_future()

        async with served(Scripted(script)) as kernel:
            assert (await kernel.call(Opcode.GETATTR, GETATTR)).error == errno.ETIMEDOUT

    @on_both_loops
    async def test_awaiting_what_is_no_future(self, caplog: pytest.LogCaptureFixture) -> None:
        class Odd:
            def __await__(self) -> Any:
                yield "something"

        async def script(op: ops.Op) -> None:
            await Odd()

        async with served(Scripted(script)) as kernel:
            assert (await kernel.call(Opcode.GETATTR, GETATTR)).error == errno.EIO
        assert "no future of this event loop" in caplog.text

    @on_both_loops
    async def test_written_data_stays_while_others_come(self) -> None:
        gate = Gate()
        written = []

        async def script(op: ops.Op) -> None:
            assert isinstance(op, ops.WriteFile)
            await gate(op)
            written.append(bytes(op.data))

        async with served(Scripted(script)) as kernel:
            texts = [bytes([number]) * 50_000 for number in range(4)]
            sent = []
            for text in texts:
                sent.append(kernel.send(Opcode.WRITE, write_body(text)))
                await until(lambda: len(gate.futures) == len(sent))
            for unique in sent:
                gate.open(unique)
                reply = await kernel.reply()
                assert reply == (unique, 0, struct.pack("=II", 50_000, 0))
            assert written == texts


async def _task_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(0))
        group.create_task(asyncio.sleep(0.001))


async def _locked() -> None:
    lock = asyncio.Lock()
    async with lock:
        await asyncio.sleep(0)


class TestInterrupt:
    @on_both_loops
    async def test_cancels_the_handler(self) -> None:
        """EINTR, exactly once, however many signals come."""
        gate = Gate()
        filesystem = Scripted(gate)
        async with served(filesystem) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: gate.futures)
            for _ in range(3):
                kernel.interrupt(unique)
            assert await kernel.reply() == (unique, errno.EINTR, b"")
            kernel.interrupt(unique)
            await kernel.nothing_more()
            assert gate.futures[unique].cancelled()
            assert filesystem.finished == [unique]

    @on_both_loops
    async def test_of_a_waiting_lock(self) -> None:
        gate = Gate()
        async with served(Scripted(gate)) as kernel:
            unique = kernel.send(Opcode.SETLKW, BODIES[Opcode.SETLKW])
            await until(lambda: gate.futures)
            kernel.interrupt(unique)
            assert (await kernel.reply())[:2] == (unique, errno.EINTR)

    @pytest.mark.parametrize(
        ("opcode", "body"), [(Opcode.MKDIR, MKDIR), (Opcode.WRITE, write_body(b"data"))], ids=["mkdir", "write"]
    )
    @on_both_loops
    async def test_what_must_not_stop_half_way_finishes(self, opcode: Opcode, body: bytes) -> None:
        gate = Gate()
        async with served(Scripted(gate)) as kernel:
            unique = kernel.send(opcode, body)
            await until(lambda: gate.futures)
            kernel.interrupt(unique)
            await kernel.nothing_more()
            gate.open(unique)
            assert (await kernel.reply())[:2] == (unique, 0)

    @on_both_loops
    async def test_of_what_is_not_there(self) -> None:
        async with served(Scripted()) as kernel:
            answered = (await kernel.call(Opcode.GETATTR, GETATTR)).unique
            kernel.interrupt(answered)
            kernel.interrupt(1 << 40)
            await kernel.nothing_more()

    @on_both_loops
    async def test_handler_that_answers_all_the_same(self) -> None:
        async def script(op: ops.Op) -> None:
            with pytest.raises(asyncio.CancelledError):
                await asyncio.get_running_loop().create_future()

        filesystem = Scripted(script)
        async with served(filesystem) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: filesystem.started)
            kernel.interrupt(unique)
            assert (await kernel.reply())[:2] == (unique, 0)

    @on_both_loops
    async def test_handler_that_cleans_up_for_long(self) -> None:
        gate = Gate()

        async def script(op: ops.Op) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await gate(op)

        filesystem = Scripted(script)
        async with served(filesystem) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: filesystem.started)
            kernel.interrupt(unique)
            kernel.interrupt(unique)
            await until(lambda: gate.futures)
            await kernel.nothing_more()
            gate.open(unique)
            assert (await kernel.reply())[:2] == (unique, errno.EINTR)

    @on_both_loops
    async def test_inside_a_timeout(self) -> None:
        gate = Gate()

        async def script(op: ops.Op) -> None:
            async with asyncio.timeout(1000):
                await gate(op)

        async with served(Scripted(script)) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: gate.futures)
            kernel.interrupt(unique)
            assert (await kernel.reply())[:2] == (unique, errno.EINTR)

    @on_both_loops
    async def test_when_the_result_is_there_already(self) -> None:
        """Interrupted between the end of what it waited for and its next step: still exactly one reply."""
        gate = Gate()
        async with served(Scripted(gate)) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: gate.futures)
            gate.open(unique)
            kernel.interrupt(unique)
            reply = await kernel.reply()
            assert reply.unique == unique
            assert reply.error in (0, errno.EINTR)
            await kernel.nothing_more()

    @on_both_loops
    async def test_a_task_group_inside_is_cancelled(self) -> None:
        gate = Gate()

        async def script(op: ops.Op) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(gate(op))

        async with served(Scripted(script)) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: gate.futures)
            kernel.interrupt(unique)
            assert (await kernel.reply())[:2] == (unique, errno.EINTR)
            assert gate.futures[unique].cancelled()


ERRORS = [
    (FuseError(errno.ENOENT), errno.ENOENT, False),
    (OSError(errno.EACCES, "no"), errno.EACCES, False),
    (FileNotFoundError(errno.ENOENT, "no", "file"), errno.ENOENT, False),
    (BlockingIOError(errno.EAGAIN, "later"), errno.EAGAIN, False),
    (FuseError(errno.ENOSYS), errno.EOPNOTSUPP, False),
    (TimeoutError(), errno.ETIMEDOUT, False),
    (TimeoutError(errno.ETIMEDOUT, "late"), errno.ETIMEDOUT, False),
    (OSError("no number"), errno.EIO, True),
    (OSError(512, "ERESTARTSYS is the kernel's own"), errno.EIO, True),
    (OSError(-5, "negative"), errno.EIO, True),
    (OSError(0, "none"), errno.EIO, True),
    (ValueError("a bug"), errno.EIO, True),
    (KeyError("a bug"), errno.EIO, True),
    (StopIteration(5), errno.EIO, True),
    (asyncio.CancelledError(), errno.EIO, False),
]


class TestErrors:
    @pytest.mark.parametrize("waits", [False, True], ids=["eager", "waiting"])
    @pytest.mark.parametrize(("failure", "expected", "logged"), ERRORS, ids=lambda value: repr(value)[:40])
    @on_both_loops
    async def test_mapping(
        self, failure: BaseException, expected: int, logged: bool, waits: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def script(op: ops.Op) -> None:
            if waits:
                await asyncio.sleep(0)
            raise failure

        async with served(Scripted(script)) as kernel:
            assert (await kernel.call(Opcode.GETATTR, GETATTR))[1:] == (expected, b"")
            await kernel.nothing_more()
        assert ("GETATTR failed" in caplog.text) == logged

    @pytest.mark.parametrize(
        ("opcode", "body", "result"),
        [
            (Opcode.GETATTR, GETATTR, "a string"),
            (Opcode.MKDIR, MKDIR, AttributesReply(ATTRIBUTES)),
            (Opcode.MKDIR, MKDIR, 5),
            (Opcode.WRITE, write_body(b"data"), "four"),
            (Opcode.WRITE, write_body(b"data"), -1),
            (Opcode.GETATTR, GETATTR, AttributesReply(Attributes(ino=7, mode=-1))),
            (Opcode.GETATTR, GETATTR, AttributesReply(Attributes(ino=7, mode=1, size=1 << 64))),
        ],
    )
    @on_both_loops
    async def test_results_of_the_wrong_type(
        self, opcode: Opcode, body: bytes, result: object, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def script(op: ops.Op) -> object:
            return result

        async with served(Scripted(script)) as kernel:
            assert (await kernel.call(opcode, body))[1:] == (errno.EIO, b"")
            await kernel.nothing_more()
        assert "which is no reply to it" in caplog.text

    @on_both_loops
    async def test_more_than_was_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        class Generous(FileSystem):
            async def read_file(self, op: ops.ReadFile) -> bytes:
                return bytes(op.size + 1)

            async def read_dir(self, op: ops.ReadDir) -> DirectoryBuffer:
                records = DirectoryBuffer(2 * op.size)
                while records.add(b"name", 1, stat.S_IFREG, 1):
                    pass
                return records

        async with served(Generous()) as kernel:
            for opcode in (Opcode.READ, Opcode.READDIR):
                assert (await kernel.call(opcode, BODIES[opcode]))[1:] == (errno.EIO, b"")
        assert caplog.text.count("which is no reply to it") == 2

    @on_both_loops
    async def test_xattr_too_long_for_the_caller(self) -> None:
        class Xattr(FileSystem):
            async def get_xattr(self, op: ops.GetXattr) -> bytes:
                return bytes(100)

        async with served(Xattr()) as kernel:
            for size, expected in (
                (0, (0, struct.pack("=II", 100, 0))),
                (99, (errno.ERANGE, b"")),
                (100, (0, bytes(100))),
            ):
                assert (await kernel.call(Opcode.GETXATTR, struct.pack("=II", size, 0) + b"user.a\0"))[1:] == expected

    @pytest.mark.parametrize("handler", [lambda op: AttributesReply(ATTRIBUTES), lambda op: 1 / 0, lambda: None])
    @on_both_loops
    async def test_handler_that_is_no_coroutine_function(
        self, handler: Callable[..., Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        filesystem = Scripted()
        filesystem.get_inode_attributes = handler  # type: ignore[method-assign]
        async with served(filesystem) as kernel:
            assert (await kernel.call(Opcode.GETATTR, GETATTR))[1:] == (errno.EIO, b"")
            await kernel.nothing_more()
        assert "GETATTR failed" in caplog.text

    @pytest.mark.parametrize(
        ("result", "expected"),
        [
            (b"", b""),
            (bytearray(b"0123456789"), b"0123456789"),
            ([b"01234", memoryview(b"56789")], b"0123456789"),
            ([b"x"] * 3000, b"x" * 3000),
            (memoryview(array.array("I", [1, 2])), array.array("I", [1, 2]).tobytes()),
            (array.array("H", [7, 8, 9]), None),
            (memoryview(bytes(4096)).cast("I"), bytes(4096)),
            (memoryview(bytes(4100)).cast("I"), None),
            (memoryview(bytes(100))[::2], None),
            ("text", None),
            (["text"], None),
            ([1, 2], None),
            (None, None),
            (7, None),
        ],
        ids=lambda value: repr(value)[:40],
    )
    @on_both_loops
    async def test_results_of_read(
        self, result: object, expected: bytes | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Reading(FileSystem):
            async def read_file(self, op: ops.ReadFile) -> Any:
                return result

        async with served(Reading()) as kernel:
            reply = await kernel.call(Opcode.READ, struct.pack("=QQIIQII", 3, 0, 4096, 0, 0, 1, 0))
            assert reply[1:] == ((errno.EIO, b"") if expected is None else (0, expected))
        assert ("which is no reply to it" in caplog.text) == (expected is None)

    @on_both_loops
    async def test_request_that_comes_twice(self, caplog: pytest.LogCaptureFixture) -> None:
        gate = Gate()
        async with served(Scripted(gate)) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: gate.futures)
            kernel.send_again()
            assert await kernel.reply() == (unique, errno.EIO, b"")
            gate.open(unique)
            assert (await kernel.reply())[:2] == (unique, 0)
            await kernel.nothing_more()
        assert "in flight already" in caplog.text

    @on_both_loops
    async def test_ids_of_what_has_no_reply_are_another_space(self) -> None:
        """A NOTIFY_REPLY bears an id that we gave; a FORGET whose handler waits has none worth keeping."""
        gate = Gate()

        class Forgetting(Scripted):
            async def forget_inode(self, op: ops.ForgetInode) -> None:
                await asyncio.sleep(0)
                self.undone.append(op)

        filesystem = Forgetting(gate)
        async with served(filesystem) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: gate.futures)
            for opcode in (Opcode.NOTIFY_REPLY, Opcode.FORGET, Opcode.FORGET):
                kernel.send_bytes(request(opcode, BODIES[opcode], unique=unique))
            await kernel.nothing_more()
            gate.open(unique)
            assert (await kernel.reply())[:2] == (unique, 0)
        assert len(filesystem.undone) == 2

    @on_both_loops
    async def test_malformed_requests(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.ERROR)
        async with served(Scripted()) as kernel:
            assert (await kernel.call(Opcode.GETATTR, b"short")).error == errno.EIO
            assert (await kernel.call(Opcode.LOOKUP, b"no end")).error == errno.EIO
            kernel.send_bytes(b"less than a header")
            kernel.send_bytes(HEADER.pack(1000, Opcode.STATFS, 500, 1, 0, 0, 0, 0, 0))
            assert (await kernel.reply())[:2] == (500, errno.EIO)
            await kernel.nothing_more()
        assert caplog.text.count("malformed request") == 4

    @pytest.mark.parametrize("opcode", [7, 19, 54, Opcode.CUSE_INIT, 1 << 20, 2**32 - 1])
    @on_both_loops
    async def test_unknown_opcodes(self, opcode: int) -> None:
        async with served(Scripted()) as kernel:
            assert (await kernel.call(opcode, b"anything")).error == errno.ENOSYS
            await kernel.nothing_more()

    @on_both_loops
    async def test_set_xattr_in_both_sizes(self) -> None:
        seen = []

        class Xattr(FileSystem):
            async def set_xattr(self, op: ops.SetXattr) -> None:
                seen.append((op.name, op.value, op.setxattr_flags))

        for flags, extra in ((InitFlag.SETXATTR_EXT, struct.pack("=II", 1, 0)), (InitFlag(0), b"")):
            async with served(Xattr(), flags) as kernel:
                body = struct.pack("=II", 5, 0) + extra + b"user.a\0value"
                assert (await kernel.call(Opcode.SETXATTR, body)).error == 0
        assert seen == [(b"user.a", b"value", 1), (b"user.a", b"value", 0)]


class Making(Scripted):
    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        return Entry(0, None) if op.name == b"absent" else Entry(5, ATTRIBUTES)

    async def create_file(self, op: ops.CreateFile) -> tuple[Entry, OpenedFile]:
        return Entry(6, ATTRIBUTES), OpenedFile(60)

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        return OpenedFile(70)

    async def open_dir(self, op: ops.OpenDir) -> OpenedFile:
        return OpenedFile(80)

    async def read_dir_plus(self, op: ops.ReadDirPlus) -> DirectoryPlusBuffer:
        records = DirectoryPlusBuffer(op.size)
        records.add(b".", Entry(7, ATTRIBUTES), 1)
        records.add(b"bare", None, 2, ino=4, kind=stat.S_IFREG)
        records.add(b"full", Entry(5, ATTRIBUTES), 3)
        return records


class TestUndo:
    @pytest.mark.parametrize("error", [errno.ENOENT, errno.ENODEV, errno.EINVAL])
    @pytest.mark.parametrize(
        ("opcode", "body", "undone"),
        [
            (Opcode.LOOKUP, b"name\0", [(ops.ForgetInode, 5, 1)]),
            (Opcode.LOOKUP, b"absent\0", []),
            (Opcode.GETATTR, GETATTR, []),
            (Opcode.MKDIR, MKDIR, [(ops.ForgetInode, 9, 1)]),
            (Opcode.CREATE, BODIES[Opcode.CREATE], [(ops.ReleaseFileHandle, 6, 60), (ops.ForgetInode, 6, 1)]),
            (Opcode.OPEN, BODIES[Opcode.OPEN], [(ops.ReleaseFileHandle, 7, 70)]),
            (Opcode.OPENDIR, BODIES[Opcode.OPENDIR], [(ops.ReleaseDirHandle, 7, 80)]),
            (Opcode.READDIRPLUS, BODIES[Opcode.READDIRPLUS], [(ops.ForgetInode, 5, 1)]),
        ],
    )
    @on_both_loops
    async def test_reply_that_was_not_delivered(
        self, opcode: Opcode, body: bytes, undone: list[tuple[type[ops.Op], int, int]], error: int
    ) -> None:
        """No FORGET and no RELEASE come for it, so the dispatcher makes them."""
        filesystem = Making()
        async with served(filesystem) as kernel:
            if compiled.get():
                kernel.take_no_more()  # EPIPE; compiled code cannot be told to fail
                kernel.send(opcode, body)
            else:
                kernel.device.refuse_next = -error
                unique = kernel.send(opcode, body)
                if error == errno.EINVAL:
                    assert await kernel.reply() == (unique, errno.EIO, b"")
                await kernel.nothing_more()
            await until(lambda: len(filesystem.undone) >= len(undone))
        assert [
            (type(op), op.nodeid, op.count if isinstance(op, ops.ForgetInode) else op.fh)  # type: ignore[attr-defined]
            for op in filesystem.undone
        ] == undone


class Batching(Scripted):
    """Handlers that wait until ``end_of_burst`` lets all of them go on."""

    def __init__(self) -> None:
        super().__init__(self.join)
        self.batch: list[asyncio.Future[None]] = []
        self.sizes: list[int] = []

    async def join(self, op: ops.Op) -> None:
        future = asyncio.get_running_loop().create_future()
        self.batch.append(future)
        await future

    def end_of_burst(self) -> None:
        if self.batch:
            self.sizes.append(len(self.batch))
            for future in self.batch:
                future.set_result(None)
            self.batch = []


class TestLimits:
    @on_both_loops
    async def test_number_of_requests(self) -> None:
        gate = Gate()
        filesystem = Scripted(gate)
        async with served(filesystem, settings=Settings(max_in_flight=2)) as kernel:
            sent = [kernel.send(Opcode.GETATTR, GETATTR) for _ in range(5)]
            await until(lambda: len(gate.futures) == 2)
            await settled()
            assert filesystem.started == sent[:2]
            for number, unique in enumerate(sent):
                most = min(5, number + 2)
                await until(partial(filesystem.has_started, most))
                assert len(filesystem.started) == most
                gate.open(unique)
                assert (await kernel.reply()).unique == unique
            await kernel.nothing_more()

    @pytest.mark.parametrize(
        ("opcode", "body", "each"),
        [
            (Opcode.WRITE, write_body(bytes(IN_PLACE + 1)), agreement().buffer_size),
            (Opcode.WRITE, write_body(bytes(IN_PLACE)), 80 + IN_PLACE),
            (Opcode.READ, struct.pack("=QQIIQII", 3, 0, 50_000, 0, 0, 1, 0), 80 + 50_000),
        ],
        ids=["write, which keeps its buffer", "small write", "read"],
    )
    @on_both_loops
    async def test_bytes_of_requests(self, opcode: Opcode, body: bytes, each: int) -> None:
        gate = Gate()
        filesystem = Scripted(gate)
        for limit in (2 * each - 1, 2 * each):
            filesystem.started.clear()
            async with served(filesystem, settings=Settings(max_bytes_in_flight=limit)) as kernel:
                sent = [kernel.send(opcode, body) for _ in range(4)]
                await until(partial(filesystem.has_started, 2))
                await settled()
                assert filesystem.started == sent[:2]
                for unique in sent:
                    await until(partial(gate.futures.get, unique))
                    gate.open(unique)
                    assert (await kernel.reply()).unique == unique
                await kernel.nothing_more()

    @on_both_loops
    async def test_one_request_beyond_the_bytes(self) -> None:
        """The largest request is served whatever the bound is, one at a time."""

        async def script(op: ops.Op) -> None:
            await asyncio.sleep(0)

        async with served(Scripted(script), settings=Settings(max_in_flight=1, max_bytes_in_flight=1)) as kernel:
            for size in (1, 50_000):
                sent = [kernel.send(Opcode.WRITE, write_body(bytes(size))) for _ in range(3)]
                assert [(await kernel.reply())[:2] for _ in sent] == [(unique, 0) for unique in sent]

    @on_both_loops
    async def test_locks_that_wait_do_not_keep_others_out(self) -> None:
        """The request that will end their wait, or the INTERRUPT, must be read, however many wait."""
        gate = Gate()
        async with served(Scripted(gate), settings=Settings(max_in_flight=2)) as kernel:
            sent = [kernel.send(Opcode.SETLKW, BODIES[Opcode.SETLKW]) for _ in range(5)]
            await until(lambda: len(gate.futures) == 5)
            kernel.interrupt(sent[4])
            assert (await kernel.reply())[:2] == (sent[4], errno.EINTR)
            for unique in sent[:4]:
                gate.open(unique)
                assert (await kernel.reply()).unique == unique

    @on_both_loops
    async def test_locks_that_wait_have_a_bound_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatcher, "MOST_LOCK_WAITS", 2)
        gate = Gate()
        async with served(Scripted(gate)) as kernel:
            sent = [kernel.send(Opcode.SETLKW, BODIES[Opcode.SETLKW]) for _ in range(3)]
            assert (await kernel.reply())[:2] == (sent[2], errno.ENOLCK)
            for unique in sent[:2]:
                gate.open(unique)
                assert (await kernel.reply())[:2] == (unique, 0)

    @pytest.mark.parametrize("clean_up", [False, True], ids=["cancelled", "cleans up for long"])
    @on_both_loops
    async def test_the_end_is_noticed_at_the_bound(self, clean_up: bool) -> None:
        """Although nothing is read and no handler would ever finish."""
        gate = Gate()

        async def script(op: ops.Op) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                if clean_up:
                    await gate(op)

        filesystem = Scripted(script)
        async with served(filesystem, settings=Settings(max_in_flight=2), channels=2) as kernel:
            sent = [kernel.send(Opcode.GETATTR, GETATTR) for _ in range(3)]
            await until(partial(filesystem.has_started, 2))
            kernel.close()
            assert await kernel.dispatcher.ended == errno.ENODEV
            if clean_up:
                await until(lambda: len(gate.futures) == 2)
                for unique in sent[:2]:
                    gate.open(unique)
        assert filesystem.started == filesystem.finished == sent[:2]

    @on_both_loops
    async def test_end_of_burst_comes_at_the_bound(self) -> None:
        """What handlers wait for together is ended although more requests are there than may be in flight."""
        filesystem = Batching()
        async with served(filesystem, settings=Settings(max_in_flight=4)) as kernel:
            sent = [kernel.send(Opcode.MKDIR, MKDIR) for _ in range(10)]
            assert sorted([(await kernel.reply()).unique for _ in sent]) == sent
        assert max(filesystem.sizes) <= 4

    @pytest.mark.parametrize("limits", [{"max_in_flight": 0}, {"max_bytes_in_flight": -1}])
    def test_limits_that_make_no_sense(self, limits: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            Settings(**limits)


class TestChannels:
    @on_both_loops
    async def test_reply_goes_where_the_request_came_from(self) -> None:
        gate = Gate()
        async with served(Scripted(gate), channels=3) as kernel:
            sent = [kernel.send(Opcode.GETATTR, GETATTR, channel=channel) for channel in range(3)]
            await until(lambda: len(gate.futures) == 3)
            await kernel.nothing_more()
            for channel in (1, 2, 0):
                gate.open(sent[channel])
                assert (await kernel.reply(channel))[:2] == (sent[channel], 0)
            await kernel.nothing_more()

    @on_both_loops
    async def test_all_pause_at_the_bound(self) -> None:
        gate = Gate()
        filesystem = Scripted(gate)
        async with served(filesystem, settings=Settings(max_in_flight=1), channels=2) as kernel:
            first = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: filesystem.started)
            second = kernel.send(Opcode.GETATTR, GETATTR, channel=1)
            await settled()
            assert filesystem.started == [first]
            gate.open(first)
            await until(partial(filesystem.has_started, 2))
            gate.open(second)
            assert (await kernel.reply(1))[:2] == (second, 0)

    @on_both_loops
    async def test_interrupt_on_another_channel(self) -> None:
        gate = Gate()
        async with served(Scripted(gate), channels=2) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR, channel=1)
            await until(lambda: gate.futures)
            kernel.interrupt(unique)
            assert await kernel.reply(1) == (unique, errno.EINTR, b"")
            await kernel.nothing_more()

    @on_both_loops
    async def test_interrupt_before_its_request(self) -> None:
        gate = Gate()
        async with served(Scripted(gate), channels=2) as kernel:
            kernel.interrupt(kernel.next_unique)
            await kernel.call(Opcode.LOOKUP, b"n\0")  # takes the id and does not wait
            kernel.interrupt(kernel.next_unique)
            kernel.interrupt(1 << 40)
            await settled()
            unique = kernel.send(Opcode.GETATTR, GETATTR, channel=1)
            assert await kernel.reply(1) == (unique, errno.EINTR, b"")
            kernel.interrupt(kernel.next_unique)
            await settled()
            unique = kernel.send(Opcode.MKDIR, MKDIR, channel=1)
            await until(lambda: unique in gate.futures)
            gate.open(unique)
            assert (await kernel.reply(1))[:2] == (unique, 0)

    @on_both_loops
    async def test_interrupts_of_nothing_are_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatcher, "MOST_EARLY", 4)
        gate = Gate()
        async with served(Scripted(gate), channels=2) as kernel:
            kernel.interrupt(kernel.next_unique)
            for number in range(4):
                kernel.interrupt((1 << 40) + 2 * number)
            await settled()
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: gate.futures)
            gate.open(unique)
            assert (await kernel.reply())[:2] == (unique, 0)


class TestEnd:
    @on_both_loops
    async def test_handlers_without_effect_are_cancelled_and_the_others_finish(self) -> None:
        gate = Gate()
        filesystem = Scripted(gate)
        async with served(filesystem) as kernel:
            read, made = kernel.send(Opcode.GETATTR, GETATTR), kernel.send(Opcode.MKDIR, MKDIR)
            await until(lambda: len(gate.futures) == 2)
            kernel.close()
            await kernel.dispatcher.ended
            await until(lambda: filesystem.finished == [read])
            assert gate.futures[read].cancelled() and not gate.futures[made].done()
            gate.open(made)
        assert filesystem.finished == [read, made]

    @on_both_loops
    async def test_waits_for_handlers_that_clean_up(self) -> None:
        async def script(op: ops.Op) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await asyncio.sleep(0.02)

        filesystem = Scripted(script)
        async with served(filesystem) as kernel:
            unique = kernel.send(Opcode.GETATTR, GETATTR)
            await until(lambda: filesystem.started)
        assert filesystem.finished == [unique]

    @on_both_loops
    async def test_when_nothing_runs(self) -> None:
        async with served(Scripted()) as kernel:
            await kernel.nothing_more()
        assert kernel.dispatcher.ended.result() == errno.ENODEV

    @on_both_loops
    async def test_retiring_at_the_bound(self) -> None:
        """Handlers that finish make room, but nothing is read any more."""
        gate = Gate()
        async with served(Scripted(gate), settings=Settings(max_in_flight=1), ended=0) as kernel:
            made = kernel.send(Opcode.MKDIR, MKDIR)
            await until(lambda: gate.futures)
            retiring = asyncio.ensure_future(kernel.dispatcher.retire())
            kernel.send(Opcode.MKDIR, MKDIR)
            await settled()
            gate.open(made)
            await retiring
            assert (await kernel.reply())[:2] == (made, 0)
            await settled()
            assert list(gate.futures) == [made]

    @on_both_loops
    async def test_retiring_answers_what_is_done(self) -> None:
        """A handler that was cancelled in vain has had its effect; only those that failed are left to the next one."""

        async def script(op: ops.Op) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                if op.nodeid != 8:
                    raise

        filesystem = Scripted(script)
        async with served(filesystem, ended=0) as kernel:
            kernel.send(Opcode.GETATTR, GETATTR)
            done = kernel.send(Opcode.GETATTR, GETATTR, nodeid=8)
            await until(partial(filesystem.has_started, 2))
            await kernel.dispatcher.retire()
            assert (await kernel.reply())[:2] == (done, 0)

    @on_both_loops
    async def test_the_end_while_retiring(self) -> None:
        """Both wait until no handler runs."""
        gate = Gate()
        async with served(Scripted(gate), ended=0) as kernel:
            made = kernel.send(Opcode.MKDIR, MKDIR)
            await until(lambda: gate.futures)
            both = [
                asyncio.ensure_future(kernel.dispatcher.retire()),
                asyncio.ensure_future(kernel.dispatcher.drained()),
            ]
            await settled()
            gate.open(made)
            await asyncio.gather(*both)

    @pytest.mark.parametrize("with_compiled", [True, False], ids=["compiled", "python"])
    def test_a_handler_ends_the_program(self, with_compiled: bool) -> None:
        """As Ctrl-C does when Python handles the signal while a handler runs."""

        async def script(op: ops.Op) -> None:
            raise SystemExit(3)

        async def scenario() -> None:
            compiled.set(with_compiled)
            async with served(Scripted(script)) as kernel:
                kernel.send(Opcode.GETATTR, GETATTR)
                await asyncio.wait_for(kernel.dispatcher.ended, DEADLINE)

        with pytest.raises(SystemExit) as ended:
            asyncio.run(scenario())
        assert ended.value.code == 3

    @on_both_loops
    async def test_requests_before_the_end_are_served(self) -> None:
        filesystem = Scripted()
        async with served(filesystem) as kernel:
            sent = [kernel.send(Opcode.MKDIR, MKDIR) for _ in range(5)]
        assert filesystem.finished == sent


@on_both_loops
async def test_end_of_burst() -> None:
    """It comes when all that had arrived is started and some of it waits; what it lets go on is answered."""
    filesystem = Batching()
    async with served(filesystem) as kernel:
        sent = [kernel.send(Opcode.MKDIR, MKDIR) for _ in range(10)]
        assert sorted([(await kernel.reply()).unique for _ in sent]) == sent
    assert sum(filesystem.sizes) == 10
    assert max(filesystem.sizes) > 1


@on_both_loops
async def test_status_has_a_default() -> None:
    async with served(FileSystem()) as kernel:
        reply = await kernel.call(Opcode.STATFS)
    status = FileSystemStatus()
    assert reply.body == struct.pack(
        "=QQQQQIII28x", 0, 0, 0, 0, 0, status.block_size, status.name_max, status.block_size
    )
