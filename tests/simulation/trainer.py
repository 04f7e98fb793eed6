"""A trainer that trains at once and by the book: what a site's update is follows from the round's seed alone.

Owns the values of updates, which the oracle of sums works out again, and the ways in which training fails. The file is written by the real
trainer's own code. Must not know the protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from cosilo_client.trainer.jobs import EvaluateJob, FailureCode, Job, Progress, Result, TrainerFailed
from cosilo_client.trainer.update import write_update
from cosilo_common.weights import TensorTable, Vector, open_vector

LOSS_BUCKETS = 4
IMAGES_MAX = 700


@dataclass
class Temper:
    """How training goes. Shares of trainings that fail with a code, or stand still for stuck_s."""

    seconds_max: float = 6.0
    fails: float = 0.0
    sticks: float = 0.0
    stuck_s: float = 120.0


def update_of(seed: int, size: int) -> Vector:
    """The update that a seed gives: float32 (size,), most values below 1 and a few above every clip."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0.0, 0.3, size).astype(np.float32)
    values[generator.random(size) < 0.05] *= 20
    return values


def images_of(seed: int) -> int:
    """How many images a seed's site says it trained on."""
    return 1 + seed * 2654435761 % IMAGES_MAX


class SimulatedTrainer:
    """One site's trainer process. on_trained: told the seed of every training that comes to an end."""

    def __init__(self, random: Random, temper: Temper, table: TensorTable, on_start: Callable[[Job], None]) -> None:
        self.restarts = 0
        self._random = random
        self._temper = temper
        self._table = table
        self._on_start = on_start
        self._one_job = asyncio.Lock()

    async def run(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        """As TrainerLink.run."""
        async with self._one_job:
            self._on_start(job)
            return await self._train(job, on_progress)

    async def _train(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        random, temper = self._random, self._temper
        base = open_vector(job.weights, self._table)
        seed = 0 if isinstance(job, EvaluateJob) else job.seed
        images = images_of(seed)
        pieces = random.randint(1, 3)
        for piece in range(1, pieces + 1):
            await asyncio.sleep(temper.seconds_max * random.random() / pieces)
            on_progress(Progress(tenths=10 * piece // pieces, images=images, images_per_second=10.0, loss=0.5))
            if random.random() < temper.sticks:
                await asyncio.sleep(temper.stuck_s)
            if random.random() < temper.fails:
                self.restarts += 1
                raise TrainerFailed(random.choice(list(FailureCode)), "the simulated trainer failed")
        if not isinstance(job, EvaluateJob):
            write_update(job.update, [np.asarray(base) + update_of(seed, self._table.size)], base)
        return Result(
            weight=images,
            heldout_losses=tuple(0.25 * (bucket + 1) for bucket in range(LOSS_BUCKETS)),
            train_loss=0.0 if isinstance(job, EvaluateJob) else 0.5,
            steps=1,
            images=images,
            seconds=1.0,
            images_per_second=10.0,
            gpu_memory_bytes=0,
            device="simulated",
            skipped=0,
        )
