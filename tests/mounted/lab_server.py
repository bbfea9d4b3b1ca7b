"""The file system of ``tests.mounted.lab``: the memory example with ioctls, poll and look-ups by number, in a process
of its own, which a test steers through a socket: python -m tests.mounted.lab_server SOCKET CONFIGURATION MOUNTPOINT.

CONFIGURATION is the JSON of a ``Configuration``. A message on the socket is ``(method, arguments, named)``, pickled,
for a method of ``Control``; the answer is ``(raised, value)``. Each connection carries one call, so calls may overlap.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import io
import os
import random
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from typing import Any, NamedTuple, TextIO, cast

import msgspec
import uvloop

from examples.memory import Memory
from examples.memory_nodes import Directory, File, Node
from rawfuse import (
    Entry,
    FuseError,
    InitFlag,
    IoctlResult,
    MountOptions,
    Opcode,
    OpenedFile,
    OpenFlag,
    Session,
    Settings,
    ops,
)
from rawfuse.abi import ROOT_ID, PollFlag
from rawfuse.notify import Notifier

CAPACITY = 1 << 30


def _ioc(direction: int, number: int, size: int) -> int:
    """_IOC of asm-generic/ioctl.h, type 'R'."""
    return direction << 30 | size << 16 | ord("R") << 8 | number


WRITE, READ = 1, 2
REVERSE = _ioc(READ | WRITE, 1, 64)
"""The 64 bytes come back in reverse order; the result is 64."""
DESCRIBE = _ioc(READ, 2, 32)
"""nodeid, flags, argument and handle of the call, native u64 each; fewer bytes than there is room for."""
KEEP = _ioc(WRITE, 3, 8)
"""Keep 8 bytes; the result is their sum."""
ECHO = _ioc(0, 4, 0)
"""The result is the argument."""
LARGE = _ioc(READ | WRITE, 5, 16380)
"""The bytes come back, each plus 1."""
TOO_MUCH = _ioc(READ, 6, 4)
"""More data than there is room for."""
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
"""What the kernel asks before it sets flags (fs/file_attr.c: vfs_fileattr_set)."""


@dataclass
class Configuration:
    """``features`` and the others of a ``FileSystem``, as numbers; ``settings`` and ``options``: fields of ``Settings``
    and ``MountOptions``."""

    features: int = 0
    unwanted: int = 0
    declined: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Request(NamedTuple):
    """A request as the trace has it."""

    opcode: str
    nodeid: int
    arguments: str


class Log(io.TextIOBase):
    """The trace of a session, kept in memory: the requests since they were last taken."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._changed: set[asyncio.Future[None]] = set()

    def write(self, text: str) -> int:
        kind, _unique, rest = text.split(" ", 2)
        if kind == ">":
            name, nodeid, _caller, *arguments = rest.rstrip("\n").split(" ", 3)
            self.requests.append(Request(name, int(nodeid.removeprefix("nodeid=")), "".join(arguments)))
            for future in self._changed:
                if not future.done():
                    future.set_result(None)
        return len(text)

    async def changed(self) -> None:
        """Return after the next request."""
        future = asyncio.get_running_loop().create_future()
        self._changed.add(future)
        try:
            await future
        finally:
            self._changed.discard(future)

    async def until(self, opcode: str, count: int) -> None:
        """Return when so many of them have come."""
        while sum(request.opcode == opcode for request in self.requests) < count:
            await self.changed()


class Lab(Memory):
    """Names and attributes are cached for ever, pages too; nothing here tells the kernel of a change unasked."""

    def __init__(self, configuration: Configuration) -> None:
        super().__init__(CAPACITY)
        self.features = InitFlag(configuration.features)
        self.unwanted = InitFlag(configuration.unwanted)
        self.declined = frozenset(map(Opcode, configuration.declined))
        self.flags: dict[int, int] = {}
        self.kept = b""
        self.ready: dict[int, int] = {}
        self.polling: dict[int, set[int]] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def gate(self, name: str) -> None:
        if name in self.gates:
            await self.gates[name].wait()

    # Looking up by number, for EXPORT_SUPPORT; waiting at gates

    async def look_up_inode(self, op: ops.LookUpInode) -> Entry:
        await self.gate("LOOKUP")
        if op.name == b".":
            return self._entry(self._node(op.nodeid))
        if op.name == b"..":
            return self._entry(self._directory(op.nodeid).parent)
        return await super().look_up_inode(op)

    async def mk_dir(self, op: ops.MkDir) -> Entry:
        await self.gate("MKDIR")
        return await super().mk_dir(op)

    async def access(self, op: ops.Access) -> None:
        if op.mask & os.W_OK:
            raise FuseError(errno.EACCES)

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        opened = await super().open_file(op)
        opened.flags |= OpenFlag.KEEP_CACHE
        return opened

    async def open_dir(self, op: ops.OpenDir) -> OpenedFile:
        opened = await super().open_dir(op)
        opened.flags |= OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR
        return opened

    # ioctl and poll

    async def ioctl(self, op: ops.Ioctl) -> IoctlResult:
        answer = _IOCTLS.get(op.command)
        if answer is None:
            raise FuseError(errno.ENOTTY)
        return answer(self, op)

    async def poll(self, op: ops.Poll) -> int:
        if op.flags & PollFlag.SCHEDULE_NOTIFY:
            self.polling.setdefault(op.nodeid, set()).add(op.kh)
        return op.events & self.ready.get(op.nodeid, 0)


def _get_flags(lab: Lab, op: ops.Ioctl) -> IoctlResult:
    return IoctlResult(0, struct.pack("=I", lab.flags.get(op.nodeid, 0)))


def _set_flags(lab: Lab, op: ops.Ioctl) -> IoctlResult:
    (lab.flags[op.nodeid],) = struct.unpack("=I", op.data)
    return IoctlResult()


def _keep(lab: Lab, op: ops.Ioctl) -> IoctlResult:
    lab.kept = op.data
    return IoctlResult(sum(op.data))


_IOCTLS: dict[int, Callable[[Lab, ops.Ioctl], IoctlResult]] = {
    REVERSE: lambda lab, op: IoctlResult(len(op.data), op.data[::-1]),
    DESCRIBE: lambda lab, op: IoctlResult(0, struct.pack("=QQQ", op.nodeid, op.flags, op.argument)),
    KEEP: _keep,
    ECHO: lambda lab, op: IoctlResult(op.argument),
    LARGE: lambda lab, op: IoctlResult(0, bytes((byte + 1) & 255 for byte in op.data)),
    TOO_MUCH: lambda lab, op: IoctlResult(0, bytes(op.out_size + 1)),
    FS_IOC_GETFLAGS: _get_flags,
    FS_IOC_SETFLAGS: _set_flags,
    FS_IOC_FSGETXATTR: lambda lab, op: IoctlResult(0, bytes(op.out_size)),
}


class Storm:
    """Notifications of every kind that changes nothing which a program could miss, about whatever there is, as fast as
    they go, several at a time."""

    WORKERS = 8

    def __init__(self, lab: Lab, notifier: Notifier) -> None:
        self._lab = lab
        self._notifier = notifier
        self._random = random.Random(1)
        self._sent: Counter[str] = Counter()
        self._over = False
        self._tasks = [asyncio.ensure_future(self._work()) for _ in range(self.WORKERS)]

    async def stop(self) -> dict[str, int]:
        """How many of each were sent."""
        self._over = True
        await asyncio.gather(*self._tasks)
        return dict(self._sent)

    async def _work(self) -> None:
        kinds = [self._inode, self._pages, self._entry, self._expire, self._delete, self._retrieve, self._prune]
        kinds += [self._store, self._epoch, self._poll]
        while not self._over or len(self._sent) < len(kinds):
            kind = self._random.choice(kinds)
            await kind()
            self._sent[kind.__name__.strip("_")] += 1

    def _node(self) -> Node:
        return self._random.choice(list(self._lab.nodes.values()))

    def _name(self) -> tuple[int, bytes]:
        """A directory and a name that it has, or had, or never will have."""
        node = self._node()
        names = list(node.names) if isinstance(node, Directory) else []
        return node.attr.ino, self._random.choice([*names, b"absent"])

    async def _inode(self) -> None:
        await self._notifier.invalidate_inode(self._node().attr.ino)

    async def _pages(self) -> None:
        await self._notifier.invalidate_inode(self._node().attr.ino, 0, 0)

    async def _entry(self) -> None:
        await self._notifier.invalidate_entry(*self._name())

    async def _expire(self) -> None:
        await self._notifier.invalidate_entry(*self._name(), expire_only=True)

    async def _delete(self) -> None:
        """Of another inode than has the name: the locks are taken, the name stays."""
        parent, name = self._name()
        await self._notifier.delete(parent, 1 << 40, name)

    async def _retrieve(self) -> None:
        node = self._node()
        if isinstance(node, File):
            await self._notifier.retrieve(node.attr.ino, 0, 1 << 20)

    async def _store(self) -> None:
        """What the file holds: nobody writes to it."""
        static = self._lab.nodes[ROOT_ID]
        assert isinstance(static, Directory)
        node = static.names[b"static"].node
        assert isinstance(node, File)
        await self._notifier.store(node.attr.ino, 0, b"".join(node.data.read(0, node.attr.size)))

    async def _epoch(self) -> None:
        await self._notifier.increment_epoch()

    async def _prune(self) -> None:
        await self._notifier.prune([self._node().attr.ino for _ in range(20)])

    async def _poll(self) -> None:
        await self._notifier.wake_poll(self._random.randrange(1 << 20))


class Control:
    """What a test may ask of the server; every method runs in its event loop."""

    def __init__(self, lab: Lab, session: Session, log: Log) -> None:
        assert session.notifier is not None
        self._lab = lab
        self._session = session
        self._notifier = session.notifier
        self._log = log
        self._storm: Storm | None = None
        self._begun: list[asyncio.Task[Any]] = []

    async def notify(self, kind: str, *arguments: Any, **named: Any) -> Any:
        """Call this method of the notifier."""
        return await getattr(self._notifier, kind)(*arguments, **named)

    async def begin_notify(self, kind: str, *arguments: Any) -> int:
        """Call it and leave it alone; it stands in the queue behind those begun before. Its number for ``outcome``."""
        self._begun.append(asyncio.ensure_future(self.notify(kind, *arguments)))
        await asyncio.sleep(0)
        return len(self._begun) - 1

    async def outcome(self, number: int) -> Any:
        return await self._begun[number]

    async def unfinished(self) -> int:
        """How many of those begun have not returned."""
        return sum(not task.done() for task in self._begun)

    async def start_storm(self) -> None:
        self._storm = Storm(self._lab, self._notifier)

    async def stop_storm(self) -> dict[str, int]:
        assert self._storm is not None
        return await self._storm.stop()

    async def unmount(self, *, lazy: bool = False) -> None:
        await self._session.unmount(lazy=lazy)

    async def seen(self) -> list[tuple[str, int, str]]:
        """The fields of the requests since the last call."""
        requests, self._log.requests = self._log.requests, []
        return [tuple(request) for request in requests]

    async def wait_for(self, opcode: str, count: int = 1) -> None:
        """Return when ``seen`` would have so many of these."""
        await self._log.until(opcode, count)

    async def wait_forgotten(self, inos: list[int], *, wait: bool = True) -> list[int]:
        """Those of these that the kernel has forgotten; ``wait`` until it is all of them."""
        while wait and any(self._lab.nodes[ino].lookups for ino in inos):
            await self._log.changed()
        return [ino for ino in inos if not self._lab.nodes[ino].lookups]

    async def agreement(self) -> dict[str, int]:
        agreed = self._session.agreement
        assert agreed is not None
        return {"flags": int(agreed.flags), "max_write": agreed.max_write, "minor": agreed.minor}

    async def close_gate(self, name: str) -> None:
        """Let handlers of this opcode wait (LOOKUP, MKDIR, GETATTR)."""
        self._lab.gates[name] = asyncio.Event()

    async def open_gate(self, name: str) -> None:
        self._lab.gates.pop(name).set()

    async def ino(self, path: str) -> int:
        return self._find(path).attr.ino

    async def kept(self) -> bytes:
        return self._lab.kept

    async def change(self, path: str, data: bytes, offset: int = 0) -> None:
        """Write into a file without telling the kernel."""
        file = self._find(path)
        assert isinstance(file, File)
        file.data.write(offset, memoryview(data))
        file.modified(max(file.attr.size, offset + len(data)))

    async def rename(self, old: str, new: str) -> None:
        """In the root directory, without telling the kernel."""
        root = self._find("")
        assert isinstance(root, Directory)
        node = root.entry(os.fsencode(old)).node
        root.remove(os.fsencode(old))
        root.add(os.fsencode(new), node)

    async def set_ready(self, path: str, events: int, *, wake: bool = True) -> int:
        """The file is ready for these events; wakes whoever polls it. How many handles that were."""
        ino = self._find(path).attr.ino
        self._lab.ready[ino] = events
        handles = self._lab.polling.pop(ino, set()) if wake else set()
        for kh in handles:
            await self.notify("wake_poll", kh)
        return len(handles)

    def _find(self, path: str) -> Node:
        node = self._lab.nodes[ROOT_ID]
        for name in filter(None, path.split("/")):
            assert isinstance(node, Directory)
            node = node.entry(os.fsencode(name)).node
        return node


def _answer(connection: Connection, control: Control, loop: asyncio.AbstractEventLoop) -> None:
    with connection:
        method, arguments, named = connection.recv()
        try:
            call = asyncio.run_coroutine_threadsafe(getattr(control, method)(*arguments, **named), loop)
            answer = (False, call.result())
        except Exception as error:
            answer = (True, error)
        try:
            connection.send(answer)
        except BrokenPipeError:
            pass  # the test no longer waits


def _listen(listener: Listener, control: Control, loop: asyncio.AbstractEventLoop) -> None:
    while True:
        threading.Thread(target=_answer, args=(listener.accept(), control, loop), daemon=True).start()


async def main() -> None:
    socket, text, mountpoint = sys.argv[1:]
    configuration = msgspec.json.decode(text, type=Configuration)
    lab, log = Lab(configuration), Log()
    options = MountOptions(source="lab", subtype="lab", allow_other=True)
    session = Session(
        lab,
        mountpoint,
        dataclasses.replace(options, **configuration.options),
        settings=Settings(**{"transport": "device", **configuration.settings}),
        trace=cast(TextIO, log),
    )
    listener = Listener(socket, "AF_UNIX")
    loop = asyncio.get_running_loop()
    await session.mount()
    control = Control(lab, session, log)
    threading.Thread(target=_listen, args=(listener, control, loop), daemon=True).start()
    await session.serve()


if __name__ == "__main__":
    uvloop.run(main())
