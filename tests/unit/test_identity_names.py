"""Names, roles, and how certificates carry them."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import read_chain
from cosilo_common.identity.keys import make_tls_key
from cosilo_common.identity.names import (
    CERTIFICATE_BYTES_MAX,
    Peer,
    PeerName,
    Role,
    coordinator_name,
    expect_peer,
    is_current,
    parse_uri,
    peer_from_certificate,
)
from tests.identity_parties import found

NAMES = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)
BEGINS = datetime(2026, 1, 1, tzinfo=UTC)
ENDS = BEGINS + timedelta(days=90)
KEY = make_tls_key()


def certificate(*names: x509.GeneralName, ca: bool | None = False) -> bytes:
    """A self-signed certificate with these alternative names."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "spiffe://f/site/from-the-common-name")])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(KEY.public_key())
    builder = builder.serial_number(77).not_valid_before(BEGINS).not_valid_after(ENDS)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.PEM)


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (PeerName("north-star", Role.SITE, "st-anna"), "spiffe://north-star/site/st-anna"),
        (PeerName("north-star", Role.ADMIN, "ada"), "spiffe://north-star/admin/ada"),
        (coordinator_name("north-star"), "spiffe://north-star/coordinator"),
        (PeerName("f", Role.SITE, "coordinator"), "spiffe://f/site/coordinator"),
    ],
)
def test_a_name_and_its_uri(name: PeerName, text: str) -> None:
    assert name.uri() == text
    assert parse_uri(text) == name


@given(NAMES, st.sampled_from([Role.SITE, Role.ADMIN]), NAMES)
def test_every_name_comes_back_from_its_uri(federation: str, role: Role, name: str) -> None:
    peer = PeerName(federation, role, name)
    assert parse_uri(peer.uri()) == peer


@given(st.text() | st.builds("spiffe://{}".format, st.text("/ab-:%?#.A\n", max_size=40)))
def test_a_uri_parses_to_what_writes_it_or_not_at_all(text: str) -> None:
    try:
        name = parse_uri(text)
    except CosiloError:
        return
    assert name.uri() == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe://f",
        "spiffe://f/",
        "spiffe://f/site",
        "spiffe://f/site/",
        "spiffe://f/site/a/",
        "spiffe://f/site/a/b",
        "spiffe://f/site/A",
        "spiffe://f/site/a ",
        "spiffe://f/site/a\n",
        "spiffe://f/site/a%2Fb",
        "spiffe://f/site/a?x",
        "spiffe://f/site/" + "a" * 64,
        "spiffe:///site/a",
        "spiffe://f:1/site/a",
        "spiffe://u@f/site/a",
        "spiffe://f/coordinator/a",
        "spiffe://f/coordinator/",
        "spiffe://f/owner/a",
        "spiffe://f/site/.",
        "SPIFFE://f/site/a",
        "https://f/site/a",
        "spiffe://f/site/" + "a" * 1000,
    ],
)
def test_what_does_not_name_a_party_is_refused(text: str) -> None:
    with pytest.raises(CosiloError, match="does not name a party; its shape is spiffe://FEDERATION/site/NAME"):
        parse_uri(text)


def test_a_coordinator_has_one_name() -> None:
    with pytest.raises(CosiloError, match="a coordinator is named 'coordinator', not 'other'"):
        PeerName("f", Role.COORDINATOR, "other")


@pytest.mark.parametrize("name", ["", "A", "a.b", "a/b", "a" * 64, "é", "a\n"])
def test_a_name_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(CosiloError, match=r"^name a party: "):
        PeerName("f", Role.SITE, name)
    with pytest.raises(CosiloError, match=r"^name a party: "):
        PeerName(name, Role.SITE, "a")


def test_a_certificate_names_its_party() -> None:
    pem = certificate(uri("spiffe://f/site/st-anna"), x509.DNSName("ignored.example"))
    assert peer_from_certificate(pem) == Peer(PeerName("f", Role.SITE, "st-anna"), serial=77, not_after=ENDS)


def test_a_certificate_without_basic_constraints_is_a_leaf() -> None:
    assert peer_from_certificate(certificate(uri("spiffe://f/site/a"), ca=None)).name.name == "a"


@pytest.mark.parametrize(
    ("pem", "reason"),
    [
        (certificate(), "it carries 0 URI names"),
        (certificate(x509.DNSName("st-anna.example")), "it carries 0 URI names"),
        (certificate(uri("spiffe://f/site/a"), uri("spiffe://f/admin/a")), "it carries 2 URI names"),
        (certificate(uri("spiffe://f/site/a"), uri("spiffe://f/site/a")), "it carries 2 URI names"),
        (certificate(uri("https://f/site/a")), "'https://f/site/a' does not name a party"),
        (certificate(uri("spiffe://f/site/a"), ca=True), "stands in a CA's certificate"),
        (b"", "it does not parse"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "it does not parse"),
        (certificate(uri("spiffe://f/site/a")).replace(b"M", b"N", 3), "it does not parse"),
        (bytes(CERTIFICATE_BYTES_MAX + 1), "16385 bytes are more than 16384"),
    ],
)
def test_a_certificate_that_names_nobody_is_refused(pem: bytes, reason: str) -> None:
    with pytest.raises(CosiloError, match=reason):
        peer_from_certificate(pem)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_certificate_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(CosiloError):
        peer_from_certificate(data)


def test_expect_peer_checks_federation_and_role() -> None:
    peer = Peer(PeerName("f", Role.SITE, "a"), serial=1, not_after=ENDS)
    assert expect_peer(peer, "f", Role.ADMIN, Role.SITE) == peer.name
    with pytest.raises(CosiloError, match="spiffe://f/site/a is not of federation 'g'"):
        expect_peer(peer, "g", Role.SITE)
    with pytest.raises(CosiloError, match="spiffe://f/site/a is not a coordinator or admin"):
        expect_peer(peer, "f", Role.COORDINATOR, Role.ADMIN)


def test_a_certificate_is_current_to_its_last_second() -> None:
    peer = Peer(PeerName("f", Role.SITE, "a"), serial=1, not_after=ENDS)
    assert is_current(peer, ENDS)
    assert not is_current(peer, ENDS + timedelta(seconds=1))


def test_a_certificate_of_a_version_that_is_none_does_not_parse(tmp_path: Path) -> None:
    """Found by fuzzing: `cryptography` raises a plain Exception for it, which was an answer of UNKNOWN to whoever sent such a request."""
    pem = found(tmp_path / "f").coordinator.tls.certificate.read_bytes()
    leaf = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    assert leaf.count(bytes.fromhex("a003020102")) == 1  # [0] EXPLICIT INTEGER 2: version 3
    odd = leaf.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020107"))
    armour = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(odd) + b"-----END CERTIFICATE-----\n"
    for read in (peer_from_certificate, read_chain):
        with pytest.raises(CosiloError, match="read certificate"):
            read(armour)
