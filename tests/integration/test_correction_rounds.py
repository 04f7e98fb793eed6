"""Rounds whose average is corrected before anybody sees it, through the conductor, the closer and the store; the worker is left out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.weights import open_vector, read_header, write_weights
from cosilo_server.closing import RoundCloser, RoundOutcome
from cosilo_server.conductor import Conductor
from cosilo_server.correction import CorrectionStopped, Corrector
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.optimiser import ema_decay_at
from cosilo_server.rounds.state import Phase
from tests.integration.conducted_run import World as PlainWorld
from tests.integration.conducted_run import conducted

UPDATE = np.linspace(-0.25, 0.25, 16, dtype=np.float32)
DECAY = 0.5


class AddsTen(Corrector):
    """Stands for the worker. failure: raised instead; hold: waited for first, until stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: Exception | None = None
        self.hold: threading.Event | None = None
        self.entered = threading.Event()
        self.calls: list[tuple[int, bool]] = []

    def correct(self, manifest: Manifest, round_number: int, weights: Path, drawer: Path) -> None:
        self.calls.append((round_number, drawer == weights))
        self.entered.set()
        if self.hold is not None:
            self.hold.wait(20)
            raise CorrectionStopped
        if self.failure is not None:
            raise self.failure
        table = read_header(weights).table
        corrected = np.array(open_vector(weights, table)) + np.float32(10)
        write_weights(weights, table, [corrected])

    def stop(self) -> None:
        if self.hold is not None:
            self.hold.set()


class World(PlainWorld):
    """The same run of three sites at b = 24, with a correction."""

    corrector: AddsTen

    def __init__(self, folder: Path, **changes: object) -> None:
        self.changes = {"correction": {}, "ema_decay": DECAY, **changes}
        super().__init__(folder, **self.changes)

    def new_conductor(self) -> Conductor:
        self.corrector = AddsTen()
        self.closer = RoundCloser(self.store, self.artifacts, self.spool, corrector=self.corrector)
        self.metrics = CoordinatorMetrics()
        return Conductor(self.store, self.spool, self.closer, self.metrics)

    def failures(self) -> float | None:
        return self.metrics.registry.get_sample_value("cosilo_corrections_failed_total")

    async def round(self) -> RoundOutcome:
        await self.close(await self.encoding(RoundKind.TRAIN), [UPDATE] * 3)
        return self.outcome()

    def average(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        newest = self.store.newest_checkpoint(self.run)
        assert newest is not None
        return np.array(open_vector(self.artifacts.path(newest.ema.hex()), self.manifest.tensor_table))

    def referred(self) -> set[str]:
        found = self.store.checkpoints(self.run)
        return {digest.hex() for entry in found for digest in (entry.weights, entry.ema, entry.optimiser) if digest}


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with conducted(World(tmp_path)) as made:
        yield made


async def test_the_corrected_average_is_the_checkpoint_and_the_moving_average_follows_it(world: World) -> None:
    outcome = await world.round()
    assert outcome.corrected and outcome.note == "corrected by 8 steps on 512 images that the global model drew"
    np.testing.assert_allclose(world.weights(), UPDATE + 10, atol=1e-4)
    decay = np.float32(ema_decay_at(DECAY, 0))
    np.testing.assert_allclose(world.average(), (1 - decay) * world.weights(), rtol=1e-6)
    assert world.corrector.calls == [(1, False)]  # drawn by the moving average
    assert set(world.artifacts.digests()) == world.referred()  # the plain average was never an artifact


@pytest.mark.parametrize("failure", [CosiloError("correct the average", "no"), OSError(28, "No space left on device")])
async def test_a_correction_that_fails_costs_only_itself(world: World, failure: Exception) -> None:
    world.corrector.failure = failure
    outcome = await world.round()
    assert not outcome.corrected and outcome.note.startswith("not corrected, the plain average stands: ")
    assert world.failures() == 1
    np.testing.assert_allclose(world.weights(), UPDATE, atol=1e-4)
    world.corrector.failure = None
    assert (await world.round()).corrected
    np.testing.assert_allclose(world.weights(), 2 * UPDATE + 10, atol=1e-4)
    assert world.failures() == 1


async def test_a_crash_in_a_correction_costs_nothing(world: World) -> None:
    """The next process opens the sum again, corrects it from the same files, and only then is there a checkpoint."""
    world.corrector.hold = threading.Event()
    encoding = await world.encoding(RoundKind.TRAIN)
    closing = asyncio.create_task(world.close(encoding, [np.zeros(16, np.float32)] * 3))
    held = world.corrector
    assert await asyncio.to_thread(held.entered.wait, 20)
    assert world.state.phase is Phase.OPENING
    assert set(world.artifacts.digests()) == world.referred()  # nothing of this round is anywhere but in files in the making
    closing.cancel()
    await world.conductor.stop()
    held.stop()
    world.conductor = world.new_conductor()
    await world.conductor.start()
    await world.until(Phase.CLOSED)
    assert world.outcome().corrected and len(world.corrector.calls) == 1
    assert world.weights().tolist() == [10.0] * 16


async def test_without_a_moving_average_the_stepped_model_draws(tmp_path: Path) -> None:
    async with conducted(World(tmp_path, ema_decay=0.0, correction={"every": 2})) as world:
        assert not (await world.round()).corrected and world.corrector.calls == [] and world.outcome().note == ""
        assert world.failures() == 0  # none was due
        assert (await world.round()).corrected and world.corrector.calls == [(2, True)]
        np.testing.assert_allclose(world.weights(), 2 * UPDATE + 10, atol=1e-4)


async def test_a_rehearsal_is_not_corrected(world: World) -> None:
    encoding = await world.encoding(RoundKind.REHEARSAL)
    await world.close(encoding, [np.zeros(16, np.float32)] * 3)
    assert world.corrector.calls == [] and not world.outcome().corrected
