"""A mirror whose files are opened in the mode that an extended attribute names.

python -m tests.mounted.modes SOURCE MOUNTPOINT

``user.mode`` of a file, set on the mount: how it is opened from then on (a name of ``MODES``). ``user.opened``: how its
newest handle is served. ``user.served``: how many READs and WRITEs of it came here. Nothing of this reaches the source.
"""

from __future__ import annotations

import argparse
import os

from examples.mirror import Mirror, add_arguments
from examples.run import main
from rawfuse import OpenedFile, OpenFlag, ops

_MODE, _OPENED, _SERVED = b"user.mode", b"user.opened", b"user.served"

MODES: dict[bytes, tuple[OpenFlag, str]] = {
    b"cached": (OpenFlag(0), ""),
    b"kept": (OpenFlag.KEEP_CACHE, ""),
    b"direct": (OpenFlag.DIRECT_IO, ""),
    b"passthrough": (OpenFlag.KEEP_CACHE, "itself"),
    b"passthrough-direct": (OpenFlag.DIRECT_IO, "itself"),
    b"passthrough-path": (OpenFlag(0), "path"),
    b"passthrough-other": (OpenFlag(0), "another file"),
    b"passthrough-stream": (OpenFlag.STREAM, "itself"),
    b"passthrough-closed": (OpenFlag(0), "a closed descriptor"),
}


class Modes(Mirror):
    def __init__(self, source: str) -> None:
        super().__init__(source, 0)
        self._modes: dict[int, bytes] = {}
        self._opened: dict[int, OpenedFile] = {}
        self._served: dict[int, int] = {}
        self._another = os.memfd_create("another")
        os.write(self._another, b"x" * 100)

    async def open_file(self, op: ops.OpenFile) -> OpenedFile:
        opened = await super().open_file(op)
        flags, backing = MODES[self._modes.get(op.nodeid, b"passthrough")]
        opened.flags = flags
        match backing:
            case "":
                opened.backing = -1
            case "path":
                opened.backing = self.nodes[op.nodeid].fd
            case "another file":
                opened.backing = self._another
            case "a closed descriptor":
                opened.backing = 1 << 20
        self._opened[op.nodeid] = opened
        return opened

    async def read_file(self, op: ops.ReadFile) -> memoryview:
        self._served[op.nodeid] = self._served.get(op.nodeid, 0) + 1
        return await super().read_file(op)

    async def write_file(self, op: ops.WriteFile) -> int:
        self._served[op.nodeid] = self._served.get(op.nodeid, 0) + 1
        return await super().write_file(op)

    async def set_xattr(self, op: ops.SetXattr) -> None:
        self._modes[op.nodeid] = op.value

    async def get_xattr(self, op: ops.GetXattr) -> bytes:
        if op.name == _OPENED:
            opened = self._opened[op.nodeid]
            names = [str(flag.name) for flag in OpenFlag if flag & opened.flags]
            assert bool(opened.backing_id) == ("PASSTHROUGH" in names)
            return "|".join(names).encode()
        if op.name == _SERVED:
            return str(self._served.get(op.nodeid, 0)).encode()
        return await super().get_xattr(op)


def _make(arguments: argparse.Namespace) -> Modes:
    return Modes(arguments.source)


if __name__ == "__main__":
    main(_make, "modes", add_arguments)
