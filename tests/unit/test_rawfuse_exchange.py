"""INIT gets an answer whatever happens: mount(2) waits for it and cannot be killed meanwhile."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from rawfuse import FileSystem, FuseError, InitFlag, MountOptions, Opcode, Settings
from rawfuse.device import Device
from rawfuse.exchange import InitExchange
from rawfuse.negotiate import Agreement
from rawfuse.transport import Transport
from rawfuse.wire import OUT_HEADER
from tests.unit.rawfuse_helpers import UNIQUE, request

INIT = struct.pack("=IIII44x", 7, 45, 1 << 17, 0)


class Broken(FileSystem):
    """It has a mistake in it."""

    @property
    def features(self) -> InitFlag:  # type: ignore[override]
        raise AttributeError("a mistake")


def ignore(agreement: Agreement) -> None:
    """Nothing more is wanted before the reply."""


def forbid(agreement: Agreement) -> None:
    raise FuseError(errno.EOPNOTSUPP, "not this")


def too_much(agreement: Agreement) -> None:
    raise OSError(errno.EMSGSIZE, "a deposit too big")


@pytest.mark.parametrize(
    ("filesystem", "before_reply", "raised", "answered"),
    [
        (Broken(), ignore, AttributeError, errno.EPROTO),
        (FileSystem(), forbid, FuseError, errno.EOPNOTSUPP),
        (FileSystem(), too_much, OSError, errno.EMSGSIZE),
    ],
    ids=["mistake", "refusal", "failure"],
)
def test_the_kernel_is_answered(
    filesystem: FileSystem, before_reply: object, raised: type[Exception], answered: int
) -> None:
    kernel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    transport = Transport(Device(theirs.detach()), Settings())
    exchange = InitExchange(transport, filesystem, Settings(), MountOptions(), before_reply)  # type: ignore[arg-type]
    with kernel:
        kernel.setblocking(False)
        kernel.send(request(Opcode.INIT, INIT))
        exchange.run_quietly()
        assert OUT_HEADER.unpack_from(kernel.recv(1 << 16)) == (OUT_HEADER.size, -answered, UNIQUE)
    transport.close()
    assert type(exchange.error) is raised
