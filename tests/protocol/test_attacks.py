"""A malicious coordinator, attack by attack as PROTOCOL.md lists them; each is refused by the rule it names. Up to the shares.

Four honest sites of four (f = 1, t = 3) unless a test says otherwise. Where an attack needs colluding sites, the test
signs with their keys. Attacks on what is opened are in test_attacks_opening.py, those that begin at the accepted manifest
in test_attacks_membership.py, those on files in test_attacks_files.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cosilo_client.ledger import RoundState
from cosilo_client.secagg import Start
from cosilo_common.canonical import sha256
from cosilo_common.secagg.messages import (
    Advert,
    Complaint,
    ComplaintCode,
    Consent,
    MessageType,
    RoundKind,
    Shares,
    Signed,
    sign,
)
from cosilo_common.secagg.roster import Roster
from cosilo_server.secagg import verify_complaint
from tests.protocol.parties import (
    BASE,
    RUN,
    Site,
    barred_by,
    federation,
    make_start,
    make_terms,
    names,
    refused,
    signing_key,
    some_update,
)
from tests.protocol.site_roles import FOUR, VALUES, A, B, C, D, adverts_of, forged, roster_of, shared, sites, uploaded

__all__ = ["sites"]


# R1 and R2: who is invited, and in what order


def test_a_smaller_invited_set_does_not_lower_f(tmp_path: Path) -> None:
    """R1: f is the manifest's 3 for 10 sites; a round of 4 would need only t = 3 under an f of its own."""
    terms = make_terms(names(10), VALUES)
    site = Site(tmp_path / A, A, terms)
    violation = refused(lambda: site.begin(make_start(terms, invited=names(4))))
    assert violation.rule == "R1"
    site.begin(make_start(terms, invited=names(5)))
    site.close()


def test_disjoint_invited_sets_are_too_small_or_another_round(tmp_path: Path) -> None:
    """R1, R2: 6 sites, f = 2: halves are below f + 2; and a site that began with one set takes no other for that round."""
    terms = make_terms(names(6), VALUES)
    site = Site(tmp_path / A, A, terms)
    assert refused(lambda: site.begin(make_start(terms, invited=names(3)))).rule == "R1"
    site.begin(make_start(terms, invited=names(5)))
    assert refused(lambda: site.begin(make_start(terms, invited=names(6)))).rule == "R2"
    assert refused(lambda: site.begin(make_start(terms, invited=(*names(4), "site-06")))).rule == "R2"
    site.close()


def test_different_invited_sets_to_different_sites_do_not_mix(tmp_path: Path) -> None:
    """R1: ctx names I and t. B was told another I than the rest; what it shares opens for nobody, and nobody uploads."""
    terms = make_terms(names(5), VALUES)
    made = federation(tmp_path, terms, make_start(terms, invited=FOUR))
    made[B].role.close(RoundState.ABANDONED)
    for site in made.values():
        site.begin(make_start(terms, 2, invited=names(5) if site.name == B else FOUR))
        site.train(*some_update(VALUES, 1))
    adverts = adverts_of(made)
    shares = [site.role.roster(adverts) for site in made.values()]
    complaints = {name: site.role.deliver(shares) for name, site in made.items()}
    for name in (A, C, D):
        complaint = complaints[name]
        assert complaint is not None
        assert Complaint.decode(complaint.body) == Complaint(B, ComplaintCode.SEAL)
    for site in made.values():
        assert refused(site.role.mask_chunks).rule == "phase-4"
        site.close()


def test_a_round_s_terms_do_not_change(sites: dict[str, Site]) -> None:
    """R2: an equal round whose base, encoding or kind differs is refused; one that agrees is a resumption."""
    start = sites[A].start
    assert start is not None
    other_encoding = replace(start.encoding, sections=(replace(start.encoding.sections[0], clip=0.5),))
    for changed in (
        replace(start, base_digest=sha256(b"another model")),
        replace(start, encoding=other_encoding, encoding_digest=other_encoding.digest()),
        replace(start, kind=RoundKind.REHEARSAL),
    ):
        assert refused(lambda changed=changed: sites[A].role.begin(changed)).rule == "R2"
    advert = sites[A].role.advert(1)
    sites[A].role.begin(start)
    assert sites[A].role.advert(1) == advert


@pytest.mark.parametrize("outcome", [RoundState.CLOSED, RoundState.ABANDONED])
def test_lower_closed_abandoned_and_endless_rounds_are_refused(sites: dict[str, Site], outcome: RoundState) -> None:
    """R2."""
    site = sites[A]
    site.role.close(outcome)
    assert refused(lambda: site.role.begin(make_start(site.terms, 1))).rule == "R2"
    site.role.begin(make_start(site.terms, 5))
    assert refused(lambda: site.role.begin(make_start(site.terms, 4))).rule == "R2"
    assert refused(lambda: site.role.begin(make_start(site.terms, 101))).rule == "R2"
    assert refused(lambda: site.role.begin(make_start(site.terms, 0))).rule == "R2"


# R3: one model


@pytest.mark.parametrize("digest", ["base_digest", "encoding_digest"])
def test_different_models_never_aggregate(sites: dict[str, Site], digest: str) -> None:
    """R3: the coordinator gave site D another model, and so another advert."""
    adverts = {advert.site: advert for advert in adverts_of(sites)}
    body = replace(Advert.decode(adverts[D].body), **{digest: sha256(b"another")})
    adverts[D] = forged(D, adverts[D], body=body.encode())
    assert refused(lambda: sites[A].role.roster(list(adverts.values()))).rule == "R3"


def test_an_encoding_that_is_not_its_digest_is_refused(sites: dict[str, Site]) -> None:
    """R3."""
    site = sites[A]
    start = make_start(site.terms, 2)
    assert refused(lambda: site.role.begin(replace(start, encoding_digest=sha256(b"another")))).rule == "R3"


def test_an_encoding_beyond_the_manifest_is_refused(sites: dict[str, Site]) -> None:
    """phase-0: the manifest fixes b, cap and sizes and bounds c."""
    site = sites[A]
    encoding = make_start(site.terms, 2).encoding
    wide = (replace(encoding.sections[0], clip=2.0),)
    for changed in (
        replace(encoding, cap=1),
        replace(encoding, participants=5),
        replace(encoding, losses=3),
        replace(encoding, bits=24),
        replace(encoding, sections=wide),
        replace(encoding, sections=(*encoding.sections, *encoding.sections)),
    ):
        start = Start(2, RoundKind.TRAIN, FOUR, BASE, changed, changed.digest())
        assert refused(lambda start=start: site.role.begin(start)).rule == "phase-0"


# Rosters


def test_a_second_roster_in_one_attempt_is_refused(sites: dict[str, Site]) -> None:
    """phase-2: B and C are shown another U1 than A; A, shown it afterwards, refuses."""
    adverts = adverts_of(sites)
    first = sites[A].role.roster(adverts)
    violation = refused(lambda: sites[A].role.roster(adverts[:3]))
    assert violation.rule == "phase-2"
    assert sites[A].role.roster(list(reversed(adverts))) == first


def test_different_rosters_to_different_sites_do_not_open(sites: dict[str, Site]) -> None:
    """R5: A to C saw one U1, D another; D's consent is under another ctx, and its shares open for nobody."""
    adverts = adverts_of(sites)
    shares = [sites[name].role.roster(adverts) for name in (A, B, C)]
    shares.append(sites[D].role.roster(adverts[1:]))
    complaint = refused(lambda: sites[A].role.deliver(shares))
    assert complaint.rule == "phase-3"  # D speaks to another U1, as anybody can see
    roster = roster_of(sites)
    other = Roster.open(roster.terms, adverts[1:])
    uploaded_by_hand = sign(signing_key(D), MessageType.CONSENT, RUN, 1, 1, D, Consent(other.ctx, (A, B, C)))
    assert refused(lambda: sites[A].role.reveal([uploaded_by_hand])).rule == "phase-6"  # A consented to nothing


def test_consents_under_another_roster_are_refused(sites: dict[str, Site]) -> None:
    """R5."""
    uploaded(sites)
    consents = [sites[name].role.consent(FOUR) for name in (A, B)]
    other = sign(signing_key(C), MessageType.CONSENT, RUN, 1, 1, C, Consent(sha256(b"another ctx"), FOUR))
    assert refused(lambda: sites[A].role.reveal([*consents, other])).rule == "R5"


def test_a_roster_too_small_or_of_the_uninvited_is_refused(tmp_path: Path) -> None:
    """phase-2: |U1| >= max(t, n_min). pins: U1 is a subset of I."""
    terms = make_terms(names(5), VALUES)
    made = federation(tmp_path, terms, make_start(terms, invited=FOUR))
    adverts = adverts_of(made)
    assert refused(lambda: made[A].role.roster(adverts[:2])).rule == "phase-2"
    uninvited = sign(signing_key("site-05"), MessageType.ADVERT, RUN, 1, 1, "site-05", adverts[0].body)
    assert refused(lambda: made[A].role.roster([*adverts, uninvited])).rule == "pins"
    for site in made.values():
        site.close()


def test_forged_swapped_and_altered_adverts_are_refused(sites: dict[str, Site]) -> None:
    """signature, phase-2."""
    adverts = {advert.site: advert for advert in adverts_of(sites)}

    def shown(site: str, advert: Signed) -> list[Signed]:
        return list({**adverts, site: advert}.values())

    own_key = sign(signing_key("mallory"), MessageType.ADVERT, RUN, 1, 1, B, adverts[B].body)
    assert refused(lambda: sites[A].role.roster(shown(B, own_key))).rule == "signature"
    swapped = replace(adverts[C], site=B)
    assert refused(lambda: sites[A].role.roster(shown(B, swapped))).rule == "signature"
    flipped = replace(adverts[B], signature=bytes([adverts[B].signature[0] ^ 1]) + adverts[B].signature[1:])
    assert refused(lambda: sites[A].role.roster(shown(B, flipped))).rule == "signature"
    for missing in (A,):
        without = [advert for name, advert in adverts.items() if name != missing]
        assert refused(lambda without=without: sites[A].role.roster(without)).rule == "phase-2"
    twice = [*adverts.values(), adverts[B]]
    assert refused(lambda: sites[A].role.roster(twice)).rule == "phase-2"
    # after all of these the role goes on as if they had not been
    assert sites[A].role.roster(list(adverts.values())).type is MessageType.SHARES


def test_own_advert_replaced_by_one_of_the_same_key_is_refused(sites: dict[str, Site]) -> None:
    """phase-2: a stolen or restored key signs another advert for A; A does not find its own."""
    adverts = {advert.site: advert for advert in adverts_of(sites)}
    body = Advert.decode(adverts[A].body)
    adverts[A] = forged(A, adverts[A], body=replace(body, share_key=body.mask_key, mask_key=body.share_key).encode())
    assert refused(lambda: sites[A].role.roster(list(adverts.values()))).rule == "phase-2"


def test_bit_twins_low_orders_and_repeated_keys_are_refused(sites: dict[str, Site]) -> None:
    """phase-1, phase-2: colluding D adverts odd keys."""
    adverts = {advert.site: advert for advert in adverts_of(sites)}
    honest, victim = Advert.decode(adverts[D].body), Advert.decode(adverts[B].body)
    twin = victim.mask_key[:31] + bytes([victim.mask_key[31] | 0x80])
    for changed, rule in (
        (replace(honest, mask_key=twin), "phase-1"),
        (replace(honest, mask_key=bytes(32)), "phase-1"),
        (replace(honest, share_key=(2**255 - 19 + 9).to_bytes(32, "little")), "phase-1"),
        (replace(honest, mask_key=victim.mask_key), "phase-2"),
        (replace(honest, mask_key=honest.share_key), "phase-2"),
        (replace(honest, share_key=b"", mask_key=b""), "phase-1"),
    ):
        shown = {**adverts, D: forged(D, adverts[D], body=changed.encode())}
        assert refused(lambda shown=shown: sites[A].role.roster(list(shown.values()))).rule == rule


# Replay


def test_replay_from_another_run_round_or_attempt_is_refused(sites: dict[str, Site]) -> None:
    """R2 for run and round, phase-2 for the attempt: every message names all three under its signature."""
    adverts = adverts_of(sites)
    for changes, rule in (
        ({"run": sha256(b"another run")}, "R2"),
        ({"round": 2}, "R2"),
        ({"attempt": 2}, "phase-2"),
    ):
        replayed = [*adverts[:3], forged(D, adverts[3], **changes)]
        assert refused(lambda replayed=replayed: sites[A].role.roster(replayed)).rule == rule
    second = adverts_of(sites, attempt=2)
    assert refused(lambda: sites[A].role.roster([*second[:3], adverts[3]])).rule == "phase-2"
    shares = [site.role.roster(second) for site in sites.values()]
    old = forged(D, shares[3], attempt=1)
    assert refused(lambda: sites[A].role.deliver([*shares[:3], old])).rule == "phase-2"
    assert refused(lambda: sites[A].role.deliver([*shares[:3], adverts[3]])).rule == "message"
    assert sites[A].role.deliver(shares) is None


def test_attempts_only_increase_and_end(sites: dict[str, Site]) -> None:
    """phase-2."""
    site = sites[A]
    for attempt in (1, 3, 5):
        site.role.advert(attempt)
    for attempt in (4, 1, 0, 6):
        assert refused(lambda attempt=attempt: site.role.advert(attempt)).rule == "phase-2"


# Shares


def dealt_wrongly(sites: dict[str, Site], dealer: str, victim: str, **fields: object) -> list[Signed]:
    """Everybody's shares, where a colluding dealer changed what it sent about one victim."""
    shares = shared(sites)
    roster = roster_of(sites)
    index = roster.members.index(dealer)
    body = Shares.decode(shares[index].body)
    changed = {name: {**getattr(body, name), victim: value} for name, value in fields.items()}
    shares[index] = forged(dealer, shares[index], body=replace(body, **changed).encode())
    return shares


def test_a_dealer_s_wrong_share_is_complained_of_and_names_it(sites: dict[str, Site]) -> None:
    """phase-3: the commitment is not that of the share; A complains of D, uploads nothing, and says the same again."""
    shares = dealt_wrongly(sites, D, A, b_commitments=sha256(b"another share"))
    complaint = sites[A].role.deliver(shares)
    assert complaint is not None
    assert Complaint.decode(complaint.body) == Complaint(D, ComplaintCode.SHARE)
    assert verify_complaint(complaint, roster_of(sites)).dealer == D
    assert sites[B].role.deliver(shares) is None
    assert refused(sites[A].role.mask_chunks).rule == "phase-4"
    sites[A].restart()
    assert sites[A].role.deliver(shares) == complaint
    assert refused(sites[A].role.mask_chunks).rule == "phase-4"


def test_a_share_for_somebody_else_is_complained_of(sites: dict[str, Site]) -> None:
    """phase-3: colluding D seals B's share to A; the key and the associated data name the recipient."""
    body = Shares.decode(shared(sites)[3].body)
    shares = dealt_wrongly(sites, D, A, ciphertexts=body.ciphertexts[B])
    complaint = sites[A].role.deliver(shares)
    assert complaint is not None
    assert Complaint.decode(complaint.body) == Complaint(D, ComplaintCode.SEAL)


def test_the_coordinator_cannot_move_shares_between_sites(sites: dict[str, Site]) -> None:
    """signature: a shares message altered on the way is the coordinator's doing, no dealer's: no complaint."""
    shares = shared(sites)
    body = Shares.decode(shares[3].body)
    swapped = replace(body, ciphertexts={**body.ciphertexts, A: body.ciphertexts[B], B: body.ciphertexts[A]})
    altered = [*shares[:3], replace(shares[3], body=swapped.encode())]
    assert refused(lambda: sites[A].role.deliver(altered)).rule == "signature"
    assert sites[A].role.deliver(shares) is None


def test_not_all_shares_or_other_shares_are_refused(sites: dict[str, Site]) -> None:
    """phase-3: all of U1 must have shared before anyone uploads, and what was delivered once stands."""
    shares = shared(sites)
    assert refused(lambda: sites[A].role.deliver(shares[:3])).rule == "phase-3"
    assert refused(lambda: sites[A].role.deliver([*shares, shares[1]])).rule == "phase-3"
    assert refused(sites[A].role.mask_chunks).rule == "phase-4"
    assert sites[A].role.deliver(shares) is None
    assert sites[B].role.deliver([message for message in shares if message.site != B]) is None  # it has its own
    changed = dealt_wrongly(sites, D, B, b_commitments=sha256(b"another share"))
    assert refused(lambda: sites[A].role.deliver(changed)).rule == "phase-3"
    assert sites[A].role.deliver(shares) is None


def test_a_false_complaint_costs_the_liar() -> None:
    """phase-3, f = 1: one complaint may be a lie and leaves out the complainer; two name the dealer."""
    assert barred_by([(D, A)], f=1) == {D}
    assert barred_by([(D, A), (C, A)], f=1) == {A}
