"""Messages on ``/dev/fuse`` and the codecs of their structures.

A codec is derived from the compiled type in ``_structs.cdef``: names, offsets and sizes stand there alone. Request
parsing raises nothing but ``ProtocolError``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rawfuse._kernel import ffi
from rawfuse.abi import EXT_GROUPS
from rawfuse.errors import ProtocolError

Buffer = bytes | bytearray | memoryview

_FORMATS = {
    "uint8_t": "B",
    "uint16_t": "H",
    "uint32_t": "I",
    "uint64_t": "Q",
    "int32_t": "i",
    "int64_t": "q",
}
_FILLER = ("padding", "dummy", "unused", "reserved", "spare", "__spare", "__reserved")


class Codec:
    """Packs and unpacks one structure: ``fields`` are its values in order, nested structures flattened with dotted
    names, filler (padding, spare words) left out and written as zeros; ``places`` are their offsets and sizes.
    ``signed`` names unsigned fields to read and write as signed ones (times before 1970)."""

    def __init__(self, name: str, signed: Iterable[str] = ()) -> None:
        ctype = ffi.typeof(f"struct {name}")
        self.name = name
        self.size: int = ffi.sizeof(ctype)
        self._signed = frozenset(signed)
        self.fields: list[str] = []
        self.places: list[tuple[int, int]] = []
        self.format = self._layout(ctype, "", 0)
        self.struct = struct.Struct("=" + self.format)
        if self.struct.size != self.size:
            raise AssertionError(f"the codec of {name} has {self.struct.size} bytes, the structure {self.size}")
        self.pack = self.struct.pack
        self.pack_into = self.struct.pack_into
        self.unpack_from = self.struct.unpack_from

    def _layout(self, ctype: Any, prefix: str, base: int) -> str:
        text = ""
        position = 0
        for name, field in ctype.fields:
            if field.offset > position:
                text += f"{field.offset - position}x"
            text += self._field(prefix + name, field.type, base + field.offset)
            flexible = field.type.kind == "array" and field.type.length is None
            position = field.offset + (0 if flexible else ffi.sizeof(field.type))
        size = ffi.sizeof(ctype)
        return text + (f"{size - position}x" if size > position else "")

    def _field(self, name: str, ctype: Any, offset: int) -> str:
        if ctype.kind == "struct":
            return self._layout(ctype, name + ".", offset)
        if ctype.kind == "array":
            return f"{ffi.sizeof(ctype)}x" if ctype.length is not None else ""
        leaf = name.rpartition(".")[2]
        if leaf.rstrip("0123456789") in _FILLER:
            return f"{ffi.sizeof(ctype)}x"
        self.fields.append(name)
        self.places.append((offset, ffi.sizeof(ctype)))
        code = _FORMATS[ctype.cname]
        return code.lower() if name in self._signed else code


class InHeader(NamedTuple):
    """``fuse_in_header``: what every request begins with. ``uid`` and ``gid`` are the caller's fsuid and fsgid;
    ``total_extlen`` counts the 8-byte units of extensions at the end of the request."""

    length: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int


class OutHeader(NamedTuple):
    """``fuse_out_header``: what every reply and notification begins with. ``error`` is 0 or a negative errno; in a
    notification ``unique`` is 0 and ``error`` its positive code."""

    length: int
    error: int
    unique: int

    def pack(self) -> bytes:
        return OUT_HEADER.pack(self.length, self.error, self.unique)


IN_HEADER = Codec("fuse_in_header")
OUT_HEADER = Codec("fuse_out_header")
_EXT_HEADER = Codec("fuse_ext_header")
_SECCTX = Codec("fuse_secctx")
_unpack_header = IN_HEADER.unpack_from
_IN_HEADER_SIZE = IN_HEADER.size


class Extensions(NamedTuple):
    """Extensions of a create-type request: security contexts as ``(name, label)``, and the one supplementary group of
    the caller that is the parent's (``dir.c: get_create_supp_group``)."""

    security_contexts: tuple[tuple[bytes, bytes], ...] = ()
    groups: tuple[int, ...] = ()


NO_EXTENSIONS = Extensions()


class InMessage:
    """One request in a buffer, consumed from front to back: header, structures, names, payload.

    The object may be loaded again for the next request; what it hands out as ``bytes`` is a copy, what it hands out as
    ``memoryview`` lies in the buffer.
    """

    __slots__ = ("buffer", "end", "extlen", "header", "opcode", "origin", "position")

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = memoryview(buffer)
        self.position = 0
        self.end = 0

    def load(self, length: int) -> None:
        """Take the first ``length`` bytes of the buffer as a request and consume its header."""
        if length < _IN_HEADER_SIZE:
            raise ProtocolError(f"a request of {length} bytes is shorter than its header")
        told, self.opcode, unique, nodeid, uid, gid, pid, extlen = _unpack_header(self.buffer)
        self.origin = (unique, nodeid, uid, gid, pid)
        self.extlen = extlen
        if told != length:
            raise ProtocolError(f"a request of {length} bytes says it has {told}")
        self.end = length - 8 * extlen
        if self.end < _IN_HEADER_SIZE:
            raise ProtocolError(f"extensions of {8 * extlen} bytes in a request of {length}")
        self.position = _IN_HEADER_SIZE

    @property
    def in_header(self) -> InHeader:
        return InHeader(self.end + 8 * self.extlen, self.opcode, *self.origin, self.extlen)

    @property
    def left(self) -> int:
        return self.end - self.position

    def take(self, codec: Codec) -> tuple[Any, ...]:
        """The next structure's fields."""
        position = self.position
        self.position = position + codec.size
        if self.position > self.end:
            raise ProtocolError(f"no room for {codec.name} in the request")
        return codec.unpack_from(self.buffer, position)

    def name(self) -> bytes:
        """The next NUL-terminated string, without its NUL. Never empty, at least one byte."""
        text = self.text()
        if not text:
            raise ProtocolError("an empty name")
        return text

    def text(self) -> bytes:
        """The next NUL-terminated string, without its NUL; may be empty."""
        data = bytes(self.buffer[self.position : self.end])
        stop = data.find(0)
        if stop < 0:
            raise ProtocolError("a name without its NUL")
        self.position += stop + 1
        return data if stop == len(data) else data[:stop]

    def payload(self, size: int) -> memoryview:
        """Exactly ``size`` bytes, in place."""
        start = self.position
        self.position = start + size
        if self.position > self.end:
            raise ProtocolError(f"{size} bytes announced, {self.end - start} there")
        return self.buffer[start : self.position]

    def finish(self) -> None:
        """Nothing may be left."""
        if self.position != self.end:
            raise ProtocolError(f"{self.end - self.position} bytes too many")

    def extensions(self) -> Extensions:
        """The area behind the arguments (``fuse-protocol`` extensions: each record begins with its size)."""
        if not self.extlen:
            return NO_EXTENSIONS
        contexts: list[tuple[bytes, bytes]] = []
        groups: tuple[int, ...] = ()
        position, end = self.end, self.end + 8 * self.extlen
        while position < end:
            size, kind = self._record(_EXT_HEADER, position, end)
            if size < _EXT_HEADER.size or position + size > end:
                raise ProtocolError(f"an extension of {size} bytes")
            if kind == EXT_GROUPS:
                groups = self._groups(position + 8, position + size)
            elif kind < EXT_GROUPS:
                contexts += self._contexts(kind, position + 8, position + size)
            position += (size + 7) & ~7
        return Extensions(tuple(contexts), groups)

    def _record(self, codec: Codec, position: int, end: int) -> tuple[Any, ...]:
        if position + codec.size > end:
            raise ProtocolError(f"no room for {codec.name} in the extensions")
        return codec.unpack_from(self.buffer, position)

    def _groups(self, position: int, end: int) -> tuple[int, ...]:
        if position + 4 > end:
            raise ProtocolError("no room for the number of groups")
        (count,) = struct.unpack_from("=I", self.buffer, position)
        if position + 4 + 4 * count > end:
            raise ProtocolError(f"no room for {count} groups")
        return struct.unpack_from(f"={count}I", self.buffer, position + 4)

    def _contexts(self, count: int, position: int, end: int) -> list[tuple[bytes, bytes]]:
        found = []
        for _ in range(count):
            (size,) = self._record(_SECCTX, position, end)
            data = bytes(self.buffer[position + _SECCTX.size : end])
            stop = data.find(0)
            if stop < 0 or stop + 1 + size > len(data):
                raise ProtocolError("a security context beyond its record")
            found.append((data[:stop], data[stop + 1 : stop + 1 + size]))
            # Padded from the record on; the area itself stands at any offset.
            position += (_SECCTX.size + stop + 1 + size + 7) & ~7
        return found


class OutMessage:
    """A reply or notification: header and body buffers that go out in one ``writev``, never joined."""

    __slots__ = ("buffers", "length")

    def __init__(self, unique: int, body: Sequence[Buffer] = (), error: int = 0) -> None:
        self.length = OUT_HEADER.size + sum(map(len, body))
        self.buffers: list[Buffer] = [OUT_HEADER.pack(self.length, error, unique), *body]

    @property
    def out_header(self) -> OutHeader:
        return OutHeader(*OUT_HEADER.unpack_from(self.buffers[0]))
