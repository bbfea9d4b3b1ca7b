"""The POSIX suite on a volume whose contents are in S3: the part of it that is about contents, and all under stress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rawfuse.testing.fixtures import make_scratch, run_root, run_target
from rawfuse.testing.target import Target, TargetSpec
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import STRESS, fsck_command, polefs_command
from tests.s3.server import SeaweedServer
from tests.s3.volumes import polefs

SPECS = {
    mode: TargetSpec(
        f"polefs-s3-{mode}",
        polefs_command("{scratch}/volume", "{mountpoint}", f"passthrough={mode}"),
        check=fsck_command("{scratch}/volume"),
    )
    for mode in (("all", "read", "off") if STRESS else ("all",))
}
"""By what the kernel serves itself."""

_UNDER_STRESS = "acl attributes bigdirs errors locks namespace permissions statfs_times unlinked xattr"
collect_ignore = [] if STRESS else [f"test_{name}.py" for name in _UNDER_STRESS.split()]


@pytest.fixture(scope="module", params=SPECS)
def target(s3_server: SeaweedServer, fuse_watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[Target]:
    """A volume in the bucket, mounted once a module; it must unmount cleanly and pass fsck."""
    spec = SPECS[request.param]
    scratch = make_scratch(spec.name)
    place = s3_server.new_place()
    polefs("format", "--store", place.url, "--endpoint", place.endpoint, scratch / "volume")
    yield from run_target(Target(spec, scratch, fuse_watchdog))


@pytest.fixture
def root(target: Target, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on it, with mode 755 and owned by root."""
    yield from run_root(target, request)
