"""Where the objects of a bucket are addressed, and how; nothing is asked of any server."""

from __future__ import annotations

import asyncio

import pytest

from polefs.objects.base import StoreError
from polefs.objects.location import S3Location, parse_url
from polefs.objects.s3 import S3Store

MINIO = "https://minio.example.org:9000"


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")


def address(location: S3Location) -> str:
    """Of the object ``k``, and the region that its requests are signed for."""

    async def work() -> str:
        store = await S3Store.open(location)
        try:
            return f"{store.plane.url(location.key('k'))} {store.plane.region}"
        finally:
            await store.close()

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("url", "endpoint", "region", "path_style", "expected"),
    [
        ("s3://bucket/a/b", None, "eu-west-1", None, "https://bucket.s3.eu-west-1.amazonaws.com/a/b/k eu-west-1"),
        ("s3://bucket", None, None, None, "https://bucket.s3.amazonaws.com/k us-east-1"),
        ("s3://bu.ck.et", None, "eu-west-1", None, "https://s3.eu-west-1.amazonaws.com/bu.ck.et/k eu-west-1"),
        ("s3://bucket", None, "eu-west-1", True, "https://s3.eu-west-1.amazonaws.com/bucket/k eu-west-1"),
        ("s3://bucket", None, "cn-north-1", None, "https://bucket.s3.cn-north-1.amazonaws.com.cn/k cn-north-1"),
        ("s3://bucket", MINIO, None, None, f"{MINIO}/bucket/k us-east-1"),
        ("s3://bucket", MINIO, "home", False, "https://bucket.minio.example.org:9000/k home"),
        ("s3://bucket", "http://[::1]:9000", None, None, "http://[::1]:9000/bucket/k us-east-1"),
        ("s3://bucket/a=b@c", MINIO, None, None, f"{MINIO}/bucket/a%3Db%40c/k us-east-1"),
        (
            "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint:door/p",
            None,
            "eu-west-1",
            None,
            "https://door-123456789012.s3-accesspoint.eu-west-1.amazonaws.com/p/k eu-west-1",
        ),
    ],
)
def test_addresses(url: str, endpoint: str | None, region: str | None, path_style: bool | None, expected: str) -> None:
    assert address(parse_url(url, endpoint=endpoint, region=region, path_style=path_style)) == expected


def test_the_region_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-south-1")
    assert address(parse_url("s3://bucket")) == "https://bucket.s3.eu-south-1.amazonaws.com/k eu-south-1"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert address(parse_url("s3://bucket")) == "https://bucket.s3.eu-north-1.amazonaws.com/k eu-north-1"
    assert address(parse_url("s3://bucket", region="us-west-2")).endswith("us-west-2")


def test_a_region_that_cannot_be() -> None:
    with pytest.raises(StoreError, match=r"s3://bucket: .*region"):
        address(parse_url("s3://bucket", region="eu west"))
