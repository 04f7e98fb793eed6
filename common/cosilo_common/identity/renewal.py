"""Certificates that renew themselves: when one is due, the request for the next, and how it takes the old one's place.

The TLS key stays (it lives in the party's folder); the new chain replaces the old one in one rename, so whoever opens a connection reads a
matching pair at every moment, and a connection that stands goes on. A certificate that has expired cannot ask: then a new invitation is needed.
Must not know sockets or the clock (`now` is passed in).
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from cosilo_common.identity.certificates import CHAIN_BYTES_MAX, check_issued, make_csr, read_chain
from cosilo_common.identity.folder import Identity
from cosilo_common.identity.keys import load_tls_key
from cosilo_common.identity.names import peer_from_certificate
from cosilo_common.identity.secret_files import read_public, replace_file
from cosilo_common.identity.trust import SignedTrust, pem_of

DUE_AFTER_SHARE = 2 / 3  # of a certificate's life: of 90 days, 30 are left for a site that is away or an alert that is read late


def renewal_due(identity: Identity, now: datetime) -> bool:
    """Whether two thirds of the certificate's life have passed at `now` (aware)."""
    leaf = read_chain(read_public(identity.tls.certificate, CHAIN_BYTES_MAX))[0]
    life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    return now >= leaf.not_valid_before_utc + life * DUE_AFTER_SHARE


def superseded(identity: Identity) -> bool:
    """Whether the certificate is of an intermediate that the trust document no longer puts first, or of a root that goes:
    then it is renewed at once, since it will not count for long."""
    trust = identity.trust()
    if trust is None:
        return False
    chain = read_chain(read_public(identity.tls.certificate, CHAIN_BYTES_MAX))
    if peer_from_certificate(pem_of(chain[0]).encode()).issuer != trust.trust.issuers[0]:
        return True
    return not _signed_by_newest(chain[-1], trust)  # of an enrolment in the overlap: signed over by the old root


def renewal_request(identity: Identity) -> bytes:
    """A certificate request (PKCS#10, DER) for the party's own TLS key and name."""
    return make_csr(load_tls_key(identity.tls.key), identity.peer)


def take_renewed(identity: Identity, chain_pem: bytes, now: datetime) -> datetime:
    """Puts a new chain in the old one's place and returns when it ends.

    Raises CosiloError, and leaves the old one, unless it is for our key and name, by our CA, and valid at `now` (aware).
    """
    ca = read_public(identity.tls.ca, CHAIN_BYTES_MAX)
    leaf = check_issued(chain_pem, ca, load_tls_key(identity.tls.key), identity.peer, now)
    replace_file(identity.tls.certificate, chain_pem)
    return leaf.not_valid_after_utc


def _signed_by_newest(top: x509.Certificate, trust: SignedTrust) -> bool:
    try:
        top.verify_directly_issued_by(trust.trust.root_certificates()[0])
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
