"""The contents of a file in memory: a dictionary of pages, so that holes cost nothing."""

from __future__ import annotations

import errno

from rawfuse import FuseError

PAGE = 1 << 16
"""Bytes of a page. A page that is absent, or what lies behind the end of a shorter one, reads as zeros."""

_ZEROS = bytes(PAGE)
"""Also the page of a range that fallocate(2) has reserved and nobody has written."""


class Space:
    """How many bytes all files together may hold."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def take(self, size: int) -> None:
        """ENOSPC, and nothing taken, when that is more than is free."""
        if size > self.free:
            raise FuseError(errno.ENOSPC)
        self.used += size

    def give(self, size: int) -> None:
        self.used -= size


class SparseData:
    """The bytes of one file. It does not know the file's size: callers read inside it and cut when it shrinks."""

    __slots__ = ("_pages", "_space", "stored")

    def __init__(self, space: Space) -> None:
        self._pages: dict[int, bytes | bytearray] = {}
        self._space = space
        self.stored = 0
        """Bytes that the pages hold."""

    def read(self, offset: int, size: int) -> list[bytes | bytearray]:
        """Copies of ``size`` bytes, a buffer or two per page."""
        buffers: list[bytes | bytearray] = []
        while size > 0:
            index, start = divmod(offset, PAGE)
            length = min(PAGE - start, size)
            page = self._pages.get(index, b"")
            found = page[start : start + length]
            if found:
                buffers.append(found)
            if len(found) < length:
                buffers.append(_ZEROS[: length - len(found)])
            offset += length
            size -= length
        return buffers

    def write(self, offset: int, data: memoryview) -> int:
        """The number of bytes written, fewer than there are when the space runs out; ENOSPC when it is none."""
        done, size = 0, len(data)
        while done < size:
            index, start = divmod(offset + done, PAGE)
            length = min(PAGE - start, size - done)
            try:
                page = self._writable(index, start + length)
            except FuseError:
                if not done:
                    raise
                break
            page[start : start + length] = data[done : done + length]
            done += length
        return done

    def _writable(self, index: int, length: int) -> bytearray:
        """The page, at least ``length`` bytes long."""
        page = self._pages.get(index)
        missing = length - (0 if page is None else len(page))
        if missing > 0:
            self._take(missing)
        if not isinstance(page, bytearray):
            page = self._pages[index] = bytearray(page or b"")
        if missing > 0:
            page += _ZEROS[:missing]
        return page

    def reserve(self, offset: int, length: int) -> None:
        """Give the range its memory. ENOSPC, and nothing changed, when there is not enough."""
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        if (last - first + 1 - len(self._pages)) * PAGE > self._space.free:
            raise FuseError(errno.ENOSPC)
        absent = [index for index in range(first, last + 1) if index not in self._pages]
        self._take(len(absent) * PAGE)
        self._pages.update(dict.fromkeys(absent, _ZEROS))

    def punch(self, offset: int, length: int) -> None:
        """Make the range a hole; its edges inside pages become zeros."""
        end = offset + length
        for index in self._within(offset, end):
            start, stop = max(0, offset - index * PAGE), min(PAGE, end - index * PAGE)
            held = len(self._pages[index])
            if start == 0 and stop >= held:
                del self._pages[index]
                self._give(held)
            elif start < held:
                page = self._writable(index, held)
                if stop >= held:
                    del page[start:]
                    self._give(held - start)
                else:
                    page[start:stop] = _ZEROS[: stop - start]

    def cut(self, size: int) -> None:
        """Drop everything from ``size`` on."""
        if self._pages:
            self.punch(size, (max(self._pages) + 1) * PAGE - size)

    def _within(self, start: int, end: int) -> list[int]:
        """The indices of the pages that the range touches; few pages in a huge range cost little."""
        first, stop = start // PAGE, -(-end // PAGE)
        if stop - first > len(self._pages):
            return [index for index in self._pages if first <= index < stop]
        return [index for index in range(first, stop) if index in self._pages]

    def copy(self, offset: int, target: SparseData, target_offset: int, length: int) -> int:
        """Copy a range, holes as holes; the number of bytes copied. ENOSPC when it is none."""
        done = 0
        while done < length:
            index, start = divmod(offset + done, PAGE)
            step = min(PAGE - start, length - done)
            page = self._pages.get(index)
            if page is None:
                target.punch(target_offset + done, step)
            else:
                piece = bytes(page[start : start + step]).ljust(step, b"\0")
                try:
                    step = target.write(target_offset + done, memoryview(piece))
                except FuseError:
                    if not done:
                        raise
                    break
            done += step
        return done

    def seek_data(self, offset: int, size: int) -> int:
        """The first byte at or behind ``offset`` that is in no hole, in a file of ``size`` bytes. ENXIO: none."""
        if offset < size:
            first = offset // PAGE
            if self._has_data(first):
                return offset
            later = min((index for index in self._pages if index > first and self._has_data(index)), default=None)
            if later is not None and later * PAGE < size:
                return later * PAGE
        raise FuseError(errno.ENXIO)

    def seek_hole(self, offset: int, size: int) -> int:
        """The first byte at or behind ``offset`` that is in a hole; the end of the file counts. ENXIO behind it."""
        if offset >= size:
            raise FuseError(errno.ENXIO)
        index = offset // PAGE
        while self._has_data(index):
            index += 1
        return min(max(offset, index * PAGE), size)

    def _has_data(self, index: int) -> bool:
        page = self._pages.get(index)
        return page is not None and page is not _ZEROS

    def _take(self, size: int) -> None:
        self._space.take(size)
        self.stored += size

    def _give(self, size: int) -> None:
        self._space.give(size)
        self.stored -= size
