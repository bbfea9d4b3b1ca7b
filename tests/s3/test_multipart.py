"""Objects that travel in parts."""

from __future__ import annotations

import asyncio
import hashlib
import os

import msgspec
import pytest

from polefs.objects import s3, s3multipart
from polefs.objects.base import StoreError
from polefs.objects.s3 import S3Store
from tests.s3.faults import Fault, FaultProxy
from tests.s3.helpers import all_of, use
from tests.s3.server import BUCKET, Place, SeaweedServer

PART = 5 << 20
"""The smallest that S3 takes."""

BODY = hashlib.shake_256(b"multipart").digest(3 * PART + 12345)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "MULTIPART_ABOVE", 2 * PART)
    monkeypatch.setattr(s3, "PART_SIZE", PART)


@pytest.fixture
def place(s3_place: Place, proxy: FaultProxy) -> Place:
    return msgspec.structs.replace(s3_place, endpoint=proxy.endpoint)


def uploads(server: SeaweedServer, place: Place) -> list[str]:
    """The keys of uploads that are neither completed nor aborted."""
    found = server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=place.prefix)
    return [each["Key"] for each in found.get("Uploads", ())]


def test_put_in_parts(place: Place, proxy: FaultProxy, s3_server: SeaweedServer) -> None:
    async def work(store: S3Store) -> None:
        # Parts of the object do not follow those of the request.
        await store.put("big", [BODY[:1], memoryview(BODY)[1 : 2 * PART + 7], bytearray(BODY[2 * PART + 7 :])])
        assert await store.read("big", 1 << 30) == BODY
        assert await store.get("big", PART - 10, 20) == BODY[PART - 10 : PART + 10]
        assert await all_of(store.list()) == {"big": len(BODY)}

    use(place, work)
    assert proxy.tally.requests["PUT"] == 4
    assert uploads(s3_server, place) == []


def test_a_key_is_written_once(place: Place, s3_server: SeaweedServer) -> None:
    async def work(store: S3Store) -> None:
        await store.put("big", [BODY])
        await store.put("big", [BODY])
        with pytest.raises(FileExistsError):
            await store.put("big", [BODY[::-1]])
        assert await store.read("big", 1 << 30) == BODY

    use(place, work)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.SLOW_DOWN, Fault.LOSE_REPLY, Fault.GARBLE_REQUEST])
def test_parts_that_fail_are_sent_again(place: Place, proxy: FaultProxy, fault: Fault) -> None:
    async def work(store: S3Store) -> None:
        proxy.inject(fault, method="PUT", times=3)
        await store.put("big", [BODY])
        assert await store.read("big", 1 << 30) == BODY

    use(place, work)
    assert proxy.tally.faults[fault] == 3


def test_a_lost_reply_at_the_end(place: Place, proxy: FaultProxy) -> None:
    async def work(store: S3Store) -> None:
        proxy.inject(Fault.LOSE_REPLY, method="POST", path="uploadId=", times=1)
        await store.put("big", [BODY])
        assert await store.read("big", 1 << 30) == BODY

    use(place, work)
    assert proxy.tally.faults[Fault.LOSE_REPLY] == 1


def test_what_fails_is_aborted(place: Place, proxy: FaultProxy, s3_server: SeaweedServer) -> None:
    async def work(store: S3Store) -> None:
        proxy.inject(Fault.ACCESS_DENIED, method="PUT", path="partNumber=3")
        with pytest.raises(StoreError, match="no permission"):
            await store.put("big", [BODY])
        proxy.heal()
        assert await all_of(store.list()) == {}

    use(place, work)
    assert uploads(s3_server, place) == []


def test_what_is_cancelled_is_aborted(place: Place, proxy: FaultProxy, s3_server: SeaweedServer) -> None:
    async def work(store: S3Store) -> None:
        proxy.inject(Fault.HANG, method="PUT", path="partNumber=2")
        task = asyncio.create_task(store.put("big", [BODY]))
        await asyncio.to_thread(proxy.wait_for, Fault.HANG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.heal()
        assert await all_of(store.list()) == {}

    use(place, work)
    assert uploads(s3_server, place) == []


def test_what_is_there_already_leaves_no_upload(place: Place, s3_server: SeaweedServer) -> None:
    async def work(store: S3Store) -> None:
        await store.put("big", [BODY])
        await store.put("big", [BODY])

    use(place, work)
    assert uploads(s3_server, place) == []


def test_uploads_are_listed_and_aborted(place: Place, s3_server: SeaweedServer) -> None:
    client = s3_server.client()
    begun = {}
    for key in ("segments/0/1", "segments/0/2", "other"):
        answer = client.create_multipart_upload(Bucket=BUCKET, Key=f"{place.prefix}/{key}")
        begun[key] = answer["UploadId"]
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{place.prefix}-another/segments/0/1")

    async def work(store: S3Store) -> None:
        found = [upload async for upload in store.uploads()]
        assert {upload.key: upload.id for upload in found} == begun
        assert all(0 <= upload.age < 3600 for upload in found)
        assert {upload.key async for upload in store.uploads("segments/")} == {"segments/0/1", "segments/0/2"}
        for upload in found[:2]:
            await store.abort(upload)
            await store.abort(upload)
        assert [upload async for upload in store.uploads()] == found[2:]

    use(place, work)
    assert uploads(s3_server, place) != []
    assert uploads(s3_server, Place(place.endpoint, BUCKET, f"{place.prefix}-another")) != []


def test_cutting_copies_nothing() -> None:
    parts = [os.urandom(size) for size in (10, 0, 3, 7, 100)]
    whole = b"".join(parts)
    for length in (1, 7, 10, 20, 119, 120, 121):
        pieces = list(s3multipart._split(parts, length))
        assert b"".join(b"".join(piece) for piece in pieces) == whole
        assert all(sum(map(len, piece)) == length for piece in pieces[:-1])
        assert all(view.obj is not None for piece in pieces for view in piece)
