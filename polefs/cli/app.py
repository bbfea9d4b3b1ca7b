"""The commands joined into one application, and how its failures are shown."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from polefs import __version__
from polefs.cli import cache, dump, flush, format, fsck, gc, load, loglevel, mount, objbench, status, umount, warmup
from polefs.node.errors import Refusal, plain

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130
"""128 + SIGINT, as shells have it."""

app = typer.Typer(
    name="polefs",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"polefs {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """A POSIX file system with names in a database and contents in an object store.

    Examples:

      polefs mount ~/polefs               the default volume, made on first use

      polefs mount /srv/volume /mnt/data  a volume of your own

      polefs status                       what is mounted

      polefs umount /mnt/data             unmount; returns when everything is saved
    """


for _module in (mount, umount, format, status, fsck, gc, dump, load, flush, cache, warmup, loglevel, objbench):
    app.command(_module.NAME)(_module.command)


def run(arguments: list[str]) -> int:
    """Run one command; its exit status."""
    # What the daemon would log is no output of a command.
    logging.getLogger("polefs").addHandler(logging.NullHandler())
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="polefs", standalone_mode=False)
        sys.stdout.flush()
    except Refusal as error:
        return _fail(str(error), error.status)
    except BrokenPipeError:
        # Whoever reads has seen enough. What is left must not be written again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(plain(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED_STATUS
    except Exception as error:
        describe = getattr(error, "format_message", None)  # click's usage errors; typer does not export their class
        if describe is None:
            raise
        message = describe()
        if not message:  # no arguments: the help has been shown
            return USAGE_STATUS
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "polefs"
        return _fail(f"{message.rstrip('.')} (see {where} --help)", USAGE_STATUS)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"polefs: {' '.join(message.split())}", file=sys.stderr)
    return code
