"""The object that says whose a prefix is: made when a volume is, looked at whenever one is opened."""

from __future__ import annotations

import errno
import socket
from datetime import UTC, datetime

import msgspec

from polefs.objects.base import StoreError
from polefs.objects.s3 import S3Store

KEY = "polefs.json"
_SIZE_MAX = 64 << 10


class Marker(msgspec.Struct, frozen=True):
    """The volume that the prefix belongs to, and for people: its name, where and when it was made."""

    uuid: str
    name: str
    host: str
    made: str


async def claim(store: S3Store, uuid: str, name: str) -> bool:
    """Make the prefix that of a new volume, also when an earlier attempt has done so already; whether the server has
    conditional PUTs. FileExistsError when it is another volume's, ENOTEMPTY when it holds anything else, and what
    ``S3Store`` raises."""
    found = await _read(store)
    if found is not None and found.uuid != uuid:
        raise FileExistsError(errno.EEXIST, f"{_whose(store, found)}: give another prefix, or remove all objects in it")
    async for info in store.list():
        if info.key == KEY and found is not None:
            continue
        text = f"{store.location.url} is not empty, it holds {info.key}: give another prefix"
        raise StoreError(errno.ENOTEMPTY, text)
    if found is not None:
        await store.delete([KEY])
    marker = Marker(uuid, name, socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
    body = msgspec.json.encode(marker)
    conditional = await store.probe_conditional_put(KEY, body)
    found = await _read(store)
    if found != marker:
        who = _whose(store, found) if found is not None else f"{store.location.url} does not keep what is written"
        raise FileExistsError(errno.EEXIST, f"{who}: give another prefix")
    return conditional


async def check(store: S3Store, uuid: str) -> None:
    """OSError with a line that says what to do when the prefix is not this volume's, or cannot be reached."""
    found = await _read(store)
    if found is None:
        text = f"{store.location.url} has no object {KEY}: correct the prefix in volume.json, or restore the object"
        raise StoreError(errno.ESTALE, text)
    if found.uuid != uuid:
        raise StoreError(errno.ESTALE, f"{_whose(store, found)}: correct the bucket and the prefix in volume.json")


def _whose(store: S3Store, marker: Marker) -> str:
    who = f"volume '{marker.name}' ({marker.uuid}), made on {marker.host} at {marker.made}"
    return f"{store.location.url} belongs to {who}"


async def _read(store: S3Store) -> Marker | None:
    try:
        data = await store.read(KEY, _SIZE_MAX)
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(data, type=Marker)
    except msgspec.DecodeError as error:
        text = f"{store.location.url}/{KEY} is damaged or not polefs's ({error}): give another prefix"
        raise StoreError(errno.EINVAL, text) from None
