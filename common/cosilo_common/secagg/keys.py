"""Keys of `cosilo-secagg/1`: agreement, derivation, and where randomness comes from.

Owns X25519, HKDF and the two sources of randomness. Must not know messages' layouts, files or who is honest. Randomness
is always passed in, so that vectors can be frozen.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cosilo_common.canonical import check_name, lp
from cosilo_common.secagg.messages import label_hash as label_hash
from cosilo_common.secagg.violation import ProtocolViolation, Rule

SECRET_BYTES: Final = 32
BLOCK_BYTES: Final = 16

_FIELD_PRIME: Final = 2**255 - 19  # RFC 7748, section 4.1
_LOW_ORDER: Final = frozenset(
    (
        0,
        1,
        _FIELD_PRIME - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
)
"""u-coordinates below 2^255 - 19 of the points whose order divides 8 (Bernstein, "Curve25519", 2006; as libsodium refuses)."""


class Secret:
    """32 secret bytes that no repr, log or f-string shows. Equality takes constant time."""

    __slots__ = ("_bytes",)

    def __init__(self, data: bytes) -> None:
        if len(data) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(data)}")
        self._bytes = bytes(data)

    def reveal(self) -> bytes:
        """The bytes themselves. Grep for this call to find every place that handles them."""
        return self._bytes

    def __repr__(self) -> str:
        return "Secret(redacted)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._bytes, other._bytes)

    def __hash__(self) -> int:
        raise TypeError("a secret is not hashable: it must not become a key of anything")

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled")


class Randomness(Protocol):
    """Where random bytes come from."""

    def token_bytes(self, n: int) -> bytes:
        """n fresh bytes."""
        ...


class SystemRandomness:
    """The operating system's generator."""

    def token_bytes(self, n: int) -> bytes:
        """n fresh bytes, fit for keys."""
        return secrets.token_bytes(n)


class Keystream:
    """AES-256-CTR under a secret seed as a source of bytes: as fit for rounding as its seed, at the speed of AES.

    start_block: first value of the 16-byte counter. Thread-safe; the order of calls from several threads is theirs.
    """

    def __init__(self, seed: Secret, start_block: int = 0) -> None:
        counter = start_block.to_bytes(BLOCK_BYTES, "big")
        self._encryptor = Cipher(algorithms.AES256(seed.reveal()), modes.CTR(counter)).encryptor()
        self._lock = threading.Lock()

    def token_bytes(self, n: int) -> bytes:
        """The next n bytes of the stream."""
        with self._lock:
            return self._encryptor.update(bytes(n))


class InsecureFakeRandom:
    """For tests and vectors only: the same seed gives the same bytes.

    Stream: AES-256-CTR under SHA-256 of the seed's text.
    """

    def __init__(self, seed: int | str) -> None:
        self._stream = Keystream(Secret(hashlib.sha256(f"InsecureFakeRandom/{seed}".encode()).digest()))

    def token_bytes(self, n: int) -> bytes:
        """The next n bytes of the stream."""
        return self._stream.token_bytes(n)


def generate_secret(random: Randomness) -> Secret:
    """32 random bytes: a b_i, or an X25519 private key (RFC 7748 clamps when it is used)."""
    return Secret(random.token_bytes(SECRET_BYTES))


def public_of(private: Secret) -> bytes:
    """The X25519 public key of a private one, 32 bytes."""
    key = X25519PrivateKey.from_private_bytes(private.reveal())
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def check_public(public: bytes) -> bytes:
    """Returns an X25519 public key if it is canonical and not of low order. Raises ProtocolViolation("phase-1").

    X25519 ignores the top bit and reduces u modulo 2^255 - 19, so one point has several encodings ("bit twins"); only
    the least is taken.
    """
    u = int.from_bytes(public, "little")
    if len(public) != SECRET_BYTES or u >= _FIELD_PRIME:
        raise ProtocolViolation(Rule.ADVERT, "an X25519 key is not in canonical form")
    if u in _LOW_ORDER:
        raise ProtocolViolation(Rule.ADVERT, "an X25519 key is a point of low order")
    return public


def agree(private: Secret, public: bytes) -> Secret:
    """X25519(private, public). Raises ProtocolViolation("phase-1") on a key that `check_public` refuses."""
    check_public(public)
    try:
        shared = X25519PrivateKey.from_private_bytes(private.reveal()).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # an all-zero result: cannot follow from a point that passed, kept as the second lock
        raise ProtocolViolation(Rule.ADVERT, "an X25519 key gives no shared secret") from None
    return Secret(shared)


def kdf(z: Secret, ctx: bytes, label: str, *fields: bytes) -> Secret:
    """HKDF-SHA256(ikm = z, salt = ctx, info = lp(label, x...)), 32 bytes."""
    return Secret(HKDF(SHA256(), SECRET_BYTES, salt=ctx, info=lp(label.encode("ascii"), *fields)).derive(z.reveal()))


def self_seed(ctx: bytes, site: str, b: Secret) -> Secret:
    """Seed of a site's own mask: KDF(b_i, "self", i)."""
    return kdf(b, ctx, "self", check_name(site).encode())


def pair_seed(ctx: bytes, site: str, private: Secret, peer: str, peer_public: bytes) -> Secret:
    """Seed of the mask that two sites share: KDF(X25519(s_i, S_j), "pair", min, max). The same from either end."""
    if site == peer:
        raise ValueError("a site has no pair mask with itself")
    first, second = sorted((check_name(site), check_name(peer)))
    return kdf(agree(private, peer_public), ctx, "pair", first.encode(), second.encode())


def share_key(ctx: bytes, private: Secret, peer_public: bytes, dealer: str, recipient: str) -> Secret:
    """Key that seals a dealer's shares to one recipient: KDF(X25519(c_i, C_j), "share", i, j).

    The same from either end.
    """
    return kdf(agree(private, peer_public), ctx, "share", check_name(dealer).encode(), check_name(recipient).encode())
