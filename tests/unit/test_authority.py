"""The certificate authority: what `cosilo init` leaves, and what it issues."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import (
    CSR_BYTES_MAX,
    check_chain,
    check_issued,
    make_csr,
    read_chain,
    read_csr,
    subject_of,
)
from cosilo_common.identity.folder import load_identity
from cosilo_common.identity.keys import load_tls_key, make_signing_key, make_tls_key, public_bytes, tls_public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import PeerName, Role, coordinator_name, peer_from_certificate
from cosilo_common.identity.tls import check_tls_files
from cosilo_server.authority import Authority, Founding, found_federation
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, found

ANNA = PeerName(FEDERATION, Role.SITE, "st-anna")


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


def files_below(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_init_leaves_three_folders_and_every_key_is_its_owners_alone(tmp_path: Path) -> None:
    found(tmp_path / "f")
    assert files_below(tmp_path / "f") == {
        "admin/admin.toml": 0o644,
        "admin/ca.crt": 0o644,
        "admin/members.json": 0o644,
        "admin/signing.key": 0o600,
        "admin/tls.crt": 0o644,
        "admin/tls.key": 0o600,
        "ca/root.crt": 0o644,
        "ca/root.key": 0o600,
        "coordinator/ca.crt": 0o644,
        "coordinator/federation.json": 0o644,
        "coordinator/intermediate.crt": 0o644,
        "coordinator/intermediate.key": 0o600,
        "coordinator/members.json": 0o644,
        "coordinator/tls.crt": 0o644,
        "coordinator/tls.key": 0o600,
    }
    folders = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "f").iterdir()}
    assert folders == {"admin": 0o700, "ca": 0o700, "coordinator": 0o700}


def test_the_coordinators_folder_holds_no_key_of_the_admins(founded: Founded) -> None:
    admins = {public_bytes(founded.admin_key)}
    assert founded.coordinator.members().admins() == {ADMIN: public_bytes(founded.admin_key)}
    with pytest.raises(CosiloError, match="does not exist"):
        founded.coordinator.signing_key()
    root_and_admin_keys = [
        (founded.directory / "ca" / "root.key").read_bytes(),
        (founded.directory / "admin" / "signing.key").read_bytes(),
        (founded.directory / "admin" / "tls.key").read_bytes(),
    ]
    held = [path.read_bytes() for path in (founded.directory / "coordinator").iterdir()]
    assert admins and not any(key in data for key in root_and_admin_keys for data in held)


def test_both_founding_certificates_pass_their_checks(founded: Founded) -> None:
    assert check_tls_files(founded.coordinator.tls, NOW).name == coordinator_name(FEDERATION)
    assert check_tls_files(founded.admin.tls, NOW).name == PeerName(FEDERATION, Role.ADMIN, ADMIN)


def test_the_admins_folder_says_where_the_coordinator_is_and_may_be_edited(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    path = founded.directory / "admin" / "admin.toml"
    path.write_text(path.read_text().replace("127.0.0.1:7443", "fl.hospital.example:443"))
    membership = load_identity(path.parent).membership
    assert (membership.address, membership.enrolment_address) == ("fl.hospital.example:443", "127.0.0.1:7444")
    assert membership.peer() == PeerName(FEDERATION, Role.ADMIN, ADMIN)
    path.write_text(path.read_text() + "surprise = 1\n")
    with pytest.raises(CosiloError, match=r"^read admin\.toml: .*surprise"):
        load_identity(path.parent)
    path.write_text("[")
    with pytest.raises(CosiloError, match="it is not TOML of plain values"):
        load_identity(path.parent)


def test_init_refuses_a_folder_with_anything_in_it(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(CosiloError, match="is not empty; give a new or empty folder"):
        found(tmp_path)
    with pytest.raises(CosiloError, match="is not a folder"):
        found(tmp_path / "letter")
    assert [entry.name for entry in tmp_path.iterdir()] == ["letter"]


def test_init_takes_an_empty_folder_and_what_a_killed_init_left(tmp_path: Path) -> None:
    (tmp_path / ".unfinished" / "ca").mkdir(parents=True)
    (tmp_path / ".unfinished" / "ca" / "root.key").write_text("half")
    found(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["admin", "ca", "coordinator"]


@pytest.mark.parametrize(
    "founding",
    [
        Founding("North Star", "ada", "h:1", "h:2"),
        Founding("f", "Ada", "h:1", "h:2"),
        Founding("f", "ada", "no port", "h:2"),
        Founding("f", "ada", "h:1", "h:2", leaf_life=timedelta(seconds=1)),
        Founding("f", "ada", "h:1", "h:2", leaf_life=timedelta(days=826)),
    ],
)
def test_a_founding_that_cannot_be_leaves_nothing_behind(tmp_path: Path, founding: Founding) -> None:
    with pytest.raises(CosiloError):
        found_federation(tmp_path / "f", founding, NOW)
    assert not (tmp_path / "f").exists() or not list((tmp_path / "f").iterdir())


def test_a_sites_certificate_is_for_tls_clients_and_names_the_site_alone(founded: Founded) -> None:
    chain = founded.authority.issue_site_certificate(make_csr(make_tls_key(), ANNA), "st-anna", NOW)
    leaf, intermediate = read_chain(chain)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier("spiffe://north-star/site/st-anna")]
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.not_valid_before_utc == NOW - timedelta(hours=1)
    assert leaf.not_valid_after_utc == NOW + timedelta(days=90)
    assert intermediate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_the_coordinators_certificate_alone_may_serve(founded: Founded) -> None:
    leaf = read_chain(founded.coordinator.tls.certificate.read_bytes())[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [
        x509.UniformResourceIdentifier("spiffe://north-star/coordinator"),
        x509.DNSName("coordinator.cosilo"),
    ]
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ]


def test_an_admins_certificate_is_an_admins(founded: Founded) -> None:
    name = PeerName(FEDERATION, Role.ADMIN, "bea")
    chain = founded.authority.issue_admin_certificate(make_csr(make_tls_key(), name), "bea", NOW)
    assert peer_from_certificate(chain).name == name


def test_the_longest_name_fits(founded: Founded) -> None:
    """LESSONS.md, OpenFL#1012: long names break the CN."""
    name = PeerName(FEDERATION, Role.SITE, "a" * 63)
    chain = founded.authority.issue_site_certificate(make_csr(make_tls_key(), name), name.name, NOW)
    assert check_chain(chain, founded.authority.root_pem, name, NOW).subject == subject_of(name)


def test_no_leaf_outlives_its_issuer(founded: Founded) -> None:
    ends = read_chain((founded.directory / "coordinator" / "intermediate.crt").read_bytes())[0].not_valid_after_utc
    late = ends - timedelta(days=1)
    chain = founded.authority.issue_site_certificate(make_csr(make_tls_key(), ANNA), "st-anna", late)
    assert read_chain(chain)[0].not_valid_after_utc == ends
    with pytest.raises(CosiloError, match=r"the intermediate expired .*; have an admin run cosilo ca renew"):
        founded.authority.issue_site_certificate(make_csr(make_tls_key(), ANNA), "st-anna", ends)


def test_a_request_for_another_name_or_role_is_refused(founded: Founded) -> None:
    csr = make_csr(make_tls_key(), ANNA)
    with pytest.raises(CosiloError, match=r"it asks for spiffe://north-star/site/st-anna, not for .*/site/st-olav"):
        founded.authority.issue_site_certificate(csr, "st-olav", NOW)
    with pytest.raises(CosiloError, match="not for spiffe://north-star/admin/st-anna"):
        founded.authority.issue_admin_certificate(csr, "st-anna", NOW)


def test_of_a_request_only_the_key_is_used(founded: Founded) -> None:
    """A request may ask to be a CA and a server; the certificate is a site's all the same."""
    key = make_tls_key()
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ANNA.uri()), x509.DNSName("coordinator.cosilo")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of(coordinator_name(FEDERATION)))
    builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    leaf = read_chain(founded.authority.issue_site_certificate(csr, "st-anna", NOW))[0]
    assert list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == [x509.UniformResourceIdentifier(ANNA.uri())]
    assert leaf.subject == subject_of(ANNA)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_request_by_a_key_that_is_not_held_is_refused() -> None:
    """The signature of one request under the key of another: who sends it cannot have the key."""
    key, victims = make_tls_key(), make_tls_key()
    mine = make_csr(key, ANNA)
    forged = mine.replace(tls_public_bytes(key), tls_public_bytes(victims))
    assert forged != mine
    with pytest.raises(CosiloError, match="its signature does not hold, so the sender may not have the key"):
        read_csr(forged, ANNA)


def test_requests_of_other_shapes_are_refused() -> None:
    def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *uris: str) -> bytes:
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        if uris:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)

    cases = {
        "its key is not ECDSA P-256": csr(rsa.generate_private_key(65537, 2048), ANNA.uri()),
        "its key is not ECDSA P-256 ": csr(ec.generate_private_key(ec.SECP384R1()), ANNA.uri()),
        "carries 0 URI names": csr(make_tls_key()),
        "carries 2 URI names": csr(make_tls_key(), ANNA.uri(), ANNA.uri()),
        "it does not parse": b"\x30\x03\x02\x01\x00",
        "bytes are more than 4096": bytes(CSR_BYTES_MAX + 1),
    }
    for reason, der in cases.items():
        with pytest.raises(CosiloError, match=reason.strip()):
            read_csr(der, ANNA)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_request_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(CosiloError):
        read_csr(data, ANNA)


def test_a_chain_of_another_ca_is_refused(founded: Founded, tmp_path: Path) -> None:
    other = found(tmp_path / "other")
    chain = other.authority.issue_site_certificate(make_csr(make_tls_key(), ANNA), "st-anna", NOW)
    with pytest.raises(CosiloError, match="check that it was issued by this federation's CA"):
        check_chain(chain, founded.authority.root_pem, ANNA, NOW)


def test_a_leaf_without_its_intermediate_is_refused(founded: Founded) -> None:
    chain = founded.authority.issue_site_certificate(make_csr(make_tls_key(), ANNA), "st-anna", NOW)
    leaf = read_chain(chain)[0].public_bytes(Encoding.PEM)
    with pytest.raises(CosiloError, match="check that it was issued by this federation's CA"):
        check_chain(leaf, founded.authority.root_pem, ANNA, NOW)


def test_a_chain_is_checked_for_name_key_and_time(founded: Founded) -> None:
    key = make_tls_key()
    chain = founded.authority.issue_site_certificate(make_csr(key, ANNA), "st-anna", NOW)
    ca = founded.authority.root_pem
    assert check_issued(chain, ca, key, ANNA, NOW) == read_chain(chain)[0]
    with pytest.raises(CosiloError, match="site st-anna: it is for another key"):
        check_issued(chain, ca, make_tls_key(), ANNA, NOW)
    with pytest.raises(CosiloError, match=r"it is for spiffe://north-star/site/st-anna, not for .*/site/st-olav"):
        check_chain(chain, ca, PeerName(FEDERATION, Role.SITE, "st-olav"), NOW)
    with pytest.raises(CosiloError, match="site st-anna: certificate expired"):
        check_chain(chain, ca, ANNA, NOW + timedelta(days=91))
    with pytest.raises(CosiloError, match=r"certificate is not valid before .*; set this machine's clock"):
        check_chain(chain, ca, ANNA, NOW - timedelta(days=1))


def test_a_sites_certificate_cannot_issue_another(founded: Founded) -> None:
    key = make_tls_key()
    chain = founded.authority.issue_site_certificate(make_csr(key, ANNA), "st-anna", NOW)
    rogue = Authority(FEDERATION, read_chain(chain)[0], key, founded.authority.root_pem)
    olav = PeerName(FEDERATION, Role.SITE, "st-olav")
    forged = rogue.issue_site_certificate(make_csr(make_tls_key(), olav), "st-olav", NOW) + chain
    with pytest.raises(CosiloError, match="check that it was issued by this federation's CA"):
        check_chain(forged, founded.authority.root_pem, olav, NOW)


@pytest.mark.parametrize("pem", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\n", bytes(64 * 1024 + 1)])
def test_what_is_no_chain_is_refused(pem: bytes) -> None:
    with pytest.raises(CosiloError, match=r"^read certificate: "):
        read_chain(pem)


def test_an_authority_with_mixed_files_does_not_open(founded: Founded, tmp_path: Path) -> None:
    other = found(tmp_path / "other")
    (other.directory / "coordinator" / "intermediate.crt").write_bytes(
        (founded.directory / "coordinator" / "intermediate.crt").read_bytes()
    )
    with pytest.raises(CosiloError, match=r"intermediate\.key is not the key of intermediate\.crt"):
        Authority.load(other.directory / "coordinator")


def test_the_coordinators_certificate_can_be_made_anew(founded: Founded) -> None:
    key = load_tls_key(founded.coordinator.tls.key)
    later = datetime(2030, 1, 1, tzinfo=UTC) if NOW.year < 2030 else NOW
    chain = founded.authority.issue_coordinator_certificate(key.public_key(), later)
    assert check_issued(chain, founded.authority.root_pem, key, coordinator_name(FEDERATION), later)


def test_an_authority_does_not_show_its_key(founded: Founded) -> None:
    assert repr(founded.authority) == "Authority('north-star')"


def test_a_folder_that_is_nobodys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="is not an identity folder"):
        load_identity(tmp_path)


def test_newer_members_are_kept_and_older_refused(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    v1 = founded.members
    v2 = sign_members(v1, v1.draft().approve("st-anna", Role.SITE, public_bytes(make_signing_key())), ADMIN, founded.admin_key)
    assert founded.coordinator.take_members(v2.canonical()) == v2
    assert founded.coordinator.members() == v2
    with pytest.raises(CosiloError, match="version 1: version 2 was seen before"):
        founded.coordinator.take_members(v1.canonical())
    assert founded.coordinator.members() == v2
