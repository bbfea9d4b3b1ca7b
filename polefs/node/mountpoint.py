"""Whether a directory can become a mount point, and why not."""

from __future__ import annotations

import errno
import os
import stat

from polefs.node.errors import Refusal
from polefs.node.mountinfo import find_mount, resolve
from polefs.node.volume import is_locked


def check_mountpoint(path: str, volume: str, *, nonempty: bool = False) -> str:
    """The resolved mount point. Raises ``Refusal``: ENOENT, ENOTDIR, ENOTEMPTY, EBUSY (something is mounted there),
    ENOTCONN (a mount whose daemon has died), EINVAL (inside the volume, or around it), EACCES."""
    try:
        resolved = resolve(path)
        _refuse_mounted(resolved)
        mode = os.lstat(resolved).st_mode
    except FileNotFoundError:
        raise Refusal(errno.ENOENT, f"mount point {path} does not exist: make it first (mkdir -p {path})") from None
    except NotADirectoryError:
        raise Refusal(errno.ENOTDIR, f"mount point {path} is not a directory: give a directory") from None
    except Refusal:
        raise
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise _dead(path) from None
        raise Refusal(error.errno or errno.EIO, f"cannot use mount point {path}: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise Refusal(errno.ENOTDIR, f"mount point {path} is not a directory: give a directory")
    _refuse_nested(resolved, os.path.realpath(volume))
    if os.geteuid() != 0 and not os.access(resolved, os.W_OK | os.X_OK):
        raise Refusal(errno.EACCES, f"no permission to mount on {path}: give a directory that you own")
    if not nonempty and not _is_empty(path, resolved):
        raise Refusal(
            errno.ENOTEMPTY,
            f"mount point {path} is not empty: give an empty directory, or hide its files with -o nonempty",
        )
    return resolved


def _refuse_mounted(path: str) -> None:
    mount = find_mount(path)
    if mount is None:
        return
    if not mount.is_polefs:
        raise Refusal(
            errno.EBUSY,
            f"{path} is already a mount point, of {mount.source} ({mount.fstype}): unmount it or give another",
        )
    if not is_locked(mount.source):
        raise _dead(path)
    raise Refusal(
        errno.EBUSY,
        f"{mount.source} is already mounted on {path}: unmount it first (polefs umount {path}) or give another",
    )


def _dead(path: str) -> Refusal:
    return Refusal(
        errno.ENOTCONN,
        f"{path} is a dead mount, its file system's process has ended: unmount it first (polefs umount {path})",
    )


def _refuse_nested(mountpoint: str, volume: str) -> None:
    """A daemon that reaches its own files through its own mount waits for itself for ever."""
    if os.path.commonpath((mountpoint, volume)) == volume:
        raise Refusal(errno.EINVAL, f"mount point {mountpoint} lies inside the volume {volume}: give one outside of it")
    if os.path.commonpath((mountpoint, volume)) == mountpoint:
        raise Refusal(errno.EINVAL, f"mount point {mountpoint} would hide the volume {volume}: give another directory")


def _is_empty(path: str, resolved: str) -> bool:
    try:
        with os.scandir(resolved) as entries:
            return next(entries, None) is None
    except OSError as error:
        raise Refusal(error.errno or errno.EIO, f"cannot read mount point {path}: {error.strerror}") from None
