"""The example file system without some of what it can do, for testing that the POSIX suite leaves that out.

python -m tests.mounted.limited --without NAMES MOUNTPOINT
"""

from __future__ import annotations

import argparse

from examples.memory import Memory
from examples.run import main
from rawfuse import FileSystem, InitFlag, Opcode

DECLINED = {
    "allocation": {Opcode.FALLOCATE, Opcode.LSEEK},
    "btime": {Opcode.STATX},
    "links": {Opcode.LINK},
    "mknod": {Opcode.MKNOD},
    "rename-flags": {Opcode.RENAME2},
    "statfs": {Opcode.STATFS},
    "symlinks": {Opcode.SYMLINK},
    "tmpfile": {Opcode.TMPFILE},
    "xattr": {Opcode.SETXATTR, Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.REMOVEXATTR},
}
"""The opcodes that each of ``rawfuse.testing.target.LACKS`` would need."""


def _make(arguments: argparse.Namespace) -> FileSystem:
    names = set(arguments.without.split(","))

    class Limited(Memory):
        declined = frozenset(opcode for name in names & DECLINED.keys() for opcode in DECLINED[name])
        features = Memory.features & ~InitFlag.POSIX_ACL if "acl" in names else Memory.features

    return Limited(1 << 30)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--without", metavar="NAMES", required=True)


if __name__ == "__main__":
    main(_make, "limited", _add_arguments)
