"""``polefs format``"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Annotated

import typer

from polefs.cli.store import CaBundle, Endpoint, PathStyle, Region, parse_store
from polefs.node.errors import Refusal

if TYPE_CHECKING:
    from polefs.node.volume import Contents
    from polefs.objects.location import S3Location

NAME = "format"

GRACE = 3600.0
"""Seconds that objects are kept which nothing refers to any more, unless options say otherwise."""


def command(
    volume: Annotated[str, typer.Argument(metavar="VOLUME", help="The directory to make it in: new, or empty.")],
    store: Annotated[
        str | None,
        typer.Option(metavar="s3://BUCKET[/PREFIX]", help="Where contents are kept; default: in the directory."),
    ] = None,
    endpoint: Endpoint = None,
    region: Region = None,
    path_style: PathStyle = None,
    ca_bundle: CaBundle = None,
    compress: Annotated[
        str, typer.Option(metavar="zstd|lz4|none", help="Compress contents in the bucket.", show_default=True)
    ] = "none",
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Encrypt contents in the bucket (AES-256-GCM); names are not in it.")
    ] = False,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --encrypt: the key, or a passphrase; default: asked for.")
    ] = None,
    durability: Annotated[
        str | None,
        typer.Option(metavar="s3|local", help="Where contents are safe when fsync returns; default: in the bucket."),
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="How long objects stay in the bucket that nothing refers to any more; default: 1h."
        ),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes that files may take up, like 10G; default: no limit.")
    ] = None,
    inodes: Annotated[int, typer.Option(min=0, metavar="N", help="Most files and directories; 0: no limit.")] = 0,
    name: Annotated[str | None, typer.Option(help="A name for people; default: that of the directory.")] = None,
) -> None:
    """Make a volume. `polefs mount` makes volumes without limits in a directory by itself, on first use.

    Credentials for S3 are taken from the environment, ~/.aws or the instance, at each mount; they are never stored.

    Examples:

      polefs format --capacity 100G --inodes 1000000 /srv/volume

      polefs format --store s3://bucket/data --compress zstd /srv/volume

      polefs format --store s3://data --endpoint https://minio:9000 --encrypt --key-file key /srv/volume
    """
    from polefs.node.lock import Holder
    from polefs.node.sizes import parse_duration, parse_size
    from polefs.node.volume import Contents, make_volume

    limit = 0 if capacity is None else parse_size(capacity)
    contents = Contents()
    if store is not None:
        location = parse_store(store, endpoint=endpoint, region=region, path_style=path_style, ca_bundle=ca_bundle)
        contents = _in_s3(location, compress, durability or "s3", GRACE if grace is None else parse_duration(grace))
    elif (
        encrypt
        or compress != "none"
        or any(each is not None for each in (endpoint, region, path_style, ca_bundle, grace))
    ):
        raise Refusal(errno.EINVAL, "this needs a bucket: give --store s3://BUCKET[/PREFIX] too", 2)
    elif durability not in (None, "local"):
        raise Refusal(errno.EINVAL, "--durability s3 needs a bucket: give --store s3://BUCKET[/PREFIX] too", 2)
    secret: bytes | None = None
    if encrypt:
        from polefs.node.secret import read_secret

        secret = read_secret(key_file, volume, new=True)
    elif key_file is not None:
        raise Refusal(errno.EINVAL, "--key-file is for encrypted volumes: give --encrypt too", 2)
    holder = Holder(os.getpid(), "format")
    made = make_volume(
        volume, holder, name=name, bytes_limit=limit, inodes_limit=inodes, contents=contents, secret=secret
    )
    made.unlock()
    print(f"{made.path}: volume '{made.info.name}', {made.info.uuid}")


def _in_s3(location: S3Location, compression: str, durability: str, grace: float) -> Contents:
    import msgspec

    from polefs.node.volume import Contents

    try:
        options = {"compression": compression, "durability": durability, "grace": grace}
        contents = msgspec.convert(options, Contents)
    except msgspec.ValidationError:
        raise Refusal(errno.EINVAL, "give --compress zstd, lz4 or none, and --durability s3 or local", 2) from None
    return msgspec.structs.replace(contents, objects=location)
