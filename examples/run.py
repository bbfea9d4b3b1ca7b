"""What the examples share: a command line that mounts a file system in the foreground and unmounts it on SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable
from typing import get_args

import uvloop

from rawfuse import FileSystem, MountOptions, Session, Settings, serve
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
            options = MountOptions(source=name, subtype=name, allow_other=os.geteuid() == 0)
            session = Session(make(arguments), arguments.mountpoint, options, settings=settings, trace=trace)
            runner.run(serve(session))
    except OSError as error:
        sys.exit(f"{name}: {error.strerror or error}")
