"""A deadline for everything: at it the mounts under test are aborted, and whoever waits is interrupted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rawfuse.testing.server import Server


class DeadlineExceeded(BaseException):
    """A test reached its deadline; its mount has been aborted. No ``except Exception`` may take it."""


class Watchdog:
    """One thread that waits for the earliest deadline and ends what has passed it."""

    INTERRUPT = signal.SIGUSR2

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: float | None = None
        self._servers: set[Server] = set()
        self._closing = False
        self._seconds = 0.0
        self._previous = signal.signal(self.INTERRUPT, self._interrupt)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        signal.signal(self.INTERRUPT, self._previous)

    def watch(self, server: Server) -> None:
        """Abort this server's mount when a deadline passes."""
        with self._changed:
            self._servers.add(server)

    def unwatch(self, server: Server) -> None:
        with self._changed:
            self._servers.discard(server)

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Run the body for at most ``seconds``; then it gets ``DeadlineExceeded``. An inner one stands in
        for the outer one while it runs."""
        with self._changed:
            outer = (self._ends, self._seconds)
            self._seconds = seconds
            self._ends = time.monotonic() + seconds
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._ends, self._seconds = outer
                self._changed.notify()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"the test did not end in {self._seconds:.0f} s; its mount was aborted")

    def _run(self) -> None:
        with self._changed:
            while not self._closing:
                if self._ends is None:
                    self._changed.wait()
                elif (left := self._ends - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._expire()

    def _expire(self) -> None:
        # The interrupt first: it is then pending when the abort frees the test, and no later code runs into it.
        signal.pthread_kill(threading.main_thread().ident or 0, self.INTERRUPT)
        for server in self._servers:
            server.abort()
        self._ends = None
