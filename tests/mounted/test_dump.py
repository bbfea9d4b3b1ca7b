"""A volume that was dumped and loaded shows the same files through a mount."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from tests.mounted.test_cli_mount import Place, place, polefs, refused

__all__ = ["place"]


def seen(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that programs can tell of the files below a directory."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(root):
        for name in [".", *directories, *files]:
            path = Path(directory, name)
            status = path.lstat()
            what: bytes = b""
            if stat.S_ISREG(status.st_mode):
                what = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                what = os.readlink(os.fsencode(path))
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            times = status.st_mtime_ns, status.st_ctime_ns
            numbers = (
                status.st_ino,
                status.st_mode,
                status.st_nlink,
                status.st_uid,
                status.st_gid,
                status.st_size,
                status.st_blocks,
            )
            found[str(path.relative_to(root))] = (*numbers, *times, what, attributes)
    return found


def test_a_loaded_volume_shows_the_same(place: Place) -> None:
    place.mount()
    root = place.mountpoint
    (root / "dir").mkdir(mode=0o2750)
    (root / "dir" / "small").write_bytes(b"small")
    (root / "dir" / "big").write_bytes(os.urandom(3 << 20))
    os.link(root / "dir" / "big", root / "name")
    os.symlink("dir/big", root / "link")
    os.setxattr(root / "name", "user.a", b"value")
    os.chown(root / "dir" / "small", 1000, 100)
    with open(root / "sparse", "wb") as sparse:
        sparse.write(b"x" * 100_000)
        sparse.truncate(5 << 20)
    os.mkfifo(root / "fifo")
    os.utime(root / "fifo", ns=(1, 10**15))
    before = seen(root)
    for target in (root, place.volume):
        assert f"is mounted on {root}" in refused("dump", str(target), str(place.scratch / "dump"))
    place.umount()

    new = place.scratch / "new"
    polefs("dump", str(place.volume), str(place.scratch / "dump"))
    assert "inodes loaded" in polefs("load", str(place.scratch / "dump"), str(new))
    (new / "objects").rmdir()
    shutil.move(place.volume / "objects", new)
    assert "clean" in polefs("fsck", "--data", str(new))
    place.volume = new
    place.mount()
    assert seen(root) == before
    (root / "after").write_text("goes on")
    place.umount()
    assert "clean" in polefs("fsck", "--data", str(new))
