"""Training of an averaged model on images that the global model draws itself: FedDDPM's correction without any site's own model.

Owns what is drawn, the few steps that follow, and their random numbers. Must not know files, rounds' meaning or sites. FedDDPM (Peng et al.,
arXiv 2503.06426) draws its auxiliary images from the models that single clients send; under the masks nobody has those, so here the
global model draws them, and no image of any site takes part.
"""

from __future__ import annotations

import torch

from cosilo_common.canonical import lp, sha256, u64
from cosilo_common.diffusion.objective import draw_noise, loss_weights, noise_schedule, per_image_loss
from cosilo_common.diffusion.sampling import draw_images
from cosilo_common.diffusion.specification import Preset, Sampling
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import CorrectionTerms

_LABEL = b"cosilo/correction-seed/1"


def correction_seed(round_number: int, seed: int) -> int:
    """The seed of one round's correction: 0 to 2^63 - 1. seed: `Training.seed`; no site's training has the same stream."""
    return int.from_bytes(sha256(lp(_LABEL, u64(round_number), u64(seed)))[:8], "big") >> 1


def correct(averaged: torch.nn.Module, drawer: torch.nn.Module, recipe: Preset, terms: CorrectionTerms, round_number: int) -> None:
    """Trains `averaged` in place for terms.steps steps on terms.samples images that `drawer` drew; the two may be one network.

    Classes are drawn in turn. Adam, fresh; batches of training.batch_size, cut from one shuffle after the other; timesteps uniform,
    losses weighted as in the run's training. On a CPU, with one number of threads and deterministic algorithms, the same inputs give
    the same bits. Leaves the global generator alone. Raises CosiloError where a loss is not finite.
    """
    if not terms.steps:
        return
    seed = correction_seed(round_number, recipe.training.seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(terms.samples) % recipe.architecture.num_classes
    sampling = Sampling(sampler=recipe.sampling.sampler, steps=terms.sampler_steps or recipe.sampling.steps)
    images = draw_images(drawer, recipe.schedule, labels, sampling, generator)
    noiser = noise_schedule(recipe.schedule)
    weights = loss_weights(noiser, recipe.training)
    optimiser = torch.optim.Adam(averaged.parameters(), lr=terms.learning_rate, fused=True)
    batch = min(recipe.training.batch_size, terms.samples)
    order = torch.empty(0, dtype=torch.int64)
    averaged.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for step in range(terms.steps):
            if len(order) < batch:
                order = torch.randperm(terms.samples, generator=generator)
            chosen, order = order[:batch], order[batch:]
            draw = draw_noise((batch, *images.shape[1:]), recipe.schedule.train_timesteps, False, generator)
            losses = per_image_loss(averaged, noiser, images[chosen], labels[chosen], draw.timesteps, draw.noise)
            if weights is not None:
                losses = losses * weights[draw.timesteps]
            loss = losses.mean()
            if not torch.isfinite(loss):
                raise CosiloError("correct the average", f"the loss is not finite at step {step + 1}", "lower correction.learning_rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if recipe.training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(averaged.parameters(), recipe.training.max_grad_norm)
            optimiser.step()
