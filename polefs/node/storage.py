"""Opening what a volume stores: its metadata and its contents."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec

from polefs.meta.store.base import FormatError
from polefs.meta.store.sqlite import SqliteStore
from polefs.node.cache import CacheOptions, open_cache
from polefs.node.errors import Refusal, plain
from polefs.node.status import Status
from polefs.objects.base import StoreError
from polefs.objects.localio import space_of
from polefs.objects.location import DirectoryLocation

if TYPE_CHECKING:
    from polefs.data.dirty import Limits
    from polefs.data.files import FileStore
    from polefs.data.frames import Codec
    from polefs.meta.service import MetaService
    from polefs.node.volume import Contents, Volume
    from polefs.objects.base import ObjectStore

log = logging.getLogger(__name__)

OPEN_SECONDS = 6.0
"""For reaching an object store when a volume is made or checked; what does not answer by then is down."""

MOUNT_SECONDS = 2.0
"""The same when it is mounted: a mount goes on without."""

DIRTY_MIN, DIRTY_MAX = 32 << 20, 16 << 30
"""What the limit of contents that are not yet written back is at least and at most by default, bytes."""

STORE_TIMEOUT = 300.0
"""Seconds that a store may be out of reach until programs get errors, unless options say otherwise."""


class Storage:
    """Metadata and contents of one locked volume, open."""

    def __init__(self, meta: MetaService, objects: ObjectStore, files: FileStore) -> None:
        self.meta = meta
        self.objects = objects
        self.files = files
        self.warning: str | None = None
        """What is not as it should be, for people."""

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
    volume: Volume,
    secret: bytes | None = None,
    cache_options: CacheOptions | None = None,
    *,
    store_timeout: float | None = None,
    dirty_limit: int | None = None,
    gc_interval: float = 0.0,
    patient: bool = False,
    use_cache: bool = True,
) -> Storage:
    """Open a locked volume, with what a killed daemon has left, which is written back from then on. ``secret`` opens an
    encrypted one; ``store_timeout``, ``dirty_limit`` and ``gc_interval`` are as ``MountRequest`` has them; ``patient``:
    a store that is out of reach is only a ``warning``. Who does not ``use_cache`` must not change contents: it would
    not know of it. ``Refusal`` when a part is missing, damaged or out of reach, or the secret is another."""
    from polefs.data.files import FileStore
    from polefs.meta.service import MetaService

    codec = make_codec(volume, secret)
    if store_timeout is not None and isinstance(volume.info.contents.objects, DirectoryLocation):
        raise Refusal(
            errno.EINVAL, f"volume {volume.path} keeps its contents in a local directory: leave out store_timeout", 2
        )
    timeout = (STORE_TIMEOUT if store_timeout is None else store_timeout) or math.inf
    cache = open_cache(volume, cache_options or CacheOptions()) if use_cache else None
    store = open_store(volume)
    warnings: list[str] = []
    try:
        objects = await open_objects(volume, deadline=timeout, out_of_reach=warnings.append if patient else None)
    except BaseException:
        store.shutdown()
        raise
    meta = MetaService(store)
    to_store = volume.info.contents.durability == "s3"
    files = FileStore(
        meta,
        objects,
        volume.local,
        limits=_limits(volume, dirty_limit),
        codec=codec,
        cache=cache,
        sync_to_store=to_store,
        store_timeout=timeout,
        grace=volume.info.contents.grace,
        gc_interval=gc_interval,
    )
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
    storage = Storage(meta, objects, files)
    for reason in warnings:
        storage.warning = f"mounted all the same: {reason}; until then only what is cached can be read"
        log.warning("%s", storage.warning)
    return storage


def _limits(volume: Volume, dirty_limit: int | None) -> Limits:
    """What may wait to be written back in ``local``: by default half of what is free there, for what has been written
    back goes only with all of its time."""
    from polefs.data.dirty import Limits

    if dirty_limit is None:
        dirty_limit = min(max(space_of(volume.local).bytes_available // 2, DIRTY_MIN), DIRTY_MAX)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(local=dirty_limit, replicas=max(files // 2, 1))


async def open_objects(
    volume: Volume, *, deadline: float | None = None, out_of_reach: Callable[[str], None] | None = None
) -> ObjectStore:
    """The store of a volume's contents, once it is known to be its own; its operations then have this deadline.
    ``Refusal`` when it cannot be used. Where it is only out of reach, and ``out_of_reach`` is given, that is called
    with the reason, and the store makes sure whose it is when it is first used."""
    location = volume.info.contents.objects
    if isinstance(location, DirectoryLocation):
        from polefs.objects.directory import DirectoryStore

        return DirectoryStore(volume.objects)
    from polefs.objects.marker import check
    from polefs.objects.s3 import S3Store
    from polefs.objects.s3operate import DEADLINE

    try:
        store = await S3Store.open(location, deadline=OPEN_SECONDS if out_of_reach is None else MOUNT_SECONDS)
        try:
            await check(store, volume.info.uuid)
        except StoreError as error:
            if out_of_reach is None or not error.transient:
                await store.close()
                raise
            out_of_reach(plain(error))
            store.before_use = partial(check, store, volume.info.uuid)
        except BaseException:
            await store.close()
            raise
    except OSError as error:
        raise Refusal(error.errno or errno.EIO, plain(error)) from error
    store.deadline = deadline or DEADLINE
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
