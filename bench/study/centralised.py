"""The arm to reach: the trainer's own loop over everybody's images in one process, at the same image budget.

Owns one call of the trainer. A federation of one would be refused by secure aggregation, and is not what pooling is: here the optimiser is
never rebuilt.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cosilo_client.data import LocalImages, split_heldout
from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.jobs import Progress
from cosilo_client.trainer.training import DeviceImages, train
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, vector_blocks
from cosilo_common.diffusion.specification import Preset, Training

OnCheckpoint = Callable[[int, int, NDArray[np.float32], bool], None]  # images seen, round, weights, whether it is the last


def train_centralised(pooled: LocalImages, recipe: Preset, budget: int, points: list[int], on_checkpoint: OnCheckpoint) -> float:
    """Trains until `budget` images are seen, calling back at each of `points`, the last of which is the budget; returns training's seconds.

    The trainer reports at every tenth of its steps, so points must lie on tenths of the budget.
    """
    training = at_budget(recipe.training, len(split_heldout(pooled, recipe.training.heldout_fraction).train), budget)
    split = split_heldout(pooled, training.heldout_fraction)
    images = DeviceImages(
        torch.from_numpy(pooled.images),
        torch.from_numpy(pooled.labels),
        torch.from_numpy(split.train),
        torch.from_numpy(split.heldout),
        pooled.full_scale,
        pooled.skipped,
    )
    unet = build_unet(recipe.architecture)
    load_vector(unet, np.concatenate([tensor.numpy().ravel() for tensor in initial_state(recipe.architecture, training.seed).values()]))
    wanted = [round(10 * point / budget) for point in points]  # tenths
    began, aside = time.monotonic(), 0.0

    def report(progress: Progress) -> None:
        nonlocal aside
        if wanted and progress.tenths >= wanted[0]:
            wanted.pop(0)
            paused = time.monotonic()
            on_checkpoint(progress.images, 0, np.concatenate(list(vector_blocks(unet))), not wanted)
            aside += time.monotonic() - paused

    train(unet, images, recipe.schedule, training, training.seed, None, Workplace(torch.device("cpu"), 0, 1, bf16=False), report)
    return time.monotonic() - began - aside


def at_budget(training: Training, images: int, budget: int) -> Training:
    """The same training with as many epochs and steps as bring the images seen to the budget, to within a batch."""
    batches = -(-images // training.batch_size)
    whole, rest = divmod(budget, images)
    steps = whole * batches + -(-rest // training.batch_size)
    return training.model_copy(update={"local_epochs": whole + 1, "max_steps": max(1, steps), "steps_per_epoch": None})
