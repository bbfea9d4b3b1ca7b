"""Which sessions use which inodes: who of them keeps one that loses its last name."""

from __future__ import annotations

from collections.abc import Iterable


class Holders:
    """The inodes in use, of all sessions of a volume."""

    def __init__(self) -> None:
        self._sessions: dict[int, set[int]] = {}

    def of(self, ino: int) -> Iterable[int]:
        return self._sessions.get(ino, ())

    def add(self, ino: int, session: int) -> None:
        self._sessions.setdefault(ino, set()).add(session)

    def discard(self, ino: int, session: int) -> None:
        sessions = self._sessions.get(ino)
        if sessions is not None:
            sessions.discard(session)
            if not sessions:
                del self._sessions[ino]


class Holding:
    """The inodes that one session uses."""

    def __init__(self, holders: Holders, session: int) -> None:
        self._holders = holders
        self._session = session
        self.inos: set[int] = set()

    def add(self, ino: int) -> bool:
        """Whether it is new."""
        if ino in self.inos:
            return False
        self.inos.add(ino)
        self._holders.add(ino, self._session)
        return True

    def discard(self, ino: int) -> None:
        self.inos.discard(ino)
        self._holders.discard(ino, self._session)
