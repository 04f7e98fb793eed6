"""A site that pauses, by hand or by its hours: what is trained goes on, what is not is declined, and it comes back in the same round."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import time
from pathlib import Path

import pytest
import pytest_asyncio

import cosilo_client.duties
import cosilo_client.participation
from cosilo_client.config import PolicyTable
from cosilo_client.owed import Decline
from cosilo_client.pause import Pause
from cosilo_server.rounds.events import Tick
from cosilo_server.rounds.state import DeclineCode
from tests.integration.memory_rounds import MemoryCoordinator, MemorySite
from tests.integration.test_session_participation import NAMES, federation, survivors

pytestmark = pytest.mark.asyncio

GENTLE = Pause("2026-03-02T16:00:00+00:00", reason="clinic")
AT_ONCE = Pause("2026-03-02T16:00:00+00:00", reason="clinic", now=True)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosilo_client.duties, "LOOK_S", 0.01)
    monkeypatch.setattr(cosilo_client.participation, "LOOK_AGAIN_S", 0.05)


@pytest_asyncio.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[MemoryCoordinator]:
    async with federation(tmp_path, policy=PolicyTable.model_validate({"hours": ["10:00-18:00"]})) as made:
        yield made


async def training(coordinator: MemoryCoordinator, *held: str) -> MemorySite:
    """Starts a round in which these sites train and do not end it; returns the first."""
    for name in held:
        coordinator.sites[name].trainer.hold = asyncio.Event()
    coordinator.start()
    await coordinator.until(lambda: all(len(coordinator.sites[name].trainer.jobs) == 1 for name in held))
    return coordinator.sites[held[0]]


def declined(coordinator: MemoryCoordinator, name: str) -> DeclineCode | None:
    assert coordinator.state is not None
    return coordinator.state.sites[name].declined


async def test_a_paused_site_is_left_out_and_the_round_goes_on(coordinator: MemoryCoordinator) -> None:
    site = coordinator.sites["site-a"]
    site.pause = GENTLE
    coordinator.start()
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES[1:]
    assert (site.declines(), site.trainer.jobs) == (["PAUSED"], [])


async def test_training_that_runs_goes_to_its_end_under_a_gentle_pause(coordinator: MemoryCoordinator) -> None:
    site = await training(coordinator, "site-a")
    site.pause = GENTLE
    assert site.trainer.hold is not None
    site.trainer.hold.set()
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES
    assert (site.declines(), site.trainer.cancelled) == ([], 0)


async def test_at_once_stops_the_training_and_the_round_goes_on_without_it(coordinator: MemoryCoordinator) -> None:
    site = await training(coordinator, "site-a")
    site.pause = AT_ONCE
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES[1:]
    assert (site.declines(), site.trainer.cancelled) == (["PAUSED"], 1)


async def test_what_is_trained_is_delivered_though_the_site_is_paused_at_once(coordinator: MemoryCoordinator) -> None:
    """Its shares, upload and consent cost no GPU, and withheld they cost every other site an attempt or the round."""
    site = await training(coordinator, "site-b", "site-a")
    site = coordinator.sites["site-a"]
    run = coordinator.manifest.digest()
    assert site.trainer.hold is not None
    site.trainer.hold.set()
    await coordinator.until(lambda: site.journal.trained_update(run, 1) is not None)
    site.pause = AT_ONCE
    hold = coordinator.sites["site-b"].trainer.hold
    assert hold is not None
    hold.set()
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES
    assert site.declines() == []


async def test_resumed_in_the_same_round_it_trains_again_and_is_in_it(coordinator: MemoryCoordinator) -> None:
    """It begins again at nought tenths, below what it had said before it paused: the coordinator counts it in all the same."""
    site = await training(coordinator, "site-a", "site-b")
    site.pause = AT_ONCE
    await coordinator.until(lambda: declined(coordinator, "site-a") is DeclineCode.PAUSED)
    site.pause = None
    await coordinator.until(lambda: declined(coordinator, "site-a") is None)
    assert coordinator.phase == "training"
    for name in ("site-a", "site-b"):
        hold = coordinator.sites[name].trainer.hold
        assert hold is not None
        hold.set()
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES
    assert (len(site.trainer.jobs), site.trainer.cancelled) == (2, 1)


async def test_hours_that_end_stop_the_training_and_name_themselves(coordinator: MemoryCoordinator) -> None:
    site = await training(coordinator, "site-a", "site-b")
    site.hour = time(18, 0)
    await coordinator.until(lambda: declined(coordinator, "site-a") is DeclineCode.PAUSED)
    assert site.trainer.cancelled == 1
    assert site.declines() == ["PAUSED"]
    await site.restart()
    coordinator.handle(Tick())
    await coordinator.until(lambda: sum(isinstance(said, Decline) for said in site.said) > 1)
    assert site.declines() == ["PAUSED"]  # not POLICY: the round was begun within the hours
    hold = coordinator.sites["site-b"].trainer.hold
    assert hold is not None
    hold.set()
    await coordinator.until_phase("closed")
    assert survivors(coordinator) == NAMES[1:]
