"""A site does what it owes, once, whatever is killed when; and what it will not do it declines with a code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import time
from pathlib import Path

import pytest

import cosilo_client.participation
from cosilo_client.config import PolicyTable
from cosilo_client.ledger import RoundState
from cosilo_client.owed import Activity, Owed, Phase
from cosilo_client.trainer.jobs import EvaluateJob, FailureCode, TrainerFailed, TrainJob
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.encoding import Encoding, Section
from cosilo_common.manifest import PLAIN_AGGREGATION
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.rounds.state import Round
from tests.integration.memory_rounds import MemoryCoordinator, MemorySite, manifest_of

NAMES = ("site-a", "site-b", "site-c", "site-d")


@asynccontextmanager
async def federation(
    tmp_path: Path, names: tuple[str, ...] = NAMES, policy: PolicyTable | None = None, accept: bool = True, **changes: object
) -> AsyncIterator[MemoryCoordinator]:
    coordinator = MemoryCoordinator(manifest_of(names, **changes))
    for name in names:
        site = MemorySite(name, tmp_path / name, coordinator, policy)
        site.up()
        if accept:
            site.accept()
    try:
        yield coordinator
    finally:
        for site in coordinator.sites.values():
            if site.is_up:
                await site.down()


def survivors(coordinator: MemoryCoordinator) -> tuple[str, ...]:
    assert coordinator.state is not None
    return coordinator.state.survivors


async def test_a_masked_round_closes_with_every_site_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        coordinator.start()
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == NAMES
        site = coordinator.sites["site-a"]
        run = coordinator.manifest.digest()
        await coordinator.until(lambda: not site.journal.files(run).folder.exists())
        last = site.journal.ledger.last_round(run)
        assert last is not None
        assert (last.round, last.state) == (1, RoundState.CLOSED)
        steps = [Activity.FETCHING, Activity.TRAINING, Activity.WAITING, Activity.MASKING, Activity.UPLOADING]
        assert site.activities()[:5] == steps


async def test_the_job_carries_the_manifest_s_training_and_the_site_s_own_seed(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        coordinator.start()
        await coordinator.until_phase("closed")
        manifest = coordinator.manifest
        (job,) = coordinator.sites["site-b"].trainer.jobs
        assert isinstance(job, TrainJob)
        assert job.training == manifest.training
        assert job.seed == site_seed(1, "site-b", manifest.training.seed)


async def test_a_plain_sum_goes_from_training_to_uploading(tmp_path: Path) -> None:
    policy = PolicyTable(allow_insecure_plain_sum=True)
    async with federation(tmp_path, policy=policy, aggregation=PLAIN_AGGREGATION) as coordinator:
        coordinator.start()
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == NAMES
        assert {kind.partition(":")[2] for kind in coordinator.counts} == {"advert"}
        words = Encoding.parse(coordinator.owed("site-a")[0].encoding)
        weights = {name: int.from_bytes(data[4 * words.size :][:4], "little") for name, data in coordinator.uploads.items()}
        assert weights == dict.fromkeys(NAMES, coordinator.manifest.encoding.cap)  # 9,000 images, and W is at most the cap


async def test_a_rehearsal_trains_nothing_and_fetches_what_is_here(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        coordinator.start(kind=RoundKind.REHEARSAL)
        await coordinator.until_phase("closed")
        site = coordinator.sites["site-a"]
        assert (site.trainer.jobs, site.fetch_forced) == ([], [True])


async def test_statistics_evaluate_and_train_nothing(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        coordinator.start(kind=RoundKind.STATISTICS)
        await coordinator.until_phase("closed")
        (job,) = coordinator.sites["site-a"].trainer.jobs
        assert isinstance(job, EvaluateJob)
        assert {len(data) for data in coordinator.uploads.values()} == {
            4 * Encoding.parse(coordinator.owed("site-a")[0].encoding).tail_words
        }


CALLS = ("fetch", "advert", "shares", "put", "consent", "reveal")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_site_killed_at_any_call_goes_on_and_trains_once(tmp_path: Path, when: str, call: str) -> None:
    three = NAMES[:3]  # with f = 1 none of three may drop, so the round waits for this site in every phase
    async with federation(tmp_path, three) as coordinator:
        site = coordinator.sites["site-a"]
        site.stop_at = f"{when} {call}"
        coordinator.start()
        async with asyncio.timeout(20):
            await site.stopped.wait()
        await site.restart()
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == three
        assert len(site.trainer.jobs) == 1
        assert site.declines() == []


async def test_a_site_killed_while_it_trains_trains_again(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        site.trainer.hold = asyncio.Event()
        coordinator.start()
        await coordinator.until(lambda: len(site.trainer.jobs) == 1)
        await site.down()
        site.trainer.hold = None
        site.up()
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == NAMES
        assert (len(site.trainer.jobs), site.trainer.cancelled) == (2, 1)


async def test_training_stops_when_the_round_goes_on_without_this_site(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        site.trainer.hold = asyncio.Event()
        coordinator.start()
        await coordinator.until(lambda: len(site.trainer.jobs) == 1)
        site.deaf = True
        owed = coordinator.owed("site-a")[0]
        site.participation.owe([replace(owed, invited=False)])
        await coordinator.until(lambda: site.trainer.cancelled == 1)


async def test_the_same_snapshot_again_disturbs_nothing(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        site.trainer.hold = asyncio.Event()
        coordinator.start()
        await coordinator.until(lambda: len(site.trainer.jobs) == 1)
        for _ in range(3):
            site.participation.owe(coordinator.owed("site-a"))
            await asyncio.sleep(0)
        site.participation.owe([replace(coordinator.owed("site-a")[0], attempt=2)])  # one training serves every attempt
        await asyncio.sleep(0)
        site.participation.owe(coordinator.owed("site-a"))
        site.trainer.hold.set()
        await coordinator.until_phase("closed")
        assert (len(site.trainer.jobs), site.trainer.cancelled) == (1, 0)


async def test_a_run_nobody_accepted_is_declined_and_joined_once_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosilo_client.participation, "LOOK_AGAIN_S", 0.05)
    async with federation(tmp_path, accept=False) as coordinator:
        late = coordinator.sites["site-d"]
        for site in coordinator.sites.values():
            if site is not late:
                site.accept()
        for site in coordinator.sites.values():
            site.stop_at = "before advert" if site is not late else ""
        coordinator.start()
        await coordinator.until(lambda: late.declines() == ["NOT_ACCEPTED"])
        late.accept()
        await coordinator.until(lambda: coordinator.counts["site-d:advert"] == 1)
        for site in coordinator.sites.values():
            if site is not late:
                await site.stopped.wait()
                await site.restart()
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == NAMES


async def test_outside_its_hours_a_site_declines_and_within_them_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosilo_client.participation, "LOOK_AGAIN_S", 0.05)
    policy = PolicyTable.model_validate({"hours": ["19:00-07:00"]})
    async with federation(tmp_path, policy=policy) as coordinator:
        for site in coordinator.sites.values():
            site.hour = time(20) if site.name != "site-a" else time(12)
            site.stop_at = "before advert"
        site = coordinator.sites["site-a"]
        coordinator.start()
        await coordinator.until(lambda: site.declines() == ["POLICY"])
        assert site.trainer.jobs == []
        site.hour = time(19)
        await coordinator.until(lambda: len(site.trainer.jobs) == 1)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (TrainerFailed(FailureCode.OUT_OF_MEMORY, "no memory"), "TRAINER"),
        (TrainerFailed(FailureCode.CRASHED, "gone"), "TRAINER"),
        (TrainerFailed(FailureCode.DATA, "no images"), "DATA"),
        (TrainerFailed(FailureCode.DISK, "no space"), "DISK"),
    ],
)
async def test_a_failed_training_is_declined_once_and_the_round_goes_on(tmp_path: Path, failure: TrainerFailed, code: str) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        site.trainer.failure = failure
        coordinator.start()
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == ("site-b", "site-c", "site-d")
        assert (site.declines(), len(site.trainer.jobs)) == ([code], 1)
        await coordinator.until(lambda: site.journal.ledger.open_rounds() == ())


async def test_after_a_failed_round_the_next_one_is_tried(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        site.trainer.failure = TrainerFailed(FailureCode.CRASHED, "gone")
        coordinator.start(1)
        await coordinator.until_phase("closed")
        site.trainer.failure = None
        coordinator.start(2, RoundKind.STATISTICS)
        await coordinator.until_phase("closed")
        assert survivors(coordinator) == NAMES


async def test_r3_another_encoding_than_the_manifest_s_is_declined(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        coordinator.state = None
        other = Encoding(32, 4, 4096, (Section(16, 0.001),), 16.0, 5)
        assert await declines_of(site, coordinator, encoding=other.canonical()) == ["PROTOCOL"]
        assert site.trainer.jobs == []


async def test_weights_of_an_impossible_length_are_not_fetched(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        assert await declines_of(site, coordinator, base_bytes=1 << 40) == ["PROTOCOL"]
        assert site.fetches == 0


async def test_at_24_bits_clips_within_the_manifest_s_are_taken_and_above_it_refused(tmp_path: Path) -> None:
    terms = {"bits": 24, "clip": 0.5, "cap": 64}
    async with federation(tmp_path, encoding=terms) as coordinator:
        site = coordinator.sites["site-a"]
        wide = Encoding(24, 4, 64, (Section(4, 0.25), Section(12, 0.75)), 16.0, 5)
        assert await declines_of(site, coordinator, encoding=wide.canonical()) == ["PROTOCOL"]
    (tmp_path / "again").mkdir()
    async with federation(tmp_path / "again", encoding=terms) as coordinator:
        site = coordinator.sites["site-a"]
        fits = Encoding(24, 4, 64, (Section(4, 0.25), Section(12, 0.5)), 16.0, 5)
        assert await declines_of(site, coordinator, encoding=fits.canonical()) == []
        assert len(site.trainer.jobs) == 1


async def declines_of(site: MemorySite, coordinator: MemoryCoordinator, **changes: object) -> list[str]:
    """What a site declines when its assignment is another than the machine's."""
    site.deaf = True
    coordinator.start()
    assert isinstance(coordinator.state, Round)
    owed: Owed = replace(coordinator.owed(site.name)[0], **changes)  # type: ignore[arg-type]  # a test's table of fields
    site.stop_at = "before advert"
    site.participation.owe([owed])
    await coordinator.until(lambda: bool(site.declines()) or site.stopped.is_set())
    return site.declines()


async def test_a_lower_round_than_one_begun_is_declined(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        coordinator.start(2)
        await coordinator.until_phase("closed")
        site = coordinator.sites["site-a"]
        await coordinator.until(lambda: site.journal.ledger.open_rounds() == ())
        site.deaf = True
        ended = coordinator.owed("site-a")[0]
        site.participation.owe([replace(ended, round=1, phase=Phase.TRAINING, checkpoint=b"")])
        await coordinator.until(lambda: site.declines() == ["PROTOCOL"])
        assert len(site.trainer.jobs) == 1


async def test_a_round_that_went_on_without_the_site_is_forgotten_when_a_later_one_is_heard_of(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        site = coordinator.sites["site-a"]
        site.stop_at = "before shares"
        coordinator.start()
        await site.stopped.wait()
        site.deaf = True
        owed = coordinator.owed("site-a")[0]
        site.participation.owe([replace(owed, round=2, phase=Phase.GATHERING, invited=False, roster=())])
        await coordinator.until(lambda: not site.journal.files(owed.run).folder.exists())
        assert site.journal.ledger.open_rounds() == ()


async def test_metrics_stay_at_the_site(tmp_path: Path) -> None:
    async with federation(tmp_path) as coordinator:
        coordinator.start()
        await coordinator.until_phase("closed")
        value = coordinator.sites["site-a"].metrics.registry.get_sample_value
        assert value("cosilo_images_total") == 100
        assert value("cosilo_training_loss") == 0.25
        assert value("cosilo_images_per_second") == 14
