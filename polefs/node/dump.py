"""Dumping the metadata of a volume to a stream, and making a volume of a dump."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO
from uuid import UUID

import msgspec

from polefs.data.report import Phase
from polefs.meta.dump import DumpError, DumpReader, DumpWriter, Header
from polefs.meta.store import bulk
from polefs.meta.store.base import FormatError
from polefs.meta.store.tables import TABLES, Row, Table, VolumeState
from polefs.node.errors import Refusal, plain
from polefs.node.lock import Holder
from polefs.node.storage import open_objects, open_store
from polefs.node.volume import FORMAT, Contents, Volume, VolumeInfo, open_volume, restore_volume
from polefs.objects.location import S3Location

Show = Callable[[Phase], None]

SCHEMES = ("postgresql://", "postgres://")


class Summary(msgspec.Struct):
    """What has been dumped or loaded."""

    name: str
    uuid: str
    store: str | None
    """URL of the bucket with the contents; None: they are in the directory of the volume."""
    rows: dict[str, int]
    """Of each table."""
    bytes: int
    """Of the dump."""


def dump_volume(source: str, name: str | None, stream: BinaryIO, show: Show) -> Summary:
    """``source``: the directory of a volume that nobody uses, or the address of a PostgreSQL database with volume
    ``name``, which may be in use. ``Refusal`` when it cannot be read, and what the stream raises."""
    if source.startswith(SCHEMES):
        if name is None:
            raise Refusal(errno.EINVAL, "a database holds many volumes: say which with --name NAME", 2)
        try:
            return asyncio.run(_dump_database(source, name, stream, show))
        except FormatError as error:
            raise Refusal(errno.EPROTO, str(error)) from None
    if name is not None:
        raise Refusal(errno.EINVAL, "--name is for volumes in a database: leave it out", 2)
    volume = open_volume(source)
    volume.lock(Holder(os.getpid(), "dump"))
    try:
        return _dump_directory(volume, stream, show)
    finally:
        volume.unlock()


def _dump_directory(volume: Volume, stream: BinaryIO, show: Show) -> Summary:
    if os.listdir(volume.local):
        raise Refusal(
            errno.EBUSY,
            f"contents that are not yet written back wait in {volume.local}: mount and unmount the volume first",
        )
    store = open_store(volume, read_only=True)
    try:
        contents = msgspec.json.encode(volume.info.contents).decode()
        state = msgspec.structs.replace(bulk.read_state(store), name=volume.info.name, uuid=volume.info.uuid)
        writer = DumpWriter(stream, Header(volume=state, contents=contents, made=time.time_ns()))
        for table in TABLES:
            writer.rows(table, _shown(bulk.read_rows(store, table), table, show))
        writer.end()
    finally:
        store.shutdown()
    return _summary(writer.counts, writer.position, state, volume.info.contents)


def _shown(rows: Iterator[Row], table: Table, show: Show) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if number % 1000 == 0:
            show(Phase(table.name, number))
        yield row


async def _dump_database(dsn: str, name: str, stream: BinaryIO, show: Show) -> Summary:
    from polefs.meta.store.postgres.bulk import snapshot

    async with snapshot(dsn, name) as found:
        writer = DumpWriter(stream, Header(volume=found.state, contents=found.contents, made=time.time_ns()))
        for table in TABLES:
            done = 0
            async for rows in found.pages(table):
                writer.rows(table, rows)
                done += len(rows)
                show(Phase(table.name, done))
        writer.end()
        return _summary(writer.counts, writer.position, found.state, _contents_of(writer.header))


def load_volume(stream: BinaryIO, size: int | None, target: str, name: str | None, show: Show) -> Summary:
    """Make a volume of a dump: a directory, or a volume in a PostgreSQL database. It has the identity of the one that
    was dumped, so only one of the two may be used from then on. ``size``: of the dump, bytes, when that is known;
    ``name``: another than that of the dumped volume. ``Refusal`` and ``DumpError`` when it cannot be done; nothing is
    left then."""
    reader = DumpReader(stream)
    contents = _contents_of(reader.header)
    state = reader.header.volume
    if name is not None:
        state = msgspec.structs.replace(state, name=name)

    def pages() -> Iterator[tuple[Table, list[Row]]]:
        for table, rows in reader.pages():
            show(Phase(table.name, reader.position, size))
            yield table, rows

    try:
        if target.startswith(SCHEMES):
            from polefs.meta.store.postgres.bulk import restore

            asyncio.run(restore(target, state, reader.header.contents, pages()))
        else:
            _load_directory(target, state, contents, pages())
    except FormatError as error:
        raise Refusal(errno.EPROTO, str(error)) from None
    except ValueError as error:
        raise DumpError(f"the dump holds {error}: check the volume that it is of with polefs fsck") from None
    return _summary(reader.counts, reader.position, state, contents)


def _load_directory(
    path: str, state: VolumeState, contents: Contents, pages: Iterator[tuple[Table, list[Row]]]
) -> None:
    def build(volume: Volume) -> None:
        if isinstance(contents.objects, S3Location):
            asyncio.run(_find_objects(volume))
        try:
            bulk.restore(volume.meta, state, pages)
        except (DumpError, Refusal):
            raise
        except OSError as error:
            raise Refusal(error.errno or errno.EIO, f"cannot write {volume.meta}: {plain(error)}") from error

    info = VolumeInfo(FORMAT, state.name, state.uuid, contents)
    restore_volume(path, Holder(os.getpid(), "format"), info, build).unlock()


async def _find_objects(volume: Volume) -> None:
    """``Refusal`` unless the bucket is in reach and the prefix is the volume's."""
    objects = await open_objects(volume)
    await objects.close()


def _contents_of(header: Header) -> Contents:
    """Empty: of a volume that was made in a database, which keeps nothing about it yet."""
    if not header.contents:
        return Contents()
    try:
        UUID(header.volume.uuid)
        return msgspec.json.decode(header.contents, type=Contents)
    except (msgspec.DecodeError, ValueError):
        raise DumpError(
            "the dump tells nothing about the place of the contents that this polefs knows: upgrade polefs"
        ) from None


def _summary(rows: dict[str, int], length: int, state: VolumeState, contents: Contents) -> Summary:
    location = contents.objects
    store = location.url if isinstance(location, S3Location) else None
    return Summary(state.name, state.uuid, store, rows, length)
