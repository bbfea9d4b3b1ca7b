"""The tree of small files that the programs work on: the same text each time, as a tar archive and a git repository."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from bench.figures import Sources

MEAN_BYTES = 5 * 1024
FILES_PER_DIRECTORY = 20


def make(base: Path, files: int) -> Sources:
    """Make both below ``base`` (about 15 MB for 3,000 files). Needs git and tar."""
    tree = base / "tree"
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]
    for number in range(files):
        part = number // FILES_PER_DIRECTORY
        directory = tree / f"area{part % 8}" / f"part{part}"
        directory.mkdir(parents=True, exist_ok=True)
        size = min(int(rng.lognormvariate(0, 0.8) * MEAN_BYTES * 0.73), 64 * 1024)
        (directory / f"file{number}.txt").write_text(_text(rng, words, size))
    tar = base / "tree.tar"
    subprocess.run(["tar", "cf", tar, "-C", tree, "."], check=True)
    repository = base / "repository"
    _git(tree, "init", "-q")
    _git(tree, "add", "-A")
    _git(tree, "commit", "-q", "-m", "tree")
    _git(base, "clone", "-q", "--bare", str(tree), str(repository))
    _git(repository, "repack", "-a", "-d", "-q")
    return Sources(str(tar), str(repository))


def _text(rng: random.Random, words: list[str], size: int) -> str:
    chosen = rng.choices(words, k=size // 6 + 1)
    lines = (" ".join(chosen[start : start + 12]) for start in range(0, len(chosen), 12))
    return "\n".join(lines)[: max(size, 1) - 1] + "\n"


def _git(directory: Path, *words: str) -> None:
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    subprocess.run(["git", *identity, *words], cwd=directory, check=True)
