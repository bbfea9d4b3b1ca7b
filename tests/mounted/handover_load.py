"""Work on a directory that checks itself: whatever it does must succeed, once, and be seen as it was left.

python -m tests.mounted.handover_load KIND SEED DIRECTORY

A line of output for each round; it ends, with code 0, after the round in which its input has ended.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import select
import shutil
import stat
import sys
from pathlib import Path

from rawfuse.testing.syscalls import RENAME_EXCHANGE, rename2


class Names:
    """Makes, moves and removes names of every kind; ``model`` holds what each must be."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance = root, chance
        self.model: dict[str, tuple[str, str]] = {}
        self.numbers = iter(range(1 << 30))

    def round(self) -> None:
        for _ in range(5):
            step = self.chance.choice([self.make, self.make, self.move, self.remove, self.exchange, self.attribute])
            step()
        self.check()

    def pick(self) -> str | None:
        return self.chance.choice(list(self.model)) if self.model else None

    def make(self) -> None:
        name = f"n{next(self.numbers)}"
        path = self.root / name
        kind = self.chance.choice(["directory", "file", "symlink", "link", "fifo"])
        content = name
        if kind == "directory":
            path.mkdir()
        elif kind == "symlink":
            os.symlink(name, path)
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            assert os.write(fd, content.encode()) == len(content)
            os.close(fd)
            if kind == "link":
                os.link(path, self.root / f"{name}-link")
                assert path.stat().st_nlink == 2
                self.model[f"{name}-link"] = ("file", content)
        self.model[name] = ("file" if kind == "link" else kind, content)

    def move(self) -> None:
        name = self.pick()
        if name is not None:
            new = f"n{next(self.numbers)}"
            os.rename(self.root / name, self.root / new)
            self.model[new] = self.model.pop(name)

    def exchange(self) -> None:
        one, two = self.pick(), self.pick()
        if one is not None and two is not None and one != two:
            rename2(self.root / one, self.root / two, RENAME_EXCHANGE)
            self.model[one], self.model[two] = self.model[two], self.model[one]

    def remove(self) -> None:
        name = self.pick()
        if name is not None:
            kind, _ = self.model.pop(name)
            (self.root / name).rmdir() if kind == "directory" else (self.root / name).unlink()

    def attribute(self) -> None:
        name = self.pick()
        if name is not None and self.model[name][0] in ("file", "directory"):
            path = self.root / name
            path.chmod(0o700)
            os.setxattr(path, "user.load", b"value", os.XATTR_CREATE)
            assert os.getxattr(path, "user.load") == b"value"
            os.removexattr(path, "user.load")
            try:
                os.getxattr(path, "user.load")
            except OSError as error:
                assert error.errno == errno.ENODATA

    def check(self) -> None:
        assert sorted(os.listdir(self.root)) == sorted(self.model)
        for name, (kind, content) in self.model.items():
            mode = (self.root / name).lstat().st_mode
            if kind == "file":
                assert stat.S_ISREG(mode)
                assert (self.root / name).read_text() == content
            elif kind == "symlink":
                assert os.readlink(self.root / name) == content
            else:
                assert stat.S_ISDIR(mode) if kind == "directory" else stat.S_ISFIFO(mode)
        while len(self.model) > 30:
            self.remove()


class Data:
    """Files that stay open, one of them without a name, written and read in every way."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance = root, chance
        self.appended = os.open(root / "appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.log = b""
        self.file = os.open(root / "file", os.O_RDWR | os.O_CREAT)
        self.unnamed = os.open(root, os.O_TMPFILE | os.O_RDWR)
        removed = root / "removed"
        self.removed = os.open(removed, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        removed.unlink()
        self.contents = {fd: bytearray() for fd in (self.file, self.unnamed, self.removed)}

    def round(self) -> None:
        for fd, content in self.contents.items():
            self.change(fd, content)
            assert os.pread(fd, len(content) + 1, 0) == content
            assert os.fstat(fd).st_size == len(content)
        record = self.chance.randbytes(self.chance.randrange(1, 300))
        assert os.write(self.appended, record) == len(record)
        self.log += record
        with open(self.root / "appended", "rb") as file:
            assert file.read() == self.log
        if len(self.log) > 1 << 20:
            os.truncate(self.root / "appended", 0)
            self.log = b""
        self.mapped()

    def change(self, fd: int, content: bytearray) -> None:
        offset, size = self.chance.randrange(1 << 18), self.chance.choice([1, 100, 5000, 200_000])
        match self.chance.choice(["write", "write", "truncate", "allocate", "sync"]):
            case "write":
                data = self.chance.randbytes(size)
                assert os.pwrite(fd, data, offset) == size
                content.extend(bytes(max(0, offset + size - len(content))))
                content[offset : offset + size] = data
            case "truncate":
                os.ftruncate(fd, offset)
                del content[offset:]
                content.extend(bytes(offset - len(content)))
            case "allocate":
                os.posix_fallocate(fd, offset, size)
                content.extend(bytes(max(0, offset + size - len(content))))
            case "sync":
                os.fsync(fd)

    def mapped(self) -> None:
        fd = self.file
        content = self.contents[fd]
        if content:
            with mmap.mmap(fd, len(content)) as memory:
                place = self.chance.randrange(len(content))
                memory[place] = content[place] = self.chance.randrange(256)
                memory.flush()
            assert os.pread(fd, len(content), 0) == content


class Trees:
    """Directories of many entries, read while it happens, and removed as rm -r does."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance = root, chance

    def round(self) -> None:
        top = self.root / "top"
        top.mkdir()
        expected = {f"{'x' * 40}{number}" for number in range(self.chance.randrange(1, 60))}
        for name in expected:
            if self.chance.random() < 0.3:
                (top / name / "deeper").mkdir(parents=True)
            else:
                (top / name).write_text(name)
        fd = os.open(top, os.O_RDONLY)
        seen = []
        with os.scandir(fd) as entries:
            for entry in entries:
                seen.append(entry.name)
                os.stat(entry.name, dir_fd=fd)
        os.close(fd)
        assert sorted(seen) == sorted(expected)
        shutil.rmtree(top)
        assert os.listdir(self.root) == []


KINDS = {"names": Names, "data": Data, "trees": Trees}


def main() -> None:
    kind, seed, directory = sys.argv[1:]
    work = KINDS[kind](Path(directory), random.Random(int(seed)))
    while not select.select([sys.stdin], [], [], 0)[0]:
        work.round()
        print("round", flush=True)


if __name__ == "__main__":
    main()
