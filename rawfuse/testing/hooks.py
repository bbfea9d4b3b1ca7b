"""Hooks that the plugin adds to pytest."""

from __future__ import annotations

import pytest

from rawfuse.testing.target import TargetSpec


@pytest.hookspec
def pytest_fuse_targets() -> list[TargetSpec]:  # type: ignore[empty-body]
    """File systems to run ``rawfuse.testing.posix`` on, when no ``--fuse-server`` names one."""
