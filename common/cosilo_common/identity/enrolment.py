"""What is said at enrolment, as both ends see it: the request, the answer, and the checks of the party that enrols.

The request is signed twice over the same statement: by the token's key (this party was invited) and by the party's new
Ed25519 key (it holds it).
The CSR proves the TLS key in the same way. Must not know protobuf, sockets or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import check_issued, make_csr
from cosilo_common.identity.endorsement import enrolment_statement
from cosilo_common.identity.invitation import Invitation
from cosilo_common.identity.keys import TlsKey, public_bytes
from cosilo_common.identity.members import SignedMembers, read_members
from cosilo_common.identity.names import Role


@dataclass(frozen=True, slots=True)
class EnrolRequest:
    """A party asks to be enrolled.

    name: as invited; token_public, signing_key: Ed25519, 32 bytes; csr: PKCS#10, DER; token_signature,
    signing_signature: 64 bytes.
    """

    name: str
    token_public: bytes
    csr: bytes
    signing_key: bytes
    token_signature: bytes
    signing_signature: bytes

    def statement(self, federation: str, role: Role) -> bytes:
        """What both signatures are over. federation, role: as the invitation has them."""
        return enrolment_statement(federation, role, self.name, self.token_public, sha256(self.csr), self.signing_key)


@dataclass(frozen=True, slots=True)
class EnrolAnswer:
    """What comes back.

    certificate_chain: PEM, leaf then intermediate; member: already one, or waiting for an admin; members: the newest
    signed list's bytes.
    """

    certificate_chain: bytes
    member: bool
    members: bytes


def make_request(invitation: Invitation, tls_key: TlsKey, signing_key: Ed25519PrivateKey) -> EnrolRequest:
    """The signed request for an invitation and two keys made locally."""
    csr = make_csr(tls_key, invitation.peer())
    mine = public_bytes(signing_key)
    token = invitation.token_key()
    token_public = public_bytes(token)
    statement = enrolment_statement(invitation.federation, invitation.role, invitation.name, token_public, sha256(csr), mine)
    return EnrolRequest(
        name=invitation.name,
        token_public=token_public,
        csr=csr,
        signing_key=mine,
        token_signature=token.sign(statement),
        signing_signature=signing_key.sign(statement),
    )


def check_answer(
    invitation: Invitation, tls_key: TlsKey, signing_key: Ed25519PrivateKey, answer: EnrolAnswer, now: datetime
) -> SignedMembers:
    """The members list in an answer, once the whole answer is found to be what this party asked for.

    Raises CosiloError unless the certificate is for our key, our name and role, by the invitation's CA and valid at
    `now` (aware); the members list is signed by the invitation's admins; and `member` is what the list says.
    """
    check_issued(answer.certificate_chain, invitation.ca.encode(), tls_key, invitation.peer(), now)
    members = read_members(answer.members, invitation.federation, invitation.anchor)
    entry = members.member(invitation.name)
    listed = entry is not None and (entry.role, entry.key) == (invitation.role, public_bytes(signing_key))
    if listed != answer.member:
        said, found = ("a member", "is not") if answer.member else ("not a member yet", "is")
        raise CosiloError(
            "enrol",
            f"the coordinator says that {invitation.name} is {said}, and by the signed members list it {found} one",
            "tell the admin who invited you; nothing was written",
        )
    return members
