"""Starting the daemon in the background: a new process, never a fork of one that has /dev/fuse open.

The child gets its ``MountRequest`` as JSON on stdin and says on stdout, in one JSON line, that it is ready or why not.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import msgspec

from polefs.node.errors import Refusal, plain
from polefs.node.options import MountRequest


class _Ready(msgspec.Struct, frozen=True, tag="ready"):
    warning: str | None


class _Refused(msgspec.Struct, frozen=True, tag="refused"):
    number: int
    message: str
    status: int


def start(request: MountRequest) -> str | None:
    """Start the daemon and wait until the mount can be used; returns what is not as it should be, for people. Raises
    the daemon's ``Refusal``."""
    command = [sys.executable, "-P", "-m", "polefs.node", request.volume, request.mountpoint]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=_environment()
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with child.stdin:
            child.stdin.write(msgspec.json.encode(request))
        with child.stdout:
            line = child.stdout.readline()
    except BrokenPipeError:
        line = b""
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if not line:
        raise Refusal(errno.EIO, f"the daemon ended before it was ready (exit status {child.wait()}): see its log")
    answer = msgspec.json.decode(line, type=_Ready | _Refused)
    if isinstance(answer, _Refused):
        child.wait()
        raise Refusal(answer.number, answer.message, answer.status)
    child.returncode = 0  # It lives on without us: nobody is to wait for it.
    return answer.warning


def child() -> int:
    """The daemon's process; its exit status."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=MountRequest)
    os.chdir("/")
    told = False

    def ready(warning: str | None) -> None:
        nonlocal told
        _tell(_Ready(warning))
        told = True
        _leave_terminal(request.log_file)

    from polefs.node.daemon import run

    try:
        run(request, ready)
    except OSError as error:
        status = error.status if isinstance(error, Refusal) else 1
        if not told:
            _tell(_Refused(error.errno or errno.EIO, plain(error), status))
        return status
    return 0


def _tell(answer: _Ready | _Refused) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def _leave_terminal(log_file: str | None) -> None:
    """Let go of the pipes and the terminal; what the interpreter itself still says on stderr goes to the log."""
    null = os.open(os.devnull, os.O_RDWR)
    errors = os.open(log_file, os.O_WRONLY | os.O_APPEND) if log_file is not None else null
    for source, target in ((null, 0), (null, 1), (errors, 2)):
        os.dup2(source, target)
    for fd in {null, errors}:
        os.close(fd)


def _environment() -> dict[str, str]:
    """Ours, with the directory of this package on the module path: the child finds the same polefs from any directory,
    and with ``-P`` never a module of the current one."""
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
