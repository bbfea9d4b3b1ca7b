"""Other processes for a test: other users, lock holders, users of a mapping.

A ``Peer`` is a forked child that runs functions for the test, one at a time, and returns what they return or raises
what they raise. Functions and arguments travel by pickle: builtins such as ``os.open`` and module-level functions.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

PR_SET_PDEATHSIG = 1
REPLY_DEADLINE = 50.0
"""Seconds to wait for a peer's answer: less than a test's deadline, so that the failure names the peer."""


@dataclass(frozen=True)
class User:
    """Ids of a process; ``groups`` are its supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User(0, 0)
ALICE = User(60001, 60001)
BOB = User(60002, 60002)
STAFF = 60010
"""A group that a ``User`` may have as a supplementary one."""


class Peer:
    """A context manager: the process ends with the block, closing its descriptors and dropping its locks."""

    def __init__(self, user: User = ROOT, umask: int = 0o022, cwd: str | os.PathLike[str] | None = None) -> None:
        here, there = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside the watchdog thread is intended
            self.pid = os.fork()
        if self.pid == 0:
            self._child(there, user, umask, cwd)
        there.close()
        self._connection: Connection | None = here
        self._waiting = True
        self.result()  # the child has its user and working directory

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kill=error is not None)

    def close(self, kill: bool = False) -> None:
        """End the process; ``kill`` uses SIGKILL, for one that is in a blocking call."""
        if self._connection is None:
            return
        self._connection.close()
        self._connection = None
        if kill or self._waiting:
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Let the peer begin; ``result`` gets the outcome."""
        assert self._connection is not None and not self._waiting
        self._connection.send((function, args, kwargs))
        self._waiting = True

    def finished(self, timeout: float = 0) -> bool:
        """Whether a started call ends within ``timeout`` seconds."""
        assert self._connection is not None and self._waiting
        return self._connection.poll(timeout)

    def result(self, timeout: float = REPLY_DEADLINE) -> Any:
        """What the started call returned, or raise what it raised."""
        assert self._connection is not None and self._waiting
        if not self._connection.poll(timeout):
            raise TimeoutError(f"peer {self.pid} did not answer in {timeout:.0f} s")
        raised, value = self._connection.recv()
        self._waiting = False
        if raised:
            raise value
        return value

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        self.start(function, *args, **kwargs)
        value: R = self.result()
        return value

    def _child(self, connection: Connection, user: User, umask: int, cwd: str | os.PathLike[str] | None) -> None:
        code = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            own = connection.fileno()
            os.closerange(3, own)
            os.closerange(own + 1, 65536)
            if cwd is not None:
                os.chdir(cwd)
            os.umask(umask)
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
            # Changing ids clears the parent-death signal.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            self._serve(connection)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    @staticmethod
    def _serve(connection: Connection) -> None:
        connection.send((False, None))
        while True:
            try:
                function, args, kwargs = connection.recv()
            except EOFError:
                return
            try:
                reply = (False, function(*args, **kwargs))
                pickle.dumps(reply)
            except Exception as error:
                reply = (True, error)
            connection.send(reply)


def as_user(user: User, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """One call in a process of another user (umask 022)."""
    with Peer(user) as peer:
        return peer.call(function, *args, **kwargs)
