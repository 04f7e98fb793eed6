"""Membership without an admin at the keyboard, for `--local-demo` only: admin -> token key -> site key.

An admin signs, at invite time, that whoever holds one token may join under one name; the token's key later signs the
site's own key. Anybody who knows the admin's key can check that chain, so a coordinator that appends such an entry to a
members list invents nothing. The expiry is enforced by the coordinator's clock when the site enrols, and by nobody
afterwards (sites judge nothing by their clocks).
Must not know the members list, files or sockets.
"""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.canonical import lp, u64
from cosilo_common.identity.documents import Bytes32, Bytes64, Document, Name, UnixSeconds, parse_document
from cosilo_common.identity.keys import signature_holds
from cosilo_common.identity.names import Role

PREAPPROVAL_BYTES_MAX = 4 * 1024  # canonical JSON of five short fields and a signature is under 600 bytes


class Preapproval(Document):
    """An admin's word that the holder of one token joins as a site under this name.

    token_public: Ed25519, 32 bytes; expires_unix_s: UTC; admin: who signed; signature: Ed25519, 64 bytes.
    """

    federation: Name
    name: Name
    token_public: Bytes32
    expires_unix_s: UnixSeconds
    admin: Name
    signature: Bytes64

    def statement(self) -> bytes:
        """What the admin signs."""
        return preapproval_statement(self.federation, self.name, self.token_public, self.expires_unix_s)

    def holds(self, admins: Mapping[str, bytes]) -> bool:
        """Whether one of these admins (Ed25519 public keys by name), the one it names, signed it."""
        key = admins.get(self.admin)
        return key is not None and signature_holds(key, self.signature, self.statement())


class Endorsement(Document):
    """A pre-approved site's entry, with the chain that proves it.

    signing_key: the site's Ed25519 public key; csr_digest: SHA-256 of its certificate request; token_signature,
    signing_signature: over `enrolment_statement`, by the token and by the site's own key.
    """

    preapproval: Preapproval
    signing_key: Bytes32
    csr_digest: Bytes32
    token_signature: Bytes64
    signing_signature: Bytes64

    @property
    def name(self) -> str:
        """The site's name."""
        return self.preapproval.name

    def holds(self, federation: str, admins: Mapping[str, bytes]) -> bool:
        """Whether every link of the chain verifies, from one of these admins (Ed25519 public keys by name) down to the
        site's key."""
        token = self.preapproval.token_public
        statement = enrolment_statement(federation, Role.SITE, self.name, token, self.csr_digest, self.signing_key)
        return (
            self.preapproval.federation == federation
            and self.preapproval.holds(admins)
            and signature_holds(token, self.token_signature, statement)
            and signature_holds(self.signing_key, self.signing_signature, statement)
        )


def preapproval_statement(federation: str, name: str, token_public: bytes, expires_unix_s: int) -> bytes:
    """What an admin signs to pre-approve a site."""
    return lp(b"cosilo/preapproval/1", federation.encode(), name.encode(), token_public, u64(expires_unix_s))


def enrolment_statement(federation: str, role: Role, name: str, token_public: bytes, csr_digest: bytes, signing_key: bytes) -> bytes:
    """What both the token's key and the new party's own key sign: this name, in this role, has these keys."""
    return lp(
        b"cosilo/enrol/1",
        federation.encode(),
        role.value.encode(),
        name.encode(),
        token_public,
        csr_digest,
        signing_key,
    )


def preapprove(federation: str, name: str, token_public: bytes, expires_unix_s: int, admin: str, key: Ed25519PrivateKey) -> Preapproval:
    """Signs a pre-approval as this admin. Only for federations on one machine: an admin who reads no fingerprint checks
    nothing."""
    signature = key.sign(preapproval_statement(federation, name, token_public, expires_unix_s))
    return Preapproval(
        federation=federation,
        name=name,
        token_public=token_public,
        expires_unix_s=expires_unix_s,
        admin=admin,
        signature=signature,
    )


def parse_preapproval(data: bytes) -> Preapproval:
    """Reads a pre-approval's canonical bytes; verifies nothing yet."""
    return parse_document(Preapproval, data, PREAPPROVAL_BYTES_MAX, "read pre-approval")
