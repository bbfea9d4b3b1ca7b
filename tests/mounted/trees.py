"""Whole trees: recording everything visible of one, and comparing two."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """Everything visible of one file but its times, inode number and allocation."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    """Bytes; 0 for directories, whose size means nothing."""
    rdev: int
    mtime: int
    content: str
    """A digest, or a symbolic link's target."""
    xattrs: tuple[tuple[str, bytes], ...]


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def record_entry(path: str, directory_times: bool = True) -> Entry:
    found = os.lstat(path)
    content = ""
    if stat.S_ISREG(found.st_mode):
        content = _digest(path)
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    is_dir = stat.S_ISDIR(found.st_mode)
    xattrs = tuple(
        sorted(
            (name, os.getxattr(path, name, follow_symlinks=False)) for name in os.listxattr(path, follow_symlinks=False)
        )
    )
    return Entry(
        found.st_mode,
        found.st_uid,
        found.st_gid,
        found.st_nlink,
        0 if is_dir else found.st_size,
        found.st_rdev,
        found.st_mtime_ns if directory_times or not is_dir else 0,
        content,
        xattrs,
    )


def record(root: Path, directory_times: bool = True) -> dict[str, Entry]:
    """Every file under ``root`` by its relative path, without the root itself."""
    found = {}
    for parent, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = os.path.join(parent, name)
            found[os.path.relpath(path, root)] = record_entry(path, directory_times)
    return found


def link_groups(root: Path) -> set[frozenset[str]]:
    """The sets of names that share an inode."""
    groups: dict[int, set[str]] = {}
    for parent, _, files in os.walk(root):
        for name in files:
            path = os.path.join(parent, name)
            found = os.lstat(path)
            if found.st_nlink > 1:
                groups.setdefault(found.st_ino, set()).add(os.path.relpath(path, root))
    return {frozenset(names) for names in groups.values()}


def assert_same(left: dict[str, Entry], right: dict[str, Entry]) -> None:
    """Fail with the first differences."""
    differences = [f"only left: {name}" for name in sorted(left.keys() - right.keys())]
    differences += [f"only right: {name}" for name in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        if left[name] != right[name]:
            differences.append(f"{name}:\n  {left[name]}\n  {right[name]}")
    assert not differences, f"{len(differences)} differences:\n" + "\n".join(differences[:20])
