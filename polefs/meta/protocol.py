"""What a meta service and its clients say to each other: MessagePack in the binary frames of one WebSocket.

A client begins with ``Hello`` and gets ``Welcome`` or ``Refused``. Then it sends ``Requests``, many operations of
``MetaAPI`` in one frame, and gets ``Replies`` in any order. Ids of requests grow by one. A client that lost its
connection resumes its session and sends again what it has no reply to: the service remembers the replies to changes
until the client says, by ``Requests.done``, that it has them; so each change is made once. What may take for ever, as
a lock that waits, has an id below 0: such a request is in nobody's way, nobody remembers its reply, and it does no harm
when it is sent again. A ``Ping`` renews the lease of a session; so does every other frame.

Operations are stated once, as the signatures of ``MetaAPI``: ``OPERATIONS`` is read from them.
"""

from __future__ import annotations

import inspect
import typing
from typing import Any, Final

import msgspec

from polefs.meta.api import MetaAPI
from polefs.meta.locks import Told

VERSION: Final = 1
"""The version of the protocol that this software speaks; both ends tell theirs and use the lower one."""

OLDEST: Final = 1
"""The oldest version that it still speaks."""

FRAME_MAX: Final = 16 << 20
"""Longest frame, bytes; a commit of the contents of many small files is the largest."""

BATCH_MAX: Final = 4096
"""Most requests in one frame."""

IN_FLIGHT_MAX: Final = 16_384
"""Most requests of one session without a reply; more of them end the connection."""


class Hello(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """A client comes, or comes back: with ``session`` and its ``secret`` it goes on with that one."""

    version: int
    oldest: int
    volume: str
    token: str = ""
    session: int = 0
    secret: bytes = b""
    info: str = ""
    """Who it is, for the administrator: host, process, mount point."""


class Requests(msgspec.Struct, tag=1, array_like=True, frozen=True):
    requests: list[tuple[int, str, msgspec.Raw]]
    """``(id, operation, arguments)``; the arguments are an array in the order of the signature."""
    done: int
    """The client has the replies to all requests up to this id, from 1 on."""


class Ping(msgspec.Struct, tag=2, array_like=True, frozen=True):
    number: int


class Goodbye(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """The client ends its session: what it held is released. The service ends the connection."""


class Welcome(msgspec.Struct, tag=16, array_like=True, frozen=True):
    version: int
    session: int
    secret: bytes
    """The client's only, to come back with."""
    resumed: bool
    """False: the session asked for is over, and this is a new one."""
    lease: float
    """Seconds after the last sign of life at which the session is over."""
    read_only: bool
    tell: bool
    """The service has been restarted and does not know what the session uses."""


class Refused(msgspec.Struct, tag=17, array_like=True, frozen=True):
    """The connection ends: ``text`` says in one line why and what to do."""

    errno: int
    text: str


class Replies(msgspec.Struct, tag=18, array_like=True, frozen=True):
    replies: list[tuple[int, int, msgspec.Raw]]
    """``(id, errno, result)``; at an errno other than 0 the result is a text."""


class Pong(msgspec.Struct, tag=19, array_like=True, frozen=True):
    number: int


class Uses(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """The answer to ``Welcome.tell``, before any request: the inodes that the session has open, and the locks that it
    holds."""

    inos: list[int]
    locks: list[Told]


FromClient = Hello | Requests | Ping | Goodbye | Uses
FromService = Welcome | Refused | Replies | Pong

encode: Final = msgspec.msgpack.Encoder().encode
decode_from_client: Final = msgspec.msgpack.Decoder(FromClient).decode
decode_from_service: Final = msgspec.msgpack.Decoder(FromService).decode


_READING = frozenset(
    (
        *("lookup", "list_dir", "list_dir_plus", "read_link", "get_inode", "get_xattr", "list_xattr", "usage"),
        *(
            "extents",
            "segments",
            "dead_segments",
            "lost_segments",
            "segment_usage",
            "segment_extents",
            "sync",
            "get_lock",
        ),
    )
)

_HARMLESS = frozenset(("open_inode", "close_inodes", "release_orphans", "set_lock", "give_up_lock"))

_REPEATABLE = frozenset(
    (
        *("open_inode", "close_inodes", "release_orphans", "touch_atime", "allocate_segments", "forget_segments"),
        *("set_lock", "give_up_lock"),
    )
)
"""To be done twice does no harm after a restart of the service; some are several transactions."""

_LOCAL = frozenset(("close",))
"""Said in other ways: by ``Goodbye``."""


class Operation:
    """One coroutine method of ``MetaAPI`` on the wire."""

    __slots__ = ("arguments", "harmless", "name", "once", "reads", "result")

    def __init__(self, name: str, hints: dict[str, Any], reads: bool) -> None:
        self.name = name
        self.reads = reads
        """It changes nothing, so that it may simply be repeated."""
        self.harmless = reads or name in _HARMLESS
        """Sessions that are read-only may ask for it."""
        self.once = not reads and name not in _REPEATABLE
        """Its reply is stored with what it changes."""
        result = hints.pop("return")
        self.arguments = msgspec.msgpack.Decoder(tuple[tuple(hints.values())])  # type: ignore[misc]
        self.result = msgspec.msgpack.Decoder(result)


def _operations() -> dict[str, Operation]:
    return {
        name: Operation(name, typing.get_type_hints(method), name in _READING)
        for name, method in vars(MetaAPI).items()
        if inspect.iscoroutinefunction(method) and name not in _LOCAL
    }


OPERATIONS: Final = _operations()
