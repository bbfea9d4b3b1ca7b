"""The short form of fuzzing: the corpus, and inputs made anew, always the same ones."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import decoder, session
from tests.mounted.targets import STRESS

CORPUS = Path(__file__).parent / "corpus"
TARGETS = {"decoder": decoder, "session": session}
MOST_FILES, MOST_BYTES = 300, 150_000
FACTOR = 100 if STRESS else 1


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What handlers do wrong is logged, as it must be."""
    logging.getLogger("rawfuse").setLevel(logging.CRITICAL + 1)
    yield
    logging.getLogger("rawfuse").setLevel(logging.NOTSET)


def fuzzing(examples: int) -> settings:
    return settings(
        max_examples=examples * FACTOR,
        derandomize=not STRESS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_and_seeds(target: str) -> None:
    module = TARGETS[target]
    files = sorted((CORPUS / target).iterdir())
    assert len(files) >= 20
    for name, data in [(file.name, file.read_bytes()) for file in files] + [("seed", seed) for seed in module.seeds()]:
        try:
            module.run(data)
        except BaseException as error:
            error.add_note(f"input: {name} {data!r}")
            raise


def test_the_corpus_is_small() -> None:
    files = [file for file in CORPUS.rglob("*") if file.is_file()]
    assert len(files) < MOST_FILES and sum(file.stat().st_size for file in files) < MOST_BYTES


@fuzzing(500)
@given(
    st.one_of(
        st.binary(max_size=120), st.builds(bytes.__add__, st.sampled_from(decoder.seeds()), st.binary(max_size=8))
    )
)
def test_decoder(data: bytes) -> None:
    decoder.run(data)


@fuzzing(500)
@given(st.sampled_from(decoder.seeds()), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
def test_decoder_of_damaged_requests(seed: bytes, changes: list[tuple[int, int]]) -> None:
    data = bytearray(seed)
    for position, value in changes:
        data[position % len(data)] = value
    decoder.run(bytes(data))


def byte(least: int = 0, most: int = 255) -> st.SearchStrategy[bytes]:
    return st.integers(least, most).map(lambda value: bytes([value]))


def step(kind: int, *parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A step of the session target, with what its kind needs and the turns behind it."""
    return st.tuples(st.just(bytes([kind])), *parts, byte(0, 3)).map(b"".join)


SIZED = st.binary(max_size=60).map(lambda data: bytes([len(data)]) + data)
STEPS = st.one_of(
    step(session.GOOD, byte(0, len(session.OPCODES) - 1), st.just(b"\0")),
    step(session.GOOD, byte(0, len(session.OPCODES) - 1), st.tuples(st.just(b"\1"), byte(0, 60), byte()).map(b"".join)),
    step(session.BODY, byte(), SIZED),
    step(session.RAW, byte(), SIZED),
    step(session.CUT, byte(), byte()),
    step(session.UNKNOWN, byte(), st.binary(min_size=4, max_size=4)),
    step(session.AGAIN, byte(), byte(0, 20)),
    step(session.INTERRUPT, byte(), byte(0, 20)),
    step(session.GO_ON, byte(0, 9)),
    step(session.LARGE, byte(), st.binary(min_size=2, max_size=2)),
)


@fuzzing(250)
@given(st.integers(0, 7), st.binary(max_size=40), st.lists(STEPS, max_size=40), st.booleans())
def test_session(choices: int, actions: bytes, steps: list[bytes], hang_up: bool) -> None:
    end = bytes([session.HANG_UP]) if hang_up else b""
    session.run(bytes([choices, len(actions)]) + actions + b"".join(steps) + end)


@pytest.mark.parametrize(("target", "runs"), [("decoder", 3000), ("session", 150)])
def test_guided_by_coverage(target: str, runs: int, tmp_path: Path) -> None:
    """atheris, from the same seed: that it finds its way is enough here."""
    command = [sys.executable, "-m", "tests.fuzz.coverage", target, "-seed=1", f"-runs={runs * FACTOR}"]
    command += ["-max_len=400", f"-artifact_prefix={tmp_path}/", str(tmp_path), str(CORPUS / target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cov:" in done.stderr
