"""The private mount namespace of a test run, and what a machine must have for it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from rawfuse.testing.mounts import FUSECTL, MNT_DETACH, mount_syscall, mounts, umount_syscall, unshare_mounts

TOOLS = {"setpriv": "util-linux"}
"""Commands that ``Server`` runs, and the Debian package of each."""


def missing_tools(tools: Mapping[str, str]) -> str | None:
    """One line that says how to get those of the commands (each with its Debian package) that are not installed."""
    packages = sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
    return f"tests on mounts need more programs: apt-get install {' '.join(packages)}" if packages else None


def missing_requirement() -> str | None:
    """One line that says what this machine lacks for tests on mounts and how to get it; None when nothing is."""
    if os.geteuid() != 0:
        return "tests on mounts mount file systems and change user ids: run them as root"
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing: load the kernel module (modprobe fuse) or give the container --device /dev/fuse"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened ({error.strerror}): give the container --device /dev/fuse and SYS_ADMIN"
    return missing_tools(TOOLS)


def enter_private_namespace() -> None:
    """Give this process (its main thread, and what that starts later) a mount namespace that shares nothing, with
    fusectl in it and without the FUSE mounts of others."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("only the main thread may change the namespace")
    unshare_mounts()
    _let_go_of_others()
    if not any(line.mountpoint == str(FUSECTL) for line in mounts()):
        mount_syscall("fusectl", str(FUSECTL), "fusectl", 0)


def _let_go_of_others() -> None:
    """Detach the FUSE mounts that the new namespace has inherited. A private copy of a mount keeps its connection
    alive: an unmount outside would not end the server there until this process has ended. What this process itself
    runs from stays."""
    needed = {os.path.realpath(path) for path in (os.getcwd(), tempfile.gettempdir(), sys.prefix, *sys.path) if path}
    for line in reversed(mounts()):
        mountpoint = Path(line.mountpoint)
        if line.is_fuse and not any(Path(path).is_relative_to(mountpoint) for path in needed):
            umount_syscall(line.mountpoint, MNT_DETACH)
