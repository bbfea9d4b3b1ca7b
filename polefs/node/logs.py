"""Where log lines go: stderr in the foreground, a rotated file in the background."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys

from polefs.node.errors import Refusal

LEVELS = ("debug", "info", "warning", "error")

FILE_SIZE = 10 << 20
"""A log file is rotated at this size, bytes."""

FILE_COUNT = 3
"""Rotated files kept beside the current one: ``polefs.log.1`` is the youngest."""

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"


_SECRETIVE = ("aiobotocore", "botocore")
"""Libraries that log only warnings, on every level: their lines for debugging hold requests with session tokens."""


def set_up_logging(level: str, file: str | None) -> None:
    """Log to ``file`` (rotated), or to stderr when None. Raises ``Refusal`` when the file cannot be written."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(file, maxBytes=FILE_SIZE, backupCount=FILE_COUNT)
        except OSError as error:
            raise Refusal(
                error.errno or 0, f"cannot write the log file {file}: {error.strerror}: give another with --log-file"
            ) from None
    handler.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
    for library in _SECRETIVE:
        logging.getLogger(library).setLevel(logging.WARNING)
    set_level(level)


def set_level(level: str) -> None:
    """One of ``LEVELS``."""
    logging.getLogger().setLevel(level.upper())


def current_level() -> str:
    return logging.getLevelName(logging.getLogger().level).lower()
