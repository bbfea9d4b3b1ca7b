"""A mount of ``tests.mounted.lab_server`` and the line to its server: what requests it saw, what it is to tell the
kernel, what is to change there without the kernel's knowledge."""

from __future__ import annotations

import shutil
import sys
from multiprocessing.connection import Client, Connection
from typing import Any

import msgspec

from rawfuse.abi import ROOT_ID
from rawfuse.testing.server import Server
from tests.mounted.lab_server import Configuration, Request

ANSWER_DEADLINE = 50.0
"""Seconds that the server may take for a call: less than a test's deadline, so that the failure names the call."""


class Call:
    """A call under way."""

    def __init__(self, socket: str, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._name = name
        self._connection: Connection = Client(socket, "AF_UNIX")
        self._connection.send((name, arguments, named))

    def finished(self, timeout: float = 0) -> bool:
        """Whether it ends within so many seconds."""
        return self._connection.poll(timeout)

    def result(self) -> Any:
        """What it returned; raises what it raised."""
        with self._connection:
            if not self._connection.poll(ANSWER_DEADLINE):
                raise TimeoutError(f"the server did not finish {self._name} in {ANSWER_DEADLINE:.0f} s")
            raised, value = self._connection.recv()
        if raised:
            raise value
        return value


def lab_command(configuration: Configuration) -> list[str]:
    """What serves one, as a ``TargetSpec`` has it."""
    text = msgspec.json.encode(configuration).decode()
    return [sys.executable, "-m", "tests.mounted.lab_server", "{scratch}/control", text, "{mountpoint}"]


class Lab:
    """``lab.call(name, ...)`` runs a method of ``lab_server.Control``; ``lab.start(name, ...)`` does not wait."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.root = server.mountpoint
        self._socket = str(self.root.parent / "scratch" / "control")

    def clear(self) -> None:
        """Make it as new, for the kernel too."""
        self.notify("increment_epoch")
        self.notify("invalidate_inode", ROOT_ID, 0, 0)
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.call("seen")

    def start(self, name: str, *arguments: Any, **named: Any) -> Call:
        return Call(self._socket, name, arguments, named)

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        return self.start(name, *arguments, **named).result()

    def notify(self, kind: str, *arguments: Any, **named: Any) -> Any:
        """Send a notification and return its result."""
        return self.call("notify", kind, *arguments, **named)

    def ino(self, path: str) -> int:
        number: int = self.call("ino", path)
        return number

    def seen(self, *opcodes: str, path: str | None = None) -> list[Request]:
        """The requests since the last time, or those of them with these opcodes, or about this inode."""
        requests = [Request(*fields) for fields in self.call("seen")]
        if path is not None:
            ino = self.ino(path)
            requests = [request for request in requests if request.nodeid == ino]
        return [request for request in requests if not opcodes or request.opcode in opcodes]

    def names_seen(self, *opcodes: str, path: str | None = None) -> list[str]:
        return [request.opcode for request in self.seen(*opcodes, path=path)]
