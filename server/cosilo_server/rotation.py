"""The coordinator's part in a change of its CA: it makes the next intermediate's key, and puts in force what an admin signed.

What it may not do is decide: every trust document is verified as a site would verify it. A change is on the disk whole
(`rotation.json`) before any part of it is in its place, and a start after a crash finishes it. Must not know sockets or
protobuf, nor the clock (`now` is passed in).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX, certified_key, check_lifetime, make_csr, read_chain
from cosilo_common.identity.documents import Document, parse_document
from cosilo_common.identity.folder import TRUST_FILE, Identity
from cosilo_common.identity.keys import load_tls_key, make_tls_key, save_private_key, tls_public_bytes
from cosilo_common.identity.renewal import take_renewed
from cosilo_common.identity.secret_files import read_public, replace_file, sync_folder
from cosilo_common.identity.trust import TRUST_BYTES_MAX, SignedTrust, key_id, read_trust
from cosilo_server.authority import (
    CROSS_CERTIFICATE_FILE,
    INTERMEDIATE_CERTIFICATE_FILE,
    INTERMEDIATE_KEY_FILE,
    NEXT_KEY_FILE,
    Authority,
)
from cosilo_server.membership import check_not_far_ahead

CHANGE_FILE = "rotation.json"
CHANGE_BYTES_MAX = 4 * TRUST_BYTES_MAX


class _Change(Document):
    """A change as an admin sent it. Certificates are PEM, or empty."""

    trust: str = Field(max_length=2 * TRUST_BYTES_MAX)
    intermediate: str = Field(max_length=CHAIN_BYTES_MAX)
    cross: str = Field(max_length=CHAIN_BYTES_MAX)


class Rotation:
    """The trust document in force, and the way to the next. admins: Ed25519 public keys by name, of the newest list."""

    def __init__(self, identity: Identity, authority: Authority, admins: Callable[[], dict[str, bytes]], now: datetime) -> None:
        self._identity = identity
        self._authority = authority
        self._admins = admins
        self._lock = threading.Lock()
        self._changed: Callable[[], None] = lambda: None
        pending = identity.folder / CHANGE_FILE
        if pending.exists():  # killed in the middle of a change that had been verified
            change = parse_document(_Change, read_public(pending, CHANGE_BYTES_MAX), CHANGE_BYTES_MAX, f"read {CHANGE_FILE}")
            self._apply(change, now)
        identity.settle_trust()
        self._trust = identity.trust()

    def on_change(self, changed: Callable[[], None]) -> None:
        """Called, from whichever thread, after another document is in force."""
        self._changed = changed

    def data(self) -> bytes:
        """The document as it travels; empty before the first rotation."""
        return b"" if self._trust is None else self._trust.canonical()

    def version(self) -> int:
        """The document's version, 0 before the first."""
        return 0 if self._trust is None else self._trust.version

    def issuers(self) -> tuple[str, ...]:
        """The intermediates whose certificates count, newest first; empty while every one does."""
        return () if self._trust is None else self._trust.trust.issuers

    def roots(self) -> list[x509.Certificate]:
        """The roots in force, newest first."""
        return read_chain(read_public(self._identity.tls.ca, CHAIN_BYTES_MAX))

    def request(self) -> bytes:
        """A certificate request (PKCS#10, DER) for the next intermediate's key, which is made now unless it waits already."""
        with self._lock:
            path = self._identity.folder / NEXT_KEY_FILE
            if not path.exists():
                save_private_key(path, make_tls_key())
            return make_csr(load_tls_key(path), self._identity.peer)

    def put(self, trust: bytes, intermediate: bytes, cross: bytes, now: datetime) -> None:
        """Puts the next document in force, and the intermediate with it. Durable on return. Raises CosiloError, and changes
        nothing, where a signature does not hold, the version does not follow, or a certificate is not what the document says.
        """
        with self._lock:
            ca = read_public(self._identity.tls.ca, CHAIN_BYTES_MAX)
            offered = read_trust(trust, self._identity.membership.federation, self._admins(), ca, self._trust)
            if self._trust is not None and offered == self._trust:
                return  # sent again after an answer that was lost
            check_not_far_ahead("change CA", offered.version, self.version())
            self._check(offered, intermediate, cross, now)
            change = _Change(trust=trust.decode(), intermediate=intermediate.decode(), cross=cross.decode())
            replace_file(self._identity.folder / CHANGE_FILE, change.canonical())
            self._apply(change, now)
            self._trust = offered
        self._changed()

    def _check(self, offered: SignedTrust, intermediate: bytes, cross: bytes, now: datetime) -> None:
        roots = offered.trust.root_certificates()
        issuer = self._authority.intermediate
        if intermediate:
            issuer = self._one(intermediate)
            _check_signed(issuer, roots[0], now)
            following = self._identity.folder / NEXT_KEY_FILE
            if not following.exists() or certified_key(issuer) != tls_public_bytes(load_tls_key(following)):
                raise _refused("the intermediate is not for the key that waits here", "run the command again")
        if key_id(issuer) != offered.trust.issuers[0]:
            raise _refused("its first issuer is not the intermediate")
        if not intermediate:
            _check_signed(issuer, roots[0], now)
        if offered.trust.overlap and not (cross or (not intermediate and (self._identity.folder / CROSS_CERTIFICATE_FILE).exists())):
            raise _refused("two roots, and no intermediate signed by the one that goes")
        if cross:
            other = self._one(cross)
            if not offered.trust.overlap or not intermediate:
                raise _refused("a certificate of a root that goes, where none goes")
            _check_signed(other, roots[-1], now)
            if certified_key(other) != certified_key(issuer) or other.subject != issuer.subject or key_id(other) != key_id(issuer):
                raise _refused("the two intermediates do not stand for each other")

    def _one(self, pem: bytes) -> x509.Certificate:
        chain = read_chain(pem)
        if len(chain) != 1 or not isinstance(chain[0].public_key(), ec.EllipticCurvePublicKey):
            raise _refused("an intermediate is one certificate of an EC key")
        return chain[0]

    def _apply(self, change: _Change, now: datetime) -> None:
        """In an order in which every prefix serves: trust widens first; each step may be taken twice."""
        folder, trust = self._identity.folder, parse_document(SignedTrust, change.trust.encode(), TRUST_BYTES_MAX, "read trust document")
        if change.cross:
            replace_file(folder / CROSS_CERTIFICATE_FILE, change.cross.encode())
        if trust.trust.overlap:
            self._trust_roots(trust)
        if change.intermediate:
            replace_file(folder / INTERMEDIATE_CERTIFICATE_FILE, change.intermediate.encode())
            if (folder / NEXT_KEY_FILE).exists():
                key = load_tls_key(folder / NEXT_KEY_FILE)
                if tls_public_bytes(key) == certified_key(read_chain(change.intermediate.encode())[0]):
                    (folder / NEXT_KEY_FILE).replace(folder / INTERMEDIATE_KEY_FILE)
                    sync_folder(folder)
        if not trust.trust.overlap:
            with suppress(FileNotFoundError):
                (folder / CROSS_CERTIFICATE_FILE).unlink()
        self._authority.reload(folder)
        own = load_tls_key(self._identity.tls.key)
        take_renewed(self._identity, self._authority.issue_coordinator_certificate(own.public_key(), now), now)
        if not trust.trust.overlap:
            self._trust_roots(trust)  # narrows last: our own certificate leads to the root that stays
        self._authority.reload(folder)
        (folder / CHANGE_FILE).unlink(missing_ok=True)
        sync_folder(folder)

    def _trust_roots(self, trust: SignedTrust) -> None:
        replace_file(self._identity.folder / TRUST_FILE, trust.canonical())
        self._identity.settle_trust()


def describe_expiry(roots: list[x509.Certificate], intermediate: x509.Certificate) -> dict[str, float]:
    """When each part of the CA ends, UTC seconds, by the subject that the metric has."""
    found = {"intermediate": intermediate.not_valid_after_utc.timestamp(), "root": roots[0].not_valid_after_utc.timestamp()}
    if len(roots) > 1:
        found["root/old"] = roots[-1].not_valid_after_utc.timestamp()
    return found


def _check_signed(issuer: x509.Certificate, root: x509.Certificate, now: datetime) -> None:
    try:
        issuer.verify_directly_issued_by(root)
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
    except Exception:  # its exceptions differ by how a certificate is wrong; what matters is that it is
        raise _refused("an intermediate is not signed by its root") from None
    if not constraints.ca or constraints.path_length != 0:
        raise _refused("an intermediate may sign leaves, and nothing that signs")
    check_lifetime(issuer, "intermediate", now)


def _refused(reason: str, hint: str = "make it with cosilo ca, of the coordinator's release") -> CosiloError:
    return CosiloError("change CA", reason, hint)
