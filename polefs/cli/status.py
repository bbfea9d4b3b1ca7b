"""``polefs status``"""

from __future__ import annotations

import errno
from typing import Annotated

import msgspec
import typer

from polefs.node.errors import Refusal, plain
from polefs.node.status import Status

NAME = "status"


def command(
    target: Annotated[
        str | None, typer.Argument(metavar="[VOLUME|MOUNTPOINT]", help="A volume; default: all that are mounted.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object, or a list of them.")] = False,
) -> None:
    """Show where a volume is mounted, its sizes, what is not yet written back, and its log file.

    Examples:

      polefs status

      polefs status /mnt/data

      polefs status --json /srv/volume
    """
    if target is not None:
        found = _of(target)
        _print(msgspec.to_builtins(found) if as_json else None, [found])
        return
    statuses = _mounted()
    if not statuses and not as_json:
        print("nothing is mounted")
    _print(msgspec.to_builtins(statuses) if as_json else None, statuses)


def _of(target: str) -> Status:
    from polefs.cli.target import volume_of

    return volume_status(volume_of(target))


def volume_status(path: str) -> Status:
    """Ask the daemon, or read the files when there is none. ``Refusal`` for what is no volume."""
    from polefs.node.control import ControlClient, GetStatus, StatusReply
    from polefs.node.mountinfo import mounts
    from polefs.node.storage import read_status
    from polefs.node.unmount import PATIENCE
    from polefs.node.volume import open_volume

    client = ControlClient.connect(path)
    if client is None:
        status = read_status(open_volume(path))
        dead = next((mount for mount in mounts() if mount.is_polefs and mount.source == status.volume), None)
        status.mountpoint = dead.mountpoint if dead is not None else None
        return status
    with client:
        try:
            reply = next(client.request(GetStatus(), patience=PATIENCE))
        except TimeoutError:
            raise Refusal(
                errno.ETIMEDOUT, f"the daemon of volume {path} (process {client.pid}) does not answer: see its log"
            ) from None
    assert isinstance(reply, StatusReply)
    return reply.status


def _mounted() -> list[Status]:
    """All polefs mounts that we may see and ask."""
    import sys

    from polefs.node.mountinfo import mounts

    found = []
    for source, mountpoint in {mount.source: mount.mountpoint for mount in mounts() if mount.is_polefs}.items():
        try:
            found.append(volume_status(source))
        except OSError as error:
            print(f"polefs: {mountpoint}: {plain(error)}", file=sys.stderr)
    return found


def _print(json: object, statuses: list[Status]) -> None:
    if json is not None:
        print(msgspec.json.format(msgspec.json.encode(json), indent=2).decode())
        return
    for number, status in enumerate(statuses):
        if number:
            print()
        for label, value in _lines(status):
            print(f"{label + ':':<12} {value}")


def _lines(status: Status) -> list[tuple[str, str]]:
    from polefs.node.sizes import format_size

    lines = [("volume", status.volume), ("name", status.name), ("uuid", status.uuid)]
    if status.store is not None:
        lines.append(("contents", status.store + (f" at {status.endpoint}" if status.endpoint else "")))
    if status.mounted:
        access = "read-only" if status.read_only else "read-write"
        lines.append(("mounted on", f"{status.mountpoint} ({access}, since {status.since})"))
    elif status.saving:
        lines.append(("mounted on", f"nothing; writing back after {status.mountpoint} was unmounted"))
    elif status.mountpoint is not None:
        dead = f"{status.mountpoint} is a dead mount, its daemon has ended: polefs umount {status.mountpoint}"
        lines.append(("mounted on", dead))
    else:
        lines.append(("mounted on", "nothing"))
    if status.pid is not None:
        lines.append(("process", f"{status.pid}, polefs {status.version}"))
    lines.append(("bytes", _used(format_size(status.bytes_used), format_size(status.bytes_limit), status.bytes_limit)))
    lines.append(("inodes", _used(str(status.inodes_used), str(status.inodes_limit), status.inodes_limit)))
    if status.store_away is not None:
        lines.append(("bucket", f"out of reach for {status.store_away:.0f} s: see the log"))
    if status.dirty_bytes is not None:
        lines.append(("dirty", f"{format_size(status.dirty_bytes)} not yet written back"))
    if status.pid is not None:
        lines.append(("log", f"{status.log_file or 'stderr'} (level {status.log_level})"))
    return lines


def _used(used: str, limit: str, limited: int) -> str:
    return f"{used} of {limit}" if limited else used
