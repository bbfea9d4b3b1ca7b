"""The options that say where a bucket is."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Annotated

import typer

from polefs.node.errors import Refusal, plain

if TYPE_CHECKING:
    from polefs.objects.location import S3Location

Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="An S3 server other than AWS, like https://host:9000.")
]
Region = Annotated[str | None, typer.Option(help="The bucket's region; default: as the environment says.")]
PathStyle = Annotated[
    bool | None,
    typer.Option(
        "--path-style/--virtual-hosted",
        help="Whether the bucket's name goes into the path or the host name; default: as it fits.",
        show_default=False,
    ),
]
CaBundle = Annotated[
    str | None, typer.Option(metavar="FILE", help="Certificates to trust; default: AWS_CA_BUNDLE, or the system's.")
]


def parse_store(
    url: str, *, endpoint: str | None, region: str | None, path_style: bool | None, ca_bundle: str | None
) -> S3Location:
    """``Refusal`` for what makes no sense."""
    from polefs.objects.location import parse_url

    if ca_bundle is not None:
        ca_bundle = os.path.abspath(ca_bundle)
        if not os.path.isfile(ca_bundle):
            raise Refusal(errno.ENOENT, f"there is no file {ca_bundle}: give a file with certificates in PEM form", 2)
    try:
        return parse_url(url, endpoint=endpoint, region=region, path_style=path_style, ca_bundle=ca_bundle)
    except OSError as error:
        raise Refusal(errno.EINVAL, plain(error), 2) from None
