"""A malicious coordinator who wants more opened than one sum, attack by attack as PROTOCOL.md lists them: consents, reveals, further looks.

Four honest sites of four (f = 1, t = 3) unless a test says otherwise. Where an attack needs colluding sites, the test signs with their keys.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cosilo_client.ledger import ModelUpload, RoundState
from cosilo_client.looks import Looks
from cosilo_common.canonical import sha256
from cosilo_common.secagg.messages import (
    Consent,
    MessageType,
    RoundKind,
    sign,
)
from tests.protocol.parties import (
    BASE,
    RUN,
    Site,
    close_all,
    federation,
    make_start,
    make_terms,
    names,
    refused,
    signing_key,
    some_update,
)
from tests.protocol.site_roles import FOUR, VALUES, A, B, C, D, adverts_of, delivered, roster_of, shared, sites, uploaded

__all__ = ["sites"]


# R5: one consent


def test_different_survivors_to_different_sites_do_not_open(sites: dict[str, Site]) -> None:
    """R5: A and B consent to one set, C and D to another; neither has t = 3, and a mixture is refused by all."""
    uploaded(sites)
    consents = [sites[name].role.consent((A, B, C)) for name in (A, B)]
    consents += [sites[name].role.consent((B, C, D)) for name in (C, D)]
    for site in sites.values():
        assert refused(lambda site=site: site.role.reveal(consents)).rule == "R5"
    assert refused(lambda: sites[A].role.reveal(consents[:2])).rule == "phase-6"
    assert refused(lambda: sites[A].role.consent((B, C, D))).rule == "R5"


def test_no_second_attempt_after_a_consent(sites: dict[str, Site]) -> None:
    """R5: the ledger holds one consent over all attempts of a round."""
    uploaded(sites)
    consent = sites[A].role.consent(FOUR)
    assert refused(lambda: sites[A].role.advert(2)).rule == "R5"
    sites[A].restart()
    assert refused(lambda: sites[A].role.advert(2)).rule == "R5"
    assert sites[A].role.consent(FOUR) == consent


def test_an_earlier_attempt_cannot_be_opened_later(sites: dict[str, Site]) -> None:
    """R5, phase-2: all uploaded in attempt 1; in attempt 2 their first secrets are gone."""
    uploaded(sites)
    first = roster_of(sites)
    adverts = adverts_of(sites, attempt=2)
    assert refused(lambda: sites[A].role.consent(FOUR)).rule == "phase-2"
    shares = [site.role.roster(adverts) for site in sites.values()]
    for site in sites.values():
        site.role.deliver(shares)
        site.role.mask_chunks()
        site.role.consent(FOUR)
    old = [sign(signing_key(n), MessageType.CONSENT, RUN, 1, 1, n, Consent(first.ctx, FOUR)) for n in (B, C, D)]
    assert refused(lambda: sites[A].role.reveal(old)).rule == "phase-2"
    assert sites[A].journal.vault.get(RUN, 1, 1, "held") is None


def test_survivors_must_be_enough_and_of_the_roster(sites: dict[str, Site]) -> None:
    """phase-5: a sum of two would tell each the other's update."""
    delivered(sites)
    sites[A].role.mask_chunks()
    for survivors in ((A, B), (A, B, "site-05"), (C, B, A), (A, B, B, C), ()):
        assert refused(lambda survivors=survivors: sites[A].role.consent(survivors)).rule == "phase-5"
    assert refused(lambda: sites[B].role.consent((A, B, C))).rule == "phase-5"  # B has signed no upload
    assert sites[B].role.consent((A, C, D)).type is MessageType.CONSENT


def test_a_site_without_its_shares_does_not_consent(sites: dict[str, Site]) -> None:
    """phase-3: "any site of U1 that holds all its shares"."""
    shared(sites)
    assert refused(lambda: sites[A].role.consent((B, C, D))).rule == "phase-3"


def test_one_left_out_uploads_nothing_more(sites: dict[str, Site]) -> None:
    """R5, phase 5: its spool is gone, and a mask made later is refused."""
    uploaded(sites)
    sites[D].role.consent((A, B, C))
    assert refused(sites[D].role.mask_chunks).rule == "R5"
    assert not sites[D].journal.files(RUN).spool(1).exists()
    assert sites[A].role.consent((A, B, C)).site == A
    assert sites[A].journal.files(RUN).spool(1).exists()


# R6: one share


def test_survivor_and_dropped_at_once_is_refused(sites: dict[str, Site]) -> None:
    """R6: A has revealed b of D; t signers (all but A collude) now ask as if D had dropped, for s of D."""
    uploaded(sites)
    consents = [site.role.consent(FOUR) for site in sites.values()]
    reveal = sites[A].role.reveal(consents)
    roster = roster_of(sites)
    others = [sign(signing_key(n), MessageType.CONSENT, RUN, 1, 1, n, Consent(roster.ctx, (A, B, C))) for n in (B, C, D)]
    assert refused(lambda: sites[A].role.reveal(others)).rule == "R6"
    assert refused(lambda: sites[A].role.consent((A, B, C))).rule == "R5"
    sites[A].restart()
    assert refused(lambda: sites[A].role.reveal(others)).rule == "R6"
    assert sites[A].role.reveal(consents) == reveal


def test_a_reveal_needs_t_distinct_signers(sites: dict[str, Site]) -> None:
    """phase-6: t = 3; one signer counts once; a stranger's and a forged consent do not count at all."""
    uploaded(sites)
    consents = [sites[name].role.consent(FOUR) for name in (A, B)]
    assert refused(lambda: sites[A].role.reveal([*consents, consents[1]])).rule == "phase-6"
    forged_c = replace(consents[1], site=C)
    assert refused(lambda: sites[A].role.reveal([*consents, forged_c])).rule == "signature"
    assert refused(lambda: sites[C].role.reveal(consents)).rule == "phase-6"  # C has not consented
    consents.append(sites[C].role.consent(FOUR))
    assert sites[A].role.reveal(consents).type is MessageType.REVEAL


# R8: no second look


def upload_and_abandon(sites: dict[str, Site], round_: int, **start: object) -> None:
    """The coordinator hides U3, calls the round abandoned, and serves the model again."""
    for i, site in enumerate(sites.values()):
        if site.start is None or site.start.round != round_:
            site.begin(make_start(site.terms, round_, **start))  # type: ignore[arg-type]  # a test's table of fields
            site.train(*some_update(VALUES, 100 * round_ + i))
    uploaded(sites)
    close_all(sites, RoundState.ABANDONED, "the coordinator says so")


def test_one_model_is_uploaded_for_in_two_rounds_only(sites: dict[str, Site]) -> None:
    """R8: max_rounds_per_model = 2. A rehearsal counts for nothing, another model counts anew, a person may allow more."""
    upload_and_abandon(sites, 1)
    assert sites[A].journal.trained_update(RUN, 1) is None  # the site trains again
    upload_and_abandon(sites, 2)
    assert refused(lambda: sites[A].role.begin(make_start(sites[A].terms, 3))).rule == "R8"
    for site in sites.values():
        site.start = None
        site.restart()
        assert refused(lambda site=site: site.role.begin(make_start(site.terms, 3))).rule == "R8"
        site.role.begin(make_start(site.terms, 3, kind=RoundKind.REHEARSAL))
        site.role.begin(make_start(site.terms, 4, base_digest=sha256(b"the next model")))
        site.journal.ledger.permit_model(BASE, 3, permitted_at="2026-03-02T00:00:00Z")
        site.role.begin(make_start(site.terms, 5))


def test_a_second_round_for_one_model_has_the_same_invited(tmp_path: Path) -> None:
    """R8: sums over nearly the same sites of the same model differ by one site."""
    terms = make_terms(names(6), VALUES, f=2)
    made = federation(tmp_path, terms, make_start(terms))
    upload_and_abandon(made, 1)
    assert refused(lambda: made[A].role.begin(make_start(terms, 2, invited=names(5)))).rule == "R8"
    made[A].role.begin(make_start(terms, 2))
    for site in made.values():
        site.close()


def test_rounds_for_one_model_count_across_runs(sites: dict[str, Site]) -> None:
    """R8: the same model under a second manifest."""
    upload_and_abandon(sites, 1)
    upload_and_abandon(sites, 2)
    site = sites[A]
    other = replace(site.terms, run=sha256(b"a second manifest"))
    site.journal.ledger.accept(
        other.run, b"a second manifest", b"", other.participants, accepted_at="2026-03-02T00:00:00Z", accepted_by="person"
    )
    role = type(site.role)(other, A, site.key, site.journal, site.random)
    assert refused(lambda: role.begin(make_start(other, 1))).rule == "R8"


def test_a_round_of_another_run_counts_while_this_one_masks(sites: dict[str, Site]) -> None:
    """R8: checked again with the statement; the spool of a refused upload never leaves."""
    delivered(sites)
    site = sites[A]
    ledger = site.journal.ledger
    count = ledger.model_uploads
    ledger.model_uploads = lambda base: count(base) if not site.journal.files(RUN).spool(1).exists() else two_rounds()  # type: ignore[method-assign]  # another run's rounds, counted while this one masks

    def two_rounds() -> tuple[ModelUpload, ...]:
        assert site.start is not None
        _, cohort = Looks(site.terms, ledger).counted(site.start, b"")
        return (ModelUpload(sha256(b"another run"), 1, cohort), ModelUpload(sha256(b"another run"), 2, cohort))

    assert refused(site.role.mask_chunks).rule == "R8"
    entry = ledger.round(RUN, 1)
    assert entry is not None
    assert entry.upload is None
    site.restart()
    assert not site.journal.files(RUN).spool(1).exists()


def test_an_upload_counts_before_its_first_byte_leaves(sites: dict[str, Site]) -> None:
    """R8: counted with the signed statement; a round that is resumed, or whose attempt is raised, counts once."""
    uploaded(sites)
    assert len(sites[A].journal.ledger.model_uploads(BASE)) == 1
    sites[A].restart()
    sites[A].role.mask_chunks()
    uploaded(sites, attempt=2)
    assert len(sites[A].journal.ledger.model_uploads(BASE)) == 1


def test_a_plain_sum_has_no_keys_to_ask_for(tmp_path: Path) -> None:
    """phase-2: what was accepted as plain stays plain, and what was accepted as secure refuses a plain advert."""
    terms = make_terms(FOUR, VALUES, secure=False)
    made = federation(tmp_path, terms, make_start(terms))
    adverts = adverts_of(made)
    assert refused(lambda: made[A].role.roster(adverts)).rule == "phase-2"
    made[A].role.mask_chunks()
    assert refused(lambda: made[A].role.consent(FOUR)).rule == "phase-2"
    for site in made.values():
        site.close()
