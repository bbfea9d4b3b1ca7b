"""``polefs objbench``"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from polefs.cli.store import CaBundle, Endpoint, PathStyle, Region, parse_store

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from polefs.objects.bench import Report
    from polefs.objects.location import S3Location

NAME = "objbench"


def command(
    store: Annotated[str, typer.Argument(metavar="s3://BUCKET[/PREFIX]", help="Where to measure.")],
    endpoint: Endpoint = None,
    region: Region = None,
    path_style: PathStyle = None,
    ca_bundle: CaBundle = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each figure is measured.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure an S3 server, and say whether a volume can live there. Ends with 1 when it cannot.

    Objects are made under a prefix of their own and removed at the end. It takes about half a minute.

    Examples:

      polefs objbench s3://bucket

      polefs objbench --endpoint http://minio:9000 --json s3://bucket/prefix
    """
    import msgspec

    location = parse_store(store, endpoint=endpoint, region=region, path_style=path_style, ca_bundle=ca_bundle)
    report = _measure(location, seconds)
    if as_json:
        plain = msgspec.to_builtins(report) | {"usable": report.usable}
        print(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode())
    else:
        from rich.console import Console

        _show(report, Console(highlight=False))
    raise typer.Exit(0 if report.usable else 1)


def _measure(location: S3Location, seconds: float) -> Report:
    """With what is going on shown on a terminal."""
    import asyncio

    import uvloop
    from rich.console import Console

    from polefs.objects.bench import run

    with Console(stderr=True).status("connecting") if sys.stderr.isatty() else nullcontext() as status:
        say = status.update if status is not None else lambda text: None
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(location, seconds, say))


def _show(report: Report, console: Console) -> None:
    console.print(f"{report.url} at {report.endpoint}\n")
    for check in report.checks:
        mark = "[green]yes[/]" if check.passed else "[red]NO [/]" if check.essential else "[yellow]no [/]"
        console.print(f"  {mark}  {check.name}{f': {check.text}' if check.text else ''}", soft_wrap=True)
    if report.latencies:
        console.print("\n", _latencies(report), "\n", _throughputs(report), sep="\n")
    console.print()
    if not report.usable:
        lacking = ", ".join(check.name for check in report.missing if check.essential)
        console.print(f"[red]not usable[/]: a volume needs: {lacking}", soft_wrap=True)
    elif report.missing:
        lacking = ", ".join(check.name for check in report.missing)
        console.print(f"[green]usable[/]; not there: {lacking}", soft_wrap=True)
    else:
        console.print("[green]usable[/], nothing is missing")


def _latencies(report: Report) -> Table:
    from rich.table import Table

    table = Table("ms for 4 KiB", "p50", "p90", "p99", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for each in report.latencies:
        table.add_row(each.method, *(f"{value:.1f}" for value in (each.p50, each.p90, each.p99)))
    return table


def _throughputs(report: Report) -> Table:
    from rich.table import Table

    from polefs.node.sizes import format_size

    concurrencies = sorted({each.concurrency for each in report.throughputs})
    table = Table("MiB/s (requests/s)", *(f"{count} at once" for count in concurrencies), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    found = {(each.method, each.size, each.concurrency): each for each in report.throughputs}
    for method, size in sorted({(each.method, each.size) for each in report.throughputs}):
        row = []
        for count in concurrencies:
            each = found.get((method, size, count))
            row.append("" if each is None else f"{each.bytes_per_second / (1 << 20):.1f} ({each.per_second:.0f})")
        table.add_row(f"{method} {format_size(size)}", *row)
    return table
