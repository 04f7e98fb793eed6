"""`cosilo` against a real gRPC server with real certificates: what its listings print, their JSON, failures and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
import pytest

from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_server.cli.main import main
from tests.identity_parties import FEDERATION, Founded
from tests.integration.cli_coordinator import Script
from tests.integration.cli_federation import (
    BASE,
    DIGEST,
    LOSSES,
    MADE,
    SHORT,
    SITES,
    Run,
    coordinator,
    cosilo,
    founded,
    own,
    round_summary,
    script,
    snapshot,
    summary,
)

__all__ = ["coordinator", "cosilo", "founded", "own", "script"]  # the fixtures


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
