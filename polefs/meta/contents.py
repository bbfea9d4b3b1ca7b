"""Contents: extents, inline bytes, segments and their live bytes, as bodies of transactions.

Invariants: the extents of a file do not overlap and end within its size; a file has inline bytes (at most INLINE_MAX,
and at most its size) or extents, never both; ``allocated`` is the sum of the extents' lengths, or the number of inline
bytes; a segment's ``live`` is the sum of the lengths of the extents that refer to it, and at 0 it is queued for
deletion.
"""

from __future__ import annotations

import errno
import logging
import stat
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from polefs.meta.errors import error
from polefs.meta.model import FILE_SIZE_MAX, INLINE_MAX, INODE_XATTR, DataCommit, Extent, Inode, Move, Segment
from polefs.meta.namespace import existing
from polefs.meta.store.base import Reader, Transaction

log = logging.getLogger(__name__)

_CHUNK = 1000
"""Extents of a removed file deleted in one transaction."""


async def extents(tx: Reader, ino: int, start: int, end: int) -> list[Extent]:
    tx.prefetch(inodes=(ino,), extents=((ino, start, end),))
    await existing(tx, ino)
    return await tx.extents(ino, start, end)


async def segments(tx: Reader, ids: Sequence[int]) -> list[Segment]:
    tx.prefetch(segments=ids)
    return [segment for id_ in ids if (segment := await tx.segment(id_)) is not None]


# Cutting and adding


def _clip(extent: Extent, start: int, end: int) -> Extent:
    """The part of an extent in ``[start, end)``; the two must overlap."""
    left = max(extent.offset, start)
    return Extent(left, min(extent.end, end) - left, extent.segment, extent.segment_offset + left - extent.offset)


async def _cut(tx: Transaction, ino: int, start: int, end: int, live: Counter[int]) -> int:
    """Make ``[start, end)`` of a file a hole. Notes the change of live bytes; returns the bytes taken away."""
    if start >= end:
        return 0
    edges = await tx.extents(ino, start, start + 1)
    if not edges or edges[0].end < end:
        edges += await tx.extents(ino, end - 1, end)
    removed = 0
    first = min(start, edges[0].offset) if edges else start
    for segment, length in await tx.delete_extents(ino, first, end):
        live[segment] -= length
        removed += length
    rest = []
    for extent in edges:
        if extent.offset < start:
            rest.append(_clip(extent, extent.offset, start))
        if extent.end > end:
            rest.append(_clip(extent, end, extent.end))
    for extent in rest:
        live[extent.segment] += extent.length
        removed -= extent.length
    if rest:
        await tx.put_extents(ino, rest)
    return removed


async def _add(tx: Transaction, inode: Inode, added: Sequence[Extent], live: Counter[int]) -> int:
    """Let extents take the place of what is there; returns the growth in bytes."""
    ino = inode.ino
    grown = 0
    for extent in added:
        if extent.offset < inode.size:
            there = await tx.extents(ino, extent.offset, extent.offset + 1)
            if there and there[0].offset == extent.offset and there[0].end == extent.end:
                # Written again in the same place: put_extents replaces the row.
                live[there[0].segment] -= extent.length
                grown -= extent.length
            else:
                grown -= await _cut(tx, ino, extent.offset, extent.end, live)
        live[extent.segment] += extent.length
        grown += extent.length
    if added:
        await tx.put_extents(ino, added)
    return grown


async def _settle(tx: Transaction, live: Counter[int]) -> None:
    """Write the changes of live bytes, and queue what died."""
    for segment, delta in live.items():
        if delta:
            left = await tx.add_live(segment, delta)
            if left is None:
                log.error("segment %d has no row", segment)
            elif left <= 0:
                await tx.queue_deletion(segment, time.time_ns())


def _drop_inline(inline: bytes, start: int, end: int) -> bytes:
    if end >= len(inline):
        return inline[:start]
    return inline[:start] + bytes(min(end, len(inline)) - start) + inline[end:] if start < end else inline


# Committing


async def commit_data(tx: Transaction, segments: Sequence[Segment], commits: Sequence[DataCommit]) -> None:
    referred = {extent.segment for commit in commits for extent in commit.extents}
    tx.prefetch(inodes=[commit.ino for commit in commits], lives=referred | {segment.id for segment in segments})
    new = await _check_new(tx, segments)
    for commit in commits:
        _check_commit(commit)
    for id_ in referred - new:
        # One that died meanwhile may have lost its object.
        if not await tx.live_bytes(id_):
            raise error(errno.EIO)
    for commit in commits:
        inode = await tx.inode(commit.ino)
        if inode is not None and not stat.S_ISREG(inode.mode):
            raise error(errno.EINVAL)
    if not segments and not commits:
        return
    tx.prefetch(cuts=[cut for commit in commits for cut in _cuts(commit)])
    # Segments go in without live bytes; _settle counts those that the extents below give them.
    await tx.add_segments([(segment, 0) for segment in segments])
    live: Counter[int] = Counter()
    for commit in commits:
        inode = await tx.inode(commit.ino)
        if inode is not None:
            await _commit_file(tx, inode, commit, live)
    await _settle(tx, live)
    await _bury(tx, segments, live)


async def _check_new(tx: Reader, segments: Sequence[Segment]) -> set[int]:
    """Their ids. EEXIST for one used before."""
    new = {segment.id for segment in segments}
    if len(new) != len(segments):
        raise error(errno.EEXIST)
    for id_ in new:
        if await tx.live_bytes(id_) is not None:
            raise error(errno.EEXIST)
    return new


async def _bury(tx: Transaction, segments: Iterable[Segment], live: Counter[int]) -> None:
    """Queue those of the new segments that nothing refers to."""
    for segment in segments:
        if not live[segment.id]:
            await tx.queue_deletion(segment.id, time.time_ns())


def _cuts(commit: DataCommit) -> Iterable[tuple[int, int, int]]:
    """Where the commit may take away what is there."""
    if commit.inline is not None:
        yield commit.ino, 0, FILE_SIZE_MAX
        return
    for start, end in commit.drops:
        yield commit.ino, start, end
    for extent in commit.extents:
        yield commit.ino, extent.offset, extent.end
    yield commit.ino, commit.size, FILE_SIZE_MAX


def _check_commit(commit: DataCommit) -> None:
    if not 0 <= commit.size <= FILE_SIZE_MAX or (
        commit.inline is not None and (commit.extents or len(commit.inline) > min(INLINE_MAX, commit.size))
    ):
        raise error(errno.EINVAL)
    end = 0
    for extent in sorted(commit.extents, key=lambda extent: extent.offset):
        if extent.offset < end or extent.length <= 0 or extent.segment_offset < 0 or extent.end > commit.size:
            raise error(errno.EINVAL)
        end = extent.end


async def _commit_file(tx: Transaction, inode: Inode, commit: DataCommit, live: Counter[int]) -> None:
    ino = inode.ino
    inline = inode.inline
    allocated = inode.allocated
    if commit.inline is not None or commit.extents:
        if inline is not None:
            allocated = 0
            inline = None
        elif commit.inline is not None and allocated:
            allocated -= await _cut(tx, ino, 0, FILE_SIZE_MAX, live)
    if commit.inline is not None:
        inline = commit.inline or None
        allocated = len(commit.inline)
    elif inline is not None:
        for start, end in commit.drops:
            inline = _drop_inline(inline, start, end)
        inline = inline[: commit.size] or None
        allocated = len(inline or b"")
    else:
        if allocated:
            for start, end in commit.drops:
                allocated -= await _cut(tx, ino, start, end, live)
            if commit.size < inode.size:
                allocated -= await _cut(tx, ino, commit.size, FILE_SIZE_MAX, live)
        if commit.extents:
            allocated += await _add(tx, inode, commit.extents, live)
    changed = replace(
        inode,
        size=commit.size,
        allocated=allocated,
        inline=inline,
        attr_version=inode.attr_version + 1,
        data_version=inode.data_version + 1,
    )
    if commit.mtime is not None:
        # The time of the last write, which is a change of status as well; a chmod since then has set a later ctime.
        changed.mtime = commit.mtime
        changed.ctime = max(inode.ctime, commit.mtime)
    tx.put_inode(changed)
    tx.add_usage(allocated - inode.allocated, 0)


# Cloning


async def clone_range(tx: Transaction, source: int, start: int, length: int, target: int, target_start: int) -> Inode:
    cuts = ((source, start, start + length), (target, target_start, target_start + length))
    tx.prefetch(inodes=(source, target), cuts=cuts)
    origin = await existing(tx, source)
    inode = await existing(tx, target)
    if not stat.S_ISREG(origin.mode) or not stat.S_ISREG(inode.mode):
        raise error(errno.EISDIR if stat.S_ISDIR(origin.mode) or stat.S_ISDIR(inode.mode) else errno.EINVAL)
    end = start + length
    target_end = target_start + length
    if start < 0 or length <= 0 or target_start < 0 or end > origin.size:
        raise error(errno.EINVAL)
    if source == target and start < target_end and target_start < end:
        raise error(errno.EINVAL)
    if target_end > FILE_SIZE_MAX:
        raise error(errno.EFBIG)
    size = max(inode.size, target_end)
    if origin.inline is not None or (inode.inline is not None and not target_start == 0 < inode.size <= target_end):
        return await _clone_inline(tx, origin, start, length, inode, target_start, size)
    shift = target_start - start
    shared = [
        Extent(part.offset + shift, part.length, part.segment, part.segment_offset)
        for part in (_clip(extent, start, end) for extent in await tx.extents(source, start, end))
    ]
    kept = 0 if inode.inline is not None else inode.allocated
    covered = 0
    for extent in await tx.extents(target, target_start, target_end):
        covered += _clip(extent, target_start, target_end).length
    grown = kept - covered + sum(extent.length for extent in shared) - inode.allocated
    _check_room(tx, grown)
    live: Counter[int] = Counter()
    await _cut(tx, target, target_start, target_end, live)
    await _add(tx, inode, shared, live)
    changed = _put_cloned(tx, inode, size, inode.allocated + grown, None)
    await _settle(tx, live)
    return changed


async def _clone_inline(
    tx: Transaction, origin: Inode, start: int, length: int, inode: Inode, target_start: int, size: int
) -> Inode:
    """A clone where one of the two has inline bytes: the result must be inline again."""
    old = inode.inline or b""
    if size > INLINE_MAX or (inode.inline is None and inode.allocated) or (origin.inline is None and origin.allocated):
        raise error(errno.EOPNOTSUPP)
    piece = (origin.inline or b"")[start : start + length].ljust(length, b"\0")
    inline = old[:target_start].ljust(target_start, b"\0") + piece + old[target_start + length :]
    _check_room(tx, len(inline) - inode.allocated)
    return _put_cloned(tx, inode, size, len(inline), inline or None)


def _check_room(tx: Reader, grown: int) -> None:
    usage = tx.usage()
    if grown > 0 and 0 < usage.bytes_limit < usage.bytes + grown:
        raise error(errno.ENOSPC)


def _put_cloned(tx: Transaction, inode: Inode, size: int, allocated: int, inline: bytes | None) -> Inode:
    now = time.time_ns()
    changed = replace(
        inode,
        size=size,
        allocated=allocated,
        inline=inline,
        mtime=now,
        ctime=now,
        attr_version=inode.attr_version + 1,
        data_version=inode.data_version + 1,
    )
    tx.put_inode(changed)
    tx.add_usage(allocated - inode.allocated, 0)
    return changed


# Removing


async def release_orphans(tx: Transaction, inos: Sequence[int]) -> list[int]:
    """Let go of these, and remove those with nlink 0 that no other session holds; returns those that are left for
    another transaction: each deletes ``_CHUNK`` extents of one file, or a few of many."""
    live: Counter[int] = Counter()
    left: list[int] = []
    tx.prefetch(inodes=inos)
    heads = [(ino, _CHUNK) for ino in inos if _has_extents(await tx.inode(ino))]
    tx.prefetch(heads=heads, holders=inos if tx.session.id else ())
    for position, ino in enumerate(inos):
        inode = await tx.inode(ino)
        if inode is None or inode.nlink or await _held_by_others(tx, ino):
            continue
        if inode.inline is None and inode.allocated:
            inode = await _delete_contents(tx, inode, live)
            if inode.allocated:
                left = list(inos[position:])
                break
        await _delete_inode(tx, inode)
    await _settle(tx, live)
    return left


def _has_extents(inode: Inode | None) -> bool:
    return inode is not None and not inode.nlink and inode.inline is None and inode.allocated > 0


async def _held_by_others(tx: Transaction, ino: int) -> bool:
    session = tx.session.id
    if session == 0:
        return False  # there are no others
    others = [each for each in await tx.orphan_sessions(ino) if each != session]
    if others:
        await tx.delete_orphan(ino, session)
    return bool(others)


async def _delete_contents(tx: Transaction, inode: Inode, live: Counter[int]) -> Inode:
    """Delete the first ``_CHUNK`` extents; returns the inode as it is then."""
    ino = inode.ino
    end = await tx.extent_boundary(ino, _CHUNK)
    removed = 0
    for segment, length in await tx.delete_extents(ino, 0, end):
        live[segment] -= length
        removed += length
    changed = replace(inode, allocated=inode.allocated - removed if end < FILE_SIZE_MAX else 0)
    tx.put_inode(changed)
    tx.add_usage(changed.allocated - inode.allocated, 0)
    return changed


async def _delete_inode(tx: Transaction, inode: Inode) -> None:
    ino = inode.ino
    await tx.delete_inode(ino)
    await tx.delete_orphan(ino, None)
    if stat.S_ISLNK(inode.mode):
        await tx.delete_symlink(ino)
    if inode.flags & INODE_XATTR:
        await tx.delete_xattrs(ino)
    tx.add_usage(-len(inode.inline or b""), -1)


# Garbage


async def dead_segments(tx: Reader, before: int, after: int, limit: int) -> list[int]:
    return await tx.dead_segments(before, after, limit)


async def lost_segments(tx: Reader, ids: Sequence[int]) -> list[int]:
    tx.prefetch(lives=ids)
    return [id_ for id_ in ids if await tx.live_bytes(id_) is None]


async def segment_usage(tx: Reader, after: int, limit: int) -> list[tuple[int, int, int]]:
    return await tx.segment_usage(after, limit)


async def segment_extents(tx: Reader, segment: int, limit: int) -> list[tuple[int, Extent]]:
    return await tx.segment_extents(segment, limit)


async def move_extents(tx: Transaction, segments: Sequence[Segment], moves: Sequence[Move]) -> int:
    tx.prefetch(
        lives={segment.id for segment in segments} | {move.segment for move in moves},
        cuts=[(move.ino, move.extent.offset, move.extent.end) for move in moves],
    )
    new = await _check_new(tx, segments)
    for move in moves:
        if move.extent.length <= 0 or move.offset < 0 or move.extent.segment == move.segment:
            raise error(errno.EINVAL)
    # One that died meanwhile may have lost its object.
    usable = new | {id_ for id_ in {move.segment for move in moves} - new if await tx.live_bytes(id_)}
    if not segments and not usable:
        return 0
    await tx.add_segments([(segment, 0) for segment in segments])
    live: Counter[int] = Counter()
    moved = 0
    for move in moves:
        if move.segment in usable:
            moved += await _move(tx, move, live)
    await _settle(tx, live)
    await _bury(tx, segments, live)
    return moved


async def _move(tx: Transaction, move: Move, live: Counter[int]) -> int:
    """What is still there of the extent that is to be moved, moves; returns its bytes. The inode stays as it is: its
    contents do."""
    wanted = move.extent
    moved = 0
    for extent in await tx.extents(move.ino, wanted.offset, wanted.end):
        part = _clip(extent, wanted.offset, wanted.end)
        shift = part.offset - wanted.offset
        if part.segment != wanted.segment or part.segment_offset != wanted.segment_offset + shift:
            continue
        if part == extent:
            live[part.segment] -= part.length
        else:
            await _cut(tx, move.ino, part.offset, part.end, live)
        await tx.put_extents(move.ino, [Extent(part.offset, part.length, move.segment, move.offset + shift)])
        live[move.segment] += part.length
        moved += part.length
    return moved
