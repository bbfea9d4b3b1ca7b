"""The keeper: a small process that holds a FUSE connection while the process that serves it is replaced.

python -m rawfuse.keeper DIRECTORY -- COMMAND...

A server (``rawfuse.handover.Keeper``) connects to the socket in DIRECTORY and deposits what its successor will need:
byte strings by key, each with a descriptor if need be; above all the descriptor of ``/dev/fuse`` and what INIT agreed
on. When it has ended, however it ended, the next one that connects is given everything. One server at a time is
connected; the next waits until the one before has let go of its socket.

With COMMAND the keeper runs the server itself, and again whenever it ends before the mount has. Without one, as servers
start it, it ends when the connection to the kernel has ended, or when nobody is connected and nothing was deposited.

Servers start this file by itself, so that the process stays small: it uses the standard library only.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

DEVICE = b"rawfuse/device"
"""The key of the descriptor of ``/dev/fuse``. Its value is empty as long as the death of the server leaves no mount."""

PUT, DROP, END, READY = b"P", b"D", b"E", b"R"
"""Kinds of messages. PUT: key, value and perhaps a descriptor, either way. DROP: a key. END, from a server: the
connection to the kernel has ended. READY, to a server: that was everything, and, in the value, how many servers have
been here; from a server: it serves."""

LARGEST = 1 << 16
"""Bytes of a message."""

FRUITLESS = 5
"""How many times in a row the command may end without having served before the keeper gives the mount up."""

_HEAD = struct.Struct("=cH")
_SOCKET, _LOCK, _PID = "socket", "lock", "pid"
"""Files in the directory."""


class Message(NamedTuple):
    """``fd`` -1: none."""

    kind: bytes
    key: bytes = b""
    value: bytes = b""
    fd: int = -1


def send(connection: socket.socket, message: Message) -> None:
    """One message, as a whole; its descriptor stays open here. OSError: EPIPE when the other side has hung up."""
    data = _HEAD.pack(message.kind, len(message.key)) + message.key + message.value
    if len(data) > LARGEST:
        raise OSError(errno.EMSGSIZE, f"a deposit of {len(data)} bytes; {LARGEST} is the most")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [message.fd]))] if message.fd >= 0 else []
    connection.sendmsg([data], rights)


def receive(connection: socket.socket, flags: int = 0) -> Message | None:
    """The next message; None when the other side has hung up. ``fd`` is -1, too, where there was no room for it
    (RLIMIT_NOFILE)."""
    try:
        data, ancillary, _, _ = connection.recvmsg(LARGEST, socket.CMSG_SPACE(4), flags | socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    if not data:
        return None
    fds = array.array("i")
    for _, _, raw in ancillary:
        fds.frombytes(raw)
    kind, length = _HEAD.unpack_from(data)
    start = _HEAD.size
    return Message(kind, data[start : start + length], data[start + length :], fds[0] if fds else -1)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody else starts a keeper in the directory, which is made, for this user alone, if there is none."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(errno.EPERM, f"{directory} must belong to the server's user alone (mode 700)")
    with open(directory / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def connect(directory: Path) -> socket.socket | None:
    """A connection to the keeper of the directory; None when none runs."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(directory / _SOCKET))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def listen(directory: Path) -> socket.socket:
    """The socket of a new keeper; to be called with the directory locked and no keeper running."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = directory / _SOCKET
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    listener.listen()
    return listener


class Keeper:
    """What is deposited, and who is connected."""

    def __init__(self, listener: socket.socket, command: list[str]) -> None:
        self._listener = listener
        self._directory = Path(listener.getsockname()).parent
        self._command = command
        self._kept: dict[bytes, Message] = {}
        self._server: socket.socket | None = None
        self._servers = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._child_ended = -1
        self._fruitless = 0

    def run(self) -> int:
        """Returns the exit code when there is nothing left to keep."""
        (self._directory / _PID).write_text(f"{os.getpid()}\n")
        while True:
            code = self._run_command() if self._command else self._end()
            if code is not None:
                self._close()
                return code
            self._wait()

    def _wait(self) -> None:
        """Until a server has something to say, or something may have ended."""
        poller = select.poll()
        if self._child is not None:
            poller.register(self._child_ended, select.POLLIN)
        if self._server is not None:
            # The device is left alone now: it would wake us up with each of its requests.
            poller.register(self._server, select.POLLIN)
        else:
            poller.register(self._listener, select.POLLIN)
            if self._child is None and self._mounted:
                poller.register(self._kept[DEVICE].fd, 0)
        ready = {fd for fd, _ in poller.poll()}
        if self._server is not None:
            if self._server.fileno() in ready:
                self._hear(self._server)
        elif self._listener.fileno() in ready:
            self._welcome()

    @property
    def _mounted(self) -> bool:
        """Whether there may be a mount. Polling the device earlier would wait for it."""
        return DEVICE in self._kept and bool(self._kept[DEVICE].value)

    def _end(self) -> int | None:
        """The exit code when nobody is connected and there is nothing to keep, or no more."""
        if self._server is not None or self._servers == 0:
            return None
        if not self._mounted:
            return 0
        poller = select.poll()
        poller.register(self._kept[DEVICE].fd, 0)
        return 0 if poller.poll(0) else None

    def _welcome(self) -> None:
        """Give everything to the next server."""
        self._server, _ = self._listener.accept()
        self._servers += 1
        try:
            for message in self._kept.values():
                send(self._server, message)
            send(self._server, Message(READY, value=self._servers.to_bytes(8, sys.byteorder)))
        except OSError:
            self._bid_farewell()

    def _hear(self, server: socket.socket) -> None:
        """All that the server has said."""
        while True:
            try:
                message = receive(server, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if message is None:
                self._bid_farewell()
                return
            if message.kind == PUT:
                self._drop(message.key)
                self._kept[message.key] = message
            elif message.kind == DROP:
                self._drop(message.key)
            elif message.kind == READY:
                self._fruitless = 0
            elif message.kind == END:
                for key in list(self._kept):
                    self._drop(key)

    def _bid_farewell(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _drop(self, key: bytes) -> None:
        message = self._kept.pop(key, None)
        if message is not None and message.fd >= 0:
            os.close(message.fd)

    def _run_command(self) -> int | None:
        """See that the command runs as long as there is something to serve; its exit code when it need not."""
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return None
            os.close(self._child_ended)
            self._child = None
            if self._server is not None:
                self._hear(self._server)
            if self._end() is not None or not self._servers:
                return code if code >= 0 else 1
            self._fruitless += 1
            if self._fruitless > FRUITLESS:
                print(f"keeper: {self._command[0]} ended {FRUITLESS} times without serving", file=sys.stderr)
                return 1
        self._child = subprocess.Popen(self._command)
        self._child_ended = os.pidfd_open(self._child.pid)
        return None

    def _close(self) -> None:
        """Who comes now starts another keeper."""
        try:
            with locked(self._directory):
                (self._directory / _SOCKET).unlink()
                (self._directory / _PID).unlink()
                self._listener.close()
        except FileNotFoundError:
            pass  # the directory has been removed already

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A signal for the server."""
        if self._child is not None:
            self._child.send_signal(number)


def _allow_descriptors() -> None:
    """As many as we may have: a server may deposit one for each inode that the kernel knows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _keep_for_servers(listener: socket.socket) -> int:
    """As servers start it: detached from everything but the socket, and from the server."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    return Keeper(listener, []).run()


def _run_server(directory: Path, command: list[str]) -> int:
    with locked(directory):
        running = connect(directory)
        if running is not None:
            running.close()
            raise FileExistsError(errno.EEXIST, "a keeper runs there already")
        listener = listen(directory)
    keeper = Keeper(listener, command)
    signal.signal(signal.SIGTERM, keeper.pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the server as well
    return keeper.run()


def main() -> None:
    arguments = sys.argv[1:]
    _allow_descriptors()
    if len(arguments) == 2 and arguments[0] == "--socket":
        sys.exit(_keep_for_servers(socket.socket(fileno=int(arguments[1]))))
    if len(arguments) < 3 or arguments[0].startswith("-") or arguments[1] != "--":
        sys.exit("usage: python -m rawfuse.keeper DIRECTORY -- COMMAND...")
    try:
        sys.exit(_run_server(Path(arguments[0]), arguments[2:]))
    except OSError as error:
        sys.exit(f"keeper: {arguments[0]}: {error.strerror or error}")


if __name__ == "__main__":
    main()
