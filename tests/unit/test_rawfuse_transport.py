"""Choosing a transport, as far as it can be told without a mount."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.hello import Hello
from rawfuse import FuseError, InitFlag, Session, Settings, transport, uring
from rawfuse.channel import DeviceChannel
from rawfuse.device import Device
from rawfuse.negotiate import PAGE, Agreement
from rawfuse.transport import Transport
from rawfuse.uring import LEAST_PAYLOAD, Ring


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device.open()
    yield device
    device.close()


@pytest.mark.parametrize(
    ("text", "count"), [("0\n", 1), ("0-1\n", 2), ("0-3,8-11\n", 8), ("0,2,4-5\n", 4), ("0-255\n", 256)]
)
def test_possible_cpus(text: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "possible").write_text(text)
    monkeypatch.setattr(uring, "_POSSIBLE", tmp_path / "possible")
    assert uring.possible_cpus() == count


class TestRing:
    def test_requests_must_fit(self, device: Device) -> None:
        with pytest.raises(FuseError) as failure:
            Ring(device, LEAST_PAYLOAD - PAGE)
        assert failure.value.errno == errno.EINVAL

    def test_unknown_number_of_queues(self, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(uring, "_POSSIBLE", tmp_path / "missing")
        with pytest.raises(FuseError, match="possible CPUs"):
            Ring(device, LEAST_PAYLOAD)

    def test_no_memory(self, device: Device) -> None:
        with pytest.raises(OSError) as failure:
            Ring(device, 1 << 60)
        assert failure.value.errno == errno.ENOMEM

    def test_not_mounted(self, device: Device) -> None:
        ring = Ring(device, LEAST_PAYLOAD)
        with pytest.raises(FuseError, match=r"REGISTER of queue \d+ of \d+"):
            ring.register()
        ring.close()

    def test_no_entry_holds_the_request(self, device: Device) -> None:
        ring = Ring(device, LEAST_PAYLOAD)
        assert ring.reply(2, bytes(16)) == -errno.ENOENT
        assert ring.reply(2, [bytes(16), b"data"]) == -errno.ENOENT
        ring.close()
        assert ring.reply(2, bytes(16)) == -errno.ENODEV
        ring.flush()


@pytest.mark.parametrize(
    ("offered", "refused", "enable_uring", "expected"),
    [
        (InitFlag(0), {}, True, "echo Y > "),
        (InitFlag(0), {}, False, "Linux 6.14"),
        (InitFlag.OVER_IO_URING, {InitFlag.OVER_IO_URING: "it needs INIT_EXT"}, True, "it needs INIT_EXT"),
        (InitFlag.OVER_IO_URING, {}, True, "not wanted"),
    ],
)
def test_a_ring_that_was_not_agreed_to(
    device: Device,
    offered: InitFlag,
    refused: dict[InitFlag, str],
    enable_uring: bool,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if enable_uring:
        (tmp_path / "enable_uring").touch()
    monkeypatch.setattr(transport, "_ENABLE_URING", tmp_path / "enable_uring")
    chosen = Transport(device, Settings(transport="uring"))
    assert chosen.ring_stands
    agreement = Agreement(
        45, InitFlag(0), max_write=1 << 20, max_pages=256, max_readahead=0, refused=refused, offered=offered
    )
    loop = asyncio.new_event_loop()
    (channel,) = chosen.open(agreement, loop)
    assert isinstance(channel, DeviceChannel)
    assert not chosen.ring_stands
    assert chosen.used == "device"
    assert expected in chosen.fallback
    assert expected in caplog.text
    loop.close()


def test_settings_name_a_transport() -> None:
    with pytest.raises(ValueError, match="one of device, clones, uring"):
        Settings(transport="carrier pigeon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2"):
        Settings(readers=1)


def test_nothing_is_used_before_the_mount() -> None:
    session = Session(Hello(), "/nowhere", settings=Settings(transport="uring"))
    assert session.transport == ""
    assert session.transport_fallback == ""
