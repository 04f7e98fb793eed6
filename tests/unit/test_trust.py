"""Trust documents: what two signatures let through, what one does not, and a change of the CA that was killed between two files."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import check_chain, read_chain
from cosilo_common.identity.keys import make_signing_key, make_tls_key, public_bytes, save_private_key
from cosilo_common.identity.names import coordinator_name
from cosilo_common.identity.secret_files import replace_file
from cosilo_common.identity.trust import ROOTS_MAX, SignedTrust, Trust, key_id, pem_of, read_trust, sign_trust, vouch
from cosilo_server.authority import (
    CA_FOLDER,
    CROSS_CERTIFICATE_FILE,
    INTERMEDIATE_CERTIFICATE_FILE,
    NEXT_KEY_FILE,
    Authority,
    load_root,
    make_root,
    sign_intermediate,
)
from tests.identity_parties import ADMIN, FEDERATION, NOW, found

ADMIN_KEY = make_signing_key()
ADMINS = {ADMIN: public_bytes(ADMIN_KEY)}
KEYS = [make_tls_key() for _ in range(3)]
ROOTS = [make_root(FEDERATION, key, NOW, number) for number, key in enumerate(KEYS)]
PEMS = [pem_of(root) for root in ROOTS]
ISSUER = "ab" * 20


def document(version: int = 1, roots: tuple[int, ...] = (1, 0), by: int = 0) -> SignedTrust:
    """A document whose newest root another has vouched for."""
    trust = Trust(version=version, federation=FEDERATION, roots=tuple(PEMS[n] for n in roots), issuers=(ISSUER,))
    return sign_trust(trust, (vouch(FEDERATION, ROOTS[by], KEYS[by], ROOTS[roots[0]]),), ADMIN, ADMIN_KEY, ADMINS)


def test_a_successor_that_the_old_root_and_an_admin_signed_is_believed() -> None:
    signed = document()
    assert read_trust(signed.canonical(), FEDERATION, ADMINS, PEMS[0].encode(), None) == signed
    assert signed.trust.ca_pem() == (PEMS[1] + PEMS[0]).encode()


def test_a_root_is_believed_only_by_the_word_of_one_that_is() -> None:
    with pytest.raises(CosiloError, match="not vouched for by a root that is trusted here"):
        read_trust(document(roots=(1, 0), by=2).canonical(), FEDERATION, ADMINS, PEMS[0].encode(), None)
    with pytest.raises(CosiloError, match="not vouched for"):  # the old root, brought back for somebody who joined after it went
        read_trust(document().canonical(), FEDERATION, ADMINS, PEMS[1].encode(), None)


def test_another_federation_another_admin_and_an_older_version_are_refused() -> None:
    known = document(version=3)
    ca = known.trust.ca_pem()
    cases = [
        (document(version=2), FEDERATION, ADMINS, "version 3 was seen before"),
        (document(version=3, roots=(0, 1), by=1), FEDERATION, ADMINS, "another of the same version was seen before"),
        (document(version=4), "south-star", ADMINS, "it is of federation 'north-star'"),
        (document(version=4), FEDERATION, {"eve": ADMINS[ADMIN]}, "its signer ada is not an admin"),
        (document(version=4), FEDERATION, {ADMIN: public_bytes(make_signing_key())}, "ada's signature does not hold"),
    ]
    for offered, federation, admins, reason in cases:
        with pytest.raises(CosiloError, match=reason):
            read_trust(offered.canonical(), federation, admins, ca, known)
    assert read_trust(known.canonical(), FEDERATION, {}, ca, known) == known


BYTES = document().canonical()


@given(st.data())
def test_no_changed_byte_is_believed(data: st.DataObject) -> None:
    raw = bytearray(BYTES)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CosiloError):
        read_trust(bytes(raw), FEDERATION, ADMINS, PEMS[0].encode(), None)


@pytest.mark.parametrize(
    "change", [{"roots": []}, {"roots": PEMS}, {"roots": [PEMS[0], PEMS[0]]}, {"roots": ["x"]}, {"issuers": []}, {"issuers": ["zz"]}]
)
def test_a_document_that_cannot_be_is_refused_by_its_field(change: dict[str, object]) -> None:
    assert len(PEMS) > ROOTS_MAX
    plain = json.loads(document().canonical())
    plain["trust"].update(change)
    with pytest.raises(CosiloError, match="read trust document: trust"):
        read_trust(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode(), FEDERATION, ADMINS, PEMS[0].encode(), None)


def test_nobody_but_an_admin_signs() -> None:
    with pytest.raises(CosiloError, match="eve is not an admin by this key"):
        sign_trust(document().trust, (), "eve", ADMIN_KEY, ADMINS)


def test_a_rotation_killed_between_the_certificate_and_its_key_is_finished(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    folder, (old, old_key) = founded.coordinator.folder, load_root(founded.directory / CA_FOLDER)
    following = make_tls_key()
    save_private_key(folder / NEXT_KEY_FILE, following)
    certificate = sign_intermediate(FEDERATION, following.public_key(), old, old_key, NOW, 1)
    replace_file(folder / INTERMEDIATE_CERTIFICATE_FILE, pem_of(certificate).encode())
    assert key_id(Authority.load(folder).intermediate) == key_id(certificate)
    assert not (folder / NEXT_KEY_FILE).exists()
    Authority.load(folder)  # and the pair stands


def test_in_an_overlap_both_roots_lead_to_what_the_coordinator_shows_and_only_the_new_one_to_a_renewal(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    folder, (old, old_key) = founded.coordinator.folder, load_root(founded.directory / CA_FOLDER)
    key, following = make_tls_key(), make_tls_key()
    new = make_root(FEDERATION, key, NOW, 1)
    save_private_key(folder / NEXT_KEY_FILE, following)
    for name, (root, root_key) in {INTERMEDIATE_CERTIFICATE_FILE: (new, key), CROSS_CERTIFICATE_FILE: (old, old_key)}.items():
        signed = sign_intermediate(FEDERATION, following.public_key(), root, root_key, NOW, 1)
        replace_file(folder / name, pem_of(signed).encode())
    authority, coordinator = Authority.load(folder), make_tls_key().public_key()
    later = NOW + timedelta(minutes=1)
    chain = authority.issue_coordinator_certificate(coordinator, later)
    check_chain(chain, pem_of(old).encode(), coordinator_name(FEDERATION), later)
    with pytest.raises(CosiloError):
        check_chain(chain, pem_of(new).encode(), coordinator_name(FEDERATION), later)
    (folder / CROSS_CERTIFICATE_FILE).unlink()
    authority.reload(folder)
    chain = authority.issue_coordinator_certificate(coordinator, later)
    check_chain(chain, pem_of(new).encode(), coordinator_name(FEDERATION), later)
    assert len(read_chain(chain)) == 2
