"""The exchange of INIT, the first request of a connection."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from rawfuse import ops
from rawfuse.abi import KERNEL_MAJOR, Opcode
from rawfuse.device import RequestBuffer
from rawfuse.errors import FuseError, ProtocolError
from rawfuse.filesystem import FileSystem
from rawfuse.mount import MountOptions
from rawfuse.negotiate import Agreement, Settings, encode_init, encode_old_major, negotiate
from rawfuse.table import TABLE
from rawfuse.transport import Transport
from rawfuse.wire import InMessage, OutMessage

_INIT_BUFFER = 1 << 16


class InitExchange:
    """INIT, read and answered with blocking calls in a thread, before the event loop takes the device over.
    ``before_reply`` is called with what will be agreed on, before the kernel knows it. Whatever is raised there, or by
    the file system, the kernel gets an answer: a mount(2) that waits for INIT cannot even be killed (dev.c: FR_FORCE).
    """

    def __init__(
        self,
        transport: Transport,
        filesystem: FileSystem,
        settings: Settings,
        options: MountOptions,
        before_reply: Callable[[Agreement], None],
    ) -> None:
        self._device = transport.device
        self._ring_stands = transport.ring_stands
        self._filesystem = filesystem
        self._settings = settings
        self._default_permissions = options.default_permissions
        self._before_reply = before_reply
        self._buffer = RequestBuffer(_INIT_BUFFER)
        self.cancelled = False
        self.agreement: Agreement | None = None
        self.error: Exception | None = None

    def run_quietly(self) -> None:
        try:
            self.run()
        except Exception as error:
            if not isinstance(error, FuseError) or error.errno != errno.EINTR:
                self.error = error

    def run(self) -> Agreement:
        os.set_blocking(self._device.fd, True)
        while self.agreement is None:
            length = self._device.read(self._buffer)
            if length > 0:
                self._answer(length)
            elif -length != errno.EINTR:
                raise FuseError(-length, f"the kernel gave no INIT: {os.strerror(-length)}")
            elif self.cancelled:
                raise FuseError(errno.EINTR)
        os.set_blocking(self._device.fd, False)
        return self.agreement

    def _answer(self, length: int) -> None:
        message = InMessage(self._buffer.view)
        try:
            message.load(length)
            if message.opcode != Opcode.INIT:
                raise ProtocolError(f"opcode {message.opcode} before INIT")
            init = TABLE[Opcode.INIT].decode(message)
            assert isinstance(init, ops.Init)
        except ProtocolError as error:
            raise FuseError(errno.EPROTO, f"INIT: {error}") from error
        if init.major > KERNEL_MAJOR:
            self._send(OutMessage(init.unique, [encode_old_major()]))
            return
        try:
            agreement = negotiate(
                init,
                self._filesystem,
                self._settings,
                default_permissions=self._default_permissions,
                ring_stands=self._ring_stands,
            )
            self._before_reply(agreement)
        except Exception as error:
            code = error.errno if isinstance(error, OSError) else None
            self._send(OutMessage(init.unique, error=-(code or errno.EPROTO)))
            raise
        self._send(OutMessage(init.unique, [encode_init(agreement, self._settings)]))
        self.agreement = agreement

    def _send(self, message: OutMessage) -> None:
        sent = self._device.write(message.buffers)
        if sent < 0:
            raise FuseError(-sent, f"the kernel refused the INIT reply: {os.strerror(-sent)}")
