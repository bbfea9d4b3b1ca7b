"""Making errors."""

from __future__ import annotations

import os


def error(code: int) -> OSError:
    """The OSError of an errno."""
    return OSError(code, os.strerror(code))
