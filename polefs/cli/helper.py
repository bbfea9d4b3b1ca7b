"""``mount.polefs``: what mount(8) runs for ``mount -t polefs`` and for lines of fstab.

``mount.polefs SOURCE TARGET [-sfnv] [-N namespace] [-o options] [-t type]``. Exit statuses are those of mount(8).
"""

from __future__ import annotations

import getopt
import sys

from polefs.cli.mount import make_request, mount
from polefs.node.errors import Refusal, plain
from polefs.node.options import parse_options

USAGE = 1
FAILED = 32


def main() -> int:
    """The console script; the exit status of mount(8): 0, 1 for wrong arguments, 32 for a failed mount."""
    try:
        given, paths = getopt.gnu_getopt(sys.argv[1:], "sfnvN:o:t:h", ["help"])
    except getopt.GetoptError as error:
        return _fail(f"{error.msg}: usage is {_usage()}", USAGE)
    flags = {flag for flag, _ in given}
    if flags & {"-h", "--help"}:
        print(f"usage: {_usage()}")
        return 0
    if "-N" in flags:
        return _fail("mounting into another namespace is not supported: run it there with nsenter", USAGE)
    if len(paths) != 2:
        return _fail(f"needs a volume and a mount point: usage is {_usage()}", USAGE)
    source, target = paths
    try:
        options = parse_options([value for flag, value in given if flag == "-o"], sloppy="-s" in flags)
        request = make_request(options.volume or source, target, options)
    except OSError as error:
        return _fail(plain(error), USAGE)
    if "-f" in flags:
        return 0
    try:
        mount(request)
    except Refusal as error:
        return _fail(str(error), FAILED)
    except OSError as error:
        return _fail(plain(error), FAILED)
    if "-v" in flags:
        print(f"mount.polefs: {request.volume} mounted on {request.mountpoint}")
    return 0


def _usage() -> str:
    return "mount.polefs VOLUME MOUNTPOINT [-sfnv] [-o OPTION,...]"


def _fail(message: str, status: int) -> int:
    print(f"polefs: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
