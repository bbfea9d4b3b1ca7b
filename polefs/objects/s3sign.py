"""AWS Signature Version 4 in the ``Authorization`` header, of requests whose bodies are not hashed.

botocore signs any request to any service, and takes eight times the CPU time of this: a quarter of all that a small GET
takes. What is signed is what botocore signs, to the byte.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime
from typing import Final, Protocol

_UNSIGNED: Final = "UNSIGNED-PAYLOAD"
_ALGORITHM: Final = "AWS4-HMAC-SHA256"


class Credentials(Protocol):
    """botocore's ``ReadOnlyCredentials``."""

    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def token(self) -> str | None: ...


class Signer:
    """For one host and region."""

    def __init__(self, host: str, region: str, service: str) -> None:
        """``host``: as the ``Host`` header has it."""
        self._host = host
        self._region = region
        self._service = service
        self._key_of = ("", "")
        self._key = b""
        """Derived from a secret key for a day."""

    def sign(
        self, credentials: Credentials, method: str, target: str, headers: Mapping[str, str], now: datetime
    ) -> dict[str, str]:
        """``headers`` and those that make the request a signed one, all but ``Host``. ``target``: path and query, as
        they are sent. ``now`` is in UTC."""
        stamp = now.strftime("%Y%m%dT%H%M%SZ")
        day = stamp[:8]
        added = {"X-Amz-Date": stamp, "X-Amz-Content-SHA256": _UNSIGNED}
        if credentials.token:
            added["X-Amz-Security-Token"] = credentials.token
        signed = {**headers, **added}
        path, _, query = target.partition("?")
        fields = [(name.lower(), " ".join(value.split())) for name, value in signed.items()]
        fields = sorted([*fields, ("host", self._host)])
        names = ";".join(name for name, _ in fields)
        lines = "".join(f"{name}:{value}\n" for name, value in fields)
        canonical = f"{method}\n{path}\n{_sorted_query(query)}\n{lines}\n{names}\n{_UNSIGNED}"
        scope = f"{day}/{self._region}/{self._service}/aws4_request"
        text = f"{_ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        signature = _hmac(self._key_for(credentials.secret_key, day), text).hex()
        signed["Authorization"] = (
            f"{_ALGORITHM} Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        return signed

    def _key_for(self, secret: str, day: str) -> bytes:
        if self._key_of != (secret, day):
            key = f"AWS4{secret}".encode()
            for part in (day, self._region, self._service, "aws4_request"):
                key = _hmac(key, part)
            self._key_of, self._key = (secret, day), key
        return self._key


def _sorted_query(query: str) -> str:
    if not query:
        return ""
    return "&".join(sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&")))


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
