"""``python -m tests.fuzz [--seconds N] [--keep] [TARGET]``: fuzz the decoder and sessions of rawfuse.

Each target gets the inputs of its corpus, then hypothesis' (tests/fuzz/test_fuzz.py runs the same, shorter), then
atheris' for so many seconds. ``--keep`` adds inputs that reach new code to the corpus, the smallest ones that do. An
input that fails is left in the working directory as ``crash-…``; run it again with ``--input FILE``.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.test_fuzz import CORPUS, TARGETS

MOST_BYTES = 400
"""Of an input."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the decoder and sessions.")
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="for atheris, with each target (60)")
    parser.add_argument("--keep", action="store_true", help="add inputs that reach new code to the corpus")
    parser.add_argument("--input", type=Path, help="run this one input only")
    chosen = parser.parse_args()
    logging.getLogger("rawfuse").setLevel(logging.CRITICAL + 1)
    if chosen.input is not None:
        if chosen.target is None:
            parser.error("--input needs the target it is for")
        TARGETS[chosen.target].run(chosen.input.read_bytes())
        return
    selected = [chosen.target] if chosen.target else list(TARGETS)
    if not chosen.keep:
        name = " or ".join(selected)
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/fuzz/test_fuzz.py", "-k", name], check=True)
    for target in selected:
        fuzz(target, chosen.seconds, chosen.keep)


def fuzz(target: str, seconds: int, keep: bool) -> None:
    corpus, module = CORPUS / target, TARGETS[target]
    with tempfile.TemporaryDirectory(prefix="rawfuse-fuzz-") as found:
        for number, data in enumerate(module.seeds()):
            Path(found, f"seed-{number}").write_bytes(data)
        run(target, f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", found, str(corpus))
        if keep:
            inputs = {file.read_bytes() for place in (Path(found), corpus) for file in place.iterdir()}
            for old in corpus.iterdir():
                old.unlink()
            for data in fewest(module.run, inputs):
                (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def fewest(target: Callable[[bytes], None], inputs: Iterable[bytes]) -> Iterator[bytes]:
    """Inputs, small ones first, that together go every way from line to line in rawfuse that all of them go."""
    seen: set[tuple[str, int, int]] = set()
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        ways = ways_through(target, data)
        if not ways <= seen:
            seen |= ways
            yield data


def ways_through(target: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """Pairs of lines that ran one after the other in a call."""
    ways: set[tuple[str, int, int]] = set()

    def of_call(frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if "/rawfuse/" not in name:
            return None
        last = frame.f_lineno

        def of_line(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal last
            ways.add((name, last, frame.f_lineno))
            last = frame.f_lineno
            return of_line

        return of_line

    before = sys.gettrace()
    sys.settrace(of_call)
    try:
        target(data)
    finally:
        sys.settrace(before)
    return ways


def run(target: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz.coverage", target, *arguments], check=False)
    if done.returncode:
        sys.exit(f"{target}: an input failed; it stands in crash-… here")


if __name__ == "__main__":
    main()
