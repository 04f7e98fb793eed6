"""What training minimises: the denoising loss, and the held-out loss by timestep bucket that makes models comparable.

Owns the forward process and the losses. Must not know optimisers, devices' choice, files or rounds. Random numbers come
from a generator that the caller seeds; the convention is `seeding`'s.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.diffusion.specification import Schedule, Training

__all__ = [
    "Draw",
    "anchor_pull",
    "anchored_loss",
    "draw_noise",
    "heldout_count",
    "heldout_losses",
    "log_snr",
    "loss_weights",
    "noise_schedule",
    "per_image_loss",
    "site_seed",
    "sobol_sequence",
    "to_model_range",
]

HELDOUT_SEED = 0x0C051105  # fixed for ever: every model of every run is measured under the same noise
HELDOUT_BATCH = 64  # part of the definition, since noise is drawn batch by batch; small enough for any device
HELDOUT_IMAGES_MAX = 256  # a loss to 2 % or so; more would cost a CPU site longer than its training


@dataclass(frozen=True)
class Draw:
    """The random numbers of one batch of b images.

    timesteps: (b,) int64 in [0, train_timesteps); noise: (b, C, H, W) standard normal; flips: (b,) bool, or None where
    nothing is mirrored.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    flips: torch.Tensor | None


def noise_schedule(schedule: Schedule) -> DDPMScheduler:
    """diffusers' scheduler holding the schedule's noise levels; used here for its forward process only."""
    if schedule.beta_schedule == "log_snr":
        return DDPMScheduler(
            num_train_timesteps=schedule.train_timesteps,
            trained_betas=_log_snr_betas(schedule.train_timesteps),
            prediction_type=schedule.prediction_type,
            timestep_spacing="trailing",
        )
    return DDPMScheduler(
        num_train_timesteps=schedule.train_timesteps,
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction_type=schedule.prediction_type,
        timestep_spacing="trailing",
    )


def log_snr(timesteps: torch.Tensor, train_timesteps: int) -> torch.Tensor:
    """The log signal-to-noise ratio at integer timesteps of the schedule "log_snr": float64 of their shape."""
    t = (timesteps.to(torch.float64) + 1.0) / train_timesteps
    return -torch.log(torch.expm1(1e-4 + 10.0 * t.square()))


def _log_snr_betas(train_timesteps: int) -> list[float]:
    """The betas whose running product of 1 - beta is the signal's share, sigmoid(log-SNR)."""
    signal = torch.sigmoid(log_snr(torch.arange(train_timesteps), train_timesteps)).numpy()
    betas: list[float] = (1.0 - signal / np.concatenate(([1.0], signal[:-1]))).tolist()
    return betas


def sobol_sequence(seed: int) -> torch.quasirandom.SobolEngine:
    """The scrambled Sobol sequence of one round's timesteps."""
    return torch.quasirandom.SobolEngine(1, scramble=True, seed=seed)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def draw_noise(
    shape: tuple[int, int, int, int],
    train_timesteps: int,
    flip: bool,
    generator: torch.Generator,
    sequence: torch.quasirandom.SobolEngine | None = None,
) -> Draw:
    """One batch's random numbers from a CPU generator, in the order that `seeding` fixes. shape: (b, C, H, W).

    sequence: what the timesteps come from in place of the generator.
    """
    if sequence is None:
        timesteps = torch.randint(0, train_timesteps, (shape[0],), generator=generator)
    else:
        even = sequence.draw(shape[0], dtype=torch.float64)[:, 0]
        timesteps = (even * train_timesteps).to(torch.int64).clamp_(max=train_timesteps - 1)
    noise = torch.randn(shape, generator=generator)
    flips = torch.rand(shape[0], generator=generator) < 0.5 if flip else None
    return Draw(timesteps, noise, flips)


def to_model_range(images: torch.Tensor, full_scale: int) -> torch.Tensor:
    """Integer images (any shape) in [0, full_scale] as float32 in [-1, 1].

    int16 holds the bits of uint16, which torch hardly computes with.
    """
    if images.dtype == torch.int16:
        images = images.to(torch.int32).bitwise_and_(0xFFFF)
    return images.to(torch.float32).mul_(2.0 / full_scale).sub_(1.0)


def per_image_loss(
    unet: torch.nn.Module,
    noiser: DDPMScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the network's prediction, one value an image: (b,).

    images: (b, C, H, W) in [-1, 1]; labels: (b,) int64. The target is the noise (Ho et al., arXiv 2006.11239, eq. 14)
    or the velocity (Salimans and Ho, arXiv 2202.00512), as the schedule's prediction type says.
    """
    noisy, target = _question(noiser, images, timesteps, noise)
    predicted = unet(noisy, timesteps, class_labels=labels, return_dict=False)[0]
    losses: torch.Tensor = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    return losses


def anchored_loss(
    unet: torch.nn.Module,
    anchor: torch.nn.Module,
    noiser: DDPMScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    pull: torch.Tensor,
) -> torch.Tensor:
    """`per_image_loss` plus pull (b,) times the mean squared distance of the prediction from the anchor's: (b,).

    anchor: the round's global model in eval mode. Where no image of the batch is pulled it is not asked.
    """
    noisy, target = _question(noiser, images, timesteps, noise)
    predicted = unet(noisy, timesteps, class_labels=labels, return_dict=False)[0].float()
    losses: torch.Tensor = (predicted - target).square().mean(dim=(1, 2, 3))
    held = pull.nonzero()[:, 0]
    if not len(held):
        return losses
    with torch.no_grad():
        expected = anchor(noisy[held], timesteps[held], class_labels=labels[held], return_dict=False)[0].float()
    distances = (predicted[held] - expected).square().mean(dim=(1, 2, 3))
    return losses.index_add(0, held, pull[held] * distances)


def _question(
    noiser: DDPMScheduler, images: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(noisy images, what the network should say of them), each (b, C, H, W)."""
    noisy = noiser.add_noise(images, noise, timesteps)
    return noisy, noise if noiser.config.prediction_type == "epsilon" else noiser.get_velocity(images, noise, timesteps)


def anchor_pull(schedule: Schedule, training: Training) -> torch.Tensor | None:
    """By timestep, how strongly the prediction is held to the global model's: (train_timesteps,) float32, or None for not at all.

    anchor_mu from the timestep anchor_from * train_timesteps on, 0 before it.
    """
    if not training.anchor_mu:
        return None
    timesteps = torch.arange(schedule.train_timesteps)
    return training.anchor_mu * (timesteps >= training.anchor_from * schedule.train_timesteps).to(torch.float32)


def loss_weights(noiser: DDPMScheduler, training: Training) -> torch.Tensor | None:
    """By timestep, what an image's squared error counts: (train_timesteps,) float32, or None where every one counts alike.

    "min_snr" (Hang et al., arXiv 2303.09556, section 3.4): min(SNR, gamma) / SNR where the noise is predicted, min(SNR, gamma)
    / (SNR + 1) where the velocity is. "alpha_squared" (arXiv 2311.16538): SNR / (SNR + 1), the signal's share.
    """
    if training.loss_weighting == "uniform":
        return None
    signal: torch.Tensor = noiser.alphas_cumprod.to(torch.float64)
    if training.loss_weighting == "alpha_squared":
        return signal.to(torch.float32)
    snr = signal / (1.0 - signal)
    kept = snr.clamp(max=training.min_snr_gamma)
    return (kept / (snr if noiser.config.prediction_type == "epsilon" else snr + 1.0)).to(torch.float32)


@torch.no_grad()
def heldout_losses(
    unet: UNet2DModel,
    noiser: DDPMScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    full_scale: int,
    buckets: int,
    micro_batch: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> torch.Tensor:
    """Sums over the held-out images of the loss in each of `buckets` equal ranges of timesteps: (buckets,), float64 on
    the CPU.

    images: (n, C, H, W) integers in [0, full_scale], of which at most HELDOUT_IMAGES_MAX are read; labels: (n,). Divide
    by `heldout_count(n)` for means. Deterministic: noise and timesteps do not depend on the model, the round or the
    site. Dropout is off. micro_batch: most images a forward pass, where memory is short; rank, world: this process
    evaluates every world-th batch, and the sums over all ranks are the whole.
    """
    device = next(unet.parameters()).device
    generator = torch.Generator().manual_seed(HELDOUT_SEED)
    count = heldout_count(len(images))
    steps = noiser.config.num_train_timesteps
    sums = torch.zeros(buckets, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    was_training = unet.training
    unet.eval()
    turn = 0
    for bucket in range(buckets):
        low, high = bucket * steps // buckets, (bucket + 1) * steps // buckets
        for start in range(0, count, HELDOUT_BATCH):
            batch = images[start : min(start + HELDOUT_BATCH, count)]
            timesteps = torch.randint(low, high, (len(batch),), generator=generator)
            noise = torch.randn(batch.shape, generator=generator)
            if turn % world == rank:
                whole = (batch, labels[start : start + len(batch)], timesteps, noise)
                for part in zip(*(torch.split(tensor, micro_batch or HELDOUT_BATCH) for tensor in whole), strict=True):
                    clean, given, times, normal = (tensor.to(device) for tensor in part)
                    losses = per_image_loss(unet, noiser, to_model_range(clean, full_scale), given, times, normal)
                    sums[bucket] += losses.sum(dtype=torch.float64)
            turn += 1
    unet.train(was_training)
    return sums.cpu()


def heldout_count(images: int) -> int:
    """How many of that many held-out images are evaluated."""
    return min(images, HELDOUT_IMAGES_MAX)
