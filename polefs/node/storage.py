"""Opening what a volume stores: its metadata and its contents."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec

from polefs.meta.store.base import FormatError
from polefs.meta.store.sqlite import SqliteStore
from polefs.node.cache import CacheOptions, open_cache
from polefs.node.errors import Refusal, plain
from polefs.node.status import Status
from polefs.objects.location import DirectoryLocation

if TYPE_CHECKING:
    from polefs.data.files import FileStore
    from polefs.data.frames import Codec
    from polefs.meta.service import MetaService
    from polefs.node.volume import Contents, Volume
    from polefs.objects.base import ObjectStore


OPEN_SECONDS = 6.0
"""For reaching an object store when a volume is made or opened; what does not answer by then is down."""


class Storage:
    """Metadata and contents of one locked volume, open."""

    def __init__(self, meta: MetaService, objects: ObjectStore, files: FileStore) -> None:
        self.meta = meta
        self.objects = objects
        self.files = files

    async def close(self) -> None:
        """Write back everything, then close. When contents cannot be written back they stay in the volume's ``local``
        directory, all the rest is closed, and the ``OSError`` is raised."""
        try:
            await self.files.close()
        finally:
            try:
                await self.meta.close()
            finally:
                await self.objects.close()


async def open_storage(
    volume: Volume, secret: bytes | None = None, cache_options: CacheOptions | None = None
) -> Storage:
    """Open a locked volume and finish what a killed daemon has left. ``secret`` opens an encrypted one. ``Refusal``
    when a part is missing, damaged or out of reach, or the secret is another."""
    from polefs.data.files import FileStore
    from polefs.meta.service import MetaService

    codec = make_codec(volume, secret)
    cache = open_cache(volume, cache_options or CacheOptions())
    store = open_store(volume)
    try:
        objects = await open_objects(volume)
    except BaseException:
        store.shutdown()
        raise
    meta = MetaService(store)
    to_store = volume.info.contents.durability == "s3"
    files = FileStore(meta, objects, volume.local, codec=codec, cache=cache, sync_to_store=to_store)
    try:
        await meta.start()
        await files.recover()
        files.start()
    except OSError as error:
        await meta.close()
        await objects.close()
        raise Refusal(
            error.errno or errno.EIO, f"cannot bring back the contents kept in {volume.local}: {plain(error)}"
        ) from error
    return Storage(meta, objects, files)


async def open_objects(volume: Volume) -> ObjectStore:
    """The store of a volume's contents, once it is known to be its own. ``Refusal`` when it cannot be used."""
    location = volume.info.contents.objects
    if isinstance(location, DirectoryLocation):
        from polefs.objects.directory import DirectoryStore

        return DirectoryStore(volume.objects)
    from polefs.objects.marker import check
    from polefs.objects.s3 import S3Store
    from polefs.objects.s3operate import DEADLINE

    try:
        store = await S3Store.open(location, deadline=OPEN_SECONDS)
        try:
            await check(store, volume.info.uuid)
        except BaseException:
            await store.close()
            raise
    except OSError as error:
        raise Refusal(error.errno or errno.EIO, plain(error)) from error
    store.set_deadline(DEADLINE)
    return store


def make_codec(volume: Volume, secret: bytes | None) -> Codec | None:
    """How the contents of a volume are stored; None: as they are, in local files. ``Refusal`` ENOKEY and EKEYREJECTED
    for an encrypted volume without its secret."""
    from polefs.data.frames import COMPRESSIONS, Codec, Coding

    contents = volume.info.contents
    coding = COMPRESSIONS[contents.compression]
    if contents.key is None:
        if isinstance(contents.objects, DirectoryLocation) and coding == Coding.PLAIN:
            return None
        return Codec(coding)
    from polefs.data.cipher import Cipher

    if secret is None:
        raise Refusal(errno.ENOKEY, f"volume {volume.path} is encrypted: give its key with --key-file FILE")
    try:
        return Codec(coding, Cipher(contents.key.unwrap(secret)))
    except ValueError:
        raise Refusal(errno.EKEYREJECTED, f"this is not the key of volume {volume.path}: give the right one") from None


def claim_objects(contents: Contents, name: str, uuid: str) -> Contents:
    """Make the place of the objects that of a new volume; returns what has been found out about it. Runs an event loop.
    ``Refusal`` when it cannot be used, or is another volume's."""
    location = contents.objects
    if isinstance(location, DirectoryLocation):
        return contents

    from polefs.objects.marker import claim
    from polefs.objects.s3 import S3Store

    async def work() -> bool:
        store = await S3Store.open(location, deadline=OPEN_SECONDS)
        try:
            return await claim(store, uuid, name)
        finally:
            await store.close()

    try:
        conditional = asyncio.run(work())
    except OSError as error:
        raise Refusal(error.errno or errno.EIO, plain(error)) from error
    return msgspec.structs.replace(contents, objects=msgspec.structs.replace(location, conditional_put=conditional))


def make_store(path: str, *, name: str, uuid: str, bytes_limit: int, inodes_limit: int) -> None:
    """Make the database of a new volume, durably."""
    SqliteStore.create(
        path, name=name, identity=UUID(uuid), bytes_limit=bytes_limit, inodes_limit=inodes_limit
    ).shutdown()


def open_store(volume: Volume, *, read_only: bool = False) -> SqliteStore:
    """``Refusal``: EPROTO (newer format), ENOENT, EIO (damaged), EACCES."""
    with _refusals(volume):
        return SqliteStore.open(volume.meta, read_only=read_only)


def read_status(volume: Volume) -> Status:
    """What the files of a volume tell while no daemon works on it."""
    from polefs.meta.service import MetaService

    store = open_store(volume, read_only=True)
    try:
        usage = asyncio.run(MetaService(store).usage())
    finally:
        store.shutdown()
    bucket = volume.bucket
    return Status(
        volume=volume.path,
        name=volume.info.name,
        uuid=volume.info.uuid,
        format=volume.info.format,
        store=None if bucket is None else bucket.url,
        endpoint=None if bucket is None else bucket.endpoint,
        mounted=False,
        bytes_used=usage.bytes,
        bytes_limit=usage.bytes_limit,
        inodes_used=usage.inodes,
        inodes_limit=usage.inodes_limit,
    )


@contextmanager
def _refusals(volume: Volume) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise Refusal(errno.EPROTO, str(error)) from None
    except FileNotFoundError:
        raise Refusal(
            errno.ENOENT, f"volume {volume.path} has lost its metadata {volume.meta}: restore it from a copy"
        ) from None
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise Refusal(errno.EIO, f"the metadata {volume.meta} is damaged ({error}): restore it from a copy") from None
    except OSError as error:
        raise Refusal(error.errno or errno.EIO, f"cannot open the metadata of {volume.path}: {plain(error)}") from None
