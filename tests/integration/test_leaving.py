"""A site leaves a run, and the federation: nothing more goes out, its keys are gone, and it is barred before an admin signs anything."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

import cosilo_client.duties
import cosilo_client.participation
from cosilo_client.journal import LEFT, Journal, open_ledger
from cosilo_client.ledger import Phase, RoundEntry, RoundState
from cosilo_common.audit import AUDIT_FILE
from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import Role
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_server.rounds.state import DeclineCode
from cosilo_server.store import Store
from tests.integration.coordinator_world import HandSite, World, code_of, start, world
from tests.integration.memory_rounds import MemoryCoordinator, MemorySite, signing_key
from tests.integration.test_session_commands import Place, parties, place
from tests.integration.test_session_participation import NAMES, federation, survivors

__all__ = ["parties", "place", "world"]

AT = "2026-03-02T16:00:00+00:00"
TIMEOUT_S = 30.0


# --- a run, at the site ---


@pytest_asyncio.fixture
async def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MemoryCoordinator]:
    monkeypatch.setattr(cosilo_client.duties, "LOOK_S", 0.01)
    monkeypatch.setattr(cosilo_client.participation, "LOOK_AGAIN_S", 0.05)
    async with federation(tmp_path) as made:
        yield made


def leave(site: MemorySite) -> bytes:
    run = site.coordinator.manifest.digest()
    site.journal.ledger.leave(run, at=AT)
    return run


@pytest.mark.asyncio
async def test_a_site_that_left_is_left_out_though_it_had_accepted(coordinator: MemoryCoordinator) -> None:
    site = coordinator.sites["site-a"]
    coordinator.start()
    await coordinator.until_phase("closed")
    leave(site)
    coordinator.start(number=2)
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES[1:]
    assert (site.declines(), len(site.trainer.jobs)) == (["NOT_ACCEPTED"], 1)


@pytest.mark.asyncio
async def test_leaving_while_it_trains_stops_that_and_forgets_it(coordinator: MemoryCoordinator) -> None:
    site = coordinator.sites["site-a"]
    site.trainer.hold = asyncio.Event()
    coordinator.start()
    await coordinator.until(lambda: len(site.trainer.jobs) == 1)
    run = leave(site)
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES[1:]
    assert site.trainer.cancelled == 1
    await coordinator.until(lambda: not site.journal.files(run).folder.exists())
    last = site.journal.ledger.last_round(run)
    assert last is not None
    assert (last.state, last.outcome) == (RoundState.ABANDONED, LEFT)


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["shares", "put"])
async def test_what_is_trained_and_not_uploaded_never_leaves(coordinator: MemoryCoordinator, call: str) -> None:
    site = coordinator.sites["site-a"]
    site.stop_at = f"before {call}"
    coordinator.start()
    async with asyncio.timeout(20):
        await site.stopped.wait()
    run = leave(site)
    await site.restart()
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES[1:]
    assert "site-a" not in coordinator.uploads
    assert not site.journal.files(run).folder.exists()


@pytest.mark.asyncio
async def test_a_round_whose_upload_is_handed_in_is_signed_for_to_its_end(tmp_path: Path) -> None:
    """With f = 1 none of three may be missing from the consents: without this site the round would be lost."""
    async with federation(tmp_path, NAMES[:3]) as coordinator:
        site = coordinator.sites["site-a"]
        site.stop_at = "before consent"
        coordinator.start()
        async with asyncio.timeout(20):
            await site.stopped.wait()
        leave(site)
        await site.restart()
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == NAMES[:3]


@pytest.mark.asyncio
async def test_a_folder_that_is_opened_again_has_forgotten_what_was_left(tmp_path: Path) -> None:
    key = signing_key("site-a").public_key().public_bytes_raw()
    run = bytes(32)
    with Journal.open(tmp_path, site_key=key) as journal:
        journal.ledger.accept(run, b"manifest", bytes(64), {"site-a": key}, accepted_at=AT, accepted_by="person")
        journal.begin(RoundEntry(run, 1, "train", ("site-a",), bytes(32), bytes(32)))
        journal.files(run).update.write_bytes(b"unmasked")
        journal.ledger.reach(run, 1, Phase.TRAINED)
        open_ledger(tmp_path).leave(run, at=AT)
    with Journal.open(tmp_path, site_key=key) as journal:
        assert not journal.files(run).folder.exists()
        last = journal.ledger.last_round(run)
        assert last is not None
        assert last.outcome == LEFT


def test_the_ledger_never_forgets_a_departure(tmp_path: Path) -> None:
    ledger, run = open_ledger(tmp_path), bytes(32)
    ledger.accept(run, b"manifest", bytes(64), {"site-a": bytes(32)}, accepted_at=AT, accepted_by="person")
    assert ledger.left_at(run) == ""
    ledger.rejoin(run, at=AT)  # it was never left
    for _ in range(2):
        ledger.leave(run, at=AT)
    assert ledger.left_at(run) == AT
    ledger.rejoin(run, at=AT)
    assert ledger.left_at(run) == ""
    with sqlite3.connect(tmp_path / "state.db") as db:
        assert db.execute('SELECT "left" FROM departures ORDER BY id').fetchall() == [(1,), (0,)]
        for statement in ("DELETE FROM departures", 'UPDATE departures SET "left" = 0'):
            with pytest.raises(sqlite3.IntegrityError, match="the ledger keeps departures"):
                db.execute(statement)


def test_a_ledger_of_version_1_gains_the_table_and_its_triggers(tmp_path: Path) -> None:
    new = tmp_path / "new"
    open_ledger(new)
    old = tmp_path / "old"
    open_ledger(old)
    with sqlite3.connect(old / "state.db") as db:
        db.execute("DROP TABLE departures")
        db.execute("UPDATE schema_version SET version = 1")
    open_ledger(old)

    def shape(folder: Path) -> list[Any]:
        with sqlite3.connect(folder / "state.db") as db:
            return db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()

    assert shape(old) == shape(new)


# --- what a person types ---


@pytest.fixture
def accepted(place: Place) -> Iterator[bytes]:
    run = place.offer().digest()
    assert place.type("accept", run.hex()[:8], "--yes") == 0
    yield run


def test_leave_says_what_ends_and_stays_and_accept_takes_part_again(
    place: Place, accepted: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    short = accepted.hex()[:12]
    assert place.type("leave", short) == 1  # nobody said yes
    assert open_ledger(place.state).left_at(accepted) == ""
    capsys.readouterr()
    assert place.type("leave", short, "--yes") == 0
    said = capsys.readouterr().out
    for words in ("What ends", "What does not end", "What remains", str(place.state / "state.db"), f"left {accepted.hex()}"):
        assert words in said
    assert open_ledger(place.state).left_at(accepted)
    assert place.type("leave", short, "--yes") == 1
    assert "this site left it at" in capsys.readouterr().err
    assert place.type("status") == 0
    assert f"cosilo-site accept {short} takes part again" in capsys.readouterr().out
    assert place.type("accept", short, "--yes") == 0
    assert open_ledger(place.state).left_at(accepted) == ""


@pytest.mark.parametrize("arguments", [[], ["4f2a", "--federation"]])
def test_leave_is_told_which(place: Place, arguments: list[str]) -> None:
    assert place.type("leave", *arguments) == 2


def test_leaving_the_federation_tells_it_and_destroys_the_keys(place: Place, accepted: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (place.state / "rounds" / "ab").mkdir(parents=True)
    (place.state / "rounds" / "ab" / "masks.key").write_bytes(b"secret")
    (place.state / "artifacts").mkdir(exist_ok=True)
    shutil.copytree(place.state / "identity", place.state / "identity.old")  # as run-a-federation.md has it moved, to enrol again
    capsys.readouterr()
    assert place.type("leave", "--federation", "--yes") == 0
    said = capsys.readouterr().out
    assert place.desk.leavers == 1
    for words in ("What remains", "it holds no key that opens anything", "nobody can take it out", "cosilo site revoke site-a"):
        assert words in said
    left = sorted(path.name for path in place.state.iterdir())
    assert not {"identity", "identity.old", "rounds", "artifacts", "pause.json"} & set(left)
    assert {"state.db", AUDIT_FILE} <= set(left)
    assert not [path for path in place.state.rglob("*") if ".key" in path.name]
    ledger = open_ledger(place.state)
    assert ledger.left_at(accepted)
    assert ledger.accepted(accepted) is not None
    assert place.type("leave", "--federation", "--yes") == 1  # it has not enrolled


def test_a_coordinator_that_does_not_answer_leaves_words_for_a_telephone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.server.close = lambda: None  # type: ignore[method-assign]  # closed here
    type(place.server).close(place.server)
    assert place.type("leave", "--federation", "--yes") == 3
    said = capsys.readouterr()
    assert "this site's keys are destroyed" in said.out
    assert "by telephone" in said.err
    assert "please run: cosilo site revoke site-a" in said.err
    assert not (place.state / "identity").exists()


def test_a_running_daemon_is_stopped_first(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal.open(place.state, site_key=bytes(32)):
        assert place.type("leave", "--federation", "--yes") == 1
    assert "stop it first" in capsys.readouterr().err
    assert place.desk.leavers == 0
    assert (place.state / "identity").exists()


# --- at the coordinator ---


def test_who_left_is_known_after_a_restart_and_by_that_key_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db", now=lambda: 5.0)
    store.site_left("st-clara", b"k" * 32)
    store.close()
    again = Store(tmp_path / "state.db", now=lambda: 9.0)
    again.site_left("st-clara", b"k" * 32)  # the first time stands
    assert again.left_at("st-clara", b"k" * 32) == 5.0
    assert again.left_at("st-clara", b"n" * 32) == again.left_at("st-anna", b"k" * 32) == 0.0
    again.close()


async def put(world: World, change: Any) -> None:
    newest = world.coordinator._members.newest()
    signed = sign_members(newest, change(newest.draft()), world.founded.admin.membership.name, world.founded.admin_key)
    await world.admin.PutMembers(admin_pb2.PutMembersRequest(members=signed.canonical()), timeout=TIMEOUT_S)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_site_that_left_is_barred_at_once_and_until_it_is_readmitted_with_another_key(world: World) -> None:
    run = await world.create(world.manifest("left"))
    sites = {name: await HandSite(world, name).join() for name in ("st-anna", "st-beda", "st-clara")}
    await start(world, run)
    await sites["st-anna"].owed(run, site_pb2.ROUND_PHASE_TRAINING)
    leaver = sites["st-clara"]
    await leaver.stub.Leave(site_pb2.LeaveRequest(), timeout=TIMEOUT_S)
    async with asyncio.timeout(10):
        assert await code_of(leaver._call) is grpc.StatusCode.PERMISSION_DENIED  # the open stream
    assert await code_of(leaver.stub.ListMyRuns(site_pb2.ListMyRunsRequest(), timeout=TIMEOUT_S)) is grpc.StatusCode.PERMISSION_DENIED
    assert await code_of(leaver.stub.Leave(site_pb2.LeaveRequest(), timeout=TIMEOUT_S)) is grpc.StatusCode.PERMISSION_DENIED
    state = world.coordinator.conductor.round(run)
    assert state is not None
    assert state.sites["st-clara"].declined is DeclineCode.NOT_ACCEPTED  # the round waits for it no longer
    assert not state.ended
    status = await world.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
    assert {site.site: site.left_unix_s > 0 for site in status.sites} == {"st-anna": False, "st-beda": False, "st-clara": True}
    key = world.coordinator._members.newest().member("st-clara")
    assert key is not None
    assert world.coordinator._store.left_at("st-clara", key.key) > 0
    await world.admin.StopRun(admin_pb2.StopRunRequest(run=run, abandon=True), timeout=TIMEOUT_S)

    await put(world, lambda draft: draft.remove("st-clara"))
    await put(world, lambda draft: draft.approve("st-clara", Role.SITE, public_bytes(world.keys["st-clara"]), readmit=True))
    asked = world.site("st-clara").ListMyRuns(site_pb2.ListMyRunsRequest(), timeout=TIMEOUT_S)
    assert await code_of(asked) is grpc.StatusCode.PERMISSION_DENIED  # the key that left stays out
    await put(world, lambda draft: draft.remove("st-clara"))
    await put(world, lambda draft: draft.approve("st-clara", Role.SITE, public_bytes(make_signing_key()), readmit=True))
    asked = world.site("st-clara").ListMyRuns(site_pb2.ListMyRunsRequest(), timeout=TIMEOUT_S)
    assert await code_of(asked) is grpc.StatusCode.OK
    with pytest.raises(CosiloError, match="is not a member"):
        world.coordinator._members.leave("nobody")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_removed_name_waits_for_an_admin_again_under_a_key_that_no_list_ever_had(world: World) -> None:
    """Else `cosilo site approve NAME --readmit` refuses who was revoked and enrolled again, as leave-or-pause.md says they may."""
    before, anew = public_bytes(world.keys["st-clara"]), public_bytes(make_signing_key())
    await put(world, lambda draft: draft.remove("st-clara"))
    members = world.coordinator._members
    assert [members.was_removed("st-clara", key) for key in (before, anew)] == [True, False]
