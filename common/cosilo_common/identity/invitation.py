"""Invitations: the one file that an admin hands to a new site or admin.

It carries where the coordinator is, what to trust (the CA, the admins' keys), and a one-time token: an Ed25519 seed.
The coordinator knows the token's public half only, and the invited party proves the token by a signature, so the secret
leaves the file on no wire. Must not know sockets, stores or the clock.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX, certificate_fingerprint
from cosilo_common.identity.documents import Address, Bytes32, Document, Name, UnixSeconds, check_address, parse_document
from cosilo_common.identity.endorsement import Preapproval, preapprove
from cosilo_common.identity.keys import SEED_BYTES, fingerprint, public_bytes
from cosilo_common.identity.members import Anchor, SignedMembers
from cosilo_common.identity.names import PeerName, Role
from cosilo_common.identity.secret_files import read_secret, write_secret

INVITATION_BYTES_MAX = 128 * 1024  # a CA of CHAIN_BYTES_MAX and 64 admins; Cosilo's own are about 2 KiB
INVITATION_LIFE_DEFAULT_S = 7 * 86400  # long enough for a hospital's paperwork, short enough that a forgotten file is worthless
INVITATION_LIFE_MAX_S = 90 * 86400


class Invitation(Document):
    """One invitation, whole.

    address, enrolment_address: `host:port` of the federation and the enrolment port; ca: root certificates, PEM;
    anchor: the admins as the inviting admin knew them; admin: who invites; expires_unix_s: UTC, enforced by the
    coordinator; token: the one-time secret, 32 bytes, in no repr; preapproval: set by `--local-demo` only.
    """

    version: Literal[1] = 1
    federation: Name
    role: Role
    name: Name
    address: Address
    enrolment_address: Address
    ca: str = Field(max_length=CHAIN_BYTES_MAX)
    ca_fingerprint: str = Field(max_length=64)
    admin: Name
    admin_fingerprint: str = Field(max_length=64)
    anchor: Anchor
    expires_unix_s: UnixSeconds
    token: Bytes32 = Field(repr=False)
    preapproval: Preapproval | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.role is Role.COORDINATOR:
            raise ValueError("role: a coordinator is not invited")
        try:
            ca_fingerprint = certificate_fingerprint(self.ca.encode())
        except CosiloError as error:
            raise ValueError(f"ca: {error.subject}") from None
        if ca_fingerprint != self.ca_fingerprint:
            raise ValueError("ca_fingerprint: it is not the CA's")
        if self.admin not in self.anchor.admins or fingerprint(self.anchor.admins[self.admin]) != self.admin_fingerprint:
            raise ValueError("admin_fingerprint: it is not the inviting admin's")
        if self.preapproval is not None:
            promised = (self.preapproval.federation, self.preapproval.name, self.preapproval.token_public)
            if self.role is not Role.SITE or promised != (self.federation, self.name, self.token_public()):
                raise ValueError("preapproval: it is for another party")
            if not self.preapproval.holds(self.anchor.admins):
                raise ValueError("preapproval: its signature does not hold")
        return self

    def peer(self) -> PeerName:
        """Who is invited."""
        return PeerName(self.federation, self.role, self.name)

    def token_key(self) -> Ed25519PrivateKey:
        """The token as the key that signs the enrolment."""
        return Ed25519PrivateKey.from_private_bytes(self.token)

    def token_public(self) -> bytes:
        """The token's public half, 32 bytes: what the coordinator stores."""
        return public_bytes(self.token_key())


def make_invitation(
    peer: PeerName,
    admin: str,
    admin_key: Ed25519PrivateKey,
    members: SignedMembers,
    ca_pem: bytes,
    address: str,
    enrolment_address: str,
    expires_unix_s: int,
    local_demo: bool = False,
) -> Invitation:
    """Makes an invitation with a fresh token, as an admin of the newest members list.

    local_demo: pre-approve the site as well, which nobody's eyes then check; sites only.
    """
    for text in (address, enrolment_address):
        check_address("invite", text)
    key = members.admins().get(admin)
    if key is None or key != public_bytes(admin_key):
        raise CosiloError("invite", f"{admin} is not an admin by this key", "use the folder of an admin in the newest members list")
    if local_demo and peer.role is not Role.SITE:
        raise CosiloError("invite", f"{peer}: --local-demo is for sites", "invite an admin without it and approve them")
    token = os.urandom(SEED_BYTES)
    token_public = public_bytes(Ed25519PrivateKey.from_private_bytes(token))
    preapproval = None
    if local_demo:
        preapproval = preapprove(peer.federation, peer.name, token_public, expires_unix_s, admin, admin_key)
    return Invitation(
        federation=peer.federation,
        role=peer.role,
        name=peer.name,
        address=address,
        enrolment_address=enrolment_address,
        ca=ca_pem.decode("ascii"),
        ca_fingerprint=certificate_fingerprint(ca_pem),
        admin=admin,
        admin_fingerprint=fingerprint(key),
        anchor=members.anchor(),
        expires_unix_s=expires_unix_s,
        token=token,
        preapproval=preapproval,
    )


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Writes an invitation into a new file of mode 0600. Raises CosiloError where the path exists already."""
    write_secret(path, json.dumps(invitation.model_dump(mode="json"), indent=2).encode("ascii") + b"\n")


def read_invitation(path: Path) -> Invitation:
    """Reads an invitation's file. Raises CosiloError where others may read it, or as `parse_invitation` does."""
    return parse_invitation(read_secret(path, INVITATION_BYTES_MAX))


def parse_invitation(data: bytes) -> Invitation:
    """Reads an invitation from bytes (a file's, or standard input's). Raises CosiloError, which names the field and
    never shows a value."""
    return parse_document(Invitation, data, INVITATION_BYTES_MAX, "read invitation", canonical=False)
