"""The three things an admin's machine does with torch: naming a model's tensors, writing a folder that diffusers
loads, and scoring what a checkpoint draws.

The only module of the command line from which torch is reached, and only from inside these functions: it takes
seconds to load, and no other command waits for it. Must not know the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule
from cosilo_common.manifest import EvaluationTerms, Manifest
from cosilo_common.weights import TensorTable, open_vector

if TYPE_CHECKING:
    from cosilo_common.evaluation.scoring import FederatedScores


def tensor_table(architecture: Architecture) -> TensorTable:
    """Names and shapes of the model's tensors; takes no memory, whatever the model's size."""
    from cosilo_common.diffusion import model

    return model.tensor_table(architecture)


def export_folder(
    weights: Path, architecture: Architecture, schedule: Schedule, to: Path, class_index: int | None, card: Callable[[Path], str]
) -> None:
    """Writes a diffusers folder from a weights or ema file, whole or not at all; class_index: for stock pipelines,
    one class only; card: gives its README.md, from the folder."""
    from cosilo_common.diffusion.export import export_pipeline

    export_pipeline(weights, architecture, schedule, to, class_index, card)


def score_checkpoint(
    weights: Path,
    manifest: Manifest,
    sampling: Sampling,
    terms: EvaluationTerms,
    features: Path | None,
    moments: Path,
    *,
    samples: int,
    seed: int,
) -> FederatedScores:
    """Draws from a weights or ema file and compares with a moments artifact; features: the extractor's weights.

    Raises CosiloError where a file is not the one that the run names.
    """
    from cosilo_common.diffusion import model
    from cosilo_common.evaluation.extractors import named
    from cosilo_common.evaluation.moments import read_moments
    from cosilo_common.evaluation.scoring import draw_for_scoring, score_against_moments

    network, real = named(terms, features), read_moments(moments)
    unet = model.build_unet(manifest.architecture)
    model.load_vector(unet, open_vector(weights, model.tensor_table(manifest.architecture)))
    classes = manifest.architecture.num_classes
    images, _ = draw_for_scoring(unet, manifest.schedule, sampling, count=samples, classes=classes, seed=seed)
    return score_against_moments(network, real, images)
