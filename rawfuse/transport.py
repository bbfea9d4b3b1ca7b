"""How requests come and replies go: read and written on ``/dev/fuse``, on clones of it, or through io_uring.

Whatever is missing for the one that was asked for, the plain device is always there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path

from rawfuse.abi import InitFlag
from rawfuse.channel import Channel, DeviceChannel
from rawfuse.device import Device
from rawfuse.errors import FuseError
from rawfuse.negotiate import PAGE, Agreement, Settings, page_limit
from rawfuse.uring import Ring, RingChannel

log = logging.getLogger("rawfuse")

_ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")


class Transport:
    """What a session has to exchange messages with the kernel. Made before INIT, in the thread of the event loop."""

    def __init__(self, device: Device, settings: Settings) -> None:
        self.device = device
        self.used = "device"
        """One of the values of ``Settings.transport``."""
        self.fallback = ""
        """Why ``used`` is not what was asked for; empty where it is."""
        self._settings = settings
        self._clones: list[Device] = []
        self._ring: Ring | None = None
        if settings.transport == "uring":
            try:
                self._ring = Ring(device, min(-(-settings.max_write // PAGE), page_limit()) * PAGE)
            except OSError as error:
                self._fall_back(error)

    @property
    def ring_stands(self) -> bool:
        """OVER_IO_URING may be agreed to."""
        return self._ring is not None

    def open(self, agreement: Agreement, loop: asyncio.AbstractEventLoop) -> list[Channel]:
        """The channels of this session, after INIT. The first is that of the device."""
        settings = self._settings
        if settings.transport == "uring" and (ring := self._registered(agreement)) is not None:
            self.used = "uring"
            # There is hardly anything to be read beside the ring, so no looking for it.
            device = DeviceChannel(self.device, agreement.buffer_size, loop)
            return [device, RingChannel(ring, loop, settings.busy_poll)]
        if settings.transport == "clones":
            self._clone()
        return [
            DeviceChannel(device, agreement.buffer_size, loop, settings.busy_poll)
            for device in (self.device, *self._clones)
        ]

    def _registered(self, agreement: Agreement) -> Ring | None:
        ring = self._ring
        if ring is None:
            return None
        try:
            if not agreement.flags & InitFlag.OVER_IO_URING:
                raise FuseError(errno.EOPNOTSUPP, _why_not(agreement))
            ring.register()
        except FuseError as error:
            self._fall_back(error)
            self._ring = None
            ring.close()
            return None
        return ring

    def _clone(self) -> None:
        try:
            while len(self._clones) + 1 < self._settings.readers:
                self._clones.append(self.device.clone())
        except FuseError as error:
            self._fall_back(error)
            self._close_clones()
        else:
            self.used = "clones"

    def _fall_back(self, error: OSError) -> None:
        self.fallback = error.strerror or str(error)
        log.warning("no transport %r, the device is used instead: %s", self._settings.transport, self.fallback)

    def _close_clones(self) -> None:
        while self._clones:
            self._clones.pop().close()

    def close(self) -> None:
        """End the connection, as far as nobody else holds a descriptor of it."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._close_clones()
        self.device.close()


def _why_not(agreement: Agreement) -> str:
    if agreement.offered & InitFlag.OVER_IO_URING:
        return agreement.refused.get(InitFlag.OVER_IO_URING, "it is not wanted")
    if _ENABLE_URING.exists():
        return f"the kernel does not offer it: echo Y > {_ENABLE_URING}"
    return "the kernel does not offer it: Linux 6.14 with CONFIG_FUSE_IO_URING is needed"
