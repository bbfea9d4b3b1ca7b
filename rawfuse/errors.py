"""The two failures of the library: what a file system answers, and what a malformed request is."""

from __future__ import annotations

import os
from errno import errorcode

_TEXTS = {number: os.strerror(number) for number in errorcode}
"""strerror(3) takes longer than all the rest of raising an error."""


class FuseError(OSError):
    """Raised by a handler to answer with an errno; any other ``OSError`` with an errno does the same."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(errno, message or _TEXTS.get(errno) or os.strerror(errno))


class ProtocolError(Exception):
    """A request that does not have the form which the protocol gives to its opcode."""
