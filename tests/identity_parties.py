"""A founded federation on the disk, and parties with real certificates, for the tests of identity, TLS and
enrolment."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import make_csr
from cosilo_common.identity.endorsement import Endorsement
from cosilo_common.identity.folder import (
    CA_FILE,
    TLS_CERTIFICATE_FILE,
    TLS_KEY_FILE,
    Identity,
    load_identity,
    tls_files,
)
from cosilo_common.identity.keys import make_tls_key, save_private_key
from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.names import PeerName, Role
from cosilo_common.identity.secret_files import write_public
from cosilo_common.identity.tls import TlsFiles
from cosilo_server.authority import ADMIN_FOLDER, COORDINATOR_FOLDER, Authority, Founding, found_federation
from cosilo_server.enrolment import EnrolmentRecord, OpenInvitation

FEDERATION = "north-star"
ADMIN = "ada"
NOW = datetime.now(UTC).replace(microsecond=0)  # gRPC verifies by the machine's clock, so certificates are made around it


@dataclass(frozen=True)
class Founded:
    """What `cosilo init` leaves, opened."""

    directory: Path
    authority: Authority
    coordinator: Identity
    admin: Identity

    @property
    def admin_key(self) -> Ed25519PrivateKey:
        return self.admin.signing_key()

    @property
    def members(self) -> SignedMembers:
        return self.admin.members()

    def party(self, role: Role, name: str, now: datetime = NOW, life: timedelta = timedelta(days=1)) -> TlsFiles:
        """A party's TLS files with a certificate issued at `now` for `life`."""
        authority = Authority.load(self.directory / COORDINATOR_FOLDER, life)
        folder = self.directory / f"{role}-{name}-{os.urandom(4).hex()}"
        folder.mkdir()
        key = make_tls_key()
        issue: Callable[[bytes, str, datetime], bytes] = {
            Role.SITE: authority.issue_site_certificate,
            Role.ADMIN: authority.issue_admin_certificate,
        }[role]
        chain = issue(make_csr(key, PeerName(FEDERATION, role, name)), name, now)
        save_private_key(folder / TLS_KEY_FILE, key)
        write_public(folder / TLS_CERTIFICATE_FILE, chain)
        write_public(folder / CA_FILE, authority.root_pem)
        return tls_files(folder)


def found(directory: Path, now: datetime = NOW, life: timedelta = timedelta(days=90)) -> Founded:
    """Founds a federation in a folder."""
    founding = Founding(FEDERATION, ADMIN, "127.0.0.1:7443", "127.0.0.1:7444", leaf_life=life)
    found_federation(directory, founding, now)
    return Founded(
        directory=directory,
        authority=Authority.load(directory / COORDINATOR_FOLDER, life),
        coordinator=load_identity(directory / COORDINATOR_FOLDER),
        admin=load_identity(directory / ADMIN_FOLDER),
    )


@dataclass
class InvitationsInMemory:
    """An InvitationBook without a disk."""

    invitations: dict[bytes, OpenInvitation] = field(default_factory=dict)
    records: dict[bytes, EnrolmentRecord] = field(default_factory=dict)
    wrong: dict[bytes, int] = field(default_factory=dict)

    def put(self, invitation: OpenInvitation) -> None:
        if invitation.token_public in self.invitations:
            raise CosiloError("invite", "this invitation is there already")
        self.invitations[invitation.token_public] = invitation

    def find(self, token_public: bytes) -> OpenInvitation | None:
        return self.invitations.get(token_public)

    def enrolment(self, token_public: bytes) -> EnrolmentRecord | None:
        return self.records.get(token_public)

    def wrong_tries(self, token_public: bytes) -> int:
        return self.wrong.get(token_public, 0)

    def note_wrong_try(self, token_public: bytes) -> None:
        self.wrong[token_public] = self.wrong_tries(token_public) + 1

    def burn(self, record: EnrolmentRecord) -> EnrolmentRecord:
        return self.records.setdefault(record.token_public, record)


@dataclass
class MembersInMemory:
    """A MembersBook without a disk."""

    members: SignedMembers

    def newest(self) -> SignedMembers:
        return self.members

    def endorse(self, endorsement: Endorsement) -> SignedMembers:
        self.members = self.members.endorse(endorsement)
        return self.members
