"""Enrolment at the site: keys made locally, and a folder that is whole or absent, whenever the process dies."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from cosilo_client.enrolment import enrol
from cosilo_common.errors import CosiloError
from cosilo_common.identity.enrolment import EnrolAnswer, EnrolRequest
from cosilo_common.identity.folder import load_identity
from cosilo_common.identity.invitation import Invitation, make_invitation
from cosilo_common.identity.keys import fingerprint, public_bytes
from cosilo_common.identity.names import PeerName, Role
from cosilo_common.identity.secret_files import write_public
from cosilo_common.identity.tls import check_tls_files
from cosilo_server.enrolment import EnrolmentDesk, OpenInvitation
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, InvitationsInMemory, MembersInMemory, found

ANNA = PeerName(FEDERATION, Role.SITE, "st-anna")


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


@dataclass
class Wire:
    """A real desk at the other end; can lose a request or an answer, or change an answer on its way."""

    founded: Founded
    desk: EnrolmentDesk
    requests: list[EnrolRequest] = field(default_factory=list)
    lose_request: bool = False
    lose_answer: bool = False
    change: Callable[[EnrolAnswer], EnrolAnswer] | None = None

    async def __call__(self, request: EnrolRequest) -> EnrolAnswer:
        self.requests.append(request)
        if self.lose_request:
            raise ConnectionError("request lost")
        answer = self.desk.enrol(request, "192.0.2.7", NOW)
        if self.lose_answer:
            raise ConnectionError("answer lost")
        return self.change(answer) if self.change else answer

    def invite(self, peer: PeerName = ANNA, local_demo: bool = False) -> Invitation:
        invitation = make_invitation(
            peer,
            ADMIN,
            self.founded.admin_key,
            self.founded.members,
            self.founded.authority.root_pem,
            "fl.example:7443",
            "fl.example:7444",
            int((NOW + timedelta(days=7)).timestamp()),
            local_demo=local_demo,
        )
        half = OpenInvitation(
            invitation.name, invitation.role, invitation.token_public(), invitation.expires_unix_s, invitation.preapproval
        )
        self.desk.invite(half, NOW)
        return invitation


@pytest.fixture
def wire(founded: Founded) -> Wire:
    return Wire(founded, EnrolmentDesk(founded.authority, InvitationsInMemory(), MembersInMemory(founded.members)))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


async def test_a_site_enrols(wire: Wire, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    enrolled = await enrol(wire.invite(), folder, wire, NOW)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "ca.crt": 0o644,
        "federation.json": 0o644,
        "members.json": 0o644,
        "signing.key": 0o600,
        "tls.crt": 0o644,
        "tls.key": 0o600,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert names(tmp_path) == ["identity"]
    identity = load_identity(folder)
    assert enrolled.identity == identity
    assert not enrolled.member
    assert enrolled.key_fingerprint == fingerprint(public_bytes(identity.signing_key()))
    assert identity.peer == ANNA
    assert identity.membership.address == "fl.example:7443"
    assert identity.membership.anchor == wire.founded.members.anchor()
    assert identity.members() == wire.founded.members
    assert check_tls_files(identity.tls, NOW).name == ANNA


async def test_a_pre_approved_site_is_a_member_at_once(wire: Wire, tmp_path: Path) -> None:
    enrolled = await enrol(wire.invite(local_demo=True), tmp_path / "identity", wire, NOW)
    assert enrolled.member
    entry = enrolled.identity.members().member("st-anna")
    assert entry is not None
    assert entry.key == public_bytes(enrolled.identity.signing_key())


async def test_the_token_never_leaves_the_invitation(wire: Wire, tmp_path: Path) -> None:
    invitation = wire.invite()
    await enrol(invitation, tmp_path / "identity", wire, NOW)
    sent = b"".join([part if isinstance(part, bytes) else part.encode() for part in vars_of(wire.requests[0])])
    written = b"".join(path.read_bytes() for path in (tmp_path / "identity").iterdir())
    for data in (sent, written):
        assert invitation.token not in data
        assert invitation.token.hex().encode() not in data


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_lost_call_goes_on_with_the_same_request(wire: Wire, tmp_path: Path, lost: str) -> None:
    invitation, folder = wire.invite(), tmp_path / "identity"
    setattr(wire, f"lose_{lost}", True)
    with pytest.raises(ConnectionError):
        await enrol(invitation, folder, wire, NOW)
    assert names(tmp_path) == ["identity.pending"]
    assert stat.S_IMODE((tmp_path / "identity.pending").stat().st_mode) == 0o700
    setattr(wire, f"lose_{lost}", False)
    await enrol(invitation, folder, wire, NOW)
    assert wire.requests[0] == wire.requests[1]
    assert names(tmp_path) == ["identity"]


@pytest.mark.parametrize("file", ["tls.crt", "ca.crt", "members.json", "federation.json"])
async def test_a_process_that_dies_while_it_writes_leaves_no_folder_and_goes_on(
    wire: Wire, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, folder = wire.invite(), tmp_path / "identity"

    def dying(path: Path, data: bytes) -> None:
        if path.name == file:
            path.write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        write_public(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("cosilo_client.enrolment.write_public", dying)
        with pytest.raises(KeyboardInterrupt):
            await enrol(invitation, folder, wire, NOW)
    assert not folder.exists()
    enrolled = await enrol(invitation, folder, wire, NOW)
    assert check_tls_files(enrolled.identity.tls, NOW).name == ANNA
    assert wire.requests[0] == wire.requests[1]


async def test_a_process_that_dies_before_it_asked_begins_anew(wire: Wire, tmp_path: Path) -> None:
    pending = tmp_path / "identity.pending"
    pending.mkdir(mode=0o700)
    (pending / "tls.key").write_text("half a key")
    await enrol(wire.invite(), tmp_path / "identity", wire, NOW)
    assert names(tmp_path) == ["identity"]


async def test_another_invitations_enrolment_is_not_overrun(wire: Wire, tmp_path: Path) -> None:
    first, folder = wire.invite(), tmp_path / "identity"
    wire.lose_request = True
    with pytest.raises(ConnectionError):
        await enrol(first, folder, wire, NOW)
    kept = (tmp_path / "identity.pending" / "signing.key").read_bytes()
    with pytest.raises(CosiloError, match="begun with another invitation; go on with that invitation, or remove"):
        await enrol(wire.invite(), folder, wire, NOW)
    assert (tmp_path / "identity.pending" / "signing.key").read_bytes() == kept


async def test_an_enrolled_site_is_not_enrolled_over(wire: Wire, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    await enrol(wire.invite(), folder, wire, NOW)
    with pytest.raises(CosiloError, match="holds the identity of spiffe://north-star/site/st-anna; it is enrolled"):
        await enrol(wire.invite(), folder, wire, NOW)


async def test_a_folder_that_is_something_else_is_left_alone(wire: Wire, tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "letter").write_text("dear")
    with pytest.raises(CosiloError, match="exists and is not an identity folder"):
        await enrol(wire.invite(), tmp_path / "identity", wire, NOW)
    with pytest.raises(CosiloError, match="nowhere is not a folder; make it first"):
        await enrol(wire.invite(), tmp_path / "nowhere" / "identity", wire, NOW)
    assert wire.requests == []


async def test_an_answer_that_lies_is_not_written(wire: Wire, tmp_path: Path) -> None:
    wire.change = lambda answer: EnrolAnswer(answer.certificate_chain, True, answer.members)
    invitation = wire.invite()
    with pytest.raises(CosiloError, match="tell the admin who invited you; nothing was written"):
        await enrol(invitation, tmp_path / "identity", wire, NOW)
    assert names(tmp_path) == ["identity.pending"]
    assert names(tmp_path / "identity.pending") == ["pending.json", "signing.key", "tls.key"]
    wire.change = None
    assert (await enrol(invitation, tmp_path / "identity", wire, NOW)).identity.peer == ANNA


async def test_an_admins_invitation_is_not_a_sites(wire: Wire, tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="the invitation is for admin bea, not for a site"):
        await enrol(wire.invite(PeerName(FEDERATION, Role.ADMIN, "bea")), tmp_path / "identity", wire, NOW)


async def test_a_clock_that_is_wrong_is_named(wire: Wire, tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match=r"certificate is not valid before .*; set this machine's clock: it says"):
        await enrol(wire.invite(), tmp_path / "identity", wire, NOW - timedelta(days=400))


def vars_of(request: EnrolRequest) -> list[bytes | str]:
    """Every field of a request."""
    return [getattr(request, name) for name in EnrolRequest.__dataclass_fields__]
