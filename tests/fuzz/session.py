"""The target "session": whatever the other end of the device sends, each request gets exactly one reply, nothing
escapes the dispatcher, and in the end nothing is left of it.

An input: a byte of choices (1: the compiled hot path, 2: few requests in flight, 4: SETXATTR in its short form), the
number of bytes that tell handlers what to do and these bytes, then steps, each a byte for its kind, what the kind needs
and a byte for the turns that the event loop gets behind it.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from typing import Any

from rawfuse import Entry, FileSystem, FuseError, InitFlag, Settings, ops
from rawfuse.abi import Opcode
from rawfuse.errors import ProtocolError
from rawfuse.table import SET_XATTR_COMPAT, TABLE
from rawfuse.wire import IN_HEADER, OUT_HEADER, InMessage
from tests.fuzz.inputs import Input
from tests.unit.rawfuse_helpers import HEADER, request
from tests.unit.rawfuse_kernel import Kernel, agreement, compiled, served
from tests.unit.test_rawfuse_matrix import MATRIX, Case
from tests.unit.test_rawfuse_table import DECODED

BODIES = {opcode: body for opcode, body, _ in DECODED}
OPCODES = sorted(TABLE)
MOST_STEPS = 150
MOST_TURNS = 20_000
"""Of the event loop until everything must be answered."""
DEADLINE = 60
"""Seconds that an input may take."""
FEW = 2
SENTINEL = 1 << 62

KINDS = ("good", "body", "raw", "cut", "unknown", "again", "interrupt", "go_on", "large", "hang_up")
GOOD, BODY, RAW, CUT, UNKNOWN, AGAIN, INTERRUPT, GO_ON, LARGE, HANG_UP = range(len(KINDS))

GARBAGE: list[Any] = [
    None,
    -1,
    1 << 70,
    "text",
    b"x" * 100_000,
    [b"x", "y"],
    (1, 2),
    (Entry(5, None), None),
    object(),
    Entry(0, None),
    {},
    True,
]


class Odd:
    """What an event loop cannot wait for."""

    def __await__(self) -> Any:
        yield "something"


class Chaos(FileSystem):
    """Handlers do what the input says: return at once or later, a reply or garbage, raise anything, cancel themselves.
    STATFS alone is answered in order."""

    def __init__(self, source: Input) -> None:
        self._source = source
        self.waiting: list[asyncio.Future[None]] = []
        self.ending = False

    async def act(self, result: Any) -> Any:
        choice = self._source.byte()
        match choice & 15:
            case 0 | 1 | 2:
                return result
            case 3:
                raise FuseError(self._source.byte())
            case 4:
                raise OSError(self._source.number(2), "any number")
            case 5:
                raise (ValueError("a bug"), OSError("no number"), TimeoutError(), StopIteration(5))[choice >> 6]
            case 6:
                return GARBAGE[self._source.byte() % len(GARBAGE)]
            case 7:
                await asyncio.sleep(0)
                return GARBAGE[self._source.byte() % len(GARBAGE)]
            case 8:
                raise (asyncio.CancelledError(), GeneratorExit())[choice >> 7]
            case 9:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            case 10:
                await Odd()
            case 11:
                try:
                    await self._wait()
                except asyncio.CancelledError:
                    await asyncio.sleep(0)
            case 12:
                await self._wait()
                raise ValueError("a bug, later")
            case 13:
                await asyncio.sleep(0)
            case _:
                await self._wait()
        return result

    async def _wait(self) -> None:
        if not self.ending:
            future = asyncio.get_running_loop().create_future()
            self.waiting.append(future)
            await future

    def go_on(self, index: int) -> None:
        """Let one of those that wait go on."""
        if self.waiting:
            future = self.waiting.pop(index % len(self.waiting))
            if not future.done():
                future.set_result(None)

    async def finish(self) -> None:
        """From now on nobody waits."""
        self.ending = True
        while True:
            while self.waiting:
                self.go_on(0)
            await asyncio.sleep(0)


def _acting(result: Any) -> Any:
    async def method(self: Chaos, op: ops.Op) -> Any:
        return await self.act(result)

    return method


for _opcode, _case in MATRIX.items():
    _name = TABLE[_opcode].method
    if _name not in ("", "stat_fs", "destroy"):
        setattr(Chaos, _name, _acting(_case.result if isinstance(_case, Case) else None))


def replies_due(data: bytes, compat: bool) -> tuple[int, int]:
    """The id of a request and how many replies it must get. What is longer than the buffer is cut by the socket."""
    data = data[: agreement().buffer_size]
    if len(data) < IN_HEADER.size:
        return 0, 0
    message = InMessage(data)
    unique = HEADER.unpack_from(data)[2]
    try:
        message.load(len(data))
        row = TABLE.get(message.opcode)
        if row is None:
            return unique, 1
        if compat and message.opcode == Opcode.SETXATTR:
            row = SET_XATTR_COMPAT
        row.decode(message)
    except ProtocolError:
        return unique, 1
    return unique, 0 if row.encode is None else 1


class Script:
    """The steps of an input, sent to a session."""

    def __init__(self, source: Input, filesystem: Chaos, kernel: Kernel, compat: bool) -> None:
        self._source = source
        self._filesystem = filesystem
        self._end = kernel._ends[0]
        self._end.setblocking(False)
        self._compat = compat
        self._unique = 0
        self._sent: list[bytes] = []
        self.due: Counter[int] = Counter()
        self.replied: Counter[int] = Counter()

    async def run(self) -> bool:
        """Whether it was played to its end, without hanging up."""
        source = self._source
        for _ in range(MOST_STEPS):
            if not source.left:
                break
            kind = source.byte() % len(KINDS)
            if kind == HANG_UP:
                return False
            if kind == GO_ON:
                self._filesystem.go_on(source.byte())
            elif not await self._send(self._message(kind)):
                break
            for _ in range(source.byte() & 3):
                await self.turn()
        return True

    def _message(self, kind: int) -> bytes:
        source = self._source
        self._unique += 2
        opcode = OPCODES[source.byte() % len(OPCODES)]
        body = BODIES[Opcode(opcode)]
        if kind == BODY:
            body = source.take(source.byte())
        elif kind == RAW:
            return source.take(source.byte()) or b"\0"
        elif kind == CUT:
            whole = request(opcode, body, unique=self._unique)
            cut = source.byte()
            short = whole[: max(1, len(whole) - cut // 2)]
            return struct.pack("=I", len(short))[: len(short)] + short[4:] if cut & 1 else short
        elif kind == UNKNOWN:
            opcode = source.number(4)
        elif kind == AGAIN and self._sent:
            return self._sent[source.byte() % len(self._sent)]
        elif kind == INTERRUPT:
            target = 2 * source.byte()
            return request(Opcode.INTERRUPT, struct.pack("=Q", target), unique=target | 1, nodeid=0)
        elif kind == LARGE:
            size = source.number(2) * 2
            body = struct.pack("=QQIIQII", 3, 0, size, 0, 0, 1, 0) + bytes(size)
            opcode = Opcode.WRITE
        else:
            changed = bytearray(body)
            for _ in range(source.byte() & 3):
                position, value = source.byte(), source.byte()
                if position < len(changed):
                    changed[position] = value
            body = bytes(changed)
        return request(opcode, body, unique=self._unique)

    async def _send(self, data: bytes, patience: int = 64) -> bool:
        """False when the session takes no more for so many turns, because too many requests wait."""
        for _ in range(patience):
            try:
                self._end.send(data)
            except BlockingIOError:
                await self.turn()
                continue
            unique, count = replies_due(data, self._compat)
            self.due[unique] += count
            self._sent.append(data)
            return True
        return False

    async def turn(self) -> None:
        await asyncio.sleep(0)
        while True:
            try:
                data = self._end.recv(1 << 18)
            except BlockingIOError:
                return
            length, error, unique = OUT_HEADER.unpack_from(data)
            assert length == len(data)
            assert -511 <= error <= 0 and (error == 0 or length == OUT_HEADER.size), (
                "the kernel would refuse that reply"
            )
            self.replied[unique] += 1

    async def settle(self) -> None:
        """Every request has its replies, and none is left over."""
        assert await self._send(request(Opcode.STATFS, unique=SENTINEL), MOST_TURNS)
        for _ in range(MOST_TURNS):
            if not self.due - self.replied:
                break
            await self.turn()
        for _ in range(3):
            await self.turn()
        assert +self.due == +self.replied, f"due {+self.due}, replied {+self.replied}"


async def play(data: bytes) -> None:
    source = Input(data)
    choices = source.byte()
    actions = Input(source.take(source.byte()))
    compiled.set(bool(choices & 1))
    settings = Settings(max_in_flight=FEW if choices & 2 else 4096)
    compat = bool(choices & 4)
    escaped: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: escaped.append(context))
    filesystem = Chaos(actions)
    async with served(filesystem, InitFlag(0) if compat else InitFlag.SETXATTR_EXT, settings=settings) as kernel:
        script = Script(source, filesystem, kernel, compat)
        to_the_end = await script.run()
        finishing = asyncio.ensure_future(filesystem.finish())
        if to_the_end:
            await script.settle()
            assert not kernel.dispatcher.waiting
    finishing.cancel()
    await asyncio.wait([finishing])
    assert not escaped, escaped
    assert asyncio.all_tasks() == {asyncio.current_task()}


def run(data: bytes) -> None:
    """Raises nothing for any input."""

    async def limited() -> None:
        async with asyncio.timeout(DEADLINE):
            await play(data)

    with asyncio.Runner() as runner:
        runner.run(limited())


def seeds() -> list[bytes]:
    """Each opcode with handlers of each kind, and each kind of step among requests that wait."""
    found = []
    for index in range(len(OPCODES)):
        for choices in (0, 1):
            actions = bytes([(index + 5 * choices) % 16, 14, 0])
            steps = bytes([GOOD, index, 0, 1, INTERRUPT, 0, 1, 1, GOOD, (index + 7) % len(OPCODES), 0, 2])
            found.append(bytes([choices, len(actions)]) + actions + steps)
    for kind in range(len(KINDS)):
        for choices in range(8):
            waiting = bytes([GOOD, OPCODES.index(Opcode.GETATTR), 0, 1]) * 3
            steps = bytes([kind, 5, 20, 200, 3, 1, 2, 3]) * 4
            found.append(bytes([choices, 4, 14, 14, 11, 12]) + waiting + steps)
    return found
