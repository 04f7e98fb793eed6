"""Shamir's secret sharing over the prime 2^256 + 297 (Shamir, "How to share a secret", 1979).

Owns the field and its 33-byte elements. Must not know whose secrets these are. The prime is the next one above 2^256,
so that every 32-byte secret is an element as it stands; python integers are exact and fast enough (a thousand shares
take tens of milliseconds).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from cosilo_common.secagg.keys import Randomness, Secret

PRIME: Final = 2**256 + 297
SHARE_BYTES: Final = 33  # 257 bits
SECRET_LIMIT: Final = 2**256
_DRAW_MASK: Final = 2**257 - 1
_DRAWS_MAX: Final = 512  # a draw is below p with probability 1/2: failing so often means the source is broken


def split(secret: Secret, threshold: int, count: int, random: Randomness) -> list[bytes]:
    """Shares of a 32-byte secret: the i-th of the list stands at x = i + 1.

    Any `threshold` of them give the secret, fewer nothing.

    1 <= threshold <= count < p. The coefficients are uniform in [0, p); zero is allowed, as uniformity asks.
    """
    if not 1 <= threshold <= count:
        raise ValueError(f"threshold {threshold} is not from 1 to {count}")
    coefficients = [int.from_bytes(secret.reveal(), "big")] + [_uniform(random) for _ in range(threshold - 1)]
    return [_evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes], threshold: int) -> Secret:
    """The secret behind exactly `threshold` shares, by x.

    Raises ValueError on a wrong count, an impossible x, a share >= p or a secret >= 2^256.
    """
    if len(shares) != threshold or threshold < 1:
        raise ValueError(f"{len(shares)} shares, not {threshold}")
    xs = tuple(sorted(shares))
    weights = _weights_at_zero(xs)
    secret = sum(weight * parse_share(shares[x]) for x, weight in zip(xs, weights, strict=True)) % PRIME
    if secret >= SECRET_LIMIT:
        raise ValueError("the shares give no 32-byte secret")
    return Secret(secret.to_bytes(32, "big"))


def parse_share(share: bytes) -> int:
    """A share as an element of the field. Raises ValueError unless it is 33 bytes and below p."""
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ValueError("a share is 33 bytes, big endian, below 2^256 + 297")
    return value


def _uniform(random: Randomness) -> int:
    for _ in range(_DRAWS_MAX):
        value = int.from_bytes(random.token_bytes(SHARE_BYTES), "big") & _DRAW_MASK
        if value < PRIME:
            return value
    raise RuntimeError("the source of randomness never falls below p: it is not random")


def _evaluate(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=16)  # one set of answers opens every secret of a round
def _weights_at_zero(xs: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at x = 0: prod over others of x_j / (x_j - x_i)."""
    if any(not 0 < x < PRIME for x in xs):
        raise ValueError("an x is from 1 to p - 1")
    weights = []
    for x in xs:
        above, below = 1, 1
        for other in xs:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
