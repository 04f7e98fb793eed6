"""Class-conditional drawing of images from a UNet, by DDIM or DDPM.

Owns the samplers and the fixed choices behind them. Must not know files, grids or rounds.
"""

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from cosilo_common.diffusion.objective import noise_schedule
from cosilo_common.diffusion.specification import Sampling, Schedule

SAMPLE_BATCH = 64  # images denoised together; more gains nothing on a CPU and costs memory everywhere


def sampling_scheduler(schedule: Schedule, sampler: str) -> DDIMScheduler | DDPMScheduler:
    """The sampler, "ddim" (Song et al., arXiv 2010.02502, eta 0) or "ddpm" (Ho et al., arXiv 2006.11239), for a
    schedule.

    Steps are spaced "trailing", from the last timestep down: sampling then starts where training's noise is whole (Lin
    et al., arXiv 2305.08891, section 3.3). Predicted images are clipped to [-1, 1].
    """
    config = noise_schedule(schedule).config
    return DDIMScheduler.from_config(config) if sampler == "ddim" else DDPMScheduler.from_config(config)


@torch.no_grad()
def draw_images(
    unet: UNet2DModel, schedule: Schedule, labels: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> torch.Tensor:
    """Images of the given classes: (n, C, H, W) float32 in [-1, 1], on the CPU.

    labels: (n,) int64; generator: a CPU generator, from which all starting noise is drawn first. The unet is left in
    eval mode.
    """
    unet.eval()
    device = next(unet.parameters()).device
    size = unet.config.sample_size
    start = torch.randn((len(labels), unet.config.in_channels, size, size), generator=generator)
    drawn = [
        denoise(
            unet,
            sampling_scheduler(schedule, sampling.sampler),
            start[k : k + SAMPLE_BATCH].to(device),
            labels[k : k + SAMPLE_BATCH].to(device),
            sampling.steps,
            generator,
        ).cpu()
        for k in range(0, len(labels), SAMPLE_BATCH)
    ]
    return torch.cat(drawn) if drawn else start


@torch.no_grad()
def denoise(
    unet: UNet2DModel,
    scheduler: DDIMScheduler | DDPMScheduler,
    noisy: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Run the sampler from noise (b, C, H, W) to images in [-1, 1], `steps` network calls."""
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        predicted = unet(noisy, timestep, class_labels=labels, return_dict=False)[0]
        noisy = scheduler.step(predicted, timestep, noisy, generator=generator, return_dict=False)[0]
    return noisy.clamp(-1.0, 1.0)


def to_uint8(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Float images in [-1, 1] as uint8 of the same shape, rounded."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).cpu().numpy()
