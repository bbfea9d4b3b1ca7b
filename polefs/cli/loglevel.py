"""``polefs log-level``"""

from __future__ import annotations

from typing import Annotated

import typer

from polefs.node.logs import LEVELS

NAME = "log-level"


def command(
    target: Annotated[str, typer.Argument(metavar="VOLUME|MOUNTPOINT", help="A mounted volume.")],
    level: Annotated[str, typer.Argument(metavar="LEVEL", help=f"One of {', '.join(LEVELS)}.")],
) -> None:
    """Change how much the daemon of a mounted volume logs, until it is unmounted.

    Example:

      polefs log-level /mnt/data debug
    """
    from polefs.cli.mount import check_level
    from polefs.cli.target import connect
    from polefs.node.control import SetLogLevel

    with connect(target) as client:
        for _ in client.request(SetLogLevel(check_level(level))):
            pass
