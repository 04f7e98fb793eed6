"""What a person at a site types, against a coordinator with real certificates: accept, members, check, and their exit codes."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import logging
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import cosilo_client.preflight
from cosilo_client.cli import main
from cosilo_client.config import PolicyTable
from cosilo_client.coordinator import SignedRun
from cosilo_client.joining import PolicyAcceptance
from cosilo_client.journal import Journal, open_ledger
from cosilo_client.owed import DeclineCode
from cosilo_client.spending import Spending
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import Membership, load_identity, membership_json
from cosilo_common.identity.keys import fingerprint, public_bytes, save_private_key
from cosilo_common.identity.members import SignedMembers, sign_members
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import server_credentials, server_options
from cosilo_common.manifest import PLAIN_AGGREGATION, Manifest, sign_manifest
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, found
from tests.integration.memory_rounds import manifest_of, signing_key

NAMES = ("site-a", "site-b", "site-c", "site-d")


@dataclass
class Desk(site_pb2_grpc.SiteServiceServicer):
    """Runs, and the members list, and nothing else."""

    members: SignedMembers
    runs: dict[bytes, SignedRun] = field(default_factory=dict)
    leavers: int = 0

    async def Leave(self, request: site_pb2.LeaveRequest, context: Any) -> site_pb2.LeaveResponse:
        self.leavers += 1
        return site_pb2.LeaveResponse()

    async def ListMyRuns(self, request: site_pb2.ListMyRunsRequest, context: Any) -> site_pb2.ListMyRunsResponse:
        return site_pb2.ListMyRunsResponse(runs=list(self.runs))

    async def GetRun(self, request: site_pb2.GetRunRequest, context: Any) -> site_pb2.GetRunResponse:
        run = self.runs[request.run]
        return site_pb2.GetRunResponse(manifest=run.manifest, signature=run.signature, signer=run.signer)

    async def GetMembers(self, request: site_pb2.GetMembersRequest, context: Any) -> site_pb2.GetMembersResponse:
        return site_pb2.GetMembersResponse(members=self.members.canonical())


class Server:
    """A coordinator's port in a thread with an event loop of its own: the commands under test run their own."""

    def __init__(self, desk: Desk, parties: Founded) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server, self.port = self._do(lambda: self._start(desk, parties))

    def close(self) -> None:
        self._do(lambda: self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, desk: Desk, parties: Founded) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=server_options())
        site_pb2_grpc.add_SiteServiceServicer_to_server(desk, server)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(parties.coordinator.tls))
        await server.start()
        return server, port

    def _do(self, call: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(20)


@dataclass
class Place:
    """A site with an identity, beside a coordinator."""

    parties: Founded
    desk: Desk
    server: Server
    state: Path
    config: Path

    def offer(self, **changes: object) -> Manifest:
        """A run that an admin signed and the coordinator offers."""
        manifest = manifest_of(NAMES, federation=FEDERATION, **changes)
        signature = sign_manifest(manifest, self.parties.admin_key)
        self.desk.runs[manifest.digest()] = SignedRun(manifest.canonical(), signature, ADMIN)
        return manifest

    def type(self, *arguments: str) -> int:
        return main(["--config", str(self.config), *arguments])


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


@pytest.fixture
def place(parties: Founded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    draft = parties.members.draft()
    for name in NAMES:
        draft = draft.approve(name, Role.SITE, public_bytes(signing_key(name)))
    members = sign_members(parties.members, draft, ADMIN, parties.admin_key)
    desk = Desk(members)
    server = Server(desk, parties)
    state = tmp_path / "state"
    config = tmp_path / "site.toml"
    config.write_text(f'state = "{state}"\n[data]\nkind = "digits"\n[network]\ntimeout_s = 5.0\n')
    identify(parties, state, f"127.0.0.1:{server.port}")
    monkeypatch.setattr(cosilo_client.preflight, "_ASK_DEVICE", FAKE_DEVICE)
    yield Place(parties, desk, server, state, config)
    server.close()


FAKE_DEVICE = 'print(\'{"torch": "2.9.9", "cuda": [], "threads": 2}\')'


def identify(parties: Founded, state: Path, address: str, life: timedelta = timedelta(days=90)) -> None:
    """What `enrol` leaves, without asking anybody."""
    tls = parties.party(Role.SITE, "site-a", NOW, life)
    state.mkdir(mode=0o700)
    tls.certificate.parent.rename(state / "identity")
    save_private_key(state / "identity" / "signing.key", signing_key("site-a"))
    (state / "identity" / "members.json").write_bytes(parties.members.canonical())
    membership = Membership(
        federation=FEDERATION,
        role=Role.SITE,
        name="site-a",
        address=address,
        enrolment_address="127.0.0.1:1",
        anchor=parties.members.anchor(),
    )
    (state / "identity" / "federation.json").write_bytes(membership_json(membership))


Capture = pytest.CaptureFixture[str]


def test_accept_says_what_leaves_and_what_does_not_then_writes_and_pins(place: Place, capsys: Capture) -> None:
    manifest = place.offer(rounds_max=12)
    run = manifest.digest().hex()
    assert place.type("accept", run[:8], "--yes") == 0
    said = capsys.readouterr().out
    for words in (
        run,
        f"signed by its admin {ADMIN}",
        "how much training changed each of the model's values",
        "at most 12 rounds",
        "no more than f = 1 of them",
        "t = 3 sites must sign before a sum is opened",
        "1 of 4 may drop out",
        "images, labels, file names, the number of images of any class",
        f"site-a  {fingerprint(public_bytes(signing_key('site-a')))}  this site",
        f"site-b  {fingerprint(public_bytes(signing_key('site-b')))}\n",
        f"accepted {run}",
    ):
        assert words in said
    ledger = open_ledger(place.state)
    accepted = ledger.accepted(manifest.digest())
    assert accepted is not None
    assert (dict(accepted.participants), accepted.accepted_by) == (manifest.participant_keys(), "person")
    assert dict(ledger.pins()) == manifest.participant_keys()


@pytest.mark.parametrize("answer", ["", "n\n", "maybe\n", "\n"])
def test_without_a_yes_nothing_is_written(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    manifest = place.offer()
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert place.type("accept", manifest.digest().hex()) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert open_ledger(place.state).accepted_runs() == ()


def test_a_yes_accepts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = place.offer()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert place.type("accept", manifest.digest().hex()) == 0
    assert len(open_ledger(place.state).accepted_runs()) == 1


def test_a_plain_sum_says_whose_update_the_coordinator_sees_and_that_policy_refuses_it(place: Place, capsys: Capture) -> None:
    manifest = place.offer(aggregation=PLAIN_AGGREGATION)
    assert place.type("accept", manifest.digest().hex(), "--yes") == 0
    said = capsys.readouterr().out
    assert "which sees THIS SITE'S OWN update" in said
    assert "its unmasked update" not in said
    assert "this site would join no round" in said


def test_a_run_that_no_admin_signed_is_refused(place: Place, capsys: Capture) -> None:
    manifest = place.offer()
    signed = place.desk.runs[manifest.digest()]
    place.desk.runs[manifest.digest()] = SignedRun(signed.manifest, bytes(64), ADMIN)
    assert place.type("accept", manifest.digest().hex(), "--yes") == 1
    assert "is not signed by an admin" in capsys.readouterr().err


def test_another_manifest_than_the_run_s_is_refused(place: Place, capsys: Capture) -> None:
    manifest, other = place.offer(), place.offer(name="another")
    place.desk.runs[manifest.digest()] = place.desk.runs[other.digest()]
    assert place.type("accept", manifest.digest().hex(), "--yes") == 1
    assert "another manifest came" in capsys.readouterr().err


def test_a_run_in_which_this_site_has_another_key_is_refused(place: Place, capsys: Capture) -> None:
    good = manifest_of(NAMES, federation=FEDERATION).model_dump(mode="json")
    good["participants"][0]["key"] = "11" * 32
    manifest = Manifest.model_validate(good)
    signature = sign_manifest(manifest, place.parties.admin_key)
    place.desk.runs[manifest.digest()] = SignedRun(manifest.canonical(), signature, ADMIN)
    assert place.type("accept", manifest.digest().hex(), "--yes") == 1
    assert "is no participant under the key that it holds" in capsys.readouterr().err
    assert open_ledger(place.state).accepted_runs() == ()


@pytest.mark.parametrize("prefix", ["zz", ""])
def test_a_run_that_nobody_knows_is_an_error_that_lists_those_there_are(place: Place, capsys: Capture, prefix: str) -> None:
    manifest = place.offer()
    assert place.type("accept", prefix, "--yes") == 1
    assert manifest.digest().hex()[:12] in capsys.readouterr().err


def test_members_are_shown_with_fingerprints_once_verified(place: Place, capsys: Capture) -> None:
    assert place.type("members") == 0
    said = capsys.readouterr().out
    for name in NAMES:
        assert f"{name}  site   {fingerprint(public_bytes(signing_key(name)))}" in said
    assert place.type("members", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], [entry["name"] for entry in document["members"]]) == (2, sorted([ADMIN, *NAMES]))


def test_a_members_list_that_an_admin_did_not_sign_is_refused(place: Place, capsys: Capture) -> None:
    place.desk.members = place.desk.members.model_copy(update={"signature": bytes(64)})
    assert place.type("members") == 1
    assert "signature does not hold" in capsys.readouterr().err


def test_without_the_coordinator_accept_is_code_3_and_members_shows_the_last_list(place: Place, capsys: Capture) -> None:
    (place.state / "identity" / "federation.json").write_bytes(
        membership_json(load_identity(place.state / "identity").membership.model_copy(update={"address": "127.0.0.1:1"}))
    )
    assert place.type("accept", "00", "--yes") == 3
    assert "UNAVAILABLE" in capsys.readouterr().err
    assert place.type("members") == 0
    assert "showing the list that this site saw last" in capsys.readouterr().err


def test_check_finds_everything_in_order(place: Place, capsys: Capture) -> None:
    assert place.type("check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", what] for what in ("configuration", "identity", "certificate", "coordinator", "membership", "data", "device", "lora", "disk")
    ]
    assert "1797 images (0: 178, 1: 182" in lines[5]
    assert "CPU, 2 threads (torch 2.9.9)" in lines[6]
    assert lines[7].endswith(f"runs with [lora] can be trained here (peft {version('peft')})")


def test_check_says_that_runs_of_adapters_want_an_extra(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *package: None if name == "peft" else find(name, *package))
    assert place.type("check") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " lora " in line)
    assert line.startswith("ok ")
    words = (
        "no run with [lora] is trained here: peft is not installed; pip install 'cosilo-client[lora]' (a wheelhouse without a registry: "
    )
    assert line.endswith(words + "--extras lora)")


def test_check_says_what_to_do_about_each_failure(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosilo_client.preflight, "_ASK_DEVICE", "raise SystemExit('no torch here')")
    monkeypatch.setattr(cosilo_client.preflight, "free_bytes", lambda _: 10)
    place.config.write_text(f'state = "{place.state}"\n[data]\nkind = "folder"\npath = "nowhere"\n')
    place.desk.members = place.parties.members
    assert place.type("check") == 1
    said = capsys.readouterr().out
    assert "failed   membership     this site is not approved yet" in said
    assert "cosilo site approve site-a" in said
    assert "failed   data" in said
    assert "failed   device         torch does not load: no torch here" in said
    assert "failed   disk" in said


def test_an_expiring_certificate_is_a_warning_only(parties: Founded, place: Place, capsys: Capture) -> None:
    tls = parties.party(Role.SITE, "site-a", NOW, timedelta(days=3))
    for name in ("tls.key", "tls.crt"):
        (tls.certificate.parent / name).replace(place.state / "identity" / name)
    assert place.type("check") == 0
    assert "warning  certificate" in capsys.readouterr().out


def test_status_tells_without_the_daemon_and_without_the_network(place: Place, capsys: Capture) -> None:
    manifest = place.offer()
    assert place.type("accept", manifest.digest().hex(), "--yes") == 0
    Spending(place.state).add(manifest.digest(), 1, 1800)
    capsys.readouterr()
    assert place.type("status", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["site"], document["daemon"], document["connected"]) == ("site-a", "stopped", None)
    (run,) = document["runs"]
    assert (run["run"], run["round"], run["rounds_trained"], run["hours_trained"]) == (manifest.digest().hex(), 0, 1, 0.5)


def test_a_site_that_has_not_enrolled_is_told_to(tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "site.toml"
    config.write_text('state = "state"\n[data]\nkind = "digits"\n')
    assert main(["--config", str(config), "members"]) == 1
    assert "enrol first" in capsys.readouterr().err


# Acceptance by policy


def acceptance(place: Place, listed: list[str], fetched: list[bytes]) -> PolicyAcceptance:
    async def fetch(run: bytes) -> SignedRun:
        fetched.append(run)
        return place.desk.runs[run]

    policy = PolicyTable.model_validate({"runs": listed})
    identity = load_identity(place.state / "identity")
    return PolicyAcceptance(identity, open_ledger(place.state), policy, fetch, lambda: NOW)


async def test_a_listed_run_is_accepted_by_policy_after_a_person_pinned_the_same_sites(place: Place) -> None:
    first, second = place.offer(), place.offer(name="the next")
    fetched: list[bytes] = []
    accept = acceptance(place, ["the next"], fetched)
    refusal = await accept(second.digest())
    assert refusal is not None
    assert refusal.code is DeclineCode.NOT_ACCEPTED
    assert await asyncio.to_thread(place.type, "accept", first.digest().hex(), "--yes") == 0
    assert await accept(second.digest()) is None
    accepted = open_ledger(place.state).accepted(second.digest())
    assert accepted is not None
    assert accepted.accepted_by == "policy"
    assert fetched == [second.digest()]


async def test_a_run_that_is_not_listed_stays_a_person_s(place: Place) -> None:
    run = place.offer()
    refusal = await acceptance(place, ["another"], [])(run.digest())
    assert refusal is not None
    assert (refusal.code, open_ledger(place.state).accepted_runs()) == (DeclineCode.NOT_ACCEPTED, ())


async def test_another_manifest_under_a_listed_digest_is_refused(place: Place) -> None:
    run, other = place.offer(), place.offer(name="another")
    place.desk.runs[run.digest()] = place.desk.runs[other.digest()]
    with pytest.raises(CosiloError, match="another manifest came"):
        await acceptance(place, [run.digest().hex()], [])(run.digest())


# One daemon


@pytest.fixture
def own_log() -> Iterator[None]:
    """Gives the process's log back to pytest after a daemon in this process took it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_sigterm_ends_the_daemon_in_order(place: Place) -> None:
    place.config.write_text(place.config.read_text() + '[metrics]\nlisten = "127.0.0.1:0"\n')
    command = [sys.executable, "-m", "cosilo_client.cli", "--config", str(place.config), "serve"]
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        endpoints = place.state / "endpoints.json"
        deadline = time.monotonic() + 30
        while not endpoints.exists() and daemon.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        address = json.loads(endpoints.read_text())["metrics"]
        assert page(f"http://{address}/healthz")[0] == 200
        status, reason = page(f"http://{address}/readyz")
        assert (status, reason.startswith("not connected: ")) == (503, True)
        assert "cosilo_connected 0.0" in page(f"http://{address}/metrics")[1]
        daemon.send_signal(signal.SIGTERM)
        _, log = daemon.communicate(timeout=20)
    finally:
        daemon.kill()
    assert daemon.returncode == 0
    assert not endpoints.exists()
    assert [json.loads(line)["event"] for line in log.splitlines()][-2:] == ["stopping", "stopped"]


def page(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.usefixtures("own_log")
def test_a_second_daemon_on_one_journal_is_refused(place: Place, capsys: Capture) -> None:
    with Journal.open(place.state, site_key=public_bytes(signing_key("site-a"))):
        assert place.type("serve") == 1
    said = capsys.readouterr().err
    assert "another daemon (pid" in said


@pytest.mark.usefixtures("own_log")
def test_a_metrics_port_in_use_is_refused_and_frees_the_journal(place: Place, capsys: Capture) -> None:
    address = f"127.0.0.1:{place.server.port}"
    place.config.write_text(place.config.read_text() + f'[metrics]\nlisten = "{address}"\n')
    assert place.type("serve") == 1
    assert f"open telemetry port: {address}" in capsys.readouterr().err
    Journal.open(place.state, site_key=public_bytes(signing_key("site-a"))).close()
