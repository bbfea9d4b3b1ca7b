"""Handing a mount over to another process, which goes on where this one ended, be it by kill -9.

    keeper = Keeper.connect("/run/mine")      # starts the keeper process where none runs
    filesystem = MyFileSystem(keeper)         # keeps ``keeper`` in FileSystem.keeper, restores what ``kept`` holds
    session = Session(filesystem, "/mnt/mine")
    await session.mount()                     # mounts, or takes the mount over from the process before
    await session.serve()

The keeper process (``rawfuse.keeper``) holds the device and whatever else is deposited. A deposit is there as soon as
``put`` has returned, so what a reply tells the kernel is deposited before the reply: the inodes it will ask for, the
handles it will use.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rawfuse import keeper as protocol
from rawfuse.errors import FuseError
from rawfuse.journal import Journal
from rawfuse.keeper import DEVICE, DROP, END, PUT, READY, Message

log = logging.getLogger("rawfuse")

JOURNAL = b"rawfuse/journal"
BACKING = b"rawfuse/backing/"
MOUNTPOINT = b"rawfuse/mountpoint"
"""Keys of the library begin with ``rawfuse/``."""

MOUNTING = b"mounting"
"""The value of ``DEVICE`` before INIT where the death of the server leaves a mount that waits for it."""

_ATTEMPTS = 3
"""A keeper that is about to end may still be connected to."""


class Kept(NamedTuple):
    """What a process before has deposited. The descriptor, -1 when there is none, is this process's to close."""

    value: bytes
    fd: int


class Keeper:
    """The connection to the keeper process, and what came from there. Every method is called in the thread of the event
    loop. When the keeper has died, the mount is served all the same, but cannot be handed over any more."""

    def __init__(self, connection: socket.socket, kept: dict[bytes, Kept], servers: int) -> None:
        self._connection: socket.socket | None = connection
        self.kept: Mapping[bytes, Kept] = kept
        """Everything deposited by the processes before, by key."""
        self.servers = servers
        """How many processes have served or tried to, this one included. Numbers that are made from it have not been
        used by another of them."""
        inherited = kept.get(JOURNAL)
        if inherited is not None and inherited.fd >= 0:
            self.journal = Journal(inherited.fd)
        else:
            self.journal = Journal.create()
            self.put(JOURNAL, fd=self.journal.fd)

    @property
    def has_mount(self) -> bool:
        """Whether a process before has left a mount to be taken over."""
        return DEVICE in self.kept and bool(self.kept[DEVICE].value)

    @classmethod
    def connect(cls, directory: str | Path) -> Keeper:
        """Blocks until the process before, if there is one, has let go. The directory, made if need be, must belong to
        this user alone: EPERM."""
        directory = Path(directory)
        for _ in range(_ATTEMPTS):
            connection = _connect_or_start(directory)
            kept: dict[bytes, Kept] = {}
            while (message := protocol.receive(connection)) is not None:
                if message.kind == READY:
                    return cls(connection, kept, int.from_bytes(message.value, sys.byteorder))
                kept[message.key] = Kept(message.value, message.fd)
            connection.close()
            for value in kept.values():
                if value.fd >= 0:
                    os.close(value.fd)
        raise FuseError(errno.ECONNREFUSED, f"the keeper in {directory} ends whenever it is asked")

    def put(self, key: bytes, value: bytes = b"", fd: int = -1) -> None:
        """Deposit something, in place of what the key held. The descriptor stays open here too."""
        self._send(Message(PUT, key, value, fd))

    def drop(self, key: bytes) -> None:
        """Take something back; nothing happens if it is not there."""
        self._send(Message(DROP, key))

    def ready(self) -> None:
        """The mount is served by this process."""
        self._send(Message(READY))

    def end(self) -> None:
        """The mount has ended; nothing is kept any longer."""
        self._send(Message(END))
        self.close()

    def close(self) -> None:
        """Let go: the next process may take over."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, message: Message) -> None:
        if self._connection is None:
            return
        try:
            protocol.send(self._connection, message)
        except (BrokenPipeError, ConnectionResetError):
            log.error("the keeper has ended: this mount can no longer be handed over")
            self.close()


def _connect_or_start(directory: Path) -> socket.socket:
    try:
        with protocol.locked(directory):
            connection = protocol.connect(directory)
            if connection is None:
                with protocol.listen(directory) as listener:
                    connection = protocol.connect(directory)
                    assert connection is not None
                    _start(listener)
    except OSError as error:
        raise FuseError(error.errno or errno.EIO, f"the keeper in {directory}: {error.strerror or error}") from error
    return connection


def _start(listener: socket.socket) -> None:
    """It detaches itself, so that it survives this process and what started it."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", protocol.__file__, "--socket", str(listener.fileno())],
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise FuseError(errno.ECHILD, f"it ended with code {done.returncode} when it was started")
