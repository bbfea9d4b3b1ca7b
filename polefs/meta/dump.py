"""The format of a dump: all metadata of a volume as one stream, whatever store it comes from or goes to.

::

    polefs dump 1\n                          the format's version
    <length> <CRC-32C> <payload>             a block, any number of times; numbers: 32 bits, little-endian

A payload is a zstd frame of one MessagePack map with the key ``block``: ``header`` (one, the first), ``rows`` (of one
table; the tables come in the order of ``store/tables.py``, rows by primary key), ``end`` (one, the last: how many rows
each table has). The checksum begins with the block's position, so no block can be left out, repeated or moved. A dump
without its end is damaged.

There are no contents of files in it but those that stand in inode rows, and no credentials; the key of an encrypted
volume is wrapped, as it is in the volume.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Final

import google_crc32c
import msgspec
import zstandard

from polefs import __version__
from polefs.meta.store.tables import TABLES, Row, Table, VolumeState

VERSION: Final = 1
"""Of the format that this software writes; it reads no newer one."""

_MAGIC: Final = b"polefs dump "
_MAGIC_MAX: Final = 32
_BLOCK: Final = struct.Struct("<II")

_ROWS: Final = 4096
_BYTES: Final = 1 << 20
"""A block has at most so many rows, and blobs of about so many bytes."""

_PAYLOAD_MAX: Final = 64 << 20


class Header(msgspec.Struct, frozen=True, kw_only=True, tag="header", tag_field="block"):
    """``contents``: where and how the volume keeps the contents of files, in JSON; the store does not look into it.
    ``made``: when, nanoseconds since the epoch; ``by``: the version of polefs."""

    volume: VolumeState
    contents: str
    made: int
    by: str = __version__


class Rows(msgspec.Struct, frozen=True, tag="rows", tag_field="block"):
    table: str
    rows: msgspec.Raw


class End(msgspec.Struct, frozen=True, tag="end", tag_field="block"):
    counts: dict[str, int]


class DumpError(OSError):
    """EINVAL: a dump cannot be read; one line that says why and what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EINVAL, text)


_DECODER: Final = msgspec.msgpack.Decoder(Header | Rows | End)
_TABLES: Final = {table.name: table for table in TABLES}
_ROW_DECODERS: Final = {
    table.name: msgspec.msgpack.Decoder(list[table.row])  # type: ignore[name-defined]
    for table in TABLES
}


class DumpWriter:
    """Writes a dump to a stream. What the stream raises comes through."""

    def __init__(self, stream: BinaryIO, header: Header) -> None:
        self.header = header
        self._stream = stream
        self._encoder = msgspec.msgpack.Encoder()
        self._compressor = zstandard.ZstdCompressor(level=3)
        self.counts = dict.fromkeys(_TABLES, 0)
        """Rows so far."""
        self.position = 0
        """Bytes so far."""
        self._write(_MAGIC + b"%d\n" % VERSION)
        self._put(header)

    def rows(self, table: Table, rows: Iterable[Row]) -> None:
        """Rows of one table."""
        page: list[Row] = []
        size = 0
        for row in rows:
            page.append(row)
            size += _size(row)
            if len(page) >= _ROWS or size >= _BYTES:
                self._put_rows(table, page)
                page, size = [], 0
        if page:
            self._put_rows(table, page)

    def end(self) -> None:
        self._put(End(self.counts))
        self._stream.flush()

    def _put_rows(self, table: Table, page: list[Row]) -> None:
        self._put(Rows(table.name, msgspec.Raw(self._encoder.encode(page))))
        self.counts[table.name] += len(page)

    def _put(self, block: Header | Rows | End) -> None:
        payload = self._compressor.compress(self._encoder.encode(block))
        self._write(_BLOCK.pack(len(payload), _check(self.position, payload)) + payload)

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self.position += len(data)


class DumpReader:
    """Reads a dump from a stream: the header at once, the rest as ``pages`` is consumed. ``DumpError``, or what the
    stream raises."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decompressor = zstandard.ZstdDecompressor()
        self.counts = dict.fromkeys(_TABLES, 0)
        """Rows so far."""
        self.position = 0
        """Bytes so far."""
        self._read_version()
        header = self._get()
        if not isinstance(header, Header):
            raise self._damaged(self.position)
        self.header = header

    def pages(self) -> Iterator[tuple[Table, list[Row]]]:
        """All rows, some at a time. They are known to be all of them, and whole, only when this ends."""
        order = iter(_TABLES)
        current = next(order)
        while True:
            start = self.position
            block = self._get()
            if isinstance(block, End):
                break
            if not isinstance(block, Rows):
                raise self._damaged(start)
            while current != block.table:
                following = next(order, None)
                if following is None:
                    raise self._damaged(start)
                current = following
            try:
                rows: list[Any] = _ROW_DECODERS[current].decode(block.rows)
            except (msgspec.DecodeError, ValueError):
                raise self._damaged(start) from None
            self.counts[current] += len(rows)
            yield _TABLES[current], rows
        if block.counts != self.counts:
            raise self._damaged(start)
        if self._stream.read(1):
            raise DumpError(f"something follows the dump at byte {self.position}: give the dump alone")

    def _read_version(self) -> None:
        line = self._stream.readline(_MAGIC_MAX)
        self.position = len(line)
        number = line.removeprefix(_MAGIC).removesuffix(b"\n")
        if not line.startswith(_MAGIC) or not line.endswith(b"\n") or not number.isdigit():
            raise DumpError("this is no dump of a volume: give what polefs dump has written")
        if int(number) > VERSION:
            raise DumpError(
                f"the dump has format {int(number)}, this polefs reads up to {VERSION}: upgrade polefs, or make the "
                "dump with this version"
            )
        if int(number) < VERSION:
            raise DumpError(f"the dump has the unknown format {int(number)}: make it anew")

    def _get(self) -> Header | Rows | End:
        start = self.position
        length, check = _BLOCK.unpack(self._read(_BLOCK.size))
        if not 0 < length <= _PAYLOAD_MAX:
            raise self._damaged(start)
        payload = self._read(length)
        if _check(start, payload) != check:
            raise self._damaged(start)
        try:
            if not 0 <= zstandard.frame_content_size(payload) <= _PAYLOAD_MAX:
                raise self._damaged(start)
            block: Header | Rows | End = _DECODER.decode(self._decompressor.decompress(payload))
        except (zstandard.ZstdError, msgspec.DecodeError, ValueError):
            raise self._damaged(start) from None
        return block

    def _read(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) < length:
            where = self.position + len(data)
            raise DumpError(f"the dump ends at byte {where}, before its end: take another copy, or make it anew")
        self.position += length
        return data

    @staticmethod
    def _damaged(where: int) -> DumpError:
        return DumpError(f"the dump is damaged at byte {where}: take another copy, or make it anew")


def _check(position: int, payload: bytes) -> int:
    seed = google_crc32c.value(position.to_bytes(8, "little"))
    return int(google_crc32c.extend(seed, payload))


def _size(row: Row) -> int:
    return sum(len(value) for value in row if isinstance(value, bytes))
