"""The journal: what another process finds in it, however the one before has ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawfuse import FuseError, ops
from rawfuse.abi import UNIQUE_RESEND
from rawfuse.encode import empty
from rawfuse.journal import MOST, SLOT, Journal, Recorded
from rawfuse.wire import OUT_HEADER


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = Journal.create()
    yield journal
    os.close(journal.fd)


def successor(journal: Journal) -> Journal:
    """The journal as the next process sees it."""
    return Journal(journal.fd)


def reply(unique: int, body: bytes = b"") -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def test_nothing_is_known_at_first(journal: Journal) -> None:
    for known in journal, successor(journal):
        assert known.outcome(4) is None
        assert known.intended(4) is None


def test_reply_is_found_under_either_id(journal: Journal) -> None:
    journal.complete(4, reply(4, b"body"))
    recorded = successor(journal).outcome(4 | UNIQUE_RESEND)
    assert recorded is not None
    assert recorded.message(4 | UNIQUE_RESEND) == reply(4 | UNIQUE_RESEND, b"body")
    assert successor(journal).outcome(4) is not None
    assert successor(journal).outcome(6) is None


def test_note_is_found_until_the_reply_is(journal: Journal) -> None:
    journal.intend(4, b"before")
    journal.intend(6, b"")
    later = successor(journal)
    assert later.intended(4 | UNIQUE_RESEND) == b"before"
    assert later.intended(6) == b""
    assert later.outcome(4) is None
    journal.complete(4, reply(4))
    later = successor(journal)
    assert later.intended(4) is None
    assert later.outcome(4) is not None


def test_reply_of_a_successor_counts_more_than_a_note(journal: Journal) -> None:
    journal.intend(4, b"before")
    second = successor(journal)
    second.complete(4 | UNIQUE_RESEND, reply(4 | UNIQUE_RESEND))
    third = successor(journal)
    assert third.intended(4) is None
    assert third.outcome(4) is not None


def test_records_stay_while_they_may_be_asked_for(journal: Journal) -> None:
    journal.keep = 10
    for unique in range(2, 202, 2):
        journal.complete(unique, reply(unique))
    later = successor(journal)
    assert all(later.outcome(unique) for unique in range(182, 202, 2))
    assert os.fstat(journal.fd).st_size <= 11 * SLOT


def test_what_is_in_work_stays(journal: Journal) -> None:
    journal.keep = 4
    journal.intend(2, b"slow")
    for unique in range(4, 104, 2):
        journal.intend(unique, b"quick")
        journal.complete(unique, reply(unique))
    assert successor(journal).intended(2) == b"slow"
    assert os.fstat(journal.fd).st_size <= 7 * SLOT


def test_failed_requests_leave_no_slot_behind(journal: Journal) -> None:
    journal.keep = 4
    for unique in range(2, 102, 2):
        journal.intend(unique, b"vain")
        journal.abandon(unique)
    assert os.fstat(journal.fd).st_size <= 6 * SLOT


def test_inherited_slots_are_used_again(journal: Journal) -> None:
    journal.keep = 4
    for generation in range(20):
        unique = 2 + 2 * generation
        journal.intend(unique, b"note")
        journal.complete(unique, reply(unique))
        journal = successor(journal)
        journal.keep = 4
    assert os.fstat(journal.fd).st_size <= 7 * SLOT


@pytest.mark.parametrize("size", [0, 1, MOST])
def test_sizes(journal: Journal, size: int) -> None:
    journal.intend(4, bytes(size))
    assert successor(journal).intended(4) == bytes(size)


def test_what_has_no_room(journal: Journal) -> None:
    with pytest.raises(ValueError, match=str(MOST)):
        journal.intend(4, bytes(MOST + 1))


STEPS = st.lists(st.tuples(st.sampled_from(["intend", "complete", "fail", "die"]), st.integers(0, 5)), max_size=80)


@given(STEPS, st.integers(6, 20))
def test_any_history(steps: list[tuple[str, int]], keep: int) -> None:
    """Six callers, each with one request at a time. What a process has begun or done and not answered is there for
    every later process, which answers it before anything new."""
    journal = Journal.create()
    journal.keep = keep
    requests = [2 * (caller + 1) for caller in range(6)]
    begun: dict[int, bytes] = {}
    done: dict[int, bytes] = {}
    resent: set[int] = set()

    def answer(caller: int) -> None:
        begun.pop(requests[caller], None)
        done.pop(requests[caller], None)
        resent.discard(caller)
        requests[caller] += 12

    try:
        for number, (step, caller) in enumerate(steps):
            unique, data = requests[caller], number.to_bytes(2, "little")
            if step == "die":
                journal = Journal(journal.fd)
                journal.keep = keep
                resent = {caller for caller in range(6) if requests[caller] in begun or requests[caller] in done}
                for unique in requests:
                    recorded = journal.outcome(unique)
                    assert (recorded.message(unique) if recorded else None) == done.get(unique)
                    assert journal.intended(unique) == (begun.get(unique) if unique not in done else None)
            elif resent and caller not in resent:
                continue
            elif unique in done:
                answer(caller)
            elif step == "intend":
                journal.intend(unique, data)
                begun.setdefault(unique, data)
            elif step == "fail":
                journal.abandon(unique)
                answer(caller)
            else:
                journal.complete(unique, reply(unique, data))
                done[unique] = reply(unique, data)
                if steps[number + 1 : number + 2] not in ([], [("die", 0)]):
                    answer(caller)
        assert os.fstat(journal.fd).st_size <= (keep + 8) * SLOT
    finally:
        os.close(journal.fd)


class TestGuards:
    """Around a handler and an encoder."""

    def run(self, journal: Journal, op: ops.Op, handler: Any) -> Any:
        return asyncio.run(journal.guarding(handler)(op))

    def unlink(self, unique: int) -> ops.Unlink:
        return ops.Unlink(unique, 1, 0, 0, 0, b"name")

    def test_first_time(self, journal: Journal) -> None:
        async def handler(op: ops.Op) -> None:
            journal.intend(op.unique, b"note")

        op = self.unlink(4)
        assert self.run(journal, op, handler) is None
        assert journal.recording(empty)(op, None) == reply(4)
        later = successor(journal)
        assert later.outcome(4) is not None
        assert later.intended(4) is None

    def test_sent_again_and_done_before(self, journal: Journal) -> None:
        journal.complete(4, reply(4))

        async def handler(op: ops.Op) -> None:
            raise AssertionError("executed twice")

        later, op = successor(journal), self.unlink(4 | UNIQUE_RESEND)
        result = self.run(later, op, handler)
        assert isinstance(result, Recorded)
        assert later.recording(empty)(op, result) == reply(4 | UNIQUE_RESEND)

    def test_sent_again_and_not_done(self, journal: Journal) -> None:
        journal.intend(4, b"note")
        notes = []

        async def handler(op: ops.Op) -> None:
            notes.append(later.intended(op.unique))

        later, op = successor(journal), self.unlink(4 | UNIQUE_RESEND)
        assert self.run(later, op, handler) is None
        assert notes == [b"note"]
        assert later.recording(empty)(op, None) == reply(4 | UNIQUE_RESEND)
        assert successor(journal).outcome(4) is not None

    def test_failure_is_not_recorded(self, journal: Journal) -> None:
        async def handler(op: ops.Op) -> None:
            journal.intend(op.unique, b"note")
            raise FuseError(5)

        with pytest.raises(FuseError):
            self.run(journal, self.unlink(4), handler)
        assert successor(journal).outcome(4) is None
        journal.keep = 0
        journal.complete(6, reply(6))
        assert os.fstat(journal.fd).st_size <= SLOT
