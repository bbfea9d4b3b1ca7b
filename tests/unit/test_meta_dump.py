"""polefs dump and load: round trips between the stores, damaged dumps, and what a failed load leaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polefs.cli.app import run
from polefs.meta import dump as format_
from polefs.meta.check import check
from polefs.meta.dump import DumpError, DumpReader, DumpWriter, Header
from polefs.meta.model import ROOT_INO, Caller, DataCommit, Extent, Inode, Segment, SetAttr
from polefs.meta.service import MetaService
from polefs.meta.store.postgres import PostgresStore, tables
from polefs.meta.store.postgres import bulk as postgres_bulk
from polefs.meta.store.postgres.database import list_volumes, open_database
from polefs.meta.store.tables import TABLES, Row, VolumeState
from polefs.node.dump import Summary, dump_volume, load_volume
from polefs.node.errors import Refusal
from polefs.node.lock import Holder
from polefs.node.storage import open_store
from polefs.node.volume import Volume, make_volume, open_volume
from tests.postgres.server import PostgresServer
from tests.unit.meta_helpers import examples

ME = Holder(os.getpid(), "format")
ROOT = Caller(0, 0)
BLOCK = 4096
NO_ID = 0xFFFFFFFF

KINDS = ["file", "dir", "link", "symlink", "xattr", "acl", "inline", "write", "share", "unlink", "time"]

_DRAFTS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=10,
    max_size=60,
)


def ignore(*_: Any) -> None:
    """Shows nothing."""


def dumped(source: str, name: str | None = None) -> bytes:
    stream = io.BytesIO()
    dump_volume(source, name, stream, ignore)
    return stream.getvalue()


def loaded(data: bytes, target: object, name: str | None = None) -> Summary:
    return load_volume(io.BytesIO(data), len(data), str(target), name, ignore)


def content(data: bytes) -> tuple[VolumeState, str, dict[str, list[Row]]]:
    """Everything that a dump tells, but for when it was made."""
    reader = DumpReader(io.BytesIO(data))
    rows: dict[str, list[Row]] = {table.name: [] for table in TABLES}
    for table, page in reader.pages():
        rows[table.name] += page
    return reader.header.volume, reader.header.contents, rows


async def grow(service: MetaService, steps: list[tuple[str, int, bytes]]) -> None:
    """Apply random changes; those that are not possible are left out."""
    dirs, files = [ROOT_INO], [(ROOT_INO, b"first")]
    inodes = {b"first": await service.make_node(ROOT, ROOT_INO, b"first", 0o100644, 0)}
    for number, (step, pick, text) in enumerate(steps):
        parent = dirs[pick % len(dirs)]
        place = files[pick % len(files)] if files else None
        name = b"%d " % number + text.replace(b"/", b"_").replace(b"\0", b"_")
        with contextlib.suppress(OSError):
            if step == "dir":
                dirs.append((await service.make_node(ROOT, parent, name, 0o042755, 0)).ino)
            elif step == "symlink":
                await service.make_node(ROOT, parent, name, 0o120777, 0, 0, text.replace(b"\0", b"_"))
            elif step == "file":
                inodes[name] = await service.make_node(ROOT, parent, name, 0o104711, 0)
                files.append((parent, name))
            elif place is not None:
                await change(service, inodes[place[1]].ino, step, pick, text)
                if step == "link":
                    inodes[name] = await service.link(inodes[place[1]].ino, parent, name)
                    files.append((parent, name))
                elif step == "unlink":
                    await service.unlink(*place)
                    files.remove(place)


async def change(service: MetaService, ino: int, step: str, pick: int, text: bytes) -> None:
    if step == "xattr":
        await service.set_xattr(ino, b"user.%d" % (pick % 3), text, 0, False)
    elif step == "acl":
        acl = b"\2\0\0\0" + b"".join(
            tag.to_bytes(2, "little") + permissions.to_bytes(2, "little") + id_.to_bytes(4, "little")
            for tag, permissions, id_ in ((1, 7, NO_ID), (2, 5, pick), (4, 5, NO_ID), (16, 7, NO_ID), (32, 0, NO_ID))
        )
        await service.set_xattr(ino, b"system.posix_acl_access", acl, 0, False)
    elif step == "inline":
        await service.commit_data([], [DataCommit(ino, len(text), pick, [(0, 1 << 62)], [], text)])
    elif step == "write":
        segment = Segment(await service.allocate_segments(1), 4 * BLOCK, ((4 * BLOCK, 4 * BLOCK, 1),))
        offset = pick % 1000 * BLOCK
        await service.commit_data(
            [segment], [DataCommit(ino, offset + 4 * BLOCK, None, [], [Extent(offset, 4 * BLOCK, segment.id, 0)])]
        )
    elif step == "share":
        found = await service.extents(ino, 0, 1 << 62)
        copies = [Extent(each.offset + (1 << 30), each.length, each.segment, each.segment_offset) for each in found]
        await service.commit_data([], [DataCommit(ino, 1 << 40, None, [], copies)])
    elif step == "time":
        await service.set_attributes(ino, SetAttr(atime=-pick, mtime=pick << 30, uid=pick, mode=0o4555))


def new_volume(path: Path, steps: list[tuple[str, int, bytes]]) -> Volume:
    volume = make_volume(str(path), ME, name="grown", bytes_limit=1 << 50, inodes_limit=1 << 20)
    store = open_store(volume)

    async def work() -> None:
        service = MetaService(store)
        await service.start()
        await grow(service, steps)
        # Not the service: it would remove the orphans.
        await store.close()

    asyncio.run(work())
    volume.unlock()
    return volume


def assert_sound(path: Path) -> None:
    store = open_store(open_volume(str(path)), read_only=True)
    try:
        assert list(check(store)) == []
    finally:
        store.shutdown()


STEPS = [
    (step, number * 7919, b"a%d" % number)
    for number, step in enumerate(["file", "write", "inline", *KINDS[:-2], "time", "dir"] * 3 + ["unlink", "unlink"])
]
"""One of everything."""


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return new_volume(tmp_path / "old", STEPS)


def test_tables_are_those_of_the_stores() -> None:
    ours = {table.name: table.columns for table in TABLES}
    theirs = {table.name: table.columns for table in tables.TABLES}
    assert ours == {name: columns for name, columns in theirs.items() if name not in ("session", "reply")}


@given(steps=_DRAFTS)
@settings(max_examples=examples(6), deadline=None)
def test_round_trip_of_any_tree(steps: list[tuple[str, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        old, new = Path(place, "old"), Path(place, "new")
        new_volume(old, steps)
        data = dumped(str(old))
        loaded(data, new)
        assert content(dumped(str(new))) == content(data)
        assert_sound(new)


def test_the_tree_of_the_tests_has_everything(volume: Volume) -> None:
    _, _, rows = content(dumped(volume.path))
    assert {name for name, found in rows.items() if not found} <= {"deletion"}
    assert any(Inode(*row).nlink > 1 for row in rows["inode"] if not Inode(*row).is_dir)


def test_through_postgresql_and_back(volume: Volume, postgres_server: PostgresServer, tmp_path: Path) -> None:
    dsn = postgres_server.new_database()
    data = dumped(volume.path)
    loaded(data, dsn, "moved")
    through = dumped(dsn, "moved")
    state, contents, rows = content(data)
    assert content(through)[1:] == (contents, rows)
    assert content(through)[0].uuid == state.uuid

    async def use() -> tuple[int, int]:
        store = await PostgresStore.open(dsn, "moved")
        service = MetaService(store)
        try:
            usage = await service.usage()
            counted = usage.bytes, usage.inodes
            await service.start()
            made = await service.make_node(ROOT, ROOT_INO, b"after", 0o100644, 0)
            assert made.ino == state.next_ino
            names = [dentry.name for dentry in await service.list_dir(ROOT_INO, 0, 1 << 20)]
            dentries = sorted(rows["dentry"], key=lambda row: row[4])
            assert names == [*(name for parent, name, *_ in dentries if parent == ROOT_INO), b"after"]
        finally:
            await service.close()
        return counted

    assert asyncio.run(use()) == (sum(Inode(*row).allocated for row in rows["inode"]), len(rows["inode"]))
    loaded(dumped(dsn, "moved"), tmp_path / "back")
    assert_sound(tmp_path / "back")


def test_a_database_in_use_is_dumped_as_it_is_at_one_moment(volume: Volume, postgres_server: PostgresServer) -> None:
    dsn = postgres_server.new_database()
    loaded(dumped(volume.path), dsn)

    async def work() -> None:
        store = await PostgresStore.open(dsn, "grown")
        service = MetaService(store)
        async with postgres_bulk.snapshot(dsn, "grown") as found:
            before = [row async for page in found.pages(TABLES[0]) for row in page]
            await service.make_node(ROOT, ROOT_INO, b"later", 0o100644, 0)
            assert [row async for page in found.pages(TABLES[0]) for row in page] == before
            names = [row[1] async for page in found.pages(TABLES[1]) for row in page]
            assert b"later" not in names
        await service.close()

    asyncio.run(work())


# What cannot be loaded


@given(data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_no_damage_goes_unnoticed(data: st.DataObject) -> None:
    whole = _small_dump()
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        broken = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "new")
        with pytest.raises(DumpError):
            loaded(broken, target)
        assert os.listdir(directory) == []


def _small_dump() -> bytes:
    state = VolumeState(
        name="small",
        uuid="00000000-0000-0000-0000-000000000001",
        created=0,
        durability="local",
        bytes_limit=0,
        inodes_limit=0,
        next_ino=2,
        next_cookie=16,
        next_segment=1,
    )
    stream = io.BytesIO()
    writer = DumpWriter(stream, Header(volume=state, contents="", made=0, by="test"))
    writer.rows(TABLES[0], [(1, 0o40755, 0, 0, 2, 4096, 0, 0, 0, 0, 0, 0, 1, 0, 0, None, 0)])
    writer.end()
    return stream.getvalue()


def test_what_is_no_dump_of_ours_is_refused(tmp_path: Path) -> None:
    whole = _small_dump()
    for data, says in (
        (b"", "no dump"),
        (b"PK\3\4 something else", "no dump"),
        (b"polefs dump 2\n" + whole[14:], "format 2, this polefs reads up to 1: upgrade"),
        (b"polefs dump 0\n" + whole[14:], "unknown format"),
        (whole[:-1], f"ends at byte {len(whole) - 1}"),
        (whole + b"x", f"follows the dump at byte {len(whole)}"),
        (whole[:20] + b"\xff" + whole[21:], "damaged at byte 14"),
    ):
        with pytest.raises(DumpError, match=says):
            loaded(data, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_dump_whose_rows_contradict_each_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres_server: PostgresServer
) -> None:
    monkeypatch.setattr(format_, "_ROWS", 1)
    stream = io.BytesIO()
    root = (1, 0o40755, 0, 0, 2, 4096, 0, 0, 0, 0, 0, 0, 1, 0, 0, None, 0)
    writer = DumpWriter(stream, DumpReader(io.BytesIO(_small_dump())).header)
    writer.rows(TABLES[0], [root, root])
    writer.end()
    dsn = postgres_server.new_database()
    for target in (str(tmp_path / "new"), dsn):
        with pytest.raises(DumpError, match="contradictory"):
            loaded(stream.getvalue(), target)
    assert not (tmp_path / "new").exists()
    assert postgres_server.sql("SELECT count(*) FROM polefs.volume", dsn.partition("@/")[2].partition("?")[0]) == "0"


def test_targets_that_exist_are_left_alone(volume: Volume, tmp_path: Path, postgres_server: PostgresServer) -> None:
    data = dumped(volume.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for target in (volume.path, tmp_path / "full"):
        with pytest.raises(Refusal):
            loaded(data, target)
    assert content(dumped(volume.path)) == content(data)
    assert os.listdir(tmp_path / "full") == ["file"]
    dsn = postgres_server.new_database()
    loaded(data, dsn)
    with pytest.raises(FileExistsError, match="there is a volume grown already"):
        loaded(data, dsn)


def test_a_load_that_fails_leaves_no_rows_in_the_database(volume: Volume, postgres_server: PostgresServer) -> None:
    dsn = postgres_server.new_database()
    data = dumped(volume.path)
    with pytest.raises(DumpError):
        loaded(data[:-3], dsn)
    database = dsn.partition("@/")[2].partition("?")[0]
    for table in ("volume", *(table.name for table in TABLES)):
        assert postgres_server.sql(f"SELECT count(*) FROM polefs.{table}", database) == "0"


def test_two_loads_of_one_name(postgres_server: PostgresServer) -> None:
    dsn = postgres_server.new_database()
    data = _small_dump()
    reader = DumpReader(io.BytesIO(data))

    def pages() -> Iterator[Any]:
        with pytest.raises(OSError) as caught:
            loaded(data, dsn)
        assert caught.value.errno == errno.EBUSY
        yield from reader.pages()

    asyncio.run(postgres_bulk.restore(dsn, reader.header.volume, "", pages()))

    async def names() -> list[str]:
        connection = await open_database(dsn)
        try:
            return [volume.name for volume in await list_volumes(connection)]
        finally:
            await connection.close()

    assert asyncio.run(names()) == ["small"]


def test_what_a_killed_load_has_left_is_removed_by_the_next(postgres_server: PostgresServer) -> None:
    dsn = postgres_server.new_database()
    reader = DumpReader(io.BytesIO(_small_dump()))

    async def die() -> int:
        keeper, writer = await open_database(dsn), await open_database(dsn)
        volume = await postgres_bulk._begin(keeper, writer, b"small", reader.header.volume, "")
        await keeper.execute("ROLLBACK")
        await keeper.close()
        values = ([value] for value in (5, 0))
        await writer.execute(tables.ORPHAN.insert(), [volume], *values)
        assert await list_volumes(writer) == []
        await writer.close()
        return volume

    left = asyncio.run(die())
    loaded(_small_dump(), dsn)
    database = dsn.partition("@/")[2].partition("?")[0]
    assert postgres_server.sql(f"SELECT count(*) FROM polefs.orphan WHERE volume = {left}", database) == "0"
    assert postgres_server.sql("SELECT count(*) FROM polefs.volume", database) == "1"


def test_a_volume_in_use_or_with_unsaved_contents_is_not_dumped(volume: Volume) -> None:
    used = open_volume(volume.path)
    used.lock(Holder(os.getpid(), "mount", "/mnt/x"))
    with pytest.raises(Refusal, match="is mounted on /mnt/x"):
        dumped(volume.path)
    used.unlock()
    Path(volume.local, "5").write_bytes(b"dirty")
    with pytest.raises(Refusal, match="not yet written back"):
        dumped(volume.path)


# The commands


def test_commands(volume: Volume, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, new = tmp_path / "dump", tmp_path / "new"
    assert run(["dump", volume.path, str(file), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["bytes"] == file.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o600
    assert run(["load", str(file), str(new)]) == 0
    assert "inodes loaded" in capfd.readouterr().out
    assert run(["fsck", str(new)]) in (0, 4)  # the objects of the test are not there
    assert run(["load", str(file), str(new)]) == 1
    assert "already" in capfd.readouterr().err
    assert run(["load", str(tmp_path / "none"), str(tmp_path / "other")]) == 1
    assert run(["dump", volume.path, str(file), "--name", "x"]) == 2
    assert run(["dump", "postgresql://localhost/x", str(file)]) == 2
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "dump.part").exists()
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert run(["dump", volume.path, str(tmp_path / "pipe")]) == 0
    assert content(reader.communicate()[0]) == content(file.read_bytes())
    assert (tmp_path / "pipe").is_fifo()
    assert run(["dump", volume.path, str(tmp_path)]) == 1


def test_a_full_disk_and_pipes(volume: Volume, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m polefs'
    full = subprocess.run(f"{command} dump {volume.path} > /dev/full", shell=True, capture_output=True, text=True)
    assert full.returncode == 1
    assert "No space left" in full.stderr and full.stderr.count("\n") == 1, full.stderr
    piped = f"{command} dump {volume.path} | {command} load - {tmp_path / 'piped'}"
    done = subprocess.run(piped, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(dumped(str(tmp_path / "piped"))) == content(dumped(volume.path))


_MANY = """
import io, os, sys, tracemalloc
from polefs.meta.dump import DumpReader, DumpWriter
from polefs.meta.store import bulk
from polefs.meta.store.sqlite import SqliteStore
from polefs.meta.store.tables import TABLES
from tests.unit.test_meta_dump import _small_dump

def rows(count):
    for ino in range(2, count):
        yield (ino, 0o100644, 0, 0, 1, 100, 100, ino, ino, ino, ino, 0, 1, 0, 0, os.urandom(100), 0)

count, place = int(sys.argv[1]), sys.argv[2]
tracemalloc.start()
header = DumpReader(io.BytesIO(_small_dump())).header
with open(place + "/a", "wb") as stream:
    writer = DumpWriter(stream, header)
    writer.rows(TABLES[0], rows(count))
    writer.end()
with open(place + "/a", "rb") as stream:
    bulk.restore(place + "/meta.db", header.volume, DumpReader(stream).pages())
store = SqliteStore.open(place + "/meta.db", read_only=True)
with open(place + "/b", "wb") as stream:
    writer = DumpWriter(stream, header)
    for table in TABLES:
        writer.rows(table, bulk.read_rows(store, table))
    writer.end()
assert writer.counts["inode"] == count - 2
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_volume() -> None:
    def peak(count: int) -> int:
        with tempfile.TemporaryDirectory() as place:
            run_ = [sys.executable, "-c", _MANY, str(count), place]
            return int(subprocess.run(run_, capture_output=True, text=True, check=True).stdout)

    few, many = peak(8_000), peak(40_000)
    assert many < few + (1 << 20)
