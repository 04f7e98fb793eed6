"""Signatures that are looked at once: every party of a simulation is in this process, and would look at the same bytes again.

Owns the memory of which key signed which bytes; the look itself is the library's. A signature that fails is never remembered. Must not know
what is signed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import cosilo_common.secagg.messages

SIGNATURES = 1 << 12  # of some 200 bytes and a message each: a round of twelve sites has some hundred


class RememberedKey:
    """Where production code has the library's class."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    @classmethod
    def from_public_bytes(cls, public: bytes) -> RememberedKey:
        """The key; whether it is one is seen when it is asked."""
        return cls(public)

    def verify(self, signature: bytes, content: bytes) -> None:
        """Raises InvalidSignature, or ValueError for a key that is none."""
        _verify(self._public, signature, content)


@lru_cache(maxsize=SIGNATURES)
def _verify(public: bytes, signature: bytes, content: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(public).verify(signature, content)


def patches() -> list[tuple[Any, str, Any]]:
    """Where it stands in production code: (module, name, what stands there)."""
    return [(cosilo_common.secagg.messages, "Ed25519PublicKey", RememberedKey)]
