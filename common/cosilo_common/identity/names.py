"""Names and roles of the parties, and how a certificate carries them.

A party's name stands in its certificate as exactly one URI SAN: `spiffe://FEDERATION/site/NAME`,
`spiffe://FEDERATION/admin/NAME` or `spiffe://FEDERATION/coordinator` (the shape of a SPIFFE X.509-SVID, section 2: one
URI SAN, a leaf that is no CA). Common names are ignored.
Must not know sockets or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cosilo_common.canonical import MalformedBytes, check_name, sha256
from cosilo_common.errors import CosiloError

URI_SCHEME = "spiffe://"
URI_CHARS_MAX = 256  # scheme, two names of at most 63 and a role need 145; longer is refused before it is split
CERTIFICATE_BYTES_MAX = 16 * 1024  # a P-256 leaf is about 1 KiB in PEM; an RSA-4096 leaf of a hospital's own CA about 3 KiB


class Role(StrEnum):
    """What a party is in its federation."""

    COORDINATOR = "coordinator"
    SITE = "site"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class PeerName:
    """A party's full name: the federation, the role, and the name within that role.

    federation, name: `[a-z0-9-]{1,63}`; the coordinator's name is always "coordinator". Raises CosiloError on any other
    shape.
    """

    federation: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        try:
            check_name(self.federation)
            check_name(self.name)
        except MalformedBytes as error:
            raise CosiloError("name a party", str(error)) from None
        if self.role is Role.COORDINATOR and self.name != Role.COORDINATOR.value:
            raise CosiloError("name a party", f"a coordinator is named 'coordinator', not {self.name!r}")

    def uri(self) -> str:
        """The URI that stands in the party's certificate."""
        if self.role is Role.COORDINATOR:
            return f"{URI_SCHEME}{self.federation}/{self.role}"
        return f"{URI_SCHEME}{self.federation}/{self.role}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role} {self.name}" if self.role is not Role.COORDINATOR else "coordinator"


@dataclass(frozen=True, slots=True)
class Peer:
    """A party as its certificate names it.

    serial: of the certificate, a positive integer; not_after: its last valid moment, UTC; key_digest: SHA-256 of the
    certified key (SubjectPublicKeyInfo), which stays when a certificate is renewed; issuer: key identifier of the
    intermediate that signed it, in hex, "" where it names none.
    """

    name: PeerName
    serial: int
    not_after: datetime
    key_digest: bytes = field(default=b"", compare=False, repr=False)
    issuer: str = field(default="", compare=False, repr=False)


def coordinator_name(federation: str) -> PeerName:
    """The full name of a federation's coordinator."""
    return PeerName(federation, Role.COORDINATOR, Role.COORDINATOR.value)


def parse_uri(uri: str) -> PeerName:
    """Reads a party's name from its URI. Raises CosiloError unless the URI is exactly what `PeerName.uri` would
    write."""
    if len(uri) > URI_CHARS_MAX or not uri.startswith(URI_SCHEME):
        raise _bad_uri(uri)
    match uri.removeprefix(URI_SCHEME).split("/"):
        case [federation, Role.COORDINATOR.value]:
            role, name = Role.COORDINATOR, Role.COORDINATOR.value
        case [federation, Role.SITE.value | Role.ADMIN.value as word, name]:
            role = Role(word)
        case _:
            raise _bad_uri(uri)
    try:
        return PeerName(federation, role, name)
    except CosiloError:
        raise _bad_uri(uri) from None


# What `cryptography` raises, now or when a part is first looked at, for a certificate or a request that is none; some are plain Exceptions.
UNPARSABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def peer_from_certificate(pem: bytes) -> Peer:
    """Reads who a certificate names; says nothing about who signed it, which TLS or `certificates.check_chain` decides.

    pem: one certificate, or a chain whose first certificate is the leaf. Raises CosiloError where it does not parse, is
    a CA's, or does not have exactly one URI SAN of a party's shape.
    """
    if len(pem) > CERTIFICATE_BYTES_MAX:
        raise CosiloError("read certificate", f"{len(pem)} bytes are more than {CERTIFICATE_BYTES_MAX}")
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        name = name_in_extensions(certificate.extensions)
        is_ca = _is_ca(certificate.extensions)
        issuer = _issuer(certificate.extensions)
        key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except UNPARSABLE as error:
        raise CosiloError("read certificate", f"it does not parse ({type(error).__name__})") from None
    if is_ca:
        raise CosiloError("read certificate", f"{name.uri()} stands in a CA's certificate, not in a party's")
    return Peer(name, certificate.serial_number, certificate.not_valid_after_utc, sha256(key), issuer)


def name_in_extensions(extensions: x509.Extensions) -> PeerName:
    """The name in the one URI SAN of a certificate or a certificate request. Raises CosiloError unless there is exactly
    one."""
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        uris: list[str] = []
    else:
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise CosiloError("read certificate", f"it carries {len(uris)} URI names, and a party's carries exactly one")
    return parse_uri(uris[0])


def expect_peer(peer: Peer, federation: str, *roles: Role) -> PeerName:
    """Returns the peer's name if it is of this federation and has one of these roles; raises CosiloError otherwise."""
    if peer.name.federation != federation:
        raise CosiloError("check peer", f"{peer.name.uri()} is not of federation {federation!r}")
    if peer.name.role not in roles:
        wanted = " or ".join(role.value for role in roles)
        raise CosiloError("check peer", f"{peer.name.uri()} is not a {wanted}", f"use a certificate of a {wanted}")
    return peer.name


def is_current(peer: Peer, now: datetime) -> bool:
    """Whether the certificate has not expired at `now` (aware)."""
    return now.astimezone(UTC) <= peer.not_after


def _is_ca(extensions: x509.Extensions) -> bool:
    try:
        return extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _issuer(extensions: x509.Extensions) -> str:
    try:
        identifier = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return ""
    return (identifier or b"").hex()


def _bad_uri(uri: str) -> CosiloError:
    return CosiloError(
        "read certificate",
        f"{uri[:URI_CHARS_MAX]!r} does not name a party",
        "its shape is spiffe://FEDERATION/site/NAME",
    )
