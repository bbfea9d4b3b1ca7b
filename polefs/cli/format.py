"""``polefs format``"""

from __future__ import annotations

import os
from typing import Annotated

import typer

NAME = "format"


def command(
    volume: Annotated[str, typer.Argument(metavar="VOLUME", help="The directory to make it in: new, or empty.")],
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes that files may take up, like 10G; default: no limit.")
    ] = None,
    inodes: Annotated[int, typer.Option(min=0, metavar="N", help="Most files and directories; 0: no limit.")] = 0,
    name: Annotated[str | None, typer.Option(help="A name for people; default: that of the directory.")] = None,
) -> None:
    """Make a volume. Only needed for one with limits: `polefs mount` makes volumes on first use.

    Examples:

      polefs format --capacity 100G --inodes 1000000 /srv/volume
    """
    from polefs.cli.sizes import parse_size
    from polefs.node.lock import Holder
    from polefs.node.volume import make_volume

    limit = 0 if capacity is None else parse_size(capacity)
    made = make_volume(volume, Holder(os.getpid(), "format"), name=name, bytes_limit=limit, inodes_limit=inodes)
    made.unlock()
    print(f"{made.path}: volume '{made.info.name}', {made.info.uuid}")
