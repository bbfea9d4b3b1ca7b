"""One mounted file system: device, INIT, mount and dispatcher joined."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
from typing import TextIO

from rawfuse import ops
from rawfuse._kernel import lib
from rawfuse.abi import KERNEL_MAJOR, InitFlag, Opcode
from rawfuse.backing import BackingFiles
from rawfuse.device import Device, RequestBuffer
from rawfuse.dispatcher import Dispatcher
from rawfuse.errors import FuseError, ProtocolError
from rawfuse.filesystem import FileSystem
from rawfuse.mount import MountOptions, mount_by_helper, mount_device, privileged, raise_read_ahead, unmount
from rawfuse.negotiate import Agreement, Settings, encode_init, encode_old_major, negotiate
from rawfuse.notify import Notifier
from rawfuse.table import TABLE
from rawfuse.trace import Trace
from rawfuse.transport import Transport
from rawfuse.wire import InMessage, OutMessage

log = logging.getLogger("rawfuse")

_INIT_BUFFER = 1 << 16
_JOIN = 0.05


class Session:
    """Mounts ``filesystem`` on ``mountpoint`` and serves it until it is unmounted::

    session = Session(MyFileSystem(), "/mnt/mine")
    await session.mount()
    await session.serve()
    """

    def __init__(
        self,
        filesystem: FileSystem,
        mountpoint: str,
        options: MountOptions | None = None,
        *,
        settings: Settings | None = None,
        trace: TextIO | None = None,
    ) -> None:
        self.filesystem = filesystem
        self.mountpoint = os.path.realpath(mountpoint)
        self.options = options or MountOptions()
        self.settings = settings or Settings()
        self._trace = Trace(trace) if trace is not None else None
        self._transport: Transport | None = None
        self._dispatcher: Dispatcher | None = None
        self.agreement: Agreement | None = None
        self.notifier: Notifier | None = None
        """Sends notifications to the kernel while the mount lives."""

    @property
    def transport(self) -> str:
        """What carries the requests of the mount, "device", "clones" or "uring"; empty before there is one."""
        return self._transport.used if self._transport is not None else ""

    @property
    def transport_fallback(self) -> str:
        """Why that is the device although the settings ask for another; empty otherwise."""
        return self._transport.fallback if self._transport is not None else ""

    async def mount(self) -> None:
        """Returns when the mount is there and INIT is agreed. ``OSError`` with a text that says why not; nothing is
        left mounted then."""
        await self.filesystem.start()
        try:
            await self._mount()
        except BaseException:
            await self.filesystem.destroy()
            raise

    async def _mount(self) -> None:
        if privileged():
            device = Device.open()
            transport = Transport(device, self.settings)
            try:
                exchange = _InitExchange(transport, self.filesystem, self.settings, self.options)
                agreement = await asyncio.to_thread(self._mount_directly, device, exchange)
            except BaseException:
                transport.close()
                raise
        else:
            device = Device(await asyncio.to_thread(mount_by_helper, self.mountpoint, self.options))
            transport = Transport(device, self.settings)
            exchange = _InitExchange(transport, self.filesystem, self.settings, self.options)
            try:
                agreement = await asyncio.to_thread(exchange.run)
            except BaseException:
                transport.close()
                with contextlib.suppress(FuseError):  # somebody may have unmounted it already
                    await asyncio.to_thread(unmount, self.mountpoint, lazy=True)
                raise
        self._transport, self.agreement = transport, agreement
        try:
            self._begin(transport, agreement)
            await asyncio.to_thread(raise_read_ahead, self.mountpoint, agreement.max_readahead)
        except BaseException:
            if self._dispatcher is not None:
                self._dispatcher.end(errno.ENODEV)
            with contextlib.suppress(FuseError):
                await asyncio.to_thread(unmount, self.mountpoint, lazy=True)
            transport.close()
            raise

    def _begin(self, transport: Transport, agreement: Agreement) -> None:
        """Serve from here on."""
        for flag, why in agreement.refused.items():
            log.debug("INIT: no %s: %s", flag.name, why)
        loop = asyncio.get_running_loop()
        channels = transport.open(agreement, loop)
        log.debug("%s: transport: %s", self.mountpoint, transport.used)
        self.notifier = Notifier(transport.device, agreement)
        backing = BackingFiles(transport.device) if agreement.flags & InitFlag.PASSTHROUGH else None
        self._dispatcher = Dispatcher(
            channels, self.filesystem, agreement, self.settings, loop, self.notifier, backing, self._trace
        )
        self._dispatcher.start()

    def _mount_directly(self, device: Device, exchange: _InitExchange) -> Agreement:
        if not device.synchronous_init():
            mount_device(device.fd, self.mountpoint, self.options)
            try:
                return exchange.run()
            except BaseException:
                with contextlib.suppress(FuseError):
                    unmount(self.mountpoint, lazy=True)
                raise
        thread = threading.Thread(target=exchange.run_quietly, name="rawfuse-init", daemon=True)
        thread.start()
        try:
            mount_device(device.fd, self.mountpoint, self.options)
        except FuseError:
            exchange.cancelled = True
            while thread.is_alive():
                # It sleeps in read until the device is mounted, which it never will be.
                lib.rawfuse_interrupt(thread.ident)
                thread.join(_JOIN)
            if exchange.error is not None:
                raise exchange.error from None
            raise
        thread.join()
        assert exchange.agreement is not None
        return exchange.agreement

    async def serve(self) -> None:
        """Returns when the file system has been unmounted, from here or outside, or its connection was aborted; then
        all handlers have ended and ``FileSystem.destroy`` has run."""
        dispatcher, transport = self._dispatcher, self._transport
        if dispatcher is None or transport is None:
            raise RuntimeError("mount first")
        try:
            await dispatcher.ended
        finally:
            try:
                if self.notifier is not None:
                    await self.notifier.close()
                await dispatcher.drained()
                await self.filesystem.destroy()
            finally:
                transport.close()

    async def unmount(self, *, lazy: bool = False) -> None:
        """Unmount; ``serve`` returns afterwards. EBUSY while files are open. ``lazy``: detach at once and end the
        connection; programs that still have files open get ENOTCONN from then on."""
        await asyncio.to_thread(unmount, self.mountpoint, lazy=lazy)
        if lazy and self._dispatcher is not None and self.notifier is not None:
            await self.notifier.close()
            self._dispatcher.end(errno.ENODEV)


class _InitExchange:
    """INIT, read and answered with blocking calls in a thread, before the event loop takes the device over."""

    def __init__(self, transport: Transport, filesystem: FileSystem, settings: Settings, options: MountOptions) -> None:
        self._device = transport.device
        self._ring_stands = transport.ring_stands
        self._filesystem = filesystem
        self._settings = settings
        self._default_permissions = options.default_permissions
        self._buffer = RequestBuffer(_INIT_BUFFER)
        self.cancelled = False
        self.agreement: Agreement | None = None
        self.error: FuseError | None = None

    def run_quietly(self) -> None:
        try:
            self.run()
        except FuseError as error:
            if error.errno != errno.EINTR:
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
        except FuseError as error:
            self._send(OutMessage(init.unique, error=-(error.errno or errno.EPROTO)))
            raise
        self._send(OutMessage(init.unique, [encode_init(agreement, self._settings)]))
        self.agreement = agreement

    def _send(self, message: OutMessage) -> None:
        sent = self._device.write(message.buffers)
        if sent < 0:
            raise FuseError(-sent, f"the kernel refused the INIT reply: {os.strerror(-sent)}")
