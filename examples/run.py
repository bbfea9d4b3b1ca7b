"""What the examples share: a command line that mounts a file system in the foreground and unmounts it on SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO, get_args

import uvloop

from rawfuse import FileSystem, FuseError, MountOptions, Session, Settings
from rawfuse.negotiate import TransportName


def main(
    make: Callable[[argparse.Namespace], FileSystem],
    name: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Parse ``[options] MOUNTPOINT``, mount what ``make`` returns, and serve it until it is unmounted."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}")
    if add_arguments is not None:
        add_arguments(parser)
    parser.add_argument("mountpoint")
    parser.add_argument("--trace", metavar="FILE", help="write a line per request and reply ('-': standard error)")
    parser.add_argument("--transport", choices=get_args(TransportName), default=Settings.transport)
    parser.add_argument("--asyncio", action="store_true", help="run on asyncio's own event loop instead of uvloop")
    parser.add_argument("--debug", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if arguments.debug else logging.INFO)
    trace = None
    if arguments.trace:
        trace = sys.stderr if arguments.trace == "-" else open(arguments.trace, "w")  # noqa: SIM115
    try:
        with asyncio.Runner(loop_factory=None if arguments.asyncio else uvloop.new_event_loop) as runner:
            settings = Settings(transport=arguments.transport)
            runner.run(_serve(make(arguments), name, arguments.mountpoint, settings, trace))
    except OSError as error:
        sys.exit(f"{name}: {error.strerror or error}")


async def _serve(filesystem: FileSystem, name: str, mountpoint: str, settings: Settings, trace: TextIO | None) -> None:
    options = MountOptions(source=name, subtype=name, allow_other=os.geteuid() == 0)
    session = Session(filesystem, mountpoint, options, settings=settings, trace=trace)
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    await session.mount()
    stopping = loop.create_task(_stop(session, told_to_stop))
    await session.serve()
    stopping.cancel()


async def _stop(session: Session, told_to: asyncio.Event) -> None:
    """Unmount; where files are open, end the connection and have them fail."""
    await told_to.wait()
    try:
        await session.unmount()
    except FuseError:
        await session.unmount(lazy=True)
