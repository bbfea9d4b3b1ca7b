"""What the POSIX suite in rawfuse/testing/posix runs on here."""

from __future__ import annotations

import pytest

from rawfuse.testing.target import TargetSpec
from tests.mounted.targets import STRESS, TARGETS


def pytest_configure(config: pytest.Config) -> None:
    if STRESS:
        config.option.fuse_stress = True


def pytest_fuse_targets() -> list[TargetSpec]:
    return TARGETS
