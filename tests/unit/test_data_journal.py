"""The journal: what is read back is what was appended, whatever else lies in the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polefs.data.journal import HEADER_SIZE, SPARE_NAME, Journal, Kind, Record, journal_number, read_journal

NUMBERS = st.integers(0, 2**62)
records = st.builds(
    Record,
    st.sampled_from(list(Kind)),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.integers(-(2**62), 2**62),
    st.binary(max_size=300),
    st.just(0),
)


def read(path: str, number: int) -> list[Record]:
    return [record._replace(end=0) for record in read_journal(path, number)]


def make(path: Path, number: int, content: list[Record]) -> Journal:
    journal = Journal(str(path), number)
    for record in content:
        journal.append(*record[:-1])
    return journal


@settings(max_examples=50, deadline=None)
@given(st.lists(records, max_size=20))
def test_records_come_back(tmp_path_factory: pytest.TempPathFactory, content: list[Record]) -> None:
    path = tmp_path_factory.mktemp("journal")
    journal = make(path, 7, content)
    assert read(journal.path, 7) == content
    assert read(journal.path, 8) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(records, min_size=1, max_size=8), st.data())
def test_damage_ends_the_replay(
    tmp_path_factory: pytest.TempPathFactory, content: list[Record], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal")
    journal = Journal(str(path), 1)
    ends = []
    for record in content:
        journal.append(*record[:-1])
        ends.append(journal.end)
    at = data.draw(st.integers(HEADER_SIZE, journal.end - 1))
    whole = bytearray(Path(journal.path).read_bytes())
    if data.draw(st.booleans()):
        del whole[at:]
    else:
        whole[at] ^= data.draw(st.integers(1, 255))
    Path(journal.path).write_bytes(whole)
    intact = sum(end <= at for end in ends)
    assert [record.end for record in read_journal(journal.path, 1)] == ends[:intact]
    assert read(journal.path, 1) == content[:intact]


def test_a_recycled_journal_does_not_show_its_former_records(tmp_path: Path) -> None:
    content = [Record(Kind.DATA, 5, 0, 0, 0, 1, b"x" * 100)] * 50
    old = make(tmp_path, 1, content)
    old.remove(str(tmp_path), recycle=True)
    assert os.listdir(tmp_path) == [SPARE_NAME]
    new = make(tmp_path, 2, content[:3])
    assert [name for name in os.listdir(tmp_path) if journal_number(name)] == ["journal.2"]
    assert read(new.path, 2) == content[:3]


def test_a_short_write_is_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = make(tmp_path, 1, [])
    record = Record(Kind.DATA, 5, 0, 0, 0, 1, b"y" * 1000)
    journal.append(*record[:-1])
    real = os.pwritev
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", lambda fd, parts, at: real(fd, [b"".join(parts)[:500]], at))
        with pytest.raises(OSError) as caught:
            journal.append(*record[:-1])
    assert caught.value.errno == errno.ENOSPC
    journal.append(Kind.TRUNCATE, 5, 10, 0, 0, 2)
    assert read(journal.path, 1) == [record, Record(Kind.TRUNCATE, 5, 10, 0, 0, 2, b"")]


def test_other_files_are_no_journals(tmp_path: Path) -> None:
    assert journal_number("journal.12") == 12
    assert journal_number("journal.x") is journal_number("12") is journal_number(SPARE_NAME) is None
    (tmp_path / "journal.3").write_bytes(b"short")
    assert read(str(tmp_path / "journal.3"), 3) == []
