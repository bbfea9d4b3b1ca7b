"""The S3 object store on a real server."""

from __future__ import annotations

import asyncio
import errno
from datetime import UTC, datetime

import msgspec
import pytest

from polefs.objects import s3delete, s3list
from polefs.objects.base import ObjectInfo, StoreError, segment_key
from polefs.objects.location import S3Location
from polefs.objects.s3 import S3Store
from tests.s3.faults import Fault, FaultProxy
from tests.s3.helpers import TEST_SECONDS, all_of, location_of, use
from tests.s3.server import BUCKET, READER_KEY, SECRET_KEY, Place, SeaweedServer


def test_put_and_get(s3_server: SeaweedServer, s3_place: Place) -> None:
    async def work(store: S3Store) -> None:
        await store.put("a/b", [b"one", memoryview(b"two"), bytearray(b"three")])
        assert await store.get("a/b", 0, 11) == b"onetwothree"
        assert await store.get("a/b", 3, 3) == b"two"
        assert await store.get("a/b", 6, 5) == b"three"
        assert await store.get("a/b", 6, 0) == b""
        assert store.get_now("a/b", 0, 1) is None
        assert not await store.adopt("c", "/etc/hostname")
        assert await all_of(store.list()) == {"a/b": 11}

    use(s3_place, work)
    answer = s3_server.client().get_object(Bucket=BUCKET, Key=f"{s3_place.prefix}/a/b")
    assert answer["Body"].read() == b"onetwothree"


def test_empty_object(s3_place: Place) -> None:
    async def work(store: S3Store) -> None:
        await store.put("empty", [])
        await store.put("empty", [b""])
        assert await all_of(store.list()) == {"empty": 0}

    use(s3_place, work)


def test_many_parts_and_sizes(s3_place: Place) -> None:
    async def work(store: S3Store) -> None:
        parts = [bytes([n % 251]) * 3000 for n in range(2000)]
        whole = b"".join(parts)
        await store.put("k", parts)
        ranges = [(0, len(whole)), (1, 1), (len(whole) - 1, 1), (4095, 8193), (1 << 20, 3 << 20)]
        found = await asyncio.gather(*(store.get("k", offset, length) for offset, length in ranges))
        assert all(
            data == whole[offset : offset + length] for data, (offset, length) in zip(found, ranges, strict=True)
        )

    use(s3_place, work)


def test_missing_and_short_objects(s3_place: Place) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [b"abc"])
        with pytest.raises(FileNotFoundError):
            await store.get("none", 0, 1)
        for offset, length in ((0, 4), (2, 2), (3, 1), (100, 1)):
            with pytest.raises(StoreError, match="the object is shorter") as caught:
                await store.get("k", offset, length)
            assert caught.value.errno == errno.EIO

    use(s3_place, work)


def test_a_key_is_written_once(s3_place: Place) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [b"abc"])
        await store.put("k", [b"abc"])
        for other in (b"abd", b"abcd", b""):
            with pytest.raises(FileExistsError):
                await store.put("k", [other])
        assert await store.get("k", 0, 3) == b"abc"

    use(s3_place, work)


def test_one_of_several_writers_wins(s3_place: Place) -> None:
    async def work(store: S3Store) -> None:
        outcomes = await asyncio.gather(
            *(store.put("k", [bytes([n]) * 1000]) for n in range(8)), return_exceptions=True
        )
        winners = [number for number, outcome in enumerate(outcomes) if outcome is None]
        assert len(winners) == 1
        assert all(isinstance(outcome, FileExistsError) for outcome in outcomes if outcome is not None)
        assert await store.get("k", 0, 1000) == bytes(winners) * 1000

    use(s3_place, work)


def test_delete(s3_place: Place) -> None:
    async def work(store: S3Store) -> None:
        await asyncio.gather(*(store.put(segment_key(number), [b"x"]) for number in range(3)))
        await store.delete([segment_key(0), segment_key(2), "none"])
        await store.delete([])
        assert await all_of(store.list()) == {segment_key(1): 1}
        with pytest.raises(FileNotFoundError):
            await store.get(segment_key(2), 0, 1)

    use(s3_place, work)


def test_list_by_prefix(s3_server: SeaweedServer, s3_place: Place) -> None:
    s3_server.client().put_object(Bucket=BUCKET, Key=f"{s3_place.prefix}-neighbour/a", Body=b"")

    async def work(store: S3Store) -> None:
        await asyncio.gather(*(store.put(key, [b"."]) for key in ("a/x", "ab/y", "b", "a/c/d")))
        assert set(await all_of(store.list())) == {"a/x", "ab/y", "a/c/d", "b"}
        assert set(await all_of(store.list("a"))) == {"a/x", "ab/y", "a/c/d"}
        assert set(await all_of(store.list("a/"))) == {"a/x", "a/c/d"}
        assert set(await all_of(store.list("a/c/"))) == {"a/c/d"}
        assert set(await all_of(store.list("z"))) == set()

    use(s3_place, work)


def test_lists_and_deletions_of_several_pages(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3list, "_PAGE", 10)
    monkeypatch.setattr(s3list, "_INLINE_MAX", 0)
    monkeypatch.setattr(s3delete, "_BATCH", 10)
    keys = [segment_key(number) for number in range(240, 275)]

    async def work(store: S3Store) -> None:
        await asyncio.gather(*(store.put(key, [b"x"]) for key in keys))
        assert set(await all_of(store.list("segments/"))) == set(keys)
        await store.delete(keys)
        assert await all_of(store.list()) == {}

    use(s3_place, work)


def test_ages_are_those_of_the_server(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever time this machine believes that it is."""

    async def work(store: S3Store) -> None:
        await store.put("k", [b"x"])
        monkeypatch.setattr("time.time", lambda: 1e9)
        ages = [info.age async for info in store.list()]
        assert len(ages) == 1 and 0 <= ages[0] < TEST_SECONDS

    use(s3_place, work)


def test_an_answer_without_date_makes_nothing_old() -> None:
    listed = "<ListBucketResult><Contents><Key>k%2B%20l</Key><Size>3</Size><LastModified>2001-01-01T00:00:00Z"
    body = f"{listed}</LastModified></Contents></ListBucketResult>".encode()
    location = S3Location(bucket="b")
    lister = s3list.Lister(location, None, None, str)  # type: ignore[arg-type]
    assert lister._parse_objects(body, None) == ([ObjectInfo("k+ l", 3, 0.0)], None)
    assert lister._parse_objects(body, datetime(2001, 1, 1, 1, tzinfo=UTC))[0][0].age == 3600


def test_keys_that_are_not_ours(s3_server: SeaweedServer, s3_place: Place) -> None:
    names = {"a+b c", "ü/<&>", "100%"}
    for name in names:
        s3_server.client().put_object(Bucket=BUCKET, Key=f"{s3_place.prefix}/{name}", Body=b"1")

    async def work(store: S3Store) -> None:
        assert set(await all_of(store.list())) == names
        await store.delete(sorted(names))
        assert await all_of(store.list()) == {}

    use(s3_place, work)


@pytest.mark.parametrize("fault", [Fault.NOT_IMPLEMENTED, Fault.NOT_ALLOWED])
def test_a_server_that_deletes_one_by_one(s3_place: Place, proxy: FaultProxy, fault: Fault) -> None:
    proxy.inject(fault, method="POST", path="delete")
    keys = [segment_key(number) for number in range(30)]

    async def work(store: S3Store) -> None:
        for _ in range(2):
            await asyncio.gather(*(store.put(key, [b"x"]) for key in keys))
            await store.delete([*keys, "none"])
            assert await all_of(store.list()) == {}

    use(msgspec.structs.replace(s3_place, endpoint=proxy.endpoint), work)
    assert proxy.tally.faults[fault] == 1
    assert proxy.tally.requests["DELETE"] == 62


def test_whole_bucket(s3_server: SeaweedServer) -> None:
    s3_server.client().create_bucket(Bucket="whole")

    async def work(store: S3Store) -> None:
        await store.put("a/b", [b"x"])
        assert await all_of(store.list()) == {"a/b": 1}
        assert await store.get("a/b", 0, 1) == b"x"

    use(location_of(Place(s3_server.endpoint, "whole", "")), work)


async def _read(store: S3Store) -> bytes:
    return await store.get("k", 0, 1)


async def _write(store: S3Store) -> None:
    await store.put("k", [b"x"])


def _refusal(place: Place, number: int, says: str, *, writes: bool = False) -> None:
    with pytest.raises(StoreError, match=says) as caught:
        use(place, _write if writes else _read)
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)


def test_wrong_keys(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    _refusal(s3_place, errno.EACCES, "secret key does not fit")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    _refusal(s3_place, errno.EACCES, "does not know the access key: check AWS_ACCESS_KEY_ID")


def test_no_keys(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    _refusal(s3_place, errno.EACCES, "no credentials found: set AWS_ACCESS_KEY_ID")


def test_unknown_profile(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    _refusal(s3_place, errno.EACCES, "nobody.* could not be found: check")


def test_no_permission(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    _refusal(s3_place, errno.EACCES, "no permission: allow the key s3:ListBucket", writes=True)


def test_wrong_region(s3_place: Place, proxy: FaultProxy) -> None:
    proxy.inject(Fault.WRONG_REGION)
    place = msgspec.structs.replace(s3_place, endpoint=proxy.endpoint)
    _refusal(place, errno.EXDEV, "wrong region: the bucket is in region eu-west-1: give --region eu-west-1")
    _refusal(place, errno.EXDEV, "give --region eu-west-1", writes=True)


def test_no_such_bucket(s3_server: SeaweedServer) -> None:
    place = Place(s3_server.endpoint, "missing", "p")
    _refusal(place, errno.ENXIO, "there is no such bucket: make it first")
    _refusal(place, errno.ENXIO, "there is no such bucket: make it first", writes=True)
