"""The data key of an encrypted volume, and how it is kept.

It is random and made with the volume, which stores it wrapped (RFC 3394) by a key that scrypt (RFC 7914) makes from a
secret of the user's: a passphrase, or the contents of a key file. So the secret can be changed without touching an
object, and a wrong one is told from the right one.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

_KEY_SIZE: Final = 32
"""Of the data key and of the one that wraps it, bytes: AES-256."""

_COST: Final = 1 << 16
_BLOCK_SIZE: Final = 8
"""n and r of scrypt for new volumes: 64 MiB of memory and some 200 ms, once a mount."""


class WrappedKey(msgspec.Struct, frozen=True):
    """A data key as it may be stored anywhere: useless without the secret."""

    salt: bytes
    wrapped: bytes
    n: int = _COST
    r: int = _BLOCK_SIZE
    p: int = 1

    def unwrap(self, secret: bytes) -> bytes:
        """The data key. ValueError when the secret is another, or this is damaged."""
        from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

        try:
            return aes_key_unwrap(_wrapping_key(self, secret), self.wrapped)
        except InvalidUnwrap:
            raise ValueError("wrong key") from None


def new_key(secret: bytes) -> WrappedKey:
    """A new random data key, wrapped."""
    return wrap(os.urandom(_KEY_SIZE), secret)


def wrap(key: bytes, secret: bytes) -> WrappedKey:
    """A data key under a secret, which may be another than before."""
    from cryptography.hazmat.primitives.keywrap import aes_key_wrap

    blank = WrappedKey(os.urandom(16), b"")
    return msgspec.structs.replace(blank, wrapped=aes_key_wrap(_wrapping_key(blank, secret), key))


def _wrapping_key(key: WrappedKey, secret: bytes) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(key.salt, _KEY_SIZE, key.n, key.r, key.p).derive(secret)
