"""``polefs load``"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Annotated, BinaryIO

import typer

from polefs.node.errors import Refusal

NAME = "load"


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What polefs dump has written; -: standard input.")],
    volume: Annotated[str, typer.Argument(metavar="VOLUME", help="A new directory, or postgresql://HOST/DATABASE.")],
    name: Annotated[str | None, typer.Option(help="A name for it; default: that of the dumped volume.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a volume of a dump. Nobody sees it before it is whole, and nothing is left when that fails.

    It is the same volume in another place, with the same objects: use only one of the two from then on. Where the
    objects were in the directory of the volume, move its directory `objects` to the new one as well.

    Examples:

      polefs load volume.dump /srv/new

      polefs dump /srv/volume | polefs load - postgresql://db/polefs --name data
    """
    from polefs.cli.dump import print_summary
    from polefs.cli.progress import show_phases
    from polefs.node.dump import load_volume

    with open_dump(file) as stream:
        found = os.fstat(stream.fileno())
        size = found.st_size if stat.S_ISREG(found.st_mode) else None
        with show_phases() as show:
            summary = load_volume(stream, size, volume, name, show)
    print_summary("loaded", summary, as_json=as_json)


def open_dump(file: str) -> BinaryIO:
    if file == "-":
        if sys.stdin.isatty():
            raise Refusal(errno.EINVAL, "a dump does not come from a terminal: give a FILE, or redirect the input", 2)
        return open(os.dup(sys.stdin.fileno()), "rb")
    return open(file, "rb")
