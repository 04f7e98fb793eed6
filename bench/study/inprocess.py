"""The federated arm without a federation: every site's training in turn in this process, and the coordinator's own step. For exploring only.

Same trainer, same seeds, same server optimiser and moving average; no daemons, no masks, no fixed point, nobody drops. What it gives is
marked so and never stands in results.json. Owns the loop over rounds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from bench.study.centralised import OnCheckpoint
from cosilo_client.data import DataConfig, load_images, open_source, split_heldout
from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.training import DeviceImages, train
from cosilo_common.diffusion.correction import correct
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, vector_blocks
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.diffusion.specification import Preset
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import CorrectionTerms, ServerOptimiserTerms
from cosilo_server.optimiser import ServerOptimiser, ema_decay_at, step_ema

Vector = NDArray[np.float32]

_COHORT_SEED = 0


class InProcessRounds:
    """One cell's state: the global weights, the server's moments, the moving average."""

    def __init__(
        self,
        recipe: Preset,
        sites: Mapping[str, DataConfig],
        terms: ServerOptimiserTerms,
        *,
        ema_decay: float,
        cohort: int,
        raw: bool,
        correction: CorrectionTerms | None = None,
    ) -> None:
        if recipe.training.personal or recipe.training.control_variates:
            raise CosiloError("explore", "personal layers and control variates are kept by sites", "run this arm over daemons")
        self._recipe, self._ema_decay, self._cohort, self._raw = recipe, ema_decay, cohort or len(sites), raw
        self._optimiser, self._correction = ServerOptimiser(terms), correction
        self._images = {name: _site_images(config, recipe) for name, config in sites.items()}
        self._unet = build_unet(recipe.architecture)
        state = initial_state(recipe.architecture, recipe.training.seed)
        self._weights: Vector = np.concatenate([tensor.numpy().ravel() for tensor in state.values()])
        self._moments = tuple(np.full_like(self._weights, value) for value in self._optimiser.initial_moments)
        self._average = self._weights.copy()
        self._draw = np.random.default_rng(_COHORT_SEED)

    def train(self, points: list[int], on_checkpoint: OnCheckpoint) -> dict[str, float]:
        """Rounds until the last of `points` (images seen), calling back after the round nearest to each, as the daemons' runner does."""
        began = time.monotonic()
        seen = number = told = 0
        for position, point in enumerate(points):
            while number == 0 or round((point - seen) / (seen / number)) >= 1:
                number += 1
                seen += self._round(number)
            last = position + 1 == len(points)
            if number > told or last:
                told = number
                on_checkpoint(seen, number, self._average if self._ema_decay and not self._raw else self._weights, last)
        return {"rounds": number, "training_and_scoring_seconds": round(time.monotonic() - began, 1)}

    def _round(self, number: int) -> int:
        """One round; returns the images that it saw."""
        chosen = sorted(self._draw.choice(sorted(self._images), self._cohort, replace=False))
        total = sum(len(self._images[name].train) for name in chosen)
        mean = np.zeros_like(self._weights, dtype=np.float64)
        seen = 0
        place = Workplace(torch.device("cpu"), 0, 1, bf16=False)
        for name in chosen:
            data, recipe = self._images[name], self._recipe
            load_vector(self._unet, self._weights)
            seed = site_seed(number, name, recipe.training.seed)
            seen += train(self._unet, data, recipe.schedule, recipe.training, seed, None, place, lambda _: None).images
            mean += len(data.train) / total * (np.concatenate(list(vector_blocks(self._unet))) - self._weights)
        self._optimiser.step(mean.astype(np.float32), self._weights, self._moments)
        average = self._average.copy() if self._correction is not None else self._average
        if self._ema_decay:
            step_ema(self._average, self._weights, ema_decay_at(self._ema_decay, number - 1))
        if self._correction is not None and self._correction.due(number):
            self._correct(self._correction, average, number)
        return seen

    def _correct(self, terms: CorrectionTerms, before: Vector, number: int) -> None:
        """As the coordinator does: the average is trained on what the global model draws, and the moving average follows it, not what it was."""
        load_vector(self._unet, self._weights)
        drawer = copy.deepcopy(self._unet)
        if self._ema_decay:
            load_vector(drawer, self._average)
        correct(self._unet, drawer, self._recipe, terms, number)
        self._weights = np.concatenate(list(vector_blocks(self._unet)))
        if self._ema_decay:
            self._average = before
            step_ema(self._average, self._weights, ema_decay_at(self._ema_decay, number - 1))


def _site_images(config: DataConfig, recipe: Preset) -> DeviceImages:
    local = load_images(open_source(config), recipe.architecture)
    split = split_heldout(local, recipe.training.heldout_fraction)
    parts = (torch.from_numpy(local.images), torch.from_numpy(local.labels), torch.from_numpy(split.train), torch.from_numpy(split.heldout))
    return DeviceImages(*parts, local.full_scale, local.skipped)
