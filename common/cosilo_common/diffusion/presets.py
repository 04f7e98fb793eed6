"""Recipes that work as they are: `digits`, `fashion-16`, `mednist-32` (for a CPU) `ddpm-cifar10` and `tun2023` (for GPUs).

Owns hyper-parameters only. Must not know torch. A run's TOML starts from a preset and overrides single values.
"""

from types import MappingProxyType

from cosilo_common.diffusion.specification import Architecture, Preset, Sampling, Schedule, Training
from cosilo_common.errors import CosiloError

# scikit-learn's digits, 8x8 grey, 0.64 million parameters: the demo, for some 12 rounds over four skewed sites with an
# EMA of decay 0.5 (a larger one still holds the first rounds after 12). Digits are not mirrored: a flipped 3 is no
# digit.
_DIGITS = Preset(
    architecture=Architecture(
        sample_size=8, in_channels=1, num_classes=10, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8
    ),
    schedule=Schedule(),
    training=Training(local_epochs=3, batch_size=32, learning_rate=1e-3, loss_buckets=4),
    sampling=Sampling(steps=30),
)

# Fashion-MNIST at 16x16 grey. Shoes and bags point one way in the data, so no mirroring either.
_FASHION_16 = Preset(
    architecture=Architecture(
        sample_size=16,
        in_channels=1,
        num_classes=10,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
    ),
    schedule=Schedule(),
    training=Training(local_epochs=1, batch_size=64, learning_rate=1e-3, loss_buckets=4),
    sampling=Sampling(steps=50),
)

# MedNIST or MedMNIST at 32x32 grey; set num_classes to the data's own (MedNIST has six, of which three are used here).
_MEDNIST_32 = Preset(
    architecture=Architecture(
        sample_size=32,
        in_channels=1,
        num_classes=3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
    ),
    schedule=Schedule(),
    training=Training(local_epochs=1, batch_size=32, learning_rate=1e-3, loss_buckets=4),
    sampling=Sampling(steps=50),
)

# The CIFAR-10 net of Ho et al., arXiv 2006.11239, appendix B, with class labels: 35.7 million parameters, lr 2e-4,
# batch 128, dropout 0.1.
_DDPM_CIFAR10 = Preset(
    architecture=Architecture(
        sample_size=32,
        in_channels=3,
        num_classes=10,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        attention=(False, True, False, False),
        attention_head_dim=None,
        norm_num_groups=32,
        dropout=0.1,
    ),
    schedule=Schedule(beta_schedule="linear", prediction_type="epsilon"),
    training=Training(local_epochs=5, batch_size=128, learning_rate=2e-4, horizontal_flip=True, loss_buckets=8),
    sampling=Sampling(steps=100),
)

# Tun et al., arXiv 2311.16538: 23,211,315 parameters, Adam 2e-4, five local epochs with the optimiser made anew each round, 300 DDPM
# steps. Their t is continuous, ours has a thousand steps; their batches are 512 in mixed precision.
_TUN2023 = Preset(
    architecture=Architecture(
        network="residual",
        sample_size=32,
        in_channels=3,
        num_classes=10,
        block_out_channels=(64, 128, 256, 512),
        layers_per_block=2,
        mid_attention=False,
        norm_num_groups=1,
        dropout=0.1,
    ),
    schedule=Schedule(beta_schedule="log_snr"),
    training=Training(
        local_epochs=5,
        batch_size=512,
        learning_rate=2e-4,
        max_grad_norm=0.0,
        horizontal_flip=True,
        loss_weighting="alpha_squared",
        timesteps="sobol",
        loss_buckets=8,
    ),
    sampling=Sampling(sampler="ddpm", steps=300),
)

PRESETS = MappingProxyType(
    {"digits": _DIGITS, "fashion-16": _FASHION_16, "mednist-32": _MEDNIST_32, "ddpm-cifar10": _DDPM_CIFAR10, "tun2023": _TUN2023}
)


def preset(name: str) -> Preset:
    """The preset of that name; raises CosiloError naming those that exist."""
    try:
        return PRESETS[name]
    except KeyError:
        raise CosiloError("preset", f"no preset is called {name!r}", f"choose one of {', '.join(sorted(PRESETS))}") from None
