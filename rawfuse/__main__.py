"""``python -m rawfuse probe [--json]``: what FUSE can do on this machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import msgspec

from rawfuse.probe import Report, probe


def main(arguments: list[str] | None = None) -> None:
    """Ends with code 1 and one line on standard error where FUSE cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m rawfuse")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "Mount a small file system where nobody else sees it, and print what this kernel offers and what works."
    command = commands.add_parser("probe", help="what FUSE can do on this machine", description=about)
    command.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(arguments)
    try:
        report = probe()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"rawfuse: {where}{error.strerror or error}")
    text = msgspec.json.format(msgspec.json.encode(report)).decode() if chosen.json else "\n".join(_lines(report))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever reads has seen enough. What is left must not be written again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _lines(report: Report) -> Iterator[str]:
    limits = report.limits
    where = "user and mount" if report.user_namespace else "mount"
    how = "within mount(2)" if report.synchronous_init else "after mount(2), whose errors are less clear"
    yield f"Linux {report.kernel} speaks FUSE {report.protocol}; rawfuse serves {report.served}."
    yield f"Mounted in a {where} namespace of its own; INIT is answered {how}."
    yield ""
    yield "Limits"
    size = f"{limits.max_request >> 10} KiB"
    yield f"  largest request      {size} (sysctl fs.fuse.max_pages_limit: {limits.max_pages_limit})"
    yield f"  read-ahead           {f'{limits.read_ahead >> 10} KiB' if limits.read_ahead else 'not told'}"
    held_back = f"reading ahead held back from {limits.congestion_threshold} on"
    yield f"  background requests  {limits.max_background}, {held_back}"
    default, most = _seconds(limits.default_request_timeout), _seconds(limits.max_request_timeout)
    yield f"  request timeout      {default} by default, most: {most} (sysctls fs.fuse.*_request_timeout)"
    yield ""
    yield "Transports, passthrough, notifications"
    works = {f"transport {name}": why for name, why in report.transports.items()}
    works["passthrough"] = report.passthrough
    works.update((f"notification {name}", why) for name, why in report.notifications.items())
    for name, why in works.items():
        yield f"  {name:<29}{f'no: {why}' if why else 'works'}"
    yield ""
    yield "Features (bits of INIT)"
    meaning = {"agreed": "agreed", "possible": "where it is asked for"}
    for feature in report.features:
        note = f"off: {feature.why}" if feature.why else meaning[feature.state]
        yield f"  {feature.bit:>2} {feature.name:<22}{note}"
    for bit in report.unknown_bits:
        yield f"  {bit:>2} {'(unknown)':<22}off: offered by the kernel, not known to rawfuse"


def _seconds(number: int) -> str:
    return f"{number} s" if number else "no limit"


if __name__ == "__main__":
    main()
