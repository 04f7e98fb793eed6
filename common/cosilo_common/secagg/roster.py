"""What a round's parties must agree on before anybody shares: the terms, and the roster U1 with its ctx.

Owns the checks of phase 2 that a site and the coordinator make alike. Must not know either role's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

from cosilo_common.secagg.keys import check_public
from cosilo_common.secagg.messages import (
    ATTEMPTS_MAX,
    SITES_MAX,
    Advert,
    MessageType,
    RoundKind,
    Signed,
    attempt_context,
    threshold,
    verify,
)
from cosilo_common.secagg.violation import ProtocolViolation, Rule

SITES_MIN: Final = 3  # R1: a sum of two tells each site the other's update


@dataclass(frozen=True)
class Terms:
    """One attempt of one round, as the manifest, the Assignment and the pins give it.

    run, base_digest, encoding_digest: 32 bytes. invited: I, sorted. keys: pinned Ed25519 keys of *every* participant,
    by name. f, n_min: the manifest's. bits, length: b and L of the encoding. secure: False for `insecure-plain-sum`.
    """

    run: bytes
    round: int
    kind: RoundKind
    attempt: int
    invited: tuple[str, ...]
    f: int
    n_min: int
    keys: Mapping[str, bytes]
    base_digest: bytes
    encoding_digest: bytes
    bits: int
    length: int
    secure: bool = True

    def __post_init__(self) -> None:
        if list(self.invited) != sorted(set(self.invited)):
            raise ProtocolViolation(Rule.START, "the invited set is not sorted and unique")
        strangers = sorted(set(self.invited) - set(self.keys))
        if strangers:
            raise ProtocolViolation(Rule.PINS, f"{', '.join(strangers[:5])}: invited, but no participant of the accepted manifest")
        if not 1 <= self.attempt <= ATTEMPTS_MAX:
            raise ProtocolViolation(Rule.ROSTER, f"attempt {self.attempt} is not from 1 to {ATTEMPTS_MAX}")
        if not self.least_invited <= len(self.invited) <= SITES_MAX:
            raise ProtocolViolation(
                Rule.THRESHOLD, f"{len(self.invited)} sites invited; at least {self.least_invited}, at most {SITES_MAX}"
            )

    @property
    def least_invited(self) -> int:
        """R1: |I| >= max(n_min, f + 2), n_min >= 3; in a plain sum, n_min."""
        return max(self.n_min, self.f + 2, SITES_MIN) if self.secure else max(self.n_min, 1)

    @property
    def threshold(self) -> int:
        """R1: t, of the invited set, never of a smaller one."""
        return threshold(len(self.invited), self.f)

    @property
    def quorum(self) -> int:
        """The fewest sites in U1 and in U3: max(t, n_min); in a plain sum, n_min."""
        return max(self.threshold, self.n_min) if self.secure else max(self.n_min, 1)

    def check_envelope(self, signed: Signed, type: MessageType) -> None:
        """Refuses a message of another type, run, round or attempt, or not signed by an invited site's pinned key."""
        if signed.type is not type:
            raise ProtocolViolation(Rule.MESSAGE, f"{signed.site} sent {signed.type} where {type} is due")
        if signed.site not in self.keys:
            raise ProtocolViolation(Rule.PINS, f"{signed.site} is no participant of the accepted manifest")
        if signed.site not in self.invited:
            raise ProtocolViolation(Rule.PINS, f"{signed.site} is not invited to round {self.round}")
        if signed.run != self.run:
            raise ProtocolViolation(Rule.ORDER, f"{type} of {signed.site} is for another run")
        if signed.round != self.round:
            raise ProtocolViolation(Rule.ORDER, f"{type} of {signed.site} is for round {signed.round}, not {self.round}")
        if signed.attempt != self.attempt:
            raise ProtocolViolation(Rule.ROSTER, f"{type} of {signed.site} is for attempt {signed.attempt}, not {self.attempt}")
        verify(signed, self.keys[signed.site])

    def open_advert(self, signed: Signed) -> Advert:
        """Checks one advert whole: envelope, signature, kind, digests (R3), keys. Returns its body."""
        self.check_envelope(signed, MessageType.ADVERT)
        body = Advert.decode(signed.body)
        if body.kind is not self.kind:
            raise ProtocolViolation(Rule.ADVERT, f"{signed.site} adverts a {body.kind} round; this is a {self.kind} round")
        if body.base_digest != self.base_digest:
            raise ProtocolViolation(Rule.ONE_MODEL, f"{signed.site} has another base model")
        if body.encoding_digest != self.encoding_digest:
            raise ProtocolViolation(Rule.ONE_MODEL, f"{signed.site} has another encoding")
        if not self.secure:
            if body.share_key:
                raise ProtocolViolation(Rule.ADVERT, f"{signed.site} adverts keys in a plain sum")
            return body
        if not body.share_key:
            raise ProtocolViolation(Rule.ADVERT, f"{signed.site} adverts no keys")
        check_public(body.share_key)
        check_public(body.mask_key)
        return body


@dataclass(frozen=True)
class Roster:
    """U1: verified adverts, and what follows from them. Make it with `Roster.open`."""

    terms: Terms
    adverts: Mapping[str, Signed]
    bodies: Mapping[str, Advert]

    @classmethod
    def open(cls, terms: Terms, adverts: Iterable[Signed], own: Signed | None = None) -> Self:
        """Verifies a roster as phase 2 says.

        own: the advert that the calling site sent, which must stand in it unchanged.

        Raises ProtocolViolation. That no other roster was seen for this attempt is for the caller's journal to know.
        """
        bodies: dict[str, Advert] = {}
        by_site: dict[str, Signed] = {}
        for signed in adverts:
            if signed.site in by_site:
                raise ProtocolViolation(Rule.ROSTER, f"{signed.site} stands twice in the roster")
            by_site[signed.site] = signed
            bodies[signed.site] = terms.open_advert(signed)
        if len(bodies) < terms.quorum:
            raise ProtocolViolation(Rule.ROSTER, f"{len(bodies)} adverts; at least {terms.quorum}")
        keys = [key for body in bodies.values() for key in (body.share_key, body.mask_key) if key]
        if len(set(keys)) != len(keys):
            raise ProtocolViolation(Rule.ROSTER, "one X25519 key stands twice in the roster")
        if own is not None and by_site.get(own.site) != own:
            raise ProtocolViolation(Rule.ROSTER, f"the advert of {own.site} is not in the roster as it was sent")
        members = sorted(bodies)
        return cls(terms, {site: by_site[site] for site in members}, {site: bodies[site] for site in members})

    @cached_property
    def members(self) -> tuple[str, ...]:
        """U1, sorted."""
        return tuple(self.bodies)

    @cached_property
    def ctx(self) -> bytes:
        """ctx of phase 2, 32 bytes."""
        terms = self.terms
        return attempt_context(
            run=terms.run,
            round=terms.round,
            kind=terms.kind,
            attempt=terms.attempt,
            invited=terms.invited,
            threshold=terms.threshold,
            base_digest=terms.base_digest,
            encoding_digest=terms.encoding_digest,
            bits=terms.bits,
            length=terms.length,
            adverts=self.adverts.values(),
        )

    def x_of(self, site: str) -> int:
        """The site's x in the sharing: 1 + its rank in sorted U1."""
        return 1 + self.members.index(site)

    def check_survivors(self, survivors: tuple[str, ...]) -> None:
        """Raises ProtocolViolation("phase-5") unless survivors is sorted, within U1, and max(t, n_min) or more."""
        if list(survivors) != sorted(set(survivors)):
            raise ProtocolViolation(Rule.CONSENT, "the survivors are not sorted and unique")
        strangers = sorted(set(survivors) - set(self.members))
        if strangers:
            raise ProtocolViolation(Rule.CONSENT, f"{', '.join(strangers[:5])}: named as survivors, but not in the roster")
        if len(survivors) < self.terms.quorum:
            raise ProtocolViolation(Rule.CONSENT, f"{len(survivors)} survivors; at least {self.terms.quorum}")
