"""A mirror that kills itself at a point of an operation that a test names.

python -m tests.mounted.dying ORDERS [--no-synchronous-init] --keeper DIRECTORY [...] SOURCE MOUNTPOINT

The file ORDERS holds a point of ``POINTS`` and the name of an operation of ``rawfuse.ops``, as ``intended MkDir``, or,
for the exchange of INIT, ``deposited`` or ``undeposited``. Once it has died of it, the file is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from examples import mirror
from examples.mirror import add_arguments
from examples.run import main
from rawfuse import handover, ops, session
from rawfuse.abi import UNIQUE_RESEND
from rawfuse.device import Device
from rawfuse.handover import Keeper
from rawfuse.journal import Handler, Journal
from rawfuse.keeper import DEVICE
from rawfuse.negotiate import Agreement
from rawfuse.wire import OUT_HEADER

POINTS = ("begun", "intended", "executed", "journaled", "answered")
"""Before anything was done; with the note in the journal; executed; with the reply in the journal; after the reply."""

_orders: Path
_names: dict[int, str] = {}
_last: list[int] = []


def _ordered(*words: str) -> bool:
    """Whether to die here; the order is gone then."""
    try:
        if _orders.read_text() != " ".join(words):
            return False
    except FileNotFoundError:
        return False
    _orders.unlink()
    return True


def _die() -> NoReturn:
    while True:
        os.kill(os.getpid(), signal.SIGKILL)


class DyingJournal(Journal):
    def guarding(self, handler: Handler) -> Handler:
        handle = super().guarding(handler)

        async def guarded(op: ops.Op) -> Any:
            _names[op.unique & ~UNIQUE_RESEND] = type(op).__name__
            if _ordered("begun", type(op).__name__):
                _die()
            return await handle(op)

        return guarded

    def intend(self, unique: int, note: bytes) -> None:
        super().intend(unique, note)
        if _ordered("intended", _names[unique & ~UNIQUE_RESEND]):
            _die()

    def complete(self, unique: int, reply: bytes) -> None:
        name = _names.pop(unique & ~UNIQUE_RESEND)
        if _ordered("executed", name):
            _die()
        super().complete(unique, reply)
        if _ordered("journaled", name):
            _die()
        if _ordered("answered", name):
            _last.append(unique)


class DyingDevice(Device):
    def write(self, message: Any) -> int:
        sent = super().write(message)
        head = message if isinstance(message, bytes) else message[0]
        if OUT_HEADER.unpack_from(head)[2] in _last:
            _die()
        return sent


class DyingKeeper(Keeper):
    def put(self, key: bytes, value: bytes = b"", fd: int = -1) -> None:
        agreed = False
        if key == DEVICE:
            with contextlib.suppress(ValueError):
                agreed = bool(Agreement.load(value))
        if agreed and _ordered("undeposited"):
            _die()
        super().put(key, value, fd)
        if agreed and _ordered("deposited"):
            _die()


if __name__ == "__main__":
    _orders = Path(sys.argv.pop(1))
    handover.Journal = DyingJournal  # type: ignore[misc]
    session.Device = DyingDevice  # type: ignore[misc]
    mirror.Keeper = DyingKeeper  # type: ignore[misc]
    if "--no-synchronous-init" in sys.argv:
        sys.argv.remove("--no-synchronous-init")
        DyingDevice.synchronous_init = lambda self: False  # type: ignore[method-assign]
    main(mirror._make, "dying", add_arguments)
