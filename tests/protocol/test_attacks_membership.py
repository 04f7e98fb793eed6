"""Attacks at the accepted manifest: who may belong (PROTOCOL, Parties and trust; rule "pins"), and how few may collude (R1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cosilo_client.acceptance import AcceptedBy, accept_run
from cosilo_client.ledger import Ledger
from cosilo_client.secagg import RunTerms, SiteRole
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest, Participant, sign_manifest
from cosilo_common.secagg.messages import MessageType, sign
from cosilo_common.secagg.violation import ProtocolViolation
from tests.protocol.manifests import a_manifest
from tests.protocol.parties import Site, federation, make_start, make_terms, names, public_bytes, refused, signing_key

FOUR = names(4)
A = FOUR[0]
ADMIN = signing_key("the admin")
ADMINS = {"ada": public_bytes(ADMIN)}


@dataclass
class Desk:
    """Where a site decides."""

    ledger: Ledger

    def accept(self, manifest: Manifest, by: AcceptedBy = AcceptedBy.PERSON) -> Manifest:
        return accept_run(
            self.ledger,
            manifest.canonical(),
            sign_manifest(manifest, ADMIN),
            admin_keys=ADMINS,
            federation=manifest.federation,
            site=A,
            site_key=public_bytes(signing_key(A)),
            accepted_by=by,
            accepted_at="2026-03-01T00:00:00Z",
        )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    site = Site(tmp_path / A, A, make_terms(FOUR, 10))
    yield Desk(site.journal.ledger)
    site.close()


def participants(keys: Mapping[str, bytes]) -> tuple[Participant, ...]:
    return tuple(Participant(name=name, key=key.hex()) for name, key in sorted(keys.items()))


def honest_keys() -> dict[str, bytes]:
    return {name: public_bytes(signing_key(name)) for name in FOUR}


def test_a_person_s_acceptance_pins_the_participants(desk: Desk) -> None:
    manifest = desk.accept(a_manifest(participants(honest_keys())))
    accepted = desk.ledger.accepted(manifest.digest())
    assert accepted is not None
    assert dict(accepted.participants) == honest_keys()
    assert accepted.manifest == manifest.canonical()
    desk.accept(manifest)  # again changes nothing


def test_a_sybil_signed_by_the_ca_is_not_accepted_by_policy(desk: Desk) -> None:
    """pins: every key of an automatic acceptance stands in the site's own pin file, whatever the CA has certified."""
    for name, key in honest_keys().items():
        desk.ledger.pin(name, key, pinned_at="2026-03-01T00:00:00Z")
    desk.accept(a_manifest(participants(honest_keys())), AcceptedBy.POLICY)
    sybil = {**honest_keys(), "site-05": public_bytes(signing_key("site-05"))}
    assert refused(lambda: desk.accept(a_manifest(participants(sybil)), AcceptedBy.POLICY)).rule == "pins"
    replaced = {**honest_keys(), FOUR[3]: public_bytes(signing_key("mallory"))}
    assert refused(lambda: desk.accept(a_manifest(participants(replaced)), AcceptedBy.POLICY)).rule == "pins"


def test_a_sybil_cannot_be_added_to_an_accepted_run(tmp_path: Path) -> None:
    """pins: neither by inviting it, nor in a roster, nor with other participants under the accepted digest."""
    terms = make_terms(FOUR, 10)
    made = federation(tmp_path, terms, make_start(terms))
    role = made[A].role
    assert refused(lambda: role.begin(make_start(terms, 2, invited=(*FOUR, "site-05")))).rule == "pins"
    adverts = [site.role.advert(1) for site in made.values()]
    sybil = sign(signing_key("site-05"), MessageType.ADVERT, terms.run, 1, 1, "site-05", adverts[1].body)
    assert refused(lambda: role.roster([*adverts, sybil])).rule == "pins"
    wider = make_terms(names(5), 10)
    other = SiteRole(wider, A, made[A].key, made[A].journal)
    assert refused(lambda: other.begin(make_start(wider))).rule == "pins"
    for site in made.values():
        site.close()


def test_an_admin_s_key_is_no_participant(desk: Desk) -> None:
    """pins."""
    with_admin = {**honest_keys(), FOUR[2]: ADMINS["ada"]}
    assert refused(lambda: desk.accept(a_manifest(participants(with_admin)))).rule == "pins"


def test_a_run_that_names_another_key_for_this_site_is_refused(desk: Desk) -> None:
    """pins."""
    other = {**honest_keys(), A: public_bytes(signing_key("mallory"))}
    assert refused(lambda: desk.accept(a_manifest(participants(other)))).rule == "pins"


def test_a_manifest_that_no_admin_signed_is_refused(desk: Desk) -> None:
    manifest = a_manifest(participants(honest_keys()))
    with pytest.raises(CosiloError, match="not signed by an admin"):
        accept_run(
            desk.ledger,
            manifest.canonical(),
            sign_manifest(manifest, signing_key("mallory")),
            admin_keys=ADMINS,
            federation=manifest.federation,
            site=A,
            site_key=public_bytes(signing_key(A)),
            accepted_by=AcceptedBy.PERSON,
            accepted_at="2026-03-01T00:00:00Z",
        )
    assert desk.ledger.accepted(manifest.digest()) is None


def test_a_run_that_was_not_accepted_is_not_begun(tmp_path: Path) -> None:
    """pins."""
    site = Site(tmp_path / A, A, make_terms(FOUR, 10))
    unknown = replace(site.terms, run=bytes(32))
    role = SiteRole(unknown, A, site.key, site.journal)
    assert refused(lambda: role.begin(make_start(unknown))).rule == "pins"
    site.close()


@pytest.mark.parametrize(("count", "least"), [(3, 1), (4, 1), (6, 2), (9, 3), (50, 16)])
def test_a_manifest_s_f_below_the_site_s_least_is_refused(count: int, least: int) -> None:
    """R1: by default max(1, floor(|P| / 3)); a site lowers it by name only."""
    assert make_terms(names(count), 10, f=least).f == least
    with pytest.raises(ProtocolViolation) as caught:
        make_terms(names(count), 10, f=least - 1)
    assert caught.value.rule == "R1"
    assert make_terms(names(count), 10, f=least - 1, least_f=0).f == least - 1


def test_terms_are_read_from_the_manifest() -> None:
    manifest = a_manifest(participants(honest_keys()))
    terms = RunTerms.of(manifest)
    assert terms.run == manifest.digest()
    assert terms.participants == honest_keys()
    assert (terms.n_min, terms.f, terms.secure) == (manifest.n_min, manifest.f, True)
    assert terms.values == manifest.tensor_table.size
    assert terms.losses == manifest.loss_words
