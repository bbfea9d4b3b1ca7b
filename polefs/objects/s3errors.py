"""What an S3 server answers and what goes wrong on the way to it, as ``OSError`` with one line that says what to do."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Mapping
from typing import Final

import aiohttp
import botocore.exceptions as boto
import msgspec

from polefs.objects.base import StoreError
from polefs.objects.s3connections import BrokenAnswer, ConnectError

_KEYS: Final = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws/credentials"

_CODES: Final = {
    "NoSuchKey": (errno.ENOENT, "there is no such object"),
    "NoSuchBucket": (errno.ENXIO, "there is no such bucket: make it first, or correct its name"),
    "InvalidBucketName": (errno.EINVAL, "the server does not take this name of a bucket: correct it"),
    "InvalidAccessKeyId": (errno.EACCES, f"the server does not know the access key: check {_KEYS}"),
    "SignatureDoesNotMatch": (errno.EACCES, f"the secret key does not fit the access key: check {_KEYS}"),
    "ExpiredToken": (errno.EACCES, "the session token has expired: get new credentials"),
    "TokenRefreshRequired": (errno.EACCES, "the session token has expired: get new credentials"),
    "InvalidToken": (errno.EACCES, "the session token is not valid: get new credentials"),
    "AccessDenied": (
        errno.EACCES,
        "no permission: allow the key s3:ListBucket on the bucket and s3:GetObject, s3:PutObject and s3:DeleteObject "
        "in it",
    ),
    "AllAccessDisabled": (errno.EACCES, "the bucket has been closed by its owner"),
    "RequestTimeTooSkewed": (errno.EACCES, "the clock of this machine is far off: set it (timedatectl set-ntp true)"),
    "PreconditionFailed": (errno.EEXIST, "the object exists already"),
    "EntityTooLarge": (errno.EFBIG, "the object is larger than the server takes"),
    "QuotaExceeded": (errno.ENOSPC, "the bucket has reached its quota"),
    "XMinioStorageFull": (errno.ENOSPC, "the server's disks are full"),
    "NotImplemented": (errno.EOPNOTSUPP, "the server does not know this operation"),
    "MethodNotAllowed": (errno.EOPNOTSUPP, "the server does not know this operation"),
    "InvalidRange": (errno.EIO, "the object is shorter than its metadata says"),
    "InvalidObjectState": (errno.EIO, "the object has been moved to an archive: restore it"),
}
"""What users can put right, by the code of the answer (Amazon S3 API Reference, Error responses)."""

_STATUSES: Final = {
    301: "PermanentRedirect",
    403: "AccessDenied",
    404: "NoSuchKey",
    405: "MethodNotAllowed",
    412: "PreconditionFailed",
    416: "InvalidRange",
    501: "NotImplemented",
    507: "QuotaExceeded",
}
"""What a status means when the answer has no code: one to HEAD has no body."""

_REGION_CODES: Final = frozenset(
    ["PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect"]
)

_TRANSIENT_CODES: Final = frozenset(
    [
        *("InternalError", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "RequestTimeout"),
        *("RequestLimitExceeded", "TooManyRequests", "OperationAborted", "ConditionalRequestConflict"),
        *("BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
    ]
)
_TRANSIENT_STATUSES: Final = frozenset([408, 409, 425, 429, 500, 502, 503, 504])


class Answer(msgspec.Struct, frozen=True):
    """An answer that is no success."""

    status: int
    code: str = ""
    message: str = ""
    headers: Mapping[str, str] = {}
    region: str | None = None


class AnswerError(Exception):
    """Raised for an answer that is no success, until it is explained."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status, answer.code)
        self.answer = answer


def explain(error: Exception, url: str) -> OSError:
    """The ``OSError`` for what botocore or aiohttp raised while working on ``url``: FileNotFoundError for a missing
    object, FileExistsError for one that is there already, ``StoreError`` for all else."""
    if isinstance(error, StoreError | FileNotFoundError | FileExistsError):
        return error
    if isinstance(error, AnswerError):
        return _explain_answer(error.answer, url)
    if isinstance(error, boto.ClientError):
        return _explain_answer(_answer_of(error), url)
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        # botocore's wrapping of what aiohttp raised.
        cause = error.kwargs.get("error") if hasattr(error, "kwargs") else None
        if isinstance(cause, Exception):
            return explain(cause, url)
        return StoreError(errno.ECONNRESET, f"{url}: {error}", transient=True)
    if isinstance(error, boto.BotoCoreError):
        return _explain_botocore(error, url)
    return _explain_transport(error, url)


def _explain_answer(answer: Answer, url: str) -> OSError:
    code = answer.code
    if not code or code.isdigit():
        code = _STATUSES.get(answer.status, "")
    if code in _REGION_CODES:
        region = answer.region or answer.headers.get("x-amz-bucket-region")
        where = f"the bucket is in region {region}: give --region {region}" if region else "give --region"
        return StoreError(errno.EXDEV, f"{url}: wrong region: {where}")
    known = _CODES.get(code)
    if known is not None:
        number, text = known
        if number == errno.ENOENT:
            return FileNotFoundError(number, f"{url}: {text}")
        if number == errno.EEXIST:
            return FileExistsError(number, f"{url}: {text}")
        if code == "RequestTimeTooSkewed" and "date" in answer.headers:
            text += f"; the server has {answer.headers['date']}"
        return StoreError(number, f"{url}: {text}")
    transient = code in _TRANSIENT_CODES or answer.status in _TRANSIENT_STATUSES
    what = " ".join(filter(None, (str(answer.status), code, f"({answer.message})" if answer.message else "")))
    text = "the server cannot serve it now" if transient else "the server refuses the request"
    return StoreError(errno.EIO, f"{url}: {text}: {what}", transient=transient)


def _answer_of(error: boto.ClientError) -> Answer:
    details = error.response.get("Error", {})
    meta = error.response.get("ResponseMetadata", {})
    return Answer(
        status=meta.get("HTTPStatusCode", 0),
        code=details.get("Code", ""),
        message=details.get("Message", ""),
        headers=meta.get("HTTPHeaders", {}),
        region=details.get("Region"),
    )


def _explain_botocore(error: boto.BotoCoreError, url: str) -> OSError:
    match error:
        case boto.NoCredentialsError():
            return StoreError(errno.EACCES, f"{url}: no credentials found: set {_KEYS}")
        case boto.PartialCredentialsError() | boto.ProfileNotFound() | boto.ConfigParseError():
            return StoreError(errno.EACCES, f"{url}: {error}: check {_KEYS}")
        case boto.CredentialRetrievalError() | boto.TokenRetrievalError():
            # The service that gives them out may be down for a moment.
            return StoreError(errno.EACCES, f"{url}: cannot get credentials: {error}", transient=True)
        case boto.NoRegionError():
            return StoreError(errno.EINVAL, f"{url}: no region: give --region or set AWS_REGION")
    return StoreError(errno.EINVAL, f"{url}: {error}")


def _explain_transport(error: Exception, url: str) -> OSError:
    match error:
        case ConnectError():
            assert isinstance(error.__cause__, OSError)
            return _explain_connecting(error.__cause__, error.host, error.port, url)
        case aiohttp.ClientConnectorCertificateError():
            cause = error.certificate_error
            assert isinstance(cause, OSError)
            return _explain_connecting(cause, error.host, error.port or 0, url)
        case aiohttp.ClientConnectorError():
            return _explain_connecting(error.os_error, error.host, error.port or 0, url)
        case BrokenAnswer():
            if error.errno == errno.EPROTO:
                return _no_http(url)
            return StoreError(errno.ECONNRESET, f"{url}: connection lost: {error.strerror}", transient=True)
        case TimeoutError():
            text = f"{url}: the server does not answer in time: check the network and --endpoint"
            return StoreError(errno.ETIMEDOUT, text, transient=True)
        case OSError():
            number = error.errno or errno.ECONNRESET
            return StoreError(number, f"{url}: connection lost: {os.strerror(number)}", transient=True)
        case aiohttp.ClientResponseError():
            return _no_http(url)
        case aiohttp.ClientPayloadError():
            return StoreError(errno.ECONNRESET, f"{url}: connection lost: the answer broke off", transient=True)
        case aiohttp.ClientError():
            return StoreError(errno.ECONNRESET, f"{url}: connection lost: {error or 'closed'}", transient=True)
    raise error


def _no_http(url: str) -> OSError:
    return StoreError(errno.EPROTO, f"{url}: the answer is no HTTP: check --endpoint", transient=True)


def _explain_connecting(cause: OSError, host: str, port: int, url: str) -> OSError:
    match cause:
        case ssl.SSLCertVerificationError():
            text = f"the server's certificate is not trusted ({cause.verify_message})"
            return StoreError(errno.EPROTO, f"{url}: {text}: give --ca-bundle FILE or set AWS_CA_BUNDLE")
        case ssl.SSLError():
            text = f"no TLS connection ({cause.reason}): check https:// or http:// in --endpoint"
            return StoreError(errno.EPROTO, f"{url}: {text}")
        case socket.gaierror():
            text = f"unknown host {host}: check --endpoint and DNS"
            return StoreError(errno.EHOSTUNREACH, f"{url}: {text}", transient=True)
    number = cause.errno or errno.ETIMEDOUT
    where = f"{host}:{port} ({os.strerror(number)})"
    return StoreError(number, f"{url}: cannot connect to {where}: check that it runs, and --endpoint", transient=True)
