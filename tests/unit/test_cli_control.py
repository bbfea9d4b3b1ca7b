"""The lock of a volume and its control socket, between real processes and event loops."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polefs.node import control
from polefs.node.lock import Holder, Locked, VolumeLock, lock_holder
from polefs.node.status import Status

STATUS = Status(
    volume="/v",
    name="v",
    uuid="u",
    format=1,
    store="s3://bucket/prefix",
    endpoint="http://host:9000",
    mounted=True,
    bytes_used=1,
    bytes_limit=0,
    inodes_used=1,
    inodes_limit=0,
)


class Answers:
    """A daemon that answers each request in its own way."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.gate = asyncio.Event()
        self.finished = asyncio.Event()

    async def answer(self, request: control.Request) -> AsyncIterator[control.Reply]:
        match request:
            case control.GetStatus():
                yield control.StatusReply(STATUS)
            case control.Flush():
                yield control.Progress(10)
                self.started.set()
                await self.gate.wait()
                yield control.Progress(0)
                yield control.Done()
                self.finished.set()
            case control.Unmount(lazy):
                if not lazy:
                    raise OSError(errno.EBUSY, "in use")
                raise ValueError("a bug")
            case control.SetLogLevel():
                yield control.Progress(1)


def ask(volume: str, request: control.Request, patience: float | None = 30) -> list[control.Reply]:
    client = control.ControlClient.connect(volume)
    assert client is not None
    with client:
        assert client.pid == os.getpid()
        return list(client.request(request, patience=patience))


def test_requests_and_replies(tmp_path: Path) -> None:
    volume = str(tmp_path)

    async def run() -> None:
        handler = Answers()
        server = await control.ControlServer.start(volume, handler)
        assert (tmp_path / control.SOCKET).stat().st_mode & 0o777 == 0o600
        assert await asyncio.to_thread(ask, volume, control.GetStatus()) == [control.StatusReply(STATUS)]
        handler.gate.set()
        replies = await asyncio.to_thread(ask, volume, control.Flush())
        assert replies == [control.Progress(10), control.Progress(0), control.Done()]
        with pytest.raises(OSError, match="in use") as caught:
            await asyncio.to_thread(ask, volume, control.Unmount())
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(OSError, match="internal error") as caught:
            await asyncio.to_thread(ask, volume, control.Unmount(lazy=True))
        assert caught.value.errno == errno.EIO
        with pytest.raises(ConnectionError):
            await asyncio.to_thread(ask, volume, control.SetLogLevel("info"))
        await server.close()
        assert not (tmp_path / control.SOCKET).exists()

    asyncio.run(run())
    assert control.ControlClient.connect(volume) is None
    assert control.ControlClient.connect(str(tmp_path / "nowhere")) is None


def test_close_waits_for_the_answer(tmp_path: Path) -> None:
    async def run() -> None:
        handler = Answers()
        server = await control.ControlServer.start(str(tmp_path), handler)
        asked = asyncio.create_task(asyncio.to_thread(ask, str(tmp_path), control.Flush()))
        await asyncio.wait_for(handler.started.wait(), 30)
        client = await asyncio.to_thread(control.ControlClient.connect, str(tmp_path))
        assert client is not None  # it never asks, and must not keep the server open
        client.__exit__()
        closing = asyncio.create_task(server.close())
        handler.gate.set()
        await closing
        assert (await asked)[-1] == control.Done()

    asyncio.run(run())


def test_a_client_that_leaves_stops_nothing(tmp_path: Path) -> None:
    def start_and_leave() -> None:
        client = control.ControlClient.connect(str(tmp_path))
        assert client is not None
        with client:
            next(client.request(control.Flush()))

    async def run() -> None:
        handler = Answers()
        server = await control.ControlServer.start(str(tmp_path), handler)
        await asyncio.to_thread(start_and_leave)
        handler.gate.set()
        await asyncio.wait_for(handler.finished.wait(), 30)
        await server.close()

    asyncio.run(run())


def test_patience_and_garbage(tmp_path: Path) -> None:
    async def run() -> None:
        handler = Answers()
        server = await control.ControlServer.start(str(tmp_path), handler)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(ask, str(tmp_path), control.Flush(), 0.1)
        handler.gate.set()
        for line in (b"garbage\n", b'{"request":"dance"}\n', b'{"request":"log-level"}\n', b"x" * 100_000 + b"\n"):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / control.SOCKET))
            writer.write(line)
            answer = await reader.read()
            assert len(line) > 1000 or b'"failed"' in answer
            writer.close()
        assert await asyncio.to_thread(ask, str(tmp_path), control.GetStatus())
        await server.close()

    asyncio.run(run())


def test_long_paths(tmp_path: Path) -> None:
    """A socket address holds 107 bytes; a volume's path may be longer."""
    volume = tmp_path / ("d" * 200)
    volume.mkdir()

    async def run() -> None:
        server = await control.ControlServer.start(str(volume), Answers())
        assert await asyncio.to_thread(ask, str(volume), control.GetStatus())
        await server.close()

    asyncio.run(run())


def test_a_dead_daemons_socket(tmp_path: Path) -> None:
    async def run() -> None:
        server = await control.ControlServer.start(str(tmp_path), Answers())
        os.rename(tmp_path / control.SOCKET, tmp_path / "kept")
        await server.close()
        os.rename(tmp_path / "kept", tmp_path / control.SOCKET)
        assert control.ControlClient.connect(str(tmp_path)) is None
        again = await control.ControlServer.start(str(tmp_path), Answers())
        assert await asyncio.to_thread(ask, str(tmp_path), control.GetStatus())
        await again.close()

    asyncio.run(run())


def test_lock(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with pytest.raises(FileNotFoundError):
        lock_holder(path)
    holder = Holder(os.getpid(), "mount", "/mnt")
    lock = VolumeLock(path, holder)
    assert lock_holder(path) == (True, holder)
    with pytest.raises(Locked) as caught:
        VolumeLock(path, Holder(1, "check"))
    assert caught.value.holder == holder
    lock.release()
    assert lock_holder(path) == (False, None)
    VolumeLock(path, holder).release()


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    program = (
        "import os, signal, sys\n"
        "from polefs.node.lock import Holder, VolumeLock\n"
        "lock = VolumeLock(sys.argv[1], Holder(os.getpid(), 'check'))\n"
        "print('held', flush=True)\n"
        "signal.pause()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == b"held\n"
        assert lock_holder(path) == (True, Holder(child.pid, "check"))
        with pytest.raises(Locked):
            VolumeLock(path, Holder(1, "mount"))
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert lock_holder(path)[0] is False
    VolumeLock(path, Holder(1, "mount")).release()
