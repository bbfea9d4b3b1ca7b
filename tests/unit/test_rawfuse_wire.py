"""Messages: headers, names, payloads, extensions, and what is malformed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawfuse.errors import ProtocolError
from rawfuse.wire import NO_EXTENSIONS, Buffer, Codec, Extensions, InHeader, InMessage, OutHeader, OutMessage
from tests.unit.rawfuse_helpers import GID, HEADER, NODEID, PID, UID, UNIQUE, loaded, request


def with_extensions(area: bytes) -> Extensions:
    return loaded(request(9, b"name\0", extensions=area)).extensions()


def context_record(*contexts: tuple[bytes, bytes], count: int | None = None) -> bytes:
    body = b""
    for name, label in contexts:
        one = struct.pack("=II", len(label), 0) + name + b"\0" + label
        body += one.ljust(-(-len(one) // 8) * 8, b"\0")
    return struct.pack("=II", 8 + len(body), len(contexts) if count is None else count) + body


def groups_record(*groups: int) -> bytes:
    body = struct.pack(f"=I{len(groups)}I", len(groups), *groups)
    return struct.pack("=II", 8 + len(body), 32) + body


def padded(record: bytes) -> bytes:
    return record.ljust(-(-len(record) // 8) * 8, b"\0")


class TestInMessage:
    def test_header(self) -> None:
        message = loaded(request(9, b"name\0", extensions=bytes(16)))
        assert message.in_header == InHeader(40 + 5 + 16, 9, UNIQUE, NODEID, UID, GID, PID, 2)
        assert message.left == 5

    def test_consumes_from_front_to_back(self) -> None:
        message = loaded(request(21, struct.pack("=II", 3, 4) + b"one\0\0payload"))
        assert message.take(Codec("fuse_getxattr_in")) == (3,)
        assert message.name() == b"one"
        assert message.text() == b""
        assert bytes(message.payload(7)) == b"payload"
        message.finish()

    def test_is_loaded_again(self) -> None:
        """The request that was read before, longer than this one, must not shine through."""
        buffer = bytearray(4096)
        message = InMessage(buffer)
        for name in (b"a long name before", b"b"):
            data = request(1, name + b"\0")
            buffer[: len(data)] = data
            message.load(len(data))
            assert message.name() == name
            message.finish()

    def test_names_are_copies_and_payloads_are_not(self) -> None:
        buffer = bytearray(request(1, b"name\0data"))
        message = InMessage(buffer)
        message.load(len(buffer))
        name, payload = message.name(), message.payload(4)
        buffer[40:] = bytes(9)
        assert name == b"name"
        assert bytes(payload) == bytes(4)

    @pytest.mark.parametrize("length", [0, 1, 39])
    def test_shorter_than_a_header(self, length: int) -> None:
        with pytest.raises(ProtocolError):
            InMessage(bytes(64)).load(length)

    @pytest.mark.parametrize("told", [0, 40, 44, 46, 2**32 - 1])
    def test_length_that_is_not_true(self, told: int) -> None:
        data = HEADER.pack(told, 1, 2, 1, 0, 0, 0, 0, 0) + b"name\0"
        with pytest.raises(ProtocolError):
            loaded(data)

    def test_extensions_longer_than_the_request(self) -> None:
        data = HEADER.pack(45, 1, 2, 1, 0, 0, 0, 1, 0) + b"name\0"
        with pytest.raises(ProtocolError):
            loaded(data)

    @pytest.mark.parametrize("body", [b"", b"name", b"\0"])
    def test_bad_names(self, body: bytes) -> None:
        with pytest.raises(ProtocolError):
            loaded(request(1, body)).name()

    def test_payload_and_structure_beyond_the_end(self) -> None:
        with pytest.raises(ProtocolError):
            loaded(request(1, b"1234")).payload(5)
        with pytest.raises(ProtocolError):
            loaded(request(1, b"1234")).take(Codec("fuse_open_in"))

    def test_nothing_of_the_extensions_is_taken_for_arguments(self) -> None:
        message = loaded(request(6, b"new\0target", extensions=b"\0" * 8))
        message.name()
        with pytest.raises(ProtocolError):
            message.text()

    def test_rest_behind_the_arguments(self) -> None:
        message = loaded(request(1, b"name\0x"))
        message.name()
        with pytest.raises(ProtocolError):
            message.finish()


class TestExtensions:
    def test_none(self) -> None:
        assert loaded(request(9, b"name\0")).extensions() is NO_EXTENSIONS

    def test_empty_security_context(self) -> None:
        """What the kernel sends when no security module labels the file: seen on 6.18."""
        assert with_extensions(bytes.fromhex("0800000000000000")) == Extensions()

    def test_security_contexts(self) -> None:
        contexts = ((b"security.selinux", b"system_u:object_r:tmp_t:s0\0"), (b"security.other", b""))
        assert with_extensions(context_record(*contexts)) == Extensions(contexts)

    def test_groups(self) -> None:
        assert with_extensions(groups_record(50)) == Extensions((), (50,))
        assert with_extensions(padded(groups_record(1, 2, 3))) == Extensions((), (1, 2, 3))
        assert with_extensions(padded(groups_record())) == Extensions((), ())

    def test_both(self) -> None:
        area = context_record((b"security.selinux", b"label")) + groups_record(50)
        assert with_extensions(area) == Extensions(((b"security.selinux", b"label"),), (50,))

    def test_unknown_kinds_are_passed_over(self) -> None:
        area = struct.pack("=IIQ", 16, 33, 5) + groups_record(50)
        assert with_extensions(area) == Extensions((), (50,))

    @pytest.mark.parametrize(
        "area",
        [
            struct.pack("=II", 0, 0),
            struct.pack("=II", 7, 0),
            struct.pack("=II", 16, 0),
            struct.pack("=II", 8, 32),
            struct.pack("=IIII", 16, 32, 2, 5),
            struct.pack("=IIII", 16, 32, 2**32 - 1, 5),
            context_record(count=1),
            context_record((b"a", b"b"), count=2),
            struct.pack("=IIII", 24, 1, 100, 0) + b"name\0lab",
            struct.pack("=IIII", 24, 1, 0, 0) + b"nameless",
        ],
    )
    def test_malformed(self, area: bytes) -> None:
        with pytest.raises(ProtocolError):
            with_extensions(area)

    @given(st.binary(max_size=200).map(padded))
    def test_any_bytes(self, area: bytes) -> None:
        try:
            with_extensions(area)
        except ProtocolError:
            pass

    @given(
        st.lists(
            st.tuples(st.binary(min_size=1, max_size=20).filter(lambda name: 0 not in name), st.binary()), max_size=5
        ),
        st.lists(st.integers(0, 2**32 - 1), max_size=3),
    )
    def test_round_trip(self, contexts: list[tuple[bytes, bytes]], groups: list[int]) -> None:
        area = context_record(*contexts) + padded(groups_record(*groups))
        assert with_extensions(area) == Extensions(tuple(contexts), tuple(groups))


class TestOutMessage:
    def test_buffers_are_not_joined(self) -> None:
        body: list[Buffer] = [memoryview(b"one"), bytearray(b"three")]
        message = OutMessage(9, body)
        assert message.buffers[1:] == body
        assert message.buffers[1] is body[0]
        assert message.length == 24
        assert message.out_header == OutHeader(24, 0, 9)
        assert message.buffers[0] == OutHeader(24, 0, 9).pack() == struct.pack("=IiQ", 24, 0, 9)

    def test_error(self) -> None:
        assert OutMessage(9, error=-2).buffers == [struct.pack("=IiQ", 16, -2, 9)]
