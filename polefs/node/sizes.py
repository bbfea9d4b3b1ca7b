"""Sizes and durations as people write and read them; sizes in powers of 1024."""

from __future__ import annotations

import errno
import re

from polefs.node.errors import Refusal

_UNITS = "KMGTPE"
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:([{_UNITS}])(?:i?B)?|B)?", re.IGNORECASE)

SIZE_MAX = (1 << 63) - 1

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")


def parse_size(text: str) -> int:
    """Bytes of ``500M``, ``10GiB``, ``1.5T``, ``4096``. ``Refusal`` EINVAL, also for 0 and past 2^63 - 1."""
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        size = int(float(match[1]) * 1024 ** (_UNITS.index(match[2].upper()) + 1)) if match[2] else int(float(match[1]))
        if 0 < size <= SIZE_MAX:
            return size
    raise Refusal(errno.EINVAL, f"'{text}' is no size: write it like 500M, 10G or 1.5T", 2)


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``5m``, ``1.5h``, ``2d``, ``0``. ``Refusal`` EINVAL."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or len(match[1]) > 9:
        raise Refusal(errno.EINVAL, f"'{text}' is no duration: write it like 90s, 5m or 1h", 2)
    return float(match[1]) * _SECONDS[match[2]]


def format_size(size: int) -> str:
    """``1.5 GiB``; below 1 KiB in bytes."""
    if size < 1024:
        return f"{size} B"
    power = 1
    while size / 1024**power >= 1023.95:
        power += 1
    return f"{size / 1024**power:.1f} {_UNITS[power - 1]}iB"
