"""One attempt of `cosilo-secagg/1` played message by message from the primitives, with no network, no journal and no clock.

What the vectors are generated from and what tests of the coordinator's half talk to. Every secret comes from InsecureFakeRandom, so the
same arguments give the same bytes. Uploads are whole in memory: never use this for anything but tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.canonical import sha256
from cosilo_common.encoding import Encoding, Section, Values
from cosilo_common.secagg.dealing import DealtShares, deal, open_dealt, site_masks
from cosilo_common.secagg.keys import InsecureFakeRandom, Keystream, Secret, generate_secret, public_of
from cosilo_common.secagg.masks import (
    CHUNK_WORDS,
    WORD,
    Words,
    Workspace,
    apply_masks,
    chunk_count,
    pack24,
    reduce,
)
from cosilo_common.secagg.messages import (
    Advert,
    Body,
    Consent,
    MessageType,
    Reveal,
    RoundKind,
    Shares,
    Signed,
    Upload,
    sign,
)
from cosilo_common.secagg.roster import Roster, Terms

RUN = sha256(b"a manifest that stands for tests")
BASE_DIGEST = sha256(b"base model")
LOSS_MAX = 16.0
LOSSES = (0.25, 1.5, 20.0)  # the last is above LOSS_MAX and is clipped


@dataclass
class Site:
    """A site's keys, its update, and what it made of them so far."""

    name: str
    signing: Ed25519PrivateKey
    share_private: Secret
    mask_private: Secret
    b: Secret
    rounding: Secret
    weight: int
    values: Values
    dealing: Body | None = None
    own: DealtShares | None = None
    held: dict[str, DealtShares] = field(default_factory=dict)

    @property
    def public(self) -> bytes:
        return self.signing.public_key().public_bytes_raw()


def value_at(site: int, index: int) -> float:
    """The update's formula: float32 of (((2654435761 index + 40503 site) mod 2^32) / 2^32 - 0.5) / 2; |value| <= 0.25."""
    return float(np.float32((((2654435761 * index + 40503 * site) % 2**32) / 2**32 - 0.5) / 2))


def formula_values(site: int, count: int) -> Values:
    """`value_at` for indices 0 .. count - 1."""
    index = np.arange(count, dtype=np.uint64)
    mixed = (np.uint64(2654435761) * index + np.uint64(40503 * site)) % np.uint64(2**32)
    return ((mixed.astype(np.float64) / 2**32 - 0.5) / 2).astype(np.float32)


@dataclass
class Play:
    """An attempt: who, under which terms, with which encoding; dropped sites share but never upload."""

    names: tuple[str, ...]
    f: int
    encoding: Encoding
    dropped: tuple[str, ...] = ()
    seed: str = "play"
    kind: RoundKind = RoundKind.TRAIN
    round: int = 7
    attempt: int = 1
    weights: Mapping[str, int] | None = None
    values: Callable[[int, int], Values] = formula_values

    @cached_property
    def random(self) -> InsecureFakeRandom:
        return InsecureFakeRandom(self.seed)

    @cached_property
    def sites(self) -> dict[str, Site]:
        sites = {}
        for rank, name in enumerate(self.names, 1):
            sites[name] = Site(
                name=name,
                signing=Ed25519PrivateKey.from_private_bytes(self.random.token_bytes(32)),
                share_private=generate_secret(self.random),
                mask_private=generate_secret(self.random),
                b=generate_secret(self.random),
                rounding=generate_secret(self.random),
                weight=self.weights[name] if self.weights else max(1, self.encoding.cap // rank),
                values=self.values(rank, self.encoding.size),
            )
        return sites

    @cached_property
    def terms(self) -> Terms:
        return Terms(
            run=RUN,
            round=self.round,
            kind=self.kind,
            attempt=self.attempt,
            invited=self.names,
            f=self.f,
            n_min=3,
            keys={name: site.public for name, site in self.sites.items()},
            base_digest=BASE_DIGEST,
            encoding_digest=self.encoding.digest(),
            bits=self.encoding.bits,
            length=self.encoding.length,
        )

    def sign(self, name: str, type: MessageType, body: Body | bytes) -> Signed:
        return sign(self.sites[name].signing, type, self.terms.run, self.round, self.attempt, name, body)

    @cached_property
    def adverts(self) -> dict[str, Signed]:
        return {name: self.sign(name, MessageType.ADVERT, self.advert_body(name)) for name in self.names}

    def advert_body(self, name: str) -> Advert:
        site = self.sites[name]
        return Advert(
            kind=self.kind,
            base_digest=BASE_DIGEST,
            encoding_digest=self.encoding.digest(),
            share_key=public_of(site.share_private),
            mask_key=public_of(site.mask_private),
        )

    @cached_property
    def roster(self) -> Roster:
        return Roster.open(self.terms, self.adverts.values())

    @cached_property
    def shares(self) -> dict[str, Signed]:
        signed = {}
        for name, site in self.sites.items():
            body, site.own = deal(self.roster, name, site.b, site.mask_private, site.share_private, self.random)
            signed[name] = self.sign(name, MessageType.SHARES, body)
        return signed

    @cached_property
    def share_bodies(self) -> dict[str, Shares]:
        return {name: Shares.decode(signed.body) for name, signed in self.shares.items()}

    def held(self, name: str) -> dict[str, DealtShares]:
        """Every dealer's shares for one site, its own included."""
        site, bodies = self.sites[name], self.share_bodies
        if not site.held:
            assert site.own is not None
            site.held = {
                dealer: site.own if dealer == name else open_dealt(self.roster, name, site.share_private, dealer, bodies[dealer])
                for dealer in self.roster.members
            }
        return site.held

    def plain_words(self, name: str) -> Words:
        """q_i: the whole vector before masks."""
        site, encoding = self.sites[name], self.encoding
        if self.kind is RoundKind.REHEARSAL:
            return encoding.zero_words()
        words = np.zeros(encoding.length, dtype=WORD)
        clipped = encoding.quantise(site.values, 0, site.weight, words[: encoding.size], Keystream(site.rounding))
        words[encoding.size :] = encoding.tail(site.weight, LOSSES[: encoding.losses], clipped, Keystream(site.rounding, 1 << 64))
        return words

    def masked_words(self, name: str) -> Words:
        """y_i."""
        site, words = self.sites[name], self.plain_words(name)
        masks, workspace = site_masks(self.roster, name, site.b, site.mask_private), Workspace()
        for chunk in range(chunk_count(len(words))):
            apply_masks(masks, chunk, words[chunk * CHUNK_WORDS : (chunk + 1) * CHUNK_WORDS], workspace)
        reduce(words, self.encoding.bits)
        return words

    def wire(self, words: Words) -> bytes:
        return words.tobytes() if self.encoding.bits == 32 else pack24(words).tobytes()

    @cached_property
    def survivors(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.dropped)

    @cached_property
    def uploads(self) -> dict[str, bytes]:
        return {name: self.wire(self.masked_words(name)) for name in self.survivors}

    def statement(self, name: str) -> Signed:
        data = self.uploads[name]
        return self.sign(name, MessageType.UPLOAD, Upload(sha256(data), len(data)))

    def consent(self, name: str) -> Signed:
        return self.sign(name, MessageType.CONSENT, Consent(self.roster.ctx, self.survivors))

    def reveal_body(self, name: str) -> Reveal:
        held = self.held(name)
        return Reveal(
            ctx=self.roster.ctx,
            survivors=self.survivors,
            b_shares={peer: held[peer].b for peer in self.survivors},
            s_shares={peer: held[peer].s for peer in self.names if peer not in self.survivors},
        )

    def reveal(self, name: str) -> Signed:
        return self.sign(name, MessageType.REVEAL, self.reveal_body(name))

    def reveals(self) -> dict[str, Reveal]:
        """The answers of the first t survivors."""
        return {name: self.reveal_body(name) for name in self.survivors[: self.terms.threshold]}


def reader(data: bytes) -> Callable[[int, memoryview], None]:
    """An upload in memory as the coordinator's chunk reader."""

    def read(offset: int, buffer: memoryview) -> None:
        part = data[offset : offset + len(buffer)]
        if len(part) != len(buffer):
            raise EOFError("the upload ends early")
        buffer[:] = part

    return read


def small_encoding(bits: int, participants: int, size: int = 300, cap: int = 64, losses: int = 2) -> Encoding:
    """An encoding of one short section: tests that are not about chunks use it."""
    return Encoding(bits, participants, cap, (Section(size, 0.2),), LOSS_MAX, losses)


def exact_sum(play: Play) -> Words:
    """The survivors' integer sum modulo 2^b, tail included, from the plain vectors."""
    total = np.zeros(play.encoding.length, dtype=np.uint64)
    for name in play.survivors:
        total += play.plain_words(name)
    words: Words = (total % np.uint64(1 << play.encoding.bits)).astype(WORD)
    return words


def with_body(signed: Signed, **changes: object) -> Signed:
    """A message with fields changed and the signature left: what a forger has."""
    return replace(signed, **changes)  # type: ignore[arg-type]  # dataclasses.replace takes any field by name
