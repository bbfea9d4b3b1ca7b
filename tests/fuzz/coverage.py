"""Coverage-guided fuzzing of one target with atheris: python -m tests.fuzz.coverage TARGET [libFuzzer arguments].

The first directory among the arguments gets inputs that reach new code; an input that fails is kept as ``crash-…`` in
the working directory, and the exit code is not 0.
"""

from __future__ import annotations

import importlib
import logging
import sys

import atheris


def main() -> None:
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=["rawfuse"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
    logging.getLogger("rawfuse").setLevel(logging.CRITICAL + 1)
    atheris.Setup([sys.argv[0], *arguments], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
