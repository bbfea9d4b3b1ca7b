"""The compiled hot path does what the Python code does, byte for byte; loses no memory; and takes no nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import logging
import os
import stat
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rawfuse import (
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    Entry,
    FileSystem,
    FileSystemStatus,
    FuseError,
    OpenedFile,
    OpenFlag,
    ops,
)
from rawfuse._fast import REPLY_EMPTY, TAIL_DATA, TAIL_NAME, TAIL_NOTHING, FastPath
from rawfuse.abi import Opcode
from rawfuse.decode import IN_PLACE
from rawfuse.device import RequestBuffer
from rawfuse.errors import ProtocolError
from rawfuse.table import TABLE
from tests.unit.rawfuse_helpers import HEADER, loaded, request
from tests.unit.rawfuse_kernel import Kernel, Reply, compiled, served
from tests.unit.test_rawfuse_table import DECODED

BODIES = {opcode: body for opcode, body, _ in DECODED}
SERVED = [opcode for opcode in BODIES if TABLE[opcode].method and opcode != Opcode.DESTROY]
SENTINEL = 1 << 62
EXAMPLES = 6000 if os.environ.get("POLEFS_STRESS", "0") != "0" else 300


class Puppet(FileSystem):
    """Every handler records its operation and does what it was told; ``act`` gets the number of handlers before."""

    def __init__(self, act: Callable[[int], Any], waits: bool = False) -> None:
        self.act = act
        self.waits = waits
        self.seen: list[tuple[type[ops.Op], list[Any]]] = []

    async def perform(self, op: ops.Op) -> Any:
        fields = [getattr(op, name) for name in op.__struct_fields__]
        self.seen.append((type(op), [bytes(field) if isinstance(field, memoryview) else field for field in fields]))
        number = len(self.seen) - 1
        if self.waits:
            await asyncio.sleep(0)
        return self.act(number)


for _row in TABLE.values():
    if _row.method not in ("", "destroy", "stat_fs"):
        setattr(Puppet, _row.method, Puppet.perform)


async def exchange(filesystem: Puppet, requests: list[bytes]) -> list[Reply]:
    """All replies to the requests, in order."""
    replies: list[Reply] = []
    async with served(filesystem) as kernel:
        for data in requests:
            kernel.send_bytes(data)
        await _collect(kernel, replies)
        while kernel.dispatcher.waiting:  # noqa: ASYNC110 - nothing tells of the dispatcher's inner steps
            await asyncio.sleep(0)
        await _collect(kernel, replies)
    return replies


async def _collect(kernel: Kernel, replies: list[Reply]) -> None:
    """Up to the reply to a request of our own, which follows all others."""
    kernel.send_bytes(request(Opcode.STATFS, unique=SENTINEL))
    while (reply := await kernel.reply()).unique != SENTINEL:
        replies.append(reply)


Outcome = tuple[list[tuple[type[ops.Op], list[Any]]], list[Reply]]


def both(act: Callable[[int], Any], requests: list[bytes], waits: bool = False) -> list[Outcome]:
    """What the handlers saw and what was replied: with compiled code, and without."""
    results = []
    for mode in (True, False):
        filesystem = Puppet(act, waits)

        async def scenario(mode: bool = mode, filesystem: Puppet = filesystem) -> list[Reply]:
            compiled.set(mode)
            return await asyncio.wait_for(exchange(filesystem, requests), 20)

        results.append((filesystem.seen, asyncio.run(scenario())))
    return results


@contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


LIMITS = [0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31) - 1, -(2**63) - 1]
NUMBERS = st.sampled_from(LIMITS) | st.integers(0, 10**10)
ODD = st.sampled_from([None, 1.5, "7", True, OpenFlag.DIRECT_IO, b"1", object()])
VALUES = st.one_of(NUMBERS, NUMBERS, NUMBERS, NUMBERS, ODD)
SANE = st.integers(0, 2**31 - 1)


def structs(kind: type[Any], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly sane ones, with one field that need not be."""
    names = kind.__struct_fields__

    @st.composite
    def build(draw: st.DrawFn) -> Any:
        values = {name: draw(given.get(name, SANE)) for name in names}
        if draw(st.booleans()):
            values[draw(st.sampled_from(names))] = draw(VALUES)
        result = kind(**values)
        if draw(st.integers(0, 30)) == 0:
            with contextlib.suppress(AttributeError):
                delattr(result, draw(st.sampled_from(names)))
        return result

    return build()


TIMES = st.integers(-(10**18), 10**19)
ATTRIBUTES = structs(Attributes, atime=TIMES, mtime=TIMES, ctime=TIMES, ino=NUMBERS)
ENTRIES = structs(Entry, attributes=ATTRIBUTES | st.none(), nodeid=NUMBERS)
OPENED = structs(OpenedFile, backing=st.just(-1)) | st.just(OpenedFile(7, OpenFlag.KEEP_CACHE | OpenFlag.DIRECT_IO))


class OwnEntry(Entry):
    """An author's subclass."""


def directory() -> DirectoryBuffer:
    records = DirectoryBuffer(200)
    records.add(b"name", 1, stat.S_IFREG, 1)
    return records


RESULTS = st.one_of(
    ENTRIES,
    structs(AttributesReply, attributes=ATTRIBUTES),
    OPENED,
    st.tuples(ENTRIES, OPENED),
    st.binary(max_size=120),
    st.binary(max_size=120).map(bytearray),
    st.binary(max_size=120).map(lambda data: memoryview(data)),
    st.lists(st.binary(max_size=40), max_size=4),
    VALUES,
    st.builds(lambda: memoryview(bytes(64))[::2]),
    st.builds(lambda: memoryview(bytes(64)).cast("I")),
    st.just(OwnEntry(5, Attributes(ino=5, mode=stat.S_IFREG))),
    st.just((Entry(5, None),)),
    st.builds(directory),
    st.just(FileSystemStatus()),
)
FAILURES = st.one_of(
    st.sampled_from(LIMITS).map(lambda number: OSError(number, "text")),
    st.sampled_from([errno.ENOENT, errno.ENOSYS, errno.EINTR, 511, 512]).map(FuseError),
    st.sampled_from(
        [
            OSError("no number"),
            OSError(),
            TimeoutError(),
            TimeoutError(errno.ETIMEDOUT, "late"),
            FileNotFoundError(errno.ENOENT, "no"),
            ValueError("a bug"),
            asyncio.CancelledError(),
            StopIteration(3),
            OSError("2", "a text for a number"),
        ]
    ),
)


@st.composite
def acts(draw: st.DrawFn) -> Callable[[int], Any]:
    outcome = draw(st.one_of(RESULTS, RESULTS, FAILURES))

    def act(number: int) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome.with_traceback(None)
        return outcome

    return act


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """One of any opcode; some are damaged."""
    opcode = draw(st.sampled_from(SERVED))
    body = BODIES[opcode]
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "more", "bytes", "header"]))
    if damage == "cut":
        body = body[: draw(st.integers(0, len(body)))]
    elif damage == "more":
        body += draw(st.binary(min_size=1, max_size=20))
    elif damage == "bytes":
        changed = bytearray(body)
        for position in draw(st.lists(st.integers(0, max(0, len(body) - 1)), max_size=4)) if body else []:
            changed[position] = draw(st.integers(0, 255))
        body = bytes(changed)
    extensions = draw(st.sampled_from([b"", b"", b"", bytes(8), b"\x08\0\0\0\0\0\0\0"]))
    unique = 2 * draw(st.integers(1, 3)) | draw(st.sampled_from([0, 0, 1 << 63]))
    data = request(opcode, body, extensions=extensions, unique=unique, nodeid=draw(st.integers(0, 2**64 - 1)))
    if damage == "header":
        fields = list(HEADER.unpack_from(data))
        fields[draw(st.sampled_from([0, 1, 7]))] = draw(st.integers(0, 200))
        data = HEADER.pack(*fields) + data[HEADER.size :]
    return data


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=4), acts(), st.booleans())
def test_same_as_python(data: list[bytes], act: Callable[[int], Any], waits: bool) -> None:
    """The same operations reach the handlers and the same bytes go out, whatever came in and was returned."""
    with quiet():
        fast, plain = both(act, data, waits)
    assert fast == plain
    assert sorted(reply.unique for reply in fast[1]) == sorted(filter(None, map(expected, data)))


def expected(data: bytes) -> int:
    """The id of the reply that a request wants; whatever is malformed gets an error. 0: none."""
    _, opcode, unique, *_ = HEADER.unpack_from(data)
    with contextlib.suppress(ProtocolError):
        message = loaded(data)
        if opcode in TABLE and TABLE[opcode].encode is None and TABLE[opcode].decode(message):
            return 0
    return int(unique)


@pytest.mark.parametrize("size", [0, 1, IN_PLACE - 1, IN_PLACE, IN_PLACE + 1, 60_000])
@pytest.mark.parametrize("waits", [False, True])
def test_data_of_any_size(size: int, waits: bool) -> None:
    head = BODIES[Opcode.WRITE]
    body = head[:16] + size.to_bytes(4, sys.byteorder) + head[20:40] + bytes(range(256)) * (size // 256 + 1)
    data = request(Opcode.WRITE, body[: 40 + size], unique=2)
    fast, plain = both(lambda number: size, [data, data], waits)
    assert fast == plain
    assert {fields[-1] for _, fields in fast[0]} == {body[40 : 40 + size]}


def variants(kind: type[Any], **given: Any) -> list[Any]:
    """One of the kind for every odd value in every field."""
    sane = dict.fromkeys(kind.__struct_fields__, 3) | given
    values = [*LIMITS, None, 1.5, "7", True, OpenFlag.DIRECT_IO]
    return [kind(**(sane | {name: value})) for name in sane for value in values]


def test_every_field_with_every_limit() -> None:
    attributes = variants(Attributes)
    entries = variants(Entry, attributes=Attributes(7, 8)) + [Entry(5, each) for each in attributes]
    opened = variants(OpenedFile, backing=-1)
    cases: list[tuple[Opcode, list[Any]]] = [
        (Opcode.LOOKUP, entries),
        (Opcode.GETATTR, [*map(AttributesReply, attributes), *variants(AttributesReply, attributes=Attributes(7, 8))]),
        (Opcode.OPEN, opened),
        (Opcode.CREATE, [(entry, OpenedFile()) for entry in entries] + [(Entry(5, None), each) for each in opened]),
        (Opcode.WRITE, [*LIMITS, None, True, 1.5]),
    ]
    for opcode, results in cases:
        for start in range(0, len(results), 50):
            part = results[start : start + 50]
            data = [request(opcode, BODIES[opcode], unique=2 * number) for number in range(1, len(part) + 1)]
            with quiet():
                fast, plain = both(part.__getitem__, data)
            assert len(fast[1]) == len(part)
            assert fast == plain, opcode


def test_every_length_of_every_request() -> None:
    for opcode in SERVED:
        body = BODIES[opcode]
        bodies = [body[:length] for length in range(len(body))]
        bodies += [body + b"\0", body + b"a", b"\0", b"a", b"\0\0", b"a\0", b"a\0b", b"a\0b\0", b"a\0\0", bytes(255)]
        data = [request(opcode, each, unique=2 * number) for number, each in enumerate(bodies, 1)]
        with quiet():
            fast, plain = both(lambda number: None, data)
        assert fast == plain, opcode
        assert [reply.unique for reply in fast[1]] == list(filter(None, map(expected, data))), opcode


KEPT = {
    Opcode.LOOKUP: lambda: Entry(5, Attributes(ino=5, mode=stat.S_IFREG, mtime=-(10**15))),
    Opcode.GETATTR: lambda: AttributesReply(Attributes(ino=5, mode=stat.S_IFREG)),
    Opcode.OPEN: lambda: OpenedFile(2**40),
    Opcode.CREATE: lambda: (Entry(5, Attributes(ino=5, mode=stat.S_IFREG)), OpenedFile(2**40)),
    Opcode.READ: lambda: bytearray(50),
    Opcode.WRITE: lambda: 4,
    Opcode.UNLINK: lambda: None,
    Opcode.FORGET: lambda: None,
    Opcode.READDIR: directory,
    Opcode.READLINK: lambda: "no bytes",
}


def fail() -> Any:
    raise FuseError(errno.ENOENT)


def bug() -> Any:
    raise ValueError("a bug")


@pytest.mark.parametrize("waits", [False, True], ids=["eager", "waiting"])
@pytest.mark.parametrize("outcome", ["result", "error", "bug", "malformed"])
def test_no_memory_is_lost(outcome: str, waits: bool) -> None:
    """Objects come and go (free lists, caches), but not one with every request."""
    opcode = Opcode.LOOKUP
    acts = {"error": fail, "bug": bug}
    filesystem = Puppet(lambda number: acts.get(outcome, KEPT[opcode])(), waits)

    async def serve(kernel: Kernel, rounds: int) -> int:
        nonlocal opcode
        for opcode in KEPT:
            body = BODIES[opcode] + (b"?" if outcome == "malformed" else b"")
            for _ in range(rounds):
                for number in range(20):
                    kernel.send_bytes(request(opcode, body, unique=2 * number + 2))
                if TABLE[opcode].encode is not None or outcome == "malformed":
                    await kernel.replies(20)
                await kernel.nothing_more()
        filesystem.seen.clear()
        gc.collect()
        return sys.getallocatedblocks()

    async def scenario() -> list[int]:
        async with served(filesystem) as kernel:
            return [await serve(kernel, 5) for _ in range(6)]

    with quiet():
        counts = asyncio.run(scenario())
    assert min(after - before for before, after in itertools.pairwise(counts)) < 50  # of 100 requests of each kind


def test_collected_with_its_dispatcher() -> None:
    """Dispatcher, channel and compiled path refer to each other."""

    async def scenario() -> weakref.ref[Any]:
        async with served(Puppet(lambda number: None)) as kernel:
            await kernel.call(Opcode.UNLINK, b"n\0")
            return weakref.ref(kernel.dispatcher)

    found = asyncio.run(scenario())
    gc.collect()
    assert found() is None


def test_run_inside_a_handler_is_refused() -> None:
    class Curious(FileSystem):
        path: Any = None

        async def unlink(self, op: ops.Unlink) -> None:
            self.path.run(0)

    async def scenario() -> None:
        filesystem = Curious()
        async with served(filesystem) as kernel:
            filesystem.path = kernel.dispatcher._channels[0]._reader  # type: ignore[attr-defined]
            assert isinstance(filesystem.path, FastPath)
            assert (await kernel.call(Opcode.UNLINK, b"n\0")).error == errno.EIO
            await kernel.nothing_more()

    with quiet():
        asyncio.run(scenario())


def a_path() -> FastPath:
    loop: Any = object()
    return FastPath(loop, loop, loop, {}, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, 0, (), TAIL_NAME, REPLY_EMPTY, -1),
        (64, 0, (), TAIL_NAME, REPLY_EMPTY, -1),
        (1, -1, (), TAIL_NAME, REPLY_EMPTY, -1),
        (1, 1 << 16, (), TAIL_NAME, REPLY_EMPTY, -1),
        (1, 104, tuple((8 * place, 8) for place in range(13)), TAIL_NOTHING, REPLY_EMPTY, -1),
        (1, 8, ((1, 8),), TAIL_NOTHING, REPLY_EMPTY, -1),
        (1, 8, ((0, 2),), TAIL_NOTHING, REPLY_EMPTY, -1),
        (1, 8, ((65535, 8),), TAIL_NOTHING, REPLY_EMPTY, -1),
        (1, 8, ((0, 8),), TAIL_NOTHING, REPLY_EMPTY, 0),
        (1, 8, ((0, 4),), TAIL_NOTHING, REPLY_EMPTY, 1),
        (1, 8, ((0, 4),), TAIL_DATA, REPLY_EMPTY, -1),
        (1, 0, (), TAIL_DATA + 1, REPLY_EMPTY, -1),
        (1, 0, (), TAIL_NAME, 99, -1),
    ],
)
def test_plans_that_make_no_sense(arguments: tuple[Any, ...]) -> None:
    opcode, *rest = arguments
    row: Any = object()
    with pytest.raises(ValueError, match="opcode"):
        a_path().add(opcode, row, row, row, *rest)


def test_misuse() -> None:
    path = a_path()
    buffer: Any
    with pytest.raises(RuntimeError, match="no buffer"):
        path.run(0)
    for buffer in (None, msgspec.defstruct("Buffer", ["view"])(b"read only")):
        with pytest.raises((AttributeError, BufferError)):
            path.use(buffer)
    path.use(RequestBuffer(8192))
    assert path.run(0) == 0
    path.left = 1
    assert path.run(0) == -errno.EBADF
    with pytest.raises(TypeError):
        path.run("soon")  # type: ignore[arg-type]
