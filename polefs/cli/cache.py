"""``polefs cache``"""

from __future__ import annotations

import errno
from typing import Annotated

import typer

from polefs.node.errors import Refusal
from polefs.node.status import CacheStatus

NAME = "cache"


def command(
    target: Annotated[str, typer.Argument(metavar="VOLUME|MOUNTPOINT", help="A mounted volume.")],
    shrink: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove the files used least recently until SIZE is left.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that nothing is using.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the cache of a mounted volume in a bucket, or make it smaller. What is not yet written back is not in it.

    Examples:

      polefs cache /mnt/data

      polefs cache --shrink 10G /mnt/data

      polefs cache --clear /mnt/data
    """
    import msgspec

    from polefs.cli.target import connect
    from polefs.node.control import CacheReply, GetCache, ShrinkCache
    from polefs.node.sizes import parse_size

    if clear and shrink is not None:
        raise Refusal(errno.EINVAL, "--clear and --shrink exclude each other: give one of them", 2)
    if clear or shrink is not None:
        size = 0 if shrink is None else parse_size(shrink)
        with connect(target) as client:
            for _ in client.request(ShrinkCache(size)):
                pass
    with connect(target) as client:
        reply = next(client.request(GetCache()))
    assert isinstance(reply, CacheReply)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(reply.cache), indent=2).decode())
        return
    for label, value in _lines(reply.cache):
        print(f"{label + ':':<12} {value}")


def _lines(cache: CacheStatus) -> list[tuple[str, str]]:
    from polefs.node.sizes import format_size

    read = cache.hits + cache.misses
    rate = f"{100 * cache.hits / read:.1f} % of {format_size(read)} read since the mount" if read else "nothing read"
    return [
        ("directory", cache.directory),
        ("size", f"{format_size(cache.size)} of {format_size(cache.size_limit)}"),
        ("left free", f"{format_size(cache.free_limit)} of its disk"),
        ("files", str(cache.files)),
        ("hit rate", rate),
        ("dirty", f"{format_size(cache.dirty_bytes)} not yet written back"),
    ]
