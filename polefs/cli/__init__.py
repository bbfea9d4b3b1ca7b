"""The command line: ``polefs COMMAND``, one module a command. Whatever is heavy is imported late."""

from __future__ import annotations

import sys

from polefs import __version__


def main() -> int:
    """Run the command line; its exit status. Every error is one line on stderr that begins with ``polefs: ``."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        print(f"polefs {__version__}")
        return 0
    from polefs.cli.app import run

    return run(sys.argv[1:])
