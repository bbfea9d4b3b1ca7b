"""What bodies ask the database for, and the queries that answer: one a kind for all questions of a round, and one each
for what is read in pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from enum import IntEnum, auto
from operator import attrgetter
from typing import Any, Final

import msgspec

from polefs.meta.model import FILE_SIZE_MAX, ROOT_INO, Dentry, Extent, Inode, Segment, SessionRow
from polefs.meta.store.postgres.connection import Connections
from polefs.meta.store.postgres.layers import ABSENT, ACL_MAX, Answers, Want
from polefs.meta.store.postgres.tables import INODE


class Kind(IntEnum):
    """What is wanted, and its arguments."""

    INODE = auto()
    """ino"""
    NAME = auto()
    """parent, name: the dentry and the inode behind it"""
    ANCESTORS = auto()
    """ino: the directory and all above it"""
    SYMLINK = auto()
    """ino"""
    XATTR = auto()
    """ino, name: that value, all names, and the small values"""
    EXTENTS = auto()
    """ino, start, end: those that overlap the range"""
    CUT = auto()
    """ino, start, end: as EXTENTS, and the live bytes of their segments"""
    HEAD = auto()
    """ino, count: the first ones, and where the one after them begins"""
    SEGMENT = auto()
    """id"""
    LIVE = auto()
    """id"""
    LIST = auto()
    """parent, after, limit"""
    LIST_PLUS = auto()
    """parent, after, limit: with the inodes"""
    FIRST = auto()
    """parent, limit: names in no order"""
    ORPHANS = auto()
    """after ino, after session, limit"""
    HOLDERS = auto()
    """ino: the sessions that hold it"""
    SESSIONS = auto()
    REPLIES = auto()
    """session"""
    DEAD = auto()
    """before, after, limit"""
    SEGMENT_USAGE = auto()
    """after, limit"""
    SEGMENT_EXTENTS = auto()
    """segment, limit"""


class Fetch:
    """Runs queries about one volume."""

    def __init__(self, connections: Connections, volume: int) -> None:
        self._fetch = connections.fetch
        self._volume = volume

    async def one(self, query: str, *arguments: Any) -> list[Any]:
        return await self._fetch(query, self._volume, *arguments)

    async def many(self, query: str, *arrays: list[Any], more: tuple[Any, ...] = ()) -> list[Any]:
        return await self._fetch(query, [self._volume] * len(arrays[0]), *arrays, *more)

    async def many_of_two(self, query: str, first: tuple[list[Any], ...], second: tuple[list[Any], ...]) -> list[Any]:
        volumes = [self._volume]
        return await self._fetch(query, volumes * len(first[0]), *first, volumes * len(second[0]), *second)


_COLUMNS: Final = ", ".join(f"i.{column}" for column in INODE.columns)

_INODES: Final = (
    f"SELECT NULL::INT8, NULL::BYTEA, NULL::INT8, NULL::INT8, NULL::INT8, {_COLUMNS}"
    " FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, ino) JOIN inode AS i ON i.volume = k.volume AND i.ino = k.ino"
)
_NAMES: Final = (
    f"SELECT d.parent, d.name, d.ino, d.kind, d.cookie, {_COLUMNS}"
    " FROM unnest($3::INT8[], $4::INT8[], $5::BYTEA[]) AS k(volume, parent, name)"
    " JOIN dentry AS d ON d.volume = k.volume AND d.parent = k.parent AND d.name = k.name"
    " LEFT JOIN inode AS i ON i.volume = d.volume AND i.ino = d.ino"
)
_INODES_AND_NAMES: Final = f"{_INODES} UNION ALL {_NAMES}"
_ANCESTORS: Final = (
    f"WITH RECURSIVE up AS (SELECT k.volume, {_COLUMNS} FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, ino)"
    " JOIN inode AS i ON i.volume = k.volume AND i.ino = k.ino"
    f" UNION SELECT i.volume, {_COLUMNS} FROM up JOIN inode AS i"
    f" ON i.volume = up.volume AND i.ino = up.parent AND up.ino <> {ROOT_INO})"
    f" SELECT {', '.join(INODE.columns)} FROM up"
)
_SYMLINKS: Final = (
    "SELECT s.ino, s.target FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, ino)"
    " JOIN symlink AS s ON s.volume = k.volume AND s.ino = k.ino"
)
_XATTRS: Final = (
    f"SELECT x.ino, x.name, CASE WHEN length(x.value) <= {ACL_MAX} THEN x.value END"
    " FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, ino)"
    " JOIN xattr AS x ON x.volume = k.volume AND x.ino = k.ino"
    " UNION ALL SELECT x.ino, x.name, x.value FROM unnest($3::INT8[], $4::INT8[], $5::BYTEA[]) AS k(volume, ino, name)"
    " JOIN xattr AS x ON x.volume = k.volume AND x.ino = k.ino AND x.name = k.name"
    f" WHERE length(x.value) > {ACL_MAX}"
)
_RANGES: Final = (
    " FROM unnest($1::INT8[], $2::INT8[], $3::INT8[], $4::INT8[], $5::INT8[]) AS k(volume, nth, ino, first, last)"
    ' JOIN extent AS e ON e.volume = k.volume AND e.ino = k.ino AND e."offset" < k.last AND e."offset" >= coalesce('
    '(SELECT max(b."offset") FROM extent AS b'
    ' WHERE b.volume = k.volume AND b.ino = k.ino AND b."offset" <= k.first), k.first)'
)
_SEGMENT: Final = " LEFT JOIN segment AS s ON s.volume = e.volume AND s.id = e.segment"
_EXTENTS: Final = f'SELECT k.nth, NULL::INT8, e."offset", e.length, e.segment, e.segment_offset{_RANGES}'
_CUTS: Final = f'SELECT k.nth, s.live, e."offset", e.length, e.segment, e.segment_offset{_RANGES}{_SEGMENT}'
_HEADS: Final = (
    'SELECT k.ino, s.live, e."offset", e.length, e.segment, e.segment_offset'
    " FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, ino) CROSS JOIN"
    ' LATERAL (SELECT x.volume, x."offset", x.length, x.segment, x.segment_offset FROM extent AS x'
    f' WHERE x.volume = k.volume AND x.ino = k.ino ORDER BY x."offset" LIMIT $3) AS e{_SEGMENT}'
)
_SEGMENTS: Final = (
    "SELECT s.id, s.size, s.frames, s.coding, s.live FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, id)"
    " JOIN segment AS s ON s.volume = k.volume AND s.id = k.id"
)
_LIVES: Final = (
    "SELECT s.id, s.live FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, id)"
    " JOIN segment AS s ON s.volume = k.volume AND s.id = k.id"
)
_LIST: Final = (
    "SELECT cookie, name, ino, kind FROM dentry WHERE volume = $1 AND parent + 0 = $2 AND cookie > $3"
    " ORDER BY cookie LIMIT $4"
)
_LIST_PLUS: Final = (
    f"SELECT d.cookie, d.name, d.ino, d.kind, {_COLUMNS} FROM (SELECT volume, cookie, name, ino, kind FROM dentry"
    " WHERE volume = $1 AND parent + 0 = $2 AND cookie > $3 ORDER BY cookie LIMIT $4) AS d"
    " LEFT JOIN inode AS i ON i.volume = d.volume AND i.ino = d.ino"
)
_FIRST: Final = "SELECT name FROM dentry WHERE volume = $1 AND parent + 0 = $2 LIMIT $3"
_ORPHANS: Final = (
    "SELECT ino, session FROM orphan WHERE volume = $1 AND (ino, session) > ($2, $3) ORDER BY ino, session LIMIT $4"
)
_HOLDERS: Final = (
    "SELECT o.ino, o.session FROM unnest($1::INT8[], $2::INT8[]) AS k(volume, ino)"
    " JOIN orphan AS o ON o.volume = k.volume AND o.ino = k.ino"
)
_SESSIONS: Final = "SELECT id, secret, read_only, info FROM session WHERE volume = $1"
_REPLIES: Final = "SELECT id, reply FROM reply WHERE volume = $1 AND session = $2"
_DEAD: Final = (
    "SELECT segment FROM deletion WHERE volume = $1 AND since <= $2 AND segment > $3 ORDER BY segment LIMIT $4"
)
_SEGMENT_USAGE: Final = "SELECT id, size, live FROM segment WHERE volume = $1 AND id > $2 ORDER BY id LIMIT $3"
_SEGMENT_EXTENTS: Final = (
    'SELECT ino, "offset", length, segment, segment_offset FROM extent WHERE volume = $1 AND segment = $2 LIMIT $3'
)

QUERIES: Final = (
    _INODES_AND_NAMES,
    _ANCESTORS,
    _SYMLINKS,
    _XATTRS,
    _EXTENTS,
    _CUTS,
    _HEADS,
    _SEGMENTS,
    _LIVES,
    _LIST,
    _LIST_PLUS,
    _FIRST,
    _ORPHANS,
    _HOLDERS,
    _SESSIONS,
    _REPLIES,
    _DEAD,
    _SEGMENT_USAGE,
    _SEGMENT_EXTENTS,
)

_offset = attrgetter("offset")
_decode_frames = msgspec.msgpack.Decoder(tuple[tuple[int, int, int], ...]).decode


def questions(wants: Iterable[Want], answers: Answers, fetch: Fetch) -> list[Awaitable[None]]:
    """What to wait for, at the same time, until ``answers`` tells all that is wanted."""
    by_kind: dict[Kind, list[Want]] = defaultdict(list)
    for want in wants:
        by_kind[want[0]].append(want[1:])
    asked: list[Awaitable[None]] = []
    if Kind.INODE in by_kind or Kind.NAME in by_kind:
        asked.append(_inodes_and_names(by_kind.pop(Kind.INODE, []), by_kind.pop(Kind.NAME, []), answers, fetch))
    for kind, arguments in by_kind.items():
        if kind in _TOGETHER:
            asked.append(_TOGETHER[kind](arguments, answers, fetch))
        else:
            asked += [_ALONE[kind](each, answers, fetch) for each in arguments]
    return asked


async def _inodes_and_names(inodes: list[Want], names: list[Want], answers: Answers, fetch: Fetch) -> None:
    inos = [ino for (ino,) in inodes]
    parents = [parent for parent, _ in names]
    rows = await fetch.many_of_two(_INODES_AND_NAMES, (inos,), (parents, [name for _, name in names]))
    answers.inodes.update(dict.fromkeys(inos))
    answers.names.update(dict.fromkeys(((parent, name) for parent, name in names), ABSENT))
    for parent, name, ino, kind, cookie, *inode in rows:
        if parent is not None:
            answers.names[parent, name] = (ino, kind, cookie)
            answers.inodes[ino] = None
        if inode[0] is not None:
            answers.inodes[inode[0]] = Inode(*inode)


async def _ancestors(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    inos = [ino for (ino,) in wants]
    for row in await fetch.many(_ANCESTORS, inos):
        answers.inodes[row[0]] = Inode(*row)
    for ino in inos:
        answers.inodes.setdefault(ino, None)


async def _symlinks(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    targets = dict(await fetch.many(_SYMLINKS, [ino for (ino,) in wants]))
    for (ino,) in wants:
        answers.other[Kind.SYMLINK, ino] = targets.get(ino)


async def _xattrs(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    inos = list({ino for ino, _ in wants})
    rows = await fetch.many_of_two(_XATTRS, (inos,), ([ino for ino, _ in wants], [name for _, name in wants]))
    for ino in inos:
        answers.xattrs[ino] = {}
    for ino, name, value in rows:
        if value is not None or name not in answers.xattrs[ino]:
            answers.xattrs[ino][name] = value


async def _extents(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    await _ranges(_EXTENTS, wants, answers, fetch)


async def _cuts(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    await _ranges(_CUTS, wants, answers, fetch)


async def _ranges(query: str, wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    rows = await fetch.many(query, list(range(len(wants))), *map(list, zip(*wants, strict=True)))
    found: list[list[Extent]] = [[] for _ in wants]
    for nth, live, *row in rows:
        extent = Extent(*row)
        found[nth].append(extent)
        if live is not None:
            answers.lives[extent.segment] = live
    for (ino, start, end), extents in zip(wants, found, strict=True):
        extents.sort(key=_offset)
        if extents and extents[0].end <= start:
            del extents[0]
        # Extents do not overlap: where one is, nothing else is.
        first = min(start, extents[0].offset) if extents else start
        last = max(end, extents[-1].end) if extents else end
        answers.extents.setdefault(ino, []).append((first, last, extents))


async def _heads(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    count = max(count for _, count in wants)
    found: dict[int, list[Extent]] = {ino: [] for ino, _ in wants}
    for ino, live, *row in await fetch.many(_HEADS, list(found), more=(count + 1,)):
        extent = Extent(*row)
        found[ino].append(extent)
        if live is not None:
            answers.lives[extent.segment] = live
    for ino, wanted in wants:
        extents = sorted(found[ino], key=_offset)
        boundary = extents[wanted].offset if len(extents) > wanted else FILE_SIZE_MAX
        answers.other[Kind.HEAD, ino, wanted] = boundary
        answers.extents.setdefault(ino, []).append((0, boundary, extents[:wanted]))


async def _segments(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    answers.other.update(dict.fromkeys((Kind.SEGMENT, id_) for (id_,) in wants))
    for id_, size, frames, coding, live in await fetch.many(_SEGMENTS, [id_ for (id_,) in wants]):
        answers.other[Kind.SEGMENT, id_] = Segment(id_, size, _decode_frames(frames), coding)
        answers.lives[id_] = live


async def _lives(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    ids = [id_ for (id_,) in wants]
    answers.lives.update(dict.fromkeys(ids))
    answers.lives.update(dict(await fetch.many(_LIVES, ids)))


async def _list(want: Want, answers: Answers, fetch: Fetch) -> None:
    dentries = [Dentry(*row) for row in await fetch.one(_LIST, *want)]
    answers.other[Kind.LIST, *want] = dentries


async def _list_plus(want: Want, answers: Answers, fetch: Fetch) -> None:
    dentries = []
    # In no order that the query promises: a nested loop keeps that of the names, but nothing says that it is one.
    for row in await fetch.one(_LIST_PLUS, *want):
        dentry = Dentry(*row[:4])
        dentries.append(dentry)
        answers.names[want[0], dentry.name] = (dentry.ino, dentry.kind, dentry.cookie)
        answers.inodes[dentry.ino] = None if row[4] is None else Inode(*row[4:])
    dentries.sort(key=lambda dentry: dentry.cookie)
    answers.other[Kind.LIST_PLUS, *want] = dentries


async def _column(query: str, kind: Kind, want: Want, answers: Answers, fetch: Fetch) -> None:
    answers.other[kind, *want] = [row[0] for row in await fetch.one(query, *want)]


async def _first(want: Want, answers: Answers, fetch: Fetch) -> None:
    await _column(_FIRST, Kind.FIRST, want, answers, fetch)


async def _orphans(want: Want, answers: Answers, fetch: Fetch) -> None:
    answers.other[Kind.ORPHANS, *want] = [tuple(row) for row in await fetch.one(_ORPHANS, *want)]


async def _holders(wants: list[Want], answers: Answers, fetch: Fetch) -> None:
    inos = [ino for (ino,) in wants]
    found: dict[int, list[int]] = {ino: [] for ino in inos}
    for ino, session in await fetch.many(_HOLDERS, inos):
        found[ino].append(session)
    answers.other.update(((Kind.HOLDERS, ino), sessions) for ino, sessions in found.items())


async def _sessions(want: Want, answers: Answers, fetch: Fetch) -> None:
    answers.other[(Kind.SESSIONS,)] = [
        SessionRow(id_, secret, bool(read_only), info.decode())
        for id_, secret, read_only, info in await fetch.one(_SESSIONS)
    ]


async def _replies(want: Want, answers: Answers, fetch: Fetch) -> None:
    answers.other[Kind.REPLIES, *want] = [tuple(row) for row in await fetch.one(_REPLIES, *want)]


async def _dead(want: Want, answers: Answers, fetch: Fetch) -> None:
    await _column(_DEAD, Kind.DEAD, want, answers, fetch)


async def _segment_usage(want: Want, answers: Answers, fetch: Fetch) -> None:
    answers.other[Kind.SEGMENT_USAGE, *want] = [tuple(row) for row in await fetch.one(_SEGMENT_USAGE, *want)]


async def _segment_extents(want: Want, answers: Answers, fetch: Fetch) -> None:
    rows = await fetch.one(_SEGMENT_EXTENTS, *want)
    answers.other[Kind.SEGMENT_EXTENTS, *want] = [(ino, Extent(*row)) for ino, *row in rows]


_TOGETHER: Final[dict[Kind, Callable[[list[Want], Answers, Fetch], Awaitable[None]]]] = {
    Kind.ANCESTORS: _ancestors,
    Kind.SYMLINK: _symlinks,
    Kind.XATTR: _xattrs,
    Kind.EXTENTS: _extents,
    Kind.CUT: _cuts,
    Kind.HEAD: _heads,
    Kind.HOLDERS: _holders,
    Kind.SEGMENT: _segments,
    Kind.LIVE: _lives,
}
_ALONE: Final[dict[Kind, Callable[[Want, Answers, Fetch], Awaitable[None]]]] = {
    Kind.LIST: _list,
    Kind.LIST_PLUS: _list_plus,
    Kind.FIRST: _first,
    Kind.ORPHANS: _orphans,
    Kind.SESSIONS: _sessions,
    Kind.REPLIES: _replies,
    Kind.DEAD: _dead,
    Kind.SEGMENT_USAGE: _segment_usage,
    Kind.SEGMENT_EXTENTS: _segment_extents,
}
