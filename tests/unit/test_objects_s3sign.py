"""Our signatures are those of botocore."""

from __future__ import annotations

import random
import string
from datetime import UTC, datetime, timedelta

import botocore.auth
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials, ReadOnlyCredentials

from polefs.objects.s3sign import Signer

NAMES = ("Range", "Content-Length", "If-None-Match", "x-amz-checksum-crc32c", "x-amz-checksum-mode", "content-type")

QUERIES = ("", "?partNumber=12&uploadId=a%2Fb", "?list-type=2&prefix=a%20b&max-keys=7", "?uploads", "?b=1&a=2")


def botocores(url: str, method: str, headers: dict[str, str], keys: ReadOnlyCredentials, region: str) -> dict[str, str]:
    credentials = Credentials(keys.access_key, keys.secret_key, keys.token)
    request = AWSRequest(method, url, headers=headers)
    request.context["client_config"] = Config(s3={"payload_signing_enabled": False})
    S3SigV4Auth(credentials, "s3", region).add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


@pytest.mark.parametrize("seed", range(10))
def test_signatures_are_botocores(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)

    def word(characters: str = string.ascii_letters + string.digits, most: int = 30) -> str:
        return "".join(rng.choices(characters, k=rng.randint(1, most)))

    host = rng.choice(["bucket.s3.eu-west-1.amazonaws.com", "127.0.0.1:9000", "[::1]:8333", "minio.example.org"])
    region = rng.choice(["us-east-1", "eu-west-1", "garage"])
    signer = Signer(host, region, "s3")
    for _ in range(5):
        now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(400 * 86400))
        monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda now=now: now)
        keys = ReadOnlyCredentials(word(), word(string.printable[:90]), rng.choice([None, word() + "/+="]))
        path = "/" + "/".join(word(string.ascii_letters + "-._~") for _ in range(rng.randint(1, 5)))
        path += rng.choice(["", "%20x", "/%C3%A4", "//y"])
        query = rng.choice(QUERIES)
        headers = {name: word(string.ascii_letters + " =-*/", 40).strip() or "x" for name in rng.sample(NAMES, 3)}
        method = rng.choice(["GET", "PUT", "HEAD", "POST", "DELETE"])
        found = signer.sign(keys, method, path + query, headers, now)
        expected = botocores(f"http://{host}{path}{query}", method, headers, keys, region)
        assert {name.lower(): value for name, value in found.items()} == expected
