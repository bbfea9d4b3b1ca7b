"""For every suite: how hypothesis runs, the S3 server and PostgreSQL."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.postgres.server import PostgresServer
from tests.s3.server import BUCKET, Place, SeaweedServer

# The same examples each time, so that a change is judged by what it changes; the longer form looks for new ones.
settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("new", print_blob=True)
settings.load_profile("new" if os.environ.get("POLEFS_STRESS") else "same")


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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """PostgreSQL, started once; what must survive the loss of power does not."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.discard()


@pytest.fixture
def s3_place(s3_server: SeaweedServer) -> Place:
    """A prefix of the bucket for one test."""
    return s3_server.new_place()
