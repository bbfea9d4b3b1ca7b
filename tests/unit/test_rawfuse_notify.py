"""Notifications: their bytes, their results, the answer to a RETRIEVE, what becomes of those who wait at the end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rawfuse import FileSystem, FuseError, InitFlag, Opcode, Session, ops
from rawfuse.handover import Keeper
from rawfuse.negotiate import PAGE, Agreement
from rawfuse.notify import MOST_QUEUED, Notifier
from tests.unit.rawfuse_kernel import Kernel, on_both_loops, served

EXPIRE = InitFlag.HAS_EXPIRE_ONLY | InitFlag.HAS_RESEND
MAX = (1 << 64) - 1

SENT: list[tuple[Callable[[Notifier], Awaitable[Any]], int, bytes, Any]] = [
    (lambda notifier: notifier.wake_poll(MAX), 1, struct.pack("=Q", MAX), None),
    (lambda notifier: notifier.invalidate_inode(7), 2, struct.pack("=Qqq", 7, -1, 0), True),
    (lambda notifier: notifier.invalidate_inode(7, 4096, 10), 2, struct.pack("=Qqq", 7, 4096, 10), True),
    (lambda notifier: notifier.invalidate_entry(1, b"n\xff"), 3, struct.pack("=QII", 1, 2, 0) + b"n\xff\0", True),
    (
        lambda notifier: notifier.invalidate_entry(1, b"n", expire_only=True),
        3,
        struct.pack("=QII", 1, 1, 1) + b"n\0",
        True,
    ),
    (lambda notifier: notifier.store(7, 5, b"data"), 4, struct.pack("=QQII", 7, 5, 4, 0) + b"data", True),
    (lambda notifier: notifier.delete(1, 7, b"name"), 6, struct.pack("=QQII", 1, 7, 4, 0) + b"name\0", True),
    (lambda notifier: notifier.resend(), 7, b"", None),
    (lambda notifier: notifier.increment_epoch(), 8, b"", None),
    (lambda notifier: notifier.prune([5, MAX]), 9, struct.pack("=IIQQQ", 2, 0, 0, 5, MAX), None),
    (lambda notifier: notifier.prune([]), 9, struct.pack("=IIQ", 0, 0, 0), None),
]


@pytest.mark.parametrize(("send", "code", "body", "result"), SENT)
@on_both_loops
async def test_bytes(send: Callable[[Notifier], Awaitable[Any]], code: int, body: bytes, result: object) -> None:
    async with served(FileSystem(), EXPIRE) as kernel:
        assert await send(kernel.notifier) is result
        assert await kernel.notification() == (code, body)


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ENOTDIR])
@on_both_loops
async def test_nothing_cached_is_no_failure(error: int) -> None:
    async with served(FileSystem()) as kernel:
        kernel.device.refuse_next = -error
        assert await kernel.notifier.invalidate_entry(1, b"name") is False
        kernel.device.refuse_next = -error
        assert await kernel.notifier.retrieve(7, 0, 10) is None


@on_both_loops
async def test_refused_by_the_kernel() -> None:
    async with served(FileSystem()) as kernel:
        kernel.device.refuse_next = -errno.ENOTEMPTY
        with pytest.raises(FuseError, match="DELETE") as caught:
            await kernel.notifier.delete(1, 7, b"name")
        assert caught.value.errno == errno.ENOTEMPTY


class TestOlderKernels:
    """ENOSYS, and nothing sent, for what this kernel does not know: it would take some for something else."""

    @pytest.mark.parametrize(
        "send",
        [
            lambda notifier: notifier.invalidate_entry(1, b"n", expire_only=True),
            lambda notifier: notifier.resend(),
            lambda notifier: notifier.increment_epoch(),
            lambda notifier: notifier.prune([1]),
        ],
        ids=["expire", "resend", "epoch", "prune"],
    )
    @on_both_loops
    async def test_refused(self, send: Callable[[Notifier], Awaitable[Any]]) -> None:
        async with served(FileSystem()) as kernel:
            notifier = Notifier(kernel.device, Agreement(43, InitFlag(0), 1 << 16, 16, 1 << 16))
            with pytest.raises(FuseError) as caught:
                await send(notifier)
            assert caught.value.errno == errno.ENOSYS
            await kernel.nothing_more()
            await notifier.close()


def retrieved(unique: int, data: bytes, offset: int = 0) -> bytes:
    """The body of a NOTIFY_REPLY, and its header: its id is that of the notification."""
    head = struct.pack("=IIQQIIIHH", 40 + 40 + len(data), Opcode.NOTIFY_REPLY, unique, 7, 0, 0, 0, 0, 0)
    return head + struct.pack("=QQIIQQ", 0, offset, len(data), 0, 0, 0) + data


async def asked(kernel: Kernel) -> tuple[int, int, int, int]:
    """Id, inode, offset and size of the next notification, a RETRIEVE."""
    code, body = await kernel.notification()
    assert code == 5
    unique, ino, offset, size, _ = struct.unpack("=QQQII", body)
    return unique, ino, offset, size


class TestRetrieve:
    @on_both_loops
    async def test_answer(self) -> None:
        """Several at a time, answered in another order."""
        async with served(FileSystem()) as kernel:
            one = asyncio.ensure_future(kernel.notifier.retrieve(7, 4096, 100))
            first = await asked(kernel)
            two = asyncio.ensure_future(kernel.notifier.retrieve(8, 0, 10))
            second = await asked(kernel)
            assert (first[1:], second[1:]) == ((7, 4096, 100), (8, 0, 10))
            kernel.send_bytes(retrieved(second[0], b""))
            assert await two == b""
            kernel.send_bytes(retrieved(first[0], b"data", 4096))
            assert await one == b"data"

    @on_both_loops
    async def test_no_more_than_a_write(self) -> None:
        async with served(FileSystem()) as kernel:
            for flags, most in ((InitFlag(0), 1 << 16), (InitFlag.OVER_IO_URING, (1 << 16) - PAGE)):
                notifier = Notifier(kernel.device, Agreement(45, flags, 1 << 16, 16, 1 << 16))
                waiting = asyncio.ensure_future(notifier.retrieve(7, 0, 1 << 40))
                assert (await asked(kernel))[3] == most
                await notifier.close()
                with pytest.raises(FuseError):
                    await waiting

    @on_both_loops
    async def test_answers_that_nobody_waits_for(self) -> None:
        async with served(FileSystem()) as kernel:
            kernel.send_bytes(retrieved(1 << 60, b"data"))
            waiting = asyncio.ensure_future(kernel.notifier.retrieve(7, 0, 10))
            unique = (await asked(kernel))[0]
            waiting.cancel()
            await asyncio.wait([waiting])
            kernel.send_bytes(retrieved(unique, b"data"))
            kernel.send_bytes(retrieved(unique, b"data"))
            await kernel.nothing_more()

    @on_both_loops
    async def test_an_id_that_a_request_has_too(self) -> None:
        async with served(FileSystem()) as kernel:
            waiting = asyncio.ensure_future(kernel.notifier.retrieve(7, 0, 10))
            unique = (await asked(kernel))[0]
            assert unique == kernel.next_unique
            await kernel.nothing_more()
            kernel.send_bytes(retrieved(unique, b"data"))
            assert await waiting == b"data"


class Stuck:
    """Makes writing block, as it does in the kernel while the directory is locked."""

    def __init__(self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.free = threading.Event(), threading.Event()
        write = kernel.device.write

        def blocking(message: Any) -> int:
            if threading.current_thread() is not threading.main_thread():
                self.entered.set()
                assert self.free.wait(20)
            return write(message)

        monkeypatch.setattr(kernel.device, "write", blocking)


async def outcome(waiting: asyncio.Future[Any]) -> Any:
    try:
        return await waiting
    except FuseError as error:
        return error.errno


class TestEnd:
    @on_both_loops
    async def test_who_waits_gets_enotconn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with served(FileSystem()) as kernel:
            retrieving = asyncio.ensure_future(kernel.notifier.retrieve(7, 0, 10))
            await asked(kernel)
            stuck = Stuck(kernel, monkeypatch)
            written = asyncio.ensure_future(kernel.notifier.invalidate_inode(1))
            queued = [asyncio.ensure_future(kernel.notifier.invalidate_inode(2)) for _ in range(MOST_QUEUED + 100)]
            await asyncio.to_thread(stuck.entered.wait)
            # Requests are answered all the time: whatever it waits for may depend on that.
            await kernel.call(Opcode.STATFS)
            closing = asyncio.ensure_future(kernel.notifier.close())
            assert {await outcome(one) for one in [retrieving, written, *queued]} == {errno.ENOTCONN}
            await kernel.call(Opcode.STATFS)
            assert not closing.done()
            stuck.free.set()
            await closing
            assert (await kernel.notification())[0] == 2, "what was being written, and nothing behind it"
            await kernel.nothing_more()
            assert await outcome(asyncio.ensure_future(kernel.notifier.wake_poll(1))) == errno.ENOTCONN
            assert await outcome(asyncio.ensure_future(kernel.notifier.retrieve(7, 0, 1))) == errno.ENOTCONN

    @on_both_loops
    async def test_handlers_that_wait_for_one_end_too(self) -> None:
        """The session waits for them before it is over."""
        results: list[Any] = []

        class Asking(FileSystem):
            notifier: Notifier

            async def mk_dir(self, op: Any) -> Any:
                results.append(await outcome(asyncio.ensure_future(self.notifier.retrieve(7, 0, 10))))
                raise FuseError(errno.EIO)

        filesystem = Asking()
        async with served(filesystem) as kernel:
            filesystem.notifier = kernel.notifier
            kernel.send(Opcode.MKDIR, struct.pack("=II", 0o755, 0) + b"d\0")
            await asked(kernel)
        assert results == [errno.ENOTCONN]

    @on_both_loops
    async def test_cancelled_waiters_leave_their_places(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with served(FileSystem()) as kernel:
            stuck = Stuck(kernel, monkeypatch)
            for _ in range(3):
                waiting = [asyncio.ensure_future(kernel.notifier.wake_poll(1)) for _ in range(MOST_QUEUED + 10)]
                await asyncio.to_thread(stuck.entered.wait)
                for one in waiting:
                    one.cancel()
                await asyncio.wait(waiting)
            stuck.free.set()
            await kernel.notifier.wake_poll(2)


@on_both_loops
async def test_handing_over_waits_for_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits in the kernel for the lock that a request holds, which is still answered."""
    waiting, answer = asyncio.Event(), asyncio.Event()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    class Slow(FileSystem):
        async def read_symlink(self, op: ops.ReadSymlink) -> bytes:
            waiting.set()
            await answer.wait()
            return b"target"

    filesystem = Slow()
    keeper = filesystem.keeper = Keeper(ours, {}, 1)
    async with served(filesystem, ended=0) as kernel:
        session = Session(filesystem, "/")
        session.notifier, session._dispatcher = kernel.notifier, kernel.dispatcher
        unique = kernel.send(Opcode.READLINK)
        await waiting.wait()
        stuck = Stuck(kernel, monkeypatch)
        notifying = asyncio.ensure_future(kernel.notifier.invalidate_entry(1, b"name"))
        await asyncio.to_thread(stuck.entered.wait)
        handing_over = asyncio.ensure_future(session.hand_over())
        await asyncio.sleep(0)
        answer.set()
        assert await kernel.reply() == (unique, 0, b"target")
        stuck.free.set()
        await handing_over
        assert await outcome(notifying) == errno.ENOTCONN
    keeper.close()
    os.close(keeper.journal.fd)
    theirs.close()
