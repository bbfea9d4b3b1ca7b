"""The secret that opens an encrypted volume: the contents of a key file, or a passphrase. Never on a command line."""

from __future__ import annotations

import errno
import getpass
import os
import sys
from typing import Final

from polefs.node.errors import Refusal

VARIABLE: Final = "POLEFS_PASSPHRASE"

_SIZE_MAX: Final = 1 << 20
_SIZE_MIN: Final = 8
"""Of a secret, bytes: shorter ones are guessed."""


def read_secret(key_file: str | None, volume: str, *, new: bool = False) -> bytes:
    """From the key file, the environment, or the terminal, asked twice for a ``new`` volume. A newline at the end of a
    key file is not part of it. ``Refusal`` when there is none, or none that can be one."""
    if key_file is not None:
        secret = _read_file(key_file)
    elif VARIABLE in os.environ:
        secret = os.fsencode(os.environ[VARIABLE])
    elif sys.stdin.isatty():
        secret = _ask(volume, new)
    else:
        raise Refusal(
            errno.ENOKEY,
            f"volume {volume} is encrypted and there is no key: give --key-file FILE (or -o key_file=FILE), or set "
            f"{VARIABLE}",
        )
    if new and len(secret) < _SIZE_MIN:
        raise Refusal(errno.EINVAL, f"the key has fewer than {_SIZE_MIN} bytes: take a longer one")
    return secret


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            secret = file.read(_SIZE_MAX + 1)
    except OSError as error:
        raise Refusal(error.errno or errno.EIO, f"cannot read the key file {path}: {error.strerror}") from None
    if len(secret) > _SIZE_MAX:
        raise Refusal(errno.EFBIG, f"{path} is no key file: it has more than {_SIZE_MAX >> 20} MiB")
    if not secret:
        raise Refusal(errno.EINVAL, f"the key file {path} is empty")
    return secret.removesuffix(b"\n")


def _ask(volume: str, new: bool) -> bytes:
    passphrase = getpass.getpass(f"Passphrase of volume {volume}: ")
    if new and getpass.getpass("Once more: ") != passphrase:
        raise Refusal(errno.EINVAL, "the two passphrases differ: try again")
    return passphrase.encode()
