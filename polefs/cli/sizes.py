"""Sizes as people write and read them, in powers of 1024."""

from __future__ import annotations

import errno
import re

from polefs.node.errors import Refusal

_UNITS = "KMGTPE"
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:([{_UNITS}])(?:i?B)?|B)?", re.IGNORECASE)

SIZE_MAX = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Bytes of ``500M``, ``10GiB``, ``1.5T``, ``4096``. ``Refusal`` EINVAL, also for 0 and past 2^63 - 1."""
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        size = int(float(match[1]) * 1024 ** (_UNITS.index(match[2].upper()) + 1)) if match[2] else int(float(match[1]))
        if 0 < size <= SIZE_MAX:
            return size
    raise Refusal(errno.EINVAL, f"'{text}' is no size: write it like 500M, 10G or 1.5T", 2)


def format_size(size: int) -> str:
    """``1.5 GiB``; below 1 KiB in bytes."""
    if size < 1024:
        return f"{size} B"
    power = 1
    while size / 1024**power >= 1023.95:
        power += 1
    return f"{size / 1024**power:.1f} {_UNITS[power - 1]}iB"
