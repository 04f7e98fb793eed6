"""What needs a person at the site: more uploads from one model than R8 allows, and a folder that went back in time (R5)."""

from __future__ import annotations

import io
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cosilo_client.cli import main
from cosilo_client.config import PolicyTable
from cosilo_client.coordinator import SignedRun
from cosilo_client.incarnation import FolderWentBack
from cosilo_client.joining import Candidate, explain
from cosilo_client.journal import Journal, open_ledger
from cosilo_client.ledger import RoundEntry, RoundState
from cosilo_client.run_terms import RunTerms
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import public_bytes
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from tests.identity_parties import FEDERATION, Founded, found
from tests.integration.memory_rounds import WEIGHTS, MemoryCoordinator, MemorySite, manifest_of, signing_key
from tests.integration.test_session_commands import identify

NAMES = ("site-a", "site-b", "site-c", "site-d")
KEY = public_bytes(signing_key("site-a"))
MODEL, OTHER = sha256(b"a model"), sha256(b"another model")
WORDS = "the state of site-a is no backup"

Capture = pytest.CaptureFixture[str]


@dataclass
class Place:
    """A site with an identity and an accepted run; its coordinator is out of reach."""

    state: Path
    config: Path
    manifest: Manifest

    def type(self, monkeypatch: pytest.MonkeyPatch, answer: str, *arguments: str) -> int:
        """A command, and what is answered to its question."""
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        return main(["--config", str(self.config), *arguments])

    def upload(self, round_: int, model: bytes, kind: str = "train") -> None:
        """A round that was begun, uploaded in and abandoned."""
        entry = RoundEntry(self.manifest.digest(), round_, kind, NAMES, model, bytes(32))
        ledger = open_ledger(self.state)
        ledger.begin_round(entry)
        ledger.record_upload(entry, b"statement", key=entry.base_digest, cohort=bytes(32), counted=kind != "rehearsal")
        ledger.finish_round(entry.run, round_, RoundState.ABANDONED, "the coordinator says so")

    @property
    def run(self) -> str:
        return self.manifest.digest().hex()


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


@pytest.fixture
def place(parties: Founded, tmp_path: Path) -> Place:
    state, config = tmp_path / "state", tmp_path / "site.toml"
    config.write_text(f'state = "{state}"\n[data]\nkind = "digits"\n')
    identify(parties, state, "127.0.0.1:1")
    manifest = manifest_of(NAMES, federation=FEDERATION)
    with Journal.open(state, site_key=KEY) as journal:
        journal.ledger.accept(
            manifest.digest(), manifest.canonical(), bytes(64), manifest.participant_keys(), accepted_at="", accepted_by="person"
        )
    return Place(state, config, manifest)


# R8: permit


def test_r8_permit_says_what_it_risks_and_writes_after_a_yes(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    place.upload(3, MODEL)
    place.upload(4, MODEL)
    assert place.type(monkeypatch, "y\n", "permit", place.run[:8], "--rounds", "3") == 0
    said = capsys.readouterr().out
    for words in (
        f"Model {MODEL.hex()}\n",
        "has made 2 uploads from it, over all runs; unasked it makes 2",
        f"round 3 of run {place.run[:12]}",
        f"round 4 of run {place.run[:12]}",
        "3 in all: 1 more, with whichever sites are invited",
        "be left with this site's update",
        "masks do not help against this",
        f"permitted 3 uploads in all from model {MODEL.hex()}",
    ):
        assert words in said
    assert open_ledger(place.state).permitted_rounds(MODEL) == 3
    assert open_ledger(place.state).permitted_rounds(OTHER) == 0


@pytest.mark.parametrize("answer", ["", "n\n", "\n", "3\n"])
def test_r8_without_a_yes_nothing_is_permitted(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    place.upload(1, MODEL)
    assert place.type(monkeypatch, answer, "permit", place.run[:8], "--rounds", "3") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert open_ledger(place.state).permitted_rounds(MODEL) == 0


def test_r8_newest_is_the_runs_newest_model_and_a_digest_finds_an_older_one(
    place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.upload(1, MODEL)
    place.upload(2, OTHER)
    assert place.type(monkeypatch, "y\n", "permit", place.run[:8], "--rounds", "3", "--base", "newest") == 0
    assert place.type(monkeypatch, "y\n", "permit", place.run[:8], "--rounds", "4", "--base", MODEL.hex()[:6]) == 0
    ledger = open_ledger(place.state)
    assert (ledger.permitted_rounds(OTHER), ledger.permitted_rounds(MODEL)) == (3, 4)


def test_r8_a_smaller_permit_takes_the_place_of_a_larger_one(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    place.upload(1, MODEL)
    assert place.type(monkeypatch, "y\n", "permit", place.run[:8], "--rounds", "9") == 0
    assert place.type(monkeypatch, "y\n", "permit", place.run[:8], "--rounds", "1") == 0
    said = capsys.readouterr().out
    assert "a person permitted 9 in all before; 1 takes its place" in said
    assert "1 in all: 0 more" in said
    assert open_ledger(place.state).permitted_rounds(MODEL) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("--rounds", "1"), 1, "1 uploads in all are no more than the 1 made already"),
        (("--rounds", "3", "--base", "abcdef"), 1, "'abcdef': no model that this site has trained from begins so"),
        (("--rounds", "3", "--base", ""), 1, "no model that this site has trained from begins so"),
        (("--rounds", "0"), 2, "--rounds"),
        (("--rounds", "101"), 2, "--rounds"),
        ((), 2, "--rounds"),
    ],
)
def test_r8_a_permit_that_means_nothing_is_refused(
    place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, error: str
) -> None:
    place.upload(1, MODEL)
    assert place.type(monkeypatch, "y\n", "permit", place.run[:8], *arguments) == code
    assert error in capsys.readouterr().err
    assert open_ledger(place.state).permitted_rounds(MODEL) == 0


def test_r8_a_run_without_a_round_has_no_newest_model(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.type(monkeypatch, "y\n", "permit", place.run[:8], "--rounds", "3") == 1
    assert "give the model with --base" in capsys.readouterr().err
    assert place.type(monkeypatch, "y\n", "permit", "ffff", "--rounds", "3") == 1
    assert "no run of this site begins so" in capsys.readouterr().err


# R8: what a manifest may ask, and what a site then does


@asynccontextmanager
async def federation(folder: Path, policy: PolicyTable, **changes: object) -> AsyncIterator[MemoryCoordinator]:
    coordinator = MemoryCoordinator(manifest_of(NAMES, **changes))
    sites = [MemorySite(name, folder / name, coordinator, policy) for name in NAMES]
    for site in sites:
        site.up()
        site.accept()
    try:
        yield coordinator
    finally:
        for site in sites:
            await site.down()


async def phases(coordinator: MemoryCoordinator, *numbers: int, kind: RoundKind = RoundKind.TRAIN) -> list[str]:
    """Rounds from one and the same model, and how each ended."""
    ended = []
    for number in numbers:
        coordinator.start(number, kind)
        await coordinator.until(lambda: coordinator.phase in ("closed", "abandoned"))
        ended.append(coordinator.phase)
        ledgers = [site.journal.ledger for site in coordinator.sites.values()]
        await coordinator.until(lambda ledgers=ledgers: all(ledger.open_rounds() == () for ledger in ledgers))  # type: ignore[misc]
    return ended


async def test_r8_a_manifest_does_not_raise_the_site_s_bound(tmp_path: Path) -> None:
    async with federation(tmp_path, PolicyTable(), max_rounds_per_model=5) as coordinator:
        assert await phases(coordinator, 1, 2, 3) == ["closed", "closed", "abandoned"]
        assert [site.declines() for site in coordinator.sites.values()] == [["PROTOCOL"]] * 4
        for site in coordinator.sites.values():
            site.journal.ledger.permit_model(sha256(WEIGHTS), 3, permitted_at="2026-03-02T00:00:00Z")
        assert await phases(coordinator, 4, 5) == ["closed", "abandoned"]


async def test_r8_the_site_s_policy_may_allow_what_a_manifest_asks(tmp_path: Path) -> None:
    async with federation(tmp_path, PolicyTable(max_rounds_per_model=4), max_rounds_per_model=3) as coordinator:
        assert await phases(coordinator, 1, 2, 3, 4) == ["closed", "closed", "closed", "abandoned"]


async def test_r8_a_statistics_round_and_a_training_round_from_one_model_are_two(tmp_path: Path) -> None:
    async with federation(tmp_path, PolicyTable()) as coordinator:
        assert await phases(coordinator, 1, kind=RoundKind.STATISTICS) == ["closed"]
        assert await phases(coordinator, 2, kind=RoundKind.REHEARSAL) == ["closed"]
        assert await phases(coordinator, 3, 4) == ["closed", "abandoned"]


@pytest.mark.parametrize(("asked", "allowed", "most"), [(2, 2, 2), (5, 2, 2), (5, 4, 4), (1, 2, 1), (3, 100, 3)])
def test_r8_the_smaller_of_the_two_bounds_holds(asked: int, allowed: int, most: int) -> None:
    manifest = manifest_of(NAMES, max_rounds_per_model=asked)
    assert RunTerms.of(manifest, rounds_per_model=allowed).max_rounds_per_model == most


@pytest.mark.parametrize(
    ("asked", "allowed", "shown", "not_shown"),
    [
        (2, 2, ["at most 2 with an upload from any one model, training and statistics rounds together"], ["ONE AND THE SAME", "permit"]),
        (5, 2, ["at most 2 with an upload", "up to 5 of them from ONE AND THE SAME", "holds this site to 2", "cosilo-site permit"], []),
        (5, 5, ["at most 5 with an upload", "up to 5 of them from ONE AND THE SAME"], ["holds this site", "permit"]),
    ],
)
def test_r8_accept_says_how_many_uploads_one_model_gets(asked: int, allowed: int, shown: list[str], not_shown: list[str]) -> None:
    candidate = Candidate(manifest_of(NAMES, max_rounds_per_model=asked), SignedRun(b"", b"", ""), "ada")
    said = explain(candidate, NAMES[0], PolicyTable(max_rounds_per_model=allowed))
    assert [words in said for words in shown] == [True] * len(shown)
    assert [words in said for words in not_shown] == [False] * len(not_shown)


def test_accept_says_the_site_s_bound_on_statistics_rounds() -> None:
    candidate = Candidate(manifest_of(NAMES), SignedRun(b"", b"", ""), "ada")
    assert "hours of training, 100 statistics rounds, at any hour" in explain(candidate, NAMES[0], PolicyTable())
    assert "hours of training, 7 statistics rounds" in explain(candidate, NAMES[0], PolicyTable(rounds_max=7))


async def test_a_site_answers_so_many_statistics_rounds_in_a_run_whatever_the_models(tmp_path: Path) -> None:
    async with federation(tmp_path, PolicyTable(statistics_rounds_max=1)) as coordinator:
        assert await phases(coordinator, 1, kind=RoundKind.STATISTICS) == ["closed"]
        coordinator.start(2, RoundKind.STATISTICS)
        await coordinator.until_phase("abandoned")
        assert [site.declines() for site in coordinator.sites.values()] == [["POLICY"]] * 4
        assert await phases(coordinator, 3) == ["closed"]


# R5: vouch


def put_back(place: Place) -> None:
    """The folder moves to another disk, or back from one."""
    elsewhere = place.state.with_name("elsewhere")
    shutil.copytree(place.state, elsewhere)
    shutil.rmtree(place.state)
    elsewhere.rename(place.state)


def opens(place: Place) -> bool:
    try:
        Journal.open(place.state, site_key=KEY).close()
    except FolderWentBack:
        return False
    return True


def test_r5_vouch_says_why_to_enrol_again_and_wants_words_typed(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    put_back(place)
    assert not opens(place)
    assert place.type(monkeypatch, f"{WORDS}\n", "vouch") == 0
    said = capsys.readouterr()
    for words in ("has forgotten what was signed since", "THIS SITE'S among them", "Enrol again with a new key", "cosilo-site enrol FILE"):
        assert words in said.out
    assert f"To go on, type: {WORDS}" in said.err
    assert opens(place)


@pytest.mark.parametrize("answer", ["", "\n", "y\n", "yes\n", "the state of site-b is no backup\n", f"{WORDS}!\n"])
def test_r5_without_the_words_nothing_is_vouched_for(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    put_back(place)
    assert place.type(monkeypatch, answer, "vouch") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not opens(place)


def test_r5_a_folder_in_order_needs_no_vouching(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.type(monkeypatch, "", "vouch") == 0
    assert capsys.readouterr().out == f"nothing to vouch for: {place.state} is as this site's key left it\n"


def test_r5_nobody_vouches_while_the_daemon_runs(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.open(place.state, site_key=KEY):
        assert place.type(monkeypatch, f"{WORDS}\n", "vouch") == 1
    assert "another daemon (pid" in capsys.readouterr().err


def test_r5_nobody_vouches_for_a_ledger_that_is_gone(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in place.state.glob("state.db*"):
        path.unlink()
    assert place.type(monkeypatch, f"{WORDS}\n", "vouch") == 1
    assert "the ledger is gone" in capsys.readouterr().err


def test_r5_the_alarm_names_both_ways_out(place: Place) -> None:
    put_back(place)
    with pytest.raises(CosiloError, match=r"enrol again with a new key: cosilo-site enrol; .*: cosilo-site vouch"):
        Journal.open(place.state, site_key=KEY)
