"""``polefs fsck``"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from polefs.node.errors import Refusal, plain

NAME = "fsck"

REPAIRED, LEFT, FAILED = 1, 4, 8
"""Exit statuses of fsck(8); 0 means clean."""


def command(
    volume: Annotated[str, typer.Argument(metavar="VOLUME", help="A volume that is not mounted.")],
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    data: Annotated[bool, typer.Option("--data", help="Read all contents and compare their checksums.")] = False,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The key of an encrypted volume, or its passphrase.")
    ] = None,
) -> None:
    """Check a volume: all metadata, and that every object is there with its size.

    Exit statuses are those of fsck(8): 0 clean, 1 all repaired, 4 problems left, 8 not checked. What has lost its name
    is put under /lost+found by --repair.

    Examples:

      polefs fsck /srv/volume

      polefs fsck --data --repair /srv/volume
    """
    try:
        status = check(volume, mend=repair, data=data, key_file=key_file)
    except OSError as error:
        raise Refusal(error.errno or 0, plain(error), FAILED) from error
    raise typer.Exit(status)


def check(path: str, *, mend: bool, data: bool, key_file: str | None = None) -> int:
    """Check a volume and print what is found; the exit status. OSError when it cannot be checked."""
    import asyncio

    from polefs.cli.mount import volume_secret
    from polefs.node.fsck import check_volume
    from polefs.node.lock import Holder
    from polefs.node.volume import open_volume

    def say(line: str) -> None:
        print(f"{volume.path}: {line}")

    volume = open_volume(path)
    # Metadata can be checked without the key; contents cannot, nor brought in.
    secret = volume_secret(path, key_file) if data or mend or key_file is not None else None
    volume.lock(Holder(os.getpid(), "check"))
    try:
        outcome = asyncio.run(check_volume(volume, say, data=data, mend=mend, secret=secret))
    finally:
        volume.unlock()
    if outcome.left:
        hint = f": {outcome.repairable} can be repaired with --repair" if outcome.repairable else ""
        print(f"{volume.path}: {outcome.left} problems left, {outcome.repaired} repaired{hint}")
        return LEFT
    if outcome.repaired:
        print(f"{volume.path}: {outcome.repaired} problems, all repaired")
        return REPAIRED
    print(f"{volume.path}: clean")
    return 0
