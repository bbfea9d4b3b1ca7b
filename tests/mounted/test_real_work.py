"""Programs that people use, on a polefs volume: each result is compared with the same work on a local disk."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import make_scratch
from rawfuse.testing.peer import ALICE, Peer
from rawfuse.testing.syscalls import opened, write_file
from tests.mounted.targets import STRESS, PolefsTarget
from tests.mounted.trees import assert_same, link_groups, record

SOURCES = 20_000 if STRESS else 2_000
"""Files in the source tree."""

SECONDS = 300 if STRESS else 90


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of a program that must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
    )
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{command[0]} ended with code {done.returncode}:\n{output[-5000:]}"
    return output


def copy_sources(target: Path) -> None:
    """Files of the Python library and of /usr/include, about ``SOURCES``, with their directories and times."""
    for source in (Path(sysconfig.get_paths()["stdlib"]), Path("/usr/include")):
        budget = SOURCES // 2
        for parent, directories, files in os.walk(source):
            directories[:] = sorted(set(directories) - {"__pycache__", "site-packages", "test"})
            here = target / source.name / os.path.relpath(parent, source)
            for name in sorted(files):
                path = Path(parent) / name
                if budget and path.is_file() and not path.is_symlink():
                    here.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, here / name)
                    budget -= 1


@pytest.fixture(scope="module")
def scratch(namespace: None) -> Iterator[Path]:
    """A directory on the local disk."""
    path = make_scratch("polefs-work")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def sources(scratch: Path) -> Path:
    """A source tree with hard links, symbolic links, odd modes and owners, holes, xattrs and an ACL in it."""
    tree = scratch / "sources"
    copy_sources(tree)
    odd = tree / "odd"
    odd.mkdir()
    write_file(odd / "one", b"linked")
    os.link(odd / "one", odd / "two")
    os.link(odd / "one", tree / "three")
    (odd / "link").symlink_to("../three")
    (odd / "dangling").symlink_to("nowhere/at/all")
    os.mkfifo(odd / "fifo", 0o640)
    write_file(odd / "setuid", b"#!/bin/sh\n", 0o4755)
    write_file(odd / "alices", b"hers", 0o600)
    os.chown(odd / "alices", ALICE.uid, ALICE.gid)
    write_file(odd / "old", b"old")
    os.utime(odd / "old", ns=(-5_000_000_000, -5_000_000_001))
    os.setxattr(odd / "old", "user.comment", b"from before 1970")
    run("setfacl", "-m", f"u:{ALICE.uid}:rw", odd / "old")
    (odd / "empty").mkdir(mode=0o1777)
    with opened(odd / "holes", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"start", 0)
        os.pwrite(fd, b"end", 50_000_000)
        os.ftruncate(fd, 60_000_000)
    (odd / ("n" * 255)).mkdir()
    write_file(odd / ("n" * 255) / "é\n\t\udc80", b"odd name")
    for parent, _, _ in os.walk(tree, topdown=False):
        os.utime(parent, ns=(10**18, 10**18 + 1))
    return tree


@pytest.mark.deadline(SECONDS * 2)
def test_untar(volume_root: Path, sources: Path, scratch: Path) -> None:
    archive = scratch / "sources.tar"
    run("tar", "--xattrs", "--xattrs-include=*", "--acls", "-C", sources, "-cf", archive, ".")
    (volume_root / "out").mkdir()
    run("tar", "--xattrs", "--xattrs-include=*", "--acls", "-C", volume_root / "out", "-xpf", archive)
    expected = record(sources)
    assert_same(expected, record(volume_root / "out"))
    assert link_groups(sources) == link_groups(volume_root / "out")
    run("diff", "-r", "--no-dereference", sources / "include", volume_root / "out" / "include")
    run("tar", "-C", volume_root / "out", "-cf", volume_root / "again.tar", ".")
    run("tar", "-C", sources, "-df", volume_root / "again.tar")
    shutil.rmtree(volume_root / "out" / "include")
    assert not (volume_root / "out" / "include").exists()


@pytest.mark.deadline(SECONDS * 2)
def test_rsync_there_and_back(volume_root: Path, sources: Path, scratch: Path) -> None:
    run("rsync", "-aHAX", "--sparse", f"{sources}/", volume_root / "there")
    assert_same(record(sources), record(volume_root / "there"))
    assert run("rsync", "-aHAXni", "--checksum", "--delete", f"{sources}/", f"{volume_root}/there/") == ""
    run("rsync", "-aHAX", "--sparse", f"{volume_root}/there/", scratch / "back")
    assert_same(record(sources), record(scratch / "back"))
    assert link_groups(sources) == link_groups(scratch / "back")


@pytest.mark.deadline(SECONDS * 2)
def test_copy_tree(volume_root: Path, sources: Path, scratch: Path) -> None:
    """cp -a within the volume."""
    run("cp", "-a", sources / "odd", scratch / "expected")
    run("cp", "-a", sources / "odd", volume_root / "first")
    run("cp", "-a", "--reflink=auto", volume_root / "first", volume_root / "second")
    assert_same(record(scratch / "expected"), record(volume_root / "second"))
    assert (volume_root / "second" / "holes").stat().st_blocks * 512 < 60_000_000


@pytest.mark.deadline(SECONDS * 2)
def test_git(volume_root: Path, sources: Path, scratch: Path) -> None:
    origin = scratch / "origin"
    shutil.copytree(sources / "include", origin, ignore=shutil.ignore_patterns("python*"))
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    run("git", "init", "-q", "-b", "main", origin)
    run("git", *identity, "add", "-A", cwd=origin)
    run("git", *identity, "commit", "-q", "-m", "first", cwd=origin)
    clone = volume_root / "clone"
    run("git", "clone", "-q", "--no-hardlinks", f"file://{origin}", clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    run("diff", "-r", "--exclude=.git", origin, clone)
    run("git", "checkout", "-q", "-b", "work", cwd=clone)
    for number in range(5):
        write_file(clone / f"new{number}", f"number {number}\n".encode() * 1000)
        run("git", "add", "-A", cwd=clone)
        run("git", *identity, "commit", "-q", "-m", f"commit {number}", cwd=clone)
    run("git", "mv", "new0", "moved", cwd=clone)
    run("git", "rm", "-q", "new1", cwd=clone)
    run("git", *identity, "commit", "-q", "-am", "moved and removed", cwd=clone)
    run("git", "stash", "list", cwd=clone)
    run("git", "repack", "-adq", cwd=clone)
    run("git", "gc", "-q", "--prune=now", cwd=clone)
    run("git", "fsck", "--full", "--strict", cwd=clone)
    run("git", "checkout", "-q", "main", cwd=clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    run("diff", "-r", "--exclude=.git", origin, clone)
    run("git", "push", "-q", "origin", "work", cwd=clone)
    run("git", "fsck", "--full", cwd=origin)


MAKEFILE = """\
CFLAGS = -O1 -Wall -Werror
OBJECTS = {objects}
prog: main.o libparts.a
\t$(CC) -o $@ main.o -L. -lparts
libparts.a: $(OBJECTS)
\t$(AR) rcs $@ $(OBJECTS)
$(OBJECTS) main.o: parts.h
clean:
\trm -f *.o *.a prog
"""


@pytest.mark.deadline(SECONDS * 2)
def test_build_a_c_program(volume_root: Path) -> None:
    count = 20
    parts = range(count)
    objects = " ".join(f"part{number}.o" for number in parts)
    write_file(volume_root / "Makefile", MAKEFILE.format(objects=objects).encode())
    write_file(volume_root / "parts.h", "".join(f"int part{number}(void);\n" for number in parts).encode())
    for number in parts:
        code = f'#include "parts.h"\nint part{number}(void) {{ return {number}; }}\n'
        write_file(volume_root / f"part{number}.c", code.encode())
    total = " + ".join(f"part{number}()" for number in parts)
    code = f'#include <stdio.h>\n#include "parts.h"\nint main(void) {{ printf("%d\\n", {total}); return 0; }}\n'
    write_file(volume_root / "main.c", code.encode())
    run("make", "-s", "-j3", cwd=volume_root)
    assert run(volume_root / "prog") == f"{sum(parts)}\n"
    run("make", "-q", cwd=volume_root)
    write_file(volume_root / "part3.c", b'#include "parts.h"\nint part3(void) { return 1003; }\n')
    assert "part3.c" in run("make", cwd=volume_root)
    assert run(volume_root / "prog") == f"{sum(parts) + 1000}\n"
    run("make", "-s", "clean", cwd=volume_root)
    assert not list(volume_root.glob("*.o"))


def _transfers(path: str, seed: int, rounds: int) -> int:
    """Move amounts between accounts in transactions of their own; returns how many were committed."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        for number in range(rounds):
            source, target = (seed * 7 + number) % 50, (seed * 13 + number * 3) % 50
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE account SET amount = amount - 1 WHERE id = ?", (source,))
            connection.execute("UPDATE account SET amount = amount + 1 WHERE id = ?", (target,))
            connection.execute("INSERT INTO entry(seed, number) VALUES (?, ?)", (seed, number))
            if number % 10 == 9:
                connection.execute("ROLLBACK")
            else:
                connection.execute("COMMIT")
        return rounds - rounds // 10
    finally:
        connection.close()


@pytest.mark.deadline(SECONDS * 2)
@pytest.mark.parametrize("journal", ["wal", "delete", "truncate"])
def test_sqlite(volume_root: Path, journal: str) -> None:
    """Several processes on one database: no transaction is lost, none is half there."""
    path = str(volume_root / "bank.db")
    rounds = 500 if STRESS else 60
    peers = [Peer() for _ in range(4)]  # before the connection: SQLite must not be carried over a fork
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        assert connection.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
        connection.execute("CREATE TABLE account(id INTEGER PRIMARY KEY, amount INTEGER)")
        connection.execute("CREATE TABLE entry(seed INTEGER, number INTEGER, PRIMARY KEY(seed, number))")
        connection.executemany("INSERT INTO account VALUES (?, 100)", [(number,) for number in range(50)])
        for seed, peer in enumerate(peers):
            peer.start(_transfers, path, seed, rounds)
        for _ in range(20):
            assert connection.execute("SELECT sum(amount) FROM account").fetchone() == (5000,)
        committed = sum(peer.result(SECONDS) for peer in peers)
        assert connection.execute("SELECT count(*) FROM entry").fetchone() == (committed,)
        assert connection.execute("SELECT sum(amount) FROM account").fetchone() == (5000,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.execute("VACUUM")
    finally:
        connection.close()
        for peer in peers:
            peer.close()
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        connection.close()


@pytest.mark.deadline(SECONDS * 2)
def test_everything_is_there_after_a_remount(volume: PolefsTarget, volume_root: Path, sources: Path) -> None:
    """All that this module has left on the volume, and one more copy that has just been written."""
    run("rsync", "-aHAX", f"{sources}/", volume_root / "last")
    before = record(volume.path)
    links = link_groups(volume.path)
    inodes = {name: os.lstat(volume.path / name).st_ino for name in before}
    volume.remount()
    assert_same(before, record(volume.path))
    assert links == link_groups(volume.path)
    assert inodes == {name: os.lstat(volume.path / name).st_ino for name in before}
