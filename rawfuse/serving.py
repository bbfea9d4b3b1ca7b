"""The life of a program that serves one file system: mount, serve, and unmount when it is told to end."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType
from typing import TextIO

from rawfuse.errors import FuseError
from rawfuse.filesystem import FileSystem
from rawfuse.mount import MountOptions
from rawfuse.negotiate import Settings
from rawfuse.session import Session

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
    ENOTCONN from there on. Afterwards both are ignored, because the program is about to end."""
    told_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(told_to_end.set)

    for number in _SIGNALS:
        signal.signal(number, tell)  # a handler of the loop would end with it, and a second signal kill the program
    await session.mount()
    unmounting = loop.create_task(_unmount(session, told_to_end))
    await session.serve()
    unmounting.cancel()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


async def _unmount(session: Session, told_to_end: asyncio.Event) -> None:
    await told_to_end.wait()
    try:
        await session.unmount()
    except FuseError:
        await session.unmount(lazy=True)
