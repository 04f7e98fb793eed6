"""`cosilo run`, `round` against a real gRPC server with real certificates: manifests signed, rounds asked for and watched."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import Role
from cosilo_common.manifest import parse_manifest, verify_manifest
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_common.weights import TensorTable
from cosilo_server.cli import torch_work
from tests.identity_parties import FEDERATION, Founded
from tests.integration.cli_coordinator import Script
from tests.integration.cli_federation import (
    DIGEST,
    LOSSES,
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
    with_sites,
)

__all__ = ["coordinator", "cosilo", "founded", "own", "script"]  # the fixtures


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


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there to answer a question."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


@pytest.mark.usefixtures("nobody", "small_table")
def test_run_sign_vouches_for_a_run_whose_signer_is_no_admin_any_more(
    cosilo: Run, own: Founded, script: Script, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, answer = created_run(cosilo, own, script, run_file, capsys)
    assert cosilo("run", "sign", "digits-2", "--yes") == 1
    assert f"{run.hex()[:12]} is signed by ada, an admin\nhint: nothing is left to do\n" in capsys.readouterr().err
    script.manifests[run] = site_pb2.GetRunResponse(manifest=answer.manifest, signature=bytes(64), signer="bob")
    asked = len(script.heard)
    assert cosilo("run", "sign", "digits-2") == 1
    assert f"{run.hex()[:12]} is not signed: nobody answered the question" in capsys.readouterr().err
    assert not any(isinstance(each, admin_pb2.CreateRunRequest) for each in script.heard[asked:])
    assert cosilo("run", "sign", "digits-2", "--yes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"digest          {run.hex()}" in lines
    assert "signed by       bob, says the coordinator; no admin any more" in lines
    assert lines[-1] == f"signed digits-2 {run.hex()[:12]}"
    request = script.heard[-1]
    assert request.manifest == answer.manifest
    assert verify_manifest(request.manifest, request.signature, own.members.admins(), FEDERATION)[1] == "ada"


@pytest.mark.usefixtures("nobody", "small_table")
def test_run_sign_refuses_what_a_coordinator_made_up(
    cosilo: Run, own: Founded, script: Script, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A coordinator that makes up a run, with sites of its own in it, gets no signature for it."""
    run, answer = created_run(cosilo, own, script, run_file, capsys)
    script.manifests[run] = site_pb2.GetRunResponse(manifest=answer.manifest, signature=bytes(64), signer="bob")
    draft = script.members.draft()
    script.members = sign_members(script.members, draft.remove(SITES[0]), own.admin.peer.name, own.admin_key)
    asked = len(script.heard)
    assert cosilo("run", "sign", "digits-2") == 1  # revoked is not unknown: it is said, and asked
    captured = capsys.readouterr()
    assert f"revoked since   {SITES[0]}" in captured.out.splitlines()
    assert f"{SITES[0]}: revoked, so nobody can tell whether the keys in this manifest were theirs" in captured.err
    readmitted = script.members.draft().approve(SITES[0], Role.SITE, public_bytes(make_signing_key()), readmit=True)
    script.members = sign_members(script.members, readmitted, own.admin.peer.name, own.admin_key)
    assert cosilo("run", "sign", "digits-2", "--yes") == 1
    assert f"participant {SITES[0]} is no member by the key in the manifest" in capsys.readouterr().err
    elsewhere = parse_manifest(answer.manifest).model_copy(update={"federation": "south-star"})
    script.manifests[elsewhere.digest()] = site_pb2.GetRunResponse(manifest=elsewhere.canonical(), signature=bytes(64), signer="bob")
    script.runs = [summary(run=elsewhere.digest(), name="digits-2")]
    assert cosilo("run", "sign", "digits-2", "--yes") == 1
    assert "is of federation 'south-star'" in capsys.readouterr().err
    assert not any(isinstance(each, admin_pb2.CreateRunRequest) for each in script.heard[asked:])


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
    assert script.heard[-1] == admin_pb2.StartRoundsRequest(run=DIGEST, rounds=rounds, kind=kind)  # type: ignore[arg-type]  # a number from the table above
    assert capsys.readouterr().out == line


def test_round_start_json(cosilo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cosilo("round", "start", "digits-1", "--statistics", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": DIGEST.hex(), "first_round": 1, "rounds": 1, "kind": "statistics"}


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
