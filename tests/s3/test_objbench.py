"""``polefs objbench``: what it says about good and bad servers."""

from __future__ import annotations

import json

import msgspec
import pytest

from polefs.cli.app import run
from tests.s3.faults import Fault, FaultProxy
from tests.s3.server import BUCKET, Place, SeaweedServer


@pytest.fixture
def place(s3_place: Place, proxy: FaultProxy) -> Place:
    return msgspec.structs.replace(s3_place, endpoint=proxy.endpoint)


@pytest.fixture(autouse=True)
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polefs.objects.bench.SIZES", (64 << 10, 1 << 20))
    monkeypatch.setattr("polefs.objects.bench.CONCURRENCIES", (1, 4))


def objbench(place: Place, *options: str) -> int:
    return run(["objbench", "--seconds", "0.01", "--endpoint", place.endpoint, *options, place.url])


def leftovers(server: SeaweedServer, place: Place) -> int:
    count: int = server.client().list_objects_v2(Bucket=BUCKET, Prefix=place.prefix)["KeyCount"]
    return count


def test_a_good_server(s3_server: SeaweedServer, s3_place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert objbench(s3_place, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["usable"]
    lacking = {check["name"] for check in said["checks"] if not check["passed"]}
    assert lacking == {"lists are ordered by byte"}
    assert {each["method"] for each in said["latencies"]} == {"PUT", "GET"}
    assert all(0 < each["p50"] <= each["p90"] <= each["p99"] for each in said["latencies"])
    assert {(each["method"], each["size"]) for each in said["throughputs"]} == {
        (method, size) for method in ("PUT", "GET") for size in (64 << 10, 1 << 20)
    }
    assert all(each["per_second"] > 0 and each["bytes_per_second"] > 0 for each in said["throughputs"])
    assert leftovers(s3_server, s3_place) == 0


def test_the_tables(s3_place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert objbench(s3_place) == 0
    out = capsys.readouterr().out
    assert "usable; not there: lists are ordered by byte" in out
    assert "ms for 4 KiB" in out
    assert "PUT 1.0 MiB" in out


def test_a_server_without_conditions_and_checksums(
    place: Place, proxy: FaultProxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polefs.objects.bench.SIZES", ())
    proxy.inject(Fault.NO_CONDITIONS, method="PUT", path="/object-[0-9]+$")
    assert objbench(place, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    failed = {check["name"]: check["text"] for check in said["checks"] if not check["passed"]}
    assert "8 of 8 racing writers won" in failed["conditional PUTs"]
    proxy.heal()
    proxy.inject(Fault.NO_CHECKSUMS, method="PUT")
    assert objbench(place, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    failed = {check["name"]: check["text"] for check in said["checks"] if not check["passed"]}
    assert "a wrong CRC-32C is accepted" in failed["damaged uploads are refused"]


def test_an_unusable_server(
    s3_server: SeaweedServer, place: Place, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.inject(Fault.NO_RANGES, method="GET")
    assert objbench(place) == 1
    out = capsys.readouterr().out
    assert "not usable: a volume needs: " in out
    assert "the server does not know ranged GETs" in out
    assert "MiB/s" not in out
    proxy.heal()
    assert leftovers(s3_server, place) == 0


def test_refusals(s3_place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polefs.objects.bench._DEADLINE", 0.5)
    for place, says in (
        (msgspec.structs.replace(s3_place, endpoint="http://127.0.0.1:1"), "cannot connect to 127.0.0.1:1"),
        (msgspec.structs.replace(s3_place, bucket="missing"), "there is no such bucket"),
    ):
        assert objbench(place) == 1
        error = capsys.readouterr().err
        assert error.startswith("polefs: ") and error.count("\n") == 1
        assert says in error
    assert run(["objbench", "http://bucket"]) == 2
    assert "write it like s3://bucket/prefix" in capsys.readouterr().err
