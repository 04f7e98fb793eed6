"""One small loop in one process, which a federation of real processes must equal.

The loop is the tests' own: its own FedAvg, its own local training and its own fixed point, from PROTOCOL.md (Encoding) and the
seeding that `cosilo_common.diffusion.seeding` documents. From the product it takes the network, the loss, the images' split and the
reading of weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosilo_client.data import load_images, open_source, split_heldout
from cosilo_client.data.config import DataConfig
from cosilo_common.diffusion.model import build_unet, load_vector, tensor_table, vector_blocks
from cosilo_common.diffusion.objective import noise_schedule, per_image_loss, to_model_range
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.diffusion.specification import Architecture, Preset
from cosilo_common.weights import open_vector
from tests.federation.local import LocalFederation

Vector = NDArray[np.float32]

ROUNDS = 3
CLIP, CAP = 1.0, 1024
TRAINING = {"local_epochs": 1, "batch_size": 32, "max_steps": 5, "learning_rate": 1e-3}
ARCHITECTURE = {"block_out_channels": [8, 16], "norm_num_groups": 4}
DIGITS = preset("digits")


@dataclass(frozen=True)
class Step:
    """One round of the loop. exact: the new weights with nothing rounded; weights: with PROTOCOL.md's integers, as is the mean update."""

    exact: NDArray[np.float64]
    weights: Vector
    mean: Vector
    total_weight: int


def train_at_site(number: int, site: str, data: DataConfig, weights: Vector, recipe: Preset) -> tuple[int, Vector]:
    """(W, update) of one site in one round."""
    local = load_images(open_source(data), recipe.architecture)
    chosen = torch.from_numpy(split_heldout(local, recipe.training.heldout_fraction).train)
    images, labels = torch.from_numpy(local.images), torch.from_numpy(local.labels)
    unet, noiser = build_unet(recipe.architecture), noise_schedule(recipe.schedule)
    load_vector(unet, weights)
    optimiser = torch.optim.Adam(unet.parameters(), lr=recipe.training.learning_rate, fused=True)
    g = torch.Generator().manual_seed(site_seed(number, site, recipe.training.seed))
    order = chosen[torch.randperm(len(chosen), generator=g)]
    for batch in torch.split(order, recipe.training.batch_size)[: recipe.training.max_steps]:
        t = torch.randint(0, recipe.schedule.train_timesteps, (len(batch),), generator=g)
        noise = torch.randn((len(batch), 1, 8, 8), generator=g)
        loss = per_image_loss(unet, noiser, to_model_range(images[batch], 255), labels[batch], t, noise).sum() / len(batch)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), recipe.training.max_grad_norm)
        optimiser.step()
    return len(chosen), np.concatenate(list(vector_blocks(unet))) - weights


def reference_round(number: int, sites: Mapping[str, DataConfig], weights: Vector, recipe: Preset) -> Step:
    """FedAvg over the sites, once exactly and once in PROTOCOL.md's integers (b = 32)."""
    largest = (2**31 - 1) // len(sites)
    updates = [train_at_site(number, site, data, weights, recipe) for site, data in sites.items()]
    total = sum(weight for weight, _ in updates)
    exact = np.zeros(weights.size)
    summed = np.zeros(weights.size, np.int64)
    for weight, update in updates:
        exact += weight / total * update.astype(np.float64)
        summed += np.rint(weight / CAP * largest / CLIP * update.astype(np.float64)).astype(np.int64)
    mean = (summed * (CLIP / largest * CAP / total)).astype(np.float32)
    return Step(weights + exact, weights + mean, mean, total)


def recipe_of(seed: int) -> Preset:
    """What a plan's sections make of the preset."""
    architecture = Architecture.model_validate({**DIGITS.architecture.model_dump(), **ARCHITECTURE})
    return DIGITS.model_copy(
        update={"architecture": architecture, "training": DIGITS.training.model_copy(update={**TRAINING, "seed": seed})}
    )


def plan(name: str, seed: int, **more: Any) -> dict[str, Any]:
    """A run file. seed: another for each run, for no site lends itself to one untrained model again and again (R8)."""
    return {
        "name": name,
        "preset": "digits",
        "architecture": ARCHITECTURE,
        "training": {**TRAINING, "seed": seed},
        "encoding": {"clip": CLIP, "cap": CAP},
        **more,
    }


def trained_weights(federation: LocalFederation, run: str, recipe: Preset) -> list[Vector]:
    """The weights of every checkpoint, the untrained ones first."""
    table = tensor_table(recipe.architecture)
    files = [federation.artifact(checkpoint["weights"]) for checkpoint in federation.checkpoints(run)]
    return [np.array(open_vector(file, table)) for file in files]


def check_against_the_loop(federation: LocalFederation, run: str, sites: Mapping[str, DataConfig], seed: int) -> None:
    recipe = recipe_of(seed)
    checkpoints = trained_weights(federation, run, recipe)
    assert len(checkpoints) == ROUNDS + 1
    unit = CLIP / ((2**31 - 1) // len(sites))
    weights = checkpoints[0]
    for number in range(1, ROUNDS + 1):
        step = reference_round(number, sites, weights, recipe)
        # PROTOCOL.md, Encoding: half a unit a site, scaled as the mean is; then the mean and the weights are rounded to float32.
        rounding = np.spacing(np.abs(step.mean)) / 2 + np.spacing(np.abs(checkpoints[number])) / 2
        bound = len(sites) * unit * CAP / (2 * step.total_weight) + rounding
        assert np.all(np.abs(checkpoints[number] - step.exact) <= bound), f"round {number}"
        assert np.array_equal(checkpoints[number], step.weights), f"round {number}: the same integers give the same bits"
        weights = step.weights
    assert np.abs(weights - checkpoints[0]).max() > 1e-3  # it did train


def site_data(federation: LocalFederation) -> dict[str, DataConfig]:
    """Each site's [data] table as the site itself parses it."""
    return {name: DataConfig(kind="digits", index_file=Path(str(spec.data["index_file"]))) for name, spec in federation.sites.items()}
