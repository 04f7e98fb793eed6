"""Phase 3: a dealer's sealed shares and their commitments, and the masks that follow from the keys.

Owns what is inside a shares message and which masks a vector carries. Must not know when any of it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cosilo_common.canonical import lp
from cosilo_common.secagg import sharing
from cosilo_common.secagg.keys import Randomness, Secret, label_hash, pair_seed, self_seed, share_key
from cosilo_common.secagg.masks import Mask, SignedMask
from cosilo_common.secagg.messages import SHARE_BYTES, ComplaintCode, Shares
from cosilo_common.secagg.roster import Roster
from cosilo_common.secagg.violation import ProtocolViolation, Rule

NONCE_BYTES: Final = 12


@dataclass(frozen=True)
class DealtShares:
    """One dealer's two shares for one recipient, 33 bytes each."""

    b: bytes = field(repr=False)
    s: bytes = field(repr=False)


class BadDealing(Exception):
    """A dealer's message to this site is wrong: complain with this code."""

    def __init__(self, dealer: str, code: ComplaintCode) -> None:
        self.dealer = dealer
        self.code = code
        super().__init__(f"{dealer}: {code}")


def self_commitment(ctx: bytes, site: str, b: Secret) -> bytes:
    """H("self", ctx, i, b_i)."""
    return label_hash("self", ctx, site.encode(), b.reveal())


def b_commitment(ctx: bytes, dealer: str, recipient: str, share: bytes) -> bytes:
    """H("cb", ctx, i, j, share)."""
    return label_hash("cb", ctx, dealer.encode(), recipient.encode(), share)


def s_commitment(ctx: bytes, dealer: str, recipient: str, share: bytes) -> bytes:
    """H("cs", ctx, i, j, share)."""
    return label_hash("cs", ctx, dealer.encode(), recipient.encode(), share)


def deal(
    roster: Roster, site: str, b: Secret, mask_private: Secret, share_private: Secret, random: Randomness
) -> tuple[Shares, DealtShares]:
    """Shares b_i and s_i with all of U1: (the message's body, the dealer's own two shares, which it keeps)."""
    ctx, threshold, count = roster.ctx, roster.terms.threshold, len(roster.members)
    b_shares = sharing.split(b, threshold, count, random)
    s_shares = sharing.split(mask_private, threshold, count, random)
    dealt = {peer: DealtShares(*pair) for peer, *pair in zip(roster.members, b_shares, s_shares, strict=True)}
    ciphertexts = {
        peer: _seal(share_key(ctx, share_private, roster.bodies[peer].share_key, site, peer), ctx, site, peer, pair, random)
        for peer, pair in dealt.items()
        if peer != site
    }
    body = Shares(
        ciphertexts=ciphertexts,
        self_commitment=self_commitment(ctx, site, b),
        b_commitments={peer: b_commitment(ctx, site, peer, pair.b) for peer, pair in dealt.items()},
        s_commitments={peer: s_commitment(ctx, site, peer, pair.s) for peer, pair in dealt.items()},
    )
    return body, dealt[site]


def check_shape(roster: Roster, dealer: str, body: Shares) -> None:
    """Raises ProtocolViolation("phase-3") unless a shares message speaks to exactly U1; recipients check the rest."""
    everybody = set(roster.members)
    if dealer not in everybody:
        raise ProtocolViolation(Rule.SHARES, f"{dealer} is not in the roster")
    if set(body.ciphertexts) != everybody - {dealer}:
        raise ProtocolViolation(Rule.SHARES, f"{dealer} does not share with exactly the others of the roster")
    if set(body.b_commitments) != everybody or set(body.s_commitments) != everybody:
        raise ProtocolViolation(Rule.SHARES, f"{dealer} does not commit to exactly the roster's shares")


def open_dealt(roster: Roster, site: str, share_private: Secret, dealer: str, body: Shares) -> DealtShares:
    """Opens what a dealer sealed to this site and checks it against the dealer's commitments. Raises BadDealing."""
    ctx = roster.ctx
    key = share_key(ctx, share_private, roster.bodies[dealer].share_key, dealer, site)
    sealed = body.ciphertexts[site]
    try:
        plain = AESGCM(key.reveal()).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _associated(ctx, dealer, site))
    except InvalidTag:
        raise BadDealing(dealer, ComplaintCode.SEAL) from None
    if len(plain) != 2 * SHARE_BYTES:
        raise BadDealing(dealer, ComplaintCode.SEAL)
    pair = DealtShares(b=plain[:SHARE_BYTES], s=plain[SHARE_BYTES:])
    if not share_matches(ctx, dealer, site, body, pair):
        raise BadDealing(dealer, ComplaintCode.SHARE)
    return pair


def share_matches(ctx: bytes, dealer: str, recipient: str, body: Shares, pair: DealtShares) -> bool:
    """Whether both shares are elements of the field and the ones that the dealer committed to."""
    try:
        sharing.parse_share(pair.b)
        sharing.parse_share(pair.s)
    except ValueError:
        return False
    return (
        b_commitment(ctx, dealer, recipient, pair.b) == body.b_commitments[recipient]
        and s_commitment(ctx, dealer, recipient, pair.s) == body.s_commitments[recipient]
    )


def site_masks(roster: Roster, site: str, b: Secret, mask_private: Secret) -> tuple[SignedMask, ...]:
    """Phase 4: the masks of y_i. + PRG(self), + PRG(seed_ij) for j > i, - PRG(seed_ij) for j < i, over U1."""
    masks = [SignedMask(Mask(self_seed(roster.ctx, site, b), roster.terms.bits), positive=True)]
    return tuple(masks) + pair_masks(roster, site, mask_private, roster.members)


def pair_masks(roster: Roster, site: str, mask_private: Secret, peers: tuple[str, ...]) -> tuple[SignedMask, ...]:
    """The pair masks of one site with these peers, with the signs of that site's own vector."""
    return tuple(
        SignedMask(
            Mask(pair_seed(roster.ctx, site, mask_private, peer, roster.bodies[peer].mask_key), roster.terms.bits),
            positive=peer > site,
        )
        for peer in peers
        if peer != site
    )


def unmasking_masks(
    roster: Roster, survivors: tuple[str, ...], b: Mapping[str, Secret], mask_privates: Mapping[str, Secret]
) -> tuple[SignedMask, ...]:
    """Phase 6: what to apply to the sum of U3's vectors to open it.

    b: of every survivor; mask_privates: s_j of the rest of U1.

    Takes away each survivor's own mask; adds a dropped site's pair masks with the survivors, which are the negative of
    theirs.
    """
    own = tuple(SignedMask(Mask(self_seed(roster.ctx, site, b[site]), roster.terms.bits), positive=False) for site in survivors)
    dropped = (pair_masks(roster, site, mask_privates[site], survivors) for site in roster.members if site not in survivors)
    return own + tuple(mask for masks in dropped for mask in masks)


def _seal(key: Secret, ctx: bytes, dealer: str, recipient: str, pair: DealtShares, random: Randomness) -> bytes:
    nonce = random.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key.reveal()).encrypt(nonce, pair.b + pair.s, _associated(ctx, dealer, recipient))


def _associated(ctx: bytes, dealer: str, recipient: str) -> bytes:
    return lp(ctx, dealer.encode(), recipient.encode())
