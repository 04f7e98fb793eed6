"""The UNet of Tun et al. (arXiv 2311.16538): residual convolutions without norms or attention, told the log-SNR and the class as planes.

Owns that network. Must not know training or rounds. It takes what UNet2DModel takes, so that everything around it stays as it is.
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from cosilo_common.diffusion.objective import log_snr
from cosilo_common.diffusion.specification import LOG_SNR_TIMESTEPS

FOURIER_FEATURES = 16  # cosines and sines of 8 learned multiples of the log-SNR
FOURIER_STD = 0.2
CLASS_PLANES = 4


class ResidualUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships no types
    """Velocity of noisy images (b, C, S, S) at integer timesteps of the schedule "log_snr", given classes (b,).

    block_out_channels: width of each level, finest first; each level has layers_per_block residual blocks on the way down and as many
    on the way up, the coarsest twice as many. Averages of 2 x 2 pixels go down, nearest neighbours up, and each level's input is
    concatenated to what comes back from below.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers ships no types
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        num_class_embeds: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.multiples = nn.Parameter(torch.randn(FOURIER_FEATURES // 2, 1) * FOURIER_STD)
        self.classes = nn.Embedding(num_class_embeds, CLASS_PLANES)
        planes = in_channels + FOURIER_FEATURES + CLASS_PLANES
        first, last = block_out_channels[0], in_channels
        self.enter = _blocks(planes, first, first, layers_per_block, dropout)
        self.below = _Level(first, block_out_channels[1:], layers_per_block, dropout) if len(block_out_channels) > 1 else None
        wide = first * 2 if self.below is not None else first
        self.leave = nn.ModuleList(
            [
                *_blocks(wide, first, first, layers_per_block - 1, dropout),
                _Block(first if layers_per_block > 1 else wide, first, last, dropout, False),
            ]
        )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """The prediction, in a tuple as diffusers has it. timestep: one for all, or (b,)."""
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        ratio = log_snr(times, LOG_SNR_TIMESTEPS).to(self.multiples.dtype)
        angles = 2 * math.pi * ratio[:, None] @ self.multiples.T  # (b, 8)
        told = torch.cat([angles.cos(), angles.sin(), self.classes(class_labels)], dim=1)
        planes = told[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        x = _through(self.enter, torch.cat([sample, planes.to(sample.dtype)], dim=1))
        if self.below is not None:
            x = torch.cat([self.below(x), x], dim=1)
        return (_through(self.leave, x),)


class _Level(nn.Module):
    """Everything below a level: down, this level's blocks, what lies deeper, back to the width above, up."""

    def __init__(self, above: int, widths: tuple[int, ...], layers: int, dropout: float) -> None:
        super().__init__()
        width = widths[0]
        self.enter = _blocks(above, width, width, layers, dropout)
        self.below = _Level(width, widths[1:], layers, dropout) if len(widths) > 1 else None
        wide = width * 2 if self.below is not None else width
        self.leave = nn.ModuleList(
            [*_blocks(wide, width, width, layers - 1, dropout), _Block(width if layers > 1 else wide, width, above, dropout, True)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _through(self.enter, nn.functional.avg_pool2d(x, 2))
        if self.below is not None:
            x = torch.cat([self.below(x), x], dim=1)
        return nn.functional.interpolate(_through(self.leave, x), scale_factor=2, mode="nearest")


class _Block(nn.Module):
    """Two 3 x 3 convolutions, each followed by channel dropout and ReLU, beside a straight way that is 1 x 1 where widths differ."""

    def __init__(self, into: int, middle: int, out: int, dropout: float, drops_last: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, middle, 3, padding=1)
        self.second = nn.Conv2d(middle, out, 3, padding=1)
        self.straight = nn.Identity() if into == out else nn.Conv2d(into, out, 1, bias=False)
        self.first_dropout = nn.Dropout2d(dropout)
        self.second_dropout = nn.Dropout2d(dropout if drops_last else 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first_dropout(self.first(x)))
        way: torch.Tensor = self.straight(x)
        return torch.relu(self.second_dropout(self.second(y))) + way


def _blocks(into: int, middle: int, out: int, count: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList([_Block(into if place == 0 else out, middle, out, dropout, True) for place in range(count)])


def _through(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x
