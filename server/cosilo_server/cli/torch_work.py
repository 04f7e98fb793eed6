"""What an admin's machine does with torch: naming a model's tensors, writing a folder that diffusers
loads, and scoring what a checkpoint draws, against a sum of moments or a folder of real images.

The only module of the command line from which torch is reached, and only from inside these functions: it takes
seconds to load, and no other command waits for it. Must not know the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cosilo_common.diffusion.lora import Lora, LoraBase, require_peft
from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule
from cosilo_common.manifest import EvaluationTerms, Manifest
from cosilo_common.weights import TensorTable
from cosilo_server.cli.known_tables import known_table

if TYPE_CHECKING:
    from cosilo_common.evaluation.scoring import FederatedScores, LocalScores


def tensor_table(architecture: Architecture) -> TensorTable:
    """Names and shapes of the model's tensors; takes no memory, whatever the model's size, and torch only the first time."""
    return known_table(architecture, _tensor_table)


def _tensor_table(architecture: Architecture) -> TensorTable:
    from cosilo_common.diffusion import model

    return model.tensor_table(architecture)


def adapter_table(architecture: Architecture, lora: Lora) -> TensorTable:
    """Names and shapes of a run's adapters. Raises CosiloError where peft is not installed, or a target is no layer's name."""
    require_peft("create run", "cosilo-server")
    from cosilo_common.diffusion import adapters

    return adapters.adapter_table(architecture, lora)


def export_folder(
    weights: Path,
    architecture: Architecture,
    schedule: Schedule,
    to: Path,
    class_index: int | None,
    card: Callable[[Path], str],
    base: LoraBase | None = None,
) -> None:
    """Writes a diffusers folder from a weights or ema file, whole or not at all; class_index: for stock pipelines,
    one class only; card: gives its README.md, from the folder; base: of a run of adapters, which are added to it."""
    from cosilo_common.diffusion.export import export_pipeline

    if base is not None:
        require_peft("export checkpoint", "cosilo-server")
    export_pipeline(weights, architecture, schedule, to, class_index, card, base)


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
    base: LoraBase | None = None,
) -> FederatedScores:
    """Draws from a weights or ema file and compares with a moments artifact; features: the extractor's weights; base: of a run of adapters.

    Raises CosiloError where a file is not the one that the run names.
    """
    from cosilo_common.diffusion.adapters import whole_unet
    from cosilo_common.evaluation.extractors import named
    from cosilo_common.evaluation.moments import read_moments
    from cosilo_common.evaluation.scoring import draw_for_scoring, score_against_moments

    network, real = named(terms, features), read_moments(moments)
    if base is not None:
        require_peft("score", "cosilo-server")
    unet = whole_unet(manifest.architecture, weights, base)
    classes = manifest.architecture.num_classes
    images, _ = draw_for_scoring(unet, manifest.schedule, sampling, count=samples, classes=classes, seed=seed)
    return score_against_moments(network, real, images)


def score_against_folder(
    weights: Path,
    manifest: Manifest,
    sampling: Sampling,
    network: str | EvaluationTerms,
    features: Path | None,
    folder: Path,
    *,
    samples: int,
    seed: int,
    base: LoraBase | None = None,
) -> LocalScores:
    """Draws as `score_checkpoint` does, and compares with the pictures of a folder. network: a run's terms, or an extractor's name.

    Raises CosiloError where a file is not the one that the run names, or a picture cannot be read.
    """
    from cosilo_common.diffusion.adapters import whole_unet
    from cosilo_common.evaluation.extractors import extractor, named
    from cosilo_common.evaluation.picture_folder import read_pictures
    from cosilo_common.evaluation.scoring import draw_for_scoring, score_against_images

    found = extractor(network, weights=features) if isinstance(network, str) else named(network, features)
    real, labels = read_pictures(folder, manifest.architecture)
    if base is not None:
        require_peft("score", "cosilo-server")
    unet = whole_unet(manifest.architecture, weights, base)
    classes = manifest.architecture.num_classes
    images, drawn = draw_for_scoring(unet, manifest.schedule, sampling, count=samples, classes=classes, seed=seed)
    return score_against_images(found, (real, labels), (images, drawn), seed=seed)
