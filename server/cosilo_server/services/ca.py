"""The CA on the wire: what an admin is told of it, and what an admin sends. rotation.py decides and stores."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography.hazmat.primitives.serialization import Encoding

from cosilo_common.rpc.v1 import admin_pb2
from cosilo_server.authority import Authority
from cosilo_server.certificates import CertificateBook
from cosilo_server.membership import StoredMembers
from cosilo_server.rotation import Rotation


class CaDesk:
    """Blocks on the disk; callers on an event loop use a thread."""

    def __init__(self, rotation: Rotation, authority: Authority, certificates: CertificateBook, members: StoredMembers) -> None:
        self._rotation = rotation
        self._authority = authority
        self._certificates = certificates
        self._members = members

    def trust(self) -> bytes:
        """The newest trust document as it travels; empty before the first rotation."""
        return self._rotation.data()

    def trust_version(self) -> int:
        """Its version, 0 before the first."""
        return self._rotation.version()

    def describe(self, want_csr: bool) -> admin_pb2.GetAuthorityResponse:
        """The CA as it stands, and each member's newest certificate."""
        parties = []
        for member in self._members.newest().everyone():
            shown = self._certificates.of(member)
            issuer, expires_at = (shown.issuer, shown.expires_at) if shown is not None else ("", 0.0)
            parties.append(
                admin_pb2.CertifiedParty(name=member.name, role=member.role.value, issuer=issuer, expires_unix_s=int(expires_at))
            )
        return admin_pb2.GetAuthorityResponse(
            trust=self._rotation.data(),
            roots=b"".join(root.public_bytes(Encoding.PEM) for root in self._rotation.roots()),
            intermediate=self._authority.intermediate.public_bytes(Encoding.PEM),
            csr=self._rotation.request() if want_csr else b"",
            parties=parties,
        )

    def put(self, request: admin_pb2.PutAuthorityRequest) -> None:
        """Puts the next document in force. Raises CosiloError as Rotation.put does."""
        self._rotation.put(request.trust, request.intermediate, request.cross, datetime.now(UTC))
