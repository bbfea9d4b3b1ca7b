"""``polefs umount``"""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "umount"


def command(
    mountpoint: Annotated[str, typer.Argument(metavar="MOUNTPOINT", help="Where the volume is mounted.")],
    lazy: Annotated[
        bool, typer.Option("-l", "--lazy", help="Also while programs use it; they get errors from then on.")
    ] = False,
) -> None:
    """Unmount. Returns when everything is written back and the daemon has ended.

    When the bucket is out of reach it ends with an error that says how much could not be written back; that is kept in
    the volume, and goes up at the next mount.

    Also removes the mount of a daemon that was killed; the next mount of its volume brings back all that was written.

    Examples:

      polefs umount /mnt/data

      polefs umount --lazy /mnt/data
    """
    from polefs.cli.progress import show_progress
    from polefs.node.unmount import unmount

    show_progress(unmount(mountpoint, lazy=lazy), "writing back")
