"""Where a volume's objects are: what ``volume.json`` says, and the URLs that people write. Never any credentials."""

from __future__ import annotations

import errno
import re
import urllib.parse

import msgspec

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]|arn:[A-Za-z0-9:/._-]+")
"""Names of S3 buckets, with the freedom that other servers and old buckets have, and ARNs of access points."""

_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()=@+,-]+(?:/[A-Za-z0-9!_.*'()=@+,-]+)*")
_PREFIX_MAX = 512
"""Bytes; S3 keys have 1024."""


class DirectoryLocation(msgspec.Struct, frozen=True, tag="directory", tag_field="kind"):
    """The directory ``objects`` of the volume."""


class S3Location(msgspec.Struct, frozen=True, kw_only=True, tag="s3", tag_field="kind", omit_defaults=True):
    """A prefix of a bucket on AWS or on a compatible server."""

    bucket: str
    prefix: str = ""
    """Without ``/`` at its ends; empty: the whole bucket."""
    endpoint: str | None = None
    """``http(s)://host[:port]``; None: AWS."""
    region: str | None = None
    """None: what the environment says."""
    path_style: bool | None = None
    """Whether the bucket stands in the path, not in the host name; None: where there is an ``endpoint``, and on AWS for
    buckets with dots."""
    ca_bundle: str | None = None
    """A file with the certificates to trust; None: what the environment says, or the system's."""
    conditional_put: bool = True
    """Whether the server refuses to overwrite an object when it is asked to (``If-None-Match: *``)."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def key(self, name: str) -> str:
        """The key in the bucket of what is ``name`` in the volume."""
        return f"{self.prefix}/{name}" if self.prefix else name


Location = DirectoryLocation | S3Location


def parse_url(
    url: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    path_style: bool | None = None,
    ca_bundle: str | None = None,
) -> S3Location:
    """``s3://BUCKET[/PREFIX]``. OSError EINVAL says in one line what is wrong with it."""
    scheme, separator, rest = url.partition("://")
    if scheme != "s3" or not separator:
        raise _invalid(f"'{url}' is no address of an object store: write it like s3://bucket/prefix")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:
        raise _invalid("an address must not hold credentials: put them into the environment or ~/.aws/credentials")
    if not _BUCKET.fullmatch(bucket):
        raise _invalid(f"'{bucket}' is no name of a bucket: write the address like s3://bucket/prefix")
    prefix = prefix.strip("/")
    if prefix and (not _PREFIX.fullmatch(prefix) or set(prefix.split("/")) & {".", ".."}):
        raise _invalid(f"'{prefix}' cannot be a prefix: use letters, digits, and the characters / - _ . = + @ , ! ( )")
    if len(prefix) > _PREFIX_MAX:
        raise _invalid(f"the prefix is longer than {_PREFIX_MAX} characters: use a shorter one")
    return S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=None if endpoint is None else _parse_endpoint(endpoint),
        region=region,
        path_style=path_style,
        ca_bundle=ca_bundle,
    )


def _parse_endpoint(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or past 65535
        usable = False
    if not usable or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise _invalid(f"'{text}' is no endpoint: write it like https://host or http://host:port")
    if parts.username is not None:
        raise _invalid("an endpoint must not hold credentials: put them into the environment or ~/.aws/credentials")
    return f"{parts.scheme}://{parts.netloc}"


def _invalid(text: str) -> OSError:
    return OSError(errno.EINVAL, text)
