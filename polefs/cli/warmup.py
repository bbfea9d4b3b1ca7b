"""``polefs warmup``"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Annotated

import typer

from polefs.node.errors import Refusal

NAME = "warmup"


def command(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files and directories on a mounted volume.")],
) -> None:
    """Fetch files into the cache before they are wanted: those named, and all below the directories named.

    Examples:

      polefs warmup /mnt/data/models

      polefs warmup /mnt/data/a /mnt/data/b
    """
    from polefs.cli.progress import show_progress
    from polefs.cli.target import connect
    from polefs.node.control import Progress, WarmUp
    from polefs.node.mountinfo import mount_of

    wanted: dict[str, list[bytes]] = {}
    for path in paths:
        resolved = os.path.realpath(path)
        mount = mount_of(resolved)
        if mount is None or not mount.is_polefs:
            raise Refusal(errno.EINVAL, f"{path} is not on a mounted volume: polefs status shows what is mounted")
        below = os.path.join(mount.root, os.path.relpath(resolved, mount.mountpoint))
        wanted.setdefault(mount.source, []).append(os.fsencode(below))

    def left() -> Iterator[int]:
        for volume, below in wanted.items():
            with connect(volume) as client:
                for reply in client.request(WarmUp(below)):
                    if isinstance(reply, Progress):
                        yield reply.left

    show_progress(left(), "fetching")
