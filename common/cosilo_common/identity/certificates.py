"""Certificate requests and chain checks: what may be asked of the federation's CA, and what may be believed of an
answer.

Verification is the `cryptography` package's RFC 5280 path building; nothing here walks a chain by hand. Must not know
files, sockets or the clock (`now` is passed in).
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import TlsKey, fingerprint, tls_public_bytes
from cosilo_common.identity.names import (
    CERTIFICATE_BYTES_MAX,
    UNPARSABLE,
    PeerName,
    Role,
    name_in_extensions,
    peer_from_certificate,
)

COORDINATOR_DNS_NAME: Final = "coordinator.cosilo"
"""The one DNS name a coordinator's certificate carries, whatever its address: clients check for it, and no site's
certificate has it."""

CSR_BYTES_MAX = 4 * 1024  # a P-256 request with one URI is under 400 bytes
CHAIN_BYTES_MAX = 64 * 1024  # a leaf, an intermediate and the four that somebody's own PKI may put between
CHAIN_CERTIFICATES_MAX = 6
INTERMEDIATES_MAX = 4  # between a leaf and the root, for somebody's own PKI; Cosilo's has one


def make_csr(key: TlsKey, name: PeerName) -> bytes:
    """A certificate request (PKCS#10, DER) for this key under this name."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of(name))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name.uri())])
    return builder.add_extension(names, critical=False).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def read_csr(der: bytes, name: PeerName) -> ec.EllipticCurvePublicKey:
    """The key that a certificate request asks for, once it proves to hold it.

    Of a request only the key is ever used: names, usages and lifetimes are the authority's to set. Raises CosiloError
    unless it is DER of at most CSR_BYTES_MAX bytes, for a P-256 key, signed by that key, and asks for exactly this
    name.
    """
    if len(der) > CSR_BYTES_MAX:
        raise _bad_csr(f"{len(der)} bytes are more than {CSR_BYTES_MAX}")
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        signed = request.is_signature_valid
        asked = name_in_extensions(request.extensions)
    except (*UNPARSABLE, InvalidSignature):
        raise _bad_csr("it does not parse") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _bad_csr("its key is not ECDSA P-256")
    if not signed:
        raise _bad_csr("its signature does not hold, so the sender may not have the key")
    if asked != name:
        raise _bad_csr(f"it asks for {asked.uri()}, not for {name.uri()}")
    return key


def check_chain(chain_pem: bytes, ca_pem: bytes, name: PeerName, now: datetime) -> x509.Certificate:
    """The leaf of a chain, once it is found to lead to this CA, to be valid at `now`, to be for this role's use, and to
    name this party.

    chain_pem: leaf first, then intermediates; ca_pem: one or more trusted roots; now: aware. Raises CosiloError with
    what does not hold.
    """
    chain = read_chain(chain_pem)
    roots = read_chain(ca_pem)
    leaf = chain[0]
    found = peer_from_certificate(leaf.public_bytes(Encoding.PEM)).name
    if found != name:
        raise CosiloError("check certificate", f"it is for {found.uri()}, not for {name.uri()}", "check that it is the right file")
    check_lifetime(leaf, name, now)
    builder = PolicyBuilder().store(Store(roots)).time(now).max_chain_depth(INTERMEDIATES_MAX)
    try:
        if name.role is Role.COORDINATOR:
            builder.build_server_verifier(x509.DNSName(COORDINATOR_DNS_NAME)).verify(leaf, chain[1:])
        else:
            builder.build_client_verifier().verify(leaf, chain[1:])
    except VerificationError as error:
        reason = str(error).splitlines()[0][:200] if str(error) else "no path to the CA"
        raise CosiloError("check certificate", f"{name}: {reason}", "check that it was issued by this federation's CA") from None
    return leaf


def check_issued(chain_pem: bytes, ca_pem: bytes, key: TlsKey, name: PeerName, now: datetime) -> x509.Certificate:
    """`check_chain`, and that the leaf is for our own key."""
    leaf = check_chain(chain_pem, ca_pem, name, now)
    if certified_key(leaf) != tls_public_bytes(key):
        raise CosiloError("check certificate", f"{name}: it is for another key", "enrol again with a new invitation")
    return leaf


def check_lifetime(certificate: x509.Certificate, subject: object, now: datetime) -> None:
    """Raises CosiloError, with both dates, unless the certificate is valid at `now` (aware)."""
    if now > certificate.not_valid_after_utc:
        day = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        raise CosiloError(
            "check certificate",
            f"{subject}: certificate expired {day}",
            "ask an admin for an invitation and enrol again",
        )
    if now < certificate.not_valid_before_utc:
        day = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise CosiloError(
            "check certificate",
            f"{subject}: certificate is not valid before {day}",
            f"set this machine's clock: it says {now:%Y-%m-%d %H:%M}",
        )


def read_chain(pem: bytes) -> list[x509.Certificate]:
    """One to CHAIN_CERTIFICATES_MAX certificates in PEM. Raises CosiloError otherwise."""
    if len(pem) > CHAIN_BYTES_MAX:
        raise CosiloError("read certificate", f"{len(pem)} bytes are more than {CHAIN_BYTES_MAX}")
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except UNPARSABLE:
        raise CosiloError("read certificate", "it is not a certificate in PEM", "check that it is the right file") from None
    if len(chain) > CHAIN_CERTIFICATES_MAX:
        raise CosiloError("read certificate", f"{len(chain)} certificates are more than {CHAIN_CERTIFICATES_MAX}")
    if any(len(certificate.public_bytes(Encoding.PEM)) > CERTIFICATE_BYTES_MAX for certificate in chain):
        raise CosiloError("read certificate", f"one has more than {CERTIFICATE_BYTES_MAX} bytes")
    return chain


def certified_key(certificate: x509.Certificate) -> bytes:
    """The key that a certificate is for, as DER (SubjectPublicKeyInfo)."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def certificate_fingerprint(pem: bytes) -> str:
    """The short fingerprint of a certificate in PEM, over its DER form; of a chain, the first certificate's."""
    return fingerprint(read_chain(pem)[0].public_bytes(Encoding.DER))


def subject_of(name: PeerName) -> x509.Name:
    """The subject of a party's certificate: for people who look at it. Nothing reads it; a name has at most 63
    characters, and a CN may have 64."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name.name)])


def _bad_csr(reason: str) -> CosiloError:
    return CosiloError("read certificate request", reason, "run the enrolment again with this version of Cosilo")
