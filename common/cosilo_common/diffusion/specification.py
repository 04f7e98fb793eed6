"""What a manifest says about a model, its noise schedule, its local training and its sampling: plain values.

Owns every bound on those values. Must not know torch, diffusers or how a value is used: both daemons read manifests and
neither loads torch.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SAMPLE_SIZE_MAX = 512  # pixel-space diffusion beyond this belongs to latent models, which Cosilo does not build
CHANNELS_MAX = 16  # images have 1 to 4 planes, multispectral ones some more
LEVELS_MAX = 8  # 512 = 2^9 halves to 4 in eight levels
WIDTH_MAX = 4096  # four times the widest published pixel-space UNet
LAYERS_MAX = 8  # diffusers' own presets stop at 3
CLASSES_MAX = 10_000  # ImageNet-21k's order; an embedding row each
TIMESTEPS_MAX = 10_000  # ten times the customary 1,000
BUCKETS_MAX = 32  # each bucket is a word in every masked upload and a forward pass over the held-out part
EPOCHS_MAX = 1_000  # more local work than this is another run
BATCH_MAX = 65_536  # larger than any site's memory at the smallest size
STEPS_MAX = 10_000_000  # bounds one round's work whatever the epochs say
LOG_SNR_TIMESTEPS = 1_000  # into which the continuous t of arXiv 2311.16538 is cut
PARTS_MAX = 6  # as many as there are
SEED_MAX = 2**63 - 1  # torch's generators take a signed 64-bit seed

Whole = Annotated[int, Field(strict=True)]  # true, "8" and 8.0 are not numbers of anything
Flag = Annotated[bool, Field(strict=True)]
Part = Literal["norms", "class_embedding", "time_embedding", "encoder", "bottleneck", "decoder"]


class Plain(BaseModel):
    """Frozen values with every key known: an unknown key, NaN or infinity is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Architecture(Plain):
    """The shape of a class-conditional UNet for square images.

    network: "unet2d" is diffusers' UNet2DModel; "residual" is `residual_unet`'s, without norms or attention, so that the
    fields which say how those are must say that there are none. sample_size: pixels a side. block_out_channels: width of
    each level, finest first. attention: one flag a level, or empty for none. attention_head_dim: channels a head; None is
    one head as wide as its level. num_classes: rows of the class embedding, at least one. Raises
    pydantic.ValidationError for any shape that the network could not build or run.
    """

    network: Literal["unet2d", "residual"] = "unet2d"
    sample_size: Annotated[Whole, Field(ge=4, le=SAMPLE_SIZE_MAX)]
    in_channels: Annotated[Whole, Field(ge=1, le=CHANNELS_MAX)]
    num_classes: Annotated[Whole, Field(ge=1, le=CLASSES_MAX)]
    block_out_channels: Annotated[tuple[Annotated[Whole, Field(ge=4, le=WIDTH_MAX)], ...], Field(min_length=1, max_length=LEVELS_MAX)]
    layers_per_block: Annotated[Whole, Field(ge=1, le=LAYERS_MAX)]
    attention: Annotated[tuple[Flag, ...], Field(max_length=LEVELS_MAX)] = ()
    mid_attention: Flag = True
    attention_head_dim: Annotated[Whole, Field(ge=1, le=WIDTH_MAX)] | None = 8
    norm_num_groups: Annotated[Whole, Field(ge=1, le=WIDTH_MAX)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        levels = len(self.block_out_channels)
        if self.attention and len(self.attention) != levels:
            raise ValueError(f"attention has {len(self.attention)} flags for {levels} levels; give one flag a level, or none at all")
        reduction = 2 ** (levels - 1)
        if self.sample_size % reduction:
            raise ValueError(f"sample_size {self.sample_size} is not divisible by {reduction}, which {levels} levels need")
        if self.network == "residual":
            if self.attention or self.mid_attention or self.norm_num_groups != 1:
                raise ValueError(
                    'network = "residual" has neither attention nor norms: set mid_attention = false, norm_num_groups = 1, no attention'
                )
            return self
        if self.block_out_channels[0] % 2:
            raise ValueError(f"the first width, {self.block_out_channels[0]}, must be even: a timestep becomes sines and cosines")
        for level, width in enumerate(self.block_out_channels):
            if width % self.norm_num_groups:
                raise ValueError(f"level {level}: {width} channels are not divisible into norm_num_groups = {self.norm_num_groups}")
            if self.attends(level) and width % self.head_channels(level):
                raise ValueError(f"level {level}: {width} channels are not divisible into heads of {self.attention_head_dim}")
        return self

    def attends(self, level: int) -> bool:
        """Whether the level has self-attention; the last level also counts for the middle block."""
        in_block = bool(self.attention) and self.attention[level]
        return in_block or (self.mid_attention and level == len(self.block_out_channels) - 1)

    def head_channels(self, level: int) -> int:
        """Channels of one attention head at the level."""
        return self.attention_head_dim or self.block_out_channels[level]

    @property
    def down_block_types(self) -> tuple[str, ...]:
        """diffusers' names of the down blocks, finest first."""
        return tuple("AttnDownBlock2D" if flag else "DownBlock2D" for flag in self._flags())

    @property
    def up_block_types(self) -> tuple[str, ...]:
        """diffusers' names of the up blocks, coarsest first."""
        return tuple("AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(self._flags()))

    def _flags(self) -> tuple[bool, ...]:
        return self.attention or (False,) * len(self.block_out_channels)


class Schedule(Plain):
    """The forward process: how much noise stands at each of train_timesteps steps, and what the network predicts.

    beta_start and beta_end matter to "linear" and "scaled_linear" only; "squaredcos_cap_v2" is the cosine schedule
    (Nichol and Dhariwal, arXiv 2102.09672); "log_snr" has a log-SNR of -log(expm1(1e-4 + 10 t^2)) at t = (k + 1) /
    train_timesteps of timestep k (Tun et al., arXiv 2311.16538). "v_prediction" is Salimans and Ho, arXiv 2202.00512.
    """

    train_timesteps: Annotated[Whole, Field(ge=2, le=TIMESTEPS_MAX)] = 1000
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear", "log_snr"] = "squaredcos_cap_v2"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"

    @model_validator(mode="after")
    def _betas_rise(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}: noise must grow with the timestep")
        return self


class Training(Plain):
    """One site's work in one round.

    local_epochs: passes over the site's training part; max_steps: stops earlier, in optimiser steps. batch_size: images
    a step over all of a site's GPUs. steps_per_epoch: each pass is cut into so many batches instead, as even as can be, of
    one image at least, and batch_size bounds what goes through the network at once; then sites of every size take as many
    steps as pooled training does, each step's gradients weigh by images as the pooled batch's would, and only the sites'
    drift is left of the gap (docs/levers.md).
    proximal_mu: FedProx's weight on mu/2 ||w - w_global||^2 (Li et al., arXiv
    1812.06127), 0 for plain FedAvg. max_grad_norm: 0 for no clipping. heldout_fraction: the part of a site's images
    that is never trained on (at least one image). loss_buckets: equal ranges of timesteps over which the held-out loss
    is reported. seed: the run's own; see `seeding`. loss_weighting: of an image's squared error by its timestep's
    signal-to-noise ratio, see `objective.loss_weights`; min_snr_gamma is that of "min_snr". timesteps: drawn uniformly, or
    from a scrambled Sobol sequence, which fills [0, 1) more evenly. personal: the network's parts (`parts`) that stay at the
    sites: each trains its own, none is uploaded or summed, and a checkpoint holds what the run began with, so that only a site has a
    whole model (FedBN, arXiv 2102.07623: "norms"; FedDiffuse, arXiv 2406.12575: "encoder" is ULatDec, with "bottleneck" UDec).
    anchor_mu: weight on the squared distance of a prediction from the round's global model's on the same noisy image (the global
    model as teacher, as FedGKD, arXiv 2107.00051, has for classifiers), for images whose timestep is anchor_from * train_timesteps or
    later: 0.3 leaves fine detail free and holds the sites together where their gradients part, at middle and high noise.
    control_variates: SCAFFOLD (Karimireddy et al., arXiv 1910.06378): a site's gradients are corrected by c - c_i, what all sites'
    gradients were on average less its own; their changes are summed under the masks with the update, which doubles both transfers.
    """

    local_epochs: Annotated[Whole, Field(ge=1, le=EPOCHS_MAX)] = 1
    batch_size: Annotated[Whole, Field(ge=1, le=BATCH_MAX)] = 64
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    proximal_mu: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    horizontal_flip: Flag = False
    heldout_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    loss_buckets: Annotated[Whole, Field(ge=1, le=BUCKETS_MAX)] = 4
    seed: Annotated[Whole, Field(ge=0, le=SEED_MAX)] = 0
    max_steps: Annotated[Whole, Field(ge=1, le=STEPS_MAX)] | None = None
    steps_per_epoch: Annotated[Whole, Field(ge=1, le=STEPS_MAX)] | None = None
    loss_weighting: Literal["uniform", "min_snr", "alpha_squared"] = "uniform"
    min_snr_gamma: Annotated[float, Field(gt=0, le=1e6)] = 5.0
    timesteps: Literal["uniform", "sobol"] = "uniform"
    personal: Annotated[tuple[Part, ...], Field(max_length=PARTS_MAX)] = ()
    anchor_mu: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    anchor_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    control_variates: Flag = False

    @model_validator(mode="after")
    def _decay_has_an_optimiser(self) -> Self:
        if self.weight_decay and self.optimiser == "adam":
            raise ValueError("weight_decay needs optimiser = adamw: Adam would fold the decay into its moments")
        if len(set(self.personal)) != len(self.personal):
            raise ValueError("personal: a part stands twice")
        if self.anchor_from and not self.anchor_mu:
            raise ValueError("anchor_from says where anchor_mu holds, and anchor_mu is 0: give it a weight")
        return self


class Sampling(Plain):
    """How images are drawn unless a command says otherwise: the sampler, and denoising steps an image."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: Annotated[Whole, Field(ge=1, le=TIMESTEPS_MAX)] = 50


class Preset(Plain):
    """A whole diffusion recipe: a model, its schedule, its local training and how to sample from it.

    Raises pydantic.ValidationError where the four do not fit one another.
    """

    architecture: Architecture
    schedule: Schedule
    training: Training
    sampling: Sampling

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        check_fits(self.architecture, self.schedule, self.training, self.sampling)
        return self


def check_fits(architecture: Architecture, schedule: Schedule, training: Training, sampling: Sampling) -> None:
    """Refuse parts that are each possible and not together.

    Raises ValueError (a manifest's own validator calls this).
    """
    if training.loss_buckets > schedule.train_timesteps:
        raise ValueError(f"loss_buckets {training.loss_buckets} exceed the schedule's {schedule.train_timesteps} timesteps")
    if sampling.steps > schedule.train_timesteps:
        raise ValueError(f"sampling steps {sampling.steps} exceed the schedule's {schedule.train_timesteps} timesteps")
    if architecture.network == "residual" and (schedule.beta_schedule != "log_snr" or schedule.train_timesteps != LOG_SNR_TIMESTEPS):
        raise ValueError(
            'network = "residual" is told the log-SNR of its input, and knows only '
            f'beta_schedule = "log_snr" with {LOG_SNR_TIMESTEPS} train_timesteps'
        )
