"""Attacks on the coordinator's shell: a round that opens always ends (rule 2: every phase has an exit), and a message moves only the
round that it was checked against (R2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy.exc import OperationalError

from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import PLAIN_AGGREGATION
from cosilo_common.secagg.messages import RoundKind
from cosilo_server import conductor as shell
from cosilo_server.aggregation import Checkpoint
from cosilo_server.closing import untrained_checkpoint
from cosilo_server.conductor import Conductor
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import AdvertReceived, Stopped, UploadReceived
from cosilo_server.rounds.state import Phase, Upload
from cosilo_server.spool import Spool
from cosilo_server.store import Store
from tests.integration.memory_rounds import manifest_of

SITES = ("anna", "beda", "clara")
WEIGHTS = sha256(b"the untrained weights").hex()


class FaultyCloser:
    """Opens no sum: fails in a way that nobody foresaw."""

    def open(self, manifest: object, state: object, step: object) -> Any:
        raise ZeroDivisionError("nobody foresaw this")

    def sum_early(self, state: object, site: str) -> None:
        pass

    def forget(self, run: bytes, number: int) -> None:
        pass


class World:
    """One run of three sites in plain sum, under a conductor whose closer fails."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "state.db")
        manifest = manifest_of(SITES, aggregation=PLAIN_AGGREGATION, n_min=3, f=0)
        self.run = manifest.digest()
        first = untrained_checkpoint(self.run, Checkpoint(WEIGHTS, WEIGHTS, WEIGHTS), 192, False, 0.0)
        self.store.add_run(self.run, manifest.canonical(), bytes(64), "ada", first)
        self.conductor = Conductor(self.store, Spool(folder / "spool"), FaultyCloser(), CoordinatorMetrics())  # type: ignore[arg-type]  # all that is asked of it

    async def begin(self) -> None:
        """Starts a round and brings it to training."""
        for name in SITES:
            await self.conductor.attend(name, True)
        await self.conductor.order(self.run, RoundKind.TRAIN, 1)
        assert self.phase is Phase.TRAINING

    async def adverts(self, number: int = 1) -> list[str]:
        return [await self.conductor.handle(self.run, AdvertReceived(name, 1, b"advert of " + name.encode()), number) for name in SITES]

    async def uploads(self) -> None:
        for name in SITES:
            await self.conductor.handle(self.run, UploadReceived(name, 1, Upload(name.encode(), b"d" * 32, 1)), 1)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self.conductor.watch() as changed:
            while not condition():
                changed.clear()
                await changed.wait()

    @property
    def phase(self) -> Phase | None:
        state = self.conductor.round(self.run)
        return state.phase if state else None


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    await made.conductor.start()
    yield made
    await made.conductor.stop()
    made.store.close()


async def test_a_fault_while_a_sum_is_opened_ends_the_round(world: World) -> None:
    """OPENING waits for no site, so no deadline ends it."""
    await world.begin()
    await world.adverts()
    await world.uploads()
    await world.until(lambda: world.phase is Phase.ABANDONED)
    state = world.conductor.round(world.run)
    assert state is not None
    assert state.reason == "opening the sum failed: ZeroDivisionError"


async def test_the_end_of_an_opening_waits_for_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when the sum is refused must not leave the round opening until somebody restarts the coordinator."""
    monkeypatch.setattr(shell, "RECHECK_S", 0.01)
    save, failures = world.store.save_round, 3

    def full(state: Any, what: str, site: str = "") -> None:
        nonlocal failures
        if what == "SumRefused" and failures:
            failures -= 1
            raise OperationalError("UPDATE", {}, Exception("database or disk is full"))
        save(state, what, site)

    await world.begin()
    await world.adverts()
    monkeypatch.setattr(world.store, "save_round", full)
    await world.uploads()
    await world.until(lambda: world.phase is Phase.ABANDONED)
    assert failures == 0


async def test_the_next_round_waits_for_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full as a round is to begin is a reason that people can read, and is looked at again."""
    monkeypatch.setattr(shell, "RECHECK_S", 0.01)
    begin, failures = world.store.begin_round, 2

    def full(state: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        begin(state)

    await world.begin()
    await world.conductor.handle(world.run, Stopped("an admin said so"))
    monkeypatch.setattr(world.store, "begin_round", full)
    with pytest.raises(CosiloError, match="persist round: round 2: database or disk is full"):
        await world.conductor.order(world.run, RoundKind.TRAIN, 1)
    await world.until(lambda: world.phase is Phase.TRAINING)
    assert failures == 0


async def test_a_message_moves_only_the_round_it_was_checked_against(world: World) -> None:
    """R2: verification runs in a thread; the round may be over, and another have begun, when its event arrives."""
    await world.begin()
    await world.conductor.handle(world.run, Stopped("an admin said so"))
    await world.conductor.order(world.run, RoundKind.TRAIN, 1)
    await world.until(lambda: world.phase is Phase.TRAINING)
    assert await world.adverts(1) == ["round 1 is over; this is round 2"] * 3
    state = world.conductor.round(world.run)
    assert state is not None
    assert [site.advert for site in state.sites.values()] == [None] * 3
    assert await world.adverts(2) == [""] * 3
    assert world.phase is Phase.UPLOADING
