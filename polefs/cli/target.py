"""Arguments that name a volume by its directory or by where it is mounted."""

from __future__ import annotations

import errno

from polefs.node.control import ControlClient
from polefs.node.errors import Refusal
from polefs.node.mountinfo import find_mount, resolve


def volume_of(target: str) -> str:
    """The volume directory of a VOLUME or MOUNTPOINT argument. ``Refusal`` for a mount of something else. The mount
    itself is not touched: it may be dead."""
    path = resolve(target)
    mount = find_mount(path)
    if mount is None:
        return path
    return mount.source if mount.is_polefs else path


def connect(target: str) -> ControlClient:
    """The daemon of a mounted volume. ``Refusal`` ENOTCONN when it is not mounted."""
    volume = volume_of(target)
    client = ControlClient.connect(volume)
    if client is None:
        raise Refusal(
            errno.ENOTCONN, f"volume {volume} is not mounted: mount it first (polefs mount {volume} MOUNTPOINT)"
        )
    return client
