"""Where credentials come from: the chain that the AWS tools use."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from polefs.objects.base import StoreError
from polefs.objects.s3 import S3Store
from tests.s3.helpers import all_of, use
from tests.s3.server import ACCESS_KEY, SECRET_KEY, Place


@pytest.fixture(autouse=True)
def no_keys(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


async def write_and_list(store: S3Store) -> None:
    await store.put("k", [b"abc"])
    assert await store.get("k", 0, 3) == b"abc"
    assert await all_of(store.list()) == {"k": 3}


def test_a_profile(s3_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[polefs]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "polefs")
    use(s3_place, write_and_list)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that gives out what ``answer`` in its directory holds, and notes in ``calls`` that it was asked."""
    program = tmp_path / "give.py"
    program.write_text(
        "import pathlib, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "open(here / 'calls', 'a').write('.')\n"
        "sys.stdout.write((here / 'answer').read_text())\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    return tmp_path


def answer(secret: str, lifetime: timedelta) -> str:
    expiration = (datetime.now(UTC) + lifetime).isoformat()
    keys = {"AccessKeyId": ACCESS_KEY, "SecretAccessKey": secret, "Expiration": expiration}
    return json.dumps({"Version": 1, **keys})


def test_credentials_that_expire_are_renewed(s3_place: Place, process: Path) -> None:
    # botocore renews what is valid for less than ten minutes before each use.
    (process / "answer").write_text(answer(SECRET_KEY, timedelta(minutes=5)))
    use(s3_place, write_and_list)
    assert len((process / "calls").read_text()) > 2
    (process / "calls").unlink()
    (process / "answer").write_text(answer(SECRET_KEY, timedelta(hours=5)))
    use(s3_place, write_and_list)
    assert len((process / "calls").read_text()) == 1


def test_new_keys_are_used_as_soon_as_they_are_given_out(s3_place: Place, process: Path) -> None:
    async def work(store: S3Store) -> None:
        await write_and_list(store)
        (process / "answer").write_text(answer("wrong", timedelta(minutes=5)))
        with pytest.raises(StoreError, match="the secret key does not fit"):
            await store.get("k", 0, 3)
        (process / "answer").write_text(answer(SECRET_KEY, timedelta(minutes=5)))
        assert await store.get("k", 0, 3) == b"abc"

    (process / "answer").write_text(answer(SECRET_KEY, timedelta(minutes=5)))
    use(s3_place, work)


def test_a_source_that_fails_for_a_moment(s3_place: Place, process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(store: S3Store) -> None:
        await store.put("k", [b"abc"])
        (process / "answer").write_text(answer(SECRET_KEY, timedelta(seconds=-1)))
        store.deadline = 0.5
        with pytest.raises(StoreError, match="cannot get credentials"):
            await store.get("k", 0, 3)
        store.deadline = 60.0
        (process / "answer").write_text(answer(SECRET_KEY, timedelta(hours=5)))
        assert await store.get("k", 0, 3) == b"abc"

    (process / "answer").write_text(answer(SECRET_KEY, timedelta(minutes=5)))
    use(s3_place, work)
