"""`cosilo` against a real gRPC server with real certificates: exact output, JSON, signatures and exit codes."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cosilo_common.identity.folder import load_identity
from cosilo_common.identity.invitation import read_invitation
from cosilo_common.identity.keys import fingerprint, make_signing_key, public_bytes
from cosilo_common.identity.members import SignedMembers, read_members, sign_members
from cosilo_common.identity.names import Role
from cosilo_common.manifest import verify_manifest
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_common.weights import TensorTable
from cosilo_server.cli import torch_work
from cosilo_server.cli.main import main
from tests.identity_parties import FEDERATION, Founded, found
from tests.integration.cli_coordinator import Script, serving

Run = Callable[..., int]
SITES = ["east", "north", "south", "west"]
DIGEST = bytes.fromhex("1a2b3c4d5e6f" + "00" * 26)
SHORT = "1a2b3c4d5e6f"
BASE, MADE = bytes([0xAB]) * 32, bytes([0xCD]) * 32


def summary(**changes: Any) -> admin_pb2.RunSummary:
    plain: dict[str, Any] = {
        "run": DIGEST,
        "name": "digits-1",
        "state": "idle",
        "rounds_closed": 3,
        "rounds_wanted": 3,
        "aggregation": "cosilo-secagg/1",
        "checkpoint": MADE,
        "parameters": 640_000,
        "participants": SITES,
    }
    return admin_pb2.RunSummary(**{**plain, **changes})


def round_summary(number: int, phase: int = site_pb2.ROUND_PHASE_CLOSED, **changes: Any) -> admin_pb2.RoundSummary:
    plain: dict[str, Any] = {
        "round": number,
        "kind": site_pb2.ROUND_KIND_TRAIN,
        "phase": phase,
        "started_unix_s": 1_772_366_400.0,
        "seconds": 8.25,
        "attempt": 1,
        "invited": SITES,
        "survivors": SITES[:3],
        "bytes_down": 10_200_000,
        "bytes_up": 9_800_000,
        "base_digest": BASE,
        "checkpoint_digest": MADE,
    }
    return admin_pb2.RoundSummary(**{**plain, **changes})


LOSSES = {
    "has_losses": True,
    "heldout_loss": 0.5,
    "heldout_loss_by_bucket": [0.75, 0.25],
    "train_loss": 0.375,
    "clip_ratio": 0.0,
    "total_weight": 1600,
    "update_norm": 1.5,
}


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "made")


def with_sites(founded: Founded, names: list[str]) -> tuple[SignedMembers, dict[str, bytes]]:
    """The next members list, with these sites in it, and their keys."""
    keys = {name: public_bytes(make_signing_key()) for name in names}
    draft = founded.members.draft()
    for name, key in keys.items():
        draft = draft.approve(name, Role.SITE, key)
    return sign_members(founded.members, draft, founded.admin.peer.name, founded.admin_key), keys


@pytest.fixture
def own(founded: Founded, tmp_path: Path) -> Founded:
    """A federation of the test's own, for tests that change the members list."""
    return found(tmp_path / "made")


@pytest.fixture
def script(own: Founded) -> Script:
    return Script(members=own.members, runs=[summary()])


@pytest.fixture
def coordinator(own: Founded, script: Script) -> Iterator[str]:
    with serving(own, script) as address:
        yield address


@pytest.fixture
def cosilo(own: Founded, coordinator: str) -> Run:
    def run(*arguments: str) -> int:
        return main(["--admin", str(own.admin.folder), "--address", coordinator, *arguments])

    return run


# --- listings ---


def test_run_list(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.runs.append(summary(run=b"\x99" * 32, name="x", state="waiting", note="2 of 3 sites", checkpoint=b""))
    assert cosilo("run", "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "RUN           NAME      STATE    ROUNDS  AGGREGATION      PARAMETERS  SITES  NOTE",
        "1a2b3c4d5e6f  digits-1  idle     3/3     cosilo-secagg/1  640000      4      -",
        "999999999999  x         waiting  3/3     cosilo-secagg/1  640000      4      2 of 3 sites",
    ]


def test_run_list_json(cosilo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cosilo("run", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "runs": [
            {
                "run": DIGEST.hex(),
                "name": "digits-1",
                "state": "idle",
                "rounds_closed": 3,
                "rounds_wanted": 3,
                "aggregation": "cosilo-secagg/1",
                "checkpoint": MADE.hex(),
                "parameters": 640_000,
                "participants": SITES,
                "note": "",
            }
        ]
    }


def test_round_list(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.rounds = [
        round_summary(1, **LOSSES),
        round_summary(2, site_pb2.ROUND_PHASE_ABANDONED, reason="quorum", survivors=[], checkpoint_digest=b""),
    ]
    assert cosilo("round", "list", "digits-1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ROUND  KIND   PHASE      SITES  SECONDS  HELD-OUT  TRAINING  DOWN    UP     CHECKPOINT    REASON",
        "1      train  closed     3/4    8.2      0.5       0.375     10.2MB  9.8MB  cdcdcdcdcdcd  -",
        "2      train  abandoned  0/4    8.2      -         -         10.2MB  9.8MB  -             quorum",
    ]


def test_round_list_json(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    progress = admin_pb2.SiteProgress(
        site="east",
        connected=True,
        activity=site_pb2.SITE_ACTIVITY_TRAINING,
        tenths=4,
        bytes=7,
        declined=site_pb2.DECLINE_CODE_NOT_ACCEPTED,
    )
    script.rounds = [round_summary(1, site_pb2.ROUND_PHASE_TRAINING, sites=[progress], checkpoint_digest=b"", **LOSSES)]
    assert cosilo("round", "list", SHORT[:4], "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": DIGEST.hex(),
        "rounds": [
            {
                "round": 1,
                "kind": "train",
                "phase": "training",
                "reason": "",
                "note": "",
                "started_unix_s": 1_772_366_400.0,
                "seconds": 8.25,
                "attempt": 1,
                "invited": SITES,
                "survivors": SITES[:3],
                "bytes_down": 10_200_000,
                "bytes_up": 9_800_000,
                "base": BASE.hex(),
                "checkpoint": None,
                "moments": None,
                "losses": {
                    "heldout": 0.5,
                    "heldout_by_bucket": [0.75, 0.25],
                    "train": 0.375,
                    "clip_ratio": 0.0,
                    "total_weight": 1600,
                    "update_norm": 1.5,
                },
                "sites": [
                    {
                        "site": "east",
                        "connected": True,
                        "activity": "training",
                        "tenths": 4,
                        "bytes": 7,
                        "delivered": False,
                        "declined": "not accepted",
                        "late": False,
                    }
                ],
            }
        ],
    }


def test_round_show(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.rounds = [round_summary(1, **LOSSES)]
    assert cosilo("round", "show", "digits-1", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "held-out loss before  0.5" in lines
    assert "by noise level        0.75 0.25" in lines
    assert "started               2026-03-01 12:00:00Z" in lines
    assert cosilo("round", "show", "digits-1", "2") == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: show round: digits-1 has no round 2"


def test_a_loss_that_is_no_number_is_null(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.rounds = [round_summary(1, **{**LOSSES, "train_loss": float("nan")})]
    assert cosilo("round", "show", "digits-1", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["losses"]["train"] is None


def test_checkpoint_list(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.checkpoints = [
        admin_pb2.Checkpoint(round=0, weights_digest=BASE, bytes=2_560_000, created_unix_s=1_772_366_400.0, retired_unix_s=1_772_366_460.0),
        admin_pb2.Checkpoint(
            round=1, weights_digest=MADE, ema_digest=BASE, bytes=2_560_000, created_unix_s=1_772_366_460.0, kept="newest", name="best"
        ),
        admin_pb2.Checkpoint(round=2, weights_digest=MADE, bytes=2_560_000, created_unix_s=1_772_366_460.0),
    ]
    assert cosilo("checkpoint", "list", "digits-1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ROUND  WEIGHTS       EMA           BYTES    CREATED               KEPT",
        "0      abababababab  -             2560000  2026-03-01 12:00:00Z  retired 2026-03-01 12:01:00Z",
        "1      cdcdcdcdcdcd  abababababab  2560000  2026-03-01 12:01:00Z  newest",
        "2      cdcdcdcdcdcd  -             2560000  2026-03-01 12:01:00Z  until the next collection",
    ]
    assert cosilo("checkpoint", "list", "digits-1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"][0] == {
        "round": 0,
        "weights": BASE.hex(),
        "ema": None,
        "bytes": 2_560_000,
        "created_unix_s": 1_772_366_400.0,
        "name": None,
        "kept": None,
        "retired_unix_s": 1_772_366_460.0,
    }


def test_checkpoint_keep_and_unkeep(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cosilo("checkpoint", "keep", "digits-1", "4", "--name", "best") == 0
    assert cosilo("checkpoint", "keep", "digits-1", "5") == 0
    assert cosilo("checkpoint", "unkeep", "digits-1", "4") == 0
    assert capsys.readouterr().out.splitlines() == [
        "the checkpoint of round 4 is kept as best",
        "the checkpoint of round 5 is kept",
        "the checkpoint of round 4 is left to the retention policy",
    ]
    asked = [request for request in script.heard if isinstance(request, admin_pb2.KeepCheckpointRequest)]
    assert [(request.round, request.name, request.leave) for request in asked] == [(4, "best", False), (5, "", False), (4, "", True)]


def test_a_retired_checkpoint_says_so(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.checkpoints = [
        admin_pb2.Checkpoint(round=0, weights_digest=BASE, bytes=1, retired_unix_s=1_772_366_460.0),
        admin_pb2.Checkpoint(round=1, weights_digest=MADE, bytes=1, kept="newest"),
    ]
    assert cosilo("checkpoint", "pull", "digits-1", "--round", "0") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: find checkpoint: that of round 0 was retired by policy on 2026-03-01 12:01:00Z",
        "hint: choose one that cosilo checkpoint list says is kept; cosilo checkpoint keep keeps the next ones",
    ]


def test_status(cosilo: Run, coordinator: str, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.status = admin_pb2.GetStatusResponse(
        federation=FEDERATION,
        software="cosilo 0.1.0",
        uptime_s=11_100.0,
        members_version=3,
        sites=[
            admin_pb2.SiteStatus(
                site="east", connected=True, last_seen_unix_s=1_772_366_400.0, address="10.0.0.7:5123", software="cosilo 0.1.0"
            ),
            admin_pb2.SiteStatus(site="north"),
        ],
        runs=[summary()],
        disk_free_bytes=81_000_000_000,
        certificate_expires_unix_s=1_772_366_400,
    )
    assert cosilo("status") == 0
    assert capsys.readouterr().out.splitlines() == [
        "federation    north-star",
        f"coordinator   {coordinator}, cosilo 0.1.0, up 3 h 5 min",
        "certificate   until 2026-03-01 12:00:00Z",
        "disk free     81.0 GB",
        "members list  version 3",
        "",
        "SITE   CONNECTED  LAST SEEN             ADDRESS        CERTIFICATE UNTIL  SOFTWARE",
        "east   yes        2026-03-01 12:00:00Z  10.0.0.7:5123  -                  cosilo 0.1.0",
        "north  no         -                     -              -                  -",
        "",
        "RUN           NAME      STATE  ROUNDS  AGGREGATION      PARAMETERS  SITES  NOTE",
        "1a2b3c4d5e6f  digits-1  idle   3/3     cosilo-secagg/1  640000      4      -",
    ]
    assert cosilo("status", "--json") == 0
    shape = json.loads(capsys.readouterr().out)
    assert shape["sites"][1] == {
        "site": "north",
        "connected": False,
        "last_seen_unix_s": None,
        "address": "",
        "certificate_expires_unix_s": None,
        "software": "",
        "left_unix_s": None,
    }
    assert [run["name"] for run in shape["runs"]] == ["digits-1"]


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


# --- runs ---


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('name = "digits-2"\npreset = "digits"\n')
    return path


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test of the real table pays for loading torch; the others take a small one."""
    monkeypatch.setattr(torch_work, "tensor_table", lambda architecture: TensorTable((("weight", (2, 3)),)))


def test_run_create_signs_what_the_file_says(
    cosilo: Run, own: Founded, script: Script, run_file: Path, small_table: None, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, keys = with_sites(own, SITES)
    assert cosilo("run", "create", str(run_file), "--json") == 0
    created = json.loads(capsys.readouterr().out)
    request = script.heard[-1]
    manifest, signer = verify_manifest(request.manifest, request.signature, own.members.admins(), FEDERATION)
    assert signer == "ada"
    assert manifest.participant_keys() == keys
    assert created == {
        "run": manifest.digest().hex(),
        "short": manifest.digest().hex()[:12],
        "name": "digits-2",
        "participants": SITES,
        "parameters": 6,
        "aggregation": "cosilo-secagg/1",
    }


def test_two_runs_of_one_file_are_two_runs(
    cosilo: Run, own: Founded, script: Script, run_file: Path, small_table: None, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, _ = with_sites(own, SITES)
    digests = set()
    for _ in range(2):
        assert cosilo("run", "create", str(run_file), "--json") == 0
        digests.add(json.loads(capsys.readouterr().out)["run"])
    assert len(digests) == 2


def test_run_create_tells_people_what_comes_next(
    cosilo: Run, own: Founded, script: Script, run_file: Path, small_table: None, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, _ = with_sites(own, SITES)
    assert cosilo("run", "create", str(run_file)) == 0
    said = capsys.readouterr()
    short = said.out.splitlines()[0].split()[1]
    assert said.out.splitlines()[2:] == [
        "name           digits-2",
        "participants   east, north, south, west",
        "parameters     6",
        "aggregation    cosilo-secagg/1",
        "a round needs  3 sites",
    ]
    assert said.err == f"next: each site runs cosilo-site accept {short}; then cosilo round start {short} --rounds 10\n"


def test_insecure_plain_sum_needs_its_flag_too(
    cosilo: Run, own: Founded, script: Script, run_file: Path, small_table: None, capsys: pytest.CaptureFixture[str]
) -> None:
    script.members, _ = with_sites(own, SITES)
    run_file.write_text(run_file.read_text() + 'aggregation = "insecure-plain-sum"\n')
    assert cosilo("run", "create", str(run_file)) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: create run: ")
    assert said[1] == "hint: add --insecure-plain-sum if that is meant"
    assert script.heard == []
    assert cosilo("run", "create", str(run_file), "--insecure-plain-sum") == 0
    assert capsys.readouterr().err.startswith(
        "warning: insecure-plain-sum: updates are not masked; the coordinator sees every site's own update\n"
    )


def test_the_insecure_flag_is_refused_where_the_file_is_secure(cosilo: Run, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cosilo("run", "create", str(run_file), "--insecure-plain-sum") == 1
    assert "asks for cosilo-secagg/1" in capsys.readouterr().err


def test_a_bad_run_file_is_code_1_and_asks_nobody(cosilo: Run, script: Script, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file.write_text('name = "x"\npreset = "digits"\nsecure = true\n')
    assert cosilo("run", "create", str(run_file)) == 1
    assert capsys.readouterr().err.splitlines()[0] == f"error: read run file: {run_file}: unknown key secure"
    assert script.heard == []


def test_run_show_reads_the_signed_manifest(
    cosilo: Run, own: Founded, script: Script, run_file: Path, small_table: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = created_run(cosilo, own, script, run_file, capsys)
    assert cosilo("run", "show", "digits-2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"digest          {run.hex()}"
    assert "signed by       ada" in lines
    assert "a round needs   3 sites (n_min 3, f 1)" in lines
    assert "images          8 pixels a side, 10 classes" in lines


def test_run_show_refuses_a_manifest_that_no_admin_signed(
    cosilo: Run, own: Founded, script: Script, run_file: Path, small_table: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, answer = created_run(cosilo, own, script, run_file, capsys)
    script.manifests[run] = site_pb2.GetRunResponse(manifest=answer.manifest, signature=bytes(64))
    assert cosilo("run", "show", "digits-2") == 1
    assert "is not signed by an admin" in capsys.readouterr().err
    script.manifests[run] = site_pb2.GetRunResponse(manifest=answer.manifest + b" ", signature=answer.signature)
    assert cosilo("run", "show", "digits-2") == 1
    assert "the coordinator answered with another run" in capsys.readouterr().err


def created_run(
    cosilo: Run, own: Founded, script: Script, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[bytes, site_pb2.GetRunResponse]:
    """Creates a run and has the coordinator know it."""
    script.members, _ = with_sites(own, SITES)
    assert cosilo("run", "create", str(run_file), "--json") == 0
    run = bytes.fromhex(json.loads(capsys.readouterr().out)["run"])
    request = script.heard[-1]
    answer = site_pb2.GetRunResponse(manifest=request.manifest, signature=request.signature, signer="ada")
    script.manifests[run] = answer
    script.runs = [summary(run=run, name="digits-2")]
    return run, answer


@pytest.mark.parametrize(("options", "abandon"), [([], False), (["--abandon"], True)])
def test_run_stop(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str], options: list[str], abandon: bool) -> None:
    assert cosilo("run", "stop", "digits-1", *options) == 0
    assert script.heard[-1] == admin_pb2.StopRunRequest(run=DIGEST, abandon=abandon)
    assert capsys.readouterr().out == f"stopped digits-1 {SHORT}\n"


def test_run_pause_and_resume(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert cosilo("run", "pause", "digits-1", "--reason", "the scanner moves", "--abandon") == 0
    assert script.heard[-1] == admin_pb2.PauseRunRequest(run=DIGEST, reason="the scanner moves", abandon=True)
    assert cosilo("run", "resume", "digits-1") == 0
    assert script.heard[-1] == admin_pb2.ResumeRunRequest(run=DIGEST)
    assert capsys.readouterr().out == f"paused digits-1 {SHORT}\nresumed digits-1 {SHORT}\n"


# --- rounds ---


@pytest.mark.parametrize(
    ("options", "kind", "rounds", "line"),
    [
        ([], site_pb2.ROUND_KIND_TRAIN, 1, f"asked for 1 round of digits-1 {SHORT}, from round 1 on\n"),
        (["--rounds", "3"], site_pb2.ROUND_KIND_TRAIN, 3, f"asked for 3 rounds of digits-1 {SHORT}, from round 1 on\n"),
        (["--rehearsal"], site_pb2.ROUND_KIND_REHEARSAL, 1, f"asked for 1 rehearsal of digits-1 {SHORT}, from round 1 on\n"),
        (
            ["--statistics", "--rounds", "2"],
            site_pb2.ROUND_KIND_STATISTICS,
            2,
            f"asked for 2 statistics rounds of digits-1 {SHORT}, from round 1 on\n",
        ),
    ],
)
def test_round_start(
    cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str], options: list[str], kind: int, rounds: int, line: str
) -> None:
    assert cosilo("round", "start", "digits-1", *options) == 0
    assert script.heard[-1] == admin_pb2.StartRoundsRequest(run=DIGEST, rounds=rounds, kind=kind)  # type: ignore[arg-type]
    assert capsys.readouterr().out == line


def test_round_start_json(cosilo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cosilo("round", "start", "digits-1", "--statistics", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": DIGEST.hex(), "first_round": 1, "rounds": 1, "kind": "statistics"}


def snapshot(state: str, closed: int, current: admin_pb2.RoundSummary | None = None, wanted: int = 2) -> admin_pb2.WatchRunResponse:
    return admin_pb2.WatchRunResponse(summary=summary(state=state, rounds_closed=closed, rounds_wanted=wanted), current=current)


def test_round_start_waits_for_the_rounds_it_asked_for(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.rounds = [round_summary(1)]
    script.watched = [
        [
            snapshot("running", 1, round_summary(2, site_pb2.ROUND_PHASE_TRAINING)),
            snapshot("idle", 2, round_summary(2, **LOSSES)),
        ]
    ]
    assert cosilo("round", "start", "digits-1", "--wait") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"asked for 1 round of digits-1 {SHORT}, from round 2 on",
        "round 2: training, 4 sites invited",
        "round 2 closed: 3 of 4 sites, 8.2 s, held-out loss before 0.5, training loss 0.375, 10.2 MB down, 9.8 MB up, checkpoint cdcdcdcdcdcd",
        f"digits-1 {SHORT}: idle, 2 of 2 rounds closed",
    ]


def test_watch_until_idle_fails_when_the_run_is_stopped(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    abandoned = round_summary(1, site_pb2.ROUND_PHASE_ABANDONED, reason="stopped by an admin")
    script.watched = [[snapshot("stopped", 0, abandoned, wanted=0)]]
    assert cosilo("run", "watch", "digits-1", "--until-idle") == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "round 1 abandoned after 8.2 s: stopped by an admin"
    assert said.err.splitlines() == [
        f"error: watch run: {SHORT}: the run is stopped",
        f"hint: cosilo round list {SHORT} has every round's reason",
    ]


def test_watch_goes_on_after_the_coordinator_restarted(cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.rounds = [round_summary(1), round_summary(2)]
    script.watched = [
        [snapshot("running", 0, round_summary(1, site_pb2.ROUND_PHASE_TRAINING))],
        [snapshot("idle", 2, round_summary(2))],
    ]
    assert cosilo("run", "watch", SHORT, "--until-idle") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "round 1",
        "round 1 closed",
        "round 2 closed",
        f"digits-1 {SHORT}",
    ]


# --- failures, in words ---


def test_nobody_at_the_address_is_code_3(own: Founded, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--admin", str(own.admin.folder), "--address", "127.0.0.1:1", "run", "list"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: reach coordinator: 127.0.0.1:1: ")
    assert said[1] == "hint: start it with cosilo-coordinator serve, or name another address with --address HOST:PORT"


def test_a_coordinator_of_another_federation_is_code_3(founded: Founded, coordinator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--admin", str(founded.admin.folder), "--address", coordinator, "run", "list"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"error: reach coordinator: {coordinator}: no TLS connection")
    assert said[1] == "hint: check that --admin and --address are of one federation and that the certificate has not expired"


@pytest.mark.parametrize(
    ("code", "details", "error"),
    [
        (
            grpc.StatusCode.PERMISSION_DENIED,
            "site north may not call this: it is for a admin",
            "error: list runs: permission denied: site north may not call this: it is for a admin",
        ),
        (grpc.StatusCode.UNAUTHENTICATED, "no certificate", "error: list runs: not authenticated: no certificate"),
        (grpc.StatusCode.FAILED_PRECONDITION, "the disk is full", "error: list runs: the disk is full"),
        (grpc.StatusCode.INVALID_ARGUMENT, "rounds 0 is not\nfrom 1", "error: list runs: rounds 0 is not from 1"),
        (grpc.StatusCode.UNIMPLEMENTED, "", "error: list runs: this coordinator does not know that call"),
        (grpc.StatusCode.INTERNAL, "boom", "error: list runs: the coordinator failed: boom"),
        (grpc.StatusCode.NOT_FOUND, "", "error: list runs: not found"),
    ],
)
def test_a_refusal_is_code_1_in_words(
    cosilo: Run, script: Script, capsys: pytest.CaptureFixture[str], code: grpc.StatusCode, details: str, error: str
) -> None:
    script.refuse["ListRuns"] = (code, details)
    assert cosilo("run", "list") == 1
    assert capsys.readouterr().err.splitlines()[0] == error


def test_the_program_itself_says_the_same(own: Founded, coordinator: str) -> None:
    command = [sys.executable, "-m", "cosilo_server.cli.main", "run", "list", "--json"]
    environment = {"COSILO_ADMIN": str(own.admin.folder), "COSILO_ADDRESS": coordinator, "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [run["name"] for run in json.loads(done.stdout)["runs"]] == ["digits-1"]
    gone = subprocess.run(command, capture_output=True, text=True, env={**environment, "COSILO_ADDRESS": "127.0.0.1:1"})
    assert gone.returncode == 3
    assert [line.split(":")[0] for line in gone.stderr.splitlines()] == ["error", "hint"]


def test_every_stream_is_closed_by_its_command(cosilo: Run, script: Script) -> None:
    script.watched = [[snapshot("idle", 2, round_summary(2)), *[snapshot("idle", 2, round_summary(2))] * 1000]]
    assert cosilo("run", "watch", "digits-1", "--until-idle") == 0
