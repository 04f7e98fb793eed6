"""Attacks of a coordinator, or of an admin who helps it, on a site beyond the masks: what a site's policy bounds, what only a person may
allow (R8), and what a person is shown."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import replace
from datetime import time
from pathlib import Path

import pytest

from cosilo_client import participation as participation_module
from cosilo_client.config import PolicyTable
from cosilo_client.coordinator import SignedRun
from cosilo_client.joining import Candidate, PolicyAcceptance, explain
from cosilo_client.owed import DeclineCode, Owed, Phase
from cosilo_client.policy import Spent, refuse_round, refuse_unasked
from cosilo_client.spending import Spending
from cosilo_client.terminal import _write
from cosilo_client.trainer.jobs import EvaluateJob
from cosilo_client.wire import owed_from
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError, printable
from cosilo_common.manifest import ROUNDS_MAX, Manifest
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.telemetry import forbid_secrets
from tests.integration.memory_rounds import MemoryCoordinator, MemorySite, manifest_of

NAMES = ("site-a", "site-b", "site-c", "site-d")
NOON = time(12, 0)
RUN = bytes(32)


# Statistics rounds: each is a question about the held-out images, asked with a model of the coordinator's choice


def test_statistics_rounds_have_the_policy_s_bound_too() -> None:
    policy = PolicyTable(rounds_max=2)
    manifest = manifest_of(NAMES)
    asked = [refuse_round(policy, manifest, RoundKind.STATISTICS, 4, Spent(statistics=had), NOON) for had in (0, 1, 2)]
    assert asked[:2] == [None, None]
    assert asked[2] is not None
    assert asked[2].code is DeclineCode.POLICY
    assert "2 statistics rounds are measured" in asked[2].reason


def test_measuring_does_not_use_up_training_nor_the_other_way_round() -> None:
    policy, manifest = PolicyTable(rounds_max=2), manifest_of(NAMES)
    assert refuse_round(policy, manifest, RoundKind.TRAIN, 4, Spent(statistics=2), NOON) is None
    assert refuse_round(policy, manifest, RoundKind.STATISTICS, 4, Spent(rounds=2), NOON) is None
    assert refuse_round(PolicyTable(rounds_max=0), manifest, RoundKind.REHEARSAL, 4, Spent(9, 1e9, 9), NOON) is None


def test_what_a_run_was_told_is_counted_on_the_disk(tmp_path: Path) -> None:
    spending = Spending(tmp_path)
    spending.add(RUN, 1, 7.0)
    for round_ in (2, 2, 3):
        spending.add_statistics(RUN, round_)
    assert spending.of(RUN) == Spending(tmp_path).of(RUN) == Spent(1, 7.0, 2)


def test_a_file_from_before_statistics_were_counted_is_read(tmp_path: Path) -> None:
    (tmp_path / "spending.json").write_text(f'{{"{RUN.hex()}": {{"rounds": [1, 2], "seconds": 3.5}}}}')
    assert Spending(tmp_path).of(RUN) == Spent(2, 3.5, 0)


async def test_a_site_measures_no_more_models_than_its_policy_allows(tmp_path: Path) -> None:
    coordinator = MemoryCoordinator(manifest_of(NAMES))
    sites = [MemorySite(name, tmp_path / name, coordinator, PolicyTable(rounds_max=1)) for name in NAMES]
    for site in sites:
        site.up()
        site.accept()
    try:
        coordinator.start(1, RoundKind.STATISTICS)
        await coordinator.until_phase("closed")
        coordinator.start(2, RoundKind.STATISTICS)
        await coordinator.until_phase("abandoned")
        assert [len([job for job in site.trainer.jobs if isinstance(job, EvaluateJob)]) for site in sites] == [1] * 4
        assert [site.declines() for site in sites] == [["POLICY"]] * 4
    finally:
        for site in sites:
            await site.down()


async def test_training_that_is_called_off_counts_against_the_hours(tmp_path: Path) -> None:
    """The coordinator may end TRAINING and begin it again in one round as often as it likes; the GPU's hours are the site's."""
    coordinator = MemoryCoordinator(manifest_of(NAMES))
    sites = [MemorySite(name, tmp_path / name, coordinator, PolicyTable(hours_max=1e-9)) for name in NAMES]
    mine = sites[0]
    mine.trainer.hold = asyncio.Event()
    for site in sites:
        site.up()
        site.accept()
    try:
        coordinator.start()
        await coordinator.until(lambda: len(mine.trainer.jobs) == 1)
        mine.deaf = True
        training = coordinator.owed(mine.name)[0]
        mine.participation.owe([replace(training, phase=Phase.OPENING)])
        await coordinator.until(lambda: mine.trainer.cancelled == 1)
        mine.participation.owe([training])
        await coordinator.until(lambda: mine.declines() == ["POLICY"])
        assert len(mine.trainer.jobs) == 1
        spent = Spending(mine.folder).of(training.run)
        assert (spent.rounds, spent.seconds > 0) == (0, True)
    finally:
        for site in sites:
            await site.down()


# R8: more than two looks at one model need a person


def test_r8_a_run_with_more_looks_at_one_model_is_not_accepted_unasked() -> None:
    usual, curious = manifest_of(NAMES), manifest_of(NAMES, max_rounds_per_model=3)
    policy = PolicyTable(runs=(usual.name,))
    assert refuse_unasked(policy, usual.digest(), usual, usual.participant_keys()) is None
    refusal = refuse_unasked(policy, curious.digest(), curious, curious.participant_keys())
    assert refusal is not None
    assert refusal.code is DeclineCode.NOT_ACCEPTED
    assert f"cosilo-site accept {curious.digest().hex()[:12]}" in refusal.reason


def test_r8_a_person_is_told_of_more_looks_at_one_model() -> None:
    def words(manifest: Manifest) -> str:
        return explain(Candidate(manifest, SignedRun(b"", b"", ""), "ada"), NAMES[0], PolicyTable())

    assert "ONE AND THE SAME model" not in words(manifest_of(NAMES))
    assert "up to 7 of them from ONE AND THE SAME model" in words(manifest_of(NAMES, max_rounds_per_model=7))


# What a coordinator may make a site keep


def owed(run: bytes) -> Owed:
    return Owed(run, 1, RoundKind.TRAIN, Phase.GATHERING, False, 1, (), bytes(32), 0, b"")


async def test_runs_that_nobody_accepted_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot may name any runs: made-up ones must not stay in the daemon's memory for ever, nor push out what is owed."""
    monkeypatch.setattr(participation_module, "RUNS_KEPT_MAX", 20)
    coordinator = MemoryCoordinator(manifest_of(NAMES))
    site = MemorySite(NAMES[0], tmp_path / "site", coordinator)
    site.up()
    try:
        for wave in range(10):
            snapshot = [owed(sha256(f"{wave}/{place}".encode())) for place in range(10)]
            site.participation.owe(snapshot)
            assert len(site.participation._runs) <= 20
            assert {one.run for one in snapshot} <= site.participation._runs.keys()
    finally:
        await site.down()
    assert site.participation._ending == set()


class Fetches:
    """The coordinator's answers to GetRun, counted."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def __call__(self, run: bytes) -> SignedRun:
        self.asked.append(run)
        return SignedRun(b"manifest", b"signature", "ada")


async def test_a_run_that_the_policy_does_not_name_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for every few seconds while a round waits, and a manifest has up to 16 MiB."""
    manifest = manifest_of(NAMES)
    monkeypatch.setattr("cosilo_client.joining.verify_candidate", lambda _identity, signed: Candidate(manifest, signed, "ada"))
    fetches = Fetches()
    acceptance = PolicyAcceptance(None, None, PolicyTable(runs=("another",)), fetches, None)  # type: ignore[arg-type]  # a run that is not listed needs none
    answers = [await acceptance(manifest.digest()) for _ in range(3)]
    assert [answer.code for answer in answers if answer is not None] == [DeclineCode.NOT_ACCEPTED] * 3
    assert fetches.asked == [manifest.digest()]


@pytest.mark.parametrize("number", [0, ROUNDS_MAX + 1, (1 << 64) - 1])
def test_r2_a_round_that_no_run_has_is_refused_at_the_wire(number: int) -> None:
    """2^63 and more would not even fit the ledger's column."""
    message = site_pb2.Assignment(
        run=RUN, round=number, kind=site_pb2.ROUND_KIND_TRAIN, phase=site_pb2.ROUND_PHASE_TRAINING, attempt=1, base_digest=bytes(32)
    )
    with pytest.raises(CosiloError, match="round: it counts from 1"):
        owed_from(message)


# What a person is shown


ESCAPES = ("\x1b[2K\x1b[1Aapproved", "over\rwritten", "\x9b31m", "\u202egnp.exe", "bell\x07", "\x1b]52;c;cGF3bmVk\x07")


@pytest.mark.parametrize("text", ESCAPES)
def test_what_a_peer_said_does_not_move_the_cursor(text: str) -> None:
    """A reason, a status, a software's name come from the other side; a person compares fingerprints on the same screen."""
    screen = io.StringIO()
    _write(screen, f"error: {text}")
    shown: Sequence[str] = (screen.getvalue()[:-1], printable(text), str(forbid_secrets(None, "info", {"reason": text})["reason"]))
    assert all(line.isprintable() and "\ufffd" in line for line in shown)


def test_ordinary_words_are_shown_as_they_are() -> None:
    text = "St. Änna: 12 Bilder\n  été → ▁▂█\tok"
    assert printable(text) == text
