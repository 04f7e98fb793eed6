"""Which CA a federation trusts, as a signed document with a version: how its CA is replaced without anybody enrolling again.

A CA's successor is believed for two signatures: the old root's key vouches for the new root, and an admin signs the
whole document. The coordinator holds neither key, so it can carry a trust document and cannot make one. While two roots
stand in it (the overlap) both are trusted; a version with one root ends that. Before its first rotation a federation
has no such document: `ca.crt`, from the invitation, is then the whole of its trust.
Must not know files, sockets or the clock.
"""

from __future__ import annotations

from typing import Annotated, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field, StringConstraints, model_validator

from cosilo_common.canonical import lp, sha256, u64
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import read_chain
from cosilo_common.identity.documents import Bytes32, Bytes64, Document, Name, Version, parse_document
from cosilo_common.identity.keys import TlsKey, public_bytes, signature_holds
from cosilo_common.identity.names import CERTIFICATE_BYTES_MAX

ROOTS_MAX = 2  # the one that comes and the one that goes: a second rotation waits until the first has ended
ISSUERS_MAX = 8  # intermediates whose certificates are still good; each overlap adds one, `cosilo ca retire` drops them
TRUST_BYTES_MAX = 64 * 1024  # two certificates of at most 16 KiB each and some hex

KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
"""The subject key identifier of an intermediate, as the certificates that it signed name it (RFC 5280, 4.2.1.1)."""


class Trust(Document):
    """One version of what is trusted.

    roots: certificates in PEM, newest first; issuers: key identifiers of the intermediates whose certificates count,
    newest first: what carries another's is renewed, and refused once it is not in the list.
    """

    version: Version
    federation: Name
    roots: tuple[Annotated[str, Field(max_length=CERTIFICATE_BYTES_MAX)], ...] = Field(min_length=1, max_length=ROOTS_MAX)
    issuers: tuple[KeyId, ...] = Field(min_length=1, max_length=ISSUERS_MAX)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            found = self.root_certificates()
        except CosiloError as error:
            raise ValueError(f"roots: {error.subject}") from None
        if len({root_digest(root) for root in found}) != len(self.roots) or len(set(self.issuers)) != len(self.issuers):
            raise ValueError("roots and issuers: each once")
        return self

    def root_certificates(self) -> list[x509.Certificate]:
        """The roots, newest first. Raises CosiloError where one is not exactly one CA certificate."""
        found = []
        for pem in self.roots:
            chain = read_chain(pem.encode())
            if len(chain) != 1 or pem_of(chain[0]) != pem:
                raise CosiloError("read trust document", "a root is not exactly one certificate in PEM")
            found.append(chain[0])
        return found

    def ca_pem(self) -> bytes:
        """The bytes of `ca.crt`: every root, newest first."""
        return "".join(self.roots).encode("ascii")

    @property
    def overlap(self) -> bool:
        """Whether two roots are trusted."""
        return len(self.roots) > 1

    def statement(self) -> bytes:
        """What an admin signs."""
        return lp(b"cosilo/trust/1", self.federation.encode(), u64(self.version), self.canonical())


class Voucher(Document):
    """An old root's word for a new one. old, new: SHA-256 of the certificates (DER); signature: ECDSA with SHA-256 by
    the old root's key, DER in hex."""

    old: Bytes32
    new: Bytes32
    signature: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){8,80}$")]


class SignedTrust(Document):
    """A trust document as it travels and is stored."""

    trust: Trust
    signer: Name
    signature: Bytes64
    vouchers: tuple[Voucher, ...] = Field(default=(), max_length=ROOTS_MAX)

    @property
    def version(self) -> int:
        """The document's version."""
        return self.trust.version


def root_digest(root: x509.Certificate) -> bytes:
    """SHA-256 of a certificate's DER form: how vouchers name it."""
    return sha256(root.public_bytes(Encoding.DER))


def pem_of(certificate: x509.Certificate) -> str:
    """A certificate in PEM."""
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


def key_id(certificate: x509.Certificate) -> str:
    """A CA certificate's subject key identifier in hex. Raises CosiloError where it carries none."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()
    except (x509.ExtensionNotFound, ValueError):
        raise CosiloError("read certificate", "a CA's certificate without a key identifier", "make it with cosilo ca rotate") from None


def vouch(federation: str, old: x509.Certificate, old_key: TlsKey, new: x509.Certificate) -> Voucher:
    """The old root's signature under the new root."""
    before, after = root_digest(old), root_digest(new)
    signature = old_key.sign(_vouching(federation, before, after), ec.ECDSA(hashes.SHA256()))
    return Voucher(old=before, new=after, signature=signature.hex())


def sign_trust(trust: Trust, vouchers: tuple[Voucher, ...], signer: str, key: Ed25519PrivateKey, admins: dict[str, bytes]) -> SignedTrust:
    """Signs a version. admins: of the newest members list; raises CosiloError unless the signer is one by this key."""
    if admins.get(signer) != public_bytes(key):
        raise CosiloError("sign trust document", f"{signer} is not an admin by this key", "use the folder of an admin")
    return SignedTrust(trust=trust, signer=signer, signature=key.sign(trust.statement()), vouchers=vouchers)


def read_trust(data: bytes, federation: str, admins: dict[str, bytes], ca_pem: bytes, known: SignedTrust | None) -> SignedTrust:
    """Parses a trust document and verifies it.

    admins: Ed25519 public keys by name, of the newest members list; ca_pem: the roots that the reader trusts; known: the
    newest document that it saw, which nothing older may follow. Raises CosiloError with what is wrong and what to do.
    """
    offered = parse_document(SignedTrust, data, TRUST_BYTES_MAX, "read trust document")
    trust, version = offered.trust, offered.version
    if trust.federation != federation:
        raise _refused(version, f"it is of federation {trust.federation!r}, not {federation!r}")
    if known is not None and version < known.version:
        raise _refused(version, f"version {known.version} was seen before", "tell the admin: the coordinator went back")
    if known is not None and version == known.version:
        if trust != known.trust:
            raise _refused(version, "another of the same version was seen before", "tell the admins: one of their keys signed twice")
        return known
    key = admins.get(offered.signer)
    if key is None:
        raise _refused(version, f"its signer {offered.signer} is not an admin", "have an admin of today run cosilo ca sign")
    if not signature_holds(key, offered.signature, trust.statement()):
        raise _refused(version, f"{offered.signer}'s signature does not hold")
    believed = {root_digest(root): root for root in read_chain(ca_pem)}
    for root in trust.root_certificates():
        if root_digest(root) not in believed and not _vouched(federation, root, believed, offered.vouchers):
            raise _refused(version, "a new root in it is not vouched for by a root that is trusted here")
    return offered


def _vouched(federation: str, root: x509.Certificate, believed: dict[bytes, x509.Certificate], vouchers: tuple[Voucher, ...]) -> bool:
    new = root_digest(root)
    return any(
        voucher.new == new
        and voucher.old in believed
        and _ecdsa_holds(believed[voucher.old], bytes.fromhex(voucher.signature), _vouching(federation, voucher.old, new))
        for voucher in vouchers
    )


def _ecdsa_holds(by: x509.Certificate, signature: bytes, statement: bytes) -> bool:
    key = by.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _vouching(federation: str, old: bytes, new: bytes) -> bytes:
    return lp(b"cosilo/successor/1", federation.encode(), old, new)


def _refused(version: int, reason: str, hint: str = "keep the CA you have and tell the admin") -> CosiloError:
    return CosiloError("verify trust document", f"version {version}: {reason}", hint)
