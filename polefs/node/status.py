"""What is known of a volume: from its daemon while it is mounted, from its files otherwise."""

from __future__ import annotations

import msgspec


class CacheStatus(msgspec.Struct, kw_only=True):
    """Sizes are bytes."""

    directory: str
    size: int
    size_limit: int
    free_limit: int
    """Left free on its file system."""
    files: int
    hits: int
    misses: int
    """What has been read from files since the mount: what was cached, and what had to be fetched."""
    dirty_bytes: int
    """Not yet written back; these are not in the cache."""


class Status(msgspec.Struct, kw_only=True):
    """Sizes are bytes; limits of 0 mean none. Fields of the daemon are None while the volume is not mounted."""

    volume: str
    name: str
    uuid: str
    format: int
    store: str | None
    """Where contents are, ``s3://bucket/prefix``; None: in the volume's directory."""
    endpoint: str | None
    """Of the S3 server; None: AWS, or there is none."""
    mounted: bool
    bytes_used: int
    bytes_limit: int
    inodes_used: int
    inodes_limit: int
    dirty_bytes: int | None = None
    """Contents not yet written back to the object store; the volume's local directory holds them."""
    store_away: float | None = None
    """Seconds since which the bucket is out of reach, as far as anybody has tried; None when it is not."""
    mountpoint: str | None = None
    """With ``mounted`` and ``saving`` not set: a dead mount, whose daemon was killed."""
    pid: int | None = None
    since: str | None = None
    """When it was mounted, ISO 8601 with the zone."""
    read_only: bool | None = None
    saving: bool | None = None
    """Unmounted, still writing back."""
    log_file: str | None = None
    """None also when the daemon logs to stderr."""
    log_level: str | None = None
    version: str | None = None
    """Of the polefs that has mounted it."""
