"""One mounted file system: device, INIT, mount and dispatcher joined."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
from typing import TextIO

from rawfuse._kernel import lib
from rawfuse.abi import InitFlag
from rawfuse.backing import BackingFiles
from rawfuse.device import Device
from rawfuse.dispatcher import Dispatcher
from rawfuse.errors import FuseError
from rawfuse.exchange import InitExchange
from rawfuse.filesystem import FileSystem
from rawfuse.handover import MOUNTING, MOUNTPOINT, Keeper
from rawfuse.keeper import DEVICE
from rawfuse.mount import MountOptions, mount_by_helper, mount_device, privileged, raise_read_ahead, unmount
from rawfuse.negotiate import Agreement, Settings
from rawfuse.notify import RESEND, Notifier
from rawfuse.trace import Trace
from rawfuse.transport import Transport

log = logging.getLogger("rawfuse")

_JOIN = 0.05


class Session:
    """Mounts ``filesystem`` on ``mountpoint`` and serves it until it is unmounted::

    session = Session(MyFileSystem(), "/mnt/mine")
    await session.mount()
    await session.serve()

    A file system with a ``keeper`` can be handed over to another process: ``rawfuse.handover``.
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
        self.mountpoint = _place(filesystem.keeper, mountpoint)
        self.options = options or MountOptions()
        self.settings = settings or Settings()
        self._trace = Trace(trace) if trace is not None else None
        self._transport: Transport | None = None
        self._dispatcher: Dispatcher | None = None
        self.agreement: Agreement | None = None
        self.taken_over = False
        """The mount was there before, and another process has served it."""
        self.handed_over = False
        """It goes on without this process."""
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
        left mounted then. With a keeper that holds the mount already, it is taken over; where that fails, it is there
        for the next process to try."""
        keeper = self.filesystem.keeper
        try:
            await self.filesystem.start()
            try:
                transport, agreement = await self._take_over() or await self._mount()
                await self._begin(transport, agreement)
            except BaseException:
                await self.filesystem.destroy()
                raise
        except BaseException:
            if keeper is not None and keeper.has_mount:
                keeper.close()
            elif keeper is not None:
                keeper.end()
            raise

    async def _mount(self) -> tuple[Transport, Agreement]:
        if privileged():
            device = Device.open()
            transport = Transport(device, self.settings)
            try:
                return transport, await asyncio.to_thread(self._mount_directly, device, self._exchange(transport))
            except BaseException:
                transport.close()
                raise
        device = Device(await asyncio.to_thread(mount_by_helper, self.mountpoint, self.options))
        self._deposit(device, MOUNTING)
        transport = Transport(device, self.settings)
        try:
            return transport, await asyncio.to_thread(self._exchange(transport).run)
        except BaseException:
            transport.close()
            with contextlib.suppress(FuseError):  # somebody may have unmounted it already
                await asyncio.to_thread(unmount, self.mountpoint, lazy=True)
            raise

    async def _take_over(self) -> tuple[Transport, Agreement] | None:
        """None when there is no mount to be taken over."""
        keeper = self.filesystem.keeper
        if keeper is None:
            return None
        if self.settings.transport != "device":
            raise FuseError(errno.EINVAL, f"a mount with the transport {self.settings.transport} cannot be handed over")
        if not keeper.has_mount:
            return None
        kept = keeper.kept[DEVICE]
        device = Device(kept.fd)
        transport = Transport(device, self.settings)
        self.taken_over = True
        if kept.value != MOUNTING:
            return transport, Agreement.load(kept.value)
        # The process before has ended between its mount(2) and INIT, which it may have read.
        device.write(RESEND)
        try:
            return transport, await asyncio.to_thread(self._exchange(transport).run)
        except BaseException:
            transport.close()
            raise

    async def _begin(self, transport: Transport, agreement: Agreement) -> None:
        """Serve from here on."""
        self._transport, self.agreement = transport, agreement
        try:
            self._build(transport, agreement)
            await self._start(agreement)
        except BaseException:
            if self._dispatcher is not None:
                self._dispatcher.end(errno.ENODEV)
            if not self.taken_over:
                with contextlib.suppress(FuseError):
                    await asyncio.to_thread(unmount, self.mountpoint, lazy=True)
            transport.close()
            raise

    def _build(self, transport: Transport, agreement: Agreement) -> None:
        for flag, why in agreement.refused.items():
            log.debug("INIT: no %s: %s", flag.name, why)
        loop = asyncio.get_running_loop()
        channels = transport.open(agreement, loop)
        log.debug("%s: transport: %s", self.mountpoint, transport.used)
        self.notifier = Notifier(transport.device, agreement)
        keeper = self.filesystem.keeper
        backing = BackingFiles(transport.device, keeper) if agreement.flags & InitFlag.PASSTHROUGH else None
        journal = None
        if keeper is not None:
            journal = keeper.journal
            journal.keep = self.settings.max_in_flight
        self._dispatcher = Dispatcher(
            channels, self.filesystem, agreement, self.settings, loop, self.notifier, backing, journal, self._trace
        )

    async def _start(self, agreement: Agreement) -> None:
        assert self._dispatcher is not None
        if self.taken_over and self.notifier is not None:
            await self.notifier.resend()
        self._dispatcher.start()
        if self.filesystem.keeper is not None:
            self.filesystem.keeper.ready()
        await asyncio.to_thread(raise_read_ahead, self.mountpoint, agreement.max_readahead)

    def _exchange(self, transport: Transport) -> InitExchange:
        def before_reply(agreement: Agreement) -> None:
            if self.filesystem.keeper is not None and not agreement.flags & InitFlag.HAS_RESEND:
                raise FuseError(errno.EOPNOTSUPP, "handing a mount over needs HAS_RESEND (Linux 6.9)")
            self._deposit(transport.device, agreement.dump())

        return InitExchange(transport, self.filesystem, self.settings, self.options, before_reply)

    def _deposit(self, device: Device, state: bytes) -> None:
        """So that the death of this process ends neither mount nor connection."""
        if self.filesystem.keeper is not None:
            self.filesystem.keeper.put(MOUNTPOINT, os.fsencode(self.mountpoint))
            self.filesystem.keeper.put(DEVICE, state, device.fd)

    def _mount_directly(self, device: Device, exchange: InitExchange) -> Agreement:
        synchronous = device.synchronous_init()
        self._deposit(device, b"" if synchronous else MOUNTING)
        if not synchronous:
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
        all handlers have ended and ``FileSystem.destroy`` has run. Or when it has been handed over. Cancelling it is a
        lazy unmount."""
        dispatcher, transport = self._dispatcher, self._transport
        if dispatcher is None or transport is None:
            raise RuntimeError("mount first")
        try:
            await asyncio.shield(dispatcher.ended)
        except asyncio.CancelledError:
            await self._abandon(dispatcher)
            raise
        finally:
            try:
                if self.notifier is not None:
                    await self.notifier.close()
                await dispatcher.drained()
                if not self.handed_over:
                    await self.filesystem.destroy()
            finally:
                transport.close()
                if self.filesystem.keeper is not None:
                    if self.handed_over:
                        self.filesystem.keeper.close()
                    else:
                        self.filesystem.keeper.end()

    async def _abandon(self, dispatcher: Dispatcher) -> None:
        """Nobody serves it any more: it must not stay as a mount that answers nothing."""
        with contextlib.suppress(OSError):  # somebody else may have unmounted it
            await self.unmount(lazy=True)
        dispatcher.end(errno.ENODEV)

    async def hand_over(self) -> None:
        """Leave the mount to the next process; ``serve`` returns, without ``FileSystem.destroy``, when all is deposited
        that was begun. What nobody has answered then is sent to the next process again."""
        if self.filesystem.keeper is None or self._dispatcher is None:
            raise RuntimeError("only a mount with a keeper can be handed over")
        self.handed_over = True
        if self.notifier is not None:
            # One that waits for a lock needs answers to get it.
            await self.notifier.close()
        await self._dispatcher.retire()

    async def unmount(self, *, lazy: bool = False) -> None:
        """Unmount; ``serve`` returns afterwards. EBUSY while files are open. ``lazy``: detach at once and end the
        connection; programs that still have files open get ENOTCONN from then on."""
        await asyncio.to_thread(unmount, self.mountpoint, lazy=lazy)
        if lazy and self._dispatcher is not None and self.notifier is not None:
            await self.notifier.close()
            self._dispatcher.end(errno.ENODEV)


def _place(keeper: Keeper | None, mountpoint: str) -> str:
    """The mountpoint without symbolic links. Where a mount is taken over it must not be looked at: who would answer?"""
    if keeper is not None and keeper.has_mount:
        return os.fsdecode(keeper.kept[MOUNTPOINT].value)
    return os.path.realpath(mountpoint)
