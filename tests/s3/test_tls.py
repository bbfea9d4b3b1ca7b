"""Endpoints with TLS, certificates of one's own, and buckets in host names."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from polefs.objects.base import StoreError
from polefs.objects.s3 import S3Store
from tests.s3.faults import FaultProxy
from tests.s3.helpers import all_of, location_of, use
from tests.s3.server import BUCKET, DOMAIN, Place, SeaweedServer

BODY = os.urandom(300_000)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, str]:
    """A certificate authority, and a file with its certificate."""
    authority = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return authority, str(path)


def serve(server: SeaweedServer, authority: trustme.CA, name: str) -> FaultProxy:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    proxy = FaultProxy(server.endpoint, tls=context)
    proxy.start()
    return proxy


@pytest.fixture
def tls(s3_server: SeaweedServer, authority: tuple[trustme.CA, str]) -> Iterator[FaultProxy]:
    proxy = serve(s3_server, authority[0], "127.0.0.1")
    yield proxy
    proxy.close()


async def everything(store: S3Store) -> None:
    await store.put("k", [BODY])
    assert await store.get("k", 1000, 200_000) == BODY[1000:201_000]
    assert await store.read("k", 1 << 20) == BODY
    await store.put("k", [BODY])
    assert await all_of(store.list()) == {"k": len(BODY)}
    await store.delete(["k"])
    assert await all_of(store.list()) == {}


def refusal(place: Place, says: str, **changes: Any) -> None:
    location = location_of(place, **changes)
    for operation in (lambda store: store.get("k", 0, 1), lambda store: all_of(store.list())):
        with pytest.raises(StoreError, match=says) as caught:
            use(location, operation)
        assert caught.value.errno == errno.EPROTO


def test_trust(
    s3_place: Place, tls: FaultProxy, authority: tuple[trustme.CA, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = msgspec.structs.replace(s3_place, endpoint=tls.endpoint)
    assert place.endpoint.startswith("https://")
    use(location_of(place, ca_bundle=authority[1]), everything)
    refusal(place, "certificate is not trusted .*: give --ca-bundle FILE or set AWS_CA_BUNDLE")
    monkeypatch.setenv("AWS_CA_BUNDLE", authority[1])
    use(location_of(place), everything)


def test_a_certificate_of_another_host(
    s3_server: SeaweedServer, s3_place: Place, authority: tuple[trustme.CA, str]
) -> None:
    proxy = serve(s3_server, authority[0], "s3.example.org")
    try:
        place = msgspec.structs.replace(s3_place, endpoint=proxy.endpoint)
        refusal(place, "certificate is not trusted .*127.0.0.1", ca_bundle=authority[1])
    finally:
        proxy.close()


def test_tls_where_there_is_none(s3_place: Place) -> None:
    place = msgspec.structs.replace(s3_place, endpoint=s3_place.endpoint.replace("http:", "https:"))
    refusal(place, "no TLS connection .*: check https:// or http:// in --endpoint")


def test_a_bundle_that_is_none(s3_place: Place, tls: FaultProxy, tmp_path: Path) -> None:
    place = msgspec.structs.replace(s3_place, endpoint=tls.endpoint)
    (tmp_path / "empty.pem").write_text("no certificate")
    for path in (tmp_path / "empty.pem", tmp_path / "missing.pem"):
        with pytest.raises(StoreError, match=f"cannot read the certificates in {path}"):
            use(location_of(place, ca_bundle=str(path)), everything)


@pytest.fixture
def names_of_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host names of buckets be known, as DNS does with real ones."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        local = isinstance(name, str) and (name == DOMAIN or name.endswith(f".{DOMAIN}"))
        return look_up("127.0.0.1" if local else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("names_of_buckets")
def test_the_bucket_in_the_host_name(s3_server: SeaweedServer, s3_place: Place, proxy: FaultProxy) -> None:
    place = msgspec.structs.replace(s3_place, endpoint=f"http://{DOMAIN}:{proxy.port}")
    # uvloop does not ask Python's socket module for addresses.
    use(location_of(place, path_style=False), everything, loop_factory=asyncio.new_event_loop)
    assert proxy.tally.hosts == {f"{BUCKET}.{DOMAIN}:{proxy.port}"}


@pytest.mark.usefixtures("names_of_buckets")
def test_the_bucket_in_the_path(s3_place: Place, proxy: FaultProxy) -> None:
    place = msgspec.structs.replace(s3_place, endpoint=f"http://{DOMAIN}:{proxy.port}")
    use(location_of(place, path_style=True), everything, loop_factory=asyncio.new_event_loop)
    assert proxy.tally.hosts == {f"{DOMAIN}:{proxy.port}"}
