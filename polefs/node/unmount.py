"""Unmounting from a command: by the daemon while it lives, by ourselves when it is dead."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator

from polefs.node import control
from polefs.node.errors import Refusal
from polefs.node.mountinfo import Mount, find_mount, resolve

PATIENCE = 30.0
"""How long the daemon may say nothing, seconds."""


def find_polefs_mount(path: str) -> Mount:
    """The polefs mount at a path. ``Refusal`` EINVAL when there is none."""
    resolved = resolve(path)
    mount = find_mount(resolved)
    if mount is None:
        raise Refusal(errno.EINVAL, f"nothing is mounted on {path}: polefs status shows what is mounted")
    if not mount.is_polefs:
        raise Refusal(errno.EINVAL, f"{path} is no polefs mount but {mount.fstype}: unmount it with umount {path}")
    return mount


def unmount(path: str, *, lazy: bool = False) -> Iterator[int]:
    """Unmount, yielding the bytes still to be written back now and then; at the end everything is saved and the daemon
    has ended. ``Refusal``: EBUSY when programs use it, unless ``lazy``; ETIMEDOUT when the daemon does not answer,
    unless ``lazy``, which then detaches the mount alone."""
    mount = find_polefs_mount(path)
    client = _daemon_of(mount)
    if client is not None:
        with client:
            try:
                yield from _ask(client, lazy)
            except TimeoutError:
                if not lazy:
                    raise Refusal(
                        errno.ETIMEDOUT,
                        f"the daemon of {path} (process {client.pid}) does not answer: detach the mount with "
                        f"polefs umount --lazy {path}",
                    ) from None
    if find_mount(mount.mountpoint) == mount:
        _unmount_now(mount.mountpoint, lazy=lazy)


def _ask(client: control.ControlClient, lazy: bool) -> Iterator[int]:
    """Let the daemon do it, and wait until it has ended."""
    process = _process(client.pid)
    try:
        for reply in client.request(control.Unmount(lazy), patience=PATIENCE):
            if isinstance(reply, control.Progress):
                yield reply.left
        if process is not None:
            select.select([process], [], [])
    finally:
        if process is not None:
            os.close(process)


def _unmount_now(mountpoint: str, *, lazy: bool) -> None:
    """umount2(2), or fusermount3 for users. ``Refusal`` with the errno of the call."""
    from rawfuse.mount import unmount as unmount_device

    try:
        unmount_device(mountpoint, lazy=lazy)
    except OSError as error:
        hint = ": end the programs that use it, or give --lazy" if error.errno == errno.EBUSY else ""
        raise Refusal(error.errno or errno.EIO, f"{error.strerror}{hint}") from None


def _daemon_of(mount: Mount) -> control.ControlClient | None:
    """The daemon that serves exactly this mount; None when it is dead or serves another (this one is a bind mount)."""
    client = control.ControlClient.connect(mount.source)
    if client is None:
        return None
    with client:
        try:
            for reply in client.request(control.GetStatus(), patience=PATIENCE):
                if isinstance(reply, control.StatusReply) and reply.status.mountpoint != mount.mountpoint:
                    return None
        except (TimeoutError, ConnectionError):
            pass
    return control.ControlClient.connect(mount.source)


def _process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None when it has, or lives in another pid namespace."""
    try:
        return os.pidfd_open(pid) if pid else None
    except ProcessLookupError:
        return None
