"""The redo log: its records, what a death leaves at every step, and failures of the log and of commits."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from errno import EBUSY, EIO, ENOENT, ENOSPC, ESTALE
from pathlib import Path
from typing import Any

import pytest

from polefs.meta.check import check
from polefs.meta.model import ROOT_INO, Inode
from polefs.meta.store import database, sqlite
from polefs.meta.store.redo import Batch, Redo, Statement, read_log
from polefs.meta.store.sqlite import SqliteStore
from polefs.meta.store.transaction import SqliteTransaction
from tests.unit.meta_helpers import ROOT, Meta, change_and_fail, fails, meta

__all__ = ["meta"]

STATEMENT: Statement = ("UPDATE t SET a = ?, b = ?", (-(1 << 63), b"\xff\0"))


def inode(ino: int) -> Inode:
    return Inode(ino, 0o100644, 0, 0, 1, 3, 3, -5, 1 << 62, 0, 0, 0, 1, inline=b"abc")


def batch(number: int) -> tuple[list[Statement], list[Inode]]:
    return [STATEMENT, (f"DELETE {number}", ())], [inode(number), inode(number + 1)]


def filled(path: str, generation: int, count: int) -> Redo:
    log = Redo(path)
    log.begin(generation)
    for number in range(count):
        log.append(*batch(number))
    return log


def test_records_come_back(tmp_path: Path) -> None:
    path = str(tmp_path / "redo")
    assert read_log(path, 7) == []
    log = filled(path, 7, 5)
    expected = [Batch(*batch(number)) for number in range(5)]
    assert read_log(path, 7) == log.batches() == expected
    assert read_log(path, 8) == []
    log.begin(8)
    # The header is written with the first record: until then the old generation counts for whoever has it.
    assert read_log(path, 7) == expected and read_log(path, 8) == log.batches() == []
    log.append(*batch(9))
    assert read_log(path, 7) == [] and read_log(path, 8) == [Batch(*batch(9))]
    log.close(remove=True)
    assert os.listdir(tmp_path) == []


def test_records_of_an_older_generation_never_follow(tmp_path: Path) -> None:
    path = str(tmp_path / "redo")
    log = filled(path, 1, 3)
    log.begin(2)
    # As long as the record that it takes the place of, so that the next one begins where an old one does.
    log.append(*batch(0))
    assert read_log(path, 2) == [Batch(*batch(0))]
    log.close(remove=False)


def test_a_torn_tail_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "redo"
    filled(str(path), 7, 3).close(remove=False)
    whole = path.read_bytes()
    counts = []
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        counts.append(len(read_log(str(path), 7)))
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3} and counts[-2] == 2


@pytest.mark.parametrize("change", [0x01, 0xFF])
def test_a_corrupt_record_ends_the_log(tmp_path: Path, change: int) -> None:
    path = tmp_path / "redo"
    filled(str(path), 7, 2).close(remove=False)
    whole = path.read_bytes()
    expected = read_log(str(path), 7)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
        found = read_log(str(path), 7)
        assert found == expected[: len(found)]
        # All bytes count but those between the header and the first record.
        assert len(found) < 2 or 20 <= position < 64


def test_a_failed_append_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "redo")
    for before in range(3):
        log = filled(path, 7 + before, before)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", Disk(room=30))
            with fails(ENOSPC):
                log.append(*batch(before))
        assert len(read_log(path, 7 + before)) == len(log.batches()) == before
        log.append(*batch(before))
        assert len(read_log(path, 7 + before)) == before + 1
        log.close(remove=True)


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "redo")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:7], position))
    log = filled(path, 7, 3)
    assert read_log(path, 7) == log.batches() == [Batch(*batch(number)) for number in range(3)]
    log.close(remove=False)


def test_a_log_that_cannot_be_read_back_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "redo")
    log = filled(path, 7, 3)
    os.truncate(path, os.stat(path).st_size - 1)
    with fails(EIO):
        log.batches()
    log.close(remove=False)


class Disk:
    """``os.pwrite`` on a disk with room for a number of bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._pwrite = os.pwrite

    def __call__(self, fd: int, data: bytes, position: int) -> int:
        if not self.room:
            raise OSError(ENOSPC, "the disk")
        written = self._pwrite(fd, data[: self.room], position)
        self.room -= written
        return written


# What a death leaves. A copy of the files is what the page cache holds at that moment.


def copied(meta: Meta, to: Path) -> Path:
    to.mkdir()
    for suffix in ("", "-wal", "-redo"):
        if os.path.exists(meta.path + suffix):
            shutil.copy(meta.path + suffix, to / ("meta.db" + suffix))
    return to


def names_after(folder: Path) -> list[bytes]:
    """The names that the next session finds, on a clean volume; the one after that finds the same."""
    found = []
    for _ in range(2):
        survivor = Meta(folder)
        try:
            survivor.assert_clean()
            found.append(survivor.names())
        finally:
            survivor.close()
    assert found[0] == found[1]
    return found[0]


def create(meta: Meta, name: bytes) -> Any:
    return meta.service.make_node(ROOT, ROOT_INO, name, 0o100644, 0)


def spy(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, before: Callable[[], Any], after: Callable[[], Any]
) -> None:
    plain = getattr(owner, name)

    def wrapped(*args: Any) -> Any:
        before()
        result = plain(*args)
        after()
        return result

    monkeypatch.setattr(owner, name, wrapped)


def test_death_around_an_append(meta: Meta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta.file(b"1")
    folders: list[Path] = []

    def snap() -> None:
        folders.append(copied(meta, tmp_path / f"copy{len(folders)}"))

    with monkeypatch.context() as patch:
        spy(patch, Redo, "append", snap, snap)
        meta.file(b"2")
    assert [names_after(folder) for folder in folders] == [[b"1"], [b"1", b"2"]]


def test_death_around_a_commit(meta: Meta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta.file(b"1")
    meta.unlink(b"1")
    meta.file(b"2")
    folders: list[Path] = []

    def snap() -> None:
        folders.append(copied(meta, tmp_path / f"copy{len(folders)}"))

    with monkeypatch.context() as patch:
        spy(patch, SqliteTransaction, "write_inodes", snap, snap)
        spy(patch, Redo, "begin", snap, snap)
        meta.run(meta.service.sync())
    assert len(folders) == 4
    meta.file(b"3")
    snap()
    assert [names_after(folder) for folder in folders] == [[b"2"]] * 4 + [[b"2", b"3"]]


def test_death_while_the_log_is_taken_over(meta: Meta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (b"1", b"2", b"3"):
        meta.file(name)
    folder = copied(meta, tmp_path / "copy")
    applied = 0

    def dies() -> None:
        nonlocal applied
        applied += 1
        if applied == 2:
            raise OSError(EIO, "dead")

    with monkeypatch.context() as patch:
        spy(patch, database, "apply", lambda: None, dies)
        with fails(EIO):
            SqliteStore.open(str(folder / "meta.db"))
    assert names_after(folder) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("lost", range(1, 400, 37))
def test_a_torn_log_gives_the_state_after_an_earlier_turn(meta: Meta, tmp_path: Path, lost: int) -> None:
    for number in range(5):
        meta.file(b"%d" % number)
        meta.rename(b"%d" % number, b"r%d" % number)
    folder = copied(meta, tmp_path / "copy")
    log = folder / "meta.db-redo"
    os.truncate(log, log.stat().st_size - lost)
    found = names_after(folder)
    assert found in [
        sorted([b"r%d" % each for each in range(count)] + last) for count in range(6) for last in ([], [b"%d" % count])
    ]
    assert found != [b"r%d" % number for number in range(5)]


def test_an_old_log_is_never_applied_to_a_newer_database(meta: Meta, tmp_path: Path) -> None:
    meta.file(b"1")
    old = copied(meta, tmp_path / "old")
    meta.run(meta.service.sync())
    meta.rename(b"1", b"2")
    meta.run(meta.service.sync())
    new = copied(meta, tmp_path / "new")
    shutil.copy(old / "meta.db-redo", new / "meta.db-redo")
    assert names_after(new) == [b"2"]


def test_numbers_and_contents_survive_with_the_log(meta: Meta) -> None:
    made = [meta.file(b"%d" % number).ino for number in range(20)]
    segment = meta.segment()
    meta.commit(made[0], 10, inline=b"0123456789")
    meta.set_xattr(made[1], b"user.x", b"value")
    meta.symlink(b"s", b"target")
    meta.unlink(b"19")
    inodes = [meta.get(ino) for ino in made[:19]]
    usage = meta.run(meta.service.usage())
    meta.crash()
    assert [meta.get(ino) for ino in made[:19]] == inodes
    assert meta.get_xattr(made[1], b"user.x") == b"value"
    assert meta.run(meta.service.read_link(meta.lookup(b"s").ino)) == b"target"
    # The orphan went with its session.
    assert meta.run(meta.service.usage()).inodes == usage.inodes - 1
    assert meta.file(b"new").ino > max(made)
    assert meta.segment().id > segment.id


def test_reading_only_takes_the_log_over_but_begins_no_session(meta: Meta, tmp_path: Path) -> None:
    meta.file(b"1")
    folder = copied(meta, tmp_path / "copy")
    store = SqliteStore.open(str(folder / "meta.db"), read_only=True)
    assert list(check(store)) == []
    assert list(store.rows("SELECT name FROM dentry")) == [(b"1",)]
    assert next(store.rows("SELECT epoch FROM volume")) == (meta.store._epoch,)
    store.shutdown()


def test_a_session_that_is_alive_keeps_others_out(meta: Meta) -> None:
    meta.file(b"1")
    for read_only in (False, True):
        with fails(EBUSY):
            SqliteStore.open(meta.path, read_only=read_only)
    meta.file(b"2")
    meta.run(meta.service.sync())
    store = SqliteStore.open(meta.path, read_only=True)
    assert len(list(store.rows("SELECT name FROM dentry"))) == 2
    store.shutdown()
    meta.file(b"3")
    assert meta.names() == [b"1", b"2", b"3"]


# Failures


def test_an_abort_keeps_what_earlier_turns_have_done(meta: Meta) -> None:
    kept = [meta.file(b"%d" % number) for number in range(10)]
    meta.unlink(b"9")
    meta.rename(b"0", b"zero")
    root = meta.get(ROOT_INO)
    usage = meta.run(meta.service.usage())
    lost, broken = meta.together(create(meta, b"lost"), meta.store.write(change_and_fail))
    assert lost.errno == broken.errno == EIO
    expected = [b"%d" % number for number in range(1, 9)] + [b"zero"]
    assert meta.names() == expected
    assert meta.run(meta.service.usage()) == usage
    assert meta.get(ROOT_INO) == root and meta.get(kept[3].ino) == kept[3]
    again = meta.file(b"again")
    assert again.ino > kept[9].ino
    meta.assert_clean()
    meta.crash()
    assert meta.names() == sorted([*expected, b"again"])


class FailingCommit:
    """``sqlite3.Connection.execute``, whose COMMITs fail while ``code`` is set."""

    def __init__(self, meta: Meta, code: int) -> None:
        self._execute = meta.store._execute
        self.code = code

    def __call__(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and self.code:
            error = sqlite3.OperationalError("the disk")
            error.sqlite_errorcode = self.code
            raise error
        return self._execute(statement, *parameters)


def test_a_commit_that_fails_for_a_while(meta: Meta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = meta.file(b"kept")
    usage = meta.run(meta.service.usage())
    disk = FailingCommit(meta, sqlite3.SQLITE_FULL)
    monkeypatch.setattr(meta.store, "_execute", disk)
    for _ in range(3):
        with fails(ENOSPC):
            meta.run(meta.service.sync())
        assert meta.lookup(b"kept") == kept and meta.run(meta.service.usage()) == usage
    # The log still takes what operations change.
    meta.file(b"more")
    assert names_after(copied(meta, tmp_path / "copy")) == [b"kept", b"more"]
    monkeypatch.setattr(sqlite, "_COMMIT_ROWS", 1)
    with fails(ENOSPC):
        meta.file(b"lost")
    assert meta.names() == [b"kept", b"more"]
    assert meta.store._timer is not None
    disk.code = 0
    meta.run(meta.service.sync())
    assert meta.store._timer is None
    meta.file(b"last")
    meta.crash()
    assert meta.names() == [b"kept", b"last", b"more"]


def test_a_commit_within_a_turn(meta: Meta, tmp_path: Path) -> None:
    one, _, two = meta.together(create(meta, b"1"), meta.service.sync(), create(meta, b"2"))
    assert isinstance(one, Inode) and isinstance(two, Inode)
    assert names_after(copied(meta, tmp_path / "copy")) == [b"1", b"2"]
    assert meta.run(meta.service.usage()).inodes == 3


def test_a_log_that_cannot_be_written_makes_every_turn_a_commit(
    meta: Meta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta.file(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", Disk(room=20))
        for name in (b"2", b"3"):
            meta.file(name)
            assert not meta.store._connection.in_transaction
        disk = FailingCommit(meta, sqlite3.SQLITE_IOERR_WRITE)
        patch.setattr(meta.store, "_execute", disk)
        with fails(EIO):
            meta.file(b"4")
        assert meta.names() == [b"1", b"2", b"3"]
        assert names_after(copied(meta, tmp_path / "copy")) == [b"1", b"2", b"3"]
    meta.file(b"5")
    meta.crash()
    assert meta.names() == [b"1", b"2", b"3", b"5"]


def test_a_log_that_is_lost_stops_everything(tmp_path: Path) -> None:
    """What was acknowledged must not silently vanish from a volume that goes on."""
    meta = Meta(tmp_path)
    meta.file(b"before")
    meta.run(meta.service.sync())
    meta.file(b"acknowledged")
    os.truncate(meta.path + "-redo", 70)
    with fails(EIO):
        meta.run(meta.store.write(change_and_fail))
    for operation in (create(meta, b"x"), meta.service.lookup(ROOT_INO, b"before"), meta.service.sync()):
        with fails(EIO):
            meta.run(operation)
    meta.store.shutdown()
    meta.runner.close()
    assert names_after(tmp_path) == [b"before"]


def test_closing_while_commits_fail_keeps_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = Meta(tmp_path)
    meta.file(b"f")
    monkeypatch.setattr(meta.store, "_execute", FailingCommit(meta, sqlite3.SQLITE_FULL))
    with fails(ENOSPC):
        meta.run(meta.store.close())
    meta.runner.close()
    assert os.path.exists(meta.path + "-redo")
    assert names_after(tmp_path) == [b"f"]


def test_shutdown_without_a_loop_commits(tmp_path: Path) -> None:
    meta = Meta(tmp_path)
    meta.file(b"f")
    meta.store.shutdown()
    meta.runner.close()
    assert os.listdir(tmp_path) == ["meta.db"]
    assert names_after(tmp_path) == [b"f"]


def test_a_session_that_was_taken_over_ends_quietly(tmp_path: Path) -> None:
    meta = Meta(tmp_path)
    meta.file(b"1")
    meta.run(meta.service.sync())
    other = Meta(tmp_path)
    other.file(b"2")
    with fails(ESTALE):
        meta.file(b"3")
    meta.run(meta.store.close())
    meta.runner.close()
    with fails(ENOENT):
        other.lookup(b"3")
    other.file(b"4")
    other.crash()
    assert other.names() == [b"1", b"2", b"4"]
    other.assert_clean()
    other.close()
