"""The cache of a mount: where it is, and how large it may become."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import msgspec

from polefs.node.errors import Refusal, plain
from polefs.objects.location import DirectoryLocation

if TYPE_CHECKING:
    from polefs.data.cache.directory import CacheDirectory
    from polefs.data.cache.store import CacheLimits
    from polefs.node.volume import Volume

SIZE = 100 << 30
"""Most bytes, unless options say otherwise."""

FREE_PART = 20
"""One part in so many of its file system is left free, and 256 MiB or a quarter, unless options say otherwise."""


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """None: as it is by default."""

    directory: str | None = None
    """An absolute path. Each volume has a directory of its own in it, named by its uuid; by default it is ``cache`` in
    the volume's own."""
    size: int | None = None
    """Most bytes that it takes."""
    free: int | None = None
    """Bytes of its file system that it leaves free."""


def open_cache(volume: Volume, options: CacheOptions) -> tuple[CacheDirectory, CacheLimits] | None:
    """The cache of a volume; None for one that keeps its contents in a local directory. ``Refusal`` when it cannot be
    used."""
    from polefs.client.space import reserve_of
    from polefs.data.cache.directory import CacheDirectory
    from polefs.data.cache.store import CacheLimits

    if isinstance(volume.info.contents.objects, DirectoryLocation):
        if options != CacheOptions():
            raise Refusal(
                errno.EINVAL,
                f"volume {volume.path} keeps its contents in a local directory and has no cache: leave out the options "
                "of the cache",
                2,
            )
        return None
    path = volume.cache
    if options.directory is not None:
        path = os.path.join(options.directory, volume.info.uuid)
    try:
        directory = CacheDirectory.open(path, volume.info.uuid)
        free = options.free
        if free is None:
            found = os.statvfs(path)
            total = found.f_blocks * found.f_frsize
            # Contents that are not written back leave so much free as well; what is cached must not keep them waiting.
            free = max(total // FREE_PART, 2 * reserve_of(total))
    except OSError as error:
        message = plain(error) if error.filename is None else f"cannot use the cache directory {path}: {error.strerror}"
        raise Refusal(error.errno or errno.EIO, message) from error
    return directory, CacheLimits(options.size or SIZE, free)
