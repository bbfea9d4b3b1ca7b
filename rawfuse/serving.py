"""The life of a program that serves one file system: mount, serve, and unmount when it is told to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TextIO

from rawfuse.errors import FuseError
from rawfuse.filesystem import FileSystem
from rawfuse.mount import MountOptions
from rawfuse.negotiate import Settings
from rawfuse.session import Session

_Way = Callable[[Session], Coroutine[Any, Any, None]]


def run(
    filesystem: FileSystem,
    mountpoint: str,
    options: MountOptions | None = None,
    *,
    settings: Settings | None = None,
    trace: TextIO | None = None,
) -> None:
    """Mount and serve, on uvloop, until it is unmounted; SIGTERM and SIGINT unmount it. ``OSError`` with a text that
    says why it cannot be mounted."""
    import uvloop  # not before: who brings an event loop of his own does not need it

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Session(filesystem, mountpoint, options, settings=settings, trace=trace)))


async def serve(session: Session) -> None:
    """Mount and serve until it is unmounted. SIGTERM and SIGINT unmount it; programs that have files open then get
    ENOTCONN from there on. With a keeper SIGHUP leaves the mount to the next process. Afterwards these signals are
    ignored, because the program is about to end."""
    loop = asyncio.get_running_loop()
    ways_to_end: dict[signal.Signals, _Way] = {signal.SIGTERM: _unmount, signal.SIGINT: _unmount}
    if session.filesystem.keeper is not None:
        ways_to_end[signal.SIGHUP] = _hand_over
    told: asyncio.Future[_Way] = loop.create_future()

    def tell(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(end_by, ways_to_end[signal.Signals(number)])

    def end_by(way: _Way) -> None:
        if not told.done():
            told.set_result(way)

    for number in ways_to_end:
        signal.signal(number, tell)  # a handler of the loop would end with it, and a second signal kill the program
    await session.mount()
    ending = loop.create_task(_end(session, told))
    await session.serve()
    ending.cancel()
    for number in ways_to_end:
        signal.signal(number, signal.SIG_IGN)


async def _end(session: Session, told: asyncio.Future[_Way]) -> None:
    await (await told)(session)


async def _unmount(session: Session) -> None:
    try:
        await session.unmount()
    except FuseError:
        await session.unmount(lazy=True)


async def _hand_over(session: Session) -> None:
    await session.hand_over()
