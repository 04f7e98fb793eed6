"""The signed messages of `cosilo-secagg/1`: their bytes, their signatures, and the digests that bind an attempt.

Owns layouts and bounds, and nothing else: whether a well-formed message is *allowed* is decided by the roles
(`cosilo_client.secagg`, `cosilo_server.secagg`). Every decoder accepts exactly one encoding of a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Final, Protocol, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cosilo_common.canonical import (
    MalformedBytes,
    check_name,
    id_set,
    lp,
    parse_id_set,
    parse_name,
    parse_u64,
    sha256,
    u64,
    unlp,
)
from cosilo_common.secagg.violation import ProtocolViolation, Rule

PROTOCOL: Final = b"cosilo-secagg/1"
SITES_MAX: Final = 1000  # as in a manifest: the complete graph of masks costs N^2 share messages
MESSAGE_BYTES_MAX: Final = 1 << 19  # a shares message for 1000 sites with the longest names is 480 kB
ATTEMPTS_MAX: Final = 5  # "Attempts only increase, at most 5"
DIGEST_BYTES: Final = 32
KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
SHARE_BYTES: Final = 33  # an element of the field of 2^256 + 297
SEALED_BYTES: Final = 12 + 2 * SHARE_BYTES + 16  # nonce, share of b, share of s, GCM tag

_SIGN_LABEL: Final = PROTOCOL + b"/sig"


class MessageType(StrEnum):
    """What a signed message is; part of what is signed."""

    ADVERT = "advert"
    SHARES = "shares"
    COMPLAINT = "complaint"
    UPLOAD = "upload"
    CONSENT = "consent"
    REVEAL = "reveal"


class RoundKind(StrEnum):
    """What a round is for; part of what sites sign."""

    TRAIN = "train"
    REHEARSAL = "rehearsal"
    STATISTICS = "statistics"
    MOMENTS = "moments"


class ComplaintCode(StrEnum):
    """What a site found wrong in a dealer's message to it."""

    SEAL = "seal"  # the ciphertext does not open
    SHARE = "share"  # a share is not below p, or not the one that was committed to


class Body(Protocol):
    """A message's content."""

    def encode(self) -> bytes: ...


@dataclass(frozen=True)
class Signed:
    """A message under its site's Ed25519 key. run: 32 bytes; signature: 64 bytes."""

    type: MessageType
    run: bytes
    round: int
    attempt: int
    site: str
    body: bytes
    signature: bytes

    def encode(self) -> bytes:
        """lp(type, run, round, attempt, site, body, signature)."""
        return lp(*_envelope(self.type, self.run, self.round, self.attempt, self.site, self.body), self.signature)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parses one message.

        Raises ProtocolViolation("message") on anything but its one encoding; checks no signature.
        """
        with _strictly("a message"):
            if len(data) > MESSAGE_BYTES_MAX:
                raise MalformedBytes(f"{len(data)} bytes; at most {MESSAGE_BYTES_MAX}")
            type_, run, round_, attempt, site, body, signature = _fields(data, 7)
            return cls(
                type=MessageType(type_.decode("ascii")),
                run=_exactly(run, DIGEST_BYTES, "run"),
                round=parse_u64(round_),
                attempt=parse_u64(attempt),
                site=parse_name(site),
                body=body,
                signature=_exactly(signature, SIGNATURE_BYTES, "signature"),
            )


def sign(private: Ed25519PrivateKey, type: MessageType, run: bytes, round: int, attempt: int, site: str, body: bytes | Body) -> Signed:
    """Signs a body: Ed25519(lp("cosilo-secagg/1/sig", type, run, round, attempt, site, body)).

    Deterministic (RFC 8032).
    """
    content = body if isinstance(body, bytes) else body.encode()
    signature = private.sign(lp(_SIGN_LABEL, *_envelope(type, run, round, attempt, site, content)))
    return Signed(type, run, round, attempt, site, content, signature)


def verify(signed: Signed, public: bytes) -> None:
    """Raises ProtocolViolation("signature") unless public (Ed25519, 32 bytes) signed this message."""
    content = lp(
        _SIGN_LABEL,
        *_envelope(signed.type, signed.run, signed.round, signed.attempt, signed.site, signed.body),
    )
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signed.signature, content)
    except (InvalidSignature, ValueError):
        raise ProtocolViolation(
            Rule.SIGNATURE, f"{signed.type} of {signed.site} is not signed by the key pinned for {signed.site}"
        ) from None


# Bodies


@dataclass(frozen=True)
class Advert:
    """Phase 1: "trained, and here are my keys".

    share_key C_i, mask_key S_i: X25519, 32 bytes; both b"" in a plain sum.
    """

    kind: RoundKind
    base_digest: bytes
    encoding_digest: bytes
    share_key: bytes
    mask_key: bytes

    def encode(self) -> bytes:
        """lp(kind, base digest, encoding digest, C, S)."""
        return lp(self.kind.encode(), self.base_digest, self.encoding_digest, self.share_key, self.mask_key)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parses exactly one body; raises ProtocolViolation("message")."""
        with _strictly("an advert"):
            kind, base, encoding, share_key, mask_key = _fields(data, 5)
            if len(share_key) != len(mask_key):
                raise MalformedBytes("one key is missing")
            size = KEY_BYTES if share_key else 0
            return cls(
                kind=RoundKind(kind.decode("ascii")),
                base_digest=_exactly(base, DIGEST_BYTES, "base digest"),
                encoding_digest=_exactly(encoding, DIGEST_BYTES, "encoding digest"),
                share_key=_exactly(share_key, size, "share key"),
                mask_key=_exactly(mask_key, size, "mask key"),
            )


@dataclass(frozen=True)
class Shares:
    """Phase 3: what a dealer sends. All maps are by site name.

    ciphertexts: nonce (12), AES-256-GCM of (share of b, share of s), for each of U1 but the dealer, 94 bytes each.
    self_commitment: H("self", ctx, i, b_i). b_commitments, s_commitments: H("cb" | "cs", ctx, i, j, share) for *all* of
    U1.
    """

    ciphertexts: Mapping[str, bytes]
    self_commitment: bytes
    b_commitments: Mapping[str, bytes]
    s_commitments: Mapping[str, bytes]

    def encode(self) -> bytes:
        """lp(map of ciphertexts, self commitment, map of b commitments, map of s commitments)."""
        return lp(_map(self.ciphertexts), self.self_commitment, _map(self.b_commitments), _map(self.s_commitments))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parses exactly one body; raises ProtocolViolation("message")."""
        with _strictly("a shares message"):
            ciphertexts, self_commitment, b_commitments, s_commitments = _fields(data, 4)
            return cls(
                ciphertexts=_parse_map(ciphertexts, SEALED_BYTES),
                self_commitment=_exactly(self_commitment, DIGEST_BYTES, "self commitment"),
                b_commitments=_parse_map(b_commitments, DIGEST_BYTES),
                s_commitments=_parse_map(s_commitments, DIGEST_BYTES),
            )


@dataclass(frozen=True)
class Complaint:
    """Phase 3: a dealer's message to me is wrong. Carries a code and nothing that could be a secret."""

    dealer: str
    code: ComplaintCode

    def encode(self) -> bytes:
        """lp(dealer, code)."""
        return lp(check_name(self.dealer).encode(), self.code.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parses exactly one body; raises ProtocolViolation("message")."""
        with _strictly("a complaint"):
            dealer, code = _fields(data, 2)
            return cls(parse_name(dealer), ComplaintCode(code.decode("ascii")))


@dataclass(frozen=True)
class Upload:
    """Phase 4: the whole upload's SHA-256 and length, signed before its first byte leaves (R4)."""

    digest: bytes
    size_bytes: int

    def encode(self) -> bytes:
        """lp(digest, size)."""
        return lp(self.digest, u64(self.size_bytes))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parses exactly one body; raises ProtocolViolation("message")."""
        with _strictly("an upload statement"):
            digest, size = _fields(data, 2)
            return cls(_exactly(digest, DIGEST_BYTES, "digest"), parse_u64(size))


@dataclass(frozen=True)
class Consent:
    """Phase 5: the signer agrees that exactly these survivors' sum is opened.

    ctx: of the attempt; survivors: U3, sorted.
    """

    ctx: bytes
    survivors: tuple[str, ...]

    def encode(self) -> bytes:
        """lp(ctx, U3, H("consent", ctx, U3)): the digest is what the ledger records."""
        return lp(self.ctx, id_set(self.survivors), consent_digest(self.ctx, self.survivors))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parses exactly one body; raises ProtocolViolation("message")."""
        with _strictly("a consent"):
            ctx, survivors, digest = _fields(data, 3)
            body = cls(_exactly(ctx, DIGEST_BYTES, "ctx"), parse_id_set(survivors, SITES_MAX))
            if digest != consent_digest(body.ctx, body.survivors):
                raise MalformedBytes("the consent's digest is not that of its ctx and survivors")
            return body


@dataclass(frozen=True)
class Reveal:
    """Phase 6: shares of b_j for j in U3 and of s_j for the rest of U1, 33 bytes each. Never both for one peer (R6)."""

    ctx: bytes
    survivors: tuple[str, ...]
    b_shares: Mapping[str, bytes] = field(repr=False)
    s_shares: Mapping[str, bytes] = field(repr=False)

    def encode(self) -> bytes:
        """lp(ctx, U3, map of b shares, map of s shares).

        Raises ProtocolViolation("R6") rather than encode both for one peer.
        """
        self._one_share()
        return lp(self.ctx, id_set(self.survivors), _map(self.b_shares), _map(self.s_shares))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parses exactly one body; raises ProtocolViolation("message"), or "R6" on both shares for one peer."""
        with _strictly("a reveal"):
            ctx, survivors, b_shares, s_shares = _fields(data, 4)
            body = cls(
                ctx=_exactly(ctx, DIGEST_BYTES, "ctx"),
                survivors=parse_id_set(survivors, SITES_MAX),
                b_shares=_parse_map(b_shares, SHARE_BYTES),
                s_shares=_parse_map(s_shares, SHARE_BYTES),
            )
        body._one_share()
        return body

    def _one_share(self) -> None:
        both = sorted(set(self.b_shares) & set(self.s_shares))
        if both:
            raise ProtocolViolation(Rule.ONE_SHARE, f"both shares for {', '.join(both[:5])}")


# Digests that bind


def threshold(invited_count: int, f: int) -> int:
    """R1: t = floor((|I| + f) / 2) + 1, so that two quorums of one I overlap in more than f sites."""
    return (invited_count + f) // 2 + 1


def attempt_context(
    run: bytes,
    round: int,
    kind: RoundKind,
    attempt: int,
    invited: Iterable[str],
    threshold: int,
    base_digest: bytes,
    encoding_digest: bytes,
    bits: int,
    length: int,
    adverts: Iterable[Signed],
) -> bytes:
    """ctx of phase 2: everything that a site agrees to by sharing, in 32 bytes.

    H("ctx", run, round, kind, attempt, I, t, base digest, encoding digest, L, b, lp of the signed adverts by site).
    """
    ordered = sorted(adverts, key=lambda advert: advert.site)
    return label_hash(
        "ctx",
        run,
        u64(round),
        kind.encode(),
        u64(attempt),
        id_set(invited),
        u64(threshold),
        base_digest,
        encoding_digest,
        u64(length),
        u64(bits),
        lp(*(advert.encode() for advert in ordered)),
    )


def consent_digest(ctx: bytes, survivors: Iterable[str]) -> bytes:
    """H("consent", ctx, U3): what a site's one consent in a round is recorded as (R5)."""
    return label_hash("consent", ctx, id_set(survivors))


def label_hash(label: str, *fields: bytes) -> bytes:
    """H(label, x...) = SHA-256(lp("cosilo-secagg/1/" || label, x...)), 32 bytes."""
    return sha256(lp(PROTOCOL + b"/" + label.encode("ascii"), *fields))


# Strictness


def _envelope(type: MessageType, run: bytes, round: int, attempt: int, site: str, body: bytes) -> tuple[bytes, ...]:
    return type.encode(), run, u64(round), u64(attempt), check_name(site).encode(), body


@contextmanager
def _strictly(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # MalformedBytes, an unknown enum value, bytes that are not ASCII
        raise ProtocolViolation(Rule.MESSAGE, f"not {what}: {error}") from None


def _fields(data: bytes, count: int) -> list[bytes]:
    fields = unlp(data, count)
    if len(fields) != count:
        raise MalformedBytes(f"{len(fields)} fields, not {count}")
    return fields


def _exactly(data: bytes, size_bytes: int, what: str) -> bytes:
    if len(data) != size_bytes:
        raise MalformedBytes(f"{what} has {len(data)} bytes, not {size_bytes}")
    return data


def _map(values: Mapping[str, bytes]) -> bytes:
    """One lp of name, value, name, value, ... sorted by name."""
    return lp(*(part for name in sorted(values) for part in (check_name(name).encode(), values[name])))


def _parse_map(data: bytes, value_bytes: int) -> dict[str, bytes]:
    fields = unlp(data, 2 * SITES_MAX)
    if len(fields) % 2:
        raise MalformedBytes("a name without a value")
    names = [parse_name(name) for name in fields[::2]]
    if any(a >= b for a, b in pairwise(names)):
        raise MalformedBytes("names are not sorted and unique")
    return {name: _exactly(value, value_bytes, name) for name, value in zip(names, fields[1::2], strict=True)}
