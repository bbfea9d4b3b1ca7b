"""The two failures of the library: what a file system answers, and what a malformed request is."""

from __future__ import annotations

import os


class FuseError(OSError):
    """Raised by a handler to answer with an errno; any other ``OSError`` with an errno does the same."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(errno, message or os.strerror(errno))


class ProtocolError(Exception):
    """A request that does not have the form which the protocol gives to its opcode."""
