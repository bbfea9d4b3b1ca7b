"""Mount points of the servers under test: a private mount namespace, waiting for a mount, unmounting without hanging.

Nothing here looks into a mount, so a dead or stuck server cannot block the caller.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x00020000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_FORCE = 1
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter_private_namespace() -> None:
    """Give this process a mount namespace of its own, which ends with its last process, and make it the reaper of
    the processes that its servers leave behind. EPERM without CAP_SYS_ADMIN."""
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount --make-rprivate /")
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def mount_tmpfs(mountpoint: str) -> None:
    """Memory to work in, until the namespace ends."""
    _check(_libc.mount(b"bench", mountpoint.encode(), b"tmpfs", 0, b"mode=755"), "mount tmpfs")


def die_with_parent(signal_number: int) -> None:
    """To be called in a child between fork and exec: it gets the signal when its parent ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def is_mounted(mountpoint: str) -> bool:
    """Whether something is mounted exactly there, by mountinfo."""
    with open("/proc/self/mountinfo") as file:
        return any(line.split(" ", 5)[4] == mountpoint for line in file)


def wait_for_mount(mountpoint: str, deadline: float, alive: Callable[[], bool]) -> bool:
    """Wait until it is mounted: True, or False when ``alive`` says no or the deadline (time.monotonic) has passed."""
    with open("/proc/self/mountinfo") as changes:
        poll = select.poll()
        poll.register(changes, select.POLLPRI)
        while not is_mounted(mountpoint):
            if not alive() or time.monotonic() > deadline:
                return False
            poll.poll(100)
    return True


def unmount(mountpoint: str, seconds: float = 5.0) -> None:
    """umount(2); while it is busy try again for ``seconds``, then detach it."""
    deadline = time.monotonic() + seconds
    while is_mounted(mountpoint):
        if _libc.umount2(mountpoint.encode(), 0) == 0:
            continue
        if time.monotonic() > deadline:
            _libc.umount2(mountpoint.encode(), MNT_DETACH)
            return
        time.sleep(0.05)


def abort(mountpoint: str) -> None:
    """Abort the FUSE connection: every request in it fails, whoever waits in it goes on. Then detach it."""
    while is_mounted(mountpoint):
        _libc.umount2(mountpoint.encode(), MNT_FORCE | MNT_DETACH)
