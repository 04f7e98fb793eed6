"""A checkpoint to its scores: draw, take features, compare with the pooled training images and with images that nobody trained on.

Owns what is measured of every arm alike. Must not know how weights came about.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.study.datasets import StudyData
from bench.study.scenario import Assessment
from cosilo_common.diffusion.grid import grid_png
from cosilo_common.diffusion.model import build_unet, load_vector
from cosilo_common.diffusion.objective import heldout_count, heldout_losses, noise_schedule
from cosilo_common.diffusion.specification import Preset, Sampling
from cosilo_common.evaluation.extractors import Extractor
from cosilo_common.evaluation.scoring import draw_for_scoring, score, scored, scored_real

GRID_COLUMNS, GRID_ROWS = 10, 6
DIGITS = 6  # of a figure in results.json: more is noise, and a diff that shows nothing


@dataclass(frozen=True)
class Point:
    """One checkpoint of one cell, as results.json has it. images: seen in training; round: 0 where there are none."""

    images: int
    round: int
    scores: dict[str, Any]


class Assessor:
    """The real sets' features, once, and a network to draw with."""

    def __init__(self, plan: Assessment, recipe: Preset, data: StudyData, extractor: Extractor, cache: Path) -> None:
        self.extractor = extractor
        self._plan, self._recipe = plan, recipe
        self._train = scored_real(extractor, _eight_bits(data.pooled.images), data.pooled.labels, cache)
        self._test = scored_real(extractor, _eight_bits(data.test.images), data.test.labels, cache)
        count = heldout_count(len(data.test.labels))
        self._test_images, self._test_labels = torch.from_numpy(data.test.images[:count]), torch.from_numpy(data.test.labels[:count])
        self._unet = build_unet(recipe.architecture)

    def assess(self, weights: NDArray[np.float32], *, last: bool, grid: Path | None) -> dict[str, Any]:
        """Every score of one float32 vector. last: the single classes too; grid: a PNG of the first drawn images."""
        load_vector(self._unet, weights)
        plan, recipe = self._plan, self._recipe
        images, labels = draw_for_scoring(
            self._unet,
            recipe.schedule,
            Sampling(sampler=plan.sampler, steps=plan.steps),
            count=plan.samples,
            classes=recipe.architecture.num_classes,
            seed=plan.seed,
        )
        if grid is not None:
            columns = min(GRID_COLUMNS, recipe.architecture.num_classes)
            grid_png(grid, images[: columns * GRID_ROWS], columns)
        drawn = scored(self.extractor, images, labels)
        to_train = asdict(score(self._train, drawn, seed=plan.seed, by_class=last))
        to_test = score(self._test, drawn, seed=plan.seed)
        result = {**to_train, "fid_test": to_test.fid, "kid_test": to_test.kid, "loss_test": self._loss()}
        if not last:
            del result["by_class"]
        return {key: _rounded(value) for key, value in result.items()}

    def _loss(self) -> float:
        """Mean over the timesteps of the loss on test images: the same images, timesteps and noise for every model."""
        buckets = self._recipe.training.loss_buckets
        sums = heldout_losses(
            self._unet,
            noise_schedule(self._recipe.schedule),
            self._test_images,
            self._test_labels,
            255,
            buckets,
        )
        return float(sums.mean()) / len(self._test_labels)


def _eight_bits(images: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        raise ValueError("the study scores 8-bit images")
    return images.astype(np.uint8, copy=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
