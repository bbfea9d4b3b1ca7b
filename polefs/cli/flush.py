"""``polefs flush``"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

NAME = "flush"


def command(
    target: Annotated[str, typer.Argument(metavar="VOLUME|MOUNTPOINT", help="A mounted volume.")],
) -> None:
    """Write back all dirty contents of a mounted volume to its object store, and wait for it.

    Example:

      polefs flush /mnt/data
    """
    from polefs.cli.progress import show_progress
    from polefs.cli.target import connect

    def remaining() -> Iterator[int]:
        from polefs.node.control import Flush, Progress

        with connect(target) as client:
            for reply in client.request(Flush()):
                if isinstance(reply, Progress):
                    yield reply.left

    show_progress(remaining(), "writing back")
