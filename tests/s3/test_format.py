"""Volumes whose contents are in S3: how they are made, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polefs.cli.app import run
from polefs.node.errors import Refusal
from polefs.node.lock import Holder
from polefs.node.volume import Contents, make_volume, open_volume
from polefs.objects.location import S3Location
from polefs.objects.marker import KEY
from tests.s3.faults import Fault, FaultProxy
from tests.s3.helpers import location_of, use
from tests.s3.server import BUCKET, READER_KEY, SECRET_KEY, Place, SeaweedServer

ME = Holder(os.getpid(), "format")


def contents_at(place: Place) -> Contents:
    return Contents(objects=location_of(place))


class Command:
    """The command line, run in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> None:
        assert (run(list(arguments)), self._capsys.readouterr().err) == (0, "")

    def refused(self, *arguments: str, says: str, status: int = 1) -> None:
        assert run(list(arguments)) == status
        error = self._capsys.readouterr().err
        assert error.startswith("polefs: ") and error.count("\n") == 1, error
        assert says in error


@pytest.fixture
def polefs(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def formatting(path: Path, place: Place, *options: str) -> list[str]:
    return ["format", "--store", place.url, "--endpoint", place.endpoint, *options, str(path)]


def test_made_and_described(s3_server: SeaweedServer, s3_place: Place, tmp_path: Path, polefs: Command) -> None:
    polefs(*formatting(tmp_path / "v", s3_place, "--region", "us-east-1", "--name", "mine"))
    volume = open_volume(str(tmp_path / "v"))
    assert volume.info.contents.objects == S3Location(
        bucket=BUCKET, prefix=s3_place.prefix, endpoint=s3_place.endpoint, region="us-east-1", conditional_put=True
    )
    assert SECRET_KEY not in (tmp_path / "v" / "volume.json").read_text()
    body = s3_server.client().get_object(Bucket=BUCKET, Key=f"{s3_place.prefix}/{KEY}")["Body"].read()
    assert json.loads(body)["uuid"] == volume.info.uuid
    polefs("fsck", "--data", str(tmp_path / "v"))


def test_a_prefix_of_another_volume(s3_place: Place, tmp_path: Path, polefs: Command) -> None:
    make_volume(str(tmp_path / "one"), ME, contents=contents_at(s3_place)).unlock()
    polefs.refused(*formatting(tmp_path / "two", s3_place), says="belongs to volume 'one'")
    # Nothing is left that could pass for a volume, and the same directory can be used for another place.
    assert {entry.name for entry in (tmp_path / "two").iterdir()} <= {"lock", "volume.json.new"}
    elsewhere = Place(s3_place.endpoint, s3_place.bucket, s3_place.prefix + "-two")
    make_volume(str(tmp_path / "two"), ME, contents=contents_at(elsewhere)).unlock()
    # A description that was copied or edited.
    file = tmp_path / "two" / "volume.json"
    file.write_text(file.read_text().replace(elsewhere.prefix, s3_place.prefix))
    polefs.refused("fsck", str(tmp_path / "two"), says="belongs to volume 'one'", status=8)
    (tmp_path / "mnt").mkdir()
    polefs.refused("mount", str(tmp_path / "two"), str(tmp_path / "mnt"), says="belongs to volume 'one'")


def test_a_prefix_that_holds_something_else(s3_place: Place, tmp_path: Path, polefs: Command) -> None:
    use(s3_place, lambda store: store.put("diary", [b"dear diary"]))
    polefs.refused(*formatting(tmp_path / "v", s3_place), says="is not empty, it holds diary: give another prefix")


def test_a_prefix_with_a_damaged_marker(s3_server: SeaweedServer, s3_place: Place, tmp_path: Path) -> None:
    s3_server.client().put_object(Bucket=BUCKET, Key=f"{s3_place.prefix}/{KEY}", Body=b"{}")
    with pytest.raises(Refusal, match="is damaged or not polefs's"):
        make_volume(str(tmp_path / "v"), ME, contents=contents_at(s3_place))


def test_a_prefix_that_has_been_emptied(
    s3_server: SeaweedServer, s3_place: Place, tmp_path: Path, polefs: Command
) -> None:
    make_volume(str(tmp_path / "v"), ME, contents=contents_at(s3_place)).unlock()
    s3_server.client().delete_object(Bucket=BUCKET, Key=f"{s3_place.prefix}/{KEY}")
    polefs.refused("fsck", str(tmp_path / "v"), says=f"has no object {KEY}: correct the prefix", status=8)


def test_wrong_keys_and_no_keys(
    s3_place: Place, tmp_path: Path, polefs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_volume(str(tmp_path / "v"), ME, contents=contents_at(s3_place)).unlock()
    (tmp_path / "mnt").mkdir()
    mount = ["mount", str(tmp_path / "v"), str(tmp_path / "mnt")]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    polefs.refused(*mount, says="the secret key does not fit the access key: check AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    polefs.refused(*formatting(tmp_path / "w", s3_place), says="artial credentials found")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    polefs.refused(*formatting(tmp_path / "w", s3_place), says="no credentials found: set AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault.ACCESS_DENIED, "no permission: allow the key"),
        (Fault.WRONG_REGION, "wrong region: the bucket is in region"),
        (Fault.SKEWED_CLOCK, "the clock of this machine is far off: set it"),
    ],
)
def test_what_the_server_refuses(
    s3_place: Place, proxy: FaultProxy, tmp_path: Path, polefs: Command, fault: Fault, says: str
) -> None:
    place = msgspec.structs.replace(s3_place, endpoint=proxy.endpoint)
    make_volume(str(tmp_path / "v"), ME, contents=contents_at(place)).unlock()
    (tmp_path / "mnt").mkdir()
    proxy.inject(fault)
    polefs.refused("mount", str(tmp_path / "v"), str(tmp_path / "mnt"), says=says)
    polefs.refused("fsck", "--data", str(tmp_path / "v"), says=says, status=8)
    polefs.refused(*formatting(tmp_path / "w", place), says=says)
    proxy.heal()
    polefs("fsck", "--data", str(tmp_path / "v"))


def test_a_key_that_may_only_read(
    s3_place: Place, tmp_path: Path, polefs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    polefs.refused(*formatting(tmp_path / "v", s3_place), says="no permission: allow the key")


def test_no_such_bucket(s3_server: SeaweedServer, s3_place: Place, tmp_path: Path, polefs: Command) -> None:
    missing = Place(s3_server.endpoint, "missing", "p")
    polefs.refused(*formatting(tmp_path / "v", missing), says="there is no such bucket: make it first")
    make_volume(str(tmp_path / "w"), ME, contents=contents_at(s3_place)).unlock()
    file = tmp_path / "w" / "volume.json"
    file.write_text(file.read_text().replace(f'"{BUCKET}"', '"missing"'))
    (tmp_path / "mnt").mkdir()
    polefs.refused("mount", str(tmp_path / "w"), str(tmp_path / "mnt"), says="there is no such bucket")


def test_a_failed_format_is_not_made_a_local_volume_by_mount(s3_place: Place, tmp_path: Path, polefs: Command) -> None:
    """It is finished by another format, or made a local volume by one."""
    missing = Place(s3_place.endpoint, "missing", "p")
    (tmp_path / "mnt").mkdir()
    for name in ("v", "w"):
        polefs.refused(*formatting(tmp_path / name, missing), says="there is no such bucket: make it first")
        says = "was to keep its contents in s3://missing/p, and could not be made: run polefs format --store again"
        polefs.refused("mount", str(tmp_path / name), str(tmp_path / "mnt"), says=says)
    polefs(*formatting(tmp_path / "v", s3_place))
    polefs("format", str(tmp_path / "w"))
    for name in ("v", "w"):
        polefs("fsck", "--data", str(tmp_path / name))
    assert open_volume(str(tmp_path / "w")).bucket is None


@pytest.mark.parametrize(
    ("function", "afterwards"),
    [
        ("polefs.node.storage.make_store", False),
        ("polefs.node.storage.make_store", True),
        ("polefs.objects.s3.S3Store.probe_conditional_put", False),
        ("polefs.node.storage.claim_objects", True),
    ],
)
def test_an_interrupted_format_is_finished_by_the_next(
    s3_place: Place,
    tmp_path: Path,
    polefs: Command,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    afterwards: bool,
) -> None:
    """Interrupted before or after the bucket was marked as the volume's."""
    whole = pkgutil.resolve_name(function)

    def interrupted(*args: Any, **named: Any) -> None:
        if afterwards:
            whole(*args, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_volume(str(tmp_path / "v"), ME, contents=contents_at(s3_place))
    polefs.refused("fsck", str(tmp_path / "v"), says="is no polefs volume", status=8)
    polefs(*formatting(tmp_path / "v", s3_place, "--name", "again"))
    polefs("fsck", "--data", str(tmp_path / "v"))
    assert open_volume(str(tmp_path / "v")).info.name == "again"


def test_a_marked_prefix_that_holds_something_else_by_now(
    s3_place: Place, tmp_path: Path, polefs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pkgutil.resolve_name("polefs.node.storage.claim_objects")

    def interrupted(*args: Any) -> None:
        whole(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("polefs.node.storage.claim_objects", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_volume(str(tmp_path / "v"), ME, contents=contents_at(s3_place))
    use(s3_place, lambda store: store.put("diary", [b"dear diary"]))
    polefs.refused(*formatting(tmp_path / "v", s3_place), says="is not empty, it holds diary: give another prefix")


def test_endpoint_down(tmp_path: Path, s3_place: Place, polefs: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polefs.node.storage.OPEN_SECONDS", 1.0)
    down = Place("http://127.0.0.1:1", s3_place.bucket, s3_place.prefix)
    polefs.refused(*formatting(tmp_path / "v", down), says="cannot connect to 127.0.0.1:1 (Connection refused)")
    make_volume(str(tmp_path / "v"), ME, contents=contents_at(s3_place)).unlock()
    file = tmp_path / "v" / "volume.json"
    file.write_text(file.read_text().replace(s3_place.endpoint, down.endpoint))
    polefs.refused("fsck", str(tmp_path / "v"), says="cannot connect to 127.0.0.1:1 (Connection refused)", status=8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--store", "/srv/objects"], "is no address of an object store: write it like s3://bucket/prefix"),
        (["--store", "s3://"], "is no name of a bucket"),
        (["--store", "s3://b!/x"], "is no name of a bucket"),
        (["--store", "s3://key:secret@bucket"], "must not hold credentials"),
        (["--store", "s3://bucket/a//b"], "cannot be a prefix"),
        (["--store", "s3://bucket/../b"], "cannot be a prefix"),
        (["--store", "s3://bucket/a b"], "cannot be a prefix"),
        (["--store", "s3://bucket/" + "x" * 600], "longer than 512"),
        (["--store", "s3://bucket", "--endpoint", "host:9000"], "is no endpoint: write it like"),
        (["--store", "s3://bucket", "--endpoint", "http://host:99999"], "is no endpoint"),
        (["--store", "s3://bucket", "--endpoint", "http://host/path"], "is no endpoint"),
        (["--store", "s3://bucket", "--endpoint", "http://a:b@host"], "must not hold credentials"),
        (["--store", "s3://bucket", "--ca-bundle", "/nowhere.pem"], "there is no file /nowhere.pem"),
        (["--region", "eu-west-1"], "give --store s3://BUCKET[/PREFIX] too"),
        (["--virtual-hosted"], "give --store s3://BUCKET[/PREFIX] too"),
    ],
)
def test_wrong_arguments(tmp_path: Path, polefs: Command, arguments: list[str], says: str) -> None:
    polefs.refused("format", *arguments, str(tmp_path / "v"), says=says, status=2)
    assert not (tmp_path / "v").exists()


def test_a_description_without_a_kind_is_damaged(tmp_path: Path) -> None:
    make_volume(str(tmp_path / "v"), ME).unlock()
    file = tmp_path / "v" / "volume.json"
    file.write_text(file.read_text().replace('"directory"', '"tape"'))
    with pytest.raises(Refusal, match="is damaged") as caught:
        open_volume(str(tmp_path / "v"))
    assert caught.value.errno == errno.EINVAL


def test_a_server_without_conditional_puts(s3_place: Place, proxy: FaultProxy, tmp_path: Path, polefs: Command) -> None:
    proxy.inject(Fault.NO_CONDITIONS, method="PUT")
    place = msgspec.structs.replace(s3_place, endpoint=proxy.endpoint)
    polefs(*formatting(tmp_path / "v", place))
    location = open_volume(str(tmp_path / "v")).info.contents.objects
    assert isinstance(location, S3Location)
    assert not location.conditional_put
    polefs.refused(*formatting(tmp_path / "w", place), says="belongs to volume 'v'")
    use(location, lambda store: store.put("segments/0/1", [b"x"]))
