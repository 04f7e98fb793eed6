"""Enrolment at the desk: who gets a certificate, who becomes a member, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import make_csr
from cosilo_common.identity.enrolment import EnrolAnswer, EnrolRequest, check_answer, make_request
from cosilo_common.identity.invitation import INVITATION_LIFE_MAX_S, Invitation, make_invitation
from cosilo_common.identity.keys import TlsKey, make_signing_key, make_tls_key, public_bytes
from cosilo_common.identity.members import read_members, sign_members
from cosilo_common.identity.names import PeerName, Role, peer_from_certificate
from cosilo_server.enrolment import (
    ATTEMPTS_MAX,
    ATTEMPTS_WINDOW_S,
    AttemptLimit,
    EnrolmentDesk,
    EnrolmentRefused,
    OpenInvitation,
    RefusalReason,
)
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, InvitationsInMemory, MembersInMemory, found

ANNA = PeerName(FEDERATION, Role.SITE, "st-anna")
SOURCE = "192.0.2.7"
LIFE = timedelta(days=7)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


@dataclass
class Room:
    """An enrolment desk with its books, and the admin who stands beside it."""

    founded: Founded
    invitations: InvitationsInMemory
    members: MembersInMemory
    desk: EnrolmentDesk

    def invite(self, peer: PeerName = ANNA, local_demo: bool = False) -> Invitation:
        invitation = make_invitation(
            peer,
            ADMIN,
            self.founded.admin_key,
            self.members.members,
            self.founded.authority.root_pem,
            "h:7443",
            "h:7444",
            int((NOW + LIFE).timestamp()),
            local_demo=local_demo,
        )
        self.desk.invite(public_half(invitation), NOW)
        return invitation

    def enrol(self, request: EnrolRequest, now: datetime = NOW) -> EnrolAnswer:
        return self.desk.enrol(request, SOURCE, now)

    def refused(self, request: EnrolRequest, now: datetime = NOW) -> RefusalReason:
        records = dict(self.invitations.records)
        with pytest.raises(EnrolmentRefused) as caught:
            self.enrol(request, now)
        assert self.invitations.records == records  # nothing stored
        assert caught.value.hint
        return caught.value.reason


@pytest.fixture
def room(founded: Founded) -> Room:
    invitations, members = InvitationsInMemory(), MembersInMemory(founded.members)
    desk = EnrolmentDesk(founded.authority, invitations, members, AttemptLimit(attempts_max=1000))
    return Room(founded, invitations, members, desk)


def public_half(invitation: Invitation) -> OpenInvitation:
    return OpenInvitation(
        name=invitation.name,
        role=invitation.role,
        token_public=invitation.token_public(),
        expires_unix_s=invitation.expires_unix_s,
        preapproval=invitation.preapproval,
    )


def keys() -> tuple[TlsKey, Ed25519PrivateKey]:
    return make_tls_key(), make_signing_key()


def test_an_invited_site_gets_its_certificate_and_waits_for_an_admin(room: Room) -> None:
    invitation, (tls_key, signing_key) = room.invite(), keys()
    answer = room.enrol(make_request(invitation, tls_key, signing_key))
    assert peer_from_certificate(answer.certificate_chain).name == ANNA
    assert not answer.member
    assert check_answer(invitation, tls_key, signing_key, answer, NOW) == room.founded.members
    record = room.invitations.records[invitation.token_public()]
    assert (record.name, record.role, record.signing_key) == ("st-anna", Role.SITE, public_bytes(signing_key))
    assert record.enrolled_unix_s == int(NOW.timestamp())


def test_an_invited_admin_gets_an_admins_certificate(room: Room) -> None:
    bea = PeerName(FEDERATION, Role.ADMIN, "bea")
    answer = room.enrol(make_request(room.invite(bea), *keys()))
    assert peer_from_certificate(answer.certificate_chain).name == bea


def test_an_admin_approves_and_the_site_is_a_member(room: Room) -> None:
    invitation, (tls_key, signing_key) = room.invite(), keys()
    request = make_request(invitation, tls_key, signing_key)
    room.enrol(request)
    before = room.members.newest()
    draft = before.draft().approve("st-anna", Role.SITE, public_bytes(signing_key))
    room.members.members = before.succeeded_by(sign_members(before, draft, ADMIN, room.founded.admin_key))
    answer = room.enrol(request)
    assert answer.member
    assert check_answer(invitation, tls_key, signing_key, answer, NOW).version == 2


def test_a_pre_approved_site_is_a_member_by_a_chain_that_anybody_can_check(room: Room) -> None:
    invitation, (tls_key, signing_key) = room.invite(local_demo=True), keys()
    answer = room.enrol(make_request(invitation, tls_key, signing_key))
    assert answer.member
    members = read_members(answer.members, FEDERATION, room.founded.members.anchor())
    assert members.revision == (1, 1)
    entry = members.member("st-anna")
    assert entry is not None
    assert (entry.role, entry.key) == (Role.SITE, public_bytes(signing_key))
    assert check_answer(invitation, tls_key, signing_key, answer, NOW) == members


def test_the_next_signed_version_absorbs_the_endorsed(room: Room) -> None:
    request = make_request(room.invite(local_demo=True), *keys())
    room.enrol(request)
    endorsed = room.members.newest()
    v2 = sign_members(endorsed, endorsed.draft(), ADMIN, room.founded.admin_key)
    assert read_members(v2.canonical(), FEDERATION, endorsed.anchor(), endorsed).endorsed == ()
    entry = v2.list.member("st-anna")
    assert entry is not None
    assert (entry.key, entry.added) == (request.signing_key, 2)


def test_an_endorsement_that_comes_in_while_an_admin_signs_is_kept(room: Room) -> None:
    before = room.members.newest()
    draft = before.draft().approve("st-olav", Role.SITE, public_bytes(make_signing_key()))
    v2 = sign_members(before, draft, ADMIN, room.founded.admin_key)
    room.enrol(make_request(room.invite(local_demo=True), *keys()))
    after = room.members.newest().succeeded_by(v2)
    assert [member.name for member in after.everyone()] == ["ada", "st-anna", "st-olav"]
    assert read_members(after.canonical(), FEDERATION, before.anchor(), before) == after


def test_a_removed_site_cannot_be_brought_back_by_its_old_endorsement(room: Room) -> None:
    room.enrol(make_request(room.invite(local_demo=True), *keys()))
    endorsed = room.members.newest()
    v2 = sign_members(endorsed, endorsed.draft().remove("st-anna"), ADMIN, room.founded.admin_key)
    with pytest.raises(CosiloError, match="the name st-anna is taken or was removed"):
        v2.endorse(endorsed.endorsed[0])
    assert endorsed.succeeded_by(v2).everyone() == v2.everyone()
    forged = v2.model_copy(update={"endorsed": endorsed.endorsed})
    with pytest.raises(CosiloError, match="a name is a member's already, or was removed"):
        read_members(forged.canonical(), FEDERATION, endorsed.anchor())


def test_an_endorsement_that_vanishes_is_noticed(room: Room) -> None:
    before = room.members.newest()
    room.enrol(make_request(room.invite(local_demo=True), *keys()))
    endorsed = room.members.newest()
    with pytest.raises(CosiloError, match="a pre-approved site that was in it is gone"):
        read_members(before.canonical(), FEDERATION, before.anchor(), endorsed)


def test_every_link_of_an_endorsement_is_checked(room: Room) -> None:
    room.enrol(make_request(room.invite(local_demo=True), *keys()))
    endorsed = room.members.newest()
    link = endorsed.endorsed[0]
    other = public_bytes(make_signing_key())
    forgeries = [
        link.model_copy(update={"signing_key": other}),
        link.model_copy(update={"csr_digest": bytes(32)}),
        link.model_copy(update={"token_signature": bytes(64)}),
        link.model_copy(update={"signing_signature": bytes(64)}),
        link.model_copy(update={"preapproval": link.preapproval.model_copy(update={"name": "st-olav"})}),
        link.model_copy(update={"preapproval": link.preapproval.model_copy(update={"token_public": other})}),
        link.model_copy(update={"preapproval": link.preapproval.model_copy(update={"expires_unix_s": 1})}),
        link.model_copy(update={"preapproval": link.preapproval.model_copy(update={"admin": "bea"})}),
        link.model_copy(update={"preapproval": link.preapproval.model_copy(update={"federation": "other"})}),
    ]
    for forged in forgeries:
        assert not forged.holds(FEDERATION, endorsed.admins())
        with pytest.raises(CosiloError, match=r"the pre-approval of .* does not hold"):
            read_members(endorsed.model_copy(update={"endorsed": (forged,)}).canonical(), FEDERATION, endorsed.anchor())
    assert link.holds(FEDERATION, endorsed.admins())
    assert not link.holds("other", endorsed.admins())


def test_a_token_is_used_once(room: Room) -> None:
    invitation = room.invite()
    room.enrol(make_request(invitation, *keys()))
    assert room.refused(make_request(invitation, *keys())) is RefusalReason.USED


def test_a_token_is_used_once_by_each_of_both_keys(room: Room) -> None:
    invitation, (tls_key, signing_key) = room.invite(), keys()
    room.enrol(make_request(invitation, tls_key, signing_key))
    assert room.refused(make_request(invitation, make_tls_key(), signing_key)) is RefusalReason.USED
    assert room.refused(make_request(invitation, tls_key, make_signing_key())) is RefusalReason.USED


def test_two_at_once_with_one_token_end_with_one_certificate(room: Room) -> None:
    """Both passed every check before either was recorded: the book decides, and the loser's certificate never
    leaves."""
    invitation, winner = room.invite(), keys()
    burn = room.invitations.burn

    def beaten(record: object) -> object:
        room.invitations.burn = burn  # type: ignore[method-assign]  # the test's own interleaving
        room.enrol(make_request(invitation, *winner))
        return burn(record)  # type: ignore[arg-type]  # as it came

    room.invitations.burn = beaten  # type: ignore[method-assign,assignment]  # the test's own interleaving
    with pytest.raises(EnrolmentRefused) as caught:
        room.enrol(make_request(invitation, *keys()))
    assert caught.value.reason is RefusalReason.USED
    assert room.invitations.records[invitation.token_public()].signing_key == public_bytes(winner[1])


def test_the_same_keys_get_the_same_certificate_again_even_after_the_expiry(room: Room) -> None:
    invitation, (tls_key, signing_key) = room.invite(), keys()
    first = room.enrol(make_request(invitation, tls_key, signing_key))
    again = room.enrol(make_request(invitation, tls_key, signing_key), NOW + LIFE + timedelta(days=1))
    assert again == first


def test_an_invitation_expires_by_the_coordinators_clock(room: Room) -> None:
    request = make_request(room.invite(), *keys())
    assert room.refused(request, NOW + LIFE + timedelta(seconds=1)) is RefusalReason.EXPIRED
    assert room.enrol(request, NOW + LIFE)


def test_an_invitation_that_nobody_made_is_unknown(room: Room, founded: Founded) -> None:
    stranger = make_invitation(ANNA, ADMIN, founded.admin_key, founded.members, founded.authority.root_pem, "h:1", "h:2", 1_900_000_000)
    assert room.refused(make_request(stranger, *keys())) is RefusalReason.UNKNOWN


def test_both_keys_must_sign(room: Room) -> None:
    request = make_request(room.invite(), *keys())
    other = make_request(room.invite(), *keys())
    for forged in (
        replace(request, token_signature=bytes(64)),
        replace(request, signing_signature=bytes(64)),
        replace(request, token_signature=other.token_signature),
        replace(request, signing_key=other.signing_key),
        replace(request, signing_key=other.signing_key, signing_signature=other.signing_signature),
        replace(request, csr=other.csr),
        replace(request, name="st-olav"),
    ):
        assert room.refused(forged) is RefusalReason.SIGNATURE


def test_an_invitation_is_for_its_name(room: Room) -> None:
    """Everything signed as it should be, by the token's true holder, for a name that nobody invited."""
    invitation = room.invite()
    greedy = invitation.model_copy(update={"name": "st-olav"})
    assert room.refused(make_request(greedy, *keys())) is RefusalReason.NAME


def test_an_invitation_is_for_its_role(room: Room) -> None:
    invitation = room.invite()
    greedy = invitation.model_copy(update={"role": Role.ADMIN})
    assert room.refused(make_request(greedy, *keys())) is RefusalReason.SIGNATURE


def test_a_request_with_a_csr_for_somebody_else_is_malformed(room: Room) -> None:
    invitation, signing_key = room.invite(), make_signing_key()
    request = make_request(invitation, make_tls_key(), signing_key)
    for csr in (b"", b"junk", make_csr(make_tls_key(), PeerName(FEDERATION, Role.ADMIN, "st-anna"))):
        unsigned = replace(request, csr=csr)
        statement = unsigned.statement(FEDERATION, Role.SITE)
        signed = replace(
            unsigned,
            token_signature=invitation.token_key().sign(statement),
            signing_signature=signing_key.sign(statement),
        )
        assert room.refused(signed) is RefusalReason.MALFORMED


def test_sizes_are_checked_before_anything_else(room: Room) -> None:
    request = make_request(room.invite(), *keys())
    for odd in (
        replace(request, token_public=b""),
        replace(request, token_public=request.token_public + b"x"),
        replace(request, signing_key=bytes(31)),
        replace(request, token_signature=bytes(65)),
        replace(request, signing_signature=b""),
        replace(request, csr=bytes(4097)),
    ):
        assert room.refused(odd) is RefusalReason.MALFORMED


def test_a_guesser_is_stopped_and_others_are_not(founded: Founded) -> None:
    desk = EnrolmentDesk(founded.authority, InvitationsInMemory(), MembersInMemory(founded.members))
    request = EnrolRequest("st-anna", bytes(32), b"", bytes(32), bytes(64), bytes(64))

    def reason(source: str, at: float) -> RefusalReason:
        with pytest.raises(EnrolmentRefused) as caught:
            desk.enrol(request, source, NOW + timedelta(seconds=at))
        return caught.value.reason

    assert [reason("a", 0) for _ in range(ATTEMPTS_MAX)] == [RefusalReason.UNKNOWN] * ATTEMPTS_MAX
    assert reason("a", ATTEMPTS_WINDOW_S - 1) is RefusalReason.RATE
    assert reason("b", 0) is RefusalReason.UNKNOWN
    assert reason("a", ATTEMPTS_WINDOW_S) is RefusalReason.UNKNOWN


def test_the_limit_remembers_a_bounded_number_of_sources() -> None:
    limit = AttemptLimit(attempts_max=1, window_s=60, sources_max=2)
    assert [limit.allow(source, 0) for source in ("a", "b", "c")] == [True, True, True]
    assert not limit.allow("b", 1)
    assert limit.allow("a", 1)  # the longest silent was forgotten


def test_an_invitation_that_could_never_be_used_is_refused(room: Room) -> None:
    good = public_half(room.invite())
    at = int(NOW.timestamp())
    for bad, reason in (
        (replace(good, expires_unix_s=at), "it expires in 0 s"),
        (replace(good, expires_unix_s=at + INVITATION_LIFE_MAX_S + 301), "choose an expiry within 90 days"),
        (replace(good, role=Role.COORDINATOR, name="coordinator"), "its role or its token is malformed"),
        (replace(good, token_public=bytes(31)), "its role or its token is malformed"),
        (replace(good, name="NO"), "name a party"),
        (good, "this invitation is there already"),
    ):
        with pytest.raises(CosiloError, match=reason):
            room.desk.invite(bad, NOW)


def test_a_pre_approval_is_checked_when_it_arrives(room: Room) -> None:
    demo = make_invitation(
        ANNA,
        ADMIN,
        room.founded.admin_key,
        room.founded.members,
        room.founded.authority.root_pem,
        "h:1",
        "h:2",
        int((NOW + LIFE).timestamp()),
        local_demo=True,
    )
    good = public_half(demo)
    for bad in (
        replace(good, name="st-olav"),
        replace(good, role=Role.ADMIN),
        replace(good, expires_unix_s=good.expires_unix_s + 1),
        replace(good, token_public=public_bytes(make_signing_key())),
    ):
        with pytest.raises(CosiloError, match="its pre-approval does not hold"):
            room.desk.invite(bad, NOW)


def test_a_pre_approval_for_a_members_name_is_refused(room: Room) -> None:
    room.enrol(make_request(room.invite(local_demo=True), *keys()))
    with pytest.raises(CosiloError, match="the name is a member's or was removed; invite without --local-demo"):
        room.invite(local_demo=True)


def test_a_pre_approval_by_an_admin_who_left_meanwhile_leaves_the_site_waiting(room: Room) -> None:
    invitation = room.invite(local_demo=True)
    before = room.members.newest()
    bea = make_signing_key()
    v2 = sign_members(before, before.draft().approve("bea", Role.ADMIN, public_bytes(bea)), ADMIN, room.founded.admin_key)
    v3 = sign_members(v2, v2.draft().remove(ADMIN), "bea", bea)
    room.members.members = v3
    answer = room.enrol(make_request(invitation, *keys()))
    assert not answer.member
    assert room.members.newest() == v3


def test_an_answer_that_is_not_what_was_asked_for_is_refused(room: Room, tmp_path: Path) -> None:
    invitation, (tls_key, signing_key) = room.invite(), keys()
    answer = room.enrol(make_request(invitation, tls_key, signing_key))
    authority = room.founded.authority
    other = found(tmp_path / "other")
    foreign = other.authority.issue_site_certificate(make_csr(tls_key, ANNA), "st-anna", NOW)
    swapped = authority.issue_site_certificate(make_csr(make_tls_key(), ANNA), "st-anna", NOW)
    olav = PeerName(FEDERATION, Role.SITE, "st-olav")
    admin = PeerName(FEDERATION, Role.ADMIN, "st-anna")
    for bad, reason in (
        (replace(answer, certificate_chain=foreign), "issued by this federation's CA"),
        (replace(answer, certificate_chain=swapped), "it is for another key"),
        (
            replace(answer, certificate_chain=authority.issue_site_certificate(make_csr(tls_key, olav), "st-olav", NOW)),
            "it is for spiffe://north-star/site/st-olav",
        ),
        (
            replace(answer, certificate_chain=authority.issue_admin_certificate(make_csr(tls_key, admin), "st-anna", NOW)),
            "it is for spiffe://north-star/admin/st-anna",
        ),
        (replace(answer, certificate_chain=b""), "it is not a certificate in PEM"),
        (replace(answer, members=other.members.canonical()), "verify members list"),
        (replace(answer, members=b"{}"), "read members list"),
        (replace(answer, member=True), "says that st-anna is a member, and by the signed members list it is not one"),
    ):
        with pytest.raises(CosiloError, match=reason):
            check_answer(invitation, tls_key, signing_key, bad, NOW)
