"""``polefs mount``"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from polefs.node.cache import CacheOptions
from polefs.node.errors import Refusal
from polefs.node.logs import LEVELS
from polefs.node.options import GC_INTERVAL, MountRequest, Options, parse_options
from polefs.node.sizes import parse_duration, parse_size
from polefs.node.volume import default_volume, is_encrypted

NAME = "mount"


def command(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="[VOLUME] MOUNTPOINT", help="The volume (default: your own) and where to mount it."),
    ],
    options: Annotated[
        list[str] | None, typer.Option("-o", metavar="OPTION,...", help="Mount options, as mount(8) takes them.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("-f", "--foreground", help="Stay in the foreground, log to stderr.")
    ] = False,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help=f"One of {', '.join(LEVELS)}.")] = "info",
    log_file: Annotated[str | None, typer.Option(metavar="FILE", help="Log to this file instead.")] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write every request of the kernel and its reply to this file.")
    ] = None,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The key of an encrypted volume, or its passphrase.")
    ] = None,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="DIRECTORY", help="Where to cache contents; default: in the volume.")
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes that the cache takes; default: 100G.")
    ] = None,
    cache_free: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that it leaves free on its disk; default: a twentieth.")
    ] = None,
    store_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="How long a bucket may be out of reach until programs get errors; default: 5m."
        ),
    ] = None,
    dirty_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most bytes not yet written back; default: half of the free space."),
    ] = None,
    gc_interval: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Between passes of garbage collection; 0: none. Default: 1h."),
    ] = None,
    profile: Annotated[str | None, typer.Option(metavar="FILE", hidden=True)] = None,
) -> None:
    """Mount a volume. Returns when the mount can be used.

    VOLUME is a directory, made on first use; the default is polefs/default in your data directory
    ($XDG_DATA_HOME, ~/.local/share). As root the mount is for everybody.

    Options: ro, rw, noatime, relatime, strictatime, nodiratime, nosuid, nodev, noexec, sync, dirsync, allow_other,
    noallow_other, nonempty, volume=DIRECTORY, key_file=FILE, cache_dir=DIRECTORY, cache_size=SIZE, cache_free=SIZE,
    store_timeout=DURATION, dirty_limit=SIZE, gc_interval=DURATION,
    passthrough=off|read|all.

    Durations are like 90s, 5m or 1h; a store_timeout of 0 is for ever. A volume in a bucket that is out of reach is
    mounted all the same.

    Only volumes in a bucket have a cache. With passthrough=read files that are cached as a whole are read by the
    kernel itself, which is so by default on read-only mounts; with passthrough=all new files are written by it too.

    The passphrase of an encrypted volume is asked for when there is neither a key file nor $POLEFS_PASSPHRASE.

    Examples:

      polefs mount ~/polefs

      polefs mount /srv/volume /mnt/data

      polefs mount -o ro,noexec /srv/volume /mnt/data

      polefs mount -f --log-level debug --trace /tmp/wire.log /srv/volume /mnt/data
    """
    if len(paths) > 2:
        raise Refusal(errno.EINVAL, "too many arguments: give polefs mount [VOLUME] MOUNTPOINT", 2)
    parsed = parse_options(options or [])
    volume = paths[0] if len(paths) == 2 else None
    if volume is not None and parsed.volume is not None:
        raise Refusal(errno.EINVAL, "the volume is given twice: as an argument and with -o volume", 2)
    parsed.key_file = key_file or parsed.key_file
    parsed.cache_dir = cache_dir or parsed.cache_dir
    parsed.cache_size = cache_size or parsed.cache_size
    parsed.cache_free = cache_free or parsed.cache_free
    parsed.store_timeout = store_timeout or parsed.store_timeout
    parsed.dirty_limit = dirty_limit or parsed.dirty_limit
    parsed.gc_interval = gc_interval or parsed.gc_interval
    request = make_request(volume, paths[-1], parsed)
    request.log_level = check_level(log_level)
    request.log_file = _absolute(log_file)
    request.trace = _absolute(trace)
    request.profile = _absolute(profile)
    request.foreground = foreground
    mount(request)


def make_request(volume: str | None, mountpoint: str, options: Options) -> MountRequest:
    """The request that paths and options make. Mounts of root are for everybody unless the options say otherwise."""
    for what, path in (("volume", volume), ("mount point", mountpoint)):
        if path == "":
            raise Refusal(errno.EINVAL, f"the {what} is an empty string: give a directory", 2)
    directory = os.path.abspath(volume or options.volume or default_volume())
    return MountRequest(
        volume=directory,
        mountpoint=os.path.abspath(mountpoint),
        flags=options.flags,
        allow_other=os.geteuid() == 0 if options.allow_other is None else options.allow_other,
        nonempty=options.nonempty,
        passthrough=options.passthrough,
        secret=volume_secret(directory, options.key_file),
        cache=CacheOptions(
            directory=_absolute(options.cache_dir),
            size=None if options.cache_size is None else parse_size(options.cache_size),
            free=None if options.cache_free is None else parse_size(options.cache_free),
        ),
        store_timeout=None if options.store_timeout is None else parse_duration(options.store_timeout),
        dirty_limit=None if options.dirty_limit is None else parse_size(options.dirty_limit),
        gc_interval=GC_INTERVAL if options.gc_interval is None else parse_duration(options.gc_interval),
    )


def volume_secret(volume: str, key_file: str | None) -> bytes | None:
    """What opens the volume, asked for when it is encrypted; None when it is not, or does not exist yet."""
    if not is_encrypted(volume):
        if key_file is not None:
            raise Refusal(errno.EINVAL, f"volume {volume} is not encrypted: leave the key file away", 2)
        return None
    from polefs.node.secret import read_secret

    return read_secret(key_file, volume)


def check_level(level: str) -> str:
    if level.lower() not in LEVELS:
        raise Refusal(errno.EINVAL, f"unknown log level '{level}': the levels are {', '.join(LEVELS)}", 2)
    return level.lower()


def mount(request: MountRequest) -> None:
    """Mount as asked: serve here until unmounted, or start the daemon and return when the mount is ready."""
    if request.foreground:
        from polefs.node.daemon import run

        run(request, lambda warning: None)
    else:
        from polefs.node.background import start

        warning = start(request)
        if warning is not None:
            print(f"polefs: {warning}", file=sys.stderr)


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)
