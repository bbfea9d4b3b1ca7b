"""Encryption of frames with the data key of a volume. Slow to import: only where something is encrypted."""

from __future__ import annotations

import os
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE: Final = 12
_IDENTITY: Final = struct.Struct("<QI")
"""Segment number and frame index: what an encrypted frame is bound to."""


class Cipher:
    """AES-256-GCM over frames: nonce (12 random bytes), ciphertext, tag (16 bytes). Thread-safe.

    The number of the segment and that of the frame in it are authenticated too, so no frame passes for another. A
    random nonce is safe for 2^32 frames of one key (NIST SP 800-38D, section 8.3): 16 TiB of the smallest files,
    512 TiB of big ones."""

    def __init__(self, key: bytes) -> None:
        """``key``: 32 bytes."""
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
