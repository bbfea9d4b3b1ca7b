"""``polefs dump``"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from polefs.node.errors import Refusal, plain

if TYPE_CHECKING:
    from polefs.node.dump import Summary

NAME = "dump"


def command(
    volume: Annotated[
        str, typer.Argument(metavar="VOLUME", help="A volume that is not mounted, or postgresql://HOST/DATABASE.")
    ],
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Where to; -: standard output.")] = "-",
    name: Annotated[str | None, typer.Option(help="Which volume of a database.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, on standard error unless a FILE is given.")
    ] = False,
) -> None:
    """Write all metadata of a volume into one file: names, attributes, and which objects hold the contents.

    The contents stay where they are and are not in the dump. polefs load makes a volume of it again. A volume in a
    database may be in use; the dump is of the moment when it begins.

    Examples:

      polefs dump /srv/volume > volume.dump

      polefs dump postgresql://db/polefs --name data data.dump
    """
    from polefs.cli.progress import show_phases
    from polefs.cli.target import volume_of
    from polefs.node.dump import SCHEMES, dump_volume

    # Of a mount point the volume, so that it is told what keeps it from being dumped.
    source = volume if volume.startswith(SCHEMES) else volume_of(volume)
    with _output(file) as stream, show_phases() as show:
        summary = dump_volume(source, name, stream, show)
    print_summary("dumped", summary, as_json=as_json, to_stderr=file == "-")


def print_summary(done: str, summary: Summary, *, as_json: bool, to_stderr: bool = False) -> None:
    import msgspec

    from polefs.node.sizes import format_size

    stream = sys.stderr if to_stderr else sys.stdout
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode(), file=stream)
        return
    inodes = summary.rows["inode"]
    print(f"volume '{summary.name}', {summary.uuid}: {inodes} inodes {done}, {format_size(summary.bytes)}", file=stream)


@contextlib.contextmanager
def _output(file: str) -> Iterator[BinaryIO]:
    """A new file appears when it is whole and on the disk."""
    if file == "-":
        if sys.stdout.isatty():
            raise Refusal(errno.EINVAL, "a dump is not for a terminal: give a FILE, or redirect the output", 2)
        try:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _failed("the output", error) from error
        return
    if os.path.exists(file) and not os.path.isfile(file):
        # A pipe or a device is written to, and never replaced.
        try:
            with open(file, "wb") as stream:
                yield stream
        except OSError as error:
            raise _failed(file, error) from error
        return
    part = f"{file}.part"
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(part, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError):
            raise _failed(file, error) from error
        raise


def _failed(file: str, error: OSError) -> OSError:
    if isinstance(error, Refusal) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return Refusal(error.errno or errno.EIO, f"cannot write {file}: {plain(error)}: give a place with more room")
