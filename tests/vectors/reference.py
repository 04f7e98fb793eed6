"""A second implementation of `cosilo-secagg/1`, to read the vectors with: plain Python integers, word by word, no numpy, nothing of Cosilo.

Written from docs/protocol.md alone. Slow and not constant-time: it only ever sees test secrets. AES and Ed25519 come from `cryptography`
(AES as a bare block, so that the counter is this file's own); X25519, HKDF, the sharing and all layouts are written out here.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

P25519 = 2**255 - 19
P_SHARE = 2**256 + 297
CHUNK_WORDS = 2**18


def lp(*fields: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)


def unlp(data: bytes) -> list[bytes]:
    fields = []
    while data:
        size = struct.unpack(">I", data[:4])[0]
        assert len(data) >= 4 + size
        fields.append(data[4 : 4 + size])
        data = data[4 + size :]
    return fields


def integer(value: int) -> bytes:
    return struct.pack(">Q", value)


def names(ids: Sequence[str]) -> bytes:
    return lp(*(name.encode() for name in sorted(ids)))


def h(label: str, *fields: bytes) -> bytes:
    return hashlib.sha256(lp(b"cosilo-secagg/1/" + label.encode(), *fields)).digest()


def kdf(z: bytes, ctx: bytes, label: str, *fields: bytes) -> bytes:
    """RFC 5869 with SHA-256; 32 bytes need one block."""
    extracted = hmac.new(ctx, z, hashlib.sha256).digest()
    return hmac.new(extracted, lp(label.encode(), *fields) + b"\x01", hashlib.sha256).digest()


def x25519(private: bytes, public: bytes) -> bytes:
    """RFC 7748, section 5: the Montgomery ladder."""
    scalar = int.from_bytes(private, "little") & ~7 & (2**255 - 1) | 2**254
    u = int.from_bytes(public, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, u, 1
    for bit in range(254, -1, -1):
        swap = scalar >> bit & 1
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x2, z2 = aa * bb % P25519, e * (aa + 121665 * e) % P25519
        x3, z3 = (da + cb) ** 2 % P25519, u * (da - cb) ** 2 % P25519
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
    affine: int = x2 * pow(z2, P25519 - 2, P25519) % P25519
    return affine.to_bytes(32, "little")


def public(private: bytes) -> bytes:
    return x25519(private, (9).to_bytes(32, "little"))


def mask_word(seed: bytes, word: int, bits: int) -> int:
    """Word w of PRG(seed): bytes 4w to 4w + 3 of the AES-256 keystream whose counter starts at 0, little endian, its low b bits."""
    block, within = divmod(4 * word, 16)
    encryptor = Cipher(algorithms.AES256(seed), modes.ECB()).encryptor()
    keystream = encryptor.update(block.to_bytes(16, "big"))
    value: int = int.from_bytes(keystream[within : within + 4], "little") % 2**bits
    return value


def combine(shares: Mapping[int, bytes]) -> int:
    """Lagrange's interpolation at zero with fractions kept whole: one inverse at the end of each term."""
    total = 0
    for x, share in shares.items():
        above, below = int.from_bytes(share, "big"), 1
        for other in shares:
            if other != x:
                above *= -other
                below *= x - other
        total += above * pow(below, P_SHARE - 2, P_SHARE)
    return total % P_SHARE


def context(terms: Mapping[str, object], threshold: int, adverts: Mapping[str, bytes]) -> bytes:
    def text(name: str) -> str:
        return str(terms[name])

    invited = terms["invited"]
    assert isinstance(invited, list)
    return h(
        "ctx",
        bytes.fromhex(text("run")),
        integer(int(text("round"))),
        text("kind").encode(),
        integer(int(text("attempt"))),
        names(invited),
        integer(threshold),
        bytes.fromhex(text("base_digest")),
        bytes.fromhex(text("encoding_digest")),
        integer(int(text("length"))),
        integer(int(text("bits"))),
        lp(*(adverts[name] for name in sorted(adverts))),
    )


def open_seal(key: bytes, ctx: bytes, dealer: str, recipient: str, sealed: bytes) -> tuple[bytes, bytes]:
    plain = AESGCM(key).decrypt(sealed[:12], sealed[12:], lp(ctx, dealer.encode(), recipient.encode()))
    return plain[:33], plain[33:]


def quantised(x: float, clip: float, weight: int, cap: int, participants: int, bits: int, uniform: float) -> int:
    """q mod 2^b of one value; x as float32 widened."""
    q = (2 ** (bits - 1) - 1) // participants
    v = max(-clip, min(clip, x)) * (weight / cap * q / clip)
    rounded = round(v) if bits == 32 else int((v + uniform) // 1)  # Python's round is half even
    word: int = max(-q, min(q, rounded)) % 2**bits
    return word
