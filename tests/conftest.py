"""Fixtures for every suite: the S3 server."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3.server import BUCKET, Place, SeaweedServer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedServer]:
    """SeaweedFS, started once, with the bucket ``BUCKET``. The environment holds its credentials."""
    server = SeaweedServer(Path(tempfile.mkdtemp(prefix="polefs-s3-", dir=os.environ.get("POLEFS_TEST_DIR"))))
    try:
        server.start()
        server.client().create_bucket(Bucket=BUCKET)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            yield server
    finally:
        server.discard()


@pytest.fixture
def s3_place(s3_server: SeaweedServer) -> Place:
    """A prefix of the bucket for one test."""
    return s3_server.new_place()
