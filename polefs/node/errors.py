"""The error that a user can put right."""

from __future__ import annotations


class Refusal(OSError):
    """Something was refused; the text is one line that says why and what to do about it.

    ``errno`` tells the kind to programs, ``status`` is the exit status of the command that fails with it."""

    def __init__(self, number: int, message: str, status: int = 1) -> None:
        super().__init__(number, " ".join(message.split()))
        self.status = status

    def __str__(self) -> str:
        return str(self.strerror)


def plain(error: OSError) -> str:
    """An ``OSError`` in one line without its number: ``No such file or directory: '/x'``."""
    if isinstance(error, Refusal) or error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
