"""Whether this machine lets us mount, and what a failed mount means to the user."""

from __future__ import annotations

import errno
import os
import shutil

from polefs.node.errors import Refusal

DEVICE = "/dev/fuse"


def check_fuse() -> None:
    """``Refusal``: ENODEV (no /dev/fuse), EACCES (not ours to open), ENOENT (no fusermount3)."""
    if not os.path.exists(DEVICE):
        raise Refusal(
            errno.ENODEV,
            f"{DEVICE} does not exist: load the kernel's FUSE (modprobe fuse), in a container add --device {DEVICE}",
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise Refusal(
            errno.EACCES, f"no permission to open {DEVICE}: run as root, or as a user who may read and write it"
        )
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise Refusal(errno.ENOENT, "fusermount3 is missing, which mounts for users: install the package fuse3")


def explain(error: OSError, mountpoint: str) -> Refusal:
    """The refusal that a failed mount deserves."""
    number = error.errno or errno.EIO
    text = error.strerror or str(error)
    if number in (errno.EPERM, errno.EACCES) and os.geteuid() == 0:
        return Refusal(
            number,
            f"no permission to mount on {mountpoint} ({text}): in a container add --cap-add SYS_ADMIN",
        )
    if "user_allow_other" in text:
        return Refusal(
            number, "option allow_other is not allowed to users: add the line user_allow_other to /etc/fuse.conf"
        )
    return Refusal(number, text if text.startswith("cannot mount") else f"cannot mount on {mountpoint}: {text}")
