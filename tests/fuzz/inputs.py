"""Reading an input: bytes that mean choices. At its end every choice is 0."""

from __future__ import annotations


class Input:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, count: int) -> bytes:
        """At most so many bytes."""
        taken = self._data[self._position : self._position + count]
        self._position += len(taken)
        return taken

    def byte(self) -> int:
        return next(iter(self.take(1)), 0)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")
