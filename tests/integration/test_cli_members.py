"""`cosilo members`, `site` against a real gRPC server with real certificates: what is verified, shown, signed and refused."""

from __future__ import annotations

import io
import json
import stat
import sys
from pathlib import Path

import grpc
import pytest

from cosilo_common.identity.folder import load_identity
from cosilo_common.identity.invitation import read_invitation
from cosilo_common.identity.keys import fingerprint, make_signing_key, public_bytes
from cosilo_common.identity.members import read_members
from cosilo_common.identity.names import Role
from cosilo_common.rpc.v1 import admin_pb2
from tests.identity_parties import FEDERATION, Founded
from tests.integration.cli_coordinator import Script
from tests.integration.cli_federation import Run, coordinator, cosilo, founded, own, script, with_sites

__all__ = ["coordinator", "cosilo", "founded", "own", "script"]  # the fixtures


# --- members ---


def test_members_are_verified_and_shown_with_fingerprints(
    cosilo: Run, own: Founded, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, keys = with_sites(own, ["north"])
    assert cosilo("members") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"NAME   ROLE   {'FINGERPRINT'}",
        f"ada    admin  {fingerprint(own.members.admins()['ada'])}",
        f"north  site   {fingerprint(keys['north'])}",
    ]
    assert said.err == "version 2 of north-star, signed by ada; verified\n"
    assert cosilo("members", "--json") == 0
    assert json.loads(capsys.readouterr().out)["members"][1] == {
        "name": "north",
        "role": "site",
        "key": keys["north"].hex(),
        "fingerprint": fingerprint(keys["north"]),
        "added": 2,
    }


def test_a_members_list_that_no_admin_signed_is_refused(
    cosilo: Run, own: Founded, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    signed, _ = with_sites(own, ["north"])
    script.members = signed.model_copy(update={"signature": bytes(64)})
    assert cosilo("members") == 1
    assert capsys.readouterr().err.startswith("error: verify members list: version 2: ada's signature does not hold\n")


def test_a_members_list_older_than_one_seen_is_refused(
    cosilo: Run, own: Founded, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, _ = with_sites(own, ["north"])
    first = own.members
    assert cosilo("members") == 0
    script.members = first
    assert cosilo("members") == 1
    assert "version 2 was seen before" in capsys.readouterr().err


def test_site_invite_writes_one_secret_file(
    cosilo: Run, own: Founded, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "st-anna.invitation"
    assert cosilo("site", "invite", "st-anna", "--out", str(out), "--expires-days", "3") == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    invitation = read_invitation(out)
    assert (invitation.name, invitation.role, invitation.address) == ("st-anna", Role.SITE, "127.0.0.1:7443")
    assert invitation.preapproval is None
    request = script.heard[-1]
    assert request == admin_pb2.PutInvitationRequest(
        name="st-anna", role="site", token_public=invitation.token_public(), expires_unix_s=invitation.expires_unix_s
    )
    said = capsys.readouterr()
    assert said.out.startswith(f"invited site st-anna: {out}, until ")
    assert said.err == f"next: hand {out} to st-anna, who runs cosilo-site enrol st-anna.invitation; then cosilo site approve st-anna\n"
    assert invitation.token.hex() not in said.out + said.err


def test_a_local_demo_says_so_and_signs_a_preapproval(
    cosilo: Run, own: Founded, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "invitation"
    assert cosilo("site", "invite", "st-anna", "--out", str(out), "--local-demo") == 0
    assert capsys.readouterr().err.startswith(f"warning: --local-demo: whoever holds {out} becomes site st-anna")
    invitation = read_invitation(out)
    assert invitation.preapproval is not None
    assert invitation.preapproval.holds(own.members.admins())
    assert script.heard[-1].preapproval == invitation.preapproval.canonical()


def test_an_invitation_that_the_coordinator_refuses_is_not_left_behind(
    cosilo: Run, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.refuse["PutInvitation"] = (grpc.StatusCode.FAILED_PRECONDITION, "invite: the clock is wrong")
    assert cosilo("site", "invite", "st-anna", "--out", str(tmp_path / "invitation")) == 1
    assert capsys.readouterr().err == "error: store invitation: invite: the clock is wrong\n"
    assert not (tmp_path / "invitation").exists()


def test_an_invitation_never_overwrites(cosilo: Run, script: Script, tmp_path: Path) -> None:
    (tmp_path / "invitation").write_text("mine")
    assert cosilo("site", "invite", "st-anna", "--out", str(tmp_path / "invitation")) == 1
    assert (tmp_path / "invitation").read_text() == "mine"
    assert not any(isinstance(request, admin_pb2.PutInvitationRequest) for request in script.heard)


def enrolled(name: str, key: bytes, role: str = "site", state: str = "enrolled") -> admin_pb2.Enrolment:
    return admin_pb2.Enrolment(
        name=name, role=role, state=state, signing_key=key, expires_unix_s=1_772_366_400, enrolled_unix_s=1_772_366_100
    )


def test_site_list_believes_the_signed_list_and_not_the_coordinator(
    cosilo: Run, own: Founded, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, keys = with_sites(own, ["north"])
    liar = public_bytes(make_signing_key())
    script.enrolments = [
        admin_pb2.Enrolment(name="west", role="site", state="invited", expires_unix_s=1_772_366_400),
        enrolled("north", keys["north"], state="member"),
        enrolled("east", liar, state="member"),
        enrolled("bob", liar, role="admin"),
    ]
    assert cosilo("site", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["enrolments"]
    assert [(entry["name"], entry["state"], entry["fingerprint"]) for entry in listed] == [
        ("west", "invited", None),
        ("north", "member", fingerprint(keys["north"])),
        ("east", "enrolled", fingerprint(liar)),
    ]
    assert cosilo("site", "list") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["west", "invited", "-", "2026-03-01", "12:00:00Z", "-"]


def test_a_site_that_left_by_itself_is_shown_with_what_to_do(
    cosilo: Run, own: Founded, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, keys = with_sites(own, ["north"])
    script.enrolments = [enrolled("north", keys["north"], state="left"), enrolled("east", public_bytes(make_signing_key()), state="left")]
    assert cosilo("site", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["enrolments"]
    assert [(entry["name"], entry["state"]) for entry in listed] == [("north", "left"), ("east", "enrolled")]
    assert cosilo("site", "list") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("north  left: revoke north  ")
    script.status = admin_pb2.GetStatusResponse(sites=[admin_pb2.SiteStatus(site="north", left_unix_s=1_772_366_400)])
    assert cosilo("status") == 0
    assert "north  left: revoke north  " in capsys.readouterr().out
    assert cosilo("site", "approve", "north", "--yes") == 1
    assert "cosilo site revoke north; to have it back, invite it again after that" in capsys.readouterr().err


def test_site_approve_shows_the_fingerprint_and_signs_the_next_list(
    cosilo: Run, own: Founded, script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = public_bytes(make_signing_key())
    script.enrolments = [enrolled("north", key)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert cosilo("site", "approve", "north") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "site north enrolled with the key",
        f"    {fingerprint(key)}",
        "approved site north: members list version 2",
    ]
    assert "Does north read the same fingerprint to you, over a telephone? [y/N]" in said.err
    stored = read_members(script.members.canonical(), FEDERATION, own.admin.membership.anchor)
    member = stored.member("north")
    assert member is not None
    assert (member.role, member.key, stored.signer, stored.version) == (Role.SITE, key, "ada", 2)
    assert load_identity(own.admin.folder).members() == stored


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("n\n", "error: north is not approved"),
        ("", "error: north is not approved: nobody answered the question"),
    ],
)
def test_site_approve_signs_nothing_without_a_yes(
    cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    script.enrolments = [enrolled("north", public_bytes(make_signing_key()))]
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert cosilo("site", "approve", "north") == 1
    assert said in capsys.readouterr().err.splitlines()
    assert script.members.version == 1


@pytest.mark.parametrize(
    ("enrolments", "error", "hint"),
    [
        ([], "error: approve site: north was never invited", "hint: run cosilo site invite north --out FILE"),
        (
            [admin_pb2.Enrolment(name="north", role="site", state="invited")],
            "error: approve site: north is invited and has not enrolled yet",
            "hint: have north enrol with the invitation first",
        ),
        (
            [admin_pb2.Enrolment(name="north", role="site", state="expired")],
            "error: approve site: north is not enrolled, and its invitation expired",
            "hint: invite it again: cosilo site invite north --out FILE",
        ),
        (
            [enrolled("north", b"k" * 32, role="admin")],
            "error: approve site: north was never invited",
            "hint: run cosilo site invite north --out FILE",
        ),
    ],
)
def test_site_approve_says_how_a_name_stands(
    cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str], enrolments: list[admin_pb2.Enrolment], error: str, hint: str
) -> None:
    script.enrolments = enrolments
    assert cosilo("site", "approve", "north", "--yes") == 1
    assert capsys.readouterr().err.splitlines() == [error, hint]


def test_two_admins_at_once_do_not_overwrite_each_other(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.enrolments = [enrolled("north", public_bytes(make_signing_key()))]
    script.refuse["PutMembers"] = (
        grpc.StatusCode.FAILED_PRECONDITION,
        "store members: version 2 does not follow 2; somebody else changed the list meanwhile: run the command again",
    )
    assert cosilo("site", "approve", "north", "--yes") == 1
    assert "somebody else changed the list meanwhile" in capsys.readouterr().err


def test_site_revoke_takes_a_member_out(cosilo: Run, own: Founded, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.members, _ = with_sites(own, ["north"])
    assert cosilo("site", "revoke", "ada", "--yes") == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: revoke site: ada is not a member as a site"
    assert cosilo("site", "revoke", "north", "--yes") == 0
    assert capsys.readouterr().out == "revoked site north: members list version 3\n"
    assert script.members.list.removed == ("north",)
