"""Attacks with a certificate: a stolen invitation for somebody who is a member, a certificate from before a readmission, a renewal that
changes keys. A certificate is issued before anybody approves, so what counts is the signing key that it enrolled with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import make_csr
from cosilo_common.identity.enrolment import make_request
from cosilo_common.identity.invitation import make_invitation
from cosilo_common.identity.keys import make_signing_key, make_tls_key, public_bytes
from cosilo_common.identity.members import MembersList, sign_members
from cosilo_common.identity.names import Peer, PeerName, Role, peer_from_certificate
from cosilo_server.enrolment import AttemptLimit, EnrolmentDesk, OpenInvitation
from cosilo_server.membership import Removal, StoredInvitations, StoredMembers
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.services.gate import Gate
from cosilo_server.store import Store
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, found


@dataclass
class Room:
    """A coordinator's books on a disk, its desk and its gate."""

    founded: Founded
    store: Store
    members: StoredMembers
    desk: EnrolmentDesk
    gate: Gate

    def enrol(self, name: str, role: Role = Role.SITE) -> tuple[Peer, Ed25519PrivateKey]:
        """Somebody uses an invitation for this name: who their certificate says they are, and their signing key."""
        expires = int(NOW.timestamp()) + 3600
        peer = PeerName(FEDERATION, role, name)
        invitation = make_invitation(
            peer, ADMIN, self.founded.admin_key, self.members.newest(), self.founded.authority.root_pem, "c:7443", "c:7444", expires
        )
        self.desk.invite(OpenInvitation(name, role, invitation.token_public(), expires), NOW)
        signing_key = make_signing_key()
        answer = self.desk.enrol(make_request(invitation, make_tls_key(), signing_key), "10.0.0.1", NOW)
        return peer_from_certificate(answer.certificate_chain), signing_key

    def sign(self, draft: MembersList) -> None:
        newest = self.members.newest()
        self.members.put(sign_members(newest, draft, ADMIN, self.founded.admin_key).canonical())

    def approve(self, name: str, key: Ed25519PrivateKey, role: Role = Role.SITE, *, readmit: bool = False) -> None:
        self.sign(self.members.newest().draft().approve(name, role, public_bytes(key), readmit))

    def reopened(self) -> Gate:
        """The gate of a coordinator that was restarted."""
        store = Store(Path(str(self.store._engine.url.database)))
        members = StoredMembers(store, FEDERATION, self.founded.members.canonical())
        return Gate(FEDERATION, members.is_member, members.removal, CoordinatorMetrics())


@pytest.fixture
def room(tmp_path: Path) -> Room:
    founded = found(tmp_path / "f")
    store = Store(tmp_path / "state.db")
    members = StoredMembers(store, FEDERATION, founded.members.canonical())
    desk = EnrolmentDesk(founded.authority, StoredInvitations(store), members, AttemptLimit(attempts_max=100))
    return Room(founded, store, members, desk, Gate(FEDERATION, members.is_member, members.removal, CoordinatorMetrics()))


@pytest.mark.parametrize("role", [Role.SITE, Role.ADMIN])
def test_a_stolen_invitation_for_a_member_s_name_is_nobody_s_certificate(room: Room, role: Role) -> None:
    """A second invitation for a name (the first was late, the laptop is new) gives a certificate under that name at once."""
    honest, key = room.enrol("st-anna", role)
    assert not room.gate.still_member(honest)
    room.approve("st-anna", key, role)
    assert room.gate.still_member(honest)

    thief, _ = room.enrol("st-anna", role)
    assert thief.name == honest.name
    assert not room.gate.still_member(thief)
    assert room.gate.still_member(honest)
    assert (room.reopened().still_member(thief), room.reopened().still_member(honest)) == (False, True)


def test_a_stolen_invitation_for_the_first_admin_s_name_is_nobody_s_certificate(room: Room) -> None:
    """The first admin's certificate is the founding's and never enrolled; whoever enrols under that name later is not that admin."""
    thief, _ = room.enrol(ADMIN, Role.ADMIN)
    assert not room.gate.still_member(thief)
    assert room.gate.still_member(peer_from_certificate(room.founded.admin.tls.certificate.read_bytes()))


def test_a_certificate_from_before_a_readmission_opens_nothing(room: Room) -> None:
    """A site whose keys were stolen is readmitted with new ones under its name: the thief's certificate has months to live."""
    old, old_key = room.enrol("st-anna")
    room.approve("st-anna", old_key)
    new, new_key = room.enrol("st-anna")
    room.sign(room.members.newest().draft().remove("st-anna"))
    assert (room.gate.still_member(old), room.gate.still_member(new)) == (False, False)
    room.approve("st-anna", new_key, readmit=True)
    assert (room.gate.still_member(old), room.gate.still_member(new)) == (False, True)


def test_who_was_revoked_is_told_a_new_name_and_not_to_be_approved(room: Room) -> None:
    peer, key = room.enrol("st-anna")
    room.approve("st-anna", key)
    assert room.members.removal(peer) is Removal.NOTHING
    room.sign(room.members.newest().draft().remove("st-anna"))
    assert room.members.removal(peer) is Removal.KEYS
    assert room.gate.no_member(peer) == (
        f"site st-anna was revoked in {FEDERATION}; it comes back with new keys under a new name: "
        "an admin runs `cosilo site invite st-anna-2 --out FILE`"
    )


def test_who_waits_to_be_readmitted_is_told_so(room: Room) -> None:
    revoked, key = room.enrol("st-anna")
    room.approve("st-anna", key)
    room.sign(room.members.newest().draft().remove("st-anna"))
    peer, again = room.enrol("st-anna")
    assert (room.members.removal(peer), room.members.removal(revoked)) == (Removal.NAME, Removal.KEYS)
    assert room.gate.no_member(peer) == (
        f"site st-anna was revoked in {FEDERATION}, and enrolled again with new keys; "
        "an admin gives it the name back with `cosilo site approve st-anna --readmit`"
    )
    room.approve("st-anna", again, readmit=True)
    assert (room.members.removal(peer), room.gate.still_member(peer)) == (Removal.NOTHING, True)


def test_a_name_in_another_role_is_no_member(room: Room) -> None:
    peer, key = room.enrol("st-anna")
    room.approve("st-anna", key)
    admin, _ = room.enrol("st-anna", Role.ADMIN)
    assert (room.gate.still_member(peer), room.gate.still_member(admin)) == (True, False)


def test_a_renewal_is_for_the_key_that_asks(room: Room) -> None:
    """Whoever held a certificate for a moment must not turn it into keys of their own: renewals never end by themselves."""
    peer = peer_from_certificate(room.founded.admin.tls.certificate.read_bytes())
    with pytest.raises(CosiloError, match="it asks for another key"):
        room.founded.authority.renew(make_csr(make_tls_key(), peer.name), peer, NOW)
