"""Encryption: of frames with the data key of a volume, and of that key with a secret of the user's.

The data key is random and made with the volume; the volume stores it wrapped (RFC 3394) by a key that scrypt (RFC 7914)
makes from the secret: a passphrase, or the contents of a key file. So the secret can be changed without touching an
object, and a wrong one is told from a right one. Slow to import, and so only done where it is needed.
"""

from __future__ import annotations

import os
import struct
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

KEY_SIZE: Final = 32
"""Of all keys here, bytes: AES-256."""

_NONCE: Final = 12
_IDENTITY: Final = struct.Struct("<QI")
"""Segment number and frame index: what an encrypted frame is bound to."""

_COST: Final = 1 << 16
_BLOCK_SIZE: Final = 8
"""n and r of scrypt for new volumes: 64 MiB of memory and some 200 ms, once a mount."""


class Cipher:
    """AES-256-GCM over frames: nonce (12 random bytes), ciphertext, tag (16 bytes). Thread-safe.

    The number of the segment and that of the frame in it are authenticated too, so no frame passes for another. A
    random nonce is safe for 2^32 frames of one key (NIST SP 800-38D, section 8.3): 16 TiB of the smallest files,
    512 TiB of big ones."""

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)

    def encrypt(self, segment: int, index: int, data: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._aead.encrypt(nonce, data, _IDENTITY.pack(segment, index))

    def decrypt(self, segment: int, index: int, stored: bytes | memoryview) -> bytes:
        """ValueError for anything but what ``encrypt`` returned for this frame and key."""
        try:
            return self._aead.decrypt(stored[:_NONCE], stored[_NONCE:], _IDENTITY.pack(segment, index))
        except InvalidTag:
            raise ValueError("not authentic") from None


class WrappedKey(msgspec.Struct, frozen=True):
    """A data key as it may be stored anywhere: useless without the secret."""

    salt: bytes
    wrapped: bytes
    n: int = _COST
    r: int = _BLOCK_SIZE
    p: int = 1

    def unwrap(self, secret: bytes) -> bytes:
        """The data key. ValueError when the secret is another, or this is damaged."""
        try:
            return aes_key_unwrap(self._wrapping_key(secret), self.wrapped)
        except InvalidUnwrap:
            raise ValueError("wrong key") from None

    def _wrapping_key(self, secret: bytes) -> bytes:
        return Scrypt(self.salt, KEY_SIZE, self.n, self.r, self.p).derive(secret)


def new_key(secret: bytes) -> WrappedKey:
    """A new random data key, wrapped."""
    return wrap(os.urandom(KEY_SIZE), secret)


def wrap(key: bytes, secret: bytes) -> WrappedKey:
    """A data key under a secret, which may be another than before."""
    blank = WrappedKey(os.urandom(16), b"")
    return msgspec.structs.replace(blank, wrapped=aes_key_wrap(blank._wrapping_key(secret), key))
