"""``polefs gc``"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from polefs.data.report import GarbageReport

NAME = "gc"


def command(
    target: Annotated[str, typer.Argument(metavar="VOLUME|MOUNTPOINT", help="A volume, mounted or not.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    grace: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How long unused objects are kept; default: as the volume was made."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    key_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The key of an encrypted volume that is not mounted, or its passphrase."),
    ] = None,
) -> None:
    """Give back the room that contents take up which nothing refers to any more. A mounted volume does it by itself.

    Objects that are less than half in use are rewritten, unused ones are deleted when they have been so for the grace
    time, and so are those that are in the bucket without belonging to the volume, and uploads that were not completed.

    Examples:

      polefs gc --dry-run /srv/volume

      polefs gc --grace 0 /mnt/data
    """
    import msgspec

    from polefs.cli.mount import volume_secret
    from polefs.cli.progress import show_phases
    from polefs.cli.target import volume_of
    from polefs.node.control import CollectGarbage, ControlClient, GarbageReply, Working
    from polefs.node.sizes import parse_duration

    seconds = None if grace is None else parse_duration(grace)
    path = volume_of(target)
    client = ControlClient.connect(path)
    report: GarbageReport | None = None
    if client is None:
        report = _collect(path, volume_secret(path, key_file), dry_run=dry_run, grace=seconds)
    else:
        with client, show_phases() as show:
            for reply in client.request(CollectGarbage(dry_run, seconds)):
                if isinstance(reply, Working):
                    show(reply.phase)
                elif isinstance(reply, GarbageReply):
                    report = reply.report
    assert report is not None
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
        return
    for label, value in _lines(report):
        print(f"{label + ':':<10} {value}")


def _collect(path: str, secret: bytes | None, *, dry_run: bool, grace: float | None) -> GarbageReport:
    """Of a volume that is not mounted."""
    import asyncio

    from polefs.cli.progress import show_phases
    from polefs.node.gc import collect_garbage
    from polefs.node.lock import Holder
    from polefs.node.volume import open_volume

    volume = open_volume(path)
    volume.lock(Holder(os.getpid(), "gc"))
    try:
        with show_phases() as show:
            return asyncio.run(collect_garbage(volume, show, dry_run=dry_run, grace=grace, secret=secret))
    finally:
        volume.unlock()


def _lines(report: GarbageReport) -> list[tuple[str, str]]:
    from polefs.node.sizes import format_size

    would = "would be " if report.dry_run else ""
    lines = [
        (
            "half-dead",
            f"{_count(report.rewritten_segments, 'object')} {would}rewritten, {format_size(report.moved_bytes)} moved",
        ),
        ("dead", f"{_count(report.dead_objects, 'object')} {would}deleted, {format_size(report.dead_bytes)}"),
        ("lost", f"{_count(report.lost_objects, 'object')} {would}deleted, {format_size(report.lost_bytes)}"),
        ("uploads", f"{report.uploads} {would}ended"),
        ("waiting", f"{_count(report.waiting_objects, 'object')} until the grace time is over"),
    ]
    if report.damaged_segments:
        text = f"{_count(report.damaged_segments, 'object')} left as they are: polefs fsck --data tells more"
        lines.append(("damaged", text))
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
