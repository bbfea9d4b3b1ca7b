"""Reading ahead: which programs read a file from its beginning to its end, and how far ahead of them to fetch."""

from __future__ import annotations

from typing import Final

from polefs.data.cache.rangeset import Range

_STREAMS: Final = 8
"""Sequential readers of one file that are told apart."""

_FIRST: Final = 512 << 10
_LARGEST: Final = 32 << 20
"""Windows, bytes: how far ahead at first, and at most."""

_ALIGNED: Final = 4 << 20
"""Windows from this size on end at multiples of it: that is how contents are cut into segments."""

_TOLERANCE: Final = 128 << 10
"""So far from where it is expected a read may be and still be the next one: pages that the kernel has are left out."""

_REGION: Final = 4 << 20
_REGIONS: Final = 512
"""Regions of the last scattered reads, bytes and number."""

_DENSE: Final = 8
"""So many second reads in a region, and one region in four: the others are fetched at the first one."""


class _Stream:
    """``position``: where the next read is expected; ``ahead``: up to where has been fetched."""

    __slots__ = ("ahead", "position", "window")

    def __init__(self, position: int) -> None:
        self.position = position
        self.ahead = position
        self.window = 0


class Streams:
    """The readers of one file."""

    __slots__ = ("_dense", "_regions", "_streams")

    def __init__(self) -> None:
        self._streams: list[_Stream] = []
        self._regions: dict[int, bool] = {}
        """Whether they are being fetched."""
        self._dense = 0.0
        """Regions in which a second read found nothing, of those."""

    def note(self, start: int, end: int) -> Range | None:
        """A read of this range: what is to be fetched ahead of it now, if anything."""
        stream = self._find(start, end)
        if stream is None:
            stream = _Stream(end)
            if len(self._streams) == _STREAMS:
                del self._streams[0]
            self._streams.append(stream)
            if start:
                return None
        else:
            if self._streams[-1] is not stream:
                self._streams.remove(stream)
                self._streams.append(stream)
            stream.position = max(stream.position, end)
        position = stream.position
        if stream.ahead - position > stream.window // 2:
            return None
        stream.window = min(max(stream.window * 2, 2 * (end - start), _FIRST), _LARGEST)
        first = max(stream.ahead, position)
        last = position + stream.window
        if stream.window >= _ALIGNED:
            last &= -_ALIGNED
        if last <= first:
            return None
        stream.ahead = last
        return first, last

    def _find(self, start: int, end: int) -> _Stream | None:
        near = None
        for stream in self._streams:
            if stream.position == start:
                return stream
            if near is None and stream.window and abs(stream.position - start) <= _TOLERANCE:
                near = stream
        return near

    def stopped(self, at: int) -> None:
        """There was no memory to fetch what follows ``at``."""
        for stream in self._streams:
            if stream.ahead > at:
                stream.ahead = max(stream.position, at)
        self._regions.pop(at // _REGION, None)

    def region(self, start: int) -> Range | None:
        """A scattered read at ``start`` found nothing: the region to fetch as well, when it is the second one there, or
        when the reads of this file are so dense that there will be a second one."""
        region = start // _REGION
        fetched = self._regions.get(region)
        if fetched:
            return None
        if fetched is None:
            if len(self._regions) == _REGIONS:
                del self._regions[next(iter(self._regions))]
                self._dense *= 1 - 1 / _REGIONS
            self._regions[region] = False
            if self._dense < max(_DENSE, len(self._regions) / 4):
                return None
        self._dense += 1
        self._regions[region] = True
        return region * _REGION, (region + 1) * _REGION
