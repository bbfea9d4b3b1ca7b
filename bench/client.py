"""The client: one process that runs one workload in one directory and prints what it took as JSON.

Started by ``bench.runner`` as a script, so that its start imports little. The protocol: it makes itself ready, prints
``ready``, waits for the end of its standard input (all clients of a figure see it at the same moment), works, prints
``{"operations", "start", "end", "cpu"}``: seconds of CLOCK_MONOTONIC, and of CPU time with its children.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

KIB = 1024
MIB = 1024 * KIB

Timing = tuple[float, float, float]
"""Operations (or MiB), start and end."""


def go() -> float:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    return time.monotonic()


def _enter(directory: str) -> None:
    """Relative names keep the cost of the path's other components out of the figures."""
    os.makedirs(directory, exist_ok=True)
    os.chdir(directory)


def _names(index: int, count: int, prefix: str = "f") -> list[str]:
    return [f"{prefix}{index}-{number:06d}" for number in range(count)]


def _each(call: Callable[[str], object], names: list[str]) -> Timing:
    start = go()
    for name in names:
        call(name)
    return len(names), start, time.monotonic()


def _repeat(body: Callable[[], float], seconds: float) -> Timing:
    """Run it again until the time is used up: for figures that take too little time to be measured once."""
    done = 0.0
    start = end = go()
    while end - start < seconds:
        done += body()
        end = time.monotonic()
    return done, start, end


# Names


def create(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    names = _names(index, count)
    start = go()
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    return count, start, time.monotonic()


def stat(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    return _each(os.stat, _names(index, count))


def stat_hot(directory: str, count: int, seconds: float, index: int) -> Timing:
    _enter(directory)
    names = _names(index, count)

    def body() -> float:
        for name in names:
            os.stat(name)
        return len(names)

    body()
    return _repeat(body, seconds)


def stat_enoent(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    names = _names(index, count, f"missing{time.monotonic_ns()}-")
    start = go()
    for name in names:
        try:
            os.stat(name)
        except FileNotFoundError:
            pass
    return count, start, time.monotonic()


def chmod(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    return _each(lambda name: os.chmod(name, 0o600), _names(index, count))


def rename(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    return _each(lambda name: os.rename(name, "g" + name[1:]), _names(index, count))


def unlink(directory: str, count: int, index: int) -> Timing:
    """Of what ``create`` made and ``rename`` renamed, or did not."""
    _enter(directory)
    return _each(os.unlink, sorted(os.listdir("."))[:count])


def mkdir(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    return _each(os.mkdir, _names(index, count, "d"))


def rmdir(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    return _each(os.rmdir, _names(index, count, "d"))


# Small files and listings


def write_files(directory: str, count: int, size: int, index: int, fsync: bool = False) -> Timing:
    _enter(directory)
    names = _names(index, count)
    data = os.urandom(size)
    start = go()
    for name in names:
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, data)
        if fsync:
            os.fsync(fd)
        os.close(fd)
    return count, start, time.monotonic()


def _read_files(names: list[str], size: int) -> float:
    for name in names:
        fd = os.open(name, os.O_RDONLY)
        if len(os.read(fd, size)) != size:
            raise ValueError(f"{name} is short")
        os.close(fd)
    return len(names)


def read_files(directory: str, count: int, size: int, index: int) -> Timing:
    _enter(directory)
    names = _names(index, count)
    start = go()
    return _read_files(names, size), start, time.monotonic()


def read_files_hot(directory: str, count: int, size: int, seconds: float, index: int) -> Timing:
    _enter(directory)
    names = _names(index, count)
    _read_files(names, size)
    return _repeat(lambda: _read_files(names, size), seconds)


def make_entries(directory: str, count: int, index: int) -> Timing:
    """A directory of empty files, made once."""
    if os.path.isdir(directory) and len(os.listdir(directory)) == count:
        return 0, go(), time.monotonic()
    return create(directory, count, index)


def list_names(directory: str, count: int, index: int) -> Timing:
    start = go()
    if len(os.listdir(directory)) != count:
        raise ValueError(f"{directory} does not list {count} names")
    return count, start, time.monotonic()


def list_names_hot(directory: str, count: int, seconds: float, index: int) -> Timing:
    os.listdir(directory)
    return _repeat(lambda: len(os.listdir(directory)), seconds)


def _list_attributes() -> float:
    """As ls -l does: each entry's attributes as soon as its name is read."""
    count = 0
    with os.scandir(".") as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)
            count += 1
    return count


def list_attributes(directory: str, count: int, index: int) -> Timing:
    _enter(directory)
    start = go()
    if _list_attributes() != count:
        raise ValueError(f"{directory} does not list {count} names")
    return count, start, time.monotonic()


def list_attributes_hot(directory: str, count: int, seconds: float, index: int) -> Timing:
    _enter(directory)
    _list_attributes()
    return _repeat(_list_attributes, seconds)


# One big file


def write_big(path: str, mib: int, block: int, index: int) -> Timing:
    data = os.urandom(block)
    if os.path.exists(path):
        os.unlink(path)
    start = go()
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    for _ in range(mib * MIB // block):
        if os.write(fd, data) != block:
            raise ValueError("short write")
    os.fsync(fd)
    os.close(fd)
    return mib, start, time.monotonic()


def _read_big(path: str, buffer: bytearray) -> float:
    total = 0
    fd = os.open(path, os.O_RDONLY)
    while count := os.readv(fd, [buffer]):
        total += count
    os.close(fd)
    return total / MIB


def read_big(path: str, mib: int, index: int) -> Timing:
    buffer = bytearray(MIB)
    start = go()
    if _read_big(path, buffer) != mib:
        raise ValueError(f"{path} is short")
    return mib, start, time.monotonic()


def read_big_hot(path: str, mib: int, seconds: float, index: int) -> Timing:
    buffer = bytearray(MIB)
    if _read_big(path, buffer) != mib:
        raise ValueError(f"{path} is short")
    return _repeat(lambda: _read_big(path, buffer), seconds)


def _offsets(path: str, count: int, index: int) -> list[int]:
    blocks = os.stat(path).st_size // (4 * KIB)
    return [block * 4 * KIB for block in random.Random(index).choices(range(blocks), k=count)]


def random_read(path: str, count: int, index: int) -> Timing:
    offsets = _offsets(path, count, index)
    buffers = [bytearray(4 * KIB)]
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    start = go()
    for offset in offsets:
        if os.preadv(fd, buffers, offset) != 4 * KIB:
            raise ValueError("short read")
    return count, start, time.monotonic()


def random_read_hot(path: str, count: int, seconds: float, index: int) -> Timing:
    offsets = _offsets(path, count, index)
    buffers = [bytearray(4 * KIB)]
    _read_big(path, bytearray(MIB))
    fd = os.open(path, os.O_RDONLY)

    def body() -> float:
        for offset in offsets:
            os.preadv(fd, buffers, offset)
        return len(offsets)

    body()
    return _repeat(body, seconds)


def random_write(path: str, count: int, fsync_every: int, index: int) -> Timing:
    offsets = _offsets(path, count, index)
    data = os.urandom(4 * KIB)
    fd = os.open(path, os.O_WRONLY)
    start = go()
    for number, offset in enumerate(offsets, 1):
        if os.pwrite(fd, data, offset) != 4 * KIB:
            raise ValueError("short write")
        if number % fsync_every == 0:
            os.fsync(fd)
    os.fsync(fd)
    return count, start, time.monotonic()


def append(path: str, count: int, index: int) -> Timing:
    data = os.urandom(4 * KIB)
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o644)
    start = go()
    for _ in range(count):
        os.write(fd, data)
        os.fsync(fd)
    end = time.monotonic()
    os.close(fd)
    return count, start, end


# Programs on a tree of small files


def _warm(paths: list[str]) -> None:
    """Bring what is no part of the figure (programs, sources on the local disk) into the page cache."""
    for path in paths:
        if os.path.isdir(path):
            _warm([entry.path for entry in os.scandir(path)])
        else:
            with open(path, "rb") as file:
                while file.read(MIB):
                    pass


def command(
    directory: str, words: list[str], files: int, status: int, warm: list[str], seconds: float, index: int
) -> Timing:
    """A program; ``status`` is the exit code that it must have. Run again until ``seconds`` are over, at least once."""
    _warm(warm)
    subprocess.run([words[0], "--version"], stdout=subprocess.DEVNULL, check=True)

    def body() -> float:
        done = subprocess.run(words, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != status:
            raise ValueError(f"{words[0]}: status {done.returncode}: {done.stderr.strip().partition(chr(10))[0]}")
        return files

    start = go()
    operations = body()
    end = time.monotonic()
    while end - start < seconds:
        operations += body()
        end = time.monotonic()
    return operations, start, end


# SQLite


def sqlite(path: str, journal: str, count: int, index: int) -> Timing:
    import sqlite3

    for suffix in ("", "-wal", "-shm", "-journal"):
        if os.path.exists(path + suffix):
            os.unlink(path + suffix)
    database = sqlite3.connect(path, isolation_level=None)
    mode = database.execute(f"PRAGMA journal_mode={journal}").fetchone()[0]
    if mode != journal:
        raise ValueError(f"journal mode {mode}, not {journal}")
    database.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, text TEXT)")
    start = go()
    for number in range(count):
        database.execute("INSERT INTO item VALUES (?, ?)", (number, "x" * 100))
    end = time.monotonic()
    database.close()
    return count, start, end


# Preparation


def remove(paths: list[str], index: int) -> Timing:
    start = go()
    subprocess.run(["rm", "-rf", "--", *paths], check=True)
    return len(paths), start, time.monotonic()


def make_directory(path: str, index: int) -> Timing:
    start = go()
    os.makedirs(path, exist_ok=True)
    return 1, start, time.monotonic()


def drop_caches(settle: float, index: int) -> Timing:
    """Dirty data to disk, then the kernel's pages, dentries and inodes away; wait until the servers have taken the
    FORGETs that follow (they are not answered, so nothing tells)."""
    start = go()
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3\n")
    time.sleep(settle)
    return 1, start, time.monotonic()


WORKLOADS: dict[str, Callable[..., Timing]] = {
    call.__name__: call
    for call in (
        create,
        stat,
        stat_hot,
        stat_enoent,
        chmod,
        rename,
        unlink,
        mkdir,
        rmdir,
        write_files,
        read_files,
        read_files_hot,
        make_entries,
        list_names,
        list_names_hot,
        list_attributes,
        list_attributes_hot,
        write_big,
        read_big,
        read_big_hot,
        random_read,
        random_read_hot,
        random_write,
        append,
        command,
        sqlite,
        remove,
        make_directory,
        drop_caches,
    )
}


def main() -> None:
    arguments: dict[str, Any] = json.loads(sys.argv[2])
    operations, start, end = WORKLOADS[sys.argv[1]](**arguments)
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    print(json.dumps({"operations": operations, "start": start, "end": end, "cpu": cpu}))


if __name__ == "__main__":
    main()
