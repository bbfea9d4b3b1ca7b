"""Finding what has changed in a file: ``polefs.data.changes``."""

from __future__ import annotations

import os
import random
from pathlib import Path

import google_crc32c
import pytest

from polefs.data.cache.rangeset import Range
from polefs.data.changes import FRAME, Known, Snapshot
from polefs.data.replica import Replica

BLOCK = 4096


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    return Replica(str(tmp_path), 1, 1, create=True)


def size_of(replica: Replica) -> int:
    return os.fstat(replica.fd).st_size


def commit(replica: Replica, known: Known, data: list[Range], holes: list[Range], target: bytearray) -> None:
    """Write back, into ``target``: what is found out by that is all that is known."""
    size = size_of(replica)
    snapshot = Snapshot(replica)
    known.forget(data)
    known.forget(holes)
    for start, end in holes:
        target[start:end] = bytes(end - start)
    del target[size:]
    target.extend(bytes(size - len(target)))
    for start, end in data:
        target[start:end] = snapshot.read(start, end - start)
    known.note(snapshot.frames(), holes, size)


def test_a_new_file_is_all_changed_and_then_nothing(replica: Replica) -> None:
    known = Known()
    os.pwrite(replica.fd, b"x" * (3 * FRAME + 5), 0)
    data, holes = known.compare(replica.fd, size_of(replica))
    assert (data[0][0], data[-1][1], holes) == (0, 3 * FRAME + 5, [])
    target = bytearray()
    commit(replica, known, data, holes, target)
    assert known.compare(replica.fd, size_of(replica)) == ([], [])
    os.pwrite(replica.fd, b"y", FRAME + 77)
    assert known.compare(replica.fd, size_of(replica)) == ([(FRAME, 2 * FRAME)], [])


def test_a_file_that_is_known_as_it_is(replica: Replica) -> None:
    os.pwrite(replica.fd, b"x" * FRAME, 5 * FRAME)
    known = Known.of(replica.fd)
    assert known.compare(replica.fd, size_of(replica)) == ([], [])


def test_records_with_their_own_checksum(replica: Replica) -> None:
    """The CRC of whole records that end with theirs does not depend on what is in them."""

    def record(text: bytes) -> bytes:
        body = text * 124
        return body + int(google_crc32c.value(body)).to_bytes(4, "little")

    one, other = (b"".join(record(text) for _ in range(FRAME // 500)) for text in (b"abcd", b"wxyz"))
    assert google_crc32c.value(one) == google_crc32c.value(other)
    os.pwrite(replica.fd, one, 0)
    known = Known.of(replica.fd)
    os.pwrite(replica.fd, other, 0)
    assert known.compare(replica.fd, len(other))[0]


def test_what_failed_is_not_known(replica: Replica) -> None:
    os.pwrite(replica.fd, b"x" * FRAME, 0)
    known = Known.of(replica.fd)
    known.forget([(0, 1)])
    assert known.compare(replica.fd, FRAME) == ([(0, FRAME)], [])


def test_what_was_read_counts_not_what_is_there_now(replica: Replica) -> None:
    known = Known()
    os.pwrite(replica.fd, b"a" * FRAME, 0)
    data, holes = known.compare(replica.fd, FRAME)
    os.pwrite(replica.fd, b"b", 0)  # before it is read
    target = bytearray()
    commit(replica, known, data, holes, target)
    os.pwrite(replica.fd, b"a", 0)
    assert known.compare(replica.fd, FRAME)[0] == [(0, FRAME)]


@pytest.mark.parametrize("seed", range(20))
def test_random_changes(replica: Replica, seed: int) -> None:
    from polefs.objects.localio import punch_hole

    randoms = random.Random(seed)
    known = Known()
    target = bytearray()
    for _ in range(40):
        for _ in range(randoms.randrange(4)):
            offset = randoms.randrange(6 * FRAME)
            match randoms.randrange(4):
                case 0 | 1:
                    os.pwrite(replica.fd, randoms.randbytes(randoms.choice((1, 5000, FRAME))), offset)
                case 2:
                    os.ftruncate(replica.fd, offset)
                case _:
                    punch_hole(replica.fd, offset & -BLOCK, randoms.choice((BLOCK, FRAME, 2 * FRAME)))
        data, holes = known.compare(replica.fd, size_of(replica))
        commit(replica, known, data, holes, target)
        assert target == os.pread(replica.fd, 10 * FRAME, 0)
        assert known.compare(replica.fd, size_of(replica)) == ([], [])
